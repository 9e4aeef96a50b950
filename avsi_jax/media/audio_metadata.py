"""Keeps what audio files hold besides their samples: RIFF chunks (BWF description, INFO, cue points), the speaker mask, FLAC tags.

A .wav that is written from a .wav gets the chunks of the source as they are, a .flac from a .flac its metadata blocks. Between
other formats the usual tags are copied by libsndfile. What is not kept is named.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from avsi_jax.media import clip_io, stream_copy

if TYPE_CHECKING:
    import os

    import av
    import soundfile

SAMPLE_CHUNKS = (b"fmt ", b"data", b"fact", b"ds64")  # written with the new samples
STALE_CHUNKS = (b"PEAK", b"levl", b"MD5 ", b"JUNK", b"junk", b"PAD ", b"FLLR")  # of the old samples, or padding
MAX_CHUNKS = 1000
EXTENSIBLE = 0xFFFE  # codec number of WAVEFORMATEXTENSIBLE, whose GUID is the codec proper and these bytes
GUID_END = bytes.fromhex("000000001000800000aa00389b71")
COPIED_BETWEEN = {
    b"RIFF": ("WAV", "RF64"),
    b"RF64": ("WAV", "RF64"),
    b"RIFX": (),
    b"fLaC": ("FLAC",),
}  # head of the source: formats
SPEAKERS = ("FL", "FR", "FC", "LFE", "BL", "BR", "FLC", "FRC", "BC", "SL", "SR", "TC", "TFL", "TFC", "TFR", "TBL", "TBC", "TBR")
FLAC_PADDING, FLAC_SEEK_TABLE, FLAC_COMMENT, FLAC_PICTURE = 1, 3, 4, 6
FLAC_MASKS = {1: 0x4, 2: 0x3, 3: 0x7, 4: 0x33, 5: 0x37, 6: 0x3F, 7: 0x70F, 8: 0x63F}  # that a .flac means by its channel count
# libsndfile's tags: attribute of soundfile.SoundFile -> tag of PyAV
TAGS = {
    "title": "title", "artist": "artist", "album": "album", "date": "date", "comment": "comment", "genre": "genre",
    "copyright": "copyright", "tracknumber": "track",
}  # fmt: skip
BLOCK = 2**20


class Chunk(NamedTuple):
    """A part of a file: its id, where its content starts, and its size in bytes."""

    id: bytes
    start: int
    size: int


# ---- tags ------------------------------------------------------------------------------------------------------------------------


def set_tags(out: soundfile.SoundFile, path: os.PathLike | str, track: int, keep_all: bool) -> tuple[str, ...]:
    """Copies the usual tags of a file into one that is about to be written, unless `copy_metadata` will copy them as they are.

    Returns the names of what is lost; only of the tags if not keep_all, as where video is left out on purpose.
    """
    head = _head(path)
    if head in COPIED_BETWEEN and clip_io.is_audio_file(path):
        if out.format not in COPIED_BETWEEN[head]:
            _copy_known_tags(out, path)
        return ()
    with clip_io.open_container(path) as container:
        tags = stream_copy.content_tags(container.metadata)
        for stream in container.streams:
            if stream.type == "audio":
                tags = stream_copy.content_tags(stream.metadata) | tags  # .ogg keeps them there
        _set(out, {name: tags.get(key) or tags.get(key.upper()) for name, key in TAGS.items()})
        return tuple(_lost(container, tags, track)) if keep_all else ()


def _copy_known_tags(out: soundfile.SoundFile, path: os.PathLike | str) -> None:
    import soundfile

    with soundfile.SoundFile(str(path)) as old:
        _set(out, {name: getattr(old, name) for name in TAGS})


def _set(out: soundfile.SoundFile, values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value:
            setattr(out, name, value)


def _lost(container: av.container.InputContainer, tags: dict[str, str], track: int) -> Iterator[str]:
    others = [key for key in tags if key.lower() not in (*TAGS.values(), "handler_name", "language")]
    if others:
        yield f"the tag{'s' * (len(others) > 1)} {', '.join(others)}"
    if container.chapters():
        yield "the chapters"
    audio = clip_io.select_streams(container, video=False, track=track)[1]
    yield from (stream_copy.name_of(s) for s in container.streams if s.index != audio.index and s.type != "data")


# ---- chunks and blocks -----------------------------------------------------------------------------------------------------------


def copy_metadata(path: os.PathLike | str, written: Path, track: int) -> tuple[str, ...]:
    """Copies chunks, blocks and the speaker mask of a file into the audio file that was written; returns what is lost."""
    old, new = _head(path), _head(written)
    is_wav = old in (b"RIFF", b"RF64") and clip_io.is_audio_file(path)
    mask = _speaker_mask(path, track)
    if new in (b"RIFF", b"RF64"):
        _complete_wav(Path(path) if is_wav else None, written, mask)
        return tuple(_foreign_names(path)) if old == b"fLaC" else ()
    if old == b"fLaC":
        _complete_flac(Path(path), written)
        return ()
    lost = [_chunk_name(path, chunk) for chunk in _content_chunks(path)] if is_wav else []
    with open(written, "rb") as file:
        num_channels = (file.read(21)[20] >> 1 & 7) + 1  # of FLAC's stream info
    return (*lost, *(["the speaker mask"] if mask and mask != FLAC_MASKS[num_channels] else []))


def _head(path: os.PathLike | str) -> bytes:
    with open(path, "rb") as file:
        return file.read(4)


def riff_chunks(path: os.PathLike | str) -> list[Chunk]:
    """The chunks of a RIFF or RF64 file; sizes are limited to what the file holds."""
    chunks, data_size = [], None
    with open(path, "rb") as file:
        end, at = file.seek(0, 2), 12
        while at + 8 <= end and len(chunks) < MAX_CHUNKS:
            file.seek(at)
            name, size = struct.unpack("<4sI", file.read(8))
            if name == b"ds64":
                data_size = struct.unpack("<8xQ", file.read(16).ljust(16, b"\0"))[0]
            if name == b"data" and size == 2**32 - 1 and data_size is not None:
                size = data_size
            chunks.append(Chunk(name, at + 8, min(size, end - at - 8)))
            at += 8 + size + size % 2
    return chunks


def _content_chunks(path: os.PathLike | str) -> list[Chunk]:
    return [chunk for chunk in riff_chunks(path) if chunk.id not in SAMPLE_CHUNKS + STALE_CHUNKS]


def _chunk_name(path: os.PathLike | str, chunk: Chunk) -> str:
    kind = b" " + _content(path, chunk._replace(size=min(4, chunk.size))) if chunk.id == b"LIST" else b""
    return f"the chunk {(chunk.id.strip() + kind).decode('ascii', 'replace')}"


def _content(path: os.PathLike | str, chunk: Chunk) -> bytes:
    with open(path, "rb") as file:
        file.seek(chunk.start)
        return file.read(chunk.size)


def _speaker_mask(path: os.PathLike | str, track: int) -> int:
    """The speakers of the channels, one bit each as in WAVEFORMATEXTENSIBLE; 0 where the file does not say."""
    if not clip_io.is_audio_file(path):
        with clip_io.open_container(path) as container:
            audio = clip_io.select_streams(container, video=False, track=track)[1]
            names = [channel.name for channel in audio.layout.channels] if audio is not None else []
        is_known = len(names) > 2 and all(name in SPEAKERS for name in names)
        return sum(1 << SPEAKERS.index(name) for name in names) if is_known else 0
    if _head(path) not in (b"RIFF", b"RF64"):
        return 0
    form = next((_content(path, c) for c in riff_chunks(path) if c.id == b"fmt "), b"")
    return struct.unpack_from("<I", form, 20)[0] if len(form) >= 40 and form[:2] == struct.pack("<H", EXTENSIBLE) else 0


def _complete_wav(source: Path | None, written: Path, mask: int) -> None:
    """Rewrites a .wav with the speaker mask and the source's chunks, in the source's order."""
    extra = _content_chunks(source) if source else []
    if not extra and not mask:
        return
    own = {chunk.id: chunk for chunk in riff_chunks(written)}
    head = _head(written)
    order = [c for c in riff_chunks(source or written) if c.id in (b"fmt ", b"data") or c.id not in SAMPLE_CHUNKS + STALE_CHUNKS]
    part = written.with_name(f"{written.name}.part")
    try:
        with open(part, "wb") as out:
            out.write(head + bytes(4) + b"WAVE")
            if head == b"RF64":
                out.write(struct.pack("<4sI", b"ds64", own[b"ds64"].size) + _content(written, own[b"ds64"]))
            for chunk in order:
                _write_in_order(out, chunk, source or written, written, own, mask)
            _set_size(out, head)
        part.replace(written)
    finally:
        part.unlink(missing_ok=True)


def _write_in_order(out: BinaryIO, chunk: Chunk, source: Path, written: Path, own: dict[bytes, Chunk], mask: int) -> None:
    """Writes a chunk of the source; in place of its format and samples those of the written file."""
    if chunk.id == b"fmt ":
        form = _with_mask(_content(written, own[b"fmt "]), mask)
        out.write(struct.pack("<4sI", b"fmt ", len(form)) + form)
        if b"fact" in own:
            _copy_chunk(out, written, own[b"fact"])
    elif chunk.id == b"data":
        _copy_chunk(out, written, own[b"data"])
    else:
        _copy_chunk(out, source, chunk)


def _with_mask(form: bytes, mask: int) -> bytes:
    """A format chunk as WAVEFORMATEXTENSIBLE with a speaker mask; unchanged without one."""
    codec, *_, bits = struct.unpack_from("<HHIIHH", form)
    if not mask or len(form) >= 40:
        return form[:20] + struct.pack("<I", mask) + form[24:] if mask else form
    return struct.pack("<H", EXTENSIBLE) + form[2:16] + struct.pack("<HHIH", 22, bits, mask, codec) + GUID_END


def _copy_chunk(out: BinaryIO, path: Path, chunk: Chunk) -> None:
    out.write(struct.pack("<4sI", chunk.id, min(chunk.size, 2**32 - 1)))
    with open(path, "rb") as file:
        file.seek(chunk.start)
        left = chunk.size
        while left and (block := file.read(min(BLOCK, left))):
            out.write(block)
            left -= len(block)
    out.write(bytes(chunk.size % 2))


def _set_size(out: BinaryIO, head: bytes) -> None:
    size = out.tell() - 8
    if head == b"RF64":
        out.seek(4)
        out.write(b"\xff" * 4)
        out.seek(20)
        out.write(struct.pack("<Q", size))
    else:
        out.seek(4)
        out.write(struct.pack("<I", size))


def flac_blocks(path: os.PathLike | str) -> list[Chunk]:
    """The metadata blocks of a .flac file; each id is one byte, the block's type."""
    blocks = []
    with open(path, "rb") as file:
        at, is_last = 4, False
        while not is_last and len(blocks) < MAX_CHUNKS:
            file.seek(at)
            header = file.read(4)
            if len(header) < 4:
                break
            is_last = bool(header[0] & 0x80)
            blocks.append(Chunk(bytes([header[0] & 0x7F]), at + 4, int.from_bytes(header[1:], "big")))
            at += 4 + blocks[-1].size
    return blocks


def _complete_flac(source: Path, written: Path) -> None:
    """Rewrites a .flac with the source's tags, pictures and other blocks instead of its own."""
    copied = [b for b in flac_blocks(source)[1:] if b.id[0] not in (FLAC_PADDING, FLAC_SEEK_TABLE)]
    if not copied:
        return
    own = flac_blocks(written)
    replaced = {block.id for block in copied}
    kept = [(written, b) for b in own if b.id not in replaced and b.id[0] != FLAC_PADDING]
    part = written.with_name(f"{written.name}.part")
    try:
        with open(part, "wb") as out, open(written, "rb") as samples:
            out.write(b"fLaC")
            _write_blocks(out, [*kept, *((source, block) for block in copied)])
            samples.seek(own[-1].start + own[-1].size)
            while block := samples.read(BLOCK):
                out.write(block)
        part.replace(written)
    finally:
        part.unlink(missing_ok=True)


def _write_blocks(out: BinaryIO, blocks: list[tuple[Path, Chunk]]) -> None:
    for number, (path, block) in enumerate(blocks, 1):
        last = 0x80 if number == len(blocks) else 0
        out.write(bytes([block.id[0] | last]) + block.size.to_bytes(3, "big") + _content(path, block))


def _foreign_names(path: os.PathLike | str) -> Iterable[str]:
    """Names of what a .flac holds besides the usual tags."""
    blocks = {block.id[0] for block in flac_blocks(path)}
    return ["the pictures"] if FLAC_PICTURE in blocks else []
