"""Unexpected errors, such as a library function that rejects an argument, take one line in every command, not a traceback."""

import importlib
import importlib.metadata
import json
import re

import numpy as np
import pytest

from avsi_jax.runtime import unexpected_errors
from avsi_jax.training import cli
from avsi_jax.training.progress_log import Console

COMMANDS = {  # command -> its function, a function it calls, arguments, a library function that fails when called instead
    "avsi-inpaint": ("avsi_jax.inpainting.cli:main", "_load", ["--example"], np.get_include),
    "avsi-evaluate": ("avsi_jax.evaluation.cli:main", "evaluate", ["--workdir=run"], np.get_include),
    "avsi-train": ("avsi_jax.training.cli:main", "run", ["--workdir=run"], np.get_include),
    "avsi-prepare": ("tfds_grid.prepare:main", "prepare", ["--raw=raw", "--data_dir=data"], np.get_include),
    "avsi-export": ("avsi_jax.inference.export:main", "export_checkpoint", ["--out=out"], np.get_include),
    "avsi-app": ("avsi_jax.app.cli:main", "check_gradio_installed", [], np.full),
}


def call(name: str, monkeypatch, folder) -> int:
    """The exit code of a command in which a library call fails with a TypeError."""
    function, replaced, args, failing = COMMANDS[name]
    module = importlib.import_module(function.split(":")[0])
    monkeypatch.chdir(folder)
    monkeypatch.setattr(module, replaced, failing)
    return module.main(args)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_failing_library_call_takes_one_line(name, monkeypatch, tmp_path, capsys):
    assert call(name, monkeypatch, tmp_path) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    version = importlib.metadata.version("numpy")
    assert re.match(rf"{name}: unexpected TypeError at \w+\.py:\d+ \(numpy {re.escape(version)}\): .*argument", line), line
    assert "constraints/tests.txt" in line and "AVSI_DEBUG=1" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_traceback_is_shown_on_request(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("AVSI_DEBUG", "1")
    assert call(name, monkeypatch, tmp_path) in (1, 2)
    output = capsys.readouterr().err
    assert output.startswith("Traceback") and output.splitlines()[-1].startswith(f"{name}: unexpected TypeError")


def test_the_log_of_a_training_contains_the_traceback(tmp_path, capsys):
    console = Console()
    console.log_to(tmp_path)
    try:
        np.get_include(1)
    except TypeError as error:
        assert cli.exit_code_of(error, console) == 1
    log = (tmp_path / "train.log").read_text()
    assert "Traceback" in log and "avsi-train: unexpected TypeError" in log and "Traceback" not in capsys.readouterr().err


def explained(fail) -> str:
    try:
        fail()
    except Exception as error:
        return unexpected_errors.explain(error)
    raise AssertionError("nothing failed")


def test_the_library_that_raised_is_named_with_its_version():
    import av
    import jax.numpy as jnp

    for fail, library in ((lambda: av.open("clip", nope=1), "av"), (lambda: jnp.ones(3) @ jnp.ones(4), "jax")):
        assert f"({library} {importlib.metadata.version(library)}): " in explained(fail)


def test_no_library_is_named_where_only_the_standard_library_is_involved():
    assert re.match(r"unexpected JSONDecodeError at decoder\.py:\d+: Expecting", explained(lambda: json.loads("{")))
    assert unexpected_errors.explain(KeyError("a\nb")).startswith("unexpected KeyError at ?: ")
