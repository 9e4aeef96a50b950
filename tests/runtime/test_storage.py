"""Files on a disk and in a bucket: written whole or not at all, data copied once a host and never taken for whole too early.

The bucket is gcp-storage-emulator's, on this machine; without it, or without gcsfs, those tests are skipped.
"""

import base64
import contextlib
import errno
import importlib.util
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import google_crc32c
import pytest

from avsi_jax.data import local_copy, tfrecords
from avsi_jax.runtime import storage
from avsi_jax.runtime.storage import StorageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def bucket():
    """gs:// address of an empty bucket on this machine."""
    if not all(map(importlib.util.find_spec, ("gcsfs", "gcp_storage_emulator"))):
        pytest.skip("needs a bucket on this machine: pip install gcsfs gcp-storage-emulator")
    from etils.epath import gpath
    from gcp_storage_emulator.server import create_server

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = create_server("localhost", port, in_memory=True, default_bucket="avsi-test")
    server.start()
    gpath._is_tf_installed.cache_clear()  # another test may have asked before avsi_jax.runtime.storage had its say
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
        yield "gs://avsi-test"
    server.stop()


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    """A folder on a disk, and one in a bucket."""
    if request.param == "disk":
        return storage.folder(tmp_path / "place")
    return storage.folder(request.getfixturevalue("bucket")) / tmp_path.name


@contextlib.contextmanager
def largest_file(num_bytes):
    """The system refuses to make files larger than this, as a full disk does: in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ----------------------------------------------------------------------------------------------------------------- writing


def test_folders_are_absolute_on_a_disk_and_as_they_are_in_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert os.fspath(storage.folder("a/../run")) == str(tmp_path / "run")
    assert os.fspath(storage.folder("~/run")) == os.path.expanduser("~/run")
    assert os.fspath(storage.folder("gs://bucket/run")) == "gs://bucket/run"
    with pytest.raises(ValueError, match="found s3://, expected a folder or gs://"):
        storage.folder("s3://bucket/run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StorageError, match="pip install"):
        storage.folder("gs://bucket/run")


def test_a_file_is_written_and_written_anew(place):
    path = place / "run" / "status.json"
    assert storage.names(path.parent) == []
    for text in ("ä, first", "second"):
        storage.write_text(path, text)
        assert path.read_text() == text
    assert storage.names(path.parent) == ["status.json"]


def test_lines_are_added(place):
    storage.write_text(place / "other", "")  # makes the folder
    for line in ("step,loss", "1,0.5", "2,0.25"):
        storage.append_line(place / "metrics.csv", line)
    assert (place / "metrics.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n"


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "config.json"
    storage.write_text(path, "old")
    with largest_file(100), pytest.raises(StorageError, match=rf"{path}: 5,000 bytes could not be written: File too large"):
        storage.write_text(path, "x" * 5000)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]


def test_a_line_that_fails_is_taken_back(tmp_path):
    path = tmp_path / "metrics.csv"
    storage.append_line(path, "1" * 89)
    with largest_file(100), pytest.raises(StorageError, match=f"{path}: 51 bytes could not be written: File too large"):
        storage.append_line(path, "2" * 50)
    assert path.read_text() == "1" * 89 + "\n"
    storage.append_line(path, "3")
    assert path.read_text().endswith("1\n3\n")


def test_a_full_disk_is_named_with_what_it_lacks(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10_000, 9_999, 1))
    with pytest.raises(StorageError) as raised:
        storage.write_text(tmp_path / "status.json", "x" * 1234)
    assert str(raised.value).startswith(f"{tmp_path}/status.json: the disk is full: 1,234 bytes needed, 1 free")


def test_a_killed_writer_leaves_one_of_its_files_whole(tmp_path):
    path = tmp_path / "status.json"
    code = (
        "import sys; from avsi_jax.runtime import storage\n"
        "while True:\n    for c in 'ab':\n        storage.write_text(sys.argv[1], c * 3_000_000)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    text = path.read_text()
    assert len(text) == 3_000_000 and len(set(text)) == 1


def test_a_bucket_shows_what_others_wrote_since(bucket):
    import gcsfs

    home = storage.folder(bucket) / "shared"
    storage.write_text(home / "0.json", "first")
    assert [p.name for p in home.iterdir()] == ["0.json"]
    other = gcsfs.GCSFileSystem(skip_instance_cache=True)
    other.pipe(os.fspath(home / "1.json"), b"second")
    other.pipe(os.fspath(home / "0.json"), b"longer than it was")
    assert sorted(p.name for p in home.iterdir()) == ["0.json", "1.json"]
    assert (home / "1.json").exists() and (home / "0.json").read_text() == "longer than it was"


def test_epath_needs_no_tensorflow_for_a_bucket(bucket):
    code = (
        "import sys; from avsi_jax.runtime import storage\n"
        "path = storage.folder(sys.argv[1]) / 'alone.txt'\n"
        "storage.append_line(path, 'x'); assert path.read_text() == 'x\\n'\n"
        "assert not {'tensorflow', 'torch', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, bucket], check=True, cwd=ROOT, timeout=60)


# ----------------------------------------------------------------------------------------------------------------- copying

SPLITS = ("train", "validation")


@pytest.fixture
def dataset(tiny_dir, place):
    """The tiny dataset's newest version, in a place where a test may change it."""
    there = tfrecords.find_dataset(tiny_dir)
    home = place / "grid" / "speaker_independent" / there.name
    for path in there.iterdir():
        storage.write_bytes(home / path.name, path.read_bytes())
    return home


@pytest.fixture
def on_disk(tiny_dir, tmp_path):
    there = tfrecords.find_dataset(tiny_dir)
    return Path(shutil.copytree(there, tmp_path / "grid" / "speaker_independent" / there.name))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_dataset_is_copied_once(dataset, tmp_path, capfd):
    copy = local_copy.local_copy(dataset, tmp_path / "cache", SPLITS)
    assert copy.name == dataset.name and copy.is_relative_to(tmp_path / "cache")
    source = contents(dataset)
    assert contents(copy) == {k: v for k, v in source.items() if "-test" not in k} and len(contents(copy)) < len(source)
    assert tfrecords.Records(copy, "train").clip_ids == tfrecords.Records(dataset, "train").clip_ids
    said = capfd.readouterr().err
    assert str(dataset) in said and "MB/s" in said

    before = {p.name: p.stat().st_mtime_ns for p in Path(copy).iterdir()}
    assert local_copy.local_copy(dataset, tmp_path / "cache", SPLITS) == copy
    assert {p.name: p.stat().st_mtime_ns for p in Path(copy).iterdir()} == before and capfd.readouterr().err == ""
    assert local_copy.local_copy(dataset, tmp_path / "cache", ("test",)) == copy  # goes into the same folder
    assert contents(copy) == source


def test_a_changed_source_is_copied_beside_the_old_copy(dataset, tmp_path):
    old = local_copy.local_copy(dataset, tmp_path / "cache", SPLITS)
    before = contents(old)
    storage.write_text(dataset / "metadata.json", "{ }")
    new = local_copy.local_copy(dataset, tmp_path / "cache", SPLITS)
    assert new != old and new.name == old.name and (new / "metadata.json").read_text() == "{ }"
    assert contents(old) == before


def test_what_is_not_there_is_named(place, tmp_path):
    with pytest.raises(StorageError, match=f"{place / '1.0.0'}.*(can't be read|not there)"):
        local_copy.local_copy(place / "1.0.0", tmp_path / "cache", SPLITS)


def test_a_split_that_is_not_there_is_named(on_disk, tmp_path):
    with pytest.raises(tfrecords.MissingSplitError, match="no split 'tran'"):
        local_copy.local_copy(on_disk, tmp_path / "cache", ("tran",))


def test_a_copy_that_is_cut_off_is_never_taken_for_whole(on_disk, tmp_path, monkeypatch):
    sizes, add = {p.name: p.stat().st_size for p in on_disk.iterdir()}, local_copy._Progress.add
    limit = sum(sizes.values()) // 2

    def cut_off(progress, count):
        add(progress, count)
        if progress._done > limit:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local_copy._Progress, "add", cut_off)
        patch.setattr(local_copy, "BLOCK", 1000)
        patch.setattr(local_copy, "COPIES_AT_ONCE", 1)
        with pytest.raises(KeyboardInterrupt):
            local_copy.local_copy(on_disk, tmp_path / "cache", SPLITS)
    (target,) = tmp_path.glob(f"cache/*/{on_disk.name}")
    found = {p.name: p.stat().st_size for p in target.iterdir()}
    assert found and found.items() < sizes.items()  # some files, all of them whole

    (target / ".metadata.json.1.2.tmp").write_text("of a copier that was killed")
    kept = target / next(iter(found))
    before = kept.stat().st_mtime_ns
    (target / "features.json").write_text("{")
    assert Path(local_copy.local_copy(on_disk, tmp_path / "cache", SPLITS)) == target
    assert contents(target) == {k: v for k, v in contents(on_disk).items() if "-test" not in k}
    assert kept.stat().st_mtime_ns == before or kept.name == "features.json"


def test_a_file_that_arrives_damaged_is_not_kept(on_disk, tmp_path, monkeypatch):
    """Told by the CRC32C that a bucket keeps of a file: big-endian, base64 (cloud.google.com/storage/docs/json_api/v1/objects)."""
    crc = {p.name: google_crc32c.value(p.read_bytes()).to_bytes(4, "big") for p in on_disk.iterdir()}
    listing = local_copy._listing
    told = lambda url: [f._replace(crc32c=base64.b64encode(crc[f.name]).decode()) for f in listing(url)]
    monkeypatch.setattr(local_copy, "_listing", told)
    assert local_copy.local_copy(on_disk, tmp_path / "right", SPLITS).exists()
    crc["metadata.json"] = bytes(4)
    with pytest.raises(StorageError, match="metadata.json: what was read has another CRC32C"):
        local_copy.local_copy(on_disk, tmp_path / "wrong", SPLITS)
    assert not list(tmp_path.glob("wrong/*/*/*metadata.json*"))


def test_damaged_records_of_the_source_are_found_and_their_copy_deleted(dataset, tmp_path):
    (path,) = [p for p in dataset.iterdir() if "-validation.tfrecord" in p.name]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    storage.write_bytes(path, bytes(data))
    with pytest.raises(tfrecords.RecordError, match="checksum of its data") as raised:
        local_copy.local_copy(dataset, tmp_path / "cache", SPLITS)
    assert f"it was a copy of {dataset}, and is deleted" in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.glob("cache/*/*/*-validation.*")) and list(tmp_path.glob("cache/*/*/*-train.*"))


def test_a_disk_without_room_is_named_before_anything_is_copied(on_disk, tmp_path, monkeypatch):
    needed = sum(p.stat().st_size for p in on_disk.iterdir() if "-test" not in p.name)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10_000, 9_900, 100))
    with pytest.raises(StorageError, match=rf"{tmp_path}/cache.*{needed:,} bytes needed, 100 free.*older copies"):
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
    (out, said), (other_out, other_said) = (p.communicate(timeout=60) for p in started)
    assert [p.returncode for p in started] == [0, 0], said + other_said
    assert out == other_out and Path(out.strip()).is_dir()
    assert (said + other_said).count("MB/s") == 1
    assert (said + other_said).count("waiting for another process") == 1
