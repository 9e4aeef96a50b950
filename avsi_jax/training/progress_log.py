"""What a training tells who looks on: lines on stderr, kept in the workdir's train.log, and one line that rewrites itself."""

from __future__ import annotations

import contextlib
import datetime
import sys

LOG = "train.log"


class Console:
    """`say` prints a line and keeps it; only the first of several processes says what all would, and marks what others say."""

    def __init__(self, rank: int = 0):
        self.rank, self._path, self._waiting = rank, None, []

    def keep_in(self, workdir) -> None:
        """From now on, and with what was said until now, in the workdir's log."""
        self._path = workdir / (LOG if not self.rank else f"train-{self.rank}.log")
        for line in self._waiting:
            self._keep(line)

    def say(self, text: str, everyone: bool = False) -> None:
        """A line; of what concerns all processes alike the first one's. `everyone`: whoever says it."""
        if self.rank and not everyone:
            return
        print(f"[{self.rank}] {text}" if self.rank else text, file=sys.stderr, flush=True)
        self._keep(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {text}")

    def warn(self, text: str) -> None:
        """A line of this process alone."""
        self.say(text, everyone=True)

    def record(self, text: str) -> None:
        """In the log alone."""
        self._keep(text.rstrip())

    def _keep(self, line: str) -> None:
        if self._path is None:
            self._waiting.append(line)
            return
        from avsi_jax.runtime import storage

        with contextlib.suppress(OSError):  # a full disk is told by what has to be kept
            storage.append_line(self._path, line)

    def tick(self, epoch: int, done: int, total: int, speed: float) -> None:
        """One line that rewrites itself, on a terminal only; speed: steps a second of this start."""
        if sys.stderr.isatty() and not self.rank:
            end = "\r" if done < total else "\r\033[K"
            print(f"epoch {epoch}  step {done}/{total}  {speed:.2f} steps/s", end=end, file=sys.stderr, flush=True)

    def report(self, row: dict, epochs: int, speed: float, epoch_s: float) -> None:
        """One line an epoch: losses, the gap's error, what was misread, speed, time left."""
        left = (epochs - row["epoch"]) * epoch_s
        shown = "  ".join(
            f"{k} {row[k]:.4g}"
            for k in ("train_loss", "val_loss", "train_gap_l1_db", "val_gap_l1_db", "train_ctc", "val_ctc", "val_cer", "val_per")
            if k in row
        )
        left = datetime.timedelta(seconds=round(left))
        self.say(f"epoch {row['epoch']:.0f}/{epochs}  {shown}  {speed:.2f} steps/s  {left} left")
        if share := row.get("train_ctc_infeasible"):
            self.say(f"  {share:.1%} of the clips with a text have too few steps for it: the CTC left them out")
