"""The build of avsi-prepare as an Apache Beam pipeline, for a cluster: the same records, the same bytes (docs/beam.md).

    python -m tfds_grid.beam_build --raw=RAW --data_dir=DATA [flags of avsi-prepare] -- --runner=FlinkRunner [options of Beam]

RAW lies where all workers see it, under the same path. Nothing is kept of a stopped build: workers share no cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import sys
import time

from etils import epath

from avsi_jax.runtime import unexpected_errors
from tfds_grid import prepare, speakers

RUNNERS = "--runner=DataflowRunner, FlinkRunner, SparkRunner"


def build(args, beam_options: list[str]) -> None:
    """The whole build; raises ValueError or OSError with one line for the user."""
    _need_beam()
    prepare.need_tensorflow()
    _check_runner(beam_options)
    raw, data_dir = pathlib.Path(args.raw).expanduser().absolute(), _absolute(args.data_dir)  # workers stand in other folders
    exclude = set().union(*map(speakers.read_ids, args.exclude))
    corpus = speakers.find_clips(raw, exclude, cache=_place_to_unpack(raw, data_dir), layout=args.layout)
    if not corpus.clips:
        raise ValueError(f"--raw={raw}: found no clip{speakers.why_none(corpus)}; {speakers.HOW_TO_GET_IT}")
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
    """ValueError where no runner is named: Beam would take the one for tests."""
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    if PipelineOptions(beam_options).view_as(StandardOptions).runner is None:
        raise ValueError(
            "no runner given, and Beam's own choice, the DirectRunner, is for tests (on one machine avsi-prepare is the quicker "
            f"build); name one after two dashes: -- {RUNNERS} ... (docs/beam.md)"
        )


def _absolute(folder: str) -> epath.Path:
    """A local folder or a bucket's."""
    return epath.Path(folder if "://" in folder else pathlib.Path(folder).expanduser().absolute())


def _place_to_unpack(raw: pathlib.Path, data_dir: epath.Path) -> pathlib.Path:
    """Where compressed tars go, for all workers to see: as in avsi-prepare, or beside them where the records go to a bucket."""
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


def _report(builder, corpus: speakers.RawCorpus, banned: set[str], seconds: float) -> None:
    report = prepare.build_report(builder, corpus, builder.measured_by_beam, banned=banned, seconds={"pipeline": seconds})
    (builder.data_path / "build_report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(prepare.summary(builder.builder_config.name, report), f"\n  {builder.data_path}", flush=True)


# ----------------------------------------------------------------------------------------------------------------- command


def _parser() -> argparse.ArgumentParser:
    parser = prepare.parser()
    parser.prog, parser.usage = "python -m tfds_grid.beam_build", "%(prog)s --raw=DIR --data_dir=DIR [flags] -- BEAM OPTIONS"
    parser.description = "Builds the dataset `grid` on a cluster, by Apache Beam: the same bytes as avsi-prepare."
    parser.epilog = f"After two dashes: the options of Beam, such as {RUNNERS}. --workers: children that a worker of Beam's keeps."
    parser.set_defaults(workers=1)  # Beam starts a worker a core itself
    return parser


@unexpected_errors.reported("beam_build")
def main(argv=None) -> int:
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
        print("\nbeam_build: stopped, nothing is kept; a job on a cluster runs on until it is cancelled there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
