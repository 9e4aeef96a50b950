"""LibriSpeech utterances: audio files, transcripts, and the features of their records."""

from __future__ import annotations

import pathlib
import re

import numpy as np

from avsi_jax import presets
from avsi_jax.media import clip_io

UTTERANCE = re.compile(r"(\d+)-(\d+)-(\d{4})")  # speaker, chapter and number: the name of a .flac without its suffix


def find_utterances(raw: pathlib.Path) -> dict[str, pathlib.Path]:
    """Utterance id, such as '1089-134686-0000', -> its .flac, for all files below the folder `raw`, sorted by id."""
    files = {path.stem: path for path in pathlib.Path(raw).rglob("*.flac") if UTTERANCE.fullmatch(path.stem)}
    return dict(sorted(files.items()))


def read_transcripts(path: pathlib.Path) -> dict[str, str]:
    """Utterance id -> transcript in lower case, from the .trans.txt of a chapter; {} if there is no such file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {utterance: transcript.lower() for utterance, _, transcript in (line.partition(" ") for line in lines)}


def make_record(utterance: str, path: pathlib.Path, transcript: str) -> dict:
    """The features of the record of an utterance: its whole audio, (N,) int16 mono at 16 kHz, and no video (T = 0)."""
    audio = clip_io.read_clip(path).audio
    return {
        "id": utterance,
        "speaker": f"librispeech-{utterance.partition('-')[0]}",
        "audio": clip_io.to_int16(clip_io.resample(clip_io.mono(audio.samples), audio.rate, presets.RECORD_RATE)),
        "offset_s": np.float32(0),
        "landmarks": np.zeros((0, presets.NUM_LANDMARKS, 2), np.float32),
        "landmarks_valid": np.zeros(0, bool),
        "frame_size": np.array([360, 288], np.int32),  # as in Grid; there are no frames, but features are divided by it
        "fps": np.float32(presets.GRID_FPS),
        "text": transcript,
        "words": [],
    }
