"""avsi-evaluate: evaluates a trained system on a split and writes clips.csv, summary.json, audio examples and report.html.

Every clip of the split is evaluated in every case of the suite (evaluation/conditions.py), masked and scored as defined by the
protocol (evaluation/protocols.py). The tables also show masked audio, linear interpolation of the log-mel, the same system with
another clip's video, the oracle mel (the true log-mel through the same vocoder) and, with --baseline, another run.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from avsi_jax import configs
from avsi_jax.runtime import storage, unexpected_errors
from avsi_jax.runtime.command_line import Parser

if TYPE_CHECKING:
    import ml_collections

    from avsi_jax.evaluation.conditions import Case
    from avsi_jax.evaluation.protocols import Protocol
    from avsi_jax.evaluation.run_systems import Clips, SystemOutput
    from avsi_jax.inference.recognizer import Recognizer
    from avsi_jax.inference.restorer import Restorer

METRICS = (
    "gap_l1_mel_db", "gap_l1_db", "level_error_db", "pesq_nb", "pesq_wb", "stoi", "estoi", "stoi_gap", "plcmos", "dnsmos",
    "wer_gap", "cer", "per", "psnr_db", "ssim", "gap_mse",
)  # fmt: skip
COLUMNS = (
    "clip_id", "speaker", "case", "gap_ms", "start_s", "end_s", "gaps_s", "in_words", "system", "kind",
    *METRICS, "transcript", "text", "recognized", "touched", "reason",
)  # fmt: skip
UNSEEN_SPLITS = ("validation", "test")  # splits of unseen speakers: intervals are over speakers
PAIRED = ("baseline", "mean", "interpolation", "other_video")  # kinds with which the system is compared clip by clip
OTHER_VIDEO_IN = ("lengths", "unseen", "multigap")  # suites with a row for another clip's video


def evaluate(
    config: ml_collections.ConfigDict, workdir: Path, *, checkpoint: str = "", baseline: Path | None = None,
    raw: Path | None = None, overwrite: bool = False, command: str = "", note: str = "",
) -> Path:  # fmt: skip
    """Evaluates the run in `workdir` and returns the folder of the results inside it.

    checkpoint: name or folder of weights to evaluate instead of the run. baseline: another run directory to compare with; it is
    evaluated first if necessary. raw: folder of the clips' videos, for suites that paint on them. note: text for the top of the
    report. Raises ValueError or OSError with
    a message for the user.
    """
    from avsi_jax.data import input_pipeline
    from avsi_jax.evaluation import (
        bootstrap,
        conditions,
        listener_models,
        metrics,
        protocols,
        reference_cache,
        report,
        run_systems,
        table_export,
    )
    from avsi_jax.inference.restorer import Restorer

    # 1. Check the request and load everything.
    check(config)
    protocol = protocols.PROTOCOLS[config.protocol]
    folder = results_folder(config, workdir)
    if (folder / "summary.json").exists() and not overwrite:
        raise FileExistsError(f"{folder} contains an evaluation; pass --overwrite to replace it")
    restorer = Restorer.load(checkpoint or workdir, config.checkpoint, protocol=protocol.masking)
    if protocol.presets and restorer.config.preset not in protocol.presets:
        raise ValueError(
            f"config.protocol={protocol.name}: found a system of preset {restorer.config.preset}, expected {protocol.presets[0]}"
        )
    if config.suite in conditions.NEED_VIDEO and not restorer.system.uses_video:
        raise ValueError(f"config.suite={config.suite}: {restorer.name} uses no video; expected a system that does")
    if config.suite in conditions.NEED_RAW and not raw:
        raise ValueError(
            f"config.suite={config.suite} paints on the video frames; expected --raw=DIR with the videos of the dataset"
        )
    other = baseline_rows(config, Path(baseline), restorer, raw, overwrite) if baseline else None
    if not (data_dir := config.data_dir or restorer.config.data_dir):
        raise ValueError(
            "weights do not name a dataset; expected --config.data_dir=DIR, the folder of a dataset built by avsi-prepare"
        )
    dataset = input_pipeline.find_dataset(data_dir, config.builder_config or restorer.config.builder_config)
    records = input_pipeline.Records(dataset, config.split, mouth=False)
    clips = run_systems.Clips(records, run_systems.select_clips(records, config.max_clips))
    cases = protocol.cases or tuple(conditions.SUITES[config.suite](config.gap_ms or protocol.gap_ms))
    if config.suite in conditions.NEED_RAW:
        began = time.monotonic()
        progress = lambda done, total: print_progress(done, total, began, "painted clips tracked")
        clips.track_occluded(Path(raw), cases, protocol, config.workers or os.cpu_count() or 1, progress)
    judge = load_judge(config)
    listeners = installed_listener_models(config) if protocol.score_rate(restorer.spec) == listener_models.RATE else ()
    systems = systems_of(restorer, other_video=config.other_video and config.suite in OTHER_VIDEO_IN)

    # 2. Rows that depend on no system: read from the cache, or computed below and cached.
    cache_path = reference_cache.path_of(
        config.references, data=records.fingerprint(), clips=sorted(clips.raw), protocol=protocol.name, cases=cases,
        preset=restorer.config.preset, suite=config.suite, versions=versions(listeners), judge=judge and judge.fingerprint,
        columns=COLUMNS, listener_models=listeners,
    )  # fmt: skip
    cached = reference_cache.read(cache_path)

    # 3. Restore batch by batch, while worker processes score finished clips.
    rows, began = [], time.monotonic()
    wanted = {case: [s for s in systems if is_computed(s, case, cached is None)] for case in cases}
    total = len(clips.raw) * sum(map(len, wanted.values()))

    def items():
        for batch in clips.batches(config.batch_size):
            for case in cases:
                outputs = run_systems.restore_case(batch, case, protocol, restorer, wanted[case], judge)
                rows.extend(o.row for o in outputs)
                yield from (o.item for o in outputs)

    progress = lambda done, _: print_progress(done, total, began)
    scores = metrics.score_many(items(), config.workers or None, progress, listener_models=listeners)
    for row, score in zip(rows, scores, strict=True):
        row.update(score)
    if cached is None:
        reference_cache.write(cache_path, [r for r in rows if r["kind"] in reference_cache.KINDS], COLUMNS)
    else:
        rows += cached
    if other:
        systems, rows = add_baseline(systems, rows, *other)
    rows = in_order(rows, cases, systems)
    seconds = {"all": time.monotonic() - began}

    # 4. Write a new folder, which replaces that of an earlier evaluation when it is complete.
    with storage.replaced_folder(folder) as new:
        shown = select_examples(rows, restorer.name, config.examples)
        sources = {restorer: [s for s in systems if s["kind"] != "baseline"]}
        if baseline and shown:
            name = {"name": other[0]["name"], "kind": "system"}
            sources[Restorer.from_workdir(baseline, config.checkpoint, protocol=protocol.masking)] = [name]
        examples = write_examples(new, shown, clips, cases, protocol, sources, config.batch_size)
        storage.write_text(new / "clips.csv", reference_cache.as_csv(rows, COLUMNS))
        pairs = [(restorer.name, s["name"]) for s in systems if s["kind"] in PAIRED]
        unseen = config.split in UNSEEN_SPLITS and dataset.parent.name.startswith("speaker_independent")
        estimates = bootstrap.summarise(rows, METRICS, pairs, by_speaker=unseen)
        apart = {} if unseen else bootstrap.groups_of_speakers(rows)
        groups = [{"name": name} | bootstrap.summarise(members, METRICS, pairs) for name, members in apart.items()]
        summary = {
            "title": f"{restorer.name} on {config.split}, protocol {protocol.name}, suite {config.suite}",
            "system": restorer.name,
            "protocol": protocol.name,
            "protocol_description": protocol.description,
            "split": config.split,
            "suite": config.suite,
            "command": command,
            "note": note,
            "date": datetime.date.today().isoformat(),
            "seconds": {k: round(v, 1) for k, v in (seconds | {"report": time.monotonic() - began - seconds["all"]}).items()},
            "num_scored": total,
            "references": "cached" if cached else "computed",
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "by_speaker": unseen,
            "intervals": table_export.INTERVALS[unseen],
            "versions": versions(listeners),
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
            "reach": bootstrap.reach(estimates["paired"], "gap_l1_db"),
            "groups": groups,
            **estimates,
        }
        storage.write_text(new / "summary.json", json.dumps(summary, indent=1) + "\n")
        report.write_report(new)
    return folder


# ---- request -------------------------------------------------------------------------------------------------------------------


def check(config: ml_collections.ConfigDict) -> None:
    """ValueError for a field with a value that is not allowed."""
    from avsi_jax.evaluation import conditions, listener_models, protocols

    if config.protocol not in protocols.PROTOCOLS:
        raise ValueError(f"config.protocol: found {config.protocol!r}, expected {' or '.join(protocols.PROTOCOLS)}")
    if config.suite not in conditions.SUITES:
        raise ValueError(f"config.suite: found {config.suite!r}, expected {' or '.join(conditions.SUITES)}")
    if unknown := sorted(set(listener_models.split(config.listener_models)) - set(listener_models.NAMES)):
        raise ValueError(f"config.listener_models: found {', '.join(unknown)}, expected {' or '.join(listener_models.NAMES)}")
    lengths = config.gap_ms
    if any(type(ms) is not int or not 20 <= ms <= conditions.LONGEST_MS for ms in lengths) or len(set(lengths)) < len(lengths):
        raise ValueError(f"config.gap_ms: found {lengths}, expected lengths between 20 and {conditions.LONGEST_MS} ms, each once")
    if protocols.PROTOCOLS[config.protocol].cases and (lengths or config.suite != "lengths"):
        raise ValueError(f"config.protocol={config.protocol} draws its own gaps: expected suite lengths and no config.gap_ms")
    if config.protocol == "peer" and config.suite == "multigap":
        raise ValueError("config.protocol=peer has one gap per clip; expected config.protocol=waveform for config.suite=multigap")
    if config.suite == "unseen" and config.split != conditions.UNSEEN_SPLIT:
        raise ValueError(f"config.suite=unseen: found config.split={config.split}, expected {conditions.UNSEEN_SPLIT}")


def results_folder(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """WORKDIR/eval/PROTOCOL-SPLIT-SUITE."""
    return Path(workdir) / "eval" / f"{config.protocol}-{config.split}-{config.suite}"


def systems_of(restorer: Restorer, *, other_video: bool) -> list[dict]:
    """Names and kinds of all rows of a clip, in the order of the tables."""
    names = [{"name": "masked audio", "kind": "masked"}, {"name": "interpolation", "kind": "interpolation"}]
    if restorer.config.refiner:
        names.append({"name": f"{restorer.name}, not refined", "kind": "mean"})
    names.append({"name": restorer.name, "kind": "system"})
    if restorer.system.uses_video and other_video:
        names.append({"name": f"{restorer.name}, another clip's video", "kind": "other_video"})
    return [*names, {"name": "oracle mel (upper bound)", "kind": "oracle_mel"}]


def is_computed(system: dict, case: Case, references: bool) -> bool:
    """Whether a system's rows are computed in a case: reference rows only if wanted, and only where the case changes them."""
    from avsi_jax.evaluation.reference_cache import KINDS

    return system["kind"] not in KINDS or (references and case.changes_references)


def load_judge(config: ml_collections.ConfigDict) -> Recognizer | None:
    """The recognizer of config.judge; None where there is none."""
    if not config.judge:
        return None
    from avsi_jax.inference.recognizer import Recognizer

    return Recognizer.from_workdir(config.judge)


def installed_listener_models(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Those of config.listener_models; () with a message on stderr where the packages that they need are not installed."""
    from avsi_jax.evaluation import listener_models

    wanted = listener_models.split(config.listener_models)
    if wanted and (missing := listener_models.missing_packages()):
        names = " and ".join(wanted)
        print(f"avsi-evaluate: {names} left out, {' and '.join(missing)} not installed; {listener_models.INSTALL}", file=sys.stderr)
        return ()
    return wanted


# ---- another run ---------------------------------------------------------------------------------------------------------------


def baseline_rows(
    config: ml_collections.ConfigDict, baseline: Path, restorer: Restorer, raw: Path | None, overwrite: bool
) -> tuple[dict, list[dict]]:
    """({"name", "kind", "run", "folder"}, rows) of the baseline's own evaluation, which is run if there is none.

    An evaluation of an older checkpoint is run again with `overwrite`, otherwise refused with a ValueError.
    """
    from avsi_jax.evaluation import protocols, reference_cache
    from avsi_jax.inference.restorer import Restorer
    from avsi_jax.presets import get
    from avsi_jax.training import run_directory

    if not (Path(baseline) / run_directory.CONFIG).is_file():
        Restorer.from_workdir(baseline)  # raises an error that names what is missing
    preset, rate = run_directory.read_config(baseline)["preset"], protocols.PROTOCOLS[config.protocol].score_rate
    if rate(get(preset)) != rate(restorer.spec):
        raise ValueError(f"--baseline has preset {preset}, the system {restorer.config.preset}; compare at one preset")
    folder = results_folder(config, baseline)
    stale = is_stale(folder, config, baseline)
    if stale and not overwrite and stale != "none":
        raise ValueError(f"--baseline: {folder} {stale}; pass --overwrite to evaluate it again")
    if stale:
        print(f"{baseline} is evaluated first", file=sys.stderr)
        evaluate(config, baseline, raw=raw, overwrite=True, command=f"for a baseline of {restorer.name}")
    summary = json.loads((folder / "summary.json").read_text())
    system = summary["system"]
    rows = [r for r in reference_cache.read(folder / "clips.csv") if r["kind"] == "system"]
    name = system if system != restorer.name else f"{system} (baseline)"
    facts = {"name": name, "kind": "baseline", "run": summary["runs"][system], "folder": str(folder)}
    return facts, [r | {"system": name, "kind": "baseline"} for r in rows]


def is_stale(folder: Path, config: ml_collections.ConfigDict, workdir: Path) -> str:
    """Why an evaluation of a run directory cannot be used: 'none' where there is none, '' where it can be used."""
    from avsi_jax.inference.trained_run import step_of

    if not (folder / "summary.json").is_file():
        return "none"
    summary = json.loads((folder / "summary.json").read_text())
    if config.judge and not summary.get("judge"):
        return "has no scores of a judge, expected those of config.judge"
    old, new = summary["runs"][summary["system"]]["step"], step_of(workdir, config.checkpoint)
    return "" if old == new else f"is of step {old}, but checkpoint {config.checkpoint!r} is now of step {new}"


def add_baseline(systems: list[dict], rows: list[dict], facts: dict, others: list[dict]) -> tuple[list[dict], list[dict]]:
    """(systems, rows) with those of the baseline added; ValueError where its clips or gaps differ."""
    place = lambda r: (r["clip_id"], r["case"], str(r["gap_ms"]))
    own = {place(r): f"{float(r['start_s']):.6f}" for r in rows if r["kind"] == "system"}
    theirs = {place(r): f"{float(r['start_s']):.6f}" for r in others}
    if own != theirs:
        different = sorted(k for k in own.keys() | theirs.keys() if own.get(k) != theirs.get(k))[0]
        raise ValueError(
            f"--baseline: {facts['folder']} has other clips or gaps (such as {' '.join(filter(None, different))} ms); evaluate "
            "it again with the same fields and --overwrite"
        )
    at = [s["kind"] for s in systems].index("system")
    return [*systems[:at], {k: facts[k] for k in ("name", "kind")}, *systems[at:]], rows + others


def in_order(rows: list[dict], cases, systems: list[dict]) -> list[dict]:
    """Rows sorted by clip, case and system."""
    case_at = {(c.name, str(c.gap_ms)): i for i, c in enumerate(cases)}
    system_at = {s["name"]: i for i, s in enumerate(systems)}
    return sorted(rows, key=lambda r: (r["clip_id"], case_at[r["case"], str(r["gap_ms"])], system_at[r["system"]]))


# ---- examples ------------------------------------------------------------------------------------------------------------------


def select_examples(rows: list[dict], system: str, count: int) -> list[tuple[str, str, int, str]]:
    """(clip, case, gap_ms, why) of the examples in the report.

    These are `count` clips spread over all, then the two with the smallest and the two with the largest gap error of the system.
    """
    from avsi_jax.evaluation.bootstrap import number
    from avsi_jax.evaluation.run_systems import spread

    own_rows = [r for r in rows if r["system"] == system]
    places = [(r["clip_id"], r["case"], int(r["gap_ms"])) for r in own_rows]
    cases = list(dict.fromkeys(p[1:] for p in places))
    clips = spread(sorted({p[0] for p in places}), count)
    chosen = [(clip, *cases[i * len(cases) // len(clips)], "") for i, clip in enumerate(clips)]
    scored = sorted((number(r["gap_l1_db"]), *p) for r, p in zip(own_rows, places, strict=True) if number(r["gap_l1_db"]) >= 0)
    if count:
        chosen += [(*p, "among the best") for _, *p in scored[:2]] + [(*p, "among the worst") for _, *p in scored[-2:]]
    return list({c[:3]: c for c in chosen}.values())


def write_examples(
    folder: Path, chosen: list[tuple], clips: Clips, cases: Sequence[Case], protocol: Protocol, sources: dict, batch_size: int
) -> list[dict]:
    """Writes the audio of the chosen clips, restored by each restorer of `sources` ({restorer: its systems}).

    Returns what the report needs to show them.
    """
    from avsi_jax.evaluation import run_systems

    (folder / "audio").mkdir()
    examples = []
    for case in cases:
        here = {clip: why for clip, name, gap_ms, why in chosen if (name, gap_ms) == (case.name, case.gap_ms)}
        for start in range(0, len(here), batch_size):
            batch = clips.batch(sorted(here)[start : start + batch_size], batch_size)
            by_clip: dict = {}
            for restorer, systems in sources.items():
                for output in run_systems.restore_case(batch, case, protocol, restorer, systems):
                    by_clip.setdefault(output.row["clip_id"], []).append(output)
            examples += [write_example(folder, case, outputs) | {"why": here[clip]} for clip, outputs in by_clip.items()]
    return examples


def write_example(folder: Path, case: Case, outputs: list[SystemOutput]) -> dict:
    """Writes the audio of one clip by all systems; returns what the report needs to show it."""
    from avsi_jax.data import grid_text
    from avsi_jax.media import clip_io

    row = outputs[0].row
    stem = f"audio/{row['clip_id']}-{case.gap_ms}{'-' + case.name.replace('=', '_') if case.name else ''}"
    names = [row["system"].replace(" ", "_").replace("'", "").replace(",", "") for row in (o.row for o in outputs)]
    files = {"original": f"{stem}-original.flac"} | {
        o.row["system"]: f"{stem}-{n}.flac" for o, n in zip(outputs, names, strict=True)
    }
    clip_io.write_audio(folder / files["original"], outputs[0].reference, outputs[0].rate)
    for o in outputs:
        clip_io.write_audio(folder / files[o.row["system"]], o.audio, o.rate)
    transcripts = {o.row["system"]: o.row["transcript"] for o in outputs if o.row["transcript"]}
    in_phones = set(row["text"].split()) <= grid_text.PRONUNCIATIONS.keys() and any(map(str.isupper, transcripts.values()))
    return {
        **{k: row[k] for k in ("clip_id", "case", "gap_ms", "start_s", "end_s", "gaps_s", "text")},
        "transcripts": transcripts,
        **({"phones": " ".join(grid_text.phones_of(row["text"]))} if in_phones else {}),
        "audio": files,
    }


def run_facts(restorer: Restorer) -> dict:
    """Step and settings by which runs differ, for summary.json."""
    config = restorer.config
    scalars = ("preset", "seed", "epochs", "batch_size", "schedule", "learning_rate", "clip_norm")
    return {
        "step": restorer.step,
        **{k: config[k] for k in scalars if k in config},
        "loss": config.loss.to_dict(),
        "gaps": config.gaps.to_dict(),
    }


def versions(listeners: Sequence[str] = ()) -> dict[str, str]:
    """Versions of the libraries that affect scores; listeners: the listener models used."""
    import importlib.metadata

    from avsi_jax.evaluation import listener_models

    packages = ("jax", "numpy", "pesq", "pystoi", "librosa", "soxr", "jiwer", *(listener_models.PACKAGES if listeners else ()))
    return {p: importlib.metadata.version(p) for p in packages}


def print_progress(done: int, total: int, began: float, what: str = "clips scored") -> None:
    """Progress with rate and time left on stderr: a line that updates itself on a terminal, every 100th item elsewhere."""
    live = sys.stderr.isatty()
    if live or done == total or done % 100 == 0:
        speed = done / (time.monotonic() - began)
        end = "\r" if live and done < total else "\n"
        print(
            f"{done}/{total} {what}, {speed:.1f} per second, {(total - done) / speed:.0f} s left ",
            end=end,
            file=sys.stderr,
            flush=True,
        )


@unexpected_errors.reported("avsi-evaluate")
def main(argv: list[str] | None = None) -> int:
    """The command avsi-evaluate; returns its exit code."""
    parser = Parser(
        "avsi-evaluate", description="Evaluate a trained system on one split and write a report into its run directory."
    )
    parser.add_argument("--config", default="eval", help="name or .py file of the config; default %(default)s")
    parser.add_argument("--workdir", help="run directory to evaluate; with --checkpoint the folder for the results")
    parser.add_argument(
        "--checkpoint", default="", help="weights to evaluate instead of a run: a name such as pretrained, or a folder"
    )
    parser.add_argument("--baseline", help="another run directory with the same preset, for paired differences")
    parser.add_argument("--raw", help="folder of the dataset's videos, for config.suite=occlusion")
    parser.add_argument("--note", default="", help="text for the top of the report, such as what the data are")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier evaluation of the same split, protocol and suite"
    )
    parser.epilog = (
        "Fields: --config.FIELD=VALUE, e.g. --config.split=test --config.suite=robustness --config.protocol=peer "
        "--config.gap_ms=300,900 --config.max_clips=20"
    )
    known, rest = parser.parse_known_args(argv)
    try:
        config = configs.load(known.config, configs.split_overrides(rest), like="eval")
        if not known.workdir:
            raise ValueError("no --workdir given; expected a run directory")
        command = "avsi-evaluate " + " ".join(sys.argv[1:] if argv is None else argv)
        folder = evaluate(
            config, Path(known.workdir), checkpoint=known.checkpoint, baseline=known.baseline, raw=known.raw,
            overwrite=known.overwrite, command=command, note=known.note,
        )  # fmt: skip
        print(folder / "report.html")
    except (ValueError, OSError) as error:
        print(f"avsi-evaluate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
