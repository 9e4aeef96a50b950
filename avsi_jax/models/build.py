"""A config -> network, feature settings, normalisation and fresh parameters: the same for training, restoring and evaluating."""

from __future__ import annotations


def make_model(config):
    """The network of a config; ValueError names a field that does not fit."""
    from avsi_jax import presets
    from avsi_jax.data import grid_text
    from avsi_jax.models import ctc_decoding, systems

    system = systems.get(config.system)
    for field, least in (("layers", 1), ("units", 1), ("bottleneck", 0)):
        if config[field] < least:
            raise ValueError(f"config.{field}: found {config[field]}, expected {least} or more")
    choices = {k: v if k in system.options else v[:1] for k, v in systems.OPTIONS.items()} | {
        "ctc_units": tuple(ctc_decoding.UNITS)
    }
    choices["feedback"] = tuple(n for n in choices["feedback"] if n < config.layers)  # a layer at least comes after
    for field, known in choices.items():
        if config[field] not in known:
            raise ValueError(
                f"config.{field}: found {config[field]!r}, expected {' or '.join(map(repr, known))} of {config.system}"
            )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"config.dropout: found {config.dropout}, expected a share from 0 to below 1")
    same = ("layers", "units", "bottleneck", "bottleneck_relu", "skip", "mask_input", "stack", "video_layers", "feedback", "dropout",
            "video_rate", "lstm", "dtype")  # fmt: skip
    return system.build(
        systems.Sizes(
            bands=presets.get(config.preset).bands,
            labels=grid_text.NUM_PHONES if config.ctc_units == "phones" else grid_text.NUM_LABELS,
            output=config.output if system.uses_video else "linear",
            **{name: config[name] for name in same},
        )
    )


def standardised(config) -> tuple[str, ...]:
    """What is standardised by statistics of the train split: 'level' of a preset on a log level, or where config.levels says so;
    'motion' where config.motion says so and the system looks at it. The paper's own preset and systems need none.
    """
    from avsi_jax import presets
    from avsi_jax.models import systems

    if config.motion not in ("pixels", "standardised", "pose"):
        raise ValueError(f"config.motion: found {config.motion!r}, expected 'pixels', 'standardised' or 'pose'")
    if config.motion == "standardised" and config.video_rate == "video":
        raise ValueError("config.motion: found 'standardised' at video_rate='video', but its statistics are of the audio rate; "
                         "expected 'pixels' or 'pose'")  # fmt: skip
    if config.levels not in ("preset", "standardised"):
        raise ValueError(f"config.levels: found {config.levels!r}, expected 'preset' or 'standardised'")
    wanted = {
        "level": config.levels == "standardised" or presets.get(config.preset).level == "log",
        "motion": config.motion != "pixels" and systems.get(config.system).uses_video,
    }
    return tuple(k for k, v in wanted.items() if v)


def read_normalisation(config, dataset):
    """The features.Normalisation of a config by the statistics in a dataset's folder, which are read only where they are needed."""
    from avsi_jax import presets
    from avsi_jax.data import features, train_statistics

    if not (wanted := standardised(config)):
        return features.Normalisation()
    statistics = train_statistics.read(dataset, config.preset)
    make = {
        "level": lambda: statistics.level_scale(presets.get(config.preset)),
        "motion": lambda: statistics.pose_scale(config.landmarks) if config.motion == "pose" else
        statistics.motion_scale(config.landmarks),
    }  # fmt: skip
    return features.Normalisation(**{k: make[k]() for k in wanted})


def make_feature_config(config, normalisation=None):
    """ValueError where the normalisation is not of what the config standardises; None: of nothing."""
    from avsi_jax.data import features

    normalisation = normalisation or features.Normalisation()
    given = tuple(k for k, scale in normalisation._asdict().items() if scale)
    if given != (wanted := standardised(config)):
        found, expected = (" and ".join(names) or "nothing" for names in (given, wanted))
        by = "by config.preset, config.levels and config.motion"
        raise ValueError(f"normalisation: found that of {found}, expected that of {expected}, {by}")
    return _feature_config(config, normalisation)


def _feature_config(config, normalisation):
    from avsi_jax import presets
    from avsi_jax.data import features

    return features.FeatureConfig(
        presets.get(config.preset),
        config.gaps.protocol,
        config.landmarks,
        normalisation,
        motion="pose" if config.motion == "pose" else "pixels",
        video_rate=config.video_rate,
    )


def example_features(config, batch_size: int = 1):
    """Features of a made-up batch: what a network is initialised with."""
    import jax.numpy as jnp

    from avsi_jax import presets
    from avsi_jax.data import features

    fc = _feature_config(config, features.Normalisation())
    frames, bands = fc.spec.num_frames, fc.spec.bands
    steps = presets.GRID_FRAMES if fc.video_rate == "video" else frames
    flags = lambda n: jnp.zeros((batch_size, n), bool)
    bank = jnp.zeros((batch_size, frames, bands))
    return features.Features(
        spectrogram=bank, mask=flags(frames), video=jnp.zeros((batch_size, steps, fc.video_size)), seen=~flags(steps), target=bank,
        valid=~flags(frames), num_frames=jnp.full((batch_size,), frames, jnp.int32), positions=jnp.zeros((batch_size, frames)),
        num_video_frames=jnp.full((batch_size,), presets.GRID_FRAMES, jnp.int32), id_hash=jnp.zeros((batch_size,), jnp.uint32),
    )  # fmt: skip


def init_params(config):
    """Fresh parameters from config.seed."""
    import jax

    return jax.jit(make_model(config).init)(jax.random.key(config.seed), example_features(config))["params"]


def count_of(config) -> int:
    """Parameters of a config's network, without making them."""
    import jax

    from avsi_jax.models import systems

    return systems.count_parameters(jax.eval_shape(lambda: make_model(config).init(jax.random.key(0), example_features(config))))
