"""CTC decoders against sums and maxima over every alignment, and the Grid grammar against each of its 64,000 sentences."""

import itertools
import math
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from avsi_jax.data import grid_text
from avsi_jax.models import ctc_decoding

SENTENCES = list(itertools.product(*(slot.values() for slot in grid_text.SLOTS)))
ENCODE = {"characters": grid_text.encode, "phones": grid_text.encode_phones}


def log_softmax(logits):
    logits = np.float64(logits)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def collapse(path):
    """Graves et al. 2006, section 3.1: merge repeats, then drop blanks."""
    return tuple(label for label, _ in itertools.groupby(path) if label != 0)


def alignments(log_p):
    """(path, log probability) of every path (frames,) through log_p (frames, labels)."""
    for path in itertools.product(range(log_p.shape[1]), repeat=len(log_p)):
        yield path, sum(log_p[t, label] for t, label in enumerate(path))


# ---- greedy --------------------------------------------------------------------------------------------------------------------


def logits_of(rows, frames, size=grid_text.NUM_LABELS):
    """One-hot logits (B, frames, size) whose best labels are `rows`, followed by blanks."""
    best = np.zeros((len(rows), frames), int)
    for row, labels in zip(best, rows):
        row[: len(labels)] = labels
    return np.eye(size, dtype=np.float32)[best]


def test_greedy_by_hand():
    a, b, i, n = (int(grid_text.encode(c)[0]) for c in "abin")
    rows = [
        [b, b, 0, i, n, n],  # repeats merge: bin
        [0, a, a, 0, a, b],  # a blank between keeps both: aab
        [n, 1, 1, n, 0, 0],  # a space is a character: "n n"
        [0, 0, 0, 0, 0, 0],
        [a, a, a, a, a, a],
    ]
    full = np.full(len(rows), 6)
    assert ctc_decoding.greedy(logits_of(rows, 6), full) == ["bin", "aab", "n n", "", "a"]
    assert ctc_decoding.greedy(logits_of(rows, 6), np.int32([2, 5, 3, 6, 0])) == ["b", "aa", "n ", "", ""]


def test_greedy_ignores_outputs_without_a_symbol():
    """Outputs 28 to 41 of the paper's head have no character, 33 to 41 no phone: the best of the others is taken."""
    logits = logits_of([[2, 3, 4]], 3)
    logits[0, 1, 35] = 5
    assert ctc_decoding.greedy(logits, np.int32([3])) == ["abc"]
    assert ctc_decoding.greedy(jnp.asarray(logits), jnp.int32([3])) == ["abc"]  # also from jax arrays
    logits[0, 2, 32] = 6
    assert ctc_decoding.greedy(logits, np.int32([3]), "phones") == ["AE AH Z"]
    assert ctc_decoding.greedy(logits, np.int32([3])) == ["abc"]


def test_greedy_decodes_phones():
    labels = grid_text.encode_phones("bin blue")
    rows = [[*labels], [labels[0], labels[0], 0, labels[0]]]
    assert ctc_decoding.greedy(logits_of(rows, 8, grid_text.NUM_PHONES), np.int32([8, 8]), "phones") == ["B IH N B L UW", "B B"]


@pytest.mark.parametrize("decoder", [ctc_decoding.greedy, ctc_decoding.beam_search, ctc_decoding.best_sentences])
def test_malformed_input_is_refused(decoder):
    logits = np.zeros((2, 5, 42), np.float32)
    for given, frames, units, message in [
        (logits, np.int32([5, 5]), "words", "'words', expected one of characters, phones"),
        (logits, np.int32([5, 6]), "phones", "5 to 6 valid frames, expected 0 to 5"),
        (logits, np.int32([5]), "phones", r"\(2, 5, 42\) for \(1,\) clips"),
        (logits[0], np.int32([5]), "phones", r"\(5, 42\)"),
        (logits[..., :27], np.int32([5, 5]), "characters", "28 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoder(given, frames, units)


@pytest.mark.parametrize("decoder", [ctc_decoding.beam_search, ctc_decoding.best_sentences])
def test_invalid_logits_are_refused_and_padding_is_ignored(decoder):
    logits = np.random.default_rng(0).normal(size=(2, 30, 42)).astype(np.float32)
    expected = decoder(logits, np.int32([30, 22]))
    logits[1, 22:] = np.nan
    for result, value in zip(decoder(logits, np.int32([30, 22])), expected):
        np.testing.assert_array_equal(result, value)
    for invalid in (np.nan, np.inf):
        logits[0, 3, 40] = invalid
        with pytest.raises(ValueError, match="1 of 2 clips"):
            decoder(logits, np.int32([30, 22]))


# ---- prefix beam search --------------------------------------------------------------------------------------------------------


def full_logits(first, size=grid_text.NUM_LABELS):
    """Logits (frames, size) from those of the first labels (frames, few); all other labels are impossible."""
    return np.pad(first, ((0, 0), (0, size - first.shape[1])), constant_values=-np.inf)


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_is_the_sum_over_every_alignment(seed):
    """Three symbols, lengths 0 to 6; output 41, which has no symbol, takes its share of the probability."""
    rng = np.random.default_rng(seed)
    logits = np.stack([full_logits(x) for x in 2 * rng.normal(size=(7, 6, 4))])
    logits[..., 41] = rng.normal(size=(7, 6))
    frames = np.arange(7)
    result = ctc_decoding.beam_search(logits, frames, width=10_000)
    for b, n in enumerate(frames):
        totals = {}
        for path, p in alignments(log_softmax(logits[b, :n, [0, 1, 2, 3, 41]].T)):
            if 4 not in path:
                totals[collapse(path)] = np.logaddexp(totals.get(collapse(path), -np.inf), p)
        best = max(totals, key=totals.get)
        assert result.transcript[b] == grid_text.decode(best)
        assert result.log_probability[b] == pytest.approx(totals[best], abs=1e-9)


def test_the_beam_sums_alignments_and_greedy_does_not():
    """By hand: in two frames of 0.6 blank and 0.4 "a", "" has probability 0.36 and "a" 0.64. The phone of that label is AA."""
    logits = full_logits(np.log([[0.6, 0, 0.4], [0.6, 0, 0.4]], where=np.array([True, False, True]), out=np.full((2, 3), -np.inf)))
    two = np.int32([2])
    assert ctc_decoding.greedy(logits[None], two) == [""]
    result = ctc_decoding.beam_search(logits[None], two, width=2)
    assert result.transcript == ["a"] and result.log_probability[0] == pytest.approx(math.log(0.64))
    assert ctc_decoding.beam_search(logits[None], two, "phones", width=2).transcript == [grid_text.decode_phones([2])]


def test_a_narrow_beam_never_overestimates_the_probability():
    rng = np.random.default_rng(5)
    logits = np.stack([full_logits(3 * x) for x in rng.normal(size=(8, 6, 4))])
    frames = np.full(8, 6)
    exact = ctc_decoding.beam_search(logits, frames, width=10_000).log_probability
    for width in (1, 2, 3, 8):
        narrow = ctc_decoding.beam_search(logits, frames, width=width)
        for b in range(8):
            total = [
                p
                for path, p in alignments(log_softmax(logits[b, :, :4]))
                if grid_text.decode(collapse(path)) == narrow.transcript[b]
            ]
            assert narrow.log_probability[b] <= np.logaddexp.reduce(total) + 1e-9 <= exact[b] + 2e-9


def test_a_beam_of_width_0_is_refused_and_impossible_labels_give_an_empty_text():
    with pytest.raises(ValueError, match="width: found 0"):
        ctc_decoding.beam_search(np.zeros((1, 2, 42)), np.int32([2]), width=0)
    unused = np.full((1, 2, 42), -np.inf)
    unused[..., 41] = 0
    result = ctc_decoding.beam_search(unused, np.int32([2]))
    assert result.transcript == [""] and result.log_probability[0] == -np.inf


# ---- a grammar against every alignment -----------------------------------------------------------------------------------------

GRAMMARS = {
    "distinct": [[(1,), (2, 3)], [(2,), (3, 1)]],
    "repeats inside words": [[(1, 1), (2,)], [(3, 3), (3,)]],
    "repeats across the boundary": [[(1,), (2, 1)], [(1,), (1, 1), (2, 3)]],
    "three slots of one label": [[(1,)], [(1,)], [(1,), (2,)]],
    "one slot": [[(1,), (1, 2), (1, 2, 1)]],
    "a separator": [[(1,), (2,)], [(3,)], [(1,), (2, 2)]],
    "words that overlap": [[(1,), (1, 2)], [(2, 3), (3,)]],  # 1|23 and 12|3 are one text
}


def spans_of(path, words):
    """Frames [start, end) of each word (a sequence of labels) in a path that contains all of them."""
    runs, t = [], 0
    for label, run in itertools.groupby(path):
        runs.append((label, t, t := t + len(list(run))))
    symbols = iter([run for run in runs if run[0] != 0])
    spans = [[next(symbols) for _ in word] for word in words]
    return [[span[0][1], span[-1][2]] for span in spans]


@pytest.mark.parametrize("name", GRAMMARS)
def test_the_best_path_is_the_best_of_every_alignment(name):
    """All 4 ** frames paths, for clips of 0 to 6 frames in one batch whose padding is not 0."""
    slots = GRAMMARS[name]
    sentences = list(itertools.product(*(range(len(words)) for words in slots)))
    frames = np.int32([*range(7), 6, 6, 6])
    logits = 2 * np.random.default_rng(len(name)).normal(size=(len(frames), 6, 4))
    result = ctc_decoding.best_path(logits, frames, ctc_decoding.make_graph(slots))
    impossible = 0
    for b, n in enumerate(frames):
        readings = {}  # labels -> the (choice of words, words) that spell them
        for chosen in sentences:
            words = [slots[k][w] for k, w in enumerate(chosen)]
            readings.setdefault(tuple(itertools.chain(*words)), []).append((chosen, words))
        fitting = [(p, path) for path, p in alignments(log_softmax(logits[b, :n])) if collapse(path) in readings]
        if not fitting:
            impossible += 1
            assert result.log_probability[b] == -np.inf and (result.word[b] == -1).all() and not result.span[b].any()
            continue
        best, path = max(fitting)
        assert result.log_probability[b] == pytest.approx(best, abs=1e-9)
        spans = {chosen: spans_of(path, words) for chosen, words in readings[collapse(path)]}
        assert result.span[b].tolist() == spans[tuple(result.word[b])]
    fewest = min(len(s) + sum(a == b for a, b in itertools.pairwise(s)) for s in readings)
    assert impossible == fewest  # frames 0 to fewest - 1


def test_sentences_with_a_label_of_probability_zero_are_impossible():
    graph = ctc_decoding.make_graph([[(1,), (2,)], [(3,)]])
    logits = np.zeros((2, 4, 4))
    logits[0, :, 3] = -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = ctc_decoding.best_path(logits, np.int32([4, 4]), graph)
    assert result.word.tolist()[0] == [-1, -1] and result.log_probability[0] == -np.inf
    assert result.word[1, 1] == 0 and result.log_probability[1] == pytest.approx(4 * math.log(1 / 4))


@pytest.mark.parametrize("slots", [[], [[]], [[(1,)], [()]], [[(1, 0)]]])
def test_grammars_without_words_are_refused(slots):
    with pytest.raises(ValueError, match="grammar"):
        ctc_decoding.make_graph(slots)


# ---- Grid's grammar against its 64,000 sentences -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ENCODE)
def every_sentence(request):
    """units, and the labels (64000, S) of every sentence, zero-padded."""
    encoded = [ENCODE[request.param](" ".join(words)) for words in SENTENCES]
    labels = np.zeros((len(encoded), max(map(len, encoded))), np.int64)
    for row, x in zip(labels, encoded):
        row[: len(x)] = x
    return request.param, labels


def best_alignments(log_p, labels):
    """(sentences,): log probability of the best alignment of each row of labels: Graves et al. 2006, section 4.1, max for sum."""
    extended = np.zeros((2 * labels.shape[1] + 1, len(labels)), np.int64)  # blank, label, blank, ... blank
    extended[1::2] = labels.T
    skips = np.zeros(extended.shape, bool)
    skips[3::2] = extended[3::2] != extended[1:-2:2]
    score = np.full(extended.shape, -np.inf)
    score[:2] = log_p[0][extended[:2]]
    for frame in log_p[1:]:
        best = score.copy()
        np.maximum(best[1:], score[:-1], out=best[1:])
        np.maximum(best[2:], score[:-2], out=best[2:], where=skips[2:])
        score = best + frame[extended]
    last, rows = 2 * (labels > 0).sum(1), np.arange(len(labels))
    return np.maximum(score[last, rows], score[last - 1, rows])


def test_the_best_sentence_is_the_best_of_all(every_sentence):
    units, labels = every_sentence
    frames = np.int32([labels.shape[1] + 2, 24, 17, 10])  # enough frames for all, some, and few or no sentences
    logits = 2 * np.random.default_rng(7).normal(size=(len(frames), frames.max(), grid_text.NUM_LABELS)).astype(np.float32)
    result = ctc_decoding.best_sentences(logits, frames, units)
    for b, n in enumerate(frames):
        of_each = best_alignments(log_softmax(logits[b, :n]), labels)
        assert result.log_probability[b] == pytest.approx(of_each.max(), abs=1e-9)
        assert result.words[b] == (SENTENCES[of_each.argmax()] if of_each.max() > -np.inf else ())
    possible = [bool(words) for words in result.words]
    assert possible == ([True, True, False, False] if units == "characters" else [True, True, True, False])


def test_sentences_and_their_words_are_found_in_noisy_logits(every_sentence):
    """50 sentences with a blank between labels and silence around them, and the frames of each of their words."""
    units, labels = every_sentence
    rng = np.random.default_rng(8)
    chosen = rng.choice(len(SENTENCES), 50, replace=False)
    frames = 4 + 2 * labels.shape[1] + rng.integers(0, 5, 50).astype(np.int32)
    path = np.zeros((50, frames.max()), np.int64)
    path[:, 3 : 3 + 2 * labels.shape[1] : 2] = labels[chosen]
    logits = 12 * np.eye(grid_text.NUM_LABELS)[path] + rng.normal(size=(*path.shape, grid_text.NUM_LABELS))
    result = ctc_decoding.best_sentences(logits, frames, units)
    assert result.words == [SENTENCES[i] for i in chosen]
    space = 1 if units == "characters" else 0
    for words, span in zip(result.words, result.span):
        lengths = np.array([len(ENCODE[units](word)) for word in words])
        start = 3 + 2 * np.cumsum([0, *(lengths[:-1] + space)])
        np.testing.assert_array_equal(span, np.stack([start, start + 2 * lengths - 1], -1))


def test_all_sentences_of_grid_have_different_labels(every_sentence):
    """So phones without marks between words still identify the words."""
    assert len(np.unique(every_sentence[1], axis=0)) == len(SENTENCES) == 64_000


# ---- error rates ---------------------------------------------------------------------------------------------------------------

REFERENCE = "bin blue at f two now"


def test_error_rates_by_hand():
    pairs = [(REFERENCE, REFERENCE), ("bin blue at s two no", REFERENCE), ("", REFERENCE), ("bin blue", ""), ("a bin", "bin")]
    words = ctc_decoding.word_error_rate(pairs)
    assert words.errors.tolist() == [0, 2, 6, 0, 1] and words.count.tolist() == [6, 6, 6, 0, 1]
    assert words.rate == 9 / 19
    np.testing.assert_array_equal(words.rates, [0, 2 / 6, 1, np.nan, 1])
    characters = ctc_decoding.character_error_rate(iter(pairs))
    assert characters.errors.tolist() == [0, 2, 21, 0, 2] and characters.count.tolist() == [21, 21, 21, 0, 3]


def test_phone_error_rate_by_hand():
    text = "B IH N B L UW"
    reference = " ".join(grid_text.phones_of("bin green"))  # B IH N G R IY N: three substitutions, one deletion
    phones = ctc_decoding.phone_error_rate([(text, reference), (reference, reference)])
    assert phones.errors.tolist() == [4, 0] and phones.count.tolist() == [7, 7]
    with pytest.raises(ValueError, match="'bin'"):
        ctc_decoding.phone_error_rate([("B IH N", "bin")])


def test_without_references_the_rate_is_nan():
    for measure in (ctc_decoding.character_error_rate, ctc_decoding.word_error_rate, ctc_decoding.phone_error_rate):
        for pairs in ([], [("B", "")]):
            empty = measure(pairs)
            assert math.isnan(empty.rate) and empty.rates.shape == (len(pairs),) and np.isnan(empty.rates).all()


def test_the_rates_are_jiwers():
    import jiwer

    texts, references = zip(("bin blew at f too now", REFERENCE), ("set", "set red"), ("place green", "place green"))
    pairs = list(zip(texts, references))
    assert ctc_decoding.word_error_rate(pairs).rate == pytest.approx(jiwer.wer(list(references), list(texts)))
    assert ctc_decoding.character_error_rate(pairs).rate == pytest.approx(jiwer.cer(list(references), list(texts)))
