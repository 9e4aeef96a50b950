"""Clips at work: long gaps and their seams, batches, threads, files of any length, faces that come and go, what is told of it all.

The networks are tiny and untrained (tests/support/inpainting_fakes.py): what they fill in is a murmur that can be heard.
"""

import dataclasses
import doctest
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from avsi_jax.face import av_sync
from avsi_jax.inpainting import api, face_tracks, window_inpainter, window_plan
from avsi_jax.media import clip_io, clip_source
from avsi_jax.runtime import compilation_cache
from tests.support.inpainting_fakes import LOUD, FakeTracker, all_seen, audible, clip_of, loudness, missing, voice


@pytest.fixture(scope="module")
def by_audio(tiny_config):
    """Inpainter with an audio-only system."""
    return api.Inpainter(audible(tiny_config(system="a_si")))


@pytest.fixture(scope="module")
def unified(tiny_config):
    """A system that does without pictures or sound."""
    return audible(tiny_config(system="av_unified", mask_input=True))


@pytest.fixture
def by_both(unified):
    inpainter = api.Inpainter(unified)
    inpainter._tracker, inpainter._mouth_seen = FakeTracker(), all_seen
    return inpainter


# ------------------------------------------------------------------------------------------------------------------- long gaps


def flux(x, rate):
    """Growth of the spectrum from each 8 ms to the next."""
    size = rate // 125
    frames = np.abs(np.fft.rfft(np.lib.stride_tricks.sliding_window_view(x, 2 * size)[::size] * np.hanning(2 * size)))
    return np.maximum(np.diff(frames, axis=0), 0).sum(1), np.arange(1, len(frames)) * size + size


@pytest.mark.parametrize(("gap", "length_s"), [((1.0, 8.0), 10), ((0.0, 5.0), 7), ((4.0, 7.5), 7.5)])
def test_a_gap_longer_than_a_window_has_no_seams(by_audio, gap, length_s):
    samples = voice(length_s, 16_000)
    repair = by_audio.inpaint(clip_of(samples, 16_000), [gap])
    start, end = (round(t * 16_000) for t in gap)
    made = repair.samples[start:end, 0]
    gap_mask = missing([gap], len(samples), 16_000)
    np.testing.assert_array_equal(repair.samples[~gap_mask], samples[~gap_mask])
    assert all(-60 < loudness(part) < 0 for part in np.array_split(made, 20)), "silence, or too loud"
    (plan,) = window_plan.plan(np.array([[start, end]]), by_audio.restorer.spec.record_samples, len(samples), 320)
    borders = sorted({edge - start for step in plan.steps for edge in step[1:]} - {0, end - start})
    growth, at = flux(made, 16_000)
    near, inside = np.abs(at[:, None] - np.array(borders)).min(1) < 400, (at > 800) & (at < len(made) - 800)
    assert len(borders) >= 2 and near.any() and growth[near].max() <= growth[~near & inside].max()
    assert any("is longer than the 1.5 s that quality was measured up to" in w for w in repair.warnings)


def test_a_step_at_a_border_would_be_found():
    x = np.random.default_rng(0).normal(0, 0.01, 16_000)
    x[8_000:] += 0.2
    growth, at = flux(x, 16_000)
    near = np.abs(at - 8_000) < 400
    assert growth[near].max() > growth[~near].max()


@dataclasses.dataclass
class Levels:
    """A restorer whose every window predicts a level of its own, 0, 1, 2 ...; its sound is the number of the window."""

    spec: object
    calls: int = 0

    def restore(self, batch, gap):
        found = np.full((len(gap), self.spec.num_frames, 1), float(self.calls), np.float32)
        self.calls += 1
        return dataclasses.make_dataclass("Found", ["level"])(found)

    def sentences(self, found):
        return ["bin blue"] * len(found.level)

    def to_audio(self, level, batch, gap):
        self.last = level
        return np.repeat(level[..., 0], 320, 1)[:, : self.spec.record_samples]


@pytest.mark.parametrize("gap", [(1.0, 8.0), (0.0, 5.0)])
def test_levels_are_cross_faded(gap, monkeypatch):
    """Where two windows meet, the level goes over from the one's to the other's in 0.4 s."""
    from avsi_jax import presets
    from avsi_jax.inpainting.masked_audio import MaskedAudio
    from avsi_jax.media.clip_source import source_of

    monkeypatch.setattr("jax.block_until_ready", lambda x: x)
    monkeypatch.setattr(MaskedAudio, "gain", lambda *_: 1.0)  # what is filled in here are numbers
    samples, paper = voice(10, 16_000), presets.get("paper")
    found = MaskedAudio(source_of(clip_of(samples, 16_000)), [tuple(round(t * 16_000) for t in gap)])
    (plan,) = window_plan.plan(found.missing, paper.record_samples, found.length, 320)
    work = window_inpainter.WindowInpainter(plan, found, None, paper)
    window_inpainter.run(Levels(paper), [work], {"model": 0.0, "vocoder": 0.0})
    made = work.fill.samples[::-1] if plan.backwards else work.fill.samples
    steps = np.diff(made)
    assert made[0] == 0 and made[-1] == len(plan.steps) - 1 and work.transcript == ["bin blue"] * len(plan.steps)
    assert (steps >= 0).all() and 0 < steps.max() <= 0.06, "from window to window in 20 steps"


def test_a_long_gap_hears_what_was_filled_in(by_audio, monkeypatch):
    """The sound before its second window's gap is that of the first: not silence."""
    heard, restore = [], by_audio.restorer.restore

    def watched(batch, gap):
        heard.append((batch["audio"][0], gap[0, 0]))
        return restore(batch, gap)

    monkeypatch.setattr(by_audio.restorer, "restore", watched)
    repair = by_audio.inpaint(clip_of(LOUD * voice(8, 16_000), 16_000), [(1.0, 6.0)])
    audio, (start, _) = heard[1]
    before = clip_io.from_int16(audio[start - 4_000 : start])
    assert loudness(before) > -60
    pieces = np.lib.stride_tricks.sliding_window_view(repair.samples[16_000:96_000, 0], 4_000)
    assert min(np.abs(pieces[at : at + 4_000] - before).max(1).min() for at in range(0, len(pieces), 4_000)) < 1e-4


def test_a_quiet_clip_is_filled_as_quietly(by_audio):
    """An untrained network murmurs, however loud what it hears is: that murmur follows the clip, 30 dB down too."""
    samples = LOUD * voice(2.9, 16_000)
    fills = [
        by_audio.inpaint(clip_of(x, 16_000), [(0.9, 1.7)]).samples[14_400:27_200] for x in (samples, samples / 30, samples * 4)
    ]
    levels = [loudness(fill) for fill in fills]
    assert -34 < levels[1] - levels[0] < -17 and 0 < levels[2] - levels[0] < 14


# --------------------------------------------------------------------------------------------------------- batches and threads


def test_a_batch_gives_what_each_clip_gives(by_audio):
    clips = [clip_of(voice(2.9, 16_000, seed=s), 16_000) for s in range(3)]
    gaps = [[(0.9, 1.7)], [(0.1, 0.3), (2.0, 2.5)], [(1.0, 1.5)]]
    together = by_audio.inpaint_batch(clips, gaps)
    for clip, of, one in zip(clips, gaps, together):
        alone = by_audio.inpaint(clip, of)
        np.testing.assert_allclose(one.samples, alone.samples, atol=2e-3)
        assert one.gaps == alone.gaps and one.seconds["model"] > 0


def test_two_threads_give_the_same_bytes_as_one(by_both):
    clips = [clip_of(voice(2.9, 16_000, seed=s), 16_000, num_video_frames=73) for s in range(4)]
    work = lambda clip: by_both.inpaint(clip, [(0.9, 1.7)]).samples.tobytes()
    one_by_one = [work(clip) for clip in clips]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, clips)) == one_by_one
    assert len(set(one_by_one)) == 4


# -------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".wav", ".mkv"])
def test_a_file_gives_what_the_clip_in_memory_gives(by_both, tmp_path, grid_dir, suffix):
    """A real film; what the target can hold of it is the sound, bit for bit."""
    source, target, shares = next(grid_dir.glob("s1/*.mpg")), tmp_path / f"out{suffix}", []
    gaps = [(0.5, 0.7), (1.2, 1.9)]
    done = by_both.inpaint_file(source, target, gaps, progress=shares.append)
    repair = by_both.inpaint(source, gaps)
    found = clip_io.read_clip(target)
    np.testing.assert_array_equal(clip_io.to_int16(found.audio.samples), clip_io.to_int16(repair.samples))
    assert (found.video is not None) == (suffix == ".mkv")
    assert done.gaps == repair.gaps and done.target == str(target) and done.duration_s == pytest.approx(2.978, abs=1e-3)
    assert shares == sorted(shares) and shares[-1] == 1
    assert set(done.seconds) == {"decode", "landmarks", "model", "vocoder", "all"} and all(v > 0 for v in done.seconds.values())
    with pytest.raises(FileExistsError, match="overwrite"):
        by_both.inpaint_file(source, target, gaps)


def test_gaps_far_apart_in_a_file_keep_their_lips(by_both, monkeypatch):
    """What is given up of a long file is never what gaps that are filled together still need."""
    monkeypatch.setattr(face_tracks, "KEPT_S", 5.0)
    video_file, gaps = clip_of(voice(40, 16_000), 16_000, num_video_frames=1000), [(1.0 + 15 * k, 1.5 + 15 * k) for k in range(3)]
    kept, forgot = (by_both._inpainter(clip_source.source_of(video_file), gaps, None, "off", forgets=x) for x in (False, True))
    for inpainter in (kept, forgot):
        inpainter.begin()
    np.testing.assert_array_equal(*(np.concatenate(list(inpainter.blocks())) for inpainter in (kept, forgot)))
    assert kept.finish()[0] == forgot.finish()[0] and {gap.by for gap in forgot.finish()[0]} == {"sound and lips"}
    assert forgot.tracks.all().times[0] > 20 and kept.tracks.all().times[0] < 1


def test_nothing_is_left_of_a_file_that_cannot_be_repaired(by_audio, tmp_path):
    samples = voice(9, 16_000)
    samples[100_000] = np.nan
    media_file = tmp_path / "in.wav"
    import soundfile

    soundfile.write(media_file, samples, 16_000, subtype="FLOAT")
    with pytest.raises(clip_io.MediaError, match=r"NaN or infinite samples, the first at 6\.250 s"):
        by_audio.inpaint_file(media_file, tmp_path / "out.wav", [(0.5, 0.9)])
    assert [p.name for p in tmp_path.iterdir()] == ["in.wav"]


# ------------------------------------------------------------------------------------------------------- what there is to go by


def test_gaps_tell_what_they_were_filled_by(unified):
    inpainter = api.Inpainter(unified, {"sound": {"300": {"stoi_gap": 0.5}}, "sound and lips": {"300": {"stoi_gap": 0.75}}})

    class Leaves(FakeTracker):
        def __call__(self, rgb):
            track = super().__call__(rgb)
            number = rgb[:, 0, 0].astype(int) @ [1, 256, 0]
            return dataclasses.replace(track, valid=number < 40)

    inpainter._tracker, inpainter._mouth_seen = Leaves(), all_seen
    repair = inpainter.inpaint(clip_of(voice(2.9, 16_000), 16_000, num_video_frames=73), [(0.5, 0.8), (2.2, 2.5)])
    assert [(g.by, round(g.confidence, 3)) for g in repair.gaps] == [("sound and lips", 0.75), ("sound", 0.5)]
    assert repair.landmarks.shape == (73, 68, 2) and repair.landmarks_valid.sum() == 40 and repair.frame_times[-1] == 72 / 25


def test_lips_alone_and_nothing_at_all(by_both):
    video_file = clip_of(voice(2.9, 16_000), 16_000, num_video_frames=73)
    (gap,) = by_both.inpaint(video_file, [(0.0, 2.9)]).gaps
    assert gap.by == "lips" and 0 < gap.confidence < 1
    with pytest.raises(ValueError, match="the gap takes the whole sound and no face is seen: there is nothing to go by"):
        by_both.inpaint(dataclasses.replace(video_file, video=None), [(0.0, 2.9)])
    silent = clip_of(np.zeros((46_400, 1), np.float32), 16_000)
    repair = by_both.inpaint(silent, [(1.0, 1.5)])
    assert repair.gaps[0].confidence == 0 and any("neither sound nor lips" in w for w in repair.warnings)


@pytest.mark.parametrize("count", [1, 2, 700])
def test_clips_of_a_few_samples(by_audio, count):
    samples = voice(0.1, 16_000)[:count]
    if count == 1:
        with pytest.raises(ValueError, match="nothing to go by"):
            by_audio.inpaint(clip_of(samples, 16_000), [(0, 1 / 16_000)])
        return
    repair = by_audio.inpaint(clip_of(samples, 16_000), [(0, count // 2 / 16_000)])
    np.testing.assert_array_equal(repair.samples[count // 2 :], samples[count // 2 :])
    assert repair.samples.shape == samples.shape and np.isfinite(repair.samples).all()


# ------------------------------------------------------------------------------------------------------------- sync, face, auto


@pytest.fixture
def measured(monkeypatch):
    """measured(offset_s, certainty): what av_sync.measure says."""
    return lambda *found: monkeypatch.setattr(av_sync, "measure", lambda *_: av_sync.Sync(*found))


@pytest.mark.parametrize(
    ("step", "found", "used", "told"),
    [
        ("off", (0.12, 0.99), 0.0, "120 ms later than its pictures: repaired as it is"),
        ("auto", (0.12, 0.99), 0.12, "120 ms later than its pictures: corrected"),
        ("auto", (-0.2, 0.99), -0.2, "200 ms earlier than its pictures: corrected"),
        ("auto", (0.12, 0.5), 0.0, None),
        ("auto", (0.05, 0.99), 0.0, None),  # too little to be worth it, so it isn't told as corrected
        (0.1, (0.0, 0.99), 0.1, None),
    ],
)
def test_audio_and_frames_out_of_step(by_both, measured, step, found, used, told):
    measured(*found)
    mended = []
    clip = clip_of(voice(2.9, 16_000), 16_000, num_video_frames=73)
    keep = by_both._inpainter
    by_both._inpainter = lambda *a, **k: mended.append(keep(*a, **k)) or mended[0]
    repair = by_both.inpaint(clip, [(0.9, 1.7)], sync=step)
    assert mended[0].tracks.lag_s == pytest.approx(used)
    expected = None if found[1] < 0.9 else found[0] + (step if isinstance(step, float) else 0)
    assert repair.av_offset_s == (None if expected is None else pytest.approx(expected))
    assert [w for w in repair.warnings if "ms" in w] == [w for w in repair.warnings if told and told in w]
    assert bool(told) == any("ms" in w for w in repair.warnings)


@pytest.mark.parametrize("step", ["on", 9.0, float("nan")])
def test_a_step_that_is_none(by_both, step):
    with pytest.raises(ValueError, match="sync .*expected"):
        by_both.inpaint(clip_of(voice(2.9, 16_000), 16_000, num_video_frames=73), [(0.9, 1.7)], sync=step)


def test_the_face_asked_for_is_followed(by_both):
    asked = []

    class StopRequests(FakeTracker):
        def __call__(self, rgb, face=None):
            asked.append(face)
            return super().__call__(rgb)

    by_both._tracker = StopRequests()
    clip = clip_of(voice(2.9, 16_000), 16_000, num_video_frames=73)
    by_both.inpaint(clip, [(0.9, 1.7)], face=1)
    by_both.inpaint(clip, [(0.9, 1.7)])
    assert asked == [1, None]


def test_gaps_are_found(by_audio, monkeypatch):
    samples = voice(2.9, 16_000) + np.random.default_rng(0).normal(0, 1e-3, (46_400, 1)).astype(np.float32)
    samples[16_000:22_400] = 0
    (gap,) = by_audio.inpaint(clip_of(samples, 16_000), "auto").gaps
    assert abs(gap.start_s - 1.0) < 0.02 and abs(gap.end_s - 1.4) < 0.02
    whole = np.random.default_rng(0).normal(0, 1e-2, (46_400, 1)).astype(np.float32)
    with pytest.raises(ValueError, match="no hole found; expected .*name it with --gap"):
        by_audio.inpaint(clip_of(whole, 16_000), "auto")
    with pytest.raises(ValueError, match=r"gaps 'all': expected \(start, end\) pairs"):
        by_audio.inpaint(clip_of(whole, 16_000), "all")


# ------------------------------------------------------------------------------------------------------------- arrays and mels


def test_arrays_are_clips(by_audio):
    samples, gaps = LOUD * voice(2.9, 16_000)[:, 0], [(0.9, 1.7)]
    floats = by_audio.inpaint(api.clip_of(samples, 16_000), gaps)
    integers = by_audio.inpaint(api.clip_of(clip_io.to_int16(samples), 16_000), gaps)
    assert floats.samples.shape == (46_400, 1) and floats.subtype == "FLOAT"
    np.testing.assert_allclose(floats.samples, integers.samples, atol=1e-3)
    for bad in (samples[None, None], samples > 0):
        with pytest.raises(ValueError, match="found sound of shape"):
            api.clip_of(bad, 16_000)
    with pytest.raises(ValueError, match="found pictures of shape"):
        api.clip_of(samples, 16_000, rgb=np.zeros((3, 4, 5), np.uint8))


def test_mels_are_those_of_the_damaged_and_the_restored_audio(by_audio):
    """librosa's, of the 8 kHz sound."""
    import librosa

    samples = voice(2.5, 8_000)
    repair = by_audio.inpaint(clip_of(samples, 8_000), [(0.8, 1.3)])
    assert repair.frame_s == 0.02 and repair.before.shape == repair.after.shape == (126, 64)
    x = librosa.effects.preemphasis(repair.samples[:, 0], zi=[0.0])
    stft = np.abs(librosa.stft(x, n_fft=510, hop_length=160, win_length=320, pad_mode="constant"))
    expected = librosa.filters.mel(sr=8_000, n_fft=510, n_mels=64) @ stft
    expected = np.maximum(20 * np.log10(np.maximum(expected, 1e-5)), -80).T
    assert np.abs(repair.after - expected).mean() < 1.0  # resampled to 16 kHz and back
    assert (repair.before[42:63] == -80).all() and (repair.after[42:63].mean() > -70)


# ------------------------------------------------------------------------------------------------------------------ the process


def test_the_example_in_the_docs():
    from avsi_jax.inpainting import api as module

    result = doctest.testmod(module)
    assert result.attempted > 8 and result.failed == 0


def test_programs_are_kept_where_the_user_can_write(tmp_path):
    script = (
        "import jax; from avsi_jax.runtime import compilation_cache as c; c.keep(); print(jax.config.jax_compilation_cache_dir)"
    )
    run = lambda **env: subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"} | {k: str(v) for k, v in env.items()},
    ).stdout.strip()  # fmt: skip
    kept = run(XDG_CACHE_HOME=tmp_path)
    assert kept.startswith(str(tmp_path / "avsi_jax" / "programs-"))
    (tmp_path / "file").touch()
    assert run(XDG_CACHE_HOME=tmp_path / "file") == "None"
    assert run(XDG_CACHE_HOME=tmp_path, JAX_COMPILATION_CACHE_DIR=tmp_path / "own") == str(tmp_path / "own")


def test_a_program_that_was_cut_off_is_thrown_away(tmp_path):
    import zlib

    program = zlib.compress(np.random.default_rng(0).bytes(10_000))
    for name, data in (("whole", program), ("short", program[:5_000]), ("empty", b""), ("other", b"\x28\xb5\x2f\xfd")):
        (tmp_path / f"{name}-cache").write_bytes(data)
    compilation_cache.drop_cut_off(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other-cache", "whole-cache"]
