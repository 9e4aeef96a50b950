"""The pure steps of a training, of one batch: (state, batch) -> (state, metrics); and the means of what they measure.

A step sees one device's share of the batch; `parallel` maps it over devices, tests run it unmapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from avsi_jax.models.build import init_params
from avsi_jax.training.objective import make_loss, make_objective, make_optimiser

# ---- state ---------------------------------------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """What the step changes. lr_scale: what the plateau schedule has made of the learning rate; ema: the parameters' running mean,
    None where config.ema is 0.
    """

    step: Any
    params: Any
    opt_state: Any
    lr_scale: Any
    ema: Any = None

    @property
    def averaged(self) -> Any:
        """The parameters to validate and to restore with."""
        return self.params if self.ema is None else self.ema


def init_state(config, steps_per_epoch: int) -> TrainState:
    """ValueError where config.ema is no decay."""
    import jax
    import jax.numpy as jnp

    if not 0 <= config.ema < 1:
        raise ValueError(f"config.ema: found {config.ema}, expected a decay from 0 (no mean) to below 1, such as 0.999")
    params = init_params(config)
    ema = jax.tree.map(jnp.copy, params) if config.ema else None  # a copy: the step is given the memory of both
    return TrainState(jnp.int32(0), params, make_optimiser(config, steps_per_epoch).init(params), jnp.float32(1.0), ema)


def running_mean(ema, params, step, decay: float):
    """`ema` moved towards the parameters after step `step`, counted from 0, by 1 - min(decay, (1 + step) / (10 + step)).

    The first steps forget the fresh parameters sooner than `decay` would (as TensorFlow's ExponentialMovingAverage does).
    """
    import jax.numpy as jnp
    import optax

    return optax.incremental_update(params, ema, 1 - jnp.minimum(decay, (1 + step) / (10 + step)))


# ---- training ------------------------------------------------------------------------------------------------------------------


def check_accumulation(config, device_count: int) -> None:
    """ValueError where a device's share of the batch can't be cut into config.accumulate equal parts."""
    share = config.batch_size // device_count
    if config.accumulate < 1 or share % config.accumulate:
        fits = next((n for n in range(max(1, config.accumulate), share) if share % n == 0), share)
        raise ValueError(
            f"config.accumulate: found {config.accumulate}, expected a divisor of {share}, the clips of a device (batch_size "
            f"{config.batch_size}, {device_count} devices), e.g. --config.accumulate={fits}"
        )


def make_train_step(config, optimiser, normalisation=None):
    """The pure step (state, batch) -> (state, metrics); `parallel` maps it over devices, tests run it unmapped."""
    import jax
    import jax.numpy as jnp
    import optax

    from avsi_jax.runtime import devices

    loss = make_loss(config, normalisation)

    def gradients(params, batch: dict, key, step):
        if config.accumulate == 1:
            (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key, step)
            return grads, sums
        counts = counts_of(loss(params, batch, key, step)[1])
        grads, sums = in_parts(loss, config.accumulate, counts, params, batch, key, step)
        return grads, jax.tree.map(lambda a: a.sum(0), sums)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        grads, sums = gradients(state.params, batch, key_of(config, state.step), state.step)
        grads, sums = devices.sum_over_devices((grads, sums))
        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: u * state.lr_scale, updates)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else running_mean(state.ema, params, state.step, config.ema)
        metrics = {**sums, "grad_norm": (optax.tree.norm(grads), jnp.float32(1))}
        return TrainState(state.step + 1, params, opt_state, state.lr_scale, ema), metrics

    return step


def key_of(config, step):
    """What is drawn by in a step."""
    import jax

    return jax.random.fold_in(jax.random.key(config.seed), step)


def counts_of(terms: dict) -> dict:
    """The counts of (sum, count) terms over all devices. No network is needed for them: XLA leaves out the one they came with."""
    from avsi_jax.runtime import devices

    return {k: devices.sum_over_devices(n) for k, (_, n) in terms.items()}


def in_parts(loss, parts: int, counts: dict, params, batch: dict, key, step, beside: Callable = lambda total, aux, grads: aux):
    """Gradients of `loss` summed over `parts` equal runs of the batch's rows, one at a time; and `beside` of each, stacked.

    counts: of the whole batch, by which a loss is divided, and which no part knows. What is drawn goes by the clip's id: the same
    whatever the parts, dropout too.
    """
    import jax
    import jax.numpy as jnp

    def one(grads, part: dict):
        (total, aux), more = jax.value_and_grad(loss, has_aux=True)(params, part, key, step, counts)
        return jax.tree.map(jnp.add, grads, more), beside(total, aux, more)

    cut = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), batch)
    return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), cut)


# ---- validation ----------------------------------------------------------------------------------------------------------------


def make_validation_step(config, normalisation=None):
    """(params, batch) -> (sums, clips); a clip's gaps depend on its id alone, so every validation sees the same ones.

    clips, of a system that reads: path (B, S) int32, the likeliest label of each step, and num_steps (B,), how many are the clip's;
    {} of others. They are this device's share, not summed.
    """
    import jax
    import jax.numpy as jnp

    from avsi_jax.models import ctc_decoding
    from avsi_jax.runtime import devices

    objective = make_objective(config, normalisation, train=False)
    said = ctc_decoding.UNITS[config.ctc_units][0]  # the paper's head has outputs that name nothing

    def step(params, batch: dict) -> tuple[dict, dict]:
        found = objective(params, batch, jax.random.key(config.seed + 1))
        sums = devices.sum_over_devices(found.terms)
        logits, num_steps = found.output.logits, found.output.num_steps
        if logits is None:
            return sums, {}
        return sums, {"path": jnp.argmax(logits[..., :said], -1).astype(jnp.int32), "num_steps": num_steps}

    return step


def reading_errors(config, batch: dict, clips: dict) -> dict[str, tuple[float, float]]:
    """{"cer": (wrong characters, characters said)}, or "per" of phones, for Means; {} of a system that doesn't read.

    batch: arrays of `input_pipeline`; clips: what the validation step gave for its rows, one to one; both split over devices or
    not. Clips of weight 0 and those without text don't count.
    """
    from avsi_jax.models import ctc_decoding

    if not clips:
        return {}
    phones = config.ctc_units == "phones"
    size, spell = ctc_decoding.UNITS[config.ctc_units]
    counts = np.ravel(batch["weight"]) > 0
    rows = lambda a: np.reshape(a, (len(counts), -1))[counts]
    # greedy takes logits: 1 for the likeliest label, 0 for the others
    said = ctc_decoding.greedy(np.eye(size, dtype=bool)[rows(clips["path"])], rows(clips["num_steps"])[:, 0], config.ctc_units)
    true = [spell(labels) for labels in rows(batch["phones" if phones else "labels"])]  # padding is a blank, which says nothing
    found = (ctc_decoding.phone_error_rate if phones else ctc_decoding.character_error_rate)(zip(said, true, strict=True))
    return {"per" if phones else "cer": (float(found.errors.sum()), float(found.count.sum()))}


# ---- means ---------------------------------------------------------------------------------------------------------------------


class NonFinite(FloatingPointError):
    """A metric that is not a number, or endless: `name`, `value`, and the `step` it came from, None in a validation."""

    def __init__(self, name: str, value: float, step: int | None = None):
        super().__init__(f"{name} is {value}" + (f" in step {step}" if step is not None else ""))
        self.name, self.value, self.step = name, value, step


class Means:
    """Sums of (sum, count) metrics over steps; fetched from the device a few steps late, so that its queue never runs empty.

    A metric that is not finite raises NonFinite when it is fetched.
    """

    LATE = 16

    def __init__(self):
        self.sums: dict[str, list[float]] = {}
        self.pending: list[tuple[int | None, dict]] = []

    def add(self, metrics: dict, step: int | None = None) -> None:
        self.pending.append((step, metrics))
        if len(self.pending) > self.LATE:
            self._fetch(*self.pending.pop(0))

    def flush(self) -> None:
        """Fetches what is pending."""
        while self.pending:
            self._fetch(*self.pending.pop(0))

    def _fetch(self, step: int | None, metrics: dict) -> None:
        pairs = {name: (float(total), float(count)) for name, (total, count) in metrics.items()}
        for name, (total, count) in pairs.items():
            if not math.isfinite(total) or not math.isfinite(count):
                raise NonFinite(name, total if math.isfinite(count) else count, step)
        for name, pair in pairs.items():
            kept = self.sums.setdefault(name, [0.0, 0.0])
            kept[0] += pair[0]
            kept[1] += pair[1]

    def save(self) -> dict[str, list[float]]:
        """The sums of all that was added, for JSON, which keeps every bit of them."""
        self.flush()
        return {name: list(pair) for name, pair in self.sums.items()}

    def load(self, saved: dict[str, list[float]]) -> None:
        """Goes on where `save` was, whatever was added here before."""
        self.sums, self.pending = {name: list(pair) for name, pair in saved.items()}, []

    def result(self, config, prefix: str) -> dict[str, float]:
        """Means under `prefix`, with the objective's value and the gap's mean absolute error in dB."""
        from avsi_jax import presets
        from avsi_jax.audio import stft

        self.flush()
        means = {k: s / max(n, 1.0) for k, (s, n) in self.sums.items()}
        if "gap_l1" in means:
            means["gap_l1_db"] = means.pop("gap_l1") * stft.db_per_level(presets.get(config.preset))
        loss = sum(config.loss[k] * means[k] for k in ("whole", "gap", "ctc") if k in means)
        return {f"{prefix}_{k}": v for k, v in ({"loss": loss} | means).items()}
