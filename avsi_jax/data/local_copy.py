"""A dataset in a bucket or on a slow disk, copied to this host and verified before a training reads it."""

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

COPIES_AT_ONCE = 4  # one stream of a bucket leaves a host's network idle
BLOCK = 2**23  # bytes read at once
SAY_EVERY_S = 10


class _File(NamedTuple):
    """A file of the source. crc32c: of its content, '' on a disk, which keeps none; changed: its generation or time of change."""

    name: str
    size: int
    crc32c: str
    changed: str


def local_copy(url, cache_dir, splits: Sequence[str]) -> epath.Path:
    """A dataset's folder (as of tfrecords.find_dataset, on gs:// or a slow disk), copied to this host; the folder of the copy.

    The records of `splits` and all small files are copied, into CACHE_DIR/CONFIG-xxxxxxxxxxxx/VERSION, whose x stand for what the
    source holds: a changed source is copied anew beside the old copy. Of a host's processes one copies and the others wait. A file
    gets its name when it is whole and the same as in the bucket by CRC32C; then the checksums of all records are verified. What is
    there already is not copied again, so a copy that was cut off goes on.

    Raises StorageError where the source can't be read, the disk has no room or a file arrives damaged, tfrecords.RecordError where
    the source's own records are damaged, MissingSplitError where a split is none of its.
    """
    url, cache_dir = storage.folder(url), Path(storage.folder(cache_dir))
    found = _listing(url)
    described = repr((str(url), sorted(found))).encode()
    target = cache_dir / f"{url.parent.name}-{hashlib.sha256(described).hexdigest()[:12]}" / url.name
    of_splits = re.compile("|".join(rf"-{re.escape(s)}\.tfrecord" for s in splits) or "$.")
    wanted = [file for file in found if ".tfrecord" not in file.name or of_splits.search(file.name)]
    with storage.write_errors(target, sum(f.size for f in wanted)):
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
        raise storage.StorageError(f"{url} can't be read: {(str(error) or repr(error)).splitlines()[0][:200]}") from error
    files = []
    for info in infos:
        if info["type"] == "file" and (name := info["name"].rsplit("/", 1)[-1]) and not name.startswith("."):
            changed = info.get("generation", info.get("mtime", ""))
            files.append(_File(name, int(info["size"]), info.get("crc32c", ""), str(changed)))
    if not files:
        raise storage.StorageError(f"{url} is empty or not there: expected a dataset's folder, such as DATA/grid/CONFIG/2.1.0")
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
    if storage.free_bytes(target) < needed:
        raise storage.StorageError(storage.disk_full(target, needed) + ", or delete older copies beside it")
    filesystem, root = fsspec.core.url_to_fs(os.fspath(url))
    progress = _Progress(f"{url} -> {target}", needed)
    with storage.write_errors(target, needed, url), ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
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
    with filesystem.open(source, "rb", block_size=BLOCK) as reader, storage.atomic_write(target / file.name) as writer:
        while data := reader.read(BLOCK):
            if progress.stopped:
                raise storage.StorageError(f"{target}: stopped")
            writer.write(data)
            found.update(data)
            size += len(data)
            progress.add(len(data))
        if size != file.size:
            raise storage.StorageError(
                f"{source}: read {size:,} bytes, expected {file.size:,}; the file changed during the copy, start again"
            )
        if file.crc32c and base64.b64encode(found.digest()).decode() != file.crc32c:
            raise storage.StorageError(f"{source}: what was read has another CRC32C than the bucket's; start again")


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
        raise tfrecords.RecordError(f"{error}; it was a copy of {url}, and is deleted") from error
    verified.touch()
