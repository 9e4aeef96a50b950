"""Which clip belongs to whom and to which split, and where its files lie.

A clip is named by its id, the name of its files without suffix, whatever folder they lie in; an id belongs to one speaker. The
speaker is the nearest folder above that is named s1, s2, ... (`s3/bbaf2n.mpg`, `s3/video/mpg_6000/bbaf2n.mpg`), else the folder
the clip lies in (`unknown1`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Mapping

from avsi_jax import text

# The split of Morrone et al. 2021 and of the paper's code: speakers that training never meets.
UNSEEN = {"validation": ("s26", "s27", "s29", "s31"), "test": ("s30", "s32", "s33", "s34")}
SPLITS = {
    "speaker_independent": ("train", "validation", "test", "validation_seen", "test_seen"),
    "speaker_dependent": ("train", "validation", "test"),
}
RESERVED_FILE = "RESERVED.txt"  # in the raw folder: ids that are never to be used, one a line

VIDEO_SUFFIXES = (".mpg", ".mp4", ".avi", ".mov", ".mkv")  # the untouched Grid file first: of two files of one id it is taken
SOUND_SUFFIX = ".wav"
WORDS_SUFFIX = ".align"


@dataclasses.dataclass(frozen=True)
class RawClip:
    """The files of one clip; None where there is none."""

    id: str
    speaker: str
    video: pathlib.Path
    sound: pathlib.Path | None = None
    words: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class RawCorpus:
    """What a raw folder holds: clips in the order of their ids, and for each file left out its reason."""

    clips: tuple[RawClip, ...]
    left_out: Mapping[str, str]  # path below the raw folder -> reason

    @property
    def num_found(self) -> int:
        return len(self.clips) + len(self.left_out)


def is_grid_speaker(name: str) -> bool:
    return re.fullmatch(r"s[1-9]\d?", name) is not None


def split_of(clip_id: str, speaker: str, protocol: str, *, full_train: bool = False) -> str:
    """The split of a clip under `speaker_independent` or `speaker_dependent`.

    The unseen speakers' clips go by speaker, all others by sha256 of the id, 80/10/10. full_train folds the two seen splits
    back into train (speaker_independent only). Who is no speaker of Grid goes to train alone, so that no number rests on him.
    """
    hashed = _tenth(clip_id)
    if protocol == "speaker_dependent":
        return {8: "validation", 9: "test"}.get(hashed, "train")
    for split, names in UNSEEN.items():
        if speaker in names:
            return split
    if full_train or not is_grid_speaker(speaker):
        return "train"
    return {8: "validation_seen", 9: "test_seen"}.get(hashed, "train")


def _tenth(clip_id: str) -> int:
    """0 to 9, evenly, by sha256 of the id."""
    return int(hashlib.sha256(clip_id.encode()).hexdigest()[:8], 16) % 10


def find_clips(raw, exclude: Iterable[str] = ()) -> RawCorpus:
    """The clips below the folder `raw`, without the ids of `exclude` and of RESERVED.txt there.

    Left out too, each with its reason: a second file of an id, and a clip whose id and speaker are both unknown.
    Raises FileNotFoundError where there is no such folder.
    """
    raw = pathlib.Path(raw).expanduser()
    if not raw.is_dir():
        raise FileNotFoundError(f"--raw={raw}: no such folder; expected the unpacked Grid corpus, such as {raw}/s1/bbaf2n.mpg")
    files = _files_by_suffix(raw)
    banned = set(exclude) | reserved_ids(raw)
    sounds, words = ({p.stem: p for p in reversed(files.get(s, []))} for s in (SOUND_SUFFIX, WORDS_SUFFIX))
    clips, left_out = {}, {}
    for path in (p for suffix in VIDEO_SUFFIXES for p in files.get(suffix, [])):
        reason = _why_not(path, banned, clips, raw)
        if reason:
            left_out[str(path.relative_to(raw))] = reason
        else:
            clips[path.stem] = RawClip(path.stem, _speaker_of(path, raw), path, sounds.get(path.stem), words.get(path.stem))
    return RawCorpus(tuple(clips[i] for i in sorted(clips)), dict(sorted(left_out.items())))


def read_ids(path) -> set[str]:
    """The ids of a file, one a line; # begins a comment."""
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--exclude={path}: no such file; expected clip ids such as bbaf2n, one a line")
    return {line.split("#")[0].strip() for line in path.read_text().splitlines()} - {""}


def reserved_ids(raw: pathlib.Path) -> set[str]:
    path = raw / RESERVED_FILE
    return read_ids(path) if path.is_file() else set()


def _files_by_suffix(raw: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """All files below `raw`, hidden folders left out, in an order that does not depend on the file system."""
    files: dict[str, list[pathlib.Path]] = {}
    for folder, folders, names in os.walk(raw):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for path in (pathlib.Path(folder, n) for n in names):
            files.setdefault(path.suffix.lower(), []).append(path)
    return {suffix: sorted(paths) for suffix, paths in files.items()}


def _speaker_of(path: pathlib.Path, raw: pathlib.Path) -> str:
    folders = path.relative_to(raw).parts[:-1]
    return next((f for f in reversed(folders) if is_grid_speaker(f)), folders[-1] if folders else "unknown")


def _why_not(path: pathlib.Path, banned: set[str], taken: Mapping[str, RawClip], raw: pathlib.Path) -> str:
    """Why a video file is left out; '' where it is not."""
    if path.stem in banned:
        return "reserved id"
    if path.stem in taken:
        return f"second file of this id, taken: {taken[path.stem].video.relative_to(raw)}"
    if not text.is_grid_id(path.stem) and not is_grid_speaker(_speaker_of(path, raw)):
        return "neither id nor speaker is known, so it can't be kept apart from the test speakers"
    return ""
