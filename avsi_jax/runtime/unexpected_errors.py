"""Reports unexpected exceptions in one line instead of a traceback, e.g. where a new release of a dependency lacks a keyword.

The line names the exception, where it was raised, the library with its installed version where one is clearly involved, and what
to do. AVSI_DEBUG=1 in the environment adds the traceback.
"""

from __future__ import annotations

import functools
import linecache
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType, TracebackType

from avsi_jax.runtime import console_streams

OWN_PACKAGES = ("avsi_jax", "configs", "tfds_grid", "__main__", "__mp_main__")
ADVICE = "the tested versions: pip install . -c constraints/tests.txt in the checkout; AVSI_DEBUG=1 shows the traceback"
MAX_CHARS = 300  # of the exception's own message


def reported(name: str) -> Callable:
    """Decorator for the main function of the command `name`: an uncaught exception becomes a line on stderr and exit code 1.

    Its standard streams raise no errors (console_streams); if its stdout was lost, the exit code is not 0.
    """

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def call(*args, **kwargs) -> int:
            with console_streams.guarded() as stdout:
                try:
                    code = main(*args, **kwargs)
                except SystemExit as error:  # argparse
                    if error.code:
                        raise
                    raise SystemExit(int(_is_lost(stdout, name))) from None
                except BrokenPipeError:
                    stdout.discard()
                    code = 1
                except Exception as error:
                    print(f"{name}: {explain(error)}", file=sys.stderr, flush=True)
                    code = 1
                is_lost = _is_lost(stdout, name)
                return code or int(is_lost)

        return call

    return decorate


def _is_lost(stdout: console_streams.GuardedStream, name: str) -> bool:
    """Whether stdout could not be written, which is reported."""
    try:
        stdout.flush()
    except BrokenPipeError:
        stdout.discard()
        return True
    if stdout.error is None:
        return False
    reason = getattr(stdout.error, "strerror", None) or stdout.error
    print(f"{name}: stdout cannot be written ({reason}): output is lost; redirect it elsewhere", file=sys.stderr, flush=True)
    return True


def explain(error: BaseException) -> str:
    """'unexpected TypeError at clip_io.py:98 (av 19.0.2): ...' and what to do; with AVSI_DEBUG set, also prints the traceback."""
    if os.environ.get("AVSI_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    location, library = _origin(error.__traceback__)
    with_library = f" ({library})" if library else ""
    message = " ".join(str(error).split())[:MAX_CHARS]
    return f"unexpected {type(error).__name__} at {location}{with_library}: {message}; {ADVICE}"


def _origin(trace: TracebackType | None) -> tuple[str, str | None]:
    """Where an exception was raised, 'file.py:12', and the library it comes from, 'name version', or None."""
    frames = list(traceback.walk_tb(trace))
    if not frames:
        return "?", None
    frame, line = frames[-1]
    location = f"{Path(frame.f_code.co_filename).name}:{line}"
    for frame, line in reversed(frames):
        package = _package(frame.f_globals.get("__name__") or frame.f_code.co_filename.replace("/", "."))
        if package in OWN_PACKAGES:
            return location, _version(_packages_in_line(frame, line))
        if package not in sys.stdlib_module_names:
            return location, _version({package})
    return location, None


def _packages_in_line(frame: FrameType, line: int) -> set[str]:
    """Third-party packages whose modules, functions or classes a line of code names.

    Needed because a function that rejects its arguments leaves no frame of its own in the traceback.
    """
    names = set(re.findall(r"[A-Za-z_]\w*", linecache.getline(frame.f_code.co_filename, line)))
    values = [frame.f_locals.get(name, frame.f_globals.get(name)) for name in names]
    modules = [v.__name__ if isinstance(v, ModuleType) else getattr(v, "__module__", None) for v in values
               if isinstance(v, ModuleType) or callable(v)]  # fmt: skip
    packages = {_package(m) for m in modules if isinstance(m, str)}
    return packages - {*OWN_PACKAGES, *sys.stdlib_module_names}


def _package(module: str) -> str:
    return module.split(".")[0]


def _version(packages: set[str]) -> str | None:
    """'av 19.0.2' for exactly one package that is installed; None for several: any of them may be the cause."""
    from importlib import metadata

    if len(packages) != 1:
        return None
    (package,) = packages
    try:
        distribution = metadata.packages_distributions().get(package, [package])[0]
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return None
