"""launch/local.sh and gpu_host.sh: processes on one machine, restarts, signals, and a real training."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support.launch_fakes import ROOT, TRAIN, FakeCommands, dry_run, needs_tools, trainer_arguments

pytestmark = needs_tools


@pytest.fixture
def fakes(tmp_path) -> FakeCommands:
    return FakeCommands(tmp_path)


def test_dry_runs_print_the_commands_of_all_processes(fakes):
    first, second = dry_run(fakes, "local.sh", "--dry_run", "--devices=2", "--", *TRAIN)
    assert first[:3] == ["env", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=2"]
    flags = [trainer_arguments(command) for command in (first, second)]
    assert [f["process_id"] for f in flags] == [0, 1] and len({f["coordinator"] for f in flags}) == 1
    assert {f["num_processes"] for f in flags} == {2}
    gpus = dry_run(fakes, "local.sh", "--dry_run", "--gpus", "--processes=3", "--", *TRAIN)
    assert [command[2] for command in gpus] == [f"CUDA_VISIBLE_DEVICES={i}" for i in range(3)]
    (host,) = dry_run(fakes, "gpu_host.sh", "--dry_run", "--gpus=0,2", "--", *TRAIN)
    assert host[:4] == ["env", "JAX_PLATFORMS=cuda", "CUDA_VISIBLE_DEVICES=0,2", "avsi-train"]
    assert trainer_arguments(host)["distributed"] == "off"


# ---- one process ---------------------------------------------------------------------------------------------------------------


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
def test_one_process_is_restarted_if_that_helps(fakes, plan, code, starts):
    fakes.add("avsi-train")
    fakes.script(plan=plan)
    done = fakes.run("gpu_host.sh", "--restarts=3", "--", *TRAIN)
    assert done.returncode == code, done.stderr
    assert fakes.lines("starts.0") == [" ".join([*TRAIN, "--distributed=off"])] * starts
    assert done.stderr.count("starts again") == starts - 1


def test_a_long_run_resets_the_count_of_restarts(fakes):
    fakes.add("avsi-train")
    fakes.script(plan=[75] * 4)
    done = fakes.run("gpu_host.sh", "--restarts=1", "--", *TRAIN, AVSI_LONG_RUN_S="0")
    assert done.returncode == 0 and len(fakes.lines("starts.0")) == 5, done.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_passed_to_the_trainer_once(fakes, number, code):
    fakes.add("avsi-train")
    fakes.script(plan=["wait"])
    process = fakes.start("gpu_host.sh", "--", *TRAIN)
    fakes.wait_for("waits.0")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert fakes.lines("terminated.0") == ["SIGTERM"] and len(fakes.lines("starts.0")) == 1


# ---- several processes ---------------------------------------------------------------------------------------------------------


def test_all_processes_are_restarted_when_one_dies(fakes):
    fakes.add("avsi-train")
    fakes.script(plan_0=["KILL", 75, 0], plan_1=["wait", "wait", 0])
    done = fakes.run("local.sh", "--logs=logs", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "137, starts again (1 of 20)" in done.stderr and "75, starts again (2 of 20)" in done.stderr
    flags = [[dict(w[2:].split("=", 1) for w in line.split()) for line in fakes.lines(f"starts.{rank}")] for rank in (0, 1)]
    ports = [[start["coordinator"] for start in starts] for starts in flags]
    assert len(ports[0]) == 3 and ports[0] == ports[1], "the processes of one attempt use the same port"
    assert (fakes.folder / "logs" / "rank1.log").read_text().count("trainer 1 does") == 3
    assert sorted(set(done.stdout.splitlines())) == sorted(
        [f"[0] trainer 0 does {action}" for action in ("KILL", 75, 0)] + [f"[1] trainer 1 does {action}" for action in ("wait", 0)]
    )


@pytest.mark.parametrize("plans, code", [([2, "wait"], 2), ([0, 1], 1), ([2, 75], 2), (["wait", 130], 130), ([0, 0], 0)], ids=str)
def test_local_ends_with_the_most_serious_code(fakes, plans, code):
    fakes.add("avsi-train")
    fakes.script(plan_0=plans[:1], plan_1=plans[1:])
    done = fakes.run("local.sh", "--", *TRAIN)
    assert done.returncode == code, done.stderr
    assert len(fakes.lines("starts.0")) == len(fakes.lines("starts.1")) == 1


def test_local_kills_processes_that_ignore_sigterm(fakes):
    fakes.add("avsi-train")
    fakes.script(plan_0=["ignore", 0], plan_1=["KILL", 0])
    done = fakes.run("local.sh", "--grace=0", "--", *TRAIN)
    assert done.returncode == 0 and "process 0 " in done.stderr and "killing it" in done.stderr, done.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_local_passes_signals_to_all_processes(fakes, number, code):
    fakes.add("avsi-train")
    fakes.script(plan=["wait"])
    process = fakes.start("local.sh", "--", *TRAIN)
    fakes.wait_for("waits.0", "waits.1")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert fakes.lines("terminated.0") == fakes.lines("terminated.1") == ["SIGTERM"] and "starts again" not in err


# ---- a real run ------------------------------------------------------------------------------------------------------------------


def find_process(*words: str) -> int | None:
    """The process number of a Python whose command line has these words."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:  # it has ended
            continue
        if "python" in command[0] and all(word in command for word in words):
            return int(folder.name)
    return None


def wait_until(condition, *, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return result


@pytest.mark.slow
def test_an_interrupted_training_in_two_processes_gives_the_same_metrics(fakes, tiny_dir, tmp_path):
    """SIGTERM to the launcher, the same command again, then SIGKILL to process 1."""
    import csv

    (fakes.bin / "python").symlink_to(sys.executable)
    sizes = ["units=8", "bottleneck=8", "batch_size=4", "epochs=6", "checkpoint_every=1"]
    fields = [f"--config.{size}" for size in sizes] + [f"--config.data_dir={tiny_dir}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "AVSI_TRAIN": f"{sys.executable} -m avsi_jax.train", "AVSI_PAUSE_S": "0.1"}

    def start(workdir):
        return fakes.start("local.sh", "--devices=2", "--", "--config=tiny", f"--workdir={workdir}", *fields, **env)

    def rows(workdir, least):
        file = workdir / "metrics.csv"
        lines = list(csv.DictReader(file.open())) if file.exists() else []
        return lines if len(lines) >= least else None

    undisturbed, interrupted = tmp_path / "undisturbed", tmp_path / "interrupted"
    out, err = (process := start(undisturbed)).communicate(timeout=600)
    assert process.returncode == 0, out[-3000:] + err[-3000:]

    process = start(interrupted)
    wait_until(lambda: rows(interrupted, 1))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, out[-3000:] + err[-3000:]
    assert len(rows(interrupted, 1)) < 6

    process, done = start(interrupted), len(rows(interrupted, 1))
    wait_until(lambda: rows(interrupted, done + 1))
    os.kill(wait_until(lambda: find_process("--process_id=1", f"--workdir={interrupted}")), signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out[-3000:] + err[-3000:]
    assert "process 1 left with code 137" in err and "starts again (1 of 20)" in err
    assert (interrupted / "metrics.csv").read_bytes() == (undisturbed / "metrics.csv").read_bytes()
