"""The judge of restored words: what it hears, when, what it refuses; and phone errors where a lip reader says phones."""

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
    """The workdir of a run as it is before its first step."""
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
def recogniser(workdir):
    from avsi_jax.inference.recognizer import Recognizer

    return Recognizer.from_workdir(workdir)


@pytest.fixture(scope="module")
def batch(tiny_dir):
    """The three clips of `test`, of three lengths."""
    from avsi_jax.data import input_pipeline

    return next(input_pipeline.eval_batches(input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "test"), 3))


@pytest.fixture(scope="module")
def heard(recogniser, batch):
    return recogniser.hear(batch["audio"], batch["audio_length"])


# ---------------------------------------------------------------------------------------------------------------------- hear


def test_six_words_of_the_grammar_at_times_inside_the_clip(heard, batch):
    assert (
        len(heard.transcript) == len(heard.words) == 3 and heard.span_s.shape == (3, 6, 2) and heard.log_probability.shape == (3,)
    )
    for said, words in zip(heard.transcript, heard.words):
        assert len(words) == 6 and all(word in slot.values() for word, slot in zip(words, grid_text.SLOTS))
        assert set(said.split()) <= set(grid_text.PHONES)
    start, end = np.moveaxis(heard.span_s, -1, 0)
    assert (start < end).all() and (end[:, :-1] <= start[:, 1:]).all(), "one word after the other"
    assert (start >= 0).all() and (end <= batch["audio_length"][:, None] / 16_000).all()
    assert np.isfinite(heard.log_probability).all() and (heard.log_probability < 0).all()


def test_it_hears_what_training_heard(recogniser, heard, batch, workdir):
    """The features of the training step on the same clips without a gap, and the network on them, give the same answer."""
    from avsi_jax.data import features
    from avsi_jax.models import build
    from avsi_jax.training.run_directory import read_normalisation

    config, normalisation = recogniser.config, read_normalisation(workdir)
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    made = features.make_features(arrays, np.zeros((3, 1, 2), int), build.make_feature_config(config, normalisation))
    output = build.make_model(config).apply({"params": recogniser.params}, made)
    found = ctc_decoding.best_sentences(output.logits, output.num_steps, "phones")
    assert heard.words == found.words and heard.transcript == ctc_decoding.greedy(output.logits, output.num_steps, "phones")
    np.testing.assert_allclose(heard.log_probability * np.asarray(output.num_steps), found.log_probability, rtol=1e-5)


def test_float_audio_is_heard_as_int16(recogniser, heard, batch):
    for kind in (np.float32, np.float64):
        again = recogniser.hear(batch["audio"] / kind(32_768), batch["audio_length"])
        assert again.words == heard.words and again.transcript == heard.transcript
        np.testing.assert_array_equal(again.log_probability, heard.log_probability)


def test_neither_padding_nor_other_clips_matter(recogniser, heard, batch):
    waveform = np.full((3, 50_000), np.nan)
    for row, audio, n in zip(waveform, batch["audio"], batch["audio_length"]):
        row[:n] = audio[:n] / 32_768
    longer = recogniser.hear(waveform, batch["audio_length"])
    assert longer.words == heard.words and longer.transcript == heard.transcript
    np.testing.assert_array_equal(longer.log_probability, heard.log_probability)
    alone = recogniser.hear(batch["audio"][1:2], batch["audio_length"][1:2])
    assert alone.words == heard.words[1:2] and alone.transcript == heard.transcript[1:2]
    np.testing.assert_allclose(alone.log_probability, heard.log_probability[1:2], rtol=1e-5)
    np.testing.assert_array_equal(alone.span_s, heard.span_s[1:2])


def test_the_times_are_those_of_the_audio(recogniser, monkeypatch, batch):
    """Made-up logits that say a phone every third step of 20 ms from step 30 on.

    Steps hold frames 2 s and 2 s + 1, centred at 20 s and 20 s + 10 ms (librosa's centred frames at a hop of 10 ms): step s lasts
    from 20 s - 5 to 20 s + 15 ms.
    """
    labels = grid_text.encode_phones(" ".join(TRUE))
    logits = np.zeros((1, 151, 33), np.float32)
    logits[..., 0] = 10
    at = 30 + 3 * np.arange(len(labels))
    logits[0, at, labels] = 30
    monkeypatch.setattr(recogniser, "_read", lambda params, audio, lengths: (logits, np.array([151])))
    heard = recogniser.hear(batch["audio"][:1], batch["audio_length"][:1])
    assert heard.words == [TRUE] and heard.transcript == [" ".join(grid_text.phones_of(" ".join(TRUE)))]
    counts = np.cumsum([0] + [len(grid_text.phones_of(word)) for word in TRUE])
    expected = [(0.02 * at[a] - 0.005, 0.02 * at[b - 1] + 0.015) for a, b in zip(counts, counts[1:])]
    np.testing.assert_allclose(heard.span_s[0], expected, atol=1e-9)


def test_a_fault_is_heard_where_it_is(recogniser, batch):
    """A layer's two steps on either side, of 20 ms each, and half a window of 25 ms: farther away nothing changes."""
    audio, lengths = batch["audio"].astype(np.float32), batch["audio_length"].astype(np.int32)
    other = audio.copy()
    other[:, 20_000:24_000] = np.random.default_rng(0).normal(0, 9_000, (3, 4_000))
    one, two = (np.asarray(recogniser._read(recogniser.params, x, lengths)[0]) for x in (audio, other))
    changed_s = 0.02 * np.flatnonzero((one != two).any((0, 2)))
    reach_s = 2 * recogniser.config.layers * 0.02 + 0.0125 + 0.02
    assert 1.25 - reach_s <= changed_s.min() < 1.25 and 1.5 < changed_s.max() <= 1.5 + reach_s


def test_too_short_for_a_sentence(recogniser, batch):
    short = recogniser.hear(batch["audio"][:2], np.array([1600, 0]))
    assert short.words == [(), ()] and not short.span_s.any() and (short.log_probability == -np.inf).all()


@pytest.mark.parametrize(
    ("audio", "lengths", "says"),
    [
        (np.zeros(9, np.int16), [9], r"sound: found int16 \(9,\), expected \(B, N\)"),
        (np.zeros((1, 9), np.int32), [9], "sound: found int32"),
        (np.zeros((2, 9), np.int16), [9], r"lengths: found int64 \(1,\), expected \(2,\)"),
        (np.zeros((1, 9), np.int16), [9.0], "lengths: found float64"),
        (np.zeros((1, 9), np.int16), [10], "lengths: found 10 to 10 samples, expected 0 to 9 at 16000 Hz"),
        (np.zeros((1, 60_000), np.int16), [48_001], "expected 0 to 48000"),
        (np.full((2, 9), [[0], [np.nan]], np.float32), [9, 9], "sound: 1 of 2 hold NaN"),
    ],
)
def test_ill_formed_audio_is_refused(recogniser, audio, lengths, says):
    with pytest.raises(ValueError, match=says):
        recogniser.hear(audio, np.array(lengths))


@pytest.mark.slow
def test_it_learns_by_heart(tiny_dir, tmp_path):
    """After enough passes over nine clips it reads their words back, in their order, and phones without the grammar too."""
    from avsi_jax.data import input_pipeline
    from avsi_jax.inference.recognizer import Recognizer, wrong_words
    from avsi_jax.training import cli

    network = {"units": 64, "layers": 2, "dropout": 0.0, "augment__speed": 0.0, "augment__gain_db": 0.0}
    course = {"batch_size": 8, "epochs": 300, "learning_rate": 5e-3, "validation_split": "train"}
    rarely = {"validate_every": 100, "checkpoint_every": 300}
    cli.train(asr_config(tiny_dir, **network, **course, **rarely), tmp_path / "run")
    records = input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "train")
    raw = [records[i] for i in range(len(records))]
    clips = [input_pipeline.to_example(r) for r in raw]
    heard = Recognizer.from_workdir(tmp_path / "run").hear(*(np.stack([c[k] for c in clips]) for k in ("audio", "audio_length")))
    assert not wrong_words(heard.words, [r["text"].split() for r in raw]).any()
    pairs = [(said, " ".join(grid_text.phones_of(r["text"]))) for said, r in zip(heard.transcript, raw)]
    assert ctc_decoding.phone_error_rate(pairs).rate < 0.05


# ------------------------------------------------------------------------------------------------------------- which run does


def test_who_restores_is_no_judge_and_the_judge_restores_nothing(untrained_a_si, workdir, tmp_path, capsys):
    from avsi_jax.evaluation import cli
    from avsi_jax.inference.recognizer import Recognizer
    from avsi_jax.inference.restorer import Restorer

    for load, folder, says in (
        (Recognizer, untrained_a_si, "holds a run of a_si; expected a recogniser"),
        (Recognizer, tmp_path, "no config.json in"),
        (Restorer, workdir, "holds a run of asr, which restores nothing"),
    ):
        with pytest.raises(CheckpointError, match=says) as error:
            load.from_workdir(folder)
        assert "\n" not in str(error.value)
    assert cli.main(["--workdir", str(workdir)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("avsi-evaluate: ") and "which restores nothing" in said and said.count("\n") == 1
    assert not (workdir / "eval").exists()


# ------------------------------------------------------------------------------------------------------------ right or wrong


def test_wrong_words_by_hand():
    from avsi_jax.inference.recognizer import wrong_words

    heard = [TRUE, ("bin", "red", "at", "f", "two", "soon"), ()]
    assert wrong_words(heard, [TRUE] * 3).tolist() == [[False] * 6, [False, True, False, False, False, True], [True] * 6]
    assert wrong_words([], []).shape == (0, 6)
    with pytest.raises(ValueError, match="1 sentences heard and 2 said"):
        wrong_words([TRUE], [TRUE, TRUE])
    with pytest.raises(ValueError, match="those said of six words"):
        wrong_words([TRUE], [TRUE[:5]])


def test_touched_words_by_hand():
    """Words of 0.5 s from 0 to 3 s: 8,000 samples each."""
    from avsi_jax.inference.recognizer import touched_words

    span_s = np.array([[(k / 2, k / 2 + 0.5) for k in range(6)]] * 4)
    gap = np.array([[(8_000, 16_000), (0, 0)], [(7_999, 16_001), (0, 0)], [(100, 200), (40_100, 40_200)], [(9_000, 9_000), (0, 0)]])
    found = [np.flatnonzero(row).tolist() for row in touched_words(span_s, gap)]
    assert found == [[1], [0, 1, 2], [0, 5], []]


WORD_S = np.array([(k / 2, k / 2 + 0.5) for k in range(6)])  # words of half a second


def test_judged_by_hand():
    """Four clips, a gap over words 1 and 2: two words heard right, one, nothing heard; and what isn't Grid's is not judged."""
    from avsi_jax.inference.recognizer import Recognition, judged

    said = " ".join(TRUE)
    words = [("lay", "blue", "at", "f", "two", "now"), ("bin", "red", "at", "f", "two", "now"), (), TRUE]
    heard = Recognition(["B"] * 4, words, np.zeros((4, 6, 2)), np.zeros(4))
    gap = np.array([[(12_000, 20_000), (0, 0)]] * 4)
    found = judged(heard, [said, said, said, "hello there"], np.stack([WORD_S] * 4), gap)
    assert [np.flatnonzero(row).tolist() for row in found.touched] == [[1, 2], [1, 2], [1, 2], []]
    assert [np.flatnonzero(row).tolist() for row in found.wrong] == [[], [1], [1, 2], []]
    np.testing.assert_array_equal(found.error, [0, 0.5, 1, np.nan])
    assert found.words == ["lay blue at f two now", "bin red at f two now", "", said] and found.phones == ["B"] * 4
    nothing = judged(Recognition([], [], np.zeros((0, 6, 2)), np.zeros(0)), [], np.zeros((0, 6, 2)), np.zeros((0, 1, 2), int))
    assert nothing.wrong.shape == nothing.touched.shape == (0, 6)


@pytest.mark.parametrize(
    ("true", "spans", "gap"),
    [(1, (2, 6, 2), (2, 1, 2)), (2, (2, 5, 2), (2, 1, 2)), (2, (2, 6, 2), (2, 2)), (2, (2, 6, 2), (1, 1, 2))],
)
def test_ill_formed_judgement_is_refused(true, spans, gap):
    from avsi_jax.inference.recognizer import Recognition, judged

    heard = Recognition([""] * 2, [TRUE] * 2, np.zeros((2, 6, 2)), np.zeros(2))
    with pytest.raises(ValueError, match=r"found 2 sounds, and texts, spans and gaps \("):
        judged(heard, [" ".join(TRUE)] * true, np.zeros(spans), np.zeros(gap))


def test_word_times_are_the_corpus_own_or_those_heard():
    """A clip whose six words are timed, on the picture's clock; one that has none; one with a word too few."""
    from avsi_jax.inference.recognizer import touched_words, word_spans

    timed = [{"word": w, "start_s": a, "end_s": b} for w, (a, b) in zip(TRUE, WORD_S.tolist())]
    words, offset_s = [timed, [], timed[:5]], np.full(3, 0.011)
    heard = np.stack([WORD_S + 0.1 * k for k in (1, 2, 3)])
    spans = word_spans(words, offset_s, heard)
    np.testing.assert_allclose(spans, [WORD_S + 0.011, WORD_S + 0.2, WORD_S + 0.3], atol=1e-12)
    assert heard[0, 0, 0] == 0.1, "what was heard stays as it was"
    unknown = word_spans(words, offset_s)
    assert not np.isnan(unknown[0]).any() and np.isnan(unknown[1:]).all()
    assert touched_words(unknown, np.array([[(0, 48_000)]] * 3)).sum(1).tolist() == [6, 0, 0]


def test_another_checkpoint_is_another_judge(recogniser, workdir):
    import jax

    from avsi_jax.inference.recognizer import Recognizer

    again = Recognizer.from_workdir(workdir)
    assert again.fingerprint == recogniser.fingerprint and again.described == f"asr, step 0, {again.fingerprint}"
    other = Recognizer.from_workdir(workdir)
    other.params = jax.tree.map(lambda x: x + 1e-6, other.params)
    assert other.fingerprint != recogniser.fingerprint


def test_the_judge_judges_what_it_hears(recogniser, heard, batch):
    gap = np.array([[(0, 48_000)]] * 3)
    true = [" ".join(words) for words in heard.words]
    found = recogniser.judge(batch["audio"], batch["audio_length"], true, heard.span_s, gap)
    assert found.touched.all() and not found.wrong.any() and found.words == true and found.phones == heard.transcript
    other = [("lay " if t.startswith("bin") else "bin ") + t.split(" ", 1)[1] for t in true]
    found = recogniser.judge(batch["audio"], batch["audio_length"], other, heard.span_s, gap)
    assert found.wrong.tolist() == [[True] + [False] * 5] * 3
    broken = batch["audio"] / np.float32(32_768)
    broken[1, 20_000] = np.nan
    rest = recogniser.judge(broken, batch["audio_length"], other, heard.span_s, gap)
    assert rest.wrong.tolist() == [found.wrong[0].tolist(), [False] * 6, found.wrong[2].tolist()] and rest.words[1] == ""
    assert np.isnan(rest.error).tolist() == [False, True, False] and rest.words[0] == found.words[0]


# ------------------------------------------------------------------------------------------------------ phones in evaluations


def test_phone_error_by_hand():
    from avsi_jax.evaluation import metrics

    assert metrics.phone_error("bin blue", "B IH N B L UW") == 0
    assert metrics.phone_error("bin blue", "B IH N L IY") == pytest.approx(2 / 6)  # one missing, one wrong
    assert metrics.phone_error("bin", "") == 1 and math.isnan(metrics.phone_error("", "B"))
    assert math.isnan(metrics.phone_error("hello bin", "B IH N")), "no phones are known of a word that isn't Grid's"


def test_a_reader_is_scored_in_what_it_reads():
    from avsi_jax.evaluation.run_systems import heard

    phones, characters = (["", "B IH N"], "phones"), (["", "bin"], "characters")
    assert heard(None, "phones", "bin", 1) == {"cer": None, "per": None, "said": "", "text": "bin"}
    assert heard(*phones, "bin", 1) == {"cer": None, "per": 0, "said": "B IH N", "text": "bin"}
    assert heard(*characters, "bin", 1) == {"cer": 0, "per": None, "said": "bin", "text": "bin"}
    for reader in (phones, characters):
        assert heard(*reader, "", 1) == {"cer": None, "per": None, "said": reader[0][1], "text": ""}


def test_an_evaluation_knows_what_its_system_reads(tiny_config, tmp_path, batch):
    from avsi_jax.evaluation import cli, run_systems
    from avsi_jax.inference.restorer import Restorer

    restorer = Restorer.from_workdir(write_untrained(tiny_config(ctc_units="phones"), tmp_path / "run"))
    gap = np.array([[(16_000, 20_000)]] * 3)
    video = {"clip": {k: batch[k] for k in run_systems.VIDEO}}
    _, said = run_systems.restore_levels(batch | {"donors": video}, batch, gap, restorer, {"system", "other_video"})
    assert said.keys() == {"system", "other_video"} and said["system"] == restorer.restore(batch, gap).transcript
    assert "per" in cli.METRICS and "per" in cli.COLUMNS


# --------------------------------------------------------------------------------------------------------------- documentation


def test_the_page_follows_from_its_summary():
    from benchmarks.quality import recognizer

    page = recognizer.page(json.loads((ROOT / "docs/recogniser.json").read_text()))
    assert page == (ROOT / "docs/recogniser.md").read_text(), "run python -m benchmarks.quality.recognizer"
