"""The clip that is installed with the package: its source and licence, and the flag that restores it."""

import hashlib
from pathlib import Path

import pytest

from avsi_jax.app import rendering
from avsi_jax.inpainting import cli_jobs
from avsi_jax.media import clip_io
from tests.support.fake_inpainter import install, one_line, run


@pytest.fixture
def fake(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path)


@pytest.mark.parametrize(("more", "gaps"), [([], [(0.9, 1.5)]), (["--gap=0.5-0.7", "--gap=1-2"], [(0.5, 0.7), (1.0, 2.0)])])
def test_the_example_is_restored_by_one_flag(fake, more, gaps):
    assert run("--example", *more) == 0
    (call,) = fake.calls
    assert (Path(call["source"]), Path(call["target"]), call["gaps"]) == (cli_jobs.EXAMPLE, Path("person.restored.mkv"), gaps)


@pytest.mark.parametrize("more", [["a.mpg"], ["--gaps=table.csv"]])
def test_the_example_does_not_go_with_other_clips(fake, capsys, more):
    Path("table.csv").write_text("path,start_s,end_s\na.mpg,1,2\n")
    assert run("--example", *more) == 2
    message = one_line(capsys.readouterr().err)
    assert "--example" in message and "--gaps" in message and not fake.calls


def test_the_example_is_a_grid_clip_of_a_test_speaker_with_its_licence(grid_dir):
    """The corpus' own file, not a reserved one; small, and with the attribution that CC BY 4.0 requires beside it."""
    path = cli_jobs.EXAMPLE
    clip = clip_io.read_clip(path)
    assert clip.video.rgb.shape == (75, 288, 360, 3) and clip.audio.samples.shape == (131_328, 2)
    assert path.stat().st_size < 500_000
    sums = dict(reversed(line.split()) for line in (grid_dir / "SHA256SUMS").read_text().splitlines())
    (name,) = [name for name, digest in sums.items() if digest == hashlib.sha256(path.read_bytes()).hexdigest()]
    speaker, clip_id = name.removesuffix(".mpg").split("/")
    assert speaker in ("s30", "s32", "s33", "s34") and clip_id not in (grid_dir / "RESERVED.txt").read_text().split()
    readme = path.with_name("README.md").read_text()
    for needed in (
        clip_id,
        "CC BY 4.0",
        "https://creativecommons.org/licenses/by/4.0/",
        "10.5281/zenodo.3625687",
        "nothing in it was changed",
    ):
        assert needed in readme, needed
    assert all(name in readme for name in ("M. Cooke", "J. Barker", "S. Cunningham", "X. Shao", "120(5), 2421-2424, 2006"))


def test_the_readme_of_the_examples_describes_every_file():
    folder = cli_jobs.EXAMPLE.parent
    readme = (folder / "README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in folder.iterdir() if path.name != "README.md")


def test_the_web_page_offers_it_first_and_credits_its_source():
    ui = pytest.importorskip("avsi_jax.app.ui", reason="needs the extra app", exc_type=ImportError)
    names = [file for _, file in ui.EXAMPLES]
    assert names[0] == cli_jobs.EXAMPLE.name and all((ui.PACKAGE / "examples" / name).is_file() for name in names)
    assert "CC BY 4.0" in rendering.EXAMPLES and "audio alone" in rendering.EXAMPLES
