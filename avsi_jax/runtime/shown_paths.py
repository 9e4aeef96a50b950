"""Paths as pages show them that are passed on to others: without the folders of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDERS = re.compile(r"(?<![\w.:/~-])(?:~|\.{1,2})?/(?:[^/\s'\"]*/)*(?=[^/\s'\"])")


def shortened(paths: Iterable[str]) -> dict[str, str]:
    """{path: name}: relative paths as they are, absolute ones relative to the folder that they have in common."""
    paths = list(dict.fromkeys(paths))
    absolute = [path for path in paths if os.path.isabs(path)]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute]) if absolute else ""
    return {path: os.path.relpath(path, common) if os.path.isabs(path) else path for path in paths}


def without_folders(text: str, names: Mapping[str, str] | None = None) -> str:
    """A text in which absolute paths, and those from ~, . or .., are replaced by `names` or else by their last part."""
    for path in sorted(names or (), key=len, reverse=True):
        if os.path.isabs(path):
            text = text.replace(path, names[path])
    if (here := str(Path.cwd())) != os.sep:
        text = text.replace(here + os.sep, "")
    return FOLDERS.sub("", text)


def without_folders_in(value: Any) -> Any:
    """`without_folders` of every string in nested lists and dicts."""
    if isinstance(value, str):
        return without_folders(value)
    if isinstance(value, Mapping):
        return {key: without_folders_in(item) for key, item in value.items()}
    return [without_folders_in(item) for item in value] if isinstance(value, Sequence) else value
