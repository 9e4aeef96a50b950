"""What native code says on stderr: one kind of line is kept off it, everything else arrives, whoever says it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code):
    """(stdout, stderr, exit code) of a new process: what is said natively, by file descriptor, is seen only from outside."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr, done.returncode


def test_a_face_tracker_says_nothing():
    code = "from avsi_jax.face import landmarks; landmarks.FaceTracker(); landmarks.FaceTracker(); print('made')"
    assert run(code) == ("made\n", "", 0)


def test_only_what_is_unwanted_is_kept_off():
    """Also of an error: what was said before it, then the error itself."""
    code = """
        import os
        from avsi_jax.runtime import stderr_filter

        def make(error=None):
            os.write(2, b"INFO: nothing\\nERROR: no room\\n")
            os.system("echo INFO: nothing at all >&2; echo a child >&2")
            if error:
                raise error
            return 7

        print(stderr_filter.made(make, "INFO: nothing"))
        try:
            stderr_filter.made(lambda: make(ValueError("broken")), "INFO: nothing")
        except ValueError as error:
            print(error)
        os.write(2, b"INFO: nothing is kept off later\\n")
"""
    said = "ERROR: no room\na child\n"
    assert run(code) == ("7\nbroken\n", said + said + "INFO: nothing is kept off later\n", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no tables of files for a thread")
def test_other_threads_and_their_children_keep_their_stderr():
    """What they say meanwhile arrives meanwhile, even lines of that kind; a child that goes on afterwards is heard."""
    code = """
        import os, subprocess, threading
        from avsi_jax.runtime import stderr_filter

        inside, through = threading.Event(), threading.Event()

        def make():
            inside.set()
            through.wait(60)
            os.write(2, b"INFO: nothing\\n")

        making = threading.Thread(target=stderr_filter.made, args=(make, "INFO: nothing"))
        making.start()
        inside.wait(60)
        os.write(2, b"INFO: nothing, says another thread\\n")
        child = subprocess.Popen("echo a child >&2; read line; echo later >&2", shell=True, stdin=subprocess.PIPE)
        files = [open(os.devnull) for _ in range(3)]
        through.set()
        making.join()
        child.communicate(b"go on\\n")
        [file.close() for file in files]
        print("done")
"""
    assert run(code) == ("done\n", "INFO: nothing, says another thread\na child\nlater\n", 0)


def test_a_system_without_tables_of_files_says_everything(monkeypatch, capfd):
    from avsi_jax.runtime import stderr_filter

    monkeypatch.setattr(stderr_filter.ctypes, "CDLL", lambda name: object())
    assert stderr_filter.made(lambda: os.write(2, b"INFO: nothing\n"), "INFO: nothing") == 14
    assert capfd.readouterr().err == "INFO: nothing\n"
