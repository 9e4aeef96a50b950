"""Builds LibriSpeech as records without video: the dataset `librispeech`, for training with config.audio_only_clips.

    python -m tfds_grid.librispeech --raw=DIR --data_dir=DATA

The records have the features of Grid's, so avsi_jax.data.tfrecords reads both: whole utterances, no video frames, the transcript as
text and no word times. Training takes excerpts of them (`input_pipeline.audio_excerpt`).

V. Panayotov, G. Chen, D. Povey, S. Khudanpur, "LibriSpeech: an ASR corpus based on public domain audio books", ICASSP 2015
(https://www.openslr.org/12, CC BY 4.0).
"""

from __future__ import annotations

import pathlib
import sys

from avsi_jax.runtime import unexpected_errors
from avsi_jax.runtime.command_line import Parser
from tfds_grid import librispeech_files, prepare

NAME = "python -m tfds_grid.librispeech"


@unexpected_errors.reported(NAME)
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 0 if the dataset was written, else 2."""
    parser = Parser(NAME, description="Builds the dataset `librispeech`.")
    parser.add_argument("--raw", required=True, metavar="DIR", help="folder with the .flac and .trans.txt files of test-clean")
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="records are written to DIR/librispeech/test_clean/...")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    args = parser.parse_args(argv)
    raw = pathlib.Path(args.raw).expanduser()
    try:
        if not librispeech_files.find_utterances(raw):
            raise FileNotFoundError(f"--raw={raw}: found no utterances, expected files such as 1089/134686/1089-134686-0000.flac")
        prepare.need_tensorflow()
        from tfds_grid import librispeech_dataset_builder

        data_dir = pathlib.Path(args.data_dir).expanduser()
        make_builder = lambda: librispeech_dataset_builder.Builder(config="test_clean", data_dir=data_dir, file_format="tfrecord")
        builder = make_builder()
        if builder.data_path.exists() and not args.overwrite:
            raise FileExistsError(f"{builder.data_path} already holds a dataset; pass --overwrite, or choose another --data_dir")
        with prepare.replacing(builder.data_path):
            builder = make_builder()
            prepare.pack(builder, raw, max_shard_mb=64)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{builder.data_path}: {builder.info.splits['train'].num_examples} utterances")
    return 0


if __name__ == "__main__":
    sys.exit(main())
