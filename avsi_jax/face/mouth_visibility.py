"""Which pictures show the mouth: behind a hand, a cup or a microphone the face mesh draws plausible lips that nobody saw.

The mesh says nothing of what it made up. So each picture's mouth crop is looked at by itself: its edges (HOG, Dalal & Triggs 2005)
and a line through them (logistic regression), learned from clips of Grid with things painted over the mouth
(benchmarks/quality/mouth_visibility.py, which also measures it: docs/landmarks.md).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from avsi_jax.face import landmarks

WEIGHTS = Path(__file__).with_name("mouth_visibility.npz")
SIDE = 48  # px of the crop that is looked at
CELL, BINS, CUT = 8, 9, 0.2  # px, directions, as Dalal & Triggs
SMOOTH = 5  # pictures: the middle of so many scores counts, so that no single picture is lost or found


class LinearClassifier(NamedTuple):
    """weights (D,) and bias of the logarithm of the odds that the mouth is seen; above `threshold` it counts as seen."""

    weights: np.ndarray
    bias: float
    threshold: float


@functools.cache
def learned() -> LinearClassifier:
    with np.load(WEIGHTS) as file:
        return LinearClassifier(file["weights"].astype(np.float32), float(file["bias"]), float(file["threshold"]))


def mouth_seen(rgb: np.ndarray, points: np.ndarray) -> np.ndarray:
    """rgb (T, H, W, 3) uint8 and its face points (T, 68, 2) px -> (T,) bool: whether the mouth can be seen."""
    return smoothed(scores(rgb, points)) > learned().threshold


def scores(rgb: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(T,) log odds that the mouth is seen, picture by picture."""
    return edges(rgb, points) @ learned().weights + learned().bias


def smoothed(values: np.ndarray) -> np.ndarray:
    """(T,) -> the median of SMOOTH values around each, ends repeated."""
    padded = np.pad(values, SMOOTH // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, SMOOTH), axis=-1)


def edges(rgb: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(T, 900) float32: histograms of oriented gradients of the mouth crops, SIDE pixels wide."""
    crops = landmarks.mouth_crops(rgb, points)
    return histograms(np.stack([cv2.resize(c, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for c in crops]))


def histograms(crops: np.ndarray) -> np.ndarray:
    """(T, n, n) grey -> (T, D): in cells of CELL pixels, the gradients' lengths by BINS directions without a sign, each shared by
    the two nearest; blocks of 2 by 2 cells are scaled to length 1, cut off at CUT and scaled again.
    """
    down, along = np.gradient(crops.astype(np.float32), axis=(1, 2))
    length, turn = np.hypot(along, down), np.arctan2(down, along) / np.pi % 1 * BINS - 0.5
    low = np.floor(turn)
    part, low = turn - low, low.astype(int) % BINS
    cells = crops.shape[1] // CELL
    sums = np.zeros((len(crops), cells, cells, BINS), np.float32)
    in_cells = lambda x: x.reshape(len(crops), cells, CELL, cells, CELL).sum((2, 4))
    for b in range(BINS):
        sums[..., b] = in_cells(length * ((low == b) * (1 - part) + ((low + 1) % BINS == b) * part))
    blocks = np.concatenate([sums[:, i : cells - 1 + i, j : cells - 1 + j] for i in (0, 1) for j in (0, 1)], -1)
    for most in (CUT, np.inf):
        blocks = np.minimum(blocks / np.sqrt((blocks**2).sum(-1, keepdims=True) + 1e-2), most)
    return blocks.reshape(len(crops), -1).astype(np.float32)
