"""Rows of clips.csv with what a judge heard -> which words and phones of the gaps are misheard, by whom.

The judge (recognizer.Recogniser) says six words, one a slot of Grid's sentence. Only words that the gap touches count. Phones are
those of the words' pronunciations: of the word spoken, which would the word heard have had wrong, by the fewest edits.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator
from typing import NamedTuple

from avsi_jax.data import grid_text
from avsi_jax.evaluation import tables

SLOTS = ("command", "colour", "preposition", "letter", "digit", "adverb")
PLACES = {  # where a phone is made, from what everybody sees to what nobody does (Ladefoged & Johnson, A Course in Phonetics)
    "both lips": "B M P W",
    "lip and teeth": "F V",
    "tongue and teeth": "DH TH",
    "behind the teeth": "D L N S T Z",
    "behind the ridge": "CH JH R Y",
    "back of the mouth": "G K",
    "vowels": "AA AE AH AO AW AY EH EY IH IY OW UW",
}
MOST_CONFUSED = 15


class Word(NamedTuple):
    """One word that a gap touches."""

    system: str
    cluster: str  # the clip, or the speaker where intervals speak of speakers
    slot: int
    transcript: str
    heard: str  # '' where the judge heard none


def touched_words(summary: dict, rows: list[dict]) -> list[Word]:
    """Of the cases that are only a gap; of all where there is none. Rows without words, times or judge have none."""
    names = {c["name"] for c in tables.plain(summary) or summary["cases"]}
    cluster = "speaker" if summary.get("by_speaker") else "clip_id"
    found = []
    for row in rows:
        said, touched = row.get("text", "").split(), row.get("touched") or ""
        if row["case"] not in names or len(said) != len(SLOTS) or len(touched) != len(SLOTS):
            continue
        heard = row.get("heard", "").split() or [""] * len(SLOTS)
        pairs = enumerate(zip(said, heard, touched, strict=True))
        found += [Word(row["system"], row[cluster], i, s, h) for i, (s, h, is_in) in pairs if is_in == "1"]
    return found


def estimates(summary: dict, words: list[Word]) -> Iterator[dict]:
    """{"kind": "word" or "phone", "item", "system", "mean", "low", "high", "n"}: rates of error; n counts words or phones.

    Items: the slots of a sentence, "all", the places of PLACES, the phones.
    """
    systems = [s["name"] for s in summary["systems"]]
    clusters = sorted({w.cluster for w in words})
    counts: dict = collections.defaultdict(lambda: {c: [0, 0] for c in clusters})
    for word in words:
        wrong = word.transcript != word.heard
        _count(counts, word, ("word", SLOTS[word.slot]), wrong)
        _count(counts, word, ("word", "all"), wrong)
        for phone, missed in wrong_phones(word.transcript, word.heard):
            _count(counts, word, ("phone", phone), missed)
            _count(counts, word, ("phone", place_of(phone)), missed)
    items = [("word", k) for k in (*SLOTS, "all")]
    items += [("phone", k) for place, phones in PLACES.items() for k in (place, *phones.split())]
    for kind, item in items:
        for system in systems:
            if (found := counts.get((kind, item, system))) and (n := sum(n for _, n in found.values())):
                rate = tables.clustered(*zip(*found.values()))
                yield {"kind": kind, "item": item, "system": system, **rate, "n": n}


def _count(counts: dict, word: Word, item: tuple[str, str], wrong: bool) -> None:
    of = counts[*item, word.system][word.cluster]
    of[0] += wrong
    of[1] += 1


@functools.cache
def wrong_phones(said: str, heard: str) -> tuple[tuple[str, bool], ...]:
    """Each phone of the word spoken, and whether the word heard has lost or changed it; () for a word that isn't Grid's."""
    import jiwer

    if said not in grid_text.PRONUNCIATIONS:
        return ()
    true, other = grid_text.PRONUNCIATIONS[said], grid_text.PRONUNCIATIONS.get(heard, ())
    if not other:
        return tuple((phone, True) for phone in true)
    (parts,) = jiwer.process_words(" ".join(true), " ".join(other)).alignments
    right = {i for part in parts if part.type == "equal" for i in range(part.ref_start_idx, part.ref_end_idx)}
    return tuple((phone, i not in right) for i, phone in enumerate(true))


def place_of(phone: str) -> str:
    return next(place for place, phones in PLACES.items() if phone in phones.split())


# ---- tables ----------------------------------------------------------------------------------------------------------------------


def words_table(summary: dict, found: list[dict]) -> dict:
    """Errors by slot of the sentence, a column a system."""
    rows = [("", k) for k in (*SLOTS, "all")]
    return _rates("Words misheard, by their place in the sentence", "Word", summary, found, rows, "word")


def phones_table(summary: dict, found: list[dict]) -> dict:
    """Errors by phone, in groups by where it is made, a row for each group first."""
    rows = [(place, k if k != place else "all of these") for place, phones in PLACES.items() for k in (place, *phones.split())]
    return _rates("Phones lost or changed, by where they are made", "Phone", summary, found, rows, "phone")


def _rates(title: str, first: str, summary: dict, found: list[dict], rows: list[tuple[str, str]], kind: str) -> dict:
    cells: dict = collections.defaultdict(dict)
    for e in found:
        if e["kind"] == kind:
            percent = e | {k: 100 * e[k] for k in ("mean", "low", "high")}
            cells[e["item"]][e["system"]] = tables.cell(percent, 0, unit=" %")
    made = [(group, label, "", cells[group if label == "all of these" else label]) for group, label in rows]
    systems = [s for s in summary["systems"] if any(s["name"] in of for of in cells.values())]
    return tables.table(title, first, tables.columns_of_systems(systems), [row for row in made if row[3]])


def confusions_table(summary: dict, words: list[Word]) -> dict:
    """The pairs (spoken, heard) that the systems are most often misheard with, and how often the others are."""
    spoken = collections.Counter((w.system, w.slot, w.transcript) for w in words)
    pairs = collections.Counter((w.system, w.slot, w.transcript, w.heard) for w in words if w.heard != w.transcript)
    ours = {s["name"] for s in summary["systems"] if s["kind"] == "system"}
    total: collections.Counter = collections.Counter()
    for (system, *pair), times in pairs.items():
        if system in ours:
            total[tuple(pair)] += times
    systems = [s for s in summary["systems"] if any(w.system == s["name"] for w in words)]
    rows = []
    for (slot, said, heard), _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:MOST_CONFUSED]:
        counts = {s["name"]: (pairs[s["name"], slot, said, heard], spoken[s["name"], slot, said]) for s in systems}
        cells = {k: {"text": str(of[0]), "interval": f"of {of[1]}", "says": "", "n": of[1]} for k, of in counts.items() if of[1]}
        rows.append(("", f"{said} → {heard or 'nothing'}", "", cells))
    said = "Times, of those that the word was spoken"
    return tables.table("Words most often taken for another", "Spoken → heard", tables.columns_of_systems(systems), rows, said)
