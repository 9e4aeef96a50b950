"""Child processes that may hang, crash or eat memory without harm: every job in gives a result or the reason why there is none.

Files from the network are decoded by C libraries. A job runs in a child with a limit on its memory and on its time; a child that
dies or takes too long is replaced, and only its own job is lost.
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
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

_starting = threading.Lock()  # held while a child starts: what is changed for it is the whole process's
AHEAD = 2  # jobs given to a child: one it works on, one that waits


class JobOutcome(NamedTuple):
    """Of one job: its result, or why there is none ('' where there is a result)."""

    index: int
    result: Any
    lost: str = ""


def run(
    work: Callable,
    jobs: Iterable[tuple],
    *,
    workers: int,
    timeout_s: float,
    memory_mb: int,
    start: Callable | None = None,
    ahead: int = AHEAD,
) -> Iterator[JobOutcome]:
    """work(*job) for every job, in `workers` children, outcomes in any order.

    work and start (called first in every child) are functions of a module. memory_mb: address space that a child may take beyond
    what it has after start. Jobs may come from a generator, which is read as children get free: at most `ahead` jobs a child are
    held. What work raises is raised here, after which no child is left.
    """
    waiting, coming = collections.deque(), enumerate(jobs)  # those of children that ended, and those not read yet
    limits = (memory_mb * 2**20, start)
    children = [_Child(work, limits) for _ in range(min(workers, len(jobs)) if isinstance(jobs, Sized) else workers)]
    try:
        while children:
            free = min(children, key=lambda child: len(child.given))
            if len(free.given) < ahead and (job := waiting.popleft() if waiting else next(coming, None)):
                free.give(*job)
            elif any(child.given for child in children):
                yield from _collect(children, work, limits, timeout_s, waiting)
            else:
                break
    finally:
        for child in children:
            child.end()


def _collect(children, work, limits, timeout_s, waiting) -> Iterator[JobOutcome]:
    """What the children have to say within a second or timeout_s, dead and late ones replaced."""
    multiprocessing.connection.wait([c.pipe for c in children] + [c.process.sentinel for c in children], min(1, timeout_s))
    for place, child in enumerate(children):
        lost = ""
        try:
            while child.pipe.poll():
                if outcome := child.take():
                    yield outcome
        except (EOFError, ConnectionResetError):
            lost = _cause(child)
        if not lost and child.given and child.is_ready and time.monotonic() - child.since > timeout_s:
            lost = f"took more than {timeout_s:g} s"
        if lost:
            child.end()
            if not child.is_ready:
                raise OSError(f"a worker process can't start ({lost}); more memory, or fewer --workers, may mend it")
            (index, _), *others = child.given.items()
            waiting.extendleft(reversed(others))
            children[place] = _Child(work, limits)
            yield JobOutcome(index, None, lost)


def _cause(child: _Child) -> str:
    child.process.join(5)
    code = child.process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"ended its process by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended its process with status {code}"


class _Child:
    """One process and the jobs it was given, in order."""

    def __init__(self, work, limits):
        context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
        self.pipe, its_end = context.Pipe()
        self.given: dict[int, tuple] = {}
        self.mail: queue.SimpleQueue = queue.SimpleQueue()
        self.since, self.is_ready = time.monotonic(), False
        self.process = context.Process(target=_serve, args=(its_end, work, *limits), daemon=True)
        with light_start():
            self.process.start()
        its_end.close()
        self.postman = threading.Thread(target=self._deliver, daemon=True)
        self.postman.start()

    def give(self, index: int, job: tuple) -> None:
        if not self.given:
            self.since = time.monotonic()
        self.given[index] = job
        self.mail.put(ForkingPickler.dumps((index, job)))

    def _deliver(self) -> None:
        """Sends what it is given. A job larger than the pipe waits for a child that is busy or hangs; the parent must not."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: its pipe says so when it is read
            while (job := self.mail.get()) is not None:
                self.pipe.send_bytes(job)

    def take(self) -> JobOutcome | None:
        """What it says next; None for that it has started."""
        index, result, error = self.pipe.recv()
        self.since = time.monotonic()
        if index is None:
            self.is_ready = True
            return None
        del self.given[index]
        if isinstance(error, MemoryError):
            return JobOutcome(index, None, "needs more memory than a clip may take")
        if error is not None:
            raise error
        return JobOutcome(index, result)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.mail.put(None)
        self.postman.join()
        self.pipe.close()


def _serve(pipe, work, memory_bytes, start) -> None:
    """The child: jobs in, results out, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start:
        start()
    _limit_memory(memory_bytes)
    pipe.send((None, None, None))
    while True:
        index, job = pipe.recv()
        try:
            answer = (index, work(*job), None)
        except Exception as e:
            answer = (index, None, e)
        try:
            pipe.send(answer)
        except OSError:
            return  # nobody listens any more
        except Exception as e:
            pipe.send((index, None, RuntimeError(f"{answer[2] or answer[1]!r} can't be sent: {e}")))


def _end_with_parent() -> None:
    """A killed parent leaves no child behind."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _limit_memory(more: int) -> None:
    """At most `more` bytes of address space beyond today's; Linux only."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = now + more if hard == resource.RLIM_INFINITY else min(now + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


@contextlib.contextmanager
def light_start() -> Iterator[None]:
    """A child started in it neither imports the caller's script nor starts BLAS threads: the children are the parallelism."""
    with _starting:
        main, before = sys.modules["__main__"], {name: os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}
        sys.modules["__main__"] = types.ModuleType("__main__")
        os.environ.update(dict.fromkeys(before, "1"))
        try:
            yield
        finally:
            sys.modules["__main__"] = main
            for name in before:
                del os.environ[name]
            os.environ.update({name: value for name, value in before.items() if value is not None})
