"""Trainings side by side: one row a run, from the split that chose nothing of it but its settings, never from a test split.

    python benchmarks/ablation.py --data_dir=DATA [--splits=validation_seen,validation] [--out=ROWS.json] WORKDIR...

Every clip of a split gets one gap of each length inside its words, as in evaluation. A row holds the mean log-mel error in the gap
of the restored waveform, by one front end for every run (the paper's mel at 8 kHz, floor -80 dB: runs of different presets can be
compared), with the clip's own video, with another clip's and, where the network can do without, with none; the phone or character
error of what was read; and the paired difference from the first run with its 95 % bootstrap interval over clips.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

GAPS_MS = (300, 600, 900, 1200, 1500)
BATCH = 20


def rows_of(workdir: Path, data_dir: str, split: str, builder_config: str, gaps_ms) -> dict:
    """What one run does on one split: per clip and length errors in dB, and what it read."""
    from avsi_jax import evaluate, gaps, input_pipeline
    from avsi_jax.restore import Restorer

    restorer = Restorer.from_workdir(workdir)
    records = input_pipeline.Records(input_pipeline.find_dataset(data_dir, builder_config), split, mouth=False)
    errors: dict[str, dict[str, list]] = {}
    said, true = [], []
    for batch in evaluate.batches(records, evaluate.chosen_clips(records, 0), BATCH):
        lengths = np.minimum(batch["audio_length"], restorer.spec.record_samples)
        real = np.flatnonzero(batch["weight"])
        ways = {"own": batch, "other": batch["other"]} if restorer.system.uses_video else {"own": batch}
        if restorer.system.drops:
            ways["none"] = {**batch, "landmarks_valid": np.zeros_like(batch["landmarks_valid"])}
        for ms in gaps_ms:
            places = zip(batch["clip_id"], batch["speech"], lengths, strict=True)
            gap = np.asarray([[gaps.place_in_speech(c, ms, tuple(s), int(n))] for c, s, n in places])
            for way, seen in ways.items():
                restored = restorer.restore(seen, gap)
                sound = restorer.to_sound(restored.level, {k: v for k, v in seen.items() if isinstance(v, np.ndarray)}, gap)
                found = gap_error(batch, sound, gap, lengths)
                for b in real:
                    errors.setdefault(way, {}).setdefault(str(ms), []).append(float(found[b]))
                if way == "own" and ms == 900 and restorer.system.reads:
                    said += [restored.said[b] for b in real]
                    true += [batch["text"][b] for b in real]
    return {"errors": errors, "reading": reading_error(restorer.config, said, true)}


def gap_error(batch: dict, sound: np.ndarray, gap: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B,) dB by the evaluation's own measure."""
    from avsi_jax import gaps, media, metrics, spec

    preset = spec.get(metrics.GAP_PRESET)
    here = np.arange(sound.shape[1]) < lengths[:, None]
    original = media.from_int16(batch["audio"][:, : sound.shape[1]])
    pair = [np.stack([media.resample(x, spec.RECORD_RATE, preset.rate) for x in np.where(here, y, 0)]) for y in (original, sound)]
    frames = preset.frames_of(pair[0].shape[1])
    inside = np.arange(frames) * preset.hop * preset.decimation < lengths[:, None]
    return np.asarray(metrics.gap_l1_db(*pair, np.asarray(gaps.centred_frames(gap, preset, frames)) & inside))


def reading_error(config, said: list[str], true: list[str]) -> float | None:
    """Pooled error of what was read by greedy decoding, in the units of the head; None where nothing is read."""
    from avsi_jax import decode, text

    if not said:
        return None
    if config.ctc_units == "phones":
        return decode.phone_error_rate([(s, " ".join(text.phones_of(t))) for s, t in zip(said, true)]).rate
    return decode.character_error_rate(list(zip(said, true))).rate


def table(results: dict[str, dict]) -> list[str]:
    """Markdown rows, a run each, of one split."""
    from avsi_jax import metrics

    first = next(iter(results))
    mean = lambda run, way: np.mean([v for v in run["errors"][way].values()], 0)  # over lengths, clip by clip
    lines = ["| run | " + " | ".join(f"{ms} ms" for ms in GAPS_MS) + " | mean | other video | no video | reading error | mean less "
             f"{first}'s |", "| --- | " + "---: | " * (len(GAPS_MS) + 4) + "---: |"]  # fmt: skip
    for name, run in results.items():
        own = run["errors"]["own"]
        cells = [f"{np.mean(own[str(ms)]):.2f}" for ms in GAPS_MS] + [f"{mean(run, 'own').mean():.2f}"]
        cells += [f"{mean(run, way).mean():.2f}" if way in run["errors"] else "" for way in ("other", "none")]
        cells.append("" if run["reading"] is None else f"{run['reading']:.3f}")
        difference, low, high = metrics.paired_difference(mean(run, "own"), mean(results[first], "own"))
        cells.append("" if name == first else f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", type=Path)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--builder_config", default="speaker_independent")
    parser.add_argument("--splits", default="validation_seen,validation")
    parser.add_argument("--out", type=Path, help="keeps every clip's errors; runs found there are not evaluated again")
    args = parser.parse_args()
    if any(split.startswith("test") for split in args.splits.split(",")):
        parser.error(f"--splits: found {args.splits}, expected validation splits: settings are not chosen on a test split")
    kept = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for split in args.splits.split(","):
        for workdir in args.workdirs:
            if workdir.name not in kept.setdefault(split, {}):
                print(f"{split}: {workdir.name}", file=sys.stderr)
                kept[split][workdir.name] = rows_of(workdir, args.data_dir, split, args.builder_config, GAPS_MS)
                if args.out:
                    args.out.write_text(json.dumps(kept))
        print(f"\n{split}\n", *table({w.name: kept[split][w.name] for w in args.workdirs}), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
