"""Weights to share: a folder of model.safetensors (float16), config.json and README.md. Loading one runs no code of it.

The folder holds the parameters of one training step and what is needed to use them: config, normalisation, and facts (data,
speakers, measured quality). `read` needs no Orbax and trusts no file: sizes, names, shapes and types are compared with the network
of the config before any tensor is read. float16 halves the size; the network computes with the same numbers as float32
(docs/weights.md shows the effect of rounding). Optimizer and schedule stay in the run directory.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from avsi_jax.inference import trained_run
from avsi_jax.inference.trained_run import Run
from avsi_jax.runtime import storage, unexpected_errors
from avsi_jax.runtime.command_line import Parser
from avsi_jax.training import old_names
from avsi_jax.training import run_directory as workdir_files

if TYPE_CHECKING:
    import ml_collections
    import numpy as np

    from avsi_jax.data.features import Normalisation

PRETRAINED = "pretrained"
DEFAULT = "av_unified"  # the weights that `pretrained` names
HOME = Path(__file__).parent.parent / PRETRAINED
TENSORS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FORMAT = 1
KEYS = {"format", "system", "preset", "step", "sha256", "config", "normalisation", "facts"}
MAX_CONFIG = 2**20  # bytes of config.json, most of which is measured quality
MAX_HEADER = 2**20  # bytes of the tensors' names, shapes and types
MAX_PARAMETERS = 100_000_000
# Of config fields; a million for others.
MAX_VALUES = {"layers": 12, "refiner": 24, "units": 2048, "bottleneck": 4096, "seed": 2**32 - 1}
DTYPES = {"F16": 2, "F32": 4}  # bytes
FIX = "write them again with python -m avsi_jax.weights, or get another copy"


class WeightsError(ValueError):
    """Weights are missing, damaged or not what was expected."""


class Weights(NamedTuple):
    """A `trained_run.Run` with its facts (`model_card.facts_of`)."""

    config: ml_collections.ConfigDict
    params: dict
    step: int
    normalisation: Normalisation
    facts: dict

    @property
    def run(self) -> Run:
        """The run without its facts."""
        return Run(*self[:4])


# ---- finding ------------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """Names of the shipped weights."""
    return sorted(p.parent.name for p in HOME.glob(f"*/{TENSORS}"))


def find(name: str = PRETRAINED) -> Path:
    """The folder of shipped weights ('pretrained' for the default); WeightsError lists the names there are."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise WeightsError(f"weights {name!r}: expected one of {', '.join([PRETRAINED, *names()])}")
    folder = HOME / (DEFAULT if name == PRETRAINED else name)
    if (folder / TENSORS).is_file():
        return folder
    if not names():
        raise WeightsError(
            "no weights shipped in this version; train a model (avsi-train --config=av_unified --workdir=DIR) and pass "
            "--checkpoint=DIR"
        )
    known = ", ".join([PRETRAINED, *names()])
    raise WeightsError(f"no weights {name!r} in this version and no such folder; expected one of {known}, or a folder")


def locate(checkpoint: str | Path) -> Path | None:
    """The folder of weights that a name or a path refers to; None for any other folder, such as a run directory.

    WeightsError where there is neither such a folder nor shipped weights of that name.
    """
    folder = Path(checkpoint)
    if str(checkpoint) == PRETRAINED or not folder.is_dir() and folder.name == str(checkpoint):
        return find(str(checkpoint))
    return folder if (folder / TENSORS).is_file() else None


# ---- reading -------------------------------------------------------------------------------------------------------------------


def read(folder: str | Path) -> Weights:
    """The weights in a folder, as float32; WeightsError, in one line, for anything that `write` would not have written."""
    folder = Path(folder)
    content = _read_config(folder / CONFIG)
    try:
        config = check_config(content["config"])
        normalisation = _normalisation(content["normalisation"])
        shapes = _shapes(config, normalisation)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise WeightsError(f"{folder / CONFIG}: {_one_line(error)}") from error
    tensors = _read_tensors(folder / TENSORS, shapes, content["sha256"])
    return Weights(config, _nested(tensors), content["step"], normalisation, old_names.current_facts(content["facts"]))


def _read_config(path: Path) -> dict:
    """config.json with all fields present and of the right type; 'config' and 'normalisation' are not checked yet."""
    if not path.is_file():
        raise WeightsError(f"no {CONFIG} in {path.parent}; expected a folder of weights (python -m avsi_jax.weights)")
    if (size := path.stat().st_size) > MAX_CONFIG:
        raise WeightsError(f"{path} has {size} bytes, expected at most {MAX_CONFIG}; {FIX}")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({_one_line(error)}); {FIX}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise WeightsError(f"{path}: found format {_short(found)}, expected {FORMAT}; {FIX}, or install a newer avsi_jax")
    if wrong := sorted(KEYS ^ content.keys()):
        raise WeightsError(f"{path}: {_short(wrong[0])} is {'unknown' if wrong[0] in content else 'missing'}; {FIX}")
    types = {"step": int, "sha256": str, "config": dict, "normalisation": dict, "facts": dict}
    for key, expected in types.items():
        if type(content[key]) is not expected:
            raise WeightsError(f"{path}: {key} is {_short(content[key])}, expected {expected.__name__}; {FIX}")
    check_measured(content["facts"].get("measured", {}), path)
    return content


def check_config(fields: dict) -> ml_collections.ConfigDict:
    """The config of a training, locked; ValueError names the first field that is unknown, missing, or of a wrong type or range."""
    import ml_collections

    from avsi_jax import configs

    base = configs.load("base")
    for group in (k for k, v in base.items() if isinstance(v, ml_collections.ConfigDict)):
        if not isinstance(fields.get(group, {}), dict):
            raise ValueError(f"config.{group}: found {_short(fields[group])}, expected fields")
    fields = workdir_files.with_defaults(old_names.current_config(fields), workdir_files.LATER_FIELDS)
    fields |= {"lstm": "auto"}  # not learned
    _check_fields(fields, base, "")
    config = ml_collections.ConfigDict(fields)
    if config.feedback and config.feedback >= config.layers:
        raise ValueError(f"config.feedback: found {config.feedback}, expected less than config.layers={config.layers}")
    return config.lock()


def _check_fields(fields: dict, base: ml_collections.ConfigDict, prefix: str) -> None:
    import ml_collections

    if wrong := sorted(map(str, fields.keys() ^ base.keys())):
        raise ValueError(f"config.{prefix}{_short(wrong[0])} is {'unknown' if wrong[0] in fields else 'missing'}")
    for key, value in fields.items():
        if isinstance(base[key], ml_collections.ConfigDict):
            _check_fields(value, base[key], f"{prefix}{key}.")
            continue
        expected = type(base[key])
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise ValueError(f"config.{prefix}{key}: found {_short(value)}, expected {expected.__name__}")
        if expected in (int, float) and not 0 <= value <= MAX_VALUES.get(key, 1_000_000):
            raise ValueError(f"config.{prefix}{key}: found {_short(value)}, expected 0 to {MAX_VALUES.get(key, 1_000_000)}")


def _normalisation(fields: dict) -> Normalisation:
    from avsi_jax.data.features import Normalisation, Scale

    if wrong := sorted(set(Normalisation._fields) ^ fields.keys()):
        raise ValueError(f"normalisation: {_short(wrong[0])} is {'unknown' if wrong[0] in fields else 'missing'}")
    scale = lambda k, v: Scale(_numbers(v["mean"], k), _numbers(v["std"], k))
    return Normalisation(**{k: v if v is None else scale(k, v) for k, v in fields.items()})


def _numbers(values: Any, name: str) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) > 4096 or not all(type(x) in (int, float) and math.isfinite(x) for x in values):
        raise ValueError(f"normalisation.{name}: found {_short(values)}, expected finite numbers")
    return tuple(map(float, values))


def _shapes(config, normalisation) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the config's network, computed without allocating any."""
    import jax

    from avsi_jax.models import build

    build.make_feature_config(config, normalisation)
    shapes = {k: tuple(v.shape) for k, v in flat(jax.eval_shape(lambda: build.init_params(config))).items()}
    if (count := sum(map(math.prod, shapes.values()))) > MAX_PARAMETERS:
        raise ValueError(f"config: its network has {count} parameters, expected at most {MAX_PARAMETERS}")
    return shapes


def _read_tensors(path: Path, shapes: dict[str, tuple[int, ...]], sha256: str) -> dict[str, np.ndarray]:
    """Name -> float32 array; the header is compared with `shapes` before any tensor is read."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors import numpy as safetensors

    if not path.is_file():
        raise WeightsError(f"no {TENSORS} in {path.parent}; expected a folder of weights (python -m avsi_jax.weights)")
    _check_header(path, shapes)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise WeightsError(f"{path} has another sha256 than {CONFIG} beside it states: damaged or mixed up; {FIX}")
    try:
        tensors = {name: x.astype(np.float32) for name, x in safetensors.load(data).items()}
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"{path}: {_one_line(error)}; {FIX}") from error
    for name, shape in shapes.items():
        if (x := tensors.get(name)) is None or x.shape != shape:
            raise WeightsError(f"{path}: {name} differs from the header; {FIX}")
        if not np.isfinite(x).all():
            raise WeightsError(f"{path}: {name} contains numbers that are not finite; {FIX}")
    return tensors


def _check_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """WeightsError unless names, shapes, types and the file's size match the network."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
        if length > min(MAX_HEADER, size - 8):
            raise WeightsError(f"{path}: found a header of {length} bytes in a file of {size}; {FIX}")
        try:
            header = json.loads(file.read(length))
            found = {k: (str(v["dtype"]), tuple(v["shape"])) for k, v in header.items() if k != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{path}: its header cannot be read ({_one_line(error)}); {FIX}") from error
    for name in sorted(shapes.keys() | found.keys(), key=lambda n: (n in found, n)):
        dtype, shape = found.get(name, ("", None))
        if shape != shapes.get(name):
            raise WeightsError(
                f"{path}: {_short(name)} has shape {_short(shape)}, expected {shapes.get(name)} as in {CONFIG}; {FIX}"
            )
        if dtype not in DTYPES:
            raise WeightsError(f"{path}: {name} has type {_short(dtype)}, expected {' or '.join(DTYPES)}; {FIX}")
    expected = 8 + length + sum(DTYPES[dtype] * math.prod(shape) for dtype, shape in found.values())
    if size != expected:
        raise WeightsError(f"{path} has {size} bytes, expected {expected}; {FIX}")


def check_measured(measured: Any, path: str | Path) -> None:
    """WeightsError unless `measured` is {streams: {gap length in ms: {metric: number}}}: it determines the reported confidence."""
    try:
        lengths = [(ms, metrics) for by_length in measured.values() for ms, metrics in by_length.items()]
        numbers = [x for _, metrics in lengths for x in metrics.values()]
        valid = all(ms.isdecimal() and len(ms) < 7 for ms, _ in lengths)
    except AttributeError:
        valid = False
    if not valid or not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
        raise WeightsError(f"{path}: facts.measured is {_short(measured)}, expected numbers by streams, gap in ms and metric")


# ---- names of tensors ----------------------------------------------------------------------------------------------------------


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{'decoder': {'bias': x}} -> {'decoder.bias': x}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _nested(tensors: dict[str, Any]) -> dict:
    """The inverse of `flat`."""
    tree: dict = {}
    for name, value in tensors.items():
        *groups, last = name.split(".")
        group = tree
        for key in groups:
            group = group.setdefault(key, {})
        group[last] = value
    return tree


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _short(value) -> str:
    """A value from a file, shortened and printable."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_constant(text: str) -> None:
    """For NaN and Infinity, which JSON does not have."""
    raise ValueError(f"found {text}, expected a finite number")


# ---- writing -------------------------------------------------------------------------------------------------------------------


def write(folder: str | Path, run: Run, facts: dict, *, overwrite: bool = False) -> Path:
    """Writes the folder of weights of a run (parameters as float16) with its model card; each file is written atomically.

    ValueError for parameters beyond the range of float16; FileExistsError for existing weights, unless `overwrite`.
    """
    import numpy as np
    from safetensors import numpy as safetensors

    from avsi_jax.inference import model_card

    folder = Path(folder)
    if (folder / workdir_files.CHECKPOINTS).is_dir():
        raise WeightsError(f"{folder} is a run directory, whose {CONFIG} would be replaced; choose another folder")
    if not overwrite and (there := [name for name in (TENSORS, CONFIG, CARD) if (folder / name).exists()]):
        raise FileExistsError(f"{folder / there[0]} exists; pass --overwrite to replace it, or choose another folder")
    with np.errstate(over="ignore"):
        tensors = {name: np.ascontiguousarray(x, np.float16) for name, x in flat(run.params).items()}
    if beyond := sorted(name for name, x in tensors.items() if not np.isfinite(x).all()):
        raise WeightsError(
            f"step {run.step}: {beyond[0]} holds numbers beyond the range of float16; expected a training that did not diverge"
        )
    data = safetensors.save(tensors, {"format": "jax"})
    content = {
        "format": FORMAT, "system": run.config.system, "preset": run.config.preset, "step": run.step,
        "sha256": hashlib.sha256(data).hexdigest(),
        "config": json.loads(run.config.to_json()) | {"data_dir": "", "lstm": "auto"},  # belong to the user's machine
        "normalisation": {k: v and v._asdict() for k, v in run.normalisation._asdict().items()},
        "facts": facts,
    }  # fmt: skip
    files = {
        TENSORS: data,
        CONFIG: (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode(),
        CARD: model_card.text(folder.resolve().name, run.config, facts).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        storage.write_bytes(folder / name, content)
    return folder


@unexpected_errors.reported("avsi_jax.weights")
def main(argv: list[str] | None = None) -> int:
    """The command python -m avsi_jax.weights; returns its exit code."""
    parser = Parser(
        "python -m avsi_jax.weights", description="Writes a checkpoint as a folder of weights to share, with a model card."
    )
    parser.add_argument("--workdir", required=True, help="the run directory; measured quality is taken from its eval/")
    parser.add_argument("--out", required=True, help="output folder; its name becomes the name of the weights")
    parser.add_argument("--checkpoint", default="best", help="best (by validation), last, or a step; default %(default)s")
    parser.add_argument("--facts", help="a JSON file of facts to add or replace")
    parser.add_argument("--overwrite", action="store_true", help="replace existing weights")
    known = parser.parse_args(argv)
    try:
        facts, folder = pack(known.workdir, known.out, known.checkpoint, known.facts, known.overwrite)
    except (ValueError, OSError) as error:
        print(f"avsi_jax.weights: {_one_line(error)}", file=sys.stderr)
        return 2
    if not facts["measured"]:
        print(
            "avsi_jax.weights: no evaluation of unseen speakers at this step, so no measured quality; run avsi-evaluate "
            "--workdir=RUN --config.split=test --config.suite=lengths, then --config.suite=streams",
            file=sys.stderr,
        )
    print(f"{folder}: {', '.join(f'{n} {(folder / n).stat().st_size} bytes' for n in (TENSORS, CONFIG, CARD))}")
    return 0


def pack(
    workdir: str | Path, out: str | Path, which: str = "best", more_facts: str | None = None, overwrite: bool = False
) -> tuple[dict, Path]:
    """Writes the weights of a run directory and reads them back as a check; returns (facts, folder)."""
    from avsi_jax.inference import model_card

    run = trained_run.read(workdir, which)
    facts = model_card.facts_of(workdir, run)
    if more_facts:
        try:
            facts = workdir_files.with_defaults(json.loads(Path(more_facts).read_text()), facts)
        except (ValueError, AttributeError, TypeError) as error:
            raise WeightsError(f"{more_facts} is not a JSON file of facts ({_one_line(error)}); expected an object") from error
    folder = write(out, run, facts, overwrite=overwrite)
    read(folder)
    return facts, folder


if __name__ == "__main__":
    sys.exit(main())
