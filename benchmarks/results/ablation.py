"""Trainings side by side -> docs/ablations.json and the tables of docs/systems.md.

    python -m benchmarks.results.ablation add GROUP --data_dir=DATA [--out=CLIPS.json] RUN RUN...    keeps what a table needs of the runs
    python -m benchmarks.results.ablation                                                         writes the tables anew from the json

Every clip of a validation split, never of a test split, gets one gap of each length inside its words, as in evaluation. A row holds
the mean log-mel error in the gap of the restored waveform, by one front end for every run (the paper's mel at 8 kHz, floor -80 dB:
runs of different presets can be compared); for one length also with another clip's video and, where the network can do without,
with no video, and with no sound outside the gap either; the error of what was read, in the units of its head; and the paired
difference from the first run of the group with its 95 % bootstrap interval over clips (unseen: over speakers, then clips). A table
stands where docs/systems.md has `<!-- GROUP -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

DOCS = Path(__file__).resolve().parents[2] / "docs"
KEPT, PAGE = DOCS / "ablations.json", DOCS / "systems.md"
GAPS_MS = (300, 600, 900, 1200, 1500)
ONE_MS = 900  # the length at which a stream is taken away or swapped, and reading is scored
SPLITS = ("validation_seen", "validation")
HEADINGS = {"validation_seen": "Speakers heard in training (validation_seen)", "validation": "Unseen speakers (validation)"}
BATCH = 20
UNTOLD = {"data_dir"}  # fields of a config that say nothing of the network


def rows_of(workdir: Path, data_dir: str, split: str, builder_config: str, gaps_ms) -> dict:
    """What one run does on one split: per clip and length errors in dB, and what it read."""
    from avsi_jax.audio import gap_masks
    from avsi_jax.data import input_pipeline
    from avsi_jax.evaluation import run_systems
    from avsi_jax.inference.restorer import Restorer

    restorer = Restorer.from_workdir(workdir)
    records = input_pipeline.Records(input_pipeline.find_dataset(data_dir, builder_config), split, mouth=False)
    errors: dict[str, dict[str, list]] = {}
    said, true, speakers = [], [], []
    for batch in run_systems.Clips(records, run_systems.chosen_clips(records, 0)).batches(BATCH):
        lengths = np.minimum(batch["audio_length"], restorer.spec.record_samples)
        real = np.flatnonzero(batch["weight"])
        speakers += [batch["speaker"][b] for b in real]
        ways = {"own": batch, "other": batch | batch["donors"]["clip"]} if restorer.system.uses_video else {"own": batch}
        arrays = lambda seen: {k: v for k, v in seen.items() if isinstance(v, np.ndarray)}
        if restorer.system.drops:
            ways["none"] = {**batch, "landmarks_valid": np.zeros_like(batch["landmarks_valid"])}
            everything = np.stack([np.zeros_like(lengths), lengths], -1)[:, None]
            unheard = restorer.to_audio(restorer.restore(batch, everything).level, arrays(batch), everything)
        for ms in gaps_ms:
            places = zip(batch["clip_id"], batch["speech"], lengths, strict=True)
            gap = np.asarray([[gap_masks.place_in_speech(c, ms, tuple(s), int(n))] for c, s, n in places])
            for way, seen in ways.items() if ms == ONE_MS else [("own", batch)]:
                restored = restorer.restore(seen, gap)
                keep(errors, way, ms, gap_error(batch, restorer.to_audio(restored.level, arrays(seen), gap), gap, lengths)[real])
                if way == "own" and ms == ONE_MS and restorer.system.reads:
                    said += [restored.transcript[b] for b in real]
                    true += [batch["text"][b] for b in real]
            if restorer.system.drops and ms == ONE_MS:
                keep(errors, "lips", ms, gap_error(batch, unheard, gap, lengths)[real])
    return {"errors": errors, "reading": reading_error(restorer.config, said, true), "speakers": speakers}


def keep(errors: dict, way: str, ms: int, found: np.ndarray) -> None:
    errors.setdefault(way, {}).setdefault(str(ms), []).extend(map(float, found))


def gap_error(batch: dict, audio: np.ndarray, gap: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B,) dB by the evaluation's own measure."""
    from avsi_jax import presets
    from avsi_jax.audio import gap_masks
    from avsi_jax.evaluation import metrics
    from avsi_jax.media import clip_io

    preset = presets.get(metrics.GAP_PRESET)
    here = np.arange(audio.shape[1]) < lengths[:, None]
    original = clip_io.from_int16(batch["audio"][:, : audio.shape[1]])
    pair = [
        np.stack([clip_io.resample(x, presets.RECORD_RATE, preset.rate) for x in np.where(here, y, 0)]) for y in (original, audio)
    ]
    frames = preset.frames_of(pair[0].shape[1])
    inside = np.arange(frames) * preset.hop * preset.decimation < lengths[:, None]
    return np.asarray(metrics.gap_l1_db(*pair, np.asarray(gap_masks.centred_frames(gap, preset, frames)) & inside))


def reading_error(config, said: list[str], true: list[str]) -> float | None:
    """Pooled error of what was read by greedy decoding, in the units of the head; None where nothing is read."""
    from avsi_jax.data import grid_text
    from avsi_jax.models import ctc_decoding

    if not said:
        return None
    if config.ctc_units == "phones":
        return ctc_decoding.phone_error_rate([(s, " ".join(grid_text.phones_of(t))) for s, t in zip(said, true)]).rate
    return ctc_decoding.character_error_rate(list(zip(said, true))).rate


def row_of(run: dict, first: dict, unseen: bool) -> dict:
    """What a table needs of a run on one split, beside the first of its group; `unseen`: speakers are drawn, then their clips."""
    from avsi_jax.evaluation import bootstrap

    mean = lambda of, way: np.mean([v for v in of["errors"][way].values()], 0)  # over lengths, clip by clip
    row = {"gap_l1_db": {ms: round(float(np.mean(v)), 3) for ms, v in run["errors"]["own"].items()}}
    row |= {way: round(float(mean(run, way).mean()), 3) for way in run["errors"]}
    row["reading"] = run["reading"] and round(run["reading"], 4)
    if run is not first:
        groups = run["speakers"] if unseen else None
        difference = bootstrap.paired_difference(mean(run, "own"), mean(first, "own"), groups=groups)
        row["difference"] = [round(float(x), 3) for x in difference]
    return row | {"clips": len(next(iter(run["errors"]["own"].values())))}


def facts_of(workdir: Path, first: Path) -> dict:
    """What the run was: its config where it differs from the first one's, or all that the first one does not have from base."""
    from ml_collections import ConfigDict

    from avsi_jax import configs
    from avsi_jax.models import build
    from avsi_jax.training import run_directory as workdirs

    here, there = (ConfigDict(workdirs.read_config(w)) for w in (workdir, first))
    there = configs.load("base") if workdir == first else there
    value = lambda config, field: eval_field(config, field)
    differs = {f: value(here, f) for f in configs.fields(here) if f not in UNTOLD and value(here, f) != value(there, f)}
    rows = workdirs.read_rows(workdir / workdirs.METRICS)
    return {
        "differs": differs,
        "parameters": build.count_of(here),
        "epochs": int(rows[-1]["epoch"]),
        "best_val_gap_l1_db": min(r["val_gap_l1_db"] for r in rows),
    }


def eval_field(config, field: str):
    """The value of a dotted field."""
    for name in field.split("."):
        config = config[name]
    return config


def add(group: str, workdirs: list[Path], data_dir: str, builder_config: str, out: Path | None) -> None:
    """Evaluates the runs on both splits and keeps their rows under the group; `out` keeps every clip's errors for a second call."""
    if len({w.name for w in workdirs}) < len(workdirs):
        raise SystemExit("ablation.py: found two runs of one name; expected names that differ, since the table goes by them")
    place_of(group, PAGE.read_text())
    clips = json.loads(out.read_text()) if out and out.exists() else {}
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for split in SPLITS:
        for workdir in workdirs:
            if workdir.name not in clips.setdefault(split, {}):
                print(f"{split}: {workdir.name}", file=sys.stderr)
                clips[split][workdir.name] = rows_of(workdir, data_dir, split, builder_config, GAPS_MS)
                if out:
                    out.write_text(json.dumps(clips))
    first = workdirs[0]
    kept[group] = {
        w.name: facts_of(w, first) | {s: row_of(clips[s][w.name], clips[s][first.name], s == "validation") for s in SPLITS}
        for w in workdirs
    }
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")


def table(runs: dict[str, dict]) -> str:
    """Markdown of one group: what each run is, then a table a split."""
    first, *others = runs
    said = lambda fields: ", ".join(f"{f}={v}" for f, v in fields)
    shared = (
        [f for f in runs[others[0]]["differs"].items() if all(f in runs[o]["differs"].items() for o in others)]
        if others[1:]
        else []
    )
    lines = [f"All but {first}: {said(shared)}.", ""] if shared else []
    lines += ["| run | what differs | parameters | epochs |", "| --- | --- | ---: | ---: |"]
    for name, run in runs.items():
        fields = said(f for f in run["differs"].items() if f not in shared) if name != first else "see the text"
        lines.append(f"| {name} | {fields} | {run['parameters']:,} | {run['epochs']} |")
    for split in SPLITS:
        clips = runs[first][split]["clips"]
        head = [f"{ms} ms" for ms in GAPS_MS]
        head += ["mean", f"less {first}'s", f"{ONE_MS} ms, another clip's video", "no video", "no sound", "reading error"]
        lines += ["", f"{HEADINGS[split]}, {clips} clips, dB:", ""]
        lines += [f"| run | {' | '.join(head)} |", "| --- " + "| ---: " * len(head) + "|"]
        for name, run in runs.items():
            row = run[split]
            cells = [f"{row['gap_l1_db'][str(ms)]:.2f}" for ms in GAPS_MS] + [f"{row['own']:.2f}"]
            cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*row["difference"]) if "difference" in row else "")
            cells += [f"{row[way]:.2f}" if way in row else "" for way in ("other", "none", "lips")]
            cells.append("" if row["reading"] is None else f"{row['reading']:.3f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str, kept: dict) -> str:
    """docs/systems.md with the tables of the groups that are kept."""
    for group, runs in kept.items():
        start, end = place_of(group, text)
        text = f"{text[:start]}\n{table(runs)}\n\n{text[end:]}"
    return text


def place_of(group: str, text: str) -> tuple[int, int]:
    """Where a group's table begins and ends; SystemExit where there is no such place."""
    found = re.search(rf"<!-- {re.escape(group)} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    if not found:
        raise SystemExit(f"{PAGE} has no place for {group}; expected <!-- {group} --> and <!-- end --> there")
    return found.span(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["add"], help="without it the page is written anew")
    parser.add_argument("group", nargs="?")
    parser.add_argument("runs", nargs="*", type=Path, help="workdirs; the first one is what the others are compared with")
    parser.add_argument("--data_dir")
    parser.add_argument("--builder_config", default="speaker_independent")
    parser.add_argument("--out", type=Path, help="keeps every clip's errors; runs found there are not evaluated again")
    args = parser.parse_intermixed_args()
    if args.command and not (args.runs and args.data_dir):
        parser.error("add: expected GROUP, --data_dir and workdirs")
    if args.command:
        add(args.group, args.runs, args.data_dir, args.builder_config, args.out)
    if not KEPT.exists():
        parser.error(f"no {KEPT}; expected one made by `add`")
    PAGE.write_text(page(PAGE.read_text(), json.loads(KEPT.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
