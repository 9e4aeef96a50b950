"""The dataset on disk: one split's records at random, checked before anything is made of them. No tensorflow.

The records are those of tfds_grid: tf.Example messages in TFRecord files, `DATA_DIR/grid/<config>/<version>/`. They are read
here rather than by tensorflow-datasets, which takes 1.6 times as long a record and has to be imported first.

What is found when. Opening a split reads the head of every record and its clip's id, a few hundred bytes of each, and so names
every file that is missing, cut short, doubled or of another build before training begins. The checksums of the data cost a pass
over all bytes: it is made at once where the split is small (CHECKED_AT_START), and for the others record by record as they are
read; `verify` asks for the pass.
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

CHECKED_AT_START = 2**30  # bytes; read and verified in well under a second where the disk's cache holds them

# Feature -> how features.json describes it, sequences by the path of their parts. `mouth` may be missing, others may be there.
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

_GLANCE = 64  # bytes: more than the head of a feature and its name take
MEND = "copy it again or rebuild: avsi-prepare --overwrite"


class RecordError(ValueError):
    """The records on disk are not what their description says."""


class MissingSplitError(RecordError):
    """The dataset holds no such split."""


def find_dataset(data_dir, builder_config: str = "speaker_independent") -> epath.Path:
    """The folder of the newest version of `grid/<builder_config>` under `data_dir`; RecordError where there is none."""
    home = epath.Path(data_dir).expanduser() / "grid" / builder_config
    versions = [p for p in home.iterdir() if _version(p.name)] if home.exists() else []
    if not versions:
        raise RecordError(
            f"no records in {home}: expected a folder such as {home / '2.1.0'}; "
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
    crc: bytes = b""  # as stored

    def __str__(self) -> str:
        return f"{self.path}: record {self.number}"


class Records:
    """One split, at random: `records[i]` is the i-th example as stored, in the order of the files. Safe to read from threads.

    Raises MissingSplitError for an unknown split and RecordError for an empty one, for a file that is missing, cut short, left
    over from another build or there twice, and for a damaged record: see the top of this file for when.

    clip_ids: the id of every record, in the order of the files. mouth: whether the pictures of the mouth are decoded, where there
    are any; they take longer than all the rest.
    """

    def __init__(self, folder, split: str, *, mouth: bool = True):
        self.folder, self.split, self._leave_out = epath.Path(folder), split, () if mouth else ("mouth",)
        files, size = _files(self.folder, split)
        check_features(self.folder / "features.json")
        self._places, self.clip_ids = [], []
        for path, count in files.items():
            for place, clip_id in _walk(path, count):
                self._places.append(place)
                self.clip_ids.append(clip_id)
        self._check_identity(size)
        if size <= CHECKED_AT_START:
            self.verify()

    def _check_identity(self, size: int) -> None:
        """Every clip once, and all bytes of the split there."""
        places: dict[str, _Place] = {}
        for clip_id, place in zip(self.clip_ids, self._places, strict=True):
            if clip_id in places:
                raise RecordError(f"clip {clip_id} is there twice, in {places[clip_id]}, and in {place}; {MEND}")
            places[clip_id] = place
        if (found := sum(place.size for place in self._places)) != size:
            raise RecordError(
                f"{self.folder}: the records of {self.split} have {found} bytes, expected {size} by dataset_info.json: "
                f"its files are of different builds; {MEND}"
            )

    def verify(self) -> None:
        """Reads all records and verifies the checksums of their data; RecordError for the first that is damaged."""
        for place in self._places:
            _read(place)

    def fingerprint(self) -> str:
        """Of ids, order and contents (their checksums): the same for a copy, another one for any other dataset or split."""
        told = "".join(f"{clip_id} {p.size} {p.crc.hex()}\n" for clip_id, p in zip(self.clip_ids, self._places, strict=True))
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> dict:
        """Features by name: arrays (some read-only), floats, str; words: a list of {word, start_s, end_s}; mouth: (T, 96, 96)."""
        place = self._places[i]
        data = _read(place)
        try:
            return _example({name: value for name, value in parse_example(data).items() if name not in self._leave_out})
        except (ValueError, KeyError, IndexError, TypeError) as e:
            raise RecordError(f"{place} is not what {self.folder / 'features.json'} describes ({e!r}); {MEND}") from e


# -------------------------------------------------------------------------------------------------------------- description


def _read_json(path: epath.Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise RecordError(f"{path} can't be read ({e}): expected a dataset folder written by avsi-prepare") from e
    return found if isinstance(found, dict) else {}


def _files(folder: epath.Path, split: str) -> tuple[dict[epath.Path, int], int]:
    """The split's files with the number of records each must hold, and the bytes of all their data, by dataset_info.json."""
    path = folder / "dataset_info.json"
    info = _read_json(path)
    try:
        splits = {s["name"]: ([int(n) for n in s.get("shardLengths", [])], int(s.get("numBytes", 0))) for s in info["splits"]}
        name, kind = str(info["name"]), info.get("fileFormat", "tfrecord")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise RecordError(f"{path} describes no records of avsi-prepare ({e!r}): expected its name and splits; {MEND}") from e
    if kind != "tfrecord":
        raise RecordError(f"{path}: found the file format {kind!r}, expected tfrecord; rebuild: avsi-prepare --overwrite")
    if split not in splits:
        raise MissingSplitError(f"no split {split!r} in {folder}: found {', '.join(sorted(splits)) or 'none'}")
    counts, size = splits[split]
    if not sum(counts):
        raise RecordError(f"the split {split!r} of {folder} is empty: expected at least one clip")
    begin = f"{name}-{split}.tfrecord"
    files = {folder / f"{begin}-{i:05d}-of-{len(counts):05d}": n for i, n in enumerate(counts)}
    if strays := sorted(p.name for p in folder.iterdir() if p.name.startswith(begin) and p not in files):
        raise RecordError(f"{folder / strays[0]} is of another build: dataset_info.json names {len(counts)} files; move it away")
    return files, size


def check_features(path: epath.Path) -> None:
    """RecordError where features.json lacks a feature we read, or has it in another form."""
    try:
        found = dict(_described("", _read_json(path)))
    except (AttributeError, TypeError, ValueError) as e:
        raise RecordError(f"{path} describes no features ({e!r}): expected those of avsi-prepare; {MEND}") from e
    for name, expected in FEATURES.items():
        if found.get(name, None if name not in OPTIONAL else expected) != expected:
            raise RecordError(
                f"{path}: the feature {name!r} is {found.get(name, 'missing')}, expected {expected}; "
                "rebuild with this version: avsi-prepare --overwrite"
            )


def _described(name: str, feature) -> Iterator[tuple[str, str]]:
    """(path, form) of every feature of a features.json, as in FEATURES."""
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
        packed = " zlib" if feature["tensor"].get("encoding") == "zlib" else ""  # lists and plain bytes are read alike
        yield name, f"{feature['tensor'].get('dtype')} {_dimensions(feature['tensor'])}{packed}"


def _dimensions(described: dict) -> list[int]:
    return [int(n) for n in described.get("shape", {}).get("dimensions", [])]


# ------------------------------------------------------------------------------------------------------------------ framing


def _walk(path: epath.Path, count: int) -> Iterator[tuple[_Place, str]]:
    """Places and clip ids of the `count` records of a file. Framing: uint64 size, its CRC, the data, their CRC, little-endian."""
    if not path.exists():
        raise RecordError(f"{path} is missing: expected {count} records; {MEND}")
    length, number, at = path.stat().length, 0, 0
    with path.open("rb") as f:
        while at < length:
            f.seek(at)
            head = f.read(12)
            if len(head) == 12:
                _check_crc(head[:8], head[8:], path, number, "length")
            size = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else 0
            if len(head) < 12 or at + 16 + size > length:
                raise RecordError(f"{path}: cut short in record {number} of {count}, at byte {length}; {MEND}")
            f.seek(at + 12 + size)
            place = _Place(path, number, at + 12, size, f.read(4))
            try:
                yield place, _find_id(f, place)
            except (ValueError, KeyError, IndexError) as e:
                _read(place)  # where it is damaged, that is the reason
                raise RecordError(f"{place} has no clip id ({e!r}): expected a record written by avsi-prepare; {MEND}") from e
            number, at = number + 1, at + 16 + size
    if number != count:
        raise RecordError(f"{path}: found {number} records, expected {count} by dataset_info.json; {MEND}")


def _find_id(f, place: _Place) -> str:
    """The clip id of a record of the open file `f`; the other features are jumped over."""
    last = place.start + place.size
    f.seek(place.start)
    at = place.start + _head(f.read(_GLANCE), 0)[1]
    while at < last:
        f.seek(at)
        glance = f.read(_GLANCE)
        _, begin, end = _head(glance, 0)
        if at + end > last:
            raise ValueError("a field is longer than its message")
        if glance[begin : begin + 4] == b"\n\x02id":
            f.seek(at + begin)
            return _one(_texts(*_feature(f.read(end - begin))[1]))
        at += end
    raise ValueError("no feature of that name")


def _read(place: _Place) -> bytes:
    with place.path.open("rb") as f:
        f.seek(place.start)
        data, crc = f.read(place.size), f.read(4)
    if len(crc) < 4:
        raise RecordError(f"{place.path}: cut short in record {place.number}; {MEND}")
    _check_crc(data, crc, place.path, place.number, "data")
    return data


def masked_crc(data: bytes) -> bytes:
    """TFRecord's CRC32C."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _check_crc(data: bytes, stored: bytes, path, number: int, what: str) -> None:
    if masked_crc(data) != stored:
        raise RecordError(f"{path}: record {number} is damaged, the checksum of its {what} does not match; {MEND}")


# -------------------------------------------------------------------------------------------------------------- wire format
# Of protobuf (protobuf.dev/programming-guides/encoding) only what a tf.Example needs: each of its fields is length-delimited.
# Example {1: Features {1: entry {1: name, 2: Feature {1: bytes, 2: floats or 3: integers}}}}; a list {1: values}, numbers packed.


def parse_example(data: bytes) -> dict[str, tuple[int, list[memoryview]]]:
    """Feature -> (1 bytes, 2 float32 or 3 varints; the values as they lie, numbers in one piece), of a tf.Example."""
    found = {}
    for _, features in _fields(memoryview(data)):
        for _, entry in _fields(features):
            name, values = _feature(entry)
            found[name] = values
    return found


def _feature(entry) -> tuple[str, tuple[int, list[memoryview]]]:
    """The name and the values of one entry."""
    parts = dict(_fields(entry))
    kind, values = _one(list(_fields(parts[2])))
    return str(parts[1], "utf-8"), (kind, [value for _, value in _fields(values)])


def _fields(message) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of the fields of a message that has only length-delimited ones."""
    at = 0
    while at < len(message):
        number, begin, at = _head(message, at)
        if at > len(message):
            raise ValueError("a field is longer than its message")
        yield number, message[begin:at]


def _head(message, at: int) -> tuple[int, int, int]:
    """Of the field at `at`: its number, where its content begins and where it ends. Seven bits of a size a byte, lowest first."""
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
    """All integers of a packed list, as a cast from int64 to the unsigned `dtype` would have them."""
    data = np.frombuffer(packed, np.uint8)
    last = data < 128
    if last.all():
        return data.astype(dtype)
    if not last[-1]:
        raise ValueError("the last integer of a list is cut short")
    first = np.ones(data.size, bool)
    first[1:] = last[:-1]
    at = np.flatnonzero(first)
    septet = data.take(at)
    values, more = (septet & 127).astype(dtype), septet >> 7
    for shift in range(7, 8 * dtype.itemsize, 7):
        if not more.any():
            break
        at += 1  # in place: this array is the largest here, and fresh memory costs more than the sums
        septet = data.take(at, mode="clip")
        values |= ((septet & 127) * more).astype(dtype) << shift
        more &= septet >> 7
    return values


# ---------------------------------------------------------------------------------------------------------- message -> example


def _example(found: dict) -> dict:
    """The features of a parsed message by name, as Records gives them. KeyError or ValueError where one is not as described."""
    starts, ends = (_numbers(*found[f"words/{name}"], np.float32).tolist() for name in ("start_s", "end_s"))
    words = zip(_texts(*found["words/word"]), starts, ends, strict=True)
    example = {name: _one(_texts(*found[name])) for name in ("id", "speaker", "text")}
    example |= {name: _one(_numbers(*found[name], np.float32).tolist()) for name in ("offset_s", "fps")}
    example |= {
        "audio": _numbers(*found["audio"], np.int16),
        "landmarks": _numbers(*found["landmarks"], np.float32).reshape(-1, 68, 2),
        "landmarks_valid": _numbers(*found["landmarks_valid"], np.bool_),
        "frame_size": _numbers(*found["frame_size"], np.int32).reshape(2),
        "words": [{"word": word, "start_s": start, "end_s": end} for word, start, end in words],
    }
    if "mouth" in found:
        example["mouth"] = np.stack([_frame(jpeg) for jpeg in found["mouth"][1]])
    return example


def _one(values: list):
    (value,) = values
    return value


def _texts(kind: int, values: list[memoryview]) -> list[str]:
    if kind != 1:
        raise ValueError("found numbers, expected text")
    return [str(value, "utf-8") for value in values]


def _numbers(kind: int, values: list[memoryview], dtype) -> np.ndarray:
    """A list of numbers (n,); bytes are numbers that were written with encoding="bytes", little-endian; those are read-only."""
    data, dtype = values[0] if len(values) == 1 else b"".join(values), np.dtype(dtype)
    if kind == 3 and dtype.kind != "f":
        values = _varints(data, np.dtype(f"u{dtype.itemsize}"))
        return values != 0 if dtype == np.bool_ else values.view(dtype)
    if kind == 1 or kind == 2 and dtype == np.float32:
        return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False)
    raise ValueError(f"found a list of kind {kind}, expected {dtype.name}")


def _frame(jpeg: memoryview) -> np.ndarray:
    """(96, 96) uint8, grey."""
    import cv2

    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_UNCHANGED) if len(jpeg) else None
    if image is None or image.shape != (96, 96):
        raise ValueError("a picture of the mouth is no grey JPEG of 96 x 96 pixels")
    return image
