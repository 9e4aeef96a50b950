"""launch/tpu_vm.sh and tpu_worker.sh: a slice is made, trained on, made anew where it is taken; workers outlive a connection."""

import shutil

import pytest

from tests.support.launch_fakes import LAUNCH, SLICE, TRAIN, Place, dry, needs_tools, trainer_arguments

pytestmark = needs_tools

TASK = {"create": "tpu-vm create pod", "queue": "queued-resources create pod --node-id=pod", "delete": "tpu-vm delete pod"}


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def test_dry_runs(place):
    create, _, _, _, train, delete = dry(place, "tpu_vm.sh", "watch", "--dry_run", "--spot", *SLICE, "--", *TRAIN)
    assert create[1:5] == ["compute", "tpus", "tpu-vm", "create"] and "--spot" in create
    flags = trainer_arguments(train)
    assert flags["num_processes"] == 4 and flags["cache_dir"] and "--worker=all" in train and delete[4] == "delete"
    for task in ("queue", "status", "logs", "stop", "install", "delete"):
        assert all(command[0] in ("gcloud", "git") for command in dry(place, "tpu_vm.sh", task, "--dry_run", *SLICE))


# Hosts by type: cloud.google.com/tpu/docs, tables of v5e, v6e, v4 and v5p; v5e-16 is four hosts of four chips.
@pytest.mark.parametrize(
    "type, version, hosts",
    [
        ("v5litepod-8", "v2-alpha-tpuv5-lite", 1),
        ("v5litepod-256", "v2-alpha-tpuv5-lite", 64),
        ("v6e-16", "v2-alpha-tpuv6e", 4),
        ("v4-8", "tpu-ubuntu2204-base", 1),
        ("v4-32", "tpu-ubuntu2204-base", 4),
        ("v5p-128", "v2-alpha-tpuv5", 16),
    ],
)
def test_image_and_hosts_of_a_slice(place, type, version, hosts):
    create, *_, train, _ = dry(place, "tpu_vm.sh", "watch", "--dry_run", *SLICE, f"--type={type}", "--", *TRAIN)
    assert f"--version={version}" in create
    assert trainer_arguments(train)["num_processes"] == (hosts if hosts > 1 else None)


@pytest.mark.parametrize("task", TASK)
def test_gcloud_is_asked_once(place, task):
    place.have("gcloud")
    done = place.run("tpu_vm.sh", task, *SLICE, "--project=mine", AVSI_TPU_ZONE="elsewhere")
    assert done.returncode == 0, done.stderr
    ((_, *call),) = place.calls()
    assert " ".join(call).startswith(f"compute tpus {TASK[task]} ") and "--zone=here-1a" in call and "--project=mine" in call
    assert ("--accelerator-type=v5litepod-16" in call) == (task != "delete")


def verbs(place) -> list[str]:
    """What gcloud was asked, a word each; looks at the state left out."""
    found = []
    for call in (call for call in place.calls() if call[0] == "gcloud"):
        what = next(w for w in ("describe", "create", "delete", "scp", "ssh") if w in call)
        what = "install" if what == "ssh" and "worker.sh install" in call[-1] else "train" if what == "ssh" else what
        found += [what] if what not in ("describe", "scp") else []
    return found


@pytest.mark.parametrize(
    "codes, code, starts",
    [
        (["0 0 0 0"], 0, 1),
        (["143 2 143 143"], 2, 1),
        (["75 137 75 75", "lost", "0 0 0 0"], 0, 3),
        (["143 143 143 143", "75 137 75 75", "lost", "0 0 0 0"], 255, 3),
        (["0 0", "0 0 0 0"], 0, 2),  # two workers didn't say
        (["75 75 75 75"] * 9, 75, 3),
        (["130 130 130 130"], 130, 1),
    ],
    ids=str,
)
def test_a_pod_starts_again_where_that_helps(place, codes, code, starts):
    place.have("gcloud")
    place.tell(codes=codes)
    done = place.run("tpu_vm.sh", "run", *SLICE, "--restarts=2", "--pause=0", "--", *TRAIN)
    assert done.returncode == code, done.stderr
    assert verbs(place) == ["train"] * starts


def test_run_says_that_its_slice_was_taken(place):
    place.have("gcloud")
    place.tell(codes=["lost"], states=["PREEMPTED"])
    done = place.run("tpu_vm.sh", "run", *SLICE, "--pause=0", "--", *TRAIN)
    assert done.returncode == 143 and "PREEMPTED" in done.stderr and "watch" in done.stderr


def test_watch_makes_a_slice_anew(place):
    place.have("gcloud", "git")
    place.tell(
        states=["NONE", "CREATING", "READY", "PREEMPTED", "NONE", "NONE", "READY"],
        created=[0, 1, 0],  # the second time there is none to be had
        codes=["lost", "0 0 0 0"],
    )
    done = place.run("tpu_vm.sh", "watch", *SLICE, "--pause=0", "--spot", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    first, second = ["create", "install", "train", "delete"], ["create", "create", "install", "train", "delete"]
    assert verbs(place) == first + second, done.stderr
    assert all("--quiet" in call for call in place.calls() if "delete" in call)
    assert "slice pod is PREEMPTED" in done.stderr


def test_watch_of_a_queued_slice_leaves_it_where_only_a_person_helps(place):
    place.have("gcloud", "git")
    place.tell(
        states=["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "READY", "SUSPENDED", "NONE", "ACTIVE", "READY"],
        codes=["lost", "2 75 75 75"],
    )
    done = place.run("tpu_vm.sh", "watch", "--queued", *SLICE, "--pause=0", "--", *TRAIN)
    assert done.returncode == 2 and "still stands" in done.stderr, done.stderr
    assert verbs(place) == ["create", "install", "train", "delete", "create", "install", "train"]
    deleted = next(call for call in place.calls() if "delete" in call)
    assert "queued-resources" in deleted and "--force" in deleted


def workers(place, count: int) -> dict[str, str]:
    """Homes of `count` workers that have launch/, and the environment in which gcloud's stand-in runs them for real."""
    place.have("gcloud", "avsi-train")
    for worker in range(count):
        shutil.copytree(LAUNCH, place.folder / f"home{worker}" / "avsi_jax" / "launch")
    return {"WORKERS": str(count), "AVSI_TRAIN": "avsi-train"}


def test_workers_train_apart_from_the_connection(place):
    env = workers(place, 2)
    place.tell(plan_0=[143, 0], plan_1=[75, 0])
    done = place.run("tpu_vm.sh", "run", *SLICE, "--type=v4-16", "--pause=0", "--", *TRAIN, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    for worker in (0, 1):
        assert [trainer_arguments(s.split())["num_processes"] for s in place.lines(f"starts.{worker}")] == [2, 2]
    assert "75, starts again (1 of 100)" in done.stderr


def test_a_worker_is_found_again_and_stopped(place):
    env = workers(place, 1)
    place.tell(plan=["wait"])
    home = place.folder / "home0"
    worker, at_home = str(home / "avsi_jax/launch/tpu_worker.sh"), env | {"HOME": str(home)}
    first = place.start(worker, "run", "--attempt=1", "--", *TRAIN, **at_home)
    place.wait_for("waits.0")
    first.kill()  # the connection, not the training
    first.communicate(timeout=20)
    other = place.run(worker, "run", "--", "--config=base", **at_home)
    assert other.returncode == 2 and "other arguments" in other.stderr
    again = place.start(worker, "run", "--attempt=2", "--", *TRAIN, **at_home)
    assert "follows it" in again.stderr.readline()
    assert place.run(worker, "stop", **at_home).returncode == 0
    out, err = again.communicate(timeout=20)
    assert again.returncode == 130 and "left with code 130" in out, err
    late = place.run(worker, "run", "--attempt=1", "--", *TRAIN, **at_home)
    assert late.returncode == 130, "an attempt that has ended is told of, not started again"
    assert len(place.lines("starts.0")) == 1 and place.lines("told.0") == ["told"]
