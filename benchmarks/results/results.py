"""Every system on the same data -> docs/results.md.

    python -m benchmarks.results.results run --data_dir=DATA --runs=DIR [--judge=RUN] [NAME...]   trains and evaluates what isn't committed
    python -m benchmarks.results.results add NAME WORKDIR        after avsi-evaluate: what the tables need of every evaluation there
    python -m benchmarks.results.results                         writes docs/results.md anew from docs/results/

`make table` is the first. docs/results/NAME.csv holds the scores of every clip, NAME.json what was trained and how it was
evaluated; every mean, interval and difference of the page is worked out from them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from avsi_jax import configs

DOCS = Path(__file__).resolve().parents[2] / "docs"
HOME = DOCS / "results"
SCORES = ("gap_l1_db", "gap_l1_mel_db", "pesq_nb", "pesq_wb", "stoi", "estoi", "stoi_gap", "wer_gap", "cer", "per")
COLUMNS = ("protocol", "split", "clip_id", "speaker", "gap_ms", "kind", *SCORES)
REFERENCES = ("masked", "interpolation", "oracle_mel")
KEPT = (
    "command", "date", "seconds", "references", "num_clips", "batch_size", "metric_rate", "versions", "judge", "fingerprint",
)  # fmt: skip
PAPER_MS = "300,600,900,1200,1500"

# What all runs share: the same clips, order and number of epochs, gaps of the same kind, checkpoints chosen by the same number.
COMMON = {
    "epochs": 20, "batch_size": 16, "schedule": "cosine", "warmup_epochs": 1, "early_stop_patience": 0,
    "validation_split": "validation_seen", "monitor": "val_gap_l1_db", "gaps.max_count": 4, "gaps.total": "uniform",
    "gaps.total_min_ms": 160, "gaps.total_max_ms": 1600,
}  # fmt: skip
IN_THE_GAP = {"loss.whole": 0.1, "loss.gap": 1}
RUNS = {  # name -> config, and what else is said
    "a_si": ("a_si", IN_THE_GAP),
    "a_mtl_si": ("a_mtl_si", IN_THE_GAP),
    "av_si": ("av_si", IN_THE_GAP),
    "av_mtl_si": ("av_mtl_si", IN_THE_GAP),
    "av_s2s": ("av_s2s", IN_THE_GAP),
    "av_mtl_s2s": ("av_mtl_s2s", IN_THE_GAP),
    "av_mtl_s2s_1": ("av_mtl_s2s", IN_THE_GAP | {"seed": 1}),
    "av_mtl_s2s_2": ("av_mtl_s2s", IN_THE_GAP | {"seed": 2}),
    "morrone": ("morrone_av_mtl", {}),
    "av_unified_paper": ("av_unified_paper", {}),
    "av_unified_paper_1": ("av_unified_paper", {"seed": 1}),
    "av_unified_paper_2": ("av_unified_paper", {"seed": 2}),
    "av_unified_wide": ("av_unified", {}),
}
SEEDS = {name: [name, f"{name}_1", f"{name}_2"] for name in ("av_mtl_s2s", "av_unified_paper")}
AT_PAPER = ("a_si", "a_mtl_si", "av_si", "av_mtl_si", "av_s2s", "av_mtl_s2s", "av_unified_paper")  # at preset `paper`
TWINS = {"av_si": "a_si", "av_mtl_si": "a_mtl_si", "av_s2s": "a_si", "av_mtl_s2s": "a_mtl_si", "av_unified_paper": "a_mtl_si"}
BEST = "av_unified_paper"
OTHER_VIDEO = ("waveform",)  # protocols whose tables tell what another clip's lips do
PROTOCOLS = {"waveform": PAPER_MS, "peer": "", "paper": ""}  # -> config.gap_ms
SPLITS = {"test_seen": "Speakers heard in training (test_seen)", "test": "Unseen speakers s30 s32 s33 s34 (test)"}


# ---- run and keep --------------------------------------------------------------------------------------------------------------


def run(names: list[str], data_dir: str, runs: Path, judge: str) -> None:
    """Trains and evaluates every run whose committed summary lacks something; what is there of it is gone on with."""
    for name in names or RUNS:
        if not missing(name):
            continue
        workdir = runs / name
        for command in commands(name, data_dir, workdir, judge):
            print("$", *command, flush=True)
            if subprocess.run([sys.executable, "-m", *command]).returncode:
                raise SystemExit(f"results: {name}: {' '.join(command)} failed")
        add(name, workdir)
    write()


def missing(name: str) -> list[str]:
    """Evaluations, PROTOCOL-SPLIT, that the committed summary of a run lacks."""
    kept = HOME / f"{name}.json"
    done = json.loads(kept.read_text())["evaluations"] if kept.is_file() else {}
    return [f"{protocol}-{split}" for protocol in protocols_of(name) for split in SPLITS if f"{protocol}-{split}" not in done]


def protocols_of(name: str) -> list[str]:
    """Those that a run is evaluated by: of a system's other seeds the headline's alone."""
    if any(name in seeds[1:] for seeds in SEEDS.values()):
        return ["waveform"]
    config, fields = RUNS[name]
    preset = configs.load(config, [(k, str(v)) for k, v in fields.items()], like="base").preset
    return [p for p in PROTOCOLS if p != "paper" or preset == "paper"]


def commands(name: str, data_dir: str, workdir: Path, judge: str):
    """The training of a run, then its evaluations that aren't there."""
    config, fields = RUNS[name]
    where = [f"--workdir={workdir}", f"--config.data_dir={data_dir}"]
    yield ["avsi_jax.train", f"--config={config}", *where, *(f"--config.{k}={v}" for k, v in (COMMON | fields).items())]
    for protocol in protocols_of(name):
        gap_ms = PROTOCOLS[protocol]
        for split in SPLITS:
            if (workdir / "eval" / f"{protocol}-{split}-lengths" / "summary.json").is_file():
                continue
            told = {"protocol": protocol, "split": split, "gap_ms": gap_ms, "judge": judge, "examples": 2}
            if protocol not in OTHER_VIDEO:
                told["other_video"] = "False"
            yield ["avsi_jax.evaluate", *where, *(f"--config.{k}={v}" for k, v in told.items() if v)]


def add(name: str, workdir: Path) -> None:
    """Copies what the tables need of each evaluation under `workdir` to docs/results/NAME.csv and .json."""
    wanted = [workdir / "eval" / f"{protocol}-{split}-lengths" for protocol in PROTOCOLS for split in SPLITS]
    folders = sorted(f for f in wanted if (f / "summary.json").is_file())
    if not folders:
        raise SystemExit(f"results: no evaluation in {workdir}; expected one made by avsi-evaluate --workdir={workdir}")
    HOME.mkdir(exist_ok=True)
    rows, references, evaluations = [], [], {}
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        place = {k: summary[k] for k in ("protocol", "split")}
        with (folder / "clips.csv").open(newline="") as file:
            found = [{**{k: shortened(r.get(k, "")) for k in COLUMNS}, **place} for r in csv.DictReader(file)]
        rows += [r for r in found if r["kind"] == "system" or (r["kind"] == "other_video" and r["protocol"] in OTHER_VIDEO)]
        references += [r for r in found if r["kind"] in REFERENCES]
        evaluations["-".join(place.values())] = {k: summary.get(k, "") for k in KEPT} | {"command": nowhere(summary["command"])}
    facts = training_facts(workdir) | {"evaluations": evaluations}
    write_csv(HOME / f"{name}.csv", rows)
    (HOME / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    kept_at, new = HOME / f"references-{facts['config']['preset']}.csv", {(r["protocol"], r["split"]) for r in references}
    if kept_at.is_file():  # of protocols that this run wasn't evaluated by yet
        with kept_at.open(newline="") as file:
            references += [r for r in csv.DictReader(file) if (r["protocol"], r["split"]) not in new]
    write_csv(kept_at, sorted(references, key=lambda r: (r["protocol"], r["split"])))
    print(HOME / f"{name}.json")


def nowhere(command: str) -> str:
    """A command less the folders of one machine."""
    return re.sub(r"--(workdir|config\.data_dir|config\.judge)=\S+", lambda m: f"--{m[1]}={m[1].split('.')[-1].upper()}", command)


def shortened(cell: str) -> str:
    """Four decimals are below every interval here."""
    try:
        return f"{float(cell):.4f}".rstrip("0").rstrip(".") if "." in cell else cell
    except ValueError:
        return cell


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def training_facts(workdir: Path) -> dict:
    """Epochs, hours, device and parameters of the run, and its config less the paths of a machine."""
    with (workdir / "timing.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    config = {k: v for k, v in json.loads((workdir / "config.json").read_text()).items() if k != "data_dir"}
    run = json.loads((workdir / "run.json").read_text())
    seconds = sum(float(r["epoch_s"]) for r in rows)
    return {
        "epochs": len(rows),
        "hours": round(seconds / 3600, 3),
        "steps_per_s": round(sorted(float(r["steps_per_s"]) for r in rows)[len(rows) // 2], 3),
        "devices": run["devices"],
        "parameters": run["parameters"],
        "clips": run["dataset"]["clips"],
        "revision": run.get("git_revision", run.get("revision", "")),
        "config": config,
    }


# ---- the page ------------------------------------------------------------------------------------------------------------------


def read(name: str, as_name: str = "") -> list[dict]:
    """Rows of a csv in docs/results as `bootstrap.summarise` takes them; other videos are a system of their own."""
    path = HOME / f"{name}.csv"
    if not path.is_file():
        return []
    label = {"system": as_name or name, "other_video": f"{as_name or name}, another clip's video"}
    with path.open(newline="") as file:
        return [{**r, "case": "", "system": label.get(r["kind"], r["kind"])} for r in csv.DictReader(file)]


def write() -> None:
    from benchmarks.results import results_page

    (DOCS / "results.md").write_text(results_page.page())
    print(DOCS / "results.md")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("run", "add"), help="nothing: write the page")
    parser.add_argument("names", nargs="*", help="run: of RUNS, all where there is none; add: NAME WORKDIR")
    parser.add_argument("--data_dir", default=os.environ.get("AVSI_DATA", ""), help="where avsi-prepare wrote")
    parser.add_argument("--runs", type=Path, help="folder of the workdirs, outside of the repository")
    parser.add_argument("--judge", default="", help="workdir of a recogniser")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.names[: 1 if args.what == "add" else None]) - set(RUNS)):
        parser.error(f"no run {unknown[0]!r}; expected {', '.join(RUNS)}")
    if args.what == "run":
        if not args.data_dir or not args.runs:
            parser.error("run needs --data_dir and --runs")
        run(args.names, args.data_dir, args.runs, args.judge)
    elif args.what == "add":
        if len(args.names) != 2:
            parser.error("add needs NAME and WORKDIR")
        add(args.names[0], Path(args.names[1]))
    else:
        write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
