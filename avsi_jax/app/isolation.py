"""Isolation of the server: no outgoing network access, a temporary folder and environment variables that are undone at the end.

Uses the standard library alone.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "avsi-app-"  # of temporary folders
MAX_START_S = 60  # a server locks its folder within this time
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "")
MAX_MESSAGE = 200


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


ADDRESS_EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg")  # arguments: the socket and the address
NAME_EVENTS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")  # argument: the name
PROGRAM_EVENTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
IP_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def block_outgoing_connections(host: str) -> None:
    """From now on what Python code of this process does to reach another machine raises PermissionError.

    These are connections, datagrams and name lookups through the module socket, and all starts of other programs, which this
    block would not reach. Sockets of other kinds (Bluetooth, virtual machines) are refused too; those inside this machine are not.
    Libraries in C are not covered. host: the server's own address, which stays reachable.
    """

    def is_local(name) -> bool:
        name = name.decode(errors="replace") if isinstance(name, bytes | bytearray) else name
        if name is None or name in LOCAL_HOSTS or name == host:
            return True
        with contextlib.suppress(ValueError):
            return isinstance(name, str) and ipaddress.ip_address(name.partition("%")[0]).is_loopback
        return False

    def audit(event: str, args: tuple) -> None:
        if event in ADDRESS_EVENTS:
            opened, address = args[:2]
            if address is None or opened.family == socket.AF_UNIX:  # None: it is connected already
                return
            requested = address[0] if opened.family in IP_FAMILIES and isinstance(address, tuple) and address else address
        elif event in NAME_EVENTS:
            requested = args[0][0] if isinstance(args[0], tuple) else args[0]
        elif event in PROGRAM_EVENTS:
            raise PermissionError(f"avsi-app starts no other programs; found {event} of {args[0]!r}"[:MAX_MESSAGE])
        else:
            return
        if not is_local(requested):
            raise PermissionError(f"avsi-app makes no requests to other machines; found one to {requested}"[:MAX_MESSAGE])

    sys.addaudithook(audit)


@contextlib.contextmanager
def without_uvloop() -> Iterator[None]:
    """Servers that start inside use asyncio's event loop: uvloop connects in C, where `block_outgoing_connections` sees nothing."""
    before = sys.modules.get("uvloop", False)
    sys.modules["uvloop"] = None
    try:
        yield
    finally:
        del sys.modules["uvloop"]
        if before is not False:
            sys.modules["uvloop"] = before
