"""THE gap protocol: draw gaps (training), place them (evaluation), damage the sound, mark what it touched.

A gap is [start, end) in samples at RECORD_RATE. In the `waveform` protocol the samples are gone before anything else sees the
sound: they are zeroed at the rate they are stored in, then decimated, pre-emphasised and transformed; a spectrogram frame is
marked if any lost sample reaches it through the decimating filter, the pre-emphasis or its window. In the `paper` protocol whole
frames of the clean spectrogram are set to silence instead, which is kind to the frames beside it: only to compare with the paper.
"""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from avsi_jax.audio import stft
from avsi_jax.presets import RECORD_RATE, Spec

PROTOCOLS = ("waveform", "paper")
MAX_SHARE = 0.8  # of a clip that training may take away


# ---- training: draw ------------------------------------------------------------------------------------------------------------


def draw_gaps(
    key: jax.Array, length: jax.Array, *, max_count: int, total: str, min_ms: float, total_mean_ms: float = 0.0,
    total_std_ms: float = 0.0, total_min_ms: float = 0.0, total_max_ms: float = 0.0,
) -> jax.Array:  # fmt: skip
    """Random gaps for one clip of `length` record samples (scalar int) -> int32 (max_count, 2), unused rows empty (0, 0).

    count ~ U{1..max_count}; the time lost in all is N(total_mean_ms, total_std_ms) for total='normal' (the paper: 900, 300) or
    U(total_min_ms, total_max_ms) for 'uniform', at least min_ms a gap and at most MAX_SHARE of the clip; it is shared out by sequential
    uniforms whose upper bound shrinks by exp(-(count-1)/6), as the paper's and Morrone's code do; places are uniform given that
    gaps neither overlap nor leave the clip (theirs lets the last gap overflow, which loses a ninth of the nominal time).
    """
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
    missing = jnp.minimum(jnp.maximum(wanted * ms, smallest * count), MAX_SHARE * length)
    lengths = _share_out(k_share, missing, count, jnp.minimum(smallest, missing / count), max_count)
    order = jnp.argsort(jnp.where(used, jax.random.uniform(k_order, (max_count,)), 2.0))  # used ones first, shuffled
    lengths = lengths[order]
    slack = jnp.maximum(length - lengths.sum(), 0)
    places = jnp.sort(jnp.where(used, jax.random.uniform(k_place, (max_count,)), 2.0))
    starts = jnp.floor(jnp.minimum(places, 1.0) * slack).astype(jnp.int32) + jnp.cumsum(lengths) - lengths
    gaps = jnp.stack([starts, starts + lengths], -1)
    return jnp.where(used[:, None], gaps, 0)


def _share_out(key, missing, count, smallest, max_count):
    """int32 (max_count,): `lost` samples cut into `count` pieces of at least `smallest` samples each; the rest 0."""
    shrink = jnp.exp(-(count - 1) / 6.0)
    uniform = jax.random.uniform(key, (max_count,))
    left, pieces = missing, []
    for i in range(max_count):
        after = jnp.maximum(count - i - 1, 0)  # gaps still to come
        upper = jnp.maximum(smallest, (left - smallest * after) * shrink)
        piece = jnp.where(i < count - 1, smallest + uniform[i] * (upper - smallest), jnp.where(i == count - 1, left, 0.0))
        left = left - piece
        pieces.append(jnp.floor(piece).astype(jnp.int32))
    return jnp.stack(pieces)


def draw_batch(key: jax.Array, id_hash: jax.Array, lengths: jax.Array, **draw) -> jax.Array:
    """`draw_gaps` for clips of (B,) record samples: int32 (B, max_count, 2).

    A clip's gaps depend on the key and its own id (hash (B,) uint32) alone: the same whatever the batch or the devices.
    """
    one = lambda h, n: draw_gaps(jax.random.fold_in(key, h), n, **draw)
    return jax.vmap(one)(id_hash, lengths)


# ---- evaluation: place ---------------------------------------------------------------------------------------------------------


def place_in_speech(clip_id: str, gap_ms: int, speech_s: tuple[float, float], num_samples: int) -> tuple[int, int]:
    """One gap of `gap_ms` inside the words, [start, end) in record samples of a clip of `num_samples`.

    The start is hashed from clip id and length into [first word, last word - gap]; a gap longer than the words is centred on them.
    """
    length = min(round(gap_ms * RECORD_RATE / 1000), num_samples)
    first, last = (round(t * RECORD_RATE) for t in speech_s)
    room = last - first - length
    start = first + hashed_uniform(f"{clip_id}:{int(gap_ms)}") * room if room >= 0 else first + room / 2
    start = int(np.clip(round(start), 0, num_samples - length))
    return start, start + length


def hashed_uniform(text: str) -> float:
    """[0, 1) from the first 53 bits of sha256(text): the same on every machine."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53


# ---- damage --------------------------------------------------------------------------------------------------------------------


def gap_samples(gaps: jax.Array, num_samples: int) -> jax.Array:
    """Gaps (..., G, 2) -> bool (..., num_samples), true where a sample is lost."""
    return inside(gaps, jnp.arange(num_samples))


def inside(gaps: jax.Array, positions: jax.Array) -> jax.Array:
    """Gaps (..., G, 2) and positions (P,) -> bool (..., P): positions that lie in any of the gaps."""
    positions = stft.along_last(positions, gaps.ndim)
    return ((positions >= gaps[..., :1]) & (positions < gaps[..., 1:])).any(-2)


def damage(audio: jax.Array, missing: jax.Array) -> jax.Array:
    """The sound with its lost samples gone (zero); what stood there cannot be told from the result, not even NaN."""
    return jnp.where(missing, jnp.zeros((), audio.dtype), audio)


def gap_at_preset(missing: jax.Array, spec: Spec) -> jax.Array:
    """bool (..., N record) -> (..., N preset): true where the decimating filter's support holds a lost record sample."""
    if spec.decimation == 1:
        return missing
    support = np.ones(2 * stft.FIR_HALF_TAPS + 1, np.float32)
    return stft.through_filter(missing.astype(jnp.float32), support, spec.decimation) > 0.5


def touched_frames(missing: jax.Array, spec: Spec) -> jax.Array:
    """bool (..., N record) -> bool (..., F): frames of `stft.log_mel` that any lost sample reaches with a weight other than 0."""
    at_preset = gap_at_preset(missing, spec)
    if spec.pre_emphasis:  # a sample also reaches its successor
        at_preset = at_preset | jnp.pad(at_preset, [(0, 0)] * (missing.ndim - 1) + [(1, 0)])[..., :-1]
    return stft.frames_holding(at_preset, spec)


def centred_frames(gaps: jax.Array, spec: Spec, num_frames: int) -> jax.Array:
    """Gaps (..., G, 2) -> bool (..., F): frames whose centre lies in a gap. The frames that errors in the gap are counted over."""
    first = 0 if spec.centred else spec.window // 2
    return inside(gaps, (np.arange(num_frames) * spec.hop + first) * spec.decimation)
