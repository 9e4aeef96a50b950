"""Detects gaps in audio: digital silence, lost packets, repeated packets and clipped bursts.

Positions are samples at the clip's own rate. Levels are dB of full scale: half the peak-to-peak range in frames of 2 ms, taken
from the loudest channel.

A gap must affect all active channels; a channel that is always silent is ignored. A silence counts as a gap if it cuts speech
off: it starts right after a level at which no noise gate closes, or ends right before a level at which none opens. Noise gates
produce the same digital silence in pauses, so a silence between two quiet sides is ambiguous. It counts only if it is at least as
long as a word, and similar background noise lasts elsewhere for longer than a gate holds. In coarsely quantised audio (8 bits)
quiet sounds round to a constant too; there both edges of a silence must be cut at nearly full level. Repeated packets are detected
in audio/repeat_detection.py. A silence of at most MAX_PACKET_S counts as a lost (dropped) packet if another one as short starts
within PACKET_DISTANCE_S; see `_name_lost_packets`. Noise, clicks, dropped samples and gaps longer than MAX_GAP_S are not detected.

The audio is analysed in chunks on a fixed grid, with a margin on both sides, so the result does not depend on the block sizes in
which it arrives. The thresholds were chosen on one half of the Grid clips and evaluated on the other half:
benchmarks/quality/gap_detection.py, docs/gap_detection.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from avsi_jax.audio.repeat_detection import HOP_S, MIN_REPEAT_S, find_repeats, smallest_step

FRAME_S = 0.002
CHUNK_FRAMES = 2000
MARGIN_FRAMES = 100  # more than two of the longest packets
CONTEXT_S = 10.0  # audio before and after a silence that is used to classify it
MAX_GAP_S = 30.0
MAX_PACKET_S, PACKET_DISTANCE_S = 0.085, 2.0  # longest lost packet; another one starts within this distance
MERGE_S = 0.012
FLOOR_DB = -120.0
MAX_SAMPLE = 1e6  # larger samples are clipped: their squares would overflow

# Silence
MIN_CONSTANT_S = 0.008  # shortest run of one constant value
QUIET_DB, MIN_QUIET_S = -66.0, 0.012  # residual level inside a gap after lossy coding
DROP_DB = 15.0  # the inside of a gap is at least this far below its edges
CUT_DB = 20.0  # 96 % of simulated gates close and open further below the speech level; above that, speech was cut off
CUT_BEFORE_S, CUT_AFTER_S = 0.016, 0.008  # inspected around a silence: gates hold after a word, and may open late
END_CUT_DB, MIN_END_S = 8.0, 0.03  # at the ends of a clip, where digital silence is common
NOISE_S, NOISE_DB = 0.4, 8.0  # background noise of this length and at most this far above the edges: longer than a gate holds
WORD_S = 0.15  # shortest word; a silence of this length inside noise can hide one
SMEAR_S, SMEAR_DB = 0.03, 20.0  # edges move outwards by at most SMEAR_S while the level is this far below what follows

# Audio of about 9 bits and less
COARSE_STEP = 1 / 512
COARSE_CUT_DB, COARSE_OTHER_DB = 12.0, 24.0  # below the speech level, the two frames beside a silence: louder side, other side
MIN_COARSE_S = 0.03

# Pops beside a silence belong to it
MAX_POP_SAMPLES, POP_CONTEXT_S, POP_RATIO, POP_STEP = 3, 0.002, 2.5, 0.05  # a step of so many times those in the audio beside it

# Clipping
CLIP_FRAMES = 4
CLIP_LEVEL, CLIP_NEAR, CLIP_DENSITY = 0.6, 0.9, 0.35
SHORT_CLIP_DENSITY = 0.6  # for bursts shorter than three frames
MIN_CLIPPED_S, CLIP_MERGE_S = 0.016, 0.03

Span = tuple[int, int]  # [start, end)


@dataclasses.dataclass(frozen=True)
class DetectedGap:
    """One gap: samples [start, end) at the clip's own rate, and its kind: 'silence', 'packets', 'repeat' or 'clipped'."""

    start: int
    end: int
    kind: str


def detect_gaps(samples: np.ndarray, rate: int) -> list[DetectedGap]:
    """Gaps of samples (N, C) at rate Hz, in order of time and disjoint."""
    detector, size = GapDetector(rate), 30 * rate
    gaps = [gap for start in range(0, len(samples), size) for gap in detector.feed(samples[start : start + size])]
    return gaps + detector.end()


class GapDetector:
    """Streaming form of `detect_gaps` in constant memory.

    `feed` returns the gaps that are final so far, at most about a minute late; `end` returns the rest.
    """

    def __init__(self, rate: int):
        self._rate, self._frame = rate, max(1, round(rate * FRAME_S))
        self._chunk, self._margin = CHUNK_FRAMES * self._frame, MARGIN_FRAMES * self._frame
        self._blocks: list[np.ndarray] = []
        self._first = self._buffered = self._done = 0  # samples: start of the buffer, its length, end of the analysed part
        merge_s = {"constant": 0.0, "quiet": 0.0, "repeat": HOP_S, "clipped": CLIP_MERGE_S}
        self._spans = {kind: _SpanMerger(round(seconds * rate)) for kind, seconds in merge_s.items()}
        self._levels, self._first_level = np.zeros(0, np.float32), 0  # of frames, and the number of the first one
        self._step = np.inf  # smallest step between two samples so far
        self._silences: dict[str, list[Span]] = {"constant": [], "quiet": []}
        self._pending: list[DetectedGap] = []
        self._returned: list[DetectedGap] = []

    def feed(self, block: np.ndarray) -> list[DetectedGap]:
        """Appends a block of samples (n, C) and returns the gaps that are final now."""
        block = np.clip(block, -MAX_SAMPLE, MAX_SAMPLE).astype(np.float32)
        self._blocks.append(block.reshape(len(block), -1))
        self._buffered += len(block)
        gaps = []
        while self._first + self._buffered >= self._done + self._chunk + self._margin:
            gaps += self._analyse_until(self._done + self._chunk)
        return gaps

    def end(self) -> list[DetectedGap]:
        """Marks the end of the audio and returns the remaining gaps."""
        end, gaps = self._first + self._buffered, []
        while self._done < end:
            gaps += self._analyse_until(min(end, self._done + self._chunk), at_end=end <= self._done + self._chunk)
        return gaps

    def _analyse_until(self, stop: int, at_end: bool = False) -> list[DetectedGap]:
        buffer = self._blocks[0] if len(self._blocks) == 1 else np.concatenate(self._blocks)
        view = buffer[: stop + self._margin - self._first]
        self._step = min(self._step, smallest_step(view))
        levels, spans = find_spans(view, self._rate, self._frame, self._done - self._first, stop - self._first)
        self._levels = np.concatenate([self._levels, levels])
        limit = np.inf if at_end else stop - self._margin
        closed = {kind: self._spans[kind].add(spans[kind], self._first, limit) for kind in self._spans}
        for kind, shortest in (("constant", MIN_CONSTANT_S), ("quiet", MIN_QUIET_S)):
            self._silences[kind] += [(a, b) for a, b in closed[kind] if b - a >= shortest * self._rate]
        for kind, shortest in (("repeat", MIN_REPEAT_S), ("clipped", MIN_CLIPPED_S)):
            self._pending += [DetectedGap(a, b, kind) for a, b in closed[kind] if b - a >= shortest * self._rate]
        self._done, kept = stop, max(0, stop - self._margin)
        self._blocks, self._buffered, self._first = [buffer[kept - self._first :]], self._first + len(buffer) - kept, kept
        return self._classify_silences(stop, at_end)

    def _classify_silences(self, stop: int, at_end: bool) -> list[DetectedGap]:
        horizon = np.inf if at_end else self._horizon(stop)
        ready = {kind: [s for s in spans if s[1] <= horizon] for kind, spans in self._silences.items()}
        self._silences = {kind: [s for s in spans if s[1] > horizon] for kind, spans in self._silences.items()}
        for start, end in _best_edges(ready["constant"], ready["quiet"]):
            gap = self._classify_silence(start, end, stop if at_end else None)
            self._pending += [gap] if gap else []
        gaps = self._pop_final(horizon - (CONTEXT_S + PACKET_DISTANCE_S) * self._rate)
        waiting = [a for spans in self._silences.values() for a, b in spans if b - a <= MAX_GAP_S * self._rate]
        keep = int(min([horizon, stop, *waiting]) - (CONTEXT_S + 1) * self._rate) // self._frame
        if keep > self._first_level:
            self._levels, self._first_level = self._levels[keep - self._first_level :], keep
        return gaps

    def _horizon(self, stop: int) -> float:
        """Sample up to which silences can be classified: their context is complete and none of them is still open."""
        oldest = stop - (MAX_GAP_S + CONTEXT_S) * self._rate
        open_from = [s for kind in ("constant", "quiet") for s in self._spans[kind].starts() if s > oldest]
        return min([stop - CONTEXT_S * self._rate, *open_from])

    def _classify_silence(self, start: int, end: int, clip_end: int | None) -> DetectedGap | None:
        if end - start > MAX_GAP_S * self._rate:
            return None
        offset, context = self._first_level * self._frame, round(CONTEXT_S * self._rate)
        at_ends = start <= SMEAR_S * self._rate, clip_end is not None and end >= clip_end - SMEAR_S * self._rate
        around = self._levels[max(0, start - offset - context) // self._frame : (end - offset + context) // self._frame]
        from_frame = self._first_level + max(0, start - offset - context) // self._frame
        is_coarse = COARSE_STEP <= self._step < np.inf
        edges = silence_gap_edges(around, start / self._frame - from_frame, end / self._frame - from_frame, at_ends, is_coarse)
        if edges is None:
            return None
        first, last = edges
        return DetectedGap(max(0, start - first * self._frame), end + last * self._frame, "silence")

    def _pop_final(self, horizon: float) -> list[DetectedGap]:
        """Removes and returns the pending gaps that end before the horizon: adjacent ones merged, lost packets named so."""
        merged = _merge_gaps(sorted(self._pending, key=lambda g: (g.start, g.end)), round(MERGE_S * self._rate))
        final = [g for g in merged if g.end < horizon]
        self._pending = [g for g in merged if g.end >= horizon]
        named = self._name_lost_packets(final, merged)
        recent = [g for g in [*self._returned, *named] if g.end > horizon - (PACKET_DISTANCE_S + MAX_PACKET_S) * self._rate]
        self._returned = recent if np.isfinite(horizon) else []
        return named

    def _name_lost_packets(self, gaps: list[DetectedGap], candidates: list[DetectedGap]) -> list[DetectedGap]:
        """The gaps, those of lost packets with the kind 'packets'. candidates: gaps that may be the other packet."""
        near, longest = PACKET_DISTANCE_S * self._rate, MAX_PACKET_S * self._rate
        short = [g for g in [*self._returned, *candidates] if g.kind in ("silence", "packets") and g.end - g.start <= longest]
        named = []
        for gap in gaps:
            others = [s for s in short if s.start != gap.start and s.start - near < gap.start < s.start + near]
            named.append(dataclasses.replace(gap, kind="packets") if gap in short and others else gap)
        return named


class _SpanMerger:
    """Collects spans [start, end) chunk by chunk and merges those at most `distance` samples apart."""

    def __init__(self, distance: int):
        self._distance, self._open = distance, []

    def add(self, spans: Iterable[Span], offset: int, limit: float) -> list[Span]:
        """Adds spans, relative to offset, and returns those that nothing after `limit` can be merged with."""
        merged: list[Span] = []
        for start, end in sorted([*self._open, *((a + offset, b + offset) for a, b in spans)]):
            if merged and start <= merged[-1][1] + self._distance:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self._open = [s for s in merged if s[1] + self._distance >= limit]
        return [s for s in merged if s[1] + self._distance < limit]

    def starts(self) -> list[int]:
        return [start for start, _ in self._open]


def _merge_gaps(gaps: list[DetectedGap], distance: int) -> list[DetectedGap]:
    """Merges gaps at most `distance` samples apart; the longer one gives the kind."""
    merged: list[DetectedGap] = []
    for gap in gaps:
        last = merged[-1] if merged else None
        if last and gap.start <= last.end + distance:
            kind = max((last, gap), key=lambda g: g.end - g.start).kind
            merged[-1] = DetectedGap(last.start, max(last.end, gap.end), kind)
        else:
            merged.append(gap)
    return merged


def _best_edges(constant: list[Span], quiet: list[Span]) -> list[Span]:
    """Every silence once: a quiet one that is mostly constant takes the edges of its constant part."""
    silences, used = [], set()
    for start, end in quiet:
        within = [s for s in constant if s[0] < end and s[1] > start]
        used |= set(within)
        share = sum(b - a for a, b in within) / (end - start)
        silences.append((within[0][0], within[-1][1]) if share > 0.5 else (start, end))
    return sorted(silences + [s for s in constant if s not in used])


def silence_gap_edges(
    levels: np.ndarray, start: float, end: float, at_ends: tuple[bool, bool], is_coarse: bool = False
) -> tuple[int, int] | None:
    """Decides whether a silence is a gap, by the rules of the module docstring.

    levels (F,) dB of the frames around it, [start, end) its position in these frames, at_ends: whether it touches the start or the
    end of the clip, is_coarse: whether the audio is coarsely quantised. Returns the number of frames by which its edges move
    outwards, or None for a pause.
    """
    first, last = int(np.floor(start)), int(np.ceil(end))
    inside = np.median(levels[int(np.ceil(start)) : int(end)]) if int(end) > np.ceil(start) else FLOOR_DB
    sides = (levels[:first][::-1], levels[last:])
    edge = [0 if at_end else _smeared_frames(side) for side, at_end in zip(sides, at_ends, strict=True)]
    beside = [side[n:] for side, n, at_end in zip(sides, edge, at_ends, strict=True) if not at_end and len(side) > n]
    active = levels[levels > inside + DROP_DB]
    if not beside or len(active) == 0:
        return None
    before, after = round(CUT_BEFORE_S / FRAME_S), round(CUT_AFTER_S / FRAME_S)
    adjacent = max(side[:before].max() for side in beside)
    speech = np.percentile(active, 95)
    if any(at_ends):
        is_gap = last - first >= MIN_END_S / FRAME_S and beside[0][:2].max() > speech - END_CUT_DB
    elif is_coarse:
        sides_db = [side[:2].max() - speech for side in beside]
        is_gap = last - first >= MIN_COARSE_S / FRAME_S and max(sides_db) > -COARSE_CUT_DB and min(sides_db) > -COARSE_OTHER_DB
    else:
        cut = beside[0][:before].max() > speech - CUT_DB or beside[-1][:after].max() > speech - CUT_DB
        is_gap = cut or _interrupts_noise(levels, last - first, inside + DROP_DB, adjacent + NOISE_DB)
    quantum = levels[levels > FLOOR_DB].min()
    return tuple(edge) if is_gap and adjacent > max(inside + DROP_DB, quantum + 12) else None


def _smeared_frames(side: np.ndarray) -> int:
    """Number of frames, outwards from an edge, that contain only what lossy coding smeared into the gap."""
    longest = round(SMEAR_S / FRAME_S)
    if len(side) == 0:
        return 0
    loud = side[: 2 * longest].max()
    above = np.flatnonzero(side[:longest] > min(loud - SMEAR_DB, QUIET_DB + 10))
    return int(above[0]) if len(above) else 0


def _interrupts_noise(levels: np.ndarray, num_frames: int, lowest: float, highest: float) -> bool:
    """Whether a silence of num_frames can hide a word, and noise between the two levels lasts longer than it elsewhere."""
    longest = max((j - i for i, j in true_runs((levels > lowest) & (levels < highest))), default=0)
    return num_frames >= WORD_S / FRAME_S and longest >= max(num_frames, NOISE_S / FRAME_S)


def find_spans(view: np.ndarray, rate: int, frame: int, a: int, b: int) -> tuple[np.ndarray, dict[str, list[Span]]]:
    """Analyses samples [a, b) of view (n, C): levels (F,) dB of their frames, and candidate spans by kind, in samples of view."""
    planes = np.ascontiguousarray(view[a:b].T)  # four times faster to process
    levels = frame_levels(planes, frame)
    quiet = [(a + i * frame, min(a + j * frame, b)) for i, j in true_runs(levels < QUIET_DB)]
    constant = [with_pops(view, i, j, rate) if a < i and j < b else (i, j) for i, j in constant_runs(view, a, b, rate)]
    spans = {"quiet": quiet, "constant": constant, "clipped": clipped_runs(planes, a, b, frame)}
    return levels, spans | {"repeat": find_repeats(view, a, b, rate)}


def true_runs(flags: np.ndarray) -> list[Span]:
    """Runs [start, end) of true values in (n,) bool."""
    edges = np.flatnonzero(np.diff(np.r_[False, flags, False].astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def frame_levels(planes: np.ndarray, frame: int) -> np.ndarray:
    """(C, n) samples -> (F,) dB: half the peak-to-peak range of the loudest channel; the last frame may be incomplete."""
    parts = np.pad(planes, ((0, 0), (0, -planes.shape[1] % frame)), mode="edge").reshape(len(planes), -1, frame)
    range_ = (parts.max(2) - parts.min(2)).max(0)
    return (20 * np.log10(np.maximum(range_ / 2, 10 ** (FLOOR_DB / 20)))).astype(np.float32)


def constant_runs(view: np.ndarray, a: int, b: int, rate: int) -> list[Span]:
    """Runs in which all channels keep one value. Runs at the borders of [a, b) may be short: the next chunk can continue them."""
    before = max(a - 1, 0)
    same = (view[before : b - 1] == view[before + 1 : b]).all(1)
    spans = [(i + before, j + before + 1) for i, j in true_runs(same)]
    return [(i, j) for i, j in spans if j - i >= MIN_CONSTANT_S * rate or i <= a or j >= b]


def with_pops(view: np.ndarray, start: int, end: int, rate: int) -> Span:
    """A run [start, end) with the pops beside it: up to MAX_POP_SAMPLES that jump out of the audio of (n, C)."""
    reach = MAX_POP_SAMPLES + round(POP_CONTEXT_S * rate)
    before, after = view[max(0, start - reach) : start][::-1], view[end : end + reach]
    return start - _pop_samples(before, view[start]), end + _pop_samples(after, view[start])


def _pop_samples(beside: np.ndarray, constant: np.ndarray) -> int:
    """How many of the samples (n, C), outwards from the edge of a run of one value, are a pop; 0 if none."""
    steps = np.abs(np.diff(beside, axis=0))
    for count in range(1, min(MAX_POP_SAMPLES, len(steps) - MAX_POP_SAMPLES) + 1):
        usual = np.maximum(POP_RATIO * steps[count:].max(0), POP_STEP)
        if (np.minimum(steps[count - 1], np.abs(beside[:count] - constant).min(0)) > usual).any():
            return count
    return 0


def clipped_runs(planes: np.ndarray, a: int, b: int, frame: int) -> list[Span]:
    """Spans, CLIP_FRAMES frames at a time, in which any channel stays near its local peak for much of the time."""
    size, spans = CLIP_FRAMES * frame, []
    for channel in np.abs(planes):
        parts = np.pad(channel, (0, -len(channel) % size)).reshape(-1, size)
        peak = np.pad(parts.max(1), 1, mode="edge")
        near = np.maximum(np.maximum(peak[:-2], peak[2:]), peak[1:-1])
        loud = np.flatnonzero(near > CLIP_LEVEL)
        dense = np.zeros(len(near))
        dense[loud] = (parts[loud] >= CLIP_NEAR * near[loud, None]).mean(1)
        bursts = [(i, j) for i, j in true_runs(dense > CLIP_DENSITY) if j - i > 2 or dense[i:j].max() > SHORT_CLIP_DENSITY]
        spans += [(a + i * size, min(a + j * size, b)) for i, j in bursts]
    return spans
