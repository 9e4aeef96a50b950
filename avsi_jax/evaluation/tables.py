"""Tables of a report, made from clips.csv and summary.json of an evaluation.

A table is {"title", "caption", "first", "columns", "rows"}: columns {"key", "label", "unit", "better", "kind"}, rows {"group",
"label", "kind", "cells", "n"}, and in "cells", by column key, {"text", "interval", "verdict", "n", "few"}. The report and the LaTeX
files are written from the same tables.
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

from avsi_jax.evaluation import bootstrap

KINDS = ("masked", "interpolation", "baseline", "mean", "system", "other_video", "oracle_mel")  # in the order of every table
REFERENCES = ("masked", "interpolation", "oracle_mel")  # kinds that depend on no system
COLUMNS = set("clip_id speaker case gap_ms gaps_s in_words system kind reason".split())  # required in clips.csv
KEYS = set(  # required in summary.json
    """title system protocol protocol_description split suite command date metric_rate num_clips systems gap_ms cases families
    table paired reach""".split()
)
NO_VALUE = "–"
BETTER = {True: "lower", False: "higher", None: ""}  # by Metric.lower_is_better


class Metric(NamedTuple):
    """How a metric is shown and what it means."""

    label: str
    unit: str
    digits: int
    lower_is_better: bool | None  # None: neither, 0 is best
    meaning: str


GAP_ERROR = """mean distance between the log-mels of the audio and of the recording inside the gap: 64 mel bands at 8 kHz,
floor -80 dB, over the frames (40 ms, every 20 ms) centred in the gap. One front end for every system."""
MEL_ERROR = "the same for the log-mel that the network predicts, in the bands of its own preset, before the vocoder."
PESQ_WB = "ITU-T P.862.2, whole clip at 16 kHz; 1.0 to 4.6. Not on the same scale as PESQ nb."
GAP_WER = """word error rate of a recognizer, trained on clean audio, over the words that the gap touches; 0 means no errors."""
TEXT_CER = "character error rate of the network's text head against the words spoken; 0 means no errors, may exceed 1."
LEVEL_ERROR = "level of the audio in the gap minus that of the recording; below 0 it is too quiet. Silence counts as -80 dB."
PLCMOS = """PLCMOS v2: a network's prediction of how people rate a clip with a concealed loss, without the recording, whole clip;
1 to 5. It judges how natural the audio sounds, not whether it is what was spoken."""
DNSMOS = "DNSMOS P.835, overall: a network's prediction of people's ratings, without the recording, whole clip; 1 to 5."
METRICS = {
    "gap_l1_db": Metric("Gap error", "dB", 2, True, GAP_ERROR),
    "gap_l1_mel_db": Metric("Mel gap error", "dB", 2, True, MEL_ERROR),
    "pesq_nb": Metric("PESQ nb", "MOS-LQO", 2, False, "ITU-T P.862 mapped by P.862.1, whole clip at 8 kHz; 1.0 to 4.5."),
    "pesq_wb": Metric("PESQ wb", "MOS-LQO", 2, False, PESQ_WB),
    "stoi": Metric("STOI", "", 3, False, "short-time objective intelligibility, whole clip (Taal et al. 2011); up to 1."),
    "estoi": Metric("ESTOI", "", 3, False, "extended STOI, whole clip (Jensen and Taal 2016); up to 1."),
    "stoi_gap": Metric("STOI, gap", "", 3, False, "STOI of the gap and 200 ms on both sides of it."),
    "level_error_db": Metric("Level error", "dB", 1, None, LEVEL_ERROR),
    "plcmos": Metric("PLCMOS", "MOS", 2, False, PLCMOS),
    "dnsmos": Metric("DNSMOS", "MOS", 2, False, DNSMOS),
    "psnr_db": Metric("PSNR", "dB", 2, False, "of the levels in [0, 1] of the whole spectrogram, peak 1; protocol paper only."),
    "ssim": Metric("SSIM", "", 3, False, "structural similarity of the same levels (Wang et al. 2004, windows of 7 x 7 values)."),
    "gap_mse": Metric("Gap MSE", "", 4, True, "mean squared error of the same levels in the gaps."),
    "wer_gap": Metric("Gap WER", "", 3, True, GAP_WER),
    "cer": Metric("Text CER", "", 3, True, TEXT_CER),
    "per": Metric("Text PER", "", 3, True, TEXT_CER.replace("character", "phone")),
}
HEADLINE = ("gap_l1_db", "stoi", "estoi", "pesq_nb", "pesq_wb", "plcmos", "dnsmos", "wer_gap")
SPEAKER_METRICS = ("gap_l1_db", "level_error_db", "stoi", "estoi", "pesq_wb", "plcmos", "dnsmos")

# Labels of the values of a case; None is the case without the change.
VALUES = {
    "noise_db": {None: "none"},
    "video_of": {None: "own", 1: "same speaker (1)", 2: "another speaker (2)"},
    "no_video": {None: "audio and video", 1: "audio only"},
    "whole_clip": {1: "video only"},
    "paper_gaps": {8: "1 to 8"},
}


# ---- reading -------------------------------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """The results of one evaluation."""

    folder: Path
    summary: dict
    rows: list[dict[str, str]]  # the lines of clips.csv


def read(folder: str | Path) -> Evaluation:
    """Reads the results of avsi-evaluate; FileNotFoundError, or ValueError naming what a file lacks."""
    folder = Path(folder)
    if missing := [name for name in ("clips.csv", "summary.json") if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder}: found no {' and no '.join(missing)}; expected the results of avsi-evaluate")
    return Evaluation(folder, _read_summary(folder / "summary.json"), _read_rows(folder / "clips.csv"))


def _read_summary(path: Path) -> dict:
    summary = json.loads(path.read_text(encoding="utf-8"))
    if missing := sorted(KEYS - set(summary)):
        raise ValueError(f"{path} lacks {', '.join(missing)}; run avsi-evaluate again")
    if unknown := {s["kind"] for s in summary["systems"]} - set(KINDS):
        raise ValueError(f"{path}: found kind {', '.join(sorted(unknown))}, expected {', '.join(KINDS)}")
    return summary | {"systems": in_order(summary["systems"])}


def in_order(systems: list[dict]) -> list[dict]:
    """Systems in the order of KINDS."""
    return sorted(systems, key=lambda s: KINDS.index(s["kind"]))


def _read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := sorted(COLUMNS - set(reader.fieldnames or ())):
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}; run avsi-evaluate again")
        return list(reader)


# ---- labels --------------------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int, sign: bool = False) -> str:
    """A number as text, with a true minus sign; a dash for no value."""
    if value is None or not math.isfinite(value):
        return NO_VALUE
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def value_label(family: str, value: float | None) -> str:
    """The value of a case as text; None is the case without the change."""
    label = VALUES.get(family, {}).get(value)
    return label or f"{value or 0:g}".replace("-", "−")


def case_label(case: dict, families: dict[str, str]) -> str:
    """One of summary["cases"] as text, its gap first."""
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


def listed(words: Iterable[object]) -> str:
    """'a, b and c'."""
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last


def verdict(entry: dict) -> str:
    """Whether a is 'better' or 'worse' than b where the interval excludes 0, otherwise ''."""
    metric = METRICS.get(entry["metric"])
    if entry["low"] <= 0 <= entry["high"] or not metric or metric.lower_is_better is None:
        return ""
    return "better" if (entry["mean"] < 0) == metric.lower_is_better else "worse"


# ---- elements of a table ---------------------------------------------------------------------------------------------------------


def cell(entry: dict, digits: int, sign: bool = False, unit: str = "") -> dict:
    """An estimate {"mean", "low", "high", "n"} as text."""
    low, high = (number(entry[k], digits, sign) for k in ("low", "high"))
    return {"text": number(entry["mean"], digits, sign) + unit, "interval": f"[{low}, {high}]", "verdict": "", "n": entry["n"]}


def table(title: str, first: str, columns: list[dict], rows: Iterable[tuple], caption: str = "Mean and 95 % interval") -> dict:
    """A table of rows (group, label, kind, {column key: cell}). A row's n is that of its largest cell; others show their own."""
    formatted = []
    for group, label, kind, cells in rows:
        n = max((c["n"] for c in cells.values()), default=0)
        few = {k: c | {"few": c["n"] if c["n"] < n else 0} for k, c in cells.items()}
        formatted.append({"group": group, "label": label, "kind": kind, "cells": few, "n": n})
    return {"title": title, "first": first, "columns": columns, "rows": formatted, "caption": caption}


def columns_of_systems(systems: list[dict]) -> list[dict]:
    """A column per system."""
    return [{"key": s["name"], "label": s["name"], "unit": "", "better": "", "kind": s["kind"]} for s in systems]


def _columns_of_metrics(summary: dict) -> list[dict]:
    """A column per metric that has values, in the order of METRICS."""
    measured = {e["metric"] for e in summary["table"]}
    return [
        {"key": k, "label": m.label, "unit": m.unit, "better": BETTER[m.lower_is_better], "kind": ""}
        for k, m in METRICS.items()
        if k in measured
    ]


def by_place(entries: list[dict], *names: str) -> dict:
    """(case, gap_ms, *names of an entry) -> metric -> entry."""
    places: dict = collections.defaultdict(dict)
    for entry in entries:
        places[entry["case"], entry["gap_ms"], *(entry[k] for k in names)][entry["metric"]] = entry
    return places


def _cells(entries: dict, sign: bool = False) -> dict:
    cells = {k: cell(e, METRICS[k].digits, sign) for k, e in entries.items() if k in METRICS}
    return {k: c | {"verdict": verdict(entries[k])} for k, c in cells.items()} if sign else cells


def plain(summary: dict) -> list[dict]:
    """The cases with a gap and no other change."""
    return [c for c in summary["cases"] if not c["family"]]


def varied(summary: dict) -> dict[tuple[int, str], list[dict]]:
    """(gap_ms, family) -> its cases, with that without the change if there is one: value None, first, or as a shift of 0."""
    by_family: dict = {}
    for case in summary["cases"]:
        if case["family"]:
            by_family.setdefault((case["gap_ms"], case["family"]), []).append(case)
    without = {c["gap_ms"]: c | {"value": None} for c in plain(summary)}
    by_family = {k: ([without[k[0]]] if k[0] in without else []) + cases for k, cases in by_family.items()}
    return {k: sorted(v, key=lambda c: c["value"] or 0) if k[1] == "shift_ms" else v for k, v in by_family.items()}


# ---- the tables ------------------------------------------------------------------------------------------------------------------


def headline(summary: dict) -> dict:
    """A column per system and a row per gap, for the metrics of HEADLINE: cases without a change, or all if there is none."""
    systems = [s for s in summary["systems"] if s["kind"] in ("masked", "interpolation", "baseline", "mean", "system")]
    estimates, rows = by_place(summary["table"], "system"), []
    for metric in HEADLINE:
        m = METRICS[metric]
        group = f"{', '.join(filter(None, (m.label, m.unit)))} ({BETTER[m.lower_is_better]} is better)"
        for case in plain(summary) or summary["cases"]:
            entries = {s["name"]: estimates[case["name"], case["gap_ms"], s["name"]].get(metric) for s in systems}
            if cells := {name: cell(e, m.digits) for name, e in entries.items() if e}:
                rows.append((group, case_label(case, summary["families"]), "", cells))
    return table("Systems side by side", "Gap", columns_of_systems(systems), rows)


def results(summary: dict) -> list[dict]:
    """One table per gap length, one row per system; where the summary has groups of speakers, the same for each group."""
    columns, tables = _columns_of_metrics(summary), []
    for part in [summary, *summary.get("groups", [])]:
        estimates = by_place(part["table"], "system")
        tables += [
            table(
                f"Gap of {c['gap_ms']} ms" + f", {part.get('name')}" * (part is not summary), "System", columns,
                [("", s["name"], s["kind"], _cells(estimates["", c["gap_ms"], s["name"]])) for s in summary["systems"]],
            )
            for c in plain(summary)
        ]  # fmt: skip
    return tables


def changes(summary: dict) -> list[dict]:
    """One table per gap length and family of changes, rows grouped by value."""
    estimates, columns, tables = by_place(summary["table"], "system"), _columns_of_metrics(summary), []
    for (gap_ms, family), cases in varied(summary).items():
        rows = [
            (f"{value_label(family, c['value'])}", s["name"], s["kind"], _cells(estimates[c["name"], gap_ms, s["name"]]))
            for c in cases
            for s in summary["systems"]
            if estimates[c["name"], gap_ms, s["name"]]
        ]
        tables.append(table(f"Gap of {gap_ms} ms: {summary['families'][family]}", "System", columns, rows))
    return tables


def differences(summary: dict) -> list[dict]:
    """One table per pair of systems, one row per case."""
    estimates, columns, tables = by_place(summary["paired"], "a", "b"), _columns_of_metrics(summary), []
    for a, b in dict.fromkeys((e["a"], e["b"]) for e in summary["paired"]):
        rows = []
        for case in summary["cases"]:
            if entries := estimates[case["name"], case["gap_ms"], a, b]:
                rows.append(("", case_label(case, summary["families"]), "", _cells(entries, sign=True)))
        tables.append(table(f"{a} minus {b}", "Gap", columns, rows))
    return tables


def speakers(summary: dict, rows: list[dict]) -> dict:
    """Means by speaker over all gaps without another change, grouped by metric; intervals over clips."""
    names = {c["name"] for c in plain(summary) or summary["cases"]}
    values: dict = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        for metric in SPEAKER_METRICS:
            if row["case"] in names and row.get(metric):
                values[metric, row["speaker"], row["system"]][row["clip_id"]].append(float(row[metric]))
    order = sorted({row["speaker"] for row in rows}, key=lambda s: (len(s), s))  # s2 before s10
    table_rows = []
    for metric in dict.fromkeys(m for m in SPEAKER_METRICS if any(of == m for of, *_ in values)):
        for speaker in order:
            cells = {}
            for system in summary["systems"]:
                if clips := values.get((metric, speaker, system["name"])):
                    entry = clustered([sum(v) for v in clips.values()], [len(v) for v in clips.values()])
                    cells[system["name"]] = cell(entry | {"n": len(clips)}, METRICS[metric].digits)
            table_rows.append((f"{METRICS[metric].label}, {METRICS[metric].unit}".rstrip(", "), speaker, "", cells))
    return table("By speaker", "Speaker", columns_of_systems(summary["systems"]), table_rows)


# ---- summary in words ------------------------------------------------------------------------------------------------------------


def sentences(summary: dict) -> list[str]:
    """The gap errors in sentences: each system's own, which systems it is better than, and up to which gap length."""
    cases = plain(summary) or summary["cases"]
    estimates, paired = by_place(summary["table"], "system"), by_place(summary["paired"], "a", "b")
    texts = []
    for name in [s["name"] for s in summary["systems"] if s["kind"] == "system"]:
        own = [(c, e) for c in cases if (e := estimates[c["name"], c["gap_ms"], name].get("gap_l1_db"))]
        if own:
            ends = [own[0]] + own[-1:] * (len(own) > 1)
            errors = listed(_error_text(e, case_label(c, summary["families"])) for c, e in ends)
            texts.append(f"The gap error of {name} is {errors}.")
        for other in dict.fromkeys(e["b"] for e in summary["paired"] if e["a"] == name):
            verdicts: dict = {"better": [], "worse": [], "": []}
            for c in cases:
                if e := paired[c["name"], c["gap_ms"], name, other].get("gap_l1_db"):
                    verdicts[verdict(e)].append(case_label(c, summary["families"]))
            if any(verdicts.values()):
                texts.append(f"{name} against {other}, by gap error: {_comparison(verdicts)}.{_reach(summary, name, other)}")
    return texts


def _error_text(entry: dict, label: str) -> str:
    formatted = cell(entry, METRICS["gap_l1_db"].digits)
    return f"{formatted['text']} dB {formatted['interval']} at {label} (n = {formatted['n']})"


def _comparison(verdicts: dict[str, list[str]]) -> str:
    """'better at 300 ms and 600 ms, not significant at 900 ms'."""
    names = {"better": "better", "worse": "worse", "": "not significant"}
    kinds = {k: v for k, v in verdicts.items() if v}
    if len(kinds) == 1 and len(labels := next(iter(kinds.values()))) > 1:
        return f"{names[next(iter(kinds))]} at every gap, {labels[0]} to {labels[-1]}"
    return ", ".join(f"{names[k]} at {listed(v)}" for k, v in kinds.items())


def _reach(summary: dict, a: str, b: str) -> str:
    lengths = [c["gap_ms"] for c in plain(summary)]
    for entry in summary["reach"]:
        if (entry["a"], entry["b"]) == (a, b) and len(lengths) > 1:
            if not entry["gap_ms"]:
                return " The gain is not significant even at the shortest gap."
            return f" The gain is significant up to {entry['gap_ms']} ms{', the longest gap' * (entry['gap_ms'] == max(lengths))}."
    return ""


# ---- interval of a rate ----------------------------------------------------------------------------------------------------------


def clustered(sums: Sequence[float], counts: Sequence[float], n: int = 2000, *, by_speaker: bool = False) -> dict:
    """sum(sums) / sum(counts) with its 95 % percentile bootstrap over clusters, one pair (sum, count) each.

    n is the number of clusters with a count above 0. The clips of a speaker or the words of a clip are not independent, so clusters
    are resampled as units. by_speaker: the clusters are speakers; the interval is the t interval over their rates.
    """
    sums, counts = (np.asarray(x, np.float64) for x in (sums, counts))
    if not counts.sum():
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    if by_speaker and (counts > 0).sum() > 1:
        _, low, high = bootstrap.speaker_mean((sums / np.where(counts > 0, counts, np.nan)), [str(i) for i in range(len(sums))])
        return {"mean": float(sums.sum() / counts.sum()), "low": low, "high": high, "n": int((counts > 0).sum())}
    times = _draws(len(sums), n)
    total = times @ counts
    low, high = np.percentile((times @ sums)[total > 0] / total[total > 0], [2.5, 97.5])
    return {"mean": float(sums.sum() / counts.sum()), "low": float(low), "high": float(high), "n": int((counts > 0).sum())}


@functools.lru_cache(maxsize=4)
def _draws(size: int, n: int) -> np.ndarray:
    """(n, size): how often each of `size` clusters occurs in each of n resamples."""
    return np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=n).astype(np.float64)
