"""Finds the holes of a sound that nobody pointed at: digital silence, lost packets, packets played again, clipped bursts.

Positions are samples of the clip's own rate, levels dB of full scale (half of peak to peak of 2 ms, the loudest channel's). What
is sought is lost in all channels that sound at all; one that is always silent is passed over. A silence is a hole where it cuts
speech off: it begins right after a level that no gate closes at, or ends right before one that none opens at. A gate fills pauses
with such silence, so between two sides at rest nothing is known to be lost; one as long as a word is told there only if noise like
that beside it is heard elsewhere for longer than gates hold. Copies are found by audio/repeat_detection.py. Not done here: noise, clicks, dropped
samples, and holes longer than LONGEST_S, which nothing could fill.

The sound is looked at in chunks of a fixed grid with a margin either side, so what is found is the same however it is fed.
Thresholds were chosen on one half of the Grid clips, measured on the other: benchmarks/quality/gap_detection.py, docs/holes.md.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from avsi_jax.audio.repeat_detection import HOP_S, REPEAT_S, repeats

FRAME_S = 0.002
CHUNK_FRAMES = 2000
MARGIN_FRAMES = 100  # more than two of the longest packets
CONTEXT_S = 10.0  # what a silence is judged by, before and after
LONGEST_S = 30.0
LONGEST_PACKET_S, NEAR_PACKETS_S = 0.085, 2.0
MERGE_S = 0.012
FLOOR_DB = -120.0
LOUDEST = 1e6  # what is louder is cut off: squares of it overflow

# Silence
CONSTANT_S = 0.008  # so long the same value
QUIET_DB, QUIET_S = -66.0, 0.012  # what is left of a hole after coding
DROP_DB = 15.0  # a hole's inside below its edges
CUT_DB = 20.0  # of drawn gates' silences 96 of 100 close and open further below speech; what is within it was cut off
CUT_S, OPEN_S = 0.016, 0.008  # looked at before and after: a gate holds on after a word, and may open only on its first sound
END_CUT_DB, END_S = 8.0, 0.03  # at the ends of a clip, where digital silence is common
NOISE_S, NOISE_DB = 0.4, 8.0  # so long at the edges' level, or up to so much above: longer than a gate holds, so it is none
WORD_S = 0.15  # what lies in noise on either side may hide so much, the shortest word
SMEAR_S, SMEAR_DB = 0.03, 20.0  # edges move outwards so far at most, while so much below what follows

# Clipped
CLIP_FRAMES = 4
CLIP_LEVEL, CLIP_NEAR, CLIP_DENSITY = 0.6, 0.9, 0.35
SHORT_DENSITY = 0.6  # of bursts shorter than three frames
CLIP_S, CLIP_MERGE_S = 0.016, 0.03


@dataclasses.dataclass(frozen=True)
class DetectedGap:
    start: int  # samples [start, end) of the clip's own rate
    end: int
    kind: str  # 'silence' | 'packets' | 'repeat' | 'clipped'


def detect_gaps(samples: np.ndarray, rate: int) -> list[DetectedGap]:
    """samples (N, C) at rate Hz -> holes in order, apart from each other."""
    finder, size = GapDetector(rate), 30 * rate
    found = [gap for start in range(0, len(samples), size) for gap in finder.feed(samples[start : start + size])]
    return found + finder.end()


class GapDetector:
    """The same in pieces, in constant memory: `feed` tells the holes certain by then, up to a minute late; `end` the rest."""

    def __init__(self, rate: int):
        self._rate, self._frame = rate, max(1, round(rate * FRAME_S))
        self._chunk, self._margin = CHUNK_FRAMES * self._frame, MARGIN_FRAMES * self._frame
        self._pieces: list[np.ndarray] = []
        self._first = self._held = self._done = 0  # samples: where the pieces start, how many they are, up to where looked at
        gaps = {"constant": 0.0, "quiet": 0.0, "repeat": HOP_S, "clipped": CLIP_MERGE_S}
        self._spans = {kind: _Spans(round(gap * rate)) for kind, gap in gaps.items()}
        self._levels, self._levels_from = np.zeros(0, np.float32), 0  # of frames, from that frame on
        self._silent: dict[str, list] = {"constant": [], "quiet": []}
        self._found: list[DetectedGap] = []
        self._told: list[DetectedGap] = []

    def feed(self, block: np.ndarray) -> list[DetectedGap]:
        """block (n, C), what follows the blocks before."""
        block = np.clip(block, -LOUDEST, LOUDEST).astype(np.float32)
        self._pieces.append(block.reshape(len(block), -1))
        self._held += len(block)
        finished = []
        while self._first + self._held >= self._done + self._chunk + self._margin:
            finished += self._step(self._done + self._chunk)
        return finished

    def end(self) -> list[DetectedGap]:
        """What is left, once the sound is over."""
        end, finished = self._first + self._held, []
        while self._done < end:
            finished += self._step(min(end, self._done + self._chunk), over=end <= self._done + self._chunk)
        return finished

    def _step(self, stop: int, over: bool = False) -> list[DetectedGap]:
        held = self._pieces[0] if len(self._pieces) == 1 else np.concatenate(self._pieces)
        view = held[: stop + self._margin - self._first]
        levels, spans = look(view, self._rate, self._frame, self._done - self._first, stop - self._first)
        self._levels = np.concatenate([self._levels, levels])
        limit = np.inf if over else stop - self._margin
        closed = {kind: self._spans[kind].add(spans[kind], self._first, limit) for kind in self._spans}
        for kind, shortest in (("constant", CONSTANT_S), ("quiet", QUIET_S)):
            self._silent[kind] += [(a, b) for a, b in closed[kind] if b - a >= shortest * self._rate]
        for kind, shortest in (("repeat", REPEAT_S), ("clipped", CLIP_S)):
            self._found += [DetectedGap(a, b, kind) for a, b in closed[kind] if b - a >= shortest * self._rate]
        self._done, kept = stop, max(0, stop - self._margin)
        self._pieces, self._held, self._first = [held[kept - self._first :]], self._first + len(held) - kept, kept
        return self._decide(stop, over)

    def _decide(self, stop: int, over: bool) -> list[DetectedGap]:
        horizon = np.inf if over else self._horizon(stop)
        ready = {kind: [s for s in spans if s[1] <= horizon] for kind, spans in self._silent.items()}
        self._silent = {kind: [s for s in spans if s[1] > horizon] for kind, spans in self._silent.items()}
        for start, end in _best_edges(ready["constant"], ready["quiet"]):
            gap = self._judge(start, end, stop if over else None)
            self._found += [gap] if gap else []
        told = self._tell(horizon - (CONTEXT_S + NEAR_PACKETS_S) * self._rate)
        waiting = [a for spans in self._silent.values() for a, b in spans if b - a <= LONGEST_S * self._rate]
        keep = int(min([horizon, stop, *waiting]) - (CONTEXT_S + 1) * self._rate) // self._frame
        if keep > self._levels_from:
            self._levels, self._levels_from = self._levels[keep - self._levels_from :], keep
        return told

    def _horizon(self, stop: int) -> float:
        """Up to where silences can be judged: enough is known after them, and none there is still going on."""
        oldest = stop - (LONGEST_S + CONTEXT_S) * self._rate
        open_from = [s for kind in ("constant", "quiet") for s in self._spans[kind].starts() if s > oldest]
        return min([stop - CONTEXT_S * self._rate, *open_from])

    def _judge(self, start: int, end: int, over_at: int | None) -> DetectedGap | None:
        if end - start > LONGEST_S * self._rate:
            return None
        offset, context = self._levels_from * self._frame, round(CONTEXT_S * self._rate)
        at_ends = start <= SMEAR_S * self._rate, over_at is not None and end >= over_at - SMEAR_S * self._rate
        around = self._levels[max(0, start - offset - context) // self._frame : (end - offset + context) // self._frame]
        from_frame = self._levels_from + max(0, start - offset - context) // self._frame
        edges = silence_is_lost(around, start / self._frame - from_frame, end / self._frame - from_frame, at_ends)
        if edges is None:
            return None
        first, last = edges
        return DetectedGap(max(0, start - first * self._frame), end + last * self._frame, "silence")

    def _tell(self, horizon: float) -> list[DetectedGap]:
        """Those of the found that end before the horizon, joined where they touch, lost packets named so."""
        joined = _joined(sorted(self._found, key=lambda h: (h.start, h.end)), round(MERGE_S * self._rate))
        done = [h for h in joined if h.end < horizon]
        self._found = [h for h in joined if h.end >= horizon]
        near, longest = NEAR_PACKETS_S * self._rate, LONGEST_PACKET_S * self._rate
        short = [h for h in [*self._told, *joined] if h.kind in ("silence", "packets") and h.end - h.start <= longest]
        named = []
        for h in done:
            others = [s for s in short if s.start != h.start and s.start - near < h.start < s.start + near]
            named.append(dataclasses.replace(h, kind="packets") if h in short and others else h)
        self._told = [h for h in [*self._told, *named] if h.end > horizon - near - longest] if np.isfinite(horizon) else []
        return named


class _Spans:
    """Spans [start, end) found chunk by chunk, joined where not more than `gap` lies between them."""

    def __init__(self, gap: int):
        self._gap, self._open = gap, []

    def add(self, spans, offset: int, limit: float) -> list[tuple[int, int]]:
        """spans relative to offset; returns those that nothing can be joined to any more."""
        joined: list[tuple[int, int]] = []
        for start, end in sorted([*self._open, *((a + offset, b + offset) for a, b in spans)]):
            if joined and start <= joined[-1][1] + self._gap:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        self._open = [s for s in joined if s[1] + self._gap >= limit]
        return [s for s in joined if s[1] + self._gap < limit]

    def starts(self) -> list[int]:
        return [start for start, _ in self._open]


def _joined(found: list[DetectedGap], gap: int) -> list[DetectedGap]:
    """Holes that touch as one, of the kind that is longest."""
    joined: list[DetectedGap] = []
    for gap_mask in found:
        last = joined[-1] if joined else None
        if last and gap_mask.start <= last.end + gap:
            kind = max((last, gap_mask), key=lambda h: h.end - h.start).kind
            joined[-1] = DetectedGap(last.start, max(last.end, gap_mask.end), kind)
        else:
            joined.append(gap_mask)
    return joined


def _best_edges(constant, quiet) -> list[tuple[int, int]]:
    """Silences, each once: where most of a quiet one is constant, its edges are those of the constant part."""
    silences, used = [], set()
    for start, end in quiet:
        within = [s for s in constant if s[0] < end and s[1] > start]
        used |= set(within)
        share = sum(b - a for a, b in within) / (end - start)
        silences.append((within[0][0], within[-1][1]) if share > 0.5 else (start, end))
    return sorted(silences + [s for s in constant if s not in used])


def silence_is_lost(levels: np.ndarray, start: float, end: float, at_ends: tuple[bool, bool]) -> tuple[int, int] | None:
    """levels dB of frames around, [start, end) in frames, whether it lies at the clip's ends -> frames its edges move outwards by;
    None where it is a pause. What it goes by is told at the head of this file."""
    first, last = int(np.floor(start)), int(np.ceil(end))
    inside = np.median(levels[int(np.ceil(start)) : int(end)]) if int(end) > np.ceil(start) else FLOOR_DB
    sides = (levels[:first][::-1], levels[last:])
    edge = [0 if at_end else _smeared(side) for side, at_end in zip(sides, at_ends, strict=True)]
    beside = [side[n:] for side, n, at_end in zip(sides, edge, at_ends, strict=True) if not at_end and len(side) > n]
    sounding = levels[levels > inside + DROP_DB]
    if not beside or len(sounding) == 0:
        return None
    near, opening = round(CUT_S / FRAME_S), round(OPEN_S / FRAME_S)
    adjacent = max(side[:near].max() for side in beside)
    speech = np.percentile(sounding, 95)
    if any(at_ends):
        missing = last - first >= END_S / FRAME_S and beside[0][:2].max() > speech - END_CUT_DB
    else:
        cut = beside[0][:near].max() > speech - CUT_DB or beside[-1][:opening].max() > speech - CUT_DB
        missing = cut or _is_missed_in_noise(levels, last - first, inside + DROP_DB, adjacent + NOISE_DB)
    quantum = levels[levels > FLOOR_DB].min()
    return tuple(edge) if missing and adjacent > max(inside + DROP_DB, quantum + 12) else None


def _smeared(side: np.ndarray) -> int:
    """Frames outwards from an edge that coding filled with a little of what was beside: far below what follows."""
    longest = round(SMEAR_S / FRAME_S)
    if len(side) == 0:
        return 0
    loud = side[: 2 * longest].max()
    above = np.flatnonzero(side[:longest] > min(loud - SMEAR_DB, QUIET_DB + 10))
    return int(above[0]) if len(above) else 0


def _is_missed_in_noise(levels: np.ndarray, num: int, lowest: float, highest: float) -> bool:
    """Whether num frames of silence between noise may hide a word, and the noise is heard elsewhere for longer than them."""
    longest = max((j - i for i, j in runs((levels > lowest) & (levels < highest))), default=0)
    return num >= WORD_S / FRAME_S and longest >= max(num, NOISE_S / FRAME_S)


def look(view: np.ndarray, rate: int, frame: int, a: int, b: int) -> tuple[np.ndarray, dict[str, list[tuple[int, int]]]]:
    """view (n, C), samples [a, b) of it -> levels dB of its frames; spans of what may be a hole, in samples of the view."""
    planes = np.ascontiguousarray(view[a:b].T)  # four times faster to look through
    levels = frame_levels(planes, frame)
    quiet = [(a + i * frame, min(a + j * frame, b)) for i, j in runs(levels < QUIET_DB)]
    spans = {"quiet": quiet, "constant": constant_runs(view, a, b, rate), "clipped": clipped_runs(planes, a, b, frame)}
    return levels, spans | {"repeat": repeats(view, a, b, rate)}


def runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """(n,) bool -> [start, end) of what is true."""
    edges = np.flatnonzero(np.diff(np.r_[False, flags, False].astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def frame_levels(planes: np.ndarray, frame: int) -> np.ndarray:
    """(C, n) -> (F,) dB: half of peak to peak, the loudest channel's; the last frame may be part of one."""
    parts = np.pad(planes, ((0, 0), (0, -planes.shape[1] % frame)), mode="edge").reshape(len(planes), -1, frame)
    range_ = (parts.max(2) - parts.min(2)).max(0)
    return (20 * np.log10(np.maximum(range_ / 2, 10 ** (FLOOR_DB / 20)))).astype(np.float32)


def constant_runs(view, a, b, rate) -> list[tuple[int, int]]:
    """Runs of one value in all channels, those at the borders however short: a chunk's neighbour may go on with them."""
    before = max(a - 1, 0)
    same = (view[before : b - 1] == view[before + 1 : b]).all(1)
    found = [(i + before, j + before + 1) for i, j in runs(same)]
    return [(i, j) for i, j in found if j - i >= CONSTANT_S * rate or i <= a or j >= b]


def clipped_runs(planes, a, b, frame) -> list[tuple[int, int]]:
    """Stretches in which any channel is near its own highest for much of the time: frames of CLIP_FRAMES."""
    size, spans = CLIP_FRAMES * frame, []
    for channel in np.abs(planes):
        parts = np.pad(channel, (0, -len(channel) % size)).reshape(-1, size)
        peak = np.pad(parts.max(1), 1, mode="edge")
        near = np.maximum(np.maximum(peak[:-2], peak[2:]), peak[1:-1])
        loud = np.flatnonzero(near > CLIP_LEVEL)
        dense = np.zeros(len(near))
        dense[loud] = (parts[loud] >= CLIP_NEAR * near[loud, None]).mean(1)
        found = [(i, j) for i, j in runs(dense > CLIP_DENSITY) if j - i > 2 or dense[i:j].max() > SHORT_DENSITY]
        spans += [(a + i * size, min(a + j * size, b)) for i, j in found]
    return spans
