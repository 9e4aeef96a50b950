"""Evaluates audio/gap_detection.py on Grid clips with artificial gaps of known position (docs/gap_detection.md).

    python -m benchmarks.quality.gap_detection RAW [--skip IDS.txt] [--half report|choose] [--clips N] [--jobs 2]

RAW holds sN/ID.mpg. Clips are divided in halves by a hash of their id: thresholds were chosen on one half, the table is for the
other. Each kind of damage is applied once to each clip, at a sample rate, number of channels and coding drawn by the id. A gap is
detected if its intersection over union (IoU) with a detected one is at least a half, without tolerance for edges that coding has
smeared. A gap in a pause, without speech, counts neither as missed nor, if detected, as a false alarm.
"""

from __future__ import annotations

import argparse
import collections
import io
import multiprocessing
import pathlib
import zlib
from collections.abc import Sequence

import numpy as np
from scipy import signal

from avsi_jax.audio import gap_detection
from avsi_jax.media import clip_io

KINDS = ("silence", "constant", "packets", "repeat", "scaled repeat", "clipped")
CODINGS = ("wav", "mp2", "aac", "opus")
ALL_RATES = (8000, 16000, 44100, 48000)
RATES = {"wav": ALL_RATES, "mp2": (16000, 44100, 48000), "aac": ALL_RATES, "opus": (8000, 16000, 48000)}
CODECS = {"mp2": ("mp2", "mp2", 64_000), "aac": ("aac", "mp4", 64_000), "opus": ("libopus", "ogg", 32_000)}  # bit/s per channel
OVERLAP = 0.5  # intersection over union
SPEECH_DB, LEVEL_S, HUM_HZ = 30.0, 0.01, 150  # audio more than SPEECH_DB below the clip's speech is a pause


def half_of(clip_id: str) -> str:
    """The half that a clip belongs to."""
    return ("choose", "report")[zlib.crc32(clip_id.encode()) % 2]


def draw_spans(
    rng: np.random.Generator, count: int, shortest_s: float, longest_s: float, duration_s: float
) -> list[tuple[float, float]]:
    """`count` spans of log-uniform length, at least 0.1 s apart and 0.15 s from the ends; fewer where they do not fit."""
    lengths = np.exp(rng.uniform(np.log(shortest_s), np.log(longest_s), count))
    while lengths.sum() > 0.5 * duration_s:
        lengths = lengths[:-1] if len(lengths) > 1 else lengths / 2
    free = duration_s - 0.3 - lengths.sum() - 0.1 * (len(lengths) - 1)
    before = np.sort(rng.uniform(0, free, len(lengths)))
    starts = 0.15 + before + np.r_[0, np.cumsum(lengths + 0.1)[:-1]]
    return list(zip(starts, starts + lengths, strict=True))


def apply_damage(x: np.ndarray, rate: int, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Audio (N, C) -> (N, C) with gaps, and the gaps as [start, end) in samples."""
    y, truth, duration_s = x.copy(), [], len(x) / rate
    if kind == "packets":
        return _drop_packets(y, rate, rng)
    longest = {"clipped": 0.3, "repeat": 0.4, "scaled repeat": 0.4}.get(kind, 1.5)
    for a, b in draw_spans(rng, rng.integers(1, 5), 0.02, longest, duration_s):
        start, end = round(a * rate), round(b * rate)
        if kind == "silence":
            y[start:end] = 0
        elif kind == "constant":
            y[start:end] = y[start - 1]
        elif kind == "clipped":
            y[start:end] = np.clip(x[start:end] * 10 ** (rng.uniform(18, 30) / 20), -1, 1)
            full = np.flatnonzero(np.abs(y[start:end, 0]) == 1)
            if len(full) < 0.1 * (end - start):
                y[start:end] = x[start:end]  # a pause does not clip
                continue
            start, end = start + int(full[0]), start + int(full[-1]) + 1
        else:
            period = round(rng.uniform(0.01, min(0.06, b - a)) * rate)
            end = start + max(1, round((end - start) / period)) * period
            gain = 1.0 if kind == "repeat" else rng.uniform(0.7, 0.95)
            for n in range(start, end, period):
                y[n : n + period] = gain * y[n - period : n]
        truth.append((start, end))
    return y, truth


def _drop_packets(y: np.ndarray, rate: int, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, int]]]:
    packet = round(rng.choice([0.02, 0.03]) * rate)
    missing, n = np.zeros(len(y) // packet, bool), int(rng.integers(6, 30))
    for _ in range(rng.integers(3, 9)):
        size = int(rng.integers(1, 3))
        missing[n : n + size] = True
        n += size + int(rng.integers(1, 20))
    missing[-6:] = False
    y[: len(missing) * packet][np.repeat(missing, packet)] = 0
    edges = np.flatnonzero(np.diff(np.r_[False, missing, False].astype(int))) * packet
    return y, list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def encode_and_decode(x: np.ndarray, rate: int, coding: str) -> tuple[np.ndarray, int]:
    """(N, C) -> (N', C) after coding and decoding, and its rate, which for Opus is always 48 kHz."""
    if coding == "wav":
        return np.clip(np.round(x * 32768), -32768, 32767).astype(np.float32) / 32768, rate
    import av

    codec, container, bits = CODECS[coding]
    file, layout = io.BytesIO(), "mono" if x.shape[1] == 1 else "stereo"
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        stream.bit_rate = bits * x.shape[1]
        frame = av.AudioFrame.from_ndarray(np.clip(np.ascontiguousarray(x.T), -1, 1).astype(np.float32), "fltp", layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, layout, rate)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    file.seek(0)
    with av.open(file) as container_in:
        parts = [np.atleast_2d(f.to_ndarray()) for f in container_in.decode(audio=0)]
        decoded_rate = container_in.streams.audio[0].rate
    y = np.concatenate(parts, 1)
    y = y.T if len(y) == x.shape[1] else y.reshape(-1, x.shape[1])
    return (y.astype(np.float32) / 32768 if y.dtype == np.int16 else y.astype(np.float32)), decoded_rate


def lag(x: np.ndarray, y: np.ndarray) -> int:
    """Samples by which y lags x."""
    a, b = x[:, 0], y[:, 0]
    return int(np.argmax(signal.correlate(b, a, "full", "fft"))) - (len(a) - 1)


def convert(samples: np.ndarray, rate: int, wanted: int, channels: int) -> np.ndarray:
    """The audio at another rate, with one or two channels."""
    x = clip_io.resample(clip_io.mono(samples), rate, wanted).reshape(-1, 1)
    return np.concatenate([x, 0.8 * x], 1) if channels == 2 else x


def matches(truth: list[tuple[int, int]], detected: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs (index of truth, index of detected) with IoU >= OVERLAP."""
    pairs = []
    for i, (a, b) in enumerate(truth):
        for j, (c, d) in enumerate(detected):
            both = min(b, d) - max(a, c)
            if both > 0 and both >= OVERLAP * (max(b, d) - min(a, c)):
                pairs.append((i, j))
    return pairs


def contains_speech(x: np.ndarray, rate: int, start: int, end: int) -> bool:
    """Whether undamaged x (N, C) has speech in [start, end). Hum, which is in Grid's pauses, is filtered out."""
    filtered = signal.sosfiltfilt(signal.butter(4, HUM_HZ, "highpass", fs=rate, output="sos"), x[:, 0].astype(float))
    power = signal.oaconvolve(filtered**2, np.ones(round(LEVEL_S * rate)), mode="same")
    return bool(power[start:end].max() > np.percentile(power, 95) * 10 ** (-SPEECH_DB / 10))


def score(
    truth: list[tuple[int, int]], detected: list[tuple[int, int]], num: int, rate: int, ignored: Sequence[tuple[int, int]] = ()
) -> collections.Counter:
    """Counts of one clip; times in s. ignored: gaps that may be detected or not."""
    detected = [d for d in detected if not matches(ignored, [d])]
    pairs, inside = matches(truth, detected), [np.zeros(num, bool), np.zeros(num, bool)]
    for mask, spans in zip(inside, (truth, detected), strict=True):
        for a, b in spans:
            mask[max(a, 0) : b] = True
    edges = [abs(t - f) / rate for i, j in pairs for t, f in zip(truth[i], detected[j], strict=True)]
    return collections.Counter(
        clips=1, truth=len(truth), detected=len(detected), hit=len({i for i, _ in pairs}), right=len({j for _, j in pairs}),
        truth_s=inside[0].sum() / rate, detected_s=inside[1].sum() / rate, both_s=(inside[0] & inside[1]).sum() / rate,
        edges=len(edges), edge_s=sum(edges), duration_s=num / rate,
    )  # fmt: skip


def detect(y: np.ndarray, rate: int) -> list[tuple[int, int]]:
    """The detected gaps as [start, end) in samples."""
    return [(h.start, h.end) for h in gap_detection.detect_gaps(y, rate)]


def measure_undamaged(samples: np.ndarray, rate: int, rng: np.random.Generator) -> dict[tuple[str, str], collections.Counter]:
    """False alarms: unchanged, coded again, with silence at the ends, and after a noise gate with fixed or random settings."""
    rows = {("none", "original"): score([], detect(samples, rate), len(samples), rate)}
    for coding in CODINGS:
        x = convert(samples, rate, int(rng.choice(RATES[coding])), int(rng.integers(1, 3)))
        y, decoded_rate = encode_and_decode(x, _rate_of(len(x), len(samples), rate), coding)
        rows["none", coding] = score([], detect(y, decoded_rate), len(y), decoded_rate)
    padded = np.pad(samples, ((round(rng.uniform(0.1, 0.6) * rate), round(rng.uniform(0.1, 0.6) * rate)), (0, 0)))
    rows["none", "silent ends"] = score([], detect(padded, rate), len(padded), rate)
    (other,) = rng.spawn(1)  # does not change the following draws of rng
    drawn = other.uniform(-45, -25), *np.exp(other.uniform(np.log((0.01, 0.001)), np.log((0.2, 0.02))))
    for name, settings in (("gated", (-35, 0.06, 0.005)), ("random gates", drawn)):
        closed = gated(samples, rate, *settings)
        rows["none", name] = score([], detect(closed, rate), len(closed), rate)
    return rows


def _rate_of(num: int, num_before: int, rate: int) -> int:
    return min(ALL_RATES, key=lambda r: abs(r - rate * num / num_before))


def gated(samples: np.ndarray, rate: int, closes_db: float = -35, hold_s: float = 0.06, ramp_s: float = 0.005) -> np.ndarray:
    """A noise gate with its threshold relative to the maximum: held open for hold_s, ramps of ramp_s, closed it gives zeros."""
    level = np.sqrt(signal.lfilter(*_smooth(rate), samples.astype(float).mean(1) ** 2))
    held = signal.lfilter(np.ones(round(hold_s * rate)), 1, (level > level.max() * 10 ** (closes_db / 20)).astype(float)) > 0.5
    ramp = round(ramp_s * rate)
    gain = signal.lfilter(np.ones(ramp) / ramp, 1, held.astype(float))
    return np.where(gain[:, None] > 1e-6, samples * gain[:, None], 0).astype(np.float32)


def _smooth(rate: int) -> tuple[list[float], list[float]]:
    pole = np.exp(-1 / (0.005 * rate))
    return [1 - pole], [1, -pole]


def measure(path: pathlib.Path) -> dict[tuple[str, str], collections.Counter]:
    """The counts of one clip by (damage, coding)."""
    audio = clip_io.read_clip(path, video=False).audio
    rng = np.random.default_rng(zlib.crc32(path.stem.encode()))
    rows = measure_undamaged(audio.samples, audio.rate, rng)
    for kind in KINDS:
        for coding in ("wav", CODINGS[1 + int(rng.integers(3))]):
            rate = int(rng.choice(RATES[coding]))
            x = convert(audio.samples, audio.rate, rate, int(rng.integers(1, 3)))
            y, truth = apply_damage(x, rate, kind, rng)
            z, after = encode_and_decode(y, rate, coding)
            y = y if after == rate else clip_io.resample(y[:, 0], rate, after)[:, None]
            delay = lag(y, z) if coding != "wav" else 0
            spans = {True: [], False: []}
            for a, b in truth:
                spans[contains_speech(x, rate, a, b)].append((round(a * after / rate) + delay, round(b * after / rate) + delay))
            rows[kind, coding] = score(spans[True], detect(z, after), len(z), after, spans[False])
    return rows


def summary(kind: str, coding: str, row: collections.Counter) -> str:
    """A row of the Markdown table."""
    if kind == "none":
        minutes = row["duration_s"] / 60
        return f"| {kind} | {coding} | {row['clips']} | | | {row['detected']} in {minutes:.0f} min | | | |"
    pairs = (("hit", "truth"), ("right", "detected"), ("both_s", "truth_s"), ("both_s", "detected_s"))
    share = [row[a] / max(row[b], 1e-9) for a, b in pairs]
    numbers = " | ".join(f"{100 * s:.1f}" for s in share)
    edge = 1000 * row["edge_s"] / max(row["edges"], 1)
    return f"| {kind} | {coding} | {row['clips']} | {row['truth']} | {numbers} | {edge:.1f} |"


def clips_of(raw: pathlib.Path, skip: set[str], half: str) -> list[pathlib.Path]:
    """The clips of a half in a fixed random order."""
    paths = [p for p in sorted(raw.glob("s*/*.mpg")) if p.stem not in skip and half_of(p.stem) == half]
    return sorted(paths, key=lambda p: zlib.crc32(p.stem.encode()[::-1]))


def main(argv: list[str] | None = None) -> int:
    """The command `python -m benchmarks.quality.gap_detection`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", type=pathlib.Path, help="folder of sN/ID.mpg")
    parser.add_argument("--skip", type=pathlib.Path, help="file of clip ids to leave out, one per line")
    parser.add_argument("--half", choices=("choose", "report"), default="report", help="half of the clips (default: %(default)s)")
    parser.add_argument("--clips", type=int, help="number of clips of the half (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes (default: %(default)s)")
    args = parser.parse_args(argv)
    paths = clips_of(args.raw, set(args.skip.read_text().split()) if args.skip else set(), args.half)[: args.clips]
    table = collections.defaultdict(collections.Counter)
    with multiprocessing.Pool(args.jobs) as pool:
        for rows in pool.imap_unordered(measure, paths, 4):
            for key, row in rows.items():
                table[key].update(row)
    print("| gap | coding | clips | gaps | recall % | precision % | recall % of samples | precision % of samples | edge ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    order = ("none", *KINDS, "original", *CODINGS, "silent ends", "gated", "random gates")
    for key in sorted(table, key=lambda k: [order.index(part) for part in k]):
        print(summary(*key, table[key]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
