"""How well a gap is probably filled, 0 to 1: the STOI around gaps of its length that was measured when the weights were evaluated.

By what there was to go by, interpolated over the gap's length, mixed by the share of the gap whose pictures show the mouth; 0 where
there was nothing. Weights that nobody evaluated have no such numbers: then it is FALLBACK_S / (FALLBACK_S + length), which tells a
short gap from a long one and nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

BOTH, AUDIO, LIPS = "sound and lips", "sound", "lips"
METRIC = "stoi_gap"
FALLBACK_S = 1.0
BEYOND_S = 1.5  # behind the longest gap measured, quality halves in this time
SEEN = 0.25  # of a gap, from which on lips are said to have helped


def by(heard: bool, share_seen: float) -> str:
    """What there was to go by; 'sound' too where there was nothing."""
    if share_seen >= SEEN:
        return BOTH if heard else LIPS
    return AUDIO


def confidence(length_s: float, heard: bool, share_seen: float, measured: Mapping) -> float:
    """0..1 of a gap of length_s; measured: facts['measured'] of the weights, or {}."""
    lips = BOTH if heard else LIPS
    found = share_seen * _of(length_s, lips, measured) + (1 - share_seen) * (_of(length_s, AUDIO, measured) if heard else 0.0)
    return float(np.clip(found, 0.0, 1.0))


def longest_s(measured: Mapping, of: str) -> float | None:
    """Seconds of the longest gap that quality was measured at; None where it wasn't."""
    lengths = [int(ms) for ms, found in measured.get(of, {}).items() if METRIC in found]
    return max(lengths) / 1000 if lengths else None


def at_longest(measured: Mapping, of: str) -> float:
    """The STOI there."""
    return float(measured[of][str(round(longest_s(measured, of) * 1000))][METRIC])


def _of(length_s: float, of: str, measured: Mapping) -> float:
    """By one kind of what was there; where that was not measured by the nearest that was."""
    for kind in dict.fromkeys((of, BOTH, AUDIO, LIPS)):
        known = sorted((int(ms) / 1000, found[METRIC]) for ms, found in measured.get(kind, {}).items() if METRIC in found)
        if known:
            lengths, quality = zip(*known)
            return float(np.interp(length_s, lengths, quality)) * 0.5 ** (max(0.0, length_s - lengths[-1]) / BEYOND_S)
    return FALLBACK_S / (FALLBACK_S + length_s)
