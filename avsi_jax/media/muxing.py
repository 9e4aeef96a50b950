"""A clip with another sound: .wav or .flac, or a video file whose pictures are the source's own packets, copied as they are.

The sound comes in blocks and is written as it comes, in memory that does not grow with the clip. Sound and pictures keep the step
they had: what is written has the lag of the source (Source.lag_s), within a millisecond, and tells it by presentation times, also
where the source, Grid's own MPEGs, does not. Not done here: pictures are never encoded; what else the source holds (other streams,
chapters, titles) is left out.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import os
import secrets
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from avsi_jax.media import clip_io

WAV_BYTES = 2**32 - 2**20  # a plain .wav counts its bytes in 32 bits
PIECE = 4096  # samples encoded between two pictures, at most
FORMATS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov", ".mpg": "mpeg", ".mpeg": "mpeg"}  # written, with pictures
PCM_CODECS = {
    "PCM_16": ("pcm_s16le", "s16"),
    "PCM_24": ("pcm_s24le", "s32"),
    "PCM_32": ("pcm_s32le", "s32"),
    "FLOAT": ("pcm_f32le", "flt"),
    "DOUBLE": ("pcm_f64le", "dbl"),
}
SAME_TIME_S = 1e-3
TICK_S = Fraction(1, 1000)  # times are written as finely as this, at least
MP2_RATES = (16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
MP2_DELAY, MP2_FRAME = 481, 1152  # samples by which ffmpeg's encoder delays the sound, and of a packet
REORDERED = 16  # pictures that a codec keeps waiting, at most
LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}


def write_clip(source, target, blocks: Iterable[np.ndarray], *, overwrite: bool = False) -> tuple[str, ...]:
    """Writes a clip_source.Source's clip with another sound: `blocks` (n, C), float, one after another, num_samples in all -> warnings

    .wav .flac: the sound alone, of the source's rate, channels and subtype. .mp4 .mkv .mov .mpg .mpeg: the source's pictures too,
    as they are coded, in step with the sound as they were; flac in .mp4 and .mkv, PCM in .mov, MP2 in .mpg, which loses some.
    The file appears whole or not at all. Raises FileExistsError; MediaError for what the target can't hold, for blocks of another
    size and for sound that is not finite.
    """
    import av
    import soundfile

    target = Path(target)
    writer = _writer_for(source, target)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; take overwrite (--overwrite) to replace it, or another name")
    part = target.with_name(f".{secrets.token_hex(6)}.part{target.suffix.lower()}")
    try:
        warnings = writer(source, part, target, _checked(source, blocks))
        os.replace(part, target)
    except (av.FFmpegError, soundfile.SoundFileError, OSError) as e:
        hint = "expected an existing folder with room, and a clip that this kind of file can hold (.mkv holds all)"
        raise clip_io.MediaError(f"{target}: cannot be written ({clip_io.one_line(e)}); {hint}") from e
    finally:
        part.unlink(missing_ok=True)
    return warnings


def _writer_for(source, target: Path):
    suffix = target.suffix.lower()
    if not source.num_samples:
        raise clip_io.MediaError(f"{source.path}: has no sound to write to {target}; expected a clip with sound")
    if suffix in clip_io.AUDIO_SUFFIXES:
        return _write_audio
    if suffix not in FORMATS:
        known = " ".join((*clip_io.AUDIO_SUFFIXES, *FORMATS))
        raise clip_io.MediaError(f"{target}: found suffix {target.suffix!r}, expected one of {known}")
    if not source.has_video or not Path(source.path).is_file():
        what = "holds no pictures" if not source.has_video else "is no file whose pictures could be copied"
        raise clip_io.MediaError(f"{target}: {source.path or 'the clip'} {what}; name the target .wav or .flac")
    return _write_video


def _checked(source, blocks) -> Iterator[np.ndarray]:
    """The blocks, in pieces; MediaError where they are not the source's sound in size, or not finite."""
    count = 0
    for block in blocks:
        block = np.asarray(block)
        if block.ndim != 2 or block.shape[1] != source.channels:
            raise clip_io.MediaError(f"{source.path}: found a block of shape {block.shape}, expected (n, {source.channels})")
        if not np.isfinite(block).all():
            raise clip_io.MediaError(f"{source.path}: the sound to write holds NaN or infinite samples; nothing is written")
        count += len(block)
        yield from (block[start : start + PIECE] for start in range(0, len(block), PIECE))
    if count != source.num_samples:
        raise clip_io.MediaError(f"{source.path}: found {count} samples to write, expected all {source.num_samples}")


def _write_audio(source, part, target, pieces) -> tuple[str, ...]:
    import soundfile

    kind, subtype, warnings = part.suffix[1:].upper(), source.subtype, ()
    if clip_io.PCM_BITS.get(subtype) == 8 and not soundfile.check_format(kind, subtype):
        subtype = "PCM_16"  # holds the same values
    if not soundfile.check_format(kind, subtype):
        raise clip_io.MediaError(f"{target}: {kind.lower()} cannot hold subtype {subtype}; name the file .wav")
    size = source.num_samples * source.channels * (clip_io.PCM_BITS.get(subtype, 64 if subtype == "DOUBLE" else 32) // 8)
    if kind == "WAV" and size > WAV_BYTES:
        kind, warnings = "RF64", (f"{target.name} is too long for a plain .wav: written as RF64, which not every program reads",)
    with soundfile.SoundFile(part, "w", source.rate, source.channels, subtype, format=kind) as out:
        for piece in pieces:
            out.write(clip_io.as_written(piece, subtype))
    with soundfile.SoundFile(part) as back:  # libsndfile does not tell that the disk has no room for the end of a .flac
        back.seek(source.num_samples - 1)
        if len(back.read(1)) != 1:
            raise OSError("its end was not written")
    return warnings


@dataclasses.dataclass(frozen=True)
class _Coding:
    """How a container holds the sound: ffmpeg's codec and sample format, subtype, rate; `delay` that the codec adds, samples."""

    codec: str
    format: str
    subtype: str
    rate: int
    warnings: tuple[str, ...] = ()
    delay: int = 0


def _coding(source, target: Path) -> _Coding:
    """For the target's suffix; MediaError where it has none."""
    suffix, rate, bits = target.suffix.lower(), source.rate, clip_io.PCM_BITS.get(source.subtype, 0)
    subtype = "PCM_16" if bits in (8, 16) else source.subtype
    if suffix in (".mpg", ".mpeg"):
        return _mp2(source, target)
    flac_rate = rate < 65_536 or (rate < 655_360 and rate % 10 == 0)
    if suffix == ".mov" or (suffix == ".mkv" and not (bits in (8, 16, 24) and source.channels <= 8 and flac_rate)):
        codec, kind = PCM_CODECS[subtype]
        return _Coding(codec, kind, subtype, rate)
    if source.channels > 8 or not flac_rate:
        raise clip_io.MediaError(f"{target}: .mp4 holds no {source.channels} channels at {rate} Hz; name the target .mkv or .mov")
    lost = () if subtype in ("PCM_16", "PCM_24") else (f"the {subtype} sound is kept as 24 bit; a .mkv or .mov keeps it whole",)
    return _Coding("flac", "s16" if subtype == "PCM_16" else "s32", subtype if not lost else "PCM_24", rate, lost)


def _mp2(source, target: Path) -> _Coding:
    if source.channels > 2:
        raise clip_io.MediaError(f"{target}: .mpg holds 2 channels, found {source.channels}; name the target .mkv or .mov")
    rate = min((r for r in MP2_RATES if r >= source.rate), default=MP2_RATES[-1])
    warnings = ["the sound in an .mpg is MP2, which loses some of it everywhere; a .mkv or .mov keeps it whole"]
    if rate != source.rate:
        warnings.append(f"an .mpg holds no sound of {source.rate} Hz; it is resampled to {rate} Hz")
    return _Coding("mp2", "s16", "PCM_16", rate, tuple(warnings), MP2_DELAY)


def _write_video(source, part, target, pieces) -> tuple[str, ...]:
    import av

    coding = _coding(source, target)
    times, hidden = _times(source.path, target)
    with clip_io.open_container(source.path) as given:
        video, audio = clip_io.streams_of(given)
        kind = FORMATS[part.suffix]
        if kind == "mpeg" and video.codec_context.name not in ("mpeg1video", "mpeg2video"):
            raise clip_io.MediaError(f"{target}: .mpg holds no {video.codec_context.name} pictures; name the target .mkv or .mp4")
        with av.open(str(part.absolute()), "w", format=kind) as out:
            video_out, audio_out = out.add_stream_from_template(video), out.add_stream(coding.codec, rate=coding.rate)
            audio_out.layout = _layout(audio, source.channels)
            audio_out.codec_context.format = coding.format
            if coding.codec == "mp2":
                audio_out.bit_rate = (
                    192_000 if coding.rate >= 32_000 else 80_000
                ) * source.channels  # the most that a channel takes
            untold_s = 0.0 if coding.delay else _untold_s(source)
            start_s = min(source.video_start_s + untold_s, source.audio_start_s)
            frames = _frames(source, coding, audio_out.layout.name, pieces, source.audio_start_s - start_s)
            _interleave(
                out, _frames_from(given, video, _depth(times), start_s - untold_s, source.fps), video_out, audio_out, frames
            )
    return coding.warnings + tuple(_warnings(part, target, times, hidden))


def _untold_s(source) -> float:
    """What of a source's lag its presentation times don't tell: the delay in Grid's own sound."""
    untold_s = source.lag_s - (source.video_start_s - source.audio_start_s)
    return untold_s if abs(untold_s) > clip_io.SAME_START_S else 0.0


def _warnings(part, target, times, hidden: int) -> Iterator[str]:
    """What a look at the written pictures shows."""
    if hidden and target.suffix.lower() not in (".mp4", ".mov"):
        yield f"{hidden} pictures that the source keeps but cuts off at its start are seen again; .mp4 and .mov hide them"
    new = _times(part, target)[0] if FORMATS[part.suffix] == "mpeg" else times
    if len(new) != len(times) or np.abs(new - times).max() > SAME_TIME_S:
        yield "an .mpg does not tell every small picture's time: some are shown early or late; a .mkv tells them"


def _layout(audio, channels: int) -> str:
    """What ffmpeg calls the channels: the source's word, where it names them and isn't plain mono or stereo."""
    named = audio is not None and channels > 2 and audio.layout.nb_channels == channels and "channels" not in audio.layout.name
    return audio.layout.name if named else LAYOUTS.get(channels, f"{channels} channels")


def _frames_from(given, video, depth: int, start_s: float, fps: float) -> Iterator:
    """The video's packets as they are, their times counted from start_s, in ticks that are fine enough for that.

    The times they are decoded at are made anew, as many containers don't tell them: that of the picture shown `depth` before.
    """
    finer = -(-video.time_base // TICK_S)
    tick = video.time_base / finer
    start, one = round(start_s / tick), max(1, round(1 / Fraction(fps).limit_denominator(1001) / tick))
    shown, before = [], None
    for packet in _with_data(given, video):
        packet.time_base, packet.duration = tick, finer * (packet.duration or 0) or one
        packet.pts = finer * packet.pts - start
        if before is None:
            shown = [packet.pts - k * one for k in range(depth, 0, -1)]
        heapq.heappush(shown, packet.pts)
        packet.dts = before = heapq.heappop(shown) if before is None else max(heapq.heappop(shown), before + 1)
        packet.pts = max(packet.pts, packet.dts)  # of two pictures at one time, the second a tick later
        yield packet


def _times(path, target) -> tuple[np.ndarray, int]:
    """When the pictures are shown, s from the first to be shown, as they lie in the file; how many the file itself hides."""
    with clip_io.open_container(path) as given:
        video = clip_io.streams_of(given)[0]
        packets = [(packet.pts, packet.is_discard) for packet in _with_data(given, video)]
        if any(pts is None for pts, _ in packets):
            raise clip_io.MediaError(f"{target}: the pictures' times are missing from the source; name the target .wav or .flac")
        ticks = np.array([pts for pts, _ in packets])
        return (ticks - ticks.min()) * float(video.time_base), sum(hidden for _, hidden in packets)


def _depth(times: np.ndarray) -> int:
    """By how many places, at most, a picture is shown after pictures that lie behind it in the file."""
    return max(int((times[max(0, k - REORDERED) : k] > times[k]).sum()) for k in range(len(times)))


def _with_data(given, video) -> Iterator:
    return (packet for packet in given.demux(video) if packet.size)


def _frames(source, coding: _Coding, layout: str, pieces, start_s: float) -> Iterator:
    """PyAV's frames of the sound, whose first sample is heard at start_s.

    A codec's delay is told by the packets' times. Not where the source is Grid's own, whose delay no time tells and which
    clip_io.sound_lag_s knows by that: there the first samples of the silence it brings are left out instead.
    """
    import av

    place, skip = round(start_s * coding.rate), coding.delay if _untold_s(source) else 0
    for x in _resampled(pieces, source, coding, skip):
        left_out, skip = x[:skip], max(0, skip - len(x))
        x, place = x[len(left_out) :], place + len(left_out)
        x = clip_io.to_int16(x) if coding.format == "s16" else clip_io.as_written(x, coding.subtype)
        if len(x):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x).reshape(1, -1), format=coding.format, layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = coding.rate, place, Fraction(1, coding.rate)
            place += len(x)
            yield frame


def _resampled(pieces, source, coding: _Coding, left_out: int) -> Iterator[np.ndarray]:
    """At the codec's rate; with silence after the end where the codec's delay would cut it off."""
    count = -left_out
    for x in pieces if coding.rate == source.rate else _stream_resampled(pieces, source, coding.rate):
        count += len(x)
        yield x
    if coding.delay:
        yield np.zeros((coding.delay + -(count + coding.delay) % MP2_FRAME, source.channels), np.float32)


def _stream_resampled(pieces, source, rate: int) -> Iterator[np.ndarray]:
    import soxr

    stream = soxr.ResampleStream(source.rate, rate, source.channels, dtype="float32", quality="HQ")
    for x in pieces:
        yield stream.resample_chunk(np.ascontiguousarray(x, np.float32))
    yield stream.resample_chunk(np.zeros((0, source.channels), np.float32), last=True)


def _interleave(out, packets, video_file, audio, frames) -> None:
    """Pictures and sound as they are seen and heard, the earlier first."""
    heard_s = -np.inf
    for packet in packets:
        while heard_s < packet.dts * packet.time_base:
            frame = next(frames, None)
            heard_s = np.inf if frame is None else frame.time + frame.samples / frame.sample_rate
            out.mux(audio.encode(frame) if frame is not None else [])
        packet.stream = video_file
        out.mux(packet)
    for frame in itertools.chain(frames, [None]):
        out.mux(audio.encode(frame))
