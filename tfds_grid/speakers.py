"""Which clip belongs to whom and to which split, and where its files lie.

A clip is named by its id, the name of its files without suffix, whatever folder or archive they lie in. Layout `grid`: an id is
one of Grid's sentences, and belongs to the speaker who says it in the corpus (grid_ids): folders may be wrong or swapped. Layout
`folder`, own recordings: any name will do, and the speaker is the topmost folder on the way to the clip.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterable, Mapping

from avsi_jax.data import grid_text
from tfds_grid import grid_ids, raw_files
from tfds_grid.raw_files import RawFile

# The split of Morrone et al. 2021 and of the paper's code: speakers that training never meets.
UNSEEN = {"validation": ("s26", "s27", "s29", "s31"), "test": ("s30", "s32", "s33", "s34")}
SPLITS = {
    "speaker_independent": ("train", "validation", "test", "validation_seen", "test_seen"),
    "speaker_dependent": ("train", "validation", "test"),
}
LAYOUTS = ("grid", "folder")
RESERVED_FILE = "RESERVED.txt"  # in the raw folder: ids that are never to be used, one a line

VIDEO_SUFFIXES = (".mpg", ".mpeg", ".mp4", ".avi", ".mov", ".mkv")  # the untouched Grid file first: of two of one id it is taken
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm")
AUDIO_SUFFIXES = (".wav", ".flac")
WORDS_SUFFIXES = (".align", ".txt")  # .txt, a transcript without times, only in layout `folder`

HOW_TO_GET_IT = (
    "expected the Grid corpus (https://doi.org/10.5281/zenodo.3625687: s1.zip ... s34.zip, audio_25k.zip, alignments.zip), zipped "
    "or not, such as s1/bbaf2n.mpg, alignments/s1/bbaf2n.align, audio_25k/s1/bbaf2n.wav, or pictures in s1/bbaf2n/; "
    "own recordings: --layout=folder"
)


@dataclasses.dataclass(frozen=True)
class RawClip:
    """The files of one clip; None where there is none. pictures: its numbered pictures, where it is no video file."""

    id: str
    speaker: str
    video: RawFile | None
    audio: RawFile | None = None
    words: RawFile | None = None
    frames: tuple[RawFile, ...] = ()
    found_under: str = ""  # the speaker that its folder names, where that is another one

    @property
    def is_grid(self) -> bool:
        return grid_text.is_grid_id(self.id)


@dataclasses.dataclass(frozen=True)
class RawCorpus:
    """What a raw folder holds: clips in the order of their ids, and for each video left out its reason."""

    clips: tuple[RawClip, ...]
    left_out: Mapping[str, str]  # place below the raw folder -> reason
    without_video: Mapping[str, int]  # speaker -> clips of which there is sound, but no video
    ignored: Mapping[str, int]  # suffix -> files of a kind that is not read

    @property
    def num_found(self) -> int:
        return len(self.clips) + len(self.left_out)


def is_grid_speaker(name: str) -> bool:
    return re.fullmatch(r"s[1-9]\d?", name) is not None


def split_of(clip_id: str, speaker: str, protocol: str, *, full_train: bool = False, layout: str = "grid") -> str:
    """The split of a clip under `speaker_independent` or `speaker_dependent`.

    The unseen speakers' clips go by speaker, all others by sha256 of the id, 80/10/10. full_train folds the two seen splits
    back into train (speaker_independent only). In layout `grid`, who is no speaker of Grid goes to train alone, so that no number
    rests on him; in layout `folder` nobody is Grid's and all are hashed.
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
    """0 to 9, evenly, by sha256 of the id."""
    return int(hashlib.sha256(clip_id.encode()).hexdigest()[:8], 16) % 10


# ------------------------------------------------------------------------------------------------------------------- search


def find_clips(raw, exclude: Iterable[str] = (), *, cache, layout: str = "grid") -> RawCorpus:
    """The clips below the folder `raw`, without the ids of `exclude` and of RESERVED.txt there.

    Left out too, each with its reason: a second file of an id, and in layout `grid` what is none of Grid's sentences. cache: a
    folder for what must be unpacked. Raises FileNotFoundError where there is no such folder and RawDataError for a hostile or
    damaged archive.
    """
    raw = pathlib.Path(raw).expanduser()
    if not raw.is_dir():
        raise FileNotFoundError(f"--raw={raw}: no such folder; {HOW_TO_GET_IT}")
    if layout not in LAYOUTS:
        raise ValueError(f"--layout={layout}: expected one of {', '.join(LAYOUTS)}")
    files = raw_files.list_files(raw, pathlib.Path(cache))
    banned = set(exclude) | reserved_ids(raw)
    videos, left_out = {}, {}
    for candidate in _candidates(files, layout):
        reason = _why_not(candidate, banned, videos, layout)
        if reason:
            left_out[_place(candidate)] = reason
        else:
            videos[candidate.id] = candidate
    waveforms, words = _by_id(files, AUDIO_SUFFIXES, layout), _by_id(files, WORDS_SUFFIXES[: 1 if layout == "grid" else 2], layout)
    clips = (dataclasses.replace(videos[i], audio=waveforms.get(i), words=words.get(i)) for i in sorted(videos))
    lonely = (_speaker_of(i, f.folders, layout) for i, f in waveforms.items() if i not in videos and i not in banned)
    known = {*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, *AUDIO_SUFFIXES, *WORDS_SUFFIXES}
    ignored = collections.Counter(f.suffix for f in files if f.suffix not in known)
    without_video = in_order(collections.Counter(lonely))
    return RawCorpus(tuple(clips), dict(sorted(left_out.items())), without_video, dict(sorted(ignored.items())))


def why_none(corpus: RawCorpus) -> str:
    """In words, what there is instead of clips."""
    parts = [f"{len(corpus.left_out)} left out, {next(iter(corpus.left_out.values()))}"] if corpus.left_out else []
    if corpus.ignored:
        parts.append(f"{sum(corpus.ignored.values())} files of kinds that are not read: {' '.join(corpus.ignored)}")
    return f" ({'; '.join(parts)})" if parts else ""


def in_order(counts: Mapping[str, int]) -> dict[str, int]:
    """Speakers and their counts, s2 before s10."""
    return dict(sorted(counts.items(), key=lambda item: (len(item[0]), item[0])))


def read_ids(path) -> set[str]:
    """The ids of a file, one a line; # begins a comment."""
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--exclude={path}: no such file; expected clip ids such as bbaf2n, one a line")
    return {line.split("#")[0].strip() for line in path.read_text().splitlines()} - {""}


def reserved_ids(raw: pathlib.Path) -> set[str]:
    path = raw / RESERVED_FILE
    return read_ids(path) if path.is_file() else set()


# -------------------------------------------------------------------------------------------------------------------- parts


def _candidates(files: list[RawFile], layout: str) -> list[RawClip]:
    """Every video and every folder of pictures, the best of each id first: the right folder, then the untouched kind."""
    found = [_clip(f, (), f.folders, _id_of(f, layout), layout) for f in files if f.suffix in VIDEO_SUFFIXES]
    folders = collections.defaultdict(list)
    for f in files:
        if f.suffix in IMAGE_SUFFIXES and f.number is not None:
            folders[f.place.rpartition("/")[0]].append(f)
    for place, images in folders.items():
        named = RawFile(pathlib.Path(), place)  # the folder as if it were a file
        if len(images) > 1 and (layout == "folder" or grid_text.is_grid_id(named.name)):
            ordered = sorted(images, key=lambda f: (f.number, f.place))
            clip_id = named.name if layout == "grid" else place
            found.append(_clip(None, tuple(ordered), named.folders, clip_id, layout))
    return sorted(found, key=lambda c: (bool(c.found_under), c.video is None, _kind(c.video), _place(c)))


def _clip(video, frames, folders, clip_id, layout) -> RawClip:
    speaker = _speaker_of(clip_id, folders, layout)
    named = _speaker_by_folder(folders)
    wrong = layout == "grid" and is_grid_speaker(named) and named != speaker
    return RawClip(clip_id, speaker, video, images=frames, found_under=named if wrong else "")


def _kind(video: RawFile | None) -> int:
    return VIDEO_SUFFIXES.index(video.suffix) if video else 0


def _place(clip: RawClip) -> str:
    return clip.video.place if clip.video else clip.images[0].place.rpartition("/")[0]


def _id_of(file: RawFile, layout: str) -> str:
    """Grid: the name. Own recordings: the whole way to it, since their names need not differ."""
    return file.stem if layout == "grid" else "/".join([*file.folders, file.stem])


def _by_id(files: list[RawFile], suffixes: tuple[str, ...], layout: str) -> dict[str, RawFile]:
    """The best file of each id: in a folder that names the right speaker, else the first."""
    found: dict[str, RawFile] = {}
    for f in sorted((f for f in files if f.suffix in suffixes), key=lambda f: (suffixes.index(f.suffix), f.place)):
        clip_id = _id_of(f, layout)
        known = found.get(clip_id)
        right = lambda file, i=clip_id: _speaker_by_folder(file.folders) == grid_ids.speaker_of(i)
        if known is None or (layout == "grid" and right(f) and not right(known)):
            found[clip_id] = f
    return found


def _speaker_of(clip_id: str, folders: list[str], layout: str) -> str:
    if layout == "folder":
        return folders[0] if folders else "unknown"
    return grid_ids.speaker_of(clip_id) or _speaker_by_folder(folders)


def _speaker_by_folder(folders: list[str]) -> str:
    """The nearest folder above named s1, s2, ... (s3, s3_50kHz), else the nearest of any name."""
    named = (re.fullmatch(r"(s[1-9]\d?)(?:_50kHz)?", f) for f in reversed(folders))
    return next((m[1] for m in named if m), folders[-1] if folders else "unknown")


def _why_not(clip: RawClip, banned: set[str], taken: Mapping[str, RawClip], layout: str) -> str:
    """Why a video is left out; '' where it is not."""
    if {clip.id, clip.id.rpartition("/")[2]} & banned:
        return "reserved id"
    if not (clip.id + clip.speaker).isprintable():
        return f"its name {(clip.speaker, clip.id)!r} is no readable text; rename it"
    if clip.id in taken:
        return f"second file of this id, taken: {_place(taken[clip.id])}"
    if layout == "grid" and not clip.is_grid:
        return "its name is none of Grid's sentences, such as bbaf2n (own recordings: --layout=folder)"
    return ""
