"""Output of avsi-inpaint.

stdout has the outcome of each clip, as a line or (--json) an object; stderr has warnings, errors and progress.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from avsi_jax.runtime import unexpected_errors

NAME = "avsi-inpaint"
PROGRESS_EVERY_S = 30  # where stderr is not a terminal
MAX_SHOWN = 3  # gaps and transcripts, in the line of a clip


@dataclasses.dataclass(frozen=True)
class ClipOutcome:
    """The outcome of a job.

    status: 'restored'; 'no gap' if none was detected; 'exists' if the output existed and --resume was given; 'failed' if `error`
    is set. gaps: of api.Gap. av_offset_s, seconds and duration_s: as in api.FileRepair. gaps_detected: the gaps were detected, not
    given.
    """

    path: str
    output: str | None
    status: str
    gaps: tuple = ()
    warnings: tuple[str, ...] = ()
    av_offset_s: float | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    duration_s: float | None = None
    gaps_detected: bool = False
    error: str | None = None

    def as_dict(self) -> dict:
        """The object that --json prints; numbers rounded to 1e-6."""
        gaps = [{k: _plain(getattr(g, k)) for k in ("start_s", "end_s", "confidence", "transcript", "inputs")} for g in self.gaps]
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        seconds = {part: _plain(s) for part, s in self.seconds.items()}
        return fields | {"gaps": gaps, "warnings": list(self.warnings), "seconds": seconds}


def _plain(value: Any) -> Any:
    """A value that json can write: NumPy numbers as Python's, numbers that are not finite as None."""
    if value is None or isinstance(value, str | bool | tuple | Mapping):
        return value
    return round(float(value), 6) if math.isfinite(value) else None


def printable(text: object) -> str:
    """A name or message on one line of a terminal: characters that cannot be printed are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def error_line(error: BaseException) -> str:
    """An error in one line. An unexpected error is shown with its class, where it was raised and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError):
        return text
    if isinstance(error, MemoryError):
        return "not enough memory; cut the clip around its gaps, or close other programs"
    return unexpected_errors.explain(error)


# ---- lines ----------------------------------------------------------------------------------------------------------------------


class ProgressReporter:
    """Prints outcomes on stdout; warnings, errors and progress on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int, *, quiet: bool, as_json: bool):
        self.total, self.quiet, self.as_json = total, quiet, as_json
        self.done, self.fraction = 0, 0.0
        self.began = self.last_printed = time.monotonic()
        self.bar = None
        if total and not quiet and sys.stderr.isatty():
            import tqdm

            form = "{percentage:3.0f}% |{bar}| " + f"{{n:.1f}}/{total} clips, {{rate_fmt}}, {{elapsed}} elapsed, {{remaining}} left"
            self.bar = tqdm.tqdm(total=total, unit="clip", bar_format=form, dynamic_ncols=True, leave=False, smoothing=0.1)

    def tick(self, fraction: float) -> None:
        """Reports how much of the current clip is done, 0 to 1."""
        self.fraction = fraction
        if self.bar is not None:
            self.bar.update(self.done + fraction - self.bar.n)
        elif not self.quiet and self.done + fraction < self.total and time.monotonic() - self.last_printed > PROGRESS_EVERY_S:
            self.last_printed = time.monotonic()
            self._print_progress()

    def _print_progress(self) -> None:
        done, seconds = self.done + self.fraction, time.monotonic() - self.began
        left = f"{(self.total - done) * seconds / done:.0f} s left" if done else "? s left"
        print(f"{done:.1f}/{self.total} clips, {seconds / max(done, 1e-9):.1f} s each, {left}", file=sys.stderr, flush=True)

    def outcome(self, outcome: ClipOutcome, seconds: float = 0.0) -> None:
        """Prints the outcome of a clip that took `seconds`."""
        with self._bar_cleared():
            if outcome.error:
                print_message(with_path(outcome.path, outcome.error))
            for warning in () if self.quiet else outcome.warnings:
                print_message(with_path(outcome.path, warning))
            if self.as_json:
                print(json.dumps(outcome.as_dict()), flush=True)
            elif not self.quiet and not outcome.error:
                print(printable(outcome_line(outcome, seconds)), flush=True)
        if outcome.status != "exists":
            self.tick(1.0)
            self.done, self.fraction = self.done + 1, 0.0

    @contextlib.contextmanager
    def _bar_cleared(self) -> Iterator[None]:
        """Hides the bar while lines are printed."""
        if self.bar is not None:
            self.bar.clear()
        yield
        if self.bar is not None:
            self.bar.refresh()

    def close(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.close()


def print_message(text: str) -> None:
    """Prints a line on stderr, after the command's name."""
    print(f"{NAME}: {printable(text)}", file=sys.stderr, flush=True)


def with_path(path: str, text: str) -> str:
    """A message preceded by the clip's path, unless it begins with it."""
    return text if text.startswith(path) else f"{path}: {text}"


def outcome_line(outcome: ClipOutcome, seconds: float) -> str:
    """'out.wav: restored 0.93-1.73 s from audio and video, confidence 0.71; transcript "..." (4.3 s)'."""
    if outcome.status == "no gap":
        return f"{outcome.path}: no gap detected, nothing written; use --gap START-END to give one"
    if outcome.status == "exists":
        return f"{outcome.output}: exists, skipped"
    gaps = outcome.gaps[:MAX_SHOWN]
    parts = [f"{g.start_s:.2f}-{g.end_s:.2f} s from {g.inputs}, confidence {g.confidence:.2f}" for g in gaps]
    parts += [f"{len(outcome.gaps) - MAX_SHOWN} more"] * (len(outcome.gaps) > MAX_SHOWN)
    if transcripts := [f'"{text}"' for text in dict.fromkeys(g.transcript for g in outcome.gaps if g.transcript)]:
        parts.append(f"transcript {', '.join(transcripts[:MAX_SHOWN])}")
    return f"{outcome.output}: {'detected and ' * outcome.gaps_detected}restored {'; '.join(parts)} ({seconds:.1f} s)"
