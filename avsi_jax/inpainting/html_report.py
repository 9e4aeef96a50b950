"""What avsi-inpaint did -> one HTML page: before and after as pictures and players, what was read, how sure, how long it took.

The page loads nothing from anywhere (its content security policy forbids it): pictures and sounds are in it as data URIs, read
from the clips and from what was written. Of a long clip only what lies around its gaps is shown. Its looks are in pages/. Times
are seconds of the clip's sound. Letters: N samples, C channels.
"""

from __future__ import annotations

import datetime
import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from avsi_jax.inpainting import clip_plots
from avsi_jax.inpainting.cli_output import ClipOutcome, shown
from avsi_jax.media import channels, clip_io, clip_source, plots

SHORT_S = 12.0  # a clip up to here is shown whole
AROUND_S = 1.5  # of a longer one, before and after a gap
MOST_S = 15.0  # gaps that lie together are shown together up to here
MOST_STRETCHES = 6  # of a clip
MOST_BYTES = 40_000_000  # of pictures and sounds in the page
MOST_RATE, MOST_CHANNELS = 48_000, 2  # that every browser plays


def write(path: Path, outcomes: Sequence[ClipOutcome], *, command: str, checkpoint: str) -> None:
    """Writes the page, whole or not at all. OSError; what can't be shown of a clip is told in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(6)}.part.html")
    try:
        part.write_text(page(outcomes, command=command, checkpoint=checkpoint), encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def page(outcomes: Sequence[ClipOutcome], *, command: str, checkpoint: str) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("avsi_jax", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shown": shown, "clock": clock}
    restored = [o for o in outcomes if o.status == "restored"]
    counts = {status: sum(o.status == status for o in outcomes) for status in dict.fromkeys(o.status for o in outcomes)}
    return environment.get_template("inpainting.html").render(
        outcomes=outcomes,
        clips=_clips(outcomes),
        counts=counts,
        num_gaps=sum(len(o.gaps) for o in restored),
        filled_s=sum(g.end_s - g.start_s for o in restored for g in o.gaps),
        seconds=sum(o.seconds.get("all", 0.0) for o in outcomes),
        command=command,
        checkpoint=checkpoint,
        date=datetime.date.today().isoformat(),
    )


def clock(seconds: float) -> str:
    """3.5 -> '3.50', 3723.5 -> '1:02:03.50'."""
    minutes, rest = divmod(round(seconds * 100), 6000)
    if not minutes:
        return f"{rest / 100:.2f}"
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}:{minutes:02d}" if hours else f"{minutes}") + f":{rest // 100:02d}.{rest % 100:02d}"


# ---- clips -------------------------------------------------------------------------------------------------------------------


def _clips(outcomes: Sequence[ClipOutcome]) -> list[dict]:
    """Of each clip that was restored its outcome and stretches, as long as there is room for them; why a clip is not shown."""
    clips, size = [], 0
    for number, outcome in enumerate(outcomes, 1):
        if outcome.status != "restored":
            continue
        clip = {"name": f"clip-{number}", "outcome": outcome, "stretches": [], "left_out": 0, "unseen": ""}
        clips.append(clip)
        wanted = stretches_of(outcome)
        clip["left_out"] = max(0, len(wanted) - MOST_STRETCHES)
        if size > MOST_BYTES:
            clip["unseen"] = "Not shown, to keep this page small."
            continue
        try:
            clip["stretches"] = _stretches(outcome, wanted[:MOST_STRETCHES])
        except (ValueError, OSError) as error:  # moved or changed since
            clip["unseen"] = f"Can't be shown: {error}"
        size += sum(len(card["picture"]) + len(card["sound"]) for s in clip["stretches"] for card in s["cards"])
    return clips


def stretches_of(outcome: ClipOutcome) -> list[tuple[float, float]]:
    """[(start_s, end_s)] that are shown: the whole of a short clip, else what is around its gaps."""
    if outcome.duration_s <= SHORT_S:
        return [(0.0, outcome.duration_s)]
    stretches = []
    for gap in outcome.gaps:
        start, end = max(0.0, gap.start_s - AROUND_S), min(outcome.duration_s, gap.end_s + AROUND_S)
        if stretches and start < stretches[-1][1] and end - stretches[-1][0] <= MOST_S:
            stretches[-1] = (stretches[-1][0], end)
        else:
            stretches.append((start, end))
    return stretches


def _stretches(outcome: ClipOutcome, wanted: Sequence[tuple[float, float]]) -> list[dict]:
    """Each with its place and two cards: the clip as it came, and as it was written."""
    gaps = [(g.start_s, g.end_s) for g in outcome.gaps]
    with (
        clip_source.open_source(outcome.path, video=False) as before,
        clip_source.open_source(outcome.output, video=False) as after,
    ):
        return [
            {"start_s": start, "end_s": end, "cards": _cards([_piece(s, start, end) for s in (before, after)], start, end, gaps)}
            for start, end in wanted
        ]


def _piece(source: clip_source.Source, start_s: float, end_s: float) -> tuple[np.ndarray, int]:
    """(sound (N, C), rate): what is played and drawn; fewer samples or channels than the clip has where browsers play no more."""
    first, last = (min(round(t * source.rate), source.num_samples) for t in (start_s, end_s))
    samples, rate = source.audio(first, last), min(source.rate, MOST_RATE)
    samples = np.nan_to_num(samples, posinf=0.0, neginf=0.0)
    samples = samples if source.channels <= MOST_CHANNELS else channels.one(samples)[:, None]
    return clip_io.resample(samples, source.rate, rate), rate


def _cards(pieces: Sequence[tuple[np.ndarray, int]], start_s: float, end_s: float, gaps: Sequence) -> list[dict]:
    near = [(max(a, start_s), min(b, end_s)) for a, b in gaps if a < end_s and b > start_s]
    weights = channels.weights_of(pieces[0][0])
    mixed = [(channels.one(samples, weights), rate) for samples, rate in pieces]
    top_db = clip_plots.loudest_db(*mixed[1])
    return [
        {
            "name": name,
            "kind": kind,
            "picture": clip_plots.audio(*mono, near, top_db, first_s=start_s),
            "sound": plots.data_uri(_flac(*piece), "audio/flac"),
        }
        for name, kind, mono, piece in zip(("Before", "After"), ("masked", "system"), mixed, pieces, strict=True)
    ]


def _flac(samples: np.ndarray, rate: int) -> bytes:
    with tempfile.TemporaryDirectory(prefix="avsi-") as folder:
        path = Path(folder, "piece.flac")
        clip_io.write_audio(path, samples, rate)
        return path.read_bytes()
