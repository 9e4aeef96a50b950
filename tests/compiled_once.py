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
    """make(config, *more) once for all equal configs; of `more` only what is given without is kept apart (normalisations)."""
    kept = {}

    @functools.wraps(make)
    def once(config, *more):
        key = key_of(config), *(repr(m) for m in more if not callable(getattr(m, "init", None)))
        if key not in kept:
            kept[key] = make(config, *more)
        return kept[key]

    return once


def share(patch) -> None:
    """In this process from now on; `patch`: a MonkeyPatch that takes it back."""
    import jax
    import numpy as np

    from avsi_jax import loop, parallel, steps

    patch.setattr(loop, "make_train_step", by_config(loop.make_train_step))
    patch.setattr(loop, "make_validation_step", by_config(loop.make_validation_step))
    patch.setattr(parallel, "map_train_step", functools.cache(parallel.map_train_step))
    patch.setattr(parallel, "map_evaluation_step", functools.cache(parallel.map_evaluation_step))
    first = by_config(lambda config, make=steps.init_params: jax.tree.map(np.array, make(config)))
    copied = lambda x: jax.numpy.array(x, copy=True)  # a step is given the memory of its state
    patch.setattr(steps, "init_params", lambda config: jax.tree.map(copied, first(config)))
