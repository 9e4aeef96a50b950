"""Data augmentation of a raw batch, inside the jitted training step: speed, gain, mirroring, noise, jitter and others.

The random draws depend only on the key and the clip id, not on the batch or the devices. A strength of 0 disables a change. Audio
and video stay aligned, and words and labels stay correct, except that a slowed-down clip may lose its end.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from avsi_jax.data.features import GRID_WIDTH
from avsi_jax.presets import RECORD_RATE

# iBUG-68 landmarks that change sides in a mirrored face: jaw, brows, nose, eyes and lips.
_MIRROR_PAIRS = (
    *zip(range(0, 8), range(16, 8, -1)),
    *zip(range(17, 22), range(26, 21, -1)),
    (31, 35), (32, 34), (36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46),
    (48, 54), (49, 53), (50, 52), (55, 59), (56, 58), (60, 64), (61, 63), (65, 67),
)  # fmt: skip
MIRRORED = np.arange(68)  # landmark i of the mirrored face is landmark MIRRORED[i] of the face
for _a, _b in _MIRROR_PAIRS:
    MIRRORED[_a], MIRRORED[_b] = _b, _a


def augment(
    key: jax.Array, batch: dict, *, speed: float, gain_db: float, mirror: float, stretch: float, noise_px: float, jitter_ms: float,
    drop_video: float, trim: float,
) -> dict:  # fmt: skip
    """The batch (arrays of `input_pipeline`) with every clip changed at random; audio becomes float32, still in int16 units.

    speed: audio and video play faster by a factor U(1 - speed, 1 + speed), which also shifts pitch and formants (Ko et al. 2015).
    gain_db: gain of U(-gain_db, gain_db).
    mirror: probability that the face is mirrored.
    stretch: movements are scaled by U(1 - stretch, 1 + stretch), separately in x and y.
    noise_px: standard deviation of Gaussian noise on every landmark and frame, in pixels of a frame 360 wide.
    jitter_ms: the A/V offset changes by U(-jitter_ms, jitter_ms).
    drop_video: probability that no frame shows a face.
    trim: a share trim * (1 - U(0, 1)^3) of the silence before the words is removed, and likewise after them.
    """

    def augment_clip(hash_, clip):
        keys = jax.random.split(jax.random.fold_in(key, hash_), 8)
        symmetric = lambda k, limit, shape=(): jax.random.uniform(k, shape, minval=-limit, maxval=limit)
        audio = clip["audio"].astype(jnp.float32)
        if trim:
            cut = trim * (1 - jax.random.uniform(keys[7], (2,)) ** 3)
            audio, length, start = trim_silence(audio, clip["audio_length"], clip["speech"], cut)
            clip |= {"audio_length": length, "offset_s": clip["offset_s"] - start / RECORD_RATE}
        if speed:
            rate = 1 + symmetric(keys[0], speed)
            audio, length = change_speed(audio, clip["audio_length"], rate)
            clip |= {"audio_length": length, "fps": clip["fps"] * rate, "offset_s": clip["offset_s"] / rate}
        if gain_db:
            audio = jnp.clip(audio * 10 ** (symmetric(keys[1], gain_db) / 20), -32768, 32767)
        points = clip["landmarks"]
        if mirror:
            x, y = jnp.moveaxis(points[:, MIRRORED], -1, 0)
            mirrored = jnp.stack([clip["frame_size"][0] - x, y], -1)
            points = jnp.where(jax.random.uniform(keys[2]) < mirror, mirrored, points)
        if stretch:
            inside = (jnp.arange(len(points)) < clip["num_frames"])[:, None, None]  # padding repeats the last frame
            mean = jnp.where(inside, points, 0.0).sum(0, keepdims=True) / clip["num_frames"]
            points = mean + (points - mean) * (1 + symmetric(keys[3], stretch, (1, 1, 2)))
        if noise_px:
            std = noise_px * clip["frame_size"][0] / GRID_WIDTH
            points = points + std * jax.random.normal(keys[4], points.shape)
        if jitter_ms:
            clip |= {"offset_s": clip["offset_s"] + symmetric(keys[5], jitter_ms) / 1000}
        if drop_video:
            clip |= {"landmarks_valid": clip["landmarks_valid"] & (jax.random.uniform(keys[6]) >= drop_video)}
        return clip | {"audio": audio, "landmarks": points}

    names = ("audio", "audio_length", "fps", "offset_s", "landmarks", "frame_size", "landmarks_valid", "num_frames", "speech")
    return batch | jax.vmap(augment_clip)(batch["id_hash"], {k: batch[k] for k in names})


def trim_silence(audio: jax.Array, length: jax.Array, speech: jax.Array, cut: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Removes shares cut (2,) of the audio before and after speech (2,) s from (N,) audio of `length` samples.

    Returns the audio (N,), its new length and the number of samples removed from the start.
    """
    first, last = jnp.clip(jnp.round(speech * RECORD_RATE).astype(jnp.int32), 0, length)
    start = jnp.floor(cut[0] * first).astype(jnp.int32)
    length = length - jnp.floor(cut[1] * (length - last)).astype(jnp.int32) - start
    return jnp.where(jnp.arange(audio.shape[0]) < length, jnp.roll(audio, -start), 0.0), length, start


def change_speed(audio: jax.Array, length: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(N,) audio of `length` samples, played `rate` times as fast by linear interpolation and cut to N; and its new length."""
    total = audio.shape[0]
    position = jnp.arange(total) * rate
    low = jnp.minimum(jnp.floor(position).astype(jnp.int32), total - 1)
    part = position - low
    resampled = audio[low] * (1 - part) + audio[jnp.minimum(low + 1, total - 1)] * part
    length = jnp.minimum(jnp.floor(length / rate).astype(jnp.int32), total)
    return jnp.where(jnp.arange(total) < length, resampled, 0.0), length
