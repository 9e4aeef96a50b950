"""Experiments as ml_collections configs: base.py is the whole experiment, every other file says in which lines it differs.

A plain top-level package, so that `from configs import base` works in a checkout, an editable install and a wheel.
The files in it import nothing but ml_collections and each other; `load` is how every command reads them.
"""

from __future__ import annotations

import ast
import difflib
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
    for field, text in overrides:
        override(config, field, text)
    return config.lock()


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
    raise ConfigError(f"config.{field}: found {text!r}, expected {type(now).__name__} such as {now!r}")


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 3, 0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
