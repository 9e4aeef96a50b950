"""avsi-app: the page in a browser, the command, no requests to other machines, and no files left behind.

The fast tests fill gaps with a tone instead of a network; the slow one uses the real command, network and page.
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
from tests.support.session_fakes import EXAMPLES, HOSTILE, RATE, ToneInpainter, outside

ROOT = Path(__file__).resolve().parents[2]
GRADIO_WARNING = "Method not implemented."  # Gradio's client prints it whenever it closes its stream


# ------------------------------------------------------------------------------------------------------------- isolation


def test_a_second_signal_does_not_interrupt_the_deletion():
    before = {number: signal.getsignal(number) for number in cli.STOP_SIGNALS}
    try:
        with pytest.raises(KeyboardInterrupt):
            cli._stop(signal.SIGTERM, None)
        for number in cli.STOP_SIGNALS:
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_folder_whose_deletion_was_interrupted_is_deleted_by_the_next_server(tmp_path, monkeypatch):
    """Its lock was deleted already; a folder that was just created, and has no lock yet, is kept."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, new = (tmp_path / f"{isolation.PREFIX}{name}" for name in ("old", "new"))
    for folder in (old, new):
        (folder / "gradio").mkdir(parents=True)
        (folder / "gradio" / "upload.wav").touch()
    os.utime(old, (1, 1))
    isolation.remove_left_behind()
    assert not old.exists() and (new / "gradio" / "upload.wav").exists()


def test_the_folder_of_a_killed_server_is_deleted_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "avsi-app-killed").mkdir()
    (tmp_path / "avsi-app-killed" / "lock").touch()
    with isolation.temporary_folder() as first:
        assert not (tmp_path / "avsi-app-killed").exists()
        with isolation.temporary_folder() as second:
            assert first.is_dir() and second.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_connections_to_other_machines_are_blocked():
    script = """
import socket
from avsi_jax.app import isolation
isolation.block_outgoing_connections("127.0.0.1")
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
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["192.0.2.1", "example.org", "192.0.2.1"]


# ------------------------------------------------------------------------------------------------------------------ the page

STATE = {  # the state of the page, as JavaScript expressions
    "num_plots": "document.querySelectorAll('#preview img').length",
    "gaps": "document.querySelector('#gaps textarea, #gaps input').value",
    "errors": "[...document.querySelectorAll('.toast-body')].map(e => e.innerText).join()",
    "restored": "document.querySelectorAll('#restored-plot img').length && document.querySelector('#restored a[href]')?.href",
}


@pytest.fixture
def chromium():
    from tests.support import browser

    if not (program := browser.find()):
        pytest.skip("needs a Chromium")
    with browser.Browser(program) as opened:
        yield opened


def upload(page, address: str, clip: Path, width: int = 1280) -> None:
    page.open(address, width)
    page.wait_for("!!document.querySelector('#file input[type=file]') && !!document.querySelector('#restore')")
    page.choose_files("#file input[type=file]", clip)


def restore(page) -> np.ndarray:
    """Presses the button; the audio (N, C) that the page then offers, downloaded like a browser does."""
    page.evaluate("document.querySelector('#restore').click()")
    address = page.wait_for(STATE["restored"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "restored.wav"
        file.write_bytes(urllib.request.urlopen(address, timeout=60).read())
        return clip_io.read_clip(file).audio.samples


def check_no_errors_or_requests(page, address: str) -> None:
    """No error on the console except Gradio's own, and no request to another machine."""
    assert [message for message in page.console_errors() if GRADIO_WARNING not in message] == []
    assert [url for url in page.requested() if not url.startswith((address, f"blob:{address}"))] == []


def test_an_uploaded_clip_is_restored(chromium, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    clip = EXAMPLES / "drawn_mouth_with_gap.mp4"
    samples = clip_io.read_clip(clip).audio.samples
    with cli.served(ToneInpainter(), session.Limits()) as address:
        upload(chromium, address, clip)
        chromium.wait_for(STATE["num_plots"])
        (gap,) = session.parse_gaps(chromium.wait_for(STATE["gaps"]))
        assert gap == pytest.approx((1.0, 1.6), abs=0.01)
        restored, kept = restore(chromium), outside([gap], len(samples), RATE)
        np.testing.assert_array_equal(restored[kept], samples[kept])
        assert np.abs(restored[~kept]).max() > 0.2
        assert "bin <blue> at f two now" in chromium.evaluate("document.querySelector('#summary').innerText")
        check_no_errors_or_requests(chromium, address)
    assert [p for p in tmp_path.iterdir() if p.name.startswith(isolation.PREFIX)] == []


@pytest.mark.slow
def test_the_command_with_a_network_restores_real_clips_and_refuses_hostile_ones(chromium, trained, grid_dir, tmp_path):
    """In a process of its own: a real clip with a test gap at both widths, hostile uploads, and the end of the server."""
    pytest.importorskip("gradio")
    temp = tmp_path / "temp"
    temp.mkdir()
    command = [sys.executable, "-m", "avsi_jax.app.cli", f"--checkpoint={trained}", "--port=0", "--max_mb=1"]
    server = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(temp)}, stdout=subprocess.PIPE, text=True)
    try:
        address = re.match(r"avsi-app: (http://127\.0\.0\.1:\d+/)", server.stdout.readline()).group(1)
        clip = grid_dir / "s1" / "bbaz5s.mpg"
        original = clip_io.read_clip(clip).audio
        for width in (1280, 390):
            upload(chromium, address, clip, width)
            chromium.wait_for(STATE["num_plots"])
            chromium.evaluate("document.querySelector('#make-gap').click()")
            gaps = session.parse_gaps(chromium.wait_for(STATE["gaps"]))
            restored, kept = restore(chromium), outside(gaps, len(original.samples), original.rate)
            pcm = np.clip(np.rint(original.samples * 32768), -32768, 32767) / 32768
            np.testing.assert_array_equal(restored[kept], pcm[kept])
            assert restored[~kept].any() and not kept.all()
            assert chromium.evaluate("document.documentElement.scrollWidth") <= width
            assert chromium.evaluate("document.querySelectorAll('#original a[href], #masked a[href]').length") == 2
        for name, data in {**HOSTILE, "large.wav": bytes(2_000_000)}.items():
            (tmp_path / name).write_bytes(data)
            upload(chromium, address, tmp_path / name)
            message = chromium.wait_for(STATE["errors"])
            assert name in message and "Traceback" not in message and str(temp) not in message
        check_no_errors_or_requests(chromium, address)
        chromium.open("about:blank", 1280)
        # Gradio itself leaves an empty file for every upload, until the server stops.
        left = lambda: [p for p in temp.glob(f"{isolation.PREFIX}*/gradio/**/*.*") if p.is_file()]
        until = time.monotonic() + 60
        while left() and time.monotonic() < until:
            chromium.evaluate("new Promise(ok => setTimeout(ok, 200))")
        assert left() == [], "the page was closed, but its clip is still there"
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


def test_mistakes_are_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    assert cli.main([f"--checkpoint={tmp_path}"]) == 2
    assert str(tmp_path) in one_line(capsys)
    monkeypatch.setattr(cli, "_load_inpainter", lambda checkpoint: ToneInpainter())
    for argument in ("--max_mb=0", "--max_seconds=inf", "--port=70000"):
        assert cli.main([argument]) == 2
        assert argument in one_line(capsys)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main([]) == 2
    assert "pip install 'avsi_jax[app]'" in one_line(capsys)


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "-m", "avsi_jax.app.cli", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--max_seconds" in done.stdout
    assert not {"jax", "numpy", "av", "gradio"} & {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
