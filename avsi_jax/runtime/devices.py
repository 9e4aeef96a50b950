"""The devices a step runs on, and the ways to run it on all of them: jax.pmap or jax.shard_map. The only writer of an axis name.

A step is written for one device's share of the batch and calls `sum_over_devices` for whatever must hold for the whole batch. State
goes in and comes out whole; batches are split along their first axis. Both ways give the same numbers, bit for bit; `how` is chosen
once, and given to each of `replicate`, `split` and `map_...`. They differ in what a process holds in its hand:

    how         state                                             batch that was split
    pmap        whole, on this process' devices alone             (devices of this process, B / devices, ...)
    shard_map   whole, one array over all devices of all of them  (B, ...), one array over all devices of all processes

On one process the two states are the same. On several, Orbax saves only the second: `to_global` makes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"
WAYS = ("pmap", "shard_map")
UNMAPPED = "unmapped"  # a third: one device and nothing mapped, which alone jax_debug_nans looks into

# ------------------------------------------------------------------------------------------------------------- CPU and its cores


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


# ---------------------------------------------------------------------------------------------------------- state and batches


def check_batch(batch_size: int) -> None:
    """ValueError where a global batch cannot be split evenly over all devices of all processes."""
    if batch_size % jax.device_count():
        raise ValueError(
            f"batch_size {batch_size} is not divisible by the {jax.device_count()} devices; "
            f"expected a multiple, e.g. --config.batch_size={-(-batch_size // jax.device_count()) * jax.device_count()}"
        )


def replicate(state, how: str = "pmap", devices=None):
    """Places a tree on all devices once, after init and after restore, as donation needs it; what lies there already isn't copied.

    The tree's arrays may lie anywhere, on the host too; on several processes they must be the same on each: nothing is sent.
    `devices`: None is all of all processes.
    """
    is_local = _known(how) != "shard_map" or jax.process_count() == 1
    mesh = _mesh(jax.devices()[:1] if how == UNMAPPED else devices)
    state = jax.device_put(jax.tree.map(_local, state), NamedSharding(mesh.local_mesh, PartitionSpec()))
    if is_local:
        return state
    return jax.tree.map(lambda x: _joined(x, x.shape, NamedSharding(mesh, PartitionSpec())), state)


def to_global(state):
    """The state of either way as Orbax saves it, each process taking part; nothing is sent.

    On several processes that is arrays over all devices of all of them (Orbax refuses those of one process); where the state is
    donated to a step, they are gone too. On one process it is a copy on the host: arrays on several devices Orbax would cut, every
    one into as many slices, which takes five times as long.
    """
    if jax.process_count() > 1:
        return replicate(state, "shard_map")
    first = jax.device_get(jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, state))
    return jax.tree.map(lambda x: np.array(x, copy=True), first)  # what lies on a CPU device was not copied yet


def split(batch: dict, how: str = "pmap", devices=None) -> dict:
    """Arrays (B, ...) of this process as a step takes them (see above); what is not an array (ids) stays behind."""
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    mesh = _mesh(devices)
    if _known(how) == "pmap":
        return {k: v.reshape(mesh.local_mesh.size, -1, *v.shape[1:]) for k, v in arrays.items()}
    return arrays if how == UNMAPPED else _rows_of_all(arrays, mesh)


def _known(how: str) -> str:
    if how not in (*WAYS, UNMAPPED):
        raise ValueError(f"parallel: found {how!r}, expected {' or '.join(WAYS)}")
    if how == UNMAPPED and jax.process_count() > 1:
        raise ValueError(f"parallel: found {jax.process_count()} processes, expected one where steps are not mapped (debug_nans)")
    return how


def _mesh(devices=None) -> Mesh:
    """All devices in one row, those of a process side by side, in the order pmap takes them."""
    if devices is None:
        devices = [d for process in range(jax.process_count()) for d in jax.local_devices(process)]
    return Mesh(np.asarray(devices), (AXIS,))


def _rows_of_all(tree, mesh: Mesh):
    """Arrays (B, ...) of this process -> arrays of all processes' rows, split along them; what is sent is this process'."""
    rows, processes = PartitionSpec(AXIS), mesh.size // mesh.local_mesh.size
    tree = jax.device_put(tree, NamedSharding(mesh.local_mesh, rows))
    if processes == 1:
        return tree
    return jax.tree.map(lambda x: _joined(x, (processes * x.shape[0], *x.shape[1:]), NamedSharding(mesh, rows)), tree)


def _joined(x: jax.Array, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """An array of another shape and over more or fewer processes whose pieces on this process are those of x, the same memory."""
    return jax.make_array_from_single_device_arrays(shape, sharding, _shards(x))


def _local(x):
    """An array over the devices of all processes -> the same memory as an array over those of this one; others as they are."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x
    if not x.is_fully_replicated:
        raise ValueError(f"expected an array that is whole on every device, found one split as {x.sharding}")
    return _joined(x, x.shape, NamedSharding(x.sharding.mesh.local_mesh, PartitionSpec()))


def _shards(x: jax.Array) -> list[jax.Array]:
    """This process' pieces of an array, in the order of its rows."""
    return [s.data for s in sorted(x.addressable_shards, key=lambda s: s.index[0].start or 0 if s.index else 0)]


# ------------------------------------------------------------------------------------------------------------------------ steps


def map_train_step(step: Callable, devices=None, how: str = "pmap") -> Callable:
    """step(state, batch) -> (state, metrics), both whole, over a batch that was `split`; the state's memory is used again.

    `devices`: those of a machine that is not here, to compile for, or some of them; None: all of all processes.
    """
    if _known(how) == "pmap":
        return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=devices)
    if how == UNMAPPED:
        return jax.jit(step)  # nothing donated: jax does a step with NaN again, operation by operation
    return jax.jit(_sharded(step, PartitionSpec(), devices), donate_argnums=0)


def map_evaluation_step(step: Callable, per_clip: bool = False, how: str = "pmap", devices=None) -> Callable:
    """step(params, batch) -> sums over the whole batch.

    With `per_clip`, step(params, batch) -> (sums, tree of (clips of a device, ...)), and the mapped one gives that tree as numpy
    arrays (B, ...) of this process' clips in the order of its batch; it waits for them.
    """
    if _known(how) == "pmap":
        out_axes = (None, 0) if per_clip else None
        mapped = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=out_axes, devices=devices)
    elif how == UNMAPPED:
        mapped = jax.jit(step)
    else:
        out_specs = (PartitionSpec(), PartitionSpec(AXIS)) if per_clip else PartitionSpec()
        mapped = jax.jit(_sharded(step, out_specs, devices))

    def rows(x) -> np.ndarray:
        x = np.concatenate(jax.device_get(_shards(x)))
        return x.reshape(-1, *x.shape[2:]) if how == "pmap" else x

    def evaluate(params, batch):
        sums, clips = mapped(params, batch)
        return sums, jax.tree.map(rows, clips)

    return evaluate if per_clip else mapped


def _sharded(step: Callable, out_specs, devices) -> Callable:
    in_specs = (PartitionSpec(), PartitionSpec(AXIS))
    return jax.shard_map(step, mesh=_mesh(devices), in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sum_over_devices(tree):
    """Sum of every leaf over all devices; the identity where a step runs unmapped."""
    return jax.lax.psum(tree, AXIS) if _is_mapped() else tree


def _is_mapped() -> bool:
    """False where there is no such axis: one device, as in tests and in repair."""
    try:
        return jax.lax.axis_size(AXIS) > 0
    except NameError:
        return False


# -------------------------------------------------------------------------------------------------------------------- processes


def agree(flags: Sequence[float], *, wait: bool = True):
    """Sum of a few small numbers (n,) over all processes, float32, the same on each; to be called by all of them at the same steps.

    It runs on the devices, in their queue. Without `wait` it is only started: numpy.asarray(what comes back) waits, and gives it.
    Where devices share cores it always waits (see devices_share_cores), and no step may be in flight.
    """
    flags = np.asarray(flags, np.float32)
    if jax.process_count() == 1:
        return flags
    rows = np.zeros((jax.local_device_count(), *flags.shape), np.float32)
    rows[0] = flags  # each process once, however many devices it has
    total = _addition()(_rows_of_all(rows, _mesh()))
    return np.asarray(total) if wait or devices_share_cores() else total


@functools.cache
def _addition() -> Callable:
    whole, rows = PartitionSpec(), PartitionSpec(AXIS)
    return jax.jit(jax.shard_map(lambda x: jax.lax.psum(x[0], AXIS), mesh=_mesh(), in_specs=rows, out_specs=whole))


def sum_over_processes(values: Sequence[float]) -> list[float]:
    """Sums over all processes of numbers counted on the host, in double precision, rounded once: whatever the processes' order."""
    if jax.process_count() == 1:
        return [float(v) for v in values]
    from jax.experimental import multihost_utils

    bits = np.asarray(values, np.float64).view(np.uint32)  # devices have no float64 here
    everyone = np.asarray(multihost_utils.process_allgather(bits)).view(np.float64)
    return [math.fsum(column) for column in everyone.T]


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name; it waits for ever for one that never does."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
