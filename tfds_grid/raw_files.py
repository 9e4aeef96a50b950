"""Lists the files of a raw folder, including those inside archives.

A .zip or .tar is read in place; a compressed .tar is unpacked once, to a plain .tar in the cache. An archive is treated as a
folder with its name: `bbaf2n.mpg` in `s1.zip` is `s1/bbaf2n.mpg`. Archives come from the network: an archive with a member that
points outside it, a link, a device, a password or an implausible size is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import lzma
import os
import pathlib
import re
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

ZIP, TAR = (".zip",), (".tar",)
PACKED_TAR = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
MAX_FILE_BYTES = 2**30  # of one file or member; a 3 s Grid clip at 720x576 takes 3 MB
MAX_RATIO = 200  # of unpacked to packed size, for members above BOMB_BYTES
BOMB_BYTES = 2**26
MAX_MEMBERS = 1_000_000
COPY_BYTES = 2**20
# What the libraries raise for archives that are damaged or made by newer software.
DAMAGED_ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error)
DAMAGED_ERRORS += (EOFError, NotImplementedError, UnicodeDecodeError, OverflowError)


class RawDataError(ValueError):
    """An archive that can't be read or is refused; the message is one line."""


class DiskFullError(Exception):
    """There is no disk space for a temporary copy of a clip. Stops the build, since the clip itself may be fine."""


@dataclasses.dataclass(frozen=True)
class RawFile:
    """A file, or a member of an archive. place: its path below the raw folder, with archives as folders."""

    path: pathlib.Path  # the file, or its archive
    place: str
    member: str = ""  # of a .zip
    start: int = -1  # bytes, of a .tar's member
    size: int = -1

    @property
    def name(self) -> str:
        """File name with suffix."""
        return self.place.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """File name without suffix."""
        return self.name.rpartition(".")[0] or self.name

    @property
    def suffix(self) -> str:
        """Lower-case suffix with its dot; '' where there is none."""
        return "." + self.name.rpartition(".")[2].lower() if "." in self.name else ""

    @property
    def number(self) -> int | None:
        """The number at the end of the stem, for numbered images; None where there is none."""
        match = re.search(r"[0-9]{1,9}$", self.stem)
        return int(match[0]) if match else None

    @property
    def folders(self) -> list[str]:
        """Names of the folders above it, below the raw folder."""
        return self.place.split("/")[:-1]

    def read(self, limit: int = MAX_FILE_BYTES) -> bytes:
        """Its bytes; RawDataError for more than `limit` and for a damaged archive, OSError where it can't be read."""
        try:
            if self.member:
                with _opened(self.path).open(self.member) as f:
                    data = f.read(limit + 1)
            else:
                with self.path.open("rb") as f:
                    f.seek(max(self.start, 0))
                    data = f.read(limit + 1 if self.start < 0 else min(self.size, limit + 1))
        except DAMAGED_ERRORS as e:
            raise RawDataError(f"{self.place}: can't be unpacked ({e or type(e).__name__}); fetch {self.path.name} again") from e
        if len(data) > limit:
            raise RawDataError(f"{self.place}: more than {limit:,} bytes")
        return data

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[pathlib.Path]:
        """Context manager: a path that libraries can open, the file itself or a temporary copy."""
        if not self.member and self.start < 0:
            yield self.path
            return
        content = self.read()
        with tempfile.TemporaryDirectory(prefix="avsi_") as folder:
            copy = pathlib.Path(folder, f"clip{self.suffix}")
            try:
                copy.write_bytes(content)
            except OSError as e:
                raise DiskFullError(f"{copy}: {len(content):,} bytes can't be written ({e.strerror or e}); set TMPDIR") from e
            yield copy


@functools.lru_cache(128)
def _opened(path: pathlib.Path) -> zipfile.ZipFile:
    """Kept open, because clips come from 34 archives in turn and alignments.zip has 34,000 members."""
    return zipfile.ZipFile(path)


def list_files(raw: pathlib.Path, cache: pathlib.Path) -> list[RawFile]:
    """All files below `raw`, in an order independent of the file system, without hidden files and macOS metadata.

    cache: folder that compressed tars are unpacked to. Raises RawDataError for an archive that is damaged or hostile.
    """
    files, visited = [], set()
    for folder, folders, names in os.walk(raw, onerror=_stop, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # reached by a link, which may be circular
            folders[:] = []
            continue
        visited.add(real)
        folders[:] = sorted(f for f in folders if not _is_hidden(f))
        below = os.path.relpath(folder, raw).replace(os.sep, "/")
        for name in names:
            if _is_hidden(name):
                continue
            place, path = (name if below == "." else f"{below}/{name}"), pathlib.Path(folder, name)
            files += _members(path, place, cache) if is_archive(name) else [RawFile(path, place)]
    return sorted(files, key=lambda f: f.place)


def is_archive(name: str) -> bool:
    """Whether a file name has the suffix of an archive."""
    return name.lower().endswith(ZIP + TAR + PACKED_TAR)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _stop(error: OSError) -> None:
    """Raises the error of a folder that can't be read, which os.walk would ignore."""
    raise error


def _members(path: pathlib.Path, place: str, cache: pathlib.Path) -> list[RawFile]:
    """The files in an archive, below a folder with the archive's name without suffixes (s1.mpg_vcd.zip: s1)."""
    name = place.lower()
    home = place.rpartition("/")[0] + "/" if "/" in place else ""
    home += re.sub(r"(\.mpg_vcd|\.mpg_6000(\.part\d+)?)?(\.zip|\.tar|\.tgz|\.txz|\.tbz2|\.tar\.\w+)$", "", path.name, flags=re.I)
    try:
        if name.endswith(ZIP):
            return _members_of_zip(path, place, home)
        return _members_of_tar(path if name.endswith(TAR) else _unpacked(path, place, cache), place, home)
    except DAMAGED_ERRORS as e:
        raise RawDataError(f"{place}: can't be read as an archive ({e or type(e).__name__}); fetch it again") from e
    except OSError as e:
        raise OSError(f"{path}: {e.strerror or e} ({e.filename or 'while it is read'})") from e


def _members_of_zip(path: pathlib.Path, place: str, home: str) -> list[RawFile]:
    files = []
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        _check_count(len(infos), place)
        for info in infos:
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise RawDataError(f"{place}: its member {info.filename!r} is a link or device; refused")
            if info.flag_bits & 1:
                raise RawDataError(f"{place}: its member {info.filename!r} needs a password; expected the corpus' own archive")
            _check_name(info.orig_filename, place)
            _check_size(info.file_size, info.compress_size, info.filename, place)
            name = _clean(info.filename)
            if not info.is_dir() and _is_wanted(name, place):
                files.append(RawFile(path, f"{home}/{name}", member=info.filename, size=info.file_size))
    return files


def _members_of_tar(path: pathlib.Path, place: str, home: str) -> list[RawFile]:
    files = []
    with tarfile.open(path, "r:") as archive:
        for number, info in enumerate(archive):
            _check_count(number, place)
            _check_name(info.name, place)
            if not (info.isreg() or info.isdir()) or info.issparse():
                raise RawDataError(f"{place}: its member {info.name!r} is a link, device or sparse file; refused")
            _check_size(info.size, info.size, info.name, place)
            name = _clean(info.name)
            if info.isreg() and _is_wanted(name, place):
                files.append(RawFile(path, f"{home}/{name}", start=info.offset_data, size=info.size))
        with path.open("rb") as f:  # tarfile treats a damaged header as the end of the archive
            f.seek(archive.offset)
            end = f.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
            raise tarfile.ReadError("it is cut short or damaged")
    return files


def _clean(name: str) -> str:
    return "/".join(part for part in re.split(r"[/\\]", name) if part not in ("", "."))


def _is_wanted(name: str, place: str) -> bool:
    """False for hidden files. RawDataError for an archive inside an archive, whose files would silently be missing."""
    if any(map(_is_hidden, name.split("/"))):
        return False
    if is_archive(name):
        raise RawDataError(f"{place}: holds the archive {name!r}; unpack {place} once, into --raw")
    return True


def _check_count(count: int, place: str) -> None:
    if count > MAX_MEMBERS:
        raise RawDataError(f"{place}: more than {MAX_MEMBERS:,} members; refused")


def _check_name(name: str, place: str) -> None:
    parts = re.split(r"[/\\]", name)
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or ".." in parts or "\0" in name:
        raise RawDataError(f"{place}: its member {name!r} points outside of the archive; refused")


def _check_size(size: int, packed: int, name: str, place: str) -> None:
    if size > MAX_FILE_BYTES or (size > BOMB_BYTES and size > MAX_RATIO * packed):
        raise RawDataError(f"{place}: its member {name!r} unpacks from {packed:,} to {size:,} bytes; refused")


def _unpacked(path: pathlib.Path, place: str, cache: pathlib.Path) -> pathlib.Path:
    """The plain .tar of a compressed one, unpacked to the cache if it is not there yet."""
    stat_result = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat_result.st_size} {stat_result.st_mtime_ns}".encode()).hexdigest()[:16]
    plain = cache / "unpacked" / f"{path.name.partition('.')[0]}-{key}.tar"
    if plain.exists():
        return plain
    plain.parent.mkdir(parents=True, exist_ok=True)
    temporary = plain.with_name(f"{plain.name}.{os.getpid()}.tmp")
    limit, size = max(BOMB_BYTES, MAX_RATIO * stat_result.st_size), 0
    try:
        with _open_packed(path) as source, temporary.open("wb") as target:
            while block := source.read(COPY_BYTES):
                size += len(block)
                if size > limit:
                    raise RawDataError(f"{place}: unpacks from {stat_result.st_size:,} to more than {limit:,} bytes; refused")
                target.write(block)
        temporary.replace(plain)
    except OSError as e:
        if e.errno is None:  # what gzip and bz2 raise for damaged data
            raise tarfile.ReadError(str(e)) from e
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return plain


def _open_packed(path: pathlib.Path) -> IO[bytes]:
    """The decompressed stream; the first bytes tell which compression it is."""
    import bz2
    import gzip

    with path.open("rb") as f:
        head = f.read(6)
    for magic, open_stream in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open)):
        if head.startswith(magic):
            return open_stream(path, "rb")
    raise tarfile.ReadError("not compressed by gzip, bzip2 or xz")
