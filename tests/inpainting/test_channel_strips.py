"""The pictures that avsi-app shows of a gap are those whose lips the repair went by, whatever was measured of the step."""

import numpy as np
import pytest

from avsi_jax.app import session
from avsi_jax.face import av_sync
from avsi_jax.media import clip_source
from tests.support.fake_network import humming
from tests.support.inpainting_fakes import FakeTracker, all_seen, clip_of, voice


@pytest.fixture
def by_both(monkeypatch):
    inpainter = humming(monkeypatch)
    inpainter._tracker, inpainter._mouth_seen = FakeTracker(lambda t: 1.0 * t), all_seen
    return inpainter


@pytest.mark.parametrize(("step", "late_s"), [("off", 0.0), ("auto", 0.2), (0.08, 0.08)])
def test_frames_of_a_gap_are_those_the_repair_went_by(by_both, monkeypatch, step, late_s):
    """Pictures tell their number, 25 a second; the sound of what is seen at t is taken for that heard at t + late_s."""
    monkeypatch.setattr(av_sync, "measure", lambda *_: av_sync.Sync(0.2, 0.99))
    clip, gap = clip_of(voice(2.9, 16_000), 16_000, num_video_frames=73), (0.9, 1.7)
    repair = by_both.inpaint(clip, [gap], sync=step)
    assert repair.av_offset_s == pytest.approx(0.2 + (step if isinstance(step, float) else 0))
    video, points, seen, times = session.strip(clip_source.source_of(clip), repair, gap)
    numbers = np.array([int(image[0, 0, 0]) for image in video])
    middle = np.linspace(*gap, session.STRIP + 2)[1:-1]
    np.testing.assert_allclose(numbers / 25, middle - late_s, atol=0.0201)
    np.testing.assert_allclose(times, numbers / 25 + late_s, atol=1e-6)
    np.testing.assert_array_equal(points[:, 0, 0], numbers)
    assert seen.all()
