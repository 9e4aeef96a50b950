"""Builds the dataset with Apache Beam on a cluster: the same bytes as avsi-prepare writes (docs/beam.md).

    python -m tfds_grid.beam_build --raw=RAW --data_dir=DATA [flags of avsi-prepare] -- --runner=FlinkRunner [options of Beam]

All workers must see RAW under the same path. A stopped build starts from the beginning: workers share no cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import sys
import time

from etils import epath

from avsi_jax.runtime import storage, unexpected_errors
from tfds_grid import prepare, speakers

RUNNERS = "--runner=DataflowRunner, FlinkRunner, SparkRunner"


def build(args: argparse.Namespace, beam_options: list[str]) -> None:
    """Runs the whole build; raises ValueError or OSError with a one-line message for the user."""
    _need_beam()
    prepare.need_tensorflow()
    _check_runner(beam_options)
    raw, data_dir = pathlib.Path(args.raw).expanduser().absolute(), _absolute(args.data_dir)  # workers run in other folders
    exclude = set().union(*map(speakers.read_ids, args.exclude))
    corpus = speakers.find_clips(raw, exclude, cache=_unpack_folder(raw, data_dir), layout=args.layout)
    if not corpus.clips:
        raise ValueError(f"--raw={raw}: no clip found{speakers.explain_empty(corpus)}; {speakers.HOW_TO_GET_IT}")
    names = prepare.CONFIGS if args.builder_config == "all" else (args.builder_config,)
    for name in names:
        prepare.refuse_existing(prepare.dataset_folder(data_dir, name), args.overwrite)
    for name in names:
        start = time.monotonic()
        with prepare.replacing(prepare.dataset_folder(data_dir, name)):
            builder = _make_builder(name, args, data_dir, corpus, exclude, beam_options)
            prepare.pack(builder, raw, args.max_shard_mb)
            _report(builder, corpus, exclude | speakers.reserved_ids(raw), time.monotonic() - start)


def _need_beam() -> None:
    if importlib.util.find_spec("apache_beam") is None:
        raise ModuleNotFoundError(
            'apache-beam is not installed: pip install "avsi_jax[prepare,beam]" -c constraints/beam.txt, in a fresh environment'
        )


def _check_runner(beam_options: list[str]) -> None:
    """ValueError where no runner is named: Beam would use its test runner."""
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    if PipelineOptions(beam_options).view_as(StandardOptions).runner is None:
        raise ValueError(
            "no runner given, and Beam's default, the DirectRunner, is for tests (on one machine avsi-prepare is faster); "
            f"name one after two dashes: -- {RUNNERS} ... (docs/beam.md)"
        )


def _absolute(folder: str) -> epath.Path:
    """The absolute path of a local folder; a bucket's URL as it is."""
    return epath.Path(folder if "://" in folder else pathlib.Path(folder).expanduser().absolute())


def _unpack_folder(raw: pathlib.Path, data_dir: epath.Path) -> pathlib.Path:
    """Where compressed tars are unpacked, visible to all workers: the data_dir's cache, or below `raw` if data_dir is a bucket."""
    return (raw if "://" in str(data_dir) else pathlib.Path(data_dir)) / prepare.CACHE


def _make_builder(name: str, args, data_dir: epath.Path, corpus: speakers.RawCorpus, exclude: set[str], beam_options: list[str]):
    from tfds_grid import beam_pipeline

    return beam_pipeline.BeamBuilder(
        config=name,
        data_dir=data_dir,
        file_format="tfrecord",
        full_train=args.full_train,
        exclude=exclude,
        layout=args.layout,
        corpus=corpus,
        max_skipped=args.max_skipped,
        workers=args.workers,
        beam_options=beam_options,
    )


def _report(builder, corpus: speakers.RawCorpus, excluded: set[str], seconds: float) -> None:
    report = prepare.build_report(builder, corpus, builder.measured_by_beam, excluded=excluded, seconds={"pipeline": seconds})
    storage.write_text(builder.data_path / "build_report.json", json.dumps(report, indent=1) + "\n")
    print(prepare.summary(builder.builder_config.name, report), f"\n  {builder.data_path}", flush=True)


# ----------------------------------------------------------------------------------------------------------------- command


def _parser() -> argparse.ArgumentParser:
    parser = prepare.parser()
    parser.prog, parser.usage = "python -m tfds_grid.beam_build", "%(prog)s --raw=DIR --data_dir=DIR [flags] -- BEAM OPTIONS"
    parser.description = "Builds the dataset `grid` on a cluster with Apache Beam: the same bytes as avsi-prepare writes."
    parser.epilog = f"After two dashes: Beam's options, such as {RUNNERS}. --workers: child processes of each Beam worker."
    parser.set_defaults(workers=1)  # Beam itself starts one worker per core
    return parser


@unexpected_errors.reported("beam_build")
def main(argv: list[str] | None = None) -> int:
    """The command `python -m tfds_grid.beam_build`; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    ours = argv.index("--") if "--" in argv else len(argv)
    parser = _parser()
    args = parser.parse_args(argv[:ours])
    prepare.check_numbers(parser, args)
    try:
        build(args, argv[ours + 1 :])
    except (ValueError, OSError, ModuleNotFoundError) as e:
        print(f"beam_build: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbeam_build: stopped, nothing is kept; a job on a cluster runs until it is cancelled there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
