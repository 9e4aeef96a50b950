"""A run that was interrupted, whenever and however, and started again is the run that never was: the same numbers, bit for bit."""

import random
import signal
import time

import numpy as np
import pytest

from avsi_jax.training import cli
from avsi_jax.training.checkpoints import Checkpoints, find_fault
from tests.support import processes, signal_at_phase, tiny_runs

INTERRUPTED = ("-m", "tests.support.signal_at_phase")
FIELDS = {"units": 8, "bottleneck": 8, "epochs": 12, "checkpoint_every": 4, "checkpoint_seconds": 0.5, "watchdog_s": 60}


@pytest.fixture(scope="module")
def arguments(tiny_dir):
    """Of avsi-train, by workdir: 24 steps of a tiny network, a checkpoint every half second."""

    return lambda workdir, **fields: tiny_runs.arguments(workdir, tiny_dir, **FIELDS | fields)


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    """The workdir of a run that nobody disturbed, in this process: four devices, as in all the others."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert cli.main(arguments(workdir)) == 0
    return workdir


def interrupt(arguments, name, phase, nth) -> int:
    """The exit code of a process that is interrupted so."""
    (found,) = processes.run([*INTERRUPTED, name, phase, nth, *arguments], processes=1, devices=4, timeout=200)
    return found.returncode


def assert_same_run(workdir, other) -> None:
    """Metrics to the letter, and every leaf of the last state to the bit."""
    import jax

    assert (workdir / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    states = []
    for folder in (workdir, other):
        checkpoints = Checkpoints(folder, read_only=True)
        step = checkpoints.latest_step()
        assert find_fault(folder / "checkpoints" / str(step)) is None
        states.append(checkpoints.restore(step, whole_state()))
        checkpoints.close()
    (a, host_a), (b, host_b) = states
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert {k: v for k, v in host_a.items() if k != "seconds"} == {k: v for k, v in host_b.items() if k != "seconds"}


def whole_state():
    from avsi_jax import configs
    from avsi_jax.training import train_step

    fields = [(k, str(v)) for k, v in FIELDS.items()]
    return train_step.init_state(configs.load("tiny", fields), 2)


def test_killed_at_any_moment_it_ends_the_same(arguments, uninterrupted, tmp_path):
    """While a checkpoint is written, and at a random moment (test_resume_slow.py: at 200 of them); a last start finishes."""
    workdir = tmp_path / "run"
    moments = [("saving", 2), ("after", round(random.Random(time.time_ns()).uniform(0.0, 1.5), 3))]
    for moment in moments:
        assert interrupt(arguments(workdir), "SIGKILL", *moment) == -signal.SIGKILL, moment
    assert cli.main(arguments(workdir)) == 0
    assert_same_run(workdir, uninterrupted)
    assert not list((workdir / "checkpoints").glob("*tmp*")), "what a killed save left is removed"


def test_told_to_stop_it_saves_leaves_and_goes_on(arguments, uninterrupted, tmp_path, monkeypatch, capsys):
    """In a step, in the middle of a validation, in a save: 143 of SIGTERM, 130 of Ctrl-C. Nothing done is lost; the next start goes
    on by itself, and one that nobody stops ends as if none had been.
    """
    workdir, before = tmp_path / "run", 0
    for name, moment in (("SIGTERM", ("step", 5)), ("SIGTERM", ("validation", 3)), ("SIGINT", ("saving", 1))):
        with monkeypatch.context() as patched:
            signal_at_phase.arrange(name, *moment, put=patched.setattr)
            began = time.monotonic()
            assert cli.main(arguments(workdir, checkpoint_seconds=0)) == 128 + getattr(signal, name), moment
            assert time.monotonic() - began < 25
        said, step = capsys.readouterr().err, Checkpoints(workdir, read_only=True).latest_step()
        assert f"{name}: saving" in said and f"after step {step}, saved; the same command goes on" in said, moment
        assert before < step < 24 and (not before or f"resumed at step {before}," in said), moment
        before = step
    assert (workdir / "train.log").read_text().count(": saving") == 3
    assert cli.main(arguments(workdir)) == 0
    assert f"resumed at step {before}," in capsys.readouterr().err
    assert_same_run(workdir, uninterrupted)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "a finished training leaves signals as it found them"


@pytest.mark.parametrize("moment", [("import", 0.05), ("import", 1.0), ("restore", 1), ("compile", 1)])
def test_told_to_stop_before_there_is_work_it_leaves_at_once(arguments, tmp_path, moment):
    """A shell calls a death by SIGTERM 143 too, which is how an interpreter dies that is still starting."""
    began = time.monotonic()
    code = interrupt(arguments(tmp_path / "run"), "SIGTERM", *moment)
    assert code in (143, -signal.SIGTERM) and time.monotonic() - began < 25
    folder = tmp_path / "run" / "checkpoints"
    assert not folder.exists() or list(folder.iterdir()) == []


def test_asked_twice_it_leaves_unsaved(arguments, tmp_path):
    """While the first SIGTERM's checkpoint is being written another one comes, its echo, and later a third."""
    fields = {"checkpoint_seconds": 0}
    (done,) = processes.run(["-c", TWICE, *arguments(tmp_path / "run", **fields)], processes=1, devices=4, timeout=200)
    assert done.returncode == 143 and "still saving\nSIGTERM again: left without saving" in done.stderr, done.stderr


TWICE = """
import sys, time
from tests.support import signal_at_phase
from avsi_jax.training import checkpoints, cli

def save(*_, **__):
    signal_at_phase.send("SIGTERM")
    time.sleep(3)
    print("still saving", file=sys.stderr)
    signal_at_phase.send("SIGTERM")
    time.sleep(60)

signal_at_phase.arrange("SIGTERM", "step", 3)
checkpoints.Checkpoints.save = save
sys.exit(cli.main(sys.argv[1:]))
"""
