"""Confidence of a restored gap, 0 to 1: the STOI measured in gaps of its length when the weights were evaluated.

The measurement depends on the inputs (audio, video or both), is interpolated over the length of the gap, and weighted by the share
of the gap in which the mouth is visible. It is 0 without any input. For weights without measurements it is FALLBACK_S /
(FALLBACK_S + length), which only reflects that longer gaps are harder.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

BOTH, AUDIO, VIDEO = "audio and video", "audio", "video"
METRIC = "stoi_gap"
FALLBACK_S = 1.0
HALVING_S = 1.5  # beyond the longest measured gap, the value halves every so many seconds
MIN_VISIBLE_SHARE = 0.25  # of a gap: with a visible mouth in less of it, the video does not count as an input


def inputs_used(has_audio: bool, visible_share: float) -> str:
    """The inputs of a restored gap: 'audio and video', 'audio' or 'video'; 'audio' also if there was neither."""
    if visible_share >= MIN_VISIBLE_SHARE:
        return BOTH if has_audio else VIDEO
    return AUDIO


def confidence(length_s: float, has_audio: bool, visible_share: float, measured: Mapping) -> float:
    """Confidence, 0 to 1, of a gap of length_s. measured: facts['measured'] of the weights, or {}."""
    with_video = _quality(length_s, BOTH if has_audio else VIDEO, measured)
    without_video = _quality(length_s, AUDIO, measured) if has_audio else 0.0
    return float(np.clip(visible_share * with_video + (1 - visible_share) * without_video, 0.0, 1.0))


def longest_s(measured: Mapping, inputs: str) -> float | None:
    """Length in seconds of the longest gap that was measured with these inputs, or None."""
    lengths = [int(ms) for ms, metrics in measured.get(inputs, {}).items() if METRIC in metrics]
    return max(lengths) / 1000 if lengths else None


def quality_at_longest(measured: Mapping, inputs: str) -> float:
    """STOI measured for the longest gap with these inputs."""
    return float(measured[inputs][str(round(longest_s(measured, inputs) * 1000))][METRIC])


def _quality(length_s: float, inputs: str, measured: Mapping) -> float:
    """STOI for a gap of length_s with these inputs, or with the nearest inputs that were measured."""
    for candidate in dict.fromkeys((inputs, BOTH, AUDIO, VIDEO)):
        known = sorted(
            (int(ms) / 1000, metrics[METRIC]) for ms, metrics in measured.get(candidate, {}).items() if METRIC in metrics
        )
        if known:
            lengths, quality = zip(*known)
            return float(np.interp(length_s, lengths, quality)) * 0.5 ** (max(0.0, length_s - lengths[-1]) / HALVING_S)
    return FALLBACK_S / (FALLBACK_S + length_s)
