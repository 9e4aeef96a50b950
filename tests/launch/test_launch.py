"""launch/: shellcheck, help, error messages and the rule for restarts. Tests of each launcher are in test_launch_*.py."""

import signal
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.support.launch_fakes import GKE, LAUNCH, ROOT, SLICE, TRAIN, FakeCommands, needs_tools, restartable, shell

pytestmark = needs_tools

SCRIPTS = ["local.sh", "gpu_host.sh", "tpu_vm.sh", "tpu_worker.sh", "gke.sh", "slurm.sbatch"]


@pytest.fixture
def fakes(tmp_path) -> FakeCommands:
    return FakeCommands(tmp_path)


def test_shellcheck_finds_no_problem():
    files = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
    command = [Path(sysconfig.get_path("scripts")) / "shellcheck", *(f.relative_to(ROOT) for f in files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_printed_and_wrong_arguments_are_refused(fakes, script):
    shown = fakes.run(script, "--help")
    assert shown.returncode == 0 and script in shown.stdout and not shown.stderr
    for arguments in (["--no_such_flag=1"], ["run", "--no_such_flag=1"], []):
        wrong = fakes.run(script, *arguments)
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1, wrong.stderr
        assert "found" in wrong.stderr and "expected" in wrong.stderr and not wrong.stdout


@pytest.mark.parametrize(
    "script, arguments, fact",
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
        ("gke.sh", ["apply", "--dry_run", *GKE, "--", *TRAIN, "a\nb"], "control character"),
        ("local.sh", ["--processes=two", "--", *TRAIN], "two"),
        ("local.sh", ["--", *TRAIN], "avsi-train"),
        ("gpu_host.sh", ["--gpus=0,,1", "--", *TRAIN], "0,,1"),
        ("gpu_host.sh", ["--", "--config=tiny"], "--workdir"),
        ("slurm.sbatch", ["--", *TRAIN], "SLURM_JOB_ID"),
    ],
)
def test_missing_or_wrong_arguments_give_a_message_of_one_line(fakes, script, arguments, fact):
    done = fakes.run(script, *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and fact in done.stderr, done.stderr
    assert "found" in done.stderr and "expected" in done.stderr


def test_trainings_are_restarted_after_preemption_watchdog_and_signals():
    again = restartable()
    assert {75, 143, 137, 134, 139} <= again and not again & {0, 1, 2, 126, 127, 130, 255}
    assert again == {75} | {128 + number for number in range(1, 65)} - {128 + signal.SIGINT}


@pytest.mark.parametrize(
    "codes, worst",
    [("0 0", 0), ("0 143", 143), ("143 75", 75), ("1 143", 143), ("75 137", 137), ("137 2 75", 2), ("0 1", 1), ("", 0)],
)
def test_the_most_serious_exit_code_is_reported(codes, worst):
    assert int(shell(f"worst_code {codes}")) == worst
