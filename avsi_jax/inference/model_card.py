"""What is known of a trained run (data, speakers, training, measured quality), and the model card that tells it.

`facts_of` gathers it from the run's own files, numbers only ever from its evaluations; `text` writes README.md of it. JSON in
between, so that a program may read what the card says. Paths of the machine it was trained on are left out.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from avsi_jax.models import systems

HEARD, UNSEEN = "test_seen", "test"  # splits: other clips of speakers of the training, speakers it never met
SPLITS = {HEARD: "heard speakers", UNSEEN: "unseen speakers"}
METRICS = {
    "gap_l1_db": "error in the gap, dB", "stoi_gap": "STOI in the gap", "stoi": "STOI", "pesq_nb": "PESQ nb", "pesq_wb": "PESQ wb",
}  # fmt: skip
KINDS = ("system", "masked", "interpolation", "other_video", "oracle_mel")
STREAMS = {"": "sound and lips", "no_video=1": "sound", "whole_clip=1": "lips"}  # cases of suite `streams` -> what was there
DIGITS = 5
LICENSE = "Apache-2.0"
ATTRIBUTION = (
    "Trained on the Grid audio-visual sentence corpus by M. Cooke, J. Barker, S. Cunningham and X. Shao, University of Sheffield "
    "(J. Acoust. Soc. Am. 120(5), 2006, doi:10.1121/1.2229005; doi:10.5281/zenodo.3625687), licensed under CC BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/). The corpus was cut into splits, its sound brought to 16 kHz mono and its "
    "pictures to face points; none of it is in these files."
)


# ---- facts ---------------------------------------------------------------------------------------------------------------------


def facts_of(workdir: str | Path, run) -> dict:
    """{'license', 'attribution', 'data', 'training', 'evaluations', 'measured'} of a run (trained_run.Run) by the files of its workdir."""
    workdir = Path(workdir)
    told = _read_json(workdir / "run.json")
    evaluations = [e for path in sorted(workdir.glob("eval/*/summary.json")) if (e := evaluation(path, run.step))]
    return {
        "license": LICENSE,
        "attribution": ATTRIBUTION,
        "data": told.get("dataset", {}) | {"speakers": _speakers(run.config, told.get("dataset", {}))},
        "training": _training(workdir, run, told),
        "evaluations": evaluations,
        "measured": measured(evaluations, streams_of(run.config)),
    }


def _training(workdir: Path, run, told: dict) -> dict:
    """How, and where it stood at the step that was taken."""
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
        **{k: told[k] for k in ("parameters", "devices", "processes", "revision", "python", "versions") if k in told},
    }


def _speakers(config, dataset: dict) -> dict:
    """{split: {speaker: clips}} by the report of the dataset's build; {} where the dataset is gone or another one now."""
    home = Path(config.data_dir) / "grid" / config.builder_config / str(dataset.get("version", ""))
    report = _read_json(home / "build_report.json") if config.data_dir else {}
    return report.get("speakers", {})


def evaluation(path: Path, step: int) -> dict | None:
    """What a card tells of one evaluation (its summary.json, with clips.csv beside it); None for one of another step, or that has
    no numbers of ours (the paper's and the peers' protocol are never mixed with them).
    """
    told = _read_json(path)
    if told.get("protocol") != "waveform" or told.get("runs", {}).get(told.get("system"), {}).get("step") != step:
        return None
    systems = {s["name"]: s["kind"] for s in told["systems"] if s["kind"] in KINDS}
    table = [
        {"case": e["case"], "gap_ms": e["gap_ms"], "kind": systems[e["system"]], "metric": e["metric"], "n": e["n"],
         "missing": e["missing"], **{k: _rounded(e[k]) for k in ("mean", "low", "high")}}
        for e in told["table"] if e["system"] in systems and e["metric"] in METRICS
    ]  # fmt: skip
    speakers: dict[str, set] = {}
    for row in _rows(path.parent / "clips.csv"):
        speakers.setdefault(row["speaker"], set()).add(row["clip_id"])
    return {
        **{k: told[k] for k in ("split", "suite", "protocol", "num_clips", "by_speaker", "date")},
        "command": without_paths(told["command"]),
        "speakers": {s: len(clips) for s, clips in sorted(speakers.items())},
        "table": table,
    }


def streams_of(config) -> dict[str, str]:
    """Cases of an evaluation -> what the system goes by in them: one that sees no lips, by the sound alone."""
    return STREAMS if systems.get(config.system).uses_video else {"": "sound"}


def measured(evaluations: list[dict], streams: dict[str, str]) -> dict:
    """{'sound and lips' | 'sound' | 'lips': {gap in ms: {metric: mean}}} of unseen speakers: the long range of suite `lengths`
    where there is one, what each stream is worth by suite `streams`.
    """
    found: dict = {}
    of_unseen = [e for e in evaluations if e["split"] == UNSEEN and e["suite"] in ("streams", "lengths", "unseen")]
    for e in sorted(of_unseen, key=lambda e: e["suite"] != "streams"):
        for row in e["table"]:
            if row["kind"] == "system" and row["case"] in streams:
                by_length = found.setdefault(streams[row["case"]], {})
                by_length.setdefault(str(row["gap_ms"]), {})[row["metric"]] = row["mean"]
    return {k: dict(sorted(v.items(), key=lambda item: int(item[0]))) for k, v in found.items()}


def without_paths(command: str) -> str:
    """A command with the folders of the machine it ran on left out, names of files and runs kept."""
    return re.sub(r"(?<![\w.~-])(?:~|\.{1,2})?/(?:[^\s/]+/)*(?=[^\s/])", "", command)


def _rounded(x: float) -> float:
    return float(f"{x:.{DIGITS}g}")


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); expected what avsi-train and avsi-evaluate write") from error


def _rows(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- card ----------------------------------------------------------------------------------------------------------------------


def text(name: str, config, facts: dict) -> str:
    """README.md: a YAML head as model hubs read it, then what, how, of what, how good, where it ends."""
    known = [_data(facts), _numbers(facts, streams_of(config)), _limits(facts), _training_said(facts)]
    parts = [_head(name, config, facts), _what(name, config, facts), USE, *known]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _head(name: str, config, facts: dict) -> str:
    seeing = "audio-visual, lip-reading, " if systems.get(config.system).uses_video else ""
    lines = [
        "---", f"license: {facts.get('license', LICENSE).lower()}", "library_name: avsi_jax", "language: en",
        "pipeline_tag: audio-to-audio", f"tags: [speech-inpainting, {seeing}jax, flax]", "datasets: [grid]",
        "metrics: [stoi, pesq]", *_model_index(name, config, facts), "---",
    ]  # fmt: skip
    return "\n".join(lines)


def _model_index(name: str, config, facts: dict) -> list[str]:
    """Of unseen speakers, every length; as the hubs ask for it."""
    lines, task = [], "audio-visual speech in-painting" if systems.get(config.system).uses_video else "speech in-painting"
    for e in facts.get("evaluations", []):
        if (e["split"], e["suite"]) not in ((UNSEEN, "lengths"), (UNSEEN, "unseen")):
            continue
        for ms in sorted({row["gap_ms"] for row in e["table"]}):
            rows = [r for r in e["table"] if (r["gap_ms"], r["kind"], r["case"]) == (ms, "system", "")]
            lines += [
                f"  - task: {{type: audio-to-audio, name: {task}}}",
                f'    dataset: {{type: grid, name: "Grid, unseen speakers, {ms} ms lost, n={e["num_clips"]}", split: {UNSEEN}}}',
                "    metrics:",
                *(f'    - {{type: {r["metric"]}, name: "{METRICS[r["metric"]]}", value: {r["mean"]}}}' for r in rows),
            ]
    return ["model-index:", f"- name: {name}", "  results:", *lines] if lines else []


def _what(name: str, config, facts: dict) -> str:
    size = facts.get("training", {}).get("parameters")
    counted = f", {size / 1e6:.1f} million parameters" if size else ""
    system = systems.get(config.system)
    what, by = "speech with a hole", "the sound around\nalone (it sees no lips)"
    if system.uses_video:
        what, by = f"{what} and a video of the talking face", "the sound around and by the\nlips"
    read = ", and which words were read" if system.reads else ""
    return f"""# {name}: {what}, made whole

Weights of `{config.system}` of avsi_jax (preset `{config.preset}`{counted}; float16,
computed with as float32). Given a clip whose sound has gaps, it says what the spectrogram was there, by {by}{read}; a vocoder
that holds the known samples makes sound of it. Samples outside the gaps stay as they are."""


USE = """
## How to use

    pip install avsi_jax
    avsi-inpaint clip.mpg --gap 0.93-1.73 -o out.wav                  # the weights that avsi_jax came with
    avsi-inpaint clip.mpg --gap 0.93-1.73 -o out.wav --checkpoint=DIR  # the folder that this file lies in

    from avsi_jax import Inpainter

    repair = Inpainter.load("DIR").inpaint("clip.mpg", gaps=[(0.93, 1.73)])  # .samples (N, C) at .rate, .gaps, .warnings

`model.safetensors` holds the parameters, `config.json` the network's config, what it standardises by and all that this card tells.
Nothing in this folder is code, and none of it is run.
"""


def _data(facts: dict) -> str:
    data, training = facts.get("data", {}), facts.get("training", {})
    lines = ["## Data, speakers, licence", ""]
    for split, speakers in data.get("speakers", {}).items():
        use = {training.get("train_split"): "trained on", training.get("validation_split"): "chosen by"}.get(split, "")
        use = use or {HEARD: "measured on: heard speakers", UNSEEN: "measured on: unseen speakers"}.get(split, "not used")
        listed = ", ".join(f"{s} {n}" for s, n in speakers.items())
        lines.append(f"- `{split}` ({use}): {sum(speakers.values())} clips; {listed}")
    if not data.get("speakers"):
        lines += [f"- `{split}`: {n} clips" for split, n in data.get("clips", {}).items()]
    printed = ", ".join(f"{split} `{mark}`" for split, mark in data.get("fingerprint", {}).items())
    built = f"grid/{data.get('builder_config', '?')}` {data.get('version', '')}"
    lines += ["", f"Dataset `{built}, fingerprints: {printed or 'unknown'}."]
    licence = f"The weights are under {facts.get('license', LICENSE)}. {facts.get('attribution', ATTRIBUTION)}"
    return "\n".join([*lines, "", licence])


def _numbers(facts: dict, streams: dict[str, str]) -> str:
    found = [_table(e, streams) for e in sorted(facts.get("evaluations", []), key=lambda e: (e["split"] != UNSEEN, e["suite"]))]
    if not any(found):
        return "## How good\n\nNot measured yet."
    said = (
        "Mean [95 % interval] of one gap a clip placed in the words, in the waveform; the error is of the log-mel spectrogram of "
        "the restored sound in the gap, against the recording's. `damaged`: nothing done. Intervals are bootstrapped over clips, "
        "for unseen speakers over speakers, then clips: of few speakers they are rough."
    )
    return "\n\n".join(["## How good", said, *filter(None, found)])


def _table(e: dict, streams: dict[str, str]) -> str:
    """One evaluation by gap length, or by what was there."""
    if e["suite"] not in ("lengths", "unseen", "streams"):
        return ""
    cell = {(r["case"], r["gap_ms"], r["kind"], r["metric"]): r for r in e["table"]}
    metrics = [m for m in METRICS if any(key[3] == m for key in cell)]
    lines = [
        f"### {SPLITS.get(e['split'], e['split'])} (`{e['split']}`), {'by gap length' if e['suite'] != 'streams' else 'by stream'}",
        "", f"n = {e['num_clips']} clips ({', '.join(f'{s} {n}' for s, n in e['speakers'].items())}); `{e['command']}`", "",
        f"| gap, ms | there | {' | '.join(METRICS[m] for m in metrics)} |", "|---|---|" + "---|" * len(metrics),
    ]  # fmt: skip
    for case, ms in dict.fromkeys((case, ms) for case, ms, *_ in cell):
        for kind, there in (("system", streams.get(case, case)), ("masked", "masked")):
            cells = [_cell(cell.get((case, ms, kind, m))) for m in metrics]
            if any(cells) and (kind == "system" or not case):
                lines.append(f"| {ms} | {there} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    missing = f", {row['missing']} without a value" if row["missing"] else ""
    return f"{row['mean']:.3g} [{row['low']:.3g}, {row['high']:.3g}]{missing}"


def _limits(facts: dict) -> str:
    data, training = facts.get("data", {}), facts.get("training", {})
    trained = data.get("speakers", {}).get(training.get("train_split"), {})
    most = max(trained, key=trained.get, default="")
    few = f"- {sum(trained.values())} clips, {trained[most]} of one speaker ({most}): others come out less true.\n" if most else ""
    return f"""## Where it ends

{few}- Trained on Grid alone: sentences of six words by one grammar ("bin blue at f two now"), read in a studio. It has never heard
  other words, and what it says in a gap is drawn to Grid's.
- English; faces seen from the front, lit evenly, filling a good part of the picture; no noise under the voice.
- Gaps longer than what was measured are guesses. The longer a gap, the more is invented.
- **It invents speech.** What stands in a gap was not said: it is what a network holds likely. Do not use it as evidence, do not
  take words out of it that matter, and tell those who hear it. Repair people's voices with their consent; it must not be used to
  put words into someone's mouth."""


def _training_said(facts: dict) -> str:
    if not (t := facts.get("training", {})):
        return ""
    validation = ", ".join(f"{k} {v:.4g}" for k, v in t["validation"].items())
    machine = f"{t.get('processes', 1)} x {', '.join(t.get('devices', ['?']))}"
    packages = ", ".join(f"{k} {v}" for k, v in t.get("versions", {}).items())
    lines = [
        f"- Step {t['step']}, in epoch {t['epochs_done']} of {t['epochs']}; chosen by `{t['monitor']}` on `{t['validation_split']}`"
        f"{f': {validation}' if validation else ''}.",
        f"- Adam, learning rate {t['learning_rate']:g} ({t['schedule']}), batches of {t['batch_size']}, seed {t['seed']}; "
        f"{t['minutes']} minutes on {machine}.",
        f"- Code at git revision {t.get('revision', 'unknown')}, Python {t.get('python', '?')}; {packages}.",
        '- Every field of the run is in `config.json` under "config": avsi-prepare makes the data, '
        "`avsi-train --config.FIELD=VALUE` trains, the commands above measure.",
    ]
    return "\n".join(["## How it was trained", "", *lines])
