"""Data augmentation: each change compared with NumPy, which fields it affects, and that draws depend only on key and clip."""

import functools

import jax
import numpy as np
import pytest

from avsi_jax import presets
from avsi_jax.audio import gap_masks
from avsi_jax.data import augmentation, features

pytestmark = pytest.mark.usefixtures("quickly_compiled")

RATE = 16_000
OFF = dict.fromkeys(("speed", "gain_db", "mirror", "stretch", "noise_px", "jitter_ms", "drop_video", "trim"), 0.0)
ALL_ON = {
    "speed": 0.1, "gain_db": 12.0, "mirror": 0.5, "stretch": 0.2, "noise_px": 0.5, "jitter_ms": 30.0,
    "drop_video": 0.5, "trim": 1.0,
}  # fmt: skip
AFFECTED = {
    "speed": {"audio", "audio_length", "fps", "offset_s"},
    "gain_db": {"audio"},
    "mirror": {"landmarks"},
    "stretch": {"landmarks"},
    "noise_px": {"landmarks"},
    "jitter_ms": {"offset_s"},
    "drop_video": {"landmarks_valid"},
    "trim": {"audio", "audio_length", "offset_s"},
}


def clips(count=6, samples=4_000, video=9, seed=0):
    """Noise and randomly moving landmarks, with several lengths, frame sizes and frame rates."""
    rng = np.random.default_rng(seed)
    length = np.resize(np.int32([samples, samples - 700, samples // 2]), count)
    audio = rng.integers(-20_000, 20_000, (count, samples)).astype(np.int16)
    return {
        "audio": np.where(np.arange(samples) < length[:, None], audio, 0).astype(np.int16),
        "audio_length": length,
        "landmarks": np.float32(100 + rng.normal(0, 3, (count, video, 68, 2)).cumsum(1)),
        "landmarks_valid": rng.uniform(size=(count, video)) < 0.9,
        "num_frames": np.full(count, video, np.int32),
        "frame_size": np.resize(np.int32([[360, 288], [720, 576]]), (count, 2)),
        "fps": np.resize(np.float32([25, 25, 30]), count),
        "offset_s": np.resize(np.float32([0, 0.011, -0.04]), count),
        "speech": np.tile(np.float32([0.04, 0.1]), (count, 1)),
        "id_hash": np.arange(1, count + 1, dtype=np.uint32) * np.uint32(2_654_435_761),
        "labels": rng.integers(0, 9, (count, 5)).astype(np.int32),
        "weight": np.ones(count, np.float32),
    }


@functools.cache
def jitted_augment(**strengths):
    return jax.jit(lambda key, batch: augmentation.augment(key, batch, **OFF | strengths))


def augmented(batch, seed=0, **strengths):
    return jax.tree.map(np.asarray, jitted_augment(**strengths)(jax.random.key(seed), batch))


@functools.cache
def many():
    """2,000 very short clips, enough to test distributions."""
    return clips(2_000, 40, 3)


def assert_uniform(values, low, high):
    """Percentiles within four standard deviations of those of 2,000 draws."""
    assert low <= values.min() and values.max() <= high
    np.testing.assert_allclose(
        np.percentile(values, [10, 50, 90]), low + (high - low) * np.float64([0.1, 0.5, 0.9]), atol=0.045 * (high - low)
    )


# ---- random draws --------------------------------------------------------------------------------------------------------------


def test_strength_zero_changes_nothing():
    """Identical bit for bit, except that the audio is float32."""
    batch = clips()
    result = augmented(batch)
    assert result["audio"].dtype == np.float32 and set(result) == set(batch)
    for name, value in batch.items():
        np.testing.assert_array_equal(result[name], value, err_msg=name)


@pytest.mark.parametrize("change", AFFECTED)
def test_each_change_affects_only_its_own_fields(change):
    batch = clips()
    result = augmented(batch, **{change: ALL_ON[change]})
    assert {k for k in batch if (result[k] != batch[k]).any()} == AFFECTED[change]
    for name, value in result.items():
        assert value.shape == batch[name].shape and (value.dtype == batch[name].dtype or name == "audio"), name


def test_changes_depend_only_on_key_and_clip():
    """They are the same in another order and another batch, and differ for another key."""
    batch = clips()
    result, other = augmented(batch, **ALL_ON), augmented(batch, 1, **ALL_ON)
    reversed_ = augmented({k: v[::-1].copy() for k, v in batch.items()}, **ALL_ON)
    pair = augmented({k: v[2:4] for k, v in batch.items()}, **ALL_ON)
    for name in ("audio", "audio_length", "landmarks", "landmarks_valid", "fps", "offset_s"):
        np.testing.assert_array_equal(reversed_[name][::-1], result[name], err_msg=name)
        np.testing.assert_allclose(pair[name], result[name][2:4], rtol=1e-6, err_msg=name)  # a batch of two is compiled separately
        assert (other[name] != result[name]).any(), name


def test_changes_are_drawn_independently():
    """Speed and mirroring of a clip stay the same if gain and jitter are enabled as well."""
    one, two = augmented(clips(), speed=0.1, mirror=0.5), augmented(clips(), speed=0.1, mirror=0.5, gain_db=6.0, jitter_ms=9.0)
    for name in ("fps", "landmarks", "audio_length"):
        np.testing.assert_array_equal(one[name], two[name])


def test_audio_stays_in_the_range_of_16_bits():
    batch = clips()
    batch["audio"][:] = np.where(np.arange(4_000) % 50 < 25, -32_768, 32_767)
    result = augmented(batch, **ALL_ON)["audio"]
    assert np.isfinite(result).all() and result.min() == -32_768 and result.max() == 32_767


# ---- audio ---------------------------------------------------------------------------------------------------------------------


def rates(result, batch):
    return result["fps"] / batch["fps"]


def test_speed_is_numpys_interpolation():
    batch = clips()
    result = augmented(batch, speed=0.3)
    rate = rates(result, batch).astype(np.float64)
    assert rate.min() < 0.95 and rate.max() > 1.05
    for b, n in enumerate(batch["audio_length"]):
        expected = np.interp(np.arange(4_000) * rate[b], np.arange(4_001), np.append(batch["audio"][b], 0).astype(float))
        length = min(int(n / rate[b] + 1e-3), 4_000)
        assert result["audio_length"][b] == length
        np.testing.assert_allclose(result["audio"][b, :length], expected[:length], atol=40)  # of 20,000: position to 1e-3 samples
        assert not result["audio"][b, length:].any()


def test_speeds_are_uniform():
    assert_uniform(rates(augmented(many(), speed=0.1), many()), 0.9, 1.1)


def test_speed_shifts_the_pitch():
    """440 Hz at rate r becomes 440 r Hz; linear interpolation is off by at most 0.4 % ((2 pi 440 / 16000)^2 / 8)."""
    batch = clips(samples=8_000)
    batch["audio"][:] = np.rint(10_000 * np.sin(2 * np.pi * 440 / RATE * np.arange(8_000)))
    batch["audio_length"][:] = 8_000
    result = augmented(batch, speed=0.2)
    for b, rate in enumerate(rates(result, batch)):
        n = result["audio_length"][b]
        tone = 10_000 * np.sin(2 * np.pi * 440 * float(rate) / RATE * np.arange(n))
        np.testing.assert_allclose(result["audio"][b, : n - 1], tone[: n - 1], atol=60)


def test_speed_keeps_audio_and_video_aligned():
    """A click at video frame 5 stays at video frame 5."""
    batch = clips(samples=10_000)
    batch["audio_length"][:] = 10_000
    click = np.rint((5 / batch["fps"] + batch["offset_s"]) * RATE).astype(int)
    batch["audio"] = np.int16(20_000 * (np.arange(10_000) == click[:, None]))
    result = augmented(batch, speed=0.2)
    click_s = result["audio"].argmax(1) / RATE
    np.testing.assert_allclose(click_s, 5 / result["fps"] + result["offset_s"], atol=1.01 / RATE)
    assert np.abs(click_s - click / RATE).max() > 0.01
    position = np.asarray(features.video_positions(result, presets.get("wide")))  # a frame is 10 ms
    for b, rate in enumerate(rates(result, batch)):  # every audio time keeps its video frame
        before_s = np.arange(301) / 100 * rate - batch["offset_s"][b]
        np.testing.assert_allclose(position[b], np.clip(before_s * batch["fps"][b], 0, 8), atol=1e-4)


def test_gain_is_one_factor_per_clip():
    batch = clips()
    batch["audio"] //= 8
    result = augmented(batch, gain_db=12.0)
    for b in range(len(result["audio"])):
        loud = np.abs(batch["audio"][b]) > 100
        factors = result["audio"][b][loud] / batch["audio"][b][loud]
        np.testing.assert_allclose(factors, factors[0], rtol=1e-5)
    tone = many() | {"audio": np.full((2_000, 40), 1_000, np.int16)}
    assert_uniform(20 * np.log10(augmented(tone, gain_db=12.0)["audio"][:, 0] / 1_000), -12, 12)


def test_jitter_shifts_audio_against_video():
    lag_ms = 1_000 * (augmented(many(), jitter_ms=20.0)["offset_s"] - many()["offset_s"])
    assert_uniform(np.round(lag_ms, 3), -20, 20)


# ---- face ----------------------------------------------------------------------------------------------------------------------


def symmetric_face():
    """(68, 2) in iBUG order: jaw 1-17, brows 18-27, nose 28-36, eyes 37-48, lips 49-68; symmetric about x = 0."""
    face = np.zeros((68, 2))
    face[:17] = np.stack([-6 * np.cos(np.pi * np.arange(17) / 16), 6 * np.sin(np.pi * np.arange(17) / 16)], -1)
    face[17:27] = [(x, -3 + 0.05 * x * x) for x in (-5, -4, -3, -2, -1, 1, 2, 3, 4, 5)]
    face[27:31] = [(0, y) for y in (-2, -1, 0, 1)]
    face[31:36] = [(x, 1.5 - 0.1 * abs(x)) for x in (-2, -1, 0, 1, 2)]
    left_eye = [(-4, -1.5), (-3.5, -2), (-2.5, -2), (-2, -1.5), (-2.5, -1), (-3.5, -1)]  # starts at the outer corner, over the top
    right_eye = [(2, -1.5), (2.5, -2), (3.5, -2), (4, -1.5), (3.5, -1), (2.5, -1)]  # starts at the inner corner, over the top
    face[36:48] = left_eye + right_eye
    outer = [(-3, 3), (-2, 2.5), (-1, 2.2), (0, 2.3), (1, 2.2), (2, 2.5), (3, 3), (2, 3.6), (1, 4), (0, 4.1), (-1, 4), (-2, 3.6)]
    inner = [(-2.2, 3), (-1, 2.8), (0, 2.8), (1, 2.8), (2.2, 3), (1, 3.2), (0, 3.3), (-1, 3.2)]
    face[48:68] = outer + inner
    return face


def test_a_symmetric_face_is_its_own_mirror_image():
    assert sorted(augmentation.MIRRORED) == list(range(68))
    np.testing.assert_array_equal(augmentation.MIRRORED[augmentation.MIRRORED], np.arange(68))
    assert (np.arange(68) == augmentation.MIRRORED).sum() == 10  # chin, bridge (4), nose tip, middle of four lip edges
    face = symmetric_face()
    np.testing.assert_allclose(face[augmentation.MIRRORED] * [-1, 1], face, atol=1e-12)


def test_mirroring_applies_to_full_clips():
    """About the middle of the frame; all frames of a clip or none."""
    batch = many()
    result = augmented(batch, mirror=0.3)["landmarks"]
    mirrored = batch["landmarks"][:, :, augmentation.MIRRORED].astype(np.float64)
    mirrored[..., 0] = batch["frame_size"][:, :1, None] - mirrored[..., 0]
    changed = (result != batch["landmarks"]).any((1, 2, 3))
    np.testing.assert_allclose(result[changed], mirrored[changed], atol=1e-4)
    assert changed.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 2_000))


def test_stretch_scales_movements():
    """About the mean position of each landmark, by one factor in x and one in y per clip."""
    batch = clips(400, 40, 7)
    result = augmented(batch, stretch=0.2)["landmarks"].astype(np.float64)
    before, after = (x - x.mean(1, keepdims=True) for x in (batch["landmarks"].astype(np.float64), result))
    factor = (before * after).sum((1, 2)) / (before**2).sum((1, 2))  # (B, 2)
    np.testing.assert_allclose(after, before * factor[:, None, None], atol=1e-3)
    np.testing.assert_allclose(result.mean(1), batch["landmarks"].mean(1), atol=1e-3)
    assert 0.8 <= factor.min() < 0.81 and 1.19 < factor.max() <= 1.2
    assert np.abs(np.corrcoef(factor.T)[0, 1]) < 4 / np.sqrt(400)


def test_stretch_does_not_count_padding():
    """The frames after a short clip repeat its last one: with and without them, the clip's own frames are the same."""
    batch = clips(6, 40, 7)
    padded = {**batch, "landmarks": np.concatenate([batch["landmarks"], batch["landmarks"][:, -1:].repeat(20, 1)], 1)}
    padded["landmarks_valid"] = np.pad(batch["landmarks_valid"], ((0, 0), (0, 20)))
    result = augmented(padded, stretch=0.2)["landmarks"]
    np.testing.assert_allclose(result[:, :7], augmented(batch, stretch=0.2)["landmarks"], rtol=1e-6)


def test_noise_is_independent_for_every_landmark_and_frame():
    """0.5 px in a frame 360 wide is 1 px in a frame 720 wide."""
    batch = clips(60, 40, 7)
    noise = augmented(batch, noise_px=0.5)["landmarks"] - batch["landmarks"].astype(np.float64)
    for wide, expected in ((360, 0.5), (720, 1.0)):
        part = noise[batch["frame_size"][:, 0] == wide]
        assert part.std() == pytest.approx(expected, rel=4 / np.sqrt(2 * part.size) + 1e-3)
        assert abs(part.mean()) < 4 * expected / np.sqrt(part.size)
    left, right = noise[:, :, :-1].ravel(), noise[:, :, 1:].ravel()
    assert abs(np.corrcoef(left, right)[0, 1]) < 4 / np.sqrt(left.size)


def test_trim_removes_only_silence():
    """Words from 0.04 to 0.1 s of 0.25, 0.206 and 0.125 s are kept; a share of 1 - U^3 of the audio on either side is removed."""
    batch = clips(600)
    result = augmented(batch, trim=0.9)
    start = np.rint((batch["offset_s"] - result["offset_s"]) * RATE).astype(int)
    end = batch["audio_length"] - start - result["audio_length"]
    for b, (first, n) in enumerate(zip(start, result["audio_length"])):
        np.testing.assert_array_equal(result["audio"][b, :n], batch["audio"][b, first : first + n])
        assert not result["audio"][b, n:].any()
    for cut, silence in ((start, 640), (end, batch["audio_length"] - 1_600)):
        share = cut / silence
        assert share.min() >= 0 and share.max() <= 0.9
        np.testing.assert_allclose(np.percentile(share, [10, 50, 90]), 0.9 * (1 - np.float64([0.9, 0.5, 0.1]) ** 3), atol=0.06)


def test_video_is_dropped_for_full_clips():
    batch = many()
    result = augmented(batch, drop_video=0.1)["landmarks_valid"]
    missing = ~result.any(1) & batch["landmarks_valid"].any(1)
    np.testing.assert_array_equal(result[~missing], batch["landmarks_valid"][~missing])
    assert missing.mean() == pytest.approx(0.1, abs=4 * np.sqrt(0.1 * 0.9 / 2_000))


# ---- no leak of masked samples -------------------------------------------------------------------------------------------------


def test_masked_samples_do_not_affect_the_inputs():
    """Gaps apply to the augmented audio: samples of the recording that only contribute to the gap have no effect."""
    batch = clips(2, 48_000, 75)
    batch["audio"] = batch["audio"].astype(np.float32)
    gap = np.int32([[[9_000, 17_000]], [[0, 3_000]]])
    config = features.FeatureConfig(presets.get("wide"), motion="pose")

    def inputs_of(audio):
        strengths = ALL_ON | {"trim": 0.0}  # trimming would move the gap to other samples
        other = augmentation.augment(jax.random.key(0), batch | {"audio": audio}, **strengths)
        return features.make_features(other, gap, config), other

    gradient = jax.jit(jax.grad(lambda audio: (inputs_of(audio)[0].spectrogram ** 2).sum()))(batch["audio"])
    inputs, other = jax.tree.map(np.asarray, jax.jit(inputs_of)(batch["audio"]))
    rate = rates(other, batch)
    position = np.arange(48_000)
    masked = (position >= gap[:, :1, 0] * rate[:, None] + 2) & (position < gap[:, :1, 1] * rate[:, None] - 2)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[masked].any() and masked.sum(1).min() > 2_500
    assert (np.asarray(gradient)[~masked & (position < 24_000)] != 0).mean() > 0.9
    changed, _ = jax.jit(inputs_of)(np.where(masked, 1_000, batch["audio"]).astype(np.float32))
    for name in set(features.Features._fields) - {"target"}:
        np.testing.assert_array_equal(getattr(changed, name), getattr(inputs, name), err_msg=name)
    missing = np.asarray(gap_masks.gap_samples(gap, 48_000)) & (position < other["audio_length"][:, None])
    np.testing.assert_array_equal(inputs.mask, gap_masks.affected_frames(missing, config.spec) & inputs.valid)
