"""Split + protocol + suite + Restorer -> clips.csv, summary.json, sounds, report.html: avsi-evaluate.

Every clip of the split meets every case of the suite (evaluation/conditions.py), damaged and judged as the protocol says (evaluation/protocols.py); beside
the system stand the damaged sound, the linear interpolation of the log-mel, the same system with the lips of another clip, the true
log-mel through the same vocoder (the ceiling), and, with --baseline, what another run's own evaluation found on the same clips.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

from avsi_jax import configs
from avsi_jax.runtime import unexpected_errors

METRICS = (
    "gap_l1_mel_db", "gap_l1_db", "pesq_nb", "pesq_wb", "stoi", "estoi", "stoi_gap", "wer_gap", "cer", "per",
)  # fmt: skip
COLUMNS = (
    "clip_id", "speaker", "case", "gap_ms", "start_s", "end_s", "gaps_s", "in_words", "system", "kind",
    *METRICS, "said", "text", "heard", "touched", "reason",
)  # fmt: skip
UNSEEN_SPLITS = ("validation", "test")  # of speakers that no training saw: intervals resample speakers, then clips
PAIRED = ("baseline", "interpolation", "other_video")  # kinds that the system is compared with, clip by clip
OTHER_VIDEO_IN = ("lengths", "unseen", "multigap")  # suites that have a row for the lips of another clip


def evaluate(
    config, workdir: Path, *, checkpoint: str = "", baseline: Path | None = None, raw: Path | None = None, overwrite: bool = False,
    command: str = "",
) -> Path:  # fmt: skip
    """Evaluates the run in `workdir`, beside what `baseline`'s own evaluation found; returns the folder of the results, in it.

    checkpoint: the name or folder of weights to evaluate in the run's place. The baseline is evaluated first where it hasn't been.
    raw: the clips' videos, for suites that paint on them. ValueError and OSError say what can't be done.
    """
    from avsi_jax.data import input_pipeline
    from avsi_jax.evaluation import bootstrap, conditions, metrics, protocols, reference_cache, report, run_systems
    from avsi_jax.inference.restorer import Restorer

    # 1. What was asked for.
    check(config)
    protocol = protocols.PROTOCOLS[config.protocol]
    folder = folder_of(config, workdir)
    if (folder / "summary.json").exists() and not overwrite:
        raise FileExistsError(f"{folder} holds an evaluation; take --overwrite to replace it")
    restorer = Restorer.load(checkpoint or workdir, config.checkpoint, protocol=protocol.damage)
    if protocol.presets and restorer.config.preset not in protocol.presets:
        raise ValueError(
            f"config.protocol={protocol.name}: found a system of preset {restorer.config.preset}, expected {protocol.presets[0]}"
        )
    if config.suite in conditions.NEED_VIDEO and not restorer.system.uses_video:
        raise ValueError(f"config.suite={config.suite}: {restorer.name} sees no lips; expected a system that does")
    if config.suite in conditions.NEED_RAW and not raw:
        raise ValueError(f"config.suite={config.suite} paints on the pictures; expected --raw=DIR with the videos of the dataset")
    other = baseline_rows(config, Path(baseline), restorer, raw, overwrite) if baseline else None
    if not (data_dir := config.data_dir or restorer.config.data_dir):
        raise ValueError("weights come without a dataset; expected --config.data_dir=DIR, where avsi-prepare wrote one")
    dataset = input_pipeline.find_dataset(data_dir, config.builder_config or restorer.config.builder_config)
    records = input_pipeline.Records(dataset, config.split, mouth=False)
    clips = run_systems.Clips(records, run_systems.chosen_clips(records, config.max_clips))
    cases = protocol.cases or tuple(conditions.SUITES[config.suite](config.gap_ms or protocol.gap_ms))
    if config.suite in conditions.NEED_RAW:
        began = time.monotonic()
        tell = lambda done, of: tick(done, of, began, "painted clips tracked")
        clips.hide(Path(raw), cases, protocol, config.workers or os.cpu_count() or 1, tell)
    judge = find_judge(config)
    systems = lineup(restorer, other_video=config.other_video and config.suite in OTHER_VIDEO_IN)

    # 2. What no system has a part in: kept from an earlier evaluation, or made on the way and kept.
    kept_at = reference_cache.path_of(
        config.references, data=records.fingerprint(), clips=sorted(clips.raw), protocol=protocol.name, cases=cases,
        preset=restorer.config.preset, suite=config.suite, versions=versions(), judge=judge and judge.fingerprint,
        columns=COLUMNS,
    )  # fmt: skip
    kept = reference_cache.read(kept_at)

    # 3. Restore, batch by batch, while processes score what is done.
    rows, began = [], time.monotonic()
    wanted = {case: [s for s in systems if is_wanted(s, case, kept is None)] for case in cases}
    total = len(clips.raw) * sum(map(len, wanted.values()))

    def items():
        for batch in clips.batches(config.batch_size):
            for case in cases:
                made = run_systems.restore_case(batch, case, protocol, restorer, wanted[case], judge)
                rows.extend(m.row for m in made)
                yield from (m.item for m in made)

    scores = metrics.score_many(items(), config.workers or None, lambda done, _: tick(done, total, began))
    for row, score in zip(rows, scores, strict=True):
        row.update(score)
    if kept is None:
        reference_cache.write(kept_at, [r for r in rows if r["kind"] in reference_cache.KINDS], COLUMNS)
    else:
        rows += kept
    if other:
        systems, rows = beside(systems, rows, *other)
    rows = in_order(rows, cases, systems)
    seconds = {"all": time.monotonic() - began}

    # 4. Write.
    folder.mkdir(parents=True, exist_ok=True)
    shown = chosen_examples(rows, restorer.name, config.examples)
    sources = {restorer: [s for s in systems if s["kind"] != "baseline"]}
    if baseline and shown:
        name = {"name": other[0]["name"], "kind": "system"}
        sources[Restorer.from_workdir(baseline, config.checkpoint, protocol=protocol.damage)] = [name]
    examples = write_examples(folder, shown, clips, cases, protocol, sources, config.batch_size)
    (folder / "clips.csv").write_text(reference_cache.as_csv(rows, COLUMNS), newline="")
    pairs = [(restorer.name, s["name"]) for s in systems if s["kind"] in PAIRED]
    unseen = config.split in UNSEEN_SPLITS and dataset.parent.name.startswith("speaker_independent")
    found = bootstrap.summarise(rows, METRICS, pairs, by_speaker=unseen)
    summary = {
        "title": f"{restorer.name} on {config.split}, protocol {protocol.name}, suite {config.suite}",
        "system": restorer.name,
        "protocol": protocol.name,
        "protocol_said": protocol.transcript,
        "split": config.split,
        "suite": config.suite,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "seconds": {k: round(v, 1) for k, v in (seconds | {"report": time.monotonic() - began - seconds["all"]}).items()},
        "sounds_scored": total,
        "references": "kept" if kept else "made",
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "by_speaker": unseen,
        "versions": versions(),
        "judge": judge.described if judge else "",
        "runs": {restorer.name: run_facts(restorer)} | ({other[0]["name"]: other[0]["run"]} if other else {}),
        "metric_rate": protocol.score_rate(restorer.spec),
        "fingerprint": records.fingerprint(),
        "num_clips": len(clips.raw),
        "batch_size": config.batch_size,
        "systems": systems,
        "gap_ms": sorted({c.gap_ms for c in cases}),
        "cases": [c._asdict() | {"name": c.name} for c in cases],
        "families": {f: conditions.FAMILIES[f].label for f in dict.fromkeys(c.family for c in cases if c.family)},
        "examples": examples,
        "reach": bootstrap.reach(found["paired"], "gap_l1_db"),
        **found,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report.write_report(folder)
    return folder


# ---- what was asked for --------------------------------------------------------------------------------------------------------


def check(config) -> None:
    """ValueError for a field that can't be."""
    from avsi_jax.evaluation import conditions, protocols

    if config.protocol not in protocols.PROTOCOLS:
        raise ValueError(f"config.protocol: found {config.protocol!r}, expected {' or '.join(protocols.PROTOCOLS)}")
    if config.suite not in conditions.SUITES:
        raise ValueError(f"config.suite: found {config.suite!r}, expected {' or '.join(conditions.SUITES)}")
    lengths = config.gap_ms
    if any(type(ms) is not int or not 20 <= ms <= conditions.LONGEST_MS for ms in lengths) or len(set(lengths)) < len(lengths):
        raise ValueError(f"config.gap_ms: found {lengths}, expected lengths between 20 and {conditions.LONGEST_MS} ms, each once")
    if protocols.PROTOCOLS[config.protocol].cases and (lengths or config.suite != "lengths"):
        raise ValueError(f"config.protocol={config.protocol} draws its own gaps: expected suite lengths and no config.gap_ms")
    if config.protocol == "peer" and config.suite == "multigap":
        raise ValueError("config.protocol=peer has one gap a clip; expected config.protocol=waveform for config.suite=multigap")
    if config.suite == "unseen" and config.split != conditions.UNSEEN_SPLIT:
        raise ValueError(f"config.suite=unseen: found config.split={config.split}, expected {conditions.UNSEEN_SPLIT}")


def folder_of(config, workdir) -> Path:
    return Path(workdir) / "eval" / f"{config.protocol}-{config.split}-{config.suite}"


def lineup(restorer, *, other_video: bool) -> list[dict]:
    """Names and kinds of every row of a clip, in the order of the tables."""
    names = [{"name": "masked", "kind": "masked"}, {"name": "interpolation", "kind": "interpolation"}]
    names.append({"name": restorer.name, "kind": "system"})
    if restorer.system.uses_video and other_video:
        names.append({"name": f"{restorer.name}, another clip's video", "kind": "other_video"})
    return [*names, {"name": "true mel (ceiling)", "kind": "oracle_mel"}]


def is_wanted(system: dict, case, references: bool) -> bool:
    """Whether a system's rows are to be made in a case: what no system has a part in only where the case changes it."""
    from avsi_jax.evaluation.reference_cache import KINDS

    return system["kind"] not in KINDS or (references and case.changes_references)


def find_judge(config):
    if not config.judge:
        return None
    from avsi_jax.inference.recognizer import Recognizer

    return Recognizer.from_workdir(config.judge)


# ---- another run ---------------------------------------------------------------------------------------------------------------


def baseline_rows(config, baseline: Path, restorer, raw: Path | None, overwrite: bool) -> tuple[dict, list[dict]]:
    """({"name", "kind", "run"}, its rows) of the baseline's own evaluation of the same clips, made where there is none.

    One of another checkpoint than it has today is made again where `overwrite` allows it, else refused.
    """
    from avsi_jax.evaluation import protocols, reference_cache
    from avsi_jax.inference.restorer import Restorer
    from avsi_jax.presets import get
    from avsi_jax.training import run_directory

    if not (Path(baseline) / run_directory.CONFIG).is_file():
        Restorer.from_workdir(baseline)  # says what is missing
    preset, rate = run_directory.read_config(baseline)["preset"], protocols.PROTOCOLS[config.protocol].score_rate
    if rate(get(preset)) != rate(restorer.spec):
        raise ValueError(f"--baseline has preset {preset}, the system {restorer.config.preset}; compare at one preset")
    folder = folder_of(config, baseline)
    stale = is_stale(folder, config, baseline)
    if stale and not overwrite and stale != "none":
        raise ValueError(f"--baseline: {folder} {stale}; take --overwrite to make it again")
    if stale:
        print(f"{baseline} is evaluated first", file=sys.stderr)
        evaluate(config, baseline, raw=raw, overwrite=True, command=f"for a baseline of {restorer.name}")
    summary = json.loads((folder / "summary.json").read_text())
    own = summary["system"]
    rows = [r for r in reference_cache.read(folder / "clips.csv") if r["kind"] == "system"]
    name = own if own != restorer.name else f"{own} (baseline)"
    facts = {"name": name, "kind": "baseline", "run": summary["runs"][own], "folder": str(folder)}
    return facts, [r | {"system": name, "kind": "baseline"} for r in rows]


def is_stale(folder: Path, config, workdir: Path) -> str:
    """Why an evaluation of a workdir can't be taken for today's: 'none' where there is none, '' where it can."""
    from avsi_jax.inference.trained_run import step_of

    if not (folder / "summary.json").is_file():
        return "none"
    summary = json.loads((folder / "summary.json").read_text())
    if config.judge and not summary.get("judge"):
        return "was heard by no judge, expected one as in config.judge"
    was, now = summary["runs"][summary["system"]]["step"], step_of(workdir, config.checkpoint)
    return "" if was == now else f"is of step {was}, checkpoint {config.checkpoint!r} is of {now} now"


def beside(systems: list[dict], rows: list[dict], facts: dict, others: list[dict]) -> tuple[list[dict], list[dict]]:
    """The lineup and the rows with those of the baseline among them; ValueError where they aren't of the same clips and gaps."""
    place = lambda r: (r["clip_id"], r["case"], str(r["gap_ms"]))
    own = {place(r): f"{float(r['start_s']):.6f}" for r in rows if r["kind"] == "system"}
    theirs = {place(r): f"{float(r['start_s']):.6f}" for r in others}
    if own != theirs:
        unlike = sorted(k for k in own.keys() | theirs.keys() if own.get(k) != theirs.get(k))[0]
        raise ValueError(
            f"--baseline: {facts['folder']} has other clips or gaps ({' '.join(filter(None, unlike))} ms is one); evaluate "
            "it again with the same fields and --overwrite"
        )
    at = [s["kind"] for s in systems].index("system")
    return [*systems[:at], {k: facts[k] for k in ("name", "kind")}, *systems[at:]], rows + others


def in_order(rows: list[dict], cases, systems: list[dict]) -> list[dict]:
    """Clip by clip, case by case, in the order of the lineup."""
    case_at = {(c.name, str(c.gap_ms)): i for i, c in enumerate(cases)}
    system_at = {s["name"]: i for i, s in enumerate(systems)}
    return sorted(rows, key=lambda r: (r["clip_id"], case_at[r["case"], str(r["gap_ms"])], system_at[r["system"]]))


# ---- examples ------------------------------------------------------------------------------------------------------------------


def chosen_examples(rows: list[dict], system: str, count: int) -> list[tuple[str, str, int, str]]:
    """(clip, case, gap_ms, why) to hear and see: as many clips spread over all as asked for, then the two with most and the two
    with least gap error of the system.
    """
    from avsi_jax.evaluation.bootstrap import number
    from avsi_jax.evaluation.run_systems import spread

    mine = [r for r in rows if r["system"] == system]
    places = [(r["clip_id"], r["case"], int(r["gap_ms"])) for r in mine]
    cases = list(dict.fromkeys(p[1:] for p in places))
    clips = spread(sorted({p[0] for p in places}), count)
    chosen = [(clip, *cases[i * len(cases) // len(clips)], "") for i, clip in enumerate(clips)]
    scored = sorted((number(r["gap_l1_db"]), *p) for r, p in zip(mine, places, strict=True) if number(r["gap_l1_db"]) >= 0)
    if count:
        chosen += [(*p, "among the best") for _, *p in scored[:2]] + [(*p, "among the worst") for _, *p in scored[-2:]]
    return list({c[:3]: c for c in chosen}.values())


def write_examples(folder: Path, chosen, clips, cases, protocol, sources: dict, batch_size: int) -> list[dict]:
    """Sounds of the chosen clips by every restorer of `sources` (its systems), and what the report needs to show them."""
    from avsi_jax.evaluation import run_systems

    shutil.rmtree(folder / "sounds", ignore_errors=True)  # of an evaluation that this one replaces
    (folder / "sounds").mkdir()
    examples = []
    for case in cases:
        here = {clip: why for clip, name, gap_ms, why in chosen if (name, gap_ms) == (case.name, case.gap_ms)}
        for start in range(0, len(here), batch_size):
            batch = clips.batch(sorted(here)[start : start + batch_size], batch_size)
            by_clip: dict = {}
            for restorer, systems in sources.items():
                for made in run_systems.restore_case(batch, case, protocol, restorer, systems):
                    by_clip.setdefault(made.row["clip_id"], []).append(made)
            examples += [example(folder, case, made) | {"why": here[clip]} for clip, made in by_clip.items()]
    return examples


def example(folder: Path, case, made: list) -> dict:
    """Writes one clip's sounds; what the report needs to show them."""
    from avsi_jax.data import grid_text
    from avsi_jax.media import clip_io

    row = made[0].row
    stem = f"sounds/{row['clip_id']}-{case.gap_ms}{'-' + case.name.replace('=', '_') if case.name else ''}"
    names = [row["system"].replace(" ", "_").replace("'", "").replace(",", "") for row in (m.row for m in made)]
    waveforms = {"original": f"{stem}-original.flac"} | {
        m.row["system"]: f"{stem}-{n}.flac" for m, n in zip(made, names, strict=True)
    }
    clip_io.write_audio(folder / waveforms["original"], made[0].truth, made[0].rate)
    for m in made:
        clip_io.write_audio(folder / waveforms[m.row["system"]], m.audio, m.rate)
    said = {m.row["system"]: m.row["said"] for m in made if m.row["said"]}
    spoken = set(row["text"].split()) <= grid_text.PRONUNCIATIONS.keys() and any(map(str.isupper, said.values()))
    return {
        **{k: row[k] for k in ("clip_id", "case", "gap_ms", "start_s", "end_s", "gaps_s", "text")},
        "said": said,
        **({"phones": " ".join(grid_text.phones_of(row["text"]))} if spoken else {}),
        "sounds": waveforms,
    }


def run_facts(restorer) -> dict:
    """What tells one run from another in a table."""
    config = restorer.config
    scalars = ("preset", "seed", "epochs", "batch_size", "schedule", "learning_rate", "clip_norm")
    return {
        "step": restorer.step,
        **{k: config[k] for k in scalars if k in config},
        "loss": config.loss.to_dict(),
        "gaps": config.gaps.to_dict(),
    }


def versions() -> dict[str, str]:
    import importlib.metadata

    return {p: importlib.metadata.version(p) for p in ("jax", "numpy", "pesq", "pystoi", "librosa", "soxr", "jiwer")}


def tick(done: int, total: int, began: float, what: str = "sounds scored") -> None:
    """One line that rewrites itself on a terminal; every 100th sound elsewhere."""
    live = sys.stderr.isatty()
    if live or done == total or done % 100 == 0:
        speed = done / (time.monotonic() - began)
        end = "\r" if live and done < total else "\n"
        print(
            f"{done}/{total} {what}, {speed:.1f} a second, {(total - done) / speed:.0f} s left ",
            end=end,
            file=sys.stderr,
            flush=True,
        )


@unexpected_errors.reported("avsi-evaluate")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "avsi-evaluate", description="Evaluate a trained system on one split; writes a report into its workdir."
    )
    parser.add_argument("--config", default="eval", help="a name or a .py file; default %(default)s")
    parser.add_argument("--workdir", help="the run to evaluate; with --checkpoint the folder that the results go to")
    parser.add_argument("--checkpoint", default="", help="weights to evaluate instead of a run: pretrained, another name, a folder")
    parser.add_argument("--baseline", help="another run at the same preset, shown beside it with paired differences")
    parser.add_argument("--raw", help="folder of the dataset's videos, for config.suite=occlusion, which paints on them")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation of the same split and protocol")
    parser.epilog = (
        "Fields: --config.FIELD=VALUE, e.g. --config.split=test --config.suite=robustness --config.protocol=peer "
        "--config.gap_ms=300,900 --config.max_clips=20"
    )
    known, rest = parser.parse_known_args(argv)
    try:
        config = configs.load(known.config, configs.split_overrides(rest), like="eval")
        if not known.workdir:
            raise ValueError("no --workdir given; expected the folder of a training")
        command = "avsi-evaluate " + " ".join(sys.argv[1:] if argv is None else argv)
        folder = evaluate(
            config, Path(known.workdir), checkpoint=known.checkpoint, baseline=known.baseline, raw=known.raw,
            overwrite=known.overwrite, command=command,
        )  # fmt: skip
        print(folder / "report.html")
    except (ValueError, OSError) as error:
        print(f"avsi-evaluate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
