"""The Grid grammar and the labels of the text heads: clip ids <-> words <-> character or phone indices.

A Grid sentence is command, colour, preposition, letter, digit, adverb; the six characters of a clip's id stand for the six words
(`bbaf2n` = "bin blue at f two now").

Phones are ARPAbet without stress, one pronunciation per word, from the CMU Pronouncing Dictionary. The words of Grid use 32 of its
39 phones. Together with the blank these are the 33 outputs of the phone head of Morrone et al. 2021.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

COMMANDS = {"b": "bin", "l": "lay", "p": "place", "s": "set"}
COLOURS = {"b": "blue", "g": "green", "r": "red", "w": "white"}
PREPOSITIONS = {"a": "at", "b": "by", "i": "in", "w": "with"}
LETTERS = {c: c for c in string.ascii_lowercase if c != "w"}
DIGITS = dict(zip("z123456789", "zero one two three four five six seven eight nine".split(), strict=True))
ADVERBS = {"a": "again", "n": "now", "p": "please", "s": "soon"}
SLOTS = (COMMANDS, COLOURS, PREPOSITIONS, LETTERS, DIGITS, ADVERBS)  # in the order they are spoken: 51 words

BLANK = 0  # the CTC blank, also the padding of label arrays; its character and phone are ''
CHARACTERS = ("", " ", *string.ascii_lowercase)
NUM_LABELS = 42  # outputs of the paper's CTC head; labels 28 to 41 are never used
MAX_LABELS = 41  # length of a padded label array, as in the paper

_INDEX = {c: i for i, c in enumerate(CHARACTERS) if c}

# The first pronunciation in the dictionary (for "white" the one without HH, as most English speakers pronounce it), with two
# exceptions: "a" is the name of the letter, not the article, and "z" is the British "zed".
_PRONUNCIATION_TABLE = """
bin B IH N, lay L EY, place P L EY S, set S EH T,
blue B L UW, green G R IY N, red R EH D, white W AY T,
at AE T, by B AY, in IH N, with W IH DH,
a EY, b B IY, c S IY, d D IY, e IY, f EH F, g JH IY, h EY CH, i AY, j JH EY, k K EY, l EH L, m EH M, n EH N, o OW, p P IY,
q K Y UW, r AA R, s EH S, t T IY, u Y UW, v V IY, x EH K S, y W AY, z Z EH D,
zero Z IH R OW, one W AH N, two T UW, three TH R IY, four F AO R, five F AY V, six S IH K S, seven S EH V AH N, eight EY T,
nine N AY N, again AH G EH N, now N AW, please P L IY Z, soon S UW N"""
PRONUNCIATIONS = {word: tuple(phones) for word, *phones in map(str.split, _PRONUNCIATION_TABLE.split(","))}
PHONES = ("", *"AA AE AH AO AW AY B CH D DH EH EY F G IH IY JH K L M N OW P R S T TH UW V W Y Z".split())
NUM_PHONES = len(PHONES)  # 33, including the blank
MAX_PHONES = 23  # in the longest Grid sentence, such as "place green with q seven again"

_PHONE_INDEX = {p: i for i, p in enumerate(PHONES) if p}


def is_grid_id(clip_id: str) -> bool:
    """Whether `clip_id` has six characters and each of them stands for a word of the grammar."""
    return len(clip_id) == len(SLOTS) and all(c in slot for c, slot in zip(clip_id, SLOTS, strict=True))


def words_of(clip_id: str) -> tuple[str, ...]:
    """The six words of a Grid id; ValueError for any other string."""
    if not is_grid_id(clip_id):
        raise ValueError(f"{clip_id!r} is not a Grid id: expected six characters for the six words of a sentence, such as bbaf2n")
    return tuple(slot[c] for c, slot in zip(clip_id, SLOTS, strict=True))


def encode(text: str) -> np.ndarray:
    """Character labels (n,) int32 of a text of a to z and spaces; ValueError for any other character."""
    if unknown := sorted(set(text) - set(_INDEX)):
        raise ValueError(f"{text!r} contains {''.join(unknown)!r}: expected only lower-case letters a to z and spaces")
    return np.array([_INDEX[c] for c in text], np.int32)


def decode(ids: Sequence[int] | np.ndarray) -> str:
    """The text of character labels without blanks and padding; repeats are not merged. ValueError for labels outside 0 to 27."""
    return "".join(_symbols(ids, CHARACTERS))


def _symbols(ids: Sequence[int] | np.ndarray, alphabet: tuple[str, ...]) -> list[str]:
    ids = np.asarray(ids, np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < len(alphabet):
        raise ValueError(f"found labels from {ids.min()} to {ids.max()}, expected 0 to {len(alphabet) - 1}")
    return [alphabet[i] for i in ids]


def phones_of(text: str) -> tuple[str, ...]:
    """The phones of a text of Grid words, without word boundaries; ValueError for a word without a pronunciation."""
    words = text.split()
    if unknown := [w for w in words if w not in PRONUNCIATIONS]:
        raise ValueError(f"{unknown[0]!r} has no pronunciation: expected the 51 words of Grid in lower case")
    return tuple(phone for word in words for phone in PRONUNCIATIONS[word])


def encode_phones(text: str) -> np.ndarray:
    """Phone labels (n,) int32 of a text of Grid words; ValueError as for `phones_of`."""
    return np.array([_PHONE_INDEX[p] for p in phones_of(text)], np.int32)


def decode_phones(ids: Sequence[int] | np.ndarray) -> str:
    """Phone labels -> "B IH N ..." without blanks and padding; repeats are not merged. ValueError for labels outside 0 to 32."""
    return " ".join(filter(None, _symbols(ids, PHONES)))
