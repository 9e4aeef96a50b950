"""Two hundred kills, every phase, thousands of steps: what test_resume.py shows of a few moments, over as many as an hour allows.

A start of a new interpreter costs seconds of imports. So trainings are forked here by a process that has imported all they need and
has done nothing else: it has no other thread, and has asked for no device (`serve`). AVSI_KILLS: how many kills instead of 200.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest

from tests.support import processes, signal_at_phase

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("AVSI_KILLS", 200))
ENDLESS = 1_000_000  # epochs
GRACE_S = 25  # from SIGTERM to the end of the process
PEERS_S = 100  # from the death of a process to the end of the others: jax' heartbeat is 60 s
IMPORTS = """jax flax.linen optax orbax.checkpoint grain.python matplotlib.figure jax.experimental.multihost_utils
avsi_jax.training.checkpoints avsi_jax.models.ctc_decoding avsi_jax.data.input_pipeline avsi_jax.training.loop avsi_jax.training.summaries avsi_jax.models.systems avsi_jax.runtime.devices
avsi_jax.train""".split()


# --------------------------------------------------------------------------------------------------------- starts that cost little


def serve() -> None:
    """For each line {"argv", "errors", "env", "interrupt"} of stdin forks a training and tells its pid; {"poll"}: its exit code."""
    for name in IMPORTS:
        __import__(name)
    for line in sys.stdin:
        asked = json.loads(line)
        if "poll" in asked:
            pid, status = os.waitpid(asked["poll"], os.WNOHANG)
            print(os.waitstatus_to_exitcode(status) if pid else "null", flush=True)
            continue
        alone = threading.active_count() == 1 == len(os.listdir("/proc/self/task"))
        pid = os.fork() if alone else 0
        if alone and not pid:
            train(asked)
        print(pid, flush=True)


def train(asked: dict) -> None:
    """The child's life."""
    os.setsid()
    errors = os.open(asked["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, errors), (2, errors)):
        os.dup2(file, stream)
    os.environ.update(asked["env"])
    code = 1
    try:
        from avsi_jax.training import cli

        if asked["interrupt"]:
            signal_at_phase.send = send_and_tell
            signal_at_phase.arrange(*asked["interrupt"])
        code = cli.main(asked["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def send_and_tell(name: str) -> None:
    print(f"\nSENT {time.time()}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), getattr(signal, name))


class Server:
    """Starts trainings on so many CPU devices each."""

    def __init__(self, devices: int, folder: Path):
        env = processes.environment(0, 1, devices, 0, OPENBLAS_NUM_THREADS="1")  # its threads would be there from the import on
        self._folder, self._started = folder, []
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=processes.ROOT
        )

    def ask(self, **asked):
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, argv, interrupt=None, **env: str) -> "Training":
        """interrupt: SIGNAL, PHASE and NTH of interrupted.py."""
        errors = self._folder / f"{len(self._started)}.stderr"
        errors.touch()
        pid = self.ask(argv=[*map(str, argv)], errors=str(errors), interrupt=interrupt, env=env)
        assert pid, "the server has other threads: a fork of it would not be sound"
        self._started.append(Training(self, pid, errors))
        return self._started[-1]

    def run(self, argv, interrupt=None) -> "Training":
        """One that has ended."""
        training = self.start(argv, interrupt)
        training.wait()
        return training

    def close(self) -> None:
        for training in self._started:
            training.kill()
        self._process.stdin.close()
        self._process.wait(30)


class Training:
    """code: how it ended, negative of a signal; None while it lives, as far as was asked."""

    def __init__(self, server: Server, pid: int, errors: Path):
        self._server, self.pid, self._errors, self.code = server, pid, errors, None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self._server.ask(poll=self.pid)
        return self.code

    def wait(self, seconds: float = 900) -> int:
        until(lambda: self.poll() is not None, seconds, self.transcript)
        return self.code

    def kill(self) -> None:
        if self.poll() is None:  # nobody else reaps it: the pid is still its own
            os.kill(self.pid, signal.SIGKILL)

    def transcript(self) -> str:
        return self._errors.read_text()


def until(condition, seconds: float, said=lambda: "") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not come within {seconds} s:\n{said()[-3000:]}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Of one process with four devices."""
    server = Server(4, tmp_path_factory.mktemp("alone"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """Of processes with two devices each."""
    server = Server(2, tmp_path_factory.mktemp("of_two"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def arguments(tiny_dir):
    """Of avsi-train, by workdir: the network of test_resume.py, saved five times a second, never stopped early."""
    from tests.training.test_resume import FIELDS

    def make(workdir, **fields):
        fields = FIELDS | {"data_dir": tiny_dir, "checkpoint_seconds": 0.2, "early_stop_patience": 0} | fields
        return ["--config=tiny", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]

    return make


# ------------------------------------------------------------------------------------------------------------------------ killed


class Watch:
    """What must hold of a workdir after every kill; counts what the kills met."""

    def __init__(self, workdir):
        self._workdir, self.newest, self.idle, self.half, self._left = workdir, -1, 0, 0, set()

    def _whole(self) -> dict[int, Path]:
        """The folder of each checkpoint; in replaced/ where its step was about to be saved anew."""
        return {int(p.name): p for name in ("replaced", "checkpoints") for p in self._workdir.glob(f"{name}/*") if p.name.isdigit()}

    def _half(self) -> set[int]:
        """Of the folders in which a checkpoint is being written, or was when its writer was killed, what tells them apart."""
        return {path.stat().st_ino for path in self._workdir.glob("checkpoints/*tmp*")}

    def is_saving(self) -> bool:
        """Since the last kill."""
        return bool(self._half() - self._left)

    def is_ahead(self) -> bool:
        """Of what there was after the last kill."""
        return max(self._whole(), default=-1) > self.newest

    def look(self) -> None:
        """The newest is no older than it was; it and the one before are whole, older ones may have died with who deleted them."""
        from avsi_jax.training.checkpoints import find_fault

        found = self._whole()
        newest = max(found, default=-1)
        faults = {step: fault for step in sorted(found)[-2:] if (fault := find_fault(found[step]))}
        assert not faults, f"killed after step {newest}: {faults}"
        assert newest >= self.newest, f"checkpoint {self.newest} is gone, there are {sorted(found)}"
        self.half += self.is_saving()
        self._left = self._half()
        self.idle = self.idle + 1 if newest == self.newest else 0
        self.newest = newest

    def end(self) -> None:
        """No kill damaged a checkpoint, and nothing half written is left."""
        assert not (self._workdir / "damaged").exists() and not (self._workdir / "replaced").exists() and not self._half()


def finish(run, arguments, watch, workdir, other) -> None:
    """Lets the killed run come to an end a few epochs on, and another one that nobody disturbs; they must be the same."""
    from tests.training.test_resume import assert_same_run

    epochs = max(watch.newest, 0) // 2 + 3
    run(arguments(workdir, epochs=epochs))
    run(arguments(other, epochs=epochs, checkpoint_every=ENDLESS, checkpoint_seconds=0))
    assert_same_run(workdir, other)
    watch.end()


def test_killed_two_hundred_times(alone, arguments, tmp_path):
    """From just after the fork to some seconds of steps, so also while it restores, compiles and saves."""
    workdir, watch, seed = tmp_path / "run", Watch(tmp_path / "run"), random.SystemRandom().randrange(2**32)
    rng, longest = random.Random(seed), 0.0
    print(f"seed {seed}, {KILLS} kills")
    for kill in range(KILLS):
        training, began = alone.start(arguments(workdir, epochs=ENDLESS)), time.monotonic()
        if kill < 2:  # the first compiles; so long a start of the second takes until it has saved something
            until(watch.is_ahead, 300, training.transcript)
            longest = 1.5 * (time.monotonic() - began)
        else:
            time.sleep(rng.uniform(0, longest))
        training.kill()
        assert training.wait() == -signal.SIGKILL, f"kill {kill}:\n{training.transcript()[-3000:]}"
        watch.look()
        if watch.idle and watch.idle % 20 == 0:
            longest *= 1.5
    print(f"came to step {watch.newest}, {watch.half} kills left half a checkpoint, lives up to {longest:.1f} s")
    assert watch.newest >= KILLS // 20 and watch.half >= KILLS // 50

    def run(argv):
        assert (done := alone.run(argv)).code == 0, done.transcript()[-3000:]

    finish(run, arguments, watch, workdir, tmp_path / "other")


def start_two(server, argv) -> list[Training]:
    """Two processes that are one training."""
    address = f"127.0.0.1:{processes.free_port()}"
    return [server.start(argv, **dict(zip(processes.COORDINATES, (address, "2", str(rank)), strict=True))) for rank in (0, 1)]


def test_of_two_processes_one_or_both_are_killed(of_two, arguments, tmp_path):
    """Who loses its peer leaves by itself, with a code that says: start again. In turn both in a save, the second, the first."""
    workdir, watch, seed = tmp_path / "run", Watch(tmp_path / "run"), random.SystemRandom().randrange(2**32)
    rng, longest, left, two = random.Random(seed), 0.0, [], []
    said = lambda: f"seed {seed}, {left}\n" + "\n---\n".join(one.transcript()[-2000:] for one in two)
    for kill in range(max(3, KILLS // 10)):
        two[:], doomed = start_two(of_two, arguments(workdir, epochs=ENDLESS)), ([0, 1], [1], [0])[kill % 3]
        until(lambda: "coordinator" in two[0].transcript(), 120, said)  # until then each waits for the other for minutes
        began = time.monotonic()
        if kill < 1:
            until(watch.is_ahead, 300, said)
            longest = time.monotonic() - began
        elif doomed == [0, 1]:
            until(watch.is_saving, 300, said)
        else:
            time.sleep(rng.uniform(0, 1.5 * longest))
        for rank in doomed:
            two[rank].kill()
        died = time.monotonic()
        codes = [one.wait(PEERS_S) for one in two]
        left.append((doomed, codes, round(time.monotonic() - died, 1)))
        expected = [(-signal.SIGKILL,) if rank in doomed else (75, -signal.SIGABRT) for rank in (0, 1)]
        assert all(code in wanted for code, wanted in zip(codes, expected, strict=True)), said()
        watch.look()
    print(f"seed {seed}, came to step {watch.newest}: killed, codes, seconds until all had left: {left}")

    def run(argv):
        two[:] = start_two(of_two, argv)
        assert [one.wait() for one in two] == [0, 0], said()

    finish(run, arguments, watch, workdir, tmp_path / "other")


# ---------------------------------------------------------------------------------------------------------------- told to stop


def test_told_to_stop_in_every_phase(alone, arguments, tmp_path):
    """One run, stopped in each phase in turn, on its way from nothing to its end: nothing that was done is lost."""
    from tests.training.test_resume import INTERRUPTED, assert_same_run

    workdir, watch, fields = tmp_path / "run", Watch(tmp_path / "run"), {"epochs": 30}
    for seconds in (0.1, 0.7, 1.5, 2.5):
        command = [*INTERRUPTED, "SIGTERM", "import", seconds, *arguments(workdir)]
        (done,) = processes.run(command, processes=1, devices=4, timeout=GRACE_S)
        assert done.returncode in (143, -signal.SIGTERM), done.stderr
    assert not workdir.exists() or not list(workdir.glob("checkpoints/*"))
    moments = [("restore", 1), ("start", 1), ("compile", 1), ("data", 3), ("step", 4), ("validation", 1), ("restore", 1),
               ("compile", 1), ("checkpoint", 2), ("saving", 2), ("validation", 2), ("after", 0.3), ("step", 1)]  # fmt: skip
    for phase, nth in moments:
        done = alone.run(arguments(workdir, **fields), ("SIGTERM", phase, nth))
        assert done.code == 143, (phase, done.transcript())
        sent = float(done.transcript().partition("SENT ")[2].split()[0])
        assert time.time() - sent < GRACE_S, phase
        before = watch.newest
        watch.look()
        if "nothing to save" in done.transcript():  # before the first step; of a run saved at an epoch's end its validation is, too
            assert phase in ("restore", "start", "compile", "validation") and watch.newest == before, (phase, done.transcript())
        else:
            assert f"stopped by SIGTERM after step {watch.newest}, saved; the same command goes on" in done.transcript(), phase
            assert watch.newest > before, phase
        if phase == "validation" and nth == 1:  # done now, and killed before anything is saved
            assert alone.run(arguments(workdir, checkpoint_seconds=0, **fields), ("SIGKILL", "data", 1)).code == -signal.SIGKILL
    print(f"stopped at last after step {watch.newest}")
    for run in (workdir, tmp_path / "other"):
        assert alone.run(arguments(run, checkpoint_seconds=0, **fields)).code == 0
    assert_same_run(workdir, tmp_path / "other")
    watch.end()


# ------------------------------------------------------------------------------------------------------------------- long


@pytest.mark.parametrize("devices", [2, 4])
def test_five_thousand_steps(alone, of_two, arguments, tmp_path, devices):
    """On CPU devices that share cores: with more than one step in flight XLA's all-reduce starves here, and aborts the process."""
    from avsi_jax.training.run_directory import read_rows

    fields = {"system": "a_si", "epochs": 2500, "validate_every": 500, "checkpoint_every": 2500, "checkpoint_seconds": 60}
    done = {2: of_two, 4: alone}[devices].run(arguments(tmp_path / "run", **fields))
    assert done.code == 0, done.transcript()[-3000:]
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows] == [1000, 2000, 3000, 4000, 5000] and f"{devices} x cpu" in done.transcript()
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]


MEMORY = """
import json, sys
from avsi_jax.runtime import goodput
from avsi_jax.training import cli
held, enter = [], goodput.Phases.enter

def own():
    # kB that are nobody's but the process's: of files' pages a machine may drop those that lie idle, and fetch them again later
    told = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return sum(int(told[name].split()[0]) for name in ("RssAnon", "VmSwap"))

def entering(self, now):
    enter(self, now)
    if now == goodput.START:  # an epoch is over, validated and saved
        held.append(own() * 1024 / 1e6)

goodput.Phases.enter = entering
code = cli.main(sys.argv[1:])
print(json.dumps(held))
sys.exit(code)
"""


def test_memory_does_not_grow_over_fifty_validations(arguments, tmp_path):
    import numpy as np

    # Of 130: over the first sixty what was freed is not yet used again, some 0.2 MB an epoch, then 0.02 to 0.04 MB.
    fields = {"epochs": 130, "validation_split": "train", "checkpoint_every": ENDLESS, "checkpoint_seconds": 0}
    (output,) = processes.succeed(["-c", MEMORY, *arguments(tmp_path / "run", **fields)], processes=1, devices=4, timeout=900)
    held = json.loads(output.splitlines()[-1])[-50:]
    slope = np.polyfit(range(len(held)), held, 1)[0]
    print(f"{held[0]:.1f} MB, {held[-1]:.1f} MB after 50 more epochs, {slope * 1000:.1f} KB an epoch")
    assert slope < 0.1, held


if __name__ == "__main__":
    serve()
