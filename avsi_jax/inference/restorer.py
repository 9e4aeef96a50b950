"""Restorer: restores the log-mel, the waveform and the transcript of a raw batch with gaps, by a checkpoint.

Evaluation and `Inpainter` both use it: the only path through features, network, vocoder and CTC decoding.

Letters: B clips, G gaps, N samples, F spectrogram frames, K bands, S CTC steps, C labels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from avsi_jax.audio import gap_masks, griffin_lim, stft
from avsi_jax.data import grid_text
from avsi_jax.data.features import (
    FeatureConfig,
    Features,
    Normalisation,
    record_audio,
    standardise,
    to_level,
    unstandardised_features,
)
from avsi_jax.inference import trained_run, weights
from avsi_jax.inference.trained_run import Run
from avsi_jax.media import clip_io
from avsi_jax.models import build, ctc_decoding, systems
from avsi_jax.presets import RECORD_RATE, Spec, get
from avsi_jax.runtime import cpu_batching

MODES = ("natural", "mean")
MAX_MISREAD = 0.5  # share of a sentence's letters or phones that the text head may miss before the sentence counts as a guess


class Restored(NamedTuple):
    """The result of `Restorer.restore`. `level` and the levels of `features` are never standardised."""

    level: jax.Array  # (B, F, K): predicted in masked frames, the input elsewhere
    transcript: list[str]  # B greedy outputs of the text head, characters or phones; '' without a text head
    features: Features
    logits: jax.Array | None = None  # (B, S, C) of the text head
    num_steps: jax.Array | None = None  # (B,) steps of each clip


def read_run(checkpoint: str | Path, which: str = "best") -> Run:
    """Reads a checkpoint: a run directory, a folder of weights, or the name of shipped weights ('pretrained' for the default).

    which: 'best' by validation, 'last', or a step, of a run directory. ValueError names what is missing.
    """
    folder = weights.locate(checkpoint)
    return weights.read(folder).run if folder else trained_run.read(checkpoint, which)


class Restorer:
    """A trained system, ready to restore batches.

    protocol: one of gap_masks.PROTOCOLS. The default sets the gap to zero in the waveform, whatever the training did, so that no
    sample of the gap can reach the network; 'paper' is only for the comparison with the paper.
    mode: one of MODES, which differ for weights with a refiner. 'natural': with the detail of speech that the refiner adds;
    'mean': the prediction of the network itself.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, params, step: int, normalisation: Normalisation | None = None,
        *, protocol: str = "waveform", mode: str = "natural",
    ):  # fmt: skip
        if mode not in MODES:
            raise ValueError(f"mode: found {mode!r}, expected {' or '.join(MODES)}")
        if mode == "mean":
            config, params = build.without_refiner(config, params)
        self.config, self.params, self.step = config, params, step
        self.spec = get(config.preset)
        self.system = systems.get(config.system)
        self.feature_config = dataclasses.replace(build.make_feature_config(config, normalisation), protocol=protocol)
        self._predict = jax.jit(functools.partial(predict, build.make_model(config), self.feature_config))
        self._features = jax.jit(functools.partial(unstandardised_features, config=self.feature_config))

    def __getstate__(self) -> dict:
        """For pickle: what `__init__` takes, since compiled functions cannot be pickled."""
        feature_config = self.feature_config
        settings = {"normalisation": feature_config.normalisation, "protocol": feature_config.protocol}
        return settings | {"config": self.config.to_json(), "params": jax.device_get(self.params), "step": self.step}

    def __setstate__(self, state: dict) -> None:
        config = ml_collections.ConfigDict(json.loads(state["config"])).lock()
        settings = {k: state[k] for k in ("params", "step", "normalisation", "protocol")}
        self.__init__(config, **settings)

    @classmethod
    def load(cls, checkpoint: str | Path, which: str = "best", *, protocol: str = "waveform", mode: str = "natural") -> Restorer:
        """Loads any checkpoint that `read_run` accepts; ValueError names what is missing, or a system that restores nothing."""
        return cls.of_run(read_run(checkpoint, which), checkpoint, protocol, mode)

    @classmethod
    def from_workdir(
        cls, workdir: str | Path, which: str = "best", *, protocol: str = "waveform", mode: str = "natural"
    ) -> Restorer:
        """Loads a run directory; CheckpointError names what is missing, or a system that restores nothing."""
        return cls.of_run(trained_run.read(workdir, which), workdir, protocol, mode)

    @classmethod
    def of_run(cls, run: Run, where: str | Path, protocol: str, mode: str = "natural") -> Restorer:
        """From a run that was read already; `where` names it in an error."""
        cls.check(run, where)
        return cls(*run, protocol=protocol, mode=mode)

    @staticmethod
    def check(run: Run, where: str | Path) -> None:
        """CheckpointError for a run of a system that restores nothing."""
        if not systems.get(run.config.system).restores:
            from avsi_jax.training.checkpoints import CheckpointError

            raise CheckpointError(
                f"{where} holds a run of {run.config.system}, which restores nothing; expected one of a system that does, "
                "such as av_unified (avsi_jax.inference.recognizer recognizes words with this one)"
            )

    @property
    def name(self) -> str:
        """The system's name, such as 'av_unified'."""
        return self.config.system

    @functools.cached_property
    def mean(self) -> Restorer:
        """The same system in mode 'mean'; itself without a refiner."""
        config, feature_config = self.config, self.feature_config
        if not config.refiner:
            return self
        return Restorer(config, self.params, self.step, feature_config.normalisation, protocol=feature_config.protocol, mode="mean")

    def restore(self, batch: dict, gap: np.ndarray) -> Restored:
        """Restores a raw batch of `input_pipeline` in its gaps (B, G, 2) in record samples; samples inside them are ignored."""
        features, level, logits, num_steps = self._predict(self.params, _arrays(batch), jnp.asarray(gap))
        transcript = [""] * len(level) if logits is None else ctc_decoding.greedy(logits, num_steps, self.config.ctc_units)
        return Restored(level, transcript, features, logits, num_steps)

    def features(self, batch: dict, gap: np.ndarray) -> Features:
        """Features of a raw batch with gaps (B, G, 2), levels not standardised; the network is not run."""
        return self._features(_arrays(batch), jnp.asarray(gap))

    def sentences(self, restored: Restored) -> list[str]:
        """The most likely Grid sentence of each of B clips, in words.

        '' where the greedy transcript misses more than MAX_MISREAD of the sentence: the grammar turns any input into a sentence.
        """
        if restored.logits is None:
            return list(restored.transcript)
        units = self.config.ctc_units
        best = ctc_decoding.best_sentences(restored.logits, restored.num_steps, units)
        sentences = [" ".join(words) for words in best.words]
        spelled = [" ".join(grid_text.phones_of(s)) if units == "phones" else s for s in sentences]
        measure = ctc_decoding.phone_error_rate if units == "phones" else ctc_decoding.character_error_rate
        rates = measure(list(zip(restored.transcript, spelled, strict=True))).rates
        return [s if rate <= MAX_MISREAD else "" for s, rate in zip(sentences, rates, strict=True)]

    def to_audio(self, level: jax.Array, batch: dict, gap: np.ndarray) -> np.ndarray:
        """Levels (B, F, K) -> the batch's audio (B, record_samples) float32 at RECORD_RATE, restored in the gaps."""
        return levels_to_audio(level, batch, gap, self.config.preset)


def _arrays(batch: dict) -> dict:
    return {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}


def predict(
    model: nn.Module, feature_config: FeatureConfig, params: dict, batch: dict, gap: jax.Array
) -> tuple[Features, jax.Array, jax.Array | None, jax.Array | None]:
    """Runs the network on the arrays of a raw batch with gaps (B, G, 2).

    Returns (features, restored level (B, F, K), logits or None, CTC steps or None).
    """
    features = unstandardised_features(batch, gap, feature_config)
    output = model.apply({"params": params}, standardise(features, feature_config))
    return features, systems.composite(to_level(output.level, feature_config), features), output.logits, output.num_steps


def levels_to_audio(level: jax.Array, batch: dict, gap: np.ndarray, preset: str) -> np.ndarray:
    """Levels (B, F, K) -> audio (B, record_samples) at RECORD_RATE: the batch's own outside the gaps, Griffin-Lim inside.

    Griffin-Lim keeps the known samples fixed on both sides of a gap.
    """
    spec = get(preset)
    at_preset = np.asarray(
        inpaint_at_preset(jnp.asarray(level), batch["audio"], batch["audio_length"], jnp.asarray(gap), batch["id_hash"], spec)
    )
    audio, missing = _record_view(batch["audio"], batch["audio_length"], jnp.asarray(gap), spec)
    return np.where(missing, at_record_rate(at_preset, spec), np.asarray(audio))


def at_record_rate(waveforms: np.ndarray, spec: Spec) -> np.ndarray:
    """Resamples (B, n) at the preset's rate to (B, record_samples) at RECORD_RATE."""
    return np.stack([pad_or_cut(clip_io.resample(x, spec.rate, RECORD_RATE), spec.record_samples) for x in waveforms])


def recording(batch: dict, spec: Spec) -> np.ndarray:
    """The batch's audio (B, record_samples) as float32 at RECORD_RATE, 0 after each clip's end."""
    return np.asarray(_recording(batch["audio"], batch["audio_length"], spec))


def pad_or_cut(x: np.ndarray, length: int) -> np.ndarray:
    """x (N,) cut or zero-padded to `length` samples."""
    return np.pad(x[:length], (0, max(0, length - len(x))))


@functools.partial(jax.jit, static_argnames="spec")
def _recording(audio, length, spec):
    return record_audio({"audio": audio, "audio_length": length}, spec)[0]


@functools.partial(jax.jit, static_argnames="spec")
def _record_view(audio, length, gap, spec):
    """Audio (B, record_samples) and which samples are in a gap; padding never is."""
    waveform, length = record_audio({"audio": audio, "audio_length": length}, spec)
    inside = jnp.arange(spec.record_samples)[None] < length[:, None]
    return waveform, gap_masks.gap_samples(gap, spec.record_samples) & inside


@cpu_batching.split_over_cores
@functools.partial(jax.jit, static_argnames="spec")
def inpaint_at_preset(
    level: jax.Array, audio: jax.Array, length: jax.Array, gap: jax.Array, seeds: jax.Array, spec: Spec
) -> jax.Array:
    """Restored audio (B, n) at the preset's rate.

    level (B, F, K); audio (B, N) as int16, or as floats in the units of int16; length (B,) samples; gap (B, G, 2) in record
    samples; seeds (B,) of the vocoder's initial phases.
    """
    waveform, missing = _record_view(audio, length, gap, spec)
    known = stft.decimate(gap_masks.mask_audio(waveform, missing), spec)
    lengths = -(-jnp.minimum(length, spec.record_samples) // spec.decimation)
    return griffin_lim.inpaint_gap(level, known, gap_masks.gap_at_preset(missing, spec), spec, seeds=seeds, lengths=lengths)


@jax.jit
def interpolate_level(level: jax.Array, mask: jax.Array, valid: jax.Array) -> jax.Array:
    """Linear interpolation in time of levels (B, F, K) across the frames of `mask` (B, F); constant at a clip's ends."""
    known = valid & ~mask
    frame = jnp.arange(level.shape[1])[None]
    before = jax.lax.cummax(jnp.where(known, frame, -1), axis=1)
    after = jax.lax.cummin(jnp.where(known, frame, level.shape[1]), axis=1, reverse=True)
    low = jnp.where(before < 0, after, before)
    high = jnp.where(after >= level.shape[1], before, after)
    low, high = (jnp.clip(i, 0, level.shape[1] - 1) for i in (low, high))
    weight = (frame - low) / jnp.maximum(high - low, 1)
    take = lambda i: jnp.take_along_axis(level, i[..., None], axis=1)
    line = take(low) * (1 - weight[..., None]) + take(high) * weight[..., None]
    return jnp.where(mask[..., None], line, level)
