"""One user's clip in avsi-app, from upload to result, in a folder of its own. The page is in app/ui.py.

Limits are checked before anything is decoded (bytes) and before a face is tracked (seconds). A clip is first opened in a sandboxed
worker process, since a malicious file may hang or crash a decoder. Times are seconds of the clip's audio. Every error caused by a
user is a ValueError or OSError with a message of one line, which contains the name of the clip but never a folder of this machine.
"""

from __future__ import annotations

import dataclasses
import math
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avsi_jax.audio import gap_detection
from avsi_jax.media import clip_io, clip_source
from avsi_jax.runtime import process_pool

if TYPE_CHECKING:
    from avsi_jax.inpainting.api import Inpainter, Repair

OPENING_S, OPENING_MB = 20, 1024  # time and memory for opening a clip
MAX_PIXELS = 1920 * 1088  # of a video frame
MAX_GAPS = 20
MIN_GAP_S = 0.02
MAX_SESSIONS = 20  # at once; the one that was idle longest is ended for a new one
MAX_IDLE_S = 3600.0  # after which a session is ended
STRIP_FRAMES, MAX_STRIPS = 5, 3  # video frames shown of a gap; gaps for which they are shown
CANONICAL_SUFFIX = {".webm": ".mkv", ".mpeg": ".mpg"}  # other names of the same kind of file
WORDS = ((0.8, "high"), (0.65, "fairly high"), (0.5, "medium"), (0.0, "low: a guess"))  # for a confidence from this value on


@dataclasses.dataclass(frozen=True)
class Limits:
    """The longest and the largest clip that is accepted."""

    seconds: float = 60.0
    megabytes: float = 200.0


@dataclasses.dataclass(frozen=True)
class UploadedClip:
    """An uploaded clip. Letters: N samples, C channels.

    path: its file in the session's folder. name: its name as uploaded. samples: (N, C). size: (width, height) of the video, (0, 0)
    without. detected_gaps: (start_s, end_s, kind). playable: its audio as a file that browsers play.
    """

    path: Path
    name: str
    samples: np.ndarray
    rate: int
    subtype: str
    size: tuple[int, int]
    fps: float
    detected_gaps: tuple[tuple[float, float, str], ...]
    playable: Path

    @property
    def duration_s(self) -> float:
        """Length of the audio."""
        return len(self.samples) / self.rate

    def description(self) -> str:
        """Length, rate, channels, frame size and frame rate, in one line."""
        channels = {1: "mono", 2: "stereo"}.get(self.samples.shape[1], f"{self.samples.shape[1]} channels")
        audio = f"{self.duration_s:.2f} s of audio at {self.rate / 1000:g} kHz, {channels}"
        video = f"video {self.size[0]}x{self.size[1]}, {self.fps:.4g} frames per second" if self.fps else "no video"
        return f"{audio}; {video}"


@dataclasses.dataclass(frozen=True)
class Result:
    """The result for a user; all files are in the session's folder.

    gaps: as entered, within the clip. waveforms: {'masked', 'restored', and 'original' if the gap was made by the user: file}.
    clip: the restored clip with its video. strips: frames of the gaps, see `strip`.
    """

    repair: Repair
    gaps: list[tuple[float, float]]
    waveforms: dict[str, Path]
    clip: Path
    warnings: tuple[str, ...]
    strips: tuple[tuple[list[np.ndarray], np.ndarray, np.ndarray, list[float]], ...]


# ---- text entered by the user ----------------------------------------------------------------------------------------------------


def parse_gaps(text: str | None) -> list[tuple[float, float]]:
    """'0.93-1.73, 2.1-2.3' -> [(0.93, 1.73), (2.1, 2.3)]. Raises ValueError that names the part that is wrong."""
    gaps = []
    for part in filter(None, re.split(r"[,;\n]+", (text or "").replace(" ", ""))):
        if not (match := re.fullmatch(r"(\d+\.?\d*|\.\d+)[-–](\d+\.?\d*|\.\d+)(?:s)?", part)):
            raise ValueError(f"gap {part[:30]!r}: expected START-END in seconds, such as 0.93-1.73")
        start, end = map(float, match.groups())
        if end - start < MIN_GAP_S:
            raise ValueError(f"gap {part[:30]}: expected its end at least {MIN_GAP_S:g} s after its start")
        gaps.append((start, end))
    if len(gaps) > MAX_GAPS:
        raise ValueError(f"{len(gaps)} gaps; expected at most {MAX_GAPS}")
    return sorted(gaps)


def format_gaps(gaps: Iterable[tuple]) -> str:
    """The text that parse_gaps reads, rounded outwards to milliseconds, so that no sample of a gap is left outside."""
    rounded = [(math.floor(start * 1000 + 1e-6) / 1000, math.ceil(end * 1000 - 1e-6) / 1000) for start, end, *_ in gaps]
    return ", ".join(f"{start:.7g}-{end:.7g}" for start, end in rounded)


def in_words(confidence: float) -> str:
    """A confidence, 0 to 1, as a word."""
    return next((words for least, words in WORDS if confidence >= least), WORDS[-1][1])


# ---- opening a clip --------------------------------------------------------------------------------------------------------------


def check_size(file: Path, name: str, limits: Limits) -> None:
    """Raises MediaError for an empty or too large file, before anything is decoded."""
    size = file.stat().st_size
    if not size:
        raise clip_io.MediaError(f"{name} is empty; expected a clip")
    if size > limits.megabytes * 2**20:
        raise clip_io.MediaError(f"{name} has {size / 2**20:.1f} MB; at most {limits.megabytes:g} MB are accepted: cut it")


def try_to_open(file: str) -> tuple:
    """Runs in a worker process: (duration_s, frame size), or (error message,)."""
    try:
        with clip_source.open_source(file) as source:
            return source.duration_s, source.size
    except (ValueError, OSError) as error:
        return (str(error),)


def check_opens(file: Path, name: str, limits: Limits) -> None:
    """Opens a clip in a worker process with bounded time and memory. Raises MediaError if that fails or it exceeds the limits."""
    jobs = process_pool.run(try_to_open, [(str(file),)], workers=1, timeout_s=OPENING_S, memory_mb=OPENING_MB)
    (outcome,) = jobs
    if outcome.failure:
        raise clip_io.MediaError(f"{name}: cannot be opened: it {outcome.failure}; check that it plays")
    if len(outcome.result) == 1:
        raise clip_io.MediaError(outcome.result[0].replace(str(file), name))
    duration_s, (width, height) = outcome.result
    if not duration_s:
        raise clip_io.MediaError(f"{name} has no audio; expected a clip with audio that has a gap")
    if duration_s > limits.seconds:
        raise clip_io.MediaError(
            f"{name} is {duration_s:.1f} s long; at most {limits.seconds:g} s are accepted here: cut it around the gap, "
            "or use the command avsi-inpaint, which has no such limit"
        )
    if width * height > MAX_PIXELS:
        raise clip_io.MediaError(f"{name} has video of {width}x{height}; at most 1920x1088 are accepted: scale it down")


class Session:
    """One user's clip and results. All files are in `folder`, which `leave` deletes."""

    def __init__(self, folder: Path, inpainter: Inpainter, limits: Limits):
        self.folder, self.inpainter, self.limits = folder, inpainter, limits
        self.clip: UploadedClip | None = None
        self.gap_made_by_user = False  # the clip itself has no gap there, so there is an original to compare with
        self.last_used_s = time.monotonic()
        self.lock = threading.Lock()
        self.uploads: set[Path] = set()  # where the server stored them
        self.ended = False
        self.clear()

    def leave(self) -> None:
        """Ends the session and deletes its files."""
        self.ended = True
        self.clear()

    def load(self, file: str | Path, name: str = "") -> UploadedClip:
        """Opens a clip that was uploaded or recorded, in place of the one before. Raises MediaError."""
        file, name = Path(file), name or Path(file).name
        self.clear(keep=file)
        if self.folder.parent.parent in file.parents:  # otherwise it is an example
            self.uploads.add(file)
        check_size(file, name, self.limits)
        suffix = CANONICAL_SUFFIX.get(file.suffix.lower(), file.suffix.lower())
        own = self._new_file(f"clip{suffix}")
        shutil.copyfile(file, own)
        try:
            clip_io.check_file(own)
            check_opens(own, name, self.limits)
            self.clip = self._read(own, name)
        except (ValueError, OSError) as error:
            self.clear()
            raise clip_io.MediaError(str(error).replace(str(own), name)) from error
        return self.clip

    def _read(self, file: Path, name: str) -> UploadedClip:
        """Decodes the audio and detects gaps in it."""
        with clip_source.open_source(file) as source:
            samples = np.asarray(source.audio(0, source.num_samples), np.float32)
            gaps = [g for g in gap_detection.detect_gaps(samples, source.rate) if g.end - g.start >= MIN_GAP_S * source.rate]
            spans = tuple((g.start / source.rate, g.end / source.rate, g.kind) for g in gaps[:MAX_GAPS])
            playable = self._write_audio("input", samples, source.rate, source.subtype)
            return UploadedClip(file, name, samples, source.rate, source.subtype, source.size, source.fps, spans, playable)

    def clear(self, keep: Path | None = None) -> None:
        """Deletes the clip, all files and all uploads except `keep`, the one to be opened next."""
        self.clip, self.gap_made_by_user = None, False
        for file in self.uploads - {keep}:
            file.unlink(missing_ok=True)
        self.uploads &= {keep}
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self.ended:
            self.folder.mkdir(parents=True)

    def _new_file(self, name: str) -> Path:
        """A path in a new folder: a browser caches what it fetched from an address."""
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir()
        return folder / name

    def _write_audio(self, name: str, samples: np.ndarray, rate: int, subtype: str) -> Path:
        """A .wav file that browsers play; samples that are not finite become silence."""
        file = self._new_file(f"{name}.wav")
        samples = np.nan_to_num(samples, posinf=0, neginf=0)
        clip_io.write_audio(file, samples, rate, "FLOAT" if subtype == "DOUBLE" else subtype)  # browsers do not play DOUBLE
        return file

    def use_detected_gaps(self) -> UploadedClip:
        """The clip, whose detected gaps are to be restored."""
        clip, self.gap_made_by_user = self._need_clip(), False
        return clip

    def make_gap(self, start_s: float, length_ms: float) -> list[tuple[float, float]]:
        """A gap for a test, within the clip."""
        clip = self._need_clip()
        start_s = min(max(0.0, start_s), max(0.0, clip.duration_s - MIN_GAP_S))
        self.gap_made_by_user = True
        return [(round(start_s, 3), round(min(start_s + max(length_ms / 1000, MIN_GAP_S), clip.duration_s), 3))]

    def check_gaps(self, text: str | None) -> list[tuple[float, float]]:
        """The gaps that the user entered, within the clip. Raises ValueError."""
        clip, gaps = self._need_clip(), parse_gaps(text)
        for start, end in gaps:
            if start >= clip.duration_s or end > clip.duration_s + 0.005:
                raise ValueError(f"gap {start:g}-{end:g} s is not inside the clip, whose audio is {clip.duration_s:.2f} s long")
        return [(start, min(end, clip.duration_s)) for start, end in gaps]

    def restore(self, text: str | None, *, face: int | None = None, sync: str = "off") -> Result:
        """Restores the gaps that the user entered, and writes all files that the page offers. Raises ValueError."""
        clip, gaps = self._need_clip(), self.check_gaps(text)
        if not gaps:
            raise ValueError("no gap is given; enter one, such as 0.93-1.73, or make one for a test")
        try:
            repair = self.inpainter.inpaint(clip.path, gaps, face=face, sync=sync)
            return self._result(clip, gaps, repair)
        except (ValueError, OSError) as error:
            message = re.sub(rf"{re.escape(str(self.folder))}/\w+/", "", str(error).replace(str(clip.path), clip.name))
            raise clip_io.MediaError(message) from error

    def _need_clip(self) -> UploadedClip:
        if self.clip is None:
            raise ValueError("upload a clip first: drop a file, record one, or choose an example")
        return self.clip

    def _result(self, clip: UploadedClip, gaps: list[tuple[float, float]], repair: Repair) -> Result:
        waveforms = {"masked": masked_samples(clip, gaps), "restored": repair.samples}
        waveforms |= {"original": clip.samples} if self.gap_made_by_user else {}
        files = {name: self._write_audio(name, x, clip.rate, clip.subtype) for name, x in waveforms.items()}
        with clip_source.open_source(clip.path) as source:
            target, warnings = self._write_clip(source, clip, repair)
            strips = tuple(strip(source, repair, gap) for gap in gaps[:MAX_STRIPS]) if mouth_was_visible(repair) else ()
        return Result(repair, gaps, files, target, (*repair.warnings, *warnings), strips)

    def _write_clip(self, source: clip_source.Source, clip: UploadedClip, repair: Repair) -> tuple[Path, tuple[str, ...]]:
        """Writes the restored clip with its unchanged video, in the format of the upload if possible, else as .wav."""
        suffix = clip.path.suffix
        suffix, warnings = (".mkv", ("written as .mkv: .avi cannot store the A/V offset",)) if suffix == ".avi" else (suffix, ())
        target = self._new_file(f"{safe_stem(clip.name)}.restored{suffix}")
        try:
            return target, warnings + clip_source.write_clip(source, target, [repair.samples])
        except clip_io.MediaError:
            if suffix in clip_io.AUDIO_SUFFIXES:
                raise
        target, warning = target.with_suffix(".wav"), "written as .wav, audio only: the video cannot be copied"
        return target, (*warnings, warning, *clip_source.write_clip(source, target, [repair.samples]))


def masked_samples(clip: UploadedClip, gaps: Iterable[tuple[float, float]]) -> np.ndarray:
    """The clip's audio (N, C) with the gaps set to zero."""
    samples = np.nan_to_num(clip.samples, posinf=0, neginf=0)
    for start, end in gaps:
        samples[round(start * clip.rate) : round(end * clip.rate)] = 0
    return samples


def safe_stem(name: str) -> str:
    """The stem of a file name, reduced to letters, digits and a few punctuation marks."""
    return re.sub(r"[^\w.-]+", "_", Path(name).stem).strip("._")[:60] or "clip"


def mouth_was_visible(repair: Repair) -> bool:
    """Whether the mouth is visible in any tracked frame."""
    return repair.landmarks is not None and bool(len(repair.landmarks)) and bool(np.any(repair.landmarks_valid))


def strip(
    source: clip_source.Source, repair: Repair, gap: Sequence[float]
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, list[float]]:
    """STRIP_FRAMES evenly spaced video frames of a gap, matched to the audio as the restoration did.

    Returns (images, landmarks (P, 68, 2), whether the mouth is visible (P,), times in the audio), P at most STRIP_FRAMES.
    """
    lag_s = source.lag_s if repair.av_lag_s is None else repair.av_lag_s
    wanted = np.linspace(*gap, STRIP_FRAMES + 2)[1:-1] - lag_s
    nearest = sorted({int(np.argmin(np.abs(repair.frame_times - t))) for t in wanted})
    times = np.asarray(repair.frame_times)[nearest]
    video = source.video(times[0] - 1e-3, times[-1] + 1e-3)
    rgb = [video.rgb[int(np.argmin(np.abs(video.times - t)))] for t in times]
    return rgb, repair.landmarks[nearest], np.asarray(repair.landmarks_valid)[nearest], [float(t + lag_s) for t in times]


# ---- many users ------------------------------------------------------------------------------------------------------------------


class SessionStore:
    """All sessions, by the key of the browser session they belong to."""

    def __init__(self, folder: Path, inpainter: Inpainter, limits: Limits):
        self.folder, self.inpainter, self.limits = folder, inpainter, limits
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> Session:
        """The session of that key, created if there is none. Ends sessions that are idle or too many."""
        with self._lock:
            session = self._sessions.pop(key, None) or Session(self.folder / secrets.token_hex(8), self.inpainter, self.limits)
            session.last_used_s = time.monotonic()
            self._sessions[key] = session
            for other_key, other in list(self._sessions.items())[:-1]:
                if len(self._sessions) > MAX_SESSIONS or session.last_used_s - other.last_used_s > MAX_IDLE_S:
                    self._sessions.pop(other_key).leave()
            return session

    def end(self, key: str) -> None:
        """Ends the session of that key, if there is one."""
        with self._lock:
            if session := self._sessions.pop(key, None):
                session.leave()
