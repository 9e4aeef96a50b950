"""One user's clip in avsi-app, from upload to result, in a folder of its own. The page is in app/ui.py.

Limits are checked before anything is decoded (bytes) and before a face is tracked (seconds). Clips are decoded and written by a
worker process (app/sandbox.py). Every gap belongs to a clip: `token` changes with the clip and whenever the session sets the gaps,
and a request that carries an old one is refused. Times are seconds of the clip's audio. Every error caused by a user is a
ValueError or OSError with a message of one line, which contains the name of the clip but never a folder of this machine.
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

from avsi_jax.app import sandbox
from avsi_jax.audio import gap_detection
from avsi_jax.inpainting import cli_jobs, clip_gaps, gap_text
from avsi_jax.media import clip_io
from avsi_jax.runtime import shown_paths

if TYPE_CHECKING:
    from avsi_jax.inpainting.api import Inpainter, Repair
    from avsi_jax.media import clip_source

MAX_PIXELS = 1920 * 1088  # of a video frame
MAX_GAPS = 20  # that can be entered; more that are detected are restored as "auto"
MIN_MADE_GAP_S = 0.02  # the shortest gap that is made for a test
ROUNDED_S = 0.005  # by which a gap may exceed the end of the clip: it is entered in milliseconds
MAX_SESSIONS = 20  # at once; the one that was idle longest is ended for a new one
MAX_IDLE_S = 3600.0  # after which a session is ended
STRIP_FRAMES, MAX_STRIPS = 5, 3  # video frames shown of a gap; gaps for which they are shown
WORDS = ((0.8, "high"), (0.65, "fairly high"), (0.5, "medium"), (0.0, "low: a guess"))  # for a confidence from this value on


class StaleGapsError(ValueError):
    """A request was made for a clip or for gaps that have been replaced since."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The longest and the largest clip that is accepted."""

    seconds: float = 60.0
    megabytes: float = 200.0


@dataclasses.dataclass(frozen=True)
class UploadedClip:
    """An uploaded clip. Letters: N samples, C channels.

    path: its file in the session's folder. name: its name as uploaded. source: its audio as decoded, and its properties. samples:
    (N, C) float32. size: (width, height) of the video, (0, 0) without. detected_gaps: (start_s, end_s, kind). playable: its audio
    as a file that browsers play.
    """

    path: Path
    name: str
    source: sandbox.WorkerSource
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


def parse_gaps(text: str | None) -> list[tuple[float, float]] | str:
    """As gap_text.parse_gaps, for at most MAX_GAPS gaps."""
    gaps = gap_text.parse_gaps(text)
    if gaps != gap_text.AUTO and len(gaps) > MAX_GAPS:
        raise ValueError(f"found {len(gaps)} gaps; expected at most {MAX_GAPS}, or auto for all that are detected")
    return gaps


def format_gaps(gaps: Iterable[tuple]) -> str:
    """The text that parse_gaps reads, rounded outwards to milliseconds, so that no sample of a gap is left outside."""
    gaps = list(gaps)
    if len(gaps) > MAX_GAPS:
        return gap_text.AUTO
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


def detected_gaps(source: clip_source.Source) -> tuple[tuple[float, float, str], ...]:
    """(start_s, end_s, kind) of the gaps that `avsi-inpaint --gap auto` restores; kind as in gap_detection, or 'missing'."""
    try:
        spans = clip_gaps.detected_gaps(source)
    except clip_gaps.NoGapFoundError:
        return ()
    kinds = gap_detection.detect_gaps(source.audio(0, source.num_samples), source.rate)
    kind_of = lambda a, b: next((gap.kind for gap in kinds if gap.start < b and gap.end > a), "missing")
    return tuple((a / source.rate, b / source.rate, kind_of(a, b)) for a, b in spans)


class Session:
    """One user's clip and results. All files are in `folder`, which `leave` deletes."""

    def __init__(self, folder: Path, inpainter: Inpainter, limits: Limits):
        self.folder, self.inpainter, self.limits = folder, inpainter, limits
        self.clip: UploadedClip | None = None
        self.gap_made_by_user = False  # the clip itself has no gap there, so there is an original to compare with
        self.clip_id = self.gaps_id = ""
        self.restored: tuple | None = None  # gaps, token, face and sync of the last result
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
        """Opens a clip that was uploaded or recorded, in place of the one before. Raises MediaError; then there is no clip."""
        file, name = Path(file), name or Path(file).name
        self.clear(keep=file)
        if self.folder.parent.parent in file.parents:  # otherwise it is an example
            self.uploads.add(file)
        suffix = Path(name).suffix.lower()
        own = file
        try:
            own = self._new_file("clip" + (suffix if re.fullmatch(r"\.\w{1,8}", suffix) else ""))
            check_size(file, name, self.limits)
            shutil.copyfile(file, own)
            self.clip = self._read(own, name)
        except (ValueError, OSError) as error:
            self.clear()
            raise clip_io.MediaError(shown_paths.without_folders(str(error), {str(own): name, str(file): name})) from error
        return self.clip

    def _read(self, file: Path, name: str) -> UploadedClip:
        """Decodes the audio and detects gaps in it."""
        with sandbox.Worker(file, name, self.folder) as worker:
            source = worker.open(self.limits.seconds, MAX_PIXELS)
        source.worker = None
        samples = np.asarray(source.samples, np.float32)
        playable = self._write_audio("input", samples, source.rate, source.subtype)
        gaps = detected_gaps(source)
        return UploadedClip(file, name, source, samples, source.rate, source.subtype, source.size, source.fps, gaps, playable)

    def clear(self, keep: Path | None = None) -> None:
        """Deletes the clip, all files and all uploads except `keep`, the one to be opened next."""
        self.clip, self.gap_made_by_user, self.restored = None, False, None
        self.clip_id, self.gaps_id = secrets.token_hex(8), secrets.token_hex(8)
        for file in self.uploads - {keep}:
            file.unlink(missing_ok=True)
        self.uploads &= {keep}
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self.ended:
            self.folder.mkdir(parents=True, exist_ok=True)

    def _new_file(self, name: str) -> Path:
        """A path in a new folder: a browser caches what it fetched from an address."""
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir(parents=True)
        return folder / name

    def _write_audio(self, name: str, samples: np.ndarray, rate: int, subtype: str) -> Path:
        """A .wav file that browsers play; samples that are not finite become silence."""
        file = self._new_file(f"{name}.wav")
        samples = np.nan_to_num(samples, posinf=0, neginf=0)
        clip_io.write_audio(file, samples, rate, "FLOAT" if subtype == "DOUBLE" else subtype)  # browsers do not play DOUBLE
        return file

    @property
    def token(self) -> str:
        """Names the clip and the gaps that the session set last: requests carry it to say what they were made for."""
        return f"{self.clip_id}-{self.gaps_id}"

    def use_detected_gaps(self, token: str | None = None) -> UploadedClip:
        """The clip, whose detected gaps are to be restored; if there are none, those that are entered stay. token: as `restore`."""
        clip = self._need_clip(token, only_clip=True)
        if clip.detected_gaps:
            self.gap_made_by_user, self.gaps_id = False, secrets.token_hex(8)
        return clip

    def make_gap(self, start_s: float, length_ms: float, token: str | None = None) -> list[tuple[float, float]]:
        """A gap for a test, within the clip. token: as `restore`."""
        clip = self._need_clip(token, only_clip=True)
        start_s = min(max(0.0, start_s), max(0.0, clip.duration_s - MIN_MADE_GAP_S))
        self.gap_made_by_user, self.gaps_id = True, secrets.token_hex(8)
        return [(round(start_s, 3), round(min(start_s + max(length_ms / 1000, MIN_MADE_GAP_S), clip.duration_s), 3))]

    def check_gaps(self, text: str | None) -> list[tuple[float, float]]:
        """The gaps that the user entered, or those detected for 'auto', within the clip. Raises ValueError."""
        clip, gaps = self._need_clip(), parse_gaps(text)
        if gaps == gap_text.AUTO:
            gaps = [gap[:2] for gap in clip.detected_gaps]
            if not gaps:
                raise clip_gaps.NoGapFoundError(f"{clip.name}: no gap detected; enter one, such as 0.93-1.73")
        elif gaps:
            clip_gaps.check_gaps(gaps, len(clip.samples), clip.rate, max(clip.source.end_s, clip.duration_s + ROUNDED_S))
            gaps = [(start, min(end, clip.duration_s)) for start, end in gaps]
        return gaps

    def restore(self, text: str | None, token: str | None = None, face: int | None = None, sync: str = "off") -> Result:
        """Restores the gaps that the user entered, and writes all files that the page offers.

        token: names the clip and the gaps for which the text was entered; None: the present ones. Raises ValueError; StaleGapsError
        if they have been replaced.
        """
        clip, gaps = self._need_clip(token), self.check_gaps(text)
        if not gaps:
            raise ValueError("no gap is given; enter one, such as 0.93-1.73, or make one for a test")
        try:
            with sandbox.Worker(clip.path, clip.name, self.folder) as worker:
                clip.source.worker = worker
                repair = self.inpainter.inpaint(clip.source, gaps, face=face, sync=sync)
                result = self._result(clip, gaps, repair, worker)
        except (ValueError, OSError) as error:
            raise clip_io.MediaError(shown_paths.without_folders(str(error), {str(clip.path): clip.name})) from error
        finally:
            clip.source.worker = None
        self.restored = gaps, self.token, face, sync
        return result

    def result_is_current(self, text: str | None, *request: str | int | None) -> bool:
        """Whether the last result is that of the gaps and the options that the page shows; arguments: those of `restore`."""
        try:
            return self.restored == (self.check_gaps(text), *request)
        except ValueError:
            return False

    def _need_clip(self, token: str | None = None, *, only_clip: bool = False) -> UploadedClip:
        """The clip. Raises StaleGapsError if `token` names another one, or, unless only_clip, other gaps."""
        if self.clip is None:
            raise ValueError("upload a clip first: drop a file, record one, or choose an example")
        if token is None or token == self.token or (only_clip and token.partition("-")[0] == self.clip_id):
            return self.clip
        raise StaleGapsError("the clip or its gaps changed after you pressed the button; check the gaps and press it again")

    def _result(self, clip: UploadedClip, gaps: list[tuple[float, float]], repair: Repair, worker: sandbox.Worker) -> Result:
        waveforms = {"masked": masked_samples(clip, gaps), "restored": repair.samples}
        waveforms |= {"original": clip.samples} if self.gap_made_by_user else {}
        files = {name: self._write_audio(name, x, clip.rate, clip.subtype) for name, x in waveforms.items()}
        target, warnings = self._write_clip(clip, repair, worker)
        strips = tuple(strip(clip.source, repair, gap) for gap in gaps[:MAX_STRIPS]) if mouth_was_visible(repair) else ()
        return Result(repair, gaps, files, target, (*repair.warnings, *warnings), strips)

    def _write_clip(self, clip: UploadedClip, repair: Repair, worker: sandbox.Worker) -> tuple[Path, tuple[str, ...]]:
        """Writes the restored clip with its unchanged video, in the format that avsi-inpaint chooses, or as .wav without video."""
        suffix, own = cli_jobs.default_suffix(clip.path, clip.source.has_video), clip.path.suffix
        target, warnings = worker.write(self._new_file(f"{safe_stem(clip.name)}.restored{suffix}"), repair.samples)
        if target.suffix == suffix != own:
            warnings = (f"written as {suffix}, which keeps the audio outside the gaps unchanged", *warnings)
        return target, warnings


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
