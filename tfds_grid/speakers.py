"""Finds the clips of a raw folder: their files, their speakers and their splits.

A clip's id is the name of its files without suffix; they may be in any folder or archive. Layout `grid`: an id is one of Grid's
sentences and belongs to its speaker in the corpus (grid_ids), since folders may be wrong or swapped. Layout `folder`, for own
recordings: any name is allowed, and the speaker is the topmost folder of the clip's path.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Mapping

from avsi_jax.data import grid_text
from tfds_grid import grid_ids, raw_files
from tfds_grid.raw_files import RawFile

# The unseen speakers of Morrone et al. 2021 and of the paper's code.
UNSEEN = {"validation": ("s26", "s27", "s29", "s31"), "test": ("s30", "s32", "s33", "s34")}
SPLITS = {
    "speaker_independent": ("train", "validation", "test", "validation_seen", "test_seen"),
    "speaker_dependent": ("train", "validation", "test"),
}
LAYOUTS = ("grid", "folder")
RESERVED_FILE = "RESERVED.txt"  # in the raw folder: ids that are never to be used, one per line

VIDEO_SUFFIXES = (".mpg", ".mpeg", ".mp4", ".avi", ".mov", ".mkv")  # the original Grid format first: it is preferred
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm")
AUDIO_SUFFIXES = (".wav", ".flac")
WORDS_SUFFIXES = (".align", ".txt")  # .txt, a transcript without times, only in layout `folder`

HOW_TO_GET_IT = (
    "expected the Grid corpus (https://doi.org/10.5281/zenodo.3625687: s1.zip ... s34.zip, audio_25k.zip, alignments.zip), zipped "
    "or not, such as s1/bbaf2n.mpg, alignments/s1/bbaf2n.align, audio_25k/s1/bbaf2n.wav, or images in s1/bbaf2n/; "
    "own recordings: --layout=folder"
)


@dataclasses.dataclass(frozen=True)
class RawClip:
    """The files of one clip; None where there is none. frames: its numbered image files, where it has no video file."""

    id: str
    speaker: str
    video: RawFile | None
    audio: RawFile | None = None
    words: RawFile | None = None
    frames: tuple[RawFile, ...] = ()
    found_under: str = ""  # the speaker that its folder is named after, where that is another one

    @property
    def is_grid(self) -> bool:
        """Whether the id is one of Grid's sentences."""
        return grid_text.is_grid_id(self.id)


@dataclasses.dataclass(frozen=True)
class RawCorpus:
    """The content of a raw folder: clips in the order of their ids, and the reason for each video left out."""

    clips: tuple[RawClip, ...]
    left_out: Mapping[str, str]  # place below the raw folder -> reason
    without_video: Mapping[str, int]  # speaker -> number of clips with audio but no video
    ignored: Mapping[str, int]  # suffix -> number of files of a type that is not read

    @property
    def num_found(self) -> int:
        """Number of videos, used or left out."""
        return len(self.clips) + len(self.left_out)


def is_grid_speaker(name: str) -> bool:
    """Whether a name has the form of Grid's speakers, s1 to s99."""
    return re.fullmatch(r"s[1-9]\d?", name) is not None


def split_of(clip_id: str, speaker: str, protocol: str, *, full_train: bool = False, layout: str = "grid") -> str:
    """The split of a clip under `speaker_independent` or `speaker_dependent`.

    Clips of the unseen speakers are assigned by speaker, all others by sha256 of the id, 80/10/10. full_train adds the two seen
    splits to train (speaker_independent only). In layout `grid`, speakers that are not Grid's are only in train, so that they
    enter no evaluation; in layout `folder` no speaker counts as Grid's and all clips are hashed.
    """
    hashed = _tenth(clip_id)
    if protocol == "speaker_dependent":
        return {8: "validation", 9: "test"}.get(hashed, "train")
    for split, names in UNSEEN.items():
        if layout == "grid" and speaker in names:
            return split
    if full_train or (layout == "grid" and not is_grid_speaker(speaker)):
        return "train"
    return {8: "validation_seen", 9: "test_seen"}.get(hashed, "train")


def _tenth(clip_id: str) -> int:
    """0 to 9, uniformly, by sha256 of the id."""
    return int(hashlib.sha256(clip_id.encode()).hexdigest()[:8], 16) % 10


# ------------------------------------------------------------------------------------------------------------------- search


def find_clips(raw: str | os.PathLike, exclude: Iterable[str] = (), *, cache: str | os.PathLike, layout: str = "grid") -> RawCorpus:
    """The clips below the folder `raw`, without the ids in `exclude` and in RESERVED.txt there.

    Also left out, with a reason: a second file of an id, and in layout `grid` names that are not Grid sentences. cache: a folder
    for unpacked archives. Raises FileNotFoundError where there is no such folder and RawDataError for a hostile or damaged archive.
    """
    raw = pathlib.Path(raw).expanduser()
    if not raw.is_dir():
        raise FileNotFoundError(f"--raw={raw}: no such folder; {HOW_TO_GET_IT}")
    if layout not in LAYOUTS:
        raise ValueError(f"--layout={layout}: expected one of {', '.join(LAYOUTS)}")
    files = raw_files.list_files(raw, pathlib.Path(cache))
    excluded = set(exclude) | reserved_ids(raw)
    videos, left_out = {}, {}
    for candidate in _candidates(files, layout):
        reason = _reason_left_out(candidate, excluded, videos, layout)
        if reason:
            left_out[_place(candidate)] = reason
        else:
            videos[candidate.id] = candidate
    audio, words = _by_id(files, AUDIO_SUFFIXES, layout), _by_id(files, WORDS_SUFFIXES[: 1 if layout == "grid" else 2], layout)
    clips = (dataclasses.replace(videos[i], audio=audio.get(i), words=words.get(i)) for i in sorted(videos))
    audio_only = (_speaker_of(i, f.folders, layout) for i, f in audio.items() if i not in videos and i not in excluded)
    known = {*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, *AUDIO_SUFFIXES, *WORDS_SUFFIXES}
    ignored = collections.Counter(f.suffix for f in files if f.suffix not in known)
    without_video = in_order(collections.Counter(audio_only))
    return RawCorpus(tuple(clips), dict(sorted(left_out.items())), without_video, dict(sorted(ignored.items())))


def explain_empty(corpus: RawCorpus) -> str:
    """Why a corpus has no clips, in parentheses for a message; '' where the folder is empty."""
    parts = [f"{len(corpus.left_out)} left out, {next(iter(corpus.left_out.values()))}"] if corpus.left_out else []
    if corpus.ignored:
        parts.append(f"{sum(corpus.ignored.values())} files of types that are not read: {' '.join(corpus.ignored)}")
    return f" ({'; '.join(parts)})" if parts else ""


def in_order(counts: Mapping[str, int]) -> dict[str, int]:
    """Speakers and their counts, with s2 before s10."""
    return dict(sorted(counts.items(), key=lambda item: (len(item[0]), item[0])))


def read_ids(path: str | os.PathLike) -> set[str]:
    """The ids in a file, one per line; # begins a comment. Raises FileNotFoundError where there is no such file."""
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--exclude={path}: no such file; expected clip ids such as bbaf2n, one per line")
    return {line.split("#")[0].strip() for line in path.read_text().splitlines()} - {""}


def reserved_ids(raw: pathlib.Path) -> set[str]:
    """The ids in RESERVED.txt of the raw folder; empty where there is no such file."""
    path = raw / RESERVED_FILE
    return read_ids(path) if path.is_file() else set()


# -------------------------------------------------------------------------------------------------------------------- parts


def _candidates(files: list[RawFile], layout: str) -> list[RawClip]:
    """Every video and every folder of images, the preferred one of each id first: the right folder, then the original format."""
    candidates = [_clip(f, (), f.folders, _id_of(f, layout), layout) for f in files if f.suffix in VIDEO_SUFFIXES]
    folders = collections.defaultdict(list)
    for f in files:
        if f.suffix in IMAGE_SUFFIXES and f.number is not None:
            folders[f.place.rpartition("/")[0]].append(f)
    for place, images in folders.items():
        named = RawFile(pathlib.Path(), place)  # the folder as if it were a file
        if len(images) > 1 and (layout == "folder" or grid_text.is_grid_id(named.name)):
            ordered = sorted(images, key=lambda f: (f.number, f.place))
            clip_id = named.name if layout == "grid" else place
            candidates.append(_clip(None, tuple(ordered), named.folders, clip_id, layout))
    return sorted(candidates, key=lambda c: (bool(c.found_under), c.video is None, _format_rank(c.video), _place(c)))


def _clip(video: RawFile | None, frames: tuple[RawFile, ...], folders: list[str], clip_id: str, layout: str) -> RawClip:
    speaker = _speaker_of(clip_id, folders, layout)
    folder_speaker = _speaker_by_folder(folders)
    wrong_folder = layout == "grid" and is_grid_speaker(folder_speaker) and folder_speaker != speaker
    return RawClip(clip_id, speaker, video, frames=frames, found_under=folder_speaker if wrong_folder else "")


def _format_rank(video: RawFile | None) -> int:
    return VIDEO_SUFFIXES.index(video.suffix) if video else 0


def _place(clip: RawClip) -> str:
    return clip.video.place if clip.video else clip.frames[0].place.rpartition("/")[0]


def _id_of(file: RawFile, layout: str) -> str:
    """Layout `grid`: the name. Layout `folder`: the path without suffix, since names need not be unique."""
    return file.stem if layout == "grid" else "/".join([*file.folders, file.stem])


def _by_id(files: list[RawFile], suffixes: tuple[str, ...], layout: str) -> dict[str, RawFile]:
    """The file to use for each id: one in a folder named after the right speaker, else the first."""
    best: dict[str, RawFile] = {}
    for f in sorted((f for f in files if f.suffix in suffixes), key=lambda f: (suffixes.index(f.suffix), f.place)):
        clip_id = _id_of(f, layout)
        known = best.get(clip_id)
        right = lambda file, i=clip_id: _speaker_by_folder(file.folders) == grid_ids.speaker_of(i)
        if known is None or (layout == "grid" and right(f) and not right(known)):
            best[clip_id] = f
    return best


def _speaker_of(clip_id: str, folders: list[str], layout: str) -> str:
    if layout == "folder":
        return folders[0] if folders else "unknown"
    return grid_ids.speaker_of(clip_id) or _speaker_by_folder(folders)


def _speaker_by_folder(folders: list[str]) -> str:
    """The nearest parent folder named s1, s2, ... (or s3_50kHz), else the nearest parent folder."""
    named = (re.fullmatch(r"(s[1-9]\d?)(?:_50kHz)?", f) for f in reversed(folders))
    return next((m[1] for m in named if m), folders[-1] if folders else "unknown")


def _reason_left_out(clip: RawClip, excluded: set[str], taken: Mapping[str, RawClip], layout: str) -> str:
    """Why a video is left out; '' if it is used."""
    if {clip.id, clip.id.rpartition("/")[2]} & excluded:
        return "reserved id"
    if not (clip.id + clip.speaker).isprintable():
        return f"its name {(clip.speaker, clip.id)!r} is not printable; rename it"
    if clip.id in taken:
        return f"second file of this id, used: {_place(taken[clip.id])}"
    if layout == "grid" and not clip.is_grid:
        return "its name is not one of Grid's sentences, such as bbaf2n (own recordings: --layout=folder)"
    return ""
