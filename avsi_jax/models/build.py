"""Builds network, feature settings, normalisation and initial parameters from a config, for training, inference and evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import flax.linen as nn
    from ml_collections import ConfigDict

    from avsi_jax.data.features import FeatureConfig, Features, Normalisation


def make_model(config: ConfigDict) -> nn.Module:
    """The network of a config; ValueError names the field whose value the system does not support."""
    from avsi_jax import presets
    from avsi_jax.data import grid_text
    from avsi_jax.models import ctc_decoding, refiner, systems

    system = systems.get(config.system)
    for field, minimum in (("layers", 1), ("units", 1), ("bottleneck", 0), ("refiner", 0)):
        if config[field] < minimum:
            raise ValueError(f"config.{field}: found {config[field]}, expected {minimum} or more")
    choices = {k: v if k in system.options else v[:1] for k, v in systems.OPTIONS.items()} | {
        "ctc_units": tuple(ctc_decoding.UNITS)
    }
    choices["feedback"] = tuple(n for n in choices["feedback"] if n < config.layers)  # at least one layer must follow
    choices |= {"init": ("flax", "keras")}
    for field, known in choices.items():
        if config[field] not in known:
            raise ValueError(
                f"config.{field}: found {config[field]!r}, expected {' or '.join(map(repr, known))} for {config.system}"
            )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"config.dropout: found {config.dropout}, expected a share in [0, 1)")
    same = ("layers", "units", "bottleneck", "bottleneck_relu", "skip", "mask_input", "stack", "video_layers", "feedback",
            "dropout", "video_rate", "lstm", "dtype", "init")  # fmt: skip
    if config.refiner and not system.restores:
        raise ValueError(f"config.refiner: found {config.refiner}, expected 0 for {config.system}, which restores nothing")
    network = system.build(
        systems.Sizes(
            bands=presets.get(config.preset).bands,
            labels=grid_text.NUM_PHONES if config.ctc_units == "phones" else grid_text.NUM_LABELS,
            output=config.output if system.uses_video else "linear",
            **{name: config[name] for name in same},
        )
    )
    return refiner.RefinedNetwork(network, config.refiner) if config.refiner else network


def without_refiner(config: ConfigDict, params: dict) -> tuple[ConfigDict, dict]:
    """Config and parameters of the network alone: it predicts the mean over what could have been spoken."""
    from avsi_jax.models import refiner

    if not config.refiner:
        return config, params
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        plain.refiner = 0
    return plain.lock(), params[refiner.NETWORK]


def standardised(config: ConfigDict) -> tuple[str, ...]:
    """The inputs that are standardised by statistics of the train split: any of 'level' and 'motion'.

    Levels are standardised for presets with logarithmic levels and for config.levels='standardised'; motion as config.motion asks,
    if the system uses video. The paper's preset and systems standardise nothing.
    """
    from avsi_jax import presets
    from avsi_jax.models import systems

    if config.motion not in ("pixels", "standardised", "pose"):
        raise ValueError(f"config.motion: found {config.motion!r}, expected 'pixels', 'standardised' or 'pose'")
    if config.motion == "standardised" and config.video_rate == "video":
        raise ValueError("config.motion: found 'standardised' with video_rate='video', but its statistics are those of the audio "
                         "rate; expected 'pixels' or 'pose'")  # fmt: skip
    if config.interpolation == "spline" and config.motion != "pixels":
        raise ValueError(f"config.interpolation: found 'spline' with motion={config.motion!r}, expected motion='pixels'")
    if config.levels not in ("preset", "standardised"):
        raise ValueError(f"config.levels: found {config.levels!r}, expected 'preset' or 'standardised'")
    needed = {
        "level": config.levels == "standardised" or presets.get(config.preset).level == "log",
        "motion": config.motion != "pixels" and systems.get(config.system).uses_video,
    }
    return tuple(k for k, v in needed.items() if v)


def read_normalisation(config: ConfigDict, dataset: Path) -> Normalisation:
    """The normalisation of a config from the statistics in the dataset folder, which are read only if the config needs them."""
    from avsi_jax import presets
    from avsi_jax.data import features, train_statistics

    if not (needed := standardised(config)):
        return features.Normalisation()
    statistics = train_statistics.read(dataset, config.preset)
    scales = {
        "level": lambda: statistics.level_scale(presets.get(config.preset)),
        "motion": lambda: statistics.pose_scale(config.landmarks) if config.motion == "pose" else
        statistics.motion_scale(config.landmarks),
    }  # fmt: skip
    return features.Normalisation(**{k: scales[k]() for k in needed})


def make_feature_config(config: ConfigDict, normalisation: Normalisation | None = None) -> FeatureConfig:
    """The feature settings of a config.

    normalisation: the scales of what the config standardises, None if it standardises nothing; ValueError if they do not match.
    """
    from avsi_jax.data import features

    normalisation = normalisation or features.Normalisation()
    given = tuple(k for k, scale in normalisation._asdict().items() if scale)
    if given != (needed := standardised(config)):
        found, expected = (" and ".join(names) or "nothing" for names in (given, needed))
        fields = "config.preset, config.levels and config.motion"
        raise ValueError(f"normalisation: found that of {found}, expected that of {expected}, according to {fields}")
    return _feature_config(config, normalisation)


def _feature_config(config: ConfigDict, normalisation: Normalisation) -> FeatureConfig:
    from avsi_jax import presets
    from avsi_jax.data import features

    return features.FeatureConfig(
        presets.get(config.preset),
        config.gaps.protocol,
        config.landmarks,
        normalisation,
        motion="pose" if config.motion == "pose" else "pixels",
        video_rate=config.video_rate,
        interpolation=config.interpolation,
    )


def example_features(config: ConfigDict, batch_size: int = 1) -> Features:
    """Features of zeros in the shapes and types of a real batch, to initialise a network with."""
    import jax.numpy as jnp

    from avsi_jax import presets
    from avsi_jax.data import features

    fc = _feature_config(config, features.Normalisation())
    frames, bands = fc.spec.num_frames, fc.spec.bands
    video_steps = presets.GRID_FRAMES if fc.video_rate == "video" else frames
    flags = lambda n: jnp.zeros((batch_size, n), bool)
    level = jnp.zeros((batch_size, frames, bands))
    return features.Features(
        spectrogram=level,
        mask=flags(frames),
        video=jnp.zeros((batch_size, video_steps, fc.video_size)),
        seen=~flags(video_steps),
        target=level,
        valid=~flags(frames),
        num_frames=jnp.full((batch_size,), frames, jnp.int32),
        positions=jnp.zeros((batch_size, frames)),
        num_video_frames=jnp.full((batch_size,), presets.GRID_FRAMES, jnp.int32),
        id_hash=jnp.zeros((batch_size,), jnp.uint32),
    )


def init_params(config: ConfigDict) -> Any:
    """Initial parameters, drawn from config.seed."""
    import jax

    return jax.jit(make_model(config).init)(jax.random.key(config.seed), example_features(config))["params"]


def parameter_count(config: ConfigDict) -> int:
    """Number of parameters of a config's network, computed from their shapes alone."""
    import jax

    from avsi_jax.models import systems

    return systems.count_parameters(jax.eval_shape(lambda: make_model(config).init(jax.random.key(0), example_features(config))))
