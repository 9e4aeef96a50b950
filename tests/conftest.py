"""What every test runs under: four CPU devices, no silent rank promotion, quiet libraries; and where clips and trainings come from.

The settings are environment variables, set before anything imports jax, so that commands run by a test keep to them too.
A value that is already set wins (JAX_PLATFORMS=cuda runs the tests on a GPU).
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

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a step that several tests train with is compiled once a session
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
    raise RuntimeError("jax was imported before tests/conftest.py, which sets it up; drop the pytest plugin that imports it")

gc.set_threshold(100_000, 20, 50)  # tracing makes objects by the million that live: looking at them all takes a sixth of the time

ROOT = Path(__file__).resolve().parents[1]

# Files that take longest, longest first: begun last, one would leave a core idle. The second one trains nothing, so that it need
# not wait for the training that the first one makes for all.
LONG = """evaluate dataset pod prepare resume train parallel restore vocoder replay standardised steps metrics cluster inpaint
experiment models lstm faults mending features clips gaps watchdog protocols hostile""".split()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """xdist hands out the files as they come; its own order goes by the number of tests, and the long ones have few."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    place = {f"test_{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True, scope="module")
def forgetful():
    """What a file's tests compiled is let go of after them: a worker that kept all of it came to 5 GB."""
    yield
    if "jax" in sys.modules:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quickly_compiled():
    """For a file whose programs run a few times each: to make them fast takes half of its time. The environment's word stands."""
    import jax

    named = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS")
    if named is None:
        jax.config.update("jax_disable_most_optimizations", True)
    yield
    if named is None:
        jax.config.update("jax_disable_most_optimizations", False)


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


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make) -> a folder that make(folder) fills once a session, by whichever of its processes comes first."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make) -> Path:
        folder, whole = base / name, base / f"{name}.whole"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                whole.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def synthetic_dir(once) -> Path:
    """A raw folder of the synthetic corpus: s1 and s2 with three clips each, as .mpg, .wav and .align. Not to be changed."""
    if not all(map(importlib.util.find_spec, ("espeakng_loader", "skimage"))):
        pytest.skip("the synthetic corpus needs the extra: pip install '.[synth]'")

    def make(folder: Path) -> None:
        wanted = ["--out", str(folder / "raw"), "--speakers=2", "--clips=3", "--seed=0"]
        command = [sys.executable, "-m", "tfds_grid.synthetic", *wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert done.returncode == 0, done.stderr

    return once("synthetic", make) / "raw"


@pytest.fixture(scope="session")
def tiny_dir(once) -> Path:
    """config.data_dir of the made-up dataset of tests/support/tiny_data.py: 9 clips to train on, 3 to validate, 3 to test."""
    from tests.support import tiny_data

    return once("tiny_data", tiny_data.build) / "data"


@pytest.fixture(scope="session")
def shared_steps():
    """Trainings in this process share what they trace (tests/support/shared_compilation.py)."""
    from tests.support import shared_compilation

    with pytest.MonkeyPatch.context() as patch:
        shared_compilation.share(patch)
        yield


@pytest.fixture(scope="session")
def tiny_config(tiny_dir, shared_steps):
    """tiny_config(**fields) -> config `tiny`, smaller still, on the tiny dataset; fields override, loss__gap=1 is loss.gap."""
    from avsi_jax import configs

    def make(**fields):
        wanted = {"data_dir": tiny_dir, "units": 8, "bottleneck": 8} | fields
        return configs.load("tiny", [(field.replace("__", "."), str(value)) for field, value in wanted.items()])

    return make


@pytest.fixture(scope="session")
def trained(tiny_config, once) -> Path:
    """The workdir of two epochs of `tiny`, uninterrupted. Not to be changed by a test."""
    from avsi_jax.training import cli

    return once("trained", lambda folder: cli.train(tiny_config(), folder / "run")) / "run"


@pytest.fixture(scope="session")
def untrained_a_si(tiny_config, tmp_path_factory) -> Path:
    """The workdir of a tiny a_si as it is before its first step. Not to be changed by a test."""
    from avsi_jax.training import checkpoints, run_directory, train_step

    folder = tmp_path_factory.mktemp("untrained") / "run"
    config = tiny_config(system="a_si")
    run_directory.check_config(config, folder)
    saved = checkpoints.Checkpoints(folder)
    saved.save(0, train_step.init_state(config, 1), {}, 0.0)
    saved.close()
    return folder
