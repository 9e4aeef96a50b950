"""Reports of evaluations: a self-contained report.html and its tables, or one page that compares several runs.

    python -m avsi_jax.report EVAL                                  writes EVAL/report.html and table.csv, .json, .tex again
    python -m avsi_jax.report EVAL EVAL2 ... --output=FILE.html     compares several runs with the same protocol and split

The page loads no other file (its content security policy forbids it): images and audio are embedded as data URIs. Its template is
in avsi_jax/templates/.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from avsi_jax.evaluation import compare_runs, curves, table_export, tables, word_errors
from avsi_jax.evaluation.tables import METRICS, Evaluation
from avsi_jax.media import clip_io, plots
from avsi_jax.runtime import shown_paths, storage, unexpected_errors
from avsi_jax.runtime.command_line import Parser

MEDIA_TYPES = {".wav": "audio/wav", ".flac": "audio/flac"}
MAX_EXAMPLE_BYTES = 9_000_000  # of images and audio embedded in the page
MAX_FAILURES = 200  # listed individually
GROUPS = {
    "": "Evenly spread",
    "among the best": "Among the best",
    "among the worst": "Among the worst",
}  # headings of examples, by "why"


def write_report(folder: str | Path) -> Path:
    """Writes report.html, table.csv, table.json and table.tex into the folder of an evaluation; returns the page's path.

    FileNotFoundError, or ValueError naming what a file lacks.
    """
    evaluation = tables.read(folder)
    return _write(evaluation, evaluation.folder / "report.html", "table")


def write_comparison(folders: Sequence[str | Path], output: str | Path, *, command: str = "", overwrite: bool = False) -> Path:
    """Writes a page that compares several evaluations, and its tables beside it under the same name; returns the page's path.

    Errors of `write_report`; ValueError where the evaluations cannot be compared, FileExistsError for an existing page.
    """
    output = Path(output)
    if output.suffix != ".html":
        raise ValueError(f"--output: found {output}, expected a name that ends in .html")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists; pass --overwrite to replace it")
    evaluation = compare_runs.merged([tables.read(folder) for folder in folders], command)
    output.parent.mkdir(parents=True, exist_ok=True)
    return _write(evaluation, output, output.stem)


def _write(evaluation: Evaluation, path: Path, name: str) -> Path:
    summary, rows = evaluation.summary, evaluation.rows
    words = word_errors.touched_words(summary, rows)
    rates = list(word_errors.estimates(summary, words))
    report_tables = {
        "short": tables.headline(summary),
        "results": tables.results(summary),
        "changes": tables.changes(summary),
        "pairs": tables.differences(summary),
        "words": word_errors.words_table(summary, rates),
        "phones": word_errors.phones_table(summary, rates),
        "confusions": word_errors.confusions_table(summary, words),
        "speakers": tables.speakers(summary, rows),
    }
    table_export.write(path, summary, rates, list(_flat(report_tables.values())), name)
    storage.write_text(path, _page(evaluation, report_tables))
    return path


def _flat(values):
    for value in values:
        yield from value if isinstance(value, list) else [value]


# ---- the page --------------------------------------------------------------------------------------------------------------------


def _page(evaluation: Evaluation, report_tables: dict) -> str:
    import jinja2

    summary, rows = evaluation.summary, evaluation.rows
    systems = curves.styled(summary["systems"])
    examples, left_out = _examples(evaluation)
    failures = [row | {"reason": shown_paths.without_folders(row["reason"])} for row in rows if row["reason"]]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("avsi_jax", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": tables.number, "thousands": lambda n: f"{n:,}"}
    return environment.get_template("evaluation.html").render(
        summary=summary,
        command=shown_paths.without_folders(summary.get("command", "")),
        facts=shown_paths.without_folders_in({k: summary[k] for k in ("seconds", "versions", "runs") if summary.get(k)}),
        systems=systems,
        metrics={m: METRICS[m] for m in METRICS if any(e["metric"] == m for e in summary["table"])},
        sentences=tables.sentences(summary),
        tables=report_tables,
        curves=curves.sections(summary, systems, _label(summary)),
        examples=examples,
        left_out=left_out,
        num_rows=len(rows),
        failures=failures,
        listed=failures[:MAX_FAILURES],
        pooled="all gaps without another change" if tables.plain(summary) else "all gaps",
        intervals=table_export.intervals_text(summary),
        without_words=len({row["clip_id"] for row in rows if row["in_words"].lower() not in ("true", "1")}),
    )


def _label(summary: dict) -> str:
    return f"protocol {summary['protocol']}, {summary['split']}"


# ---- examples --------------------------------------------------------------------------------------------------------------------


def _examples(evaluation: Evaluation) -> tuple[list[dict], int]:
    """(examples with embedded images and audio, grouped by why they are shown; number of examples left out because of size)."""
    summary = evaluation.summary
    examples = sorted(summary.get("examples", []), key=lambda e: list(GROUPS).index(e["why"]))
    scores = {(r["clip_id"], r["case"], int(r["gap_ms"]), r["system"]): r for r in evaluation.rows}
    cases = {(c["name"], c["gap_ms"]): tables.case_label(c, summary["families"]) for c in summary["cases"]}
    shown, size = [], 0
    for example in examples:
        gaps_s = read_gaps(example["gaps_s"])
        cards = _cards(evaluation, example, gaps_s, scores)
        size += sum(len(card["image"]) + len(card["audio"]) for card in cards)
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
    """Image, audio and scores of each system of an example: masked audio first, the original last."""
    kinds = {**{s["name"]: s["kind"] for s in evaluation.summary["systems"]}, "original": ""}
    decoded = {name: _decoded(evaluation.folder, example["audio"][name]) for name in kinds if name in example["audio"]}
    top_db = plots.spectrogram_db(*decoded["original"][:2]).max()
    label = f"{example['clip_id']}, {_label(evaluation.summary)}"
    cards = []
    for name, (audio, rate, uri) in decoded.items():
        row = _row_of(scores, example, name, kinds[name])
        shown = [f"{m.label} {tables.number(float(row[k]), m.digits)}" for k, m in METRICS.items() if row.get(k)]
        transcript = example["transcripts"].get(name, "")
        transcript = compared(example.get("phones", "") if transcript.isupper() else example["text"], transcript)
        image = plots.spectrogram_uri(audio, rate, top_db, gaps_s, f"{name}, {label}")
        card = {"name": name, "kind": kinds[name], "image": image, "audio": uri, "scores": shown}
        cards.append(card | {"transcript": transcript, "recognized": _recognized(row)})
    return cards


def _row_of(scores: dict, example: dict, name: str, kind: str) -> dict:
    """The row of a system for an example; that of the case without a change where the change does not affect the system."""
    clip, case, gap_ms = (example[k] for k in ("clip_id", "case", "gap_ms"))
    plain = scores.get((clip, "", gap_ms, name), {}) if kind in tables.REFERENCES else {}
    return scores.get((clip, case, gap_ms, name), plain)


def _recognized(row: dict) -> list[tuple[str, bool, bool]]:
    """(word, whether it is the spoken one, whether the gap touches it) for each word that the judge recognized."""
    spoken, recognized = row.get("text", "").split(), (row.get("recognized") or "").split()
    touched = row.get("touched") or "0" * len(recognized)
    return [(r, r == s, t == "1") for r, s, t in zip(recognized, spoken, touched)]


def _decoded(folder: Path, name: str) -> tuple[np.ndarray, int, str]:
    """(audio (N,), rate, data URI) of an audio file of the evaluation."""
    path = folder / name
    if path.suffix not in MEDIA_TYPES or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"summary.json names the audio file {name!r}; expected a .wav or .flac inside {folder}")
    audio = clip_io.read_clip(path).audio
    return clip_io.mono(audio.samples), audio.rate, plots.data_uri(path.read_bytes(), MEDIA_TYPES[path.suffix])


def compared(reference: str, transcript: str) -> list[tuple[str, bool]]:
    """Words of the transcript, each with whether it matches the aligned word of the reference."""
    words = transcript.split()
    blocks = difflib.SequenceMatcher(None, reference.split(), words, autojunk=False).get_matching_blocks()
    right = {i for block in blocks for i in range(block.b, block.b + block.size)}
    return [(word, i in right) for i, word in enumerate(words)]


# ---- the command -----------------------------------------------------------------------------------------------------------------


@unexpected_errors.reported("avsi_jax.report")
def main(argv: list[str] | None = None) -> int:
    """The command python -m avsi_jax.report; returns its exit code."""
    parser = Parser("python -m avsi_jax.report", description="Writes the reports of finished evaluations.")
    parser.add_argument("folders", nargs="+", metavar="EVAL", help="results of an evaluation: RUN/eval/PROTOCOL-SPLIT-SUITE")
    parser.add_argument("--output", help="FILE.html: page that compares all runs with the first; its tables are written beside it")
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
