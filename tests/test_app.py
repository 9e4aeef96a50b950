"""avsi-app: a clip goes in, a restored sound comes out; what a visitor does wrong takes one line; nothing is asked or left.

The fast tests fill gaps with a hum in place of a network; the slow one goes through the real command, network and page.
"""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from avsi_jax import app, inpaint, media, seclusion, showing, visit

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "avsi_jax" / "examples"
RATE = 16_000  # of the examples
OWN_WARNING = "Method not implemented."  # Gradio's client says so, as a warning, whenever it closes its stream


@dataclasses.dataclass
class Hum:
    """An Inpainter that fills gaps with a hum and sees a face that stands still."""

    asked: dict = dataclasses.field(default_factory=dict)

    def inpaint(self, clip, gaps, **asked):
        self.asked = asked
        found = media.read_clip(clip)
        samples, rate = found.sound.samples.copy(), found.sound.rate
        for start, end in gaps:
            span = slice(round(start * rate), round(end * rate))
            samples[span] = (0.25 * np.sin(np.arange(span.stop - span.start) / 8)[:, None]).astype(np.float32)
        rng, face = np.random.default_rng(0), (None, None, None)
        if found.pictures is not None:
            points = np.tile(rng.uniform(100, 200, (1, 68, 2)), (len(found.pictures.rgb), 1, 1)).astype(np.float32)
            face = points, np.arange(len(points)) % 2 == 0, found.pictures.times
        by = "sound and lips" if found.pictures is not None else "sound"
        filled = tuple(inpaint.Gap(a, b, 0.7, "bin <blue> at f two now", by) for a, b in gaps)
        blank = np.zeros((10, 64), np.float32)
        return inpaint.Repair(
            samples, rate, found.sound.subtype, filled, ("a <warning>",), blank, blank, 0.02, *face, None, {"all": 0.1}
        )


@pytest.fixture
def visitor(tmp_path, monkeypatch):
    """A visit whose clips are opened in this process: starting another takes a second."""
    inline = lambda work, jobs, **limits: [visit.workers.Outcome(0, work(*jobs[0]))]
    monkeypatch.setattr(visit.workers, "run", inline)
    return visit.Visit(tmp_path / "gradio" / "visits" / "one", Hum(), visit.Limits())


@pytest.fixture
def rush(tmp_path):
    """1 s of a rushing sound, stereo, 24 bit."""
    samples = np.random.default_rng(0).normal(0, 0.1, (8000, 1)) * np.array([1, 0.5])
    media.write_sound(tmp_path / "a sound.wav", samples.astype(np.float32), 8000, "PCM_24")
    return tmp_path / "a sound.wav"


def outside(gaps, num_samples, rate):
    time_ = np.arange(num_samples) / rate
    return ~np.any([(time_ >= a - 1e-6) & (time_ < b - 1e-6) for a, b in gaps], axis=0)


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
    assert visit.parse_gaps(text) == gaps
    assert visit.parse_gaps(visit.written(gaps)) == gaps


def test_a_second_signal_does_not_break_off_the_deleting():
    before = {number: signal.getsignal(number) for number in app.ENDINGS}
    try:
        with pytest.raises(KeyboardInterrupt):
            app._stop(signal.SIGTERM, None)
        for number in app.ENDINGS:
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_folder_whose_deleting_was_broken_off_goes_next_time(tmp_path, monkeypatch):
    """Its lock went first; one that has just begun, and has no lock yet, stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, new = (tmp_path / f"{seclusion.PREFIX}{name}" for name in ("old", "new"))
    for folder in (old, new):
        (folder / "gradio").mkdir(parents=True)
        (folder / "gradio" / "upload.wav").touch()
    os.utime(old, (1, 1))
    seclusion.remove_left_behind()
    assert not old.exists() and (new / "gradio" / "upload.wav").exists()


def test_a_hole_that_was_found_is_written_whole():
    """A late hole's edges lie between two thousandths: sound of up to 5 ms was left silent where four digits were written."""
    (start, end) = visit.parse_gaps(visit.written([(12.34567, 59.98761, "silence")]))[0]
    assert 12.3447 <= start <= 12.34567 and 59.98761 <= end <= 59.9886
    assert visit.written([(0.57, 1.73)]) == "0.57-1.73" and visit.written([(100.5, 123.457)]) == "100.5-123.457"


@pytest.mark.parametrize("text", ["1", "1:2", "a-b", "2-1", "1-1", "-1-2", "nan-2", "1e9-2e9", "1-2-3", "<b>-2", "1-2," * 30])
def test_gaps_that_are_none_take_one_line(text):
    with pytest.raises(ValueError) as error:
        visit.parse_gaps(text)
    assert "expected" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 120


@pytest.mark.parametrize(("confidence", "words"), [(0.95, "sure"), (0.7, "rather sure"), (0.5, "half sure"), (0.1, "a guess")])
def test_confidence_in_words(confidence, words):
    assert visit.in_words(confidence) == words


# -------------------------------------------------------------------------------------------------------------- a clip's way


def test_a_damaged_film_is_looked_at_and_restored(visitor):
    clip = visitor.take(EXAMPLES / "with_a_hole.mp4")
    ((start, end, kind),) = clip.holes
    assert (start, end) == pytest.approx((1.0, 1.6), abs=0.01) and kind in ("silence", "packets")
    assert "3.00 s of sound at 16 kHz, mono; pictures of 360x288, 25 a second" in clip.said()
    result = visitor.restore(visit.written(clip.holes), face=1, sync="auto")
    assert visitor.painter.asked == {"face": 1, "sync": "auto"}
    given, whole = media.read_clip(EXAMPLES / "with_a_hole.mp4"), media.read_clip(result.clip)
    kept = outside(result.gaps, len(given.sound.samples), RATE)
    assert result.clip.name == "with_a_hole.restored.mp4" and set(result.sounds) == {"damaged", "restored"}
    np.testing.assert_array_equal(whole.pictures.rgb, given.pictures.rgb)
    for restored in (whole.sound.samples, media.read_clip(result.sounds["restored"]).sound.samples):
        np.testing.assert_array_equal(restored[kept], given.sound.samples[kept])
        assert np.abs(restored[~kept]).max() > 0.2
    shown = showing.told(result) + showing.faces(result) + "".join(showing.compared(clip, result, result.gaps).values())
    assert "set right" not in shown, "sync_s is what was measured, also where nothing was corrected: the warnings say what was done"
    assert "rather sure" in shown and "bin &lt;blue&gt; at f two now" in shown and "a &lt;warning&gt;" in shown
    assert shown.count("data:image/png;base64,") == 2 + visit.STRIP


def test_a_whole_sound_is_damaged_on_purpose(visitor, rush):
    clip, given = visitor.take(rush), media.read_clip(rush).sound.samples
    assert not clip.holes
    gaps = visitor.damage(0.4, 300)
    assert gaps == [(0.4, 0.7)] and visitor.damage(5, 300) == [(0.98, 1.0)]
    result = visitor.restore(visit.written(gaps))
    sounds = {name: media.read_clip(file).sound for name, file in result.sounds.items()}
    kept = outside(gaps, 8000, 8000)
    np.testing.assert_array_equal(sounds["original"].samples, given)
    assert not sounds["damaged"].samples[~kept].any()
    for name in ("damaged", "restored"):
        np.testing.assert_array_equal(sounds[name].samples[kept], given[kept])
        assert sounds[name].subtype == "PCM_24"
    assert result.clip.name == "a_sound.restored.wav" and showing.faces(result) == ""
    visitor.found()
    assert "original" not in visitor.restore("0.4-0.7").sounds


def test_a_film_without_pictures_comes_back_as_its_sound(visitor, rush, tmp_path):
    import av

    with av.open(str(rush)) as given, av.open(str(tmp_path / "talk.mp4"), "w") as out:
        sound = out.add_stream("aac", rate=8000, layout="stereo")
        for frame in given.decode(audio=0):
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    visitor.take(tmp_path / "talk.mp4")
    result = visitor.restore("0.4-0.7")
    assert result.clip.name == "talk.restored.wav" and "written as .wav, its sound alone" in "".join(result.warnings)
    assert np.abs(media.read_clip(result.clip).sound.samples[3300:5500]).max() > 0.2


def test_a_long_clip_is_drawn_around_its_gaps():
    assert showing.window([(1.0, 2.0)], 5.0) == (0.0, 5.0)
    assert showing.window([(10.0, 10.5), (12.0, 12.5)], 60.0) == (8.5, 14.0)


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


HOSTILE = {
    "text.mp4": b"this is no film, it is a text\n" * 50,
    "nothing.wav": b"",
    "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "list.mkv": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "archive.mov": b"PK\x03\x04" + bytes(2000),
}


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
    limits = visit.Limits()
    visit.check_opens(rush, "a sound.wav", limits)
    (tmp_path / "text.mp4").write_bytes(HOSTILE["text.mp4"])
    with pytest.raises(media.MediaError, match=r"^text.mp4: cannot be decoded"):
        visit.check_opens(tmp_path / "text.mp4", "text.mp4", limits)


def test_limits_are_looked_at_before_anything_is_decoded(visitor, rush, monkeypatch):
    monkeypatch.setattr(visit.workers, "run", lambda *a, **k: pytest.fail("opened"))
    visitor.limits = visit.Limits(megabytes=0.01)
    with pytest.raises(media.MediaError, match=r"a sound.wav has 0.0 MB; at most 0.01 MB are taken"):
        visitor.take(rush)


def test_limits_are_looked_at_before_a_face_is_followed(visitor, rush, monkeypatch):
    visitor.limits = visit.Limits(seconds=0.9)
    with pytest.raises(media.MediaError, match=r"a sound.wav is 1.0 s long; at most 0.9 s are taken here: .*avsi-inpaint"):
        visitor.take(rush)
    visitor.limits = visit.Limits()
    outcome = visit.workers.Outcome(0, (1.0, (60_000, 60_000)))
    monkeypatch.setattr(visit.workers, "run", lambda *a, **k: [outcome])
    with pytest.raises(media.MediaError, match=r"pictures of 60000x60000; at most 1920x1088"):
        visitor.take(EXAMPLES / "whole.mp4")
    monkeypatch.setattr(visit.workers, "run", lambda *a, **k: [visit.workers.Outcome(0, None, "took more than 20 s")])
    with pytest.raises(media.MediaError, match=r"a sound.wav: cannot be opened: it took more than 20 s"):
        visitor.take(rush)


# -------------------------------------------------------------------------------------------------------- nothing is left


def test_a_visit_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(visit, "MOST_VISITS", 2)
    visits = visit.Visits(tmp_path / "visits", Hum(), visit.Limits())
    one, two = visits.of("one"), visits.of("two")
    assert visits.of("one") is one and two.folder.is_dir()
    visits.of("three")
    assert not two.folder.exists() and one.folder.is_dir()
    one.last_s -= visit.QUIET_S + 1
    visits.of("three")
    assert not one.folder.exists()
    visits.end("three")
    visits.end("nobody")
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


def test_what_a_killed_server_left_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "avsi-app-killed").mkdir()
    (tmp_path / "avsi-app-killed" / "lock").touch()
    with seclusion.own_folder() as first:
        assert not (tmp_path / "avsi-app-killed").exists()
        with seclusion.own_folder() as second:
            assert first.is_dir() and second.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_no_call_goes_outside():
    script = """
import socket
from avsi_jax import seclusion
seclusion.forbid_calls_outside("127.0.0.1")
with socket.create_server(("127.0.0.1", 0)) as here:
    socket.create_connection(here.getsockname()).close()
    socket.create_connection(("localhost", here.getsockname()[1])).close()
for call in (
    lambda: socket.create_connection(("192.0.2.1", 80), 1),
    lambda: socket.getaddrinfo("example.org", 443),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
):
    try:
        call()
    except PermissionError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"avsi-app asks nothing of other machines; found a call to {name}" for name in ("192.0.2.1", "example.org", "192.0.2.1")
    ]


# ------------------------------------------------------------------------------------------------------------------ the page

WHAT_IS_THERE = {  # by the page's own names
    "drawn": "document.querySelectorAll('#seen img').length",
    "gaps": "document.querySelector('#gaps textarea, #gaps input').value",
    "told": "[...document.querySelectorAll('.toast-body')].map(e => e.innerText).join()",
    "restored": "document.querySelectorAll('#restored-drawn img').length && document.querySelector('#restored a[href]')?.href",
}


@pytest.fixture
def chromium():
    import browser

    if not (program := browser.find()):
        pytest.skip("needs a Chromium")
    with browser.Browser(program) as opened:
        yield opened


def put_in(page, address: str, clip: Path, width: int = 1280) -> None:
    page.open(address, width)
    page.wait_for("!!document.querySelector('#file input[type=file]') && !!document.querySelector('#restore')")
    page.put_in("#file input[type=file]", clip)


def restore(page) -> np.ndarray:
    """Presses the button; the sound (N, C) that the page then offers, fetched as a browser does."""
    page.ask("document.querySelector('#restore').click()")
    address = page.wait_for(WHAT_IS_THERE["restored"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "restored.wav"
        file.write_bytes(urllib.request.urlopen(address, timeout=60).read())
        return media.read_clip(file).sound.samples


def check_quiet(page, address: str) -> None:
    """No complaint but Gradio's own, and nothing asked of another machine."""
    assert [said for said in page.complaints() if OWN_WARNING not in said] == []
    assert [url for url in page.requested() if not url.startswith((address, f"blob:{address}"))] == []


def test_a_clip_goes_in_and_a_restored_sound_comes_out(chromium, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    clip = EXAMPLES / "with_a_hole.mp4"
    given = media.read_clip(clip).sound.samples
    with app.served(Hum(), visit.Limits()) as address:
        put_in(chromium, address, clip)
        chromium.wait_for(WHAT_IS_THERE["drawn"])
        (gap,) = visit.parse_gaps(chromium.wait_for(WHAT_IS_THERE["gaps"]))
        assert gap == pytest.approx((1.0, 1.6), abs=0.01)
        restored, kept = restore(chromium), outside([gap], len(given), RATE)
        np.testing.assert_array_equal(restored[kept], given[kept])
        assert np.abs(restored[~kept]).max() > 0.2
        assert "bin <blue> at f two now" in chromium.ask("document.querySelector('#told').innerText")
        check_quiet(chromium, address)
    assert [p for p in tmp_path.iterdir() if p.name.startswith(seclusion.PREFIX)] == []


@pytest.mark.slow
def test_the_whole_way_with_a_network(chromium, trained, grid_dir, tmp_path):
    """The command in a process of its own: a real clip damaged on purpose at both widths, hostile uploads, and the end of it."""
    pytest.importorskip("gradio")
    temp = tmp_path / "temp"
    temp.mkdir()
    command = [sys.executable, "-m", "avsi_jax.app", f"--checkpoint={trained}", "--port=0", "--max_mb=1"]
    server = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(temp)}, stdout=subprocess.PIPE, text=True)
    try:
        address = re.match(r"avsi-app: (http://127\.0\.0\.1:\d+/)", server.stdout.readline()).group(1)
        clip = grid_dir / "s1" / "bbaz5s.mpg"
        given = media.read_clip(clip).sound
        for width in (1280, 390):
            put_in(chromium, address, clip, width)
            chromium.wait_for(WHAT_IS_THERE["drawn"])
            chromium.ask("document.querySelector('#damage').click()")
            gaps = visit.parse_gaps(chromium.wait_for(WHAT_IS_THERE["gaps"]))
            restored, kept = restore(chromium), outside(gaps, len(given.samples), given.rate)
            pcm = np.clip(np.rint(given.samples * 32768), -32768, 32767) / 32768
            np.testing.assert_array_equal(restored[kept], pcm[kept])
            assert restored[~kept].any() and not kept.all()
            assert chromium.ask("document.documentElement.scrollWidth") <= width
            assert chromium.ask("document.querySelectorAll('#original a[href], #damaged a[href]').length") == 2
        for name, data in {**HOSTILE, "large.wav": bytes(2_000_000)}.items():
            (tmp_path / name).write_bytes(data)
            put_in(chromium, address, tmp_path / name)
            said = chromium.wait_for(WHAT_IS_THERE["told"])
            assert name in said and "Traceback" not in said and str(temp) not in said
        check_quiet(chromium, address)
        chromium.open("about:blank", 1280)
        # Gradio itself leaves an empty file for every upload, until the server stops.
        held = lambda: [p for p in temp.glob(f"{seclusion.PREFIX}*/gradio/**/*.*") if p.is_file()]
        until = time.monotonic() + 60
        while held() and time.monotonic() < until:
            chromium.ask("new Promise(ok => setTimeout(ok, 200))")
        assert held() == [], "a page was closed, its clip is still there"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
    assert [p for p in temp.iterdir() if p.name.startswith(seclusion.PREFIX)] == []


# ------------------------------------------------------------------------------------------------------------------- command


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("avsi-app: ") and err.count("\n") == 1, err
    return err


def test_mistakes_take_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    assert app.main([f"--checkpoint={tmp_path}"]) == 2
    assert str(tmp_path) in one_line(capsys)
    monkeypatch.setattr(app, "_painter", lambda checkpoint: Hum())
    for argument in ("--max_mb=0", "--max_seconds=inf", "--port=70000"):
        assert app.main([argument]) == 2
        assert f"{argument}: expected" in one_line(capsys)
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    assert app.main([]) == 2
    assert "pip install 'avsi_jax[app]'" in one_line(capsys)


def test_help_is_quick():
    command = [sys.executable, "-X", "importtime", "-m", "avsi_jax.app", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--max_seconds" in done.stdout
    assert not {"jax", "numpy", "av", "gradio"} & {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
