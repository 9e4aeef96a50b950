"""Curves of an evaluation with interval bands, as PNG data URIs for the report.

Systems differ in colour (Okabe & Ito 2008), dashes and marks, each of which alone identifies them. Every image names its protocol,
so that it can be used outside the report.
"""

from __future__ import annotations

from typing import NamedTuple

from avsi_jax.evaluation import tables
from avsi_jax.media import plots

SPARE = (  # styles for further systems of the same kind
    ("#d55e00", (5, 1.5), "s"), ("#000000", (2, 1), "^"), ("#8c6d1f", (9, 2, 2, 2), "D"), ("#7a4fa3", (4, 1, 1, 1, 1, 1), "v"),
    ("#0072b2", (3, 3), "^"), ("#d55e00", (), "D"), ("#000000", (), "v"), ("#8c6d1f", (3, 1), "o"), ("#7a4fa3", (), "s"),
)  # fmt: skip
MARKS = {  # the marks as SVG paths for the legend, centred at (22, 6)
    "o": "M18.5 6a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z", "s": "M18.5 2.5h7v7h-7z", "^": "M22 2l4 7h-8z", "v": "M22 10l4-7h-8z",
    "D": "M22 2l4 4l-4 4l-4-4z",
}  # fmt: skip
CURVES = ("gap_l1_db", "stoi", "estoi", "stoi_gap", "pesq_nb", "pesq_wb", "wer_gap")
CHANGE_CURVES = ("gap_l1_db", "estoi", "wer_gap")  # for every change of the video or the audio
OVER_GAP = {"no_video": "audio only", "whole_clip": "video only"}  # changes shown as lines over gap length, not as own curves


class Curve(NamedTuple):
    """One line of a figure."""

    name: str
    style: dict  # from `styled`
    points: dict  # position -> metric -> entry


# ---- line styles -----------------------------------------------------------------------------------------------------------------


def styled(systems: list[dict]) -> list[dict]:
    """Systems, each with the colour, dashes, mark and width of its line."""
    used, spare, styles = set(), 0, []
    for system in systems:
        colour, dashes, mark = plots.LINE_STYLES[system["kind"]]
        if system["kind"] in used:
            (colour, dashes, mark), spare = SPARE[spare % len(SPARE)], spare + 1
        used.add(system["kind"])
        width = 2.2 if system["kind"] == "system" else 1.5
        styles.append(system | {"colour": colour, "dashes": dashes, "mark": mark, "path": MARKS[mark], "width": width})
    return styles


# ---- curves ----------------------------------------------------------------------------------------------------------------------


def sections(summary: dict, systems: list[dict], label: str) -> list[dict]:
    """[{"title", "legend", "figures": [{"metric", "image", "alt", "above"}]}]: over gap length, then over each change.

    systems: from `styled`; label: text in every image; above: names of systems too far above the others to be drawn.
    """
    entries = tables.by_place(summary["table"], "system")
    made = [_over_gap(summary, systems, entries, label)]
    for (gap_ms, family), cases in tables.varied(summary).items():
        if family not in OVER_GAP and len(cases) > 1:
            made.append(_over_change(summary, systems, entries, label, gap_ms, family, cases))
    return [s for s in made if s["figures"]]


def _over_gap(summary, systems, entries, label) -> dict:
    lengths = [c["gap_ms"] for c in tables.plain(summary)]
    full = [(c["name"], c["gap_ms"]) for c in summary["cases"] if c["family"] == "whole_clip"]  # for references a gap like others
    places = {
        s["name"]: ([("", g) for g in lengths] + full * (s["kind"] in tables.REFERENCES), s["name"], s["kind"]) for s in systems
    }
    for family, name in OVER_GAP.items():
        if cases := [(c["name"], c["gap_ms"]) for c in summary["cases"] if c["family"] == family]:
            places |= {f"{s['name']}, {name}": (cases, s["name"], s["kind"]) for s in systems if s["kind"] == "system"}
    styles = styled([{"name": name, "kind": kind} for name, (_, _, kind) in places.items()])
    points = [{g: entries[case, g, system] for case, g in cases} for cases, system, _ in places.values()]
    lines = [Curve(style["name"], style, line_points) for style, line_points in zip(styles, points, strict=True)]
    title = "By gap length" + (" and streams used" if len(lines) > len(systems) else "")
    ticks = {x: str(x) for line in lines for x in line.points}
    if len(ticks) < 2:
        return _section(title, "", [], {}, (), label)
    return _section(title, "gap, ms", lines, dict(sorted(ticks.items())), CURVES, label)


def _over_change(summary, systems, entries, label, gap_ms: int, family: str, cases: list[dict]) -> dict:
    """Curves over the values of a family. References that the change does not affect have no rows: theirs are those without it."""
    position = {c["value"]: (c["value"] or 0) if family == "shift_ms" else i for i, c in enumerate(cases)}
    lines = []
    for system in systems:
        points = {position[c["value"]]: entries[c["name"], gap_ms, system["name"]] for c in cases}
        if system["kind"] in tables.REFERENCES:
            points = {x: own or entries["", gap_ms, system["name"]] for x, own in points.items()}
        lines.append(Curve(system["name"], system, points))
    ticks = {x: tables.value_label(family, value) for value, x in sorted(position.items(), key=lambda item: item[1])}
    name = summary["families"][family]
    return _section(f"{name[0].upper()}{name[1:]}; gap of {gap_ms} ms", name, lines, ticks, CHANGE_CURVES, label)


def _section(title: str, xlabel: str, lines: list[Curve], ticks: dict, metrics, label: str) -> dict:
    drawn = [line for line in lines if any(line.points.values())]
    figures = []
    for metric in metrics:
        if any(metric in entries for line in drawn for entries in line.points.values()):
            alt = f"{tables.METRICS[metric].label}, {title[0].lower()}{title[1:]}; the numbers are in the tables"
            inside = [line for line in drawn if not _is_far_above(line, drawn, metric)]
            above = [line.name for line in drawn if line not in inside]
            image = _curve(xlabel, inside, ticks, metric, label)
            figures.append({"metric": metric, "image": image, "alt": alt, "above": tables.listed(above) if above else ""})
    return {"title": title, "legend": [{"name": line.name, **line.style} for line in drawn], "figures": figures}


def _is_far_above(line: Curve, lines: list[Curve], metric: str) -> bool:
    """Whether a line is that of masked audio and so high that it would squeeze all others: silence is 30 dB from speech."""
    least, most = (
        [e[metric]["mean"] for other in lines for e in other.points.values() if metric in e and (other is line) == own]
        for own in (True, False)
    )
    return line.style["kind"] == "masked" and bool(least and most) and min(least) > 1.2 * max(most)


def _curve(xlabel: str, lines: list[Curve], ticks: dict, metric: str, label: str) -> str:
    """One image: means with interval bands, a line per system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.add_subplot(ylabel=", ".join(filter(None, tables.METRICS[metric][:2])))
    axes.set_xlabel(xlabel, fontsize=9 if len(xlabel) > 40 else 10)
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=8 if len(ticks) > 6 else 9)
    for line in lines:
        points = [(x, entries[metric]) for x, entries in sorted(line.points.items()) if metric in entries]
        _line(axes, *zip(*points), line.style) if points else None
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(label, fontsize=7, color="#59626d", loc="right")
    return plots.figure_uri(figure, 160)


def _line(axes, x, entries, style: dict) -> None:
    mean, low, high = ([e[k] for e in entries] for k in ("mean", "low", "high"))
    colour, dashes = style["colour"], (0, style["dashes"]) if style["dashes"] else "solid"
    axes.plot(x, mean, color=colour, linestyle=dashes, linewidth=style["width"], marker=style["mark"], markersize=4)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.vlines(x, low, high, color=colour, linewidth=0.8)  # what is left of the band at a single point
