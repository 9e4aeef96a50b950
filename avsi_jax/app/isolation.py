"""What keeps a server to itself: no calls to other machines, a folder of its own that goes when it ends, settings that end with it.

The standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "avsi-app-"  # of temporary folders
BEGINNING_S = 60  # a server's folder has its lock within this
HERE = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "", None}


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A temporary folder, gone afterwards. Those of servers that were killed before they could remove them go first."""
    remove_left_behind()
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder, _locked(Path(folder)):
        yield Path(folder)


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables, as they were afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """As long as this process lives, its folder is not taken for one that was left behind."""
    import fcntl

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_left_behind() -> None:
    """Folders of servers that were killed before they could remove them."""
    import fcntl
    import shutil

    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/lock"):
        with contextlib.suppress(OSError), lock.open("r") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):  # the deleting was broken off when the lock was gone already
        with contextlib.suppress(OSError):
            if not (folder / "lock").exists() and time.time() - folder.stat().st_mtime > BEGINNING_S:
                shutil.rmtree(folder, ignore_errors=True)


def forbid_calls_outside(host: str) -> None:
    """From now on this process can't reach another machine, whatever a library or a request asks for."""
    import ipaddress

    def is_here(name) -> bool:
        name = name.decode() if isinstance(name, bytes) else name
        with contextlib.suppress(ValueError):
            return name in HERE or name == host or ipaddress.ip_address(name.partition("%")[0]).is_loopback
        return False

    def watch(event: str, args: tuple) -> None:
        if event in ("socket.connect", "socket.sendto"):
            asked = args[1][0] if isinstance(args[1], tuple) else None  # a path is a socket of this machine
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            asked = args[0]
        else:
            return
        if not is_here(asked):
            raise PermissionError(f"avsi-app asks nothing of other machines; found a call to {asked}")

    sys.addaudithook(watch)
