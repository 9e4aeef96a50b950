"""Inpainter: samples inside a gap change nothing, samples outside are unchanged, landmarks match the audio in time.

The networks are tiny and untrained, except for an output bias that predicts -48 dB in every band, so that their output is audible.
How good trained networks are is measured by avsi-evaluate.
"""

import dataclasses
import pickle

import numpy as np
import pytest

from avsi_jax.inpainting import api, masked_audio
from avsi_jax.media import clip_io
from tests.support.inpainting_fakes import (
    LOUD,
    FakeTracker,
    RecordingRestorer,
    always_visible,
    audible_restorer,
    gap_mask,
    loudness,
    make_clip,
    voice,
)  # fmt: skip


@pytest.fixture(scope="module")
def audio_only(tiny_config):
    """Inpainter with an audio-only system."""
    return api.Inpainter(audible_restorer(tiny_config(system="a_si")))


@pytest.fixture(scope="module")
def audio_visual(tiny_config):
    """Inpainter with an audio-visual system, and the real face tracker."""
    return api.Inpainter(audible_restorer(tiny_config()))


@pytest.fixture
def fake_lips(audio_visual):
    """An audio-visual system with a fake tracker: the video needs no face."""
    inpainter = api.Inpainter(audio_visual.restorer)
    inpainter._tracker, inpainter._mouth_visible = FakeTracker(), always_visible
    return inpainter


# ----------------------------------------------------------------------------------------------------------- restored audio

GAPS = {
    "middle": [(0.9, 1.7)],
    "start": [(0.0, 0.4)],
    "end": [(2.4, 2.978)],
    "several": [(1.9, 2.0), (0.3, 0.5), (1.0, 1.35)],
    "adjacent": [(0.5, 0.75), (0.75, 1.0)],
}


@pytest.mark.parametrize("gaps", GAPS.values(), ids=GAPS)
def test_gaps_are_restored_and_other_samples_unchanged(audio_only, gaps):
    samples = voice(2.978, 44_100, channels=2)
    before = samples.copy()
    repair = audio_only.inpaint(make_clip(samples, 44_100), gaps)
    mask = gap_mask(gaps, len(samples), 44_100)
    np.testing.assert_array_equal(samples, before, err_msg="the input array was changed")
    np.testing.assert_array_equal(repair.samples[~mask], before[~mask])
    assert repair.samples.shape == before.shape and repair.samples.dtype == np.float32
    assert (repair.rate, repair.subtype, repair.warnings) == (44_100, "PCM_16", ())
    for start, end in gaps:
        part = repair.samples[round(start * 44_100) : round(end * 44_100)]
        assert -60 < loudness(part[:, 0]) < 0, "silence, or too loud"
        peaks = np.abs(part[:, 0]).reshape(-1)[: len(part) // 441 * 441].reshape(-1, 441).max(1)
        assert peaks.min() > 1e-5, "10 ms of silence inside the gap"


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (16_000, 1), (22_050, 1), (48_000, 2)])
def test_samples_outside_gaps_are_unchanged_at_every_rate(audio_only, rate, channels):
    samples = voice(2.5, rate, channels=channels)
    repair = audio_only.inpaint(make_clip(samples, rate), [(0.8, 1.3), (2.3, 2.5)])
    mask = gap_mask([(0.8, 1.3), (2.3, 2.5)], len(samples), rate)
    np.testing.assert_array_equal(repair.samples[~mask], samples[~mask])
    assert repair.samples.shape == samples.shape and repair.rate == rate
    assert all(-60 < loudness(repair.samples[mask, c]) < 0 for c in range(channels))


def test_restored_channels_keep_their_balance(audio_only):
    """The second channel has half the amplitude of the first, in the gap too."""
    samples = voice(2.5, 48_000, channels=2)
    part = audio_only.inpaint(make_clip(samples, 48_000), [(0.8, 1.3)]).samples[38_400:62_400]
    assert loudness(part[:, 0]) - loudness(part[:, 1]) == pytest.approx(20 * np.log10(2), abs=0.1)


def test_a_silent_channel_stays_silent(audio_only):
    samples = voice(2.5, 16_000, channels=2)
    samples[:, 1] = 0
    repair = audio_only.inpaint(make_clip(samples, 16_000), [(0.8, 1.3)])
    assert not repair.samples[:, 1].any() and loudness(repair.samples[12_800:20_800, 0]) > -60


def test_a_clip_shorter_than_a_window_is_restored(audio_only):
    samples = voice(0.6, 16_000)
    repair = audio_only.inpaint(make_clip(samples, 16_000), [(0.2, 0.4)])
    mask = gap_mask([(0.2, 0.4)], len(samples), 16_000)
    np.testing.assert_array_equal(repair.samples[~mask], samples[~mask])
    assert repair.samples[mask].any()


# --------------------------------------------------------------------------------------------------- samples inside the gaps


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_samples_inside_a_gap_of_a_file_change_nothing(audio_only, rate, tmp_path):
    samples, gaps = voice(2.9, rate, channels=2), [(0.0, 0.2), (0.9, 1.7)]
    mask = gap_mask(gaps, len(samples), rate)
    repairs = []
    for name, inside in (("a", samples), ("b", 0), ("c", np.random.default_rng(0).uniform(-1, 1, samples.shape))):
        clip_io.write_audio(tmp_path / f"{name}.wav", np.where(mask[:, None], inside, samples), rate)
        repairs.append(audio_only.inpaint(tmp_path / f"{name}.wav", gaps).samples)
    np.testing.assert_array_equal(repairs[0], repairs[1])
    np.testing.assert_array_equal(repairs[0], repairs[2])


def test_samples_inside_a_gap_of_a_clip_with_video_change_nothing(fake_lips):
    samples, gaps = voice(2.9, 48_000), [(0.9, 1.7)]
    noisy = samples.copy()
    noisy[gap_mask(gaps, len(samples), 48_000)] = 0.7
    a, b = (fake_lips.inpaint(make_clip(x, 48_000, num_video_frames=73), gaps) for x in (samples, noisy))
    np.testing.assert_array_equal(a.samples, b.samples)
    assert a.transcript == b.transcript and a.warnings == ("half a face",)


def test_nan_inside_a_gap_changes_nothing(audio_only):
    samples, gaps = voice(2.9, 16_000), [(0.9, 1.7)]
    expected = audio_only.inpaint(make_clip(samples, 16_000), gaps).samples
    samples[gap_mask(gaps, len(samples), 16_000)] = np.nan
    np.testing.assert_array_equal(audio_only.inpaint(make_clip(samples, 16_000), gaps).samples, expected)


# -------------------------------------------------------------------------------------------------------------- long clips

LATE_GAPS = [(0.5, 0.8), (4.2, 5.1), (5.4, 5.6), (8.5, 8.7)]


@pytest.mark.slow
def test_gaps_of_a_long_clip_are_restored_from_audio(audio_only):
    samples = voice(8.7, 16_000)
    repair = audio_only.inpaint(make_clip(samples, 16_000), LATE_GAPS)
    mask = gap_mask(LATE_GAPS, len(samples), 16_000)
    np.testing.assert_array_equal(repair.samples[~mask], samples[~mask])
    for start, end in LATE_GAPS:
        assert -60 < loudness(repair.samples[round(start * 16_000) : round(end * 16_000)]) < 0


@pytest.mark.slow
def test_gaps_of_a_long_clip_are_restored_from_audio_and_video(fake_lips):
    samples = voice(8.7, 16_000)
    repair = fake_lips.inpaint(make_clip(samples, 16_000, num_video_frames=217), LATE_GAPS)
    mask = gap_mask(LATE_GAPS, len(samples), 16_000)
    np.testing.assert_array_equal(repair.samples[~mask], samples[~mask])
    assert all(repair.samples[round(a * 16_000) : round(b * 16_000)].any() for a, b in LATE_GAPS)


def test_a_gap_after_the_end_of_the_video_is_restored(fake_lips):
    samples = voice(8.7, 16_000)
    repair = fake_lips.inpaint(make_clip(samples, 16_000, num_video_frames=60), [(7.0, 7.5)])
    assert repair.samples[112_000:120_000].any()


def test_the_position_of_a_gap_does_not_matter(audio_only):
    """Only the audio around it does: the voice repeats every 2.9 s, and so do the windows."""
    long = LOUD * voice(8.7, 16_000)
    shift = 2 * 46_400  # samples
    a, b = (audio_only.inpaint(make_clip(long, 16_000), [(2.0 + s, 2.5 + s)]).samples[:, 0] for s in (1.45, 1.45 + 2.9))
    n = slice(round(3.45 * 16_000), round(3.95 * 16_000))
    later = slice(n.start + shift // 2, n.stop + shift // 2)
    assert np.abs(a[n] - b[later]).max() < 1e-2 * np.abs(a[n]).max()


@pytest.mark.parametrize(("fps", "start_s"), [(25.0, 0.0), (25.0, 0.2), (30.0, -0.1)])
@pytest.mark.parametrize("gap", [(0.1, 0.3), (4.0, 4.4), (8.0, 8.6)])
def test_landmarks_are_aligned_with_the_audio(audio_visual, fps, start_s, gap):
    """Landmarks are at the number of their frame: in every frame of a window the network must get the number of that moment.

    Video that starts `start_s` late in the container belongs to audio that is `start_s` later.
    """
    from avsi_jax.data import features

    recording = RecordingRestorer(audio_visual.restorer, [])
    inpainter = api.Inpainter(recording)
    inpainter._tracker, inpainter._mouth_visible = FakeTracker(lambda t: 1.0 * t), always_visible
    samples = voice(8.7, 16_000)
    clip = make_clip(samples, 16_000, num_video_frames=round(8.7 * fps), fps=fps, start_s=start_s)
    inpainter.inpaint(clip, [gap])
    (batch, spans), spec = recording.batches[0], audio_visual.restorer.spec
    numbers = features.interpolate(batch["landmarks"][..., 0, :1], features.video_positions(batch, spec))[0, :, 0]
    first_s = gap[0] - (spans[0, 0, 0] + masked_audio.GUARD) / 16_000 if spans[0, 0, 0] else 0.0  # where the window begins
    audio_s = first_s + np.arange(spec.num_frames) * 0.02
    expected = np.clip((audio_s - start_s) * fps, 0, round(8.7 * fps) - 1)
    np.testing.assert_allclose(numbers, expected, atol=0.02)


def test_frames_with_a_covered_mouth_are_invalid_and_interpolated(audio_visual, fake_lips):
    inpainter, hidden = fake_lips, np.isin(np.arange(75), range(20, 30))
    inpainter._tracker, inpainter._mouth_visible = FakeTracker(lambda t: 1.0 * t**2), lambda rgb, landmarks: ~hidden
    recording = RecordingRestorer(audio_visual.restorer, [])
    inpainter.restorer = recording
    clip = make_clip(voice(2.98, 16_000), 16_000, num_video_frames=75)
    repair = inpainter.inpaint(clip, [(0.8, 1.4)])
    batch = recording.batches[0][0]
    np.testing.assert_array_equal(batch["landmarks_valid"][0, :75], ~hidden)
    straight = np.interp(np.arange(75), np.flatnonzero(~hidden), np.flatnonzero(~hidden) ** 2.0)
    np.testing.assert_allclose(batch["landmarks"][0, :75, 0, 0], straight, rtol=1e-5)
    assert len(repair.warnings) == 2 and "mouth" in repair.warnings[1] and "10 of 75" in repair.warnings[1]
    inpainter._mouth_visible = lambda rgb, landmarks: np.zeros(75, bool)
    inpainter.inpaint(clip, [(0.8, 1.4)])
    batch = recording.batches[-1][0]
    assert not batch["landmarks_valid"].any() and np.isfinite(batch["landmarks"]).all()


@pytest.mark.slow
def test_the_other_clips_of_a_batch_change_nothing(audio_only):
    """Not a bit, for the same number of windows: neither their audio, level, length and gaps, nor the order."""
    clip, gaps = make_clip(voice(2.9, 16_000), 16_000), [(0.9, 1.7)]
    quiet, short = make_clip(voice(2.9, 16_000, seed=1) / 100, 16_000), make_clip(voice(1.9, 8_000, seed=2), 8_000)
    others = [(quiet, [(0.1, 0.3)]), (short, [(0, 1.5)])]
    repairs = [audio_only.inpaint_batch([clip, other], [gaps, own])[0] for other, own in others]
    repairs.append(audio_only.inpaint_batch([others[0][0], clip], [others[0][1], gaps])[1])
    for repair in repairs[1:]:
        np.testing.assert_array_equal(repair.samples, repairs[0].samples)
        np.testing.assert_array_equal(repair.restored_log_mel, repairs[0].restored_log_mel)
    alone = audio_only.inpaint(clip, gaps).samples
    mask = gap_mask(gaps, len(alone), 16_000)
    np.testing.assert_array_equal(repairs[0].samples[~mask], alone[~mask])
    np.testing.assert_allclose(repairs[0].samples, alone, atol=2e-3)


# ------------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("gaps", "named"),
    [
        ([], "--gap"),
        ([(1.7, 0.9)], "gap 1.7-0.9"),
        ([(0.5, 0.5)], "gap 0.5-0.5"),
        ([(-0.1, 0.5)], "gap -0.1-0.5"),
        ([(float("nan"), 0.5)], "gap nan-0.5"),
        ([(0.5, float("inf"))], "2.500 s"),
        ([(0.1, 0.2), (2.4, 2.6)], "gap 2.4-2.6 s"),
        ([(0.50001, 0.50002)], "16000 Hz"),
    ],
)
def test_gaps_that_do_not_fit_the_clip_are_an_error_of_one_line(audio_only, gaps, named):
    with pytest.raises(ValueError) as error:
        audio_only.inpaint(make_clip(voice(2.5, 16_000), 16_000), gaps)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_gap_longer_than_any_evaluated_is_restored_with_a_warning(audio_only):
    repair = audio_only.inpaint(make_clip(voice(2.978, 16_000), 16_000), [(0.5, 2.5)])
    assert len(repair.warnings) == 1 and "0.50-2.50 s" in repair.warnings[0]


def test_a_system_that_needs_video_refuses_audio_alone(audio_visual):
    with pytest.raises(clip_io.MediaError, match="av_mtl_s2s"):
        audio_visual.inpaint(make_clip(voice(1, 16_000), 16_000), [(0.2, 0.4)])


def test_an_unknown_value_for_gaps_is_an_error(audio_only):
    with pytest.raises(ValueError, match="'all'"):
        audio_only.inpaint(make_clip(voice(2.5, 16_000), 16_000), "all")


# ------------------------------------------------------------------------------------------------------- arrays, real clips


def test_arrays_are_accepted_as_clips(audio_only):
    samples, gaps = LOUD * voice(2.9, 16_000)[:, 0], [(0.9, 1.7)]
    floats = audio_only.inpaint(api.clip_of(samples, 16_000), gaps)
    integers = audio_only.inpaint(api.clip_of(clip_io.to_int16(samples), 16_000), gaps)
    assert floats.samples.shape == (46_400, 1) and floats.subtype == "FLOAT"
    np.testing.assert_allclose(floats.samples, integers.samples, atol=1e-3)
    for bad in (samples[None, None], samples > 0):
        with pytest.raises(ValueError, match="audio of shape"):
            api.clip_of(bad, 16_000)
    with pytest.raises(ValueError, match="video of shape"):
        api.clip_of(samples, 16_000, rgb=np.zeros((3, 4, 5), np.uint8))


@pytest.mark.parametrize(
    "samples, message",
    [
        (np.zeros((2, 48_000)), r"\(2, 48000\).*\(C, N\).*samples.T"),
        (np.zeros(48_000, np.uint8), "uint8.*- 128"),
        (np.zeros(0), "no samples"),
        (np.zeros((0, 2)), "no samples"),
        (np.zeros((5, 0)), "no samples"),
        (np.zeros(48_000, bool), "bool"),
        (np.zeros(48_000, np.uint16), "uint16"),
        (np.zeros(()), r"\(\)"),
    ],
)
def test_arrays_that_are_no_audio_are_one_clear_error(samples, message):
    with pytest.raises(ValueError, match=message) as error:
        api.clip_of(samples, 16_000)
    assert "\n" not in str(error.value)


def test_a_batch_needs_gaps_for_each_clip(audio_only):
    clips = [make_clip(voice(1, 16_000), 16_000)] * 2
    with pytest.raises(ValueError, match="2 clips and the gaps of 1"):
        audio_only.inpaint_batch(clips, [[(0.2, 0.4)]])


def test_an_array_in_place_of_a_clip_names_the_fix(audio_only):
    with pytest.raises(ValueError, match=r"ndarray.*clip_of\(samples, rate\)"):
        audio_only.inpaint(np.zeros(48_000), [(1.0, 1.3)])


def test_log_mels_equal_those_of_librosa(audio_only):
    """For masked and restored audio at 8 kHz."""
    import librosa

    samples = voice(2.5, 8_000)
    repair = audio_only.inpaint(make_clip(samples, 8_000), [(0.8, 1.3)])
    assert repair.frame_s == 0.02 and repair.masked_log_mel.shape == repair.restored_log_mel.shape == (126, 64)
    x = librosa.effects.preemphasis(repair.samples[:, 0], zi=[0.0])
    stft = np.abs(librosa.stft(x, n_fft=510, hop_length=160, win_length=320, pad_mode="constant"))
    expected = librosa.filters.mel(sr=8_000, n_fft=510, n_mels=64) @ stft
    expected = np.maximum(20 * np.log10(np.maximum(expected, 1e-5)), -80).T
    assert np.abs(repair.restored_log_mel - expected).mean() < 1.0  # resampled to 16 kHz and back
    assert (repair.masked_log_mel[42:63] == -80).all() and (repair.restored_log_mel[42:63].mean() > -70)


def test_a_real_clip_is_unchanged_outside_the_gap(audio_visual, grid_dir, tmp_path):
    """As decoded, and in the file that is written; samples inside the gap change nothing."""
    clip, gaps = clip_io.read_clip(grid_dir / "s1" / "bbaz5s.mpg"), [(0.93, 1.73)]
    mask = gap_mask(gaps, len(clip.audio.samples), 44_100)
    repair = audio_visual.inpaint(clip, gaps)
    np.testing.assert_array_equal(repair.samples[~mask], clip.audio.samples[~mask])
    assert -60 < loudness(repair.samples[mask]) < 0 and repair.samples.shape == (131_328, 2)
    clip_io.write_audio(tmp_path / "out.wav", repair.samples, repair.rate, repair.subtype)
    written = clip_io.read_clip(tmp_path / "out.wav").audio
    decoded = np.clip(np.rint(clip.audio.samples.astype(np.float64) * 32_768), -32_768, 32_767)
    np.testing.assert_array_equal(written.samples[~mask] * 32_768, decoded[~mask])
    other = clip.audio.samples.copy()
    other[mask] = 0.5
    again = audio_visual.inpaint(dataclasses.replace(clip, audio=dataclasses.replace(clip.audio, samples=other)), gaps)
    np.testing.assert_array_equal(again.samples, repair.samples)


def test_the_package_exports_the_public_classes():
    import avsi_jax

    for name in ("Inpainter", "Repair", "FileRepair", "Gap"):
        assert getattr(avsi_jax, name) is getattr(api, name)


@pytest.mark.slow
def test_the_examples_in_the_docstrings_run():
    import doctest

    result = doctest.testmod(api)
    assert result.attempted > 8 and result.failed == 0


# ------------------------------------------------------------------------------------------------------------ use in Python


def test_a_result_is_saved_in_its_own_sample_format_and_never_over_a_file_by_accident(audio_only, tmp_path):
    repair = audio_only.inpaint(make_clip(voice(2.5, 22_050, channels=2), 22_050), [(0.8, 1.3)])
    path = repair.save(tmp_path / "restored.wav")
    written = clip_io.read_clip(path).audio
    assert (written.rate, written.subtype) == (22_050, "PCM_16") and written.samples.shape == repair.samples.shape
    assert np.abs(written.samples - repair.samples).max() <= 1 / 65_536
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="restored.wav exists; pass overwrite=True"):
        repair.save(path)
    assert path.read_bytes() == before and repair.save(path, overwrite=True) == path
    with pytest.raises(clip_io.MediaError, match="found suffix '.mp3', expected .wav or .flac"):
        repair.save(tmp_path / "restored.mp3")


def test_a_result_is_shown_in_one_line_and_in_notebooks(audio_only):
    repair = audio_only.inpaint(make_clip(voice(2.5, 16_000), 16_000), [(0.8, 1.3)])
    assert repr(repair) == "Repair(2.50 s at 16000 Hz, gaps: 0.800-1.300 s, warnings: 0)"
    html = repair._repr_html_()
    assert html.count("<img ") == 2 and html.count("<audio ") == 1 and html.count("data:audio/flac;base64,") == 1


def test_an_inpainter_can_be_pickled(audio_only):
    """As multiprocessing does it: the copy gives the same samples, and has a tracker and a lock of its own."""
    clip = make_clip(voice(2.5, 16_000), 16_000)
    copy = pickle.loads(pickle.dumps(audio_only))
    assert copy._lock is not None and copy._lock is not audio_only._lock and copy.restorer.step == audio_only.restorer.step
    np.testing.assert_array_equal(copy.inpaint(clip, [(0.8, 1.3)]).samples, audio_only.inpaint(clip, [(0.8, 1.3)]).samples)
