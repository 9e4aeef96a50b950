"""Restorer: a checkpoint and a damaged raw batch -> restored log-mel, waveform and what was read.

The one way through features, models, vocoder and decode: evaluation and repair both take it.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from avsi_jax.audio import gap_masks, griffin_lim, stft
from avsi_jax.data import grid_text
from avsi_jax.data.features import Features, Normalisation, hear, record_audio, standardise, to_level
from avsi_jax.inference import trained_run, weights
from avsi_jax.inference.trained_run import Run
from avsi_jax.media import clip_io
from avsi_jax.models import build, ctc_decoding, systems
from avsi_jax.presets import RECORD_RATE, Spec, get
from avsi_jax.runtime import cpu_batching

MOST_MISREAD = 0.5  # of a sentence's letters or phones, before it is taken for a guess


class Restored(NamedTuple):
    """level (B, F, K): the prediction where the sound is lost, what was heard elsewhere; said: B texts as the text head gives them,
    characters or phones, '' without one; logits (B, S, C) of that head and the clips' steps (B,), or None.

    The level and those of `features` are true levels, as stft and vocoder know them, whatever the network sees standardised.
    """

    level: jax.Array
    transcript: list[str]
    features: Features
    logits: jax.Array | None = None
    num_steps: jax.Array | None = None


def read_run(checkpoint: str | Path, which: str = "best") -> Run:
    """What a checkpoint holds: the workdir of a training ('best' by validation, 'last', or a step), a folder of weights, or the
    name of weights that came with this installation, 'pretrained' for the best of them. ValueError says what is missing.
    """
    folder = weights.locate(checkpoint)
    return weights.read(folder).run if folder else trained_run.read(checkpoint, which)


class Restorer:
    """A trained system, ready to restore. `which`: 'best' by validation, 'last', or a step.

    protocol: of gap_masks.PROTOCOLS. What is to be restored is gone as sound, whatever the training took away, so that no hidden sample
    may reach the network; 'paper' is for the comparison with the paper alone.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, params, step: int, normalisation: Normalisation | None = None,
        *, protocol: str = "waveform",
    ):  # fmt: skip
        self.config, self.params, self.step = config, params, step
        self.spec = get(config.preset)
        self.system = systems.get(config.system)
        feature_config = dataclasses.replace(build.make_feature_config(config, normalisation), protocol=protocol)
        self._predict = jax.jit(functools.partial(predict, build.make_model(config), feature_config))
        self._hear = jax.jit(functools.partial(hear, config=feature_config))

    @classmethod
    def load(cls, checkpoint: str | Path, which: str = "best", *, protocol: str = "waveform") -> Restorer:
        """Of any checkpoint that `read_run` takes; ValueError says what is missing, or that the system restores nothing."""
        return cls.of_run(read_run(checkpoint, which), checkpoint, protocol)

    @classmethod
    def from_workdir(cls, workdir: str | Path, which: str = "best", *, protocol: str = "waveform") -> Restorer:
        """Of a training alone; CheckpointError says what is missing, or that the system restores nothing."""
        return cls.of_run(trained_run.read(workdir, which), workdir, protocol)

    @classmethod
    def of_run(cls, run: Run, where, protocol: str) -> Restorer:
        cls.check(run, where)
        return cls(*run, protocol=protocol)

    @staticmethod
    def check(run: Run, where) -> None:
        """CheckpointError where a run is of a system that restores nothing."""
        if not systems.get(run.config.system).restores:
            from avsi_jax.training.checkpoints import CheckpointError

            raise CheckpointError(
                f"{where} holds a run of {run.config.system}, which restores nothing; expected one of a system that does, "
                "such as av_unified (avsi_jax.inference.recognizer hears words with this one)"
            )

    @property
    def name(self) -> str:
        return self.config.system

    def restore(self, batch: dict, gap: np.ndarray) -> Restored:
        """Raw batch (arrays of `input_pipeline`, clean or emptied) and gaps (B, G, 2) in record samples -> Restored."""
        features, level, logits, num_steps = self._predict(self.params, _arrays(batch), jnp.asarray(gap))
        said = [""] * len(level) if logits is None else ctc_decoding.greedy(logits, num_steps, self.config.ctc_units)
        return Restored(level, said, features, logits, num_steps)

    def hear(self, batch: dict, gap: np.ndarray) -> Features:
        """What there is to hear and to see, true levels: no network."""
        return self._hear(_arrays(batch), jnp.asarray(gap))

    def sentences(self, restored: Restored) -> list[str]:
        """B sentences in words: the likeliest of Grid's for what was read; '' where less than half of its letters or phones were
        read without the help of a grammar, which makes a sentence of anything.
        """
        if restored.logits is None:
            return list(restored.transcript)
        units = self.config.ctc_units
        found = ctc_decoding.best_sentences(restored.logits, restored.num_steps, units)
        sentences = [" ".join(words) for words in found.words]
        spelled = [" ".join(grid_text.phones_of(s)) if units == "phones" else s for s in sentences]
        measure = ctc_decoding.phone_error_rate if units == "phones" else ctc_decoding.character_error_rate
        wrong = measure(list(zip(restored.transcript, spelled, strict=True))).rates
        return [s if share <= MOST_MISREAD else "" for s, share in zip(sentences, wrong, strict=True)]

    def to_audio(self, level: jax.Array, batch: dict, gap: np.ndarray) -> np.ndarray:
        """Levels (B, F, K) -> the batch's sound (B, record_samples) float32 at RECORD_RATE with its lost samples filled in."""
        return fill(level, batch, gap, self.config.preset)


def _arrays(batch: dict) -> dict:
    return {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}


def predict(model, feature_config, params, batch, gap):
    """Arrays of a raw batch and its gaps -> what was heard, the restored level (B, F, K), and logits with their steps or None."""
    heard = hear(batch, gap, feature_config)
    output = model.apply({"params": params}, standardise(heard, feature_config))
    return heard, systems.composite(to_level(output.level, feature_config), heard), output.logits, output.num_steps


def fill(level: jax.Array, batch: dict, gap: np.ndarray, preset: str) -> np.ndarray:
    """Levels -> sound (B, record_samples) at RECORD_RATE: the batch's own outside the gaps, Griffin-Lim with it held inside."""
    spec = get(preset)
    at_preset = np.asarray(
        inpaint_at_preset(jnp.asarray(level), batch["audio"], batch["audio_length"], jnp.asarray(gap), batch["id_hash"], spec)
    )
    audio, missing = _record_view(batch["audio"], batch["audio_length"], jnp.asarray(gap), spec)
    return np.where(missing, at_record_rate(at_preset, spec), np.asarray(audio))


def at_record_rate(waveforms: np.ndarray, spec: Spec) -> np.ndarray:
    """(B, n) at the preset's rate -> (B, record_samples) at RECORD_RATE."""
    return np.stack([fit(clip_io.resample(x, spec.rate, RECORD_RATE), spec.record_samples) for x in waveforms])


def recording(batch: dict, spec: Spec) -> np.ndarray:
    """The batch's sound (B, record_samples) as float32 at RECORD_RATE, 0 behind each clip's end."""
    return np.asarray(_recording(batch["audio"], batch["audio_length"], spec))


def fit(x: np.ndarray, length: int) -> np.ndarray:
    """(N,) cut or zero-padded to `length`."""
    return np.pad(x[:length], (0, max(0, length - len(x))))


@functools.partial(jax.jit, static_argnames="spec")
def _recording(audio, length, spec):
    return record_audio({"audio": audio, "audio_length": length}, spec)[0]


@functools.partial(jax.jit, static_argnames="spec")
def _record_view(audio, length, gap, spec):
    """Sound (B, record_samples) and which samples are lost; padding never is."""
    waveform, length = record_audio({"audio": audio, "audio_length": length}, spec)
    inside = jnp.arange(spec.record_samples)[None] < length[:, None]
    return waveform, gap_masks.gap_samples(gap, spec.record_samples) & inside


@cpu_batching.shared_out
@functools.partial(jax.jit, static_argnames="spec")
def inpaint_at_preset(level, audio, length, gap, seeds, spec):
    """Levels (B, F, K), audio (B, N) int16 or of its values, lengths, gaps (B, G, 2), seeds (B,) -> sound at the preset's rate."""
    waveform, missing = _record_view(audio, length, gap, spec)
    known = stft.decimate(gap_masks.damage(waveform, missing), spec)
    return griffin_lim.inpaint_gap(level, known, gap_masks.gap_at_preset(missing, spec), spec, seeds=seeds)


@jax.jit
def interpolate_level(level: jax.Array, mask: jax.Array, valid: jax.Array) -> jax.Array:
    """Linear interpolation of levels (B, F, K) across masked frames, between the nearest heard ones in time; held at the ends."""
    heard = valid & ~mask
    frame = jnp.arange(level.shape[1])[None]
    before = jax.lax.cummax(jnp.where(heard, frame, -1), axis=1)
    after = jax.lax.cummin(jnp.where(heard, frame, level.shape[1]), axis=1, reverse=True)
    low = jnp.where(before < 0, after, before)
    high = jnp.where(after >= level.shape[1], before, after)
    low, high = (jnp.clip(i, 0, level.shape[1] - 1) for i in (low, high))
    part = (frame - low) / jnp.maximum(high - low, 1)
    take = lambda i: jnp.take_along_axis(level, i[..., None], axis=1)
    line = take(low) * (1 - part[..., None]) + take(high) * part[..., None]
    return jnp.where(mask[..., None], line, level)
