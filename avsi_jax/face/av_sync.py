"""Estimates the A/V offset of a clip from the movement of the mouth and the band levels of the audio. Needs only numpy.

Mouth and audio are sampled every HOP_S on the clock of the video: nine distances of the mouth, divided by the distance of the
eyes, and the log energies of six bands. Each time step also includes some steps before and after it, so speeds are covered. Three
weighted sums of the mouth features are matched with three of the audio features (canonical correlation, Hotelling 1936). Their
correlations at every lag up to MAX_OFFSET_S give the likelihood of the lag relative to unrelated mouth and audio. The certainty is
the share of the likelihood within TOLERANCE_S of the best lag.

The parameters below were fitted on one part of the Grid clips and evaluated on the rest by benchmarks/quality/av_sync.py
(docs/av_sync.md). Not supported: offsets that drift, offsets beyond MAX_OFFSET_S, selecting a part of a long clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

HOP_S = 0.02
MAX_OFFSET_S = 0.4  # largest offset searched, in both directions
TOLERANCE_S = 0.04  # an estimate within this of the true offset counts as correct
MIN_OFFSET_S = 0.06  # smaller offsets are not corrected: clips in sync measure up to this, and they do little harm
MIN_OVERLAP_S = 1.0  # shortest stretch with both video and audio for an estimate
MIN_CERTAINTY = 0.64  # from which a correction is made: docs/av_sync.md

WINDOW_S = 0.04
BANDS_HZ = (80, 300, 700, 1300, 2200, 3200, 4000)
FLOOR = 1e-4  # of a band's highest energy: 40 dB below it counts as silence
MOUTH_CONTEXT, AUDIO_CONTEXT = (-4, -2, 0, 2, 4), (-2, 0, 2)  # offsets, in hops, of the values that form one time step
EYES, NOSE = (slice(36, 42), slice(42, 48)), slice(27, 36)  # of iBUG-68
BLOCK = 1000  # audio frames processed at once


class OffsetEstimate(NamedTuple):
    """An estimated A/V offset.

    offset_s: positive if the audio is later than the assumed lag_s; certainty: probability (0 to 1) that it is within TOLERANCE_S.
    """

    offset_s: float
    certainty: float

    @property
    def correction_s(self) -> float:
        """What to add to lag_s: offset_s if it is certain and larger than MIN_OFFSET_S, otherwise 0."""
        return self.offset_s if self.certainty >= MIN_CERTAINTY and abs(self.offset_s) > MIN_OFFSET_S else 0.0


class CorrelationModel(NamedTuple):
    """Fitted parameters: D mouth and E audio features, Q weighted sums of each."""

    mouth: np.ndarray  # (D, Q) weights
    audio: np.ndarray  # (E, Q) weights
    correlations: np.ndarray  # (Q,) of matching mouth and audio in sync
    sharpness: float  # factor of the log likelihood: neighbouring time steps are not independent
    unrelated: float  # log weight of the hypothesis that mouth and audio are unrelated


def estimate_offset(
    points: np.ndarray,
    valid: np.ndarray,
    times: np.ndarray,
    samples: np.ndarray,
    rate: int,
    missing: Sequence[tuple[float, float]],
    lag_s: float,
    model: CorrelationModel | None = None,
) -> OffsetEstimate:
    """Estimates by how much the audio is later than `lag_s`.

    points (T, 68, 2) px, valid (T,) bool and times (T,) s of the video frames; samples (N, C), starting at 0 s, so that the video
    at time t is assumed to belong to the audio at t + lag_s; missing: (start_s, end_s) of the gaps, which are not used.

    Returns OffsetEstimate(0.0, 0.0) if less than MIN_OVERLAP_S has both video and audio; ValueError for wrong shapes.
    """
    model = model or FITTED_MODEL
    points, valid, times = np.asarray(points, np.float64), np.asarray(valid, bool), np.asarray(times, np.float64)
    _check(points, valid, times, samples)
    if valid.sum() < 2:
        return OffsetEstimate(0.0, 0.0)
    mouth, has_video, audio, has_audio = features(points, valid, times, samples, rate, missing, lag_s)
    return offset_from_correlations(*lag_correlations(mouth @ model.mouth, has_video, audio @ model.audio, has_audio), model)


def features(
    points: np.ndarray, valid: np.ndarray, times: np.ndarray, samples: np.ndarray, rate: int, missing: Sequence, lag_s: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features of both streams: mouth (G, D), has_video (G,), audio (G + 2 R, E), has_audio (G + 2 R,).

    G is the number of time steps of the video; the audio extends R = max_lag() steps further on both sides.
    """
    grid = np.arange(times[0], times[-1] + HOP_S / 2, HOP_S)
    around = np.arange(-max_lag(), len(grid) + max_lag()) * HOP_S + times[0] + lag_s
    return *mouth_features(points, valid, times, grid), *audio_features(samples, rate, missing, around)


def max_lag() -> int:
    """MAX_OFFSET_S in hops."""
    return round(MAX_OFFSET_S / HOP_S)


def mouth_features(points: np.ndarray, valid: np.ndarray, times: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardised mouth distances (G, D) at the times `grid` (G,) s, and (G,) bool: whether all frames used show the face."""
    distances = mouth_distances(points, valid)
    distances = np.stack([np.interp(grid, times, column) for column in distances.T], 1)
    return _with_context(distances, np.interp(grid, times, valid.astype(float)) == 1, MOUTH_CONTEXT)


def mouth_distances(points: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(T, 68, 2) px -> (T, 9) distances of the mouth over the distance of the eyes, measured with the eyes level."""
    left, right = (points[:, eye].mean(1) for eye in EYES)
    line = right - left
    span = np.linalg.norm(line, axis=1, keepdims=True)
    across = line / np.maximum(span, 1e-9)
    p = (points - points[:, NOSE].mean(1, keepdims=True)) / max(np.median(span[valid]), 1e-9)
    x = (p * across[:, None]).sum(-1).T
    y = (p[..., 1] * across[:, None, 0] - p[..., 0] * across[:, None, 1]).T
    inner, sides, outer = y[66] - y[62], (y[67] - y[61] + y[65] - y[63]) / 2, y[57] - y[51]
    return np.stack([inner, sides, outer, x[54] - x[48], x[64] - x[60], y[8], y[51], (y[48] + y[54]) / 2, y[57] - y[66]], 1)


def audio_features(samples: np.ndarray, rate: int, missing: Sequence, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardised log band energies (G, E) at the times `centres` (G,) s, and (G,) bool: whether all audio used is available."""
    size = round(WINDOW_S * rate)
    starts = np.round(centres * rate - size / 2).astype(int)
    available = (starts >= 0) & (starts + size <= len(samples))
    for start_s, end_s in missing:
        available &= (starts + size <= start_s * rate) | (starts >= end_s * rate)
    energy = np.zeros((len(centres), len(BANDS_HZ) - 1))
    if available.any():
        energy[available] = _band_energies(np.asarray(samples), rate, starts[available], size)
    return _with_context(np.log(energy + np.maximum(FLOOR * energy.max(0), 1e-12)), available, AUDIO_CONTEXT)


def _band_energies(samples: np.ndarray, rate: int, starts: np.ndarray, size: int) -> np.ndarray:
    """Energies (G, bands) of the windows of `size` samples that begin at `starts`."""
    nearest = np.fft.rfftfreq(size, 1 / rate)
    edges = np.searchsorted(nearest, BANDS_HZ)
    window, energies = np.hanning(size), []
    for i in range(0, len(starts), BLOCK):
        pieces = samples[starts[i : i + BLOCK, None] + np.arange(size)].mean(-1) * window
        total = np.cumsum(np.abs(np.fft.rfft(pieces)) ** 2, axis=1)
        total = np.pad(total, ((0, 0), (1, 0)))
        energies.append(total[:, edges[1:]] - total[:, edges[:-1]])
    return np.concatenate(energies)


def _with_context(x: np.ndarray, available: np.ndarray, context: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Standardises (G, n) and stacks the values at all offsets of `context`: (G, n * len(context)), (G,) whether available."""
    if available.any():
        x = (x - x[available].mean(0)) / np.maximum(x[available].std(0), 1e-9)
    places = np.clip(np.arange(len(x))[:, None] + np.array(context), 0, len(x) - 1)
    available = available[places].all(1)
    return np.where(available[:, None], x[places].reshape(len(x), -1), 0.0), available


def lag_correlations(
    mouth: np.ndarray, has_video: np.ndarray, audio: np.ndarray, has_audio: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Correlations (2 R + 1, Q) of mouth (G, Q) with audio (G + 2 R, Q) at every lag, and the time steps used (2 R + 1,)."""
    mouth, audio = _standardised(mouth, has_video), _standardised(audio, has_audio)
    correlations, num_steps = [], []
    for first in range(2 * max_lag() + 1):
        shifted, both = audio[first : first + len(mouth)], has_video & has_audio[first : first + len(mouth)]
        power = np.sqrt((mouth[both] ** 2).sum(0) * (shifted[both] ** 2).sum(0))
        correlations.append((mouth[both] * shifted[both]).sum(0) / np.maximum(power, 1e-9))
        num_steps.append(both.sum())
    return np.array(correlations), np.array(num_steps)


def _standardised(x: np.ndarray, available: np.ndarray) -> np.ndarray:
    if not available.any():
        return x
    return np.where(available[:, None], (x - x[available].mean(0)) / np.maximum(x[available].std(0), 1e-9), 0.0)


def offset_from_correlations(correlations: np.ndarray, num_steps: np.ndarray, model: CorrelationModel) -> OffsetEstimate:
    """The most likely lag, refined by a parabola, and its certainty; correlations (2 R + 1, Q), num_steps (2 R + 1,)."""
    if num_steps.max() * HOP_S < MIN_OVERLAP_S:
        return OffsetEstimate(0.0, 0.0)
    log_odds = log_likelihood_ratios(correlations, num_steps, model)
    best = int(np.argmax(log_odds))
    shares = np.exp(log_odds - max(log_odds[best], model.unrelated))
    near = np.abs(np.arange(len(shares)) - best) * HOP_S <= TOLERANCE_S + 1e-9
    certainty = shares[near].sum() / (shares.sum() + np.exp(model.unrelated - max(log_odds[best], model.unrelated)))
    return OffsetEstimate(float((best - max_lag() + _peak(log_odds, best)) * HOP_S), float(certainty))


def log_likelihood_ratios(correlations: np.ndarray, num_steps: np.ndarray, model: CorrelationModel) -> np.ndarray:
    """(2 R + 1,) log likelihood of each lag relative to unrelated mouth and audio, assuming Gaussian features."""
    r = model.correlations
    gain = -0.5 * np.log1p(-(r**2)) + (r * correlations - r**2) / (1 - r**2)
    return model.sharpness * np.where(num_steps * HOP_S < MIN_OVERLAP_S, -np.inf, num_steps * gain.sum(-1))


def _peak(y: np.ndarray, best: int) -> float:
    """Position of the maximum of the parabola through y[best] and its neighbours, relative to best."""
    if not 0 < best < len(y) - 1 or not np.isfinite(y[best - 1 : best + 2]).all():
        return 0.0
    before, at, after = y[best - 1 : best + 2]
    return float(0.5 * (before - after) / min(before - 2 * at + after, -1e-12))


def _check(points: np.ndarray, valid: np.ndarray, times: np.ndarray, samples: np.ndarray) -> None:
    if points.ndim != 3 or points.shape[1:] != (68, 2) or valid.shape != times.shape or len(times) != len(points):
        raise ValueError(
            f"found points {points.shape}, valid {valid.shape} and times {times.shape}, expected (T, 68, 2), (T,) and (T,)"
        )
    if np.ndim(samples) != 2:
        raise ValueError(f"found samples of shape {np.shape(samples)}, expected (N, C)")


# Fitted by `python -m benchmarks.quality.av_sync --data_dir=DATA --fit`. One block per weighted sum, one line per offset of the
# context, one column per distance or band.
# fmt: off
FITTED_MODEL = CorrelationModel(
    mouth=np.array([
        [-0.192, -0.553, 1, 0.07, -0.036, -0.247, -0.138, 0.166, -0.471,
         -0.097, -0.34, 0.256, 0.078, 0.037, 0.172, -0.067, 0.133, -0.207,
         0.02, -0.156, -0.204, -0.05, 0.222, -0.164, -0.013, 0.166, -0.11,
         0.168, 0.021, -0.321, -0.025, 0.01, -0.156, 0.048, 0.102, 0.007,
         0.073, -0.065, -0.348, 0.176, 0.223, 0.169, -0.029, 0.426, -0.113],
        [0.051, -0.1, 0.943, -0.401, 0.31, -0.608, 0.321, -0.494, 0.143,
         -0.199, -0.384, 0.824, 0.101, -0.313, 1, -0.223, 0.177, 0.185,
         -0.046, -0.293, 0.28, 0.693, -0.811, -0.107, -0.334, 0.057, -0.082,
         -0.042, -0.362, -0.761, -0.125, 0.556, -0.767, -0.336, 0.147, 0.04,
         0.414, 0.011, -0.488, -0.31, 0.18, 0.156, 0.358, -0.36, 0.371],
        [-0.001, -0.022, 0.346, 0.177, -0.153, -0.639, 0.003, -0.406, -0.631,
         -0.022, 0.185, 0.126, -0.639, 0.626, 0.849, 0.357, 0.555, -0.45,
         -0.027, 0.175, 0.5, 0.274, -0.699, 0.682, 0.125, 0.298, -0.647,
         -0.368, -0.337, 0.598, 0.497, -0.491, -0.389, -0.223, 0.303, -0.569,
         -0.165, -0.416, 0.805, -0.596, 1, -0.304, -0.058, -0.307, 0.173],
    ]).T,
    audio=np.array([
        [0.019, 0.085, -0.555, -0.042, -0.585, 0.009,
         -0.139, 0.265, -0.289, -0.003, -0.504, -0.031,
         -0.436, 1, -0.421, -0.26, -0.389, -0.369],
        [1, -0.192, 0.265, 0.079, 0.277, 0.717,
         0.566, -0.856, -0.284, 0.33, -0.067, 0.252,
         -0.377, -0.704, -0.63, 0.202, -0.611, -0.095],
        [-1, 0.715, 0.762, -0.311, -0.06, -0.571,
         0.288, 0.605, 0.437, -0.064, 0.109, -0.057,
         -0.333, 0.051, -0.552, 0.047, -0.008, -0.119],
    ]).T,
    correlations=np.array([0.775, 0.624, 0.443]), sharpness=0.0322, unrelated=4.16,
)
# fmt: on
