"""docs/results.md from what benchmarks/results/results.py keeps: every cell a mean with its interval, worked out from the clips' scores."""

from __future__ import annotations

import json

from benchmarks.results import results
from benchmarks.results.results import AT_PAPER, BEST, HOME, PROTOCOLS, REFERENCES, RUNS, SEEDS, SPLITS, TWINS

LABELS = {
    "gap_l1_db": ("Log-mel error in the gap of the restored waveform, dB (lower is better)", 2),
    "stoi_gap": ("STOI of the gap and 200 ms on both sides (higher is better)", 3),
    "wer_gap": ("Share of the words that touch the gap which a recogniser of Grid hears wrong (lower is better)", 3),
    "pesq_nb": ("PESQ, narrow band at 8 kHz, whole clip (MOS-LQO; higher is better)", 2),
    "pesq_wb": ("PESQ, wide band at 16 kHz, whole clip (MOS-LQO; another scale; higher is better)", 2),
    "stoi": ("STOI, whole clip (higher is better)", 3),
    "estoi": ("ESTOI, whole clip (higher is better)", 3),
}
OF_PROTOCOL = {
    "waveform": ("gap_l1_db", "stoi_gap", "wer_gap", "pesq_nb", "stoi", "estoi"),
    "peer": ("pesq_wb", "stoi"),
    "paper": ("pesq_nb", "stoi", "gap_l1_db"),
}
ERROR = ("gap_l1_db",)  # what seeds and pairs are compared by
TITLES = {
    "waveform": "Samples lost inside the words (protocol `waveform`)",
    "peer": "As the peers' table (protocol `peer`)",
    "paper": "As the paper's code (protocol `paper`)",
}


def page() -> str:
    """All of it; what isn't trained or evaluated yet is named and left out."""
    there = [name for name in RUNS if (HOME / f"{name}.json").is_file()]
    parts = ["# Results\n", (HOME / "notes.md").read_text().strip() + "\n"]
    if missing := [name for name in RUNS if name not in there]:
        parts.append(f"Not trained yet (`make table` does it): {', '.join(missing)}.\n")
    if lacking := {name: lacks for name in there if (lacks := results.missing(name))}:
        told = "; ".join(f"{name} ({', '.join(lacks)})" for name, lacks in lacking.items())
        parts.append(f"Not evaluated yet: {told}.\n")
    for protocol in PROTOCOLS:
        for split, title in SPLITS.items():
            if section := of_split(there, protocol, split):
                parts += [f"## {TITLES[protocol]}: {title}\n", *section]
    parts += ["## Trainings and evaluations\n", trainings(there)]
    return "\n".join(parts).rstrip() + "\n"


def of_split(there: list[str], protocol: str, split: str) -> list[str]:
    """Tables of one protocol on one split: at preset `paper`, other presets, differences, seeds, speakers."""
    paper = [n for n in AT_PAPER if n in there]
    rows = chosen(["references-paper", *paper], protocol, split)
    if not rows:
        return []
    unseen, lengths = split == "test", sorted({int(r["gap_ms"]) for r in rows})
    pairs = [(a, b) for a, b in TWINS.items() if a in paper and b in paper]
    pairs += [(a, f"{a}, another clip's video") for a in TWINS if a in paper]
    pairs += [(BEST, other) for other in paper if BEST in paper and other != BEST and (BEST, other) not in pairs]
    means = summarised(rows, [], unseen, OF_PROTOCOL[protocol])["table"]
    clips = len({r["clip_id"] for r in rows})
    unit = "speakers, then clips" if unseen else "clips"
    out = [f"{clips} clips; mean [95 % interval, bootstrap over {unit}].\n"]
    shown = [REFERENCES[0], REFERENCES[1], *paper, REFERENCES[2]]
    for metric in OF_PROTOCOL[protocol]:
        out += table(means, metric, shown, lengths)
    if protocol == "waveform":
        out += differences(rows, pairs, lengths, unseen)
        out += seeds(there, protocol, split, lengths, unseen)
        if unseen:
            out += by_speaker(rows, shown, lengths)
    for preset, names in others(there).items():
        more = chosen([f"references-{preset}", *names], protocol, split)
        if more:
            out.append(f"### At preset `{preset}`\n")
            metrics = list(dict.fromkeys((*OF_PROTOCOL[protocol], "pesq_wb")))
            means = summarised(more, [], unseen, metrics)["table"]
            for metric in [m for m in metrics if any(e["metric"] == m for e in means)]:
                out += table(means, metric, [*REFERENCES[:2], *names, REFERENCES[2]], lengths)
    return out


def others(there: list[str]) -> dict[str, list[str]]:
    """preset -> runs, of those that aren't at preset `paper`."""
    found: dict[str, list[str]] = {}
    for name in there:
        preset = json.loads((HOME / f"{name}.json").read_text())["config"]["preset"]
        if preset != "paper":
            found.setdefault(preset, []).append(name)
    return found


def chosen(names: list[str], protocol: str, split: str) -> list[dict]:
    return [r for n in names for r in results.read(n) if (r["protocol"], r["split"]) == (protocol, split)]


def summarised(rows: list[dict], pairs, by_speaker: bool, metrics) -> dict:
    from avsi_jax.evaluation import bootstrap

    return bootstrap.summarise(rows, list(metrics), pairs, by_speaker=by_speaker)


def table(entries: list[dict], metric: str, shown: list[str], lengths: list[int]) -> list[str]:
    """A row a system, a column a length; nothing where no system has the metric."""
    cell = {(e["gap_ms"], e["system"]): e for e in entries if e["metric"] == metric}
    shown = [s for s in shown if any((g, s) in cell for g in lengths)]
    if not shown:
        return []
    title, digits = LABELS[metric]
    heads = [f"{g} ms" for g in lengths] if len(lengths) > 1 else ["1 to 8 gaps"]
    out = [f"**{title}**\n", row(["system", *heads]), row(["---"] + ["---:"] * len(lengths))]
    return [*out, *(row([s, *(show(cell.get((g, s)), digits) for g in lengths)]) for s in shown), ""]


def differences(rows: list[dict], pairs, lengths: list[int], unseen: bool, what: str = "clip by clip") -> list[str]:
    """How much less error in the gap the first of each pair has, on the same clips: above 0 is better."""
    cell = {(e["gap_ms"], e["a"], e["b"]): flipped(e) for e in summarised(rows, pairs, unseen, ERROR)["paired"]}
    if not cell:
        return []
    out = [f"**Gain in the gap, dB, {what} (above 0: the first is better)**\n"]
    out += [row(["first", "over", *(f"{g} ms" for g in lengths)]), row(["---"] * 2 + ["---:"] * len(lengths))]
    return [*out, *(row([a, b, *(show(cell.get((g, a, b)), 2) for g in lengths)]) for a, b in pairs), ""]


def seeds(there: list[str], protocol: str, split: str, lengths: list[int], unseen: bool) -> list[str]:
    """The error in the gap of each seed's run that is there, where one run is not all, and of their mean clip by clip."""
    out, means = [], []
    for name, wanted in SEEDS.items():
        runs = [run for run in wanted if run in there]
        if len(runs) < 2:
            continue
        rows = [r for r in chosen(runs, protocol, split) if r["kind"] == "system"]
        rows += (own := averaged(rows, len(runs), mean := f"mean of the {len(runs)}"))
        entries = summarised(rows, [], unseen, ERROR)["table"]
        of = "" if runs == wanted else f" ({len(runs)} of {len(wanted)} so far)"
        out += [f"**{name}, seed by seed{of}**\n", *table(entries, "gap_l1_db", [*runs, mean], lengths)[1:]]
        means += [r | {"system": f"{name}, {mean}"} for r in own]
    best = next((r["system"] for r in means if r["system"].startswith(BEST)), "")
    rows = means + [r for r in chosen([n for n in AT_PAPER if n in there], protocol, split) if r["kind"] == "system"]
    once = [n for n in AT_PAPER if n in there and n not in SEEDS]
    pairs = [(best, other) for other in (*once, *sorted({r["system"] for r in means} - {best})) if best]
    if pairs:
        out += differences(rows, pairs, lengths, unseen, "clip by clip, seeds averaged")
    return out


def averaged(rows: list[dict], count: int, name: str) -> list[dict]:
    """Rows of the mean over `count` runs, of every clip and length that all of them have."""
    from avsi_jax.evaluation.bootstrap import number

    same: dict = {}
    for r in rows:
        same.setdefault((r["clip_id"], r["gap_ms"]), []).append(r)
    full = [group for group in same.values() if len(group) == count]
    return [{**g[0], "system": name, **{m: sum(number(r[m]) for r in g) / count for m in LABELS}} for g in full]


def by_speaker(rows: list[dict], shown: list[str], lengths: list[int]) -> list[str]:
    """Mean error in the gap over all lengths, a column a speaker."""
    speakers = sorted({r["speaker"] for r in rows}, key=lambda s: int(s[1:]))
    clips = {s: len({r["clip_id"] for r in rows if r["speaker"] == s}) for s in speakers}
    out = [f"**Each speaker: log-mel error in the gap, dB, all lengths of {lengths[0]} to {lengths[-1]} ms**\n"]
    out += [row(["system", *(f"{s} ({clips[s]} clips)" for s in speakers)]), row(["---"] + ["---:"] * len(speakers))]
    for system in shown:
        mine = [r for r in rows if r["system"] == system and r["gap_l1_db"]]
        means = [[float(r["gap_l1_db"]) for r in mine if r["speaker"] == s] for s in speakers]
        out.append(row([system, *(f"{sum(m) / len(m):.2f}" if m else "" for m in means)]))
    return [*out, ""]


def flipped(entry: dict) -> dict:
    """a - b as b - a."""
    return {**entry, "mean": -entry["mean"], "low": -entry["high"], "high": -entry["low"]}


def show(entry: dict | None, digits: int) -> str:
    if entry is None:
        return ""
    missing = f" ({entry['missing']} not computable)" if entry.get("missing") else ""
    return f"{entry['mean']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]{missing}"


def row(cells: list) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def trainings(there: list[str]) -> str:
    """One row a run: what it took, and how it was evaluated."""
    heads = ["run", "config", "seed", "preset", "parameters", "clips", "epochs", "hours", "steps/s", "on", "evaluated in, s"]
    out = [row(heads), row(["---"] * 4 + ["---:"] * 5 + ["---", "---"])]
    for name in there:
        t = json.loads((HOME / f"{name}.json").read_text())
        spent = "; ".join(f"{k} {e['seconds']['all']:.0f} ({e['references']} references)" for k, e in t["evaluations"].items())
        c = t["config"]
        facts = [f"{t['parameters']:,}", t["clips"]["train"], t["epochs"], t["hours"], t["steps_per_s"]]
        device = f"{len(t['devices'])} x {t['devices'][0]}"
        out.append(row([name, RUNS[name][0], c["seed"], c["preset"], *facts, device, spent]))
    common = " ".join(f"--config.{k}={v}" for k, v in results.COMMON.items())
    told = "    avsi-train --config=CONFIG --workdir=RUN --config.data_dir=DATA \\"
    out += ["", "Every run:", "", told, f"        {common} FIELDS", ""]
    out += [row(["run", "CONFIG", "FIELDS"]), row(["---"] * 3)]
    out += [row([n, c, " ".join(f"`--config.{k}={v}`" for k, v in f.items())]) for n, (c, f) in RUNS.items()]
    commands = [json.loads((HOME / f"{n}.json").read_text())["evaluations"] for n in there[:1]]
    out += ["", "Evaluated by, e.g.:", "", *(f"    {e['command']}" for c in commands for e in c.values()), ""]
    return "\n".join(out)
