"""The text of docs/results.md and its CSV tables, computed from the per-clip scores in docs/results/.

The page shows the headline protocol and is made from the CSV tables, which hold everything.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from avsi_jax.evaluation import bootstrap
from benchmarks.results.runs import (
    AUDIO_ONLY_TWINS,
    BEST,
    COMMON,
    FOLDER,
    PROTOCOLS,
    REFERENCES,
    RUNS,
    SCORES,
    SEEDS,
    SPLITS,
    facts_of,
    missing_evaluations,
    read_scores,
)
from benchmarks.results.tables import interval, markdown_table, mean, negated, read_csv, write_csv

ERROR = "gap_l1_db"
HEADLINE = "waveform"
MEANS_METRICS = (ERROR, "stoi_gap", "wer_gap", "pesq_nb", "pesq_wb", "stoi", "estoi")
DIGITS = 6  # decimals in the CSV files
METRICS = {  # shown on the page: heading, digits
    ERROR: ("Log-mel error in the gap of the restored waveform, dB (lower is better)", 2),
    "stoi": ("STOI, whole clip (higher is better)", 3),
    "pesq_nb": ("PESQ, narrow band at 8 kHz, whole clip (MOS-LQO; higher is better)", 2),
}
OTHER_PRESET_METRICS = {ERROR: ("error, dB", 2), "stoi": ("STOI", 3), "pesq_wb": ("PESQ wb", 2)}
OTHER_PRESET_MS = (300, 900, 1500)
LABELS = {"oracle_mel": "oracle mel"}
MAIN_SPEAKER = "s1"  # of most clips of the seen speakers


class Tables(NamedTuple):
    """The CSV tables, each a list of rows of the same keys."""

    means: list[dict]
    gains: list[dict]
    seeds: list[dict]
    speakers: list[dict]
    trainings: list[dict]

    def write(self, folder: Path) -> None:
        """Writes means.csv, gains.csv, ... into `folder`."""
        for name, rows in self._asdict().items():
            write_csv(folder / f"{name}.csv", rows, DIGITS)

    @classmethod
    def read(cls, folder: Path) -> Tables:
        """The tables that `write` has written."""
        return cls(*(read_csv(folder / f"{name}.csv") for name in cls._fields))

    def headline(self, split: str, preset: str, metric: str) -> dict[tuple[str, int], dict]:
        """(system, gap_ms) -> estimate, of the headline protocol."""
        chosen = {"protocol": HEADLINE, "split": split, "preset": preset, "metric": metric}
        return {(e["system"], e["gap_ms"]): e for e in self.means if chosen.items() <= e.items()}


def trained_runs() -> list[str]:
    """The runs that have a committed summary."""
    return [name for name in RUNS if facts_of(name)]


def runs_by_preset() -> dict[str, list[str]]:
    """preset -> trained runs, without the further seeds of a system."""
    further_seeds = [name for seeds in SEEDS.values() for name in seeds[1:]]
    presets: dict[str, list[str]] = {}
    for name in trained_runs():
        if name not in further_seeds:
            presets.setdefault(facts_of(name)["config"]["preset"], []).append(name)
    return presets


def compute() -> Tables:
    """All tables, from the scores in docs/results/ (half a minute)."""
    means = [e for protocol in PROTOCOLS for split in SPLITS for e in means_of(protocol, split)]
    gains, seeds, speakers = ([e for split in SPLITS for e in rows_of(split)] for rows_of in (gains_of, seeds_of, speakers_of))
    return Tables(means, gains, seeds, speakers, trainings())


def means_of(protocol: str, split: str) -> list[dict]:
    """Estimates of every preset, system, gap length and metric."""
    rows = []
    for preset, names in runs_by_preset().items():
        scores = read_scores([f"references-{preset}", *names], protocol, split)
        for e in bootstrap.summarise(scores, MEANS_METRICS, [], by_speaker=split == "test")["table"]:
            rows.append({"protocol": protocol, "split": split, "preset": preset} | {k: v for k, v in e.items() if k != "case"})
    return rows


def gains_of(split: str) -> list[dict]:
    """Paired differences of the error in the gap at preset `paper`; above 0 means that `first` is better than `over`."""
    present = runs_by_preset()["paper"]
    scores = read_scores(present, HEADLINE, split)
    pairs = [(a, b) for a, b in AUDIO_ONLY_TWINS.items() if a in present and b in present]
    pairs += [(a, f"{a}, another clip's video") for a in AUDIO_ONLY_TWINS if a in present]
    pairs += [(BEST, b) for b in present if BEST in present and b != BEST and (BEST, b) not in pairs]
    averaged = [r for name in SEEDS for r in averaged_over_seeds(name, split)]
    averages = list(dict.fromkeys(r["system"] for r in averaged))
    best = next((name for name in averages if name.startswith(BEST)), "")
    others = [*(n for n in present if n not in SEEDS), *(n for n in averages if n != best)]
    pairs += [(best, b) for b in others if best]
    rows = []
    for e in bootstrap.summarise([*scores, *averaged], (ERROR,), pairs, by_speaker=split == "test")["paired"]:
        place = {"protocol": HEADLINE, "split": split, "first": e["a"], "over": e["b"], "metric": ERROR, "gap_ms": e["gap_ms"]}
        rows.append(place | {k: v for k, v in negated(e).items() if k in ("mean", "low", "high", "n", "missing")})
    return sorted(rows, key=lambda r: (pairs.index((r["first"], r["over"])), r["gap_ms"]))


def seeds_of(split: str) -> list[dict]:
    """The error in the gap of every seed of a system, and of the mean over seeds."""
    rows = []
    for name in SEEDS:
        if averaged := averaged_over_seeds(name, split):
            scores = [r for run in SEEDS[name] for r in scores_of_system(run, split)] + averaged
            for e in bootstrap.summarise(scores, (ERROR,), [], by_speaker=split == "test")["table"]:
                rows.append({"protocol": HEADLINE, "split": split} | {k: v for k, v in e.items() if k != "case"})
    return rows


def averaged_over_seeds(name: str, split: str) -> list[dict]:
    """Scores of the mean over the seeds of a system; [] where fewer than two are trained."""
    seeds = [scores for run in SEEDS[name] if (scores := scores_of_system(run, split))]
    if len(seeds) < 2:
        return []
    return [r | {"system": f"{name}, mean of {len(seeds)} seeds"} for r in bootstrap.mean_rows(seeds, SCORES)]


def scores_of_system(run: str, split: str) -> list[dict]:
    """Scores of a run with its own video, headline protocol."""
    return [r for r in read_scores([run], HEADLINE, split) if r["kind"] == "system"]


def speakers_of(split: str) -> list[dict]:
    """The mean error in the gap of each speaker over all gap lengths, at preset `paper`."""
    scores, rows = read_scores(["references-paper", *runs_by_preset()["paper"]], HEADLINE, split), []
    for speaker in sorted({r["speaker"] for r in scores}, key=lambda s: int(s[1:])):
        own = [r for r in scores if r["speaker"] == speaker and r[ERROR]]
        place = {"protocol": HEADLINE, "split": split, "speaker": speaker, "clips": len({r["clip_id"] for r in own})}
        for system in dict.fromkeys(r["system"] for r in own):
            values = [float(r[ERROR]) for r in own if r["system"] == system]
            rows.append(place | {"system": system, "metric": ERROR, "mean": sum(values) / len(values)})
    return rows


def page(tables: Tables) -> str:
    """The text of docs/results.md; runs and evaluations that are missing are named."""
    runs = trained_runs()
    parts = ["# Results\n", (FOLDER / "notes.md").read_text().strip() + "\n", "**Findings**\n", *findings(tables), ""]
    if untrained := [name for name in RUNS if name not in runs]:
        parts.append(f"Not trained yet (`make table` does it): {', '.join(untrained)}.\n")
    if unfinished := [f"{name} ({', '.join(lacks)})" for name in runs if (lacks := missing_evaluations(name))]:
        parts.append(f"Not evaluated yet: {'; '.join(unfinished)}.\n")
    for split in reversed(SPLITS):  # unseen speakers first
        parts += section(tables, split)
    return "\n".join([*parts, *how_to_repeat(runs)]).rstrip() + "\n"


# ---- findings ------------------------------------------------------------------------------------------------------------------


def findings(tables: Tables) -> list[str]:
    """What the tables show, in sentences; every number comes from them."""
    texts = (video_helps, best_system, seen_means_one, pesq_beside_interpolation, seeds_differ, ctc_costs)
    return [textwrap.fill(f"- {text(tables)}", 130, subsequent_indent="  ", break_on_hyphens=False) for text in texts]


def video_helps(tables: Tables) -> str:
    """The gain of video on seen and on unseen speakers."""
    pairs = [(a, b) for a, b in AUDIO_ONLY_TWINS.items() if a != BEST]
    seen = [gain(tables, "test_seen", *pair) for pair in pairs]
    every = {f"{ms} ({name})": e for (name, _), g in zip(pairs, seen, strict=True) for ms, e in g.items()}
    at = {ms: span([g[ms]["mean"] for g in seen]) for ms in (min(seen[0]), max(seen[0]))}
    parts = []
    for pair in pairs:
        g = gain(tables, "test", *pair)
        parts.append(f"`{pair[0]}` by {span([e['mean'] for e in g.values()])} dB ({significant(g)})")
    worse = all(
        tables.headline(split, "paper", ERROR)[f"{a}, another clip's video", ms]["mean"]
        > tables.headline(split, "paper", ERROR)[b, ms]["mean"]
        for split in SPLITS
        for a, b in pairs
        for ms in seen[0]
    )
    return (
        f"*Video helps.* On seen speakers it lowers the error by {' and by '.join(f'{v} dB at {ms} ms' for ms, v in at.items())}; "
        f"{significant(every)}. On the four unseen speakers it lowers "
        f"the error of {', '.join(parts)}. With another clip's video "
        f"{'every system is worse than its twin without video' if worse else 'not every system is worse than its twin'}."
    )


def best_system(tables: Tables) -> str:
    """How far our network is ahead, and on what terms."""
    others = ("av_si", "av_s2s", "av_mtl_si")
    name = next(e["first"] for e in tables.gains if e["first"].startswith(f"{BEST}, mean"))
    seen, unseen = ({o: gain(tables, split, name, o) for o in others} for split in ("test_seen", "test"))
    listed = ", ".join(f"{span([e['mean'] for e in g.values()])} dB below `{o}` ({significant(g)})" for o, g in seen.items())
    speakers = [e["speaker"] for e in tables.speakers if (e["split"], e["system"]) == ("test", BEST)]
    better = {
        o: sum(speaker_error(tables, "test", BEST, [s]) < speaker_error(tables, "test", o, [s]) for s in speakers) for o in others
    }
    none = not any(e["low"] > 0 or e["high"] < 0 for g in unseen.values() for e in g.values())
    return (
        f"*`{BEST}` on seen speakers*, averaged over seeds: {listed}. All were trained for {facts_of(BEST)['epochs']} epochs. "
        f"It also has what `av_si` lacks: {', '.join(advantages())}. On the four unseen speakers "
        f"{'no difference from these three is significant' if none else 'some differences from these three are significant'}: "
        f"its first seed is better than {', '.join(f'`{o}` for {n}' for o, n in better.items())} of them."
    )


def advantages() -> list[str]:
    """Inputs and training options of BEST that av_si does not have, from the configs of the two runs."""
    ours, theirs = (facts_of(name)["config"] for name in (BEST, "av_si"))
    names = {"mask_input": "the gap mask as an input", "motion": "pose instead of pixels", "levels": "standardised levels"}
    found = [text for field, text in names.items() if ours[field] != theirs[field]]
    options = {"trim": "trimmed silence", "jitter_ms": "jitter of the A/V offset", "drop_video": "drop-out of streams"}
    found += [text for field, text in options.items() if ours["augment"][field] != theirs["augment"][field]]
    return found + ["a loss that includes frames near the gap"] * (ours["loss"]["near_frames"] > theirs["loss"]["near_frames"])


def seen_means_one(tables: Tables) -> str:
    """That the numbers of the seen speakers are those of one."""
    rows = [e for e in tables.speakers if (e["split"], e["system"]) == ("test_seen", BEST)]
    others = [e["speaker"] for e in rows if e["speaker"] != MAIN_SPEAKER]
    unseen = [e["speaker"] for e in tables.speakers if (e["split"], e["system"]) == ("test", BEST)]
    clips = {e["speaker"]: e["clips"] for e in rows}
    errors = lambda split, speakers: span([speaker_error(tables, split, s, speakers) for s in AUDIO_ONLY_TWINS])
    return (
        f'*"Seen speakers" means {MAIN_SPEAKER}*, with {clips[MAIN_SPEAKER]} of the clips: the audio-visual systems have errors of '
        f"{errors('test_seen', [MAIN_SPEAKER])} dB there, of {errors('test_seen', others)} dB on the "
        f"{sum(clips[s] for s in others)} clips of {' '.join(others)}, and of {errors('test', unseen)} dB on unseen speakers."
    )


def pesq_beside_interpolation(tables: Tables) -> str:
    """PESQ of the system at 16 kHz beside linear interpolation."""
    texts = []
    for split, who in (("test", "unseen"), ("test_seen", "seen")):
        cells = tables.headline(split, "wide", "pesq_wb")
        lengths = sorted({ms for _, ms in cells})
        below = [ms for ms in lengths if cells["av_unified_wide", ms]["mean"] < cells["interpolation", ms]["mean"]]
        at = "every length" if below == lengths else "no length" if not below else f"{', '.join(map(str, below))} ms"
        pairs = "; ".join(
            f"{ms} ms: {cells['av_unified_wide', ms]['mean']:.2f}, {cells['interpolation', ms]['mean']:.2f}" for ms in lengths
        )
        texts.append(f"on {who} speakers it is below interpolation at {at} ({pairs})")
    return f"*PESQ of `av_unified_wide`, wide band, beside linear interpolation*: {'; '.join(texts)}."


def seeds_differ(tables: Tables) -> str:
    """How far the seeds of a system lie apart on seen speakers."""
    texts = []
    for name, runs in SEEDS.items():
        rows = {(e["system"], e["gap_ms"]): e["mean"] for e in tables.seeds if e["split"] == "test_seen"}
        apart = [max(values) - min(values) for ms in {ms for _, ms in rows} if (values := [rows[run, ms] for run in runs])]
        texts.append(f"`{name}` {span(apart, 2)} dB")
    apart = f"*Seeds* of one system lie apart on seen speakers by: {', '.join(texts)}."
    rest = "Systems without a row in seeds.csv have one seed, so how far apart theirs would lie is not known."
    return f"{apart} Smaller differences between systems with a CTC head are not reliable. {rest}"


def ctc_costs(tables: Tables) -> str:
    """What the CTC head costs in the gap, on seen speakers."""
    cells = tables.headline("test_seen", "paper", ERROR)
    lengths = sorted({ms for _, ms in cells})
    rows = {(e["system"], e["gap_ms"]): e["mean"] for e in tables.seeds if e["split"] == "test_seen"}
    single = span([cells["av_mtl_si", ms]["mean"] - cells["av_si", ms]["mean"] for ms in lengths])
    two = [span([rows[run, ms] - cells["av_s2s", ms]["mean"] for ms in lengths]) for run in SEEDS["av_mtl_s2s"]]
    return (
        f"*Systems with a CTC head are worse than their twins without one*: `av_mtl_si` by {single} dB, the seeds of `av_mtl_s2s` "
        f"by {', '.join(two)} dB. At the paper's weight of 0.001 the CTC loss is more than half of the objective at the end of "
        "training; `av_unified` weights it relative to standardised levels ([systems.md](systems.md#av_unified))."
    )


def gain(tables: Tables, split: str, first: str, over: str) -> dict[int, dict]:
    """gap_ms -> paired estimate of how much lower the error of `first` is than that of `over`."""
    return {e["gap_ms"]: e for e in tables.gains if (e["split"], e["first"], e["over"]) == (split, first, over)}


def significant(estimates: dict) -> str:
    """For which gap lengths the interval is above 0."""
    above = [key for key, e in estimates.items() if e["low"] > 0]
    if len(above) == len(estimates):
        return "every interval is above 0"
    if not above:
        return "no interval is above 0"
    return f"significant at {', '.join(map(str, above))} ms"


def span(values: Sequence[float], digits: int = 1) -> str:
    """ "0.8 to 1.3", or one number."""
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


# ---- tables --------------------------------------------------------------------------------------------------------------------


def section(tables: Tables, split: str) -> list[str]:
    """The tables of one split."""
    how = "t interval over the means of the four speakers" if split == "test" else "bootstrap over clips"
    num_clips = next(e["n"] + e["missing"] for e in tables.headline(split, "paper", ERROR).values())
    lines = [f"## {SPLITS[split]}\n", f"{num_clips} clips; mean [95 % interval: {how}].\n"]
    shown = [*REFERENCES[:2], *runs_by_preset()["paper"], REFERENCES[2]]
    for metric, (title, digits) in METRICS.items():
        cells = tables.headline(split, "paper", metric)
        lengths = sorted({gap_ms for _, gap_ms in cells})
        rows = [[LABELS.get(s, s), *(interval(cells.get((s, g)), digits) for g in lengths)] for s in shown]
        lines += [f"**{title}**\n", *markdown_table(["system", *(f"{g} ms" for g in lengths)], rows), ""]
    return lines + by_speaker(tables, split) + gains_of_video(tables, split) + other_presets(tables, split)


def by_speaker(tables: Tables, split: str) -> list[str]:
    """The mean error of every system for every speaker; of seen ones for s1, who has most of the clips, and for the others."""
    rows = [e for e in tables.speakers if e["split"] == split and "another" not in e["system"]]
    groups = {s: [s] for s in dict.fromkeys(e["speaker"] for e in rows)}
    if MAIN_SPEAKER in groups:
        groups = {MAIN_SPEAKER: [MAIN_SPEAKER], "the others": [s for s in groups if s != MAIN_SPEAKER]}
    clips = {e["speaker"]: e["clips"] for e in rows}
    heads = [f"{name} ({sum(clips[s] for s in group)} clips)" for name, group in groups.items()]
    systems = sorted(dict.fromkeys(e["system"] for e in rows), key=lambda s: s == "oracle_mel")
    cells = [[LABELS.get(s, s), *(f"{speaker_error(tables, split, s, g):.2f}" for g in groups.values())] for s in systems]
    return ["**The same error by speaker, mean over all gap lengths, dB**\n", *markdown_table(["system", *heads], cells), ""]


def speaker_error(tables: Tables, split: str, system: str, speakers: list[str]) -> float:
    """Mean error over the clips of some speakers and all gap lengths, dB."""
    rows = [e for e in tables.speakers if (e["split"], e["system"]) == (split, system) and e["speaker"] in speakers]
    return sum(e["clips"] * e["mean"] for e in rows) / sum(e["clips"] for e in rows)


def gains_of_video(tables: Tables, split: str) -> list[str]:
    """How much lower the error of each audio-visual system is than that of its twin without video, on the same clips."""
    cells = {(e["first"], e["over"], e["gap_ms"]): e for e in tables.gains if e["split"] == split}
    pairs = [(a, b) for a, b in AUDIO_ONLY_TWINS.items() if any(key[:2] == (a, b) for key in cells)]
    lengths = sorted({gap_ms for *_, gap_ms in cells})
    rows = [[a, b, *(interval(cells.get((a, b, g)), 2) for g in lengths)] for a, b in pairs]
    heads = ["system", "without video", *(f"{g} ms" for g in lengths)]
    return ["**Gain of video: how much lower the error in the gap is, dB, paired by clip**\n", *markdown_table(heads, rows, 2), ""]


def other_presets(tables: Tables, split: str) -> list[str]:
    """One table of means for the systems at 16 kHz, which have their own references."""
    heads, rows = ["system"], []
    for title, _ in OTHER_PRESET_METRICS.values():
        heads += [f"{title}, {g} ms" for g in OTHER_PRESET_MS]
    for preset in ("wide", "morrone"):
        names = runs_by_preset().get(preset, [])
        cells = {metric: tables.headline(split, preset, metric) for metric in OTHER_PRESET_METRICS}
        for system in (*REFERENCES[:2], *names, REFERENCES[2]) if names else ():
            label = LABELS.get(system, system) if system in names else f"{LABELS.get(system, system)} ({preset})"
            digits = {metric: d for metric, (_, d) in OTHER_PRESET_METRICS.items()}
            rows.append([label, *(mean(cells[m].get((system, g)), digits[m]) for m in digits for g in OTHER_PRESET_MS)])
    return ["**Systems at 16 kHz (presets `wide` and `morrone`), means**\n", *markdown_table(heads, rows), ""] if rows else []


def trainings() -> list[dict]:
    """One row per run: its config, cost and evaluations."""
    rows = []
    for name in trained_runs():
        facts, (config, fields) = facts_of(name), RUNS[name]
        evaluated = "; ".join(f"{k} {e['seconds']['all']:.0f} s" for k, e in facts["evaluations"].items())
        rows.append({
            "run": name, "config": config, "fields": " ".join(f"--config.{k}={v}" for k, v in fields.items()),
            "seed": facts["config"]["seed"], "preset": facts["config"]["preset"], "parameters": facts["parameters"],
            "train_clips": facts["clips"]["train"], "epochs": facts["epochs"], "hours": facts["hours"],
            "steps_per_s": facts["steps_per_s"], "devices": f"{len(facts['devices'])} x {facts['devices'][0]}",
            "evaluated": evaluated,
        })  # fmt: skip
    return rows


def how_to_repeat(runs: list[str]) -> list[str]:
    """The links to the CSV tables and the commands."""
    common = " ".join(f"--config.{k}={v}" for k, v in COMMON.items())
    example = facts_of(runs[0])["evaluations"][f"{HEADLINE}-test"]["command"]
    return [
        "## All tables\n",
        "- [means.csv](results/tables/means.csv): every protocol, split, preset, system, metric and gap length, with intervals",
        "- [gains.csv](results/tables/gains.csv): paired differences of the error in the gap, also with another clip's video",
        "- [seeds.csv](results/tables/seeds.csv): the error in the gap of every seed",
        "- [speakers.csv](results/tables/speakers.csv): the error in the gap of every speaker",
        "- [trainings.csv](results/tables/trainings.csv): config, cost and evaluations of every run\n",
        "## Commands\n",
        "Every run, with CONFIG and FIELDS of trainings.csv:\n",
        "    avsi-train --config=CONFIG --workdir=RUN --config.data_dir=DATA \\",
        f"        {common} FIELDS\n",
        "Evaluated, for example, with:\n",
        f"    {example}",
    ]
