"""Losses as (sum, count), so that a global batch is normalised by what it holds, however it is spread over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from avsi_jax.data import grid_text


def spectrogram_error(level: jax.Array, target: jax.Array, weight: jax.Array, kind: str = "mse") -> tuple[jax.Array, jax.Array]:
    """Weighted squared ('mse') or absolute ('l1') error of levels (B, F, K); weight (B, F). Count: weight of all band values."""
    if kind not in ("mse", "l1"):
        raise ValueError(f"loss.kind: found {kind!r}, expected 'mse' or 'l1'")
    error = level - target
    error = error**2 if kind == "mse" else jnp.abs(error)
    return (error.sum(-1) * weight).sum(), weight.sum() * level.shape[-1]


def near(mask: jax.Array, frames: int, valid: jax.Array) -> jax.Array:
    """mask (B, F) bool widened by so many frames on either side, inside valid (B, F): the frames of a loss in and near the gap."""
    if frames < 0:
        raise ValueError(f"near: found {frames} frames, expected 0 or more")
    size, pad = (1, 2 * frames + 1), ((0, 0), (frames, frames))
    marked = (mask & valid).astype(jnp.float32)  # as numbers: for v6e, XLA's compiler aborts at a window of `or`
    return (jax.lax.reduce_window(marked, 0.0, jax.lax.max, size, (1, 1), pad) > 0) & valid


def ctc(logits: jax.Array, num_frames: jax.Array, labels: jax.Array, label_length: jax.Array, weight: jax.Array):
    """Connectionist temporal classification (Graves et al. 2006), blank 0: negative log likelihood in nats a clip.

    logits (B, F, C), num_frames (B,), labels (B, S) zero-padded, label_length (B,), weight (B,). Clips without text do not count,
    nor do those whose text no alignment fits (`infeasible`): their likelihood is 0, and optax's stand-in for its logarithm, -1e5,
    would drown the others.
    """
    frame = jnp.arange(logits.shape[1])[None] >= num_frames[:, None]
    symbol = jnp.arange(labels.shape[1])[None] >= label_length[:, None]
    nll = optax.ctc_loss(logits, frame.astype(logits.dtype), labels, symbol.astype(logits.dtype), blank_id=grid_text.BLANK)
    weight = weight * (label_length > 0) * ~infeasible(num_frames, labels, label_length)
    return jnp.where(weight > 0, nll, 0.0) @ weight, weight.sum()


def infeasible(num_frames: jax.Array, labels: jax.Array, label_length: jax.Array) -> jax.Array:
    """(B,) bool: clips with fewer frames than labels and the blanks that part equal neighbours, so that no alignment exists.

    num_frames (B,), labels (B, S) zero-padded, label_length (B,). A clip without text is feasible.
    """
    inside = jnp.arange(1, labels.shape[1])[None] < label_length[:, None]
    repeats = ((labels[:, 1:] == labels[:, :-1]) & inside).sum(-1)
    return num_frames < label_length + repeats
