"""The training step and the validation step, pure functions of one batch, and the means of their metrics.

A step works on one device's share of the batch; runtime/devices.py maps it over all devices, and tests also run it unmapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from avsi_jax.models.build import init_params
from avsi_jax.training.objective import make_loss, make_objective
from avsi_jax.training.optimiser import make_optimiser

if TYPE_CHECKING:
    import jax
    import optax
    from ml_collections import ConfigDict

    from avsi_jax.data.features import Normalisation

VALIDATION_SEED = 1  # of the gaps of every validation, whatever config.seed is: losses of runs with other seeds are comparable

# ---- state ---------------------------------------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """The state that the training step updates."""

    step: Any  # int32 scalar, number of training steps done
    params: Any
    opt_state: Any
    lr_scale: Any  # float32 scalar, factor of the learning rate set by the plateau schedule
    ema: Any = None  # moving average of the parameters; None if config.ema is 0

    @property
    def averaged(self) -> Any:
        """The parameters for validation and inference: the moving average, if there is one."""
        return self.params if self.ema is None else self.ema


def init_state(config: ConfigDict, steps_per_epoch: int) -> TrainState:
    """The state before the first training step; ValueError if config.ema is not a valid decay."""
    import jax
    import jax.numpy as jnp

    if not 0 <= config.ema < 1:
        raise ValueError(f"config.ema: found {config.ema}, expected a decay in [0, 1), such as 0.999, or 0 for no average")
    params = init_params(config)
    ema = jax.tree.map(jnp.copy, params) if config.ema else None  # a copy: the training step reuses the memory of both
    return TrainState(jnp.int32(0), params, make_optimiser(config, steps_per_epoch).init(params), jnp.float32(1.0), ema)


def update_average(ema: Any, params: Any, step: jax.Array | int, decay: float) -> Any:
    """The moving average after training step `step`, counted from 0, with decay min(decay, (1 + step) / (10 + step)).

    The smaller decay of the first steps, as in TensorFlow's ExponentialMovingAverage, forgets the initial parameters sooner.
    """
    import jax.numpy as jnp
    import optax

    return optax.incremental_update(params, ema, 1 - jnp.minimum(decay, (1 + step) / (10 + step)))


# ---- training ------------------------------------------------------------------------------------------------------------------


def check_accumulation(config: ConfigDict, device_count: int) -> None:
    """ValueError if a device's share of the batch cannot be split into config.accumulate equal parts."""
    share = config.batch_size // device_count
    if config.accumulate < 1 or share % config.accumulate:
        divisor = next((n for n in range(max(1, config.accumulate), share) if share % n == 0), share)
        raise ValueError(
            f"config.accumulate: found {config.accumulate}, expected a divisor of {share}, the clips per device (batch_size "
            f"{config.batch_size}, {device_count} devices), e.g. --config.accumulate={divisor}"
        )


def make_train_step(
    config: ConfigDict, optimiser: optax.GradientTransformation, normalisation: Normalisation | None = None
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The pure training step (state, batch) -> (state, metrics), metrics as {name: (sum, count)} of the global batch."""
    import jax
    import jax.numpy as jnp
    import optax

    from avsi_jax.runtime import devices

    loss = make_loss(config, normalisation)

    def gradients(params, batch: dict, key, step):
        if config.accumulate == 1:
            (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key, step)
            return grads, sums
        counts = global_counts(loss(params, batch, key, step)[1])
        grads, sums = accumulate_gradients(loss, config.accumulate, counts, params, batch, key, step)
        return grads, jax.tree.map(lambda a: a.sum(0), sums)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        grads, sums = gradients(state.params, batch, step_key(config, state.step), state.step)
        grads, sums = devices.sum_over_devices((grads, sums))
        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: u * state.lr_scale, updates)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else update_average(state.ema, params, state.step, config.ema)
        metrics = {**sums, "grad_norm": (optax.tree.norm(grads), jnp.float32(1))}
        return TrainState(state.step + 1, params, opt_state, state.lr_scale, ema), metrics

    return step


def step_key(config: ConfigDict, step: jax.Array | int) -> jax.Array:
    """The random key of a training step, counted from 0."""
    import jax

    return jax.random.fold_in(jax.random.key(config.seed), step)


def global_counts(terms: dict) -> dict:
    """{name: count over all devices} of (sum, count) terms. The counts need no network: XLA removes the one that came with them."""
    from avsi_jax.runtime import devices

    return {k: devices.sum_over_devices(n) for k, (_, n) in terms.items()}


def accumulate_gradients(
    loss: Callable,
    parts: int,
    counts: dict,
    params: Any,
    batch: dict,
    key: jax.Array,
    step: jax.Array | int,
    extra: Callable = lambda total, aux, grads: aux,
) -> tuple[Any, Any]:
    """Gradients of `loss`, summed over `parts` equal parts of the batch that are processed one at a time.

    counts: of the global batch, by which the loss is normalised and which a single part does not know. Random draws depend on the
    clip ids, so they are the same for any number of parts. Returns (gradients, extra(total, aux, gradients) of each part, stacked).
    """
    import jax
    import jax.numpy as jnp

    def one(grads, part: dict):
        (total, aux), new = jax.value_and_grad(loss, has_aux=True)(params, part, key, step, counts)
        return jax.tree.map(jnp.add, grads, new), extra(total, aux, new)

    stacked = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), batch)
    return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), stacked)


# ---- validation ----------------------------------------------------------------------------------------------------------------


def make_validation_step(
    config: ConfigDict, normalisation: Normalisation | None = None
) -> Callable[[Any, dict], tuple[dict, dict]]:
    """validation_step(params, batch) -> (sums, clips); gaps depend on the clip ids alone, so all validations of all runs agree.

    sums: {name: (sum, count)} of the global batch. clips: {} without a CTC head; otherwise, for this device's share of the batch,
    path (B, S) int32, the most likely label of each time step, and num_steps (B,), the number of valid ones.
    """
    import jax
    import jax.numpy as jnp

    from avsi_jax.models import ctc_decoding
    from avsi_jax.runtime import devices

    objective = make_objective(config, normalisation, train=False)
    num_labels = ctc_decoding.UNITS[config.ctc_units][0]  # the paper's head has further outputs without a symbol

    def step(params, batch: dict) -> tuple[dict, dict]:
        result = objective(params, batch, jax.random.key(VALIDATION_SEED))
        sums = devices.sum_over_devices(result.terms)
        logits, num_steps = result.output.logits, result.output.num_steps
        if logits is None:
            return sums, {}
        return sums, {"path": jnp.argmax(logits[..., :num_labels], -1).astype(jnp.int32), "num_steps": num_steps}

    return step


def transcript_errors(config: ConfigDict, batch: dict, clips: dict) -> dict[str, tuple[float, float]]:
    """{"cer": (character errors, characters)} for Means, or "per" for phones; {} without a CTC head.

    batch: arrays of `input_pipeline`; clips: the validation step's result for the same rows; both may be split over devices. Clips
    of weight 0 or without text are left out.
    """
    from avsi_jax.models import ctc_decoding

    if not clips:
        return {}
    phones = config.ctc_units == "phones"
    size, to_text = ctc_decoding.UNITS[config.ctc_units]
    counted = np.ravel(batch["weight"]) > 0
    rows = lambda a: np.reshape(a, (len(counted), -1))[counted]
    # greedy takes logits: 1 for the most likely label, 0 for the others
    one_hot = np.eye(size, dtype=bool)[rows(clips["path"])]
    transcripts = ctc_decoding.greedy(one_hot, rows(clips["num_steps"])[:, 0], config.ctc_units)
    references = [to_text(labels) for labels in rows(batch["phones" if phones else "labels"])]  # padding is a blank, without text
    measure = ctc_decoding.phone_error_rate if phones else ctc_decoding.character_error_rate
    result = measure(zip(transcripts, references, strict=True))
    return {"per" if phones else "cer": (float(result.errors.sum()), float(result.count.sum()))}


# ---- means ---------------------------------------------------------------------------------------------------------------------


class NonFinite(FloatingPointError):
    """A metric is NaN or infinite: its `name` and `value`, and the training `step` it belongs to, None in a validation."""

    def __init__(self, name: str, value: float, step: int | None = None):
        super().__init__(f"{name} is {value}" + (f" in step {step}" if step is not None else ""))
        self.name, self.value, self.step = name, value, step


class Means:
    """Accumulates (sum, count) metrics over steps.

    Metrics are fetched from the device LATE steps after they were added, so that its queue never runs empty. A metric that is not
    finite raises NonFinite when it is fetched.
    """

    LATE = 16

    def __init__(self):
        self.sums: dict[str, list[float]] = {}
        self.pending: list[tuple[int | None, dict]] = []

    def add(self, metrics: dict, step: int | None = None) -> None:
        """Adds {name: (sum, count)}; step: the training step they belong to."""
        self.pending.append((step, metrics))
        if len(self.pending) > self.LATE:
            self._fetch(*self.pending.pop(0))

    def flush(self) -> None:
        """Fetches all pending metrics."""
        while self.pending:
            self._fetch(*self.pending.pop(0))

    def _fetch(self, step: int | None, metrics: dict) -> None:
        pairs = {name: (float(total), float(count)) for name, (total, count) in metrics.items()}
        for name, (total, count) in pairs.items():
            if not math.isfinite(total) or not math.isfinite(count):
                raise NonFinite(name, total if math.isfinite(count) else count, step)
        for name, pair in pairs.items():
            sums = self.sums.setdefault(name, [0.0, 0.0])
            sums[0] += pair[0]
            sums[1] += pair[1]

    def save(self) -> dict[str, list[float]]:
        """The sums of everything added, as JSON values, which preserve every bit."""
        self.flush()
        return {name: list(pair) for name, pair in self.sums.items()}

    def load(self, saved: dict[str, list[float]]) -> None:
        """Restores what `save` returned; discards everything added before."""
        self.sums, self.pending = {name: list(pair) for name, pair in saved.items()}, []

    def result(self, config: ConfigDict, prefix: str) -> dict[str, float]:
        """{prefix_name: mean}, with the value of the objective as `loss` and the mean absolute error in the gap in dB."""
        from avsi_jax import presets
        from avsi_jax.audio import stft

        self.flush()
        means = {k: s / max(n, 1.0) for k, (s, n) in self.sums.items()}
        if "gap_l1" in means:
            means["gap_l1_db"] = means.pop("gap_l1") * stft.db_per_level(presets.get(config.preset))
        loss = sum(config.loss[k] * means[k] for k in ("whole", "gap", "ctc") if k in means)
        return {f"{prefix}_{k}": v for k, v in ({"loss": loss} | means).items()}
