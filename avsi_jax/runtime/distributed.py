"""Several processes that train as one: who they are, how they meet, and how one leaves. Before any device is asked for.

A training is told its place by flags (--coordinator, --num_processes, --process_id), by the variables of the same meaning
(JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), or by what started it: Open MPI, SLURM, a TPU pod, Kubernetes. What
started it is taken for a cluster only where more than one process was started: a login shell of SLURM is none. `detect` reads
the environment and nothing else; jax's own detection, which believes more, is asked only where a server must be (a TPU VM's
metadata, Kubernetes).

    topology = distributed.start(...)          # before devices.use_every_core, and before anything else that asks for devices
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
from collections.abc import Callable, Mapping
from typing import NamedTuple

MODES = ("auto", "on", "off")
FLAGS = ("coordinator", "num_processes", "process_id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
ALONE = "one process"

TPU_PORT, LOWEST_PORT, PORTS = 8482, 61_440, 4096  # as jax chooses them
MORE_S = 60  # jax ends the whole process where peers don't come in time: we are to give up before it does


class Missing(ValueError):
    """The other processes didn't come: they may when the same command is started again."""

    exit_code = 75  # EX_TEMPFAIL, as the watchdog's


class DetectedCluster(NamedTuple):
    """A cluster, and the place of this process in it. None is not known: by `asks_jax` jax finds it out from a server."""

    name: str
    coordinator: str | None  # host:port of process 0
    num_processes: int | None
    process_id: int | None
    local_device_ids: list[int] | None = None  # of the GPUs of this machine; None: all
    asks_jax: bool = False


class Topology(NamedTuple):
    """What `start` found. Its methods and its text ask for devices."""

    name: str
    coordinator: str | None
    expected: int | None  # processes; None: as many as jax finds

    def check(self) -> None:
        """ValueError where jax runs on another number of processes, or where they don't have as many devices each."""
        import jax

        if self.expected not in (None, jax.process_count()):
            raise ValueError(f"{self.name}: expected {self.expected} processes, found devices of {jax.process_count()}; "
                             "is the same command started on every host, with the same --distributed?")  # fmt: skip
        counts = Counter(d.process_index for d in jax.devices())
        if len(set(counts.values())) > 1:
            found = ", ".join(f"process {process} has {counts[process]}" for process in sorted(counts))
            raise ValueError(f"{self.name}: expected as many devices on each process, but {found}")

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
    """Joins the other processes, where there are any.

    mode: 'off' for one process whatever the environment says, 'on' where a cluster must be found, 'auto' to take what there is.
    The three flags stand above the environment; all three leave nothing to be found. `timeout_s`: how long to wait for the
    others; `heartbeat_s`: how long one may be silent until jax ends all others (by SIGABRT, so that they can be started again).
    ValueError, in one line, where flags and environment don't fit, or where the others don't come.
    """
    given = {k: v for k, v in zip(FLAGS, (coordinator, num_processes, process_id), strict=True) if v is not None}
    if mode not in MODES:
        raise ValueError(f"--distributed: found {mode!r}, expected {', '.join(MODES)}")
    if mode == "off" and given:
        raise ValueError(f"--distributed=off, but {_flags(given)} given; expected one or the other")
    found = None
    if mode != "off":
        found = place(mode, given, None if len(given) == len(FLAGS) else detect(os.environ, tpu_vm=is_tpu_vm))
    if found is None:
        return Topology(ALONE, None, 1)
    _join(found, timeout_s, heartbeat_s)
    return Topology(found.name, found.coordinator, found.num_processes)


def place(mode: str, given: dict, found: DetectedCluster | None) -> DetectedCluster | None:
    """The flags over what was found: everything a process must know, or None for one process alone."""
    if found is None and given in ({}, {"num_processes": 1}):
        if mode == "on":
            raise ValueError("--distributed=on, but no cluster found; expected --coordinator, --num_processes and --process_id, or "
                             "a start by SLURM (srun), Open MPI, Kubernetes or on a TPU pod")  # fmt: skip
        return None
    found = found or DetectedCluster("flags", None, None, None)
    for name in FLAGS[1:]:
        if name in given and getattr(found, name) not in (None, given[name]):
            raise ValueError(f"--{name}={given[name]}, but {found.name} says {getattr(found, name)}; expected the same")
    found = found._replace(**given)
    missing = [name for name in FLAGS if getattr(found, name) is None]
    if missing and not found.asks_jax:
        variables = ", ".join(VARIABLES[FLAGS.index(name)] for name in missing)
        raise ValueError(f"{found.name}: not known is {_flags(missing)}; expected as flags, or as {variables}; "
                         "or --distributed=off for one process alone")  # fmt: skip
    if found.num_processes == 1:
        return None
    if not missing and not 0 <= found.process_id < found.num_processes:
        raise ValueError(f"{found.name}: found process {found.process_id} of {found.num_processes}; "
                         "expected --process_id from 0 to below --num_processes")  # fmt: skip
    if found.coordinator and not re.fullmatch(r".+:\d+", found.coordinator):
        raise ValueError(f"{found.name}: found coordinator {found.coordinator!r}, expected --coordinator=HOST:PORT")
    return found


def _flags(names) -> str:
    return " and ".join(f"--{name}" for name in names)


def _join(found: DetectedCluster, timeout_s: float, heartbeat_s: int) -> None:
    """jax.distributed.initialize, in a thread: where the others don't come it would end the process instead of saying so."""
    import jax

    failed = []

    def initialise():
        try:
            jax.distributed.initialize(
                found.coordinator,
                found.num_processes,
                found.process_id,
                local_device_ids=found.local_device_ids,
                cluster_detection_method=None if None in found[1:4] else "deactivate",
                initialization_timeout=int(timeout_s + MORE_S),
                heartbeat_timeout_seconds=heartbeat_s,
                shutdown_timeout_seconds=MORE_S,
            )
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=initialise, daemon=True)
    thread.start()
    thread.join(timeout_s)
    _keep_signals()
    who = found.name if found.process_id is None else f"{found.name}: process {found.process_id} of {found.num_processes}"
    if thread.is_alive():
        silent = "the other processes didn't come" if found.process_id == 0 else "nobody answered, or not all processes came"
        raise Missing(f"{who} waited {timeout_s:g} s at coordinator {found.coordinator or 'unknown'}: {silent}; is the command "
                         "running on every host, and the port open? (--distributed=off is for one process alone)")  # fmt: skip
    if failed:
        raise Missing(f"{who} could not join at coordinator {found.coordinator or 'unknown'}: "
                         f"{str(failed[0]).strip().splitlines()[0][:200]}") from failed[0]  # fmt: skip


def _keep_signals() -> None:
    """jax takes SIGTERM to itself when it joins, and then nobody hears of it: back to whoever had it."""
    with contextlib.suppress(ValueError):  # not in the main thread: nobody has handlers there
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


def is_joined() -> bool:
    """Whether this is one of several processes."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def leave(code: int, *, wait_s: float | None = None) -> None:
    """Ends a process of several with its own exit code; returns where there is one process alone.

    At the end of the interpreter jax would wait for the others (a minute here, five by itself) and then abort with 134, whatever
    the code was. So: up to `wait_s` for the others to come here too, which is how all leave in peace; after that without them.
    None: 50 s after a success, which is everybody's, else 5 s. Where process 0 is gone first, jax aborts the others at once.
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


# -------------------------------------------------------------------------------------------------------------------- detecting


def detect(env: Mapping[str, str], *, tpu_vm: Callable[[], bool] = lambda: False) -> DetectedCluster | None:
    """What started this process, where it started others too; None: this process is alone. `tpu_vm` is asked last."""
    said = _variables(env)
    if len(said) == len(FLAGS):
        return DetectedCluster("JAX_* variables", **said)
    for find in (_open_mpi, _slurm, _tpu_hosts, _kubernetes):
        if found := find(env):
            return found._replace(**said)
    if _may_use_tpu(env) and tpu_vm():
        return DetectedCluster("TPU VM", None, None, None, asks_jax=True)._replace(**said)
    return DetectedCluster("JAX_* variables", *(said.get(name) for name in FLAGS)) if said else None


def _variables(env: Mapping[str, str]) -> dict:
    values = {flag: env[name] for flag, name in zip(FLAGS, VARIABLES, strict=True) if env.get(name)}
    return {flag: value if flag == "coordinator" else _number(env, VARIABLES[FLAGS.index(flag)]) for flag, value in values.items()}


def _number(env: Mapping[str, str], name: str, default: int = 0) -> int:
    try:
        return int(env.get(name) or default)
    except ValueError as error:
        raise ValueError(f"{name}: found {env[name]!r}, expected a whole number") from error


def _open_mpi(env: Mapping[str, str]) -> DetectedCluster | None:
    """mpirun. Version 4 says where it was started; of 5 the address is known only where all processes are on one machine."""
    count = _number(env, "OMPI_COMM_WORLD_SIZE")
    if count < 2:
        return None
    here, started = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1), env.get("OMPI_MCA_orte_hnp_uri", "")
    address = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", started)
    host = "127.0.0.1" if here == count else address and (address[1] or f"[{address[2]}]")
    job = int(started.partition(".")[0]) >> 12 if address else zlib.crc32(env.get("PMIX_NAMESPACE", "").encode())
    devices = share_of_devices(env, _number(env, "OMPI_COMM_WORLD_LOCAL_RANK"), here)
    return DetectedCluster("Open MPI", host and f"{host}:{_port(env, job)}", count, _number(env, "OMPI_COMM_WORLD_RANK"), devices)


def _slurm(env: Mapping[str, str]) -> DetectedCluster | None:
    """A step of more than one task. A batch script or a login shell is outside of any step, or is a step of one."""
    count = _number(env, "SLURM_STEP_NUM_TASKS") or _number(env, "SLURM_NTASKS")
    if count < 2 or not all(env.get(k) for k in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")):
        return None
    host = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", env["SLURM_STEP_NODELIST"]).split(",")[0]  # a[01-03,7],b -> a01
    job, step = _number(env, "SLURM_JOB_ID"), _number(env, "SLURM_STEP_ID")
    devices = share_of_devices(env, _number(env, "SLURM_LOCALID"), slurm_tasks_here(env))
    return DetectedCluster(f"SLURM job {job}", f"{host}:{_port(env, job + step)}", count, _number(env, "SLURM_PROCID"), devices)


def slurm_tasks_here(env: Mapping[str, str]) -> int:
    """Tasks of this step on this node, of e.g. '4(x2),3': four on each of the first two nodes, three on the next."""
    tasks = []
    for part in filter(None, env.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(times or 1)
    node = _number(env, "SLURM_NODEID")
    return tasks[node] if node < len(tasks) else 1


def share_of_devices(env: Mapping[str, str], rank: int, count: int) -> list[int] | None:
    """The GPUs of one of `count` processes of a machine; None for all that it sees: one process, or each sees only its own."""
    if count < 2 or env.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    visible = env.get("CUDA_VISIBLE_DEVICES")
    devices = len(visible.split(",")) if visible else _number(env, "SLURM_GPUS_ON_NODE", count)
    each = devices // count
    return list(range(rank * each, (rank + 1) * each)) or None


def _tpu_hosts(env: Mapping[str, str]) -> DetectedCluster | None:
    """The hosts of a TPU slice, of one slice or several, as GKE names them."""
    hosts = [h for h in (env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")).split(",") if h]
    slices = _number(env, "MEGASCALE_NUM_SLICES", 1)
    if len(hosts) * slices < 2 or not _may_use_tpu(env):
        return None
    first = (env.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).partition(":")[0]
    process = _number(env, "TPU_WORKER_ID") + _number(env, "MEGASCALE_SLICE_ID") * len(hosts) if env.get("TPU_WORKER_ID") else None
    return DetectedCluster("TPU pod", f"{first}:{env.get('JAX_COORDINATOR_PORT') or TPU_PORT}", len(hosts) * slices, process)


def _kubernetes(env: Mapping[str, str]) -> DetectedCluster | None:
    """A pod of an indexed Job or JobSet. How many there are only Kubernetes knows; jax asks it, by the package of that name."""
    if not (env.get("KUBERNETES_SERVICE_HOST") and env.get("JOB_COMPLETION_INDEX")):
        return None
    asks = importlib.util.find_spec("kubernetes") is not None
    return DetectedCluster("Kubernetes job", None, None, _number(env, "JOB_COMPLETION_INDEX"), asks_jax=asks)


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
            with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5) as answer:
                return answer.status == 200
        except urllib.error.HTTPError:
            return False  # a VM of another kind
        except OSError:
            time.sleep(1)
    return False


def _port(env: Mapping[str, str], job: int) -> int:
    """One that all processes of a job agree on and that other jobs are unlikely to take."""
    return int(env.get("JAX_COORDINATOR_PORT") or LOWEST_PORT + job % PORTS)
