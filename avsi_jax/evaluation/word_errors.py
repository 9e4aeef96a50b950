"""Word and phone error rates in the gaps, by system, from the judge's words in clips.csv.

The judge (inference/recognizer.py) recognizes six words, one per slot of Grid's sentence. Only words that the gap touches count.
Phone errors are those of the fewest edits between the pronunciations of the spoken and of the recognized word.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator
from typing import NamedTuple

from avsi_jax.data import grid_text
from avsi_jax.evaluation import tables

SLOTS = ("command", "colour", "preposition", "letter", "digit", "adverb")
PLACES = {  # places of articulation, from the most to the least visible (Ladefoged & Johnson, A Course in Phonetics)
    "both lips": "B M P W",
    "lip and teeth": "F V",
    "tongue and teeth": "DH TH",
    "alveolar ridge": "D L N S T Z",
    "behind the alveolar ridge": "CH JH R Y",
    "back of the mouth": "G K",
    "vowels": "AA AE AH AO AW AY EH EY IH IY OW UW",
}
MAX_CONFUSIONS = 15  # rows of the table


class Word(NamedTuple):
    """One word that a gap touches."""

    system: str
    cluster: str  # the clip, or the speaker where intervals are over speakers
    slot: int
    spoken: str
    recognized: str  # '' where the judge recognized none


def touched_words(summary: dict, rows: list[dict]) -> list[Word]:
    """Words that gaps touch, in the cases without another change, or in all if there is none; rows without a judge have none."""
    names = {c["name"] for c in tables.plain(summary) or summary["cases"]}
    cluster = "speaker" if summary.get("by_speaker") else "clip_id"
    words = []
    for row in rows:
        spoken, touched = row.get("text", "").split(), row.get("touched") or ""
        if row["case"] not in names or len(spoken) != len(SLOTS) or len(touched) != len(SLOTS):
            continue
        recognized = row.get("recognized", "").split() or [""] * len(SLOTS)
        slots = enumerate(zip(spoken, recognized, touched, strict=True))
        words += [Word(row["system"], row[cluster], i, s, r) for i, (s, r, flag) in slots if flag == "1"]
    return words


def estimates(summary: dict, words: list[Word]) -> Iterator[dict]:
    """Error rates {"kind": "word" or "phone", "item", "system", "mean", "low", "high", "n"}; n counts words or phones.

    Items: the slots of a sentence, "all", the places of PLACES, and the phones.
    """
    systems = [s["name"] for s in summary["systems"]]
    clusters = sorted({w.cluster for w in words})
    counts: dict = collections.defaultdict(lambda: {c: [0, 0] for c in clusters})
    for word in words:
        wrong = word.spoken != word.recognized
        _count(counts, word, ("word", SLOTS[word.slot]), wrong)
        _count(counts, word, ("word", "all"), wrong)
        for phone, is_wrong in wrong_phones(word.spoken, word.recognized):
            _count(counts, word, ("phone", phone), is_wrong)
            _count(counts, word, ("phone", place_of(phone)), is_wrong)
    items = [("word", k) for k in (*SLOTS, "all")]
    items += [("phone", k) for place, phones in PLACES.items() for k in (place, *phones.split())]
    for kind, item in items:
        for system in systems:
            if (by_cluster := counts.get((kind, item, system))) and (n := sum(n for _, n in by_cluster.values())):
                rate = tables.clustered(*zip(*by_cluster.values()), by_speaker=bool(summary.get("by_speaker")))
                yield {"kind": kind, "item": item, "system": system, **rate, "n": n}


def _count(counts: dict, word: Word, item: tuple[str, str], wrong: bool) -> None:
    count = counts[*item, word.system][word.cluster]
    count[0] += wrong
    count[1] += 1


@functools.cache
def wrong_phones(spoken: str, recognized: str) -> tuple[tuple[str, bool], ...]:
    """Each phone of the spoken word, and whether it is missing or different in the recognized one; () for words outside Grid."""
    import jiwer

    if spoken not in grid_text.PRONUNCIATIONS:
        return ()
    true, other = grid_text.PRONUNCIATIONS[spoken], grid_text.PRONUNCIATIONS.get(recognized, ())
    if not other:
        return tuple((phone, True) for phone in true)
    (parts,) = jiwer.process_words(" ".join(true), " ".join(other)).alignments
    right = {i for part in parts if part.type == "equal" for i in range(part.ref_start_idx, part.ref_end_idx)}
    return tuple((phone, i not in right) for i, phone in enumerate(true))


def place_of(phone: str) -> str:
    """The place of articulation of a phone, a key of PLACES."""
    return next(place for place, phones in PLACES.items() if phone in phones.split())


# ---- tables ----------------------------------------------------------------------------------------------------------------------


def words_table(summary: dict, rates: list[dict]) -> dict:
    """Error rates by slot of the sentence, a column per system."""
    rows = [("", k) for k in (*SLOTS, "all")]
    return _table("Word errors by position in the sentence", "Word", summary, rates, rows, "word")


def phones_table(summary: dict, rates: list[dict]) -> dict:
    """Error rates by phone, grouped by place of articulation; the first row of a group is its total."""
    rows = [(place, k if k != place else "all of these") for place, phones in PLACES.items() for k in (place, *phones.split())]
    return _table("Phone errors by place of articulation", "Phone", summary, rates, rows, "phone")


def _table(title: str, first: str, summary: dict, rates: list[dict], rows: list[tuple[str, str]], kind: str) -> dict:
    cells: dict = collections.defaultdict(dict)
    for e in rates:
        if e["kind"] == kind:
            percent = e | {k: 100 * e[k] for k in ("mean", "low", "high")}
            cells[e["item"]][e["system"]] = tables.cell(percent, 0, unit=" %")
    table_rows = [(group, label, "", cells[group if label == "all of these" else label]) for group, label in rows]
    systems = [s for s in summary["systems"] if any(s["name"] in by_system for by_system in cells.values())]
    return tables.table(title, first, tables.columns_of_systems(systems), [row for row in table_rows if row[3]])


def confusions_table(summary: dict, words: list[Word]) -> dict:
    """The most frequent pairs (spoken, recognized) of the evaluated systems, and their counts for all systems."""
    spoken = collections.Counter((w.system, w.slot, w.spoken) for w in words)
    pairs = collections.Counter((w.system, w.slot, w.spoken, w.recognized) for w in words if w.recognized != w.spoken)
    ours = {s["name"] for s in summary["systems"] if s["kind"] == "system"}
    total: collections.Counter = collections.Counter()
    for (system, *pair), times in pairs.items():
        if system in ours:
            total[tuple(pair)] += times
    systems = [s for s in summary["systems"] if any(w.system == s["name"] for w in words)]
    rows = []
    for (slot, word, recognized), _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:MAX_CONFUSIONS]:
        counts = {s["name"]: (pairs[s["name"], slot, word, recognized], spoken[s["name"], slot, word]) for s in systems}
        cells = {k: {"text": str(times), "interval": f"of {n}", "verdict": "", "n": n} for k, (times, n) in counts.items() if n}
        rows.append(("", f"{word} → {recognized or 'nothing'}", "", cells))
    columns = tables.columns_of_systems(systems)
    caption = "Number of confusions, of the times that the word was spoken"
    return tables.table("Most frequent confusions", "Spoken → recognized", columns, rows, caption)
