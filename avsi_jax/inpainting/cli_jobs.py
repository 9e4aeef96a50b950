"""What a person names -> jobs: which clip, with which gaps, into which file. Nothing is decoded here.

Names are clips, folders (searched through for clips; what is hidden is left out), @LIST (a file with a name a line) and - (names
from stdin). Everything that can be refused is refused before the first clip is touched. Times are seconds of the clip's sound.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

AUTO = "auto"
MARK = ".restored"  # of what is written: STEM.restored.SUFFIX; never looked for in a folder
WRITTEN = (".wav", ".flac", ".mkv", ".mp4", ".mov", ".mpg", ".mpeg")
WGAP = (".wav", ".flac", ".mkv", ".mp4", ".mov")  # hold sound without loss; a clip of another kind becomes a .mkv
AUDIO = (".wav", ".flac")
NOT_WRITTEN = (".avi", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".webm", ".wmv", ".aiff")  # no folder is meant
FORMATS = ("same", "wav", "flac", "mkv", "mp4", "mov", "mpg")
COLUMNS = ("path", "start_s", "end_s")  # of a table of gaps
JUNK = ("__MACOSX",)  # folders, beside those that are hidden
EXAMPLE = Path(__file__).parent.parent / "examples" / "person.mpg"  # comes with the installation, whole
EXAMPLE_GAP = (0.9, 1.5)
EXPECTED_GAP = "expected START-END in seconds, such as 0.93-1.73"

Spans = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Job:
    """gaps: [(start_s, end_s)] or 'auto'. problem: why it can't be done, where that is known already; there: it is done."""

    source: Path
    target: Path
    gaps: Spans | str
    problem: str = ""
    there: bool = False


# ---- gaps --------------------------------------------------------------------------------------------------------------------


def parse_gap(text: str) -> tuple[float, float]:
    """'0.93-1.73' or '59:30.5-59:31' -> (start_s, end_s); ValueError."""
    start, _, end = text.partition("-")
    try:
        gap = parse_time(start), parse_time(end)
    except ValueError:
        raise ValueError(f"{text!r}: {EXPECTED_GAP}") from None
    if not gap[0] < gap[1]:
        raise ValueError(f"gap {text}: expected START-END with START < END")
    return gap


def parse_time(text: str) -> float:
    """'83.5', '1:23.5' or '0:01:23.5' -> 83.5; ValueError."""
    parts = [float(part) for part in text.strip().split(":")]
    seconds = sum(part * 60**i for i, part in enumerate(reversed(parts)))
    if len(parts) > 3 or not all(math.isfinite(part) and part >= 0 for part in parts):
        raise ValueError(f"{text!r}: expected seconds")
    return seconds


def read_table(path: str) -> dict[str, list[tuple[float, float]]]:
    """A table of gaps, CSV with path,start_s,end_s -> {absolute path: gaps}; ValueError names the line that is wrong.

    A path is looked for from the current folder, then from the table's.
    """
    found = collections.defaultdict(list)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a table of gaps with the columns {','.join(COLUMNS)}")
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.DictReader(file)
        if not set(COLUMNS) <= set(rows.fieldnames or ()):
            raise ValueError(f"{path}: found the columns {','.join(rows.fieldnames or ['none'])}, expected {','.join(COLUMNS)}")
        for row in rows:
            try:
                gap = parse_gap(f"{row['start_s']}-{row['end_s']}")
            except ValueError as error:
                raise ValueError(f"{path}, line {rows.line_num}: {error}") from None
            name = row["path"] if os.path.exists(row["path"]) else os.path.join(os.path.dirname(path), row["path"])
            found[os.path.abspath(name)].append(gap)
    if not found:
        raise ValueError(f"{path}: holds no gap, expected a row for each: {','.join(COLUMNS)}")
    return dict(found)


# ---- clips -------------------------------------------------------------------------------------------------------------------


def clips_of(names: Sequence[str]) -> list[tuple[Path, Path]]:
    """[(clip, its place under the output folder)], each clip once; ValueError for a folder without clips, an empty list.

    A file that is named is taken whatever it is: what is wrong with it is found when its turn comes.
    """
    found = {}
    for name in _expanded(names):
        if not name or "\0" in name:
            raise ValueError(f"found {name[:40]!r} among the names, expected files, folders, or a list with one name a line")
        for clip, place in _in_folder(Path(name)) if os.path.isdir(name) else [(Path(name), Path(Path(name).name))]:
            found.setdefault(os.path.abspath(clip), (clip, place))
    return list(found.values())


def _expanded(names: Sequence[str]) -> Iterator[str]:
    """Names with lists in place of what names them."""
    for name in names:
        if name != "-" and not name.startswith("@"):
            yield name
            continue
        if name == "-":
            text = sys.stdin.read()
        elif not Path(name[1:]).is_file():
            raise FileNotFoundError(f"{name}: no such file {name[1:]}; expected a list of clips, one a line")
        else:
            text = Path(name[1:]).read_text(encoding="utf-8", errors="surrogateescape")
        lines = [line.strip("\r") for line in text.split("\n") if line.strip()]
        if not lines:
            raise ValueError(f"{'stdin' if name == '-' else name[1:]}: found no name, expected one a line")
        yield from lines


def _in_folder(folder: Path) -> list[tuple[Path, Path]]:
    """The clips below a folder, by name, and their places in it; not those that are hidden, or that were restored."""
    from avsi_jax.media import clip_io

    known, found = clip_io.VIDEO_SUFFIXES + clip_io.AUDIO_SUFFIXES, []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in JUNK)
        for name in sorted(files):
            path = Path(parent, name)
            if not name.startswith(".") and path.suffix.lower() in known and not path.stem.endswith(MARK):
                found.append((path, path.relative_to(folder)))
    if not found:
        raise ValueError(f"{folder}: found no clip in this folder, expected files with one of {' '.join(known)}")
    return found


# ---- jobs --------------------------------------------------------------------------------------------------------------------


def plan(
    names: Sequence[str], *, output: str | None = None, form: str = "same", gaps: Spans | str = AUTO,
    table: Mapping[str, Spans] | None = None, overwrite: bool = False, resume: bool = False,
) -> list[Job]:  # fmt: skip
    """The jobs, in the order of the names. Without names those of the table.

    gaps: of clips that are not in the table; '' where those are not allowed. ValueError and OSError say what can't be done.
    """
    clips = clips_of(names or sorted(table or ()))
    single = len(clips) == 1 and not any(os.path.isdir(name) for name in names)
    if single and _is_file(output):
        targets = [_file_target(clips[0][0], Path(output), form)]
    else:
        folder = _output_folder(output, len(clips))
        targets = [folder / target for target in _targets(clips, form)]
    jobs = [
        Job(clip, target, _gaps_of(clip, gaps, table or {}), _problem_of(clip, target))
        for (clip, _), target in zip(clips, targets, strict=True)
    ]
    _refuse_targets(jobs)
    return _with_those_there(jobs, overwrite, resume)


def _is_file(output: str | None) -> bool:
    """Whether --output names a file; ValueError where it has a suffix that is not written."""
    suffix = Path(output or "").suffix.lower()
    if output and not os.path.isdir(output) and suffix in NOT_WRITTEN:
        raise ValueError(f"--output {output}: found suffix {suffix}, expected one of {' '.join(WRITTEN)}, or a folder")
    return bool(output) and suffix in WRITTEN and not os.path.isdir(output)


def _output_folder(output: str | None, count: int) -> Path:
    if _is_file(output):
        raise ValueError(f"--output {output} is one file; expected a folder for {count} clip{'s' * (count > 1)} and more to come")
    folder = Path(output or ".")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {output}: found a file, expected a folder or a name with one of {' '.join(WRITTEN)}")
    return folder


def _targets(clips: Sequence[tuple[Path, Path]], form: str) -> list[Path]:
    """What each clip is written as below the output folder, no two as one file.

    Clips that would be are named in full, if need be with the folders they lie in: all of them, so that it doesn't matter which
    is named first, and none is taken for another's where a run is resumed.
    """
    levels = [0] * len(clips)
    while True:
        targets = [_target(*clip, level, form) for clip, level in zip(clips, levels)]
        counts = collections.Counter(targets)
        if len(counts) == len(targets):
            return targets
        levels = [level + (counts[target] > 1) for level, target in zip(levels, targets)]


def _target(clip: Path, place: Path, level: int, form: str) -> Path:
    """level: 0 a.restored.mkv, 1 a.avi.restored.mkv, 2 FOLDER/a.avi.restored.mkv, ..."""
    if level > 1:
        place = Path(*Path(os.path.abspath(clip)).parts[1:][-level:])
    return place.with_name(f"{place.name if level else place.stem}{MARK}{_suffix_of(place, form)}")


def _file_target(clip: Path, target: Path, form: str) -> Path:
    if form != "same" and target.suffix.lower() != f".{form}":
        raise ValueError(f"--output {target} and --format {form} don't agree; take one of them")
    return target


def _suffix_of(clip: Path, form: str) -> str:
    own = clip.suffix.lower()
    if form != "same":
        return f".{form}"
    return own if own in WGAP else ".mkv"


def _gaps_of(clip: Path, gaps: Spans | str, table: Mapping[str, Spans]) -> Spans | str:
    found = table.get(os.path.abspath(clip)) or gaps
    if not found:
        raise ValueError(f"--gaps names no gap of {clip}; add a row for it, or take --gap auto for clips that have none")
    return found


def _problem_of(clip: Path, target: Path) -> str:
    """Why a clip can't be repaired into the target, as far as names tell."""
    from avsi_jax.media import clip_io

    try:
        clip_io.check_file(clip)
    except (ValueError, OSError) as error:
        return str(error)
    if clip.suffix.lower() in AUDIO and target.suffix.lower() not in AUDIO:
        return f"{clip}: holds no pictures for a {target.suffix}; expected a target of {' or '.join(AUDIO)}"
    return ""


def _refuse_targets(jobs: Sequence[Job]) -> None:
    """ValueError where a target is a clip that is to be repaired, or a folder, or can't be written."""
    sources = {os.path.realpath(job.source) for job in jobs}
    for job in jobs:
        if os.path.realpath(job.target) in sources:
            raise ValueError(f"{job.target} is a clip to be repaired; expected another --output: no clip is written over itself")
        if job.target.is_dir():
            raise ValueError(f"{job.target}: found a folder, expected a file to write")
        _check_writable(job.target)


def _check_writable(target: Path) -> None:
    """ValueError where the folder, or the one it will be made in, is none or takes no files."""
    folder = next(p for p in target.absolute().parents if p.exists())
    if not folder.is_dir():
        raise ValueError(f"{target}: {folder} is a file, expected a folder; take another --output")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{target}: the folder {folder} can't be written; take another --output")


def _with_those_there(jobs: Sequence[Job], overwrite: bool, resume: bool) -> list[Job]:
    """What is there is done where a run is resumed: targets appear whole or not at all. FileExistsError without either."""
    there = [job for job in jobs if os.path.lexists(job.target)]
    if there and not overwrite and not resume:
        some = f"{there[0].target} exists" + (f", as do {len(there) - 1} more of {len(jobs)}" if len(there) > 1 else "")
        raise FileExistsError(f"{some}; take --overwrite to replace, --resume to leave out what is there, or another --output")
    return [dataclasses.replace(job, there=resume and os.path.lexists(job.target)) for job in jobs]
