"""Files that may lie on a disk or in a bucket (gs://): written whole or not at all.

Paths are etils.epath's; its own read_text, exists, iterdir and unlink do as they are. What they do not promise is here: a write
that leaves the old file whole, a line added in a bucket (which has no appending: gcsfs writes the line over the file), and a
listing of a bucket that shows what other processes have written since. Every error is an OSError of one line.
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

# Where tensorflow is installed, epath would import it for gs://: seconds and hundreds of MB. gcsfs does as well.
os.environ.setdefault("EPATH_USE_TF", "false")

from etils import epath  # noqa: E402


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
    with write_errors(path, len(data)):
        if in_bucket(path):
            path.write_bytes(data)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(Path(path)) as file:
                file.write(data)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator:
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
    with write_errors(path, len(data)):
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
def write_errors(path, num_bytes: int, source="") -> Iterator[None]:
    """Whatever goes wrong with a file, as a StorageError of one line that names it, the bytes and the room there is."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # gcsfs has errors of its own, of its network and of its credentials
        if not isinstance(error, OSError) and not (in_bucket(path) or in_bucket(source)):
            raise
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(disk_full(path, num_bytes)) from error
        said = getattr(error, "strerror", None) or (str(error) or repr(error)).splitlines()[0][:200]
        raise StorageError(f"{path}: {num_bytes:,} bytes could not be written: {said}") from error


def disk_full(path, needed: int) -> str:
    return f"{path}: the disk is full: {needed:,} bytes needed, {free_bytes(path):,} free; make room there or name another disk"


def free_bytes(path) -> int:
    """Bytes free on the disk of a path, which need not be there yet."""
    there = next(p for p in (Path(path), *Path(path).parents) if p.exists())
    return shutil.disk_usage(there).free
