"""An interrupted training that is started again gives the same numbers, bit for bit, as one that was never interrupted."""

import random
import signal
import time

import pytest

from avsi_jax.training import cli
from avsi_jax.training.checkpoints import Checkpoints
from tests.support import processes, resume_runs, signal_at_phase
from tests.support.resume_runs import assert_same_run


@pytest.fixture(scope="module")
def arguments(tiny_dir):
    """arguments(workdir, **fields) of avsi-train."""
    return lambda workdir, **fields: resume_runs.arguments(workdir, tiny_dir, **fields)


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    """The workdir of an uninterrupted run in this process, with four devices like all others."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert cli.main(arguments(workdir)) == 0
    return workdir


def interrupt(arguments, name, phase, nth) -> int:
    """Runs a training that gets a signal at a phase; returns its exit code."""
    command = [*resume_runs.INTERRUPTED, name, phase, nth, *arguments]
    (finished,) = processes.run(command, processes=1, devices=4, timeout=200)
    return finished.returncode


@pytest.mark.slow
def test_a_run_that_was_killed_ends_the_same(arguments, uninterrupted, tmp_path):
    """While a checkpoint is written, and at a random moment (test_resume_slow.py: at 200 of them)."""
    workdir = tmp_path / "run"
    moments = [("saving", 2), ("after", round(random.Random(time.time_ns()).uniform(0.0, 1.5), 3))]
    for moment in moments:
        assert interrupt(arguments(workdir), "SIGKILL", *moment) == -signal.SIGKILL, moment
    assert cli.main(arguments(workdir)) == 0
    assert_same_run(workdir, uninterrupted)
    assert not list((workdir / "checkpoints").glob("*tmp*")), "files of a killed save are removed"


def test_a_run_that_was_stopped_saves_and_resumes(arguments, uninterrupted, tmp_path, monkeypatch, capsys):
    """During a step, a validation and a save; exit code 143 for SIGTERM, 130 for Ctrl-C. No finished step is repeated."""
    workdir, before = tmp_path / "run", 0
    for name, moment in (("SIGTERM", ("step", 5)), ("SIGTERM", ("validation", 3)), ("SIGINT", ("saving", 1))):
        with monkeypatch.context() as patched:
            signal_at_phase.arrange(name, *moment, put=patched.setattr)
            assert cli.main(arguments(workdir, checkpoint_seconds=0)) == 128 + getattr(signal, name), moment
        messages, step = capsys.readouterr().err, Checkpoints(workdir, read_only=True).latest_step()
        assert f"{name}: saving" in messages and f"after step {step}, " in messages, moment
        assert before < step < 24 and (not before or f"resumed at step {before}," in messages), moment
        before = step
    assert (workdir / "train.log").read_text().count(": saving") == 3
    assert cli.main(arguments(workdir)) == 0
    assert f"resumed at step {before}," in capsys.readouterr().err
    assert_same_run(workdir, uninterrupted)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "signal handlers are restored after a training"


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [("import", 0.05), *(pytest.param(m, marks=pytest.mark.slow) for m in (("import", 1.0), ("restore", 1))), ("compile", 1)],
)
def test_a_run_that_is_stopped_before_its_first_step_ends_without_saving(arguments, tmp_path, moment):
    """While the interpreter starts, SIGTERM kills it directly; a shell reports that as 143 too."""
    assert interrupt(arguments(tmp_path / "run"), "SIGTERM", *moment) in (143, -signal.SIGTERM)
    folder = tmp_path / "run" / "checkpoints"
    assert not folder.exists() or list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_second_signal_ends_the_run_without_saving(arguments, tmp_path):
    """An echo of the first SIGTERM is ignored; further ones arrive while the checkpoint is being written."""
    command = ["-c", STOPPED_TWICE, *arguments(tmp_path / "run", checkpoint_seconds=0)]
    (finished,) = processes.run(command, processes=1, devices=4, timeout=200)
    before, still_saving, after = finished.stderr.partition("still saving\n")
    assert finished.returncode == 143 and still_saving, finished.stderr
    assert "SIGTERM again: " in after and "SIGTERM again" not in before, finished.stderr


STOPPED_TWICE = """
import sys, time
from tests.support import signal_at_phase
from avsi_jax.training import checkpoints, cli

send = signal_at_phase.send

def send_with_echo(name):
    send(name)
    send(name)

def save(*_, **__):
    print("still saving", file=sys.stderr, flush=True)
    while True:  # on a busy machine the first one after the echo may still count as an echo
        time.sleep(3)
        send("SIGTERM")

signal_at_phase.send = send_with_echo
signal_at_phase.arrange("SIGTERM", "step", 3)
checkpoints.Checkpoints.save = save
sys.exit(cli.main(sys.argv[1:]))
"""
