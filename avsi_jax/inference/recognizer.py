"""Recogniser: a checkpoint of `asr` and sound -> phones, the Grid sentence and when each of its words was said.

The judge of restored words: it never saw a gap, and what stands in one has to sound like the word. It always says six words of the
grammar, one a slot, so that a word is right or wrong slot by slot. Some words of the recording itself are heard wrong: read the
error of restored words beside that.

Letters: B clips, N samples, G gaps; six slots. Times in seconds from the first sample.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avsi_jax.audio import stft
from avsi_jax.data import grid_text
from avsi_jax.data.features import FeatureConfig, frames_of_length, record_audio, standardise
from avsi_jax.inference import restorer
from avsi_jax.models import build, ctc_decoding, systems
from avsi_jax.presets import RECORD_RATE, get
from avsi_jax.training.checkpoints import CheckpointError


class Recognition(NamedTuple):
    """What was heard in B sounds.

    A sound with too few steps for any sentence (some 0.4 s) has no words, spans of 0 and -inf.
    """

    transcript: list[str]  # B texts of the run's units ("B IH N ..."), without a grammar
    words: list[tuple[str, ...]]  # B times six: the sentence with the most likely alignment
    span_s: np.ndarray  # (B, 6, 2) [start, end) of each word: from its first label to its last, which CTC says short and late
    log_probability: np.ndarray  # (B,) of that alignment, natural, a step of the network


class RecognitionErrors(NamedTuple):
    """What was heard in B sounds with gaps, and which of the words that a gap touches came out wrong."""

    words: list[str]  # B sentences of six words, '' where nothing was heard or judged
    phones: list[str]  # B texts, Heard.said
    touched: np.ndarray  # bool (B, 6); nowhere in what is not judged: another text than a Grid sentence, sound that isn't finite
    wrong: np.ndarray  # bool (B, 6), of those touched

    @property
    def error(self) -> np.ndarray:
        """(B,) wrong words over touched ones; NaN where no word is touched."""
        with np.errstate(invalid="ignore"):
            return self.wrong.sum(1) / self.touched.sum(1)


class Recognizer:
    """A trained recogniser. `which`: 'best' by validation, 'last', or a step."""

    def __init__(self, run: restorer.Run):
        self.config, self.params, self.step = run.config, run.params, run.step
        self.spec = get(run.config.preset)
        feature_config = build.make_feature_config(run.config, run.normalisation)
        nothing = build.example_features(run.config)
        self._read = jax.jit(functools.partial(_read, build.make_model(run.config), feature_config, nothing))

    @classmethod
    def from_workdir(cls, workdir: str | Path, which: str = "best") -> Recognizer:
        """The checkpoint of a training; CheckpointError says what is missing, or that the system is no recogniser."""
        run = restorer.read_run(workdir, which)
        if systems.get(run.config.system).restores:
            raise CheckpointError(f"{workdir} holds a run of {run.config.system}; expected a recogniser (avsi-train --config=asr)")
        return cls(run)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of config and parameters: the same judge judges alike, another checkpoint has another one."""
        told = hashlib.sha256(self.config.to_json_best_effort(sort_keys=True).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            told.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
        return told.hexdigest()[:16]

    @property
    def described(self) -> str:
        """One line for a summary."""
        return f"{self.config.system}, step {self.step}, {self.fingerprint}"

    @property
    def units(self) -> str:
        return self.config.ctc_units

    def hear(self, audio: np.ndarray, lengths: np.ndarray) -> Recognition:
        """Sound (B, N) at RECORD_RATE, int16 or float in [-1, 1], and how many samples (B,) of each are the clip's.

        What stands behind them is not heard. ValueError for another shape or type, sound that isn't finite, or clips longer than
        those of the run's preset (3 s).
        """
        audio, lengths = _checked(audio, lengths, self.spec.record_samples)
        logits, num_steps = map(np.asarray, self._read(self.params, audio, lengths))
        sentences = ctc_decoding.best_sentences(logits, num_steps, self.units)
        said = ctc_decoding.greedy(logits, num_steps, self.units)
        return Recognition(said, sentences.words, self._seconds(sentences.span, lengths), sentences.log_probability / num_steps)

    def judge(
        self, audio: np.ndarray, lengths: np.ndarray, true: Sequence[str], span_s: np.ndarray, gap: np.ndarray
    ) -> RecognitionErrors:
        """`judged` of what is heard in sound (B, N) of lengths (B,), as `hear` takes them; the first call of a shape compiles.

        A sound that isn't finite is not judged (no words, nothing touched): scores of it have their reason, and others go on.
        """
        if self.units != "phones":
            raise ValueError(f"the judge hears {self.units}; expected a recogniser of phones (config.ctc_units)")
        inside = np.arange(np.shape(audio)[-1]) < np.reshape(lengths, (-1, 1))
        finite = (np.isfinite(audio) | ~inside).all(-1)
        found = judged(self.hear(np.where(finite[:, None], audio, 0).astype(np.asarray(audio).dtype), lengths), true, span_s, gap)
        words, phones = ([said if known else "" for said, known in zip(of, finite)] for of in (found.words, found.phones))
        return RecognitionErrors(words, phones, found.touched & finite[:, None], found.wrong & finite[:, None])

    def _seconds(self, span: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Steps [start, end) -> seconds in the clip: a step begins half a hop before the centre of its first frame."""
        first = 0 if self.spec.centred else self.spec.window / 2
        at = (first + (span * self.config.stack - 0.5) * self.spec.hop) / self.spec.rate
        return np.where(span.any(-1, keepdims=True), np.clip(at, 0, lengths[:, None, None] / RECORD_RATE), 0.0)


def _checked(audio, lengths, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Sound as float32 in units of int16, which is what `features` take, and int32 lengths."""
    audio, lengths = np.asarray(audio), np.asarray(lengths)
    if audio.ndim != 2 or not audio.size or not (audio.dtype == np.int16 or np.issubdtype(audio.dtype, np.floating)):
        raise ValueError(f"sound: found {audio.dtype} {audio.shape}, expected (B, N) of int16, or of floats in [-1, 1]")
    if lengths.shape != audio.shape[:1] or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths: found {lengths.dtype} {lengths.shape}, expected {audio.shape[:1]} whole numbers, one a sound")
    if lengths.min() < 0 or lengths.max() > (most := min(audio.shape[1], longest)):
        raise ValueError(f"lengths: found {lengths.min()} to {lengths.max()} samples, expected 0 to {most} at {RECORD_RATE} Hz")
    inside = np.arange(audio.shape[1]) < lengths[:, None]
    scale = 1 if audio.dtype == np.int16 else 32768
    audio = np.where(inside, audio, 0).astype(np.float32) * np.float32(scale)
    if bad := int((~np.isfinite(audio)).any(1).sum()):
        raise ValueError(f"sound: {bad} of {len(audio)} hold NaN or infinite samples; expected finite ones")
    return audio, lengths.astype(np.int32)


def _read(model, config: FeatureConfig, nothing, params, audio, lengths) -> tuple[jax.Array, jax.Array]:
    """Logits (B, S, L) and true steps (B,) by the way that training hears a clean clip; `nothing` stands in for the pictures."""
    waveform, lengths = record_audio({"audio": audio, "audio_length": lengths}, config.spec)
    num_frames = frames_of_length(lengths, config.spec)
    features = nothing._replace(
        spectrogram=stft.log_mel_of_record(waveform, config.spec),
        valid=jnp.arange(config.spec.num_frames)[None] < num_frames[:, None],
        num_frames=num_frames,
    )
    output = model.apply({"params": params}, standardise(features, config))
    return output.logits, output.num_steps


# ---- right or wrong ------------------------------------------------------------------------------------------------------------


def judged(heard: Recognition, true: Sequence[str], span_s: np.ndarray, gap: np.ndarray) -> RecognitionErrors:
    """Which words a gap touches, and which of them are wrong: true B texts ("bin blue ..."), span_s (B, 6, 2) as of `word_spans`,
    gap (B, G, 2) in record samples."""
    b, shapes = len(heard.words), (len(true), np.shape(span_s), np.shape(gap))
    if shapes[:2] != (b, (b, len(grid_text.SLOTS), 2)) or len(shapes[2]) != 3 or shapes[2][::2] != (b, 2):
        raise ValueError(f"found {b} sounds, and texts, spans and gaps {shapes}; expected B, (B, 6, 2) and (B, G, 2)")
    known = np.array([_is_sentence(said) for said in true], bool)
    touched = touched_words(span_s, gap) & known[:, None]
    said = [sentence.split() if k else [""] * len(grid_text.SLOTS) for sentence, k in zip(true, known)]
    return RecognitionErrors([*map(" ".join, heard.words)], heard.transcript, touched, wrong_words(heard.words, said) & touched)


def _is_sentence(said: str) -> bool:
    words = said.split()
    return len(words) == len(grid_text.SLOTS) and all(word in slot.values() for word, slot in zip(words, grid_text.SLOTS))


def word_spans(words: Sequence[Sequence[dict]], offset_s: np.ndarray, otherwise: np.ndarray | None = None) -> np.ndarray:
    """(B, 6, 2) s on the sound's clock: when words were said by the corpus' times, on the picture's clock: offset_s (B,) earlier.

    words: of B stored examples, {word, start_s, end_s} each. Where not all six are timed: of `otherwise` (B, 6, 2), such as
    Heard.span_s of the recordings (from CTC's first label of a word to its last, a little short); NaN without: no gap touches them.
    """
    spans = np.full((len(words), len(grid_text.SLOTS), 2), np.nan) if otherwise is None else np.array(otherwise, np.float64)
    for span, said, lag in zip(spans, words, np.asarray(offset_s, np.float64), strict=True):
        if len(said) == len(grid_text.SLOTS):
            span[:] = np.array([(word["start_s"], word["end_s"]) for word in said]) + lag
    return spans


def wrong_words(words: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> np.ndarray:
    """bool (B, 6): slot by slot, whether the word heard is another than the one said; no word is wrong everywhere."""
    if len(words) != len(true) or any(len(row) != len(grid_text.SLOTS) for row in true):
        raise ValueError(f"found {len(words)} sentences heard and {len(true)} said, expected as many, those said of six words")
    nothing = ("",) * len(grid_text.SLOTS)
    wrong = [[a != b for a, b in zip(heard or nothing, said)] for heard, said in zip(words, true)]
    return np.array(wrong, bool).reshape(-1, len(grid_text.SLOTS))


def touched_words(span_s: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """bool (B, 6): which words, said at span_s (B, 6, 2) on the sound's clock, a gap (B, G, 2) in record samples touches."""
    start, end = np.moveaxis(np.asarray(span_s) * RECORD_RATE, -1, 0)[..., None]
    first, last = np.moveaxis(np.asarray(gap)[:, None], -1, 0)
    return ((first < end) & (start < last) & (first < last)).any(-1)
