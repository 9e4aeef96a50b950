"""ClipInpainter: long gaps and their seams, batches, threads, files of any length, missing inputs, A/V offsets.

The networks are tiny and untrained (tests/support/inpainting_fakes.py), with an audible output.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from avsi_jax.face import av_sync
from avsi_jax.inpainting import api, face_tracks, window_inpainter, window_plan
from avsi_jax.media import clip_io, clip_source
from tests.support.inpainting_fakes import (
    LOUD,
    FakeTracker,
    always_visible,
    audible_restorer,
    frame_numbers,
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
def unified(tiny_config):
    """A system that works without video or without audio."""
    return audible_restorer(tiny_config(system="av_unified", mask_input=True))


@pytest.fixture
def av_unified(unified):
    """Inpainter with that system and a fake tracker."""
    inpainter = api.Inpainter(unified)
    inpainter._tracker, inpainter._mouth_visible = FakeTracker(), always_visible
    return inpainter


# ------------------------------------------------------------------------------------------------------------------- long gaps


def flux(x, rate):
    """(growth of the spectrum from each 8 ms to the next, their times in samples)."""
    size = rate // 125
    frames = np.abs(np.fft.rfft(np.lib.stride_tricks.sliding_window_view(x, 2 * size)[::size] * np.hanning(2 * size)))
    return np.maximum(np.diff(frames, axis=0), 0).sum(1), np.arange(1, len(frames)) * size + size


@pytest.mark.slow
@pytest.mark.parametrize(("gap", "length_s"), [((1.0, 8.0), 10), ((0.0, 5.0), 7), ((4.0, 7.5), 7.5)])
def test_a_gap_longer_than_a_window_has_no_seams(audio_only, gap, length_s):
    samples = voice(length_s, 16_000)
    repair = audio_only.inpaint(make_clip(samples, 16_000), [gap])
    start, end = (round(t * 16_000) for t in gap)
    restored = repair.samples[start:end, 0]
    mask = gap_mask([gap], len(samples), 16_000)
    np.testing.assert_array_equal(repair.samples[~mask], samples[~mask])
    assert all(-60 < loudness(part) < 0 for part in np.array_split(restored, 20)), "silence, or too loud"
    (plan,) = window_plan.plan(np.array([[start, end]]), audio_only.restorer.spec.record_samples, len(samples), 320)
    borders = sorted({edge - start for window in plan.windows for edge in window[1:]} - {0, end - start})
    growth, at = flux(restored, 16_000)
    near, inside = np.abs(at[:, None] - np.array(borders)).min(1) < 400, (at > 800) & (at < len(restored) - 800)
    assert len(borders) >= 2 and near.any() and growth[near].max() <= growth[~near & inside].max()
    assert any("longer than 1.5 s" in w for w in repair.warnings)


def test_the_seam_test_detects_a_jump():
    x = np.random.default_rng(0).normal(0, 0.01, 16_000)
    x[8_000:] += 0.2
    growth, at = flux(x, 16_000)
    near = np.abs(at - 8_000) < 400
    assert growth[near].max() > growth[~near].max()


@dataclasses.dataclass
class CountingRestorer:
    """A restorer that predicts the level 0 in its first window, 1 in the second, ...; its audio is the level."""

    spec: object
    calls: int = 0

    def restore(self, batch, gap):
        level = np.full((len(gap), self.spec.num_frames, 1), float(self.calls), np.float32)
        self.calls += 1
        return dataclasses.make_dataclass("Result", ["level"])(level)

    def sentences(self, result):
        return ["bin blue"] * len(result.level)

    def to_audio(self, level, batch, gap):
        return np.repeat(level[..., 0], 320, 1)[:, : self.spec.record_samples]


@pytest.mark.parametrize("gap", [(1.0, 8.0), (0.0, 5.0)])
def test_levels_of_consecutive_windows_are_cross_faded(gap, monkeypatch):
    """Over 0.4 s."""
    from avsi_jax import presets
    from avsi_jax.inpainting.masked_audio import MaskedAudio

    monkeypatch.setattr("jax.block_until_ready", lambda x: x)
    monkeypatch.setattr(MaskedAudio, "gain", lambda *_: 1.0)  # the restored audio here is not speech
    samples, paper = voice(10, 16_000), presets.get("paper")
    source = clip_source.source_from_clip(make_clip(samples, 16_000))
    masked = MaskedAudio(source, [tuple(round(t * 16_000) for t in gap)])
    (plan,) = window_plan.plan(masked.record_gaps, paper.record_samples, masked.length, 320)
    windows = window_inpainter.WindowInpainter(plan, masked, None, paper)
    window_inpainter.run(CountingRestorer(paper), [windows], {"model": 0.0, "vocoder": 0.0})
    restored = windows.inpainted.samples[::-1] if plan.backwards else windows.inpainted.samples
    changes = np.diff(restored)
    assert restored[0] == 0 and restored[-1] == len(plan.windows) - 1 and windows.transcript == ["bin blue"] * len(plan.windows)
    assert (changes >= 0).all() and 0 < changes.max() <= 0.06, "from window to window in 20 frames"


def test_a_window_of_a_long_gap_reads_what_the_window_before_restored(audio_only, monkeypatch):
    inputs, restore = [], audio_only.restorer.restore

    def recording(batch, gap):
        inputs.append((batch["audio"][0], gap[0, 0]))
        return restore(batch, gap)

    monkeypatch.setattr(audio_only.restorer, "restore", recording)
    repair = audio_only.inpaint(make_clip(LOUD * voice(8, 16_000), 16_000), [(1.0, 6.0)])
    audio, (start, _) = inputs[1]
    before = clip_io.from_int16(audio[start - 4_000 : start])
    assert loudness(before) > -60
    pieces = np.lib.stride_tricks.sliding_window_view(repair.samples[16_000:96_000, 0], 4_000)
    assert min(np.abs(pieces[at : at + 4_000] - before).max(1).min() for at in range(0, len(pieces), 4_000)) < 1e-4


def test_restored_audio_follows_the_level_of_the_clip(audio_only):
    """The output of an untrained network does not depend on its input: its level must follow the clip by the gain alone."""
    samples = LOUD * voice(2.9, 16_000)
    restored = [
        audio_only.inpaint(make_clip(x, 16_000), [(0.9, 1.7)]).samples[14_400:27_200] for x in (samples, samples / 30, samples * 4)
    ]
    levels = [loudness(x) for x in restored]
    assert -34 < levels[1] - levels[0] < -17 and 0 < levels[2] - levels[0] < 14


# --------------------------------------------------------------------------------------------------------- batches and threads


def test_a_batch_gives_what_each_clip_gives(audio_only):
    clips = [make_clip(voice(2.9, 16_000, seed=s), 16_000) for s in range(3)]
    gaps = [[(0.9, 1.7)], [(0.1, 0.3), (2.0, 2.5)], [(1.0, 1.5)]]
    together = audio_only.inpaint_batch(clips, gaps)
    for clip, own, one in zip(clips, gaps, together):
        alone = audio_only.inpaint(clip, own)
        np.testing.assert_allclose(one.samples, alone.samples, atol=2e-3)
        assert one.gaps == alone.gaps and one.seconds["model"] > 0


@pytest.mark.slow
def test_two_threads_give_the_same_bytes_as_one(av_unified):
    clips = [make_clip(voice(2.9, 16_000, seed=s), 16_000, num_video_frames=73) for s in range(4)]
    work = lambda clip: av_unified.inpaint(clip, [(0.9, 1.7)]).samples.tobytes()
    one_by_one = [work(clip) for clip in clips]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, clips)) == one_by_one
    assert len(set(one_by_one)) == 4


# -------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".wav", ".mkv"])
def test_a_file_gives_what_the_clip_in_memory_gives(av_unified, tmp_path, grid_dir, suffix):
    """For a real clip; the audio is the same bit for bit."""
    source, target, fractions = next(grid_dir.glob("s1/*.mpg")), tmp_path / f"out{suffix}", []
    gaps = [(0.5, 0.7), (1.2, 1.9)]
    result = av_unified.inpaint_file(source, target, gaps, progress=fractions.append)
    repair = av_unified.inpaint(source, gaps)
    written = clip_io.read_clip(target)
    np.testing.assert_array_equal(clip_io.to_int16(written.audio.samples), clip_io.to_int16(repair.samples))
    assert (written.video is not None) == (suffix == ".mkv")
    assert result.gaps == repair.gaps and result.target == str(target) and result.duration_s == pytest.approx(2.978, abs=1e-3)
    assert fractions == sorted(fractions) and fractions[-1] == 1
    assert set(result.seconds) == {"decode", "landmarks", "model", "vocoder", "all"} and all(v > 0 for v in result.seconds.values())
    with pytest.raises(FileExistsError, match="overwrite"):
        av_unified.inpaint_file(source, target, gaps)


def test_landmarks_of_gaps_that_share_a_batch_are_not_discarded(av_unified, monkeypatch):
    monkeypatch.setattr(face_tracks, "KEEP_S", 5.0)
    clip, gaps = make_clip(voice(40, 16_000), 16_000, num_video_frames=1000), [(1.0 + 15 * k, 1.5 + 15 * k) for k in range(3)]
    in_memory, streaming = (
        av_unified._clip_inpainter(clip_source.source_from_clip(clip), gaps, None, "off", streaming=x) for x in (False, True)
    )
    for inpainter in (in_memory, streaming):
        inpainter.begin()
    np.testing.assert_array_equal(*(np.concatenate(list(inpainter.blocks())) for inpainter in (in_memory, streaming)))
    assert in_memory.finish()[0] == streaming.finish()[0]
    assert {gap.inputs for gap in streaming.finish()[0]} == {"audio and video"}
    assert streaming.tracks.all().times[0] > 20 and in_memory.tracks.all().times[0] < 1


def test_an_error_leaves_no_file(audio_only, tmp_path):
    import soundfile

    samples = voice(9, 16_000)
    samples[100_000] = np.nan
    soundfile.write(tmp_path / "in.wav", samples, 16_000, subtype="FLOAT")
    with pytest.raises(clip_io.MediaError, match=r"6\.250 s"):
        audio_only.inpaint_file(tmp_path / "in.wav", tmp_path / "out.wav", [(0.5, 0.9)])
    assert [p.name for p in tmp_path.iterdir()] == ["in.wav"]


# ---------------------------------------------------------------------------------------------------------------------- inputs


def test_gaps_name_their_inputs(unified):
    measured = {"audio": {"300": {"stoi_gap": 0.5}}, "audio and video": {"300": {"stoi_gap": 0.75}}}
    inpainter = api.Inpainter(unified, measured)

    class VisibleAtFirst(FakeTracker):
        def __call__(self, rgb):
            return dataclasses.replace(super().__call__(rgb), valid=frame_numbers(rgb) < 40)

    inpainter._tracker, inpainter._mouth_visible = VisibleAtFirst(), always_visible
    repair = inpainter.inpaint(make_clip(voice(2.9, 16_000), 16_000, num_video_frames=73), [(0.5, 0.8), (2.2, 2.5)])
    assert [(g.inputs, round(g.confidence, 3)) for g in repair.gaps] == [("audio and video", 0.75), ("audio", 0.5)]
    assert repair.landmarks.shape == (73, 68, 2) and repair.landmarks_valid.sum() == 40 and repair.frame_times[-1] == 72 / 25


def test_a_gap_of_the_whole_clip_needs_video(av_unified):
    clip = make_clip(voice(2.9, 16_000), 16_000, num_video_frames=73)
    (gap,) = av_unified.inpaint(clip, [(0.0, 2.9)]).gaps
    assert gap.inputs == "video" and 0 < gap.confidence < 1
    with pytest.raises(ValueError, match="no face"):
        av_unified.inpaint(dataclasses.replace(clip, video=None), [(0.0, 2.9)])


def test_a_gap_without_any_input_has_confidence_0_and_a_warning(av_unified):
    silent = make_clip(np.zeros((46_400, 1), np.float32), 16_000)
    repair = av_unified.inpaint(silent, [(1.0, 1.5)])
    assert repair.gaps[0].confidence == 0 and any("a guess" in w for w in repair.warnings)


@pytest.mark.parametrize("count", [1, 2, 700])
def test_clips_of_a_few_samples(audio_only, count):
    samples = voice(0.1, 16_000)[:count]
    if count == 1:
        with pytest.raises(ValueError, match="all of the audio"):
            audio_only.inpaint(make_clip(samples, 16_000), [(0, 1 / 16_000)])
        return
    repair = audio_only.inpaint(make_clip(samples, 16_000), [(0, count // 2 / 16_000)])
    np.testing.assert_array_equal(repair.samples[count // 2 :], samples[count // 2 :])
    assert repair.samples.shape == samples.shape and np.isfinite(repair.samples).all()


# ------------------------------------------------------------------------------------------------------------- sync, face, gaps


@pytest.fixture
def measured_offset(monkeypatch):
    """measured_offset(offset_s, certainty) sets what av_sync.estimate_offset returns."""
    return lambda *values: monkeypatch.setattr(av_sync, "estimate_offset", lambda *_: av_sync.OffsetEstimate(*values))


@pytest.mark.parametrize(
    ("sync", "measured", "lag_s", "warning"),
    [
        ("off", (0.12, 0.99), 0.0, ("lags", "120 ms", "not corrected")),
        ("auto", (0.12, 0.99), 0.12, ("lags", "120 ms", "corrected")),
        ("auto", (-0.2, 0.99), -0.2, ("leads", "200 ms", "corrected")),
        ("auto", (0.12, 0.5), 0.0, None),
        ("auto", (0.05, 0.99), 0.0, None),  # too small to be corrected
        (0.1, (0.0, 0.99), 0.1, None),
    ],
)
def test_an_av_offset_is_reported_and_corrected_as_requested(av_unified, measured_offset, sync, measured, lag_s, warning):
    measured_offset(*measured)
    inpainters, make = [], av_unified._clip_inpainter
    clip = make_clip(voice(2.9, 16_000), 16_000, num_video_frames=73)
    av_unified._clip_inpainter = lambda *a, **k: inpainters.append(make(*a, **k)) or inpainters[0]
    repair = av_unified.inpaint(clip, [(0.9, 1.7)], sync=sync)
    assert inpainters[0].tracks.lag_s == pytest.approx(lag_s)
    expected = None if measured[1] < 0.9 else measured[0] + (sync if isinstance(sync, float) else 0)
    assert repair.av_offset_s == (None if expected is None else pytest.approx(expected))
    found = [w for w in repair.warnings if " ms" in w]
    assert len(found) == bool(warning) and all(word in w for w in found for word in warning)
    assert not found or ("not corrected" in found[0]) == (sync == "off")


@pytest.mark.parametrize("sync", ["on", 9.0, float("nan")])
def test_a_wrong_value_for_sync_is_an_error(av_unified, sync):
    with pytest.raises(ValueError, match="sync .*expected"):
        av_unified.inpaint(make_clip(voice(2.9, 16_000), 16_000, num_video_frames=73), [(0.9, 1.7)], sync=sync)


def test_the_tracker_gets_the_face_that_was_chosen(av_unified):
    faces = []

    class RecordingTracker(FakeTracker):
        def __call__(self, rgb, face=None):
            faces.append(face)
            return super().__call__(rgb)

    av_unified._tracker = RecordingTracker()
    clip = make_clip(voice(2.9, 16_000), 16_000, num_video_frames=73)
    av_unified.inpaint(clip, [(0.9, 1.7)], face=1)
    av_unified.inpaint(clip, [(0.9, 1.7)])
    assert faces == [1, None]


# ---------------------------------------------------------------------------------------------------------- unusable video


def test_a_video_of_one_image_is_not_used(av_unified, audio_only):
    clip = make_clip(voice(3, 16_000), 16_000, num_video_frames=1)
    repair = av_unified.inpaint(clip, [(1.0, 1.3)])
    assert repair.gaps[0].inputs == "audio" and any("one image" in warning for warning in repair.warnings)


class ChangingSize(clip_source.Source):
    """A Source whose frames change their size at 1.5 s."""

    def video(self, start_s, end_s):
        if end_s > 1.5:
            raise clip_io.FrameSizeError("the frame size changes")
        return super().video(start_s, end_s)


def test_frames_that_change_their_size_are_not_used(av_unified):
    source = clip_source.source_from_clip(make_clip(voice(3, 16_000), 16_000, num_video_frames=75))
    source.__class__ = ChangingSize
    repair = av_unified.inpaint(source, [(1.0, 1.3)])
    assert repair.gaps[0].inputs == "audio" and any("size of the frames" in warning for warning in repair.warnings)


# ---------------------------------------------------------------------------------------------------- A/V offset of a long clip


def begun(inpainter, seconds, sync):
    """A ClipInpainter after `begin`, for a clip with video and a gap at its middle."""
    clip = make_clip(voice(seconds, 16_000), 16_000, num_video_frames=25 * seconds)
    source = clip_source.source_from_clip(clip)
    result = inpainter._clip_inpainter(source, [(seconds / 2, seconds / 2 + 0.3)], None, sync)
    result.begin()
    return result


def test_an_offset_that_a_window_does_not_show_is_measured_on_more_of_the_clip(av_unified, monkeypatch):
    """In place of the estimate: certain from 10 s of frames on."""
    seen = []

    def estimate(points, valid, times, *_):
        seen.append(times[-1] - times[0])
        return av_sync.OffsetEstimate(0.24, 0.9 if seen[-1] > 10 else 0.3)

    monkeypatch.setattr(av_sync, "estimate_offset", estimate)
    corrected = begun(av_unified, 30, "auto")
    assert corrected.av_offset_s == pytest.approx(0.24) and len(seen) == 2 and seen[0] < 5
    assert corrected.tracks.lag_s == pytest.approx(0.24)
    assert begun(av_unified, 30, "off").av_offset_s is None and len(seen) == 3  # not asked to correct it


def test_an_offset_that_cannot_be_measured_is_said_in_one_line(av_unified, monkeypatch):
    monkeypatch.setattr(av_sync, "estimate_offset", lambda *_: av_sync.OffsetEstimate(0.0, 0.1))
    result = begun(av_unified, 4, "auto")
    assert sum("could not be measured" in warning for warning in result._warnings) == 1 and result.av_offset_s is None


def test_an_offset_is_not_measured_without_video(audio_only):
    repair = audio_only.inpaint(make_clip(voice(3, 16_000), 16_000), [(1.0, 1.3)], sync="auto")
    assert any("offset was not measured" in warning for warning in repair.warnings)
