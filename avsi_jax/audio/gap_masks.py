"""The gap protocol: draws gaps (training), places them (evaluation), masks the audio and marks the affected frames.

A gap is [start, end) in samples at RECORD_RATE. In the `waveform` protocol its samples are set to zero at the record rate, before
any other processing; the masked audio is then decimated, pre-emphasised and transformed. A spectrogram frame is marked if any
missing sample reaches it through the decimation filter, the pre-emphasis or its window. In the `paper` protocol whole frames of
the clean spectrogram are set to silence instead. Neighbouring frames then still contain samples of the gap, so this protocol is
easier; it exists only for comparison with the paper.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from avsi_jax.audio import stft
from avsi_jax.presets import RECORD_RATE, Spec

PROTOCOLS = ("waveform", "paper")
PLACEMENTS = ("apart", "paper")
PAPER_FRAME = 320  # record samples from one frame of preset paper to the next, 20 ms
MAX_SHARE = 0.8  # largest share of a clip that gaps take in training


# ---- training: draw ------------------------------------------------------------------------------------------------------------


def draw_gaps(
    key: jax.Array, length: jax.Array, *, max_count: int, total: str, min_ms: float, total_mean_ms: float = 0.0,
    total_std_ms: float = 0.0, total_min_ms: float = 0.0, total_max_ms: float = 0.0, placement: str = "apart",
) -> jax.Array:  # fmt: skip
    """Random gaps for one clip of `length` record samples (scalar int): int32 (max_count, 2), unused rows (0, 0).

    The number of gaps is U{1..max_count}. Their total length is N(total_mean_ms, total_std_ms) for total='normal' (the paper: 900,
    300) or U(total_min_ms, total_max_ms) for 'uniform', at least min_ms for each gap and at most MAX_SHARE of the clip. It is
    divided by sequential uniform draws whose upper bound shrinks by exp(-(count - 1) / 6), as in the code of the paper and of
    Morrone et al. Positions are uniform under the condition that gaps neither overlap nor leave the clip. ValueError for an unknown
    `total` or `placement`.

    placement 'paper': as in that code, in frames of PAPER_FRAME samples. A gap begins in the first half of what is free behind the
    one before it, so that gaps gather at the start; the last may begin with the one before it and run over the end, where it is
    cut. That costs about a ninth of the nominal length.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"gaps.placement: found {placement!r}, expected {' or '.join(map(repr, PLACEMENTS))}")
    if total not in ("normal", "uniform"):
        raise ValueError(f"gaps.total: found {total!r}, expected 'normal' or 'uniform'")
    k_count, k_total, k_share, k_order, k_place = jax.random.split(key, 5)
    ms = RECORD_RATE / 1000.0
    count = jax.random.randint(k_count, (), 1, max_count + 1)
    used = jnp.arange(max_count) < count
    if total == "normal":
        wanted = total_mean_ms + total_std_ms * jax.random.normal(k_total)
    else:
        wanted = jax.random.uniform(k_total, (), minval=total_min_ms, maxval=total_max_ms)
    smallest = min_ms * ms
    samples = jnp.minimum(jnp.maximum(wanted * ms, smallest * count), MAX_SHARE * length)
    lengths = _divide(k_share, samples, count, jnp.minimum(smallest, samples / count), max_count)
    order = jnp.argsort(jnp.where(used, jax.random.uniform(k_order, (max_count,)), 2.0))  # used rows first, shuffled
    lengths = lengths[order]
    if placement == "paper":
        return _placed_as_in_the_paper(k_place, samples, lengths, count, length, round(smallest))
    slack = jnp.maximum(length - lengths.sum(), 0)
    places = jnp.sort(jnp.where(used, jax.random.uniform(k_place, (max_count,)), 2.0))
    starts = jnp.floor(jnp.minimum(places, 1.0) * slack).astype(jnp.int32) + jnp.cumsum(lengths) - lengths
    gaps = jnp.stack([starts, starts + lengths], -1)
    return jnp.where(used[:, None], gaps, 0)


def _placed_as_in_the_paper(
    key: jax.Array, samples: jax.Array, lengths: jax.Array, count: jax.Array, length: jax.Array, smallest: int
) -> jax.Array:
    """Gaps (max_count, 2) of `lengths` samples, rounded to frames, by the rule of the paper's code (read 2026-12-01).

    With S frames in the clip, L in all gaps and n gaps: a single gap starts at U{0..S - L}; the first of several at half of
    U{0..S - L - (n - 1)}, the following ones between the end of the one before, + 1, and half of what is left for them; the last
    between the start of the one before and S - its length after the end of that one.
    """
    max_count, frames = len(lengths), -(-length // PAPER_FRAME)
    in_frames = jnp.round(lengths / PAPER_FRAME).astype(jnp.int32)
    wanted = jnp.maximum(jnp.round(samples / PAPER_FRAME).astype(jnp.int32), count * (smallest // PAPER_FRAME))
    in_frames = in_frames.at[0].add(wanted - in_frames.sum())  # rounding does not change the sum
    keys, starts, start, end = jax.random.split(key, max_count), [], 0, 0
    draw = lambda k, low, high: jax.random.randint(k, (), low, jnp.maximum(high, low) + 1)  # both ends included
    for i, k in enumerate(keys):
        rest = in_frames[i:].sum()
        first = draw(k, 0, frames - wanted - (count - 1)) // 2
        between = draw(k, end + 1, (end + 1 + frames - rest - (count - i - 1)) // 2)
        last = draw(k, start, end + 1 + frames - in_frames[i])
        single = draw(k, 0, frames - wanted)
        if i == 0:
            start = jnp.where(count == 1, single, first)
        else:
            start = jnp.where(i == count - 1, last, between)
        end = start + in_frames[i]
        starts.append(start)
    starts = jnp.stack(starts)
    gaps = jnp.minimum(jnp.stack([starts, starts + in_frames], -1) * PAPER_FRAME, length)
    return jnp.where((jnp.arange(max_count) < count)[:, None], gaps, 0).astype(jnp.int32)


def _divide(key: jax.Array, total: jax.Array, count: jax.Array, smallest: jax.Array, max_count: int) -> jax.Array:
    """Divides `total` samples into `count` lengths of at least `smallest` samples: int32 (max_count,), unused ones 0."""
    shrink = jnp.exp(-(count - 1) / 6.0)
    uniform = jax.random.uniform(key, (max_count,))
    left, pieces = total, []
    for i in range(max_count):
        after = jnp.maximum(count - i - 1, 0)  # number of gaps after this one
        upper = jnp.maximum(smallest, (left - smallest * after) * shrink)
        piece = jnp.where(i < count - 1, smallest + uniform[i] * (upper - smallest), jnp.where(i == count - 1, left, 0.0))
        left = left - piece
        pieces.append(jnp.floor(piece).astype(jnp.int32))
    return jnp.stack(pieces)


def draw_batch(key: jax.Array, id_hash: jax.Array, lengths: jax.Array, **draw) -> jax.Array:
    """`draw_gaps` for B clips of lengths (B,) record samples: int32 (B, max_count, 2).

    The gaps of a clip depend only on the key and on id_hash (B,) uint32, not on the batch or the devices.
    """
    one = lambda h, n: draw_gaps(jax.random.fold_in(key, h), n, **draw)
    return jax.vmap(one)(id_hash, lengths)


# ---- evaluation: place ---------------------------------------------------------------------------------------------------------


def place_in_speech(clip_id: str, gap_ms: int, speech_s: tuple[float, float], num_samples: int) -> tuple[int, int]:
    """One gap of `gap_ms` within the spoken part, [start, end) in record samples of a clip of `num_samples`.

    speech_s: start of the first and end of the last word, s. The start is a hash of clip id and gap length, mapped to [first word,
    last word - gap]. A gap longer than the spoken part is centred on it.
    """
    length = min(round(gap_ms * RECORD_RATE / 1000), num_samples)
    first, last = (round(t * RECORD_RATE) for t in speech_s)
    slack = last - first - length
    start = first + hashed_uniform(f"{clip_id}:{int(gap_ms)}") * slack if slack >= 0 else first + slack / 2
    start = int(np.clip(round(start), 0, num_samples - length))
    return start, start + length


def with_gaps_in_words(batch: dict, lengths_ms: Sequence[int]) -> dict:
    """Repeats each clip of a batch of data/input_pipeline.py for every gap length; for validation.

    lengths_ms: M lengths. Arrays (B, ...) become (B * M, ...), with the rows of a clip side by side. `gaps` (B * M, 1, 2) int32, in
    record samples, is added: one gap per row, placed inside the words by `place_in_speech`, as in evaluations.
    """
    clips = zip(batch["clip_id"], batch["speech"], batch["audio_length"], strict=True)
    gaps = [[place_in_speech(i, ms, tuple(speech), int(n))] for i, speech, n in clips for ms in lengths_ms]
    repeated = {k: np.repeat(v, len(lengths_ms), axis=0) for k, v in batch.items() if k != "clip_id"}
    clip_ids = [i for i in batch["clip_id"] for _ in lengths_ms]
    return {"clip_id": clip_ids} | repeated | {"gaps": np.array(gaps, np.int32)}


def hashed_uniform(text: str) -> float:
    """A number in [0, 1) from the first 53 bits of sha256(text): the same on every machine."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53


# ---- masks ---------------------------------------------------------------------------------------------------------------------


def gap_samples(gaps: jax.Array, num_samples: int) -> jax.Array:
    """Gaps (..., G, 2) -> bool (..., num_samples): true for the samples in a gap."""
    return inside(gaps, jnp.arange(num_samples))


def inside(gaps: jax.Array, positions: jax.Array) -> jax.Array:
    """Gaps (..., G, 2) and positions (P,) -> bool (..., P): whether a position lies in any of the gaps."""
    positions = stft.along_last(positions, gaps.ndim)
    return ((positions >= gaps[..., :1]) & (positions < gaps[..., 1:])).any(-2)


def mask_audio(audio: jax.Array, missing: jax.Array) -> jax.Array:
    """Audio (..., N) with the missing samples, bool (..., N), set to zero; their former values leave no trace, even if NaN."""
    return jnp.where(missing, jnp.zeros((), audio.dtype), audio)


def gap_at_preset(missing: jax.Array, spec: Spec) -> jax.Array:
    """Missing samples at RECORD_RATE, bool (..., N), -> at the preset's rate: true where the decimation filter sees any of them."""
    if spec.decimation == 1:
        return missing
    support = np.ones(2 * stft.FIR_HALF_TAPS + 1, np.float32)
    return stft.through_filter(missing.astype(jnp.float32), support, spec.decimation) > 0.5


def affected_frames(missing: jax.Array, spec: Spec) -> jax.Array:
    """Missing samples, bool (..., N) at RECORD_RATE -> bool (..., F): frames of `stft.log_mel` in which any has non-zero weight."""
    at_preset = gap_at_preset(missing, spec)
    if spec.pre_emphasis:  # a sample also affects the next one
        at_preset = at_preset | jnp.pad(at_preset, [(0, 0)] * (missing.ndim - 1) + [(1, 0)])[..., :-1]
    return stft.frames_containing(at_preset, spec)


def centred_frames(gaps: jax.Array, spec: Spec, num_frames: int) -> jax.Array:
    """Gaps (..., G, 2) -> bool (..., F): frames whose centre lies in a gap. Gap errors are averaged over these frames."""
    first = 0 if spec.centred else spec.window // 2
    return inside(gaps, (np.arange(num_frames) * spec.hop + first) * spec.decimation)
