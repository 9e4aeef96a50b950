"""Copies a dataset from a bucket or a slow disk to this host and verifies it before training reads it."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from etils import epath

from avsi_jax.data import tfrecords
from avsi_jax.runtime import storage

PARALLEL_COPIES = 4  # a single stream from a bucket does not use the network of a host fully
BLOCK = 2**23  # bytes per read
REPORT_EVERY_S = 10


class _File(NamedTuple):
    """A file of the source. crc32c: checksum from the bucket, '' for a disk; changed: generation or modification time."""

    name: str
    size: int
    crc32c: str
    changed: str


def local_copy(url: epath.PathLike, cache_dir: epath.PathLike, splits: Sequence[str]) -> epath.Path:
    """Copies a dataset folder (from `tfrecords.find_dataset`, on gs:// or a slow disk) to this host and returns the local folder.

    The records of `splits` and all small files are copied to CACHE_DIR/CONFIG-xxxxxxxxxxxx/VERSION, where the x are a hash of the
    source's file list: a changed source gets a new copy beside the old one. One process of a host copies, the others wait. A file
    gets its final name when it is complete and its CRC32C matches the bucket's; then the checksums of all records are verified.
    Existing files are not copied again, so an interrupted copy resumes.

    Raises StorageError if the source cannot be read, the disk is full or a file arrives damaged; tfrecords.RecordError if records
    of the source are damaged; MissingSplitError for an unknown split.
    """
    url, cache_dir = storage.as_path(url), Path(storage.as_path(cache_dir))
    files = _listing(url)
    state = repr((str(url), sorted(files))).encode()
    target = cache_dir / f"{url.parent.name}-{hashlib.sha256(state).hexdigest()[:12]}" / url.name
    in_splits = re.compile("|".join(rf"-{re.escape(s)}\.tfrecord" for s in splits) or "$.")
    wanted = [file for file in files if ".tfrecord" not in file.name or in_splits.search(file.name)]
    with storage.write_errors(target, sum(f.size for f in wanted)):
        target.mkdir(parents=True, exist_ok=True)
    with _host_lock(target.parent / ".lock", f"{target}: waiting for another process of this host to finish copying"):
        missing = [f for f in wanted if _size(target / f.name) != f.size]
        if missing:
            _copy_all(url, missing, target)
        for split in splits:
            _verify(url, target, split)
    return epath.Path(target)


def _listing(url: epath.Path) -> list[_File]:
    """The files of a folder, without subfolders and hidden files."""
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(os.fspath(url))
        infos = filesystem.ls(root, detail=True)
    except Exception as error:
        raise storage.StorageError(f"{url} can't be read: {(str(error) or repr(error)).splitlines()[0][:200]}") from error
    files = []
    for info in infos:
        if info["type"] == "file" and (name := info["name"].rsplit("/", 1)[-1]) and not name.startswith("."):
            changed = info.get("generation", info.get("mtime", ""))
            files.append(_File(name, int(info["size"]), info.get("crc32c", ""), str(changed)))
    if not files:
        raise storage.StorageError(f"{url} is empty or not there: expected a dataset folder such as DATA/grid/CONFIG/2.1.0")
    return files


@contextlib.contextmanager
def _host_lock(lock: Path, waiting: str) -> Iterator[None]:
    """Admits one process of the host at a time; prints `waiting` if it has to wait. The system unlocks when a process dies."""
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
    """Copies files in parallel and prints the progress; stops at the first error."""
    import fsspec

    for temporary in target.glob(".*.tmp"):  # from a process that was killed: we hold the lock
        temporary.unlink()
    needed = sum(file.size for file in files)
    if storage.free_bytes(target) < needed:
        raise storage.StorageError(storage.disk_full_message(target, needed) + ", or delete older copies beside it")
    filesystem, root = fsspec.core.url_to_fs(os.fspath(url))
    progress = _Progress(f"{url} -> {target}", needed)
    with storage.write_errors(target, needed, url), ThreadPoolExecutor(PARALLEL_COPIES) as pool:
        running = [pool.submit(_copy, filesystem, f"{root}/{f.name}", f, target, progress) for f in files]
        try:
            for future in running:
                future.result()
        except BaseException:
            progress.stopped = True
            raise
    progress.report()


def _copy(filesystem, source: str, file: _File, target: Path, progress: _Progress) -> None:
    """Copies one file; StorageError, and no file, if its size or its CRC32C (where the bucket has one) differs from the source."""
    import google_crc32c

    checksum, size = google_crc32c.Checksum(), 0
    with filesystem.open(source, "rb", block_size=BLOCK) as reader, storage.atomic_write(target / file.name) as writer:
        while data := reader.read(BLOCK):
            if progress.stopped:
                raise storage.StorageError(f"{target}: stopped")
            writer.write(data)
            checksum.update(data)
            size += len(data)
            progress.add(len(data))
        if size != file.size:
            raise storage.StorageError(
                f"{source}: read {size:,} bytes, expected {file.size:,}; the file changed during the copy, run the command again"
            )
        if file.crc32c and base64.b64encode(checksum.digest()).decode() != file.crc32c:
            raise storage.StorageError(f"{source}: the data read have another CRC32C than the bucket's; run the command again")


class _Progress:
    """Counts the bytes copied by all threads and reports them on stderr every REPORT_EVERY_S and at the end."""

    def __init__(self, title: str, total: int):
        self.stopped = False
        self._title, self._total, self._done, self._lock = title, total, 0, threading.Lock()
        self._started = self._reported = time.monotonic()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if time.monotonic() - self._reported > REPORT_EVERY_S:
                self.report()

    def report(self) -> None:
        self._reported = time.monotonic()
        mb, rate = self._done / 1e6, self._done / 1e6 / max(self._reported - self._started, 1e-3)
        print(f"{self._title}: {mb:,.1f} of {self._total / 1e6:,.1f} MB, {rate:,.1f} MB/s", file=sys.stderr, flush=True)


def _verify(url: epath.Path, target: Path, split: str) -> None:
    """Verifies all checksums of a split, once per copy; deletes the files if one is wrong, so that the next run copies again."""
    verified = target.parent / f".{split}.verified"
    if verified.exists():
        return
    try:
        tfrecords.Records(target, split, mouth=False).verify()
    except tfrecords.MissingSplitError:
        raise
    except tfrecords.RecordError as error:
        for file in target.glob(f"*-{split}.tfrecord*"):
            file.unlink()
        raise tfrecords.RecordError(f"{error}; this was a copy of {url} and has been deleted") from error
    verified.touch()
