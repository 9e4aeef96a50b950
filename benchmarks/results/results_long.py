"""Committed small summaries -> docs/results_long.md.

    python -m benchmarks.results.results_long    writes docs/results_long.md anew from docs/results/long/

A summary holds means, intervals and counts, never a clip; every number in docs/results_long.md comes from one of them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.results.results_page import flipped, row, show

DOCS = Path(__file__).resolve().parents[2] / "docs"
HOME = DOCS / "results" / "long"
METRICS = (  # name in summary.json, heading, digits
    ("gap_l1_mel_db", "Log-mel error in the gap, dB, of the predicted spectrogram (lower is better)", 2),
    ("gap_l1_db", "Log-mel error in the gap, dB, of the restored waveform (lower is better)", 2),
    ("pesq_nb", "PESQ, narrow band at 8 kHz, whole clip (MOS-LQO; higher is better)", 2),
    ("stoi", "STOI, whole clip (higher is better)", 3),
    ("estoi", "ESTOI, whole clip (higher is better)", 3),
    ("cer", "Character error of what was read (greedy CTC, no grammar; lower is better)", 3),
    ("per", "Phone error of what was read (greedy CTC, no grammar; lower is better)", 3),
)
SPLITS = {"test_seen": "Speakers heard in training (test_seen)", "test": "Unseen speakers s30 s32 s33 s34 (test)"}


def write() -> None:
    """docs/results_long.md from everything in docs/results/long."""
    summaries = {p.stem: json.loads(p.read_text()) for p in sorted(HOME.glob("*.json"))}
    parts = ["# Longer trainings of two systems\n", (HOME / "notes.md").read_text().strip() + "\n"]
    for split, title in SPLITS.items():
        of_split = {name: s for name, s in summaries.items() if s["split"] == split}
        if of_split:
            parts.append(f"## {title}\n")
            parts += [section(name.removesuffix(f"-{split}"), s) for name, s in of_split.items()]
    parts.append("## Trainings\n\n" + trainings(summaries))
    (DOCS / "results_long.md").write_text("\n".join(parts).rstrip() + "\n")
    print(DOCS / "results_long.md")


def section(name: str, summary: dict) -> str:
    """All metrics of one evaluation, a table each, and the paired differences of the gap's error."""
    unit = "speakers, then clips" if summary.get("by_speaker") else "clips"
    out = [
        f"### {name}\n",
        f"{summary['num_clips']} clips, a gap of every length in each, {summary['protocol']} protocol, {summary['metric_rate']} Hz;"
        f" mean [95 % interval, bootstrap over {unit}]; {summary['seconds']['all'] / 60:.0f} min, {summary['peak_rss_mb']} MB.\n",
    ]
    names = [s["name"] for s in summary["systems"]]
    cell = {(e["gap_ms"], e["system"], e["metric"]): e for e in summary["table"]}
    for metric, heading, digits in METRICS:
        shown = [n for n in names if any((g, n, metric) in cell for g in summary["gap_ms"])]
        if shown:
            out += [f"**{heading}**\n", row(["gap ms", *shown]), row(["---:"] * (len(shown) + 1))]
            out += [row([g, *(show(cell.get((g, n, metric)), digits) for n in shown)]) for g in summary["gap_ms"]]
            out.append("")
    return "\n".join(out + paired(summary))


def paired(summary: dict) -> list[str]:
    """How much less error in the gap the system has than each of the others: above 0 is better, on the same clips."""
    pairs = [e for e in summary["paired"] if e["metric"] == "gap_l1_mel_db"]
    others = list(dict.fromkeys(e["b"] for e in pairs))
    if not others:
        return []
    cell = {(e["gap_ms"], e["b"]): flipped(e) for e in pairs}
    out = [f"**Gain of {summary['system']} in the gap, dB of predicted log-mel, paired (above 0: better)**\n"]
    out += [row(["gap ms", *(f"over {o}" for o in others)]), row(["---:"] * (len(others) + 1))]
    return [*out, *(row([g, *(show(cell.get((g, o)), 2) for o in others)]) for g in summary["gap_ms"]), ""]


def trainings(summaries: dict) -> str:
    """One row a run: what it took, and the command that repeats it."""
    runs = {re.sub("-(test_seen|test)$", "", name): s for name, s in summaries.items()}
    out = [row(["run", "system", "parameters", "train clips", "epochs", "hours", "steps/s", "on"]), row(["---"] * 8)]
    for name, s in runs.items():
        for t in s["trainings"]:
            facts = [f"{t['parameters']:,}", t["clips"]["train"], t["epochs"], t["hours"], t["steps_per_s"]]
            out.append(row([name, t["config"]["system"], *facts, f"{len(t['devices'])} x {t['devices'][0]}"]))
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    write()
