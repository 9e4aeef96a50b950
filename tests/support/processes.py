"""Real processes on this machine that train as one, as the hosts of a pod do: each with its own CPU devices, joined by gloo.

`run(command)` for tests that wait for the end, `popen(command)` for those that kill, stop or signal one of them on the way.
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
    """How one process ended; a negative returncode is the signal that killed it."""

    returncode: int
    stdout: str
    stderr: str


class Process(subprocess.Popen):
    """One of the processes; `stdout_text()` and `stderr_text()` read what it has written so far."""

    def __init__(self, command, folder: Path, rank: int, **options):
        self.rank, self.written = rank, [folder / f"{rank}.{name}" for name in ("stdout", "stderr")]
        with open(self.written[0], "wb") as out, open(self.written[1], "wb") as err:  # files: a pipe nobody reads fills up
            super().__init__(command, stdout=out, stderr=err, start_new_session=True, **options)

    def stdout_text(self) -> str:
        return self.written[0].read_text(errors="replace")

    def stderr_text(self) -> str:
        return self.written[1].read_text(errors="replace")

    def kill_all(self) -> None:
        """It and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command_of(source_or_args) -> list[str]:
    """Python source, or the arguments of a command: ["-m", "avsi_jax.train", ...] and ["file.py", ...] get python before them."""
    if isinstance(source_or_args, str):
        return [sys.executable, "-c", source_or_args]
    args = [str(a) for a in source_or_args]
    return [sys.executable, *args] if args[0].startswith("-") or args[0].endswith(".py") else args


def environment(rank: int, processes: int, devices: int, port: int, **more: str) -> dict[str, str]:
    """What tells a process its place; of one process alone, what tells it nothing. A value None takes a variable away."""
    env = {k: v for k, v in os.environ.items() if k not in (*COORDINATES, "XLA_FLAGS")}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    if processes > 1:
        env |= dict(zip(COORDINATES, (f"127.0.0.1:{port}", str(processes), str(rank)), strict=True))
    return {k: v for k, v in (env | more).items() if v is not None}


@contextlib.contextmanager
def popen(source_or_args, processes: int = 2, devices: int = 2, *, cwd: Path = ROOT, **env: str):
    """The started processes, by rank; whatever is still alive in the end is killed."""
    command, port, started = command_of(source_or_args), free_port(), []
    with tempfile.TemporaryDirectory(prefix="avsi_jax_processes_") as folder:
        try:
            for rank in range(processes):
                where = environment(rank, processes, devices, port, **env)
                started.append(Process(command, Path(folder), rank, env=where, cwd=cwd))
            yield started
        finally:
            for process in started:
                process.kill_all()


def wait(started: list[Process], timeout: float, *, patience: float = 20) -> list[Finished]:
    """Until all have ended; where one fails the others get `patience` seconds more, and are then killed, as after `timeout`."""
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
    """How each process ended, by rank (see wait, popen). A test that expects success calls `succeed`."""
    with popen(source_or_args, processes, devices, **options) as started:
        return wait(started, timeout, patience=patience)


def succeed(source_or_args, processes: int = 2, devices: int = 2, **options) -> list[str]:
    """What each process wrote to stdout; AssertionError with everybody's last words where one failed."""
    finished = run(source_or_args, processes, devices, **options)
    words = "\n".join(f"--- process {i}: exit {f.returncode}\n{f.stderr[-3000:]}" for i, f in enumerate(finished))
    assert not any(f.returncode for f in finished), words
    return [f.stdout for f in finished]
