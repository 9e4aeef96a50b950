"""What training and repair make of the statistics of a dataset: what is read is standard, what comes out is of true levels."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from avsi_jax import presets
from avsi_jax.data import features, input_pipeline, train_statistics
from avsi_jax.data.train_statistics import StatisticsError
from avsi_jax.models import build
from avsi_jax.training import cli, objective, run_directory

pytestmark = pytest.mark.usefixtures("quickly_compiled")

PAPER, WIDE, MORRONE = (presets.get(name) for name in ("paper", "wide", "morrone"))

# ---- a dataset -----------------------------------------------------------------------------------------------------------------


def copy_of(tiny_dir, folder, statistics):
    """config.data_dir of a copy of the tiny dataset whose metadata hold the statistics, or none."""
    home = input_pipeline.find_dataset(shutil.copytree(tiny_dir, folder / "data"))
    metadata = json.loads((home / "metadata.json").read_text())
    metadata.pop("train_statistics", None)
    (home / "metadata.json").write_text(json.dumps(metadata | ({"train_statistics": statistics} if statistics else {})))
    return folder / "data"


@pytest.fixture(scope="module")
def train_records(tiny_dir):
    records = input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "train")
    return [records[i] for i in range(len(records))]


@pytest.fixture(scope="module")
def statistics(train_records):
    return train_statistics.finish(functools.reduce(train_statistics.add, map(train_statistics.clip_sums, train_records)))


@pytest.fixture(scope="module")
def data_dir(tiny_dir, statistics, tmp_path_factory):
    return copy_of(tiny_dir, tmp_path_factory.mktemp("with_statistics"), statistics)


@pytest.fixture(scope="module")
def wide_config(tiny_config, data_dir):
    """wide_config(**fields): a quick run that needs statistics of its level; system="av_mtl_s2s": of motion too."""
    wanted = {"data_dir": data_dir, "system": "a_si", "preset": "wide", "motion": "standardised", "epochs": 1}
    return lambda **fields: tiny_config(**wanted | fields)


def batch_of(records):
    examples = [input_pipeline.to_example(r) for r in records]
    return {k: np.stack([e[k] for e in examples]) for k in examples[0] if k != "clip_id"}


@pytest.mark.parametrize("landmarks", ["face", "mouth"])
@pytest.mark.parametrize("preset", [WIDE, MORRONE, PAPER], ids=lambda s: s.name)
def test_the_train_split_is_standard_after_it(wide_config, data_dir, train_records, preset, landmarks):
    """Mean 0 and standard deviation 1: of every bin on the linear scale, of all bands together on the mel, of every coordinate."""
    levels = "standardised" if preset is PAPER else "preset"
    config = wide_config(preset=preset.name, levels=levels, landmarks=landmarks, system="av_mtl_s2s")
    normalisation = build.read_normalisation(config, input_pipeline.find_dataset(data_dir))
    feature_config = build.make_feature_config(config, normalisation)
    no_gap = np.zeros((len(train_records), 1, 2), np.int32)
    seen = jax.jit(features.make_features, static_argnums=2)(batch_of(train_records), no_gap, feature_config)
    valid = np.asarray(seen.valid)
    assert not valid.all(), "one in three of these clips is short"
    level, video = (np.asarray(x)[valid].astype(np.float64) for x in (seen.target, seen.video))
    level = level if preset is MORRONE else level.reshape(-1, 1)
    assert video.shape[1] == {"face": 136, "mouth": 40}[landmarks]
    for values in (level, video):
        np.testing.assert_allclose(values.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(values.std(0), 1, atol=1e-4)


def test_what_needs_no_statistics_reads_none(tiny_config, tmp_path):
    for fields in ({}, {"motion": "standardised", "system": "a_si"}):
        assert build.read_normalisation(tiny_config(**fields), tmp_path / "nowhere") == features.Normalisation()
    with pytest.raises(ValueError, match="config.motion: found 'pixel', expected 'pixels', 'standardised' or 'pose'"):
        build.read_normalisation(tiny_config(motion="pixel"), tmp_path)
    with pytest.raises(ValueError, match="config.levels: found 'db', expected 'preset' or 'standardised'"):
        build.read_normalisation(tiny_config(levels="db"), tmp_path)
    with pytest.raises(ValueError, match="found that of nothing, expected that of level and motion"):
        build.make_feature_config(tiny_config(preset="wide", motion="standardised"))


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (None, "can't be read"),
        ("{", "can't be read"),
        ({}, "found only nothing"),
        ({"full_train": True, "face_models_sha256": "1"}, "found only full_train, face_models_sha256"),
        ({"train_statistics": {"paper": {}}}, "found level_mean 0, level_std 0, motion_mean 0, motion_std 0, pose_mean 0"),
        ({"train_statistics": {"wide": {"level_mean": [0.0] * 64}}}, "found level_mean 64, .* not .80, 80, 136, 136, 0, 0."),
        ({"train_statistics": {"pose": {"pose_mean": [0.0] * 136}}}, "pose_mean 136, pose_std 0 numbers, not .*, 272, 272."),
    ],
)
def test_a_dataset_without_them(tmp_path, metadata, says):
    if metadata is not None:
        (tmp_path / "metadata.json").write_text(metadata if isinstance(metadata, str) else json.dumps(metadata))
    with pytest.raises(StatisticsError, match=says) as error:
        train_statistics.read(tmp_path, "wide")
    message = str(error.value)
    assert "expected train_statistics of preset 'wide' there; rebuild with avsi-prepare --overwrite" in message
    assert str(tmp_path / "metadata.json") in message and "\n" not in message


@pytest.mark.parametrize("landmarks", ["face", "mouth"])
def test_poses_of_the_train_split_are_standard_after_it(wide_config, data_dir, train_records, statistics, landmarks):
    """Mean 0 and standard deviation 1 over the pictures that count, but for the bridge, which stands still."""
    config = wide_config(system="av_unified", motion="pose", landmarks=landmarks)
    normalisation = build.read_normalisation(config, input_pipeline.find_dataset(data_dir))
    given = dataclasses.replace(build.make_feature_config(config, normalisation), video_rate="video")
    batch = batch_of(train_records)
    seen = jax.jit(features.make_features, static_argnums=2)(batch, np.zeros((len(train_records), 1, 2), np.int32), given)
    known = batch["landmarks_valid"]
    counted = np.asarray(seen.video)[:, 1:][known[:, 1:] & known[:, :-1]].astype(np.float64)
    assert counted.shape == (statistics["pose"]["pictures"], {"face": 272, "mouth": 80}[landmarks])
    moves = np.ones(68, bool) if landmarks == "mouth" else np.arange(68) != 27
    moves = np.tile(np.repeat(moves[48:] if landmarks == "mouth" else moves, 2), 2)
    np.testing.assert_allclose(counted.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(counted.std(0)[moves], 1, atol=1e-3)


def test_a_dataset_from_before_poses_lacks_nothing_else(wide_config, tiny_dir, data_dir, statistics, tmp_path, capsys):
    """2.0.0: what is standardised by other statistics is as before, and poses are refused in one line."""
    old = copy_of(tiny_dir, tmp_path, {k: v for k, v in statistics.items() if k != "pose"})
    read = lambda where, **fields: build.read_normalisation(wide_config(**fields), input_pipeline.find_dataset(where))
    for fields in ({}, {"system": "av_mtl_s2s"}, {"preset": "morrone", "system": "av_si"}, {"preset": "paper"}):
        assert read(old, **fields) == read(data_dir, **fields)
    assert read(old, preset="paper", motion="pose") == features.Normalisation(), "a_si sees no pose"
    with pytest.raises(StatisticsError, match="holds no statistics of poses; rebuild with avsi-prepare --overwrite"):
        read(old, system="av_mtl_s2s", motion="pose")
    fields = {"data_dir": old, "units": 8, "bottleneck": 8, "motion": "pose"}
    arguments = ["--config=tiny", f"--workdir={tmp_path / 'run'}", *(f"--config.{k}={v}" for k, v in fields.items())]
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("avsi-train: ") and err.count("\n") == 1 and "statistics of poses" in err
    assert not (tmp_path / "run").exists()


def test_an_old_dataset_trains_what_needs_none(wide_config, tiny_dir, tmp_path, capsys):
    old = copy_of(tiny_dir, tmp_path, None)
    fields = {"data_dir": old, "units": 8, "bottleneck": 8, "preset": "wide"}
    arguments = ["--config=tiny", f"--workdir={tmp_path / 'run'}", *(f"--config.{k}={v}" for k, v in fields.items())]
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("avsi-train: ") and err.count("\n") == 1 and "rebuild with avsi-prepare --overwrite" in err
    assert not (tmp_path / "run").exists()


# ---- training ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(wide_config, tmp_path_factory):
    """The workdir of one epoch. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("wide") / "run"
    cli.train(wide_config(), folder)
    return folder


def test_a_run_keeps_what_it_was_standardised_by(run, statistics):
    kept, wide = json.loads((run / "statistics.json").read_text()), statistics["wide"]
    mean, std = np.asarray(wide["level_mean"]), np.asarray(wide["level_std"])
    assert kept["level"]["mean"] == [pytest.approx(mean.mean())]
    assert kept["level"]["std"] == [pytest.approx(np.sqrt((std**2).mean() + mean.var()))]  # within bands and between them
    assert kept["motion"] is None, "a_si sees none"


def test_other_statistics_are_refused_on_a_resume(run, wide_config, statistics, tiny_dir, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    before = [(folder / name).read_bytes() for name in ("statistics.json", "config.json")]
    assert cli.train(wide_config(), folder)["epoch"] == 1  # the same: nothing left to do
    louder = json.loads(json.dumps(statistics))
    louder["wide"]["level_mean"] = [x + 0.5 for x in louder["wide"]["level_mean"]]
    with pytest.raises(ValueError, match="holds a run with other train statistics") as error:
        cli.train(wide_config(data_dir=copy_of(tiny_dir, tmp_path, louder)), folder)
    message = str(error.value)
    assert "(level: mean -" in message and "motion" not in message and "--workdir" in message and "\n" not in message
    assert [(folder / name).read_bytes() for name in ("statistics.json", "config.json")] == before
    (folder / "statistics.json").unlink()  # a run that saw levels as they are
    with pytest.raises(ValueError, match=r"level: none there, mean -[0-9.]+ and std [0-9.]+ over 1 here\)"):
        cli.train(wide_config(), folder)


def test_a_run_that_never_ended_an_epoch_binds_nobody(tmp_path):
    scale = features.Scale((1.0,), (2.0,))
    run_directory.check_normalisation(features.Normalisation(scale), tmp_path)
    run_directory.check_normalisation(features.Normalisation(None, scale), tmp_path)
    assert run_directory.read_normalisation(tmp_path) == features.Normalisation(None, scale)
    run_directory.check_normalisation(features.Normalisation(), tmp_path)
    assert not (tmp_path / "statistics.json").exists()


@pytest.mark.slow
def test_lips_train_on_standardised_motion(wide_config, statistics, tmp_path):
    from avsi_jax.inference.restorer import Restorer

    row = cli.train(wide_config(system="av_mtl_s2s"), tmp_path)
    assert np.isfinite(row["val_loss"])
    kept, wide = json.loads((tmp_path / "statistics.json").read_text()), statistics["wide"]
    assert kept["motion"] == {"mean": wide["motion_mean"], "std": wide["motion_std"]} and kept["level"]
    assert Restorer.from_workdir(tmp_path).config.motion == "standardised"


# ---- repair --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(tiny_dir):
    """The three clips of `test`, of three lengths."""
    return next(input_pipeline.eval_batches(input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "test"), 3))


SPANS = np.int32([[12_800, 17_600], [0, 4_000], [30_000, 41_000]])  # the third to its clip's end
GAP = np.pad(SPANS[:, None], ((0, 0), (0, 7), (0, 0)))  # as many rows as training draws


@pytest.fixture(scope="module")
def plain(batch):
    """What is heard of the damaged clips, by FeatureConfig alone: nothing standardised."""
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    return jax.jit(features.make_features, static_argnums=2)(arrays, GAP, features.FeatureConfig(WIDE))


@pytest.fixture(scope="module")
def restorer(run):
    """Of nothing but the workdir."""
    from avsi_jax.inference.restorer import Restorer

    return Restorer.from_workdir(run)


def test_a_restored_clip_is_of_true_levels(restorer, batch, plain):
    """Heard frames are the recording's, and the sound is that of levels never standardised."""
    from avsi_jax.inference.restorer import fill

    restored = restorer.restore(batch, GAP)
    mask, valid = np.asarray(plain.mask), np.asarray(plain.valid)
    for name in ("spectrogram", "target", "mask", "valid"):
        np.testing.assert_array_equal(getattr(restored.features, name), getattr(plain, name), err_msg=name)
    level = np.asarray(restored.level)
    np.testing.assert_array_equal(level[~mask], np.asarray(plain.spectrogram)[~mask])
    heard = np.asarray(plain.target)[valid]
    assert np.isfinite(level).all() and heard.min() - 3 < level[mask].mean() < heard.max() + 3
    audio = restorer.to_audio(restored.level, batch, GAP)
    position = np.arange(48_000)
    missing = (position >= SPANS[:, :1]) & (position < SPANS[:, 1:])
    np.testing.assert_array_equal(audio[~missing], (batch["audio"] / np.float32(32_768))[~missing])
    assert np.isfinite(audio).all() and all(np.std(audio[b, missing[b]]) > 1e-5 for b in range(3))
    oracle = restorer.to_audio(restored.features.target, batch, GAP)
    np.testing.assert_array_equal(oracle, fill(plain.target, batch, GAP, "wide"))


def test_a_network_that_says_0_says_the_mean_spectrum(wide_config, data_dir, statistics, batch, plain):
    """Bin by bin for morrone's preset."""
    from avsi_jax.inference.restorer import Restorer

    config = wide_config(preset="morrone")
    params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), jax.eval_shape(lambda: build.init_params(config)))
    normalisation = build.read_normalisation(config, input_pipeline.find_dataset(data_dir))
    restored = Restorer(config, params, 0, normalisation).restore(batch, GAP)
    mask = np.asarray(restored.features.mask)
    expected = np.broadcast_to(np.float32(statistics["morrone"]["level_mean"]), (mask.sum(), 257))
    np.testing.assert_allclose(np.asarray(restored.level)[mask], expected, rtol=1e-6)


def test_the_gaps_error_is_of_true_levels(restorer, wide_config, data_dir, batch):
    """The loss' own count of it, against what comes back from a repair of the same gaps; neither looks at padding."""
    from avsi_jax.audio import gap_masks

    config, key = wide_config(), jax.random.key(3)
    normalisation = build.read_normalisation(config, input_pipeline.find_dataset(data_dir))
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    sums = jax.jit(objective.make_loss(config, normalisation))(restorer.params, arrays, key)[1]
    draw = {k: v for k, v in config.gaps.items() if k not in ("protocol", "curriculum_steps")}
    drawn = gap_masks.draw_batch(key, batch["id_hash"], batch["audio_length"], **draw)
    restored = restorer.restore(batch, np.asarray(drawn))
    off, true = np.asarray(restored.level), np.asarray(restored.features.target)
    mask = np.asarray(restored.features.mask)
    assert (int(sums["gap_l1"][1]), int(sums["whole"][1])) == (80 * mask.sum(), 80 * (298 + 301 + 257))  # 1 + samples // 160
    assert float(sums["gap_l1"][0]) == pytest.approx(np.abs(off - true)[mask].sum(), rel=1e-4)
    std = normalisation.level.std[0]
    assert float(sums["gap"][0]) == pytest.approx((((off - true)[mask] / std) ** 2).sum(), rel=1e-4)  # the objective is not
