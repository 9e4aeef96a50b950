"""Mean and standard deviation of levels and visual features over the train split, for every preset.

They are computed while a dataset is built, stored in its metadata.json and read by training. Every clip gives integer sums
(`clip_sums`), so adding them is exact and does not depend on the order or the number of workers. The summed values are the ones
that training computes with data/features.py and audio/stft.py, without gaps and without standardisation.

Motion counts only where the face was seen: time steps that depend on a video frame without a usable face (landmarks_valid False,
landmarks interpolated), directly or through the difference to the previous step, are left out. The still time steps at the ends
of a clip count, because training sees them too.
"""

from __future__ import annotations

import functools
import json
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from avsi_jax import presets
from avsi_jax.audio import stft
from avsi_jax.data import features, input_pipeline
from avsi_jax.data.features import FeatureConfig, Scale
from avsi_jax.presets import Spec

KEY = "train_statistics"  # in metadata.json
UNIT = 2**20  # sums are stored in units of 1 / UNIT; the rounding error per clip, half a unit, is 5e-7
MAX_SUM = 2**26  # largest sum of one clip, level or px squared: 2**63 / UNIT / MAX_SUM = 131,072 clips can be added
STD_FLOOR = 1e-3  # level or px: constant values are not amplified
DIGITS = 7  # significant digits stored: metadata.json does not depend on the last bits


class StatisticsError(ValueError):
    """The dataset has no suitable statistics, or a clip has values that cannot be summed."""


# ---- a clip --------------------------------------------------------------------------------------------------------------------


def clip_sums(record: dict) -> dict[str, np.ndarray]:
    """Sums over the valid frames of one clip, int64; `record` as stored.

    For every preset P: counts P.frames and P.motion_frames (); in units of 1 / UNIT the sums P.level and P.level_squares (K,),
    P.motion and P.motion_squares (136,), in pixels of a frame 360 wide. Independent of the preset: pose.pictures (), the number of
    video frames counted, pose.pose and pose.pose_squares (272,). StatisticsError for sums that are too large or not finite.
    """
    example = input_pipeline.to_example(record)
    batch = {k: np.asarray(v)[None] for k, v in example.items() if k != "clip_id"}
    sums = {}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for preset in presets.PRESETS.values():
            audio, length = _audio(batch, preset)
            values = _values(batch, _decimated(np.asarray(audio), preset), length, preset)
            level, num_frames, motion, seen = (np.asarray(a)[0] for a in values)
            seen = seen & (np.arange(len(seen)) < num_frames)
            sums[f"{preset.name}.frames"] = np.int64(num_frames)
            sums[f"{preset.name}.motion_frames"] = np.int64(seen.sum())
            for name, counted in {"level": level[:num_frames], "motion": motion[seen]}.items():
                exact = counted.astype(np.float64)
                sums[f"{preset.name}.{name}"] = _to_units(exact.sum(0), record)
                sums[f"{preset.name}.{name}_squares"] = _to_units((exact**2).sum(0), record)
        sums |= _pose_sums(batch, record)
    return sums


def _pose_sums(batch: dict, record: dict) -> dict[str, np.ndarray]:
    """Sums of `features.pose` at video rate over frames that show a face, as does the previous frame; independent of the preset."""
    values, known = (np.asarray(a)[0] for a in _pose(batch))
    counted = values[1:][known[1:] & known[:-1]].astype(np.float64)
    sums = {"pose.pictures": np.int64(len(counted)), "pose.pose": _to_units(counted.sum(0), record)}
    return sums | {"pose.pose_squares": _to_units((counted**2).sum(0), record)}


@jax.jit
def _pose(batch: dict) -> tuple[jax.Array, jax.Array]:
    return features.visual_features(batch, FeatureConfig(presets.get("paper"), motion="pose", video_rate="video"))


_audio = jax.jit(features.record_audio, static_argnums=1)


def _decimated(audio: np.ndarray, preset: Spec) -> np.ndarray:
    """`stft.decimate` in float64 with scipy: (B, record_samples) -> (B, N) float32.

    XLA's result differs slightly with the number of CPU cores, which would make the bytes of metadata.json depend on the machine.
    """
    factor = preset.decimation
    if factor == 1:
        return audio
    from scipy import signal

    taps = stft.decimation_filter(factor).astype(np.float64)
    first = stft.FIR_HALF_TAPS // factor
    return signal.upfirdn(taps, audio.astype(np.float64), down=factor)[:, first : first + preset.num_samples].astype(np.float32)


@functools.partial(jax.jit, static_argnums=3)
def _values(batch: dict, audio: jax.Array, length: jax.Array, preset: Spec):
    """Level (B, F, K), number of valid frames (B,), motion (B, F, 136) and whether the face was seen (B, F)."""
    num_frames = features.frames_of_length(length, preset)
    return stft.log_mel(audio, preset), num_frames, *features.visual_features(batch, FeatureConfig(preset))


def _to_units(sums: np.ndarray, record: dict) -> np.ndarray:
    """Sums as integers in units of 1 / UNIT."""
    if not (np.abs(sums) < MAX_SUM).all():
        raise StatisticsError(
            f"clip {record['id']}: found a sum of level or motion of {np.abs(sums).max():g}, expected < {MAX_SUM:g}"
        )
    return np.rint(sums * UNIT).astype(np.int64)


# ---- a split -------------------------------------------------------------------------------------------------------------------


def add(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds two dicts of sums. The addition is exact, so order and grouping do not matter."""
    return {name: a[name] + b[name] for name in a}


def finish(sums: dict[str, np.ndarray]) -> dict[str, dict]:
    """Converts sums to the statistics stored in metadata.json.

    For every preset: frames, level_mean and level_std (K numbers); motion_frames, motion_mean and motion_std (136 numbers). Under
    "pose": pictures, pose_mean and pose_std (272 numbers). Standard deviations are those of the population, at least STD_FLOOR.
    """
    statistics = {}
    for name in presets.PRESETS:
        level_frames, motion_frames = (int(sums[f"{name}.{count}"]) for count in ("frames", "motion_frames"))
        statistics[name] = {"frames": level_frames, **_moments(sums, f"{name}.level", level_frames)}
        statistics[name] |= {"motion_frames": motion_frames, **_moments(sums, f"{name}.motion", motion_frames)}
    video_frames = int(sums["pose.pictures"])
    return statistics | {"pose": {"pictures": video_frames, **_moments(sums, "pose.pose", video_frames)}}


def _moments(sums: dict[str, np.ndarray], key: str, count: int) -> dict[str, list[float]]:
    mean, square = (sums[k] / (UNIT * max(count, 1)) for k in (key, f"{key}_squares"))
    std = np.maximum(np.sqrt(np.maximum(square - mean**2, 0.0)), STD_FLOOR)
    name = key.split(".")[1]
    return {f"{name}_mean": _rounded(mean), f"{name}_std": _rounded(std)}


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{x:.{DIGITS}g}") + 0.0 for x in values]  # + 0.0 turns -0.0 into 0.0


# ---- a dataset -----------------------------------------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """Statistics of the train split for one preset, float64."""

    level_mean: np.ndarray  # (K,)
    level_std: np.ndarray  # (K,)
    motion_mean: np.ndarray  # (136,)
    motion_std: np.ndarray  # (136,)
    pose_mean: np.ndarray  # (272,), the same for all presets; empty in datasets older than 2.1.0
    pose_std: np.ndarray  # (272,)

    def level_scale(self, preset: Spec) -> Scale:
        """One mean and std per bin on a linear scale (Morrone et al. 2021), one for all bands on a mel scale."""
        if preset.scale == "linear":
            return _scale(self.level_mean, self.level_std)
        mean = self.level_mean.mean()
        square = (self.level_std**2 + self.level_mean**2).mean()  # all bands have the same number of frames
        return _scale([mean], [np.sqrt(square - mean**2)])

    def motion_scale(self, landmarks: str) -> Scale:
        """One mean and std per coordinate of the landmarks; `landmarks`: 'face' or 'mouth'."""
        return _scale(*(_select(v, landmarks) for v in (self.motion_mean, self.motion_std)))

    def pose_scale(self, landmarks: str) -> Scale:
        """One mean and std per position and velocity of the landmarks; StatisticsError for a dataset without them."""
        if not self.pose_mean.size:
            raise StatisticsError("metadata.json of the dataset has no statistics of poses; rebuild with avsi-prepare --overwrite")
        both = lambda v: np.concatenate([_select(half, landmarks) for half in np.split(v, 2)])
        return _scale(both(self.pose_mean), both(self.pose_std))


def _select(values: np.ndarray, landmarks: str) -> np.ndarray:
    """The values (136,) of all landmarks, or only those of the mouth."""
    points = features.MOUTH if landmarks == "mouth" else slice(None)
    return values.reshape(presets.NUM_LANDMARKS, 2)[points].ravel()


def _scale(mean, std) -> Scale:
    return Scale(*(tuple(float(x) for x in v) for v in (mean, std)))


def read(dataset_folder: epath.PathLike, preset: str) -> Statistics:
    """The statistics for one preset from a dataset's metadata.json; StatisticsError if there are none."""
    path = epath.Path(dataset_folder) / "metadata.json"
    expected = f"expected {KEY} for preset {preset!r}; rebuild with avsi-prepare --overwrite"
    try:
        metadata = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise StatisticsError(f"{path} can't be read ({e}); {expected}") from e
    if KEY not in metadata:
        raise StatisticsError(f"{path}: found only {', '.join(metadata) or 'nothing'}; {expected}")
    pose = metadata[KEY].get("pose", {})
    stored = (metadata[KEY].get(preset) or {}) | pose
    sizes = (presets.get(preset).bands,) * 2 + (2 * presets.NUM_LANDMARKS,) * 2 + (4 * presets.NUM_LANDMARKS if pose else 0,) * 2
    arrays = [np.asarray(stored.get(name, []), np.float64) for name in Statistics._fields]
    if [v.shape for v in arrays] != [(n,) for n in sizes] or not all(np.isfinite(v).all() for v in arrays):
        shapes = ", ".join(f"{name} {v.size}" for name, v in zip(Statistics._fields, arrays, strict=True))
        raise StatisticsError(f"{path}: found {shapes} numbers, not {sizes}; {expected}")
    return Statistics(*arrays)
