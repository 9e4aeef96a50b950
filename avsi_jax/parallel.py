"""THE pmap, and the devices it runs on. The only writer of an axis name.

A step is written for one device's share of the batch and calls `sum_over_devices` for whatever must hold for the whole batch. State
goes in and comes out whole (in_axes=None, out_axes=None), lying on all local devices; batches are split along their first axis.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"


def use_every_core(batch_size: int) -> None:
    """One CPU device a core, so that a CPU trains data-parallel as a pod does (faster there than threads inside one device).

    As many as divide the batch. To be called before jax first looks for devices; without effect on GPU and TPU, and where the
    number is chosen already (JAX_NUM_CPU_DEVICES) or devices were looked for (a test, a notebook).
    """
    _one_device_a_core(batch_size)
    if jax.default_backend() == "cpu":
        keep_freed_memory()


def _one_device_a_core(batch_size: int) -> None:
    if "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(n for n in range(1, cores + 1) if batch_size % n == 0))


def keep_freed_memory() -> None:
    """Tells glibc not to give memory back to the system and to fetch it again, page by page, in every step.

    XLA's CPU client takes a step's whole working memory (some 800 MB for av_mtl_s2s) from malloc and frees it after the step: an
    eighth of the step went into page faults. Without effect where there is no glibc.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1)):
            mallopt(option, value)


def devices_share_cores() -> bool:
    """True on CPU devices: only one step may be in flight there, else XLA's all-reduce can starve and abort the process."""
    return jax.default_backend() == "cpu"


def check_batch(batch_size: int) -> None:
    """ValueError where a global batch cannot be split evenly over all devices of all processes."""
    if batch_size % jax.device_count():
        raise ValueError(
            f"batch_size {batch_size} is not divisible by the {jax.device_count()} devices; "
            f"expected a multiple, e.g. --config.batch_size={-(-batch_size // jax.device_count()) * jax.device_count()}"
        )


def replicate(state):
    """Places a tree on all local devices once, after init and after restore, as donation needs it."""
    mesh = Mesh(np.asarray(jax.local_devices()), (AXIS,))
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))


def split(batch: dict) -> dict:
    """Arrays (B, ...) of this process -> (devices, B / devices, ...); what is not an array (ids) stays behind."""
    devices = jax.local_device_count()
    return {k: v.reshape(devices, -1, *v.shape[1:]) for k, v in batch.items() if isinstance(v, np.ndarray)}


def map_train_step(step: Callable, devices=None) -> Callable:
    """step(state, batch) -> (state, metrics), both whole, over a batch that was `split`; the state's memory is used again.

    `devices`: those of a machine that is not here, to compile for; None: all of this process.
    """
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=devices)


def map_evaluation_step(step: Callable) -> Callable:
    """step(params, batch) -> sums over the whole batch."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None)


def sum_over_devices(tree):
    """Sum of every leaf over all devices; the identity where a step runs unmapped."""
    try:
        return jax.lax.psum(tree, AXIS)
    except NameError:  # no such axis: one device, as in tests and in repair
        return tree
