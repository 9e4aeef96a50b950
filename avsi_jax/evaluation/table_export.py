"""Writes the tables of a report as table.csv, table.json and table.tex.

CSV and JSON contain one row per estimate; LaTeX contains the tables of the report, with booktabs, for \\input. Each names its
protocol.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

from avsi_jax.runtime import storage

FIELDS = (
    "protocol", "split", "suite", "kind", "case", "gap_ms", "system", "minus", "metric", "item", "mean", "low", "high", "n",
    "missing",
)  # fmt: skip
HEAD = (
    "title", "protocol", "protocol_description", "split", "suite", "metric_rate", "num_clips", "by_speaker", "judge", "date",
    "command", "runs",
)  # fmt: skip
MAX_FLOAT_ROWS = 14  # longer tables become longtables
INTERVALS = {  # by_speaker
    False: "95 % percentile bootstrap over clips",
    True: "95 % t interval of the mean over speakers; the mean shown is over clips",
}
OLD_INTERVALS = "95 % percentile bootstrap over speakers, then over the clips of each"  # of summaries without "intervals"
SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--", "→": r"$\to$",
    "\u00a0": "~", "<": "$<$", ">": "$>$", **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def write(page: Path, summary: dict, error_rates: list[dict], tables: list[dict], name: str = "table") -> None:
    """Writes name.csv, name.json and name.tex beside the page.

    error_rates: from `word_errors.estimates`; tables: from evaluation/tables.py and word_errors.py.
    """
    rows = estimates(summary, error_rates)
    storage.write_text(page.with_name(f"{name}.csv"), as_csv(rows))
    storage.write_text(page.with_name(f"{name}.json"), as_json(summary, rows))
    storage.write_text(page.with_name(f"{name}.tex"), as_latex(summary, tables))


def estimates(summary: dict, error_rates: list[dict]) -> list[dict]:
    """One row per mean ("mean"), paired difference ("difference": system minus another) and word or phone error rate ("rate")."""
    rows = [{"kind": "mean", **e} for e in summary["table"]]
    rows += [{"kind": "difference", **e, "system": e["a"], "minus": e["b"]} for e in summary["paired"]]
    rows += [{**e, "kind": "rate", "metric": f"{e['kind']}_error"} for e in error_rates]
    label = {k: summary[k] for k in ("protocol", "split", "suite")}
    return [{k: _finite((label | e).get(k)) for k in FIELDS} for e in rows]


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(rows: list[dict]) -> str:
    """Rows of `estimates` as CSV text."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, FIELDS, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_json(summary: dict, rows: list[dict]) -> str:
    """Rows of `estimates` as JSON text, below a head that describes the evaluation."""
    head = {k: summary[k] for k in HEAD if k in summary}
    return json.dumps(head | {"intervals": intervals_text(summary), "rows": rows}, indent=1, allow_nan=False) + "\n"


def intervals_text(summary: dict) -> str:
    """How the intervals were computed."""
    return summary.get("intervals") or (OLD_INTERVALS if summary.get("by_speaker") else INTERVALS[False])


# ---- LaTeX -----------------------------------------------------------------------------------------------------------------------


def as_latex(summary: dict, tables: list[dict]) -> str:
    """Tables as LaTeX floats, or longtables where they are long; comments state their source and the packages they need."""
    about = [
        summary["title"],
        f"protocol {summary['protocol']}: {summary['protocol_description']}",
        f"split {summary['split']}, suite {summary['suite']}, {summary['num_clips']} clips, scored at {summary['metric_rate']} Hz",
        f"command ({summary['date']}): {summary['command']}",
        *(f"run {name}: {_facts(facts)}" for name, facts in summary.get("runs", {}).items()),
        f"Mean, in brackets the interval: {intervals_text(summary)}. n: clips; a cell with fewer shows its own n.",
        r"Needs \usepackage{booktabs,longtable}; include it with \input. Wide tables need a landscape page.",
    ]
    head = "".join(f"% {' '.join(line.split())}\n" for line in about)
    label = f"{summary['protocol']}-{summary['split']}-{summary['suite']}"
    protocol = f"Protocol {summary['protocol']}, split {summary['split']}."
    return head + "".join(_latex_table(t, protocol, f"{label}-{i}") for i, t in enumerate((t for t in tables if t["rows"]), 1))


def _facts(run: dict) -> str:
    return ", ".join(f"{k} {run[k]}" for k in ("folder", "preset", "step", "seed", "command") if k in run)


def _latex_table(table: dict, protocol: str, label: str) -> str:
    layout = f"l{'r' * len(table['columns'])}r"
    note = " $+$: better, $-$: worse, where the interval excludes 0." if _has_verdicts(table) else ""
    caption = rf"\caption{{{escaped(table['title'])}. {escaped(protocol)} {escaped(table['caption'])}.{note}}}\label{{tab:{label}}}"
    head = " & ".join([escaped(table["first"]), *map(_latex_head, table["columns"]), "$n$"]) + r" \\"
    lines = list(_latex_rows(table))
    if len(lines) > MAX_FLOAT_ROWS:
        open_ = [r"\begingroup\scriptsize\setlength{\tabcolsep}{3pt}", rf"\begin{{longtable}}{{{layout}}}", rf"{caption}\\"]
        top = [r"\toprule", head, r"\midrule"]
        body = [*top, r"\endfirsthead", *top, r"\endhead", *lines, r"\bottomrule"]
        return "\n".join(["", *open_, *body, r"\end{longtable}", r"\endgroup", ""])
    open_ = [r"\begin{table}[htbp]\centering\scriptsize\setlength{\tabcolsep}{3pt}", caption, rf"\begin{{tabular}}{{{layout}}}"]
    body = [r"\toprule", head, r"\midrule", *lines, r"\bottomrule"]
    return "\n".join(["", *open_, *body, r"\end{tabular}", r"\end{table}", ""])


def _has_verdicts(table: dict) -> bool:
    return any(cell["verdict"] for row in table["rows"] for cell in row["cells"].values())


def _latex_head(column: dict) -> str:
    arrow = {"lower": r" $\downarrow$", "higher": r" $\uparrow$"}.get(column["better"], "")
    return _stacked(escaped(column["label"]) + arrow, escaped(column["unit"]))


def _latex_rows(table: dict):
    group, width = "", len(table["columns"]) + 2
    for i, row in enumerate(table["rows"]):
        if row["group"] != group:
            group = row["group"]
            yield (r"\addlinespace " if i else "") + rf"\multicolumn{{{width}}}{{l}}{{\emph{{{escaped(group)}}}}} \\"
        cells = [_latex_cell(row["cells"].get(c["key"])) for c in table["columns"]]
        yield " & ".join([escaped(row["label"]), *cells, str(row["n"])]) + r" \\"


def _latex_cell(cell: dict | None) -> str:
    if not cell:
        return "--"
    sign = {"better": "$^{+}$", "worse": "$^{-}$"}.get(cell["verdict"], "")
    few = f"$n$ {cell['few']}" if cell["few"] else ""
    return _stacked(escaped(cell["text"]) + sign, escaped(cell["interval"]), few)


def _stacked(first: str, *small: str) -> str:
    """Lines stacked in a cell; in braces, or LaTeX would read the [ of an interval as an option of the line break."""
    return r"\shortstack[r]{" + r"\\".join([first, *(rf"{{\tiny {s}}}" for s in small if s)]) + "}"


def escaped(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(SPECIAL.get(c, c) for c in text)
