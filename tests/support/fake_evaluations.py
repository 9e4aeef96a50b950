"""Fake evaluations for the tests of reports and model cards: two networks, two references, three gap lengths, three changes.

Gap errors are 20 - 5 x place + gap / 1000 + clip, with places 0 to 3 from masked audio to oracle mel and clips 0 to 2.
"""

import csv
import json

import numpy as np

from avsi_jax.evaluation import bootstrap, cli, conditions, tables
from avsi_jax.media import clip_io

SYSTEMS = [  # deliberately not in the order of the tables
    {"name": "av_mtl_s2s", "kind": "system"},
    {"name": "masked audio", "kind": "masked"},
    {"name": "a_si", "kind": "baseline"},
    {"name": "oracle mel (upper bound)", "kind": "oracle_mel"},
]
ORDER = ("masked audio", "a_si", "av_mtl_s2s", "oracle mel (upper bound)")
GAPS_MS = (300, 600, 900)
CASES = [conditions.Case(g) for g in GAPS_MS]
CHANGED = [conditions.Case(900, "shift_ms", -80), conditions.Case(900, "shift_ms", 80), conditions.Case(900, "noise_db", 20)]
CLIPS = [("bbaf2n", "s1"), ("lgazzp", "s2"), ("swwp2s", "s10")]
WORDS, TRANSCRIPT = "bin blue at f two now", "bin green at f two now"
RECOGNIZED = {"av_mtl_s2s": "bin blue at s two now", "masked audio": "lay red by s one soon", "a_si": "bin blue by s two now"}
TOUCHED = "001100"  # "at f"
RATE = 16_000


def rows(cases=None, shift=0.0, systems=SYSTEMS):
    """The rows of clips.csv."""
    kinds = {system["name"]: system["kind"] for system in systems}
    for clip, (clip_id, speaker) in enumerate(CLIPS):
        for case in cases or CASES + CHANGED:
            gap_ms = case.gap_ms
            for place, name in enumerate(ORDER):
                if name not in kinds or (kinds[name] in tables.REFERENCES and not case.changes_references):
                    continue
                failed = clip_id == "swwp2s" and gap_ms == 900 and name == "a_si" and not case.family
                added = shift * (name == "av_mtl_s2s") + 1.5 * bool(case.family)
                yield {
                    "clip_id": clip_id, "speaker": speaker, "case": case.name, "gap_ms": gap_ms, "start_s": 0.4,
                    "end_s": 0.4 + gap_ms / 1000, "gaps_s": f"0.400000-{0.4 + gap_ms / 1000:.6f}",
                    "in_words": clip_id != "lgazzp", "system": name, "kind": kinds[name],
                    "gap_l1_db": 20 - 5 * place + gap_ms / 1000 + clip + added,
                    "gap_l1_mel_db": "" if name == "masked audio" else 7.5,
                    "pesq_nb": "" if failed else 1.5 + 0.7 * place - gap_ms / 2000, "pesq_wb": "",
                    "stoi": 0.6 + 0.1 * place - gap_ms / 5000, "estoi": 0.5 + 0.1 * place - gap_ms / 5000 - 0.01 * clip,
                    "cer": 0.125 if name == "av_mtl_s2s" else "", "transcript": TRANSCRIPT if name == "av_mtl_s2s" else "",
                    "text": WORDS, "recognized": RECOGNIZED.get(name, WORDS), "touched": TOUCHED if clip_id != "lgazzp" else "",
                    "reason": "pesq_nb: <No utterances> detected" if failed else "",
                }  # fmt: skip


def audio(seed, seconds=1.5):
    """(N,) float32 at RATE: a buzz in syllables with a little noise."""
    t = np.arange(round(RATE * seconds)) / RATE
    x = sum(np.sin(2 * np.pi * 130 * k * t) / k for k in range(1, 20)) * np.clip(np.sin(12 * t), 0, None)
    return (0.1 * x + 0.003 * np.random.default_rng(seed).standard_normal(t.size)).astype(np.float32)


def example(folder, clip_id, case, suffix, gaps_s, why=""):
    """Writes the audio of an example; returns its entry in summary.json."""
    names = {"original": "original", **{s["name"]: s["kind"] for s in SYSTEMS}}
    stem = f"audio/{clip_id}-{case.gap_ms}{case.family}"
    files = {name: f"{stem}-{kind}{suffix}" for name, kind in names.items()}
    for i, (name, path) in enumerate(files.items()):
        x = audio(i)
        for start, end in gaps_s if name == "masked audio" else ():
            x[int(start * RATE) : int(end * RATE)] = 0
        clip_io.write_audio(folder / path, x, RATE)
    return {
        "clip_id": clip_id, "case": case.name, "gap_ms": case.gap_ms, "start_s": gaps_s[0][0], "end_s": gaps_s[-1][1],
        "gaps_s": " ".join(f"{s:.6f}-{e:.6f}" for s, e in gaps_s), "text": WORDS, "why": why,
        "transcripts": {"av_mtl_s2s": TRANSCRIPT}, "audio": files,
    }  # fmt: skip


def make(folder, *, cases=None, shift=0.0, examples=True, systems=SYSTEMS, **changed):
    """A folder of results, no report. `shift` is added to the system's gap errors; `changed` replaces keys of summary.json."""
    (folder / "audio").mkdir(parents=True)
    cases = cases or CASES + CHANGED
    table = list(rows(cases, shift, systems))
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, cli.COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    estimates = bootstrap.summarise(table, tuple(tables.METRICS), [("av_mtl_s2s", "a_si"), ("a_si", "av_mtl_s2s")])
    shown = [
        example(folder, "lgazzp", CASES[2], ".flac", [(0.4, 0.7), (0.9, 1.2)], "among the worst"),
        example(folder, "bbaf2n", CASES[0], ".wav", [(0.4, 0.7)]),
    ]
    summary = {
        "title": "av_mtl_s2s on test <unseen>", "system": "av_mtl_s2s", "protocol": "waveform", "split": "test",
        "protocol_description": "samples set to zero inside the words", "suite": "robustness", "judge": "asr, step 7",
        "command": "avsi-evaluate --workdir=runs/1 --config.split=test", "date": "2025-06-01", "seconds": {"all": 12.5},
        "versions": {"pesq": "0.0.4"}, "metric_rate": 8000, "num_clips": 3, "systems": systems,
        "gap_ms": sorted({c.gap_ms for c in cases}), "cases": [c._asdict() | {"name": c.name} for c in cases],
        "families": {c.family: conditions.FAMILIES[c.family].label for c in cases if c.family},
        "reach": bootstrap.reach(estimates["paired"], "gap_l1_db"), "examples": shown if examples else [], **estimates,
    } | changed  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
