"""Both ways to scan the LSTM against flax's own layers on the same parameters and a NumPy loop; values and every gradient."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avsi_jax import lstm

WAYS = ("separate", "joined")
B, T, INPUTS, H = 3, 7, 5, 4
LENGTHS = np.int32([7, 4, 1])
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}  # of the largest entry


class Flax(nn.Module):
    """The oracle: flax's RNN over flax's LSTMCell in both directions, outputs at padding set to 0 as ours are."""

    @nn.compact
    def __call__(self, x, lengths):
        cell = lambda name: nn.LSTMCell(H, param_dtype=x.dtype, name=name)
        forward = nn.RNN(cell("forward"))(x, seq_lengths=lengths)
        backward = nn.RNN(cell("backward"), reverse=True, keep_order=True)(x, seq_lengths=lengths)
        out = jnp.concatenate([forward, backward], -1)
        return jnp.where((jnp.arange(x.shape[1])[None] < lengths[:, None])[..., None], out, 0)


def values(dtype):
    """Parameters of our tree with biases that are not 0 or 1, inputs and the weights of a scalar loss."""
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(lambda: lstm.BidirectionalLSTM(H, "separate").init(jax.random.key(0), jnp.zeros((B, T, INPUTS))))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(dtype), tree["params"])
    x, weight = rng.normal(size=(B, T, INPUTS)).astype(dtype), rng.normal(size=(B, T, 2 * H)).astype(dtype)
    return params, x, weight


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, x, weight, lengths):
    """Outputs (B, T, 2H), and gradients of their weighted sum by parameters and inputs."""

    def loss(params, x):
        out = model.apply({"params": params}, x, lengths)
        return (out * weight).sum(), out

    (_, out), slopes = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return out, *slopes


def output_and_gradients(model, params, x, weight, lengths):
    """`run` in NumPy, in the type of x, every product in its full precision."""
    with jax.enable_x64(x.dtype == np.float64), jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, run(model, params, x, weight, lengths))


@pytest.fixture(scope="module", params=TOLERANCE)
def oracle(request):
    """(values, flax's outputs and gradients, tolerance)."""
    given = values(request.param)
    return given, output_and_gradients(Flax(), *given, LENGTHS), TOLERANCE[request.param]


def assert_near(found, expected, tolerance):
    """The same tree, every leaf within `tolerance` of its largest entry."""
    paths = jax.tree_util.tree_leaves_with_path(expected)
    leaves = jax.tree.leaves(found)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, leaf), other in zip(paths, leaves, strict=True):
        assert other.dtype == leaf.dtype
        np.testing.assert_allclose(other, leaf, atol=tolerance * np.abs(leaf).max(), rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_every_gradient_are_flaxs(oracle, way):
    given, expected, tolerance = oracle
    assert_near(output_and_gradients(lstm.BidirectionalLSTM(H, way), *given, LENGTHS), expected, tolerance)


def lstm_by_hand(x, cell):
    """(T, INPUTS) -> (T, H) float64, one clip, one direction, in a plain loop (Gers et al. 2000 without peepholes)."""
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    h = c = np.zeros(H)
    out = []
    for step in x.astype(np.float64):
        i, f, g, o = (step @ cell[f"i{k}"]["kernel"] + h @ cell[f"h{k}"]["kernel"] + cell[f"h{k}"]["bias"] for k in "ifgo")
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out)


@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_those_of_a_loop(way):
    params, x, weight = values("float32")
    found = output_and_gradients(lstm.BidirectionalLSTM(H, way), params, x, weight, LENGTHS)[0]
    for b, n in enumerate(LENGTHS):
        clip = x[b, :n]
        expected = [lstm_by_hand(clip, params["forward"]), lstm_by_hand(clip[::-1], params["backward"])[::-1]]
        np.testing.assert_allclose(found[b, :n], np.concatenate(expected, -1), atol=1e-5)
        assert not found[b, n:].any()


@pytest.mark.parametrize("way", WAYS)
def test_without_lengths_every_step_is_valid(way):
    params, x, weight = values("float32")
    layer = lstm.BidirectionalLSTM(H, way)
    expected = output_and_gradients(layer, params, x, weight, np.full_like(LENGTHS, T))[0]
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_padding_changes_nothing_valid(way):
    params, x, weight = values("float32")
    padding = np.arange(T) >= LENGTHS[:, None]
    dirty = np.where(padding[..., None], 1e3, x).astype(np.float32)
    layer = lstm.BidirectionalLSTM(H, way)
    clean, other = (output_and_gradients(layer, params, a, weight, LENGTHS) for a in (x, dirty))
    assert_near(other, clean, 0)
    assert not clean[2][padding].any() and clean[2][~padding].any()  # and nothing flows back to it


def test_first_parameters_are_kerass():
    """Glorot uniform kernels, orthogonal recurrent ones, biases 0 but 1 for the forget gate."""
    cell = lstm.CellParameters(32).init(jax.random.key(0), 48)["params"]
    assert sorted(cell) == sorted(f"{a}{g}" for a in "ih" for g in "ifgo")
    limit = np.sqrt(6 / (48 + 32))
    for g in "ifgo":
        kernel = np.asarray(cell[f"i{g}"]["kernel"])
        assert 0.95 * limit < np.abs(kernel).max() <= limit
        assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=0.05)
        recurrent = np.asarray(cell[f"h{g}"]["kernel"])
        np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(32), atol=1e-5)
        np.testing.assert_array_equal(cell[f"h{g}"]["bias"], np.full(32, float(g == "f")))


def test_reversed_twice_is_as_before():
    x = np.random.default_rng(1).normal(size=(4, 6, 2)).astype(np.float32)
    lengths = np.int32([6, 3, 1, 0])
    once = np.asarray(lstm.reverse_steps(jnp.asarray(x), lengths))
    for row, reversed_row, n in zip(x, once, lengths):
        np.testing.assert_array_equal(reversed_row, np.concatenate([row[:n][::-1], row[n:]]))
    np.testing.assert_array_equal(lstm.reverse_steps(jnp.asarray(once), lengths), x)
    np.testing.assert_array_equal(lstm.reverse_steps(jnp.asarray(x), None), x[:, ::-1])


def test_ways_are_named():
    assert lstm.resolve_way("joined") == "joined" and lstm.resolve_way("auto") in WAYS
    if jax.default_backend() == "cpu":
        assert lstm.resolve_way("auto") == "separate"
    with pytest.raises(ValueError, match="'fast'.*auto, separate, joined"):
        lstm.resolve_way("fast")
