"""How repairs came out, and how a person at a terminal, or a program, is told.

stdout carries the outcomes, a line a clip (or, by --json, an object); stderr the warnings, failures and how far it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping

from avsi_jax.runtime import unexpected_errors

NAME = "avsi-inpaint"
SAY_EVERY_S = 30  # where no terminal shows a bar
MOST_TOLD = 3  # gaps and sentences, in an outcome's line


@dataclasses.dataclass(frozen=True)
class ClipOutcome:
    """How a job came out. status: 'restored', 'no hole found', 'there already' or 'failed', then `error` says why.

    gaps: of api.Gap; sync_s, seconds, duration_s as in api.FileRepair. found: the gaps were found, not given.
    """

    path: str
    output: str | None
    status: str
    gaps: tuple = ()
    warnings: tuple[str, ...] = ()
    av_offset_s: float | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    duration_s: float | None = None
    found: bool = False
    error: str | None = None

    def as_dict(self) -> dict:
        """What --json tells; numbers to the microsecond."""
        gaps = [{k: _plain(getattr(g, k)) for k in ("start_s", "end_s", "confidence", "said", "by")} for g in self.gaps]
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        seconds = {part: _plain(s) for part, s in self.seconds.items()}
        return fields | {"gaps": gaps, "warnings": list(self.warnings), "seconds": seconds}


def _plain(value):
    """A number as json takes it, also where it is numpy's; null where it is none."""
    if value is None or isinstance(value, str | bool | tuple | Mapping):
        return value
    return round(float(value), 6) if math.isfinite(value) else None


def shown(text: object) -> str:
    """A name or message fit for one line of a terminal: what can't be printed as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def told(error: BaseException) -> str:
    """An error in one line; one that no clip should cause with its name, its place and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError):
        return text
    if isinstance(error, MemoryError):
        return "not enough memory; cut the clip around its gaps, or close other programs"
    return unexpected_errors.explain(error)


# ---- lines ----------------------------------------------------------------------------------------------------------------------


class ProgressReporter:
    """Outcomes on stdout; warnings, failures and how far it is on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int, *, quiet: bool, as_json: bool):
        self.total, self.quiet, self.as_json = total, quiet, as_json
        self.done, self.share = 0, 0.0
        self.began = self.last_said = time.monotonic()
        self.bar = None
        if total and not quiet and sys.stderr.isatty():
            import tqdm

            form = "{percentage:3.0f}% |{bar}| " + f"{{n:.1f}}/{total} clips, {{rate_fmt}}, {{elapsed}} gone, {{remaining}} left"
            self.bar = tqdm.tqdm(total=total, unit="clip", bar_format=form, dynamic_ncols=True, leave=False, smoothing=0.1)

    def tick(self, share: float) -> None:
        """How much of the present clip is done, 0 to 1."""
        self.share = share
        if self.bar is not None:
            self.bar.update(self.done + share - self.bar.n)
        elif not self.quiet and self.done + share < self.total and time.monotonic() - self.last_said > SAY_EVERY_S:
            self.last_said = time.monotonic()
            self._progress()

    def _progress(self) -> None:
        done, seconds = self.done + self.share, time.monotonic() - self.began
        left = f"{(self.total - done) * seconds / done:.0f} s left" if done else "? s left"
        print(f"{done:.1f}/{self.total} clips, {seconds / max(done, 1e-9):.1f} s each, {left}", file=sys.stderr, flush=True)

    def outcome(self, outcome: ClipOutcome, seconds: float = 0.0) -> None:
        with self._lines():
            if outcome.error:
                say(whose(outcome.path, outcome.error))
            for warning in () if self.quiet else outcome.warnings:
                say(whose(outcome.path, warning))
            if self.as_json:
                print(json.dumps(outcome.as_dict()), flush=True)
            elif not self.quiet and not outcome.error:
                print(shown(line_of(outcome, seconds)), flush=True)
        if outcome.status != "there already":
            self.tick(1.0)
            self.done, self.share = self.done + 1, 0.0

    @contextlib.contextmanager
    def _lines(self) -> Iterator[None]:
        """The bar makes room for lines."""
        if self.bar is not None:
            self.bar.clear()
        yield
        if self.bar is not None:
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def say(text: str) -> None:
    print(f"{NAME}: {shown(text)}", file=sys.stderr, flush=True)


def whose(path: str, text: str) -> str:
    """A message with the clip before it, unless it begins with it."""
    return text if text.startswith(path) else f"{path}: {text}"


def line_of(outcome: ClipOutcome, seconds: float) -> str:
    """'whole.wav: filled 0.93-1.73 s by sound and lips, confidence 0.71; likeliest sentence ... (4.3 s)'."""
    if outcome.status == "no hole found":
        return f"{outcome.path}: no hole found, nothing written; --gap START-END tells where one is"
    if outcome.status == "there already":
        return f"{outcome.output}: there already"
    gaps = outcome.gaps[:MOST_TOLD]
    parts = [f"{g.start_s:.2f}-{g.end_s:.2f} s by {g.by}, confidence {g.confidence:.2f}" for g in gaps]
    parts += [f"{len(outcome.gaps) - MOST_TOLD} more"] * (len(outcome.gaps) > MOST_TOLD)
    if said := [f'"{text}"' for text in dict.fromkeys(g.transcript for g in outcome.gaps if g.transcript)]:
        parts.append(f"likeliest sentence of Grid {', '.join(said[:MOST_TOLD])}")
    return f"{outcome.output}: {'found and ' * outcome.found}filled {'; '.join(parts)} ({seconds:.1f} s)"
