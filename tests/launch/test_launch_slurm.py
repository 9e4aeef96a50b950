"""launch/slurm.sbatch: the header, requeueing, and the signal before the time limit."""

import os
import shutil
import signal
import subprocess

import pytest

from tests.support.launch_fakes import LAUNCH, ROOT, TRAIN, FakeCommands, dry_run, needs_tools, trainer_arguments

pytestmark = needs_tools


@pytest.fixture
def fakes(tmp_path) -> FakeCommands:
    return FakeCommands(tmp_path)


def test_a_dry_run_prints_the_step_and_the_requeue_command(fakes):
    step, requeue = dry_run(fakes, "slurm.sbatch", "--dry_run", "--", *TRAIN)
    assert step[0] == "srun" and trainer_arguments(step)["num_processes"] == 2 and requeue[:2] == ["scontrol", "requeue"]


def test_the_header_asks_for_requeueing_and_a_signal():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--requeue", "--open-mode=append", "--signal=TERM@120", "--ntasks-per-node=1"} <= set(options)
    assert lines[1].startswith("#SBATCH"), "Slurm reads options only up to the first command"


@pytest.mark.parametrize(
    "action, state, count, code, requeued",
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
def test_a_batch_job_is_requeued_if_that_helps(fakes, action, state, count, code, requeued):
    fakes.add("srun", "scontrol", "squeue", "scancel", "avsi-train")
    fakes.script(plan=[action], job=[state])
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_RESTART_COUNT": str(count), "SLURM_SUBMIT_DIR": str(ROOT)}
    done = fakes.run("slurm.sbatch", "--", *TRAIN, **job)
    assert done.returncode == code, done.stderr
    assert (["scontrol", "requeue", "7"] in fakes.calls()) == requeued
    (step,) = [call for call in fakes.calls() if call[0] == "srun"]
    assert trainer_arguments(step)["num_processes"] == 4


@pytest.mark.parametrize("receiver", ["task", "script"])
def test_a_training_saves_before_the_job_ends(fakes, receiver):
    """The signal before the time limit goes to the tasks; one to the batch script is passed on to them, and not to srun."""
    fakes.add("srun", "scontrol", "squeue", "scancel", "avsi-train")
    fakes.script(plan=["wait"], job=["RUNNING"])
    spooled = shutil.copy(LAUNCH / "slurm.sbatch", fakes.folder / "slurm_script")  # as Slurm runs it
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    process = fakes.start(spooled, "--", *TRAIN, **job)
    fakes.wait_for("waits.0", "task")
    os.kill(process.pid if receiver == "script" else int(fakes.lines("task")[0]), signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 143 and fakes.lines("terminated.0") == ["SIGTERM"], err
    assert fakes.calls()[-1] == ["scontrol", "requeue", "7"]


def test_the_stand_in_for_srun_kills_its_tasks_on_sigterm(fakes):
    """As Slurm's does: a launcher that sends the signal to srun would lose everything since the last checkpoint."""
    fakes.add("srun", "avsi-train")
    fakes.script(plan=["wait"])
    process = subprocess.Popen([fakes.bin / "srun", "avsi-train", *TRAIN], env=fakes.env, cwd=fakes.folder)
    fakes.wait_for("waits.0")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143 and not fakes.lines("terminated.0")
