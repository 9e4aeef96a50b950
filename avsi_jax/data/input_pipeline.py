"""Input pipeline: batches of raw audio, landmarks and labels from records, in a resumable order. The only module that uses grain.

Audio stays int16 at 16 kHz and landmarks stay in pixels: gaps, spectrograms and motion are computed on the device
(data/features.py). A damaged record raises RecordError (data/tfrecords.py documents when); it is never skipped.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from avsi_jax import presets
from avsi_jax.data import grid_text
from avsi_jax.data.tfrecords import MissingSplitError, RecordError, Records, find_dataset

__all__ = ["MissingSplitError", "RecordError", "Records", "eval_batches", "find_dataset", "id_hash", "to_example", "train_batches"]

READ_THREADS = 4
PREFETCHED_BATCHES = 8


# ------------------------------------------------------------------------------------------------------- stored -> example


def id_hash(clip_id: str) -> np.uint32:
    """The number that seeds a clip's random draws: the first four bytes of sha256(id), big-endian."""
    return np.uint32(int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:4], "big"))


def to_example(raw: dict, record_samples: int = 48_000, num_frames: int = presets.GRID_FRAMES) -> dict:
    """Converts a stored example to fixed shapes.

    Returns, with N = record_samples and T = num_frames:
      clip_id: str; id_hash: () uint32.
      audio: (N,) int16 at 16 kHz, zero-padded or cut; audio_length: () int32, number of samples before the padding.
      landmarks: (T, 68, 2) float32 px, padded with the last frame or cut; num_frames: () int32, frames before the padding;
        landmarks_valid: (T,) bool.
      offset_s: () float32, A/V offset, positive if the audio lags the video; frame_size: (2,) int32 width and height; fps: ()
        float32.
      labels: (41,) int32 characters of the text; phones: (23,) int32; both zero-padded. label_length, phone_length: () int32; 0
        if the text contains symbols without a label or is too long.
      speech: (2,) float32, start of the first and end of the last word on the clock of the audio, or the full clip if there are no
        words; has_words: () bool.
      weight: () float32, 1.
    """
    audio, audio_length = _fit(raw["audio"], record_samples)
    points, frames = _fit(raw["landmarks"], num_frames)
    points[frames:] = points[frames - 1]
    valid, _ = _fit(raw["landmarks_valid"], num_frames)
    labels, label_length = _labels(grid_text.encode, raw["text"], grid_text.MAX_LABELS)
    phones, phone_length = _labels(grid_text.encode_phones, raw["text"], grid_text.MAX_PHONES)
    return {
        "clip_id": raw["id"],
        "id_hash": id_hash(raw["id"]),
        "audio": audio,
        "audio_length": np.int32(audio_length),
        "landmarks": points,
        "num_frames": np.int32(frames),
        "landmarks_valid": valid,
        "offset_s": np.float32(raw["offset_s"]),
        "frame_size": np.asarray(raw["frame_size"], np.int32),
        "fps": np.float32(raw["fps"]),
        "labels": labels,
        "label_length": np.int32(label_length),
        "phones": phones,
        "phone_length": np.int32(phone_length),
        "speech": _speech(raw, audio_length / presets.RECORD_RATE),
        "has_words": np.bool_(len(raw["words"]) > 0),
        "weight": np.float32(1),
    }


def _fit(x: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """x cut or zero-padded along its first axis to `length`, and the number of its elements that come from x."""
    count = min(len(x), length)
    fitted = np.zeros((length, *x.shape[1:]), x.dtype)
    fitted[:count] = x[:count]
    return fitted, count


def _labels(encode: Callable[[str], np.ndarray], text: str, length: int) -> tuple[np.ndarray, int]:
    """The labels of a text, padded to `length`; none if `encode` rejects the text or returns more than `length` labels."""
    try:
        labels = encode(text)
    except ValueError:
        labels = np.zeros(0, np.int32)
    return _fit(labels if len(labels) <= length else labels[:0], length)


def _speech(raw: dict, duration_s: float) -> np.ndarray:
    """(2,) s on the clock of the audio. Word times are on the clock of the video, which the audio lags by offset_s."""
    words = raw["words"]
    if not words:
        return np.array([0, duration_s], np.float32)
    return np.array([words[0]["start_s"], words[-1]["end_s"]], np.float32) + np.float32(raw["offset_s"])


def audio_excerpt(raw: dict, position: float, record_samples: int = 48_000, num_frames: int = presets.GRID_FRAMES) -> dict:
    """An excerpt of a recording without video, with the fields of a stored example.

    raw: a stored example with audio (n,) int16 at 16 kHz. position: start of the excerpt of record_samples, in [0, 1]: 0 is the
    beginning of the recording, and with 1 the excerpt ends with it. A shorter recording is returned whole.
    No frame has valid landmarks, so the video stream is dropped for this clip. The text is empty, because the words of an excerpt
    are not known: the clip does not contribute to the CTC loss.
    """
    start = round(position * max(len(raw["audio"]) - record_samples, 0))
    return raw | {
        "audio": raw["audio"][start : start + record_samples],
        "landmarks": np.zeros((num_frames, presets.NUM_LANDMARKS, 2), np.float32),
        "landmarks_valid": np.zeros(num_frames, bool),
        "text": "",
        "words": [],
    }


# ---------------------------------------------------------------------------------------------------------------- batches


class AudioOnly(NamedTuple):
    """Recordings without video for training: `count` rows of each global batch are excerpts of them."""

    records: Sequence[dict]
    count: int


def train_batches(
    records: Sequence[dict],
    batch_size: int,
    seed: int,
    *,
    audio_only: AudioOnly | None = None,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
) -> Iterator[dict]:
    """Endless batches from training step `start_step` on.

    The clips are traversed in passes. A pass contains every clip once, in an order that depends only on (seed, pass number). Passes
    follow each other without a break: a batch may contain the end of one and the start of the next, and no clip is dropped or
    repeated to fill it. A batch therefore ends with a pass only if batch_size divides the number of clips, and epochs counted as
    len(records) // batch_size steps fall behind the passes by the remainder.

    The global batch of a step depends only on (seed, batch_size, step); process p gets the p-th of `process_count` equal slices of
    its rows. The iterator has get_state(), which returns a small JSON-serialisable dict, and set_state(state). RecordError for an
    empty split, ValueError if process_count does not divide batch_size.

    audio_only: the last audio_only.count rows of the global batch are excerpts of its recordings, which have passes of their own;
    the position of an excerpt is drawn from seed and row, so it differs from pass to pass. ValueError unless the batch also has
    clips with video.
    """
    import grain.python as grain

    if len(records) == 0:
        raise RecordError("no clips to train on: the split is empty")
    rows, row_at = _rows_per_process(batch_size, process_count), _order_of_rows(records, batch_size, seed, audio_only)

    def example_at(row: _Row) -> dict:
        if row.position is None:
            return to_example(records[row.clip])
        return to_example(audio_excerpt(audio_only.records[row.clip], row.position))

    def batch_at(step: int) -> dict:
        begin = process_index * rows
        return _batch([example_at(row_at(step, number)) for number in range(begin, begin + rows)])

    batches = iter(_prefetched(grain.MapDataset.range(sys.maxsize).map(batch_at)))  # grain's repeat().batch(1) fails
    batches.set_state(batches.get_state() | {"next_index": start_step})
    return batches


def clip_ids_of_step(records: Records, batch_size: int, seed: int, step: int, audio_only: AudioOnly | None = None) -> list[str]:
    """The ids of the global batch of `train_batches` at a training step, counted from 0."""
    row_at = _order_of_rows(records, batch_size, seed, audio_only)
    rows = [row_at(step, number) for number in range(batch_size)]
    return [(records if row.position is None else audio_only.records).clip_ids[row.clip] for row in rows]


class _Row(NamedTuple):
    """A row of a batch: the number of its clip or recording, and the position of an excerpt, in [0, 1]."""

    clip: int
    position: float | None = None


def _order_of_rows(records: Sequence[dict], batch_size: int, seed: int, audio_only: AudioOnly | None) -> Callable[[int, int], _Row]:
    """Function from (training step, row number) to that row of the global batch."""
    num_excerpts = audio_only.count if audio_only else 0
    if not 0 <= num_excerpts < batch_size:
        raise ValueError(f"found {num_excerpts} audio-only clips in a batch of {batch_size}, expected fewer, from 0")
    clips, num_clips = _passes(records, seed), batch_size - num_excerpts
    recordings = _passes(audio_only.records, seed + 1) if num_excerpts else None

    def row_at(step: int, number: int) -> _Row:
        if number < num_clips:
            return _Row(int(clips[step * num_clips + number]))
        i = step * num_excerpts + number - num_clips
        return _Row(int(recordings[i]), float(np.random.default_rng([seed, i]).random()))

    return row_at


def _passes(records: Sequence[dict], seed: int):
    """The order of the clips as a grain MapDataset; indices beyond its length belong to the following passes."""
    import grain.python as grain

    return grain.MapDataset.range(len(records)).seed(seed).shuffle()


def eval_batches(records: Records, batch_size: int, *, process_index: int = 0, process_count: int = 1) -> Iterator[dict]:
    """Every clip exactly once, ordered by clip id; the last batch is padded with copies of the last clip at weight 0.

    Process p gets the p-th of `process_count` equal slices of the rows of every batch, even if they are only padding, so all
    processes get the same number of batches. ValueError if process_count does not divide batch_size.
    """
    import grain.python as grain

    rows = _rows_per_process(batch_size, process_count)
    order = np.argsort(records.clip_ids, kind="stable")

    def batch_at(step: int) -> dict:
        last = min((step + 1) * batch_size, len(order)) - 1
        mine = range(step * batch_size + process_index * rows, step * batch_size + (process_index + 1) * rows)
        clips = [int(order[min(row, last)]) for row in mine]
        examples = {clip: to_example(records[clip]) for clip in dict.fromkeys(clips)}
        return _batch([examples[clip] | {"weight": np.float32(row <= last)} for row, clip in zip(mine, clips, strict=True)])

    return iter(_prefetched(grain.MapDataset.range(-(-len(order) // batch_size)).map(batch_at)))


def _rows_per_process(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} can't be divided among {process_count} processes: expected a multiple")
    return batch_size // process_count


def _prefetched(batches):
    """The batches of a grain MapDataset in order; threads prepare the next few."""
    import grain.python as grain

    return batches.to_iter_dataset(grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCHED_BATCHES))


def _batch(examples: list[dict]) -> dict:
    """Stacks arrays to (B, ...); clip_id becomes a list of str."""
    ids = [e["clip_id"] for e in examples]
    return {"clip_id": ids} | {k: np.stack([e[k] for e in examples]) for k in examples[0] if k != "clip_id"}
