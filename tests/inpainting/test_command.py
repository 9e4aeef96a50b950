"""avsi-inpaint: what it takes, where it writes, what it refuses; in the end the whole way with a network.

A made-up Inpainter stands in for the networks wherever they don't matter.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avsi_jax.inpainting import api, cli_jobs
from avsi_jax.media import clip_io
from tests.support import tiny_data
from tests.support.fake_inpainter import files, one_line, run, stand_in, touch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def invented(monkeypatch, tmp_path):
    return stand_in(monkeypatch, tmp_path)


# ---- which clips, into which files -------------------------------------------------------------------------------------------


def test_a_folder_gives_its_clips_and_keeps_its_tree(invented):
    """Junk that systems leave behind is no clip, nor is what was restored before."""
    touch("in/a.wav", "in/b/c.MPG", "in/b/d.mov", "in/b/e/f.avi")
    touch(
        "in/.DS_Store", "in/._a.wav", "in/.hidden/x.wav", "in/__MACOSX/y.wav", "in/notes.txt", "in/a.restored.wav", "in/Thumbs.db"
    )
    assert run("in", "-o", "out") == 0
    written = ["out/a.restored.wav", "out/b/c.restored.mkv", "out/b/d.restored.mov", "out/b/e/f.restored.mkv"]
    assert [f for f in files() if f.startswith("out")] == written
    before = files()
    assert run("in", "-o", "in", "--format", "wav", "--overwrite") == 0 and len(invented.calls) == 8
    assert run("in", "-o", "in", "--format", "wav", "--overwrite") == 0 and len(invented.calls) == 12, "takes its own for clips"
    assert set(before) < set(files())


def test_without_an_output_it_is_written_where_the_command_is_run(invented):
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
def test_where_one_clip_goes(invented, clip, arguments, target):
    touch(clip)
    assert run(clip, *arguments) == 0
    assert files() == sorted([clip, target])


def test_a_folder_that_is_named_like_a_file(invented):
    touch("a.wav")
    Path("out.wav").mkdir()
    assert run("a.wav", "-o", "out.wav") == 0 and files() == ["a.wav", "out.wav/a.restored.wav"]


def test_names_from_lists(invented, monkeypatch):
    """Of any bytes; a clip named twice is repaired once."""
    odd = os.fsdecode(b"b\xff.wav")
    touch("a.wav", odd, "c d.wav", "e.wav")
    Path("list.txt").write_bytes(b"a.wav\r\n\nb\xff.wav\n./a.wav\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("c d.wav\n"))
    assert run("@list.txt", "-", "e.wav", "-o", "out") == 0
    assert [str(c["source"]) for c in invented.calls] == ["a.wav", odd, "c d.wav", "e.wav"]


def test_options_may_stand_anywhere(invented):
    touch("a.wav", "b.wav", "c.wav")
    assert run("a.wav", "--gap", "0.1-0.2", "b.wav", "--report", "c.wav", "--report=x.html", "--gap=1:00-1:01.5") == 0
    assert len(invented.calls) == 3 and invented.calls[0]["gaps"] == [(0.1, 0.2), (60.0, 61.5)]
    assert "x.html" in files() and "Can&#39;t be shown: a.wav: cannot be decoded" in Path("x.html").read_text()


def test_a_report_lies_beside_what_is_written(invented, capsys):
    touch("junk.wav")
    assert run("junk.wav", "-o", "out", "--report") == 2 and "out/repair.html" in files()
    assert capsys.readouterr().out == "report: out/repair.html\n"
    assert run("junk.wav", "-o", "new/x.wav", "--report", "--json") == 2 and "new/repair.html" in files()
    assert json.loads(capsys.readouterr().out)["status"] == "failed"
    assert run("junk.wav", "-o", "out", "--report") == 2 and "out/repair.html exists" in one_line(capsys.readouterr().err)
    assert run("junk.wav", "-o", "out", "--report", "--resume") == 2
    assert run("junk.wav", "--report=junk.wav/x.html") == 2
    assert "avsi-inpaint: --report: " in capsys.readouterr().err.splitlines()[-1]


def test_what_is_asked_reaches_the_inpainter(invented):
    touch("a.wav")
    assert run("a.wav", "--face=2", "--sync", "-0.08", "--checkpoint=runs/x", "--overwrite", "--gap", "auto") == 0
    (call,) = invented.calls
    assert (call["gaps"], call["face"], call["sync"], call["overwrite"]) == ("auto", 2, -0.08, True)
    assert run("a.wav", "--sync=auto", "-o", "out") == 0
    call = invented.calls[1]
    assert (call["gaps"], call["face"], call["sync"], call["overwrite"]) == ("auto", None, "auto", False)
    assert invented.asked == ["runs/x", "pretrained"]


def test_a_table_of_gaps(invented):
    """As a spreadsheet saves it, with a mark before and columns of its own; paths from here or from beside the table."""
    touch("far/a.wav", "far/b.wav", "c.wav")
    rows = "note,path,start_s,end_s\r\nx,a.wav,1,2\r\n,far/b.wav,0.5,0.75\r\nx,a.wav,1:00,1:00.5\r\n"
    Path("far/gaps.csv").write_text("\ufeff" + rows)
    assert run("--gaps", "far/gaps.csv", "-o", "out") == 0
    assert [(str(c["source"])[-5:], c["gaps"]) for c in invented.calls] == [
        ("a.wav", [(1, 2), (60, 60.5)]),
        ("b.wav", [(0.5, 0.75)]),
    ]
    assert run("far", "c.wav", "--gap=0.1-0.2", "--gaps", "far/gaps.csv", "-o", "out2") == 0
    assert [c["gaps"] for c in invented.calls[2:]] == [[(1, 2), (60, 60.5)], [(0.5, 0.75)], [(0.1, 0.2)]]


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
def test_mistakes_take_one_line_and_nothing_is_done(invented, capsys, arguments, says):
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
    assert code == 2 and files() == before and not invented.calls and not invented.asked


def test_a_folder_that_takes_no_files(invented, capsys, monkeypatch):
    touch("a.wav")
    Path("out").mkdir()
    monkeypatch.setattr(cli_jobs.os, "access", lambda path, mode: path.name != "out")
    assert run("a.wav", "-o", "out/new") == 2
    assert "/out can't be written; take another --output" in one_line(capsys.readouterr().err)


def test_a_checkpoint_that_is_none(invented, capsys, monkeypatch):
    touch("a.wav")

    def load(checkpoint):
        raise ValueError(f"no config.json in {checkpoint}")

    monkeypatch.setattr(api.Inpainter, "load", staticmethod(load))
    assert run("a.wav", "--checkpoint=none") == 2
    assert one_line(capsys.readouterr().err) == "avsi-inpaint: no config.json in none\n" and files() == ["a.wav"]


# ---- the whole way -----------------------------------------------------------------------------------------------------------


def voice(seconds, rate, *, channels=1):
    """A made-up voice (N, C); the second channel is half as loud."""
    x = clip_io.resample(tiny_data.voice(0, 46_400)[0], 16_000, rate)[: round(seconds * rate)]
    return np.stack([0.5 * x / (k + 1) for k in range(channels)], 1).astype(np.float32)


def test_audio_files_keep_rate_subtype_and_all_bits(untrained_a_si, tmp_path, capsys):
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
        [sys.executable, "-m", "avsi_jax.inpainting.cli", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'bbaz5s.restored.mkv'}: filled 0.93-1.73 s by ") and done.stdout.count("\n") == 1
    lines = done.stderr.splitlines()
    assert [line for line in lines if "TensorFlow Lite XNNPACK" not in line] == []  # that one is LiteRT's own

    def packets(path):
        with av.open(str(path)) as video_file:
            return [hashlib.sha256(bytes(packet)).digest() for packet in video_file.demux(video=0) if packet.size]

    target = tmp_path / "bbaz5s.restored.mkv"
    assert packets(target) == packets(arguments[0]) and len(packets(target)) == 75
    before, after = clip_io.read_clip(arguments[0]).audio, clip_io.read_clip(target).audio
    assert (after.rate, after.samples.shape) == (44_100, (131_328, 2))
    kept = np.r_[0 : round(0.93 * 44_100), round(1.73 * 44_100) : 131_328]
    decoded = np.clip(np.rint(before.samples.astype(np.float64) * 32_768), -32_768, 32_767)
    np.testing.assert_array_equal(after.samples[kept] * 32_768, decoded[kept])
