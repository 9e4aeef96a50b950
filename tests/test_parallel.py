"""One device or four: the same numbers, whatever lies on which device; and what a batch must be for that."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_data

import configs

ROOT = Path(__file__).resolve().parent.parent
FIELDS = [("units", "8"), ("bottleneck", "8"), ("batch_size", "8"), ("loss.gap", "1"), ("loss.ctc", "0.01")]


@pytest.fixture(scope="module")
def config():
    return configs.load("tiny", FIELDS)


@pytest.fixture(scope="module")
def batch():
    """Eight clips of unequal lengths; one without text, one that doesn't count."""
    from avsi_jax import input_pipeline

    examples = []
    for seed, clip_id in enumerate(list(tiny_data.clip_ids())[:8]):
        text = "" if seed == 2 else "bin blue at t one now" if seed % 2 else "lay red at t seven now"
        raw = tiny_data.measurement(seed) | {"id": clip_id, "speaker": "s1", "text": text, "words": []}
        raw["audio"] = raw["audio"][: 48_000 - 2_500 * seed]
        examples.append(input_pipeline.to_example(raw))
    batch = {k: np.stack([e[k] for e in examples]) for k in examples[0] if k != "clip_id"}
    return batch | {"clip_id": [e["clip_id"] for e in examples], "weight": np.float32([1, 1, 1, 1, 1, 0, 1, 1])}


@pytest.fixture(scope="module")
def steps(config):
    """{mapped: step}: of plain gradient descent, on one device unmapped and over all four, compiled once for all tests."""
    import jax
    import optax

    from avsi_jax import parallel, steps

    step = steps.make_train_step(config, optax.sgd(1.0))  # how far: TrainState.lr_scale
    return {False: jax.jit(step), True: parallel.map_train_step(step)}


def run(step, start, batch, *, rate, count, mapped):
    """(parameters, metrics of every step as sum / count) after `count` steps from `start`."""
    import jax
    import optax

    from avsi_jax import parallel, steps

    state = steps.TrainState(jax.numpy.int32(0), start, optax.sgd(1.0).init(start), jax.numpy.float32(rate))
    if mapped:
        state, batch = parallel.replicate(state), parallel.split(batch)
    else:
        batch = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    metrics = []
    for _ in range(count):
        state, sums = step(state, batch)
        metrics.append({k: float(s) / float(n) for k, (s, n) in sums.items()})
    return jax.device_get(state.params), metrics


@pytest.fixture(scope="module")
def start(config):
    import jax

    from avsi_jax import experiment

    return jax.device_get(experiment.init_params(config))


def test_the_batch_is_uneven(config, batch):
    """Otherwise a mean of means would pass for the mean."""
    import jax

    from avsi_jax import gaps, parallel

    assert jax.device_count() == 4
    draw = {k: v for k, v in config.gaps.items() if k not in ("protocol", "curriculum_steps")}
    drawn = jax.jit(functools.partial(gaps.draw_batch, **draw))(jax.random.key(0), batch["id_hash"], batch["audio_length"])
    lost = np.asarray((drawn[..., 1] - drawn[..., 0]).sum(-1)).reshape(4, 2).sum(1)
    shares = parallel.split(batch)
    for counts in (lost, shares["audio_length"].sum(1), (shares["weight"] * (shares["label_length"] > 0)).sum(1)):
        assert len(set(counts.tolist())) > 1


def test_gradients_on_four_devices_are_those_of_one(steps, batch, start):
    """Parameters moved once by minus the gradient."""
    import jax

    one, four = (run(steps[m], start, batch, rate=1, count=1, mapped=m) for m in (False, True))
    assert four[1][0] == pytest.approx(one[1][0], rel=1e-5)
    moved = [jax.tree.map(lambda old, new: old.astype(np.float64) - new, start, params) for params in (one[0], four[0])]
    # The parameters' own last bit, 6e-8 of them, is what float32 leaves of a gradient that went through them.
    for a, b, p in zip(*map(jax.tree.leaves, (*moved, start)), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max() + 2e-7 * np.abs(p).max()


def test_three_steps_on_four_devices_are_those_on_one(steps, batch, start):
    import jax

    one, four = (run(steps[m], start, batch, rate=0.1, count=3, mapped=m) for m in (False, True))
    for a, b in zip(one[1], four[1], strict=True):  # the norm: products over another batch round the features' last bits otherwise
        assert b.pop("grad_norm") == pytest.approx(a.pop("grad_norm"), rel=3e-5)
        assert b == pytest.approx(a, rel=1e-5)
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(four[0]), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(a).max(), 0.01)  # 0.01: biases start at 0 and are tiny yet
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(start), strict=True)]
    assert max(moved) > 1e-2, "nothing was trained"


def test_a_clip_of_weight_0_does_not_count(steps, batch, start):
    import jax

    other = batch | {k: batch[k].copy() for k in ("audio", "labels", "landmarks")}
    other["audio"][5] = 12_345
    other["landmarks"][5] += 50
    other["labels"][5] = 1
    a, b = (run(steps[True], start, x, rate=1, count=1, mapped=True) for x in (batch, other))
    assert a[1] == b[1]
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])


def test_validation_sums_over_devices(config, batch, start):
    from avsi_jax import parallel, steps

    step = parallel.map_evaluation_step(steps.make_validation_step(config))
    sums = step(parallel.replicate(start), parallel.split(batch))
    assert sums["ctc"][1] == 6, "eight clips, one without text and one of weight 0"
    frames = np.minimum(149, 1 + np.minimum(batch["audio_length"], 47_648) // 320)  # 20 ms of 16 kHz; spec.py
    assert sums["whole"][1] == 64 * frames @ batch["weight"]


# ------------------------------------------------------------------------------------------------------------------- batches


def test_split_leaves_ids_behind(batch):
    from avsi_jax import parallel

    shares = parallel.split(batch)
    assert "clip_id" not in shares and shares["audio"].shape == (4, 2, 48_000)
    np.testing.assert_array_equal(shares["audio"][2, 1], batch["audio"][5])


def test_replicated_state_lies_on_every_device():
    import jax

    from avsi_jax import parallel

    x = parallel.replicate({"a": np.arange(3.0)})["a"]
    assert x.sharding.device_set == set(jax.local_devices()) and x.is_fully_replicated


def test_a_batch_that_cannot_be_shared():
    from avsi_jax import parallel

    parallel.check_batch(8)
    with pytest.raises(ValueError, match=r"batch_size 6 is not divisible by the 4 devices; .*--config.batch_size=8"):
        parallel.check_batch(6)


# ------------------------------------------------------------------------------------------------------------------- devices

COUNT = """
import json, os, sys
cores, batch_size = map(int, sys.argv[1:])
os.sched_getaffinity = lambda _: set(range(cores))
from avsi_jax import parallel
parallel.use_every_core(batch_size)
import jax
parallel.check_batch(batch_size)
print(json.dumps([jax.device_count(), parallel.devices_share_cores()]))
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

    from avsi_jax import parallel

    before = jax.device_count()
    parallel.use_every_core(32)
    assert jax.device_count() == before
