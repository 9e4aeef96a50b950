"""What goes wrong under a training: damaged, copied, mismatched checkpoints, full disks, numbers that are none, stuck processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest

from avsi_jax import input_pipeline, manifest, train
from avsi_jax.checkpoints import CheckpointError, Checkpoints, find_fault, set_damaged_aside


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the session's two epochs: checkpoints of steps 2 and 4."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << (at % 8)
    path.write_bytes(bytes(content))


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


# -------------------------------------------------------------------------------------------------------------------- damaged


def test_a_flipped_byte_anywhere_in_a_checkpoint_is_found(run):
    """In every file of it, Orbax' own among them, at its ends and at random; the file is named."""
    newest, rng, flips = run / "checkpoints" / "4", np.random.default_rng(0), 0
    assert manifest.is_sealed(newest) and find_fault(newest) is None
    for path in files_of(newest):
        for at in {0, path.stat().st_size - 1, *rng.integers(0, path.stat().st_size, 60).tolist()}:
            flip(path, at)
            fault = find_fault(newest)
            assert fault and (path.relative_to(newest).as_posix() in fault or path.name in (manifest.MANIFEST, manifest.SEAL)), path
            flip(path, at)
            flips += 1
    assert flips > 500 and find_fault(newest) is None


def test_the_one_before_a_damaged_checkpoint_is_used(run, trained, tiny_config, capsys):
    """A warning names file and folder; the damaged one is kept aside; the run ends as if nothing had been."""
    victim = max(files_of(run / "checkpoints" / "4" / "state"), key=lambda p: p.stat().st_size)
    flip(victim, 1000)
    train.train(tiny_config(), run)
    said = capsys.readouterr().err
    assert f"warning: checkpoint 4 is damaged (state/{victim.relative_to(run / 'checkpoints' / '4' / 'state')} is not what" in said
    assert "resumed at step 2" in said and (run / "damaged" / "4").is_dir()
    assert (run / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()
    assert find_fault(run / "checkpoints" / "4") is None and find_fault(run / "damaged" / "4") is not None


def test_with_no_whole_checkpoint_nothing_is_touched(run, tiny_config):
    for step in ("2", "4"):
        (run / "checkpoints" / step / "state" / "_METADATA").unlink()
    before = {p: p.read_bytes() for p in files_of(run)}
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*4: state/_METADATA is missing; 2: state") as error:
        set_damaged_aside(run)
    assert "\n" not in str(error.value) and before == {p: p.read_bytes() for p in files_of(run)}


def test_a_damaged_checkpoint_is_not_evaluated(run):
    from avsi_jax.restore import Restorer

    flip(max(files_of(run / "checkpoints" / "4" / "state"), key=lambda p: p.stat().st_size), 500)
    with pytest.raises(CheckpointError, match=r"checkpoint 4 in .* is damaged \(state/.* is not what was written\).*\[2, 4\]"):
        Restorer.from_workdir(run, "4")
    assert Restorer.from_workdir(run, "2").step == 2


def test_a_checkpoint_from_before_there_were_manifests_is_taken(run):
    for name in (manifest.MANIFEST, manifest.SEAL):
        (run / "checkpoints" / "4" / name).unlink()
    assert set_damaged_aside(run) == [] and Checkpoints(run, read_only=True).latest_step() == 4


@pytest.mark.parametrize("copy", [["cp", "-r"], ["rsync", "-r"]])
def test_a_copied_run_goes_on(run, tmp_path, tiny_config, capsys, copy):
    """Times, owners and links are not needed; what a save that never ended left is copied too, and does no harm."""
    if not shutil.which(copy[0]):
        pytest.skip(f"{copy[0]} is not here")
    (run / "checkpoints" / "6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (run / "checkpoints" / "6.orbax-checkpoint-tmp" / "state" / "half").write_text("x")
    subprocess.run([*copy, f"{run}/", str(tmp_path / "copy")], check=True)
    row = train.train(tiny_config(epochs=3), tmp_path / "copy")
    assert row["step"] == 6 and "resumed at step 4" in capsys.readouterr().err
    assert Checkpoints(tmp_path / "copy", read_only=True).latest_step() == 6


# ---------------------------------------------------------------------------------------------------------------- mismatched


def test_another_dataset_is_refused_by_what_differs(run, tiny_config, tiny_dir, tmp_path):
    """One byte of one clip is another, its checksums are right: the same names, lengths and version."""
    other = Path(shutil.copytree(tiny_dir, tmp_path / "data"))
    told = json.loads((run / "run.json").read_text())
    fingerprint = told["dataset"]["fingerprint"]["train"]
    assert len(fingerprint) == 16 and input_pipeline.Records(dataset_of(other), "train").fingerprint() == fingerprint
    rewrite_first_record(dataset_of(other), "train")
    assert input_pipeline.Records(dataset_of(other), "train").fingerprint() != fingerprint
    with pytest.raises(ValueError, match=r"holds a run on another dataset \(fingerprint: .*there, .*here\); resume with") as error:
        train.train(tiny_config(data_dir=other), run)
    assert "\n" not in str(error.value)


def dataset_of(data_dir):
    return input_pipeline.find_dataset(data_dir)


def rewrite_first_record(dataset, split) -> None:
    """Changes a sample of the first clip's sound, with a new checksum."""
    import google_crc32c

    (path,) = sorted(Path(dataset).glob(f"*-{split}.tfrecord-*"))
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    content[12 + size // 2] ^= 1
    crc = google_crc32c.value(bytes(content[12 : 12 + size]))
    content[12 + size : 16 + size] = (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")
    path.write_bytes(bytes(content))


def test_epochs_bind_where_they_shape_the_rate(tiny_config, tmp_path):
    """Under a cosine another number of epochs is another schedule for what is done already."""
    fields = {"schedule": "cosine", "epochs": 1}
    train.train(tiny_config(**fields), tmp_path / "run")
    with pytest.raises(ValueError, match="epochs: 1 there, 2 here"):
        train.train(tiny_config(**fields | {"epochs": 2}), tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------- no room to save

LIMITED = """
import resource, sys
from avsi_jax import train
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)  # a write beyond it fails as one to a full disk does
sys.argv[1:] = sys.argv[2:]
train.command()
"""


def arguments(workdir, data_dir, **fields):
    fields = {"data_dir": data_dir, "units": 8, "bottleneck": 8} | fields
    return ["--config=tiny", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]


def test_a_disk_that_fills_up_in_a_save(run, tiny_dir):
    """The third epoch's checkpoint can't be written: one line with path and bytes, the two before it stay whole."""
    command = ["-c", LIMITED, 30_000, *arguments(run, tiny_dir, epochs=3)]
    (done,) = processes.run(command, processes=1, devices=4, timeout=200)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("avsi-train: ")]
    assert done.returncode == 2 and line.startswith(f"avsi-train: {run / 'checkpoints'}: checkpoint 6 of "), done.stderr
    assert "bytes could not be written" in line and "the checkpoints [2, 4] are kept" in line
    assert "avsi_jax/" not in done.stderr, "no traceback of ours; tensorstore's threads may say what they think"
    assert [find_fault(run / "checkpoints" / step) for step in ("2", "4")] == [None, None]
    assert set_damaged_aside(run) == [] and Checkpoints(run, read_only=True).latest_step() == 4


def test_too_little_room_is_told_before_anything_is_written(run, tiny_config, monkeypatch):
    from avsi_jax import checkpoints

    usage = shutil.disk_usage(run)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=1234))
    with pytest.raises(CheckpointError, match=r"no room for checkpoint 6 in .*: 1234 bytes free, expected \d{5}.*\[2, 4\]"):
        train.train(tiny_config(epochs=3), run)
    assert not list((run / "checkpoints").glob("6*"))


def test_a_folder_that_can_not_be_written(run, tiny_config, monkeypatch):
    """Root may write anywhere: a file stands where the folder should be."""
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("in the way")
    with pytest.raises((CheckpointError, OSError), match="checkpoints") as error:
        train.train(tiny_config(), run)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------------ not a number


def test_a_step_to_nowhere_can_be_replayed(run, tiny_config, tiny_dir, monkeypatch, capsys):
    """A clip's points are no numbers from the third epoch on: file and message name step and clips, a replay names the clip."""
    honest = input_pipeline.to_example
    training = input_pipeline.Records(dataset_of(tiny_dir), "train")
    victim = input_pipeline.clip_ids_of_step(training, 4, 0, 4)[2]  # of the fifth step

    def poisoned(raw):
        example = honest(raw)
        if example["clip_id"] == victim:
            example["landmarks"][3, 50] = np.nan
        return example

    monkeypatch.setattr(input_pipeline, "to_example", poisoned)
    assert train.main(arguments(run, tiny_dir, epochs=3)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    found = json.loads((run / "nonfinite.json").read_text())
    assert found["step"] == 5 and victim in found["clip_ids"] and len(found["clip_ids"]) == 4
    assert "is nan in epoch 3, step 5, of 4 clips" in said and "--replay=5" in said
    assert Checkpoints(run, read_only=True).latest_step() == 4
    before = {p: p.read_bytes() for p in files_of(run)}
    assert train.main([*arguments(run, tiny_dir, epochs=3), "--replay=5"]) == 0
    said = capsys.readouterr().err
    assert f"step 5: not finite first of all: landmarks of {victim} in the dataset" in said
    assert before == {p: p.read_bytes() for p in files_of(run)}, "a replay writes nothing"


def test_a_replay_gives_the_step_s_own_numbers(run, tiny_dir, trained, capsys):
    """From the checkpoint of step 2 on, step 3 again: with step 4 it makes the second row of metrics.csv."""
    from avsi_jax.workdir import read_rows

    shutil.rmtree(run / "checkpoints" / "4")
    norms = []
    for step in (3, 4):
        assert train.main([*arguments(run, tiny_dir), f"--replay={step}"]) == 0
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  grad_norm ")]
        norms.append(float(line.split()[1]))
    assert np.mean(norms) == pytest.approx(read_rows(trained / "metrics.csv")[1]["train_grad_norm"], rel=1e-4)


def test_a_replay_without_a_checkpoint_before_it(run, tiny_dir, capsys):
    shutil.rmtree(run / "checkpoints" / "2")
    assert train.main([*arguments(run, tiny_dir), "--replay=3"]) == 2
    assert "--replay=3: found checkpoints [4]" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------ stuck


def test_a_process_that_stands_still_is_named_by_the_others(tiny_dir, tiny_config, tmp_path):
    """One of two is stopped (SIGSTOP): the other dumps its stacks, names it and leaves with 75. A third who comes is refused."""
    fields = {"epochs": 9999, "early_stop_patience": 0, "watchdog_s": 5, "checkpoint_every": 9999, "checkpoint_seconds": 0}
    with processes.popen(["-m", "avsi_jax.train", *arguments(tmp_path / "run", tiny_dir, **fields)]) as (first, second):
        wait_for(lambda: (tmp_path / "run" / "metrics.csv").exists(), 240, first, second)
        with pytest.raises(ValueError, match=rf"a training that is running in it \(process {first.pid} on .*another --workdir"):
            train.train(tiny_config(**fields), tmp_path / "run")
        second.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert first.wait(60) == 75, first.stderr_text()
        assert time.monotonic() - began < 40
        said = first.stderr_text()
        second.send_signal(signal.SIGCONT)
    assert "watchdog: process 0 of 2 waited" in said and f"missing: process 1 (pid {second.pid} on" in said, said[-3000:]
    assert "Thread 0x" in said and "loop.py" in said, "all stacks"
    assert "loop.py" in (tmp_path / "run" / "stacks-0.txt").read_text()


def wait_for(condition, seconds: float, *started) -> None:
    until = time.monotonic() + seconds
    while not condition():
        ended = [process.poll() for process in started]
        said = "\n".join(process.stderr_text()[-3000:] for process in started)
        assert ended == [None] * len(started) and time.monotonic() < until, f"it did not come; {ended}\n{said}"
        time.sleep(0.1)


def test_the_watchdog_lets_who_works_alone(tmp_path):
    """Phases shorter than the bound, and a process that itself stood still, end nothing."""
    done = subprocess.run([sys.executable, "-c", ALIVE, str(tmp_path)], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0 and done.stderr == "", done.stderr


ALIVE = """
import os, signal, subprocess, sys, time
from etils import epath
from avsi_jax.phases import Phases
from avsi_jax.watchdog import Watchdog
phases = Phases()
dog = Watchdog(epath.Path(sys.argv[1]), phases, 2.0, print).start()
for _ in range(8):
    phases.enter("step")
    time.sleep(0.5)
subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
os.kill(os.getpid(), signal.SIGSTOP)
phases.enter("step")
time.sleep(0.5)
dog.stop()
"""


def test_the_bound_of_a_phase(tmp_path):
    """A step's is the config's, what was never done or reads and writes has ten times that; a slow kind has ten of its longest."""
    from avsi_jax import phases as phases_lib
    from avsi_jax.watchdog import Watchdog

    told = phases_lib.Phases()
    dog = Watchdog(tmp_path, told, 6.0, print)
    assert [dog._bound(phase) for phase in ("step", "compile", "checkpoint")] == [60, 60, 60]
    told.longest |= {"step": 0.1, "validation": 2.0, "checkpoint": 9.0, "barrier": 0.0}
    assert [dog._bound(phase) for phase in ("step", "validation", "checkpoint", "barrier", "data")] == [6, 20, 90, 6, 60]


@pytest.mark.parametrize(
    ("then", "says"),
    [
        ({1: ("step", 7, True), 2: ("step", 9, True)}, r"all are alive, behind: process 1 \(pid 11 .* in 'step' after step 7\)$"),
        ({1: ("step", 9, True), 2: ("checkpoint", 9, True)}, "all are alive, behind: none$"),
        ({1: ("step", 9, False), 2: ("step", 9, True)}, r"missing: process 1 \(pid 11 .* after step 9\)$"),
        ({2: ("step", 9, True)}, r"missing: process 1 \(no heartbeat\)$"),
    ],
)
def test_who_is_missing(tmp_path, then, says):
    """By the others' heartbeats alone: this process' own can't be written here, and nothing of that ends the watch."""
    from avsi_jax import phases as phases_lib
    from avsi_jax.watchdog import Watchdog

    told = phases_lib.Phases()
    told.step = 9
    dog = Watchdog(tmp_path, told, 0.05, print, rank=0, count=3)
    (tmp_path / "heartbeats" / "0.json").mkdir(parents=True)
    beats = []

    def beat():
        for rank, (phase, step, lives) in then.items():
            if beats and not lives:
                continue
            status = told.status() | {"phase": phase, "step": step, "pid": 10 + rank, "time": 1e9 + len(beats)}
            (tmp_path / "heartbeats" / f"{rank}.json").write_text(json.dumps(status))
        beats.append(1)

    beat()
    dog._beat = beat
    assert re.match(says, dog._missing()), dog._missing()


# -------------------------------------------------------------------------------------------------------------- on one's own


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (["--config.batch_size=-4"], "config.batch_size: found -4, expected 1 or more"),
        (["--config.batch_size=0"], "config.batch_size: found 0, expected 1 or more"),
        (["--config.validate_every=0"], "config.validate_every: found 0"),
        (["--config.checkpoint_every=0"], "config.checkpoint_every: found 0"),
        (["--config.keep=0"], "config.keep: found 0"),
        (["--config.watchdog_s=-1"], "config.watchdog_s: found -1.0, expected 0 or more"),
        (["--config.accumulate=3"], "config.accumulate: found 3, expected a divisor of 1"),
        (["--config.ema=1"], "config.ema: found 1.0"),
        (["--replay=0"], "--replay: found 0, expected a step counted from 1"),
        (["--distributed=on"], "--distributed=on, but no cluster found"),
        (["--distributed=off", "--num_processes=2"], "--distributed=off, but --num_processes given"),
        (["--workdir=s3://bucket/run"], "found s3://, expected a folder or gs://"),
    ],
)
def test_a_mistake_takes_one_line_and_nothing_is_written(tiny_dir, tmp_path, capsys, fields, says):
    assert train.main([*arguments(tmp_path / "run", tiny_dir), *fields]) == 2
    said = capsys.readouterr().err
    assert said.startswith("avsi-train: ") and said.count("\n") == 1 and says in said
    assert not (tmp_path / "run").exists()


def test_a_row_is_not_written_twice(run, tiny_dir, trained, tmp_path, capsys, monkeypatch):
    """Stopped in a validation, gone on, killed before the next checkpoint, gone on: the epoch's row is there once."""
    import interrupted

    command = arguments(tmp_path / "new", tiny_dir, checkpoint_every=2, checkpoint_seconds=0)
    with monkeypatch.context() as patched:
        interrupted.arrange("SIGTERM", "validation", 1, put=patched.setattr)
        assert train.main(command) == 143

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:  # after the row of the first epoch, in the first step of the second
        patched.setattr("avsi_jax.console.Console.report", die)
        with pytest.raises(Killed):
            train.main(command)
    assert train.main(command) == 0
    assert (tmp_path / "new" / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()
    assert len((tmp_path / "new" / "timing.csv").read_text().splitlines()) == 3


def test_a_checkpoint_that_is_saved_anew_is_never_gone(run, tiny_config):
    """Between the old one's leaving and the new one's coming: a restart takes the old one back; after it the old one goes."""
    from avsi_jax import steps

    config = tiny_config()
    saved = Checkpoints(run)
    state, host = saved.restore(4, steps.init_state(config, 2))
    saved._set_aside(4)
    assert saved.all_steps() == [2] and (run / "replaced" / "4").is_dir()
    saved.close()
    assert set_damaged_aside(run) == [] and not (run / "replaced").exists()
    saved = Checkpoints(run)
    assert saved.all_steps() == [2, 4] == sorted([2, saved.latest_step()])
    import jax

    saved.save(4, jax.tree.map(jax.numpy.asarray, state), host | {"anew": 1}, 0.5, anew=True)
    saved.close()
    assert not (run / "replaced").exists() and find_fault(run / "checkpoints" / "4") is None
    assert Checkpoints(run, read_only=True).restore(4, state)[1]["anew"] == 1
