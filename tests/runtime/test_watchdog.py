"""The watchdog: a process that is stuck is named by the others, which end; a process that makes progress is not ended."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from avsi_jax.runtime import goodput
from avsi_jax.runtime.watchdog import Watchdog
from avsi_jax.training import cli
from tests.support import processes
from tests.support.tiny_runs import arguments


@pytest.mark.slow
def test_a_suspended_process_is_named_by_the_other_which_ends(tiny_dir, tiny_config, tmp_path):
    """One of two is stopped (SIGSTOP): the other writes its stacks, names it and exits with 75. A third process is refused."""
    fields = {"epochs": 9999, "early_stop_patience": 0, "watchdog_s": 5, "checkpoint_every": 9999, "checkpoint_seconds": 0}
    fields |= {"system": "a_si", "layers": 1}  # and few optimisations: most of the time is compilation
    command = ["-m", "avsi_jax.train", *arguments(tmp_path / "run", tiny_dir, **fields)]
    with processes.popen(command, devices=1, JAX_DISABLE_MOST_OPTIMIZATIONS="true") as (first, second):
        wait_for(lambda: (tmp_path / "run" / "metrics.csv").exists(), 240, first, second)
        with pytest.raises(ValueError, match=rf"process {first.pid} on .*--workdir"):
            cli.train(tiny_config(**fields), tmp_path / "run")
        second.send_signal(signal.SIGSTOP)
        assert first.wait(120) == 75, first.stderr_text()
        messages = first.stderr_text()
        second.send_signal(signal.SIGCONT)
    assert "watchdog: process 0 of 2" in messages and f"process 1 (pid {second.pid} on" in messages, messages[-3000:]
    assert "Thread 0x" in messages and "loop.py" in messages, "all stacks"
    assert "loop.py" in (tmp_path / "run" / "stacks-0.txt").read_text()


def wait_for(condition, timeout_s: float, *running) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        ended = [process.poll() for process in running]
        messages = "\n".join(process.stderr_text()[-3000:] for process in running)
        assert ended == [None] * len(running) and time.monotonic() < deadline, f"the condition did not occur; {ended}\n{messages}"
        time.sleep(0.1)


@pytest.mark.slow
def test_short_phases_and_a_suspension_of_the_whole_process_do_not_end_it(tmp_path):
    """Phases that are shorter than the limit but not in sum, then a process that is itself stopped for longer than the limit."""
    command = [sys.executable, "-c", SUSPENDED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0 and done.stderr == "", done.stderr


SUSPENDED = """
import os, signal, subprocess, sys, time
from etils import epath
from avsi_jax.runtime.goodput import PhaseTimer
from avsi_jax.runtime.watchdog import Watchdog
phases = PhaseTimer()
watchdog = Watchdog(epath.Path(sys.argv[1]), phases, 2.0, print).start()
for _ in range(16):
    phases.enter("step")
    time.sleep(0.15)
subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(1)
watchdog.stop()
"""


def test_the_limit_depends_on_the_phase_and_its_longest_duration(tmp_path):
    """The bound for short phases, ten times that for others and the first of each, ten times the longest where that is more."""
    phases = goodput.PhaseTimer()
    watchdog = Watchdog(tmp_path, phases, 6.0, print)
    assert [watchdog._limit_s(phase) for phase in ("step", "compile", "checkpoint")] == [60, 60, 60]
    phases.longest |= {"step": 0.1, "validation": 2.0, "checkpoint": 9.0, "barrier": 0.0}
    limits = [watchdog._limit_s(phase) for phase in ("step", "validation", "checkpoint", "barrier", "data")]
    assert limits == [6, 20, 90, 6, 60]


@pytest.mark.parametrize(
    ("peers", "description"),
    [
        ({1: ("step", 7, True), 2: ("step", 9, True)}, r"all are alive, behind: process 1 \(pid 11 .* in 'step' after step 7\)$"),
        ({1: ("step", 9, True), 2: ("checkpoint", 9, True)}, "all are alive, behind: none$"),
        ({1: ("step", 9, False), 2: ("step", 9, True)}, r"missing: process 1 \(pid 11 .* after step 9\)$"),
        ({2: ("step", 9, True)}, r"missing: process 1 \(no heartbeat\)$"),
    ],
)
def test_missing_processes_are_identified_by_their_heartbeats(tmp_path, peers, description):
    """{rank: (phase, step, whether it is alive)}. This process' own heartbeat cannot be written here, which must not matter."""
    phases = goodput.PhaseTimer()
    phases.step = 9
    watchdog = Watchdog(tmp_path, phases, 0.05, print, rank=0, count=3)
    (tmp_path / "heartbeats" / "0.json").mkdir(parents=True)
    rounds = []

    def write_heartbeats():
        for rank, (phase, step, is_alive) in peers.items():
            if rounds and not is_alive:
                continue
            status = phases.status() | {"phase": phase, "step": step, "pid": 10 + rank, "time": 1e9 + len(rounds)}
            (tmp_path / "heartbeats" / f"{rank}.json").write_text(json.dumps(status))
        rounds.append(1)

    write_heartbeats()
    watchdog._write_heartbeat = write_heartbeats
    assert re.match(description, watchdog._describe_missing()), watchdog._describe_missing()
