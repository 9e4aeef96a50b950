"""Downmixes the channels of a clip to mono for inpainting and plots, and scales mono audio back to the level of each channel.

Mostly the downmix is the mean of the channels, as everywhere else (clip_io.mono). It is not where channels of opposite phase cancel
each other in the mean, and nearly silent channels do not count. Letters: N samples, C channels.
"""

from __future__ import annotations

import numpy as np

from avsi_jax.media import clip_io

SILENT_POWER = 1e-4  # relative to the loudest channel's power: channels 40 dB below it are left out of the mean
# Channels cancel where their mean has less than this share of the power that the mean of unrelated channels has. For two channels
# of equal power this is a correlation of -0.8.
CANCELLED_POWER = 0.2
INVERTED_CORRELATION = -0.5  # a channel with a lower correlation with the downmix counts as inverted
MAX_GAIN = 4.0  # of a channel over the downmix


def downmix_weights(samples: np.ndarray) -> np.ndarray:
    """Weight of each channel in the downmix, (N, C) -> (C,), determined from samples outside the gaps.

    Equal weights for all channels, or for those that are not silent; where these cancel each other, the loudest alone.
    """
    if cancel_in_mean(samples):
        power = _power(samples)
        return np.eye(len(power))[power.argmax()]
    active = _active(samples)
    return active / active.sum()


def cancel_in_mean(samples: np.ndarray) -> bool:
    """Whether the channels of (N, C) that are not silent cancel each other in their mean."""
    active = _active(samples)
    samples, power = samples[:, active], _power(samples)[active]
    mean_power = np.square(samples.mean(1, dtype=np.float64)).mean() if len(samples) else 0.0
    return bool(mean_power < CANCELLED_POWER * power.mean() / len(power))


def downmix(samples: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Downmix (N, C) -> (N,) float32; None: with the downmix_weights of these samples."""
    weights = downmix_weights(samples) if weights is None else weights
    if (weights == weights[0]).all():
        return clip_io.mono(samples)
    return (np.asarray(samples, np.float64) @ weights).astype(np.float32)


def channel_gains(samples: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Gains (C,) that scale the downmix to the level of each channel of (N, C), negative for channels that are inverted in it."""
    mono, power = downmix(samples, weights).astype(np.float64), _power(samples)
    mono_power = max(np.square(mono).mean(), 1e-18)
    correlation = (samples * mono[:, None]).mean(0) / np.sqrt(np.maximum(power * mono_power, 1e-36))
    sign = np.where(correlation < INVERTED_CORRELATION, -1, 1)
    return (sign * np.sqrt(power / mono_power).clip(0, MAX_GAIN)).astype(np.float32)


def _power(samples: np.ndarray) -> np.ndarray:
    return np.square(samples, dtype=np.float64).mean(0) if len(samples) else np.zeros(samples.shape[1])


def _active(samples: np.ndarray) -> np.ndarray:
    """(C,) bool: the channels that are not silent; all where every channel is."""
    power = _power(samples)
    return power >= SILENT_POWER * power.max()
