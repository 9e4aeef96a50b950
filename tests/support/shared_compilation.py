"""Trainings of one config in one process share what they trace: it takes 3 s of every one, and the tests have some thirty.

What is kept are functions and fresh parameters by the fields that shape them; a process of its own, as a user's, shares nothing.
"""

import functools
import json

APART = ("checkpoint_every", "checkpoint_seconds", "keep", "watchdog_s", "early_stop_patience", "validate_every", "monitor")


def key_of(config) -> str:
    """The fields of a config that a step or its first parameters may depend on."""
    fields = {k: v for k, v in config.to_dict().items() if k not in APART}
    if fields["schedule"] == "plateau":  # under a cosine the epochs shape the rate
        del fields["epochs"]
    return json.dumps(fields, sort_keys=True)


def by_config(make):
    """make(config, optimiser, normalisation) once for all equal configs and normalisations: an optimiser is the config's."""
    kept = {}

    @functools.wraps(make)
    def once(config, *more):
        key = key_of(config), repr(more[-1])
        if key not in kept:
            kept[key] = make(config, *more)
        return kept[key]

    return once


def by_step(make):
    """make(step, ...) once for each step and way to map it."""
    kept = {}

    @functools.wraps(make)
    def once(step, *args, **options):
        key = step, repr(args), repr(options)
        if key not in kept:
            kept[key] = make(step, *args, **options)
        return kept[key]

    return once


def share(patch) -> None:
    """In this process from now on; `patch`: a MonkeyPatch that takes it back."""
    from avsi_jax.runtime import devices
    from avsi_jax.training import loop, train_step

    patch.setattr(loop, "make_train_step", by_config(loop.make_train_step))
    patch.setattr(loop, "make_validation_step", by_config(loop.make_validation_step))
    patch.setattr(devices, "map_train_step", by_step(devices.map_train_step))
    patch.setattr(devices, "map_evaluation_step", by_step(devices.map_evaluation_step))
    patch.setattr(train_step, "init_params", kept_parameters(train_step.init_params))


def kept_parameters(make):
    """init_params that makes those of a config once, and gives copies: a step is given the memory of its state."""
    import jax
    import numpy as np

    kept = {}

    def parameters(config):
        key = key_of(config)
        if key not in kept:
            made = make(config)
            if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(made)):
                return made  # only their shapes were asked for
            kept[key] = jax.tree.map(np.array, made)
        return jax.tree.map(lambda x: jax.numpy.array(x, copy=True), kept[key])

    return parameters
