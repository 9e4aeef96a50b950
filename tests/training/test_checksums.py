"""Manifests: any changed byte in a folder is detected and its file named; a copy of the folder is valid too."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from avsi_jax.training import checksums

LATE = ("late.txt", "sub/late.json")


@pytest.fixture
def folder(tmp_path):
    """Files of several sizes, two of which are written after the manifest."""
    from etils import epath

    rng = np.random.default_rng(0)
    path = epath.Path(tmp_path) / "folder"
    for name, size in {"a": 0, "b/c": 1, "b/d/e": 300, "f": 70_000}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(rng.bytes(size))
    (path / "late.txt").write_text("not yet")
    checksums.write(path, excluded=LATE)
    (path / "sub").mkdir()
    for name in LATE:
        (path / name).write_text(f"written later: {name}")
    return path


def flip(path, at, by):
    content = bytearray(path.read_bytes())
    content[at] ^= by
    path.write_bytes(bytes(content))


def test_an_unchanged_folder_and_its_copy_have_no_fault(folder, tmp_path):
    assert checksums.find_fault(folder) is None and not checksums.is_sealed(folder)
    checksums.seal(folder, LATE)
    assert checksums.find_fault(folder) is None and checksums.is_sealed(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert checksums.find_fault(tmp_path / "copy") is None
    (folder / "other").write_text("not in the manifest")
    assert checksums.find_fault(folder) is None


def test_any_changed_byte_of_any_file_is_detected(folder):
    """Every byte of small files, including white space in manifest and seal, and some bytes of the others."""
    checksums.seal(folder, LATE)
    rng = np.random.default_rng(1)
    flips = 0
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.stat().st_size):
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        for at in range(size) if size < 700 else [0, size - 1, *rng.integers(0, size, 40)]:
            by = int(rng.integers(1, 256))
            flip(path, at, by)
            fault = checksums.find_fault(folder)
            assert fault is not None and (name in fault or name in (checksums.MANIFEST, checksums.SEAL)), (path, at, by)
            flip(path, at, by)
            flips += 1
    assert flips > 800 and checksums.find_fault(folder) is None


@pytest.mark.parametrize("name", ["a", "b/d/e", "late.txt"])
def test_missing_and_changed_files_are_named(folder, name):
    checksums.seal(folder, LATE)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b"x")
    assert checksums.find_fault(folder) == f"{name} is not what was written"
    (folder / name).unlink()
    assert checksums.find_fault(folder) == f"{name} is missing"


def test_a_malformed_manifest_is_a_fault(folder):
    for text in ("", "[]", "{", '{"a": 1}'):
        (folder / checksums.MANIFEST).write_text(text)
        assert checksums.find_fault(folder).startswith("manifest.json ")


def test_a_folder_without_a_manifest_has_no_fault(tmp_path):
    assert checksums.find_fault(tmp_path) is None
    checksums.seal(tmp_path, LATE)
    assert list(tmp_path.iterdir()) == []
