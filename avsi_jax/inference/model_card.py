"""Facts about a trained run (data, speakers, training, measured quality), and the model card made of them.

`facts_of` collects the facts from the run directory, its quality only from its evaluations. They are JSON, so that programs can
read them too. `text` turns them into README.md. Paths of the training machine are left out.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

from avsi_jax.models import systems
from avsi_jax.runtime import shown_paths

if TYPE_CHECKING:
    import ml_collections

    from avsi_jax.inference.trained_run import Run

SEEN, UNSEEN = "test_seen", "test"  # splits: other clips of training speakers, and speakers that were not in training
SPLITS = {SEEN: "seen speakers", UNSEEN: "unseen speakers"}
METRICS = {
    "gap_l1_db": "error in the gap, dB", "stoi_gap": "STOI in the gap", "stoi": "STOI", "pesq_nb": "PESQ nb", "pesq_wb": "PESQ wb",
    "plcmos": "PLCMOS", "dnsmos": "DNSMOS", "level_error_db": "level error in the gap, dB",
}  # fmt: skip
KINDS = ("system", "mean", "masked", "interpolation", "other_video", "oracle_mel")
AUDIO_VIDEO, AUDIO, VIDEO = "audio and video", "audio", "video"  # the streams that a restoration used
STREAMS = {"": AUDIO_VIDEO, "no_video=1": AUDIO, "whole_clip=1": VIDEO}  # cases of suite `streams` -> streams used
DIGITS = 5  # significant digits of stored numbers
LICENSE = "Apache-2.0"
ATTRIBUTION = (
    "Trained on the Grid audio-visual sentence corpus by M. Cooke, J. Barker, S. Cunningham and X. Shao, University of Sheffield "
    "(J. Acoust. Soc. Am. 120(5), 2006, doi:10.1121/1.2229005; doi:10.5281/zenodo.3625687), licensed under CC BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/). The corpus was divided into splits, its audio converted to 16 kHz mono "
    "and its video to face landmarks; these files contain no part of it."
)


# ---- facts ---------------------------------------------------------------------------------------------------------------------


def facts_of(workdir: str | Path, run: Run) -> dict:
    """{'license', 'attribution', 'data', 'training', 'evaluations', 'measured'} of a run, from the files of its run directory."""
    workdir = Path(workdir)
    recorded = _read_json(workdir / "run.json")
    evaluations = [e for path in sorted(workdir.glob("eval/*/summary.json")) if (e := evaluation(path, run.step))]
    return {
        "license": LICENSE,
        "attribution": ATTRIBUTION,
        "data": recorded.get("dataset", {}) | {"speakers": _speakers(run.config, recorded.get("dataset", {}))},
        "training": _training(workdir, run, recorded),
        "evaluations": evaluations,
        "measured": measured(evaluations, streams_of(run.config)),
    }


def _training(workdir: Path, run: Run, recorded: dict) -> dict:
    """Settings of the training, and its validation metrics at the run's step."""
    config = run.config
    scalars = ("seed", "epochs", "batch_size", "learning_rate", "schedule", "monitor", "train_split", "validation_split")
    rows = [r for r in _rows(workdir / "metrics.csv") if float(r["step"]) <= run.step]
    at_step = {k: _rounded(float(v)) for k, v in rows[-1].items() if k.startswith("val_") and v} if rows else {}
    seconds = sum(float(r["epoch_s"]) for r in _rows(workdir / "timing.csv"))
    return {
        "step": run.step,
        "epochs_done": int(float(rows[-1]["epoch"])) if rows else 0,
        **{k: config[k] for k in scalars},
        "validation": {k: v for k, v in at_step.items() if v == v},
        "minutes": round(seconds / 60),
        **{k: recorded[k] for k in ("parameters", "devices", "processes", "revision", "python", "versions") if k in recorded},
    }


def _speakers(config: ml_collections.ConfigDict, dataset: dict) -> dict:
    """{split: {speaker: clips}} from the dataset's build report; {} where that version of the dataset is no longer there."""
    home = Path(config.data_dir) / "grid" / config.builder_config / str(dataset.get("version", ""))
    report = _read_json(home / "build_report.json") if config.data_dir else {}
    return report.get("speakers", {})


def evaluation(path: Path, step: int) -> dict | None:
    """The facts of one evaluation, from its summary.json and the clips.csv beside it.

    None for an evaluation of another step or protocol: numbers of the protocols `paper` and `peer` are not mixed with ours.
    """
    summary = _read_json(path)
    if summary.get("protocol") != "waveform" or summary.get("runs", {}).get(summary.get("system"), {}).get("step") != step:
        return None
    systems = {s["name"]: s["kind"] for s in summary["systems"] if s["kind"] in KINDS}
    table = [
        {"case": e["case"], "gap_ms": e["gap_ms"], "kind": systems[e["system"]], "metric": e["metric"], "n": e["n"],
         "missing": e["missing"], **{k: _rounded(e[k]) for k in ("mean", "low", "high", "median") if k in e}}
        for e in summary["table"] if e["system"] in systems and e["metric"] in METRICS
    ]  # fmt: skip
    speakers: dict[str, set] = {}
    for row in _rows(path.parent / "clips.csv"):
        speakers.setdefault(row["speaker"], set()).add(row["clip_id"])
    return {
        **{k: summary[k] for k in ("split", "suite", "protocol", "num_clips", "by_speaker", "date")},
        **{k: summary[k] for k in ("intervals",) if k in summary},
        "command": shown_paths.without_folders(summary["command"]),
        "speakers": {s: len(clips) for s, clips in sorted(speakers.items())},
        "table": table,
    }


def streams_of(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Case of an evaluation -> the streams that the system uses in it; an audio-only system always uses audio alone."""
    return STREAMS if systems.get(config.system).uses_video else {"": AUDIO}


def measured(evaluations: list[dict], streams: dict[str, str]) -> dict:
    """{streams: {gap length in ms: {metric: mean}}} of unseen speakers.

    Gap lengths come from the suites `lengths` and `unseen`, single streams from `streams`.
    """
    means: dict = {}
    of_unseen = [e for e in evaluations if e["split"] == UNSEEN and e["suite"] in ("streams", "lengths", "unseen")]
    for e in sorted(of_unseen, key=lambda e: e["suite"] != "streams"):
        for row in e["table"]:
            if row["kind"] == "system" and row["case"] in streams:
                by_length = means.setdefault(streams[row["case"]], {})
                by_length.setdefault(str(row["gap_ms"]), {})[row["metric"]] = row["mean"]
    return {k: dict(sorted(v.items(), key=lambda item: int(item[0]))) for k, v in means.items()}


def _rounded(x: float) -> float:
    return float(f"{x:.{DIGITS}g}")


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected a file of avsi-train or avsi-evaluate") from error


def _rows(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- card ----------------------------------------------------------------------------------------------------------------------


def text(name: str, config: ml_collections.ConfigDict, facts: dict) -> str:
    """README.md: a YAML head for model hubs, then model, use, data, quality, limits and training."""
    sections = [_data(facts), _quality(facts, streams_of(config)), _limits(facts), _training_section(facts)]
    parts = [_head(name, config, facts), _model(name, config, facts), USE, *sections]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _head(name: str, config: ml_collections.ConfigDict, facts: dict) -> str:
    video_tags = "audio-visual, lip-reading, " if systems.get(config.system).uses_video else ""
    lines = [
        "---", f"license: {facts.get('license', LICENSE).lower()}", "library_name: avsi_jax", "language: en",
        "pipeline_tag: audio-to-audio", f"tags: [speech-inpainting, {video_tags}jax, flax]", "datasets: [grid]",
        "metrics: [stoi, pesq]", *_model_index(name, config, facts), "---",
    ]  # fmt: skip
    return "\n".join(lines)


def _model_index(name: str, config: ml_collections.ConfigDict, facts: dict) -> list[str]:
    """Lines of the hubs' `model-index`: unseen speakers, every gap length."""
    lines, task = [], "audio-visual speech inpainting" if systems.get(config.system).uses_video else "speech inpainting"
    for e in facts.get("evaluations", []):
        if (e["split"], e["suite"]) not in ((UNSEEN, "lengths"), (UNSEEN, "unseen")):
            continue
        for ms in sorted({row["gap_ms"] for row in e["table"]}):
            rows = [r for r in e["table"] if (r["gap_ms"], r["kind"], r["case"]) == (ms, "system", "")]
            lines += [
                f"  - task: {{type: audio-to-audio, name: {task}}}",
                f'    dataset: {{type: grid, name: "Grid, unseen speakers, gap of {ms} ms, n={e["num_clips"]}", split: {UNSEEN}}}',
                "    metrics:",
                *(f'    - {{type: {r["metric"]}, name: "{METRICS[r["metric"]]}", value: {r["mean"]}}}' for r in rows),
            ]
    return ["model-index:", f"- name: {name}", "  results:", *lines] if lines else []


def _model(name: str, config: ml_collections.ConfigDict, facts: dict) -> str:
    size = facts.get("training", {}).get("parameters")
    parameters = f", {size / 1e6:.1f} million parameters" if size else ""
    system = systems.get(config.system)
    title, source = "speech inpainting", "from the surrounding audio (it uses no video)"
    if system.uses_video:
        title, source = "audio-visual speech inpainting", "from the surrounding audio and the speaker's lips"
    words = " It also predicts the words spoken." if system.has_ctc_head else ""
    return f"""# {name}: {title}

Weights of `{config.system}` of avsi_jax (preset `{config.preset}`{parameters}). They are stored as float16 and used as float32.

The network predicts the spectrogram in the gaps of a clip {source}.{words}
A vocoder turns the spectrogram into audio that joins the known samples. Samples outside the gaps do not change."""


USE = """
## How to use

    pip install .                                                      # in a checkout of avsi_jax
    avsi-inpaint clip.mpg --gap 0.93-1.73 -o out.wav                   # the default weights
    avsi-inpaint clip.mpg --gap 0.93-1.73 -o out.wav --checkpoint=DIR  # the folder that contains this file

    from avsi_jax import Inpainter

    repair = Inpainter.load("DIR").inpaint("clip.mpg", gaps=[(0.93, 1.73)])  # .samples (N, C) at .rate, .gaps, .warnings

`model.safetensors` holds the parameters. `config.json` holds the network's config, its normalisation, and every fact on this card.
The folder contains no code, and loading it runs none.
"""


def _data(facts: dict) -> str:
    data, training = facts.get("data", {}), facts.get("training", {})
    lines = ["## Data, speakers, licence", ""]
    for split, speakers in data.get("speakers", {}).items():
        use = {training.get("train_split"): "training", training.get("validation_split"): "choice of the checkpoint"}.get(split, "")
        use = use or {SEEN: "evaluation, seen speakers", UNSEEN: "evaluation, unseen speakers"}.get(split, "not used")
        listed = ", ".join(f"{s} {speakers[s]}" for s in sorted(speakers, key=lambda s: (len(s), s)))  # s2 before s10
        lines.append(f"- `{split}` ({use}): {sum(speakers.values())} clips; {listed}")
    if not data.get("speakers"):
        lines += [f"- `{split}`: {n} clips" for split, n in data.get("clips", {}).items()]
    fingerprints = ", ".join(f"{split} `{mark}`" for split, mark in data.get("fingerprint", {}).items())
    version = f"grid/{data.get('builder_config', '?')}` {data.get('version', '')}"
    lines += ["", f"Dataset `{version}, fingerprints: {fingerprints or 'unknown'}."]
    licence = f"The weights are under {facts.get('license', LICENSE)}. {facts.get('attribution', ATTRIBUTION)}"
    return "\n".join([*lines, "", licence])


def _quality(facts: dict, streams: dict[str, str]) -> str:
    tables = [_table(e, streams) for e in sorted(facts.get("evaluations", []), key=lambda e: (e["split"] != UNSEEN, e["suite"]))]
    if not any(tables):
        return "## Quality\n\nNot measured yet."
    introduction = (
        "Mean [95 % interval] over clips with one gap each, placed in the words; the samples in the gap are set to zero. The error "
        "in the gap compares the log-mel spectrograms of the restored audio and of the recording. `masked audio`: the input, not "
        "restored. `interpolation`: linear interpolation of the log-mel across the gap, through the same vocoder."
    )
    return "\n\n".join(["## Quality", introduction, *filter(None, tables)])


def _table(e: dict, streams: dict[str, str]) -> str:
    """One evaluation by gap length, or by the streams used."""
    if e["suite"] not in ("lengths", "unseen", "streams"):
        return ""
    cell = {(r["case"], r["gap_ms"], r["kind"], r["metric"]): r for r in e["table"]}
    metrics = [m for m in METRICS if any(key[3] == m for key in cell)]
    heading = SPLITS.get(e["split"], e["split"]).capitalize()
    old = "95 % bootstrap over speakers, then clips, which is much too narrow for few speakers" if e["by_speaker"] else ""
    intervals = e.get("intervals") or old or "95 % bootstrap over clips"
    lines = [
        f"### {heading} (`{e['split']}`), {'by stream' if e['suite'] == 'streams' else 'by gap length'}",
        "", f"n = {e['num_clips']} clips ({', '.join(f'{s} {n}' for s, n in e['speakers'].items())}); `{e['command']}`",
        "", f"Intervals: {intervals}.", "",
        f"| gap, ms | input | {' | '.join(METRICS[m] for m in metrics)} |", "|---|---|" + "---|" * len(metrics),
    ]  # fmt: skip
    for case, ms in dict.fromkeys((case, ms) for case, ms, *_ in cell):
        labels = {"system": streams.get(case, case), "mean": "the same, not refined", "masked": "masked audio"}
        for kind, label in (labels | {"interpolation": "interpolation"}).items():
            cells = [_cell(cell.get((case, ms, kind, m))) for m in metrics]
            if any(cells) and (kind in ("system", "mean") or not case):
                lines.append(f"| {ms} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    missing = f", {row['missing']} clips without a value" if row["missing"] else ""
    return f"{row['mean']:.3g} [{row['low']:.3g}, {row['high']:.3g}]{missing}"


def _limits(facts: dict) -> str:
    data, training = facts.get("data", {}), facts.get("training", {})
    trained = data.get("speakers", {}).get(training.get("train_split"), {})
    most = max(trained, key=trained.get, default="")
    few = (
        f"- Trained on {sum(trained.values())} clips, {trained[most]} of one speaker ({most}): other voices are restored worse.\n"
        if most
        else ""
    )
    few += _pesq_limit(facts)
    return f"""## Limits

{few}- Trained only on Grid: sentences of six words with a fixed grammar ("bin blue at f two now"), read in a studio. The model
  knows no other words, and what it generates in a gap resembles Grid's.
- English; frontal faces, evenly lit, that fill a good part of the frame; no background noise.
- Results for gaps longer than those measured are guesses. The longer a gap, the more is invented.
- **It invents speech.** The audio in a gap is what a network considers likely, not what the person spoke. Do not use it as
  evidence, do not rely on words in it, and label it for listeners. Restore people's voices only with their consent; do not use it
  to put words into someone's mouth."""


def _pesq_limit(facts: dict) -> str:
    """A line about the gap lengths at which interpolation has the better wide-band PESQ on unseen speakers; '' without any."""
    means: dict = {"system": {}, "interpolation": {}}
    for e in facts.get("evaluations", []):
        for row in e["table"] if (e["split"], e["suite"]) == (UNSEEN, "lengths") else ():
            if row["metric"] == "pesq_wb" and not row["case"] and row["kind"] in means:
                means[row["kind"]][row["gap_ms"]] = row["mean"]
    own, interpolated = means.values()
    shared = sorted(own.keys() & interpolated.keys())
    below = [ms for ms in shared if own[ms] < interpolated[ms]]
    if not below:
        return ""
    at = "every length" if below == shared else f"{', '.join(map(str, below))} ms (of {', '.join(map(str, shared))})"
    return f"- Wide-band PESQ of unseen speakers is below that of plain interpolation for gaps of {at}.\n"


def _training_section(facts: dict) -> str:
    if not (t := facts.get("training", {})):
        return ""
    validation = ", ".join(f"{k} {v:.4g}" for k, v in t["validation"].items())
    machine = f"{t.get('processes', 1)} x {', '.join(t.get('devices', ['?']))}"
    packages = ", ".join(f"{k} {v}" for k, v in t.get("versions", {}).items())
    stopped = f" (stopped in epoch {t['stopped_epoch']})" if "stopped_epoch" in t else ""
    lines = [
        f"- Step {t['step']}, epoch {t['epochs_done']} of {t['epochs']}{stopped}; chosen by `{t['monitor']}` on "
        f"`{t['validation_split']}`{f': {validation}' if validation else ''}.",
        f"- Adam, learning rate {t['learning_rate']:g} ({t['schedule']}), batch size {t['batch_size']}, seed {t['seed']}; "
        f"{t['minutes']} minutes on {machine}.",
        f"- Code at git revision {t.get('revision', 'unknown')}, Python {t.get('python', '?')}; {packages}.",
        '- Every field of the config is in `config.json` under "config". To reproduce: `avsi-prepare` builds the dataset, '
        "`avsi-train --config.FIELD=VALUE` trains, and the commands above evaluate.",
    ]
    return "\n".join(["## Training", "", *lines])
