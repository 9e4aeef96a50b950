"""Griffin-Lim: gaps keep known samples and follow the level; full clips and mel inversion compared with librosa and scipy."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from scipy import optimize, signal

from avsi_jax import presets
from avsi_jax.audio import griffin_lim, stft

pytestmark = pytest.mark.usefixtures("quickly_compiled")

PAPER, WIDE, MORRONE = PRESETS = [presets.get(name) for name in ("paper", "wide", "morrone")]

log_mel = jax.jit(stft.log_mel, static_argnums=1)


def level_error_db(audio, wanted, frames, s):
    """Mean |difference| in dB of the levels of two signals (B, N) over the marked frames, floored at -80 dB."""
    one, two = (np.asarray(stft.to_db(log_mel(x, s), s)) for x in (audio, wanted))
    return np.abs(one - two)[frames].mean()


def affected_frames(missing, s):
    """Frames that contain a missing sample at the preset's rate."""
    return np.asarray(log_mel(np.where(missing, 1.0, 0.0).astype(np.float32), s) != stft.silence_level(s)).any(-1)


# ---- test signals --------------------------------------------------------------------------------------------------------------


def tones(n, rate):
    """Four steady tones."""
    t = np.arange(n) / rate
    return 0.1 * sum(np.sin(2 * np.pi * hertz * t + hertz) for hertz in (310, 720, 1_510, 2_350))


def buzz(n, rate):
    """A voice-like buzz with vibrato and a slow swell."""
    t = np.arange(n) / rate
    pitch = 2 * np.pi * np.cumsum(120 + 10 * np.sin(2 * np.pi * 3 * t)) / rate
    return 0.08 * (1.2 + np.sin(9 * t)) * sum(np.sin(k * pitch) / k for k in range(1, 25) if 130 * k < rate / 2)


def one_second(s):
    """(5, N) audio with a little noise and (5, N) bool missing: inside, both ends, all, none, two runs with one sample between.

    N is about one second and odd; the last window ends at the same position relative to the clip as in the paper's clip.
    """
    n, rng = s.rate - 17, np.random.default_rng(0)
    audio = [tones(n, s.rate), buzz(n, s.rate), rng.normal(0, 0.1, n), tones(n, s.rate), buzz(n, s.rate)]
    audio = np.float32(audio + rng.normal(0, 1e-3, (5, n)))
    missing = np.zeros((5, n), bool)
    missing[0, 3 * n // 10 : 7 * n // 10] = True
    missing[1, : n // 5] = missing[1, 9 * n // 10 :] = True
    missing[2] = True
    missing[4, n // 4 : n // 2] = True
    missing[4, 3 * n // 8] = False
    return audio, missing


SEEDS = np.uint32([1, 2, 3, 4, 2**32 - 1])


@pytest.fixture(scope="module", params=PRESETS, ids=lambda s: s.name)
def seconds(request):
    """(preset, audio, missing, level, restored)."""
    s = request.param
    audio, missing = one_second(s)
    level = np.asarray(log_mel(audio, s))
    restored = griffin_lim.inpaint_gap(level, np.where(missing, 0, audio), missing, s, seeds=SEEDS)
    return s, audio, missing, level, np.asarray(restored)


def test_known_samples_are_kept_bit_for_bit(seconds):
    _, audio, missing, _, restored = seconds
    assert restored.dtype == np.float32 and np.isfinite(restored).all()
    np.testing.assert_array_equal(restored[~missing], audio[~missing])
    np.testing.assert_array_equal(restored[3], audio[3])  # no gap
    assert (restored[:, 1:-1][missing[:, 1:-1]] != 0).all()  # windows that are not centred do not cover the first sample


def test_the_result_depends_only_on_level_known_samples_and_seeds(seconds):
    s, audio, missing, level, restored = seconds
    np.testing.assert_array_equal(griffin_lim.inpaint_gap(level, np.where(missing, 0, audio), missing, s, seeds=SEEDS), restored)
    for value in (np.nan, 0.7):  # samples in the gap are not used
        known = np.where(missing, value, audio).astype(np.float32)
        np.testing.assert_array_equal(griffin_lim.inpaint_gap(level, known, missing, s, seeds=SEEDS), restored)
    other = np.asarray(griffin_lim.inpaint_gap(level, np.where(missing, 0, audio), missing, s, seeds=SEEDS + np.uint32(7)))
    assert [(a != b).any() for a, b in zip(other, restored)] == [True, True, True, False, True]


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_batch(seconds):
    s, audio, missing, level, restored = seconds
    known = np.where(missing, 0, audio)
    order = [4, 2, 0, 1, 3]
    moved = griffin_lim.inpaint_gap(level[order], known[order], missing[order], s, seeds=SEEDS[order])
    np.testing.assert_allclose(moved, restored[order], atol=1e-3)  # rounding errors grow with the iterations
    for row in (slice(0, 1), slice(1, 2)) if s is PAPER else ():  # a batch of one is compiled separately
        alone = griffin_lim.inpaint_gap(level[row], known[row], missing[row], s, seeds=SEEDS[row])
        np.testing.assert_allclose(alone, restored[row], atol=1e-3)


def test_true_levels_restore_the_audio(seconds):
    """400 ms of tones and 250 ms of buzz: nearly the true log-mel, also in the valleys between tones; a masked gap is far off."""
    s, audio, missing, _, restored = seconds
    frames = affected_frames(missing, s)
    for row, most in ((slice(0, 1), 4), (slice(4, 5), 1.5)):
        masked_db = level_error_db(np.where(missing, 0, audio)[row], audio[row], frames[row], s)
        restored_db = level_error_db(restored[row], audio[row], frames[row], s)
        assert masked_db > 20 and restored_db < most, (row, masked_db, restored_db)
    for gap, clip, true in zip(missing, restored, audio):
        if gap.any():
            assert 0.8 < np.sqrt(np.mean(clip[gap] ** 2) / np.mean(true[gap] ** 2)) < 1.2


def test_the_restored_audio_follows_the_level(seconds):
    """Not the context: a level 10 dB lower in the gap gives audio 10 dB lower."""
    s, audio, missing, _, restored = seconds
    quiet = log_mel(audio * np.float32(10**-0.5), s)
    softer = np.asarray(griffin_lim.inpaint_gap(quiet, np.where(missing, 0, audio), missing, s, seeds=SEEDS))
    middle = slice(4 * audio.shape[1] // 10, 6 * audio.shape[1] // 10)
    for row in (0, 2):
        drop = 10 * np.log10(np.mean(np.float64(restored[row, middle]) ** 2) / np.mean(np.float64(softer[row, middle]) ** 2))
        assert drop == pytest.approx(10, abs=1.5)


def test_gaps_at_the_ends_of_a_clip_do_not_burst(seconds):
    """The outermost samples are covered only by the edge of one window: dividing by it must not amplify them."""
    _, audio, missing, _, restored = seconds
    for clip, true, gap in zip(np.abs(restored), np.abs(audio), missing):
        if gap.any():
            assert clip[gap].max() < 2 * true[gap].max()


def test_de_emphasis_leaves_no_step_at_the_far_edge():
    """A constant offset is not in the levels: it would become a step of the same size at the end of the gap."""
    audio, missing = one_second(PAPER)
    audio += np.float32(0.2)
    restored = np.asarray(griffin_lim.inpaint_gap(log_mel(audio, PAPER), np.where(missing, 0, audio), missing, PAPER, seeds=SEEDS))
    change = np.diff(missing[4].astype(int))
    differences, natural = np.abs(np.diff(restored[4])), np.abs(np.diff(audio[4]))
    assert (change == -1).sum() == 2 and differences[change == -1].max() < np.quantile(natural, 0.9)
    assert differences[change == 1].max() < np.quantile(natural, 0.98)


# ---- position of the gap ---------------------------------------------------------------------------------------------------------


def test_levels_of_frames_outside_the_gap_have_no_effect(seconds):
    """The iterations use only the frames that overlap a gap."""
    s, audio, missing, level, _ = seconds
    missing = np.zeros_like(missing)
    missing[0, :50] = missing[1, -50:] = missing[2, 4000:4400] = missing[3, 1000:1010] = missing[3, 1500:1600] = True
    known = np.where(missing, 0, audio)
    restored = np.asarray(griffin_lim.inpaint_gap(level, known, missing, s, seeds=SEEDS))
    affected = np.asarray(stft.frames_containing(missing | np.pad(missing, ((0, 0), (1, 0)))[:, :-1], s))
    elsewhere = np.where(affected[..., None], level, stft.silence_level(s) + 0.5)
    np.testing.assert_array_equal(griffin_lim.inpaint_gap(elsewhere, known, missing, s, seeds=SEEDS), restored)
    assert (restored[~missing] == audio[~missing]).all() and np.isfinite(restored).all()
    for clip, true, gap in zip(restored[:4], audio, missing):
        assert np.abs(clip[gap]).max() < 2 * np.abs(true).max()


def test_the_number_of_processed_frames_does_not_change_the_result(seconds):
    """A short gap is processed in few frames; in a batch with a fully missing clip it is processed in all frames."""
    s, audio, missing, level, _ = seconds
    missing = np.zeros_like(missing)
    missing[:, s.rate // 3 : s.rate // 3 + s.rate // 20] = True
    short = np.asarray(griffin_lim.inpaint_gap(level, np.where(missing, 0, audio), missing, s, seeds=SEEDS))
    missing[4] = True
    beside = np.asarray(griffin_lim.inpaint_gap(level, np.where(missing, 0, audio), missing, s, seeds=SEEDS))
    np.testing.assert_allclose(beside[:4], short[:4], atol=1e-3)
    assert (beside[4] != audio[4]).all()


@pytest.mark.slow  # tests/inference/test_restorer.py has a quick one
@pytest.mark.parametrize("s", PRESETS, ids=lambda s: s.name)
def test_padding_after_a_clip_does_not_change_its_restoration(s):
    """A clip of 0.8 s with a constant offset, alone and padded with zeros to 2 s: the offset is that of the clip, and a gap at its
    end is not drawn towards the zeros after it. (A frame centred after the clip fades the last half window.)
    """
    n, total = s.hop * (8 * s.rate // 10 // s.hop), s.hop * (2 * s.rate // s.hop)
    audio = np.float32([0.1 + buzz(n, s.rate), 0.1 + tones(n, s.rate), 0.1 + 0.01 * tones(n, s.rate)])
    missing = np.zeros((3, n), bool)
    missing[0, n // 3 : n // 2] = missing[1, 3 * n // 4 :] = missing[2, : n // 4] = True
    level, known, seeds = np.asarray(log_mel(audio, s)), np.where(missing, 0, audio), SEEDS[:3]
    alone = np.asarray(griffin_lim.inpaint_gap(level, known, missing, s, seeds=seeds))
    frames = s.frames_of(total) - level.shape[1]
    level = np.pad(level, ((0, 0), (0, frames), (0, 0)), constant_values=stft.silence_level(s))
    known, missing = (np.pad(x, ((0, 0), (0, total - n))) for x in (known, missing))
    padded = np.asarray(griffin_lim.inpaint_gap(level, known, missing, s, seeds=seeds, lengths=np.int32([n] * 3)))
    same = n - s.window // 2
    np.testing.assert_allclose(padded[:, :same], alone[:, :same], atol=1e-2)
    assert not padded[:, n:].any()
    for clip, gap in zip(padded, missing) if s is not MORRONE else ():  # its lowest band is 0 Hz
        assert clip[gap].mean() == pytest.approx(0.1, abs=0.02)


# ---- full clips ------------------------------------------------------------------------------------------------------------------


def convergence(audio, magnitude, s):
    """librosa's spectral convergence: relative distance of the magnitudes (F, bins) of a signal from the requested ones."""
    actual = np.abs(librosa.stft(np.float64(audio), n_fft=s.n_fft, hop_length=s.hop, win_length=s.window)).T
    return np.linalg.norm(actual - magnitude) / np.linalg.norm(magnitude)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("s", "iterations", "momentum"), [(PAPER, 32, 0.99), pytest.param(WIDE, 32, 0.99, marks=pytest.mark.slow), (PAPER, 32, 0.0)]
)
def test_griffin_lim_converges_like_librosas(s, iterations, momentum):
    """Same magnitudes, iterations and momentum, 24 random initial phases each: not worse within three standard errors."""
    n, repeats = s.rate // 2, 24
    magnitude = np.asarray(jnp.abs(stft.stft(np.float32(buzz(n, s.rate)), s)))
    stack, seeds = np.tile(magnitude, (repeats, 1, 1)), np.arange(repeats, dtype=np.uint32)
    ours = griffin_lim.griffin_lim(stack, s, length=n, seeds=seeds, iterations=iterations, momentum=momentum)
    assert ours.shape == (repeats, n)
    options = {"n_fft": s.n_fft, "hop_length": s.hop, "win_length": s.window, "n_iter": iterations, "momentum": momentum}
    theirs = [librosa.griffinlim(magnitude.T, length=n, random_state=seed, **options) for seed in range(repeats)]
    ours, theirs = ([convergence(x, magnitude, s) for x in y] for y in (np.asarray(ours), theirs))
    chance = 3 * np.hypot(np.std(ours), np.std(theirs)) / np.sqrt(repeats)
    assert chance < 0.15 * np.mean(theirs) and np.mean(ours) < np.mean(theirs) + chance, (np.mean(ours), np.mean(theirs), chance)


@pytest.mark.slow
def test_momentum_saves_three_iterations_of_four():
    """Perraudin et al. 2013: 30 iterations with momentum come as close as 120 without."""
    magnitude = jnp.abs(stft.stft(np.float32(buzz(8_000, 8_000)), PAPER))
    stack, seeds = jnp.tile(magnitude, (8, 1, 1)), np.arange(8, dtype=np.uint32)
    fast, slow = (
        griffin_lim.griffin_lim(stack, PAPER, length=8_000, seeds=seeds, iterations=n, momentum=m)
        for n, m in ((30, 0.99), (120, 0.0))
    )
    fast, slow = (np.mean([convergence(x, magnitude, PAPER) for x in audio]) for audio in (fast, slow))
    assert fast < 1.05 * slow, (fast, slow)


def test_griffin_lim_rejects_another_number_of_frames():
    with pytest.raises(ValueError, match="50 frames for 8000 samples, expected 51"):
        griffin_lim.griffin_lim(np.ones((1, 50, 256), np.float32), PAPER, length=8_000, seeds=SEEDS[:1])


@pytest.mark.slow
def test_whole_clips_ignore_known_samples_and_splices_keep_them(seconds):
    """A splice is the synthesised clip in the gap and the recording elsewhere, without a crossfade."""
    s, audio, missing, level, _ = seconds
    n = audio.shape[1]
    full = np.asarray(griffin_lim.whole_clip(level, s, length=n, seeds=SEEDS))
    middle = np.zeros((5, level.shape[1]), bool)
    middle[:, 5:-5] = True
    assert full.shape == audio.shape and level_error_db(full[1:3], audio[1:3], middle[1:3], s) < 2.5
    moved = np.asarray(griffin_lim.whole_clip(level[::-1], s, length=n, seeds=SEEDS[::-1]))[::-1]
    np.testing.assert_allclose(moved[2], full[2], atol=2e-2)
    cut = np.asarray(griffin_lim.splice(level, np.where(missing, np.nan, audio).astype(np.float32), missing, s, seeds=SEEDS))
    np.testing.assert_array_equal(cut, np.where(missing, full, audio))


# ---- the paper's inversion -------------------------------------------------------------------------------------------------------


def paper_chain(level, s):
    """The paper's inversion of a level (F, K) up to its Griffin-Lim, in numpy and librosa: magnitudes (bins, F)."""
    decibel = np.clip(np.float64(level), 0, 1) * 80 - 80
    basis = librosa.filters.mel(sr=s.rate, n_fft=s.n_fft, n_mels=s.bands)
    return np.maximum(1e-10, np.linalg.pinv(basis) @ 10 ** (decibel.T / 20)) ** 1.5


def test_papers_magnitudes_are_numpys():
    level = np.asarray(log_mel(np.float32(buzz(8_000, 8_000))[None], PAPER))
    expected = paper_chain(level[0], PAPER)
    magnitude = np.asarray(griffin_lim.paper_magnitude(level, PAPER))[0].T
    np.testing.assert_allclose(magnitude, expected, atol=1e-5 * expected.max())


@pytest.mark.slow
def test_papers_inversion_is_librosas():
    """Same loudness and consistency, with scipy's de-emphasis; only the initial phases differ."""
    s, n = PAPER, 8_000
    level = np.asarray(log_mel(np.float32(buzz(n, s.rate))[None], s))
    magnitude = paper_chain(level[0], s)
    options = {"n_fft": s.n_fft, "hop_length": s.hop, "win_length": s.window, "length": n, "n_iter": 300, "momentum": 0.0}
    theirs = [librosa.griffinlim(magnitude, random_state=seed, **options) for seed in range(4)]
    ours = np.asarray(griffin_lim.paper_inversion(np.tile(level, (4, 1, 1)), s, length=n, seeds=SEEDS[:4]))
    assert (ours[0] != ours[1]).any()
    sharp = signal.lfilter([1, -0.97], [1], np.float64(ours))
    off = [[convergence(x, magnitude.T, s) for x in y] for y in (sharp, theirs)]
    assert np.mean(off[0]) < 1.03 * np.mean(off[1]), off
    theirs = signal.lfilter([1], [1, -0.97], theirs)
    loud = [20 * np.log10(np.sqrt(np.mean(np.square(x)))) for x in (ours, theirs)]
    assert loud[0] == pytest.approx(loud[1], abs=0.5)


# ---- mel to magnitude ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [PAPER, WIDE], ids=lambda s: s.name)
def test_mel_inversion_beats_the_floored_pseudo_inverse(preset):
    """Never negative, and its mel is closer to the requested one, in nearly every frame of a buzz and in silence."""
    basis = librosa.filters.mel(sr=preset.rate, n_fft=preset.n_fft, n_mels=preset.bands).astype(np.float64)
    audio = np.float32(buzz(preset.rate, preset.rate))
    bands = (np.abs(librosa.stft(audio, n_fft=preset.n_fft, hop_length=preset.hop, win_length=preset.window)).T @ basis.T)[None]
    bands[:, -9:] = 0
    magnitude = np.asarray(jax.jit(griffin_lim.mel_to_magnitude, static_argnums=1)(np.float32(bands), preset)).astype(np.float64)
    assert magnitude.shape == (*bands.shape[:-1], preset.n_fft // 2 + 1)
    assert (magnitude >= 0).all() and np.isfinite(magnitude).all() and magnitude[:, -9:].max() < 1e-6
    plain = np.maximum(bands @ np.linalg.pinv(basis).T, 0)
    length = np.maximum(np.linalg.norm(bands, axis=-1), 1e-3)
    ours, theirs = (np.linalg.norm(m @ basis.T - bands, axis=-1) / length for m in (magnitude, plain))
    assert (ours <= np.maximum(theirs, 1e-5)).mean() > 0.95 and ours.mean() < 0.5 * theirs.mean(), (ours.mean(), theirs.mean())


def test_linear_bands_are_the_magnitude():
    bands = np.float32([[[0.5] * 256 + [-0.1]]])
    np.testing.assert_array_equal(griffin_lim.mel_to_magnitude(jnp.asarray(bands), MORRONE), np.maximum(bands, 0))


def test_mel_inversion_is_close_to_scipys():
    """scipy's active-set NNLS is exact. For random bands, which no spectrum matches exactly, our residual is hardly larger, and the
    excess is less than half of that of the floored pseudo-inverse.
    """
    basis = librosa.filters.mel(sr=WIDE.rate, n_fft=WIDE.n_fft, n_mels=WIDE.bands).astype(np.float64)
    bands = np.random.default_rng(0).lognormal(-3, 2, (6, WIDE.bands))
    least = np.array([optimize.nnls(basis, row)[1] for row in bands])
    magnitude = np.asarray(griffin_lim.mel_to_magnitude(jnp.asarray(bands[None], jnp.float32), WIDE))[0]
    left = np.linalg.norm(magnitude @ basis.T - bands, axis=-1)
    plain = np.linalg.norm(np.maximum(bands @ np.linalg.pinv(basis).T, 0) @ basis.T - bands, axis=-1)
    size = np.linalg.norm(bands, axis=-1)
    ours, theirs = (left - least) / size, (plain - least) / size
    assert (ours > -1e-4).all() and (ours < 0.08).all() and ours.mean() < 0.4 * theirs.mean(), (ours, theirs)
