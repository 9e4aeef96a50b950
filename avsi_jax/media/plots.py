"""Plotting shared by reports: the style of each kind of line, spectrograms, and figures as data URIs of PNG images."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE_STYLES = {  # kind -> colour, dashes in line widths, marker
    "masked": ("#6b6b6b", (1, 1.5), "o"), "interpolation": ("#e69f00", (4, 2), "s"), "baseline": ("#56b4e9", (7, 2), "^"),
    "mean": ("#009999", (1, 1), "v"),
    "system": ("#0072b2", (), "o"), "other_video": ("#cc79a7", (3, 1.5, 1, 1.5), "D"), "oracle_mel": ("#009e73", (8, 2, 1, 2), "v"),
}  # fmt: skip


def spectrogram_uri(audio: np.ndarray, rate: int, top_db: float, gaps_s: list[tuple[float, float]], label: str) -> str:
    """Plots the spectrogram of audio (N,) as the data URI of a PNG.

    Colours cover the 80 dB below `top_db`. Every gap (start, end), in seconds, has dashed borders and a bar over it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 2.0))
    axes = figure.add_axes((0.09, 0.18, 0.89, 0.73))  # fixed: a layout engine takes longer than the plot
    axes.set_ylabel("kHz", fontsize=8)
    axes.set_xlabel("s", fontsize=8, labelpad=1)
    extent = (0, len(audio) / rate, 0, rate / 2000)
    options = {"origin": "lower", "aspect": "auto", "cmap": "magma", "vmin": top_db - 80, "vmax": top_db, "extent": extent}
    axes.imshow(spectrogram_db(audio, rate), **options)
    for gap in gaps_s:
        for border in gap:
            axes.axvline(border, color="white", linewidth=1.1, linestyle=(0, (4, 2)))
        axes.axvspan(*gap, ymin=0.955, color="white")
    axes.set_xlim(0, len(audio) / rate)
    axes.tick_params(labelsize=7)
    axes.set_title(label, fontsize=6, color="#59626d", loc="right", pad=2)
    return figure_uri(figure, 120)


def spectrogram_db(audio: np.ndarray, rate: int) -> np.ndarray:
    """Magnitude spectrogram (N,) -> (bins, frames) in dB: 32 ms Hann windows every 8 ms."""
    from scipy import signal

    spectrum = signal.stft(audio, rate, nperseg=rate * 32 // 1000, noverlap=rate * 24 // 1000)[2]
    return 20 * np.log10(np.abs(spectrum) + 1e-8)


def data_uri(data: bytes, media_type: str) -> str:
    """Bytes of a media type, such as image/png, as a data URI."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def figure_uri(figure: Figure, dpi: int) -> str:
    """A matplotlib figure as the data URI of a PNG, reduced to 128 colours, which takes a third of the bytes."""
    from PIL import Image

    rendered, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(rendered, format="png", dpi=dpi)
    Image.open(rendered).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(reduced, format="png", optimize=True)
    return data_uri(reduced.getvalue(), "image/png")
