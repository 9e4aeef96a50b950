"""Failures around a training: damaged, copied and mismatched checkpoints, full disks, user errors, repeated saves and rows."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from avsi_jax.data import input_pipeline
from avsi_jax.training import checksums, cli
from avsi_jax.training.checkpoints import CheckpointError, Checkpoints, find_fault, set_damaged_aside
from tests.support import processes
from tests.support.tiny_runs import arguments


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the session's training, with checkpoints of steps 2 and 4."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << (at % 8)
    path.write_bytes(bytes(content))


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


# --------------------------------------------------------------------------------------------------------- damaged checkpoints


@pytest.mark.slow
def test_a_changed_byte_in_any_file_of_a_checkpoint_is_detected(run):
    """In the first, the last and random bytes of every file, including those of Orbax; the file is named."""
    newest, rng, flips = run / "checkpoints" / "4", np.random.default_rng(0), 0
    assert checksums.is_sealed(newest) and find_fault(newest) is None
    for path in files_of(newest):
        for at in {0, path.stat().st_size - 1, *rng.integers(0, path.stat().st_size, 60).tolist()}:
            flip(path, at)
            fault = find_fault(newest)
            assert fault and (path.relative_to(newest).as_posix() in fault or path.name in (checksums.MANIFEST, checksums.SEAL)), (
                path
            )
            flip(path, at)
            flips += 1
    assert flips > 500 and find_fault(newest) is None


@pytest.mark.slow
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(run, trained, tiny_config, capsys):
    """A warning names file and folder, the damaged checkpoint is moved, and the run ends with the same numbers."""
    victim = max(files_of(run / "checkpoints" / "4" / "state"), key=lambda p: p.stat().st_size)
    flip(victim, 1000)
    cli.train(tiny_config(), run)
    messages = capsys.readouterr().err
    assert f"warning: checkpoint 4 is damaged (state/{victim.relative_to(run / 'checkpoints' / '4' / 'state')} is not" in messages
    assert "resumed at step 2" in messages and (run / "damaged" / "4").is_dir()
    assert (run / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()
    assert find_fault(run / "checkpoints" / "4") is None and find_fault(run / "damaged" / "4") is not None


def test_without_any_valid_checkpoint_nothing_is_changed(run, tiny_config):
    for step in ("2", "4"):
        (run / "checkpoints" / step / "state" / "_METADATA").unlink()
    before = {p: p.read_bytes() for p in files_of(run)}
    with pytest.raises(CheckpointError, match=r"4: state/_METADATA is missing; 2: state") as error:
        set_damaged_aside(run)
    assert "\n" not in str(error.value) and before == {p: p.read_bytes() for p in files_of(run)}


def test_a_damaged_checkpoint_is_not_loaded(run):
    from avsi_jax.inference.restorer import Restorer

    flip(max(files_of(run / "checkpoints" / "4" / "state"), key=lambda p: p.stat().st_size), 500)
    with pytest.raises(CheckpointError, match=r"checkpoint 4 in .* is damaged \(state/.*\[2, 4\]"):
        Restorer.from_workdir(run, "4")
    assert Restorer.from_workdir(run, "2").step == 2


def test_a_checkpoint_without_a_manifest_is_accepted(run):
    """Older versions wrote none."""
    for name in (checksums.MANIFEST, checksums.SEAL):
        (run / "checkpoints" / "4" / name).unlink()
    assert set_damaged_aside(run) == [] and Checkpoints(run, read_only=True).latest_step() == 4


@pytest.mark.parametrize("copy", [["cp", "-r"], ["rsync", "-r"]])
def test_a_copied_run_resumes(run, tmp_path, tiny_config, capsys, copy):
    """Times, owners and links are not needed; files of an unfinished save are copied too, and do no harm."""
    if not shutil.which(copy[0]):
        pytest.skip(f"{copy[0]} is not installed")
    (run / "checkpoints" / "6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (run / "checkpoints" / "6.orbax-checkpoint-tmp" / "state" / "half").write_text("x")
    subprocess.run([*copy, f"{run}/", str(tmp_path / "copy")], check=True)
    row = cli.train(tiny_config(epochs=3), tmp_path / "copy")
    assert row["step"] == 6 and "resumed at step 4" in capsys.readouterr().err
    assert Checkpoints(tmp_path / "copy", read_only=True).latest_step() == 6


# ------------------------------------------------------------------------------------------------- mismatched configs and data


def test_another_dataset_is_refused_by_its_fingerprint(run, tiny_config, tiny_dir, tmp_path):
    """One byte of one clip differs, with a correct checksum; names, lengths and version are the same."""
    other = Path(shutil.copytree(tiny_dir, tmp_path / "data"))
    fingerprint = json.loads((run / "run.json").read_text())["dataset"]["fingerprint"]["train"]
    assert len(fingerprint) == 16 and input_pipeline.Records(dataset_of(other), "train").fingerprint() == fingerprint
    rewrite_first_record(dataset_of(other), "train")
    assert input_pipeline.Records(dataset_of(other), "train").fingerprint() != fingerprint
    with pytest.raises(ValueError, match=r"another dataset \(fingerprint: .*there, .*here\)") as error:
        cli.train(tiny_config(data_dir=other), run)
    assert "\n" not in str(error.value)


def dataset_of(data_dir):
    return input_pipeline.find_dataset(data_dir)


def rewrite_first_record(dataset, split) -> None:
    """Changes a sample of the first clip's audio, and the checksum accordingly."""
    import google_crc32c

    (path,) = sorted(Path(dataset).glob(f"*-{split}.tfrecord-*"))
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    content[12 + size // 2] ^= 1
    crc = google_crc32c.value(bytes(content[12 : 12 + size]))
    content[12 + size : 16 + size] = (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")
    path.write_bytes(bytes(content))


def test_the_number_of_epochs_of_a_cosine_schedule_cannot_change(run, tiny_config):
    """Another number would be another schedule for the steps that are done."""
    fields = {"schedule": "cosine", "epochs": 1}
    (run / "config.json").write_text(tiny_config(**fields).to_json())
    with pytest.raises(ValueError, match="epochs: 1 there, 2 here"):
        cli.train(tiny_config(**fields | {"epochs": 2}), run)


# ------------------------------------------------------------------------------------------------------------------ full disks

# stderr goes through a pipe: in a file it would be limited as well, and the expected line could be truncated.
LIMITED = """
import resource, subprocess, sys
limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)  # longer writes fail as on a full disk
command = [sys.executable, "-m", "avsi_jax.train", *sys.argv[2:]]
done = subprocess.run(command, stderr=subprocess.PIPE, preexec_fn=limited)
sys.stderr.buffer.write(done.stderr)
sys.exit(done.returncode)
"""


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_keeps_its_checkpoints(run, tiny_dir):
    """The third epoch's checkpoint can't be written: one line names path and bytes, the two earlier checkpoints stay valid."""
    command = ["-c", LIMITED, 30_000, *arguments(run, tiny_dir, epochs=3)]
    (finished,) = processes.run(command, processes=1, devices=4, timeout=200)
    # Threads of Orbax may print into the same line, before and after it.
    assert finished.returncode == 2, (finished.returncode, finished.stderr)
    assert finished.stderr.count(f"{run / 'checkpoints'}: checkpoint 6 of ") == 1, finished.stderr[-3000:]
    assert "[2, 4]" in finished.stderr
    assert "avsi_jax/" not in finished.stderr, "no traceback of ours; tensorstore's threads may print theirs"
    assert [find_fault(run / "checkpoints" / step) for step in ("2", "4")] == [None, None]
    assert set_damaged_aside(run) == [] and Checkpoints(run, read_only=True).latest_step() == 4


def test_an_error_while_closing_does_not_hide_a_failed_save(run, monkeypatch):
    """Orbax may raise another error when it is closed after a failed save, as seen with its event loop."""
    saved = Checkpoints(run)

    def fail(message):
        raise RuntimeError(message)

    closed = saved._manager.close
    monkeypatch.setattr(saved._manager, "wait_until_finished", lambda: fail("no space left"))
    monkeypatch.setattr(saved._manager, "close", lambda: fail("Event loop is closed"))
    with pytest.raises(CheckpointError, match="no space left"):
        saved.close()
    monkeypatch.undo()
    closed()


def test_too_little_disk_space_is_an_error_before_anything_is_written(run, tiny_config, monkeypatch):
    from avsi_jax.training import checkpoints

    usage = shutil.disk_usage(run)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=1234))
    with pytest.raises(CheckpointError, match=r"checkpoint 6 in .*: 1234 bytes free, expected \d{5}.*\[2, 4\]"):
        cli.train(tiny_config(epochs=3), run)
    assert not list((run / "checkpoints").glob("6*"))


def test_a_folder_that_cannot_be_written_is_an_error(run, tiny_config, monkeypatch):
    """A file in place of the folder, since root may write anywhere."""
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("in the way")
    with pytest.raises((CheckpointError, OSError), match="checkpoints") as error:
        cli.train(tiny_config(), run)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------- user errors


@pytest.mark.parametrize(
    ("fields", "message"),
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
def test_a_user_error_is_one_line_and_nothing_is_written(tiny_dir, tmp_path, capsys, fields, message):
    assert cli.main([*arguments(tmp_path / "run", tiny_dir), *fields]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("avsi-train: ") and stderr.count("\n") == 1 and message in stderr
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------- repeated rows and saves


def test_the_row_of_an_epoch_is_not_written_twice(run, tiny_dir, trained, tmp_path, capsys, monkeypatch):
    """Stopped during a validation, resumed, killed before the next checkpoint, resumed again."""
    from tests.support import signal_at_phase

    command = arguments(tmp_path / "new", tiny_dir, checkpoint_every=2, checkpoint_seconds=0)
    with monkeypatch.context() as patched:
        signal_at_phase.arrange("SIGTERM", "validation", 1, put=patched.setattr)
        assert cli.main(command) == 143

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:  # after the row of the first epoch
        patched.setattr("avsi_jax.training.progress_log.Console.epoch", die)
        with pytest.raises(Killed):
            cli.main(command)
    assert cli.main(command) == 0
    assert (tmp_path / "new" / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()
    assert len((tmp_path / "new" / "timing.csv").read_text().splitlines()) == 3


def test_a_checkpoint_that_is_replaced_is_never_lost(run, tiny_config):
    """If the new one is missing, a restart recovers the old one; once the new one is saved, the old one is deleted."""
    import jax

    from avsi_jax.training import train_step

    saved = Checkpoints(run)
    state, host = saved.restore(4, train_step.init_state(tiny_config(), 2))
    saved._set_aside(4)
    assert saved.all_steps() == [2] and (run / "replaced" / "4").is_dir()
    saved.close()
    assert set_damaged_aside(run) == [] and not (run / "replaced").exists()
    saved = Checkpoints(run)
    assert saved.all_steps() == [2, 4] == sorted([2, saved.latest_step()])
    saved.save(4, jax.tree.map(jax.numpy.asarray, state), host | {"replaced": 1}, 0.5, replace=True)
    saved.close()
    assert not (run / "replaced").exists() and find_fault(run / "checkpoints" / "4") is None
    assert Checkpoints(run, read_only=True).restore(4, state)[1]["replaced"] == 1
