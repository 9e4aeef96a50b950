"""Trains and evaluates every system on the same data, and writes docs/results.md.

    python -m benchmarks.results.results run --data_dir=DATA --runs=DIR [--judge=RUN] [NAME...]   what is not committed yet
    python -m benchmarks.results.results add NAME WORKDIR    commits the scores of a run after avsi-evaluate
    python -m benchmarks.results.results                     writes docs/results.md and docs/results/tables/ from docs/results/

`make table` is the first. docs/results/NAME.csv holds the scores of every clip, NAME.json how the run was trained and evaluated;
every mean, interval and difference of the page is computed from them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.results import results_page
from benchmarks.results.runs import (
    COLUMNS,
    COMMON,
    DOCS,
    FOLDER,
    OTHER_VIDEO_PROTOCOLS,
    PROTOCOLS,
    REFERENCES,
    RUNS,
    SPLITS,
    facts_of,
    missing_evaluations,
    protocols_of,
)

EVALUATION_FACTS = (  # kept from an evaluation's summary.json
    "command", "date", "seconds", "references", "num_clips", "batch_size", "metric_rate", "versions", "judge", "fingerprint",
)  # fmt: skip


def run(names: list[str], data_dir: str, folder: Path, judge: str) -> None:
    """Trains and evaluates every run with missing evaluations in `folder`, continuing what was begun there; writes the page."""
    for name in names or RUNS:
        if not missing_evaluations(name):
            continue
        workdir = folder / name
        for command in commands(name, data_dir, workdir, judge):
            print("$", *command, flush=True)
            if subprocess.run([sys.executable, "-m", *command]).returncode:
                raise SystemExit(f"results: {name}: {' '.join(command)} failed")
        add(name, workdir)
    write()


def commands(name: str, data_dir: str, workdir: Path, judge: str) -> Iterator[list[str]]:
    """The training of a run, then its evaluations that do not exist yet, as arguments of `python -m`."""
    config, fields = RUNS[name]
    where = [f"--workdir={workdir}", f"--config.data_dir={data_dir}"]
    yield ["avsi_jax.train", f"--config={config}", *where, *(f"--config.{k}={v}" for k, v in (COMMON | fields).items())]
    for protocol in protocols_of(name):
        gap_ms = PROTOCOLS[protocol]
        for split in SPLITS:
            if (workdir / "eval" / f"{protocol}-{split}-lengths" / "summary.json").is_file():
                continue
            options = {"protocol": protocol, "split": split, "gap_ms": gap_ms, "judge": judge, "examples": 2}
            if protocol not in OTHER_VIDEO_PROTOCOLS:
                options["other_video"] = "False"
            yield ["avsi_jax.evaluate", *where, *(f"--config.{k}={v}" for k, v in options.items() if v)]


def add(name: str, workdir: Path) -> None:
    """Copies the scores of each evaluation under `workdir` to docs/results/NAME.csv, and facts about the run to NAME.json."""
    expected = [workdir / "eval" / f"{protocol}-{split}-lengths" for protocol in PROTOCOLS for split in SPLITS]
    folders = sorted(f for f in expected if (f / "summary.json").is_file())
    if not folders:
        raise SystemExit(f"results: no evaluation in {workdir}; expected one made by avsi-evaluate --workdir={workdir}")
    FOLDER.mkdir(exist_ok=True)
    rows, references, evaluations = [], [], {}
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        place = {k: summary[k] for k in ("protocol", "split")}
        with (folder / "clips.csv").open(newline="") as file:
            scores = [{**{k: shortened(r.get(k, "")) for k in COLUMNS}, **place} for r in csv.DictReader(file)]
        with_other = place["protocol"] in OTHER_VIDEO_PROTOCOLS
        rows += [r for r in scores if r["kind"] == "system" or (r["kind"] == "other_video" and with_other)]
        references += [r for r in scores if r["kind"] in REFERENCES]
        facts = {k: summary.get(k, "") for k in EVALUATION_FACTS}
        evaluations["-".join(place.values())] = facts | {"command": without_paths(summary["command"])}
    facts = training_facts(workdir) | {"evaluations": evaluations}
    write_scores(FOLDER / f"{name}.csv", rows)
    (FOLDER / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    path, replaced = FOLDER / f"references-{facts['config']['preset']}.csv", {(r["protocol"], r["split"]) for r in references}
    if path.is_file():  # keep the references of protocols that this run has no evaluation of
        with path.open(newline="") as file:
            references += [r for r in csv.DictReader(file) if (r["protocol"], r["split"]) not in replaced]
    write_scores(path, sorted(references, key=lambda r: (r["protocol"], r["split"])))
    print(FOLDER / f"{name}.json")


def without_paths(command: str) -> str:
    """A command with its paths replaced by names such as WORKDIR."""
    return re.sub(r"--(workdir|config\.data_dir|config\.judge)=\S+", lambda m: f"--{m[1]}={m[1].split('.')[-1].upper()}", command)


def shortened(cell: str) -> str:
    """A number with at most four decimals, which is finer than every interval here; other cells unchanged."""
    try:
        return f"{float(cell):.4f}".rstrip("0").rstrip(".") if "." in cell else cell
    except ValueError:
        return cell


def write_scores(path: Path, rows: list[dict]) -> None:
    """Writes a CSV file of per-clip scores."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def training_facts(workdir: Path) -> dict:
    """Epochs, hours, devices and parameters of a run, and its config without data_dir."""
    with (workdir / "timing.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    config = {k: v for k, v in json.loads((workdir / "config.json").read_text()).items() if k != "data_dir"}
    run_json = json.loads((workdir / "run.json").read_text())
    seconds = sum(float(r["epoch_s"]) for r in rows)
    return {
        "epochs": len(rows),
        "hours": round(seconds / 3600, 3),
        "steps_per_s": round(sorted(float(r["steps_per_s"]) for r in rows)[len(rows) // 2], 3),
        "devices": run_json["devices"],
        "parameters": run_json["parameters"],
        "clips": run_json["dataset"]["clips"],
        "revision": run_json.get("git_revision", run_json.get("revision", "")),
        "config": config,
    }


def write(docs: Path = DOCS) -> None:
    """Writes results.md and results/tables/*.csv in the folder `docs`."""
    facts_of.cache_clear()  # `add` may have written new ones
    folder = docs / "results" / "tables"
    results_page.compute().write(folder)
    (docs / "results.md").write_text(results_page.page(results_page.Tables.read(folder)))
    print(docs / "results.md")


def main(argv: list[str] | None = None) -> int:
    """The command `python -m benchmarks.results.results`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("run", "add"), help="without it: only write the page")
    parser.add_argument("names", nargs="*", help=f"run: some of {', '.join(RUNS)} (default: all); add: NAME WORKDIR")
    parser.add_argument("--data_dir", default=os.environ.get("AVSI_DATA", ""), help="dataset written by avsi-prepare")
    parser.add_argument("--runs", type=Path, help="folder of the runs' workdirs, outside of the repository")
    parser.add_argument("--judge", default="", help="workdir of a recognizer")
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
