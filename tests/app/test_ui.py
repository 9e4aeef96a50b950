"""The event handlers of the page: what its components show after each event, without a browser."""

import types

import numpy as np
import pytest

gr = pytest.importorskip("gradio")

from avsi_jax.app import session, ui  # noqa: E402
from avsi_jax.media import clip_io  # noqa: E402
from avsi_jax.runtime import process_pool  # noqa: E402
from tests.support.session_fakes import EXAMPLES, HOSTILE, ToneInpainter, run_inline  # noqa: E402

CLIP = EXAMPLES / "drawn_mouth_with_gap.mp4"  # its gap is detected


class Page:
    """Calls event handlers as Gradio does. shown: the values that the components have in the browser."""

    def __init__(self, folder):
        self.sessions = session.SessionStore(folder, ToneInpainter(), session.Limits())
        self.handlers = ui.Handlers(self.sessions)
        self.shown = {"gaps": "", "token": "", "face": -1, "sync": False}

    def press(self, work, outputs, *inputs):
        """An event with the inputs that the page has now; the function returned is its turn in the server's queue."""

        def turn():
            values = self.handlers.handler(work)(types.SimpleNamespace(session_hash="one"), *inputs)
            values = values if isinstance(values, tuple) else (values,)
            self.shown |= {name: value for name, value in zip(outputs, values, strict=True) if value != gr.skip()}

        return turn

    def load(self, file=CLIP, origin="file"):
        work = lambda one, path: self.handlers.load(origin, one, path)
        return self.press(work, ui.CLIP_OUTPUTS, str(file))

    def detect(self):
        return self.press(self.handlers.detect, ui.GAP_OUTPUTS, self.shown["token"], self.shown["gaps"])

    def make_gap(self, start_s=0.2, length_ms=300):
        return self.press(self.handlers.make_gap, ui.GAP_OUTPUTS, self.shown["token"], start_s, length_ms)

    def redraw(self):
        return self.press(self.handlers.redraw, ("preview",), self.shown["token"], self.shown["gaps"])

    def restore(self):
        return self.press(self.handlers.restore, ui.RESULT_OUTPUTS, *self.request())

    def after_restore(self):
        return self.press(self.handlers.replace_old_result, ("summary", "results"), *self.request())

    def after_change(self):
        return self.press(self.handlers.hide_old_result, ("summary", "results"), *self.request())

    def request(self):
        return [self.shown[name] for name in ("token", "gaps", "face", "sync")]

    def after_error(self):
        return self.press(self.handlers.refresh, ui.REFRESH_OUTPUTS, self.shown["gaps"])

    def result_is_shown(self):
        return self.shown["results"].get("visible")


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Clips are decoded in this process, and nothing is plotted."""
    monkeypatch.setattr(process_pool, "run", run_inline)
    for name in ("audio", "face"):
        monkeypatch.setattr(ui.rendering.clip_plots, name, lambda *_, **__: "data:image/png;base64,")
    return Page(tmp_path / "gradio" / "sessions")


@pytest.fixture
def noise(tmp_path):
    """A file with 1 s of noise, in which no gap is detected."""
    clip_io.write_audio(tmp_path / "noise.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 8000)
    return tmp_path / "noise.wav"


def test_a_restoration_pressed_while_another_clip_loads_is_refused(page, noise):
    """It would restore the gap of the first clip in the second."""
    page.load()()
    load, restore = page.load(noise), page.restore()
    load()
    with pytest.raises(gr.Error, match="changed"):
        restore()
    page.after_error()()
    assert not page.result_is_shown() and page.shown["gaps"] == ""


def test_a_restoration_pressed_while_a_gap_is_made_is_refused(page):
    page.load()()
    make_gap, restore = page.make_gap(), page.restore()
    make_gap()
    with pytest.raises(gr.Error, match="changed"):
        restore()
    page.restore()()
    assert page.result_is_shown() and "0.20-0.50 s" in page.shown["summary"]


def test_a_gap_made_while_another_clip_loads_is_refused(page, noise):
    page.load()()
    load, make_gap, redraw = page.load(noise), page.make_gap(), page.redraw()
    load()
    shown = dict(page.shown)
    with pytest.raises(gr.Error, match="changed"):
        make_gap()
    redraw()
    assert page.shown == shown, "the gaps of the first clip were drawn into the second"


def test_gaps_that_are_typed_are_restored(page):
    page.load()()
    page.shown["gaps"] = "0:00.2-0:00.5"
    page.redraw()()
    assert "Gaps to restore: 0.20-0.50 s" in page.shown["preview"]
    page.restore()()
    page.after_restore()()
    assert page.result_is_shown() and "0.20-0.50 s" in page.shown["summary"]


def test_a_result_is_hidden_when_the_gaps_were_changed_while_it_was_computed(page):
    page.load()()
    restore = page.restore()
    page.shown["gaps"] = "0.2-0.5"
    restore()
    page.after_restore()()
    assert not page.result_is_shown() and "again" in page.shown["summary"]


@pytest.mark.parametrize("change", [{"gaps": "0.2-0.5"}, {"gaps": ""}, {"face": 1}, {"sync": True}])
def test_an_old_result_is_hidden_when_the_user_changes_the_gaps_or_an_option(page, change):
    page.load()()
    page.restore()()
    page.after_change()()
    assert page.result_is_shown()
    page.shown |= change
    page.after_change()()
    assert not page.result_is_shown() and page.shown["summary"] == ""


@pytest.mark.parametrize("change", [Page.make_gap, Page.detect, Page.load])
def test_an_old_result_is_hidden_when_the_server_changes_the_gaps(page, change):
    page.load()()
    page.restore()()
    assert page.result_is_shown()
    change(page)()
    assert not page.result_is_shown() and page.shown["summary"] == ""


def test_an_old_result_is_hidden_after_an_error(page):
    page.load()()
    page.restore()()
    page.shown["gaps"] = "0,2-0,5"
    with pytest.raises(gr.Error, match="decimal comma"):
        page.restore()()
    page.after_error()()
    assert not page.result_is_shown() and page.shown["summary"] == ""
    assert "None is entered" in page.shown["preview"] and page.shown["gaps"] == "0,2-0,5"


def test_a_clip_that_is_refused_leaves_an_empty_page(page, tmp_path):
    page.load()()
    page.restore()()
    (tmp_path / "text.mp4").write_bytes(HOSTILE["text.mp4"])
    with pytest.raises(gr.Error, match="text.mp4"):
        page.load(tmp_path / "text.mp4")()
    page.after_error()()
    assert page.shown["gaps"] == "" and page.shown["preview"] == ui.rendering.NO_CLIP_YET and not page.result_is_shown()
    assert [page.shown[origin] for origin in ui.ORIGINS] == [None] * 3 and page.shown["input_audio"]["value"] is None
    with pytest.raises(gr.Error, match="clip first"):
        page.restore()()


def test_the_upload_box_shows_no_file_but_the_loaded_one(page):
    page.shown |= dict.fromkeys(ui.ORIGINS, "an earlier clip")
    page.load(origin="file")()
    assert [page.shown[origin] for origin in ui.ORIGINS] == ["an earlier clip", None, None]
    page.load(origin="microphone")()
    assert [page.shown[origin] for origin in ui.ORIGINS] == [None] * 3
    page.shown["file"] = "an earlier clip"
    page.press(lambda one: page.handlers.example("drawn_mouth.mp4", one), ui.CLIP_OUTPUTS)()
    assert page.shown["file"] is None


def test_detecting_no_gap_keeps_what_is_entered_and_says_so(page, noise):
    page.load(noise)()
    page.shown["gaps"] = "0.4-0.7"
    page.detect()()
    assert page.shown["gaps"] == "0.4-0.7"
    assert "No gap detected; those that you entered stay." in page.shown["preview"] and "0.40-0.70 s" in page.shown["preview"]
    page.restore()()
    assert page.result_is_shown()


def test_the_message_that_no_gap_is_detected_goes_when_one_is_made(page, noise):
    page.load(noise)()
    assert "No gap detected" in page.shown["preview"]
    page.make_gap()()
    assert "No gap detected" not in page.shown["preview"]
    page.shown["gaps"] = "0.1-0.2"
    page.redraw()()
    assert "No gap detected" not in page.shown["preview"] and "0.10-0.20 s" in page.shown["preview"]


def test_whatever_pyav_decodes_can_be_chosen():
    from gradio.components.file import client_utils  # the check that an upload goes through

    with gr.Blocks():
        kinds = ui._clip_components()["file"].file_types
    for name in (
        "a.mpg",
        "a.MP4",
        "a.webm",
        "a.m4a",
        "a.mp3",
        "a.ogg",
        "a.opus",
        "a.m4v",
        "a.ts",
        "a.mts",
        "a.3gp",
        "a.wmv",
        "a.flv",
    ):
        assert client_utils.is_valid_file(name, kinds), name
    assert not client_utils.is_valid_file("a.txt", kinds)


def test_files_written_after_the_page_was_closed_are_deleted(page):
    """The page is closed in the middle of a restoration, which goes on writing."""
    page.load()()
    one = page.sessions.get("one")

    def close_and_write(session):
        page.sessions.end("one")
        session._new_file("restored.wav").write_text("audio of the user")
        return ()

    page.press(close_and_write, ())()
    assert not one.folder.exists()


def test_an_event_that_only_reads_does_not_wait_for_a_restoration(page):
    page.load()()
    with page.sessions.get("one").lock:
        handle = page.handlers.handler(page.handlers.hide_old_result, locked=False)
        assert len(handle(types.SimpleNamespace(session_hash="one"), *page.request())) == 2
