"""One raw clip -> what its record holds: sound, face points, words. Measured once, kept in a cache beside the records.

Sound is 16 kHz mono int16 at its own length: from the wav where there is one, else the video's own. Times in seconds, points
in pixels. Letters: N samples, T video frames.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib

import numpy as np

from avsi_jax import media, spec, text
from tfds_grid.speakers import RawClip

CODE_VERSION = 2  # raise when measure() gives other bytes: what older code left in the cache is then measured again
ALIGN_RATE = 25_000  # units a second in an .align
SILENCES = ("sil", "sp")
MAX_INVALID = 0.2  # share of pictures without a usable face above which a clip is left out (of s1's 1000: pbio7a alone)
MAX_LAG_S = 0.1  # between a clip's own sound and its wav
MIN_MATCH = 0.5  # correlation below which the wav is another recording than the clip's sound


class UnusableClipError(ValueError):
    """A clip that can't become a record; the message is the reason given in the report."""


def measure(clip: RawClip, *, mouth: bool) -> dict[str, np.ndarray]:
    """Sound and face points of a clip, by decoding and tracking it (about 0.4 s).

    Returns audio (N,) int16, offset_s () float32, landmarks (T, 68, 2) float32, landmarks_valid (T,) bool,
    frame_size (2,) int32 width and height, fps () float32, warnings (n,) str, and with `mouth` mouth (T, 96, 96) uint8.
    Raises UnusableClipError where the clip can't be decoded, has no sound or shows no face.
    """
    from avsi_jax import landmarks

    try:
        video = media.read_clip(clip.video)
        audio, offset_s, warnings = _sound(clip, video)
        if video.pictures is None:
            raise UnusableClipError("no pictures in it")
        rgb = video.pictures.rgb
        track = _tracker()(rgb)
    except (media.MediaError, landmarks.NoFaceError) as e:
        raise UnusableClipError(str(e)) from e
    _check_faces(track.valid)
    measured = {
        "audio": audio,
        "offset_s": np.float32(offset_s),
        "landmarks": track.points,
        "landmarks_valid": track.valid,
        "frame_size": np.array(rgb.shape[2:0:-1], np.int32),
        "fps": np.float32(video.pictures.fps),
        "warnings": np.array([*warnings, *track.warnings], dtype=np.str_),
    }
    return measured | ({"mouth": landmarks.mouth_crops(rgb, track.points)} if mouth else {})


def read_words(path: pathlib.Path | None) -> list[dict]:
    """The words of an .align, silences left out: {word, start_s, end_s}; none where there is no file."""
    if path is None:
        return []
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    if bad := [row for row in rows if len(row) != 3 or not (row[0] + row[1]).isdigit()]:
        raise UnusableClipError(f"{path.name} holds {' '.join(bad[0])!r}: expected lines of start, end and word")
    return [
        {"word": word, "start_s": int(start) / ALIGN_RATE, "end_s": int(end) / ALIGN_RATE}
        for start, end, word in rows
        if word not in SILENCES
    ]


def record(clip: RawClip, measured: dict[str, np.ndarray]) -> dict:
    """The features of a clip's record (DESIGN.md section 3)."""
    return {
        "id": clip.id,
        "speaker": clip.speaker,
        "text": " ".join(text.words_of(clip.id)) if text.is_grid_id(clip.id) else "",
        "words": read_words(clip.words),
    } | {
        name: value[..., None] if name == "mouth" else value  # TFDS wants a channel
        for name, value in measured.items()
        if name != "warnings"
    }


# ------------------------------------------------------------------------------------------------------------------ cache


def measure_cached(clip: RawClip, folder: pathlib.Path, *, mouth: bool) -> pathlib.Path:
    """The file that holds measure(clip, mouth), made where the cache has none; a killed run leaves no half file."""
    path = folder / f"{clip.id}-{_fingerprint(clip, mouth)}.npz"
    if not path.exists():
        measured = measure(clip, mouth=mouth)
        folder.mkdir(parents=True, exist_ok=True)
        half = folder / f"{path.name}.{os.getpid()}.tmp"
        with half.open("wb") as f:
            np.savez_compressed(f, **measured)
        half.replace(path)
    return path


def load_measured(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return dict(stored)


def _fingerprint(clip: RawClip, mouth: bool) -> str:
    """Changes with the clip's files, the face models and CODE_VERSION."""
    from avsi_jax import landmarks

    digest = hashlib.sha256(f"{CODE_VERSION} {mouth} {landmarks.model_fingerprint()}".encode())
    for path in (clip.video, clip.sound):
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path else b"none")
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------------ parts


@functools.cache
def _tracker():
    """One a process: it holds the face models."""
    from avsi_jax import landmarks

    return landmarks.FaceTracker()


def _sound(clip: RawClip, video: media.Clip) -> tuple[np.ndarray, float, list[str]]:
    """Sound (N,) int16, how many seconds it lags the pictures, and warnings."""
    own = _at_record_rate(video.sound) if video.sound else None
    if clip.sound is None:
        if own is None:
            raise UnusableClipError("no sound in it and no wav beside it")
        return media.to_int16(own), media.sound_lag_s(video), []
    wav = _at_record_rate(media.read_clip(clip.sound).sound)
    if own is None:
        return media.to_int16(wav), 0.0, []
    lag_s, match = lag_after(own, wav)
    if match < MIN_MATCH:
        warning = f"wav is not this clip's sound (correlation {match:.2f}): not used"
        return media.to_int16(own), media.sound_lag_s(video), [warning]
    return media.to_int16(wav), media.sound_lag_s(video) - lag_s, []


def _at_record_rate(sound: media.Sound) -> np.ndarray:
    """(N,) float32 at 16 kHz, channels averaged."""
    return media.resample(media.mono(sound.samples), sound.rate, spec.RECORD_RATE)


def lag_after(late: np.ndarray, early: np.ndarray) -> tuple[float, float]:
    """Seconds by which `late` comes after `early`, both (N,) at 16 kHz, and the correlation there (1: the same sound)."""
    size = len(late) + len(early)
    product = np.fft.irfft(np.fft.rfft(late, size) * np.conj(np.fft.rfft(early, size)), size)
    reach = round(MAX_LAG_S * spec.RECORD_RATE)
    near = np.roll(product, reach)[: 2 * reach + 1]  # lags -reach .. reach
    best = int(np.clip(near.argmax(), 1, 2 * reach - 1))
    before, top, after = near[best - 1 : best + 2]
    curve = before - 2 * top + after
    shift = 0.5 * (before - after) / curve if curve else 0.0  # top of the parabola through three points
    power = np.linalg.norm(late) * np.linalg.norm(early)
    return float(best - reach + shift) / spec.RECORD_RATE, float(top / power) if power else 0.0


def _check_faces(valid: np.ndarray) -> None:
    lost = int((~valid).sum())
    if lost > MAX_INVALID * len(valid):
        raise UnusableClipError(f"{lost} of its {len(valid)} pictures show no usable face (at most {MAX_INVALID:.0%} may)")
