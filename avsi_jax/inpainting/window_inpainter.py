"""Windows through a Restorer, many at once: the gaps of clips are filled, each plan's windows one after another.

Windows of any clips share a batch, filled up to one of BUCKETS, for which a program each is compiled. In a long gap a window hears
what the one before it filled in, and takes over from its levels by a cross-fade; the sound of the overlap is made anew from them.
"""

from __future__ import annotations

import time

import numpy as np

from avsi_jax.inpainting import face_tracks, window_plan
from avsi_jax.inpainting.masked_audio import Damaged, Fill, window_of
from avsi_jax.media import channels, clip_io
from avsi_jax.presets import RECORD_RATE, Spec

BUCKETS = (1, 2, 4, 8)  # windows at once
GAP_ROWS = 8  # a window's gaps are filled up to this, twice this, ...


class Filling:
    """One plan at work. `fill`: what was made up so far; `said`: the sentences read, one a window; `heard`: whether there was sound
    beside the gaps; `cancelled`: whether its channels cancel each other in their mean; `done`: nothing is left to do."""

    def __init__(self, plan: window_plan.Plan, damaged: Damaged, watcher: face_tracks.Watcher | None, spec: Spec):
        self.plan, self.watcher, self._damaged, self._spec = plan, watcher, damaged, spec
        self._hop = spec.hop * spec.decimation
        lost = damaged.lost[plan.gaps.start : plan.gaps.stop]
        self.fill = Fill(int(lost[0, 0]), int(lost[-1, 1]))
        self.said: list[str] = []
        self.heard = self.cancelled = False
        self._at, self._level, self._gain = 0, None, 1.0

    @property
    def done(self) -> bool:
        return self._at == len(self.plan.steps)

    @property
    def step(self) -> window_plan.Step:
        return self.plan.steps[self._at]

    @property
    def interval(self) -> tuple[float, float]:
        """The next window, in seconds of the sound."""
        return self.step.first / RECORD_RATE, (self.step.first + self._spec.record_samples) / RECORD_RATE

    def row(self) -> tuple[dict, np.ndarray]:
        """The next window: its row of a raw batch, as loud as networks know sound, and what of it is lost, (G, 2)."""
        first, size = self.step.first, self._spec.record_samples
        if not self._at:
            self._listen()
        damaged, length = self._damaged, min(size, self._damaged.length - self.step.first)
        sound = damaged.record(first, size, self.fill.weights)
        sound = self.fill.laid_over(sound, first) if self._at else sound
        lost = damaged.lost.copy()
        if self._at:
            own = lost[self.plan.gaps.start]  # a plan of several windows has one gap
            own[:] = (own[0], self.step.end) if self.plan.backwards else (self.step.start, own[1])
        lost = np.clip(lost - first, 0, length)
        lost = lost[lost[:, 0] < lost[:, 1]]
        self.heard |= _is_heard(sound, lost)
        row = face_tracks.window(self.watcher, *self.interval)
        return row | {
            "audio": clip_io.to_int16(sound * self._gain),
            "audio_length": np.int32(length),
            "id_hash": np.uint32(0),
        }, lost

    def _listen(self) -> None:
        """Settles by what is known around the gaps how the channels are heard, and how loud."""
        span = self.fill.start, self.fill.start + len(self.fill.samples)
        known = self._damaged.known(*span)
        self.fill.weights, self.cancelled = channels.weights_of(known), channels.cancel(known)
        self._gain = self._damaged.gain(*span, self.fill.weights)

    def blend(self, level: np.ndarray) -> np.ndarray:
        """The window's levels (F, K), in its overlap with the one before by and by instead of that one's."""
        if self._at:
            before, step = self.plan.steps[self._at - 1], self.step
            shift = (step.first - before.first) // self._hop
            frames = np.arange(len(level))
            centre = frames * self._hop + step.first + (0 if self._spec.centred else self._spec.window * self._spec.decimation // 2)
            since = step.end - centre if self.plan.backwards else centre - step.start
            reach = self._spec.window * self._spec.decimation  # frames before the overlap see some of it
            both = (since > -reach) & (since < window_plan.OVERLAP) & (frames + shift >= 0) & (frames + shift < len(level))
            new = (since[both] / window_plan.OVERLAP).clip(0, 1)[:, None]
            level = level.copy()
            level[both] = new * level[both] + (1 - new) * self._level[frames[both] + shift]
        self._level = level
        return level

    def take(self, sound: np.ndarray, said: str) -> None:
        """The window's sound (record_samples,), filled in, and the sentence read in it."""
        first, start, end = self.step
        self.fill.put(start, window_of(sound, start - first, end - start) / np.float32(self._gain))
        self.said.append(said)
        self._at += 1


def _is_heard(sound: np.ndarray, lost: np.ndarray) -> bool:
    """Whether a window holds any sound beside its gaps: 50 ms that are no digital silence."""
    known = np.ones(len(sound), bool)
    for a, b in lost:
        known[a:b] = False
    return int((np.abs(sound[known]) > 1e-4).sum()) > RECORD_RATE // 20


def run(restorer, fillings: list[Filling], seconds: dict[str, float]) -> None:
    """Works all of them to their end; adds the time to seconds['model'] and ['vocoder']."""
    waiting = [filling for filling in fillings if not filling.done]
    while waiting:
        look(waiting[: BUCKETS[-1]])
        batch = [(filling, *filling.row()) for filling in waiting[: BUCKETS[-1]]]
        for alike in _alike(batch):
            _restore(restorer, alike, seconds)
        waiting = [filling for filling in waiting if not filling.done]


def look(fillings: list[Filling]) -> None:
    """Has the pictures of their next windows looked at, those of one clip at once."""
    for watcher in {id(f.watcher): f.watcher for f in fillings if f.watcher is not None}.values():
        watcher.look([watcher.interval(*f.interval) for f in fillings if f.watcher is watcher])


def _alike(batch) -> list[list]:
    """Windows with equally many pictures and room for gaps, together."""
    kinds: dict[tuple, list] = {}
    for filling, row, lost in batch:
        kinds.setdefault((row["landmarks"].shape, _rows(len(lost))), []).append((filling, row, lost))
    return list(kinds.values())


def _rows(count: int) -> int:
    rows = GAP_ROWS
    while rows < count:
        rows *= 2
    return rows


def _restore(restorer, batch: list, seconds: dict[str, float]) -> None:
    """One pass: a batch's windows, filled up by copies of the first to a bucket."""
    import jax

    count = next(size for size in BUCKETS if size >= len(batch))
    filled_up = batch + batch[:1] * (count - len(batch))
    raw = {key: np.stack([row[key] for _, row, _ in filled_up]) for key in batch[0][1]}
    rows = _rows(max(len(lost) for *_, lost in batch))
    gap = np.stack([np.pad(lost, ((0, rows - len(lost)), (0, 0))) for *_, lost in filled_up])
    began = time.perf_counter()
    restored = jax.block_until_ready(restorer.restore(raw, gap))
    said = restorer.sentences(restored)
    level = np.asarray(restored.level)
    seconds["model"] += time.perf_counter() - began
    level = np.stack([filling.blend(of) for (filling, *_), of in zip(batch, level)] + [*level[len(batch) :]])
    began = time.perf_counter()
    sound = restorer.to_sound(level, raw, gap)
    seconds["vocoder"] += time.perf_counter() - began
    for (filling, *_), made, text in zip(batch, sound, said):
        filling.take(made, text)
