"""Split + protocol + Restorer -> clips.csv, summary.json, sounds, report.html: avsi-evaluate.

Every clip of the split gets one gap of every length, placed inside its words by a hash of its id; beside the system stand the
damaged sound, the linear interpolation of the log-mel, the same system with the lips of another clip, and the true log-mel through
the same vocoder (the ceiling). All sounds are scored against the recording, at the rate of the system's preset.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import math
import resource
import sys
import time
from pathlib import Path

import configs

SYSTEM_METRICS = ("gap_l1_mel_db", "gap_l1_db", "pesq_nb", "pesq_wb", "stoi", "estoi", "cer", "per")
COLUMNS = (
    "clip_id", "speaker", "gap_ms", "start_s", "end_s", "in_words", "system", "kind",
    *SYSTEM_METRICS, "said", "text", "reason",
)  # fmt: skip
PROTOCOLS = ("waveform",)
SUITES = ("lengths",)
UNSEEN_SPLITS = ("validation", "test")  # of speakers that no training saw: intervals resample speakers, then clips


def evaluate(config, workdir: Path, *, baseline: Path | None = None, overwrite: bool = False, command: str = "") -> Path:
    """Evaluates the run in `workdir` (and the one in `baseline` beside it) on one split; returns the folder of the results."""
    from avsi_jax import input_pipeline, metrics, report
    from avsi_jax.restore import Restorer

    # 1. What was asked for.
    check(config)
    folder = Path(workdir) / "eval" / f"{config.protocol}-{config.split}-{config.suite}"
    if (folder / "summary.json").exists() and not overwrite:
        raise FileExistsError(f"{folder} holds an evaluation; take --overwrite to replace it")
    restorer = Restorer.from_workdir(workdir, config.checkpoint)
    others = [Restorer.from_workdir(baseline, config.checkpoint)] if baseline else []
    if others and others[0].config.preset != restorer.config.preset:
        raise ValueError(
            f"--baseline has preset {others[0].config.preset}, the system {restorer.config.preset}; compare at one preset"
        )
    dataset = input_pipeline.find_dataset(
        config.data_dir or restorer.config.data_dir, config.builder_config or restorer.config.builder_config
    )
    records = input_pipeline.Records(dataset, config.split, mouth=False)
    systems = lineup(restorer, others)
    (folder / "sounds").mkdir(parents=True, exist_ok=True)

    # 2. Restore, batch by batch, while processes score what is done.
    rows, examples, began = [], [], time.monotonic()
    clips = chosen_clips(records, config.max_clips)
    shown = dict(zip(spread(sorted(clips), config.examples), itertools.cycle(config.gap_ms), strict=False))
    total = len(clips) * len(config.gap_ms) * len(systems)

    def items():
        for batch in batches(records, clips, config.batch_size):
            for gap_ms in config.gap_ms:
                made = restore_batch(batch, gap_ms, restorer, others, systems)
                rows.extend(m["row"] for m in made)
                here = [c for c, ms in shown.items() if ms == gap_ms and c in batch["clip_id"]]
                examples.extend(keep_example(folder, clip, gap_ms, made) for clip in here)
                yield from (m["item"] for m in made)

    scores = metrics.score_many(items(), config.workers or None, lambda done, _: tick(done, total, began))
    for row, score in zip(rows, scores, strict=True):
        row.update(score)

    # 3. Write.
    write_rows(folder / "clips.csv", rows)
    pairs = [(restorer.name, s["name"]) for s in systems if s["kind"] in ("baseline", "interpolation", "other_video")]
    name_of = {s["kind"]: s["name"] for s in systems}
    unseen = config.split in UNSEEN_SPLITS and dataset.parent.name.startswith("speaker_independent")
    seconds = time.monotonic() - began
    summary = {
        "title": f"{restorer.name} on {config.split}",
        "system": restorer.name,
        "protocol": config.protocol,
        "split": config.split,
        "suite": config.suite,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "seconds": {"all": round(seconds, 1)},
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "by_speaker": unseen,
        "versions": versions(),
        "runs": {name_of[kind]: run_facts(r) for kind, r in [("system", restorer), *(("baseline", o) for o in others)]},
        "metric_rate": restorer.spec.rate,
        "num_clips": len(clips),
        "systems": systems,
        "gap_ms": list(config.gap_ms),
        "examples": examples,
        **metrics.summarise(rows, SYSTEM_METRICS, pairs, by_speaker=unseen),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report.write_report(folder)
    return folder


def check(config) -> None:
    if config.protocol not in PROTOCOLS:
        raise ValueError(f"config.protocol: found {config.protocol!r}, expected {' or '.join(PROTOCOLS)}")
    if config.suite not in SUITES:
        raise ValueError(f"config.suite: found {config.suite!r}, expected {' or '.join(SUITES)}")
    lengths = config.gap_ms
    if not lengths or any(type(ms) is not int or not 20 <= ms <= 3000 for ms in lengths) or len(set(lengths)) < len(lengths):
        raise ValueError(f"config.gap_ms: found {lengths}, expected lengths between 20 and 3000 ms, each once")


def lineup(restorer, others) -> list[dict]:
    """Names and kinds of every row of a clip, in the order of the tables."""
    names = [{"name": "damaged", "kind": "damaged"}, {"name": "interpolation", "kind": "interpolation"}]
    for other in others:
        names.append({"name": other.name if other.name != restorer.name else f"{other.name} (baseline)", "kind": "baseline"})
    names.append({"name": restorer.name, "kind": "system"})
    if restorer.system.uses_video:
        names.append({"name": f"{restorer.name}, another clip's video", "kind": "other_video"})
    return [*names, {"name": "true mel (ceiling)", "kind": "ceiling"}]


# ---- clips ---------------------------------------------------------------------------------------------------------------------


def chosen_clips(records, max_clips: int) -> dict[str, int]:
    """clip id -> index in the records, spread evenly over the sorted ids where only some are wanted."""
    place = {clip: i for i, clip in enumerate(records.clip_ids)}
    wanted = spread(sorted(place), max_clips) if max_clips else sorted(place)
    return {clip: place[clip] for clip in wanted}


def spread(items: list, count: int) -> list:
    """`count` of the items, evenly spread, in order; all of them where there are fewer."""
    if count >= len(items):
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def batches(records, clips: dict[str, int], batch_size: int):
    """Raw batches of the clips, each with `speaker`, `text` and the pictures' side of another clip under `other`.

    The other clip is the speaker's next one by id, or the next of anybody where the speaker has only one. The last batch is
    filled up with its last clip at weight 0, so that every batch has one shape.
    """
    import numpy as np

    from avsi_jax import input_pipeline

    raw = {clip: records[i] for clip, i in clips.items()}
    partner = other_clips({clip: r["speaker"] for clip, r in raw.items()})
    ids = sorted(raw)
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        filled = part + [part[-1]] * (batch_size - len(part))
        batch = stack([input_pipeline.to_example(raw[c]) for c in filled])
        batch["weight"] = np.asarray([1.0] * len(part) + [0.0] * (batch_size - len(part)), np.float32)
        batch["speaker"], batch["text"] = ([raw[c][k] for c in filled] for k in ("speaker", "text"))
        other = stack([input_pipeline.to_example(raw[partner[c]]) for c in filled])
        video = ("landmarks", "landmarks_valid", "num_frames", "frame_size", "fps", "offset_s")
        batch["other"] = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)} | {k: other[k] for k in video}
        yield batch


def stack(examples: list[dict]) -> dict:
    import numpy as np

    return {k: [e[k] for e in examples] if k == "clip_id" else np.stack([e[k] for e in examples]) for k in examples[0]}


def other_clips(speakers: dict[str, str]) -> dict[str, str]:
    """clip id -> the id whose video stands in for its own."""
    partner = {}
    for pool in [sorted(speakers)] + [sorted(c for c in speakers if speakers[c] == s) for s in set(speakers.values())]:
        if len(pool) > 1:
            partner |= {clip: pool[(i + 1) % len(pool)] for i, clip in enumerate(pool)}
    return {clip: partner.get(clip, clip) for clip in speakers}


# ---- one batch -----------------------------------------------------------------------------------------------------------------


def restore_batch(batch: dict, gap_ms: int, restorer, others, systems) -> list[dict]:
    """Every system's sound for every clip of a batch with a gap of one length, in the order of the tables.

    Returns, row by row, {"row": cells of clips.csv known so far, "item": for `metrics.score_many`, "sound", "original" (n,)}.
    """
    import numpy as np

    from avsi_jax import gaps, media
    from avsi_jax.restore import fill
    from avsi_jax.spec import RECORD_RATE

    spec = restorer.spec
    lengths = np.minimum(batch["audio_length"], spec.record_samples)
    places = zip(batch["clip_id"], batch["speech"], lengths, strict=True)
    gap = np.asarray([[gaps.place_in_speech(c, gap_ms, tuple(s), int(n))] for c, s, n in places])
    levels, said, error = restore_levels(batch, gap, restorer, others)
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    sounds = {kind: fill(level, arrays, gap, restorer.config.preset) for kind, level in levels.items()}
    original = media.from_int16(batch["audio"][:, : spec.record_samples])
    sounds["damaged"] = np.where(np.asarray(gaps.lost_samples(gap, original.shape[1])), 0.0, original).astype(np.float32)
    made = []
    for b in np.flatnonzero(batch["weight"]):
        start, end = (gap[b, 0] / RECORD_RATE).tolist()
        recording = original[b, : lengths[b]]
        reference = media.resample(recording, RECORD_RATE, spec.rate)
        for system in systems:
            kind = system["kind"]
            sound = sounds[kind][b, : lengths[b]]
            degraded = media.resample(sound, RECORD_RATE, spec.rate)
            row = {
                "clip_id": batch["clip_id"][b],
                "speaker": batch["speaker"][b],
                "gap_ms": gap_ms,
                "start_s": round(start, 6),
                "end_s": round(end, 6),
                "in_words": bool(batch["has_words"][b]),
                "system": system["name"],
                "kind": kind,
                "gap_l1_mel_db": float(error[kind][b]) if kind in error else None,
                **heard(said.get(kind), batch["text"][b], b),
            }
            item = {"reference": reference, "degraded": degraded, "rate": spec.rate, "gap_s": (start, end)}
            made.append({"row": row, "item": item, "sound": sound, "original": recording})
    return made


def restore_levels(batch: dict, gap, restorer, others) -> tuple[dict, dict, dict]:
    """By kind of system: levels (B, F, K), of lip readers texts and their units, the level's mean error in the gap (B,) in dB."""
    import numpy as np

    from avsi_jax import gaps, stft
    from avsi_jax.restore import interpolate_level

    own = restorer.restore(batch, gap)
    features, spec = own.features, restorer.spec
    results, reads = {"system": own}, {"system": restorer, "other_video": restorer}
    for other in others:
        results["baseline"], reads["baseline"] = other.restore(batch, gap), other
    if restorer.system.uses_video:
        results["other_video"] = restorer.restore(batch["other"], gap)
    levels = {kind: r.level for kind, r in results.items()}
    levels["interpolation"] = interpolate_level(features.spectrogram, features.mask, features.valid)
    levels["ceiling"] = features.target
    inside = np.asarray(gaps.centred_frames(gap, spec, spec.num_frames) & features.valid)
    count = np.maximum(inside.sum(-1), 1)
    off = {kind: np.abs(np.asarray(level - features.target)).mean(-1) for kind, level in levels.items()}
    error = {kind: stft.db_per_level(spec) * (e * inside).sum(-1) / count for kind, e in off.items()}
    said = {k: (r.said, reads[k].config.ctc_units) for k, r in results.items() if reads[k].system.reads}
    return levels, said, error


def heard(said: tuple[list[str], str] | None, text: str, b: int) -> dict:
    """Cells for what was read, (B texts, their units): empty where a system doesn't read, no error where the truth isn't
    known, else the error in characters or in phones.
    """
    from avsi_jax import metrics

    cells = {"cer": None, "per": None, "said": "", "text": text}
    if said is None:
        return cells
    texts, units = said
    name, measure = ("per", metrics.phone_error) if units == "phones" else ("cer", metrics.character_error)
    error = measure(text, texts[b])
    return cells | {name: None if math.isnan(error) else error, "said": texts[b]}


# ---- files ---------------------------------------------------------------------------------------------------------------------


def keep_example(folder: Path, clip: str, gap_ms: int, made: list[dict]) -> dict:
    """Writes one clip's sounds and returns what the report needs to show them."""
    from avsi_jax import media, text
    from avsi_jax.spec import RECORD_RATE

    mine = [m for m in made if m["row"]["clip_id"] == clip]
    sounds = {"original": f"sounds/{clip}-{gap_ms}-original.flac"}
    media.write_sound(folder / sounds["original"], mine[0]["original"], RECORD_RATE)
    for m in mine:
        name = m["row"]["system"]
        sounds[name] = f"sounds/{clip}-{gap_ms}-{m['row']['kind']}.flac"
        media.write_sound(folder / sounds[name], m["sound"], RECORD_RATE)
    first = mine[0]["row"]
    said = {m["row"]["system"]: m["row"]["said"] for m in mine if m["row"]["said"]}
    spoken = set(first["text"].split()) <= text.PRONUNCIATIONS.keys() and any(map(str.isupper, said.values()))
    return {
        "clip_id": clip,
        "gap_ms": gap_ms,
        "start_s": first["start_s"],
        "end_s": first["end_s"],
        "text": first["text"],
        "said": said,
        **({"phones": " ".join(text.phones_of(first["text"]))} if spoken else {}),
        "sounds": sounds,
    }


def write_rows(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


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


def tick(done: int, total: int, began: float) -> None:
    """One line that rewrites itself on a terminal; every 100th sound elsewhere."""
    live = sys.stderr.isatty()
    if live or done == total or done % 100 == 0:
        speed = done / (time.monotonic() - began)
        end = "\r" if live and done < total else "\n"
        print(
            f"scored {done}/{total} sounds, {speed:.1f} a second, {(total - done) / speed:.0f} s left ",
            end=end,
            file=sys.stderr,
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "avsi-evaluate", description="Evaluate a trained system on one split; writes a report into its workdir."
    )
    parser.add_argument("--config", default="eval", help="a name or a .py file; default %(default)s")
    parser.add_argument("--workdir", help="the run to evaluate")
    parser.add_argument("--baseline", help="another run at the same preset, shown beside it with paired differences")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation of the same split and protocol")
    parser.epilog = "Fields: --config.FIELD=VALUE, e.g. --config.split=test --config.gap_ms=300,900 --config.max_clips=20"
    known, rest = parser.parse_known_args(argv)
    try:
        config = configs.load(known.config, configs.split_overrides(rest), like="eval")
        if not known.workdir:
            raise ValueError("no --workdir given; expected the folder of a training")
        command = "avsi-evaluate " + " ".join(sys.argv[1:] if argv is None else argv)
        folder = evaluate(config, Path(known.workdir), baseline=known.baseline, overwrite=known.overwrite, command=command)
        print(folder / "report.html")
    except (ValueError, OSError) as error:
        print(f"avsi-evaluate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
