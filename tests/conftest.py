"""Environment of all tests (four CPU devices, no implicit rank promotion, quiet libraries), and fixtures for clips and trainings.

The settings are environment variables, set before anything imports jax, so that they also apply to commands run by a test. A value
that is already set is kept (JAX_PLATFORMS=cuda runs the tests on a GPU).
"""

import atexit
import fcntl
import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a step that several tests use is compiled once per session
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="avsi_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

for _name, _value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "4",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py, which configures it; remove the pytest plugin that imports it")

gc.set_threshold(100_000, 20, 50)  # tracing creates millions of objects: by default a sixth of the time goes into scanning them

ROOT = Path(__file__).resolve().parents[1]

# The slowest files, slowest first: started last, one of them would leave a core idle. The second one trains nothing, so it does not
# have to wait for the training that the first one runs for the session.
SLOWEST = """
evaluation/test_evaluate_command.py tfds_grid/test_dataset_builder.py training/test_pod.py tfds_grid/test_prepare.py
training/test_resume.py training/test_train_command.py runtime/test_devices.py inference/test_restorer.py audio/test_griffin_lim.py
training/test_replay_step.py data/test_normalisation.py training/test_train_step.py evaluation/test_metrics.py
runtime/test_distributed.py inpainting/test_api.py training/test_objective.py models/test_systems.py models/test_lstm.py
training/test_faults.py inpainting/test_clip_inpainter.py data/test_features.py tfds_grid/test_clips.py audio/test_gap_masks.py
runtime/test_watchdog.py evaluation/test_protocols.py security/test_hostile_inputs.py
""".split()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Makes xdist distribute the files in order; it would sort them by their number of tests, and slow files have few."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Moves the slowest files to the front."""
    position = {ROOT / "tests" / name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: position.get(item.path, len(position)))


@pytest.fixture(autouse=True, scope="module")
def clear_compilation_caches():
    """Frees compiled programs after each file: a worker that kept all of them needed 5 GB."""
    yield
    if "jax" in sys.modules:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quickly_compiled():
    """Compiles without most optimisations: for files whose programs run only a few times, where compilation takes half the time.

    Does nothing if the environment sets JAX_DISABLE_MOST_OPTIMIZATIONS.
    """
    import jax

    in_environment = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS")
    if in_environment is None:
        jax.config.update("jax_disable_most_optimizations", True)
    yield
    if in_environment is None:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def grid_dir() -> Path:
    """A folder of real Grid clips (sN/*.mpg, alignments/sN/*.align): $AVSI_GRID, else shared/grid beside the checkout."""
    path = os.environ.get("AVSI_GRID")
    if path and not Path(path).is_dir():
        pytest.fail(f"AVSI_GRID: found no folder {path}, expected one with Grid clips; unset it to skip these tests")
    folder = Path(path) if path else ROOT.parent / "shared" / "grid"
    if not folder.is_dir():
        pytest.skip("needs real Grid clips: set AVSI_GRID")
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make) -> a folder that make(folder) fills once per session, in whichever of its processes needs it first."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make) -> Path:
        folder, complete = base / name, base / f"{name}.complete"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                complete.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def synthetic_dir(once) -> Path:
    """A raw folder of the synthetic corpus: s1 and s2 with three clips each, as .mpg, .wav and .align. Read-only."""
    if not all(map(importlib.util.find_spec, ("espeakng_loader", "skimage"))):
        pytest.skip("the synthetic corpus needs the extra: pip install '.[synth]'")

    def make(folder: Path) -> None:
        options = ["--out", str(folder / "raw"), "--speakers=2", "--clips=3", "--seed=0"]
        command = [sys.executable, "-m", "tfds_grid.synthetic", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert done.returncode == 0, done.stderr

    return once("synthetic", make) / "raw"


@pytest.fixture(scope="session")
def tiny_dir(once) -> Path:
    """config.data_dir of the synthetic dataset of tests/support/tiny_data.py: 9 clips to train on, 3 to validate, 3 to test."""
    from tests.support import tiny_data

    return once("tiny_data", tiny_data.build) / "data"


@pytest.fixture(scope="session")
def shared_steps():
    """Makes trainings in this process share compiled steps (tests/support/shared_compilation.py)."""
    from tests.support import shared_compilation

    with pytest.MonkeyPatch.context() as patch:
        shared_compilation.share(patch)
        yield


@pytest.fixture(scope="session")
def tiny_config(tiny_dir, shared_steps):
    """tiny_config(**fields) -> config `tiny` with 8 units on the tiny dataset; fields override, loss__gap=1 sets loss.gap."""
    from avsi_jax import configs

    def make(**fields):
        fields = {"data_dir": tiny_dir, "units": 8, "bottleneck": 8} | fields
        return configs.load("tiny", [(field.replace("__", "."), str(value)) for field, value in fields.items()])

    return make


@pytest.fixture(scope="session")
def trained(tiny_config, once) -> Path:
    """The workdir of two uninterrupted epochs of `tiny`. Read-only."""
    from avsi_jax.training import cli

    return once("trained", lambda folder: cli.train(tiny_config(), folder / "run")) / "run"


@pytest.fixture(scope="session")
def untrained_a_si(tiny_config, tmp_path_factory) -> Path:
    """The workdir of a tiny a_si before its first training step. Read-only."""
    from avsi_jax.training import checkpoints, run_directory, train_step

    folder = tmp_path_factory.mktemp("untrained") / "run"
    config = tiny_config(system="a_si")
    run_directory.check_config(config, folder)
    saved = checkpoints.Checkpoints(folder)
    saved.save(0, train_step.init_state(config, 1), {}, 0.0)
    saved.close()
    return folder
