"""Keeps the programs that jax compiles for inpainting from one process to the next: the first clip starts seconds earlier.

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
    """Removes incomplete entries. Recognises those compressed with zlib, which jax uses where zstandard is not installed."""
    for entry in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            data, stream = entry.read_bytes(), zlib.decompressobj()
            is_complete = bool(data)
            if data[:1] == b"\x78":
                with contextlib.suppress(zlib.error):
                    stream.decompress(data)
                is_complete = stream.eof
            if not is_complete:
                entry.unlink()


def _processor_hash() -> str:
    """Twelve hex digits that differ between kinds of processor."""
    description = f"{platform.system()} {platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        description += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return hashlib.sha256(description.encode()).hexdigest()[:12]
