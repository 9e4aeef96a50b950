"""The windows through which gaps are restored."""

import numpy as np
import pytest

from avsi_jax.inpainting import window_plan
from avsi_jax.inpainting.window_plan import Window

SIZE, HOP = 48_000, 160


def plan_of(gap, length, size=SIZE, hop=HOP):
    (plan,) = window_plan.plan(np.array([gap]), size, length, hop)
    return plan


def test_a_gap_is_in_the_middle_of_its_window():
    assert plan_of((60_000, 70_000), 160_000).windows == (Window(41_000, 60_000, 70_000),)
    assert plan_of((0, 5_000), 160_000).windows[0].first == 0
    assert plan_of((150_000, 160_000), 160_000).windows[0].first == 160_000 - SIZE
    assert plan_of((0, 30_000), 30_000).windows == (Window(0, 0, 30_000),)


def test_gaps_that_are_close_together_share_a_window():
    """Calculated by hand: spans of up to 28,800 samples."""
    gaps = np.array([[1_000, 2_000], [20_000, 28_000], [28_500, 29_000], [30_000, 31_000], [90_000, 95_000]])
    assert [list(p.gaps) for p in window_plan.plan(gaps, SIZE, 160_000, HOP)] == [[0, 1, 2], [3], [4]]
    assert [list(p.gaps) for p in window_plan.plan(gaps[:4], SIZE, 40_000, HOP)] == [[0, 1, 2, 3]]


def test_the_windows_of_any_gap_cover_it_and_overlap():
    """For 500 random gaps: all of the gap is covered and nothing else; each window includes known audio if there is any; the next
    window is whole frames away and predicts the last 0.4 s again."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        size, hop = rng.choice([47_648, 48_000]), rng.choice([160, 192, 320])
        length = int(rng.integers(1, 500_000))
        start = int(rng.integers(0, length))
        end = int(rng.integers(start + 1, length + 1))
        windows = plan_of((start, end), length, size, hop).windows
        covered = np.zeros(length, int)
        for window in windows:
            assert window.first <= window.start < window.end <= window.first + size
            assert -hop < window.first <= max(0, length - size) + hop
            covered[window.start : window.end] += 1
        assert covered[start:end].all() and covered.sum() >= end - start and not covered[:start].any() and not covered[end:].any()
        for a, b in zip(windows, windows[1:]):
            assert (b.first - a.first) % hop == 0
            assert min(a.end, b.end) - max(a.start, b.start) >= window_plan.OVERLAP
            known = b.start - b.first if b.first > a.first else b.first + size - b.end
            assert known >= 0.2 * size - 1, "too little of the audio restored before is read"


def test_a_long_gap_is_restored_from_the_side_with_known_audio():
    forwards, backwards = plan_of((16_000, 100_000), 160_000), plan_of((0, 100_000), 160_000)
    assert not forwards.backwards and forwards.windows[0].start == 16_000
    assert backwards.backwards and backwards.windows[0].end == 100_000 and backwards.windows[-1].start == 0
    assert not plan_of((0, 160_000), 160_000).backwards


@pytest.mark.parametrize(
    ("interval", "covered", "rest"),
    [
        ((0, 9), [], [(0, 9)]),
        ((0, 9), [(2, 3), (5, 12)], [(0, 2), (3, 5)]),
        ((3, 5), [(1, 4), (4, 6)], []),
        ((0, 1), [(1, 2)], [(0, 1)]),
    ],
)
def test_intervals_are_subtracted(interval, covered, rest):
    assert window_plan.without(interval, covered) == rest


def test_overlapping_intervals_are_merged():
    assert window_plan.merged([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
