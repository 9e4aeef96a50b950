"""Which gaps of a clip are restored: those that the user gives, or those that are detected.

Detected are the gaps that audio/gap_detection.py finds in the audio, and samples that the file lacks by its time stamps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from avsi_jax.inpainting import window_plan
from avsi_jax.media import clip_io

if TYPE_CHECKING:
    from avsi_jax.media.clip_source import Source

BLOCK_S = 10.0  # of audio that is analysed at once
# Samples that the file lacks are gaps from this length on: in speech, between other audio, and at the ends of the clip. Shorter
# ones are usual there or at the joints of recordings, and count by the rules of gap_detection, whose MAX_GAP_S is the longest.
MIN_MISSING_IN_SPEECH_S, MIN_MISSING_S, MIN_MISSING_AT_END_S = 0.008, 0.03, clip_io.MIN_EARLY_END_S
BESIDE_S, AROUND_S, SPEECH_DB = 0.02, 1.0, 20.0  # in speech: both sides are at most this far below the level around
MAX_NAMED = 3  # missing spans that one warning names


class NoGapFoundError(ValueError):
    """No gap was detected in a clip whose gaps were to be detected."""


def check_gaps(gaps: Sequence[tuple[float, float]], num_samples: int, rate: int, end_s: float = 0.0) -> list[tuple[int, int]]:
    """(start, end) pairs in seconds -> [start, end) in samples of the clip's own rate, sorted, overlapping gaps merged.

    end_s: of the clip, where its video ends later than its audio: a gap may end there. Raises ValueError that names the gap that
    does not fit and the reason.
    """
    duration = num_samples / rate
    spans = []
    for start, end in _pairs(gaps):
        if not 0 <= start < end:
            raise ValueError(f"gap {start:g}-{end:g}: expected START-END in seconds with 0 <= START < END")
        if start >= duration or end > max(duration, end_s) + 0.5 / rate:
            raise ValueError(f"gap {start:g}-{end:g} s is not inside the clip, whose audio is {duration:.3f} s long")
        spans.append((round(start * rate), min(round(end * rate), num_samples)))
        if spans[-1][0] == spans[-1][1]:
            raise ValueError(f"gap {start:g}-{end:g} s contains no sample at {rate} Hz")
    if not spans:
        raise ValueError("no gap given; expected at least one, such as --gap 0.93-1.73")
    return window_plan.merged(spans)


def _pairs(gaps: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The gaps, sorted. Raises ValueError for anything but pairs of numbers."""
    try:
        return sorted((float(start), float(end)) for start, end in gaps)
    except (TypeError, ValueError):
        raise ValueError(
            f"gaps {repr(gaps)[:60]}: expected a list of (start, end) pairs in seconds, such as [(0.9, 1.7)]"
        ) from None


def detected_gaps(source: Source) -> list[tuple[int, int]]:
    """The gaps detected in a clip, [start, end) in samples of its own rate. Raises NoGapFoundError if there are none.

    Besides those of gap_detection, these are the samples that the file lacks: they need not be recognised by their silence.
    """
    from avsi_jax.audio import gap_detection

    detector = gap_detection.GapDetector(source.rate)
    detected = [gap for _, block in source.blocks(max(1, round(BLOCK_S * source.rate))) for gap in detector.feed(block)]
    spans = [(gap.start, gap.end) for gap in (*detected, *detector.end())]
    longest = gap_detection.MAX_GAP_S * source.rate
    missing = _missing_spans(source)
    spans += [(start, end) for start, end in missing if end - start <= longest]
    if not spans:
        found = f"no gap of up to {gap_detection.MAX_GAP_S:g} s detected" if missing else "no gap detected"
        raise NoGapFoundError(
            f"{source.path}: {found}; expected digital silence, lost or repeated packets or clipped bursts in speech; "
            "give it with --gap START-END" + "".join(f"; {warning}" for warning in warnings_of_missing(source, []))
        )
    return window_plan.merged(spans)


def _missing_spans(source: Source) -> list[tuple[int, int]]:
    """The samples that a file lacks, as [start, end), where they are long enough to be a gap."""
    return [span for span in source.missing if span[1] - span[0] >= _shortest_s(source, *span) * source.rate]


def _shortest_s(source: Source, start: int, end: int) -> float:
    """From how many seconds on the missing samples [start, end) are a gap."""
    if start == 0 or end == source.num_samples:
        return MIN_MISSING_AT_END_S
    if end - start >= MIN_MISSING_S * source.rate:
        return MIN_MISSING_S
    beside, around = round(BESIDE_S * source.rate), round(AROUND_S * source.rate)
    quieter_side = min(_rms(source, start - beside, start), _rms(source, end, end + beside))
    in_speech = quieter_side > 10 ** (-SPEECH_DB / 20) * _rms(source, start - around, end + around)
    return MIN_MISSING_IN_SPEECH_S if in_speech else MIN_MISSING_S


def _rms(source: Source, start: int, stop: int) -> float:
    """Root mean square of the samples [start, stop), as many as exist."""
    x = source.audio(max(0, start), min(stop, source.num_samples))
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


def warnings_of_missing(source: Source, spans: list[tuple[int, int]]) -> list[str]:
    """A warning of samples that the file lacks and that are not restored, since they are not among the gaps `spans`."""
    rest = [part for span in _missing_spans(source) for part in window_plan.without(span, spans)]
    left = [(a / source.rate, b / source.rate) for a, b in rest if b - a >= MIN_MISSING_S * source.rate]
    if not left:
        return []
    named = ", ".join(f"{a:.2f}-{b:.2f} s" for a, b in left[:MAX_NAMED])
    more = f" and {len(left) - MAX_NAMED} more" if len(left) > MAX_NAMED else ""
    return [f"the file has no audio at {named}{more}: silent there, since no gap covers it"]
