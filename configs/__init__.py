"""Experiment configs (ml_collections): `base.py` defines every field, the other files override some of its values.

Installed as `avsi_jax.configs`. The config files import only ml_collections and each other; every command reads them with `load`.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import pathlib
import types
from collections.abc import Iterable
from typing import Any

import ml_collections

HOME = pathlib.Path(__file__).parent


class ConfigError(ValueError):
    """An unknown config, an unknown field, or a value of the wrong type."""


def names() -> list[str]:
    """Names of the configs in this package, as accepted by --config."""
    return sorted(p.stem for p in HOME.glob("*.py") if p.stem != "__init__")


def load(name_or_path: str, overrides: Iterable[tuple[str, str]] = (), *, like: str = "") -> ml_collections.ConfigDict:
    """Loads a config, applies overrides and locks it.

    name_or_path: the name of a config in this package, or the path of a .py file, which is executed.
    overrides: (dotted field, text) pairs; the text is converted to the type of the field.
    like: 'base' or 'eval'; the config must have all fields of that one.
    Raises ConfigError, whose message names what was expected.
    """
    config = _module(name_or_path).get_config()
    if like and (missing := sorted(set(fields(_module(like).get_config())) - set(fields(config)))):
        raise ConfigError(f"config {name_or_path!r} has no field {missing[0]}; expected {like!r}, or a config based on it")
    overrides = list(overrides)
    for field, text in overrides:
        override(config, field, text)
    if config.get("fidelity", "ours") != "ours":
        explicit = {field for field, _ in overrides} | set(_changed_fields(config, _module("base").get_config()))
        apply_paper_settings(config, explicit)
    return config.lock()


# Field values of the paper's code, without its errors. The sizes that differ between its networks are in the systems' config files.
PAPER_SYSTEMS = ("a_si", "av_si", "av_mtl_si", "av_s2s", "av_mtl_s2s")
PAPER = {
    "preset": "paper", "levels": "preset", "landmarks": "face", "motion": "pixels", "video_rate": "audio",
    "interpolation": "spline", "init": "keras",
    "ctc_units": "characters", "mask_input": False,
    "layers": 3, "units": 256, "bottleneck_relu": True, "skip": False, "dropout": 0.0, "output": "relu",
    "gaps.protocol": "paper", "gaps.max_count": 8, "gaps.total": "normal", "gaps.total_mean_ms": 900.0,
    "gaps.total_std_ms": 300.0,
    "gaps.min_ms": 60.0, "gaps.placement": "paper", "gaps.fixed": True, "gaps.curriculum_steps": 0,
    "validation_gaps": "drawn", "audio_only_clips": 0,
    "augment.speed": 0.0, "augment.gain_db": 0.0, "augment.mirror": 0.0, "augment.stretch": 0.0, "augment.noise_px": 0.0,
    "augment.jitter_ms": 0.0, "augment.drop_video": 0.0, "augment.drop_audio": 0.0, "augment.trim": 0.0,
    "loss.kind": "mse", "loss.whole": 1.0, "loss.gap": 0.0, "loss.near_frames": 0, "loss.ctc": 1e-3,
    "dtype": "float32", "ema": 0.0,
    "batch_size": 32, "learning_rate": 1e-3, "adam_epsilon": 1e-7, "clip_norm": 0.0, "schedule": "plateau", "monitor": "val_loss",
    "plateau_factor": 0.1, "plateau_patience": 5, "early_stop_patience": 10, "min_delta": 1e-4,
}  # fmt: skip


def apply_paper_settings(config: ml_collections.ConfigDict, explicit: Iterable[str] = ()) -> None:
    """Sets every field of PAPER to the value of the paper's code (config.fidelity='paper').

    explicit: fields set by the config file or by an override; ConfigError if the value of one of them contradicts PAPER.
    """
    if config.fidelity != "paper":
        raise ConfigError(f"config.fidelity: found {config.fidelity!r}, expected 'ours' or 'paper'")
    if config.system not in PAPER_SYSTEMS:
        raise ConfigError(f"config.fidelity=paper: {config.system} is not in the paper; expected {', '.join(PAPER_SYSTEMS)}")
    for field, value in PAPER.items():
        if field == "loss.ctc" and "mtl" not in config.system:
            continue  # no CTC head
        *groups, last = field.split(".")
        group = config
        for name in groups:
            group = group[name]
        if field in explicit and group[last] != value:
            raise ConfigError(
                f"config.fidelity=paper: found {field}={group[last]!r}, the paper's code has {value!r}; "
                f"remove either fidelity or {field}"
            )
        group[last] = value


def _changed_fields(config: ml_collections.ConfigDict, reference: ml_collections.ConfigDict) -> list[str]:
    """Dotted names of the fields whose values differ from the reference config."""
    flat = lambda c: {field: functools.reduce(lambda group, name: group[name], field.split("."), c) for field in fields(c)}
    values, expected = flat(config), flat(reference)
    return [field for field, value in values.items() if value != expected.get(field)]


def split_overrides(arguments: Iterable[str]) -> list[tuple[str, str]]:
    """Converts `--config.FIELD=VALUE` and `--config.FIELD VALUE` arguments to (field, value) pairs; ConfigError for others."""
    pairs, pending_field = [], None
    for argument in arguments:
        if pending_field is not None:
            pairs.append((pending_field, argument))
            pending_field = None
        elif not argument.startswith("--config."):
            raise ConfigError(f"unknown argument {argument!r}; expected --config.FIELD=VALUE (--help lists the rest)")
        else:
            field, equals, text = argument.removeprefix("--config.").partition("=")
            if equals:
                pairs.append((field, text))
            else:
                pending_field = field
    if pending_field is not None:
        raise ConfigError(f"--config.{pending_field} has no value; expected --config.{pending_field}=VALUE")
    return pairs


def _module(name_or_path: str) -> types.ModuleType:
    """Imports a config file by name or path."""
    path = pathlib.Path(name_or_path)
    if path.suffix != ".py":
        path = HOME / f"{name_or_path}.py"
    if not path.is_file():
        raise ConfigError(
            f"no config {name_or_path!r}{_suggestion(name_or_path, names())}; expected one of {', '.join(names())}, or a .py file"
        )
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no get_config(); expected a function that returns an ml_collections.ConfigDict")
    return module


def override(config: ml_collections.ConfigDict, field: str, text: str) -> None:
    """Sets one dotted field from text, converted to the field's type; ConfigError for an unknown field or a wrong type."""
    known = fields(config)
    if field not in known:
        raise ConfigError(
            f"no field config.{field}{_suggestion(field, known)}; list all fields with avsi-train --config=base --show"
        )
    *groups, last = field.split(".")
    for group in groups:
        config = config[group]
    config[last] = _convert(field, text, config[last])


def fields(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of all fields of the config."""
    names: list[str] = []
    for key, value in config.items():
        names += fields(value, f"{prefix}{key}.") if isinstance(value, ml_collections.ConfigDict) else [f"{prefix}{key}"]
    return names


def _convert(field: str, text: str, current: Any) -> Any:
    """Converts text to the type of the field's current value."""
    if isinstance(current, str):
        return text
    try:
        value = ast.literal_eval(text)
        if isinstance(current, tuple):
            return tuple(value) if isinstance(value, tuple | list) else (value,)
        if isinstance(current, bool) == isinstance(value, bool) and type(current)(value) == value:
            return type(current)(value)
    except (ValueError, SyntaxError, TypeError):
        pass
    example = (1, 2) if current == () else current
    raise ConfigError(f"config.{field}: found {text!r}, expected {type(current).__name__} such as {example!r}")


def _suggestion(word: str, known: list[str]) -> str:
    """Text for an error message that names the most similar known words."""
    near = difflib.get_close_matches(word, known, 3, 0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
