"""Painted occlusions: their area, place and time are as requested, and depend only on the clip's id."""

import shutil

import numpy as np
import pytest

from avsi_jax.evaluation import occlusion
from avsi_jax.face import landmarks
from avsi_jax.media import clip_io

FIRST, LAST = 30, 40


@pytest.fixture(scope="module")
def video(grid_dir):
    return grid_dir / "s1" / "bbaz5s.mpg"


@pytest.fixture(scope="module")
def rgb(video):
    return clip_io.read_clip(video, audio=False).video.rgb


@pytest.fixture(scope="module")
def points(rgb):
    return landmarks.FaceTracker()(rgb).points


@pytest.mark.parametrize(("family", "share"), list(occlusion.SHARES.items()))
def test_a_hand_covers_the_requested_share_in_the_requested_frames(rgb, points, family, share):
    painted = occlusion.paint(rgb, points, "bbaz5s", family, FIRST, LAST, 0)
    outside = np.r_[0:FIRST, LAST : len(rgb)]
    np.testing.assert_array_equal(painted[outside], rgb[outside])
    changed = (np.abs(painted[FIRST:LAST].astype(int) - rgb[FIRST:LAST]).max(-1) > 8).mean(0)  # share of the frames, by pixel
    mean = occlusion.share_of_mouth(changed, points[FIRST:LAST, landmarks.MOUTH].mean(0))
    assert mean == pytest.approx(share, abs=0.12), "tolerance: pixels that already have the hand's colour do not count"
    if share == 1:
        assert all(occlusion.share_of_mouth(changed > 0, p) > 0.97 for p in points[FIRST:LAST, landmarks.MOUTH])


def test_a_hand_has_the_colour_of_the_face_and_does_not_move(rgb, points):
    painted = occlusion.paint(rgb, points, "bbaz5s", "covered_100", FIRST, LAST, 0)
    x, y = np.rint(points[FIRST:LAST, landmarks.MOUTH].mean((0, 1))).astype(int)
    middle = painted[FIRST:LAST, y - 3 : y + 3, x - 5 : x + 5].astype(float)
    assert np.abs(middle - middle[0]).max() <= 1
    red, green, blue = middle.mean((0, 1, 2))
    assert red > green > blue, "skin"


def test_the_hand_depends_on_the_clip_id(rgb, points):
    one, again, other = (occlusion.paint(rgb, points, c, "covered_50", FIRST, LAST, 0) for c in ("bbaz5s", "bbaz5s", "lwbs9a"))
    np.testing.assert_array_equal(one, again)
    assert (one[FIRST] != other[FIRST]).any()


def test_an_empty_range_of_frames_changes_nothing(rgb, points):
    assert occlusion.cover_mouth(rgb, points, 5, 5, 1.0, np.random.default_rng(0)) is rgb


def test_a_turn_by_zero_degrees_changes_nothing(rgb, points):
    still = occlusion.turn_head(rgb[:2], points[:2], 0.0)
    assert np.abs(still.astype(int) - rgb[:2]).max() <= 1


@pytest.mark.parametrize("degrees", [15, 30, 45])
def test_a_turned_frame_is_narrower_by_the_cosine(points, degrees):
    """Near the middle of the face, where perspective does not matter; the nearer side is taller."""
    dots = np.zeros((1, 288, 360, 3), np.uint8)
    x, y = np.rint(points[:1].mean((0, 1))).astype(int)
    for dx, dy in [(-10, 0), (10, 0), (60, -40), (60, 40), (-60, -40), (-60, 40)]:
        dots[0, y + dy - 1 : y + dy + 2, x + dx - 1 : x + dx + 2] = 255
    seen = occlusion.turn_head(dots, points[:1], degrees)[0, ..., 0] > 60
    row = np.flatnonzero(seen[y - 2 : y + 3].any(0))
    middles = [part.mean() for part in np.split(row, np.flatnonzero(np.diff(row) > 1) + 1)]
    assert np.diff(middles)[0] / 20 == pytest.approx(np.cos(np.deg2rad(degrees)), abs=0.05)
    tall = lambda part: np.ptp(np.flatnonzero(part.any(1)))
    assert tall(seen[:, :x]) > tall(seen[:, x:])


@pytest.mark.parametrize("degrees", [15, 30])
def test_the_tracker_sees_a_turned_head_narrower_too(rgb, points, degrees):
    seen = landmarks.FaceTracker()(occlusion.turn_head(rgb[:5], points[:5], degrees)).points
    span = lambda p: np.linalg.norm(p[:, 36] - p[:, 45], axis=-1).mean()  # outer corners of the eyes
    assert span(seen) / span(points[:5]) == pytest.approx(np.cos(np.deg2rad(degrees)), rel=0.06)
    chin_to_brow = lambda p: np.abs(p[:, 8, 1] - p[:, 27, 1]).mean()
    assert chin_to_brow(seen) / chin_to_brow(points[:5]) == pytest.approx(1, rel=0.06)


def test_tracking_of_painted_frames(video, points):
    changes = [("key", "covered_100", 400, FIRST, LAST), ("other", "turned_deg", 30, 0, 0)]
    tracked = occlusion.track(str(video), points, "bbaz5s", changes)
    assert set(tracked) == {"key", "other"}
    new_points, valid, mouth = tracked["key"]
    np.testing.assert_allclose(new_points[:FIRST], points[:FIRST], atol=0.01)
    assert np.abs(new_points[FIRST + 2 : LAST, landmarks.MOUTH] - points[FIRST + 2 : LAST, landmarks.MOUTH]).mean() > 1
    assert valid.all() and mouth[: FIRST - 1].all() and not mouth[FIRST + 2 : LAST - 2].any()
    assert tracked["other"][2].all()


def test_another_recording_is_refused(video, points):
    with pytest.raises(ValueError, match="found 75 frames, expected 70"):
        occlusion.track(str(video), points[:70], "bbaz5s", [])
    with pytest.raises(ValueError, match=r"30.* px from the dataset's"):
        occlusion.track(str(video), points + 30, "bbaz5s", [("key", "covered_25", 400, FIRST, LAST)])


def test_videos_are_found_by_clip_id_mpg_files_first(video, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        occlusion.find_videos(tmp_path / "nowhere", ["a"])
    for place in ("b/bbaz5s.mp4", "c/s1/bbaz5s.mpg"):
        (tmp_path / place).parent.mkdir(parents=True)
        shutil.copy(video, tmp_path / place)
    assert occlusion.find_videos(tmp_path, ["bbaz5s"]) == {"bbaz5s": tmp_path / "c/s1/bbaz5s.mpg"}
    with pytest.raises(ValueError, match="no video of bbaz6n and 1 more"):
        occlusion.find_videos(tmp_path, ["bbaz5s", "bbaz7a", "bbaz6n"])
