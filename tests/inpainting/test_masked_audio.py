"""MaskedAudio: windows of the masked audio, restored audio at the clip's own rate, levels of speech. No network."""

import numpy as np
import pytest

from avsi_jax.inpainting import masked_audio
from avsi_jax.media import clip_io, clip_source
from tests.support.inpainting_fakes import gap_mask, make_clip, voice


def masked(samples, rate, spans):
    return masked_audio.MaskedAudio(clip_source.source_from_clip(make_clip(samples, rate)), spans)


# ---------------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 44_101, 48_000])
def test_a_window_equals_the_same_part_of_the_resampled_clip(rate):
    """The oracle is clip_io.resample of all samples."""
    samples = voice(6, rate, channels=2)
    expected = clip_io.resample(clip_io.mono(samples), rate, 16_000)
    audio = masked(samples, rate, [])
    for first in (0, 1_601, 40_003):
        np.testing.assert_allclose(audio.read_mono(first, 24_000), expected[first : first + 24_000], atol=2e-4)
    end = audio.read_mono(audio.length - 100, 400)
    np.testing.assert_allclose(end[:100], expected[audio.length - 100 : audio.length], atol=2e-4)
    assert not end[110:].any() and not audio.read_mono(-50, 50).any()


def test_samples_in_gaps_are_not_read():
    samples = voice(6, 44_100)
    mask = gap_mask([(1, 2), (3, 3.5)], len(samples), 44_100)
    samples[mask] = np.nan
    audio = masked(samples, 44_100, [(44_100, 88_200), (132_300, 154_350)])
    silent = masked(np.where(mask[:, None], 0, samples), 44_100, [])
    np.testing.assert_array_equal(audio.read_mono(0, 90_000), silent.read_mono(0, 90_000))
    np.testing.assert_array_equal(audio.record_gaps, [[15_968, 32_032], [47_968, 56_032]])


def test_an_infinite_sample_is_an_error_that_names_its_time():
    samples = voice(2, 16_000)
    samples[16_000] = np.inf
    with pytest.raises(clip_io.MediaError, match=r"1\.000 s"):
        masked(samples, 16_000, [(0, 100)]).read_mono(0, 32_000)


# --------------------------------------------------------------------------------------------------------------- restored audio


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_perfectly_restored_audio_gives_the_clip_back(rate, monkeypatch):
    """Up to the bandwidth of 16 kHz audio, and independent of how the gap is cut into pieces."""
    samples = clip_io.resample(clip_io.resample(voice(5, rate), rate, 16_000), 16_000, rate)[: 5 * rate]
    samples = np.concatenate([samples, samples / 2], 1)
    span = (round(1.2 * rate), round(3.9 * rate))
    audio = masked(samples, rate, [span])
    restored = masked_audio.InpaintedSpan(*(int(x) for x in audio.record_gaps[0]))
    restored.put(restored.start, masked(samples, rate, []).read_mono(restored.start, len(restored.samples)))
    at_once = np.concatenate(list(audio.restored_pieces(0, restored)))
    np.testing.assert_allclose(at_once, samples[slice(*span)], atol=0.01 * np.abs(samples).max())
    monkeypatch.setattr(masked_audio, "PIECE_S", 1)
    pieces = list(audio.restored_pieces(0, restored))
    assert len(pieces) == 3
    np.testing.assert_allclose(np.concatenate(pieces), at_once, atol=2e-4)


def test_restored_audio_joins_the_samples_beside_it():
    """Audio of another voice begins where the recording ends: the difference there is no larger than within either voice."""
    samples, other = voice(5, 44_100), voice(5, 44_100, seed=3)
    audio = masked(samples, 44_100, [(44_100, 88_200)])
    restored = masked_audio.InpaintedSpan(*(int(x) for x in audio.record_gaps[0]))
    restored.put(restored.start, masked(other, 44_100, []).read_mono(restored.start, len(restored.samples)))
    inside = np.concatenate(list(audio.restored_pieces(0, restored)))
    largest = np.abs(np.diff(np.concatenate([samples, other]), axis=0)).max()
    assert abs(inside[0] - samples[44_099]) <= largest and abs(inside[-1] - samples[88_200]) <= largest


# ------------------------------------------------------------------------------------------------------------------ speech level


def bursts(level_db, seconds=3.0):
    """Bursts of noise at level_db, 40 dB above the pauses between them."""
    noise = np.random.default_rng(0).normal(0, 1, round(seconds * 16_000))
    burst = np.sin(2 * np.pi * 2 * np.arange(len(noise)) / 16_000) > 0
    return (noise * np.where(burst, 1.0, 0.01) * 10 ** (level_db / 20)).astype(np.float32)


@pytest.mark.parametrize(("level_db", "gain_db"), [(-10, 0), (-17, 0), (-40, 23), (-48, 31), (3, -8)])
def test_the_gain_brings_speech_to_the_range_of_the_training_data(level_db, gain_db):
    gain = masked(bursts(level_db)[:, None], 16_000, [(16_000, 24_000)]).gain(16_000, 24_000)
    assert 20 * np.log10(gain) == pytest.approx(gain_db, abs=1)


@pytest.mark.parametrize(("known_s", "gain_db"), [(1.0, 8), (0.4, 8), (0.2, 2), (0.06, 0)])
def test_with_little_known_speech_the_gain_is_smaller(known_s, gain_db):
    """Speech at -25 dB: with less than LITTLE_SPEECH_S of it, its loudest part may be missing. Calculated by hand."""
    samples = np.random.default_rng(0).normal(0, 10 ** (-70 / 20), 48_000)
    samples[: round(known_s * 16_000)] *= 10 ** (45 / 20)
    gain = masked(samples[:, None].astype(np.float32), 16_000, [(24_000, 25_000)]).gain(24_000, 25_000)
    assert 20 * np.log10(gain) == pytest.approx(gain_db, abs=0.6)


def test_gaps_and_pauses_do_not_change_the_gain():
    """The same if the gaps contain loud samples; 1 if only pauses, or nothing, are known."""
    audio, spans = bursts(-40), [(16_000, 24_000), (30_000, 31_000)]
    quiet, loud = audio.copy(), audio.copy()
    for start, end in spans:
        loud[start:end] = 0.9
    pauses = 0.01 * audio / np.abs(audio).max() * (np.abs(audio) < 0.001)
    gains = [masked(x[:, None], 16_000, spans).gain(16_000, 24_000) for x in (quiet, loud, pauses, 0 * audio)]
    assert gains[0] == gains[1] > 10 and gains[2:] == [1, 1]
