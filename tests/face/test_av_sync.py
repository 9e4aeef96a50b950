"""avsi_jax.face.av_sync: a drawn mouth and a noise that opens and swells by the same rule, known seconds apart; and real Grid clips."""

import numpy as np
import pytest

from avsi_jax.face import av_sync, landmarks
from avsi_jax.media import clip_io

SECONDS = 8.0


def loudness(t):
    """(n,) 0..1, syllables of uneven length; defined at any time, s."""
    return sum(np.sin(2 * np.pi * f * t + p) for f, p in ((0.7, 0.3), (1.7, 1.1), (2.9, 2.0), (3.7, 4.4), (4.3, 0.2))) / 6 + 0.5


def drawn_mouth(t):
    """(T, 68, 2) px of a level face whose lips and chin are open by loudness(t); 100 px between the eyes."""
    open_px = 30 * loudness(t)
    points = np.zeros((len(t), 68, 2)) + np.array([0.0, 40.0])
    points[:, 36:42], points[:, 42:48] = (-50, 0), (50, 0)
    points[:, 48:68] += np.array([0.0, 50.0])
    for i, x in ((48, -30), (54, 30), (60, -25), (64, 25)):
        points[:, i, 0] = x
    for i in (55, 56, 57, 58, 59, 65, 66, 67, 8):
        points[:, i, 1] += open_px + 5 * (i in (57, 8))
    return points + np.array([300.0, 200.0])


def noise(rate, later_s, seed=0):
    """(N, 2): noise of all bands as loud as the mouth is open `later_s` before."""
    t = np.arange(round(SECONDS * rate)) / rate
    audio = np.random.default_rng(seed).normal(size=len(t)) * 10 ** (2 * loudness(t - later_s) - 3)
    return np.stack([audio, 0.5 * audio], 1).astype(np.float32)


def measured(rate=16_000, fps=25.0, later_s=0.0, missing=(), lag_s=0.0, samples=None):
    times = np.arange(round(SECONDS * fps)) / fps
    samples = noise(rate, later_s) if samples is None else samples
    return av_sync.measure(drawn_mouth(times), np.ones(len(times), bool), times, samples, rate, list(missing), lag_s)


@pytest.mark.parametrize(
    ("rate", "fps", "later_s"), [(16_000, 25.0, 0.0), (8_000, 25.0, 0.213), (44_100, 29.97, -0.3), (48_000, 50.0, 0.1)]
)
def test_a_known_delay_is_measured_at_any_rate(rate, fps, later_s):
    found = measured(rate, fps, later_s)
    assert found.offset_s == pytest.approx(later_s, abs=0.015) and found.certainty > 0.99


def test_the_offset_is_what_the_lag_lacks():
    """Sound 250 ms late, of which 100 are known."""
    assert measured(later_s=0.25, lag_s=0.1).offset_s == pytest.approx(0.15, abs=0.015)


def test_what_lies_in_a_gap_is_not_listened_to():
    missing = [(1.0, 2.2), (5.03, 5.81)]
    other = noise(16_000, 0.12)
    for start, end in missing:
        other[round(start * 16_000) : round(end * 16_000)] = (
            30 * noise(16_000, 0.0, seed=1)[: round(end * 16_000) - round(start * 16_000)]
        )
    assert measured(samples=other, missing=missing) == measured(later_s=0.12, missing=missing)
    assert measured(samples=other, missing=missing).offset_s == pytest.approx(0.12, abs=0.015)


def test_frames_that_were_not_seen_are_left_out():
    times = np.arange(200) / 25
    points, valid = drawn_mouth(times), np.ones(200, bool)
    points[40:70], valid[40:70] = 0.0, False
    found = av_sync.measure(points, valid, times, noise(16_000, 0.12), 16_000, [], 0.0)
    assert found.offset_s == pytest.approx(0.12, abs=0.015) and found.certainty > 0.99


def test_a_turned_or_larger_face_says_the_same():
    times = np.arange(200) / 25
    points = drawn_mouth(times)
    turn = 2.5 * np.array([[np.cos(0.4), np.sin(0.4)], [-np.sin(0.4), np.cos(0.4)]])
    ask = lambda p: av_sync.measure(p, np.ones(200, bool), times, noise(16_000, 0.12), 16_000, [], 0.0)  # noqa: E731
    np.testing.assert_allclose(ask(points @ turn), ask(points), atol=1e-6)


def test_nothing_to_go_by_is_never_sure():
    times, still = np.arange(200) / 25, drawn_mouth(np.zeros(200))
    seen = np.ones(200, bool)
    for points, valid, samples, missing in (
        (still, seen, noise(16_000, 0.0), []),
        (drawn_mouth(times), seen, np.zeros((128_000, 1), np.float32), []),
        (drawn_mouth(times), ~seen, noise(16_000, 0.0), []),
        (drawn_mouth(times), seen, noise(16_000, 0.0), [(0.3, 8.0)]),
        (drawn_mouth(times), seen, noise(16_000, 0.0)[:0], []),
        (drawn_mouth(times + 3.3), seen, noise(16_000, 0.0), []),  # another speech
    ):
        found = av_sync.measure(points, valid, times, samples, 16_000, missing, 0.0)
        assert found.certainty < av_sync.SURE and found.correction_s == 0.0


def test_only_what_is_sure_and_worth_it_is_corrected():
    assert av_sync.Sync(0.2, av_sync.SURE).correction_s == 0.2 and av_sync.Sync(-0.2, 1.0).correction_s == -0.2
    assert av_sync.Sync(0.2, av_sync.SURE - 1e-6).correction_s == 0.0 and av_sync.Sync(0.03, 1.0).correction_s == 0.0


def test_wrong_shapes_are_refused():
    for points, valid, times, samples in (
        (np.zeros((9, 67, 2)), np.ones(9, bool), np.zeros(9), np.zeros((9, 1))),
        (np.zeros((9, 68, 2)), np.ones(8, bool), np.zeros(9), np.zeros((9, 1))),
        (np.zeros((9, 68, 2)), np.ones(9, bool), np.zeros(9), np.zeros(9)),
    ):
        with pytest.raises(ValueError, match="expected"):
            av_sync.measure(points, valid, times, samples, 16_000, [], 0.0)


@pytest.fixture(scope="module")
def speech(grid_dir):
    """Five clips of each of two speakers one after the other: {speaker: (points, valid, sound at 44.1 kHz)}, 15 s, in step."""
    reserved, tracker, found = set((grid_dir / "RESERVED.txt").read_text().split()), landmarks.FaceTracker(), {}
    for speaker in ("s1", "s31"):
        files = [f for f in sorted((grid_dir / speaker).glob("*.mpg")) if f.stem not in reserved][5:10]
        clips = [clip_io.read_clip(f) for f in files]
        tracks = [tracker(clip.video.rgb) for clip in clips]
        waveforms = [
            np.roll(np.pad(c.audio.samples, ((0, 132_300 - len(c.audio.samples)), (0, 0)), "reflect"), -485, 0) for c in clips
        ]
        found[speaker] = [np.concatenate(x) for x in ([t.points for t in tracks], [t.valid for t in tracks], waveforms)]
    return found


@pytest.mark.parametrize(("speaker", "later_s"), [("s1", 0.0), ("s1", -0.16), ("s31", 0.16)])
def test_real_speech_out_of_step(speech, speaker, later_s):
    points, valid, audio = speech[speaker]
    gap = [(4.0, 5.0), (10.2, 10.9)]
    found = av_sync.measure(points, valid, np.arange(375) / 25, np.roll(audio, round(later_s * 44_100), 0), 44_100, gap, 0.0)
    assert found.offset_s == pytest.approx(later_s, abs=av_sync.NEAR_S) and found.certainty > av_sync.SURE


def test_the_audio_of_another_speaker_is_not_sure(speech):
    (points, valid, _), (_, _, audio) = speech["s1"], speech["s31"]
    assert av_sync.measure(points, valid, np.arange(375) / 25, audio, 44_100, [], 0.0).certainty < av_sync.SURE
