"""Two real processes are one training of four devices; and what a start looks like under each launcher, true or only looking so."""

import json
import signal
import time

import numpy as np
import pytest

from avsi_jax.runtime import distributed
from avsi_jax.runtime.distributed import DetectedCluster, detect, place
from tests.runtime import test_devices
from tests.support import processes
from tests.support.step_batches import make_batch

# ----------------------------------------------------------------------------------------------------------- two processes train

TRAIN = """
import json, os, signal, sys
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
from avsi_jax.runtime import distributed
topology = distributed.start("auto", timeout_s=60)
os.kill(os.getpid(), signal.SIGTERM)
import jax, numpy as np
from tests.runtime import test_devices as t
from avsi_jax.data import input_pipeline
from avsi_jax.runtime import devices
from tests.data.test_input_pipeline import Clips
devices.use_every_core(8)
topology.check()

rank, how = jax.process_index(), sys.argv[1]
batch, start = t.make_batch(), t.make_start(small=True)
mine = {k: v[4 * rank : 4 * rank + 4] for k, v in batch.items()}
state, metrics = t.train(devices.map_train_step(t.make_step(small=True), how=how), start, mine, rate=0.1, count=3, how=how)
found = {"topology": str(topology), "heard": len(heard), "metrics": metrics}
saved = devices.to_global(state)
for how in devices.WAYS:
    again = devices.replicate(saved, how)
    leaves = jax.tree.leaves(again.params)
    step = lambda params, batch: (devices.sum_over_devices(batch["weight"].sum()), {"hash": batch["id_hash"]})
    evaluate, met, counted = devices.map_evaluation_step(step, per_clip=True, how=how), [], 0
    for rows in input_pipeline.eval_batches(Clips(11), 8, process_index=rank, process_count=2):
        sums, clips = evaluate(again.params, devices.split(rows, how))
        counted += float(sums)
        met += [int(h) for h, w in zip(clips["hash"], rows["weight"]) if w]
    found[how] = {
        "pieces": [[np.asarray(s.data).ravel().tolist() for s in x.addressable_shards] for x in leaves],
        "global": [len(x.sharding.device_set) for x in jax.tree.leaves(saved)],
        "held": [len(x.sharding.device_set) for x in leaves],
        "met": met,
        "counted": counted,
    }
found["agreed"] = devices.agree([rank, 1, 5]).tolist(), np.asarray(devices.agree([2], wait=False)).tolist()
found["exact"] = devices.sum_over_processes([0.1 * (rank + 1), [1.0, 1e-17][rank]])
devices.barrier("the end")
print("RESULT " + json.dumps(found))
distributed.leave(143 if rank else 3)
"""


@pytest.fixture(scope="module", params=["shard_map", pytest.param("pmap", marks=pytest.mark.slow)])
def ranks(request):
    """What each of two processes of two devices found, trained one way (by pmap: test_pod.py); each leaves with its code."""
    finished = processes.run(["-c", TRAIN, request.param], 2, 2, timeout=400, JAX_DISABLE_MOST_OPTIMIZATIONS="true")
    assert [f.returncode for f in finished] == [3, 143], "\n".join(f.stderr[-3000:] for f in finished)
    return [json.loads(f.stdout.partition("RESULT ")[2].splitlines()[0]) for f in finished]


@pytest.fixture(scope="module")
def alone():
    """(parameters, metrics) of one process with four devices."""
    import jax

    from avsi_jax.runtime import devices

    step = devices.map_train_step(test_devices.make_step(small=True))
    start = test_devices.make_start(small=True)
    jax.config.update("jax_disable_most_optimizations", True)  # as the two: compiling is most of it
    state, metrics = test_devices.train(step, start, make_batch(), rate=0.1, count=3, how="pmap")
    jax.config.update("jax_disable_most_optimizations", False)
    return jax.device_get(state.params), metrics


def test_two_processes_train_as_one_does(ranks, alone):
    """Losses, norms of the gradients and parameters after three steps, on every device of both, held in either way."""
    import jax

    shapes = [x.shape for x in jax.tree.leaves(alone[0])]
    for how in ("pmap", "shard_map"):
        for rank in ranks:
            for device in (0, 1):
                params = [np.float32(pieces[device]).reshape(s) for pieces, s in zip(rank[how]["pieces"], shapes, strict=True)]
                test_devices.assert_same_training(alone, (params, rank["metrics"]))
        everywhere = [[p for rank in ranks for p in rank[how]["pieces"][leaf]] for leaf in range(len(shapes))]
        assert all(len(copies) == 4 and copies.count(copies[0]) == 4 for copies in everywhere), "replicas differ"


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_two_processes_evaluate_every_clip_once(ranks, how):
    from avsi_jax.data import input_pipeline

    met = [h for rank in ranks for h in rank[how]["met"]]
    assert sorted(met) == sorted(int(input_pipeline.id_hash(f"clip{k}")) for k in range(11))
    assert [rank[how]["counted"] for rank in ranks] == [11, 11]


@pytest.mark.parametrize(("how", "held"), [("pmap", 2), ("shard_map", 4)])
def test_the_state_in_its_two_forms(ranks, how, held):
    """Saved from all four devices, whatever a way trains on."""
    for rank in ranks:
        assert set(rank[how]["global"]) == {4} and set(rank[how]["held"]) == {held}


def test_processes_add_up(ranks):
    assert [rank["agreed"] for rank in ranks] == [[[1, 2, 10], [4]]] * 2, "each process counts once, not each device"
    assert [rank["exact"] for rank in ranks] == [[0.1 + 0.2, 1.0]] * 2


def test_the_topology_in_one_line(ranks):
    for number, rank in enumerate(ranks):
        text = rank["topology"]
        assert text.startswith(f"JAX_* variables: process {number} of 2, coordinator 127.0.0.1:")
        assert text.endswith(", 2 local of 4 devices") and "\n" not in text


def test_signals_still_come_to_whom_they_did(ranks):
    """jax takes SIGTERM when it joins: a training could no longer be told to stop."""
    assert [rank["heard"] for rank in ranks] == [1, 1]


LEAVE = """
import os, sys, time
from avsi_jax.runtime import distributed
try:
    distributed.start("on", timeout_s={timeout}, heartbeat_s=5)
except ValueError as error:
    print(error, file=sys.stderr)
    distributed.leave(2, wait_s=0)
print("joined", flush=True)
if os.environ["JAX_PROCESS_ID"] == "1":
    distributed.leave(2, wait_s=1)
time.sleep(100)
"""


def test_one_that_leaves_early_keeps_its_code_and_ends_the_others():
    """Neither hangs: jax's own exit would have waited for the other, and turned 2 into 134."""
    began = time.monotonic()
    other, early = processes.run(LEAVE.replace("{timeout}", "60"), processes=2, devices=1, timeout=90, patience=80)
    assert early.returncode == 2 and other.returncode == -signal.SIGABRT, other.stderr[-2000:]
    assert time.monotonic() - began < 80


@pytest.mark.parametrize("rank", [0, 1])
def test_others_that_never_come(rank):
    """One line that names the place and this process, and the exit code 2 of a mistake."""
    address = f"127.0.0.1:{processes.free_port()}"
    place = dict(zip(processes.COORDINATES, (address, "2", str(rank)), strict=True))
    (finished,) = processes.run(LEAVE.replace("{timeout}", "1"), processes=1, devices=1, **place)
    lines = [line for line in finished.stderr.splitlines() if "process" in line]
    assert finished.returncode == 2 and len(lines) == 1, finished.stderr
    assert lines[0].startswith(f"JAX_* variables: process {rank} of 2 waited 1 s at coordinator {address}: ")


# ---------------------------------------------------------------------------------------------------------------------- detecting

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
        (SLURM | {"SLURM_STEP_ID": "2"}, DetectedCluster("SLURM job 123", "nid001:61565", 4, 1)),  # two steps of a job beside each other
        (SLURM | {"JAX_COORDINATOR_PORT": "77"}, DetectedCluster("SLURM job 123", "nid001:77", 4, 1)),
        (GKE, DetectedCluster("TPU pod", "pod-0.svc:8482", 2, 1)),
        (GKE | MEGASCALE, DetectedCluster("TPU pod", "first.svc:8482", 6, 5)),
        (GKE | JAX, DetectedCluster("JAX_* variables", "a:1", 2, 1)),
        (OMPI_4 | SLURM, DetectedCluster("Open MPI", "10.96.0.1:62624", 4, 3, [1])),  # mpirun in an allocation
        (JOB | {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, DetectedCluster("Kubernetes job", "a:1", 2, 1)),
    ],
)  # fmt: skip
def test_clusters(env, expected):
    assert detect(env)._replace(asks_jax=False) == expected


@pytest.mark.parametrize(("env", "method"), [(OMPI_4, "ompi"), (SLURM, "slurm"), (SLURM | {"SLURM_PROCID": "3"}, "slurm")])
def test_as_jax_reads_them(env, method, monkeypatch):
    """Processes of ours meet those that another program of jax would start in the same job."""
    clusters = pytest.importorskip("jax._src.clusters")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    theirs = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, method, 1)
    assert tuple(detect(env))[1:4] == theirs[:3]


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "nid[001-004]"},  # salloc's shell, an sbatch script
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # the interactive step of an allocation of four tasks
        {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},  # srun of one task
        OMPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},  # a host of its own, or the TPU compiler on a CPU
        GKE | {"JAX_PLATFORMS": "cpu"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # any pod
        {"JAX_COORDINATOR_PORT": "1234"},
    ],
)
def test_what_only_looks_like_a_cluster(env):
    assert detect(env) is None and place("auto", {}, detect(env)) is None


@pytest.mark.parametrize("list_", ["nid001", "nid001,b2", "nid[001-015],b2", "nid[001,007-015],b2", "nid[001]"])
def test_the_first_of_slurms_nodes(list_):
    assert detect(SLURM | {"SLURM_STEP_NODELIST": list_}).coordinator == "nid001:61563"


def test_open_mpi_5_tells_its_address_on_one_machine_only():
    found = detect(OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-host-7@1"})
    host, port = found.coordinator.split(":")
    assert host == "127.0.0.1" and 61_440 <= int(port) < 65_536
    with pytest.raises(ValueError, match=r"Open MPI: not known is --coordinator; expected as flags, or as JAX_COORDINATOR_ADDRESS"):
        place("auto", {}, detect(OMPI))
    assert place("auto", {"coordinator": "b:5"}, detect(OMPI)) == DetectedCluster("Open MPI", "b:5", 4, 3, [1])


@pytest.mark.parametrize(
    ("tasks", "node", "local", "more", "expected"),
    [
        ("4(x2),2", "1", "3", {}, [3]),  # nothing known of the GPUs: one for each task, as jax takes them
        ("2(x2)", "0", "1", {"SLURM_GPUS_ON_NODE": "8"}, [4, 5, 6, 7]),
        ("2(x2)", "0", "0", {"CUDA_VISIBLE_DEVICES": "0,1"}, [0]),
        ("2(x2)", "0", "1", {"CUDA_VISIBLE_DEVICES": "3"}, None),  # bound to it already
        ("1(x4)", "3", "0", {"SLURM_GPUS_ON_NODE": "8"}, None),  # one task has them all; jax would take the first alone
        ("2(x2)", "0", "1", {"JAX_LOCAL_DEVICE_IDS": "6,7"}, None),
    ],
)
def test_tasks_of_one_node_share_its_gpus(tasks, node, local, more, expected):
    env = SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node, "SLURM_LOCALID": local}
    assert detect(env | more).local_device_ids == expected


def test_a_tpu_vm_is_asked_for_last():
    """Its other hosts are known to its metadata server only, which jax asks."""
    assert detect({}, tpu_vm=lambda: True) == DetectedCluster("TPU VM", None, None, None, asks_jax=True)
    assert place("auto", {"num_processes": 4}, detect({}, tpu_vm=lambda: True)).num_processes == 4
    assert detect(JAX, tpu_vm=pytest.fail).name == "JAX_* variables"
    assert detect({"JAX_PLATFORMS": "cpu"}, tpu_vm=pytest.fail) is None


# -------------------------------------------------------------------------------------------------------------------- refusing

FLAGS = {"coordinator": "a:1", "num_processes": 2, "process_id": 1}


def test_flags_stand_above_the_environment():
    assert place("auto", FLAGS, None) == DetectedCluster("flags", "a:1", 2, 1)
    assert place("on", {"coordinator": "b:5"}, detect(JAX)) == DetectedCluster("JAX_* variables", "b:5", 2, 1)
    assert place("auto", {"num_processes": 1}, None) is None


@pytest.mark.parametrize(
    ("mode", "given", "env", "message"),
    [
        ("on", {}, {}, "--distributed=on, but no cluster found; expected --coordinator, --num_processes and --process_id, or"),
        ("auto", {"num_processes": 3}, SLURM, "--num_processes=3, but SLURM job 123 says 4; expected the same"),
        ("auto", {"process_id": 0}, JAX, "--process_id=0, but JAX_[*] variables says 1"),
        ("auto", {"coordinator": "a:1"}, {}, "flags: not known is --num_processes and --process_id; .* as JAX_NUM_P"),
        ("auto", {"num_processes": 2}, {}, "not known is --coordinator and --process_id"),
        ("auto", {}, {"JAX_COORDINATOR_ADDRESS": "a:1"}, "not known is --num_processes and --process_id"),
        ("auto", {}, JAX | {"JAX_PROCESS_ID": "2"}, "found process 2 of 2; expected --process_id from 0 to below"),
        ("auto", {}, JAX | {"JAX_COORDINATOR_ADDRESS": "a"}, "found coordinator 'a', expected --coordinator=HOST:PORT"),
        ("auto", {}, JAX | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: found 'two', expected a whole number"),
    ],
)  # fmt: skip
def test_refusals_in_one_line(mode, given, env, message):
    with pytest.raises(ValueError, match=message) as error:
        place(mode, given, detect(env))
    assert "\n" not in str(error.value)


def test_off_is_one_process_whatever_there_is(monkeypatch):
    for name, value in JAX.items():
        monkeypatch.setenv(name, value)
    topology = distributed.start("off")
    topology.check()
    assert str(topology) == "one process, 4 devices"
    with pytest.raises(ValueError, match=r"--distributed=off, but --process_id given"):
        distributed.start("off", process_id=0)
    with pytest.raises(ValueError, match="--distributed: found 'maybe', expected auto, on, off"):
        distributed.start("maybe")


def test_as_many_processes_as_expected():
    with pytest.raises(ValueError, match="SLURM job 1: expected 4 processes, found devices of 1; "):
        distributed.Topology("SLURM job 1", "a:1", 4).check()


def test_one_process_alone_does_not_leave_by_itself():
    assert distributed.leave(3) is None
