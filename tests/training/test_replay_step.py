"""Why a step came to no number: a clip, a parameter, a gradient by name; and a run's step done again, with its own numbers."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from avsi_jax.data import input_pipeline
from avsi_jax.runtime import devices
from avsi_jax.training import cli, objective, replay_step, train_step
from avsi_jax.training.checkpoints import Checkpoints
from tests.support import step_batches
from tests.support.step_batches import arrays
from tests.support.tiny_runs import arguments

ROWS = [1, 2, 5, 6]  # of the eight clips: one has no text, one doesn't count


@pytest.fixture
def quickly():
    """quickly(): what is compiled from now on in a test, in half the time, which goes into making fast what runs once here."""
    yield lambda: jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def config(tiny_config):
    """The run's: what is compiled for one is compiled for the other."""
    return tiny_config()


@pytest.fixture(scope="module")
def batch():
    eight = step_batches.make_batch()
    return {k: v[ROWS] for k, v in arrays(eight).items()} | {"clip_id": [eight["clip_id"][i] for i in ROWS]}


@pytest.fixture(scope="module")
def start(config):
    """The state before the first step."""
    return jax.device_get(train_step.init_state(config, 2))


# ---- one step, clip by clip ----------------------------------------------------------------------------------------------------


def test_a_diagnosis_is_of_the_step_itself(config, start, batch, quickly):
    """Nothing wrong with it: the same metrics, to float32's rounding, and each clip's part of them."""
    quickly()
    step = devices.map_train_step(train_step.make_train_step(config, objective.make_optimiser(config, 2)), how=devices.UNMAPPED)
    states, metrics = step_batches.run(step, arrays(batch), 2, start)
    found, expected = json.loads(json.dumps(replay_step.diagnose(config, None, states[0], batch))), metrics[1]
    assert found["step"] == 1 and replay_step.why(found) == "step 1: everything is finite"
    loss = found["metrics"].pop("loss")
    assert found["metrics"] == pytest.approx(expected, rel=1e-5)
    assert loss == pytest.approx(expected["whole"] + 1e-3 * expected["ctc"], rel=1e-5)  # base.py
    assert [c["clip_id"] for c in found["clips"]] == batch["clip_id"] and [c["weight"] for c in found["clips"]] == [1, 1, 0, 1]
    assert sum(c["loss"] for c in found["clips"]) == pytest.approx(loss)
    assert [c["terms"]["ctc"][1] for c in found["clips"]] == [1, 0, 0, 1]
    assert not any(c["not_finite"] for c in found["clips"])
    assert not any(found[k] for k in ("batch", "params", "optimiser", "gradients"))


def test_a_poisoned_clip_is_named(config, start, batch, quickly):
    quickly()
    poisoned = batch | {"landmarks": batch["landmarks"].copy()}
    poisoned["landmarks"][3, 10, 50] = np.nan
    found = replay_step.diagnose(config, None, start, poisoned)
    clip = batch["clip_id"][3]
    assert found["batch"] == {"landmarks": [clip]} and not found["params"] and found["gradients"]
    assert [c["clip_id"] for c in found["clips"] if c["not_finite"]] == [clip]
    assert {"feature video", "output level", "loss whole", "gradient"} <= set(found["clips"][3]["not_finite"])
    assert "feature spectrogram" not in found["clips"][3]["not_finite"] and math.isnan(found["metrics"]["loss"])
    assert replay_step.why(found) == f"step 0: not finite first of all: landmarks of {clip} in the dataset"


def test_an_endless_parameter_is_named(config, start, batch, quickly):
    quickly()
    broken = jax.tree.map(np.copy, start.params)
    broken["output"]["bias"][5] = np.inf
    found = replay_step.diagnose(config, None, start._replace(params=broken), batch)
    assert found["params"] == ["output/bias"] and not found["batch"] and not found["optimiser"]
    assert all("output level" in c["not_finite"] and "feature video" not in c["not_finite"] for c in found["clips"])
    assert replay_step.why(found) == "step 0: not finite first of all: parameters before the step (output/bias)"


def test_what_overflows_on_the_way_is_told_from_what_was_broken():
    """By hand: features that are fine, a loss that is not, in two clips."""
    clips = [{"clip_id": i, "not_finite": n} for i, n in (("a", []), ("b", ["loss gap", "gradient"]), ("c", ["loss gap"]))]
    found = {"step": 9, "batch": {}, "params": [], "optimiser": [], "gradients": ["output/bias"], "clips": clips}
    assert replay_step.why(found) == "step 9: not finite first of all: loss gap of b, c"
    found["optimiser"] = list("vwxyz")
    assert replay_step.why(found) == "step 9: not finite first of all: the optimiser's state before the step (v, w, x and 2 more)"


# ---- a run's step --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the session's two epochs: checkpoints of steps 2 and 4."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def victim(tiny_dir, monkeypatch):
    """A clip of the fifth step, the third epoch's first, whose points are no numbers."""
    honest = input_pipeline.to_example
    training = input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "train")
    found = input_pipeline.clip_ids_of_step(training, 4, 0, 4)[2]

    def poisoned(raw):
        example = honest(raw)
        if example["clip_id"] == found:
            example["landmarks"][3, 50] = np.nan
        return example

    monkeypatch.setattr(input_pipeline, "to_example", poisoned)
    return found


def content_of(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_step_to_nowhere_can_be_replayed(run, victim, tiny_dir, quickly, capsys):
    """File and message name step and clips, a replay names the clip."""
    assert cli.main(arguments(run, tiny_dir, epochs=3)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    found = json.loads((run / "nonfinite.json").read_text())
    assert found["step"] == 5 and victim in found["clip_ids"] and len(found["clip_ids"]) == 4
    assert "is nan in epoch 3, step 5, of 4 clips" in said and "--replay=5" in said
    assert Checkpoints(run, read_only=True).latest_step() == 4
    before = content_of(run)
    quickly()
    assert cli.main([*arguments(run, tiny_dir, epochs=3), "--replay=5"]) == 0
    assert f"step 5: not finite first of all: landmarks of {victim} in the dataset" in capsys.readouterr().err
    assert before == content_of(run), "a replay writes nothing"


@pytest.mark.slow
def test_a_replay_that_debugs_ends_at_the_operation(run, victim, tiny_dir, quickly, monkeypatch, capsys):
    """config.debug_nans: the steps on the way are those of a training that debugs, not mapped; all is told as without it, and then
    where in the code the first NaN came from.
    """
    ways, mapped = [], devices.map_train_step
    monkeypatch.setattr(devices, "map_train_step", lambda step, how: ways.append(how) or mapped(step, how=how))
    shutil.rmtree(run / "checkpoints" / "4")
    quickly()
    assert cli.main([*arguments(run, tiny_dir, debug_nans=True), "--replay=5"]) == 2
    said = capsys.readouterr().err
    assert "from the checkpoint of step 2, 2 steps on to step 5" in said and ways == [devices.UNMAPPED]
    diagnosis, line = said.index(f"step 5: not finite first of all: landmarks of {victim}"), said.index("avsi_jax/features.py")
    assert diagnosis < line and said.splitlines()[-1].startswith("avsi-train: invalid value (nan)")
    assert not jax.config.jax_debug_nans


def test_a_replay_gives_the_step_s_own_numbers(run, tiny_dir, trained, quickly, capsys):
    """From the checkpoint of step 2 on, step 3 again: with step 4 it makes the second row of metrics.csv."""
    from avsi_jax.training.run_directory import read_rows

    shutil.rmtree(run / "checkpoints" / "4")
    quickly()
    norms = []
    for step in (3, 4):
        assert cli.main([*arguments(run, tiny_dir), f"--replay={step}"]) == 0
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  grad_norm ")]
        norms.append(float(line.split()[1]))
    assert np.mean(norms) == pytest.approx(read_rows(trained / "metrics.csv")[1]["train_grad_norm"], rel=1e-4)


def test_a_replay_without_a_checkpoint_before_it(run, tiny_dir, capsys):
    shutil.rmtree(run / "checkpoints" / "2")
    assert cli.main([*arguments(run, tiny_dir), "--replay=3"]) == 2
    assert "--replay=3: found checkpoints [4]" in capsys.readouterr().err
