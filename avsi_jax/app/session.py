"""One visitor's clip, from the file to its repair, in a folder of its own; what avsi-app shows, without the page.

A clip is held to limits before anything is decoded (bytes) and before its face is followed (seconds); it is opened first in a
child process, which a hostile file may hang or crash. Times are seconds of the clip's sound. Whatever a visitor does wrong is a
ValueError or OSError of one line that names the clip as the visitor does, never a folder of this machine.
"""

from __future__ import annotations

import dataclasses
import math
import re
import secrets
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avsi_jax.audio import gap_detection
from avsi_jax.media import clip_io, clip_source
from avsi_jax.runtime import process_pool

if TYPE_CHECKING:
    from avsi_jax.inpainting.api import Inpainter, Repair

OPENING_S, OPENING_MB = 20, 1024  # what a clip may take to be opened
MOST_PIXELS = 1920 * 1088  # of a picture
MOST_GAPS = 20
SHORTEST_S = 0.02
MOST_VISITS = 20  # at once; the one that was quiet longest makes room
QUIET_S = 3600.0  # after which a visit is over
STRIP, MOST_STRIPS = 5, 3  # pictures of a gap; gaps that are shown so
AS_IT_IS = {".webm": ".mkv", ".mpeg": ".mpg"}  # suffixes of the same kind of file under another name
WORDS = ((0.8, "sure"), (0.65, "rather sure"), (0.5, "half sure"), (0.0, "a guess"))  # from a confidence on


@dataclasses.dataclass(frozen=True)
class Limits:
    seconds: float = 60.0
    megabytes: float = 200.0


@dataclasses.dataclass(frozen=True)
class UploadedClip:
    """What a visitor put in: its file in the visit's folder, the name it came by, and what was found in it."""

    path: Path
    name: str
    samples: np.ndarray  # (N, C)
    rate: int
    subtype: str
    size: tuple[int, int]  # of the pictures; (0, 0) without
    fps: float
    detected: tuple[tuple[float, float, str], ...]  # start_s, end_s, kind
    heard: Path  # its sound for a browser

    @property
    def duration_s(self) -> float:
        return len(self.samples) / self.rate

    def transcript(self) -> str:
        """What it is, in a line."""
        channels = {1: "mono", 2: "stereo"}.get(self.samples.shape[1], f"{self.samples.shape[1]} channels")
        audio = f"{self.duration_s:.2f} s of sound at {self.rate / 1000:g} kHz, {channels}"
        video = f"pictures of {self.size[0]}x{self.size[1]}, {self.fps:.4g} a second" if self.fps else "no pictures"
        return f"{audio}; {video}"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a visitor gets: files in the visit's folder. original: where the clip was damaged on purpose."""

    repair: Repair
    gaps: list[tuple[float, float]]  # as asked for, within the clip
    waveforms: dict[str, Path]  # damaged, restored; original
    clip: Path  # restored, pictures and all
    warnings: tuple[str, ...]
    strips: tuple[tuple[list[np.ndarray], np.ndarray, np.ndarray, list[float]], ...]  # of each gap: what drawings.faces takes


# ---- what a visitor writes -------------------------------------------------------------------------------------------------------


def parse_gaps(text: str) -> list[tuple[float, float]]:
    """'0.93-1.73, 2.1-2.3' -> [(0.93, 1.73), (2.1, 2.3)]; ValueError says what is wrong with it."""
    found = []
    for part in filter(None, re.split(r"[,;\n]+", (text or "").replace(" ", ""))):
        if not (match := re.fullmatch(r"(\d+\.?\d*|\.\d+)[-–](\d+\.?\d*|\.\d+)(?:s)?", part)):
            raise ValueError(f"gap {part[:30]!r}: expected START-END in seconds, such as 0.93-1.73")
        start, end = map(float, match.groups())
        if end - start < SHORTEST_S:
            raise ValueError(f"gap {part[:30]}: expected its end at least {SHORTEST_S:g} s after its start")
        found.append((start, end))
    if len(found) > MOST_GAPS:
        raise ValueError(f"{len(found)} gaps; expected at most {MOST_GAPS}")
    return sorted(found)


def written(gaps) -> str:
    """What parse_gaps reads: to the millisecond, outwards, so that no sample of a hole is left outside."""
    outwards = [(math.floor(start * 1000 + 1e-6) / 1000, math.ceil(end * 1000 - 1e-6) / 1000) for start, end, *_ in gaps]
    return ", ".join(f"{start:.7g}-{end:.7g}" for start, end in outwards)


def in_words(confidence: float) -> str:
    """'rather sure' and the like."""
    return next((words for least, words in WORDS if confidence >= least), WORDS[-1][1])


# ---- a clip goes in --------------------------------------------------------------------------------------------------------------


def check_size(file: Path, name: str, limits: Limits) -> None:
    """Before a byte is decoded."""
    size = file.stat().st_size
    if not size:
        raise clip_io.MediaError(f"{name} is empty; expected a clip")
    if size > limits.megabytes * 2**20:
        raise clip_io.MediaError(f"{name} has {size / 2**20:.1f} MB; at most {limits.megabytes:g} MB are taken: cut it")


def try_to_open(file: str) -> tuple:
    """In a child: (duration_s, picture size), or the line that says why not."""
    try:
        with clip_source.open_source(file) as source:
            return source.duration_s, source.size
    except (ValueError, OSError) as error:
        return (str(error),)


def check_opens(file: Path, name: str, limits: Limits) -> None:
    """In a process of its own, in bounded time and memory: that it opens, and is no longer or larger than is taken."""
    jobs = process_pool.run(try_to_open, [(str(file),)], workers=1, timeout_s=OPENING_S, memory_mb=OPENING_MB)
    (outcome,) = jobs
    if outcome.missing:
        raise clip_io.MediaError(f"{name}: cannot be opened: it {outcome.missing}; check that it plays")
    if len(outcome.result) == 1:
        raise clip_io.MediaError(outcome.result[0].replace(str(file), name))
    duration_s, (width, height) = outcome.result
    if not duration_s:
        raise clip_io.MediaError(f"{name} has no sound; expected a clip whose sound has a gap")
    if duration_s > limits.seconds:
        raise clip_io.MediaError(
            f"{name} is {duration_s:.1f} s long; at most {limits.seconds:g} s are taken here: cut it around the gap, "
            "or use the command avsi-inpaint, which takes any length"
        )
    if width * height > MOST_PIXELS:
        raise clip_io.MediaError(f"{name} has pictures of {width}x{height}; at most 1920x1088 are taken: scale them down")


class Session:
    """One visitor's clip and what was made of it. `folder` holds all of it; `leave` removes it."""

    def __init__(self, folder: Path, inpainter: Inpainter, limits: Limits):
        self.folder, self.inpainter, self.limits = folder, inpainter, limits
        self.clip: UploadedClip | None = None
        self.on_purpose = False  # whether the gaps are the visitor's own doing
        self.last_s = time.monotonic()
        self.lock = threading.Lock()
        self.given: set[Path] = set()  # uploads, where the server put them
        self.over = False
        self.forget()

    def leave(self) -> None:
        self.over = True
        self.forget()

    def take(self, file: str | Path, name: str = "") -> UploadedClip:
        """A clip that was uploaded or recorded; what was there before is forgotten."""
        file, name = Path(file), name or Path(file).name
        self.forget(but=file)
        if self.folder.parent.parent in file.parents:  # else an example
            self.given.add(file)
        check_size(file, name, self.limits)
        suffix = AS_IT_IS.get(file.suffix.lower(), file.suffix.lower())
        own = self._new(f"clip{suffix}")
        shutil.copyfile(file, own)
        try:
            clip_io.check_file(own)
            check_opens(own, name, self.limits)
            self.clip = self._opened(own, name)
        except (ValueError, OSError) as error:
            self.forget()
            raise clip_io.MediaError(str(error).replace(str(own), name)) from error
        return self.clip

    def _opened(self, file: Path, name: str) -> UploadedClip:
        """Its sound, and the holes in it."""
        with clip_source.open_source(file) as source:
            samples = np.asarray(source.audio(0, source.num_samples), np.float32)
            found = [h for h in gap_detection.detect_gaps(samples, source.rate) if h.end - h.start >= SHORTEST_S * source.rate]
            spans = tuple((h.start / source.rate, h.end / source.rate, h.kind) for h in found[:MOST_GAPS])
            heard = self._audio("as it was put in", samples, source.rate, source.subtype)
            return UploadedClip(file, name, samples, source.rate, source.subtype, source.size, source.fps, spans, heard)

    def forget(self, but: Path | None = None) -> None:
        """No clip, no file; nor what was uploaded, `but` what is to be looked at next."""
        self.clip, self.on_purpose = None, False
        for file in self.given - {but}:
            file.unlink(missing_ok=True)
        self.given &= {but}
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self.over:
            self.folder.mkdir(parents=True)

    def _new(self, name: str) -> Path:
        """A file in a new folder of its own: a browser keeps what it fetched from an address."""
        place = self.folder / secrets.token_hex(8)
        place.mkdir()
        return place / name

    def _audio(self, name: str, samples: np.ndarray, rate: int, subtype: str) -> Path:
        """Written for a browser: .wav; what isn't a number is silent."""
        file = self._new(f"{name}.wav")
        samples = np.nan_to_num(samples, posinf=0, neginf=0)
        clip_io.write_audio(file, samples, rate, "FLOAT" if subtype == "DOUBLE" else subtype)  # browsers play no DOUBLE
        return file

    def found(self) -> UploadedClip:
        """The clip with its holes, which are what is lost."""
        clip, self.on_purpose = self._need_clip(), False
        return clip

    def damage(self, start_s: float, length_ms: float) -> list[tuple[float, float]]:
        """A gap on purpose, cut to the clip."""
        clip = self._need_clip()
        start_s = min(max(0.0, start_s), max(0.0, clip.duration_s - SHORTEST_S))
        self.on_purpose = True
        return [(round(start_s, 3), round(min(start_s + max(length_ms / 1000, SHORTEST_S), clip.duration_s), 3))]

    def check_gaps(self, text: str) -> list[tuple[float, float]]:
        """The gaps a visitor wrote, within the clip."""
        clip, gaps = self._need_clip(), parse_gaps(text)
        for start, end in gaps:
            if start >= clip.duration_s or end > clip.duration_s + 0.005:
                raise ValueError(f"gap {start:g}-{end:g} s leaves the clip, whose sound is {clip.duration_s:.2f} s long")
        return [(start, min(end, clip.duration_s)) for start, end in gaps]

    def restore(self, text: str, *, face: int | None = None, sync: str = "off") -> Result:
        """The clip with its gaps filled in, and all files a page offers."""
        clip, gaps = self._need_clip(), self.check_gaps(text)
        if not gaps:
            raise ValueError("no gap is given; write one, such as 0.93-1.73, or damage the clip on purpose")
        try:
            repair = self.inpainter.inpaint(clip.path, gaps, face=face, sync=sync)
            return self._result(clip, gaps, repair)
        except (ValueError, OSError) as error:
            said = re.sub(rf"{re.escape(str(self.folder))}/\w+/", "", str(error).replace(str(clip.path), clip.name))
            raise clip_io.MediaError(said) from error

    def _need_clip(self) -> UploadedClip:
        if self.clip is None:
            raise ValueError("put in a clip first: drop a file, record one, or take an example")
        return self.clip

    def _result(self, clip: UploadedClip, gaps, repair: Repair) -> Result:
        waveforms = {"masked": emptied(clip, gaps), "restored": repair.samples}
        waveforms |= {"original": clip.samples} if self.on_purpose else {}
        files = {name: self._audio(name, x, clip.rate, clip.subtype) for name, x in waveforms.items()}
        with clip_source.open_source(clip.path) as source:
            target, warnings = self._whole_clip(source, clip, repair)
            strips = tuple(strip(source, repair, gap) for gap in gaps[:MOST_STRIPS]) if seen(repair) else ()
        return Result(repair, gaps, files, target, (*repair.warnings, *warnings), strips)

    def _whole_clip(self, source, clip: UploadedClip, repair: Repair) -> tuple[Path, tuple[str, ...]]:
        """The clip with its new sound, in the kind of file that it came in, pictures as they are; .wav where that can't be."""
        suffix = clip.path.suffix
        suffix, warnings = (".mkv", ("written as .mkv: .avi can't hold it in step",)) if suffix == ".avi" else (suffix, ())
        target = self._new(f"{safe_stem(clip.name)}.restored{suffix}")
        try:
            return target, warnings + clip_source.write_clip(source, target, [repair.samples])
        except clip_io.MediaError:
            if suffix in clip_io.AUDIO_SUFFIXES:
                raise
        target, why = target.with_suffix(".wav"), "written as .wav, its sound alone: the pictures can't be copied"
        return target, (*warnings, why, *clip_source.write_clip(source, target, [repair.samples]))


def emptied(clip: UploadedClip, gaps) -> np.ndarray:
    """The clip's sound (N, C) with silence in the gaps."""
    samples = np.nan_to_num(clip.samples, posinf=0, neginf=0)
    for start, end in gaps:
        samples[round(start * clip.rate) : round(end * clip.rate)] = 0
    return samples


def safe_stem(name: str) -> str:
    """What a file may be called: the name's letters, digits and a few marks."""
    return re.sub(r"[^\w.-]+", "_", Path(name).stem).strip("._")[:60] or "clip"


def seen(repair: Repair) -> bool:
    return repair.landmarks is not None and bool(len(repair.landmarks)) and bool(np.any(repair.landmarks_valid))


def strip(source, repair: Repair, gap) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, list[float]]:
    """STRIP pictures of a gap, evenly apart: (pictures, points (P, 68, 2), seen (P,), times of the sound), in the repair's step."""
    lag = source.lag_s if repair.lag_s is None else repair.lag_s
    wanted = np.linspace(*gap, STRIP + 2)[1:-1] - lag
    nearest = sorted({int(np.argmin(np.abs(repair.frame_times - t))) for t in wanted})
    times = np.asarray(repair.frame_times)[nearest]
    video = source.video(times[0] - 1e-3, times[-1] + 1e-3)
    rgb = [video.rgb[int(np.argmin(np.abs(video.times - t)))] for t in times]
    return rgb, repair.landmarks[nearest], np.asarray(repair.landmarks_valid)[nearest], [float(t + lag) for t in times]


# ---- many visitors ---------------------------------------------------------------------------------------------------------------


class SessionStore:
    """Visits by the session they belong to."""

    def __init__(self, folder: Path, inpainter: Inpainter, limits: Limits):
        self.folder, self.inpainter, self.limits = folder, inpainter, limits
        self._all: dict[str, Session] = {}
        self._lock = threading.Lock()

    def of(self, session: str) -> Session:
        """The session's visit; a new one where there is none. Those that were quiet for long, or are too many, are over."""
        with self._lock:
            visit = self._all.pop(session, None) or Session(self.folder / secrets.token_hex(8), self.inpainter, self.limits)
            visit.last_s = time.monotonic()
            self._all[session] = visit
            for other, old in list(self._all.items())[:-1]:
                if len(self._all) > MOST_VISITS or visit.last_s - old.last_s > QUIET_S:
                    self._all.pop(other).leave()
            return visit

    def end(self, session: str) -> None:
        with self._lock:
            if visit := self._all.pop(session, None):
                visit.leave()
