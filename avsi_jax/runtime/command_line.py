"""The parser of all commands: errors in one line, and --version."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser with --version whose errors are one line, without the usage before it."""

    def __init__(self, *args: Any, **options: Any):
        import avsi_jax

        super().__init__(*args, **options)
        self.add_argument("--version", action="version", version=f"avsi_jax {avsi_jax.__version__}", help="print the version")

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")
