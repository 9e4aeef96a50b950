"""The clip that comes with the installation: what it is, that it may be here, and that one flag repairs it."""

import hashlib
from pathlib import Path

import pytest

from avsi_jax.app import rendering
from avsi_jax.inpainting import api, cli, cli_jobs
from avsi_jax.media import clip_io


class Writer:
    """An Inpainter that notes what it was asked for."""

    def __init__(self):
        self.asked = []

    def inpaint_file(self, source, target, gaps, **asked):
        self.asked.append((Path(source), Path(target), gaps))
        Path(target).write_bytes(b"restored")
        return api.FileRepair((), (), None, {"all": 0.1}, str(target), 3.0)


@pytest.fixture
def writer(monkeypatch, tmp_path):
    writer = Writer()
    monkeypatch.setattr(api.Inpainter, "load", staticmethod(lambda checkpoint: writer))
    monkeypatch.chdir(tmp_path)
    return writer


@pytest.mark.parametrize(("more", "gaps"), [([], [(0.9, 1.5)]), (["--gap=0.5-0.7", "--gap=1-2"], [(0.5, 0.7), (1.0, 2.0)])])
def test_one_flag_repairs_it(writer, more, gaps):
    assert cli.main(["--example", *more]) == 0
    assert writer.asked == [(cli_jobs.EXAMPLE, Path("person.restored.mkv"), gaps)]


@pytest.mark.parametrize("more", [["a.mpg"], ["--gaps=table.csv"]])
def test_it_goes_with_no_other_clip(writer, capsys, more):
    Path("table.csv").write_text("path,start_s,end_s\na.mpg,1,2\n")
    assert cli.main(["--example", *more]) == 2
    assert capsys.readouterr().err == "avsi-inpaint: --example is a clip of its own; take it without IN and without --gaps\n"
    assert not writer.asked


def test_it_is_a_clip_of_grid_that_may_be_here(grid_dir):
    """The corpus' own file, of a test speaker, not one that is kept back; small, and with what CC BY 4.0 asks for beside it."""
    path = cli_jobs.EXAMPLE
    clip = clip_io.read_clip(path)
    assert clip.video.rgb.shape == (75, 288, 360, 3) and clip.audio.samples.shape == (131_328, 2)
    assert path.stat().st_size < 500_000
    sums = dict(reversed(line.split()) for line in (grid_dir / "SHA256SUMS").read_text().splitlines())
    (name,) = [name for name, found in sums.items() if found == hashlib.sha256(path.read_bytes()).hexdigest()]
    speaker, clip_id = name.removesuffix(".mpg").split("/")
    assert speaker in ("s30", "s32", "s33", "s34") and clip_id not in (grid_dir / "RESERVED.txt").read_text().split()
    told = path.with_name("README.md").read_text()
    for needed in (
        clip_id,
        "CC BY 4.0",
        "https://creativecommons.org/licenses/by/4.0/",
        "10.5281/zenodo.3625687",
        "nothing in it was changed",
    ):
        assert needed in told, needed
    assert all(name in told for name in ("M. Cooke", "J. Barker", "S. Cunningham", "X. Shao", "120(5), 2421-2424, 2006"))


def test_the_page_begins_with_it_and_says_what_the_others_are():
    page = pytest.importorskip("avsi_jax.app.ui", reason="needs the extra app", exc_type=ImportError)
    names = [file for _, file in page.EXAMPLES]
    assert names[0] == cli_jobs.EXAMPLE.name and all((page.PACKAGE / "examples" / name).is_file() for name in names)
    assert "CC BY 4.0" in rendering.EXAMPLES and "repaired by their sound alone" in rendering.EXAMPLES
