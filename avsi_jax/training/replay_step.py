"""One step of a run again, to tell why it came to no number: avsi-train ... --replay=STEP.

Nothing is kept of every step: the run goes on from the newest checkpoint before it, as it did then (a training is the same to the
bit on the same devices), up to the step, which is then looked at clip by clip. Writes nothing.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from avsi_jax.runtime import storage
from avsi_jax.training.loop import open_data
from avsi_jax.training.objective import make_objective, make_optimiser
from avsi_jax.training.run_directory import METRICS, check_config, read_rows
from avsi_jax.training.train_step import TrainState, counts_of, in_parts, init_state, key_of, make_train_step

# ---- the step again ------------------------------------------------------------------------------------------------------------


def replay(config, workdir, step: int, *, how: str = "pmap", cache_dir: str = "", console) -> dict:
    """What `diagnose` finds in step `step`, counted from 1; ValueError where the run has no checkpoint before it.

    config.debug_nans: unmapped, as it trains then, and in the end FloatingPointError from the operation that first gives NaN.
    """
    from avsi_jax.runtime import devices

    devices.use_every_core(config.batch_size)
    import jax

    from avsi_jax.data import input_pipeline
    from avsi_jax.training.checkpoints import Checkpoints, find_fault

    if step < 1:
        raise ValueError(f"--replay: found {step}, expected a step counted from 1")
    if jax.process_count() > 1:
        raise ValueError(f"--replay: found {jax.process_count()} processes, expected one (--distributed=off)")
    workdir, how = storage.folder(workdir), devices.UNMAPPED if config.debug_nans else how
    data = open_data(config, cache_dir)
    check_config(config, workdir, data.normalisation, data.described, write=False)
    checkpoints = Checkpoints(workdir, read_only=True)
    optimiser = make_optimiser(config, data.steps_per_epoch)
    state, start = init_state(config, data.steps_per_epoch), 0
    whole = [s for s in checkpoints.all_steps() if s < step and find_fault(checkpoints.folder / str(s)) is None]
    if whole:
        start = whole[-1]
        state, _ = checkpoints.restore(start, state)
    elif step > data.steps_per_epoch:
        there = checkpoints.all_steps()
        raise ValueError(f"--replay={step}: found checkpoints {there} in {workdir}, expected a whole one before that step")
    checkpoints.close()
    begin = f"the checkpoint of step {start}" if whole else "fresh parameters"
    console.say(f"from {begin}, {step - 1 - start} steps on to step {step}")

    scales = {row["step"]: row["lr_scale"] for row in read_rows(workdir / METRICS)}
    state = devices.replicate(state, how)
    run = devices.map_train_step(make_train_step(config, optimiser, data.normalisation), how=how)
    batches = input_pipeline.train_batches(data.training, config.batch_size, config.seed, start_step=start)
    for done in range(start, step):
        if done > start:
            state, metrics = run(state, devices.split(next(batches), how))
            jax.block_until_ready((state, metrics))
        if done in scales:  # what the validation of that epoch made of the rate
            state = state._replace(lr_scale=devices.replicate(np.float32(scales[done]), how))
    here, batch = jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), state), next(batches)
    found = diagnose(config, data.normalisation, here, batch) | {"step": step}  # counted from 1, as in nonfinite.json
    say(found, console)
    if config.debug_nans:
        with jax.debug_nans(True):
            jax.block_until_ready(run(state, devices.split(batch, how)))
    return found


def say(found: dict, console) -> None:
    """What `diagnose` found: the means, the clips that are not finite, and why."""
    for name, value in found["metrics"].items():
        console.say(f"  {name} {value:.6g}")
    for clip in found["clips"]:
        if clip["not_finite"]:
            console.say(f"  clip {clip['clip_id']}: not finite: {', '.join(clip['not_finite'])}")
    console.say(why(found))


# ---- what was wrong ------------------------------------------------------------------------------------------------------------


def diagnose(config, normalisation, state: TrainState, batch: dict) -> dict:
    """Why a step came to no number: the step again, unmapped, clip by clip, by the state before it and its whole batch.

    Returns, ready for JSON:
      step; metrics {name: mean}, with loss and grad_norm;
      clips [{clip_id, weight, loss (the clip's share of the step's), terms {name: [sum, count]}, not_finite [what of the clip isn't
      finite: "feature NAME", "output NAME", "loss NAME" or "gradient"]}], in the batch's order;
      batch {field: [clip ids]}, params [names], optimiser [names], gradients [names]: what isn't finite of them.
    """
    import jax
    import jax.numpy as jnp

    objective = make_objective(config, normalisation)
    whole = lambda tree: functools.reduce(jnp.logical_and, [jnp.isfinite(a).all() for a in jax.tree.leaves(tree)])

    def loss(params, batch, key, step, counts=None):
        found = objective(params, batch, key, step, counts)
        seen = {f"feature {k}": v for k, v in found.features._asdict().items()}
        said = {f"output {k}": v for k, v in found.output._asdict().items() if v is not None}
        sums = {f"loss {k}": s for k, (s, _) in found.terms.items()}
        return found.total, (found.terms, {k: whole(v) for k, v in (seen | said | sums).items()})

    def beside(total, aux, grads):
        terms, finite = aux
        return total, terms, finite | {"gradient": whole(grads)}

    @jax.jit
    def run(params, batch, step):
        key = key_of(config, step)
        counts = counts_of(objective(params, batch, key, step).terms)
        return in_parts(loss, len(batch["weight"]), counts, params, batch, key, step, beside)

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
            "not_finite": [k for k, good in finite.items() if not good[i]],
        }
        for i, clip_id in enumerate(batch["clip_id"])
    ]
    means = {k: float(s.sum(dtype=np.float64)) / max(float(n.sum()), 1.0) for k, (s, n) in terms.items()}
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in jax.tree.leaves(grads)))
    rows = {k: ~np.isfinite(v).reshape(len(v), -1).all(1) for k, v in arrays.items()}
    return {
        "step": int(state.step),
        "metrics": {"loss": float(totals.sum(dtype=np.float64))} | means | {"grad_norm": norm},
        "clips": clips,
        "batch": {k: [batch["clip_id"][i] for i in np.flatnonzero(bad)] for k, bad in rows.items() if bad.any()},
        "params": _not_finite(state.params),
        "optimiser": _not_finite(state.opt_state),
        "gradients": _not_finite(grads),
    }


def _not_finite(tree) -> list[str]:
    """Names of the leaves that hold what is not finite."""
    import jax

    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return [name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if not np.isfinite(leaf).all()]


def why(found: dict) -> str:
    """What `diagnose` found, in one line: the first that was not finite on the way from the records to the gradient."""
    listed = lambda names: ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    causes = [f"{field} of {listed(ids)} in the dataset" for field, ids in found["batch"].items()]
    before = (("parameters", "params"), ("the optimiser's state", "optimiser"))
    causes += [f"{of} before the step ({listed(found[k])})" for of, k in before if found[k]]
    for stage in ("feature", "output", "loss", "gradient"):
        named = dict.fromkeys(name for clip in found["clips"] for name in clip["not_finite"] if name.startswith(stage))
        causes += [f"{n} of {listed([c['clip_id'] for c in found['clips'] if n in c['not_finite']])}" for n in named]
    return f"step {found['step']}: " + (f"not finite first of all: {causes[0]}" if causes else "everything is finite")
