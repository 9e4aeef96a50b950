"""The watchdog: a process that stands still is named by the others and ends them; who works is let alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from avsi_jax.runtime import goodput as phases_lib
from avsi_jax.runtime.watchdog import Watchdog
from avsi_jax.training import cli
from tests.support import processes
from tests.support.tiny_runs import arguments


def test_a_process_that_stands_still_is_named_by_the_others(tiny_dir, tiny_config, tmp_path):
    """One of two is stopped (SIGSTOP): the other dumps its stacks, names it and leaves with 75. A third who comes is refused."""
    fields = {"epochs": 9999, "early_stop_patience": 0, "watchdog_s": 5, "checkpoint_every": 9999, "checkpoint_seconds": 0}
    fields |= {"system": "a_si"}  # and little optimised: compiling is most of it
    command = ["-m", "avsi_jax.train", *arguments(tmp_path / "run", tiny_dir, **fields)]
    with processes.popen(command, JAX_DISABLE_MOST_OPTIMIZATIONS="true") as (first, second):
        wait_for(lambda: (tmp_path / "run" / "metrics.csv").exists(), 240, first, second)
        with pytest.raises(ValueError, match=rf"a training that is running in it \(process {first.pid} on .*another --workdir"):
            cli.train(tiny_config(**fields), tmp_path / "run")
        second.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert first.wait(60) == 75, first.stderr_text()
        assert time.monotonic() - began < 40
        said = first.stderr_text()
        second.send_signal(signal.SIGCONT)
    assert "watchdog: process 0 of 2 waited" in said and f"missing: process 1 (pid {second.pid} on" in said, said[-3000:]
    assert "Thread 0x" in said and "loop.py" in said, "all stacks"
    assert "loop.py" in (tmp_path / "run" / "stacks-0.txt").read_text()


def wait_for(condition, seconds: float, *started) -> None:
    until = time.monotonic() + seconds
    while not condition():
        ended = [process.poll() for process in started]
        said = "\n".join(process.stderr_text()[-3000:] for process in started)
        assert ended == [None] * len(started) and time.monotonic() < until, f"it did not come; {ended}\n{said}"
        time.sleep(0.1)


def test_the_watchdog_lets_who_works_alone(tmp_path):
    """Phases shorter than the bound, and a process that itself stood still, end nothing."""
    done = subprocess.run([sys.executable, "-c", ALIVE, str(tmp_path)], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0 and done.stderr == "", done.stderr


ALIVE = """
import os, signal, subprocess, sys, time
from etils import epath
from avsi_jax.runtime.goodput import Phases
from avsi_jax.runtime.watchdog import Watchdog
phases = Phases()
dog = Watchdog(epath.Path(sys.argv[1]), phases, 2.0, print).start()
for _ in range(8):
    phases.enter("step")
    time.sleep(0.5)
subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
os.kill(os.getpid(), signal.SIGSTOP)
phases.enter("step")
time.sleep(0.5)
dog.stop()
"""


def test_the_bound_of_a_phase(tmp_path):
    """A step's is the config's, what was never done or reads and writes has ten times that; a slow kind has ten of its longest."""
    told = phases_lib.PhaseTimer()
    dog = Watchdog(tmp_path, told, 6.0, print)
    assert [dog._bound(phase) for phase in ("step", "compile", "checkpoint")] == [60, 60, 60]
    told.longest |= {"step": 0.1, "validation": 2.0, "checkpoint": 9.0, "barrier": 0.0}
    assert [dog._bound(phase) for phase in ("step", "validation", "checkpoint", "barrier", "data")] == [6, 20, 90, 6, 60]


@pytest.mark.parametrize(
    ("then", "says"),
    [
        ({1: ("step", 7, True), 2: ("step", 9, True)}, r"all are alive, behind: process 1 \(pid 11 .* in 'step' after step 7\)$"),
        ({1: ("step", 9, True), 2: ("checkpoint", 9, True)}, "all are alive, behind: none$"),
        ({1: ("step", 9, False), 2: ("step", 9, True)}, r"missing: process 1 \(pid 11 .* after step 9\)$"),
        ({2: ("step", 9, True)}, r"missing: process 1 \(no heartbeat\)$"),
    ],
)
def test_who_is_missing(tmp_path, then, says):
    """By the others' heartbeats alone: this process' own can't be written here, and nothing of that ends the watch."""
    told = phases_lib.PhaseTimer()
    told.step = 9
    dog = Watchdog(tmp_path, told, 0.05, print, rank=0, count=3)
    (tmp_path / "heartbeats" / "0.json").mkdir(parents=True)
    beats = []

    def beat():
        for rank, (phase, step, lives) in then.items():
            if beats and not lives:
                continue
            status = told.status() | {"phase": phase, "step": step, "pid": 10 + rank, "time": 1e9 + len(beats)}
            (tmp_path / "heartbeats" / f"{rank}.json").write_text(json.dumps(status))
        beats.append(1)

    beat()
    dog._beat = beat
    assert re.match(says, dog._missing()), dog._missing()
