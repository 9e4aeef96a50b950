"""The results of an evaluation -> report.html, which needs nothing else, and its tables; of several runs -> one page that compares.

    python -m avsi_jax.report EVAL                                  writes EVAL/report.html and table.csv, .json, .tex again
    python -m avsi_jax.report EVAL EVAL2 ... --output=FILE.html     several runs side by side, on the same protocol and split

The page loads nothing from anywhere (its content security policy forbids it): pictures and sounds are in it as data URIs. Its
looks are in pages/.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

import numpy as np

from avsi_jax.evaluation import compare_runs, curves, table_export, tables, word_errors
from avsi_jax.evaluation.tables import METRICS, Evaluation
from avsi_jax.media import clip_io, plots
from avsi_jax.runtime import unexpected_errors

MEDIA_TYPES = {".wav": "audio/wav", ".flac": "audio/flac"}
MAX_EXAMPLE_BYTES = 9_000_000  # of pictures and sounds in the page
MAX_FAILURES = 200  # listed one by one
GROUPS = {"": "Spread over all", "among the best": "Among the best", "among the worst": "Among the worst"}  # of examples, by why


def write_report(folder) -> Path:
    """Writes report.html, table.csv, table.json and table.tex into the folder of an evaluation; returns the page's path.

    Raises FileNotFoundError, or ValueError naming what a file lacks.
    """
    evaluation = tables.read(folder)
    return _write(evaluation, evaluation.folder / "report.html", "table")


def write_comparison(folders, output, *, command: str = "", overwrite: bool = False) -> Path:
    """Writes the page of several evaluations, and its tables beside it under the same name; returns its path.

    Raises as `write_report`, ValueError where the evaluations can't be compared, FileExistsError where the page is there.
    """
    output = Path(output)
    if output.suffix != ".html":
        raise ValueError(f"--output: found {output}, expected a name that ends in .html")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} is there already; take --overwrite to replace it")
    evaluation = compare_runs.merged([tables.read(folder) for folder in folders], command)
    output.parent.mkdir(parents=True, exist_ok=True)
    return _write(evaluation, output, output.stem)


def _write(evaluation: Evaluation, path: Path, name: str) -> Path:
    summary, rows = evaluation.summary, evaluation.rows
    words = word_errors.touched_words(summary, rows)
    rates = list(word_errors.estimates(summary, words))
    made = {
        "short": tables.headline(summary),
        "results": tables.results(summary),
        "changes": tables.changes(summary),
        "pairs": tables.differences(summary),
        "words": word_errors.words_table(summary, rates),
        "phones": word_errors.phones_table(summary, rates),
        "confusions": word_errors.confusions_table(summary, words),
        "speakers": tables.speakers(summary, rows),
    }
    table_export.write(path, summary, rates, list(_flat(made.values())), name)
    path.write_text(_page(evaluation, made), encoding="utf-8")
    return path


def _flat(found):
    for one in found:
        yield from one if isinstance(one, list) else [one]


# ---- the page --------------------------------------------------------------------------------------------------------------------


def _page(evaluation: Evaluation, made: dict) -> str:
    import jinja2

    summary, rows = evaluation.summary, evaluation.rows
    systems = curves.styled(summary["systems"])
    examples, left_out = _examples(evaluation)
    failures = [row for row in rows if row["reason"]]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("avsi_jax", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": tables.number, "thousands": lambda n: f"{n:,}"}
    return environment.get_template("evaluation.html").render(
        summary=summary,
        facts={k: summary[k] for k in ("seconds", "versions", "runs") if summary.get(k)},
        systems=systems,
        metrics={m: METRICS[m] for m in METRICS if any(e["metric"] == m for e in summary["table"])},
        sentences=tables.sentences(summary),
        tables=made,
        curves=curves.sections(summary, systems, _label(summary)),
        examples=examples,
        left_out=left_out,
        num_rows=len(rows),
        failures=failures,
        listed=failures[:MAX_FAILURES],
        pooled="all gaps without another change" if tables.plain(summary) else "all gaps",
        intervals=table_export.intervals_said(summary),
        without_words=len({row["clip_id"] for row in rows if row["in_words"].lower() not in ("true", "1")}),
    )


def _label(summary: dict) -> str:
    return f"protocol {summary['protocol']}, {summary['split']}"


# ---- examples --------------------------------------------------------------------------------------------------------------------


def _examples(evaluation: Evaluation) -> tuple[list[dict], int]:
    """Examples with pictures and sounds in them, by why they are shown, and how many found no room."""
    summary = evaluation.summary
    examples = sorted(summary.get("examples", []), key=lambda e: list(GROUPS).index(e["why"]))
    scores = {(r["clip_id"], r["case"], int(r["gap_ms"]), r["system"]): r for r in evaluation.rows}
    cases = {(c["name"], c["gap_ms"]): tables.case_label(c, summary["families"]) for c in summary["cases"]}
    shown, size = [], 0
    for example in examples:
        gaps_s = read_gaps(example["gaps_s"])
        cards = _cards(evaluation, example, gaps_s, scores)
        size += sum(len(card["picture"]) + len(card["sound"]) for card in cards)
        if size > MAX_EXAMPLE_BYTES:
            break
        places = tables.listed(f"{tables.number(start, 2)} to {tables.number(end, 2)} s" for start, end in gaps_s)
        label = f"{cases[example['case'], example['gap_ms']]}: {places}"
        shown.append(example | {"group": GROUPS[example["why"]], "label": label, "cards": cards})
    return shown, len(examples) - len(shown)


def read_gaps(cell: str) -> list[tuple[float, float]]:
    """'0.930000-1.730000 2.1-2.3' -> [(0.93, 1.73), (2.1, 2.3)], in seconds."""
    return [(float(start), float(end)) for start, _, end in (gap.partition("-") for gap in cell.split())]


def _cards(evaluation: Evaluation, example: dict, gaps_s: list[tuple[float, float]], scores: dict) -> list[dict]:
    """What is shown of each sound of an example: damaged first, the original last."""
    kinds = {**{s["name"]: s["kind"] for s in evaluation.summary["systems"]}, "original": ""}
    decoded = {name: _decoded(evaluation.folder, example["sounds"][name]) for name in kinds if name in example["sounds"]}
    top_db = plots.decibel(*decoded["original"][:2]).max()
    label = f"{example['clip_id']}, {_label(evaluation.summary)}"
    cards = []
    for name, (audio, rate, uri) in decoded.items():
        row = _row_of(scores, example, name, kinds[name])
        shown = [f"{m.label} {tables.number(float(row[k]), m.digits)}" for k, m in METRICS.items() if row.get(k)]
        said = example["said"].get(name, "")
        said = compared(example.get("phones", "") if said.isupper() else example["text"], said)
        image = plots.spectrogram(audio, rate, top_db, gaps_s, f"{name}, {label}")
        card = {"name": name, "kind": kinds[name], "picture": image, "sound": uri, "scores": shown, "said": said}
        cards.append(card | {"heard": _heard(row)})
    return cards


def _row_of(scores: dict, example: dict, name: str, kind: str) -> dict:
    """The row of a sound; that of the plain case where the case can't have changed it."""
    clip, case, gap_ms = (example[k] for k in ("clip_id", "case", "gap_ms"))
    plain = scores.get((clip, "", gap_ms, name), {}) if kind in tables.REFERENCES else {}
    return scores.get((clip, case, gap_ms, name), plain)


def _heard(row: dict) -> list[tuple[str, bool, bool]]:
    """(word, whether it is the one spoken, whether the gap touches it) of each word that the judge heard."""
    said, heard = row.get("text", "").split(), (row.get("heard") or "").split()
    touched = row.get("touched") or "0" * len(heard)
    return [(h, h == s, t == "1") for h, s, t in zip(heard, said, touched)]


def _decoded(folder: Path, name: str) -> tuple[np.ndarray, int, str]:
    """(sound (N,), rate, data URI of the file) of a sound of the evaluation."""
    path = folder / name
    if path.suffix not in MEDIA_TYPES or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"summary.json names the sound {name!r}; expected a .wav or .flac inside {folder}")
    audio = clip_io.read_clip(path).audio
    return clip_io.mono(audio.samples), audio.rate, plots.data_uri(path.read_bytes(), MEDIA_TYPES[path.suffix])


def compared(truth: str, said: str) -> list[tuple[str, bool]]:
    """Words of `said`, each with whether it is one of the truth in its place."""
    words = said.split()
    blocks = difflib.SequenceMatcher(None, truth.split(), words, autojunk=False).get_matching_blocks()
    right = {i for block in blocks for i in range(block.b, block.b + block.size)}
    return [(word, i in right) for i, word in enumerate(words)]


# ---- the command -----------------------------------------------------------------------------------------------------------------


@unexpected_errors.reported("avsi_jax.report")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m avsi_jax.report", description="Pages of evaluations that are there already.")
    parser.add_argument("folders", nargs="+", metavar="EVAL", help="the folder of an evaluation: RUN/eval/PROTOCOL-SPLIT-SUITE")
    parser.add_argument("--output", help="FILE.html: a page that compares the runs with the first; tables beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.html")
    known = parser.parse_args(argv)
    command = "python -m avsi_jax.report " + " ".join(sys.argv[1:] if argv is None else argv)
    try:
        if known.output:
            if len(known.folders) < 2:
                raise ValueError("--output compares evaluations: found one, expected two or more")
            print(write_comparison(known.folders, known.output, command=command, overwrite=known.overwrite))
        elif len(known.folders) > 1:
            raise ValueError("found several evaluations and no --output; expected --output=FILE.html, the page that compares them")
        else:
            print(write_report(known.folders[0]))
    except (ValueError, OSError) as error:
        print(f"avsi_jax.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
