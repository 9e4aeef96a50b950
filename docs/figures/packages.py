"""Draws the packages of avsi_jax and what imports what: docs/images/packages.png.

    python -m docs.figures.packages

The arrows are those that tests/test_layers.py allows; an arrow that follows from two others is left out.
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from tests.test_layers import MAY_IMPORT

IMAGE = Path(__file__).resolve().parents[1] / "images" / "packages.png"
PLACES = {  # column, row
    "runtime": (0, 0), "audio": (1, 0), "data": (2, 0), "models": (3, 0), "training": (4, 0), "inference": (5, 0),
    "configs": (3.5, 1.2), "media": (4.9, 1.2), "face": (4, -1.2), "tfds_grid": (1.85, -1.2),
    "inpainting": (6.2, -0.7), "evaluation": (6.2, -1.7), "app": (7.3, -0.7),
}  # fmt: skip


def direct(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """(importer, imported) pairs that do not follow from two others."""
    return [(a, b) for a, needs in arrows.items() for b in sorted(needs) if not any(b in arrows[c] for c in needs)]


def draw() -> Figure:
    """The drawing; KeyError for a package without a place in PLACES."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.axis("off")
    axes.set_xlim(-0.5, 7.8)
    axes.set_ylim(-2.1, 1.6)
    box = {"boxstyle": "round,pad=0.45", "facecolor": "#e8f1f8", "edgecolor": "#0072b2"}
    labels = {p: axes.text(*PLACES[p], p, ha="center", va="center", fontsize=11, bbox=box, zorder=2) for p in MAY_IMPORT}
    for importer, imported in direct(MAY_IMPORT):
        ends = {"posA": PLACES[importer], "posB": PLACES[imported]}
        patches = {"patchA": labels[importer].get_bbox_patch(), "patchB": labels[imported].get_bbox_patch()}
        axes.add_patch(FancyArrowPatch(**ends, **patches, arrowstyle="-|>", mutation_scale=12, color="#8a949e", zorder=1))
    return figure


if __name__ == "__main__":
    draw().savefig(IMAGE, dpi=110)
    print(IMAGE)
