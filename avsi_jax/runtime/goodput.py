"""Accounts for the time of a run: the phase it is in now, and the seconds that went into each phase.

Every process has one PhaseTimer. The training loop enters phases, the watchdog reads when the current one began, and timing.csv
and status.json report the time of the whole run, restarts included.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator

# Causes of time. Two are not phases. lost: work that had to be repeated after a restart; down: no process was running.
START, COMPILE, RESTORE, DATA, STEP, VALIDATION, CHECKPOINT, BARRIER = (
    "start", "compile", "restore", "data", "step", "validation", "checkpoint", "barrier",
)  # fmt: skip
CAUSES = (START, COMPILE, RESTORE, DATA, STEP, VALIDATION, CHECKPOINT, BARRIER, "lost", "down")


class PhaseTimer:
    """Measures the phases of one process.

    Attributes: `now`, the current phase; `since`, when it began (`time.monotonic`, s); `entered`, how many phases were entered
    so far; `step`, the last finished training step; `longest`, the longest duration of each kind of phase in s, its first time
    not counted.
    """

    def __init__(self):
        self.now, self.since, self.entered, self.step = START, time.monotonic(), 0, 0
        self.longest: dict[str, float] = {}
        self._seconds = dict.fromkeys(CAUSES, 0.0)

    def enter(self, phase: str) -> None:
        """Ends the current phase and begins another; ValueError for an unknown one."""
        if phase not in self._seconds:
            raise ValueError(f"phase: found {phase!r}, expected one of {', '.join(CAUSES)}")
        now = time.monotonic()
        duration = now - self.since
        self._seconds[self.now] += duration
        self.longest[self.now] = max(duration, self.longest[self.now]) if self.now in self.longest else 0.0  # the first may compile
        self.now, self.since = phase, now
        self.entered += 1

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Enters the phase for the duration of a `with` block, then the previous phase again."""
        previous = self.now
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(previous)

    def exclude(self, seconds: float) -> None:
        """Subtracts from the current phase time in which the whole process was suspended (stopped, or the machine asleep)."""
        self.since = min(self.since + seconds, time.monotonic())

    def seconds(self) -> dict[str, float]:
        """Seconds by cause until now, including earlier processes of this run."""
        return self._seconds | {self.now: self._seconds[self.now] + time.monotonic() - self.since}

    def goodput(self) -> float:
        """Share of all time that went into training steps that were kept."""
        spent = self.seconds()
        return spent[STEP] / max(sum(spent.values()), 1e-9)

    def resume(self, at_checkpoint: dict[str, float], last_status: dict | None) -> None:
        """Adds the seconds of the earlier processes of this run.

        at_checkpoint: `seconds()` when the checkpoint was saved from which the run continues. last_status: the last `status()`
        of the process that ended: its time after the checkpoint counts as lost, the time since then as down.
        """
        earlier = {k: float(at_checkpoint.get(k, 0.0)) for k in CAUSES}
        if last_status:
            earlier["lost"] += max(0.0, sum(last_status["seconds"].values()) - sum(earlier.values()))
            age_s = sum(self.seconds().values())
            earlier["down"] += max(0.0, time.time() - last_status["time"] - age_s)
        for cause, value in earlier.items():
            self._seconds[cause] += value

    def status(self) -> dict:
        """The content of status.json and of a process' heartbeat."""
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
    """Parses the JSON of `PhaseTimer.status`; None for no text or an incomplete one, as a killed process may leave."""
    try:
        status = json.loads(text or "")
        return status if isinstance(status["seconds"], dict) and isinstance(status["time"], float) else None
    except (ValueError, KeyError, TypeError):
        return None
