"""Orbax, and nothing else of it anywhere: the last checkpoints and the best one of a run, saved asynchronously.

A checkpoint is the training state (parameters, optimiser, step) and a small JSON tree (position in the data, schedule, history).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

FOLDER = "checkpoints"
METRIC = "monitor"  # lower is better: the value of the run's config.monitor, which decides what 'best' means


class CheckpointError(ValueError):
    """No checkpoint where one is needed, or one that does not fit."""


class Checkpoints:
    """The checkpoints of one workdir. `keep` last ones stay, and the best by METRIC."""

    def __init__(self, workdir: str | Path, *, keep: int = 2, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every step of every save otherwise
        self.folder = Path(workdir).absolute() / FOLDER
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"no {FOLDER}/ in {workdir}; expected the workdir of a training (avsi-train --workdir=DIR)")
        best = preservation_policy.BestN(
            get_metric_fn=lambda m: m[METRIC], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        policy = preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(keep), best])
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda m: m[METRIC],
            best_mode="min",
            preservation_policy=policy,
            read_only=read_only,
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any, host: dict, monitor: float) -> None:
        """Starts saving and returns; an earlier save that failed raises here. `monitor`: lower is better."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
        self._manager.save(step, args=args, metrics={METRIC: float(monitor)})

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        return self._manager.best_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict]:
        """(state, host) of that step; `like` gives the tree, shapes and types, as arrays or jax.ShapeDtypeStruct."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} does not fit this configuration ({str(error).splitlines()[0][:160]}); "
                "expected the config the run was started with, or a new --workdir"
            ) from error
        return restored["state"], restored["host"]

    def restore_params(self, step: int, like: Any) -> Any:
        """The parameters alone, as numpy arrays, on whatever devices and jax there are now; `like` gives tree, shapes and types."""
        folder = self.folder / str(step) / "state"
        if not folder.is_dir():
            raise CheckpointError(f"no checkpoint {step} in {self.folder}; there are {sorted(self._manager.all_steps())}")
        abstract = {"params": jax.tree.map(lambda a: np.empty(a.shape, a.dtype), like)}
        with ocp.PyTreeCheckpointer() as reader:
            self._check_shapes(step, reader.metadata(folder).item_metadata.tree["params"], like)
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
            args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=True)
            try:
                params = reader.restore(folder, args=args)["params"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"checkpoint {step} in {self.folder} does not fit its config.json: {str(error).splitlines()[0][:160]}"
                ) from error
        return params

    def _check_shapes(self, step: int, stored: Any, like: Any) -> None:
        """CheckpointError where a stored tree has other leaves; Orbax would fill what is missing with whatever lies in memory."""
        found, wanted = (
            {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (stored, like)
        )
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"checkpoint {step} in {self.folder} does not fit its config.json: "
                    f"{name} has shape {found.get(name)}, expected {wanted.get(name)}"
                )

    def wait(self) -> None:
        """Until everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
