"""Joins several processes into one training: finds out their place, connects them and ends them. Runs before jax looks for devices.

A process learns its place from flags (--coordinator, --num_processes, --process_id), from the environment variables of the same
meaning (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), or from its launcher: Open MPI, SLURM, a TPU pod,
Kubernetes. A launcher counts as a cluster only where it started more than one process: a login shell of SLURM does not. `detect`
reads only the environment; jax's own detection, which accepts more, is used only where a server must be asked (a TPU VM's
metadata, Kubernetes).

    topology = distributed.start(...)          # before devices.use_every_core, and before anything else that looks for devices
    devices.use_every_core(...)
    topology.check()
    ...
    distributed.leave(exit_code)               # the last line of the program
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

MODES = ("auto", "on", "off")
FLAGS = ("coordinator", "num_processes", "process_id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SINGLE_PROCESS = "one process"

TPU_PORT, MIN_PORT, NUM_PORTS = 8482, 61_440, 4096  # as jax chooses them
MARGIN_S = 60  # jax ends the whole process after its own timeout, so that one is longer than ours by this


class PeersMissingError(ValueError):
    """The other processes did not connect in time; starting the same command again may succeed."""

    exit_code = 75  # EX_TEMPFAIL, as the watchdog's


class DetectedCluster(NamedTuple):
    """A cluster and the place of this process in it. None: unknown; with `asks_jax`, jax gets it from a server."""

    name: str
    coordinator: str | None  # host:port of process 0
    num_processes: int | None
    process_id: int | None
    local_device_ids: list[int] | None = None  # of the GPUs of this machine; None: all
    asks_jax: bool = False


class Topology(NamedTuple):
    """The result of `start`. `check` and `str` look for devices."""

    name: str
    coordinator: str | None
    expected: int | None  # number of processes; None: as many as jax finds

    def check(self) -> None:
        """ValueError where jax sees another number of processes, or where they do not all have the same number of devices."""
        import jax

        if self.expected not in (None, jax.process_count()):
            raise ValueError(f"{self.name}: expected {self.expected} processes, found devices of {jax.process_count()}; "
                             "start the same command on every host, with the same --distributed")  # fmt: skip
        counts = Counter(d.process_index for d in jax.devices())
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"process {process} has {counts[process]}" for process in sorted(counts))
            raise ValueError(f"{self.name}: expected the same number of devices on each process, found: {listed}")

    def __str__(self) -> str:
        import jax

        if jax.process_count() == 1:
            return f"{self.name}, {jax.device_count()} devices"
        place = f"process {jax.process_index()} of {jax.process_count()}"
        where = f", coordinator {self.coordinator}" if self.coordinator else ""
        return f"{self.name}: {place}{where}, {jax.local_device_count()} local of {jax.device_count()} devices"


# ------------------------------------------------------------------------------------------------------------- start and leave


def start(
    mode: str = "auto",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = 300,
    heartbeat_s: int = 120,
) -> Topology:
    """Connects to the other processes, if there are any.

    mode: 'off' always runs a single process, 'on' requires a cluster, 'auto' uses one where it is detected. The three flags take
    precedence over the environment; if all three are given, nothing is detected. `timeout_s`: how long to wait for the others.
    `heartbeat_s`: how long a process may be silent before jax ends all others (by SIGABRT, so that they can be restarted).
    Raises ValueError, in one line, where flags and environment contradict each other or the others do not connect.
    """
    flags = {k: v for k, v in zip(FLAGS, (coordinator, num_processes, process_id), strict=True) if v is not None}
    if mode not in MODES:
        raise ValueError(f"--distributed: found {mode!r}, expected {', '.join(MODES)}")
    if mode == "off" and flags:
        raise ValueError(f"--distributed=off, but {_flag_names(flags)} given; expected one or the other")
    cluster = None
    if mode != "off":
        cluster = resolve(mode, flags, None if len(flags) == len(FLAGS) else detect(os.environ, tpu_vm=is_tpu_vm))
    if cluster is None:
        return Topology(SINGLE_PROCESS, None, 1)
    _connect(cluster, timeout_s, heartbeat_s)
    return Topology(cluster.name, cluster.coordinator, cluster.num_processes)


def resolve(mode: str, flags: dict[str, Any], detected: DetectedCluster | None) -> DetectedCluster | None:
    """Combines the flags with the detected cluster; None for a single process. ValueError where they do not determine a place."""
    if detected is None and flags in ({}, {"num_processes": 1}):
        if mode == "on":
            raise ValueError("--distributed=on, but no cluster found; expected --coordinator, --num_processes and --process_id, or "
                             "a start by SLURM (srun), Open MPI, Kubernetes or on a TPU pod")  # fmt: skip
        return None
    cluster = detected or DetectedCluster("flags", None, None, None)
    for name in FLAGS[1:]:
        if name in flags and getattr(cluster, name) not in (None, flags[name]):
            raise ValueError(f"--{name}={flags[name]}, but {cluster.name} says {getattr(cluster, name)}; expected the same")
    cluster = cluster._replace(**flags)
    unknown = [name for name in FLAGS if getattr(cluster, name) is None]
    if unknown and not cluster.asks_jax:
        variables = ", ".join(VARIABLES[FLAGS.index(name)] for name in unknown)
        raise ValueError(f"{cluster.name}: {_flag_names(unknown)} unknown; expected as flags, or as {variables}; "
                         "or --distributed=off for a single process")  # fmt: skip
    if cluster.num_processes == 1:
        return None
    if not unknown and not 0 <= cluster.process_id < cluster.num_processes:
        raise ValueError(f"{cluster.name}: found process {cluster.process_id} of {cluster.num_processes}; "
                         "expected 0 <= --process_id < --num_processes")  # fmt: skip
    if cluster.coordinator and not re.fullmatch(r".+:\d+", cluster.coordinator):
        raise ValueError(f"{cluster.name}: found coordinator {cluster.coordinator!r}, expected --coordinator=HOST:PORT")
    return cluster


def _flag_names(names: Iterable[str]) -> str:
    return " and ".join(f"--{name}" for name in names)


def _connect(cluster: DetectedCluster, timeout_s: float, heartbeat_s: int) -> None:
    """Calls jax.distributed.initialize in a thread: on its own timeout jax would end the process without a usable message."""
    import jax

    errors = []

    def initialise():
        try:
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.num_processes,
                cluster.process_id,
                local_device_ids=cluster.local_device_ids,
                cluster_detection_method=None if None in cluster[1:4] else "deactivate",
                initialization_timeout=int(timeout_s + MARGIN_S),
                heartbeat_timeout_seconds=heartbeat_s,
                shutdown_timeout_seconds=MARGIN_S,
            )
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=initialise, daemon=True)
    thread.start()
    thread.join(timeout_s)
    _restore_sigterm()
    place = "" if cluster.process_id is None else f": process {cluster.process_id} of {cluster.num_processes}"
    address = f"coordinator {cluster.coordinator or 'unknown'}"
    if thread.is_alive():
        reason = "the other processes did not connect" if cluster.process_id == 0 else "no answer, or not all processes connected"
        raise PeersMissingError(f"{cluster.name}{place} waited {timeout_s:g} s at {address}: {reason}; check that the command runs "
                                "on every host and that the port is open (--distributed=off runs a single process)")  # fmt: skip
    if errors:
        reason = str(errors[0]).strip().splitlines()[0][:200]
        raise PeersMissingError(f"{cluster.name}{place} could not connect to {address}: {reason}") from errors[0]


def _restore_sigterm() -> None:
    """Connecting makes jax consume SIGTERM in native code; this reinstalls the previous Python handler."""
    with contextlib.suppress(ValueError):  # not in the main thread: there are no handlers
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


def is_joined() -> bool:
    """Whether this is one of several connected processes."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def leave(code: int, *, wait_s: float | None = None) -> None:
    """Ends one of several processes with its own exit code; returns where there is a single process.

    At the exit of the interpreter jax would wait for the others (a minute here, five by default) and then abort with 134,
    whatever the code was. This waits up to `wait_s` for the others to call it too, so that all end normally, and then ends
    without them. None: 50 s after a success, which all processes share, otherwise 5 s. Where process 0 ends first, jax aborts
    the others at once.
    """
    wait_s = (5 if code else 50) if wait_s is None else wait_s
    if not is_joined():
        return
    thread = threading.Thread(target=_shut_down, daemon=True)
    thread.start()
    thread.join(wait_s)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _shut_down() -> None:
    import jax

    with contextlib.suppress(Exception):
        jax.distributed.shutdown()


# -------------------------------------------------------------------------------------------------------------------- detection


def detect(env: Mapping[str, str], *, tpu_vm: Callable[[], bool] = lambda: False) -> DetectedCluster | None:
    """The cluster that this process was started in, by its environment; None for a single process. `tpu_vm` is called last."""
    variables = _jax_variables(env)
    if len(variables) == len(FLAGS):
        return DetectedCluster("JAX_* variables", **variables)
    for detector in (_open_mpi, _slurm, _tpu_hosts, _kubernetes):
        if cluster := detector(env):
            return cluster._replace(**variables)
    if _may_use_tpu(env) and tpu_vm():
        return DetectedCluster("TPU VM", None, None, None, asks_jax=True)._replace(**variables)
    return DetectedCluster("JAX_* variables", *(variables.get(name) for name in FLAGS)) if variables else None


def _jax_variables(env: Mapping[str, str]) -> dict[str, Any]:
    values = {flag: env[name] for flag, name in zip(FLAGS, VARIABLES, strict=True) if env.get(name)}
    return {flag: value if flag == "coordinator" else _integer(env, VARIABLES[FLAGS.index(flag)]) for flag, value in values.items()}


def _integer(env: Mapping[str, str], name: str, default: int = 0) -> int:
    try:
        return int(env.get(name) or default)
    except ValueError as error:
        raise ValueError(f"{name}: found {env[name]!r}, expected a whole number") from error


def _open_mpi(env: Mapping[str, str]) -> DetectedCluster | None:
    """mpirun. Version 4 gives the address of the first host; version 5 does not, so it is known only on a single machine."""
    count = _integer(env, "OMPI_COMM_WORLD_SIZE")
    if count < 2:
        return None
    local_count, uri = _integer(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1), env.get("OMPI_MCA_orte_hnp_uri", "")
    address = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    host = "127.0.0.1" if local_count == count else address and (address[1] or f"[{address[2]}]")
    job = int(uri.partition(".")[0]) >> 12 if address else zlib.crc32(env.get("PMIX_NAMESPACE", "").encode())
    devices = share_of_devices(env, _integer(env, "OMPI_COMM_WORLD_LOCAL_RANK"), local_count)
    return DetectedCluster("Open MPI", host and f"{host}:{_port(env, job)}", count, _integer(env, "OMPI_COMM_WORLD_RANK"), devices)


def _slurm(env: Mapping[str, str]) -> DetectedCluster | None:
    """A SLURM step of more than one task. A batch script or a login shell is outside of any step, or a step of one task."""
    count = _integer(env, "SLURM_STEP_NUM_TASKS") or _integer(env, "SLURM_NTASKS")
    if count < 2 or not all(env.get(k) for k in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")):
        return None
    host = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", env["SLURM_STEP_NODELIST"]).split(",")[0]  # a[01-03,7],b -> a01
    job, step = _integer(env, "SLURM_JOB_ID"), _integer(env, "SLURM_STEP_ID")
    devices = share_of_devices(env, _integer(env, "SLURM_LOCALID"), slurm_tasks_on_node(env))
    return DetectedCluster(f"SLURM job {job}", f"{host}:{_port(env, job + step)}", count, _integer(env, "SLURM_PROCID"), devices)


def slurm_tasks_on_node(env: Mapping[str, str]) -> int:
    """Tasks of this step on this node. In '4(x2),3', for example, the first two nodes have four tasks each, the next three."""
    tasks = []
    for part in filter(None, env.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(times or 1)
    node = _integer(env, "SLURM_NODEID")
    return tasks[node] if node < len(tasks) else 1


def share_of_devices(env: Mapping[str, str], rank: int, count: int) -> list[int] | None:
    """The GPUs for process `rank` of `count` on a machine; None for all visible ones: one process, or each sees only its own."""
    if count < 2 or env.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    visible = env.get("CUDA_VISIBLE_DEVICES")
    devices = len(visible.split(",")) if visible else _integer(env, "SLURM_GPUS_ON_NODE", count)
    each = devices // count
    return list(range(rank * each, (rank + 1) * each)) or None


def _tpu_hosts(env: Mapping[str, str]) -> DetectedCluster | None:
    """The hosts of a TPU pod, of one slice or several, with the variables that GKE sets."""
    hosts = [h for h in (env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")).split(",") if h]
    slices = _integer(env, "MEGASCALE_NUM_SLICES", 1)
    if len(hosts) * slices < 2 or not _may_use_tpu(env):
        return None
    first = (env.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).partition(":")[0]
    process = (
        _integer(env, "TPU_WORKER_ID") + _integer(env, "MEGASCALE_SLICE_ID") * len(hosts) if env.get("TPU_WORKER_ID") else None
    )
    return DetectedCluster("TPU pod", f"{first}:{env.get('JAX_COORDINATOR_PORT') or TPU_PORT}", len(hosts) * slices, process)


def _kubernetes(env: Mapping[str, str]) -> DetectedCluster | None:
    """A pod of an indexed Job or JobSet. Only Kubernetes knows how many there are; jax asks it with the package `kubernetes`."""
    if not (env.get("KUBERNETES_SERVICE_HOST") and env.get("JOB_COMPLETION_INDEX")):
        return None
    asks = importlib.util.find_spec("kubernetes") is not None
    return DetectedCluster("Kubernetes job", None, None, _integer(env, "JOB_COMPLETION_INDEX"), asks_jax=asks)


def _may_use_tpu(env: Mapping[str, str]) -> bool:
    platforms = env.get("JAX_PLATFORMS")
    return not platforms or "tpu" in platforms.split(",")


def is_tpu_vm() -> bool:
    """True on a TPU VM of Google Cloud with libtpu installed: its metadata server knows the other hosts, and jax asks it."""
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")
    if os.environ.get("TPU_SKIP_MDS_QUERY") or not chips or importlib.util.find_spec("libtpu") is None:
        return False
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/agent-worker-number"
    for _ in range(3):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5) as response:
                return response.status == 200
        except urllib.error.HTTPError:
            return False  # a VM of another kind
        except OSError:
            time.sleep(1)
    return False


def _port(env: Mapping[str, str], job: int) -> int:
    """A port on which all processes of a job agree and that other jobs are unlikely to use."""
    return int(env.get("JAX_COORDINATOR_PORT") or MIN_PORT + job % NUM_PORTS)
