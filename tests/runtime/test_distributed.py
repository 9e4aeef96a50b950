"""Two real processes train as one with four devices; and the detection of clusters from the environment of each launcher."""

import json
import signal

import numpy as np
import pytest

from avsi_jax.runtime import distributed
from avsi_jax.runtime.distributed import DetectedCluster, detect, resolve
from tests.support import gradient_descent, processes
from tests.support.step_batches import make_batch

# ----------------------------------------------------------------------------------------------------------- two processes train

TRAIN = """
import json, os, signal, sys
received = []
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
from avsi_jax.runtime import distributed
topology = distributed.start("auto", timeout_s=60)
os.kill(os.getpid(), signal.SIGTERM)
import jax, numpy as np
from tests.support import gradient_descent, step_batches
from avsi_jax.data import input_pipeline
from avsi_jax.runtime import devices
from tests.data.test_input_pipeline import Clips
devices.use_every_core(8)
topology.check()

rank, parallel = jax.process_index(), sys.argv[1]
batch, params = step_batches.make_batch(), gradient_descent.make_params(small=True)
own = {k: v[4 * rank : 4 * rank + 4] for k, v in batch.items()}
step = devices.map_train_step(gradient_descent.make_step(small=True), parallel=parallel)
state, metrics = gradient_descent.train(step, params, own, rate=0.1, count=3, parallel=parallel)
result = {"topology": str(topology), "signals": len(received), "metrics": metrics}
saved = devices.to_global(state)
for parallel in devices.PARALLEL_MODES:
    replicated = devices.replicate(saved, parallel)
    leaves = jax.tree.leaves(replicated.params)
    step = lambda params, batch: (devices.sum_over_devices(batch["weight"].sum()), {"hash": batch["id_hash"]})
    evaluate, evaluated, weight = devices.map_evaluation_step(step, per_clip=True, parallel=parallel), [], 0
    for rows in input_pipeline.eval_batches(Clips(11), 8, process_index=rank, process_count=2):
        sums, clips = evaluate(replicated.params, devices.split(rows, parallel))
        weight += float(sums)
        evaluated += [int(h) for h, w in zip(clips["hash"], rows["weight"]) if w]
    result[parallel] = {
        "shards": [[np.asarray(s.data).ravel().tolist() for s in x.addressable_shards] for x in leaves],
        "devices_when_saved": [len(x.sharding.device_set) for x in jax.tree.leaves(saved)],
        "devices": [len(x.sharding.device_set) for x in leaves],
        "evaluated": evaluated,
        "weight": weight,
    }
result["flags"] = devices.sum_flags([rank, 1, 5]).tolist(), np.asarray(devices.sum_flags([2], wait=False)).tolist()
result["exact"] = devices.sum_over_processes([0.1 * (rank + 1), [1.0, 1e-17][rank]])
devices.barrier("the end")
print("RESULT " + json.dumps(result))
distributed.leave(143 if rank else 3)
"""


@pytest.fixture(scope="module", params=[pytest.param(mode, marks=pytest.mark.slow) for mode in ("shard_map", "pmap")])
def ranks(request):
    """Results of two processes of two devices each, trained in one mode (by pmap: test_pod.py); each exits with its own code."""
    finished = processes.run(["-c", TRAIN, request.param], 2, 2, timeout=400, JAX_DISABLE_MOST_OPTIMIZATIONS="true")
    assert [f.returncode for f in finished] == [3, 143], "\n".join(f.stderr[-3000:] for f in finished)
    return [json.loads(f.stdout.partition("RESULT ")[2].splitlines()[0]) for f in finished]


@pytest.fixture(scope="module")
def single_process():
    """(parameters, metrics) of one process with four devices."""
    import jax

    from avsi_jax.runtime import devices

    step = devices.map_train_step(gradient_descent.make_step(small=True))
    params = gradient_descent.make_params(small=True)
    jax.config.update("jax_disable_most_optimizations", True)  # as in the two processes: most of the time is compilation
    state, metrics = gradient_descent.train(step, params, make_batch(), rate=0.1, count=3, parallel="pmap")
    jax.config.update("jax_disable_most_optimizations", False)
    return jax.device_get(state.params), metrics


def test_two_processes_train_as_one_does(ranks, single_process):
    """The same losses, gradient norms and parameters after three steps, on every device of both, replicated in either mode."""
    import jax

    shapes = [x.shape for x in jax.tree.leaves(single_process[0])]
    for parallel in ("pmap", "shard_map"):
        for rank in ranks:
            for device in (0, 1):
                shards = rank[parallel]["shards"]
                params = [np.float32(leaf[device]).reshape(shape) for leaf, shape in zip(shards, shapes, strict=True)]
                gradient_descent.assert_same_training(single_process, (params, rank["metrics"]))
        replicas = [[shard for rank in ranks for shard in rank[parallel]["shards"][leaf]] for leaf in range(len(shapes))]
        assert all(len(copies) == 4 and copies.count(copies[0]) == 4 for copies in replicas), "replicas differ"


@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_two_processes_evaluate_every_clip_once(ranks, parallel):
    from avsi_jax.data import input_pipeline

    evaluated = [h for rank in ranks for h in rank[parallel]["evaluated"]]
    assert sorted(evaluated) == sorted(int(input_pipeline.id_hash(f"clip{k}")) for k in range(11))
    assert [rank[parallel]["weight"] for rank in ranks] == [11, 11]


@pytest.mark.parametrize(("parallel", "count"), [("pmap", 2), ("shard_map", 4)])
def test_the_state_is_saved_from_all_devices_and_restored_to_those_of_the_mode(ranks, parallel, count):
    for rank in ranks:
        assert set(rank[parallel]["devices_when_saved"]) == {4} and set(rank[parallel]["devices"]) == {count}


def test_sums_over_processes_count_each_process_once(ranks):
    assert [rank["flags"] for rank in ranks] == [[[1, 2, 10], [4]]] * 2, "each process counts once, not each device"
    assert [rank["exact"] for rank in ranks] == [[0.1 + 0.2, 1.0]] * 2


def test_the_topology_is_described_in_one_line(ranks):
    for number, rank in enumerate(ranks):
        text = rank["topology"]
        assert text.startswith(f"JAX_* variables: process {number} of 2, coordinator 127.0.0.1:")
        assert text.endswith(", 2 local of 4 devices") and "\n" not in text


def test_signal_handlers_still_work_after_connecting(ranks):
    """jax takes over SIGTERM when it connects: a training could no longer be stopped."""
    assert [rank["signals"] for rank in ranks] == [1, 1]


LEAVE = """
import os, sys, time
from avsi_jax.runtime import distributed
try:
    distributed.start("on", timeout_s={timeout}, heartbeat_s=5)
except ValueError as error:
    print(error, file=sys.stderr)
    distributed.leave(2, wait_s=0)
print("connected", flush=True)
if os.environ["JAX_PROCESS_ID"] == "1":
    distributed.leave(2, wait_s=1)
time.sleep(100)
"""


@pytest.mark.slow
def test_a_process_that_leaves_early_keeps_its_exit_code_and_ends_the_others():
    """Neither hangs: jax's own exit would have waited for the other, and turned the 2 into 134."""
    other, early = processes.run(LEAVE.replace("{timeout}", "60"), processes=2, devices=1, timeout=90, patience=80)
    assert early.returncode == 2 and other.returncode == -signal.SIGABRT, other.stderr[-2000:]


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_processes_are_reported_in_one_line(rank):
    """It names the coordinator and this process; the exit code is 2."""
    address = f"127.0.0.1:{processes.free_port()}"
    place = dict(zip(processes.COORDINATES, (address, "2", str(rank)), strict=True))
    (finished,) = processes.run(LEAVE.replace("{timeout}", "1"), processes=1, devices=1, **place)
    lines = [line for line in finished.stderr.splitlines() if "process" in line]
    assert finished.returncode == 2 and len(lines) == 1, finished.stderr
    assert lines[0].startswith(f"JAX_* variables: process {rank} of 2 ") and address in lines[0]


# ---------------------------------------------------------------------------------------------------------------------- detection

JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
OMPI_4 = OMPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
OMPI_6 = OMPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,26::2]:43370"}
SLURM = {"SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "nid[001-004]", "SLURM_STEP_NUM_TASKS": "4",
         "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
         "SLURM_NODEID": "1"}  # fmt: skip
GKE = {"TPU_WORKER_HOSTNAMES": "pod-0.svc,pod-1.svc", "TPU_WORKER_ID": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
MEGASCALE = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "first.svc:8080"}
JOB = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (JAX, DetectedCluster("JAX_* variables", "a:1", 2, 1)),
        (OMPI_4, DetectedCluster("Open MPI", "10.96.0.1:62624", 4, 3, [1])),
        (OMPI_6, DetectedCluster("Open MPI", "[fe80::b9b]:62880", 4, 3, [1])),
        (SLURM, DetectedCluster("SLURM job 123", "nid001:61563", 4, 1)),
        (SLURM | {"SLURM_STEP_ID": "2"}, DetectedCluster("SLURM job 123", "nid001:61565", 4, 1)),  # simultaneous steps of one job
        (SLURM | {"JAX_COORDINATOR_PORT": "77"}, DetectedCluster("SLURM job 123", "nid001:77", 4, 1)),
        (GKE, DetectedCluster("TPU pod", "pod-0.svc:8482", 2, 1)),
        (GKE | MEGASCALE, DetectedCluster("TPU pod", "first.svc:8482", 6, 5)),
        (GKE | JAX, DetectedCluster("JAX_* variables", "a:1", 2, 1)),
        (OMPI_4 | SLURM, DetectedCluster("Open MPI", "10.96.0.1:62624", 4, 3, [1])),  # mpirun in an allocation
        (JOB | {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, DetectedCluster("Kubernetes job", "a:1", 2, 1)),
    ],
)  # fmt: skip
def test_clusters_are_detected(env, expected):
    assert detect(env)._replace(asks_jax=False) == expected


@pytest.mark.parametrize(("env", "method"), [(OMPI_4, "ompi"), (SLURM, "slurm"), (SLURM | {"SLURM_PROCID": "3"}, "slurm")])
def test_detection_agrees_with_jax(env, method, monkeypatch):
    """So our processes can connect to those of another jax program in the same job."""
    clusters = pytest.importorskip("jax._src.clusters")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    expected = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, method, 1)
    assert tuple(detect(env))[1:4] == expected[:3]


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "nid[001-004]"},  # salloc's shell, an sbatch script
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # the interactive step of an allocation of four tasks
        {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},  # srun of one task
        OMPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},  # a single host, or the TPU compiler on a CPU
        GKE | {"JAX_PLATFORMS": "cpu"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # any pod
        {"JAX_COORDINATOR_PORT": "1234"},
    ],
)
def test_environments_of_a_single_process_are_no_cluster(env):
    assert detect(env) is None and resolve("auto", {}, detect(env)) is None


@pytest.mark.parametrize("nodes", ["nid001", "nid001,b2", "nid[001-015],b2", "nid[001,007-015],b2", "nid[001]"])
def test_the_coordinator_is_the_first_of_slurms_nodes(nodes):
    assert detect(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator == "nid001:61563"


def test_the_coordinator_of_open_mpi_5_is_known_only_on_a_single_machine():
    cluster = detect(OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-host-7@1"})
    host, port = cluster.coordinator.split(":")
    assert host == "127.0.0.1" and 61_440 <= int(port) < 65_536
    with pytest.raises(ValueError, match=r"Open MPI: .*--coordinator.*JAX_COORDINATOR_ADDRESS"):
        resolve("auto", {}, detect(OMPI))
    assert resolve("auto", {"coordinator": "b:5"}, detect(OMPI)) == DetectedCluster("Open MPI", "b:5", 4, 3, [1])


@pytest.mark.parametrize(
    ("tasks", "node", "local", "more", "expected"),
    [
        ("4(x2),2", "1", "3", {}, [3]),  # number of GPUs unknown: one for each task, as jax does
        ("2(x2)", "0", "1", {"SLURM_GPUS_ON_NODE": "8"}, [4, 5, 6, 7]),
        ("2(x2)", "0", "0", {"CUDA_VISIBLE_DEVICES": "0,1"}, [0]),
        ("2(x2)", "0", "1", {"CUDA_VISIBLE_DEVICES": "3"}, None),  # already bound to one
        ("1(x4)", "3", "0", {"SLURM_GPUS_ON_NODE": "8"}, None),  # a single task uses all of them; jax would use only the first
        ("2(x2)", "0", "1", {"JAX_LOCAL_DEVICE_IDS": "6,7"}, None),
    ],
)
def test_tasks_of_one_node_share_its_gpus(tasks, node, local, more, expected):
    env = SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node, "SLURM_LOCALID": local}
    assert detect(env | more).local_device_ids == expected


def test_a_tpu_vm_is_detected_last():
    """Only its metadata server knows the other hosts, and jax asks it."""
    assert detect({}, tpu_vm=lambda: True) == DetectedCluster("TPU VM", None, None, None, asks_jax=True)
    assert resolve("auto", {"num_processes": 4}, detect({}, tpu_vm=lambda: True)).num_processes == 4
    assert detect(JAX, tpu_vm=pytest.fail).name == "JAX_* variables"
    assert detect({"JAX_PLATFORMS": "cpu"}, tpu_vm=pytest.fail) is None


# -------------------------------------------------------------------------------------------------------------------- errors

FLAGS = {"coordinator": "a:1", "num_processes": 2, "process_id": 1}


def test_flags_take_precedence_over_the_environment():
    assert resolve("auto", FLAGS, None) == DetectedCluster("flags", "a:1", 2, 1)
    assert resolve("on", {"coordinator": "b:5"}, detect(JAX)) == DetectedCluster("JAX_* variables", "b:5", 2, 1)
    assert resolve("auto", {"num_processes": 1}, None) is None


@pytest.mark.parametrize(
    ("mode", "flags", "env", "message"),
    [
        ("on", {}, {}, "--distributed=on.*--coordinator, --num_processes and --process_id"),
        ("auto", {"num_processes": 3}, SLURM, "--num_processes=3, .*SLURM job 123 says 4"),
        ("auto", {"process_id": 0}, JAX, "--process_id=0, .*JAX_[*] variables says 1"),
        ("auto", {"coordinator": "a:1"}, {}, "flags: --num_processes and --process_id .*JAX_NUM_P"),
        ("auto", {"num_processes": 2}, {}, "--coordinator and --process_id .*JAX_COORD"),
        ("auto", {}, {"JAX_COORDINATOR_ADDRESS": "a:1"}, "--num_processes and --process_id .*JAX_NUM_P"),
        ("auto", {}, JAX | {"JAX_PROCESS_ID": "2"}, "process 2 of 2; .*--process_id"),
        ("auto", {}, JAX | {"JAX_COORDINATOR_ADDRESS": "a"}, "coordinator 'a', expected --coordinator=HOST:PORT"),
        ("auto", {}, JAX | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: found 'two'"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_in_one_line(mode, flags, env, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve(mode, flags, detect(env))
    assert "\n" not in str(error.value)


def test_off_is_a_single_process_whatever_the_environment_says(monkeypatch):
    for name, value in JAX.items():
        monkeypatch.setenv(name, value)
    topology = distributed.start("off")
    topology.check()
    assert str(topology) == "one process, 4 devices"
    with pytest.raises(ValueError, match=r"--distributed=off.*--process_id"):
        distributed.start("off", process_id=0)
    with pytest.raises(ValueError, match="'maybe', expected auto, on, off"):
        distributed.start("maybe")


def test_another_number_of_processes_than_expected_is_refused():
    with pytest.raises(ValueError, match="SLURM job 1: expected 4 processes, .* 1; "):
        distributed.Topology("SLURM job 1", "a:1", 4).check()


def test_leave_returns_in_a_single_process():
    assert distributed.leave(3) is None
