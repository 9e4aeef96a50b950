"""Rows of clips.csv that no system has a part in, kept: damaged sound, interpolation, ceiling of a split, protocol and preset.

Scoring them takes as long as scoring a system. They are kept by a hash of everything they come from, the code of the rooms that
make them and the versions of the libraries that score included, so that nothing stale is ever taken.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

from avsi_jax.runtime import storage

KINDS = ("masked", "interpolation", "oracle_mel")
MODULES = """presets media/clip_io data/grid_text audio/stft audio/gap_masks data/features models/ctc_decoding
audio/griffin_lim inference/restorer inference/recognizer evaluation/metrics evaluation/conditions evaluation/protocols evaluation/run_systems""".split()


def default_folder() -> Path:
    """Where the rows lie unless told: $XDG_CACHE_HOME/avsi_jax/references, in ~/.cache where that isn't set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avsi_jax" / "references"


def path_of(folder: str | Path, **comes_from) -> Path:
    """The file of the rows that come from all this (what json can say) and from today's code."""
    here = Path(__file__).parent.parent
    code = hashlib.sha256(b"".join((here / f"{module}.py").read_bytes() for module in MODULES)).hexdigest()
    text = json.dumps(comes_from | {"code": code}, sort_keys=True, default=str)
    return Path(folder or default_folder()) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.csv"


def read(path: Path) -> list[dict[str, str]] | None:
    """The rows, cells as text; None where there are none yet."""
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[dict], columns: Sequence[str]) -> None:
    """Whole or not at all. A folder that can't be written costs the next run its time, not this one its numbers."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_text(path, as_csv(rows, columns))
    except OSError:
        pass


def as_csv(rows: Sequence[dict], columns: Sequence[str]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
