"""Prints a constraints file that pins every direct dependency to the lower bound that pyproject.toml names: `make test-oldest`.

python constraints/lower_bounds.py EXTRA ... > FILE
"""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]


def pins(extras: list[str]) -> list[str]:
    """'name==version' of the dependencies and of the given extras; ValueError for one without a lower bound."""
    listed = PROJECT["dependencies"] + [r for extra in extras for r in PROJECT["optional-dependencies"][extra]]
    return [_pin(requirement) for requirement in listed]


def _pin(requirement: str) -> str:
    """'etils[epath]>=1.13; python_version < "4"' -> 'etils==1.13; python_version < "4"' (constraints take no extras)."""
    match = re.fullmatch(r"([\w.-]+)(?:\[[^]]*\])?>=([\w.]+)\s*(;.*)?", requirement.strip())
    if not match:
        raise ValueError(f"pyproject.toml: found {requirement!r}, expected name>=version")
    name, version, marker = match.groups()
    return f"{name}=={version}{marker or ''}"


if __name__ == "__main__":
    print("\n".join(pins(sys.argv[1:])))
