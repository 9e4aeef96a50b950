"""Every shell command of the README and the documentation runs from a fresh clone: its program, options and files exist.

Commands are read from code blocks and from code in a line. Words in capitals stand for values; what is in brackets is optional.
"""

import functools
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from avsi_jax import configs

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "avsi_jax" / "pretrained").rglob("README.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROGRAM = re.compile(r"(avsi-\w+|make|python|pip|launch/\S+\.sh|sbatch|docker|bash) ")
OTHER_LIBRARIES = ("apache_beam",)  # whose modules are named in commands, and which may not be installed
NO_COMMAND = re.compile(r"avsi-\w+: ")  # a message of a command


def commands_of(page: Path) -> list[str]:
    """The commands of a page, comments removed, continued lines joined."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    blocks += [re.sub("^    ", "", block, flags=re.M) for block in re.findall(r"(?:^    .*\n)+", text, re.M)]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    lines = [
        re.sub(r"(\s#|   +\w).*", "", f"{line} ") for line in lines if PROGRAM.match(f"{line} ") and not NO_COMMAND.match(line)
    ]
    return [part.strip() for line in lines for part in line.split("&&")]


COMMANDS = sorted({command for page in PAGES for command in commands_of(page) if " " in command or command.startswith("avsi")})


def words_of(command: str) -> list[str]:
    """Its words, without brackets, alternatives and dots of a usage line."""
    return [word for word in shlex.split(re.sub(r"\.\.\.|[\[\]](?![^'\"]*['\"])", " ", command)) if word]


@functools.cache
def help_of(*program: str) -> str:
    done = subprocess.run([*program, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, (program, done.stderr[-2000:])
    return done.stdout


def check_options(words: list[str], known: str, like: str = "") -> None:
    """Options are named in the text of --help; fields exist in the config `like`, and values of fields fit them."""
    for word in words:
        name, _, value = word.partition("=")
        if word.startswith("--config.") and like:
            if name == "--config.FIELD":
                continue
            loaded = configs.load(like)
            field = name.removeprefix("--config.")
            assert field in configs.fields(loaded), word
            if value and not value.isupper():
                configs.load(like, [(field, value)])
        elif word.startswith("--config=") and like and not value.isupper():
            assert value in configs.names(), word
        elif word.startswith("-") and word != "--":
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", known), (word, "is not an option")


def check_avsi(words: list[str]) -> None:
    """A console script of this package."""
    program, *arguments = words
    module, function = PROJECT["scripts"][program].split(":")
    code = f"import sys; from {module} import {function}; sys.argv[0] = '{program}'; sys.exit({function}())"
    check_options(arguments, help_of(sys.executable, "-c", code), {"avsi-train": "base", "avsi-evaluate": "eval"}.get(program, ""))


def check_python(words: list[str]) -> None:
    """`python -m MODULE`, with the options of its --help; or `python FILE`."""
    if words[1] != "-m":
        assert (ROOT / words[1]).is_file(), words[1]
        return
    module, arguments = words[2], words[3:]
    if module.split(".")[0] in OTHER_LIBRARIES or "apache_beam" in (ROOT / f"{module.replace('.', '/')}.py").read_text():
        return
    arguments = arguments[: arguments.index("--")] if "--" in arguments else arguments
    task = [w for w in arguments[:1] if not w.startswith("-") and not w.isupper()]  # a subcommand has options of its own
    known = help_of(sys.executable, "-m", module)
    if task and f"{task[0]}" in known and "{" in known:
        done = subprocess.run(
            [sys.executable, "-m", module, *task, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=300
        )
        known += done.stdout
    check_options(arguments, known)


def check_pip(words: list[str]) -> None:
    """Requirements are valid, extras of this package exist, and files of constraints are there."""
    assert words[1] == "install"
    constraints = [b for a, b in zip(words, words[1:], strict=False) if a == "-c"]
    assert all((ROOT / file).is_file() for file in constraints)
    for word in words[2:]:
        if word not in ("-c", *constraints) and not word.startswith("-"):
            requirement = Requirement(re.sub(r"^\.", "avsi_jax", word))
            assert "[]" not in word, "today's pip refuses it"
            assert requirement.name != "avsi_jax" or requirement.extras <= PROJECT["optional-dependencies"].keys(), word


def check_make(words: list[str]) -> None:
    """The target exists, its recipe can be printed, and every variable is used in the Makefile."""
    variables = [word.split("=")[0] for word in words[1:] if "=" in word]
    used = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"\$[({{]{name}\b", used) for name in variables), words
    check_target(words[1:])


def check_target(words: list[str]) -> None:
    done = subprocess.run(["make", "--dry-run", "PYTHON=python3", *words], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    for required in re.findall(r"'\.(\[[^']*\])?'", done.stdout):  # pip refuses an empty list of extras
        assert required != "[]" and Requirement(f"avsi_jax{required}").extras <= PROJECT["optional-dependencies"].keys()


def check_launcher(words: list[str]) -> None:
    """A script of launch/, its own options, and those of avsi-train after --."""
    script = next(word for word in words if word.startswith("launch/"))
    own, separator, trainer = (
        (words, [], []) if "--" not in words else (words[: words.index("--")], ["--"], words[words.index("--") + 1 :])
    )
    own = own[own.index(script) + 1 :]
    check_options(own, help_of("bash", script))
    if separator:
        check_avsi(["avsi-train", *trainer])


def check(command: str) -> None:
    words = words_of(command)
    if words[0].startswith("avsi-"):
        check_avsi(words)
    elif words[0].startswith("launch/") or words[0] == "sbatch":
        check_launcher(words)
    elif words[0] == "docker":
        assert all((ROOT / b).is_file() for a, b in zip(words, words[1:], strict=False) if a == "--file")
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    else:
        {"python": check_python, "pip": check_pip, "make": check_make}[words[0]](words)


def test_commands_are_found():
    assert len(COMMANDS) > 100 and "make bench" in COMMANDS and "avsi-train --config=NAME --show" in COMMANDS


@pytest.mark.parametrize("target", re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
def test_a_make_target_asks_pip_for_extras_that_exist(target):
    check_target([target])
    check_target([target, "EXTRA=cuda"])


WRONG = (
    "avsi-train --wokdir=RUN", "avsi-train --config=av_s2", "avsi-evaluate --config.splt=test", "make tst", "pip install '.[]'",
    "pip install '.[ap]'", "python -m benchmarks.no_such", "launch/local.sh --process=2 -- --workdir=DIR",
)  # fmt: skip


def test_an_unknown_program_option_field_or_target_is_detected():
    for wrong in WRONG:
        with pytest.raises((AssertionError, ValueError, OSError)):
            check(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_program_options_and_files_of_a_documented_command_exist(command):
    check(command)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [*(f"avsi-train --config={name} --show" for name in ("av_mtl_s2s", "av_unified")), "avsi-inpaint --example --report"]
)
def test_a_command_that_takes_seconds_succeeds(command, tmp_path):
    program, *arguments = command.split()
    module, function = PROJECT["scripts"][program].split(":")
    code = f"import sys; from {module} import {function}; sys.argv[0] = '{program}'; sys.exit({function}())"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
