"""The TFDS builder of LibriSpeech: utterances -> records without video. Run by `python -m tfds_grid.librispeech`."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import tensorflow_datasets as tfds
from tensorflow_datasets.core import writer

from tfds_grid import grid_dataset_builder, librispeech_files


class Builder(tfds.core.GeneratorBasedBuilder):
    """Dataset `librispeech`, with one builder config for each part of the corpus; all speakers are in the split `train`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="test_clean", description="test-clean: 40 speakers, 5.4 hours")]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The unpacked folder of test-clean.tar.gz (https://www.openslr.org/12)."

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(grid_dataset_builder.record_features()),
            homepage="https://www.openslr.org/12",
            license="CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/)",
            disable_shuffling=False,  # records are ordered by hash of the id
        )

    def _example_writer(self) -> writer.ExampleWriter:
        return grid_dataset_builder.FixedOrderWriter(self.info.file_format)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {"train": self._generate_examples(librispeech_files.find_utterances(dl_manager.manual_dir))}

    def _generate_examples(self, files: dict[str, pathlib.Path]) -> Iterator[tuple[str, dict]]:
        transcripts: dict[str, str] = {}
        for utterance, path in files.items():
            if utterance not in transcripts:
                transcripts |= librispeech_files.read_transcripts(path.with_name(utterance.rpartition("-")[0] + ".trans.txt"))
            yield utterance, librispeech_files.make_record(utterance, path, transcripts.get(utterance, ""))
