"""Plots masked, restored and original spectrograms of one clip, restored with the shipped weights: docs/images/restoration.png.

python -m docs.figures.restoration [CLIP] [--gap 0.75-1.25] [--target FILE]

The default clip is the example in the package, of an unseen speaker.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

import avsi_jax
from avsi_jax import Inpainter
from avsi_jax.media import clip_io, plots

CLIP = Path(avsi_jax.__file__).parent / "examples" / "person.mpg"
IMAGE = Path(__file__).resolve().parents[1] / "images" / "restoration.png"
RATE = 16_000  # Hz, of the plotted audio
RANGE_DB = 70.0


def main(clip: Path, gap_s: tuple[float, float], target: Path, checkpoint: str) -> None:
    """Restores the gap [start, end) in s and writes the figure."""
    repair = Inpainter.load(checkpoint).inpaint(clip, [gap_s])
    audio = clip_io.read_clip(clip, video=False).audio
    at_rate = lambda samples, rate: clip_io.resample(clip_io.mono(samples), rate, RATE)
    original, restored = at_rate(audio.samples, audio.rate), at_rate(repair.samples, repair.rate)
    start, end = (round(t * RATE) for t in gap_s)
    masked = original.copy()
    masked[start:end] = 0
    panels = {"masked": masked, "restored": restored, "original": original}
    levels = {title: plots.spectrogram_db(samples, RATE) for title, samples in panels.items()}
    top_db = max(level.max() for level in levels.values())
    figure, axes = plt.subplots(1, 3, figsize=(12, 3), sharey=True, layout="constrained")
    for axis, (title, level) in zip(axes, levels.items(), strict=True):
        extent = (0, len(original) / RATE, 0, RATE / 2000)
        image = axis.imshow(level, origin="lower", aspect="auto", extent=extent, vmin=top_db - RANGE_DB, vmax=top_db, cmap="magma")
        for t in gap_s:
            axis.axvline(t, color="white", lw=0.8, ls="--")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("time, s")
    axes[0].set_ylabel("frequency, kHz")
    figure.colorbar(image, ax=axes, label="level, dB", pad=0.01)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    Image.open(target).convert("P", palette=Image.Palette.ADAPTIVE).save(target, optimize=True)  # a third of the bytes
    print(f"{target}: {clip.name}, gap {gap_s[0]}-{gap_s[1]} s, transcript: {repair.gaps[0].transcript or 'none'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip", nargs="?", type=Path, default=CLIP, help="default: the example clip of the package")
    parser.add_argument("--gap", default="0.75-1.25", help="start and end in seconds (default: %(default)s)")
    parser.add_argument("--target", type=Path, default=IMAGE, help="default: docs/images/restoration.png")
    parser.add_argument("--checkpoint", default="pretrained", help="default: %(default)s, the shipped weights")
    args = parser.parse_args()
    main(args.clip, tuple(map(float, args.gap.split("-"))), args.target, args.checkpoint)
