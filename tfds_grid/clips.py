"""One raw clip -> what its record holds: sound, face points, words. Measured once, kept in a cache beside the records.

Sound is 16 kHz mono int16 at its own length: from the wav where there is one, else the video's own. Face points lie on pictures
25 a second. Times in seconds, points in pixels. Letters: N samples, T video frames.

What can't become a record raises UnusableClipError; what can, but is not as it should be, gets a note, "kind: what was found".
"""

from __future__ import annotations

import contextlib
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

CODE_VERSION = 3  # raise when measure() gives other bytes: what older code left in the cache is then measured again
ALIGN_RATE = 25_000  # units a second in an .align
MAX_OVERRUN_S = 0.5  # of the last word over the sound's end; Grid's .align go on to 2.98 s
MAX_WORDS_BYTES = 100_000  # of an .align or a transcript
SILENCES = ("sil", "sp")
MAX_INVALID = 0.2  # share of pictures without a usable face above which a clip is left out (of s1's 1000: pbio7a alone)
MIN_GRID_FRAMES = 70  # of a Grid clip's 75
MIN_COVER = 0.9  # of the sound's time by pictures, and of the pictures' by sound
MAX_GAP_S = 0.1  # between two pictures that a point may be interpolated across
SAME_TIME_S = 0.010  # pictures this near to their place 25 a second are taken as they are
SILENT_PEAK = 2.0**-10  # of full scale, 33 in 16 bits
CLIPPED_SHARE = 0.002  # samples at full scale above which a clip is noted as clipped
MAX_LAG_S = 0.1  # between a clip's own sound and its wav
MIN_MATCH = 0.5  # correlation below which the wav is another recording than the clip's sound
MAX_DECODED_BYTES = 2 * 2**30  # pictures of a clip


class UnusableClipError(ValueError):
    """A clip that can't become a record; the message is the reason given in the report."""


def measure(clip: RawClip, *, mouth: bool) -> dict[str, np.ndarray]:
    """Sound and face points of a clip, by decoding and tracking it (about 0.4 s).

    Returns audio (N,) int16, offset_s () float32, landmarks (T, 68, 2) float32, landmarks_valid (T,) bool,
    frame_size (2,) int32 width and height, fps () float32 (25), notes (n,) str, and with `mouth` mouth (T, 96, 96) uint8.
    Raises UnusableClipError where the clip can't be decoded, has no sound, shows no face or is cut short.
    """
    from avsi_jax.face import landmarks

    notes: list[str] = []
    try:
        with _decoded(clip, notes) as decoded:
            audio, offset_s = _audio(clip, decoded, notes)
            _check_audio(audio, notes)
            if decoded.video is None:
                raise UnusableClipError("no pictures in it")
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
        notes.append(f"frame rate: {len(times)} pictures at {decoded.video.fps:.5g} fps brought to {len(points)} at 25")
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
    """The features of a clip's record (DESIGN.md section 3)."""
    said, words, _ = read_words(clip, len(measured["audio"]) / presets.RECORD_RATE)
    return {"id": clip.id, "speaker": clip.speaker, "text": said, "words": words} | {
        name: value[..., None] if name == "mouth" else value  # TFDS wants a channel
        for name, value in measured.items()
        if name != "notes"
    }


# ------------------------------------------------------------------------------------------------------------------ words


def read_words(clip: RawClip, duration_s: float = np.inf) -> tuple[str, list[dict], str]:
    """What is said, when ({word, start_s, end_s}, silences left out), and why the times of its .align are not used, or ''.

    A Grid id names its words; an .align that names others, can't be read, or ends well after the sound is not believed. Of
    other clips the text is the .align's words, or those of a transcript (.txt): lower case, without punctuation.
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
    said = " ".join(w["word"] for w in words)
    if words and words[-1]["end_s"] > duration_s + MAX_OVERRUN_S:
        late = f"words not used: the last ends at {words[-1]['end_s']:.1f} s of {duration_s:.1f} (times count 1/25000 s)"
        return grid_text or said, [], late
    if grid_text and said != grid_text:
        return grid_text, [], f"words not used: the .align says {said!r}, the id {grid_text!r}"
    return said, words, ""


def _read_align(content: str) -> list[dict]:
    """Lines of start, end and word; UnusableClipError where they are not, or where time runs backwards."""
    rows = [line.split() for line in content.splitlines() if line.strip()]
    if bad := [row for row in rows if len(row) != 3 or not all(re.fullmatch(r"[0-9]{1,9}", time) for time in row[:2])]:
        raise UnusableClipError(f"the .align holds {' '.join(bad[0])[:60]!r}: expected lines of start, end and word")
    times = [int(t) for start, end, _ in rows for t in (start, end)]
    if times != sorted(times):
        raise UnusableClipError("the .align runs backwards in time")
    return [
        {"word": word, "start_s": int(start) / ALIGN_RATE, "end_s": int(end) / ALIGN_RATE}
        for start, end, word in rows
        if word not in SILENCES
    ]


def _plain(transcript: str) -> str:
    """Lower case, words between single spaces, apostrophes and punctuation dropped."""
    return " ".join(re.sub(r"[^\w\s]|_", "", transcript.lower()).split())


# ------------------------------------------------------------------------------------------------------------------ cache


def measure_cached(clip: RawClip, folder: pathlib.Path, *, mouth: bool) -> pathlib.Path:
    """The file that holds measure(clip, mouth), made where the cache has none; a killed run leaves no half file.

    Raises UnusableClipError as measure does, and OSError, with path and bytes, where the cache can't be written.
    """
    readable = re.sub(r"[^\w.-]", "_", clip.id, flags=re.ASCII)[:60]  # the fingerprint tells the rest apart
    path = folder / f"{readable}-{_fingerprint(clip, mouth)}.npz"
    if path.exists():
        return path
    measured = measure(clip, mouth=mouth)
    half = folder / f"{path.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with half.open("wb") as f:
            (np.savez_compressed if mouth else np.savez)(f, **measured)
        half.replace(path)
    except OSError as e:
        size = sum(value.nbytes for value in measured.values())
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)
        why = f"{e.strerror or e}; {free_space(folder)}"
        raise OSError(f"{half}: {size:,} bytes can't be written ({why}); give another --data_dir") from e
    return path


def load_measured(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return dict(stored)


def _fingerprint(clip: RawClip, mouth: bool) -> str:
    """Changes with the clip's files, the face models and CODE_VERSION."""
    from avsi_jax.face import landmarks

    digest = hashlib.sha256(f"{CODE_VERSION} {mouth} {landmarks.model_fingerprint()} {clip.id}".encode())
    try:
        for file in (clip.video, clip.audio, *clip.images):
            digest.update(hashlib.sha256(file.read()).digest() if file else b"none")
    except OSError as e:
        raise UnusableClipError(f"can't be read: {e.strerror or e}") from e
    except RawDataError as e:
        raise UnusableClipError(str(e)) from e
    return digest.hexdigest()[:16]


def free_space(folder) -> str:
    """In words, for messages."""
    try:
        return f"{shutil.disk_usage(folder).free:,} bytes are free there"
    except OSError:
        return "how much is free there is not known"


# ---------------------------------------------------------------------------------------------------------------- decoding


@contextlib.contextmanager
def _decoded(clip: RawClip, notes: list[str]):
    """The clip as clip_io.Clip. Where its own sound can't be decoded and there is a wav, its pictures alone."""
    with contextlib.ExitStack() as stack:
        if clip.video is None:
            paths = [stack.enter_context(image.on_disk()) for image in clip.images]
            numbers = [image.number for image in clip.images]
            video_file = clip_io.read_frames(paths, None if None in numbers else numbers, max_bytes=MAX_DECODED_BYTES)
            yield clip_io.Clip(str(paths[0].parent), video_file, None)
            return
        path = stack.enter_context(clip.video.on_disk())
        try:
            decoded = clip_io.read_clip(path, max_bytes=MAX_DECODED_BYTES)
        except clip_io.MediaError as e:
            if clip.audio is None:
                raise
            decoded = clip_io.read_clip(path, audio=False, max_bytes=MAX_DECODED_BYTES)
            notes.append(f"sound: the video's own can't be decoded ({_without_path(e, clip)}); the wav alone is used")
        yield decoded


def _audio(clip: RawClip, video: clip_io.Clip, notes: list[str]) -> tuple[np.ndarray, float]:
    """Sound (N,) int16 and how many seconds it lags the pictures."""
    wav = _read_wav(clip.audio, notes) if clip.audio else None
    own = _own_audio(video, notes, needed=wav is None)
    if wav is not None and own is not None and len(wav) < MIN_COVER * len(own):
        notes.append(f"wav: is cut short, {len(wav) / presets.RECORD_RATE:.2f} s; not used")
        wav = None
    if wav is None:
        if own is None:
            raise UnusableClipError("no sound in it and no wav beside it")
        return clip_io.to_int16(own), clip_io.audio_lag_s(video)
    if own is None:
        return clip_io.to_int16(wav), 0.0
    lag_s, match = lag_after(own, wav)
    if not match >= MIN_MATCH:
        notes.append(f"wav: is not this clip's sound (correlation {match:.2f}); not used")
        return clip_io.to_int16(own), clip_io.audio_lag_s(video)
    return clip_io.to_int16(wav), clip_io.audio_lag_s(video) - lag_s


def _own_audio(video: clip_io.Clip, notes: list[str], *, needed: bool) -> np.ndarray | None:
    """The video's own sound (N,) at 16 kHz; None where it has none, or none that says anything and a wav stands in."""
    if video.audio is None:
        return None
    try:
        own = _at_record_rate(video.audio)
    except clip_io.MediaError as e:
        if needed:
            raise
        notes.append(f"sound: the video's own is not used ({e})")
        return None
    return own if needed or np.abs(own).max() >= SILENT_PEAK else None


def _read_wav(file: RawFile, notes: list[str]) -> np.ndarray | None:
    """(N,) float32 at 16 kHz, None where it can't be read."""
    try:
        with file.on_disk() as path:
            return _at_record_rate(clip_io.read_clip(path).audio)
    except (clip_io.MediaError, RawDataError, OSError) as e:
        notes.append(f"wav: can't be read ({one_line(e).rpartition(': ')[2]}); not used")
        return None


def _at_record_rate(audio: clip_io.Audio) -> np.ndarray:
    """(N,) float32 at 16 kHz, channels averaged; MediaError where samples are no numbers."""
    if not np.isfinite(audio.samples).all():
        raise clip_io.MediaError("the sound holds NaN or infinite samples")
    return clip_io.resample(clip_io.mono(audio.samples), audio.rate, presets.RECORD_RATE)


def lag_after(late: np.ndarray, early: np.ndarray) -> tuple[float, float]:
    """Seconds by which `late` comes after `early`, both (N,) at 16 kHz, and the correlation there (1: the same sound)."""
    size = len(late) + len(early)
    product = np.fft.irfft(np.fft.rfft(late, size) * np.conj(np.fft.rfft(early, size)), size)
    reach = round(MAX_LAG_S * presets.RECORD_RATE)
    near = np.roll(product, reach)[: 2 * reach + 1]  # lags -reach .. reach
    best = int(np.clip(near.argmax(), 1, 2 * reach - 1))
    before, top, after = near[best - 1 : best + 2]
    curve = before - 2 * top + after
    shift = 0.5 * (before - after) / curve if curve else 0.0  # top of the parabola through three points
    power = np.linalg.norm(late) * np.linalg.norm(early)
    return float(best - reach + shift) / presets.RECORD_RATE, float(top / power) if power else 0.0


@functools.cache
def _tracker():
    """One a process: it holds the face models."""
    from avsi_jax.face import landmarks

    return landmarks.FaceTracker()


def _at_25_fps(points, valid, times, fps) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Points and validity of pictures 25 a second, and which picture is nearest to each; None where they were so already.

    points (T, 68, 2), valid (T,), times (T,) s from the first picture. Between two pictures a point moves in a straight line; it
    is valid where both are and no more than MAX_HOLE_S lies between them.
    """
    raster = np.arange(len(times)) / presets.GRID_FPS
    if np.abs(times - raster).max() < SAME_TIME_S:
        return points, valid, None
    wanted = np.arange(max(1, round((times[-1] + 1 / fps) * presets.GRID_FPS))) / presets.GRID_FPS
    high = np.clip(np.searchsorted(times, wanted), 0, len(times) - 1)
    low = np.where((times[high] <= wanted) | (high == 0), high, high - 1)
    span = times[high] - times[low]
    part = np.divide(wanted - times[low], span, out=np.zeros_like(wanted), where=span > 0).clip(0, 1)[:, None, None]
    between = (points[low] * (1 - part) + points[high] * part).astype(np.float32)
    return between, valid[low] & valid[high] & (span <= MAX_GAP_S), np.where(part[:, 0, 0] < 0.5, low, high)


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
        raise UnusableClipError(f"cut short: {frames} pictures, {video_s:.2f} s of the 3 s of a Grid clip")
    if min(video_s, audio_s) < MIN_COVER * max(video_s, audio_s):
        raise UnusableClipError(f"cut short: its pictures last {video_s:.2f} s, its sound {audio_s:.2f} s")
    if clip.is_grid and frames != presets.GRID_FRAMES and abs(video.fps - presets.GRID_FPS) < 0.1:
        notes.append(f"pictures: {frames}, not {presets.GRID_FRAMES}")


def _check_faces(valid: np.ndarray) -> None:
    lost = int((~valid).sum())
    if lost > MAX_INVALID * len(valid):
        raise UnusableClipError(f"{lost} of its {len(valid)} pictures show no usable face (at most {MAX_INVALID:.0%} may)")


def _without_path(error: Exception, clip: RawClip) -> str:
    """The message without the path in front, which may be that of a copy."""
    message = one_line(error)
    return message.partition(": ")[2] if message.startswith(os.sep) and ": " in message else message


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())
