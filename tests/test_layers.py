"""The house keeps its order: who imports whom, who owns which library, and what may not be written at all.

`offences` reads one file's AST; the tests run it over the tree, and over made-up offenders to see that it catches them.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The rooms, in the order the sound travels: each imports only from rooms before it. A new room is given its place here.
ROOMS = {
    "avsi_jax": (
        "spec workers media plots channels mpeg muxing streams quiet face_files landmarks sync visibility occlusion text stft gaps "
        "repeats holes features augment records input_pipeline train_statistics "
        "lstm models losses decode cluster parallel build experiment steps storage local_copy phases stopping watchdog manifest checkpoints "
        "workdir board console looks loop replay train cores vocoder runs model_card weights restore recognise intervals metrics "
        "suites protocols restorations references tables mistakes table_files figures comparison report evaluate "
        "compilation windows damaged lips confidence filling mending inpaint "
        "drawings repair_outcomes repair_jobs repair_page repair visit showing seclusion page app export"
    ).split(),
    "tfds_grid": (
        "grid_ids raw_files speakers clips measuring grid_dataset_builder prepare beam_pipeline beam_build "
        "espeak visemes talking_head synthetic"
    ).split(),
}
TFDS_GRID_MAY_USE = {"spec", "workers", "media", "mpeg", "landmarks", "text", "train_statistics"}

# Library -> the only files that may import it. None: no file at all.
OWNERS = {
    "av": ("avsi_jax/media.py", "avsi_jax/mpeg.py", "avsi_jax/muxing.py", "avsi_jax/streams.py"),
    "soundfile": ("avsi_jax/media.py", "avsi_jax/muxing.py", "avsi_jax/streams.py"),
    "ai_edge_litert": ("avsi_jax/landmarks.py",),
    "orbax": ("avsi_jax/checkpoints.py",),
    "grain": ("avsi_jax/input_pipeline.py",),
    "gradio": ("avsi_jax/page.py",),
    "tensorflow": ("tfds_grid/",),
    "tensorflow_datasets": ("tfds_grid/",),
    "apache_beam": ("tfds_grid/beam_pipeline.py", "tfds_grid/beam_build.py"),
    "mediapipe": (),
    "torch": (),
    "pickle": (),
    "cloudpickle": (),
    "dill": (),
}

# Only parallel.py maps over devices or names an axis; the others call it (parallel.sum_over_devices and the like).
AXIS_NAMES = {"pmap", "psum", "pmean", "pmax", "pmin", "all_gather", "axis_index", "shard_map", "axis_name"}
AXIS_OWNER = "avsi_jax/parallel.py"

MAX_LINES = 400
NO_CONCEPT = {"utils", "helpers", "common", "misc"}
SHADOWS = {"signal", "types", "copy"}
MACHINE_PATH = re.compile(r"(?<![\w.})*$])/(?:home|root|work|Users)/\w")
MAY_NAME_MACHINES = ("launch/",)


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is executed on import of the file) of everything the file imports, in functions too.

    `from a import b` gives both `a` and `a.b`; relative imports are made absolute; importlib.import_module("a") counts.
    """
    in_functions = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    for_types = {
        id(n) for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test) for n in ast.walk(i)
    }
    for node in ast.walk(tree):
        eager = id(node) not in in_functions | for_types
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, eager
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [package if node.level else "", node.module]))
            yield module, eager
            for alias in node.names:
                yield f"{module}.{alias.name}", eager
        elif isinstance(node, ast.Call) and re.search(r"(import_module|__import__)$", ast.unparse(node.func)):
            yield from ((str(arg.value), eager) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def room_offences(path: str, names: list[tuple[str, bool]]) -> Iterator[str]:
    """Imports between our own packages that go against the order."""
    package, room = path.split("/")[0], Path(path).stem
    if package == "configs":
        allowed = {"ml_collections", "configs", "__future__"} | (sys.stdlib_module_names if room == "__init__" else set())
        for name, _ in names:
            if name.split(".")[0] not in allowed:
                yield f"imports {name}; configs import only ml_collections and configs (their loader, the standard library too)"
        return
    order = ROOMS[package]
    if room != "__init__" and room not in order:
        yield f"is no room of {package}; give it its place in ROOMS of tests/test_layers.py"
        return
    earlier = order if room == "__init__" else order[: order.index(room)]
    for name, eager in names:
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if top == package and room == "__init__" and eager and package == "avsi_jax":
            yield f"imports {name} when it is imported; load rooms in __getattr__ only"
        elif top == package and other in order and other not in earlier and other != room:
            yield f"imports {name}, a room that does not come before it"
        elif top == "tfds_grid" and package == "avsi_jax":
            yield f"imports {name}; avsi_jax reads records by folder and never imports tfds_grid"
        elif top == "avsi_jax" and package == "tfds_grid" and other in set(ROOMS["avsi_jax"]) - TFDS_GRID_MAY_USE:
            yield f"imports {name}; tfds_grid may use only {', '.join(sorted(TFDS_GRID_MAY_USE))} of avsi_jax"
        elif top == "configs" and package == "tfds_grid":
            yield f"imports {name}; tfds_grid knows no experiment"


def owner_offences(path: str, names: list[tuple[str, bool]]) -> Iterator[str]:
    """Libraries that belong to another room, or to none."""
    for top in sorted({name.split(".")[0] for name, _ in names}):
        owners = OWNERS.get(top)
        if owners is not None and not path.startswith(owners or "\n"):
            yield f"imports {top}, which {'only ' + ' and '.join(owners) + ' may' if owners else 'no room may'}"


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Every name a file writes as code: variables, attributes, keyword arguments, parameters, imported names."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value.split(".")[-1]


def word_offences(path: str, tree: ast.AST) -> Iterator[str]:
    """Names only parallel.py writes, and loading that runs what a file says."""
    if path != AXIS_OWNER:
        for name in sorted(AXIS_NAMES & set(identifiers(tree))):
            yield f"writes {name}; only {AXIS_OWNER} maps over devices and names axes"
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", None) is not False:
            yield "writes allow_pickle=True; nothing is loaded that can run code"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            yield "calls torch.load; nothing is loaded that can run code"


def offences(path: str, source: str) -> list[str]:
    """What is wrong with one Python file of avsi_jax, tfds_grid or configs; `path` is relative to the checkout."""
    tree = ast.parse(source, path)
    names = list(imports(tree, path.split("/")[0]))
    found = [*room_offences(path, names), *owner_offences(path, names), *word_offences(path, tree)]
    if Path(path).stem in NO_CONCEPT | SHADOWS:
        found.append("has a name that says no concept or shadows the standard library")
    if (lines := source.count("\n")) > MAX_LINES:
        found.append(f"has {lines} lines, at most {MAX_LINES}: it holds two concepts")
    return [f"{path} {what}" for what in dict.fromkeys(found)]


def sources() -> list[Path]:
    return [p for package in ("avsi_jax", "tfds_grid", "configs") for p in sorted((ROOT / package).rglob("*.py"))]


def tracked_files() -> list[Path]:
    """The files git tracks or would track; in a copy without git, all but hidden and built ones."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        return [p for p in (ROOT / name for name in listed.split("\0") if name) if p.is_file()]
    skipped = re.compile(r"^(\.venv|\.git$|\.\w+_cache|build$|dist$|demo_out$|runs$|site$|__pycache__)|\.egg-info$")
    return [p for p in ROOT.rglob("*") if p.is_file() and not any(map(skipped.search, p.relative_to(ROOT).parts))]


def machine_paths(path: str, text: str) -> list[str]:
    """Lines that name a folder of some machine."""
    if path.startswith(MAY_NAME_MACHINES):
        return []
    return [f"{path}:{i}: {line.strip()[:100]}" for i, line in enumerate(text.splitlines(), 1) if MACHINE_PATH.search(line)]


@pytest.mark.parametrize("path", [p.relative_to(ROOT).as_posix() for p in sources()])
def test_file_keeps_the_order(path):
    assert offences(path, (ROOT / path).read_text()) == []


def test_rooms_are_flat():
    """A room is one file: no package inside a package."""
    assert [str(p) for p in sources() if len(p.relative_to(ROOT).parts) != 2] == []


def test_rooms_do_not_shadow_the_standard_library():
    """`import avsi_jax.x` never does, but running a file of avsi_jax as a script would."""
    rooms = {room for order in ROOMS.values() for room in order}
    assert rooms & sys.stdlib_module_names == set()


def test_no_machine_paths():
    found = []
    for file in tracked_files():
        try:
            text = file.read_text()
        except UnicodeDecodeError:
            continue
        found += machine_paths(file.relative_to(ROOT).as_posix(), text)
    assert found == []


@pytest.mark.parametrize(
    ("path", "source", "says"),
    [
        ("avsi_jax/media.py", "from avsi_jax import stft", "does not come before"),
        ("avsi_jax/media.py", "from avsi_jax.stft import log_mel", "does not come before"),
        ("avsi_jax/media.py", "def f():\n    import avsi_jax.models as m", "does not come before"),
        ("avsi_jax/media.py", "def f():\n    from . import train", "does not come before"),
        ("avsi_jax/media.py", "from .train import main", "does not come before"),
        ("avsi_jax/media.py", "import importlib\nimportlib.import_module('avsi_jax.train')", "does not come before"),
        ("avsi_jax/train.py", "from tfds_grid import speakers", "never imports tfds_grid"),
        ("avsi_jax/wizard.py", "", "is no room"),
        ("avsi_jax/__init__.py", "from avsi_jax import spec", "when it is imported"),
        ("tfds_grid/prepare.py", "from avsi_jax import gaps", "may use only"),
        ("tfds_grid/prepare.py", "from avsi_jax.models import build", "may use only"),
        ("tfds_grid/speakers.py", "import tfds_grid.prepare", "does not come before"),
        ("tfds_grid/prepare.py", "from configs import base", "knows no experiment"),
        ("avsi_jax/inpaint.py", "import av", "only avsi_jax/media.py"),
        ("avsi_jax/inpaint.py", "def f():\n    import soundfile as sf", "only avsi_jax/media.py"),
        ("avsi_jax/media.py", "from ai_edge_litert.interpreter import Interpreter", "only avsi_jax/landmarks.py"),
        ("avsi_jax/train.py", "import orbax.checkpoint as ocp", "only avsi_jax/checkpoints.py"),
        ("avsi_jax/train.py", "import grain.python as pygrain", "only avsi_jax/input_pipeline.py"),
        ("avsi_jax/input_pipeline.py", "import tensorflow as tf", "only tfds_grid/"),
        ("avsi_jax/train.py", "import tensorflow_datasets as tfds", "only tfds_grid/"),
        ("avsi_jax/inpaint.py", "import gradio as gr", "only avsi_jax/page.py"),
        ("tfds_grid/clips.py", "import apache_beam as beam", "only tfds_grid/beam_pipeline.py"),
        ("avsi_jax/landmarks.py", "import mediapipe", "no room may"),
        ("avsi_jax/train.py", "import jax\nstep = jax.pmap(print)", "writes pmap"),
        ("avsi_jax/train.py", "from jax.lax import psum as total", "writes psum"),
        ("avsi_jax/losses.py", "import jax\nf = lambda x: jax.lax.pmean(x, 'batch')", "writes pmean"),
        ("avsi_jax/models.py", "import flax.linen as nn\nn = nn.BatchNorm(axis_name='batch')", "writes axis_name"),
        ("avsi_jax/checkpoints.py", "import pickle", "imports pickle"),
        ("avsi_jax/checkpoints.py", "import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle"),
        ("tfds_grid/prepare.py", "def f(torch):\n    torch.load('x')", "torch.load"),
        ("avsi_jax/utils.py", "", "no concept"),
        ("avsi_jax/train.py", "x = 1\n" * 401, "at most 400"),
        ("configs/tiny.py", "import numpy as np", "only ml_collections"),
        ("configs/tiny.py", "from avsi_jax import spec", "only ml_collections"),
        ("configs/tiny.py", "import os", "only ml_collections"),
        ("configs/__init__.py", "import numpy as np", "only ml_collections"),
    ],
)
def test_an_offender_is_caught(path, source, says):
    assert any(says in what for what in offences(path, source)), offences(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("avsi_jax/__init__.py", "def __getattr__(name):\n    from avsi_jax.inpaint import Inpainter\n    return Inpainter"),
        ("avsi_jax/train.py", "from avsi_jax import parallel\ntotal = parallel.sum_over_devices"),
        ("avsi_jax/parallel.py", "import jax\nf = jax.pmap(print, axis_name='batch')\njax.lax.psum(1, 'batch')"),
        ("avsi_jax/losses.py", "'''Sums, to be added by psum over the devices.'''\nimport optax"),
        ("avsi_jax/input_pipeline.py", "import numpy as np\nnp.load('x', allow_pickle=False)"),
        ("tfds_grid/prepare.py", "import tensorflow as tf\nfrom avsi_jax import media, text\nfrom tfds_grid import speakers"),
        ("configs/tiny.py", "from ml_collections import config_dict\nfrom configs import base"),
        ("configs/__init__.py", "import importlib.util\nimport ml_collections"),
    ],
)
def test_the_innocent_pass(path, source):
    assert offences(path, source) == []


def test_a_machine_path_is_caught():
    folder = "/ho" + "me/someone/clips"  # in two pieces, or this very line would be an offence
    assert machine_paths("docs/x.md", f"--raw={folder}") and machine_paths("avsi_jax/x.py", f'p = "{folder}"')
    assert machine_paths("docs/x.md", "see https://x.org/ho" + "me/page and ../wo" + "rk/x") == []
    assert machine_paths("launch/pod.sh", folder) == []
