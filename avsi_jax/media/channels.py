"""A clip's channels as one sound, and that sound as each channel has it: for repairs, of any clip, and for drawings.

Mostly that is their mean, as everywhere else (clip_io.mono). Not where channels of opposite phase cancel each other in it, nor are
channels counted that hold next to nothing. Letters: N samples, C channels.
"""

from __future__ import annotations

import numpy as np

from avsi_jax.media import clip_io

DEAD = 1e-4  # of the loudest channel's power: what lies 40 dB below it is no part of the mean
LOST = 0.2  # of the power that the mean of unrelated channels has: with less of it, they cancel. Of two channels, correlation -0.8
REVERSED = -0.5  # correlation with the one sound below which a channel holds it reversed
MOST_GAIN = 4.0  # of a channel over the one sound


def weights_of(known: np.ndarray) -> np.ndarray:
    """(C,) by what each channel is multiplied in the one sound of a clip, by what is known of it, (N, C).

    The same for all, or for those that are not dead; where these cancel each other, the loudest alone.
    """
    if cancel(known):
        power = _power(known)
        return np.eye(len(power))[power.argmax()]
    live = _live(known)
    return live / live.sum()


def cancel(known: np.ndarray) -> bool:
    """Whether channels cancel each other in their mean."""
    live = _live(known)
    return _lost_in_mean(known[:, live], _power(known)[live])


def one(samples: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(N, C) -> (N,) float32; by the weights of these very samples where none are given."""
    weights = weights_of(samples) if weights is None else weights
    if (weights == weights[0]).all():
        return clip_io.mono(samples)
    return (np.asarray(samples, np.float64) @ weights).astype(np.float32)


def gains(known: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(C,) by what the one sound is to be multiplied to be as loud as each channel, negative where that holds it reversed."""
    audio, power = one(known, weights).astype(np.float64), _power(known)
    level = max(np.square(audio).mean(), 1e-18)
    alike = (known * audio[:, None]).mean(0) / np.sqrt(np.maximum(power * level, 1e-36))
    return (np.where(alike < REVERSED, -1, 1) * np.sqrt(power / level).clip(0, MOST_GAIN)).astype(np.float32)


def _power(known) -> np.ndarray:
    return np.square(known, dtype=np.float64).mean(0) if len(known) else np.zeros(known.shape[1])


def _live(known) -> np.ndarray:
    """(C,) which channels are not dead; all where nothing is heard."""
    power = _power(known)
    return power >= DEAD * power.max()


def _lost_in_mean(known, power) -> bool:
    mean = np.square(known.mean(1, dtype=np.float64)).mean() if len(known) else 0.0
    return bool(mean < LOST * power.mean() / len(power))
