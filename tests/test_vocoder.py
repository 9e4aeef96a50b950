"""Filling gaps: known samples untouched, the asked-for level met, seams without a click; Griffin-Lim against librosa's."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pystoi
import pytest

from avsi_jax import gaps, media, spec, stft, vocoder

PAPER, WIDE, MORRONE = PRESETS = [spec.get(name) for name in ("paper", "wide", "morrone")]

log_mel = jax.jit(stft.log_mel, static_argnums=1)


def level_error_db(found, wanted, frames, s):
    """Mean |difference| in dB of the levels of two sounds (B, N) over the marked frames, floored at -80 dB."""
    one, two = (np.asarray(stft.to_db(log_mel(x, s), s)) for x in (found, wanted))
    return np.abs(one - two)[frames].mean()


def touched(lost, s):
    """Frames that hold a lost sample of the preset's rate."""
    return np.asarray(log_mel(np.where(lost, 1.0, 0.0).astype(np.float32), s) != stft.silence_level(s)).any(-1)


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


def second_of_sound(s):
    """(5, N) sounds over a little noise, (5, N) lost: inside, at both ends, all, nothing, two stretches with one sample between.

    N is about a second, odd, and its last window ends where that of the paper's clip does.
    """
    n, rng = s.rate - 17, np.random.default_rng(0)
    sound = [tones(n, s.rate), buzz(n, s.rate), rng.normal(0, 0.1, n), tones(n, s.rate), buzz(n, s.rate)]
    sound = np.float32(sound + rng.normal(0, 1e-3, (5, n)))
    lost = np.zeros((5, n), bool)
    lost[0, 3 * n // 10 : 7 * n // 10] = True
    lost[1, : n // 5] = lost[1, 9 * n // 10 :] = True
    lost[2] = True
    lost[4, n // 4 : n // 2] = True
    lost[4, 3 * n // 8] = False
    return sound, lost


SEEDS = np.uint32([1, 2, 3, 4, 2**32 - 1])


@pytest.fixture(scope="module", params=PRESETS, ids=lambda s: s.name)
def seconds(request):
    """(preset, true sound, lost, true level, filled)."""
    s = request.param
    sound, lost = second_of_sound(s)
    level = np.asarray(log_mel(sound, s))
    filled = vocoder.fill_gap(level, np.where(lost, 0, sound), lost, s, seeds=SEEDS)
    return s, sound, lost, level, np.asarray(filled)


def test_known_samples_are_kept_bit_for_bit(seconds):
    _, sound, lost, _, filled = seconds
    assert filled.dtype == np.float32 and np.isfinite(filled).all()
    np.testing.assert_array_equal(filled[~lost], sound[~lost])
    np.testing.assert_array_equal(filled[3], sound[3])  # nothing was lost
    assert (filled[:, 1:-1][lost[:, 1:-1]] != 0).all()  # windows that are not centred do not see the first sample


def test_the_result_is_a_function_of_its_arguments(seconds):
    s, sound, lost, level, filled = seconds
    np.testing.assert_array_equal(vocoder.fill_gap(level, np.where(lost, 0, sound), lost, s, seeds=SEEDS), filled)
    for hidden in (np.nan, 0.7):  # what stood in the gap is not looked at
        known = np.where(lost, hidden, sound).astype(np.float32)
        np.testing.assert_array_equal(vocoder.fill_gap(level, known, lost, s, seeds=SEEDS), filled)
    other = np.asarray(vocoder.fill_gap(level, np.where(lost, 0, sound), lost, s, seeds=SEEDS + np.uint32(7)))
    assert [(a != b).any() for a, b in zip(other, filled)] == [True, True, True, False, True]


def test_a_clip_sounds_the_same_in_any_batch(seconds):
    s, sound, lost, level, filled = seconds
    known = np.where(lost, 0, sound)
    order = [4, 2, 0, 1, 3]
    moved = vocoder.fill_gap(level[order], known[order], lost[order], s, seeds=SEEDS[order])
    np.testing.assert_allclose(moved, filled[order], atol=1e-3)  # a sum may round by one unit, sixty iterations make more of it
    for row in (slice(0, 1), slice(1, 2)):
        alone = vocoder.fill_gap(level[row], known[row], lost[row], s, seeds=SEEDS[row])
        np.testing.assert_allclose(alone, filled[row], atol=1e-3)


def test_true_levels_bring_the_sound_back(seconds):
    """400 ms of tones, 250 of buzz: nearly the true log-mel, the valleys between tones too, where an empty gap is far off."""
    s, sound, lost, _, filled = seconds
    frames = touched(lost, s)
    for row, most in ((slice(0, 1), 4), (slice(4, 5), 1.5)):
        empty = level_error_db(np.where(lost, 0, sound)[row], sound[row], frames[row], s)
        made = level_error_db(filled[row], sound[row], frames[row], s)
        assert empty > 20 and made < most, (row, empty, made)
    for hole, made, true in zip(lost, filled, sound):
        if hole.any():
            assert 0.8 < np.sqrt(np.mean(made[hole] ** 2) / np.mean(true[hole] ** 2)) < 1.2


def test_other_levels_bring_another_sound(seconds):
    """The level is followed, not the context: ten decibels less in the gap are heard as ten decibels less."""
    s, sound, lost, _, filled = seconds
    quiet = log_mel(sound * np.float32(10**-0.5), s)
    softer = np.asarray(vocoder.fill_gap(quiet, np.where(lost, 0, sound), lost, s, seeds=SEEDS))
    middle = slice(4 * sound.shape[1] // 10, 6 * sound.shape[1] // 10)
    for row in (0, 2):
        drop = 10 * np.log10(np.mean(np.float64(filled[row, middle]) ** 2) / np.mean(np.float64(softer[row, middle]) ** 2))
        assert drop == pytest.approx(10, abs=1.5)


def test_gaps_at_the_ends_of_a_clip_do_not_burst(seconds):
    """The outermost samples are seen by the foot of one window alone: dividing by it must not blow them up."""
    _, sound, lost, _, filled = seconds
    for made, true, hole in zip(np.abs(filled), np.abs(sound), lost):
        if hole.any():
            assert made[hole].max() < 2 * true[hole].max()


def test_de_emphasis_meets_the_far_edge():
    """An offset that the levels do not tell of would be a step of its own size where the known samples begin again."""
    sound, lost = second_of_sound(PAPER)
    sound += np.float32(0.2)
    filled = np.asarray(vocoder.fill_gap(log_mel(sound, PAPER), np.where(lost, 0, sound), lost, PAPER, seeds=SEEDS))
    edges = np.flatnonzero(np.diff(lost[4].astype(int)))
    assert len(edges) == 4
    assert np.abs(np.diff(filled[4]))[edges].max() < np.quantile(np.abs(np.diff(sound[4])), 0.95)


# ---- real clips ----------------------------------------------------------------------------------------------------------------

CLIPS = 4
GAP_MS = 900


def alignment_of(path):
    return path.parent.parent / "alignments" / path.parent.name / f"{path.stem}.align"


def speech_of(path):
    """Start of the first and end of the last word in s, from the .align beside the clips."""
    lines = alignment_of(path).read_text().splitlines()
    words = [line.split() for line in lines if line.split()[2] not in ("sil", "sp")]
    return int(words[0][0]) / 25_000, int(words[-1][1]) / 25_000


@pytest.fixture(scope="module")
def recordings(grid_dir):
    """The first clips of four speakers: (4, 48000) float32 at 16 kHz, and their gaps (4, 1, 2) inside the words."""
    aligned = [p for p in sorted(grid_dir.glob("s*/*.mpg")) if alignment_of(p).exists()]
    paths = list({p.parent: p for p in reversed(aligned)}.values())[-CLIPS:]
    if len(paths) < CLIPS:
        pytest.skip(f"needs aligned .mpg clips of {CLIPS} speakers: found {len(paths)} in {grid_dir}")
    sounds = [media.read_clip(path, pictures=False).sound for path in paths]
    at_record_rate = [media.resample(media.mono(s.samples), s.rate, spec.RECORD_RATE) for s in sounds]
    gap = [[gaps.place_in_speech(p.stem, GAP_MS, speech_of(p), 47_600)] for p in paths]
    return np.stack([np.pad(x, (0, 48_000 - len(x))) for x in at_record_rate]), np.int32(gap)


@pytest.fixture(scope="module", params=[PAPER, WIDE], ids=lambda s: s.name)
def restored(request, recordings):
    """(preset, true sound, what is known of it, lost, filled from the true level), all at the preset's rate."""
    s = request.param
    record = jnp.asarray(recordings[0][:, : s.record_samples])
    lost = gaps.lost_samples(jnp.asarray(recordings[1]), s.record_samples)
    sound, known = stft.decimate(record, s), stft.decimate(gaps.damage(record, lost), s)
    lost = gaps.lost_at_preset(lost, s)
    filled = vocoder.fill_gap(log_mel(sound, s), known, lost, s, seeds=SEEDS[:CLIPS])
    return s, *(np.asarray(a) for a in (sound, known, lost, filled))


def test_true_mel_is_understood(restored):
    """STOI (pystoi) of the whole clip with 900 ms of its words filled from their true log-mel; an empty gap has about 0.5."""
    s, sound, known, lost, filled = restored
    scores = [pystoi.stoi(a, b, s.rate) for a, b in zip(sound, filled)]
    empty = [pystoi.stoi(a, b, s.rate) for a, b in zip(sound, known)]
    assert np.mean(scores) > 0.9 and np.mean(empty) < 0.7, (scores, empty)
    assert level_error_db(filled, sound, touched(lost, s), s) < 1.5


def test_seams_do_not_click(restored):
    """No step at an edge of a gap is larger than what one in a thousand of the clip's own steps is."""
    _, sound, _, lost, filled = restored
    for clip, hole, made in zip(sound, lost, filled):
        edges = np.flatnonzero(np.diff(hole.astype(int)))
        assert len(edges) == 2
        assert np.abs(np.diff(made))[edges].max() < np.quantile(np.abs(np.diff(clip)), 0.999)


def test_real_clips_keep_their_known_samples_and_loudness(restored):
    _, sound, known, lost, filled = restored
    np.testing.assert_array_equal(filled[~lost], known[~lost])
    for clip, hole, made in zip(sound, lost, filled):
        ratio = np.sqrt(np.mean(made[hole] ** 2) / np.mean(clip[hole] ** 2))
        assert 0.9 < ratio < 1.1


def test_griffin_lim_converges_as_librosas(recordings):
    """Spectral convergence after 60 iterations at momentum 0.99, one clip, mean over eight random beginnings."""
    s, repeats = PAPER, 8
    sound = stft.decimate(jnp.asarray(recordings[0][1:2, : s.record_samples]), s)
    magnitude = np.asarray(jnp.abs(stft.stft(sound, s)))[0]
    options = {"hop_length": s.hop, "win_length": s.window, "n_fft": s.n_fft}

    def convergence(x):
        found = np.abs(librosa.stft(np.float64(x), **options)).T
        return np.linalg.norm(found - magnitude) / np.linalg.norm(magnitude)

    stack = np.tile(magnitude, (repeats, 1, 1))
    ours = vocoder.griffin_lim(stack, s, length=s.num_samples, key=jax.random.key(0), iterations=60, momentum=0.99)
    assert ours.shape == (repeats, s.num_samples)
    theirs = [
        librosa.griffinlim(magnitude.T, n_iter=60, momentum=0.99, length=s.num_samples, random_state=seed, **options)
        for seed in range(repeats)
    ]
    ours, theirs = (np.mean([convergence(x) for x in y]) for y in (np.asarray(ours), theirs))
    assert ours < 1.1 * theirs, (ours, theirs)


# ---- mel to magnitude ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [PAPER, WIDE], ids=lambda s: s.name)
def test_mel_inversion_beats_the_floored_pseudo_inverse(preset):
    """Never negative, and its mel is nearer to the mel asked for, in nearly every frame of a buzz and in silence."""
    basis = librosa.filters.mel(sr=preset.rate, n_fft=preset.n_fft, n_mels=preset.bands).astype(np.float64)
    sound = np.float32(buzz(preset.rate, preset.rate))
    bands = (np.abs(librosa.stft(sound, n_fft=preset.n_fft, hop_length=preset.hop, win_length=preset.window)).T @ basis.T)[None]
    bands[:, -9:] = 0
    found = np.asarray(jax.jit(vocoder.mel_to_magnitude, static_argnums=1)(np.float32(bands), preset)).astype(np.float64)
    assert found.shape == (*bands.shape[:-1], preset.n_fft // 2 + 1)
    assert (found >= 0).all() and np.isfinite(found).all() and found[:, -9:].max() < 1e-6
    plain = np.maximum(bands @ np.linalg.pinv(basis).T, 0)
    length = np.maximum(np.linalg.norm(bands, axis=-1), 1e-3)
    ours, theirs = (np.linalg.norm(m @ basis.T - bands, axis=-1) / length for m in (found, plain))
    assert (ours <= np.maximum(theirs, 1e-5)).mean() > 0.98 and ours.mean() < 0.3 * theirs.mean(), (ours.mean(), theirs.mean())


def test_linear_bands_are_the_magnitude():
    bands = np.float32([[[0.5] * 256 + [-0.1]]])
    np.testing.assert_array_equal(vocoder.mel_to_magnitude(jnp.asarray(bands), MORRONE), np.maximum(bands, 0))
