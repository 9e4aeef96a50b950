"""Each change of a training clip alone against NumPy; what it leaves as it was; and that the draw hangs on key and clip alone."""

import functools

import jax
import numpy as np
import pytest

from avsi_jax import presets
from avsi_jax.audio import gap_masks
from avsi_jax.data import augmentation, features

pytestmark = pytest.mark.usefixtures("quickly_compiled")

RATE = 16_000
NOTHING = dict.fromkeys(("speed", "gain_db", "mirror", "stretch", "noise_px", "jitter_ms", "drop_video", "trim"), 0.0)
EVERYTHING = {
    "speed": 0.1, "gain_db": 12.0, "mirror": 0.5, "stretch": 0.2, "noise_px": 0.5, "jitter_ms": 30.0,
    "drop_video": 0.5, "trim": 1.0,
}  # fmt: skip
TOUCHES = {
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
    """Noise, and points that walk; of several lengths, picture sizes and rates."""
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
def changing(**strengths):
    return jax.jit(lambda key, batch: augmentation.augment(key, batch, **NOTHING | strengths))


def changed(batch, seed=0, **strengths):
    return jax.tree.map(np.asarray, changing(**strengths)(jax.random.key(seed), batch))


@functools.cache
def many():
    """2,000 clips of a few samples: enough to see what is drawn."""
    return clips(2_000, 40, 3)


def assert_uniform(values, low, high):
    """Percentiles within four standard deviations of those of 2,000 draws."""
    assert low <= values.min() and values.max() <= high
    np.testing.assert_allclose(
        np.percentile(values, [10, 50, 90]), low + (high - low) * np.float64([0.1, 0.5, 0.9]), atol=0.045 * (high - low)
    )


# ---- what is drawn, and on what it hangs ---------------------------------------------------------------------------------------


def test_no_strength_changes_nothing():
    """Bit for bit; the sound's numbers stay what they were, as floats."""
    batch = clips()
    found = changed(batch)
    assert found["audio"].dtype == np.float32 and set(found) == set(batch)
    for name, value in batch.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("what", TOUCHES)
def test_each_change_touches_its_own(what):
    batch = clips()
    found = changed(batch, **{what: EVERYTHING[what]})
    assert {k for k in batch if (found[k] != batch[k]).any()} == TOUCHES[what]
    for name, value in found.items():
        assert value.shape == batch[name].shape and (value.dtype == batch[name].dtype or name == "audio"), name


def test_changes_hang_on_key_and_clip_alone():
    """In another order, alone, and in another run the same; by another key others."""
    batch = clips()
    found, other = changed(batch, **EVERYTHING), changed(batch, 1, **EVERYTHING)
    backwards = changed({k: v[::-1].copy() for k, v in batch.items()}, **EVERYTHING)
    pair = changed({k: v[2:4] for k, v in batch.items()}, **EVERYTHING)
    for name in ("audio", "audio_length", "landmarks", "landmarks_valid", "fps", "offset_s"):
        np.testing.assert_array_equal(backwards[name][::-1], found[name], err_msg=name)
        np.testing.assert_allclose(pair[name], found[name][2:4], rtol=1e-6, err_msg=name)  # a batch of two is compiled anew
        assert (other[name] != found[name]).any(), name


def test_one_change_draws_nothing_of_another():
    """A clip keeps its speed and the side of its face when its loudness is changed as well."""
    one, two = changed(clips(), speed=0.1, mirror=0.5), changed(clips(), speed=0.1, mirror=0.5, gain_db=6.0, jitter_ms=9.0)
    for name in ("fps", "landmarks", "audio_length"):
        np.testing.assert_array_equal(one[name], two[name])


def test_audio_keeps_to_16_bits():
    batch = clips()
    batch["audio"][:] = np.where(np.arange(4_000) % 50 < 25, -32_768, 32_767)
    found = changed(batch, **EVERYTHING)["audio"]
    assert np.isfinite(found).all() and found.min() == -32_768 and found.max() == 32_767


# ---- sound ---------------------------------------------------------------------------------------------------------------------


def rates(found, batch):
    return found["fps"] / batch["fps"]


def test_speed_is_numpys_interpolation():
    batch = clips()
    found = changed(batch, speed=0.3)
    rate = rates(found, batch).astype(np.float64)
    assert rate.min() < 0.95 and rate.max() > 1.05
    for b, n in enumerate(batch["audio_length"]):
        expected = np.interp(np.arange(4_000) * rate[b], np.arange(4_001), np.append(batch["audio"][b], 0).astype(float))
        length = min(int(n / rate[b] + 1e-3), 4_000)
        assert found["audio_length"][b] == length
        np.testing.assert_allclose(found["audio"][b, :length], expected[:length], atol=40)  # of 20,000: a place to 1e-3 samples
        assert not found["audio"][b, length:].any()


def test_speeds_are_uniform():
    assert_uniform(rates(changed(many(), speed=0.1), many()), 0.9, 1.1)


def test_a_tone_becomes_higher_where_it_runs_faster():
    """440 Hz at rate r is 440 r Hz: straight lines between its samples are 0.4 % off at most ((2 pi 440 / 16000)^2 / 8)."""
    batch = clips(samples=8_000)
    batch["audio"][:] = np.rint(10_000 * np.sin(2 * np.pi * 440 / RATE * np.arange(8_000)))
    batch["audio_length"][:] = 8_000
    found = changed(batch, speed=0.2)
    for b, rate in enumerate(rates(found, batch)):
        n = found["audio_length"][b]
        tone = 10_000 * np.sin(2 * np.pi * 440 * float(rate) / RATE * np.arange(n))
        np.testing.assert_allclose(found["audio"][b, : n - 1], tone[: n - 1], atol=60)


def test_what_belongs_to_a_frame_stays_with_it():
    """A click as picture 5 is seen, and a jump of the face there: together before, together after, whatever the speed."""
    batch = clips(samples=10_000)
    batch["audio_length"][:] = 10_000
    click = np.rint((5 / batch["fps"] + batch["offset_s"]) * RATE).astype(int)
    batch["audio"] = np.int16(20_000 * (np.arange(10_000) == click[:, None]))
    found = changed(batch, speed=0.2)
    heard_s = found["audio"].argmax(1) / RATE
    np.testing.assert_allclose(heard_s, 5 / found["fps"] + found["offset_s"], atol=1.01 / RATE)
    assert np.abs(heard_s - click / RATE).max() > 0.01
    position = np.asarray(features.video_positions(found, presets.get("wide")))  # a frame is 10 ms
    for b, rate in enumerate(rates(found, batch)):  # to any time of the sound belongs the picture that was there
        before_s = np.arange(301) / 100 * rate - batch["offset_s"][b]
        np.testing.assert_allclose(position[b], np.clip(before_s * batch["fps"][b], 0, 8), atol=1e-4)


def test_gain_is_one_factor_a_clip():
    batch = clips()
    batch["audio"] //= 8
    found = changed(batch, gain_db=12.0)
    for b in range(len(found["audio"])):
        loud = np.abs(batch["audio"][b]) > 100
        factors = found["audio"][b][loud] / batch["audio"][b][loud]
        np.testing.assert_allclose(factors, factors[0], rtol=1e-5)
    tone = many() | {"audio": np.full((2_000, 40), 1_000, np.int16)}
    assert_uniform(20 * np.log10(changed(tone, gain_db=12.0)["audio"][:, 0] / 1_000), -12, 12)


def test_jitter_shifts_audio_against_frame():
    lag_ms = 1_000 * (changed(many(), jitter_ms=20.0)["offset_s"] - many()["offset_s"])
    assert_uniform(np.round(lag_ms, 3), -20, 20)


# ---- face ----------------------------------------------------------------------------------------------------------------------


def symmetric_face():
    """(68, 2) drawn from the iBUG figure: jaw 1-17, brows 18-27, nose 28-36, eyes 37-48, lips 49-68; x 0 is the middle."""
    face = np.zeros((68, 2))
    face[:17] = np.stack([-6 * np.cos(np.pi * np.arange(17) / 16), 6 * np.sin(np.pi * np.arange(17) / 16)], -1)
    face[17:27] = [(x, -3 + 0.05 * x * x) for x in (-5, -4, -3, -2, -1, 1, 2, 3, 4, 5)]
    face[27:31] = [(0, y) for y in (-2, -1, 0, 1)]
    face[31:36] = [(x, 1.5 - 0.1 * abs(x)) for x in (-2, -1, 0, 1, 2)]
    left_eye = [(-4, -1.5), (-3.5, -2), (-2.5, -2), (-2, -1.5), (-2.5, -1), (-3.5, -1)]  # from its outer corner over the top
    right_eye = [(2, -1.5), (2.5, -2), (3.5, -2), (4, -1.5), (3.5, -1), (2.5, -1)]  # from its inner corner over the top
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


def test_mirror_turns_whole_clips_over():
    """In the picture's middle, left for right; all of a clip or nothing."""
    batch = many()
    found = changed(batch, mirror=0.3)["landmarks"]
    over = batch["landmarks"][:, :, augmentation.MIRRORED].astype(np.float64)
    over[..., 0] = batch["frame_size"][:, :1, None] - over[..., 0]
    turned = (found != batch["landmarks"]).any((1, 2, 3))
    np.testing.assert_allclose(found[turned], over[turned], atol=1e-4)
    assert turned.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 2_000))


def test_stretch_makes_movements_larger():
    """About where each point is on average; one factor across and one down for all of a clip."""
    batch = clips(400, 40, 7)
    found = changed(batch, stretch=0.2)["landmarks"].astype(np.float64)
    before, after = (x - x.mean(1, keepdims=True) for x in (batch["landmarks"].astype(np.float64), found))
    factor = (before * after).sum((1, 2)) / (before**2).sum((1, 2))  # (B, 2)
    np.testing.assert_allclose(after, before * factor[:, None, None], atol=1e-3)
    np.testing.assert_allclose(found.mean(1), batch["landmarks"].mean(1), atol=1e-3)
    assert 0.8 <= factor.min() < 0.81 and 1.19 < factor.max() <= 1.2
    assert np.abs(np.corrcoef(factor.T)[0, 1]) < 4 / np.sqrt(400)


def test_noise_is_of_every_point_and_frame():
    """0.5 px of a 360-wide picture: 1 px of a 720-wide one."""
    batch = clips(60, 40, 7)
    noise = changed(batch, noise_px=0.5)["landmarks"] - batch["landmarks"].astype(np.float64)
    for wide, expected in ((360, 0.5), (720, 1.0)):
        part = noise[batch["frame_size"][:, 0] == wide]
        assert part.std() == pytest.approx(expected, rel=4 / np.sqrt(2 * part.size) + 1e-3)
        assert abs(part.mean()) < 4 * expected / np.sqrt(part.size)
    left, right = noise[:, :, :-1].ravel(), noise[:, :, 1:].ravel()
    assert abs(np.corrcoef(left, right)[0, 1]) < 4 / np.sqrt(left.size)


def test_trim_cuts_silence_alone():
    """Words from 0.04 to 0.1 s of 0.25, 0.206 and 0.125 s stay whole; a share of 1 - U^3 of what lies on either side goes."""
    batch = clips(600)
    found = changed(batch, trim=0.9)
    start = np.rint((batch["offset_s"] - found["offset_s"]) * RATE).astype(int)
    behind = batch["audio_length"] - start - found["audio_length"]
    for b, (first, n) in enumerate(zip(start, found["audio_length"])):
        np.testing.assert_array_equal(found["audio"][b, :n], batch["audio"][b, first : first + n])
        assert not found["audio"][b, n:].any()
    for cut, silence in ((start, 640), (behind, batch["audio_length"] - 1_600)):
        share = cut / silence
        assert share.min() >= 0 and share.max() <= 0.9
        np.testing.assert_allclose(np.percentile(share, [10, 50, 90]), 0.9 * (1 - np.float64([0.9, 0.5, 0.1]) ** 3), atol=0.06)


def test_lost_video_is_that_of_whole_clips():
    batch = many()
    found = changed(batch, drop_video=0.1)["landmarks_valid"]
    missing = ~found.any(1) & batch["landmarks_valid"].any(1)
    np.testing.assert_array_equal(found[~missing], batch["landmarks_valid"][~missing])
    assert missing.mean() == pytest.approx(0.1, abs=4 * np.sqrt(0.1 * 0.9 / 2_000))


# ---- nothing hidden leaks ------------------------------------------------------------------------------------------------------


def test_what_a_gap_hides_stays_hidden():
    """Gaps are made of the changed sound. Of the recording's samples those that only lost ones are made of reach nothing."""
    batch = clips(2, 48_000, 75)
    batch["audio"] = batch["audio"].astype(np.float32)
    gap = np.int32([[[9_000, 17_000]], [[0, 3_000]]])
    config = features.FeatureConfig(presets.get("wide"), motion="pose")

    def heard(audio):
        strengths = EVERYTHING | {"trim": 0.0}  # which moves the gap to other samples
        other = augmentation.augment(jax.random.key(0), batch | {"audio": audio}, **strengths)
        return features.make_features(other, gap, config), other

    slope = jax.jit(jax.grad(lambda audio: (heard(audio)[0].spectrogram ** 2).sum()))(batch["audio"])
    seen, other = jax.tree.map(np.asarray, jax.jit(heard)(batch["audio"]))
    rate = rates(other, batch)
    position = np.arange(48_000)
    dark = (position >= gap[:, :1, 0] * rate[:, None] + 2) & (position < gap[:, :1, 1] * rate[:, None] - 2)
    assert np.isfinite(slope).all() and not np.asarray(slope)[dark].any() and dark.sum(1).min() > 2_500
    assert (np.asarray(slope)[~dark & (position < 24_000)] != 0).mean() > 0.9
    unheard, _ = jax.jit(heard)(np.where(dark, 1_000, batch["audio"]).astype(np.float32))
    for name in set(features.Features._fields) - {"target"}:
        np.testing.assert_array_equal(getattr(unheard, name), getattr(seen, name), err_msg=name)
    missing = np.asarray(gap_masks.gap_samples(gap, 48_000)) & (position < other["audio_length"][:, None])
    np.testing.assert_array_equal(seen.mask, gap_masks.touched_frames(missing, config.spec) & seen.valid)
