"""avsi-train with a signal at a chosen moment: `python -m tests.support.signal_at_phase SIGNAL PHASE NTH [avsi-train arguments]`.

PHASE: a phase of avsi_jax.runtime.goodput, for a signal when it is entered for the NTH time; 'import': NTH seconds after the start,
during imports; 'after': NTH seconds after the first training step; 'saving': while the NTH checkpoint is being written.
"""

import os
import signal
import sys
import threading
import time


def send(name: str) -> None:
    """Sends a signal to this process."""
    os.kill(os.getpid(), getattr(signal, name))


def arrange(name: str, phase: str, nth: float, put=setattr) -> None:
    """Arranges for the signal in this process; `put` sets a class attribute (with monkeypatch.setattr it is undone)."""
    from avsi_jax.runtime import goodput
    from avsi_jax.training import checkpoints

    entered, enter, saves, save = [], goodput.PhaseTimer.enter, [], checkpoints.Checkpoints.save

    def enter_and_send(self, new_phase: str) -> None:
        enter(self, new_phase)
        entered.append(new_phase)
        if new_phase == phase and entered.count(new_phase) == nth:
            send(name)
        if phase == "after" and entered.count(goodput.STEP) == 1 and new_phase == goodput.STEP:
            threading.Timer(nth, send, [name]).start()

    def save_and_send(self, step, *args, **options) -> None:
        save(self, step, *args, **options)
        saves.append(step)
        if len(saves) == nth:
            deadline = time.monotonic() + 10
            while not list(self.folder.glob(f"{step}.*tmp*")) and not (self.folder / str(step)).exists():
                assert time.monotonic() < deadline, "no checkpoint is being written"
            send(name)

    put(goodput.PhaseTimer, "enter", enter_and_send)
    if phase == "saving":
        put(checkpoints.Checkpoints, "save", save_and_send)


def main() -> int:
    """Runs the command line; returns the exit code of avsi-train."""
    name, phase, nth, *arguments = sys.argv[1:]
    if phase == "import":
        threading.Timer(float(nth), send, [name]).start()
    from avsi_jax.training import cli

    arrange(name, phase, float(nth))
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
