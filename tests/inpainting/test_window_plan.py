"""Windows around gaps, the sound that is heard through them, what pictures show in them, and how sure a repair is of itself.

No network: what is looked at here is numpy's.
"""

import threading

import numpy as np
import pytest

from avsi_jax.inpainting import confidence, face_tracks, masked_audio, window_plan
from avsi_jax.media import clip_io, clip_source
from tests.support.inpainting_fakes import FakeTracker, all_seen, clip_of, missing, voice

SIZE, HOP = 48_000, 160


# ----------------------------------------------------------------------------------------------------------------------- plans


def planned(gap, length, size=SIZE, hop=HOP):
    (found,) = window_plan.plan(np.array([gap]), size, length, hop)
    return found


def test_a_gap_lies_in_the_middle_of_its_window():
    assert planned((60_000, 70_000), 160_000).steps == (window_plan.Step(41_000, 60_000, 70_000),)
    assert planned((0, 5_000), 160_000).steps[0].first == 0
    assert planned((150_000, 160_000), 160_000).steps[0].first == 160_000 - SIZE
    assert planned((0, 30_000), 30_000).steps == (window_plan.Step(0, 0, 30_000),)


def test_gaps_close_together_share_a_window():
    """By hand: spans of up to 28,800 samples."""
    gaps = np.array([[1_000, 2_000], [20_000, 28_000], [28_500, 29_000], [30_000, 31_000], [90_000, 95_000]])
    assert [list(p.gaps) for p in window_plan.plan(gaps, SIZE, 160_000, HOP)] == [[0, 1, 2], [3], [4]]
    assert [list(p.gaps) for p in window_plan.plan(gaps[:4], SIZE, 40_000, HOP)] == [[0, 1, 2, 3]]


def test_every_gap_is_filled_by_windows_that_meet():
    """Five hundred random gaps: all of a gap is filled, a window fills what lies in it, hears something known wherever there is
    something, and the next one lies whole frames away and predicts 0.4 s again."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        size, hop = rng.choice([47_648, 48_000]), rng.choice([160, 192, 320])
        length = int(rng.integers(1, 500_000))
        start = int(rng.integers(0, length))
        end = int(rng.integers(start + 1, length + 1))
        steps = planned((start, end), length, size, hop).steps
        filled = np.zeros(length, int)
        for step in steps:
            assert step.first <= step.start < step.end <= step.first + size
            assert -hop < step.first <= max(0, length - size) + hop
            filled[step.start : step.end] += 1
        assert filled[start:end].all() and filled.sum() >= end - start and not filled[:start].any() and not filled[end:].any()
        for a, b in zip(steps, steps[1:]):
            assert (b.first - a.first) % hop == 0
            assert min(a.end, b.end) - max(a.start, b.start) >= window_plan.OVERLAP
            known = b.start - b.first if b.first > a.first else b.first + size - b.end
            assert known >= 0.2 * size - 1, "too little of what was filled in before is heard"


def test_a_long_gap_is_filled_from_the_side_that_is_known():
    forwards, backwards = planned((16_000, 100_000), 160_000), planned((0, 100_000), 160_000)
    assert not forwards.backwards and forwards.steps[0].start == 16_000
    assert backwards.backwards and backwards.steps[0].end == 100_000 and backwards.steps[-1].start == 0
    assert not planned((0, 160_000), 160_000).backwards


@pytest.mark.parametrize(
    ("interval", "held", "left"),
    [
        ((0, 9), [], [(0, 9)]),
        ((0, 9), [(2, 3), (5, 12)], [(0, 2), (3, 5)]),
        ((3, 5), [(1, 4), (4, 6)], []),
        ((0, 1), [(1, 2)], [(0, 1)]),
    ],
)
def test_what_of_an_interval_is_left(interval, held, left):
    assert window_plan.without(interval, held) == left


def test_intervals_that_overlap_are_one():
    assert window_plan.merged([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]


# ------------------------------------------------------------------------------------------------------------------------ sound


def a_damaged(samples, rate, spans):
    return masked_audio.MaskedAudio(clip_source.source_of(clip_of(samples, rate)), spans)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 44_101, 48_000])
def test_a_stretch_is_the_audio_that_the_whole_clip_gives(rate):
    """clip_io.resample of the whole clip."""
    samples = voice(6, rate, channels=2)
    whole = clip_io.resample(clip_io.mono(samples), rate, 16_000)
    found = a_damaged(samples, rate, [])
    for first in (0, 1_601, 40_003):
        np.testing.assert_allclose(found.record(first, 24_000), whole[first : first + 24_000], atol=2e-4)
    end = found.record(found.length - 100, 400)
    np.testing.assert_allclose(end[:100], whole[found.length - 100 : found.length], atol=2e-4)
    assert not end[110:].any() and not found.record(-50, 50).any()


def test_what_gaps_hold_is_not_heard():
    samples = voice(6, 44_100)
    gap = missing([(1, 2), (3, 3.5)], len(samples), 44_100)
    samples[gap] = np.nan
    found = a_damaged(samples, 44_100, [(44_100, 88_200), (132_300, 154_350)])
    silent = a_damaged(np.where(gap[:, None], 0, samples), 44_100, [])
    np.testing.assert_array_equal(found.record(0, 90_000), silent.record(0, 90_000))
    np.testing.assert_array_equal(found.missing, [[15_968, 32_032], [47_968, 56_032]])


def test_audio_that_is_not_finite_is_told_where():
    samples = voice(2, 16_000)
    samples[16_000] = np.inf
    with pytest.raises(clip_io.MediaError, match=r"NaN or infinite samples, the first at 1\.000 s"):
        a_damaged(samples, 16_000, [(0, 100)]).record(0, 32_000)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_a_true_fill_gives_the_clip_back(rate, monkeypatch):
    """Up to what a rate of 16 kHz holds, however the gap is cut into pieces."""
    samples = clip_io.resample(clip_io.resample(voice(5, rate), rate, 16_000), 16_000, rate)[: 5 * rate]
    samples = np.concatenate([samples, samples / 2], 1)
    span = (round(1.2 * rate), round(3.9 * rate))
    found = a_damaged(samples, rate, [span])
    fill = masked_audio.InpaintedSpan(*(int(x) for x in found.missing[0]))
    fill.put(fill.start, a_damaged(samples, rate, []).record(fill.start, len(fill.samples)))
    whole = np.concatenate(list(found.pieces(0, fill)))
    np.testing.assert_allclose(whole, samples[slice(*span)], atol=0.01 * np.abs(samples).max())
    monkeypatch.setattr(masked_audio, "PIECE_S", 1)
    pieces = list(found.pieces(0, fill))
    assert len(pieces) == 3
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=2e-4)


def test_a_fill_joins_the_samples_beside_it():
    """A fill of another voice begins where the recording ends: the step there is none that either voice has not."""
    samples, other = voice(5, 44_100), voice(5, 44_100, seed=3)
    found = a_damaged(samples, 44_100, [(44_100, 88_200)])
    fill = masked_audio.InpaintedSpan(*(int(x) for x in found.missing[0]))
    fill.put(fill.start, a_damaged(other, 44_100, []).record(fill.start, len(fill.samples)))
    made = np.concatenate(list(found.pieces(0, fill)))
    steps = np.abs(np.diff(np.concatenate([samples, other]), axis=0)).max()
    assert abs(made[0] - samples[44_099]) <= steps and abs(made[-1] - samples[88_200]) <= steps


# --------------------------------------------------------------------------------------------------------------------- pictures


def a_watcher(clip, tracker=None, **options):
    seconds = {"decode": 0.0, "landmarks": 0.0}
    tracker = tracker or FakeTracker(lambda t: 1.0 * t)
    return face_tracks.FaceTracks(clip_source.source_of(clip), tracker, all_seen, threading.Lock(), seconds, **options)


def test_each_frame_is_looked_at_once():
    watched = []

    def tracker(rgb):
        watched.extend((rgb[:, 0, 0].astype(int) @ [1, 256, 0]).tolist())
        return FakeTracker(lambda t: 1.0 * t)(rgb)

    tracks = a_watcher(clip_of(voice(20, 8_000), 8_000, num_video_frames=500), tracker)
    for stretch in ((3.0, 6.0), (5.0, 8.0), (8.5, 9.0), (0.0, 2.0)):
        tracks.look([stretch])
    assert len(watched) == len(set(watched)) and set(range(75, 200)) | set(range(50)) <= set(watched) and max(watched) < 245
    np.testing.assert_array_equal(tracks.seen(5.0, 7.0).points[:, 0, 0], np.arange(125, 175))
    assert len(tracks.warnings) == 4 and tracks.warnings[0] == "from 3.0 s on: half a face"


def test_a_face_that_is_lost_for_a_while():
    """No face from 2 s to 4 s: half of what is asked about is seen, and a warning says where it was not."""

    class Leaves(FakeTracker):
        def __call__(self, rgb):
            from avsi_jax.face import landmarks

            track = super().__call__(rgb)
            gone = (track.points[:, 0, 0] >= 50) & (track.points[:, 0, 0] < 100)
            if gone.all():
                raise landmarks.NoFaceError("no face")
            return landmarks.Track(track.points, ~gone, ())

    tracks = a_watcher(clip_of(voice(8, 8_000), 8_000, num_video_frames=200), Leaves(lambda t: 1.0 * t))
    tracks.look([(0, 2)])
    tracks.look([(2, 4)])
    tracks.look([(4, 8)])
    assert tracks.share_seen(0.5, 1.5) == 1 and tracks.share_seen(2.5, 3.5) == 0
    assert tracks.share_seen(3.0, 5.0) == pytest.approx(0.5, abs=0.03)
    assert tracks.warnings == ("from 2.0 s on: no face in the pictures: repaired by the sound alone",)
    assert tracks.share_seen(7.0, 9.0) == pytest.approx(0.5, abs=0.03), "nothing is seen behind the last picture"


def test_a_window_beyond_the_frames_sees_nothing_there():
    tracks = a_watcher(clip_of(voice(8, 8_000), 8_000, num_video_frames=100))
    tracks.look([(2, 6)])
    row = face_tracks.window(tracks, 2.5, 5.5)
    count = int(row["num_frames"])
    assert not row["landmarks_valid"][count - 1 :].any() and row["landmarks_valid"][: count - 1].all()
    nothing = face_tracks.window(None, 2.5, 5.5)
    assert not nothing["landmarks_valid"].any() and {k: v.shape for k, v in nothing.items()} == {k: v.shape for k, v in row.items()}


def test_frames_too_far_apart_show_nothing_between():
    times = np.concatenate([np.arange(20) / 29.97, 2 + np.arange(20) / 31])
    points = np.broadcast_to(times[:, None, None], (40, 68, 2)).astype(np.float32)
    even, rate = face_tracks.at_even_rate(face_tracks.TrackedFrames(points, np.ones(40, bool), times), 29.97)
    assert rate == 25
    np.testing.assert_array_equal(even.valid, (even.times <= times[19] + 0.06) | (even.times >= 2 - 0.06))


# ------------------------------------------------------------------------------------------------------------------- confidence

MEASURED = {
    "sound and lips": {"300": {"stoi_gap": 0.8}, "1500": {"stoi_gap": 0.6}},
    "sound": {"300": {"stoi_gap": 0.7, "gap_l1_db": 5.0}, "1500": {"stoi_gap": 0.3}},
    "lips": {"1500": {"stoi_gap": 0.5}},
}


@pytest.mark.parametrize(
    ("length_s", "heard", "seen", "expected"),
    [
        (0.3, True, 1.0, 0.8),
        (0.9, True, 1.0, 0.7),
        (0.1, True, 0.0, 0.7),
        (0.9, True, 0.5, 0.6),
        (1.5, False, 1.0, 0.5),
        (1.5, False, 0.5, 0.25),
        (3.0, True, 0.0, 0.15),
        (0.9, False, 0.0, 0.0),
    ],
)
def test_confidence_is_what_was_measured(length_s, heard, seen, expected):
    """By hand: interpolated over length, mixed by what is seen, halved 1.5 s behind the longest measured."""
    assert confidence.confidence(length_s, heard, seen, MEASURED) == pytest.approx(expected)


def test_confidence_without_measurements_falls_with_length():
    found = [confidence.confidence(s, True, 0.0, {}) for s in (0.01, 0.5, 1.0, 2.0, 60.0)]
    assert found == sorted(found, reverse=True) and 0 < found[-1] < 0.1 and found[2] == 0.5 and found[0] < 1
    assert confidence.confidence(1.0, False, 0.0, {}) == 0
    assert (confidence.longest_s(MEASURED, "sound"), confidence.longest_s({}, "sound")) == (1.5, None)
    assert confidence.at_longest(MEASURED, "sound") == 0.3


# ------------------------------------------------------------------------------------------------------------------- loudness


def spoken(level_db, seconds=3.0):
    """Bursts of noise at level_db, 40 dB above the rests between them."""
    noise = np.random.default_rng(0).normal(0, 1, round(seconds * 16_000))
    burst = np.sin(2 * np.pi * 2 * np.arange(len(noise)) / 16_000) > 0
    return (noise * np.where(burst, 1.0, 0.01) * 10 ** (level_db / 20)).astype(np.float32)


@pytest.mark.parametrize(("level_db", "gain_db"), [(-10, 0), (-17, 0), (-40, 23), (-48, 31), (3, -8)])
def test_a_clip_is_heard_as_loud_as_networks_know_audio(level_db, gain_db):
    clip = clip_of(spoken(level_db)[:, None], 16_000)
    where = masked_audio.MaskedAudio(clip_source.source_of(clip), [(16_000, 24_000)])
    assert 20 * np.log10(where.gain(16_000, 24_000)) == pytest.approx(gain_db, abs=1)


@pytest.mark.parametrize(("known_s", "gain_db"), [(1.0, 8), (0.4, 8), (0.2, 2), (0.06, 0)])
def test_of_little_voice_the_loudest_was_lost(known_s, gain_db):
    """A voice that is known to -25 dB: with less than LITTLE_S of it, it is not taken for all that quiet. By hand."""
    rests = np.random.default_rng(0).normal(0, 10 ** (-70 / 20), 48_000)
    rests[: round(known_s * 16_000)] *= 10 ** (45 / 20)
    where = masked_audio.MaskedAudio(clip_source.source_of(clip_of(rests[:, None].astype(np.float32), 16_000)), [(24_000, 25_000)])
    assert 20 * np.log10(where.gain(24_000, 25_000)) == pytest.approx(gain_db, abs=0.6)


def test_what_is_lost_or_no_voice_tells_no_loudness():
    """The same where the gaps hold thunder; 1 where only rests, or nothing, are known."""
    audio, spans = spoken(-40), [(16_000, 24_000), (30_000, 31_000)]
    quiet, thunder = audio.copy(), audio.copy()
    for start, end in spans:
        thunder[start:end] = 0.9
    rests = 0.01 * audio / np.abs(audio).max() * (np.abs(audio) < 0.001)
    gains = [
        masked_audio.MaskedAudio(clip_source.source_of(clip_of(x[:, None], 16_000)), spans).gain(16_000, 24_000)
        for x in (quiet, thunder, rests, 0 * audio)
    ]
    assert gains[0] == gains[1] > 10 and gains[2:] == [1, 1]
