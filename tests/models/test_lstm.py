"""Every LSTM implementation against PyTorch, flax, plain autodiff and a NumPy loop: outputs and all gradients.

docs/figures/torch_lstm.py wrote lstm_torch.npz.
"""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn

from avsi_jax.models import lstm

pytestmark = pytest.mark.usefixtures("quickly_compiled")

IMPLEMENTATIONS = ("separate", "joined", "cudnn")
B, T, INPUTS, H = 3, 9, 6, 5  # the sizes of the values from PyTorch, so that programs are compiled once for both oracles
LENGTHS = np.int32([9, 5, 1])
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}  # relative to the largest entry


@pytest.fixture(autouse=True)
def reference_for_cudnn(monkeypatch):
    """Without an NVIDIA GPU, replaces the kernel by jax's own reference implementation, with the weights as jax unpacks them."""

    def by_reference(x, h, c, weights, lengths, inputs, units, layers, dropout, bidirectional):
        unpacked = rnn.unpack_lstm_weights(weights, inputs, units, layers, bidirectional)
        return rnn.lstm_ref(x, h, c, *unpacked, lengths, inputs, units, layers, dropout, bidirectional)

    if not lstm.has_cudnn():
        monkeypatch.setattr(rnn, "lstm", by_reference)
        monkeypatch.setattr(lstm, "has_cudnn", lambda: True)


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
    """Parameters in our tree, with biases other than 0 and 1; inputs; and the weights of a scalar loss."""
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(lambda: lstm.BidirectionalLSTM(H, "separate").init(jax.random.key(0), jnp.zeros((B, T, INPUTS))))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(dtype), tree["params"])
    x, weight = rng.normal(size=(B, T, INPUTS)).astype(dtype), rng.normal(size=(B, T, 2 * H)).astype(dtype)
    return params, x, weight


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, x, weight, lengths):
    """Outputs (B, T, 2H), and gradients of their weighted sum with respect to parameters and inputs."""

    def loss(params, x):
        out = model.apply({"params": params}, x, lengths)
        return (out * weight).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return out, *gradients


def output_and_gradients(model, params, x, weight, lengths):
    """The result of `run` as NumPy arrays, in the type of x, with products in full precision."""
    with jax.enable_x64(x.dtype == np.float64), jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, run(model, params, x, weight, lengths))


@pytest.fixture(scope="module", params=TOLERANCE)
def oracle(request):
    """(values, flax's outputs and gradients, tolerance)."""
    given = values(request.param)
    return given, output_and_gradients(Flax(), *given, LENGTHS), TOLERANCE[request.param]


def assert_near(result, expected, tolerance):
    """The same tree, every leaf within `tolerance` of its largest entry."""
    paths = jax.tree_util.tree_leaves_with_path(expected)
    leaves = jax.tree.leaves(result)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for (path, leaf), other in zip(paths, leaves, strict=True):
        assert other.dtype == leaf.dtype
        np.testing.assert_allclose(other, leaf, atol=tolerance * np.abs(leaf).max(), rtol=0, err_msg=jax.tree_util.keystr(path))


def skip_unsupported(implementation, dtype):
    """Skips float64 for cuDNN, which supports float32 only."""
    if implementation == "cudnn" and dtype != np.float32:
        pytest.skip("cuDNN supports float32 only")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_outputs_and_every_gradient_are_flaxs(oracle, implementation):
    given, expected, tolerance = oracle
    skip_unsupported(implementation, given[1].dtype)
    assert_near(output_and_gradients(lstm.BidirectionalLSTM(H, implementation), *given, LENGTHS), expected, tolerance)


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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_outputs_are_those_of_a_numpy_loop(implementation):
    params, x, weight = values("float32")
    result = output_and_gradients(lstm.BidirectionalLSTM(H, implementation), params, x, weight, LENGTHS)[0]
    for b, n in enumerate(LENGTHS):
        clip = x[b, :n]
        expected = [lstm_by_hand(clip, params["forward"]), lstm_by_hand(clip[::-1], params["backward"])[::-1]]
        np.testing.assert_allclose(result[b, :n], np.concatenate(expected, -1), atol=1e-5)
        assert not result[b, n:].any()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_lengths_every_time_step_is_valid(implementation):
    params, x, weight = values("float32")
    layer = lstm.BidirectionalLSTM(H, implementation)
    expected = output_and_gradients(layer, params, x, weight, np.full_like(LENGTHS, T))[0]
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_does_not_change_valid_outputs(implementation):
    params, x, weight = values("float32")
    padding = np.arange(T) >= LENGTHS[:, None]
    dirty = np.where(padding[..., None], 1e3, x).astype(np.float32)
    layer = lstm.BidirectionalLSTM(H, implementation)
    clean, other = (output_and_gradients(layer, params, a, weight, LENGTHS) for a in (x, dirty))
    assert_near(other, clean, 0)
    assert not clean[2][padding].any() and clean[2][~padding].any()  # and padding gets no gradient


def test_initial_values_are_drawn_for_each_gate_by_default():
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


def test_outputs_and_gradients_of_empty_clips_are_0():
    params, x, weight = values("float32")
    for implementation in IMPLEMENTATIONS:
        out, by_params, by_x = output_and_gradients(
            lstm.BidirectionalLSTM(H, implementation), params, x, weight, np.zeros_like(LENGTHS)
        )
        assert not out.any() and not by_x.any()
        assert not any(leaf.any() for leaf in jax.tree.leaves(by_params))


def values_of_pytorch(dtype):
    """(parameters, x, weight, lengths), (outputs, gradients of parameters, of x) of PyTorch, in our tree."""
    stored = np.load(Path(__file__).with_name("lstm_torch.npz"))
    of = lambda name: stored[f"{dtype}/{name}"]

    def cell(prefix, suffix):
        gates = lambda name: np.split(of(f"{prefix}{name}_l0{suffix}"), 4)  # in the order ifgo
        leaves = zip("ifgo", gates("weight_ih"), gates("weight_hh"), gates("bias_hh"), strict=True)
        return {k: v for g, i, h, b in leaves for k, v in ((f"i{g}", {"kernel": i.T}), (f"h{g}", {"kernel": h.T, "bias": b}))}

    tree = lambda prefix: {"forward": cell(prefix, ""), "backward": cell(prefix, "_reverse")}
    given = tree(""), of("x"), stored["weight"].astype(dtype), stored["lengths"]
    return given, (of("outputs"), tree("gradient/"), of("gradient/x"))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_outputs_and_every_gradient_are_pytorchs(implementation, dtype):
    skip_unsupported(implementation, dtype)
    given, expected = values_of_pytorch(dtype)
    units = given[0]["forward"]["hi"]["bias"].size
    assert_near(output_and_gradients(lstm.BidirectionalLSTM(units, implementation), *given), expected, TOLERANCE[dtype])


def draw(*shapes):
    rng = np.random.default_rng(2)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def assert_same_gradient(ours, plain, given, by):
    """Compares the values and pullbacks of two functions at `given`, with cotangent `by`, in float64."""

    @jax.jit
    def both(given, by):
        values, pullbacks = zip(*(jax.vjp(f, *given) for f in (ours, plain)), strict=True)
        return [(value, pull(by)) for value, pull in zip(values, pullbacks, strict=True)]

    assert_near(*both(given, by), 1e-10)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("side", ["forward", "backward", "both"])
def test_custom_gradients_are_those_of_autodiff(side, padded):
    """Against jax's gradients of the same forward pass."""
    ended = np.arange(T)[:, None, None] >= LENGTHS[:, None] if padded else None
    with jax.enable_x64(True):
        if side == "both":
            *given, by = draw((T, 2, B, INPUTS), (2, 4, INPUTS, H), (2, 4, H, H), (2, 4, H), (T, 2, B, H))
            ended = np.stack([ended, ended[::-1]], 1) if padded else None
            assert_same_gradient(lambda *a: lstm.scan_joined(*a, ended), lambda *a: lstm._scan_joined(*a, ended)[0], given, by)
        else:
            *given, by = draw((T, B, INPUTS), (4, INPUTS, H), (4, H, H), (4, H), (T, B, H))
            backwards = side == "backward"
            plain = lambda *a: lstm._scan_separate(backwards, *a, ended)[0]
            assert_same_gradient(lambda *a: lstm.scan_separate(backwards, *a, ended), plain, given, by)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["separate", "joined"])
def test_bfloat16_is_near_float32(implementation):
    """With factors of 8 bits: outputs within 1 %, gradients within 3 % of the largest entry; types are kept."""
    params, x, weight = values("float32")
    result = output_and_gradients(lstm.BidirectionalLSTM(H, implementation, "bfloat16"), params, x, weight, LENGTHS)
    expected = output_and_gradients(lstm.BidirectionalLSTM(H, implementation), params, x, weight, LENGTHS)
    assert_near(result[0], expected[0], 0.01)
    assert_near(result, expected, 0.03)
    assert np.abs(result[0] - expected[0]).max() > 1e-4  # bfloat16 was used


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["separate", "joined"])
def test_bfloat16_accumulates_c_in_float32(implementation):
    """1,000 times 0.0005 is 0.5. In bfloat16 the sum would stop at 0.125, where the next number is 0.001 larger."""
    large, step, steps = 20.0, 0.0005, 1000
    cell = {f"i{g}": {"kernel": jnp.zeros((1, 1))} for g in "ifgo"}
    bias = {"i": np.log(step / (1 - step)), "f": large, "g": large, "o": large}  # i = 0.0005; f, g, o = 1
    cell |= {f"h{g}": {"kernel": jnp.zeros((1, 1)), "bias": jnp.full(1, v)} for g, v in bias.items()}
    layer = lstm.BidirectionalLSTM(1, implementation, "bfloat16")
    out = jax.jit(layer.apply)({"params": {"forward": cell, "backward": cell}}, jnp.zeros((1, steps, 1)))
    np.testing.assert_allclose(out[0, [-1, 0], [0, 1]], np.tanh(step * steps), rtol=0.01)


def test_implementations_are_resolved_by_backend():
    assert lstm.resolve_implementation("joined") == "joined" and lstm.resolve_implementation("auto") in IMPLEMENTATIONS
    if jax.default_backend() == "cpu":
        assert lstm.resolve_implementation("auto") == "separate"
    with pytest.raises(ValueError, match="'fast'.*auto, separate, joined"):
        lstm.resolve_implementation("fast")
    with pytest.raises(ValueError, match="'float16'.*float32, bfloat16"):
        lstm.resolve_implementation("auto", "float16")


def test_cudnn_refuses_unsupported_types_and_devices(monkeypatch):
    with pytest.raises(ValueError, match="'bfloat16'.*expected 'float32'"):
        lstm.resolve_implementation("cudnn", "bfloat16")
    params, x, weight = values("float64")
    with pytest.raises(ValueError, match="float64, expected float32"):
        output_and_gradients(lstm.BidirectionalLSTM(H, "cudnn"), params, x, weight, LENGTHS)
    monkeypatch.setattr(lstm, "has_cudnn", lambda: False)
    with pytest.raises(ValueError, match="expected an NVIDIA GPU"):
        lstm.resolve_implementation("cudnn")


# ---- initial values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", lstm.INITS)
def test_initial_values_are_those_that_are_documented(init):
    """Keras draws the weights of all gates as one matrix (I, 4 H), (H, 4 H): Glorot's limit is sqrt(6 / (I + 4 H)) (Keras 3
    documentation of LSTM and GlorotUniform); an orthogonal matrix with more columns than rows has orthonormal rows.
    """
    inputs, units = 12, 16
    params = lstm.BidirectionalLSTM(units, "separate", initial=init).init(jax.random.key(0), jnp.zeros((1, 3, inputs)))["params"]
    same = jax.eval_shape(lambda: lstm.BidirectionalLSTM(units).init(jax.random.key(0), jnp.zeros((1, 3, inputs)))["params"])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, same)
    for direction in params.values():
        wx = np.concatenate([direction[f"i{g}"]["kernel"] for g in lstm.GATES], 1)
        wh = np.concatenate([direction[f"h{g}"]["kernel"] for g in lstm.GATES], 1)
        each = [np.asarray(direction[f"h{g}"]["kernel"]) for g in lstm.GATES]
        for g in lstm.GATES:
            np.testing.assert_array_equal(direction[f"h{g}"]["bias"], float(g == "f"))
        if init == "flax":
            for matrix in each:
                np.testing.assert_allclose(matrix @ matrix.T, np.eye(units), atol=1e-5)
        else:
            np.testing.assert_allclose(wh @ wh.T, np.eye(units), atol=1e-5)
        if init == "keras_orthogonal":
            np.testing.assert_allclose(wx @ wx.T, np.eye(inputs), atol=1e-5)
        else:
            limit = np.sqrt(6 / (inputs + (units if init == "flax" else 4 * units)))
            assert 0.9 * limit < np.abs(wx).max() <= limit
    assert not np.allclose(params["forward"]["hi"]["kernel"], params["backward"]["hi"]["kernel"])
