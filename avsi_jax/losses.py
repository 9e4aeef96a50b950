"""Losses as (sum, count), so that a global batch is normalised by what it holds, however it is spread over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from avsi_jax import text


def spectrogram_error(level: jax.Array, target: jax.Array, weight: jax.Array, kind: str = "mse") -> tuple[jax.Array, jax.Array]:
    """Weighted squared ('mse') or absolute ('l1') error of levels (B, F, K); weight (B, F). Count: weight of all band values."""
    if kind not in ("mse", "l1"):
        raise ValueError(f"loss.kind: found {kind!r}, expected 'mse' or 'l1'")
    error = level - target
    error = error**2 if kind == "mse" else jnp.abs(error)
    return (error.sum(-1) * weight).sum(), weight.sum() * level.shape[-1]


def ctc(logits: jax.Array, num_frames: jax.Array, labels: jax.Array, label_length: jax.Array, weight: jax.Array):
    """Connectionist temporal classification (Graves et al. 2006), blank 0: negative log likelihood in nats a clip.

    logits (B, F, C), num_frames (B,), labels (B, S) zero-padded, label_length (B,), weight (B,). Clips without text do not count.
    """
    frame = jnp.arange(logits.shape[1])[None] >= num_frames[:, None]
    symbol = jnp.arange(labels.shape[1])[None] >= label_length[:, None]
    nll = optax.ctc_loss(logits, frame.astype(logits.dtype), labels, symbol.astype(logits.dtype), blank_id=text.BLANK)
    weight = weight * (label_length > 0)
    return jnp.where(weight > 0, nll, 0.0) @ weight, weight.sum()
