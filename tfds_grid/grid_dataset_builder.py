"""The TFDS builder of the Grid corpus: clips -> splits of records. Used by `avsi-prepare`, and directly by `tfds build`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2

from tfds_grid import clips, speakers

CACHE = ".cache"  # in the data_dir
STATISTICS_VERSION = 2  # raise when clip_sums gives other sums
AS_BYTES = tfds.features.Encoding.BYTES  # raw bytes: a third of the size of a list of numbers, and much faster to read
PROTOCOL_OF_CONFIG = {  # each with and without mouth crops
    f"{protocol}{suffix}": (protocol, bool(suffix)) for protocol in speakers.SPLITS for suffix in ("", "_mouth")
}


@dataclasses.dataclass(kw_only=True)
class GridConfig(tfds.core.BuilderConfig):
    """protocol: how speakers are split (speakers.split_of). mouth: whether records hold mouth crops."""

    protocol: str
    mouth: bool


def _describe(protocol: str, mouth: bool) -> str:
    splits = {
        "speaker_independent": "s26 s27 s29 s31 in validation, s30 s32 s33 s34 in test, all others 80/10/10 by hash of the id",
        "speaker_dependent": "all speakers 80/10/10 by hash of the id",
    }[protocol]
    return splits + ("; with aligned grey mouth crops" if mouth else "")


class FixedOrderWriter(writer.ExampleWriter):
    """Writes the features of a record in a fixed order, so that two builds give the same bytes.

    In TFDS their order changes from process to process.
    """

    def write(self, path: epath.PathLike, examples: Iterable[tuple[Any, bytes]]) -> Any:
        """As in the base class; examples are (key, serialised record)."""
        return super().write(path, ((key, _in_fixed_order(data)) for key, data in examples))


def _in_fixed_order(data: bytes) -> bytes:
    return tf_example_pb2.Example.FromString(data).SerializeToString(deterministic=True)


def clip_sums(example: dict) -> dict[str, np.ndarray]:
    """A clip's contribution to the train statistics (avsi_jax.data.train_statistics, which imports jax)."""
    from avsi_jax.data import train_statistics

    return train_statistics.clip_sums(example)


def statistics_of(sums: Iterable[dict[str, np.ndarray]]) -> dict:
    """The train statistics from the sums of clips, as the metadata holds them."""
    from avsi_jax.data import train_statistics

    return train_statistics.finish(functools.reduce(train_statistics.add, sums))


def record_features() -> dict[str, tfds.features.FeatureConnector]:
    """The features of a record by name, without mouth crops."""
    return {
        "id": tfds.features.Text(doc="id of the clip: six characters that encode its six words"),
        "speaker": tfds.features.Text(),
        "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding=AS_BYTES, doc="16 kHz mono, its own length"),
        "offset_s": tfds.features.Scalar(np.float32, doc="seconds by which the audio lags the video"),
        "landmarks": tfds.features.Tensor(shape=(None, 68, 2), dtype=np.float32, encoding=AS_BYTES, doc="pixels, iBUG-68"),
        "landmarks_valid": tfds.features.Tensor(shape=(None,), dtype=np.bool_, doc="false: interpolated"),
        "frame_size": tfds.features.Tensor(shape=(2,), dtype=np.int32, doc="width, height"),
        "fps": tfds.features.Scalar(np.float32),
        "text": tfds.features.Text(doc="the six words"),
        "words": tfds.features.Sequence(
            {"word": tfds.features.Text(), "start_s": np.float32, "end_s": np.float32},
            doc="times on the video's clock; empty where there is no .align",
        ),
    }


def _without_empty(examples: dict[str, Iterator]) -> dict[str, Iterator]:
    """Removes the splits whose clips are all unusable: TFDS raises an error for an empty split."""
    first = {split: next(iterator, None) for split, iterator in examples.items()}
    return {split: itertools.chain([first[split]], rest) for split, rest in examples.items() if first[split] is not None}


class Builder(tfds.core.GeneratorBasedBuilder):
    """Dataset `grid`.

    full_train: add validation_seen and test_seen to train, as in the paper. layout, exclude: see speakers.find_clips.
    measured: files of clips.measure_cached by clip id; other clips are left out. Without it every clip of the raw folder (TFDS's
    manual_dir) is measured here, one after the other. statistics: of the train split, if they are known already.
    """

    VERSION = tfds.core.Version("2.1.0")
    RELEASE_NOTES = {
        "2.1.0": "Statistics of poses; the records are those of 2.0.0.",
        "2.0.0": "Speakers by the corpus' own table; video features at 25 fps; audio and landmarks as bytes; statistics.",
        "1.0.0": "First release.",
    }
    BUILDER_CONFIGS = [
        GridConfig(name=name, description=_describe(protocol, mouth), protocol=protocol, mouth=mouth)
        for name, (protocol, mouth) in PROTOCOL_OF_CONFIG.items()
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""
    One folder, given by --manual_dir (tfds build) or --raw (avsi-prepare): {speakers.HOW_TO_GET_IT}.
    """

    def __init__(
        self,
        *,
        full_train: bool = False,
        exclude: Iterable[str] = (),
        layout: str = "grid",
        measured: Mapping[str, pathlib.Path] | None = None,
        statistics: dict | None = None,
        **kwargs,
    ):
        self._full_train, self._exclude, self._layout = full_train, frozenset(exclude), layout
        self._measured, self._statistics = measured, statistics
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = record_features()
        if self.builder_config.mouth:
            image = tfds.features.Image(shape=(96, 96, 1), encoding_format="jpeg")
            features["mouth"] = tfds.features.Sequence(image, doc="aligned grey mouth crop, one per frame")
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            homepage="https://doi.org/10.5281/zenodo.3625687",
            license="CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/)",
            metadata=tfds.core.MetadataDict(),  # filled during the build: readers need no face models
            disable_shuffling=False,  # records are ordered by hash of the id
        )

    def _example_writer(self) -> writer.ExampleWriter:
        return FixedOrderWriter(self.info.file_format)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        members = self.members(self.find_clips(dl_manager.manual_dir))
        self.describe_build()
        examples = {split: self._generate_examples(clips_of, split) for split, clips_of in members.items()}
        return examples if self._measured is not None else _without_empty(examples)

    def find_clips(self, raw: epath.PathLike) -> speakers.RawCorpus:
        """The clips of the raw folder; compressed tars are unpacked to .cache in the data_dir."""
        return speakers.find_clips(raw, self._exclude, cache=pathlib.Path(self._data_dir_root) / CACHE, layout=self._layout)

    def describe_build(self) -> None:
        """Records in the metadata how the records are made, and the train statistics if they are known already."""
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
        return {split: clips_of_split for split, clips_of_split in members.items() if clips_of_split}

    def _generate_examples(self, members: list[speakers.RawClip], split: str) -> Iterator[tuple[str, dict]]:
        sums = []
        for clip in members:
            try:
                example = self.example_of(clip)
            except clips.UnusableClipError as e:
                logging.warning("%s is left out: %s", clip.id, e)
                continue
            if split == "train" and self._statistics is None:
                sums.append(clip_sums(example))
            yield clip.id, example
        if sums:
            self.info.metadata["train_statistics"] = statistics_of(sums)

    def example_of(self, clip: speakers.RawClip) -> dict:
        """The features of a clip's record; UnusableClipError where the clip can't be used."""
        mouth = self.builder_config.mouth
        if self._measured is None:
            return clips.record(clip, clips.measure(clip, mouth=mouth))
        measured = clips.load_measured(self._measured[clip.id])
        return clips.record(clip, {name: value for name, value in measured.items() if name != "mouth" or mouth})
