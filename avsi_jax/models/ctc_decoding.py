"""CTC logits -> text (greedy, prefix beam search, best sentence of a grammar), and error rates of texts.

Every decoder takes the logits (B, F, C) of a CTC head, blank 0, and the number of valid frames of each clip (B,); later frames are
ignored. `units` is the alphabet of the head, 'characters' or 'phones'. C may be larger than the alphabet (42 in the paper): outputs
without a symbol are never decoded, but count in the softmax. Logarithms are natural. NumPy only, in float64, because the worker
processes of evaluation/metrics.py import this module.

Letters: B clips, F frames, C outputs, S states, K slots of a grammar.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from avsi_jax.data import grid_text

UNITS = {"characters": (len(grid_text.CHARACTERS), grid_text.decode), "phones": (grid_text.NUM_PHONES, grid_text.decode_phones)}


def _alphabet(units: str) -> tuple[int, Callable[[Sequence[int]], str]]:
    """(number of labels, function that converts labels to text)."""
    if units not in UNITS:
        raise ValueError(f"units: found {units!r}, expected one of {', '.join(UNITS)}")
    return UNITS[units]


def _check(logits, num_frames, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Both as NumPy arrays; ValueError if their shapes do not match or logits have fewer than `size` outputs."""
    logits, num_frames = np.asarray(logits), np.asarray(num_frames)
    if logits.ndim != 3 or num_frames.shape != logits.shape[:1] or not logits.shape[1] or logits.shape[2] < size:
        raise ValueError(f"found logits {logits.shape} for {num_frames.shape} clips, expected (B, F, {size} or more) and (B,)")
    if len(num_frames) and not 0 <= num_frames.min() <= num_frames.max() <= logits.shape[1]:
        raise ValueError(f"found {num_frames.min()} to {num_frames.max()} valid frames, expected 0 to {logits.shape[1]}")
    return logits, num_frames


def _log_softmax(logits, num_frames, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Log probabilities (B, F, size) of the first `size` outputs, arbitrary in the padding, and num_frames; ValueError for NaN."""
    logits, num_frames = _check(logits, num_frames, size)
    inside = np.arange(logits.shape[1]) < num_frames[:, None]
    logits = np.where(inside[..., None], logits, 0).astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf, reported below
        logits -= logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    if bad := int(np.isnan(log_p).any((1, 2)).sum()):
        raise ValueError(f"the logits of {bad} of {len(log_p)} clips are not valid (NaN, inf, or -inf for every output)")
    return log_p[..., :size], num_frames


# ---- without a grammar ---------------------------------------------------------------------------------------------------------


def greedy(logits: np.ndarray, num_frames: np.ndarray, units: str = "characters") -> list[str]:
    """The most likely label of each frame, repeats merged, blanks removed: B texts ("bin blue ..." or "B IH N ...")."""
    size, to_text = _alphabet(units)
    logits, num_frames = _check(logits, num_frames, size)
    best = logits[..., :size].argmax(-1)
    new = np.pad(best[:, 1:] != best[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    kept = new & (best != grid_text.BLANK) & (np.arange(best.shape[1]) < num_frames[:, None])
    return [to_text(row[keep]) for row, keep in zip(best, kept)]


class Decoded(NamedTuple):
    """The result of `beam_search`."""

    transcript: list[str]  # B texts
    log_probability: np.ndarray  # (B,) of each text, summed over the alignments that the search kept


def beam_search(logits: np.ndarray, num_frames: np.ndarray, units: str = "characters", *, width: int = 16) -> Decoded:
    """The most likely text by CTC prefix beam search with `width` prefixes.

    Unlike `greedy` it sums over the alignments of a text; it is exact if no prefix had to be dropped.
    """
    if width < 1:
        raise ValueError(f"width: found {width}, expected 1 prefix or more")
    size, to_text = _alphabet(units)
    log_p, num_frames = _log_softmax(logits, num_frames, size)
    best = [_best_prefix(row[:n], width) for row, n in zip(log_p, num_frames)]
    return Decoded([to_text(labels) for labels, _ in best], np.array([p for _, p in best]))


def _best_prefix(log_p: np.ndarray, width: int) -> tuple[tuple[int, ...], float]:
    """Labels and log probability from (frames, labels): algorithm 1 of Hannun et al. 2014, without its language model."""
    prefixes, blank, label = [()], np.zeros(1), np.full(1, -np.inf)  # log probabilities of their alignments by last output
    for frame in log_p:
        last = np.array([p[-1] if p else grid_text.BLANK for p in prefixes])
        longer = np.logaddexp(blank, label)[:, None] + frame  # (prefixes, labels)
        to_blank, to_label = longer[:, grid_text.BLANK].copy(), label + frame[last]
        longer[np.arange(len(last)), last] = blank + frame[last]  # a repeated label needs a blank before it
        place = {p: i for i, p in enumerate(prefixes)}
        for i, prefix in enumerate(prefixes):
            if prefix and (parent := place.get(prefix[:-1])) is not None:  # the same text from two prefixes
                to_label[i] = np.logaddexp(to_label[i], longer[parent, prefix[-1]])
                longer[parent, prefix[-1]] = -np.inf
        longer[:, grid_text.BLANK] = np.logaddexp(to_blank, to_label)  # from here on this column means "prefix not extended"
        order = np.argsort(-longer, axis=None, kind="stable")[: max(1, min(width, np.isfinite(longer).sum()))]
        rows, symbols = np.divmod(order, longer.shape[1])
        unchanged = symbols == grid_text.BLANK
        prefixes = [prefixes[i] + ((int(c),) if c != grid_text.BLANK else ()) for i, c in zip(rows, symbols)]
        blank = np.where(unchanged, to_blank[rows], -np.inf)
        label = np.where(unchanged, to_label[rows], longer[rows, symbols])
    total = np.logaddexp(blank, label)
    return prefixes[int(total.argmax())], float(total.max())


# ---- through a grammar ---------------------------------------------------------------------------------------------------------


class Graph(NamedTuple):
    """Every CTC alignment of every sentence of a grammar, as a graph of S states; a path has one state per frame.

    State 0 is the silence before the sentence, the last state the silence after it. A path begins in state 0 or one of its
    successors and ends in the last state or one of its predecessors.
    """

    label: np.ndarray  # (S,) label of the state
    slot: np.ndarray  # (S,) slot of its word; -1 for the blanks between words
    word: np.ndarray  # (S,) index of its word in the slot; -1 for the blanks between words
    predecessors: np.ndarray  # (S, P) states that may precede it, itself first; rows are padded with the state itself
    sources: np.ndarray  # (E,) the same without padding, row after row
    rows: np.ndarray  # (S,) index in `sources` at which each row begins


def make_graph(slots: Sequence[Sequence[Sequence[int]]]) -> Graph:
    """The graph of the sentences that take one word (a sequence of labels) from each slot, in order.

    A blank may stand between two labels and must stand between two equal ones, also across words.
    """
    if not slots or not all(
        len(words) and all(len(labels) and min(labels) > grid_text.BLANK for labels in words) for words in slots
    ):
        raise ValueError("the grammar has no slot, a slot without words, a word without labels, or a word with a blank")
    states: list[tuple[int, int, int]] = []
    predecessors: list[list[int]] = []

    def add(label: int, slot: int, word: int, sources: Iterable[int]) -> int:
        states.append((int(label), slot, word))
        predecessors.append([len(predecessors), *sources])
        return len(predecessors) - 1

    ends: list[int] = []  # last states of the words of the previous slot
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
    return Graph(*np.array(states).T, *_padded(predecessors))


def _padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows padded with their first entry, the same rows joined, and the index at which each begins."""
    longest = max(map(len, rows))
    padded = np.array([row + row[:1] * (longest - len(row)) for row in rows])
    return padded, np.concatenate(rows), np.cumsum([0, *(len(row) for row in rows[:-1])])


class Paths(NamedTuple):
    """The best path of each clip; -1, -inf and (0, 0) if no sentence is possible (too few frames, labels of probability 0)."""

    word: np.ndarray  # (B, K) index of the word in each slot
    log_probability: np.ndarray  # (B,) of this one alignment
    span: np.ndarray  # (B, K, 2) frames [start, end) from the word's first label to its last; CTC labels are short and may be late


def best_path(logits: np.ndarray, num_frames: np.ndarray, graph: Graph) -> Paths:
    """The most likely single alignment of any sentence of the grammar, exactly (Viterbi algorithm)."""
    log_p, num_frames = _log_softmax(logits, num_frames, int(graph.label.max()) + 1)
    scores = _forward(log_p, graph)
    clips, ends = np.arange(len(log_p)), graph.predecessors[-1]
    last = scores[num_frames - 1, :, clips][:, ends]
    best = np.where(num_frames > 0, last.max(1), -np.inf)
    path = _backtrack(scores, ends[last.argmax(1)], num_frames, graph)
    inside = np.arange(path.shape[1]) < num_frames[:, None]
    in_slot = np.where(inside, graph.slot[path], -1)[:, None] == np.arange(graph.slot.max() + 1)[:, None]  # (B, K, F)
    start, end = in_slot.argmax(-1), path.shape[1] - in_slot[..., ::-1].argmax(-1)
    word = np.take_along_axis(graph.word[path], start, 1)
    possible = np.isfinite(best)[:, None]
    return Paths(np.where(possible, word, -1), best, np.where(possible[..., None], np.stack([start, end], -1), 0))


def _forward(log_p: np.ndarray, graph: Graph) -> np.ndarray:
    """(F, S, B): log probability of the best path that is in state s at frame t."""
    log_p = log_p.transpose(1, 2, 0)  # clips last, so that gathered values are contiguous
    scores = np.empty((len(log_p), len(graph.label), log_p.shape[2]))
    first = (graph.predecessors == 0).any(1)
    scores[0] = np.where(first[:, None], log_p[0, graph.label], -np.inf)
    for t in range(1, len(log_p)):
        scores[t] = np.maximum.reduceat(scores[t - 1][graph.sources], graph.rows) + log_p[t, graph.label]
    return scores


def _backtrack(scores: np.ndarray, ends: np.ndarray, num_frames: np.ndarray, graph: Graph) -> np.ndarray:
    """(B, F): states of the best path that is in `ends` (B,) at the clip's last frame; arbitrary in the padding."""
    clips = np.arange(len(ends))
    path = np.empty((len(ends), len(scores)), np.int64)
    state = ends
    for t in reversed(range(len(scores))):
        state = path[:, t] = np.where(t < num_frames - 1, state, ends)
        if t:
            predecessors = graph.predecessors[state]
            state = predecessors[clips, scores[t - 1][predecessors, clips[:, None]].argmax(1)]
    return path


class Sentences(NamedTuple):
    """The best Grid sentence of each clip; (), -inf and spans of 0 if the clip has too few frames for any sentence."""

    words: list[tuple[str, ...]]  # six words for each of B clips
    log_probability: np.ndarray  # (B,) of the best alignment
    span: np.ndarray  # (B, 6, 2) frames [start, end) of each word


def best_sentences(logits: np.ndarray, num_frames: np.ndarray, units: str = "characters") -> Sentences:
    """The sentence with the most likely alignment among Grid's 64,000 sentences, exactly."""
    paths = best_path(logits, num_frames, grid_graph(units))
    step = 2 if units == "characters" else 1  # with characters every other slot is the space
    names = [list(slot.values()) for slot in grid_text.SLOTS]
    words = [tuple(slot[w] for slot, w in zip(names, row)) if row[0] >= 0 else () for row in paths.word[:, ::step]]
    return Sentences(words, paths.log_probability, paths.span[:, ::step])


@functools.cache
def grid_graph(units: str) -> Graph:
    """The graph of Grid's sentences: characters with one space between words, or phones with nothing between words."""
    _alphabet(units)
    encode = grid_text.encode if units == "characters" else grid_text.encode_phones
    slots = [[encode(word) for word in slot.values()] for slot in grid_text.SLOTS]
    if units == "characters":
        spaces = [[grid_text.encode(" ")]] * len(slots)
        slots = [slot for pair in zip(slots, spaces) for slot in pair][:-1]
    return make_graph(slots)


# ---- error rates ---------------------------------------------------------------------------------------------------------------


class Errors(NamedTuple):
    """Edit errors of n texts against their references."""

    errors: np.ndarray  # (n,) substitutions, deletions and insertions
    count: np.ndarray  # (n,) characters, words or phones of the reference; errors and count are 0 without a reference

    @property
    def rate(self) -> float:
        """All errors divided by the length of all references, 0 to 1 or more; NaN without any reference."""
        return float(self.errors.sum() / self.count.sum()) if self.count.any() else math.nan

    @property
    def rates(self) -> np.ndarray:
        """(n,) error rate of each text; NaN for one without a reference."""
        return np.where(self.count > 0, self.errors / np.maximum(self.count, 1), np.nan)


def character_error_rate(pairs: Iterable[tuple[str, str]]) -> Errors:
    """Character errors, spaces counted, of (transcript, reference) pairs."""
    import jiwer

    return _errors(jiwer.process_characters, pairs)


def word_error_rate(pairs: Iterable[tuple[str, str]]) -> Errors:
    """Word errors of (transcript, reference) pairs."""
    import jiwer

    return _errors(jiwer.process_words, pairs)


def phone_error_rate(pairs: Iterable[tuple[str, str]]) -> Errors:
    """Phone errors of (transcript, reference) pairs of texts such as "B IH N", as made by `greedy` and grid_text.decode_phones."""
    pairs = list(pairs)
    if unknown := sorted({p for pair in pairs for t in pair for p in t.split()} - set(grid_text.PHONES)):
        raise ValueError(
            f"{unknown[0]!r} is not a phone of Grid: expected text such as 'B IH N'; grid_text.phones_of converts words"
        )
    return word_error_rate(pairs)


def _errors(measure: Callable[[str, str], Any], pairs: Iterable[tuple[str, str]]) -> Errors:
    """Errors by a jiwer measure, which does not accept empty references."""
    counts = [_count_edits(measure(reference, text)) if reference.strip() else (0, 0) for text, reference in pairs]
    return Errors(*np.array(counts, np.int64).reshape(-1, 2).T)


def _count_edits(result: Any) -> tuple[int, int]:
    """(number of edits, length of the reference) of a jiwer result."""
    substitutions_and_deletions = result.substitutions + result.deletions
    return substitutions_and_deletions + result.insertions, substitutions_and_deletions + result.hits
