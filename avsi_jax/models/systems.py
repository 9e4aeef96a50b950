"""Every system as a small Flax module, and one registry.

A network maps Features (the damaged spectrogram (B, F, K), what describes the lips (B, S, V), valid lengths) to a restored level
(B, F, K) and, where it reads, CTC logits. "Sequence-to-sequence" in the paper's sense: an encoder and a decoder of the same length,
no attention, nothing said fed back. docs/systems.md has a drawing of each, and where it departs from its source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from avsi_jax.data.features import Features, interpolate
from avsi_jax.models.lstm import BidirectionalLSTM


class Output(NamedTuple):
    """level (B, F, K): the restored spectrogram, or None of a recogniser; logits (B, S, L) of the CTC head, or None, and the steps
    (B,) of them that are the clip's.
    """

    level: jax.Array | None
    logits: jax.Array | None = None
    num_steps: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a config says of a network; not every system has a use for every field."""

    bands: int  # K
    labels: int = 42  # outputs of the CTC head, blank included
    layers: int = 3  # of each stack of bidirectional LSTMs
    units: int = 256  # a direction
    bottleneck: int = 136  # width of the encoder's last layer; 0: none, the LSTMs' outputs are joined as they are
    bottleneck_relu: bool = True
    skip: bool = False  # the lips' features go round the encoder too
    output: str = "linear"  # or 'relu'
    mask_input: bool = False
    stack: int = 1  # frames a step of the LSTMs
    video_layers: int = 0  # av_unified: layers that look at the lips alone, beside the direct way
    feedback: int = 0  # av_unified: after so many layers what was read so far is told to the layers after; 0: never
    dropout: float = 0.0
    video_rate: str = "audio"
    lstm: str = "auto"
    dtype: str = "float32"  # of the LSTMs' products


# ---- blocks --------------------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """`layers` bidirectional LSTM layers of `units` a direction: (B, S, I) -> (B, S, 2 units).

    `drop` (B,), in training: the numbers of the clips, by which `dropout` of the values after each layer are dropped.
    """

    layers: int
    units: int
    lstm: str
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array, drop: jax.Array | None = None) -> jax.Array:
        for i in range(self.layers):
            x = BidirectionalLSTM(self.units, self.lstm, self.dtype, name=f"blstm_{i + 1}")(x, lengths)
            if self.dropout and drop is not None:
                x = dropped(x, self.dropout, self.make_rng("dropout"), drop)
        return x


def dropped(x: jax.Array, rate: float, key: jax.Array, clips: jax.Array) -> jax.Array:
    """(B, S, I) with `rate` of the values 0, the same ones in every step of a clip (Gal & Ghahramani 2016), the others larger.

    Drawn by the clip's number, (B,): the same whatever the batch or the devices.
    """
    one = lambda clip: jax.random.bernoulli(jax.random.fold_in(key, clip), 1 - rate, x.shape[-1:])
    return jnp.where(jax.vmap(one)(clips)[:, None], x / (1 - rate), 0.0)


def stack_of(sizes: Sizes, name: str, layers: int | None = None) -> Stack:
    layers = sizes.layers if layers is None else layers
    return Stack(layers, sizes.units, sizes.lstm, sizes.dropout, sizes.dtype, name=name)


def heard(features: Features, sizes: Sizes) -> list[jax.Array]:
    """What a network hears: the spectrogram and, where it is told so, which frames are touched by a gap."""
    mask = [features.mask[..., None].astype(features.spectrogram.dtype)] if sizes.mask_input else []
    return [features.spectrogram, *mask]


def bands_of(x: jax.Array, sizes: Sizes) -> jax.Array:
    """The last layer, in the module that calls it."""
    bands = nn.Dense(sizes.bands, name="output")(x)
    return nn.relu(bands) if sizes.output == "relu" else bands


def fold(x: jax.Array, count: int) -> jax.Array:
    """(B, F, I) -> (B, ceil(F / count), count * I): so many frames become one step, the last one filled up with zeros."""
    if count == 1:
        return x
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % count), (0, 0)))
    return x.reshape(x.shape[0], -1, count * x.shape[2])


def unfold(x: jax.Array, num_frames: int, count: int) -> jax.Array:
    """(B, S, count * K) -> (B, num_frames, K): the inverse of `fold`."""
    return x if count == 1 else x.reshape(x.shape[0], -1, x.shape[2] // count)[:, :num_frames]


# ---- the paper's systems, and Morrone's ----------------------------------------------------------------------------------------


class SingleStage(nn.Module):
    """Sound, or sound and lips joined -> BLSTMs -> bands: a_si, av_si; with a CTC head behind the LSTMs a_mtl_si, av_mtl_si
    ('hidden': behind a ReLU layer of `bottleneck`, the paper's code) and morrone_av_mtl ('linear').
    """

    sizes: Sizes
    sees: bool = True
    ctc: str = ""

    @nn.compact
    def __call__(self, features: Features, train: bool = False) -> Output:
        drop = features.id_hash if train else None
        x = jnp.concatenate(heard(features, self.sizes) + [features.video] * self.sees, -1)
        x = stack_of(self.sizes, "decoder")(x, features.num_frames, drop)
        level = bands_of(x, self.sizes)
        if not self.ctc:
            return Output(level)
        narrow = self.ctc == "hidden" and self.sizes.bottleneck
        read = nn.Dense(self.sizes.bottleneck, name="bottleneck")(x) if narrow else x
        read = nn.relu(read) if narrow and self.sizes.bottleneck_relu else read
        return Output(level, nn.Dense(self.sizes.labels, name="ctc")(read), features.num_frames)


class Seq2Seq(nn.Module):
    """Lips -> BLSTMs (the encoder) [-> FC ReLU of `bottleneck`], joined with the sound -> BLSTMs (the decoder) -> bands: av_s2s,
    v_s2s (hears nothing) and, with a CTC head on what the encoder says, av_mtl_s2s. At video rate the encoder takes a step a
    picture.
    """

    sizes: Sizes
    hears: bool = True
    ctc: bool = False

    @nn.compact
    def __call__(self, features: Features, train: bool = False) -> Output:
        drop = features.id_hash if train else None
        sizes, at_video_rate = self.sizes, self.sizes.video_rate == "video"
        steps = features.num_video_frames if at_video_rate else features.num_frames
        lips = stack_of(sizes, "encoder")(features.video, steps, drop)
        if sizes.bottleneck:
            lips = nn.Dense(sizes.bottleneck, name="bottleneck")(lips)
            lips = nn.relu(lips) if sizes.bottleneck_relu else lips
        up = (lambda a: interpolate(a, features.positions)) if at_video_rate else lambda a: a
        lips = up(lips)
        he = nn.initializers.he_normal()
        logits = nn.Dense(sizes.labels, kernel_init=he, name="ctc")(lips) if self.ctc else None
        x = jnp.concatenate(heard(features, sizes) * self.hears + [lips] + [up(features.video)] * sizes.skip, -1)
        x = stack_of(sizes, "decoder")(x, features.num_frames, drop)
        return Output(bands_of(x, sizes), logits, features.num_frames if self.ctc else None)


# ---- ours ----------------------------------------------------------------------------------------------------------------------


class Unified(nn.Module):
    """av_unified: one network for sound and lips, sound alone (a clip without a face) and lips alone (no sound left).

    Every `stack` frames become a step; sound, which of it is lost, lips and whether they are seen go straight to one stack of
    BLSTMs, whose last layer says the bands and the text. `video_layers` BLSTMs may look at the lips first, beside the direct way;
    `feedback` tells the layers after so many what was read by then (self-conditioned CTC, Nozaki & Komatsu 2021).
    """

    sizes: Sizes

    @nn.compact
    def __call__(self, features: Features, train: bool = False) -> Output:
        drop = features.id_hash if train else None
        sizes, count = self.sizes, self.sizes.stack
        steps = -(-features.num_frames // count)
        valid, seen = features.valid[..., None], (features.seen & features.valid)[..., None]
        lips = jnp.concatenate([jnp.where(seen, features.video, 0.0), seen.astype(features.video.dtype)], -1)
        lips = fold(lips, count).reshape(lips.shape[0], -1, count, lips.shape[2]).mean(2)  # lips move slower than sound
        parts = [fold(jnp.where(valid, jnp.concatenate(heard(features, sizes), -1), 0.0), count), lips]
        if sizes.video_layers:
            parts.append(stack_of(sizes, "encoder", sizes.video_layers)(lips, steps, drop))
        x, read = jnp.concatenate(parts, -1), nn.Dense(sizes.labels, name="ctc")
        if sizes.feedback:
            x = stack_of(sizes, "reader", sizes.feedback)(x, steps, drop)
            x = x + nn.Dense(x.shape[-1], name="feedback")(nn.softmax(read(x)))
        x = stack_of(sizes, "decoder", sizes.layers - sizes.feedback)(x, steps, drop)
        bands = nn.Dense(count * sizes.bands, name="output")(x)
        return Output(unfold(bands, features.mask.shape[1], count), read(x), steps)


class RecognizerNetwork(nn.Module):
    """asr: sound alone -> convolutions over time -> CTC. The judge of restored words; it restores nothing.

    A layer sees two steps on either side of its own, so that a phone is said where it is heard and a fault in one word is not heard
    in another: BLSTMs, which see the whole clip, came to say words half a second away from where they are.
    """

    sizes: Sizes

    @nn.compact
    def __call__(self, features: Features, train: bool = False) -> Output:
        sizes, steps = self.sizes, -(-features.num_frames // self.sizes.stack)
        x = fold(jnp.where(features.valid[..., None], features.spectrogram, 0.0), sizes.stack)
        inside = (jnp.arange(x.shape[1])[None] < steps[:, None])[..., None]
        for i in range(sizes.layers):
            y = nn.relu(nn.LayerNorm(name=f"norm_{i + 1}")(nn.Conv(sizes.units, (5,), name=f"conv_{i + 1}")(x)))
            if sizes.dropout and train:
                y = dropped(y, sizes.dropout, self.make_rng("dropout"), features.id_hash)
            x = jnp.where(inside, x + y if i else y, 0.0)
        return Output(None, nn.Dense(sizes.labels, name="ctc")(x), steps)


# ---- registry ------------------------------------------------------------------------------------------------------------------


class System(NamedTuple):
    """What the rest of the program must know of a system."""

    build: Callable[[Sizes], nn.Module]
    uses_video: bool
    reads: bool  # has a CTC head
    options: frozenset[str]  # those of OPTIONS that it knows
    restores: bool = True
    drops: bool = False  # takes clips whose lips or whose sound are all gone


# Fields of a config that only some systems know -> what they may be; the first value says that there is nothing of it.
OPTIONS = {
    "output": ("linear", "relu"),
    "video_rate": ("audio", "video"),
    "skip": (False, True),
    "mask_input": (False, True),
    "dtype": ("float32", "bfloat16"),
    "stack": (1, 2, 3, 4),
    "video_layers": (0, 1, 2, 3, 4),
    "feedback": (0, 1, 2, 3, 4),
}
BLSTM = frozenset({"output", "mask_input", "dtype"})
TWO_STAGES = BLSTM | {"video_rate", "skip"}
UNIFIED = BLSTM - {"output"} | {"stack", "video_layers", "feedback"}

SYSTEMS: dict[str, System] = {
    "a_si": System(lambda sizes: SingleStage(sizes, sees=False), uses_video=False, reads=False, options=BLSTM),
    "a_mtl_si": System(lambda sizes: SingleStage(sizes, sees=False, ctc="hidden"), uses_video=False, reads=True, options=BLSTM),
    "av_si": System(SingleStage, uses_video=True, reads=False, options=BLSTM),
    "av_mtl_si": System(lambda sizes: SingleStage(sizes, ctc="hidden"), uses_video=True, reads=True, options=BLSTM),
    "av_s2s": System(Seq2Seq, uses_video=True, reads=False, options=TWO_STAGES),
    "av_mtl_s2s": System(lambda sizes: Seq2Seq(sizes, ctc=True), uses_video=True, reads=True, options=TWO_STAGES),
    "v_s2s": System(lambda sizes: Seq2Seq(sizes, hears=False), uses_video=True, reads=False, options=TWO_STAGES - {"mask_input"}),
    "morrone_av_mtl": System(lambda sizes: SingleStage(sizes, ctc="linear"), uses_video=True, reads=True, options=BLSTM),
    "av_unified": System(Unified, uses_video=True, reads=True, options=UNIFIED, drops=True),
    "asr": System(RecognizerNetwork, uses_video=False, reads=True, options=frozenset({"stack"}), restores=False),
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
