"""SIGTERM and Ctrl-C during a training: the loop saves and ends; while there is nothing to save, the process ends at once.

A signal may arrive while the main thread is inside a library for minutes (a compilation, a collective). Python's own handlers
run only after that, so a thread receives the signals through a pipe. Exit codes are the shell's: 143 for SIGTERM, 130 for
Ctrl-C. An exit code of 0 would tell an orchestrator that the training is finished.

There is no time limit for the last step and the save: on a busy machine both are slow, and ending early would lose steps that the
orchestrator had given time to save. A step or a save that is stuck is ended by the watchdog, as at any other time (unless
config.watchdog_s is 0).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

ECHO_S = 2.0  # a repeated signal within this time counts as the same one: launchers send it to a group and to its members
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A signal stopped the training, and its state is saved."""

    def __init__(self, signum: int, step: int):
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} after step {step}, state saved; run the same command to continue")
        self.exit_code = 128 + signum


class StopSignals:
    """Receives the signals that stop a training.

    `received` is the number of the signal, 0 before there is one. Until `leave_to_loop` is called, a signal ends the process at
    once; after it, a second one does. `log` is called with one line about each signal.
    """

    def __init__(self, log: Callable[[str], None]):
        self.received, self._log, self._loop_decides = 0, log, False
        self._lock, self._since = threading.Lock(), 0.0

    def install(self) -> StopSignals:
        """Takes over the signals; from the main thread only."""
        read_end, self._write_end = socket.socketpair()
        self._write_end.setblocking(False)
        self._previous_handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._previous_fd = signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read_end,), name="signals", daemon=True).start()
        return self

    def uninstall(self) -> None:
        """Restores the previous handlers; called when the training has saved or ended."""
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._write_end.close()

    def leave_to_loop(self) -> None:
        """From now on the training loop checks `received`, saves, and ends the process itself."""
        with self._lock:
            self._loop_decides = True

    def _listen(self, pipe: socket.socket) -> None:
        while received := pipe.recv(1):
            if received[0] in SIGNALS:
                self._receive(received[0])
        pipe.close()

    def _receive(self, number: int) -> None:
        name = signal.Signals(number).name
        with self._lock:
            if self.received and time.monotonic() - self._since < ECHO_S:
                return
            if self.received:
                self._exit(f"{name} again: ended without saving")
            self.received, self._since = number, time.monotonic()
            if not self._loop_decides:
                self._exit(f"{name}: ended, nothing to save yet")
        self._log(f"{name}: saving (send it again to end without saving)")

    def _exit(self, reason: str) -> None:
        self._log(f"{reason}; run the same command to continue from the last checkpoint")
        sys.stderr.flush()
        os._exit(128 + self.received if self.received else 128 + signal.SIGTERM)
