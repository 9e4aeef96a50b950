"""Measures one raw clip for its record: audio, landmarks, words. Results are cached beside the records.

Audio is 16 kHz mono int16 of its own length: from the wav where there is one, else the video file's own. Landmarks are given for
frames at 25 fps. Times are in seconds, landmarks in pixels. Letters: N samples, T video frames.

A clip that can't become a record raises UnusableClipError. One that can, but has a defect, gets a note, "kind: description".
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import shutil

import numpy as np

from avsi_jax import presets
from avsi_jax.data import grid_text as grid_text_lib
from avsi_jax.media import clip_io
from tfds_grid.raw_files import RawDataError, RawFile
from tfds_grid.speakers import RawClip

MAX_LOST_S = 0.03  # of audio at one place inside a clip
CODE_VERSION = 4  # raise when measure() gives other bytes: clips cached by older code are then measured again
ALIGN_RATE = 25_000  # time units per second in an .align
MAX_OVERRUN_S = 0.5  # by which the last word may end after the audio; Grid's .align files go on to 2.98 s
MAX_WORDS_BYTES = 100_000  # size of an .align or a transcript
SILENCES = ("sil", "sp")
MAX_INVALID = 0.2  # share of frames without a usable face above which a clip is left out (of s1's 1000: pbio7a alone)
MIN_GRID_FRAMES = 70  # of a Grid clip's 75
MIN_COVER = 0.9  # shortest video as a share of the audio's duration, and the reverse
MAX_INTERPOLATED_S = 0.1  # between two frames that landmarks may be interpolated across
SAME_TIME_S = 0.010  # frames this close to the 25 fps times are taken as they are
SILENT_PEAK = 2.0**-10  # of full scale, 33 in 16 bits
CLIPPED_SHARE = 0.002  # samples at full scale above which a clip is noted as clipped
MAX_LAG_S = 0.1  # between the video file's audio and the wav
MIN_MATCH = 0.5  # correlation below which the wav is another recording than the video file's audio
MAX_DECODED_BYTES = 2 * 2**30  # frames of a clip


class UnusableClipError(ValueError):
    """A clip that can't become a record; the message is the reason given in build_report.json."""


def measure(clip: RawClip, *, mouth: bool) -> dict[str, np.ndarray]:
    """Audio and landmarks of a clip, by decoding and tracking it (about 0.4 s).

    Returns audio (N,) int16, offset_s () float32, landmarks (T, 68, 2) float32, landmarks_valid (T,) bool,
    frame_size (2,) int32 width and height, fps () float32 (25), notes (n,) str, and with `mouth` mouth (T, 96, 96) uint8.
    Raises UnusableClipError where the clip can't be decoded, has no audio, shows no face or is cut short.
    """
    from avsi_jax.face import landmarks

    notes: list[str] = []
    try:
        with _decoded(clip, notes) as decoded:
            audio, offset_s = _audio(clip, decoded, notes)
            _check_audio(audio, notes)
            if decoded.video is None:
                raise UnusableClipError("it has no video frames")
            rgb, times = decoded.video.rgb, decoded.video.times
            _check_lengths(clip, decoded.video, len(audio) / presets.RECORD_RATE, notes)
            track = _tracker()(rgb)
    except (clip_io.MediaError, landmarks.NoFaceError, RawDataError) as e:
        raise UnusableClipError(_without_path(e, clip)) from e
    except OSError as e:
        raise UnusableClipError(f"can't be read: {e.strerror or e}") from e
    _check_faces(track.valid)
    points, valid, kept_frames = _at_25_fps(track.points, track.valid, times, decoded.video.fps)
    if kept_frames is not None:
        notes.append(f"frame rate: {len(times)} frames at {decoded.video.fps:.5g} fps resampled to {len(points)} at 25 fps")
    measured = {
        "audio": audio,
        "offset_s": np.float32(offset_s),
        "landmarks": points,
        "landmarks_valid": valid,
        "frame_size": np.array(rgb.shape[2:0:-1], np.int32),
        "fps": np.float32(presets.GRID_FPS),
        "notes": np.array([*notes, *(f"face: {w}" for w in track.warnings)], dtype=np.str_),
    }
    crops = landmarks.mouth_crops(rgb, track.points) if mouth else None
    return measured | ({"mouth": crops if kept_frames is None else crops[kept_frames]} if mouth else {})


def record(clip: RawClip, measured: dict[str, np.ndarray]) -> dict:
    """The features of a clip's record, by name (docs/dataset.md)."""
    text, words, _ = read_words(clip, len(measured["audio"]) / presets.RECORD_RATE)
    return {"id": clip.id, "speaker": clip.speaker, "text": text, "words": words} | {
        name: value[..., None] if name == "mouth" else value  # TFDS needs a channel axis
        for name, value in measured.items()
        if name != "notes"
    }


# ------------------------------------------------------------------------------------------------------------------ words


def read_words(clip: RawClip, duration_s: float = np.inf) -> tuple[str, list[dict], str]:
    """(text, words as {word, start_s, end_s} without silences, why the .align's times are not used or '').

    A Grid id encodes its words: an .align is ignored if it has other words, can't be read, or ends well after the audio. For other
    clips the text is the words of the .align, or those of a transcript (.txt): lower case, without punctuation.
    """
    grid_text = " ".join(grid_text_lib.words_of(clip.id)) if clip.is_grid else ""
    if clip.words is None:
        return grid_text, [], ""
    try:
        content = clip.words.read(MAX_WORDS_BYTES).decode()
        if clip.words.suffix == ".txt":
            return grid_text or _plain(content), [], ""
        words = _read_align(content)
    except (OSError, RawDataError, UnicodeDecodeError, UnusableClipError) as e:
        return grid_text, [], f"words not used: {one_line(e)}"
    text = " ".join(w["word"] for w in words)
    if words and words[-1]["end_s"] > duration_s + MAX_OVERRUN_S:
        late = f"words not used: the last ends at {words[-1]['end_s']:.1f} s of {duration_s:.1f} s (times are in 1/25000 s)"
        return grid_text or text, [], late
    if grid_text and text != grid_text:
        return grid_text, [], f"words not used: the .align has {text!r}, the id {grid_text!r}"
    return text, words, ""


def _read_align(content: str) -> list[dict]:
    """Words of the lines "start end word"; UnusableClipError for any other line, or where times decrease."""
    rows = [line.split() for line in content.splitlines() if line.strip()]
    if bad := [row for row in rows if len(row) != 3 or not all(re.fullmatch(r"[0-9]{1,9}", time) for time in row[:2])]:
        raise UnusableClipError(f"the .align holds {' '.join(bad[0])[:60]!r}: expected lines of start, end and word")
    times = [int(t) for start, end, _ in rows for t in (start, end)]
    if times != sorted(times):
        raise UnusableClipError("times in the .align decrease")
    return [
        {"word": word, "start_s": int(start) / ALIGN_RATE, "end_s": int(end) / ALIGN_RATE}
        for start, end, word in rows
        if word not in SILENCES
    ]


def _plain(transcript: str) -> str:
    """Lower case, words separated by single spaces, apostrophes and punctuation removed."""
    return " ".join(re.sub(r"[^\w\s]|_", "", transcript.lower()).split())


# ------------------------------------------------------------------------------------------------------------------ cache


def measure_cached(clip: RawClip, folder: pathlib.Path, *, mouth: bool) -> pathlib.Path:
    """The cache file of measure(clip, mouth), written if it does not exist; a killed run leaves no partial file.

    Raises UnusableClipError as measure does, and OSError, with path and bytes, where the cache can't be written.
    """
    readable = re.sub(r"[^\w.-]", "_", clip.id, flags=re.ASCII)[:60]  # the fingerprint makes it unique
    path = folder / f"{readable}-{_fingerprint(clip, mouth)}.npz"
    if path.exists():
        return path
    measured = measure(clip, mouth=mouth)
    temporary = folder / f"{path.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as f:
            (np.savez_compressed if mouth else np.savez)(f, **measured)
        temporary.replace(path)
    except OSError as e:
        size = sum(value.nbytes for value in measured.values())
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = f"{e.strerror or e}; {free_space(folder)}"
        raise OSError(f"{temporary}: {size:,} bytes can't be written ({reason}); give another --data_dir") from e
    return path


def load_measured(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The measurements that measure_cached wrote, as measure returns them."""
    with np.load(path) as stored:
        return dict(stored)


def _fingerprint(clip: RawClip, mouth: bool) -> str:
    """Changes with the clip's files, the face models and CODE_VERSION."""
    from avsi_jax.face import landmarks

    digest = hashlib.sha256(f"{CODE_VERSION} {mouth} {landmarks.model_fingerprint()} {clip.id}".encode())
    try:
        for file in (clip.video, clip.audio, *clip.frames):
            digest.update(hashlib.sha256(file.read()).digest() if file else b"none")
    except OSError as e:
        raise UnusableClipError(f"can't be read: {e.strerror or e}") from e
    except RawDataError as e:
        raise UnusableClipError(str(e)) from e
    return digest.hexdigest()[:16]


def free_space(folder: str | os.PathLike) -> str:
    """The free space of a folder's disk, as words for a message."""
    try:
        return f"{shutil.disk_usage(folder).free:,} bytes are free there"
    except OSError:
        return "free space there is unknown"


# ---------------------------------------------------------------------------------------------------------------- decoding


@contextlib.contextmanager
def _decoded(clip: RawClip, notes: list[str]):
    """The clip as clip_io.Clip; without audio where the video file's audio can't be decoded and there is a wav."""
    with contextlib.ExitStack() as stack:
        if clip.video is None:
            paths = [stack.enter_context(image.on_disk()) for image in clip.frames]
            numbers = [image.number for image in clip.frames]
            video = clip_io.read_frames(paths, None if None in numbers else numbers, max_bytes=MAX_DECODED_BYTES)
            yield clip_io.Clip(str(paths[0].parent), video, None)
            return
        path = stack.enter_context(clip.video.on_disk())
        try:
            decoded = without_filled_ends(clip_io.read_clip(path, max_bytes=MAX_DECODED_BYTES))
        except clip_io.MediaError as e:
            if clip.audio is None:
                raise
            decoded = clip_io.read_clip(path, audio=False, max_bytes=MAX_DECODED_BYTES)
            notes.append(f"audio: the video file's audio can't be decoded ({_without_path(e, clip)}); only the wav is used")
        yield decoded


def without_filled_ends(clip: clip_io.Clip) -> clip_io.Clip:
    """The clip without the zeros where its audio starts late or ends early.

    Raises MediaError where more than MAX_LOST_S are missing between others.
    """
    if clip.audio is None:
        return clip
    first, last = 0, len(clip.audio.samples)
    for start, stop in clip.audio.missing:
        if start > 0 and stop < len(clip.audio.samples):
            if stop - start > MAX_LOST_S * clip.audio.rate:
                at_s = start / clip.audio.rate
                raise clip_io.MediaError(f"{clip.path}: audio is missing at {at_s:.2f} s; download the file again")
            continue
        first, last = (stop, last) if start == 0 else (first, start)
    start_s = clip.audio.start_s + first / clip.audio.rate
    audio = dataclasses.replace(clip.audio, samples=clip.audio.samples[first:last], start_s=start_s, missing=())
    return dataclasses.replace(clip, audio=audio)


def _audio(clip: RawClip, video: clip_io.Clip, notes: list[str]) -> tuple[np.ndarray, float]:
    """Audio (N,) int16 and by how many seconds it lags the video."""
    wav = _read_wav(clip.audio, notes) if clip.audio else None
    own = _own_audio(video, notes, needed=wav is None)
    if wav is not None and own is not None and len(wav) < MIN_COVER * len(own):
        notes.append(f"wav: cut short, {len(wav) / presets.RECORD_RATE:.2f} s; not used")
        wav = None
    if wav is None:
        if own is None:
            raise UnusableClipError("it has no audio, and there is no wav")
        return clip_io.to_int16(own), clip_io.audio_lag_s(video)
    if own is None:
        return clip_io.to_int16(wav), 0.0
    lag_s, match = lag_after(own, wav)
    if not match >= MIN_MATCH:
        notes.append(f"wav: differs from the video file's audio (correlation {match:.2f}); not used")
        return clip_io.to_int16(own), clip_io.audio_lag_s(video)
    return clip_io.to_int16(wav), clip_io.audio_lag_s(video) - lag_s


def _own_audio(video: clip_io.Clip, notes: list[str], *, needed: bool) -> np.ndarray | None:
    """The video file's own audio (N,) at 16 kHz; None where it has none, or, if not `needed`, where it is silent or invalid."""
    if video.audio is None:
        return None
    try:
        own = _at_record_rate(video.audio)
    except clip_io.MediaError as e:
        if needed:
            raise
        notes.append(f"audio: the video file's audio is not used ({e})")
        return None
    return own if needed or np.abs(own).max() >= SILENT_PEAK else None


def _read_wav(file: RawFile, notes: list[str]) -> np.ndarray | None:
    """(N,) float32 at 16 kHz; None, with a note, where it can't be read."""
    try:
        with file.on_disk() as path:
            return _at_record_rate(clip_io.read_clip(path).audio)
    except (clip_io.MediaError, RawDataError, OSError) as e:
        notes.append(f"wav: can't be read ({one_line(e).rpartition(': ')[2]}); not used")
        return None


def _at_record_rate(audio: clip_io.Audio) -> np.ndarray:
    """(N,) float32 at 16 kHz, channels averaged; MediaError where samples are NaN or infinite."""
    if not np.isfinite(audio.samples).all():
        raise clip_io.MediaError("the audio holds NaN or infinite samples")
    return clip_io.resample(clip_io.mono(audio.samples), audio.rate, presets.RECORD_RATE)


def lag_after(late: np.ndarray, early: np.ndarray) -> tuple[float, float]:
    """Seconds by which `late` lags `early`, both (N,) at 16 kHz, and the correlation at that lag (1: identical audio)."""
    size = len(late) + len(early)
    product = np.fft.irfft(np.fft.rfft(late, size) * np.conj(np.fft.rfft(early, size)), size)
    reach = round(MAX_LAG_S * presets.RECORD_RATE)
    near = np.roll(product, reach)[: 2 * reach + 1]  # lags -reach .. reach
    best = int(np.clip(near.argmax(), 1, 2 * reach - 1))
    before, top, after = near[best - 1 : best + 2]
    curve = before - 2 * top + after
    shift = 0.5 * (before - after) / curve if curve else 0.0  # vertex of the parabola through three points
    power = np.linalg.norm(late) * np.linalg.norm(early)
    return float(best - reach + shift) / presets.RECORD_RATE, float(top / power) if power else 0.0


@functools.cache
def _tracker():
    """One per process: it holds the face models."""
    from avsi_jax.face import landmarks

    return landmarks.FaceTracker()


def _at_25_fps(
    landmarks: np.ndarray, valid: np.ndarray, times: np.ndarray, fps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Landmarks and their validity at 25 fps, and the index of the nearest input frame (None if the input is at 25 fps already).

    landmarks (T, 68, 2), valid (T,), times (T,) s from the first frame. Landmarks are interpolated linearly between two frames;
    the result is valid where both are and at most MAX_INTERPOLATED_S apart.
    """
    grid = np.arange(len(times)) / presets.GRID_FPS
    if np.abs(times - grid).max() < SAME_TIME_S:
        return landmarks, valid, None
    wanted = np.arange(max(1, round((times[-1] + 1 / fps) * presets.GRID_FPS))) / presets.GRID_FPS
    high = np.clip(np.searchsorted(times, wanted), 0, len(times) - 1)
    low = np.where((times[high] <= wanted) | (high == 0), high, high - 1)
    span = times[high] - times[low]
    part = np.divide(wanted - times[low], span, out=np.zeros_like(wanted), where=span > 0).clip(0, 1)[:, None, None]
    interpolated = (landmarks[low] * (1 - part) + landmarks[high] * part).astype(np.float32)
    return interpolated, valid[low] & valid[high] & (span <= MAX_INTERPOLATED_S), np.where(part[:, 0, 0] < 0.5, low, high)


# ------------------------------------------------------------------------------------------------------------------ checks


def _check_audio(audio: np.ndarray, notes: list[str]) -> None:
    level = np.abs(audio.astype(np.int32))
    if level.max() < SILENT_PEAK * 32_768:
        raise UnusableClipError(f"silent: its loudest sample is {level.max()} of 32768")
    share = np.mean(level >= 32_767)
    if share > CLIPPED_SHARE:
        notes.append(f"clipped: {share:.1%} of the samples are at full scale")


def _check_lengths(clip: RawClip, video: clip_io.Video, audio_s: float, notes: list[str]) -> None:
    frames, video_s = len(video.rgb), float(video.times[-1] + 1 / video.fps)
    if clip.is_grid and video_s * presets.GRID_FPS < MIN_GRID_FRAMES - 0.5:
        raise UnusableClipError(f"cut short: {frames} frames, {video_s:.2f} s of the 3 s of a Grid clip")
    if min(video_s, audio_s) < MIN_COVER * max(video_s, audio_s):
        raise UnusableClipError(f"cut short: video lasts {video_s:.2f} s, audio {audio_s:.2f} s")
    if clip.is_grid and frames != presets.GRID_FRAMES and abs(video.fps - presets.GRID_FPS) < 0.1:
        notes.append(f"frames: {frames}, not {presets.GRID_FRAMES}")


def _check_faces(valid: np.ndarray) -> None:
    invalid = int((~valid).sum())
    if invalid > MAX_INVALID * len(valid):
        raise UnusableClipError(f"{invalid} of its {len(valid)} frames show no usable face (limit: {MAX_INVALID:.0%})")


def _without_path(error: Exception, clip: RawClip) -> str:
    """The message without the path at its start, which may be that of a temporary copy."""
    message = one_line(error)
    return message.partition(": ")[2] if message.startswith(os.sep) and ": " in message else message


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())
