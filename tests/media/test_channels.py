"""Channels whose mean is misleading, because they cancel or are silent: the restored gap fits each in level and in sign."""

import threading

import numpy as np
import pytest

from avsi_jax.face import av_sync
from avsi_jax.inpainting import clip_inpainter, face_tracks, masked_audio
from avsi_jax.media import channels, clip_io, clip_source
from tests.support.fake_network import tone_inpainter
from tests.support.inpainting_fakes import FakeTracker, always_visible, make_clip, voice

RATE, GAP = 22_050, (1.0, 1.6)
GAP_SPAN = slice(22_050, 35_280)
VOICE = 2 * voice(3.0, RATE)[:, 0]
SILENCE = 0 * VOICE


def noise(level, seed=1):
    return level * np.random.default_rng(seed).normal(0, 1, len(VOICE)).astype(np.float32)


def rms(x):
    return np.sqrt(np.mean(np.square(x, dtype=np.float64)))


@pytest.fixture
def inpainter(monkeypatch):
    return tone_inpainter(monkeypatch, name="a_si")


def inpaint_mono(inpainter):
    """The samples (N,) of VOICE as a mono clip with the gap restored."""
    return inpainter.inpaint(make_clip(VOICE[:, None], RATE), [GAP]).samples[:, 0]


def has_phase_warning(result):
    return any("opposite phase" in w for w in result.warnings)


CASES = {  # the channels; the amplitude of VOICE in each; whether they cancel. Written by hand
    "mono": ([VOICE], [1], False),
    "equal": ([VOICE, VOICE], [1, 1], False),
    "half as loud": ([VOICE, 0.5 * VOICE], [1, 0.5], False),
    "inverted": ([VOICE, -VOICE], [1, -1], True),
    "inverted, each with its own noise": ([VOICE + noise(3e-3), -VOICE + noise(3e-3, 2)], [1, -1], True),
    "inverted, the second louder": ([0.7 * VOICE, -VOICE], [0.7, -1], True),
    "inverted, but too quiet to cancel": ([VOICE, -0.25 * VOICE], [1, -0.25], False),
    "one of four inverted": ([VOICE, VOICE, VOICE, -VOICE], [1, 1, 1, -1], False),
    "two of four inverted": ([VOICE, -VOICE, VOICE, -VOICE], [1, -1, 1, -1], True),
    "silent": ([VOICE, SILENCE], [1, 0], False),
    "the first silent": ([SILENCE, VOICE], [0, 1], False),
    "all but one of six silent": ([VOICE, *[SILENCE] * 5], [1, 0, 0, 0, 0, 0], False),
    "inverted beside a silent one": ([VOICE, SILENCE, -VOICE], [1, 0, -1], True),
}


@pytest.mark.parametrize(("parts", "amplitudes", "cancels"), CASES.values(), ids=CASES)
def test_the_restored_gap_fits_every_channel(inpainter, parts, amplitudes, cancels):
    """The fake network's tone is as loud as its input, so in each channel it must have VOICE's amplitude and sign there."""
    samples = np.stack(parts, 1).astype(np.float32)
    result = inpainter.inpaint(make_clip(samples, RATE), [GAP])
    mono = inpaint_mono(inpainter)
    inside = slice(GAP_SPAN.start + 200, GAP_SPAN.stop - 200)  # without the transitions at its edges
    loudest = int(np.argmax(np.abs(amplitudes)))
    for channel, amplitude in enumerate(amplitudes):
        restored, expected = result.samples[inside, channel], amplitude * mono[inside]
        if not amplitude:
            assert not result.samples[:, channel].any(), "a silent channel stays silent"
            continue
        assert 20 * np.log10(rms(restored) / rms(expected)) == pytest.approx(0, abs=0.5)
        correlation = np.corrcoef(restored, result.samples[inside, loudest])[0, 1]
        assert correlation * np.sign(amplitude * amplitudes[loudest]) > 0.99
    outside = np.ones(len(samples), bool)
    outside[GAP_SPAN] = False
    np.testing.assert_array_equal(result.samples[outside], samples[outside])
    assert has_phase_warning(result) == cancels
    assert len([w for w in result.warnings if "opposite phase" in w]) <= 1


def test_networks_get_the_loudest_of_channels_that_cancel(inpainter):
    for parts in ([VOICE, -VOICE], [0.2 * VOICE, VOICE, -VOICE], [VOICE, SILENCE]):
        inpainter.inpaint(make_clip(np.stack(parts, 1), RATE), [GAP])
    inpaint_mono(inpainter)
    *inputs, (mono, gap) = inpainter.restorer.inputs
    for audio, _ in inputs:
        assert np.abs(audio - mono)[~gap].max() < 2e-3 * np.abs(mono).max()
    assert len(inputs) == 3


def test_channels_that_do_not_cancel_are_averaged():
    """Bit for bit as by clip_io.mono, which training and evaluation use."""
    for parts in ([VOICE], [VOICE, VOICE], [VOICE, 0.5 * VOICE], [VOICE, noise(0.05)], [VOICE, noise(0.1, 3), noise(0.1, 4)]):
        samples = np.stack(parts, 1).astype(np.float32)
        np.testing.assert_array_equal(channels.downmix(samples), clip_io.mono(samples))
        source = clip_source.source_from_clip(make_clip(samples, RATE))
        masked = masked_audio.MaskedAudio(source, [(GAP_SPAN.start, GAP_SPAN.stop)])
        weights = channels.downmix_weights(masked.native_context(16_000, 25_600))
        np.testing.assert_array_equal(masked.read_mono(0, 48_000, weights), masked.read_mono(0, 48_000))


def test_channels_of_real_clips_are_averaged(grid_dir):
    for path in sorted(grid_dir.glob("s3[134]/*.mpg"))[:6]:
        samples = clip_io.read_clip(path, video=False).audio.samples
        np.testing.assert_array_equal(channels.downmix(samples), clip_io.mono(samples))


def test_samples_inside_the_gap_do_not_matter(inpainter):
    """The channels cancel inside the gap only, or outside only."""
    for sign_outside, sign_inside, cancels in ((1, -1, False), (-1, 1, True)):
        other = sign_outside * VOICE
        other[GAP_SPAN] = sign_inside * VOICE[GAP_SPAN]
        result = inpainter.inpaint(make_clip(np.stack([VOICE, other], 1), RATE), [GAP])
        assert has_phase_warning(result) == cancels


def test_each_gap_of_a_long_clip_depends_on_the_channels_around_it(inpainter):
    """One channel is inverted from 20 s on. All windows of a gap get the same downmix, and there is a single warning."""
    left = 2 * voice(40.0, 16_000)[:, 0]
    right = left.copy()
    right[20 * 16_000 :] *= -1
    gaps = [(2.0, 2.5), (8.0, 13.0), (30.0, 30.5), (34.0, 34.4)]
    result = inpainter.inpaint(make_clip(np.stack([left, right], 1), 16_000), gaps)
    for start, end in gaps:
        restored_left, restored_right = result.samples[round(start * 16_000) + 100 : round(end * 16_000) - 100].T
        expected = restored_left if start < 20 else -restored_left
        np.testing.assert_allclose(restored_right, expected, atol=1e-3 * np.abs(restored_left).max())
        assert 0.02 < rms(restored_left) < 1
    assert [w for w in result.warnings if "phase" in w] == [f"around 30.00 s {clip_inpainter.PHASE_WARNING}"]


def test_where_the_second_around_the_gap_is_silent_audio_further_away_decides(inpainter):
    """A silent channel stays silent, an inverted one inverted."""
    for other in (SILENCE, -VOICE):
        samples = np.tile(np.stack([VOICE, other], 1), (3, 1))
        samples[round(2.9 * RATE) : round(5.6 * RATE)] = 0
        restored = inpainter.inpaint(make_clip(samples, RATE), [(4.0, 4.5)]).samples[round(4.1 * RATE) : round(4.4 * RATE)]
        np.testing.assert_allclose(restored[:, 1], -restored[:, 0] if other.any() else 0 * restored[:, 0], atol=1e-6)
        assert rms(restored[:, 0]) > 1e-4


def test_the_av_offset_is_measured_on_channels_that_cancel_too(monkeypatch):
    """It is measured on the same audio as for a mono clip."""
    samples, measured = voice(2.9, 16_000)[:, 0], []
    monkeypatch.setattr(av_sync, "estimate_offset", lambda *a: measured.append(a[3]) or av_sync.OffsetEstimate(0.0, 0.0))
    for parts in ([samples], [samples, -samples]):
        source = clip_source.source_from_clip(make_clip(np.stack(parts, 1), 16_000, num_video_frames=72))
        tracks = face_tracks.FaceTracks(source, FakeTracker(), always_visible, threading.Lock(), {"decode": 0.0, "landmarks": 0.0})
        tracks.track([(0.0, 2.9)])
        face_tracks.measure_av_offset(tracks, masked_audio.MaskedAudio(source, [(16_000, 24_000)]))
    np.testing.assert_allclose(measured[1].mean(-1), measured[0].mean(-1))
    assert np.abs(measured[1]).max() > 0.1
