"""The video frames of a gap that avsi-app shows are those that the restoration matched with it, whatever the A/V offset."""

import numpy as np
import pytest

from avsi_jax.app import session
from avsi_jax.face import av_sync
from avsi_jax.media import clip_source
from tests.support.fake_network import tone_inpainter
from tests.support.inpainting_fakes import FakeTracker, always_visible, make_clip, voice


@pytest.fixture
def inpainter(monkeypatch):
    inpainter = tone_inpainter(monkeypatch)
    inpainter._tracker, inpainter._mouth_visible = FakeTracker(lambda t: 1.0 * t), always_visible
    return inpainter


@pytest.mark.parametrize(("sync", "lag_s"), [("off", 0.0), ("auto", 0.2), (0.08, 0.08)])
def test_frames_of_a_gap_are_those_matched_with_it(inpainter, monkeypatch, sync, lag_s):
    """Frames show their number, 25 per second; what the video shows at t is matched with the audio at t + lag_s."""
    monkeypatch.setattr(av_sync, "estimate_offset", lambda *_: av_sync.OffsetEstimate(0.2, 0.99))
    clip, gap = make_clip(voice(2.9, 16_000), 16_000, num_video_frames=73), (0.9, 1.7)
    repair = inpainter.inpaint(clip, [gap], sync=sync)
    assert repair.av_offset_s == pytest.approx(0.2 + (sync if isinstance(sync, float) else 0))
    images, landmarks, visible, times = session.strip(clip_source.source_from_clip(clip), repair, gap)
    numbers = np.array([int(image[0, 0, 0]) for image in images])
    wanted = np.linspace(*gap, session.STRIP_FRAMES + 2)[1:-1]
    np.testing.assert_allclose(numbers / 25, wanted - lag_s, atol=0.0201)
    np.testing.assert_allclose(times, numbers / 25 + lag_s, atol=1e-6)
    np.testing.assert_array_equal(landmarks[:, 0, 0], numbers)
    assert visible.all()
