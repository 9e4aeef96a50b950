"""Plots of one clip for an HTML page: its audio with the gaps marked, and the face during a gap. Data URIs of PNG images.

Styled like evaluation/curves.py; wide enough for half a screen, legible on a phone. Times are seconds of the clip's audio.
Letters: N samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avsi_jax.media import clip_io, plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#59626d"  # as in templates/report.css and plots.LINE_STYLES
MAX_RATE = 16_000  # Hz: higher frequencies show little of speech
COLUMNS = 700  # of a waveform
SIZE = (4.6, 2.0)  # inches at DPI: 9-point text stays legible where the image is 340 px wide
DPI = 160
FACE_SIZE = 1.6  # inches
MARGIN = 0.25  # around a face, as a share of its size
MOUTH = (range(48, 60), range(60, 68))  # closed lines of the 68 landmarks: outer and inner border of the lips
EYES = (range(36, 42), range(42, 48))  # closed lines
OPEN_LINES = (range(17), range(17, 22), range(22, 27), range(27, 31), range(31, 36))  # jaw, brows, nose


def audio_uri(samples: np.ndarray, rate: int) -> str:
    """Audio (N,) or (N, C) as the data URI of a 16-bit FLAC file, for a player."""
    with tempfile.TemporaryDirectory(prefix="avsi-") as folder:
        path = Path(folder, "piece.flac")
        clip_io.write_audio(path, samples, rate)
        return plots.data_uri(path.read_bytes(), "audio/flac")


def peak_db(samples: np.ndarray, rate: int) -> float:
    """The upper end of the colour scale for audio (N,); plots to be compared share one."""
    return float(plots.spectrogram_db(*_plotted_audio(samples, rate)).max())


def audio(
    samples: np.ndarray,
    rate: int,
    gaps: Sequence[tuple[float, float]],
    top_db: float,
    *,
    first_s: float = 0.0,
    waveform: bool = False,
) -> str:
    """The spectrogram of audio (N,), 80 dB below top_db, with the waveform above it if `waveform`. gaps: [(start_s, end_s)].

    first_s: the time of the first sample, for a part of a clip.
    """
    from matplotlib.figure import Figure

    x, rate = _plotted_audio(samples, rate)
    last_s = first_s + len(x) / rate
    figure = Figure(figsize=(SIZE[0], SIZE[1] + 0.9 * waveform))
    height = SIZE[1] / figure.get_figheight()
    axes = figure.add_axes((0.085, 0.19 * height, 0.885, 0.76 * height))  # fixed: a layout engine takes longer than the plot
    _draw_spectrogram(axes, plots.spectrogram_db(x, rate), (first_s, last_s, 0, rate / 2000), gaps, top_db)
    if waveform:
        above = figure.add_axes((0.085, height, 0.885, 0.97 - height), sharex=axes)
        _draw_waveform(above, x, first_s, last_s, gaps)
    axes.set_xlim(first_s, last_s)
    return plots.figure_uri(figure, DPI)


def _plotted_audio(samples: np.ndarray, rate: int) -> tuple[np.ndarray, int]:
    """(audio, rate) at most at MAX_RATE; samples that are not finite are plotted as silence."""
    x = np.nan_to_num(np.asarray(samples, np.float32), posinf=0, neginf=0)
    kept = min(rate, MAX_RATE)
    x = clip_io.resample(x, rate, kept)
    return np.pad(x, (0, max(0, kept // 10 - len(x)))), kept  # at least 0.1 s: a few STFT windows


def _draw_spectrogram(axes: Axes, level: np.ndarray, extent: tuple, gaps: Sequence[tuple[float, float]], top_db: float) -> None:
    axes.set_ylabel("kHz", fontsize=9)
    axes.set_xlabel("s", fontsize=9, labelpad=1)
    axes.imshow(level, origin="lower", aspect="auto", cmap="magma", vmin=top_db - 80, vmax=top_db, extent=extent)
    for gap in gaps:
        for border in gap:
            axes.axvline(border, color="white", linewidth=1.1, linestyle=(0, (4, 2)))
        axes.axvspan(*gap, ymin=0.955, color="white")
    axes.tick_params(labelsize=8)


def _draw_waveform(axes: Axes, x: np.ndarray, first_s: float, last_s: float, gaps: Sequence[tuple[float, float]]) -> None:
    edges = np.linspace(0, len(x), min(COLUMNS, len(x)) + 1).astype(int)[:-1]
    at = first_s + edges / len(x) * (last_s - first_s)
    axes.fill_between(at, np.minimum.reduceat(x, edges), np.maximum.reduceat(x, edges), color=BLUE, linewidth=0.4)
    for gap in gaps:
        axes.axvspan(*gap, color=ORANGE, alpha=0.35, linewidth=0)
    peak = max(0.05, np.abs(x).max())
    axes.set_ylim(-1.05 * peak, 1.05 * peak)
    axes.tick_params(labelbottom=False, labelsize=8)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)


# ---- faces -------------------------------------------------------------------------------------------------------------------


def face(image: np.ndarray, landmarks: np.ndarray, visible: bool, square: tuple[int, int, int, int]) -> str:
    """A frame (H, W, 3) uint8 cropped to `square` (x0, y0, x1, y1), with landmarks (68, 2); grey if the mouth is not visible."""
    from matplotlib.figure import Figure

    x0, y0, x1, y1 = square
    figure = Figure(figsize=(FACE_SIZE, FACE_SIZE * (y1 - y0) / (x1 - x0)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(image[y0:y1, x0:x1], extent=(x0, x1, y1, y0), interpolation="bilinear")
    _draw_landmarks(axes, landmarks, BLUE if visible else GREY)
    axes.set_axis_off()
    axes.set_xlim(x0, x1)
    axes.set_ylim(y1, y0)
    return plots.figure_uri(figure, DPI)


def face_square(landmarks: np.ndarray, shape: tuple) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the square around all landmarks (..., 2), within a frame of `shape` (H, W, ...)."""
    low, high = landmarks.reshape(-1, 2).min(0), landmarks.reshape(-1, 2).max(0)
    half = max(8.0, (0.5 + MARGIN) * (high - low).max())
    centre = (low + high) / 2
    limit = np.array([shape[1], shape[0]])
    x0, y0 = np.clip(np.floor(centre - half), 0, limit - 1).astype(int)
    x1, y1 = np.clip(np.ceil(centre + half), [x0 + 1, y0 + 1], limit).astype(int)
    return int(x0), int(y0), int(x1), int(y1)


def _draw_landmarks(axes: Axes, landmarks: np.ndarray, colour: str) -> None:
    for line in (*OPEN_LINES, *EYES, *MOUTH):
        closed = line in (*EYES, *MOUTH)
        at = landmarks[[*line, *([line[0]] if closed else [])]]
        axes.plot(*at.T, color="white", linewidth=2.2 if line in MOUTH else 1.2)
        axes.plot(*at.T, color=colour, linewidth=1.2 if line in MOUTH else 0.6)
    axes.plot(*landmarks.T, linestyle="none", marker=".", markersize=3, color=colour, markeredgewidth=0)
