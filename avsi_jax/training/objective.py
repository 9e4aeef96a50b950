"""A config -> the parts of a training: optimiser, learning rate and objective (network and features: models/build.py).

Training, restoring and evaluating make them here, so that a checkpoint means the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


def make_optimiser(config, steps_per_epoch: int):
    """Adam at learning rate 1 x schedule; the plateau's factor comes from the state."""
    import optax

    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(*clip, optax.adam(_schedule(config, steps_per_epoch)))


def learning_rate(config, steps_per_epoch: int) -> Callable[[int], float]:
    """step -> Adam's learning rate in it, steps counted from 0, before the plateau's factor (Progress.lr_scale)."""
    rate = _schedule(config, steps_per_epoch)
    return lambda step: float(rate(step)) if callable(rate) else rate


def _schedule(config, steps_per_epoch: int):
    """A number, or an optax schedule."""
    import optax

    total = max(1, config.epochs * steps_per_epoch)
    if config.schedule == "cosine":
        warm = min(int(config.warmup_epochs * steps_per_epoch), total - 1)
        return optax.warmup_cosine_decay_schedule(config.learning_rate if not warm else 0.0, config.learning_rate, warm, total)
    if config.schedule == "plateau":
        return config.learning_rate
    raise ValueError(f"config.schedule: found {config.schedule!r}, expected 'plateau' or 'cosine'")


class Objective(NamedTuple):
    """total: the scalar that is learned from, this device's share of the whole batch's. terms: a (sum, count) of each of its parts
    and of what is shown beside them. features, output: what the network saw and said.
    """

    total: Any
    terms: dict
    features: Any
    output: Any


def make_loss(config, normalisation=None, train: bool = True):
    """loss(params, batch, key, step=0, counts=None) -> (total, terms) of the Objective."""
    objective = make_objective(config, normalisation, train)

    def loss(params, batch, key, step=0, counts=None):
        found = objective(params, batch, key, step, counts)
        return found.total, found.terms

    return loss


def make_objective(config, normalisation=None, train: bool = True):
    """objective(params, batch, key, step=0, counts=None) -> Objective.

    `train`: whether clips are augmented, streams and values dropped, and gaps short at first (gaps.curriculum_steps).
    `counts`: {term: count} of the whole batch, where `batch` is only a part of this device's share of it.
    """
    import jax
    import jax.numpy as jnp

    from avsi_jax.audio import gap_masks
    from avsi_jax.data import augmentation
    from avsi_jax.data import features as features_lib
    from avsi_jax.models import build, losses, systems
    from avsi_jax.runtime import devices

    model, feature_config = build.make_model(config), build.make_feature_config(config, normalisation)
    system = systems.get(config.system)
    changes = {k: v for k, v in config.augment.items() if k != "drop_audio"}
    if not system.drops and (config.augment.drop_video or config.augment.drop_audio):
        raise ValueError(f"config.augment: {config.system} can't lose a stream; expected drop_video and drop_audio 0")
    for name, share in config.augment.items():
        most = {"speed": 0.5, "stretch": 1, "mirror": 1, "drop_video": 1, "drop_audio": 1, "trim": 1}.get(name, math.inf)
        if not 0 <= share <= most:
            raise ValueError(f"config.augment.{name}: found {share}, expected 0 to {most}")
    labels = ("phones", "phone_length") if config.ctc_units == "phones" else ("labels", "label_length")

    def objective(params, batch, key, step=0, counts=None):
        # Gaps are drawn by the key itself: the same ones whatever else is done.
        changing, dropping, losing = jax.random.split(key, 3)
        if train and any(changes.values()):
            batch = augmentation.augment(changing, batch, **changes)
        drawn = draw(key, losing, batch, step)
        features = features_lib.make_features(batch, drawn, feature_config)
        output = model.apply({"params": params}, features, train, rngs={"dropout": dropping} if train else None)
        weight = batch["weight"]
        whole = features.valid * weight[:, None]
        gap = features.mask * whole
        near = losses.near(features.mask, config.loss.near_frames, features.valid) * whole
        terms = {}
        if system.restores:
            terms["whole"] = losses.spectrogram_error(output.level, features.target, whole, config.loss.kind)
            terms["gap"] = losses.spectrogram_error(output.level, features.target, near, config.loss.kind)
        if system.reads:
            said, length = (batch[k] for k in labels)
            terms["ctc"] = losses.ctc(output.logits, output.num_steps, said, length, weight)
        # A mean of means is wrong as soon as gaps differ between devices: every sum is divided by the count of the whole batch.
        of_all = lambda k, n: devices.sum_over_devices(n) if counts is None else counts[k]
        means = {k: s / jnp.maximum(of_all(k, n), 1.0) for k, (s, n) in terms.items()}
        total = sum(config.loss[k] * m for k, m in means.items())
        if system.reads:  # shown, not learned from
            terms["ctc_infeasible"] = (losses.infeasible(output.num_steps, said, length) @ weight, (length > 0) @ weight)
        if system.restores:
            restored = systems.composite(output.level, features)
            levels = (features_lib.to_level(x, feature_config) for x in (restored, features.target))
            terms["gap_l1"] = losses.spectrogram_error(*levels, gap, "l1")  # Means.result turns levels into dB
        return Objective(total, terms, features, output)

    def draw(key, losing, batch, step):
        """Gaps of training; of a recogniser none."""
        how = {k: v for k, v in config.gaps.items() if k not in ("protocol", "curriculum_steps")}
        if not system.restores:
            return jnp.zeros((len(batch["audio"]), 1, 2), jnp.int32)
        if train and config.gaps.curriculum_steps:
            grown = jnp.minimum((step + 1) / config.gaps.curriculum_steps, 1.0)
            how |= {k: how[k] * grown for k in ("total_mean_ms", "total_std_ms", "total_min_ms", "total_max_ms")}
        drawn = gap_masks.draw_batch(key, batch["id_hash"], batch["audio_length"], **how)
        if not (train and config.augment.drop_audio):
            return drawn
        missing = jax.vmap(lambda h: jax.random.uniform(jax.random.fold_in(losing, h)))(batch["id_hash"])
        missing = (missing < config.augment.drop_audio) & batch["landmarks_valid"].any(
            -1
        )  # a clip that lost its lips keeps its sound
        everything = jnp.zeros_like(drawn).at[:, 0, 1].set(batch["audio_length"])
        return jnp.where(missing[:, None, None], everything, drawn)

    return objective
