"""Loss functions against NumPy, scipy and sums over every alignment."""

import itertools

import jax
import numpy as np
import pytest
import scipy.ndimage

from avsi_jax.models import losses

LABELS = 4  # the blank and three others
ctc = jax.jit(losses.ctc)
ctc_gradient = jax.jit(jax.value_and_grad(lambda logits, *rest: losses.ctc(logits, *rest)[0]))


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
    """The cases as one padded batch; the padding is not 0, so that a use of it would change the result."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(len(CASES), 7, LABELS)).astype(np.float32)
    labels = rng.integers(1, LABELS, (len(CASES), 6)).astype(np.int32)
    for row, (_, text) in enumerate(CASES):
        labels[row, : len(text)] = text
    frames = np.int32([t for t, _ in CASES])
    lengths = np.int32([len(text) for _, text in CASES])
    return logits, frames, labels, lengths


def test_ctc_sums_over_every_alignment(sentences):
    logits, frames, labels, lengths = sentences
    for row, (t, text) in enumerate(CASES):
        weight = np.zeros(len(CASES), np.float32)
        weight[row] = 1
        total, count = ctc(logits, frames, labels, lengths, weight)
        assert float(total) == pytest.approx(brute_force(np.float64(logits[row, :t]), text), rel=1e-5), (t, text)
        assert float(count) == 1


def test_ctc_is_a_weighted_sum(sentences):
    logits, frames, labels, lengths = sentences
    each = np.float64([brute_force(np.float64(logits[row, :t]), text) for row, (t, text) in enumerate(CASES)])
    weight = np.float32([1, 0, 0.5, 1, 0, 1])
    total, count = ctc(logits, frames, labels, lengths, weight)
    assert float(total) == pytest.approx(each @ weight, rel=1e-5) and float(count) == 3.5


def test_padding_changes_nothing_and_has_no_gradient(sentences):
    logits, frames, labels, lengths = sentences
    weight = np.ones(len(CASES), np.float32)
    total, gradient = ctc_gradient(logits, frames, labels, lengths, weight)
    padding = np.arange(7) >= frames[:, None]
    other_logits = np.where(padding[..., None], 9, logits).astype(np.float32)
    other_labels = np.where(np.arange(6) >= lengths[:, None], 0, labels)
    other_total, other_gradient = ctc_gradient(other_logits, frames, other_labels, lengths, weight)
    assert float(other_total) == float(total)
    np.testing.assert_array_equal(gradient, other_gradient)
    assert not np.asarray(gradient)[padding].any() and np.asarray(gradient)[~padding].any()


def test_clips_without_text_or_weight_do_not_count(sentences):
    logits, frames, labels, lengths = sentences
    lengths = np.where(np.arange(len(CASES)) < 2, lengths, 0).astype(np.int32)
    weight = np.float32([1, 0, 1, 1, 0, 1])
    total, count = ctc(logits, frames, labels, lengths, weight)
    assert float(count) == 1 and float(total) == pytest.approx(brute_force(np.float64(logits[0, :5]), CASES[0][1]), rel=1e-5)
    gradient = np.asarray(ctc_gradient(logits, frames, labels, lengths, weight)[1])
    assert np.isfinite(gradient).all() and gradient[0].any() and not gradient[1:].any()
    total, count = ctc(logits, frames, labels, np.zeros_like(lengths), weight)
    assert float(total) == 0 and float(count) == 0


def fewest_frames(labels):
    """Length of the shortest path that collapses to `labels`, by trying all paths."""
    return next(t for t in itertools.count() if any(collapse(p) == labels for p in itertools.product(range(LABELS), repeat=t)))


def test_a_text_is_infeasible_if_no_path_collapses_to_it():
    texts = [(), (1,), (2, 2), (1, 2), (1, 2, 1), (3, 3, 1), (1, 3, 3), (2, 2, 2)]
    labels = np.full(
        (len(texts), 5), 2, np.int32
    )  # padding equals the last label of some texts, and must not be counted as a repeat
    for row, x in zip(labels, texts):
        row[: len(x)] = x
    lengths = np.int32([len(x) for x in texts])
    needed = np.int32([fewest_frames(x) for x in texts])
    assert needed.tolist() == [0, 1, 3, 2, 3, 4, 4, 5]
    assert not losses.infeasible(needed, labels, lengths).any()
    assert losses.infeasible(needed - 1, labels, lengths).all()
    assert not losses.infeasible(np.int32([7]), labels[:1, :1], np.int32([1])).any()  # one label has no neighbour


def test_an_infeasible_text_does_not_affect_the_others(sentences):
    logits, frames, labels, lengths = sentences
    each = np.float64([brute_force(np.float64(logits[row, :t]), text) for row, (t, text) in enumerate(CASES)])
    frames = frames.copy()
    frames[1], frames[3], frames[4] = 2, 0, 0  # "2 2" needs three frames, any text at least one
    weight = np.ones(len(CASES), np.float32)
    total, gradient = ctc_gradient(logits, frames, labels, lengths, weight)
    assert float(total) == pytest.approx(each[[0, 2, 5]].sum(), rel=1e-5)
    assert float(ctc(logits, frames, labels, lengths, weight)[1]) == 3
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all() and gradient[[0, 2, 5]].any((1, 2)).all() and not gradient[[1, 3, 4]].any()
    total, count = ctc(logits, np.ones_like(frames), labels, np.full_like(lengths, 3), weight)
    assert float(total) == 0 and float(count) == 0


# ---- in and near the gap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [0, 1, 4, 30])
def test_near_is_scipys_dilation(frames):
    rng = np.random.default_rng(3)
    mask = rng.random((6, 25)) < 0.1
    valid = np.arange(25) < np.array([25, 25, 20, 8, 1, 0])[:, None]
    mask[0] = False
    mask[:, 22] = True  # beyond the end of most clips, where the mask has no effect
    expected = scipy.ndimage.binary_dilation(mask & valid, np.ones((1, 2 * frames + 1))) & valid
    np.testing.assert_array_equal(jax.jit(losses.near, static_argnums=1)(mask, frames, valid), expected)


def test_a_negative_width_is_refused():
    with pytest.raises(ValueError, match="found -1 frames"):
        losses.near(np.zeros((1, 3), bool), -1, np.ones((1, 3), bool))
