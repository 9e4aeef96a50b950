"""Repairing clips: what is hidden changes nothing, what is not lost stays bit for bit.

The networks are tiny and untrained, but for an output bias that says -48 dB in every band: what they fill in is a murmur that can
be heard. Whether it is good is what evaluation tells.
"""

import dataclasses

import numpy as np
import pytest

from avsi_jax.inpainting import api, clip_inpainter, face_tracks, masked_audio
from avsi_jax.media import clip_io
from tests.support.inpainting_fakes import LOUD, FakeTracker, Watched, all_seen, audible, clip_of, loudness, missing, voice


@pytest.fixture(scope="module")
def by_audio(tiny_config):
    """Inpainter with an audio-only system."""
    return api.Inpainter(audible(tiny_config(system="a_si")))


@pytest.fixture(scope="module")
def by_lips(tiny_config):
    """Inpainter with an audio-visual system, and the real face tracker."""
    return api.Inpainter(audible(tiny_config()))


@pytest.fixture
def by_made_up_lips(by_lips):
    """An audio-visual system that needs no face: pictures may be anything."""
    inpainter = api.Inpainter(by_lips.restorer)
    inpainter._tracker, inpainter._mouth_seen = FakeTracker(), all_seen
    return inpainter


# ------------------------------------------------------------------------------------------------------- what is filled in

GAPS = {
    "middle": [(0.9, 1.7)],
    "start": [(0.0, 0.4)],
    "end": [(2.4, 2.978)],
    "several": [(1.9, 2.0), (0.3, 0.5), (1.0, 1.35)],
    "one sample beside another": [(0.5, 0.75), (0.75, 1.0)],
}


@pytest.mark.parametrize("gaps", GAPS.values(), ids=GAPS)
def test_gaps_are_filled_and_nothing_else_is_touched(by_audio, gaps):
    samples = voice(2.978, 44_100, channels=2)
    before = samples.copy()
    repair = by_audio.inpaint(clip_of(samples, 44_100), gaps)
    gap = missing(gaps, len(samples), 44_100)
    np.testing.assert_array_equal(samples, before, err_msg="the clip that was given is changed")
    np.testing.assert_array_equal(repair.samples[~gap], before[~gap])
    assert repair.samples.shape == before.shape and repair.samples.dtype == np.float32
    assert (repair.rate, repair.subtype, repair.warnings) == (44_100, "PCM_16", ())
    for start, end in gaps:
        part = repair.samples[round(start * 44_100) : round(end * 44_100)]
        assert -60 < loudness(part[:, 0]) < 0, "silence, or too loud"
        quiet = np.abs(part[:, 0]).reshape(-1)[: len(part) // 441 * 441].reshape(-1, 441).max(1)
        assert quiet.min() > 1e-5, "10 ms of silence inside the gap"


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (16_000, 1), (22_050, 1), (48_000, 2)])
def test_every_rate_keeps_its_samples(by_audio, rate, channels):
    samples = voice(2.5, rate, channels=channels)
    repair = by_audio.inpaint(clip_of(samples, rate), [(0.8, 1.3), (2.3, 2.5)])
    gap = missing([(0.8, 1.3), (2.3, 2.5)], len(samples), rate)
    np.testing.assert_array_equal(repair.samples[~gap], samples[~gap])
    assert repair.samples.shape == samples.shape and repair.rate == rate
    assert all(-60 < loudness(repair.samples[gap, c]) < 0 for c in range(channels))


def test_channels_keep_their_balance(by_audio):
    """The second channel is half as loud as the first, and so is what is filled in."""
    samples = voice(2.5, 48_000, channels=2)
    part = by_audio.inpaint(clip_of(samples, 48_000), [(0.8, 1.3)]).samples[38_400:62_400]
    assert loudness(part[:, 0]) - loudness(part[:, 1]) == pytest.approx(20 * np.log10(2), abs=0.1)


def test_a_silent_channel_stays_silent(by_audio):
    samples = voice(2.5, 16_000, channels=2)
    samples[:, 1] = 0
    repair = by_audio.inpaint(clip_of(samples, 16_000), [(0.8, 1.3)])
    assert not repair.samples[:, 1].any() and loudness(repair.samples[12_800:20_800, 0]) > -60


def test_a_short_clip(by_audio):
    samples = voice(0.6, 16_000)
    repair = by_audio.inpaint(clip_of(samples, 16_000), [(0.2, 0.4)])
    gap = missing([(0.2, 0.4)], len(samples), 16_000)
    np.testing.assert_array_equal(repair.samples[~gap], samples[~gap])
    assert repair.samples[gap].any()


# -------------------------------------------------------------------------------------------------------- what is hidden


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_hidden_samples_change_nothing(by_audio, rate, tmp_path):
    """By way of files, as a person would try it."""
    samples, gaps = voice(2.9, rate, channels=2), [(0.0, 0.2), (0.9, 1.7)]
    gap = missing(gaps, len(samples), rate)
    repairs = []
    for name, inside in (("a", samples), ("b", 0), ("c", np.random.default_rng(0).uniform(-1, 1, samples.shape))):
        clip_io.write_audio(tmp_path / f"{name}.wav", np.where(gap[:, None], inside, samples), rate)
        repairs.append(by_audio.inpaint(tmp_path / f"{name}.wav", gaps).samples)
    np.testing.assert_array_equal(repairs[0], repairs[1])
    np.testing.assert_array_equal(repairs[0], repairs[2])


def test_hidden_samples_of_a_film_change_nothing(by_made_up_lips):
    samples, gaps = voice(2.9, 48_000), [(0.9, 1.7)]
    noisy = samples.copy()
    noisy[missing(gaps, len(samples), 48_000)] = 0.7
    a, b = (by_made_up_lips.inpaint(clip_of(x, 48_000, num_video_frames=73), gaps) for x in (samples, noisy))
    np.testing.assert_array_equal(a.samples, b.samples)
    assert a.transcript == b.transcript and a.warnings == ("half a face",)


def test_not_even_what_is_not_a_number(by_audio):
    samples, gaps = voice(2.9, 16_000), [(0.9, 1.7)]
    expected = by_audio.inpaint(clip_of(samples, 16_000), gaps).samples
    samples[missing(gaps, len(samples), 16_000)] = np.nan
    np.testing.assert_array_equal(by_audio.inpaint(clip_of(samples, 16_000), gaps).samples, expected)


# -------------------------------------------------------------------------------------------------------------- long clips

LATE_GAPS = [(0.5, 0.8), (4.2, 5.1), (5.4, 5.6), (8.5, 8.7)]


def test_a_long_clip_by_its_audio(by_audio):
    samples = voice(8.7, 16_000)
    repair = by_audio.inpaint(clip_of(samples, 16_000), LATE_GAPS)
    gap = missing(LATE_GAPS, len(samples), 16_000)
    np.testing.assert_array_equal(repair.samples[~gap], samples[~gap])
    for start, end in LATE_GAPS:
        assert -60 < loudness(repair.samples[round(start * 16_000) : round(end * 16_000)]) < 0


def test_a_long_film(by_made_up_lips):
    samples = voice(8.7, 16_000)
    repair = by_made_up_lips.inpaint(clip_of(samples, 16_000, num_video_frames=217), LATE_GAPS)
    gap = missing(LATE_GAPS, len(samples), 16_000)
    np.testing.assert_array_equal(repair.samples[~gap], samples[~gap])
    assert all(repair.samples[round(a * 16_000) : round(b * 16_000)].any() for a, b in LATE_GAPS)


def test_a_film_whose_frames_end_before_the_gap(by_made_up_lips):
    """Its last picture stays: no lips are better than no repair."""
    samples = voice(8.7, 16_000)
    repair = by_made_up_lips.inpaint(clip_of(samples, 16_000, num_video_frames=60), [(7.0, 7.5)])
    assert repair.samples[112_000:120_000].any()


def test_a_gap_is_filled_alike_wherever_it_lies(by_audio):
    """What is around it decides, not how long the clip is before: the voice repeats every 2.9 s, so do the windows."""
    long = LOUD * voice(8.7, 16_000)
    shift = 2 * 46_400  # samples
    a, b = (by_audio.inpaint(clip_of(long, 16_000), [(2.0 + s, 2.5 + s)]).samples[:, 0] for s in (1.45, 1.45 + 2.9))
    n = slice(round(3.45 * 16_000), round(3.95 * 16_000))
    later = slice(n.start + shift // 2, n.stop + shift // 2)
    assert np.abs(a[n] - b[later]).max() < 1e-2 * np.abs(a[n]).max()


@pytest.mark.parametrize(("fps", "start_s"), [(25.0, 0.0), (25.0, 0.2), (30.0, -0.1)])
@pytest.mark.parametrize("gap", [(0.1, 0.3), (4.0, 4.4), (8.0, 8.6)])
def test_the_lips_seen_are_those_of_the_moment(by_lips, fps, start_s, gap):
    """A picture shows its own number: at every frame of a window the network must see the number of the picture of that moment.

    Pictures that start `start_s` late in the container belong to sound that is `start_s` further on.
    """
    from avsi_jax.data import features

    watched = Watched(by_lips.restorer, [])
    inpainter = api.Inpainter(watched)
    inpainter._tracker, inpainter._mouth_seen = FakeTracker(lambda t: 1.0 * t), all_seen
    samples = voice(8.7, 16_000)
    clip = clip_of(samples, 16_000, num_video_frames=round(8.7 * fps), fps=fps, start_s=start_s)
    inpainter.inpaint(clip, [gap])
    (batch, spans), spec = watched.batches[0], by_lips.restorer.spec
    found = features.interpolate(batch["landmarks"][..., 0, :1], features.video_positions(batch, spec))[0, :, 0]
    first_s = gap[0] - (spans[0, 0, 0] + masked_audio.GUARD) / 16_000 if spans[0, 0, 0] else 0.0  # where the window begins
    heard_s = first_s + np.arange(spec.num_frames) * 0.02
    expected = np.clip((heard_s - start_s) * fps, 0, round(8.7 * fps) - 1)
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_a_hidden_mouth_is_not_read(by_lips, by_made_up_lips):
    """Its pictures are not valid, their points lie between those of the pictures beside, and a warning says how many."""
    inpainter, hidden = by_made_up_lips, np.isin(np.arange(75), range(20, 30))
    inpainter._tracker, inpainter._mouth_seen = FakeTracker(lambda t: 1.0 * t**2), lambda rgb, points: ~hidden
    watched = Watched(by_lips.restorer, [])
    inpainter.restorer = watched
    clip = clip_of(voice(2.98, 16_000), 16_000, num_video_frames=75)
    repair = inpainter.inpaint(clip, [(0.8, 1.4)])
    batch = watched.batches[0][0]
    np.testing.assert_array_equal(batch["landmarks_valid"][0, :75], ~hidden)
    straight = np.interp(np.arange(75), np.flatnonzero(~hidden), np.flatnonzero(~hidden) ** 2.0)
    np.testing.assert_allclose(batch["landmarks"][0, :75, 0, 0], straight, rtol=1e-5)
    assert repair.warnings == ("half a face", "something hides the mouth in 10 of 75 pictures")
    inpainter._mouth_seen = lambda rgb, points: np.zeros(75, bool)
    inpainter.inpaint(clip, [(0.8, 1.4)])
    batch = watched.batches[-1][0]
    assert not batch["landmarks_valid"].any() and np.isfinite(batch["landmarks"]).all()


def test_what_else_is_in_a_batch_changes_nothing(by_audio):
    """Not a bit, where equally many windows go together: neither the other clip, its loudness, length and gaps, nor the order."""
    clip, gaps = clip_of(voice(2.9, 16_000), 16_000), [(0.9, 1.7)]
    quiet, short = clip_of(voice(2.9, 16_000, seed=1) / 100, 16_000), clip_of(voice(1.9, 8_000, seed=2), 8_000)
    others = [(quiet, [(0.1, 0.3)]), (short, [(0, 1.5)])]
    repairs = [by_audio.inpaint_batch([clip, other], [gaps, of])[0] for other, of in others]
    repairs.append(by_audio.inpaint_batch([others[0][0], clip], [others[0][1], gaps])[1])
    for repair in repairs[1:]:
        np.testing.assert_array_equal(repair.samples, repairs[0].samples)
        np.testing.assert_array_equal(repair.after, repairs[0].after)
    alone = by_audio.inpaint(clip, gaps).samples
    gap = missing(gaps, len(alone), 16_000)
    np.testing.assert_array_equal(repairs[0].samples[~gap], alone[~gap])
    np.testing.assert_allclose(repairs[0].samples, alone, atol=2e-3)


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("gaps", "says"),
    [
        ([], "no gap given"),
        ([(1.7, 0.9)], "gap 1.7-0.9: expected START-END in seconds with 0 <= START < END"),
        ([(0.5, 0.5)], "expected START-END"),
        ([(-0.1, 0.5)], "gap -0.1-0.5: expected START-END"),
        ([(float("nan"), 0.5)], "expected START-END"),
        ([(0.5, float("inf"))], "leaves the clip, whose sound is 2.500 s long"),
        ([(0.1, 0.2), (2.4, 2.6)], "gap 2.4-2.6 s leaves the clip, whose sound is 2.500 s long"),
        ([(0.50001, 0.50002)], "holds no sample at 16000 Hz"),
    ],
)
def test_gaps_that_do_not_fit(by_audio, gaps, says):
    with pytest.raises(ValueError) as error:
        by_audio.inpaint(clip_of(voice(2.5, 16_000), 16_000), gaps)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_long_gap_is_filled_with_a_warning(by_audio):
    repair = by_audio.inpaint(clip_of(voice(2.978, 16_000), 16_000), [(0.5, 2.5)])
    assert len(repair.warnings) == 1 and "0.50-2.50 s is longer than" in repair.warnings[0]


def test_gaps_that_overlap_are_one():
    assert clip_inpainter.check_gaps([(1.0, 1.5), (0.2, 0.4), (1.4, 1.6), (1.1, 1.2)], 32_000, 16_000) == [
        (3200, 6400),
        (16_000, 25_600),
    ]


def test_audio_alone_is_refused_by_a_lip_reader(by_lips):
    with pytest.raises(clip_io.MediaError, match="has no pictures; av_mtl_s2s needs them; a_si and av_unified do without"):
        by_lips.inpaint(clip_of(voice(1, 16_000), 16_000), [(0.2, 0.4)])


def test_uneven_frames_are_seen_at_an_even_rate():
    """np.interp of each coordinate."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.uniform(0.01, 0.1, 50))
    times -= times[0]
    points = rng.normal(size=(50, 68, 2)).astype(np.float32)
    found = face_tracks.TrackedFrames(points, np.ones(50, bool), times)
    even, rate = face_tracks.at_even_rate(found, 29.97)
    assert rate == 25 and len(even.times) == int(times[-1] * 25) + 1
    at = np.arange(len(even.times)) / 25
    np.testing.assert_allclose(even.points[:, 7, 1], np.interp(at, times, points[:, 7, 1]), atol=1e-6)
    found = found._replace(times=np.arange(50) / 29.97)
    same, rate = face_tracks.at_even_rate(found, 29.97)
    assert same is found and rate == 29.97


# ----------------------------------------------------------------------------------------------------------------- real clips


def test_a_real_clip(by_lips, grid_dir, tmp_path):
    """As decoded, outside the gap, bit for bit in the file that is written; and what was said there changes nothing."""
    clip, gaps = clip_io.read_clip(grid_dir / "s1" / "bbaz5s.mpg"), [(0.93, 1.73)]
    gap = missing(gaps, len(clip.audio.samples), 44_100)
    repair = by_lips.inpaint(clip, gaps)
    np.testing.assert_array_equal(repair.samples[~gap], clip.audio.samples[~gap])
    assert -60 < loudness(repair.samples[gap]) < 0 and repair.samples.shape == (131_328, 2)
    clip_io.write_audio(tmp_path / "out.wav", repair.samples, repair.rate, repair.subtype)
    written = clip_io.read_clip(tmp_path / "out.wav").audio
    decoded = np.clip(np.rint(clip.audio.samples.astype(np.float64) * 32_768), -32_768, 32_767)
    np.testing.assert_array_equal(written.samples[~gap] * 32_768, decoded[~gap])
    other = clip.audio.samples.copy()
    other[gap] = 0.5
    again = by_lips.inpaint(dataclasses.replace(clip, audio=dataclasses.replace(clip.audio, samples=other)), gaps)
    np.testing.assert_array_equal(again.samples, repair.samples)


def test_the_package_gives_the_inpainter():
    import avsi_jax

    assert avsi_jax.Inpainter is api.Inpainter
