"""By how much sound and picture of a clip are out of step, from how the mouth moves and how the sound's levels do. Only numpy.

Mouth and sound are taken every STEP_S on the picture's clock: nine lengths of the mouth over the distance of the eyes, and the log
energies of six bands; each also a little before and after, which holds speeds as well. Three weighted sums of the ones go with
three of the others (canonical correlation, Hotelling 1936). Their correlation at every lag up to REACH_S gives how much likelier
the lag is than that the two have nothing to do with each other; certainty is the likelihood's share within NEAR_S of the best.

The numbers below were fitted on clips of Grid, and measured on others, by benchmarks/quality/av_sync.py (docs/sync.md). Not done here: sound
that drifts away from its pictures, delays beyond REACH_S, choosing which stretches of a long clip to look at.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

STEP_S = 0.02
REACH_S = 0.4  # the longest delay looked for, either way
NEAR_S = 0.04  # a measured delay is right within this
WORTH_S = 0.06  # shorter ones are left alone: clips in step measure up to 60 ms, and what is lost by them is little
LEAST_S = 1.0  # seen and heard together; with less nothing is said
SURE = 0.64  # certainty from which on a correction may be made: docs/sync.md

WINDOW_S = 0.04
BANDS_HZ = (80, 300, 700, 1300, 2200, 3200, 4000)
FLOOR = 1e-4  # of a band's loudest: what lies 40 dB below is silence
MOUTH_STEPS, AUDIO_STEPS = (-4, -2, 0, 2, 4), (-2, 0, 2)  # what goes into one frame, in steps from it
EYES, NOSE = (slice(36, 42), slice(42, 48)), slice(27, 36)  # of iBUG-68
BLOCK = 1000  # frames of sound at a time


class Sync(NamedTuple):
    """offset_s: seconds by which the sound comes later than `lag_s` said (add it to lag_s); certainty: 0..1 that it is right."""

    offset_s: float
    certainty: float

    @property
    def correction_s(self) -> float:
        """What to add to lag_s: offset_s where it is sure and more than WORTH_S, otherwise 0."""
        return self.offset_s if self.certainty >= SURE and abs(self.offset_s) > WORTH_S else 0.0


class Model(NamedTuple):
    """mouth (D, K), sound (E, K): the weights of the sums; likeness (K,): their correlations in step; the rest: `evidence`."""

    mouth: np.ndarray
    audio: np.ndarray
    likeness: np.ndarray
    sharpness: float
    other: float


def measure(points, valid, times, samples, rate: int, missing, lag_s: float, model: Model | None = None) -> Sync:
    """By how much the sound is later than `lag_s` says, and how sure that is.

    points (T, 68, 2) px, valid (T,) bool, times (T,) s of each picture; samples (N, C), the first of them heard at 0 s, so that
    what is seen at t is said to be heard at t + lag_s; lost: (start_s, end_s) of the sound's gaps, which are not listened to.
    Sync(0.0, 0.0) where less than LEAST_S are seen and heard together.
    """
    model = model or LEARNED
    points, valid, times = np.asarray(points, np.float64), np.asarray(valid, bool), np.asarray(times, np.float64)
    _check(points, valid, times, samples)
    if valid.sum() < 2:
        return Sync(0.0, 0.0)
    mouth, seen, audio, heard = features(points, valid, times, samples, rate, missing, lag_s)
    return decide(*correlations(mouth @ model.mouth, seen, audio @ model.audio, heard), model)


def features(points, valid, times, samples, rate, missing, lag_s):
    """mouth (G, D), seen (G,) at the pictures' G steps; sound (G + 2 R, E), heard (G + 2 R,), R = reach() more to each side."""
    grid = np.arange(times[0], times[-1] + STEP_S / 2, STEP_S)
    around = np.arange(-reach(), len(grid) + reach()) * STEP_S + times[0] + lag_s
    return *mouth_features(points, valid, times, grid), *audio_features(samples, rate, missing, around)


def reach() -> int:
    """REACH_S in steps."""
    return round(REACH_S / STEP_S)


def mouth_features(points, valid, times, grid):
    """((G, D) deviations from the clip's mean, G times of `grid` on the picture's clock; (G,) whether all of it was seen)."""
    lengths = mouth_lengths(points, valid)
    lengths = np.stack([np.interp(grid, times, column) for column in lengths.T], 1)
    return _around(lengths, np.interp(grid, times, valid.astype(float)) == 1, MOUTH_STEPS)


def mouth_lengths(points, valid):
    """(T, 68, 2) px -> (T, 9) over the distance of the eyes, up and down in the frame of the level face."""
    left, right = (points[:, eye].mean(1) for eye in EYES)
    line = right - left
    span = np.linalg.norm(line, axis=1, keepdims=True)
    across = line / np.maximum(span, 1e-9)
    p = (points - points[:, NOSE].mean(1, keepdims=True)) / max(np.median(span[valid]), 1e-9)
    x = (p * across[:, None]).sum(-1).T
    y = (p[..., 1] * across[:, None, 0] - p[..., 0] * across[:, None, 1]).T
    inner, sides, outer = y[66] - y[62], (y[67] - y[61] + y[65] - y[63]) / 2, y[57] - y[51]
    return np.stack([inner, sides, outer, x[54] - x[48], x[64] - x[60], y[8], y[51], (y[48] + y[54]) / 2, y[57] - y[66]], 1)


def audio_features(samples, rate, missing, centres):
    """((G, E) deviations from the clip's mean, of log energies at G times `centres`, s; (G,) whether all of it was heard)."""
    size = round(WINDOW_S * rate)
    starts = np.round(centres * rate - size / 2).astype(int)
    heard = (starts >= 0) & (starts + size <= len(samples))
    for start_s, end_s in missing:
        heard &= (starts + size <= start_s * rate) | (starts >= end_s * rate)
    energy = np.zeros((len(centres), len(BANDS_HZ) - 1))
    if heard.any():
        energy[heard] = _energies(np.asarray(samples), rate, starts[heard], size)
    return _around(np.log(energy + np.maximum(FLOOR * energy.max(0), 1e-12)), heard, AUDIO_STEPS)


def _energies(samples, rate, starts, size):
    """(G, bands) energies of the windows of `size` samples that begin at `starts`."""
    nearest = np.fft.rfftfreq(size, 1 / rate)
    edges = np.searchsorted(nearest, BANDS_HZ)
    window, found = np.hanning(size), []
    for i in range(0, len(starts), BLOCK):
        pieces = samples[starts[i : i + BLOCK, None] + np.arange(size)].mean(-1) * window
        total = np.cumsum(np.abs(np.fft.rfft(pieces)) ** 2, axis=1)
        total = np.pad(total, ((0, 0), (1, 0)))
        found.append(total[:, edges[1:]] - total[:, edges[:-1]])
    return np.concatenate(found)


def _around(x, there, steps):
    """(G, n), (G,) -> (G, n * len(steps)): the values at each of `steps` from a frame, standardised; (G,) where all are there."""
    if there.any():
        x = (x - x[there].mean(0)) / np.maximum(x[there].std(0), 1e-9)
    places = np.clip(np.arange(len(x))[:, None] + np.array(steps), 0, len(x) - 1)
    there = there[places].all(1)
    return np.where(there[:, None], x[places].reshape(len(x), -1), 0.0), there


def correlations(mouth, seen, audio, heard):
    """mouth (G, K), sound (G + 2 R, K) -> (2 R + 1, K) correlations over frames seen and heard, and how many (2 R + 1,)."""
    mouth, audio = _standard(mouth, seen), _standard(audio, heard)
    found, frames = [], []
    for first in range(2 * reach() + 1):
        other, both = audio[first : first + len(mouth)], seen & heard[first : first + len(mouth)]
        power = np.sqrt((mouth[both] ** 2).sum(0) * (other[both] ** 2).sum(0))
        found.append((mouth[both] * other[both]).sum(0) / np.maximum(power, 1e-9))
        frames.append(both.sum())
    return np.array(found), np.array(frames)


def _standard(x, there):
    if not there.any():
        return x
    return np.where(there[:, None], (x - x[there].mean(0)) / np.maximum(x[there].std(0), 1e-9), 0.0)


def decide(found, frames, model: Model) -> Sync:
    """Correlations (2 R + 1, K) over `frames` each -> Sync: the likeliest lag, between steps by a parabola, and its certainty."""
    if frames.max() * STEP_S < LEAST_S:
        return Sync(0.0, 0.0)
    log_odds = evidence(found, frames, model)
    best = int(np.argmax(log_odds))
    shares = np.exp(log_odds - max(log_odds[best], model.other))
    near = np.abs(np.arange(len(shares)) - best) * STEP_S <= NEAR_S + 1e-9
    certainty = shares[near].sum() / (shares.sum() + np.exp(model.other - max(log_odds[best], model.other)))
    return Sync(float((best - reach() + _peak(log_odds, best)) * STEP_S), float(certainty))


def evidence(found, frames, model: Model):
    """(2 R + 1,) log likelihood of each lag over that of unrelated mouth and sound, if both are Gaussian; neighbours are alike."""
    r = model.likeness
    gain = -0.5 * np.log1p(-(r**2)) + (r * found - r**2) / (1 - r**2)
    return model.sharpness * np.where(frames * STEP_S < LEAST_S, -np.inf, frames * gain.sum(-1))


def _peak(y, best: int) -> float:
    """Where the parabola through the highest value and its neighbours is highest, in steps from it."""
    if not 0 < best < len(y) - 1 or not np.isfinite(y[best - 1 : best + 2]).all():
        return 0.0
    before, at, after = y[best - 1 : best + 2]
    return float(0.5 * (before - after) / min(before - 2 * at + after, -1e-12))


def _check(points, valid, times, samples) -> None:
    if points.ndim != 3 or points.shape[1:] != (68, 2) or valid.shape != times.shape or len(times) != len(points):
        raise ValueError(
            f"found points {points.shape}, valid {valid.shape} and times {times.shape}, expected (T, 68, 2), (T,) and (T,)"
        )
    if np.ndim(samples) != 2:
        raise ValueError(f"found samples of shape {np.shape(samples)}, expected (N, C)")


# Fitted by `python -m benchmarks.quality.av_sync --data_dir=DATA --fit`: a block a sum, a line a step, a column a length or band.
# fmt: off
LEARNED = Model(
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
    likeness=np.array([0.775, 0.624, 0.443]), sharpness=0.0322, other=4.16,
)
# fmt: on
