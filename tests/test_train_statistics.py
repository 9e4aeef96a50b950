"""Sums against librosa, scipy and NumPy clip by clip; then what training and repair make of them, from a dataset to a sound."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import librosa
import numpy as np
import pytest
from scipy import signal

from avsi_jax import experiment, features, input_pipeline, spec, train, train_statistics, workdir
from avsi_jax.train_statistics import UNIT, StatisticsError

ROOT = Path(__file__).resolve().parent.parent
PAPER, WIDE, MORRONE = PRESETS = [spec.get(name) for name in ("paper", "wide", "morrone")]
by_name = pytest.mark.parametrize("preset", PRESETS, ids=lambda s: s.name)

LENGTHS = (47_648, 48_000, 20_001, 300, 50_000)  # samples: of Grid's MPEG and wav, short, shorter than a window, too long
PICTURES = (75, 74, 30, 2, 80)


def record(i, **changes):
    """The i-th made-up clip as it is stored: noise whose loudness wanders, points that wander, two stretches without a face."""
    rng = np.random.default_rng(i)
    n, t = LENGTHS[i], PICTURES[i]
    loudness = np.interp(np.arange(n), np.linspace(0, n, 9), rng.permutation(np.linspace(-100, -3, 9)))
    valid = np.ones(t, bool)
    valid[[5, 6, 20] if t > 20 else []] = False
    return {
        "id": "bbaf2n",
        "speaker": "s1",
        "text": "bin blue at f two now",
        "words": [],
        "audio": np.int16(32_767 * rng.uniform(-1, 1, n) * 10 ** (loudness / 20)),
        "offset_s": np.float32([0.011, 0, -0.05, 0.011, 0.3][i]),
        "landmarks": np.float32(180 + rng.normal(0, 1.5, (t, 68, 2)).cumsum(0)),
        "landmarks_valid": valid,
        "frame_size": np.int32([[360, 288], [720, 576]][i % 2]),
        "fps": np.float32([25, 25, 30, 25, 29.97][i]),
    } | changes


# ---- what the sums are of, by other means --------------------------------------------------------------------------------------


def level_of(audio, s):
    """(F, K) float64 of the clip alone, by librosa and scipy: decimated, cut to the preset's length, nothing behind its end."""
    audio = audio[: s.record_samples]
    frames = 1 + -(-len(audio) * s.rate // 16_000) // s.hop
    x = np.pad(audio / 32_768.0, (0, 1_000))  # the decimating filter rings on
    if s is MORRONE:
        x = np.pad(x[: len(audio)], (0, 384))
        windows = np.lib.stride_tricks.sliding_window_view(x, 384)[: len(audio) : 192] * signal.get_window("hann", 384)
        return np.log(np.abs(np.fft.rfft(windows, 512)) + 1e-6)
    if s is PAPER:
        taps = signal.firwin(129, 0.47, window=("kaiser", signal.kaiser_beta(80.0)))
        x = signal.upfirdn(taps, x, down=2)[32 : 32 + s.num_samples]
        x = librosa.effects.preemphasis(x, coef=0.97, zi=[0.0])
    mel = librosa.filters.mel(sr=s.rate, n_fft=s.n_fft, n_mels=s.bands).astype(np.float64)
    bands = np.abs(librosa.stft(x, n_fft=s.n_fft, hop_length=s.hop, win_length=s.window)).T[:frames] @ mel.T
    if s is PAPER:
        return np.clip((20 * np.log10(np.maximum(1e-5, bands)) + 80) / 80, 0, 1)
    return np.log(bands + 1e-5)


def motion_of(clip, s, frames):
    """(f, 136) float64: np.interp of every coordinate at the frames' times, differences, without frames of a picture unseen."""
    t = min(len(clip["landmarks"]), 75)
    first = 0 if s.centred else s.window / 2
    time_s = (np.arange(frames) * s.hop + first) / s.rate - float(clip["offset_s"])
    position = np.clip(time_s * float(clip["fps"]), 0, t - 1)
    track = clip["landmarks"][:t].reshape(t, -1).astype(np.float64) * 360 / clip["frame_size"][0]
    motion = np.diff(np.stack([np.interp(position, np.arange(t), c) for c in track.T], -1), axis=0, prepend=0)
    motion[0] = 0
    missing = np.interp(position, np.arange(t), ~clip["landmarks_valid"][:t]) > 0
    return motion[~(missing | np.concatenate([[False], missing[:-1]]))]


def posed(i):
    """The same clip with a face: eyes 60 px apart that turn and come nearer, a mouth that moves."""
    rng = np.random.default_rng(10 + i)
    clip = record(i)
    t = len(clip["landmarks"])
    face = rng.uniform([-60, -20], [60, 90], (68, 2))
    face[36:42], face[42:48] = face[36:42] * 0.1 - [30, 0], face[42:48] * 0.1 + [30, 0]
    angle, size = rng.normal(0, 0.02, t).cumsum(), np.exp(rng.normal(0, 0.01, t).cumsum())
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = face + rng.normal(0, 0.3, (t, 68, 2)).cumsum(0)
    return clip | {"landmarks": np.float32(180 + size[:, None, None] * np.einsum("xyt,tly->tlx", turn, points))}


def pose_of(clip):
    """(n, 272) float64, picture by picture: points turned level, in eye distances from the bridge; less their mean; and speeds."""
    points, valid = clip["landmarks"][:75].astype(np.float64), clip["landmarks_valid"][:75]
    place = []
    for shape in points:
        across = shape[42:48].mean(0) - shape[36:42].mean(0)  # iBUG: eyes 37 to 48, the bridge begins with 28
        along, down = across / np.hypot(*across), np.array([-across[1], across[0]]) / np.hypot(*across)
        place.append(np.stack([(shape - shape[27]) @ along, (shape - shape[27]) @ down], -1).ravel() / np.hypot(*across))
    place = np.stack(place) - np.mean([p for p, seen in zip(place, valid) if seen], 0)
    kept = [k for k in range(1, len(place)) if valid[k] and valid[k - 1]]
    return np.stack([np.r_[place[k], (place[k] - place[k - 1]) * float(clip["fps"]) / 25] for k in kept])


@functools.cache
def sums_of(i):
    return train_statistics.clip_sums(record(i))


@functools.cache
def oracle(i, s):
    clip = record(i)
    level = level_of(clip["audio"], s)
    return level, motion_of(clip, s, len(level))


# ---- sums ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(len(LENGTHS)))
@by_name
def test_sums_of_a_clip(i, preset):
    """Of its own frames alone: a padded one would add ln(floor), or 0, and to the count."""
    found, s = sums_of(i), preset.name
    assert {v.dtype for v in found.values()} == {np.dtype(np.int64)}
    level, motion = oracle(i, preset)
    assert (found[f"{s}.frames"], found[f"{s}.motion_frames"]) == (len(level), len(motion))
    for name, values, off in (("level", level, 3e-5), ("motion", motion, 1e-5 * 400)):  # float32 of levels, and of points
        np.testing.assert_allclose(found[f"{s}.{name}"] / UNIT, values.sum(0), atol=off * np.sqrt(len(values)) + 1e-6)
        most = 2 * np.abs(values).max() * off * len(values)
        np.testing.assert_allclose(found[f"{s}.{name}_squares"] / UNIT, (values**2).sum(0), atol=most + 1e-6)


@functools.cache
def sums_of_posed(i):
    return train_statistics.clip_sums(posed(i))


@pytest.mark.parametrize("i", range(len(LENGTHS)))
def test_sums_of_a_clips_poses(i):
    found, pose = sums_of_posed(i), pose_of(posed(i))
    assert found["pose.pictures"] == len(pose) == {0: 75, 1: 74, 2: 30, 3: 2, 4: 75}[i] - 1 - (5 if PICTURES[i] > 20 else 0)
    np.testing.assert_allclose(found["pose.pose"] / UNIT, pose.sum(0), atol=2e-5 * np.sqrt(len(pose)) + 1e-6)
    most = 2 * np.abs(pose).max() * 2e-5 * len(pose)
    np.testing.assert_allclose(found["pose.pose_squares"] / UNIT, (pose**2).sum(0), atol=most + 1e-6)


def test_moments_of_poses_are_numpys_of_all_pictures_together():
    kept = train_statistics.finish(functools.reduce(train_statistics.add, map(sums_of_posed, range(len(LENGTHS)))))["pose"]
    pictures = np.concatenate([pose_of(posed(i)) for i in range(len(LENGTHS))])
    assert kept["pictures"] == len(pictures) and len(kept["pose_mean"]) == 272
    np.testing.assert_allclose(kept["pose_mean"], pictures.mean(0), atol=1e-5)
    np.testing.assert_allclose(kept["pose_std"], np.maximum(pictures.std(0), 1e-3), atol=1e-5)
    assert kept["pose_std"][2 * 27] == 1e-3, "the bridge is where all is measured from, and has a floor"


def test_pictures_without_a_face_do_not_count():
    """Moving such a picture's points about changes nothing."""
    clip = record(0)
    points = np.where(clip["landmarks_valid"][:, None, None], clip["landmarks"], 1e4).astype(np.float32)
    moved = train_statistics.clip_sums(clip | {"landmarks": points})
    for name, value in sums_of(0).items():
        np.testing.assert_array_equal(moved[name], value)
    everywhere = train_statistics.clip_sums(clip | {"landmarks_valid": np.ones(75, bool)})
    # Pictures 5, 6 and 20 of 25 a second reach 3 + 2 picture times: 10 of 50 frames a second, and at most 2 beside each stretch.
    assert 10 <= everywhere["paper.motion_frames"] - sums_of(0)["paper.motion_frames"] <= 14
    assert everywhere["paper.frames"] == everywhere["paper.motion_frames"] == 149


def test_adding_is_exact_in_any_order():
    clips = [sums_of(i) for i in (0, 1, 2, 3, 4, 0, 2)]
    rng = np.random.default_rng(0)
    whole = functools.reduce(train_statistics.add, clips)
    for _ in range(5):
        heap = [clips[i] for i in rng.permutation(len(clips))]
        while len(heap) > 1:  # pairs as they come, as Beam and workers add them
            one, two = heap.pop(rng.integers(len(heap))), heap.pop(rng.integers(len(heap)))
            heap.append(train_statistics.add(one, two))
        for name, value in whole.items():
            np.testing.assert_array_equal(heap[0][name], value)
    assert json.dumps(train_statistics.finish(heap[0])) == json.dumps(train_statistics.finish(whole))


SUMS_OF_A_CLIP = """
import sys
sys.path.insert(0, sys.argv[1])
import test_train_statistics as here
print({name: value.sum() for name, value in here.sums_of(0).items()})
"""


@pytest.mark.slow
def test_sums_do_not_depend_on_the_number_of_cores():
    """NPROC: the threads that XLA takes on a CPU, instead of as many as there are cores."""
    command = [sys.executable, "-c", SUMS_OF_A_CLIP, str(Path(__file__).parent)]
    runs = [subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NPROC": n}, cwd=ROOT) for n in "1235"]
    assert [r.stdout for r in runs] == [runs[0].stdout] * 4 and runs[0].stdout, runs[0].stderr


def test_no_sum_of_the_corpus_overflows():
    """34,000 of the largest clips that are taken, and of digital silence, the largest level squared."""
    assert 34_000 * train_statistics.MAX_SUM * UNIT < 2**63
    silence = train_statistics.clip_sums(record(1, audio=np.zeros(48_000, np.int16)))
    assert silence["morrone.level_squares"][0] / UNIT == pytest.approx(250 * np.log(1e-6) ** 2, rel=1e-6)


@pytest.mark.parametrize("wrong", [np.nan, 1e6])
def test_a_clip_that_cannot_be_counted(wrong):
    points = record(0)["landmarks"].copy()
    points[3, 50] = wrong
    with pytest.raises(StatisticsError, match="clip bbaf2n: its level or motion adds up to .*, expected <") as error:
        train_statistics.clip_sums(record(0, landmarks=points))
    assert "\n" not in str(error.value)


# ---- moments -------------------------------------------------------------------------------------------------------------------


@by_name
def test_moments_are_numpys_of_all_frames_together(preset):
    kept = train_statistics.finish(functools.reduce(train_statistics.add, map(sums_of, range(len(LENGTHS)))))[preset.name]
    for k, name in enumerate(("level", "motion")):
        frames = np.concatenate([oracle(i, preset)[k] for i in range(len(LENGTHS))])
        np.testing.assert_allclose(kept[f"{name}_mean"], frames.mean(0), atol=1e-4)
        np.testing.assert_allclose(kept[f"{name}_std"], frames.std(0), atol=1e-4)
        assert kept["frames" if name == "level" else "motion_frames"] == len(frames)


def test_what_is_kept_is_plain_and_short():
    kept = train_statistics.finish(sums_of(0))
    assert json.loads(json.dumps(kept)) == kept and sorted(kept) == ["morrone", "paper", "pose", "wide"]
    for of_preset in kept.values():
        numbers = sum((v for v in of_preset.values() if isinstance(v, list)), [])
        assert all(type(x) is float and x == float(f"{x:.7g}") and str(x) != "-0.0" for x in numbers)


def test_what_never_changes_has_a_floor():
    still = np.repeat(record(1)["landmarks"][:1], 74, 0)
    kept = train_statistics.finish(train_statistics.clip_sums(record(1, audio=np.zeros(48_000, np.int16), landmarks=still)))
    assert {*kept["pose"]["pose_std"]} == {1e-3} and kept.pop("pose")["pictures"] == 73 - 5
    for of_preset in kept.values():
        assert {*of_preset["level_std"], *of_preset["motion_std"]} == {1e-3}
    np.testing.assert_allclose(kept["wide"]["level_mean"], np.log(1e-5), rtol=1e-6)


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
@pytest.mark.parametrize("preset", [WIDE, MORRONE], ids=lambda s: s.name)
def test_the_train_split_is_standard_after_it(wide_config, data_dir, train_records, preset, landmarks):
    """Mean 0 and standard deviation 1: of every bin on the linear scale, of all bands together on the mel, of every coordinate."""
    config = wide_config(preset=preset.name, landmarks=landmarks, system="av_mtl_s2s")
    normalisation = experiment.read_normalisation(config, input_pipeline.find_dataset(data_dir))
    feature_config = experiment.make_feature_config(config, normalisation)
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
        assert experiment.read_normalisation(tiny_config(**fields), tmp_path / "nowhere") == features.Normalisation()
    with pytest.raises(ValueError, match="config.motion: found 'pixel', expected 'pixels', 'standardised' or 'pose'"):
        experiment.read_normalisation(tiny_config(motion="pixel"), tmp_path)
    with pytest.raises(ValueError, match="found that of nothing, expected that of level and motion"):
        experiment.make_feature_config(tiny_config(preset="wide", motion="standardised"))


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
    normalisation = experiment.read_normalisation(config, input_pipeline.find_dataset(data_dir))
    given = dataclasses.replace(experiment.make_feature_config(config, normalisation), video_rate="video")
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
    read = lambda where, **fields: experiment.read_normalisation(wide_config(**fields), input_pipeline.find_dataset(where))
    for fields in ({}, {"system": "av_mtl_s2s"}, {"preset": "morrone", "system": "av_si"}, {"preset": "paper"}):
        assert read(old, **fields) == read(data_dir, **fields)
    assert read(old, preset="paper", motion="pose") == features.Normalisation(), "a_si sees no pose"
    with pytest.raises(StatisticsError, match="holds no statistics of poses; rebuild with avsi-prepare --overwrite"):
        read(old, system="av_mtl_s2s", motion="pose")
    fields = {"data_dir": old, "units": 8, "bottleneck": 8, "motion": "pose"}
    arguments = ["--config=tiny", f"--workdir={tmp_path / 'run'}", *(f"--config.{k}={v}" for k, v in fields.items())]
    assert train.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("avsi-train: ") and err.count("\n") == 1 and "statistics of poses" in err
    assert not (tmp_path / "run").exists()


def test_an_old_dataset_trains_what_needs_none(wide_config, tiny_dir, tmp_path, capsys):
    old = copy_of(tiny_dir, tmp_path, None)
    fields = {"data_dir": old, "units": 8, "bottleneck": 8, "preset": "wide"}
    arguments = ["--config=tiny", f"--workdir={tmp_path / 'run'}", *(f"--config.{k}={v}" for k, v in fields.items())]
    assert train.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("avsi-train: ") and err.count("\n") == 1 and "rebuild with avsi-prepare --overwrite" in err
    assert not (tmp_path / "run").exists()


# ---- training ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(wide_config, tmp_path_factory):
    """The workdir of one epoch. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("wide") / "run"
    train.train(wide_config(), folder)
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
    assert train.train(wide_config(), folder)["epoch"] == 1  # the same: nothing left to do
    louder = json.loads(json.dumps(statistics))
    louder["wide"]["level_mean"] = [x + 0.5 for x in louder["wide"]["level_mean"]]
    with pytest.raises(ValueError, match="holds a run with other train statistics") as error:
        train.train(wide_config(data_dir=copy_of(tiny_dir, tmp_path, louder)), folder)
    message = str(error.value)
    assert "(level: mean -" in message and "motion" not in message and "--workdir" in message and "\n" not in message
    assert [(folder / name).read_bytes() for name in ("statistics.json", "config.json")] == before
    (folder / "statistics.json").unlink()  # a run that saw levels as they are
    with pytest.raises(ValueError, match=r"level: none there, mean -[0-9.]+ and std [0-9.]+ over 1 here\)"):
        train.train(wide_config(), folder)


def test_a_run_that_never_ended_an_epoch_binds_nobody(tmp_path):
    scale = features.Scale((1.0,), (2.0,))
    workdir.check_normalisation(features.Normalisation(scale), tmp_path)
    workdir.check_normalisation(features.Normalisation(None, scale), tmp_path)
    assert workdir.read_normalisation(tmp_path) == features.Normalisation(None, scale)
    workdir.check_normalisation(features.Normalisation(), tmp_path)
    assert not (tmp_path / "statistics.json").exists()


@pytest.mark.slow
def test_lips_train_on_standardised_motion(wide_config, statistics, tmp_path):
    from avsi_jax.restore import Restorer

    row = train.train(wide_config(system="av_mtl_s2s"), tmp_path)
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
    from avsi_jax.restore import Restorer

    return Restorer.from_workdir(run)


def test_a_restored_clip_is_of_true_levels(restorer, batch, plain):
    """Heard frames are the recording's, and the sound is that of levels never standardised."""
    from avsi_jax.restore import fill

    restored = restorer.restore(batch, GAP)
    mask, valid = np.asarray(plain.mask), np.asarray(plain.valid)
    for name in ("spectrogram", "target", "mask", "valid"):
        np.testing.assert_array_equal(getattr(restored.features, name), getattr(plain, name), err_msg=name)
    level = np.asarray(restored.level)
    np.testing.assert_array_equal(level[~mask], np.asarray(plain.spectrogram)[~mask])
    heard = np.asarray(plain.target)[valid]
    assert np.isfinite(level).all() and heard.min() - 3 < level[mask].mean() < heard.max() + 3
    sound = restorer.to_sound(restored.level, batch, GAP)
    position = np.arange(48_000)
    lost = (position >= SPANS[:, :1]) & (position < SPANS[:, 1:])
    np.testing.assert_array_equal(sound[~lost], (batch["audio"] / np.float32(32_768))[~lost])
    assert np.isfinite(sound).all() and all(np.std(sound[b, lost[b]]) > 1e-5 for b in range(3))
    oracle = restorer.to_sound(restored.features.target, batch, GAP)
    np.testing.assert_array_equal(oracle, fill(plain.target, batch, GAP, "wide"))


def test_a_network_that_says_0_says_the_mean_spectrum(wide_config, data_dir, statistics, batch, plain):
    """Bin by bin for morrone's preset."""
    from avsi_jax.restore import Restorer

    config = wide_config(preset="morrone")
    params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), jax.eval_shape(lambda: experiment.init_params(config)))
    normalisation = experiment.read_normalisation(config, input_pipeline.find_dataset(data_dir))
    restored = Restorer(config, params, 0, normalisation).restore(batch, GAP)
    mask = np.asarray(restored.features.mask)
    expected = np.broadcast_to(np.float32(statistics["morrone"]["level_mean"]), (mask.sum(), 257))
    np.testing.assert_allclose(np.asarray(restored.level)[mask], expected, rtol=1e-6)


def test_the_gaps_error_is_of_true_levels(restorer, wide_config, data_dir, batch):
    """The loss' own count of it, against what comes back from a repair of the same gaps; neither looks at padding."""
    from avsi_jax import gaps

    config, key = wide_config(), jax.random.key(3)
    normalisation = experiment.read_normalisation(config, input_pipeline.find_dataset(data_dir))
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    sums = jax.jit(experiment.make_loss(config, normalisation))(restorer.params, arrays, key)[1]
    draw = {k: v for k, v in config.gaps.items() if k not in ("protocol", "curriculum_steps")}
    drawn = gaps.draw_batch(key, batch["id_hash"], batch["audio_length"], **draw)
    restored = restorer.restore(batch, np.asarray(drawn))
    off, true = np.asarray(restored.level), np.asarray(restored.features.target)
    mask = np.asarray(restored.features.mask)
    assert (int(sums["gap_l1"][1]), int(sums["whole"][1])) == (80 * mask.sum(), 80 * (298 + 301 + 257))  # 1 + samples // 160
    assert float(sums["gap_l1"][0]) == pytest.approx(np.abs(off - true)[mask].sum(), rel=1e-4)
    std = normalisation.level.std[0]
    assert float(sums["gap"][0]) == pytest.approx((((off - true)[mask] / std) ** 2).sum(), rel=1e-4)  # the objective is not
