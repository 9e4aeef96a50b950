"""Channels that the mean can't speak for: of opposite phase, or dead. What is filled in fits each of them, in level and in sign."""

import threading

import numpy as np
import pytest

from avsi_jax.face import av_sync
from avsi_jax.inpainting import clip_inpainter, face_tracks, masked_audio
from avsi_jax.media import channels, clip_io, clip_source
from tests.support.fake_network import humming
from tests.support.inpainting_fakes import FakeTracker, all_seen, clip_of, voice

RATE, GAP = 22_050, (1.0, 1.6)
GAP_SPAN = slice(22_050, 35_280)
ONE = 2 * voice(3.0, RATE)[:, 0]


def noise(level, seed=1):
    return level * np.random.default_rng(seed).normal(0, 1, len(ONE)).astype(np.float32)


def level(x):
    return np.sqrt(np.mean(np.square(x, dtype=np.float64)))


@pytest.fixture
def inpainter(monkeypatch):
    return humming(monkeypatch, name="a_si")


CASES = {  # the channels; by what each is ONE, in amplitude; whether they cancel. By hand
    "mono": ([ONE], [1], False),
    "alike": ([ONE, ONE], [1, 1], False),
    "half as loud": ([ONE, 0.5 * ONE], [1, 0.5], False),
    "opposite": ([ONE, -ONE], [1, -1], True),
    "opposite, with a noise of its own each": ([ONE + noise(3e-3), -ONE + noise(3e-3, 2)], [1, -1], True),
    "opposite, the second louder": ([0.7 * ONE, -ONE], [0.7, -1], True),
    "reversed, but too quiet to cancel": ([ONE, -0.25 * ONE], [1, -0.25], False),
    "one of four reversed": ([ONE, ONE, ONE, -ONE], [1, 1, 1, -1], False),
    "two of four reversed": ([ONE, -ONE, ONE, -ONE], [1, -1, 1, -1], True),
    "dead": ([ONE, 0 * ONE], [1, 0], False),
    "the first dead": ([0 * ONE, ONE], [0, 1], False),
    "all but one of six dead": ([ONE, *[0 * ONE] * 5], [1, 0, 0, 0, 0, 0], False),
    "opposite beside a dead one": ([ONE, 0 * ONE, -ONE], [1, 0, -1], True),
}


@pytest.mark.parametrize(("parts", "amplitudes", "cancels"), CASES.values(), ids=CASES)
def test_a_fill_fits_every_channel(inpainter, parts, amplitudes, cancels):
    """The hum is as loud as the sound that is heard: in each channel it must be as loud as ONE there, and reversed where ONE is."""
    samples = np.stack(parts, 1).astype(np.float32)
    repair = inpainter.inpaint(clip_of(samples, RATE), [GAP])
    alone = humming_alone(inpainter)
    inside = slice(GAP_SPAN.start + 200, GAP_SPAN.stop - 200)  # without the joints
    first = int(np.argmax(np.abs(amplitudes)))
    for channel, amplitude in enumerate(amplitudes):
        made, wanted = repair.samples[inside, channel], amplitude * alone[inside]
        if not amplitude:
            assert not repair.samples[:, channel].any(), "a dead channel stays dead"
            continue
        assert 20 * np.log10(level(made) / level(wanted)) == pytest.approx(0, abs=0.5)
        assert np.corrcoef(made, repair.samples[inside, first])[0, 1] * np.sign(amplitude * amplitudes[first]) > 0.99
    outside = np.ones(len(samples), bool)
    outside[GAP_SPAN] = False
    np.testing.assert_array_equal(repair.samples[outside], samples[outside])
    assert any("opposite phase" in w for w in repair.warnings) == cancels
    assert len([w for w in repair.warnings if "opposite phase" in w]) <= 1


def humming_alone(inpainter):
    """What ONE alone is filled with."""
    return inpainter.inpaint(clip_of(ONE[:, None], RATE), [GAP]).samples[:, 0]


def test_what_networks_hear_of_channels_that_cancel_is_the_loudest(inpainter):
    for parts in ([ONE, -ONE], [0.2 * ONE, ONE, -ONE], [ONE, 0 * ONE]):
        inpainter.inpaint(clip_of(np.stack(parts, 1), RATE), [GAP])
    inpainter.inpaint(clip_of(ONE[:, None], RATE), [GAP])
    *others, (alone, gap) = inpainter.restorer.heard
    for audio, _ in others:
        assert np.abs(audio - alone)[~gap].max() < 2e-3 * np.abs(alone).max()
    assert len(others) == 3


def test_the_mean_of_other_clips_is_as_ever():
    """Bit for bit clip_io.mono's, by which training and evaluation hear a clip."""
    for parts in ([ONE], [ONE, ONE], [ONE, 0.5 * ONE], [ONE, noise(0.05)], [ONE, noise(0.1, 3), noise(0.1, 4)]):
        samples = np.stack(parts, 1).astype(np.float32)
        np.testing.assert_array_equal(channels.one(samples), clip_io.mono(samples))
        found = masked_audio.MaskedAudio(clip_source.source_of(clip_of(samples, RATE)), [(GAP.start, GAP.stop)])
        weights = channels.weights_of(found.known(16_000, 25_600))
        np.testing.assert_array_equal(found.record(0, 48_000, weights), found.record(0, 48_000))


def test_real_clips_are_heard_as_ever(grid_dir):
    for path in sorted(grid_dir.glob("s3[134]/*.mpg"))[:6]:
        samples = clip_io.read_clip(path, video=False).audio.samples
        np.testing.assert_array_equal(channels.one(samples), clip_io.mono(samples))


def test_what_stands_in_the_gap_decides_nothing(inpainter):
    """The channels cancel in what is lost, not in what is known; and the other way round."""
    for known, inside, cancels in ((1, -1, False), (-1, 1, True)):
        other = known * ONE
        other[GAP_SPAN] = inside * ONE[GAP_SPAN]
        repair = inpainter.inpaint(clip_of(np.stack([ONE, other], 1), RATE), [GAP])
        assert any("opposite phase" in w for w in repair.warnings) == cancels


def test_a_long_film_of_which_one_part_is_reversed(inpainter):
    """Each gap by what is around it; windows of one gap hear one sound; told once."""
    long = 2 * voice(40.0, 16_000)[:, 0]
    other = long.copy()
    other[20 * 16_000 :] *= -1
    gaps = [(2.0, 2.5), (8.0, 13.0), (30.0, 30.5), (34.0, 34.4)]
    repair = inpainter.inpaint(clip_of(np.stack([long, other], 1), 16_000), gaps)
    for start, end in gaps:
        left, right = repair.samples[round(start * 16_000) + 100 : round(end * 16_000) - 100].T
        np.testing.assert_allclose(right, left if start < 20 else -left, atol=1e-3 * np.abs(left).max())
        assert 0.02 < level(left) < 1
    assert [w for w in repair.warnings if "phase" in w] == [f"around 30.00 s {clip_inpainter.CANCELLED}"]


def test_a_silent_second_beside_the_gap_says_nothing_of_the_channels(inpainter):
    """What lies further away does: the dead one stays dead, the reversed one reversed."""
    for other in (0 * ONE, -ONE):
        samples = np.tile(np.stack([ONE, other], 1), (3, 1))
        samples[round(2.9 * RATE) : round(5.6 * RATE)] = 0
        made = inpainter.inpaint(clip_of(samples, RATE), [(4.0, 4.5)]).samples[round(4.1 * RATE) : round(4.4 * RATE)]
        np.testing.assert_allclose(made[:, 1], -made[:, 0] if other.any() else 0 * made[:, 0], atol=1e-6)
        assert level(made[:, 0]) > 1e-4


def test_sync_listens_to_channels_that_cancel_too(monkeypatch):
    """What is measured is what mono shows."""
    samples, given = voice(2.9, 16_000)[:, 0], []
    monkeypatch.setattr(av_sync, "measure", lambda *a: given.append(a[3]) or av_sync.Sync(0.0, 0.0))
    for parts in ([samples], [samples, -samples]):
        source = clip_source.source_of(clip_of(np.stack(parts, 1), 16_000, num_video_frames=72))
        tracks = face_tracks.FaceTracks(source, FakeTracker(), all_seen, threading.Lock(), {"decode": 0.0, "landmarks": 0.0})
        tracks.look([(0.0, 2.9)])
        face_tracks.measured_sync(tracks, masked_audio.MaskedAudio(source, [(16_000, 24_000)]))
    np.testing.assert_allclose(given[1].mean(-1), given[0].mean(-1))
    assert np.abs(given[1]).max() > 0.1
