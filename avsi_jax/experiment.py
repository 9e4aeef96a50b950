"""A config -> the parts of an experiment: network, feature settings, optimiser, fresh parameters, objective.

Training, restoring and evaluating make them here, so that a checkpoint means the same everywhere.
"""

from __future__ import annotations


def make_model(config):
    """The network of a config."""
    from avsi_jax import models, spec

    system = models.get(config.system)
    sizes = {"layers": config.layers, "units": config.units, "lstm": config.lstm}
    if system.reads_lips:
        if config.output not in ("linear", "relu"):
            raise ValueError(f"config.output: found {config.output!r}, expected 'linear' or 'relu'")
        sizes |= {"bottleneck": config.bottleneck, "output": config.output}
    return system.module(bands=spec.get(config.preset).bands, **sizes)


def standardised(config) -> tuple[str, ...]:
    """What is standardised by statistics of the train split: 'level' of a preset on a log level, 'motion' where config.motion says
    so and the system looks at it. The paper's own preset needs none.
    """
    from avsi_jax import models, spec

    if config.motion not in ("pixels", "standardised"):
        raise ValueError(f"config.motion: found {config.motion!r}, expected 'pixels' or 'standardised'")
    wanted = {
        "level": spec.get(config.preset).level == "log",
        "motion": config.motion == "standardised" and models.get(config.system).uses_video,
    }
    return tuple(k for k, v in wanted.items() if v)


def read_normalisation(config, dataset):
    """The features.Normalisation of a config by the statistics in a dataset's folder, which are read only where they are needed."""
    from avsi_jax import features, spec, train_statistics

    if not (wanted := standardised(config)):
        return features.Normalisation()
    statistics = train_statistics.read(dataset, config.preset)
    scales = {"level": statistics.level_scale(spec.get(config.preset)), "motion": statistics.motion_scale(config.landmarks)}
    return features.Normalisation(**{k: scales[k] for k in wanted})


def make_feature_config(config, normalisation=None):
    """ValueError where the normalisation is not of what the config standardises; None: of nothing."""
    from avsi_jax import features, spec

    normalisation = normalisation or features.Normalisation()
    given = tuple(k for k, scale in normalisation._asdict().items() if scale)
    if given != (wanted := standardised(config)):
        found, expected = (" and ".join(names) or "nothing" for names in (given, wanted))
        raise ValueError(f"normalisation: found that of {found}, expected that of {expected}, by config.preset and config.motion")
    return features.FeatureConfig(spec.get(config.preset), config.gaps.protocol, config.landmarks, normalisation)


def make_optimiser(config, steps_per_epoch: int):
    """Adam at learning rate 1 x schedule; the plateau's factor comes from the state."""
    import optax

    total = max(1, config.epochs * steps_per_epoch)
    if config.schedule == "cosine":
        warm = min(int(config.warmup_epochs * steps_per_epoch), total - 1)
        rate = optax.warmup_cosine_decay_schedule(config.learning_rate if not warm else 0.0, config.learning_rate, warm, total)
    elif config.schedule == "plateau":
        rate = config.learning_rate
    else:
        raise ValueError(f"config.schedule: found {config.schedule!r}, expected 'plateau' or 'cosine'")
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(*clip, optax.adam(rate))


def example_features(config, batch_size: int = 1):
    """Features of a made-up batch: what a network is initialised with."""
    import jax.numpy as jnp

    from avsi_jax import features, spec

    fc = features.FeatureConfig(spec.get(config.preset), config.gaps.protocol, config.landmarks)
    frames, bands = fc.spec.num_frames, fc.spec.bands
    flat = jnp.zeros((batch_size, frames), bool)
    bank = jnp.zeros((batch_size, frames, bands))
    return features.Features(
        spectrogram=bank, mask=flat, video=jnp.zeros((batch_size, frames, fc.video_size)), target=bank, valid=~flat,
        num_frames=jnp.full((batch_size,), frames, jnp.int32),
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


def make_loss(config, normalisation=None):
    """loss(params, batch, key) -> (scalar of the whole batch's share on this device, sums for the metrics)."""
    import jax.numpy as jnp

    from avsi_jax import features as features_lib
    from avsi_jax import gaps, losses, models, parallel

    model, feature_config = make_model(config), make_feature_config(config, normalisation)
    reads_lips = models.get(config.system).reads_lips
    draw = {k: v for k, v in config.gaps.items() if k != "protocol"}

    def loss(params, batch, key):
        drawn = gaps.draw_batch(key, batch["id_hash"], batch["audio_length"], **draw)
        features = features_lib.make_features(batch, drawn, feature_config)
        output = model.apply({"params": params}, features)
        whole = features.valid * batch["weight"][:, None]
        hole = features.mask * whole
        terms = {
            "whole": losses.spectrogram_error(output.level, features.target, whole, config.loss.kind),
            "gap": losses.spectrogram_error(output.level, features.target, hole, config.loss.kind),
        }
        if reads_lips:
            terms["ctc"] = losses.ctc(output.logits, features.num_frames, batch["labels"], batch["label_length"], batch["weight"])
        # A mean of means is wrong as soon as gaps differ between devices: every sum is divided by the count of the whole batch.
        means = {k: s / jnp.maximum(parallel.sum_over_devices(n), 1.0) for k, (s, n) in terms.items()}
        total = sum(config.loss[k] * m for k, m in means.items())
        restored = models.composite(output.level, features)
        levels = (features_lib.to_level(x, feature_config) for x in (restored, features.target))
        error = losses.spectrogram_error(*levels, hole, "l1")  # Means.result turns levels into dB
        return total, terms | {"gap_l1": error}

    return loss
