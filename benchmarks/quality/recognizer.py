"""A trained recogniser on sound it never heard -> docs/recogniser.json and docs/recogniser.md.

    python -m benchmarks.quality.recognizer WORKDIR --data_dir=DATA   measures the run on test_seen and test, and writes both
    python -m benchmarks.quality.recognizer                           writes docs/recogniser.md anew from docs/recogniser.json

The summary holds errors, counts and intervals, never a clip; every number in a table comes from it.
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
from benchmarks.results.results_page import row

DOCS = Path(__file__).resolve().parents[2] / "docs"
GAP_MS = 800
SPLITS = {"test_seen": "Speakers heard in training (test_seen)", "test": "Unseen speakers (test)"}
SLOTS = ("command", "colour", "preposition", "letter", "digit", "adverb")


def measure(workdir: Path, data_dir: str) -> dict:
    """Everything the page tells of a run."""
    recogniser = recognizer.Recognizer.from_workdir(workdir)
    if recogniser.units != "phones":
        raise ValueError(f"{workdir} hears {recogniser.units}; expected a recogniser of phones (config.ctc_units)")
    dataset = input_pipeline.find_dataset(data_dir, recogniser.config.builder_config)
    return {
        "training": training_facts(workdir) | {"best_step": recogniser.step},
        "gap_ms": GAP_MS,
        "splits": {split: of_split(recogniser, input_pipeline.Records(dataset, split, mouth=False), split) for split in SPLITS},
    }


def of_split(recogniser, records, split: str) -> dict:
    """Errors on the clean sound, of each speaker and slot; times; and what an emptied gap does."""
    raw = [records[i] for i in range(len(records))]
    if bare := next((r for r in raw if len(r["words"]) != len(SLOTS)), None):
        raise SystemExit(f"recogniser.py: {split}: clip {bare['id']} of {bare['speaker']} has {len(bare['words'])} timed words; "
                         f"expected {len(SLOTS)}: build the dataset with the clips' .align files")  # fmt: skip
    examples = [input_pipeline.to_example(r) for r in raw]
    audio, lengths = (np.stack([e[k] for e in examples]) for k in ("audio", "audio_length"))
    true, speakers = [tuple(r["text"].split()) for r in raw], np.array([r["speaker"] for r in raw])
    groups = speakers if split in cli.UNSEEN_SPLITS else None
    clean = recogniser.hear(audio, lengths)
    phones = ctc_decoding.phone_error_rate(
        (said, " ".join(grid_text.phones_of(r["text"]))) for said, r in zip(clean.transcript, raw)
    )
    wrong, one = recognizer.wrong_words(clean.words, true), np.ones(len(raw), int)
    words = wrong.sum(1), 6 * one
    span_s = np.array([[(w["start_s"], w["end_s"]) for w in r["words"]] for r in raw])
    span_s += np.array([r["offset_s"] for r in raw])[:, None, None]  # words are timed on the picture's clock
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
        "gap": emptied(recogniser, examples, audio, lengths, true, span_s, wrong, groups),
    }


def share(errors, counts, groups=None) -> dict:
    """All errors over all that was to be said, with a bootstrap interval over clips, or over `groups` of them and then clips."""
    estimate = bootstrap.bootstrap_mean(np.asarray(errors) / np.mean(counts), groups=groups)
    rates = {k: round(v, 5) for k, v in zip(("rate", "low", "high"), estimate)}
    return {"errors": int(np.sum(errors)), "n": int(np.sum(counts)), **rates}


def times(off: np.ndarray) -> dict:
    """How far the words (B, 6, 2) are off: median of the absolute difference, and of the difference, in ms."""
    sides = {"start": 1000 * off[..., 0], "end": 1000 * off[..., 1]}
    return {k: {"off": round(float(np.median(abs(v))), 1), "late": round(float(np.median(v)), 1)} for k, v in sides.items()}


def emptied(recogniser, examples, audio, lengths, true, span_s, wrong, groups) -> dict:
    """Word error by where the words lie to a gap: of the true sound (`wrong`), of that with zeros in the gap, of guessing."""
    places = [gap_masks.place_in_speech(e["clip_id"], GAP_MS, tuple(e["speech"]), int(n)) for e, n in zip(examples, lengths)]
    gap = np.array(places)[:, None]
    missing = np.asarray(gap_masks.gap_samples(gap, audio.shape[1]))
    emptied = recogniser.hear(np.where(missing, 0, audio).astype(np.int16), lengths)
    by_audio = {"true": wrong, "zeros": recognizer.wrong_words(emptied.words, true)}
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
    """docs/recogniser.md."""
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
    """What a split came to."""
    slots = [(slot, *cells(e)) for slot, e in s["slots"].items()]
    speakers = [(name, e["clips"], *cells(e["phones"]), *cells(e["words"])) for name, e in s["speakers"].items()]
    places = [(name, s["gap"][k]) for k, name in PLACES.items()]
    near = [(name, *cells(e["true"]), *cells(e["zeros"]), f"{100 * e['guessing']:.0f} %") for name, e in places]
    sides = [(side, f"{e['off']:.0f} ms", f"{e['late']:+.0f} ms") for side, e in s["times"].items()]
    return "\n".join(
        [
            f"## {SPLITS[split]}\n\n{s['clips']} clips of {len(s['speakers'])} speakers, their sound untouched.\n",
            table(["", "error", "wrong / said"], [(name, *cells(s[k])) for k, name in WHAT.items()]),
            table(["words of the slot", "error", "wrong / said"], slots),
            table(["speaker", "clips", "phones", "wrong / said", "words", "wrong / said"], speakers),
            table(["a word's", "median distance from the corpus' own time", "median, + for late"], sides),
            f"Words of the same clips, a gap of {gap_ms} ms in each:\n",
            table(["words", "true sound", "wrong / said", "zeros in the gap", "wrong / said", "guessing"], near),
        ]
    )


def cells(e: dict) -> tuple[str, str]:
    return f"{100 * e['rate']:.1f} % [{100 * e['low']:.1f}, {100 * e['high']:.1f}]", f"{e['errors']} / {e['n']}"


def table(heading: list[str], rows) -> str:
    return "\n".join([*map(row, [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]), ""])


WHAT = {
    "phones": "phones, greedy",
    "words": "words, by the grammar",
    "sentences": "sentences with a wrong word",
}
PLACES = {"touched": "that the gap touches", "half": "at least half in it", "elsewhere": "elsewhere"}
INTRODUCTION = """# The judge of restored words

`asr` hears clean Grid sound and says phones: {layers} convolutions over time of {units} channels in steps of {step_ms} ms, CTC over
32 phones and the blank, {parameters} parameters. What it says of a moment depends on {reach_ms} ms of sound on either side, no
more, so that a fault is heard where it is. It restores nothing and saw no gap in training. It is there to judge others: of a
restored sound it says which of Grid's 64,000 sentences it hears (`avsi_jax/recognise.py`), and each word that touches the gap is
right or wrong.

    avsi-train --config=asr --workdir=RUN --config.data_dir=DATA
    python -m benchmarks.quality.recognizer RUN --data_dir=DATA       # writes this page and recogniser.json

```python
from avsi_jax.inference.recognizer import Recogniser

heard = Recogniser.from_workdir("RUN").hear(sound, lengths)  # (B, N) at 16 kHz, (B,) -> said, words, span_s, log_probability
```

Trained on the {clips} clips of `train` for {epochs} epochs; of its checkpoints the one with the least CTC error on `{decides}` is
taken. `test_seen` and `test` took part in no training and no choice. An error is all that was wrong over all that was said; in
brackets a 95 % bootstrap interval over clips, for unseen speakers over speakers, then clips. Guessing: what a blind guess of each
word in its slot would come to.
"""

LIMITS = """## Limits

- Nine tenths of what it learned from is one speaker. Of speakers it never heard, read the error of restored words beside that of
  the true sound, never alone.
- It must say a sentence of the grammar, whatever it hears: where nothing is left it guesses, and some guesses are right.
- [0.0, 0.0] means that no error was seen, not that there is none: with n words and no error, a rate of up to 3 / n is not excluded.
- A word's time runs from its first label to its last, and CTC says labels when it is sure: after the word's beginning, and before
  its end. Which words a gap touches is taken from the corpus' own times.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", nargs="?", type=Path, help="a training of --config=asr; without it the page alone is written")
    parser.add_argument("--data_dir", help="where avsi-prepare wrote")
    known = parser.parse_args(argv)
    try:
        if known.workdir:
            if not known.data_dir:
                raise ValueError("no --data_dir given; expected the folder that avsi-prepare --data_dir=DIR wrote")
            summary = measure(known.workdir, known.data_dir)
            (DOCS / "recogniser.json").write_text(json.dumps(summary, indent=1) + "\n")
        (DOCS / "recogniser.md").write_text(page(json.loads((DOCS / "recogniser.json").read_text())))
    except (ValueError, OSError) as error:
        print(f"recogniser.py: {error}", file=sys.stderr)
        return 2
    print(DOCS / "recogniser.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
