"""Commands survive standard streams that are closed, full, or lack a character; lost output makes the exit code 1."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from avsi_jax.runtime import console_streams, unexpected_errors

ROOT = Path(__file__).resolve().parents[2]
COMMAND = """
import os, sys
from avsi_jax.runtime import console_streams, unexpected_errors
@unexpected_errors.reported("command")
def main():
    print(f"stdin {console_streams.stdin_text()!r}"[:40])
    for k in range(3):
        print("clip-\\u00e9", k, flush=True)
        print("warning \\u00e9", file=sys.stderr)
        with open(f"{k}.txt", "w") as file:
            file.write("done")
    return 0
sys.exit(main())
"""


def run(folder, redirection, **environment):
    """The command in a shell with the redirection: (exit code, stdout, stderr, the files that it wrote)."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    (folder / "command.py").write_text(COMMAND)
    shell = f'"{sys.executable}" command.py {redirection}'
    done = subprocess.run(["sh", "-c", shell], cwd=folder, env=env, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
    return done.returncode, done.stdout, done.stderr, {p.name: p.read_text() for p in folder.glob("*.txt")}


@pytest.mark.parametrize(
    ("redirection", "code", "lost"),
    [("", 0, False), (">&-", 1, True), ("2>&-", 0, False), ("<&-", 0, False), (">&- 2>&- <&-", 1, None), (">/dev/full", 1, True)],
)
def test_a_command_goes_on_whatever_its_streams_are(tmp_path, redirection, code, lost):
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    returned, out, err, written = run(tmp_path, redirection)
    assert returned == code and written == {f"{k}.txt": "done" for k in range(3)}
    assert b"Traceback" not in err and b"Exception ignored" not in err
    if lost is not None:
        assert err.count(b"stdout cannot be written") == lost


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path):
    code, out, err, written = run(tmp_path, "", PYTHONIOENCODING="ascii")
    assert code == 0 and len(written) == 3 and out.count(b"clip-\\xe9") == 3 and b"warning \\xe9" in err


def test_a_reader_that_stops_reading_ends_the_command_silently():
    """Beyond what a pipe holds, so that the write fails whenever the reader ends."""
    code = """
from avsi_jax.runtime import unexpected_errors
@unexpected_errors.reported("command")
def main():
    for _ in range(1000):
        print("x" * 1000)
    return 0
import sys
sys.exit(main())
"""
    done = subprocess.run(["sh", "-c", f"{{ '{sys.executable}' -c '{code}'; echo $? >&2; }} | true"], cwd=ROOT, capture_output=True)
    assert done.stderr.split() == [b"1"]


def test_a_reader_of_stderr_that_stops_reading_loses_messages_only(tmp_path):
    """stdout goes to a file, stderr to a program that ends at once."""
    returned, _, _, written = run(tmp_path, "2>&1 >stdout.txt | true")
    assert returned == 0 and written.pop("stdout.txt").count("clip-") == 3 and len(written) == 3


def test_lost_output_is_reported_beside_other_failures(monkeypatch, capsys):
    @unexpected_errors.reported("command")
    def main():
        print("a clip")
        return 2

    monkeypatch.setattr(sys, "stdout", None)
    assert main() == 2
    assert capsys.readouterr().err.count("stdout cannot be written") == 1


def test_the_help_of_a_command_with_a_full_stdout_is_a_failure(monkeypatch):
    @unexpected_errors.reported("command")
    def main():
        print("usage")
        raise SystemExit(0)

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_may_begin_with_a_byte_order_mark(encoding):
    assert console_streams.text_of("a é.wav\nb.wav\n".encode(encoding)) == "a é.wav\nb.wav\n"


def test_other_bytes_are_kept_as_in_file_names():
    assert os.fsencode(console_streams.text_of(b"\xff.wav")) == b"\xff.wav"
