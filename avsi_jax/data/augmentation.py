"""A raw batch -> the same clips as another voice or camera might have given them. Training only, inside the jitted step.

Everything is drawn anew by key and clip id, so that it depends neither on the batch nor on the devices; a strength of 0 turns a
change off. What belongs to which picture stays true, words and labels too, but for what a slowed clip runs over its length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from avsi_jax.data.features import GRID_WIDTH
from avsi_jax.presets import RECORD_RATE

# iBUG-68 points of a face seen in a mirror: jaw, brows, nose, eyes and lips change sides.
_SIDES = (
    *zip(range(0, 8), range(16, 8, -1)),
    *zip(range(17, 22), range(26, 21, -1)),
    (31, 35), (32, 34), (36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46),
    (48, 54), (49, 53), (50, 52), (55, 59), (56, 58), (60, 64), (61, 63), (65, 67),
)  # fmt: skip
MIRRORED = np.arange(68)
MIRRORED[[a for a, _ in _SIDES]], MIRRORED[[b for _, b in _SIDES]] = map(list, zip(*(pair[::-1] for pair in _SIDES)))


def augment(
    key: jax.Array, batch: dict, *, speed: float, gain_db: float, mirror: float, stretch: float, noise_px: float, jitter_ms: float,
    drop_video: float, trim: float,
) -> dict:  # fmt: skip
    """The batch (arrays of `input_pipeline`) changed clip by clip; audio becomes float32, in units of int16.

    speed: sound and picture run faster by a factor of U(1 - speed, 1 + speed), pitch and formants with it (Ko et al. 2015);
    gain_db: loudness by U(-gain_db, gain_db); mirror: probability that left and right of the face change sides; stretch: every
    movement larger by U(1 - stretch, 1 + stretch), across and down each; noise_px: deviation of Gaussian noise on every point and
    picture, in pixels of a 360-wide picture; jitter_ms: the sound lags the picture by U(-jitter_ms, jitter_ms) more; drop_video:
    probability that no picture shows a face; trim: a share of trim x (1 - U(0, 1)^3) is cut off the silence before the words, and
    off that after them.
    """

    def one(hash_, clip):
        keys = jax.random.split(jax.random.fold_in(key, hash_), 8)
        between = lambda k, reach, shape=(): jax.random.uniform(k, shape, minval=-reach, maxval=reach)
        audio = clip["audio"].astype(jnp.float32)
        if trim:
            cut = trim * (1 - jax.random.uniform(keys[7], (2,)) ** 3)
            audio, length, start = trimmed(audio, clip["audio_length"], clip["speech"], cut)
            clip |= {"audio_length": length, "offset_s": clip["offset_s"] - start / RECORD_RATE}
        if speed:
            rate = 1 + between(keys[0], speed)
            audio, length = faster(audio, clip["audio_length"], rate)
            clip |= {"audio_length": length, "fps": clip["fps"] * rate, "offset_s": clip["offset_s"] / rate}
        if gain_db:
            audio = jnp.clip(audio * 10 ** (between(keys[1], gain_db) / 20), -32768, 32767)
        points = clip["landmarks"]
        if mirror:
            x, y = jnp.moveaxis(points[:, MIRRORED], -1, 0)
            over = jnp.stack([clip["frame_size"][0] - x, y], -1)
            points = jnp.where(jax.random.uniform(keys[2]) < mirror, over, points)
        if stretch:
            rest = points.mean(0, keepdims=True)
            points = rest + (points - rest) * (1 + between(keys[3], stretch, (1, 1, 2)))
        if noise_px:
            unit = noise_px * clip["frame_size"][0] / GRID_WIDTH
            points = points + unit * jax.random.normal(keys[4], points.shape)
        if jitter_ms:
            clip |= {"offset_s": clip["offset_s"] + between(keys[5], jitter_ms) / 1000}
        if drop_video:
            clip |= {"landmarks_valid": clip["landmarks_valid"] & (jax.random.uniform(keys[6]) >= drop_video)}
        return clip | {"audio": audio, "landmarks": points}

    touched = ("audio", "audio_length", "fps", "offset_s", "landmarks", "frame_size", "landmarks_valid", "speech")
    return batch | jax.vmap(one)(batch["id_hash"], {k: batch[k] for k in touched})


def trimmed(audio: jax.Array, length: jax.Array, speech: jax.Array, cut: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(N,) sound of `length` samples less shares `cut` (2,) of what is before and after `speech` (2,) s; its length and start."""
    first, last = jnp.clip(jnp.round(speech * RECORD_RATE).astype(jnp.int32), 0, length)
    start = jnp.floor(cut[0] * first).astype(jnp.int32)
    length = length - jnp.floor(cut[1] * (length - last)).astype(jnp.int32) - start
    return jnp.where(jnp.arange(audio.shape[0]) < length, jnp.roll(audio, -start), 0.0), length, start


def faster(audio: jax.Array, length: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(N,) sound of `length` samples played `rate` times as fast, by linear interpolation, cut to N; and its length."""
    total = audio.shape[0]
    position = jnp.arange(total) * rate
    low = jnp.minimum(jnp.floor(position).astype(jnp.int32), total - 1)
    part = position - low
    waveform = audio[low] * (1 - part) + audio[jnp.minimum(low + 1, total - 1)] * part
    length = jnp.minimum(jnp.floor(length / rate).astype(jnp.int32), total)
    return jnp.where(jnp.arange(total) < length, waveform, 0.0), length
