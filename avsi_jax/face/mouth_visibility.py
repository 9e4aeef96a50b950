"""Detects frames in which the mouth is hidden, for example by a hand, a cup or a microphone.

The face mesh returns plausible lips for a hidden mouth without any sign of it. Therefore each mouth crop is classified on its own:
histograms of oriented gradients (HOG, Dalal & Triggs 2005) and logistic regression, trained on Grid clips with objects painted over
the mouth (benchmarks/quality/mouth_visibility.py, which also evaluates it: docs/landmarks.md).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from avsi_jax.face import landmarks

WEIGHTS = Path(__file__).with_name("mouth_visibility.npz")
CROP_SIZE = 48  # px
CELL, BINS, CLIP = 8, 9, 0.2  # px, directions, limit of a normalised block, as in Dalal & Triggs
SMOOTH = 5  # frames of the median filter over the scores, so that single frames have no effect


class LinearClassifier(NamedTuple):
    """weights (D,) and bias give the log odds that the mouth is visible; it counts as visible above `threshold`."""

    weights: np.ndarray
    bias: float
    threshold: float


@functools.cache
def load_classifier() -> LinearClassifier:
    """The shipped classifier, read once."""
    with np.load(WEIGHTS) as file:
        return LinearClassifier(file["weights"].astype(np.float32), float(file["bias"]), float(file["threshold"]))


def mouth_visible(rgb: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether the mouth is visible, (T,) bool; rgb (T, H, W, 3) uint8, landmarks `points` (T, 68, 2) px."""
    return smooth(scores(rgb, points)) > load_classifier().threshold


def scores(rgb: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Log odds that the mouth is visible, (T,), for each frame on its own."""
    classifier = load_classifier()
    return hog_features(rgb, points) @ classifier.weights + classifier.bias


def smooth(values: np.ndarray) -> np.ndarray:
    """Median filter over SMOOTH values, (T,) -> (T,), with the ends repeated."""
    padded = np.pad(values, SMOOTH // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, SMOOTH), axis=-1)


def hog_features(rgb: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients of the mouth crops, CROP_SIZE pixels wide: (T, 900) float32."""
    crops = landmarks.mouth_crops(rgb, points)
    return histograms(np.stack([cv2.resize(c, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_AREA) for c in crops]))


def histograms(crops: np.ndarray) -> np.ndarray:
    """HOG descriptors of grey crops: (T, n, n) -> (T, D).

    In every cell of CELL pixels, gradient magnitudes are summed over BINS unsigned directions, each divided between the two nearest
    bins. Blocks of 2 x 2 cells are scaled to length 1, clipped at CLIP and scaled again.
    """
    down, along = np.gradient(crops.astype(np.float32), axis=(1, 2))
    length, direction = np.hypot(along, down), np.arctan2(down, along) / np.pi % 1 * BINS - 0.5
    low = np.floor(direction)
    part, low = direction - low, low.astype(int) % BINS
    cells = crops.shape[1] // CELL
    sums = np.zeros((len(crops), cells, cells, BINS), np.float32)
    sum_cells = lambda x: x.reshape(len(crops), cells, CELL, cells, CELL).sum((2, 4))
    for b in range(BINS):
        sums[..., b] = sum_cells(length * ((low == b) * (1 - part) + ((low + 1) % BINS == b) * part))
    blocks = np.concatenate([sums[:, i : cells - 1 + i, j : cells - 1 + j] for i in (0, 1) for j in (0, 1)], -1)
    for limit in (CLIP, np.inf):
        blocks = np.minimum(blocks / np.sqrt((blocks**2).sum(-1, keepdims=True) + 1e-2), limit)
    return blocks.reshape(len(crops), -1).astype(np.float32)
