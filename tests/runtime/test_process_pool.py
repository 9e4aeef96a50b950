"""Children that crash, hang, use too much memory or cannot start: only their own job fails."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from avsi_jax.runtime import process_pool

ROOT = Path(__file__).resolve().parents[2]


def work(action, value):
    """A job; most actions stand for what a clip may do to the process that decodes it."""
    if action == "square":
        return value**2
    if action == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if action == "exit":
        os._exit(3)
    if action == "hang":
        time.sleep(600)
    if action == "allocate":
        return len(np.ones(value, np.uint8))
    if action == "raise":
        raise ValueError(f"no {value}")
    if action == "size":
        return value.size
    if action == "unpicklable":
        return lambda: value
    return os.environ.get(value), os.getpid()


def fail():
    os._exit(9)


def hang():
    time.sleep(600)


def run(jobs, workers=2, **options):
    """{index: result or reason of the failure}; every job must have exactly one outcome."""
    limits = {"workers": workers, "timeout_s": 30, "memory_mb": 2048} | options
    outcomes = list(process_pool.run(work, jobs, **limits))
    assert sorted(o.index for o in outcomes) == list(range(len(jobs)))
    return {o.index: o.failure or o.result for o in outcomes}


@pytest.mark.parametrize("workers", [1, 3])
def test_every_job_is_done_once(workers):
    assert run([("square", n) for n in range(40)], workers) == {n: n * n for n in range(40)}


def test_an_empty_list_of_jobs_has_no_outcomes():
    assert run([]) == {}


def test_only_the_bad_jobs_fail():
    bad = {3: ("crash", 0), 4: ("allocate", 2**33), 8: ("exit", 0), 9: ("crash", 0)}
    outcomes = run([bad.get(n, ("square", n)) for n in range(14)])
    failures = {n: outcomes.pop(n) for n in bad}
    assert outcomes == {n: n * n for n in range(14) if n not in bad}
    assert "SIGSEGV" in failures[3] and "memory" in failures[4] and "status 3" in failures[8] and "SIGSEGV" in failures[9]


def test_a_job_that_hangs_is_ended():
    outcomes = run([("hang", 0), ("square", 2), ("square", 3)], 1, timeout_s=1)
    assert "1 s" in outcomes.pop(0) and outcomes == {1: 4, 2: 9}


def test_large_jobs_behind_one_that_hangs_do_not_block_the_parent():
    """Far more than the pipe's buffer holds is sent to a child that never reads it: the time limit still works."""
    large = ("size", np.zeros(1_000_000))
    outcomes = run([("hang", 0), large, large], 1, timeout_s=1, ahead=3)
    assert "1 s" in outcomes.pop(0) and outcomes == {1: 1_000_000, 2: 1_000_000}


def test_jobs_are_read_as_children_become_free():
    read, ahead = [0], []

    def jobs():
        for n in range(30):
            read[0] += 1
            yield "square", n

    for done, outcome in enumerate(process_pool.run(work, jobs(), workers=2, timeout_s=30, memory_mb=2048, ahead=3)):
        assert outcome.result == outcome.index**2
        ahead.append(read[0] - done)
    assert len(ahead) == 30 and 2 <= max(ahead) <= 2 * 3


def test_an_error_of_the_job_generator_is_raised_and_no_child_is_left():
    def jobs():
        yield "hang", 0
        raise KeyError("the second job")

    with pytest.raises(KeyError, match="the second job"):
        list(process_pool.run(work, jobs(), workers=2, timeout_s=30, memory_mb=2048))
    assert not [c for c in process_pool.multiprocessing.active_children() if c.is_alive()]
    assert list(process_pool.run(work, iter(()), workers=1, timeout_s=30, memory_mb=2048)) == []


def test_an_exception_of_a_job_is_raised_and_no_child_is_left():
    with pytest.raises(ValueError, match="no luck"):
        run([("raise", "luck"), ("hang", 0)])
    with pytest.raises(RuntimeError, match="lambda"):
        run([("unpicklable", 1)])
    assert not [c for c in process_pool.multiprocessing.active_children() if c.is_alive()]


def test_children_that_cannot_start_are_an_error():
    with pytest.raises(OSError, match="can't start .*status 9"):
        run([("square", 1)], start=fail)


def test_children_that_hang_while_they_start_are_an_error():
    with pytest.raises(OSError, match="can't start .*0.5 s"):
        run([("square", 1)], start=hang, start_timeout_s=0.5)
    assert not [c for c in process_pool.multiprocessing.active_children() if c.is_alive()]


def test_each_child_uses_one_thread():
    outcomes = run([("env", "OMP_NUM_THREADS")] * 4)
    assert {threads for threads, _ in outcomes.values()} == {"1"} and len({pid for _, pid in outcomes.values()}) == 2


def test_a_killed_parent_leaves_no_child():
    code = """
from tests.runtime import test_process_pool
from avsi_jax.runtime import process_pool
for outcome in process_pool.run(test_process_pool.work, [("pid", "x"), ("hang", 0)], workers=1, timeout_s=600, memory_mb=2048):
    print(outcome.result[1], flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and _state(child) != "Z":
        assert time.monotonic() < deadline, "the child is still running"
        time.sleep(0.05)


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "Z"
