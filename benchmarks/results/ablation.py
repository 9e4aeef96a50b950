"""Compares training runs on the validation splits: docs/ablations.json and the tables of docs/systems.md.

    python -m benchmarks.results.ablation add GROUP --data_dir=DATA [--out=CLIPS.json] RUN RUN...   evaluates runs
    python -m benchmarks.results.ablation        rewrites the tables from the JSON

Every clip of a validation split, never of a test split, gets one gap of each length inside its words, as in evaluation. A row
holds the mean log-mel error in the gap of the restored waveform. It uses one front end for every run (the paper's mel at 8 kHz,
floor -80 dB), so that runs of different presets can be compared. For one gap length it also holds the error with another clip's
video and, if the network handles missing streams, without video and without any audio; and the error of the predicted text, in the
units of the CTC head. Differences from the first run of the group are paired, with a 95 % bootstrap interval over clips (unseen
speakers: a t interval over their means). The tables are between `<!-- GROUP -->` and `<!-- end -->` in docs/systems.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS, PAGE = DOCS / "ablations.json", DOCS / "systems.md"
GAPS_MS = (300, 600, 900, 1200, 1500)
STREAMS_MS = 900  # gap length at which a stream is removed or replaced, and the text is scored
SPLITS = ("validation_seen", "validation")
HEADINGS = {"validation_seen": "Seen speakers (validation_seen)", "validation": "Unseen speakers (validation)"}
BATCH = 20
OMITTED_FIELDS = {"data_dir"}  # config fields that do not describe the run


def scores_of(workdir: Path, data_dir: str, split: str, builder_config: str, gaps_ms: Sequence[int]) -> dict:
    """Scores of one run on one split: errors in dB by kind of input, gap length and clip; the text error; the clips' speakers."""
    from avsi_jax.audio import gap_masks
    from avsi_jax.data import input_pipeline
    from avsi_jax.evaluation import run_systems
    from avsi_jax.inference.restorer import Restorer

    restorer = Restorer.from_workdir(workdir)
    records = input_pipeline.Records(input_pipeline.find_dataset(data_dir, builder_config), split, mouth=False)
    errors: dict[str, dict[str, list]] = {}
    transcripts, texts, speakers = [], [], []
    for batch in run_systems.Clips(records, run_systems.select_clips(records, 0)).batches(BATCH):
        lengths = np.minimum(batch["audio_length"], restorer.spec.record_samples)
        real = np.flatnonzero(batch["weight"])
        speakers += [batch["speaker"][b] for b in real]
        inputs = {"own_video": batch}
        if restorer.system.uses_video:
            inputs["other_video"] = batch | batch["donors"]["clip"]
        arrays = lambda fields: {k: v for k, v in fields.items() if isinstance(v, np.ndarray)}
        if restorer.system.handles_missing_streams:
            inputs["no_video"] = {**batch, "landmarks_valid": np.zeros_like(batch["landmarks_valid"])}
            everything = np.stack([np.zeros_like(lengths), lengths], -1)[:, None]
            video_only = restorer.to_audio(restorer.restore(batch, everything).level, arrays(batch), everything)
        for ms in gaps_ms:
            places = zip(batch["clip_id"], batch["speech"], lengths, strict=True)
            gap = np.asarray([[gap_masks.place_in_speech(c, ms, tuple(s), int(n))] for c, s, n in places])
            for kind, fields in inputs.items() if ms == STREAMS_MS else [("own_video", batch)]:
                restored = restorer.restore(fields, gap)
                audio = restorer.to_audio(restored.level, arrays(fields), gap)
                append(errors, kind, ms, gap_error(batch, audio, gap, lengths)[real])
                if kind == "own_video" and ms == STREAMS_MS and restorer.system.has_ctc_head:
                    transcripts += [restored.transcript[b] for b in real]
                    texts += [batch["text"][b] for b in real]
            if restorer.system.handles_missing_streams and ms == STREAMS_MS:
                append(errors, "video_only", ms, gap_error(batch, video_only, gap, lengths)[real])
    return {"errors": errors, "text_error": text_error(restorer.config, transcripts, texts), "speakers": speakers}


def append(errors: dict, kind: str, ms: int, values: np.ndarray) -> None:
    """Appends the errors of a batch to errors[kind][gap length]."""
    errors.setdefault(kind, {}).setdefault(str(ms), []).extend(map(float, values))


def gap_error(batch: dict, audio: np.ndarray, gap: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B,) log-mel error in the gap in dB, as in evaluation. audio (B, N) at the record rate, gap (B, 1, 2), lengths (B,)."""
    from avsi_jax import presets
    from avsi_jax.audio import gap_masks
    from avsi_jax.evaluation import metrics
    from avsi_jax.media import clip_io

    preset = presets.get(metrics.GAP_PRESET)
    valid = np.arange(audio.shape[1]) < lengths[:, None]
    original = clip_io.from_int16(batch["audio"][:, : audio.shape[1]])
    pair = [
        np.stack([clip_io.resample(x, presets.RECORD_RATE, preset.rate) for x in np.where(valid, y, 0)]) for y in (original, audio)
    ]
    frames = preset.frames_of(pair[0].shape[1])
    inside = np.arange(frames) * preset.hop * preset.decimation < lengths[:, None]
    return np.asarray(metrics.gap_l1_db(*pair, np.asarray(gap_masks.centred_frames(gap, preset, frames)) & inside))


def text_error(config: ConfigDict, transcripts: list[str], texts: list[str]) -> float | None:
    """Pooled error of greedy decoding, in the units of the CTC head; None without a CTC head."""
    from avsi_jax.data import grid_text
    from avsi_jax.models import ctc_decoding

    if not transcripts:
        return None
    if config.ctc_units == "phones":
        pairs = [(s, " ".join(grid_text.phones_of(t))) for s, t in zip(transcripts, texts)]
        return ctc_decoding.phone_error_rate(pairs).rate
    return ctc_decoding.character_error_rate(list(zip(transcripts, texts))).rate


def row_of(run: dict, first: dict, unseen: bool) -> dict:
    """The table row of a run on one split, from its scores and those of the group's first run. unseen: interval over speakers."""
    from avsi_jax.evaluation import bootstrap

    mean = lambda scores, kind: np.mean([v for v in scores["errors"][kind].values()], 0)  # of each clip over gap lengths
    row = {"gap_l1_db": {ms: round(float(np.mean(v)), 3) for ms, v in run["errors"]["own_video"].items()}}
    row |= {kind: round(float(mean(run, kind).mean()), 3) for kind in run["errors"]}
    row["text_error"] = run["text_error"] and round(run["text_error"], 4)
    if run is not first:
        lower = mean(run, "own_video") - mean(first, "own_video")
        difference = bootstrap.speaker_mean(lower, run["speakers"]) if unseen else bootstrap.bootstrap_mean(lower)
        row["difference"] = [round(float(x), 3) for x in difference]
    return row | {"clips": len(next(iter(run["errors"]["own_video"].values())))}


def facts_of(workdir: Path, first: Path) -> dict:
    """Config fields that differ from the first run's (for the first run: from base), parameters, epochs and best error."""
    from avsi_jax import configs
    from avsi_jax.models import build
    from avsi_jax.training import run_directory

    config, other = (ConfigDict(run_directory.read_config(w)) for w in (workdir, first))
    other = configs.load("base") if workdir == first else other
    fields = [f for f in configs.fields(config) if f not in OMITTED_FIELDS]
    differs = {f: field_value(config, f) for f in fields if field_value(config, f) != field_value(other, f)}
    rows = run_directory.read_rows(workdir / run_directory.METRICS)
    return {
        "differs": differs,
        "parameters": build.parameter_count(config),
        "epochs": int(rows[-1]["epoch"]),
        "best_val_gap_l1_db": min(r["val_gap_l1_db"] for r in rows),
    }


def field_value(config: ConfigDict, field: str) -> Any:
    """The value of a dotted field such as loss.ctc."""
    for name in field.split("."):
        config = config[name]
    return config


def add(group: str, workdirs: list[Path], data_dir: str, builder_config: str, out: Path | None) -> None:
    """Evaluates the runs on both splits and stores their rows under the group. out: cache of the scores of every clip."""
    if len({w.name for w in workdirs}) < len(workdirs):
        raise SystemExit("ablation: two runs have the same name; expected different names, which label the rows of the table")
    place_of(group, PAGE.read_text())
    clips = json.loads(out.read_text()) if out and out.exists() else {}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for split in SPLITS:
        for workdir in workdirs:
            if workdir.name not in clips.setdefault(split, {}):
                print(f"{split}: {workdir.name}", file=sys.stderr)
                clips[split][workdir.name] = scores_of(workdir, data_dir, split, builder_config, GAPS_MS)
                if out:
                    out.write_text(json.dumps(clips))
    first = workdirs[0]
    results[group] = {
        w.name: facts_of(w, first) | {s: row_of(clips[s][w.name], clips[s][first.name], s == "validation") for s in SPLITS}
        for w in workdirs
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def table(runs: dict[str, dict]) -> str:
    """Markdown of one group: a table of the runs, then one table of results per split."""
    first, *others = runs
    as_text = lambda fields: ", ".join(f"{f}={v}" for f, v in fields)
    shared = (
        [f for f in runs[others[0]]["differs"].items() if all(f in runs[o]["differs"].items() for o in others)]
        if others[1:]
        else []
    )
    lines = [f"All but {first}: {as_text(shared)}.", ""] if shared else []
    lines += ["| run | what differs | parameters | epochs |", "| --- | --- | ---: | ---: |"]
    for name, run in runs.items():
        fields = as_text(f for f in run["differs"].items() if f not in shared) if name != first else "see the text"
        lines.append(f"| {name} | {fields} | {run['parameters']:,} | {run['epochs']} |")
    for split in SPLITS:
        clips = runs[first][split]["clips"]
        head = [f"{ms} ms" for ms in GAPS_MS]
        head += ["mean", f"minus {first}", f"{STREAMS_MS} ms, another clip's video", "no video", "no audio", "text error"]
        lines += ["", f"{HEADINGS[split]}, {clips} clips, dB:", ""]
        lines += [f"| run | {' | '.join(head)} |", "| --- " + "| ---: " * len(head) + "|"]
        for name, run in runs.items():
            row = run[split]
            cells = [f"{row['gap_l1_db'][str(ms)]:.2f}" for ms in GAPS_MS] + [f"{row['own_video']:.2f}"]
            cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*row["difference"]) if "difference" in row else "")
            cells += [f"{row[kind]:.2f}" if kind in row else "" for kind in ("other_video", "no_video", "video_only")]
            cells.append("" if row["text_error"] is None else f"{row['text_error']:.3f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str, results: dict) -> str:
    """The text of docs/systems.md with the tables of all groups in `results`."""
    for group, runs in results.items():
        start, end = place_of(group, text)
        text = f"{text[:start]}\n{table(runs)}\n\n{text[end:]}"
    return text


def place_of(group: str, text: str) -> tuple[int, int]:
    """Start and end of a group's table in the page; SystemExit where there is no such group."""
    match = re.search(rf"<!-- {re.escape(group)} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    if not match:
        raise SystemExit(f"{PAGE} has no place for {group}; expected <!-- {group} --> and <!-- end --> there")
    return match.span(1)


def main() -> int:
    """The command `python -m benchmarks.results.ablation`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["add"], help="without it: only rewrite the tables")
    parser.add_argument("group", nargs="?")
    parser.add_argument("runs", nargs="*", type=Path, help="workdirs; the others are compared with the first")
    parser.add_argument("--data_dir")
    parser.add_argument("--builder_config", default="speaker_independent")
    parser.add_argument("--out", type=Path, help="cache of every clip's scores; runs in it are not evaluated again")
    args = parser.parse_intermixed_args()
    if args.command and not (args.runs and args.data_dir):
        parser.error("add: expected GROUP, --data_dir and workdirs")
    if args.command:
        add(args.group, args.runs, args.data_dir, args.builder_config, args.out)
    if not RESULTS.exists():
        parser.error(f"no {RESULTS}; expected one made by `add`")
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
