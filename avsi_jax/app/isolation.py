"""Isolation of the server: blocks outgoing network access, a temporary folder and environment variables that are undone at the end.

Uses the standard library alone.
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
MAX_START_S = 60  # a server locks its folder within this time
LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "", None}


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder, deleted afterwards. First deletes the folders of servers that were killed."""
    remove_left_behind()
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder, _locked(Path(folder)):
        yield Path(folder)


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Sets environment variables, and restores their values afterwards."""
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
    """Holds a lock in the folder as long as this process runs, which shows other servers that it is in use."""
    import fcntl

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_left_behind() -> None:
    """Deletes the folders of servers that were killed before they could delete them."""
    import fcntl
    import shutil

    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/lock"):
        with contextlib.suppress(OSError), lock.open("r") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):  # a deletion was interrupted after the lock was deleted
        with contextlib.suppress(OSError):
            if not (folder / "lock").exists() and time.time() - folder.stat().st_mtime > MAX_START_S:
                shutil.rmtree(folder, ignore_errors=True)


def block_outgoing_connections(host: str) -> None:
    """From now on every connection and name lookup of this process to another machine raises PermissionError.

    host: the server's own address, which stays reachable.
    """
    import ipaddress

    def is_local(name) -> bool:
        name = name.decode() if isinstance(name, bytes) else name
        with contextlib.suppress(ValueError):
            return name in LOCAL_HOSTS or name == host or ipaddress.ip_address(name.partition("%")[0]).is_loopback
        return False

    def audit(event: str, args: tuple) -> None:
        if event in ("socket.connect", "socket.sendto"):
            requested = args[1][0] if isinstance(args[1], tuple) else None  # a path is a socket on this machine
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            requested = args[0]
        else:
            return
        if not is_local(requested):
            raise PermissionError(f"avsi-app makes no requests to other machines; found one to {requested}")

    sys.addaudithook(audit)
