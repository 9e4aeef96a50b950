"""launch/slurm.sbatch: the header, what is queued anew, and the warning before a time limit."""

import shutil
import signal

import pytest

from tests.support.launch_fakes import LAUNCH, ROOT, TRAIN, Place, dry, needs_tools, trainer_arguments

pytestmark = needs_tools


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def test_a_dry_run(place):
    step, requeue = dry(place, "slurm.sbatch", "--dry_run", "--", *TRAIN)
    assert step[0] == "srun" and trainer_arguments(step)["num_processes"] == 2 and requeue[:2] == ["scontrol", "requeue"]


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
