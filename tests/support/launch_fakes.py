"""Fakes for tests of launch/: a PATH with fake gcloud, kubectl, srun and avsi-train, and functions that read commands.

The loops, signals and files of the scripts are real.
"""

import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from avsi_jax import configs
from avsi_jax.training import cli

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
TOOLS = "bash cat date dirname env flock git grep hostname mkdir mktemp mv nohup rm sed setsid sleep tail tee touch true wc".split()
needs_tools = pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {' '.join(TOOLS)}")

TRAIN = "--config=tiny --workdir=gs://bucket/run --config.data_dir=gs://bucket/data --config.batch_size=64".split()
SLICE = "--name=pod --zone=here-1a --type=v5litepod-16".split()
GKE = "--name=avsi --image=registry/avsi_jax:1 --accelerator=tpu-v5-lite-podslice --topology=4x4".split()

# The fake trainer. Start N follows line N of the file `plan` (`plan.R` for process R): exits with a code or by a named signal,
# or waits for SIGTERM ("wait"), or ignores SIGTERM ("ignore"). 0 without such a line.
TRAINER = r"""#!/usr/bin/env bash
rank=${RANK:-0}
for word in "$@"; do case $word in --process_id=*) rank=${word#*=} ;; esac; done
echo "$*" >> "$FAKE/starts.$rank"
trap 'echo SIGTERM >> "$FAKE/terminated.$rank"; kill $! 2> /dev/null; exit 143' TERM
plan=$FAKE/plan.$rank; [ -f "$plan" ] || plan=$FAKE/plan
action=$(sed -n "$(wc -l < "$FAKE/starts.$rank")p" "$plan")
echo "trainer $rank does ${action:=0}"
case $action in
  wait) sleep 30 & touch "$FAKE/waits.$rank"; wait $! ;;
  ignore) trap '' TERM; sleep 30 ;;
  [A-Z]*) kill "-$action" $$; sleep 30 ;;
  *) exit "$action" ;;
esac
"""

# Any other fake command: appends its arguments to the file `calls`; answers with the next line of `states`, `codes` (one code per
# worker, or "lost") or `created`.
COMMAND = r"""#!/usr/bin/env bash
{ printf '%s\x1f' "${0##*/}" "$@"; printf '\x1e'; } >> "$FAKE/calls"
next() { echo . >> "$FAKE/$1.count"; sed -n "$(wc -l < "$FAKE/$1.count")p" "$FAKE/$1" 2> /dev/null; }
last=${!#}
case "${0##*/} $*" in
  *" describe "*)
    state=$(next states)
    [ "$state" != NONE ] || { echo 'ERROR: (gcloud) NOT_FOUND: Resource was not found' >&2; exit 1; }
    echo "${state:-READY}" ;;
  *"tpu_worker.sh run"*)
    if [ -n "$WORKERS" ]; then
      for ((worker = 0; worker < WORKERS; worker++)); do
        (cd "$FAKE/home$worker" && export HOME=$PWD RANK=$worker && bash -c "${last#--command=}") &
      done
      wait; exit 0
    fi
    codes=$(next codes)
    [ "$codes" != lost ] || exit 255
    for code in $codes; do echo "avsi-worker: host left with code $code"; done
    for code in $codes; do ((code == 0)) || exit "$code"; done ;;
  *" create "*) exit "$(next created || echo 0)" ;;
  srun*) # as the real one: SIGTERM to srun kills its tasks, SIGTERM to the job's steps (scancel --signal=TERM) reaches the tasks
    "$TRAINER_OF_SRUN" "$@" &
    task=$!
    echo "$task" > "$FAKE/task"
    trap 'kill -KILL "$task"; exit 143' TERM
    wait "$task"; exit ;;
  "scancel --signal=TERM "*) kill -TERM "$(cat "$FAKE/task")" ;;
  squeue*) cat "$FAKE/job" ;;
  kubectl*apply*) cat > "$FAKE/applied" ;;
esac
"""


class FakeCommands:
    """A folder with fake commands, files that script their behaviour, and files that record their calls."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.env = {"PATH": str(self.bin), "HOME": str(folder), "FAKE": str(folder), "AVSI_PAUSE_S": "0.01", "WORKERS": "",
                    "AVSI_LOOK_S": "0.05", "TRAINER_OF_SRUN": str(self.bin / "avsi-train")}  # fmt: skip
        self.script(plan=[])

    def add(self, *commands: str) -> None:
        """Puts fake commands on the PATH."""
        for command in commands:
            file = self.bin / command
            file.unlink(missing_ok=True)  # it may be a link to the real command
            file.write_text(TRAINER if command == "avsi-train" else COMMAND)
            file.chmod(0o755)

    def script(self, **lines: list) -> None:
        """Writes the lines of a file that scripts a fake command; `plan_0` is the file plan.0."""
        for name, values in lines.items():
            (self.folder / name.replace("_", ".")).write_text("".join(f"{value}\n" for value in values))

    def lines(self, name: str) -> list[str]:
        """The lines of a recorded file; [] if it does not exist."""
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []

    def calls(self) -> list[list[str]]:
        """The recorded commands, each as a list of words."""
        text = (self.folder / "calls").read_text() if (self.folder / "calls").exists() else ""
        return [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]

    def start(self, script: str, *args: str, **env: str) -> subprocess.Popen:
        """Starts a script of launch/."""
        # bash can't trap a signal that is ignored when it starts, as SIGINT is if the tests run in the background.
        command = ["env", "--default-signal=INT", "bash", str(LAUNCH / script), *map(str, args)]
        return subprocess.Popen(command, env=self.env | env, cwd=self.folder, text=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        """Runs a script of launch/ to its end."""
        process = self.start(script, *args, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def wait_for(self, *names: str) -> None:
        """Waits until all these files exist."""
        deadline = time.monotonic() + 20
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"{names}: not all exist after 20 s"
            time.sleep(0.02)


def shell(text: str) -> str:
    """The output of bash code that uses launch/common.sh."""
    command = ["bash", "-c", f"set -euo pipefail; source {shlex.quote(str(LAUNCH / 'common.sh'))}; {text}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def restartable() -> set[int]:
    """The exit codes after which the scripts restart a training."""
    return set(map(int, shell("for c in {0..255}; do if restartable $c; then echo $c; fi; done").split()))


def trainer_arguments(command: list[str]) -> dict:
    """The flags of avsi-train in a command, read by its own parser, so that unknown flags are an error."""
    if any("tpu_worker.sh run" in word for word in command):
        command = shlex.split(command[-1].removeprefix("--command=").partition(" -- ")[2])
    first = next(i for i, word in enumerate(command) if word.startswith("--config="))
    known, rest = cli.parse(command[first:])
    configs.load(known.config, configs.split_overrides(rest), like="base")
    return vars(known)


def dry_run(fakes: FakeCommands, script: str, *arguments: str) -> list[list[str]]:
    """The commands that a script prints with --dry_run."""
    done = fakes.run(script, *arguments)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]
