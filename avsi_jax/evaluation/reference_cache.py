"""Cache of the rows of clips.csv that depend on no system: masked audio, interpolation and oracle mel.

Scoring them takes as long as scoring a system. The key is a hash of everything that determines them, including the code of the
modules that compute them and the versions of the libraries that score, so that no stale row is ever used.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avsi_jax.runtime import storage

KINDS = ("masked", "interpolation", "oracle_mel")
MODULES = """
    presets media/clip_io data/grid_text audio/stft audio/gap_masks data/features models/ctc_decoding audio/griffin_lim
    inference/restorer inference/recognizer evaluation/metrics evaluation/conditions evaluation/protocols evaluation/run_systems
""".split()  # below avsi_jax/, whose code is part of the key


def default_folder() -> Path:
    """The default folder: $XDG_CACHE_HOME/avsi_jax/references, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avsi_jax" / "references"


def path_of(folder: str | Path, **inputs: Any) -> Path:
    """The file of the rows that are determined by `inputs` (JSON values) and by the current code; '' for the default folder."""
    here = Path(__file__).parent.parent
    code = hashlib.sha256(b"".join((here / f"{module}.py").read_bytes() for module in MODULES)).hexdigest()
    text = json.dumps(inputs | {"code": code}, sort_keys=True, default=str)
    return Path(folder or default_folder()) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.csv"


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
