"""Manifests: the sha256 of every file of a folder, stored beside the files, to detect truncated, changed and badly copied files.

The manifest is written before the folder gets its final name. Files written while the folder is renamed are listed in a seal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from etils import epath

MANIFEST = "manifest.json"
SEAL = "seal.json"


def write(folder: epath.Path, excluded: tuple[str, ...] = ()) -> None:
    """Writes manifest.json: {path in the folder: sha256} of all files except the excluded paths."""
    names = sorted(_relative(path, folder) for path in _files(folder))
    _write(folder / MANIFEST, {name: _hash(folder / name) for name in names if name not in (*excluded, MANIFEST, SEAL)})


def seal(folder: epath.Path, names: tuple[str, ...]) -> None:
    """Writes seal.json: the same for those of the named files that exist. Does nothing in a folder without a manifest."""
    if (folder / MANIFEST).exists():
        _write(folder / SEAL, {name: _hash(folder / name) for name in names if (folder / name).exists()})


def find_fault(folder: epath.PathLike) -> str | None:
    """What is wrong with the files of a folder, in a few words; None if all are as written, or if there is no manifest."""
    folder = epath.Path(folder)
    if not (folder / MANIFEST).exists():
        return None
    try:
        expected = _read(folder / MANIFEST) | (_read(folder / SEAL) if (folder / SEAL).exists() else {})
    except (OSError, ValueError) as error:
        return str(error)
    for name, hashed in sorted(expected.items()):
        try:
            if _hash(folder / name) != hashed:
                return f"{name} is not what was written"
        except OSError:
            return f"{name} is missing"
    return None


def is_sealed(folder: epath.PathLike) -> bool:
    """Whether the folder has a seal."""
    return (epath.Path(folder) / SEAL).exists()


def _write(path: epath.Path, hashes: dict[str, str]) -> None:
    path.write_text(_text(hashes))


def _read(path: epath.Path) -> dict[str, str]:
    """The hashes; ValueError if the file differs in any byte from what `_write` writes, so that no change goes unnoticed."""
    text = path.read_bytes().decode(errors="replace")
    try:
        hashes = json.loads(text)
        if isinstance(hashes, dict) and _text(hashes) == text:
            return hashes
    except ValueError:
        pass
    raise ValueError(f"{path.name} is not what was written")


def _text(hashes: dict[str, str]) -> str:
    return json.dumps(hashes, indent=1, sort_keys=True) + "\n"


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """Every file in a folder and its subfolders."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _relative(path: epath.Path, folder: epath.Path) -> str:
    return str(path)[len(str(folder)) :].lstrip("/")


def _hash(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
