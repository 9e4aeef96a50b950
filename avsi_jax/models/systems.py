"""The networks of all systems, as Flax modules, and the registry of systems.

A network maps Features (masked spectrogram (B, F, K), visual features (B, S, V), valid lengths) to a restored spectrogram
(B, F, K) and, with a CTC head, to logits. "Sequence-to-sequence" is meant as in the paper: an encoder and a decoder of the same
length, without attention or autoregression. docs/systems.md has a drawing of each network and its departures from the source.

Letters: B clips, F spectrogram frames, S time steps, K bands, V visual features, L labels, I inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from avsi_jax.data.features import Features, interpolate
from avsi_jax.models.lstm import BidirectionalLSTM


class Output(NamedTuple):
    """What a network returns."""

    level: jax.Array | None  # (B, F, K) restored spectrogram; None for a recognizer
    logits: jax.Array | None = None  # (B, S, L) of the CTC head; None without one
    num_steps: jax.Array | None = None  # (B,) valid time steps of the logits


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The fields of a config that define a network (configs/base.py explains them); not every system uses every field."""

    bands: int  # K
    labels: int = 42  # L, outputs of the CTC head, blank included
    layers: int = 3  # of each stack of bidirectional LSTMs
    units: int = 256  # per direction
    bottleneck: int = 136  # units of the layer after the encoder; 0: none
    bottleneck_relu: bool = True
    skip: bool = False  # visual features also go directly to the decoder
    output: str = "linear"  # or 'relu'
    mask_input: bool = False  # the gap mask is an input
    stack: int = 1  # spectrogram frames per LSTM time step
    video_layers: int = 0  # av_unified: layers on the visual features alone
    feedback: int = 0  # av_unified: layers after which the CTC output is fed to the following ones; 0: off
    dropout: float = 0.0
    video_rate: str = "audio"
    lstm: str = "auto"
    dtype: str = "float32"  # of the LSTMs' products
    init: str = "flax"  # initial parameters, or 'keras'


# ---- blocks --------------------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """`layers` bidirectional LSTM layers of `units` per direction: (B, S, I) -> (B, S, 2 units).

    dropout_ids: (B,) id hashes of the clips in training, None otherwise; they seed the dropout after each layer.
    """

    layers: int
    units: int
    lstm: str
    dropout: float = 0.0
    dtype: str = "float32"
    initial: str = "flax"

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array, dropout_ids: jax.Array | None = None) -> jax.Array:
        for i in range(self.layers):
            x = BidirectionalLSTM(self.units, self.lstm, self.dtype, self.initial, name=f"blstm_{i + 1}")(x, lengths)
            if self.dropout and dropout_ids is not None:
                x = apply_dropout(x, self.dropout, self.make_rng("dropout"), dropout_ids)
        return x


def apply_dropout(x: jax.Array, rate: float, key: jax.Array, clip_ids: jax.Array) -> jax.Array:
    """Sets `rate` of the values of (B, S, I) to 0 and scales the others, with the same mask in every time step of a clip.

    (Gal & Ghahramani 2016.) The masks are drawn from the key and clip_ids (B,): they do not depend on the batch or the devices.
    """
    keep = lambda clip_id: jax.random.bernoulli(jax.random.fold_in(key, clip_id), 1 - rate, x.shape[-1:])
    return jnp.where(jax.vmap(keep)(clip_ids)[:, None], x / (1 - rate), 0.0)


def make_stack(sizes: Sizes, name: str, layers: int | None = None) -> Stack:
    """A Stack of `layers` layers (default: sizes.layers), as a submodule `name` of the module that calls it."""
    layers = sizes.layers if layers is None else layers
    init = "keras_orthogonal" if sizes.init == "keras" and name == "encoder" else sizes.init  # as the paper's code has it
    return Stack(layers, sizes.units, sizes.lstm, sizes.dropout, sizes.dtype, init, name=name)


def dense_init(sizes: Sizes) -> nn.initializers.Initializer:
    """Initial weights of dense layers, except those of CTC heads: LeCun normal as in flax, Glorot uniform as in Keras."""
    return nn.initializers.glorot_uniform() if sizes.init == "keras" else nn.linear.default_kernel_init


def ctc_init(sizes: Sizes) -> nn.initializers.Initializer:
    """Initial weights of the CTC head behind the decoder: He normal as in the paper's code for sizes.init 'keras'."""
    return nn.initializers.he_normal() if sizes.init == "keras" else nn.linear.default_kernel_init


def audio_inputs(features: Features, sizes: Sizes) -> list[jax.Array]:
    """The audio inputs of a network: the masked spectrogram (B, F, K) and, with sizes.mask_input, the gap mask (B, F, 1)."""
    mask = [features.mask[..., None].astype(features.spectrogram.dtype)] if sizes.mask_input else []
    return [features.spectrogram, *mask]


def output_layer(x: jax.Array, sizes: Sizes) -> jax.Array:
    """The output layer (B, S, I) -> (B, S, K), as submodule `output` of the module that calls it."""
    bands = nn.Dense(sizes.bands, kernel_init=dense_init(sizes), name="output")(x)
    return nn.relu(bands) if sizes.output == "relu" else bands


def stack_frames(x: jax.Array, count: int) -> jax.Array:
    """Joins each `count` frames to one time step: (B, F, I) -> (B, ceil(F / count), count * I), the last one padded with zeros."""
    if count == 1:
        return x
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % count), (0, 0)))
    return x.reshape(x.shape[0], -1, count * x.shape[2])


def unstack_frames(x: jax.Array, num_frames: int, count: int) -> jax.Array:
    """The inverse of `stack_frames`: (B, S, count * K) -> (B, num_frames, K)."""
    return x if count == 1 else x.reshape(x.shape[0], -1, x.shape[2] // count)[:, :num_frames]


# ---- networks of the paper and of Morrone et al. -------------------------------------------------------------------------------


class SingleStage(nn.Module):
    """Audio, or audio and video joined -> BLSTMs -> output layer: a_si, av_si.

    ctc='hidden' (a_mtl_si, av_mtl_si, the paper's code): a CTC head behind a ReLU layer of `bottleneck` units after the BLSTMs.
    ctc='linear' (morrone_av_mtl): a CTC head directly after the BLSTMs.
    """

    sizes: Sizes
    uses_video: bool = True
    ctc: str = ""

    @nn.compact
    def __call__(self, features: Features, train: bool = False) -> Output:
        dropout_ids = features.id_hash if train else None
        x = jnp.concatenate(audio_inputs(features, self.sizes) + [features.video] * self.uses_video, -1)
        x = make_stack(self.sizes, "decoder")(x, features.num_frames, dropout_ids)
        level = output_layer(x, self.sizes)
        if not self.ctc:
            return Output(level)
        has_bottleneck = self.ctc == "hidden" and self.sizes.bottleneck
        bottleneck = nn.Dense(self.sizes.bottleneck, kernel_init=dense_init(self.sizes), name="bottleneck")
        ctc_input = bottleneck(x) if has_bottleneck else x
        ctc_input = nn.relu(ctc_input) if has_bottleneck and self.sizes.bottleneck_relu else ctc_input
        ctc_head = nn.Dense(self.sizes.labels, kernel_init=ctc_init(self.sizes), name="ctc")
        return Output(level, ctc_head(ctc_input), features.num_frames)


class Seq2Seq(nn.Module):
    """Video -> BLSTMs (encoder) [-> ReLU layer of `bottleneck` units], joined with audio -> BLSTMs (decoder) -> output layer.

    av_s2s; v_s2s without audio; av_mtl_s2s with a CTC head on the output of the encoder. With video_rate='video' the encoder has
    one time step per video frame, and its output is interpolated to the spectrogram frames.
    """

    sizes: Sizes
    uses_audio: bool = True
    ctc: bool = False

    @nn.compact
    def __call__(self, features: Features, train: bool = False) -> Output:
        dropout_ids = features.id_hash if train else None
        sizes, at_video_rate = self.sizes, self.sizes.video_rate == "video"
        steps = features.num_video_frames if at_video_rate else features.num_frames
        encoded = make_stack(sizes, "encoder")(features.video, steps, dropout_ids)
        if sizes.bottleneck:
            encoded = nn.Dense(sizes.bottleneck, kernel_init=dense_init(sizes), name="bottleneck")(encoded)
            encoded = nn.relu(encoded) if sizes.bottleneck_relu else encoded
        to_audio_rate = (lambda a: interpolate(a, features.positions)) if at_video_rate else lambda a: a
        encoded = to_audio_rate(encoded)
        he = nn.initializers.he_normal()
        logits = nn.Dense(sizes.labels, kernel_init=he, name="ctc")(encoded) if self.ctc else None
        skipped = [to_audio_rate(features.video)] * sizes.skip
        x = jnp.concatenate(audio_inputs(features, sizes) * self.uses_audio + [encoded] + skipped, -1)
        x = make_stack(sizes, "decoder")(x, features.num_frames, dropout_ids)
        return Output(output_layer(x, sizes), logits, features.num_frames if self.ctc else None)


# ---- our networks --------------------------------------------------------------------------------------------------------------


class Unified(nn.Module):
    """av_unified: one network for audio and video, audio only (no face in the clip) and video only (all audio masked).

    Each `stack` frames are one time step. Masked spectrogram, gap mask, visual features and their visibility are joined and go to
    one stack of BLSTMs, followed by the output layer and the CTC head. With `video_layers`, the output of that many BLSTMs on the
    visual features is joined as well. With `feedback`, the softmax of the CTC head after that many layers goes through a linear
    layer and is added to the input of the following layers (self-conditioned CTC, Nozaki & Komatsu 2021).
    """

    sizes: Sizes

    @nn.compact
    def __call__(self, features: Features, train: bool = False) -> Output:
        dropout_ids = features.id_hash if train else None
        sizes, count = self.sizes, self.sizes.stack
        steps = -(-features.num_frames // count)
        valid, visible = features.valid[..., None], (features.seen & features.valid)[..., None]
        video = jnp.concatenate([jnp.where(visible, features.video, 0.0), visible.astype(features.video.dtype)], -1)
        # The mean over a time step: lips move slowly compared with the frame rate of the spectrogram.
        video = stack_frames(video, count).reshape(video.shape[0], -1, count, video.shape[2]).mean(2)
        audio = jnp.where(valid, jnp.concatenate(audio_inputs(features, sizes), -1), 0.0)
        inputs = [stack_frames(audio, count), video]
        if sizes.video_layers:
            inputs.append(make_stack(sizes, "encoder", sizes.video_layers)(video, steps, dropout_ids))
        x, ctc_head = jnp.concatenate(inputs, -1), nn.Dense(sizes.labels, name="ctc")
        if sizes.feedback:
            x = make_stack(sizes, "reader", sizes.feedback)(x, steps, dropout_ids)
            x = x + nn.Dense(x.shape[-1], name="feedback")(nn.softmax(ctc_head(x)))
        x = make_stack(sizes, "decoder", sizes.layers - sizes.feedback)(x, steps, dropout_ids)
        bands = nn.Dense(count * sizes.bands, name="output")(x)
        return Output(unstack_frames(bands, features.mask.shape[1], count), ctc_head(x), steps)


class RecognizerNetwork(nn.Module):
    """asr: audio -> convolutions over time -> CTC. It scores restored words and restores nothing.

    A layer covers two time steps on either side, so a phone is detected where it is spoken and an error in one word does not affect
    others. With BLSTMs, which cover the whole clip, words were detected up to half a second away from where they are.
    """

    sizes: Sizes

    @nn.compact
    def __call__(self, features: Features, train: bool = False) -> Output:
        sizes, steps = self.sizes, -(-features.num_frames // self.sizes.stack)
        x = stack_frames(jnp.where(features.valid[..., None], features.spectrogram, 0.0), sizes.stack)
        inside = (jnp.arange(x.shape[1])[None] < steps[:, None])[..., None]
        for i in range(sizes.layers):
            y = nn.relu(nn.LayerNorm(name=f"norm_{i + 1}")(nn.Conv(sizes.units, (5,), name=f"conv_{i + 1}")(x)))
            if sizes.dropout and train:
                y = apply_dropout(y, sizes.dropout, self.make_rng("dropout"), features.id_hash)
            x = jnp.where(inside, x + y if i else y, 0.0)
        return Output(None, nn.Dense(sizes.labels, name="ctc")(x), steps)


# ---- registry ------------------------------------------------------------------------------------------------------------------


class System(NamedTuple):
    """What training, inference and evaluation need to know about a system."""

    build: Callable[[Sizes], nn.Module]
    uses_video: bool
    has_ctc_head: bool
    options: frozenset[str]  # the fields of OPTIONS that it supports
    restores: bool = True  # False: a recognizer
    handles_missing_streams: bool = False  # trained with clips without a face or with all audio masked


# Config fields that only some systems support -> their values; the first value is the only one for all other systems.
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
    "a_si": System(lambda sizes: SingleStage(sizes, uses_video=False), uses_video=False, has_ctc_head=False, options=BLSTM),
    "a_mtl_si": System(
        lambda sizes: SingleStage(sizes, uses_video=False, ctc="hidden"), uses_video=False, has_ctc_head=True, options=BLSTM
    ),
    "av_si": System(SingleStage, uses_video=True, has_ctc_head=False, options=BLSTM),
    "av_mtl_si": System(lambda sizes: SingleStage(sizes, ctc="hidden"), uses_video=True, has_ctc_head=True, options=BLSTM),
    "av_s2s": System(Seq2Seq, uses_video=True, has_ctc_head=False, options=TWO_STAGES),
    "av_mtl_s2s": System(lambda sizes: Seq2Seq(sizes, ctc=True), uses_video=True, has_ctc_head=True, options=TWO_STAGES),
    "v_s2s": System(
        lambda sizes: Seq2Seq(sizes, uses_audio=False),
        uses_video=True,
        has_ctc_head=False,
        options=TWO_STAGES - {"mask_input"},
    ),
    "morrone_av_mtl": System(lambda sizes: SingleStage(sizes, ctc="linear"), uses_video=True, has_ctc_head=True, options=BLSTM),
    "av_unified": System(Unified, uses_video=True, has_ctc_head=True, options=UNIFIED, handles_missing_streams=True),
    "asr": System(RecognizerNetwork, uses_video=False, has_ctc_head=True, options=frozenset({"stack"}), restores=False),
}


def get(name: str) -> System:
    """The system of that name; ValueError lists the known names."""
    if name not in SYSTEMS:
        raise ValueError(f"unknown system {name!r}; expected one of {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def composite(output: jax.Array, features: Features) -> jax.Array:
    """(B, F, K): the prediction in the gaps, the input elsewhere."""
    return jnp.where(features.mask[..., None], output, features.spectrogram)


def count_parameters(params: Any) -> int:
    """Number of values in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
