"""Scores of restored audio against the recording, for one clip or for many in worker processes.

Whole clip: PESQ as MOS-LQO of the `pesq` package (0.0.4, the ITU-T P.862 C code), narrow band at 8 kHz and wide band at 16 kHz,
two scales that never share a column; STOI and ESTOI of `pystoi` (0.4.1; Taal et al. 2011, Jensen and Taal 2016). In the gaps:
log-mel L1 in dB by one front end for every system, the paper's mel at 8 kHz (tested against librosa 0.11.0); STOI of each gap with
200 ms on either side; and the level against that of the recording. Without the recording, if asked for: the listener models PLCMOS
and DNSMOS (evaluation/listener_models.py). Text: `jiwer` (4.0.0), through models/ctc_decoding.py. These are the versions of the
tests. A score that cannot be computed is None, with a reason; no clip is left out. Means and intervals are computed in
evaluation/bootstrap.py.

Workers of `score_many` import this file, so jax is imported only inside the functions that need it.

Letters: B clips, N samples, F spectrogram frames.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from avsi_jax import presets
from avsi_jax.data import grid_text
from avsi_jax.evaluation import listener_models as listeners
from avsi_jax.media import clip_io
from avsi_jax.models import ctc_decoding
from avsi_jax.runtime import process_pool as pool

if TYPE_CHECKING:
    import jax
    from numpy.typing import ArrayLike

GAP_PRESET = "paper"  # the front end of gap_l1_db, whatever the system's own preset
RATES = (8_000, 16_000)  # Hz, what PESQ is defined for
QUALITY = ("pesq_nb", "pesq_wb", "stoi", "estoi", "stoi_gap", "level_error_db", *listeners.NAMES)  # computed in the workers
SCORES = ("gap_l1_db", *QUALITY)
AROUND_S = 0.2  # of audio on either side of a gap that stoi_gap includes
LEVEL_FLOOR = 1e-4  # RMS, of full scale 1: quieter gaps count as -80 dB
SSIM_WINDOW = 7  # frames and bands
STOI_RATE = 10_000  # Hz, what STOI is defined at
BATCH_SIZE = 32  # clips whose gap error is computed at once
AHEAD = 8  # clips queued per worker, so that it stays busy while a batch is restored
PAIR_TIMEOUT_S, PAIR_MEMORY_MB = 60, 1024  # far above what any valid clip needs: one of 3 s takes 0.1 s and 20 MB


class Item(NamedTuple):
    """The arguments of `score`; a plain tuple or dict is accepted too."""

    reference: np.ndarray  # (N,) float32, the recording
    degraded: np.ndarray  # (N,) float32
    rate: int  # Hz, 8000 or 16000
    gaps_s: Sequence[tuple[float, float]]  # one or more [start, end) from the first sample


# ---- one clip ----------------------------------------------------------------------------------------------------------------


def score(
    reference: np.ndarray,
    degraded: np.ndarray,
    rate: int,
    gaps_s: Sequence[tuple[float, float]],
    listener_models: Sequence[str] = (),
) -> dict:
    """All SCORES of one clip, and `reason`: '' or why some of them are None or cover only part of the gaps.

    reference, degraded (N,) float32 at `rate` Hz (8000 or 16000); gaps_s one or more [start, end) in seconds. pesq_nb, pesq_wb
    (16 kHz only), stoi and estoi are of the whole clip, stoi_gap, level_error_db and gap_l1_db of the gaps. listener_models: of
    "plcmos" and "dnsmos" (16 kHz only), those wanted; the others are None. Silent, short or non-finite audio gives a reason;
    ValueError for wrong shapes, types, rate or gaps. PESQ's C code can crash or hang: `score_many` isolates it.
    """
    _check(item := Item(reference, degraded, rate, gaps_s))
    return _row(_quality(*item, listener_models=tuple(listener_models)), _gap_errors([item], 1)[0])


def _check(item: Item, name: str = "score") -> None:
    """ValueError for an item of a wrong shape, type, rate or gap."""
    for which, x in (("reference", item.reference), ("degraded", item.degraded)):
        if not isinstance(x, np.ndarray) or x.ndim != 1 or x.dtype != np.float32:
            found = f"{type(x).__name__} {getattr(x, 'dtype', '')} {getattr(x, 'shape', '')}".strip()
            raise ValueError(f"{name}: {which} is {found}, expected a float32 numpy array (N,), as from clip_io.mono")
    if len(item.reference) != len(item.degraded):
        raise ValueError(
            f"{name}: {len(item.reference)} reference and {len(item.degraded)} degraded samples, expected the same number"
        )
    if item.rate not in RATES:
        raise ValueError(f"{name}: rate {item.rate} Hz, expected 8000 or 16000; convert it with clip_io.resample")
    try:
        pairs = [(float(start), float(end)) for start, end in item.gaps_s]
    except (TypeError, ValueError):
        pairs = []
    if not pairs:
        raise ValueError(f"{name}: gaps_s is {item.gaps_s!r}, expected (start, end) of one gap or more, as in ((0.5, 0.8),)")
    for start, end in pairs:
        if not 0 <= start < end < math.inf:
            raise ValueError(f"{name}: gap {start} to {end} s, expected 0 <= start < end")


def _row(quality: dict, gap_error: float) -> dict:
    """Whole-clip and in-gap results as one row."""
    if math.isfinite(gap_error):
        return {"gap_l1_db": gap_error, **quality}
    reason = "; ".join(filter(None, [quality["reason"], "gap_l1_db: no finite frame is centred in a gap"]))
    return {"gap_l1_db": None, **quality, "reason": reason}


def _quality(reference: np.ndarray, degraded: np.ndarray, rate: int, gaps_s, listener_models: tuple[str, ...] = ()) -> dict:
    """QUALITY of one clip, with `reason`; never raises because of the audio. NumPy only: runs in the workers."""
    row = dict.fromkeys(QUALITY)
    if reason := _unusable(reference, degraded):
        return {**row, "reason": reason}
    reasons = []
    for metric, compute in _computations(reference, degraded, rate, gaps_s, reasons, listener_models).items():
        try:
            value = compute()
            if not math.isfinite(value):
                raise ValueError(f"result is {value}")
            row[metric] = value
        except Exception as e:  # pesq raises PesqError and plain ValueError, pystoi plain Exception
            reasons.append(f"{metric}: {_line(e)}")
    return {**row, "reason": "; ".join(reasons)}


def _unusable(reference, degraded) -> str:
    """Why no score can be computed, or ''."""
    for which, x in (("reference", reference), ("degraded", degraded)):
        if not len(x) or not np.isfinite(x).all():
            return f"the {which} audio " + ("contains NaN or infinite samples" if len(x) else "is empty")
    return "" if reference.any() else "the reference audio is silent"


def _computations(reference, degraded, rate, gaps_s, notes: list[str], listener_models) -> dict[str, Callable[[], float]]:
    """Metric -> function that computes it, for metrics defined at this rate; the functions may add to `notes`."""
    low = [clip_io.resample(x, rate, 8_000) for x in (reference, degraded)]
    todo = {"pesq_nb": lambda: _pesq(*low, 8_000, "nb")}
    if rate == 16_000:
        todo["pesq_wb"] = lambda: _pesq(reference, degraded, rate, "wb")
    at_stoi_rate = _for_stoi(reference, degraded, rate)
    todo["stoi"] = lambda: _stoi(*at_stoi_rate, extended=False)
    todo["estoi"] = lambda: _stoi(*at_stoi_rate, extended=True)
    todo["stoi_gap"] = lambda: _stoi_gap(reference, degraded, rate, gaps_s, notes)
    todo["level_error_db"] = lambda: _level_error(reference, degraded, rate, gaps_s)
    if rate == listeners.RATE:
        for name in listener_models:
            todo[name] = functools.partial(getattr(listeners, name), degraded)
    return todo


def _pesq(reference, degraded, rate, mode) -> float:
    """MOS-LQO (1.0 to 4.6) of pesq 0.0.4. Always from float32: the package scores the same audio as int16 differently."""
    import pesq

    if not degraded.any():
        raise ValueError("the degraded audio is silent")
    return float(pesq.pesq(rate, reference, degraded, mode))


def _for_stoi(reference, degraded, rate) -> list[np.ndarray]:
    """Both waveforms resampled as pystoi.stoi itself does it: once for STOI and ESTOI, which then need not."""
    from pystoi import utils

    return [utils.resample_oct(x, STOI_RATE, rate) for x in (reference, degraded)]


def _stoi(reference, degraded, *, extended) -> float:
    """-1 to 1, of pystoi 0.4.1, for audio at STOI_RATE. ValueError where pystoi would warn and return 1e-5: too little speech.

    pystoi adds 1e-16 of numpy's global noise, which determines ESTOI in digital silence: seeded here, so that results repeat.
    (Unseeded it varied by 0.003 on one masked clip; with another number of BLAS threads it may still vary by 1e-6.)
    """
    import pystoi

    state = np.random.get_state()
    np.random.seed(0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Not enough STFT frames")
            if len(reference) < 0.4 * STOI_RATE:  # 30 frames need more; pystoi's error for a few samples is unclear
                raise RuntimeWarning
            return float(pystoi.stoi(reference, degraded, STOI_RATE, extended=extended))
    except RuntimeWarning:
        raise ValueError("fewer than 30 frames (0.4 s) of speech in the reference") from None
    finally:
        np.random.set_state(state)


def _stoi_gap(reference, degraded, rate, gaps_s, notes: list[str]) -> float:
    """STOI of each gap with AROUND_S on either side, cut out and then compared (pystoi 0.4.1); mean weighted by duration.

    An excerpt with too little speech is left out and noted in `notes`; that depends only on the recording, so it is the same for
    every system. ValueError where no excerpt remains.
    """
    parts, values, weights = _excerpts(gaps_s, rate, len(reference)), [], []
    for start, end in parts:
        cut = [x[start:end] for x in (reference, degraded)]
        try:
            values.append(_stoi(*_for_stoi(*cut, rate), extended=False) if cut[0].any() else math.nan)
        except ValueError:
            values.append(math.nan)
        weights.append(end - start)
    known = ~np.isnan(values)
    if not known.any():
        raise ValueError("too little speech in and around the gaps" if parts else "no gap begins in the clip")
    if not known.all():
        notes.append(f"stoi_gap: only {known.sum()} of {len(parts)} excerpts, the others contain too little speech")
    return float(np.average(np.array(values)[known], weights=np.array(weights)[known]))


def _level_error(reference, degraded, rate, gaps_s) -> float:
    """Level of the degraded audio in all gaps together minus that of the recording, in dB: negative if it is too quiet.

    A level is the root of the mean square, LEVEL_FLOOR at least. ValueError where no gap begins in the clip.
    """
    gap_parts = [slice(round(start * rate), round(end * rate)) for start, end in gaps_s if round(start * rate) < len(reference)]
    if not gap_parts:
        raise ValueError("no gap begins in the clip")
    in_gaps = np.zeros(len(reference), bool)
    for part in gap_parts:
        in_gaps[part] = True
    levels = [max(math.sqrt(np.mean(np.square(x[in_gaps], dtype=np.float64))), LEVEL_FLOOR) for x in (reference, degraded)]
    return 20 * math.log10(levels[1] / levels[0])


def _excerpts(gaps_s, rate: int, length: int) -> list[tuple[int, int]]:
    """[start, end) in samples of stoi_gap's excerpts: gaps that begin in the clip, widened by AROUND_S, overlapping ones merged."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(tuple(gap) for gap in gaps_s):
        if round(start * rate) >= length:
            continue
        first, last = max(0, round((start - AROUND_S) * rate)), min(length, round((end + AROUND_S) * rate))
        if merged and first < merged[-1][1]:
            first, reached = merged.pop()
            last = max(last, reached)
        merged.append((first, last))
    return merged


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).removeprefix("b'").rstrip("'").split(". Please")[0] or type(error).__name__


def character_error(reference_text: str, transcript: str) -> float:
    """Character edits (spaces count) over the reference's characters: 0 to 1 or more; NaN without a reference."""
    return float(ctc_decoding.character_error_rate([(transcript, reference_text)]).rates[0])


def word_error(reference_text: str, transcript: str) -> float:
    """Word edits over the reference's words: 0 to 1 or more; NaN without a reference."""
    return float(ctc_decoding.word_error_rate([(transcript, reference_text)]).rates[0])


def phone_error(reference_text: str, transcript: str) -> float:
    """Phone edits of a transcript ("B IH N ...") over the phones of the reference's words; NaN for words outside Grid."""
    try:
        reference = " ".join(grid_text.phones_of(reference_text))
    except ValueError:
        return math.nan
    return float(ctc_decoding.phone_error_rate([(transcript, reference)]).rates[0])


# ---- in the gap --------------------------------------------------------------------------------------------------------------


def gap_l1_db(reference: ArrayLike, degraded: ArrayLike, centred: ArrayLike) -> jax.Array:
    """Mean |difference| of two log-mels in dB, over all bands of the frames `centred`: (B,), NaN without such a frame.

    reference, degraded (B, N) float32 at 8 kHz; centred (B, F) bool, as from `gap_masks.centred_frames`, F = 1 + N // 160. The
    front end is preset 'paper': 64 Slaney mel bands of audio pre-emphasised by 0.97, 40 ms windows every 20 ms, -80 to 0 dB.
    """
    shapes = [x.shape for x in (reference, degraded, centred)]
    b, n = shapes[0][0], shapes[0][-1]
    if shapes != [(b, n), (b, n), (b, presets.get(GAP_PRESET).frames_of(n))]:
        raise ValueError(f"gap_l1_db: found {shapes}, expected (B, N), (B, N) and (B, 1 + N // 160)")
    return _gap_l1_db()(reference, degraded, centred)


@functools.cache
def _gap_l1_db():
    """The compiled body of `gap_l1_db`."""
    import jax
    import jax.numpy as jnp

    from avsi_jax.audio import stft

    preset = presets.get(GAP_PRESET)

    def error(reference, degraded, centred):
        decibel = [stft.to_db(stft.log_mel(x, preset), preset) for x in (reference, degraded)]
        of_frame = jnp.abs(decibel[0] - decibel[1]).mean(-1)
        return jnp.where(centred, of_frame, 0.0).sum(-1) / centred.sum(-1)

    return jax.jit(error)


def _gap_errors(items: Sequence[Item], size: int) -> list[float]:
    """`gap_l1_db` of up to `size` items; NaN where no frame is centred in a gap or the audio is not finite.

    Clips are padded to full seconds and stacked to `size` rows, so that a run compiles once or twice.
    """
    lengths = [-(-len(item.reference) // item.rate) for item in items]
    errors = np.full(len(items), math.nan)
    for seconds in set(lengths):
        members = [i for i, length in enumerate(lengths) if length == seconds]
        inputs = [_gap_input(items[i], seconds) for i in members]
        inputs += inputs[:1] * (size - len(inputs))
        errors[members] = np.asarray(gap_l1_db(*map(np.stack, zip(*inputs))))[: len(members)]
    errors[[not all(np.isfinite(x).all() for x in item[:2]) for item in items]] = math.nan  # even outside the gap
    return errors.tolist()


def _gap_input(item: Item, seconds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row for `gap_l1_db`: audio at 8 kHz padded to full seconds, and the frames inside a gap and the clip."""
    from avsi_jax.audio import gap_masks

    preset = presets.get(GAP_PRESET)
    waveforms = [clip_io.resample(x, item.rate, preset.rate) for x in item[:2]]
    length, frames = seconds * preset.rate, preset.frames_of(seconds * preset.rate)
    gap_samples = np.array([[round(t * presets.RECORD_RATE) for t in gap] for gap in item.gaps_s])
    centred = np.asarray(gap_masks.centred_frames(gap_samples, preset, frames)) & (
        np.arange(frames) * preset.hop < len(waveforms[0])
    )
    return *(np.pad(x, (0, length - len(x))) for x in waveforms), centred


# ---- of spectrograms -----------------------------------------------------------------------------------------------------------


def psnr(reference: np.ndarray, degraded: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two levels (F, K) in [0, 1], with peak 1; infinite for equal ones."""
    error = np.mean(np.square(np.asarray(reference, np.float64) - degraded))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(reference: np.ndarray, degraded: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of two levels (F, K) in [0, 1]: the mean over all windows of 7 x 7 values.

    K1 = 0.01, K2 = 0.03, range 1, unbiased covariances: the defaults of scikit-image. NaN for fewer than 7 frames or bands.
    """
    from scipy import ndimage

    x, y = (np.asarray(level, np.float64) for level in (reference, degraded))
    if min(x.shape) < SSIM_WINDOW:
        return math.nan
    border = SSIM_WINDOW // 2
    mean = lambda a: ndimage.uniform_filter(a, SSIM_WINDOW)[border:-border, border:-border]
    unbiased = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, covariance = (unbiased * (mean(a * b) - mean(a) * mean(b)) for a, b in ((x, x), (y, y), (x, y)))
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(similarity.mean())


# ---- many clips --------------------------------------------------------------------------------------------------------------


def score_many(
    items: Iterable[Item | tuple | dict],
    workers: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    *,
    timeout_s: float = PAIR_TIMEOUT_S,
    listener_models: Sequence[str] = (),
) -> list[dict]:
    """`score` of every item, in order, by `workers` processes (None: one per core; 0: in this process, without limits).

    Items may come from a generator: it is read as workers become free, and scored clips are not kept in memory. A clip that crashes
    its process (PESQ's C code), or needs more than timeout_s or PAIR_MEMORY_MB, gets a row with that reason; all others are scored.
    progress(done, total) is called after each clip, total None for a generator. ValueError names the first malformed item.
    """
    quality, errors = {}, []  # index -> result of _quality; a gap error per item
    total = len(items) if hasattr(items, "__len__") else None
    computed = "PESQ, STOI or a listener model" if listener_models else "PESQ or STOI"
    calls = _quality_calls(items, errors, tuple(listener_models))
    for i, result, missing in _outcomes(calls, workers, total, timeout_s, tuple(listener_models)):
        quality[i] = result or {**dict.fromkeys(QUALITY), "reason": f"{computed} {missing}"}
        if progress:
            progress(len(quality), total)
    return [_row(quality[i], error) for i, error in enumerate(errors)]


def _outcomes(
    calls: Iterator[tuple], workers: int | None, total: int | None, timeout_s: float, listener_models: tuple[str, ...]
) -> Iterator[pool.JobOutcome]:
    """Results of `_quality` for all calls, in any order."""
    if workers == 0:
        yield from (pool.JobOutcome(i, _quality(*call)) for i, call in enumerate(calls))
        return
    wanted = min(workers or os.cpu_count() or 1, math.inf if total is None else total)
    limits = {"timeout_s": timeout_s, "memory_mb": PAIR_MEMORY_MB}
    start = functools.partial(_start_worker, listener_models)
    yield from pool.run(_quality, calls, workers=wanted, start=start, ahead=AHEAD, **limits)


def _start_worker(listener_models: tuple[str, ...] = ()) -> None:
    """Imports the libraries and loads networks before a worker's first clip, so that no clip's time limit includes that."""
    import pesq  # noqa: F401
    import pystoi  # noqa: F401

    listeners.load(listener_models)


def _quality_calls(items, errors: list[float], listener_models: tuple[str, ...]) -> Iterator[tuple]:
    """Arguments of `_quality` for every item, checked; gap errors are appended to `errors` meanwhile."""
    batch: list[Item] = []
    for i, item in enumerate(items):
        _check(item := Item(**item) if isinstance(item, dict) else Item(*item), f"item {i}")
        batch.append(item)
        if len(batch) == BATCH_SIZE:
            errors += _gap_errors(batch, BATCH_SIZE)
            batch.clear()
        yield (*item, listener_models) if listener_models else tuple(item)
    errors += _gap_errors(batch, BATCH_SIZE)
