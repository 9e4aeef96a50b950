"""A real avsi-train of two processes with two devices each is that of one process with four: what it finds, saves, goes on from.

The oracle is the session's run of four devices in one process (`trained`). The order in which a sum over devices is added up
differs between the two, and how they are compiled: their last bits do, which over a few steps grows to some 2e-6 of a gradient's
norm; so 1e-5 is allowed.
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
from tests.support import processes, tiny_runs

CLOSE = {"rel": 1e-5, "abs": 1e-12}
QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # jax' cache is the first process' alone: the other compiles anew every time

# avsi-train that tells on stdout which files of its workdir it opened to write, and the clips of its steps; where it is RANK it is
# told to stop after STEP steps.
WATCHED = """
import json, os, sys
opened, workdir = set(), sys.argv[1]

def watch(event, found):
    if event == "open" and isinstance(found[0], (str, bytes)) and found[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.path.abspath(os.fsdecode(found[0]))
        if path.startswith(workdir + "/"):
            opened.add(os.path.relpath(path, workdir))

sys.addaudithook(watch)
from tests.training import test_pod
from tests.support import signal_at_phase
from avsi_jax.training import cli
met = test_pod.note_clips(setattr)

rank, step = sys.argv[2:4]
if os.environ["JAX_PROCESS_ID"] == rank:
    signal_at_phase.arrange("SIGTERM", "step", 2 * int(step) - 2)  # entered before and after a step, but the first, which compiles
leave = cli.cluster.leave

def tell(code):
    print(json.dumps([sorted(opened), met]), flush=True)
    leave(code)

cli.cluster.leave = tell
cli.main(sys.argv[4:])
"""


class Pod(NamedTuple):
    """How two processes ended: workdir; of each what it said on stderr, which files of the workdir it wrote, its clips by step."""

    workdir: Path
    transcript: list[str]
    wrote: list[set[str]]
    met: list[list[list[str]]]


@pytest.fixture(scope="module")
def arguments(tiny_dir):
    """Of avsi-train, by workdir: the config of `trained`, two epochs of two steps."""
    return lambda workdir, **fields: tiny_runs.arguments(workdir, tiny_dir, **fields)


def run_pod(workdir, arguments, code, rank=-1, step=1) -> Pod:
    """Two processes of two devices, one of which is told to stop, where `rank` says so; all must end with `code`."""
    finished = processes.run(["-c", WATCHED, workdir, rank, step, *arguments(workdir)], timeout=240, **QUICKLY)
    assert [f.returncode for f in finished] == [code] * 2, "\n---\n".join(f.stderr[-3000:] for f in finished)
    wrote, met = zip(*(json.loads(f.stdout.splitlines()[-1]) for f in finished), strict=True)
    return Pod(workdir, [f.stderr for f in finished], [{renamed(name) for name in names} for names in wrote], [*met])


def renamed(path: str) -> str:
    """What a file is called in the end that is written beside the one it replaces."""
    return re.sub(r"(^|/)\.([^/]+)\.\d+\.\d+\.tmp$", r"\1\2", path)


def note_clips(put) -> list[list[str]]:
    """The ids of the clips of every step from now on; `put` sets an attribute of a module (monkeypatch.setattr takes it back)."""
    from avsi_jax.data import input_pipeline

    met, batches = [], input_pipeline.train_batches

    def noted(*args, **options):
        for batch in batches(*args, **options):
            met.append(batch["clip_id"])
            yield batch

    put(input_pipeline, "train_batches", noted)
    return met


@pytest.fixture(scope="module")
def pod(arguments, tmp_path_factory) -> Pod:
    return run_pod(tmp_path_factory.mktemp("pod") / "run", arguments, 0)


@pytest.fixture(scope="module")
def stopped(arguments, tmp_path_factory) -> Pod:
    """SIGTERM came to the second process alone, in the middle of the second epoch."""
    return run_pod(tmp_path_factory.mktemp("stopped") / "run", arguments, 143, rank=1, step=3)


def assert_same_rows(workdir, other) -> None:
    """Every column of metrics.csv, also what was misread."""
    rows, expected = ([*csv.DictReader((w / "metrics.csv").read_text().splitlines())] for w in (workdir, other))
    assert len(rows) == len(expected) == 2 and {"train_loss", "train_grad_norm", "val_loss", "val_cer"} <= rows[0].keys()
    for row, wanted in zip(rows, expected, strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx({k: float(v) for k, v in wanted.items()}, **CLOSE)
        assert row["val_cer"] == wanted["val_cer"] and row["step"] == wanted["step"]


def test_two_processes_train_as_one(pod, trained):
    assert_same_rows(pod.workdir, trained)
    run = json.loads((pod.workdir / "run.json").read_text())
    assert run["processes"] == 2 and len(run["devices"]) == 4
    assert "process 0 of 2, coordinator 127.0.0.1:" in pod.transcript[0] and "2 local of 4 devices" in pod.transcript[0]
    assert pod.transcript[1] == "", "what all would say the first one says"


def test_every_file_is_written_by_one(pod, trained):
    """The second writes a heartbeat and its part of the checkpoints; all else the first one, as when it is alone."""
    first, second = pod.wrote
    assert {name for name in second if not name.startswith("checkpoints/")} == {"heartbeats/1.json"}
    assert {"config.json", "run.json", "metrics.csv", "timing.csv", "train.log", "status.json", "heartbeats/0.json"} <= first
    assert (pod.workdir / "metrics.csv").read_text().count("step,epoch") == 1
    assert sorted(p.name for p in pod.workdir.iterdir()) == sorted(p.name for p in trained.iterdir())


def test_its_checkpoints_are_whole_and_hold_what_one_process_has(pod, trained):
    """Parameters, optimiser, plateau and position."""
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
        # Adam divides a gradient by its own size: where it is rounding alone, which is another here, so is a step of 1e-3.
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


def test_one_that_is_told_to_stop_stops_all(stopped):
    """Both save the same step, which neither has done before the other, and leave with 143."""
    lines = [
        re.findall(r"stopped by SIGTERM after step (\d+), saved; the same command goes on", said) for said in stopped.transcript
    ]
    assert lines == [["3"], ["3"]], stopped.transcript
    assert "SIGTERM: saving" in stopped.transcript[1] and "SIGTERM: saving" not in stopped.transcript[0], (
        "told was the second alone"
    )
    assert find_fault(stopped.workdir / "checkpoints" / "3") is None


def test_one_process_goes_on_with_what_two_began(stopped, pod, trained, arguments, tmp_path, monkeypatch, capsys):
    """With the clips that the step after would have had."""
    workdir, met = Path(shutil.copytree(stopped.workdir, tmp_path / "run")), note_clips(monkeypatch.setattr)
    assert cli.main(arguments(workdir)) == 0
    assert "resumed at step 3, epoch 1" in capsys.readouterr().err
    assert_same_rows(workdir, trained)
    order = [first + second for first, second in zip(*pod.met, strict=True)]
    assert len(order) == 4 and len({*order[0], *order[1]}) == 8 and met == order[3:]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(4, 1), (2, 2)])
def test_other_processes_go_on_with_what_two_began(stopped, trained, pod, arguments, tmp_path, count, devices):
    """On as many as before it ends with the very bytes of the run that was not interrupted."""
    workdir = Path(shutil.copytree(stopped.workdir, tmp_path / "run"))
    command = ["-m", "avsi_jax.train", *arguments(workdir)]
    finished = processes.run(command, count, devices, timeout=400, **QUICKLY)
    assert [f.returncode for f in finished] == [0] * count, finished[0].stderr
    assert "resumed at step 3, epoch 1" in finished[0].stderr
    assert_same_rows(workdir, trained)
    if count == 2:
        assert (workdir / "metrics.csv").read_bytes() == (pod.workdir / "metrics.csv").read_bytes()


def test_a_batch_that_the_devices_of_all_can_not_share(arguments, tmp_path):
    """Refused by both processes, before a file is written: each counts the devices of the other too."""
    finished = processes.run(["-m", "avsi_jax.train", *arguments(tmp_path / "run", batch_size=6)], timeout=120)
    for one in finished:
        assert one.returncode == 2, one.stderr
        assert "batch_size 6 is not divisible by the 4 devices; expected a multiple, e.g. --config.batch_size=8" in one.stderr
    assert not (tmp_path / "run").exists()
