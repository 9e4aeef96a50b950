"""Decimation, spectrograms and levels compared with librosa, scipy and NumPy in float64."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from scipy import signal

from avsi_jax import presets
from avsi_jax.audio import stft

pytestmark = pytest.mark.usefixtures("quickly_compiled")

PAPER, WIDE, MORRONE = PRESETS = [presets.get(name) for name in ("paper", "wide", "morrone")]
by_name = pytest.mark.parametrize("preset", PRESETS, ids=lambda s: s.name)

log_mel = jax.jit(stft.log_mel, static_argnums=1)
transform = jax.jit(stft.stft, static_argnums=1)
inverse = jax.jit(stft.istft, static_argnums=(1, 2))


def noise(n, seed=0):
    """(n,) float32 noise whose level varies between 0 and -110 dB, with a stretch of digital silence."""
    rng = np.random.default_rng(seed)
    loudness = np.interp(np.arange(n), np.linspace(0, n, 12), rng.permutation(np.linspace(-110, 0, 12)))
    x = 0.5 * rng.uniform(-1, 1, n) * 10 ** (loudness / 20)
    x[n // 3 : n // 3 + n // 10] = 0
    return x.astype(np.float32)


def librosa_magnitude(x, s):
    """(F, bins) float64 of a centred preset."""
    padding = {"n_fft": s.n_fft, "hop_length": s.hop, "win_length": s.window, "center": True, "pad_mode": "constant"}
    return np.abs(librosa.stft(x.astype(np.float64), **padding)).T


# ---- levels --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [23_824, 23_817, 4_001, 1_600])
def test_paper_level_is_the_papers_librosa_chain(n):
    """tools_audio.py: preemphasis 0.97, stft 510/160/320, |.|, mel (Slaney), 20 log10(max(1e-5, .)), (dB + 80) / 80 in [0, 1]."""
    x = noise(n)
    sharp = librosa.effects.preemphasis(x.astype(np.float64), coef=0.97, zi=[0.0])
    bands = librosa_magnitude(sharp, PAPER) @ librosa.filters.mel(sr=8_000, n_fft=510, n_mels=64).astype(np.float64).T
    expected = np.clip((20 * np.log10(np.maximum(1e-5, bands)) + 80) / 80, 0, 1)
    level = np.asarray(log_mel(x, PAPER))
    assert level.shape == (1 + n // 160, 64)
    assert (expected == 0).any() and (expected > 0.7).any()  # the test signal covers the floor and the range of speech
    np.testing.assert_allclose(level, expected, atol=1e-4)


@pytest.mark.parametrize("n", [48_000, 4_801])
def test_wide_level_is_librosas(n):
    x = noise(n)
    bands = librosa_magnitude(x, WIDE) @ librosa.filters.mel(sr=16_000, n_fft=512, n_mels=80).astype(np.float64).T
    np.testing.assert_allclose(np.asarray(log_mel(x, WIDE)), np.log(bands + 1e-5), atol=1e-4)


@pytest.mark.parametrize("n", [48_000, 4_801])
def test_morrone_level_is_tensorflows(n):
    """tf.signal.stft(frame_length=384, frame_step=192, fft_length=512, pad_end=True), ln(|.| + 1e-6)."""
    x = noise(n).astype(np.float64)
    frames = -(-n // 192)
    padded = np.pad(x, (0, frames * 192 + 384 - n))
    cut = np.stack([padded[f * 192 : f * 192 + 384] for f in range(frames)]) * signal.get_window("hann", 384)
    expected = np.log(np.abs(np.fft.rfft(cut, 512)) + 1e-6)
    np.testing.assert_allclose(np.asarray(log_mel(x.astype(np.float32), MORRONE)), expected, atol=1e-4)


@pytest.mark.parametrize(("preset", "frames"), [(PAPER, 149), (WIDE, 301), (MORRONE, 250)], ids=lambda v: getattr(v, "name", v))
def test_a_clip_has_the_presets_frames(preset, frames):
    shape = jax.eval_shape(lambda x: stft.log_mel_of_record(x, preset), jnp.zeros((2, preset.record_samples))).shape
    assert shape == (2, frames, preset.bands)


def test_a_clip_of_another_length_is_rejected():
    with pytest.raises(ValueError, match="expected 47648 samples at 16000 Hz, found 48000"):
        stft.log_mel_of_record(jnp.zeros((1, 48_000)), PAPER)


def test_leading_axes_are_batch_axes():
    x = np.stack([noise(1_600, seed) for seed in range(6)])
    each = np.stack([np.asarray(log_mel(row, PAPER)) for row in x])
    together = np.asarray(log_mel(x.reshape(2, 3, -1), PAPER)).reshape(each.shape)
    np.testing.assert_allclose(together, each, atol=1e-6)


@by_name
def test_silence_has_the_silence_level_and_a_finite_gradient(preset):
    x = jnp.zeros(1_600)
    np.testing.assert_allclose(np.asarray(log_mel(x, preset)), stft.silence_level(preset), rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: log_mel(x, preset).sum())(x)).all()


@by_name
def test_level_and_magnitude_are_inverse(preset):
    magnitude = np.geomspace(1.1e-4, 0.99, 50).astype(np.float32)
    level = stft.level_from_magnitude(magnitude, preset)
    np.testing.assert_allclose(stft.magnitude_from_level(level, preset), magnitude, rtol=1e-4)
    np.testing.assert_allclose(stft.to_db(level, preset), 20 * np.log10(magnitude + preset.log_floor), atol=1e-3)
    two = np.asarray(stft.level_from_magnitude(np.float32([0.01, 0.1]), preset))
    assert (two[1] - two[0]) * stft.db_per_level(preset) == pytest.approx(20, abs=0.01)


@by_name
def test_levels_out_of_range_give_a_finite_non_negative_magnitude(preset):
    magnitude = np.asarray(stft.magnitude_from_level(np.float32([-100, -20, -0.1, 0, 0.5]), preset))
    assert (magnitude >= 0).all() and np.isfinite(magnitude).all()
    assert np.asarray(stft.to_db(np.float32([-100, 0]), preset)).min() == -80


@pytest.mark.parametrize("factor", [2, 4])
def test_the_decimation_filter_is_scipys(factor):
    taps = signal.firwin(129, 0.94 / factor, window=("kaiser", signal.kaiser_beta(80.0)))
    np.testing.assert_array_equal(stft.decimation_filter(factor), taps.astype(np.float32))


def test_mel_bases_are_librosas():
    np.testing.assert_array_equal(stft.mel_basis(PAPER), librosa.filters.mel(sr=8_000, n_fft=510, n_mels=64))
    np.testing.assert_array_equal(stft.mel_basis(WIDE), librosa.filters.mel(sr=16_000, n_fft=512, n_mels=80))
    np.testing.assert_array_equal(stft.mel_basis(MORRONE), np.eye(257))


# ---- short-time Fourier transform ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [PAPER, WIDE], ids=lambda s: s.name)
def test_stft_and_istft_are_librosas(preset):
    options = {"hop_length": preset.hop, "win_length": preset.window}
    x = noise(8_077)
    expected = librosa.stft(x.astype(np.float64), n_fft=preset.n_fft, **options).T
    np.testing.assert_allclose(transform(x, preset), expected, atol=1e-5 * np.abs(expected).max())
    rng = np.random.default_rng(0)
    changed = (expected * np.exp(2j * np.pi * rng.uniform(size=expected.shape))).astype(np.complex64)  # not the STFT of any signal
    audio = librosa.istft(changed.T.astype(np.complex128), n_fft=preset.n_fft, length=len(x), **options)
    np.testing.assert_allclose(inverse(changed, preset, len(x)), audio, atol=1e-5 * np.abs(audio).max())


@by_name
@pytest.mark.parametrize("odd", [0, 7])
def test_istft_inverts_stft(preset, odd):
    """To 1e-5, except for the outermost samples, which may be covered only by the edge of one window."""
    n = preset.num_samples - odd
    x = np.random.default_rng(1).uniform(-1, 1, (2, n)).astype(np.float32)
    first = 0 if preset.centred else preset.window // 2
    distance = np.abs(np.arange(n)[:, None] - (np.arange(preset.frames_of(n)) * preset.hop + first)).min(1)
    covered = distance < 0.3 * preset.window
    assert covered.mean() > 0.99
    back = np.asarray(inverse(transform(x, preset), preset, n))
    np.testing.assert_allclose(back[:, covered], x[:, covered], atol=1e-5)


# ---- rate and emphasis ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [47_648, 4_001])
def test_decimation_is_upfirdn(n):
    x = np.random.default_rng(2).uniform(-1, 1, (2, n)).astype(np.float32)
    taps = stft.decimation_filter(2).astype(np.float64)
    delay = (len(taps) - 1) // 2
    expected = signal.upfirdn(taps, x.astype(np.float64), down=2, axis=-1)[:, delay // 2 :][:, : -(-n // 2)]
    np.testing.assert_allclose(stft.decimate(jnp.asarray(x), PAPER), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("hertz", "low_db", "high_db"),
    [(1_000, -0.1, 0.1), (3_000, -0.1, 0.1), (4_400, -300, -60), (5_000, -300, -60), (7_000, -300, -60)],
)
def test_decimation_keeps_the_speech_band_and_suppresses_aliases(hertz, low_db, high_db):
    """Power of a tone after decimation, without the transient of the filter; the alias of 5 kHz is at 3 kHz."""
    x = np.sin(2 * np.pi * hertz / 16_000 * np.arange(16_000)).astype(np.float32)
    y = np.asarray(stft.decimate(jnp.asarray(x), PAPER))[200:-200]
    level = 10 * np.log10(2 * np.mean(np.float64(y) ** 2) + 1e-30)
    assert low_db < level < high_db


def test_presets_at_the_record_rate_are_not_decimated():
    x = jnp.asarray(noise(100))
    assert stft.decimate(x, WIDE) is x and stft.decimate(x, MORRONE) is x


def test_pre_emphasis_and_de_emphasis_are_scipys_filters():
    x = noise(5_001).astype(np.float64)
    sharp = signal.lfilter([1, -0.97], [1], x)
    np.testing.assert_allclose(stft.pre_emphasise(np.float32(x), PAPER), sharp, atol=1e-6)
    dull = signal.lfilter([1], [1, -0.97], x)
    np.testing.assert_allclose(stft.de_emphasise(jnp.float32(x), PAPER), dull, atol=1e-5 * np.abs(dull).max())
    started, _ = signal.lfilter([1], [1, -0.97], x, zi=[0.97 * 0.3])
    filtered = stft.de_emphasise(jnp.stack([jnp.float32(x)] * 2), PAPER, jnp.float32([0.0, 0.3]))
    np.testing.assert_allclose(filtered, np.stack([dull, started]), atol=1e-5 * np.abs(dull).max())
    assert stft.pre_emphasise(x, WIDE) is x and stft.de_emphasise(x, WIDE) is x
