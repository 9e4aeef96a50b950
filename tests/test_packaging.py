"""What a user installs: a complete wheel, declared dependencies, commands that start without heavy imports."""

import ast
import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("avsi_jax", "configs", "tfds_grid")  # of the checkout; configs is installed as avsi_jax.configs
SCRIPTS = PYPROJECT["project"]["scripts"]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")
HEAVY = "jax jaxlib flax optax orbax grain tensorflow tensorflow_datasets librosa numba scipy av cv2 matplotlib gradio".split()

# Runs a console script's function as its wrapper does, then prints the heavy modules it loaded.
CALL = f"""
import importlib, json, sys
module, function, *sys.argv[1:] = sys.argv[1:]
code = 0
try:
    code = getattr(importlib.import_module(module), function)()
except SystemExit as stop:
    code = stop.code
sys.stdout.flush()
print(json.dumps([m for m in {HEAVY} if m in sys.modules]))
sys.exit(code)
"""


def call(script: str, *args: str, cwd: Path) -> subprocess.CompletedProcess:
    module, function = SCRIPTS[script].split(":")
    command = [sys.executable, "-c", CALL, module, function, *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources, so that the checkout stays clean and old build folders do not leak in."""
    work = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work)
    for package in FOLDERS:
        shutil.copytree(ROOT / package, work / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = "-m pip wheel --no-deps --no-build-isolation -q -w out .".split()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=work)
    assert done.returncode == 0, done.stderr
    (built,) = (work / "out").glob("*.whl")
    return built


@pytest.fixture(scope="session")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def installed_path(path: Path) -> str:
    """Where a file of the checkout lies in the wheel."""
    return f"avsi_jax/{path.as_posix()}" if path.parts[0] == "configs" else path.as_posix()


def test_wheel_holds_every_file_of_the_packages(unpacked):
    wanted = {
        installed_path(p.relative_to(ROOT))
        for package in FOLDERS
        for p in (ROOT / package).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    found = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    found = {name for name in found if ".dist-info/" not in name}
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    assert not missing and not extra, f"missing: {missing}, not asked for: {extra}; see package-data in pyproject.toml"


@pytest.mark.parametrize(
    "pattern",
    [
        "avsi_jax/py.typed",
        "avsi_jax/face/networks/*.tflite",
        "avsi_jax/configs/base.py",
        "tfds_grid/README.md",
        "tfds_grid/CITATIONS.bib",
        "tfds_grid/TAGS.txt",
        "avsi_jax-*.dist-info/licenses/LICENSE",
    ],
)
def test_wheel_holds(unpacked, pattern):
    assert list(unpacked.glob(pattern)), f"found no {pattern} in the wheel"


def test_wheel_holds_the_shipped_weights_and_stays_small(wheel, unpacked):
    """At most 30 MB, most of it weights."""
    assert wheel.stat().st_size <= 30e6, f"the wheel has {wheel.stat().st_size / 1e6:.1f} MB"
    shipped = {p.parent.name for p in (ROOT / "avsi_jax" / "pretrained").glob("*/model.safetensors")}
    for name in shipped:
        folder = unpacked / "avsi_jax" / "pretrained" / name
        assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_wheel_metadata_states_version_commands_and_python(unpacked):
    (meta,) = unpacked.glob("avsi_jax-*.dist-info")
    wheel_metadata = importlib.metadata.Distribution.at(meta)
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M).group(1)
    package = re.search(r'^__version__ = "(.+)"$', (ROOT / "avsi_jax" / "__init__.py").read_text(), re.M).group(1)
    assert wheel_metadata.version == package == citation
    assert f"{package}" in (ROOT / "CHANGELOG.md").read_text()
    assert {e.name: e.value for e in wheel_metadata.entry_points if e.group == "console_scripts"} == SCRIPTS
    assert wheel_metadata.metadata["Requires-Python"] == ">=3.11"


@pytest.mark.parametrize("name", CONFIGS)
def test_config_loads_from_another_folder(unpacked, tmp_path, name):
    code = f"import avsi_jax.configs.{name} as c; c.get_config(); print(c.__file__)"
    env = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == unpacked / "avsi_jax" / "configs" / f"{name}.py"


OWN_CONFIGS = """
import configs
assert configs.mine == 1 and "avsi_jax" not in configs.__file__
from avsi_jax import Inpainter
print(Inpainter.from_pretrained().restorer.name)
"""


@pytest.mark.parametrize("installed_as", ["wheel", "editable"])
def test_a_project_may_have_its_own_package_configs(installed_as, unpacked, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("mine = 1\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if installed_as == "wheel":
        env["PYTHONPATH"] = str(unpacked)
    done = subprocess.run([sys.executable, "-c", OWN_CONFIGS], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "av_unified"), done.stderr


def test_package_import_is_light(tmp_path):
    code = f"import sys, avsi_jax; print([m for m in {HEAVY} + ['numpy'] if m in sys.modules], avsi_jax.__version__)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_command_and_loads_no_heavy_module(script, tmp_path):
    done = call(script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *text, heavy = done.stdout.splitlines()
    assert script in "\n".join(text), f"--help of {script} does not name it: {text[:3]}"
    assert json.loads(heavy) == [], "--help loads heavy modules: import them where they are used"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_version_is_printed(script, tmp_path):
    import avsi_jax

    done = call(script, "--version", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[0] == f"avsi_jax {avsi_jax.__version__}"


def test_the_list_of_commands_names_every_script_and_module(tmp_path):
    from tests import test_layers

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "avsi_jax"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    modules = {f"python -m avsi_jax.{name}" for name in test_layers.FORWARDERS - {"train", "evaluate"}}
    assert all(name in done.stdout for name in {*SCRIPTS, *modules}), done.stdout


NEEDS_NO_ARGUMENT = {"avsi-app"}  # it starts with the shipped weights


@pytest.mark.parametrize(
    ("script", "args"), [(s, args) for s in SCRIPTS for args in (["--no_such_flag=1"], []) if args or s not in NEEDS_NO_ARGUMENT]
)
def test_wrong_arguments_take_one_line(script, args, tmp_path):
    done = call(script, *args, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = done.stderr.splitlines()
    message = line.removeprefix(f"{script}: ")
    assert message != line and len(message) > 10, f"{line!r}: expected '{script}: found, expected, fix'"


@functools.cache
def distributions_of_modules():
    """Top-level module -> the distributions that install it."""
    return importlib.metadata.packages_distributions()


def third_party_imports(package: str) -> dict[str, str]:
    """Top-level name of every library the package imports, anywhere in its files -> the file."""
    ours = {*FOLDERS, "tests", "benchmarks", *sys.stdlib_module_names}
    names = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            names.update({m.split(".")[0]: f"{package}/{path.name}" for m in modules})
    return {name: file for name, file in names.items() if name not in ours}


def declared(*extras: str) -> set[str]:
    optional = PYPROJECT["project"]["optional-dependencies"]
    listed = [*PYPROJECT["project"]["dependencies"], *(r for extra in extras for r in optional[extra])]
    return {canonicalize_name(Requirement(r).name) for r in listed}


@pytest.mark.parametrize(
    ("package", "extras"),
    [
        ("avsi_jax", ["app", "eval", "tpu"]),
        ("configs", []),
        ("tfds_grid", ["prepare", "synth", "beam"]),
        ("tests", ["app", "eval", "prepare", "beam", "gcs", "test", "test-gcs"]),
    ],
)
def test_every_import_is_declared(package, extras):
    """A library that only comes along with another one is not ours to import: the other may drop it."""
    homes = distributions_of_modules()
    known = declared(*extras)
    for name, file in third_party_imports(package).items():
        dists = {canonicalize_name(d) for d in homes.get(name, [name])}
        assert dists & known, f"{file} imports {name} (of {', '.join(sorted(dists))}), which pyproject.toml does not list"


def test_pins_keep_to_the_lower_bounds():
    """constraints/tests.txt names one release of every direct dependency we test with, and none below its bound."""
    lines = (ROOT / "constraints" / "tests.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    optional = PYPROJECT["project"]["optional-dependencies"]
    for requirement in map(Requirement, PYPROJECT["project"]["dependencies"] + optional["prepare"]):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"constraints/tests.txt does not pin {name}"
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is outside {requirement}"
