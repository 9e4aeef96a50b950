"""avsi-train that is sent a signal at a chosen moment: `python -m tests.support.signal_at_phase SIGNAL PHASE NTH [avsi-train's arguments]`.

PHASE: one of avsi_jax.runtime.goodput, the signal comes when it is entered for the NTH time; 'import': before anything is imported; 'after':
NTH seconds after the first step; 'saving': while a checkpoint is being written, the NTH one.
"""

import os
import signal
import sys
import threading
import time


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


def arrange(name: str, phase: str, nth: float, put=setattr) -> None:
    """Has this process sent the signal then; `put` sets an attribute of a class (monkeypatch.setattr takes it back)."""
    from avsi_jax.runtime import goodput
    from avsi_jax.training import checkpoints

    entered, enter, saves, save = [], goodput.PhaseTimer.enter, [], checkpoints.Checkpoints.save

    def entering(self, now: str) -> None:
        enter(self, now)
        entered.append(now)
        if now == phase and entered.count(now) == nth:
            send(name)
        if phase == "after" and entered.count(goodput.STEP) == 1 and now == goodput.STEP:
            threading.Timer(nth, send, [name]).start()

    def saving(self, step, *args, **options) -> None:
        save(self, step, *args, **options)
        saves.append(step)
        if len(saves) == nth:
            until = time.monotonic() + 10
            while not list(self.folder.glob(f"{step}.*tmp*")) and not (self.folder / str(step)).exists():
                assert time.monotonic() < until, "nothing is being written"
            send(name)

    put(goodput.PhaseTimer, "enter", entering)
    if phase == "saving":
        put(checkpoints.Checkpoints, "save", saving)


def main() -> int:
    name, phase, nth, *arguments = sys.argv[1:]
    if phase == "import":
        threading.Timer(float(nth), send, [name]).start()
    from avsi_jax.training import cli

    arrange(name, phase, float(nth))
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
