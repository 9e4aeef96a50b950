"""Ends a process whose training step, restore or barrier takes too long, and names the processes that it waits for.

jax ends a process whose peer is dead, but not one whose peer is alive and stuck: all others would wait for it for ever. Every
process runs a watchdog thread and writes a heartbeat into the workdir, which all of them share; a process that has waited too
long reads the heartbeats of the others.
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
from typing import TYPE_CHECKING

from avsi_jax.runtime import goodput, storage

if TYPE_CHECKING:
    from etils import epath

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: running the same command again may succeed
FOLDER = "heartbeats"
STATUS = "status.json"
LONG_FACTOR = 10  # times the bound, for phases that wait for a compiler or for files, and for the first of each phase
SHORT_PHASES = (goodput.STEP, goodput.VALIDATION, goodput.BARRIER)
HEARTBEAT_S = 5.0


def check_no_other_training(workdir: epath.Path, status: dict | None) -> None:
    """ValueError where another training runs in the workdir: the two would overwrite each other's checkpoints.

    `status`: the workdir's last status, or None. Returns at once where its process is known to be dead, which is on this host or
    after a minute without a heartbeat; otherwise waits to see whether its status changes.
    """
    is_own = status and (status["host"], status["pid"]) == (socket.gethostname(), os.getpid())
    if not status or is_own or time.time() - status["time"] > 12 * HEARTBEAT_S:
        return
    if status["host"] == socket.gethostname() and not os.path.exists(f"/proc/{status['pid']}"):
        return
    deadline = time.monotonic() + 2.2 * HEARTBEAT_S
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = goodput.read_status((workdir / STATUS).read_text())
        if now and now["time"] != status["time"]:
            raise ValueError(
                f"{workdir}: found a training running in it (process {now['pid']} on {now['host']}, {now['phase']!r} after "
                f"step {now['step']}), expected none; stop that one, or choose another --workdir"
            )


class Watchdog:
    """Writes heartbeats, and ends the process where a phase of `phases` lasts too long; with bound_s 0 it only writes heartbeats.

    The limit is `bound_s` for a training step, a validation batch or a barrier, LONG_FACTOR times that for all other phases and
    for the first of each, and never less than LONG_FACTOR times the longest phase of its kind so far. `log` is called with the
    message before the process exits with EXIT_CODE. `rank` and `count`: this process and the number of processes.
    """

    def __init__(
        self,
        workdir: epath.Path,
        phases: goodput.PhaseTimer,
        bound_s: float,
        log: Callable[[str], None],
        *,
        rank: int = 0,
        count: int = 1,
    ):
        self.workdir, self.phases, self.bound_s, self.log, self.rank, self.count = workdir, phases, bound_s, log, rank, count
        self.heartbeat_s = min(HEARTBEAT_S, bound_s / 5) if bound_s else HEARTBEAT_S
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        """Writes the first heartbeat and starts the thread."""
        (self.workdir / FOLDER).mkdir(parents=True, exist_ok=True)
        self._write_heartbeat()
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread after a last heartbeat."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        last_check = time.monotonic()
        while not self._stopped.wait(self.heartbeat_s):
            suspended_s = time.monotonic() - last_check - self.heartbeat_s
            if suspended_s > self.heartbeat_s:  # this thread was late too: this process was suspended, not its peers
                self.phases.exclude(suspended_s)
            last_check = time.monotonic()
            self._write_heartbeat()
            phase, waited_s = self.phases.now, time.monotonic() - self.phases.since
            if self.bound_s and waited_s > (limit_s := self._limit_s(phase)):
                self._exit(phase, waited_s, limit_s)
        self._write_heartbeat()

    def _write_heartbeat(self) -> None:
        """Errors are ignored: a full disk or an unreachable bucket must not end the watchdog."""
        with contextlib.suppress(OSError):
            status = self.phases.status()
            storage.write_text(self._heartbeat_path(self.rank), json.dumps(status))
            if self.rank == 0:
                storage.write_text(self.workdir / STATUS, json.dumps(status, indent=2) + "\n")

    def _heartbeat_path(self, rank: int) -> epath.Path:
        return self.workdir / FOLDER / f"{rank}.json"

    def _limit_s(self, phase: str) -> float:
        longest_s = self.phases.longest.get(phase)
        factor = 1 if phase in SHORT_PHASES and longest_s is not None else LONG_FACTOR
        return max(factor * self.bound_s, LONG_FACTOR * (longest_s or 0.0))

    def _exit(self, phase: str, waited_s: float, limit_s: float) -> None:
        stacks = f"stacks-{self.rank}.txt"
        try:
            with open(self.workdir / stacks, "w") as file:
                faulthandler.dump_traceback(file)
        except OSError:
            stacks = "stderr"
        faulthandler.dump_traceback(sys.stderr)
        self.log(
            f"watchdog: process {self.rank} of {self.count} waited {waited_s:.0f} s in {phase!r} after step {self.phases.step}, "
            f"limit {limit_s:.0f} s (from config.watchdog_s); {self._describe_missing()}; stacks in {stacks}; "
            "run the same command to continue"
        )
        sys.stderr.flush()
        os._exit(EXIT_CODE)

    def _describe_missing(self) -> str:
        """Names the processes that this one waits for: those that no longer write heartbeats, otherwise those that are behind."""
        if self.count == 1:
            return "it is the only process"
        before = self._read_heartbeats()
        for _ in range(5):  # the others may be reading this process' heartbeat at the same time
            time.sleep(self.heartbeat_s / 2)
            self._write_heartbeat()
        after = self._read_heartbeats()
        silent = [r for r in after if r != self.rank and (after[r] is None or after[r] == before[r])]
        if silent:
            return "missing: " + ", ".join(self._describe(r, after[r]) for r in silent)
        others = {r: status for r, status in after.items() if r != self.rank}  # its own may be unreadable: a full disk
        earliest = min(status["step"] for status in others.values())
        behind = [r for r, status in others.items() if status["step"] == earliest < self.phases.step]
        return "all are alive, behind: " + (", ".join(self._describe(r, after[r]) for r in behind) or "none")

    def _read_heartbeats(self) -> dict[int, dict | None]:
        heartbeats = {}
        for rank in range(self.count):
            try:
                heartbeats[rank] = goodput.read_status(self._heartbeat_path(rank).read_text())
            except OSError:
                heartbeats[rank] = None
        return heartbeats

    @staticmethod
    def _describe(rank: int, status: dict | None) -> str:
        if status is None:
            return f"process {rank} (no heartbeat)"
        last_seen = time.strftime("%H:%M:%S", time.localtime(status["time"]))
        where = f"pid {status['pid']} on {status['host']}"
        return f"process {rank} ({where}, last seen {last_seen} in {status['phase']!r} after step {status['step']})"
