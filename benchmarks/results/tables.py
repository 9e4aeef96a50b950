"""Tables of results: cells with intervals, rows of Markdown, and CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path


def markdown_row(cells: Sequence[object]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(str(c) for c in cells) + " |"


def markdown_table(heads: Sequence[object], rows: Iterable[Sequence[object]], num_text: int = 1) -> list[str]:
    """Lines of a Markdown table whose first `num_text` columns are text and the others numbers."""
    align = ["---"] * num_text + ["---:"] * (len(heads) - num_text)
    return [markdown_row(heads), markdown_row(align), *map(markdown_row, rows)]


def interval(entry: dict | None, digits: int) -> str:
    """ "mean [low, high]" of an estimate of `bootstrap`; '' for None."""
    if entry is None:
        return ""
    missing = f" ({entry['missing']} not computable)" if entry.get("missing") else ""
    return f"{entry['mean']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]{missing}"


def mean(entry: dict | None, digits: int) -> str:
    """The mean of an estimate; '' for None."""
    return "" if entry is None else f"{entry['mean']:.{digits}f}"


def negated(entry: dict) -> dict:
    """The estimate of b - a from that of a - b."""
    return {**entry, "mean": -entry["mean"], "low": -entry["high"], "high": -entry["low"]}


def read_csv(path: Path) -> list[dict]:
    """Rows of a CSV file; cells that are numbers become int or float."""
    with path.open(newline="") as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(cell: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell


def write_csv(path: Path, rows: Sequence[dict], digits: int = 6) -> None:
    """Writes rows of the same keys, numbers with `digits` decimals; the keys of the first row are the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([{k: _cell(v, digits) for k, v in row.items()} for row in rows])


def _cell(value: object, digits: int) -> object:
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
