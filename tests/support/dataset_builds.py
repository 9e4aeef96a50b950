"""Helpers for tests that build datasets: make raw folders, run avsi-prepare, read what it wrote."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make(raw: Path, *places: str) -> None:
    """Creates empty files below `raw`."""
    for place in places:
        (raw / place).parent.mkdir(parents=True, exist_ok=True)
        (raw / place).touch()


def run(*args: object, code: int = 0) -> subprocess.CompletedProcess:
    """Runs avsi-prepare and checks its exit status."""
    done = subprocess.run(
        [sys.executable, "-m", "tfds_grid.prepare", *map(str, args)], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == code, done.stderr
    return done


def run_code(code: str, *args: object) -> None:
    """Runs Python code in a process of its own, which must succeed."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def splits_of(folder: Path) -> list[str]:
    """The splits of a built dataset."""
    return [s["name"] for s in json.loads((folder / "dataset_info.json").read_text())["splits"]]
