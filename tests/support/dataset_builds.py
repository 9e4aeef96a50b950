"""What tests that build datasets share: making raw folders, running the command, reading what it wrote."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make(raw, *places):
    for place in places:
        (raw / place).parent.mkdir(parents=True, exist_ok=True)
        (raw / place).touch()


def run(*args, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "tfds_grid.prepare", *map(str, args)], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == code, done.stderr
    return done


def run_code(code, *args):
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def splits_of(folder):
    """The splits of a built dataset."""
    return [s["name"] for s in json.loads((folder / "dataset_info.json").read_text())["splits"]]
