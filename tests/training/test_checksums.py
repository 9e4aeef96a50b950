"""A folder's manifest: any byte that is changed in it, by whomever, is found, its file named; a copy is as good as the folder."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from avsi_jax.training import checksums

LATE = ("late.txt", "sub/late.json")


@pytest.fixture
def folder(tmp_path):
    """Files of all sizes, two of which are written after the manifest, and sealed."""
    from etils import epath

    rng = np.random.default_rng(0)
    here = epath.Path(tmp_path) / "folder"
    for name, size in {"a": 0, "b/c": 1, "b/d/e": 300, "f": 70_000}.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(rng.bytes(size))
    (here / "late.txt").write_text("not yet")
    checksums.write(here, besides=LATE)
    (here / "sub").mkdir()
    for name in LATE:
        (here / name).write_text(f"written later: {name}")
    return here


def flip(path, at, by):
    content = bytearray(path.read_bytes())
    content[at] ^= by
    path.write_bytes(bytes(content))


def test_a_whole_folder_and_its_copy_have_no_fault(folder, tmp_path):
    assert checksums.find_fault(folder) is None and not checksums.is_sealed(folder)
    checksums.seal(folder, LATE)
    assert checksums.find_fault(folder) is None and checksums.is_sealed(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert checksums.find_fault(tmp_path / "copy") is None
    (folder / "stranger").write_text("not ours")
    assert checksums.find_fault(folder) is None


def test_any_byte_of_any_file_counts(folder):
    """Of small files every byte, of others some; among them the manifest and the seal, blanks and all."""
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
def test_a_missing_or_a_cut_file_is_named(folder, name):
    checksums.seal(folder, LATE)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b"x")
    assert checksums.find_fault(folder) == f"{name} is not what was written"
    (folder / name).unlink()
    assert checksums.find_fault(folder) == f"{name} is missing"


def test_a_manifest_that_is_no_list_of_files(folder):
    for text in ("", "[]", "{", '{"a": 1}'):
        (folder / checksums.MANIFEST).write_text(text)
        assert checksums.find_fault(folder) == "manifest.json is not what was written"


def test_without_a_manifest_nothing_is_said(tmp_path):
    assert checksums.find_fault(tmp_path) is None
    checksums.seal(tmp_path, LATE)
    assert list(tmp_path.iterdir()) == []
