"""Lets the trainings of one process share compiled steps and initial parameters, which take 3 s per training.

Functions and parameters are cached by the config fields that they depend on. A process of its own, as a user's, shares nothing.
"""

import functools
import json

UNRELATED = ("checkpoint_every", "checkpoint_seconds", "keep", "watchdog_s", "early_stop_patience", "validate_every", "monitor")


def config_key(config) -> str:
    """The config fields that a step or the initial parameters may depend on."""
    fields = {k: v for k, v in config.to_dict().items() if k not in UNRELATED}
    if fields["schedule"] == "plateau":  # the cosine schedule depends on the number of epochs
        del fields["epochs"]
    return json.dumps(fields, sort_keys=True)


def cached_by_config(make):
    """Caches make(config, optimiser, normalisation) for equal configs and normalisations; the config determines the optimiser."""
    cache = {}

    @functools.wraps(make)
    def cached(config, *more):
        key = config_key(config), repr(more[-1])
        if key not in cache:
            cache[key] = make(config, *more)
        return cache[key]

    return cached


def cached_by_step(make):
    """Caches make(step, ...) for each step and set of arguments."""
    cache = {}

    @functools.wraps(make)
    def cached(step, *args, **options):
        key = step, repr(args), repr(options)
        if key not in cache:
            cache[key] = make(step, *args, **options)
        return cache[key]

    return cached


def cached_parameters(make):
    """Caches the parameters of init_params by config and returns copies, since a training step reuses the memory of its state."""
    import jax
    import numpy as np

    cache = {}

    def parameters(config):
        key = config_key(config)
        if key not in cache:
            made = make(config)
            if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(made)):
                return made  # called by eval_shape
            cache[key] = jax.tree.map(np.array, made)
        return jax.tree.map(lambda x: jax.numpy.array(x, copy=True), cache[key])

    return parameters


def share(patch) -> None:
    """Turns sharing on in this process; `patch`: a MonkeyPatch, which turns it off again."""
    from avsi_jax.runtime import devices
    from avsi_jax.training import loop, train_step

    patch.setattr(loop, "make_train_step", cached_by_config(loop.make_train_step))
    patch.setattr(loop, "make_validation_step", cached_by_config(loop.make_validation_step))
    patch.setattr(devices, "map_train_step", cached_by_step(devices.map_train_step))
    patch.setattr(devices, "map_evaluation_step", cached_by_step(devices.map_evaluation_step))
    patch.setattr(train_step, "init_params", cached_parameters(train_step.init_params))
