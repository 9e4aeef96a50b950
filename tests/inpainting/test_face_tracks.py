"""FaceTracks: which frames are tracked, in which the mouth is visible, and the video part of a window. No network."""

import threading

import numpy as np
import pytest

from avsi_jax.inpainting import face_tracks
from avsi_jax.media import clip_source
from tests.support.inpainting_fakes import FakeTracker, always_visible, frame_numbers, make_clip, voice


def tracks_of(clip, tracker=None, **options):
    seconds = {"decode": 0.0, "landmarks": 0.0}
    tracker = tracker or FakeTracker(lambda t: 1.0 * t)
    return face_tracks.FaceTracks(clip_source.source_from_clip(clip), tracker, always_visible, threading.Lock(), seconds, **options)


def test_each_frame_is_tracked_once():
    tracked = []

    def tracker(rgb):
        tracked.extend(frame_numbers(rgb).tolist())
        return FakeTracker(lambda t: 1.0 * t)(rgb)

    tracks = tracks_of(make_clip(voice(20, 8_000), 8_000, num_video_frames=500), tracker)
    for interval in ((3.0, 6.0), (5.0, 8.0), (8.5, 9.0), (0.0, 2.0)):
        tracks.track([interval])
    assert len(tracked) == len(set(tracked)) and set(range(75, 200)) | set(range(50)) <= set(tracked) and max(tracked) < 245
    np.testing.assert_array_equal(tracks.between(5.0, 7.0).landmarks[:, 0, 0], np.arange(125, 175))
    assert len(tracks.warnings) == 4 and tracks.warnings[0] == "from 3.0 s on: half a face"


def test_a_face_that_is_not_visible_for_a_while():
    """No face from 2 s to 4 s: the visible share is the part of the interval outside, and a warning names the time."""

    class HiddenFor2Seconds(FakeTracker):
        def __call__(self, rgb):
            from avsi_jax.face import landmarks

            track = super().__call__(rgb)
            hidden = (track.points[:, 0, 0] >= 50) & (track.points[:, 0, 0] < 100)
            if hidden.all():
                raise landmarks.NoFaceError("no face")
            return landmarks.Track(track.points, ~hidden, ())

    tracks = tracks_of(make_clip(voice(8, 8_000), 8_000, num_video_frames=200), HiddenFor2Seconds(lambda t: 1.0 * t))
    tracks.track([(0, 2)])
    tracks.track([(2, 4)])
    tracks.track([(4, 8)])
    assert tracks.visible_share(0.5, 1.5) == 1 and tracks.visible_share(2.5, 3.5) == 0
    assert tracks.visible_share(3.0, 5.0) == pytest.approx(0.5, abs=0.03)
    (warning,) = tracks.warnings
    assert "from 2.0 s on" in warning and "no face" in warning
    assert tracks.visible_share(7.0, 9.0) == pytest.approx(0.5, abs=0.03), "visible after the last frame"


def test_a_window_has_no_valid_frames_beyond_the_video():
    tracks = tracks_of(make_clip(voice(8, 8_000), 8_000, num_video_frames=100))
    tracks.track([(2, 6)])
    row = face_tracks.batch_row(tracks, 2.5, 5.5)
    count = int(row["num_frames"])
    assert not row["landmarks_valid"][count - 1 :].any() and row["landmarks_valid"][: count - 1].all()
    no_video = face_tracks.batch_row(None, 2.5, 5.5)
    assert not no_video["landmarks_valid"].any()
    assert {k: v.shape for k, v in no_video.items()} == {k: v.shape for k, v in row.items()}


def test_uneven_frames_are_interpolated_at_a_constant_rate():
    """The oracle is np.interp of each coordinate."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.uniform(0.01, 0.1, 50))
    times -= times[0]
    points = rng.normal(size=(50, 68, 2)).astype(np.float32)
    frames = face_tracks.TrackedFrames(points, np.ones(50, bool), times)
    even, rate = face_tracks.at_constant_rate(frames, 29.97)
    assert rate == 25 and len(even.times) == int(times[-1] * 25) + 1
    at = np.arange(len(even.times)) / 25
    np.testing.assert_allclose(even.landmarks[:, 7, 1], np.interp(at, times, points[:, 7, 1]), atol=1e-6)
    frames = frames._replace(times=np.arange(50) / 29.97)
    same, rate = face_tracks.at_constant_rate(frames, 29.97)
    assert same is frames and rate == 29.97


def test_nothing_is_valid_between_frames_that_are_far_apart():
    times = np.concatenate([np.arange(20) / 29.97, 2 + np.arange(20) / 31])
    points = np.broadcast_to(times[:, None, None], (40, 68, 2)).astype(np.float32)
    even, rate = face_tracks.at_constant_rate(face_tracks.TrackedFrames(points, np.ones(40, bool), times), 29.97)
    assert rate == 25
    np.testing.assert_array_equal(even.valid, (even.times <= times[19] + 0.06) | (even.times >= 2 - 0.06))
