"""Two hundred kills, signals in every phase and thousands of steps: the long versions of test_resume.py.

Starting an interpreter takes seconds of imports, so a server process imports everything once and forks the trainings; it has no
other threads and no devices (`serve`). AVSI_KILLS: number of kills instead of 200.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest

from tests.support import processes, resume_runs, signal_at_phase
from tests.support.resume_runs import assert_same_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("AVSI_KILLS", 200))
ENDLESS = 1_000_000  # epochs
HANG_S = 300  # a process that has not ended by then hangs
IMPORTS = """
jax flax.linen optax orbax.checkpoint grain.python matplotlib.figure jax.experimental.multihost_utils
avsi_jax.training.checkpoints avsi_jax.models.ctc_decoding avsi_jax.data.input_pipeline avsi_jax.training.loop
avsi_jax.training.summaries avsi_jax.models.systems avsi_jax.runtime.devices avsi_jax.train
""".split()


# --------------------------------------------------------------------------------------------------------------- forked trainings


def serve() -> None:
    """For each line {"argv", "errors", "env", "interrupt"} of stdin forks a training, prints its pid; for {"poll"} an exit code."""
    for name in IMPORTS:
        __import__(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            print(os.waitstatus_to_exitcode(status) if pid else "null", flush=True)
            continue
        single_threaded = threading.active_count() == 1 == len(os.listdir("/proc/self/task"))
        pid = os.fork() if single_threaded else 0
        if single_threaded and not pid:
            train(request)
        print(pid, flush=True)


def train(request: dict) -> None:
    """Runs a training in the forked process and ends it."""
    os.setsid()
    errors = os.open(request["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, errors), (2, errors)):
        os.dup2(file, stream)
    os.environ.update(request["env"])
    code = 1
    try:
        from avsi_jax.training import cli

        if request["interrupt"]:
            signal_at_phase.arrange(*request["interrupt"])
        code = cli.main(request["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Server:
    """Starts trainings with `devices` CPU devices each."""

    def __init__(self, devices: int, folder: Path):
        env = processes.environment(0, 1, devices, 0, OPENBLAS_NUM_THREADS="1")  # its threads would exist from the import on
        self._folder, self._started = folder, []
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=processes.ROOT
        )

    def ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, argv, interrupt=None, **env: str) -> "Training":
        """Starts a training. interrupt: SIGNAL, PHASE and NTH of tests/support/signal_at_phase.py."""
        errors = self._folder / f"{len(self._started)}.stderr"
        errors.touch()
        pid = self.ask(argv=[*map(str, argv)], errors=str(errors), interrupt=interrupt, env=env)
        assert pid, "the server has other threads, so it can't be forked safely"
        self._started.append(Training(self, pid, errors))
        return self._started[-1]

    def run(self, argv, interrupt=None) -> "Training":
        """Runs a training to its end."""
        training = self.start(argv, interrupt)
        training.wait()
        return training

    def close(self) -> None:
        for training in self._started:
            training.kill()
        self._process.stdin.close()
        self._process.wait(30)


class Training:
    """A forked training. code: its exit code, negative for a signal; None if it has not ended at the last poll."""

    def __init__(self, server: Server, pid: int, errors: Path):
        self._server, self.pid, self._errors, self.code = server, pid, errors, None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self._server.ask(poll=self.pid)
        return self.code

    def wait(self, seconds: float = 900) -> int:
        until(lambda: self.poll() is not None, seconds, self.messages)
        return self.code

    def kill(self) -> None:
        if self.poll() is None:  # only the server reaps it, so the pid is not reused
            os.kill(self.pid, signal.SIGKILL)

    def messages(self) -> str:
        return self._errors.read_text()


def until(condition, seconds: float, messages=lambda: "") -> None:
    """Waits until condition(); fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s:\n{messages()[-3000:]}")
        time.sleep(0.02)


@pytest.fixture(scope="module")
def four_devices(tmp_path_factory):
    """Server of trainings with four devices."""
    server = Server(4, tmp_path_factory.mktemp("four_devices"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    """Server of trainings with two devices."""
    server = Server(2, tmp_path_factory.mktemp("two_devices"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def arguments(tiny_dir):
    """arguments(workdir, **fields) of avsi-train: as in test_resume.py, but saved five times per second, without early stopping."""

    def make(workdir, **fields):
        return resume_runs.arguments(workdir, tiny_dir, **{"checkpoint_seconds": 0.2, "early_stop_patience": 0} | fields)

    return make


# ----------------------------------------------------------------------------------------------------------------- SIGKILL


class Watch:
    """Checks a workdir after every kill, and counts what the kills interrupted.

    newest: the newest checkpoint; idle: kills since it last advanced; half: kills during a save.
    """

    def __init__(self, workdir):
        self._workdir, self.newest, self.idle, self.half, self._seen = workdir, -1, 0, 0, set()

    def _checkpoints(self) -> dict[int, Path]:
        """{training step: folder}; in replaced/ if the step was about to be saved again."""
        return {int(p.name): p for name in ("replaced", "checkpoints") for p in self._workdir.glob(f"{name}/*") if p.name.isdigit()}

    def _incomplete(self) -> set[int]:
        """Inodes of the folders in which a checkpoint is being written, or was when its writer was killed."""
        return {path.stat().st_ino for path in self._workdir.glob("checkpoints/*tmp*")}

    def is_saving(self) -> bool:
        """Whether a save began since the last kill."""
        return bool(self._incomplete() - self._seen)

    def is_ahead(self) -> bool:
        """Whether there is a newer checkpoint than after the last kill."""
        return max(self._checkpoints(), default=-1) > self.newest

    def check(self) -> None:
        """The newest checkpoint is not older than before; it and the previous one are valid (older ones may be half deleted)."""
        from avsi_jax.training.checkpoints import find_fault

        folders = self._checkpoints()
        newest = max(folders, default=-1)
        faults = {step: fault for step in sorted(folders)[-2:] if (fault := find_fault(folders[step]))}
        assert not faults, f"killed after step {newest}: {faults}"
        assert newest >= self.newest, f"checkpoint {self.newest} is missing, there are {sorted(folders)}"
        self.half += self.is_saving()
        self._seen = self._incomplete()
        self.idle = self.idle + 1 if newest == self.newest else 0
        self.newest = newest

    def check_end(self) -> None:
        """No kill damaged a checkpoint, and nothing incomplete is left."""
        assert not (self._workdir / "damaged").exists() and not (self._workdir / "replaced").exists() and not self._incomplete()


def finish(run, arguments, watch, workdir, other) -> None:
    """Runs the killed training to its end a few epochs later, and an uninterrupted one; both must be the same."""
    epochs = max(watch.newest, 0) // 2 + 3
    run(arguments(workdir, epochs=epochs))
    run(arguments(other, epochs=epochs, checkpoint_every=ENDLESS, checkpoint_seconds=0))
    assert_same_run(workdir, other)
    watch.check_end()


def test_a_run_killed_two_hundred_times_ends_the_same(four_devices, arguments, tmp_path):
    """From just after the fork to some seconds of steps, so also during restore, compilation and saves."""
    workdir, watch, seed = tmp_path / "run", Watch(tmp_path / "run"), random.SystemRandom().randrange(2**32)
    rng, longest = random.Random(seed), 0.0
    print(f"seed {seed}, {KILLS} kills")
    for kill in range(KILLS):
        training, began = four_devices.start(arguments(workdir, epochs=ENDLESS)), time.monotonic()
        if kill < 2:  # the first compiles; the second shows how long a start takes until its first save
            until(watch.is_ahead, 300, training.messages)
            longest = 1.5 * (time.monotonic() - began)
        else:
            time.sleep(rng.uniform(0, longest))
        training.kill()
        assert training.wait() == -signal.SIGKILL, f"kill {kill}:\n{training.messages()[-3000:]}"
        watch.check()
        if watch.idle and watch.idle % 20 == 0:
            longest *= 1.5
    print(f"reached step {watch.newest}, {watch.half} kills during a save, runs of up to {longest:.1f} s")
    assert watch.newest >= KILLS // 20 and watch.half >= KILLS // 50

    def run(argv):
        assert (ended := four_devices.run(argv)).code == 0, ended.messages()[-3000:]

    finish(run, arguments, watch, workdir, tmp_path / "other")


def start_two(server, argv) -> list[Training]:
    """Starts a training of two processes."""
    address = f"127.0.0.1:{processes.free_port()}"
    return [server.start(argv, **dict(zip(processes.COORDINATES, (address, "2", str(rank)), strict=True))) for rank in (0, 1)]


def test_a_run_of_two_processes_ends_the_same_after_one_or_both_were_killed(two_devices, arguments, tmp_path):
    """In turn both during a save, the second, and the first. A process that loses its peer ends with a code for a restart."""
    workdir, watch, seed = tmp_path / "run", Watch(tmp_path / "run"), random.SystemRandom().randrange(2**32)
    rng, longest, ends, two = random.Random(seed), 0.0, [], []
    messages = lambda: f"seed {seed}, {ends}\n" + "\n---\n".join(one.messages()[-2000:] for one in two)
    for kill in range(max(3, KILLS // 10)):
        two[:], doomed = start_two(two_devices, arguments(workdir, epochs=ENDLESS)), ([0, 1], [1], [0])[kill % 3]
        until(lambda: "coordinator" in two[0].messages(), 120, messages)  # before that each waits minutes for the other
        began = time.monotonic()
        if kill < 1:
            until(watch.is_ahead, 300, messages)
            longest = time.monotonic() - began
        elif doomed == [0, 1]:
            until(watch.is_saving, 300, messages)
        else:
            time.sleep(rng.uniform(0, 1.5 * longest))
        for rank in doomed:
            two[rank].kill()
        killed_at = time.monotonic()
        codes = [one.wait(HANG_S) for one in two]
        ends.append((doomed, codes, round(time.monotonic() - killed_at, 1)))
        expected = [(-signal.SIGKILL,) if rank in doomed else (75, -signal.SIGABRT) for rank in (0, 1)]
        assert all(code in allowed for code, allowed in zip(codes, expected, strict=True)), messages()
        watch.check()
    print(f"seed {seed}, came to step {watch.newest}: killed, codes, seconds until all had ended: {ends}")

    def run(argv):
        two[:] = start_two(two_devices, argv)
        assert [one.wait() for one in two] == [0, 0], messages()

    finish(run, arguments, watch, workdir, tmp_path / "other")


# ----------------------------------------------------------------------------------------------------------------- SIGTERM


def test_a_run_stopped_in_every_phase_loses_no_finished_step(four_devices, arguments, tmp_path):
    """One run from its start to its end, stopped in each phase in turn."""
    workdir, watch, fields = tmp_path / "run", Watch(tmp_path / "run"), {"epochs": 30}
    for seconds in (0.1, 0.7, 1.5, 2.5):
        command = [*resume_runs.INTERRUPTED, "SIGTERM", "import", seconds, *arguments(workdir)]
        (finished,) = processes.run(command, processes=1, devices=4, timeout=HANG_S)
        assert finished.returncode in (143, -signal.SIGTERM), finished.stderr
    assert not workdir.exists() or not list(workdir.glob("checkpoints/*"))
    moments = [("restore", 1), ("start", 1), ("compile", 1), ("data", 3), ("step", 4), ("validation", 1), ("restore", 1),
               ("compile", 1), ("checkpoint", 2), ("saving", 2), ("validation", 2), ("after", 0.3), ("step", 1)]  # fmt: skip
    for phase, nth in moments:
        ended = four_devices.run(arguments(workdir, **fields), ("SIGTERM", phase, nth))
        assert ended.code == 143, (phase, ended.messages())
        before = watch.newest
        watch.check()
        if match := re.search(r"stopped by SIGTERM after step (\d+), ", ended.messages()):
            assert int(match[1]) == watch.newest > before, phase
        else:  # before the first step; also in the validation after an epoch whose last step was saved
            assert phase in ("restore", "start", "compile", "validation") and watch.newest == before, (phase, ended.messages())
        if phase == "validation" and nth == 1:  # repeats the validation, and is killed before anything is saved
            killed = four_devices.run(arguments(workdir, checkpoint_seconds=0, **fields), ("SIGKILL", "data", 1))
            assert killed.code == -signal.SIGKILL
    print(f"stopped last after step {watch.newest}")
    for run in (workdir, tmp_path / "other"):
        assert four_devices.run(arguments(run, checkpoint_seconds=0, **fields)).code == 0
    assert_same_run(workdir, tmp_path / "other")
    watch.check_end()


# ----------------------------------------------------------------------------------------------------------------- long runs


@pytest.mark.parametrize("devices", [2, 4])
def test_five_thousand_steps_complete_on_devices_that_share_cores(four_devices, two_devices, arguments, tmp_path, devices):
    """With more than one step in flight XLA's all-reduce would starve on such CPU devices and abort the process."""
    from avsi_jax.training.run_directory import read_rows

    fields = {"system": "a_si", "epochs": 2500, "validate_every": 500, "checkpoint_every": 2500, "checkpoint_seconds": 60}
    ended = {2: two_devices, 4: four_devices}[devices].run(arguments(tmp_path / "run", **fields))
    assert ended.code == 0, ended.messages()[-3000:]
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows] == [1000, 2000, 3000, 4000, 5000] and f"{devices} x cpu" in ended.messages()
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]


MEMORY = """
import json, sys
from avsi_jax.runtime import goodput
from avsi_jax.training import cli
memory_mb, enter = [], goodput.PhaseTimer.enter

def private_bytes():
    # memory of the process alone: pages of files may be dropped by the kernel and loaded again at any time
    status = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap")) * 1024

def enter_and_measure(self, phase):
    enter(self, phase)
    if phase == goodput.START:  # an epoch is finished, validated and saved
        memory_mb.append(private_bytes() / 1e6)

goodput.PhaseTimer.enter = enter_and_measure
code = cli.main(sys.argv[1:])
print(json.dumps(memory_mb))
sys.exit(code)
"""


def test_memory_does_not_grow_over_fifty_validations(arguments, tmp_path):
    import numpy as np

    # The last 50 of 130 epochs: in the first sixty freed memory is not reused yet, about 0.2 MB per epoch, later 0.02 to 0.04 MB.
    fields = {"epochs": 130, "validation_split": "train", "checkpoint_every": ENDLESS, "checkpoint_seconds": 0}
    (output,) = processes.succeed(["-c", MEMORY, *arguments(tmp_path / "run", **fields)], processes=1, devices=4, timeout=900)
    memory_mb = json.loads(output.splitlines()[-1])[-50:]
    slope = np.polyfit(range(len(memory_mb)), memory_mb, 1)[0]
    print(f"{memory_mb[0]:.1f} MB, {memory_mb[-1]:.1f} MB after 50 more epochs, {slope * 1000:.1f} KB per epoch")
    assert slope < 0.1, memory_mb


if __name__ == "__main__":
    serve()
