"""The optimiser of a config: Adam, its learning-rate schedule and gradient clipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optax
    from ml_collections import ConfigDict


def make_optimiser(config: ConfigDict, steps_per_epoch: int) -> optax.GradientTransformation:
    """Adam with the config's schedule and gradient clipping; the factor of the plateau schedule is part of the TrainState."""
    import optax

    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(*clip, optax.adam(_schedule(config, steps_per_epoch), eps=config.adam_epsilon))


def learning_rate(config: ConfigDict, steps_per_epoch: int) -> Callable[[int], float]:
    """Function from the training step, counted from 0, to Adam's learning rate before the plateau factor (Progress.lr_scale)."""
    rate = _schedule(config, steps_per_epoch)
    return lambda step: float(rate(step)) if callable(rate) else rate


def _schedule(config: ConfigDict, steps_per_epoch: int) -> optax.ScalarOrSchedule:
    """A number, or an optax schedule."""
    import optax

    total = max(1, config.epochs * steps_per_epoch)
    if config.schedule == "cosine":
        warmup = min(int(config.warmup_epochs * steps_per_epoch), total - 1)
        return optax.warmup_cosine_decay_schedule(config.learning_rate if not warmup else 0.0, config.learning_rate, warmup, total)
    if config.schedule == "plateau":
        return config.learning_rate
    raise ValueError(f"config.schedule: found {config.schedule!r}, expected 'plateau' or 'cosine'")
