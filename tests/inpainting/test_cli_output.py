"""avsi-inpaint: what it says and by which code it ends, how it is stopped and goes on, how far it tells to be.

A made-up Inpainter stands in for the networks.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from avsi_jax.inpainting import cli, cli_output
from avsi_jax.media import clip_io
from tests.support.fake_inpainter import files, one_line, run, stand_in, touch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def invented(monkeypatch, tmp_path):
    return stand_in(monkeypatch, tmp_path)


# ---- outcomes ----------------------------------------------------------------------------------------------------------------


def test_an_outcome_is_a_line(invented, capsys):
    touch("a.wav", "half.wav", "whole.wav")
    assert run("a.wav", "half.wav", "whole.wav") == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    told = "a.restored.wav: found and filled 0.50-0.75 s by sound and lips, confidence 0.75"
    assert lines[0] == f'{told}; likeliest sentence of Grid "bin blue at f two now" (0.0 s)' and len(lines) == 3
    assert lines[2] == "whole.wav: no hole found, nothing written; --gap START-END tells where one is"
    assert said.err == "avsi-inpaint: half.wav: half a face\n"
    assert files() == ["a.restored.wav", "a.wav", "half.restored.wav", "half.wav", "whole.wav"]


def test_a_whole_clip_is_told_in_the_words_that_the_command_looks_for():
    from avsi_jax.inpainting import clip_inpainter
    from avsi_jax.media import clip_source

    noise = 0.1 * np.random.default_rng(0).normal(size=(32_000, 1)).astype(np.float32)
    clip = clip_io.Clip("whole", None, clip_io.Audio(noise, 16_000, 0.0, "PCM_16", "pcm"))
    with pytest.raises(ValueError, match=cli.NO_GAP):
        clip_inpainter.detected_gaps(clip_source.source_of(clip))


def test_many_gaps_are_not_all_told(invented, capsys):
    touch("a.wav")
    assert run("a.wav", *(f"--gap={i}-{i}.5" for i in range(9))) == 0
    out = capsys.readouterr().out
    assert out.count("confidence") == 3 and out.count("bin blue") == 1 and "; 6 more; likeliest" in out


def test_one_bad_clip_stops_no_other(invented, capsys):
    """Junk, a missing file, no clip at all, one that is too big, and a mistake of ours."""
    names = ["a.wav", "junk.wav", "none.wav", "notes.txt", "huge.wav", "bug.wav", "z.wav"]
    touch(*(n for n in names if n != "none.wav"))
    assert run(*names, "-o", "out") == 1
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.out.splitlines()] == ["out/a.restored.wav", "out/z.restored.wav"]
    lines = said.err.splitlines()
    assert lines[0] == "avsi-inpaint: junk.wav: cannot be decoded (found nothing)"
    assert lines[1].startswith("avsi-inpaint: none.wav: no such file")
    assert lines[2].startswith("avsi-inpaint: notes.txt: found suffix '.txt'")
    assert lines[3].startswith("avsi-inpaint: huge.wav: not enough memory")
    assert lines[4].startswith("avsi-inpaint: bug.wav: unexpected KeyError at made_up.py:") and len(lines) == 5


def test_where_all_fail_nothing_is_done(invented, capsys):
    touch("junk.wav", "bug.wav")
    assert run("junk.wav", "bug.wav", "-o", "new/out") == 2
    assert files() == ["bug.wav", "junk.wav"] and not Path("new").exists(), "an empty folder is left behind"


def test_json_is_all_there_is_on_stdout(invented, capsys):
    touch("a.wav", "junk.wav", "whole.wav", "half.wav", "b.restored.wav", "b.wav")
    names = ("a.wav", "junk.wav", "none.mpg", "whole.wav", "half.wav", "b.wav")
    assert run(*names, "--json", "--resume") == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["path"] for o in found] == list(names)
    assert [o["status"] for o in found] == ["restored", "failed", "failed", "no hole found", "restored", "there already"]
    gap = {"start_s": 0.5, "end_s": 0.75, "confidence": 0.75, "said": "bin blue at f two now", "by": "sound and lips"}
    assert found[0] == {
        "path": "a.wav", "output": "a.restored.wav", "status": "restored", "gaps": [gap], "warnings": [], "sync_s": None,
        "seconds": {"all": 0.1}, "duration_s": 3.0, "found": True, "error": None,
    }  # fmt: skip
    assert found[1]["error"] == "cannot be decoded (found nothing)" and found[1]["output"] is None
    assert found[4]["warnings"] == ["half a face"] and found[5]["output"] == "b.restored.wav"


def test_names_that_would_break_a_line(invented, capsys):
    """Line breaks, colours and bytes that are no text."""
    names = ["a\nb.wav", "\x1b[31mred.wav", os.fsdecode(b"\xff.wav")]
    touch(*names)
    assert run(*names, "--format=wav") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 3 and "\x1b" not in out and out.startswith("a\\nb.restored.wav: ")
    assert run(*names, "--format=flac", "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["path"] for o in found] == names


def test_quiet_tells_of_failures_only(invented, capsys):
    touch("half.wav", "junk.wav")
    assert run("half.wav", "junk.wav", "--quiet") == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("avsi-inpaint: junk.wav: ") and said.err.count("\n") == 1


# ---- stopped, and gone on ----------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on(invented, capsys):
    touch("a.wav", "b.wav", "stop.wav", "z.wav")
    assert run("a.wav", "b.wav", "stop.wav", "z.wav", "-o", "out") == 130
    assert "avsi-inpaint: stopped; 2 clips are done, --resume goes on" in capsys.readouterr().err
    Path("stop.wav").rename("c.wav")
    assert run("a.wav", "b.wav", "c.wav", "z.wav", "-o", "out") == 2
    says = "out/a.restored.wav exists, as do 1 more of 4; take --overwrite to replace, --resume to leave out what is there"
    assert says in one_line(capsys.readouterr().err)
    invented.calls.clear()
    assert run("a.wav", "b.wav", "c.wav", "z.wav", "-o", "out", "--resume") == 0
    assert [str(c["source"]) for c in invented.calls] == ["c.wav", "z.wav"]
    assert capsys.readouterr().out.startswith("out/a.restored.wav: there already\nout/b.restored.wav: there already\n")
    invented.asked.clear()
    assert run("a.wav", "b.wav", "c.wav", "z.wav", "-o", "out", "--resume") == 0 and not invented.asked, "loads for nothing"


def test_a_full_disk_is_one_line_and_the_end(invented, capsys):
    touch("a.wav", "full.wav", "z.wav")
    assert run("a.wav", "full.wav", "z.wav", "-o", "out") == 1
    assert "no room left for out/full.restored.wav" in one_line(capsys.readouterr().err) and len(invented.calls) == 2


def test_a_disk_without_room_is_seen_where_a_library_does_not_say(invented, capsys, monkeypatch):
    touch("junk.wav", "z.wav")
    monkeypatch.setattr(cli.shutil, "disk_usage", lambda folder: shutil_usage(free=1000))
    assert run("junk.wav", "z.wav", "-o", "out") == 2
    assert "no room left for out/junk.restored.wav (cannot be decoded" in one_line(capsys.readouterr().err)


def shutil_usage(free):
    return type("Usage", (), {"free": free})


STOPPED = """
import sys, time
from pathlib import Path
from avsi_jax.inpainting import api, cli
class Slow:
    def repair_file(self, source, target, gaps, **_):
        part = Path(target).with_suffix(".part")
        try:
            part.touch()
            print("begun", flush=True)
            time.sleep(60)
        finally:
            part.unlink()
api.Inpainter.load = staticmethod(lambda checkpoint: Slow())
sys.exit(cli.main(["a.wav", "-o", "out"]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing_half_written(tmp_path, number, code):
    (tmp_path / "a.wav").touch()
    # Python heeds no SIGINT that it was started to ignore, as it is where the tests run in the background.
    command = ["env", "--default-signal=INT", sys.executable, "-c", STOPPED]
    with subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=-1, stderr=-1, text=True
    ) as ran:
        assert ran.stdout.readline() == "begun\n"
        ran.send_signal(number)
        _, err = ran.communicate(timeout=30)
    assert ran.returncode == code and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def test_a_reader_who_leaves(tmp_path):
    """`avsi-inpaint ... | head -1` ends without a word."""
    for name in "abc":
        (tmp_path / f"{name}.wav").touch()
    script = STOPPED.split("class Slow")[0] + (
        "from tests.support.fake_inpainter import MadeUp\n"
        "inpaint.Inpainter.load = staticmethod(lambda checkpoint: MadeUp())\nsys.stdin.read()\n"
        "sys.exit(repair.main(['a.wav', 'b.wav', 'c.wav', '--json']))"
    )
    command = [sys.executable, "-c", script]
    kept = {"stdin": -1, "stdout": -1, "stderr": -1, "cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    with subprocess.Popen(command, **kept) as ran:
        ran.stdout.close()
        ran.stdin.close()
        err = ran.stderr.read()
    assert (ran.returncode, err) == (1, b"")


# ---- how far it is -----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(invented, monkeypatch, capsys):
    touch("a.wav", "b.wav", "junk.wav", "c.wav")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    assert run("a.wav", "b.wav", "junk.wav", "c.wav") == 1
    shown = screen.getvalue()
    assert "/4 clips, " in shown and " left" in shown
    assert "\navsi-inpaint: junk.wav" in shown.replace("\r", "\n") and len(capsys.readouterr().out.splitlines()) == 3
    assert run("a.wav", "--overwrite", "--quiet") == 0 and screen.getvalue() == shown


def test_a_line_now_and_then_elsewhere(monkeypatch, capsys):
    """20 s a quarter: told at most every 30 s, with the time that is left."""
    now = [100.0]
    monkeypatch.setattr(cli_output.time, "monotonic", lambda: now[0])
    reporter = cli_output.ProgressReporter(2, quiet=False, as_json=True)
    for share in (0.25, 0.5, 0.75):
        now[0] += 20
        reporter.tick(share)
    assert capsys.readouterr().err == "0.5/2 clips, 80.0 s each, 120 s left\n"
    now[0] += 20
    reporter.outcome(cli_output.ClipOutcome("a", "b", "restored"))
    assert capsys.readouterr().err == "1.0/2 clips, 80.0 s each, 80 s left\n"


def test_help_is_quick():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "avsi_jax.inpainting.cli", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--gap START-END" in done.stdout and "examples:" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not {"jax", "numpy", "av", "tqdm", "jinja2"} & imported
    assert time.monotonic() - began < 5, "0.2 s on an idle machine"
