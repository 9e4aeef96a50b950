"""The pure steps of a training, of one batch: (state, batch) -> (state, metrics); and the means of what they measure.

A step sees one device's share of the batch; `parallel` maps it over devices, tests run it unmapped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from avsi_jax.experiment import init_params, make_loss, make_optimiser


class TrainState(NamedTuple):
    """What the step changes. lr_scale: what the plateau schedule has made of the learning rate."""

    step: Any
    params: Any
    opt_state: Any
    lr_scale: Any


def init_state(config, steps_per_epoch: int) -> TrainState:
    import jax.numpy as jnp

    params = init_params(config)
    return TrainState(jnp.int32(0), params, make_optimiser(config, steps_per_epoch).init(params), jnp.float32(1.0))


def make_train_step(config, optimiser, normalisation=None):
    """The pure step (state, batch) -> (state, metrics); `parallel` maps it over devices, tests run it unmapped."""
    import jax
    import jax.numpy as jnp
    import optax

    from avsi_jax import parallel

    loss = make_loss(config, normalisation)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key, state.step)
        grads, sums = parallel.sum_over_devices((grads, sums))
        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: u * state.lr_scale, updates)
        params = optax.apply_updates(state.params, updates)
        metrics = {**sums, "grad_norm": (optax.tree.norm(grads), jnp.float32(1))}
        return TrainState(state.step + 1, params, opt_state, state.lr_scale), metrics

    return step


def make_validation_step(config, normalisation=None):
    """(params, batch) -> sums; a clip's gaps depend on its id alone, so every validation sees the same ones."""
    import jax

    from avsi_jax import parallel

    loss = make_loss(config, normalisation, train=False)

    def step(params, batch: dict) -> dict:
        return parallel.sum_over_devices(loss(params, batch, jax.random.key(config.seed + 1))[1])

    return step


class Means:
    """Sums of (sum, count) metrics over steps; fetched from the device a few steps late, so that its queue never runs empty."""

    LATE = 16

    def __init__(self):
        self.sums: dict[str, list[float]] = {}
        self.pending: list[dict] = []

    def add(self, metrics: dict) -> None:
        self.pending.append(metrics)
        if len(self.pending) > self.LATE:
            self._fetch(self.pending.pop(0))

    def _fetch(self, metrics: dict) -> None:
        for name, (total, count) in metrics.items():
            pair = self.sums.setdefault(name, [0.0, 0.0])
            pair[0] += float(total)
            pair[1] += float(count)

    def result(self, config, prefix: str) -> dict[str, float]:
        """Means under `prefix`, with the objective's value and the gap's mean absolute error in dB."""
        from avsi_jax import spec, stft

        while self.pending:
            self._fetch(self.pending.pop(0))
        means = {k: s / max(n, 1.0) for k, (s, n) in self.sums.items()}
        if "gap_l1" in means:
            means["gap_l1_db"] = means.pop("gap_l1") * stft.db_per_level(spec.get(config.preset))
        loss = sum(config.loss[k] * means[k] for k in ("whole", "gap", "ctc") if k in means)
        return {f"{prefix}_{k}": v for k, v in ({"loss": loss} | means).items()}
