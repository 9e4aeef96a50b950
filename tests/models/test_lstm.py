"""Every way to run the LSTM against PyTorch's figures, flax's layers, plain autodiff and a NumPy loop; values and every gradient.

lstm_torch.npz is by docs/figures/torch_lstm.py.
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

WAYS = ("separate", "joined", "cudnn")
B, T, INPUTS, H = 3, 9, 6, 5  # PyTorch's figures are of these sizes: compiled once for both oracles
LENGTHS = np.int32([9, 5, 1])
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}  # of the largest entry


@pytest.fixture(autouse=True)
def reference_for_cudnn(monkeypatch):
    """Where there is no NVIDIA GPU: jax's own reference, by the weights it unpacks itself, in the place of the kernel."""

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


def takes(way, dtype):
    """Skips float64 for cuDNN, which has none."""
    if way == "cudnn" and dtype != np.float32:
        pytest.skip("cuDNN takes float32 only")


@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_every_gradient_are_flaxs(oracle, way):
    given, expected, tolerance = oracle
    takes(way, given[1].dtype)
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


def test_a_clip_of_no_steps_gives_nothing():
    params, x, weight = values("float32")
    for way in WAYS:
        out, by_params, by_x = output_and_gradients(lstm.BidirectionalLSTM(H, way), params, x, weight, np.zeros_like(LENGTHS))
        assert not out.any() and not by_x.any()
        assert not any(leaf.any() for leaf in jax.tree.leaves(by_params))


def figures_of_torch(dtype):
    """(parameters, x, weight, lengths), (outputs, gradients by parameters, by x) as PyTorch gives them, in our tree."""
    kept = np.load(Path(__file__).with_name("lstm_torch.npz"))
    of = lambda name: kept[f"{dtype}/{name}"]

    def cell(prefix, suffix):
        gates = lambda name: np.split(of(f"{prefix}{name}_l0{suffix}"), 4)  # in the order ifgo
        leaves = zip("ifgo", gates("weight_ih"), gates("weight_hh"), gates("bias_hh"), strict=True)
        return {k: v for g, i, h, b in leaves for k, v in ((f"i{g}", {"kernel": i.T}), (f"h{g}", {"kernel": h.T, "bias": b}))}

    tree = lambda prefix: {"forward": cell(prefix, ""), "backward": cell(prefix, "_reverse")}
    given = tree(""), of("x"), kept["weight"].astype(dtype), kept["lengths"]
    return given, (of("outputs"), tree("gradient/"), of("gradient/x"))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_every_gradient_are_pytorchs(way, dtype):
    takes(way, dtype)
    given, expected = figures_of_torch(dtype)
    units = given[0]["forward"]["hi"]["bias"].size
    assert_near(output_and_gradients(lstm.BidirectionalLSTM(units, way), *given), expected, TOLERANCE[dtype])


def draws(*shapes):
    rng = np.random.default_rng(2)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def assert_same_gradient(ours, plain, given, by):
    """The pullback of `by`, our own and jax's, in float64."""

    @jax.jit
    def both(given, by):
        values, pullbacks = zip(*(jax.vjp(f, *given) for f in (ours, plain)), strict=True)
        return [(value, pull(by)) for value, pull in zip(values, pullbacks, strict=True)]

    assert_near(*both(given, by), 1e-10)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("side", ["forward", "backward", "both"])
def test_gradient_of_our_own_is_plain_autodiffs(side, padded):
    """The scans' own gradients against jax's of the same forward pass."""
    ended = np.arange(T)[:, None, None] >= LENGTHS[:, None] if padded else None
    with jax.enable_x64(True):
        if side == "both":
            *given, by = draws((T, 2, B, INPUTS), (2, 4, INPUTS, H), (2, 4, H, H), (2, 4, H), (T, 2, B, H))
            ended = np.stack([ended, ended[::-1]], 1) if padded else None
            assert_same_gradient(lambda *a: lstm.scan_joined(*a, ended), lambda *a: lstm._scan_joined(*a, ended)[0], given, by)
        else:
            *given, by = draws((T, B, INPUTS), (4, INPUTS, H), (4, H, H), (4, H), (T, B, H))
            back = side == "backward"
            plain = lambda *a: lstm._scan_separate(back, *a, ended)[0]
            assert_same_gradient(lambda *a: lstm.scan_separate(back, *a, ended), plain, given, by)


@pytest.mark.parametrize("way", ["separate", "joined"])
def test_bfloat16_is_near_float32(way):
    """8 bits a factor: outputs within 1 %, gradients within 3 % of the largest entry; types as they came."""
    params, x, weight = values("float32")
    found = output_and_gradients(lstm.BidirectionalLSTM(H, way, "bfloat16"), params, x, weight, LENGTHS)
    expected = output_and_gradients(lstm.BidirectionalLSTM(H, way), params, x, weight, LENGTHS)
    assert_near(found[0], expected[0], 0.01)
    assert_near(found, expected, 0.03)
    assert np.abs(found[0] - expected[0]).max() > 1e-4  # and it was not float32 all along


@pytest.mark.parametrize("way", ["separate", "joined"])
def test_bfloat16_does_not_lose_what_c_gathers(way):
    """1,000 times 0.0005 make 0.5; where c is carried in bfloat16 the sum stops at 0.125, whose next number lies 0.001 above."""
    shut, step, steps = 20.0, 0.0005, 1000
    cell = {f"i{g}": {"kernel": jnp.zeros((1, 1))} for g in "ifgo"}
    bias = {"i": np.log(step / (1 - step)), "f": shut, "g": shut, "o": shut}  # i = 0.0005; f, g, o = 1
    cell |= {f"h{g}": {"kernel": jnp.zeros((1, 1)), "bias": jnp.full(1, v)} for g, v in bias.items()}
    layer = lstm.BidirectionalLSTM(1, way, "bfloat16")
    out = jax.jit(layer.apply)({"params": {"forward": cell, "backward": cell}}, jnp.zeros((1, steps, 1)))
    np.testing.assert_allclose(out[0, [-1, 0], [0, 1]], np.tanh(step * steps), rtol=0.01)


def test_ways_are_named():
    assert lstm.resolve_way("joined") == "joined" and lstm.resolve_way("auto") in WAYS
    if jax.default_backend() == "cpu":
        assert lstm.resolve_way("auto") == "separate"
    with pytest.raises(ValueError, match="'fast'.*auto, separate, joined"):
        lstm.resolve_way("fast")
    with pytest.raises(ValueError, match="'float16'.*float32, bfloat16"):
        lstm.resolve_way("auto", "float16")


def test_cudnn_says_what_it_cannot_do(monkeypatch):
    with pytest.raises(ValueError, match="'bfloat16'.*expected 'float32'"):
        lstm.resolve_way("cudnn", "bfloat16")
    params, x, weight = values("float64")
    with pytest.raises(ValueError, match="float64, expected float32"):
        output_and_gradients(lstm.BidirectionalLSTM(H, "cudnn"), params, x, weight, LENGTHS)
    monkeypatch.setattr(lstm, "has_cudnn", lambda: False)
    with pytest.raises(ValueError, match="expected an NVIDIA GPU"):
        lstm.resolve_way("cudnn")
