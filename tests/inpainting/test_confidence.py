"""Confidence of a restored gap: what was measured for its length and inputs."""

import pytest

from avsi_jax.inpainting import confidence

MEASURED = {
    "audio and video": {"300": {"stoi_gap": 0.8}, "1500": {"stoi_gap": 0.6}},
    "audio": {"300": {"stoi_gap": 0.7, "gap_l1_db": 5.0}, "1500": {"stoi_gap": 0.3}},
    "video": {"1500": {"stoi_gap": 0.5}},
}


@pytest.mark.parametrize(
    ("length_s", "has_audio", "visible_share", "expected"),
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
def test_confidence_is_interpolated_from_measurements(length_s, has_audio, visible_share, expected):
    """Calculated by hand: interpolated over length, weighted by the visible share, halved every 1.5 s beyond the longest gap."""
    assert confidence.confidence(length_s, has_audio, visible_share, MEASURED) == pytest.approx(expected)


def test_confidence_without_measurements_decreases_with_length():
    values = [confidence.confidence(s, True, 0.0, {}) for s in (0.01, 0.5, 1.0, 2.0, 60.0)]
    assert values == sorted(values, reverse=True) and 0 < values[-1] < 0.1 and values[2] == 0.5 and values[0] < 1
    assert confidence.confidence(1.0, False, 0.0, {}) == 0


def test_the_longest_measured_gap_and_its_quality():
    assert (confidence.longest_s(MEASURED, "audio"), confidence.longest_s({}, "audio")) == (1.5, None)
    assert confidence.quality_at_longest(MEASURED, "audio") == 0.3


@pytest.mark.parametrize(
    ("has_audio", "visible_share", "inputs"),
    [(True, 1.0, "audio and video"), (True, 0.1, "audio"), (False, 0.5, "video"), (False, 0.0, "audio")],
)
def test_inputs_are_named(has_audio, visible_share, inputs):
    assert confidence.inputs_used(has_audio, visible_share) == inputs


def test_the_shipped_weights_have_measurements_under_these_names():
    from avsi_jax.inference import weights

    assert set(weights.read(weights.find("av_unified")).facts["measured"]) == {"audio and video", "audio", "video"}
    assert set(weights.read(weights.find("a_si")).facts["measured"]) == {"audio"}
