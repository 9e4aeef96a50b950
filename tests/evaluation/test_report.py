"""The report of a fake evaluation: content and order of its text, its images and audio, and that it loads no other file."""

import base64
import io
import json
import re

import numpy as np
import pytest

from avsi_jax.evaluation import curves, report, tables
from avsi_jax.media import clip_io, plots
from tests.support import fake_evaluations
from tests.support.html_page import Page


def page_of(folder):
    return Page(report.write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = fake_evaluations.make(tmp_path_factory.mktemp("report") / "eval")
    assert report.write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_loads_no_other_file(folder, page):
    assert page.open == []
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|@import|url\(", source)
    loaded = [a.get("src", "") for tag in ("img", "audio", "source", "iframe") for a in page.all(tag)]
    assert loaded and all(address.startswith("data:") for address in loaded)
    assert all(a["href"].startswith("#") for a in page.all("a"))
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert {a["href"][1:] for a in page.all("a")} <= ids
    assert any("default-src 'none'" in a.get("content", "") for a in page.all("meta"))
    assert (folder / "report.html").stat().st_size < 2_500_000


def test_the_page_is_accessible_to_screen_readers(page):
    """Every image, player and scrollable region has a name; heading levels are never skipped."""
    assert all(a["alt"] for a in page.all("img")) and all(a["aria-label"] for a in page.all("audio"))
    regions = [a for a in page.all("div") if "wide" in a.get("class", "")]
    assert regions and all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:]))
    assert all(a.get("scope") for a in page.all("th"))


def test_the_head_describes_the_evaluation(page):
    for words in (
        "av_mtl_s2s on test <unseen>", "Protocol waveform : samples set to zero inside the words", "3 clips", "2025-06-01",
        "8,000 Hz", "--config.split=test", "0.0.4", "suite robustness",
    ):  # fmt: skip
        assert words in page.text, words


@pytest.mark.slow
def test_the_page_names_no_folder_of_the_machine_and_begins_with_the_note(tmp_path):
    folder = fake_evaluations.make(tmp_path / "eval")
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"command": "avsi-evaluate --workdir=/srv/anna/runs/a_si --raw ~/videos", "note": "The data are synthetic."}
    summary["runs"] = {"a_si": {"workdir": "/srv/anna/runs/a_si", "step": 7}}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = report.write_report(folder).read_text()
    assert "anna" not in text and "--workdir=a_si" in text and "--raw videos" in text
    assert text.index("The data are synthetic.") < text.index('id="short"')


def test_the_page_begins_with_the_findings(page):
    """The system's means are 11.3 at 300 ms and 11.9 at 900; every clip is 5 dB below the baseline's."""
    short = page.part("Metrics Summary", "Time, versions")
    assert "gap error of av_mtl_s2s is 11.30 dB [10.30, 12.30] at 300 ms (n = 3) and 11.90 dB" in short
    assert "av_mtl_s2s against a_si, by gap error: better at every gap, 300 ms to 900 ms." in short
    assert "significant up to 900 ms, the longest gap." in short
    side = short.split("Systems side by side")[1]
    assert "300 ms 21.30 [20.30, 22.30] 16.30 [15.30, 17.30] 11.30 [10.30, 12.30]" in side and "ESTOI (higher is better)" in side


def test_tables_list_the_means_in_order(page):
    first = page.part("Gap of 300 ms", "Gap of 600 ms")
    means = (("masked audio", "21.30"), ("a_si", "16.30"), ("av_mtl_s2s", "11.30"), ("oracle mel (upper bound)", "6.30"))
    places = [first.index(f"{name} {mean}") for name, mean in means]
    assert places == sorted(places)
    assert "[10.30, 12.30]" in first and "0.125" in first
    assert "PESQ wb" not in page.text  # nothing was computed
    last = page.part("Gap of 900 ms", "shown once")
    assert "n 2" in last.split("a_si")[1].split("av_mtl_s2s")[0] and "n 2" not in first  # one PESQ of three is missing


def test_changes_have_tables_of_their_own(page):
    """13.4 = 11.9 + 1.5 with an A/V offset; references, which the video does not affect, have no rows there."""
    table = page.part("are shown once", "Differences clip by clip").split("A/V offset (positive: audio lags video), ms")[-1]
    table = table.split("white noise")[0]
    assert table.index("−80 a_si") < table.index("0 masked audio") < table.index(" 80 a_si")
    assert "av_mtl_s2s 13.40" in table and table.count("masked") == 1


def test_differences_state_which_system_is_better(page):
    forth = page.part("av_mtl_s2s minus a_si", "a_si minus")
    assert "−5.00 [−5.00, −5.00] better" in forth and "+0.100 [+0.100, +0.100] better" in forth and "worse" not in forth
    back = page.part("a_si minus av_mtl_s2s", "Words and phones")
    assert "+5.00 [+5.00, +5.00] worse" in back and "better" not in back
    assert "900 ms, A/V offset (positive: audio lags video), ms: −80" in back


def test_words_that_the_gap_touches_are_counted(page):
    """Two of three clips have word times, with three gaps each: "at f" is touched six times; the judge recognizes s and by."""
    words = page.part("Word errors by position", "Most frequent confusions")
    assert "preposition 100 % [100, 100] 100 % [100, 100] 0 % [0, 0] 0 % [0, 0] 6" in words  # masked, a_si, system, oracle
    assert "letter 100 %" in words and "digit" not in words
    assert "all 100 % [100, 100] 100 % [100, 100] 50 % [50, 50] 0 % [0, 0] 12" in words
    assert (
        "f → s 6 of 6 6 of 6 6 of 6 0 of 6" in page.part("Most frequent confusions", "Phone errors by")
        and "asr, step 7" in page.text
    )
    phones = page.part("Phone errors by", "Examples")
    assert "F 100 %" in phones and "EH 0 %" in phones  # EH F, EH S: the vowel is right


def test_examples_embed_the_audio_files(folder, page):
    players = page.all("audio")
    assert len(players) == 10 and all("controls" in player for player in players)
    kind, data = players[0]["src"].split(";base64,")
    assert kind == "data:audio/wav" and base64.b64decode(data) == (folder / "audio/bbaf2n-300-masked.wav").read_bytes()
    assert players[5]["src"].startswith("data:audio/flac;base64,")
    labels = [player["aria-label"] for player in players[:5]]
    assert labels == [f"bbaf2n, {n}" for n in ("masked audio", "a_si", "av_mtl_s2s", "oracle mel (upper bound)", "original")]
    assert "Spoken: bin blue at f two now" in page.text and "Transcript: bin green at f two now" in page.text
    assert "Recognized: bin blue at s two now" in page.text
    assert page.text.index("Evenly spread") < page.text.index("Among the worst")
    assert "900 ms: 0.40 to 0.70 s and 0.90 to 1.20 s" in page.text
    assert ("mark", {}) in page.tags and report.compared("a b c", "a x c") == [("a", True), ("x", False), ("c", True)]


def pixels(address):
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))


def test_images_are_png_files_with_content(page):
    images = page.all("img")
    assert len(images) == 10 + 4 + 2 * 2  # spectrograms; curves over gap length; curves over two changes
    for attributes in images:
        image = pixels(attributes["src"])
        assert image.format == "PNG" and len(set(image.convert("L").tobytes())) > 20
        assert len(attributes["src"]) < 160_000


def test_every_gap_is_marked_in_the_spectrogram():
    """Each gap has a white bar above it: the share of white columns at the top of the image is that of the gaps."""

    def columns(gaps_s):
        drawn = plots.spectrogram_uri(fake_evaluations.audio(0), fake_evaluations.RATE, 0.0, gaps_s, "")
        image = np.asarray(pixels(drawn).convert("RGB"), int)
        black = image.sum(-1) < 60
        inside = black.mean(0) > 0.3  # the axes: silence is black
        top = np.flatnonzero(black.any(1))[0] + 3
        return (image[top] > 240).all(-1)[np.flatnonzero(inside)[0] : np.flatnonzero(inside)[-1]].mean()

    none, one, two = (columns(g) for g in ([], [(0.3, 0.6)], [(0.3, 0.6), (0.9, 1.2)]))
    assert none < 0.02 and one == pytest.approx(0.2, abs=0.03) and two == pytest.approx(0.4, abs=0.05)


def test_failures_and_speakers_are_shown(page):
    assert "1 of 60 rows lack a score" in page.text
    assert "swwp2s 900 a_si pesq_nb: <No utterances> detected" in page.text
    assert "whose gap may be in silence: 1." in page.text
    speakers = page.part("By speaker", "Missing scores").split("ESTOI")[0]
    assert speakers.index("s1 ") < speakers.index("s2 ") < speakers.index("s10 ")
    assert "s2 21.60 [21.60, 21.60] 16.60 [16.60, 16.60] 11.60" in speakers  # 20 - 5 x place + 0.6 + 1, without changes


@pytest.mark.slow
def test_examples_beyond_the_size_limit_are_left_out(tmp_path, monkeypatch):
    fake_evaluations.make(tmp_path / "eval", cases=fake_evaluations.CASES)
    monkeypatch.setattr(report, "MAX_EXAMPLE_BYTES", 700_000)
    page = page_of(tmp_path / "eval")
    assert len(page.all("audio")) == 5 and "1 more examples are in the folder audio" in page.text


def test_an_evaluation_without_any_score_still_gives_a_page(tmp_path):
    """No pairs and no examples either."""
    fake_evaluations.make(tmp_path / "eval", table=[], paired=[], examples=False, reach=[])
    page = page_of(tmp_path / "eval")
    assert page.open == [] and not page.all("audio") and "Differences clip by clip" not in page.text


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda f: (f / "clips.csv").unlink(), FileNotFoundError, "found no clips.csv; expected the results of avsi-evaluate"),
        (lambda f: (f / "clips.csv").write_text("clip_id,speaker\n"), ValueError, "lacks the columns case, gap_ms, gaps_s"),
        (lambda f: (f / "summary.json").write_text('{"title": "x"}'), ValueError, "lacks cases, command, date"),
        (lambda f: rename_audio(f, "../outside.wav"), ValueError, "expected a .wav or .flac inside"),
        (lambda f: rename_audio(f, "summary.json"), ValueError, "expected a .wav or .flac inside"),
    ],
)
def test_an_error_names_what_is_wrong(tmp_path, change, error, says):
    folder = fake_evaluations.make(tmp_path / "eval", cases=fake_evaluations.CASES[:1], examples=False)
    change(folder)
    with pytest.raises(error, match=re.escape(says)):
        report.write_report(folder)


def rename_audio(folder, name):
    clip_io.write_audio(folder.parent / "outside.wav", fake_evaluations.audio(0), fake_evaluations.RATE)
    example = fake_evaluations.example(folder, "bbaf2n", fake_evaluations.CASES[0], ".wav", [(0.4, 0.7)])
    example["audio"]["original"] = name
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"examples": [example]}))


# ---- labels and curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (("", 0.0), "900 ms"),
        (("gaps", 1), "900 ms in 1 gap"),
        (("gaps", 4), "900 ms in 4 gaps"),
        (("paper_gaps", 8), "about 900 ms in 1 to 8 gaps"),
        (("no_video", 1), "900 ms, audio only"),
        (("whole_clip", 1), "900 ms, video only"),
        (("shift_ms", -80), "900 ms, offset: −80"),
        (("video_of", 2), "900 ms, offset: another speaker (2)"),
    ],
)
def test_the_label_of_a_case(case, says):
    family, value = case
    label = tables.case_label({"gap_ms": 900, "family": family, "value": value}, dict.fromkeys([family], "offset"))
    assert label.replace("\u00a0", " ") == says


def test_a_verdict_needs_an_interval_that_excludes_zero():
    entry = {"metric": "stoi", "mean": 0.1, "low": -0.1, "high": 0.2}
    assert tables.verdict(entry) == "" and tables.verdict(entry | {"low": 0.05}) == "better"
    assert tables.verdict({"metric": "gap_l1_db", "mean": 0.1, "low": 0.05, "high": 0.2}) == "worse"


def test_lines_differ_even_without_colour():
    """Ten systems of one kind: no two have the same dashes and mark, or the same colour and dashes."""
    styled = curves.styled([{"name": str(i), "kind": "system"} for i in range(10)])
    assert len({(s["dashes"], s["mark"]) for s in styled}) == len({(s["colour"], s["dashes"]) for s in styled}) == 10


def entries(cases, **systems):
    """A table of gap errors: system -> one value per case, None for no row."""
    same = {"metric": "gap_l1_db", "n": 3}
    return [
        {"case": c["name"], "gap_ms": c["gap_ms"], "system": s, "mean": v, "low": v - 1, "high": v + 1, **same}
        for s, values in systems.items()
        for c, v in zip(cases, values, strict=True)
        if v is not None
    ]


def cases_of(*cases):
    from avsi_jax.evaluation import conditions

    return [(c := conditions.Case(*case))._asdict() | {"name": c.name} for case in cases]


def drawn(monkeypatch, summary):
    """({title: (ticks, [(line's name, positions, means)])} of every figure that `sections` draws, its result)."""
    figures = []

    def record(xlabel, lines, ticks, metric, label):
        points = [[(x, e[metric]["mean"]) for x, e in sorted(line.points.items()) if e] for line in lines]
        figures.append((ticks, [(line.name, *zip(*pairs)) for line, pairs in zip(lines, points, strict=True)]))
        return "data:image/png;base64,"

    monkeypatch.setattr(curves, "_curve", record)
    sections = curves.sections(summary, curves.styled(summary["systems"]), "")
    return dict(zip([s["title"] for s in sections], figures, strict=True)), sections


def test_a_system_that_a_change_does_not_affect_is_a_level_line(monkeypatch):
    cases = cases_of((900,), (900, "shift_ms", -80), (900, "shift_ms", 40))
    systems = [{"name": "interpolation", "kind": "interpolation"}, {"name": "av", "kind": "system"}]
    summary = {"cases": cases, "systems": systems, "families": {"shift_ms": "offset, ms"}}
    figures, _ = drawn(monkeypatch, summary | {"table": entries(cases, interpolation=(9, None, None), av=(5, 7, 6))})
    ((title, (ticks, lines)),) = figures.items()  # a single gap length gives no curve
    assert title == "Offset, ms; gap of 900 ms" and ticks == {-80: "−80", 0: "0", 40: "40"}
    assert lines == [("interpolation", (-80, 0, 40), (9, 9, 9)), ("av", (-80, 0, 40), (7, 5, 6))]


def test_streams_are_lines_over_gap_length(monkeypatch):
    cases = cases_of((300,), (300, "no_video", 1), (900,), (900, "no_video", 1), (3000, "whole_clip", 1))
    systems = [{"name": "masked", "kind": "masked"}, {"name": "av", "kind": "system"}]
    summary = {"cases": cases, "systems": systems, "families": {"no_video": "no video", "whole_clip": "no audio"}}
    table = entries(cases, masked=(30, None, 31, None, 32), av=(5, 6, 7, 8, 9))
    figures, sections = drawn(monkeypatch, summary | {"table": table})
    ((title, (ticks, lines)),) = figures.items()
    assert title == "By gap length and streams used" and list(ticks) == [300, 900, 3000]
    assert lines == [  # masked audio is far above all others: named, not drawn
        ("av", (300, 900), (5, 7)), ("av, audio only", (300, 900), (6, 8)), ("av, video only", (3000,), (9,)),
    ]  # fmt: skip
    assert sections[0]["figures"][0]["above"] == "masked"
