"""Standard streams that never end a command: closed ones, a full disk behind stdout, names that the encoding lacks.

What cannot be encoded is escaped. Where stdout cannot be written, one line on stderr says so, the command goes on, and its exit
code is not 0. If the reader of stdout closes the pipe, BrokenPipeError is left to the caller; one of stderr loses the messages.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class GuardedStream:
    """A text stream whose write errors are recorded instead of raised. `error`: the first of them, or None.

    raises_broken_pipe: whether BrokenPipeError is raised nevertheless.
    """

    def __init__(self, stream: TextIO | None, *, raises_broken_pipe: bool):
        self._stream, self._raises_broken_pipe, self.error = stream, raises_broken_pipe, None

    def write(self, text: str) -> int:
        """Writes text, or drops it after an error."""
        if self._stream is None:
            self.error = self.error or (OSError("it is closed") if text else None)
        elif self.error is None:
            self._try(self._stream.write, text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the stream, unless there was an error."""
        if self._stream is not None and self.error is None:
            self._try(self._stream.flush)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        if self._stream is None:
            raise io.UnsupportedOperation(f"the stream is closed: {name}")
        return getattr(self._stream, name)

    def _try(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except (OSError, ValueError) as error:  # ValueError: closed by someone else
            if isinstance(error, BrokenPipeError) and self._raises_broken_pipe:
                raise
            self.error = error
            self.discard()

    def discard(self) -> None:
        """Drops what is in the buffer and all that follows, so that it raises no error when the process ends."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextlib.contextmanager
def guarded() -> Iterator[GuardedStream]:
    """Replaces the standard streams while a command runs; yields its stdout."""
    before = sys.stdin, sys.stdout, sys.stderr
    _open_missing_descriptors()
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  closed when the process ends
    texts = {stream: stream.errors for stream in before[1:] if isinstance(stream, io.TextIOWrapper)}
    for stream in texts:
        stream.reconfigure(errors="backslashreplace")
    sys.stdout = GuardedStream(sys.stdout, raises_broken_pipe=True)
    sys.stderr = GuardedStream(sys.stderr, raises_broken_pipe=False)
    try:
        yield sys.stdout
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        for stream, errors in texts.items():
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)


def _open_missing_descriptors() -> None:
    """Opens the null device on closed descriptors 0 to 2: otherwise the next file that is opened gets their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def stdin_text() -> str:
    """All of stdin, decoded as `text_of` does whatever the encoding of the stream is."""
    buffer = getattr(sys.stdin, "buffer", None)
    return text_of(buffer.read()) if buffer is not None else sys.stdin.read().removeprefix("\ufeff")


def text_of(data: bytes) -> str:
    """UTF-8 text, with other bytes as in file names; UTF-16 where it begins with that byte order mark. Without the mark."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    return data.decode("utf-8-sig", errors="surrogateescape")
