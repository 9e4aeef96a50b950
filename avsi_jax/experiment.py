"""A config -> the parts of an experiment: network, feature settings, optimiser, fresh parameters, objective.

Training, restoring and evaluating make them here, so that a checkpoint means the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


def make_model(config):
    """The network of a config; ValueError names a field that does not fit."""
    from avsi_jax import decode, models, spec, text

    system = models.get(config.system)
    for field, least in (("layers", 1), ("units", 1), ("bottleneck", 0)):
        if config[field] < least:
            raise ValueError(f"config.{field}: found {config[field]}, expected {least} or more")
    choices = {k: v if k in system.options else v[:1] for k, v in models.OPTIONS.items()} | {"ctc_units": tuple(decode.UNITS)}
    choices["feedback"] = tuple(n for n in choices["feedback"] if n < config.layers)  # a layer at least comes after
    for field, known in choices.items():
        if config[field] not in known:
            raise ValueError(
                f"config.{field}: found {config[field]!r}, expected {' or '.join(map(repr, known))} of {config.system}"
            )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"config.dropout: found {config.dropout}, expected a share from 0 to below 1")
    same = ("layers", "units", "bottleneck", "bottleneck_relu", "skip", "mask_input", "stack", "lip_layers", "feedback", "dropout",
            "video_rate", "lstm", "dtype")  # fmt: skip
    return system.build(
        models.Sizes(
            bands=spec.get(config.preset).bands,
            labels=text.NUM_PHONES if config.ctc_units == "phones" else text.NUM_LABELS,
            output=config.output if system.uses_video else "linear",
            **{name: config[name] for name in same},
        )
    )


def standardised(config) -> tuple[str, ...]:
    """What is standardised by statistics of the train split: 'level' of a preset on a log level, or where config.levels says so;
    'motion' where config.motion says so and the system looks at it. The paper's own preset and systems need none.
    """
    from avsi_jax import models, spec

    if config.motion not in ("pixels", "standardised", "pose"):
        raise ValueError(f"config.motion: found {config.motion!r}, expected 'pixels', 'standardised' or 'pose'")
    if config.motion == "standardised" and config.video_rate == "video":
        raise ValueError("config.motion: found 'standardised' at video_rate='video', but its statistics are of the audio rate; "
                         "expected 'pixels' or 'pose'")  # fmt: skip
    if config.levels not in ("preset", "standardised"):
        raise ValueError(f"config.levels: found {config.levels!r}, expected 'preset' or 'standardised'")
    wanted = {
        "level": config.levels == "standardised" or spec.get(config.preset).level == "log",
        "motion": config.motion != "pixels" and models.get(config.system).uses_video,
    }
    return tuple(k for k, v in wanted.items() if v)


def read_normalisation(config, dataset):
    """The features.Normalisation of a config by the statistics in a dataset's folder, which are read only where they are needed."""
    from avsi_jax import features, spec, train_statistics

    if not (wanted := standardised(config)):
        return features.Normalisation()
    statistics = train_statistics.read(dataset, config.preset)
    make = {
        "level": lambda: statistics.level_scale(spec.get(config.preset)),
        "motion": lambda: statistics.pose_scale(config.landmarks) if config.motion == "pose" else
        statistics.motion_scale(config.landmarks),
    }  # fmt: skip
    return features.Normalisation(**{k: make[k]() for k in wanted})


def make_feature_config(config, normalisation=None):
    """ValueError where the normalisation is not of what the config standardises; None: of nothing."""
    from avsi_jax import features

    normalisation = normalisation or features.Normalisation()
    given = tuple(k for k, scale in normalisation._asdict().items() if scale)
    if given != (wanted := standardised(config)):
        found, expected = (" and ".join(names) or "nothing" for names in (given, wanted))
        by = "by config.preset, config.levels and config.motion"
        raise ValueError(f"normalisation: found that of {found}, expected that of {expected}, {by}")
    return _feature_config(config, normalisation)


def _feature_config(config, normalisation):
    from avsi_jax import features, spec

    return features.FeatureConfig(
        spec.get(config.preset),
        config.gaps.protocol,
        config.landmarks,
        normalisation,
        motion="pose" if config.motion == "pose" else "pixels",
        video_rate=config.video_rate,
    )


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


def example_features(config, batch_size: int = 1):
    """Features of a made-up batch: what a network is initialised with."""
    import jax.numpy as jnp

    from avsi_jax import features, spec

    fc = _feature_config(config, features.Normalisation())
    frames, bands = fc.spec.num_frames, fc.spec.bands
    steps = spec.GRID_FRAMES if fc.video_rate == "video" else frames
    flags = lambda n: jnp.zeros((batch_size, n), bool)
    bank = jnp.zeros((batch_size, frames, bands))
    return features.Features(
        spectrogram=bank, mask=flags(frames), video=jnp.zeros((batch_size, steps, fc.video_size)), seen=~flags(steps), target=bank,
        valid=~flags(frames), num_frames=jnp.full((batch_size,), frames, jnp.int32), positions=jnp.zeros((batch_size, frames)),
        num_pictures=jnp.full((batch_size,), spec.GRID_FRAMES, jnp.int32), id_hash=jnp.zeros((batch_size,), jnp.uint32),
    )  # fmt: skip


def init_params(config):
    """Fresh parameters from config.seed."""
    import jax

    return jax.jit(make_model(config).init)(jax.random.key(config.seed), example_features(config))["params"]


def count_of(config) -> int:
    """Parameters of a config's network, without making them."""
    import jax

    from avsi_jax import models

    return models.count_parameters(jax.eval_shape(lambda: make_model(config).init(jax.random.key(0), example_features(config))))


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

    from avsi_jax import augment, gaps, losses, models, parallel
    from avsi_jax import features as features_lib

    model, feature_config = make_model(config), make_feature_config(config, normalisation)
    system = models.get(config.system)
    changes = {k: v for k, v in config.augment.items() if k != "lose_sound"}
    if not system.drops and (config.augment.lose_video or config.augment.lose_sound):
        raise ValueError(f"config.augment: {config.system} can't lose a stream; expected lose_video and lose_sound 0")
    for name, share in config.augment.items():
        most = {"speed": 0.5, "stretch": 1, "mirror": 1, "lose_video": 1, "lose_sound": 1, "trim": 1}.get(name, math.inf)
        if not 0 <= share <= most:
            raise ValueError(f"config.augment.{name}: found {share}, expected 0 to {most}")
    labels = ("phones", "phone_length") if config.ctc_units == "phones" else ("labels", "label_length")

    def objective(params, batch, key, step=0, counts=None):
        # Gaps are drawn by the key itself: the same ones whatever else is done.
        changing, dropping, losing = jax.random.split(key, 3)
        if train and any(changes.values()):
            batch = augment.augment(changing, batch, **changes)
        drawn = draw(key, losing, batch, step)
        features = features_lib.make_features(batch, drawn, feature_config)
        output = model.apply({"params": params}, features, train, rngs={"dropout": dropping} if train else None)
        weight = batch["weight"]
        whole = features.valid * weight[:, None]
        hole = features.mask * whole
        near = losses.near(features.mask, config.loss.near_frames, features.valid) * whole
        terms = {}
        if system.restores:
            terms["whole"] = losses.spectrogram_error(output.level, features.target, whole, config.loss.kind)
            terms["gap"] = losses.spectrogram_error(output.level, features.target, near, config.loss.kind)
        if system.reads:
            said, length = (batch[k] for k in labels)
            terms["ctc"] = losses.ctc(output.logits, output.num_steps, said, length, weight)
        # A mean of means is wrong as soon as gaps differ between devices: every sum is divided by the count of the whole batch.
        of_all = lambda k, n: parallel.sum_over_devices(n) if counts is None else counts[k]
        means = {k: s / jnp.maximum(of_all(k, n), 1.0) for k, (s, n) in terms.items()}
        total = sum(config.loss[k] * m for k, m in means.items())
        if system.reads:  # shown, not learned from
            terms["ctc_infeasible"] = (losses.infeasible(output.num_steps, said, length) @ weight, (length > 0) @ weight)
        if system.restores:
            restored = models.composite(output.level, features)
            levels = (features_lib.to_level(x, feature_config) for x in (restored, features.target))
            terms["gap_l1"] = losses.spectrogram_error(*levels, hole, "l1")  # Means.result turns levels into dB
        return Objective(total, terms, features, output)

    def draw(key, losing, batch, step):
        """Gaps of training; of a recogniser none."""
        how = {k: v for k, v in config.gaps.items() if k not in ("protocol", "curriculum_steps")}
        if not system.restores:
            return jnp.zeros((len(batch["audio"]), 1, 2), jnp.int32)
        if train and config.gaps.curriculum_steps:
            grown = jnp.minimum((step + 1) / config.gaps.curriculum_steps, 1.0)
            how |= {k: how[k] * grown for k in ("low_ms", "high_ms")}
        drawn = gaps.draw_batch(key, batch["id_hash"], batch["audio_length"], **how)
        if not (train and config.augment.lose_sound):
            return drawn
        lost = jax.vmap(lambda h: jax.random.uniform(jax.random.fold_in(losing, h)))(batch["id_hash"])
        lost = (lost < config.augment.lose_sound) & batch["landmarks_valid"].any(-1)  # a clip that lost its lips keeps its sound
        everything = jnp.zeros_like(drawn).at[:, 0, 1].set(batch["audio_length"])
        return jnp.where(lost[:, None, None], everything, drawn)

    return objective
