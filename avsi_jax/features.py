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

from avsi_jax import gaps as gaps_lib
from avsi_jax import stft
from avsi_jax.spec import NUM_LANDMARKS, Spec

GRID_WIDTH = 360.0  # pixels; landmarks of other picture sizes are scaled to this width, so that a pixel means the same everywhere
MOUTH = slice(48, 68)  # iBUG points of the lips


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
    """What `make_features` needs to know. `landmarks`: 'face' (all 68 points, the paper's code) or 'mouth' (the paper's text)."""

    spec: Spec
    protocol: str = "waveform"
    landmarks: str = "face"
    normalisation: Normalisation = Normalisation()

    def __post_init__(self):
        if self.protocol not in gaps_lib.PROTOCOLS:
            raise ValueError(f"protocol: found {self.protocol!r}, expected one of {', '.join(gaps_lib.PROTOCOLS)}")
        if self.landmarks not in ("face", "mouth"):
            raise ValueError(f"landmarks: found {self.landmarks!r}, expected 'face' or 'mouth'")
        sizes = {"level": self.spec.bands, "motion": self.video_size}
        for (name, wanted), scale in zip(sizes.items(), self.normalisation, strict=True):
            if scale and not {len(scale.mean), len(scale.std)} <= {1, wanted}:
                raise ValueError(f"normalisation of {name}: found {len(scale.mean)} values, expected {wanted} or one for all")

    @property
    def video_size(self) -> int:
        """V, numbers a step that describe the lips."""
        return 2 * (NUM_LANDMARKS if self.landmarks == "face" else MOUTH.stop - MOUTH.start)


class Features(NamedTuple):
    """One batch: of `hear` with true levels and pixels, of `make_features` as networks and losses see it."""

    spectrogram: jax.Array  # (B, F, K) level of the damaged sound
    mask: jax.Array  # (B, F) bool, frames that a lost sample touches
    video: jax.Array  # (B, F, V) motion of the landmarks at audio rate
    target: jax.Array  # (B, F, K) level of the clean sound
    valid: jax.Array  # (B, F) bool, frames of the clip (false: padding)
    num_frames: jax.Array  # (B,) int32, valid frames of each clip


def make_features(batch: dict, gaps: jax.Array, config: FeatureConfig) -> Features:
    """Raw batch and gaps (B, G, 2) in record samples -> what the network eats and should say."""
    return standardise(hear(batch, gaps, config), config)


def hear(batch: dict, gaps: jax.Array, config: FeatureConfig) -> Features:
    """Raw batch and gaps (B, G, 2) in record samples -> Features, not standardised. The hidden samples reach `target` alone."""
    spec = config.spec
    sound, length = record_sound(batch, spec)
    lost = gaps_lib.lost_samples(gaps, spec.record_samples) & (jnp.arange(spec.record_samples)[None] < length[:, None])
    target = stft.log_mel_of_record(sound, spec)
    num_frames = frames_of_length(length, spec)
    valid = jnp.arange(spec.num_frames)[None] < num_frames[:, None]
    if config.protocol == "paper":
        mask = gaps_lib.centred_frames(gaps, spec, spec.num_frames) & valid
        seen = jnp.where(mask[..., None], hole_level(config), target)
    else:
        mask = gaps_lib.touched_frames(lost, spec) & valid
        seen = stft.log_mel_of_record(gaps_lib.damage(sound, lost), spec)
    return Features(
        spectrogram=seen, mask=mask, video=motion(batch, config), target=target, valid=valid, num_frames=num_frames
    )  # fmt: skip


def hole_level(config: FeatureConfig) -> jax.Array:
    """(1, 1, K or 1): what the paper's protocol leaves of a lost frame: silence; the mean spectrum where levels are standardised.

    The latter is Morrone's hole: a network finds 0 there in both cases.
    """
    scale = config.normalisation.level
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


def record_sound(batch: dict, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """int16 audio of the batch -> float32 (B, record_samples) in [-1, 1), cut or padded to the preset's clip, and lengths (B,)."""
    audio = batch["audio"]
    wanted = spec.record_samples
    audio = audio[:, :wanted] if audio.shape[1] >= wanted else jnp.pad(audio, ((0, 0), (0, wanted - audio.shape[1])))
    length = jnp.minimum(batch["audio_length"], wanted)
    sound = audio.astype(jnp.float32) / 32768.0
    return jnp.where(jnp.arange(wanted)[None] < length[:, None], sound, 0.0), length


def frames_of_length(record_samples: jax.Array, spec: Spec) -> jax.Array:
    """Valid frames of clips of so many record samples: at most `spec.num_frames`."""
    at_preset = -(-record_samples // spec.decimation)
    return jnp.minimum(spec.frames_of(at_preset), spec.num_frames).astype(jnp.int32)


def motion(batch: dict, config: FeatureConfig) -> jax.Array:
    """Landmark motion at audio rate, (B, F, V): linear interpolation to the frames' times, then the first difference (frame 0: 0).

    In pixels of a 360-wide picture, as the paper's code; that one spreads the pictures evenly over its frames by a spline that also
    runs across the landmark index, here a picture keeps its own time. The sound is never shifted: what is seen at t seconds is
    heard at t + offset_s.
    """
    spec = config.spec
    points = batch["landmarks"] * (GRID_WIDTH / batch["frame_size"][:, :1].astype(jnp.float32))[:, :, None, None]
    if config.landmarks == "mouth":
        points = points[:, :, MOUTH]
    flat = points.reshape(*points.shape[:2], -1)
    at_audio_rate = interpolate(flat, picture_positions(batch, spec))
    step = at_audio_rate[:, 1:] - at_audio_rate[:, :-1]
    return jnp.pad(step, ((0, 0), (1, 0), (0, 0)))


def picture_positions(batch: dict, spec: Spec) -> jax.Array:
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
