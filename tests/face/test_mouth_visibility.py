"""Mouth visibility on real clips with objects over the mouth that were not in the training data."""

import numpy as np
import pytest

from avsi_jax.evaluation import occlusion
from avsi_jax.face import landmarks, mouth_visibility
from avsi_jax.media import clip_io

FIRST, LAST = 25, 47


@pytest.fixture(scope="module")
def clip(grid_dir):
    """rgb and its Track."""
    rgb = clip_io.read_clip(grid_dir / "s1" / "bbaz5s.mpg", audio=False).video.rgb
    return rgb, landmarks.FaceTracker()(rgb)


def test_histograms_follow_their_definition():
    """Computed pixel by pixel, cell by cell and block by block as in Dalal & Triggs."""
    crops = np.random.default_rng(0).integers(0, 255, (2, 48, 48)).astype(np.uint8)
    for crop, histogram in zip(crops, mouth_visibility.histograms(crops), strict=True):
        down, along = np.gradient(crop.astype(float))
        cells = np.zeros((6, 6, 9))
        for y in range(48):
            for x in range(48):
                degrees = np.rad2deg(np.arctan2(down[y, x], along[y, x])) % 180
                for b in range(9):
                    apart = abs((degrees - (20 * b + 10) + 90) % 180 - 90)  # distance from the centre of the bin
                    cells[y // 8, x // 8, b] += np.hypot(down[y, x], along[y, x]) * max(0, 1 - apart / 20)
        blocks = []
        for i in range(5):
            for j in range(5):
                v = np.concatenate([cells[i, j], cells[i, j + 1], cells[i + 1, j], cells[i + 1, j + 1]])
                v = np.minimum(v / np.sqrt(v @ v + 0.01), 0.2)
                blocks.append(v / np.sqrt(v @ v + 0.01))
        np.testing.assert_allclose(histogram, np.concatenate(blocks), atol=1e-3)


def test_brightness_and_contrast_hardly_change_the_scores(clip):
    rgb, track = clip
    dim = (rgb[:9] * 0.6 + 20).astype(np.uint8)
    bright, dark = (mouth_visibility.scores(p, track.points[:9]) for p in (rgb[:9], dim))
    assert bright.min() > 3 and np.abs(bright - dark).max() < 0.3


def test_an_uncovered_mouth_is_visible(clip):
    rgb, track = clip
    visible = mouth_visibility.mouth_visible(rgb, track.points)
    assert visible.shape == (75,) and visible.all()


@pytest.mark.parametrize("family", ["covered_100", "plate"])
def test_a_covered_mouth_is_not_visible(clip, family):
    """The face mesh reports a valid face in all frames."""
    rgb, track = clip
    if family == "plate":
        painted = rgb.copy()
        x, y = track.points[FIRST:LAST, landmarks.MOUTH].mean((0, 1)).astype(int)
        painted[FIRST:LAST, y - 25 : y + 25, x - 40 : x + 40] = (90, 120, 160)
    else:
        painted = occlusion.paint(rgb, track.points, "bbaz5s", family, FIRST, LAST, 0)
    painted_track = landmarks.FaceTracker()(painted)
    assert painted_track.valid.all()
    visible = mouth_visibility.mouth_visible(painted, painted_track.points)
    inside = np.zeros(75, bool)
    inside[FIRST:LAST] = True
    edge = np.isin(np.arange(75), [FIRST - 1, FIRST, LAST - 1, LAST])  # the mesh needs a few frames to settle
    np.testing.assert_array_equal(visible[~edge], ~inside[~edge])


def test_single_outliers_are_ignored():
    values = np.ones(20)
    values[[4, 11]] = -50
    assert (mouth_visibility.smooth(values) == 1).all()


def test_the_weights_are_small_and_finite():
    classifier = mouth_visibility.load_classifier()
    assert classifier.weights.shape == (900,) and np.isfinite(classifier.weights).all() and classifier.threshold <= 0
    assert mouth_visibility.WEIGHTS.stat().st_size < 5_000
