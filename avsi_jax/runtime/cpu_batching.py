"""A program over a batch of clips on a CPU: a few clips at a time, on every core.

XLA runs the most of one program on one core, and what a whole batch needs doesn't fit its cache. Accelerators want the whole batch.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

CLIPS = 4  # in one call of the program: what they need stays in a core's cache


def shared_out(program: Callable) -> Callable:
    """`program` of arrays (B, ...), which makes each row of its result (B, ...) of the same row of each, with its work shared out.

    On a CPU a batch of more than CLIPS goes through it by CLIPS, the last of them filled up with copies of the last row: one
    shape is compiled for batches of any size. On other devices, and inside another program, all of it goes through at once.
    """
    signature = inspect.signature(program)

    @functools.wraps(program)
    def shared(*arguments, **named):
        given = signature.bind(*arguments, **named).arguments
        arrays = {name: value for name, value in given.items() if np.ndim(value)}
        count = max(map(len, arrays.values()))
        if count <= CLIPS or jax.default_backend() != "cpu" or any(isinstance(x, jax.core.Tracer) for x in arrays.values()):
            return program(*arguments, **named)
        arrays = {name: np.asarray(value) for name, value in arrays.items()}

        def some(start: int) -> np.ndarray:
            rows = np.minimum(np.arange(start, start + CLIPS), count - 1)
            return np.asarray(program(**given | {name: value[rows] for name, value in arrays.items()}))

        return np.concatenate(list(_pool().map(some, range(0, count, CLIPS))))[:count]

    return shared


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="shared_out")
