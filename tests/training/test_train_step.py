"""The steps: a batch in parts, the parameters' running mean, what is read, and sums that survive."""

import functools
import itertools
import json
import math
import re
from typing import NamedTuple

import jax
import jiwer
import numpy as np
import optax
import pytest

from avsi_jax import configs
from avsi_jax.data import grid_text
from avsi_jax.models import build
from avsi_jax.runtime import devices
from avsi_jax.training import objective, train_step
from tests.support import step_batches
from tests.support.step_batches import COUNTED, SAID, arrays, run

FIELDS = {
    "system": "av_mtl_si", "units": 8, "bottleneck": 8, "batch_size": 8, "loss.gap": 1.0, "loss.ctc": 0.01, "ema": 0.4,
    "dropout": 0.2, "augment.gain_db": 3.0, "augment.mirror": 0.5, "gaps.max_count": 2,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """Half the time goes into making fast what runs a few times here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def config_of(**fields):
    return configs.load("tiny", [(k.replace("__", "."), str(v)) for k, v in (FIELDS | fields).items()])


@pytest.fixture(scope="module")
def batch():
    return step_batches.make_batch()


@functools.cache
def start(rate=0.05):
    """The state before the first step of plain gradient descent: Adam would make much of a gradient's last bits."""
    state = jax.device_get(train_step.init_state(config_of(), 1))
    return state._replace(opt_state=optax.sgd(1.0).init(state.params), lr_scale=np.float32(rate))


@pytest.fixture(scope="module")
def step_of(batch):
    """step_of(parts, dtype) -> the compiled step on one device, unmapped."""

    @functools.cache
    def make(parts=1, dtype="float32"):
        step = train_step.make_train_step(config_of(accumulate=parts, dtype=dtype), optax.sgd(1.0))
        return jax.jit(step).lower(start(), arrays(batch)).compile()

    return make


@pytest.fixture(scope="module")
def mapped(batch):
    """The compiled step over four devices, each of which goes through its two clips one by one."""
    step = devices.map_train_step(train_step.make_train_step(config_of(accumulate=2), optax.sgd(1.0)))
    return step.lower(devices.replicate(start()), devices.split(batch)).compile()


@pytest.fixture(scope="module")
def whole(step_of, batch):
    """Twenty steps, each of the batch in one piece."""
    return run(step_of(), arrays(batch), 20, start())


# ---- a batch in parts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["four devices of two parts", pytest.param("four parts", marks=pytest.mark.slow)])
def in_parts(request, step_of, mapped):
    if request.param == "four parts":
        return step_of(4)
    return lambda state, batch: mapped(devices.replicate(state), devices.split(batch))


def test_parts_give_the_gradient_of_the_whole(in_parts, step_of, batch):
    """Parameters moved by minus the gradient, of clips that are changed, and values dropped, as in the whole batch."""
    before = start(rate=1.0)
    after = [run(step, arrays(batch), 1, before)[0][0].params for step in (in_parts, step_of())]
    moved = [jax.tree.map(lambda old, new: old.astype(np.float64) - new, before.params, params) for params in after]
    # The parameters' own last bit, 6e-8 of them, is what float32 leaves of a gradient that went through them.
    for a, b, p in zip(*map(jax.tree.leaves, (*moved, before.params)), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max() + 2e-7 * np.abs(p).max()


def test_three_steps_in_parts_are_those_of_the_whole(in_parts, whole, batch):
    states, metrics = run(in_parts, arrays(batch), 3, start())
    for a, b in zip(metrics, whole[1], strict=False):  # the norm: a little further, as in tests/runtime/test_devices.py
        assert a.pop("grad_norm") == pytest.approx(b["grad_norm"], rel=3e-5)
        assert a == pytest.approx({k: b[k] for k in a}, rel=1e-5)
    found, expected = ((s.params, s.ema) for s in (states[2], whole[0][2]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), 0.01)  # 0.01: biases start at 0 and are tiny yet
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(states[2].params), jax.tree.leaves(start().params), strict=True)]
    assert max(moved) > 1e-2, "nothing was trained"


def test_parts_need_no_second_network(step_of, mapped):
    """The first look at the batch, for its counts, has no LSTM in the compiled program: there are as many as without parts."""
    loops = [len(re.findall(r" while\(.*blstm_1/while", step.as_text())) for step in (step_of(), mapped)]
    assert loops[0] == loops[1] > 0


@pytest.mark.slow  # a minute of compiling
def test_parts_take_less_memory(batch):
    """Of the paper's network with 32 clips on one CPU device: 736 MB in one piece, 416 in two, 240 in four."""
    rows = {k: jax.ShapeDtypeStruct((32, *v.shape[1:]), v.dtype) for k, v in arrays(batch).items()}
    found = []
    for parts in (1, 2, 4):
        config = configs.load("av_mtl_s2s", [("accumulate", str(parts))])
        step = jax.jit(train_step.make_train_step(config, objective.make_optimiser(config, 1)))
        program = step.lower(jax.eval_shape(lambda c=config: train_step.init_state(c, 1)), rows).compile()
        found.append(program.memory_analysis().temp_size_in_bytes)
    print([f"{size / 1e6:.0f} MB" for size in found])
    assert found[1] < 0.65 * found[0] and found[2] < 0.65 * found[1]


@pytest.mark.parametrize(
    ("parts", "size", "device_count", "says"),
    [
        (3, 32, 4, "config.accumulate: found 3, expected a divisor of 8, the clips of a device (batch_size 32, 4 devices), e.g. "
                   "--config.accumulate=4"),
        (16, 32, 4, "found 16, expected a divisor of 8, .* --config.accumulate=8"),
        (0, 32, 1, "found 0, expected a divisor of 32, .* --config.accumulate=1"),
        (-2, 6, 1, "found -2, expected a divisor of 6, .* --config.accumulate=1"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(parts, size, device_count, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(").replace(")", r"\)")) as error:
        train_step.check_accumulation(config_of(accumulate=parts, batch_size=size), device_count)
    assert "\n" not in str(error.value)


def test_parts_that_fit():
    for parts, size, count in ((1, 8, 8), (1, 7, 1), (2, 32, 4), (8, 32, 4)):
        train_step.check_accumulation(config_of(accumulate=parts, batch_size=size), count)


# ---- the running mean ----------------------------------------------------------------------------------------------------------


def test_the_running_mean_is_that_of_the_parameters(whole):
    """By a plain loop: the decay is 1/10, 2/11, 3/12 ... and from the sixth step on 0.4."""
    mean = jax.tree.map(np.float64, start().params)
    for t, state in enumerate(whole[0]):
        decay = min(0.4, (1 + t) / (10 + t))
        mean = jax.tree.map(lambda m, p, d=decay: d * m + (1 - d) * p, mean, state.params)
        for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(mean), strict=True):
            assert a.dtype == np.float32 and np.abs(a - b).max() <= 1e-6 * np.abs(b).max()
    last = whole[0][-1]
    assert last.averaged is last.ema and max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (mean, last.params)))) > 1e-3


def test_with_a_constant_decay_the_running_mean_is_optax_ema():
    """Which begins at 0: what is left of ours, after n steps, is decay^n of where it began."""
    values = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    theirs, ours = optax.ema(0.1, debias=False), values[0]
    state = theirs.init(values[0])
    for t, value in enumerate(values[1:]):
        ours = train_step.running_mean(ours, value, t, 0.1)
        expected, state = theirs.update(value, state)
        np.testing.assert_allclose(ours, expected + 0.1 ** (t + 1) * values[0], rtol=1e-5)


def test_without_a_running_mean_there_is_none():
    state = jax.eval_shape(lambda: train_step.init_state(config_of(ema=0.0), 1))
    assert state.ema is None and state.averaged is state.params
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"config.ema: found {decay}, expected a decay from 0 .* to below 1"):
            train_step.init_state(config_of(ema=decay), 1)


def test_a_checkpoint_from_before_the_running_mean_restores(tmp_path):
    """It has no such field; nor has one of a run without."""
    from avsi_jax.training import checkpoints

    class Before(NamedTuple):
        step: np.ndarray
        params: dict
        opt_state: tuple
        lr_scale: np.ndarray

    rng = np.random.default_rng(0)
    old = Before(np.int32(5), {"a": {"b": rng.normal(size=3)}}, optax.adam(1.0).init({"a": np.zeros(3)}), np.float32(0.1))
    saved = checkpoints.Checkpoints(tmp_path)
    saved.save(5, old, {}, 1.0)
    saved.save(6, train_step.TrainState(*old), {}, 1.0)
    for step in (5, 6):
        found, _ = saved.restore(step, train_step.TrainState(*jax.tree.map(np.zeros_like, old)))
        assert isinstance(found, train_step.TrainState) and found.ema is None
        jax.tree.map(np.testing.assert_array_equal, found, train_step.TrainState(*old))
    saved.close()


@pytest.mark.parametrize("ema", [0.5, 0.0])
def test_what_is_restored_is_the_running_mean(tmp_path, ema):
    from avsi_jax.inference import restorer
    from avsi_jax.training import checkpoints, run_directory

    config = configs.load("tiny", [("system", "a_si"), ("units", "4"), ("ema", str(ema))])
    run_directory.check_config(config, tmp_path)
    shapes = jax.eval_shape(lambda: train_step.init_state(config, 1))
    fill = lambda tree, value: jax.tree.map(lambda a: np.full(a.shape, value, a.dtype), tree)
    state = fill(shapes, 1)._replace(params=fill(shapes.params, 2.0), ema=fill(shapes.ema, 3.0))
    saved = checkpoints.Checkpoints(tmp_path)
    saved.save(1, state, {}, 0.0)
    saved.close()
    found = restorer.read_run(tmp_path, "last").params
    jax.tree.map(np.testing.assert_array_equal, found, fill(shapes.params, 3.0 if ema else 2.0))


# ---- schedule and clipping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "warmup_epochs", "warm"),
    [(10, 3, 2.0, 6), (10, 3, 0.0, 0), (4, 5, 0.5, 2), (2, 3, 7.0, 5), (1, 1, 1.0, 0)],
)
def test_the_rate_of_every_step(epochs, per_epoch, warmup_epochs, warm):
    """A straight line up over `warm` steps, then the cosine down to 0 at the last (Loshchilov & Hutter 2017, eq. 5), and 0 after.

    Adam of a constant gradient moves by the rate: what the optimiser does is what `learning_rate` says.
    """
    config = config_of(schedule="cosine", epochs=epochs, warmup_epochs=warmup_epochs, learning_rate=0.5)
    total = epochs * per_epoch
    t = np.arange(total + 3)
    down = 0.25 * (1 + np.cos(np.pi * np.minimum((t - warm) / (total - warm), 1)))
    expected = np.where(t < warm, 0.5 * t / max(warm, 1), down)
    rate, optimiser = objective.learning_rate(config, per_epoch), objective.make_optimiser(config, per_epoch)
    np.testing.assert_allclose([rate(step) for step in t], expected, rtol=1e-6, atol=1e-7)
    update = jax.jit(optimiser.update)
    state, moved = optimiser.init(np.float32(0)), []
    for _ in t:
        by, state = update(np.float32(1), state)
        moved.append(-float(by))
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-6)


def test_the_plateaus_rate_is_the_configs():
    rate = objective.learning_rate(config_of(learning_rate=0.02), 7)
    assert [rate(step) for step in (0, 1, 10_000)] == [0.02] * 3 and isinstance(rate(0), float)
    with pytest.raises(ValueError, match="config.schedule: found 'cosinus', expected 'plateau' or 'cosine'"):
        objective.learning_rate(config_of(schedule="cosinus"), 7)


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_gradients_are_clipped_by_their_global_norm(clip_norm):
    """Against Adam by hand (Kingma & Ba 2015, algorithm 1), whose second moments remember how large a burst was."""
    config = config_of(clip_norm=clip_norm, learning_rate=0.01)
    rng = np.random.default_rng(1)
    gradients = [{"a": s * rng.normal(size=(2, 3)), "b": s * rng.normal(size=4)} for s in (0.1, 100, 0.1, 3)]
    optimiser = objective.make_optimiser(config, 1)
    as_float32 = lambda tree: jax.tree.map(np.float32, tree)
    state = optimiser.init(as_float32(gradients[0]))
    mean = square = {"a": 0.0, "b": 0.0}
    for t, g in enumerate(gradients, 1):
        updates, state = optimiser.update(as_float32(g), state)
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        kept = min(1.0, clip_norm / norm) if clip_norm else 1.0
        mean = {k: 0.9 * mean[k] + 0.1 * kept * g[k] for k in g}
        square = {k: 0.999 * square[k] + 0.001 * (kept * g[k]) ** 2 for k in g}
        for k in g:
            by = 0.01 * (mean[k] / (1 - 0.9**t)) / (np.sqrt(square[k] / (1 - 0.999**t)) + 1e-8)
            np.testing.assert_allclose(updates[k], -by, rtol=1e-5, atol=1e-8)


# ---- bfloat16 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_learns_as_float32_does(step_of, whole, batch):
    """Its 8 bits leave each product 2^-9 wrong at most; over 20 steps the loss keeps within 1 % of float32's, and falls as far."""
    states, metrics = run(step_of(1, "bfloat16"), arrays(batch), 20, start())
    assert {leaf.dtype for leaf in jax.tree.leaves((states[-1].params, states[-1].ema))} == {np.dtype(np.float32)}
    loss = lambda rows: np.array([row["whole"] + row["gap"] + 0.01 * row["ctc"] for row in rows])
    ours, theirs = loss(metrics), loss(whole[1])
    assert not np.array_equal(ours, theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-2)
    assert theirs[-3:].mean() < 0.8 * theirs[0] and ours[0] - ours[-3:].mean() == pytest.approx(
        theirs[0] - theirs[-3:].mean(), rel=0.05
    )


# ---- what is read --------------------------------------------------------------------------------------------------------------


def test_validation_gives_what_is_read(batch):
    """A head that says "a" in every step, and louder still a label that names nothing, is wrong in all letters but one."""
    config = config_of()
    state = start()
    bias = np.zeros(grid_text.NUM_LABELS, np.float32)
    bias[[int(grid_text.encode("a")[0]), 35]] = 50, 99
    params = state.params | {"ctc": {"kernel": np.zeros_like(state.params["ctc"]["kernel"]), "bias": bias}}
    step = jax.jit(train_step.make_validation_step(config))
    sums, clips = jax.device_get(step(params, arrays(batch)))
    assert set(sums) == {"whole", "gap", "ctc", "ctc_infeasible", "gap_l1"} and sums["ctc"][1] == 6
    assert clips["path"].dtype == np.int32 and (clips["path"] == grid_text.encode("a")[0]).all()
    frames = np.minimum(149, 1 + np.minimum(batch["audio_length"], 47_648) // 320)  # 20 ms of 16 kHz; presets.py
    np.testing.assert_array_equal(clips["num_steps"], frames)
    letters = [len(said) for said, weight in zip(SAID, COUNTED, strict=True) if said and weight]
    assert train_step.reading_errors(config, batch, clips) == {"cer": (sum(letters) - len(letters), sum(letters))}
    means = train_step.Means()
    means.add(sums | train_step.reading_errors(config, batch, clips))
    assert means.result(config, "val")["val_cer"] == 1 - len(letters) / sum(letters)


@pytest.mark.parametrize("units", ["characters", "phones"])
def test_reading_errors_are_jiwers(batch, units):
    """Of random paths, repeats merged and blanks dropped; and of those split over devices."""
    phones = units == "phones"
    config = config_of(ctc_units=units)
    symbols = grid_text.PHONES if phones else grid_text.CHARACTERS
    rng = np.random.default_rng(0)
    path = np.where(rng.random((8, 60)) < 0.4, 0, rng.integers(0, len(symbols), (8, 60))).repeat(2, 1).astype(np.int32)
    num_steps = np.int32([120, 90, 120, 1, 0, 120, 61, 100])
    merged = [[symbols[label] for label, _ in itertools.groupby(row[:n]) if label] for row, n in zip(path, num_steps, strict=True)]
    read = [" ".join(m) if phones else "".join(m) for m in merged]
    true = [" ".join(grid_text.phones_of(said)) if phones else said for said in SAID]
    kept = [i for i in range(8) if true[i] and COUNTED[i]]
    judge = (jiwer.process_words if phones else jiwer.process_characters)([true[i] for i in kept], [read[i] for i in kept])
    expected = (judge.substitutions + judge.deletions + judge.insertions, judge.hits + judge.substitutions + judge.deletions)
    clips = {"path": path, "num_steps": num_steps}
    name = "per" if phones else "cer"
    assert train_step.reading_errors(config, batch, clips) == {name: expected}
    assert train_step.reading_errors(config, devices.split(batch), devices.split(clips)) == {name: expected}
    right = np.zeros((8, 100), np.int32)
    for i in range(8):
        labels = (grid_text.encode_phones if phones else grid_text.encode)(SAID[i])
        right[i, : 2 * len(labels) : 2] = labels
    clips = {"path": right, "num_steps": np.full(8, 100)}
    assert train_step.reading_errors(config, batch, clips) == {name: (0, expected[1])}


def test_who_does_not_read_has_no_reading_errors(batch):
    config = config_of(system="av_si")
    shapes = jax.eval_shape(lambda: build.init_params(config))
    assert jax.eval_shape(train_step.make_validation_step(config), shapes, arrays(batch))[1] == {}
    assert train_step.reading_errors(config, batch, {}) == {}


# ---- means ---------------------------------------------------------------------------------------------------------------------

# Sums in float32, as a step gives them, whose float64 sums need every digit.
ROWS = [{"whole": (np.float32(rng.normal()) / 3, np.float32(n)), "gap": (np.float32(rng.random() * 1e9), np.float32(n % 3))}
        for n, rng in enumerate(map(np.random.default_rng, range(40)))]  # fmt: skip


@pytest.mark.parametrize("cut", [0, 1, 17, 40])
def test_means_go_on_bit_for_bit(cut):
    """Killed after any step, through JSON."""
    config, whole, before, after = config_of(), train_step.Means(), train_step.Means(), train_step.Means()
    for row in ROWS:
        whole.add(row)
    for row in ROWS[:cut]:
        before.add(row)
    after.add({"whole": (1.0, 1.0)})  # goes when the sums come
    after.load(json.loads(json.dumps(before.save())))
    for row in ROWS[cut:]:
        after.add(row)
    assert after.result(config, "train") == whole.result(config, "train") and after.sums == whole.sums
    total = 0.0
    for row in ROWS:
        total += float(row["whole"][0])
    assert whole.sums["whole"] == [total, sum(range(40))]


def test_what_is_not_finite_says_where_it_came_from():
    """And leaves the sums as they were. It is looked at a few steps late, or when everything is asked for."""
    means = train_step.Means()
    bad = {"ctc": (np.float32(1), np.float32(2)), "gap": (np.float32(np.nan), np.float32(3))}
    means.add({"ctc": (2.0, 1.0)}, step=6)
    means.add(bad, step=7)
    for step in range(8, 7 + means.LATE):
        means.add(ROWS[0], step=step)
    with pytest.raises(train_step.NonFinite, match="^gap is nan in step 7$") as error:
        means.add(ROWS[0], step=8 + means.LATE)
    assert (error.value.step, error.value.name) == (7, "gap") and math.isnan(error.value.value)
    assert isinstance(error.value, FloatingPointError) and means.sums == {"ctc": [2.0, 1.0]}
    means.flush()
    assert means.sums["whole"][1] == 0 and not means.pending
    means.add({"grad_norm": (np.float32(np.inf), np.float32(1))})
    with pytest.raises(train_step.NonFinite, match="^grad_norm is inf$") as error:
        means.flush()
    assert error.value.step is None
