"""Writes a clip with new audio: a .wav or .flac file, or a video file whose video packets are copied from the source unchanged.

The audio comes in blocks and is written as it comes, in memory that does not grow with the clip. The A/V offset is kept: the new
file has the lag of the source (Source.lag_s) within a millisecond, and shows it by presentation times, even where the source,
an original Grid MPEG, does not. Video is never re-encoded. Other content of the source (other streams, chapters, tags) is copied
where the target can hold it, and named in a warning where not.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from avsi_jax.media import audio_metadata, clip_io, stream_copy

if TYPE_CHECKING:
    import av

WAV_BYTES = 2**32 - 2**20  # the sizes in a plain .wav have 32 bits
PIECE = 4096  # samples that are encoded between two video packets, at most
FORMATS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov", ".mpg": "mpeg", ".mpeg": "mpeg"}  # for targets with video
PCM_CODECS = {
    "PCM_16": ("pcm_s16le", "s16"),
    "PCM_24": ("pcm_s24le", "s32"),
    "PCM_32": ("pcm_s32le", "s32"),
    "FLOAT": ("pcm_f32le", "flt"),
    "DOUBLE": ("pcm_f64le", "dbl"),
}
SAME_TIME_S = 1e-3
MP2_RATES = (16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
MP2_DELAY, MP2_FRAME = 481, 1152  # samples: delay of ffmpeg's encoder; size of a packet
MAX_REORDERED = 16  # frames that a codec may hold back
LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}


class SourceProperties(Protocol):
    """The attributes of clip_source.Source that this module uses."""

    path: str
    rate: int
    channels: int
    num_samples: int
    subtype: str
    has_video: bool
    fps: float
    video_start_s: float
    audio_start_s: float
    lag_s: float
    track: int


def write_clip(
    source: SourceProperties, target: os.PathLike | str, blocks: Iterable[np.ndarray], *, overwrite: bool = False
) -> tuple[str, ...]:
    """Writes the clip of a clip_source.Source with new audio; returns warnings.

    `blocks`: the new audio, float arrays (n, C) in order, num_samples in all. .wav and .flac hold the audio alone, with the rate,
    channels and subtype of the source. .mp4 .mkv .mov .mpg .mpeg also hold the source's video, copied, at the same A/V offset, and
    the rest of the file (stream_copy); their audio is lossless (FLAC or PCM), except in .mpg, where it is MP2. The file appears
    complete or not at all.

    Raises FileExistsError; MediaError for content that the target cannot hold, for blocks of another size, for samples that are not
    finite, and for a failed write.
    """
    import av
    import soundfile

    target = Path(target)
    writer = _writer_for(source, target)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; use overwrite (--overwrite) to replace it, or choose another name")
    part = target.with_name(f".{secrets.token_hex(6)}.part{target.suffix.lower()}")
    try:
        warnings = writer(source, part, target, _checked_pieces(source, blocks))
        os.replace(part, target)
    except (av.FFmpegError, soundfile.SoundFileError, OSError) as e:
        hint = "expected an existing folder with free space, and a clip that this format can hold (.mkv holds all)"
        raise clip_io.MediaError(f"{target}: cannot be written ({clip_io.one_line(e)}); {hint}") from e
    finally:
        part.unlink(missing_ok=True)
    return warnings


def has_video(path: os.PathLike | str) -> bool:
    """Whether a file has video besides a cover image, by its header; by its suffix where it cannot be opened."""
    import av

    try:
        if clip_io.is_audio_file(clip_io.check_file(path)):
            return False
        with clip_io.open_container(path) as container:
            return clip_io.select_streams(container)[0] is not None
    except (av.FFmpegError, ValueError, OSError):
        return Path(path).suffix.lower() in clip_io.VIDEO_SUFFIXES


def _writer_for(source: SourceProperties, target: Path) -> Callable:
    suffix = target.suffix.lower()
    if not source.num_samples:
        raise clip_io.MediaError(f"{source.path}: has no audio to write to {target}; expected a clip with audio")
    if suffix in clip_io.AUDIO_SUFFIXES:
        return _write_audio
    if suffix not in FORMATS:
        known = " ".join((*clip_io.AUDIO_SUFFIXES, *FORMATS))
        raise clip_io.MediaError(f"{target}: found suffix {target.suffix!r}, expected one of {known}")
    if not Path(source.path).is_file():
        what = f"{source.path or 'the clip'} is not a file whose video could be copied"
        raise clip_io.MediaError(f"{target}: {what}; use a .wav or .flac target")
    return _write_video


def _checked_pieces(source: SourceProperties, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The blocks in pieces of at most PIECE samples; MediaError where they do not match the source or are not finite."""
    count = 0
    for block in blocks:
        block = np.asarray(block)
        if block.ndim != 2 or block.shape[1] != source.channels:
            raise clip_io.MediaError(f"{source.path}: found a block of shape {block.shape}, expected (n, {source.channels})")
        if not np.isfinite(block).all():
            raise clip_io.MediaError(f"{source.path}: the audio to write holds NaN or infinite samples; nothing is written")
        count += len(block)
        yield from (block[start : start + PIECE] for start in range(0, len(block), PIECE))
    if count != source.num_samples:
        raise clip_io.MediaError(f"{source.path}: found {count} samples to write, expected all {source.num_samples}")


def _write_audio(source: SourceProperties, part: Path, target: Path, pieces: Iterator[np.ndarray]) -> tuple[str, ...]:
    import soundfile

    kind, subtype, warnings = part.suffix[1:].upper(), source.subtype, ()
    if clip_io.PCM_BITS.get(subtype) == 8 and not soundfile.check_format(kind, subtype):
        subtype = "PCM_16"  # holds the same values
    if not soundfile.check_format(kind, subtype):
        raise clip_io.MediaError(f"{target}: {kind.lower()} cannot hold subtype {subtype}; use a .wav target")
    size = source.num_samples * source.channels * (clip_io.PCM_BITS.get(subtype, 64 if subtype == "DOUBLE" else 32) // 8)
    if kind == "WAV" and size > WAV_BYTES:
        warning = f"{target.name} is too long for a plain .wav: written as RF64, which some programs cannot read"
        kind, warnings = "RF64", (warning,)
    has_file, lost = Path(source.path).is_file(), ()
    with soundfile.SoundFile(part, "w", source.rate, source.channels, subtype, format=kind) as out:
        if has_file:
            lost += audio_metadata.set_tags(out, source.path, source.track, not source.has_video)
        for piece in pieces:
            out.write(clip_io.to_subtype(piece, subtype))
    with soundfile.SoundFile(part) as written:  # libsndfile reports no error where the disk is too full for the end of a .flac
        written.seek(source.num_samples - 1)
        if len(written.read(1)) != 1:
            raise OSError("its end was not written")
    if has_file:
        lost += audio_metadata.copy_metadata(source.path, part, source.track)
    return (*warnings, *stream_copy.left_out_warning(target, lost))


@dataclasses.dataclass(frozen=True)
class _AudioEncoding:
    """How a container stores the audio: ffmpeg's codec and sample format, subtype, rate (Hz); `delay` of the codec, samples."""

    codec: str
    format: str
    subtype: str
    rate: int
    warnings: tuple[str, ...] = ()
    delay: int = 0


def _encoding_for(source: SourceProperties, target: Path) -> _AudioEncoding:
    """The encoding for the target's suffix; MediaError where the format has none for the source's audio."""
    suffix, rate, bits = target.suffix.lower(), source.rate, clip_io.PCM_BITS.get(source.subtype, 0)
    subtype = "PCM_16" if bits in (8, 16) else source.subtype
    if suffix in (".mpg", ".mpeg"):
        return _mp2_encoding(source, target)
    is_flac_rate = rate < 65_536 or (rate < 655_360 and rate % 10 == 0)
    if suffix == ".mov" or bits not in (8, 16, 24) or source.channels > 8 or not is_flac_rate:
        codec, sample_format = PCM_CODECS[subtype]
        return _AudioEncoding(codec, sample_format, subtype, rate)
    return _AudioEncoding("flac", "s16" if subtype == "PCM_16" else "s32", subtype, rate)


def _mp2_encoding(source: SourceProperties, target: Path) -> _AudioEncoding:
    if source.channels > 2:
        raise clip_io.MediaError(f"{target}: .mpg holds 2 channels, found {source.channels}; use a .mkv or .mov target")
    rate = min((r for r in MP2_RATES if r >= source.rate), default=MP2_RATES[-1])
    warnings = ["the audio of an .mpg is MP2, which is lossy for the whole clip; a .mkv or .mov keeps it unchanged"]
    if rate != source.rate:
        warnings.append(f"an .mpg cannot hold audio at {source.rate} Hz; it is resampled to {rate} Hz")
    return _AudioEncoding("mp2", "s16", "PCM_16", rate, tuple(warnings), MP2_DELAY)


def _write_video(source: SourceProperties, part: Path, target: Path, pieces: Iterator[np.ndarray]) -> tuple[str, ...]:
    import av

    encoding, kind = _encoding_for(source, target), FORMATS[part.suffix]
    with clip_io.open_container(source.path) as container:
        video, audio = clip_io.select_streams(container, video=source.has_video, track=source.track)
        times, num_hidden = (np.zeros(0), 0) if video is None else _frame_times(source.path, target)
        tag = "" if video is None else _video_tag(video, kind, target)
        others = stream_copy.OtherStreams(container, kind, [s for s in (video, audio) if s is not None])
        video_out = audio_out = None
        with av.open(str(part.absolute()), "w", format=kind, options=stream_copy.muxer_options(kind, container)) as out:
            for stream in container.streams:
                if video is not None and stream.index == video.index:
                    video_out = stream_copy.add_stream(out, stream, tag)
                elif audio is not None and stream.index == audio.index:
                    audio_out = _add_audio_stream(out, source, encoding, stream)
                else:
                    others.add_to(out, stream)
            hidden_lag_s = 0.0 if encoding.delay else _hidden_lag_s(source)
            start_s = min(source.video_start_s + hidden_lag_s, source.audio_start_s) if video is not None else source.audio_start_s
            stream_copy.copy_tags(container, out, start_s)
            frames = _audio_frames(source, encoding, audio_out.layout.name, pieces, source.audio_start_s - start_s)
            retimed = video and _VideoTimes(video.time_base, _reorder_depth(times), start_s - hidden_lag_s, source.fps)
            packets = _packets(container, video, video_out, retimed, others, start_s)
            _interleave(out, packets, audio_out, frames)
        lost = [*others.left_out, *stream_copy.not_kept(container, video, part)]
    video_warnings = () if video is None else _video_warnings(part, target, times, num_hidden)
    return (*encoding.warnings, *video_warnings, *stream_copy.left_out_warning(target, lost))


def _video_tag(video: av.VideoStream, kind: str, target: Path) -> str:
    """The codec tag for a copy of the video; MediaError where the format cannot hold it."""
    codec = video.codec_context.codec.canonical_name
    is_held = kind != stream_copy.MPEG or codec in ("mpeg1video", "mpeg2video")
    tag = stream_copy.fitting_tag(kind, video) if is_held else None
    if tag is None:
        raise clip_io.MediaError(f"{target}: {target.suffix} cannot hold {codec} video; use a .mkv target")
    return tag


def _add_audio_stream(
    out: av.container.OutputContainer, source: SourceProperties, encoding: _AudioEncoding, audio: av.AudioStream
) -> av.AudioStream:
    """Adds the stream of the new audio, with the tags and flags of the source's."""
    audio_out = out.add_stream(encoding.codec, rate=encoding.rate)
    audio_out.layout = _layout(audio, source.channels)
    audio_out.codec_context.format = encoding.format
    if encoding.codec == "mp2":
        max_channel_bit_rate = 192_000 if encoding.rate >= 32_000 else 80_000
        audio_out.bit_rate = max_channel_bit_rate * source.channels
    stream_copy.describe_as(audio_out, audio)
    return audio_out


def _hidden_lag_s(source: SourceProperties) -> float:
    """The part of a source's lag that its presentation times do not show: the delay in Grid's own audio, seconds."""
    hidden_lag_s = source.lag_s - (source.video_start_s - source.audio_start_s)
    return hidden_lag_s if abs(hidden_lag_s) > clip_io.SAME_START_S else 0.0


def _video_warnings(part: Path, target: Path, times: np.ndarray, num_hidden: int) -> Iterator[str]:
    """Warnings about the written video, from the times of its frames."""
    if num_hidden and target.suffix.lower() not in (".mp4", ".mov"):
        yield f"{num_hidden} frames that the source trims from its start are visible again; .mp4 and .mov keep them hidden"
    new_times = _frame_times(part, target)[0] if FORMATS[part.suffix] == "mpeg" else times
    if len(new_times) != len(times) or np.abs(new_times - times).max() > SAME_TIME_S:
        yield "an .mpg does not store the time of every small frame: some are shown early or late; a .mkv stores them"


def _layout(audio: av.AudioStream | None, channels: int) -> str:
    """ffmpeg's name of the channel layout: the source's where it has a specific one of more than two channels."""
    is_named = audio is not None and channels > 2 and audio.layout.nb_channels == channels and "channels" not in audio.layout.name
    return audio.layout.name if is_named else LAYOUTS.get(channels, f"{channels} channels")


class _VideoTimes:
    """Gives the packets of a video times relative to start_s, in ticks of MAX_TICK_S or finer.

    Decoding times are recomputed, since many containers do not store them: each is the presentation time of the frame shown
    `depth` frames earlier.
    """

    def __init__(self, time_base: Fraction, depth: int, start_s: float, fps: float):
        self.tick, self.start, self.refinement = stream_copy.finer_ticks(time_base, start_s)
        self.frame_ticks = max(1, round(1 / Fraction(fps).limit_denominator(1001) / self.tick))
        self.depth, self.shown, self.last_dts = depth, [], None

    def set_times(self, packet: av.Packet) -> None:
        """Changes the times of the next packet."""
        packet.time_base, packet.duration = self.tick, self.refinement * (packet.duration or 0) or self.frame_ticks
        packet.pts = self.refinement * packet.pts - self.start
        is_first = self.last_dts is None
        if is_first:
            self.shown = [packet.pts - k * self.frame_ticks for k in range(self.depth, 0, -1)]
        heapq.heappush(self.shown, packet.pts)
        dts = heapq.heappop(self.shown)
        packet.dts = self.last_dts = dts if is_first else max(dts, self.last_dts + 1)
        packet.pts = max(packet.pts, packet.dts)  # of two frames at one time, the second is shown a tick later


def _packets(
    container: av.container.InputContainer, video: av.VideoStream | None, video_out: av.VideoStream | None,
    times: _VideoTimes | None, others: stream_copy.OtherStreams, start_s: float,
) -> Iterator[av.Packet]:  # fmt: skip
    """The packets that are copied, unchanged but for their times, in the order of the file."""
    streams = [container.streams[index] for index in others.copies] + ([video] if video is not None else [])
    for packet in container.demux(streams) if streams else ():
        if video is not None and packet.stream_index == video.index:
            if packet.size:
                times.set_times(packet)
                packet.stream = video_out
                yield packet
        elif (shifted := others.shifted(packet, start_s)) is not None:
            yield shifted


def _frame_times(path: os.PathLike | str, target: Path) -> tuple[np.ndarray, int]:
    """Times of the frames in the order of the file, s from the first one shown; and how many frames the file hides."""
    with clip_io.open_container(path) as container:
        video = clip_io.select_streams(container)[0]
        packets = [(packet.pts, packet.is_discard) for packet in _data_packets(container, video)]
        if any(pts is None for pts, _ in packets):
            raise clip_io.MediaError(f"{target}: the source has frames without times; use a .wav or .flac target")
        ticks = np.array([pts for pts, _ in packets])
        return (ticks - ticks.min()) * float(video.time_base), sum(is_hidden for _, is_hidden in packets)


def _reorder_depth(times: np.ndarray) -> int:
    """The largest number of frames that precede a frame in the file and are shown after it."""
    return max(int((times[max(0, k - MAX_REORDERED) : k] > times[k]).sum()) for k in range(len(times)))


def _data_packets(container: av.container.InputContainer, video: av.VideoStream) -> Iterator[av.Packet]:
    return (packet for packet in container.demux(video) if packet.size)


def _audio_frames(
    source: SourceProperties, encoding: _AudioEncoding, layout: str, pieces: Iterator[np.ndarray], start_s: float
) -> Iterator[av.AudioFrame]:
    """PyAV's audio frames, the first sample at start_s.

    The packets' times compensate for a codec's delay. Not where the source is Grid's own, whose delay is not in its times and is
    known from that (clip_io.audio_lag_s): there the first samples of silence are dropped instead.
    """
    import av

    position, skip = round(start_s * encoding.rate), encoding.delay if _hidden_lag_s(source) else 0
    for x in _encoder_input(pieces, source, encoding, skip):
        dropped, skip = x[:skip], max(0, skip - len(x))
        x, position = x[len(dropped) :], position + len(dropped)
        x = clip_io.to_int16(x) if encoding.format == "s16" else clip_io.to_subtype(x, encoding.subtype)
        if len(x):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x).reshape(1, -1), format=encoding.format, layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = encoding.rate, position, Fraction(1, encoding.rate)
            position += len(x)
            yield frame


def _encoder_input(
    pieces: Iterator[np.ndarray], source: SourceProperties, encoding: _AudioEncoding, skip: int
) -> Iterator[np.ndarray]:
    """The audio at the codec's rate; followed by silence where the codec's delay would cut off its end."""
    count = -skip
    for x in pieces if encoding.rate == source.rate else _resampled(pieces, source, encoding.rate):
        count += len(x)
        yield x
    if encoding.delay:
        yield np.zeros((encoding.delay + -(count + encoding.delay) % MP2_FRAME, source.channels), np.float32)


def _resampled(pieces: Iterator[np.ndarray], source: SourceProperties, rate: int) -> Iterator[np.ndarray]:
    import soxr

    stream = soxr.ResampleStream(source.rate, rate, source.channels, dtype="float32", quality="HQ")
    for x in pieces:
        yield stream.resample_chunk(np.ascontiguousarray(x, np.float32))
    yield stream.resample_chunk(np.zeros((0, source.channels), np.float32), last=True)


def _interleave(
    out: av.container.OutputContainer, packets: Iterator[av.Packet], audio: av.AudioStream, frames: Iterator[av.AudioFrame]
) -> None:
    """Writes copied packets and audio frames in the order of their times."""
    audio_end_s = -np.inf
    for packet in packets:
        while audio_end_s < packet.dts * packet.time_base:
            frame = next(frames, None)
            audio_end_s = np.inf if frame is None else frame.time + frame.samples / frame.sample_rate
            out.mux(audio.encode(frame) if frame is not None else [])
        out.mux(packet)
    for frame in itertools.chain(frames, [None]):
        out.mux(audio.encode(frame))
