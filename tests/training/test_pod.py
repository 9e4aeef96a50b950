"""avsi-train in two processes with two devices each gives the results of one process with four: metrics, checkpoints, resume.

The reference is the session's run with four devices in one process (`trained`). Programs and the order of sums over devices differ
between the two, so the last bits do; over a few steps the difference grows to about 2e-6 of a gradient's norm, and 1e-5 is allowed.
"""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from avsi_jax.training import cli
from avsi_jax.training.checkpoints import Checkpoints, find_fault
from tests.support import processes, recorded_clips, tiny_runs

CLOSE = {"rel": 1e-5, "abs": 1e-12}
QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # only process 0 uses jax's cache: the other one compiles every time

# avsi-train that prints which files of its workdir it opened for writing, and the clips of its steps. The process RANK gets SIGTERM
# after STEP steps.
RECORDED = """
import json, os, sys
opened, workdir = set(), sys.argv[1]

def record(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.path.abspath(os.fsdecode(args[0]))
        if path.startswith(workdir + "/"):
            opened.add(os.path.relpath(path, workdir))

sys.addaudithook(record)
from tests.support import recorded_clips, signal_at_phase
from avsi_jax.training import cli
clips = recorded_clips.record(setattr)

rank, step = sys.argv[2:4]
if os.environ["JAX_PROCESS_ID"] == rank:  # the phase is entered before and after a step, but only after the first, which compiles
    signal_at_phase.arrange("SIGTERM", "step", 2 * int(step) - 2)
leave = cli.distributed.leave

def print_and_leave(code):
    print(json.dumps([sorted(opened), clips]), flush=True)
    leave(code)

cli.distributed.leave = print_and_leave
cli.main(sys.argv[4:])
"""


class Pod(NamedTuple):
    """A finished run of two processes."""

    workdir: Path
    messages: list[str]  # stderr of each process
    written: list[set[str]]  # files of the workdir that each process opened for writing
    clips: list[list[list[str]]]  # for each process the clip ids of each step


@pytest.fixture(scope="module")
def arguments(tiny_dir):
    """arguments(workdir, **fields) of avsi-train for the config of `trained`: two epochs of two steps."""
    return lambda workdir, **fields: tiny_runs.arguments(workdir, tiny_dir, **fields)


def run_pod(workdir, arguments, code, rank=-1, step=1) -> Pod:
    """Runs two processes, of which process `rank` gets SIGTERM after `step` steps; both must end with `code`."""
    finished = processes.run(["-c", RECORDED, workdir, rank, step, *arguments(workdir)], timeout=240, **QUICKLY)
    assert [f.returncode for f in finished] == [code] * 2, "\n---\n".join(f.stderr[-3000:] for f in finished)
    opened, clips = zip(*(json.loads(f.stdout.splitlines()[-1]) for f in finished), strict=True)
    written = [{final_name(name) for name in names} for names in opened]
    return Pod(workdir, [f.stderr for f in finished], written, [*clips])


def final_name(path: str) -> str:
    """The final name of a temporary file."""
    return re.sub(r"(^|/)\.([^/]+)\.\d+\.\d+\.tmp$", r"\1\2", path)


@pytest.fixture(scope="module")
def pod(arguments, tmp_path_factory) -> Pod:
    """An uninterrupted run."""
    return run_pod(tmp_path_factory.mktemp("pod") / "run", arguments, 0)


@pytest.fixture(scope="module")
def stopped(arguments, tmp_path_factory) -> Pod:
    """A run whose second process gets SIGTERM in the middle of the second epoch."""
    return run_pod(tmp_path_factory.mktemp("stopped") / "run", arguments, 143, rank=1, step=3)


def assert_same_rows(workdir, other) -> None:
    """Asserts that all columns of metrics.csv are close, and the character error rate equal."""
    rows, expected = ([*csv.DictReader((w / "metrics.csv").read_text().splitlines())] for w in (workdir, other))
    assert len(rows) == len(expected) == 2 and {"train_loss", "train_grad_norm", "val_loss", "val_cer"} <= rows[0].keys()
    for row, other_row in zip(rows, expected, strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx({k: float(v) for k, v in other_row.items()}, **CLOSE)
        assert row["val_cer"] == other_row["val_cer"] and row["step"] == other_row["step"]


@pytest.mark.slow
def test_two_processes_train_as_one(pod, trained):
    assert_same_rows(pod.workdir, trained)
    run = json.loads((pod.workdir / "run.json").read_text())
    assert run["processes"] == 2 and len(run["devices"]) == 4
    assert "process 0 of 2, coordinator 127.0.0.1:" in pod.messages[0] and "2 local of 4 devices" in pod.messages[0]
    assert pod.messages[1] == "", "only process 0 prints what concerns all"


@pytest.mark.slow
def test_every_file_is_written_by_one_process(pod, trained):
    """The second process writes a heartbeat and its part of the checkpoints, process 0 everything else."""
    first, second = pod.written
    assert {name for name in second if not name.startswith("checkpoints/")} == {"heartbeats/1.json"}
    assert {"config.json", "run.json", "metrics.csv", "timing.csv", "train.log", "status.json", "heartbeats/0.json"} <= first
    assert (pod.workdir / "metrics.csv").read_text().count("step,epoch") == 1
    assert sorted(p.name for p in pod.workdir.iterdir()) == sorted(p.name for p in trained.iterdir())


@pytest.mark.slow
def test_checkpoints_of_two_processes_are_valid_and_equal_those_of_one(pod, trained):
    """Parameters, optimiser, plateau schedule and position."""
    import jax
    import numpy as np

    states = []
    for workdir in (pod.workdir, trained):
        assert [find_fault(workdir / "checkpoints" / step) for step in ("2", "4")] == [None, None]
        checkpoints = Checkpoints(workdir, read_only=True)
        assert checkpoints.all_steps() == [2, 4] and checkpoints.best_step() == 4
        states.append(checkpoints.restore(4, state_like()))
        checkpoints.close()
    (state, host), (expected, other) = states
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        # Adam divides a gradient by its own magnitude: where it is only rounding error, steps of 1e-3 differ completely.
        off = np.abs(a - b) / max(np.abs(b).max(), 0.01)
        assert np.mean(off > 1e-5) <= 0.01 and np.abs(a - b).max() <= 1e-3
    moments = zip(*(jax.tree.leaves(s.opt_state) for s in (state, expected)), strict=True)
    assert all(np.abs(a - b).max() <= 1e-4 * np.abs(b).max() for a, b in moments)
    assert host["epoch"] == other["epoch"] and host["means"] == other["means"] == {}
    assert host["progress"] == pytest.approx(other["progress"], **CLOSE)


def state_like():
    from avsi_jax import configs
    from avsi_jax.training import train_step

    return train_step.init_state(configs.load("tiny", [("units", "8"), ("bottleneck", "8")]), 2)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(stopped):
    """Both save the same step and end with exit code 143."""
    steps = [re.findall(r"stopped by SIGTERM after step (\d+), ", messages) for messages in stopped.messages]
    assert steps == [["3"], ["3"]], stopped.messages
    assert "SIGTERM: saving" in stopped.messages[1] and "SIGTERM: saving" not in stopped.messages[0]
    assert find_fault(stopped.workdir / "checkpoints" / "3") is None


@pytest.mark.slow
def test_one_process_resumes_a_run_of_two(stopped, pod, trained, arguments, tmp_path, monkeypatch, capsys):
    """With the clips of the next step."""
    workdir, clips = Path(shutil.copytree(stopped.workdir, tmp_path / "run")), recorded_clips.record(monkeypatch.setattr)
    assert cli.main(arguments(workdir)) == 0
    assert "resumed at step 3, epoch 1" in capsys.readouterr().err
    assert_same_rows(workdir, trained)
    order = [first + second for first, second in zip(*pod.clips, strict=True)]
    assert len(order) == 4 and len({*order[0], *order[1]}) == 8 and clips == order[3:]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(4, 1), (2, 2)])
def test_several_processes_resume_a_run_of_two(stopped, trained, pod, arguments, tmp_path, count, devices):
    """With the same number of processes it ends with the very bytes of the uninterrupted run."""
    workdir = Path(shutil.copytree(stopped.workdir, tmp_path / "run"))
    command = ["-m", "avsi_jax.train", *arguments(workdir)]
    finished = processes.run(command, count, devices, timeout=400, **QUICKLY)
    assert [f.returncode for f in finished] == [0] * count, finished[0].stderr
    assert "resumed at step 3, epoch 1" in finished[0].stderr
    assert_same_rows(workdir, trained)
    if count == 2:
        assert (workdir / "metrics.csv").read_bytes() == (pod.workdir / "metrics.csv").read_bytes()


@pytest.mark.slow
def test_a_batch_that_the_devices_of_all_processes_cannot_share_is_refused(arguments, tmp_path):
    """By both processes, which count each other's devices, and before a file is written."""
    finished = processes.run(["-m", "avsi_jax.train", *arguments(tmp_path / "run", batch_size=6)], timeout=120)
    for one in finished:
        assert one.returncode == 2, one.stderr
        assert "batch_size 6 is not divisible by the 4 devices" in one.stderr and "--config.batch_size=8" in one.stderr
    assert not (tmp_path / "run").exists()
