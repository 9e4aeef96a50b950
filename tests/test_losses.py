"""Losses against NumPy and a sum over every alignment; greedy decoding by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avsi_jax import decode, losses, text

LABELS = 4  # blank and three more
ctc = jax.jit(losses.ctc)
ctc_slope = jax.jit(jax.value_and_grad(lambda logits, *rest: losses.ctc(logits, *rest)[0]))


@pytest.mark.parametrize(("kind", "power"), [("mse", 2), ("l1", 1)])
def test_spectrogram_error_is_numpys(kind, power):
    rng = np.random.default_rng(0)
    level, target = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    weight = np.float32([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0.5, 0.5, 0, 1, 0]])
    total, count = losses.spectrogram_error(level, target, weight, kind)
    expected = sum(weight[b, f] * abs(float(level[b, f, k]) - float(target[b, f, k])) ** power for b, f, k in np.ndindex(3, 5, 4))
    assert float(total) == pytest.approx(expected, rel=1e-5) and float(count) == pytest.approx(5 * 4)


def test_frames_without_weight_have_no_gradient():
    rng = np.random.default_rng(1)
    level, target = rng.normal(size=(2, 2, 5, 4)).astype(np.float32)
    weight = np.float32([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0]])
    gradient = jax.grad(lambda level: losses.spectrogram_error(level, target, weight)[0])(level)
    np.testing.assert_allclose(gradient, 2 * (level - target) * weight[..., None], rtol=1e-5)


def test_an_unknown_error_is_refused():
    with pytest.raises(ValueError, match="'huber'.*'mse' or 'l1'"):
        losses.spectrogram_error(np.zeros((1, 1, 1)), np.zeros((1, 1, 1)), np.ones((1, 1)), "huber")


# ---- connectionist temporal classification -------------------------------------------------------------------------------------


def collapse(path):
    """Graves et al. 2006, section 3.1: merge repeats, then drop blanks."""
    return tuple(label for label, _ in itertools.groupby(path) if label != 0)


def brute_force(logits, labels):
    """-ln of the summed probability of every path (T,) of labels that collapses to `labels`."""
    probability = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    paths = (p for p in itertools.product(range(logits.shape[1]), repeat=len(logits)) if collapse(p) == tuple(labels))
    return -np.log(sum(np.prod([probability[t, label] for t, label in enumerate(path)]) for path in paths))


CASES = [(5, (1, 2, 3)), (4, (2, 2)), (3, (1,)), (5, (3, 3, 1)), (1, (2,)), (4, (1, 2, 1, 3))]


@pytest.fixture(scope="module")
def sentences():
    """The cases as one padded batch; what lies in the padding is not 0, so that a look at it would show."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(len(CASES), 7, LABELS)).astype(np.float32)
    labels = rng.integers(1, LABELS, (len(CASES), 6)).astype(np.int32)
    for row, (_, said) in enumerate(CASES):
        labels[row, : len(said)] = said
    frames = np.int32([t for t, _ in CASES])
    lengths = np.int32([len(said) for _, said in CASES])
    return logits, frames, labels, lengths


def test_ctc_sums_over_every_alignment(sentences):
    logits, frames, labels, lengths = sentences
    for row, (t, said) in enumerate(CASES):
        weight = np.zeros(len(CASES), np.float32)
        weight[row] = 1
        total, count = ctc(logits, frames, labels, lengths, weight)
        assert float(total) == pytest.approx(brute_force(np.float64(logits[row, :t]), said), rel=1e-5), (t, said)
        assert float(count) == 1


def test_ctc_is_a_weighted_sum(sentences):
    logits, frames, labels, lengths = sentences
    each = np.float64([brute_force(np.float64(logits[row, :t]), said) for row, (t, said) in enumerate(CASES)])
    weight = np.float32([1, 0, 0.5, 1, 0, 1])
    total, count = ctc(logits, frames, labels, lengths, weight)
    assert float(total) == pytest.approx(each @ weight, rel=1e-5) and float(count) == 3.5


def test_padding_changes_nothing_and_has_no_gradient(sentences):
    logits, frames, labels, lengths = sentences
    weight = np.ones(len(CASES), np.float32)
    total, slope = ctc_slope(logits, frames, labels, lengths, weight)
    padding = np.arange(7) >= frames[:, None]
    other_logits = np.where(padding[..., None], 9, logits).astype(np.float32)
    other_labels = np.where(np.arange(6) >= lengths[:, None], 0, labels)
    other_total, other_slope = ctc_slope(other_logits, frames, other_labels, lengths, weight)
    assert float(other_total) == float(total)
    np.testing.assert_array_equal(slope, other_slope)
    assert not np.asarray(slope)[padding].any() and np.asarray(slope)[~padding].any()


def test_clips_without_text_and_filling_do_not_count(sentences):
    logits, frames, labels, lengths = sentences
    lengths = np.where(np.arange(len(CASES)) < 2, lengths, 0).astype(np.int32)
    weight = np.float32([1, 0, 1, 1, 0, 1])
    total, count = ctc(logits, frames, labels, lengths, weight)
    assert float(count) == 1 and float(total) == pytest.approx(brute_force(np.float64(logits[0, :5]), CASES[0][1]), rel=1e-5)
    slope = np.asarray(ctc_slope(logits, frames, labels, lengths, weight)[1])
    assert np.isfinite(slope).all() and slope[0].any() and not slope[1:].any()
    total, count = ctc(logits, frames, labels, np.zeros_like(lengths), weight)
    assert float(total) == 0 and float(count) == 0


def test_a_text_too_long_for_its_frames_stays_finite(sentences):
    logits, frames, labels, lengths = sentences
    total, slope = ctc_slope(logits, np.full_like(frames, 2), labels, np.full_like(lengths, 3), np.ones(len(CASES), np.float32))
    assert total > 1e3 and np.isfinite(total) and np.isfinite(slope).all()


# ---- greedy decoding -----------------------------------------------------------------------------------------------------------


def logits_of(rows, frames, size=text.NUM_LABELS):
    """One-hot logits (B, frames, size) whose best labels are `rows`; the rest are blanks."""
    best = np.zeros((len(rows), frames), int)
    for row, labels in zip(best, rows):
        row[: len(labels)] = labels
    return np.eye(size, dtype=np.float32)[best]


def test_greedy_by_hand():
    a, b, i, n = (int(text.encode(c)[0]) for c in "abin")
    rows = [
        [b, b, 0, i, n, n],  # repeats merge: bin
        [0, a, a, 0, a, b],  # a blank between keeps both: aab
        [n, 1, 1, n, 0, 0],  # a space is a character: "n n"
        [0, 0, 0, 0, 0, 0],
        [a, a, a, a, a, a],
    ]
    full = np.full(len(rows), 6)
    assert decode.greedy(logits_of(rows, 6), full) == ["bin", "aab", "n n", "", "a"]
    assert decode.greedy(logits_of(rows, 6), np.int32([2, 5, 3, 6, 0])) == ["b", "aa", "n ", "", ""]


def test_greedy_never_says_an_unused_label():
    """Outputs 28 to 41 of the paper's head name no character: the best of the others is said."""
    logits = logits_of([[2, 3, 4]], 3)
    logits[0, 1, 35] = 5
    assert decode.greedy(logits, np.int32([3])) == ["abc"]
    assert decode.greedy(jnp.asarray(logits), jnp.int32([3])) == ["abc"]  # arrays of the device do as well
