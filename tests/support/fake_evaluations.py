"""Made-up evaluations: what the tests of the report share. Two networks and their neighbours, three gap lengths, three changes.

Gap errors are 20 - 5 x place + gap / 1000 + clip, places 0 to 3 from damaged to ceiling, clips 0 to 2.
"""

import csv
import json

import numpy as np

from avsi_jax.evaluation import bootstrap, cli, conditions, tables
from avsi_jax.media import clip_io

SYSTEMS = [  # not in the order of the tables
    {"name": "av_mtl_s2s", "kind": "system"},
    {"name": "masked", "kind": "masked"},
    {"name": "a_si", "kind": "baseline"},
    {"name": "true mel (ceiling)", "kind": "oracle_mel"},
]
ORDER = ("masked", "a_si", "av_mtl_s2s", "true mel (ceiling)")
GAPS_MS = (300, 600, 900)
CASES = [conditions.Case(g) for g in GAPS_MS]
CHANGED = [conditions.Case(900, "shift_ms", -80), conditions.Case(900, "shift_ms", 80), conditions.Case(900, "noise_db", 20)]
CLIPS = [("bbaf2n", "s1"), ("lgazzp", "s2"), ("swwp2s", "s10")]
WORDS, SAID = "bin blue at f two now", "bin green at f two now"
HEARD = {"av_mtl_s2s": "bin blue at s two now", "masked": "lay red by s one soon", "a_si": "bin blue by s two now"}
TOUCHED = "001100"  # "at f"
RATE = 16_000


def rows(cases=None, shift=0.0, systems=SYSTEMS):
    """What evaluate writes to clips.csv."""
    kinds = {system["name"]: system["kind"] for system in systems}
    for clip, (clip_id, speaker) in enumerate(CLIPS):
        for case in cases or CASES + CHANGED:
            gap_ms = case.gap_ms
            for place, name in enumerate(ORDER):
                if name not in kinds or (kinds[name] in tables.REFERENCES and not case.changes_references):
                    continue
                bad = clip_id == "swwp2s" and gap_ms == 900 and name == "a_si" and not case.family
                more = shift * (name == "av_mtl_s2s") + 1.5 * bool(case.family)
                yield {
                    "clip_id": clip_id, "speaker": speaker, "case": case.name, "gap_ms": gap_ms, "start_s": 0.4,
                    "end_s": 0.4 + gap_ms / 1000, "gaps_s": f"0.400000-{0.4 + gap_ms / 1000:.6f}",
                    "in_words": clip_id != "lgazzp", "system": name, "kind": kinds[name],
                    "gap_l1_db": 20 - 5 * place + gap_ms / 1000 + clip + more, "gap_l1_mel_db": "" if name == "masked" else 7.5,
                    "pesq_nb": "" if bad else 1.5 + 0.7 * place - gap_ms / 2000, "pesq_wb": "",
                    "stoi": 0.6 + 0.1 * place - gap_ms / 5000, "estoi": 0.5 + 0.1 * place - gap_ms / 5000 - 0.01 * clip,
                    "cer": 0.125 if name == "av_mtl_s2s" else "", "said": SAID if name == "av_mtl_s2s" else "",
                    "text": WORDS, "heard": HEARD.get(name, WORDS), "touched": TOUCHED if clip_id != "lgazzp" else "",
                    "reason": "pesq_nb: <No utterances> detected" if bad else "",
                }  # fmt: skip


def audio(seed, seconds=1.5):
    t = np.arange(round(RATE * seconds)) / RATE
    x = sum(np.sin(2 * np.pi * 130 * k * t) / k for k in range(1, 20)) * np.clip(np.sin(12 * t), 0, None)
    return (0.1 * x + 0.003 * np.random.default_rng(seed).standard_normal(t.size)).astype(np.float32)


def example(folder, clip_id, case, suffix, gaps_s, why=""):
    """Sounds of a clip, and what summary.json says of it."""
    names = {"original": "original", **{s["name"]: s["kind"] for s in SYSTEMS}}
    stem = f"sounds/{clip_id}-{case.gap_ms}{case.family}"
    waveforms = {name: f"{stem}-{kind}{suffix}" for name, kind in names.items()}
    for i, (name, path) in enumerate(waveforms.items()):
        x = audio(i)
        for start, end in gaps_s if name == "masked" else ():
            x[int(start * RATE) : int(end * RATE)] = 0
        clip_io.write_audio(folder / path, x, RATE)
    return {
        "clip_id": clip_id, "case": case.name, "gap_ms": case.gap_ms, "start_s": gaps_s[0][0], "end_s": gaps_s[-1][1],
        "gaps_s": " ".join(f"{s:.6f}-{e:.6f}" for s, e in gaps_s), "text": WORDS, "why": why,
        "said": {"av_mtl_s2s": SAID}, "sounds": waveforms,
    }  # fmt: skip


def make(folder, *, cases=None, shift=0.0, examples=True, systems=SYSTEMS, **changed):
    """A folder as evaluate leaves it, before the report. `shift`: added to the system's gap errors; `changed`: of summary.json."""
    (folder / "sounds").mkdir(parents=True)
    cases = cases or CASES + CHANGED
    table = list(rows(cases, shift, systems))
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, cli.COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    found = bootstrap.summarise(table, tuple(tables.METRICS), [("av_mtl_s2s", "a_si"), ("a_si", "av_mtl_s2s")])
    shown = [
        example(folder, "lgazzp", CASES[2], ".flac", [(0.4, 0.7), (0.9, 1.2)], "among the worst"),
        example(folder, "bbaf2n", CASES[0], ".wav", [(0.4, 0.7)]),
    ]
    summary = {
        "title": "av_mtl_s2s on test <unseen>", "system": "av_mtl_s2s", "protocol": "waveform", "split": "test",
        "protocol_said": "samples lost inside the words", "suite": "robustness", "judge": "asr, step 7",
        "command": "avsi-evaluate --workdir=runs/1 --config.split=test", "date": "2025-06-01", "seconds": {"all": 12.5},
        "versions": {"pesq": "0.0.4"}, "metric_rate": 8000, "num_clips": 3, "systems": systems,
        "gap_ms": sorted({c.gap_ms for c in cases}), "cases": [c._asdict() | {"name": c.name} for c in cases],
        "families": {c.family: conditions.FAMILIES[c.family].label for c in cases if c.family},
        "reach": bootstrap.reach(found["paired"], "gap_l1_db"), "examples": shown if examples else [], **found,
    } | changed  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
