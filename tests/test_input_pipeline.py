"""Reading records that TensorFlow wrote: checksums, order, resuming, and that no tensorflow is needed for it."""

import collections
import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from avsi_jax import input_pipeline as pipeline

CLIPS = {"train": 11, "test": 5}
WITHOUT_WORDS = "sbat4a"

# Writes invented measurements by the real builder; in a process of its own, because that imports tensorflow.
WRITE = """
import pathlib, sys
import numpy as np
from avsi_jax import text
from tfds_grid import grid_dataset_builder, prepare

root, grid = pathlib.Path(sys.argv[1]), "blps"
raw, measured = root / "raw", {}
for k in range(16):
    clip_id = f"{grid[k % 4]}bat{k % 9 + 1}{'anps'[k // 4]}"
    speaker = "s30" if k < 5 else "s1"
    video, words = raw / speaker / f"{clip_id}.mpg", raw / "alignments" / speaker / f"{clip_id}.align"
    for path in (video, words):
        path.parent.mkdir(parents=True, exist_ok=True)
    video.touch()
    if k != 3:
        words.write_text("0 12500 sil\\n12500 25000 bin\\n25000 30000 sp\\n30000 50000 soon\\n50000 74500 sil\\n")
    rng = np.random.default_rng(k)
    frames = 74 + k % 3
    measured[clip_id] = root / f"{clip_id}.npz"
    audio = rng.integers(-32768, 32768, 47_000 + 300 * k).astype(np.int16)
    np.savez(measured[clip_id], audio=audio, offset_s=np.float32(0.011),
             landmarks=rng.uniform(0, 300, (frames, 68, 2)).astype(np.float32), landmarks_valid=rng.uniform(size=frames) > 0.1,
             frame_size=np.array([360, 288], np.int32), fps=np.float32(25), warnings=np.array([], np.str_),
             mouth=rng.integers(0, 256, (frames, 96, 96)).astype(np.uint8))
for name in ("speaker_independent", "speaker_independent_mouth"):
    options = {"data_dir": root / "data", "file_format": "tfrecord", "measured": measured, "full_train": True}
    builder = grid_dataset_builder.Builder(config=name, **options)
    prepare.pack(builder, raw, max_shard_mb=1)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder with measurements (ID.npz) and the records made of them (data/)."""
    root = tmp_path_factory.mktemp("records")
    subprocess.run([sys.executable, "-c", WRITE, str(root)], check=True, capture_output=True, timeout=300)
    return root


@pytest.fixture(scope="module")
def folder(written):
    return pipeline.find_dataset(written / "data")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(folder, tmp_path / "1.0.0")


def stored(written, clip_id):
    return np.load(written / f"{clip_id}.npz")


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ------------------------------------------------------------------------------------------------------------------ records


def test_records_give_back_what_was_written(written, folder):
    assert len(list(folder.glob("grid-train.tfrecord-*"))) > 1, "the test wants several shards"
    for split, count in CLIPS.items():
        records = pipeline.Records(folder, split)
        assert len(records) == count == len({records[i]["id"] for i in range(count)})
        assert records.clip_ids == [records[i]["id"] for i in range(count)]
        for i in range(count):
            raw = records[i]
            for name in ("audio", "landmarks", "landmarks_valid", "frame_size", "offset_s", "fps"):
                expected = stored(written, raw["id"])[name]
                np.testing.assert_array_equal(raw[name], expected)
            assert raw["audio"].dtype == np.int16 and raw["landmarks"].dtype == np.float32
            timed = [(w["word"], w["start_s"], w["end_s"]) for w in raw["words"]]
            expected = [("bin", 0.5, 1.0), ("soon", pytest.approx(1.2), 2.0)]
            assert timed == ([] if raw["id"] == WITHOUT_WORDS else expected)


def test_mouth_is_read(written, folder):
    records = pipeline.Records(pipeline.find_dataset(written / "data", "speaker_independent_mouth"), "test")
    raw = records[0]
    expected = stored(written, raw["id"])["mouth"].astype(float)
    assert raw["mouth"].shape == expected.shape and raw["mouth"].dtype == np.uint8
    assert np.corrcoef(raw["mouth"].ravel(), expected.ravel())[0, 1] > 0.9  # JPEG of noise


def test_newest_version_is_found(tmp_path):
    for name in ("1.0.0", "1.10.0", "1.9.0", "2.0.0.incompleteABC", "incomplete.X_3.0.0"):
        (tmp_path / "grid" / "speaker_independent" / name).mkdir(parents=True)
    assert pipeline.find_dataset(tmp_path).name == "1.10.0"
    with pytest.raises(pipeline.RecordError, match="avsi-prepare .*--builder_config=speaker_dependent"):
        pipeline.find_dataset(tmp_path, "speaker_dependent")


def test_missing_split_is_named(folder):
    with pytest.raises(pipeline.MissingSplitError, match="'validation'.*found test, train"):
        pipeline.Records(folder, "validation")


@pytest.mark.parametrize("at", [8 + 4, -5])
def test_changed_data_are_noticed_when_read(copy, at):
    shard = sorted(copy.glob("grid-train.tfrecord-*"))[1]
    data = bytearray(shard.read_bytes())
    data[at] ^= 1
    shard.write_bytes(data)
    records = pipeline.Records(copy, "train")
    last = {8 + 4: "record 0", -5: "record"}[at]
    with pytest.raises(pipeline.RecordError, match=f"{shard.name}: {last}.* checksum of its data"):
        for i in range(len(records)):
            records[i]


def test_changed_length_is_noticed(copy):
    shard = sorted(copy.glob("grid-train.tfrecord-*"))[0]
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.write_bytes(data)
    with pytest.raises(pipeline.RecordError, match=f"{shard.name}: record 0 .*checksum of its length"):
        pipeline.Records(copy, "train")


@pytest.mark.parametrize("lost", [1, 20, 100_000])
def test_cut_tail_is_noticed(copy, lost):
    shard = sorted(copy.glob("grid-train.tfrecord-*"))[-1]
    shard.write_bytes(shard.read_bytes()[:-lost])
    with pytest.raises(pipeline.RecordError, match=rf"{shard.name}: cut short in record \d+"):
        pipeline.Records(copy, "train")


def test_lost_records_and_files_are_noticed(copy):
    shard = sorted(copy.glob("grid-train.tfrecord-*"))[0]
    shard.write_bytes(b"")
    with pytest.raises(pipeline.RecordError, match=rf"{shard.name}: found 0 records, expected \d+"):
        pipeline.Records(copy, "train")
    shard.unlink()
    with pytest.raises(pipeline.RecordError, match=f"{shard.name} is missing"):
        pipeline.Records(copy, "train")
    (copy / "dataset_info.json").unlink()
    with pytest.raises(pipeline.RecordError, match="dataset_info.json can't be read"):
        pipeline.Records(copy, "test")


# ----------------------------------------------------------------------------------------------------------------- examples


def raw_example(samples=47_647, frames=75, words=True, text="bin blue at f two now"):
    rng = np.random.default_rng(0)
    rows = [{"word": "bin", "start_s": 0.5, "end_s": 0.75}, {"word": "now", "start_s": 1.5, "end_s": 2.0}]
    return {
        "id": "bbaf2n",
        "speaker": "s1",
        "audio": rng.integers(-9, 9, samples).astype(np.int16),
        "landmarks": rng.normal(size=(frames, 68, 2)).astype(np.float32),
        "landmarks_valid": np.ones(frames, bool),
        "offset_s": 0.25,
        "frame_size": np.array([360, 288], np.int32),
        "fps": 25.0,
        "text": text,
        "words": rows if words else [],
    }


@pytest.mark.parametrize(("samples", "frames"), [(47_647, 74), (48_000, 75), (60_001, 80), (1, 1)])
def test_shapes_are_fixed(samples, frames):
    raw = raw_example(samples, frames)
    x = pipeline.to_example(raw)
    shapes = {k: (v.shape, v.dtype.name) for k, v in x.items() if k != "clip_id"}
    assert shapes == {
        "id_hash": ((), "uint32"),
        "audio": ((48_000,), "int16"),
        "audio_length": ((), "int32"),
        "landmarks": ((75, 68, 2), "float32"),
        "num_frames": ((), "int32"),
        "landmarks_valid": ((75,), "bool"),
        "offset_s": ((), "float32"),
        "frame_size": ((2,), "int32"),
        "fps": ((), "float32"),
        "labels": ((41,), "int32"),
        "label_length": ((), "int32"),
        "speech": ((2,), "float32"),
        "has_words": ((), "bool"),
        "weight": ((), "float32"),
    }
    n, t = min(samples, 48_000), min(frames, 75)
    assert (x["audio_length"], x["num_frames"]) == (n, t)
    np.testing.assert_array_equal(x["audio"][:n], raw["audio"][:n])
    assert not x["audio"][n:].any() and not x["landmarks_valid"][t:].any() and x["landmarks_valid"][:t].all()
    np.testing.assert_array_equal(x["landmarks"][:t], raw["landmarks"][:t])
    np.testing.assert_array_equal(x["landmarks"][t:], np.broadcast_to(raw["landmarks"][t - 1], (75 - t, 68, 2)))


def test_speech_is_on_the_clock_of_the_sound():
    x = pipeline.to_example(raw_example())
    np.testing.assert_allclose(x["speech"], [0.75, 2.25])  # words at 0.5 and 2.0 in the picture, sound 0.25 s late
    assert x["has_words"] and x["label_length"] == 21
    x = pipeline.to_example(raw_example(words=False, text=""))
    np.testing.assert_allclose(x["speech"], [0, 47_647 / 16_000])
    assert not x["has_words"] and x["label_length"] == 0 and not x["labels"].any()


def test_id_hash():
    # printf bbaf2n | sha256sum begins with the digits on the right
    digits = hashlib.sha256(b"bbaf2n").hexdigest()[:8]
    assert pipeline.id_hash("bbaf2n") == int(digits, 16) and pipeline.id_hash("bbaf2n").dtype == np.uint32


# ------------------------------------------------------------------------------------------------------------------ batches


@pytest.fixture(scope="module")
def train(folder):
    return pipeline.Records(folder, "train")


def first(batches, n):
    return [next(batches) for _ in range(n)]


def test_every_clip_once_an_epoch_in_changing_order(train):
    seen = [i for batch in first(pipeline.train_batches(train, 4, seed=3), 11) for i in batch["clip_id"]]
    epochs = [seen[k : k + 11] for k in (0, 11, 22, 33)]
    assert all(sorted(e) == sorted(train.clip_ids) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4


def test_order_comes_from_the_seed(train):
    runs = [[b["clip_id"] for b in first(pipeline.train_batches(train, 4, seed=s), 5)] for s in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batch(train, processes):
    whole = first(pipeline.train_batches(train, 8, seed=1), 4)
    ranks = [{"process_index": p, "process_count": processes} for p in range(processes)]
    shares = [first(pipeline.train_batches(train, 8, seed=1, **rank), 4) for rank in ranks]
    for step, batch in enumerate(whole):
        joined = {k: np.concatenate([share[step][k] for share in shares]) for k in batch}
        same(joined, batch)


def test_batch_must_divide_among_processes(train):
    with pytest.raises(ValueError, match="multiple"):
        pipeline.train_batches(train, 7, seed=1, process_count=2)


def test_resuming_goes_on_where_it_was(train):
    batches = pipeline.train_batches(train, 4, seed=5)
    first(batches, 3)
    state = json.loads(json.dumps(batches.get_state()))
    expected = first(batches, 4)
    resumed = pipeline.train_batches(train, 4, seed=5)
    resumed.set_state(state)
    for source in (resumed, pipeline.train_batches(train, 4, seed=5, start_step=3)):
        for a, b in zip(first(source, 4), expected, strict=True):
            same(a, b)


def test_a_batch_may_exceed_the_split(folder):
    records = pipeline.Records(folder, "test")
    batch = next(pipeline.train_batches(records, 12, seed=0))
    assert set(collections.Counter(batch["clip_id"]).values()) <= {2, 3} and batch["audio"].shape == (12, 48_000)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 32])
def test_evaluation_meets_every_clip_once(train, batch_size):
    batches = list(pipeline.eval_batches(train, batch_size))
    assert all(b["audio"].shape == (batch_size, 48_000) for b in batches)
    weights = np.concatenate([b["weight"] for b in batches])
    ids = np.concatenate([b["clip_id"] for b in batches])
    assert list(ids[weights == 1]) == sorted(train.clip_ids) and set(weights) <= {0, 1}


def test_reading_needs_no_tensorflow(written):
    code = """
import importlib.machinery, sys

class NoTensorflow:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "tensorflow" else None

    def create_module(self, spec):
        raise ImportError("tensorflow was asked for")

sys.meta_path.insert(0, NoTensorflow())
from avsi_jax import input_pipeline as pipeline
records = pipeline.Records(pipeline.find_dataset(sys.argv[1], "speaker_independent_mouth"), "train")
print(next(pipeline.train_batches(records, 2, seed=0))["audio"].shape)
print(sum(b["weight"].sum() for b in pipeline.eval_batches(records, 4)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(written / "data")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(2, 48000)\n11.0\n"
