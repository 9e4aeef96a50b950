"""Windows through a Restorer, many at once: the gaps of clips are filled, each plan's windows one after another.

Windows of any clips share a batch, filled up to one of BUCKETS, for which a program each is compiled. In a long gap a window hears
what the one before it filled in, and takes over from its levels by a cross-fade; the sound of the overlap is made anew from them.
"""

from __future__ import annotations

import time

import numpy as np

from avsi_jax.inpainting import face_tracks, window_plan
from avsi_jax.inpainting.masked_audio import InpaintedSpan, MaskedAudio, window_of
from avsi_jax.media import channels, clip_io
from avsi_jax.presets import RECORD_RATE, Spec

BUCKETS = (1, 2, 4, 8)  # windows at once
GAP_ROWS = 8  # a window's gaps are filled up to this, twice this, ...


class WindowInpainter:
    """One plan at work. `fill`: what was made up so far; `said`: the sentences read, one a window; `heard`: whether there was sound
    beside the gaps; `cancelled`: whether its channels cancel each other in their mean; `done`: nothing is left to do."""

    def __init__(self, plan: window_plan.Plan, masked: MaskedAudio, tracks: face_tracks.FaceTracks | None, spec: Spec):
        self.plan, self.tracks, self._damaged, self._spec = plan, tracks, masked, spec
        self._hop = spec.hop * spec.decimation
        missing = masked.missing[plan.gaps.start : plan.gaps.stop]
        self.fill = InpaintedSpan(int(missing[0, 0]), int(missing[-1, 1]))
        self.transcript: list[str] = []
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
        masked, length = self._damaged, min(size, self._damaged.length - self.step.first)
        audio = masked.record(first, size, self.fill.weights)
        audio = self.fill.laid_over(audio, first) if self._at else audio
        missing = masked.missing.copy()
        if self._at:
            own = missing[self.plan.gaps.start]  # a plan of several windows has one gap
            own[:] = (own[0], self.step.end) if self.plan.backwards else (self.step.start, own[1])
        missing = np.clip(missing - first, 0, length)
        missing = missing[missing[:, 0] < missing[:, 1]]
        self.heard |= _is_heard(audio, missing)
        row = face_tracks.window(self.tracks, *self.interval)
        return row | {
            "audio": clip_io.to_int16(audio * self._gain),
            "audio_length": np.int32(length),
            "id_hash": np.uint32(0),
        }, missing

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

    def take(self, audio: np.ndarray, said: str) -> None:
        """The window's sound (record_samples,), filled in, and the sentence read in it."""
        first, start, end = self.step
        self.fill.put(start, window_of(audio, start - first, end - start) / np.float32(self._gain))
        self.transcript.append(said)
        self._at += 1


def _is_heard(audio: np.ndarray, missing: np.ndarray) -> bool:
    """Whether a window holds any sound beside its gaps: 50 ms that are no digital silence."""
    known = np.ones(len(audio), bool)
    for a, b in missing:
        known[a:b] = False
    return int((np.abs(audio[known]) > 1e-4).sum()) > RECORD_RATE // 20


def run(restorer, window_inpainters: list[WindowInpainter], seconds: dict[str, float]) -> None:
    """Works all of them to their end; adds the time to seconds['model'] and ['vocoder']."""
    waiting = [filling for filling in window_inpainters if not filling.done]
    while waiting:
        look(waiting[: BUCKETS[-1]])
        batch = [(filling, *filling.row()) for filling in waiting[: BUCKETS[-1]]]
        for alike in _alike(batch):
            _restore(restorer, alike, seconds)
        waiting = [filling for filling in waiting if not filling.done]


def look(window_inpainters: list[WindowInpainter]) -> None:
    """Has the pictures of their next windows looked at, those of one clip at once."""
    for tracks in {id(f.tracks): f.tracks for f in window_inpainters if f.tracks is not None}.values():
        tracks.look([tracks.interval(*f.interval) for f in window_inpainters if f.tracks is tracks])


def _alike(batch) -> list[list]:
    """Windows with equally many pictures and room for gaps, together."""
    kinds: dict[tuple, list] = {}
    for filling, row, missing in batch:
        kinds.setdefault((row["landmarks"].shape, _rows(len(missing))), []).append((filling, row, missing))
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
    rows = _rows(max(len(missing) for *_, missing in batch))
    gap = np.stack([np.pad(missing, ((0, rows - len(missing)), (0, 0))) for *_, missing in filled_up])
    began = time.perf_counter()
    restored = jax.block_until_ready(restorer.restore(raw, gap))
    said = restorer.sentences(restored)
    level = np.asarray(restored.level)
    seconds["model"] += time.perf_counter() - began
    level = np.stack([filling.blend(of) for (filling, *_), of in zip(batch, level)] + [*level[len(batch) :]])
    began = time.perf_counter()
    audio = restorer.to_audio(level, raw, gap)
    seconds["vocoder"] += time.perf_counter() - began
    for (filling, *_), made, text in zip(batch, audio, said):
        filling.take(made, text)
