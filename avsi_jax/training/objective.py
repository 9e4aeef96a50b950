"""The objective of a config, the same for training, validation and replay.

Network and features are built by models/build.py, the optimiser by training/optimiser.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from avsi_jax.data.features import Features, Normalisation
    from avsi_jax.models.systems import Output


class Objective(NamedTuple):
    """Result of the objective function."""

    total: Any  # scalar that is minimised: this device's share of the value for the global batch
    terms: dict  # {name: (sum, count)} of its parts and of metrics that are only reported
    features: Features
    output: Output


def make_loss(config: ConfigDict, normalisation: Normalisation | None = None, train: bool = True) -> Callable:
    """loss(params, batch, key, step=0, counts=None) -> (total, terms) of `make_objective`."""
    objective = make_objective(config, normalisation, train)

    def loss(params, batch, key, step=0, counts=None):
        result = objective(params, batch, key, step, counts)
        return result.total, result.terms

    return loss


def make_objective(config: ConfigDict, normalisation: Normalisation | None = None, train: bool = True) -> Callable:
    """objective(params, batch, key, step=0, counts=None) -> Objective.

    train: apply augmentation, dropout and the gap curriculum (gaps.curriculum_steps).
    counts: {term: count} of the global batch, needed if `batch` is only a part of this device's share.
    A batch with `gaps` (B, G, 2) in record samples keeps them; otherwise they are drawn from the key.
    """
    import jax
    import jax.numpy as jnp

    from avsi_jax.audio import gap_masks
    from avsi_jax.data import augmentation
    from avsi_jax.data import features as features_lib
    from avsi_jax.models import build, losses, systems
    from avsi_jax.runtime import devices

    if config.refiner:
        fix = "train without, then add one with python -m avsi_jax.inference.refine"
        raise ValueError(f"config.refiner: found {config.refiner}, expected 0; {fix}")
    model, feature_config = build.make_model(config), build.make_feature_config(config, normalisation)
    system = systems.get(config.system)
    changes = {k: v for k, v in config.augment.items() if k != "drop_audio"}
    if not system.handles_missing_streams and (config.augment.drop_video or config.augment.drop_audio):
        raise ValueError(f"config.augment: {config.system} does not support missing streams; expected drop_video and drop_audio 0")
    for name, value in config.augment.items():
        maximum = {"speed": 0.5, "stretch": 1, "mirror": 1, "drop_video": 1, "drop_audio": 1, "trim": 1}.get(name, math.inf)
        if not 0 <= value <= maximum:
            raise ValueError(f"config.augment.{name}: found {value}, expected 0 to {maximum}")
    label_fields = ("phones", "phone_length") if config.ctc_units == "phones" else ("labels", "label_length")

    def objective(params, batch, key, step=0, counts=None):
        # Gaps are drawn from the key itself, so they do not depend on augmentation or dropout.
        augment_key, dropout_key, drop_audio_key = jax.random.split(key, 3)
        if train and any(changes.values()):
            batch = augmentation.augment(augment_key, batch, **changes)
        gaps = draw_gaps(key, drop_audio_key, batch, step)
        features = features_lib.make_features(batch, gaps, feature_config)
        output = model.apply({"params": params}, features, train, rngs={"dropout": dropout_key} if train else None)
        weight = batch["weight"]
        whole = features.valid * weight[:, None]
        gap = features.mask * whole
        near = losses.near(features.mask, config.loss.near_frames, features.valid) * whole
        terms = {}
        if system.restores:
            terms["whole"] = losses.spectrogram_error(output.level, features.target, whole, config.loss.kind)
            terms["gap"] = losses.spectrogram_error(output.level, features.target, near, config.loss.kind)
        if system.has_ctc_head:
            labels, length = (batch[k] for k in label_fields)
            terms["ctc"] = losses.ctc(output.logits, output.num_steps, labels, length, weight)
        # Every sum is divided by the count of the global batch: the mean of the devices' means would be wrong, since gaps differ.
        global_count = lambda k, n: devices.sum_over_devices(n) if counts is None else counts[k]
        means = {k: s / jnp.maximum(global_count(k, n), 1.0) for k, (s, n) in terms.items()}
        total = sum(config.loss[k] * m for k, m in means.items())
        if system.has_ctc_head:  # reported only
            terms["ctc_infeasible"] = (losses.infeasible(output.num_steps, labels, length) @ weight, (length > 0) @ weight)
        if system.restores:
            restored = systems.composite(output.level, features)
            levels = (features_lib.to_level(x, feature_config) for x in (restored, features.target))
            terms["gap_l1"] = losses.spectrogram_error(*levels, gap, "l1")  # Means.result converts levels to dB
        return Objective(total, terms, features, output)

    def draw_gaps(key, drop_audio_key, batch, step):
        """Gaps (B, G, 2) of the batch; none for a recognizer."""
        if not system.restores:
            return jnp.zeros((len(batch["audio"]), 1, 2), jnp.int32)
        if "gaps" in batch:
            return batch["gaps"]
        options = {k: v for k, v in config.gaps.items() if k not in ("protocol", "curriculum_steps", "fixed")}
        if train and config.gaps.fixed:
            key = jax.random.key(config.seed)
        if train and config.gaps.curriculum_steps:
            share = jnp.minimum((step + 1) / config.gaps.curriculum_steps, 1.0)
            durations = ("total_mean_ms", "total_std_ms", "total_min_ms", "total_max_ms")
            options |= {k: options[k] * share for k in durations}
        gaps = gap_masks.draw_batch(key, batch["id_hash"], batch["audio_length"], **options)
        if not (train and config.augment.drop_audio):
            return gaps
        draws = jax.vmap(lambda h: jax.random.uniform(jax.random.fold_in(drop_audio_key, h)))(batch["id_hash"])
        # A clip without a visible face keeps its audio.
        dropped = (draws < config.augment.drop_audio) & batch["landmarks_valid"].any(-1)
        whole_clip = jnp.zeros_like(gaps).at[:, 0, 1].set(batch["audio_length"])
        return jnp.where(dropped[:, None, None], whole_clip, gaps)

    return objective
