"""Clips whose names would make one file of them: each gets a name of its own, the same one whoever is named first."""

import itertools
import os
from pathlib import Path

import pytest

from avsi_jax.inpainting import api, cli, cli_jobs


def touch(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"a clip")


class Writer:
    """An Inpainter that writes down which clip it was given."""

    def inpaint_file(self, source, target, gaps, **asked):
        Path(target).write_text(str(source))
        return api.FileRepair((), (), None, {"all": 0.1}, str(target), 3.0)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """The current folder, `work`; repairs only write names down."""
    monkeypatch.setattr(api.Inpainter, "load", staticmethod(lambda checkpoint: Writer()))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def written(folder="."):
    """{what was written below a folder: of which clip}."""
    found = (Path(parent, name) for parent, _, files in os.walk(folder) for name in files if ".restored." in name)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


CASES = {  # by hand
    "two kinds": (["a.mpg", "a.avi", "b.mpg"], [], ["a.mpg.restored.mkv", "a.avi.restored.mkv", "b.restored.mkv"]),
    "one is .mkv already": (["a.mkv", "a.mpg"], [], ["a.mkv.restored.mkv", "a.mpg.restored.mkv"]),
    "as sound": (["a.mpg", "a.wav"], ["--format=wav"], ["a.mpg.restored.wav", "a.wav.restored.wav"]),
    "two folders": (["x/a.wav", "y/a.wav"], [], ["x/a.wav.restored.wav", "y/a.wav.restored.wav"]),
    "with this one": (["a.wav", "y/a.wav"], [], ["work/a.wav.restored.wav", "y/a.wav.restored.wav"]),
    "folders alike": (["x/1/a.wav", "y/1/a.wav"], [], ["x/1/a.wav.restored.wav", "y/1/a.wav.restored.wav"]),
    "a name that another one needs": (
        ["a.mpg", "a.avi", "a.mpg.mkv"], [], ["work/a.mpg.restored.mkv", "a.avi.restored.mkv", "a.mpg.mkv.restored.mkv"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("names", "options", "expected"), CASES.values(), ids=CASES)
def test_clips_that_would_become_one_file_are_named_apart(here, names, options, expected):
    touch(*names)
    expected = dict(zip(expected, names))
    for number, order in enumerate(itertools.permutations(names)):
        assert cli.main([*order, *options, "--gap=1-2", "-o", f"out{number}"]) == 0
        assert written(f"out{number}") == expected, order


def test_a_resumed_run_takes_no_clip_for_another(here, capsys):
    """A clip that joins later, and sorts before: what is there is not taken for its repair."""
    touch("clips/more/a.mpg", "clips/more/b.mpg")
    command = ["clips", "-o", "out", "--gap=1-2", "--resume"]
    assert cli.main(command) == 0
    touch("clips/more/a.avi")
    for _ in range(2):
        assert cli.main(command) == 0
        found = written("out")
        assert {found[name] for name in found} == {f"clips/more/{name}" for name in ("a.mpg", "a.avi", "b.mpg")}
        assert found["more/a.avi.restored.mkv"] == "clips/more/a.avi"
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"out/more/{name}.restored.mkv: there already" for name in ("a.avi", "a.mpg", "b")
    ]


def test_nothing_else_changes_its_name(here):
    touch("a.mpg", "b.avi", "x/c.wav")
    jobs = cli_jobs.plan(["a.mpg", "b.avi", "x/c.wav"], gaps=[(1.0, 2.0)])
    assert [str(job.target) for job in jobs] == ["a.restored.mkv", "b.restored.mkv", "c.restored.wav"]
