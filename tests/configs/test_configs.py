"""Configs: all of them load, overrides keep the type of their field, and errors are one line that names the field."""

import functools
import json
import re
import subprocess
import sys

import ml_collections
import pytest

from avsi_jax import configs
from avsi_jax.configs import base

SYSTEM_CONFIGS = sorted(set(configs.names()) - {"base", "eval"})


# ----------------------------------------------------------------------------------------------------------- shipped configs


def test_names_lists_the_shipped_configs():
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
def test_a_training_config_has_the_fields_and_types_of_base(name):
    config, default = configs.load(name), base.get_config()
    assert configs.fields(config) == configs.fields(default)
    for field in configs.fields(default):
        assert type(leaf(config, field)) is type(leaf(default, field)), field


@pytest.mark.parametrize("name", SYSTEM_CONFIGS)
def test_a_config_is_named_after_its_system(name):
    from avsi_jax import presets
    from avsi_jax.models import systems

    config = configs.load(name)
    own = [system for system in systems.SYSTEMS if name == system or name.startswith(f"{system}_")]  # av_s2s_136: of av_s2s
    assert config.system == max(own, key=len, default="av_mtl_s2s")
    assert config.preset in presets.PRESETS


def test_every_system_has_a_config():
    from avsi_jax.models import systems

    assert set(systems.SYSTEMS) <= set(configs.names())


@pytest.mark.parametrize("name", ["base", "eval"])
def test_every_field_is_documented(name):
    """By a comment in its line, or in the line above."""
    lines = (configs.HOME / f"{name}.py").read_text().splitlines()
    for field in configs.fields(configs.load(name)):
        at = next(i for i, line in enumerate(lines) if f"config.{field} =" in line)
        assert "#" in lines[at] or lines[at - 1].strip().startswith("#"), f"config.{field} has no comment"


def leaf(config, field):
    for part in field.split("."):
        config = config[part]
    return config


# ----------------------------------------------------------------------------------------------------------------- overrides


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
def test_text_is_converted_to_the_type_of_the_field(name, field, text, expected):
    value = leaf(configs.load(name, [(field, text)]), field)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "field", "text", "message"),
    [
        ("base", "epochs", "2.5", "config.epochs: found '2.5', expected int such as 200"),
        ("base", "epochs", "many", "config.epochs: found 'many', expected int"),
        ("base", "epochs", "True", "config.epochs: found 'True', expected int"),
        ("base", "epochs", "", "config.epochs: found '', expected int"),
        ("base", "learning_rate", "1e-3,", "config.learning_rate: found '1e-3,', expected float"),
        ("base", "learning_rate", "__import__('os')", "expected float"),
        ("eval", "gap_ms", "longest", "config.gap_ms: found 'longest', expected tuple such as (1, 2)"),
        ("base", "batch_sise", "4", "no field config.batch_sise (did you mean batch_size"),
        ("base", "loss.gab", "1", "did you mean loss.gap"),
        ("base", "loss", "1", "no field config.loss "),
        ("base", "gaps.total_mean", "1", "gaps.total_mean_ms"),
        ("base", "units.more", "1", "no field config.units.more"),
    ],
)
def test_wrong_overrides_are_refused(name, field, text, message):
    with pytest.raises(configs.ConfigError) as error:
        configs.load(name, [(field, text)])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_overrides_do_not_leak_into_the_next_load():
    configs.load("base", [("epochs", "3"), ("loss.gap", "1")])
    assert configs.load("base").epochs == base.get_config().epochs and configs.load("base").loss.gap == 0


def test_arguments_are_split_into_overrides():
    arguments = ["--config.epochs=3", "--config.data_dir", "here", "--config.data_dir=a=b", "--config.loss.gap", "-1"]
    expected = [("epochs", "3"), ("data_dir", "here"), ("data_dir", "a=b"), ("loss.gap", "-1")]
    assert configs.split_overrides(arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.epochs"], "--config.epochs has no value; expected --config.epochs=VALUE"),
        (["--epochs=3"], "unknown argument '--epochs=3'; expected --config.FIELD=VALUE"),
        (["--config.epochs=3", "4"], "unknown argument '4'"),
    ],
)
def test_other_arguments_are_refused(arguments, message):
    with pytest.raises(configs.ConfigError, match=re.escape(message)):
        configs.split_overrides(arguments)


# ------------------------------------------------------------------------------------------------------------------ fidelity

FIDELITY = [("fidelity", "paper")]


def test_the_papers_fields_are_fields_of_base():
    default = base.get_config()
    assert set(configs.PAPER) <= set(configs.fields(default))
    for field, value in configs.PAPER.items():
        assert type(value) is type(leaf(default, field)), field
    ours = {field for field, value in configs.PAPER.items() if leaf(default, field) != value}
    stated = base.__doc__.split("Different are ")[1].split(".\n")[0]
    assert ours == set(stated.replace(" and ", ", ").split(", ")) and "output" in ours


@pytest.mark.parametrize("name", configs.PAPER_SYSTEMS)
def test_fidelity_sets_the_fields_of_the_papers_code_and_no_others(name):
    """The sizes that differ between systems are among the others."""
    paper, ours = configs.load(name, FIDELITY), configs.load(name)
    fixed = configs.PAPER if "mtl" in name else {k: v for k, v in configs.PAPER.items() if k != "loss.ctc"}  # no CTC head
    for field in configs.fields(ours):
        expected = fixed.get(field, "paper" if field == "fidelity" else leaf(ours, field))
        assert leaf(paper, field) == expected, field


def test_values_of_the_papers_code():
    """By hand: whole frames in 1 to 8 gaps of N(900, 300) ms in total, MSE over all frames, 0.001 CTC."""
    c = configs.load("av_mtl_s2s", FIDELITY)
    assert (c.preset, c.landmarks, c.motion, c.ctc_units, c.mask_input) == ("paper", "face", "pixels", "characters", False)
    assert (c.layers, c.units, c.bottleneck, c.output, c.dropout) == (3, 256, 136, "relu", 0.0)
    assert (c.gaps.protocol, c.gaps.max_count, c.gaps.total, c.gaps.total_mean_ms, c.gaps.total_std_ms) == (
        "paper",
        8,
        "normal",
        900.0,
        300.0,
    )
    assert (c.loss.kind, c.loss.whole, c.loss.gap, c.loss.ctc) == ("mse", 1.0, 0.0, 1e-3)
    assert (c.batch_size, c.learning_rate, c.clip_norm, c.plateau_factor, c.plateau_patience) == (32, 1e-3, 0.0, 0.1, 5)
    assert (c.interpolation, c.init, c.gaps.placement, c.gaps.fixed, c.adam_epsilon) == ("spline", "keras", "paper", True, 1e-7)
    assert (c.epochs, c.early_stop_patience, c.min_delta, c.monitor, c.schedule) == (200, 10, 1e-4, "val_loss", "plateau")
    assert configs.load("av_s2s", FIDELITY).bottleneck == 0
    assert not any(c.augment.values())


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("av_mtl_s2s", {"preset": "wide"}, "config.fidelity=paper: found preset='wide', the paper's code has 'paper'; "),
        (
            "av_mtl_s2s",
            {"output": "linear"},
            "found output='linear', the paper's code has 'relu'",
        ),  # base's own value, but set explicitly
        ("a_si", {"gaps.max_count": "4"}, "found gaps.max_count=4, the paper's code has 8"),
        ("av_si", {"augment.drop_video": "0.1"}, "found augment.drop_video=0.1, the paper's code has 0.0"),
        ("av_mtl_s2s_mouth", {}, "found landmarks='mouth', the paper's code has 'face'"),  # set by the config file
        ("av_mtl_s2s_phones", {}, "found ctc_units='phones'"),
        ("tiny", {}, "found layers=1, the paper's code has 3"),
        ("av_unified", {}, "av_unified is not in the paper; expected a_si, av_si"),
        ("morrone_av_mtl", {}, "morrone_av_mtl is not in the paper"),
        ("base", {"system": "v_s2s"}, "v_s2s is not in the paper"),
        ("base", {"fidelity": "papers"}, "config.fidelity: found 'papers', expected 'ours' or 'paper'"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_values_that_contradict_fidelity_are_refused(name, overrides, message, first):
    pairs = list(overrides.items())
    wanted = pairs if "fidelity" in overrides else FIDELITY + pairs if first else pairs + FIDELITY
    with pytest.raises(configs.ConfigError) as error:
        configs.load(name, wanted)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_values_that_agree_with_fidelity_or_are_not_part_of_it_are_kept():
    wanted = {
        "gaps.total_mean_ms": "900",
        "min_delta": "1e-4",
        "epochs": "3",
        "seed": "7",
        "data_dir": "there",
        "bottleneck": "136",
    }
    c = configs.load("av_s2s", [*wanted.items(), *FIDELITY])
    assert (c.gaps.total_mean_ms, c.min_delta, c.epochs, c.seed, c.data_dir, c.bottleneck) == (900.0, 1e-4, 3, 7, "there", 136)
    assert configs.load("av_s2s_136", FIDELITY).bottleneck == 136


# --------------------------------------------------------------------------------------------------------------- older runs

# The config fields of the first runs, listed by hand. A field that was added later must be listed in run_directory.LATER_FIELDS, or
# the config of those runs can't be read.
FIRST = """
system preset landmarks layers units bottleneck output lstm data_dir builder_config train_split validation_split gaps.protocol
gaps.max_count gaps.total gaps.total_mean_ms gaps.total_std_ms gaps.total_min_ms gaps.total_max_ms gaps.min_ms loss.kind
loss.whole loss.gap loss.ctc seed batch_size epochs learning_rate clip_norm schedule warmup_epochs monitor plateau_factor
plateau_patience early_stop_patience min_delta validate_every checkpoint_every keep""".split()


def test_the_config_of_the_first_runs_is_read_with_the_defaults_of_later_fields(tmp_path):
    """Their config.json lacks whole groups of fields and single fields of other groups."""
    from avsi_jax.training import run_directory

    default = json.loads(base.get_config().to_json())
    old = {}
    for field in FIRST:
        *groups, last = field.split(".")
        functools.reduce(lambda group, name: group.setdefault(name, {}), groups, old)[last] = leaf(default, field)
    assert "augment" not in old and "curriculum_steps" not in old["gaps"]
    old["gaps"]["max_count"], old["units"] = 3, 7
    (tmp_path / "config.json").write_text(json.dumps(old))
    expected = default | {"units": 7, "gaps": default["gaps"] | {"max_count": 3}}
    assert run_directory.read_config(tmp_path) == expected
    assert configs.fields(ml_collections.ConfigDict(expected)) and set(FIRST) < set(configs.fields(base.get_config()))


def test_an_older_run_resumes_if_the_new_fields_describe_it(tmp_path):
    from avsi_jax.training import run_directory

    old = json.loads(base.get_config().to_json())
    del old["augment"], old["fidelity"], old["gaps"]["curriculum_steps"], old["loss"]["near_frames"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "metrics.csv").write_text("step\n")
    run_directory.check_config(configs.load("base"), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="augment: .*'drop_video': 0.0.* there, .*'drop_video': 0.1.* here"):
        run_directory.check_config(configs.load("base", [("augment.drop_video", "0.1")]), tmp_path)


def test_existing_fields_of_a_run_are_kept(tmp_path):
    from avsi_jax.training import run_directory

    config = configs.load("av_unified", [("augment.speed", "0.1"), ("gaps.curriculum_steps", "5")])
    (tmp_path / "config.json").write_text(config.to_json())
    assert run_directory.read_config(tmp_path) == json.loads(config.to_json())


# --------------------------------------------------------------------------------------------------------------------- files


def test_a_users_own_config_file(tmp_path):
    """It can import avsi_jax.configs from any folder."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from avsi_jax.configs import base\n\n\ndef get_config():\n    c = base.get_config()\n    c.units = 7\n    return c\n"
    )
    config = configs.load(str(path), [("epochs", "1")])
    assert (config.units, config.epochs) == (7, 1) and config.is_locked


def test_a_shipped_config_can_be_loaded_by_its_path():
    assert configs.load(str(configs.HOME / "tiny.py")) == configs.load("tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("av_mtl_s2", r"no config 'av_mtl_s2' \(did you mean av_mtl_s2s"),
        ("none.py", "no config 'none.py'.*expected one of .*tiny.*, or a .py file"),
        ("", "no config ''"),
    ],
)
def test_a_missing_config_is_an_error(name, message):
    with pytest.raises(configs.ConfigError, match=message):
        configs.load(name)


def test_a_file_without_get_config_is_an_error(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(configs.ConfigError, match=r"empty.py has no get_config\(\)"):
        configs.load(str(tmp_path / "empty.py"))


def test_loading_needs_neither_jax_nor_numpy():
    code = (
        "import sys; from avsi_jax import configs; [configs.load(n) for n in configs.names()]; "
        "assert not {'jax', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
