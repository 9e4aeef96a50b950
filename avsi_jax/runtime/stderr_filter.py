"""Removes known useless lines that native libraries write to stderr; other lines, threads and child processes are unaffected."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import TypeVar

CLONE_FILES = 0x400  # for Linux' unshare(2)
STDERR = 2

T = TypeVar("T")


def call_filtered(function: Callable[[], T], unwanted: str) -> T:
    """Calls function() and removes the lines that contain `unwanted` from what it writes to stderr.

    The function runs in a thread whose stderr is a temporary file; after it has returned or failed, the other lines are written
    to the real stderr. Only that thread has its own table of open files, so other threads, and child processes that they start
    meanwhile, keep their stderr. On systems without such tables (Linux has them) nothing is filtered.
    """
    with tempfile.TemporaryFile() as output, concurrent.futures.ThreadPoolExecutor(1) as executor:
        try:
            with _garbage_collection_disabled():
                return executor.submit(_call_redirected, function, output.fileno()).result()
        finally:
            output.seek(0)
            kept = b"".join(line for line in output if unwanted.encode() not in line)
            if kept:
                os.write(STDERR, kept)


def _call_redirected(function: Callable[[], T], output_fd: int) -> T:
    """Redirects stderr of the current thread, which must end after this call."""
    with contextlib.suppress(OSError, AttributeError):
        if ctypes.CDLL(None).unshare(CLONE_FILES) == 0:
            os.dup2(output_fd, STDERR)
    return function()


@contextlib.contextmanager
def _garbage_collection_disabled() -> Iterator[None]:
    """A file object collected in that thread would be closed in the thread's own table only."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
