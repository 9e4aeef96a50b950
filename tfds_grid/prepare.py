"""avsi-prepare: a raw corpus -> records. Measures every clip on all cores into a cache; the TFDS builder then writes the records.

Clips in the cache (same content, face models and code version) are not measured again, so a stopped run continues where it was.
tensorflow is needed only to write the records. build_report.json beside them has the result for every clip.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import resource
import sys
import time

from etils import epath

from avsi_jax.runtime import storage, unexpected_errors
from avsi_jax.runtime.command_line import Parser
from tfds_grid import measuring, speakers
from tfds_grid.measuring import Measured

CACHE = ".cache"  # in the data_dir
CONFIGS = tuple(f"{protocol}{suffix}" for protocol in speakers.SPLITS for suffix in ("", "_mouth"))
REPORT = "build_report.json"  # the last file of a build
REPORTED_PACKAGES = ("avsi_jax", "tensorflow_datasets", "tensorflow", "tensorflow_cpu", "av", "numpy", "soxr", "ai_edge_litert")
REPORTED_PACKAGES += ("opencv_python_headless",)


# -------------------------------------------------------------------------------------------------------------------- pack


def need_tensorflow() -> None:
    """Raises ModuleNotFoundError, naming the extra to install, where tensorflow is missing."""
    if importlib.util.find_spec("tensorflow") is None:
        raise ModuleNotFoundError('tensorflow, which writes the records, is not installed: pip install "avsi_jax[prepare]"')


def _make_builder(name: str, args, exclude: set[str], measured: list[Measured], statistics: dict | None = None):
    from tfds_grid import grid_dataset_builder

    options = {
        "data_dir": pathlib.Path(args.data_dir).expanduser(),
        "file_format": "tfrecord",
        "full_train": args.full_train,
        "exclude": exclude,
        "layout": args.layout,
        "measured": {m.id: m.path for m in measured if m.path},
        "statistics": statistics,
    }
    return grid_dataset_builder.Builder(config=name, **options)


def _train_statistics(builder, corpus: speakers.RawCorpus, measured: list[Measured], cache: pathlib.Path) -> dict | None:
    """Statistics of the builder's train split, cached by a hash of their inputs; None where the split is empty."""
    from tfds_grid import grid_dataset_builder

    members = builder.members(corpus).get("train")
    if not members:
        return None
    files = {m.id: m.path.name for m in measured if m.path}
    inputs = [grid_dataset_builder.STATISTICS_VERSION, *(files[clip.id] for clip in members)]
    path = cache / f"statistics-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]}.json"
    if path.exists():
        return json.loads(path.read_text())
    import tqdm

    progress = tqdm.tqdm(members, "statistics", unit="clip", mininterval=1)
    statistics = grid_dataset_builder.statistics_of(
        grid_dataset_builder.clip_sums(builder.example_of(clip)) for clip in progress
    )  # fmt: skip
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(statistics))
    temporary.replace(path)
    return statistics


def dataset_folder(data_dir: epath.PathLike, name: str) -> epath.Path:
    """The folder for the records of a builder config."""
    from tfds_grid import grid_dataset_builder

    return epath.Path(data_dir) / "grid" / name / str(grid_dataset_builder.Builder.VERSION)


def refuse_existing(folder: epath.Path, overwrite: bool) -> None:
    """Raises FileExistsError where the folder holds a dataset that may not be replaced."""
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} holds a dataset already; --overwrite replaces it, another --data_dir keeps it")


@contextlib.contextmanager
def replacing(folder: epath.Path):
    """Moves an existing dataset in `folder` aside before TFDS reads its description, and restores it if the new build fails."""
    aside = folder.parent / f"replaced.{folder.name}"
    if folder.exists() and aside.exists():  # left by a build that was killed: at its end, if it wrote its report
        (aside if (folder / REPORT).exists() else folder).rmtree()
    if folder.exists():
        folder.rename(aside)
    try:
        yield
    except BaseException:
        if aside.exists():
            if folder.exists():  # incomplete: it has no report
                folder.rmtree()
            aside.rename(folder)
        raise
    if aside.exists():
        aside.rmtree()


def pack(builder, raw: pathlib.Path, max_shard_mb: float) -> None:
    """Writes the records of one builder config."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow_datasets as tfds

    config = _download_config(tfds)(
        manual_dir=raw,
        download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS,  # writes fresh records; nothing is downloaded in any case
        try_download_gcs=False,
        max_shard_size=int(max_shard_mb * 2**20),
    )
    downloads = builder.data_path.parents[2] / CACHE / "downloads"  # TFDS makes this folder, it stays empty
    try:
        builder.download_and_prepare(download_config=config, download_dir=downloads)
    except Exception as e:  # tensorflow's writer raises its own errors for a disk that is full or read-only
        cause = e.__cause__ or e
        if isinstance(cause, OSError) or type(cause).__module__.startswith("tensorflow."):
            from tfds_grid import clips

            reason = f"{' '.join(str(cause).split())}; {clips.free_space(builder.data_dir_root)}"
            raise OSError(f"{builder.data_path}: the records can't be written ({reason})") from e
        raise


def _download_config(tfds):
    """A DownloadConfig whose max_shard_size is used: TFDS 4.9.10 computes the number of shards from its own default (64 MiB)."""

    class ShardConfig(tfds.core.utils.shard_utils.ShardConfig):
        def get_number_shards(self, total_size, num_examples, uses_precise_sharding=True):
            return min(num_examples, math.ceil((total_size + num_examples * self.overhead) / self.max_shard_size))

    class DownloadConfig(tfds.download.DownloadConfig):
        def get_shard_config(self):
            return ShardConfig(max_shard_size=self.max_shard_size)

    return DownloadConfig


# ------------------------------------------------------------------------------------------------------------------ report


def build_report(
    builder, corpus: speakers.RawCorpus, measured: list[Measured], *, excluded: set[str], seconds: dict[str, float]
) -> dict:
    """The content of build_report.json. excluded: the ids never to use; seconds: time of each stage."""
    members = builder.members(corpus)
    unusable = {m.id: m.unusable for m in measured if m.unusable}
    written = sum(map(len, members.values()))
    used = [clip for clips_of_split in members.values() for clip in clips_of_split]
    reserved = excluded & {pathlib.PurePosixPath(place).stem for place in corpus.left_out}
    return {
        "clips": {"found": corpus.num_found, "written": written, "left_out": len(corpus.left_out), "skipped": len(unusable)},
        "clips_without_video": dict(corpus.without_video),
        "ignored_files": dict(corpus.ignored),
        "reserved_ids_left_out": len(reserved),
        "full_train": builder.info.metadata["full_train"],
        "layout": builder.info.metadata["layout"],
        "splits": {s: len(members[s]) for s in sorted(members)},
        "splits_without_a_clip": [s for s in speakers.SPLITS[builder.builder_config.protocol] if s not in members],
        "speakers": {s: speakers.in_order(collections.Counter(c.speaker for c in members[s])) for s in sorted(members)},
        "clips_without_words_file": sorted(clip.id for clip in used if clip.words is None),
        "clips_with_wav": sorted(clip.id for clip in used if clip.audio is not None),
        "left_out": dict(corpus.left_out),
        "skipped": unusable,
        "notes": _by_kind(measured),
        "invalid_landmark_frames": {
            "total": sum(m.invalid_frames for m in measured),
            "clips": {m.id: m.invalid_frames for m in measured if m.invalid_frames},
        },
        "seconds": {k: round(s, 1) for k, s in seconds.items()},
        "clips_per_s": round(len(measured) / sum(seconds.values()), 2),
        "peak_memory_mb": peak_memory_mb(),
        "face_models_sha256": builder.info.metadata["face_models_sha256"],
        "versions": {"python": platform.python_version(), "dataset": str(builder.version)} | package_versions(),
    }


def _by_kind(measured: list[Measured]) -> dict[str, dict[str, str]]:
    """The notes on clips that have a defect but are used: kind -> clip -> description."""
    kinds: dict[str, dict[str, str]] = {}
    for m in measured:
        for note in m.notes:
            kind, _, description = note.partition(": ")
            of_kind = kinds.setdefault(kind, {})
            of_kind[m.id] = f"{of_kind[m.id]}; {description}" if m.id in of_kind else description
    return dict(sorted(kinds.items()))


def peak_memory_mb() -> dict[str, int]:
    """Peak resident memory so far, of this process and of its largest worker."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    who = {"main": resource.RUSAGE_SELF, "largest_worker": resource.RUSAGE_CHILDREN}
    return {name: round(resource.getrusage(w).ru_maxrss / unit) for name, w in who.items()}


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that determine the records' bytes."""
    installed = {}
    for name in REPORTED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def summary(name: str, report: dict) -> str:
    """One line about a build."""
    clips = report["clips"]
    splits = ", ".join(f"{s} {n}" for s, n in report["splits"].items())
    empty = ", ".join(report["splits_without_a_clip"])
    notes = ", ".join(f"{len(of_kind)} {kind}" for kind, of_kind in report["notes"].items())
    written = f"{name}: {clips['written']} of {clips['found']} clips written ({splits})"
    left_out = f"; {clips['left_out']} left out, {clips['skipped']} skipped" if clips["left_out"] + clips["skipped"] else ""
    return written + left_out + (f"; no clip in {empty}" if empty else "") + (f"; noted: {notes}" if notes else "")


# ----------------------------------------------------------------------------------------------------------------- command


def prepare(args: argparse.Namespace) -> None:
    """Runs the whole build; raises ValueError or OSError with a one-line message for the user."""
    start = time.monotonic()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for the statistics; leaves a GPU free
    raw, data_dir = pathlib.Path(args.raw).expanduser(), pathlib.Path(args.data_dir).expanduser()
    cache, exclude = data_dir / CACHE, set().union(*map(speakers.read_ids, args.exclude))
    corpus = speakers.find_clips(raw, exclude, cache=cache, layout=args.layout)
    if not corpus.clips:
        raise ValueError(f"--raw={raw}: no clip found{speakers.explain_empty(corpus)}; {speakers.HOW_TO_GET_IT}")
    need_tensorflow()
    names = CONFIGS if args.builder_config == "all" else (args.builder_config,)
    for name in names:
        refuse_existing(dataset_folder(data_dir, name), args.overwrite)
    mouth = any(name.endswith("_mouth") for name in names)
    measured = measuring.measure_all(corpus, cache, mouth=mouth, workers=args.workers)
    measuring.check_skipped(measured, args.max_skipped)
    if not any(m.path for m in measured):
        raise ValueError(f"--raw={raw}: none of its {len(measured)} clips can be used; the first: {measured[0].unusable}")
    seconds = {"measuring": time.monotonic() - start}
    excluded = exclude | speakers.reserved_ids(raw)
    for name in names:
        folder = dataset_folder(data_dir, name)
        refuse_existing(folder, args.overwrite)  # checked again: another build may have written it meanwhile
        with replacing(folder):
            report = _build(name, args, exclude, corpus, measured, excluded=excluded, seconds=seconds)
        print(summary(name, report), f"\n  {folder}", flush=True)


def _build(name: str, args, exclude: set[str], corpus: speakers.RawCorpus, measured, *, excluded, seconds) -> dict:
    """Writes the records and the report of one builder config; returns the report."""
    start = time.monotonic()
    cache = pathlib.Path(args.data_dir).expanduser() / CACHE
    statistics = _train_statistics(_make_builder(name, args, exclude, measured), corpus, measured, cache)
    statistics_s, start = time.monotonic() - start, time.monotonic()
    builder = _make_builder(name, args, exclude, measured, statistics)
    pack(builder, pathlib.Path(args.raw).expanduser(), args.max_shard_mb)
    seconds = seconds | {"statistics": statistics_s, "packing": time.monotonic() - start}
    report = build_report(builder, corpus, measured, excluded=excluded, seconds=seconds)
    storage.write_text(builder.data_path / REPORT, json.dumps(report, indent=1) + "\n")
    return report


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    parser = Parser("avsi-prepare", description="Builds the dataset `grid` from raw Grid clips.")
    add = parser.add_argument
    add("--raw", required=True, metavar="DIR", help="folder with the corpus as downloaded, zipped or not: videos, alignments, wavs")
    add("--data_dir", required=True, metavar="DIR", help="folder of datasets: records go to DIR/grid/...")
    add("--builder_config", default=CONFIGS[0], choices=(*CONFIGS, "all"), help="default: %(default)s")
    add("--layout", default="grid", choices=speakers.LAYOUTS, help="folder: own recordings, one folder per speaker")
    add("--full_train", action="store_true", help="add validation_seen and test_seen to train, as in the paper")
    add("--max_skipped", type=float, default=0.02, metavar="SHARE", help="share of unusable clips allowed; default: %(default)s")
    add("--workers", type=int, default=_cores(), metavar="N", help="worker processes; default: one per core, %(default)s")
    add("--exclude", action="append", default=[], metavar="FILE", help="ids to leave out, one per line, as RESERVED.txt in --raw")
    add("--max_shard_mb", type=float, default=64, metavar="MB", help="size limit of a file of records; default: %(default)s")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    return parser


def check_numbers(options: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command with a usage error where a number is out of range."""
    if args.workers < 1 or args.max_shard_mb <= 0:
        options.error(f"--workers={args.workers} --max_shard_mb={args.max_shard_mb:g}: expected both above 0")
    if not 0 <= args.max_skipped <= 1:
        options.error(f"--max_skipped={args.max_skipped:g}: expected a share from 0 to 1")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@unexpected_errors.reported("avsi-prepare")
def main(argv: list[str] | None = None) -> int:
    """The command avsi-prepare; returns the exit status."""
    options = parser()
    args = options.parse_args(argv)
    check_numbers(options, args)
    try:
        prepare(args)
        return 0
    except (ValueError, OSError, ModuleNotFoundError) as e:
        message, status = f"avsi-prepare: {e}", 2
    except KeyboardInterrupt:
        message, status = "\navsi-prepare: stopped; the same command continues from here", 130
    gc.collect()  # progress bars held by the exception print once more when they are freed
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
