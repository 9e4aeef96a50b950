"""TFRecords: same contents as with tensorflow-datasets, without tensorflow; damage is reported before training starts."""

import io
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import google_crc32c
import numpy as np
import pytest

from avsi_jax.data import input_pipeline, tfrecords
from avsi_jax.data.tfrecords import MissingSplitError, RecordError, Records

TRAIN, TEST = (4, 4, 3), (5,)  # clips of each file
WITHOUT_WORDS = "clip3"


def features(encoding="bytes", mouth=False):
    """The features of the dataset as described by tensorflow-datasets; numbers as lists or as bytes."""
    import tensorflow_datasets as tfds

    tensor, text = tfds.features.Tensor, tfds.features.Text
    words = tfds.features.Sequence({"word": text(), "start_s": np.float32, "end_s": np.float32})
    described = {
        "id": text(), "speaker": text(), "text": text(), "words": words,
        "audio": tensor(shape=(None,), dtype=np.int16, encoding=encoding),
        "landmarks": tensor(shape=(None, 68, 2), dtype=np.float32, encoding=encoding),
        "landmarks_valid": tensor(shape=(None,), dtype=np.bool_),
        "frame_size": tensor(shape=(2,), dtype=np.int32),
        "offset_s": np.float32, "fps": np.float32,
    }  # fmt: skip
    if mouth:
        described["mouth"] = tfds.features.Sequence(tfds.features.Image(shape=(96, 96, 1), encoding_format="jpeg"))
    return tfds.features.FeaturesDict(described)


def clip(k: int) -> dict:
    """A random clip; its audio starts with the numbers at which the length of a varint changes."""
    rng = np.random.default_rng(k)
    edges = [0, -1, 1, 127, 128, 129, -128, -129, 16_383, 16_384, 16_385, -16_384, -16_385, 32_767, -32_768]
    words = [{"word": "bin", "start_s": 0.5, "end_s": 1.0}, {"word": "soon", "start_s": 1.2, "end_s": 2.0}]
    return {
        "id": f"clip{k}",
        "speaker": "s1",
        "audio": np.concatenate([edges, rng.integers(-32_768, 32_768, 500 + 30 * k)]).astype(np.int16),
        "offset_s": np.float32(0.011),
        "landmarks": rng.uniform(-300, 300, (5 + k % 3, 68, 2)).astype(np.float32),
        "landmarks_valid": rng.uniform(size=5 + k % 3) > 0.3,
        "frame_size": np.array([2**31 - 1, -(2**31)] if k == 1 else [360, 288], np.int32),
        "fps": np.float32(25),
        "text": "" if k == 2 else "bin blue é",
        "words": [] if f"clip{k}" == WITHOUT_WORDS else words,
    }


def mouth_of(k: int) -> list[np.ndarray]:
    ramp = np.add.outer(np.arange(96), np.arange(96))
    return [(ramp // 2 + 10 * t + k).astype(np.uint8) for t in range(3)]


def message(k: int, described) -> bytes:
    """The record of clip k as serialised by tensorflow-datasets."""
    from tensorflow_datasets.core import example_serializer

    raw = clip(k)
    if "mouth" in described:
        raw["mouth"] = [io.BytesIO(cv2.imencode(".jpg", image)[1].tobytes()) for image in mouth_of(k)]
    return example_serializer.ExampleSerializer(described.get_serialized_info()).serialize_example(described.encode_example(raw))


def framed(data: bytes) -> bytes:
    """A record with the framing of a TFRecord file (tensorflow.org/tutorials/load_data/tfrecord)."""

    def masked_crc(part: bytes) -> bytes:
        crc = google_crc32c.value(part)
        return struct.pack("<I", (((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8) & 0xFFFFFFFF)

    size = struct.pack("<Q", len(data))
    return size + masked_crc(size) + data + masked_crc(data)


def shard(folder: Path, number: int, split: str = "train", of: int = len(TRAIN)) -> Path:
    return folder / f"grid-{split}.tfrecord-{number:05d}-of-{of:05d}"


def write(folder: Path, encoding="bytes", mouth=False) -> Path:
    folder.mkdir()
    described, k, splits = features(encoding, mouth), 0, []
    for split, counts in {"train": TRAIN, "test": TEST}.items():
        size = 0
        for number, count in enumerate(counts):
            messages = [message(k + i, described) for i in range(count)]
            shard(folder, number, split, len(counts)).write_bytes(b"".join(map(framed, messages)))
            k, size = k + count, size + sum(map(len, messages))
        splits.append({"name": split, "numBytes": str(size), "shardLengths": list(map(str, counts))})
    described.save_config(folder)
    (folder / "dataset_info.json").write_text(json.dumps({"name": "grid", "fileFormat": "tfrecord", "splits": splits}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "1.0.0")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy that tests may modify."""
    return shutil.copytree(folder, tmp_path / "1.0.0")


# -------------------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("encoding", ["none", "bytes"])
def test_records_return_what_was_written(tmp_path, encoding):
    folder, k = write(tmp_path / "1.0.0", encoding), 0
    for split, counts in {"train": TRAIN, "test": TEST}.items():
        read = Records(folder, split)
        assert len(read) == sum(counts) and read.clip_ids == [f"clip{k + i}" for i in range(len(read))]
        for raw in read:
            expected, k = clip(k), k + 1
            assert raw.keys() == expected.keys()
            for name, value in expected.items():
                if isinstance(value, np.ndarray):
                    assert raw[name].dtype == value.dtype
                    np.testing.assert_array_equal(raw[name], value)
                elif name != "words":
                    assert raw[name] == value, name
            assert [(w["word"], w["start_s"], w["end_s"]) for w in raw["words"]] == [
                (w["word"], np.float32(w["start_s"]), np.float32(w["end_s"])) for w in expected["words"]
            ]


@pytest.mark.parametrize("mouth", [False, True])
@pytest.mark.parametrize("encoding", ["none", "bytes"])
def test_tensorflow_datasets_reads_the_same(tmp_path, encoding, mouth):
    import tensorflow_datasets as tfds

    folder = write(tmp_path / "1.0.0", encoding, mouth)
    theirs = tfds.features.FeaturesDict.from_json(json.loads((folder / "features.json").read_text()))
    for k, ours in enumerate(Records(folder, "train")):
        expected = theirs.deserialize_example_np(message(k, theirs))
        assert ours.keys() == expected.keys()
        words = expected.pop("words")
        assert [w["word"].encode() for w in ours["words"]] == list(words["word"])
        for name in ("start_s", "end_s"):
            assert [w[name] for w in ours["words"]] == list(words[name])
        for name, value in expected.items():
            value = np.stack(value)[..., 0] if name == "mouth" else value
            found = ours[name].encode() if isinstance(ours[name], str) else ours[name]
            np.testing.assert_array_equal(found, value, err_msg=name)
            assert np.asarray(found).dtype == np.asarray(value).dtype
        if mouth:
            assert ours["mouth"].shape == (3, 96, 96) and np.abs(ours["mouth"] - np.float32(mouth_of(k))).max() < 6


def test_records_of_the_dataset_builder_are_read(tiny_dir):
    """Written by tfds_grid with tensorflow's writer."""
    from tests.support import tiny_data

    folder, speakers = tfrecords.find_dataset(tiny_dir), tiny_data.clip_ids()
    for split, speaker in {"train": "s1", "validation": "s26", "test": "s30"}.items():
        read = Records(folder, split)
        assert sorted(read.clip_ids) == sorted(i for i, s in speakers.items() if s == speaker)
        for raw in read:
            measured = np.load(tiny_dir.parent / "measured" / f"{raw['id']}.npz")
            for name in ("audio", "landmarks", "landmarks_valid", "frame_size", "offset_s", "fps"):
                np.testing.assert_array_equal(raw[name], measured[name])
            assert raw["speaker"] == speaker and raw["text"].split() == [w["word"] for w in raw["words"]]


def test_the_newest_version_is_selected(tmp_path):
    for name in ("1.0.0", "1.10.0", "1.9.0", "2.0.0.incompleteABC", "incomplete.X_3.0.0"):
        (tmp_path / "grid" / "speaker_independent" / name).mkdir(parents=True)
    assert tfrecords.find_dataset(tmp_path).name == "1.10.0"
    with pytest.raises(RecordError, match="avsi-prepare .*--builder_config=speaker_dependent"):
        tfrecords.find_dataset(tmp_path, "speaker_dependent")


def test_unknown_features_are_ignored(copy):
    import tensorflow_datasets as tfds

    described = tfds.features.FeaturesDict(dict(features()) | {"a": np.float32, "zoom": tfds.features.Text()})
    described.save_config(copy)
    assert len(Records(copy, "test")) == sum(TEST)


def test_reading_loads_no_tensorflow(tmp_path):
    folder = write(tmp_path / "1.0.0", mouth=True)
    code = """
import sys
from avsi_jax.data import input_pipeline as pipeline
records = pipeline.Records(sys.argv[1], "train")
print(next(pipeline.train_batches(records, 2, seed=0))["audio"].shape)
print(sum(b["weight"].sum() for b in pipeline.eval_batches(records, 4)), records[0]["mouth"].shape)
print([name for name in ("tensorflow", "tensorflow_datasets", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(2, 48000)\n11.0 (3, 96, 96)\n[]\n"


# ----------------------------------------------------------------------------------------------- damage detected on opening a split


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def use_clips_of_test(folder: Path) -> None:
    """Replaces the third file by three of the five records of another split, which is the expected number."""
    read = Records(folder, "test")
    shard(folder, 2).write_bytes(b"".join(framed(tfrecords._read(place)) for place in read._places[:3]))


def edit_train_split(change):
    return lambda folder: edit_json(folder / "dataset_info.json", lambda info: change(info["splits"][0]))


DAMAGE = {
    "data": (lambda f: flip_bit(shard(f, 1), 40), "00001-of-00003: record 0 .*checksum of its data"),
    "checksum": (lambda f: flip_bit(shard(f, 1), -1), "00001-of-00003: record 3 .*checksum of its data"),
    "length": (lambda f: flip_bit(shard(f, 0), 0), "00000-of-00003: record 0 .*checksum of its length"),
    "no length": (lambda f: truncate(shard(f, 0), 1), "00000-of-00003: .* record 0 of 4, at byte 1"),
    "missing byte": (lambda f: truncate(shard(f, 2), -1), "00002-of-00003: .* record 2 of 3"),
    "missing half": (lambda f: truncate(shard(f, 2), 3000), r"00002-of-00003: .* record \d of 3, at byte 3000"),
    "emptied": (lambda f: truncate(shard(f, 0), 0), "00000-of-00003: found 0 records, expected 4"),
    "missing": (lambda f: shard(f, 1).unlink(), "00001-of-00003 is missing: expected 4 records"),
    "a copy": (lambda f: shutil.copy(shard(f, 0), shard(f, 1)), "clip0 .*00000-of-.*00001-of-.* 0"),
    "a longer copy": (lambda f: shutil.copy(shard(f, 0), shard(f, 2)), "00002-of-00003: found 4 records, expected 3"),
    "another split's": (use_clips_of_test, r"records of train have \d+ bytes, expected \d+"),
    "another build's": (lambda f: shutil.copy(shard(f, 0), shard(f, 0, of=2)), "00000-of-00002 .*another build"),
    "half written": (lambda f: (f / "grid-train.tfrecord-00000.tmp").touch(), "00000.tmp .*another build"),
    "no records": (lambda f: shard(f, 0).write_text("<!DOCTYPE html>" * 99), "00000-of-00003: record 0 "),
    "other messages": (lambda f: shard(f, 2).write_bytes(framed(b"hello") * 3), "00002-of-00003: record 0 has no clip id"),
    "no messages": (lambda f: shard(f, 2).write_bytes(framed(b"") * 3), "00002-of-00003: record 0 has no clip id"),
    "split of none": (edit_train_split(lambda s: s.update(shardLengths=["0", "0", "0"])), "split 'train' of .* is empty"),
    "split without files": (edit_train_split(lambda s: s.pop("shardLengths")), "split 'train' of .* is empty"),
}
DAMAGED_DESCRIPTION = {
    "missing": ("dataset_info.json", None, "can't be read"),
    "binary": ("dataset_info.json", bytes(range(256)), "can't be read"),
    "truncated": ("dataset_info.json", b'{"name": "gr', "can't be read"),
    "a list": ("dataset_info.json", b"[1]", "records"),
    "foreign": ("dataset_info.json", b'{"name": "x", "splits": 3}', "records"),
    "a foreign split": ("dataset_info.json", b'{"name": "x", "splits": [{"name": "train", "shardLengths": 7}]}', "records"),
    "other format": ("dataset_info.json", b'{"name": "x", "splits": [], "fileFormat": "riegeli"}', "'riegeli'"),
    "features missing": ("features.json", None, "can't be read"),
    "features truncated": ("features.json", b"{", "can't be read"),
    "features foreign": ("features.json", b'{"image": 3}', "features"),
    "features empty": ("features.json", b"[]", "'id' is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_reported_when_the_split_is_opened(copy, name):
    assert len(Records(copy, "train")) == sum(TRAIN)
    damage, message = DAMAGE[name]
    damage(copy)
    with pytest.raises(RecordError, match=message) as raised:
        Records(copy, "train")
    assert str(copy) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", DAMAGED_DESCRIPTION)
def test_a_damaged_description_is_reported(copy, name):
    file, content, message = DAMAGED_DESCRIPTION[name]
    (copy / file).unlink() if content is None else (copy / file).write_bytes(content)
    with pytest.raises(RecordError, match=f"^{copy / file}.*{message}"):
        Records(copy, "train")


@pytest.mark.parametrize("name", sorted(set(tfrecords.FEATURES) - tfrecords.OPTIONAL))
def test_a_missing_feature_is_named(copy, name):
    parts = dict(features())
    if "/" in name:
        import tensorflow_datasets as tfds

        kept = {n: f for n, f in parts["words"].feature.items() if n != name.split("/")[1]}
        parts["words"] = tfds.features.Sequence(kept)
    else:
        del parts[name]
    type(features())(parts).save_config(copy)
    with pytest.raises(RecordError, match=f"features.json: .*'{name}' is missing, expected {tfrecords.FEATURES[name][:4]}"):
        Records(copy, "train")


def test_a_missing_split_is_named(folder):
    with pytest.raises(MissingSplitError, match="'validation'.*test, train"):
        Records(folder, "validation")


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("audio", {"dtype": np.float32}, r"'audio' is float32 \[-1\], expected int16 \[-1\]"),
        ("landmarks", {"shape": (None, 478, 3)}, r"'landmarks' is float32 \[-1, 478, 3\], expected float32 \[-1, 68, 2\]"),
        ("audio", {"encoding": "zlib"}, r"'audio' is int16 \[-1\] zlib, expected int16"),
    ],
)
def test_a_feature_of_another_type_is_named(copy, name, other, message):
    import tensorflow_datasets as tfds

    options = {"audio": {"shape": (None,), "dtype": np.int16}, "landmarks": {"dtype": np.float32}}[name] | other
    described = tfds.features.FeaturesDict(dict(features()) | {name: tfds.features.Tensor(**options)})
    described.save_config(copy)
    with pytest.raises(RecordError, match=message):
        Records(copy, "test")


def test_every_flipped_bit_is_detected(copy):
    """Anywhere in the file: lengths, checksums, names, numbers."""
    path, rng = shard(copy, 0, "test", 1), np.random.default_rng(0)
    original = path.read_bytes()
    for at in rng.integers(0, len(original), 300):
        data = bytearray(original)
        data[at] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        with pytest.raises(RecordError, match="tfrecord-00000-of-00001"):
            Records(copy, "test")


def test_malformed_messages_raise_only_record_errors(copy):
    """Messages with correct checksums whose contents were randomly changed, removed and repeated."""
    path, described, rng = shard(copy, 0, "test", 1), features("none", mouth=True), np.random.default_rng(1)
    original, rejected = message(0, described), 0
    for _ in range(300):
        data = bytearray(original)
        for at in rng.integers(0, len(data), rng.integers(1, 6)):
            at = at if rng.uniform() < 0.5 else at % 200
            data[at : at + rng.integers(3)] = rng.bytes(rng.integers(3))
        path.write_bytes(framed(bytes(data)))
        size = {"shardLengths": ["1"], "numBytes": str(len(data))}
        edit_json(copy / "dataset_info.json", lambda info, size=size: info["splits"][1].update(size))
        try:
            example = Records(copy, "test")[0]
        except RecordError as e:
            rejected += 1
            assert "record 0" in str(e)
        else:  # only numbers or letters changed
            assert example["landmarks"].shape[1:] == (68, 2) and example["audio"].dtype == np.int16
    assert 50 < rejected < 300


# ------------------------------------------------------------------------------------------------------- damage detected on reading


@pytest.fixture
def damaged(copy, monkeypatch):
    """A split that is not verified on opening, with a flipped bit in the data of its sixth record."""
    monkeypatch.setattr(tfrecords, "VERIFY_ON_OPEN_BYTES", 0)
    flip_bit(shard(copy, 1), Records(copy, "train")._places[5].start + 700)
    return Records(copy, "train")


def test_large_splits_are_verified_record_by_record(damaged):
    for i in set(range(len(damaged))) - {5}:
        assert damaged[i]["id"] == f"clip{i}"
    for read in (lambda: damaged[5], damaged.verify):
        with pytest.raises(RecordError, match=r"00001-of-00003: record 1 .*checksum of its data"):
            read()


def test_batches_raise_the_error_of_a_damaged_record(damaged):
    message = r"00001-of-00003: record 1"
    with pytest.raises(RecordError, match=message):
        list(input_pipeline.eval_batches(damaged, 2))
    batches, clip_ids = input_pipeline.train_batches(damaged, 2, seed=0), []
    with pytest.raises(RecordError, match=message):
        while len(clip_ids) < 2 * sum(TRAIN):
            clip_ids += next(batches)["clip_id"]
    assert "clip5" not in clip_ids and len(clip_ids) < sum(TRAIN)


# ------------------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["a copy", "data", "missing byte"])
def test_training_stops_before_its_first_step(copy, tmp_path, monkeypatch, name):
    from avsi_jax.runtime import devices
    from avsi_jax.training import cli

    home = tmp_path / "data" / "grid" / "speaker_independent"
    home.mkdir(parents=True)
    DAMAGE[name][0](copy)
    shutil.move(copy, home / "1.0.0")

    def fail(*_):
        raise AssertionError("a training step was built")

    monkeypatch.setattr(devices, "map_train_step", fail)
    options = ["--config=tiny", f"--config.data_dir={tmp_path / 'data'}", "--config.validation_split=test", "--config.batch_size=4"]
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert cli.main([*options, f"--workdir={tmp_path / 'run'}"]) == 2
    assert stderr.getvalue().startswith("avsi-train: ") and "grid-train.tfrecord-" in stderr.getvalue()
    assert not (tmp_path / "run").exists()
