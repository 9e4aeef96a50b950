"""One process that passes hostile inputs through the API, the command and the page, and reports each outcome.

python -m tests.support.hostile_child ROOT FIRST [page|command]: ROOT/inputs.json lists the inputs, FIRST is the index of the first
one to process. With `page` the event handlers of the page are called (Gradio is imported) and worker processes decode the clips;
otherwise the session is called and decodes them here. With `command` avsi-inpaint follows, with all clips at once. Prints a line of
JSON on stdout before and after each input. HANG_S after an input was begun the process exits with status 1 and the stack on stderr.
"""

import contextlib
import faulthandler
import functools
import io
import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

HANG_S, MAX_BYTES = 120, 16 * 2**30  # per input; of address space, to protect the machine
GAP = (0.4, 0.6)


def peak_mb() -> float:
    """Peak resident memory since the last call."""
    status = Path("/proc/self/status").read_text()
    peak = int(status[status.index("VmHWM:") :].split()[1]) / 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def cpu_seconds() -> float:
    """CPU time of this process and of its worker processes that have ended."""
    return sum(os.times()[:4])


def outcome_of(work: Callable, path: Path) -> tuple[str, str]:
    """('done', result), ('refused', message of a ValueError or OSError) or ('raised', traceback of any other error)."""
    try:
        return "done", str(work(path) or "")
    except (ValueError, OSError) as error:
        return "refused", str(error)
    except Exception as error:
        import traceback

        return "raised", "".join(traceback.format_exception(error))[-3000:]


def refused_by_command(program: Callable, *argv: str) -> str:
    """Raises ValueError with what a command prints on stderr; AssertionError unless its exit code is 2 and stdout is empty."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program(list(argv))
    assert code == 2 and not out.getvalue(), (code, out.getvalue(), err.getvalue())
    raise ValueError(err.getvalue().rstrip("\n"))


def ways_for_clips(root: Path, inpainter, by_page: bool) -> dict[str, Callable]:
    """{name: function of a path} through which each clip goes."""
    from avsi_jax.app import session
    from avsi_jax.runtime import process_pool
    from tests.support.session_fakes import run_inline

    if not by_page:
        process_pool.run = run_inline  # a worker process per upload takes a second
    sessions = session.SessionStore(root / "tmp" / "sessions", inpainter, session.Limits())

    def api(path):
        repair = inpainter.inpaint(path, [GAP])
        assert len(repair.samples) and len(repair.gaps) == 1, repair
        return repair.warnings

    def handlers(path):
        """Through the event handlers; their error is one line of HTML."""
        import gradio

        from avsi_jax.app import ui

        page, request = ui.Handlers(sessions), types.SimpleNamespace(session_hash="one")
        try:
            values = page.handler(functools.partial(page.load, "file"))(request, str(path))
            token = dict(zip(ui.CLIP_OUTPUTS, values, strict=True))["token"]
            page.handler(page.restore)(request, token, "0.4-0.6", -1, False)
        except gradio.Error as error:
            assert "see the terminal of avsi-app" not in error.message, error.message
            raise ValueError(error.message) from None

    def by_session(path):
        from avsi_jax.app import rendering

        one = sessions.get("one")
        clip = one.load(path)
        assert rendering.clip(clip, clip.detected_gaps)
        one.restore("0.4-0.6")

    return {"api": api, "page": handlers if by_page else by_session}


def ways_for_weights(root: Path) -> dict[str, Callable]:
    """{name: function of a path} through which each folder of weights goes."""
    from avsi_jax.app import cli as app_cli
    from avsi_jax.inference import weights
    from avsi_jax.inpainting import cli as inpainting_cli
    from avsi_jax.inpainting.api import Inpainter

    clip = str(root / "valid" / "a.wav")
    command = lambda path: refused_by_command(inpainting_cli.main, clip, "-o", str(root / "out"), f"--checkpoint={path}")
    return {
        "read": weights.read,
        "api": Inpainter.load,
        "command": command,
        "page": lambda path: refused_by_command(app_cli.main, f"--checkpoint={path}", "--port=0"),
    }


def run_command(root: Path, inpainter) -> dict:
    """avsi-inpaint with all clips, in this process: exit code, output, seconds of CPU, MB."""
    from avsi_jax.inpainting import api, cli

    api.Inpainter.load = staticmethod(lambda checkpoint, **_: inpainter)  # the same weights, compiled already
    out, err = io.StringIO(), io.StringIO()
    peak_mb()
    began = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments(root))
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "cpu_s": time.process_time() - began, "peak_mb": peak_mb()}


def arguments(root: Path) -> list[str]:
    """Arguments of avsi-inpaint for all clips."""
    return [f"{root}/in", "-o", f"{root}/out", "--json", "--report", f"--checkpoint={root}/good"]


def main(root: Path, first: int, more: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    report = lambda **fields: print(json.dumps(fields), file=stdout, flush=True)
    stdout, sys.stdout = sys.stdout, sys.stderr
    from avsi_jax.inpainting.api import Inpainter

    inpainter = Inpainter.load(root / "good")
    ways = {True: ways_for_weights(root), False: ways_for_clips(root, inpainter, more == "page")}
    for kind in ("wav", "mkv"):  # compiles and loads everything before time is measured
        for way in ways[False].values():
            way(root / "valid" / f"a.{kind}")
    report(ready=peak_mb())
    for number, (name, kind) in list(enumerate(json.loads((root / "inputs.json").read_text())))[first:]:
        path = Path(os.fsdecode(bytes.fromhex(name)))
        for way, work in ways[kind == "weights"].items():
            report(number=number, way=way, outcome="begun")
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            peak_mb()
            began = cpu_seconds()
            outcome, text = outcome_of(work, path)
            faulthandler.cancel_dump_traceback_later()
            report(number=number, way=way, outcome=outcome, text=text, cpu_s=cpu_seconds() - began, peak_mb=peak_mb())
    if more == "command":
        report(command=run_command(root, inpainter))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
