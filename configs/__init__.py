"""Experiments as ml_collections configs: base.py is the whole experiment, every other file says in which lines it differs.

A plain top-level package, so that `from configs import base` works in a checkout, an editable install and a wheel.
The files in it import nothing but ml_collections and each other; `load` is how every command reads them.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import pathlib
from collections.abc import Iterable

import ml_collections

HOME = pathlib.Path(__file__).parent


class ConfigError(ValueError):
    """A config that is not there, or a field that it does not have."""


def names() -> list[str]:
    """The configs that ship, by the name to give to --config."""
    return sorted(p.stem for p in HOME.glob("*.py") if p.stem != "__init__")


def load(name_or_path: str, overrides: Iterable[tuple[str, str]] = (), *, like: str = "") -> ml_collections.ConfigDict:
    """The locked config of that name (a bare name ships with the package) or path (a .py file, which is executed), overridden.

    Overrides are (dotted field, text) pairs; the text is read as the field's own type. ConfigError says what there is instead.
    `like`: the config whose fields it must have, those of a training ('base') or of an evaluation ('eval').
    """
    config = _module(name_or_path).get_config()
    if like and (missing := sorted(set(fields(_module(like).get_config())) - set(fields(config)))):
        raise ConfigError(f"config {name_or_path!r} has no {missing[0]}; expected {like!r}, or one that starts from it")
    overrides = list(overrides)
    for field, text in overrides:
        override(config, field, text)
    if config.get("fidelity", "ours") != "ours":
        said = {field for field, _ in overrides} | set(_changed(config, _module("base").get_config()))
        be_faithful(config, said)
    return config.lock()


# What the paper's code decides (its networks' own sizes stand in the systems' files); its faults are not among them.
PAPER_SYSTEMS = ("a_si", "av_si", "av_mtl_si", "av_s2s", "av_mtl_s2s")
PAPER = {
    "preset": "paper", "levels": "preset", "landmarks": "face", "motion": "pixels", "video_rate": "audio",
    "ctc_units": "characters", "mask_input": False,
    "layers": 3, "units": 256, "bottleneck_relu": True, "skip": False, "dropout": 0.0, "output": "relu",
    "gaps.protocol": "paper", "gaps.max_count": 8, "gaps.total": "normal", "gaps.total_mean_ms": 900.0,
    "gaps.total_std_ms": 300.0,
    "gaps.min_ms": 60.0, "gaps.curriculum_steps": 0,
    "augment.speed": 0.0, "augment.gain_db": 0.0, "augment.mirror": 0.0, "augment.stretch": 0.0, "augment.noise_px": 0.0,
    "augment.jitter_ms": 0.0, "augment.drop_video": 0.0, "augment.drop_audio": 0.0, "augment.trim": 0.0,
    "loss.kind": "mse", "loss.whole": 1.0, "loss.gap": 0.0, "loss.near_frames": 0, "loss.ctc": 1e-3,
    "dtype": "float32", "ema": 0.0,
    "batch_size": 32, "learning_rate": 1e-3, "clip_norm": 0.0, "schedule": "plateau", "monitor": "val_loss",
    "plateau_factor": 0.1, "plateau_patience": 5, "early_stop_patience": 10, "min_delta": 1e-4,
}  # fmt: skip


def be_faithful(config: ml_collections.ConfigDict, said: Iterable[str] = ()) -> None:
    """Every field of PAPER as the paper's code has it; ConfigError where one that was `said`, by file or override, is otherwise."""
    if config.fidelity != "paper":
        raise ConfigError(f"config.fidelity: found {config.fidelity!r}, expected 'ours' or 'paper'")
    if config.system not in PAPER_SYSTEMS:
        raise ConfigError(f"config.fidelity=paper: {config.system} is not in the paper; expected {', '.join(PAPER_SYSTEMS)}")
    for field, value in PAPER.items():
        if field == "loss.ctc" and "mtl" not in config.system:
            continue  # no head to train
        *groups, last = field.split(".")
        group = config
        for name in groups:
            group = group[name]
        if field in said and group[last] != value:
            raise ConfigError(f"config.fidelity=paper: found {field}={group[last]!r}, the paper's code has {value!r}; drop one")
        group[last] = value


def _changed(config: ml_collections.ConfigDict, usual: ml_collections.ConfigDict) -> list[str]:
    """Dotted names of the values in which a config differs from the usual one."""
    flat = lambda c: {field: functools.reduce(lambda group, name: group[name], field.split("."), c) for field in fields(c)}
    here, there = flat(config), flat(usual)
    return [field for field, value in here.items() if value != there.get(field)]


def split_overrides(arguments: Iterable[str]) -> list[tuple[str, str]]:
    """`--config.FIELD=VALUE` or `--config.FIELD VALUE` arguments -> (field, value) pairs; ConfigError for anything else."""
    pairs, waiting = [], None
    for argument in arguments:
        if waiting is not None:
            pairs.append((waiting, argument))
            waiting = None
        elif not argument.startswith("--config."):
            raise ConfigError(f"unknown argument {argument!r}; expected --config.FIELD=VALUE (--help lists the rest)")
        else:
            field, equals, text = argument.removeprefix("--config.").partition("=")
            if equals:
                pairs.append((field, text))
            else:
                waiting = field
    if waiting is not None:
        raise ConfigError(f"--config.{waiting} has no value; expected --config.{waiting}=VALUE")
    return pairs


def _module(name_or_path: str):
    path = pathlib.Path(name_or_path)
    if path.suffix != ".py":
        path = HOME / f"{name_or_path}.py"
    if not path.is_file():
        raise ConfigError(
            f"no config {name_or_path!r}{_nearest(name_or_path, names())}; expected one of {', '.join(names())}, or a .py file"
        )
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no get_config(); expected a function that returns an ml_collections.ConfigDict")
    return module


def override(config: ml_collections.ConfigDict, field: str, text: str) -> None:
    """Sets one dotted field from text, as the type it has; an unknown field is an error that names the nearest ones."""
    known = fields(config)
    if field not in known:
        raise ConfigError(f"no field config.{field}{_nearest(field, known)}; all fields: avsi-train --config=base --show")
    *groups, last = field.split(".")
    for group in groups:
        config = config[group]
    config[last] = _read(field, text, config[last])


def fields(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of every value in the config."""
    out: list[str] = []
    for key, value in config.items():
        out += fields(value, f"{prefix}{key}.") if isinstance(value, ml_collections.ConfigDict) else [f"{prefix}{key}"]
    return out


def _read(field: str, text: str, now):
    """The text as a value of the type that the field has now."""
    if isinstance(now, str):
        return text
    try:
        value = ast.literal_eval(text)
        if isinstance(now, tuple):
            return tuple(value) if isinstance(value, tuple | list) else (value,)
        if isinstance(now, bool) == isinstance(value, bool) and type(now)(value) == value:
            return type(now)(value)
    except (ValueError, SyntaxError, TypeError):
        pass
    raise ConfigError(f"config.{field}: found {text!r}, expected {type(now).__name__} such as {(1, 2) if now == () else now!r}")


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 3, 0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
