"""The Grid grammar and the characters of the text head: clip ids <-> words <-> label indices.

A Grid sentence is command, colour, preposition, letter, digit, adverb; the six characters of a clip's id name the six words
(`bbaf2n` = "bin blue at f two now"). Phones are not here yet.
"""

from __future__ import annotations

import string

import numpy as np

COMMANDS = {"b": "bin", "l": "lay", "p": "place", "s": "set"}
COLOURS = {"b": "blue", "g": "green", "r": "red", "w": "white"}
PREPOSITIONS = {"a": "at", "b": "by", "i": "in", "w": "with"}
LETTERS = {c: c for c in string.ascii_lowercase if c != "w"}
DIGITS = dict(zip("z123456789", "zero one two three four five six seven eight nine".split(), strict=True))
ADVERBS = {"a": "again", "n": "now", "p": "please", "s": "soon"}
SLOTS = (COMMANDS, COLOURS, PREPOSITIONS, LETTERS, DIGITS, ADVERBS)  # in the order they are spoken: 51 words

BLANK = 0  # of CTC; also the padding of label arrays, which is why '' stands there
CHARACTERS = ("", " ", *string.ascii_lowercase)
NUM_LABELS = 42  # outputs of the paper's CTC head; 28 to 41 are never used
MAX_LABELS = 41  # length of a padded label array, the paper's

_INDEX = {c: i for i, c in enumerate(CHARACTERS) if c}


def is_grid_id(clip_id: str) -> bool:
    """Whether each of the six characters names a word of the grammar."""
    return len(clip_id) == len(SLOTS) and all(c in slot for c, slot in zip(clip_id, SLOTS, strict=True))


def words_of(clip_id: str) -> tuple[str, ...]:
    """The six words of a Grid id; ValueError for any other name."""
    if not is_grid_id(clip_id):
        raise ValueError(f"{clip_id!r} is no Grid id: expected six characters that name six words, such as bbaf2n")
    return tuple(slot[c] for c, slot in zip(clip_id, SLOTS, strict=True))


def encode(text: str) -> np.ndarray:
    """Labels (n,) int32 of a text of a-z and spaces; ValueError for any other character."""
    if unknown := sorted(set(text) - set(_INDEX)):
        raise ValueError(f"{text!r} holds {''.join(unknown)!r}: expected only the letters a to z, in lower case, and spaces")
    return np.array([_INDEX[c] for c in text], np.int32)


def decode(ids) -> str:
    """The text of labels, blanks (and so padding) left out; the caller merges repeats. ValueError outside 0 to 27."""
    ids = np.asarray(ids, np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < len(CHARACTERS):
        raise ValueError(f"labels run from {ids.min()} to {ids.max()}: expected 0 to {len(CHARACTERS) - 1}")
    return "".join(CHARACTERS[i] for i in ids)
