"""launch/gke.sh: the JobSet is valid, has the right number of hosts, and restarts by the same rule; and the image."""

import json

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support.launch_fakes import GKE, LAUNCH, ROOT, TRAIN, FakeCommands, dry_run, needs_tools, restartable, trainer_arguments

pytestmark = needs_tools

NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"}


def strict_object(required: str = "", **properties) -> dict:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


# Fields of jobset.x-k8s.io/v1alpha2 that a training uses, as in its CRD and webhook; the Job in it is checked separately.
REASONS = "BackoffLimitExceeded DeadlineExceeded FailedIndexes MaxFailedIndexesExceeded PodFailurePolicy".split()
RULE = strict_object(
    "name action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", "maxLength": 128},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons={"type": "array", "items": {"enum": REASONS}},
    targetReplicatedJobs={"type": "array", "items": NAME},
)
JOBSET = strict_object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=strict_object("name", name=NAME, annotations={"type": "object", "additionalProperties": {"type": "string"}}),
    spec=strict_object(
        "replicatedJobs",
        network=strict_object(enableDNSHostnames={"type": "boolean"}, publishNotReadyAddresses={"type": "boolean"}, subdomain=NAME),
        failurePolicy=strict_object(
            maxRestarts={"type": "integer", "minimum": 0},
            restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
            rules={"type": "array", "items": RULE},
        ),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": strict_object(
                "name template", name=NAME, replicas={"type": "integer", "minimum": 1}, template={"type": "object"}
            ),
        },
        suspend={"type": "boolean"},
        ttlSecondsAfterFinished={"type": "integer", "minimum": 0},
    ),
)


@pytest.fixture
def fakes(tmp_path) -> FakeCommands:
    return FakeCommands(tmp_path)


def job_of(text: str) -> dict:
    """The Job in a filled-in jobset.yaml, after both have been validated."""
    jobset = yaml.safe_load(text)
    jsonschema.Draft202012Validator(JOBSET).validate(jobset)
    template = jobset["spec"]["replicatedJobs"][0]["template"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, **template}
    kubernetes_validate.validate(job, "1.30", strict=True)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "train"}, "spec": job["spec"]["template"]["spec"]}
    kubernetes_validate.validate(pod, "1.30", strict=True)
    return job["spec"]


def test_the_jobset_is_valid_and_passes_the_arguments(fakes):
    special = ["--config.notes=" + text for text in ['say "so"', "back\\slash", "a: b # c", "$(HOME)"]]
    done = fakes.run("gke.sh", "apply", "--dry_run", "--spot", *GKE, "--", *TRAIN, *special)
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
    assert [argument.replace("$$(", "$(") for argument in container["args"][len(TRAIN) :][:4]] == special
    flags = trainer_arguments([a for a in container["args"] if "notes" not in a])
    assert flags["num_processes"] == 4 and flags["distributed"] == "on"
    assert flags["cache_dir"] == container["volumeMounts"][0]["mountPath"]


def test_the_jobset_restarts_after_the_same_codes(fakes):
    text = fakes.run("gke.sh", "apply", "--dry_run", *GKE, "--restarts=7", "--", *TRAIN).stdout
    (rule,) = job_of(text)["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert rule["action"] == "FailJob" and codes["operator"] == "NotIn" and codes["containerName"] == "train"
    assert {75, 143, 137, 134, 139} <= set(codes["values"]) <= restartable()
    policy = yaml.safe_load(text)["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7 and policy["rules"][0]["action"] == "FailJobSet"


# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: topology, hosts, chips per host.
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
def test_a_topology_has_the_documented_number_of_hosts(fakes, accelerator, topology, hosts, chips):
    fakes.add("kubectl")
    done = fakes.run("gke.sh", "apply", *GKE, f"--accelerator={accelerator}", f"--topology={topology}", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert fakes.calls() == [["kubectl", "apply", "--filename=-"]]
    job = job_of((fakes.folder / "applied").read_text())
    assert job["parallelism"] == hosts
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_the_image_copies_everything_that_setup_needs():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]}
    assert copied == {"pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints", "avsi_jax", "tfds_grid", "configs"}
    assert all((ROOT / name).exists() for name in copied)
    assert json.loads(lines[-2].removeprefix("ENTRYPOINT "))[-1] == "avsi-train"


def test_dry_runs_print_only_kubectl_commands(fakes):
    for task in ("status", "logs", "delete"):
        assert all(command[0] == "kubectl" for command in dry_run(fakes, "gke.sh", task, "--dry_run", "--name=avsi"))
