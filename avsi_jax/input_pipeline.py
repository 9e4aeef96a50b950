"""TFRecords on disk -> batches of raw sound, face points and text. No tensorflow; the only importer of grain.

The records are those of tfds_grid, `DATA_DIR/grid/<config>/<version>/`, read at random by an index of where each begins; both
checksums of the TFRecord framing are verified. Sound stays int16 at 16 kHz, points stay pixels: gaps, spectrograms and motion
are made on the device (features.py).

Letters: B clips, N samples, T video frames, L landmarks (68). Times in seconds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np
from etils import epath

from avsi_jax import spec, text

READ_THREADS = 4
BATCHES_AHEAD = 8


class RecordError(ValueError):
    """The records on disk are not what their description says."""


class MissingSplitError(RecordError):
    """The dataset holds no such split."""


# ---------------------------------------------------------------------------------------------------------------- on disk


def find_dataset(data_dir, builder_config: str = "speaker_independent") -> epath.Path:
    """The folder of the newest version of `grid/<builder_config>` under `data_dir`; RecordError where there is none."""
    home = epath.Path(data_dir).expanduser() / "grid" / builder_config
    versions = [p for p in home.iterdir() if _version(p.name)] if home.exists() else []
    if not versions:
        raise RecordError(
            f"no records in {home}: expected a folder such as {home / '1.0.0'}; "
            f"build it with: avsi-prepare --raw=DIR --data_dir={data_dir} --builder_config={builder_config}"
        )
    return max(versions, key=lambda p: _version(p.name))


def _version(name: str) -> tuple[int, ...]:
    """'1.0.0' -> (1, 0, 0); () for any other name, such as that of a build in progress."""
    parts = name.split(".")
    return tuple(map(int, parts)) if len(parts) == 3 and all(p.isdigit() for p in parts) else ()


class _Place(NamedTuple):
    """Where one record's data lie."""

    path: epath.Path
    number: int  # within its file, from 0
    start: int  # bytes
    size: int


class Records:
    """One split, at random: `records[i]` is the i-th example as stored, in the order of the files.

    Raises MissingSplitError for an unknown split and RecordError for a shard that is missing, cut short or damaged; the
    bytes of an example are checked when it is read. Safe to read from several threads.
    """

    def __init__(self, folder, split: str):
        import tensorflow_datasets as tfds  # its features and their reading need no tensorflow

        self.folder, self.split = epath.Path(folder), split
        self._places = [place for path, count in _shards(self.folder, split) for place in _walk(path, count)]
        self._features = tfds.features.FeaturesDict.from_json(_read_json(self.folder / "features.json"))
        self._id_only = tfds.features.FeaturesDict({"id": tfds.features.Text()})

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> dict:
        """Features by name as numpy arrays and str; words a list of {word, start_s, end_s}."""
        x = self._decode(i, self._features)
        words = x["words"]
        rows = zip(words["word"], words["start_s"], words["end_s"], strict=True)
        x["words"] = [{"word": w.decode(), "start_s": float(a), "end_s": float(b)} for w, a, b in rows]
        if "mouth" in x:
            x["mouth"] = np.stack(x["mouth"])[..., 0]
        return x | {name: x[name].decode() for name in ("id", "speaker", "text")}

    @functools.cached_property
    def clip_ids(self) -> list[str]:
        """The id of every record, in the order of the files."""
        return [self._decode(i, self._id_only)["id"].decode() for i in range(len(self))]

    def _decode(self, i: int, features) -> dict:
        place = self._places[i]
        data = _read(place)
        try:
            return features.deserialize_example_np(data)
        except Exception as e:  # protobuf and tfds raise many kinds
            described = self.folder / "features.json"
            raise RecordError(f"{place.path}: record {place.number} is not what {described} describes: {e}") from e


def _read_json(path: epath.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise RecordError(f"{path} can't be read ({e}): expected a dataset folder written by avsi-prepare") from e


def _shards(folder: epath.Path, split: str) -> list[tuple[epath.Path, int]]:
    """The split's files and the number of records each must hold, by dataset_info.json."""
    info = _read_json(folder / "dataset_info.json")
    splits = {s["name"]: [int(n) for n in s["shardLengths"]] for s in info["splits"]}
    if split not in splits:
        raise MissingSplitError(f"no split {split!r} in {folder}: found {', '.join(sorted(splits)) or 'none'}")
    counts = splits[split]
    return [(folder / f"{info['name']}-{split}.tfrecord-{i:05d}-of-{len(counts):05d}", n) for i, n in enumerate(counts)]


def _walk(path: epath.Path, count: int) -> list[_Place]:
    """The places of the `count` records of one file. Framing: uint64 size, its CRC, the data, their CRC (all little-endian)."""
    if not path.exists():
        raise RecordError(f"{path} is missing: expected {count} records; copy it again or rebuild: avsi-prepare --overwrite")
    length, places, at = path.stat().length, [], 0
    with path.open("rb") as f:
        while at < length:
            f.seek(at)
            head = f.read(12)
            if len(head) == 12:
                _check_crc(head[:8], head[8:], path, len(places), "length")
            size = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else 0
            if len(head) < 12 or at + 16 + size > length:
                raise RecordError(f"{path}: cut short in record {len(places)} of {count}, at byte {length}; copy it again")
            places.append(_Place(path, len(places), at + 12, size))
            at += 16 + size
    if len(places) != count:
        raise RecordError(f"{path}: found {len(places)} records, expected {count} by dataset_info.json; copy it again")
    return places


def _read(place: _Place) -> bytes:
    with place.path.open("rb") as f:
        f.seek(place.start)
        data, crc = f.read(place.size), f.read(4)
    if len(crc) < 4:
        raise RecordError(f"{place.path}: cut short in record {place.number}; copy it again")
    _check_crc(data, crc, place.path, place.number, "data")
    return data


def _check_crc(data: bytes, stored: bytes, path, number: int, what: str) -> None:
    """TFRecord's masked CRC32C."""
    crc = google_crc32c.value(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if struct.pack("<I", masked) != stored:
        raise RecordError(f"{path}: record {number} is damaged, the checksum of its {what} does not match; copy the file again")


# ------------------------------------------------------------------------------------------------------- stored -> example


def id_hash(clip_id: str) -> np.uint32:
    """What a clip's gaps are placed by: the first four bytes of sha256(id), big-endian."""
    return np.uint32(int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:4], "big"))


def to_example(raw: dict, record_samples: int = 48_000, num_frames: int = spec.GRID_FRAMES) -> dict:
    """One stored example at fixed shapes.

    Returns, with N = record_samples and T = num_frames:
      clip_id str, id_hash () uint32;
      audio (N,) int16 at 16 kHz, zero-padded or cut, audio_length () int32 its true length in N;
      landmarks (T, 68, 2) float32 px, last frame repeated or cut, num_frames () int32 as true, landmarks_valid (T,) bool;
      offset_s () float32 sound after picture; frame_size (2,) int32 width, height; fps () float32;
      labels (41,) int32 zero-padded, label_length () int32; speech (2,) float32 start of the first and end of the last word on
      the sound's clock, the whole sound where has_words () bool is False; weight () float32 1.
    """
    audio, audio_length = _fit(raw["audio"], record_samples)
    points, frames = _fit(raw["landmarks"], num_frames, mode="edge")
    valid, _ = _fit(raw["landmarks_valid"], num_frames)
    labels, label_length = _labels(raw)
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
        "speech": _speech(raw, audio_length / spec.RECORD_RATE),
        "has_words": np.bool_(len(raw["words"]) > 0),
        "weight": np.float32(1),
    }


def _fit(x: np.ndarray, length: int, mode: str = "constant") -> tuple[np.ndarray, int]:
    """x cut or padded along its first axis to `length`, and how much of the result is x."""
    x = x[:length]
    return np.pad(x, [(0, length - len(x))] + [(0, 0)] * (x.ndim - 1), mode=mode), len(x)


def _labels(raw: dict) -> tuple[np.ndarray, int]:
    labels = text.encode(raw["text"])
    if len(labels) > text.MAX_LABELS:
        raise RecordError(f"clip {raw['id']}: its text has {len(labels)} characters, expected at most {text.MAX_LABELS}")
    return _fit(labels, text.MAX_LABELS)


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
    """Batches without end, from step `start_step`; each epoch in an order of its own, every clip equally often.

    The global batch of a step depends on (seed, step) alone; process p gets the p-th of `process_count` equal runs of its rows.
    The iterator has get_state() -> small JSON-able dict and set_state(state).
    """
    import grain.python as grain

    if len(records) == 0:
        raise RecordError("no clip to train on: the split is empty")
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} can't be shared among {process_count} processes: expected a multiple")
    rows = batch_size // process_count
    mine = slice(process_index * rows, (process_index + 1) * rows)
    order = grain.MapDataset.range(len(records)).seed(seed).shuffle().repeat().batch(batch_size)
    steps = order.map(lambda indices: _batch([to_example(records[int(i)]) for i in indices[mine]]))
    batches = iter(_ahead(steps))
    batches.set_state(batches.get_state() | {"next_index": start_step})
    return batches


def eval_batches(records: Records, batch_size: int) -> Iterator[dict]:
    """Every clip exactly once, by clip id; the last batch is filled up with its last clip at weight 0."""
    import grain.python as grain

    order = np.argsort(records.clip_ids, kind="stable")

    def batch_at(step: int) -> dict:
        indices = order[step * batch_size : (step + 1) * batch_size]
        examples = [to_example(records[int(i)]) for i in indices]
        filling = examples[-1] | {"weight": np.float32(0)}
        return _batch(examples + [filling] * (batch_size - len(examples)))

    return iter(_ahead(grain.MapDataset.range(-(-len(order) // batch_size)).map(batch_at)))


def _ahead(steps):
    """The batches of a grain MapDataset in order, the next few made by threads."""
    import grain.python as grain

    return steps.to_iter_dataset(grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD))


def _batch(examples: list[dict]) -> dict:
    """Arrays stacked to (B, ...); clip_id stays a list of str."""
    ids = [e["clip_id"] for e in examples]
    return {"clip_id": ids} | {k: np.stack([e[k] for e in examples]) for k in examples[0] if k != "clip_id"}
