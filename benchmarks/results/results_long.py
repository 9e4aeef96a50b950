"""Writes docs/results_long.md and its CSV tables from the committed summaries in docs/results/long/.

    python -m benchmarks.results.results_long

A summary holds means, intervals and counts, never a clip; every number in the tables comes from one of them.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from benchmarks.results.runs import DOCS, SPLITS
from benchmarks.results.tables import interval, markdown_table, negated, write_csv

SUMMARIES = DOCS / "results" / "long"
METRICS = {  # name in summary.json -> heading, digits
    "gap_l1_db": ("Log-mel error in the gap of the restored waveform, dB (lower is better)", 2),
    "stoi": ("STOI, whole clip (higher is better)", 3),
    "pesq_nb": ("PESQ, narrow band at 8 kHz, whole clip (MOS-LQO; higher is better)", 2),
}


def write(docs: Path = DOCS) -> None:
    """Writes results_long.md and results/tables/long_*.csv in the folder `docs`."""
    summaries = {p.stem: json.loads(p.read_text()) for p in sorted(SUMMARIES.glob("*.json"))}
    parts = ["# Longer trainings of two systems\n", (SUMMARIES / "notes.md").read_text().strip() + "\n"]
    for split in reversed(SPLITS):  # unseen speakers first
        of_split = {name: s for name, s in summaries.items() if s["split"] == split}
        if of_split:
            parts.append(f"## {SPLITS[split]}\n")
            parts += [section(name.removesuffix(f"-{split}"), s) for name, s in of_split.items()]
    parts += [
        "## All tables\n",
        "- [long_means.csv](results/tables/long_means.csv): every system, metric and gap length, with intervals",
        "- [long_gains.csv](results/tables/long_gains.csv): paired differences from the other systems",
        "- [long_trainings.csv](results/tables/long_trainings.csv): what every run took",
    ]
    tables = docs / "results" / "tables"
    write_csv(tables / "long_means.csv", means(summaries))
    write_csv(tables / "long_gains.csv", gains(summaries))
    write_csv(tables / "long_trainings.csv", trainings(summaries))
    (docs / "results_long.md").write_text("\n".join(parts).rstrip() + "\n")
    print(docs / "results_long.md")


def section(name: str, summary: dict) -> str:
    """The tables of one evaluation, one per metric, and the gain of video."""
    unit = "speakers, then clips" if summary.get("by_speaker") else "clips"
    lines = [
        f"### {name}: {SPLITS[summary['split']].split('(')[0].strip()}\n",
        f"{summary['num_clips']} clips, one gap of every length in each; mean [95 % interval, bootstrap over {unit}].\n",
    ]
    cells = {(e["system"], e["metric"], e["gap_ms"]): e for e in summary["table"]}
    lengths = summary["gap_ms"]
    for metric, (heading, digits) in METRICS.items():
        systems = [s["name"] for s in summary["systems"]]
        rows = [[s, *(interval(cells.get((s, metric, g)), digits) for g in lengths)] for s in systems]
        lines += [f"**{heading}**\n", *markdown_table(["system", *(f"{g} ms" for g in lengths)], rows), ""]
    twin = next(s["name"] for s in summary["systems"] if s["kind"] == "baseline")
    pair = {e["gap_ms"]: negated(e) for e in summary["paired"] if (e["b"], e["metric"]) == (twin, "gap_l1_mel_db")}
    rows = [[f"{summary['system']} over {twin}", *(interval(pair.get(g), 2) for g in lengths)]]
    heads = ["paired by clip", *(f"{g} ms" for g in lengths)]
    return "\n".join([*lines, "**Gain of video, dB of the predicted log-mel in the gap**\n", *markdown_table(heads, rows), ""])


def means(summaries: dict[str, dict]) -> list[dict]:
    """Every cell of every summary."""
    return [place(name, s) | e for name, s in summaries.items() for e in s["table"]]


def gains(summaries: dict[str, dict]) -> list[dict]:
    """Paired differences of the system from the others; for errors negated, so that above 0 means better."""
    rows = []
    for name, s in summaries.items():
        for e in s["paired"]:
            better = e if e["metric"] in ("pesq_nb", "pesq_wb", "stoi", "estoi", "stoi_gap") else negated(e)
            pair = {"first": e["a"], "over": e["b"], "metric": e["metric"], "gap_ms": e["gap_ms"]}
            rows.append(place(name, s) | pair | {k: better[k] for k in ("mean", "low", "high", "n", "missing")})
    return rows


def trainings(summaries: dict[str, dict]) -> list[dict]:
    """One row per training."""
    runs = {objective_of(name): s for name, s in summaries.items()}
    return [
        {"objective": name, "system": t["config"]["system"], "parameters": t["parameters"], "train_clips": t["clips"]["train"],
         "epochs": t["epochs"], "hours": t["hours"], "steps_per_s": t["steps_per_s"],
         "devices": f"{len(t['devices'])} x {t['devices'][0]}"}
        for name, s in runs.items()
        for t in s["trainings"]
    ]  # fmt: skip


def place(name: str, summary: dict) -> dict:
    """The columns that say which evaluation a row is of."""
    return {"objective": objective_of(name), "protocol": summary["protocol"], "split": summary["split"]}


def objective_of(name: str) -> str:
    """The training objective, from the name of a summary such as paper-test_seen."""
    return re.sub("-(test_seen|test)$", "", name)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    write()
