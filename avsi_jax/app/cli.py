"""avsi-app: serves a web page on this machine that restores gaps in uploaded clips.

Needs Gradio (extra `app`). The server listens on 127.0.0.1 unless --host is given, is never shared through Gradio's tunnel, makes
no requests to other machines, runs one restoration at a time, and keeps uploads until the page is closed or the server stops.
There are no passwords: anyone who can reach the address may use it. The page itself is in app/ui.py.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from avsi_jax.app import isolation
from avsi_jax.inpainting.cli_output import error_line
from avsi_jax.runtime import unexpected_errors
from avsi_jax.runtime.command_line import Parser

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from avsi_jax.app.session import Limits
    from avsi_jax.inpainting.api import Inpainter

SETTINGS = {  # no requests to other machines, no second server, nothing stored in browsers
    "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "GRADIO_SSR_MODE": "False", "GRADIO_MCP_SERVER": "False",
    "GRADIO_SHARE": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
}  # fmt: skip
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# ---- the command -----------------------------------------------------------------------------------------------------------------


@unexpected_errors.reported("avsi-app")
def main(argv: list[str] | None = None) -> int:
    """The console script; the exit code."""
    args = _parser().parse_args(argv)
    try:
        check_gradio_installed()
        limits = _limits(args)
        check_address(args.host, args.port)
        for number in STOP_SIGNALS:
            signal.signal(number, _stop)
        with served(_load_inpainter(args.checkpoint, args.mode), limits, args.host, args.port) as address:
            isolation.block_outgoing_connections(args.host)
            print(f"avsi-app: {address}  (Ctrl-C stops the server and deletes the uploads)", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        return 0
    except Exception as error:  # as avsi-inpaint: errors of users in one line, others with their class
        print(f"avsi-app: {error_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> Parser:
    parser = Parser(
        "avsi-app", description="A web page on this machine that restores gaps in the audio of clips. No data leaves the machine."
    )
    parser.add_argument("--checkpoint", default="pretrained", help="name of shipped weights (default: pretrained), a folder of "
                        "weights, or the working directory of a training")  # fmt: skip
    parser.add_argument("--mode", choices=("natural", "mean"), default="natural", help="as --mode of avsi-inpaint")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 admits other machines, without a password"
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default 7860); 0 picks a free one")
    parser.add_argument("--max_seconds", type=float, default=60, help="longest clip that is accepted (default 60)")
    parser.add_argument("--max_mb", type=float, default=200, help="largest file that is accepted (default 200)")
    return parser


def _limits(args: argparse.Namespace) -> Limits:
    from avsi_jax.app.session import Limits

    for name in ("max_seconds", "max_mb"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ValueError(f"--{name}={getattr(args, name):g}: expected a number above 0")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port={args.port}: expected 0 to 65535; 0 picks a free port")
    return Limits(args.max_seconds, args.max_mb)


def _load_inpainter(checkpoint: str, mode: str) -> Inpainter:
    from avsi_jax.inpainting.api import Inpainter
    from avsi_jax.runtime import compilation_cache

    compilation_cache.enable()
    return Inpainter.load(checkpoint, mode=mode)


def _stop(*_) -> None:
    for number in STOP_SIGNALS:  # a second signal would interrupt the deletion of the uploads
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def check_gradio_installed() -> None:
    """Raises OSError with the command that installs Gradio, if it is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise OSError("the page needs gradio, which is not installed; pip install 'avsi_jax[app]'")


# ---- the server ------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(inpainter: Inpainter, limits: Limits, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serves the page; yields its address. Everything it wrote is deleted afterwards. Raises OSError if the port is in use."""
    with isolation.temporary_folder() as folder:
        cache = folder / "gradio"  # Gradio serves files inside this folder directly, without copies
        with isolation.environment(SETTINGS | {"GRADIO_TEMP_DIR": str(cache), "GRADIO_EXAMPLES_CACHE": str(cache / "examples")}):
            from avsi_jax.app import ui  # imported here: Gradio reads some of the settings on import

            page = ui.build(inpainter, limits, cache / "sessions")
            port = port or _free_port(host)
            try:
                _launch(ui, page, limits, host, port)
                yield f"http://{_in_url(host)}:{port}/"
            finally:
                page.close(verbose=False)


def check_address(host: str, port: int) -> None:
    """Raises OSError if the server cannot listen there, before anything is loaded."""
    import socket

    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(address)
    except (OSError, UnicodeError) as error:
        raise _address_error(host, port, error) from None


def _address_error(host: str, port: int, error: Exception) -> OSError:
    if getattr(error, "errno", None) == errno.EADDRINUSE:
        return OSError(
            f"--port={port}: another program listens on {host}:{port}; stop it, or use another --port, such as 0 for a free one"
        )
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return OSError(f"cannot listen on {host}:{port} ({reason}); expected a --host of this machine and a --port that you may use")


def _launch(ui: ModuleType, page: Any, limits: Limits, host: str, port: int) -> None:
    try:
        with isolation.without_uvloop():
            ui.launch(page, limits, host, port)
    except OSError as error:
        check_address(host, port)
        raise _address_error(host, port, error) from None


def _in_url(host: str) -> str:
    """A host as it is written in an address."""
    return "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host


def _free_port(host: str) -> int:
    import socket

    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        return s.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
