"""Files that may lie on a disk or in a bucket (gs://): written whole or not at all, and data brought near. Knows no training.

Paths are etils.epath's; its own read_text, exists, iterdir and unlink do as they are. What they do not promise is here: a write
that leaves the old file whole, a line added in a bucket (which has no appending: gcsfs writes the line over the file), and a
listing of a bucket that shows what other processes have written since. Every error is an OSError of one line.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Where tensorflow is installed, epath would import it for gs://: seconds and hundreds of MB. gcsfs does as well.
os.environ.setdefault("EPATH_USE_TF", "false")

from etils import epath  # noqa: E402

COPIES_AT_ONCE = 4  # one stream of a bucket leaves a host's network idle
BLOCK = 2**23  # bytes read at once
SAY_EVERY_S = 10


class StorageError(OSError):
    """A file could not be read, written or copied."""


def folder(path) -> epath.Path:
    """A folder or file as an epath.Path: absolute on a disk, gs:// as it is; ValueError for other schemes."""
    path = epath.Path(path)
    scheme, _, rest = os.fspath(path).partition("://")
    if not rest:
        return epath.Path(os.path.abspath(path.expanduser()))
    if scheme != "gs":
        raise ValueError(f"{path}: found {scheme}://, expected a folder or gs://BUCKET/FOLDER")
    if not importlib.util.find_spec("gcsfs"):
        raise StorageError(f"{path}: gs:// needs gcsfs; pip install 'avsi_jax[gcs]'")
    _look_afresh()
    return path


def in_bucket(path) -> bool:
    return os.fspath(path).startswith("gs://")


def _look_afresh() -> None:
    """gcsfs keeps listings for ever: without this, a process never sees the files that others add to a folder it has listed."""
    import fsspec.config

    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)


def names(path) -> list[str]:
    """The names in a folder, in order; none where it is missing: in a bucket a folder is there while a file is in it."""
    try:
        return sorted(p.name for p in folder(path).iterdir())
    except FileNotFoundError:
        return []


# ----------------------------------------------------------------------------------------------------------------- writing


def write_text(path, text: str) -> None:
    """Writes a file whole or not at all, as `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path, data: bytes) -> None:
    """Writes a file whole or not at all: a failed write, or a machine that loses power, leaves the old one as it was.

    On a disk a file beside it is written, brought to the disk and renamed; in a bucket it is one object. Folders are made.
    """
    path = folder(path)
    with _one_line(path, len(data)):
        if in_bucket(path):
            path.write_bytes(data)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _renamed_at_end(Path(path)) as file:
                file.write(data)


@contextlib.contextmanager
def _renamed_at_end(path: Path) -> Iterator:
    """A new file, open for bytes, that becomes `path` where the block ends well and is gone where it does not."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Brings a folder's list of files to the disk: a rename is not safe before."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:  # some network disks can't, and need not
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def append_line(path, line: str) -> None:
    """Adds a line to a text file, made where it is missing, as `append_bytes`."""
    append_bytes(path, f"{line}\n".encode())


def append_bytes(path, data: bytes) -> None:
    """Adds to the end of a file, made where it is missing, and hands it to the system; a failed write takes back what it added.

    In a bucket the whole file is read and written: for small files, and for one writer, since of two at once one would be lost.
    """
    path = folder(path)
    with _one_line(path, len(data)):
        if in_bucket(path):
            path.write_bytes((path.read_bytes() if path.exists() else b"") + data)
            return
        with open(path, "ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                _write_all(file, data)
                os.fsync(file.fileno())  # a row of a table is not to be lost beside a checkpoint that isn't
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), before)
                raise


def _write_all(file, data: bytes) -> None:
    """An unbuffered file may take less than it is given, and does so on a disk that is nearly full."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


@contextlib.contextmanager
def _one_line(path, num_bytes: int, source="") -> Iterator[None]:
    """Whatever goes wrong with a file, as a StorageError of one line that names it, the bytes and the room there is."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # gcsfs has errors of its own, of its network and of its credentials
        if not isinstance(error, OSError) and not (in_bucket(path) or in_bucket(source)):
            raise
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(_full(path, num_bytes)) from error
        said = getattr(error, "strerror", None) or (str(error) or repr(error)).splitlines()[0][:200]
        raise StorageError(f"{path}: {num_bytes:,} bytes could not be written: {said}") from error


def _full(path, needed: int) -> str:
    return f"{path}: the disk is full: {needed:,} bytes needed, {_free(path):,} free; make room there or name another disk"


def _free(path) -> int:
    """Bytes free on the disk of a path, which need not be there yet."""
    there = next(p for p in (Path(path), *Path(path).parents) if p.exists())
    return shutil.disk_usage(there).free


# ----------------------------------------------------------------------------------------------------------------- copying


class _File(NamedTuple):
    """A file of the source. crc32c: of its content, '' on a disk, which keeps none; changed: its generation or time of change."""

    name: str
    size: int
    crc32c: str
    changed: str


def local_copy(url, cache_dir, splits: Sequence[str]) -> epath.Path:
    """A dataset's folder (as of records.find_dataset, on gs:// or a slow disk), copied to this host; the folder of the copy.

    The records of `splits` and all small files are copied, into CACHE_DIR/CONFIG-xxxxxxxxxxxx/VERSION, whose x stand for what the
    source holds: a changed source is copied anew beside the old copy. Of a host's processes one copies and the others wait. A file
    gets its name when it is whole and the same as in the bucket by CRC32C; then the checksums of all records are verified. What is
    there already is not copied again, so a copy that was cut off goes on.

    Raises StorageError where the source can't be read, the disk has no room or a file arrives damaged, records.RecordError where
    the source's own records are damaged, MissingSplitError where a split is none of its.
    """
    url, cache_dir = folder(url), Path(folder(cache_dir))
    found = _listing(url)
    described = repr((str(url), sorted(found))).encode()
    target = cache_dir / f"{url.parent.name}-{hashlib.sha256(described).hexdigest()[:12]}" / url.name
    of_splits = re.compile("|".join(rf"-{re.escape(s)}\.tfrecord" for s in splits) or "$.")
    wanted = [file for file in found if ".tfrecord" not in file.name or of_splits.search(file.name)]
    with _one_line(target, sum(f.size for f in wanted)):
        target.mkdir(parents=True, exist_ok=True)
    with _alone(target.parent / ".lock", f"{target}: waiting for another process of this host, which copies it"):
        missing = [f for f in wanted if _size(target / f.name) != f.size]
        if missing:
            _copy_all(url, missing, target)
        for split in splits:
            _verify(url, target, split)
    return epath.Path(target)


def _listing(url: epath.Path) -> list[_File]:
    """The files that lie in a folder, without those of its folders."""
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(os.fspath(url))
        infos = filesystem.ls(root, detail=True)
    except Exception as error:
        raise StorageError(f"{url} can't be read: {(str(error) or repr(error)).splitlines()[0][:200]}") from error
    files = []
    for info in infos:
        if info["type"] == "file" and (name := info["name"].rsplit("/", 1)[-1]) and not name.startswith("."):
            changed = info.get("generation", info.get("mtime", ""))
            files.append(_File(name, int(info["size"]), info.get("crc32c", ""), str(changed)))
    if not files:
        raise StorageError(f"{url} is empty or not there: expected a dataset's folder, such as DATA/grid/CONFIG/2.1.0")
    return files


@contextlib.contextmanager
def _alone(lock: Path, waiting: str) -> Iterator[None]:
    """One process of the host at a time; the system frees the lock of a process that dies."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _copy_all(url: epath.Path, files: list[_File], target: Path) -> None:
    """Copies files, a few at once, and says how it goes; the first error ends it."""
    import fsspec

    for left in target.glob(".*.tmp"):  # of a copier that was killed: we hold the lock
        left.unlink()
    needed = sum(file.size for file in files)
    if _free(target) < needed:
        raise StorageError(_full(target, needed) + ", or delete older copies beside it")
    filesystem, root = fsspec.core.url_to_fs(os.fspath(url))
    progress = _Progress(f"{url} -> {target}", needed)
    with _one_line(target, needed, url), ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
        running = [pool.submit(_copy, filesystem, f"{root}/{f.name}", f, target, progress) for f in files]
        try:
            for copied in running:
                copied.result()
        except BaseException:
            progress.stopped = True
            raise
    progress.say()


def _copy(filesystem, source: str, file: _File, target: Path, progress: _Progress) -> None:
    """One file; its size and, where the bucket tells it, its CRC32C are those of the source, or there is no file."""
    import google_crc32c

    found, size = google_crc32c.Checksum(), 0
    with filesystem.open(source, "rb", block_size=BLOCK) as reader, _renamed_at_end(target / file.name) as writer:
        while data := reader.read(BLOCK):
            if progress.stopped:
                raise StorageError(f"{target}: stopped")
            writer.write(data)
            found.update(data)
            size += len(data)
            progress.add(len(data))
        if size != file.size:
            raise StorageError(f"{source}: read {size:,} bytes, expected {file.size:,}; it was changed meanwhile, start again")
        if file.crc32c and base64.b64encode(found.digest()).decode() != file.crc32c:
            raise StorageError(f"{source}: what was read has another CRC32C than the bucket's; start again")


class _Progress:
    """Bytes copied by all threads, told on stderr now and then and at the end."""

    def __init__(self, what: str, total: int):
        self.stopped = False
        self._what, self._total, self._done, self._lock = what, total, 0, threading.Lock()
        self._began = self._said = time.monotonic()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if time.monotonic() - self._said > SAY_EVERY_S:
                self.say()

    def say(self) -> None:
        self._said = time.monotonic()
        mb, rate = self._done / 1e6, self._done / 1e6 / max(self._said - self._began, 1e-3)
        print(f"{self._what}: {mb:,.1f} of {self._total / 1e6:,.1f} MB, {rate:,.1f} MB/s", file=sys.stderr, flush=True)


def _verify(url: epath.Path, target: Path, split: str) -> None:
    """All checksums of a split's records, once a copy; where one is wrong its files are deleted, and the next start copies them."""
    from avsi_jax import records

    verified = target.parent / f".{split}.verified"
    if verified.exists():
        return
    try:
        records.Records(target, split, mouth=False).verify()
    except records.MissingSplitError:
        raise
    except records.RecordError as error:
        for file in target.glob(f"*-{split}.tfrecord*"):
            file.unlink()
        raise records.RecordError(f"{error}; it was a copy of {url}, and is deleted") from error
    verified.touch()
