"""Measures how fast the records of a split become batches, compared with a training step and with tf.data.

    python -m benchmarks.speed.input_pipeline DATA_DIR [--config NAME] [--batch_size 32] [--seconds 4] [--rounds 3] [--no_step]

Our reader and tf.data (if tensorflow is installed; the same records parsed, padded and batched, in file order) alternate in one
process with a warm disk cache; the best round of each counts. Then the training step of the config is timed on one batch, on the
devices that jax finds. Only the ratios are meaningful: do not compare runs on machines that are busy otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Iterator

from ml_collections import ConfigDict

from avsi_jax import configs, presets
from avsi_jax.data import input_pipeline
from avsi_jax.runtime import devices

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def tf_batches(folder: str | os.PathLike, split: str, batch_size: int) -> Iterator[dict]:
    """Endless batches of the records by tf.data: parsing by tensorflow-datasets, padding as in input_pipeline.to_example."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")

    def fit(x, length):
        x = x[:length]
        return tf.pad(x, [[0, length - tf.shape(x)[0]], *[[0, 0]] * (len(x.shape) - 1)])

    def example(raw):
        landmarks, frames = raw["landmarks"][: presets.GRID_FRAMES], presets.GRID_FRAMES
        landmarks = tf.concat([landmarks, tf.repeat(landmarks[-1:], frames - tf.shape(landmarks)[0], axis=0)], axis=0)
        return {
            "audio": fit(raw["audio"], 48_000),
            "audio_length": tf.minimum(tf.shape(raw["audio"])[0], 48_000),
            "landmarks": tf.ensure_shape(landmarks, (frames, 68, 2)),
            "landmarks_valid": fit(raw["landmarks_valid"], frames),
            **{name: raw[name] for name in ("id", "text", "offset_s", "frame_size", "fps")},
        }

    skipped = {"mouth": tfds.decode.SkipDecoding()} if "mouth" in tfds.builder_from_directory(folder).info.features else None
    dataset = tfds.builder_from_directory(folder).as_dataset(split=split, decoders=skipped)
    batches = dataset.repeat().map(example, num_parallel_calls=tf.data.AUTOTUNE).batch(batch_size)
    return batches.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def rate(batches: Iterator, batch_size: int, seconds: float) -> tuple[float, float]:
    """(clips per second, CPU time of all threads in ms per clip)."""
    clips, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        next(batches)
        clips += batch_size
    return clips / (time.perf_counter() - start), (time.process_time() - cpu) / clips * 1e3


def measure_readers(
    folder: str | os.PathLike, split: str, batch_size: int, seconds: float, rounds: int
) -> dict[str, tuple[float, float]]:
    """Reader -> (highest clips per second, lowest CPU time in ms per clip)."""
    records = input_pipeline.Records(folder, split)
    records.verify()  # reads every byte, so that the disk cache is warm
    readers = {"ours": input_pipeline.train_batches(records, batch_size, seed=0)}
    if importlib.util.find_spec("tensorflow"):
        readers["tf.data"] = tf_batches(folder, split, batch_size)
    results = {name: [] for name in readers}
    for batches in readers.values():
        rate(batches, batch_size, 1.0)
    for _ in range(rounds):
        for name, batches in readers.items():
            rate(batches, batch_size, 0.5)  # empties the queues filled during the other reader's turn
            results[name].append(rate(batches, batch_size, seconds))
    return {name: (max(r for r, _ in rows), min(c for _, c in rows)) for name, rows in results.items()}


def measure_step(config: ConfigDict, folder: str | os.PathLike, seconds: float) -> float:
    """Training steps per second on one batch, including its transfer to the devices."""
    import jax

    from avsi_jax.models import build
    from avsi_jax.training import train_step
    from avsi_jax.training.optimiser import make_optimiser

    optimiser = make_optimiser(config, 1)
    step = devices.map_train_step(train_step.make_train_step(config, optimiser, build.read_normalisation(config, folder)))
    state = devices.replicate(train_step.init_state(config, 1))
    batch = next(input_pipeline.train_batches(input_pipeline.Records(folder, config.train_split), config.batch_size, seed=0))
    for _ in range(2):  # the first one compiles
        state, metrics = step(state, devices.split(batch))
        jax.block_until_ready(state)
    done, start = 0, time.perf_counter()
    while done < 3 or time.perf_counter() - start < seconds:
        state, metrics = step(state, devices.split(batch))
        if devices.devices_share_cores():
            jax.block_until_ready(state)
        done += 1
    jax.block_until_ready((state, metrics))
    return done / (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> int:
    """The command `python -m benchmarks.speed.input_pipeline`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", help="dataset written by avsi-prepare --data_dir")
    parser.add_argument("--builder_config", default="speaker_independent", help="default: %(default)s")
    parser.add_argument("--config", default="av_mtl_s2s", help="config of the training step (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4, help="duration of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each reader (default: %(default)s)")
    parser.add_argument("--no_step", action="store_true", help="measure only the readers")
    args = parser.parse_args(argv)
    if min(args.batch_size, args.seconds, args.rounds) <= 0:
        parser.error("expected --batch_size, --seconds and --rounds above 0")
    try:
        config = configs.load(args.config, [("data_dir", args.data_dir), ("batch_size", str(args.batch_size))], like="base")
        folder = input_pipeline.find_dataset(args.data_dir, args.builder_config)
        start = time.perf_counter()
        records = input_pipeline.Records(folder, config.train_split)
        open_s = time.perf_counter() - start
    except ValueError as e:
        print(f"input_pipeline: {e}", file=sys.stderr)
        return 2
    print(f"{folder}: {len(records)} clips of {config.train_split}, opened and checked in {open_s:.2f} s")
    readers = measure_readers(folder, config.train_split, args.batch_size, args.seconds, args.rounds)
    for name, (clips_per_s, cpu_ms) in readers.items():
        print(f"{name:10}{clips_per_s:8.0f} clips/s, {cpu_ms:.2f} ms of CPU time per clip")
    if "tf.data" in readers:
        print(f"ours / tf.data: {readers['ours'][0] / readers['tf.data'][0]:.2f}")
    if args.no_step:
        return 0
    devices.use_every_core(args.batch_size)
    steps_per_s = measure_step(config, folder, args.seconds)
    step_clips_per_s = steps_per_s * args.batch_size
    import jax

    print(f"step      {step_clips_per_s:8.1f} clips/s: {args.config}, {steps_per_s:.2f} steps/s of {args.batch_size} on "
          f"{jax.device_count()} x {jax.devices()[0].device_kind}")  # fmt: skip
    print(f"ours / step: {readers['ours'][0] / step_clips_per_s:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
