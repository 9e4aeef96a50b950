"""avsi-inpaint: what it takes, what it writes and leaves alone, what it says and by which code it ends.

A made-up Inpainter stands in for the networks wherever they don't matter; the last tests go the whole way.
"""

import dataclasses
import errno
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
import tiny_data

from avsi_jax import inpaint, media, repair, repair_jobs, repair_outcomes

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class MadeUp:
    """An Inpainter that writes a few bytes, and does to a clip what its name says."""

    calls: list = dataclasses.field(default_factory=list)

    def repair_file(self, source, target, gaps, *, face, sync, overwrite, progress):
        self.calls.append({"source": source, "target": target, "gaps": gaps, "face": face, "sync": sync, "overwrite": overwrite})
        progress(0.5)
        kind = Path(source).stem
        if kind in RAISED:
            raise RAISED[kind]
        if kind == "whole" and gaps == "auto":
            raise ValueError(f"{source}: no hole found; expected digital silence")
        found = [(0.5, 0.75)] if gaps == "auto" else gaps
        Path(target).write_bytes(b"restored")
        gaps = tuple(inpaint.Gap(a, b, np.float32(0.75), "bin blue at f two now", "sound and lips") for a, b in found)
        return inpaint.FileRepair(gaps, ("half a face",) if kind == "half" else (), None, {"all": 0.1}, str(target), 3.0)


def full_disk():
    error = media.MediaError("out.wav: cannot be written (No space left on device)")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return error


RAISED = {
    "junk": media.MediaError("cannot be decoded\n(found nothing)"),
    "bug": KeyError("x"),
    "huge": MemoryError(),
    "full": full_disk(),
    "stop": KeyboardInterrupt(),
}


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    painter, asked = MadeUp(), []
    monkeypatch.setattr(inpaint.Inpainter, "load", staticmethod(lambda checkpoint: asked.append(checkpoint) or painter))
    painter.asked = asked
    monkeypatch.chdir(tmp_path)
    return painter


def touch(*names):
    """Files of a clip's name, in the current folder."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"a clip")


def run(*arguments) -> int:
    return repair.main([str(a) for a in arguments])


def files() -> list[str]:
    return sorted(p.as_posix() for p in Path(".").rglob("*") if p.is_file())


def one_line(text: str) -> str:
    assert text.startswith("avsi-inpaint: ") and text.count("\n") == 1, text
    return text


# ---- which clips, into which files -------------------------------------------------------------------------------------------


def test_a_folder_gives_its_clips_and_keeps_its_tree(made_up):
    """Junk that systems leave behind is no clip, nor is what was restored before."""
    touch("in/a.wav", "in/b/c.MPG", "in/b/d.mov", "in/b/e/f.avi")
    touch(
        "in/.DS_Store", "in/._a.wav", "in/.hidden/x.wav", "in/__MACOSX/y.wav", "in/notes.txt", "in/a.restored.wav", "in/Thumbs.db"
    )
    assert run("in", "-o", "out") == 0
    written = ["out/a.restored.wav", "out/b/c.restored.mkv", "out/b/d.restored.mov", "out/b/e/f.restored.mkv"]
    assert [f for f in files() if f.startswith("out")] == written
    before = files()
    assert run("in", "-o", "in", "--format", "wav", "--overwrite") == 0 and len(made_up.calls) == 8
    assert run("in", "-o", "in", "--format", "wav", "--overwrite") == 0 and len(made_up.calls) == 12, "takes its own for clips"
    assert set(before) < set(files())


def test_without_an_output_it_is_written_where_the_command_is_run(made_up):
    touch("far/away/clip.mp4", "far/b/talk.flac")
    assert run("far/away/clip.mp4", "far/b") == 0
    assert [f for f in files() if not f.startswith("far")] == ["clip.restored.mp4", "talk.restored.flac"]


@pytest.mark.parametrize(
    ("clip", "arguments", "target"),
    [
        ("a.mpg", [], "a.restored.mkv"),
        ("a.mp4", [], "a.restored.mp4"),
        ("a.b.WAV", [], "a.b.restored.wav"),
        ("a.mpg", ["--format=wav"], "a.restored.wav"),
        ("a.mpg", ["--format=mpg"], "a.restored.mpg"),
        ("a.mpg", ["-o", "x.MP4"], "x.MP4"),
        ("a.mpg", ["-o", "new/x.flac"], "new/x.flac"),
        ("a.mpg", ["-o", "new/x"], "new/x/a.restored.mkv"),
        ("a.mpg", ["-o", "v1.2"], "v1.2/a.restored.mkv"),
    ],
)
def test_where_one_clip_goes(made_up, clip, arguments, target):
    touch(clip)
    assert run(clip, *arguments) == 0
    assert files() == sorted([clip, target])


def test_a_folder_that_is_named_like_a_file(made_up):
    touch("a.wav")
    Path("out.wav").mkdir()
    assert run("a.wav", "-o", "out.wav") == 0 and files() == ["a.wav", "out.wav/a.restored.wav"]


def test_names_from_lists(made_up, monkeypatch):
    """Of any bytes; a clip named twice is repaired once."""
    odd = os.fsdecode(b"b\xff.wav")
    touch("a.wav", odd, "c d.wav", "e.wav")
    Path("list.txt").write_bytes(b"a.wav\r\n\nb\xff.wav\n./a.wav\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("c d.wav\n"))
    assert run("@list.txt", "-", "e.wav", "-o", "out") == 0
    assert [str(c["source"]) for c in made_up.calls] == ["a.wav", odd, "c d.wav", "e.wav"]


def test_options_may_stand_anywhere(made_up):
    touch("a.wav", "b.wav", "c.wav")
    assert run("a.wav", "--gap", "0.1-0.2", "b.wav", "--report", "c.wav", "--report=x.html", "--gap=1:00-1:01.5") == 0
    assert len(made_up.calls) == 3 and made_up.calls[0]["gaps"] == [(0.1, 0.2), (60.0, 61.5)]
    assert "x.html" in files() and "Can&#39;t be shown: a.wav: cannot be decoded" in Path("x.html").read_text()


def test_a_report_lies_beside_what_is_written(made_up, capsys):
    touch("junk.wav")
    assert run("junk.wav", "-o", "out", "--report") == 2 and "out/repair.html" in files()
    assert capsys.readouterr().out == "report: out/repair.html\n"
    assert run("junk.wav", "-o", "new/x.wav", "--report", "--json") == 2 and "new/repair.html" in files()
    assert json.loads(capsys.readouterr().out)["status"] == "failed"
    assert run("junk.wav", "-o", "out", "--report") == 2 and "out/repair.html exists" in one_line(capsys.readouterr().err)
    assert run("junk.wav", "-o", "out", "--report", "--resume") == 2
    assert run("junk.wav", "--report=junk.wav/x.html") == 2
    assert "avsi-inpaint: --report: " in capsys.readouterr().err.splitlines()[-1]


def test_what_is_asked_reaches_the_inpainter(made_up):
    touch("a.wav")
    assert run("a.wav", "--face=2", "--sync", "-0.08", "--checkpoint=runs/x", "--overwrite", "--gap", "auto") == 0
    (call,) = made_up.calls
    assert (call["gaps"], call["face"], call["sync"], call["overwrite"]) == ("auto", 2, -0.08, True)
    assert run("a.wav", "--sync=auto", "-o", "out") == 0
    call = made_up.calls[1]
    assert (call["gaps"], call["face"], call["sync"], call["overwrite"]) == ("auto", None, "auto", False)
    assert made_up.asked == ["runs/x", "pretrained"]


def test_a_table_of_gaps(made_up):
    """As a spreadsheet saves it, with a mark before and columns of its own; paths from here or from beside the table."""
    touch("far/a.wav", "far/b.wav", "c.wav")
    rows = "note,path,start_s,end_s\r\nx,a.wav,1,2\r\n,far/b.wav,0.5,0.75\r\nx,a.wav,1:00,1:00.5\r\n"
    Path("far/gaps.csv").write_text("\ufeff" + rows)
    assert run("--gaps", "far/gaps.csv", "-o", "out") == 0
    assert [(str(c["source"])[-5:], c["gaps"]) for c in made_up.calls] == [
        ("a.wav", [(1, 2), (60, 60.5)]),
        ("b.wav", [(0.5, 0.75)]),
    ]
    assert run("far", "c.wav", "--gap=0.1-0.2", "--gaps", "far/gaps.csv", "-o", "out2") == 0
    assert [c["gaps"] for c in made_up.calls[2:]] == [[(1, 2), (60, 60.5)], [(0.5, 0.75)], [(0.1, 0.2)]]


# ---- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no clip given; expected files, folders, @LIST or -"),
        (["none.mpg"], "none.mpg: no such file; expected a clip"),
        (["notes.txt"], "notes.txt: found suffix '.txt', expected one of .mpg"),
        (["empty"], "empty: found no clip in this folder, expected files with one of .mpg"),
        (["@blank"], "blank: found no name, expected one a line"),
        (["@none"], "no such file"),
        ([""], "found '' among the names, expected files, folders, or a list with one name a line"),
        (["@zeros"], "found 'a.wav\\x00b.wav\\x00' among the names"),
        (["a.wav", "--gap", "0.8"], "argument --gap: '0.8': expected START-END in seconds, such as 0.93-1.73"),
        (["a.wav", "--gap", "a-b"], "'a-b': expected START-END in seconds"),
        (["a.wav", "--gap", "nan-1"], "'nan-1': expected START-END in seconds"),
        (["a.wav", "--gap", "1.3-0.8"], "gap 1.3-0.8: expected START-END with START < END"),
        (["a.wav", "--gap", "0.1-0.2", "--gap=auto"], "take one of them"),
        (["a.wav", "--face", "left"], "'left': expected the number of a face"),
        (["a.wav", "--sync", "on"], "'on': expected off, auto or seconds"),
        (["a.wav", "--sync", "inf"], "'inf': expected off, auto or seconds"),
        (["a.wav", "--format", "mp3"], "argument --format: invalid choice: 'mp3'"),
        (["a.wav", "--frmat", "wav"], "unrecognized arguments: --frmat"),
        (["a.wav", "-o", "out.mp3"], "--output out.mp3: found suffix .mp3, expected one of .wav"),
        (["a.mpg", "-o", "out.avi"], "--output out.avi: found suffix .avi, expected one of .wav"),
        (["a.wav", "-o", "out.mp4"], "a.wav: holds no pictures for a .mp4; expected a target of .wav or .flac"),
        (["a.wav", "--format=mkv"], "a.wav: holds no pictures for a .mkv"),
        (["a.wav", "-o", "x.wav", "--format=flac"], "--output x.wav and --format flac don't agree"),
        (["a.wav", "a.mpg", "-o", "x.wav"], "--output x.wav is one file; expected a folder"),
        (["a.wav", "-o", "blank"], "--output blank: found a file, expected a folder"),
        (["a.wav", "-o", "blank/out"], "blank is a file, expected a folder"),
        (["a.wav", "-o", "a.wav", "--overwrite"], "a.wav is a clip to be repaired"),
        (["a.wav", "-o", "link.wav", "--overwrite"], "link.wav is a clip to be repaired"),
        (["a.wav", "-o", "there.wav"], "there.wav exists; take --overwrite to replace, --resume to leave out"),
        (["a.wav", "-o", "there.wav", "--overwrite", "--resume"], "take one of them"),
        (["a.wav", "--report=there.html"], "there.html exists; take --overwrite"),
        (["a.wav", "--gaps", "blank"], "blank: found the columns none, expected path,start_s,end_s"),
        (["a.wav", "--gaps", "odd.csv"], "odd.csv, line 3: '2-x': expected START-END in seconds"),
        (["a.wav", "--gaps", "other.csv"], "--gaps names no gap of a.wav; add a row for it, or take --gap auto"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_mistakes_take_one_line_and_nothing_is_done(made_up, capsys, arguments, says):
    touch("a.wav", "a.mpg", "b/a.wav", "notes.txt", "there.wav", "there.html")
    Path("blank").touch()
    Path("zeros").write_text("a.wav\0b.wav\0")
    Path("empty").mkdir()
    Path("link.wav").symlink_to("a.wav")
    Path("odd.csv").write_text("path,start_s,end_s\na.wav,1,2\na.wav,2,x\n")
    Path("other.csv").write_text("path,start_s,end_s\nb/a.wav,1,2\n")
    before = files()
    try:
        code = run(*arguments)
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr()
    assert says in one_line(said.err) and said.out == ""
    assert code == 2 and files() == before and not made_up.calls and not made_up.asked


def test_a_folder_that_takes_no_files(made_up, capsys, monkeypatch):
    touch("a.wav")
    Path("out").mkdir()
    monkeypatch.setattr(repair_jobs.os, "access", lambda path, mode: path.name != "out")
    assert run("a.wav", "-o", "out/new") == 2
    assert "/out can't be written; take another --output" in one_line(capsys.readouterr().err)


def test_a_checkpoint_that_is_none(made_up, capsys, monkeypatch):
    touch("a.wav")

    def load(checkpoint):
        raise ValueError(f"no config.json in {checkpoint}")

    monkeypatch.setattr(inpaint.Inpainter, "load", staticmethod(load))
    assert run("a.wav", "--checkpoint=none") == 2
    assert one_line(capsys.readouterr().err) == "avsi-inpaint: no config.json in none\n" and files() == ["a.wav"]


# ---- outcomes ----------------------------------------------------------------------------------------------------------------


def test_an_outcome_is_a_line(made_up, capsys):
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
    from avsi_jax import mending, streams

    noise = 0.1 * np.random.default_rng(0).normal(size=(32_000, 1)).astype(np.float32)
    clip = media.Clip("whole", None, media.Sound(noise, 16_000, 0.0, "PCM_16", "pcm"))
    with pytest.raises(ValueError, match=repair.NO_HOLE):
        mending.found_gaps(streams.source_of(clip))


def test_many_gaps_are_not_all_told(made_up, capsys):
    touch("a.wav")
    assert run("a.wav", *(f"--gap={i}-{i}.5" for i in range(9))) == 0
    out = capsys.readouterr().out
    assert out.count("confidence") == 3 and out.count("bin blue") == 1 and "; 6 more; likeliest" in out


def test_one_bad_clip_stops_no_other(made_up, capsys):
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
    assert lines[4].startswith("avsi-inpaint: bug.wav: unexpected KeyError at test_repair.py:") and len(lines) == 5


def test_where_all_fail_nothing_is_done(made_up, capsys):
    touch("junk.wav", "bug.wav")
    assert run("junk.wav", "bug.wav", "-o", "new/out") == 2
    assert files() == ["bug.wav", "junk.wav"] and not Path("new").exists(), "an empty folder is left behind"


def test_json_is_all_there_is_on_stdout(made_up, capsys):
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


def test_names_that_would_break_a_line(made_up, capsys):
    """Line breaks, colours and bytes that are no text."""
    names = ["a\nb.wav", "\x1b[31mred.wav", os.fsdecode(b"\xff.wav")]
    touch(*names)
    assert run(*names, "--format=wav") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 3 and "\x1b" not in out and out.startswith("a\\nb.restored.wav: ")
    assert run(*names, "--format=flac", "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["path"] for o in found] == names


def test_quiet_tells_of_failures_only(made_up, capsys):
    touch("half.wav", "junk.wav")
    assert run("half.wav", "junk.wav", "--quiet") == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("avsi-inpaint: junk.wav: ") and said.err.count("\n") == 1


# ---- stopped, and gone on ----------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on(made_up, capsys):
    touch("a.wav", "b.wav", "stop.wav", "z.wav")
    assert run("a.wav", "b.wav", "stop.wav", "z.wav", "-o", "out") == 130
    assert "avsi-inpaint: stopped; 2 clips are done, --resume goes on" in capsys.readouterr().err
    Path("stop.wav").rename("c.wav")
    assert run("a.wav", "b.wav", "c.wav", "z.wav", "-o", "out") == 2
    says = "out/a.restored.wav exists, as do 1 more of 4; take --overwrite to replace, --resume to leave out what is there"
    assert says in one_line(capsys.readouterr().err)
    made_up.calls.clear()
    assert run("a.wav", "b.wav", "c.wav", "z.wav", "-o", "out", "--resume") == 0
    assert [str(c["source"]) for c in made_up.calls] == ["c.wav", "z.wav"]
    assert capsys.readouterr().out.startswith("out/a.restored.wav: there already\nout/b.restored.wav: there already\n")
    made_up.asked.clear()
    assert run("a.wav", "b.wav", "c.wav", "z.wav", "-o", "out", "--resume") == 0 and not made_up.asked, "loads for nothing"


def test_a_full_disk_is_one_line_and_the_end(made_up, capsys):
    touch("a.wav", "full.wav", "z.wav")
    assert run("a.wav", "full.wav", "z.wav", "-o", "out") == 1
    assert "no room left for out/full.restored.wav" in one_line(capsys.readouterr().err) and len(made_up.calls) == 2


def test_a_disk_without_room_is_seen_where_a_library_does_not_say(made_up, capsys, monkeypatch):
    touch("junk.wav", "z.wav")
    monkeypatch.setattr(repair.shutil, "disk_usage", lambda folder: shutil_usage(free=1000))
    assert run("junk.wav", "z.wav", "-o", "out") == 2
    assert "no room left for out/junk.restored.wav (cannot be decoded" in one_line(capsys.readouterr().err)


def shutil_usage(free):
    return type("Usage", (), {"free": free})


STOPPED = """
import sys, time
from pathlib import Path
from avsi_jax import inpaint, repair
class Slow:
    def repair_file(self, source, target, gaps, **_):
        part = Path(target).with_suffix(".part")
        try:
            part.touch()
            print("begun", flush=True)
            time.sleep(60)
        finally:
            part.unlink()
inpaint.Inpainter.load = staticmethod(lambda checkpoint: Slow())
sys.exit(repair.main(["a.wav", "-o", "out"]))
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
        "sys.path.append(sys.argv[1])\nfrom test_repair import MadeUp\n"
        "inpaint.Inpainter.load = staticmethod(lambda checkpoint: MadeUp())\nsys.stdin.read()\n"
        "sys.exit(repair.main(['a.wav', 'b.wav', 'c.wav', '--json']))"
    )
    command = [sys.executable, "-c", script, str(ROOT / "tests")]
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


def test_a_bar_on_a_terminal(made_up, monkeypatch, capsys):
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
    monkeypatch.setattr(repair_outcomes.time, "monotonic", lambda: now[0])
    teller = repair_outcomes.Teller(2, quiet=False, as_json=True)
    for share in (0.25, 0.5, 0.75):
        now[0] += 20
        teller.tick(share)
    assert capsys.readouterr().err == "0.5/2 clips, 80.0 s each, 120 s left\n"
    now[0] += 20
    teller.outcome(repair_outcomes.Outcome("a", "b", "restored"))
    assert capsys.readouterr().err == "1.0/2 clips, 80.0 s each, 80 s left\n"


def test_help_is_quick():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "avsi_jax.repair", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--gap START-END" in done.stdout and "examples:" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not {"jax", "numpy", "av", "tqdm", "jinja2"} & imported
    assert time.monotonic() - began < 5, "0.2 s on an idle machine"


# ---- the whole way -----------------------------------------------------------------------------------------------------------


def voice(seconds, rate, *, channels=1):
    """A made-up voice (N, C); the second channel is half as loud."""
    x = media.resample(tiny_data.voice(0, 46_400)[0], 16_000, rate)[: round(seconds * rate)]
    return np.stack([0.5 * x / (k + 1) for k in range(channels)], 1).astype(np.float32)


def test_sound_files_keep_rate_subtype_and_all_bits(untrained_a_si, tmp_path, capsys):
    """Of 8, 24 and 64 bits, outside the gaps; read back by libsndfile itself. One of them is no clip, one too short for the gap."""
    import soundfile

    kinds = {"PCM_24": 48_000, "PCM_U8": 8_000, "DOUBLE": 16_000}
    for kind, rate in kinds.items():
        samples = voice(2.5, rate, channels=2).astype(np.float64) * (1 + 1e-8)
        soundfile.write(tmp_path / f"{kind}.wav", samples, rate, subtype=kind)
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    soundfile.write(tmp_path / "short.flac", voice(1.0, 16_000), 16_000)
    code = run(tmp_path, "--gap", "0.8-1.3", "--gap=2.2-2.5", "-o", tmp_path / "out", "--checkpoint", untrained_a_si)
    said = capsys.readouterr()
    assert code == 1 and len(said.out.splitlines()) == 3, said.err
    assert "bad.wav: cannot be decoded" in said.err and "short.flac: gap 0.8-1.3 s leaves the clip" in said.err
    for kind, rate in kinds.items():
        before, after = tmp_path / f"{kind}.wav", tmp_path / "out" / f"{kind}.restored.wav"
        assert (soundfile.info(after).samplerate, soundfile.info(after).subtype) == (rate, kind)
        (x, _), (y, _) = (soundfile.read(p, dtype="float64") for p in (before, after))
        time = np.arange(len(x)) / rate
        kept = (time < 0.8) | ((time >= 1.3) & (time < 2.2))
        assert y.shape == x.shape and np.isfinite(y).all()
        np.testing.assert_array_equal(y[kept], x[kept])


@pytest.mark.slow
def test_a_film_by_the_command(trained, grid_dir, tmp_path):
    """In a process of its own, as a person would go it: one line, no noise of libraries, its pictures' packets as they were."""
    import hashlib

    import av

    arguments = [grid_dir / "s1" / "bbaz5s.mpg", "--gap", "0.93-1.73", "-o", tmp_path, "--checkpoint", trained]
    done = subprocess.run(
        [sys.executable, "-m", "avsi_jax.repair", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'bbaz5s.restored.mkv'}: filled 0.93-1.73 s by ") and done.stdout.count("\n") == 1
    lines = done.stderr.splitlines()
    assert [line for line in lines if "TensorFlow Lite XNNPACK" not in line] == []  # that one is LiteRT's own

    def packets(path):
        with av.open(str(path)) as film:
            return [hashlib.sha256(bytes(packet)).digest() for packet in film.demux(video=0) if packet.size]

    target = tmp_path / "bbaz5s.restored.mkv"
    assert packets(target) == packets(arguments[0]) and len(packets(target)) == 75
    before, after = media.read_clip(arguments[0]).sound, media.read_clip(target).sound
    assert (after.rate, after.samples.shape) == (44_100, (131_328, 2))
    kept = np.r_[0 : round(0.93 * 44_100), round(1.73 * 44_100) : 131_328]
    decoded = np.clip(np.rint(before.samples.astype(np.float64) * 32_768), -32_768, 32_767)
    np.testing.assert_array_equal(after.samples[kept] * 32_768, decoded[kept])
