"""Means, intervals and paired differences of per-clip scores, over one or several training seeds.

Intervals are bootstrapped over clips. For unseen speakers, who are few, they are t intervals over the means of the speakers: a
bootstrap of four speakers is much too narrow, and would call differences significant that four speakers cannot show.

A row is a dict like a line of clips.csv: clip_id, speaker, case (a change of the input; '' or absent for none), gap_ms, system,
metrics (a number or its text; None, '' or NaN for no value), and optionally start_s and end_s of the gap. An estimate is a dict:
metric, mean, its 95 % interval low to high, median, the number n of values and the number `missing`. "a above b" means that the
whole interval of the paired difference a - b is above 0. Results are deterministic.

Letters: C clips.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
IDENTITY = ("clip_id", "speaker", "case", "gap_ms", "system", "start_s", "end_s")  # identify a row; all other cells are measured


# ---- values ------------------------------------------------------------------------------------------------------------------


def bootstrap_mean(
    values: ArrayLike, n: int = RESAMPLES, seed: int = 0, groups: ArrayLike | None = None
) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its 95 % percentile bootstrap interval (Efron & Tibshirani 1993) from n resamples.

    values (C,), one per clip; NaN is left out (`summarise` counts it). groups (C,): resamples groups (speakers), then the clips of
    each, so that the interval covers other speakers. NaN for no values; ValueError for infinite ones.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or np.isinf(values).any() or (groups is not None and np.shape(groups) != values.shape):
        found = f"{values.shape} values, {np.isinf(values).sum()} of them infinite"
        raise ValueError(f"bootstrap_mean: found {found}, groups {np.shape(groups)}; expected finite values (C,) and a group each")
    known = ~np.isnan(values)
    if not known.any():
        return math.nan, math.nan, math.nan
    parts = [values[known]]
    if groups is not None:
        labels = np.asarray(groups)[known]
        parts = [values[known][labels == label] for label in sorted(set(labels.tolist()))]
    low, high = np.percentile(_resampled_means(parts, n, np.random.default_rng(seed)), [2.5, 97.5])
    return float(values[known].mean()), float(low), float(high)


def _resampled_means(parts: list[np.ndarray], n: int, generator) -> np.ndarray:
    """(n,) means of clips drawn with replacement from parts drawn with replacement."""
    total, count = np.zeros((2, n))
    drawn = generator.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), size=n)  # how often each part is drawn
    for part, times in zip(parts, drawn.T):
        for repeat in range(times.max()):
            rows = np.flatnonzero(times > repeat)
            for some in np.array_split(rows, -(-len(rows) * len(part) // 4_000_000)):  # 32 MB at a time
                total[some] += part[generator.integers(len(part), size=(len(some), len(part)), dtype=np.int32)].sum(1)
            count[rows] += len(part)
    return total / count


def speaker_mean(values: ArrayLike, speakers: Sequence[str]) -> tuple[float, float, float]:
    """(mean, low, high): the mean of values (C,) over clips, and the 95 % t interval over the S speakers' means.

    NaN is left out. `bootstrap_mean` over clips where the values are of one speaker: nothing is known about others then.
    """
    from scipy import special

    values, labels = np.asarray(values, np.float64), np.asarray(speakers)
    if np.isinf(values).any():
        raise ValueError(
            f"speaker_mean: {np.isinf(values).sum()} of {len(values)} values are infinite; expected finite ones or NaN"
        )
    known = ~np.isnan(values)
    names = sorted(set(labels[known].tolist()))
    if len(names) < 2:
        return bootstrap_mean(values)
    means = np.array([values[known & (labels == name)].mean() for name in names])
    half = special.stdtrit(len(names) - 1, 0.975) * means.std(ddof=1) / math.sqrt(len(names))
    return float(values[known].mean()), float(means.mean() - half), float(means.mean() + half)


def paired_difference(
    a: ArrayLike, b: ArrayLike, n: int = RESAMPLES, seed: int = 0, groups: ArrayLike | None = None
) -> tuple[float, float, float]:
    """`bootstrap_mean` of a - b, (C,) each, over clips that have both."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired_difference: found {a.shape} and {b.shape} values, expected the same clips on both sides")
    return bootstrap_mean(a - b, n, seed, groups)


def number(cell: str | float | None) -> float:
    """A cell of clips.csv as a number; NaN for None and ''."""
    return math.nan if cell in (None, "") else float(cell)


# ---- rows of one evaluation --------------------------------------------------------------------------------------------------


def summarise(
    rows: Sequence[dict], metrics: Sequence[str], pairs: Sequence[tuple[str, str]], *, by_speaker: bool = False
) -> dict[str, list[dict]]:
    """{"table": means by case, gap length, system and metric; "paired": a - b for each pair of systems}, with intervals.

    by_speaker: intervals of `speaker_mean`, for unseen speakers. `missing` counts rows (in pairs: shared clips) without a value; a
    metric without any value is left out. ValueError for two rows of the same clip, case, gap length and system. Order: case by
    first appearance, gap length, system by first appearance, metric.
    """
    cells = _cells(rows)
    systems = list(dict.fromkeys(system for _, _, system in cells))
    summary: dict = {"table": [], "paired": []}
    for case, g in _places(cells):
        place = {"case": case, "gap_ms": g}
        for s in systems:
            entries = _estimates(cells.get((case, g, s), {}), None, metrics, by_speaker)
            summary["table"] += [{**place, "system": s, **e} for e in entries]
        for a, b in pairs:
            sides = (cells.get((case, g, s), {}) for s in (a, b))
            summary["paired"] += [{**place, "a": a, "b": b, **e} for e in _estimates(*sides, metrics, by_speaker)]
    return summary


def groups_of_speakers(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """{speaker: its rows, "other speakers": all other rows} where one of several speakers has more than half of the clips, else {}.

    The mean over all clips then says little about the other speakers.
    """
    speaker_of = {row["clip_id"]: row["speaker"] for row in rows}
    speakers = list(speaker_of.values())
    most = max(sorted(set(speakers)), key=speakers.count, default="")
    if not len(speakers) / 2 < speakers.count(most) < len(speakers):
        return {}
    others = [row for row in rows if row["speaker"] != most]
    return {most: [row for row in rows if row["speaker"] == most], "other speakers": others}


def _cells(rows: Sequence[dict]) -> dict[tuple[str, int, str], dict[str, dict]]:
    """(case, gap_ms, system) -> clip_id -> row, in the order of appearance."""
    cells: dict = {}
    for row in rows:
        cell = (row.get("case") or "", int(row["gap_ms"]), row["system"])
        if cells.setdefault(cell, {}).setdefault(row["clip_id"], row) is not row:
            where = ", ".join([row["clip_id"], *filter(None, cell[:1]), f"{cell[1]} ms", cell[2]])
            raise ValueError(f"two rows of {where}; expected one")
    return cells


def _places(cells) -> list[tuple[str, int]]:
    """(case, gap_ms) of cells: cases by first appearance, gap lengths ascending."""
    cases = list(dict.fromkeys(case for case, *_ in cells))
    return sorted({(case, gap_ms) for case, gap_ms, *_ in cells}, key=lambda place: (cases.index(place[0]), place[1]))


def _estimates(rows: dict, minus: dict | None, metrics, by_speaker: bool) -> Iterator[dict]:
    """An estimate of each metric that has values, of rows (clip id -> row), or of their difference from the rows `minus`."""
    clips = sorted(rows if minus is None else rows.keys() & minus.keys())
    speakers = [rows[clip]["speaker"] for clip in clips] if by_speaker else None
    for metric in metrics:
        values = np.array([number(rows[clip].get(metric)) for clip in clips])
        if minus is not None:
            values -= [number(minus[clip].get(metric)) for clip in clips]
        missing = int(np.isnan(values).sum())
        if missing < len(clips):
            mean, low, high = speaker_mean(values, speakers) if by_speaker else bootstrap_mean(values)
            counts = {"median": float(np.nanmedian(values)), "n": len(clips) - missing, "missing": missing}
            yield {"metric": metric, "mean": mean, "low": low, "high": high, **counts}


def reach(pairs: Sequence[dict], metric: str, *, less_is_better: bool = True) -> list[dict]:
    """The gap length up to which a is better than b: {"a", "b", "gap_ms"} for each pair in summarise's "paired", in their order.

    gap_ms is the longest length at which, as at all shorter ones, the whole interval is on the better side of 0; 0 where that is
    not the case at the shortest. Uses only the case ''.
    """
    sign, reached = (-1 if less_is_better else 1), {}
    plain = [e for e in pairs if e["metric"] == metric and not e["case"]]
    for e in sorted(plain, key=lambda e: e["gap_ms"]):
        pair = reached.setdefault((e["a"], e["b"]), {"gap_ms": 0, "ended": False})
        pair["ended"] |= min(sign * e["low"], sign * e["high"]) <= 0
        pair["gap_ms"] = pair["gap_ms"] if pair["ended"] else e["gap_ms"]
    pairs_in_order = dict.fromkeys((e["a"], e["b"]) for e in plain)
    return [{"a": a, "b": b, "gap_ms": reached[a, b]["gap_ms"]} for a, b in pairs_in_order]


# ---- rows of several evaluations ---------------------------------------------------------------------------------------------


def paired(rows_a: Sequence[dict], rows_b: Sequence[dict], metrics: Sequence[str], *, by_speaker: bool = False) -> list[dict]:
    """a - b for every case, gap length and metric that both have, over their common clips: estimates with case, gap_ms, unshared.

    rows_a and rows_b belong to one system each, possibly of two evaluations; the systems' names do not matter. `unshared` counts
    clips that only one side has. ValueError for two rows of the same clip, case and gap length, for a clip whose gap differs
    between the sides, and where they have no clip in common.
    """
    a, b = (_of_one_system(rows, name) for rows, name in ((rows_a, "a"), (rows_b, "b")))
    if not any(a[place].keys() & b.get(place, {}).keys() for place in a):
        raise ValueError(f"rows of {sorted(a)} and {sorted(b)} (case, gap_ms) share no clip; compare evaluations of the same split")
    estimates = []
    for case, g in (place for place in a if place in b):
        rows, minus = a[case, g], b[case, g]
        for clip in sorted(rows.keys() & minus.keys()):
            _check_same(rows[clip], minus[clip])
        unshared = {"unshared": len(rows.keys() ^ minus.keys())}
        estimates += [{"case": case, "gap_ms": g, **e, **unshared} for e in _estimates(rows, minus, metrics, by_speaker)]
    return estimates


def _of_one_system(rows: Sequence[dict], name: str) -> dict[tuple[str, int], dict[str, dict]]:
    """(case, gap_ms) -> clip_id -> row, of rows of one system, ordered as in `summarise`."""
    if len(systems := {row["system"] for row in rows}) > 1:
        raise ValueError(f"rows {name} contain {len(systems)} systems ({', '.join(sorted(systems))}); expected one")
    cells = {(case, gap_ms): clips for (case, gap_ms, _), clips in _cells(rows).items()}
    return {place: cells[place] for place in _places(cells)}


def _check_same(row: dict, other: dict) -> None:
    """ValueError where two rows of a clip differ in gap or speaker."""
    for key in ("start_s", "end_s", "speaker"):
        if str(row.get(key, "")) != str(other.get(key, "")):
            which = f"{row['clip_id']}, {row['gap_ms']} ms"
            raise ValueError(f"{which}: {key} is {row.get(key)} on one side, {other.get(key)} on the other; compare the same gaps")


def mean_rows(runs: Sequence[Sequence[dict]], metrics: Sequence[str]) -> list[dict]:
    """Means over several training seeds of one system: one row per clip, case and gap length.

    A metric is NaN where any seed lacks it. For `summarise`, and for `paired` between systems of several seeds. ValueError unless
    all seeds have the same clips, gaps and speakers, and rows of one system each.
    """
    seeds = [_of_one_system(rows, f"of run {i + 1}") for i, rows in enumerate(runs)]
    if not seeds or any({p: c.keys() for p, c in s.items()} != {p: c.keys() for p, c in seeds[0].items()} for s in seeds):
        sizes = ", ".join(str(sum(map(len, s.values()))) for s in seeds) or "none"
        raise ValueError(f"rows of {len(seeds)} runs: {sizes}; expected one run or more, all with the same clips, cases and gaps")
    averaged = []
    for place, clips in seeds[0].items():
        for clip, first in clips.items():
            same = [s[place][clip] for s in seeds]
            for row in same[1:]:
                _check_same(first, row)
            means = {m: float(np.mean([number(row.get(m)) for row in same])) for m in metrics}
            averaged.append({k: first[k] for k in IDENTITY if k in first} | means)
    return averaged


def over_seeds(runs: Sequence[Sequence[dict]], metrics: Sequence[str], *, by_speaker: bool = False) -> list[dict]:
    """Estimates of `mean_rows`, with case, gap_ms, the number of seeds, and the least and the greatest mean of a single seed.

    The interval is over clips, of their means over seeds: it covers other clips, not other seeds, for which a handful of seeds is
    too few; `least` to `most` shows how far the seeds lie apart. Uses the clips for which every seed has a value.
    """
    means, estimates = _of_one_system(mean_rows(runs, metrics), ""), []
    seeds = [_of_one_system(rows, "") for rows in runs]
    for (case, g), clips in means.items():
        for e in _estimates(clips, None, metrics, by_speaker):
            known = [clip for clip in sorted(clips) if not math.isnan(clips[clip][e["metric"]])]
            by_seed = [float(np.mean([number(s[case, g][clip][e["metric"]]) for clip in known])) for s in seeds]
            estimates.append({"case": case, "gap_ms": g, **e, "seeds": len(seeds), "least": min(by_seed), "most": max(by_seed)})
    return estimates
