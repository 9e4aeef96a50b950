"""What a Beam build does on its workers: clips -> records -> shards, the same bytes as avsi-prepare writes.

    clips in batches | measured, made into records | shards planned | shards written | one file that tells what became of all

TFDS's own Beam writer cuts shards by ranges of the hash, which gives them uneven lengths; here they are cut by the number of
records, as TFDS does without Beam. Clips are decoded in a child process (runtime/process_pool.py), which may hang or crash without harm; it
serves one batch, so that a pipeline that is cancelled leaves none behind.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import apache_beam as beam
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions, TypeOptions
from etils import epath
from tensorflow_datasets.core import example_serializer, hashing, naming, splits, writer
from tensorflow_datasets.core.utils import py_utils, shard_utils

import avsi_jax
from avsi_jax.runtime import process_pool as pool
from tfds_grid import clips, grid_dataset_builder, measuring, prepare, speakers

CLIPS_A_BATCH = 64  # half a minute of work: starting a child, about a second, is paid once a batch
OUTCOME = "outcome.json"  # in the folder of the records while they are made


# ----------------------------------------------------------------------------------------------------------------- measure


@dataclasses.dataclass(frozen=True)
class Job:
    """A clip and the split it is for."""

    clip: speakers.RawClip
    split: str


@dataclasses.dataclass(frozen=True)
class SystemOutput:
    """What became of a clip: its record, serialised, and the hash it is ordered by; or measured.unusable and no record."""

    measured: measuring.Measured
    split: str
    hash: int = 0
    record: bytes | None = None
    sums: Mapping[str, Any] | None = None  # for the statistics, of train only


class MakeRecords(beam.DoFn):
    """A batch of jobs -> Made, in any order. features: the dataset's; code: what code_here() is where the pipeline is made."""

    def __init__(self, features: tfds.features.FeaturesDict, *, mouth: bool, workers: int, code: dict[str, str]):
        self._features, self._mouth, self._workers, self._code = features, mouth, workers, code

    def setup(self):
        here = code_here()
        if other := [f"{name} {here.get(name)}, not {wanted}" for name, wanted in self._code.items() if here.get(name) != wanted]:
            raise RuntimeError(f"a worker of Beam has {'; '.join(other)}; install there what the command runs with")
        self._serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())

    def process(self, jobs: list[Job]) -> Iterator[SystemOutput]:
        with tempfile.TemporaryDirectory(prefix="avsi_") as cache:
            outcomes = pool.run(
                measuring.measure_one,
                [(job.clip, pathlib.Path(cache), self._mouth) for job in jobs],
                workers=self._workers,
                timeout_s=measuring.CLIP_TIMEOUT_S,
                memory_mb=measuring.CLIP_MEMORY_MB,
                start=measuring.start_worker,
            )
            for i, found, lost in outcomes:
                if lost:
                    found = measuring.Measured(jobs[i].clip.id, None, unusable=f"decoding it {lost}")
                yield self._made(jobs[i], found)

    def _made(self, job: Job, measured: measuring.Measured) -> SystemOutput:
        if measured.path is None:
            return SystemOutput(measured, job.split)
        example = clips.record(job.clip, clips.load_measured(measured.path))
        record = self._serializer.serialize_example(self._features.encode_example(example))
        sums = grid_dataset_builder.clip_sums(example) if job.split == "train" else None
        named = hashing.Hasher(job.split).hash_key(job.clip.id)
        return SystemOutput(dataclasses.replace(measured, path=None), job.split, named, record, sums)


def code_here() -> dict[str, str]:
    """What decides on the bytes of a record: releases, and the face models' hash."""
    from avsi_jax.face import landmarks

    own = {"avsi_jax": avsi_jax.__version__, "measuring": str(clips.CODE_VERSION), "face models": landmarks.model_fingerprint()}
    return prepare.package_versions() | own


class TrainStatistics(beam.CombineFn):
    """Sums of clips -> what the metadata holds; {} where there is no clip. Exact, so in any order."""

    def create_accumulator(self):
        return {}

    def add_input(self, sums, of_clip):
        return self.merge_accumulators([sums, of_clip])

    def merge_accumulators(self, accumulators):
        from avsi_jax.data import train_statistics

        total: dict = {}
        for sums in filter(None, accumulators):
            total = train_statistics.add(total, sums) if total else sums
        return total

    def extract_output(self, sums):
        return grid_dataset_builder.statistics_of([sums]) if sums else {}


# ------------------------------------------------------------------------------------------------------------------- write


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a split is cut: the hash that each of its shards begins with."""

    begins: list[int]

    def shard_of(self, record_hash: int) -> int:
        return bisect.bisect_right(self.begins, record_hash) - 1


def plan(sizes: Iterable[tuple[int, int]], config: shard_utils.ShardConfig) -> Plan:
    """Shards of as equal a number of records as can be; `sizes`: hash and bytes of every record of the split."""
    ordered = sorted(sizes)
    count = config.get_number_shards(sum(size for _, size in ordered), len(ordered))
    ends = shard_utils.get_shard_boundaries(len(ordered), count)
    return Plan([ordered[begin][0] for begin in (0, *ends[:-1])])


def assign(made: SystemOutput, plans: Mapping[str, Plan]) -> tuple[tuple[str, int, int], tuple[int, bytes]]:
    """((split, shard, shards), (hash, record))"""
    cut = plans[made.split]
    return (made.split, cut.shard_of(made.hash), len(cut.begins)), (made.hash, made.record)


def write_shard(
    shard: tuple[tuple[str, int, int], Iterable[tuple[int, bytes]]],
    templates: Mapping[str, naming.ShardedFileTemplate],
    example_writer: writer.ExampleWriter,
) -> tuple[str, int, int, int]:
    """Writes the records of a shard in the order of their hashes; returns its split, number, records and their bytes.

    It may be done twice, by two workers at once: the file appears whole, and is the same.
    """
    (split, number, count), records = shard
    ordered = sorted(records)
    path = epath.Path(templates[split].sharded_filepath(shard_index=number, num_shards=count))
    with py_utils.incomplete_files(path) as half:
        example_writer.write(half, ordered)
    return split, number, len(ordered), sum(len(record) for _, record in ordered)


def write_outcome(told: list[tuple[str, Any]], folder: epath.Path) -> None:
    outcome = {kind: [value for k, value in told if k == kind] for kind in ("measured", "shards", "statistics")}
    with py_utils.incomplete_file(folder / OUTCOME) as half:
        half.write_text(json.dumps(outcome))


# ---------------------------------------------------------------------------------------------------------------- pipeline


def batches(jobs: list[Job]) -> list[list[Job]]:
    return [jobs[i : i + CLIPS_A_BATCH] for i in range(0, len(jobs), CLIPS_A_BATCH)]


def make(pipeline: beam.Pipeline, jobs: list[Job], make_records: MakeRecords) -> beam.PCollection:
    """Made of every job. The second Reshuffle keeps runners that compute a collection again for each use from measuring again."""
    return (
        pipeline
        | "Clips" >> beam.Create(batches(jobs), reshuffle=False)
        | "Spread" >> beam.Reshuffle()
        | "Measure" >> beam.ParDo(make_records)
        | "Keep" >> beam.Reshuffle()
    )


def write(made: beam.PCollection, folder: epath.Path, templates, example_writer, config: shard_utils.ShardConfig) -> None:
    """The shards of every split that has records, and OUTCOME, into `folder`."""
    used = made | "Usable" >> beam.Filter(lambda m: m.record is not None)
    plans = (
        used
        | "Sizes" >> beam.Map(lambda m: (m.split, (m.hash, len(m.record))))
        | "BySplit" >> beam.GroupByKey()
        | "Plan" >> beam.MapTuple(lambda split, sizes: (split, plan(sizes, config)))
    )
    shards = (
        used
        | "Assign" >> beam.Map(assign, beam.pvalue.AsDict(plans))
        | "ByShard" >> beam.GroupByKey()
        | "WriteShards" >> beam.Map(write_shard, templates, example_writer)
        | "Shards" >> beam.Map(lambda shard: ("shards", shard))
    )
    statistics = (
        used
        | "OfTrain" >> beam.Filter(lambda m: m.sums is not None)
        | "Sums" >> beam.Map(lambda m: m.sums)
        | "Add" >> beam.CombineGlobally(TrainStatistics())
        | "Statistics" >> beam.Map(lambda found: ("statistics", found))
    )
    told = made | "Measured" >> beam.Map(lambda m: ("measured", dataclasses.asdict(m.measured)))
    outcome = (told, shards, statistics) | "Told" >> beam.Flatten() | "Together" >> beam.combiners.ToList()
    _ = outcome | "WriteOutcome" >> beam.Map(write_outcome, folder)


# ----------------------------------------------------------------------------------------------------------------- builder


class BeamBuilder(grid_dataset_builder.Builder, skip_registration=True):
    """Dataset `grid`, its clips those of `corpus`, measured and written by Beam.

    max_skipped: as measuring.check_skipped has it; workers: children a batch; beam_options: as on Beam's command line. After it has
    been prepared, measured_by_beam tells what became of every clip, in the order of their ids.
    """

    name = "grid"

    def __init__(self, *, corpus: speakers.RawCorpus, max_skipped: float, workers: int, beam_options: list[str], **kwargs):
        self.__module__ = grid_dataset_builder.__name__  # dataset_info.json names it
        self._corpus, self._max_skipped, self._workers, self._beam_options = corpus, max_skipped, workers, beam_options
        self.measured_by_beam: list[measuring.Measured] = []
        super().__init__(**kwargs)

    def _generate_splits(self, dl_manager, download_config) -> list[splits.SplitInfo]:
        self.describe_build()
        members, folder = self.members(self._corpus), self.data_path
        templates = {split: self._get_filename_template(split_name=split) for split in members}
        jobs = [Job(clip, split) for split, found in members.items() for clip in found]
        make_records = MakeRecords(
            self.info.features, mouth=self.builder_config.mouth, workers=self._workers, code=code_here()
        )  # fmt: skip
        options = PipelineOptions(self._beam_options)
        options.view_as(TypeOptions).pipeline_type_check = False  # types of pairs are guessed, some wrongly
        with beam.Pipeline(options=options) as pipeline:
            made = make(pipeline, jobs, make_records)
            write(made, folder, templates, self._example_writer(), download_config.get_shard_config())
        return self._read_outcome(folder / OUTCOME, templates)

    def _read_outcome(self, path: epath.Path, templates) -> list[splits.SplitInfo]:
        """What became of everything, by the file that the pipeline left; that file is removed."""
        outcome = json.loads(path.read_text())
        path.unlink()
        measured = (measuring.Measured(**{**m, "notes": tuple(m["notes"])}) for m in outcome["measured"])
        self.measured_by_beam = sorted(measured, key=lambda m: m.id)
        measuring.check_skipped(self.measured_by_beam, self._max_skipped)
        self._measured = {m.id: None for m in self.measured_by_beam if not m.unusable}
        if not self._measured:
            first, *_ = self.measured_by_beam
            raise ValueError(f"none of the {len(self.measured_by_beam)} clips can be used; the first: {first.unusable}")
        if outcome["statistics"] != [{}]:
            (self.info.metadata["train_statistics"],) = outcome["statistics"]
        return [self._split_info(split, outcome["shards"], templates[split]) for split in self.members(self._corpus)]

    def _split_info(self, split: str, shards: list, template: naming.ShardedFileTemplate) -> splits.SplitInfo:
        own = sorted((number, records, size) for of_split, number, records, size in shards if of_split == split)
        lengths, size = [records for _, records, _ in own], sum(size for *_, size in own)
        return splits.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)
