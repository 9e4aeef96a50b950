"""The README's table repeats the evaluations that ship with the weights."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (("av_unified", "masked"), ("av_unified", "interpolation"), ("a_si", "system"), ("av_unified", "system"))


def unseen_means(weights: str) -> dict[tuple[int, str, str], float]:
    """(gap_ms, kind, metric) -> mean over the unseen speakers' clips, from the weights' config.json."""
    facts = json.loads((ROOT / "avsi_jax" / "pretrained" / weights / "config.json").read_text())["facts"]
    (table,) = (e["table"] for e in facts["evaluations"] if (e["split"], e["suite"]) == ("test", "lengths"))
    return {(row["gap_ms"], row["kind"], row["metric"]): row["mean"] for row in table if row["case"] == ""}


def test_the_table_repeats_the_shipped_evaluations():
    means = {name: unseen_means(name) for name in ("av_unified", "a_si")}
    rows = re.findall(r"^\| (\d+) ms \| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    assert [int(gap) for gap, _ in rows] == [300, 900, 1500]
    for gap, cells in rows:
        for cell, (weights, kind) in zip(cells.replace("*", "").split(" | "), COLUMNS, strict=True):
            of = {metric: means[weights][int(gap), kind, metric] for metric in ("pesq_wb", "stoi")}
            assert cell == f"{of['pesq_wb']:.2f} / {of['stoi']:.3f}", (gap, weights, kind)


def test_the_best_of_each_row_is_bold():
    for row in re.findall(r"^\| \d+ ms \| (.*) \|$", (ROOT / "README.md").read_text(), re.M):
        cells = [cell.split(" / ") for cell in row.split(" | ")]
        for values in zip(*cells, strict=True):
            best = max(float(v.strip("*")) for v in values)
            assert [v for v in values if v.startswith("**")] == [v for v in values if float(v.strip("*")) == best]
