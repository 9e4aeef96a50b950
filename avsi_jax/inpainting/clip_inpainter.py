"""One clip at work: its source, the windows around its gaps, and the sound that comes out, in memory that does not grow with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from avsi_jax.face import av_sync
from avsi_jax.inpainting import confidence, face_tracks, window_inpainter, window_plan
from avsi_jax.inpainting.masked_audio import MaskedAudio
from avsi_jax.media import clip_io

if TYPE_CHECKING:
    from avsi_jax.inference.restorer import Restorer
    from avsi_jax.media.clip_source import Source

BLOCK_S = 10.0  # of untouched sound at once
MEASURED_S = 1.5  # the longest gap that systems are evaluated at, where the weights do not tell
CANCELLED = "channels of opposite phase cancel each other in their mean: the loudest was gone by, others are filled as they hold it"
MOST_SHIFT_S = 5.0  # that a caller may tell sound and picture to be out of step


class FaceModels(NamedTuple):
    """What looks at pictures: landmarks.FaceTracker, mouth_visibility.mouth_seen, and the lock that the tracker is used under."""

    tracker: object
    mouth_seen: object
    lock: threading.Lock


class InpaintedGap(NamedTuple):
    """A gap [start, end) in samples of the clip's rate: api.Gap without its seconds."""

    start: int
    end: int
    confidence: float
    transcript: str
    by: str


class ClipInpainter:
    """A source whose gaps, `spans` in samples of its own rate, are being filled.

    eyes: None for a system without pictures; forgets: whether what is done with may be given up, for files of any length.
    MediaError for a clip that has not what the system needs.
    """

    def __init__(
        self, source: Source, spans, restorer: Restorer, face_models: FaceModels | None, measured, *, face=None, step="off", forgets=False,
    ):  # fmt: skip
        self.began = time.perf_counter()
        self.seconds = dict.fromkeys(("decode", "landmarks", "model", "vocoder", "all"), 0.0)
        self.source, self.restorer, self.measured = source, restorer, measured
        self.masked = MaskedAudio(source, spans)
        self.tracks, self.av_offset_s, self._step = None, None, _checked_step(step)
        self._forgets, self._filled, self._notes, self._cancelled = forgets, {}, [], False
        if face_models is not None:
            self._watch(face_models, face)
        spec = restorer.spec
        plans = window_plan.plan(self.masked.missing, spec.record_samples, self.masked.length, spec.hop * spec.decimation)
        self.window_inpainters = [window_inpainter.WindowInpainter(plan, self.masked, self.tracks, spec) for plan in plans]
        self._place = [i for i, plan in enumerate(plans) for _ in plan.gaps]

    def _watch(self, face_models: FaceModels, face) -> None:
        drops = self.restorer.system.drops
        if self.source.has_video:
            self.tracks = face_tracks.FaceTracks(self.source, *face_models, self.seconds, face=face, must_see=not drops)
        elif drops:
            self._notes.append("no pictures: repaired by the sound alone")
        else:
            raise clip_io.MediaError(
                f"{self.source.path} has no pictures; {self.restorer.name} needs them; a_si and av_unified do without"
            )

    def begin(self) -> None:
        """Looks at the first windows' pictures and settles by how much the sound comes after them."""
        if self.tracks is None:
            return
        if isinstance(self._step, float):
            self.tracks.lag_s += self._step
        window_inpainter.look(self.window_inpainters[: window_inpainter.BUCKETS[-1]])
        began = time.perf_counter()
        found = face_tracks.measured_sync(self.tracks, self.masked)
        self.seconds["landmarks"] += time.perf_counter() - began
        if found.certainty >= av_sync.SURE:
            told = self._step if isinstance(self._step, float) else 0.0
            self.av_offset_s = float(found.offset_s + told)
            self._in_step(found, told)

    def _in_step(self, found: av_sync.Sync, told: float) -> None:
        """Corrects the step where it is asked for, and tells what is out of it."""
        late = "later" if found.offset_s > 0 else "earlier"
        apart = f"the sound is {abs(found.offset_s) * 1000:.0f} ms {late} than its pictures"
        if abs(found.offset_s) <= av_sync.WORTH_S:
            return
        if self._step == "auto":
            self.tracks.lag_s += found.correction_s
            self._notes.append(f"{apart}: corrected for the repair")
        elif told:
            self._notes.append(f"{apart}, by what was measured after the {told:g} s told")
        else:
            self._notes.append(f"{apart}: repaired as it is; sync 'auto' corrects it")

    def gap(self, number: int) -> InpaintedGap:
        """A gap, when its filling is done; ValueError where there was nothing to go by in the whole clip."""
        if number in self._filled:
            return self._filled[number]
        of = self.window_inpainters[self._place[number]]
        (start, end), rate = self.masked.spans[number], self.masked.rate
        seen = self.tracks.share_seen(start / rate, end / rate) if self.tracks else 0.0
        heard = of.heard and not self.restorer.name.startswith("v_")
        if not heard and not seen and end - start == self.source.num_samples:
            raise ValueError(f"{self.source.path}: the gap takes the whole sound and no face is seen: there is nothing to go by")
        sure = confidence.confidence((end - start) / rate, heard, seen, self.measured)
        said = ", ".join(dict.fromkeys(filter(None, of.transcript)))
        self._filled[number] = found = InpaintedGap(start, end, sure, said, confidence.by(heard, seen))
        self._warn(found, bool(heard or seen))
        if of.cancelled and not self._cancelled:
            self._cancelled = True
            self._notes.append(f"around {start / rate:.2f} s {CANCELLED}")
        return found

    def _warn(self, gap: InpaintedGap, known: bool) -> None:
        rate, length_s = self.masked.rate, (gap.end - gap.start) / self.masked.rate
        name = f"gap {gap.start / rate:.2f}-{gap.end / rate:.2f} s"
        if not known:
            self._notes.append(f"{name}: neither sound nor lips around it, so what is filled in is a guess")
        longest = confidence.longest_s(self.measured, gap.by)
        if length_s > (longest or MEASURED_S):
            quality = f"; there STOI in the gap was {confidence.at_longest(self.measured, gap.by):.2f}" if longest else ""
            self._notes.append(f"{name} is longer than the {longest or MEASURED_S:g} s that quality was measured up to{quality}")

    def blocks(self) -> Iterator[np.ndarray]:
        """The whole sound, (n, C) one after another, filled in on the way; what is not in a gap is the source's own."""
        at = 0
        for number, (start, end) in enumerate(self.masked.spans):
            yield from self._untouched(at, start)
            of = self._done(number)
            yield from self.masked.pieces(number, of.fill)
            at = end
            if self._forgets and number + 1 == of.plan.gaps.stop:
                of.fill = None
        yield from self._untouched(at, self.source.num_samples)

    def _untouched(self, start: int, stop: int) -> Iterator[np.ndarray]:
        size = max(1, round(BLOCK_S * self.masked.rate))
        for at in range(start, stop, size):
            yield self.masked.own(at, min(at + size, stop))

    def _done(self, number: int) -> window_inpainter.WindowInpainter:
        """The filling of a gap, done: together with the next ones, where it is not yet."""
        i = self._place[number]
        if not self.window_inpainters[i].done:
            now = self.window_inpainters[i : i + window_inpainter.BUCKETS[-1]]
            window_inpainter.run(self.restorer, now, self.seconds)
            for f in now:
                for each in f.plan.gaps:
                    self.gap(each)
            if self._forgets and self.tracks:  # only now: gaps that are filled together may lie hours apart
                self.tracks.forget(self.masked.spans[now[-1].plan.gaps[-1]][1] / self.masked.rate)
        return self.window_inpainters[i]

    def finish(self) -> tuple[tuple[InpaintedGap, ...], tuple[str, ...], dict[str, float]]:
        """Gaps, warnings and seconds, when all is done."""
        self.seconds["all"] = time.perf_counter() - self.began
        gaps = tuple(self.gap(i) for i in range(len(self.masked.spans)))
        return gaps, tuple(self._notes) + (self.tracks.warnings if self.tracks else ()), dict(self.seconds)


def _checked_step(step):
    """'off', 'auto', or seconds as float; ValueError for others."""
    if isinstance(step, str):
        if step not in ("off", "auto"):
            raise ValueError(f"sync {step!r}: expected off, auto or seconds by which the sound comes later than its pictures")
        return step
    if not abs(float(step)) <= MOST_SHIFT_S:
        raise ValueError(f"sync {step:g}: expected at most {MOST_SHIFT_S:g} s either way")
    return float(step)


def check_gaps(gaps, num_samples: int, rate: int) -> list[tuple[int, int]]:
    """Seconds -> [start, end) in samples of the clip's own rate, sorted; ValueError says which gap doesn't fit and why."""
    duration = num_samples / rate
    spans = []
    for start, end in sorted(gaps):
        if not 0 <= start < end:
            raise ValueError(f"gap {start:g}-{end:g}: expected START-END in seconds with 0 <= START < END")
        if start >= duration or end > duration + 0.5 / rate:
            raise ValueError(f"gap {start:g}-{end:g} s leaves the clip, whose sound is {duration:.3f} s long")
        spans.append((round(start * rate), min(round(end * rate), num_samples)))
        if spans[-1][0] == spans[-1][1]:
            raise ValueError(f"gap {start:g}-{end:g} s holds no sample at {rate} Hz")
    if not spans:
        raise ValueError("no gap given; expected at least one, such as --gap 0.93-1.73")
    merged = [spans[0]]
    for start, end in spans[1:]:
        if start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def detected_gaps(source: Source) -> list[tuple[int, int]]:
    """The holes that nobody named, in samples of the clip's own rate; ValueError where there are none."""
    from avsi_jax.audio import gap_detection

    finder = gap_detection.GapDetector(source.rate)
    found = [gap for _, block in source.blocks(max(1, round(BLOCK_S * source.rate))) for gap in finder.feed(block)]
    spans = [(gap.start, gap.end) for gap in (*found, *finder.end())]
    if not spans:
        raise ValueError(
            f"{source.path}: no hole found; expected digital silence, lost or repeated packets or clipped bursts in speech; "
            "name it with --gap START-END"
        )
    return spans
