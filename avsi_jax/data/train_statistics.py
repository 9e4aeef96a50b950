"""Mean and standard deviation of levels and motion over the train split, for every preset: made while a dataset is built, kept in
its metadata, read by training.

A clip gives sums in integers (`clip_sums`), so that adding clips is exact: the same in any order, by any number of workers. They
are of what training itself computes by data/features.py and audio/stft.py, undamaged and not standardised.

Motion is counted where it was seen: frames that a picture without a usable face (landmarks_valid false, its points interpolated)
has a part in, through the frame before too, do not count. Stillness at a clip's ends does, as training sees it.
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

KEY = "train_statistics"  # in the dataset's metadata.json
UNIT = 2**20  # sums are counted in 1 / UNIT: half of it, a clip's rounding, is 5e-7 of sums in the hundreds
MAX_SUM = 2**26  # of one clip, in level or pixels squared: 2**63 / UNIT / MAX_SUM = 131,072 clips can be added
STD_FLOOR = 1e-3  # level or pixels: what never moves is not blown up
DIGITS = 7  # of the numbers kept: the metadata's bytes don't hang on the last bits


class StatisticsError(ValueError):
    """The dataset holds no statistics that fit, or a clip can't be counted."""


# ---- a clip --------------------------------------------------------------------------------------------------------------------


def clip_sums(record: dict) -> dict[str, np.ndarray]:
    """Sums over one clip's valid frames, int64; `record` as stored. For every preset P, the counts P.frames and P.motion_frames ();
    in 1 / UNIT the sums P.level and P.level_squares (K,), P.motion and P.motion_squares (136,), pixels of a 360-wide picture.
    """
    example = input_pipeline.to_example(record)
    batch = {k: np.asarray(v)[None] for k, v in example.items() if k != "clip_id"}
    sums = {}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for preset in presets.PRESETS.values():
            audio, length = _audio(batch, preset)
            made = _values(batch, _decimated(np.asarray(audio), preset), length, preset)
            level, num_frames, motion, seen = (np.asarray(a)[0] for a in made)
            seen = seen & (np.arange(len(seen)) < num_frames)
            sums[f"{preset.name}.frames"] = np.int64(num_frames)
            sums[f"{preset.name}.motion_frames"] = np.int64(seen.sum())
            for name, counted in {"level": level[:num_frames], "motion": motion[seen]}.items():
                exact = counted.astype(np.float64)
                sums[f"{preset.name}.{name}"] = _whole(exact.sum(0), record)
                sums[f"{preset.name}.{name}_squares"] = _whole((exact**2).sum(0), record)
        sums |= _pose_sums(batch, record)
    return sums


def _pose_sums(batch: dict, record: dict) -> dict[str, np.ndarray]:
    """Of `features.pose` at video rate, over the pictures that show a face as the one before does: no preset has a part in it."""
    values, known = (np.asarray(a)[0] for a in _pose(batch))
    counted = values[1:][known[1:] & known[:-1]].astype(np.float64)
    sums = {"pose.pictures": np.int64(len(counted)), "pose.pose": _whole(counted.sum(0), record)}
    return sums | {"pose.pose_squares": _whole((counted**2).sum(0), record)}


@jax.jit
def _pose(batch: dict) -> tuple[jax.Array, jax.Array]:
    return features.lips(batch, FeatureConfig(presets.get("paper"), motion="pose", video_rate="video"))


_audio = jax.jit(features.record_audio, static_argnums=1)


def _decimated(audio: np.ndarray, preset: Spec) -> np.ndarray:
    """`stft.decimate` in float64 by scipy: (B, record_samples) -> (B, N) float32.

    XLA's convolution rounds otherwise on another number of cores: small as that is, the metadata's bytes would show it.
    """
    step = preset.decimation
    if step == 1:
        return audio
    from scipy import signal

    taps = stft.decimation_filter(step).astype(np.float64)
    first = stft.FIR_HALF_TAPS // step
    return signal.upfirdn(taps, audio.astype(np.float64), down=step)[:, first : first + preset.num_samples].astype(np.float32)


@functools.partial(jax.jit, static_argnums=3)
def _values(batch: dict, audio: jax.Array, length: jax.Array, preset: Spec):
    """Level (B, F, K), valid frames (B,), motion (B, F, 136) and whether it was seen (B, F)."""
    num_frames = features.frames_of_length(length, preset)
    return stft.log_mel(audio, preset), num_frames, *features.lips(batch, FeatureConfig(preset))


def _whole(sums: np.ndarray, record: dict) -> np.ndarray:
    """Sums in 1 / UNIT."""
    if not (np.abs(sums) < MAX_SUM).all():
        raise StatisticsError(f"clip {record['id']}: its level or motion adds up to {np.abs(sums).max():g}, expected < {MAX_SUM:g}")
    return np.rint(sums * UNIT).astype(np.int64)


# ---- a split -------------------------------------------------------------------------------------------------------------------


def add(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The sums of both; exact, so that it may be done in any order and grouping."""
    return {name: a[name] + b[name] for name in a}


def finish(sums: dict[str, np.ndarray]) -> dict[str, dict]:
    """What the metadata keeps, ready for JSON: for every preset frames, level_mean, level_std (K numbers), and motion_frames,
    motion_mean, motion_std (136). Standard deviations are those of the whole population, STD_FLOOR at least.
    """
    kept = {}
    for name in presets.PRESETS:
        level_frames, motion_frames = (int(sums[f"{name}.{count}"]) for count in ("frames", "motion_frames"))
        kept[name] = {"frames": level_frames, **_moments(sums, f"{name}.level", level_frames)}
        kept[name] |= {"motion_frames": motion_frames, **_moments(sums, f"{name}.motion", motion_frames)}
    video = int(sums["pose.pictures"])
    return kept | {"pose": {"pictures": video, **_moments(sums, "pose.pose", video)}}


def _moments(sums: dict[str, np.ndarray], key: str, count: int) -> dict[str, list[float]]:
    mean, square = (sums[k] / (UNIT * max(count, 1)) for k in (key, f"{key}_squares"))
    std = np.maximum(np.sqrt(np.maximum(square - mean**2, 0.0)), STD_FLOOR)
    what = key.split(".")[1]
    return {f"{what}_mean": _rounded(mean), f"{what}_std": _rounded(std)}


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{x:.{DIGITS}g}") + 0.0 for x in values]  # + 0.0: no -0.0


# ---- a dataset -----------------------------------------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """Of the train split at one preset: float64 level_mean, level_std (K,), motion_mean, motion_std (136,); and at every preset
    pose_mean, pose_std (272,), empty in a dataset older than 2.1.0.
    """

    level_mean: np.ndarray
    level_std: np.ndarray
    motion_mean: np.ndarray
    motion_std: np.ndarray
    pose_mean: np.ndarray
    pose_std: np.ndarray

    def level_scale(self, preset: Spec) -> Scale:
        """A linear scale is standardised bin by bin (Morrone et al. 2021), a mel by one mean and one std over all its bands."""
        if preset.scale == "linear":
            return _scale(self.level_mean, self.level_std)
        mean = self.level_mean.mean()
        square = (self.level_std**2 + self.level_mean**2).mean()  # every band has equally many frames
        return _scale([mean], [np.sqrt(square - mean**2)])

    def motion_scale(self, landmarks: str) -> Scale:
        """For each coordinate of the face's points, or of the mouth's."""
        return _scale(*(_points_of(v, landmarks) for v in (self.motion_mean, self.motion_std)))

    def pose_scale(self, landmarks: str) -> Scale:
        """For each position and speed of the face's points, or of the mouth's."""
        if not self.pose_mean.size:
            raise StatisticsError("the dataset's metadata.json holds no statistics of poses; rebuild with avsi-prepare --overwrite")
        both = lambda v: np.concatenate([_points_of(half, landmarks) for half in np.split(v, 2)])
        return _scale(both(self.pose_mean), both(self.pose_std))


def _points_of(values: np.ndarray, landmarks: str) -> np.ndarray:
    """(136,) -> those of the face's points, or of the mouth's."""
    points = features.MOUTH if landmarks == "mouth" else slice(None)
    return values.reshape(presets.NUM_LANDMARKS, 2)[points].ravel()


def _scale(mean, std) -> Scale:
    return Scale(*(tuple(float(x) for x in v) for v in (mean, std)))


def read(dataset_folder, preset: str) -> Statistics:
    """The statistics that a dataset's metadata.json holds for one preset; StatisticsError where it has none."""
    path = epath.Path(dataset_folder) / "metadata.json"
    expected = f"expected {KEY} of preset {preset!r} there; rebuild with avsi-prepare --overwrite"
    try:
        metadata = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise StatisticsError(f"{path} can't be read ({e}); {expected}") from e
    if KEY not in metadata:
        raise StatisticsError(f"{path}: found only {', '.join(metadata) or 'nothing'}; {expected}")
    of_pose = metadata[KEY].get("pose", {})
    kept = (metadata[KEY].get(preset) or {}) | of_pose
    sizes = (presets.get(preset).bands,) * 2 + (2 * presets.NUM_LANDMARKS,) * 2 + (4 * presets.NUM_LANDMARKS if of_pose else 0,) * 2
    found = [np.asarray(kept.get(name, []), np.float64) for name in Statistics._fields]
    if [v.shape for v in found] != [(n,) for n in sizes] or not all(np.isfinite(v).all() for v in found):
        shapes = ", ".join(f"{name} {v.size}" for name, v in zip(Statistics._fields, found, strict=True))
        raise StatisticsError(f"{path}: found {shapes} numbers, not {sizes}; {expected}")
    return Statistics(*found)
