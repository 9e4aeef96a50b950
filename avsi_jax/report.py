"""clips.csv, summary.json and sounds of an evaluation -> one report.html that needs nothing else; knows no model.

The page loads nothing from anywhere (its content security policy forbids it): pictures and sounds are in it as data URIs.
Dashes as well as colours tell the systems apart. What was measured, and how, is evaluate's and metrics' business.
"""

from __future__ import annotations

import base64
import collections
import csv
import difflib
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from avsi_jax import media, metrics

STYLES = {  # kind, in the order of every table -> colour (Okabe & Ito 2008), dashes in line widths
    "damaged": ("#6b6b6b", (1, 1.5)), "interpolation": ("#e69f00", (4, 2)), "baseline": ("#56b4e9", (7, 2)),
    "system": ("#0072b2", ()), "other_video": ("#cc79a7", (3, 1.5, 1, 1.5)), "ceiling": ("#009e73", (8, 2, 1, 2)),
}  # fmt: skip
SPARE_COLOURS = ("#d55e00", "#000000", "#8c6d1f", "#7a4fa3")  # for further systems of a kind
MEDIA_TYPES = {".wav": "audio/wav", ".flac": "audio/flac"}
MAX_EXAMPLE_BYTES = 9_000_000  # of pictures and sounds in the page
MAX_FAILURES = 200  # listed one by one
COLUMNS = set("clip_id speaker gap_ms in_words system kind reason".split())  # that every clips.csv has
KEYS = set("title system protocol split command date metric_rate num_clips systems gap_ms table paired".split())


class Metric(NamedTuple):
    label: str
    unit: str
    digits: int
    lower_is_better: bool
    meaning: str


GAP_ERROR = """mean distance between the log-mels of the sound and of the recording in the gap alone: 64 mel bands at 8 kHz,
floor -80 dB, over the frames (40 ms, every 20 ms) whose centre lies in the gap. One front end for every system."""
BEFORE = "the same for the log-mel that the network predicts, in the bands of its own preset, before any sound is made of it."
PESQ_WB = "ITU-T P.862.2, whole clip at 16 kHz; 1.0 to 4.6. Another scale than PESQ nb: the two are not to be compared."
READ_CER = "character error rate of what the network's text head reads, against the words spoken; 0 is right, may pass 1."
METRICS = {
    "gap_l1_db": Metric("Gap error", "dB", 2, True, GAP_ERROR),
    "gap_l1_mel_db": Metric("Mel gap error", "dB", 2, True, BEFORE),
    "pesq_nb": Metric("PESQ nb", "MOS-LQO", 2, False, "ITU-T P.862 mapped by P.862.1, whole clip at 8 kHz; 1.0 to 4.5."),
    "pesq_wb": Metric("PESQ wb", "MOS-LQO", 2, False, PESQ_WB),
    "stoi": Metric("STOI", "", 3, False, "short-time objective intelligibility, whole clip (Taal et al. 2011); up to 1."),
    "estoi": Metric("ESTOI", "", 3, False, "extended STOI, whole clip (Jensen and Taal 2016); up to 1."),
    "cer": Metric("Read CER", "", 3, True, READ_CER),
    "per": Metric("Read PER", "", 3, True, READ_CER.replace("character", "phone")),
}
CURVES = ("gap_l1_db", "stoi", "estoi", "pesq_nb", "pesq_wb")
SPEAKER_METRICS = ("gap_l1_db", "estoi")


def write_report(folder) -> Path:
    """Writes folder/report.html from clips.csv, summary.json and sounds/; returns its path.

    Raises FileNotFoundError, or ValueError naming what a file lacks.
    """
    import jinja2

    folder = Path(folder)
    if missing := [name for name in ("clips.csv", "summary.json") if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder}: found no {' and no '.join(missing)}; expected the results of avsi-evaluate")
    summary, rows = _read_summary(folder / "summary.json"), _read_rows(folder / "clips.csv")
    systems = _styled(summary["systems"])
    examples, left_out = _examples(folder, summary.get("examples", []), systems, rows)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "thousands": lambda n: f"{n:,}"}
    page = environment.from_string(TEMPLATE).render(
        summary=summary,
        facts={k: summary[k] for k in ("seconds", "versions", "runs") if summary.get(k)},
        systems=systems,
        metrics={m: METRICS[m] for m in METRICS if any(cell["metric"] == m for cell in summary["table"])},
        tables=_tables(summary, systems),
        curves=_curves(summary, systems),
        pairs=_pairs(summary),
        examples=examples,
        left_out=left_out,
        speakers=_speakers(rows, systems),
        num_rows=len(rows),
        failures=(failures := [row for row in rows if row["reason"]]),
        listed=failures[:MAX_FAILURES],
        without_words=len({row["clip_id"] for row in rows if row["in_words"].lower() not in ("true", "1")}),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _read_summary(path: Path) -> dict:
    summary = json.loads(path.read_text(encoding="utf-8"))
    if missing := sorted(KEYS - set(summary)):
        raise ValueError(f"{path}: lacks {', '.join(missing)}; run avsi-evaluate again")
    if unknown := {s["kind"] for s in summary["systems"]} - set(STYLES):
        raise ValueError(f"{path}: found kind {', '.join(sorted(unknown))}, expected {', '.join(STYLES)}")
    return summary


def _read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := sorted(COLUMNS - set(reader.fieldnames or ())):
            raise ValueError(f"{path}: lacks the columns {', '.join(missing)}; run avsi-evaluate again")
        return list(reader)


def _styled(systems: list[dict]) -> list[dict]:
    """Systems in the fixed order, each with the colour and dashes of its lines."""
    spare, taken, styled = iter(SPARE_COLOURS * len(systems)), set(), []
    for system in sorted(systems, key=lambda s: list(STYLES).index(s["kind"])):
        colour, dashes = STYLES[system["kind"]]
        styled.append({**system, "colour": next(spare) if colour in taken else colour, "dashes": dashes})
        taken.add(colour)
    return styled


def _number(value, digits: int, sign: bool = False) -> str:
    """A number as it is read: a true minus, a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def _tables(summary: dict, systems: list[dict]) -> list[dict]:
    """One table a gap length, one row a system: [{"title", "first", "rows": [{"label", "kind", "n", "cells"}]}]."""
    found: dict = collections.defaultdict(dict)
    for entry in summary["table"]:
        found[entry["gap_ms"], entry["system"]][entry["metric"]] = entry
    return [
        _table(f"Gap of {g} ms", "System", [(s["name"], s["kind"], found.get((g, s["name"]), {})) for s in systems])
        for g in summary["gap_ms"]
    ]


def _pairs(summary: dict) -> list[dict]:
    """One table a pair of systems, one row a gap length; as of `_tables`, the cells with "says"."""
    pairs: dict = collections.defaultdict(lambda: collections.defaultdict(dict))
    for entry in summary["paired"]:
        pairs[entry["a"], entry["b"]][entry["gap_ms"]][entry["metric"]] = {**entry, "says": _verdict(entry)}
    rows = {names: [(gap_ms, "", cells[gap_ms]) for gap_ms in sorted(cells)] for names, cells in pairs.items()}
    return [_table(f"{a} minus {b}", "Gap, ms", rows[a, b]) for a, b in rows]


def _table(title: str, first: str, rows: list[tuple]) -> dict:
    """Rows of (label, kind, metric -> entry); n is the largest of a row, entries with fewer say so in the page."""
    named = [{"label": r[0], "kind": r[1], "cells": r[2], "n": max((e["n"] for e in r[2].values()), default=0)} for r in rows]
    return {"title": title, "first": first, "rows": named}


def _verdict(entry: dict) -> str:
    """'better' or 'worse' of a against b where the interval leaves 0 out, else ''."""
    if entry["low"] <= 0 <= entry["high"] or entry["metric"] not in METRICS:
        return ""
    return "better" if (entry["mean"] < 0) == METRICS[entry["metric"]].lower_is_better else "worse"


def _speakers(rows: list[dict], systems: list[dict]) -> list[dict]:
    """Means over all gap lengths for each speaker: [{"label", "digits", "rows": [(speaker, clips, means)]}]."""
    values, clips = collections.defaultdict(list), collections.defaultdict(set)
    for row in rows:
        clips[row["speaker"]].add(row["clip_id"])
        for metric in SPEAKER_METRICS:
            if not math.isnan(value := metrics.number(row.get(metric))):
                values[metric, row["speaker"], row["system"]].append(value)
    mean = lambda *key: float(np.mean(values[key])) if key in values else None
    order = sorted(clips, key=lambda s: (len(s), s))  # s2 before s10
    return [
        METRICS[m]._asdict() | {"rows": [(s, len(clips[s]), [mean(m, s, system["name"]) for system in systems]) for s in order]}
        for m in SPEAKER_METRICS
    ]


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _picture(figure, dpi: int) -> str:
    """A matplotlib figure as the data URI of a PNG; 128 colours, which is a third of the bytes."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return _data_uri(small.getvalue(), "image/png")


def _curves(summary: dict, systems: list[dict]) -> list[dict]:
    """One picture a metric: means over gap length with interval bands, a line a system."""
    from matplotlib.figure import Figure

    curves = []
    for metric in CURVES:
        entries = {(e["system"], e["gap_ms"]): e for e in summary["table"] if e["metric"] == metric}
        if not entries:
            continue
        figure = Figure(figsize=(4.6, 3.3), layout="constrained")
        ylabel = ", ".join(filter(None, METRICS[metric][:2]))
        axes = figure.add_subplot(xlabel="gap, ms", ylabel=ylabel, xticks=summary["gap_ms"])
        for system in systems:
            _curve(axes, [entries[system["name"], g] for g in summary["gap_ms"] if (system["name"], g) in entries], system)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        curves.append({"metric": metric, "picture": _picture(figure, 160)})
    return curves


def _curve(axes, points: list[dict], system: dict) -> None:
    x, mean, low, high = ([p[k] for p in points] for k in ("gap_ms", "mean", "low", "high"))
    width = 2.4 if system["kind"] == "system" else 1.5
    line = (0, system["dashes"]) if system["dashes"] else "solid"
    axes.plot(x, mean, color=system["colour"], linestyle=line, linewidth=width, marker="o", markersize=3.5)
    axes.fill_between(x, low, high, color=system["colour"], alpha=0.18, linewidth=0)
    axes.vlines(x, low, high, color=system["colour"], linewidth=0.8)  # what is left of the band at a single gap length


def _spectrogram(sound: np.ndarray, rate: int, top_db: float, gap_s: tuple[float, float]) -> str:
    """Sound (N,) drawn over 80 dB below top_db, the gap's borders marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 2.0), layout="constrained")
    axes = figure.add_subplot(ylabel="kHz", xlabel="s")
    extent = (0, len(sound) / rate, 0, rate / 2000)
    image = {"origin": "lower", "aspect": "auto", "cmap": "magma", "vmin": top_db - 80, "vmax": top_db, "extent": extent}
    axes.imshow(_decibel(sound, rate), **image)
    for border in gap_s:
        axes.axvline(border, color="white", linewidth=1.1, linestyle=(0, (4, 2)))
    axes.tick_params(labelsize=8)
    return _picture(figure, 120)


def _decibel(sound: np.ndarray, rate: int) -> np.ndarray:
    """(N,) -> (bins, frames) in dB: 32 ms Hann windows every 8 ms."""
    from scipy import signal

    spectrum = signal.stft(sound, rate, nperseg=rate * 32 // 1000, noverlap=rate * 24 // 1000)[2]
    return 20 * np.log10(np.abs(spectrum) + 1e-8)


def _examples(folder: Path, examples: list[dict], systems: list[dict], rows: list[dict]) -> tuple[list[dict], int]:
    """Examples with pictures and sounds in them, and how many found no room."""
    scores = {(row["clip_id"], int(row["gap_ms"]), row["system"]): row for row in rows}
    shown, size = [], 0
    for example in examples:
        cards = _cards(folder, example, systems, scores)
        size += sum(len(card["picture"]) + len(card["sound"]) for card in cards)
        if size > MAX_EXAMPLE_BYTES:
            break
        shown.append({**example, "cards": cards})
    return shown, len(examples) - len(shown)


def _cards(folder: Path, example: dict, systems: list[dict], scores: dict) -> list[dict]:
    """What is shown of each sound of an example: damaged first, the original last."""
    kinds = {"damaged": "damaged", **{s["name"]: s["kind"] for s in systems}, "original": ""}
    decoded = {name: _decoded(folder, example["sounds"][name]) for name in kinds if name in example["sounds"]}
    top_db = _decibel(*decoded["original"][:2]).max()
    cards = []
    for name, (sound, rate, uri) in decoded.items():
        row = scores.get((example["clip_id"], example["gap_ms"], name), {})
        shown = [f"{m.label} {_number(float(row[k]), m.digits)}" for k, m in METRICS.items() if row.get(k)]
        said = example["said"].get(name, "")
        said = _compared(example.get("phones", "") if said.isupper() else example["text"], said)
        picture = _spectrogram(sound, rate, top_db, (example["start_s"], example["end_s"]))
        cards.append({"name": name, "kind": kinds[name], "picture": picture, "sound": uri, "scores": shown, "said": said})
    return cards


def _decoded(folder: Path, name: str) -> tuple[np.ndarray, int, str]:
    """(sound (N,), rate, data URI of the file) of a sound of the evaluation."""
    path = folder / name
    if path.suffix not in MEDIA_TYPES or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"summary.json names the sound {name!r}; expected a .wav or .flac inside {folder}")
    sound = media.read_clip(path).sound
    return media.mono(sound.samples), sound.rate, _data_uri(path.read_bytes(), MEDIA_TYPES[path.suffix])


def _compared(truth: str, said: str) -> list[tuple[str, bool]]:
    """Words of `said`, each with whether it is one of the truth in its place."""
    words = said.split()
    blocks = difflib.SequenceMatcher(None, truth.split(), words, autojunk=False).get_matching_blocks()
    right = {i for block in blocks for i in range(block.b, block.b + block.size)}
    return [(word, i in right) for i, word in enumerate(words)]


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<title>{{ summary.title }}</title>
<style>
:root { color-scheme: light; --line: #d9dde3; --soft: #f4f6f8; --dim: #59626d; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1a1d21; background: #fff }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .6rem 0 } h3 { font-size: 1rem; margin: 1.3rem 0 .4rem }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-top: 2px solid var(--line); padding-top: 1rem }
p, dd { max-width: 46rem } .dim, small { color: var(--dim) } summary { cursor: pointer } dt { font-weight: 600 }
code, pre { font: .85rem/1.4 ui-monospace, monospace; background: var(--soft); overflow-wrap: anywhere; white-space: pre-wrap }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem } .wide { overflow-x: auto }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
td, i { white-space: nowrap } thead th { vertical-align: bottom } .reasons td { text-align: left; white-space: normal }
th:first-child { position: sticky; left: 0; background: #fff; text-align: left; font-weight: 500 }
td small, thead small { display: block; font-weight: 400 }
tr.system th, tr.system td { background: #e9f2fa; font-weight: 650 }
.better, .worse { display: inline-block; border-radius: .3rem; padding: 0 .35rem; font-size: .78rem }
.better { background: #d7e8f5; color: #00456d } .worse, mark { background: #fbe3d3; color: #7d3300 }
.curves, .cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.cards { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)) }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem } .card.system { border: 2px solid #0072b2 }
.card p { margin: .3rem 0 0; font-size: .88rem } figure, dd { margin: 0 } mark { text-decoration: underline wavy #a04000 }
img { max-width: 100%; height: auto; display: block } audio { width: 100%; height: 2.4rem; margin-top: .3rem }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none } .legend svg { margin-right: .4rem }
</style>
</head>
<body>
{% macro grid(table, sign=false) %}<h3>{{ table.title }}</h3>
<div class="wide"><table><thead><tr><th scope="col">{{ table.first }}</th>{% for m in metrics.values() %}
<th scope="col">{{ m.label }}&nbsp;{{ "↓" if m.lower_is_better else "↑" }}<small>{{ m.unit }}</small></th>
{% endfor %}<th scope="col">n</th></tr></thead><tbody>
{% for row in table.rows %}<tr class="{{ row.kind }}"><th scope="row">{{ row.label }}</th>
{% for name, m in metrics.items() %}{% if name in row.cells %}{% set e = row.cells[name] %}
<td>{{ e.mean|number(m.digits, sign) }}<small>[{{ e.low|number(m.digits, sign) }}, {{ e.high|number(m.digits, sign) }}]</small>
{% if e.says %}<span class="{{ e.says }}">{{ e.says }}</span>{% endif %}
{% if e.n < row.n %}<small>n {{ e.n|thousands }}</small>{% endif %}</td>{% else %}<td>–</td>{% endif %}{% endfor %}
<td>{{ row.n|thousands }}</td></tr>
{% endfor %}</tbody></table></div>{% endmacro %}
<h1>{{ summary.title }}</h1>
<p>System <b>{{ summary.system }}</b>, protocol <b>{{ summary.protocol }}</b>, split <b>{{ summary.split }}</b>,
<b>{{ summary.num_clips|thousands }}</b> clips, scored at {{ summary.metric_rate|thousands }} Hz, <i>{{ summary.date }}</i>.
{% if failures %}{{ failures|length|thousands }} of {{ num_rows|thousands }} sounds could not be scored in full:
<a href="#failures">which, and why</a>.{% else %}Every sound was scored.{% endif %}</p>
{% if summary.command %}<p><code>{{ summary.command }}</code></p>{% endif %}
{% if facts %}<details><summary>Times, versions and runs</summary>
{% for name, fact in facts.items() %}<h3>{{ name }}</h3><pre>{{ fact|tojson(indent=1) }}</pre>{% endfor %}</details>{% endif %}
<h2>Results by gap length</h2>
<p>Mean over clips, below it the 95 % interval. ↓ lower is better, ↑ higher is better.
<a href="#meaning">What each number means.</a></p>
{% for table in tables %}{{ grid(table) }}{% endfor %}
{% if curves %}<h2>Curves over gap length</h2>
<ul class="legend">{% for s in systems %}<li><svg width="44" height="10" aria-hidden="true"><line x2="44" y1="5" y2="5"
 stroke="{{ s.colour }}" stroke-width="{{ 3 if s.kind == "system" else 2 }}" stroke-dasharray="{% for d in s.dashes %}
{{ 2 * d }} {% endfor %}"/></svg>{{ s.name }}</li>{% endfor %}</ul>
<div class="curves">{% for curve in curves %}{% set m = metrics[curve.metric] %}
<figure><figcaption>{{ m.label }}, {{ "lower" if m.lower_is_better else "higher" }} is better</figcaption>
<img src="{{ curve.picture }}" alt="{{ m.label }} over gap length, a line a system; its numbers are in the tables"></figure>
{% endfor %}</div>{% endif %}
{% if pairs %}<h2>Paired differences</h2>
<p>Clip by clip on the same gaps. Better or worse (the first of the two) is said only where the 95 % interval leaves out 0;
without a mark they are not told apart.</p>
{% for table in pairs %}{{ grid(table, true) }}{% endfor %}{% endif %}
{% if examples %}<h2>Examples</h2>
<p>White dashes mark the gap. Colours span the 80 dB below the loudest point of the recording. Words or phones
that were misread are <mark>marked</mark>.</p>{% endif %}
{% for example in examples %}
<h3>{{ example.clip_id }}, gap {{ example.gap_ms }} ms, {{ example.start_s|number(2) }} to {{ example.end_s|number(2) }} s</h3>
{% if example.text %}<p>Spoken: <b>{{ example.text }}</b></p>{% endif %}
<div class="cards">{% for card in example.cards %}<div class="card {{ card.kind }}"><b>{{ card.name }}</b>
<img src="{{ card.picture }}" alt="Spectrogram of {{ card.name }}" loading="lazy">
<audio controls preload="none" src="{{ card.sound }}" aria-label="{{ example.clip_id }}, {{ card.name }}"></audio>
{% if card.said %}<p>Read as: {% for word, right in card.said %}
{% if right %}{{ word }}{% else %}<mark>{{ word }}</mark>{% endif %}{{ " " }}{% endfor %}</p>{% endif %}
<p class="dim">{{ card.scores|join(" · ") }}</p></div>{% endfor %}</div>
{% endfor %}
{% if left_out %}<p>{{ left_out }} more in the folder sounds beside this page, left out to keep it small.</p>{% endif %}
<h2>By speaker</h2>
<details><summary>Means over all gap lengths</summary>{% for table in speakers %}<h3>{{ table.label }}</h3>
<div class="wide"><table><thead><tr><th scope="col">Speaker</th>{% for s in systems %}<th scope="col">{{ s.name }}</th>
{% endfor %}<th scope="col">clips</th></tr></thead><tbody>
{% for speaker, clips, means in table.rows %}<tr><th scope="row">{{ speaker }}</th>
{% for mean in means %}<td>{{ mean|number(table.digits) }}</td>{% endfor %}<td>{{ clips }}</td></tr>{% endfor %}
</tbody></table></div>{% endfor %}</details>
<h2 id="failures">What could not be scored</h2>
{% if failures %}<p>A mean is over the values there are, and n says how many.</p>
<div class="wide"><table class="reasons"><thead><tr><th>Clip</th><td>Gap, ms</td><td>System</td><td>Reason</td></tr></thead>
{% for row in listed %}<tr><th scope="row">{{ row.clip_id }}</th><td>{{ row.gap_ms }}</td>
<td>{{ row.system }}</td><td>{{ row.reason }}</td></tr>{% endfor %}</table></div>
{% if failures|length > listed|length %}<p>{{ (failures|length - listed|length)|thousands }} more in clips.csv.</p>{% endif %}
{% else %}<p>Nothing: every sound has its scores.</p>{% endif %}
<h2 id="meaning">What the numbers mean</h2>
<dl>{% for m in metrics.values() %}<dt>{{ m.label }}</dt><dd>{{ m.meaning }}</dd>{% endfor %}
<dt>Reference and rate</dt><dd>Everything is scored against the recording itself, at {{ summary.metric_rate|thousands }} Hz.
Whole-clip scores hold the untouched sound around the gap, too; the damaged row shows what that alone is worth.</dd>
<dt>Intervals</dt><dd>95 % percentile bootstrap
{{ "over speakers, then over the clips of each" if summary.by_speaker else "over clips" }}.</dd>
<dt>Gaps</dt><dd>One gap a clip and length, the same for every system.
{% if without_words %}{{ without_words|thousands }} clips have no word times: their gap may lie in silence.{% endif %}</dd></dl>
</body>
</html>
"""
