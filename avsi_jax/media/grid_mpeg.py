"""Writes clips in the format of the Grid corpus: MPEG-1 video and MP2 audio in an .mpg file."""

from __future__ import annotations

import fractions
import os
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from avsi_jax.media import clip_io

if TYPE_CHECKING:
    import av

MP2_RATE, MP2_FRAME = 44_100, 1152  # Hz, samples


def write_clip(
    path: os.PathLike | str, frames: np.ndarray, fps: int, samples: np.ndarray, rate: int, *, bit_rate: int = 1_200_000
) -> None:
    """Writes a clip in Grid's format: MPEG-1 video and MP2 audio at 44.1 kHz, mono. The same input gives the same bytes.

    `frames` (T, H * 3 / 2, W) uint8 are planar yuv420p in MPEG's range (16 to 235), `samples` (N,) int16 or float at `rate` Hz.
    Both start together by their presentation times, which do not show the delay of the MP2 encoder. `bit_rate`: of the video.
    Raises MediaError for another suffix, frames of another shape, or a file that cannot be written.
    """
    import av

    file = pathlib.Path(path)
    if file.suffix.lower() != ".mpg":
        raise clip_io.MediaError(f"{file}: found suffix {file.suffix!r}, expected .mpg")
    if frames.ndim != 3 or frames.dtype != np.uint8 or frames.shape[1] % 3 or frames.shape[2] % 2:
        raise clip_io.MediaError(f"{file}: found frames {frames.dtype} {frames.shape}, expected uint8 (T, H * 3 / 2, W) of yuv420p")
    audio = clip_io.from_int16(samples) if samples.dtype == np.int16 else samples
    audio = clip_io.to_int16(clip_io.resample(audio, rate, MP2_RATE))
    try:
        with av.open(str(file), "w", format="mpeg") as container:
            video_stream = container.add_stream("mpeg1video", rate=fps)
            video_stream.width, video_stream.height, video_stream.pix_fmt = frames.shape[2], frames.shape[1] * 2 // 3, "yuv420p"
            video_stream.bit_rate, video_stream.thread_count = bit_rate, 1  # more threads cut the frames into other slices
            audio_stream = container.add_stream("mp2", rate=MP2_RATE, layout="mono")
            audio_stream.bit_rate = 128_000
            for frame in _frames_by_time(frames, fps, audio):
                stream = video_stream if isinstance(frame, av.VideoFrame) else audio_stream
                container.mux(stream.encode(frame))
            for stream in (video_stream, audio_stream):
                container.mux(stream.encode(None))
    except (av.FFmpegError, OSError) as e:
        reason = clip_io.one_line(e)
        raise clip_io.MediaError(f"{file}: cannot be written ({reason}); expected an existing folder with free space") from e


def _frames_by_time(images: np.ndarray, fps: int, audio: np.ndarray) -> list[av.VideoFrame | av.AudioFrame]:
    """Video frames and MP2 frames of int16 audio (N,) in the order of their times, as they are interleaved in the file."""
    import av

    audio = np.pad(audio, (0, -len(audio) % MP2_FRAME))
    frames = [av.VideoFrame.from_ndarray(image, format="yuv420p") for image in images]
    for t, frame in enumerate(frames):
        frame.pts, frame.time_base = t, fractions.Fraction(1, fps)
    for start in range(0, len(audio), MP2_FRAME):
        frame = av.AudioFrame.from_ndarray(audio[None, start : start + MP2_FRAME], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = MP2_RATE, start, fractions.Fraction(1, MP2_RATE)
        frames.append(frame)
    return sorted(frames, key=lambda frame: frame.time)
