"""Plans the windows through which the gaps of a clip are restored. Plans only: no audio is read here.

All positions are samples at presets.RECORD_RATE. A network reads a window of fixed length. Gaps that are close together share one
window, centred on them. A gap that would leave too little known audio in a window is restored by several windows in turn: each
window begins with audio that is known or already restored; its last OVERLAP samples are predicted again by the next window, and the
two predictions are cross-faded. The windows proceed from the side of the gap where there is audio.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

OVERLAP = 6400  # 0.4 s that two consecutive windows of a long gap both predict
MAX_MISSING_SHARE = 0.8  # of a window: the most that training removes (gap_masks.MAX_SHARE)
MAX_SHARED_SPAN = 0.6  # of a window: the longest span of gaps that share it
MIN_KNOWN = 1600  # 0.1 s: with less audio than this before a long gap, the windows start at its end instead


class Window(NamedTuple):
    """A window that begins at sample `first` and restores [start, end)."""

    first: int
    start: int
    end: int


class Plan(NamedTuple):
    """The windows that restore a group of gaps, in the order in which they are run.

    gaps: the indices of the gaps. backwards: the windows run from the last to the first in time.
    """

    gaps: range
    windows: tuple[Window, ...]
    backwards: bool


def plan(gaps: np.ndarray, size: int, length: int, hop: int) -> list[Plan]:
    """Plans for all gaps of a clip, in their order.

    gaps: (G, 2) [start, end), sorted. size: samples of a window. length: samples of the clip. The windows of a long gap are whole
    multiples of `hop` (samples between STFT frames) apart, so that their frames coincide.
    """
    return [_plan_group(group, gaps, size, length, hop) for group in _groups(gaps, size, length)]


def _groups(gaps: np.ndarray, size: int, length: int) -> list[range]:
    """Gaps that share a window: all gaps of a clip that fits into one, else those that span at most MAX_SHARED_SPAN of it."""
    limit = size if length <= size else MAX_SHARED_SPAN * size
    groups: list[range] = []
    for i, (_, end) in enumerate(gaps):
        if groups and end - gaps[groups[-1].start][0] <= limit:
            groups[-1] = range(groups[-1].start, i + 1)
        else:
            groups.append(range(i, i + 1))
    return groups


def _plan_group(group: range, gaps: np.ndarray, size: int, length: int, hop: int) -> Plan:
    start, end = int(gaps[group.start][0]), int(gaps[group.stop - 1][1])
    if length <= size or end - start <= MAX_MISSING_SHARE * size:
        first = int(np.clip((start + end) // 2 - size // 2, 0, max(0, length - size)))
        return Plan(group, (Window(first, start, end),), False)
    if start >= MIN_KNOWN or start >= length - end:
        return Plan(group, tuple(_consecutive_windows(start, end, size, length, hop)), False)
    mirrored = _consecutive_windows(length - end, length - start, size, length, hop)
    return Plan(group, tuple(Window(length - w.first - size, length - w.end, length - w.start) for w in mirrored), True)


def _consecutive_windows(start: int, end: int, size: int, length: int, hop: int) -> Iterator[Window]:
    """Windows through one long gap, from its start onwards."""
    known = round((1 - MAX_MISSING_SHARE) * size)  # samples of a window that must be known before the gap, and after the last one
    begin, first, origin = start, max(0, start - known), max(0, start - known)
    last = max(origin, min(end + known, length) - size)  # a window that begins here includes the audio after the gap
    last += (origin - last) % hop
    while True:
        stop = min(end, first + size)
        yield Window(first, begin, stop)
        if stop == end:
            return
        begin = stop - OVERLAP
        first = min(begin - known - (begin - known - origin) % hop, last)


def merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals (start, end), in any unit and order, as sorted intervals that do not overlap."""
    result: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def without(interval: tuple[float, float], covered: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The parts of an interval (start, end) that no interval of `covered` contains, sorted."""
    rest, (position, end) = [], interval
    for a, b in merged(covered):
        if b > position and a < end:
            if a > position:
                rest.append((position, a))
            position = max(position, b)
    return [*rest, (position, end)] if position < end else rest
