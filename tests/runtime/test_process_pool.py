"""avsi_jax.runtime.process_pool: children that crash, hang, eat memory or can't start lose their own job and nothing else."""

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


def work(what, value):
    """What a clip may do to its process."""
    if what == "square":
        return value**2
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "leave":
        os._exit(3)
    if what == "hang":
        time.sleep(600)
    if what == "eat":
        return len(np.ones(value, np.uint8))
    if what == "raise":
        raise ValueError(f"no {value}")
    if what == "size":
        return value.size
    if what == "odd":
        return lambda: value
    return os.environ.get(value), os.getpid()


def fail():
    os._exit(9)


def run(jobs, number=2, **options):
    limits = {"workers": number, "timeout_s": 30, "memory_mb": 2048} | options
    outcomes = list(process_pool.run(work, jobs, **limits))
    assert sorted(o.index for o in outcomes) == list(range(len(jobs)))  # every job exactly once
    return {o.index: o.lost or o.result for o in outcomes}


@pytest.mark.parametrize("number", [1, 3])
def test_every_job_is_done_once(number):
    assert run([("square", n) for n in range(40)], number) == {n: n * n for n in range(40)}


def test_none_to_do():
    assert run([]) == {}


def test_bad_jobs_are_lost_alone():
    bad = {3: ("crash", 0), 4: ("eat", 2**33), 8: ("leave", 0), 9: ("crash", 0)}
    found = run([bad.get(n, ("square", n)) for n in range(14)])
    assert found == {n: n * n for n in range(14)} | {
        3: "ended its process by SIGSEGV",
        4: "needs more memory than a clip may take",
        8: "ended its process with status 3",
        9: "ended its process by SIGSEGV",
    }


def test_a_job_that_hangs_is_ended():
    start = time.monotonic()
    assert run([("hang", 0), ("square", 2), ("square", 3)], 1, timeout_s=1) == {0: "took more than 1 s", 1: 4, 2: 9}
    assert time.monotonic() - start < 60


def test_large_jobs_behind_one_that_hangs_hold_nobody_up():
    """Far more than a pipe takes is given to a child that never reads it: the time limit holds all the same."""
    large = ("size", np.zeros(1_000_000))
    assert run([("hang", 0), large, large], 1, timeout_s=1, ahead=3) == {0: "took more than 1 s", 1: 1_000_000, 2: 1_000_000}


def test_jobs_are_read_as_children_get_free():
    read, ahead = [0], []

    def jobs():
        for n in range(30):
            read[0] += 1
            yield "square", n

    for done, outcome in enumerate(process_pool.run(work, jobs(), workers=2, timeout_s=30, memory_mb=2048, ahead=3)):
        assert outcome.result == outcome.index**2
        ahead.append(read[0] - done)
    assert len(ahead) == 30 and 2 <= max(ahead) <= 2 * 3


def test_where_jobs_can_not_be_read_that_is_told_and_nobody_is_left():
    def jobs():
        yield "hang", 0
        raise KeyError("the second job")

    with pytest.raises(KeyError, match="the second job"):
        list(process_pool.run(work, jobs(), workers=2, timeout_s=30, memory_mb=2048))
    assert not [c for c in process_pool.multiprocessing.active_children() if c.is_alive()]
    assert list(process_pool.run(work, iter(()), workers=1, timeout_s=30, memory_mb=2048)) == []


def test_what_a_job_raises_is_raised_and_nobody_is_left():
    with pytest.raises(ValueError, match="no luck"):
        run([("raise", "luck"), ("hang", 0)])
    with pytest.raises(RuntimeError, match="can't be sent"):
        run([("odd", 1)])
    assert not [c for c in process_pool.multiprocessing.active_children() if c.is_alive()]


def test_children_that_can_not_start_are_told():
    with pytest.raises(OSError, match="a worker process can't start .*status 9"):
        run([("square", 1)], start=fail)


def test_one_thread_a_child():
    found = run([("env", "OMP_NUM_THREADS")] * 4)
    assert {threads for threads, _ in found.values()} == {"1"} and len({pid for _, pid in found.values()}) == 2


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
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and _state(child) != "Z":
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "Z"
