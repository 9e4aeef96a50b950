"""Orbax, and nothing else of it anywhere: the last checkpoints and the best one of a run, saved asynchronously.

A checkpoint is the training state (parameters, optimiser, step) and a small JSON tree (position in the data, schedule, history).
Beside what Orbax writes lies a manifest of our own, the sha256 of every file: Orbax tells a whole checkpoint from a half-written
one, but not from one whose bytes were changed since. It is written before Orbax commits, so a committed checkpoint has one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from avsi_jax.runtime import devices, storage
from avsi_jax.training import checksums

FOLDER = "checkpoints"
DAMAGED = "damaged"
REPLACED = "replaced"  # in the workdir: a checkpoint whose step is being saved anew
LATE_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")  # what Orbax writes or changes while it commits
METRIC = "monitor"  # lower is better: the value of the run's config.monitor, which decides what 'best' means
ROOM = 1.2  # times a state's bytes are to be free before it is saved: Orbax compresses, but little


class CheckpointError(ValueError):
    """No checkpoint where one is needed, one that does not fit, is damaged or could not be written."""


class Checkpoints:
    """The checkpoints of one workdir. `keep` last ones stay, and the best by METRIC. Of several processes each makes one."""

    def __init__(self, workdir, *, keep: int = 2, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells every step of every save; what it raises is told here
        self.folder = _folder(workdir)
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
            # Folders made at once: one that can't be made is told here, not after minutes of waiting for it.
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._write_manifest, create_directories_asynchronously=False
            ),
        )
        self._closed = False
        self._saving: tuple[int, int] | None = None  # step and bytes of the save on its way
        with _said(self.folder, "could not be opened"):
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any, host: dict, monitor: float | None = None, anew: bool = False) -> None:
        """Starts saving and returns; an earlier save that failed raises here. `monitor`: lower is better; None: not validated.

        anew: in place of the checkpoint that this step has. CheckpointError names the path and the bytes where there is no room or
        the folder can't be written; what was saved before stays.
        """
        self.wait()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        self._check_room(step, size)
        if anew:
            self._set_aside(step)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
        metrics = None if monitor is None else {METRIC: float(monitor)}
        self._saving = step, size
        with self._said():
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def is_saving(self) -> bool:
        return self._saving is not None and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Until everything saved is on disk; CheckpointError where that failed."""
        with self._said():
            self._manager.wait_until_finished()
        self._seal()

    def close(self) -> None:
        """Waits, and leaves; a second time without effect."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        except CheckpointError:
            with contextlib.suppress(Exception):  # what failed may fail again as Orbax leaves: what was said first stands
                self._manager.close()
            raise
        self._manager.close()

    def _set_aside(self, step: int) -> None:
        """Makes place to save a step anew. What was there goes once that is done; where it never is, a restart takes it back."""
        if jax.process_index() == 0:
            (self.folder.parent / REPLACED).mkdir(parents=True, exist_ok=True)
            (self.folder / str(step)).rename(self.folder.parent / REPLACED / str(step))
        devices.barrier(f"checkpoint {step} is set aside")
        self._manager.reload()

    def all_steps(self) -> list[int]:
        """By what lies there: Orbax no longer counts what it will delete once the save on its way has ended well."""
        return _steps(self.folder)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        return self._manager.best_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict]:
        """(state, host) of that step, arrays as numpy, on whatever processes and devices there are now.

        `like` gives the tree, shapes and types, as arrays or jax.ShapeDtypeStruct.
        """
        expected = "expected the config the run was started with, or a new --workdir"
        state = self._read(step, like, f"does not fit this configuration ({{}}); {expected}")
        with _said(self.folder, f"checkpoint {step} could not be read"):
            host = self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]
        return state, host

    def restore_params(self, step: int, like: Any, name: str = "params") -> Any:
        """The parameters alone ('ema': their averages), as numpy arrays; `like` gives tree, shapes and types."""
        folder = self.folder / str(step) / "state"
        if not folder.is_dir():
            raise CheckpointError(f"no checkpoint {step} in {self.folder}; there are {self.all_steps()}")
        if fault := find_fault(self.folder / str(step)):
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} is damaged ({fault}); expected the bytes that were saved: take a copy of it, "
                f"or another one of {self.all_steps()}"
            )
        return self._read(step, {name: like}, "does not fit its config.json ({})")[name]

    def _read(self, step: int, like: Any, says: str) -> Any:
        """What of the stored state `like` names, as numpy; `says`: of a state that doesn't fit, with a place for why."""
        folder = self.folder / str(step) / "state"
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), like)
        try:
            with ocp.PyTreeCheckpointer() as reader:
                stored = reader.metadata(folder).item_metadata.tree
                _check_shapes({k: v for k, v in stored.items() if k in like} if isinstance(like, dict) else stored, like)
                restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
                args = ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=True)
                return reader.restore(folder, args=args)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(f"checkpoint {step} in {self.folder} {says.format(_first_line(error))}") from error

    # ---- what is written beside Orbax' files

    def _write_manifest(self) -> None:
        """Called by Orbax when all is written and nothing committed yet, on the process that commits."""
        step, _ = self._saving
        in_bucket = storage.in_bucket(self.folder)  # there Orbax writes under the final name, and a marker at the end
        for folder in [self.folder / str(step)] if in_bucket else self.folder.glob(f"{step}.*tmp*"):
            checksums.write(folder, besides=LATE_FILES)

    def _seal(self) -> None:
        """The hashes of what Orbax wrote while it committed, once it has."""
        if self._saving is None:
            return
        folder, self._saving = self.folder / str(self._saving[0]), None
        if jax.process_index() == 0:
            checksums.seal(folder, LATE_FILES)
            take_back(self.folder.parent)

    def _check_room(self, step: int, size: int) -> None:
        if storage.in_bucket(self.folder):
            return
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {_first_line(error)}; expected a folder that can be written") from error
        if free < (need := int(size * ROOM)):
            raise CheckpointError(
                f"no room for checkpoint {step} in {self.folder}: {free} bytes free, expected {need}; free some, "
                f"the same command goes on from an earlier one {self.all_steps()}"
            )

    def _said(self):
        step, size = self._saving or (None, 0)
        what = "could not be written" if step is None else f"checkpoint {step} of {size} bytes could not be written"
        return _said(self.folder, what, lambda: f"; the checkpoints {self.all_steps()} are kept")


def _folder(workdir) -> epath.Path:
    return storage.folder(workdir) / FOLDER


def _steps(folder) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and _is_committed(p))


def _is_committed(folder) -> bool:
    """A folder with a step's name is whole on a disk, where Orbax renames it at the end; in a bucket it has a marker then."""
    return folder.is_dir() and (not storage.in_bucket(folder) or (folder / LATE_FILES[1]).exists())


class _said:
    """Turns what Orbax raises in the block into a CheckpointError of one line that names the folder."""

    def __init__(self, folder, what: str, more=lambda: ""):
        self.folder, self.what, self.more = folder, what, more

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, _) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            return  # another process is gone
        if isinstance(error, (OSError, ValueError, RuntimeError)) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{self.folder}: {self.what} ({_first_line(error)}){self.more()}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _check_shapes(stored: Any, like: Any) -> None:
    """ValueError where a stored tree has other leaves; Orbax would fill what is missing with whatever lies in memory."""

    def name(path) -> str:
        """The same for a NamedTuple as for the dict that Orbax keeps of it."""
        return "".join(f"[{getattr(k, 'key', getattr(k, 'idx', getattr(k, 'name', None)))}]" for k in path)

    found, wanted = (
        {name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (stored, like)
    )
    for leaf in sorted(found.keys() | wanted.keys()):
        if found.get(leaf) != wanted.get(leaf):
            raise ValueError(f"{leaf} has shape {found.get(leaf)}, expected {wanted.get(leaf)}")


# ---- whole or damaged ----------------------------------------------------------------------------------------------------------


def find_fault(folder) -> str | None:
    """What is wrong with the files of one checkpoint; None where all are as they were written.

    One without a manifest is of a version before there were any, and taken as it is.
    """
    if (fault := checksums.find_fault(folder)) is None and not checksums.is_sealed(folder):
        try:  # nobody lived to seal it: what Orbax wrote last must at least be whole
            json.loads((folder / LATE_FILES[0]).read_text())
        except (OSError, ValueError) as error:
            return f"{LATE_FILES[0]} can't be read: {_first_line(error)}"
    return fault


def take_back(workdir) -> None:
    """Puts a checkpoint back that was to be replaced and never was; removes it where it was."""
    aside = storage.folder(workdir) / REPLACED
    for old in aside.iterdir() if aside.is_dir() else ():
        new = _folder(workdir) / old.name
        if _is_committed(new):
            old.rmtree()
        else:
            old.rename(new)
    if aside.is_dir():
        aside.rmdir()


def set_damaged_aside(workdir) -> list[str]:
    """Moves checkpoints that are newer than the newest whole one, and damaged, into the workdir's damaged/; says of each why.
    What killed saves left half written is removed.

    Before anything else opens them, and by one process. CheckpointError where none is whole: then nothing is moved.
    """
    take_back(workdir)
    folder = _folder(workdir)
    steps, faults = _steps(folder), {}
    for step in reversed(steps):
        if (fault := find_fault(folder / str(step))) is None:
            break
        faults[step] = fault
    if faults and len(faults) == len(steps):
        raise CheckpointError(
            f"no whole checkpoint in {folder}: {'; '.join(f'{k}: {v}' for k, v in faults.items())}; "
            "expected a copy of one of them, or another --workdir"
        )
    for half in folder.glob("*.orbax-checkpoint-tmp*") if folder.is_dir() else ():
        half.rmtree()
    for step in faults:
        target = folder.parent / DAMAGED
        target.mkdir(parents=True, exist_ok=True)
        name = next(n for n in (f"{step}{'-' * bool(i)}{i or ''}" for i in range(10_000)) if not (target / n).exists())
        (folder / str(step)).rename(target / name)
    left = [step for step in steps if step not in faults]
    moved = f"moved to {folder.parent / DAMAGED}, going on from {left[-1] if left else None}"
    return [f"checkpoint {step} is damaged ({fault}); {moved}" for step, fault in faults.items()]
