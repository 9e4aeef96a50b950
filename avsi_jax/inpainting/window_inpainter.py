"""Runs windows of clips through a Restorer in batches; the windows of one plan run one after another.

Windows of any clips share a batch, which is padded to one of BATCH_SIZES, each a compiled program. In a long gap a window reads
what the window before it restored; in their overlap the levels are cross-faded and the audio is generated again from them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from avsi_jax.inpainting import face_tracks, window_plan
from avsi_jax.inpainting.masked_audio import InpaintedSpan, MaskedAudio, window_of
from avsi_jax.media import channels, clip_io
from avsi_jax.presets import RECORD_RATE, Spec

if TYPE_CHECKING:
    from avsi_jax.inference.restorer import Restorer

BATCH_SIZES = (1, 2, 4, 8)  # windows
GAP_ROWS = 8  # the gaps of a window are padded to this, twice this, ... rows


class WindowInpainter:
    """Carries out one plan.

    inpainted: the restored audio so far. transcript: predicted texts, one per window. has_audio: whether any window had audio
    beside its gaps. channels_cancel: whether the channels cancel each other in their mean. done: whether all windows have run.
    """

    def __init__(self, plan: window_plan.Plan, masked: MaskedAudio, tracks: face_tracks.FaceTracks | None, spec: Spec):
        self.plan, self.tracks, self._masked, self._spec = plan, tracks, masked, spec
        self._hop = spec.hop * spec.decimation
        gaps = masked.record_gaps[plan.gaps.start : plan.gaps.stop]
        self.inpainted = InpaintedSpan(int(gaps[0, 0]), int(gaps[-1, 1]))
        self.transcript: list[str] = []
        self.has_audio = self.channels_cancel = False
        self._index, self._level, self._gain = 0, None, 1.0

    @property
    def done(self) -> bool:
        """Whether all windows have run."""
        return self._index == len(self.plan.windows)

    @property
    def window(self) -> window_plan.Window:
        """The next window."""
        return self.plan.windows[self._index]

    @property
    def interval(self) -> tuple[float, float]:
        """The next window, in seconds of the audio."""
        return self.window.first / RECORD_RATE, (self.window.first + self._spec.record_samples) / RECORD_RATE

    def batch_row(self) -> tuple[dict, np.ndarray]:
        """The next window: its row of a raw batch, at a level that networks were trained on, and its gaps (G, 2) in samples."""
        first, size = self.window.first, self._spec.record_samples
        if not self._index:
            self._measure_context()
        masked, length = self._masked, min(size, self._masked.length - self.window.first)
        audio = masked.read_mono(first, size, self.inpainted.weights)
        audio = self.inpainted.overlaid_on(audio, first) if self._index else audio
        gaps = masked.record_gaps.copy()
        if self._index:
            own = gaps[self.plan.gaps.start]  # a plan with several windows has one gap
            own[:] = (own[0], self.window.end) if self.plan.backwards else (self.window.start, own[1])
        gaps = np.clip(gaps - first, 0, length)
        gaps = gaps[gaps[:, 0] < gaps[:, 1]]
        self.has_audio |= _has_audio(audio, gaps)
        row = face_tracks.batch_row(self.tracks, *self.interval)
        return row | {
            "audio": clip_io.to_int16(audio * self._gain),
            "audio_length": np.int32(length),
            "id_hash": np.uint32(0),
        }, gaps

    def _measure_context(self) -> None:
        """Chooses the weights of the channels and the gain from the known audio around the gaps."""
        span = self.inpainted.start, self.inpainted.start + len(self.inpainted.samples)
        known = self._masked.native_context(*span)
        self.inpainted.weights, self.channels_cancel = channels.downmix_weights(known), channels.cancel_in_mean(known)
        self._gain = self._masked.gain(*span, self.inpainted.weights)

    def cross_faded(self, level: np.ndarray) -> np.ndarray:
        """The window's levels (F, K), cross-faded with those of the window before in their overlap."""
        if self._index:
            before, window = self.plan.windows[self._index - 1], self.window
            shift = (window.first - before.first) // self._hop
            frames = np.arange(len(level))
            centre = (
                frames * self._hop + window.first + (0 if self._spec.centred else self._spec.window * self._spec.decimation // 2)
            )
            since = window.end - centre if self.plan.backwards else centre - window.start
            reach = self._spec.window * self._spec.decimation  # frames before the overlap include some of it
            both = (since > -reach) & (since < window_plan.OVERLAP) & (frames + shift >= 0) & (frames + shift < len(level))
            new = (since[both] / window_plan.OVERLAP).clip(0, 1)[:, None]
            level = level.copy()
            level[both] = new * level[both] + (1 - new) * self._level[frames[both] + shift]
        self._level = level
        return level

    def add_result(self, audio: np.ndarray, transcript: str) -> None:
        """Stores the restored audio (record_samples,) and the predicted text of the next window, and moves on to the one after."""
        first, start, end = self.window
        self.inpainted.put(start, window_of(audio, start - first, end - start) / np.float32(self._gain))
        self.transcript.append(transcript)
        self._index += 1


def _has_audio(audio: np.ndarray, gaps: np.ndarray) -> bool:
    """Whether a window has audio outside its gaps: 50 ms that are not digital silence."""
    known = np.ones(len(audio), bool)
    for a, b in gaps:
        known[a:b] = False
    return int((np.abs(audio[known]) > 1e-4).sum()) > RECORD_RATE // 20


def run(restorer: Restorer, window_inpainters: list[WindowInpainter], seconds: dict[str, float]) -> None:
    """Runs all of them until they are done; adds the time to seconds['model'] and seconds['vocoder']."""
    waiting = [inpainter for inpainter in window_inpainters if not inpainter.done]
    while waiting:
        track_faces(waiting[: BATCH_SIZES[-1]])
        batch = [(inpainter, *inpainter.batch_row()) for inpainter in waiting[: BATCH_SIZES[-1]]]
        for group in _group_by_shape(batch):
            _restore(restorer, group, seconds)
        waiting = [inpainter for inpainter in waiting if not inpainter.done]


def track_faces(window_inpainters: list[WindowInpainter]) -> None:
    """Tracks the face in the video of their next windows, those of one clip together."""
    for tracks in {id(w.tracks): w.tracks for w in window_inpainters if w.tracks is not None}.values():
        tracks.track([tracks.interval(*w.interval) for w in window_inpainters if w.tracks is tracks])


def _group_by_shape(batch: list[tuple]) -> list[list[tuple]]:
    """Windows whose video frames and gaps are padded to the same size, together."""
    groups: dict[tuple, list] = {}
    for inpainter, row, gaps in batch:
        groups.setdefault((row["landmarks"].shape, _padded_rows(len(gaps))), []).append((inpainter, row, gaps))
    return list(groups.values())


def _padded_rows(count: int) -> int:
    rows = GAP_ROWS
    while rows < count:
        rows *= 2
    return rows


def _restore(restorer: Restorer, batch: list[tuple], seconds: dict[str, float]) -> None:
    """One pass: the windows of a batch, padded with copies of the first to one of BATCH_SIZES."""
    import jax

    count = next(size for size in BATCH_SIZES if size >= len(batch))
    padded = batch + batch[:1] * (count - len(batch))
    raw = {key: np.stack([row[key] for _, row, _ in padded]) for key in batch[0][1]}
    rows = _padded_rows(max(len(gaps) for *_, gaps in batch))
    gaps = np.stack([np.pad(own, ((0, rows - len(own)), (0, 0))) for *_, own in padded])
    began = time.perf_counter()
    restored = jax.block_until_ready(restorer.restore(raw, gaps))
    transcripts = restorer.sentences(restored)
    level = np.asarray(restored.level)
    seconds["model"] += time.perf_counter() - began
    level = np.stack([inpainter.cross_faded(own) for (inpainter, *_), own in zip(batch, level)] + [*level[len(batch) :]])
    began = time.perf_counter()
    audio = restorer.to_audio(level, raw, gaps)
    seconds["vocoder"] += time.perf_counter() - began
    for (inpainter, *_), own, transcript in zip(batch, audio, transcripts):
        inpainter.add_result(own, transcript)
