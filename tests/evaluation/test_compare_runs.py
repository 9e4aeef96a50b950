"""Comparison of several fake runs on one page: which runs can be compared, their common clips, differences from the first."""

import csv
import json
import re

import pytest

from avsi_jax.evaluation import report, tables
from tests.support import fake_evaluations
from tests.support.html_page import Page

TWO = [{"name": "av_mtl_s2s", "kind": "system"}, {"name": "masked audio", "kind": "masked"}]


def run(root, name, **changed):
    """A fake evaluation of a run in root/name, without examples."""
    folder = root / name / "eval" / "waveform-test-lengths"
    return fake_evaluations.make(
        folder, **{"cases": fake_evaluations.CASES, "systems": TWO, "examples": False, "suite": "lengths"} | changed
    )


def change(folder, edit):
    """Applies `edit` to every row of clips.csv; a row becomes None to be removed."""
    rows = list(csv.DictReader((folder / "clips.csv").open(newline="")))
    rows = [r for r in map(edit, rows) if r]
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two seeds of one system, the second 2 dB worse and without one clip."""
    root = tmp_path_factory.mktemp("compared")
    folders = run(root, "first"), run(root, "second", shift=2.0)
    change(folders[1], lambda r: r if r["clip_id"] != "swwp2s" else None)
    assert report.main([*map(str, folders), f"--output={root / 'out' / 'both.html'}"]) == 0
    return root / "out" / "both.html"


def test_the_page_shows_both_runs(compared):
    """At 300 ms the first has 10.3 and 11.3 dB in the two clips that both have, the second 2 dB more."""
    page = Page(compared.read_text(encoding="utf-8"))
    assert page.open == [] and len(page.all("img")) == 4
    assert "av_mtl_s2s (first) and av_mtl_s2s (second)" in page.text and "Protocol waveform" in page.text
    side = page.part("Systems side by side", "ESTOI")
    assert "masked audio av_mtl_s2s (first) av_mtl_s2s (second) n" in side
    assert re.search(r"300 ms 2\d.\d\d \[[\d., ]+\] 10.80 \[10.30, 11.30\] 12.80 \[12.30, 13.30\] 2", side)
    assert "3 clips and gaps that not every run has are left out" in page.text and "2 clips" in page.text
    assert page.part("Gap of 300 ms", "Gap of 600 ms").count("masked") == 1
    differences = page.part("av_mtl_s2s (second) minus av_mtl_s2s (first)", "Words and phones")
    assert "300 ms +2.00 [+2.00, +2.00] worse" in differences
    assert "python -m avsi_jax.report" in page.text


def test_the_tables_are_written_beside_the_page(compared):
    rows = list(csv.DictReader(compared.with_suffix(".csv").open(newline="")))
    one = {"kind": "difference", "system": "av_mtl_s2s (second)", "minus": "av_mtl_s2s (first)", "metric": "gap_l1_db"}
    assert {r["gap_ms"]: float(r["mean"]) for r in rows if one.items() <= r.items()} == pytest.approx(
        {"300": 2.0, "600": 2.0, "900": 2.0}
    )
    assert sorted(p.name for p in compared.parent.iterdir()) == ["both.csv", "both.html", "both.json", "both.tex"]
    assert set(json.loads(compared.with_suffix(".json").read_text())["runs"]) == {"av_mtl_s2s (first)", "av_mtl_s2s (second)"}


def test_runs_have_distinct_names(tmp_path):
    from avsi_jax.evaluation.compare_runs import distinct_names

    def read(place, system):
        return tables.Evaluation(tmp_path / place / "eval" / "x", {"system": system}, [])

    assert distinct_names([read("a", "av"), read("b", "si")]) == ["av", "si"]
    assert distinct_names([read("a", "av"), read("b", "av"), read("c", "si")]) == ["av (a)", "av (b)", "si"]
    assert distinct_names([read("1/a", "av"), read("2/a", "av")]) == ["av (a) 1", "av (a) 2"]


@pytest.mark.parametrize(
    ("changed", "edit", "says"),
    [
        ({"protocol": "peer"}, None, "found protocol peer, expected waveform as in"),
        ({"split": "test_seen"}, None, "found split test_seen, expected test as in"),
        ({"suite": "unseen"}, None, "found suite unseen, expected lengths"),
        ({"metric_rate": 16000}, None, "found metric_rate 16000, expected 8000"),
        ({}, lambda r: r | {"gaps_s": "0.5-0.8"}, "bbaf2n at 300 ms has its gap at 0.5-0.8 s, expected 0.400000-0.700000"),
        ({}, lambda r: r | {"clip_id": "x" + r["clip_id"]}, "no clip and gap in common"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, capsys, changed, edit, says):
    folders = run(tmp_path, "first"), run(tmp_path, "second", **changed)
    if edit:
        change(folders[1], edit)
    assert report.main([*map(str, folders), f"--output={tmp_path / 'x.html'}"]) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1 and not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["EVAL", "--output=OUT.html"], "--output compares evaluations: found one, expected two or more"),
        (["EVAL", "EVAL"], "expected --output=FILE.html"),
        (["EVAL", "EVAL", "--output=OUT.pdf"], "expected a name that ends in .html"),
        (["EVAL", "EVAL", "--output=THERE.html"], "THERE.html exists"),
        (["NOWHERE"], "found no clips.csv and no summary.json"),
    ],
)
def test_a_wrong_command_line_gives_one_line(tmp_path, capsys, arguments, says):
    (tmp_path / "THERE.html").write_text("mine")
    places = {name: str(tmp_path / name) for name in ("OUT", "THERE", "NOWHERE")} | {"EVAL": str(run(tmp_path, "a"))}
    named = [re.sub("|".join(places), lambda m: places[m[0]], a) for a in arguments]
    assert report.main(named) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1
    assert (tmp_path / "THERE.html").read_text() == "mine"


def test_the_report_of_one_folder_is_written_again(tmp_path, capsys):
    folder = run(tmp_path, "a")
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert {p.name for p in folder.iterdir()} >= {"report.html", "table.csv", "table.json", "table.tex"}
