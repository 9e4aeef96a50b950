"""Copies what a clip file holds besides the audio that is written anew: other streams, cover images, chapters and tags.

Packets are copied unchanged. Whether a format can hold a stream is tried in memory, and what became of tags, chapters and the
geometry of the video is read from the written file. Everything that the format cannot hold is named.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from avsi_jax.media import clip_io

if TYPE_CHECKING:
    import os

    import av

MAX_TICK_S = Fraction(1, 1000)  # resolution of the written times
# Tags that describe the file as it was written, not its content
TECHNICAL_TAGS = (
    "encoder", "encoder_options", "major_brand", "minor_version", "compatible_brands", "duration", "vendor_id", "bps",
    "number_of_frames", "number_of_bytes", "_statistics_writing_app", "_statistics_writing_date_utc", "_statistics_tags",
    "source_id", "variant_bitrate", "ismv",
)  # fmt: skip
MOV_TAGS = (  # that .mov and .mp4 hold without the option use_metadata_tags; other tags need it
    "title", "artist", "album_artist", "composer", "album", "date", "comment", "genre", "copyright", "grouping", "lyrics",
    "description", "synopsis", "show", "episode_id", "network", "keywords", "track", "disc", "creation_time", "language", "tmpo",
    "compilation", "sort_name", "sort_artist", "sort_album_artist", "sort_album", "sort_composer", "sort_show",
)  # fmt: skip
MPEG = "mpeg"  # the format that holds nothing but one video and one audio stream


def content_tags(metadata: dict[str, str]) -> dict[str, str]:
    """The tags without those that describe the old file as it was written."""
    return {key: value for key, value in metadata.items() if key.lower().partition("-")[0] not in TECHNICAL_TAGS and value}


def muxer_options(kind: str, container: av.container.InputContainer) -> dict[str, str]:
    """Options for av.open with which a format holds the tags and default flags of the container."""
    if kind == "matroska":
        return {"default_mode": "passthrough"}
    if kind in ("mov", "mp4") and any(key.lower() not in MOV_TAGS for key in content_tags(container.metadata)):
        return {"movflags": "use_metadata_tags"}
    return {}


def add_stream(out: av.container.OutputContainer, stream: av.stream.Stream, tag: str = "") -> av.stream.Stream:
    """Adds a copy of a stream's parameters, with its language, title and flags. tag: codec tag; '': that of the format."""
    if stream.codec_context is None:
        return out.add_stream_from_template(stream)
    copy = out.add_stream_from_template(stream, opaque=True)  # opaque: av1 has a decoder of another name than its encoders
    if tag:
        copy.codec_context.codec_tag = tag
    if stream.type == "video" and stream.sample_aspect_ratio:
        copy.codec_context.sample_aspect_ratio = stream.sample_aspect_ratio
    describe_as(copy, stream)
    return copy


def describe_as(copy: av.stream.Stream, stream: av.stream.Stream) -> None:
    """Gives a written stream the tags and flags of another."""
    copy.metadata.update(content_tags(stream.metadata))
    copy.disposition = int(stream.disposition)


def fitting_tag(kind: str, stream: av.stream.Stream) -> str | None:
    """The codec tag with which a format can hold a stream: its own where possible, else ''; None if it cannot hold it."""
    for tag in (_codec_tag(stream), "") if _codec_tag(stream) else ("",):
        if _is_accepted(kind, stream, tag):
            return tag
    return None


def _codec_tag(stream: av.stream.Stream) -> str:
    try:
        return stream.codec_context.codec_tag.strip("\0") and stream.codec_context.codec_tag if stream.codec_context else ""
    except UnicodeDecodeError:
        return ""


def _is_accepted(kind: str, stream: av.stream.Stream, tag: str) -> bool:
    import av

    try:
        with av.open(io.BytesIO(), "w", format=kind) as out:
            copy = add_stream(out, stream, tag)
            out.start_encoding()
            if stream.type == "data" and (data := _first_packet(stream)):  # a time code track fails only at the end
                packet = av.Packet(data)
                packet.pts, packet.dts, packet.time_base, packet.stream = 0, 0, stream.time_base, copy
                out.mux(packet)
    except (av.FFmpegError, ValueError):
        return False
    return True


class OtherStreams:
    """The streams of a container except those given: copied to `out` where its format, `kind`, can hold them.

    copies: {index in the container: stream of out}. left_out: names of the others.
    """

    def __init__(self, container: av.container.InputContainer, kind: str, written: Sequence[av.stream.Stream]):
        self.container, self.kind = container, kind
        self._written = [stream.index for stream in written]
        self.copies, self.left_out, self._last_dts = {}, [], {}

    def add_to(self, out: av.container.OutputContainer, stream: av.stream.Stream) -> None:
        """Adds a copy of a stream to `out`, or its name to left_out."""
        if self._is_copied_otherwise(stream):
            return
        if self.kind == "matroska" and _is_cover(stream):
            self._attach_cover(out, stream)
            return
        tag = None if self.kind == MPEG else fitting_tag(self.kind, stream)
        if tag is None:
            self.left_out.append(name_of(stream))
        else:
            self.copies[stream.index] = add_stream(out, stream, tag)

    def _is_copied_otherwise(self, stream: av.stream.Stream) -> bool:
        """Whether it is the text track of the chapters in .mov and .mp4: chapters are copied as such."""
        return stream.type == "data" and stream.name == "bin_data" and bool(self.container.chapters())

    def _attach_cover(self, out: av.container.OutputContainer, stream: av.stream.Stream) -> None:
        kind = {"mjpeg": ("cover.jpg", "image/jpeg"), "png": ("cover.png", "image/png")}.get(_codec(stream))
        data = _first_packet(stream)
        if not kind or not data:
            self.left_out.append("the cover image")
            return
        attached = out.add_attachment(stream.metadata.get("filename", kind[0]), stream.metadata.get("mimetype", kind[1]), data)
        attached.metadata.update(content_tags(stream.metadata))

    def shifted(self, packet: av.Packet, start_s: float) -> av.Packet | None:
        """A packet of a copied stream with times relative to start_s; None for one without times or data."""
        stream, copy = packet.stream, self.copies.get(packet.stream_index)
        if copy is None or not packet.size:
            return None
        if _is_cover(stream):
            packet.pts = packet.dts = 0
        elif packet.pts is None and packet.dts is None:
            return None
        else:
            tick, start, refinement = finer_ticks(packet.time_base, start_s)
            pts, dts = (refinement * t - start if t is not None else None for t in (packet.pts, packet.dts))
            packet.time_base, packet.duration = tick, refinement * (packet.duration or 0)
            dts = pts if dts is None else dts
            last = self._last_dts.get(packet.stream_index)
            if last is not None and dts <= last:  # muxers refuse times that go back
                dts = last + max(1, round(MAX_TICK_S / tick))
            packet.dts = self._last_dts[packet.stream_index] = dts
            packet.pts = dts if pts is None else max(pts, dts)
        packet.stream = copy
        return packet


def name_of(stream: av.stream.Stream) -> str:
    """A stream in words: 'audio track 2 (aac, fra)'."""
    if _is_cover(stream):
        return "the cover image"
    if _is_time_code(stream):
        return "the time code track"
    if stream.type == "attachment":
        return f"the attachment {stream.name or ''}".strip()
    number = 1 + [s.index for s in stream.container.streams if s.type == stream.type].index(stream.index)
    details = ", ".join(filter(None, (_codec(stream), stream.metadata.get("language"))))
    return f"{stream.type} track {number}" + (f" ({details})" if details else "")


def finer_ticks(time_base: Fraction, start_s: float) -> tuple[Fraction, int, int]:
    """(a tick of at most MAX_TICK_S, start_s in such ticks, how many of them are in one of time_base)."""
    refinement = -(-time_base // MAX_TICK_S)
    tick = time_base / refinement
    return tick, round(start_s / tick), refinement


def copy_tags(container: av.container.InputContainer, out: av.container.OutputContainer, start_s: float) -> None:
    """Copies the tags and chapters of the file; chapters with times relative to start_s."""
    out.metadata.update(content_tags(container.metadata))
    chapters = []
    for chapter in container.chapters():
        start = round(start_s / chapter["time_base"])
        times = {side: max(0, chapter[side] - start) for side in ("start", "end")}
        chapters.append(chapter | times)
    if chapters:
        out.set_chapters(chapters)


def not_kept(container: av.container.InputContainer, video: av.VideoStream | None, written: os.PathLike | str) -> Iterator[str]:
    """Names of chapters, tags and properties of the video that the written file lacks, by reading it."""
    with clip_io.open_container(written) as new:
        if container.chapters() and len(new.chapters()) < len(container.chapters()):
            yield "the chapters"
        kept = {key.lower() for key in new.metadata}
        lost = [key for key in content_tags(container.metadata) if key.lower() not in kept]
        if lost:
            yield f"the tag{'s' * (len(lost) > 1)} {', '.join(lost)}"
        if _num_covers(new) < min(1, _num_covers(container)):
            yield "the cover image"
        new_video = clip_io.select_streams(new)[0]
        if video is None or new_video is None:
            return
        if (video.sample_aspect_ratio or 1) != (new_video.sample_aspect_ratio or 1):
            yield f"the pixel aspect ratio {video.sample_aspect_ratio}"
        with clip_io.open_container(container.name) as old:
            if _display_matrix(old, video.index) != _display_matrix(new, new_video.index):
                yield "the display matrix, which turns the video"


def _first_packet(stream: av.stream.Stream) -> bytes:
    with clip_io.open_container(stream.container.name) as container:
        return next((bytes(packet) for packet in container.demux(container.streams[stream.index]) if packet.size), b"")


def _display_matrix(container: av.container.InputContainer, index: int) -> bytes:
    import av

    try:
        frame = next(container.decode(container.streams[index]), None)
    except av.FFmpegError:
        return b""
    data = frame.side_data.get("DISPLAYMATRIX") if frame is not None else None
    return bytes(data)[:36] if data is not None else b""


def _num_covers(container: av.container.InputContainer) -> int:
    return sum(_is_cover(stream) for stream in container.streams)


def _is_cover(stream: av.stream.Stream) -> bool:
    from av.stream import Disposition

    return stream.type == "video" and bool(stream.disposition & Disposition.attached_pic)


def _is_time_code(stream: av.stream.Stream) -> bool:
    return stream.type == "data" and "timecode" in stream.metadata


def _codec(stream: av.stream.Stream) -> str:
    if stream.codec_context is None:
        return getattr(stream, "name", None) or ""
    return stream.codec_context.codec.canonical_name


def left_out_warning(target: Path, names: Sequence[str]) -> tuple[str, ...]:
    """One line that names what the target cannot hold; nothing if there is nothing."""
    names = list(dict.fromkeys(names))
    return (f"not copied to {target.name}: {', '.join(names)}",) if names else ()
