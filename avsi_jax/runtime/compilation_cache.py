"""Keeps the programs that jax compiles for inpainting from one process to the next: the first clip starts seconds earlier.

It changes settings of jax for the whole process, so it is for commands, not for functions of the library.

JAX_COMPILATION_CACHE_DIR and jax's own setting of that name take precedence. Without a writable folder programs are simply
compiled in every process. jax writes an entry in place and never overwrites an existing one, so truncated entries (full disk,
killed process) have to be removed here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import zlib
from pathlib import Path

MIN_COMPILE_S = 0.1  # programs that compile faster are not kept
MAX_BYTES = 2**28  # of all entries that are kept at the start of a process, the newest; inpainting needs a tenth of it
READ_BYTES = 2**20  # of an entry at once


def default_folder() -> Path:
    """The folder in the user's cache; one for each kind of processor, since programs are compiled for a specific one."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "avsi_jax" / f"programs-{_processor_hash()}"


def enable() -> None:
    """Makes jax keep what it compiles from now on, unless a cache is configured already or the folder cannot be written."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.config.jax_compilation_cache_dir:
        return
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home directory
        folder = default_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            remove_truncated_entries(folder)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S)


def remove_truncated_entries(folder: Path) -> None:
    """Removes incomplete entries, and the oldest beyond MAX_BYTES in all.

    Recognises incomplete entries compressed with zlib, which jax uses where zstandard is not installed.
    """
    total = 0
    for entry in sorted(folder.glob("*-cache"), key=_modified_s, reverse=True):
        with contextlib.suppress(OSError):
            total += entry.stat().st_size
            if total > MAX_BYTES or not _is_complete(entry):
                entry.unlink()


def _modified_s(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:
        return 0.0


def _is_complete(entry: Path) -> bool:
    with entry.open("rb") as file:
        data, stream = file.read(READ_BYTES), zlib.decompressobj()
        if data[:1] != b"\x78":
            return bool(data)
        with contextlib.suppress(zlib.error):
            while data and not stream.eof:
                stream.decompress(data)
                data = file.read(READ_BYTES)
        return stream.eof


def _processor_hash() -> str:
    """Twelve hex digits that differ between kinds of processor."""
    description = f"{platform.system()} {platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        description += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return hashlib.sha256(description.encode()).hexdigest()[:12]
