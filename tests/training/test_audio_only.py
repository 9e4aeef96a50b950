"""Recordings without video in training (LibriSpeech): excerpts, their rows in a batch, their part in the loss."""

import jax
import numpy as np
import pytest
import soundfile

from avsi_jax import configs
from avsi_jax.audio import gap_masks
from avsi_jax.data import features, input_pipeline, tfrecords
from avsi_jax.models import build
from avsi_jax.training import loop, objective

SAMPLES = 48_000


def recording(number: int, samples: int) -> dict:
    """A stored example without video: white noise that depends on `number`."""
    rng = np.random.default_rng(number)
    return {
        "id": f"{number}-1-0000",
        "speaker": f"librispeech-{number}",
        "audio": rng.integers(-3000, 3000, samples).astype(np.int16),
        "landmarks": np.zeros((0, 68, 2), np.float32),
        "landmarks_valid": np.zeros(0, bool),
        "offset_s": 0.0,
        "frame_size": np.array([360, 288], np.int32),
        "fps": 25.0,
        "text": "bin blue at f two now",
        "words": [],
    }


class Recordings(list):
    """Like tfrecords.Records: examples by number, and their ids."""

    @property
    def clip_ids(self):
        return [example["id"] for example in self]


@pytest.fixture(scope="module")
def recordings():
    return Recordings(recording(i, samples) for i, samples in enumerate((60_000, 90_000, 30_000)))


@pytest.fixture(scope="module")
def clips(tiny_dir):
    return tfrecords.Records(tfrecords.find_dataset(tiny_dir), "train")


# ---- excerpts


@pytest.mark.parametrize(("position", "start"), [(0.0, 0), (0.5, 21_000), (1.0, 42_000)])
def test_an_excerpt_is_three_seconds_of_the_recording_from_its_position_on(recordings, position, start):
    example = input_pipeline.to_example(input_pipeline.audio_excerpt(recordings[1], position))
    np.testing.assert_array_equal(example["audio"], recordings[1]["audio"][start : start + SAMPLES])
    assert example["audio_length"] == SAMPLES


def test_a_recording_shorter_than_an_excerpt_is_kept_whole(recordings):
    example = input_pipeline.to_example(input_pipeline.audio_excerpt(recordings[2], 0.7))
    np.testing.assert_array_equal(example["audio"][:30_000], recordings[2]["audio"])
    assert example["audio_length"] == 30_000 and not example["audio"][30_000:].any()


def test_an_excerpt_has_neither_landmarks_nor_text(recordings):
    example = input_pipeline.to_example(input_pipeline.audio_excerpt(recordings[0], 0.0))
    assert not example["landmarks_valid"].any() and not example["has_words"]
    assert example["label_length"] == 0 and example["phone_length"] == 0


# ---- batches


def batches(clips, recordings, count=2, batch_size=4, seed=3, **options):
    return input_pipeline.train_batches(clips, batch_size, seed, audio_only=input_pipeline.AudioOnly(recordings, count), **options)


def test_the_last_rows_of_every_batch_are_excerpts(clips, recordings):
    for step, batch in zip(range(6), batches(clips, recordings)):
        valid = batch["landmarks_valid"].any(1)
        assert valid.tolist() == [True, True, False, False]
        ids = input_pipeline.clip_ids_of_step(clips, 4, 3, step, input_pipeline.AudioOnly(recordings, 2))
        assert batch["clip_id"] == ids


def test_passes_of_clips_and_of_recordings_are_complete(clips, recordings):
    stream = batches(clips, recordings)
    ids = [i for _ in range(len(clips) * 3) for i in next(stream)["clip_id"]]
    counts = {i: ids.count(i) for i in {*clips.clip_ids, *recordings.clip_ids}}
    assert set(counts) == set(ids)
    assert {counts[i] for i in clips.clip_ids} == {6} and {counts[i] for i in recordings.clip_ids} == {2 * len(clips)}


def test_every_pass_has_other_excerpts(clips, recordings):
    stream = batches(clips, recordings)
    nine = [next(stream) for _ in range(9)]
    audio = [row for b in nine for row, i in zip(b["audio"], b["clip_id"], strict=True) if i == "1-1-0000"]
    assert len(audio) == 6 and len({row.tobytes() for row in audio}) == 6


def test_processes_and_resumed_runs_get_the_rows_of_an_uninterrupted_run(clips, recordings):
    stream = batches(clips, recordings)
    whole = [next(stream) for _ in range(3)]
    shares = [batches(clips, recordings, process_index=p, process_count=2, start_step=2) for p in range(2)]
    np.testing.assert_array_equal(np.concatenate([next(share)["audio"] for share in shares]), whole[2]["audio"])


@pytest.mark.parametrize("count", [4, -1])
def test_a_batch_needs_clips_with_video(clips, recordings, count):
    with pytest.raises(ValueError, match="audio-only"):
        next(batches(clips, recordings, count=count))


# ---- loss


@pytest.fixture(scope="module")
def config():
    return configs.load("av_unified", [("units", "8"), ("preset", "paper"), ("loss.ctc", "0.1")])


@pytest.fixture(scope="module")
def normalisation(config, tiny_dir):
    return build.read_normalisation(config, tfrecords.find_dataset(tiny_dir))


def arrays(batch: dict) -> dict:
    return {k: v for k, v in batch.items() if k != "clip_id"}


@pytest.mark.slow
def test_an_excerpt_counts_in_the_gap_but_not_in_the_ctc_loss(config, normalisation, clips, recordings, quickly_compiled):
    batch = arrays(next(batches(clips, recordings, count=3)))
    loss, params = jax.jit(objective.make_loss(config, normalisation)), build.init_params(config)
    _, terms = loss(params, batch, jax.random.key(0))
    assert terms["ctc"][1] == 1, "one clip of the batch has a text"
    _, terms = loss(params, batch | {"weight": np.float32([0, 1, 1, 1])}, jax.random.key(0))
    assert terms["ctc"] == (0, 0) and terms["gap"][1] > 0 and np.isfinite(terms["gap"][0])


def test_the_video_stream_of_an_excerpt_is_dropped(config, normalisation, clips, recordings, quickly_compiled):
    batch = arrays(next(batches(clips, recordings)))
    gaps, feature_config = np.int32([[[8_000, 14_400]]] * 4), build.make_feature_config(config, normalisation)
    made = jax.jit(features.make_features, static_argnums=2)(batch, gaps, feature_config)
    assert np.asarray(made.seen).any(1).tolist() == [True, True, False, False]
    assert np.isfinite(np.asarray(made.video)).all()


# ---- validation gaps


def test_validation_gaps_in_the_words_are_those_of_the_evaluation(clips):
    batch = next(input_pipeline.eval_batches(clips, 4))
    long = gap_masks.with_gaps_in_words(batch, (300, 900))
    assert long["clip_id"] == [i for i in batch["clip_id"] for _ in range(2)] and long["gaps"].shape == (8, 1, 2)
    for row, (clip_id, ms) in enumerate((i, ms) for i in batch["clip_id"] for ms in (300, 900)):
        of_clip = row // 2
        speech, length = tuple(batch["speech"][of_clip]), int(batch["audio_length"][of_clip])
        assert tuple(long["gaps"][row, 0]) == gap_masks.place_in_speech(clip_id, ms, speech, length)
        np.testing.assert_array_equal(long["audio"][row], batch["audio"][of_clip])


def test_gaps_of_a_batch_are_kept(config, normalisation, clips, quickly_compiled):
    batch = gap_masks.with_gaps_in_words(next(input_pipeline.eval_batches(clips, 2)), (300,))
    evaluate = objective.make_objective(config, normalisation, train=False)
    mask = jax.jit(lambda key: evaluate(build.init_params(config), arrays(batch), key).features.mask)
    masks = [mask(jax.random.key(k)) for k in range(2)]
    np.testing.assert_array_equal(*masks)
    ms = np.asarray(masks[0]).sum(1) * 20  # frames of 20 ms
    assert ((ms >= 300) & (ms <= 380)).all()


def test_a_recognizer_has_no_validation_gaps(config, tiny_dir):
    asr = configs.load(
        "asr", [("data_dir", str(tiny_dir)), ("validation_gaps", "words"), ("batch_size", "4"), ("monitor", "val_loss")]
    )
    with pytest.raises(ValueError, match="asr restores no gaps"):
        loop.open_data(asr)


# ---- the dataset and a training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two speakers, two utterances each, of which one is at 48 kHz in stereo."""
    raw = tmp_path_factory.mktemp("librispeech")
    for speaker in (12, 7):
        folder = raw / str(speaker) / "1"
        folder.mkdir(parents=True)
        (folder / f"{speaker}-1.trans.txt").write_text(f"{speaker}-1-0000 THIS IS IT\n{speaker}-1-0001 AND THAT\n")
        tone = 0.1 * np.sin(np.arange(80_000) / 9)
        soundfile.write(folder / f"{speaker}-1-0000.flac", tone, 16_000)
        soundfile.write(folder / f"{speaker}-1-0001.flac", np.stack([tone, tone], 1), 48_000)
    return raw


def test_utterances_and_transcripts_are_those_of_the_corpus(corpus):
    from tfds_grid import librispeech_files

    files = librispeech_files.find_utterances(corpus)
    assert list(files) == ["12-1-0000", "12-1-0001", "7-1-0000", "7-1-0001"]
    transcripts = librispeech_files.read_transcripts(files["7-1-0001"].with_name("7-1.trans.txt"))
    assert transcripts == {"7-1-0000": "this is it", "7-1-0001": "and that"}
    record = librispeech_files.make_record("7-1-0001", files["7-1-0001"], transcripts["7-1-0001"])
    assert record["speaker"] == "librispeech-7" and record["landmarks"].shape == (0, 68, 2)
    assert abs(len(record["audio"]) - 80_000 / 3) < 2 and abs(np.abs(record["audio"]).max() - 3277) < 40


@pytest.mark.slow
def test_librispeech_is_built_and_trained_on(corpus, tiny_dir, tmp_path):
    import shutil
    import subprocess
    import sys

    data = shutil.copytree(tiny_dir, tmp_path / "data")
    command = [sys.executable, "-m", "tfds_grid.librispeech", f"--raw={corpus}", f"--data_dir={data}"]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 2  # nothing is overwritten
    fields = {"data_dir": str(data), "units": 8, "layers": 1, "preset": "paper", "batch_size": 4, "epochs": 1}
    fields |= {"audio_only_clips": 2, "validation_gaps": "words"}
    config = configs.load("av_unified", [(k, str(v)) for k, v in fields.items()])
    row = loop.train(config, tmp_path / "run")
    assert np.isfinite(row["val_gap_l1_db"]) and row["step"] == 9 // 2
