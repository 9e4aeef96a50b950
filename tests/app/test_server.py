"""avsi-app: the page as a visitor finds it, the command and its ends, nothing asked of other machines, nothing left on this one.

The fast tests fill gaps with a hum in place of a network; the slow one goes through the real command, network and page.
"""

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

from avsi_jax.app import cli, isolation, session
from avsi_jax.media import clip_io
from tests.support.session_fakes import EXAMPLES, HOSTILE, RATE, Hum, outside

ROOT = Path(__file__).resolve().parents[2]
OWN_WARNING = "Method not implemented."  # Gradio's client says so, as a warning, whenever it closes its stream


# ------------------------------------------------------------------------------------------------- nothing is left or asked


def test_a_second_signal_does_not_break_off_the_deleting():
    before = {number: signal.getsignal(number) for number in cli.ENDINGS}
    try:
        with pytest.raises(KeyboardInterrupt):
            cli._stop(signal.SIGTERM, None)
        for number in cli.ENDINGS:
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_folder_whose_deleting_was_broken_off_goes_next_time(tmp_path, monkeypatch):
    """Its lock went first; one that has just begun, and has no lock yet, stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, new = (tmp_path / f"{isolation.PREFIX}{name}" for name in ("old", "new"))
    for folder in (old, new):
        (folder / "gradio").mkdir(parents=True)
        (folder / "gradio" / "upload.wav").touch()
    os.utime(old, (1, 1))
    isolation.remove_left_behind()
    assert not old.exists() and (new / "gradio" / "upload.wav").exists()


def test_what_a_killed_server_left_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "avsi-app-killed").mkdir()
    (tmp_path / "avsi-app-killed" / "lock").touch()
    with isolation.own_folder() as first:
        assert not (tmp_path / "avsi-app-killed").exists()
        with isolation.own_folder() as second:
            assert first.is_dir() and second.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_no_call_goes_outside():
    script = """
import socket
from avsi_jax.app import isolation
isolation.forbid_calls_outside("127.0.0.1")
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
    from tests.support import browser

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
        return clip_io.read_clip(file).audio.samples


def check_quiet(page, address: str) -> None:
    """No complaint but Gradio's own, and nothing asked of another machine."""
    assert [said for said in page.complaints() if OWN_WARNING not in said] == []
    assert [url for url in page.requested() if not url.startswith((address, f"blob:{address}"))] == []


def test_a_clip_goes_in_and_a_restored_audio_comes_out(chromium, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    clip = EXAMPLES / "with_a_hole.mp4"
    given = clip_io.read_clip(clip).audio.samples
    with cli.served(Hum(), session.Limits()) as address:
        put_in(chromium, address, clip)
        chromium.wait_for(WHAT_IS_THERE["drawn"])
        (gap,) = session.parse_gaps(chromium.wait_for(WHAT_IS_THERE["gaps"]))
        assert gap == pytest.approx((1.0, 1.6), abs=0.01)
        restored, kept = restore(chromium), outside([gap], len(given), RATE)
        np.testing.assert_array_equal(restored[kept], given[kept])
        assert np.abs(restored[~kept]).max() > 0.2
        assert "bin <blue> at f two now" in chromium.ask("document.querySelector('#told').innerText")
        check_quiet(chromium, address)
    assert [p for p in tmp_path.iterdir() if p.name.startswith(isolation.PREFIX)] == []


@pytest.mark.slow
def test_the_whole_way_with_a_network(chromium, trained, grid_dir, tmp_path):
    """The command in a process of its own: a real clip damaged on purpose at both widths, hostile uploads, and the end of it."""
    pytest.importorskip("gradio")
    temp = tmp_path / "temp"
    temp.mkdir()
    command = [sys.executable, "-m", "avsi_jax.app.cli", f"--checkpoint={trained}", "--port=0", "--max_mb=1"]
    server = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(temp)}, stdout=subprocess.PIPE, text=True)
    try:
        address = re.match(r"avsi-app: (http://127\.0\.0\.1:\d+/)", server.stdout.readline()).group(1)
        clip = grid_dir / "s1" / "bbaz5s.mpg"
        given = clip_io.read_clip(clip).audio
        for width in (1280, 390):
            put_in(chromium, address, clip, width)
            chromium.wait_for(WHAT_IS_THERE["drawn"])
            chromium.ask("document.querySelector('#damage').click()")
            gaps = session.parse_gaps(chromium.wait_for(WHAT_IS_THERE["gaps"]))
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
        held = lambda: [p for p in temp.glob(f"{isolation.PREFIX}*/gradio/**/*.*") if p.is_file()]
        until = time.monotonic() + 60
        while held() and time.monotonic() < until:
            chromium.ask("new Promise(ok => setTimeout(ok, 200))")
        assert held() == [], "a page was closed, its clip is still there"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
    assert [p for p in temp.iterdir() if p.name.startswith(isolation.PREFIX)] == []


# ------------------------------------------------------------------------------------------------------------------- command


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("avsi-app: ") and err.count("\n") == 1, err
    return err


def test_mistakes_take_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    assert cli.main([f"--checkpoint={tmp_path}"]) == 2
    assert str(tmp_path) in one_line(capsys)
    monkeypatch.setattr(cli, "_painter", lambda checkpoint: Hum())
    for argument in ("--max_mb=0", "--max_seconds=inf", "--port=70000"):
        assert cli.main([argument]) == 2
        assert f"{argument}: expected" in one_line(capsys)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main([]) == 2
    assert "pip install 'avsi_jax[app]'" in one_line(capsys)


def test_help_is_quick():
    command = [sys.executable, "-X", "importtime", "-m", "avsi_jax.app.cli", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--max_seconds" in done.stdout
    assert not {"jax", "numpy", "av", "gradio"} & {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
