"""Exported tables of a report, word and phone error rates, and intervals of rates."""

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from scipy import stats

from avsi_jax.data import grid_text
from avsi_jax.evaluation import report, table_export, tables, word_errors
from tests.support import fake_evaluations


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = fake_evaluations.make(tmp_path_factory.mktemp("tables") / "eval", examples=False, by_speaker=True)
    report.write_report(folder)
    return folder


# ---- table.csv, table.json -------------------------------------------------------------------------------------------------------


def test_the_csv_file_lists_every_estimate_with_its_protocol(folder):
    rows = list(csv.DictReader((folder / "table.csv").open(newline="")))
    assert {(r["protocol"], r["split"], r["suite"]) for r in rows} == {("waveform", "test", "robustness")}
    one = {"kind": "mean", "case": "", "gap_ms": "300", "system": "av_mtl_s2s", "metric": "gap_l1_db"}
    (found,) = [r for r in rows if one.items() <= r.items()]
    assert float(found["mean"]) == pytest.approx(11.3) and found["n"] == "3" and found["missing"] == "0"
    assert float(found["low"]) <= 11.3 <= float(found["high"])
    one = {"kind": "difference", "case": "shift_ms=-80", "system": "av_mtl_s2s", "minus": "a_si", "metric": "gap_l1_db"}
    (found,) = [r for r in rows if one.items() <= r.items()]
    assert float(found["mean"]) == pytest.approx(-5)
    one = {"kind": "rate", "metric": "word_error", "item": "letter", "system": "a_si"}
    (found,) = [r for r in rows if one.items() <= r.items()]
    assert float(found["mean"]) == 1 and found["n"] == "6"
    summary = json.loads((folder / "summary.json").read_text())
    assert sum(r["kind"] != "rate" for r in rows) == len(summary["table"]) + len(summary["paired"])


def test_the_json_file_lists_the_same_rows(folder):
    found = json.loads((folder / "table.json").read_text())
    rows = list(csv.DictReader((folder / "table.csv").open(newline="")))
    assert [{k: "" if v is None else str(v) for k, v in r.items()} for r in found["rows"]] == rows
    assert found["protocol"] == "waveform" and found["command"].startswith("avsi-evaluate")
    assert found["intervals"].endswith("over speakers, then over the clips of each")


def test_numbers_that_are_not_finite_become_null():
    summary = {"protocol": "p", "split": "s", "suite": "l", "paired": [], "table": [{"metric": "stoi", "mean": float("nan")}]}
    (row,) = table_export.estimates(summary, [])
    assert row["mean"] is None and "NaN" not in table_export.as_json(summary, [row])


# ---- table.tex -------------------------------------------------------------------------------------------------------------------


def environments(source):
    """(name, body) of every environment, outermost last; fails where begin and end don't match."""
    stack = []
    for token in re.finditer(r"\\(begin|end)\{(\w+)\}", source):
        if token[1] == "begin":
            stack.append((token[2], token.end()))
        else:
            name, start = stack.pop()
            assert name == token[2]
            yield name, source[start : token.start()]
    assert not stack


@pytest.mark.parametrize(("longest", "kinds"), [(20, {"table", "tabular"}), (6, {"table", "tabular", "longtable"})])
def test_the_latex_file_is_well_formed(folder, monkeypatch, longest, kinds):
    monkeypatch.setattr(table_export, "MAX_FLOAT_ROWS", longest)
    summary = tables.read(folder).summary
    made = [tables.headline(summary), *tables.results(summary), *tables.changes(summary), *tables.differences(summary)]
    source = table_export.as_latex(summary, made)
    code = re.sub(r"^%.*$", "", source, flags=re.M)
    bare = re.sub(r"\\[\\&%$#_{}]", "", code)
    depth = np.cumsum([(c == "{") - (c == "}") for c in bare])
    assert depth.min() == 0 and depth[-1] == 0 and bare.count("$") % 2 == 0
    assert not re.search(r"[%#_^](?!\{)|[^\x00-\x7f]", re.sub(r"\$[^$]*\$|tab:[\w-]+", "", bare))
    found = list(environments(code))
    assert {name for name, _ in found} == kinds
    for name, body in found:
        if name != "table":
            layout = re.match(r"\{(\w+)\}", body)[1]  # before anything else
            if name == "longtable":  # its head is there twice: of the first page, of all others
                first, body = body.split(r"\endfirsthead")
                assert first.count(r"\toprule") == first.count(r"\midrule") == first.count(r"\caption") == 1
            rows = [line for line in body.split("\n") if line.endswith(r"\\") and r"\caption" not in line]
            assert len(rows) > 1
            for row in rows:
                if wide := re.search(r"\\multicolumn\{(\d+)\}", row):
                    assert int(wide[1]) == len(layout)
                else:
                    assert len(re.findall(r"(?<!\\)&", row)) + 1 == len(layout), row
            assert [body.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]


def test_the_latex_file_states_its_source(folder):
    source = (folder / "table.tex").read_text()
    comments = [line for line in source.splitlines() if line.startswith("%")]
    for words in ("protocol waveform", "--config.split=test", "3 clips", "booktabs", "over speakers"):
        assert any(words in line for line in comments), words
    assert source.count("Protocol waveform, split test.") == source.count(r"\caption")
    assert r"av\_mtl\_s2s & \shortstack[r]{11.30\\{\tiny [" in source
    assert r"$-$5.00$^{+}$" in source and r"+5.00$^{-}$" in source


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex here")
def test_the_latex_file_compiles(folder, tmp_path):
    page = r"\documentclass{article}\usepackage{booktabs,longtable}\begin{document}\input{table}\end{document}"
    (tmp_path / "page.tex").write_text(page)
    shutil.copy(folder / "table.tex", tmp_path)
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()[-2000:]


def test_latex_escapes_special_characters():
    assert table_export.escaped("50 % of a_b & c^2 {d} ~ −1 \\ <x>") == (
        r"50 \% of a\_b \& c\textasciicircum{}2 \{d\} \textasciitilde{} $-$1 \textbackslash{} $<$x$>$"
    )


# ---- words and phones ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoken", "recognized", "phones"),
    [
        ("bin", "bin", [("B", False), ("IH", False), ("N", False)]),
        ("f", "s", [("EH", False), ("F", True)]),
        ("blue", "two", [("B", True), ("L", True), ("UW", False)]),  # B L UW, T UW
        ("green", "red", [("G", True), ("R", False), ("IY", True), ("N", True)]),
        ("eight", "", [("EY", True), ("T", True)]),
        ("place", "lay", [("P", True), ("L", False), ("EY", False), ("S", True)]),
        ("tin", "bin", []),
    ],
)
def test_wrong_phones_of_a_wrong_word(spoken, recognized, phones):
    assert list(word_errors.wrong_phones(spoken, recognized)) == phones


def test_every_phone_has_a_place_of_articulation():
    placed = [phone for phones in word_errors.PLACES.values() for phone in phones.split()]
    assert sorted(placed) == sorted(grid_text.PHONES[1:])


def row(clip, recognized, touched="111111", text="bin blue at f two now", **more):
    cells = {"clip_id": clip, "speaker": clip[:2], "case": "", "gap_ms": "300", "system": "av", "text": text}
    return cells | {"recognized": recognized, "touched": touched, **more}


SUMMARY = {"cases": [{"name": "", "family": "", "value": 0, "gap_ms": 300}], "systems": [{"name": "av", "kind": "system"}]}


def test_only_touched_words_of_grid_sentences_count():
    """Words outside the gap, rows without a judge, other sentences and other cases do not count."""
    rows = [
        row("s1a", "bin red at f two now", "110000"), row("s1b", "", ""), row("s1c", "bin", "111111", text="hello"),
        row("s1d", "set red by s one soon", case="shift_ms=80"), row("s1e", "", "000100"),
    ]  # fmt: skip
    words = word_errors.touched_words(SUMMARY, rows)
    assert [(w.cluster, w.slot, w.spoken, w.recognized) for w in words] == [
        ("s1a", 0, "bin", "bin"), ("s1a", 1, "blue", "red"), ("s1e", 3, "f", ""),
    ]  # fmt: skip
    rates = {e["item"]: (e["mean"], e["n"]) for e in word_errors.estimates(SUMMARY, words) if e["kind"] == "word"}
    assert rates == {"command": (0, 1), "colour": (1, 1), "letter": (1, 1), "all": (pytest.approx(2 / 3), 3)}
    assert word_errors.confusions_table(SUMMARY, words)["rows"][0]["label"] == "blue → red"


def test_the_most_frequent_confusions_come_first():
    rows = [row(f"s1{i}", "bin blue at s two now") for i in range(3)] + [row("s2a", "bin blue at p two now")]
    table = word_errors.confusions_table(SUMMARY, word_errors.touched_words(SUMMARY, rows))
    assert [(r["label"], r["cells"]["av"]["text"], r["cells"]["av"]["interval"]) for r in table["rows"]] == [
        ("f → s", "3", "of 4"), ("f → p", "1", "of 4"),
    ]  # fmt: skip


# ---- intervals of rates ----------------------------------------------------------------------------------------------------------


def test_the_interval_over_clusters_is_that_of_their_ratio():
    """Against the standard error of a ratio of cluster totals (Cochran 1977, 6.4): sqrt(sum(e^2)) / total, e = y - r x."""
    generator = np.random.default_rng(5)
    counts = generator.integers(1, 7, size=300)
    sums = generator.binomial(counts, generator.beta(2, 3, size=300))
    rate = sums.sum() / counts.sum()
    error = np.sqrt(((sums - rate * counts) ** 2).sum()) / counts.sum()
    found = tables.clustered(sums, counts)
    assert found["mean"] == pytest.approx(rate) and found["n"] == 300
    assert found["low"] == pytest.approx(rate - 1.96 * error, abs=0.2 * error)
    assert found["high"] == pytest.approx(rate + 1.96 * error, abs=0.2 * error)
    assert tables.clustered(sums, counts) == found


def test_intervals_of_none_or_one_cluster():
    assert np.isnan(tables.clustered([0], [0])["mean"])
    assert tables.clustered([2], [4]) == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 1}
    assert tables.clustered([1, 0], [1, 0])["high"] == 1  # a resample may have no counts
    theirs = stats.ttest_1samp([0.5, 0.25, 0.1], 0).confidence_interval(0.95)
    found = tables.clustered([2, 1, 1, 0], [4, 4, 10, 0], by_speaker=True)
    assert (
        (found["low"], found["high"]) == pytest.approx(tuple(theirs)) and found["mean"] == pytest.approx(4 / 18) and found["n"] == 3
    )
