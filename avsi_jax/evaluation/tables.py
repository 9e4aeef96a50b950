"""clips.csv and summary.json of an evaluation -> the tables of its report, as numbers and as text; knows no model.

A table is {"title", "said", "first", "columns", "rows"}: columns {"key", "label", "unit", "better", "kind"}, rows {"group",
"label", "kind", "cells", "n"}, and under the key of its column a cell {"text", "interval", "says", "few"}. Page and LaTeX are
written from the same tables. What was measured, and how, is evaluate's and metrics' business.
"""

from __future__ import annotations

import collections
import csv
import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

KINDS = ("masked", "interpolation", "baseline", "system", "other_video", "oracle_mel")  # in the order of every table
REFERENCES = ("masked", "interpolation", "oracle_mel")  # what no system has a part in
COLUMNS = set("clip_id speaker case gap_ms gaps_s in_words system kind reason".split())  # that every clips.csv has
KEYS = set(
    """title system protocol protocol_said split suite command date metric_rate num_clips systems gap_ms cases families
    table paired reach""".split()
)
NOTHING = "–"


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
JUDGED = """words that a recogniser, trained on clean sound, hears in the restored sound, against the words spoken, over the words
that the gap touches; 0 is right."""
READ_CER = "character error rate of what the network's text head reads, against the words spoken; 0 is right, may pass 1."
METRICS = {
    "gap_l1_db": Metric("Gap error", "dB", 2, True, GAP_ERROR),
    "gap_l1_mel_db": Metric("Mel gap error", "dB", 2, True, BEFORE),
    "pesq_nb": Metric("PESQ nb", "MOS-LQO", 2, False, "ITU-T P.862 mapped by P.862.1, whole clip at 8 kHz; 1.0 to 4.5."),
    "pesq_wb": Metric("PESQ wb", "MOS-LQO", 2, False, PESQ_WB),
    "stoi": Metric("STOI", "", 3, False, "short-time objective intelligibility, whole clip (Taal et al. 2011); up to 1."),
    "estoi": Metric("ESTOI", "", 3, False, "extended STOI, whole clip (Jensen and Taal 2016); up to 1."),
    "stoi_gap": Metric("STOI, gap", "", 3, False, "STOI of the gap and 200 ms on both sides of it."),
    "wer_gap": Metric("Gap WER", "", 3, True, JUDGED),
    "cer": Metric("Read CER", "", 3, True, READ_CER),
    "per": Metric("Read PER", "", 3, True, READ_CER.replace("character", "phone")),
}
HEADLINE = ("gap_l1_db", "estoi", "pesq_nb", "wer_gap")
SPEAKER_METRICS = ("gap_l1_db", "estoi")

# What the value of a case is called; None is the case without the change.
VALUES = {
    "noise_db": {None: "none"},
    "video_of": {None: "own", 1: "same speaker (1)", 2: "another speaker (2)"},
    "no_video": {None: "sound and lips", 1: "sound only"},
    "whole_clip": {1: "lips only"},
    "paper_gaps": {8: "1 to 8"},
}


# ---- reading -------------------------------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    folder: Path
    summary: dict
    rows: list[dict[str, str]]  # of clips.csv


def read(folder: str | Path) -> Evaluation:
    """What avsi-evaluate left in a folder. FileNotFoundError, or ValueError naming what a file lacks."""
    folder = Path(folder)
    if missing := [name for name in ("clips.csv", "summary.json") if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder}: found no {' and no '.join(missing)}; expected the results of avsi-evaluate")
    return Evaluation(folder, _read_summary(folder / "summary.json"), _read_rows(folder / "clips.csv"))


def _read_summary(path: Path) -> dict:
    summary = json.loads(path.read_text(encoding="utf-8"))
    if missing := sorted(KEYS - set(summary)):
        raise ValueError(f"{path}: lacks {', '.join(missing)}; run avsi-evaluate again")
    if unknown := {s["kind"] for s in summary["systems"]} - set(KINDS):
        raise ValueError(f"{path}: found kind {', '.join(sorted(unknown))}, expected {', '.join(KINDS)}")
    return summary | {"systems": in_order(summary["systems"])}


def in_order(systems: list[dict]) -> list[dict]:
    return sorted(systems, key=lambda s: KINDS.index(s["kind"]))


def _read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := sorted(COLUMNS - set(reader.fieldnames or ())):
            raise ValueError(f"{path}: lacks the columns {', '.join(missing)}; run avsi-evaluate again")
        return list(reader)


# ---- words ---------------------------------------------------------------------------------------------------------------------


def number(value, digits: int, sign: bool = False) -> str:
    """A number as it is read: a true minus, a dash for none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def value_label(family: str, value: float | None) -> str:
    """The value of a case; None for the case without the change."""
    said = VALUES.get(family, {}).get(value)
    return said or f"{value or 0:g}".replace("-", "−")


def case_label(case: dict, families: dict[str, str]) -> str:
    """One of summary["cases"] in words, its gap first."""
    gap, family, value = f"{case['gap_ms']}\u00a0ms", case["family"], case["value"]
    if not family:
        return gap
    if family == "gaps":
        return f"{gap} in {value:g} gap{'s' if value > 1 else ''}"
    if family in ("no_video", "whole_clip"):
        return f"{gap}, {value_label(family, value)}"
    if family == "paper_gaps":
        return f"about {gap} in {value_label(family, value)} gaps"
    return f"{gap}, {families[family]}: {value_label(family, value)}"


def listed(words: Iterable) -> str:
    """'a, b and c'."""
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last


def verdict(entry: dict) -> str:
    """'better' or 'worse' of a against b where the interval leaves 0 out, else ''."""
    if entry["low"] <= 0 <= entry["high"] or entry["metric"] not in METRICS:
        return ""
    return "better" if (entry["mean"] < 0) == METRICS[entry["metric"]].lower_is_better else "worse"


# ---- what a table is made of -----------------------------------------------------------------------------------------------------


def cell(entry: dict, digits: int, sign: bool = False, unit: str = "") -> dict:
    """An estimate {"mean", "low", "high", "n"} as text."""
    low, high = (number(entry[k], digits, sign) for k in ("low", "high"))
    return {"text": number(entry["mean"], digits, sign) + unit, "interval": f"[{low}, {high}]", "says": "", "n": entry["n"]}


def table(title: str, first: str, columns: list[dict], rows: Iterable[tuple], said: str = "Mean and 95 % interval") -> dict:
    """Rows of (group, label, kind, key -> cell); n is the largest of a row, a cell with fewer says so. said: what a cell holds."""
    made = []
    for group, label, kind, cells in rows:
        n = max((c["n"] for c in cells.values()), default=0)
        few = {k: c | {"few": c["n"] if c["n"] < n else 0} for k, c in cells.items()}
        made.append({"group": group, "label": label, "kind": kind, "cells": few, "n": n})
    return {"title": title, "first": first, "columns": columns, "rows": made, "said": said}


def columns_of_systems(systems: list[dict]) -> list[dict]:
    return [{"key": s["name"], "label": s["name"], "unit": "", "better": "", "kind": s["kind"]} for s in systems]


def _columns_of_metrics(summary: dict) -> list[dict]:
    """Those that have any value, in the order of METRICS."""
    found = {e["metric"] for e in summary["table"]}
    return [
        {"key": k, "label": m.label, "unit": m.unit, "better": "lower" if m.lower_is_better else "higher", "kind": ""}
        for k, m in METRICS.items()
        if k in found
    ]


def by_place(entries: list[dict], *names: str) -> dict:
    """(case, gap_ms, *names of an entry) -> metric -> entry."""
    found: dict = collections.defaultdict(dict)
    for entry in entries:
        found[entry["case"], entry["gap_ms"], *(entry[k] for k in names)][entry["metric"]] = entry
    return found


def _cells(entries: dict, sign: bool = False) -> dict:
    cells = {k: cell(e, METRICS[k].digits, sign) for k, e in entries.items() if k in METRICS}
    return {k: c | {"says": verdict(entries[k])} for k, c in cells.items()} if sign else cells


def plain(summary: dict) -> list[dict]:
    """The cases that are nothing but a gap."""
    return [c for c in summary["cases"] if not c["family"]]


def varied(summary: dict) -> dict[tuple[int, str], list[dict]]:
    """(gap_ms, family) -> its cases, with the plain one of that gap where there is one: value None, first, or as a shift of 0."""
    found: dict = {}
    for case in summary["cases"]:
        if case["family"]:
            found.setdefault((case["gap_ms"], case["family"]), []).append(case)
    without = {c["gap_ms"]: c | {"value": None} for c in plain(summary)}
    found = {k: ([without[k[0]]] if k[0] in without else []) + cases for k, cases in found.items()}
    return {k: sorted(v, key=lambda c: c["value"] or 0) if k[1] == "shift_ms" else v for k, v in found.items()}


# ---- the tables ------------------------------------------------------------------------------------------------------------------


def headline(summary: dict) -> dict:
    """Systems side by side, a row a gap: metrics of HEADLINE; the cases that are only a gap, all where there is none of them."""
    systems = [s for s in summary["systems"] if s["kind"] in ("interpolation", "baseline", "system")]
    found, rows = by_place(summary["table"], "system"), []
    for metric in HEADLINE:
        m = METRICS[metric]
        group = f"{', '.join(filter(None, (m.label, m.unit)))} ({'lower' if m.lower_is_better else 'higher'} is better)"
        for case in plain(summary) or summary["cases"]:
            entries = {s["name"]: found[case["name"], case["gap_ms"], s["name"]].get(metric) for s in systems}
            if cells := {name: cell(e, m.digits) for name, e in entries.items() if e}:
                rows.append((group, case_label(case, summary["families"]), "", cells))
    return table("Systems side by side", "Gap", columns_of_systems(systems), rows)


def results(summary: dict) -> list[dict]:
    """One table a gap length, one row a system."""
    found, columns = by_place(summary["table"], "system"), _columns_of_metrics(summary)
    return [
        table(
            f"Gap of {c['gap_ms']} ms", "System", columns,
            [("", s["name"], s["kind"], _cells(found["", c["gap_ms"], s["name"]])) for s in summary["systems"]],
        )
        for c in plain(summary)
    ]  # fmt: skip


def changes(summary: dict) -> list[dict]:
    """One table a gap length and family of changes, its rows grouped by value."""
    found, columns, tables = by_place(summary["table"], "system"), _columns_of_metrics(summary), []
    for (gap_ms, family), cases in varied(summary).items():
        rows = [
            (f"{value_label(family, c['value'])}", s["name"], s["kind"], _cells(found[c["name"], gap_ms, s["name"]]))
            for c in cases
            for s in summary["systems"]
            if found[c["name"], gap_ms, s["name"]]
        ]
        tables.append(table(f"Gap of {gap_ms} ms: {summary['families'][family]}", "System", columns, rows))
    return tables


def differences(summary: dict) -> list[dict]:
    """One table a pair of systems, one row a case."""
    found, columns, tables = by_place(summary["paired"], "a", "b"), _columns_of_metrics(summary), []
    for a, b in dict.fromkeys((e["a"], e["b"]) for e in summary["paired"]):
        rows = []
        for case in summary["cases"]:
            if entries := found[case["name"], case["gap_ms"], a, b]:
                rows.append(("", case_label(case, summary["families"]), "", _cells(entries, sign=True)))
        tables.append(table(f"{a} minus {b}", "Gap", columns, rows))
    return tables


def speakers(summary: dict, rows: list[dict]) -> dict:
    """Each speaker, over all gaps without another change, grouped by metric; intervals over clips."""
    names = {c["name"] for c in plain(summary) or summary["cases"]}
    values: dict = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        for metric in SPEAKER_METRICS:
            if row["case"] in names and row.get(metric):
                values[metric, row["speaker"], row["system"]][row["clip_id"]].append(float(row[metric]))
    order = sorted({row["speaker"] for row in rows}, key=lambda s: (len(s), s))  # s2 before s10
    made = []
    for metric in SPEAKER_METRICS:
        for speaker in order:
            cells = {}
            for system in summary["systems"]:
                if clips := values.get((metric, speaker, system["name"])):
                    entry = clustered([sum(v) for v in clips.values()], [len(v) for v in clips.values()])
                    cells[system["name"]] = cell(entry | {"n": len(clips)}, METRICS[metric].digits)
            made.append((f"{METRICS[metric].label}, {METRICS[metric].unit}".rstrip(", "), speaker, "", cells))
    return table("By speaker", "Speaker", columns_of_systems(summary["systems"]), made)


# ---- in words ------------------------------------------------------------------------------------------------------------------


def sentences(summary: dict) -> list[str]:
    """What the gap errors say: each system's own, against whom it is better, and up to which gap."""
    cases = plain(summary) or summary["cases"]
    found, paired = by_place(summary["table"], "system"), by_place(summary["paired"], "a", "b")
    said = []
    for name in [s["name"] for s in summary["systems"] if s["kind"] == "system"]:
        own = [(c, e) for c in cases if (e := found[c["name"], c["gap_ms"], name].get("gap_l1_db"))]
        if own:
            ends = [own[0]] + own[-1:] * (len(own) > 1)
            said.append(f"{name} is off in the gap by {listed(_off(e, case_label(c, summary['families'])) for c, e in ends)}.")
        for other in dict.fromkeys(e["b"] for e in summary["paired"] if e["a"] == name):
            verdicts: dict = {"better": [], "worse": [], "": []}
            for c in cases:
                if e := paired[c["name"], c["gap_ms"], name, other].get("gap_l1_db"):
                    verdicts[verdict(e)].append(case_label(c, summary["families"]))
            if any(verdicts.values()):
                said.append(f"{name} against {other}, by gap error: {_told(verdicts)}.{_reach(summary, name, other)}")
    return said


def _off(entry: dict, label: str) -> str:
    made = cell(entry, METRICS["gap_l1_db"].digits)
    return f"{made['text']} dB {made['interval']} at {label} (n = {made['n']})"


def _told(verdicts: dict[str, list[str]]) -> str:
    """'better at 300 ms and 600 ms, not told apart at 900 ms'."""
    names = {"better": "better", "worse": "worse", "": "not told apart"}
    kinds = {k: v for k, v in verdicts.items() if v}
    if len(kinds) == 1 and len(labels := next(iter(kinds.values()))) > 1:
        return f"{names[next(iter(kinds))]} at every gap, {labels[0]} to {labels[-1]}"
    return ", ".join(f"{names[k]} at {listed(v)}" for k, v in kinds.items())


def _reach(summary: dict, a: str, b: str) -> str:
    lengths = [c["gap_ms"] for c in plain(summary)]
    for entry in summary["reach"]:
        if (entry["a"], entry["b"]) == (a, b) and len(lengths) > 1:
            if not entry["gap_ms"]:
                return " The gain isn't above 0 even at the shortest."
            return f" The gain stays above 0 up to {entry['gap_ms']} ms{', the longest' * (entry['gap_ms'] == max(lengths))}."
    return ""


# ---- an interval of a rate -------------------------------------------------------------------------------------------------------


def clustered(sums: Sequence[float], counts: Sequence[float], n: int = 2000) -> dict:
    """sum(sums) / sum(counts) with its 95 % percentile bootstrap over clusters, one pair (sum, count) each; n: clusters that count.

    The clips of a speaker or the words of a clip aren't independent: what is drawn is whole clusters.
    """
    sums, counts = (np.asarray(x, np.float64) for x in (sums, counts))
    if not counts.sum():
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    times = _draws(len(sums), n)
    total = times @ counts
    low, high = np.percentile((times @ sums)[total > 0] / total[total > 0], [2.5, 97.5])
    return {"mean": float(sums.sum() / counts.sum()), "low": float(low), "high": float(high), "n": int((counts > 0).sum())}


@functools.lru_cache(maxsize=4)
def _draws(size: int, n: int) -> np.ndarray:
    """(n, size): how often each of `size` is in each of n resamples."""
    return np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=n).astype(np.float64)
