"""Work shared out among the cores: the same rows as all at once, whatever the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avsi_jax.runtime import cpu_batching


def traced_shapes():
    """A jitted program of two arrays and a static number, and the shapes that it was traced for."""
    shapes = []

    @cpu_batching.shared_out
    @jax.jit
    def program(x, *, factor, seeds):
        shapes.append(x.shape)
        return jnp.cumsum(x, -1) * factor + seeds[:, None]

    return program, shapes


@pytest.mark.parametrize("count", [1, 4, 5, 8, 11])
def test_every_row_is_made_of_its_own(count):
    program, shapes = traced_shapes()
    x = np.random.default_rng(count).standard_normal((count, 7)).astype(np.float32)
    seeds = np.arange(count, dtype=np.float32)
    made = np.asarray(program(x, factor=3.0, seeds=seeds))
    assert made.shape == (count, 7)
    np.testing.assert_allclose(made, 3 * np.cumsum(np.float64(x), -1) + seeds[:, None], atol=1e-5)
    assert shapes == [(min(count, cpu_batching.CLIPS), 7)]


def test_batches_of_all_sizes_are_one_program():
    program, shapes = traced_shapes()
    for count in (5, 6, 9, 16):
        program(np.zeros((count, 3), np.float32), factor=1.0, seeds=np.zeros(count, np.float32))
    assert shapes == [(cpu_batching.CLIPS, 3)]


def test_inside_of_another_program_it_is_one():
    program, shapes = traced_shapes()
    made = jax.jit(lambda x: program(x, factor=2.0, seeds=x[:, 0]))(jnp.ones((9, 2)))
    np.testing.assert_array_equal(made, np.tile([3.0, 5.0], (9, 1)))
    assert shapes == [(9, 2)]


def test_what_goes_wrong_in_a_part_is_told():
    @cpu_batching.shared_out
    def program(x):
        if x[0, 0] > 5:
            raise ValueError("row 8 of it")
        return x

    with pytest.raises(ValueError, match="row 8 of it"):
        program(np.arange(12.0)[:, None])
