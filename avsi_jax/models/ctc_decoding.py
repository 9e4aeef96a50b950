"""CTC logits -> text: the best label of each frame, prefix beam search, the best sentence of a grammar; and how wrong a text is.

Every decoder takes logits (B, F, C) of a text head, blank 0, and the clips' true frames (B,): what lies beyond them is not looked
at. `units` is what the head was trained on, 'characters' or 'phones'. C may be larger than that alphabet (the paper's 42): an
output that names no symbol is never said, but has its share of the softmax. Logarithms are natural. NumPy alone, in float64: the
workers of evaluation/metrics.py import this file.

Letters: B clips, F frames, C outputs, S states, K slots of a grammar.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from avsi_jax.data import grid_text

UNITS = {"characters": (len(grid_text.CHARACTERS), grid_text.decode), "phones": (grid_text.NUM_PHONES, grid_text.decode_phones)}


def _alphabet(units: str):
    """(number of labels, labels -> text)."""
    if units not in UNITS:
        raise ValueError(f"units: found {units!r}, expected one of {', '.join(UNITS)}")
    return UNITS[units]


def _checked(logits, num_frames, size: int) -> tuple[np.ndarray, np.ndarray]:
    logits, num_frames = np.asarray(logits), np.asarray(num_frames)
    if logits.ndim != 3 or num_frames.shape != logits.shape[:1] or not logits.shape[1] or logits.shape[2] < size:
        raise ValueError(f"found logits {logits.shape} of {num_frames.shape} clips, expected (B, F, {size} or more) and (B,)")
    if len(num_frames) and not 0 <= num_frames.min() <= num_frames.max() <= logits.shape[1]:
        raise ValueError(f"found {num_frames.min()} to {num_frames.max()} true frames, expected 0 to {logits.shape[1]}")
    return logits, num_frames


def _log_softmax(logits, num_frames, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, F, size) log probabilities of the first `size` outputs, any in the padding, and num_frames; ValueError for NaN."""
    logits, num_frames = _checked(logits, num_frames, size)
    inside = np.arange(logits.shape[1]) < num_frames[:, None]
    logits = np.where(inside[..., None], logits, 0).astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf, told below
        logits -= logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    if bad := int(np.isnan(log_p).any((1, 2)).sum()):
        raise ValueError(f"the logits of {bad} of {len(log_p)} clips give no probabilities (NaN, inf, or -inf for every output)")
    return log_p[..., :size], num_frames


# ---- without a grammar ---------------------------------------------------------------------------------------------------------


def greedy(logits: np.ndarray, num_frames: np.ndarray, units: str = "characters") -> list[str]:
    """The most likely label of each frame, repeats merged, blanks dropped: B texts ("bin blue ..." or "B IH N ...")."""
    size, spell = _alphabet(units)
    logits, num_frames = _checked(logits, num_frames, size)
    best = logits[..., :size].argmax(-1)
    new = np.pad(best[:, 1:] != best[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    kept = new & (best != grid_text.BLANK) & (np.arange(best.shape[1]) < num_frames[:, None])
    return [spell(row[keep]) for row, keep in zip(best, kept)]


class Decoded(NamedTuple):
    """said: B texts; log_probability (B,): of each text, summed over the alignments that were followed."""

    transcript: list[str]
    log_probability: np.ndarray


def beam_search(logits: np.ndarray, num_frames: np.ndarray, units: str = "characters", *, width: int = 16) -> Decoded:
    """The most likely text by CTC prefix beam search, `width` prefixes kept at each frame.

    Unlike `greedy` it adds up the alignments of a text; it is exact where no prefix had to be dropped.
    """
    if width < 1:
        raise ValueError(f"width: found {width}, expected 1 prefix or more")
    size, spell = _alphabet(units)
    log_p, num_frames = _log_softmax(logits, num_frames, size)
    found = [_best_prefix(row[:n], width) for row, n in zip(log_p, num_frames)]
    return Decoded([spell(labels) for labels, _ in found], np.array([p for _, p in found]))


def _best_prefix(log_p: np.ndarray, width: int) -> tuple[tuple[int, ...], float]:
    """Labels and log probability from (frames, labels): algorithm 1 of Hannun et al. 2014, without its language model."""
    prefixes, blank, label = [()], np.zeros(1), np.full(1, -np.inf)  # log probability of the alignments that end so
    for frame in log_p:
        last = np.array([p[-1] if p else grid_text.BLANK for p in prefixes])
        longer = np.logaddexp(blank, label)[:, None] + frame  # (prefixes, labels)
        to_blank, to_label = longer[:, grid_text.BLANK].copy(), label + frame[last]
        longer[np.arange(len(last)), last] = blank + frame[last]  # said again only after a blank
        place = {p: i for i, p in enumerate(prefixes)}
        for i, prefix in enumerate(prefixes):
            if prefix and (parent := place.get(prefix[:-1])) is not None:  # the same text, come to by two ways
                to_label[i] = np.logaddexp(to_label[i], longer[parent, prefix[-1]])
                longer[parent, prefix[-1]] = -np.inf
        longer[:, grid_text.BLANK] = np.logaddexp(to_blank, to_label)  # from here on this column means: as long as before
        order = np.argsort(-longer, axis=None, kind="stable")[: max(1, min(width, np.isfinite(longer).sum()))]
        rows, symbols = np.divmod(order, longer.shape[1])
        stays = symbols == grid_text.BLANK
        prefixes = [prefixes[i] + ((int(c),) if c != grid_text.BLANK else ()) for i, c in zip(rows, symbols)]
        blank = np.where(stays, to_blank[rows], -np.inf)
        label = np.where(stays, to_label[rows], longer[rows, symbols])
    total = np.logaddexp(blank, label)
    return prefixes[int(total.argmax())], float(total.max())


# ---- through a grammar ---------------------------------------------------------------------------------------------------------


class Graph(NamedTuple):
    """Every CTC alignment of every sentence of a grammar, as S states; a path through them says one state a frame.

    State 0 is the silence before the sentence, the last state the silence after it: a path begins in state 0 or where that leads
    to, and ends in the last state or where that is come to from.
    """

    label: np.ndarray  # (S,) what the state says
    slot: np.ndarray  # (S,) of its word; -1 for the blanks between words
    word: np.ndarray  # (S,) its place in the slot; -1 for the blanks between words
    before: np.ndarray  # (S, P) the states that may come before it: itself first, which also fills the rows up
    sources: np.ndarray  # (E,) the same without the filling, row after row
    rows: np.ndarray  # (S,) where each row begins in `sources`


def make_graph(slots: Sequence[Sequence[Sequence[int]]]) -> Graph:
    """The graph of the sentences that take one word (a sequence of labels) from each slot, in order.

    Between two labels there may be a blank, between two equal ones there must be one, also where they are of two words.
    """
    if not slots or not all(
        len(words) and all(len(labels) and min(labels) > grid_text.BLANK for labels in words) for words in slots
    ):
        raise ValueError("the grammar has no slot, or a slot without words, or a word without labels or with a blank in it")
    states: list[tuple[int, int, int]] = []
    before: list[list[int]] = []

    def add(label: int, slot: int, word: int, sources: Iterable[int]) -> int:
        states.append((int(label), slot, word))
        before.append([len(before), *sources])
        return len(before) - 1

    ends: list[int] = []  # of the words of the slot before
    for k, words in enumerate(slots):
        silence, starts, ends = add(grid_text.BLANK, -1, -1, ends), ends, []
        for w, labels in enumerate(words):
            previous, blank = starts, silence
            for i, label in enumerate(labels):
                if i:
                    blank = add(grid_text.BLANK, k, w, previous)
                previous = [add(label, k, w, [blank, *(p for p in previous if states[p][0] != label)])]
            ends += previous
    add(grid_text.BLANK, -1, -1, ends)
    return Graph(*np.array(states).T, *_predecessors(before))


def _predecessors(before: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    longest = max(map(len, before))
    lengths = [len(row) for row in before]
    filled = np.array([row + row[:1] * (longest - len(row)) for row in before])
    return filled, np.concatenate(before), np.cumsum([0, *lengths[:-1]])


class Paths(NamedTuple):
    """The best path of each clip. Where no sentence is possible (too few frames, labels of probability 0): -inf, -1, (0, 0)."""

    word: np.ndarray  # (B, K) place of the word in each slot
    log_probability: np.ndarray  # (B,) of this one alignment
    span: np.ndarray  # (B, K, 2) frames [start, end) from the word's first label to its last; CTC labels are short and may be late


def best_path(logits: np.ndarray, num_frames: np.ndarray, graph: Graph) -> Paths:
    """The most likely single alignment of any sentence of the grammar, exactly (Viterbi)."""
    log_p, num_frames = _log_softmax(logits, num_frames, int(graph.label.max()) + 1)
    scores = _forward(log_p, graph)
    clips, ends = np.arange(len(log_p)), graph.before[-1]
    last = scores[num_frames - 1, :, clips][:, ends]
    best = np.where(num_frames > 0, last.max(1), -np.inf)
    path = _backward(scores, ends[last.argmax(1)], num_frames, graph)
    inside = np.arange(path.shape[1]) < num_frames[:, None]
    said = np.where(inside, graph.slot[path], -1)[:, None] == np.arange(graph.slot.max() + 1)[:, None]  # (B, K, F)
    start, end = said.argmax(-1), path.shape[1] - said[..., ::-1].argmax(-1)
    word = np.take_along_axis(graph.word[path], start, 1)
    found = np.isfinite(best)[:, None]
    return Paths(np.where(found, word, -1), best, np.where(found[..., None], np.stack([start, end], -1), 0))


def _forward(log_p: np.ndarray, graph: Graph) -> np.ndarray:
    """(F, S, B): log probability of the best path that is in state s at frame t."""
    said = log_p.transpose(1, 2, 0)  # clips last: what is gathered lies side by side
    scores = np.empty((len(said), len(graph.label), said.shape[2]))
    first = (graph.before == 0).any(1)
    scores[0] = np.where(first[:, None], said[0, graph.label], -np.inf)
    for t in range(1, len(said)):
        scores[t] = np.maximum.reduceat(scores[t - 1][graph.sources], graph.rows) + said[t, graph.label]
    return scores


def _backward(scores: np.ndarray, ends: np.ndarray, num_frames: np.ndarray, graph: Graph) -> np.ndarray:
    """(B, F): the states of the best path that is in `ends` (B,) at the clip's last frame; any state in the padding."""
    clips = np.arange(len(ends))
    path = np.empty((len(ends), len(scores)), np.int64)
    state = ends
    for t in reversed(range(len(scores))):
        state = path[:, t] = np.where(t < num_frames - 1, state, ends)
        if t:
            before = graph.before[state]
            state = before[clips, scores[t - 1][before, clips[:, None]].argmax(1)]
    return path


class Sentences(NamedTuple):
    """The best Grid sentence of each clip; () with -inf and spans of 0 where the clip has too few frames for any."""

    words: list[tuple[str, ...]]  # B times six words
    log_probability: np.ndarray  # (B,) of the best alignment alone
    span: np.ndarray  # (B, 6, 2) frames [start, end) of each word


def best_sentences(logits: np.ndarray, num_frames: np.ndarray, units: str = "characters") -> Sentences:
    """The Grid sentence, of 64,000, that holds the most likely alignment, exactly."""
    paths = best_path(logits, num_frames, grid_graph(units))
    step = 2 if units == "characters" else 1  # every other slot is the space
    names = [list(slot.values()) for slot in grid_text.SLOTS]
    words = [tuple(slot[w] for slot, w in zip(names, row)) if row[0] >= 0 else () for row in paths.word[:, ::step]]
    return Sentences(words, paths.log_probability, paths.span[:, ::step])


@functools.cache
def grid_graph(units: str) -> Graph:
    """The graph of Grid's sentences: characters with one space between words, or phones without any mark there."""
    _alphabet(units)
    encode = grid_text.encode if units == "characters" else grid_text.encode_phones
    slots = [[encode(word) for word in slot.values()] for slot in grid_text.SLOTS]
    if units == "characters":
        spaces = [[grid_text.encode(" ")]] * len(slots)
        slots = [slot for pair in zip(slots, spaces) for slot in pair][:-1]
    return make_graph(slots)


# ---- how wrong -----------------------------------------------------------------------------------------------------------------


class Errors(NamedTuple):
    """errors, count (n,): the edits of each clip, and the characters, words or phones of its true text, 0 and 0 without one."""

    errors: np.ndarray
    count: np.ndarray

    @property
    def rate(self) -> float:
        """All errors over all that was to be said: 0 to 1 or more; NaN where nothing was."""
        return float(self.errors.sum() / self.count.sum()) if self.count.any() else math.nan

    @property
    def rates(self) -> np.ndarray:
        """(n,) of each clip; NaN for one without a true text."""
        return np.where(self.count > 0, self.errors / np.maximum(self.count, 1), np.nan)


def character_error_rate(pairs: Iterable[tuple[str, str]]) -> Errors:
    """Errors in characters, spaces counted, of (said, true) texts."""
    import jiwer

    return _errors(jiwer.process_characters, pairs)


def word_error_rate(pairs: Iterable[tuple[str, str]]) -> Errors:
    """Errors in words of (said, true) texts."""
    import jiwer

    return _errors(jiwer.process_words, pairs)


def phone_error_rate(pairs: Iterable[tuple[str, str]]) -> Errors:
    """Errors in phones of (said, true) texts such as "B IH N", as `greedy` says and grid_text.decode_phones makes them."""
    pairs = list(pairs)
    if unknown := sorted({p for pair in pairs for t in pair for p in t.split()} - set(grid_text.PHONES)):
        raise ValueError(f"{unknown[0]!r} is no phone of Grid: expected 'B IH N' and the like; text.phones_of makes them of words")
    return word_error_rate(pairs)


def _errors(measure, pairs) -> Errors:
    """(edits, length) of each pair by a jiwer measure, which takes no empty true text."""
    both = [_edits(measure(true, said)) if true.strip() else (0, 0) for said, true in pairs]
    return Errors(*np.array(both, np.int64).reshape(-1, 2).T)


def _edits(found) -> tuple[int, int]:
    kept = found.substitutions + found.deletions
    return kept + found.insertions, kept + found.hits
