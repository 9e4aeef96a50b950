"""Keeps what native libraries say for no reason off stderr. Nothing else is kept off: other lines, threads and child processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import gc
import os
import tempfile
from collections.abc import Callable, Iterator

CLONE_FILES = 0x400  # of Linux' unshare
STDERR = 2


def made(make: Callable, unwanted: str):
    """make(), run in a thread of its own whose stderr is a file; when it is through, or has failed, what it said goes to stderr,
    but for lines that hold `unwanted`.

    That thread alone has its own table of open files, so others, and children that they start meanwhile, keep their stderr. Where
    the system knows no such tables (Linux does), everything is said as ever.
    """
    with tempfile.TemporaryFile() as said, concurrent.futures.ThreadPoolExecutor(1) as apart:
        try:
            with _nothing_collected():
                return apart.submit(_made_apart, make, said.fileno()).result()
        finally:
            said.seek(0)
            told = b"".join(line for line in said if unwanted.encode() not in line)
            if told:
                os.write(STDERR, told)


def _made_apart(make: Callable, said: int):
    """In a thread that ends after this."""
    with contextlib.suppress(OSError, AttributeError):
        if ctypes.CDLL(None).unshare(CLONE_FILES) == 0:
            os.dup2(said, STDERR)
    return make()


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """A file that were collected in that thread would be closed in its table alone."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
