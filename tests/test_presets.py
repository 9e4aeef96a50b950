"""Presets: published values, frame counts as in librosa, and rejection of contradictory settings."""

import dataclasses

import numpy as np
import pytest

from avsi_jax import presets


@pytest.mark.parametrize(
    ("name", "rate", "n_fft", "window", "hop", "bands", "pre_emphasis", "num_samples", "num_frames"),
    [
        ("paper", 8_000, 510, 320, 160, 64, 0.97, 23_824, 149),  # tools_audio.py of the paper's code
        ("wide", 16_000, 512, 400, 160, 80, 0.0, 48_000, 301),
        ("morrone", 16_000, 512, 384, 192, 257, 0.0, 48_000, 250),  # audio_processing.py of Morrone's code
    ],
)
def test_presets_are_the_published_ones(name, rate, n_fft, window, hop, bands, pre_emphasis, num_samples, num_frames):
    s = presets.get(name)
    assert (s.name, s.rate, s.n_fft, s.window, s.hop, s.bands) == (name, rate, n_fft, window, hop, bands)
    assert (s.pre_emphasis, s.num_samples, s.num_frames) == (pre_emphasis, num_samples, num_frames)
    assert s.record_samples == num_samples * 16_000 // rate


def test_the_papers_clip_has_the_length_of_a_grid_mpeg():
    """131,328 samples at 44.1 kHz are 2.978 s: 23,824 samples at 8 kHz."""
    assert presets.get("paper").num_samples == round(131_328 / 44_100 * 8_000)


@pytest.mark.parametrize("name", ["paper", "wide"])
@pytest.mark.parametrize("n", [511, 639, 640, 641, 23_679, 23_680, 23_839, 23_840])
def test_centred_frames_are_librosas(name, n):
    import librosa

    s = presets.get(name)
    audio = np.zeros(n, np.float32)
    assert s.frames_of(n) == librosa.stft(audio, n_fft=s.n_fft, hop_length=s.hop, win_length=s.window).shape[1]


def test_frames_that_are_not_centred_cover_every_sample():
    """Morrone's pad_end: ceil(samples / hop) frames."""
    assert [presets.get("morrone").frames_of(n) for n in (1, 192, 193, 47_809, 48_000, 48_001)] == [1, 1, 2, 250, 250, 251]


def test_presets_are_hashable_and_frozen():
    """They are used as static arguments of jit."""
    paper = presets.get("paper")
    assert hash(paper) == hash(dataclasses.replace(paper)) and paper == dataclasses.replace(paper)
    with pytest.raises(dataclasses.FrozenInstanceError):
        paper.hop = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 11_025}, "must divide"),
        ({"window": 600}, "hop <= window <= n_fft"),
        ({"hop": 500}, "hop <= window <= n_fft"),
        ({"scale": "bark"}, "'bark'"),
        ({"level": "power"}, "'power'"),
        ({"scale": "linear"}, "256 bands, found 64"),
    ],
)
def test_contradictory_presets_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(presets.get("paper"), **change)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="'papre'.*paper, wide, morrone"):
        presets.get("papre")
