"""avsi-train from end to end on the tiny dataset: files, resume, errors, command line, and learning rate schedule."""

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avsi_jax import configs
from avsi_jax.models import build
from avsi_jax.runtime import goodput
from avsi_jax.training import cli, run_directory, train_step
from avsi_jax.training.optimiser import make_optimiser
from tests.support import nan_clips, tiny_runs

ROOT = Path(__file__).resolve().parents[2]


def metrics_of(folder) -> list[dict]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def params_of(folder, which="last"):
    """Parameters of a checkpoint."""
    from avsi_jax.inference.restorer import Restorer

    return Restorer.from_workdir(folder, which).params


def assert_same_tree(a, b):
    import jax

    jax.tree.map(np.testing.assert_array_equal, a, b)


# --------------------------------------------------------------------------------------------------------------- written files


def test_metrics_has_a_row_for_every_epoch(trained):
    rows = metrics_of(trained)
    assert [(row["step"], row["epoch"]) for row in rows] == [("2", "1"), ("4", "2")]  # 9 clips in batches of 4: 2 steps per epoch
    terms = {"loss", "whole", "gap", "ctc", "ctc_infeasible", "gap_l1_db"}
    others = {"step", "epoch", "lr", "lr_scale", "train_grad_norm", "val_cer"}
    assert set(rows[0]) == others | {f"{s}_{t}" for s in ("train", "val") for t in terms}
    for row in rows:
        values = {k: float(v) for k, v in row.items()}
        assert all(map(math.isfinite, values.values()))
        for s in ("train", "val"):  # base.py: whole-clip MSE + 0.001 CTC
            assert values[f"{s}_loss"] == pytest.approx(values[f"{s}_whole"] + 1e-3 * values[f"{s}_ctc"], rel=1e-6)
            assert 0 < values[f"{s}_gap_l1_db"] < 80
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])


def test_timing_has_a_row_for_every_epoch(trained):
    with (trained / "timing.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = ["step", "steps_per_s", "clips_per_s", "waiting_share", "epoch_s", "peak_rss_mb", "device_mb", "goodput"]
    assert list(rows[0]) == [*measured, *(f"{cause}_s" for cause in goodput.CAUSES)]
    for row in rows:
        values = {k: float(v) for k, v in row.items()}
        spent = {cause: values[f"{cause}_s"] for cause in goodput.CAUSES}
        assert values["goodput"] == pytest.approx(spent["step"] / sum(spent.values()), abs=1e-3) and spent["lost"] == 0
        assert spent["compile"] > 0 and spent["validation"] > 0
        assert values["clips_per_s"] == pytest.approx(4 * values["steps_per_s"], rel=0.05, abs=0.02)
        assert 0 <= values["waiting_share"] <= 1 and values["epoch_s"] > 0 and values["peak_rss_mb"] > 100


def test_config_and_run_are_written(trained, tiny_config, tiny_dir):
    import jax

    assert json.loads((trained / "config.json").read_text()) == json.loads(tiny_config().to_json())
    run = json.loads((trained / "run.json").read_text())
    assert run["versions"]["jax"] == jax.__version__ and run["processes"] == 1 and len(run["devices"]) == 4
    assert run["parameters"] == build.parameter_count(tiny_config())
    (version,) = (tiny_dir / "grid" / "speaker_independent").iterdir()
    assert run["dataset"]["clips"] == {"train": 9, "validation": 3} and run["dataset"]["version"] == version.name
    assert run["revision"]


@pytest.mark.slow
def test_a_validation_can_be_repeated(trained, tiny_config):
    """Gaps depend on the clip ids alone: the last checkpoint gives the numbers of the last row, also in another order of clips."""
    import jax

    from avsi_jax.data import input_pipeline
    from avsi_jax.runtime import devices

    config = tiny_config()
    records = input_pipeline.Records(input_pipeline.find_dataset(config.data_dir), "validation")
    (batch,) = input_pipeline.eval_batches(records, 4)
    reversed_batch = {k: v[::-1].copy() for k, v in batch.items() if isinstance(v, np.ndarray)}
    step, means = devices.map_evaluation_step(train_step.make_validation_step(config), per_clip=True), train_step.Means()
    sums, clips = step(devices.replicate(params_of(trained)), devices.split(reversed_batch))
    means.add(jax.device_get(sums))
    means.add(train_step.transcript_errors(config, reversed_batch, clips))
    again, last = means.result(config, "val"), metrics_of(trained)[-1]
    assert again == pytest.approx({k: float(last[k]) for k in again}, rel=1e-5)


# --------------------------------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def stopped(tiny_config, tmp_path_factory):
    """The workdir of a run of one epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    cli.train(tiny_config(epochs=1), folder)
    return folder


@pytest.fixture
def halfway(stopped, tmp_path):
    """A copy of it, for a test to resume."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_a_resumed_run_equals_an_uninterrupted_one(trained, halfway, tiny_config, capsys):
    """Also if it was killed between the row and the checkpoint of an epoch: rows after the checkpoint are written again."""
    with (halfway / "metrics.csv").open("a") as file:
        file.write("4,2" + ",0.5" * 12 + "\n")
    last = cli.train(tiny_config(epochs=2), halfway)
    assert "resumed at step 2, epoch 1" in capsys.readouterr().err
    assert (halfway / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()
    assert_same_tree(params_of(halfway), params_of(trained))
    assert_same_tree(params_of(halfway, "2"), params_of(trained, "2"))  # saved while training continued
    assert last["epoch"] == 2 and len((halfway / "timing.csv").read_text().splitlines()) == 3


def test_a_finished_run_is_not_changed(trained, tiny_config, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    row = cli.train(tiny_config(), folder)
    assert row["epoch"] == 2 and row["val_loss"] == float(metrics_of(trained)[-1]["val_loss"])
    for name in ("metrics.csv", "timing.csv"):
        assert (folder / name).read_bytes() == (trained / name).read_bytes()


def test_another_config_is_an_error_that_lists_its_fields(halfway, tiny_config):
    before = (halfway / "config.json").read_bytes()
    with pytest.raises(ValueError, match="another config") as error:
        cli.train(tiny_config(learning_rate=0.01, loss__gap=1), halfway)
    message = str(error.value)
    assert "learning_rate: 0.001 there, 0.01 here" in message and "loss" in message and "--workdir" in message
    assert "\n" not in message and "epochs" not in message and "batch_size" not in message
    assert (halfway / "config.json").read_bytes() == before


def test_a_failed_start_does_not_block_its_workdir(tiny_config, tmp_path):
    """After an error in the config another one can be used without deleting anything."""
    with pytest.raises(ValueError, match="schedule"):
        cli.train(tiny_config(schedule="cosinus"), tmp_path / "run")
    run_directory.check_config(tiny_config(), tmp_path / "run")


def test_a_run_older_than_a_config_field_resumes_with_its_default(halfway, tiny_config):
    config = json.loads((halfway / "config.json").read_text())
    del config["motion"]
    (halfway / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="motion: 'pixels' there, 'standardised' here"):
        run_directory.check_config(tiny_config(motion="standardised"), halfway)
    run_directory.check_config(tiny_config(), halfway)
    assert json.loads((halfway / "config.json").read_text())["motion"] == "pixels"


def test_rows_keep_the_columns_of_an_existing_file(tmp_path):
    """Unknown columns are left out, missing ones are nan."""
    path = tmp_path / "metrics.csv"
    run_directory.add_row(path, {"step": 1, "train_loss": 0.5, "old": 2})
    run_directory.add_row(path, {"step": 2, "train_ctc_infeasible": 0.25, "train_loss": 0.4})
    first, second = run_directory.read_rows(path)
    assert first == {"step": 1, "train_loss": 0.5, "old": 2}
    assert (second["step"], second["train_loss"]) == (2, 0.4) and np.isnan(second["old"]) and len(second) == 3


# ---------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"batch_size": 6}, ValueError, r"batch_size 6 is not divisible by the 4 devices"),
        ({"batch_size": 12}, ValueError, r"train holds 9 clips, fewer than config.batch_size=12"),
        ({"monitor": "loss"}, ValueError, r"config.monitor: found 'loss', expected val_loss or"),
        ({"schedule": "cosinus"}, ValueError, r"config.schedule: found 'cosinus', expected 'plateau' or 'cosine'"),
        ({"system": "av_mtl"}, ValueError, r"unknown system 'av_mtl'; expected one of"),
        ({"preset": "papre"}, ValueError, r"unknown preset 'papre'; expected one of paper"),
        ({"lstm": "fused"}, ValueError, r"lstm: found 'fused', expected one of"),
        ({"motion": "pixel"}, ValueError, r"config.motion: found 'pixel', expected 'pixels', 'standardised' or 'pose'"),
        ({"landmarks": "nose"}, ValueError, r"landmarks: found 'nose', expected"),
        ({"loss__kind": "mae"}, ValueError, r"loss.kind: found 'mae', expected 'mse' or 'l1'"),
        ({"gaps__total": "poisson"}, ValueError, r"gaps.total: found 'poisson', expected"),
        ({"gaps__protocol": "wave"}, ValueError, r"protocol: found 'wave', expected"),
        ({"train_split": "training"}, ValueError, r"no split 'training' in .*found test, train, validation"),
        ({"data_dir": "nowhere"}, ValueError, r"no records in .*nowhere.*avsi-prepare"),
    ],
)
def test_a_config_that_cannot_be_trained_is_an_error(tiny_config, tmp_path, fields, error, message):
    with pytest.raises(error, match=message) as caught:
        cli.train(tiny_config(**fields), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_ends_the_run(tiny_config, tmp_path, monkeypatch):
    """With NaN landmarks: an error of one line, and no checkpoint of the result."""
    from avsi_jax.training import checkpoints

    nan_clips.put_nan(monkeypatch)
    with pytest.raises(FloatingPointError, match="nan in epoch 1") as error:
        cli.train(tiny_config(), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert checkpoints.Checkpoints(tmp_path / "run", read_only=True).latest_step() is None


def test_parameters_that_are_not_finite_after_the_last_step_are_not_saved(tiny_config, tmp_path, monkeypatch):
    """The losses of an epoch are those before each step: only the validation sees the result of the last step."""
    import jax

    from avsi_jax.runtime import devices
    from avsi_jax.training import checkpoints

    map_train_step, steps = devices.map_train_step, []

    def map_exploding_step(step, **options):
        run = map_train_step(step, **options)

        def explode_at_the_second_step(state, batch):
            state, metrics = run(state, batch)
            steps.append(1)
            return state._replace(params=jax.tree.map(lambda p: p * np.nan if len(steps) == 2 else p, state.params)), metrics

        return explode_at_the_second_step

    monkeypatch.setattr(devices, "map_train_step", map_exploding_step)
    with pytest.raises(FloatingPointError, match="nan in .*epoch 1"):
        cli.train(tiny_config(epochs=1), tmp_path / "run")
    assert checkpoints.Checkpoints(tmp_path / "run", read_only=True).latest_step() is None


def test_a_run_stopped_by_ctrl_c_keeps_its_checkpoints_and_resumes(trained, tiny_dir, tmp_path, monkeypatch, capsys):
    """In the second epoch, while the checkpoint of the first one is still being written."""
    from avsi_jax.training import checkpoints, progress_log

    def stop_in_the_second_epoch(_, epoch, *__):
        if epoch == 2:
            raise KeyboardInterrupt

    arguments = tiny_runs.arguments(tmp_path / "run", tiny_dir)
    with monkeypatch.context() as patched:
        patched.setattr(progress_log.Console, "progress", stop_in_the_second_epoch)
        try:
            code = cli.main(arguments)
        except KeyboardInterrupt:  # would end pytest
            code = None
    assert code == 130
    assert "avsi-train: stopped; " in capsys.readouterr().err.splitlines()[-1]
    assert checkpoints.Checkpoints(tmp_path / "run", read_only=True).latest_step() == 2
    assert cli.main(arguments) == 0
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()


# -------------------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(("name", "parameters"), [("a_si", 3_840_064), ("av_mtl_s2s", 8_148_802)])
def test_show_needs_no_data(name, parameters, capsys):
    """The numbers of parameters are those of the paper."""
    assert cli.main([f"--config={name}", "--show"]) == 0
    out = capsys.readouterr().out
    assert f"parameters: {parameters}\n" in out and "hop: 160" in out and "learning_rate: 0.001" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no --workdir given"),
        (["--config=av_mtl_s2", "--show"], "did you mean av_mtl_s2s"),
        (["--workdir={tmp}/run", "--config.epoch=1"], "no field config.epoch (did you mean epochs"),
        (["--workdir={tmp}/run", "--epochs=1"], "unknown argument '--epochs=1'"),
        (["--workdir={tmp}/run", "--config=tiny", "--config.data_dir={tmp}"], "no records in {tmp}/grid/speaker_independent"),
        (["--workdir={tmp}/run", "--config=tiny"], "config.data_dir"),
        (["--workdir={tmp}/run", "--config=eval", "--config.data_dir={tmp}"], "eval"),
    ],
)
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main([a.format(tmp=tmp_path) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("avsi-train: ") and err.count("\n") == 1 and message.format(tmp=tmp_path) in err


WITHOUT_TENSORFLOW = """
import importlib.machinery, sys

class NoTensorflow:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "tensorflow" else None

    def create_module(self, spec):
        raise ImportError("tensorflow was imported")

sys.meta_path.insert(0, NoTensorflow())
from avsi_jax.training import cli
code = cli.main(sys.argv[1:])
assert "tensorflow" not in sys.modules
sys.exit(code)
"""


@pytest.mark.slow
def test_training_needs_no_tensorflow(tiny_dir, tmp_path):
    """In a process of its own, as for a user; without a terminal no progress line is printed."""
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, *tiny_runs.arguments(tmp_path / "run", tiny_dir, epochs=1)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "9 clips to train on, 3 to validate, 2 steps per epoch of 4" in done.stderr
    assert "epoch 1/1" in done.stderr and "done: best val_loss" in done.stderr and "\r" not in done.stderr
    assert len(metrics_of(tmp_path / "run")) == 1


def test_help_imports_no_heavy_libraries():
    command = [sys.executable, "-X", "importtime", "-m", "avsi_jax.train", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--config.FIELD=VALUE" in done.stdout and "av_mtl_s2s" in done.stdout
    assert not {"jax", "numpy", "flax"} & {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}


# -------------------------------------------------------------------------------------------------------------------- schedule

# Keras 3, ReduceLROnPlateau(factor=0.1, patience=2, min_delta=0.01) and EarlyStopping(patience=4, min_delta=0.01): a loss is a gain
# if it is below the best one by more than min_delta, and only then becomes the best one. The learning rate is reduced in the epoch
# that completes the patience, and the count starts again; training stops when the other patience is complete.
BY_HAND = [  # loss, factor of the learning rate after it, whether training stops
    (1.000, 1.0, False),  # gain, the first one
    (0.900, 1.0, False),  # gain
    (0.895, 1.0, False),  # 1 without gain: not below 0.89
    (0.891, 0.1, False),  # 2: reduced; the best is still 0.900
    (0.885, 0.1, False),  # gain: 0.015 below 0.900
    (0.880, 0.1, False),  # 1
    (0.900, 0.01, False),  # 2: reduced
    (0.877, 0.01, False),  # 3 (1 since the reduction)
    (float("nan"), 0.001, True),  # 4: reduced again, and stopped
]


def schedule_config(**fields):
    fields = {"plateau_patience": 2, "early_stop_patience": 4, "min_delta": 0.01} | fields
    return configs.load("tiny", [(k, str(v)) for k, v in fields.items()])


def test_plateau_and_early_stopping_follow_the_rules_of_keras():
    progress = cli.Progress(schedule_config())
    for epoch, (loss, scale, stops) in enumerate(BY_HAND, 1):
        assert progress.update(epoch, loss) is stops, epoch
        assert progress.lr_scale == pytest.approx(scale), epoch
    assert (progress.best, progress.best_epoch) == (0.885, 5)


@pytest.mark.slow  # imports tensorflow
def test_keras_gives_the_same_schedule():
    keras = pytest.importorskip("keras")
    plateau = keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.1, patience=2, min_delta=0.01, min_lr=0)
    stop = keras.callbacks.EarlyStopping("val_loss", patience=4, min_delta=0.01)

    class Model:
        stop_training = False
        optimizer = type("Optimizer", (), {"learning_rate": keras.Variable(1.0)})()

    for callback in (plateau, stop):
        callback.set_model(model := Model)
        callback.on_train_begin()
    for epoch, (loss, scale, stops) in enumerate(BY_HAND):
        for callback in (plateau, stop):
            callback.on_epoch_end(epoch, {"val_loss": loss})
        assert float(model.optimizer.learning_rate) == pytest.approx(scale) and model.stop_training is stops, epoch


def test_progress_can_be_saved_and_restored():
    uninterrupted, saved = cli.Progress(schedule_config()), cli.Progress(schedule_config())
    for epoch, (loss, _, _) in enumerate(BY_HAND, 1):
        expected = uninterrupted.update(epoch, loss)
        restored = cli.Progress(schedule_config())
        restored.load(json.loads(json.dumps(saved.save())))
        assert restored.update(epoch, loss) is expected and restored.save() == uninterrupted.save()
        saved = restored


def test_early_stopping_and_plateau_can_be_turned_off():
    progress = cli.Progress(schedule_config(early_stop_patience=0, schedule="cosine"))
    assert not any(progress.update(epoch, 1.0) for epoch in range(1, 40)) and progress.lr_scale == 1


@pytest.mark.slow
def test_a_run_without_gain_reduces_the_rate_and_stops_early(tiny_config, tmp_path):
    """No gain from epoch 2 on: the rate is reduced after epochs 2 and 3, and the run stops after 3 of 9."""
    fields = {"epochs": 9, "min_delta": 100, "plateau_patience": 1}
    cli.train(tiny_config(**fields, early_stop_patience=2), tmp_path / "run")
    rows = metrics_of(tmp_path / "run")
    assert [float(r["lr_scale"]) for r in rows] == pytest.approx([1, 0.1, 0.01])
    resumed = cli.train(tiny_config(**fields | {"epochs": 4}, early_stop_patience=5), tmp_path / "run")
    assert resumed["epoch"] == 4, "with more patience it continues"


@pytest.mark.slow
def test_lr_scale_multiplies_the_update(tiny_config):
    """With 0 nothing is trained."""
    import jax

    from avsi_jax.data import input_pipeline
    from avsi_jax.runtime import devices

    config = tiny_config()
    records = input_pipeline.Records(input_pipeline.find_dataset(config.data_dir), "train")
    batch = devices.split(next(input_pipeline.train_batches(records, 4, seed=0)))
    step = devices.map_train_step(train_step.make_train_step(config, make_optimiser(config, 2)))
    start = jax.device_get(train_step.init_state(config, 2))
    unchanged, moved = (step(devices.replicate(start._replace(lr_scale=np.float32(scale))), batch)[0] for scale in (0, 1))
    assert_same_tree(unchanged.params, start.params)
    # Adam's first step is the learning rate, whatever the size of the gradient (Kingma & Ba 2015, section 2.1)
    largest = max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(moved.params), jax.tree.leaves(start.params), strict=True))
    assert largest == pytest.approx(config.learning_rate, rel=1e-3)


# -------------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.timeout(3600)  # 4 minutes on two idle cores
def test_the_full_network_overfits_eight_clips(grid_dir, tmp_path):
    """300 steps on real clips with the learning rate and gaps of its config: the MSE in the gap falls below a tenth."""
    import jax

    from avsi_jax.data import input_pipeline
    from avsi_jax.runtime import devices

    raw = tmp_path / "raw"
    clips = sorted((grid_dir / "s1").glob("*.mpg"))[:8]
    for clip in clips:
        align = grid_dir / "alignments" / "s1" / f"{clip.stem}.align"
        for source, target in ((clip, raw / "s1" / clip.name), (align, raw / "alignments" / "s1" / align.name)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    prepare = [sys.executable, "-m", "tfds_grid.prepare", f"--raw={raw}", f"--data_dir={tmp_path / 'data'}", "--full_train"]
    subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True, timeout=300)
    records = input_pipeline.Records(input_pipeline.find_dataset(tmp_path / "data"), "train")
    batch = next(input_pipeline.eval_batches(records, 8))

    config = configs.load("av_mtl_s2s", [("batch_size", "8")])
    state = devices.replicate(train_step.init_state(config, 1))
    step = devices.map_train_step(train_step.make_train_step(config, make_optimiser(config, 1)))
    shares, gap = devices.split(batch), []
    for _ in range(300):
        state, metrics = step(state, shares)
        jax.block_until_ready((state, metrics))
        gap.append(float(metrics["gap"][0] / metrics["gap"][1]))
    print(f"gap MSE: {gap[0]:.4f} at the start, {np.mean(gap[-20:]):.4f} in the last 20 of 300 steps")
    assert np.mean(gap[-20:]) < 0.1 * gap[0]
