"""Plans the jobs of avsi-inpaint: which clip, which gaps, which output file. No clip is decoded here.

Arguments are clips, folders (searched recursively for clips; hidden files are skipped), @LIST (a file with one name per line) and
- (names on stdin). All errors that can be detected are raised before the first clip is processed. Times are seconds of the clip's
audio.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from avsi_jax.inpainting.gap_text import AUTO, parse_gap
from avsi_jax.runtime import console_streams

RESTORED_MARK = ".restored"  # outputs are named STEM.restored.SUFFIX; such files are skipped when a folder is searched
OUTPUT_SUFFIXES = (".wav", ".flac", ".mkv", ".mp4", ".mov", ".mpg", ".mpeg")
LOSSLESS = (".wav", ".flac", ".mkv", ".mp4", ".mov")  # hold audio without loss
AUDIO = (".wav", ".flac")
FORMATS = ("same", "wav", "flac", "mkv", "mp4", "mov", "mpg")
COLUMNS = ("path", "start_s", "end_s")  # of a table of gaps
IGNORED_FOLDERS = ("__MACOSX",)  # besides hidden ones
EXAMPLE = Path(__file__).parent.parent / "examples" / "person.mpg"  # installed with the package, without a gap
EXAMPLE_GAP = (0.9, 1.5)

Spans = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Job:
    """One clip to restore.

    gaps: [(start_s, end_s)] or 'auto'. problem: why the job cannot be done, if that is known already. exists: the target exists and
    is kept.
    """

    source: Path
    target: Path
    gaps: Spans | str
    problem: str = ""
    exists: bool = False


# ---- gaps --------------------------------------------------------------------------------------------------------------------


def read_table(path: str) -> dict[str, list[tuple[float, float]]]:
    """Reads a table of gaps, with the columns path,start_s,end_s separated by , ; or tabs, as {absolute path: gaps}.

    Relative paths are resolved from the current folder, then from the table's. Raises ValueError that names the wrong line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a table of gaps with the columns {','.join(COLUMNS)}")
    lines = console_streams.text_of(Path(path).read_bytes()).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    separator, header = _separator(lines[0])
    if not set(COLUMNS) <= set(header):
        found, expected = ",".join(header) or "none", ",".join(COLUMNS)
        raise ValueError(f"{path}: found the columns {found}, expected {expected}, separated by commas, semicolons or tabs")
    rows, table = csv.DictReader(lines[1:], header, delimiter=separator, skipinitialspace=True), collections.defaultdict(list)
    try:
        for row in rows:
            name, gap = _table_row({column: row[column] or "" for column in COLUMNS}, os.path.dirname(path))
            table[name].append(gap)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {rows.line_num + 1}: {error}") from None
    if not table:
        raise ValueError(f"{path}: contains no gap, expected one row per gap: {','.join(COLUMNS)}")
    return dict(table)


def _separator(header: str) -> tuple[str, list[str]]:
    """The separator of a table by its first line, and the columns."""
    split = {separator: [name.strip() for name in next(csv.reader([header], delimiter=separator), [])] for separator in ",;\t"}
    separator = max(split, key=lambda s: len(set(COLUMNS) & set(split[s])))
    return separator, split[separator]


def _table_row(row: dict[str, str], folder: str) -> tuple[str, tuple[float, float]]:
    """(absolute path, gap) of a row of a table in a folder. Raises ValueError."""
    if not row["path"]:
        raise ValueError("found no path, expected the name of a clip")
    name = row["path"] if os.path.exists(row["path"]) else os.path.join(folder, row["path"])
    return os.path.abspath(name), parse_gap(f"{row['start_s']}-{row['end_s']}")


# ---- clips -------------------------------------------------------------------------------------------------------------------


def clips_of(names: Sequence[str]) -> tuple[list[tuple[Path, Path]], list[OSError]]:
    """([(clip, its path below the output folder)], each clip once, errors of folders that cannot be read).

    A file that is named explicitly is kept whatever it is: errors in it are reported when it is processed. Raises ValueError for a
    folder without clips or an empty list.
    """
    clips, unreadable = {}, []
    for name in _expanded(names):
        if not name or "\0" in name:
            raise ValueError(f"found {name[:40]!r} among the names, expected files, folders, or a list with one name per line")
        found = _in_folder(Path(name), unreadable) if os.path.isdir(name) else [(Path(name), Path(Path(name).name))]
        for clip, place in found:
            clips.setdefault(os.path.abspath(clip), (clip, place))
    return list(clips.values()), unreadable


def _expanded(names: Sequence[str]) -> Iterator[str]:
    """The names, with @LIST and - replaced by the names they contain."""
    for name in names:
        if name != "-" and not name.startswith("@"):
            yield name
            continue
        if name == "-":
            text = console_streams.stdin_text()
        elif not Path(name[1:]).is_file():
            raise FileNotFoundError(f"{name}: no such file {name[1:]}; expected a list of clips, one per line")
        else:
            text = console_streams.text_of(Path(name[1:]).read_bytes())
        lines = [line.strip("\r") for line in text.split("\n") if line.strip()]
        if not lines:
            raise ValueError(f"{'stdin' if name == '-' else name[1:]}: found no name, expected one per line")
        yield from lines


def _in_folder(folder: Path, unreadable: list[OSError]) -> list[tuple[Path, Path]]:
    """The clips below a folder, sorted by name, with their paths relative to it; without hidden and restored files.

    unreadable: the errors of subfolders that cannot be read are appended to it.
    """
    from avsi_jax.media import clip_io

    clips, num_unreadable = [], len(unreadable)
    for parent, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in IGNORED_FOLDERS)
        for name in sorted(files):
            path = Path(parent, name)
            if not name.startswith(".") and path.suffix.lower() in clip_io.MEDIA_SUFFIXES and not path.stem.endswith(RESTORED_MARK):
                clips.append((path, path.relative_to(folder)))
    if not clips and len(unreadable) == num_unreadable:
        raise ValueError(f"{folder}: found no clip in this folder, expected files with one of {' '.join(clip_io.MEDIA_SUFFIXES)}")
    return clips


# ---- jobs --------------------------------------------------------------------------------------------------------------------


def plan(
    names: Sequence[str], *, output: str | None = None, form: str = "same", gaps: Spans | str = AUTO,
    table: Mapping[str, Spans] | None = None, overwrite: bool = False, resume: bool = False,
) -> list[Job]:  # fmt: skip
    """The jobs, in the order of the names, or of the table if there are no names.

    gaps: of clips that are not in the table; '' if every clip must be in it. Raises ValueError and OSError if something cannot be
    done.
    """
    clips, unreadable = clips_of(names or sorted(table or ()))
    single = len(clips) == 1 and not any(os.path.isdir(name) for name in names)
    if single and _is_file(output):
        targets = [_file_target(clips[0][0], Path(output), form)]
    else:
        folder = _output_folder(output, len(clips))
        targets = [folder / target for target in _targets(clips, form)]
    jobs = [
        Job(clip, target, _gaps_of(clip, gaps, table or {}), _problem_of(clip))
        for (clip, _), target in zip(clips, targets, strict=True)
    ]
    _refuse_targets(jobs)
    return _with_existing(jobs, overwrite, resume) + [_unreadable_job(error) for error in unreadable]


def _unreadable_job(error: OSError) -> Job:
    """A job that fails, for a folder that cannot be read."""
    problem = f"{error.filename}: the folder cannot be read ({error.strerror or error}); its clips are left out"
    return Job(Path(os.fsdecode(error.filename)), Path(), (), problem)


def _is_file(output: str | None) -> bool:
    """Whether --output names a file. Raises ValueError if it has the suffix of a format that cannot be written."""
    from avsi_jax.media import clip_io

    suffix = Path(output or "").suffix.lower()
    if output and not os.path.isdir(output) and suffix in clip_io.MEDIA_SUFFIXES and suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"--output {output}: found suffix {suffix}, expected one of {' '.join(OUTPUT_SUFFIXES)}, or a folder")
    return bool(output) and suffix in OUTPUT_SUFFIXES and not os.path.isdir(output)


def _output_folder(output: str | None, count: int) -> Path:
    if _is_file(output):
        raise ValueError(
            f"--output {output} is one file; expected a folder for {count} clip{'s' * (count > 1)} or for a folder of clips"
        )
    folder = Path(output or ".")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {output}: found a file, expected a folder or a name with one of {' '.join(OUTPUT_SUFFIXES)}")
    return folder


def _targets(clips: Sequence[tuple[Path, Path]], form: str) -> list[Path]:
    """The output of each clip relative to the output folder, all different.

    Clips that would share an output get their full names, with as many parent folders as needed. This applies to all of them, so
    that the order does not matter and a resumed run does not take the output of one clip for that of another.
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
    return place.with_name(f"{place.name if level else place.stem}{RESTORED_MARK}{_suffix_of(place, form)}")


def _file_target(clip: Path, target: Path, form: str) -> Path:
    if form != "same" and target.suffix.lower() != f".{form}":
        raise ValueError(f"--output {target} and --format {form} disagree; use one of them")
    return target


def _suffix_of(clip: Path, form: str) -> str:
    return default_suffix(clip) if form == "same" else f".{form}"


def default_suffix(clip: Path, has_video: bool | None = None) -> str:
    """The suffix of the output unless another format is asked for: one that keeps the samples outside the gaps bit for bit.

    That of the clip where its format is lossless and can hold what the clip holds, else .mkv with video and .wav without.
    has_video: whether the clip has video besides a cover image; None: the header of the file says so.
    """
    from avsi_jax.media import muxing

    own = clip.suffix.lower()
    if own in LOSSLESS and own not in AUDIO:
        return own
    has_video = muxing.has_video(clip) if has_video is None else has_video
    return ".mkv" if has_video else own if own in AUDIO else ".wav"


def _gaps_of(clip: Path, gaps: Spans | str, table: Mapping[str, Spans]) -> Spans | str:
    own = table.get(os.path.abspath(clip)) or gaps
    if not own:
        raise ValueError(f"--gaps has no gap of {clip}; add a row for it, or use --gap auto for clips without one")
    return own


def _problem_of(clip: Path) -> str:
    """Why a clip cannot be restored, as far as that is known without opening it; '' if nothing is known."""
    from avsi_jax.media import clip_io

    try:
        clip_io.check_file(clip)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def _refuse_targets(jobs: Sequence[Job]) -> None:
    """Raises ValueError if a target is one of the input clips or a folder, or cannot be written."""
    sources = {os.path.realpath(job.source) for job in jobs}
    for job in jobs:
        if os.path.realpath(job.target) in sources:
            raise ValueError(f"{job.target} is an input clip; expected another --output: no clip is written over itself")
        if job.target.is_dir():
            raise ValueError(f"{job.target}: found a folder, expected a file to write")
        _check_writable(job.target)


def _check_writable(target: Path) -> None:
    """Raises ValueError or PermissionError if the target's folder, or the one in which it would be created, takes no files."""
    folder = next(p for p in target.absolute().parents if p.exists())
    if not folder.is_dir():
        raise ValueError(f"{target}: {folder} is a file, expected a folder; use another --output")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{target}: the folder {folder} is not writable; use another --output")


def _with_existing(jobs: Sequence[Job], overwrite: bool, resume: bool) -> list[Job]:
    """Marks jobs whose target exists as done if the run is resumed: targets are written atomically, so they are complete.

    Raises FileExistsError if a target exists and neither `overwrite` nor `resume` is set.
    """
    existing = [job for job in jobs if os.path.lexists(job.target)]
    if existing and not overwrite and not resume:
        more = f", and {len(existing) - 1} more of {len(jobs)} outputs" if len(existing) > 1 else ""
        raise FileExistsError(
            f"{existing[0].target} exists{more}; use --overwrite to replace, --resume to skip what exists, or another --output"
        )
    return [dataclasses.replace(job, exists=resume and os.path.lexists(job.target)) for job in jobs]
