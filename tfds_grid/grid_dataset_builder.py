"""The TFDS builder of the Grid corpus: clips -> splits of records. `avsi-prepare` drives it; `tfds build` can do without."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2

from tfds_grid import clips, speakers

CACHE = ".cache"  # in the data_dir
STATISTICS_VERSION = 2  # raise when clip_sums gives other sums
AS_BYTES = tfds.features.Encoding.BYTES  # as they lie in memory: a third of the size of a list of numbers, and far quicker
PROTOCOL_OF_CONFIG = {  # each with and without the pictures of the mouth
    f"{protocol}{suffix}": (protocol, bool(suffix)) for protocol in speakers.SPLITS for suffix in ("", "_mouth")
}


@dataclasses.dataclass(kw_only=True)
class GridConfig(tfds.core.BuilderConfig):
    """protocol: who is in which split (speakers.split_of). mouth: whether records hold pictures of the mouth."""

    protocol: str
    mouth: bool


def _describe(protocol: str, mouth: bool) -> str:
    splits = {
        "speaker_independent": "s26 s27 s29 s31 in validation, s30 s32 s33 s34 in test, all others 80/10/10 by hash of the id",
        "speaker_dependent": "all speakers 80/10/10 by hash of the id",
    }[protocol]
    return splits + ("; with aligned grey pictures of the mouth" if mouth else "")


class FixedOrderWriter(writer.ExampleWriter):
    """Two builds give the same bytes: TFDS leaves the features of a record in an order that changes from process to process."""

    def write(self, path, examples):
        return super().write(path, ((key, _in_fixed_order(data)) for key, data in examples))


def _in_fixed_order(data: bytes) -> bytes:
    return tf_example_pb2.Example.FromString(data).SerializeToString(deterministic=True)


def clip_sums(example: dict) -> dict[str, np.ndarray]:
    """What a clip adds to the train statistics (avsi_jax.data.train_statistics, which brings jax)."""
    from avsi_jax.data import train_statistics

    return train_statistics.clip_sums(example)


def statistics_of(sums: Iterable[dict[str, np.ndarray]]) -> dict:
    """The train statistics of these clips, as the metadata holds them."""
    from avsi_jax.data import train_statistics

    return train_statistics.finish(functools.reduce(train_statistics.add, sums))


def _without_empty(examples: dict[str, Iterator]) -> dict[str, Iterator]:
    """Without the splits whose clips all turn out to be unusable, which TFDS takes for an error."""
    first = {split: next(found, None) for split, found in examples.items()}
    return {split: itertools.chain([first[split]], found) for split, found in examples.items() if first[split] is not None}


class Builder(tfds.core.GeneratorBasedBuilder):
    """Dataset `grid`.

    full_train: fold validation_seen and test_seen back into train, as published. layout, exclude: see speakers.find_clips.
    measured: where clips.measure_cached left the clips' measurements, by id; clips not in it are left out. Without it every clip
    of the raw folder (TFDS's manual_dir) is measured here, one after the other. statistics: of the train split, where they are
    known already.
    """

    VERSION = tfds.core.Version("2.1.0")
    RELEASE_NOTES = {
        "2.1.0": "Statistics of poses; the records are those of 2.0.0.",
        "2.0.0": "Speakers by the corpus' own table; video features 25 a second; sound and points stored as bytes; statistics.",
        "1.0.0": "First release.",
    }
    BUILDER_CONFIGS = [
        GridConfig(name=name, description=_describe(protocol, mouth), protocol=protocol, mouth=mouth)
        for name, (protocol, mouth) in PROTOCOL_OF_CONFIG.items()
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""
    One folder, named by --manual_dir (tfds build) or --raw (avsi-prepare): {speakers.HOW_TO_GET_IT}.
    """

    def __init__(
        self,
        *,
        full_train: bool = False,
        exclude=(),
        layout: str = "grid",
        measured: Mapping[str, pathlib.Path] | None = None,
        statistics: dict | None = None,
        **kwargs,
    ):
        self._full_train, self._exclude, self._layout = full_train, frozenset(exclude), layout
        self._measured, self._statistics = measured, statistics
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(doc="name of the clip: six characters that name the six words"),
            "speaker": tfds.features.Text(),
            "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding=AS_BYTES, doc="16 kHz mono, its own length"),
            "offset_s": tfds.features.Scalar(np.float32, doc="seconds by which the sound lags the picture"),
            "landmarks": tfds.features.Tensor(shape=(None, 68, 2), dtype=np.float32, encoding=AS_BYTES, doc="pixels, iBUG-68"),
            "landmarks_valid": tfds.features.Tensor(shape=(None,), dtype=np.bool_, doc="false: interpolated"),
            "frame_size": tfds.features.Tensor(shape=(2,), dtype=np.int32, doc="width, height"),
            "fps": tfds.features.Scalar(np.float32),
            "text": tfds.features.Text(doc="the six words"),
            "words": tfds.features.Sequence(
                {"word": tfds.features.Text(), "start_s": np.float32, "end_s": np.float32},
                doc="on the picture's clock; empty where there is no .align",
            ),
        }
        if self.builder_config.mouth:
            image = tfds.features.Image(shape=(96, 96, 1), encoding_format="jpeg")
            features["mouth"] = tfds.features.Sequence(image, doc="aligned grey crop of the mouth, one a frame")
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            homepage="https://doi.org/10.5281/zenodo.3625687",
            license="CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/)",
            metadata=tfds.core.MetadataDict(),  # filled while building: other readers need no face models
            disable_shuffling=False,  # order on disk is by hash of the id
        )

    def _example_writer(self) -> writer.ExampleWriter:
        return FixedOrderWriter(self.info.file_format)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        members = self.members(self.find_clips(dl_manager.manual_dir))
        self.describe_build()
        examples = {split: self._generate_examples(clips_of, split) for split, clips_of in members.items()}
        return examples if self._measured is not None else _without_empty(examples)

    def find_clips(self, raw) -> speakers.RawCorpus:
        """What the raw folder holds; compressed tars are unpacked to .cache in the data_dir."""
        return speakers.find_clips(raw, self._exclude, cache=pathlib.Path(self._data_dir_root) / CACHE, layout=self._layout)

    def describe_build(self) -> None:
        """Writes into the metadata how the records are made; the train statistics follow when its examples have been seen."""
        from avsi_jax.face import landmarks

        self.info.metadata["face_models_sha256"] = landmarks.model_fingerprint()
        self.info.metadata["measured_by_code_version"] = clips.CODE_VERSION
        self.info.metadata["full_train"] = self._full_train
        self.info.metadata["layout"] = self._layout
        if self._statistics is not None:
            self.info.metadata["train_statistics"] = self._statistics

    def members(self, corpus: speakers.RawCorpus) -> dict[str, list[speakers.RawClip]]:
        """The clips of each split, in the order of their ids; no split without a clip."""
        protocol, options = self.builder_config.protocol, {"full_train": self._full_train, "layout": self._layout}
        members: dict[str, list[speakers.RawClip]] = {split: [] for split in speakers.SPLITS[protocol]}
        for clip in corpus.clips:
            if self._measured is None or clip.id in self._measured:
                members[speakers.split_of(clip.id, clip.speaker, protocol, **options)].append(clip)
        return {split: found for split, found in members.items() if found}

    def _generate_examples(self, members: list[speakers.RawClip], split: str) -> Iterator[tuple[str, dict]]:
        seen = []
        for clip in members:
            try:
                example = self.example_of(clip)
            except clips.UnusableClipError as e:
                logging.warning("%s is left out: %s", clip.id, e)
                continue
            if split == "train" and self._statistics is None:
                seen.append(clip_sums(example))
            yield clip.id, example
        if seen:
            self.info.metadata["train_statistics"] = statistics_of(seen)

    def example_of(self, clip: speakers.RawClip) -> dict:
        """The features of a clip's record; UnusableClipError where it can't have one."""
        mouth = self.builder_config.mouth
        if self._measured is None:
            return clips.record(clip, clips.measure(clip, mouth=mouth))
        measured = clips.load_measured(self._measured[clip.id])
        return clips.record(clip, {name: value for name, value in measured.items() if name != "mouth" or mouth})
