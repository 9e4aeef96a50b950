"""Two waveforms and a gap -> numbers; many numbers -> means with intervals.

Whole clip, against the recording: PESQ as MOS-LQO of the `pesq` package (0.0.4, the ITU-T P.862 C code), narrow band at 8 kHz
and wide band at 16 kHz, two scales that never share a column; STOI and ESTOI of `pystoi` (0.4.1; Taal et al. 2011, Jensen and
Taal 2016). In the gap: log-mel L1 in dB by one front end for every system, the paper's mel at 8 kHz. Text: `jiwer` (4.0.0),
through decode.py. The versions are those the tests run with. What cannot be computed is None and says why; no clip is left out.

Workers of `score_many` import this file, so jax is imported only inside the functions that need it.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from avsi_jax import decode, media, spec, text
from avsi_jax.workers import light_start

GAP_PRESET = "paper"  # the front end of gap_l1_db, whatever the system's own preset
RATES = (8_000, 16_000)  # Hz, what PESQ is defined for
QUALITY = ("pesq_nb", "pesq_wb", "stoi", "estoi")  # whole clip
SCORES = ("gap_l1_db", *QUALITY)
BATCH_SIZE = 32  # clips whose gap error is computed at once


class Item(NamedTuple):
    """What `score` takes; a plain tuple or dict will do."""

    reference: np.ndarray  # (N,) float32, the recording
    degraded: np.ndarray  # (N,) float32
    rate: int  # Hz, 8000 or 16000
    gap_s: tuple[float, float]  # [start, end) from the first sample


# ---- one clip ----------------------------------------------------------------------------------------------------------------


def score(reference: np.ndarray, degraded: np.ndarray, rate: int, gap_s: tuple[float, float]) -> dict:
    """All SCORES of one clip, and `reason`: '' or why some of them are None.

    reference, degraded (N,) float32 at `rate` Hz (8000 or 16000); gap_s [start, end) seconds. pesq_nb, pesq_wb (16 kHz only),
    stoi and estoi are of the whole clip; gap_l1_db counts the frames whose centre lies in the gap. Silent, short or non-finite
    sound is a row with a reason; ValueError where shapes, types, rate or gap are wrong. PESQ's C code can end the process:
    `score_many` is safe from that.
    """
    _check(item := Item(reference, degraded, rate, gap_s))
    return _row(_quality(reference, degraded, rate), _gap_errors([item], 1)[0])


def _check(item: Item, name: str = "score") -> None:
    """ValueError where an item could never be scored, whatever it sounds like."""
    for which, x in (("reference", item.reference), ("degraded", item.degraded)):
        if not isinstance(x, np.ndarray) or x.ndim != 1 or x.dtype != np.float32:
            found = f"{type(x).__name__} {getattr(x, 'dtype', '')} {getattr(x, 'shape', '')}".strip()
            raise ValueError(f"{name}: {which} is {found}, expected a float32 numpy array (N,); media.mono gives one")
    if len(item.reference) != len(item.degraded):
        raise ValueError(f"{name}: {len(item.reference)} reference and {len(item.degraded)} degraded samples, expected as many")
    if item.rate not in RATES:
        raise ValueError(f"{name}: rate {item.rate} Hz, expected 8000 or 16000; media.resample converts")
    start, end = item.gap_s
    if not 0 <= start < end < math.inf:
        raise ValueError(f"{name}: gap {start} to {end} s, expected 0 <= start < end")


def _row(quality: dict, gap_error: float) -> dict:
    """Whole-clip and in-gap results as one row."""
    if math.isfinite(gap_error):
        return {"gap_l1_db": gap_error, **quality}
    reason = "; ".join(filter(None, [quality["reason"], "gap_l1_db: no finite frame has its centre in the gap"]))
    return {"gap_l1_db": None, **quality, "reason": reason}


def _quality(reference: np.ndarray, degraded: np.ndarray, rate: int) -> dict:
    """PESQ and STOI of one clip, with `reason`; never raises for what the clip sounds like. numpy only: runs in the workers."""
    row = dict.fromkeys(QUALITY)
    if fault := _fault(reference, degraded):
        return {**row, "reason": fault}
    reasons = []
    for metric, compute in _computations(reference, degraded, rate).items():
        try:
            value = compute()
            if not math.isfinite(value):
                raise ValueError(f"came out as {value}")
            row[metric] = value
        except Exception as e:  # pesq raises PesqError and plain ValueError, pystoi plain Exception
            reasons.append(f"{metric}: {_line(e)}")
    return {**row, "reason": "; ".join(reasons)}


def _fault(reference, degraded) -> str:
    """Why nothing at all can be computed, or ''."""
    for which, x in (("reference", reference), ("degraded", degraded)):
        if not len(x) or not np.isfinite(x).all():
            return f"the {which} sound " + ("holds NaN or infinite samples" if len(x) else "is empty")
    return "" if reference.any() else "the reference sound is silent"


def _computations(reference, degraded, rate) -> dict[str, Callable[[], float]]:
    """Metric -> how to compute it, without those that the rate does not allow."""
    low = [media.resample(x, rate, 8_000) for x in (reference, degraded)]
    todo = {"pesq_nb": lambda: _pesq(*low, 8_000, "nb")}
    if rate == 16_000:
        todo["pesq_wb"] = lambda: _pesq(reference, degraded, rate, "wb")
    todo["stoi"] = lambda: _stoi(reference, degraded, rate, extended=False)
    todo["estoi"] = lambda: _stoi(reference, degraded, rate, extended=True)
    return todo


def _pesq(reference, degraded, rate, mode) -> float:
    """MOS-LQO (1.0 to 4.6). Always of float32: the package scores the same sound as int16 differently."""
    import pesq

    if not degraded.any():
        raise ValueError("the degraded sound is silent")
    return float(pesq.pesq(rate, reference, degraded, mode))


def _stoi(reference, degraded, rate, *, extended) -> float:
    """-1 to 1. pystoi adds 1e-16 of numpy's global noise, which decides ESTOI in digital silence: seeded, so that it repeats.

    (Unseeded it moved by 0.003 on one damaged clip; with another number of BLAS threads it may still move by 1e-6.)
    """
    import pystoi

    state = np.random.get_state()
    np.random.seed(0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Not enough STFT frames")
            return float(pystoi.stoi(reference, degraded, rate, extended=extended))
    finally:
        np.random.set_state(state)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).removeprefix("b'").rstrip("'").split(". Please")[0] or type(error).__name__


def character_error(reference_text: str, said: str) -> float:
    """Character edits, spaces count, over the reference's characters: 0 to 1 or more; NaN without a reference."""
    return float(decode.character_error_rate([(said, reference_text)]).rates[0])


def word_error(reference_text: str, said: str) -> float:
    """Word edits over the reference's words: 0 to 1 or more; NaN without a reference."""
    return float(decode.word_error_rate([(said, reference_text)]).rates[0])


def phone_error(reference_text: str, said: str) -> float:
    """Phone edits of what was said ("B IH N ...") over the phones of the reference's words; NaN where those aren't Grid's."""
    try:
        reference = " ".join(text.phones_of(reference_text))
    except ValueError:
        return math.nan
    return float(decode.phone_error_rate([(said, reference)]).rates[0])


# ---- in the gap --------------------------------------------------------------------------------------------------------------


def gap_l1_db(reference, degraded, centred):
    """Mean |difference| of two sounds' log-mels in dB, over all bands of the frames `centred`: jnp (B,), NaN for no frame.

    reference, degraded (B, N) float32 at 8 kHz; centred (B, F) bool, as of `gaps.centred_frames`, F = 1 + N // 160. The front
    end is preset 'paper': 64 Slaney mel bands of the sound pre-emphasised by 0.97, 40 ms windows every 20 ms, -80 to 0 dB.
    """
    shapes = [x.shape for x in (reference, degraded, centred)]
    b, n = shapes[0][0], shapes[0][-1]
    if shapes != [(b, n), (b, n), (b, spec.get(GAP_PRESET).frames_of(n))]:
        raise ValueError(f"gap_l1_db: found {shapes}, expected (B, N), (B, N) and (B, 1 + N // 160)")
    return _gap_l1_db()(reference, degraded, centred)


@functools.cache
def _gap_l1_db():
    """The compiled body of `gap_l1_db`."""
    import jax
    import jax.numpy as jnp

    from avsi_jax import stft

    preset = spec.get(GAP_PRESET)

    def error(reference, degraded, centred):
        decibel = [stft.to_db(stft.log_mel(x, preset), preset) for x in (reference, degraded)]
        of_frame = jnp.abs(decibel[0] - decibel[1]).mean(-1)
        return jnp.where(centred, of_frame, 0.0).sum(-1) / centred.sum(-1)

    return jax.jit(error)


def _gap_errors(items: Sequence[Item], size: int) -> list[float]:
    """`gap_l1_db` of each of up to `size` items; NaN where no frame is centred in the gap or the sound is not finite.

    Clips are padded to whole seconds and stacked to `size` rows, so that a run compiles once or twice.
    """
    lengths = [-(-len(item.reference) // item.rate) for item in items]
    errors = np.full(len(items), math.nan)
    for seconds in set(lengths):
        members = [i for i, length in enumerate(lengths) if length == seconds]
        inputs = [_gap_input(items[i], seconds) for i in members]
        inputs += inputs[:1] * (size - len(inputs))
        errors[members] = np.asarray(gap_l1_db(*map(np.stack, zip(*inputs))))[: len(members)]
    return errors.tolist()


def _gap_input(item: Item, seconds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row for `gap_l1_db`: sounds at 8 kHz padded to whole seconds, and the frames inside both gap and clip."""
    from avsi_jax import gaps

    preset = spec.get(GAP_PRESET)
    sounds = [media.resample(x, item.rate, preset.rate) for x in item[:2]]
    length, frames = seconds * preset.rate, preset.frames_of(seconds * preset.rate)
    gap = np.array([[round(t * spec.RECORD_RATE) for t in item.gap_s]])
    centred = np.asarray(gaps.centred_frames(gap, preset, frames)) & (np.arange(frames) * preset.hop < len(sounds[0]))
    return *(np.pad(x, (0, length - len(x))) for x in sounds), centred


# ---- many clips --------------------------------------------------------------------------------------------------------------


def score_many(
    items: Iterable[Item | tuple | dict], workers: int | None = None, progress: Callable[[int, int | None], None] | None = None
) -> list[dict]:
    """`score` of every item, in their order, over `workers` processes (None: one a core; 0: in this process).

    Items may come from a generator: it is read as workers get free, and nothing is kept of a scored clip. A clip that ends its
    process (the C code of PESQ) gets a row with that reason, all others are scored. progress(done, total) is called after each
    clip, total None for a generator. ValueError names the first item that is ill-formed.
    """
    quality, errors = {}, []  # index -> of _quality; a gap error an item
    total = len(items) if hasattr(items, "__len__") else None

    def keep(i, result):
        quality[i] = result or {**dict.fromkeys(QUALITY), "reason": "PESQ or STOI crashed its process"}
        if progress:
            progress(len(quality), total)

    calls = _noting_gap_errors(items, errors)
    if workers == 0:
        for i, arguments in calls:
            keep(i, _quality(*arguments))
    else:
        _over_processes(_quality, calls, workers or os.cpu_count() or 1, keep)
    return [_row(quality[i], error) for i, error in enumerate(errors)]


def _noting_gap_errors(items, errors: list[float]) -> Iterator[tuple[int, tuple]]:
    """(index, arguments of `_quality`) of every item, checked; gap errors are put into `errors` on the way."""
    batch: list[Item] = []
    for i, item in enumerate(items):
        _check(item := Item(**item) if isinstance(item, dict) else Item(*item), f"item {i}")
        batch.append(item)
        if len(batch) == BATCH_SIZE:
            errors += _gap_errors(batch, BATCH_SIZE)
            batch.clear()
        yield i, item[:3]
    errors += _gap_errors(batch, BATCH_SIZE)


def _over_processes(work: Callable, calls: Iterator[tuple[int, tuple]], workers: int, keep: Callable) -> None:
    """keep(i, work(*arguments)) for every call (i, arguments), in any order; keep(i, None) where work ended its process."""
    suspects = _until_crash(work, calls, workers, keep)
    while suspects:  # a crash takes all running calls with it: these again, one at a time, to see whose it was
        alone = iter(suspects.items())
        while crashed := _until_crash(work, alone, 1, keep):
            keep(next(iter(crashed)), None)
        suspects = _until_crash(work, calls, workers, keep)


def _until_crash(work, calls: Iterator[tuple[int, tuple]], workers: int, keep) -> dict[int, tuple]:
    """Works calls off in a pool; returns those that were running when a process died (one, if workers is 1), {} at the end."""
    running: dict = {}  # future -> index
    arguments: dict[int, tuple] = {}  # of calls without a result
    with futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            while True:
                for i, call in itertools.islice(calls, (4 * workers if workers > 1 else 1) - len(running)):
                    arguments[i] = call
                    with light_start():
                        running[pool.submit(work, *call)] = i
                if not running:
                    return {}
                for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                    result, i = future.result(), running.pop(future)
                    del arguments[i]
                    keep(i, result)
        except BrokenProcessPool:
            return arguments


# ---- means and intervals -----------------------------------------------------------------------------------------------------


def bootstrap_mean(values, n: int = 2000, seed: int = 0, groups=None) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its 95 % percentile bootstrap interval (Efron & Tibshirani 1993) from n resamples.

    values (C,), one a clip; NaN is left out (`summarise` counts it). groups (C,): resamples groups (speakers), then the clips
    of each one drawn, so that the interval speaks of speakers not heard. Same input, same interval; NaN for no values.
    """
    values = np.asarray(values, np.float64)
    known = ~np.isnan(values)
    if not known.any():
        return math.nan, math.nan, math.nan
    parts = [values[known]]
    if groups is not None:
        labels = np.asarray(groups)[known]
        parts = [values[known][labels == label] for label in sorted(set(labels.tolist()))]
    low, high = np.percentile(_resampled_means(parts, n, np.random.default_rng(seed)), [2.5, 97.5])
    return float(values[known].mean()), float(low), float(high)


def _resampled_means(parts: list[np.ndarray], n: int, generator) -> np.ndarray:
    """(n,) means of clips drawn with replacement from parts that were drawn with replacement."""
    total, count = np.zeros((2, n))
    drawn = generator.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), size=n)  # how often each part
    for part, times in zip(parts, drawn.T):
        for repeat in range(times.max()):
            rows = np.flatnonzero(times > repeat)
            for some in np.array_split(rows, -(-len(rows) * len(part) // 4_000_000)):  # 32 MB at a time
                total[some] += part[generator.integers(len(part), size=(len(some), len(part)), dtype=np.int32)].sum(1)
            count[rows] += len(part)
    return total / count


def paired_difference(a, b, n: int = 2000, seed: int = 0, groups=None) -> tuple[float, float, float]:
    """`bootstrap_mean` of a - b, (C,) each, over clips that have both; a is "above b" where the whole interval is above 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired_difference: found {a.shape} and {b.shape} values, expected the same clips on both sides")
    return bootstrap_mean(a - b, n, seed, groups)


def summarise(
    rows: Sequence[dict], metrics: Sequence[str], pairs: Sequence[tuple[str, str]], *, by_speaker: bool = False
) -> dict[str, list[dict]]:
    """Rows of clips.csv -> {"table": mean of each gap length, system and metric, "paired": a - b of each pair}, with intervals.

    rows have clip_id, speaker, gap_ms, system and metrics (number, text of one, None or ''); a clip has one row a gap length
    and system. by_speaker resamples speakers first: for speakers not trained on. `n` counts the values behind a mean, `missing`
    the rows (in pairs: shared clips) without one; a metric without any value is left out. Order: gap length, system, metric.
    """
    cells: dict = collections.defaultdict(dict)  # (gap_ms, system) -> clip_id -> row
    for row in rows:
        if cells[int(row["gap_ms"]), row["system"]].setdefault(row["clip_id"], row) is not row:
            raise ValueError(f"two rows of {row['clip_id']}, {row['gap_ms']} ms, {row['system']}; expected one")
    systems = dict.fromkeys(system for _, system in cells)
    summary: dict = {"table": [], "paired": []}
    for g in sorted({gap_ms for gap_ms, _ in cells}):
        for s in systems:
            summary["table"] += [{"gap_ms": g, "system": s, **e} for e in _estimates(cells[g, s], None, metrics, by_speaker)]
        for a, b in pairs:
            both = _estimates(cells[g, a], cells[g, b], metrics, by_speaker)
            summary["paired"] += [{"gap_ms": g, "a": a, "b": b, **e} for e in both]
    return summary


def _estimates(of: dict, minus: dict | None, metrics, by_speaker: bool) -> Iterator[dict]:
    """Mean and interval of each metric that has values, of clips (id -> row), or of their difference from other rows."""
    clips = sorted(of if minus is None else of.keys() & minus.keys())
    speakers = [of[clip]["speaker"] for clip in clips] if by_speaker else None
    for metric in metrics:
        values = np.array([number(of[clip].get(metric)) for clip in clips])
        if minus is not None:
            values -= [number(minus[clip].get(metric)) for clip in clips]
        missing = int(np.isnan(values).sum())
        if missing < len(clips):
            mean, low, high = bootstrap_mean(values, groups=speakers)
            yield {"metric": metric, "mean": mean, "low": low, "high": high, "n": len(clips) - missing, "missing": missing}


def number(cell) -> float:
    """A cell of clips.csv as a number; NaN for None and ''."""
    return math.nan if cell in (None, "") else float(cell)
