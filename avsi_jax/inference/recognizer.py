"""Recognizer: recognizes phones, the Grid sentence and word times in audio, by a checkpoint of `asr`.

It serves as the judge of restored words. It was trained without gaps, and always outputs six words of the grammar, one per slot, so
that each word is right or wrong by its slot. It also makes errors on the recordings themselves: compare the error on restored words
with that.

Letters: B clips, N samples, G gaps, S network steps, L labels; six slots. Times in seconds from the first sample.
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
from avsi_jax.data.features import FeatureConfig, Features, frames_of_length, record_audio, standardise
from avsi_jax.inference import restorer
from avsi_jax.models import build, ctc_decoding, systems
from avsi_jax.presets import RECORD_RATE, get
from avsi_jax.training.checkpoints import CheckpointError


class Recognition(NamedTuple):
    """What was recognized in B clips.

    A clip that is too short for any sentence (about 0.4 s) has no words, spans of 0 and a log probability of -inf.
    """

    transcript: list[str]  # B greedy outputs in the run's units ("B IH N ..."), without a grammar
    words: list[tuple[str, ...]]  # B sentences of six words: those of the most likely alignment
    span_s: np.ndarray  # (B, 6, 2) [start, end) of each word, from its first label to its last; CTC labels are late and short
    log_probability: np.ndarray  # (B,) natural logarithm of that alignment's probability, per network step


class RecognitionErrors(NamedTuple):
    """What was recognized in B clips with gaps, and which of the words that a gap touches are wrong."""

    words: list[str]  # B sentences of six words; '' where nothing was recognized or the clip is not judged
    phones: list[str]  # B texts: Recognition.transcript
    touched: np.ndarray  # bool (B, 6); all false for clips that are not judged: not a Grid sentence, or audio that is not finite
    wrong: np.ndarray  # bool (B, 6), a subset of touched

    @property
    def error(self) -> np.ndarray:
        """(B,) wrong words over touched words; NaN where no word is touched."""
        with np.errstate(invalid="ignore"):
            return self.wrong.sum(1) / self.touched.sum(1)


class Recognizer:
    """A trained recognizer of Grid sentences."""

    def __init__(self, run: restorer.Run):
        self.config, self.params, self.step = run.config, run.params, run.step
        self.spec = get(run.config.preset)
        feature_config = build.make_feature_config(run.config, run.normalisation)
        template = build.example_features(run.config)
        self._logits = jax.jit(functools.partial(_logits, build.make_model(run.config), feature_config, template))

    @classmethod
    def from_workdir(cls, workdir: str | Path, which: str = "best") -> Recognizer:
        """Loads a run directory. which: 'best' by validation, 'last', or a step.

        CheckpointError names what is missing, or a system that is not a recognizer.
        """
        run = restorer.read_run(workdir, which)
        if systems.get(run.config.system).restores:
            raise CheckpointError(f"{workdir} holds a run of {run.config.system}; expected a recognizer (avsi-train --config=asr)")
        return cls(run)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of config and parameters: equal for the same recognizer, different for another checkpoint."""
        digest = hashlib.sha256(self.config.to_json_best_effort(sort_keys=True).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
        return digest.hexdigest()[:16]

    @property
    def described(self) -> str:
        """System, step and fingerprint in one line, for a summary."""
        return f"{self.config.system}, step {self.step}, {self.fingerprint}"

    @property
    def units(self) -> str:
        """'phones' or 'characters'."""
        return self.config.ctc_units

    def recognize(self, audio: np.ndarray, lengths: np.ndarray) -> Recognition:
        """Recognizes audio (B, N) at RECORD_RATE, int16 or float in [-1, 1]; lengths (B,) counts the samples of each clip.

        Samples after a clip's length are ignored. ValueError for another shape or type, audio that is not finite, or clips longer
        than the run's preset (3 s).
        """
        audio, lengths = _checked(audio, lengths, self.spec.record_samples)
        logits, num_steps = map(np.asarray, self._logits(self.params, audio, lengths))
        sentences = ctc_decoding.best_sentences(logits, num_steps, self.units)
        transcript = ctc_decoding.greedy(logits, num_steps, self.units)
        return Recognition(
            transcript, sentences.words, self._seconds(sentences.span, lengths), sentences.log_probability / num_steps
        )

    def judge(
        self, audio: np.ndarray, lengths: np.ndarray, true: Sequence[str], span_s: np.ndarray, gap: np.ndarray
    ) -> RecognitionErrors:
        """`word_errors` of what is recognized in audio (B, N) of lengths (B,), as in `recognize`; compiles once per shape.

        A clip whose audio is not finite is not judged: it has no words and touches none.
        """
        if self.units != "phones":
            raise ValueError(f"the judge recognizes {self.units}; expected a recognizer of phones (config.ctc_units)")
        inside = np.arange(np.shape(audio)[-1]) < np.reshape(lengths, (-1, 1))
        finite = (np.isfinite(audio) | ~inside).all(-1)
        recognition = self.recognize(np.where(finite[:, None], audio, 0).astype(np.asarray(audio).dtype), lengths)
        errors = word_errors(recognition, true, span_s, gap)
        words, phones = ([text if ok else "" for text, ok in zip(texts, finite)] for texts in (errors.words, errors.phones))
        return RecognitionErrors(words, phones, errors.touched & finite[:, None], errors.wrong & finite[:, None])

    def _seconds(self, span: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Network steps [start, end) -> seconds in the clip: a step begins half a hop before the centre of its first frame."""
        first = 0 if self.spec.centred else self.spec.window / 2
        time_s = (first + (span * self.config.stack - 0.5) * self.spec.hop) / self.spec.rate
        return np.where(span.any(-1, keepdims=True), np.clip(time_s, 0, lengths[:, None, None] / RECORD_RATE), 0.0)


def _checked(audio: np.ndarray, lengths: np.ndarray, max_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """(audio as float32 in the units of int16, as data/features.py expects it; lengths as int32)."""
    audio, lengths = np.asarray(audio), np.asarray(lengths)
    if audio.ndim != 2 or not audio.size or not (audio.dtype == np.int16 or np.issubdtype(audio.dtype, np.floating)):
        raise ValueError(f"audio: found {audio.dtype} {audio.shape}, expected (B, N) of int16, or of floats in [-1, 1]")
    if lengths.shape != audio.shape[:1] or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths: found {lengths.dtype} {lengths.shape}, expected {audio.shape[:1]} whole numbers, one per clip")
    if lengths.min() < 0 or lengths.max() > (limit := min(audio.shape[1], max_samples)):
        raise ValueError(f"lengths: found {lengths.min()} to {lengths.max()} samples, expected 0 to {limit} at {RECORD_RATE} Hz")
    inside = np.arange(audio.shape[1]) < lengths[:, None]
    scale = 1 if audio.dtype == np.int16 else 32768
    audio = np.where(inside, audio, 0).astype(np.float32) * np.float32(scale)
    if bad := int((~np.isfinite(audio)).any(1).sum()):
        raise ValueError(f"audio: {bad} of {len(audio)} clips contain NaN or infinite samples; expected finite ones")
    return audio, lengths.astype(np.int32)


def _logits(model, config: FeatureConfig, template: Features, params, audio, lengths) -> tuple[jax.Array, jax.Array]:
    """Logits (B, S, L) and steps (B,) of each clip, by the features of training; the video features are those of `template`."""
    waveform, lengths = record_audio({"audio": audio, "audio_length": lengths}, config.spec)
    num_frames = frames_of_length(lengths, config.spec)
    features = template._replace(
        spectrogram=stft.log_mel_of_record(waveform, config.spec),
        valid=jnp.arange(config.spec.num_frames)[None] < num_frames[:, None],
        num_frames=num_frames,
    )
    output = model.apply({"params": params}, standardise(features, config))
    return output.logits, output.num_steps


# ---- right or wrong ------------------------------------------------------------------------------------------------------------


def word_errors(recognition: Recognition, true: Sequence[str], span_s: np.ndarray, gap: np.ndarray) -> RecognitionErrors:
    """Which words a gap touches, and which of them are wrong.

    true: B texts ("bin blue ..."); span_s (B, 6, 2) as from `word_spans`; gap (B, G, 2) in record samples.
    """
    b, shapes = len(recognition.words), (len(true), np.shape(span_s), np.shape(gap))
    if shapes[:2] != (b, (b, len(grid_text.SLOTS), 2)) or len(shapes[2]) != 3 or shapes[2][::2] != (b, 2):
        raise ValueError(f"found {b} clips, and texts, spans and gaps {shapes}; expected B, (B, 6, 2) and (B, G, 2)")
    known = np.array([_is_sentence(text) for text in true], bool)
    touched = touched_words(span_s, gap) & known[:, None]
    true_words = [text.split() if k else [""] * len(grid_text.SLOTS) for text, k in zip(true, known)]
    wrong = wrong_words(recognition.words, true_words) & touched
    return RecognitionErrors([*map(" ".join, recognition.words)], recognition.transcript, touched, wrong)


def _is_sentence(text: str) -> bool:
    words = text.split()
    return len(words) == len(grid_text.SLOTS) and all(word in slot.values() for word, slot in zip(words, grid_text.SLOTS))


def word_spans(words: Sequence[Sequence[dict]], offset_s: np.ndarray, fallback: np.ndarray | None = None) -> np.ndarray:
    """(B, 6, 2) seconds on the audio's clock: when each word is spoken, by the corpus' times.

    words: {word, start_s, end_s} of B stored examples, on the video's clock, which is offset_s (B,) earlier. A clip without six
    timed words takes its row of `fallback` (B, 6, 2), such as Recognition.span_s of the recordings (a little short); without
    `fallback` it is NaN, and no gap touches its words.
    """
    spans = np.full((len(words), len(grid_text.SLOTS), 2), np.nan) if fallback is None else np.array(fallback, np.float64)
    for span, timed, lag_s in zip(spans, words, np.asarray(offset_s, np.float64), strict=True):
        if len(timed) == len(grid_text.SLOTS):
            span[:] = np.array([(word["start_s"], word["end_s"]) for word in timed]) + lag_s
    return spans


def wrong_words(words: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> np.ndarray:
    """bool (B, 6): per slot, whether the recognized word differs from the true one; all true where no words were recognized."""
    if len(words) != len(true) or any(len(row) != len(grid_text.SLOTS) for row in true):
        raise ValueError(
            f"found {len(words)} recognized and {len(true)} true sentences, expected as many, the true ones of six words"
        )
    no_words = ("",) * len(grid_text.SLOTS)
    wrong = [[a != b for a, b in zip(recognized or no_words, spoken)] for recognized, spoken in zip(words, true)]
    return np.array(wrong, bool).reshape(-1, len(grid_text.SLOTS))


def touched_words(span_s: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """bool (B, 6): which words, spoken at span_s (B, 6, 2) on the audio's clock, a gap (B, G, 2) in record samples touches."""
    start, end = np.moveaxis(np.asarray(span_s) * RECORD_RATE, -1, 0)[..., None]
    first, last = np.moveaxis(np.asarray(gap)[:, None], -1, 0)
    return ((first < end) & (start < last) & (first < last)).any(-1)
