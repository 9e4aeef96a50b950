"""What the time of a run went into: phases that add up, over restarts too, whatever a killed process left of its status."""

import json
import time

import pytest

from avsi_jax.runtime import goodput
from avsi_jax.runtime.goodput import CHECKPOINT, COMPILE, DATA, STEP, PhaseTimer


class Clock:
    """A clock that a test turns."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(goodput.time, "time", lambda: 5000.0 + self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def run(clock, *spent) -> PhaseTimer:
    """A run that spent (phase, seconds) in turn."""
    told = PhaseTimer()
    for phase, seconds in spent:
        told.enter(phase)
        clock.now += seconds
    return told


def test_every_second_has_a_cause(clock):
    told = run(clock, (COMPILE, 10), (DATA, 1), (STEP, 6), (DATA, 1))
    with told.during(CHECKPOINT):
        clock.now += 2
    seconds = told.seconds()
    assert {k: v for k, v in seconds.items() if v} == {COMPILE: 10, DATA: 2, STEP: 6, CHECKPOINT: 2}
    assert told.now == DATA and told.goodput() == pytest.approx(6 / 20)
    clock.now += 4  # the phase that is not over counts too
    assert told.seconds()[DATA] == 6 and sum(told.seconds().values()) == 24


def test_an_unknown_phase_is_refused():
    with pytest.raises(ValueError, match="phase: found 'sleep', expected one of start, compile"):
        PhaseTimer().enter("sleep")


def test_a_restart_counts_what_was_lost_and_that_nobody_was_there(clock):
    """30 s of steps, saved; 12 s more, killed; 100 s later another process, 5 s old when it has restored."""
    first = run(clock, (STEP, 30))
    saved = first.seconds()
    clock.now += 12
    last_words = json.dumps(first.status())
    clock.now += 100
    second = run(clock, (goodput.RESTORE, 5))
    second.go_on(saved, goodput.read_status(last_words))
    seconds = second.seconds()
    assert (seconds[STEP], seconds["lost"], seconds["down"], seconds[goodput.RESTORE]) == (30, 12, 100, 5)
    third = run(clock, (STEP, 3))  # killed before any status was written: nothing is known of what it did
    third.go_on(saved, None)
    assert third.seconds()[STEP] == 33 and third.seconds()["lost"] == 0


@pytest.mark.parametrize("left", [None, "", '{"time": 1.0, "sec', "[]", '{"seconds": 3, "time": 1.0}', '{"seconds": {}}'])
def test_half_a_status_is_none(left):
    assert goodput.read_status(left) is None


def test_time_in_which_the_process_stood_still_is_not_the_phases(clock):
    told = run(clock, (STEP, 50))
    told.pardon(45)
    assert clock.now - told.since == 5
    told.pardon(60)
    assert told.since == clock.now, "never in the future"


def test_a_status_says_where_the_run_is():
    told = PhaseTimer()
    told.enter(STEP)
    told.step = 17
    status = told.status()
    assert (status["phase"], status["step"], status["entered"]) == (STEP, 17, 1) and abs(status["time"] - time.time()) < 5
    assert set(status["seconds"]) == set(goodput.CAUSES) and status["pid"] and status["host"]
