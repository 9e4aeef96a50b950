"""Measures every clip of a corpus on all cores: each gives a file in the cache, or the reason why it can't be used.

Clips come from the network and are decoded by C libraries. A clip that hangs or crashes its worker process is skipped like any
other unusable clip (runtime/process_pool.py).
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
CLIP_MEMORY_MB = 6144  # address space, in addition to what a worker starts with


@dataclasses.dataclass(frozen=True)
class Measured:
    """The result of measuring one clip: its cache file, or the reason why there is none."""

    id: str
    path: pathlib.Path | None
    unusable: str = ""
    invalid_frames: int = 0
    notes: tuple[str, ...] = ()  # "kind: description"


def start_worker() -> None:
    """Loads the models once per worker process. Each worker uses one core: the pool is the parallelism."""
    from avsi_jax.face import landmarks
    from tfds_grid import clips  # noqa: F401

    landmarks.use_one_thread()


def measure_one(clip: speakers.RawClip, cache: pathlib.Path, mouth: bool) -> Measured:
    """Measures a clip in this process and writes the result to the folder `cache`."""
    from tfds_grid import clips

    wrong_folder = f"folder: found under {clip.found_under}, belongs to {clip.speaker}" if clip.found_under else ""
    notes = (wrong_folder,) if wrong_folder else ()
    try:
        path = clips.measure_cached(clip, cache, mouth=mouth)
        arrays = clips.load_measured(path)
        *_, words_note = clips.read_words(clip, len(arrays["audio"]) / presets.RECORD_RATE)
    except clips.UnusableClipError as e:
        return Measured(clip.id, None, unusable=str(e), notes=notes)
    except raw_files.DiskFullError as e:
        raise OSError(str(e)) from e
    except (OSError, MemoryError):  # the cache can't be written; the worker's memory limit
        raise
    except Exception as e:  # one broken clip among thousands must not end a build of hours
        return Measured(clip.id, None, unusable=f"{type(e).__name__}: {clips.one_line(e)}", notes=notes)
    notes = (*map(str, arrays["notes"]), *notes, *filter(None, (words_note,)))
    return Measured(clip.id, path, "", int((~arrays["landmarks_valid"]).sum()), notes)


def measure_all(corpus: speakers.RawCorpus, cache: pathlib.Path, *, mouth: bool, workers: int) -> list[Measured]:
    """Measures every clip of the corpus with `workers` processes; results are in the order of the clips' ids."""
    import tqdm

    jobs = [(clip, cache, mouth) for clip in corpus.clips]
    measured: list[Measured] = [None] * len(jobs)
    outcomes = pool.run(measure_one, jobs, workers=workers, timeout_s=CLIP_TIMEOUT_S, memory_mb=CLIP_MEMORY_MB, start=start_worker)
    for i, result, failure in tqdm.tqdm(outcomes, "measuring", len(jobs), unit="clip", mininterval=1):
        measured[i] = Measured(corpus.clips[i].id, None, unusable=f"decoding it {failure}") if failure else result
    return measured


def check_skipped(measured: list[Measured], allowed: float) -> None:
    """Raises ValueError, after printing the list, where a larger share of clips than `allowed` can't be used."""
    unusable = [m for m in measured if m.unusable]
    if len(unusable) <= allowed * len(measured):
        return
    for m in unusable:
        print(f"{m.id}: {m.unusable}", file=sys.stderr)
    share = len(unusable) / len(measured)
    raise ValueError(
        f"{len(unusable)} of {len(measured)} clips can't be used ({share:.1%}, listed above), more than --max_skipped={allowed:g}; "
        f"replace them, or allow it: --max_skipped={math.ceil(100 * share) / 100:g}"
    )
