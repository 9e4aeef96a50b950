"""Set-up and loop of a training.

Everything needed to understand or resume a run is in its workdir: config.json, run.json (versions, devices, data), metrics.csv
(identical after a resume), timing.csv (throughput, goodput), status.json (current phase and step), train.log, tensorboard/,
images/, checkpoints/, and statistics.json if inputs are standardised.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from avsi_jax.data import local_copy
from avsi_jax.models.build import read_normalisation
from avsi_jax.runtime import storage
from avsi_jax.runtime.goodput import CHECKPOINT, COMPILE, DATA, RESTORE, START, STEP, VALIDATION, PhaseTimer, read_status
from avsi_jax.runtime.signals import Stopped, StopSignals
from avsi_jax.runtime.watchdog import STATUS, Watchdog, check_no_other_training
from avsi_jax.training.optimiser import learning_rate, make_optimiser
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
    transcript_errors,
)

if TYPE_CHECKING:
    from etils import epath
    from ml_collections import ConfigDict

    from avsi_jax.data.features import Normalisation
    from avsi_jax.data.input_pipeline import AudioOnly, Records

NONFINITE = "nonfinite.json"
VALIDATION_GAPS = ("drawn", "words")
VALIDATION_GAPS_MS = (300, 600, 900, 1200, 1500)  # for "words": the lengths of the evaluation
MINIMA = dict.fromkeys(("batch_size", "epochs", "validate_every", "checkpoint_every", "keep"), 1) | dict.fromkeys(
    ("watchdog_s", "checkpoint_seconds", "images_every", "early_stop_patience", "audio_only_clips"), 0
)


# ---- set-up --------------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """The data of a training. audio_only: recordings without video of which each batch has excerpts, if any."""

    training: Records
    audio_only: AudioOnly | None
    validation: Records
    steps_per_epoch: int
    normalisation: Normalisation
    description: dict  # the entry `dataset` of run.json


def open_data(config: ConfigDict, cache_dir: str = "") -> Data:
    """Opens the dataset of a config, copied to `cache_dir` first if given; ValueError if the config cannot be trained."""
    import jax

    from avsi_jax.data import input_pipeline
    from avsi_jax.models import systems
    from avsi_jax.runtime import devices

    for name, minimum in MINIMA.items():
        if config[name] < minimum:
            raise ValueError(f"config.{name}: found {config[name]}, expected {minimum} or more")
    devices.check_batch(config.batch_size)
    check_accumulation(config, jax.device_count())
    if config.monitor not in ("val_loss", "val_gap_l1_db"):
        raise ValueError(f"config.monitor: found {config.monitor!r}, expected val_loss or val_gap_l1_db")
    if config.monitor != "val_loss" and not systems.get(config.system).restores:
        raise ValueError(f"config.monitor: found {config.monitor!r}, expected val_loss: {config.system} restores no gaps")
    if config.validation_gaps != "drawn" and not systems.get(config.system).restores:
        found = f"config.validation_gaps: found {config.validation_gaps!r}"
        raise ValueError(f"{found}, expected drawn: {config.system} restores no gaps")
    if config.validation_gaps not in VALIDATION_GAPS:
        raise ValueError(f"config.validation_gaps: found {config.validation_gaps!r}, expected {' or '.join(VALIDATION_GAPS)}")
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
    description = {
        "builder_config": config.builder_config,
        "version": dataset.name,
        "clips": {split: len(records) for split, records in splits.items()},
        "fingerprint": {split: records.fingerprint() for split, records in splits.items()},
    }
    audio_only = _open_audio_only(config, cache_dir)
    if audio_only:
        description["audio_only"] = {"clips": len(audio_only.records), "fingerprint": audio_only.records.fingerprint()}
    steps_per_epoch = len(training) // (config.batch_size - config.audio_only_clips)
    return Data(training, audio_only, validation, steps_per_epoch, read_normalisation(config, dataset), description)


def _open_audio_only(config: ConfigDict, cache_dir: str) -> AudioOnly | None:
    """ValueError if the system needs the video of every clip, or if no clip of a batch would have video."""
    from avsi_jax.data import input_pipeline
    from avsi_jax.models import systems

    if not config.audio_only_clips:
        return None
    if not systems.get(config.system).handles_missing_streams:
        raise ValueError(
            f"config.audio_only_clips: found {config.audio_only_clips}, expected 0: {config.system} needs the video of every clip"
        )
    if config.audio_only_clips >= config.batch_size:
        raise ValueError(
            f"config.audio_only_clips: found {config.audio_only_clips}, expected fewer than config.batch_size={config.batch_size}"
        )
    dataset = input_pipeline.find_dataset(config.data_dir, config.audio_only_config, "librispeech")
    if cache_dir:
        dataset = local_copy.local_copy(dataset, cache_dir, splits=("train",))
    return input_pipeline.AudioOnly(input_pipeline.Records(dataset, "train"), config.audio_only_clips)


class Progress:
    """State of plateau schedule and early stopping: best loss, epochs without gain, learning rate factor; saved in checkpoints."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.best, self.best_epoch, self.since_gain, self.since_drop, self.lr_scale = float("inf"), 0, 0, 0, 1.0

    def update(self, epoch: int, loss: float) -> bool:
        """Adds the result of a validation; True if training should stop (as Keras' ReduceLROnPlateau and EarlyStopping)."""
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
        """Whether early stopping applies; checked again on a resume, where the patience may have changed."""
        return bool(self.config.early_stop_patience) and self.since_gain >= self.config.early_stop_patience

    def save(self) -> dict:
        """The state as JSON values."""
        return {k: v for k, v in vars(self).items() if k != "config"} | {"best": min(self.best, 1e30)}

    def load(self, saved: dict) -> None:
        """Restores what `save` returned."""
        vars(self).update({k: saved[k] for k in self.save()})


def run_on_first_process(function: Callable[[], Any], rank: int) -> Any:
    """The result of function() on process 0, None on others. If it raises there, all processes raise, so none is left waiting."""
    from avsi_jax.runtime import devices

    result = failure = None
    if rank == 0:
        try:
            result = function()
        except (ValueError, OSError) as error:
            failure = error
    if devices.sum_flags([float(failure is not None)])[0]:
        raise failure or ValueError("process 0 could not continue; its message says why")
    return result


class StopRequests:
    """Requests to stop (a signal to any process) or to save (the clock of process 0), agreed on by all processes at the same step.

    On an accelerator the result is read a few steps late, so that its queue never runs empty.
    """

    LATE = 2

    def __init__(self, stop_signals: StopSignals | None, seconds: float, rank: int, count: int):
        from avsi_jax.runtime import devices

        self._signals, self._seconds, self._rank, self._count = stop_signals, seconds, rank, count
        self._sum_flags = devices.sum_flags
        self._saved_at, self._pending = time.monotonic(), []
        self._late = 0 if devices.devices_share_cores() else self.LATE
        self._outdated = 0  # pending results from before the last save

    def saved(self) -> None:
        """To be called after a save."""
        self._saved_at, self._outdated = time.monotonic(), len(self._pending)

    def poll(self) -> tuple[int, bool]:
        """(signal to stop for or 0, whether to save); all processes must call it at the same steps."""
        due = self._rank == 0 and self._seconds > 0 and time.monotonic() - self._saved_at >= self._seconds
        received = self._signals.received if self._signals else 0
        flags = [received == signal.SIGTERM, received == signal.SIGINT, due]
        if self._count > 1:
            self._pending.append(self._sum_flags(flags, wait=False))
            flags = np.asarray(self._pending.pop(0)) if len(self._pending) > self._late else [0, 0, 0]
            if self._outdated:
                self._outdated, flags = self._outdated - 1, [*flags[:2], 0]
        term, interrupt, save = (bool(flag) for flag in np.asarray(flags))
        return signal.SIGTERM * term or signal.SIGINT * interrupt, save


# ---- loop ----------------------------------------------------------------------------------------------------------------------


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    parallel: str = "pmap",
    cache_dir: str = "",
    stop_signals: StopSignals | None = None,
    console: Console | None = None,
    phases: PhaseTimer | None = None,
) -> dict[str, float]:
    """Trains until config.epochs or early stopping, resuming from the newest valid checkpoint; returns the last row of metrics.

    parallel: 'pmap' or 'shard_map'; ignored with config.debug_nans, where steps are not mapped.
    stop_signals: after one of these signals the state is saved and Stopped is raised.
    """
    with contextlib.ExitStack() as at_end:  # however the run ends, a save in progress is completed
        return _train(config, workdir, parallel, cache_dir, stop_signals, console, phases, at_end)


def _train(config, workdir, parallel, cache_dir, stop_signals, console, phases, at_end: contextlib.ExitStack) -> dict[str, float]:
    import jax

    from avsi_jax.audio import gap_masks
    from avsi_jax.data import input_pipeline
    from avsi_jax.models import systems
    from avsi_jax.runtime import devices
    from avsi_jax.training.checkpoints import Checkpoints, set_damaged_aside

    # 1. Checks of config, data and workdir, before any work.
    workdir, rank, count = storage.as_path(workdir), jax.process_index(), jax.process_count()
    parallel = devices.UNMAPPED if config.debug_nans else parallel
    console, phases = console or Console(rank), phases or PhaseTimer()
    data = open_data(config, cache_dir)
    steps_per_epoch, normalisation = data.steps_per_epoch, data.normalisation
    optimiser = make_optimiser(config, steps_per_epoch)
    state = init_state(config, steps_per_epoch)
    last_status = read_status((workdir / STATUS).read_text() if (workdir / STATUS).exists() else None)
    run_on_first_process(lambda: check_no_other_training(workdir, last_status), rank)
    check_config(config, workdir, normalisation, data.description, write=rank == 0)
    console.log_to(workdir)
    without_video = f" and {len(data.audio_only.records)} recordings without video" if data.audio_only else ""
    console.info(
        f"{config.system}: {len(data.training)} clips{without_video} to train on, {len(data.validation)} to validate, "
        f"{steps_per_epoch} steps per epoch of {config.batch_size} clips, {jax.device_count()} x {jax.devices()[0].device_kind}"
    )

    # 2. State: initial values, replaced by those of the newest valid checkpoint, and only then copied to all devices.
    phases.enter(RESTORE)
    at_end.callback(Watchdog(workdir, phases, config.watchdog_s, console.warn, rank=rank, count=count).start().stop)
    for warning in run_on_first_process(lambda: set_damaged_aside(workdir), rank) or ():
        console.info(f"warning: {warning}")
    checkpoints, progress, means = Checkpoints(workdir, keep=config.keep), Progress(config), Means()
    at_end.callback(checkpoints.close)
    step, first_epoch, stop, saved_step, host = 0, 0, False, None, {}
    if (newest := checkpoints.latest_step()) is not None:
        state, host = checkpoints.restore(newest, state)
        step, first_epoch, saved_step = newest, host.get("epoch", newest // steps_per_epoch), newest
        progress.load(host["progress"])
        means.load(host.get("means", {}))
        stop = progress.is_over()
        console.info(f"resumed at step {step}, epoch {step // steps_per_epoch}")
    phases.resume(host.get("seconds", {}), last_status)
    phases.step = step
    if rank == 0:
        for table in (METRICS, TIMING):  # the row of an epoch that was saved before its validation is written again
            cut_rows(workdir / table, first_epoch * steps_per_epoch)
        kinds = [str(d.device_kind) for d in jax.devices()]
        parameters = systems.count_parameters(state.params)
        write_run(workdir, parameters=parameters, devices=kinds, processes=count, dataset=data.description,
                  parallel=parallel)  # fmt: skip
    state = devices.replicate(state, parallel)

    # 3. Steps, batches and helpers of the loop.
    phases.enter(START)
    train_step = devices.map_train_step(make_train_step(config, optimiser, normalisation), parallel=parallel)
    validation_step = devices.map_evaluation_step(make_validation_step(config, normalisation), parallel=parallel, per_clip=True)
    share = {"process_index": rank, "process_count": count}
    order = {"batch_size": config.batch_size, "seed": config.seed, "audio_only": data.audio_only}
    batches = input_pipeline.train_batches(data.training, **order, start_step=step, **share)
    requests, rate = StopRequests(stop_signals, config.checkpoint_seconds, rank, count), learning_rate(config, steps_per_epoch)
    summaries = Summaries(config, workdir, data.validation, normalisation, step, console.warn) if rank == 0 else None
    if summaries:
        at_end.callback(summaries.close)

    def save(epoch: int, monitor: float | None = None) -> None:
        """epoch: the current one; monitor: result of the validation after this step, if there was one."""
        nonlocal saved_step
        with phases.during(CHECKPOINT):
            host = {"progress": progress.save(), "epoch": epoch, "means": means.save(), "seconds": phases.seconds()}
            check_parameters(state.params, step)
            if monitor is not None or step != saved_step:  # after a validation the step is saved again, with its result
                checkpoints.save(step, devices.to_global(state), host, monitor, replace=step == saved_step)
            saved_step = step
            requests.saved()

    def leave(signum: int) -> None:
        with phases.during(CHECKPOINT):
            checkpoints.wait()
        raise Stopped(signum, step)

    def validate() -> dict[str, float]:
        results, errors = Means(), {}
        phases.enter(VALIDATION)
        for batch in input_pipeline.eval_batches(data.validation, config.batch_size, **share):
            if config.validation_gaps == "words":
                batch = gap_masks.with_gaps_in_words(batch, VALIDATION_GAPS_MS)
            sums, clips = validation_step(state.averaged, devices.split(batch, parallel))
            results.add(jax.device_get(sums))
            for name, pair in transcript_errors(config, batch, clips).items():
                errors[name] = tuple(np.add(errors.get(name, (0.0, 0.0)), pair))
            if signum := requests.poll()[0]:
                save(epoch)
                leave(signum)
            phases.enter(VALIDATION)
        if errors:
            results.add({name: devices.sum_over_processes(pair) for name, pair in errors.items()})
        return results.result(config, "val")

    # 4. Epochs. If CPU devices share cores, only one step is in flight at a time (see devices.devices_share_cores).
    row = (read_rows(workdir / METRICS) or [{}])[-1] if summaries else {}
    compiled, loop_started = False, time.monotonic()
    try:
        for epoch in range(first_epoch, config.epochs):
            if stop:
                break
            waited, epoch_started, first_step = 0.0, time.monotonic(), step
            while step < (epoch + 1) * steps_per_epoch:
                phases.enter(DATA)
                since = time.monotonic()
                batch = devices.split(next(batches), parallel)
                waited += time.monotonic() - since
                phases.enter(STEP if compiled else COMPILE)
                state, metrics = train_step(state, batch)
                if devices.devices_share_cores() or not compiled:
                    jax.block_until_ready((state, metrics))
                compiled, step = True, step + 1
                phases.step = step
                phases.enter(STEP)
                if stop_signals:
                    stop_signals.leave_to_loop()
                means.add(metrics, step)
                speed = (step - first_step) / (time.monotonic() - epoch_started)
                console.progress(epoch + 1, step - epoch * steps_per_epoch, steps_per_epoch, speed)
                signum, due = requests.poll()
                if signum or (due and step < (epoch + 1) * steps_per_epoch):
                    save(epoch)
                if signum:
                    leave(signum)
                if summaries:
                    summaries.write_image(step, state.averaged)
            row = {"step": step, "epoch": epoch + 1} | means.result(config, "train")
            train_seconds = time.monotonic() - epoch_started
            last = epoch + 1 == config.epochs
            if last or (epoch + 1) % config.validate_every == 0:
                row |= validate()
                stop = progress.update(epoch + 1, row[config.monitor])
                row |= {"lr": rate(step - 1) * float(state.lr_scale), "lr_scale": progress.lr_scale}
                state = state._replace(lr_scale=devices.replicate(np.float32(progress.lr_scale), parallel))
                if summaries:
                    add_row(workdir / METRICS, row)
            means = Means()
            if last or stop or (epoch + 1) % config.checkpoint_every == 0:
                save(epoch + 1, row.get(config.monitor))
            phases.enter(START)
            speed = (step - first_step) / max(train_seconds, 1e-9)
            if summaries:
                times = timing(
                    step, steps=step - first_step, train_s=train_seconds, batch_size=config.batch_size, waited_s=waited,
                    epoch_s=time.monotonic() - epoch_started, device_mb=device_memory_mb(), phases=phases,
                )  # fmt: skip
                add_row(workdir / TIMING, times)
                summaries.write_rows(step, row, times)
            console.epoch(row, config.epochs, speed, (time.monotonic() - loop_started) / (epoch + 1 - first_epoch))
        with phases.during(CHECKPOINT):
            checkpoints.close()
    except NonFinite as error:
        raise FloatingPointError(report_nonfinite(error, config, workdir, data, step, rank)) from error
    console.info(f"done: best {config.monitor} {progress.best:.5f} in epoch {progress.best_epoch}; results are in {workdir}")
    return row


def check_parameters(params: Any, step: int) -> None:
    """NonFinite if parameters that are about to be saved are not finite: the losses so far are of those before the last step."""
    import jax

    for leaf in jax.tree.leaves(params):
        if not np.isfinite(np.asarray(leaf.addressable_data(0))).all():
            raise NonFinite("a parameter", math.nan, step)


def device_memory_mb() -> float:
    """Peak memory use of the first device, MB; 0 if the device does not report it (CPU)."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e6


def report_nonfinite(error: NonFinite, config: ConfigDict, workdir: epath.Path, data: Data, step: int, rank: int) -> str:
    """Writes nonfinite.json, which names metric, training step and clips; returns the error message."""
    from avsi_jax.data import input_pipeline

    where = f"epoch {(error.step or step) // data.steps_per_epoch + bool((error.step or step) % data.steps_per_epoch)}"
    if error.step is None:
        message, clips, replay = f"{error.name} is {error.value} in the validation of {where}", [], None
    else:
        clips = input_pipeline.clip_ids_of_step(data.training, config.batch_size, config.seed, error.step - 1, data.audio_only)
        replay = f"run the same command with --replay={error.step} to find the cause"
        message = f"{error.name} is {error.value} in {where}, step {error.step}, of {len(clips)} clips (in {NONFINITE}); {replay}"
    facts = {"step": error.step or step, "metric": error.name, "value": str(error.value), "clip_ids": clips, "replay": replay}
    if rank == 0:
        storage.write_text(workdir / NONFINITE, json.dumps(facts, indent=2) + "\n")
    return f"{message}; the earlier checkpoints are kept"
