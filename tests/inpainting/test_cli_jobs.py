"""Output paths of avsi-inpaint: clips that would share an output get different ones, in whatever order they are named."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avsi_jax.inpainting import api, cli_jobs
from tests.support.fake_inpainter import run, touch
from tests.support.video_files import write_video


class NameWriter:
    """An Inpainter that writes the name of the clip into the output."""

    def inpaint_file(self, source, target, gaps, **options):
        Path(target).write_text(str(source))
        return api.FileRepair((), (), None, {"all": 0.1}, str(target), 3.0)


@pytest.fixture
def work(monkeypatch, tmp_path):
    """The current folder, `work`; outputs contain the names of their clips."""
    monkeypatch.setattr(api.Inpainter, "load", staticmethod(lambda checkpoint, mode: NameWriter()))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def outputs(folder="."):
    """{output below a folder: name of its clip}."""
    paths = (Path(parent, name) for parent, _, files in os.walk(folder) for name in files if ".restored." in name)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


CASES = {  # derived by hand
    "two formats": (["a.mpg", "a.avi", "b.mpg"], [], ["a.mpg.restored.mkv", "a.avi.restored.mkv", "b.restored.mkv"]),
    "one is .mkv already": (["a.mkv", "a.mpg"], [], ["a.mkv.restored.mkv", "a.mpg.restored.mkv"]),
    "audio only": (["a.mpg", "a.wav"], ["--format=wav"], ["a.mpg.restored.wav", "a.wav.restored.wav"]),
    "two folders": (["x/a.wav", "y/a.wav"], [], ["x/a.wav.restored.wav", "y/a.wav.restored.wav"]),
    "the current folder": (["a.wav", "y/a.wav"], [], ["work/a.wav.restored.wav", "y/a.wav.restored.wav"]),
    "folders of the same name": (["x/1/a.wav", "y/1/a.wav"], [], ["x/1/a.wav.restored.wav", "y/1/a.wav.restored.wav"]),
    "a full name that another clip has": (
        ["a.mpg", "a.avi", "a.mpg.mkv"], [], ["work/a.mpg.restored.mkv", "a.avi.restored.mkv", "a.mpg.mkv.restored.mkv"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("names", "options", "expected"), CASES.values(), ids=CASES)
def test_clips_that_would_share_an_output_get_different_ones(work, names, options, expected):
    touch(*names)
    expected = dict(zip(expected, names))
    for number, order in enumerate(itertools.permutations(names)):
        assert run(*order, *options, "--gap=1-2", "-o", f"out{number}") == 0
        assert outputs(f"out{number}") == expected, order


def test_a_resumed_run_does_not_take_one_clip_for_another(work, capsys):
    """A clip that is added later and sorts first: the existing output is not taken for its own."""
    touch("clips/more/a.mpg", "clips/more/b.mpg")
    command = ["clips", "-o", "out", "--gap=1-2", "--resume"]
    assert run(*command) == 0
    touch("clips/more/a.avi")
    for _ in range(2):
        assert run(*command) == 0
        written = outputs("out")
        assert {written[name] for name in written} == {f"clips/more/{name}" for name in ("a.mpg", "a.avi", "b.mpg")}
        assert written["more/a.avi.restored.mkv"] == "clips/more/a.avi"
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(", ")[0] for line in lines] == [f"out/more/{name}.restored.mkv: exists" for name in ("a.avi", "a.mpg", "b")]


def test_other_outputs_have_short_names(work):
    touch("a.mpg", "b.avi", "x/c.wav")
    jobs = cli_jobs.plan(["a.mpg", "b.avi", "x/c.wav"], gaps=[(1.0, 2.0)])
    assert [str(job.target) for job in jobs] == ["a.restored.mkv", "b.restored.mkv", "c.restored.wav"]


@pytest.mark.parametrize(
    ("name", "has_video", "suffix"),
    [
        ("a.mpg", True, ".mkv"), ("a.TS", True, ".mkv"), ("a.ogg", True, ".mkv"), ("a.wav", True, ".mkv"), ("a.MOV", True, ".mov"),
        ("a.mp4", False, ".mp4"), ("a.webm", False, ".wav"), ("a.m4a", False, ".wav"), ("a.flac", False, ".flac"),
        ("noname", False, ".wav"),
    ],
)  # fmt: skip
def test_the_default_output_is_lossless_and_holds_the_video(name, has_video, suffix):
    assert cli_jobs.default_suffix(Path(name), has_video) == suffix


def test_the_content_of_a_clip_decides_whether_its_default_output_holds_video(tmp_path):
    """The same video under three names, and audio in a container that is mostly used for video."""
    video = write_video(tmp_path / "talk.webm", "mpeg4", "pcm_s16le", container="matroska")
    for name in ("talk.m4a", "talk.wav", "talk"):
        (tmp_path / name).write_bytes(video.read_bytes())
        assert cli_jobs.default_suffix(tmp_path / name) == ".mkv", name
    soundfile.write(tmp_path / "voice.avi", np.zeros(8000), 8000, format="WAV")
    assert cli_jobs.default_suffix(tmp_path / "voice.avi") == ".wav"
