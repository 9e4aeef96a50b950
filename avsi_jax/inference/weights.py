"""Weights to ship and to share: a folder of model.safetensors (float16), config.json and README.md. Reading one runs no code of it.

The parameters of one step of a training and all that is needed to use them: its config, what it standardised by, and what is known
of it (data, speakers, measured quality). `read` needs no Orbax, and takes no byte on trust: sizes, names, shapes and types are
compared with what the config's network has before room is made for a tensor. float16 halves what is shipped; a network computes
with the same numbers as float32 (docs/weights.md says what the rounding costs). Optimiser and schedule stay in the workdir.
"""

from __future__ import annotations

import argparse
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
from avsi_jax.training import old_names
from avsi_jax.training import run_directory as workdir_files

if TYPE_CHECKING:
    import ml_collections
    import numpy as np

    from avsi_jax.data.features import Normalisation

PRETRAINED = "pretrained"
DEFAULT = "av_unified"  # what `pretrained` stands for
HOME = Path(__file__).parent.parent / PRETRAINED
TENSORS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FORMAT = 1
KEYS = {"format", "system", "preset", "step", "sha256", "config", "normalisation", "facts"}
MOST_CONFIG = 2**20  # bytes of config.json, of which measured quality is most
MOST_HEADER = 2**20  # bytes of the tensors' names, shapes and types
MOST_PARAMETERS = 100_000_000
MOST = {"layers": 12, "units": 2048, "bottleneck": 4096, "seed": 2**32 - 1}  # of a config's fields; of others a million
DTYPES = {"F16": 2, "F32": 4}  # bytes
HOW = "make them anew with python -m avsi_jax.weights, or take another copy"


class WeightsError(ValueError):
    """No weights where some are needed, or ones that are not what they should be."""


class Weights(NamedTuple):
    """As `trained_run.Run`, and facts: what is known of them, as `python -m avsi_jax.weights` gathers it (JSON)."""

    config: ml_collections.ConfigDict
    params: dict
    step: int
    normalisation: Normalisation
    facts: dict

    @property
    def run(self) -> Run:
        return Run(*self[:4])


# ---- where they are ------------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """The weights that this installation came with."""
    return sorted(p.parent.name for p in HOME.glob(f"*/{TENSORS}"))


def find(name: str = PRETRAINED) -> Path:
    """The folder of shipped weights, 'pretrained' for the best there is; WeightsError names those there are."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise WeightsError(f"weights {name!r}: expected one of {', '.join([PRETRAINED, *names()])}")
    folder = HOME / (DEFAULT if name == PRETRAINED else name)
    if (folder / TENSORS).is_file():
        return folder
    if not names():
        raise WeightsError(
            "no weights shipped in this version; train some (avsi-train --config=av_unified --workdir=DIR) and name them: "
            "--checkpoint=DIR"
        )
    known = ", ".join([PRETRAINED, *names()])
    raise WeightsError(f"no weights {name!r} in this version and no folder of that name; expected one of {known}, or a folder")


def locate(checkpoint: str | Path) -> Path | None:
    """The folder of the weights that a checkpoint names, by name or as a folder; None for any other folder, such as a workdir.

    WeightsError where there is neither such a folder nor weights of that name.
    """
    folder = Path(checkpoint)
    if str(checkpoint) == PRETRAINED or not folder.is_dir() and folder.name == str(checkpoint):
        return find(str(checkpoint))
    return folder if (folder / TENSORS).is_file() else None


# ---- reading -------------------------------------------------------------------------------------------------------------------


def read(folder: str | Path) -> Weights:
    """The weights in a folder, as float32; WeightsError of one line for anything that is not as `write` leaves it."""
    folder = Path(folder)
    told = _read_config(folder / CONFIG)
    try:
        config = check_config(told["config"])
        normalisation = _normalisation(told["normalisation"])
        shapes = _shapes(config, normalisation)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise WeightsError(f"{folder / CONFIG}: {_one_line(error)}") from error
    tensors = _read_tensors(folder / TENSORS, shapes, told["sha256"])
    return Weights(config, _nested(tensors), told["step"], normalisation, old_names.current_kinds(told["facts"]))


def _read_config(path: Path) -> dict:
    """config.json with everything in its place; what stands in 'config' and 'normalisation' is still to be checked."""
    if not path.is_file():
        raise WeightsError(f"no {CONFIG} in {path.parent}; expected a folder of weights (python -m avsi_jax.weights)")
    if (size := path.stat().st_size) > MOST_CONFIG:
        raise WeightsError(f"{path} has {size} bytes, expected at most {MOST_CONFIG}; {HOW}")
    try:
        told = json.loads(path.read_bytes(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is no JSON ({_one_line(error)}); {HOW}") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        found = told.get("format") if isinstance(told, dict) else type(told).__name__
        raise WeightsError(f"{path}: found format {_short(found)}, expected {FORMAT}; {HOW}, or a newer avsi_jax")
    if odd := sorted(KEYS ^ told.keys()):
        raise WeightsError(f"{path}: {_short(odd[0])} is {'unknown' if odd[0] in told else 'missing'}; {HOW}")
    kinds = {"step": int, "sha256": str, "config": dict, "normalisation": dict, "facts": dict}
    for key, kind in kinds.items():
        if type(told[key]) is not kind:
            raise WeightsError(f"{path}: {key} is {_short(told[key])}, expected {kind.__name__}; {HOW}")
    check_measured(told["facts"].get("measured", {}), path)
    return told


def check_config(told: dict) -> ml_collections.ConfigDict:
    """A config of exactly the fields of a training, each of its type and within reason; ValueError names the first that isn't."""
    import ml_collections

    from avsi_jax import configs

    usual = configs.load("base")
    for group in (k for k, v in usual.items() if isinstance(v, ml_collections.ConfigDict)):
        if not isinstance(told.get(group, {}), dict):
            raise ValueError(f"config.{group}: found {_short(told[group])}, expected fields")
    told = workdir_files.filled_up(old_names.current_config(told), workdir_files.LATER_FIELDS) | {"lstm": "auto"}  # not learned
    _check_fields(told, usual, "")
    config = ml_collections.ConfigDict(told)
    if config.feedback and config.feedback >= config.layers:
        raise ValueError(f"config.feedback: found {config.feedback}, expected less than config.layers={config.layers}")
    return config.lock()


def _check_fields(told: dict, usual, prefix: str) -> None:
    import ml_collections

    if odd := sorted(map(str, told.keys() ^ usual.keys())):
        raise ValueError(f"config.{prefix}{_short(odd[0])} is {'unknown' if odd[0] in told else 'missing'}")
    for key, value in told.items():
        if isinstance(usual[key], ml_collections.ConfigDict):
            _check_fields(value, usual[key], f"{prefix}{key}.")
            continue
        kind = type(usual[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"config.{prefix}{key}: found {_short(value)}, expected {kind.__name__}")
        if kind in (int, float) and not 0 <= value <= MOST.get(key, 1_000_000):
            raise ValueError(f"config.{prefix}{key}: found {_short(value)}, expected 0 to {MOST.get(key, 1_000_000)}")


def _normalisation(told: dict) -> Normalisation:
    from avsi_jax.data.features import Normalisation, Scale

    if odd := sorted(set(Normalisation._fields) ^ told.keys()):
        raise ValueError(f"normalisation: {_short(odd[0])} is {'unknown' if odd[0] in told else 'missing'}")
    scale = lambda k, v: Scale(_numbers(v["mean"], k), _numbers(v["std"], k))
    return Normalisation(**{k: v if v is None else scale(k, v) for k, v in told.items()})


def _numbers(told, what: str) -> tuple[float, ...]:
    if not isinstance(told, list) or len(told) > 4096 or not all(type(x) in (int, float) and math.isfinite(x) for x in told):
        raise ValueError(f"normalisation.{what}: found {_short(told)}, expected finite numbers")
    return tuple(map(float, told))


def _shapes(config, normalisation) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the config's network has, made without any."""
    import jax

    from avsi_jax.models import build

    build.make_feature_config(config, normalisation)
    shapes = {k: tuple(v.shape) for k, v in flat(jax.eval_shape(lambda: build.init_params(config))).items()}
    if (count := sum(map(math.prod, shapes.values()))) > MOST_PARAMETERS:
        raise ValueError(f"config: its network has {count} parameters, expected at most {MOST_PARAMETERS}")
    return shapes


def _read_tensors(path: Path, shapes: dict[str, tuple[int, ...]], sha256: str) -> dict[str, np.ndarray]:
    """Name -> float32 array; what the file holds is compared with `shapes` before any of it is read but its header."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors import numpy as safetensors

    if not path.is_file():
        raise WeightsError(f"no {TENSORS} in {path.parent}; expected a folder of weights (python -m avsi_jax.weights)")
    _check_header(path, shapes)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise WeightsError(f"{path} is not the file that {CONFIG} beside it tells the sha256 of: damaged or mixed up; {HOW}")
    try:
        tensors = {name: x.astype(np.float32) for name, x in safetensors.load(data).items()}
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"{path}: {_one_line(error)}; {HOW}") from error
    for name, shape in shapes.items():
        if (x := tensors.get(name)) is None or x.shape != shape:
            raise WeightsError(f"{path}: {name} is not what the header said first; {HOW}")
        if not np.isfinite(x).all():
            raise WeightsError(f"{path}: {name} holds numbers that are not finite; {HOW}")
    return tensors


def _check_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """WeightsError unless names, shapes, types and the file's size are those of the network."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
        if length > min(MOST_HEADER, size - 8):
            raise WeightsError(f"{path}: found a header of {length} bytes in a file of {size}; {HOW}")
        try:
            header = json.loads(file.read(length))
            found = {k: (str(v["dtype"]), tuple(v["shape"])) for k, v in header.items() if k != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{path}: its header can't be read ({_one_line(error)}); {HOW}") from error
    for name in sorted(shapes.keys() | found.keys(), key=lambda n: (n in found, n)):
        dtype, shape = found.get(name, ("", None))
        if shape != shapes.get(name):
            raise WeightsError(f"{path}: {_short(name)} has shape {_short(shape)}, expected {shapes.get(name)} by {CONFIG}; {HOW}")
        if dtype not in DTYPES:
            raise WeightsError(f"{path}: {name} is of {_short(dtype)}, expected {' or '.join(DTYPES)}; {HOW}")
    expected = 8 + length + sum(DTYPES[dtype] * math.prod(shape) for dtype, shape in found.values())
    if size != expected:
        raise WeightsError(f"{path} has {size} bytes, expected {expected}; {HOW}")


def check_measured(told: Any, path) -> None:
    """WeightsError unless it is {what was there: {gap length in ms: {metric: number}}}: repairs take their confidence from it."""
    try:
        lengths = [(ms, of) for by_length in told.values() for ms, of in by_length.items()]
        numbers = [x for _, of in lengths for x in of.values()]
        good = all(ms.isdecimal() and len(ms) < 7 for ms, _ in lengths)
    except AttributeError:
        good = False
    if not good or not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
        raise WeightsError(f"{path}: facts.measured is {_short(told)}, expected numbers by what was there, gap in ms and metric")


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
    """What stands in a file, in a few letters that can be printed."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _no_number(text: str):
    raise ValueError(f"found {text}, expected a finite number")


# ---- writing -------------------------------------------------------------------------------------------------------------------


def write(folder: str | Path, run: Run, facts: dict, *, overwrite: bool = False) -> Path:
    """The folder of weights of a run (parameters as float16), with its model card; each file is written whole or not at all.

    ValueError for parameters that float16 can't hold; FileExistsError where there are weights already, unless `overwrite`.
    """
    import numpy as np
    from safetensors import numpy as safetensors

    from avsi_jax.inference import model_card

    folder = Path(folder)
    if (folder / workdir_files.CHECKPOINTS).is_dir():
        raise WeightsError(f"{folder} is the workdir of a training, whose {CONFIG} is its own; take another folder")
    if not overwrite and (there := [name for name in (TENSORS, CONFIG, CARD) if (folder / name).exists()]):
        raise FileExistsError(f"{folder / there[0]} exists; take --overwrite to replace it, or another folder")
    with np.errstate(over="ignore"):
        tensors = {name: np.ascontiguousarray(x, np.float16) for name, x in flat(run.params).items()}
    if beyond := sorted(name for name, x in tensors.items() if not np.isfinite(x).all()):
        raise WeightsError(f"step {run.step}: {beyond[0]} holds numbers that float16 has no room for; expected a sound training")
    data = safetensors.save(tensors, {"format": "jax"})
    told = {
        "format": FORMAT, "system": run.config.system, "preset": run.config.preset, "step": run.step,
        "sha256": hashlib.sha256(data).hexdigest(),
        "config": json.loads(run.config.to_json()) | {"data_dir": "", "lstm": "auto"},  # of whoever uses them, not of who trained
        "normalisation": {k: v and v._asdict() for k, v in run.normalisation._asdict().items()},
        "facts": facts,
    }  # fmt: skip
    files = {
        TENSORS: data,
        CONFIG: (json.dumps(told, indent=1, sort_keys=True, allow_nan=False) + "\n").encode(),
        CARD: model_card.text(folder.resolve().name, run.config, facts).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        storage.write_bytes(folder / name, content)
    return folder


@unexpected_errors.reported("avsi_jax.weights")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m avsi_jax.weights", description="A training's checkpoint -> a folder of weights to share, with a model card."
    )
    parser.add_argument("--workdir", required=True, help="the run; its quality is taken from its eval/")
    parser.add_argument("--out", required=True, help="the folder to write; its name is that of the weights")
    parser.add_argument("--checkpoint", default="best", help="best (by validation), last, or a step; default %(default)s")
    parser.add_argument("--facts", help="a JSON file of more facts, or of ones to put in place of those found")
    parser.add_argument("--overwrite", action="store_true", help="replace weights that are there")
    known = parser.parse_args(argv)
    try:
        facts, folder = pack(known.workdir, known.out, known.checkpoint, known.facts, known.overwrite)
    except (ValueError, OSError) as error:
        print(f"avsi_jax.weights: {_one_line(error)}", file=sys.stderr)
        return 2
    if not facts["measured"]:
        told = "avsi-evaluate --workdir=RUN --config.split=test --config.suite=lengths, then streams"
        print(
            f"avsi_jax.weights: no evaluation of unseen speakers at this step, so no measured quality; {told}",
            file=sys.stderr,
        )
    print(f"{folder}: {', '.join(f'{n} {(folder / n).stat().st_size} bytes' for n in (TENSORS, CONFIG, CARD))}")
    return 0


def pack(workdir, out, which: str = "best", more: str | None = None, overwrite: bool = False) -> tuple[dict, Path]:
    """A run -> (its facts, the folder of its weights), read again to see that it can be."""
    from avsi_jax.inference import model_card

    run = trained_run.read(workdir, which)
    facts = model_card.facts_of(workdir, run)
    if more:
        try:
            facts = workdir_files.filled_up(json.loads(Path(more).read_text()), facts)
        except (ValueError, AttributeError, TypeError) as error:
            raise WeightsError(f"{more} is no JSON of facts ({_one_line(error)}); expected an object") from error
    folder = write(out, run, facts, overwrite=overwrite)
    read(folder)
    return facts, folder


if __name__ == "__main__":
    sys.exit(main())
