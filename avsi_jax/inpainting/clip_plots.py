"""Pictures of one clip for a page: its sound with the gaps in it, and the face during a gap. Data URIs of PNG.

The looks are those of evaluation/curves.py; wide enough for half a screen, legible on a telephone. Times are seconds of the clip's sound.
Letters: N samples, P pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avsi_jax.media import clip_io, plots

OURS, LOST, DIM = "#0072b2", "#e69f00", "#59626d"  # as in pages/report.css and plots.LOOKS
MOST_RATE = 16_000  # Hz that are drawn: what is higher says little of speech
COLUMNS = 700  # of a waveform
SIZE = (4.6, 2.0)  # inches at DPI: 9 points are legible where the picture is 340 px wide
DPI = 160
FACE = 1.6  # inches
MARGIN = 0.25  # around a face, as a share of its size
LIPS = (range(48, 60), range(60, 68))  # closed lines of the 68 points: the lips' outer and inner border
LINES = (range(17), range(17, 22), range(22, 27), range(27, 31), range(31, 36))  # open ones: jaw, brows, nose
EYES = (range(36, 42), range(42, 48))


def loudest_db(samples: np.ndarray, rate: int) -> float:
    """The top of the colours for sound (N,): pictures to be compared share one."""
    return float(plots.decibel(*_drawn(samples, rate)).max())


def audio(samples: np.ndarray, rate: int, gaps: Sequence, top_db: float, *, first_s: float = 0.0, waveform: bool = False) -> str:
    """Sound (N,) as spectrogram, over 80 dB below top_db, its waveform above it if wanted; gaps: [(start_s, end_s)].

    first_s: the time of the first sample, where a piece of a clip is drawn.
    """
    from matplotlib.figure import Figure

    x, rate = _drawn(samples, rate)
    last_s = first_s + len(x) / rate
    figure = Figure(figsize=(SIZE[0], SIZE[1] + 0.9 * waveform))
    height = SIZE[1] / figure.get_figheight()
    axes = figure.add_axes((0.085, 0.19 * height, 0.885, 0.76 * height))  # by hand: a layout engine takes longer than the picture
    _spectrogram(axes, plots.decibel(x, rate), (first_s, last_s, 0, rate / 2000), gaps, top_db)
    if waveform:
        above = figure.add_axes((0.085, height, 0.885, 0.97 - height), sharex=axes)
        _waveform(above, x, first_s, last_s, gaps)
    axes.set_xlim(first_s, last_s)
    return plots.figure_uri(figure, DPI)


def _drawn(samples: np.ndarray, rate: int) -> tuple[np.ndarray, int]:
    """At a rate that is worth drawing; what isn't a number is drawn as silence."""
    x = np.nan_to_num(np.asarray(samples, np.float32), posinf=0, neginf=0)
    kept = min(rate, MOST_RATE)
    x = clip_io.resample(x, rate, kept)
    return np.pad(x, (0, max(0, kept // 10 - len(x)))), kept  # at least 0.1 s: some windows


def _spectrogram(axes, level, extent, gaps, top_db) -> None:
    axes.set_ylabel("kHz", fontsize=9)
    axes.set_xlabel("s", fontsize=9, labelpad=1)
    axes.imshow(level, origin="lower", aspect="auto", cmap="magma", vmin=top_db - 80, vmax=top_db, extent=extent)
    for gap in gaps:
        for border in gap:
            axes.axvline(border, color="white", linewidth=1.1, linestyle=(0, (4, 2)))
        axes.axvspan(*gap, ymin=0.955, color="white")
    axes.tick_params(labelsize=8)


def _waveform(axes, x, first_s, last_s, gaps) -> None:
    edges = np.linspace(0, len(x), min(COLUMNS, len(x)) + 1).astype(int)[:-1]
    at = first_s + edges / len(x) * (last_s - first_s)
    axes.fill_between(at, np.minimum.reduceat(x, edges), np.maximum.reduceat(x, edges), color=OURS, linewidth=0.4)
    for gap in gaps:
        axes.axvspan(*gap, color=LOST, alpha=0.35, linewidth=0)
    most = max(0.05, np.abs(x).max())
    axes.set_ylim(-1.05 * most, 1.05 * most)
    axes.tick_params(labelbottom=False, labelsize=8)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)


# ---- faces -------------------------------------------------------------------------------------------------------------------


def face(image: np.ndarray, points: np.ndarray, seen: bool, square: tuple[int, int, int, int]) -> str:
    """A picture (H, W, 3) uint8 cut to the square, the face's points (68, 2) drawn; grey where it was not seen."""
    from matplotlib.figure import Figure

    x0, y0, x1, y1 = square
    figure = Figure(figsize=(FACE, FACE * (y1 - y0) / (x1 - x0)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(image[y0:y1, x0:x1], extent=(x0, x1, y1, y0), interpolation="bilinear")
    _draw_points(axes, points, OURS if seen else DIM)
    axes.set_axis_off()
    axes.set_xlim(x0, x1)
    axes.set_ylim(y1, y0)
    return plots.figure_uri(figure, DPI)


def face_square(points: np.ndarray, shape: tuple) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the square around all points, within the picture."""
    low, high = points.reshape(-1, 2).min(0), points.reshape(-1, 2).max(0)
    half = max(8.0, (0.5 + MARGIN) * (high - low).max())
    centre = (low + high) / 2
    most = np.array([shape[1], shape[0]])
    x0, y0 = np.clip(np.floor(centre - half), 0, most - 1).astype(int)
    x1, y1 = np.clip(np.ceil(centre + half), [x0 + 1, y0 + 1], most).astype(int)
    return int(x0), int(y0), int(x1), int(y1)


def _draw_points(axes, points, colour) -> None:
    for line in (*LINES, *EYES, *LIPS):
        closed = line in (*EYES, *LIPS)
        at = points[[*line, *([line[0]] if closed else [])]]
        axes.plot(*at.T, color="white", linewidth=2.2 if line in LIPS else 1.2)
        axes.plot(*at.T, color=colour, linewidth=1.2 if line in LIPS else 0.6)
    axes.plot(*points.T, linestyle="none", marker=".", markersize=3, color=colour, markeredgewidth=0)
