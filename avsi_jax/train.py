"""Set-up -> loop: avsi-train.

The loop is one function that reads from top to bottom. Everything a run needs to be understood or gone on with lies in its workdir:
config.json, run.json (versions, devices, data), metrics.csv (identical after a resume), timing.csv (speed), checkpoints/, and
statistics.json where something is standardised.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
from pathlib import Path

import configs
from avsi_jax.experiment import count_of, example_features, make_model, make_optimiser, read_normalisation
from avsi_jax.steps import Means, init_state, make_train_step, make_validation_step
from avsi_jax.workdir import METRICS, TIMING, add_row, check_config, cut_rows, read_rows, timing, write_run

# ---- the host's part of the schedule -------------------------------------------------------------------------------------------


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


# ---- loop ----------------------------------------------------------------------------------------------------------------------


def train(config, workdir: str | Path) -> dict[str, float]:
    """Trains until config.epochs or early stop, resuming from the workdir's newest checkpoint; returns the last row of metrics."""
    from avsi_jax import parallel

    parallel.use_every_core(config.batch_size)
    import jax
    import numpy as np

    from avsi_jax import input_pipeline, models
    from avsi_jax.checkpoints import Checkpoints

    # 1. What was asked for, refused before any work where it cannot be.
    workdir = Path(workdir)
    parallel.check_batch(config.batch_size)
    if config.monitor not in ("val_loss", "val_gap_l1_db"):
        raise ValueError(f"config.monitor: found {config.monitor!r}, expected val_loss or val_gap_l1_db")
    if config.monitor != "val_loss" and not models.get(config.system).restores:
        raise ValueError(f"config.monitor: found {config.monitor!r}, expected val_loss: {config.system} restores no gap")
    if not config.data_dir:
        raise ValueError("no --config.data_dir given; expected the folder that avsi-prepare --data_dir=DIR wrote")
    dataset = input_pipeline.find_dataset(config.data_dir, config.builder_config)
    training = input_pipeline.Records(dataset, config.train_split, mouth=False)
    validation = input_pipeline.Records(dataset, config.validation_split, mouth=False)
    if len(training) < config.batch_size:
        raise ValueError(f"{config.train_split} holds {len(training)} clips, fewer than config.batch_size={config.batch_size}")
    steps_per_epoch = len(training) // config.batch_size
    normalisation = read_normalisation(config, dataset)
    check_config(config, workdir, normalisation)
    say(f"{config.system}: {len(training)} clips to train on, {len(validation)} to validate, {steps_per_epoch} steps an epoch of "
        f"{config.batch_size}, {jax.device_count()} x {jax.devices()[0].device_kind}")  # fmt: skip

    # 2. State: fresh, then over it the newest checkpoint; on all devices only once it is what training starts with.
    optimiser = make_optimiser(config, steps_per_epoch)
    state = init_state(config, steps_per_epoch)
    checkpoints, progress = Checkpoints(workdir, keep=config.keep), Progress(config)
    start = checkpoints.latest_step() or 0
    stop = False
    if checkpoints.latest_step() is not None:
        state, host = checkpoints.restore(start, state)
        progress.load(host["progress"])
        stop = progress.is_over()
        say(f"resumed at step {start}, epoch {start // steps_per_epoch}")
    cut_rows(workdir / METRICS, start)
    write_run(
        workdir,
        parameters=models.count_parameters(state.params),
        devices=[str(d.device_kind) for d in jax.devices()],
        processes=jax.process_count(),
        dataset={
            "builder_config": config.builder_config,
            "version": dataset.name,
            "clips": {config.train_split: len(training), config.validation_split: len(validation)},
        },
    )
    state = parallel.replicate(state)

    # 3. Steps.
    train_step = parallel.map_train_step(make_train_step(config, optimiser, normalisation))
    validation_step = parallel.map_evaluation_step(make_validation_step(config, normalisation))
    batches = input_pipeline.train_batches(
        training,
        config.batch_size,
        config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        start_step=start,
    )

    def validate() -> dict[str, float]:
        means = Means()
        for batch in input_pipeline.eval_batches(validation, config.batch_size):
            means.add(jax.device_get(validation_step(state.params, parallel.split(batch))))
        return means.result(config, "val")

    # 4. Epochs. Where CPU devices share cores one step is in flight, no more (see parallel.devices_share_cores).
    row = (read_rows(workdir / METRICS) or [{}])[-1]
    first, began = start // steps_per_epoch, time.monotonic()
    try:
        for epoch in range(first, config.epochs):
            if stop:
                break
            means, waited, epoch_began = Means(), 0.0, time.monotonic()
            for index in range(steps_per_epoch):
                asked = time.monotonic()
                batch = parallel.split(next(batches))
                waited += time.monotonic() - asked
                state, metrics = train_step(state, batch)
                if parallel.devices_share_cores():
                    jax.block_until_ready((state, metrics))
                means.add(metrics)
                tick(epoch + 1, index + 1, steps_per_epoch, epoch_began)
            step = (epoch + 1) * steps_per_epoch
            row = {"step": step, "epoch": epoch + 1} | means.result(config, "train")
            train_seconds = time.monotonic() - epoch_began
            check_finite(row)
            last = epoch + 1 == config.epochs
            if last or (epoch + 1) % config.validate_every == 0:
                row |= validate()
                check_finite(row)
                stop = progress.update(epoch + 1, row[config.monitor])
                state = state._replace(lr_scale=parallel.replicate(np.float32(progress.lr_scale)))
                row["lr_scale"] = progress.lr_scale
                add_row(workdir / METRICS, row)
                if last or stop or (epoch + 1) % config.checkpoint_every == 0:
                    checkpoints.save(step, state, {"progress": progress.save()}, row[config.monitor])
            speed = steps_per_epoch / train_seconds
            add_row(
                workdir / TIMING, timing(step, speed, config.batch_size, waited / train_seconds, time.monotonic() - epoch_began)
            )
            report(row, config.epochs, speed, (time.monotonic() - began) / (epoch + 1 - first))
    finally:  # whatever ends the run: what is being saved is saved
        checkpoints.close()
    say(f"done: best {config.monitor} {progress.best:.5f} in epoch {progress.best_epoch}; everything is in {workdir}")
    return row


def check_finite(row: dict[str, float]) -> None:
    """FloatingPointError where a metric of this epoch is not a number, or endless."""
    for name, value in row.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value} in epoch {row['epoch']}; the checkpoints before it are kept")


# ---- what the user sees --------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tick(epoch: int, done: int, total: int, began: float) -> None:
    """One line that rewrites itself, on a terminal only."""
    if sys.stderr.isatty():
        speed = done / (time.monotonic() - began)
        end = "\r" if done < total else "\r\033[K"
        print(f"epoch {epoch}  step {done}/{total}  {speed:.2f} steps/s", end=end, file=sys.stderr, flush=True)


def report(row: dict, epochs: int, speed: float, epoch_s: float) -> None:
    """One line an epoch: losses, the gap's error, speed, time left."""
    left = (epochs - row["epoch"]) * epoch_s
    shown = "  ".join(
        f"{k} {row[k]:.4g}"
        for k in ("train_loss", "val_loss", "train_gap_l1_db", "val_gap_l1_db", "train_ctc", "val_ctc")
        if k in row
    )
    say(f"epoch {row['epoch']:.0f}/{epochs}  {shown}  {speed:.2f} steps/s  {datetime.timedelta(seconds=round(left))} left")
    if row.get("train_ctc_infeasible"):
        say(f"  {row['train_ctc_infeasible']:.1%} of the clips with a text have too few steps for it: the CTC left them out")


def show(config) -> None:
    """What `--show` prints: the config, the signal, the network's table, its shapes. Needs no data."""
    import dataclasses

    import flax.linen as nn
    import jax

    from avsi_jax import spec

    signal = [f"{k}: {v}" for k, v in dataclasses.asdict(spec.get(config.preset)).items()]
    table = nn.tabulate(make_model(config), jax.random.key(0), depth=2, console_kwargs={"width": 160})(example_features(config))
    print(config, *signal, table, f"parameters: {count_of(config)}", sep="\n")


def main(argv: list[str] | None = None) -> int:
    names = [n for n in configs.names() if n != "eval"]
    parser = argparse.ArgumentParser("avsi-train", description="Train a system of avsi_jax; resumes by itself from its workdir.")
    parser.add_argument("--config", default="av_mtl_s2s", help=f"a name ({', '.join(names)}) or a .py file; default %(default)s")
    parser.add_argument("--workdir", help="where the run lives; an earlier run there is gone on with")
    parser.add_argument("--show", action="store_true", help="print config, signal, network and parameters, and leave")
    parser.epilog = "Fields: --config.FIELD=VALUE, e.g. --config.data_dir=DATA --config.batch_size=64 --config.loss.gap=1"
    known, rest = parser.parse_known_args(argv)
    try:
        config = configs.load(known.config, configs.split_overrides(rest), like="base")
        if known.show:
            show(config)
        elif not known.workdir:
            raise ValueError("no --workdir given; expected a folder for checkpoints and metrics")
        else:
            train(config, known.workdir)
    except (ValueError, FileNotFoundError, OSError, FloatingPointError) as error:
        print(f"avsi-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\navsi-train: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
