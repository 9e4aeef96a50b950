"""avsi-app: the page in a browser, the command, no requests to other machines, and no files left behind.

The fast tests fill gaps with a tone instead of a network; the slow one uses the real command, network and page.
"""

import os
import re
import signal
import socket
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
# Printed by Gradio's client whenever it closes its stream, by its library when a component is hidden, and by its player when a clip
# is replaced before its audio has been fetched, as on a slow machine.
GRADIO_WARNINGS = ("Method not implemented.", "svelte.dev/e/derived_inert", "signal is aborted without reason")


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


OUTSIDE = """
import asyncio, os, socket, subprocess
from avsi_jax.app import isolation
isolation.block_outgoing_connections("192.0.2.7")
here = socket.create_server(("127.0.0.1", 0))
udp = lambda family=socket.AF_INET: socket.socket(family, socket.SOCK_DGRAM)
there, there6, program = ("192.0.2.1", 80), ("2001:db8::1", 80), ["curl", "http://192.0.2.1/"]
"""

REFUSED = (
    "socket.create_connection(there, 1)",
    "socket.socket().connect(there)",
    "socket.socket().connect_ex(there)",
    "socket.socket(socket.AF_INET6).connect(there6)",
    "socket.socket(socket.AF_INET6).connect(('::ffff:192.0.2.1', 80, 0, 0))",
    "udp().connect(there)",
    "udp().sendto(b'x', there)",
    "udp().sendto(b'x', 0, there)",
    "udp().sendmsg([b'x'], [], 0, there)",
    "udp(socket.AF_INET6).sendmsg([b'x'], [], 0, there6)",
    "socket.getaddrinfo('example.org', 443)",
    "socket.getaddrinfo(b'example.org', 443)",
    "socket.gethostbyname('example.org')",
    "socket.gethostbyname_ex('example.org')",
    "socket.gethostbyaddr('192.0.2.1')",
    "socket.getnameinfo(there, 0)",
    "asyncio.run(asyncio.wait_for(asyncio.open_connection('192.0.2.1', 80), 1))",
    "subprocess.run(program)",
    "subprocess.run(' '.join(program), shell=True)",
    "os.popen('curl')",
    "os.system('curl http://192.0.2.1/')",
    "os.posix_spawn('/bin/sh', program, {})",
    "os.posix_spawnp('curl', program, {})",
    "os.execv('/bin/sh', program)",
    "os.execvp('sh', program)",
    "asyncio.run(asyncio.create_subprocess_exec('curl'))",
)
ALLOWED = (
    "socket.create_connection(here.getsockname()).close()",
    "socket.create_connection(('localhost', here.getsockname()[1])).close()",
    "udp().sendto(b'x', here.getsockname())",
    "udp().sendmsg([b'x'], [], 0, here.getsockname())",
    "[end.sendmsg([b'x']) for end in socket.socketpair()]",
    "socket.getnameinfo(here.getsockname(), 0)",
    "socket.getaddrinfo(None, 80)",
    "socket.getaddrinfo('192.0.2.7', 80)",
    "asyncio.run(asyncio.open_connection(*here.getsockname()))",
)


def test_every_way_of_python_code_to_another_machine_is_blocked():
    report_refused = "\n    try:\n        eval(call)\n    except PermissionError:\n        print(call)"
    script = f"{OUTSIDE}\nfor call in {REFUSED + ALLOWED!r}:{report_refused}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(REFUSED)


def test_the_server_uses_an_event_loop_whose_connections_can_be_blocked(monkeypatch):
    """uvloop connects in C, unseen."""
    monkeypatch.setitem(sys.modules, "uvloop", sys)
    with isolation.without_uvloop(), pytest.raises(ImportError):
        __import__("uvloop")
    assert sys.modules["uvloop"] is sys


# ------------------------------------------------------------------------------------------------------------------ the page

STATE = {  # the state of the page, as JavaScript expressions
    "num_plots": "document.querySelectorAll('#preview img').length",
    "gaps": "document.querySelector('#gaps textarea, #gaps input')?.value",
    "errors": "[...document.querySelectorAll('.toast-body')].map(e => e.innerText).join()",
    "file_name": "document.querySelector('#file')?.innerText",
    "result_is_shown": "!!document.querySelector('#restored-plot img')?.offsetParent",
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


def click(page, name: str) -> None:
    page.evaluate(f"document.querySelector('#{name}').click()")


def type_gaps(page, text: str) -> None:
    """Replaces the text as a user does by pasting: no key is pressed."""
    page.evaluate("(field => { field.focus(); field.select(); })(document.querySelector('#gaps textarea, #gaps input'))")
    page("Input.insertText", text=text)


def wait(page, milliseconds: float) -> None:
    page.evaluate(f"new Promise(ok => setTimeout(ok, {milliseconds}))")


def check_no_errors_or_requests(page, address: str, known: tuple[str, ...] = ()) -> None:
    """No error on the console except Gradio's own and `known` ones, and no request to another machine."""
    known += GRADIO_WARNINGS
    assert [message for message in page.console_errors() if not any(text in message for text in known)] == []
    assert [url for url in page.requested() if not url.startswith((address, f"blob:{address}"))] == []


def test_an_uploaded_clip_is_restored(chromium, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("ffmpeg", "ffprobe"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
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
        assert clip.stem in chromium.evaluate(STATE["file_name"])
        type_gaps(chromium, "0.2-0.5")
        chromium.wait_for(f"!({STATE['result_is_shown']})", "the result of other gaps is hidden")
        assert restore(chromium)[round(0.3 * RATE)] != samples[round(0.3 * RATE)]
        click(chromium, "example-drawn_mouth")
        chromium.wait_for(f"({STATE['gaps']}) == '' && !({STATE['result_is_shown']})")
        assert clip.stem not in chromium.evaluate(STATE["file_name"])
        check_no_errors_or_requests(chromium, address)
    assert [p for p in tmp_path.iterdir() if p.name.startswith(isolation.PREFIX)] == []
    assert not (tmp_path / "started").exists(), "the server started ffmpeg or ffprobe"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_restore_never_fills_a_gap_of_an_earlier_clip_or_one_that_was_replaced(chromium, tmp_path, monkeypatch):
    """Another clip is chosen, or a gap is made, and Restore is pressed 0 to 1.5 s later, while the slow server works: 20 times."""
    pytest.importorskip("gradio")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rng, inpainter = np.random.default_rng(0), ToneInpainter()

    def slow(work):
        return lambda *arguments: time.sleep(rng.uniform(0.2, 1)) or work(*arguments)

    clip, gap, made = EXAMPLES / "drawn_mouth_with_gap.mp4", pytest.approx((1.0, 1.6), abs=0.01), (1.05, 1.85)
    num_samples = len(clip_io.read_clip(clip).audio.samples)
    with cli.served(inpainter, session.Limits()) as address:
        monkeypatch.setattr(session.Session, "load", slow(session.Session.load))
        monkeypatch.setattr(session.Session, "make_gap", slow(session.Session.make_gap))
        num_restored = 0
        for number in range(20):
            upload(chromium, address, clip)
            chromium.wait_for(STATE["gaps"])
            num_restored += len(inpainter.calls)
            inpainter.calls.clear()
            click(chromium, "make-gap" if number % 2 else "example-person")
            wait(chromium, rng.uniform(0, 1500))
            click(chromium, "restore")
            chromium.wait_for(f"({STATE['errors']}) || ({STATE['result_is_shown']})", f"the outcome of round {number}")
            wait(chromium, 500)
            allowed = made if number % 2 else gap
            assert all(call == (num_samples, [allowed]) for call in inpainter.calls), (number, inpainter.calls)
            if number % 2 == 0:
                chromium.wait_for(f"({STATE['gaps']}) == ''", "the gap of the earlier clip is gone")
        assert num_restored, "a restoration was let through in some rounds"


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
        # Gradio's client prints this on a page that is left for the next upload while an event still runs, as on a slow machine.
        check_no_errors_or_requests(chromium, address, ("Connection errored out.",))
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
    assert cli.main([f"--checkpoint={tmp_path}", "--port=0"]) == 2
    assert str(tmp_path) in one_line(capsys)
    monkeypatch.setattr(cli, "_load_inpainter", lambda checkpoint, mode: ToneInpainter())
    for argument in ("--max_mb=0", "--max_seconds=inf", "--port=70000"):
        assert cli.main([argument]) == 2
        assert argument in one_line(capsys)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main([]) == 2
    assert "pip install 'avsi_jax[app]'" in one_line(capsys)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--port=x"])
    assert "--port" in one_line(capsys)


def test_a_port_in_use_and_an_unknown_host_are_reported_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(cli, "check_gradio_installed", lambda: None)
    monkeypatch.setattr(cli, "_load_inpainter", lambda checkpoint, mode: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main([f"--port={port}"]) == 2
        line = one_line(capsys)
        assert f"127.0.0.1:{port}" in line and "another program" in line and "--port" in line
    assert cli.main(["--host=256.1.1.1"]) == 2
    assert "256.1.1.1" in one_line(capsys)


def test_a_missing_run_is_reported_as_by_the_command(capsys, monkeypatch, tmp_path):
    from avsi_jax.inpainting import cli as inpainting_cli

    monkeypatch.setattr(signal, "signal", lambda *a: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.wav").touch()
    for checkpoint in ("missing", str(tmp_path)):
        assert inpainting_cli.main(["clip.wav", f"--checkpoint={checkpoint}"]) == 2
        expected = capsys.readouterr().err.replace("avsi-inpaint: ", "avsi-app: ")
        assert cli.main([f"--checkpoint={checkpoint}", "--port=0"]) == 2
        assert one_line(capsys) == expected and checkpoint in expected


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "-m", "avsi_jax.app.cli", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--max_seconds" in done.stdout
    assert not {"jax", "numpy", "av", "gradio"} & {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
