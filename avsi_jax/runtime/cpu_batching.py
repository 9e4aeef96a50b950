"""Runs a jitted program over a batch of clips on a CPU: a few clips at a time, on every core.

XLA runs most of one program on one core, and the working memory of a whole batch does not fit its cache. Accelerators are given
the whole batch at once.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

CLIPS_PER_CALL = 4  # the working memory of so many clips stays in a core's cache


def split_over_cores(program: Callable) -> Callable:
    """Decorates a program of arrays (B, ...) whose result (B, ...) has in each row a function of the same row of the arguments.

    On a CPU a batch of more than CLIPS_PER_CALL is run in parts of that size, the last one padded with copies of the last row,
    so that one shape is compiled for batches of any size. On other devices, and inside another jitted program, the whole batch
    is run at once. Scalar arguments are passed to every part.
    """
    signature = inspect.signature(program)

    @functools.wraps(program)
    def split_program(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        arrays = {name: value for name, value in arguments.items() if np.ndim(value)}
        count = max(map(len, arrays.values()))
        is_traced = any(isinstance(x, jax.core.Tracer) for x in arrays.values())
        if count <= CLIPS_PER_CALL or jax.default_backend() != "cpu" or is_traced:
            return program(*args, **kwargs)
        arrays = {name: np.asarray(value) for name, value in arrays.items()}

        def run_part(start: int) -> np.ndarray:
            rows = np.minimum(np.arange(start, start + CLIPS_PER_CALL), count - 1)
            return np.asarray(program(**arguments | {name: value[rows] for name, value in arrays.items()}))

        return np.concatenate(list(_thread_pool().map(run_part, range(0, count, CLIPS_PER_CALL))))[:count]

    return split_program


@functools.cache
def _thread_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="split_over_cores")
