"""Records -> batches of raw sound, face points and text, in an order that can be gone on with. The only importer of grain.

Sound stays int16 at 16 kHz, points stay pixels: gaps, spectrograms and motion are made on the device (data/features.py). A damaged
record raises RecordError (data/tfrecords.py says when); it is never passed over.

Letters: B clips, N samples, T video frames, L landmarks (68). Times in seconds.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from avsi_jax import presets
from avsi_jax.data import grid_text
from avsi_jax.data.tfrecords import MissingSplitError, RecordError, Records, find_dataset

__all__ = ["MissingSplitError", "RecordError", "Records", "eval_batches", "find_dataset", "id_hash", "to_example", "train_batches"]

READ_THREADS = 4
BATCHES_AHEAD = 8


# ------------------------------------------------------------------------------------------------------- stored -> example


def id_hash(clip_id: str) -> np.uint32:
    """What a clip's gaps are placed by: the first four bytes of sha256(id), big-endian."""
    return np.uint32(int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:4], "big"))


def to_example(raw: dict, record_samples: int = 48_000, num_frames: int = presets.GRID_FRAMES) -> dict:
    """One stored example at fixed shapes.

    Returns, with N = record_samples and T = num_frames:
      clip_id str, id_hash () uint32;
      audio (N,) int16 at 16 kHz, zero-padded or cut, audio_length () int32 its true length in N;
      landmarks (T, 68, 2) float32 px, last frame repeated or cut, num_frames () int32 as true, landmarks_valid (T,) bool;
      offset_s () float32 sound after picture; frame_size (2,) int32 width, height; fps () float32;
      labels (41,) int32 the text's characters, phones (23,) int32 its phones, both zero-padded, label_length and phone_length ()
      int32 their true numbers; 0 where the text of an own recording holds what has no label, or is too long for them;
      speech (2,) float32 start of the first and end of the last word on the sound's clock, the whole sound where has_words ()
      bool is False; weight () float32 1.
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
    """x cut or padded with zeros along its first axis to `length`, and how much of the result is x."""
    count = min(len(x), length)
    fitted = np.zeros((length, *x.shape[1:]), x.dtype)
    fitted[:count] = x[:count]
    return fitted, count


def _labels(encode: Callable[[str], np.ndarray], said: str, length: int) -> tuple[np.ndarray, int]:
    """The labels of a text; none where it holds what `encode` has no label for, or more of them than `length`."""
    try:
        labels = encode(said)
    except ValueError:
        labels = np.zeros(0, np.int32)
    return _fit(labels if len(labels) <= length else labels[:0], length)


def _speech(raw: dict, duration_s: float) -> np.ndarray:
    """(2,) s on the sound's clock. An .align is timed on the picture's, which the sound lags by offset_s."""
    words = raw["words"]
    if not words:
        return np.array([0, duration_s], np.float32)
    return np.array([words[0]["start_s"], words[-1]["end_s"]], np.float32) + np.float32(raw["offset_s"])


# ---------------------------------------------------------------------------------------------------------------- batches


def train_batches(
    records: Sequence[dict], batch_size: int, seed: int, *, process_index: int = 0, process_count: int = 1, start_step: int = 0
) -> Iterator[dict]:
    """Batches without end, from step `start_step`: the clips pass by again and again, each pass in an order of its own.

    A pass holds every clip once; its order depends on (seed, number of the pass) alone, the passes follow each other without a
    break, and a batch that reaches over the end of one goes on with the next: no clip is dropped or filled in. So batches end with
    a pass only where batch_size divides the clips; a training that counts len(records) // batch_size steps as an epoch falls
    behind the passes by the remainder. The global batch of a step depends on (seed, batch_size, step) alone, and process p gets
    the p-th of `process_count` equal runs of its rows. The iterator has get_state() -> small JSON-able dict and set_state(state).
    """
    import grain.python as grain

    if len(records) == 0:
        raise RecordError("no clip to train on: the split is empty")
    rows, passes = _rows_of_one(batch_size, process_count), _passes(records, seed)

    def batch_at(step: int) -> dict:
        begin = step * batch_size + process_index * rows
        return _batch([to_example(records[int(passes[i])]) for i in range(begin, begin + rows)])

    batches = iter(_ahead(grain.MapDataset.range(sys.maxsize).map(batch_at)))  # grain's own endless batches fail at batch_size 1
    batches.set_state(batches.get_state() | {"next_index": start_step})
    return batches


def clip_ids_of_step(records: Records, batch_size: int, seed: int, step: int) -> list[str]:
    """The ids of the global batch that `train_batches` gives at a step, counted from 0."""
    passes = _passes(records, seed)
    return [records.clip_ids[int(passes[i])] for i in range(step * batch_size, (step + 1) * batch_size)]


def _passes(records: Sequence[dict], seed: int):
    """The order of the clips, pass after pass; may be asked beyond its length: the next pass."""
    import grain.python as grain

    return grain.MapDataset.range(len(records)).seed(seed).shuffle()


def eval_batches(records: Records, batch_size: int, *, process_index: int = 0, process_count: int = 1) -> Iterator[dict]:
    """Every clip exactly once, by clip id; the last batch is filled up with its last clip at weight 0.

    Process p gets the p-th of `process_count` equal runs of the rows of each batch, of fillers alone too: all as many batches.
    """
    import grain.python as grain

    rows = _rows_of_one(batch_size, process_count)
    order = np.argsort(records.clip_ids, kind="stable")

    def batch_at(step: int) -> dict:
        last = min((step + 1) * batch_size, len(order)) - 1
        mine = range(step * batch_size + process_index * rows, step * batch_size + (process_index + 1) * rows)
        clips = [int(order[min(row, last)]) for row in mine]
        examples = {clip: to_example(records[clip]) for clip in dict.fromkeys(clips)}
        return _batch([examples[clip] | {"weight": np.float32(row <= last)} for row, clip in zip(mine, clips, strict=True)])

    return iter(_ahead(grain.MapDataset.range(-(-len(order) // batch_size)).map(batch_at)))


def _rows_of_one(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} can't be shared among {process_count} processes: expected a multiple")
    return batch_size // process_count


def _ahead(steps):
    """The batches of a grain MapDataset in order, the next few made by threads."""
    import grain.python as grain

    return steps.to_iter_dataset(grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD))


def _batch(examples: list[dict]) -> dict:
    """Arrays stacked to (B, ...); clip_id stays a list of str."""
    ids = [e["clip_id"] for e in examples]
    return {"clip_id": ids} | {k: np.stack([e[k] for e in examples]) for k in examples[0] if k != "clip_id"}
