"""Steps on one device or on four give the same numbers, by pmap and by shard_map; and batches are split over devices."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import gradient_descent, processes
from tests.support.gradient_descent import assert_same_training, make_config, make_params, make_step
from tests.support.step_batches import make_batch

ROOT = Path(__file__).resolve().parents[2]
OPTIMISED = "AVSI_OPTIMISED"  # environment variable: these tests compile with all optimisations, as for users


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    """Turns most optimisations off: they take half of the time, for steps that run only a few times here."""
    import jax

    jax.config.update("jax_disable_most_optimizations", OPTIMISED not in os.environ)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def batch():
    return make_batch()


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def steps():
    """{parallel: step}: on one device unmapped (None) and over all four, compiled once for all tests."""
    import jax

    from avsi_jax.runtime import devices

    return {None: jax.jit(make_step()), "pmap": devices.map_train_step(make_step())}


def train(steps, parallel, params, batch, **options):
    """(parameters, metrics) of gradient_descent.train."""
    import jax

    state, metrics = gradient_descent.train(steps[parallel], params, batch, parallel=parallel, **options)
    return jax.device_get(state.params), metrics


def test_the_test_batch_has_different_counts_on_every_device(config, batch):
    """Otherwise a mean of means would pass for the mean over the batch."""
    import jax

    from avsi_jax.audio import gap_masks
    from avsi_jax.runtime import devices

    assert jax.device_count() == 4
    options = {k: v for k, v in config.gaps.items() if k not in ("protocol", "curriculum_steps", "fixed")}
    drawn = jax.jit(functools.partial(gap_masks.draw_batch, **options))(jax.random.key(0), batch["id_hash"], batch["audio_length"])
    gap_samples = np.asarray((drawn[..., 1] - drawn[..., 0]).sum(-1)).reshape(4, 2).sum(1)
    shares = devices.split(batch)
    for counts in (gap_samples, shares["audio_length"].sum(1), (shares["weight"] * (shares["label_length"] > 0)).sum(1)):
        assert len(set(counts.tolist())) > 1


def test_gradients_on_four_devices_equal_those_on_one(steps, batch, params):
    """One step of rate 1 moves the parameters by minus the gradient."""
    import jax

    one, four = (train(steps, parallel, params, batch, rate=1, count=1) for parallel in (None, "pmap"))
    assert four[1][0] == pytest.approx(one[1][0], rel=1e-5)
    gradients = [jax.tree.map(lambda old, new: old.astype(np.float64) - new, params, moved) for moved in (one[0], four[0])]
    # The gradient is a difference of float32 parameters, so it has an error of their last bit, 6e-8 of them.
    for a, b, p in zip(*map(jax.tree.leaves, (*gradients, params)), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max() + 2e-7 * np.abs(p).max()


def test_three_steps_on_four_devices_equal_those_on_one(steps, batch, params):
    import jax

    one, four = (train(steps, parallel, params, batch, rate=0.1, count=3) for parallel in (None, "pmap"))
    assert_same_training(one, four)
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(params), strict=True)]
    assert max(moved) > 1e-2, "nothing was trained"


def test_a_clip_of_weight_0_does_not_count(steps, batch, params):
    import jax

    other = batch | {k: batch[k].copy() for k in ("audio", "labels", "landmarks")}
    other["audio"][5] = 12_345
    other["landmarks"][5] += 50
    other["labels"][5] = 1
    a, b = (train(steps, "pmap", params, x, rate=1, count=1) for x in (batch, other))
    assert a[1] == b[1]
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])


def test_validation_sums_over_devices(config, batch, params):
    from avsi_jax.runtime import devices
    from avsi_jax.training import train_step

    step = devices.map_evaluation_step(train_step.make_validation_step(config), per_clip=True)
    sums, clips = step(devices.replicate(params), devices.split(batch))
    assert clips["num_steps"].shape == (8,) and len(clips["path"]) == 8
    assert sums["ctc"][1] == 6, "eight clips, one without text and one of weight 0"
    frames = np.minimum(149, 1 + np.minimum(batch["audio_length"], 47_648) // 320)  # 20 ms of 16 kHz; presets.py
    assert sums["whole"][1] == 64 * frames @ batch["weight"]


# ---------------------------------------------------------------------------------------------------------- pmap or shard_map

TRAIN_BOTH_WAYS = """
import concurrent.futures, json, sys
import jax, numpy as np
from tests.support import gradient_descent, step_batches
from avsi_jax.runtime import devices as devices_lib

batch = step_batches.make_batch()
params, step = gradient_descent.make_params(small=True), gradient_descent.make_step(small=True)
runs = [(parallel, jax.devices()[:n]) for n in map(int, sys.argv[1:]) for parallel in devices_lib.PARALLEL_MODES]
mapped = [devices_lib.map_train_step(step, devices, parallel) for parallel, devices in runs]


def compiled(step, parallel, devices):
    state = gradient_descent.initial_state(params, 0.1, parallel, devices)
    return step.lower(state, devices_lib.split(batch, parallel, devices)).compile()


with concurrent.futures.ThreadPoolExecutor(2) as pool:
    steps = list(pool.map(compiled, mapped, *zip(*runs)))
for (parallel, devices), step in zip(runs, steps):
    state, metrics = gradient_descent.train(step, params, batch, rate=0.1, count=3, parallel=parallel, devices=devices)
    shards = [[np.asarray(s.data) for s in leaf.addressable_shards] for leaf in jax.tree.leaves(state.params)]
    equal = all(len(x) == len(devices) and all(np.array_equal(x[0], y) for y in x) for x in shards)
    moved = max(float(np.abs(x[0] - old).max()) for x, old in zip(shards, jax.tree.leaves(params)))
    print(json.dumps([len(devices), parallel, equal, moved, metrics, [x[0].tobytes().hex() for x in shards]]))
"""


@pytest.mark.parametrize(
    ("counts", "few_optimisations"),
    [pytest.param((8,), True, marks=pytest.mark.slow), pytest.param((1, 2, 8), False, marks=pytest.mark.slow)],
    ids=["few_optimisations", "optimised"],
)
def test_shard_map_equals_pmap_bit_for_bit(counts, few_optimisations):
    """Three steps of clips of unequal length on 1, 2 and 8 devices; and all devices end with the same parameters."""
    environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(few_optimisations)}
    command = ["-c", TRAIN_BOTH_WAYS, *counts]
    (output,) = processes.succeed(command, processes=1, devices=8, timeout=300, **environment)
    runs = [json.loads(line) for line in output.splitlines()]
    assert [(n, parallel) for n, parallel, *_ in runs] == [(n, parallel) for n in counts for parallel in ("pmap", "shard_map")]
    assert all(equal for _, _, equal, *_ in runs)
    for pmap, shard_map in zip(runs[::2], runs[1::2], strict=True):
        assert pmap[3:] == shard_map[3:]
        assert pmap[3] > 1e-2, "nothing was trained"


@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_values_per_clip_are_in_the_order_of_the_batch(parallel, batch):
    import jax

    from avsi_jax.runtime import devices

    def step(params, batch):
        sums = devices.sum_over_devices((batch["weight"].sum(), params))
        return sums, {"hash": batch["id_hash"], "points": batch["landmarks"][:, 0] * params}

    evaluate = devices.map_evaluation_step(step, per_clip=True, parallel=parallel)
    sums, clips = evaluate(devices.replicate(np.float32(2), parallel), devices.split(batch, parallel))
    assert jax.device_get(sums) == (7, 8), "seven clips count; a parameter of 2 on each of four devices"
    np.testing.assert_array_equal(clips["hash"], batch["id_hash"])
    np.testing.assert_array_equal(clips["points"], 2 * batch["landmarks"][:, 0])
    assert all(type(x) is np.ndarray for x in clips.values())


def test_an_unknown_parallel_mode_is_refused(batch):
    from avsi_jax.runtime import devices

    for function in (devices.replicate, devices.split, lambda x, parallel: devices.map_train_step(print, parallel=parallel)):
        with pytest.raises(ValueError, match="'vmap'.*pmap or shard_map"):
            function(batch, parallel="vmap")


def test_an_unmapped_sum_is_the_value_itself():
    import jax

    from avsi_jax.runtime import devices

    assert jax.jit(devices.sum_over_devices)(3.0) == 3 == devices.sum_over_devices(3.0)


def test_a_name_error_inside_a_mapped_step_is_raised(monkeypatch):
    """An unmapped step is recognised by a NameError too."""
    import jax

    from avsi_jax.runtime import devices

    def misspelled(*_):
        raise NameError("forgotten")

    monkeypatch.setattr(jax.lax, "psum", misspelled)
    with pytest.raises(NameError, match="forgotten"):
        devices.map_evaluation_step(lambda p, b: devices.sum_over_devices(p))(np.float32(1), {"x": np.zeros((4, 1))})


def test_sums_over_one_process_are_the_values_themselves():
    """To the last bit for numbers on the host, and without a device."""
    from avsi_jax.runtime import devices

    assert devices.sum_over_processes([0.1, 1e300]) == [0.1, 1e300]
    assert np.asarray(devices.sum_flags([1, 0, 2.5], wait=False)).tolist() == [1, 0, 2.5]
    devices.barrier("a single process does not wait")


# ------------------------------------------------------------------------------------------------------------------- batches


def test_split_drops_the_ids(batch):
    from avsi_jax.runtime import devices

    shares = devices.split(batch)
    assert "clip_id" not in shares and shares["audio"].shape == (4, 2, 48_000)
    np.testing.assert_array_equal(shares["audio"][2, 1], batch["audio"][5])


def test_replicated_state_is_on_every_device():
    import jax

    from avsi_jax.runtime import devices

    x = devices.replicate({"a": np.arange(3.0)})["a"]
    assert x.sharding.device_set == set(jax.local_devices()) and x.is_fully_replicated


def test_a_batch_that_cannot_be_split_evenly_is_refused():
    from avsi_jax.runtime import devices

    devices.check_batch(8)
    with pytest.raises(ValueError, match=r"batch_size 6 .*4 devices.*--config.batch_size=8"):
        devices.check_batch(6)


# ------------------------------------------------------------------------------------------------------------------- devices

COUNT_DEVICES = """
import json, os, sys
cores, batch_size = map(int, sys.argv[1:])
os.sched_getaffinity = lambda _: set(range(cores))
from avsi_jax.runtime import devices
devices.use_every_core(batch_size)
import jax
devices.check_batch(batch_size)
print(json.dumps([jax.device_count(), devices.devices_share_cores()]))
"""


def count_devices(cores, batch_size, **environment):
    """[number of devices, whether they share cores] in a new process on so many cores."""
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")} | environment
    command = [sys.executable, "-c", COUNT_DEVICES, str(cores), str(batch_size)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("cores", "batch_size", "devices"), [(2, 32, 2), (12, 32, 8), (64, 32, 32), (3, 8, 2)])
def test_there_is_one_device_per_core_as_far_as_the_batch_is_divisible(cores, batch_size, devices):
    """The default batch of 32 trains on any machine."""
    assert count_devices(cores, batch_size) == [devices, True]


@pytest.mark.slow
def test_a_configured_number_of_devices_is_kept():
    assert count_devices(3, 4, JAX_NUM_CPU_DEVICES="2") == [2, True]
    assert count_devices(3, 10, XLA_FLAGS="--xla_force_host_platform_device_count=5") == [5, True]


def test_use_every_core_after_the_first_use_of_devices_has_no_effect():
    import jax

    from avsi_jax.runtime import devices

    before = jax.device_count()
    devices.use_every_core(32)
    assert jax.device_count() == before


@pytest.mark.slow
def test_these_tests_pass_with_all_optimisations_too():
    """Runs the default tests of this file again, with the steps compiled as for users."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-n", "0", __file__]
    result = subprocess.run(command, env=os.environ | {OPTIMISED: "1"}, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:]
