"""Sessions of avsi-app: text that users enter, a clip from upload to result, refused clips, and that no files are left behind."""

from fractions import Fraction

import numpy as np
import pytest

from avsi_jax.app import rendering, sandbox, session
from avsi_jax.inpainting import cli_jobs, clip_gaps
from avsi_jax.media import clip_io
from avsi_jax.runtime import process_pool
from tests.support.session_fakes import EXAMPLES, HOSTILE, RATE, ToneInpainter, outside, run_inline


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A session whose clips are decoded in this process."""
    monkeypatch.setattr(process_pool, "run", run_inline)
    return session.Session(tmp_path / "gradio" / "sessions" / "one", ToneInpainter(), session.Limits())


@pytest.fixture
def noise(tmp_path):
    """A file with 1 s of noise, stereo, 24 bit."""
    samples = np.random.default_rng(0).normal(0, 0.1, (8000, 1)) * np.array([1, 0.5])
    clip_io.write_audio(tmp_path / "some noise.wav", samples.astype(np.float32), 8000, "PCM_24")
    return tmp_path / "some noise.wav"


# -------------------------------------------------------------------------------------------------------- text of the user


def test_formatted_gaps_are_parsed_again():
    gaps = [(0.5, 1.0), (2.1, 2.3)]
    assert session.parse_gaps(session.format_gaps(gaps)) == gaps
    assert session.parse_gaps(session.format_gaps([])) == []


def test_more_gaps_than_can_be_entered_are_an_error_or_auto():
    with pytest.raises(ValueError, match="expected at most"):
        session.parse_gaps("1-2," * 30)
    assert session.format_gaps([(1, 2)] * 30) == "auto"


def test_formatted_gaps_are_rounded_outwards():
    """To milliseconds, also late in a clip: with four digits, up to 5 ms of a gap would stay silent."""
    (start, end) = session.parse_gaps(session.format_gaps([(12.34567, 59.98761, "silence")]))[0]
    assert 12.3447 <= start <= 12.34567 and 59.98761 <= end <= 59.9886
    assert session.format_gaps([(0.57, 1.73)]) == "0.57-1.73" and session.format_gaps([(100.5, 123.457)]) == "100.5-123.457"


def test_confidence_in_words_decreases_with_its_value():
    words = [session.in_words(confidence) for confidence in (0.95, 0.7, 0.5, 0.1)]
    assert len(set(words)) == 4 and words[0] == "high" and "guess" in words[-1]
    assert session.in_words(0.8) == words[0] and session.in_words(0.0) == words[-1]


# ------------------------------------------------------------------------------------------------- from upload to result


def test_an_error_while_restoring_names_the_file_of_the_user_and_no_folder(user, noise, monkeypatch):
    """Such as that of a clip with NaN outside the gap, which is found only then."""
    clip = user.load(noise)

    def fail(source, gaps, **options):
        raise clip_io.MediaError(f"{source.path}: the audio has NaN or infinite samples")

    monkeypatch.setattr(user.inpainter, "inpaint", fail)
    with pytest.raises(clip_io.MediaError) as error:
        user.restore("0.2-0.4")
    assert str(error.value) == "some noise.wav: the audio has NaN or infinite samples"
    assert str(clip.path) not in str(error.value) and user.restored is None


def test_a_clip_with_a_gap_is_shown_and_restored(user):
    clip = user.load(EXAMPLES / "drawn_mouth_with_gap.mp4")
    ((start, end, kind),) = clip.detected_gaps
    assert (start, end) == pytest.approx((1.0, 1.6), abs=0.01) and kind in ("silence", "packets")
    assert all(part in clip.description() for part in ("3.00 s", "16 kHz", "mono", "360x288", "25 frames"))
    assert "1.00-1.60 s" in rendering.clip(clip, clip.detected_gaps)
    result = user.restore(session.format_gaps(clip.detected_gaps), face=1, sync="auto")
    assert user.inpainter.options == {"face": 1, "sync": "auto"}
    before, after = clip_io.read_clip(EXAMPLES / "drawn_mouth_with_gap.mp4"), clip_io.read_clip(result.clip)
    kept = outside(result.gaps, len(before.audio.samples), RATE)
    assert result.clip.name == "drawn_mouth_with_gap.restored.mp4" and set(result.waveforms) == {"masked", "restored"}
    np.testing.assert_array_equal(after.video.rgb, before.video.rgb)
    for restored in (after.audio.samples, clip_io.read_clip(result.waveforms["restored"]).audio.samples):
        np.testing.assert_array_equal(restored[kept], before.audio.samples[kept])
        assert np.abs(restored[~kept]).max() > 0.2
    page = rendering.summary(result) + rendering.faces(result) + "".join(rendering.compared(clip, result, result.gaps).values())
    assert "corrected" not in page, "av_offset_s is set although nothing was corrected: only warnings say what was done"
    assert "(70%)" in page and "bin &lt;blue&gt; at f two now" in page and "a &lt;warning&gt;" in page
    assert page.count("data:image/png;base64,") == 2 + session.STRIP_FRAMES


def test_a_gap_made_by_the_user_is_compared_with_the_original(user, noise):
    clip, samples = user.load(noise), clip_io.read_clip(noise).audio.samples
    assert not clip.detected_gaps
    gaps = user.make_gap(0.4, 300)
    assert gaps == [(0.4, 0.7)] and user.make_gap(5, 300) == [(0.98, 1.0)]
    result = user.restore(session.format_gaps(gaps))
    waveforms = {name: clip_io.read_clip(file).audio for name, file in result.waveforms.items()}
    kept = outside(gaps, 8000, 8000)
    np.testing.assert_array_equal(waveforms["original"].samples, samples)
    assert not waveforms["masked"].samples[~kept].any()
    for name in ("masked", "restored"):
        np.testing.assert_array_equal(waveforms[name].samples[kept], samples[kept])
        assert waveforms[name].subtype == "PCM_24"
    assert result.clip.name == "some_noise.restored.wav" and rendering.faces(result) == ""
    user.use_detected_gaps()  # none: the one that was made stays
    assert "original" in user.restore("0.4-0.7").waveforms
    user.load(noise)
    assert "original" not in user.restore("0.4-0.7").waveforms


def test_a_video_file_without_video_keeps_its_format(user, noise, tmp_path):
    import av

    with av.open(str(noise)) as source, av.open(str(tmp_path / "talk.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=8000, layout="stereo")
        for frame in source.decode(audio=0):
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    user.load(tmp_path / "talk.mp4")
    result = user.restore("0.4-0.7")
    assert result.clip.name == f"talk.restored{cli_jobs.default_suffix(tmp_path / 'talk.mp4')}" == "talk.restored.mp4"
    assert np.abs(clip_io.read_clip(result.clip).audio.samples[3300:5500]).max() > 0.2


def test_audio_is_returned_as_wav_where_the_video_cannot_be_copied(user, monkeypatch):
    def write_clip(source, target, blocks, write=sandbox.clip_source.write_clip):
        if target.suffix != ".wav":
            raise clip_io.MediaError("cannot be copied")
        return write(source, target, blocks)

    monkeypatch.setattr(sandbox.clip_source, "write_clip", write_clip)
    user.load(EXAMPLES / "drawn_mouth.mp4")
    result = user.restore("0.4-0.7")
    assert result.clip.name == "drawn_mouth.restored.wav" and any(".wav, audio only" in w for w in result.warnings)


def test_a_long_clip_is_plotted_around_its_gaps():
    assert rendering.plotted_interval([(1.0, 2.0)], 5.0) == (0.0, 5.0)
    assert rendering.plotted_interval([(10.0, 10.5), (12.0, 12.5)], 60.0) == (8.5, 14.0)


@pytest.mark.parametrize("text", ["0.5-1.2", "2-3", "1e9-2e9", "0.5-0:01.2"])
def test_gaps_outside_the_clip_are_an_error(user, noise, text):
    user.load(noise)
    with pytest.raises(ValueError, match="1.000 s long"):
        user.restore(text)


def test_a_gap_may_end_with_the_video_as_in_the_command(user, tmp_path):
    """Where the video lasts slightly longer than the audio: the rest of it counts as no missing audio."""
    import av

    with av.open(str(tmp_path / "talk.mkv"), "w") as out:
        video, audio = out.add_stream("mpeg4", rate=25), out.add_stream("pcm_s16le", rate=8000, layout="mono")
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for number in range(28):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(video.encode(frame))
        samples = np.random.default_rng(0).integers(-3000, 3000, (1, 8000)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
        for stream, last in ((audio, frame), (audio, None), (video, None)):
            out.mux(stream.encode(last))
    clip = user.load(tmp_path / "talk.mkv")
    assert (clip.duration_s, clip.source.end_s) == pytest.approx((1.0, 1.12), abs=0.01)
    assert user.restore("0.7-1.12").gaps == [(0.7, clip.duration_s)]
    with pytest.raises(ValueError, match="not inside the clip"):
        user.restore("0.7-1.3")


def test_auto_restores_the_detected_gaps_and_is_an_error_where_there_are_none(user, noise):
    clip = user.load(EXAMPLES / "drawn_mouth_with_gap.mp4")
    assert user.restore("auto").gaps == [gap[:2] for gap in clip.detected_gaps]
    user.load(noise)
    with pytest.raises(clip_gaps.NoGapFoundError, match="some noise.wav"):
        user.restore("auto")


def test_the_default_output_is_that_of_the_command_and_keeps_known_samples(user):
    """An .mpg would be written as MP2, which changes the whole clip."""
    clip = user.load(EXAMPLES / "person.mpg")
    result, original = user.restore("0.9-1.5"), clip_io.read_clip(EXAMPLES / "person.mpg")
    assert result.clip.suffix == cli_jobs.default_suffix(EXAMPLES / "person.mpg") != ".mpg"
    restored, kept = clip_io.read_clip(result.clip), outside(result.gaps, len(clip.samples), clip.rate)
    np.testing.assert_array_equal(clip_io.to_int16(restored.audio.samples[kept]), clip_io.to_int16(original.audio.samples[kept]))
    np.testing.assert_array_equal(restored.video.rgb, original.video.rgb)
    assert any(result.clip.suffix in warning for warning in result.warnings)


# ------------------------------------------------------------------------------------------- gaps belong to a clip


def test_gaps_of_an_earlier_clip_are_refused(user, noise):
    user.load(noise)
    token = user.token
    user.load(EXAMPLES / "drawn_mouth.mp4")
    for request in (
        lambda: user.restore("0.4-0.7", token=token),
        lambda: user.make_gap(0.4, 300, token),
        lambda: user.use_detected_gaps(token),
        lambda: user.restore("0.4-0.7", token=""),
    ):
        with pytest.raises(session.StaleGapsError):
            request()
    assert user.restore("0.4-0.7", token=user.token).gaps == [(0.4, 0.7)]


def test_gaps_that_were_replaced_are_refused(user):
    user.load(EXAMPLES / "drawn_mouth_with_gap.mp4")
    for replace in (lambda token: user.make_gap(0.2, 300, token), user.use_detected_gaps):
        token = user.token
        replace(token)
        with pytest.raises(session.StaleGapsError):
            user.restore("1-1.6", token=token)
        replace(token)  # a second press of the same button is not refused


def test_a_clip_that_is_loaded_again_is_another_one(user, noise):
    user.load(noise)
    token = user.token
    user.load(noise)
    with pytest.raises(session.StaleGapsError):
        user.restore("0.4-0.7", token=token)


def test_a_result_is_current_until_the_clip_its_gaps_or_an_option_change(user, noise):
    user.load(noise)
    user.restore("0.4-0.7")
    shown = user.token, None, "off"
    assert user.result_is_current("0.40 - 0.7", *shown)
    assert not user.result_is_current("0.4-0.8", *shown) and not user.result_is_current("nonsense", *shown)
    assert not user.result_is_current("0.4-0.7", user.token, 1, "off")
    assert not user.result_is_current("0.4-0.7", user.token, None, "auto")
    assert not user.result_is_current("0.4-0.7", "", None, "off")
    user.load(noise)
    assert not user.result_is_current("0.4-0.7", *shown)


# ------------------------------------------------------------------------------------------- what is shown of the gaps


def test_the_message_about_gaps_is_that_of_the_gaps_that_are_shown(user, noise):
    clip = user.load(noise)
    assert "No gap detected" in rendering.clip(clip, ())
    shown = rendering.clip(clip, user.make_gap(0.4, 300))
    assert "No gap detected" not in shown and "Gaps to restore: 0.40-0.70 s" in shown
    clip = user.load(EXAMPLES / "drawn_mouth_with_gap.mp4")
    assert "Detected gaps: 1.00-1.60 s" in rendering.clip(clip, clip.detected_gaps)
    assert "Gaps to restore: 0.20-0.30 s. Detected gaps: 1.00-1.60 s" in rendering.clip(clip, [(0.2, 0.3)])
    assert "None is entered" in rendering.clip(clip, ())


def test_restoring_without_a_gap_or_a_clip_is_an_error(user, noise):
    with pytest.raises(ValueError, match="clip first"):
        user.restore("0.1-0.2")
    user.load(noise)
    with pytest.raises(ValueError, match="no gap"):
        user.restore("")


# ------------------------------------------------------------------------------------------------------------- refused clips


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(user, tmp_path, name):
    (tmp_path / name).write_bytes(HOSTILE[name])
    with pytest.raises((ValueError, OSError)) as error:
        user.load(tmp_path / name)
    message = str(error.value)
    assert message.startswith(name) and "\n" not in message and str(tmp_path) not in message and "root:" not in message
    assert user.clip is None and list(user.folder.iterdir()) == []


def test_the_size_is_checked_before_anything_is_decoded(user, noise, monkeypatch):
    monkeypatch.setattr(process_pool, "run", lambda *a, **k: pytest.fail("opened"))
    user.limits = session.Limits(megabytes=0.01)
    with pytest.raises(clip_io.MediaError, match=r"some noise.wav .*0.01 MB"):
        user.load(noise)


def test_length_frame_size_and_number_of_samples_are_checked_before_a_face_is_tracked(user, noise, monkeypatch):
    user.limits = session.Limits(seconds=0.9)
    with pytest.raises(clip_io.MediaError, match=r"some noise.wav .*1.0 s .*0.9 s .*avsi-inpaint"):
        user.load(noise)
    user.limits = session.Limits()
    monkeypatch.setattr(session, "MAX_PIXELS", 100 * 100)
    with pytest.raises(clip_io.MediaError, match=r"drawn_mouth.mp4 .*360x288"):
        user.load(EXAMPLES / "drawn_mouth.mp4")
    monkeypatch.setattr(sandbox, "MAX_AUDIO_BYTES", 10_000)
    with pytest.raises(clip_io.MediaError, match=r"some noise.wav has 8000 samples in 2 channels"):
        user.load(noise)


def test_a_clip_that_exceeds_a_limit_of_the_worker_is_refused(user, noise, monkeypatch):
    monkeypatch.setattr(process_pool, "run", lambda *a, **k: [process_pool.JobOutcome(0, None, "took more than 20 s")])
    with pytest.raises(clip_io.MediaError, match=r"some noise.wav: .*took more than 20 s"):
        user.load(noise)
    assert user.clip is None and list(user.folder.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- files left behind


def test_ended_sessions_leave_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "MAX_SESSIONS", 2)
    sessions = session.SessionStore(tmp_path / "sessions", ToneInpainter(), session.Limits())
    one, two = sessions.get("one"), sessions.get("two")
    assert sessions.get("one") is one and two.folder.is_dir()
    sessions.get("three")
    assert not two.folder.exists() and one.folder.is_dir()
    one.last_used_s -= session.MAX_IDLE_S + 1
    sessions.get("three")
    assert not one.folder.exists()
    sessions.end("three")
    sessions.end("unknown")
    assert list((tmp_path / "sessions").iterdir()) == []


def test_uploads_are_deleted_with_the_session(user, noise):
    uploads = [user.folder.parent.parent / name / "clip.wav" for name in "ab"]
    for file in uploads:
        file.parent.mkdir()
        file.write_bytes(noise.read_bytes())
    user.load(uploads[0])
    user.load(uploads[0])
    assert uploads[0].exists()
    user.load(EXAMPLES / "drawn_mouth.mp4")
    assert not uploads[0].exists() and (EXAMPLES / "drawn_mouth.mp4").exists()
    user.load(uploads[1])
    assert [file.exists() for file in uploads] == [False, True]
    user.leave()
    assert not uploads[1].exists() and not user.folder.exists()
