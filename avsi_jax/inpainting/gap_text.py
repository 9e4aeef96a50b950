"""Gaps as users write them, in the command and on the page: START-END, in seconds or in minutes and seconds."""

from __future__ import annotations

import math
import re

AUTO = "auto"
EXPECTED_GAP = "expected START-END in seconds, such as 0.93-1.73"
MAX_SHOWN = 40  # characters of a wrong text in a message
TIME = r"(?:\d++:){0,2}+(?:\d++\.?+\d*+|\.\d++)(?:[eE][-+]?\d++)?+"  # possessive: linear in the length of a wrong text


def parse_gap(text: str) -> tuple[float, float]:
    """'0.93-1.73', '59:30.5-59:31' or '5e-05-0.2' -> (start_s, end_s). Raises ValueError."""
    match = re.fullmatch(rf"\s*+({TIME})\s*+s?+\s*+[-–]\s*+({TIME})\s*+s?+\s*+", text)
    if not match:
        found = " with a decimal comma" if re.search(r"\d,\d", text) else ""
        raise ValueError(f"{text[:MAX_SHOWN]!r}{found}: {EXPECTED_GAP}")
    try:
        gap = parse_time(match[1]), parse_time(match[2])
    except ValueError:
        raise ValueError(f"{text[:MAX_SHOWN]!r}: {EXPECTED_GAP}") from None
    if not gap[0] < gap[1]:
        raise ValueError(f"gap {text[:MAX_SHOWN]}: expected START-END with START < END")
    return gap


def parse_gaps(text: str | None) -> list[tuple[float, float]] | str:
    """'0.93-1.73, 2.1-2.3' -> [(0.93, 1.73), (2.1, 2.3)], sorted; 'auto' -> 'auto'. Raises ValueError."""
    text = (text or "").strip()
    parts = [part.strip() for part in re.split(r"[,;\n]", text) if part.strip()]
    if parts == [AUTO]:
        return AUTO
    if AUTO in parts:
        raise ValueError("auto detects the gaps, START-END gives them; use one of them")
    if re.search(r"\d,\d", text) and any(re.fullmatch(TIME, part) for part in parts):
        parts = [text]  # decimal commas: parse_gap names them
    return sorted(parse_gap(part) for part in parts)


def parse_time(text: str) -> float:
    """'83.5', '1:23.5' or '0:01:23.5' -> 83.5. Raises ValueError."""
    parts = [float(part) for part in text.strip().split(":")]
    seconds = sum(part * 60**i for i, part in enumerate(reversed(parts)))
    if len(parts) > 3 or not all(math.isfinite(part) and part >= 0 for part in parts):
        raise ValueError(f"{text!r}: expected seconds")
    return seconds
