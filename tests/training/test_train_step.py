"""Training step and validation step: gradient accumulation, moving average, schedule, transcript errors, and means."""

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
from avsi_jax.training import train_step
from avsi_jax.training.optimiser import learning_rate, make_optimiser
from tests.support import step_batches
from tests.support.step_batches import TEXTS, WEIGHTS, arrays, run

FIELDS = {
    "system": "av_mtl_si", "units": 8, "bottleneck": 8, "batch_size": 8, "loss.gap": 1.0, "loss.ctc": 0.01, "ema": 0.4,
    "dropout": 0.2, "augment.gain_db": 3.0, "augment.mirror": 0.5, "gaps.max_count": 2,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("quickly_compiled")


def config_of(**fields):
    return configs.load("tiny", [(k.replace("__", "."), str(v)) for k, v in (FIELDS | fields).items()])


@pytest.fixture(scope="module")
def batch():
    return step_batches.make_batch()


@functools.cache
def start(rate=0.05):
    """The initial state for plain gradient descent; Adam would amplify the last bits of a gradient."""
    state = jax.device_get(train_step.init_state(config_of(), 1))
    return state._replace(opt_state=optax.sgd(1.0).init(state.params), lr_scale=np.float32(rate))


@pytest.fixture(scope="module")
def step_of(batch):
    """step_of(parts, dtype) -> the compiled step on one device."""

    @functools.cache
    def make(parts=1, dtype="float32"):
        step = train_step.make_train_step(config_of(accumulate=parts, dtype=dtype), optax.sgd(1.0))
        return jax.jit(step).lower(start(), arrays(batch)).compile()

    return make


@pytest.fixture(scope="module")
def mapped(batch):
    """The compiled step over four devices, each of which processes its two clips one by one."""
    step = devices.map_train_step(train_step.make_train_step(config_of(accumulate=2), optax.sgd(1.0)))
    return step.lower(devices.replicate(start()), devices.split(batch)).compile()


@pytest.fixture(scope="module")
def unsplit(step_of, batch):
    """(states, metrics) of eight steps without accumulation."""
    return run(step_of(), arrays(batch), 8, start())


# ---- gradient accumulation -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["four devices of two parts", pytest.param("four parts", marks=pytest.mark.slow)])
def split_step(request, step_of, mapped):
    """A step that processes the batch in parts."""
    if request.param == "four parts":
        return step_of(4)
    return lambda state, batch: mapped(devices.replicate(state), devices.split(batch))


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(split_step, step_of, batch):
    """With augmentation and dropout, by the change of the parameters in one step of gradient descent."""
    before = start(rate=1.0)
    after = [run(step, arrays(batch), 1, before)[0][0].params for step in (split_step, step_of())]
    moved = [jax.tree.map(lambda old, new: old.astype(np.float64) - new, before.params, params) for params in after]
    # Gradients are only known to the last bit of the float32 parameters, 6e-8 of them.
    for a, b, p in zip(*map(jax.tree.leaves, (*moved, before.params)), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max() + 2e-7 * np.abs(p).max()


@pytest.mark.slow
def test_three_accumulated_steps_are_those_of_the_whole_batch(split_step, unsplit, batch):
    states, metrics = run(split_step, arrays(batch), 3, start())
    for a, b in zip(metrics, unsplit[1], strict=False):  # the norm differs more, as in tests/runtime/test_devices.py
        assert a.pop("grad_norm") == pytest.approx(b["grad_norm"], rel=3e-5)
        assert a == pytest.approx({k: b[k] for k in a}, rel=1e-5)
    result, expected = ((s.params, s.ema) for s in (states[2], unsplit[0][2]))
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), 0.01)  # 0.01: biases start at 0 and are still tiny
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(states[2].params), jax.tree.leaves(start().params), strict=True)]
    assert max(moved) > 1e-2, "no parameter was trained"


def test_accumulation_needs_no_second_forward_pass(step_of, mapped):
    """The pass that computes the global counts has no LSTM in the compiled program: as many loops as without accumulation."""
    loops = [len(re.findall(r" while\(.*blstm_1/while", step.as_text())) for step in (step_of(), mapped)]
    assert loops[0] == loops[1] > 0


@pytest.mark.slow  # a minute of compiling
def test_accumulation_needs_less_memory(batch):
    """av_mtl_s2s with 32 clips on one CPU device: 736 MB in one part, 416 in two, 240 in four."""
    rows = {k: jax.ShapeDtypeStruct((32, *v.shape[1:]), v.dtype) for k, v in arrays(batch).items()}
    sizes = []
    for parts in (1, 2, 4):
        config = configs.load("av_mtl_s2s", [("accumulate", str(parts))])
        step = jax.jit(train_step.make_train_step(config, make_optimiser(config, 1)))
        program = step.lower(jax.eval_shape(lambda c=config: train_step.init_state(c, 1)), rows).compile()
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    print([f"{size / 1e6:.0f} MB" for size in sizes])
    assert sizes[1] < 0.65 * sizes[0] and sizes[2] < 0.65 * sizes[1]


@pytest.mark.parametrize(
    ("parts", "size", "device_count", "message"),
    [
        (3, 32, 4, r"config.accumulate: found 3, expected a divisor of 8, .* --config.accumulate=4"),
        (16, 32, 4, "found 16, expected a divisor of 8, .* --config.accumulate=8"),
        (0, 32, 1, "found 0, expected a divisor of 32, .* --config.accumulate=1"),
        (-2, 6, 1, "found -2, expected a divisor of 6, .* --config.accumulate=1"),
    ],
)
def test_a_number_of_parts_that_does_not_divide_the_batch_is_refused(parts, size, device_count, message):
    with pytest.raises(ValueError, match=message) as error:
        train_step.check_accumulation(config_of(accumulate=parts, batch_size=size), device_count)
    assert "\n" not in str(error.value)


def test_a_number_of_parts_that_divides_the_batch_is_accepted():
    for parts, size, count in ((1, 8, 8), (1, 7, 1), (2, 32, 4), (8, 32, 4)):
        train_step.check_accumulation(config_of(accumulate=parts, batch_size=size), count)


# ---- moving average ------------------------------------------------------------------------------------------------------------


def test_ema_is_the_moving_average_of_the_parameters(unsplit):
    """Against a plain loop with decay 1/10, 2/11, 3/12 ... and 0.4 from the sixth step on."""
    mean = jax.tree.map(np.float64, start().params)
    for t, state in enumerate(unsplit[0]):
        decay = min(0.4, (1 + t) / (10 + t))
        mean = jax.tree.map(lambda m, p, d=decay: d * m + (1 - d) * p, mean, state.params)
        for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(mean), strict=True):
            assert a.dtype == np.float32 and np.abs(a - b).max() <= 1e-6 * np.abs(b).max()
    last = unsplit[0][-1]
    assert last.averaged is last.ema
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (mean, last.params)))) > 1e-3


def test_with_a_constant_decay_the_moving_average_is_that_of_optax():
    """optax starts at 0: after n steps the difference is decay^n times the initial value."""
    values = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    optax_ema, ours = optax.ema(0.1, debias=False), values[0]
    state = optax_ema.init(values[0])
    for t, value in enumerate(values[1:]):
        ours = train_step.update_average(ours, value, t, 0.1)
        expected, state = optax_ema.update(value, state)
        np.testing.assert_allclose(ours, expected + 0.1 ** (t + 1) * values[0], rtol=1e-5)


def test_without_ema_there_is_no_moving_average():
    state = jax.eval_shape(lambda: train_step.init_state(config_of(ema=0.0), 1))
    assert state.ema is None and state.averaged is state.params
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"config.ema: found {decay}"):
            train_step.init_state(config_of(ema=decay), 1)


def test_checkpoints_without_a_moving_average_can_be_restored(tmp_path):
    """Those of older versions, whose state has no such field, and those of runs without one."""
    from avsi_jax.training import checkpoints

    class OldState(NamedTuple):
        step: np.ndarray
        params: dict
        opt_state: tuple
        lr_scale: np.ndarray

    rng = np.random.default_rng(0)
    old = OldState(np.int32(5), {"a": {"b": rng.normal(size=3)}}, optax.adam(1.0).init({"a": np.zeros(3)}), np.float32(0.1))
    saved = checkpoints.Checkpoints(tmp_path)
    saved.save(5, old, {}, 1.0)
    saved.save(6, train_step.TrainState(*old), {}, 1.0)
    for step in (5, 6):
        restored, _ = saved.restore(step, train_step.TrainState(*jax.tree.map(np.zeros_like, old)))
        assert isinstance(restored, train_step.TrainState) and restored.ema is None
        jax.tree.map(np.testing.assert_array_equal, restored, train_step.TrainState(*old))
    saved.close()


@pytest.mark.parametrize("ema", [0.5, 0.0])
def test_inference_uses_the_moving_average_if_there_is_one(tmp_path, ema):
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
    params = restorer.read_run(tmp_path, "last").params
    jax.tree.map(np.testing.assert_array_equal, params, fill(shapes.params, 3.0 if ema else 2.0))


# ---- schedule and clipping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-8, 1e-7, 1.0])
def test_adams_epsilon_is_that_of_the_config(epsilon):
    """The first step of Adam is rate * g / (|g| + epsilon) (Kingma & Ba 2015, algorithm 1)."""
    config = config_of(schedule="plateau", learning_rate=0.5, adam_epsilon=epsilon, clip_norm=0.0)
    optimiser, gradient = make_optimiser(config, 1), np.float32(1e-7)
    update, _ = jax.jit(optimiser.update)(gradient, optimiser.init(np.float32(0)))
    assert float(update) == pytest.approx(-0.5 * 1e-7 / (1e-7 + epsilon), rel=1e-3)


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "warmup_epochs", "warmup"),
    [(10, 3, 2.0, 6), (10, 3, 0.0, 0), (4, 5, 0.5, 2), (2, 3, 7.0, 5), (1, 1, 1.0, 0)],
)
def test_the_learning_rate_of_every_step_of_a_cosine_schedule(epochs, per_epoch, warmup_epochs, warmup):
    """Linear over `warmup` steps, then a cosine to 0 at the last step (Loshchilov & Hutter 2017, eq. 5), then 0.

    With a constant gradient Adam moves by the learning rate, so the optimiser must agree with `learning_rate`.
    """
    config = config_of(schedule="cosine", epochs=epochs, warmup_epochs=warmup_epochs, learning_rate=0.5)
    total = epochs * per_epoch
    t = np.arange(total + 3)
    down = 0.25 * (1 + np.cos(np.pi * np.minimum((t - warmup) / (total - warmup), 1)))
    expected = np.where(t < warmup, 0.5 * t / max(warmup, 1), down)
    rate, optimiser = learning_rate(config, per_epoch), make_optimiser(config, per_epoch)
    np.testing.assert_allclose([rate(step) for step in t], expected, rtol=1e-6, atol=1e-7)
    update = jax.jit(optimiser.update)
    state, moved = optimiser.init(np.float32(0)), []
    for _ in t:
        by, state = update(np.float32(1), state)
        moved.append(-float(by))
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-6)


def test_the_plateau_schedule_has_the_constant_rate_of_the_config():
    rate = learning_rate(config_of(learning_rate=0.02), 7)
    assert [rate(step) for step in (0, 1, 10_000)] == [0.02] * 3 and isinstance(rate(0), float)
    with pytest.raises(ValueError, match="config.schedule: found 'cosinus'"):
        learning_rate(config_of(schedule="cosinus"), 7)


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_gradients_are_clipped_by_their_global_norm(clip_norm):
    """Against Adam by hand (Kingma & Ba 2015, algorithm 1), whose second moments depend on the size of earlier gradients."""
    config = config_of(clip_norm=clip_norm, learning_rate=0.01)
    rng = np.random.default_rng(1)
    gradients = [{"a": s * rng.normal(size=(2, 3)), "b": s * rng.normal(size=4)} for s in (0.1, 100, 0.1, 3)]
    optimiser = make_optimiser(config, 1)
    as_float32 = lambda tree: jax.tree.map(np.float32, tree)
    state = optimiser.init(as_float32(gradients[0]))
    mean = square = {"a": 0.0, "b": 0.0}
    for t, g in enumerate(gradients, 1):
        updates, state = optimiser.update(as_float32(g), state)
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        scale = min(1.0, clip_norm / norm) if clip_norm else 1.0
        mean = {k: 0.9 * mean[k] + 0.1 * scale * g[k] for k in g}
        square = {k: 0.999 * square[k] + 0.001 * (scale * g[k]) ** 2 for k in g}
        for k in g:
            by = 0.01 * (mean[k] / (1 - 0.9**t)) / (np.sqrt(square[k] / (1 - 0.999**t)) + 1e-8)
            np.testing.assert_allclose(updates[k], -by, rtol=1e-5, atol=1e-8)


# ---- bfloat16 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_learns_as_float32_does(step_of, batch):
    """The loss of each of 20 steps is within 1 % of that of float32 (8 bits: relative errors of 2^-9), and falls as far."""
    states, metrics = run(step_of(1, "bfloat16"), arrays(batch), 20, start())
    assert {leaf.dtype for leaf in jax.tree.leaves((states[-1].params, states[-1].ema))} == {np.dtype(np.float32)}
    loss = lambda rows: np.array([row["whole"] + row["gap"] + 0.01 * row["ctc"] for row in rows])
    result, expected = loss(metrics), loss(run(step_of(), arrays(batch), 20, start())[1])
    assert not np.array_equal(result, expected)
    np.testing.assert_allclose(result, expected, rtol=1e-2)
    fall = expected[0] - expected[-3:].mean()
    assert expected[-3:].mean() < 0.8 * expected[0] and result[0] - result[-3:].mean() == pytest.approx(fall, rel=0.05)


# ---- transcript errors ---------------------------------------------------------------------------------------------------------


def test_validation_returns_the_most_likely_labels(batch):
    """With a head that always prefers "a", and even more an output without a symbol, all letters but one per clip are wrong."""
    config = config_of()
    state = start()
    bias = np.zeros(grid_text.NUM_LABELS, np.float32)
    bias[[int(grid_text.encode("a")[0]), 35]] = 50, 99
    params = state.params | {"ctc": {"kernel": np.zeros_like(state.params["ctc"]["kernel"]), "bias": bias}}
    step = jax.jit(train_step.make_validation_step(config))
    sums, clips = jax.device_get(step(params, arrays(batch)))
    assert set(sums) == {"whole", "gap", "ctc", "ctc_infeasible", "gap_l1"} and sums["ctc"][1] == 6
    assert clips["path"].dtype == np.int32 and (clips["path"] == grid_text.encode("a")[0]).all()
    frames = np.minimum(149, 1 + np.minimum(batch["audio_length"], 47_648) // 320)  # frames of 20 ms at 16 kHz (presets.py)
    np.testing.assert_array_equal(clips["num_steps"], frames)
    letters = [len(text) for text, weight in zip(TEXTS, WEIGHTS, strict=True) if text and weight]
    assert train_step.transcript_errors(config, batch, clips) == {"cer": (sum(letters) - len(letters), sum(letters))}
    means = train_step.Means()
    means.add(sums | train_step.transcript_errors(config, batch, clips))
    assert means.result(config, "val")["val_cer"] == 1 - len(letters) / sum(letters)


@pytest.mark.slow
def test_validation_losses_of_other_seeds_are_comparable(batch):
    """The same parameters have the same sums whatever config.seed is; the training draws other gaps for another seed."""
    params, results = start().params, []
    for seed in (0, 7):
        step = jax.jit(train_step.make_validation_step(config_of(seed=seed, system="av_si")))
        results.append(jax.device_get(step(params, arrays(batch)))[0])
    assert results[0] == results[1] and results[0]["gap"][1] > 0
    keys = [jax.random.key_data(train_step.step_key(config_of(seed=seed), 3)).tolist() for seed in (0, 7)]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("units", ["characters", "phones"])
def test_transcript_errors_are_those_of_jiwer(batch, units):
    """For random paths, also when split over devices; correct paths have no errors."""
    phones = units == "phones"
    config = config_of(ctc_units=units)
    symbols = grid_text.PHONES if phones else grid_text.CHARACTERS
    rng = np.random.default_rng(0)
    path = np.where(rng.random((8, 60)) < 0.4, 0, rng.integers(0, len(symbols), (8, 60))).repeat(2, 1).astype(np.int32)
    num_steps = np.int32([120, 90, 120, 1, 0, 120, 61, 100])
    merged = [[symbols[label] for label, _ in itertools.groupby(row[:n]) if label] for row, n in zip(path, num_steps, strict=True)]
    transcripts = [" ".join(m) if phones else "".join(m) for m in merged]
    references = [" ".join(grid_text.phones_of(text)) if phones else text for text in TEXTS]
    counted = [i for i in range(8) if references[i] and WEIGHTS[i]]
    measure = jiwer.process_words if phones else jiwer.process_characters
    counts = measure([references[i] for i in counted], [transcripts[i] for i in counted])
    length = counts.hits + counts.substitutions + counts.deletions
    expected = (counts.substitutions + counts.deletions + counts.insertions, length)
    clips = {"path": path, "num_steps": num_steps}
    name = "per" if phones else "cer"
    assert train_step.transcript_errors(config, batch, clips) == {name: expected}
    assert train_step.transcript_errors(config, devices.split(batch), devices.split(clips)) == {name: expected}
    correct = np.zeros((8, 100), np.int32)
    for i in range(8):
        labels = (grid_text.encode_phones if phones else grid_text.encode)(TEXTS[i])
        correct[i, : 2 * len(labels) : 2] = labels
    clips = {"path": correct, "num_steps": np.full(8, 100)}
    assert train_step.transcript_errors(config, batch, clips) == {name: (0, length)}


def test_systems_without_a_ctc_head_have_no_transcript_errors(batch):
    config = config_of(system="av_si")
    shapes = jax.eval_shape(lambda: build.init_params(config))
    assert jax.eval_shape(train_step.make_validation_step(config), shapes, arrays(batch))[1] == {}
    assert train_step.transcript_errors(config, batch, {}) == {}


# ---- means ---------------------------------------------------------------------------------------------------------------------

# float32 sums as a step returns them, whose float64 totals need every digit.
ROWS = [{"whole": (np.float32(rng.normal()) / 3, np.float32(n)), "gap": (np.float32(rng.random() * 1e9), np.float32(n % 3))}
        for n, rng in enumerate(map(np.random.default_rng, range(40)))]  # fmt: skip


@pytest.mark.parametrize("cut", [0, 1, 17, 40])
def test_saved_means_continue_bit_for_bit(cut):
    """Saved as JSON after any step."""
    config, uninterrupted, before, after = config_of(), train_step.Means(), train_step.Means(), train_step.Means()
    for row in ROWS:
        uninterrupted.add(row)
    for row in ROWS[:cut]:
        before.add(row)
    after.add({"whole": (1.0, 1.0)})  # discarded by load
    after.load(json.loads(json.dumps(before.save())))
    for row in ROWS[cut:]:
        after.add(row)
    assert after.result(config, "train") == uninterrupted.result(config, "train") and after.sums == uninterrupted.sums
    total = 0.0
    for row in ROWS:
        total += float(row["whole"][0])
    assert uninterrupted.sums["whole"] == [total, sum(range(40))]


def test_a_metric_that_is_not_finite_is_an_error_that_names_its_step():
    """Raised when it is fetched, a few steps late or at a flush; the sums so far are kept."""
    means = train_step.Means()
    bad = {"ctc": (np.float32(1), np.float32(2)), "gap": (np.float32(np.nan), np.float32(3))}
    means.add({"ctc": (2.0, 1.0)}, step=6)
    means.add(bad, step=7)
    for step in range(8, 7 + means.LATE):
        means.add(ROWS[0], step=step)
    with pytest.raises(train_step.NonFinite) as error:
        means.add(ROWS[0], step=8 + means.LATE)
    assert (error.value.step, error.value.name) == (7, "gap") and math.isnan(error.value.value)
    assert isinstance(error.value, FloatingPointError) and means.sums == {"ctc": [2.0, 1.0]}
    means.flush()
    assert means.sums["whole"][1] == 0 and not means.pending
    means.add({"grad_norm": (np.float32(np.inf), np.float32(1))})
    with pytest.raises(train_step.NonFinite) as error:
        means.flush()
    assert (error.value.step, error.value.name, error.value.value) == (None, "grad_norm", math.inf)
