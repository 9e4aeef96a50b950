"""Reads and writes uploaded clips in a worker process, so that the server itself never parses a file that it did not write.

Malicious files may hang or crash a decoder, or fill memory and disks. The worker has limits on memory, on CPU and wall time and on
the size of files, and no network access. Everything passes as plain numbers and as .npy files in the session's folder. A Worker is
started for one upload or one restoration and ends with it. Letters: N samples, C channels, T video frames.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avsi_jax.app import isolation
from avsi_jax.media import clip_io, clip_source
from avsi_jax.runtime import process_pool

JOB_S, CPU_S = 60, 120  # wall time of one job; CPU time of a worker
MEMORY_MB = 2048  # beyond what a worker has after its start
FILE_BYTES = 2**30  # of each file that a worker writes, longer decoded audio included
MAX_AUDIO_BYTES = 2**29  # of decoded audio


class Worker:
    """A worker process for one clip; a context manager.

    file: the clip. name: its name in messages. folder: where the files that pass between the processes are written.
    """

    def __init__(self, file: Path, name: str, folder: Path):
        self.file, self.name, self.folder = file, name, folder
        self._jobs: collections.deque[tuple] = collections.deque()
        limits = {"workers": 1, "ahead": 1, "timeout_s": JOB_S, "memory_mb": MEMORY_MB, "start": enter_sandbox}
        self._outcomes = iter(process_pool.run(call, iter(self._jobs.popleft, None), **limits))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        if close := getattr(self._outcomes, "close", None):
            close()

    def run(self, work: Callable, *arguments: Any) -> Any:
        """work(*arguments) of a function of this module, in the worker. Raises its errors; MediaError if it exceeds a limit."""
        self._jobs.append((work, *arguments))
        outcome = next(self._outcomes)
        if outcome.failure:
            raise clip_io.MediaError(
                f"{self.name}: cannot be processed: it {outcome.failure}; check that it plays, or cut it around the gap"
            )
        result, error = outcome.result
        if error is not None:
            raise error
        return result

    def open(self, max_s: float, max_pixels: int) -> WorkerSource:
        """The clip as a Source whose audio is here and whose frames are decoded by the worker. Raises MediaError.

        max_s, max_pixels: longest audio and largest frame that are accepted.
        """
        with self._new_file() as audio_file:
            properties = self.run(read, str(self.file), str(audio_file), max_s, max_pixels)
            return WorkerSource(properties, np.load(audio_file, allow_pickle=False), self)

    def video(self, start_s: float, end_s: float) -> clip_io.Video:
        """As clip_source.Source.video."""
        with self._new_file() as frames_file:
            fps, first_s, times = self.run(read_frames, str(self.file), str(frames_file), start_s, end_s)
            return clip_io.Video(np.load(frames_file, allow_pickle=False), fps, first_s, np.asarray(times, np.float64))

    def write(self, target: Path, samples: np.ndarray) -> tuple[Path, tuple[str, ...]]:
        """Writes the clip with new audio (N, C) as `target`, or as a .wav file beside it if that format cannot hold it.

        Returns (file, warnings). Raises MediaError.
        """
        with self._new_file() as audio_file:
            np.save(audio_file, samples)
            written, warnings = self.run(write, str(self.file), str(audio_file), str(target))
        return Path(written), tuple(warnings)

    @contextlib.contextmanager
    def _new_file(self) -> Iterator[Path]:
        """A new .npy file, deleted afterwards, also where the worker ended while it wrote it."""
        file = self.folder / f"{secrets.token_hex(8)}.npy"
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)


class WorkerSource(clip_source.Source):
    """A clip of which the audio (N, C) is in memory and frames are decoded by a Worker, as long as that runs."""

    def __init__(self, properties: dict[str, Any], samples: np.ndarray, worker: Worker | None):
        """properties: the public attributes of the Source that the worker opened."""
        self.__dict__.update(properties)
        self.samples, self.worker = samples, worker

    def audio(self, start: int, stop: int) -> np.ndarray:
        """As Source.audio."""
        if not 0 <= start <= stop <= len(self.samples):
            raise ValueError(f"{self.path}: found samples {start} to {stop}, expected a range within 0 to {len(self.samples)}")
        return self.samples[start:stop].copy()

    def video(self, start_s: float, end_s: float) -> clip_io.Video:
        """As Source.video."""
        if not self.has_video:
            raise clip_io.MediaError(f"{self.path}: has no video; expected a clip with video")
        return self.worker.video(start_s, end_s)

    def close(self) -> None:
        """Nothing to close."""


# ---- in the worker process -------------------------------------------------------------------------------------------------------


def enter_sandbox() -> None:
    """Limits CPU time and the size of files, and blocks the network, of this process from now on."""
    import resource

    isolation.block_outgoing_connections("")
    for kind, limit in ((resource.RLIMIT_CPU, CPU_S), (resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def call(work: Callable, *arguments: Any) -> tuple[Any, Exception | None]:
    """(result, None) of a job, or (None, error): after an error the worker is still there."""
    try:
        return work(*arguments), None
    except (ValueError, OSError) as error:
        return None, error


@functools.lru_cache(maxsize=1)
def _opened(file: str) -> clip_source.Source:
    return clip_source.open_source(file)


def read(file: str, audio_file: str, max_s: float, max_pixels: int) -> dict[str, Any]:
    """Writes the clip's audio to a .npy file; returns the public attributes of its Source. Raises MediaError."""
    source = _opened(file)
    check_limits(source, max_s, max_pixels)
    np.save(audio_file, source.audio(0, source.num_samples))
    return {name: value for name, value in vars(source).items() if not name.startswith("_")}


def check_limits(source: clip_source.Source, max_s: float, max_pixels: int) -> None:
    """Raises MediaError for a clip without audio, or one that is too long or has too large frames."""
    width, height = source.size
    if not source.num_samples:
        raise clip_io.MediaError(f"{source.path} has no audio; expected a clip with audio that has a gap")
    if source.duration_s > max_s:
        raise clip_io.MediaError(
            f"{source.path} is {source.duration_s:.1f} s long; at most {max_s:g} s are accepted here: cut it around the gap, "
            "or use the command avsi-inpaint, which has no such limit"
        )
    if width * height > max_pixels:
        raise clip_io.MediaError(
            f"{source.path} has video of {width}x{height}; at most {max_pixels} pixels per frame are accepted: scale it down"
        )
    if source.num_samples * source.channels * 8 > MAX_AUDIO_BYTES:
        raise clip_io.MediaError(
            f"{source.path} has {source.num_samples} samples in {source.channels} channels; at most {MAX_AUDIO_BYTES // 8} values "
            "are accepted here: lower its sample rate, or use the command avsi-inpaint, which has no such limit"
        )


def read_frames(file: str, frames_file: str, start_s: float, end_s: float) -> tuple[float, float, list[float]]:
    """Writes frames (T, H, W, 3) to a .npy file; returns (fps, time of the first frame in the container, times)."""
    video = _opened(file).video(start_s, end_s)
    np.save(frames_file, video.rgb)
    return video.fps, video.start_s, video.times.tolist()


def write(file: str, audio_file: str, target: str) -> tuple[str, Sequence[str]]:
    """Writes the clip with new audio as `target`, or as .wav beside it; returns (file, warnings). Raises MediaError."""
    source, samples, path = _opened(file), np.load(audio_file, allow_pickle=False), Path(target)
    try:
        return target, clip_source.write_clip(source, path, [samples])
    except clip_io.MediaError as error:
        if path.suffix.lower() in clip_io.AUDIO_SUFFIXES:
            raise
        reason = str(error).replace(target, path.name)
        path = path.with_suffix(".wav")
        return str(path), (f"written as .wav, audio only: {reason}", *clip_source.write_clip(source, path, [samples]))
