"""The page of a made-up evaluation, read as text: what it says, in which order, and that it stands alone."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest

from avsi_jax.evaluation import curves, report, tables
from avsi_jax.media import clip_io, plots
from tests.support import fake_evaluations


class Page(html.parser.HTMLParser):
    """Tags left open, attributes by tag, and the text between them."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def part(self, start, end):
        return self.text.split(start, 1)[1].split(end, 1)[0]


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


def test_it_is_well_formed_and_stands_alone(folder, page):
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


def test_it_can_be_read_without_eyes(page):
    """Every picture, player and region that scrolls has a name; headings go down one step at a time."""
    assert all(a["alt"] for a in page.all("img")) and all(a["aria-label"] for a in page.all("audio"))
    regions = [a for a in page.all("div") if "wide" in a.get("class", "")]
    assert regions and all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:]))
    assert all(a.get("scope") for a in page.all("th"))


def test_head_says_what_was_run(page):
    for words in (
        "av_mtl_s2s on test <unseen>", "Protocol waveform : samples lost inside the words", "3 clips", "2025-06-01", "8,000 Hz",
        "--config.split=test", "0.0.4", "suite robustness",
    ):  # fmt: skip
        assert words in page.text, words


def test_it_begins_with_what_was_found(page):
    """The system's means are 11.3 at 300 ms and 11.9 at 900; every clip is 5 dB below the baseline's."""
    short = page.part("Meaning In short", "Times, versions")
    assert "av_mtl_s2s is off in the gap by 11.30 dB [10.30, 12.30] at 300 ms (n = 3) and 11.90 dB" in short
    assert "av_mtl_s2s against a_si, by gap error: better at every gap, 300 ms to 900 ms." in short
    assert "The gain stays above 0 up to 900 ms, the longest." in short
    side = short.split("Systems side by side")[1]
    assert "300 ms 16.30 [15.30, 17.30] 11.30 [10.30, 12.30]" in side and "ESTOI (higher is better)" in side


def test_tables_hold_the_means_in_order(page):
    first = page.part("Gap of 300 ms", "Gap of 600 ms")
    means = (("masked", "21.30"), ("a_si", "16.30"), ("av_mtl_s2s", "11.30"), ("true mel (ceiling)", "6.30"))
    places = [first.index(f"{name} {mean}") for name, mean in means]
    assert places == sorted(places)
    assert "[10.30, 12.30]" in first and "0.125" in first
    assert "PESQ wb" not in page.text  # nothing was computed
    last = page.part("Gap of 900 ms", "shown once")
    assert "n 2" in last.split("a_si")[1].split("av_mtl_s2s")[0] and "n 2" not in first  # one PESQ of three is missing


def test_changes_have_their_tables(page):
    """13.4 = 11.9 + 1.5 where sound and picture are out of step; what has no lips has no rows there."""
    table = page.part("What changes nothing", "Clip by clip").split("sound after the picture by, ms")[-1].split("noise under")[0]
    assert table.index("−80 a_si") < table.index("0 damaged") < table.index(" 80 a_si")
    assert "av_mtl_s2s 13.40" in table and table.count("masked") == 1


def test_differences_say_which_way_is_better(page):
    forth = page.part("av_mtl_s2s minus a_si", "a_si minus")
    assert "−5.00 [−5.00, −5.00] better" in forth and "+0.100 [+0.100, +0.100] better" in forth and "worse" not in forth
    back = page.part("a_si minus av_mtl_s2s", "Words and phones")
    assert "+5.00 [+5.00, +5.00] worse" in back and "better" not in back
    assert "900 ms, sound after the picture by, ms: −80" in back


def test_words_that_the_gap_touched_are_counted(page):
    """Two clips of three have times, three gaps each: "at f" is touched six times; the judge hears s for f, and by for at."""
    words = page.part("Words misheard", "Words most often")
    assert "preposition 100 % [100, 100] 100 % [100, 100] 0 % [0, 0] 0 % [0, 0] 6" in words  # damaged, a_si, system, ceiling
    assert "letter 100 %" in words and "digit" not in words
    assert "all 100 % [100, 100] 100 % [100, 100] 50 % [50, 50] 0 % [0, 0] 12" in words
    assert "f → s 6 of 6 6 of 6 6 of 6 0 of 6" in page.part("Words most often", "Phones lost") and "asr, step 7" in page.text
    phones = page.part("Phones lost or changed", "Examples")
    assert "F 100 %" in phones and "EH 0 %" in phones  # EH F, EH S: the vowel is right


def test_examples_play_the_very_files(folder, page):
    players = page.all("audio")
    assert len(players) == 10 and all("controls" in player for player in players)
    kind, data = players[0]["src"].split(";base64,")
    assert kind == "data:audio/wav" and base64.b64decode(data) == (folder / "sounds/bbaf2n-300-damaged.wav").read_bytes()
    assert players[5]["src"].startswith("data:audio/flac;base64,")
    labels = [player["aria-label"] for player in players[:5]]
    assert labels == [f"bbaf2n, {n}" for n in ("masked", "a_si", "av_mtl_s2s", "true mel (ceiling)", "original")]
    assert "Spoken: bin blue at f two now" in page.text and "Read: bin green at f two now" in page.text
    assert "Heard: bin blue at s two now" in page.text
    assert page.text.index("Spread over all") < page.text.index("Among the worst")
    assert "900 ms: 0.40 to 0.70 s and 0.90 to 1.20 s" in page.text
    assert ("mark", {}) in page.tags and report.compared("a b c", "a x c") == [("a", True), ("x", False), ("c", True)]


def pixels(address):
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))


def test_frames_are_frames(page):
    video = page.all("img")
    assert len(video) == 10 + 4 + 2 * 2  # sounds; over gap length; over two changes
    for picture_array in video:
        image = pixels(picture_array["src"])
        assert image.format == "PNG" and len(set(image.convert("L").tobytes())) > 20
        assert len(picture_array["src"]) < 160_000


def test_every_gap_is_drawn():
    """A white bar over each gap, dashes at its ends: as many columns with white at the top of the picture as gaps are long."""

    def columns(gaps_s):
        drawn = plots.spectrogram(fake_evaluations.audio(0), fake_evaluations.RATE, 0.0, gaps_s, "")
        image = np.asarray(pixels(drawn).convert("RGB"), int)
        black = image.sum(-1) < 60
        inside = black.mean(0) > 0.3  # of the axes: the sound's silence is black
        top = np.flatnonzero(black.any(1))[0] + 3
        return (image[top] > 240).all(-1)[np.flatnonzero(inside)[0] : np.flatnonzero(inside)[-1]].mean()

    none, one, two = (columns(g) for g in ([], [(0.3, 0.6)], [(0.3, 0.6), (0.9, 1.2)]))
    assert none < 0.02 and one == pytest.approx(0.2, abs=0.03) and two == pytest.approx(0.4, abs=0.05)


def test_failures_and_speakers_are_shown(page):
    assert "1 of 60 sounds could not be scored in full" in page.text
    assert "swwp2s 900 a_si pesq_nb: <No utterances> detected" in page.text
    assert "whose gap may lie in silence: 1." in page.text
    speakers = page.part("By speaker", "What could not be scored").split("ESTOI")[0]
    assert speakers.index("s1 ") < speakers.index("s2 ") < speakers.index("s10 ")
    assert "s2 21.60 [21.60, 21.60] 16.60 [16.60, 16.60] 11.60" in speakers  # 20 - 5 x place + 0.6 + 1, changes not counted


def test_what_is_too_much_is_left_out(tmp_path, monkeypatch):
    fake_evaluations.make(tmp_path / "eval", cases=fake_evaluations.CASES)
    monkeypatch.setattr(report, "MAX_EXAMPLE_BYTES", 700_000)
    page = page_of(tmp_path / "eval")
    assert len(page.all("audio")) == 5 and "1 more in the folder sounds" in page.text


def test_an_evaluation_of_nothing(tmp_path):
    """No pairs, no examples, no score at all: still a page."""
    fake_evaluations.make(tmp_path / "eval", table=[], paired=[], examples=False, reach=[])
    page = page_of(tmp_path / "eval")
    assert page.open == [] and not page.all("audio") and "Clip by clip" not in page.text


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
def test_what_is_wrong_is_named(tmp_path, change, error, says):
    folder = fake_evaluations.make(tmp_path / "eval", cases=fake_evaluations.CASES[:1], examples=False)
    change(folder)
    with pytest.raises(error, match=re.escape(says)):
        report.write_report(folder)


def rename_audio(folder, name):
    clip_io.write_audio(folder.parent / "outside.wav", fake_evaluations.audio(0), fake_evaluations.RATE)
    example = fake_evaluations.example(folder, "bbaf2n", fake_evaluations.CASES[0], ".wav", [(0.4, 0.7)])
    example["sounds"]["original"] = name
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"examples": [example]}))


# ---- words and curves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (("", 0.0), "900 ms"),
        (("gaps", 1), "900 ms in 1 gap"),
        (("gaps", 4), "900 ms in 4 gaps"),
        (("paper_gaps", 8), "about 900 ms in 1 to 8 gaps"),
        (("no_video", 1), "900 ms, sound only"),
        (("whole_clip", 1), "900 ms, lips only"),
        (("shift_ms", -80), "900 ms, late by: −80"),
        (("video_of", 2), "900 ms, late by: another speaker (2)"),
    ],
)
def test_a_case_in_words(case, says):
    family, value = case
    label = tables.case_label({"gap_ms": 900, "family": family, "value": value}, dict.fromkeys([family], "late by"))
    assert label.replace("\u00a0", " ") == says


def test_a_verdict_needs_the_whole_interval():
    entry = {"metric": "stoi", "mean": 0.1, "low": -0.1, "high": 0.2}
    assert tables.verdict(entry) == "" and tables.verdict(entry | {"low": 0.05}) == "better"
    assert tables.verdict({"metric": "gap_l1_db", "mean": 0.1, "low": 0.05, "high": 0.2}) == "worse"


def test_lines_are_told_apart_without_colour():
    """Twelve systems of a kind: no two have the same dashes and mark, nor the same colour and dashes."""
    styled = curves.styled([{"name": str(i), "kind": "system"} for i in range(10)])
    assert len({(s["dashes"], s["mark"]) for s in styled}) == len({(s["colour"], s["dashes"]) for s in styled}) == 10


def entries(cases, **systems):
    """A table of gap errors: system -> a value a case, None for no row."""
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
    """The lines of every picture that `sections` draws: {title: [(line's name, positions, means)]}."""
    seen = []

    def keep(xlabel, lines, ticks, metric, label):
        points = [[(x, e[metric]["mean"]) for x, e in sorted(line.points.items()) if e] for line in lines]
        seen.append((ticks, [(line.name, *zip(*of)) for line, of in zip(lines, points, strict=True)]))
        return "data:image/png;base64,"

    monkeypatch.setattr(curves, "_curve", keep)
    made = curves.sections(summary, curves.styled(summary["systems"]), "")
    return dict(zip([s["title"] for s in made], seen, strict=True)), made


def test_what_a_change_cannot_reach_is_a_level_line(monkeypatch):
    cases = cases_of((900,), (900, "shift_ms", -80), (900, "shift_ms", 40))
    systems = [{"name": "interpolation", "kind": "interpolation"}, {"name": "av", "kind": "system"}]
    summary = {"cases": cases, "systems": systems, "families": {"shift_ms": "late by"}}
    video, _ = drawn(monkeypatch, summary | {"table": entries(cases, interpolation=(9, None, None), av=(5, 7, 6))})
    ((title, (ticks, lines)),) = video.items()  # one gap length is no curve
    assert title == "Late by; gap of 900 ms" and ticks == {-80: "−80", 0: "0", 40: "40"}
    assert lines == [("interpolation", (-80, 0, 40), (9, 9, 9)), ("av", (-80, 0, 40), (7, 5, 6))]


def test_streams_are_lines_over_gap_length(monkeypatch):
    cases = cases_of((300,), (300, "no_video", 1), (900,), (900, "no_video", 1), (3000, "whole_clip", 1))
    systems = [{"name": "masked", "kind": "masked"}, {"name": "av", "kind": "system"}]
    summary = {"cases": cases, "systems": systems, "families": {"no_video": "no lips", "whole_clip": "no sound"}}
    table = entries(cases, masked=(30, None, 31, None, 32), av=(5, 6, 7, 8, 9))
    video, made = drawn(monkeypatch, summary | {"table": table})
    ((title, (ticks, lines)),) = video.items()
    assert title == "Over the length of the gap, by what is heard and seen" and list(ticks) == [300, 900, 3000]
    assert lines == [  # the damaged line is far above all others: named, not drawn
        ("av", (300, 900), (5, 7)), ("av, sound only", (300, 900), (6, 8)), ("av, lips only", (3000,), (9,)),
    ]  # fmt: skip
    assert made[0]["pictures"][0]["above"] == "masked"
