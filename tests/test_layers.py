"""The structure of the code: which package may import which, which module owns which library, and what may not be written at all.

`violations` reads the AST of one file; the tests run it over the tree, and over invented files to see that it finds each kind.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# package of avsi_jax -> the packages it may import; `presets` may be imported by all, the root's modules import what they like
MAY_IMPORT = {
    "configs": set(),
    "runtime": set(),
    "audio": {"runtime"},
    "media": set(),
    "face": {"runtime"},
    "data": {"runtime", "audio"},
    "models": {"data"},
    "training": {"runtime", "audio", "data", "models", "configs"},
    "inference": {"runtime", "media", "audio", "data", "models", "training", "configs"},
    "evaluation": {"runtime", "media", "audio", "face", "data", "models", "training", "inference", "configs"},
    "inpainting": {"runtime", "media", "audio", "face", "inference"},
    "app": {"runtime", "media", "audio", "inpainting"},
    "tfds_grid": {"runtime", "media", "face", "data"},
}
ROOT_MODULES = {"__init__", "__main__", "presets", "train", "evaluate", "report", "weights", "landmarks"}
FORWARDERS = ROOT_MODULES - {"__init__", "__main__", "presets"}
FEWEST_MODULES, MOST_MODULES = 3, 17  # of a package

# Library -> the only files that may import it. Empty: no file at all.
OWNERS = {
    "av": tuple(
        f"avsi_jax/media/{m}.py"
        for m in ("clip_io", "audio_metadata", "clip_source", "frame_geometry", "grid_mpeg", "muxing", "stream_copy")
    ),
    "soundfile": tuple(f"avsi_jax/media/{m}.py" for m in ("clip_io", "audio_metadata", "clip_source", "muxing")),
    "ai_edge_litert": ("avsi_jax/face/landmarks.py",),
    "orbax": ("avsi_jax/training/checkpoints.py",),
    "grain": ("avsi_jax/data/input_pipeline.py",),
    "gradio": ("avsi_jax/app/ui.py",),
    "onnxruntime": ("avsi_jax/evaluation/listener_models.py",),
    "speechmos": ("avsi_jax/evaluation/listener_models.py", "tests/evaluation/test_listener_models.py"),
    "tensorflow": ("tfds_grid/",),
    "tensorflow_datasets": ("tfds_grid/",),
    "apache_beam": ("tfds_grid/beam_pipeline.py", "tfds_grid/beam_build.py"),
    "mediapipe": (),
    "torch": (),
    "pickle": (),
    "cloudpickle": (),
    "dill": (),
}

# Only devices.py maps over devices or names an axis; the others call it (devices.sum_over_devices and the like).
AXIS_NAMES = {"pmap", "psum", "pmean", "pmax", "pmin", "all_gather", "axis_index", "shard_map", "axis_name"}
AXIS_OWNER = "avsi_jax/runtime/devices.py"

NO_CONCEPT = {"utils", "helpers", "common", "misc"}
SHADOWS = {"signal", "types", "copy"}
MACHINE_PATH = re.compile(r"(?<![\w.})*$])/(?:home|root|work|Users)/\w")
MAY_NAME_MACHINES = ("launch/",)


def package_of(path: str) -> str:
    """The package a file belongs to, as MAY_IMPORT names it; '' for the modules in the root of avsi_jax."""
    parts = path.split("/")
    if parts[0] in ("configs", "tfds_grid"):
        return parts[0]
    return parts[1] if len(parts) == 3 else ""


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is executed on import of the file) of everything the file imports, in functions too.

    `from a import b` gives both `a` and `a.b`; relative imports are made absolute; importlib.import_module("a") counts.
    """
    not_executed = {id(node) for outer in ast.walk(tree) if _is_deferred(outer) for node in ast.walk(outer)}
    for node in ast.walk(tree):
        eager = id(node) not in not_executed
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


def _is_deferred(node: ast.AST) -> bool:
    """Whether what the node holds is not executed on import: a function, or a block for type checkers."""
    is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    return is_for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def package_violations(path: str, names: list[tuple[str, bool]]) -> Iterator[str]:
    """Imports between our own packages that go against MAY_IMPORT."""
    package = package_of(path)
    if package == "configs":
        allowed = {"ml_collections", "__future__"} | (sys.stdlib_module_names if path.endswith("__init__.py") else set())
        for name, _ in names:
            if name.split(".")[0] not in allowed and not (name + ".").startswith("avsi_jax.configs."):
                yield f"imports {name}; configs import only ml_collections and one another"
        return
    if package not in MAY_IMPORT and package:
        yield f"is in no known package; give avsi_jax/{package} its place in MAY_IMPORT of tests/test_layers.py"
        return
    for name, eager in names:
        top, *rest = name.split(".")
        if top == "tfds_grid" and package != "tfds_grid":
            yield f"imports {name}; avsi_jax reads records by folder and never imports tfds_grid"
        if top != "avsi_jax" or not rest:
            continue
        target = rest[0]
        if not package:
            if path == "avsi_jax/__init__.py" and eager:
                yield f"imports {name} when it is imported; load modules in __getattr__ only"
            elif path == "avsi_jax/presets.py":
                yield f"imports {name}; presets import nothing of ours"
        elif target in FORWARDERS or target == "Inpainter":
            yield f"imports {name}; use the module it forwards to"
        elif target in MAY_IMPORT and target != package and target not in MAY_IMPORT[package]:
            yield f"imports {name}; {package} may import only {', '.join(sorted(MAY_IMPORT[package])) or 'presets'}"


def owner_violations(path: str, names: list[tuple[str, bool]]) -> Iterator[str]:
    """Libraries that belong to another module, or to none."""
    for top in sorted({name.split(".")[0] for name, _ in names}):
        owners = OWNERS.get(top)
        if owners is not None and not path.startswith(owners or "\n"):
            yield f"imports {top}, which {'only ' + ' and '.join(owners) + ' may' if owners else 'no module may'}"


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Every name a file writes as code: variables, attributes, keyword arguments, parameters, imported names."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value.split(".")[-1]


def word_violations(path: str, tree: ast.AST) -> Iterator[str]:
    """Names only runtime/devices.py writes, and loading that runs what a file says."""
    if path != AXIS_OWNER:
        for name in sorted(AXIS_NAMES & set(identifiers(tree))):
            yield f"writes {name}; only {AXIS_OWNER} maps over devices and names axes"
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", None) is not False:
            yield "writes allow_pickle=True; nothing is loaded that can run code"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            yield "calls torch.load; nothing is loaded that can run code"


def violations(path: str, source: str) -> list[str]:
    """What is wrong with one Python file of avsi_jax, tfds_grid or configs; `path` is relative to the checkout."""
    tree = ast.parse(source, path)
    package = path.rsplit("/", 1)[0].replace("/", ".")
    names = list(imports(tree, package))
    found = [*package_violations(path, names), *owner_violations(path, names), *word_violations(path, tree)]
    if Path(path).stem in NO_CONCEPT | SHADOWS:
        found.append(f"is named {Path(path).stem}, which names no concept or shadows the standard library")
    return found


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
def test_imports_follow_the_arrows_between_packages(path):
    assert violations(path, (ROOT / path).read_text()) == []


def test_the_root_holds_the_api_presets_and_forwarders_only():
    assert {p.stem for p in (ROOT / "avsi_jax").glob("*.py")} == ROOT_MODULES


@pytest.mark.parametrize("package", sorted(set(MAY_IMPORT) - {"configs", "tfds_grid"}))
def test_a_package_is_flat_documented_and_of_a_readable_size(package):
    folder = ROOT / "avsi_jax" / package
    modules = {p.stem for p in folder.glob("*.py")} - {"__init__"}
    assert FEWEST_MODULES <= len(modules) <= MOST_MODULES
    assert [p for p in folder.rglob("*.py") if p.parent != folder] == []
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_modules_of_a_package_do_not_import_in_circles():
    needs = {}
    for file in sources():
        path = file.relative_to(ROOT).as_posix()
        if file.stem == "__init__" and package_of(path) != "configs":  # exports lazily what lies in its modules
            continue
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".").replace("configs", "avsi_jax.configs", 1)
        listed = imports(ast.parse(file.read_text()), path.rsplit("/", 1)[0].replace("/", "."))
        needs[module] = {name for name, _ in listed if name != module}
    left = {module: names & needs.keys() for module, names in needs.items()}
    while free := [module for module, names in left.items() if not names & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}


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
        ("avsi_jax/media/clip_io.py", "from avsi_jax.audio import stft", "may import only"),
        ("avsi_jax/media/clip_io.py", "from avsi_jax.audio.stft import log_mel", "may import only"),
        ("avsi_jax/media/clip_io.py", "def f():\n    import avsi_jax.models.systems as m", "may import only"),
        ("avsi_jax/media/clip_io.py", "import importlib\nimportlib.import_module('avsi_jax.training.cli')", "may import only"),
        ("avsi_jax/models/lstm.py", "from avsi_jax.runtime import devices", "may import only data"),
        ("avsi_jax/inpainting/api.py", "from avsi_jax.data import features", "may import only"),
        ("avsi_jax/inpainting/api.py", "from avsi_jax import weights", "the module it forwards to"),
        ("avsi_jax/training/cli.py", "from tfds_grid import speakers", "never imports tfds_grid"),
        ("avsi_jax/wizardry/spells.py", "", "no known package"),
        ("avsi_jax/__init__.py", "from avsi_jax import presets", "when it is imported"),
        ("avsi_jax/presets.py", "from avsi_jax.audio import stft", "import nothing of ours"),
        ("tfds_grid/prepare.py", "from avsi_jax.audio import gap_masks", "may import only"),
        ("tfds_grid/prepare.py", "from avsi_jax.configs import base", "may import only"),
        ("avsi_jax/inpainting/api.py", "import av", "only avsi_jax/media/clip_io.py"),
        ("avsi_jax/inpainting/api.py", "def f():\n    import soundfile as sf", "only avsi_jax/media/clip_io.py"),
        ("avsi_jax/media/clip_io.py", "from ai_edge_litert.interpreter import Interpreter", "only avsi_jax/face/landmarks.py"),
        ("avsi_jax/training/cli.py", "import orbax.checkpoint as ocp", "only avsi_jax/training/checkpoints.py"),
        ("avsi_jax/training/cli.py", "import grain.python as pygrain", "only avsi_jax/data/input_pipeline.py"),
        ("avsi_jax/data/input_pipeline.py", "import tensorflow as tf", "only tfds_grid/"),
        ("avsi_jax/training/cli.py", "import tensorflow_datasets as tfds", "only tfds_grid/"),
        ("avsi_jax/inpainting/api.py", "import gradio as gr", "only avsi_jax/app/ui.py"),
        ("tfds_grid/clips.py", "import apache_beam as beam", "only tfds_grid/beam_pipeline.py"),
        ("avsi_jax/face/landmarks.py", "import mediapipe", "which no module may"),
        ("avsi_jax/training/cli.py", "import jax\nstep = jax.pmap(print)", "writes pmap"),
        ("avsi_jax/training/cli.py", "from jax.lax import psum as total", "writes psum"),
        ("avsi_jax/models/losses.py", "import jax\nf = lambda x: jax.lax.pmean(x, 'batch')", "writes pmean"),
        ("avsi_jax/models/systems.py", "import flax.linen as nn\nn = nn.BatchNorm(axis_name='batch')", "writes axis_name"),
        ("avsi_jax/training/checkpoints.py", "import pickle", "imports pickle"),
        ("avsi_jax/training/checkpoints.py", "import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle"),
        ("tfds_grid/prepare.py", "def f(torch):\n    torch.load('x')", "torch.load"),
        ("avsi_jax/data/utils.py", "", "no concept"),
        ("configs/tiny.py", "import numpy as np", "only ml_collections"),
        ("configs/tiny.py", "from avsi_jax import presets", "only ml_collections"),
        ("configs/tiny.py", "import os", "only ml_collections"),
        ("configs/__init__.py", "import numpy as np", "only ml_collections"),
    ],
)
def test_a_violation_is_found(path, source, says):
    assert any(says in what for what in violations(path, source)), violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("avsi_jax/__init__.py", "def __getattr__(name):\n    from avsi_jax.inpainting.api import Inpainter\n    return Inpainter"),
        ("avsi_jax/training/cli.py", "from avsi_jax.runtime import devices\ntotal = devices.sum_over_devices"),
        ("avsi_jax/training/cli.py", "from avsi_jax import configs, presets"),
        ("avsi_jax/runtime/devices.py", "import jax\nf = jax.pmap(print, axis_name='batch')\njax.lax.psum(1, 'batch')"),
        ("avsi_jax/models/losses.py", "'''Sums, to be added by psum over the devices.'''\nimport optax"),
        ("avsi_jax/data/input_pipeline.py", "import numpy as np\nnp.load('x', allow_pickle=False)"),
        ("tfds_grid/prepare.py", "import tensorflow as tf\nfrom avsi_jax.media import clip_io\nfrom tfds_grid import speakers"),
        ("configs/tiny.py", "from ml_collections import config_dict\nfrom avsi_jax.configs import base"),
        ("configs/__init__.py", "import importlib.util\nimport ml_collections"),
    ],
)
def test_allowed_imports_pass(path, source):
    assert violations(path, source) == []


def test_a_machine_path_is_caught():
    folder = "/ho" + "me/someone/clips"  # in two pieces, or this line would itself be a violation
    assert machine_paths("docs/x.md", f"--raw={folder}") and machine_paths("avsi_jax/x.py", f'p = "{folder}"')
    assert machine_paths("docs/x.md", "see https://x.org/ho" + "me/page and ../wo" + "rk/x") == []
    assert machine_paths("launch/pod.sh", folder) == []


# ---- members -----------------------------------------------------------------------------------------------------------------


def undefined_members(trees: list[ast.Module]) -> list[str]:
    """'Class._name' of every private member that a class of the modules uses on self and that neither it nor a base class defines.

    A method that was renamed or removed would otherwise be noticed only when that line runs. Bases are found by their names.
    """
    classes = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    bases = {name: [ast.unparse(base).split(".")[-1] for base in node.bases] for name, node in classes.items()}

    def known(name: str) -> bool:
        """Whether all base classes are among the modules; one of a library may define members."""
        return all(b in ("NamedTuple", "Exception") or (b in classes and b != name and known(b)) for b in bases[name])

    def defined(name: str) -> set[str]:
        nodes = list(ast.walk(classes[name]))
        own = {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
        own |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        return own.union(*(defined(b) for b in bases[name] if b in classes))

    missing = []
    for name in filter(known, classes):
        attributes = [n for n in ast.walk(classes[name]) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
        used = {n.attr for n in attributes if isinstance(n.value, ast.Name) and n.value.id == "self"}
        private = {a for a in used if re.match("_[a-z]", a)} - {"_asdict", "_replace", "_fields"}
        missing += [f"{name}.{a}" for a in sorted(private - defined(name))]
    return missing


def test_private_members_that_are_used_are_defined():
    assert undefined_members([ast.parse((ROOT / path).read_text()) for path in sources()]) == []


def test_an_undefined_private_member_is_noticed():
    code = "class A:\n def _known(self): self._set = 1\nclass B(A):\n def f(self): self._known(); self._set; self._gone()\n"
    assert undefined_members([ast.parse(code)]) == ["B._gone"]
