"""avsi-inpaint: restores the gaps in clip files, one file after another.

stdout has one line per clip (with --json, one object per line), stderr everything else. All jobs are planned (cli_jobs) before the
system is loaded, and an error in one clip does not stop the others. Exit codes: 0 success, 1 some clips failed, 2 nothing was done,
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from avsi_jax.inpainting import cli_jobs
from avsi_jax.inpainting.cli_jobs import AUTO, Job
from avsi_jax.inpainting.cli_output import NAME, ClipOutcome, ProgressReporter, error_line, print_message, printable
from avsi_jax.runtime import unexpected_errors
from avsi_jax.runtime.command_line import Parser

if TYPE_CHECKING:
    from avsi_jax.inpainting.api import Inpainter

REPORT_NAME = "inpainting.html"
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
MIN_FREE_BYTES = 2**20  # a disk with less counts as full: libsndfile does not say why it cannot write

EPILOG = """\
examples:
  avsi-inpaint --example                                 a first try, with a clip that is installed with the package
  avsi-inpaint clip.mpg                                  detect the gaps and restore them: clip.restored.mkv
  avsi-inpaint talk.wav --gap 0.93-1.73 -o restored.wav  restore this gap
  avsi-inpaint talk.mp4 --gap 59:30.5-59:31 --gap 61:02-61:02.4
  avsi-inpaint clips/ -o restored/ --resume --report     all clips in a folder; if interrupted, run it again to continue
  find . -name '*.mov' | avsi-inpaint - --format wav --json > results.jsonl
  avsi-inpaint --gaps gaps.csv -o restored/              a table with the columns path,start_s,end_s

exit codes: 0 success, 1 some clips failed, 2 nothing was done, 130 interrupted by Ctrl-C
"""


# ---- arguments ---------------------------------------------------------------------------------------------------------------


def _type(parse: Callable) -> Callable:
    """`parse` as an argparse type: the text of its ValueError is shown."""

    def typed(text):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def parse_face(text: str) -> int:
    """'1' -> 1. Raises ValueError."""
    if not text.isascii() or not text.isdecimal():
        raise ValueError(f"{text!r}: expected the number of a face, such as 1")
    return int(text)


def parse_track(text: str) -> int:
    """'2' -> 2. Raises ValueError."""
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise ValueError(f"{text!r}: expected the number of an audio track, counted from 1")
    return int(text)


def parse_sync(text: str) -> str | float:
    """'off', 'auto', or the seconds by which the audio lags the video. Raises ValueError."""
    if text in ("off", AUTO):
        return text
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{text!r}: expected off, auto or seconds, such as 0.12")
    from avsi_jax.inpainting.clip_inpainter import MAX_OFFSET_S

    if abs(seconds) > MAX_OFFSET_S:
        raise ValueError(f"{text}: expected at most {MAX_OFFSET_S:g} s in either direction")
    return seconds


def parser() -> Parser:
    """The command line of avsi-inpaint."""
    result = Parser(
        NAME, description="Restore gaps in the audio of clips, from the surrounding audio and the speaker's lips.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = result.add_argument
    add("clips", nargs="*", metavar="IN", help="clips (video or audio files of any format), folders, @LIST (a file with one name "
        "per line), or - for names on stdin; -- before names that begin with a dash")  # fmt: skip
    add(
        "-o",
        "--output",
        metavar="PATH",
        help="a file for one clip, else a folder; default: IN.restored.SUFFIX in the current folder",
    )
    gap = _type(lambda text: AUTO if text == AUTO else cli_jobs.parse_gap(text))
    add("--gap", type=gap, action="append", metavar="START-END", help="a gap, in seconds on the clock of a player that shows the "
        "clip; may be repeated. Default: auto, which detects the gaps")  # fmt: skip
    add("--gaps", metavar="FILE.csv", help="gaps of many clips: a table with the columns path,start_s,end_s")
    add("--format", choices=cli_jobs.FORMATS, default="same", help="wav and flac: audio only; the others: also the unchanged "
        "video. Default: same as IN, but .mkv (.wav without video) for formats that would lose audio quality")  # fmt: skip
    add("--checkpoint", default="pretrained", help="name of shipped weights, a folder of weights, or the working directory of a "
        "training; default: %(default)s")  # fmt: skip
    add("--mode", choices=("natural", "mean"), default="natural", help="natural: with the detail of speech that the refiner of the "
        "weights adds; mean: the prediction of the network itself, for research; the same where the weights have no refiner; "
        "default: %(default)s")  # fmt: skip
    add("--track", type=_type(parse_track), metavar="N", help="which audio track to restore if there are several, counted from 1; "
        "default: the one that the clip marks as default, or the first")  # fmt: skip
    add("--face", type=_type(parse_face), metavar="N", help="which face is speaking if there are several, counted from 0 at the "
        "left; default: the largest")  # fmt: skip
    add("--sync", type=_type(parse_sync), default="off", metavar="off|auto|SECONDS", help="A/V offset: auto measures and "
        "corrects it; or the seconds by which the audio lags the video; default: %(default)s")  # fmt: skip
    add("--example", action="store_true", help="instead of IN: a clip that is installed with the package, with a gap from "
        "{:g} to {:g} s unless --gap is given".format(*cli_jobs.EXAMPLE_GAP))  # fmt: skip
    add("--overwrite", action="store_true", help="replace existing files")
    add("--resume", action="store_true", help="skip clips whose output exists: existing outputs are complete")
    add("--json", action="store_true", help="print the outcomes on stdout as JSON, one object per line")
    add("--report", nargs="?", const="", action="append", metavar="FILE.html",
        help=f"write a page with plots and players of the results; default name: {REPORT_NAME}")  # fmt: skip
    add("--quiet", action="store_true", help="print errors only")
    return result


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; all after -- are clips, whatever they begin with."""
    argv = list(argv)
    options_end = argv.index("--") if "--" in argv else len(argv)
    args = parser().parse_intermixed_args(argv[:options_end])
    args.clips += argv[options_end + 1 :]
    return args


def plan(args: argparse.Namespace) -> tuple[list[Job], Path | None]:
    """The jobs and the path of the report, or None. Raises ValueError and OSError if something cannot be done."""
    reports = args.report or []
    pages = [name for name in reports if not name or name.lower().endswith(".html")]
    args.clips += [name for name in reports if name not in pages]  # in `--report clip.mpg`, the name is a clip
    args.report = None if args.report is None else max(pages, key=len, default="")
    if args.overwrite and args.resume:
        raise ValueError("--overwrite replaces existing files, --resume keeps them; use one of them")
    if args.example:
        _use_example(args)
    given = args.gap or []
    if AUTO in given and len(given) > 1:
        raise ValueError("--gap auto detects the gaps, --gap START-END gives them; use one of them")
    if not args.clips and not args.gaps:
        raise ValueError("no clip given; expected files, folders, @LIST or -; see --help for examples")
    table = cli_jobs.read_table(args.gaps) if args.gaps else None
    gaps = AUTO if AUTO in given or not (given or table) else given
    jobs = cli_jobs.plan(
        args.clips, output=args.output, form=args.format, gaps=gaps, table=table, overwrite=args.overwrite, resume=args.resume
    )
    return jobs, None if args.report is None else report_path(args, jobs)


def _use_example(args: argparse.Namespace) -> None:
    if args.clips or args.gaps:
        raise ValueError("--example is a clip itself; use it without IN and without --gaps")
    args.clips, args.gap = [str(cli_jobs.EXAMPLE)], args.gap or [cli_jobs.EXAMPLE_GAP]


def report_path(args: argparse.Namespace, jobs: Sequence[Job]) -> Path:
    """The path of the report: beside the outputs, unless it is given. Raises FileExistsError."""
    one_file = args.output and jobs and Path(args.output) == jobs[0].target
    folder = Path(args.output).parent if one_file else Path(args.output or ".")
    path = Path(args.report) if args.report else folder / REPORT_NAME
    if path.exists() and not (args.overwrite or args.resume):
        raise FileExistsError(f"{path} exists; use --overwrite to replace it, or --report=FILE.html")
    return path


# ---- jobs --------------------------------------------------------------------------------------------------------------------


class DiskFullError(OSError):
    """The disk has no space for the output: the remaining clips are not tried."""


def inpaint_job(inpainter: Inpainter, job: Job, args: argparse.Namespace, progress: Callable[[float], None]) -> ClipOutcome:
    """Runs one job. Errors become the outcome 'failed'; raises only DiskFullError."""
    path, target = str(job.source), str(job.target)
    gaps = job.gaps if job.gaps == AUTO else list(job.gaps)
    try:
        with folder_of(job.target):
            result = inpainter.inpaint_file(
                job.source, job.target, gaps, face=args.face, sync=args.sync, track=args.track,
                overwrite=args.overwrite, progress=progress,
            )  # fmt: skip
    except Exception as error:  # any error: the other clips are still processed
        from avsi_jax.inpainting.clip_gaps import NoGapFoundError

        if isinstance(error, NoGapFoundError):
            return ClipOutcome(path, None, "no gap")
        message = error_line(error)
        if is_disk_full(error, job.target):
            raise DiskFullError(f"no space left for {target} ({message}); free some space and continue with --resume") from error
        return ClipOutcome(path, None, "failed", error=message)
    return ClipOutcome(
        path, target, "restored", result.gaps, result.warnings, result.av_offset_s, result.seconds, result.duration_s, gaps == AUTO
    )


@contextlib.contextmanager
def folder_of(target: Path) -> Iterator[None]:
    """Creates the target's folder; removes what it created if nothing was written there."""
    created = [p for p in target.parents if not p.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in created:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def is_disk_full(error: BaseException | None, target: Path) -> bool:
    """Whether an error was caused by a full disk."""
    if not isinstance(error, ValueError | OSError):
        return False
    cause = error
    while cause:
        if getattr(cause, "errno", None) in DISK_FULL_ERRNOS:
            return True
        cause = cause.__cause__
    folder = next(p for p in target.absolute().parents if p.exists())
    return shutil.disk_usage(folder).free < MIN_FREE_BYTES


# ---- the command -------------------------------------------------------------------------------------------------------------


@unexpected_errors.reported(NAME)
def main(argv: list[str] | None = None) -> int:
    """The console script; the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    command = shlex.join([NAME, *argv])
    outcomes = []
    try:
        with _exit_on_sigterm():
            return run(args, command, outcomes)
    except KeyboardInterrupt:
        done = sum(o.status != "failed" for o in outcomes)
        print_message(f"interrupted; {done} clip{'s are' if done != 1 else ' is'} done, --resume continues")
        return 130


def run(args: argparse.Namespace, command: str, outcomes: list[ClipOutcome]) -> int:
    """Runs the jobs, adding to `outcomes`; the exit code."""
    try:
        jobs, report = plan(args)
        todo = [job for job in jobs if not job.exists and not job.problem]
        inpainter = _load(args.checkpoint, args.mode) if todo else None
    except Exception as error:
        print_message(error_line(error))
        return 2
    reporter = ProgressReporter(len(todo), quiet=args.quiet, as_json=args.json)
    full = False
    try:
        for job in jobs:
            began = time.monotonic()
            if job.exists or job.problem:
                outcome = ClipOutcome(
                    str(job.source), str(job.target) if job.exists else None, "exists" if job.exists else "failed",
                    error=None if job.exists else job.problem,
                )  # fmt: skip
            else:
                outcome = inpaint_job(inpainter, job, args, reporter.tick)
            outcomes.append(outcome)
            reporter.outcome(outcome, time.monotonic() - began)
    except DiskFullError as error:
        full = True
        print_message(str(error))
    finally:
        reporter.close()
    report_written = report is None or full or write_report(report, outcomes, args, command)
    failed = sum(o.status == "failed" for o in outcomes)
    if not failed and not full and report_written:
        return 0
    return 2 if failed == len(outcomes) else 1


def _load(checkpoint: str, mode: str) -> Inpainter:
    from avsi_jax.inpainting.api import Inpainter
    from avsi_jax.runtime import compilation_cache

    compilation_cache.enable()
    return Inpainter.load(checkpoint, mode=mode)


def write_report(path: Path, outcomes: Sequence[ClipOutcome], args: argparse.Namespace, command: str) -> bool:
    """Writes the report and prints its path, or the error. Returns whether it was written."""
    from avsi_jax.inpainting import html_report

    try:
        html_report.write(path, outcomes, command=command, checkpoint=args.checkpoint, track=args.track)
    except (ValueError, OSError) as error:
        print_message(f"--report: {error_line(error)}")
        return False
    if not args.quiet:
        print(f"report: {printable(path)}", file=sys.stderr if args.json else sys.stdout)
    return True


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM, as sent by job schedulers, into SystemExit, so that partly written files are removed."""
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
