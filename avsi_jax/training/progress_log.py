"""Messages of a training: lines on stderr, also kept in the workdir's train.log, and a progress line that is overwritten."""

from __future__ import annotations

import contextlib
import datetime
import sys

from etils import epath

LOG = "train.log"


class Console:
    """Prints and logs the messages of one process.

    rank: index of the process. Messages that are the same on all processes are printed by process 0 only; those of other processes
    start with their rank.
    """

    def __init__(self, rank: int = 0):
        self.rank, self._path, self._buffer = rank, None, []

    def log_to(self, workdir: epath.Path) -> None:
        """Starts logging to the workdir, beginning with the messages so far."""
        self._path = workdir / (LOG if not self.rank else f"train-{self.rank}.log")
        for line in self._buffer:
            self._append(line)

    def info(self, text: str, every_process: bool = False) -> None:
        """Prints and logs a line; on processes other than 0 only with `every_process`."""
        if self.rank and not every_process:
            return
        print(f"[{self.rank}] {text}" if self.rank else text, file=sys.stderr, flush=True)
        self._append(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {text}")

    def warn(self, text: str) -> None:
        """Prints and logs a line that concerns this process."""
        self.info(text, every_process=True)

    def log(self, text: str) -> None:
        """Adds text to the log without printing it."""
        self._append(text.rstrip())

    def _append(self, line: str) -> None:
        if self._path is None:
            self._buffer.append(line)
            return
        from avsi_jax.runtime import storage

        with contextlib.suppress(OSError):  # a full disk is reported when a checkpoint or a metric can't be written
            storage.append_line(self._path, line)

    def progress(self, epoch: int, done: int, total: int, speed: float) -> None:
        """Overwrites the progress line, on a terminal only. speed: training steps per second."""
        if sys.stderr.isatty() and not self.rank:
            end = "\r" if done < total else "\r\033[K"
            print(f"epoch {epoch}  step {done}/{total}  {speed:.2f} steps/s", end=end, file=sys.stderr, flush=True)

    def epoch(self, row: dict[str, float], epochs: int, speed: float, epoch_s: float) -> None:
        """Prints and logs the line of an epoch.

        row: as in metrics.csv. epochs: their total number. speed: training steps per second. epoch_s: mean duration of an epoch.
        """
        shown = "  ".join(
            f"{k} {row[k]:.4g}"
            for k in ("train_loss", "val_loss", "train_gap_l1_db", "val_gap_l1_db", "train_ctc", "val_ctc", "val_cer", "val_per")
            if k in row
        )
        left = datetime.timedelta(seconds=round((epochs - row["epoch"]) * epoch_s))
        self.info(f"epoch {row['epoch']:.0f}/{epochs}  {shown}  {speed:.2f} steps/s  {left} left")
        if share := row.get("train_ctc_infeasible"):
            self.info(f"  {share:.1%} of the clips with text have too few time steps for it and were left out of the CTC loss")
