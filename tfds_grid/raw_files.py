"""A raw folder as users have it -> one list of files, archives opened in place.

A .zip or .tar is read where it lies; a compressed .tar is unpacked once, to a plain .tar in the cache. An archive counts as a
folder of its name, so that `s1.zip` holding `bbaf2n.mpg` is `s1/bbaf2n.mpg`. Archives come from the network: a member that would
leave its folder, a link, a device, a password or an absurd size refuses the whole archive.
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
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator

ZIP, TAR = (".zip",), (".tar",)
PACKED_TAR = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
MAX_FILE_BYTES = 2**30  # of one file or member; 3 s of 720x576 as Grid has it take 3 MB
MAX_RATIO = 200  # unpacked over packed, where it is more than
BOMB_BYTES = 2**26  # this much
MAX_MEMBERS = 1_000_000
COPY_BYTES = 2**20


class RawDataError(ValueError):
    """An archive that can't be read or must not be; one line."""


@dataclasses.dataclass(frozen=True)
class RawFile:
    """A file, or a member of an archive. place: where it lies below the raw folder, archives being folders there."""

    path: pathlib.Path  # the file, or its archive
    place: str
    member: str = ""  # of a .zip
    start: int = -1  # bytes, of a .tar's member
    size: int = -1

    @property
    def name(self) -> str:
        return self.place.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0] or self.name

    @property
    def suffix(self) -> str:
        return "." + self.name.rpartition(".")[2].lower() if "." in self.name else ""

    @property
    def folders(self) -> list[str]:
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
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as e:
            raise RawDataError(f"{self.place}: can't be unpacked ({e}); fetch {self.path.name} again") from e
        if len(data) > limit:
            raise RawDataError(f"{self.place}: more than {limit:,} bytes")
        return data

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[pathlib.Path]:
        """A path that libraries can open: itself, or a copy that is gone afterwards."""
        if not self.member and self.start < 0:
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="avsi_") as folder:
            copy = pathlib.Path(folder, f"clip{self.suffix}")
            copy.write_bytes(self.read())
            yield copy


@functools.lru_cache(128)
def _opened(path: pathlib.Path) -> zipfile.ZipFile:
    """Kept open: clips come from 34 archives in turn, and the list of alignments.zip has 34,000 lines."""
    return zipfile.ZipFile(path)


def list_files(raw: pathlib.Path, cache: pathlib.Path) -> list[RawFile]:
    """All files below `raw` in an order that does not depend on the file system; hidden ones and macOS' shadows left out.

    `cache`: where compressed tars are unpacked to. Raises RawDataError for an archive that is damaged or hostile.
    """
    found = []
    for folder, folders, names in os.walk(raw, followlinks=True):
        folders[:] = [f for f in folders if not _is_hidden(f) and not _is_loop(folder, f)]
        below = os.path.relpath(folder, raw).replace(os.sep, "/")
        for name in names:
            if _is_hidden(name):
                continue
            place, path = (name if below == "." else f"{below}/{name}"), pathlib.Path(folder, name)
            found += _members(path, place, cache) if is_archive(name) else [RawFile(path, place)]
    return sorted(found, key=lambda f: f.place)


def is_archive(name: str) -> bool:
    return name.lower().endswith(ZIP + TAR + PACKED_TAR)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_loop(folder: str, name: str) -> bool:
    """A link to a folder above itself."""
    target = os.path.realpath(os.path.join(folder, name))
    return os.path.islink(os.path.join(folder, name)) and os.path.realpath(folder).startswith(target)


def _members(path: pathlib.Path, place: str, cache: pathlib.Path) -> list[RawFile]:
    """The files in an archive, under a folder named as the archive is without its suffixes (s1.mpg_vcd.zip: s1)."""
    name = place.lower()
    home = place.rpartition("/")[0] + "/" if "/" in place else ""
    home += re.sub(r"(\.mpg_vcd|\.mpg_6000(\.part\d+)?)?(\.zip|\.tar|\.tgz|\.txz|\.tbz2|\.tar\.\w+)$", "", path.name, flags=re.I)
    try:
        if name.endswith(ZIP):
            return _members_of_zip(path, place, home)
        return _members_of_tar(path if name.endswith(TAR) else _unpacked(path, place, cache), place, home)
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, EOFError, zlib.error) as e:
        raise RawDataError(f"{place}: can't be read as an archive ({e or type(e).__name__}); fetch it again") from e


def _members_of_zip(path: pathlib.Path, place: str, home: str) -> list[RawFile]:
    found = []
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
            if not info.is_dir() and not any(map(_is_hidden, info.filename.split("/"))):
                found.append(RawFile(path, f"{home}/{info.filename}", member=info.filename, size=info.file_size))
    return found


def _members_of_tar(path: pathlib.Path, place: str, home: str) -> list[RawFile]:
    found = []
    with tarfile.open(path, "r:") as archive:
        for number, info in enumerate(archive):
            _check_count(number, place)
            _check_name(info.name, place)
            if not (info.isreg() or info.isdir()) or info.issparse():
                raise RawDataError(f"{place}: its member {info.name!r} is a link, device or sparse file; refused")
            _check_size(info.size, info.size, info.name, place)
            name = info.name.removeprefix("./")
            if info.isreg() and not any(map(_is_hidden, name.split("/"))):
                found.append(RawFile(path, f"{home}/{name}", start=info.offset_data, size=info.size))
        if found and found[-1].start + found[-1].size > path.stat().st_size:
            raise tarfile.ReadError("it is cut short")
    return found


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
    """The plain .tar of a compressed one, made where the cache has none."""
    about = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:16]
    plain = cache / "unpacked" / f"{path.name.partition('.')[0]}-{key}.tar"
    if plain.exists():
        return plain
    plain.parent.mkdir(parents=True, exist_ok=True)
    half = plain.with_name(f"{plain.name}.{os.getpid()}.tmp")
    most, size = max(BOMB_BYTES, MAX_RATIO * about.st_size), 0
    try:
        with _open_packed(path) as source, half.open("wb") as target:
            while block := source.read(COPY_BYTES):
                size += len(block)
                if size > most:
                    raise RawDataError(f"{place}: unpacks from {about.st_size:,} to more than {most:,} bytes; refused")
                target.write(block)
        half.replace(plain)
    except OSError as e:
        if e.errno is None:  # gzip and bz2 say so of damaged data
            raise tarfile.ReadError(str(e)) from e
        raise
    finally:
        half.unlink(missing_ok=True)
    return plain


def _open_packed(path: pathlib.Path):
    """The stream behind the compression its first bytes tell."""
    import bz2
    import gzip

    with path.open("rb") as f:
        head = f.read(6)
    for magic, opened in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open)):
        if head.startswith(magic):
            return opened(path, "rb")
    raise tarfile.ReadError("not compressed by gzip, bzip2 or xz")
