"""Loss functions, each returned as (sum, count) so that a mean over the global batch can be computed across devices.

Letters: B clips, F spectrogram frames, K bands, C outputs of the CTC head, S labels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from avsi_jax.data import grid_text


def spectrogram_error(level: jax.Array, target: jax.Array, weight: jax.Array, kind: str = "mse") -> tuple[jax.Array, jax.Array]:
    """Weighted squared (kind 'mse') or absolute ('l1') error of levels (B, F, K).

    weight: (B, F). Returns the weighted sum and the summed weight of all band values.
    """
    if kind not in ("mse", "l1"):
        raise ValueError(f"loss.kind: found {kind!r}, expected 'mse' or 'l1'")
    error = level - target
    error = error**2 if kind == "mse" else jnp.abs(error)
    return (error.sum(-1) * weight).sum(), weight.sum() * level.shape[-1]


def near(mask: jax.Array, frames: int, valid: jax.Array) -> jax.Array:
    """Dilates mask (B, F) bool by `frames` on either side, within valid (B, F) bool: the frames in or near a gap."""
    if frames < 0:
        raise ValueError(f"near: found {frames} frames, expected 0 or more")
    size, pad = (1, 2 * frames + 1), ((0, 0), (frames, frames))
    marked = (mask & valid).astype(jnp.float32)  # as floats: XLA's compiler for TPU v6e aborts on a reduce_window of booleans
    return (jax.lax.reduce_window(marked, 0.0, jax.lax.max, size, (1, 1), pad) > 0) & valid


def ctc(
    logits: jax.Array, num_frames: jax.Array, labels: jax.Array, label_length: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Connectionist temporal classification loss (Graves et al. 2006), blank 0: negative log likelihood, nats per clip.

    logits (B, F, C), num_frames (B,), labels (B, S) zero-padded, label_length (B,), weight (B,). Clips without text get weight 0,
    and so do those whose text has no alignment (`infeasible`): their likelihood is 0, for which optax returns a loss of 1e5.
    Returns the weighted sum and the summed weight.
    """
    padded = jnp.arange(logits.shape[1])[None] >= num_frames[:, None]
    no_label = jnp.arange(labels.shape[1])[None] >= label_length[:, None]
    nll = optax.ctc_loss(logits, padded.astype(logits.dtype), labels, no_label.astype(logits.dtype), blank_id=grid_text.BLANK)
    weight = weight * (label_length > 0) * ~infeasible(num_frames, labels, label_length)
    return jnp.where(weight > 0, nll, 0.0) @ weight, weight.sum()


def infeasible(num_frames: jax.Array, labels: jax.Array, label_length: jax.Array) -> jax.Array:
    """(B,) bool: clips without any CTC alignment: fewer frames than labels plus the blanks between equal neighbouring labels.

    num_frames (B,), labels (B, S) zero-padded, label_length (B,). A clip without text is feasible.
    """
    inside = jnp.arange(1, labels.shape[1])[None] < label_length[:, None]
    repeats = ((labels[:, 1:] == labels[:, :-1]) & inside).sum(-1)
    return num_frames < label_length + repeats
