"""Evaluations of several runs -> one: every run's rows on the gaps they share, the first's references, differences from it.

Only runs with the same protocol, split, suite and rate of scoring are put side by side; numbers of different ones don't compare.
"""

from __future__ import annotations

import datetime
from collections import Counter

from avsi_jax.evaluation import bootstrap, tables
from avsi_jax.evaluation.tables import Evaluation

ALIKE = ("protocol", "split", "suite", "metric_rate", "fingerprint", "judge")


def merged(evaluations: list[Evaluation], command: str = "") -> Evaluation:
    """All runs as systems of one evaluation, in the order given. ValueError where they can't be compared, naming the first that
    can't.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        _check_alike(first, other)
    names = distinct_names(evaluations)
    own = {name: {_place(r): r for r in e.rows if r["kind"] == "system"} for name, e in zip(names, evaluations, strict=True)}
    shared = set.intersection(*map(set, own.values()))
    _check_gaps(evaluations, own, shared)
    rows = [r for r in first.rows if r["kind"] in tables.REFERENCES and _place(r) in shared]
    rows += [r | {"system": name} for name, of in own.items() for place, r in of.items() if place in shared]
    by_speaker = bool(first.summary.get("by_speaker"))
    pairs = [(name, names[0]) for name in names[1:]]
    found = bootstrap.summarise(rows, tuple(tables.METRICS), pairs, by_speaker=by_speaker)
    cases = {(case, gap_ms) for _, case, gap_ms in shared}
    kept = [c for c in first.summary["cases"] if (c["name"], str(c["gap_ms"])) in cases]
    references = [s for s in first.summary["systems"] if s["kind"] in tables.REFERENCES]
    said = ("protocol", "protocol_said", "split", "suite", "metric_rate", "families", "judge", "fingerprint")
    summary = {k: first.summary[k] for k in said if k in first.summary} | {
        "title": f"{tables.listed(names)} on {first.summary['split']}, protocol {first.summary['protocol']}",
        "system": tables.listed(names),
        "command": command,
        "date": datetime.date.today().isoformat(),
        "by_speaker": by_speaker,
        "num_clips": len({clip for clip, _, _ in shared}),
        "left_out": len(set.union(*map(set, own.values())) - shared),
        "systems": tables.in_order([*references, *({"name": n, "kind": "system"} for n in names)]),
        "gap_ms": sorted({c["gap_ms"] for c in kept}),
        "cases": kept,
        "runs": {n: _facts(e) for n, e in zip(names, evaluations, strict=True)},
        "reach": bootstrap.reach(found["paired"], "gap_l1_db"),
        **found,
    }
    return Evaluation(first.folder, summary, rows)


def distinct_names(evaluations: list[Evaluation]) -> list[str]:
    """Each run's system; where several have the same, with its workdir's name; where that is no help, its number."""
    systems = [e.summary["system"] for e in evaluations]
    workdirs = [f"{s} ({e.folder.resolve().parent.parent.name})" for s, e in zip(systems, evaluations, strict=True)]
    names = [w if Counter(systems)[s] > 1 else s for s, w in zip(systems, workdirs, strict=True)]
    return [f"{n} {i}" if Counter(names)[n] > 1 else n for i, n in enumerate(names, 1)]


def _place(row: dict) -> tuple[str, str, str]:
    return row["clip_id"], row["case"], row["gap_ms"]


def _check_alike(first: Evaluation, other: Evaluation) -> None:
    for key in ALIKE:
        expected, found = (e.summary.get(key) for e in (first, other))
        if expected and found and expected != found:
            raise ValueError(f"{other.folder}: found {key} {found}, expected {expected} as in {first.folder}")


def _check_gaps(evaluations: list[Evaluation], own: dict, shared: set) -> None:
    """Clips, and the same gaps in them."""
    head, *others = own.values()
    if not shared:
        raise ValueError(f"{evaluations[0].folder} and the others share no clip and gap; expected evaluations of the same clips")
    for evaluation, of in zip(evaluations[1:], others, strict=True):
        if unlike := sorted(p for p in shared if head[p]["gaps_s"] != of[p]["gaps_s"]):
            clip, case, gap_ms = unlike[0]
            raise ValueError(
                f"{evaluation.folder}: {clip}{', ' * bool(case)}{case} at {gap_ms} ms has its gap at {of[unlike[0]]['gaps_s']} s, "
                f"expected {head[unlike[0]]['gaps_s']}; evaluate it again"
            )


def _facts(evaluation: Evaluation) -> dict:
    summary = evaluation.summary
    return {"folder": str(evaluation.folder), **{k: summary[k] for k in ("date", "command")}, **_run(summary)}


def _run(summary: dict) -> dict:
    return summary.get("runs", {}).get(summary["system"], {})
