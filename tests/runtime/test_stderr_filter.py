"""Native output to stderr: unwanted lines are removed, all others arrive, from whichever thread or child process they come."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code):
    """(stdout, stderr, exit code) of a new process: output to a file descriptor can be observed only from outside."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr, done.returncode


def test_a_face_tracker_writes_nothing_to_stderr():
    code = "from avsi_jax.face import landmarks; landmarks.FaceTracker(); landmarks.FaceTracker(); print('made')"
    assert run(code) == ("made\n", "", 0)


def test_only_unwanted_lines_are_removed():
    """Where the function fails too: its other lines, then the error itself."""
    code = """
        import os
        from avsi_jax.runtime import stderr_filter

        def function(error=None):
            os.write(2, b"INFO: nothing\\nERROR: no room\\n")
            os.system("echo INFO: nothing at all >&2; echo a child >&2")
            if error:
                raise error
            return 7

        print(stderr_filter.call_filtered(function, "INFO: nothing"))
        try:
            stderr_filter.call_filtered(lambda: function(ValueError("broken")), "INFO: nothing")
        except ValueError as error:
            print(error)
        os.write(2, b"INFO: nothing is removed later\\n")
"""
    kept = "ERROR: no room\na child\n"
    assert run(code) == ("7\nbroken\n", kept + kept + "INFO: nothing is removed later\n", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no file table for a single thread")
def test_other_threads_and_their_children_keep_their_stderr():
    """Their output arrives immediately, even unwanted lines; a child that runs on afterwards keeps its stderr."""
    code = """
        import os, subprocess, threading
        from avsi_jax.runtime import stderr_filter

        inside, through = threading.Event(), threading.Event()

        def function():
            inside.set()
            through.wait(60)
            os.write(2, b"INFO: nothing\\n")

        filtering = threading.Thread(target=stderr_filter.call_filtered, args=(function, "INFO: nothing"))
        filtering.start()
        inside.wait(60)
        os.write(2, b"INFO: nothing, says another thread\\n")
        child = subprocess.Popen("echo a child >&2; read line; echo later >&2", shell=True, stdin=subprocess.PIPE)
        files = [open(os.devnull) for _ in range(3)]
        through.set()
        filtering.join()
        child.communicate(b"go on\\n")
        [file.close() for file in files]
        print("done")
"""
    assert run(code) == ("done\n", "INFO: nothing, says another thread\na child\nlater\n", 0)


def test_nothing_is_removed_where_threads_have_no_file_tables(monkeypatch, capfd):
    from avsi_jax.runtime import stderr_filter

    monkeypatch.setattr(stderr_filter.ctypes, "CDLL", lambda name: object())
    assert stderr_filter.call_filtered(lambda: os.write(2, b"INFO: nothing\n"), "INFO: nothing") == 14
    assert capfd.readouterr().err == "INFO: nothing\n"
