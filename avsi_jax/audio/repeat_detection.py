"""Detects repeated packets: audio that is a copy of what came shortly before, as packet-loss concealment inserts it.

x (N,) is one channel, a weighted mix of the clip's channels. Times are samples, lags lie between MIN_LAG_S and MAX_LAG_S. Voiced
speech nearly repeats itself too. A copy is recognised because it matches to the bit (`_exact_repeat`), or, after lossy coding,
because it matches better and for longer than a voice does (`approximate_repeats`). Steady tones are excluded. Copies from further
back than MAX_LAG_S are not detected.

The search runs at about COARSE_RATE first and is then refined to single samples. It needs only numpy: importing scipy.signal
takes as long as processing a minute of audio.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

MIN_LAG_S, MAX_LAG_S = 0.01, 0.06
WINDOW_S, HOP_S = 0.01, 0.005
COARSE_RATE = 8000
COARSE_CORRELATION, EXACT_RESIDUAL = 0.9, 1e-3  # the second is the share of energy that the copy does not explain
APPROXIMATE_RESIDUAL, MIN_APPROXIMATE_S = 0.1, 0.03  # vowels reach this residual too, so the bands are compared as well
BANDS_HZ, BAND_CORRELATION = (100, 1000, 2500, 4000), 0.8  # pitch drifts and breath noise changes: upper bands of a voice differ
MIN_REPEAT_S = 0.012
MIN_RANGE, MIN_RANGE_STEPS = 2e-3, 64  # of a window, peak to peak: of full scale, and in quantisation steps, whose noise repeats
TONE_RESIDUAL_RATIO = 10.0  # a tone: a period shorter than any packet leaves less than this many times the residual


def find_repeats(view: np.ndarray, a: int, b: int, rate: int) -> list[tuple[int, int]]:
    """Spans [start, end) within [a, b) of view (n, C) that are a scaled copy of the audio one lag before.

    Empty at sample rates too low for speech.
    """
    if rate < 1000:
        return []
    x = view @ (1 / (1 + 0.37 * np.arange(view.shape[1], dtype=np.float32)))
    min_range = max(MIN_RANGE, MIN_RANGE_STEPS * smallest_step(view)) if len(view) > 1 else MIN_RANGE
    starts, lags = coarse_candidates(x, a, b, rate, min_range)
    if len(starts) == 0:
        return []
    starts, lags, residual, gain = refine(x, starts, lags, rate)
    best = np.lexsort((residual, starts))
    best = best[np.r_[True, np.diff(starts[best]) > 0]]  # the best lag of every window: a tone has dozens
    best, spans, covered = best[residual[best] < EXACT_RESIDUAL], [], 0
    for start, lag, scale in zip(starts[best], lags[best], gain[best], strict=True):
        if start + round(WINDOW_S * rate) > covered:
            first, covered, tone = _exact_repeat(x, start, lag, scale, rate)
            spans += [] if tone else [(first, covered)]
    return spans + approximate_repeats(x, starts, lags, residual, rate)


def smallest_step(view: np.ndarray) -> float:
    """The smallest step between two consecutive samples of (n, C) that differ; inf if none do. 1/128 for 8 bits."""
    steps = np.abs(np.diff(view, axis=0))
    return float(steps[steps > 0].min(initial=np.inf))


def coarse_candidates(x: np.ndarray, a: int, b: int, rate: int, min_range: float = MIN_RANGE) -> tuple[np.ndarray, np.ndarray]:
    """Windows of [a, b) that correlate with the audio one lag before, at about COARSE_RATE: starts and lags in samples.

    min_range: quieter windows, by their peak-to-peak range, are left out.
    """
    step = max(1, rate // COARSE_RATE)
    low, fine = downsample(x, step, rate), rate / step
    window, hop, shortest, longest = (round(s * fine) for s in (WINDOW_S, HOP_S, MIN_LAG_S * 0.98, MAX_LAG_S * 1.02))
    starts = np.arange(max(longest, -(-a // step)), min(-(-b // step), len(low) - window), hop)
    starts = starts[np.ptp(sliding_window_view(low, window)[starts], axis=1) > min_range] if len(starts) else starts
    if len(starts) == 0:
        return starts, starts
    correlation = lag_correlations(low, starts, window, shortest, longest)
    rows, columns = np.nonzero(correlation > COARSE_CORRELATION)
    value = correlation[rows, columns]
    beside = np.stack([correlation[rows, np.clip(columns + n, 0, correlation.shape[1] - 1)] for n in (-2, -1, 1, 2)])
    peaks = (value >= beside).all(0)
    return starts[rows[peaks]] * step, (longest - columns[peaks]) * step


def downsample(x: np.ndarray, step: int, rate: int) -> np.ndarray:
    """(N,) -> (ceil(N / step),) float32: every step-th sample after a short low-pass filter."""
    if rate <= 5000 or step == 1:
        return x.astype(np.float32)
    n = np.arange(-4 * step, 4 * step + 1)
    taps = np.sinc(n / (2 * step)) * np.hamming(len(n))
    padded, num = np.pad(x, (4 * step, 5 * step)), -(-len(x) // step)
    low = np.zeros(num, np.float32)
    for k, tap in enumerate((taps / taps.sum()).astype(np.float32)):
        low += tap * padded[k : k + num * step : step]
    return low


def lag_correlations(x: np.ndarray, starts: np.ndarray, window: int, shortest: int, longest: int) -> np.ndarray:
    """Correlation of each of W windows with the audio one lag before: (W, longest - shortest + 1), longest lag first."""
    back, lags = sliding_window_view(x, longest + window)[starts - longest], longest - shortest + 1
    size = fast_length(longest + window)
    spectrum, own = np.fft.rfft(back, size), np.fft.rfft(back[:, longest:], size)
    products = np.fft.irfft(spectrum * own.conj(), size)[:, :lags]
    power = np.cumsum(np.r_[0, x.astype(np.float64) ** 2])
    energy = (power[window:] - power[:-window]).astype(np.float32)
    before = sliding_window_view(energy, lags)[starts - longest]
    return products / np.sqrt(np.maximum(before * energy[starts][:, None], 1e-12))


def fast_length(minimum: int) -> int:
    """The next length from `minimum` on whose only prime factors are 2, 3 and 5: other FFT lengths take several times longer."""
    while _other_factors(minimum) > 1:
        minimum += 1
    return minimum


def _other_factors(n: int) -> int:
    """n without its factors 2, 3 and 5."""
    for p in (2, 3, 5):
        while n % p == 0:
            n //= p
    return n


def refine(x: np.ndarray, starts: np.ndarray, lags: np.ndarray, rate: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Refines lags to single samples: starts, lags, residual and gain, each (W,).

    The residual is the share of the energy of a window (of its first differences) that the copy does not explain.
    """
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
        explained = np.where(both > 0, both**2 / theirs, 0)
        better = (explained > best) & (starts - lags - off >= 0)
        best, exact, gain = (
            np.where(better, explained, best), np.where(better, lags + off, exact), np.where(better, both / theirs, gain)
        )  # fmt: skip
    return starts, exact, np.maximum(0, 1 - best / (own + 1e-12)), gain


def _exact_repeat(x: np.ndarray, start: int, lag: int, gain: float, rate: int) -> tuple[int, int, bool]:
    """Extends a window as long as x[n] equals gain * x[n - lag] within 16-bit rounding: (start, end, whether it is a tone)."""
    window, reach = round(WINDOW_S * rate), round(2 * MAX_LAG_S * rate)
    low, high = max(lag, start - reach), min(len(x), start + window + reach)
    now, then = x[low:high], x[low - lag : high - lag]
    wrong = np.abs(now - gain * then) > 4e-5 + 0.004 * np.abs(gain * then)
    bad_before, bad_after = np.flatnonzero(wrong[: start - low + window // 2]), np.flatnonzero(wrong[start - low + window // 2 :])
    first = low + (bad_before[-1] + 1 if len(bad_before) else 0)
    last = start + window // 2 + bad_after[0] if len(bad_after) else high
    return int(first), int(last), is_tone(x[max(0, first - lag) : last], rate, TONE_RESIDUAL_RATIO * EXACT_RESIDUAL)


def is_tone(x: np.ndarray, rate: int, tolerance: float) -> bool:
    """Whether x repeats with a period shorter than any packet: correlation of its differences above 1 - tolerance."""
    d = np.diff(x)
    longest, shortest = round(0.9 * MIN_LAG_S * rate), max(2, round(0.001 * rate))
    if len(d) < 2 * longest:
        return False
    lags = np.arange(shortest, longest)
    now = d[longest:]
    correlation = np.array([_correlation(now, d[longest - lag : len(d) - lag]) for lag in lags])
    return bool(correlation.max() > 1 - tolerance)


def _correlation(now: np.ndarray, then: np.ndarray) -> float:
    return float(now @ then / np.sqrt((now @ now) * (then @ then) + 1e-20))


def approximate_repeats(
    x: np.ndarray, starts: np.ndarray, lags: np.ndarray, residual: np.ndarray, rate: int
) -> list[tuple[int, int]]:
    """Spans in which consecutive windows match at one lag, though not exactly: copies after lossy coding."""
    window, hop, spans = round(WINDOW_S * rate), HOP_S * rate * 3, []
    good = residual < APPROXIMATE_RESIDUAL
    open_spans: dict[int, list[int]] = {}  # lag -> [first start, last start, lag]
    for start, lag in sorted(zip(starts[good].tolist(), lags[good].tolist(), strict=True)):
        key = next((k for k in (lag, lag - 1, lag + 1) if k in open_spans and start - open_spans[k][1] <= hop), None)
        if key is None:
            open_spans[lag] = [start, start, lag]
            spans.append(open_spans[lag])
        else:
            open_spans[key][1] = start
    long = [(a, b + window, lag) for a, b, lag in spans if b - a + window >= MIN_APPROXIMATE_S * rate]
    copies = [(a, b) for a, b, lag in long if min_band_correlation(x, a, b, lag, rate) > BAND_CORRELATION]
    return [(a, b) for a, b in copies if not is_tone(x[max(0, a - window) : b], rate, APPROXIMATE_RESIDUAL)]


def min_band_correlation(x: np.ndarray, start: int, end: int, lag: int, rate: int) -> float:
    """Correlation of x[start:end] with the audio one lag before, in the band of BANDS_HZ in which it is lowest."""
    pad = round(WINDOW_S * rate)
    first = max(0, start - lag - pad)
    part, at = x[first : end + pad], start - first
    size = fast_length(len(part))
    spectrum, hz = np.fft.rfft(part, size), np.fft.rfftfreq(size, 1 / rate)
    bands = [(low, high) for low, high in zip(BANDS_HZ, BANDS_HZ[1:], strict=False) if 2 * high <= rate]
    parts = [np.fft.irfft(spectrum * ((hz >= low) & (hz < high)), size) for low, high in bands]
    return min((_correlation(y[at : at + end - start], y[at - lag : at - lag + end - start]) for y in parts), default=0.0)
