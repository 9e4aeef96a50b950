"""Checkpoints of a run: the newest ones and the best one, saved asynchronously. The only module that uses Orbax.

A checkpoint holds the training state (parameters, optimiser, step) and a small JSON tree (position in the data, schedule, metrics
so far). Orbax can tell a complete checkpoint from a half-written one, but not whether bytes have changed since. So a manifest with
the sha256 of every file is added (`checksums`), before Orbax commits: every committed checkpoint has one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
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
REPLACED = "replaced"  # folder in the workdir for a checkpoint that is being saved again at the same step
LATE_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")  # written or changed by Orbax while it commits
METRIC = "monitor"  # value of config.monitor, lower is better: it decides which checkpoint is the best
MIN_FREE_SPACE = 1.2  # free bytes needed to save, as a multiple of the bytes of the state: Orbax compresses little


class _WithoutOrbax(logging.Filter):
    """Drops the records of Orbax, which logs every step of its work; its exceptions are reported here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax logs nothing in the block; the caller's own logging stays as it is."""
    logger, without_orbax = logging.getLogger("absl"), _WithoutOrbax()
    logger.addFilter(without_orbax)
    try:
        yield
    finally:
        logger.removeFilter(without_orbax)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, does not match the configuration, or could not be written.

    inference/trained_run.py also raises it, for a run without a checkpoint.
    """


class Checkpoints:
    """The checkpoints of one workdir: the `keep` newest ones and the best one by METRIC are kept.

    Each of several processes creates an instance.
    """

    def __init__(self, workdir: epath.PathLike, *, keep: int = 2, read_only: bool = False):
        self.folder = _folder(workdir)
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"no {FOLDER}/ in {workdir}; expected the workdir of a training (avsi-train --workdir=DIR)")
        best = preservation_policy.BestN(
            get_metric_fn=lambda m: m[METRIC], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        policy = preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(keep), best])
        self._closed = False
        self._saving: tuple[int, int] | None = None  # training step and bytes of the save in progress
        with _checkpoint_errors(self.folder, "could not be opened"):
            options = ocp.CheckpointManagerOptions(
                best_fn=lambda m: m[METRIC],
                best_mode="min",
                preservation_policy=policy,
                read_only=read_only,
                create=not read_only,
                # Created synchronously, so that a failure is reported here and not after minutes of waiting for the folder.
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._write_manifest, create_directories_asynchronously=False
                ),
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any, host: dict, monitor: float | None = None, replace: bool = False) -> None:
        """Starts saving and returns; raises the error of an earlier save that failed.

        host: a JSON tree. monitor: metric of the validation, lower is better; None if the state was not validated.
        replace: replaces the existing checkpoint of this step. CheckpointError names path and bytes if the disk is full or the
        folder is not writable; earlier checkpoints are kept.
        """
        self.wait()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        self._check_free_space(step, size)
        if replace:
            self._set_aside(step)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
        metrics = None if monitor is None else {METRIC: float(monitor)}
        self._saving = step, size
        with self._save_errors():
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def is_saving(self) -> bool:
        """Whether a save is in progress."""
        return self._saving is not None and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Waits until the save in progress is on disk; CheckpointError if it failed."""
        with self._save_errors():
            self._manager.wait_until_finished()
        self._seal()

    def close(self) -> None:
        """Waits for the save in progress and closes Orbax; does nothing when called again."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        except CheckpointError:
            with contextlib.suppress(Exception):  # a failed save may make Orbax fail again as it closes: raise the first error
                self._manager.close()
            raise
        self._manager.close()

    def _set_aside(self, step: int) -> None:
        """Moves a checkpoint to REPLACED, so that its step can be saved again.

        It is deleted once the new one is saved; if that never happens, the next start puts it back (`recover_replaced`).
        """
        if jax.process_index() == 0:
            (self.folder.parent / REPLACED).mkdir(parents=True, exist_ok=True)
            (self.folder / str(step)).rename(self.folder.parent / REPLACED / str(step))
        devices.barrier(f"checkpoint {step} is set aside")
        self._manager.reload()

    def all_steps(self) -> list[int]:
        """Training steps of the checkpoints on disk, including those that Orbax will delete after the save in progress."""
        return _steps(self.folder)

    def latest_step(self) -> int | None:
        """Training step of the newest checkpoint; None without any."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Training step of the best checkpoint by METRIC; None without any."""
        return self._manager.best_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict]:
        """(state, host) of a training step, with NumPy arrays, independent of the number of processes and devices that saved it.

        like: tree of arrays or jax.ShapeDtypeStruct with the expected structure, shapes and types; CheckpointError if they differ.
        """
        expected = "expected the config that the run was started with, or a new --workdir"
        state = self._read(step, like, f"does not match this configuration ({{}}); {expected}")
        with _checkpoint_errors(self.folder, f"checkpoint {step} could not be read"):
            host = self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]
        return state, host

    def restore_params(self, step: int, like: Any, name: str = "params") -> Any:
        """Only the parameters (name 'ema': their moving average), as NumPy arrays; `like` as in `restore`."""
        folder = self.folder / str(step) / "state"
        if not folder.is_dir():
            raise CheckpointError(f"no checkpoint {step} in {self.folder}; there are {self.all_steps()}")
        if fault := find_fault(self.folder / str(step)):
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} is damaged ({fault}); expected the bytes that were saved: use a copy of it, "
                f"or another checkpoint of {self.all_steps()}"
            )
        return self._read(step, {name: like}, "does not match its config.json ({})")[name]

    def _read(self, step: int, like: Any, mismatch: str) -> Any:
        """The part of the stored state with the structure of `like`; `mismatch`: format of the error message, with one field."""
        folder = self.folder / str(step) / "state"
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), like)
        try:
            with _quiet_orbax(), ocp.PyTreeCheckpointer() as reader:
                stored = reader.metadata(folder).item_metadata.tree
                _check_shapes({k: v for k, v in stored.items() if k in like} if isinstance(like, dict) else stored, like)
                restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
                args = ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=True)
                return reader.restore(folder, args=args)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(f"checkpoint {step} in {self.folder} {mismatch.format(_first_line(error))}") from error

    # ---- files written in addition to those of Orbax

    def _write_manifest(self) -> None:
        """Called by Orbax on the committing process when all files are written and before the commit."""
        step, _ = self._saving
        in_bucket = storage.in_bucket(self.folder)  # there Orbax writes under the final name, with a marker at the end
        for folder in [self.folder / str(step)] if in_bucket else self.folder.glob(f"{step}.*tmp*"):
            checksums.write(folder, excluded=LATE_FILES)

    def _seal(self) -> None:
        """Adds the hashes of the files that Orbax wrote while it committed."""
        if self._saving is None:
            return
        folder, self._saving = self.folder / str(self._saving[0]), None
        if jax.process_index() == 0:
            checksums.seal(folder, LATE_FILES)
            recover_replaced(self.folder.parent)

    def _check_free_space(self, step: int, size: int) -> None:
        """CheckpointError if the disk has too little free space for a state of `size` bytes."""
        if storage.in_bucket(self.folder):
            return
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {_first_line(error)}; expected a writable folder") from error
        if free < (needed := int(size * MIN_FREE_SPACE)):
            raise CheckpointError(
                f"not enough disk space for checkpoint {step} in {self.folder}: {free} bytes free, expected {needed}; free some "
                f"space and run the same command to continue from the newest checkpoint of {self.all_steps()}"
            )

    def _save_errors(self) -> _checkpoint_errors:
        """Context in which errors of Orbax are reported as those of the save in progress."""
        step, size = self._saving or (None, 0)
        what = "could not be written" if step is None else f"checkpoint {step} of {size} bytes could not be written"
        return _checkpoint_errors(self.folder, what, lambda: f"; the checkpoints {self.all_steps()} are kept")


def _folder(workdir: epath.PathLike) -> epath.Path:
    return storage.as_path(workdir) / FOLDER


def _steps(folder: epath.Path) -> list[int]:
    """Training steps of the committed checkpoints in a folder, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and _is_committed(p))


def _is_committed(folder: epath.Path) -> bool:
    """Whether a checkpoint folder is complete: on disk Orbax renames it at the end, in a bucket it adds a marker file."""
    return folder.is_dir() and (not storage.in_bucket(folder) or (folder / LATE_FILES[1]).exists())


class _checkpoint_errors:
    """Context manager that turns exceptions of Orbax into a CheckpointError of one line that names the folder."""

    def __init__(self, folder: epath.Path, what: str, suffix: Callable[[], str] = lambda: ""):
        self.folder, self.what, self.suffix = folder, what, suffix

    def __enter__(self) -> None:
        self.quiet = _quiet_orbax()
        self.quiet.__enter__()

    def __exit__(self, kind, error, _) -> None:
        self.quiet.__exit__(None, None, None)
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            return  # another process has ended
        if isinstance(error, (OSError, ValueError, RuntimeError)) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{self.folder}: {self.what} ({_first_line(error)}){self.suffix()}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _check_shapes(stored: Any, like: Any) -> None:
    """ValueError if a stored tree has other leaves or shapes; Orbax would leave missing leaves uninitialised."""

    def name(path) -> str:
        """The same name for a field of a NamedTuple as for the key of the dict in which Orbax stores it."""
        return "".join(f"[{getattr(k, 'key', getattr(k, 'idx', getattr(k, 'name', None)))}]" for k in path)

    found, expected = (
        {name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (stored, like)
    )
    for leaf in sorted(found.keys() | expected.keys()):
        if found.get(leaf) != expected.get(leaf):
            raise ValueError(f"{leaf} has shape {found.get(leaf)}, expected {expected.get(leaf)}")


# ---- damaged checkpoints -------------------------------------------------------------------------------------------------------


def find_fault(folder: epath.PathLike) -> str | None:
    """What is wrong with the files of a checkpoint; None if all are as they were written.

    A checkpoint without a manifest was written by an older version and is accepted as it is.
    """
    folder = epath.Path(folder)
    if (fault := checksums.find_fault(folder)) is None and not checksums.is_sealed(folder):
        try:  # the process ended before it was sealed: at least the file that Orbax wrote last must be readable
            json.loads((folder / LATE_FILES[0]).read_text())
        except (OSError, ValueError) as error:
            return f"{LATE_FILES[0]} can't be read: {_first_line(error)}"
    return fault


def recover_replaced(workdir: epath.PathLike) -> None:
    """Puts back a checkpoint that was set aside and never replaced; deletes it if it was replaced."""
    aside = storage.as_path(workdir) / REPLACED
    for old in aside.iterdir() if aside.is_dir() else ():
        new = _folder(workdir) / old.name
        if _is_committed(new):
            old.rmtree()
        else:
            old.rename(new)
    if aside.is_dir():
        aside.rmdir()


def set_damaged_aside(workdir: epath.PathLike) -> list[str]:
    """Moves damaged checkpoints that are newer than the newest valid one to the workdir's damaged/; returns a message for each.

    Also removes half-written checkpoints of killed saves. To be called by one process, before the checkpoints are opened.
    CheckpointError if no checkpoint is valid; then nothing is moved.
    """
    recover_replaced(workdir)
    folder = _folder(workdir)
    steps, faults = _steps(folder), {}
    for step in reversed(steps):
        if (fault := find_fault(folder / str(step))) is None:
            break
        faults[step] = fault
    if faults and len(faults) == len(steps):
        raise CheckpointError(
            f"no valid checkpoint in {folder}: {'; '.join(f'{k}: {v}' for k, v in faults.items())}; "
            "expected a copy of one of them, or another --workdir"
        )
    for incomplete in folder.glob("*.orbax-checkpoint-tmp*") if folder.is_dir() else ():
        incomplete.rmtree()
    for step in faults:
        target = folder.parent / DAMAGED
        target.mkdir(parents=True, exist_ok=True)
        name = next(n for n in (f"{step}{'-' * bool(i)}{i or ''}" for i in range(10_000)) if not (target / n).exists())
        (folder / str(step)).rename(target / name)
    valid = [step for step in steps if step not in faults]
    moved = f"moved to {folder.parent / DAMAGED}, resuming from {valid[-1] if valid else None}"
    return [f"checkpoint {step} is damaged ({fault}); {moved}" for step, fault in faults.items()]
