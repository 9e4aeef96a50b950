"""avsi-inpaint: clips of a person's disk, repaired one after another; each outcome is told as it comes.

stdout carries the outcomes, a line a clip (or, by --json, an object), stderr the rest. What to do is settled in repair_jobs before
the system is loaded; one clip's trouble is its own. Exit codes: 0 all done, 1 some clips failed, 2 nothing was done, 130 stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from avsi_jax.inpainting import cli_jobs
from avsi_jax.inpainting.cli_jobs import AUTO, Job
from avsi_jax.inpainting.cli_output import NAME, ClipOutcome, ProgressReporter, say, shown, told
from avsi_jax.runtime import unexpected_errors

if TYPE_CHECKING:
    from avsi_jax.inpainting.api import Inpainter

PAGE = "repair.html"
NO_GAP = "no hole found"  # in the error of a clip in which clip_inpainter.found_gaps finds none
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
NO_ROOM = 2**20  # bytes left on a disk that count as none: libsndfile doesn't say why it can't write

EPILOG = """\
examples:
  avsi-inpaint --example                                 a first try, with a clip that came with the installation
  avsi-inpaint clip.mpg                                  find the holes and fill them: clip.restored.mkv
  avsi-inpaint talk.wav --gap 0.93-1.73 -o whole.wav     fill this one
  avsi-inpaint film.mp4 --gap 59:30.5-59:31 --gap 61:02-61:02.4
  avsi-inpaint clips/ -o whole/ --resume --report        all clips of a folder; again after a stop, it goes on
  find . -name '*.mov' | avsi-inpaint - --format wav --json > outcomes.jsonl
  avsi-inpaint --gaps gaps.csv -o whole/                 a table with the columns path,start_s,end_s

exit codes: 0 all done, 1 some clips failed, 2 nothing was done, 130 stopped by Ctrl-C
"""


# ---- what is asked for -------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Mistakes take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{NAME}: {message}; --help tells more\n")


def _type(parse: Callable) -> Callable:
    def typed(text):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def parse_face(text: str) -> int:
    """'1' -> 1; ValueError."""
    if not text.isascii() or not text.isdecimal():
        raise ValueError(f"{text!r}: expected the number of a face, such as 1")
    return int(text)


def parse_sync(text: str) -> str | float:
    """'off', 'auto', or by how many seconds the sound comes after its picture; ValueError."""
    if text in ("off", AUTO):
        return text
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{text!r}: expected off, auto or seconds, such as 0.12")
    return seconds


def parser() -> Parser:
    made = Parser(
        NAME, description="Fill the holes in the sound of clips, by what is heard around them and by the speaker's lips.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = made.add_argument
    add("clips", nargs="*", metavar="IN", help="clips (.mpg .mp4 .avi .mov .mkv .wav .flac), folders, @LIST of names, - for stdin")
    add("-o", "--output", metavar="PATH", help="a file for one clip, else a folder; default: IN.restored.SUFFIX in the current one")
    gap = _type(lambda text: AUTO if text == AUTO else cli_jobs.parse_gap(text))
    add(
        "--gap", type=gap, action="append", metavar="START-END", help="a hole, in seconds; may be given again. Default: auto, found"
    )
    add("--gaps", metavar="FILE.csv", help="holes of many clips: a table with the columns path,start_s,end_s")
    add("--format", choices=cli_jobs.FORMATS, default="same", help="wav and flac: sound alone; others: the pictures too, copied "
        "as they are. Default: same as IN, but .mkv for .mpg and .avi, which would lose sound")  # fmt: skip
    add("--checkpoint", default="pretrained", help="shipped weights by name, or the folder of weights or of a training; "
        "default: %(default)s")  # fmt: skip
    add(
        "--face", type=_type(parse_face), metavar="N", help="which face speaks, where there are several: 0 is the one furthest left"
    )
    add("--sync", type=_type(parse_sync), default="off", metavar="off|auto|SECONDS",
        help="sound and pictures out of step: measured, or how much the sound comes late; default: %(default)s")  # fmt: skip
    add("--example", action="store_true", help="instead of IN: a clip that came with the installation, of which "
        "{:g} to {:g} s are lost unless --gap says otherwise".format(*cli_jobs.EXAMPLE_GAP))  # fmt: skip
    add("--overwrite", action="store_true", help="replace files that are there")
    add("--resume", action="store_true", help="leave out clips whose target is there: it was written whole")
    add("--json", action="store_true", help="outcomes on stdout as JSON, an object a line")
    add(
        "--report",
        nargs="?",
        const="",
        action="append",
        metavar="FILE.html",
        help=f"a page that shows and plays what was done; default: {PAGE}",
    )
    add("--quiet", action="store_true", help="tell of failures only")
    return made


def plan(known: argparse.Namespace) -> tuple[list[Job], Path | None]:
    """The jobs and the place of the report; ValueError and OSError say what can't be done."""
    reports = known.report or []
    pages = [name for name in reports if not name or name.lower().endswith(".html")]
    known.clips += [name for name in reports if name not in pages]  # `--report clip.mpg`: a clip is meant
    known.report = None if known.report is None else max(pages, key=len, default="")
    if known.overwrite and known.resume:
        raise ValueError("--overwrite replaces what is there, --resume leaves it; take one of them")
    if known.example:
        _take_example(known)
    given = known.gap or []
    if AUTO in given and len(given) > 1:
        raise ValueError("--gap auto finds the gaps, --gap START-END gives them; take one of them")
    if not known.clips and not known.gaps:
        raise ValueError("no clip given; expected files, folders, @LIST or -; --help has examples")
    table = cli_jobs.read_table(known.gaps) if known.gaps else None
    gaps = AUTO if AUTO in given or not (given or table) else given
    jobs = cli_jobs.plan(
        known.clips, output=known.output, form=known.format, gaps=gaps, table=table, overwrite=known.overwrite, resume=known.resume
    )
    return jobs, None if known.report is None else page_path(known, jobs)


def _take_example(known: argparse.Namespace) -> None:
    if known.clips or known.gaps:
        raise ValueError("--example is a clip of its own; take it without IN and without --gaps")
    known.clips, known.gap = [str(cli_jobs.EXAMPLE)], known.gap or [cli_jobs.EXAMPLE_GAP]


def page_path(known: argparse.Namespace, jobs: Sequence[Job]) -> Path:
    """Where the report goes: beside what is written, unless it is told. FileExistsError."""
    one_file = known.output and jobs and Path(known.output) == jobs[0].target
    folder = Path(known.output).parent if one_file else Path(known.output or ".")
    path = Path(known.report) if known.report else folder / PAGE
    if path.exists() and not (known.overwrite or known.resume):
        raise FileExistsError(f"{path} exists; take --overwrite to replace it, or --report=FILE.html")
    return path


# ---- the work ----------------------------------------------------------------------------------------------------------------


class FullDiskError(OSError):
    """There is no room for what comes next: no further clip is tried."""


def repaired(inpainter: Inpainter, job: Job, known: argparse.Namespace, progress: Callable[[float], None]) -> ClipOutcome:
    """One job, done or told why not; FullDiskError."""
    path, target = str(job.source), str(job.target)
    gaps = job.gaps if job.gaps == AUTO else list(job.gaps)
    try:
        with folder_of(job.target):
            done = inpainter.inpaint_file(
                job.source, job.target, gaps, face=known.face, sync=known.sync, overwrite=known.overwrite, progress=progress
            )
    except Exception as error:  # whatever it is: the other clips don't suffer for it
        why = told(error)
        if job.gaps == AUTO and isinstance(error, ValueError) and NO_GAP in why:
            return ClipOutcome(path, None, "no hole found")
        if is_full(error, job.target):
            raise FullDiskError(f"no room left for {target} ({why}); make room and go on with --resume") from error
        return ClipOutcome(path, None, "failed", error=why)
    return ClipOutcome(
        path, target, "restored", done.gaps, done.warnings, done.av_offset_s, done.seconds, done.duration_s, gaps == AUTO
    )


@contextlib.contextmanager
def folder_of(target: Path) -> Iterator[None]:
    """The target's folder is there meanwhile; made for nothing, it goes again."""
    made = [p for p in target.parents if not p.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # something was written
                folder.rmdir()


def is_full(error: BaseException | None, target: Path) -> bool:
    """Whether an error comes of a disk without room."""
    if not isinstance(error, ValueError | OSError):
        return False
    cause = error
    while cause:
        if getattr(cause, "errno", None) in FULL_DISK:
            return True
        cause = cause.__cause__
    folder = next(p for p in target.absolute().parents if p.exists())
    return shutil.disk_usage(folder).free < NO_ROOM


# ---- the command -------------------------------------------------------------------------------------------------------------


@unexpected_errors.reported(NAME)
def main(argv: list[str] | None = None) -> int:
    known = parser().parse_intermixed_args(argv)
    command = shlex.join([NAME, *(sys.argv[1:] if argv is None else argv)])
    outcomes = []
    try:
        with _ended_by_signal():
            return run(known, command, outcomes)
    except KeyboardInterrupt:
        done = sum(o.status != "failed" for o in outcomes)
        say(f"stopped; {done} clip{'s are' if done != 1 else ' is'} done, --resume goes on")
        return 130
    except BrokenPipeError:  # who read the outcomes has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run(known: argparse.Namespace, command: str, outcomes: list[ClipOutcome]) -> int:
    """Does the jobs, adding to `outcomes`; the exit code."""
    try:
        jobs, page = plan(known)
        todo = [job for job in jobs if not job.there and not job.problem]
        inpainter = _load(known.checkpoint) if todo else None
    except Exception as error:
        say(told(error))
        return 2
    reporter = ProgressReporter(len(todo), quiet=known.quiet, as_json=known.json)
    full = False
    try:
        for job in jobs:
            began = time.monotonic()
            if job.there or job.problem:
                there = job.there
                outcome = ClipOutcome(
                    str(job.source), str(job.target) if there else None, "there already" if there else "failed",
                    error=None if there else job.problem,
                )  # fmt: skip
            else:
                outcome = repaired(inpainter, job, known, reporter.tick)
            outcomes.append(outcome)
            reporter.outcome(outcome, time.monotonic() - began)
    except FullDiskError as error:
        full = True
        say(str(error))
    finally:
        reporter.close()
    written = page is None or full or write_page(page, outcomes, known, command)
    failed = sum(o.status == "failed" for o in outcomes)
    if not failed and not full and written:
        return 0
    return 2 if failed == len(outcomes) else 1


def _load(checkpoint: str) -> Inpainter:
    from avsi_jax.inpainting.api import Inpainter

    return Inpainter.load(checkpoint)


def write_page(path: Path, outcomes: Sequence[ClipOutcome], known: argparse.Namespace, command: str) -> bool:
    """Whether the report could be written; said either way."""
    from avsi_jax.inpainting import html_report

    try:
        html_report.write(path, outcomes, command=command, checkpoint=known.checkpoint)
    except (ValueError, OSError) as error:
        say(f"--report: {told(error)}")
        return False
    if not known.quiet:
        print(f"report: {shown(path)}", file=sys.stderr if known.json else sys.stdout)
    return True


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[None]:
    """SIGTERM, as a job scheduler sends it, is an exit: what is half written goes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number, frame):
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
