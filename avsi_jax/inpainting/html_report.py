"""The HTML report of avsi-inpaint: plots and players of every clip, transcripts, confidence, processing times.

A clip is shown with the gap, restored, and, where the input has audio inside the gap, as it was. Names of files are shown without
the folders of this machine. The page loads nothing from anywhere else (its content security policy forbids it): images and audio,
read from the input and output files, are data URIs. Of a long clip only the parts around its gaps are shown. Its template is
templates/inpainting.html. Times are seconds of the clip's audio. Letters: N samples, C channels.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from avsi_jax.inpainting import clip_plots
from avsi_jax.inpainting.cli_output import ClipOutcome, printable
from avsi_jax.media import channels, clip_io, clip_source
from avsi_jax.runtime import shown_paths

FULL_CLIP_S = 12.0  # clips up to this length are shown in full
AROUND_S = 1.5  # of a longer clip, shown before and after a gap
MAX_SEGMENT_S = 15.0  # gaps that are close together are shown together up to this length
MAX_SEGMENTS = 6  # per clip
MAX_BYTES = 40_000_000  # of images and audio in the page
MAX_RATE, MAX_CHANNELS = 48_000, 2  # that every browser plays
AUDIBLE = 1e-3  # of full scale: where the input exceeds it inside a gap, it is shown too


def write(path: Path, outcomes: Sequence[ClipOutcome], *, command: str, checkpoint: str, track: int | None = None) -> None:
    """Writes the page, atomically. Raises OSError. If a clip cannot be shown, the page says why.

    track: the audio track that was restored, None for the default one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(6)}.part.html")
    try:
        part.write_text(render(outcomes, command=command, checkpoint=checkpoint, track=track), encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def render(outcomes: Sequence[ClipOutcome], *, command: str, checkpoint: str, track: int | None = None) -> str:
    """The page as HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("avsi_jax", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"printable": printable, "clock": clock}
    clips, outcomes = _clips(outcomes, track), _with_short_paths(outcomes)
    names = {clip["number"]: outcomes[clip["number"] - 1] for clip in clips}
    clips = [clip | {"outcome": names[clip["number"]]} for clip in clips]
    restored = [o for o in outcomes if o.status == "restored"]
    counts = {status: sum(o.status == status for o in outcomes) for status in dict.fromkeys(o.status for o in outcomes)}
    return environment.get_template("inpainting.html").render(
        outcomes=outcomes,
        clips=clips,
        counts=counts,
        num_gaps=sum(len(o.gaps) for o in restored),
        restored_s=sum(g.end_s - g.start_s for o in restored for g in o.gaps),
        seconds=sum(o.seconds.get("all", 0.0) for o in outcomes),
        command=shown_paths.without_folders(command),
        checkpoint=shown_paths.without_folders(checkpoint),
        date=datetime.date.today().isoformat(),
    )


def _with_short_paths(outcomes: Sequence[ClipOutcome]) -> list[ClipOutcome]:
    """The outcomes without the folders of this machine."""
    names = shown_paths.shortened([o.path for o in outcomes]) | shown_paths.shortened([o.output for o in outcomes if o.output])
    text = lambda message: shown_paths.without_folders(message, names)
    return [
        dataclasses.replace(
            o, path=names[o.path], output=names.get(o.output), error=o.error and text(o.error),
            warnings=tuple(text(warning) for warning in o.warnings),
        )
        for o in outcomes
    ]  # fmt: skip


def clock(seconds: float) -> str:
    """3.5 -> '3.50', 3723.5 -> '1:02:03.50'."""
    minutes, rest = divmod(round(seconds * 100), 6000)
    if not minutes:
        return f"{rest / 100:.2f}"
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}:{minutes:02d}" if hours else f"{minutes}") + f":{rest // 100:02d}.{rest % 100:02d}"


# ---- clips -------------------------------------------------------------------------------------------------------------------


def _clips(outcomes: Sequence[ClipOutcome], track: int | None) -> list[dict]:
    """For each restored clip its number and the segments to show, up to MAX_BYTES; `not_shown` says why there are none."""
    clips, size = [], 0
    for number, outcome in enumerate(outcomes, 1):
        if outcome.status != "restored":
            continue
        clip = {"name": f"clip-{number}", "number": number, "segments": [], "num_left_out": 0, "not_shown": ""}
        clips.append(clip)
        wanted = segments_of(outcome)
        clip["num_left_out"] = max(0, len(wanted) - MAX_SEGMENTS)
        if size > MAX_BYTES:
            clip["not_shown"] = "Not shown, to keep this page small."
            continue
        try:
            clip["segments"] = _segments(outcome, wanted[:MAX_SEGMENTS], track)
        except (ValueError, OSError) as error:  # moved or changed since
            clip["not_shown"] = shown_paths.without_folders(f"Cannot be shown: {error}")
        size += sum(len(card["image"]) + len(card["audio"]) for s in clip["segments"] for card in s["cards"])
    return clips


def segments_of(outcome: ClipOutcome) -> list[tuple[float, float]]:
    """The parts [(start_s, end_s)] of a clip that are shown: all of a short clip, else the parts around its gaps."""
    if outcome.duration_s <= FULL_CLIP_S:
        return [(0.0, outcome.duration_s)]
    segments = []
    for gap in outcome.gaps:
        start, end = max(0.0, gap.start_s - AROUND_S), min(outcome.duration_s, gap.end_s + AROUND_S)
        if segments and start < segments[-1][1] and end - segments[-1][0] <= MAX_SEGMENT_S:
            segments[-1] = (segments[-1][0], end)
        else:
            segments.append((start, end))
    return segments


def _segments(outcome: ClipOutcome, wanted: Sequence[tuple[float, float]], track: int | None) -> list[dict]:
    """Each segment with its times and its cards."""
    gaps = [(g.start_s, g.end_s) for g in outcome.gaps]
    with (
        clip_source.open_source(outcome.path, video=False, track=track) as before,
        _open_output(outcome.output, track) as after,
    ):
        return [
            {"start_s": start, "end_s": end, "cards": _cards([_piece(s, start, end) for s in (before, after)], start, end, gaps)}
            for start, end in wanted
        ]


def _open_output(path: str, track: int | None) -> clip_source.Source:
    """The output; its track of that number, unless it holds fewer tracks than the input."""
    try:
        return clip_source.open_source(path, video=False, track=track)
    except clip_io.MediaError:
        return clip_source.open_source(path, video=False)


def _piece(source: clip_source.Source, start_s: float, end_s: float) -> tuple[np.ndarray, int]:
    """(audio (N, C), rate) that is played and plotted: resampled or mixed to mono if browsers could not play it."""
    first, last = (min(round(t * source.rate), source.num_samples) for t in (start_s, end_s))
    samples, rate = source.audio(first, last), min(source.rate, MAX_RATE)
    samples = np.nan_to_num(samples, posinf=0.0, neginf=0.0)
    samples = samples if source.channels <= MAX_CHANNELS else channels.downmix(samples)[:, None]
    return clip_io.resample(samples, source.rate, rate), rate


def _cards(
    pieces: Sequence[tuple[np.ndarray, int]], start_s: float, end_s: float, gaps: Sequence[tuple[float, float]]
) -> list[dict]:
    """The cards of a segment, from its input and its output: with the gap, restored, and the input if it has audio in the gap."""
    inside = [(max(a, start_s), min(b, end_s)) for a, b in gaps if a < end_s and b > start_s]
    (original, rate), restored = pieces
    masked = original.copy()
    for a, b in inside:
        masked[round((a - start_s) * rate) : round((b - start_s) * rate)] = 0
    shown = [("With the gap", "masked", (masked, rate)), ("Restored", "system", restored)]
    if np.abs(original - masked).max(initial=0) > AUDIBLE:
        shown.append(("Original", "", (original, rate)))
    weights = channels.downmix_weights(original)
    mixed = [(channels.downmix(samples, weights), own_rate) for _, _, (samples, own_rate) in shown]
    top_db = max(clip_plots.peak_db(*mono) for mono in mixed[1:])
    return [
        {
            "name": name,
            "kind": kind,
            "image": clip_plots.audio(*mono, inside, top_db, first_s=start_s),
            "audio": clip_plots.audio_uri(*piece),
        }
        for (name, kind, piece), mono in zip(shown, mixed, strict=True)
    ]
