"""Where the programs that jax compiles for repairs are kept from one process to the next: seconds of every first repair.

JAX_COMPILATION_CACHE_DIR and jax's own setting of that name go before. A folder that cannot be written is no error: programs are
compiled anew then. jax writes an entry in place and never over one that is there, so one that was cut off, by a full disk or a
process that was ended, is thrown away here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import zlib
from pathlib import Path

LEAST_COMPILE_S = 0.1  # what takes less isn't kept


def folder() -> Path:
    """In the user's cache: one for each kind of processor, since programs are made for the one they were compiled on."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "avsi_jax" / f"programs-{_processor()}"


def keep() -> None:
    """Has jax keep what it compiles from now on, unless it is told already where, or the folder cannot be written."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.config.jax_compilation_cache_dir:
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home
        where = folder()
        where.mkdir(parents=True, exist_ok=True)
        if os.access(where, os.W_OK | os.X_OK):
            drop_cut_off(where)
            jax.config.update("jax_compilation_cache_dir", str(where))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_COMPILE_S)


def drop_cut_off(where: Path) -> None:
    """Removes entries that end too early: of those written with zlib, which jax takes where it finds no zstandard."""
    for entry in where.glob("*-cache"):
        with contextlib.suppress(OSError):
            data, stream = entry.read_bytes(), zlib.decompressobj()
            whole = bool(data)
            if data[:1] == b"\x78":
                with contextlib.suppress(zlib.error):
                    stream.decompress(data)
                whole = stream.eof
            if not whole:
                entry.unlink()


def _processor() -> str:
    """A few letters that differ between kinds of processor."""
    told = f"{platform.system()} {platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return hashlib.sha256(told.encode()).hexdigest()[:12]
