"""Recogniser: a checkpoint of `asr` and sound -> phones, the Grid sentence and when each of its words was said.

The judge of restored words: it never saw a gap, and what stands in one has to sound like the word. It always says six words of the
grammar, one a slot, so that a word is right or wrong slot by slot.

Letters: B clips, N samples, G gaps; six slots. Times in seconds from the first sample.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avsi_jax import decode, experiment, models, restore, stft, text
from avsi_jax.checkpoints import CheckpointError
from avsi_jax.features import FeatureConfig, frames_of_length, record_sound, standardise
from avsi_jax.spec import RECORD_RATE, get


class Heard(NamedTuple):
    """What was heard in B sounds.

    A sound with too few steps for any sentence (some 0.4 s) has no words, spans of 0 and -inf.
    """

    said: list[str]  # B texts of the run's units ("B IH N ..."), without a grammar
    words: list[tuple[str, ...]]  # B times six: the sentence with the most likely alignment
    span_s: np.ndarray  # (B, 6, 2) [start, end) of each word: from its first label to its last, which CTC says short and late
    log_probability: np.ndarray  # (B,) of that alignment, natural, a step of the network


class Recogniser:
    """A trained recogniser. `which`: 'best' by validation, 'last', or a step."""

    def __init__(self, run: restore.Run):
        self.config, self.params, self.step = run.config, run.params, run.step
        self.spec = get(run.config.preset)
        feature_config = experiment.make_feature_config(run.config, run.normalisation)
        nothing = experiment.example_features(run.config)
        self._read = jax.jit(functools.partial(_read, experiment.make_model(run.config), feature_config, nothing))

    @classmethod
    def from_workdir(cls, workdir: str | Path, which: str = "best") -> Recogniser:
        """The checkpoint of a training; CheckpointError says what is missing, or that the system is no recogniser."""
        run = restore.read_run(workdir, which)
        if models.get(run.config.system).restores:
            raise CheckpointError(f"{workdir} holds a run of {run.config.system}; expected a recogniser (avsi-train --config=asr)")
        return cls(run)

    @property
    def units(self) -> str:
        return self.config.ctc_units

    def hear(self, sound: np.ndarray, lengths: np.ndarray) -> Heard:
        """Sound (B, N) at RECORD_RATE, int16 or float in [-1, 1], and how many samples (B,) of each are the clip's.

        What stands behind them is not heard. ValueError for another shape or type, sound that isn't finite, or clips longer than
        those of the run's preset (3 s).
        """
        sound, lengths = _checked(sound, lengths, self.spec.record_samples)
        logits, num_steps = map(np.asarray, self._read(self.params, sound, lengths))
        sentences = decode.best_sentences(logits, num_steps, self.units)
        said = decode.greedy(logits, num_steps, self.units)
        return Heard(said, sentences.words, self._seconds(sentences.span, lengths), sentences.log_probability / num_steps)

    def _seconds(self, span: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Steps [start, end) -> seconds in the clip: a step begins half a hop before the centre of its first frame."""
        first = 0 if self.spec.centred else self.spec.window / 2
        at = (first + (span * self.config.stack - 0.5) * self.spec.hop) / self.spec.rate
        return np.where(span.any(-1, keepdims=True), np.clip(at, 0, lengths[:, None, None] / RECORD_RATE), 0.0)


def _checked(sound, lengths, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Sound as float32 in units of int16, which is what `features` take, and int32 lengths."""
    sound, lengths = np.asarray(sound), np.asarray(lengths)
    if sound.ndim != 2 or not sound.size or not (sound.dtype == np.int16 or np.issubdtype(sound.dtype, np.floating)):
        raise ValueError(f"sound: found {sound.dtype} {sound.shape}, expected (B, N) of int16, or of floats in [-1, 1]")
    if lengths.shape != sound.shape[:1] or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths: found {lengths.dtype} {lengths.shape}, expected {sound.shape[:1]} whole numbers, one a sound")
    if lengths.min() < 0 or lengths.max() > (most := min(sound.shape[1], longest)):
        raise ValueError(f"lengths: found {lengths.min()} to {lengths.max()} samples, expected 0 to {most} at {RECORD_RATE} Hz")
    inside = np.arange(sound.shape[1]) < lengths[:, None]
    scale = 1 if sound.dtype == np.int16 else 32768
    sound = np.where(inside, sound, 0).astype(np.float32) * np.float32(scale)
    if bad := int((~np.isfinite(sound)).any(1).sum()):
        raise ValueError(f"sound: {bad} of {len(sound)} hold NaN or infinite samples; expected finite ones")
    return sound, lengths.astype(np.int32)


def _read(model, config: FeatureConfig, nothing, params, audio, lengths) -> tuple[jax.Array, jax.Array]:
    """Logits (B, S, L) and true steps (B,) by the way that training hears a clean clip; `nothing` stands in for the pictures."""
    sound, lengths = record_sound({"audio": audio, "audio_length": lengths}, config.spec)
    num_frames = frames_of_length(lengths, config.spec)
    features = nothing._replace(
        spectrogram=stft.log_mel_of_record(sound, config.spec),
        valid=jnp.arange(config.spec.num_frames)[None] < num_frames[:, None],
        num_frames=num_frames,
    )
    output = model.apply({"params": params}, standardise(features, config))
    return output.logits, output.num_steps


# ---- right or wrong ------------------------------------------------------------------------------------------------------------


def wrong_words(words: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> np.ndarray:
    """bool (B, 6): slot by slot, whether the word heard is another than the one said; no word is wrong everywhere."""
    if len(words) != len(true) or any(len(row) != len(text.SLOTS) for row in true):
        raise ValueError(f"found {len(words)} sentences heard and {len(true)} said, expected as many, those said of six words")
    nothing = ("",) * len(text.SLOTS)
    wrong = [[a != b for a, b in zip(heard or nothing, said)] for heard, said in zip(words, true)]
    return np.array(wrong, bool).reshape(-1, len(text.SLOTS))


def touched_words(span_s: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """bool (B, 6): which words, said at span_s (B, 6, 2) on the sound's clock, a gap (B, G, 2) in record samples touches."""
    start, end = np.moveaxis(np.asarray(span_s) * RECORD_RATE, -1, 0)[..., None]
    first, last = np.moveaxis(np.asarray(gap)[:, None], -1, 0)
    return ((first < end) & (start < last) & (first < last)).any(-1)
