"""avsi-inpaint: its arguments, output paths and errors, with a fake Inpainter; at the end with a network."""

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
from tests.support.fake_inpainter import files, install, one_line, run, touch
from tests.support.inpainting_fakes import voice

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path)


# ---- clips and output paths --------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_clips_and_keeps_its_tree(fake):
    """Files of operating systems are not clips, and files that were restored before are skipped."""
    touch("in/a.wav", "in/b/c.MPG", "in/b/d.mov", "in/b/e/f.avi")
    touch(
        "in/.DS_Store", "in/._a.wav", "in/.hidden/x.wav", "in/__MACOSX/y.wav", "in/notes.txt", "in/a.restored.wav", "in/Thumbs.db"
    )
    assert run("in", "-o", "out") == 0
    written = ["out/a.restored.wav", "out/b/c.restored.mkv", "out/b/d.restored.mov", "out/b/e/f.restored.mkv"]
    assert [f for f in files() if f.startswith("out")] == written
    before = files()
    assert run("in", "-o", "in", "--format", "wav", "--overwrite") == 0 and len(fake.calls) == 8
    assert run("in", "-o", "in", "--format", "wav", "--overwrite") == 0 and len(fake.calls) == 12, "restores its own outputs"
    assert set(before) < set(files())


def test_without_output_the_current_folder_is_used(fake):
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
def test_the_output_path_of_one_clip(fake, clip, arguments, target):
    touch(clip)
    assert run(clip, *arguments) == 0
    assert files() == sorted([clip, target])


def test_an_existing_folder_may_be_named_like_a_file(fake):
    touch("a.wav")
    Path("out.wav").mkdir()
    assert run("a.wav", "-o", "out.wav") == 0 and files() == ["a.wav", "out.wav/a.restored.wav"]


def test_names_are_read_from_lists_and_stdin(fake, monkeypatch):
    """Names may be any bytes; a clip that is named twice is restored once."""
    odd = os.fsdecode(b"b\xff.wav")
    touch("a.wav", odd, "c d.wav", "e.wav")
    Path("list.txt").write_bytes(b"a.wav\r\n\nb\xff.wav\n./a.wav\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("c d.wav\n"))
    assert run("@list.txt", "-", "e.wav", "-o", "out") == 0
    assert [str(c["source"]) for c in fake.calls] == ["a.wav", odd, "c d.wav", "e.wav"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_and_stdin_may_begin_with_a_byte_order_mark(fake, monkeypatch, encoding):
    touch("a é.wav", "b.wav", "c.wav")
    Path("list.txt").write_bytes("a é.wav\r\nb.wav\r\n".encode(encoding))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("c.wav\n".encode(encoding)), encoding="ascii"))
    assert run("@list.txt", "-", "-o", "out") == 0
    assert [str(c["source"]) for c in fake.calls] == ["a é.wav", "b.wav", "c.wav"]


def test_names_after_two_dashes_may_begin_with_a_dash(fake):
    touch("-a.wav", "--gap.wav", "b.wav")
    assert run("b.wav", "--gap=1-2", "-o", "out", "--", "-a.wav", "--gap.wav") == 0
    assert [str(c["source"]) for c in fake.calls] == ["b.wav", "-a.wav", "--gap.wav"]
    assert [f for f in files() if f.startswith("out")] == ["out/--gap.restored.wav", "out/-a.restored.wav", "out/b.restored.wav"]


def test_a_subfolder_that_cannot_be_read_is_reported_and_the_rest_is_done(fake, monkeypatch, capsys):
    """As root no folder is unreadable, so scandir is replaced."""
    touch("in/a.wav", "in/locked/b.wav", "in/z.wav")
    scandir = os.scandir

    def failing(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert run("in", "-o", "out") == 1
    monkeypatch.setattr(os, "scandir", scandir)
    message = one_line(capsys.readouterr().err)
    assert "in/locked" in message and "Permission denied" in message
    assert [f for f in files() if f.startswith("out")] == ["out/a.restored.wav", "out/z.restored.wav"]


def test_a_corrupt_clip_is_a_failure_whatever_its_name(fake, capsys):
    touch("no gap detected.wav", "a.wav")
    assert run("no gap detected.wav", "a.wav", "-o", "out") == 1
    assert "cannot be decoded" in one_line(capsys.readouterr().err)


def test_options_may_stand_anywhere(fake):
    touch("a.wav", "b.wav", "c.wav")
    assert run("a.wav", "--gap", "0.1-0.2", "b.wav", "--report", "c.wav", "--report=x.html", "--gap=1:00-1:01.5") == 0
    assert len(fake.calls) == 3 and fake.calls[0]["gaps"] == [(0.1, 0.2), (60.0, 61.5)]
    assert "x.html" in files() and "a.wav: cannot be decoded" in Path("x.html").read_text()


def test_the_report_is_written_beside_the_outputs(fake, capsys):
    touch("junk.wav")
    assert run("junk.wav", "-o", "out", "--report") == 2 and "out/inpainting.html" in files()
    assert capsys.readouterr().out == "report: out/inpainting.html\n"
    assert run("junk.wav", "-o", "new/x.wav", "--report", "--json") == 2 and "new/inpainting.html" in files()
    assert json.loads(capsys.readouterr().out)["status"] == "failed"
    assert run("junk.wav", "-o", "out", "--report") == 2 and "out/inpainting.html exists" in one_line(capsys.readouterr().err)
    assert run("junk.wav", "-o", "out", "--report", "--resume") == 2
    assert run("junk.wav", "--report=junk.wav/x.html") == 2
    assert "avsi-inpaint: --report: " in capsys.readouterr().err.splitlines()[-1]


def test_options_are_passed_to_the_inpainter(fake):
    touch("a.wav")
    assert run("a.wav", "--face=2", "--track=3", "--sync", "-0.08", "--checkpoint=runs/x", "--overwrite", "--gap", "auto") == 0
    (call,) = fake.calls
    assert (call["gaps"], call["face"], call["track"], call["sync"], call["overwrite"]) == ("auto", 2, 3, -0.08, True)
    assert run("a.wav", "--sync=auto", "-o", "out") == 0
    call = fake.calls[1]
    assert (call["gaps"], call["face"], call["track"], call["sync"], call["overwrite"]) == ("auto", None, None, "auto", False)
    assert fake.loaded == ["runs/x", "pretrained"]


def test_gaps_are_read_from_a_table(fake):
    """As a spreadsheet saves it, with a byte order mark and more columns; paths relative to the current folder or the table."""
    touch("far/a.wav", "far/b.wav", "c.wav")
    rows = "note,path,start_s,end_s\r\nx,a.wav,1,2\r\n,far/b.wav,0.5,0.75\r\nx,a.wav,1:00,1:00.5\r\n"
    Path("far/gaps.csv").write_text("\ufeff" + rows)
    assert run("--gaps", "far/gaps.csv", "-o", "out") == 0
    assert [(str(c["source"])[-5:], c["gaps"]) for c in fake.calls] == [
        ("a.wav", [(1, 2), (60, 60.5)]),
        ("b.wav", [(0.5, 0.75)]),
    ]
    assert run("far", "c.wav", "--gap=0.1-0.2", "--gaps", "far/gaps.csv", "-o", "out2") == 0
    assert [c["gaps"] for c in fake.calls[2:]] == [[(1, 2), (60, 60.5)], [(0.5, 0.75)], [(0.1, 0.2)]]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_may_have_other_separators_and_encodings(fake, separator, encoding):
    """As spreadsheets save them; pandas writes small numbers with an exponent."""
    touch("a.wav")
    rows = [["path", "start_s", "end_s"], ["a.wav", "5e-05", "0.25"], ["a.wav", "1.5", "2"]]
    Path("gaps.csv").write_bytes("\r\n".join(separator.join(row) for row in rows).encode(encoding))
    assert run("--gaps", "gaps.csv") == 0
    assert fake.calls[0]["gaps"] == [(5e-05, 0.25), (1.5, 2.0)]


# ---- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["files, folders, @LIST or -"]),
        (["none.mpg"], ["none.mpg"]),
        (["empty"], ["empty: ", ".mpg"]),
        (["@blank"], ["blank: "]),
        (["@none"], ["@none", "no such file"]),
        ([""], ["''"]),
        (["@zeros"], ["'a.wav\\x00b.wav\\x00'"]),
        (["a.wav", "--gap", "0.8"], ["--gap", "'0.8'", "START-END"]),
        (["a.wav", "--gap", "a-b"], ["'a-b'", "START-END"]),
        (["a.wav", "--gap", "nan-1"], ["'nan-1'", "START-END"]),
        (["a.wav", "--gap", "1.3-0.8"], ["gap 1.3-0.8", "START < END"]),
        (["a.wav", "--gap", "0.1-0.2", "--gap=auto"], ["--gap auto", "--gap START-END"]),
        (["a.wav", "--face", "left"], ["--face", "'left'"]),
        (["a.wav", "--sync", "on"], ["--sync", "'on'", "off, auto"]),
        (["a.wav", "--sync", "inf"], ["--sync", "'inf'"]),
        (["a.wav", "--format", "mp3"], ["--format", "'mp3'"]),
        (["a.wav", "--frmat", "wav"], ["--frmat"]),
        (["a.wav", "-o", "out.mp3"], ["--output out.mp3", ".wav"]),
        (["a.mpg", "-o", "out.avi"], ["--output out.avi", ".wav"]),
        (["a.mpg", "-o", "out.ts"], ["--output out.ts", ".wav"]),
        (["a.wav", "-o", "x.wav", "--format=flac"], ["--output x.wav", "--format flac"]),
        (["a.wav", "a.mpg", "-o", "x.wav"], ["--output x.wav", "a folder"]),
        (["a.wav", "-o", "blank"], ["--output blank", "a folder"]),
        (["a.wav", "-o", "blank/out"], ["blank is a file"]),
        (["a.wav", "-o", "a.wav", "--overwrite"], ["a.wav is an input"]),
        (["a.wav", "-o", "link.wav", "--overwrite"], ["link.wav is an input"]),
        (["a.wav", "-o", "there.wav"], ["there.wav exists", "--overwrite", "--resume"]),
        (["a.wav", "-o", "there.wav", "--overwrite", "--resume"], ["--overwrite", "--resume"]),
        (["a.wav", "--report=there.html"], ["there.html exists", "--overwrite"]),
        (["a.wav", "--gaps", "blank"], ["blank: ", "path,start_s,end_s"]),
        (["a.wav", "--track", "0"], ["--track", "'0'", "counted from 1"]),
        (["a.wav", "--gaps", "odd.csv"], ["odd.csv, line 3", "'2-x'"]),
        (["a.wav", "--gaps", "comma.csv"], ["comma.csv, line 2", "decimal comma"]),
        (["a.wav", "--gaps", "spaces.csv"], ["spaces.csv", "path start_s end_s", "path,start_s,end_s", "semicolons"]),
        (["a.wav", "--gaps", "short.csv"], ["short.csv, line 2", "'1-'"]),
        (["a.wav", "--gaps", "nameless.csv"], ["nameless.csv, line 2", "no path"]),
        (["a.wav", "--gaps", "other.csv"], ["--gaps", "a.wav", "--gap auto"]),
    ],
    ids=lambda a: " ".join(a),
)
def test_mistakes_are_one_line_and_nothing_is_done(fake, capsys, arguments, named):
    touch("a.wav", "a.mpg", "b/a.wav", "notes.txt", "there.wav", "there.html")
    Path("blank").touch()
    Path("zeros").write_text("a.wav\0b.wav\0")
    Path("empty").mkdir()
    Path("link.wav").symlink_to("a.wav")
    Path("odd.csv").write_text("path,start_s,end_s\na.wav,1,2\na.wav,2,x\n")
    Path("comma.csv").write_text("path;start_s;end_s\na.wav;0,93;1,73\n")
    Path("spaces.csv").write_text("path start_s end_s\na.wav 1 2\n")
    Path("short.csv").write_text("path,start_s,end_s\na.wav,1\n")
    Path("nameless.csv").write_text("path,start_s,end_s\n,1,2\n")
    Path("other.csv").write_text("path,start_s,end_s\nb/a.wav,1,2\n")
    before = files()
    try:
        code = run(*arguments)
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()
    message = one_line(printed.err)
    assert all(part in message for part in named) and printed.out == ""
    assert code == 2 and files() == before and not fake.calls and not fake.loaded


def test_a_folder_that_is_not_writable(fake, capsys, monkeypatch):
    touch("a.wav")
    Path("out").mkdir()
    monkeypatch.setattr(cli_jobs.os, "access", lambda path, mode: path.name != "out")
    assert run("a.wav", "-o", "out/new") == 2
    message = one_line(capsys.readouterr().err)
    assert "/out is not writable" in message and "--output" in message


def test_an_error_in_loading_the_checkpoint_is_one_line(fake, capsys, monkeypatch):
    touch("a.wav")

    def load(checkpoint, mode):
        raise ValueError(f"no config.json in {checkpoint}")

    monkeypatch.setattr(api.Inpainter, "load", staticmethod(load))
    assert run("a.wav", "--checkpoint=none") == 2
    assert one_line(capsys.readouterr().err) == "avsi-inpaint: no config.json in none\n" and files() == ["a.wav"]


# ---- with a network ----------------------------------------------------------------------------------------------------------


def test_audio_files_keep_rate_subtype_and_all_bits(untrained_a_si, tmp_path, capsys):
    """8, 24 and 64 bits, outside the gaps; read by libsndfile. One of the files is not a clip, one is too short for the gap."""
    import soundfile

    kinds = {"PCM_24": 48_000, "PCM_U8": 8_000, "DOUBLE": 16_000}
    for kind, rate in kinds.items():
        samples = voice(2.5, rate, channels=2).astype(np.float64) * (1 + 1e-8)
        soundfile.write(tmp_path / f"{kind}.wav", samples, rate, subtype=kind)
    (tmp_path / "bad.wav").write_bytes(b"not audio")
    soundfile.write(tmp_path / "short.flac", voice(1.0, 16_000), 16_000)
    code = run(tmp_path, "--gap", "0.8-1.3", "--gap=2.2-2.5", "-o", tmp_path / "out", "--checkpoint", untrained_a_si)
    printed = capsys.readouterr()
    assert code == 1 and len(printed.out.splitlines()) == 3, printed.err
    assert "bad.wav: " in printed.err and "short.flac: gap 0.8-1.3 s" in printed.err
    for kind, rate in kinds.items():
        before, after = tmp_path / f"{kind}.wav", tmp_path / "out" / f"{kind}.restored.wav"
        assert (soundfile.info(after).samplerate, soundfile.info(after).subtype) == (rate, kind)
        (x, _), (y, _) = (soundfile.read(p, dtype="float64") for p in (before, after))
        time_s = np.arange(len(x)) / rate
        kept = (time_s < 0.8) | ((time_s >= 1.3) & (time_s < 2.2))
        assert y.shape == x.shape and np.isfinite(y).all()
        np.testing.assert_array_equal(y[kept], x[kept])


@pytest.mark.slow
def test_a_clip_with_video_by_the_command(trained, grid_dir, tmp_path):
    """In a process of its own: one line on stdout, nothing from libraries on stderr, unchanged packets of the video."""
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
    assert done.stdout.startswith(f"{tmp_path / 'bbaz5s.restored.mkv'}: ") and "0.93-1.73 s" in done.stdout
    assert done.stdout.count("\n") == 1
    lines = done.stderr.splitlines()
    assert [line for line in lines if "TensorFlow Lite XNNPACK" not in line] == []  # that line is LiteRT's

    def packets(path):
        with av.open(str(path)) as container:
            return [hashlib.sha256(bytes(packet)).digest() for packet in container.demux(video=0) if packet.size]

    target = tmp_path / "bbaz5s.restored.mkv"
    assert packets(target) == packets(arguments[0]) and len(packets(target)) == 75
    before, after = clip_io.read_clip(arguments[0]).audio, clip_io.read_clip(target).audio
    assert (after.rate, after.samples.shape) == (44_100, (131_328, 2))
    kept = np.r_[0 : round(0.93 * 44_100), round(1.73 * 44_100) : 131_328]
    decoded = np.clip(np.rint(before.samples.astype(np.float64) * 32_768), -32_768, 32_767)
    np.testing.assert_array_equal(after.samples[kept] * 32_768, decoded[kept])
