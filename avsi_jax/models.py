"""Every system as a small Flax module, and one registry.

A network maps the damaged spectrogram (B, F, K), the lips' motion (B, F, V) and the valid frames (B,) to a restored level
(B, F, K) and, where it reads the lips, CTC logits (B, F, NUM_LABELS). "Sequence-to-sequence" in the paper's sense: an encoder and
a decoder of the same length, no attention, no feedback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from avsi_jax.features import Features
from avsi_jax.lstm import BidirectionalLSTM
from avsi_jax.text import NUM_LABELS


class Output(NamedTuple):
    """level (B, F, K): the restored spectrogram; logits (B, F, NUM_LABELS) of the CTC head, or None."""

    level: jax.Array
    logits: jax.Array | None


class Stack(nn.Module):
    """`layers` bidirectional LSTM layers of `units` a direction: (B, F, I) -> (B, F, 2 units)."""

    layers: int
    units: int
    lstm: str

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = BidirectionalLSTM(self.units, self.lstm, name=f"blstm_{i + 1}")(x, lengths)
        return x


class AudioOnly(nn.Module):
    """a_si of the paper: spectrogram -> BLSTMs -> linear bands."""

    bands: int
    layers: int = 3
    units: int = 256
    lstm: str = "auto"

    @nn.compact
    def __call__(self, features: Features) -> Output:
        x = Stack(self.layers, self.units, self.lstm, name="decoder")(features.spectrogram, features.num_frames)
        return Output(nn.Dense(self.bands, name="output")(x), None)


class AudioVisualSeq2Seq(nn.Module):
    """av_mtl_s2s of the paper: motion -> BLSTMs -> FC ReLU (CTC reads it) -> joined with the spectrogram -> BLSTMs -> bands.

    `bottleneck` is the width of that layer: the paper's 136. `output`: 'linear', or 'relu' as the paper's code has it here alone.
    """

    bands: int
    layers: int = 3
    units: int = 256
    bottleneck: int = 136
    output: str = "linear"
    lstm: str = "auto"

    @nn.compact
    def __call__(self, features: Features) -> Output:
        lips = Stack(self.layers, self.units, self.lstm, name="encoder")(features.video, features.num_frames)
        lips = nn.relu(nn.Dense(self.bottleneck, name="bottleneck")(lips))
        logits = nn.Dense(NUM_LABELS, kernel_init=nn.initializers.he_normal(), name="ctc")(lips)
        x = jnp.concatenate([features.spectrogram, lips], -1)
        x = Stack(self.layers, self.units, self.lstm, name="decoder")(x, features.num_frames)
        bands = nn.Dense(self.bands, name="output")(x)
        return Output(nn.relu(bands) if self.output == "relu" else bands, logits)


class System(NamedTuple):
    """What the rest of the program must know of a system."""

    module: Callable[..., nn.Module]
    reads_lips: bool  # has a CTC head
    uses_video: bool


SYSTEMS: dict[str, System] = {
    "a_si": System(AudioOnly, reads_lips=False, uses_video=False),
    "av_mtl_s2s": System(AudioVisualSeq2Seq, reads_lips=True, uses_video=True),
}


def get(name: str) -> System:
    """The system of that name; ValueError names those there are."""
    if name not in SYSTEMS:
        raise ValueError(f"unknown system {name!r}; expected one of {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def composite(output: jax.Array, features: Features) -> jax.Array:
    """The prediction where the sound is lost, what was heard elsewhere: (B, F, K)."""
    return jnp.where(features.mask[..., None], output, features.spectrogram)


def count_parameters(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
