"""The recognizer that judges restored words: its words, times and errors; and phone errors of text heads."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from avsi_jax import configs
from avsi_jax.data import grid_text
from avsi_jax.models import ctc_decoding
from avsi_jax.training.checkpoints import CheckpointError

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ROOT = Path(__file__).resolve().parents[2]
TRUE = ("bin", "blue", "at", "f", "two", "now")


def write_untrained(config, folder: Path) -> Path:
    """The run directory of a training before its first step."""
    from avsi_jax.data import input_pipeline
    from avsi_jax.models import build
    from avsi_jax.training import checkpoints, run_directory, train_step

    dataset = input_pipeline.find_dataset(config.data_dir, config.builder_config)
    run_directory.check_config(config, folder, build.read_normalisation(config, dataset))
    saved = checkpoints.Checkpoints(folder)
    saved.save(0, train_step.init_state(config, 1), {}, 0.0)
    saved.close()
    return folder


def asr_config(data_dir, **fields):
    wanted = {"data_dir": data_dir, "units": 8, "layers": 1, "batch_size": 4} | fields
    return configs.load("asr", [(k.replace("__", "."), str(v)) for k, v in wanted.items()])


@pytest.fixture(scope="module")
def workdir(tiny_dir, tmp_path_factory) -> Path:
    return write_untrained(asr_config(tiny_dir), tmp_path_factory.mktemp("asr") / "run")


@pytest.fixture(scope="module")
def recognizer(workdir):
    from avsi_jax.inference.recognizer import Recognizer

    return Recognizer.from_workdir(workdir)


@pytest.fixture(scope="module")
def batch(tiny_dir):
    """The three clips of `test`, of three lengths."""
    from avsi_jax.data import input_pipeline

    return next(input_pipeline.eval_batches(input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "test"), 3))


@pytest.fixture(scope="module")
def recognized(recognizer, batch):
    return recognizer.recognize(batch["audio"], batch["audio_length"])


# ----------------------------------------------------------------------------------------------------------------- recognize


def test_a_recognition_has_six_words_of_the_grammar_with_times_inside_the_clip(recognized, batch):
    assert len(recognized.transcript) == len(recognized.words) == 3
    assert recognized.span_s.shape == (3, 6, 2) and recognized.log_probability.shape == (3,)
    for transcript, words in zip(recognized.transcript, recognized.words):
        assert len(words) == 6 and all(word in slot.values() for word, slot in zip(words, grid_text.SLOTS))
        assert set(transcript.split()) <= set(grid_text.PHONES)
    start, end = np.moveaxis(recognized.span_s, -1, 0)
    assert (start < end).all() and (end[:, :-1] <= start[:, 1:]).all(), "words do not overlap"
    assert (start >= 0).all() and (end <= batch["audio_length"][:, None] / 16_000).all()
    assert np.isfinite(recognized.log_probability).all() and (recognized.log_probability < 0).all()


@pytest.mark.slow
def test_its_features_are_those_of_training(recognizer, recognized, batch, workdir):
    """The training's features of the same clips without a gap give the same result."""
    from avsi_jax.data import features
    from avsi_jax.models import build
    from avsi_jax.training.run_directory import read_normalisation

    config, normalisation = recognizer.config, read_normalisation(workdir)
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    made = features.make_features(arrays, np.zeros((3, 1, 2), int), build.make_feature_config(config, normalisation))
    output = build.make_model(config).apply({"params": recognizer.params}, made)
    best = ctc_decoding.best_sentences(output.logits, output.num_steps, "phones")
    assert recognized.words == best.words
    assert recognized.transcript == ctc_decoding.greedy(output.logits, output.num_steps, "phones")
    np.testing.assert_allclose(recognized.log_probability * np.asarray(output.num_steps), best.log_probability, rtol=1e-5)


def test_float_audio_gives_the_result_of_int16(recognizer, recognized, batch):
    for dtype in (np.float32, np.float64):
        again = recognizer.recognize(batch["audio"] / dtype(32_768), batch["audio_length"])
        assert again.words == recognized.words and again.transcript == recognized.transcript
        np.testing.assert_array_equal(again.log_probability, recognized.log_probability)


def test_neither_padding_nor_other_clips_change_the_result(recognizer, recognized, batch):
    waveform = np.full((3, 50_000), np.nan)
    for row, audio, n in zip(waveform, batch["audio"], batch["audio_length"]):
        row[:n] = audio[:n] / 32_768
    longer = recognizer.recognize(waveform, batch["audio_length"])
    assert longer.words == recognized.words and longer.transcript == recognized.transcript
    np.testing.assert_array_equal(longer.log_probability, recognized.log_probability)
    alone = recognizer.recognize(batch["audio"][1:2], batch["audio_length"][1:2])
    assert alone.words == recognized.words[1:2] and alone.transcript == recognized.transcript[1:2]
    np.testing.assert_allclose(alone.log_probability, recognized.log_probability[1:2], rtol=1e-5)
    np.testing.assert_array_equal(alone.span_s, recognized.span_s[1:2])


def test_word_times_are_those_of_the_network_steps(recognizer, monkeypatch, batch):
    """Fake logits with a phone at every third step of 20 ms from step 30 on.

    Step s covers frames 2 s and 2 s + 1, centred at 20 s and 20 s + 10 ms (librosa's centred frames at a hop of 10 ms): it lasts
    from 20 s - 5 to 20 s + 15 ms.
    """
    labels = grid_text.encode_phones(" ".join(TRUE))
    logits = np.zeros((1, 151, 33), np.float32)
    logits[..., 0] = 10
    at = 30 + 3 * np.arange(len(labels))
    logits[0, at, labels] = 30
    monkeypatch.setattr(recognizer, "_logits", lambda params, audio, lengths: (logits, np.array([151])))
    result = recognizer.recognize(batch["audio"][:1], batch["audio_length"][:1])
    assert result.words == [TRUE] and result.transcript == [" ".join(grid_text.phones_of(" ".join(TRUE)))]
    counts = np.cumsum([0] + [len(grid_text.phones_of(word)) for word in TRUE])
    expected = [(0.02 * at[a] - 0.005, 0.02 * at[b - 1] + 0.015) for a, b in zip(counts, counts[1:])]
    np.testing.assert_allclose(result.span_s[0], expected, atol=1e-9)


def test_a_change_of_the_audio_has_only_a_local_effect(recognizer, batch):
    """Two steps of 20 ms per layer on either side, and half a window of 25 ms: farther away nothing changes."""
    audio, lengths = batch["audio"].astype(np.float32), batch["audio_length"].astype(np.int32)
    other = audio.copy()
    other[:, 20_000:24_000] = np.random.default_rng(0).normal(0, 9_000, (3, 4_000))
    one, two = (np.asarray(recognizer._logits(recognizer.params, x, lengths)[0]) for x in (audio, other))
    changed_s = 0.02 * np.flatnonzero((one != two).any((0, 2)))
    reach_s = 2 * recognizer.config.layers * 0.02 + 0.0125 + 0.02
    assert 1.25 - reach_s <= changed_s.min() < 1.25 and 1.5 < changed_s.max() <= 1.5 + reach_s


def test_a_clip_too_short_for_a_sentence_has_no_words(recognizer, batch):
    short = recognizer.recognize(batch["audio"][:2], np.array([1600, 0]))
    assert short.words == [(), ()] and not short.span_s.any() and (short.log_probability == -np.inf).all()


@pytest.mark.parametrize(
    ("audio", "lengths", "says"),
    [
        (np.zeros(9, np.int16), [9], r"audio: found int16 \(9,\), expected \(B, N\)"),
        (np.zeros((1, 9), np.int32), [9], "audio: found int32"),
        (np.zeros((2, 9), np.int16), [9], r"lengths: found int64 \(1,\), expected \(2,\)"),
        (np.zeros((1, 9), np.int16), [9.0], "lengths: found float64"),
        (np.zeros((1, 9), np.int16), [10], "lengths: found 10 to 10 samples, expected 0 to 9 at 16000 Hz"),
        (np.zeros((1, 60_000), np.int16), [48_001], "expected 0 to 48000"),
        (np.full((2, 9), [[0], [np.nan]], np.float32), [9, 9], "audio: 1 of 2 clips contain NaN"),
    ],
)
def test_malformed_audio_is_refused(recognizer, audio, lengths, says):
    with pytest.raises(ValueError, match=says):
        recognizer.recognize(audio, np.array(lengths))


@pytest.mark.slow
def test_it_can_learn_nine_clips_perfectly(tiny_dir, tmp_path):
    """After enough epochs it recognizes their words, and their phones without the grammar too."""
    from avsi_jax.data import input_pipeline
    from avsi_jax.inference.recognizer import Recognizer, wrong_words
    from avsi_jax.training import cli

    network = {"units": 64, "layers": 2, "dropout": 0.0, "augment__speed": 0.0, "augment__gain_db": 0.0}
    schedule = {"batch_size": 8, "epochs": 300, "learning_rate": 5e-3, "validation_split": "train"}
    rarely = {"validate_every": 100, "checkpoint_every": 300}
    cli.train(asr_config(tiny_dir, **network, **schedule, **rarely), tmp_path / "run")
    records = input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "train")
    raw = [records[i] for i in range(len(records))]
    clips = [input_pipeline.to_example(r) for r in raw]
    audio, lengths = (np.stack([c[k] for c in clips]) for k in ("audio", "audio_length"))
    result = Recognizer.from_workdir(tmp_path / "run").recognize(audio, lengths)
    assert not wrong_words(result.words, [r["text"].split() for r in raw]).any()
    pairs = [(transcript, " ".join(grid_text.phones_of(r["text"]))) for transcript, r in zip(result.transcript, raw)]
    assert ctc_decoding.phone_error_rate(pairs).rate < 0.05


# ------------------------------------------------------------------------------------------------------------- which run


def test_a_recognizer_and_a_restorer_refuse_each_others_runs(untrained_a_si, workdir, tmp_path, capsys):
    from avsi_jax.evaluation import cli
    from avsi_jax.inference.recognizer import Recognizer
    from avsi_jax.inference.restorer import Restorer

    for load, folder, says in (
        (Recognizer, untrained_a_si, "holds a run of a_si; expected a recognizer"),
        (Recognizer, tmp_path, "no config.json in"),
        (Restorer, workdir, "holds a run of asr, which restores nothing"),
    ):
        with pytest.raises(CheckpointError, match=says) as error:
            load.from_workdir(folder)
        assert "\n" not in str(error.value)
    assert cli.main(["--workdir", str(workdir)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("avsi-evaluate: ") and "which restores nothing" in message and message.count("\n") == 1
    assert not (workdir / "eval").exists()


# ------------------------------------------------------------------------------------------------------------ right or wrong


def test_wrong_words_computed_by_hand():
    from avsi_jax.inference.recognizer import wrong_words

    words = [TRUE, ("bin", "red", "at", "f", "two", "soon"), ()]
    assert wrong_words(words, [TRUE] * 3).tolist() == [[False] * 6, [False, True, False, False, False, True], [True] * 6]
    assert wrong_words([], []).shape == (0, 6)
    with pytest.raises(ValueError, match="1 recognized and 2 true"):
        wrong_words([TRUE], [TRUE, TRUE])
    with pytest.raises(ValueError, match="of six words"):
        wrong_words([TRUE], [TRUE[:5]])


def test_touched_words_computed_by_hand():
    """Words of 0.5 s from 0 to 3 s: 8,000 samples each."""
    from avsi_jax.inference.recognizer import touched_words

    span_s = np.array([[(k / 2, k / 2 + 0.5) for k in range(6)]] * 4)
    gap = np.array([[(8_000, 16_000), (0, 0)], [(7_999, 16_001), (0, 0)], [(100, 200), (40_100, 40_200)], [(9_000, 9_000), (0, 0)]])
    found = [np.flatnonzero(row).tolist() for row in touched_words(span_s, gap)]
    assert found == [[1], [0, 1, 2], [0, 5], []]


WORD_S = np.array([(k / 2, k / 2 + 0.5) for k in range(6)])  # words of half a second


def test_word_errors_computed_by_hand():
    """Four clips with a gap over words 1 and 2: both right, one right, nothing recognized, and not a Grid sentence."""
    from avsi_jax.inference.recognizer import Recognition, word_errors

    text = " ".join(TRUE)
    words = [("lay", "blue", "at", "f", "two", "now"), ("bin", "red", "at", "f", "two", "now"), (), TRUE]
    recognition = Recognition(["B"] * 4, words, np.zeros((4, 6, 2)), np.zeros(4))
    gap = np.array([[(12_000, 20_000), (0, 0)]] * 4)
    found = word_errors(recognition, [text, text, text, "hello there"], np.stack([WORD_S] * 4), gap)
    assert [np.flatnonzero(row).tolist() for row in found.touched] == [[1, 2], [1, 2], [1, 2], []]
    assert [np.flatnonzero(row).tolist() for row in found.wrong] == [[], [1], [1, 2], []]
    np.testing.assert_array_equal(found.error, [0, 0.5, 1, np.nan])
    assert found.words == ["lay blue at f two now", "bin red at f two now", "", text] and found.phones == ["B"] * 4
    empty = word_errors(Recognition([], [], np.zeros((0, 6, 2)), np.zeros(0)), [], np.zeros((0, 6, 2)), np.zeros((0, 1, 2), int))
    assert empty.wrong.shape == empty.touched.shape == (0, 6)


@pytest.mark.parametrize(
    ("true", "spans", "gap"),
    [(1, (2, 6, 2), (2, 1, 2)), (2, (2, 5, 2), (2, 1, 2)), (2, (2, 6, 2), (2, 2)), (2, (2, 6, 2), (1, 1, 2))],
)
def test_malformed_word_spans_are_refused(true, spans, gap):
    from avsi_jax.inference.recognizer import Recognition, word_errors

    recognition = Recognition([""] * 2, [TRUE] * 2, np.zeros((2, 6, 2)), np.zeros(2))
    with pytest.raises(ValueError, match=r"found 2 clips, and texts, spans and gaps \("):
        word_errors(recognition, [" ".join(TRUE)] * true, np.zeros(spans), np.zeros(gap))


def test_word_times_are_those_of_the_corpus_or_the_fallback():
    """A clip with six timed words, on the video's clock; one without; one with too few."""
    from avsi_jax.inference.recognizer import touched_words, word_spans

    timed = [{"word": w, "start_s": a, "end_s": b} for w, (a, b) in zip(TRUE, WORD_S.tolist())]
    words, offset_s = [timed, [], timed[:5]], np.full(3, 0.011)
    fallback = np.stack([WORD_S + 0.1 * k for k in (1, 2, 3)])
    spans = word_spans(words, offset_s, fallback)
    np.testing.assert_allclose(spans, [WORD_S + 0.011, WORD_S + 0.2, WORD_S + 0.3], atol=1e-12)
    assert fallback[0, 0, 0] == 0.1, "the argument is not modified"
    unknown = word_spans(words, offset_s)
    assert not np.isnan(unknown[0]).any() and np.isnan(unknown[1:]).all()
    assert touched_words(unknown, np.array([[(0, 48_000)]] * 3)).sum(1).tolist() == [6, 0, 0]


def test_another_checkpoint_has_another_fingerprint(recognizer, workdir):
    import jax

    from avsi_jax.inference.recognizer import Recognizer

    again = Recognizer.from_workdir(workdir)
    assert again.fingerprint == recognizer.fingerprint and again.described == f"asr, step 0, {again.fingerprint}"
    other = Recognizer.from_workdir(workdir)
    other.params = jax.tree.map(lambda x: x + 1e-6, other.params)
    assert other.fingerprint != recognizer.fingerprint


def test_the_judge_compares_recognized_words_with_the_text(recognizer, recognized, batch):
    gap = np.array([[(0, 48_000)]] * 3)
    true = [" ".join(words) for words in recognized.words]
    found = recognizer.judge(batch["audio"], batch["audio_length"], true, recognized.span_s, gap)
    assert found.touched.all() and not found.wrong.any() and found.words == true and found.phones == recognized.transcript
    other = [("lay " if t.startswith("bin") else "bin ") + t.split(" ", 1)[1] for t in true]
    found = recognizer.judge(batch["audio"], batch["audio_length"], other, recognized.span_s, gap)
    assert found.wrong.tolist() == [[True] + [False] * 5] * 3
    broken = batch["audio"] / np.float32(32_768)
    broken[1, 20_000] = np.nan
    rest = recognizer.judge(broken, batch["audio_length"], other, recognized.span_s, gap)
    assert rest.wrong.tolist() == [found.wrong[0].tolist(), [False] * 6, found.wrong[2].tolist()] and rest.words[1] == ""
    assert np.isnan(rest.error).tolist() == [False, True, False] and rest.words[0] == found.words[0]


# ------------------------------------------------------------------------------------------------------ phones in evaluations


def test_phone_errors_computed_by_hand():
    from avsi_jax.evaluation import metrics

    assert metrics.phone_error("bin blue", "B IH N B L UW") == 0
    assert metrics.phone_error("bin blue", "B IH N L IY") == pytest.approx(2 / 6)  # one missing, one wrong
    assert metrics.phone_error("bin", "") == 1 and math.isnan(metrics.phone_error("", "B"))
    assert math.isnan(metrics.phone_error("hello bin", "B IH N")), "words outside Grid have no known phones"


def test_a_text_head_is_scored_in_its_own_units():
    from avsi_jax.evaluation.run_systems import transcript_cells

    phones, characters = (["", "B IH N"], "phones"), (["", "bin"], "characters")
    assert transcript_cells(None, "phones", "bin", 1) == {"cer": None, "per": None, "transcript": "", "text": "bin"}
    assert transcript_cells(*phones, "bin", 1) == {"cer": None, "per": 0, "transcript": "B IH N", "text": "bin"}
    assert transcript_cells(*characters, "bin", 1) == {"cer": 0, "per": None, "transcript": "bin", "text": "bin"}
    for output in (phones, characters):
        assert transcript_cells(*output, "", 1) == {"cer": None, "per": None, "transcript": output[0][1], "text": ""}


@pytest.mark.slow
def test_an_evaluation_contains_the_transcripts_of_the_text_head(tiny_config, tmp_path, batch):
    from avsi_jax.evaluation import cli, run_systems
    from avsi_jax.inference.restorer import Restorer

    restorer = Restorer.from_workdir(write_untrained(tiny_config(ctc_units="phones"), tmp_path / "run"))
    gap = np.array([[(16_000, 20_000)]] * 3)
    video = {"clip": {k: batch[k] for k in run_systems.VIDEO}}
    _, transcripts = run_systems.restore_levels(batch | {"donors": video}, batch, gap, restorer, {"system", "other_video"})
    assert transcripts.keys() == {"system", "other_video"}
    assert transcripts["system"] == restorer.restore(batch, gap).transcript
    assert "per" in cli.METRICS and "per" in cli.COLUMNS


# --------------------------------------------------------------------------------------------------------------- documentation


def test_the_page_follows_from_its_summary():
    from benchmarks.quality import recognizer

    page = recognizer.page(json.loads((ROOT / "docs/asr_judge.json").read_text()))
    assert page == (ROOT / "docs/asr_judge.md").read_text(), "run python -m benchmarks.quality.recognizer"
