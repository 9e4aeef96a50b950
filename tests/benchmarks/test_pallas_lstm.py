"""benchmarks/tpu/pallas_lstm.py, run by Pallas' interpreter, against the scan of avsi_jax.models.lstm: values and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avsi_jax.models import lstm


@pytest.fixture(scope="module")
def scan_pallas():
    from benchmarks.tpu.pallas_lstm import scan_pallas

    return scan_pallas


def invented(steps: int, batch: int = 3, inputs: int = 5, units: int = 16) -> list[jax.Array]:
    """x (T, 2, B, I), Wx, Wh, b, and what to weigh the outputs by."""
    shapes = [(steps, 2, batch, inputs), (2, 4, inputs, units), (2, 4, units, units), (2, 4, units), (steps, 2, batch, units)]
    keys = jax.random.split(jax.random.key(steps), len(shapes))
    scale = [1, inputs**-0.5, units**-0.5, 1, 1]
    return [s * jax.random.normal(k, shape) for s, k, shape in zip(scale, keys, shapes, strict=True)]


def close(a, b, tolerance=1e-5):
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize(
    ("steps", "chunk"), [pytest.param(*case, marks=pytest.mark.slow) for case in ((5, 3), (6, 3), (2, 3), (3, 1))]
)
def test_values_and_gradients_are_the_scans(scan_pallas, steps, chunk):
    """A last chunk that is cut, whole chunks, one that is longer than the sound, one step a chunk."""
    *arguments, weight = invented(steps)
    ours = lambda *a: scan_pallas(*a, chunk, jnp.float32, True)
    close(ours(*arguments), lstm.scan_joined(*arguments))
    gradients = [jax.grad(lambda a, f=f: (f(*a) * weight).sum())(arguments) for f in (ours, lstm.scan_joined)]
    for mine, theirs in zip(*gradients, strict=True):
        close(mine, theirs)


def test_bfloat16_factors_keep_the_gist(scan_pallas):
    """bfloat16 has 8 bits: outputs in [-1, 1] within some hundredths, and not the float32 ones."""
    *arguments, _ = invented(6)
    rounded, exact = (scan_pallas(*arguments, 3, dtype, True) for dtype in (jnp.bfloat16, jnp.float32))
    assert 1e-5 < np.abs(rounded - exact).max() < 0.03
