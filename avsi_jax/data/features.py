"""Features: turns a raw batch and its gaps into network inputs and targets, on device, inside the jitted step.

Raw batches come from `input_pipeline`, which documents their shapes. All functions are pure, so training, evaluation and
inpainting mask and process a clip in exactly the same way. Shapes: S is the number of time steps of the visual features (F at
audio rate, T at video rate) and V their size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avsi_jax.audio import gap_masks, stft
from avsi_jax.presets import GRID_FPS, NUM_LANDMARKS, Spec

GRID_WIDTH = 360.0  # px; landmarks in frames of other sizes are scaled to this width
MOUTH = slice(48, 68)  # iBUG landmarks of the lips
EYES, NOSE_BRIDGE = (slice(36, 42), slice(42, 48)), 27  # eyes on the left and right of the frame; top of the nose bridge


class Scale(NamedTuple):
    """Means and standard deviations, one per value or one for all; tuples, so that a FeatureConfig with them is hashable."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __repr__(self) -> str:  # short, because jax prints the constants of a jitted function in errors
        return f"Scale({len(self.mean)} means, {len(self.std)} standard deviations)"


class Normalisation(NamedTuple):
    """Scales by statistics of the train split; None: not standardised."""

    level: Scale | None = None  # K values or 1, for spectrogram and target
    motion: Scale | None = None  # V values or 1, for the visual features


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """Options of `make_features`. ValueError for unknown values and for scales of the wrong size.

    protocol: 'waveform' or 'paper' (gap_masks.PROTOCOLS).
    landmarks: 'face' (all 68, as in the paper's code) or 'mouth' (as in the paper's text).
    motion: 'pixels' (`motion`, as in the paper's code) or 'pose' (`pose`).
    interpolation: of motion in pixels at audio rate: 'time' (linear, every video frame at its own time) or 'spline'
      (`spread_evenly`, as in the paper's code).
    video_rate: 'audio' (visual features interpolated to the spectrogram frames, as in the paper's code) or 'video' (one time step
      per video frame; the network upsamples by `Features.positions`).
    """

    spec: Spec
    protocol: str = "waveform"
    landmarks: str = "face"
    normalisation: Normalisation = Normalisation()
    motion: str = "pixels"
    video_rate: str = "audio"
    interpolation: str = "time"

    def __post_init__(self):
        if self.protocol not in gap_masks.PROTOCOLS:
            raise ValueError(f"protocol: found {self.protocol!r}, expected one of {', '.join(gap_masks.PROTOCOLS)}")
        choices = {"landmarks": ("face", "mouth"), "motion": ("pixels", "pose"), "video_rate": ("audio", "video")}
        choices["interpolation"] = ("time", "spline") if (self.motion, self.video_rate) == ("pixels", "audio") else ("time",)
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(f"{field}: found {getattr(self, field)!r}, expected {' or '.join(map(repr, known))}")
        sizes = {"level": self.spec.bands, "motion": self.video_size}
        for (name, wanted), scale in zip(sizes.items(), self.normalisation, strict=True):
            if scale and not {len(scale.mean), len(scale.std)} <= {1, wanted}:
                raise ValueError(f"normalisation of {name}: found {len(scale.mean)} values, expected {wanted} or one for all")

    @property
    def video_size(self) -> int:
        """V, the size of the visual features per time step."""
        num_landmarks = NUM_LANDMARKS if self.landmarks == "face" else MOUTH.stop - MOUTH.start
        return (4 if self.motion == "pose" else 2) * num_landmarks


class Features(NamedTuple):
    """One batch: standardised if made by `make_features`, not standardised if made by `unstandardised_features`."""

    spectrogram: jax.Array  # (B, F, K) level of the masked audio
    mask: jax.Array  # (B, F) bool, frames affected by a missing sample
    video: jax.Array  # (B, S, V) visual features
    seen: jax.Array  # (B, S) bool, time steps whose video frames all show a face
    target: jax.Array  # (B, F, K) level of the clean audio
    valid: jax.Array  # (B, F) bool, frames of the clip (False: padding)
    num_frames: jax.Array  # (B,) int32, valid spectrogram frames of each clip
    positions: jax.Array  # (B, F) video frame number, with fraction, at each spectrogram frame
    num_video_frames: jax.Array  # (B,) int32, valid video frames of each clip
    id_hash: jax.Array  # (B,) uint32, seeds the random numbers of each clip


def make_features(batch: dict, gaps: jax.Array, config: FeatureConfig) -> Features:
    """Network inputs and targets of a raw batch with gaps (B, G, 2) in record samples."""
    return standardise(unstandardised_features(batch, gaps, config), config)


def unstandardised_features(batch: dict, gaps: jax.Array, config: FeatureConfig) -> Features:
    """Features of a raw batch with gaps (B, G, 2) in record samples, before standardisation.

    In the `waveform` protocol the samples in the gaps affect only `target`.
    """
    spec = config.spec
    audio, length = record_audio(batch, spec)
    missing = gap_masks.gap_samples(gaps, spec.record_samples) & (jnp.arange(spec.record_samples)[None] < length[:, None])
    target = stft.log_mel_of_record(audio, spec)
    num_frames = frames_of_length(length, spec)
    valid = jnp.arange(spec.num_frames)[None] < num_frames[:, None]
    if config.protocol == "paper":
        mask = gap_masks.centred_frames(gaps, spec, spec.num_frames) & valid
        spectrogram = jnp.where(mask[..., None], gap_level(config), target)
    else:
        mask = gap_masks.affected_frames(missing, spec) & valid
        spectrogram = stft.log_mel_of_record(gap_masks.mask_audio(audio, missing), spec)
    video, seen = visual_features(batch, config)
    return Features(
        spectrogram=spectrogram, mask=mask, video=video, seen=seen, target=target, valid=valid, num_frames=num_frames,
        positions=video_positions(batch, spec), num_video_frames=batch["num_frames"], id_hash=batch["id_hash"],
    )  # fmt: skip


def gap_level(config: FeatureConfig) -> jax.Array:
    """Level of a missing frame in the `paper` protocol: (1, 1, K or 1).

    Silence, or for a standardised 'log' level the mean spectrum, as in Morrone et al. A network sees 0 there in all cases except a
    standardised 'db' level.
    """
    scale = config.normalisation.level if config.spec.level == "log" else None
    return stft.along_last(np.float32(scale.mean if scale else [stft.silence_level(config.spec)]), 3)


def standardise(features: Features, config: FeatureConfig) -> Features:
    """Features with (x - mean) / std applied to levels and visual features, where the config has a scale for them."""
    level, motion_scale = config.normalisation
    if level:
        features = features._replace(**{k: _standardised(getattr(features, k), level) for k in ("spectrogram", "target")})
    return features._replace(video=_standardised(features.video, motion_scale)) if motion_scale else features


def _standardised(x: jax.Array, scale: Scale) -> jax.Array:
    mean, std = (stft.along_last(np.float32(v), x.ndim) for v in scale)
    return (x - mean) / std


def to_level(standardised: jax.Array, config: FeatureConfig) -> jax.Array:
    """Network output (..., K) -> level as defined in audio/stft.py: the inverse of `standardise`."""
    scale = config.normalisation.level
    if not scale:
        return standardised
    mean, std = (stft.along_last(np.float32(v), standardised.ndim) for v in scale)
    return standardised * std + mean


def record_audio(batch: dict, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """Audio of a raw batch as float32 (B, record_samples) in [-1, 1), cut or padded to the preset's clip; and its lengths (B,)."""
    audio = batch["audio"]
    wanted = spec.record_samples
    audio = audio[:, :wanted] if audio.shape[1] >= wanted else jnp.pad(audio, ((0, 0), (0, wanted - audio.shape[1])))
    length = jnp.minimum(batch["audio_length"], wanted)
    audio = audio.astype(jnp.float32) / 32768.0
    return jnp.where(jnp.arange(wanted)[None] < length[:, None], audio, 0.0), length


def frames_of_length(record_samples: jax.Array, spec: Spec) -> jax.Array:
    """Number of valid frames of clips of `record_samples` (...,), at most `spec.num_frames`."""
    at_preset = -(-record_samples // spec.decimation)
    return jnp.minimum(spec.frames_of(at_preset), spec.num_frames).astype(jnp.int32)


def visual_features(batch: dict, config: FeatureConfig) -> tuple[jax.Array, jax.Array]:
    """Visual features (B, S, V), and bool (B, S): time steps whose video frames all show a face."""
    make = pose if config.motion == "pose" else motion
    unseen = (~jnp.asarray(batch["landmarks_valid"]))[..., None].astype(jnp.float32)
    seen = _at_rate(unseen, batch, config)[..., 0] == 0
    if config.motion == "pixels":  # a difference uses two time steps
        seen = seen.at[:, 1:].set(seen[:, 1:] & seen[:, :-1])
    return make(batch, config), seen


def motion(batch: dict, config: FeatureConfig) -> jax.Array:
    """Landmark motion (B, S, V): linear interpolation to the times of the spectrogram frames, then the first difference.

    In pixels of a frame 360 wide, as in the paper's code; the first time step is 0. The paper's code spreads the video frames
    evenly over the spectrogram frames (config.interpolation 'spline'); otherwise every video frame keeps its own time. The audio is
    never shifted: the video at time t belongs to the audio at t + offset_s. At video rate the difference is
    between successive video frames.
    """
    points = batch["landmarks"] * (GRID_WIDTH / batch["frame_size"][:, :1].astype(jnp.float32))[:, :, None, None]
    if config.interpolation == "spline":
        return _first_difference(spread_evenly(_flat(points, config), batch["num_frames"], config.spec.num_frames))
    return _first_difference(_at_rate(_flat(points, config), batch, config))


def spread_evenly(values: jax.Array, num_video_frames: jax.Array, num_frames: int) -> jax.Array:
    """Values per video frame (B, T, V) -> (B, num_frames, V): spread evenly by a cubic spline, as in the paper's code.

    A clip with fewer than T video frames repeats its first one in front. The spline of that code also runs across the landmark
    numbers, which changes nothing: at the numbers themselves it goes through the values.
    """
    count = values.shape[1]
    source = jnp.clip(jnp.arange(count)[None] - (count - num_video_frames[:, None]), 0, count - 1)
    aligned = jnp.take_along_axis(values, source[..., None], axis=1)
    return jnp.einsum("ft,btv->bfv", spline_matrix(count, num_frames), aligned, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def spline_matrix(count: int, num_frames: int) -> np.ndarray:
    """(num_frames, count) float32: the interpolating cubic spline of `count` values, at `num_frames` evenly spread positions.

    The positions are count * k / num_frames, at most count - 1; the spline has knots at all values but the second and the last but
    one (FITPACK, scipy.interpolate.make_interp_spline).
    """
    from scipy import interpolate

    positions = np.minimum(np.linspace(0, count * (1 - 1 / num_frames), num_frames), count - 1)
    return interpolate.make_interp_spline(np.arange(count), np.eye(count), k=3)(positions).astype(np.float32)


def pose(batch: dict, config: FeatureConfig) -> jax.Array:
    """Landmark positions and velocities, independent of the head's position, size and in-plane rotation: (B, S, V), no unit.

    In every frame the face is rotated until the eyes are level, scaled to an eye distance of 1 and shifted so that the top of the
    nose bridge is at 0. Then the clip's mean over the frames that show a face is subtracted. The features are the positions,
    followed by their first differences scaled to 25 frames/s. Positions in frames without a face are 0.
    """
    points, known = batch["landmarks"], batch["landmarks_valid"][..., None, None]
    left, right = (points[:, :, eye].mean(2) for eye in EYES)
    across = right - left
    size = jnp.maximum(jnp.linalg.norm(across, axis=-1, keepdims=True), 1.0)  # px; avoids division by 0
    cos, sin = (across / size)[..., :1], (across / size)[..., 1:]
    x, y = jnp.moveaxis((points - points[:, :, NOSE_BRIDGE : NOSE_BRIDGE + 1]) / size[:, :, None], -1, 0)
    level = jnp.stack([cos * x + sin * y, cos * y - sin * x], -1)
    count = jnp.maximum(known.sum(1, keepdims=True), 1)
    position = jnp.where(known, level - jnp.where(known, level, 0.0).sum(1, keepdims=True) / count, 0.0)
    position = _flat(position, config)
    both_known = (known[:, 1:] & known[:, :-1])[..., 0]
    velocity = jnp.where(both_known, (position[:, 1:] - position[:, :-1]) * (batch["fps"][:, None, None] / GRID_FPS), 0.0)
    return _at_rate(jnp.concatenate([position, jnp.pad(velocity, ((0, 0), (1, 0), (0, 0)))], -1), batch, config)


def _flat(points: jax.Array, config: FeatureConfig) -> jax.Array:
    """Coordinates of the landmarks that the config selects: (B, T, L, 2) -> (B, T, 2 L')."""
    points = points[:, :, MOUTH] if config.landmarks == "mouth" else points
    return points.reshape(*points.shape[:2], -1)


def _at_rate(values: jax.Array, batch: dict, config: FeatureConfig) -> jax.Array:
    """Values per video frame (B, T, V) -> (B, S, V) at the rate of the config."""
    return values if config.video_rate == "video" else interpolate(values, video_positions(batch, config.spec))


def _first_difference(values: jax.Array) -> jax.Array:
    """(B, S, V) -> (B, S, V), 0 at the first time step."""
    return jnp.pad(values[:, 1:] - values[:, :-1], ((0, 0), (1, 0), (0, 0)))


def video_positions(batch: dict, spec: Spec) -> jax.Array:
    """(B, F): video frame number, with fraction, at the centre of each spectrogram frame; clipped to the clip's video frames."""
    first = 0 if spec.centred else spec.window // 2
    time_s = jnp.asarray((np.arange(spec.num_frames) * spec.hop + first) / spec.rate, jnp.float32)
    position = (time_s[None] - batch["offset_s"][:, None]) * batch["fps"][:, None]
    return jnp.clip(position, 0.0, (batch["num_frames"][:, None] - 1).astype(jnp.float32))


def interpolate(values: jax.Array, positions: jax.Array) -> jax.Array:
    """Linear interpolation along axis 1: values (B, T, V) at positions (B, F) in [0, T-1] -> (B, F, V)."""
    low = jnp.floor(positions).astype(jnp.int32)
    high = jnp.minimum(low + 1, values.shape[1] - 1)
    part = (positions - low)[..., None]
    take = lambda index: jnp.take_along_axis(values, index[..., None], axis=1)
    return take(low) * (1.0 - part) + take(high) * part
