"""Configs: what ships loads, what is overridden keeps its type, and what is wrong is said in one line."""

import json
import subprocess
import sys

import ml_collections
import pytest

import configs
from configs import base

SYSTEM_CONFIGS = sorted(set(configs.names()) - {"base", "eval"})


# ---------------------------------------------------------------------------------------------------------------- what ships


def test_names_of_what_ships():
    assert {"base", "eval", "tiny", "a_si", "av_mtl_s2s"} <= set(configs.names())


@pytest.mark.parametrize("name", configs.names())
def test_every_config_loads(name):
    config = configs.load(name)
    assert isinstance(config, ml_collections.ConfigDict) and config.is_locked
    assert all(isinstance(leaf(config, f), str | int | float | tuple) for f in configs.fields(config)), "plain scalars only"
    assert sorted(json.loads(config.to_json())) == sorted(config.keys())
    with pytest.raises(AttributeError, match="nonsense"):
        config.nonsense = 1


@pytest.mark.parametrize("name", SYSTEM_CONFIGS)
def test_a_system_differs_from_base_in_values_alone(name):
    """A file that is base plus the lines in which it differs can't drift from it."""
    ours, whole = configs.load(name), base.get_config()
    assert configs.fields(ours) == configs.fields(whole)
    for field in configs.fields(whole):
        assert type(leaf(ours, field)) is type(leaf(whole, field)), field


@pytest.mark.parametrize("name", SYSTEM_CONFIGS)
def test_a_config_names_its_own_system(name):
    from avsi_jax import models, spec

    config = configs.load(name)
    assert config.system == (name if name in models.SYSTEMS else "av_mtl_s2s")
    assert config.preset in spec.PRESETS


def test_every_field_of_the_training_config_is_documented():
    """Beside it, or in the line above."""
    lines = (configs.HOME / "base.py").read_text().splitlines()
    for field in configs.fields(base.get_config()):
        at = next(i for i, line in enumerate(lines) if f"config.{field} =" in line)
        assert "#" in lines[at] or lines[at - 1].strip().startswith("#"), f"config.{field} has no comment"


def leaf(config, field):
    for part in field.split("."):
        config = config[part]
    return config


# ---------------------------------------------------------------------------------------------------------------- overriding


@pytest.mark.parametrize(
    ("name", "field", "text", "expected"),
    [
        ("base", "epochs", "3", 3),
        ("base", "epochs", "3.0", 3),
        ("base", "learning_rate", "3e-4", 3e-4),
        ("base", "learning_rate", "1", 1.0),
        ("base", "clip_norm", "-1", -1.0),
        ("base", "loss.gap", "2", 2.0),
        ("base", "gaps.max_count", "1", 1),
        ("base", "data_dir", "some where/data", "some where/data"),
        ("base", "data_dir", "7", "7"),
        ("base", "motion", "standardised", "standardised"),
        ("base", "gaps.total", "uniform", "uniform"),
        ("eval", "checkpoint", "12", "12"),
        ("eval", "gap_ms", "300,900", (300, 900)),
        ("eval", "gap_ms", "(300, 900)", (300, 900)),
        ("eval", "gap_ms", "[300,900]", (300, 900)),
        ("eval", "gap_ms", "900,", (900,)),
    ],
)
def test_text_is_read_as_the_type_of_the_field(name, field, text, expected):
    value = leaf(configs.load(name, [(field, text)]), field)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "field", "text", "says"),
    [
        ("base", "epochs", "2.5", "config.epochs: found '2.5', expected int such as 200"),
        ("base", "epochs", "many", "config.epochs: found 'many', expected int"),
        ("base", "epochs", "True", "config.epochs: found 'True', expected int"),
        ("base", "epochs", "", "config.epochs: found '', expected int"),
        ("base", "learning_rate", "1e-3,", "config.learning_rate: found '1e-3,', expected float"),
        ("base", "learning_rate", "__import__('os')", "expected float"),
        ("eval", "gap_ms", "longest", "config.gap_ms: found 'longest', expected tuple such as (300, 600, 900, 1200, 1500)"),
        ("base", "batch_sise", "4", "no field config.batch_sise (did you mean batch_size"),
        ("base", "loss.gab", "1", "did you mean loss.gap"),
        ("base", "loss", "1", "no field config.loss "),
        ("base", "gaps.low", "1", "gaps.low_ms"),
        ("base", "units.more", "1", "no field config.units.more"),
    ],
)
def test_wrong_overrides_are_refused(name, field, text, says):
    with pytest.raises(configs.ConfigError) as error:
        configs.load(name, [(field, text)])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_overrides_do_not_leak_into_the_next_load():
    configs.load("base", [("epochs", "3"), ("loss.gap", "1")])
    assert configs.load("base").epochs == base.get_config().epochs and configs.load("base").loss.gap == 0


def test_arguments_become_overrides():
    arguments = ["--config.epochs=3", "--config.data_dir", "here", "--config.data_dir=a=b", "--config.loss.gap", "-1"]
    expected = [("epochs", "3"), ("data_dir", "here"), ("data_dir", "a=b"), ("loss.gap", "-1")]
    assert configs.split_overrides(arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.epochs"], "--config.epochs has no value; expected --config.epochs=VALUE"),
        (["--epochs=3"], "unknown argument '--epochs=3'; expected --config.FIELD=VALUE"),
        (["--config.epochs=3", "4"], "unknown argument '4'"),
    ],
)
def test_other_arguments_are_refused(arguments, says):
    with pytest.raises(configs.ConfigError, match=says.replace("(", r"\(")):
        configs.split_overrides(arguments)


# --------------------------------------------------------------------------------------------------------------------- files


def test_a_file_of_ones_own(tmp_path):
    """`from configs import base` works from any folder."""
    path = tmp_path / "mine.py"
    path.write_text("from configs import base\n\n\ndef get_config():\n    c = base.get_config()\n    c.units = 7\n    return c\n")
    config = configs.load(str(path), [("epochs", "1")])
    assert (config.units, config.epochs) == (7, 1) and config.is_locked


def test_a_file_of_the_package_by_its_path():
    assert configs.load(str(configs.HOME / "tiny.py")) == configs.load("tiny")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("av_mtl_s2", r"no config 'av_mtl_s2' \(did you mean av_mtl_s2s"),
        ("none.py", "no config 'none.py'.*expected one of .*tiny.*, or a .py file"),
        ("", "no config ''"),
    ],
)
def test_a_config_that_is_not_there(name, says):
    with pytest.raises(configs.ConfigError, match=says):
        configs.load(name)


def test_a_file_without_a_config(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(configs.ConfigError, match=r"empty.py has no get_config\(\); expected a function"):
        configs.load(str(tmp_path / "empty.py"))


def test_loading_needs_no_jax():
    code = "import sys, configs; [configs.load(n) for n in configs.names()]; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=configs.HOME.parent, check=True, timeout=60)
