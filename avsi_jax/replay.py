"""One step of a run again, to tell why it came to no number: avsi-train ... --replay=STEP.

Nothing is kept of every step: the run goes on from the newest checkpoint before it, as it did then (a training is the same to the
bit on the same devices), up to the step, which is then looked at clip by clip. Writes nothing.
"""

from __future__ import annotations

from avsi_jax import storage
from avsi_jax.experiment import make_optimiser
from avsi_jax.loop import open_data
from avsi_jax.steps import diagnose, init_state, make_train_step, why
from avsi_jax.workdir import METRICS, check_config, read_rows


def replay(config, workdir, step: int, *, how: str = "pmap", cache_dir: str = "", console) -> dict:
    """What `steps.diagnose` finds in step `step`, counted from 1; ValueError where the run has no checkpoint before it."""
    from avsi_jax import parallel

    parallel.use_every_core(config.batch_size)
    import jax
    import numpy as np

    from avsi_jax import input_pipeline
    from avsi_jax.checkpoints import Checkpoints, find_fault

    if step < 1:
        raise ValueError(f"--replay: found {step}, expected a step counted from 1")
    if jax.process_count() > 1:
        raise ValueError(f"--replay: found {jax.process_count()} processes, expected one (--distributed=off)")
    workdir = storage.folder(workdir)
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
    begin = f"the checkpoint of step {start}" if whole else "fresh parameters"
    console.say(f"from {begin}, {step - 1 - start} steps on to step {step}")

    scales = {row["step"]: row["lr_scale"] for row in read_rows(workdir / METRICS)}
    state = parallel.replicate(state, how)
    run = parallel.map_train_step(make_train_step(config, optimiser, data.normalisation), how=how)
    batches = input_pipeline.train_batches(data.training, config.batch_size, config.seed, start_step=start)
    for done in range(start, step):
        if done > start:
            state, metrics = run(state, parallel.split(next(batches), how))
            jax.block_until_ready((state, metrics))
        if done in scales:  # what the validation of that epoch made of the rate
            state = state._replace(lr_scale=parallel.replicate(np.float32(scales[done]), how))
    here = jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), state)
    found = diagnose(config, data.normalisation, here, next(batches)) | {"step": step}  # counted from 1, as in nonfinite.json
    checkpoints.close()
    for name, value in found["metrics"].items():
        console.say(f"  {name} {value:.6g}")
    for clip in found["clips"]:
        if clip["not_finite"]:
            console.say(f"  clip {clip['clip_id']}: not finite: {', '.join(clip['not_finite'])}")
    console.say(why(found))
    return found
