"""Train statistics: sums per clip, means and standard deviations compared with librosa, scipy and NumPy."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
from scipy import signal

from avsi_jax import presets
from avsi_jax.data import train_statistics
from avsi_jax.data.train_statistics import UNIT, StatisticsError

ROOT = Path(__file__).resolve().parents[2]
PAPER, WIDE, MORRONE = PRESETS = [presets.get(name) for name in ("paper", "wide", "morrone")]
by_name = pytest.mark.parametrize("preset", PRESETS, ids=lambda s: s.name)

LENGTHS = (47_648, 48_000, 20_001, 300, 50_000)  # samples: Grid MPEG and wav, short, shorter than a window, too long
VIDEO = (75, 74, 30, 2, 80)


def record(i, **changes):
    """The i-th synthetic clip as stored: noise of varying level, randomly moving landmarks, two stretches without a face."""
    rng = np.random.default_rng(i)
    n, t = LENGTHS[i], VIDEO[i]
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


# ---- independent computation of the values -------------------------------------------------------------------------------------


def expected_level(audio, s):
    """(F, K) float64 of the clip without padding, computed with librosa and scipy."""
    audio = audio[: s.record_samples]
    frames = 1 + -(-len(audio) * s.rate // 16_000) // s.hop
    x = np.pad(audio / 32_768.0, (0, 1_000))  # room for the decay of the decimation filter
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


def expected_motion(clip, s, frames):
    """(n, 136) float64: differences of np.interp of every coordinate, without time steps that use a frame without a face."""
    t = min(len(clip["landmarks"]), 75)
    first = 0 if s.centred else s.window / 2
    time_s = (np.arange(frames) * s.hop + first) / s.rate - float(clip["offset_s"])
    position = np.clip(time_s * float(clip["fps"]), 0, t - 1)
    track = clip["landmarks"][:t].reshape(t, -1).astype(np.float64) * 360 / clip["frame_size"][0]
    motion = np.diff(np.stack([np.interp(position, np.arange(t), c) for c in track.T], -1), axis=0, prepend=0)
    motion[0] = 0
    missing = np.interp(position, np.arange(t), ~clip["landmarks_valid"][:t]) > 0
    return motion[~(missing | np.concatenate([[False], missing[:-1]]))]


def record_with_face(i):
    """The same clip with a face whose eyes are 60 px apart; it rotates, changes its size and moves the mouth."""
    rng = np.random.default_rng(10 + i)
    clip = record(i)
    t = len(clip["landmarks"])
    face = rng.uniform([-60, -20], [60, 90], (68, 2))
    face[36:42], face[42:48] = face[36:42] * 0.1 - [30, 0], face[42:48] * 0.1 + [30, 0]
    angle, size = rng.normal(0, 0.02, t).cumsum(), np.exp(rng.normal(0, 0.01, t).cumsum())
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = face + rng.normal(0, 0.3, (t, 68, 2)).cumsum(0)
    return clip | {"landmarks": np.float32(180 + size[:, None, None] * np.einsum("xyt,tly->tlx", rotation, points))}


def expected_pose(clip):
    """(n, 272) float64, frame by frame: positions with the eyes level, in eye distances from the bridge, minus mean; velocities."""
    points, valid = clip["landmarks"][:75].astype(np.float64), clip["landmarks_valid"][:75]
    positions = []
    for shape in points:
        across = shape[42:48].mean(0) - shape[36:42].mean(0)  # iBUG from 1: eyes 37 to 48, bridge from 28
        along, down = across / np.hypot(*across), np.array([-across[1], across[0]]) / np.hypot(*across)
        positions.append(np.stack([(shape - shape[27]) @ along, (shape - shape[27]) @ down], -1).ravel() / np.hypot(*across))
    positions = np.stack(positions) - np.mean([p for p, seen in zip(positions, valid) if seen], 0)
    kept = [k for k in range(1, len(positions)) if valid[k] and valid[k - 1]]
    return np.stack([np.r_[positions[k], (positions[k] - positions[k - 1]) * float(clip["fps"]) / 25] for k in kept])


@functools.cache
def sums_of(i):
    return train_statistics.clip_sums(record(i))


@functools.cache
def expected_features(i, s):
    clip = record(i)
    level = expected_level(clip["audio"], s)
    return level, expected_motion(clip, s, len(level))


# ---- sums ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(len(LENGTHS)))
@by_name
def test_clip_sums_cover_exactly_the_valid_frames(i, preset):
    """Padding would change both the sums and the counts."""
    sums, s = sums_of(i), preset.name
    assert {v.dtype for v in sums.values()} == {np.dtype(np.int64)}
    level, motion = expected_features(i, preset)
    assert (sums[f"{s}.frames"], sums[f"{s}.motion_frames"]) == (len(level), len(motion))
    for name, values, off in (
        ("level", level, 3e-5),
        ("motion", motion, 1e-5 * 400),
    ):  # float32 rounding of levels and of landmarks
        np.testing.assert_allclose(sums[f"{s}.{name}"] / UNIT, values.sum(0), atol=off * np.sqrt(len(values)) + 1e-6)
        most = 2 * np.abs(values).max() * off * len(values)
        np.testing.assert_allclose(sums[f"{s}.{name}_squares"] / UNIT, (values**2).sum(0), atol=most + 1e-6)


@functools.cache
def sums_with_face(i):
    return train_statistics.clip_sums(record_with_face(i))


@pytest.mark.parametrize("i", range(len(LENGTHS)))
def test_clip_sums_of_poses(i):
    sums, pose = sums_with_face(i), expected_pose(record_with_face(i))
    assert sums["pose.pictures"] == len(pose) == {0: 75, 1: 74, 2: 30, 3: 2, 4: 75}[i] - 1 - (5 if VIDEO[i] > 20 else 0)
    np.testing.assert_allclose(sums["pose.pose"] / UNIT, pose.sum(0), atol=2e-5 * np.sqrt(len(pose)) + 1e-6)
    most = 2 * np.abs(pose).max() * 2e-5 * len(pose)
    np.testing.assert_allclose(sums["pose.pose_squares"] / UNIT, (pose**2).sum(0), atol=most + 1e-6)


def test_moments_of_poses_are_numpys_over_all_frames():
    kept = train_statistics.finish(functools.reduce(train_statistics.add, map(sums_with_face, range(len(LENGTHS)))))["pose"]
    video = np.concatenate([expected_pose(record_with_face(i)) for i in range(len(LENGTHS))])
    assert kept["pictures"] == len(video) and len(kept["pose_mean"]) == 272
    np.testing.assert_allclose(kept["pose_mean"], video.mean(0), atol=1e-5)
    np.testing.assert_allclose(kept["pose_std"], np.maximum(video.std(0), 1e-3), atol=1e-5)
    assert kept["pose_std"][2 * 27] == 1e-3, "the bridge is the origin; its standard deviation is the floor"


def test_frames_without_a_face_do_not_count():
    """Changing their landmarks changes nothing."""
    clip = record(0)
    points = np.where(clip["landmarks_valid"][:, None, None], clip["landmarks"], 1e4).astype(np.float32)
    moved = train_statistics.clip_sums(clip | {"landmarks": points})
    for name, value in sums_of(0).items():
        np.testing.assert_array_equal(moved[name], value)
    all_valid = train_statistics.clip_sums(clip | {"landmarks_valid": np.ones(75, bool)})
    # Video frames 5, 6 and 20 at 25/s affect 3 + 2 video frame times: 10 time steps at 50/s, plus at most 2 around each stretch.
    assert 10 <= all_valid["paper.motion_frames"] - sums_of(0)["paper.motion_frames"] <= 14
    assert all_valid["paper.frames"] == all_valid["paper.motion_frames"] == 149


def test_adding_is_exact_in_any_order():
    clips = [sums_of(i) for i in (0, 1, 2, 3, 4, 0, 2)]
    rng = np.random.default_rng(0)
    expected = functools.reduce(train_statistics.add, clips)
    for _ in range(5):
        heap = [clips[i] for i in rng.permutation(len(clips))]
        while len(heap) > 1:  # random pairs, as in Beam and worker processes
            one, two = heap.pop(rng.integers(len(heap))), heap.pop(rng.integers(len(heap)))
            heap.append(train_statistics.add(one, two))
        for name, value in expected.items():
            np.testing.assert_array_equal(heap[0][name], value)
    assert json.dumps(train_statistics.finish(heap[0])) == json.dumps(train_statistics.finish(expected))


SUMS_OF_A_CLIP = """
from tests.data import test_train_statistics as here
print({name: value.sum() for name, value in here.sums_of(0).items()})
"""


@pytest.mark.slow
def test_sums_do_not_depend_on_the_number_of_cores():
    """NPROC: the number of threads that XLA uses on a CPU."""
    command = [sys.executable, "-c", SUMS_OF_A_CLIP]
    runs = [subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NPROC": n}, cwd=ROOT) for n in "1235"]
    assert [r.stdout for r in runs] == [runs[0].stdout] * 4 and runs[0].stdout, runs[0].stderr


def test_sums_of_the_full_corpus_do_not_overflow():
    """34,000 clips with the largest accepted sum; digital silence, which has the largest squared level, is below it."""
    assert 34_000 * train_statistics.MAX_SUM * UNIT < 2**63
    silence = train_statistics.clip_sums(record(1, audio=np.zeros(48_000, np.int16)))
    assert silence["morrone.level_squares"][0] / UNIT == pytest.approx(250 * np.log(1e-6) ** 2, rel=1e-6)


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_a_clip_with_invalid_values_is_rejected(value):
    points = record(0)["landmarks"].copy()
    points[3, 50] = value
    with pytest.raises(StatisticsError, match="clip bbaf2n: .*expected <") as error:
        train_statistics.clip_sums(record(0, landmarks=points))
    assert "\n" not in str(error.value)


# ---- moments ---------------------------------------------------------------------------------------------------------------------


@by_name
def test_moments_are_numpys_over_all_frames(preset):
    kept = train_statistics.finish(functools.reduce(train_statistics.add, map(sums_of, range(len(LENGTHS)))))[preset.name]
    for k, name in enumerate(("level", "motion")):
        frames = np.concatenate([expected_features(i, preset)[k] for i in range(len(LENGTHS))])
        np.testing.assert_allclose(kept[f"{name}_mean"], frames.mean(0), atol=1e-4)
        np.testing.assert_allclose(kept[f"{name}_std"], frames.std(0), atol=1e-4)
        assert kept["frames" if name == "level" else "motion_frames"] == len(frames)


def test_statistics_are_json_with_seven_digits():
    kept = train_statistics.finish(sums_of(0))
    assert json.loads(json.dumps(kept)) == kept and sorted(kept) == ["morrone", "paper", "pose", "wide"]
    for of_preset in kept.values():
        numbers = sum((v for v in of_preset.values() if isinstance(v, list)), [])
        assert all(type(x) is float and x == float(f"{x:.7g}") and str(x) != "-0.0" for x in numbers)


def test_the_std_of_constant_values_is_the_floor():
    still = np.repeat(record(1)["landmarks"][:1], 74, 0)
    kept = train_statistics.finish(train_statistics.clip_sums(record(1, audio=np.zeros(48_000, np.int16), landmarks=still)))
    assert {*kept["pose"]["pose_std"]} == {1e-3} and kept.pop("pose")["pictures"] == 73 - 5
    for of_preset in kept.values():
        assert {*of_preset["level_std"], *of_preset["motion_std"]} == {1e-3}
    np.testing.assert_allclose(kept["wide"]["level_mean"], np.log(1e-5), rtol=1e-6)
