"""A raw batch and its gaps -> what a network eats and what it should say. Runs inside the jitted step, on device.

Raw batches come from `input_pipeline` (shapes there). Everything here is a pure function of the batch, so training, evaluation and
repair damage and see a clip in exactly the same way.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avsi_jax.audio import gap_masks as gaps_lib
from avsi_jax.audio import stft
from avsi_jax.presets import GRID_FPS, NUM_LANDMARKS, Spec

GRID_WIDTH = 360.0  # pixels; landmarks of other picture sizes are scaled to this width, so that a pixel means the same everywhere
MOUTH = slice(48, 68)  # iBUG points of the lips
EYES, NOSE_BRIDGE = (slice(36, 42), slice(42, 48)), 27  # image left and right; the bridge's uppermost point


class Scale(NamedTuple):
    """Means and standard deviations to standardise by, one for each value or one for all; a FeatureConfig of them can be hashed."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __repr__(self) -> str:  # jax shows a jitted function's constants in its errors
        return f"Scale({len(self.mean)} means, {len(self.std)} standard deviations)"


class Normalisation(NamedTuple):
    """What a network sees standardised, by statistics of the train split; None: as it is."""

    level: Scale | None = None  # K values or 1: of spectrogram and target
    motion: Scale | None = None  # V values or 1


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """What `make_features` needs to know.

    landmarks: 'face' (all 68 points, the paper's code) or 'mouth' (the paper's text). motion: 'pixels' (first difference, the
    paper's code) or 'pose' (`pose`). video_rate: 'audio' (video features brought to the spectrogram's frames, the paper's code) or
    'video' (a step a picture: a network upsamples by `Features.positions`).
    """

    spec: Spec
    protocol: str = "waveform"
    landmarks: str = "face"
    normalisation: Normalisation = Normalisation()
    motion: str = "pixels"
    video_rate: str = "audio"

    def __post_init__(self):
        if self.protocol not in gaps_lib.PROTOCOLS:
            raise ValueError(f"protocol: found {self.protocol!r}, expected one of {', '.join(gaps_lib.PROTOCOLS)}")
        choices = {"landmarks": ("face", "mouth"), "motion": ("pixels", "pose"), "video_rate": ("audio", "video")}
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(f"{field}: found {getattr(self, field)!r}, expected {' or '.join(map(repr, known))}")
        sizes = {"level": self.spec.bands, "motion": self.video_size}
        for (name, wanted), scale in zip(sizes.items(), self.normalisation, strict=True):
            if scale and not {len(scale.mean), len(scale.std)} <= {1, wanted}:
                raise ValueError(f"normalisation of {name}: found {len(scale.mean)} values, expected {wanted} or one for all")

    @property
    def video_size(self) -> int:
        """V, numbers a step that describe the lips."""
        points = NUM_LANDMARKS if self.landmarks == "face" else MOUTH.stop - MOUTH.start
        return (4 if self.motion == "pose" else 2) * points


class Features(NamedTuple):
    """One batch: of `hear` with true levels and pixels, of `make_features` as networks and losses see it."""

    spectrogram: jax.Array  # (B, F, K) level of the damaged sound
    mask: jax.Array  # (B, F) bool, frames that a lost sample touches
    video: jax.Array  # (B, S, V) what describes the lips; S is F at audio rate, T at video rate
    seen: jax.Array  # (B, S) bool, steps whose pictures all show a face
    target: jax.Array  # (B, F, K) level of the clean sound
    valid: jax.Array  # (B, F) bool, frames of the clip (false: padding)
    num_frames: jax.Array  # (B,) int32, valid frames of each clip
    positions: jax.Array  # (B, F) the picture, with fraction, that belongs to each frame
    num_video_frames: jax.Array  # (B,) int32, valid pictures of each clip
    id_hash: jax.Array  # (B,) uint32, what a clip's random numbers are drawn by


def make_features(batch: dict, gaps: jax.Array, config: FeatureConfig) -> Features:
    """Raw batch and gaps (B, G, 2) in record samples -> what the network eats and should say."""
    return standardise(hear(batch, gaps, config), config)


def hear(batch: dict, gaps: jax.Array, config: FeatureConfig) -> Features:
    """Raw batch and gaps (B, G, 2) in record samples -> Features, not standardised. The hidden samples reach `target` alone."""
    spec = config.spec
    audio, length = record_audio(batch, spec)
    missing = gaps_lib.gap_samples(gaps, spec.record_samples) & (jnp.arange(spec.record_samples)[None] < length[:, None])
    target = stft.log_mel_of_record(audio, spec)
    num_frames = frames_of_length(length, spec)
    valid = jnp.arange(spec.num_frames)[None] < num_frames[:, None]
    if config.protocol == "paper":
        mask = gaps_lib.centred_frames(gaps, spec, spec.num_frames) & valid
        seen = jnp.where(mask[..., None], gap_level(config), target)
    else:
        mask = gaps_lib.touched_frames(missing, spec) & valid
        seen = stft.log_mel_of_record(gaps_lib.damage(audio, missing), spec)
    video, visible = lips(batch, config)
    return Features(
        spectrogram=seen, mask=mask, video=video, seen=visible, target=target, valid=valid, num_frames=num_frames,
        positions=video_positions(batch, spec), num_video_frames=batch["num_frames"],
        id_hash=batch["id_hash"],
    )  # fmt: skip


def gap_level(config: FeatureConfig) -> jax.Array:
    """(1, 1, K or 1): what the paper's protocol leaves of a lost frame: silence; on a log level the mean spectrum, Morrone's hole.

    A network finds 0 there, unless it sees a 'db' level standardised: then silence, as in lost samples.
    """
    scale = config.normalisation.level if config.spec.level == "log" else None
    return stft.along_last(np.float32(scale.mean if scale else [stft.silence_level(config.spec)]), 3)


def standardise(features: Features, config: FeatureConfig) -> Features:
    """(x - mean) / std of levels and motion, where the config has a scale for them."""
    level, motion_scale = config.normalisation
    if level:
        features = features._replace(**{k: _standardised(getattr(features, k), level) for k in ("spectrogram", "target")})
    return features._replace(video=_standardised(features.video, motion_scale)) if motion_scale else features


def _standardised(x: jax.Array, scale: Scale) -> jax.Array:
    mean, std = (stft.along_last(np.float32(v), x.ndim) for v in scale)
    return (x - mean) / std


def to_level(standardised: jax.Array, config: FeatureConfig) -> jax.Array:
    """What a network says, (..., K) -> the level that stft and vocoder know: the inverse of `standardise`."""
    scale = config.normalisation.level
    if not scale:
        return standardised
    mean, std = (stft.along_last(np.float32(v), standardised.ndim) for v in scale)
    return standardised * std + mean


def record_audio(batch: dict, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """int16 audio of the batch -> float32 (B, record_samples) in [-1, 1), cut or padded to the preset's clip, and lengths (B,)."""
    audio = batch["audio"]
    wanted = spec.record_samples
    audio = audio[:, :wanted] if audio.shape[1] >= wanted else jnp.pad(audio, ((0, 0), (0, wanted - audio.shape[1])))
    length = jnp.minimum(batch["audio_length"], wanted)
    waveform = audio.astype(jnp.float32) / 32768.0
    return jnp.where(jnp.arange(wanted)[None] < length[:, None], waveform, 0.0), length


def frames_of_length(record_samples: jax.Array, spec: Spec) -> jax.Array:
    """Valid frames of clips of so many record samples: at most `spec.num_frames`."""
    at_preset = -(-record_samples // spec.decimation)
    return jnp.minimum(spec.frames_of(at_preset), spec.num_frames).astype(jnp.int32)


def lips(batch: dict, config: FeatureConfig) -> tuple[jax.Array, jax.Array]:
    """What describes the lips (B, S, V), and the steps (B, S) whose pictures all show a face; S by `config.video_rate`."""
    make = pose if config.motion == "pose" else motion
    missing = (~jnp.asarray(batch["landmarks_valid"]))[..., None].astype(jnp.float32)
    seen = _at_rate(missing, batch, config)[..., 0] == 0
    if config.motion == "pixels":  # a difference is of two steps
        seen = seen.at[:, 1:].set(seen[:, 1:] & seen[:, :-1])
    return make(batch, config), seen


def motion(batch: dict, config: FeatureConfig) -> jax.Array:
    """Landmark motion, (B, S, V): linear interpolation to the frames' times, then the first difference (step 0: 0).

    In pixels of a 360-wide picture, as the paper's code; that one spreads the pictures evenly over its frames by a spline that also
    runs across the landmark index, here a picture keeps its own time. The sound is never shifted: what is seen at t seconds is
    heard at t + offset_s. At video rate the difference is that of successive pictures.
    """
    points = batch["landmarks"] * (GRID_WIDTH / batch["frame_size"][:, :1].astype(jnp.float32))[:, :, None, None]
    return _first_difference(_at_rate(_flat(points, config), batch, config))


def pose(batch: dict, config: FeatureConfig) -> jax.Array:
    """Where the face's points are and how fast they move, whoever turned or shifted the head: (B, S, V), no unit.

    In every picture the face is turned until the eyes are level, measured in distances of the eye centres and put with the top of
    the nose bridge at 0; then each clip's mean over the pictures that show a face is taken off. Positions first, then their first
    differences, scaled to those at 25 pictures a second. A picture without a face has zeros for its position.
    """
    points, known = batch["landmarks"], batch["landmarks_valid"][..., None, None]
    left, right = (points[:, :, eye].mean(2) for eye in EYES)
    across = right - left
    size = jnp.maximum(jnp.linalg.norm(across, axis=-1, keepdims=True), 1.0)  # px; a face without eyes is seen nowhere
    cos, sin = (across / size)[..., :1], (across / size)[..., 1:]
    x, y = jnp.moveaxis((points - points[:, :, NOSE_BRIDGE : NOSE_BRIDGE + 1]) / size[:, :, None], -1, 0)
    level = jnp.stack([cos * x + sin * y, cos * y - sin * x], -1)
    count = jnp.maximum(known.sum(1, keepdims=True), 1)
    place = jnp.where(known, level - jnp.where(known, level, 0.0).sum(1, keepdims=True) / count, 0.0)
    place = _flat(place, config)
    both_known = (known[:, 1:] & known[:, :-1])[..., 0]
    speed = jnp.where(both_known, (place[:, 1:] - place[:, :-1]) * (batch["fps"][:, None, None] / GRID_FPS), 0.0)
    return _at_rate(jnp.concatenate([place, jnp.pad(speed, ((0, 0), (1, 0), (0, 0)))], -1), batch, config)


def _flat(points: jax.Array, config: FeatureConfig) -> jax.Array:
    """(B, T, L, 2) -> (B, T, V or its half) of the points that the config looks at."""
    points = points[:, :, MOUTH] if config.landmarks == "mouth" else points
    return points.reshape(*points.shape[:2], -1)


def _at_rate(values: jax.Array, batch: dict, config: FeatureConfig) -> jax.Array:
    """(B, T, V) of the pictures -> (B, S, V)."""
    return values if config.video_rate == "video" else interpolate(values, video_positions(batch, config.spec))


def _first_difference(values: jax.Array) -> jax.Array:
    """(B, S, V), step 0: 0."""
    return jnp.pad(values[:, 1:] - values[:, :-1], ((0, 0), (1, 0), (0, 0)))


def video_positions(batch: dict, spec: Spec) -> jax.Array:
    """(B, F): the picture index, with fraction, that belongs to the middle of each spectrogram frame; held at both ends."""
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
