"""Plots one restoration: landmarks, mouth opening, masked and restored log-mel spectrogram. Writes docs/images/how.png.

python -m docs.figures.how CLIP docs/images/how.png [--gap 0.9-1.7] [--checkpoint pretrained]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from avsi_jax import Inpainter

LINES = [range(0, 17), range(17, 22), range(22, 27), range(27, 31), range(31, 36), [*range(36, 42), 36], [*range(42, 48), 42],
         [*range(48, 60), 48], [*range(60, 68), 60]]  # fmt: skip


def draw_face(axis, points, x: float) -> None:
    """Draws 68 landmarks as lines, 1 unit wide, at x."""
    points = (points - points.mean(0)) / np.ptp(points[:, 0])
    for line in LINES:
        part = points[list(line)]
        axis.plot(part[:, 0] + x, -part[:, 1], color="teal", lw=0.9)


def draw_level(axis, level, frame_s: float, gap, title: str) -> None:
    extent = (0, len(level) * frame_s, 0, level.shape[1])
    axis.imshow(level.T, origin="lower", aspect="auto", extent=extent, vmin=-80, vmax=-10, cmap="magma")
    for at in gap:
        axis.axvline(at, color="white", lw=1, ls="--")
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_ylabel("mel band")


def main(clip: Path, target: Path, gap, checkpoint: str) -> None:
    repair = Inpainter.load(checkpoint).inpaint(clip, [gap])
    times, points = np.asarray(repair.frame_times), repair.landmarks
    eye_distance = np.linalg.norm(points[:, 36:42].mean(1) - points[:, 42:48].mean(1), axis=-1)
    opening = np.linalg.norm(points[:, 62] - points[:, 66], axis=-1) / eye_distance
    figure, axes = plt.subplots(4, 1, figsize=(9, 8.2), layout="constrained", height_ratios=[1.25, 0.8, 1.2, 1.2])
    for x, at in enumerate(np.linspace(*gap, 7)):
        draw_face(axes[0], points[np.abs(times - at).argmin()], 1.3 * x)
    axes[0].set_aspect("equal")
    axes[0].axis("off")
    axes[0].set_title("landmarks of the face during the gap", fontsize=10, loc="left")
    axes[1].plot(times, opening, color="teal")
    axes[1].axvspan(*gap, color="0.85")
    axes[1].set_title("opening of the mouth, relative to the distance of the eyes", fontsize=10, loc="left")
    draw_level(axes[2], repair.masked_log_mel, repair.frame_s, gap, "masked audio (log-mel, dB)")
    draw_level(
        axes[3], repair.restored_log_mel, repair.frame_s, gap, f"restored audio; transcript: {repair.gaps[0].transcript or 'none'}"
    )
    end = len(repair.masked_log_mel) * repair.frame_s
    for axis in axes[1:]:
        axis.set_xlim(0, end)
    axes[3].set_xlabel("s")
    figure.savefig(target, dpi=80)
    Image.open(target).convert("P", palette=Image.Palette.ADAPTIVE).save(target, optimize=True)  # a third of the bytes
    print(target, repair.gaps, repair.seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--gap", default="0.9-1.7")
    parser.add_argument("--checkpoint", default="pretrained")
    args = parser.parse_args()
    main(args.clip, args.target, tuple(map(float, args.gap.split("-"))), args.checkpoint)
