"""benchmarks.tpu.pallas_lstm in Pallas' interpreter against the scan of avsi_jax.models.lstm: values and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avsi_jax.models import lstm


@pytest.fixture(scope="module")
def scan_pallas():
    from benchmarks.tpu.pallas_lstm import scan_pallas

    return scan_pallas


def random_arguments(steps: int, batch: int = 3, inputs: int = 5, units: int = 16) -> list[jax.Array]:
    """x (T, 2, B, I), Wx, Wh, b, and weights of the outputs in a scalar loss."""
    shapes = [(steps, 2, batch, inputs), (2, 4, inputs, units), (2, 4, units, units), (2, 4, units), (steps, 2, batch, units)]
    keys = jax.random.split(jax.random.key(steps), len(shapes))
    scale = [1, inputs**-0.5, units**-0.5, 1, 1]
    return [s * jax.random.normal(k, shape) for s, k, shape in zip(scale, keys, shapes, strict=True)]


def assert_close(a, b, tolerance=1e-5):
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize(
    ("steps", "chunk"), [pytest.param(*case, marks=pytest.mark.slow) for case in ((5, 3), (6, 3), (2, 3), (3, 1))]
)
def test_values_and_gradients_equal_the_scan(scan_pallas, steps, chunk):
    """An incomplete last chunk, complete chunks, a chunk longer than the input, chunks of one time step."""
    *arguments, weight = random_arguments(steps)
    ours = lambda *a: scan_pallas(*a, chunk, jnp.float32, True)
    assert_close(ours(*arguments), lstm.scan_joined(*arguments))
    gradients = [jax.grad(lambda a, f=f: (f(*a) * weight).sum())(arguments) for f in (ours, lstm.scan_joined)]
    for own, expected in zip(*gradients, strict=True):
        assert_close(own, expected)


@pytest.mark.slow
def test_bfloat16_outputs_are_close_to_float32(scan_pallas):
    """bfloat16 has 8 bits: outputs in [-1, 1] differ, but by less than 0.03."""
    *arguments, _ = random_arguments(2)
    rounded, exact = (scan_pallas(*arguments, 1, dtype, True) for dtype in (jnp.bfloat16, jnp.float32))
    assert 1e-5 < np.abs(rounded - exact).max() < 0.03
