"""One process that goes through hostile inputs by the API, the command and the page, and tells how each came out.

python -m tests.support.hostile_child ROOT FIRST [page|command]: ROOT/inputs.json lists the inputs, FIRST is the number of the first to take. With
`page` the page's own handlers are gone through (Gradio is imported), else what they call; with `command` the command follows, of
all clips at once. A line of JSON on stdout before and after each; LONGEST_S after one has begun the process ends with status 1,
the stack on stderr.
"""

import contextlib
import faulthandler
import io
import json
import os
import resource
import sys
import time
import types
from pathlib import Path

LONGEST_S, MOST_BYTES = 30, 16 * 2**30  # of address space: to keep the machine from harm
GAP = (0.4, 0.6)


def peak_mb() -> float:
    """Of the memory held since it was last asked."""
    status = Path("/proc/self/status").read_text()
    peak = int(status[status.index("VmHWM:") :].split()[1]) / 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def answer(work, path: Path) -> tuple[str, str]:
    """(how it came out, what was said)."""
    try:
        return "done", str(work(path) or "")
    except (ValueError, OSError) as error:
        return "refused", str(error)
    except Exception as error:
        import traceback

        return "raised", "".join(traceback.format_exception(error))[-3000:]


def command(program, *argv: str) -> str:
    """What a command that is to end by code 2 says; AssertionError for another code, or for words on stdout."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program(list(argv))
    assert code == 2 and not out.getvalue(), (code, out.getvalue(), err.getvalue())
    raise ValueError(err.getvalue().rstrip("\n"))


def ways_of_clips(root: Path, inpainter, by_page: bool) -> dict:
    from avsi_jax.app import session

    inline = lambda work, jobs, **limits: [session.workers.Outcome(0, work(*jobs[0]))]
    session.workers.run = inline  # a child of its own for each upload takes a second: it is gone through over HTTP
    sessions = session.SessionStore(root / "tmp" / "visits", inpainter, session.Limits())

    def api(path):
        repair = inpainter.inpaint(path, [GAP])
        assert len(repair.samples) and len(repair.gaps) == 1, repair
        return repair.warnings

    def handlers(path):
        """The page's; its error is one line of HTML."""
        import gradio

        from avsi_jax.app import ui

        session_handlers, request = ui.Handlers(sessions), types.SimpleNamespace(session_hash="one")
        try:
            session_handlers.handler(session_handlers.take)(request, str(path))
            session_handlers.handler(session_handlers.restore)(request, "0.4-0.6", -1, False)
        except gradio.Error as error:
            assert "That did not work" not in error.message, error.message
            raise ValueError(error.message) from None

    def visited(path):
        from avsi_jax.app import rendering

        of = sessions.of("one")
        clip = of.take(path)
        assert rendering.clip(clip, clip.gaps)
        of.restore("0.4-0.6")

    return {"api": api, "page": handlers if by_page else visited}


def ways_of_weights(root: Path) -> dict:
    from avsi_jax.app import cli
    from avsi_jax.inference import weights
    from avsi_jax.inpainting import cli as inpainting_cli
    from avsi_jax.inpainting.api import Inpainter

    clip = str(root / "whole" / "a.wav")
    return {
        "read": weights.read,
        "api": Inpainter.load,
        "command": lambda path: command(inpainting_cli.main, clip, "-o", str(root / "out"), f"--checkpoint={path}"),
        "page": lambda path: command(cli.main, f"--checkpoint={path}"),
    }


def whole_command(root: Path, inpainter) -> dict:
    """All clips by the command, in this process: code, what it wrote, s, MB."""
    from avsi_jax.inpainting import api, cli

    api.Inpainter.load = staticmethod(lambda checkpoint: inpainter)  # the same weights, compiled already
    out, err = io.StringIO(), io.StringIO()
    peak_mb()
    began = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments(root))
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": time.monotonic() - began, "peak_mb": peak_mb()}


def arguments(root: Path) -> list[str]:
    return [f"{root}/in", "-o", f"{root}/out", "--json", "--report", f"--checkpoint={root}/good"]


def main(root: Path, first: int, more: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    tell = lambda **told: print(json.dumps(told), file=real, flush=True)
    real, sys.stdout = sys.stdout, sys.stderr
    from avsi_jax.inpainting.api import Inpainter

    inpainter = Inpainter.load(root / "good")
    ways = {True: ways_of_weights(root), False: ways_of_clips(root, inpainter, more == "page")}
    for kind in ("wav", "mkv"):  # compiled, and loaded, before time is taken
        for way in ways[False].values():
            way(root / "whole" / f"a.{kind}")
    tell(ready=peak_mb())
    for number, (name, kind) in list(enumerate(json.loads((root / "inputs.json").read_text())))[first:]:
        path = Path(os.fsdecode(bytes.fromhex(name)))
        for way, work in ways[kind == "weights"].items():
            tell(number=number, way=way, how="begun")
            faulthandler.dump_traceback_later(LONGEST_S, exit=True)
            peak_mb()
            began = time.monotonic()
            how, said = answer(work, path)
            faulthandler.cancel_dump_traceback_later()
            tell(number=number, way=way, how=how, transcript=said, seconds=time.monotonic() - began, peak_mb=peak_mb())
    if more == "command":
        tell(command=whole_command(root, inpainter))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
