"""A visit to avsi-app: what a visitor writes, a clip's way in and its repair out, what is refused, and that nothing is left."""

import numpy as np
import pytest

from avsi_jax.app import rendering, session
from avsi_jax.media import clip_io
from tests.support.session_fakes import EXAMPLES, HOSTILE, RATE, Hum, outside


@pytest.fixture
def visitor(tmp_path, monkeypatch):
    """A visit whose clips are opened in this process: starting another takes a second."""
    inline = lambda work, jobs, **limits: [session.workers.Outcome(0, work(*jobs[0]))]
    monkeypatch.setattr(session.workers, "run", inline)
    return session.Session(tmp_path / "gradio" / "visits" / "one", Hum(), session.Limits())


@pytest.fixture
def rush(tmp_path):
    """1 s of a rushing sound, stereo, 24 bit."""
    samples = np.random.default_rng(0).normal(0, 0.1, (8000, 1)) * np.array([1, 0.5])
    clip_io.write_audio(tmp_path / "a sound.wav", samples.astype(np.float32), 8000, "PCM_24")
    return tmp_path / "a sound.wav"


# ------------------------------------------------------------------------------------------------------- what a visitor writes


@pytest.mark.parametrize(
    ("text", "gaps"),
    [
        ("0.93-1.73", [(0.93, 1.73)]),
        (" 2.1 - 2.3 , .5–1 ", [(0.5, 1.0), (2.1, 2.3)]),
        ("1-2s;3-4s,", [(1, 2), (3, 4)]),
        ("", []),
        (None, []),
    ],
)
def test_gaps_as_they_are_written(text, gaps):
    assert session.parse_gaps(text) == gaps
    assert session.parse_gaps(session.written(gaps)) == gaps


def test_a_gap_that_was_found_is_written_wgap():
    """A late hole's edges lie between two thousandths: sound of up to 5 ms was left silent where four digits were written."""
    (start, end) = session.parse_gaps(session.written([(12.34567, 59.98761, "silence")]))[0]
    assert 12.3447 <= start <= 12.34567 and 59.98761 <= end <= 59.9886
    assert session.written([(0.57, 1.73)]) == "0.57-1.73" and session.written([(100.5, 123.457)]) == "100.5-123.457"


@pytest.mark.parametrize("text", ["1", "1:2", "a-b", "2-1", "1-1", "-1-2", "nan-2", "1e9-2e9", "1-2-3", "<b>-2", "1-2," * 30])
def test_gaps_that_are_none_take_one_line(text):
    with pytest.raises(ValueError) as error:
        session.parse_gaps(text)
    assert "expected" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 120


@pytest.mark.parametrize(("confidence", "words"), [(0.95, "sure"), (0.7, "rather sure"), (0.5, "half sure"), (0.1, "a guess")])
def test_confidence_in_words(confidence, words):
    assert session.in_words(confidence) == words


# -------------------------------------------------------------------------------------------------------------- a clip's way


def test_a_damaged_film_is_looked_at_and_restored(visitor):
    clip = visitor.take(EXAMPLES / "with_a_hole.mp4")
    ((start, end, kind),) = clip.gaps
    assert (start, end) == pytest.approx((1.0, 1.6), abs=0.01) and kind in ("silence", "packets")
    assert "3.00 s of sound at 16 kHz, mono; pictures of 360x288, 25 a second" in clip.transcript()
    result = visitor.restore(session.written(clip.gaps), face=1, sync="auto")
    assert visitor.inpainter.asked == {"face": 1, "sync": "auto"}
    given, whole = clip_io.read_clip(EXAMPLES / "with_a_hole.mp4"), clip_io.read_clip(result.clip)
    kept = outside(result.gaps, len(given.audio.samples), RATE)
    assert result.clip.name == "with_a_hole.restored.mp4" and set(result.waveforms) == {"masked", "restored"}
    np.testing.assert_array_equal(whole.video.rgb, given.video.rgb)
    for restored in (whole.audio.samples, clip_io.read_clip(result.waveforms["restored"]).audio.samples):
        np.testing.assert_array_equal(restored[kept], given.audio.samples[kept])
        assert np.abs(restored[~kept]).max() > 0.2
    shown = rendering.told(result) + rendering.faces(result) + "".join(rendering.compared(clip, result, result.gaps).values())
    assert "set right" not in shown, "sync_s is what was measured, also where nothing was corrected: the warnings say what was done"
    assert "rather sure" in shown and "bin &lt;blue&gt; at f two now" in shown and "a &lt;warning&gt;" in shown
    assert shown.count("data:image/png;base64,") == 2 + session.STRIP


def test_a_whole_audio_is_damaged_on_purpose(visitor, rush):
    clip, given = visitor.take(rush), clip_io.read_clip(rush).audio.samples
    assert not clip.gaps
    gaps = visitor.damage(0.4, 300)
    assert gaps == [(0.4, 0.7)] and visitor.damage(5, 300) == [(0.98, 1.0)]
    result = visitor.restore(session.written(gaps))
    waveforms = {name: clip_io.read_clip(file).audio for name, file in result.waveforms.items()}
    kept = outside(gaps, 8000, 8000)
    np.testing.assert_array_equal(waveforms["original"].samples, given)
    assert not waveforms["masked"].samples[~kept].any()
    for name in ("masked", "restored"):
        np.testing.assert_array_equal(waveforms[name].samples[kept], given[kept])
        assert waveforms[name].subtype == "PCM_24"
    assert result.clip.name == "a_sound.restored.wav" and rendering.faces(result) == ""
    visitor.found()
    assert "original" not in visitor.restore("0.4-0.7").waveforms


def test_a_film_without_frames_comes_back_as_its_audio(visitor, rush, tmp_path):
    import av

    with av.open(str(rush)) as given, av.open(str(tmp_path / "talk.mp4"), "w") as out:
        waveform = out.add_stream("aac", rate=8000, layout="stereo")
        for frame in given.decode(audio=0):
            out.mux(waveform.encode(frame))
        out.mux(waveform.encode(None))
    visitor.take(tmp_path / "talk.mp4")
    result = visitor.restore("0.4-0.7")
    assert result.clip.name == "talk.restored.wav" and "written as .wav, its sound alone" in "".join(result.warnings)
    assert np.abs(clip_io.read_clip(result.clip).audio.samples[3300:5500]).max() > 0.2


def test_a_long_clip_is_drawn_around_its_gaps():
    assert rendering.window([(1.0, 2.0)], 5.0) == (0.0, 5.0)
    assert rendering.window([(10.0, 10.5), (12.0, 12.5)], 60.0) == (8.5, 14.0)


@pytest.mark.parametrize("text", ["0.5-1.2", "2-3"])
def test_gaps_outside_the_clip(visitor, rush, text):
    visitor.take(rush)
    with pytest.raises(ValueError, match="leaves the clip, whose sound is 1.00 s long"):
        visitor.restore(text)


@pytest.mark.parametrize("text", ["", "0.1-0.2"])
def test_nothing_to_do(visitor, rush, text):
    if not text:
        visitor.take(rush)
    with pytest.raises(ValueError, match="no gap is given" if not text else "put in a clip first"):
        visitor.restore(text)


# ------------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_take_one_line(visitor, tmp_path, name):
    (tmp_path / name).write_bytes(HOSTILE[name])
    with pytest.raises((ValueError, OSError)) as error:
        visitor.take(tmp_path / name)
    said = str(error.value)
    assert said.startswith(name) and "\n" not in said and str(tmp_path) not in said and "root:" not in said
    assert visitor.clip is None and list(visitor.folder.iterdir()) == []


def test_a_clip_is_opened_in_a_process_of_its_own_first(tmp_path, rush):
    """Where nothing is in the way of it, as in the program."""
    limits = session.Limits()
    session.check_opens(rush, "a sound.wav", limits)
    (tmp_path / "text.mp4").write_bytes(HOSTILE["text.mp4"])
    with pytest.raises(clip_io.MediaError, match=r"^text.mp4: cannot be decoded"):
        session.check_opens(tmp_path / "text.mp4", "text.mp4", limits)


def test_limits_are_looked_at_before_anything_is_decoded(visitor, rush, monkeypatch):
    monkeypatch.setattr(session.workers, "run", lambda *a, **k: pytest.fail("opened"))
    visitor.limits = session.Limits(megabytes=0.01)
    with pytest.raises(clip_io.MediaError, match=r"a sound.wav has 0.0 MB; at most 0.01 MB are taken"):
        visitor.take(rush)


def test_limits_are_looked_at_before_a_face_is_followed(visitor, rush, monkeypatch):
    visitor.limits = session.Limits(seconds=0.9)
    with pytest.raises(clip_io.MediaError, match=r"a sound.wav is 1.0 s long; at most 0.9 s are taken here: .*avsi-inpaint"):
        visitor.take(rush)
    visitor.limits = session.Limits()
    outcome = session.workers.Outcome(0, (1.0, (60_000, 60_000)))
    monkeypatch.setattr(session.workers, "run", lambda *a, **k: [outcome])
    with pytest.raises(clip_io.MediaError, match=r"pictures of 60000x60000; at most 1920x1088"):
        visitor.take(EXAMPLES / "whole.mp4")
    monkeypatch.setattr(session.workers, "run", lambda *a, **k: [session.workers.Outcome(0, None, "took more than 20 s")])
    with pytest.raises(clip_io.MediaError, match=r"a sound.wav: cannot be opened: it took more than 20 s"):
        visitor.take(rush)


# -------------------------------------------------------------------------------------------------------- nothing is left


def test_a_visit_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "MOST_VISITS", 2)
    sessions = session.SessionStore(tmp_path / "visits", Hum(), session.Limits())
    one, two = sessions.of("one"), sessions.of("two")
    assert sessions.of("one") is one and two.folder.is_dir()
    sessions.of("three")
    assert not two.folder.exists() and one.folder.is_dir()
    one.last_s -= session.QUIET_S + 1
    sessions.of("three")
    assert not one.folder.exists()
    sessions.end("three")
    sessions.end("nobody")
    assert list((tmp_path / "visits").iterdir()) == []


def test_uploads_go_with_the_visit(visitor, rush):
    uploads = [visitor.folder.parent.parent / name / "clip.wav" for name in "ab"]
    for file in uploads:
        file.parent.mkdir()
        file.write_bytes(rush.read_bytes())
    visitor.take(uploads[0])
    visitor.take(uploads[0])
    assert uploads[0].exists()
    visitor.take(EXAMPLES / "whole.mp4")
    assert not uploads[0].exists() and (EXAMPLES / "whole.mp4").exists()
    visitor.take(uploads[1])
    assert [file.exists() for file in uploads] == [False, True]
    visitor.leave()
    assert not uploads[1].exists() and not visitor.folder.exists()
