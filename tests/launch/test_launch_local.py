"""launch/local.sh and gpu_host.sh: the processes of one machine, started again where that helps, told to stop, and for real."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support.launch_fakes import ROOT, TRAIN, Place, dry, needs_tools, trainer_arguments

pytestmark = needs_tools


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


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


# ---- several processes ---------------------------------------------------------------------------------------------------------


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


# ---- for real ------------------------------------------------------------------------------------------------------------------


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
