"""Which gaps of a clip are restored: given ones are checked, others are detected, and missing samples are gaps."""

import dataclasses

import numpy as np
import pytest

from avsi_jax.inpainting import api, clip_gaps
from avsi_jax.media import clip_source
from tests.support.inpainting_fakes import audible_restorer, make_clip, voice


@pytest.fixture(scope="module")
def audio_only(tiny_config):
    """Inpainter with an audio-only system."""
    return api.Inpainter(audible_restorer(tiny_config(system="a_si")))


def test_gaps_are_detected(audio_only):
    samples = voice(2.9, 16_000) + np.random.default_rng(0).normal(0, 1e-3, (46_400, 1)).astype(np.float32)
    samples[16_000:22_400] = 0
    (gap,) = audio_only.inpaint(make_clip(samples, 16_000), "auto").gaps
    assert abs(gap.start_s - 1.0) < 0.02 and abs(gap.end_s - 1.4) < 0.02


def test_a_clip_without_a_gap_is_an_error_of_its_own_class(audio_only):
    noise = np.random.default_rng(0).normal(0, 1e-2, (46_400, 1)).astype(np.float32)
    with pytest.raises(clip_gaps.NoGapFoundError, match="--gap"):
        audio_only.inpaint(make_clip(noise, 16_000), "auto")


def test_overlapping_gaps_are_merged():
    assert clip_gaps.check_gaps([(1.0, 1.5), (0.2, 0.4), (1.4, 1.6), (1.1, 1.2)], 32_000, 16_000) == [
        (3200, 6400),
        (16_000, 25_600),
    ]


def test_a_gap_may_end_with_the_video():
    assert clip_gaps.check_gaps([(2.0, 3.0)], 47_648, 16_000, end_s=3.0) == [(32_000, 47_648)]
    with pytest.raises(ValueError, match="2-3.1.*2.978 s long"):
        clip_gaps.check_gaps([(2.0, 3.1)], 47_648, 16_000, end_s=3.0)


@pytest.mark.parametrize("gaps", [(0.9, 1.7), [0.9], [(1, 2, 3)], "ab", [("a", "b")], None, 3.0, [[[1, 2], [3, 4]]]])
def test_gaps_that_are_no_pairs_are_one_clear_error(gaps):
    with pytest.raises(ValueError, match=r"expected a list of \(start, end\) pairs"):
        clip_gaps.check_gaps(gaps, 48_000, 16_000)


def test_gaps_may_be_an_array():
    spans = clip_gaps.check_gaps(np.array([[1.0, 1.5], [0.2, 0.4]]), 32_000, 16_000)
    assert spans == [(3200, 6400), (16_000, 24_000)]


# ------------------------------------------------------------------------------------------------------------- missing samples


def with_missing(clip, *spans):
    """The clip with zeros in spans [start, end) in seconds, which its file does not have."""
    samples = clip.audio.samples.copy()
    missing = tuple((round(a * clip.audio.rate), round(b * clip.audio.rate)) for a, b in spans)
    for start, stop in missing:
        samples[start:stop] = 0
    return dataclasses.replace(clip, audio=dataclasses.replace(clip.audio, samples=samples, missing=missing))


def detected(*missing, pause=(0.0, 0.0)):
    """The gaps detected, in seconds, in noise at a constant low level, in which silence is not recognised as a gap."""
    noise = np.random.default_rng(0).normal(0, 1e-2, (48_000, 1)).astype(np.float32)
    noise[round(pause[0] * 16_000) : round(pause[1] * 16_000)] /= 20
    source = clip_source.source_from_clip(with_missing(make_clip(noise, 16_000), *missing))
    return [(start / 16_000, end / 16_000) for start, end in clip_gaps.detected_gaps(source)]


def test_samples_that_the_file_lacks_are_gaps_although_they_look_like_a_pause():
    assert detected((1.0, 1.1), (2.0, 2.4)) == [(1.0, 1.1), (2.0, 2.4)]


def test_audio_that_starts_late_or_ends_early_is_a_gap():
    assert detected((0, 0.4), (2.5, 3.0)) == [(0.0, 0.4), (2.5, 3.0)]


def test_usual_differences_of_start_and_joint_are_no_gaps():
    """Joints of recordings, which lie in pauses, and audio that starts some frames after the video."""
    with pytest.raises(clip_gaps.NoGapFoundError):
        detected((0, 0.1), (2.9, 3.0))
    with pytest.raises(clip_gaps.NoGapFoundError):
        detected((1.0, 1.022), pause=(0.9, 1.2))


def test_one_lost_packet_outside_pauses_is_a_gap():
    assert detected((1.0, 1.02), (2.0, 2.02), (2.5, 2.505), pause=(0.9, 1.2)) == [(2.0, 2.02)]


def test_missing_samples_outside_the_given_gaps_are_named_in_one_warning(audio_only):
    clip = with_missing(make_clip(voice(3, 16_000), 16_000), (1.0, 1.3), (2.0, 2.2))
    repair = audio_only.inpaint(clip, [(1.001, 1.299)])
    (warning,) = repair.warnings
    assert "2.00-2.20 s" in warning and "1.00" not in warning
    assert not repair.samples[32_000:35_200].any()
