"""Measures a trained recognizer on clips that were not in its training and writes docs/asr_judge.json and docs/asr_judge.md.

    python -m benchmarks.quality.recognizer WORKDIR --data_dir=DATA   measures the run on test_seen and test, and writes both
    python -m benchmarks.quality.recognizer                           writes docs/asr_judge.md again from docs/asr_judge.json

The summary contains errors, counts and intervals, no data of clips; every number on the page comes from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from avsi_jax.audio import gap_masks
from avsi_jax.data import grid_text, input_pipeline
from avsi_jax.evaluation import bootstrap, cli
from avsi_jax.inference import recognizer
from avsi_jax.models import ctc_decoding
from avsi_jax.presets import RECORD_RATE
from benchmarks.results.results import training_facts
from benchmarks.results.tables import markdown_row

DOCS = Path(__file__).resolve().parents[2] / "docs"
GAP_MS = 800
SPLITS = {"test_seen": "Seen speakers (test_seen)", "test": "Unseen speakers (test)"}
SLOTS = ("command", "colour", "preposition", "letter", "digit", "adverb")


def measure(workdir: Path, data_dir: str) -> dict:
    """The summary of a run, from which `page` is made."""
    model = recognizer.Recognizer.from_workdir(workdir)
    if model.units != "phones":
        raise ValueError(f"{workdir} recognizes {model.units}; expected a recognizer of phones (config.ctc_units)")
    dataset = input_pipeline.find_dataset(data_dir, model.config.builder_config)
    return {
        "training": training_facts(workdir) | {"best_step": model.step},
        "gap_ms": GAP_MS,
        "splits": {split: of_split(model, input_pipeline.Records(dataset, split, mouth=False), split) for split in SPLITS},
    }


def of_split(model: recognizer.Recognizer, records: input_pipeline.Records, split: str) -> dict:
    """Errors on clean audio in all, by speaker and by slot; errors of word times; and the effect of a masked gap."""
    raw = [records[i] for i in range(len(records))]
    if untimed := next((r for r in raw if len(r["words"]) != len(SLOTS)), None):
        found = f"clip {untimed['id']} of {untimed['speaker']} has {len(untimed['words'])} timed words"
        raise SystemExit(f"recognizer.py: {split}: {found}; "
                         f"expected {len(SLOTS)}: build the dataset with the clips' .align files")  # fmt: skip
    examples = [input_pipeline.to_example(r) for r in raw]
    audio, lengths = (np.stack([e[k] for e in examples]) for k in ("audio", "audio_length"))
    true, speakers = [tuple(r["text"].split()) for r in raw], np.array([r["speaker"] for r in raw])
    groups = speakers if split in cli.UNSEEN_SPLITS else None
    clean = model.recognize(audio, lengths)
    phones = ctc_decoding.phone_error_rate(
        (transcript, " ".join(grid_text.phones_of(r["text"]))) for transcript, r in zip(clean.transcript, raw)
    )
    wrong, one = recognizer.wrong_words(clean.words, true), np.ones(len(raw), int)
    words = wrong.sum(1), 6 * one
    span_s = np.array([[(w["start_s"], w["end_s"]) for w in r["words"]] for r in raw])
    span_s += np.array([r["offset_s"] for r in raw])[:, None, None]  # words are timed on the video's clock
    return {
        "clips": len(raw),
        "phones": share(*phones, groups),
        "words": share(*words, groups),
        "sentences": share(wrong.any(1), one, groups),
        "slots": {slot: share(wrong[:, k], one, groups) for k, slot in enumerate(SLOTS)},
        "speakers": {
            s: {"clips": int(mine.sum()), "phones": share(*(x[mine] for x in phones)), "words": share(*(x[mine] for x in words))}
            for s, mine in sorted(((s, speakers == s) for s in set(speakers.tolist())), key=lambda pair: int(pair[0][1:]))
        },
        "times": times(clean.span_s - span_s),
        "gap": masked_gap(model, examples, audio, lengths, true, span_s, wrong, groups),
    }


def share(errors, counts, groups=None) -> dict:
    """All errors over all units of the reference, with a bootstrap interval over clips, or over `groups` and then clips."""
    estimate = bootstrap.bootstrap_mean(np.asarray(errors) / np.mean(counts), groups=groups)
    rates = {k: round(v, 5) for k, v in zip(("rate", "low", "high"), estimate)}
    return {"errors": int(np.sum(errors)), "n": int(np.sum(counts)), **rates}


def times(off: np.ndarray) -> dict:
    """Errors of word times (B, 6, 2) in s: median of the absolute difference, and of the difference, in ms."""
    sides = {"start": 1000 * off[..., 0], "end": 1000 * off[..., 1]}
    return {k: {"off": round(float(np.median(abs(v))), 1), "late": round(float(np.median(v)), 1)} for k, v in sides.items()}


def masked_gap(model, examples, audio, lengths, true, span_s, wrong, groups) -> dict:
    """Word errors by the words' position relative to a gap: of the recording (`wrong`), of masked audio, and of guessing."""
    places = [gap_masks.place_in_speech(e["clip_id"], GAP_MS, tuple(e["speech"]), int(n)) for e, n in zip(examples, lengths)]
    gap = np.array(places)[:, None]
    missing = np.asarray(gap_masks.gap_samples(gap, audio.shape[1]))
    masked = model.recognize(np.where(missing, 0, audio).astype(np.int16), lengths)
    by_audio = {"true": wrong, "zeros": recognizer.wrong_words(masked.words, true)}
    inside = np.minimum(span_s[..., 1], gap[..., 1] / RECORD_RATE) - np.maximum(span_s[..., 0], gap[..., 0] / RECORD_RATE)
    touched = recognizer.touched_words(span_s, gap)
    by_place = {"touched": touched, "half": touched & (inside >= 0.5 * (span_s[..., 1] - span_s[..., 0])), "elsewhere": ~touched}
    guess = np.broadcast_to([1 - 1 / len(slot) for slot in grid_text.SLOTS], touched.shape)
    return {
        place: {k: share((e & chosen).sum(1), chosen.sum(1), groups) for k, e in by_audio.items()}
        | {"guessing": round(float(guess[chosen].mean()), 5)}
        for place, chosen in by_place.items()
    }


# ---- page ----------------------------------------------------------------------------------------------------------------------


def page(summary: dict) -> str:
    """The text of docs/asr_judge.md."""
    training = summary["training"]
    config = training["config"]
    facts = {
        "parameters": f"{training['parameters']:,}",
        "clips": training["clips"][config["train_split"]],
        "decides": config["validation_split"],
        "step_ms": 10 * config["stack"],
        "reach_ms": 10 * config["stack"] * 2 * config["layers"],
    }
    parts = [INTRODUCTION.format(**training | config | facts)]
    parts += [section(split, summary["splits"][split], summary["gap_ms"]) for split in SPLITS]
    return "\n".join([*parts, LIMITS])


def section(split: str, s: dict, gap_ms: int) -> str:
    """The section of a split."""
    slots = [(slot, *cells(e)) for slot, e in s["slots"].items()]
    speakers = [(name, e["clips"], *cells(e["phones"]), *cells(e["words"])) for name, e in s["speakers"].items()]
    places = [(name, s["gap"][k]) for k, name in PLACES.items()]
    near = [(name, *cells(e["true"]), *cells(e["zeros"]), f"{100 * e['guessing']:.0f} %") for name, e in places]
    sides = [(side, f"{e['off']:.0f} ms", f"{e['late']:+.0f} ms") for side, e in s["times"].items()]
    return "\n".join(
        [
            f"## {SPLITS[split]}\n\n{s['clips']} clips of {len(s['speakers'])} speakers, original audio.\n",
            table(["", "error", "errors / all"], [(name, *cells(s[k])) for k, name in WHAT.items()]),
            table(["words by slot", "error", "errors / all"], slots),
            table(["speaker", "clips", "phones", "errors / all", "words", "errors / all"], speakers),
            table(["word", "median distance from the time in the corpus", "median difference (+ late)"], sides),
            f"Words of the same clips with a gap of {gap_ms} ms in each:\n",
            table(["words", "recording", "errors / all", "masked audio", "errors / all", "guessing"], near),
        ]
    )


def cells(e: dict) -> tuple[str, str]:
    return f"{100 * e['rate']:.1f} % [{100 * e['low']:.1f}, {100 * e['high']:.1f}]", f"{e['errors']} / {e['n']}"


def table(heading: list[str], rows) -> str:
    return "\n".join([*map(markdown_row, [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]), ""])


WHAT = {
    "phones": "phones, greedy",
    "words": "words, with the grammar",
    "sentences": "sentences with a wrong word",
}
PLACES = {"touched": "touched by the gap", "half": "at least half inside", "elsewhere": "elsewhere"}
INTRODUCTION = """# The ASR judge of restored words

`asr` recognizes phones in clean Grid audio: {layers} convolutions over time with {units} channels in steps of {step_ms} ms, and CTC
over 32 phones and the blank; {parameters} parameters. Its output at any time depends on only {reach_ms} ms of audio on either side,
so that an error in the audio has a local effect. It restores nothing and was trained without gaps. It is used to evaluate other
systems: it finds the most likely of Grid's 64,000 sentences in restored audio (`avsi_jax/inference/recognizer.py`), and each word
that touches the gap is right or wrong.

    avsi-train --config=asr --workdir=RUN --config.data_dir=DATA
    python -m benchmarks.quality.recognizer RUN --data_dir=DATA       # writes this page and asr_judge.json

```python
from avsi_jax.inference.recognizer import Recognizer

result = Recognizer.from_workdir("RUN").recognize(audio, lengths)  # (B, N) at 16 kHz, (B,)
result.transcript, result.words, result.span_s, result.log_probability
```

It was trained on the {clips} clips of `train` for {epochs} epochs; the checkpoint with the lowest CTC error on `{decides}` is used.
`test_seen` and `test` had no part in training or in that choice. An error is the number of errors over the number of units in the
reference, with a 95 % bootstrap interval over clips in brackets; for unseen speakers over speakers, then clips. Guessing is the
expected error of a random word per slot.
"""

LIMITS = """## Limits

- Nine tenths of its training data is one speaker. For unseen speakers, compare the error of restored words with that of the
  recording; never report it alone.
- It always outputs a sentence of the grammar: where no speech is left it guesses, and some guesses are right.
- [0.0, 0.0] means that no error was observed, not that there is none: with n words and no error, a rate of up to 3 / n is possible.
- A word's time spans its first to its last label. CTC emits labels when it is certain: after the beginning of the word, and before
  its end. Which words a gap touches is determined by the word times of the corpus.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", nargs="?", type=Path, help="run directory of --config=asr; without it only the page is written")
    parser.add_argument("--data_dir", help="folder of a dataset built by avsi-prepare")
    known = parser.parse_args(argv)
    try:
        if known.workdir:
            if not known.data_dir:
                raise ValueError("no --data_dir given; expected the folder of a dataset built by avsi-prepare")
            summary = measure(known.workdir, known.data_dir)
            (DOCS / "asr_judge.json").write_text(json.dumps(summary, indent=1) + "\n")
        (DOCS / "asr_judge.md").write_text(page(json.loads((DOCS / "asr_judge.json").read_text())))
    except (ValueError, OSError) as error:
        print(f"recognizer.py: {error}", file=sys.stderr)
        return 2
    print(DOCS / "asr_judge.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
