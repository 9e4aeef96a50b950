"""Reads and writes the tables of docs/scaling.md, which stores measured and compiled results between marks."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE, TPU_PAGE = ROOT / "docs" / "scaling.md", ROOT / "docs" / "tpu.md"


def table(rows: list[dict]) -> str:
    """A Markdown table of rows with the same keys; columns of numbers are right-aligned."""
    heads = list(rows[0])
    right = lambda k: all(re.fullmatch(r"[-\d.,% ]*", _cell(r[k])) for r in rows)
    lines = [heads, ["---:" if right(k) else "---" for k in heads], *([_cell(r[k]) for k in heads] for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def rows_of(text: str) -> list[dict]:
    """The first table of a Markdown text; cells that are numbers become float."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    if len(lines) < 3:
        raise ValueError(f"{PAGE.name}: found no table in {text[:60]!r}, expected one written by --compile or --measure")
    heads, _, *rows = ([cell.strip() for cell in line] for line in lines)
    return [dict(zip(heads, map(_number, row), strict=True)) for row in rows]


def _number(cell: str) -> float | str:
    plain = cell.replace(",", "")
    return float(plain) if re.fullmatch(r"-?\d+(\.\d+)?", plain) else cell


def part(page: str, name: str) -> str:
    """The text between a name's marks, <!-- NAME --> and <!-- end -->."""
    match = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", page, re.S)
    if not match:
        raise ValueError(f"{PAGE.name}: found no mark <!-- {name} --> with its <!-- end -->, expected one")
    return match.group(1)


def with_part(page: str, name: str, text: str) -> str:
    """The page with the text between a name's marks replaced."""
    return page.replace(f"<!-- {name} -->\n{part(page, name)}", f"<!-- {name} -->\n\n{text.strip()}\n\n")
