"""A/V offset: a synthetic mouth and noise that follow the same envelope with a known offset; and real Grid clips."""

import numpy as np
import pytest

from avsi_jax.face import av_sync, landmarks
from avsi_jax.media import clip_io

SECONDS = 8.0


def envelope(t):
    """(n,) 0 to 1 at times t in s: syllables of varying length."""
    return sum(np.sin(2 * np.pi * f * t + p) for f, p in ((0.7, 0.3), (1.7, 1.1), (2.9, 2.0), (3.7, 4.4), (4.3, 0.2))) / 6 + 0.5


def synthetic_face(t):
    """(T, 68, 2) px of a level face with eyes 100 px apart whose mouth opens with envelope(t)."""
    open_px = 30 * envelope(t)
    points = np.zeros((len(t), 68, 2)) + np.array([0.0, 40.0])
    points[:, 36:42], points[:, 42:48] = (-50, 0), (50, 0)
    points[:, 48:68] += np.array([0.0, 50.0])
    for i, x in ((48, -30), (54, 30), (60, -25), (64, 25)):
        points[:, i, 0] = x
    for i in (55, 56, 57, 58, 59, 65, 66, 67, 8):
        points[:, i, 1] += open_px + 5 * (i in (57, 8))
    return points + np.array([300.0, 200.0])


def noise(rate, later_s, seed=0):
    """(N, 2) broadband noise whose level follows the mouth opening with a delay of `later_s`."""
    t = np.arange(round(SECONDS * rate)) / rate
    audio = np.random.default_rng(seed).normal(size=len(t)) * 10 ** (2 * envelope(t - later_s) - 3)
    return np.stack([audio, 0.5 * audio], 1).astype(np.float32)


def estimated(rate=16_000, fps=25.0, later_s=0.0, missing=(), lag_s=0.0, samples=None):
    times = np.arange(round(SECONDS * fps)) / fps
    samples = noise(rate, later_s) if samples is None else samples
    return av_sync.estimate_offset(synthetic_face(times), np.ones(len(times), bool), times, samples, rate, list(missing), lag_s)


@pytest.mark.parametrize(
    ("rate", "fps", "later_s"), [(16_000, 25.0, 0.0), (8_000, 25.0, 0.213), (44_100, 29.97, -0.3), (48_000, 50.0, 0.1)]
)
def test_a_known_offset_is_estimated_at_any_rate(rate, fps, later_s):
    estimate = estimated(rate, fps, later_s)
    assert estimate.offset_s == pytest.approx(later_s, abs=0.015) and estimate.certainty > 0.99


def test_the_offset_is_relative_to_the_assumed_lag():
    """Audio 250 ms late, of which 100 ms are already known."""
    assert estimated(later_s=0.25, lag_s=0.1).offset_s == pytest.approx(0.15, abs=0.015)


def test_audio_in_a_gap_is_not_used():
    missing = [(1.0, 2.2), (5.03, 5.81)]
    other = noise(16_000, 0.12)
    for start, end in missing:
        first, last = round(start * 16_000), round(end * 16_000)
        other[first:last] = 30 * noise(16_000, 0.0, seed=1)[: last - first]
    assert estimated(samples=other, missing=missing) == estimated(later_s=0.12, missing=missing)
    assert estimated(samples=other, missing=missing).offset_s == pytest.approx(0.12, abs=0.015)


def test_frames_without_a_face_are_not_used():
    times = np.arange(200) / 25
    points, valid = synthetic_face(times), np.ones(200, bool)
    points[40:70], valid[40:70] = 0.0, False
    estimate = av_sync.estimate_offset(points, valid, times, noise(16_000, 0.12), 16_000, [], 0.0)
    assert estimate.offset_s == pytest.approx(0.12, abs=0.015) and estimate.certainty > 0.99


def test_rotation_and_size_of_the_face_do_not_matter():
    times = np.arange(200) / 25
    points = synthetic_face(times)
    transform = 2.5 * np.array([[np.cos(0.4), np.sin(0.4)], [-np.sin(0.4), np.cos(0.4)]])
    estimate = lambda p: av_sync.estimate_offset(p, np.ones(200, bool), times, noise(16_000, 0.12), 16_000, [], 0.0)  # noqa: E731
    np.testing.assert_allclose(estimate(points @ transform), estimate(points), atol=1e-6)


def test_without_evidence_the_estimate_is_uncertain():
    times, still = np.arange(200) / 25, synthetic_face(np.zeros(200))
    seen = np.ones(200, bool)
    for points, valid, samples, missing in (
        (still, seen, noise(16_000, 0.0), []),
        (synthetic_face(times), seen, np.zeros((128_000, 1), np.float32), []),
        (synthetic_face(times), ~seen, noise(16_000, 0.0), []),
        (synthetic_face(times), seen, noise(16_000, 0.0), [(0.3, 8.0)]),
        (synthetic_face(times), seen, noise(16_000, 0.0)[:0], []),
        (synthetic_face(times + 3.3), seen, noise(16_000, 0.0), []),  # unrelated speech
    ):
        estimate = av_sync.estimate_offset(points, valid, times, samples, 16_000, missing, 0.0)
        assert estimate.certainty < av_sync.MIN_CERTAINTY and estimate.correction_s == 0.0


def test_only_certain_and_large_offsets_are_corrected():
    assert (
        av_sync.OffsetEstimate(0.2, av_sync.MIN_CERTAINTY).correction_s == 0.2
        and av_sync.OffsetEstimate(-0.2, 1.0).correction_s == -0.2
    )
    assert (
        av_sync.OffsetEstimate(0.2, av_sync.MIN_CERTAINTY - 1e-6).correction_s == 0.0
        and av_sync.OffsetEstimate(0.03, 1.0).correction_s == 0.0
    )


def test_wrong_shapes_are_rejected():
    for points, valid, times, samples in (
        (np.zeros((9, 67, 2)), np.ones(9, bool), np.zeros(9), np.zeros((9, 1))),
        (np.zeros((9, 68, 2)), np.ones(8, bool), np.zeros(9), np.zeros((9, 1))),
        (np.zeros((9, 68, 2)), np.ones(9, bool), np.zeros(9), np.zeros(9)),
    ):
        with pytest.raises(ValueError, match="expected"):
            av_sync.estimate_offset(points, valid, times, samples, 16_000, [], 0.0)


@pytest.fixture(scope="module")
def speech(grid_dir):
    """Five concatenated clips of each of two speakers: {speaker: (points, valid, audio at 44.1 kHz)}, 15 s, in sync."""
    reserved, tracker, speech = set((grid_dir / "RESERVED.txt").read_text().split()), landmarks.FaceTracker(), {}
    for speaker in ("s1", "s31"):
        files = [f for f in sorted((grid_dir / speaker).glob("*.mpg")) if f.stem not in reserved][5:10]
        clips = [clip_io.read_clip(f) for f in files]
        tracks = [tracker(clip.video.rgb) for clip in clips]
        audio = [np.roll(np.pad(c.audio.samples, ((0, 132_300 - len(c.audio.samples)), (0, 0)), "reflect"), -485, 0) for c in clips]
        speech[speaker] = [np.concatenate(x) for x in ([t.points for t in tracks], [t.valid for t in tracks], audio)]
    return speech


@pytest.mark.slow
@pytest.mark.parametrize(("speaker", "later_s"), [("s1", 0.0), ("s1", -0.16), ("s31", 0.16)])
def test_the_offset_of_real_speech_is_estimated(speech, speaker, later_s):
    points, valid, audio = speech[speaker]
    gaps, shifted = [(4.0, 5.0), (10.2, 10.9)], np.roll(audio, round(later_s * 44_100), 0)
    estimate = av_sync.estimate_offset(points, valid, np.arange(375) / 25, shifted, 44_100, gaps, 0.0)
    assert estimate.offset_s == pytest.approx(later_s, abs=av_sync.TOLERANCE_S) and estimate.certainty > av_sync.MIN_CERTAINTY


@pytest.mark.slow
def test_the_audio_of_another_speaker_gives_an_uncertain_estimate(speech):
    (points, valid, _), (_, _, audio) = speech["s1"], speech["s31"]
    assert av_sync.estimate_offset(points, valid, np.arange(375) / 25, audio, 44_100, [], 0.0).certainty < av_sync.MIN_CERTAINTY
