"""launch/: the scripts are sound, what they would run is what the tools and avsi-train take, and they start again when that helps.

gcloud, kubectl, srun and the trainer are stand-ins on a PATH that has nothing of the kind; the loops, signals and files are real.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

import configs
from avsi_jax import train

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
TOOLS = "bash cat date dirname env flock git grep hostname mkdir mktemp mv nohup rm sed setsid sleep tail tee touch true wc".split()
pytestmark = pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {' '.join(TOOLS)}")

TRAIN = "--config=tiny --workdir=gs://bucket/run --config.data_dir=gs://bucket/data --config.batch_size=64".split()
SLICE = "--name=pod --zone=here-1a --type=v5litepod-16".split()
GKE = "--name=avsi --image=registry/avsi_jax:1 --accelerator=tpu-v5-lite-podslice --topology=4x4".split()

# Leaves as line START of `plan` says (`plan.R` for process R): with a code, by a signal's name, or once it is told to ("wait");
# "deaf" doesn't listen. 0 where there is no such line.
TRAINER = r"""#!/usr/bin/env bash
rank=${RANK:-0}
for given in "$@"; do case $given in --process_id=*) rank=${given#*=} ;; esac; done
echo "$*" >> "$FAKE/starts.$rank"
trap 'echo told >> "$FAKE/told.$rank"; kill $! 2> /dev/null; exit 143' TERM
plan=$FAKE/plan.$rank; [ -f "$plan" ] || plan=$FAKE/plan
todo=$(sed -n "$(wc -l < "$FAKE/starts.$rank")p" "$plan")
echo "trainer $rank does ${todo:=0}"
case $todo in
  wait) sleep 30 & touch "$FAKE/waits.$rank"; wait $! ;;
  deaf) trap '' TERM; sleep 30 ;;
  [A-Z]*) kill "-$todo" $$; sleep 30 ;;
  *) sleep "${SLOWLY:-0}"; exit "$todo" ;;
esac
"""

# Notes its arguments in `calls`; answers from the next line of states, codes (one a worker, or "lost"), created.
COMMAND = r"""#!/usr/bin/env bash
{ printf '%s\x1f' "${0##*/}" "$@"; printf '\x1e'; } >> "$FAKE/calls"
next() { echo . >> "$FAKE/$1.asked"; sed -n "$(wc -l < "$FAKE/$1.asked")p" "$FAKE/$1" 2> /dev/null; }
last=${!#}
case "${0##*/} $*" in
  *" describe "*)
    state=$(next states)
    [ "$state" != NONE ] || { echo 'ERROR: (gcloud) NOT_FOUND: Resource was not found' >&2; exit 1; }
    echo "${state:-READY}" ;;
  *"tpu_worker.sh run"*)
    if [ -n "$WORKERS" ]; then
      for ((worker = 0; worker < WORKERS; worker++)); do
        (cd "$FAKE/home$worker" && export HOME=$PWD RANK=$worker && bash -c "${last#--command=}") &
      done
      wait; exit 0
    fi
    codes=$(next codes)
    [ "$codes" != lost ] || exit 255
    for code in $codes; do echo "avsi-worker: host left with code $code"; done
    for code in $codes; do ((code == 0)) || exit "$code"; done ;;
  *" create "*) exit "$(next created || echo 0)" ;;
  srun*) exec "${TRAINER_OF_SRUN}" "$@" ;;
  squeue*) cat "$FAKE/job" ;;
  kubectl*apply*) cat > "$FAKE/applied" ;;
esac
"""

SCRIPTS = ["local.sh", "gpu_host.sh", "tpu_vm.sh", "tpu_worker.sh", "gke.sh", "slurm.sbatch"]


class Place:
    """A folder with stand-ins, what they are to do, and what they were asked."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.env = {"PATH": str(self.bin), "HOME": str(folder), "FAKE": str(folder), "AVSI_PAUSE_S": "0.01", "WORKERS": "",
                    "AVSI_LOOK_S": "0.05", "TRAINER_OF_SRUN": str(self.bin / "avsi-train")}  # fmt: skip
        self.tell(plan=[])

    def have(self, *commands: str) -> None:
        for command in commands:
            file = self.bin / command
            file.unlink(missing_ok=True)  # a link to the machine's own: writing would go through it
            file.write_text(TRAINER if command == "avsi-train" else COMMAND)
            file.chmod(0o755)

    def tell(self, **lines: list) -> None:
        for name, values in lines.items():
            (self.folder / name.replace("_", ".")).write_text("".join(f"{value}\n" for value in values))

    def lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []

    def calls(self) -> list[list[str]]:
        text = (self.folder / "calls").read_text() if (self.folder / "calls").exists() else ""
        return [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]

    def start(self, script: str, *args: str, **env: str) -> subprocess.Popen:
        command = ["bash", str(LAUNCH / script), *map(str, args)]
        return subprocess.Popen(command, env=self.env | env, cwd=self.folder, text=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        process = self.start(script, *args, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 20
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"{names}: not all there after 20 s"
            time.sleep(0.02)


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def shell(text: str) -> str:
    command = ["bash", "-c", f"set -euo pipefail; source {shlex.quote(str(LAUNCH / 'common.sh'))}; {text}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- the scripts as such ---------------------------------------------------------------------------------------------------------


def test_shellcheck_has_nothing_to_say():
    files = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
    command = [Path(sysconfig.get_path("scripts")) / "shellcheck", *(f.relative_to(ROOT) for f in files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_wrong_arguments(place, script):
    told = place.run(script, "--help")
    assert told.returncode == 0 and script in told.stdout and not told.stderr
    for arguments in (["--no_such_flag=1"], ["run", "--no_such_flag=1"], []):
        wrong = place.run(script, *arguments)
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1, wrong.stderr
        assert "found" in wrong.stderr and "expected" in wrong.stderr and not wrong.stdout


@pytest.mark.parametrize(
    "script, arguments, names",
    [
        ("tpu_vm.sh", ["create", "--zone=z", "--type=v4-8"], "--name"),
        ("tpu_vm.sh", ["create", "--name=n", "--type=v4-8"], "--zone"),
        ("tpu_vm.sh", ["create", "--name=n", "--zone=z"], "--type"),
        ("tpu_vm.sh", ["create", "--name=n", "--zone=z", "--type=h100-8"], "h100-8"),
        ("tpu_vm.sh", ["run", *SLICE], "--workdir"),
        ("tpu_vm.sh", ["run", *SLICE, "--", "--workdir=/srv/run", "--config.data_dir=gs://b/d"], "/srv/run"),
        ("tpu_vm.sh", ["run", *SLICE, "--", "--workdir=gs://b/run"], "--config.data_dir"),
        ("tpu_vm.sh", ["create", *SLICE], "gcloud"),
        ("gke.sh", ["apply", *GKE[:1], "--", *TRAIN], "kubectl"),
        ("gke.sh", ["apply", "--dry_run", *GKE[:1], "--", *TRAIN], "--image"),
        ("gke.sh", ["apply", "--dry_run", *GKE, "--topology=2x2x4", "--", *TRAIN], "2x2x4"),
        ("gke.sh", ["apply", "--dry_run", *GKE, "--chips_per_host=3", "--", *TRAIN], "--chips_per_host"),
        ("gke.sh", ["apply", "--dry_run", *GKE, "--name=A b", "--", *TRAIN], "A b"),
        ("gke.sh", ["apply", "--dry_run", *GKE, "--", *TRAIN, "a\nb"], "line break"),
        ("local.sh", ["--processes=two", "--", *TRAIN], "two"),
        ("local.sh", ["--", *TRAIN], "avsi-train"),
        ("gpu_host.sh", ["--gpus=0,,1", "--", *TRAIN], "0,,1"),
        ("gpu_host.sh", ["--", "--config=tiny"], "--workdir"),
        ("slurm.sbatch", ["--", *TRAIN], "SLURM_JOB_ID"),
    ],
)
def test_what_is_missing_or_wrong_is_told_in_one_line(place, script, arguments, names):
    done = place.run(script, *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and names in done.stderr, done.stderr
    assert "found" in done.stderr and "expected" in done.stderr


def test_the_rule_of_when_to_start_again():
    again = set(map(int, shell("for c in {0..255}; do if restartable $c; then echo $c; fi; done").split()))
    assert {75, 143, 137, 134, 139} <= again and not again & {0, 1, 2, 126, 127, 130, 255}
    assert again == {75} | {128 + number for number in range(1, 65)} - {128 + signal.SIGINT}


@pytest.mark.parametrize(
    "codes, worst",
    [("0 0", 0), ("0 143", 143), ("143 75", 75), ("1 143", 143), ("75 137", 137), ("137 2 75", 2), ("0 1", 1), ("", 0)],
)
def test_the_worst_code_speaks_for_all(codes, worst):
    assert int(shell(f"worst_of {codes}")) == worst


# ---- what they would run ---------------------------------------------------------------------------------------------------------


def trainer_arguments(command: list[str]) -> dict:
    """The flags of avsi-train in a command, read as it reads them: those that it does not have are an error."""
    if any("tpu_worker.sh run" in word for word in command):
        command = shlex.split(command[-1].removeprefix("--command=").partition(" -- ")[2])
    first = next(i for i, word in enumerate(command) if word.startswith("--config="))
    known, rest = train.parse(command[first:])
    configs.load(known.config, configs.split_overrides(rest), like="base")
    return vars(known)


def dry(place, script, *arguments) -> list[list[str]]:
    done = place.run(script, *arguments)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_dry_runs_of_one_machine(place):
    first, second = dry(place, "local.sh", "--dry_run", "--devices=2", "--", *TRAIN)
    assert first[:3] == ["env", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=2"]
    flags = [trainer_arguments(command) for command in (first, second)]
    assert [f["process_id"] for f in flags] == [0, 1] and len({f["coordinator"] for f in flags}) == 1
    assert {f["num_processes"] for f in flags} == {2}
    gpus = dry(place, "local.sh", "--dry_run", "--gpus", "--processes=3", "--", *TRAIN)
    assert [command[2] for command in gpus] == [f"CUDA_VISIBLE_DEVICES={i}" for i in range(3)]
    (host,) = dry(place, "gpu_host.sh", "--dry_run", "--gpus=0,2", "--", *TRAIN)
    assert host[:4] == ["env", "JAX_PLATFORMS=cuda", "CUDA_VISIBLE_DEVICES=0,2", "avsi-train"]
    assert trainer_arguments(host)["distributed"] == "off"


def test_dry_runs_of_clusters(place):
    step, requeue = dry(place, "slurm.sbatch", "--dry_run", "--", *TRAIN)
    assert step[0] == "srun" and trainer_arguments(step)["num_processes"] == 2 and requeue[:2] == ["scontrol", "requeue"]
    create, _, _, _, train, delete = dry(place, "tpu_vm.sh", "watch", "--dry_run", "--spot", *SLICE, "--", *TRAIN)
    assert create[1:5] == ["compute", "tpus", "tpu-vm", "create"] and "--spot" in create
    flags = trainer_arguments(train)
    assert flags["num_processes"] == 4 and flags["cache_dir"] and "--worker=all" in train and delete[4] == "delete"
    for task in ("queue", "status", "logs", "stop", "install", "delete"):
        assert all(command[0] in ("gcloud", "git") for command in dry(place, "tpu_vm.sh", task, "--dry_run", *SLICE))
    for task in ("status", "logs", "delete"):
        assert all(command[0] == "kubectl" for command in dry(place, "gke.sh", task, "--dry_run", "--name=avsi"))


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


# ---- Kubernetes ------------------------------------------------------------------------------------------------------------------

NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"}


def closed(required: str = "", **properties) -> dict:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


# The fields of jobset.x-k8s.io/v1alpha2 that a training may use, as its CRD and webhook have them; the Job in it is checked apart.
REASONS = "BackoffLimitExceeded DeadlineExceeded FailedIndexes MaxFailedIndexesExceeded PodFailurePolicy".split()
RULE = closed(
    "name action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", "maxLength": 128},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons={"type": "array", "items": {"enum": REASONS}},
    targetReplicatedJobs={"type": "array", "items": NAME},
)
JOBSET = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed("name", name=NAME, annotations={"type": "object", "additionalProperties": {"type": "string"}}),
    spec=closed(
        "replicatedJobs",
        network=closed(enableDNSHostnames={"type": "boolean"}, publishNotReadyAddresses={"type": "boolean"}, subdomain=NAME),
        failurePolicy=closed(
            maxRestarts={"type": "integer", "minimum": 0},
            restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
            rules={"type": "array", "items": RULE},
        ),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": closed("name template", name=NAME, replicas={"type": "integer", "minimum": 1}, template={"type": "object"}),
        },
        suspend={"type": "boolean"},
        ttlSecondsAfterFinished={"type": "integer", "minimum": 0},
    ),
)


def job_of(text: str) -> dict:
    """The Job in a filled-in jobset.yaml, once both are known to be sound."""
    jobset = yaml.safe_load(text)
    jsonschema.Draft202012Validator(JOBSET).validate(jobset)
    template = jobset["spec"]["replicatedJobs"][0]["template"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, **template}
    kubernetes_validate.validate(job, "1.30", strict=True)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "train"}, "spec": job["spec"]["template"]["spec"]}
    kubernetes_validate.validate(pod, "1.30", strict=True)
    return job["spec"]


def test_the_jobset(place):
    odd = ["--config.notes=" + text for text in ['say "so"', "back\\slash", "a: b # c", "$(HOME)"]]
    done = place.run("gke.sh", "apply", "--dry_run", "--spot", *GKE, "--", *TRAIN, *odd)
    assert done.returncode == 0 and "${" not in done.stdout, done.stderr
    job = job_of(done.stdout)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"] == 4 and job["backoffLimit"] == 0 and job["completionMode"] == "Indexed"
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    prefix = "cloud.google.com/gke-"
    wanted = {"tpu-accelerator": "tpu-v5-lite-podslice", "tpu-topology": "4x4", "spot": "true"}
    assert pod["nodeSelector"] == {prefix + key: value for key, value in wanted.items()}
    assert pod["terminationGracePeriodSeconds"] == 45 and pod["restartPolicy"] == "Never"
    assert [argument.replace("$$(", "$(") for argument in container["args"][len(TRAIN) :][:4]] == odd
    flags = trainer_arguments([a for a in container["args"] if "notes" not in a])
    assert flags["num_processes"] == 4 and flags["distributed"] == "on"
    assert flags["cache_dir"] == container["volumeMounts"][0]["mountPath"]


def test_the_jobset_starts_again_by_the_same_rule(place):
    text = place.run("gke.sh", "apply", "--dry_run", *GKE, "--restarts=7", "--", *TRAIN).stdout
    (rule,) = job_of(text)["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert rule["action"] == "FailJob" and codes["operator"] == "NotIn" and codes["containerName"] == "train"
    again = set(map(int, shell("for c in {0..255}; do if restartable $c; then echo $c; fi; done").split()))
    assert {75, 143, 137, 134, 139} <= set(codes["values"]) <= again
    policy = yaml.safe_load(text)["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7 and policy["rules"][0]["action"] == "FailJobSet"


# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: topology, hosts, chips of each.
@pytest.mark.parametrize(
    "accelerator, topology, hosts, chips",
    [
        ("tpu-v5-lite-podslice", "2x2", 1, 4),
        ("tpu-v5-lite-podslice", "2x4", 1, 8),
        ("tpu-v6e-slice", "16x16", 64, 4),
        ("tpu-v4-podslice", "2x2x4", 4, 4),
        ("tpu-v5p-slice", "4x4x4", 16, 4),
        ("tpu7x", "2x2x1", 1, 4),
    ],
)
def test_hosts_of_a_topology(place, accelerator, topology, hosts, chips):
    place.have("kubectl")
    done = place.run("gke.sh", "apply", *GKE, f"--accelerator={accelerator}", f"--topology={topology}", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert place.calls() == [["kubectl", "apply", "--filename=-"]]
    job = job_of((place.folder / "applied").read_text())
    assert job["parallelism"] == hosts
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_the_image_has_what_setup_takes():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]}
    assert copied == {"pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints", "avsi_jax", "tfds_grid", "configs"}
    assert all((ROOT / name).exists() for name in copied)
    assert json.loads(lines[-2].removeprefix("ENTRYPOINT "))[-1] == "avsi-train"


# ---- what they do ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, code, starts",
    [
        ([0], 0, 1),
        ([2], 2, 1),
        ([1], 1, 1),
        ([75, 143, "KILL", 0], 0, 4),
        (["ABRT", 2], 2, 2),
        ([75] * 9, 75, 4),
    ],
    ids=str,
)
def test_one_process_starts_again_where_that_helps(place, plan, code, starts):
    place.have("avsi-train")
    place.tell(plan=plan)
    done = place.run("gpu_host.sh", "--restarts=3", "--", *TRAIN)
    assert done.returncode == code, done.stderr
    assert place.lines("starts.0") == [" ".join([*TRAIN, "--distributed=off"])] * starts
    assert done.stderr.count("starts again") == starts - 1


def test_a_long_start_is_no_failure(place):
    place.have("avsi-train")
    place.tell(plan=[75] * 4)
    done = place.run("gpu_host.sh", "--restarts=1", "--", *TRAIN, AVSI_LONG_RUN_S="0")
    assert done.returncode == 0 and len(place.lines("starts.0")) == 5, done.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_one_process_is_passed_on_once(place, number, code):
    place.have("avsi-train")
    place.tell(plan=["wait"])
    process = place.start("gpu_host.sh", "--", *TRAIN)
    place.wait_for("waits.0")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert place.lines("told.0") == ["told"] and len(place.lines("starts.0")) == 1


def test_local_one_dies_and_all_start_again(place):
    place.have("avsi-train")
    place.tell(plan_0=["KILL", 75, 0], plan_1=["wait", "wait", 0])
    done = place.run("local.sh", "--logs=logs", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "137, starts again (1 of 20)" in done.stderr and "75, starts again (2 of 20)" in done.stderr
    flags = [[dict(w[2:].split("=", 1) for w in line.split()) for line in place.lines(f"starts.{rank}")] for rank in (0, 1)]
    ports = [[start["coordinator"] for start in starts] for starts in flags]
    assert len(ports[0]) == 3 and ports[0] == ports[1], "all starts of one attempt meet at one port"
    assert (place.folder / "logs" / "rank1.log").read_text().count("trainer 1 does") == 3
    assert sorted(set(done.stdout.splitlines())) == sorted(
        [f"[0] trainer 0 does {todo}" for todo in ("KILL", 75, 0)] + [f"[1] trainer 1 does {todo}" for todo in ("wait", 0)]
    )


@pytest.mark.parametrize("plans, code", [([2, "wait"], 2), ([0, 1], 1), ([2, 75], 2), (["wait", 130], 130), ([0, 0], 0)], ids=str)
def test_local_ends_with_the_worst_code(place, plans, code):
    place.have("avsi-train")
    place.tell(plan_0=plans[:1], plan_1=plans[1:])
    done = place.run("local.sh", "--", *TRAIN)
    assert done.returncode == code, done.stderr
    assert len(place.lines("starts.0")) == len(place.lines("starts.1")) == 1


def test_local_kills_who_does_not_leave(place):
    place.have("avsi-train")
    place.tell(plan_0=["deaf", 0], plan_1=["KILL", 0])
    began = time.monotonic()
    done = place.run("local.sh", "--grace=0", "--", *TRAIN)
    assert done.returncode == 0 and "process 0 has not left within 0 s" in done.stderr, done.stderr
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_local_passes_signals_on_to_all(place, number, code):
    place.have("avsi-train")
    place.tell(plan=["wait"])
    process = place.start("local.sh", "--", *TRAIN)
    place.wait_for("waits.0", "waits.1")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert place.lines("told.0") == place.lines("told.1") == ["told"] and "starts again" not in err


TASK = {"create": "tpu-vm create pod", "queue": "queued-resources create pod --node-id=pod", "delete": "tpu-vm delete pod"}


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


def test_the_header_of_the_batch_job():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--requeue", "--open-mode=append", "--signal=B:TERM@120", "--ntasks-per-node=1"} <= set(options)
    assert lines[1].startswith("#SBATCH"), "Slurm reads them up to the first command"


@pytest.mark.parametrize(
    "todo, state, count, code, requeued",
    [
        (0, "RUNNING", 0, 0, False),
        (2, "RUNNING", 0, 2, False),
        (143, "RUNNING", 0, 143, True),
        (75, "RUNNING", 99, 75, True),
        (75, "RUNNING", 100, 75, False),
        ("KILL", "RUNNING", 0, 137, True),
        (143, "COMPLETING", 0, 143, False),
    ],
)
def test_a_batch_job_is_queued_anew_where_that_helps(place, todo, state, count, code, requeued):
    place.have("srun", "scontrol", "squeue", "avsi-train")
    place.tell(plan=[todo], job=[state])
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_RESTART_COUNT": str(count), "SLURM_SUBMIT_DIR": str(ROOT)}
    done = place.run("slurm.sbatch", "--", *TRAIN, **job)
    assert done.returncode == code, done.stderr
    assert (["scontrol", "requeue", "7"] in place.calls()) == requeued
    (step,) = [call for call in place.calls() if call[0] == "srun"]
    assert trainer_arguments(step)["num_processes"] == 4


def test_a_batch_job_passes_its_warning_on(place):
    place.have("srun", "scontrol", "squeue", "avsi-train")
    place.tell(plan=["wait"], job=["RUNNING"])
    spooled = shutil.copy(LAUNCH / "slurm.sbatch", place.folder / "slurm_script")  # as Slurm runs it
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    process = place.start(spooled, "--", *TRAIN, **job)
    place.wait_for("waits.0")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 143 and place.lines("told.0") == ["told"], err
    assert place.calls()[-1] == ["scontrol", "requeue", "7"]


# ---- for real --------------------------------------------------------------------------------------------------------------------


def find_process(*words: str) -> int | None:
    """The number of a Python whose command line has these words."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:  # it has ended meanwhile
            continue
        if "python" in command[0] and all(word in command for word in words):
            return int(folder.name)
    return None


def wait_until(what, *, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_a_training_in_two_processes_told_to_stop_and_killed(place, tiny_dir, tmp_path):
    """SIGTERM to the launcher, the same command again, SIGKILL to process 1: the metrics of a training that nothing befell."""
    import csv

    (place.bin / "python").symlink_to(sys.executable)
    sizes = ["units=8", "bottleneck=8", "batch_size=4", "epochs=6", "checkpoint_every=1"]
    fields = [f"--config.{size}" for size in sizes] + [f"--config.data_dir={tiny_dir}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "AVSI_TRAIN": f"{sys.executable} -m avsi_jax.train", "AVSI_PAUSE_S": "0.1"}

    def start(workdir):
        return place.start("local.sh", "--devices=2", "--", "--config=tiny", f"--workdir={workdir}", *fields, **env)

    def rows(workdir, least):
        file = workdir / "metrics.csv"
        found = list(csv.DictReader(file.open())) if file.exists() else []
        return found if len(found) >= least else None

    calm, hit = tmp_path / "calm", tmp_path / "hit"
    out, err = (process := start(calm)).communicate(timeout=600)
    assert process.returncode == 0, out[-3000:] + err[-3000:]

    process = start(hit)
    wait_until(lambda: rows(hit, 1))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, out[-3000:] + err[-3000:]
    assert len(rows(hit, 1)) < 6

    process, done = start(hit), len(rows(hit, 1))
    wait_until(lambda: rows(hit, done + 1))
    os.kill(wait_until(lambda: find_process("--process_id=1", f"--workdir={hit}")), signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out[-3000:] + err[-3000:]
    assert "process 1 left with code 137" in err and "starts again (1 of 20)" in err
    assert (hit / "metrics.csv").read_bytes() == (calm / "metrics.csv").read_bytes()
