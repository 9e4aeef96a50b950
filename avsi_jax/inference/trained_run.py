"""Reads a trained run from its run directory: config, the parameters of one step, and normalisation.

Everything that uses a trained network reads it here. Orbax is imported only when a checkpoint is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from avsi_jax.training import run_directory as workdir_files

if TYPE_CHECKING:
    import ml_collections

    from avsi_jax.data.features import Normalisation


class Run(NamedTuple):
    """A trained network at one training step."""

    config: ml_collections.ConfigDict
    params: dict  # their exponential moving average where config.ema is on
    step: int
    normalisation: Normalisation  # mean and deviation by which levels and motion were standardised


def read(workdir: str | Path, which: str = "best") -> Run:
    """Reads a checkpoint of a run directory: 'best' by validation, 'last', or a step; CheckpointError names what is missing."""
    import jax
    import ml_collections

    from avsi_jax import configs
    from avsi_jax.models import build
    from avsi_jax.training.checkpoints import CheckpointError, Checkpoints

    path = Path(workdir) / workdir_files.CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"no {workdir_files.CONFIG} in {workdir}; expected a run directory (avsi-train --workdir=DIR) or a folder of weights"
        )
    # The LSTM implementation is not part of what was learned, and cuDNN is not available everywhere.
    config = ml_collections.ConfigDict(workdir_files.read_config(path.parent) | {"lstm": "auto"}).lock()
    if missing := sorted(set(configs.fields(configs.load("base"))) - set(configs.fields(config))):
        raise CheckpointError(f"{path} has no {missing[0]}: a run of an older version; expected one trained with this version")
    normalisation = workdir_files.read_normalisation(path.parent)
    if build.standardised(config) and not any(normalisation):
        needed = " and ".join(build.standardised(config))
        raise CheckpointError(f"no {workdir_files.STATISTICS} in {workdir}; expected the mean and deviation of its {needed}")
    checkpoints = Checkpoints(workdir, read_only=True)
    step = _step(checkpoints, which, workdir)
    name = "ema" if config.ema else "params"
    params = checkpoints.restore_params(step, jax.eval_shape(lambda: build.init_params(config)), name)
    checkpoints.close()
    return Run(config, params, step, normalisation)


def step_of(workdir: str | Path, which: str = "best") -> int:
    """The step that `which` refers to in a run directory now; CheckpointError where there is none."""
    from avsi_jax.training.checkpoints import Checkpoints

    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        return _step(checkpoints, which, workdir)
    finally:
        checkpoints.close()


def _step(checkpoints, which: str, workdir) -> int:
    from avsi_jax.training.checkpoints import CheckpointError

    steps = {"best": checkpoints.best_step(), "last": checkpoints.latest_step()}
    step = steps[which] if which in steps else _number(which)
    if step is None:
        raise CheckpointError(f"no checkpoint in {workdir} yet; train for at least one epoch")
    return step


def _number(which: str) -> int:
    from avsi_jax.training.checkpoints import CheckpointError

    if not str(which).isdigit():
        raise CheckpointError(f"which checkpoint: found {which!r}, expected best, last or a step")
    return int(which)
