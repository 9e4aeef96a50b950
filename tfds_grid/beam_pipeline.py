"""The Beam pipeline of a build: clips -> records -> shards, the same bytes as avsi-prepare writes.

    batches of clips | measure, make records | plan shards | write shards | write one file with the results of all clips

TFDS's own Beam writer cuts shards by ranges of the hash, which makes their lengths uneven; here they are cut by the number of
records, as TFDS does without Beam. Clips are decoded in a child process (runtime/process_pool.py), so a clip that hangs or crashes
its decoder is only skipped. A child serves one batch, so that a cancelled pipeline leaves none behind.
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

CLIPS_PER_BATCH = 64  # half a minute of work; starting a child process takes about a second per batch
RESULTS_FILE = "outcome.json"  # in the folder of the records during the build


# ----------------------------------------------------------------------------------------------------------------- measure


@dataclasses.dataclass(frozen=True)
class Job:
    """A clip and its split."""

    clip: speakers.RawClip
    split: str


@dataclasses.dataclass(frozen=True)
class ClipResult:
    """The result for one clip: its serialised record and the hash that orders it, or measured.unusable and no record."""

    measured: measuring.Measured
    split: str
    hash: int = 0
    record: bytes | None = None
    sums: Mapping[str, Any] | None = None  # contribution to the train statistics, only for clips of train


class MakeRecords(beam.DoFn):
    """A batch of jobs -> ClipResults, in any order. code: what code_here() returns where the pipeline is built."""

    def __init__(self, features: tfds.features.FeaturesDict, *, mouth: bool, workers: int, code: dict[str, str]):
        self._features, self._mouth, self._workers, self._code = features, mouth, workers, code

    def setup(self):
        here = code_here()
        if other := [f"{name} {here.get(name)}, not {wanted}" for name, wanted in self._code.items() if here.get(name) != wanted]:
            raise RuntimeError(f"a Beam worker has {'; '.join(other)}; install the same versions there")
        self._serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())

    def process(self, jobs: list[Job]) -> Iterator[ClipResult]:
        with tempfile.TemporaryDirectory(prefix="avsi_") as cache:
            outcomes = pool.run(
                measuring.measure_one,
                [(job.clip, pathlib.Path(cache), self._mouth) for job in jobs],
                workers=self._workers,
                timeout_s=measuring.CLIP_TIMEOUT_S,
                memory_mb=measuring.CLIP_MEMORY_MB,
                start=measuring.start_worker,
            )
            for i, measured, failure in outcomes:
                if failure:
                    measured = measuring.Measured(jobs[i].clip.id, None, unusable=f"decoding it {failure}")
                yield self._result(jobs[i], measured)

    def _result(self, job: Job, measured: measuring.Measured) -> ClipResult:
        if measured.path is None:
            return ClipResult(measured, job.split)
        example = clips.record(job.clip, clips.load_measured(measured.path))
        record = self._serializer.serialize_example(self._features.encode_example(example))
        sums = grid_dataset_builder.clip_sums(example) if job.split == "train" else None
        key_hash = hashing.Hasher(job.split).hash_key(job.clip.id)
        return ClipResult(dataclasses.replace(measured, path=None), job.split, key_hash, record, sums)


def code_here() -> dict[str, str]:
    """The versions that determine the bytes of a record: packages, and the face models' hash."""
    from avsi_jax.face import landmarks

    own = {"avsi_jax": avsi_jax.__version__, "measuring": str(clips.CODE_VERSION), "face models": landmarks.model_fingerprint()}
    return prepare.package_versions() | own


class TrainStatistics(beam.CombineFn):
    """Sums of clips -> train statistics as the metadata holds them; {} without clips. Sums are exact, so order does not matter."""

    def create_accumulator(self):
        return {}

    def add_input(self, sums, clip_sums):
        return self.merge_accumulators([sums, clip_sums])

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
    """How a split is cut into shards: the first hash of each shard."""

    first_hashes: list[int]

    def shard_of(self, record_hash: int) -> int:
        """The number of the shard that holds the record of this hash."""
        return bisect.bisect_right(self.first_hashes, record_hash) - 1


def plan(sizes: Iterable[tuple[int, int]], config: shard_utils.ShardConfig) -> Plan:
    """Shards with numbers of records as equal as possible. sizes: (hash, bytes) of every record of the split."""
    ordered = sorted(sizes)
    count = config.get_number_shards(sum(size for _, size in ordered), len(ordered))
    ends = shard_utils.get_shard_boundaries(len(ordered), count)
    return Plan([ordered[begin][0] for begin in (0, *ends[:-1])])


def assign(result: ClipResult, plans: Mapping[str, Plan]) -> tuple[tuple[str, int, int], tuple[int, bytes]]:
    """The shard of a record: ((split, shard, shards), (hash, record))."""
    shard_plan = plans[result.split]
    return (result.split, shard_plan.shard_of(result.hash), len(shard_plan.first_hashes)), (result.hash, result.record)


def write_shard(
    shard: tuple[tuple[str, int, int], Iterable[tuple[int, bytes]]],
    templates: Mapping[str, naming.ShardedFileTemplate],
    example_writer: writer.ExampleWriter,
) -> tuple[str, int, int, int]:
    """Writes the records of a shard in the order of their hashes; returns (split, shard, number of records, bytes of records).

    Two workers may write the same shard at once: the bytes are the same, and the file appears only when it is complete.
    """
    (split, number, count), records = shard
    ordered = sorted(records)
    path = epath.Path(templates[split].sharded_filepath(shard_index=number, num_shards=count))
    with py_utils.incomplete_files(path) as temporary:
        example_writer.write(temporary, ordered)
    return split, number, len(ordered), sum(len(record) for _, record in ordered)


def write_results(results: list[tuple[str, Any]], folder: epath.Path) -> None:
    """Writes RESULTS_FILE: measurements, shards and statistics, as lists."""
    by_kind = {kind: [value for k, value in results if k == kind] for kind in ("measured", "shards", "statistics")}
    with py_utils.incomplete_file(folder / RESULTS_FILE) as temporary:
        temporary.write_text(json.dumps(by_kind))


# ---------------------------------------------------------------------------------------------------------------- pipeline


def batches(jobs: list[Job]) -> list[list[Job]]:
    """Jobs in batches of CLIPS_PER_BATCH."""
    return [jobs[i : i + CLIPS_PER_BATCH] for i in range(0, len(jobs), CLIPS_PER_BATCH)]


def make(pipeline: beam.Pipeline, jobs: list[Job], make_records: MakeRecords) -> beam.PCollection:
    """The ClipResult of every job. Without the second Reshuffle some runners would measure again for each use of the results."""
    return (
        pipeline
        | "Clips" >> beam.Create(batches(jobs), reshuffle=False)
        | "Spread" >> beam.Reshuffle()
        | "Measure" >> beam.ParDo(make_records)
        | "Keep" >> beam.Reshuffle()
    )


def write(
    clip_results: beam.PCollection,
    folder: epath.Path,
    templates: Mapping[str, naming.ShardedFileTemplate],
    example_writer: writer.ExampleWriter,
    config: shard_utils.ShardConfig,
) -> None:
    """Writes the shards of every split that has records, and RESULTS_FILE, into `folder`."""
    used = clip_results | "Usable" >> beam.Filter(lambda m: m.record is not None)
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
        | "Statistics" >> beam.Map(lambda statistics: ("statistics", statistics))
    )
    measured = clip_results | "Measured" >> beam.Map(lambda m: ("measured", dataclasses.asdict(m.measured)))
    results = (measured, shards, statistics) | "Results" >> beam.Flatten() | "Together" >> beam.combiners.ToList()
    _ = results | "WriteResults" >> beam.Map(write_results, folder)


# ----------------------------------------------------------------------------------------------------------------- builder


class BeamBuilder(grid_dataset_builder.Builder, skip_registration=True):
    """Dataset `grid` of the clips of `corpus`, measured and written by Beam.

    max_skipped: as for measuring.check_skipped; workers: child processes per batch; beam_options: as on Beam's command line. After
    download_and_prepare, measured_by_beam holds the result for every clip, in the order of their ids.
    """

    name = "grid"

    def __init__(self, *, corpus: speakers.RawCorpus, max_skipped: float, workers: int, beam_options: list[str], **kwargs):
        self.__module__ = grid_dataset_builder.__name__  # recorded in dataset_info.json
        self._corpus, self._max_skipped, self._workers, self._beam_options = corpus, max_skipped, workers, beam_options
        self.measured_by_beam: list[measuring.Measured] = []
        super().__init__(**kwargs)

    def _generate_splits(self, dl_manager, download_config) -> list[splits.SplitInfo]:
        self.describe_build()
        members, folder = self.members(self._corpus), self.data_path
        templates = {split: self._get_filename_template(split_name=split) for split in members}
        jobs = [Job(clip, split) for split, clips_of_split in members.items() for clip in clips_of_split]
        make_records = MakeRecords(
            self.info.features, mouth=self.builder_config.mouth, workers=self._workers, code=code_here()
        )  # fmt: skip
        options = PipelineOptions(self._beam_options)
        options.view_as(TypeOptions).pipeline_type_check = False  # Beam infers some types of pairs wrongly
        with beam.Pipeline(options=options) as pipeline:
            clip_results = make(pipeline, jobs, make_records)
            write(clip_results, folder, templates, self._example_writer(), download_config.get_shard_config())
        return self._read_results(folder / RESULTS_FILE, templates)

    def _read_results(self, path: epath.Path, templates) -> list[splits.SplitInfo]:
        """Reads, then removes, the file of results that the pipeline wrote."""
        results = json.loads(path.read_text())
        path.unlink()
        measured = (measuring.Measured(**{**m, "notes": tuple(m["notes"])}) for m in results["measured"])
        self.measured_by_beam = sorted(measured, key=lambda m: m.id)
        measuring.check_skipped(self.measured_by_beam, self._max_skipped)
        self._measured = {m.id: None for m in self.measured_by_beam if not m.unusable}
        if not self._measured:
            first, *_ = self.measured_by_beam
            raise ValueError(f"none of the {len(self.measured_by_beam)} clips can be used; the first: {first.unusable}")
        if results["statistics"] != [{}]:
            (self.info.metadata["train_statistics"],) = results["statistics"]
        return [self._split_info(split, results["shards"], templates[split]) for split in self.members(self._corpus)]

    def _split_info(self, split: str, shards: list, template: naming.ShardedFileTemplate) -> splits.SplitInfo:
        own = sorted((number, records, size) for of_split, number, records, size in shards if of_split == split)
        lengths, size = [records for _, records, _ in own], sum(size for *_, size in own)
        return splits.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)
