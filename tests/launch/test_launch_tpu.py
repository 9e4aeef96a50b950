"""launch/tpu_vm.sh and tpu_worker.sh: slices are created and replaced after preemption; workers survive a lost connection."""

import shutil

import pytest

from tests.support.launch_fakes import LAUNCH, SLICE, TRAIN, FakeCommands, dry_run, needs_tools, trainer_arguments

pytestmark = needs_tools

TASK = {"create": "tpu-vm create pod", "queue": "queued-resources create pod --node-id=pod", "delete": "tpu-vm delete pod"}


@pytest.fixture
def fakes(tmp_path) -> FakeCommands:
    return FakeCommands(tmp_path)


def test_dry_runs_print_only_gcloud_and_git_commands(fakes):
    create, _, _, _, train, delete = dry_run(fakes, "tpu_vm.sh", "watch", "--dry_run", "--spot", *SLICE, "--", *TRAIN)
    assert create[1:5] == ["compute", "tpus", "tpu-vm", "create"] and "--spot" in create
    flags = trainer_arguments(train)
    assert flags["num_processes"] == 4 and flags["cache_dir"] and "--worker=all" in train and delete[4] == "delete"
    for task in ("queue", "status", "logs", "stop", "install", "delete"):
        assert all(command[0] in ("gcloud", "git") for command in dry_run(fakes, "tpu_vm.sh", task, "--dry_run", *SLICE))


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
def test_image_and_hosts_follow_from_the_type(fakes, type, version, hosts):
    create, *_, train, _ = dry_run(fakes, "tpu_vm.sh", "watch", "--dry_run", *SLICE, f"--type={type}", "--", *TRAIN)
    assert f"--version={version}" in create
    assert trainer_arguments(train)["num_processes"] == (hosts if hosts > 1 else None)


@pytest.mark.parametrize("task", TASK)
def test_each_task_calls_gcloud_once(fakes, task):
    fakes.add("gcloud")
    done = fakes.run("tpu_vm.sh", task, *SLICE, "--project=mine", AVSI_TPU_ZONE="elsewhere")
    assert done.returncode == 0, done.stderr
    ((_, *call),) = fakes.calls()
    assert " ".join(call).startswith(f"compute tpus {TASK[task]} ") and "--zone=here-1a" in call and "--project=mine" in call
    assert ("--accelerator-type=v5litepod-16" in call) == (task != "delete")


def verbs(fakes) -> list[str]:
    """The gcloud calls, as one word each, without queries of the state."""
    words = []
    for call in (call for call in fakes.calls() if call[0] == "gcloud"):
        verb = next(w for w in ("describe", "create", "delete", "scp", "ssh") if w in call)
        if verb == "ssh":
            verb = "install" if "worker.sh install" in call[-1] else "train"
        words += [verb] if verb not in ("describe", "scp") else []
    return words


@pytest.mark.parametrize(
    "codes, code, starts",
    [
        (["0 0 0 0"], 0, 1),
        (["143 2 143 143"], 2, 1),
        (["75 137 75 75", "lost", "0 0 0 0"], 0, 3),
        (["143 143 143 143", "75 137 75 75", "lost", "0 0 0 0"], 255, 3),
        (["0 0", "0 0 0 0"], 0, 2),  # two workers did not report
        (["75 75 75 75"] * 9, 75, 3),
        (["130 130 130 130"], 130, 1),
    ],
    ids=str,
)
def test_a_pod_is_restarted_if_that_helps(fakes, codes, code, starts):
    fakes.add("gcloud")
    fakes.script(codes=codes)
    done = fakes.run("tpu_vm.sh", "run", *SLICE, "--restarts=2", "--pause=0", "--", *TRAIN)
    assert done.returncode == code, done.stderr
    assert verbs(fakes) == ["train"] * starts


def test_run_reports_a_preempted_slice(fakes):
    fakes.add("gcloud")
    fakes.script(codes=["lost"], states=["PREEMPTED"])
    done = fakes.run("tpu_vm.sh", "run", *SLICE, "--pause=0", "--", *TRAIN)
    assert done.returncode == 143 and "PREEMPTED" in done.stderr and "watch" in done.stderr


def test_watch_replaces_a_preempted_slice(fakes):
    fakes.add("gcloud", "git")
    fakes.script(
        states=["NONE", "CREATING", "READY", "PREEMPTED", "NONE", "NONE", "READY"],
        created=[0, 1, 0],  # the second time none is available
        codes=["lost", "0 0 0 0"],
    )
    done = fakes.run("tpu_vm.sh", "watch", *SLICE, "--pause=0", "--spot", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    first, second = ["create", "install", "train", "delete"], ["create", "create", "install", "train", "delete"]
    assert verbs(fakes) == first + second, done.stderr
    assert all("--quiet" in call for call in fakes.calls() if "delete" in call)
    assert "slice pod is PREEMPTED" in done.stderr


def test_watch_keeps_the_slice_after_a_code_that_a_restart_does_not_help(fakes):
    fakes.add("gcloud", "git")
    fakes.script(
        states=["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "READY", "SUSPENDED", "NONE", "ACTIVE", "READY"],
        codes=["lost", "2 75 75 75"],
    )
    done = fakes.run("tpu_vm.sh", "watch", "--queued", *SLICE, "--pause=0", "--", *TRAIN)
    assert done.returncode == 2 and "still exists" in done.stderr, done.stderr
    assert verbs(fakes) == ["create", "install", "train", "delete", "create", "install", "train"]
    deleted = next(call for call in fakes.calls() if "delete" in call)
    assert "queued-resources" in deleted and "--force" in deleted


def workers(fakes, count: int) -> dict[str, str]:
    """Makes homes of `count` workers with launch/; returns the environment in which the fake gcloud runs tpu_worker.sh there."""
    fakes.add("gcloud", "avsi-train")
    for worker in range(count):
        shutil.copytree(LAUNCH, fakes.folder / f"home{worker}" / "avsi_jax" / "launch")
    return {"WORKERS": str(count), "AVSI_TRAIN": "avsi-train"}


def test_workers_run_the_training_for_gcloud(fakes):
    env = workers(fakes, 2)
    fakes.script(plan_0=[143, 0], plan_1=[75, 0])
    done = fakes.run("tpu_vm.sh", "run", *SLICE, "--type=v4-16", "--pause=0", "--", *TRAIN, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    for worker in (0, 1):
        assert [trainer_arguments(s.split())["num_processes"] for s in fakes.lines(f"starts.{worker}")] == [2, 2]
    assert "75, starts again (1 of 100)" in done.stderr


def test_a_worker_can_be_followed_again_and_stopped(fakes):
    env = workers(fakes, 1)
    fakes.script(plan=["wait"])
    home = fakes.folder / "home0"
    worker, at_home = str(home / "avsi_jax/launch/tpu_worker.sh"), env | {"HOME": str(home)}
    first = fakes.start(worker, "run", "--attempt=1", "--", *TRAIN, **at_home)
    fakes.wait_for("waits.0")
    first.kill()  # the connection, not the training
    first.communicate(timeout=20)
    other = fakes.run(worker, "run", "--", "--config=base", **at_home)
    assert other.returncode == 2 and "other arguments" in other.stderr
    again = fakes.start(worker, "run", "--attempt=2", "--", *TRAIN, **at_home)
    assert "follows it" in again.stderr.readline()
    assert fakes.run(worker, "stop", **at_home).returncode == 0
    out, err = again.communicate(timeout=20)
    assert again.returncode == 130 and "left with code 130" in out, err
    late = fakes.run(worker, "run", "--attempt=1", "--", *TRAIN, **at_home)
    assert late.returncode == 130, "an attempt that has ended is reported, not restarted"
    assert len(fakes.lines("starts.0")) == 1 and fakes.lines("terminated.0") == ["SIGTERM"]
