"""Finds sound that was played again: a packet that stands for a lost one, as concealment puts it there, once or many times.

x (N,) is one channel (all of a clip's, weighted), times are samples of its rate, lags SHORTEST_LAG_S to LONGEST_LAG_S. A voice is
nearly a repeat of itself as well: what tells a copy is that it fits to the bit (`_extended`), or after coding better than a voice
does for as long (`alike_runs`). A steady tone is none. Not found: copies of more than LONGEST_LAG_S before.

Looked for at about COARSE_RATE first, then to the sample; numpy alone: importing scipy.signal takes as long as a minute of sound.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

SHORTEST_LAG_S, LONGEST_LAG_S = 0.01, 0.06
WINDOW_S, HOP_S = 0.01, 0.005
COARSE_RATE = 8000
COARSE, EXACT = 0.9, 1e-3  # correlation; share of energy that is not the copy's
ALIKE, ALIKE_S = 0.1, 0.03  # such a share, for so long; vowels count then: the bands are asked as well
BANDS_HZ, BAND_LIKE = (100, 1000, 2500, 4000), 0.8  # a voice's pitch wanders and its breath is new: its upper bands are less alike
REPEAT_S = 0.012
TONE_SHARE = 10.0  # a shorter period that fits nearly as well: it is a tone, not a copy


def repeats(view: np.ndarray, a: int, b: int, rate: int) -> list[tuple[int, int]]:
    """view (n, C) -> stretches [start, end) of [a, b) that are what was one lag before, times a constant; none at a rate too low
    for speech."""
    if rate < 1000:
        return []
    x = view @ (1 / (1 + 0.37 * np.arange(view.shape[1], dtype=np.float32)))
    starts, lags = coarse_candidates(x, a, b, rate)
    if len(starts) == 0:
        return []
    starts, lags, left, gain = refine(x, starts, lags, rate)
    one = np.lexsort((left, starts))
    one = one[np.r_[True, np.diff(starts[one]) > 0]]  # each window's best lag: a tone has dozens
    one, spans, seen = one[left[one] < EXACT], [], 0
    for c in zip(starts[one], lags[one], gain[one], strict=True):
        if c[0] + round(WINDOW_S * rate) > seen:
            first, seen, tone = _extended(x, *c, rate)
            spans += [] if tone else [(first, seen)]
    return spans + alike_runs(x, starts, lags, left, rate)


def coarse_candidates(x, a, b, rate) -> tuple[np.ndarray, np.ndarray]:
    """Windows of [a, b) that are like what was some lag before, looked for at about COARSE_RATE: starts and lags in samples."""
    step = max(1, rate // COARSE_RATE)
    low, fine = thinned(x, step, rate), rate / step
    window, hop, shortest, longest = (round(s * fine) for s in (WINDOW_S, HOP_S, SHORTEST_LAG_S * 0.98, LONGEST_LAG_S * 1.02))
    starts = np.arange(max(longest, -(-a // step)), min(-(-b // step), len(low) - window), hop)
    starts = starts[np.ptp(sliding_window_view(low, window)[starts], axis=1) > 2e-3] if len(starts) else starts
    if len(starts) == 0:
        return starts, starts
    like = correlations(low, starts, window, shortest, longest)
    rows, columns = np.nonzero(like > COARSE)
    value = like[rows, columns]
    beside = np.stack([like[rows, np.clip(columns + n, 0, like.shape[1] - 1)] for n in (-2, -1, 1, 2)])
    peaks = (value >= beside).all(0)
    return starts[rows[peaks]] * step, (longest - columns[peaks]) * step


def thinned(x: np.ndarray, step: int, rate: int) -> np.ndarray:
    """(N,) -> (N / step,) float32: every step-th sample, what is above the new rate's half taken off first."""
    if rate <= 5000 or step == 1:
        return x.astype(np.float32)
    n = np.arange(-4 * step, 4 * step + 1)
    taps = np.sinc(n / (2 * step)) * np.hamming(len(n))
    padded, num = np.pad(x, (4 * step, 5 * step)), -(-len(x) // step)
    low = np.zeros(num, np.float32)
    for k, tap in enumerate((taps / taps.sum()).astype(np.float32)):
        low += tap * padded[k : k + num * step : step]
    return low


def correlations(x, starts, window: int, shortest: int, longest: int) -> np.ndarray:
    """Of each window with what was a lag before it: (W, longest - shortest + 1), from the longest lag down."""
    back, lags = sliding_window_view(x, longest + window)[starts - longest], longest - shortest + 1
    size = fast_length(longest + window)
    spectrum, own = np.fft.rfft(back, size), np.fft.rfft(back[:, longest:], size)
    products = np.fft.irfft(spectrum * own.conj(), size)[:, :lags]
    power = np.cumsum(np.r_[0, x.astype(np.float64) ** 2])
    energy = (power[window:] - power[:-window]).astype(np.float32)
    before = sliding_window_view(energy, lags)[starts - longest]
    return products / np.sqrt(np.maximum(before * energy[starts][:, None], 1e-12))


def fast_length(least: int) -> int:
    """The next length whose only factors are 2, 3 and 5: a transform of another takes several times longer."""
    while _rest(least) > 1:
        least += 1
    return least


def _rest(n: int) -> int:
    for p in (2, 3, 5):
        while n % p == 0:
            n //= p
    return n


def refine(x, starts, lags, rate):
    """-> starts, lags to the sample, share of each window's energy (of its differences) that is not the copy's, gain."""
    step, window = max(1, rate // COARSE_RATE), round(WINDOW_S * rate)
    d = np.diff(x, prepend=x[:1])
    kept = starts + window <= len(x)
    starts, lags = starts[kept], lags[kept]
    windows, power = sliding_window_view(d, window), np.cumsum(np.r_[0, d.astype(np.float64) ** 2])
    energy = (power[window:] - power[:-window]).astype(np.float32)
    now, own, best = windows[starts], energy[starts], np.full(len(starts), -np.inf)
    exact, gain = lags.copy(), np.zeros(len(starts))
    for off in range(-step, step + 1):
        position = np.maximum(starts - lags - off, 0)
        both, theirs = np.einsum("ij,ij->i", now, windows[position]), energy[position] + 1e-12
        like = np.where(both > 0, both**2 / theirs, 0)
        better = (like > best) & (starts - lags - off >= 0)
        best, exact, gain = np.where(better, like, best), np.where(better, lags + off, exact), np.where(better, both / theirs, gain)
    return starts, exact, np.maximum(0, 1 - best / (own + 1e-12)), gain


def _extended(x, start, lag, gain, rate):
    """Where, around a window, x[n] is gain * x[n - lag], as nearly as 16 bits tell: (start, end, is it a tone)."""
    window, reach = round(WINDOW_S * rate), round(2 * LONGEST_LAG_S * rate)
    low, high = max(lag, start - reach), min(len(x), start + window + reach)
    now, then = x[low:high], x[low - lag : high - lag]
    wrong = np.abs(now - gain * then) > 4e-5 + 0.004 * np.abs(gain * then)
    bad_before, bad_after = np.flatnonzero(wrong[: start - low + window // 2]), np.flatnonzero(wrong[start - low + window // 2 :])
    first = low + (bad_before[-1] + 1 if len(bad_before) else 0)
    last = start + window // 2 + bad_after[0] if len(bad_after) else high
    return int(first), int(last), is_tone(x[max(0, first - lag) : last], rate, TONE_SHARE * EXACT)


def is_tone(x: np.ndarray, rate: int, differs: float) -> bool:
    """Whether a period shorter than any packet fits nearly as well."""
    d = np.diff(x)
    longest, shortest = round(0.9 * SHORTEST_LAG_S * rate), max(2, round(0.001 * rate))
    if len(d) < 2 * longest:
        return False
    lags = np.arange(shortest, longest)
    now = d[longest:]
    like = np.array([_likeness(now, d[longest - lag : len(d) - lag]) for lag in lags])
    return bool(like.max() > 1 - differs)


def _likeness(now, then) -> float:
    return float(now @ then / np.sqrt((now @ now) * (then @ then) + 1e-20))


def alike_runs(x, starts, lags, left, rate) -> list[tuple[int, int]]:
    """Where coding left copies only alike: windows in a row at one lag."""
    window, hop, spans = round(WINDOW_S * rate), HOP_S * rate * 3, []
    good = left < ALIKE
    begun: dict[int, list[int]] = {}
    for start, lag in sorted(zip(starts[good].tolist(), lags[good].tolist(), strict=True)):
        key = next((k for k in (lag, lag - 1, lag + 1) if k in begun and start - begun[k][1] <= hop), None)
        if key is None:
            begun[lag] = [start, start, lag]
            spans.append(begun[lag])
        else:
            begun[key][1] = start
    long = [(a, b + window, lag) for a, b, lag in spans if b - a + window >= ALIKE_S * rate]
    copies = [(a, b) for a, b, lag in long if alike_in_bands(x, a, b, lag, rate) > BAND_LIKE]
    return [(a, b) for a, b in copies if not is_tone(x[max(0, a - window) : b], rate, ALIKE)]


def alike_in_bands(x, start, end, lag, rate) -> float:
    """Correlation of x[start:end] with what was a lag before, in the band where it is least."""
    pad = round(WINDOW_S * rate)
    first = max(0, start - lag - pad)
    heard, at = x[first : end + pad], start - first
    size = fast_length(len(heard))
    spectrum, hz = np.fft.rfft(heard, size), np.fft.rfftfreq(size, 1 / rate)
    bands = [(low, high) for low, high in zip(BANDS_HZ, BANDS_HZ[1:], strict=False) if 2 * high <= rate]
    parts = [np.fft.irfft(spectrum * ((hz >= low) & (hz < high)), size) for low, high in bands]
    return min((_likeness(y[at : at + end - start], y[at - lag : at - lag + end - start]) for y in parts), default=0.0)
