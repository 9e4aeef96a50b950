"""avsi-prepare: a raw corpus -> records. Every clip is measured into a cache, on all cores, then the TFDS builder packs them.

What is measured already (by content, face models and code version) is not measured again: a stopped run goes on where it was.
tensorflow is needed only to write the records. build_report.json beside them tells what became of every clip.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures as futures
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import platform
import resource
import sys
import threading
import time

from tfds_grid import speakers

CACHE = ".cache"  # in the data_dir
CONFIGS = tuple(f"{protocol}{suffix}" for protocol in speakers.SPLITS for suffix in ("", "_mouth"))
REPORTED_PACKAGES = ("avsi_jax", "tensorflow_datasets", "tensorflow", "tensorflow_cpu", "av", "numpy", "soxr", "ai_edge_litert")
REPORTED_PACKAGES += ("opencv_python_headless",)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What became of one clip: the cache file, or the reason why there is none."""

    id: str
    path: pathlib.Path | None
    unusable: str = ""
    invalid_frames: int = 0
    warnings: tuple[str, ...] = ()


# ----------------------------------------------------------------------------------------------------------------- measure


def _start_worker() -> None:
    """One core a worker: the pool is the parallelism."""
    from avsi_jax import landmarks

    landmarks.use_one_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed build leaves no worker behind."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _measure_one(clip: speakers.RawClip, cache: pathlib.Path, mouth: bool) -> Measured:
    from tfds_grid import clips

    try:
        clips.read_words(clip.words)
        path = clips.measure_cached(clip, cache, mouth=mouth)
    except clips.UnusableClipError as e:
        return Measured(clip.id, None, unusable=str(e))
    found = clips.load_measured(path)
    return Measured(clip.id, path, "", int((~found["landmarks_valid"]).sum()), tuple(map(str, found["warnings"])))


def measure_all(corpus: speakers.RawCorpus, cache: pathlib.Path, *, mouth: bool, workers: int) -> list[Measured]:
    """Every clip of the corpus, in the order of their ids, by `workers` fresh processes."""
    import tqdm

    context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
    with futures.ProcessPoolExecutor(workers, context, _start_worker) as pool:
        jobs = [pool.submit(_measure_one, clip, cache, mouth) for clip in corpus.clips]
        try:
            for job in tqdm.tqdm(futures.as_completed(jobs), "measuring", len(jobs), unit="clip", mininterval=1):
                job.result()
        except futures.process.BrokenProcessPool as e:
            fewer = max(1, workers // 2)
            raise OSError(f"a worker was killed, out of memory? The same with --workers={fewer} goes on from here") from e
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [job.result() for job in jobs]


# -------------------------------------------------------------------------------------------------------------------- pack


def _need_tensorflow() -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise ModuleNotFoundError('tensorflow, which writes the records, is not installed: pip install "avsi_jax[prepare]"')


def _make_builder(name: str, args, exclude: set[str], measured: list[Measured]):
    from tfds_grid import grid_dataset_builder

    paths = {m.id: m.path for m in measured if m.path}
    data_dir = pathlib.Path(args.data_dir).expanduser()
    options = {"full_train": args.full_train, "exclude": exclude, "measured": paths}
    return grid_dataset_builder.Builder(config=name, data_dir=data_dir, file_format="tfrecord", **options)


def _refuse_existing(builder, overwrite: bool) -> None:
    folder = pathlib.Path(builder.data_path)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} holds a dataset already; --overwrite replaces it, another --data_dir keeps it")


def pack(builder, raw: pathlib.Path, max_shard_mb: float) -> None:
    """Writes the records of one builder config, replacing what is there."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow_datasets as tfds

    config = _download_config(tfds)(
        manual_dir=raw,
        download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS,  # fresh records, nothing is downloaded anyway
        try_download_gcs=False,
        max_shard_size=int(max_shard_mb * 2**20),
    )
    downloads = pathlib.Path(builder.data_path).parents[2] / CACHE / "downloads"  # TFDS makes one, it stays empty
    builder.download_and_prepare(download_config=config, download_dir=downloads)


def _download_config(tfds):
    """A DownloadConfig whose max_shard_size is heeded: TFDS 4.9.10 counts shards by its own defaults (64 MiB at least)."""

    class ShardConfig(tfds.core.utils.shard_utils.ShardConfig):
        def get_number_shards(self, total_size, num_examples, uses_precise_sharding=True):
            return min(num_examples, math.ceil((total_size + num_examples * self.overhead) / self.max_shard_size))

    class DownloadConfig(tfds.download.DownloadConfig):
        def get_shard_config(self):
            return ShardConfig(max_shard_size=self.max_shard_size)

    return DownloadConfig


# ------------------------------------------------------------------------------------------------------------------ report


def build_report(
    builder, corpus: speakers.RawCorpus, measured: list[Measured], *, banned: set[str], seconds: dict[str, float]
) -> dict:
    """What build_report.json holds; `banned` are the ids never to use, `seconds` those of measuring and of packing."""
    members = builder.members(corpus)
    unusable = {m.id: m.unusable for m in measured if m.unusable}
    written = sum(map(len, members.values()))
    reserved = banned & {pathlib.Path(p).stem for p in corpus.left_out}
    return {
        "clips": {"found": corpus.num_found, "written": written, "skipped": len(corpus.left_out) + len(unusable)},
        "reserved_ids_left_out": len(reserved),
        "full_train": builder.info.metadata["full_train"],
        "splits": {s: len(members[s]) for s in sorted(members)},
        "splits_without_a_clip": [s for s in speakers.SPLITS[builder.builder_config.protocol] if s not in members],
        "speakers": {s: _count(c.speaker for c in members[s]) for s in sorted(members)},
        "clips_without_words": sorted(c.id for clips in members.values() for c in clips if c.words is None),
        "clips_with_wav": sorted(c.id for clips in members.values() for c in clips if c.sound is not None),
        "skipped_files": dict(corpus.left_out),
        "skipped_clips": unusable,
        "invalid_landmark_frames": {
            "total": sum(m.invalid_frames for m in measured),
            "clips": {m.id: m.invalid_frames for m in measured if m.invalid_frames},
        },
        "warnings": {m.id: list(m.warnings) for m in measured if m.warnings},
        "seconds": {k: round(s, 1) for k, s in seconds.items()},
        "clips_per_s": round(len(measured) / sum(seconds.values()), 2),
        "peak_memory_mb": peak_memory_mb(),
        "face_models_sha256": builder.info.metadata["face_models_sha256"],
        "versions": {"python": platform.python_version(), "dataset": str(builder.version)} | _package_versions(),
    }


def _count(names) -> dict[str, int]:
    """How often each speaker occurs, s2 before s10."""
    return dict(sorted(collections.Counter(names).items(), key=lambda item: (len(item[0]), item[0])))


def peak_memory_mb() -> dict[str, int]:
    """Largest resident memory so far: of this process and of its largest worker."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    who = {"main": resource.RUSAGE_SELF, "largest_worker": resource.RUSAGE_CHILDREN}
    return {name: round(resource.getrusage(w).ru_maxrss / unit) for name, w in who.items()}


def _package_versions() -> dict[str, str]:
    installed = {}
    for name in REPORTED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def _summary(name: str, report: dict) -> str:
    clips = report["clips"]
    splits = ", ".join(f"{s} {n}" for s, n in report["splits"].items())
    empty = ", ".join(report["splits_without_a_clip"])
    written = f"{name}: {clips['written']} of {clips['found']} clips written ({splits})"
    return written + (f"; no clip in {empty}" if empty else "")


# ----------------------------------------------------------------------------------------------------------------- command


def prepare(args) -> None:
    """The whole build; raises ValueError or OSError with one line for the user."""
    start = time.monotonic()
    raw, data_dir = pathlib.Path(args.raw).expanduser(), pathlib.Path(args.data_dir).expanduser()
    exclude = set().union(*map(speakers.read_ids, args.exclude))
    corpus = speakers.find_clips(raw, exclude)
    if not corpus.clips:
        reasons = f" ({len(corpus.left_out)} left out, {next(iter(corpus.left_out.values()))})" if corpus.left_out else ""
        raise ValueError(f"--raw={raw}: found no clip{reasons}; expected videos such as {raw}/s1/bbaf2n.mpg")
    _need_tensorflow()
    names = CONFIGS if args.builder_config == "all" else (args.builder_config,)
    for name in names:
        _refuse_existing(_make_builder(name, args, exclude, []), args.overwrite)
    mouth = any(name.endswith("_mouth") for name in names)
    measured = measure_all(corpus, data_dir / CACHE, mouth=mouth, workers=args.workers)
    if not any(m.path for m in measured):
        raise ValueError(f"--raw={raw}: none of its {len(measured)} clips can be used; the first: {measured[0].unusable}")
    measuring = time.monotonic() - start
    for name in names:
        start = time.monotonic()
        builder = _make_builder(name, args, exclude, measured)
        pack(builder, raw, args.max_shard_mb)
        seconds = {"measuring": measuring, "packing": time.monotonic() - start}
        report = build_report(builder, corpus, measured, banned=exclude | speakers.reserved_ids(raw), seconds=seconds)
        (pathlib.Path(builder.data_path) / "build_report.json").write_text(json.dumps(report, indent=1) + "\n")
        print(_summary(name, report), f"\n  {builder.data_path}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("avsi-prepare", description="Builds the dataset `grid` from raw Grid clips.")
    add = parser.add_argument
    add("--raw", required=True, metavar="DIR", help="folder with the clips (s1/bbaf2n.mpg), alignments and sounds")
    add("--data_dir", required=True, metavar="DIR", help="where datasets are kept: records go to DIR/grid/...")
    add("--builder_config", default=CONFIGS[0], choices=(*CONFIGS, "all"), help="default: %(default)s")
    add("--full_train", action="store_true", help="fold validation_seen and test_seen back into train, as published")
    add("--workers", type=int, default=_cores(), metavar="N", help="processes that measure; default: one a core, %(default)s")
    add("--exclude", action="append", default=[], metavar="FILE", help="ids never to use, one a line, as RESERVED.txt in --raw")
    add("--max_shard_mb", type=float, default=64, metavar="MB", help="largest file of records; default: %(default)s")
    add("--overwrite", action="store_true", help="replace a dataset that is there")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv=None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.workers < 1 or args.max_shard_mb <= 0:
        parser.error(f"--workers={args.workers} --max_shard_mb={args.max_shard_mb:g}: expected both above 0")
    try:
        prepare(args)
    except (ValueError, OSError, ModuleNotFoundError) as e:
        print(f"avsi-prepare: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\navsi-prepare: stopped; the same command goes on where this one was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
