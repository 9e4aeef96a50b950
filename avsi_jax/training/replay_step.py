"""Repeats one training step of a run to find out why it was not finite: avsi-train ... --replay=STEP.

No step is recorded: the run is repeated from the newest earlier checkpoint (training is bit-identical on the same devices), and the
step itself is then examined clip by clip. Writes no files.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from avsi_jax.runtime import storage
from avsi_jax.training.loop import open_data
from avsi_jax.training.objective import make_objective
from avsi_jax.training.optimiser import make_optimiser
from avsi_jax.training.run_directory import METRICS, check_config, read_rows
from avsi_jax.training.train_step import TrainState, accumulate_gradients, global_counts, init_state, make_train_step, step_key

if TYPE_CHECKING:
    from etils import epath
    from ml_collections import ConfigDict

    from avsi_jax.data.features import Normalisation
    from avsi_jax.training.progress_log import Console

# ---- repeating the step --------------------------------------------------------------------------------------------------------


def replay(
    config: ConfigDict, workdir: epath.PathLike, step: int, *, parallel: str = "pmap", cache_dir: str = "", console: Console
) -> dict:
    """Prints and returns the diagnosis (see `diagnose`) of training step `step`, counted from 1.

    ValueError if the run has no checkpoint before that step. With config.debug_nans steps are not mapped, as in training, and after
    the diagnosis FloatingPointError is raised from the operation that first produces a NaN.
    """
    import jax

    from avsi_jax.data import input_pipeline
    from avsi_jax.runtime import devices
    from avsi_jax.training.checkpoints import Checkpoints, find_fault

    if step < 1:
        raise ValueError(f"--replay: found {step}, expected a step counted from 1")
    if jax.process_count() > 1:
        raise ValueError(f"--replay: found {jax.process_count()} processes, expected one (--distributed=off)")
    workdir, parallel = storage.as_path(workdir), devices.UNMAPPED if config.debug_nans else parallel
    data = open_data(config, cache_dir)
    check_config(config, workdir, data.normalisation, data.description, write=False)
    checkpoints = Checkpoints(workdir, read_only=True)
    optimiser = make_optimiser(config, data.steps_per_epoch)
    state, start = init_state(config, data.steps_per_epoch), 0
    valid = [s for s in checkpoints.all_steps() if s < step and find_fault(checkpoints.folder / str(s)) is None]
    if valid:
        start = valid[-1]
        state, _ = checkpoints.restore(start, state)
    elif step > data.steps_per_epoch:
        found = checkpoints.all_steps()
        raise ValueError(f"--replay={step}: found checkpoints {found} in {workdir}, expected a valid one before that step")
    checkpoints.close()
    source = f"the checkpoint of step {start}" if valid else "the initial parameters"
    console.info(f"from {source}: repeating {step - 1 - start} steps before step {step}")

    scales = {row["step"]: row["lr_scale"] for row in read_rows(workdir / METRICS)}
    state = devices.replicate(state, parallel)
    run = devices.map_train_step(make_train_step(config, optimiser, data.normalisation), parallel=parallel)
    order = {"batch_size": config.batch_size, "seed": config.seed, "audio_only": data.audio_only}
    batches = input_pipeline.train_batches(data.training, **order, start_step=start)
    for done in range(start, step):
        if done > start:
            state, metrics = run(state, devices.split(next(batches), parallel))
            jax.block_until_ready((state, metrics))
        if done in scales:  # learning rate factor set after that epoch
            state = state._replace(lr_scale=devices.replicate(np.float32(scales[done]), parallel))
    local_state, batch = jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), state), next(batches)
    diagnosis = diagnose(config, data.normalisation, local_state, batch) | {"step": step}  # counted from 1, as in nonfinite.json
    print_diagnosis(diagnosis, console)
    if config.debug_nans:
        with jax.debug_nans(True):
            jax.block_until_ready(run(state, devices.split(batch, parallel)))
    return diagnosis


def print_diagnosis(diagnosis: dict, console: Console) -> None:
    """Prints the metrics, the clips that are not finite, and the first cause."""
    for name, value in diagnosis["metrics"].items():
        console.info(f"  {name} {value:.6g}")
    for clip in diagnosis["clips"]:
        if clip["not_finite"]:
            console.info(f"  clip {clip['clip_id']}: not finite: {', '.join(clip['not_finite'])}")
    console.info(first_cause(diagnosis))


# ---- diagnosis -----------------------------------------------------------------------------------------------------------------


def diagnose(config: ConfigDict, normalisation: Normalisation | None, state: TrainState, batch: dict) -> dict:
    """Repeats a training step, unmapped and clip by clip, and lists everything that is not finite.

    state: before the step; batch: the global batch. Returns JSON values:
      step
      metrics: {name: mean}, with loss and grad_norm
      clips, in the order of the batch: [{clip_id, weight, loss (the clip's share of the step's loss), terms {name: [sum, count]},
        not_finite: any of "feature NAME", "output NAME", "loss NAME", "gradient"}]
      batch: {field: [ids of the clips in which it is not finite]}
      params, optimiser, gradients: [names of leaves that are not finite]
    """
    import jax
    import jax.numpy as jnp

    objective = make_objective(config, normalisation)
    is_finite = lambda tree: functools.reduce(jnp.logical_and, [jnp.isfinite(a).all() for a in jax.tree.leaves(tree)])

    def loss(params, batch, key, step, counts=None):
        result = objective(params, batch, key, step, counts)
        values = {f"feature {k}": v for k, v in result.features._asdict().items()}
        values |= {f"output {k}": v for k, v in result.output._asdict().items() if v is not None}
        values |= {f"loss {k}": s for k, (s, _) in result.terms.items()}
        return result.total, (result.terms, {k: is_finite(v) for k, v in values.items()})

    def extra(total, aux, grads):
        terms, finite = aux
        return total, terms, finite | {"gradient": is_finite(grads)}

    @jax.jit
    def run(params, batch, step):
        key = step_key(config, step)
        counts = global_counts(objective(params, batch, key, step).terms)
        return accumulate_gradients(loss, len(batch["weight"]), counts, params, batch, key, step, extra)

    state = jax.device_get(state)
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    with jax.debug_nans(False):
        grads, (totals, terms, finite) = jax.device_get(run(state.params, arrays, state.step))
    clips = [
        {
            "clip_id": clip_id,
            "weight": float(batch["weight"][i]),
            "loss": float(totals[i]),
            "terms": {k: [float(s[i]), float(n[i])] for k, (s, n) in terms.items()},
            "not_finite": [k for k, ok in finite.items() if not ok[i]],
        }
        for i, clip_id in enumerate(batch["clip_id"])
    ]
    means = {k: float(s.sum(dtype=np.float64)) / max(float(n.sum()), 1.0) for k, (s, n) in terms.items()}
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in jax.tree.leaves(grads)))
    bad_rows = {k: ~np.isfinite(v).reshape(len(v), -1).all(1) for k, v in arrays.items()}
    return {
        "step": int(state.step),
        "metrics": {"loss": float(totals.sum(dtype=np.float64))} | means | {"grad_norm": norm},
        "clips": clips,
        "batch": {k: [batch["clip_id"][i] for i in np.flatnonzero(bad)] for k, bad in bad_rows.items() if bad.any()},
        "params": _not_finite(state.params),
        "optimiser": _not_finite(state.opt_state),
        "gradients": _not_finite(grads),
    }


def _not_finite(tree: Any) -> list[str]:
    """Names of the leaves that are not finite."""
    import jax

    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return [name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if not np.isfinite(leaf).all()]


def first_cause(diagnosis: dict) -> str:
    """One line with the first value that was not finite on the way from the dataset to the gradient."""
    listed = lambda names: ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    causes = [f"{field} of {listed(ids)} in the dataset" for field, ids in diagnosis["batch"].items()]
    before = (("parameters", "params"), ("optimiser state", "optimiser"))
    causes += [f"{name} before the step ({listed(diagnosis[k])})" for name, k in before if diagnosis[k]]
    for stage in ("feature", "output", "loss", "gradient"):
        names = dict.fromkeys(name for clip in diagnosis["clips"] for name in clip["not_finite"] if name.startswith(stage))
        causes += [f"{n} of {listed([c['clip_id'] for c in diagnosis['clips'] if n in c['not_finite']])}" for n in names]
    return f"step {diagnosis['step']}: " + (f"first value that is not finite: {causes[0]}" if causes else "everything is finite")
