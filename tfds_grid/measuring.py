"""Every clip of a corpus, measured on all cores: each becomes a file in the cache, or the reason why it can't.

Clips come from the network and are decoded by C libraries, so that a clip may hang or crash; it is then skipped like any other that
can't be used (runtime/process_pool.py).
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys

from avsi_jax import presets
from avsi_jax.runtime import process_pool as pool
from tfds_grid import raw_files, speakers

CLIP_TIMEOUT_S = 120  # a clip takes 0.4 s
CLIP_MEMORY_MB = 6144  # address space, beyond what a worker starts with


@dataclasses.dataclass(frozen=True)
class Measured:
    """What became of one clip: the cache file, or the reason why there is none."""

    id: str
    path: pathlib.Path | None
    unusable: str = ""
    invalid_frames: int = 0
    notes: tuple[str, ...] = ()  # "kind: what was found"


def start_worker() -> None:
    """Loads what a clip needs, once; one core a worker: the pool is the parallelism."""
    from avsi_jax.face import landmarks
    from tfds_grid import clips  # noqa: F401

    landmarks.use_one_thread()


def measure_one(clip: speakers.RawClip, cache: pathlib.Path, mouth: bool) -> Measured:
    """Measures a clip into the folder `cache`, in this process."""
    from tfds_grid import clips

    wrong_folder = f"folder: found under {clip.found_under}, belongs to {clip.speaker}" if clip.found_under else ""
    notes = (wrong_folder,) if wrong_folder else ()
    try:
        path = clips.measure_cached(clip, cache, mouth=mouth)
        found = clips.load_measured(path)
        *_, no_words = clips.read_words(clip, len(found["audio"]) / presets.RECORD_RATE)
    except clips.UnusableClipError as e:
        return Measured(clip.id, None, unusable=str(e), notes=notes)
    except raw_files.NoRoomError as e:
        raise OSError(str(e)) from e
    except (OSError, MemoryError):  # of the cache, of the worker's limit
        raise
    except Exception as e:  # one odd clip among thousands must not end a build of hours
        return Measured(clip.id, None, unusable=f"{type(e).__name__}: {clips.one_line(e)}", notes=notes)
    notes = (*map(str, found["notes"]), *notes, *filter(None, (no_words,)))
    return Measured(clip.id, path, "", int((~found["landmarks_valid"]).sum()), notes)


def measure_all(corpus: speakers.RawCorpus, cache: pathlib.Path, *, mouth: bool, workers: int) -> list[Measured]:
    """Every clip of the corpus, in the order of their ids, by `workers` processes that may hang or crash without harm."""
    import tqdm

    jobs = [(clip, cache, mouth) for clip in corpus.clips]
    measured: list[Measured] = [None] * len(jobs)
    outcomes = pool.run(measure_one, jobs, workers=workers, timeout_s=CLIP_TIMEOUT_S, memory_mb=CLIP_MEMORY_MB, start=start_worker)
    for i, found, lost in tqdm.tqdm(outcomes, "measuring", len(jobs), unit="clip", mininterval=1):
        measured[i] = Measured(corpus.clips[i].id, None, unusable=f"decoding it {lost}") if lost else found
    return measured


def check_skipped(measured: list[Measured], allowed: float) -> None:
    """ValueError, the list printed before it, where more clips than allowed can't be used."""
    unusable = [m for m in measured if m.unusable]
    if len(unusable) <= allowed * len(measured):
        return
    for m in unusable:
        print(f"{m.id}: {m.unusable}", file=sys.stderr)
    share = len(unusable) / len(measured)
    raise ValueError(
        f"{len(unusable)} of {len(measured)} clips can't be used ({share:.1%}, listed above), more than --max_skipped={allowed:g}; "
        f"mend them, or allow it: --max_skipped={math.ceil(100 * share) / 100:g}"
    )
