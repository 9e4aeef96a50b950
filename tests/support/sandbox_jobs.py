"""Jobs that a worker process of avsi-app must not be able to do: functions, since the worker imports them by name."""

import os
import resource
import signal
import socket
import subprocess
import time

import numpy as np


def limits() -> dict[str, int]:
    """The limits of this process: CPU seconds, bytes of a file, bytes of a core dump."""
    kinds = {"cpu_s": resource.RLIMIT_CPU, "file_bytes": resource.RLIMIT_FSIZE, "core_bytes": resource.RLIMIT_CORE}
    return {name: resource.getrlimit(kind)[1] for name, kind in kinds.items()}


def connect() -> None:
    """Opens a connection to another machine."""
    socket.create_connection(("192.0.2.1", 80), 1)


def start_program() -> None:
    """Starts another program."""
    subprocess.run(["true"])


def write_file(path: str, num_bytes: int) -> None:
    """Writes a sparse file: it has the size, and takes no space on the disk."""
    with open(path, "wb") as file:
        file.seek(num_bytes)
        file.write(b"x")


def allocate(num_bytes: int) -> int:
    """Allocates memory that is not used."""
    return np.zeros(num_bytes, np.uint8).size


def crash() -> None:
    """Ends this process as a fault in a decoder would."""
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    """Does not return."""
    time.sleep(3600)
