"""Features: motion and poses compared with NumPy, levels of short clips with librosa, and masks that stay inside the clip."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from scipy import interpolate, signal

from avsi_jax import presets
from avsi_jax.audio import gap_masks, stft
from avsi_jax.data import features

pytestmark = pytest.mark.usefixtures("quickly_compiled")

PAPER, WIDE, MORRONE = PRESETS = [presets.get(name) for name in ("paper", "wide", "morrone")]
by_name = pytest.mark.parametrize("preset", PRESETS, ids=lambda s: s.name)

B = 5
LENGTHS = np.int32([48_000, 47_648, 20_001, 639, 47_647])
VIDEO = np.int32([75, 74, 30, 1, 75])


@pytest.fixture(scope="module")
def batch():
    """Clips of several lengths, frame rates and frame sizes, padded as in `input_pipeline`: zeros, last landmarks."""
    rng = np.random.default_rng(0)
    points = np.float32(150 + rng.normal(0, 2, (B, 75, 68, 2)).cumsum(1))
    for row, n in zip(points, VIDEO):
        row[n:] = row[n - 1]
    audio = rng.normal(0, 3_000, (B, 48_000)).clip(-32_768, 32_767).astype(np.int16)
    return {
        "audio": np.where(np.arange(48_000) < LENGTHS[:, None], audio, 0).astype(np.int16),
        "audio_length": LENGTHS,
        "landmarks": points,
        "landmarks_valid": np.arange(75) < VIDEO[:, None],
        "num_frames": VIDEO,
        "frame_size": np.int32([[360, 288], [720, 576], [360, 288], [1920, 1080], [360, 288]]),
        "fps": np.float32([25, 25, 30, 25, 29.97]),
        "offset_s": np.float32([0, 0.011, -0.04, 0.011, 0.2]),
        "id_hash": np.arange(B, dtype=np.uint32),
    }


@functools.partial(jax.jit, static_argnums=2)
def make(batch, gap, config):
    return features.make_features(batch, gap, config)


NO_GAP = np.zeros((B, 1, 2), np.int32)


# ---- video -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [PAPER, WIDE], ids=lambda s: s.name)
def test_the_spline_is_that_of_the_papers_code(batch, preset):
    """scipy's bicubic spline over time and landmark numbers (FITPACK), of 75 frames of which the first is repeated in front."""
    config = features.FeatureConfig(preset, interpolation="spline")
    found = np.asarray(make(batch, NO_GAP, config).video)
    for b, count in enumerate(VIDEO):
        points = batch["landmarks"][b, :count].reshape(count, -1) * (360 / batch["frame_size"][b, 0])
        points = np.vstack([np.tile(points[:1], (75 - count, 1)), points]).astype(np.float64)
        spline = interpolate.RectBivariateSpline(np.arange(75), np.arange(136), points)
        even = spline(np.linspace(0, 75 * (1 - 1 / preset.num_frames), preset.num_frames), np.arange(136))
        expected = np.diff(even, axis=0, prepend=even[:1])
        np.testing.assert_allclose(found[b], expected, atol=2e-3 * np.abs(expected).max() + 1e-3)


def test_a_spline_is_refused_where_it_has_no_meaning():
    for fields in ({"motion": "pose"}, {"video_rate": "video"}):
        with pytest.raises(ValueError, match="interpolation: found 'spline', expected 'time'"):
            features.FeatureConfig(PAPER, interpolation="spline", **fields)


def expected_motion(batch, s, points):
    """(B, F, V) float64: np.interp of every coordinate at the times of the spectrogram frames on the video clock, differences."""
    first = 0 if s.centred else s.window / 2
    out = np.zeros((B, s.num_frames, 2 * len(points)))
    for b in range(B):
        scale = 360 / batch["frame_size"][b, 0]
        n = batch["num_frames"][b]
        wanted_s = (np.arange(s.num_frames) * s.hop + first) / s.rate - float(batch["offset_s"][b])
        frame_s = np.arange(n) / float(batch["fps"][b])
        track = batch["landmarks"][b, :n][:, points].reshape(n, -1).astype(np.float64) * scale
        out[b, 1:] = np.diff([np.interp(wanted_s, frame_s, c) for c in track.T], axis=1).T
    return out


@pytest.mark.parametrize("landmarks", ["face", "mouth"])
@by_name
def test_motion_is_numpys_interpolation(batch, preset, landmarks):
    config = features.FeatureConfig(preset, landmarks=landmarks)
    points = {"face": range(68), "mouth": range(48, 68)}[landmarks]  # iBUG: the lips are points 49 to 68, counted from 1
    result = np.asarray(jax.jit(features.motion, static_argnums=1)(batch, config))
    assert result.shape == (B, preset.num_frames, config.video_size)
    assert config.video_size == {"face": 136, "mouth": 40}[landmarks]
    largest = np.abs(batch["landmarks"]).max()
    np.testing.assert_allclose(result, expected_motion(batch, preset, points), atol=1e-5 * largest)


def test_motion_is_zero_at_the_ends_of_the_video(batch):
    video = np.asarray(make(batch, NO_GAP, features.FeatureConfig(PAPER)).video)
    assert not video[:, 0].any()
    assert not video[3].any()  # a single frame
    last_s = (VIDEO[2] - 1) / 30 - 0.04  # last frame of clip 2, whose audio is early
    moving = video[2].any(-1)
    assert moving[: int(last_s * 50)].sum() > 0.9 * int(last_s * 50) and not moving[int(last_s * 50) + 2 :].any()


def test_the_offset_shifts_the_video_features_and_not_the_audio(batch):
    config = features.FeatureConfig(PAPER)
    late = make(batch | {"offset_s": batch["offset_s"] + np.float32(0.08)}, NO_GAP, config)
    now = make(batch, NO_GAP, config)
    np.testing.assert_array_equal(late.spectrogram, now.spectrogram)
    # 80 ms are 4 frames: the motion of frame f is now at frame f + 4.
    np.testing.assert_allclose(late.video[0, 5:], now.video[0, 1:-4], atol=2e-3)


def test_landmarks_in_the_padding_do_not_matter(batch):
    config = features.FeatureConfig(PAPER)
    points = np.where(np.arange(75)[None, :, None, None] < VIDEO[:, None, None, None], batch["landmarks"], 1e6)
    np.testing.assert_array_equal(
        make(batch | {"landmarks": points.astype(np.float32)}, NO_GAP, config).video, make(batch, NO_GAP, config).video
    )


@pytest.mark.parametrize("landmarks", ["face", "mouth"])
def test_motion_at_video_rate_is_the_difference_of_successive_frames(batch, landmarks):
    config = features.FeatureConfig(WIDE, landmarks=landmarks, video_rate="video")
    result = make(batch, NO_GAP, config)
    assert result.video.shape == (B, 75, config.video_size)
    points = batch["landmarks"][:, :, {"face": slice(68), "mouth": slice(48, 68)}[landmarks]].reshape(B, 75, -1)
    pixels = points.astype(np.float64) * (360 / batch["frame_size"][:, :1, None])
    np.testing.assert_allclose(result.video[:, 1:], np.diff(pixels, axis=1), atol=1e-4)
    assert not np.asarray(result.video[:, 0]).any()
    np.testing.assert_array_equal(result.num_video_frames, VIDEO)


@by_name
def test_positions_are_the_times_of_spectrogram_frames_on_the_video_clock(batch, preset):
    result = np.asarray(make(batch, NO_GAP, features.FeatureConfig(preset)).positions)
    middle_s = (np.arange(preset.num_frames) * preset.hop + (0 if preset.centred else preset.window / 2)) / preset.rate
    for b in range(B):
        expected = np.clip((middle_s - float(batch["offset_s"][b])) * float(batch["fps"][b]), 0, VIDEO[b] - 1)
        np.testing.assert_allclose(result[b], expected, atol=1e-4)


def test_interpolation_is_linear_and_includes_both_ends():
    values = np.float32([[[0.0], [10.0], [30.0]]])
    result = features.interpolate(jnp.asarray(values), jnp.float32([[0, 0.25, 1, 1.5, 2]]))
    np.testing.assert_allclose(result[0, :, 0], [0, 2.5, 10, 20, 30])


# ---- poses and frames without a face ---------------------------------------------------------------------------------------------

UNSEEN = {0: [10, 11, 40], 1: [0, 73], 2: []}  # frames of a clip; clip 3 has one frame, clip 4 shows no face


@pytest.fixture(scope="module")
def faces(batch):
    """The same clips with faces that have eyes 60 px apart, rotate, move and speak."""
    rng = np.random.default_rng(4)
    face = np.r_[rng.uniform([-60, -20], [60, 90], (68, 2))]
    face[36:42, 0], face[42:48, 0] = face[36:42, 0] * 0.1 - 30, face[42:48, 0] * 0.1 + 30
    face[36:48, 1] *= 0.1
    talk = face + rng.normal(0, 0.3, (B, 75, 68, 2)).cumsum(1)
    return batch | {"landmarks": np.float32(transformed(talk, *head_movement(rng))), "landmarks_valid": known()}


def head_movement(rng):
    """Random walks: angles (B, 75) in radians, scale factors (B, 75), shifts (B, 75, 2) in px."""
    walk = lambda size, shape: rng.normal(0, size, (B, 75, *shape)).cumsum(1)
    return 0.3 + walk(0.02, ()), 1.5 * np.exp(walk(0.01, ())), 180 + walk(3, (2,))


def transformed(points, angle, size, shift):
    """(B, T, L, 2) rotated about (0, 0), then scaled, then shifted."""
    rotation = np.stack([np.stack([np.cos(angle), -np.sin(angle)], -1), np.stack([np.sin(angle), np.cos(angle)], -1)], -2)
    return np.einsum("btxy,btly->btlx", rotation, points) * size[..., None, None] + shift[:, :, None]


def known():
    valid = np.arange(75) < VIDEO[:, None]
    for clip, video in UNSEEN.items():
        valid[clip, video] = False
    valid[4] = False
    return valid


def expected_pose(batch, b):
    """(T, 272) float64 of one clip, frame by frame: positions of the 68 landmarks, then their velocities."""
    n, seen = batch["num_frames"][b], batch["landmarks_valid"][b]
    position, velocity = np.zeros((75, 68, 2)), np.zeros((75, 68, 2))
    for t in np.flatnonzero(seen[:n]):
        points = batch["landmarks"][b, t].astype(np.float64)
        left, right = points[36:42].mean(0), points[42:48].mean(0)  # iBUG from 1: eyes 37 to 48, nose bridge 28
        angle = -np.arctan2(*(right - left)[::-1])
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        position[t] = [rotation @ (p - points[27]) / np.hypot(*(right - left)) for p in points]
    if seen[:n].any():
        position[seen] -= position[seen].mean(0)
    for t in range(1, n):
        if seen[t] and seen[t - 1]:
            velocity[t] = (position[t] - position[t - 1]) * float(batch["fps"][b]) / 25
    return np.concatenate([position.reshape(75, -1), velocity.reshape(75, -1)], -1)


POSE = features.FeatureConfig(WIDE, motion="pose", video_rate="video")
visual_features = jax.jit(features.visual_features, static_argnums=1)


@pytest.mark.parametrize("landmarks", ["face", "mouth"])
def test_pose_is_numpys_frame_by_frame(faces, landmarks):
    config = dataclasses.replace(POSE, landmarks=landmarks)
    result, seen = visual_features(faces, config)
    assert result.shape == (B, 75, config.video_size) and config.video_size == {"face": 272, "mouth": 80}[landmarks]
    np.testing.assert_array_equal(seen, faces["landmarks_valid"])
    kept = slice({"face": 0, "mouth": 48}[landmarks], 68)
    for b in range(B):
        position, velocity = np.split(expected_pose(faces, b).reshape(75, -1, 2), 2, axis=1)
        expected = np.concatenate([position[:, kept].reshape(75, -1), velocity[:, kept].reshape(75, -1)], -1)
        np.testing.assert_allclose(result[b], expected, atol=2e-5)
    assert np.abs(np.asarray(result[:3])).max() > 0.1 and not np.asarray(result[4]).any()


@by_name
def test_pose_at_audio_rate_is_interpolated(faces, preset):
    """np.interp of the values per video frame; a time step is seen if all video frames used for it show a face."""
    result = make(faces, NO_GAP, features.FeatureConfig(preset, motion="pose"))
    positions = np.asarray(result.positions, np.float64)
    for b in range(B):
        video = expected_pose(faces, b)
        expected = np.stack([np.interp(positions[b], np.arange(75), column) for column in video.T], -1)
        np.testing.assert_allclose(result.video[b], expected, atol=2e-5)
        low, valid = np.floor(positions[b]).astype(int), faces["landmarks_valid"][b]
        high = np.where(positions[b] > low, low + 1, low)
        np.testing.assert_array_equal(result.seen[b], valid[low] & valid[high])
    assert np.asarray(result.seen[2:4]).all() and not np.asarray(result.seen[4]).any()


@pytest.mark.parametrize("change", ["shifted", "rotated", "scaled", "all"])
def test_pose_does_not_depend_on_position_size_and_rotation_of_the_head(faces, change):
    """With another shift, rotation and scale in every frame."""
    angle, size, shift = head_movement(np.random.default_rng(8))
    still = {"angle": np.zeros((B, 75)), "size": np.ones((B, 75)), "shift": np.zeros((B, 75, 2))}
    wanted = {"shifted": {"shift": shift}, "rotated": {"angle": angle}, "scaled": {"size": size}}
    points = transformed(faces["landmarks"], **still | wanted.get(change, {"angle": angle, "size": size, "shift": shift}))
    assert np.abs(points - faces["landmarks"]).max() > 10  # px
    before, after = (np.asarray(visual_features(f, POSE)[0]) for f in (faces, faces | {"landmarks": np.float32(points)}))
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max() + 2e-5)


def test_pose_of_frames_with_a_face_has_mean_zero(faces):
    position = np.asarray(visual_features(faces, POSE)[0])[..., :136]
    for b in range(4):
        np.testing.assert_allclose(position[b][faces["landmarks_valid"][b]].mean(0), 0, atol=1e-5)


def test_velocities_are_scaled_to_25_frames_per_second(faces):
    position, velocity = np.split(np.asarray(visual_features(faces, POSE)[0]), 2, axis=-1)
    twice = faces | {"fps": faces["fps"] * 2}
    position_of_twice, velocity_of_twice = np.split(np.asarray(visual_features(twice, POSE)[0]), 2, axis=-1)
    np.testing.assert_array_equal(position_of_twice, position)
    np.testing.assert_allclose(velocity_of_twice, 2 * velocity, rtol=1e-6)


@pytest.mark.parametrize("value", [1e4, np.nan])
def test_landmarks_of_frames_without_a_face_have_no_effect(faces, value):
    """Nor have the landmarks after the last frame."""
    points = np.where(faces["landmarks_valid"][..., None, None], faces["landmarks"], np.float32(value))
    one, two = (make(f, NO_GAP, dataclasses.replace(POSE, video_rate="audio")) for f in (faces, faces | {"landmarks": points}))
    for a, b in zip(one, two):
        np.testing.assert_array_equal(a, b)


def test_degenerate_faces_give_zeros(faces):
    """All landmarks at one point, as in a damaged track."""
    result = visual_features(faces | {"landmarks": np.full((B, 75, 68, 2), 100, np.float32)}, POSE)[0]
    assert not np.asarray(result).any()


# ---- audio -----------------------------------------------------------------------------------------------------------------------


def expected_level(audio, s):
    """(F, K) float64 of one int16 clip without padding, computed with librosa and scipy only."""
    frames = 1 + -(-len(audio) * s.rate // 16_000) // s.hop
    x = np.pad(audio / 32_768.0, (0, 1_000))  # room for the decay of the decimation filter
    if s.rate == 8_000:
        taps = stft.decimation_filter(2).astype(np.float64)  # tested against scipy in test_stft
        x = signal.upfirdn(taps, x, down=2)[len(taps) // 4 :]
    x = x[: s.num_samples]
    if s is PAPER:
        sharp = librosa.effects.preemphasis(x, coef=0.97, zi=[0.0])
        mel = librosa.filters.mel(sr=8_000, n_fft=510, n_mels=64).astype(np.float64)
        bands = np.abs(librosa.stft(sharp, n_fft=510, hop_length=160, win_length=320)).T @ mel.T
        return np.clip((20 * np.log10(np.maximum(1e-5, bands)) + 80) / 80, 0, 1)[:frames]
    mel = librosa.filters.mel(sr=16_000, n_fft=512, n_mels=80).astype(np.float64)
    return np.log(np.abs(librosa.stft(x, n_fft=512, hop_length=160, win_length=400)).T @ mel.T + 1e-5)[:frames]


@pytest.mark.parametrize("preset", [PAPER, WIDE], ids=lambda s: s.name)
def test_levels_and_number_of_valid_frames_are_librosas(batch, preset):
    """For the clip followed by silence, up to the preset's length."""
    result = make(batch, NO_GAP, features.FeatureConfig(preset))
    for b in range(B):
        n = min(LENGTHS[b], preset.record_samples)
        expected = expected_level(batch["audio"][b, :n], preset)
        assert int(result.num_frames[b]) == len(expected)
        np.testing.assert_array_equal(result.valid[b], np.arange(preset.num_frames) < len(expected))
        np.testing.assert_allclose(result.target[b, : len(expected)], expected, atol=1e-4)
        np.testing.assert_array_equal(result.spectrogram[b], result.target[b])
    assert not np.asarray(result.mask).any()


def test_morrone_frames_of_short_clips(batch):
    """All frames that begin in the clip: ceil(samples / 192)."""
    result = make(batch, NO_GAP, features.FeatureConfig(MORRONE))
    np.testing.assert_array_equal(result.num_frames, [250, 249, 105, 4, 249])
    np.testing.assert_array_equal(np.asarray(result.valid).sum(1), result.num_frames)


def test_samples_after_the_end_of_a_clip_do_not_matter(batch):
    noise = np.random.default_rng(1).normal(0, 9_000, (B, 48_000)).astype(np.int16)
    dirty = np.where(np.arange(48_000) < LENGTHS[:, None], batch["audio"], noise)
    config = features.FeatureConfig(PAPER)
    gap = np.tile(np.int32([[1_000, 9_000]]), (B, 1, 1))
    for one, two in zip(make(batch, gap, config), make(batch | {"audio": dirty}, gap, config)):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("protocol", gap_masks.PROTOCOLS)
@by_name
def test_padding_is_never_masked(batch, preset, protocol):
    ends = np.minimum(LENGTHS, preset.record_samples)
    gap = np.int32([[[n - 600, 48_000]] for n in ends])  # across the end of every clip
    result = make(batch, gap, features.FeatureConfig(preset, protocol))
    assert not (np.asarray(result.mask) & ~np.asarray(result.valid)).any()
    assert np.asarray(result.mask).any(1).all()
    after_end = np.int32([[[n, 48_000]] for n in ends])  # a gap after the end has no effect
    beyond = make(batch, after_end, features.FeatureConfig(preset))
    assert not np.asarray(beyond.mask).any()
    np.testing.assert_array_equal(beyond.spectrogram, beyond.target)


def test_record_audio_is_cut_or_padded_to_the_preset(batch):
    audio, length = features.record_audio(batch, PAPER)
    assert audio.shape == (B, 47_648) and audio.dtype == jnp.float32
    np.testing.assert_array_equal(length, np.minimum(LENGTHS, 47_648))
    np.testing.assert_array_equal(audio, batch["audio"][:, :47_648] / np.float32(32_768))
    short = {"audio": batch["audio"][:, :30_000], "audio_length": np.minimum(LENGTHS, 30_000)}
    audio, length = features.record_audio(short, WIDE)
    assert audio.shape == (B, 48_000) and not np.asarray(audio)[:, 30_000:].any()
    np.testing.assert_array_equal(length, short["audio_length"])


# ---- standardisation -------------------------------------------------------------------------------------------------------------


def scales(preset, per_band):
    """A Normalisation with random values."""
    rng = np.random.default_rng(2)
    size = preset.bands if per_band else 1
    random_scale = lambda n, low: tuple(map(float, rng.uniform(low, 3, n)))
    return features.Normalisation(
        features.Scale(random_scale(size, -6), random_scale(size, 0.5)),
        features.Scale(random_scale(136, -1), random_scale(136, 0.5)),
    )


@pytest.mark.parametrize("protocol", gap_masks.PROTOCOLS)
@pytest.mark.parametrize(("preset", "per_band"), [(WIDE, False), (WIDE, True), (MORRONE, True), (PAPER, False)])
def test_features_are_standardised_by_mean_and_std(batch, preset, per_band, protocol):
    """Compared with NumPy in float64; masks and lengths are unchanged, and `to_level` inverts the standardisation."""
    gap = np.tile(np.int32([[4_000, 13_000]]), (B, 1, 1))
    normalisation = scales(preset, per_band)
    plain = make(batch, gap, features.FeatureConfig(preset, protocol))
    config = features.FeatureConfig(preset, protocol, normalisation=normalisation)
    result = make(batch, gap, config)
    for name in ("mask", "valid", "num_frames"):
        np.testing.assert_array_equal(getattr(result, name), getattr(plain, name))
    mask = np.asarray(plain.mask)[..., None] & (protocol == "paper")
    assert (protocol == "waveform") == (not mask.any())
    for name, scale in (("spectrogram", "level"), ("target", "level"), ("video", "motion")):
        mean, std = (np.asarray(v) for v in getattr(normalisation, scale))
        expected = (np.asarray(getattr(plain, name), np.float64) - mean) / std
        gap_level = (
            (0 - mean) / std if preset is PAPER else 0
        )  # silence, or the mean spectrum for a log level, as in Morrone et al.
        expected = np.where(mask, gap_level, expected) if name == "spectrogram" else expected
        np.testing.assert_allclose(getattr(result, name), expected, atol=1e-5 * np.abs(expected).max())
    if mask.any() and preset is not PAPER:
        assert not np.asarray(result.spectrogram)[mask[..., 0]].any(), "exactly 0"
    np.testing.assert_allclose(features.to_level(result.target, config), plain.target, atol=2e-5)


@by_name
def test_without_statistics_features_are_not_standardised(batch, preset):
    """Identical bit for bit."""
    gap = np.tile(np.int32([[4_000, 13_000]]), (B, 1, 1))
    config = features.FeatureConfig(preset)
    plain = jax.jit(features.unstandardised_features, static_argnums=2)(batch, gap, config)
    for one, two in zip(make(batch, gap, config), plain):
        np.testing.assert_array_equal(one, two)
    assert features.to_level(plain.target, config) is plain.target


@pytest.mark.parametrize(("name", "size"), [("level", 64), ("motion", 80)])
def test_statistics_of_another_preset_are_rejected(name, size):
    scale = features.Scale((0.0,) * size, (1.0,) * size)
    with pytest.raises(ValueError, match=f"{name}: found {size} values"):
        features.FeatureConfig(WIDE, normalisation=features.Normalisation(**{name: scale}))


def test_statistics_of_poses_have_their_own_size():
    scale = lambda n: features.Normalisation(motion=features.Scale((0.0,) * n, (1.0,) * n))
    features.FeatureConfig(WIDE, motion="pose", normalisation=scale(272))
    with pytest.raises(ValueError, match="motion: found 136 values, expected 272"):
        features.FeatureConfig(WIDE, motion="pose", normalisation=scale(136))


@pytest.mark.parametrize(
    ("field", "value"), [("protocol", "spectrogram"), ("landmarks", "nose"), ("motion", "standardised"), ("video_rate", "both")]
)
def test_unknown_options_are_rejected(field, value):
    with pytest.raises(ValueError, match=f"{field}: found '{value}'"):
        features.FeatureConfig(PAPER, **{field: value})
