"""What a run is doing now, and what its time went into.

One clock a process. The loop tells it what it enters; the watchdog reads when that was, a signal what there is to lose, and
timing.csv and status.json how the time of the whole run, restarts included, is made up.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator

# What time goes into. lost: work that a restart had to do again; down: nobody was there.
START, COMPILE, RESTORE, DATA, STEP, VALIDATION, CHECKPOINT, BARRIER = (
    "start", "compile", "restore", "data", "step", "validation", "checkpoint", "barrier",
)  # fmt: skip
CAUSES = (START, COMPILE, RESTORE, DATA, STEP, VALIDATION, CHECKPOINT, BARRIER, "lost", "down")


class PhaseTimer:
    """now: what is being done, since when (`time.monotonic`) and as how manieth thing; step: the last one done; longest: s a phase
    took at most, its first time aside.
    """

    def __init__(self):
        self.now, self.since, self.entered, self.step = START, time.monotonic(), 0, 0
        self.longest: dict[str, float] = {}
        self._seconds = dict.fromkeys(CAUSES, 0.0)

    def enter(self, phase: str) -> None:
        """Ends the phase that was and begins another."""
        if phase not in self._seconds:
            raise ValueError(f"phase: found {phase!r}, expected one of {', '.join(CAUSES)}")
        now = time.monotonic()
        took = now - self.since
        self._seconds[self.now] += took
        self.longest[self.now] = max(took, self.longest[self.now]) if self.now in self.longest else 0.0  # the first may compile
        self.now, self.since = phase, now
        self.entered += 1

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The phase as long as the block, then the one before again."""
        before = self.now
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def pardon(self, seconds: float) -> None:
        """Takes from the phase time in which the whole process stood still (stopped, or the machine asleep)."""
        self.since = min(self.since + seconds, time.monotonic())

    def seconds(self) -> dict[str, float]:
        """Seconds by cause until now, those of earlier processes of this run included."""
        return self._seconds | {self.now: self._seconds[self.now] + time.monotonic() - self.since}

    def goodput(self) -> float:
        """Share of all time that went into steps that count."""
        spent = self.seconds()
        return spent[STEP] / max(sum(spent.values()), 1e-9)

    def go_on(self, at_checkpoint: dict[str, float], before: dict | None) -> None:
        """Takes over the seconds of the processes before this one.

        at_checkpoint: `seconds()` when the state was saved that the run goes on with; before: the last status of the process
        that ended (see `status`): what it did after the checkpoint is lost, and since then nobody was there.
        """
        earlier = {k: float(at_checkpoint.get(k, 0.0)) for k in CAUSES}
        if before:
            earlier["lost"] += max(0.0, sum(before["seconds"].values()) - sum(earlier.values()))
            alive = sum(self.seconds().values())
            earlier["down"] += max(0.0, time.time() - before["time"] - alive)
        for cause, value in earlier.items():
            self._seconds[cause] += value

    def status(self) -> dict:
        """What status.json and a process' heartbeat say."""
        return {
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": self.now,
            "phase_s": round(time.monotonic() - self.since, 3),
            "entered": self.entered,
            "step": self.step,
            "goodput": round(self.goodput(), 4),
            "seconds": {k: round(v, 3) for k, v in self.seconds().items()},
        }


def read_status(text: str | None) -> dict | None:
    """A status as it was written; None where there is none, or a killed process left half of one."""
    try:
        status = json.loads(text or "")
        return status if isinstance(status["seconds"], dict) and isinstance(status["time"], float) else None
    except (ValueError, KeyError, TypeError):
        return None
