"""The runs behind docs/results.md: their configs, protocols and splits, and the scores that are committed in docs/results/."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path

from avsi_jax import configs

DOCS = Path(__file__).resolve().parents[2] / "docs"
FOLDER = DOCS / "results"
SCORES = ("gap_l1_db", "gap_l1_mel_db", "pesq_nb", "pesq_wb", "stoi", "estoi", "stoi_gap", "wer_gap", "cer", "per")
COLUMNS = ("protocol", "split", "clip_id", "speaker", "gap_ms", "kind", *SCORES)
REFERENCES = ("masked", "interpolation", "oracle_mel")
PAPER_MS = "300,600,900,1200,1500"

# Fields that all runs share: the same clips in the same order, epochs, kind of gaps, and criterion for the best checkpoint.
COMMON = {
    "epochs": 20, "batch_size": 16, "schedule": "cosine", "warmup_epochs": 1, "early_stop_patience": 0,
    "validation_split": "validation_seen", "monitor": "val_gap_l1_db", "gaps.max_count": 4, "gaps.total": "uniform",
    "gaps.total_min_ms": 160, "gaps.total_max_ms": 1600,
}  # fmt: skip
GAP_WEIGHTED = {"loss.whole": 0.1, "loss.gap": 1}
RUNS = {  # name -> (config, further fields)
    "a_si": ("a_si", GAP_WEIGHTED),
    "a_mtl_si": ("a_mtl_si", GAP_WEIGHTED),
    "av_si": ("av_si", GAP_WEIGHTED),
    "av_mtl_si": ("av_mtl_si", GAP_WEIGHTED),
    "av_s2s": ("av_s2s", GAP_WEIGHTED),
    "av_mtl_s2s": ("av_mtl_s2s", GAP_WEIGHTED),
    "av_mtl_s2s_1": ("av_mtl_s2s", GAP_WEIGHTED | {"seed": 1}),
    "av_mtl_s2s_2": ("av_mtl_s2s", GAP_WEIGHTED | {"seed": 2}),
    "morrone": ("morrone_av_mtl", {}),
    "av_unified_paper": ("av_unified_paper", {}),
    "av_unified_paper_1": ("av_unified_paper", {"seed": 1}),
    "av_unified_paper_2": ("av_unified_paper", {"seed": 2}),
    "av_unified_wide": ("av_unified", {}),
}
SEEDS = {name: [name, f"{name}_1", f"{name}_2"] for name in ("av_mtl_s2s", "av_unified_paper")}
AUDIO_ONLY_TWINS = {  # audio-visual run -> the run without video that it is compared with
    "av_si": "a_si", "av_mtl_si": "a_mtl_si", "av_s2s": "a_si", "av_mtl_s2s": "a_mtl_si", "av_unified_paper": "a_mtl_si",
}  # fmt: skip
BEST = "av_unified_paper"
OTHER_VIDEO_PROTOCOLS = ("waveform",)  # evaluated with another clip's video too
PROTOCOLS = {"waveform": PAPER_MS, "peer": "", "paper": ""}  # -> config.gap_ms
SPLITS = {"test_seen": "Seen speakers (test_seen)", "test": "Unseen speakers s30 s32 s33 s34 (test)"}


def preset_of(name: str) -> str:
    """The signal preset of a run's config."""
    config, fields = RUNS[name]
    return configs.load(config, [(k, str(v)) for k, v in fields.items()], like="base").preset


def protocols_of(name: str) -> list[str]:
    """The protocols that a run is evaluated with; further seeds of a system only with the headline protocol."""
    if any(name in seeds[1:] for seeds in SEEDS.values()):
        return ["waveform"]
    return [p for p in PROTOCOLS if p != "paper" or preset_of(name) == "paper"]


@functools.cache
def facts_of(name: str) -> dict | None:
    """The committed summary of a run, docs/results/NAME.json; None where there is none."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def missing_evaluations(name: str) -> list[str]:
    """Evaluations, PROTOCOL-SPLIT, that the committed summary of a run lacks."""
    done = (facts_of(name) or {"evaluations": {}})["evaluations"]
    return [f"{protocol}-{split}" for protocol in protocols_of(name) for split in SPLITS if f"{protocol}-{split}" not in done]


def read_scores(names: list[str], protocol: str, split: str) -> list[dict]:
    """Rows of docs/results/NAME.csv as `bootstrap.summarise` takes them; another clip's video counts as a system of its own."""
    return [row for name in names for row in _rows_of(name) if (row["protocol"], row["split"]) == (protocol, split)]


@functools.cache
def _rows_of(name: str) -> list[dict]:
    path = FOLDER / f"{name}.csv"
    if not path.is_file():
        return []
    label = {"system": name, "other_video": f"{name}, another clip's video"}
    with path.open(newline="") as file:
        return [{**r, "case": "", "system": label.get(r["kind"], r["kind"])} for r in csv.DictReader(file)]
