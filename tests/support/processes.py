"""Starts real processes on this machine that train together like the hosts of a pod, each with its own CPU devices, over gloo.

`run(command)` is for tests that wait for the end, `popen(command)` for those that kill, stop or signal a process on the way.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COORDINATES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Finished(NamedTuple):
    """The result of one process; a negative returncode is the signal that killed it."""

    returncode: int
    stdout: str
    stderr: str


class Process(subprocess.Popen):
    """A running process; `stdout_text()` and `stderr_text()` return its output so far."""

    def __init__(self, command, folder: Path, rank: int, **options):
        self.rank, self.output_files = rank, [folder / f"{rank}.{name}" for name in ("stdout", "stderr")]
        with open(self.output_files[0], "wb") as out, open(self.output_files[1], "wb") as err:  # an unread pipe would fill up
            super().__init__(command, stdout=out, stderr=err, start_new_session=True, **options)

    def stdout_text(self) -> str:
        return self.output_files[0].read_text(errors="replace")

    def stderr_text(self) -> str:
        return self.output_files[1].read_text(errors="replace")

    def kill_all(self) -> None:
        """Kills the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command_of(source_or_args) -> list[str]:
    """The command for Python source or for arguments; python is put before ["-m", "avsi_jax.train", ...] and ["file.py", ...]."""
    if isinstance(source_or_args, str):
        return [sys.executable, "-c", source_or_args]
    args = [str(a) for a in source_or_args]
    return [sys.executable, *args] if args[0].startswith("-") or args[0].endswith(".py") else args


def environment(rank: int, processes: int, devices: int, port: int, **more: str) -> dict[str, str]:
    """Environment variables of a process; a single process gets no place among others. A value of None unsets a variable."""
    env = {k: v for k, v in os.environ.items() if k not in (*COORDINATES, "XLA_FLAGS")}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    if processes > 1:
        env |= dict(zip(COORDINATES, (f"127.0.0.1:{port}", str(processes), str(rank)), strict=True))
    return {k: v for k, v in (env | more).items() if v is not None}


@contextlib.contextmanager
def popen(source_or_args, processes: int = 2, devices: int = 2, *, cwd: Path = ROOT, **env: str):
    """Starts the processes and yields them by rank; kills those that are still running at the end."""
    command, port, started = command_of(source_or_args), free_port(), []
    with tempfile.TemporaryDirectory(prefix="avsi_jax_processes_") as folder:
        try:
            for rank in range(processes):
                variables = environment(rank, processes, devices, port, **env)
                started.append(Process(command, Path(folder), rank, env=variables, cwd=cwd))
            yield started
        finally:
            for process in started:
                process.kill_all()


def wait(started: list[Process], timeout: float, *, patience: float = 20) -> list[Finished]:
    """Waits until all have ended, for at most `timeout` seconds, and at most `patience` after one failed; kills the others then."""
    end = time.monotonic() + timeout
    while any(p.poll() is None for p in started) and time.monotonic() < end:
        if any(p.returncode for p in started):
            end, patience = min(end, time.monotonic() + patience), timeout
        time.sleep(0.02)
    for process in started:
        if process.poll() is None:
            process.kill_all()
    return [Finished(p.returncode, p.stdout_text(), p.stderr_text()) for p in started]


def run(
    source_or_args, processes: int = 2, devices: int = 2, *, timeout: float = 120, patience: float = 20, **options
) -> list[Finished]:
    """The results by rank (see wait, popen). A test that expects success calls `succeed`."""
    with popen(source_or_args, processes, devices, **options) as started:
        return wait(started, timeout, patience=patience)


def succeed(source_or_args, processes: int = 2, devices: int = 2, **options) -> list[str]:
    """The stdout of each process; AssertionError with the end of every stderr where one failed."""
    finished = run(source_or_args, processes, devices, **options)
    errors = "\n".join(f"--- process {i}: exit {f.returncode}\n{f.stderr[-3000:]}" for i, f in enumerate(finished))
    assert not any(f.returncode for f in finished), errors
    return [f.stdout for f in finished]
