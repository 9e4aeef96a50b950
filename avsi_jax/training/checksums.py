"""The sha256 of every file of a folder, kept beside them: what was copied badly, cut or changed is found and named.

Written before the folder gets its final name; files that the one who renames it writes while doing so follow in a seal.
"""

from __future__ import annotations

import hashlib
import json

from etils import epath

MANIFEST = "manifest.json"
SEAL = "seal.json"


def write(folder, besides: tuple[str, ...] = ()) -> None:
    """manifest.json of all files under a folder but those; their names are paths in it."""
    names = sorted(_relative(path, folder) for path in _files(folder))
    _write(folder / MANIFEST, {name: _hash(folder / name) for name in names if name not in (*besides, MANIFEST, SEAL)})


def seal(folder, names: tuple[str, ...]) -> None:
    """seal.json of those files, where there are any; without effect on a folder that has no manifest."""
    if (folder / MANIFEST).exists():
        _write(folder / SEAL, {name: _hash(folder / name) for name in names if (folder / name).exists()})


def find_fault(folder) -> str | None:
    """What is wrong with the files of a folder, in a few words; None where all are as they were written, or it has no manifest."""
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


def is_sealed(folder) -> bool:
    return (epath.Path(folder) / SEAL).exists()


def _write(path, hashes: dict[str, str]) -> None:
    path.write_text(_text(hashes))


def _read(path) -> dict[str, str]:
    """ValueError where it isn't to the letter what `_write` writes: no byte of it may change unseen."""
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


def _files(folder):
    """Every file under a folder."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _relative(path, folder) -> str:
    return str(path)[len(str(folder)) :].lstrip("/")


def _hash(path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
