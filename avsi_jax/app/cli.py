"""avsi-app: a page on this machine on which a person repairs a clip: put it in, mark what is lost, hear it whole.

Needs Gradio (extra `app`). The server listens at 127.0.0.1 unless told otherwise, is never shared, asks nothing of other machines,
makes one repair at a time, and keeps what was put in until the page is closed or the server stops. No passwords: whoever reaches
the address may use it. What the page is made of is in app/ui.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import signal
import sys
import threading
from typing import TYPE_CHECKING

from avsi_jax.app import isolation
from avsi_jax.runtime import unexpected_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from avsi_jax.app.session import Limits
    from avsi_jax.inpainting.api import Inpainter

SETTINGS = {  # nothing asked of others, no second server, nothing kept in browsers
    "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "GRADIO_SSR_MODE": "False", "GRADIO_MCP_SERVER": "False",
    "GRADIO_SHARE": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
}  # fmt: skip
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# ---- the command -----------------------------------------------------------------------------------------------------------------


@unexpected_errors.reported("avsi-app")
def main(argv: list[str] | None = None) -> int:
    known = _parser().parse_args(argv)
    try:
        need_gradio()
        limits = _limits(known)
        for number in ENDINGS:
            signal.signal(number, _stop)
        with served(_painter(known.checkpoint), limits, known.host, known.port) as address:
            isolation.forbid_calls_outside(known.host)
            print(f"avsi-app: {address}  (Ctrl-C stops it and deletes what was put in)", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        return 0
    except (ValueError, OSError) as error:
        print(f"avsi-app: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "avsi-app", description="A page in your browser that fills the holes in a clip's sound. Everything stays on this machine."
    )
    parser.add_argument("--checkpoint", default="pretrained", help="pretrained (the default), a folder of weights, or a workdir")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets others in, without a password")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max_seconds", type=float, default=60, help="longest clip that is taken (default 60)")
    parser.add_argument("--max_mb", type=float, default=200, help="largest file that is taken (default 200)")
    return parser


def _limits(known) -> Limits:
    from avsi_jax.app.session import Limits

    for name in ("max_seconds", "max_mb"):
        if not 0 < getattr(known, name) < float("inf"):
            raise ValueError(f"--{name}={getattr(known, name):g}: expected a number above 0")
    if not 0 <= known.port < 65536:
        raise ValueError(f"--port={known.port}: expected 0 to 65535; 0 takes any that is free")
    return Limits(known.max_seconds, known.max_mb)


def _painter(checkpoint: str) -> Inpainter:
    from avsi_jax.inpainting.api import Inpainter

    return Inpainter.load(checkpoint)


def _stop(*_) -> None:
    for number in ENDINGS:  # a second one would break off the deleting
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def need_gradio() -> None:
    """ModuleNotFoundError is no error of the program: one line says what to install."""
    if importlib.util.find_spec("gradio") is None:
        raise OSError("the page needs gradio, which is not installed; pip install 'avsi_jax[app]'")


# ---- the server ------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(inpainter: Inpainter, limits: Limits, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """The page at work; its address. All that it wrote is gone afterwards. OSError where the port is taken."""
    with isolation.own_folder() as folder:
        cache = folder / "gradio"  # within which Gradio serves files as they lie, without copies
        with isolation.environment(SETTINGS | {"GRADIO_TEMP_DIR": str(cache), "GRADIO_EXAMPLES_CACHE": str(cache / "examples")}):
            from avsi_jax.app import ui as drawn  # here: Gradio reads some of the settings when it is imported

            page = drawn.build(inpainter, limits, cache / "visits")
            port = port or _free_port(host)
            try:
                _launch(drawn, page, limits, host, port)
                yield f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/"
            finally:
                page.close(verbose=False)


def _launch(drawn, page, limits: Limits, host: str, port: int) -> None:
    try:
        drawn.launch(page, limits, host, port)
    except OSError as error:
        raise OSError(f"can't listen at {host}:{port} ({' '.join(str(error).split())}); take another --port") from None


def _free_port(host: str) -> int:
    import socket

    with socket.socket() as s:
        s.bind((host, 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
