"""A thread a process that ends it where a step, a restore or a barrier takes too long, and says who is missing.

jax ends a process whose peer is dead, but not one whose peer is alive and stuck: all others would wait for it for ever. Every
process writes a heartbeat into the workdir, which all share; who waits too long reads those of the others.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from avsi_jax.runtime import goodput as phases_lib
from avsi_jax.runtime import storage

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may well go on
FOLDER = "heartbeats"
STATUS = "status.json"
SLOW = 10  # times the bound: what waits for a compiler or for files, and what was never done before
QUICK = (phases_lib.STEP, phases_lib.VALIDATION, phases_lib.BARRIER)
BEATS_S = 5.0


def check_alone(workdir, before: dict | None) -> None:
    """ValueError where the process of the workdir's status `before` lives: two trainings would overwrite each other's checkpoints.

    Takes no time where it is known to be dead, which is on this host or long ago; else waits whether its status moves.
    """
    ours = before and (before["host"], before["pid"]) == (socket.gethostname(), os.getpid())
    if not before or ours or time.time() - before["time"] > 12 * BEATS_S:
        return
    if before["host"] == socket.gethostname() and not os.path.exists(f"/proc/{before['pid']}"):
        return
    until = time.monotonic() + 2.2 * BEATS_S
    while time.monotonic() < until:
        time.sleep(0.2)
        now = phases_lib.read_status((workdir / STATUS).read_text())
        if now and now["time"] != before["time"]:
            raise ValueError(
                f"{workdir}: found a training that is running in it (process {now['pid']} on {now['host']}, {now['phase']!r} after "
                f"step {now['step']}), expected none; end that one, or take another --workdir"
            )


class Watchdog:
    """Watches `phases` and ends the process where one lasts too long; bound_s 0: only writes heartbeats.

    Too long is `bound_s` for a step, a batch of a validation or a barrier, SLOW times that for all else and for the first of each,
    and never less than SLOW times the longest of its kind so far.
    """

    def __init__(self, workdir, phases: phases_lib.PhaseTimer, bound_s: float, say: Callable[[str], None], *, rank=0, count=1):
        self.workdir, self.phases, self.bound_s, self.say, self.rank, self.count = workdir, phases, bound_s, say, rank, count
        self.beats_s = min(BEATS_S, bound_s / 5) if bound_s else BEATS_S
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        (self.workdir / FOLDER).mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread after a last heartbeat."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(self.beats_s):
            asleep = time.monotonic() - looked - self.beats_s
            if asleep > self.beats_s:  # this thread was late too: the process stood still, not its peers
                self.phases.pardon(asleep)
            looked = time.monotonic()
            self._beat()
            phase, waited = self.phases.now, time.monotonic() - self.phases.since
            if self.bound_s and waited > (bound := self._bound(phase)):
                self._end(phase, waited, bound)
        self._beat()

    def _beat(self) -> None:
        """A full disk or a bucket out of reach must not end the watch."""
        with contextlib.suppress(OSError):
            status = self.phases.status()
            storage.write_text(self._heartbeat(self.rank), json.dumps(status))
            if self.rank == 0:
                storage.write_text(self.workdir / STATUS, json.dumps(status, indent=2) + "\n")

    def _heartbeat(self, rank: int):
        return self.workdir / FOLDER / f"{rank}.json"

    def _bound(self, phase: str) -> float:
        longest = self.phases.longest.get(phase)
        times = 1 if phase in QUICK and longest is not None else SLOW
        return max(times * self.bound_s, SLOW * (longest or 0.0))

    def _end(self, phase: str, waited: float, bound: float) -> None:
        stacks = f"stacks-{self.rank}.txt"
        try:
            with open(self.workdir / stacks, "w") as file:
                faulthandler.dump_traceback(file)
        except OSError:
            stacks = "stderr"
        faulthandler.dump_traceback(sys.stderr)
        self.say(
            f"watchdog: process {self.rank} of {self.count} waited {waited:.0f} s in {phase!r} after step {self.phases.step}, "
            f"bound {bound:.0f} s (by config.watchdog_s); {self._missing()}; stacks in {stacks}; the same command goes on"
        )
        sys.stderr.flush()
        os._exit(EXIT_CODE)

    def _missing(self) -> str:
        """Which processes it waits for: those that write no heartbeat any more, else those that are behind."""
        if self.count == 1:
            return "it is the only process"
        first = self._read_all()
        for _ in range(5):  # others look at this one meanwhile
            time.sleep(self.beats_s / 2)
            self._beat()
        then = self._read_all()
        silent = [r for r in then if r != self.rank and (then[r] is None or then[r] == first[r])]
        if silent:
            return "missing: " + ", ".join(self._described(r, then[r]) for r in silent)
        others = {r: status for r, status in then.items() if r != self.rank}  # its own may be unreadable: a full disk
        least = min(status["step"] for status in others.values())
        behind = [r for r, status in others.items() if status["step"] == least < self.phases.step]
        return "all are alive, behind: " + (", ".join(self._described(r, then[r]) for r in behind) or "none")

    def _read_all(self) -> dict[int, dict | None]:
        found = {}
        for rank in range(self.count):
            try:
                found[rank] = phases_lib.read_status(self._heartbeat(rank).read_text())
            except OSError:
                found[rank] = None
        return found

    @staticmethod
    def _described(rank: int, status: dict | None) -> str:
        if status is None:
            return f"process {rank} (no heartbeat)"
        at = time.strftime("%H:%M:%S", time.localtime(status["time"]))
        where = f"pid {status['pid']} on {status['host']}"
        return f"process {rank} ({where}, last seen {at} in {status['phase']!r} after step {status['step']})"
