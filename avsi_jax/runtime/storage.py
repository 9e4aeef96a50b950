"""Atomic writes, appends and listings for files on a disk or in a bucket (gs://).

Paths are those of etils.epath, and its own read_text, exists, iterdir and unlink work as they are. This module adds what they do
not guarantee: a write that leaves the old file intact when it fails, a line appended to a file in a bucket (buckets cannot append:
gcsfs would overwrite the file with the line), and a listing of a bucket that shows what other processes have written since.
Every error is an OSError with a message of one line.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from etils import epath


class StorageError(OSError):
    """A file could not be read, written or copied."""


def as_path(path: os.PathLike | str) -> epath.Path:
    """The path of a folder or file as an epath.Path: absolute on a disk, gs:// unchanged; ValueError for other schemes."""
    path = epath.Path(path)
    scheme, _, rest = os.fspath(path).partition("://")
    if not rest:
        return epath.Path(os.path.abspath(path.expanduser()))
    if scheme != "gs":
        raise ValueError(f"{path}: found {scheme}://, expected a folder or gs://BUCKET/FOLDER")
    if not importlib.util.find_spec("gcsfs"):
        raise StorageError(f"{path}: gs:// needs gcsfs; pip install 'avsi_jax[gcs]'")
    _prepare_for_buckets()
    return path


def in_bucket(path: os.PathLike | str) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith("gs://")


def _prepare_for_buckets() -> None:
    """Settings of this process for gs://, made when the first such path is used; those that the caller has made are kept.

    Where tensorflow is installed, epath would import it, which takes seconds and hundreds of MB: gcsfs is enough. And gcsfs caches
    listings for ever, so a process would never see files that others add to a folder it has listed.
    """
    import fsspec.config

    os.environ.setdefault("EPATH_USE_TF", "false")
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)


def list_names(path: os.PathLike | str) -> list[str]:
    """The sorted names in a folder; [] where it does not exist (in a bucket a folder exists only while it holds a file)."""
    try:
        return sorted(p.name for p in as_path(path).iterdir())
    except FileNotFoundError:
        return []


# ----------------------------------------------------------------------------------------------------------------- writing


def write_text(path: os.PathLike | str, text: str) -> None:
    """Writes a text file atomically, as `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: os.PathLike | str, data: bytes) -> None:
    """Writes a file atomically: a failed write, or a machine that loses power, leaves the old file unchanged.

    On a disk a temporary file beside it is written, synchronised and renamed; in a bucket it is one object. Missing folders are
    created. StorageError where the file cannot be written.
    """
    path = as_path(path)
    with write_errors(path, len(data)):
        if in_bucket(path):
            path.write_bytes(data)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(Path(path)) as file:
                file.write(data)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A temporary file, open for bytes, that replaces `path` when the block succeeds and is deleted when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, on a disk, that takes its place when the block succeeds and is deleted when it fails.

    Until then the old folder stays as it is; its files that the new one does not have are kept. A process that is killed while the
    folders change places leaves the old one as .NAME.old, which the next call puts back or merges first.
    """
    new, old = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "old"))
    _keep_files_of(old, folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    _keep_files_of(old, folder)


def _keep_files_of(old: Path, folder: Path) -> None:
    """Moves what `folder` lacks there from `old`, and deletes `old`; if there is no `folder`, `old` becomes it."""
    if not old.exists():
        return
    if not folder.exists():
        os.rename(old, folder)
        return
    for entry in old.iterdir():
        if not (folder / entry.name).exists():
            os.rename(entry, folder / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    """Synchronises a folder's entries with the disk: a rename is not durable before."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems do not support it, and do not need it
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def append_line(path: os.PathLike | str, line: str) -> None:
    """Appends a line to a text file, as `append_bytes`."""
    append_bytes(path, f"{line}\n".encode())


def append_bytes(path: os.PathLike | str, data: bytes) -> None:
    """Appends to a file, created where it does not exist, and synchronises it; a failed write removes what it appended.

    In a bucket the whole file is read and written again: for small files with a single writer, since of two simultaneous appends
    one would be overwritten. StorageError where the file cannot be written.
    """
    path = as_path(path)
    with write_errors(path, len(data)):
        if in_bucket(path):
            path.write_bytes((path.read_bytes() if path.exists() else b"") + data)
            return
        with open(path, "ab", buffering=0) as file:
            old_size = os.fstat(file.fileno()).st_size
            try:
                _write_all(file, data)
                os.fsync(file.fileno())  # a row of a table must be as durable as the checkpoint written after it
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), old_size)
                raise


def _write_all(file, data: bytes) -> None:
    """Writes all of `data` to an unbuffered file, whose write() may take only a part, e.g. on a disk that is nearly full."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


@contextlib.contextmanager
def write_errors(path: os.PathLike | str, num_bytes: int, source: os.PathLike | str = "") -> Iterator[None]:
    """Turns an error of the block into a StorageError of one line with the path, the bytes and, on a full disk, the free space."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # gcsfs has its own errors for network and credentials
        if not isinstance(error, OSError) and not (in_bucket(path) or in_bucket(source)):
            raise
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(disk_full_message(path, num_bytes)) from error
        reason = getattr(error, "strerror", None) or (str(error) or repr(error)).splitlines()[0][:200]
        raise StorageError(f"{path}: {num_bytes:,} bytes could not be written: {reason}") from error


def disk_full_message(path: os.PathLike | str, needed_bytes: int) -> str:
    """The message for a disk that has no space for `needed_bytes`."""
    free = free_bytes(path)
    return f"{path}: the disk is full: {needed_bytes:,} bytes needed, {free:,} free; free some space or choose another disk"


def free_bytes(path: os.PathLike | str) -> int:
    """Free bytes of the disk of a path, which need not exist yet."""
    existing = next(p for p in (Path(path), *Path(path).parents) if p.exists())
    return shutil.disk_usage(existing).free
