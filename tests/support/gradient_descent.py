"""Trains a tiny system by plain gradient descent, mapped over devices in a chosen way or unmapped, and compares such trainings."""

import numpy as np
import pytest

from avsi_jax import configs
from tests.support.step_batches import arrays

FIELDS = [("units", "8"), ("bottleneck", "8"), ("batch_size", "8"), ("loss.gap", "1"), ("loss.ctc", "0.01")]


def make_config(small=False):
    """A tiny config; a `small` one compiles in half the time."""
    return configs.load("tiny", FIELDS + [("system", "a_si"), ("layers", "1")] * small)


def make_params(small=False):
    """Initial parameters, on the host."""
    import jax

    from avsi_jax.models import build

    return jax.device_get(build.init_params(make_config(small)))


def make_step(small=False):
    """The train step of plain gradient descent; TrainState.lr_scale is its learning rate."""
    import optax

    from avsi_jax.training import train_step

    return train_step.make_train_step(make_config(small), optax.sgd(1.0))


def initial_state(params, rate, parallel=None, devices=None):
    """The state before the first step, replicated unless `parallel` is None."""
    import jax
    import optax

    from avsi_jax.runtime import devices as devices_lib
    from avsi_jax.training import train_step

    state = train_step.TrainState(jax.numpy.int32(0), params, optax.sgd(1.0).init(params), jax.numpy.float32(rate))
    return devices_lib.replicate(state, parallel, devices) if parallel else state


def train(step, params, batch, *, rate, count, parallel=None, devices=None):
    """(state, metrics of every step as sum / count) after `count` steps from `params`.

    parallel: 'pmap' or 'shard_map'; None for an unmapped step.
    """
    import jax

    from avsi_jax.runtime import devices as devices_lib

    state, metrics = initial_state(params, rate, parallel, devices), []
    for _ in range(count):
        shares = devices_lib.split(batch, parallel, devices) if parallel else arrays(batch)
        state, sums = jax.block_until_ready(step(state, shares))
        metrics.append({k: float(s) / float(n) for k, (s, n) in sums.items()})
    return state, metrics


def assert_same_training(one, other):
    """Two trainings, each (parameters, metrics), whose batches were split differently agree to 1e-5.

    The gradient norm has a larger tolerance: products over another batch size round the last bits of the features differently.
    """
    import jax

    for a, b in zip(one[1], other[1], strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=3e-5)
        assert {**b, "grad_norm": 0} == pytest.approx({**a, "grad_norm": 0}, rel=1e-5)
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(a).max(), 0.01)  # 0.01: biases start at 0 and are still tiny
