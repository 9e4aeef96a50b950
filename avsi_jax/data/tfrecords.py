"""Reads the TFRecords of a dataset: random access to one split, with integrity checks. Does not need tensorflow.

The records are written by tfds_grid: tf.Example messages in TFRecord files in `DATA_DIR/<dataset>/<config>/<version>/`. They are
parsed here because tensorflow-datasets takes 1.6 times as long per record and has a slow import.

When errors are detected: opening a split reads the header and the clip id of every record, a few hundred bytes each. This finds
every file that is missing, truncated, duplicated or from another build before training starts. Verifying the checksums of the data
needs a pass over all bytes. Splits up to VERIFY_ON_OPEN_BYTES are verified on opening, larger ones record by record as they are
read; `Records.verify` verifies all.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from typing import NamedTuple

import google_crc32c
import numpy as np
from etils import epath

from avsi_jax.runtime import storage

VERIFY_ON_OPEN_BYTES = 2**30  # read and verified in well under a second from the disk cache

# Feature -> its type in features.json; sequences of dicts by path. Additional features are ignored.
FEATURES = {
    "id": "text",
    "speaker": "text",
    "audio": "int16 [-1]",
    "offset_s": "float32 []",
    "landmarks": "float32 [-1, 68, 2]",
    "landmarks_valid": "bool [-1]",
    "frame_size": "int32 [2]",
    "fps": "float32 []",
    "text": "text",
    "words/word": "text",
    "words/start_s": "float32 []",
    "words/end_s": "float32 []",
    "mouth": "image [96, 96, 1]",
}
OPTIONAL = {"mouth"}

_PEEK_BYTES = 64  # more than the header of a feature and its name need
REMEDY = "copy it again or rebuild: avsi-prepare --overwrite"


class RecordError(ValueError):
    """The records on disk are damaged or do not match their description."""


class MissingSplitError(RecordError):
    """The dataset has no split of this name."""


def find_dataset(data_dir: epath.PathLike, builder_config: str = "speaker_independent", name: str = "grid") -> epath.Path:
    """The folder of the newest version of `<name>/<builder_config>` in `data_dir`; RecordError if there is none."""
    home = storage.as_path(data_dir) / name / builder_config
    versions = [p for p in home.iterdir() if _version(p.name)] if home.exists() else []
    if not versions:
        build = f"avsi-prepare --raw=DIR --data_dir={data_dir} --builder_config={builder_config}"
        if name != "grid":
            build = f"python -m tfds_grid.{name} --raw=DIR --data_dir={data_dir}"
        raise RecordError(f"no records in {home}: expected a folder of a version, such as 2.1.0; build it with: {build}")
    return max(versions, key=lambda p: _version(p.name))


def _version(name: str) -> tuple[int, ...]:
    """'1.0.0' -> (1, 0, 0); () for other names, such as that of an incomplete build."""
    parts = name.split(".")
    return tuple(map(int, parts)) if len(parts) == 3 and all(p.isdigit() for p in parts) else ()


class _Place(NamedTuple):
    """Position of the data of one record."""

    path: epath.Path
    number: int  # within its file, from 0
    start: int  # bytes
    size: int
    crc: bytes = b""  # as stored

    def __str__(self) -> str:
        return f"{self.path}: record {self.number}"


class Records:
    """Random access to one split: `records[i]` is the i-th example as stored, in the order of the files. Safe to use from threads.

    clip_ids: the id of every record in the same order. mouth: whether to decode the mouth crops, if the dataset has them; they take
    longer than everything else together.

    Raises MissingSplitError for an unknown split. Raises RecordError for an empty split, for a file that is missing, truncated,
    duplicated or from another build, and for a damaged record; the module docstring says when.
    """

    def __init__(self, folder: epath.PathLike, split: str, *, mouth: bool = True):
        self.folder, self.split, self._skipped = epath.Path(folder), split, () if mouth else ("mouth",)
        files, size = _files(self.folder, split)
        check_features(self.folder / "features.json")
        self._places, self.clip_ids = [], []
        for path, count in files.items():
            for place, clip_id in _scan(path, count):
                self._places.append(place)
                self.clip_ids.append(clip_id)
        self._check_clips_and_size(size)
        if size <= VERIFY_ON_OPEN_BYTES:
            self.verify()

    def _check_clips_and_size(self, size: int) -> None:
        """RecordError if a clip occurs twice or the data of the split do not have `size` bytes."""
        places: dict[str, _Place] = {}
        for clip_id, place in zip(self.clip_ids, self._places, strict=True):
            if clip_id in places:
                raise RecordError(f"clip {clip_id} occurs twice, in {places[clip_id]} and in {place}; {REMEDY}")
            places[clip_id] = place
        if (total := sum(place.size for place in self._places)) != size:
            raise RecordError(
                f"{self.folder}: the records of {self.split} have {total} bytes, expected {size} by dataset_info.json: "
                f"its files come from different builds; {REMEDY}"
            )

    def verify(self) -> None:
        """Reads all records and verifies the checksums of their data; RecordError for the first damaged one."""
        for place in self._places:
            _read(place)

    def fingerprint(self) -> str:
        """Hash of the ids, the order and the checksums of the contents: identifies the data, wherever they are stored."""
        lines = "".join(f"{clip_id} {p.size} {p.crc.hex()}\n" for clip_id, p in zip(self.clip_ids, self._places, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> dict:
        """Features by name: arrays (some read-only), floats, str; words: dicts {word, start_s, end_s}; mouth: (T, 96, 96) uint8."""
        place = self._places[i]
        data = _read(place)
        try:
            return _example({name: value for name, value in parse_example(data).items() if name not in self._skipped})
        except (ValueError, KeyError, IndexError, TypeError) as e:
            raise RecordError(f"{place} does not match {self.folder / 'features.json'} ({e!r}); {REMEDY}") from e


# -------------------------------------------------------------------------------------------------------------- description


def _read_json(path: epath.Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise RecordError(f"{path} can't be read ({e}): expected a dataset folder written by avsi-prepare") from e
    return content if isinstance(content, dict) else {}


def _files(folder: epath.Path, split: str) -> tuple[dict[epath.Path, int], int]:
    """The files of a split with their expected numbers of records, and the total size of the data, from dataset_info.json."""
    path = folder / "dataset_info.json"
    info = _read_json(path)
    try:
        splits = {s["name"]: ([int(n) for n in s.get("shardLengths", [])], int(s.get("numBytes", 0))) for s in info["splits"]}
        name, kind = str(info["name"]), info.get("fileFormat", "tfrecord")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise RecordError(f"{path} does not describe records of avsi-prepare ({e!r}): expected a name and splits; {REMEDY}") from e
    if kind != "tfrecord":
        raise RecordError(f"{path}: found the file format {kind!r}, expected tfrecord; rebuild with avsi-prepare --overwrite")
    if split not in splits:
        raise MissingSplitError(f"no split {split!r} in {folder}: found {', '.join(sorted(splits)) or 'none'}")
    counts, size = splits[split]
    if not sum(counts):
        raise RecordError(f"the split {split!r} of {folder} is empty: expected at least one clip")
    prefix = f"{name}-{split}.tfrecord"
    files = {folder / f"{prefix}-{i:05d}-of-{len(counts):05d}": n for i, n in enumerate(counts)}
    if strays := sorted(p.name for p in folder.iterdir() if p.name.startswith(prefix) and p not in files):
        raise RecordError(f"{folder / strays[0]} is from another build: dataset_info.json lists {len(counts)} files; move it away")
    return files, size


def check_features(path: epath.Path) -> None:
    """RecordError if features.json lacks a required feature or describes one with another type or shape."""
    try:
        described = dict(_described("", _read_json(path)))
    except (AttributeError, TypeError, ValueError) as e:
        raise RecordError(f"{path} does not describe features ({e!r}): expected those of avsi-prepare; {REMEDY}") from e
    for name, expected in FEATURES.items():
        if described.get(name, None if name not in OPTIONAL else expected) != expected:
            raise RecordError(
                f"{path}: the feature {name!r} is {described.get(name, 'missing')}, expected {expected}; "
                "rebuild with this version: avsi-prepare --overwrite"
            )


def _described(name: str, feature) -> Iterator[tuple[str, str]]:
    """(path, type) of every feature in a features.json, in the notation of FEATURES."""
    if "featuresDict" in feature:
        for part, inner in feature["featuresDict"].get("features", {}).items():
            yield from _described(f"{name}/{part}" if name else part, inner)
    elif "sequence" in feature:
        yield from _described(name, feature["sequence"].get("feature", {}))
    elif "text" in feature:
        yield name, "text"
    elif "image" in feature:
        yield name, f"image {_dimensions(feature['image'])}"
    elif "tensor" in feature:
        packed = (
            " zlib" if feature["tensor"].get("encoding") == "zlib" else ""
        )  # lists and uncompressed bytes are read the same way
        yield name, f"{feature['tensor'].get('dtype')} {_dimensions(feature['tensor'])}{packed}"


def _dimensions(feature: dict) -> list[int]:
    return [int(n) for n in feature.get("shape", {}).get("dimensions", [])]


# ------------------------------------------------------------------------------------------------------------------ framing


def _scan(path: epath.Path, count: int) -> Iterator[tuple[_Place, str]]:
    """Positions and clip ids of the `count` records of a file. A record: uint64 size, its CRC, data, their CRC; little-endian."""
    if not path.exists():
        raise RecordError(f"{path} is missing: expected {count} records; {REMEDY}")
    length, number, at = path.stat().length, 0, 0
    with path.open("rb") as f:
        while at < length:
            f.seek(at)
            header = f.read(12)
            if len(header) == 12:
                _check_crc(header[:8], header[8:], path, number, "length")
            size = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
            if len(header) < 12 or at + 16 + size > length:
                raise RecordError(f"{path}: truncated in record {number} of {count}, at byte {length}; {REMEDY}")
            f.seek(at + 12 + size)
            place = _Place(path, number, at + 12, size, f.read(4))
            try:
                yield place, _find_id(f, place)
            except (ValueError, KeyError, IndexError) as e:
                _read(place)  # reports a damaged record as such
                raise RecordError(f"{place} has no clip id ({e!r}): expected a record written by avsi-prepare; {REMEDY}") from e
            number, at = number + 1, at + 16 + size
    if number != count:
        raise RecordError(f"{path}: found {number} records, expected {count} by dataset_info.json; {REMEDY}")


def _find_id(f, place: _Place) -> str:
    """The clip id of a record of the open file `f`; skips the other features."""
    last = place.start + place.size
    f.seek(place.start)
    at = place.start + _field_header(f.read(_PEEK_BYTES), 0)[1]
    while at < last:
        f.seek(at)
        start = f.read(_PEEK_BYTES)
        _, begin, end = _field_header(start, 0)
        if at + end > last:
            raise ValueError("a field is longer than its message")
        if start[begin : begin + 4] == b"\n\x02id":
            f.seek(at + begin)
            return _one(_texts(*_feature(f.read(end - begin))[1]))
        at += end
    raise ValueError("no feature named id")


def _read(place: _Place) -> bytes:
    """The data of a record; RecordError if they are truncated or damaged."""
    with place.path.open("rb") as f:
        f.seek(place.start)
        data, crc = f.read(place.size), f.read(4)
    if len(crc) < 4:
        raise RecordError(f"{place.path}: truncated in record {place.number}; {REMEDY}")
    _check_crc(data, crc, place.path, place.number, "data")
    return data


def masked_crc(data: bytes) -> bytes:
    """The masked CRC32C of the TFRecord format."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _check_crc(data: bytes, stored: bytes, path, number: int, what: str) -> None:
    if masked_crc(data) != stored:
        raise RecordError(f"{path}: record {number} is damaged, the checksum of its {what} does not match; {REMEDY}")


# -------------------------------------------------------------------------------------------------------------- wire format
# The part of protobuf (protobuf.dev/programming-guides/encoding) that tf.Example needs: all of its fields are length-delimited.
# Example {1: Features {1: entry {1: name, 2: Feature {1: bytes, 2: floats or 3: integers}}}}; a list is {1: values}, packed.


def parse_example(data: bytes) -> dict[str, tuple[int, list[memoryview]]]:
    """Parses a tf.Example: feature name -> (kind, raw values); kind 1: bytes, 2: float32, 3: varints, numbers in one piece."""
    parsed = {}
    for _, features in _fields(memoryview(data)):
        for _, entry in _fields(features):
            name, values = _feature(entry)
            parsed[name] = values
    return parsed


def _feature(entry) -> tuple[str, tuple[int, list[memoryview]]]:
    """The name and the (kind, values) of one entry."""
    parts = dict(_fields(entry))
    kind, values = _one(list(_fields(parts[2])))
    return str(parts[1], "utf-8"), (kind, [value for _, value in _fields(values)])


def _fields(message) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of the fields of a message in which all fields are length-delimited."""
    at = 0
    while at < len(message):
        number, begin, at = _field_header(message, at)
        if at > len(message):
            raise ValueError("a field is longer than its message")
        yield number, message[begin:at]


def _field_header(message, at: int) -> tuple[int, int, int]:
    """Number, start and end of the content of the field at `at`. A size has seven bits per byte, lowest first."""
    tag, size, begin = message[at], message[at + 1], at + 2
    if tag & 0x87 != 2:  # numbers above 15 take a second byte
        raise ValueError(f"a field begins with byte {tag}, expected one of wire type 2 and a number below 16")
    if size > 127:
        size, shift = size & 127, 7
        while message[begin] > 127:
            size, shift, begin = size | (message[begin] & 127) << shift, shift + 7, begin + 1
        size, begin = size | message[begin] << shift, begin + 1
    return tag >> 3, begin, begin + size


def _varints(packed: bytes, dtype: np.dtype) -> np.ndarray:
    """All integers of a packed list, cast from int64 to the unsigned `dtype`."""
    data = np.frombuffer(packed, np.uint8)
    last = data < 128
    if last.all():
        return data.astype(dtype)
    if not last[-1]:
        raise ValueError("the last integer of a list is truncated")
    first = np.ones(data.size, bool)
    first[1:] = last[:-1]
    at = np.flatnonzero(first)
    septet = data.take(at)
    values, more = (septet & 127).astype(dtype), septet >> 7
    for shift in range(7, 8 * dtype.itemsize, 7):
        if not more.any():
            break
        at += 1  # in place: this array is the largest one, and new memory costs more than the additions
        septet = data.take(at, mode="clip")
        values |= ((septet & 127) * more).astype(dtype) << shift
        more &= septet >> 7
    return values


# ---------------------------------------------------------------------------------------------------------- message -> example


def _example(parsed: dict) -> dict:
    """The features of a parsed message as `Records` returns them; KeyError or ValueError for a missing or unexpected one."""
    starts, ends = (_numbers(*parsed[f"words/{name}"], np.float32).tolist() for name in ("start_s", "end_s"))
    words = zip(_texts(*parsed["words/word"]), starts, ends, strict=True)
    example = {name: _one(_texts(*parsed[name])) for name in ("id", "speaker", "text")}
    example |= {name: _one(_numbers(*parsed[name], np.float32).tolist()) for name in ("offset_s", "fps")}
    example |= {
        "audio": _numbers(*parsed["audio"], np.int16),
        "landmarks": _numbers(*parsed["landmarks"], np.float32).reshape(-1, 68, 2),
        "landmarks_valid": _numbers(*parsed["landmarks_valid"], np.bool_),
        "frame_size": _numbers(*parsed["frame_size"], np.int32).reshape(2),
        "words": [{"word": word, "start_s": start, "end_s": end} for word, start, end in words],
    }
    if "mouth" in parsed:
        example["mouth"] = np.stack([_mouth_crop(jpeg) for jpeg in parsed["mouth"][1]])
    return example


def _one(values: list):
    (value,) = values
    return value


def _texts(kind: int, values: list[memoryview]) -> list[str]:
    if kind != 1:
        raise ValueError("found numbers, expected text")
    return [str(value, "utf-8") for value in values]


def _numbers(kind: int, values: list[memoryview], dtype) -> np.ndarray:
    """A list of numbers (n,). Bytes are little-endian numbers written with encoding="bytes"; those arrays are read-only."""
    data, dtype = values[0] if len(values) == 1 else b"".join(values), np.dtype(dtype)
    if kind == 3 and dtype.kind != "f":
        values = _varints(data, np.dtype(f"u{dtype.itemsize}"))
        return values != 0 if dtype == np.bool_ else values.view(dtype)
    if kind == 1 or kind == 2 and dtype == np.float32:
        return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False)
    raise ValueError(f"found a list of kind {kind}, expected {dtype.name}")


def _mouth_crop(jpeg: memoryview) -> np.ndarray:
    """Decodes a mouth crop: (96, 96) uint8, grey."""
    import cv2

    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_UNCHANGED) if len(jpeg) else None
    if image is None or image.shape != (96, 96):
        raise ValueError("a mouth crop is not a grey JPEG of 96 x 96 pixels")
    return image
