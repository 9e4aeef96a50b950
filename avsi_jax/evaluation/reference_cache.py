"""Cache of the rows of clips.csv that depend on no system: masked audio, interpolation and oracle mel.

Scoring them takes as long as scoring a system. The key is a hash of everything that determines them, including the code that
computes them, with all that it imports, and the versions of the libraries that score, so that no stale row is ever used.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from avsi_jax.runtime import storage

KINDS = ("masked", "interpolation", "oracle_mel")
PACKAGE = Path(__file__).parents[1]
ROOTS = tuple(f"evaluation/{name}.py" for name in ("__init__", "run_systems", "protocols", "metrics"))  # compute the rows
NAMES = "evaluation/cli.py"  # names systems and columns; what it imports besides ROOTS changes no row


def default_folder() -> Path:
    """The default folder: $XDG_CACHE_HOME/avsi_jax/references, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avsi_jax" / "references"


def path_of(folder: str | Path, **inputs: Any) -> Path:
    """The file of the rows that are determined by `inputs` (JSON values) and by the current code; '' for the default folder."""
    text = json.dumps(inputs | {"code": code_hash()}, sort_keys=True, default=str)
    return Path(folder or default_folder()) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.csv"


def code_hash(package: Path = PACKAGE) -> str:
    """Hash of the names and contents of `code_files`."""
    digest = hashlib.sha256()
    for path in code_files(package):
        digest.update(f"{path.relative_to(package.parent)} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def code_files(package: Path = PACKAGE) -> list[Path]:
    """The files below the folder `package` (avsi_jax) from which rows are computed, sorted.

    These are ROOTS and every module that they import, directly or through others, also inside functions; and the data files in the
    packages of these modules, such as mel_bases.npz.
    """
    modules, waiting = {package / NAMES}, [package / name for name in ROOTS]
    while waiting:
        if (path := waiting.pop()) not in modules:
            modules.add(path)
            waiting += _imported_files(path, package)
    data = {path for folder in {m.parent for m in modules} - {package} for path in folder.rglob("*") if _is_data(path)}
    return sorted(modules | data)


def _is_data(path: Path) -> bool:
    return path.is_file() and path.suffix not in (".py", ".pyc")


def _imported_files(path: Path, package: Path) -> Iterator[Path]:
    """The files of the modules of avsi_jax that a file imports; imports that only serve annotations are left out."""
    waiting: list[ast.AST] = [ast.parse(path.read_bytes())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            first, *parts = name.split(".")
            if first != package.name:
                continue
            for count in range(1, len(parts) + 1):  # a module and the packages that hold it
                # configs/ lies beside the package in a checkout, and inside it where it is installed
                for place in (package, package.parent) if parts[0] == "configs" else (package,):
                    module = place.joinpath(*parts[:count])
                    yield from filter(Path.is_file, (module.with_suffix(".py"), module / "__init__.py"))


def read(path: Path) -> list[dict[str, str]] | None:
    """The rows, cells as text; None where the file does not exist."""
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[dict], columns: Sequence[str]) -> None:
    """Writes the rows atomically; a folder that cannot be written is ignored, since the cache only saves time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_text(path, as_csv(rows, columns))
    except OSError:
        pass


def as_csv(rows: Sequence[dict], columns: Sequence[str]) -> str:
    """Rows as CSV text with these columns; other keys are left out."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
