"""Set-up -> loop of a training. Everything a run needs to be understood or gone on with lies in its workdir:

config.json, run.json (versions, devices, data), metrics.csv (identical after a resume), timing.csv (speed, goodput), status.json
(what it is doing now), train.log, tensorboard/, pictures/, checkpoints/, and statistics.json where something is standardised.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from typing import Any, NamedTuple

import numpy as np

from avsi_jax.data import local_copy
from avsi_jax.models.build import read_normalisation
from avsi_jax.runtime import storage
from avsi_jax.runtime.goodput import CHECKPOINT, COMPILE, DATA, RESTORE, START, STEP, VALIDATION, PhaseTimer, read_status
from avsi_jax.runtime.signals import Stopped
from avsi_jax.runtime.watchdog import STATUS, Watchdog, check_alone
from avsi_jax.training.objective import learning_rate, make_optimiser
from avsi_jax.training.progress_log import Console
from avsi_jax.training.run_directory import METRICS, TIMING, add_row, check_config, cut_rows, read_rows, timing, write_run
from avsi_jax.training.summaries import Summaries
from avsi_jax.training.train_step import (
    Means,
    NonFinite,
    check_accumulation,
    init_state,
    make_train_step,
    make_validation_step,
    reading_errors,
)

NONFINITE = "nonfinite.json"
LEAST = dict.fromkeys(("batch_size", "epochs", "validate_every", "checkpoint_every", "keep"), 1) | dict.fromkeys(
    ("watchdog_s", "checkpoint_seconds", "images_every", "early_stop_patience"), 0
)


# ---- set-up --------------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What is trained and validated on: Records, the steps of an epoch, what is standardised by, and what run.json keeps of it."""

    training: Any
    validation: Any
    steps_per_epoch: int
    normalisation: Any
    described: dict


def open_data(config, cache_dir: str = "") -> Data:
    """The dataset of a config, copied to `cache_dir` first where that is given; ValueError for what cannot be trained."""
    import jax

    from avsi_jax.data import input_pipeline
    from avsi_jax.models import systems
    from avsi_jax.runtime import devices

    for name, least in LEAST.items():
        if config[name] < least:
            raise ValueError(f"config.{name}: found {config[name]}, expected {least} or more")
    devices.check_batch(config.batch_size)
    check_accumulation(config, jax.device_count())
    if config.monitor not in ("val_loss", "val_gap_l1_db"):
        raise ValueError(f"config.monitor: found {config.monitor!r}, expected val_loss or val_gap_l1_db")
    if config.monitor != "val_loss" and not systems.get(config.system).restores:
        raise ValueError(f"config.monitor: found {config.monitor!r}, expected val_loss: {config.system} restores no gap")
    if not config.data_dir:
        raise ValueError("no --config.data_dir given; expected the folder that avsi-prepare --data_dir=DIR wrote")
    dataset = input_pipeline.find_dataset(config.data_dir, config.builder_config)
    if cache_dir:
        dataset = local_copy.local_copy(dataset, cache_dir, splits=(config.train_split, config.validation_split))
    training = input_pipeline.Records(dataset, config.train_split, mouth=False)
    validation = input_pipeline.Records(dataset, config.validation_split, mouth=False)
    if len(training) < config.batch_size:
        raise ValueError(f"{config.train_split} holds {len(training)} clips, fewer than config.batch_size={config.batch_size}")
    splits = {config.train_split: training, config.validation_split: validation}
    described = {
        "builder_config": config.builder_config,
        "version": dataset.name,
        "clips": {split: len(records) for split, records in splits.items()},
        "fingerprint": {split: records.fingerprint() for split, records in splits.items()},
    }
    steps_per_epoch = len(training) // config.batch_size
    return Data(training, validation, steps_per_epoch, read_normalisation(config, dataset), described)


class Progress:
    """What decides about rate and end: best loss, epochs without gain, the learning rate's factor. Saved with every checkpoint."""

    def __init__(self, config):
        self.config = config
        self.best, self.best_epoch, self.since_gain, self.since_drop, self.lr_scale = float("inf"), 0, 0, 0, 1.0

    def update(self, epoch: int, loss: float) -> bool:
        """Takes one validation; true where early stop says to end (Keras' ReduceLROnPlateau and EarlyStopping)."""
        if loss < self.best - self.config.min_delta:
            self.best, self.best_epoch, self.since_gain, self.since_drop = loss, epoch, 0, 0
        else:
            self.since_gain += 1
            self.since_drop += 1
        if self.config.schedule == "plateau" and self.since_drop >= self.config.plateau_patience:
            self.lr_scale *= self.config.plateau_factor
            self.since_drop = 0
        return self.is_over()

    def is_over(self) -> bool:
        """Whether early stop says to end; asked again on a resume, where its patience may have changed."""
        return bool(self.config.early_stop_patience) and self.since_gain >= self.config.early_stop_patience

    def save(self) -> dict:
        return {k: v for k, v in vars(self).items() if k != "config"} | {"best": min(self.best, 1e30)}

    def load(self, saved: dict) -> None:
        vars(self).update({k: saved[k] for k in self.save()})


def first_refuses(look, rank: int):
    """What look() returns, on the first of all processes; where it raises there, all do, and none is left waiting."""
    from avsi_jax.runtime import devices

    found = fault = None
    if rank == 0:
        try:
            found = look()
        except (ValueError, OSError) as error:
            fault = error
    if devices.agree([float(fault is not None)])[0]:
        raise fault or ValueError("process 0 refused to go on; its message says why")
    return found


class StopRequests:
    """What any process was asked to do, agreed on by all before the same step: to stop (a signal), to save (the first one's clock).

    On an accelerator an answer is read a few steps late, so that its queue never runs empty.
    """

    LATE = 2

    def __init__(self, stop_signals, seconds: float, rank: int, count: int):
        from avsi_jax.runtime import devices

        self._stopping, self._seconds, self._rank, self._count = stop_signals, seconds, rank, count
        self._agree = devices.agree
        self._saved, self._pending = time.monotonic(), []
        self._late = 0 if devices.devices_share_cores() else self.LATE
        self._old = 0  # answers on their way that were asked for before the last save

    def saved(self) -> None:
        self._saved, self._old = time.monotonic(), len(self._pending)

    def now(self) -> tuple[int, bool]:
        """(the signal to stop for or 0, whether to save); to be called by all processes alike."""
        due = self._rank == 0 and self._seconds > 0 and time.monotonic() - self._saved >= self._seconds
        told = self._stopping.asked if self._stopping else 0
        flags = [told == signal.SIGTERM, told == signal.SIGINT, due]
        if self._count > 1:
            self._pending.append(self._agree(flags, wait=False))
            flags = np.asarray(self._pending.pop(0)) if len(self._pending) > self._late else [0, 0, 0]
            if self._old:
                self._old, flags = self._old - 1, [*flags[:2], 0]
        term, interrupt, save = (bool(flag) for flag in np.asarray(flags))
        return signal.SIGTERM * term or signal.SIGINT * interrupt, save


# ---- loop ----------------------------------------------------------------------------------------------------------------------


def train(
    config, workdir, *, how: str = "pmap", cache_dir: str = "", stop_signals=None, console=None, phases=None
) -> dict[str, float]:
    """Trains until config.epochs or early stop, resuming from the workdir's newest whole checkpoint; returns the last metrics.

    how: 'pmap' or 'shard_map' (config.debug_nans: neither).
    stopping: the Stopping that is told of signals; then Stopped ends the training once all is saved.
    """
    with contextlib.ExitStack() as at_end:  # whatever ends the run: what is being saved is saved
        return _train(config, workdir, how, cache_dir, stop_signals, console, phases, at_end)


def _train(config, workdir, how, cache_dir, stop_signals, console, phases, at_end: contextlib.ExitStack) -> dict[str, float]:
    from avsi_jax.runtime import devices

    devices.use_every_core(config.batch_size)
    import jax

    from avsi_jax.data import input_pipeline
    from avsi_jax.models import systems
    from avsi_jax.training.checkpoints import Checkpoints, set_damaged_aside

    # 1. What was asked for, refused before any work where it cannot be.
    workdir, rank, count = storage.folder(workdir), jax.process_index(), jax.process_count()
    how = devices.UNMAPPED if config.debug_nans else how
    console, phases = console or Console(rank), phases or PhaseTimer()
    data = open_data(config, cache_dir)
    steps_per_epoch, normalisation = data.steps_per_epoch, data.normalisation
    optimiser = make_optimiser(config, steps_per_epoch)
    state = init_state(config, steps_per_epoch)
    before = read_status((workdir / STATUS).read_text() if (workdir / STATUS).exists() else None)
    first_refuses(lambda: check_alone(workdir, before), rank)
    check_config(config, workdir, normalisation, data.described, write=rank == 0)
    console.keep_in(workdir)
    console.say(f"{config.system}: {len(data.training)} clips to train on, {len(data.validation)} to validate, {steps_per_epoch} "
                f"steps an epoch of {config.batch_size}, {jax.device_count()} x {jax.devices()[0].device_kind}")  # fmt: skip

    # 2. State: fresh, then over it the newest whole checkpoint; on all devices only once it is what training starts with.
    phases.enter(RESTORE)
    at_end.callback(Watchdog(workdir, phases, config.watchdog_s, console.warn, rank=rank, count=count).start().stop)
    for warning in first_refuses(lambda: set_damaged_aside(workdir), rank) or ():
        console.say(f"warning: {warning}")
    checkpoints, progress, means = Checkpoints(workdir, keep=config.keep), Progress(config), Means()
    at_end.callback(checkpoints.close)
    step, first, stop, saved, host = 0, 0, False, None, {}
    if (newest := checkpoints.latest_step()) is not None:
        state, host = checkpoints.restore(newest, state)
        step, first, saved = newest, host.get("epoch", newest // steps_per_epoch), newest
        progress.load(host["progress"])
        means.load(host.get("means", {}))
        stop = progress.is_over()
        console.say(f"resumed at step {step}, epoch {step // steps_per_epoch}")
    phases.go_on(host.get("seconds", {}), before)
    phases.step = step
    if rank == 0:
        for table in (METRICS, TIMING):  # of an epoch that was saved before its validation the row is written again
            cut_rows(workdir / table, first * steps_per_epoch)
        described = {"devices": [str(d.device_kind) for d in jax.devices()], "dataset": data.described, "parallel": how}
        write_run(workdir, parameters=systems.count_parameters(state.params), processes=count, **described)
    state = devices.replicate(state, how)

    # 3. Steps.
    phases.enter(START)
    train_step = devices.map_train_step(make_train_step(config, optimiser, normalisation), how=how)
    validation_step = devices.map_evaluation_step(make_validation_step(config, normalisation), how=how, per_clip=True)
    share = {"process_index": rank, "process_count": count}
    batches = input_pipeline.train_batches(data.training, config.batch_size, config.seed, start_step=step, **share)
    asked, rate = StopRequests(stop_signals, config.checkpoint_seconds, rank, count), learning_rate(config, steps_per_epoch)
    look = Summaries(config, workdir, data.validation, normalisation, step, console.warn) if rank == 0 else None
    if look:
        at_end.callback(look.close)

    def save(epoch: int, monitor: float | None = None) -> None:
        """epoch: the one that is being trained; monitor: of the validation that was just done."""
        nonlocal saved
        with phases.during(CHECKPOINT):
            host = {"progress": progress.save(), "epoch": epoch, "means": means.save(), "seconds": phases.seconds()}
            check_parameters(state.params, step)
            if monitor is not None or step != saved:  # saved already: as it was before its validation
                checkpoints.save(step, devices.to_global(state), host, monitor, anew=step == saved)
            saved = step
            asked.saved()

    def leave(signum: int) -> None:
        with phases.during(CHECKPOINT):
            checkpoints.wait()
        raise Stopped(signum, step)

    def validate() -> dict[str, float]:
        found, read = Means(), {}
        phases.enter(VALIDATION)
        for batch in input_pipeline.eval_batches(data.validation, config.batch_size, **share):
            sums, clips = validation_step(state.averaged, devices.split(batch, how))
            found.add(jax.device_get(sums))
            for name, pair in reading_errors(config, batch, clips).items():
                read[name] = tuple(np.add(read.get(name, (0.0, 0.0)), pair))
            if signum := asked.now()[0]:
                save(epoch)
                leave(signum)
            phases.enter(VALIDATION)
        if read:
            found.add({name: devices.sum_over_processes(pair) for name, pair in read.items()})
        return found.result(config, "val")

    # 4. Epochs. Where CPU devices share cores one step is in flight, no more (see devices.devices_share_cores).
    row = (read_rows(workdir / METRICS) or [{}])[-1] if look else {}
    compiled, began = False, time.monotonic()
    try:
        for epoch in range(first, config.epochs):
            if stop:
                break
            waited, epoch_began, steps_begun = 0.0, time.monotonic(), step
            while step < (epoch + 1) * steps_per_epoch:
                phases.enter(DATA)
                since = time.monotonic()
                batch = devices.split(next(batches), how)
                waited += time.monotonic() - since
                phases.enter(STEP if compiled else COMPILE)
                state, metrics = train_step(state, batch)
                if devices.devices_share_cores() or not compiled:
                    jax.block_until_ready((state, metrics))
                compiled, step = True, step + 1
                phases.step = step
                phases.enter(STEP)
                if stop_signals:
                    stop_signals.there_is_work()
                means.add(metrics, step)
                speed = (step - steps_begun) / (time.monotonic() - epoch_began)
                console.tick(epoch + 1, step - epoch * steps_per_epoch, steps_per_epoch, speed)
                signum, due = asked.now()
                if signum or (due and step < (epoch + 1) * steps_per_epoch):
                    save(epoch)
                if signum:
                    leave(signum)
                if look:
                    look.image(step, state.averaged)
            row = {"step": step, "epoch": epoch + 1} | means.result(config, "train")
            train_seconds = time.monotonic() - epoch_began
            last = epoch + 1 == config.epochs
            if last or (epoch + 1) % config.validate_every == 0:
                row |= validate()
                stop = progress.update(epoch + 1, row[config.monitor])
                row |= {"lr": rate(step - 1) * float(state.lr_scale), "lr_scale": progress.lr_scale}
                state = state._replace(lr_scale=devices.replicate(np.float32(progress.lr_scale), how))
                if look:
                    add_row(workdir / METRICS, row)
            means = Means()
            if last or stop or (epoch + 1) % config.checkpoint_every == 0:
                save(epoch + 1, row.get(config.monitor))
            phases.enter(START)
            speed = (step - steps_begun) / max(train_seconds, 1e-9)
            if look:
                times = timing(
                    step, steps=step - steps_begun, train_s=train_seconds, batch_size=config.batch_size, waiting=waited,
                    seconds=time.monotonic() - epoch_began, device_mb=device_memory_mb(), phases=phases,
                )  # fmt: skip
                add_row(workdir / TIMING, times)
                look.rows(step, row, times)
            console.report(row, config.epochs, speed, (time.monotonic() - began) / (epoch + 1 - first))
        with phases.during(CHECKPOINT):
            checkpoints.close()
    except NonFinite as error:
        raise FloatingPointError(told_of(error, config, workdir, data, step, rank)) from error
    console.say(f"done: best {config.monitor} {progress.best:.5f} in epoch {progress.best_epoch}; everything is in {workdir}")
    return row


def check_parameters(params, step: int) -> None:
    """NonFinite where parameters about to be kept are not numbers: the losses are of those before the last step."""
    import jax

    for leaf in jax.tree.leaves(params):
        if not np.isfinite(np.asarray(leaf.addressable_data(0))).all():
            raise NonFinite("a parameter", math.nan, step)


def device_memory_mb() -> float:
    """Most memory that was taken of the first device; 0 where the device doesn't say (CPU)."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e6


def told_of(error: NonFinite, config, workdir, data: Data, step: int, rank: int) -> str:
    """Writes nonfinite.json: what was not a number, in which step, of which clips; returns the line that says so."""
    from avsi_jax.data import input_pipeline

    where = f"epoch {(error.step or step) // data.steps_per_epoch + bool((error.step or step) % data.steps_per_epoch)}"
    if error.step is None:
        said, clips, replay = f"{error.name} is {error.value} in {where}, in its validation", [], None
    else:
        clips = input_pipeline.clip_ids_of_step(data.training, config.batch_size, config.seed, error.step - 1)
        replay = f"the same command with --replay={error.step} tells why"
        said = f"{error.name} is {error.value} in {where}, step {error.step}, of {len(clips)} clips (in {NONFINITE}); {replay}"
    found = {"step": error.step or step, "metric": error.name, "value": str(error.value), "clip_ids": clips, "replay": replay}
    if rank == 0:
        storage.write_text(workdir / NONFINITE, json.dumps(found, indent=2) + "\n")
    return f"{said}; the checkpoints before it are kept"
