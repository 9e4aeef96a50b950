"""A program split over the cores gives the same rows as a single call, for any batch size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avsi_jax.runtime import cpu_batching


def traced_program():
    """A jitted program of two arrays and a static number, and the list of shapes for which it was traced."""
    shapes = []

    @cpu_batching.split_over_cores
    @jax.jit
    def program(x, *, factor, seeds):
        shapes.append(x.shape)
        return jnp.cumsum(x, -1) * factor + seeds[:, None]

    return program, shapes


@pytest.mark.parametrize("count", [1, 4, 5, 8, 11])
def test_every_row_of_the_result_depends_on_its_own_row(count):
    program, shapes = traced_program()
    x = np.random.default_rng(count).standard_normal((count, 7)).astype(np.float32)
    seeds = np.arange(count, dtype=np.float32)
    result = np.asarray(program(x, factor=3.0, seeds=seeds))
    assert result.shape == (count, 7)
    np.testing.assert_allclose(result, 3 * np.cumsum(np.float64(x), -1) + seeds[:, None], atol=1e-5)
    assert shapes == [(min(count, cpu_batching.CLIPS_PER_CALL), 7)]


def test_batches_of_all_sizes_share_one_compiled_program():
    program, shapes = traced_program()
    for count in (5, 6, 9, 16):
        program(np.zeros((count, 3), np.float32), factor=1.0, seeds=np.zeros(count, np.float32))
    assert shapes == [(cpu_batching.CLIPS_PER_CALL, 3)]


def test_a_program_inside_another_is_not_split():
    program, shapes = traced_program()
    result = jax.jit(lambda x: program(x, factor=2.0, seeds=x[:, 0]))(jnp.ones((9, 2)))
    np.testing.assert_array_equal(result, np.tile([3.0, 5.0], (9, 1)))
    assert shapes == [(9, 2)]


def test_an_error_in_one_part_is_raised():
    @cpu_batching.split_over_cores
    def program(x):
        if x[0, 0] > 5:
            raise ValueError("failure in row 8")
        return x

    with pytest.raises(ValueError, match="row 8"):
        program(np.arange(12.0)[:, None])
