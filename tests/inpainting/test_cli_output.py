"""avsi-inpaint: its output and exit codes, interruption and --resume, progress. A fake Inpainter replaces the networks."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from avsi_jax.inpainting import cli, cli_output
from tests.support.fake_inpainter import files, install, one_line, run, touch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path)


# ---- outcomes ----------------------------------------------------------------------------------------------------------------


def test_the_outcome_of_a_clip_is_one_line(fake, capsys):
    touch("a.wav", "half.wav", "complete.wav")
    assert run("a.wav", "half.wav", "complete.wav") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("a.restored.wav: ") and lines[2].startswith("complete.wav: no gap ")
    assert all(part in lines[0] for part in ("detected", "0.50-0.75 s", "audio and video", "0.75;", '"bin blue at f two now"'))
    assert printed.err == "avsi-inpaint: half.wav: half a face\n"
    assert files() == ["a.restored.wav", "a.wav", "complete.wav", "half.restored.wav", "half.wav"]


def test_the_line_lists_at_most_three_gaps(fake, capsys):
    touch("a.wav")
    assert run("a.wav", *(f"--gap={i}-{i}.5" for i in range(9))) == 0
    out = capsys.readouterr().out
    assert out.count("confidence") == 3 and out.count("bin blue") == 1 and "; 6 more; " in out


def test_an_error_in_one_clip_does_not_stop_the_others(fake, capsys):
    """Junk, a missing file, one that is too large, and a bug."""
    names = ["a.wav", "junk.wav", "none.wav", "huge.wav", "bug.wav", "z.wav"]
    touch(*(n for n in names if n != "none.wav"))
    assert run(*names, "-o", "out") == 1
    printed = capsys.readouterr()
    assert [line.split(":")[0] for line in printed.out.splitlines()] == ["out/a.restored.wav", "out/z.restored.wav"]
    lines = printed.err.splitlines()
    assert lines[0] == "avsi-inpaint: junk.wav: cannot be decoded (found nothing)"
    assert lines[1].startswith("avsi-inpaint: none.wav: ")
    assert lines[2].startswith("avsi-inpaint: huge.wav: ") and "memory" in lines[2]
    assert lines[3].startswith("avsi-inpaint: bug.wav: unexpected KeyError at fake_inpainter.py:") and len(lines) == 4


def test_if_all_clips_fail_nothing_is_left_behind(fake):
    touch("junk.wav", "bug.wav")
    assert run("junk.wav", "bug.wav", "-o", "new/out") == 2
    assert files() == ["bug.wav", "junk.wav"] and not Path("new").exists(), "an empty folder is left behind"


def test_with_json_stdout_has_one_object_per_clip(fake, capsys):
    touch("a.wav", "junk.wav", "complete.wav", "half.wav", "b.restored.wav", "b.wav")
    names = ("a.wav", "junk.wav", "none.mpg", "complete.wav", "half.wav", "b.wav")
    assert run(*names, "--json", "--resume") == 1
    outcomes = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["path"] for o in outcomes] == list(names)
    assert [o["status"] for o in outcomes] == ["restored", "failed", "failed", "no gap", "restored", "exists"]
    gap = {"start_s": 0.5, "end_s": 0.75, "confidence": 0.75, "transcript": "bin blue at f two now", "inputs": "audio and video"}
    assert outcomes[0] == {
        "path": "a.wav", "output": "a.restored.wav", "status": "restored", "gaps": [gap], "warnings": [], "av_offset_s": None,
        "seconds": {"all": 0.1}, "duration_s": 3.0, "gaps_detected": True, "error": None,
    }  # fmt: skip
    assert outcomes[1]["error"] == "cannot be decoded (found nothing)" and outcomes[1]["output"] is None
    assert outcomes[4]["warnings"] == ["half a face"] and outcomes[5]["output"] == "b.restored.wav"


def test_names_that_cannot_be_printed_are_escaped(fake, capsys):
    """Line breaks, colours and bytes that are not text."""
    names = ["a\nb.wav", "\x1b[31mred.wav", os.fsdecode(b"\xff.wav")]
    touch(*names)
    assert run(*names, "--format=wav") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 3 and "\x1b" not in out and out.startswith("a\\nb.restored.wav: ")
    assert run(*names, "--format=flac", "--json") == 0
    outcomes = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["path"] for o in outcomes] == names


def test_quiet_prints_errors_only(fake, capsys):
    touch("half.wav", "junk.wav")
    assert run("half.wav", "junk.wav", "--quiet") == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("avsi-inpaint: junk.wav: ") and printed.err.count("\n") == 1


# ---- interruption and resumption ---------------------------------------------------------------------------------------------


def test_an_interrupted_run_is_resumed(fake, capsys):
    touch("a.wav", "b.wav", "stop.wav", "z.wav")
    assert run("a.wav", "b.wav", "stop.wav", "z.wav", "-o", "out") == 130
    message = one_line(capsys.readouterr().err.splitlines()[-1] + "\n")
    assert "2 clips" in message and "--resume" in message
    Path("stop.wav").rename("c.wav")
    assert run("a.wav", "b.wav", "c.wav", "z.wav", "-o", "out") == 2
    message = one_line(capsys.readouterr().err)
    assert all(part in message for part in ("out/a.restored.wav exists", "1 more of 4", "--overwrite", "--resume"))
    fake.calls.clear()
    assert run("a.wav", "b.wav", "c.wav", "z.wav", "-o", "out", "--resume") == 0
    assert [str(c["source"]) for c in fake.calls] == ["c.wav", "z.wav"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("out/a.restored.wav: exists") and lines[1].startswith("out/b.restored.wav: exists")
    fake.loaded.clear()
    assert run("a.wav", "b.wav", "c.wav", "z.wav", "-o", "out", "--resume") == 0
    assert not fake.loaded, "loads a system although there is nothing to do"


def test_a_full_disk_ends_the_run_with_one_line(fake, capsys):
    touch("a.wav", "full.wav", "z.wav")
    assert run("a.wav", "full.wav", "z.wav", "-o", "out") == 1
    assert "no space left for out/full.restored.wav" in one_line(capsys.readouterr().err) and len(fake.calls) == 2


def test_a_full_disk_is_detected_if_the_error_does_not_say_so(fake, capsys, monkeypatch):
    touch("junk.wav", "z.wav")
    monkeypatch.setattr(cli.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    assert run("junk.wav", "z.wav", "-o", "out") == 2
    assert "no space left for out/junk.restored.wav (cannot be decoded" in one_line(capsys.readouterr().err)


INTERRUPTED = """
import sys, time
from pathlib import Path
from avsi_jax.inpainting import api, cli
class Slow:
    def inpaint_file(self, source, target, gaps, **_):
        part = Path(target).with_suffix(".part")
        try:
            part.touch()
            print("begun", flush=True)
            time.sleep(60)
        finally:
            part.unlink()
api.Inpainter.load = staticmethod(lambda checkpoint, mode: Slow())
sys.exit(cli.main(["a.wav", "-o", "out"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_no_partly_written_file(tmp_path, number, code):
    (tmp_path / "a.wav").touch()
    # Python ignores SIGINT if it was started to ignore it, as it is if the tests run in the background.
    command = ["env", "--default-signal=INT", sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=-1, stderr=-1, text=True
    ) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def test_a_closed_stdout_ends_the_run_silently(tmp_path):
    """As in `avsi-inpaint ... | head -1`."""
    for name in "abc":
        (tmp_path / f"{name}.wav").touch()
    script = (
        "import sys\nfrom avsi_jax.inpainting import api, cli\nfrom tests.support.fake_inpainter import FakeInpainter\n"
        "api.Inpainter.load = staticmethod(lambda checkpoint, mode: FakeInpainter())\nsys.stdin.read()\n"
        "sys.exit(cli.main(['a.wav', 'b.wav', 'c.wav', '--json']))"
    )
    options = {"stdin": -1, "stdout": -1, "stderr": -1, "cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    with subprocess.Popen([sys.executable, "-c", script], **options) as process:
        process.stdout.close()
        process.stdin.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (1, b"")


# ---- progress ----------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar(fake, monkeypatch, capsys):
    touch("a.wav", "b.wav", "junk.wav", "c.wav")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    assert run("a.wav", "b.wav", "junk.wav", "c.wav") == 1
    shown = screen.getvalue()
    assert "/4 clips, " in shown and " left" in shown
    assert "\navsi-inpaint: junk.wav" in shown.replace("\r", "\n") and len(capsys.readouterr().out.splitlines()) == 3
    assert run("a.wav", "--overwrite", "--quiet") == 0 and screen.getvalue() == shown


def test_without_a_terminal_progress_is_printed_every_30_seconds(monkeypatch, capsys):
    """With a quarter of a clip every 20 s, and the estimated time left."""
    now = [100.0]
    monkeypatch.setattr(cli_output.time, "monotonic", lambda: now[0])
    reporter = cli_output.ProgressReporter(2, quiet=False, as_json=True)
    for fraction in (0.25, 0.5, 0.75):
        now[0] += 20
        reporter.tick(fraction)
    assert capsys.readouterr().err == "0.5/2 clips, 80.0 s each, 120 s left\n"
    now[0] += 20
    reporter.outcome(cli_output.ClipOutcome("a", "b", "restored"))
    assert capsys.readouterr().err == "1.0/2 clips, 80.0 s each, 80 s left\n"


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "-m", "avsi_jax.inpainting.cli", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--gap START-END" in done.stdout and "examples:" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not {"jax", "numpy", "av", "tqdm", "jinja2"} & imported
