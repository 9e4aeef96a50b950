"""Runs jobs in child processes that may hang, crash or exceed their memory: every job gives a result or the reason for its failure.

Files from the network are decoded by C libraries. A job runs in a child with limits on its memory and its time; a child that dies
or exceeds a limit is replaced, and only the job that it was working on fails.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sized
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

_start_lock = threading.Lock()  # held while a child starts: `light_start` changes state of the whole process
START_TIMEOUT_S = 300.0  # for imports on a busy machine or a slow network file system
AHEAD = 2  # jobs assigned to a child: one in progress, one waiting


class JobOutcome(NamedTuple):
    """Index and result of one job, or the reason why there is no result ('' where there is one)."""

    index: int
    result: Any
    failure: str = ""


def run(
    work: Callable,
    jobs: Iterable[tuple],
    *,
    workers: int,
    timeout_s: float,
    memory_mb: int,
    start: Callable | None = None,
    ahead: int = AHEAD,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Iterator[JobOutcome]:
    """Calls work(*job) for every job in `workers` child processes; yields the outcomes in any order.

    `work` and `start` (called once in every child, before its jobs) must be functions of a module. `timeout_s`: limit for one
    job, seconds. `memory_mb`: address space that a child may use beyond what it has after `start`. Jobs may come from a
    generator, which is read as children become free: at most `ahead` jobs per child are pending. An exception raised by `work`
    is raised here, after all children have ended; OSError where a child cannot start within start_timeout_s.
    """
    returned, unread = collections.deque(), enumerate(jobs)  # jobs of children that ended; jobs not read yet
    limits, timeouts_s = (memory_mb * 2**20, start), (timeout_s, start_timeout_s)
    children = [_Child(work, limits) for _ in range(min(workers, len(jobs)) if isinstance(jobs, Sized) else workers)]
    try:
        while children:
            least_busy = min(children, key=lambda child: len(child.assigned))
            if len(least_busy.assigned) < ahead and (job := returned.popleft() if returned else next(unread, None)):
                least_busy.assign(*job)
            elif any(child.assigned for child in children):
                yield from _collect(children, work, limits, timeouts_s, returned)
            else:
                break
    finally:
        for child in children:
            child.end()


def _collect(children: list[_Child], work, limits, timeouts_s: tuple, returned: collections.deque) -> Iterator[JobOutcome]:
    """Outcomes that arrive within a second or a time limit. Replaces children that died or exceeded the time limit of a job."""
    timeout_s, start_timeout_s = timeouts_s
    multiprocessing.connection.wait([c.pipe for c in children] + [c.process.sentinel for c in children], min(1, *timeouts_s))
    for position, child in enumerate(children):
        failure = ""
        try:
            while child.pipe.poll():
                if outcome := child.receive():
                    yield outcome
        except (EOFError, ConnectionResetError):
            failure = _exit_reason(child)
        if not failure and child.assigned and child.is_ready and time.monotonic() - child.since > timeout_s:
            failure = f"took more than {timeout_s:g} s"
        if not failure and not child.is_ready and time.monotonic() - child.began > start_timeout_s:
            failure = f"took more than {start_timeout_s:g} s"
        if failure:
            child.end()
            if not child.is_ready:
                raise OSError(f"a worker process can't start ({failure}); free memory or use fewer --workers")
            (index, _), *others = child.assigned.items()
            returned.extendleft(reversed(others))
            children[position] = _Child(work, limits)
            yield JobOutcome(index, None, failure)


def _exit_reason(child: _Child) -> str:
    child.process.join(5)
    code = child.process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"crashed with {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"exited with status {code}"


class _Child:
    """One child process and the jobs assigned to it, in order."""

    def __init__(self, work: Callable, limits: tuple):
        context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
        self.pipe, child_end = context.Pipe()
        self.assigned: dict[int, tuple] = {}
        self.outbox: queue.SimpleQueue = queue.SimpleQueue()
        self.began = self.since = time.monotonic()
        self.is_ready = False
        self.process = context.Process(target=_serve, args=(child_end, work, *limits), daemon=True)
        with light_start():
            self.process.start()
        child_end.close()
        self.sender = threading.Thread(target=self._send_jobs, daemon=True)
        self.sender.start()

    def assign(self, index: int, job: tuple) -> None:
        if not self.assigned:
            self.since = time.monotonic()
        self.assigned[index] = job
        self.outbox.put(ForkingPickler.dumps((index, job)))

    def _send_jobs(self) -> None:
        """In a thread: a job larger than the pipe's buffer waits for a child that is busy or hangs; the parent must not."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the child died: seen when its pipe is read
            while (job := self.outbox.get()) is not None:
                self.pipe.send_bytes(job)

    def receive(self) -> JobOutcome | None:
        """The next outcome; None for the message that the child has started."""
        index, result, error = self.pipe.recv()
        self.since = time.monotonic()
        if index is None:
            self.is_ready = True
            return None
        del self.assigned[index]
        if isinstance(error, MemoryError):
            return JobOutcome(index, None, "needs more memory than its limit")
        if error is not None:
            raise error
        return JobOutcome(index, result)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.outbox.put(None)
        self.sender.join()
        self.pipe.close()


def _serve(pipe: Connection, work: Callable, memory_bytes: int, start: Callable | None) -> None:
    """The child's main function: receives jobs and sends results until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if start:
        start()
    _limit_memory(memory_bytes)
    pipe.send((None, None, None))
    while True:
        index, job = pipe.recv()
        try:
            reply = (index, work(*job), None)
        except Exception as e:
            reply = (index, None, e)
        try:
            pipe.send(reply)
        except OSError:
            return  # the parent has closed the pipe
        except Exception as e:
            pipe.send((index, None, RuntimeError(f"{reply[2] or reply[1]!r} can't be sent: {e}")))


def _exit_with_parent() -> None:
    """Ends the child when its parent was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _limit_memory(extra_bytes: int) -> None:
    """Limits the address space to `extra_bytes` more than is in use now; Linux only."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/statm") as f:
        in_use = int(f.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = in_use + extra_bytes if hard == resource.RLIM_INFINITY else min(in_use + extra_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


@contextlib.contextmanager
def light_start() -> Iterator[None]:
    """A child started inside neither imports the caller's script nor starts BLAS threads: the children are the parallelism."""
    with _start_lock:
        main = sys.modules["__main__"]
        previous = {name: os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}
        sys.modules["__main__"] = types.ModuleType("__main__")
        os.environ.update(dict.fromkeys(previous, "1"))
        try:
            yield
        finally:
            sys.modules["__main__"] = main
            for name in previous:
                del os.environ[name]
            os.environ.update({name: value for name, value in previous.items() if value is not None})
