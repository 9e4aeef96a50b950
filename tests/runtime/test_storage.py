"""Files on a disk and in a bucket are written completely or not at all.

The bucket is gcp-storage-emulator's, on this machine; without it, or without gcsfs, the tests with a bucket are skipped.
"""

import errno
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avsi_jax.runtime import storage
from avsi_jax.runtime.storage import StorageError
from tests.support.buckets import bucket, largest_file, place  # noqa: F401 (bucket and place are fixtures)

# ruff: noqa: F811

ROOT = Path(__file__).resolve().parents[2]


def test_paths_are_absolute_on_a_disk_and_unchanged_in_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert os.fspath(storage.as_path("a/../run")) == str(tmp_path / "run")
    assert os.fspath(storage.as_path("~/run")) == os.path.expanduser("~/run")
    assert os.fspath(storage.as_path("gs://bucket/run")) == "gs://bucket/run"
    with pytest.raises(ValueError, match="s3://"):
        storage.as_path("s3://bucket/run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StorageError, match="pip install"):
        storage.as_path("gs://bucket/run")


def test_a_file_is_written_and_overwritten(place):
    path = place / "run" / "status.json"
    assert storage.list_names(path.parent) == []
    for text in ("ä, first", "second"):
        storage.write_text(path, text)
        assert path.read_text() == text
    assert storage.list_names(path.parent) == ["status.json"]


def test_lines_are_appended(place):
    storage.write_text(place / "other", "")  # creates the folder
    for line in ("step,loss", "1,0.5", "2,0.25"):
        storage.append_line(place / "metrics.csv", line)
    assert (place / "metrics.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n"


def test_a_failed_write_leaves_the_old_file_unchanged(tmp_path):
    path = tmp_path / "config.json"
    storage.write_text(path, "old")
    with largest_file(100), pytest.raises(StorageError, match=rf"{path}: 5,000 bytes .*File too large"):
        storage.write_text(path, "x" * 5000)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]


def test_a_failed_append_is_undone(tmp_path):
    path = tmp_path / "metrics.csv"
    storage.append_line(path, "1" * 89)
    with largest_file(100), pytest.raises(StorageError, match=f"{path}: 51 bytes .*File too large"):
        storage.append_line(path, "2" * 50)
    assert path.read_text() == "1" * 89 + "\n"
    storage.append_line(path, "3")
    assert path.read_text().endswith("1\n3\n")


def test_the_error_for_a_full_disk_names_the_file_and_both_sizes(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10_000, 9_999, 1))
    with pytest.raises(StorageError, match=rf"{tmp_path}/status.json: the disk is full: 1,234 bytes needed, 1 free"):
        storage.write_text(tmp_path / "status.json", "x" * 1234)


def test_a_killed_writer_leaves_a_complete_file(tmp_path):
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


def test_files_that_others_write_to_a_bucket_later_are_visible(bucket):
    import gcsfs

    home = storage.as_path(bucket) / "shared"
    storage.write_text(home / "0.json", "first")
    assert [p.name for p in home.iterdir()] == ["0.json"]
    other = gcsfs.GCSFileSystem(skip_instance_cache=True)
    other.pipe(os.fspath(home / "1.json"), b"second")
    other.pipe(os.fspath(home / "0.json"), b"longer than it was")
    assert sorted(p.name for p in home.iterdir()) == ["0.json", "1.json"]
    assert (home / "1.json").exists() and (home / "0.json").read_text() == "longer than it was"


def test_a_bucket_is_used_without_importing_tensorflow(bucket):
    code = (
        "import sys; from avsi_jax.runtime import storage\n"
        "path = storage.as_path(sys.argv[1]) / 'alone.txt'\n"
        "storage.append_line(path, 'x'); assert path.read_text() == 'x\\n'\n"
        "assert not {'tensorflow', 'torch', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, bucket], check=True, cwd=ROOT, timeout=60)


def test_a_folder_is_replaced_when_the_new_one_is_complete(tmp_path):
    """Files that the new one lacks are kept; after a failure the old one is as it was, and no trace of the new one is left."""
    folder = tmp_path / "deep" / "eval"
    for text in ("first", "second"):
        with storage.replaced_folder(folder) as new:
            assert new.is_dir() and not list(new.iterdir())
            (new / "audio").mkdir()
            (new / "audio" / f"{text}.flac").write_text(text)
            (new / "summary.json").write_text(text)
        (folder / "notes.txt").write_text("of the user")
    assert sorted(p.name for p in folder.rglob("*")) == ["audio", "notes.txt", "second.flac", "summary.json"]
    with pytest.raises(KeyboardInterrupt), storage.replaced_folder(folder) as new:
        (new / "summary.json").write_text("third")
        raise KeyboardInterrupt
    assert (folder / "summary.json").read_text() == "second" and [p.name for p in folder.parent.iterdir()] == ["eval"]


def test_a_folder_whose_replacement_was_killed_between_its_two_steps_is_put_back(tmp_path):
    folder = tmp_path / "eval"
    (tmp_path / ".eval.old").mkdir()
    (tmp_path / ".eval.old" / "summary.json").write_text("old")
    (tmp_path / ".eval.new").mkdir()
    with pytest.raises(ValueError), storage.replaced_folder(folder):
        raise ValueError
    assert (folder / "summary.json").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["eval"]


def test_files_of_a_user_survive_a_replacement_that_was_killed_at_its_end(tmp_path):
    """After the new folder was put in its place, and before the other files of the old one were moved there."""
    folder, old = tmp_path / "eval", tmp_path / ".eval.old"
    for path, text in ((folder / "summary.json", "new"), (old / "summary.json", "old"), (old / "notes.txt", "of the user")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    with pytest.raises(ValueError), storage.replaced_folder(folder):
        raise ValueError
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"summary.json": "new", "notes.txt": "of the user"}
    assert [p.name for p in tmp_path.iterdir()] == ["eval"]
