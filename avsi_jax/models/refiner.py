"""Refiner: adds the detail of speech to a predicted log-mel, and the critics against which it is trained.

A network trained by a squared or absolute error predicts the mean over all that could have been spoken, which is smooth and too
quiet. The refiner adds a residual in and near the gap, from noise, such that two critics cannot tell its log-mel from that of a
recording (hinge loss and feature matching, as for neural vocoders: Kong et al. 2020, arXiv:2010.05646). Its blocks are ConvNeXt
blocks over time (Liu et al. 2022, arXiv:2201.03545).

Letters: B clips, F spectrogram frames, K bands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp

from avsi_jax.models.systems import Output, composite

if TYPE_CHECKING:
    from avsi_jax.data.features import Features

NETWORK, REFINER = "network", "refiner"  # parameters of a RefinedNetwork
NUM_NOISE = 8  # noise channels of a frame
TAPS = 7  # frames that a block sees
CRITIC_SCALES = (1, 2)  # frames that are averaged before each critic


class ConvNeXtBlock(nn.Module):
    """A depthwise filter over time, then two dense layers, with a residual connection."""

    expansion: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, F, C) -> (B, F, C)."""
        size, half = x.shape[-1], TAPS // 2
        taps = self.param("taps", nn.initializers.normal(0.2), (TAPS, size))
        padded = jnp.pad(x, ((0, 0), (half, half), (0, 0)))
        y = sum(padded[:, k : k + x.shape[1]] * taps[k][None, None] for k in range(TAPS))
        y = nn.Dense(size)(nn.gelu(nn.Dense(self.expansion * size)(nn.LayerNorm()(y))))
        return x + y * self.param("scale", nn.initializers.constant(0.1), (size,))[None, None]


class Refiner(nn.Module):
    """Predicted log-mel, mask and noise -> log-mel with the detail of speech in the gap. 1.4 M parameters at 80 bands."""

    width: int = 192
    num_blocks: int = 6

    @nn.compact
    def __call__(self, level: jax.Array, mask: jax.Array, noise: jax.Array) -> jax.Array:
        """level (B, F, K) standardised, predicted where mask (B, F) is true; noise (B, F, NUM_NOISE) -> (B, F, K).

        Frames outside the mask are returned as they are. The result without training is the input.
        """
        inside = mask[..., None].astype(level.dtype)
        x = nn.LayerNorm()(nn.Dense(self.width)(jnp.concatenate([level, inside, noise * inside], -1)))
        for _ in range(self.num_blocks):
            x = ConvNeXtBlock()(x)
        return level + inside * nn.Dense(level.shape[-1], kernel_init=nn.initializers.zeros)(nn.LayerNorm()(x))


class RefinedNetwork(nn.Module):
    """A network that restores spectrograms, followed by a refiner of its predictions."""

    network: nn.Module
    num_blocks: int

    @nn.compact
    def __call__(self, features: Features, train: bool = False) -> Output:
        """Features with standardised levels -> the output of `network` with a refined level."""
        output = self.network(features, train)
        noise = clip_noise(features.id_hash, features.mask.shape[1])
        refined = Refiner(num_blocks=self.num_blocks, name=REFINER)(composite(output.level, features), features.mask, noise)
        return output._replace(level=refined)


class Critic(nn.Module):
    """Scores patches of a log-mel: high for recordings, low for refined predictions."""

    channels: int = 32

    @nn.compact
    def __call__(self, level: jax.Array, mask: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """level (B, F, K), mask (B, F) -> scores (B, F', K') of overlapping patches and the activations of each layer."""
        x = jnp.stack([level, jnp.broadcast_to(mask[..., None], level.shape).astype(level.dtype)], -1)
        activations = []
        for factor, strides in ((1, (1, 2)), (2, (2, 2)), (2, (2, 2))):
            x = nn.leaky_relu(nn.Conv(factor * self.channels, (5, 5), strides)(x), 0.2)
            activations.append(x)
        return nn.Conv(1, (3, 3))(x)[..., 0], activations


def averaged(level: jax.Array, mask: jax.Array, scale: int) -> tuple[jax.Array, jax.Array]:
    """level (B, F, K) and mask (B, F) averaged over `scale` frames, without a rest: the input of a critic of CRITIC_SCALES."""
    count = level.shape[1] // scale
    mean = lambda x: x[:, : count * scale].reshape(x.shape[0], count, scale, *x.shape[2:]).mean(2)
    return mean(level), mean(mask.astype(level.dtype))


def clip_noise(id_hash: jax.Array, num_frames: int) -> jax.Array:
    """Noise (B, F, NUM_NOISE) of clips, determined by their hashes (B,) uint32: a clip is always refined in the same way."""
    draw = lambda seed: jax.random.normal(jax.random.fold_in(jax.random.key(0), seed), (num_frames, NUM_NOISE))
    return jax.vmap(draw)(jnp.asarray(id_hash, jnp.uint32))
