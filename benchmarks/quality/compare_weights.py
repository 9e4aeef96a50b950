"""Compares weights of one preset by all metrics, beside masked audio, interpolation and the oracle mel.

    python -m benchmarks.quality.compare_weights --data_dir=DATA --weights=pretrained --weights=DIR [--split=validation] [--csv=F]

Prints Markdown tables: means by gap length (of the level error the median), and paired differences from the first weights. Gaps are
those of protocol `waveform`. Rows of --csv=F that exist are kept, and their systems are not computed again.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from avsi_jax.data import input_pipeline
from avsi_jax.evaluation import bootstrap, conditions, listener_models, metrics, protocols, reference_cache, run_systems
from avsi_jax.inference.restorer import Restorer

LISTED = ("plcmos", "dnsmos", "stoi", "estoi", "pesq_wb", "pesq_nb", "level_error_db", "gap_l1_db")
BATCH = 16  # clips restored at once


def systems_of(weights: list[str]) -> dict[str, tuple[Restorer, str]]:
    """Name -> (restorer, kind) of every row of a clip."""
    restorers = {Path(name).name: Restorer.load(name) for name in weights}
    first = next(iter(restorers.values()))
    if others := {n for n, r in restorers.items() if r.spec != first.spec}:
        raise SystemExit(f"--weights: found another preset in {', '.join(sorted(others))}, expected {first.spec.name}")
    rows = {"masked audio": (first, "masked"), "interpolation": (first, "interpolation")}
    rows |= {name: (restorer, "system") for name, restorer in restorers.items()}
    return rows | {"oracle mel": (first, "oracle_mel")}


def score(data_dir: str, split: str, max_clips: int, gap_lengths: list[int], systems: dict, known: list[dict]) -> list[dict]:
    """A row with all scores for every clip, gap length and system; rows in `known` are taken from there."""
    records = input_pipeline.Records(input_pipeline.find_dataset(data_dir, "speaker_independent"), split, mouth=False)
    clips = run_systems.Clips(records, run_systems.select_clips(records, max_clips))
    done = {(r["clip_id"], int(r["gap_ms"]), r["system"]) for r in known}
    wanted = [(ms, name) for ms in gap_lengths for name in systems if any((c, ms, name) not in done for c in clips.raw)]
    rows, total = [], len(clips.raw) * len(wanted)

    def items():
        for batch in clips.batches(BATCH):
            for gap_ms, name in wanted:
                restorer, kind = systems[name]
                case, row = conditions.Case(gap_ms), [{"name": name, "kind": kind}]
                for output in run_systems.restore_case(batch, case, protocols.PROTOCOLS["waveform"], restorer, row):
                    rows.append(output.row)
                    yield output.item

    progress = lambda n, _: print(f"{n} of {total} scored", file=sys.stderr, flush=True) if n % 50 == 0 else None
    scores = metrics.score_many(items(), progress=progress, listener_models=listener_models.NAMES)
    for row, values in zip(rows, scores, strict=True):
        row.update(values)
    kept = [r for r in known if (int(r["gap_ms"]), r["system"]) not in wanted and r["clip_id"] in clips.raw]
    return kept + rows


def print_tables(rows: list[dict], names: list[str], split: str) -> None:
    """Prints means by gap length and system, and differences of the later `names` from the first."""
    by_speaker = split in ("validation", "test")
    parts = {"": rows} | ({} if by_speaker else bootstrap.groups_of_speakers(rows))
    for group, members in parts.items():
        summary = bootstrap.summarise(members, LISTED, [(name, names[0]) for name in names[1:]], by_speaker=by_speaker)
        clips = len({r["clip_id"] for r in members})
        print(f"\n{split}{', ' * bool(group)}{group}, n = {clips}\n\n| gap, ms | system | {' | '.join(LISTED)} |")
        print(f"|---:|---|{'---:|' * len(LISTED)}")
        cells: dict = {}
        for e in summary["table"]:
            value = f"{e['median']:.1f}" if e["metric"] == "level_error_db" else f"{e['mean']:.3f}"
            cells.setdefault((e["gap_ms"], e["system"]), {})[e["metric"]] = value
        for e in summary["paired"]:
            value = f"{e['mean']:+.3f} [{e['low']:+.3f}, {e['high']:+.3f}]"
            cells.setdefault((e["gap_ms"], f"{e['a']} minus {e['b']}"), {})[e["metric"]] = value
        for (gap_ms, name), values in sorted(cells.items(), key=lambda item: item[0][0]):
            print(f"| {gap_ms} | {name} | {' | '.join(values.get(m, '') for m in LISTED)} |", flush=True)


def main() -> None:
    """The command `python -m benchmarks.quality.compare_weights`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True, help="datasets written by avsi-prepare")
    parser.add_argument("--weights", action="append", required=True, help="name or folder of weights, or a run directory; repeated")
    parser.add_argument("--split", default="validation", help="default %(default)s")
    parser.add_argument("--max_clips", type=int, default=0, help="default all")
    parser.add_argument("--gap_ms", default="300,900,1500", help="default %(default)s")
    parser.add_argument("--csv", type=Path, help="file for the scores of every clip")
    args = parser.parse_args()
    if missing := listener_models.missing_packages():
        raise SystemExit(f"found no {' and no '.join(missing)}; {listener_models.INSTALL}")
    systems, lengths = systems_of(args.weights), [int(ms) for ms in args.gap_ms.split(",")]
    known = reference_cache.read(args.csv) or [] if args.csv else []
    rows = score(args.data_dir, args.split, args.max_clips, lengths, systems, known)
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[-1]), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    print_tables(rows, [name for name, (_, kind) in systems.items() if kind == "system"], args.split)


if __name__ == "__main__":
    main()
