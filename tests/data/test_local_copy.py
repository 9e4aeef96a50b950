"""A dataset is copied once per host, from a disk or a bucket, and an incomplete copy is never used."""

import base64
import shutil
import subprocess
import sys
from pathlib import Path

import google_crc32c
import pytest

from avsi_jax.data import local_copy, tfrecords
from avsi_jax.runtime import storage
from avsi_jax.runtime.storage import StorageError
from tests.support.buckets import bucket, place  # noqa: F401 (fixtures)

# ruff: noqa: F811

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "validation")


@pytest.fixture
def dataset(tiny_dir, place):
    """A copy of the tiny dataset's newest version that a test may change, on a disk and in a bucket."""
    original = tfrecords.find_dataset(tiny_dir)
    home = place / "grid" / "speaker_independent" / original.name
    for path in original.iterdir():
        storage.write_bytes(home / path.name, path.read_bytes())
    return home


@pytest.fixture
def on_disk(tiny_dir, tmp_path):
    """A copy of the tiny dataset's newest version that a test may change, on a disk."""
    original = tfrecords.find_dataset(tiny_dir)
    return Path(shutil.copytree(original, tmp_path / "grid" / "speaker_independent" / original.name))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_dataset_is_copied_once(dataset, tmp_path, capfd):
    copy = local_copy.local_copy(dataset, tmp_path / "cache", SPLITS)
    assert copy.name == dataset.name and copy.is_relative_to(tmp_path / "cache")
    source = contents(dataset)
    assert contents(copy) == {k: v for k, v in source.items() if "-test" not in k} and len(contents(copy)) < len(source)
    assert tfrecords.Records(copy, "train").clip_ids == tfrecords.Records(dataset, "train").clip_ids
    progress = capfd.readouterr().err
    assert str(dataset) in progress and "MB/s" in progress

    before = {p.name: p.stat().st_mtime_ns for p in Path(copy).iterdir()}
    assert local_copy.local_copy(dataset, tmp_path / "cache", SPLITS) == copy
    assert {p.name: p.stat().st_mtime_ns for p in Path(copy).iterdir()} == before and capfd.readouterr().err == ""
    assert local_copy.local_copy(dataset, tmp_path / "cache", ("test",)) == copy  # into the same folder
    assert contents(copy) == source


def test_a_changed_source_is_copied_beside_the_old_copy(dataset, tmp_path):
    old = local_copy.local_copy(dataset, tmp_path / "cache", SPLITS)
    before = contents(old)
    storage.write_text(dataset / "metadata.json", "{ }")
    new = local_copy.local_copy(dataset, tmp_path / "cache", SPLITS)
    assert new != old and new.name == old.name and (new / "metadata.json").read_text() == "{ }"
    assert contents(old) == before


def test_the_error_for_a_missing_dataset_names_it(place, tmp_path):
    with pytest.raises(StorageError, match=f"{place / '1.0.0'}"):
        local_copy.local_copy(place / "1.0.0", tmp_path / "cache", SPLITS)


def test_the_error_for_a_missing_split_names_it(on_disk, tmp_path):
    with pytest.raises(tfrecords.MissingSplitError, match="'tran'"):
        local_copy.local_copy(on_disk, tmp_path / "cache", ("tran",))


def test_an_interrupted_copy_is_completed_by_the_next_run(on_disk, tmp_path, monkeypatch):
    sizes, add = {p.name: p.stat().st_size for p in on_disk.iterdir()}, local_copy._Progress.add
    limit = sum(sizes.values()) // 2

    def interrupt(progress, count):
        add(progress, count)
        if progress._done > limit:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local_copy._Progress, "add", interrupt)
        patch.setattr(local_copy, "BLOCK", 1000)
        patch.setattr(local_copy, "PARALLEL_COPIES", 1)
        with pytest.raises(KeyboardInterrupt):
            local_copy.local_copy(on_disk, tmp_path / "cache", SPLITS)
    (target,) = tmp_path.glob(f"cache/*/{on_disk.name}")
    copied = {p.name: p.stat().st_size for p in target.iterdir()}
    assert copied and copied.items() < sizes.items()  # some of the files, each of them complete

    (target / ".metadata.json.1.2.tmp").write_text("from a process that was killed")
    kept = target / next(iter(copied))
    before = kept.stat().st_mtime_ns
    (target / "features.json").write_text("{")
    assert Path(local_copy.local_copy(on_disk, tmp_path / "cache", SPLITS)) == target
    assert contents(target) == {k: v for k, v in contents(on_disk).items() if "-test" not in k}
    assert kept.stat().st_mtime_ns == before or kept.name == "features.json"


def test_a_file_that_arrives_damaged_is_not_kept(on_disk, tmp_path, monkeypatch):
    """Detected by the CRC32C of a bucket's file: big-endian, base64 (cloud.google.com/storage/docs/json_api/v1/objects)."""
    crc = {p.name: google_crc32c.value(p.read_bytes()).to_bytes(4, "big") for p in on_disk.iterdir()}
    listing = local_copy._listing
    with_crc = lambda url: [f._replace(crc32c=base64.b64encode(crc[f.name]).decode()) for f in listing(url)]
    monkeypatch.setattr(local_copy, "_listing", with_crc)
    assert local_copy.local_copy(on_disk, tmp_path / "right", SPLITS).exists()
    crc["metadata.json"] = bytes(4)
    with pytest.raises(StorageError, match="metadata.json: .*CRC32C"):
        local_copy.local_copy(on_disk, tmp_path / "wrong", SPLITS)
    assert not list(tmp_path.glob("wrong/*/*/*metadata.json*"))


def test_damaged_records_of_the_source_are_detected_and_their_copy_deleted(dataset, tmp_path):
    (path,) = [p for p in dataset.iterdir() if "-validation.tfrecord" in p.name]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    storage.write_bytes(path, bytes(data))
    with pytest.raises(tfrecords.RecordError, match="checksum of its data") as raised:
        local_copy.local_copy(dataset, tmp_path / "cache", SPLITS)
    assert str(dataset) in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.glob("cache/*/*/*-validation.*")) and list(tmp_path.glob("cache/*/*/*-train.*"))


def test_a_full_disk_is_reported_before_anything_is_copied(on_disk, tmp_path, monkeypatch):
    needed = sum(p.stat().st_size for p in on_disk.iterdir() if "-test" not in p.name)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10_000, 9_900, 100))
    with pytest.raises(StorageError, match=rf"{tmp_path}/cache.*{needed:,} bytes needed, 100 free"):
        local_copy.local_copy(on_disk, tmp_path / "cache", SPLITS)
    assert [p for p in tmp_path.glob("cache/*/*/*")] == []


def test_one_process_of_a_host_copies_and_the_others_wait(on_disk, tmp_path):
    code = (
        "import sys, time; from avsi_jax.data import local_copy\n"
        "add = local_copy._Progress.add\n"
        "local_copy._Progress.add = lambda *a: (time.sleep(0.2), add(*a))\n"
        "print(local_copy.local_copy(sys.argv[1], sys.argv[2], ('train', 'validation')))"
    )
    command = [sys.executable, "-c", code, str(on_disk), str(tmp_path / "cache")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    (out, messages), (other_out, other_messages) = (p.communicate(timeout=60) for p in started)
    assert [p.returncode for p in started] == [0, 0], messages + other_messages
    assert out == other_out and Path(out.strip()).is_dir()
    assert (messages + other_messages).count("MB/s") == 1
    assert (messages + other_messages).count("waiting for another process") == 1
