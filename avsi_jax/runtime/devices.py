"""Runs training and evaluation steps on all devices, by jax.pmap or jax.shard_map. The only module that names a mapped axis.

A step is written for one device's share of the batch and calls `sum_over_devices` for quantities of the whole batch. The state
is replicated; batches are split along their first axis. Both ways give the same numbers, bit for bit. `parallel` is chosen once and
passed to each of `replicate`, `split` and `map_...`. The two differ in the arrays that a process holds:

    parallel    state                                              batch after `split`
    pmap        replicated over the devices of this process        (devices of this process, B / devices, ...)
    shard_map   one array, replicated over all processes' devices  (B, ...), one array over all devices of all processes

On one process the two states are the same. On several, Orbax can save only the second: `to_global` converts to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"
PARALLEL_MODES = ("pmap", "shard_map")
UNMAPPED = "unmapped"  # a third mode: one device and no mapping, the only one that jax_debug_nans can inspect

# ------------------------------------------------------------------------------------------------------------- CPU and its cores


def use_every_core(batch_size: int) -> None:
    """Creates one CPU device per core, so that a CPU trains data-parallel as a pod does (faster than threads inside one device).

    The number of devices is the largest that divides the batch. Must be called before jax first looks for devices. Has no effect
    on GPU and TPU, where the number is already configured (JAX_NUM_CPU_DEVICES), or where jax has looked for devices before (a
    test, a notebook).
    """
    _create_device_per_core(batch_size)
    if jax.default_backend() == "cpu":
        keep_freed_memory()


def _create_device_per_core(batch_size: int) -> None:
    if "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(n for n in range(1, cores + 1) if batch_size % n == 0))


def keep_freed_memory() -> None:
    """Configures glibc's malloc to keep freed memory instead of returning it to the system and fetching it again in every step.

    XLA's CPU client allocates the whole working memory of a step (some 800 MB for av_mtl_s2s) with malloc and frees it after the
    step; the page faults took an eighth of the step. Has no effect without glibc.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1)):
            mallopt(option, value)


def devices_share_cores() -> bool:
    """True for CPU devices: only one step may be in flight there, otherwise XLA's all-reduce can starve and abort the process."""
    return jax.default_backend() == "cpu"


# ---------------------------------------------------------------------------------------------------------- state and batches


def check_batch(batch_size: int) -> None:
    """ValueError where a global batch cannot be split evenly over all devices of all processes."""
    if batch_size % jax.device_count():
        raise ValueError(
            f"batch_size {batch_size} is not divisible by the {jax.device_count()} devices; "
            f"expected a multiple, e.g. --config.batch_size={-(-batch_size // jax.device_count()) * jax.device_count()}"
        )


def replicate(state: Any, parallel: str = "pmap", devices: Sequence[jax.Device] | None = None) -> Any:
    """Places a tree on all devices, once after initialisation and after restore, as donation needs it.

    The arrays may be on any device or on the host; those already in place are not copied. On several processes they must be the
    same on each: nothing is sent. `devices`: None means those of all processes.
    """
    is_local = _checked(parallel) != "shard_map" or jax.process_count() == 1
    mesh = _mesh(jax.devices()[:1] if parallel == UNMAPPED else devices)
    state = jax.device_put(jax.tree.map(_local_view, state), NamedSharding(mesh.local_mesh, PartitionSpec()))
    if is_local:
        return state
    return jax.tree.map(lambda x: _with_sharding(x, x.shape, NamedSharding(mesh, PartitionSpec())), state)


def to_global(state: Any) -> Any:
    """The state of either mode in the form that Orbax saves. Called by every process; nothing is sent.

    On several processes these are arrays over the devices of all processes (Orbax refuses those of one process); they share their
    memory with `state`, so donating the state to a step deletes them too. On one process it is a copy on the host: Orbax would
    cut arrays on several devices into as many slices, which takes five times as long.
    """
    if jax.process_count() > 1:
        return replicate(state, "shard_map")
    first = jax.device_get(jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, state))
    return jax.tree.map(lambda x: np.array(x, copy=True), first)  # device_get does not copy the data of a CPU device


def split(batch: dict, parallel: str = "pmap", devices: Sequence[jax.Device] | None = None) -> dict:
    """Splits this process' arrays (B, ...) over its devices (see the table above); drops entries that are not arrays (ids)."""
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    mesh = _mesh(devices)
    if _checked(parallel) == "pmap":
        return {k: v.reshape(mesh.local_mesh.size, -1, *v.shape[1:]) for k, v in arrays.items()}
    return arrays if parallel == UNMAPPED else _rows_of_all_processes(arrays, mesh)


def _checked(parallel: str) -> str:
    if parallel not in (*PARALLEL_MODES, UNMAPPED):
        raise ValueError(f"parallel: found {parallel!r}, expected {' or '.join(PARALLEL_MODES)}")
    if parallel == UNMAPPED and jax.process_count() > 1:
        raise ValueError(f"debug_nans: found {jax.process_count()} processes, expected one, since steps are not mapped")
    return parallel


def _mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices in one row, those of a process side by side, in the order in which pmap uses them."""
    if devices is None:
        devices = [d for process in range(jax.process_count()) for d in jax.local_devices(process)]
    return Mesh(np.asarray(devices), (AXIS,))


def _rows_of_all_processes(tree: Any, mesh: Mesh) -> Any:
    """Arrays (B, ...) of this process -> global arrays of all processes' rows, split along them. No process sends its rows."""
    rows, processes = PartitionSpec(AXIS), mesh.size // mesh.local_mesh.size
    tree = jax.device_put(tree, NamedSharding(mesh.local_mesh, rows))
    if processes == 1:
        return tree
    return jax.tree.map(lambda x: _with_sharding(x, (processes * x.shape[0], *x.shape[1:]), NamedSharding(mesh, rows)), tree)


def _with_sharding(x: jax.Array, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """An array of another shape and over more or fewer processes that shares x's shards on this process, without a copy."""
    return jax.make_array_from_single_device_arrays(shape, sharding, _local_shards(x))


def _local_view(x: Any) -> Any:
    """An array over the devices of all processes -> an array over those of this process, same memory; others unchanged."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x
    if not x.is_fully_replicated:
        raise ValueError(f"expected an array that is replicated on every device, found one split as {x.sharding}")
    return _with_sharding(x, x.shape, NamedSharding(x.sharding.mesh.local_mesh, PartitionSpec()))


def _local_shards(x: jax.Array) -> list[jax.Array]:
    """This process' shards of an array, in the order of its rows."""
    return [s.data for s in sorted(x.addressable_shards, key=lambda s: s.index[0].start or 0 if s.index else 0)]


# ------------------------------------------------------------------------------------------------------------------------ steps


def map_train_step(step: Callable, devices: Sequence[jax.Device] | None = None, parallel: str = "pmap") -> Callable:
    """Maps step(state, batch) -> (state, metrics), both replicated, over a batch that was `split`; the state is donated.

    `devices`: some of the devices, or those of another machine, to compile for; None means those of all processes.
    """
    if _checked(parallel) == "pmap":
        return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=devices)
    if parallel == UNMAPPED:
        return jax.jit(step)  # not donated: after a NaN jax runs the step again, operation by operation
    return jax.jit(_sharded(step, PartitionSpec(), devices), donate_argnums=0)


def map_evaluation_step(
    step: Callable, per_clip: bool = False, parallel: str = "pmap", devices: Sequence[jax.Device] | None = None
) -> Callable:
    """Maps step(params, batch) -> sums over the whole batch.

    With `per_clip`, step(params, batch) -> (sums, tree of (clips of a device, ...)); the mapped step returns that tree as numpy
    arrays (B, ...) of this process' clips in the order of its batch, and waits for them.
    """
    if _checked(parallel) == "pmap":
        out_axes = (None, 0) if per_clip else None
        mapped = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=out_axes, devices=devices)
    elif parallel == UNMAPPED:
        mapped = jax.jit(step)
    else:
        out_specs = (PartitionSpec(), PartitionSpec(AXIS)) if per_clip else PartitionSpec()
        mapped = jax.jit(_sharded(step, out_specs, devices))

    def rows(x: jax.Array) -> np.ndarray:
        x = np.concatenate(jax.device_get(_local_shards(x)))
        return x.reshape(-1, *x.shape[2:]) if parallel == "pmap" else x

    def evaluate(params: Any, batch: dict) -> tuple:
        sums, clips = mapped(params, batch)
        return sums, jax.tree.map(rows, clips)

    return evaluate if per_clip else mapped


def _sharded(step: Callable, out_specs: Any, devices: Sequence[jax.Device] | None) -> Callable:
    in_specs = (PartitionSpec(), PartitionSpec(AXIS))
    return jax.shard_map(step, mesh=_mesh(devices), in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sum_over_devices(tree: Any) -> Any:
    """Sums every leaf over all devices, inside a mapped step; returns the tree unchanged where the step is not mapped."""
    return jax.lax.psum(tree, AXIS) if _is_mapped() else tree


def _is_mapped() -> bool:
    """False where the axis does not exist: one device, as in tests and in inpainting."""
    try:
        return jax.lax.axis_size(AXIS) > 0
    except NameError:
        return False


# -------------------------------------------------------------------------------------------------------------------- processes


def sum_flags(flags: Sequence[float], *, wait: bool = True) -> np.ndarray | jax.Array:
    """Sums a few small numbers (n,) over all processes, float32, the same result on each. All must call it at the same steps.

    The sum runs on the devices, in their queue. Without `wait` it is only started, and numpy.asarray(result) waits for it.
    Where devices share cores it always waits (see devices_share_cores), and no step may be in flight.
    """
    flags = np.asarray(flags, np.float32)
    if jax.process_count() == 1:
        return flags
    rows = np.zeros((jax.local_device_count(), *flags.shape), np.float32)
    rows[0] = flags  # each process counts once, however many devices it has
    total = _row_sum()(_rows_of_all_processes(rows, _mesh()))
    return np.asarray(total) if wait or devices_share_cores() else total


@functools.cache
def _row_sum() -> Callable:
    replicated, rows = PartitionSpec(), PartitionSpec(AXIS)
    return jax.jit(jax.shard_map(lambda x: jax.lax.psum(x[0], AXIS), mesh=_mesh(), in_specs=rows, out_specs=replicated))


def sum_over_processes(values: Sequence[float]) -> list[float]:
    """Sums host numbers over all processes in double precision, rounded once, so independent of the order of the processes."""
    if jax.process_count() == 1:
        return [float(v) for v in values]
    from jax.experimental import multihost_utils

    bits = np.asarray(values, np.float64).view(np.uint32)  # devices have no float64 here
    gathered = np.asarray(multihost_utils.process_allgather(bits)).view(np.float64)
    return [math.fsum(column) for column in gathered.T]


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier of this name; without a time limit."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
