"""Decoders against sums and maxima over every alignment, and the Grid grammar against all its 64,000 sentences, one by one."""

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
    """(path, log probability) of every path (frames,) through (frames, labels)."""
    for path in itertools.product(range(log_p.shape[1]), repeat=len(log_p)):
        yield path, sum(log_p[t, label] for t, label in enumerate(path))


# ---- greedy --------------------------------------------------------------------------------------------------------------------


def logits_of(rows, frames, size=grid_text.NUM_LABELS):
    """One-hot logits (B, frames, size) whose best labels are `rows`; the rest are blanks."""
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


def test_greedy_never_says_an_unused_label():
    """Outputs 28 to 41 of the paper's head name no character, 33 to 41 no phone: the best of the others is said."""
    logits = logits_of([[2, 3, 4]], 3)
    logits[0, 1, 35] = 5
    assert ctc_decoding.greedy(logits, np.int32([3])) == ["abc"]
    assert ctc_decoding.greedy(jnp.asarray(logits), jnp.int32([3])) == ["abc"]  # arrays of the device do as well
    logits[0, 2, 32] = 6
    assert ctc_decoding.greedy(logits, np.int32([3]), "phones") == ["AE AH Z"] and ctc_decoding.greedy(logits, np.int32([3])) == [
        "abc"
    ]


def test_greedy_says_phones():
    labels = grid_text.encode_phones("bin blue")
    rows = [[*labels], [labels[0], labels[0], 0, labels[0]]]
    assert ctc_decoding.greedy(logits_of(rows, 8, grid_text.NUM_PHONES), np.int32([8, 8]), "phones") == ["B IH N B L UW", "B B"]


@pytest.mark.parametrize("decoder", [ctc_decoding.greedy, ctc_decoding.beam_search, ctc_decoding.best_sentences])
def test_ill_formed_input_is_refused(decoder):
    logits = np.zeros((2, 5, 42), np.float32)
    for given, frames, units, complaint in [
        (logits, np.int32([5, 5]), "words", "'words', expected one of characters, phones"),
        (logits, np.int32([5, 6]), "phones", "5 to 6 true frames, expected 0 to 5"),
        (logits, np.int32([5]), "phones", r"\(2, 5, 42\) of \(1,\) clips"),
        (logits[0], np.int32([5]), "phones", r"\(5, 42\)"),
        (logits[..., :27], np.int32([5, 5]), "characters", "28 or more"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            decoder(given, frames, units)


@pytest.mark.parametrize("decoder", [ctc_decoding.beam_search, ctc_decoding.best_sentences])
def test_a_network_that_broke_is_told_and_padding_is_not_looked_at(decoder):
    logits = np.random.default_rng(0).normal(size=(2, 30, 42)).astype(np.float32)
    expected = decoder(logits, np.int32([30, 22]))
    logits[1, 22:] = np.nan
    for found, wanted in zip(decoder(logits, np.int32([30, 22])), expected):
        np.testing.assert_array_equal(found, wanted)
    for bad in (np.nan, np.inf):
        logits[0, 3, 40] = bad
        with pytest.raises(ValueError, match="1 of 2 clips give no probabilities"):
            decoder(logits, np.int32([30, 22]))


# ---- prefix beam search --------------------------------------------------------------------------------------------------------


def head_of(few, units_size=grid_text.NUM_LABELS):
    """Logits (frames, labels) of the first labels; all others impossible."""
    return np.pad(few, ((0, 0), (0, units_size - few.shape[1])), constant_values=-np.inf)


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_is_the_sum_over_every_alignment(seed):
    """Three symbols, lengths 0 to 6; the unused label 41 takes its share of each frame and says nothing."""
    rng = np.random.default_rng(seed)
    few = 2 * rng.normal(size=(7, 6, 4))
    logits = np.stack([head_of(x) for x in few])
    logits[..., 41] = rng.normal(size=(7, 6))
    frames = np.arange(7)
    found = ctc_decoding.beam_search(logits, frames, width=10_000)
    for b, n in enumerate(frames):
        said = {}
        for path, p in alignments(log_softmax(logits[b, :n, [0, 1, 2, 3, 41]].T)):
            if 4 not in path:
                said[collapse(path)] = np.logaddexp(said.get(collapse(path), -np.inf), p)
        best = max(said, key=said.get)
        assert found.transcript[b] == grid_text.decode(best)
        assert found.log_probability[b] == pytest.approx(said[best], abs=1e-9)


def test_the_beam_adds_up_what_greedy_does_not():
    """By hand, two frames of 0.6 blank and 0.4 "a": "" has 0.36, "a" has 0.64; and AA names the same label among phones."""
    logits = head_of(np.log([[0.6, 0, 0.4], [0.6, 0, 0.4]], where=np.array([True, False, True]), out=np.full((2, 3), -np.inf)))
    two = np.int32([2])
    assert ctc_decoding.greedy(logits[None], two) == [""]
    found = ctc_decoding.beam_search(logits[None], two, width=2)
    assert found.transcript == ["a"] and found.log_probability[0] == pytest.approx(math.log(0.64))
    assert ctc_decoding.beam_search(logits[None], two, "phones", width=2).transcript == [grid_text.decode_phones([2])]


def test_a_narrow_beam_keeps_no_prefix_twice_and_is_never_too_sure():
    rng = np.random.default_rng(5)
    logits = np.stack([head_of(3 * x) for x in rng.normal(size=(8, 6, 4))])
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


def test_a_beam_needs_a_width_and_says_nothing_where_nothing_can_be_said():
    with pytest.raises(ValueError, match="0, expected 1 prefix"):
        ctc_decoding.beam_search(np.zeros((1, 2, 42)), np.int32([2]), width=0)
    unused = np.full((1, 2, 42), -np.inf)
    unused[..., 41] = 0
    found = ctc_decoding.beam_search(unused, np.int32([2]))
    assert found.transcript == [""] and found.log_probability[0] == -np.inf


# ---- a grammar, against every alignment ----------------------------------------------------------------------------------------

GRAMMARS = {
    "distinct": [[(1,), (2, 3)], [(2,), (3, 1)]],
    "repeats inside words": [[(1, 1), (2,)], [(3, 3), (3,)]],
    "repeats across the boundary": [[(1,), (2, 1)], [(1,), (1, 1), (2, 3)]],
    "three slots of one label": [[(1,)], [(1,)], [(1,), (2,)]],
    "one slot": [[(1,), (1, 2), (1, 2, 1)]],
    "a separator": [[(1,), (2,)], [(3,)], [(1,), (2, 2)]],
    "words that run into each other": [[(1,), (1, 2)], [(2, 3), (3,)]],  # 1|23 and 12|3 are one text
}


def places(path, words):
    """Frames [start, end) of each word (a sequence of labels) in a path that says all of them."""
    runs, t = [], 0
    for label, run in itertools.groupby(path):
        runs.append((label, t, t := t + len(list(run))))
    said = iter([run for run in runs if run[0] != 0])
    spans = [[next(said) for _ in word] for word in words]
    return [[span[0][1], span[-1][2]] for span in spans]


@pytest.mark.parametrize("name", GRAMMARS)
def test_the_best_path_is_the_best_of_every_alignment(name):
    """All 4 ** frames paths, whatever they say, for clips of 0 to 6 frames in one batch whose padding is not 0."""
    slots = GRAMMARS[name]
    sentences = list(itertools.product(*(range(len(words)) for words in slots)))
    frames = np.int32([*range(7), 6, 6, 6])
    logits = 2 * np.random.default_rng(len(name)).normal(size=(len(frames), 6, 4))
    found = ctc_decoding.best_path(logits, frames, ctc_decoding.make_graph(slots))
    impossible = 0
    for b, n in enumerate(frames):
        said = {}
        for chosen in sentences:
            words = [slots[k][w] for k, w in enumerate(chosen)]
            said.setdefault(tuple(itertools.chain(*words)), []).append((chosen, words))
        fitting = [(p, path) for path, p in alignments(log_softmax(logits[b, :n])) if collapse(path) in said]
        if not fitting:
            impossible += 1
            assert found.log_probability[b] == -np.inf and (found.word[b] == -1).all() and not found.span[b].any()
            continue
        best, path = max(fitting)
        assert found.log_probability[b] == pytest.approx(best, abs=1e-9)
        ways = {chosen: places(path, words) for chosen, words in said[collapse(path)]}
        assert found.span[b].tolist() == ways[tuple(found.word[b])]
    fewest = min(len(s) + sum(a == b for a, b in itertools.pairwise(s)) for s in said)
    assert impossible == fewest  # frames 0 to fewest - 1


def test_a_label_with_probability_zero_is_as_impossible_as_a_missing_frame():
    graph = ctc_decoding.make_graph([[(1,), (2,)], [(3,)]])
    logits = np.zeros((2, 4, 4))
    logits[0, :, 3] = -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ctc_decoding.best_path(logits, np.int32([4, 4]), graph)
    assert found.word.tolist()[0] == [-1, -1] and found.log_probability[0] == -np.inf
    assert found.word[1, 1] == 0 and found.log_probability[1] == pytest.approx(4 * math.log(1 / 4))


@pytest.mark.parametrize("slots", [[], [[]], [[(1,)], [()]], [[(1, 0)]]])
def test_grammars_without_words_are_refused(slots):
    with pytest.raises(ValueError, match="the grammar has"):
        ctc_decoding.make_graph(slots)


# ---- Grid's grammar, against its 64,000 sentences ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ENCODE)
def every_sentence(request):
    """units, and the labels (64000, S) of every sentence, zero-padded."""
    said = [ENCODE[request.param](" ".join(words)) for words in SENTENCES]
    labels = np.zeros((len(said), max(map(len, said))), np.int64)
    for row, x in zip(labels, said):
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
    frames = np.int32([labels.shape[1] + 2, 24, 17, 10])  # room for all, for some, for few or none
    logits = 2 * np.random.default_rng(7).normal(size=(len(frames), frames.max(), grid_text.NUM_LABELS)).astype(np.float32)
    found = ctc_decoding.best_sentences(logits, frames, units)
    for b, n in enumerate(frames):
        of_each = best_alignments(log_softmax(logits[b, :n]), labels)
        assert found.log_probability[b] == pytest.approx(of_each.max(), abs=1e-9)
        assert found.words[b] == (SENTENCES[of_each.argmax()] if of_each.max() > -np.inf else ())
    possible = [bool(words) for words in found.words]
    assert possible == ([True, True, False, False] if units == "characters" else [True, True, True, False])


def test_every_sentence_is_found_in_its_own_labels(every_sentence):
    """Each of 50 said with a blank between labels, under noise, after and before silence; and each word where it was said."""
    units, labels = every_sentence
    rng = np.random.default_rng(8)
    chosen = rng.choice(len(SENTENCES), 50, replace=False)
    frames = 4 + 2 * labels.shape[1] + rng.integers(0, 5, 50).astype(np.int32)
    path = np.zeros((50, frames.max()), np.int64)
    path[:, 3 : 3 + 2 * labels.shape[1] : 2] = labels[chosen]
    logits = 12 * np.eye(grid_text.NUM_LABELS)[path] + rng.normal(size=(*path.shape, grid_text.NUM_LABELS))
    found = ctc_decoding.best_sentences(logits, frames, units)
    assert found.words == [SENTENCES[i] for i in chosen]
    mark = 1 if units == "characters" else 0
    for words, span in zip(found.words, found.span):
        lengths = np.array([len(ENCODE[units](word)) for word in words])
        start = 3 + 2 * np.cumsum([0, *(lengths[:-1] + mark)])
        np.testing.assert_array_equal(span, np.stack([start, start + 2 * lengths - 1], -1))


def test_no_two_sentences_of_grid_audio_alike(every_sentence):
    """So that phones without marks between words still tell the words."""
    assert len(np.unique(every_sentence[1], axis=0)) == len(SENTENCES) == 64_000


# ---- error rates ---------------------------------------------------------------------------------------------------------------

TRUE = "bin blue at f two now"


def test_error_rates_by_hand():
    pairs = [(TRUE, TRUE), ("bin blue at s two no", TRUE), ("", TRUE), ("bin blue", ""), ("a bin", "bin")]
    words = ctc_decoding.word_error_rate(pairs)
    assert words.errors.tolist() == [0, 2, 6, 0, 1] and words.count.tolist() == [6, 6, 6, 0, 1]
    assert words.rate == 9 / 19
    np.testing.assert_array_equal(words.rates, [0, 2 / 6, 1, np.nan, 1])
    characters = ctc_decoding.character_error_rate(iter(pairs))
    assert characters.errors.tolist() == [0, 2, 21, 0, 2] and characters.count.tolist() == [21, 21, 21, 0, 3]


def test_phone_error_rate_by_hand():
    said, true = "B IH N B L UW", " ".join(grid_text.phones_of("bin green"))  # B IH N G R IY N: three wrong, one missing
    phones = ctc_decoding.phone_error_rate([(said, true), (true, true)])
    assert phones.errors.tolist() == [4, 0] and phones.count.tolist() == [7, 7]
    with pytest.raises(ValueError, match="'bin' is no phone"):
        ctc_decoding.phone_error_rate([("B IH N", "bin")])


def test_nothing_to_say_has_no_rate():
    for measure in (ctc_decoding.character_error_rate, ctc_decoding.word_error_rate, ctc_decoding.phone_error_rate):
        for pairs in ([], [("B", "")]):
            nothing = measure(pairs)
            assert math.isnan(nothing.rate) and nothing.rates.shape == (len(pairs),) and np.isnan(nothing.rates).all()


def test_the_rates_are_jiwers():
    import jiwer

    said, true = zip(("bin blew at f too now", TRUE), ("set", "set red"), ("place green", "place green"))
    pairs = list(zip(said, true))
    assert ctc_decoding.word_error_rate(pairs).rate == pytest.approx(jiwer.wer(list(true), list(said)))
    assert ctc_decoding.character_error_rate(pairs).rate == pytest.approx(jiwer.cer(list(true), list(said)))
