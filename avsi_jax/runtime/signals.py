"""SIGTERM and Ctrl-C: told to the loop, which saves and leaves; where there is nothing to save, out at once.

A signal may come while the main thread is inside a library for minutes (a compilation, a collective). Python's own handlers run
only after that, so a thread takes the signals from a pipe. Exit codes are the shell's: 143 for SIGTERM, 130 for Ctrl-C. 0 would
tell an orchestrator that the training is finished.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

GRACE_S = 20.0  # from the signal to the end, saved or not: orchestrators kill after 25 to 30 s
ECHO_S = 2.0  # a signal that comes again so soon is the same one: launchers send it to a group and to its members
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The training was told to stop, and has saved what it had."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}, saved; the same command goes on from there")
        self.exit_code = 128 + signum


class StopSignals:
    """asked: the signal that came, 0 while none did. Until `there_is_work()` is said, a signal ends the process at once."""

    def __init__(self, say: Callable[[str], None], grace_s: float = GRACE_S):
        self.asked, self._say, self._grace_s, self._work = 0, say, grace_s, False
        self._lock, self._timer, self._since = threading.Lock(), None, 0.0

    def install(self) -> StopSignals:
        """Takes the signals; from the main thread only."""
        ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._fd_before = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(ours,), name="signals", daemon=True).start()
        return self

    def uninstall(self) -> None:
        """Signals do what they did before; the training has saved, or there is none any more."""
        if self._timer:
            self._timer.cancel()
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._theirs.close()

    def there_is_work(self) -> None:
        """From now on the loop looks at `asked`, and leaves by itself."""
        with self._lock:
            self._work = True

    def _listen(self, pipe: socket.socket) -> None:
        while received := pipe.recv(1):
            if received[0] in SIGNALS:
                self._take(received[0])
        pipe.close()

    def _take(self, number: int) -> None:
        name = signal.Signals(number).name
        with self._lock:
            if self.asked and time.monotonic() - self._since < ECHO_S:
                return
            if self.asked:
                self._leave(f"{name} again: left without saving")
            self.asked, self._since = number, time.monotonic()
            if not self._work:
                self._leave(f"{name}: left, there was nothing to save yet")
        self._say(f"{name}: saving (once more, later: leave at once)")
        self._timer = threading.Timer(self._grace_s, self._leave, [f"{name}: not saved within {self._grace_s:g} s, left"])
        self._timer.daemon = True
        self._timer.start()

    def _leave(self, why: str) -> None:
        self._say(f"{why}; the same command goes on from the last checkpoint")
        sys.stderr.flush()
        os._exit(128 + self.asked if self.asked else 128 + signal.SIGTERM)
