"""Which windows a repair looks through: plans only, no sound. Numbers are record samples (presets.RECORD_RATE) but where it is said.

A network sees one length of sound, the window. Gaps that lie close together share one, around their middle. A gap that would
leave a window too little to go by is filled step by step: each window begins with what is known or filled already, its last
OVERLAP is predicted once more by the next one, and predictions are cross-faded there. It goes on from the side where sound is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

OVERLAP = 6400  # 0.4 s that two windows of a long gap both predict
MOST_MISSING = 0.8  # of a window: what training takes away at most (gap_masks.MAX_SHARE)
SHARED = 0.6  # of a window that gaps may span to share it
LEAST_KNOWN = 1600  # 0.1 s of sound before a long gap, to begin there rather than behind it


class Step(NamedTuple):
    """A window from sample `first` that fills [start, end)."""

    first: int
    start: int
    end: int


class Plan(NamedTuple):
    """Windows to go through in this order, and the numbers of the gaps they fill between them."""

    gaps: range
    steps: tuple[Step, ...]
    backwards: bool  # from the last window to the first in time


def plan(missing: np.ndarray, size: int, length: int, hop: int) -> list[Plan]:
    """Gaps (G, 2), sorted, of a sound of `length`, and windows of `size` -> what to do, in the order of the gaps.

    The windows of a long gap lie whole `hop`s (samples from frame to frame) from each other, so that their frames meet.
    """
    return [_plan_of(group, missing, size, length, hop) for group in _groups(missing, size, length)]


def _groups(missing, size: int, length: int) -> list[range]:
    """Gaps that share a window: all of a clip that fits into one, else those that span no more than SHARED of it."""
    most = size if length <= size else SHARED * size
    groups: list[range] = []
    for i, (_, end) in enumerate(missing):
        if groups and end - missing[groups[-1].start][0] <= most:
            groups[-1] = range(groups[-1].start, i + 1)
        else:
            groups.append(range(i, i + 1))
    return groups


def _plan_of(group: range, missing, size: int, length: int, hop: int) -> Plan:
    start, end = int(missing[group.start][0]), int(missing[group.stop - 1][1])
    if length <= size or end - start <= MOST_MISSING * size:
        first = int(np.clip((start + end) // 2 - size // 2, 0, max(0, length - size)))
        return Plan(group, (Step(first, start, end),), False)
    if start >= LEAST_KNOWN or start >= length - end:
        return Plan(group, tuple(_steps(start, end, size, length, hop)), False)
    mirrored = _steps(length - end, length - start, size, length, hop)
    return Plan(group, tuple(Step(length - s.first - size, length - s.end, length - s.start) for s in mirrored), True)


def _steps(start: int, end: int, size: int, length: int, hop: int):
    """Windows through one long gap from its start on."""
    known = round((1 - MOST_MISSING) * size)  # samples of a window that are to be known before it goes on, and after the last one
    begin, first, origin = start, max(0, start - known), max(0, start - known)
    last = max(origin, min(end + known, length) - size)  # a window that begins here sees what follows the gap
    last += (origin - last) % hop
    while True:
        stop = min(end, first + size)
        yield Step(first, begin, stop)
        if stop == end:
            return
        begin = stop - OVERLAP
        first = min(begin - known - (begin - known - origin) % hop, last)


def merged(intervals) -> list[tuple[float, float]]:
    """(start, end) in any unit, in any order -> the same, without overlaps, sorted."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def without(interval: tuple[float, float], held) -> list[tuple[float, float]]:
    """What of an interval (start, end) lies in none of the others, sorted."""
    left, (at, end) = [], interval
    for a, b in merged(held):
        if b > at and a < end:
            if a > at:
                left.append((at, a))
            at = max(at, b)
    return [*left, (at, end)] if at < end else left
