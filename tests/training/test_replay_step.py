"""--replay: names the first value of a training step that is not finite, and repeats the step with its original numbers."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from avsi_jax.data import input_pipeline
from avsi_jax.runtime import devices
from avsi_jax.training import cli, replay_step, train_step
from avsi_jax.training.checkpoints import Checkpoints
from avsi_jax.training.optimiser import make_optimiser
from tests.support import nan_clips, step_batches
from tests.support.step_batches import arrays
from tests.support.tiny_runs import arguments

ROWS = [1, 2, 5, 6]  # of the batch of eight clips; one has no text, one has weight 0


@pytest.fixture
def compile_quickly():
    """compile_quickly(): from now on in this test, compiles without most optimisations, for programs that run only once."""
    yield lambda: jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def config(tiny_config):
    """The config of the session's run, so that compiled programs are shared."""
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


@pytest.mark.slow
def test_a_diagnosis_has_the_metrics_of_the_step(config, start, batch, compile_quickly):
    """To the rounding of float32, and each clip's share of them; nothing is reported as not finite."""
    compile_quickly()
    optimiser = make_optimiser(config, 2)
    step = devices.map_train_step(train_step.make_train_step(config, optimiser), parallel=devices.UNMAPPED)
    states, metrics = step_batches.run(step, arrays(batch), 2, start)
    diagnosis, expected = json.loads(json.dumps(replay_step.diagnose(config, None, states[0], batch))), metrics[1]
    assert diagnosis["step"] == 1 and replay_step.first_cause(diagnosis) == "step 1: everything is finite"
    loss = diagnosis["metrics"].pop("loss")
    assert diagnosis["metrics"] == pytest.approx(expected, rel=1e-5)
    assert loss == pytest.approx(expected["whole"] + 1e-3 * expected["ctc"], rel=1e-5)  # the weights of base.py
    clips = diagnosis["clips"]
    assert [c["clip_id"] for c in clips] == batch["clip_id"] and [c["weight"] for c in clips] == [1, 1, 0, 1]
    assert sum(c["loss"] for c in clips) == pytest.approx(loss)
    assert [c["terms"]["ctc"][1] for c in clips] == [1, 0, 0, 1]
    assert not any(c["not_finite"] for c in clips)
    assert not any(diagnosis[k] for k in ("batch", "params", "optimiser", "gradients"))


@pytest.mark.slow
def test_a_clip_with_nan_is_named(config, start, batch, compile_quickly):
    compile_quickly()
    batch = batch | {"landmarks": batch["landmarks"].copy()}
    batch["landmarks"][3, 10, 50] = np.nan
    diagnosis = replay_step.diagnose(config, None, start, batch)
    clip = batch["clip_id"][3]
    assert diagnosis["batch"] == {"landmarks": [clip]} and not diagnosis["params"] and diagnosis["gradients"]
    assert [c["clip_id"] for c in diagnosis["clips"] if c["not_finite"]] == [clip]
    not_finite = set(diagnosis["clips"][3]["not_finite"])
    assert {"feature video", "output level", "loss whole", "gradient"} <= not_finite
    assert "feature spectrogram" not in not_finite and math.isnan(diagnosis["metrics"]["loss"])
    assert replay_step.first_cause(diagnosis).endswith(f": landmarks of {clip} in the dataset")


def test_an_infinite_parameter_is_named(config, start, batch, compile_quickly):
    compile_quickly()
    params = jax.tree.map(np.copy, start.params)
    params["output"]["bias"][5] = np.inf
    diagnosis = replay_step.diagnose(config, None, start._replace(params=params), batch)
    assert diagnosis["params"] == ["output/bias"] and not diagnosis["batch"] and not diagnosis["optimiser"]
    assert all("output level" in c["not_finite"] and "feature video" not in c["not_finite"] for c in diagnosis["clips"])
    assert replay_step.first_cause(diagnosis).endswith(": parameters before the step (output/bias)")


def test_an_overflow_is_distinguished_from_values_that_were_not_finite_before():
    """By hand: finite features, and a loss that is not finite for two clips."""
    clips = [{"clip_id": i, "not_finite": n} for i, n in (("a", []), ("b", ["loss gap", "gradient"]), ("c", ["loss gap"]))]
    diagnosis = {"step": 9, "batch": {}, "params": [], "optimiser": [], "gradients": ["output/bias"], "clips": clips}
    assert replay_step.first_cause(diagnosis).endswith(": loss gap of b, c")
    diagnosis["optimiser"] = list("vwxyz")
    assert replay_step.first_cause(diagnosis).endswith(": optimiser state before the step (v, w, x and 2 more)")


# ---- a step of a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the session's run, with checkpoints of steps 2 and 4."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def nan_clip(tiny_dir, monkeypatch):
    """The id of a clip of the fifth step, the first of the third epoch, which gets NaN landmarks."""
    training = input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "train")
    clip = input_pipeline.clip_ids_of_step(training, 4, 0, 4)[2]
    nan_clips.put_nan(monkeypatch, clip)
    return clip


def content_of(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_step_that_is_not_finite_can_be_replayed(run, nan_clip, tiny_dir, compile_quickly, capsys):
    """File and message name step and clips, the replay names the clip."""
    assert cli.main(arguments(run, tiny_dir, epochs=3)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    facts = json.loads((run / "nonfinite.json").read_text())
    assert facts["step"] == 5 and nan_clip in facts["clip_ids"] and len(facts["clip_ids"]) == 4
    assert "is nan in epoch 3, step 5, of 4 clips" in message and "--replay=5" in message
    assert Checkpoints(run, read_only=True).latest_step() == 4
    before = content_of(run)
    compile_quickly()
    assert cli.main([*arguments(run, tiny_dir, epochs=3), "--replay=5"]) == 0
    assert f": landmarks of {nan_clip} in the dataset" in capsys.readouterr().err
    assert before == content_of(run), "a replay writes no files"


@pytest.mark.slow
def test_a_replay_with_debug_nans_ends_at_the_operation(run, nan_clip, tiny_dir, compile_quickly, monkeypatch, capsys):
    """Steps are not mapped, as in a training with config.debug_nans; after the diagnosis the traceback shows the first NaN."""
    modes, mapped = [], devices.map_train_step
    monkeypatch.setattr(devices, "map_train_step", lambda step, parallel: modes.append(parallel) or mapped(step, parallel=parallel))
    shutil.rmtree(run / "checkpoints" / "4")
    compile_quickly()
    assert cli.main([*arguments(run, tiny_dir, debug_nans=True), "--replay=5"]) == 2
    messages = capsys.readouterr().err
    assert "from the checkpoint of step 2: " in messages and modes == [devices.UNMAPPED]
    assert messages.index(f": landmarks of {nan_clip}") < messages.index("avsi_jax/data/features.py")
    assert messages.splitlines()[-1].startswith("avsi-train: invalid value (nan)")
    assert not jax.config.jax_debug_nans


@pytest.mark.slow
def test_a_replay_gives_the_original_numbers(run, tiny_dir, trained, compile_quickly, capsys):
    """Steps 3 and 4, repeated from the checkpoint of step 2, have the mean gradient norm of the second row of metrics.csv."""
    from avsi_jax.training.run_directory import read_rows

    shutil.rmtree(run / "checkpoints" / "4")
    compile_quickly()
    norms = []
    for step in (3, 4):
        assert cli.main([*arguments(run, tiny_dir), f"--replay={step}"]) == 0
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  grad_norm ")]
        norms.append(float(line.split()[1]))
    assert np.mean(norms) == pytest.approx(read_rows(trained / "metrics.csv")[1]["train_grad_norm"], rel=1e-4)


def test_a_replay_without_an_earlier_checkpoint_is_refused(run, tiny_dir, capsys):
    shutil.rmtree(run / "checkpoints" / "2")
    assert cli.main([*arguments(run, tiny_dir), "--replay=3"]) == 2
    assert "--replay=3: found checkpoints [4]" in capsys.readouterr().err
