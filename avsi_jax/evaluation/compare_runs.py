"""Merges evaluations of several runs into one: their rows on common clips and gaps, and differences from the first run.

Only evaluations with the same protocol, split, suite and score rate can be compared.
"""

from __future__ import annotations

import datetime
from collections import Counter

from avsi_jax.evaluation import bootstrap, table_export, tables
from avsi_jax.evaluation.tables import Evaluation

SAME = ("protocol", "split", "suite", "metric_rate", "fingerprint", "judge")


def merged(evaluations: list[Evaluation], command: str = "") -> Evaluation:
    """All runs as systems of one evaluation, in the given order; reference rows are those of the first.

    ValueError names the first evaluation that cannot be compared.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        _check_comparable(first, other)
    names = distinct_names(evaluations)
    own = {name: {_place(r): r for r in e.rows if r["kind"] == "system"} for name, e in zip(names, evaluations, strict=True)}
    shared = set.intersection(*map(set, own.values()))
    _check_gaps(evaluations, own, shared)
    rows = [r for r in first.rows if r["kind"] in tables.REFERENCES and _place(r) in shared]
    rows += [r | {"system": name} for name, by_place in own.items() for place, r in by_place.items() if place in shared]
    by_speaker = bool(first.summary.get("by_speaker"))
    pairs = [(name, names[0]) for name in names[1:]]
    estimates = bootstrap.summarise(rows, tuple(tables.METRICS), pairs, by_speaker=by_speaker)
    cases = {(case, gap_ms) for _, case, gap_ms in shared}
    kept = [c for c in first.summary["cases"] if (c["name"], str(c["gap_ms"])) in cases]
    references = [s for s in first.summary["systems"] if s["kind"] in tables.REFERENCES]
    common = ("protocol", "protocol_description", "split", "suite", "metric_rate", "families", "judge", "fingerprint")
    summary = {k: first.summary[k] for k in common if k in first.summary} | {
        "title": f"{tables.listed(names)} on {first.summary['split']}, protocol {first.summary['protocol']}",
        "system": tables.listed(names),
        "command": command,
        "date": datetime.date.today().isoformat(),
        "by_speaker": by_speaker,
        "intervals": table_export.INTERVALS[by_speaker],
        "num_clips": len({clip for clip, _, _ in shared}),
        "left_out": len(set.union(*map(set, own.values())) - shared),
        "systems": tables.in_order([*references, *({"name": n, "kind": "system"} for n in names)]),
        "gap_ms": sorted({c["gap_ms"] for c in kept}),
        "cases": kept,
        "runs": {n: _facts(e) for n, e in zip(names, evaluations, strict=True)},
        "reach": bootstrap.reach(estimates["paired"], "gap_l1_db"),
        **estimates,
    }
    return Evaluation(first.folder, summary, rows)


def distinct_names(evaluations: list[Evaluation]) -> list[str]:
    """Each run's system name; with the name of its run directory, then a number, where names would be equal."""
    systems = [e.summary["system"] for e in evaluations]
    workdirs = [f"{s} ({e.folder.resolve().parent.parent.name})" for s, e in zip(systems, evaluations, strict=True)]
    names = [w if Counter(systems)[s] > 1 else s for s, w in zip(systems, workdirs, strict=True)]
    return [f"{n} {i}" if Counter(names)[n] > 1 else n for i, n in enumerate(names, 1)]


def _place(row: dict) -> tuple[str, str, str]:
    return row["clip_id"], row["case"], row["gap_ms"]


def _check_comparable(first: Evaluation, other: Evaluation) -> None:
    for key in SAME:
        expected, found = (e.summary.get(key) for e in (first, other))
        if expected and found and expected != found:
            raise ValueError(f"{other.folder}: found {key} {found}, expected {expected} as in {first.folder}")


def _check_gaps(evaluations: list[Evaluation], own: dict, shared: set) -> None:
    """ValueError unless the runs share clips, with the same gaps."""
    head, *others = own.values()
    if not shared:
        raise ValueError(
            f"{evaluations[0].folder} and the others have no clip and gap in common; expected evaluations of the same clips"
        )
    for evaluation, rows in zip(evaluations[1:], others, strict=True):
        if different := sorted(p for p in shared if head[p]["gaps_s"] != rows[p]["gaps_s"]):
            clip, case, gap_ms = different[0]
            raise ValueError(
                f"{evaluation.folder}: {clip}{', ' * bool(case)}{case} at {gap_ms} ms has its gap at "
                f"{rows[different[0]]['gaps_s']} s, expected {head[different[0]]['gaps_s']}; evaluate it again"
            )


def _facts(evaluation: Evaluation) -> dict:
    summary = evaluation.summary
    return {"folder": str(evaluation.folder), **{k: summary[k] for k in ("date", "command")}, **_run(summary)}


def _run(summary: dict) -> dict:
    return summary.get("runs", {}).get(summary["system"], {})
