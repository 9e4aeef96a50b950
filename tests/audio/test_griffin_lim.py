"""Filling gaps: known samples untouched, the asked-for level met; whole clips and mel inversion against librosa and scipy."""

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


def level_error_db(found, wanted, frames, s):
    """Mean |difference| in dB of the levels of two sounds (B, N) over the marked frames, floored at -80 dB."""
    one, two = (np.asarray(stft.to_db(log_mel(x, s), s)) for x in (found, wanted))
    return np.abs(one - two)[frames].mean()


def touched(missing, s):
    """Frames that hold a lost sample of the preset's rate."""
    return np.asarray(log_mel(np.where(missing, 1.0, 0.0).astype(np.float32), s) != stft.silence_level(s)).any(-1)


# ---- made-up sounds ------------------------------------------------------------------------------------------------------------


def tones(n, rate):
    """Four steady tones."""
    t = np.arange(n) / rate
    return 0.1 * sum(np.sin(2 * np.pi * hertz * t + hertz) for hertz in (310, 720, 1_510, 2_350))


def buzz(n, rate):
    """A voice-like buzz with vibrato and a slow swell."""
    t = np.arange(n) / rate
    pitch = 2 * np.pi * np.cumsum(120 + 10 * np.sin(2 * np.pi * 3 * t)) / rate
    return 0.08 * (1.2 + np.sin(9 * t)) * sum(np.sin(k * pitch) / k for k in range(1, 25) if 130 * k < rate / 2)


def second_of_audio(s):
    """(5, N) sounds over a little noise, (5, N) lost: inside, at both ends, all, nothing, two stretches with one sample between.

    N is about a second, odd, and its last window ends where that of the paper's clip does.
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
    """(preset, true sound, lost, true level, filled)."""
    s = request.param
    audio, missing = second_of_audio(s)
    level = np.asarray(log_mel(audio, s))
    filled = griffin_lim.inpaint_gap(level, np.where(missing, 0, audio), missing, s, seeds=SEEDS)
    return s, audio, missing, level, np.asarray(filled)


def test_known_samples_are_kept_bit_for_bit(seconds):
    _, audio, missing, _, filled = seconds
    assert filled.dtype == np.float32 and np.isfinite(filled).all()
    np.testing.assert_array_equal(filled[~missing], audio[~missing])
    np.testing.assert_array_equal(filled[3], audio[3])  # nothing was lost
    assert (filled[:, 1:-1][missing[:, 1:-1]] != 0).all()  # windows that are not centred do not see the first sample


def test_the_result_is_a_function_of_its_arguments(seconds):
    s, audio, missing, level, filled = seconds
    np.testing.assert_array_equal(griffin_lim.inpaint_gap(level, np.where(missing, 0, audio), missing, s, seeds=SEEDS), filled)
    for hidden in (np.nan, 0.7):  # what stood in the gap is not looked at
        known = np.where(missing, hidden, audio).astype(np.float32)
        np.testing.assert_array_equal(griffin_lim.inpaint_gap(level, known, missing, s, seeds=SEEDS), filled)
    other = np.asarray(griffin_lim.inpaint_gap(level, np.where(missing, 0, audio), missing, s, seeds=SEEDS + np.uint32(7)))
    assert [(a != b).any() for a, b in zip(other, filled)] == [True, True, True, False, True]


def test_a_clip_waveforms_the_same_in_any_batch(seconds):
    s, audio, missing, level, filled = seconds
    known = np.where(missing, 0, audio)
    order = [4, 2, 0, 1, 3]
    moved = griffin_lim.inpaint_gap(level[order], known[order], missing[order], s, seeds=SEEDS[order])
    np.testing.assert_allclose(moved, filled[order], atol=1e-3)  # a sum may round by one unit, sixty iterations make more of it
    for row in (slice(0, 1), slice(1, 2)) if s is PAPER else ():  # a batch of one is a program of its own
        alone = griffin_lim.inpaint_gap(level[row], known[row], missing[row], s, seeds=SEEDS[row])
        np.testing.assert_allclose(alone, filled[row], atol=1e-3)


def test_true_levels_bring_the_audio_back(seconds):
    """400 ms of tones, 250 of buzz: nearly the true log-mel, the valleys between tones too, where an empty gap is far off."""
    s, audio, missing, _, filled = seconds
    frames = touched(missing, s)
    for row, most in ((slice(0, 1), 4), (slice(4, 5), 1.5)):
        empty = level_error_db(np.where(missing, 0, audio)[row], audio[row], frames[row], s)
        made = level_error_db(filled[row], audio[row], frames[row], s)
        assert empty > 20 and made < most, (row, empty, made)
    for gap, made, true in zip(missing, filled, audio):
        if gap.any():
            assert 0.8 < np.sqrt(np.mean(made[gap] ** 2) / np.mean(true[gap] ** 2)) < 1.2


def test_other_levels_bring_another_audio(seconds):
    """The level is followed, not the context: ten decibels less in the gap are heard as ten decibels less."""
    s, audio, missing, _, filled = seconds
    quiet = log_mel(audio * np.float32(10**-0.5), s)
    softer = np.asarray(griffin_lim.inpaint_gap(quiet, np.where(missing, 0, audio), missing, s, seeds=SEEDS))
    middle = slice(4 * audio.shape[1] // 10, 6 * audio.shape[1] // 10)
    for row in (0, 2):
        drop = 10 * np.log10(np.mean(np.float64(filled[row, middle]) ** 2) / np.mean(np.float64(softer[row, middle]) ** 2))
        assert drop == pytest.approx(10, abs=1.5)


def test_gaps_at_the_ends_of_a_clip_do_not_burst(seconds):
    """The outermost samples are seen by the foot of one window alone: dividing by it must not blow them up."""
    _, audio, missing, _, filled = seconds
    for made, true, gap in zip(np.abs(filled), np.abs(audio), missing):
        if gap.any():
            assert made[gap].max() < 2 * true[gap].max()


def test_de_emphasis_meets_the_far_edge():
    """An offset that the levels do not tell of would be a step of its own size where the known samples begin again."""
    audio, missing = second_of_audio(PAPER)
    audio += np.float32(0.2)
    filled = np.asarray(griffin_lim.inpaint_gap(log_mel(audio, PAPER), np.where(missing, 0, audio), missing, PAPER, seeds=SEEDS))
    change = np.diff(missing[4].astype(int))
    steps, usual = np.abs(np.diff(filled[4])), np.abs(np.diff(audio[4]))
    assert (change == -1).sum() == 2 and steps[change == -1].max() < np.quantile(usual, 0.9)
    assert steps[change == 1].max() < np.quantile(usual, 0.98)


# ---- where the gap is ------------------------------------------------------------------------------------------------------------


def test_frames_out_of_reach_change_nothing(seconds):
    """The iterations run over the frames that a gap reaches: the levels of all others are not looked at."""
    s, audio, missing, level, _ = seconds
    missing = np.zeros_like(missing)
    missing[0, :50] = missing[1, -50:] = missing[2, 4000:4400] = missing[3, 1000:1010] = missing[3, 1500:1600] = True
    known = np.where(missing, 0, audio)
    filled = np.asarray(griffin_lim.inpaint_gap(level, known, missing, s, seeds=SEEDS))
    reached = np.asarray(stft.frames_holding(missing | np.pad(missing, ((0, 0), (1, 0)))[:, :-1], s))
    elsewhere = np.where(reached[..., None], level, stft.silence_level(s) + 0.5)
    np.testing.assert_array_equal(griffin_lim.inpaint_gap(elsewhere, known, missing, s, seeds=SEEDS), filled)
    assert (filled[~missing] == audio[~missing]).all() and np.isfinite(filled).all()
    for made, true, gap in zip(filled[:4], audio, missing):
        assert np.abs(made[gap]).max() < 2 * np.abs(true).max()


def test_the_span_of_frames_does_not_show(seconds):
    """A short gap is worked on in few frames; beside a clip that is lost altogether it is worked on in all: the same sound."""
    s, audio, missing, level, _ = seconds
    missing = np.zeros_like(missing)
    missing[:, s.rate // 3 : s.rate // 3 + s.rate // 20] = True
    short = np.asarray(griffin_lim.inpaint_gap(level, np.where(missing, 0, audio), missing, s, seeds=SEEDS))
    missing[4] = True
    beside = np.asarray(griffin_lim.inpaint_gap(level, np.where(missing, 0, audio), missing, s, seeds=SEEDS))
    np.testing.assert_allclose(beside[:4], short[:4], atol=1e-3)
    assert (beside[4] != audio[4]).all()


# ---- whole clips -----------------------------------------------------------------------------------------------------------------


def convergence(made, magnitude, s):
    """librosa's spectral convergence: relative distance of the magnitudes (F, bins) of a sound from those asked for."""
    found = np.abs(librosa.stft(np.float64(made), n_fft=s.n_fft, hop_length=s.hop, win_length=s.window)).T
    return np.linalg.norm(found - magnitude) / np.linalg.norm(magnitude)


@pytest.mark.parametrize(("s", "iterations", "momentum"), [(PAPER, 32, 0.99), (WIDE, 32, 0.99), (PAPER, 32, 0.0)])
def test_griffin_lim_converges_as_librosas(s, iterations, momentum):
    """The same magnitudes, iterations and momentum, 24 random beginnings of each: no worse, but for chance."""
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


def test_momentum_saves_three_iterations_of_four():
    """Perraudin et al. 2013: 30 with momentum come as near as 120 without."""
    magnitude = jnp.abs(stft.stft(np.float32(buzz(8_000, 8_000)), PAPER))
    stack, seeds = jnp.tile(magnitude, (8, 1, 1)), np.arange(8, dtype=np.uint32)
    fast, slow = (
        griffin_lim.griffin_lim(stack, PAPER, length=8_000, seeds=seeds, iterations=n, momentum=m)
        for n, m in ((30, 0.99), (120, 0.0))
    )
    fast, slow = (np.mean([convergence(x, magnitude, PAPER) for x in made]) for made in (fast, slow))
    assert fast < 1.05 * slow, (fast, slow)


def test_griffin_lim_refuses_another_number_of_frames():
    with pytest.raises(ValueError, match="50 frames for 8000 samples, expected 51"):
        griffin_lim.griffin_lim(np.ones((1, 50, 256), np.float32), PAPER, length=8_000, seeds=SEEDS[:1])


def test_whole_clips_and_splices(seconds):
    """Nothing known is used; a splice is cut in hard, and is the recording elsewhere."""
    s, audio, missing, level, _ = seconds
    n = audio.shape[1]
    whole = np.asarray(griffin_lim.whole_clip(level, s, length=n, seeds=SEEDS))
    middle = np.zeros((5, level.shape[1]), bool)
    middle[:, 5:-5] = True
    assert whole.shape == audio.shape and level_error_db(whole[1:3], audio[1:3], middle[1:3], s) < 2.5
    moved = np.asarray(griffin_lim.whole_clip(level[::-1], s, length=n, seeds=SEEDS[::-1]))[::-1]
    np.testing.assert_allclose(moved[2], whole[2], atol=2e-2)
    cut = np.asarray(griffin_lim.splice(level, np.where(missing, np.nan, audio).astype(np.float32), missing, s, seeds=SEEDS))
    np.testing.assert_array_equal(cut, np.where(missing, whole, audio))


# ---- the paper's inversion -------------------------------------------------------------------------------------------------------


def paper_chain(level, s):
    """The paper's inversion of a level (F, K) up to its Griffin-Lim, in numpy and librosa: magnitudes (bins, F)."""
    decibel = np.clip(np.float64(level), 0, 1) * 80 - 80
    basis = librosa.filters.mel(sr=s.rate, n_fft=s.n_fft, n_mels=s.bands)
    return np.maximum(1e-10, np.linalg.pinv(basis) @ 10 ** (decibel.T / 20)) ** 1.5


def test_papers_magnitudes_are_numpys():
    level = np.asarray(log_mel(np.float32(buzz(8_000, 8_000))[None], PAPER))
    expected = paper_chain(level[0], PAPER)
    found = np.asarray(griffin_lim.paper_magnitude(level, PAPER))[0].T
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())


def test_papers_inversion_is_librosas():
    """As loud, as consistent, and with the de-emphasis of scipy: the phases' beginning alone is another."""
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
    """Never negative, and its mel is nearer to the mel asked for, in nearly every frame of a buzz and in silence."""
    basis = librosa.filters.mel(sr=preset.rate, n_fft=preset.n_fft, n_mels=preset.bands).astype(np.float64)
    audio = np.float32(buzz(preset.rate, preset.rate))
    bands = (np.abs(librosa.stft(audio, n_fft=preset.n_fft, hop_length=preset.hop, win_length=preset.window)).T @ basis.T)[None]
    bands[:, -9:] = 0
    found = np.asarray(jax.jit(griffin_lim.mel_to_magnitude, static_argnums=1)(np.float32(bands), preset)).astype(np.float64)
    assert found.shape == (*bands.shape[:-1], preset.n_fft // 2 + 1)
    assert (found >= 0).all() and np.isfinite(found).all() and found[:, -9:].max() < 1e-6
    plain = np.maximum(bands @ np.linalg.pinv(basis).T, 0)
    length = np.maximum(np.linalg.norm(bands, axis=-1), 1e-3)
    ours, theirs = (np.linalg.norm(m @ basis.T - bands, axis=-1) / length for m in (found, plain))
    assert (ours <= np.maximum(theirs, 1e-5)).mean() > 0.95 and ours.mean() < 0.5 * theirs.mean(), (ours.mean(), theirs.mean())


def test_linear_bands_are_the_magnitude():
    bands = np.float32([[[0.5] * 256 + [-0.1]]])
    np.testing.assert_array_equal(griffin_lim.mel_to_magnitude(jnp.asarray(bands), MORRONE), np.maximum(bands, 0))


def test_mel_inversion_comes_near_scipys():
    """scipy's active-set NNLS is exact. Of bands that no spectrum has, drawn at random, it leaves a part; ours leaves hardly more,
    and less than half of what the floored pseudo-inverse leaves beyond that.
    """
    basis = librosa.filters.mel(sr=WIDE.rate, n_fft=WIDE.n_fft, n_mels=WIDE.bands).astype(np.float64)
    bands = np.random.default_rng(0).lognormal(-3, 2, (6, WIDE.bands))
    least = np.array([optimize.nnls(basis, row)[1] for row in bands])
    found = np.asarray(griffin_lim.mel_to_magnitude(jnp.asarray(bands[None], jnp.float32), WIDE))[0]
    left = np.linalg.norm(found @ basis.T - bands, axis=-1)
    plain = np.linalg.norm(np.maximum(bands @ np.linalg.pinv(basis).T, 0) @ basis.T - bands, axis=-1)
    size = np.linalg.norm(bands, axis=-1)
    ours, theirs = (left - least) / size, (plain - least) / size
    assert (ours > -1e-4).all() and (ours < 0.08).all() and ours.mean() < 0.4 * theirs.mean(), (ours, theirs)
