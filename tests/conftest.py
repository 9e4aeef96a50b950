"""What every test runs under: four CPU devices, no silent rank promotion, quiet libraries; and where real clips lie.

The settings are environment variables, set before anything imports jax, so that commands run by a test keep to them too.
A value that is already set wins (JAX_PLATFORMS=cuda runs the tests on a GPU).
"""

import os
import sys
from pathlib import Path

import pytest

for _name, _value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "4",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py, which sets it up; drop the pytest plugin that imports it")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def grid_dir() -> Path:
    """A folder of real Grid clips (sN/*.mpg, alignments/sN/*.align): $AVSI_GRID, else shared/grid beside the checkout."""
    named = os.environ.get("AVSI_GRID")
    if named and not Path(named).is_dir():
        pytest.fail(f"AVSI_GRID: found no folder {named}, expected one of Grid clips; unset it to skip these tests")
    folder = Path(named) if named else ROOT.parent / "shared" / "grid"
    if not folder.is_dir():
        pytest.skip("needs real Grid clips: set AVSI_GRID")
    return folder
