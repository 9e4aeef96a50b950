"""The report of a made-up evaluation: two networks and their neighbours, three gap lengths, two examples."""

import base64
import csv
import html
import html.parser
import json
import re

import numpy as np
import pytest

from avsi_jax import media, metrics, report

SYSTEMS = [  # not in the order of the tables
    {"name": "av_mtl_s2s", "kind": "system"},
    {"name": "damaged", "kind": "damaged"},
    {"name": "a_si", "kind": "baseline"},
    {"name": "true mel (ceiling)", "kind": "ceiling"},
]
GAPS_MS = (300, 600, 900)
CLIPS = [("bbaf2n", "s1"), ("lgazzp", "s2"), ("swwp2s", "s10")]
WORDS, SAID = "bin blue at f two now", "bin green at f two now"
RATE = 16_000


def rows():
    """What evaluate writes to clips.csv; errors grow with the gap and shrink from damaged to ceiling."""
    order = ["damaged", "a_si", "av_mtl_s2s", "true mel (ceiling)"]
    kinds = {system["name"]: system["kind"] for system in SYSTEMS}
    for clip, (clip_id, speaker) in enumerate(CLIPS):
        for gap_ms in GAPS_MS:
            for place, name in enumerate(order):
                bad = clip_id == "swwp2s" and gap_ms == 900 and name == "a_si"
                yield {
                    "clip_id": clip_id, "speaker": speaker, "gap_ms": gap_ms, "start_s": 0.4, "end_s": 0.4 + gap_ms / 1000,
                    "in_words": clip_id != "lgazzp", "system": name, "kind": kinds[name],
                    "gap_l1_db": 20 - 5 * place + gap_ms / 1000 + clip, "gap_l1_mel_db": "" if name == "damaged" else 7.5,
                    "pesq_nb": "" if bad else 1.5 + 0.7 * place - gap_ms / 2000, "pesq_wb": "",
                    "stoi": 0.6 + 0.1 * place - gap_ms / 5000, "estoi": 0.5 + 0.1 * place - gap_ms / 5000 - 0.01 * clip,
                    "cer": 0.125 if name == "av_mtl_s2s" else "", "said": SAID if name == "av_mtl_s2s" else "",
                    "text": WORDS, "reason": "pesq_nb: <No utterances> detected" if bad else "",
                }  # fmt: skip


def sound(seed, seconds=1.5):
    t = np.arange(round(RATE * seconds)) / RATE
    x = sum(np.sin(2 * np.pi * 130 * k * t) / k for k in range(1, 20)) * np.clip(np.sin(12 * t), 0, None)
    return (0.1 * x + 0.003 * np.random.default_rng(seed).standard_normal(t.size)).astype(np.float32)


def example(folder, clip_id, gap_ms, suffix):
    names = {"original": "original", **{s["name"]: s["kind"] for s in SYSTEMS}}
    sounds = {name: f"sounds/{clip_id}-{gap_ms}-{stem}{suffix}" for name, stem in names.items()}
    for i, (name, path) in enumerate(sounds.items()):
        x = sound(i)
        if name == "damaged":
            x[int(0.4 * RATE) : int((0.4 + gap_ms / 1000) * RATE)] = 0
        media.write_sound(folder / path, x, RATE)
    said = {"av_mtl_s2s": SAID}
    end_s = 0.4 + gap_ms / 1000
    return {"clip_id": clip_id, "gap_ms": gap_ms, "start_s": 0.4, "end_s": end_s, "text": WORDS, "said": said, "sounds": sounds}


def make_evaluation(folder, **changed):
    """A folder as evaluate leaves it, before the report."""
    (folder / "sounds").mkdir(parents=True)
    table = list(rows())
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    summary = {
        "title": "av_mtl_s2s on test <unseen>", "system": "av_mtl_s2s", "protocol": "waveform", "split": "test",
        "command": "avsi-evaluate --workdir=runs/1 --config.split=test", "date": "2025-06-01", "seconds": {"all": 12.5},
        "versions": {"pesq": "0.0.4"}, "metric_rate": 8000, "num_clips": 3, "systems": SYSTEMS, "gap_ms": list(GAPS_MS),
        "examples": [example(folder, "bbaf2n", 300, ".wav"), example(folder, "lgazzp", 900, ".flac")],
        **metrics.summarise(table, tuple(report.METRICS), [("av_mtl_s2s", "a_si"), ("a_si", "av_mtl_s2s")]),
    } | changed  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_evaluation(tmp_path_factory.mktemp("report") / "eval")
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
    assert any("default-src 'none'" in a.get("content", "") for a in page.all("meta"))
    assert (folder / "report.html").stat().st_size < 2_500_000


def test_head_says_what_was_run(page):
    for words in (
        "av_mtl_s2s on test <unseen>",
        "waveform",
        "3 clips",
        "2025-06-01",
        "8,000 Hz",
        "--config.split=test",
        "0.0.4",
    ):
        assert words in page.text, words


def test_tables_hold_the_means_in_order(page):
    """At 300 ms, gap errors are 20 - 5 x place + 0.3 + (0, 1, 2): means 21.3, 16.3, 11.3, 6.3."""
    first = page.text.split("Gap of 300 ms")[1].split("Gap of 600 ms")[0]
    places = [
        first.index(f"{name} {mean}")
        for name, mean in (("damaged", "21.30"), ("a_si", "16.30"), ("av_mtl_s2s", "11.30"), ("true mel (ceiling)", "6.30"))
    ]
    assert places == sorted(places)
    assert "[10.30, 12.30]" in first and "0.125" in first
    assert "PESQ wb" not in page.text  # nothing was computed
    last = page.text.split("Gap of 900 ms")[1].split("Curves")[0]
    assert "n 2" in last.split("a_si")[1].split("av_mtl_s2s")[0] and "n 2" not in first  # one PESQ of three is missing


def test_differences_say_which_way_is_better(page):
    forth = page.text.split("av_mtl_s2s minus a_si")[1].split("a_si minus")[0]
    assert "−5.00 [−5.00, −5.00] better" in forth and "+0.100 [+0.100, +0.100] better" in forth and "worse" not in forth
    back = page.text.split("a_si minus av_mtl_s2s")[1].split("Examples")[0]
    assert "+5.00 [+5.00, +5.00] worse" in back and "better" not in back
    assert report._verdict({"metric": "stoi", "mean": 0.1, "low": -0.1, "high": 0.2}) == ""


def test_examples_play_the_very_files(folder, page):
    players = page.all("audio")
    assert len(players) == 10 and all("controls" in player for player in players)
    assert len(page.all("img")) == 10 + 4  # and four curves
    kind, data = players[0]["src"].split(";base64,")
    assert kind == "data:audio/wav" and base64.b64decode(data) == (folder / "sounds/bbaf2n-300-damaged.wav").read_bytes()
    assert players[5]["src"].startswith("data:audio/flac;base64,")
    labels = [player["aria-label"] for player in players[:5]]
    assert labels == [f"bbaf2n, {n}" for n in ("damaged", "a_si", "av_mtl_s2s", "true mel (ceiling)", "original")]
    assert "Spoken: bin blue at f two now" in page.text and "Read as: bin green at f two now" in page.text
    assert ("mark", {}) in page.tags and report._compared("a b c", "a x c") == [("a", True), ("x", False), ("c", True)]


def test_pictures_are_pictures(page):
    import io

    from PIL import Image

    for picture in page.all("img"):
        data = base64.b64decode(picture["src"].removeprefix("data:image/png;base64,"))
        image = Image.open(io.BytesIO(data))
        assert image.format == "PNG" and len(set(image.convert("L").tobytes())) > 20
        assert picture["alt"] and len(data) < 120_000


def test_failures_and_speakers_are_shown(page):
    assert "1 of 36 sounds could not be scored in full" in page.text
    assert "swwp2s 900 a_si pesq_nb: <No utterances> detected" in page.text
    assert "1 clips have no word times" in page.text
    speakers = page.text.split("Means over all gap lengths")[1]
    assert speakers.index("s1 ") < speakers.index("s2 ") < speakers.index("s10 ")
    assert "s2 21.60 16.60 11.60 6.60 1" in speakers  # 20 - 5 x place + 0.6 + 1


def test_what_is_too_much_is_left_out(tmp_path, monkeypatch):
    make_evaluation(tmp_path / "eval")
    monkeypatch.setattr(report, "MAX_EXAMPLE_BYTES", 700_000)
    page = Page(report.write_report(tmp_path / "eval").read_text(encoding="utf-8"))
    assert len(page.all("audio")) == 5 and "1 more in the folder sounds" in page.text


def test_an_evaluation_of_nothing(tmp_path):
    """No pairs, no examples, no score at all: still a page."""
    make_evaluation(tmp_path / "eval", table=[], paired=[], examples=[])
    page = Page(report.write_report(tmp_path / "eval").read_text(encoding="utf-8"))
    assert page.open == [] and not page.all("audio") and "Paired differences" not in page.text


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda f: (f / "clips.csv").unlink(), FileNotFoundError, "found no clips.csv; expected the results of avsi-evaluate"),
        (lambda f: (f / "clips.csv").write_text("clip_id,speaker\n"), ValueError, "lacks the columns gap_ms, in_words"),
        (lambda f: (f / "summary.json").write_text('{"title": "x"}'), ValueError, "lacks command, date"),
        (lambda f: rename_sound(f, "../outside.wav"), ValueError, "expected a .wav or .flac inside"),
        (lambda f: rename_sound(f, "summary.json"), ValueError, "expected a .wav or .flac inside"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, error, says):
    folder = make_evaluation(tmp_path / "eval")
    change(folder)
    with pytest.raises(error, match=re.escape(says)):
        report.write_report(folder)


def rename_sound(folder, name):
    media.write_sound(folder.parent / "outside.wav", sound(0), RATE)
    summary = json.loads((folder / "summary.json").read_text())
    summary["examples"][0]["sounds"]["original"] = name
    (folder / "summary.json").write_text(json.dumps(summary))
