"""One device or four: the same numbers, whatever lies on which device; and what a batch must be for that."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avsi_jax import configs
from tests.support import processes
from tests.support.step_batches import arrays, make_batch

ROOT = Path(__file__).resolve().parents[2]
OPTIMISED = "AVSI_OPTIMISED"  # set: these tests compile as users do
FIELDS = [("units", "8"), ("bottleneck", "8"), ("batch_size", "8"), ("loss.gap", "1"), ("loss.ctc", "0.01")]


def make_config(small=False):
    """`small` compiles in half the time."""
    return configs.load("tiny", FIELDS + [("system", "a_si"), ("layers", "1")] * small)


def make_start(small=False):
    """Fresh parameters."""
    import jax

    from avsi_jax.models import build

    return jax.device_get(build.init_params(make_config(small)))


def fresh(start, rate, how=None, devices=None):
    """The state before the first step."""
    import jax
    import optax

    from avsi_jax.runtime import devices as devices_lib
    from avsi_jax.training import train_step

    state = train_step.TrainState(jax.numpy.int32(0), start, optax.sgd(1.0).init(start), jax.numpy.float32(rate))
    return devices_lib.replicate(state, how, devices) if how else state


def train(step, start, batch, *, rate, count, how=None, devices=None):
    """(state, metrics of every step as sum / count) after `count` steps of plain gradient descent from `start`.

    how: 'pmap' or 'shard_map'; None runs an unmapped step.
    """
    import jax

    from avsi_jax.runtime import devices as devices_lib

    state, metrics = fresh(start, rate, how, devices), []
    for _ in range(count):
        state, sums = jax.block_until_ready(step(state, devices_lib.split(batch, how, devices) if how else arrays(batch)))
        metrics.append({k: float(s) / float(n) for k, (s, n) in sums.items()})
    return state, metrics


def make_step(small=False):
    """The pure step of plain gradient descent; how far: TrainState.lr_scale."""
    import optax

    from avsi_jax.training import train_step

    return train_step.make_train_step(make_config(small), optax.sgd(1.0))


def assert_same_training(one, other):
    """(parameters, metrics) of two trainings to 1e-5, their batches cut up otherwise.

    The norm is let off a little: products over another batch round the features' last bits otherwise.
    """
    import jax

    for a, b in zip(one[1], other[1], strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=3e-5)
        assert {**b, "grad_norm": 0} == pytest.approx({**a, "grad_norm": 0}, rel=1e-5)
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(a).max(), 0.01)  # 0.01: biases start at 0 and are tiny yet


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """Half the time goes into making fast what runs a few times here."""
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
def start():
    return make_start()


@pytest.fixture(scope="module")
def steps():
    """{how: step}: on one device unmapped (None) and over all four, compiled once for all tests."""
    import jax

    from avsi_jax.runtime import devices

    return {None: jax.jit(make_step()), "pmap": devices.map_train_step(make_step())}


def run(steps, how, start, batch, **options):
    """(parameters, metrics) of `train`."""
    import jax

    state, metrics = train(steps[how], start, batch, how=how, **options)
    return jax.device_get(state.params), metrics


def test_the_batch_is_uneven(config, batch):
    """Otherwise a mean of means would pass for the mean."""
    import jax

    from avsi_jax.audio import gap_masks
    from avsi_jax.runtime import devices

    assert jax.device_count() == 4
    draw = {k: v for k, v in config.gaps.items() if k not in ("protocol", "curriculum_steps")}
    drawn = jax.jit(functools.partial(gap_masks.draw_batch, **draw))(jax.random.key(0), batch["id_hash"], batch["audio_length"])
    lost = np.asarray((drawn[..., 1] - drawn[..., 0]).sum(-1)).reshape(4, 2).sum(1)
    shares = devices.split(batch)
    for counts in (lost, shares["audio_length"].sum(1), (shares["weight"] * (shares["label_length"] > 0)).sum(1)):
        assert len(set(counts.tolist())) > 1


def test_gradients_on_four_devices_are_those_of_one(steps, batch, start):
    """Parameters moved once by minus the gradient."""
    import jax

    one, four = (run(steps, how, start, batch, rate=1, count=1) for how in (None, "pmap"))
    assert four[1][0] == pytest.approx(one[1][0], rel=1e-5)
    moved = [jax.tree.map(lambda old, new: old.astype(np.float64) - new, start, params) for params in (one[0], four[0])]
    # The parameters' own last bit, 6e-8 of them, is what float32 leaves of a gradient that went through them.
    for a, b, p in zip(*map(jax.tree.leaves, (*moved, start)), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max() + 2e-7 * np.abs(p).max()


def test_three_steps_on_four_devices_are_those_on_one(steps, batch, start):
    import jax

    one, four = (run(steps, how, start, batch, rate=0.1, count=3) for how in (None, "pmap"))
    assert_same_training(one, four)
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(start), strict=True)]
    assert max(moved) > 1e-2, "nothing was trained"


def test_a_clip_of_weight_0_does_not_count(steps, batch, start):
    import jax

    other = batch | {k: batch[k].copy() for k in ("audio", "labels", "landmarks")}
    other["audio"][5] = 12_345
    other["landmarks"][5] += 50
    other["labels"][5] = 1
    a, b = (run(steps, "pmap", start, x, rate=1, count=1) for x in (batch, other))
    assert a[1] == b[1]
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])


def test_validation_sums_over_devices(config, batch, start):
    from avsi_jax.runtime import devices
    from avsi_jax.training import train_step

    step = devices.map_evaluation_step(train_step.make_validation_step(config), per_clip=True)
    sums, clips = step(devices.replicate(start), devices.split(batch))
    assert clips["num_steps"].shape == (8,) and len(clips["path"]) == 8
    assert sums["ctc"][1] == 6, "eight clips, one without text and one of weight 0"
    frames = np.minimum(149, 1 + np.minimum(batch["audio_length"], 47_648) // 320)  # 20 ms of 16 kHz; presets.py
    assert sums["whole"][1] == 64 * frames @ batch["weight"]


# ---------------------------------------------------------------------------------------------------------- pmap or shard_map

BOTH = """
import concurrent.futures, json, sys
import jax, numpy as np
from tests.runtime import test_devices as t
from avsi_jax.runtime import devices as devices_lib

batch, start, one_step = t.make_batch(), t.make_start(small=True), t.make_step(small=True)
ways = [(how, jax.devices()[:n]) for n in map(int, sys.argv[1:]) for how in devices_lib.WAYS]
mapped = [devices_lib.map_train_step(one_step, devices, how) for how, devices in ways]


def compiled(step, how, devices):
    state = t.fresh(start, 0.1, how, devices)
    return step.lower(state, devices_lib.split(batch, how, devices)).compile()


with concurrent.futures.ThreadPoolExecutor(2) as pool:
    steps = list(pool.map(compiled, mapped, *zip(*ways)))
for (how, devices), step in zip(ways, steps):
    state, metrics = t.train(step, start, batch, rate=0.1, count=3, how=how, devices=devices)
    shards = [[np.asarray(s.data) for s in leaf.addressable_shards] for leaf in jax.tree.leaves(state.params)]
    equal = all(len(x) == len(devices) and all(np.array_equal(x[0], y) for y in x) for x in shards)
    moved = max(float(np.abs(x[0] - old).max()) for x, old in zip(shards, jax.tree.leaves(start)))
    print(json.dumps([len(devices), how, equal, moved, metrics, [x[0].tobytes().hex() for x in shards]]))
"""


@pytest.mark.parametrize(
    ("counts", "quickly"), [((8,), True), pytest.param((1, 2, 8), False, marks=pytest.mark.slow)], ids=["quickly", "optimised"]
)
def test_shard_map_is_pmap_bit_for_bit(counts, quickly):
    """On so many devices, three steps of unequal clips; and all devices hold the same. Compiling takes most of it."""
    environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(quickly)}
    (output,) = processes.succeed(["-c", BOTH, *counts], processes=1, devices=8, timeout=300, **environment)
    runs = [json.loads(line) for line in output.splitlines()]
    assert [(n, how) for n, how, *_ in runs] == [(n, how) for n in counts for how in ("pmap", "shard_map")]
    assert all(equal for _, _, equal, *_ in runs)
    for pmap, shard_map in zip(runs[::2], runs[1::2], strict=True):
        assert pmap[3:] == shard_map[3:]
        assert pmap[3] > 1e-2, "nothing was trained"


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_values_of_each_clip_come_in_the_order_of_the_batch(how, batch):
    import jax

    from avsi_jax.runtime import devices

    def step(params, batch):
        counted = devices.sum_over_devices((batch["weight"].sum(), params))
        return counted, {"hash": batch["id_hash"], "points": batch["landmarks"][:, 0] * params}

    evaluate = devices.map_evaluation_step(step, per_clip=True, how=how)
    sums, clips = evaluate(devices.replicate(np.float32(2), how), devices.split(batch, how))
    assert jax.device_get(sums) == (7, 8), "seven clips count; a parameter of 2 on each of four devices"
    np.testing.assert_array_equal(clips["hash"], batch["id_hash"])
    np.testing.assert_array_equal(clips["points"], 2 * batch["landmarks"][:, 0])
    assert all(type(x) is np.ndarray for x in clips.values())


def test_a_way_that_is_not_known(batch):
    from avsi_jax.runtime import devices

    for use in (devices.replicate, devices.split, lambda x, how: devices.map_train_step(print, how=how)):
        with pytest.raises(ValueError, match="found 'vmap', expected pmap or shard_map"):
            use(batch, how="vmap")


def test_unmapped_a_sum_is_the_value():
    import jax

    from avsi_jax.runtime import devices

    assert jax.jit(devices.sum_over_devices)(3.0) == 3 == devices.sum_over_devices(3.0)


def test_a_mistake_is_not_taken_for_an_unmapped_step(monkeypatch):
    """Both are a NameError."""
    import jax

    from avsi_jax.runtime import devices

    def mistaken(*_):
        raise NameError("forgotten")

    monkeypatch.setattr(jax.lax, "psum", mistaken)
    with pytest.raises(NameError, match="forgotten"):
        devices.map_evaluation_step(lambda p, b: devices.sum_over_devices(p))(np.float32(1), {"x": np.zeros((4, 1))})


def test_one_process_agrees_with_itself_without_a_device():
    """Any value, to the last bit on the host."""
    from avsi_jax.runtime import devices

    assert devices.sum_over_processes([0.1, 1e300]) == [0.1, 1e300]
    assert np.asarray(devices.agree([1, 0, 2.5], wait=False)).tolist() == [1, 0, 2.5]
    devices.barrier("nobody else comes")


# ------------------------------------------------------------------------------------------------------------------- batches


def test_split_leaves_ids_behind(batch):
    from avsi_jax.runtime import devices

    shares = devices.split(batch)
    assert "clip_id" not in shares and shares["audio"].shape == (4, 2, 48_000)
    np.testing.assert_array_equal(shares["audio"][2, 1], batch["audio"][5])


def test_replicated_state_lies_on_every_device():
    import jax

    from avsi_jax.runtime import devices

    x = devices.replicate({"a": np.arange(3.0)})["a"]
    assert x.sharding.device_set == set(jax.local_devices()) and x.is_fully_replicated


def test_a_batch_that_cannot_be_shared():
    from avsi_jax.runtime import devices

    devices.check_batch(8)
    with pytest.raises(ValueError, match=r"batch_size 6 is not divisible by the 4 devices; .*--config.batch_size=8"):
        devices.check_batch(6)


# ------------------------------------------------------------------------------------------------------------------- devices

COUNT = """
import json, os, sys
cores, batch_size = map(int, sys.argv[1:])
os.sched_getaffinity = lambda _: set(range(cores))
from avsi_jax.runtime import devices
devices.use_every_core(batch_size)
import jax
devices.check_batch(batch_size)
print(json.dumps([jax.device_count(), devices.devices_share_cores()]))
"""


def devices_of(cores, batch_size, **environment):
    """[devices, whether they share cores] of a fresh process on so many cores."""
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")} | environment
    command = [sys.executable, "-c", COUNT, str(cores), str(batch_size)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("cores", "batch_size", "devices"), [(2, 32, 2), (12, 32, 8), (64, 32, 32), (3, 8, 2)])
def test_a_device_a_core_as_far_as_the_batch_goes(cores, batch_size, devices):
    """The default batch of 32 trains on any machine."""
    assert devices_of(cores, batch_size) == [devices, True]


def test_a_number_of_devices_that_was_chosen_stays():
    assert devices_of(3, 4, JAX_NUM_CPU_DEVICES="2") == [2, True]
    assert devices_of(3, 10, XLA_FLAGS="--xla_force_host_platform_device_count=5") == [5, True]


def test_too_late_is_no_error():
    import jax

    from avsi_jax.runtime import devices

    before = jax.device_count()
    devices.use_every_core(32)
    assert jax.device_count() == before


@pytest.mark.slow
def test_all_of_this_holds_of_optimised_code_too():
    """The default tests of this file again, as users' steps are compiled: four devices as one, unequal clips, gradients."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-n", "0", __file__]
    done = subprocess.run(command, env=os.environ | {OPTIMISED: "1"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:]
