"""The seconds of a run by phase: they add up, over restarts too, whatever part of its status a killed process left."""

import json
import time

import pytest

from avsi_jax.runtime import goodput
from avsi_jax.runtime.goodput import CHECKPOINT, COMPILE, DATA, STEP, PhaseTimer


class Clock:
    """A clock that a test advances."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(goodput.time, "time", lambda: 5000.0 + self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def run_phases(clock, *spent) -> PhaseTimer:
    """The timer of a run that spent (phase, seconds) in turn."""
    phases = PhaseTimer()
    for phase, seconds in spent:
        phases.enter(phase)
        clock.now += seconds
    return phases


def test_every_second_has_a_cause(clock):
    phases = run_phases(clock, (COMPILE, 10), (DATA, 1), (STEP, 6), (DATA, 1))
    with phases.during(CHECKPOINT):
        clock.now += 2
    seconds = phases.seconds()
    assert {k: v for k, v in seconds.items() if v} == {COMPILE: 10, DATA: 2, STEP: 6, CHECKPOINT: 2}
    assert phases.now == DATA and phases.goodput() == pytest.approx(6 / 20)
    clock.now += 4  # the current phase counts too
    assert phases.seconds()[DATA] == 6 and sum(phases.seconds().values()) == 24


def test_an_unknown_phase_is_refused():
    with pytest.raises(ValueError, match="'sleep'.*start, compile"):
        PhaseTimer().enter("sleep")


def test_a_restart_counts_lost_work_and_down_time(clock):
    """30 s of steps, saved; 12 s more, killed; 100 s later another process, 5 s old when it has restored."""
    first = run_phases(clock, (STEP, 30))
    saved = first.seconds()
    clock.now += 12
    last_status = json.dumps(first.status())
    clock.now += 100
    second = run_phases(clock, (goodput.RESTORE, 5))
    second.resume(saved, goodput.read_status(last_status))
    seconds = second.seconds()
    assert (seconds[STEP], seconds["lost"], seconds["down"], seconds[goodput.RESTORE]) == (30, 12, 100, 5)
    third = run_phases(clock, (STEP, 3))  # after a process that was killed before it wrote a status
    third.resume(saved, None)
    assert third.seconds()[STEP] == 33 and third.seconds()["lost"] == 0


@pytest.mark.parametrize("text", [None, "", '{"time": 1.0, "sec', "[]", '{"seconds": 3, "time": 1.0}', '{"seconds": {}}'])
def test_an_incomplete_status_reads_as_none(text):
    assert goodput.read_status(text) is None


def test_time_in_which_the_process_was_suspended_does_not_count_for_the_phase(clock):
    phases = run_phases(clock, (STEP, 50))
    phases.exclude(45)
    assert clock.now - phases.since == 5
    phases.exclude(60)
    assert phases.since == clock.now, "never in the future"


def test_a_status_contains_the_phase_and_the_step():
    phases = PhaseTimer()
    phases.enter(STEP)
    phases.step = 17
    status = phases.status()
    assert (status["phase"], status["step"], status["entered"]) == (STEP, 17, 1)
    assert abs(status["time"] - time.time()) < 3600, "seconds since 1970"
    assert set(status["seconds"]) == set(goodput.CAUSES) and status["pid"] and status["host"]
