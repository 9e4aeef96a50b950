"""Writes clips as Grid's are coded: MPEG-1 video and MP2 sound in an .mpg."""

from __future__ import annotations

import fractions
import pathlib

import numpy as np

from avsi_jax.media import clip_io

MP2_RATE, MP2_FRAME = 44_100, 1152  # Hz, samples


def write_clip(path, frames: np.ndarray, fps: int, samples: np.ndarray, rate: int, *, bit_rate: int = 1_200_000) -> None:
    """Writes a clip as Grid's are coded: MPEG-1 video and MP2 sound at 44.1 kHz, mono. The same input gives the same bytes.

    `pictures` (T, H * 3 / 2, W) uint8 are planar yuv420p of MPEG's own range (16 to 235), `samples` (N,) int16 or float; they
    start together, by the presentation times, which count the MP2 encoder's delay. `bit_rate` is the video's.
    Raises MediaError for another suffix, pictures of another shape, or a file that can't be written.
    """
    import av

    file = pathlib.Path(path)
    if file.suffix.lower() != ".mpg":
        raise clip_io.MediaError(f"{file}: found suffix {file.suffix!r}, expected .mpg")
    if frames.ndim != 3 or frames.dtype != np.uint8 or frames.shape[1] % 3 or frames.shape[2] % 2:
        found = f"{frames.dtype} {frames.shape}"
        raise clip_io.MediaError(f"{file}: found pictures {found}, expected uint8 (T, H * 3 / 2, W) of yuv420p")
    waveform = clip_io.from_int16(samples) if samples.dtype == np.int16 else samples
    waveform = clip_io.to_int16(clip_io.resample(waveform, rate, MP2_RATE))
    try:
        with av.open(str(file), "w", format="mpeg") as container:
            video = container.add_stream("mpeg1video", rate=fps)
            video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1] * 2 // 3, "yuv420p"
            video.bit_rate, video.thread_count = bit_rate, 1  # more threads cut the pictures into other slices
            audio = container.add_stream("mp2", rate=MP2_RATE, layout="mono")
            audio.bit_rate = 128_000
            for frame in _frames_in_time(frames, fps, waveform):
                stream = video if isinstance(frame, av.VideoFrame) else audio
                container.mux(stream.encode(frame))
            for stream in (video, audio):
                container.mux(stream.encode(None))
    except (av.FFmpegError, OSError) as e:
        raise clip_io.MediaError(f"{file}: cannot be written ({clip_io.one_line(e)}); expected an existing folder with room") from e


def _frames_in_time(video: np.ndarray, fps: int, audio: np.ndarray) -> list:
    """Pictures and MP2 frames of int16 sound (N,), earlier ones first, as a reader wants them to lie in the file."""
    import av

    audio = np.pad(audio, (0, -len(audio) % MP2_FRAME))
    frames = [av.VideoFrame.from_ndarray(image, format="yuv420p") for image in video]
    for t, frame in enumerate(frames):
        frame.pts, frame.time_base = t, fractions.Fraction(1, fps)
    for start in range(0, len(audio), MP2_FRAME):
        frame = av.AudioFrame.from_ndarray(audio[None, start : start + MP2_FRAME], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = MP2_RATE, start, fractions.Fraction(1, MP2_RATE)
        frames.append(frame)
    return sorted(frames, key=lambda frame: frame.time)
