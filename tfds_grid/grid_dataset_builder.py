"""The TFDS builder of the Grid corpus: clips -> splits of records. `avsi-prepare` drives it; `tfds build` can do without."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Iterator, Mapping
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from tfds_grid import clips, speakers

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


def _serialize_in_fixed_order(serializer, example) -> bytes:
    """Two builds give the same bytes."""
    return serializer.get_tf_example(example).SerializeToString(deterministic=True)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Dataset `grid`.

    full_train: fold validation_seen and test_seen back into train, as published. exclude: ids never to be used, besides those
    of RESERVED.txt in the raw folder. measured: where clips.measure_cached left the clips' measurements, by id; clips not in it
    are left out. Without it every clip of the raw folder (TFDS's manual_dir) is measured here, one after the other.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    BUILDER_CONFIGS = [
        GridConfig(name=name, description=_describe(protocol, mouth), protocol=protocol, mouth=mouth)
        for name, (protocol, mouth) in PROTOCOL_OF_CONFIG.items()
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    The Grid corpus, unpacked (https://doi.org/10.5281/zenodo.3625687): videos as s1/bbaf2n.mpg, alignments as
    alignments/s1/bbaf2n.align and, where there are any, sounds as audio_25k/s1/bbaf2n.wav, in one folder, named by
    --manual_dir (tfds build) or --raw (avsi-prepare).
    """

    def __init__(self, *, full_train: bool = False, exclude=(), measured: Mapping[str, pathlib.Path] | None = None, **kwargs):
        self._full_train, self._exclude, self._measured = full_train, frozenset(exclude), measured
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(doc="name of the clip: six characters that name the six words"),
            "speaker": tfds.features.Text(),
            "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, doc="16 kHz mono, its own length"),
            "offset_s": tfds.features.Scalar(np.float32, doc="seconds by which the sound lags the picture"),
            "landmarks": tfds.features.Tensor(shape=(None, 68, 2), dtype=np.float32, doc="pixels, iBUG-68 order"),
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
            picture = tfds.features.Image(shape=(96, 96, 1), encoding_format="jpeg")
            features["mouth"] = tfds.features.Sequence(picture, doc="aligned grey crop of the mouth, one a frame")
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            homepage="https://doi.org/10.5281/zenodo.3625687",
            metadata=tfds.core.MetadataDict(),  # filled while building: other readers need no face models
            disable_shuffling=False,  # order on disk is by hash of the id
        )

    def _download_and_prepare(self, *args, **kwargs):
        # TFDS writes the features of an example in the order of a hash that changes from process to process.
        with mock.patch.object(example_serializer.ExampleSerializer, "serialize_example", _serialize_in_fixed_order):
            return super()._download_and_prepare(*args, **kwargs)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        from avsi_jax import landmarks

        self.info.metadata["face_models_sha256"] = landmarks.model_fingerprint()
        self.info.metadata["measured_by_code_version"] = clips.CODE_VERSION
        self.info.metadata["full_train"] = self._full_train
        corpus = speakers.find_clips(dl_manager.manual_dir, self._exclude)
        return {split: self._generate_examples(members) for split, members in self.members(corpus).items()}

    def members(self, corpus: speakers.RawCorpus) -> dict[str, list[speakers.RawClip]]:
        """The clips of each split, in the order of their ids; no split without a clip."""
        config = self.builder_config
        members: dict[str, list[speakers.RawClip]] = {split: [] for split in speakers.SPLITS[config.protocol]}
        for clip in corpus.clips:
            if self._measured is None or clip.id in self._measured:
                members[speakers.split_of(clip.id, clip.speaker, config.protocol, full_train=self._full_train)].append(clip)
        return {split: found for split, found in members.items() if found}

    def _generate_examples(self, members: list[speakers.RawClip]) -> Iterator[tuple[str, dict]]:
        for clip in members:
            try:
                yield clip.id, clips.record(clip, self._measurement(clip))
            except clips.UnusableClipError as e:
                logging.warning("%s is left out: %s", clip.id, e)

    def _measurement(self, clip: speakers.RawClip) -> dict[str, np.ndarray]:
        if self._measured is None:
            return clips.measure(clip, mouth=self.builder_config.mouth)
        measured = clips.load_measured(self._measured[clip.id])
        return {name: value for name, value in measured.items() if name != "mouth" or self.builder_config.mouth}
