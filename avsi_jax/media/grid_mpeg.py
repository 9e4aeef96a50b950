"""Writes clips as Grid's are coded: MPEG-1 video and MP2 sound in an .mpg."""

from __future__ import annotations

import fractions
import pathlib

import numpy as np

from avsi_jax.media import clip_io

MP2_RATE, MP2_FRAME = 44_100, 1152  # Hz, samples


def write_clip(path, pictures: np.ndarray, fps: int, samples: np.ndarray, rate: int, *, bit_rate: int = 1_200_000) -> None:
    """Writes a clip as Grid's are coded: MPEG-1 video and MP2 sound at 44.1 kHz, mono. The same input gives the same bytes.

    `pictures` (T, H * 3 / 2, W) uint8 are planar yuv420p of MPEG's own range (16 to 235), `samples` (N,) int16 or float; they
    start together, by the presentation times, which count the MP2 encoder's delay. `bit_rate` is the video's.
    Raises MediaError for another suffix, pictures of another shape, or a file that can't be written.
    """
    import av

    file = pathlib.Path(path)
    if file.suffix.lower() != ".mpg":
        raise clip_io.MediaError(f"{file}: found suffix {file.suffix!r}, expected .mpg")
    if pictures.ndim != 3 or pictures.dtype != np.uint8 or pictures.shape[1] % 3 or pictures.shape[2] % 2:
        found = f"{pictures.dtype} {pictures.shape}"
        raise clip_io.MediaError(f"{file}: found pictures {found}, expected uint8 (T, H * 3 / 2, W) of yuv420p")
    sound = clip_io.from_int16(samples) if samples.dtype == np.int16 else samples
    sound = clip_io.to_int16(clip_io.resample(sound, rate, MP2_RATE))
    try:
        with av.open(str(file), "w", format="mpeg") as container:
            video = container.add_stream("mpeg1video", rate=fps)
            video.width, video.height, video.pix_fmt = pictures.shape[2], pictures.shape[1] * 2 // 3, "yuv420p"
            video.bit_rate, video.thread_count = bit_rate, 1  # more threads cut the pictures into other slices
            audio = container.add_stream("mp2", rate=MP2_RATE, layout="mono")
            audio.bit_rate = 128_000
            for frame in _frames_in_time(pictures, fps, sound):
                stream = video if isinstance(frame, av.VideoFrame) else audio
                container.mux(stream.encode(frame))
            for stream in (video, audio):
                container.mux(stream.encode(None))
    except (av.FFmpegError, OSError) as e:
        raise clip_io.MediaError(f"{file}: cannot be written ({clip_io.one_line(e)}); expected an existing folder with room") from e


def _frames_in_time(pictures: np.ndarray, fps: int, sound: np.ndarray) -> list:
    """Pictures and MP2 frames of int16 sound (N,), earlier ones first, as a reader wants them to lie in the file."""
    import av

    sound = np.pad(sound, (0, -len(sound) % MP2_FRAME))
    frames = [av.VideoFrame.from_ndarray(picture, format="yuv420p") for picture in pictures]
    for t, frame in enumerate(frames):
        frame.pts, frame.time_base = t, fractions.Fraction(1, fps)
    for start in range(0, len(sound), MP2_FRAME):
        frame = av.AudioFrame.from_ndarray(sound[None, start : start + MP2_FRAME], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = MP2_RATE, start, fractions.Fraction(1, MP2_RATE)
        frames.append(frame)
    return sorted(frames, key=lambda frame: frame.time)
