"""Standardisation in training and inpainting: inputs have mean 0 and standard deviation 1, outputs are unscaled levels."""

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
    """config.data_dir of a copy of the tiny dataset with these statistics in its metadata, or with none."""
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
    """wide_config(**fields): a quick run that needs level statistics, and with system="av_mtl_s2s" also motion statistics."""
    wanted = {"data_dir": data_dir, "system": "a_si", "preset": "wide", "motion": "standardised", "epochs": 1}
    return lambda **fields: tiny_config(**wanted | fields)


def batch_of(records):
    examples = [input_pipeline.to_example(r) for r in records]
    return {k: np.stack([e[k] for e in examples]) for k in examples[0] if k != "clip_id"}


@pytest.mark.slow
@pytest.mark.parametrize("landmarks", ["face", "mouth"])
@pytest.mark.parametrize("preset", [WIDE, MORRONE, PAPER], ids=lambda s: s.name)
def test_standardised_features_of_the_train_split_have_mean_0_and_std_1(wide_config, data_dir, train_records, preset, landmarks):
    """For every bin on the linear scale, for all bands together on the mel scale, and for every coordinate."""
    levels = "standardised" if preset is PAPER else "preset"
    config = wide_config(preset=preset.name, levels=levels, landmarks=landmarks, system="av_mtl_s2s")
    normalisation = build.read_normalisation(config, input_pipeline.find_dataset(data_dir))
    feature_config = build.make_feature_config(config, normalisation)
    no_gap = np.zeros((len(train_records), 1, 2), np.int32)
    made = jax.jit(features.make_features, static_argnums=2)(batch_of(train_records), no_gap, feature_config)
    valid = np.asarray(made.valid)
    assert not valid.all(), "one in three of these clips is short"
    level, video = (np.asarray(x)[valid].astype(np.float64) for x in (made.target, made.video))
    level = level if preset is MORRONE else level.reshape(-1, 1)
    assert video.shape[1] == {"face": 136, "mouth": 40}[landmarks]
    for values in (level, video):
        np.testing.assert_allclose(values.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(values.std(0), 1, atol=1e-4)


def test_statistics_are_read_only_if_needed(tiny_config, tmp_path):
    for fields in ({}, {"motion": "standardised", "system": "a_si"}):
        assert build.read_normalisation(tiny_config(**fields), tmp_path / "nowhere") == features.Normalisation()
    with pytest.raises(ValueError, match="config.motion: found 'pixel', expected 'pixels', 'standardised' or 'pose'"):
        build.read_normalisation(tiny_config(motion="pixel"), tmp_path)
    with pytest.raises(ValueError, match="config.levels: found 'db', expected 'preset' or 'standardised'"):
        build.read_normalisation(tiny_config(levels="db"), tmp_path)
    with pytest.raises(ValueError, match="level and motion"):
        build.make_feature_config(tiny_config(preset="wide", motion="standardised"))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "can't be read"),
        ("{", "can't be read"),
        ({}, "nothing"),
        ({"full_train": True, "face_models_sha256": "1"}, "full_train, face_models_sha256"),
        ({"train_statistics": {"paper": {}}}, "level_mean 0, level_std 0, motion_mean 0, motion_std 0, pose_mean 0"),
        ({"train_statistics": {"wide": {"level_mean": [0.0] * 64}}}, "level_mean 64, .*80, 80, 136, 136, 0, 0."),
        ({"train_statistics": {"pose": {"pose_mean": [0.0] * 136}}}, "pose_mean 136, pose_std 0 .*272, 272."),
    ],
)
def test_a_dataset_without_suitable_statistics_is_rejected(tmp_path, metadata, message):
    if metadata is not None:
        (tmp_path / "metadata.json").write_text(metadata if isinstance(metadata, str) else json.dumps(metadata))
    with pytest.raises(StatisticsError, match=message) as error:
        train_statistics.read(tmp_path, "wide")
    text = str(error.value)
    assert "train_statistics" in text and "'wide'" in text and "avsi-prepare --overwrite" in text
    assert str(tmp_path / "metadata.json") in text and "\n" not in text


@pytest.mark.parametrize("landmarks", ["face", "mouth"])
def test_standardised_poses_of_the_train_split_have_mean_0_and_std_1(wide_config, data_dir, train_records, statistics, landmarks):
    """Over the frames that count, except for the nose bridge, which is constant."""
    config = wide_config(system="av_unified", motion="pose", landmarks=landmarks)
    normalisation = build.read_normalisation(config, input_pipeline.find_dataset(data_dir))
    given = dataclasses.replace(build.make_feature_config(config, normalisation), video_rate="video")
    batch = batch_of(train_records)
    made = jax.jit(features.make_features, static_argnums=2)(batch, np.zeros((len(train_records), 1, 2), np.int32), given)
    known = batch["landmarks_valid"]
    counted = np.asarray(made.video)[:, 1:][known[:, 1:] & known[:, :-1]].astype(np.float64)
    assert counted.shape == (statistics["pose"]["pictures"], {"face": 272, "mouth": 80}[landmarks])
    moves = np.ones(68, bool) if landmarks == "mouth" else np.arange(68) != 27
    moves = np.tile(np.repeat(moves[48:] if landmarks == "mouth" else moves, 2), 2)
    np.testing.assert_allclose(counted.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(counted.std(0)[moves], 1, atol=1e-3)


def test_an_older_dataset_lacks_only_the_pose_statistics(wide_config, tiny_dir, data_dir, statistics, tmp_path, capsys):
    """Version 2.0.0: everything else works as before, and a run with poses is rejected in one line."""
    old = copy_of(tiny_dir, tmp_path, {k: v for k, v in statistics.items() if k != "pose"})
    read = lambda where, **fields: build.read_normalisation(wide_config(**fields), input_pipeline.find_dataset(where))
    for fields in ({}, {"system": "av_mtl_s2s"}, {"preset": "morrone", "system": "av_si"}, {"preset": "paper"}):
        assert read(old, **fields) == read(data_dir, **fields)
    assert read(old, preset="paper", motion="pose") == features.Normalisation(), "a_si uses no poses"
    with pytest.raises(StatisticsError, match="poses.*avsi-prepare --overwrite"):
        read(old, system="av_mtl_s2s", motion="pose")
    fields = {"data_dir": old, "units": 8, "bottleneck": 8, "motion": "pose"}
    arguments = ["--config=tiny", f"--workdir={tmp_path / 'run'}", *(f"--config.{k}={v}" for k, v in fields.items())]
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("avsi-train: ") and err.count("\n") == 1 and "poses" in err
    assert not (tmp_path / "run").exists()


def test_training_with_statistics_is_rejected_for_a_dataset_without(wide_config, tiny_dir, tmp_path, capsys):
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
    """The workdir of a run of one epoch; tests do not change it."""
    folder = tmp_path_factory.mktemp("wide") / "run"
    cli.train(wide_config(), folder)
    return folder


@pytest.mark.slow
def test_a_run_stores_its_normalisation(run, statistics):
    kept, wide = json.loads((run / "statistics.json").read_text()), statistics["wide"]
    mean, std = np.asarray(wide["level_mean"]), np.asarray(wide["level_std"])
    assert kept["level"]["mean"] == [pytest.approx(mean.mean())]
    assert kept["level"]["std"] == [pytest.approx(np.sqrt((std**2).mean() + mean.var()))]  # within and between bands
    assert kept["motion"] is None, "a_si uses no motion"


def test_a_resumed_run_rejects_other_statistics(run, wide_config, statistics, tiny_dir, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    before = [(folder / name).read_bytes() for name in ("statistics.json", "config.json")]
    assert cli.train(wide_config(), folder)["epoch"] == 1  # same statistics: the run is finished already
    louder = json.loads(json.dumps(statistics))
    louder["wide"]["level_mean"] = [x + 0.5 for x in louder["wide"]["level_mean"]]
    with pytest.raises(ValueError, match="other train statistics") as error:
        cli.train(wide_config(data_dir=copy_of(tiny_dir, tmp_path, louder)), folder)
    message = str(error.value)
    assert "(level: mean -" in message and "motion" not in message and "--workdir" in message and "\n" not in message
    assert [(folder / name).read_bytes() for name in ("statistics.json", "config.json")] == before
    (folder / "statistics.json").unlink()  # a run without standardised levels
    with pytest.raises(ValueError, match=r"level: .*mean -[0-9.]+ and std [0-9.]+"):
        cli.train(wide_config(), folder)


def test_the_normalisation_may_change_before_the_first_epoch_ends(tmp_path):
    scale = features.Scale((1.0,), (2.0,))
    run_directory.check_normalisation(features.Normalisation(scale), tmp_path)
    run_directory.check_normalisation(features.Normalisation(None, scale), tmp_path)
    assert run_directory.read_normalisation(tmp_path) == features.Normalisation(None, scale)
    run_directory.check_normalisation(features.Normalisation(), tmp_path)
    assert not (tmp_path / "statistics.json").exists()


@pytest.mark.slow
def test_an_audio_visual_system_trains_on_standardised_motion(wide_config, statistics, tmp_path):
    from avsi_jax.inference.restorer import Restorer

    row = cli.train(wide_config(system="av_mtl_s2s"), tmp_path)
    assert np.isfinite(row["val_loss"])
    kept, wide = json.loads((tmp_path / "statistics.json").read_text()), statistics["wide"]
    assert kept["motion"] == {"mean": wide["motion_mean"], "std": wide["motion_std"]} and kept["level"]
    assert Restorer.from_workdir(tmp_path).config.motion == "standardised"


# ---- inpainting ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(tiny_dir):
    """The three clips of `test`, of three lengths."""
    return next(input_pipeline.eval_batches(input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "test"), 3))


SPANS = np.int32([[12_800, 17_600], [0, 4_000], [30_000, 41_000]])  # the third reaches the end of its clip
GAP = np.pad(SPANS[:, None], ((0, 0), (0, 7), (0, 0)))  # the same number of rows as in training


@pytest.fixture(scope="module")
def plain(batch):
    """Features of the masked clips without standardisation."""
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    return jax.jit(features.make_features, static_argnums=2)(arrays, GAP, features.FeatureConfig(WIDE))


@pytest.fixture(scope="module")
def restorer(run):
    """Loaded only from the workdir."""
    from avsi_jax.inference.restorer import Restorer

    return Restorer.from_workdir(run)


@pytest.mark.slow
def test_a_restored_clip_has_unscaled_levels(restorer, batch, plain):
    """Frames outside the gaps are those of the recording, and the audio is synthesised from unscaled levels."""
    from avsi_jax.inference.restorer import levels_to_audio

    restored = restorer.restore(batch, GAP)
    mask, valid = np.asarray(plain.mask), np.asarray(plain.valid)
    for name in ("spectrogram", "target", "mask", "valid"):
        np.testing.assert_array_equal(getattr(restored.features, name), getattr(plain, name), err_msg=name)
    level = np.asarray(restored.level)
    np.testing.assert_array_equal(level[~mask], np.asarray(plain.spectrogram)[~mask])
    true = np.asarray(plain.target)[valid]
    assert np.isfinite(level).all() and true.min() - 3 < level[mask].mean() < true.max() + 3
    audio = restorer.to_audio(restored.level, batch, GAP)
    position = np.arange(48_000)
    missing = (position >= SPANS[:, :1]) & (position < SPANS[:, 1:])
    np.testing.assert_array_equal(audio[~missing], (batch["audio"] / np.float32(32_768))[~missing])
    assert np.isfinite(audio).all() and all(np.std(audio[b, missing[b]]) > 1e-5 for b in range(3))
    oracle = restorer.to_audio(restored.features.target, batch, GAP)
    np.testing.assert_array_equal(oracle, levels_to_audio(plain.target, batch, GAP, "wide"))


def test_a_network_output_of_0_is_the_mean_spectrum(wide_config, data_dir, statistics, batch):
    """For every bin of the morrone preset."""
    from avsi_jax.inference.restorer import Restorer

    config = wide_config(preset="morrone")
    params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), jax.eval_shape(lambda: build.init_params(config)))
    normalisation = build.read_normalisation(config, input_pipeline.find_dataset(data_dir))
    restored = Restorer(config, params, 0, normalisation).restore(batch, GAP)
    mask = np.asarray(restored.features.mask)
    expected = np.broadcast_to(np.float32(statistics["morrone"]["level_mean"]), (mask.sum(), 257))
    np.testing.assert_allclose(np.asarray(restored.level)[mask], expected, rtol=1e-6)


@pytest.mark.slow
def test_the_gap_error_is_in_unscaled_levels(restorer, wide_config, data_dir, batch):
    """The sums of the loss compared with a restoration of the same gaps; both ignore padding."""
    from avsi_jax.audio import gap_masks

    config, key = wide_config(), jax.random.key(3)
    normalisation = build.read_normalisation(config, input_pipeline.find_dataset(data_dir))
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    sums = jax.jit(objective.make_loss(config, normalisation))(restorer.params, arrays, key)[1]
    draw = {k: v for k, v in config.gaps.items() if k not in ("protocol", "curriculum_steps", "fixed")}
    drawn = gap_masks.draw_batch(key, batch["id_hash"], batch["audio_length"], **draw)
    restored = restorer.restore(batch, np.asarray(drawn))
    predicted, true = np.asarray(restored.level), np.asarray(restored.features.target)
    mask = np.asarray(restored.features.mask)
    assert (int(sums["gap_l1"][1]), int(sums["whole"][1])) == (80 * mask.sum(), 80 * (298 + 301 + 257))  # 1 + samples // 160
    assert float(sums["gap_l1"][0]) == pytest.approx(np.abs(predicted - true)[mask].sum(), rel=1e-4)
    std = normalisation.level.std[0]
    assert float(sums["gap"][0]) == pytest.approx(
        (((predicted - true)[mask] / std) ** 2).sum(), rel=1e-4
    )  # the objective uses standardised levels
