"""launch/gke.sh: the JobSet is one that Kubernetes takes, has a host for each, and starts again by the same rule; the image."""

import json

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support.launch_fakes import GKE, LAUNCH, ROOT, TRAIN, Place, dry, needs_tools, restartable, trainer_arguments

pytestmark = needs_tools

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


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


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
    assert {75, 143, 137, 134, 139} <= set(codes["values"]) <= restartable()
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


def test_dry_runs(place):
    for task in ("status", "logs", "delete"):
        assert all(command[0] == "kubectl" for command in dry(place, "gke.sh", task, "--dry_run", "--name=avsi"))
