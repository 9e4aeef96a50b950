"""What a visitor of avsi-app reads: parts of the page as HTML, with the pictures of inpainting/clip_plots.py in them.

Names of clips and whatever else comes from a visitor are escaped.
"""

from __future__ import annotations

import html

import numpy as np

from avsi_jax.app import session
from avsi_jax.inpainting import clip_plots
from avsi_jax.media import channels

AROUND_S, WGAP_S = 1.5, 6.0  # of a clip longer than this only the gaps and so much around them is drawn
KINDS = {"silence": "silence", "packets": "lost packets", "repeat": "repeated", "clipped": "cut off"}
NOTHING_YET = '<div class="avsi"><div class="place">Its sound is drawn here, with the holes that are found.</div></div>'

EXAMPLES = (
    '<div class="avsi"><p class="dim">The examples: a person, speaker 33 of the <a href="https://doi.org/10.5281/zenodo.3625687" '
    'rel="noreferrer">Grid corpus</a> (<a href="https://creativecommons.org/licenses/by/4.0/" rel="noreferrer">CC BY 4.0</a>), '
    "whom the network never met; and drawn mouths, which are not trusted: those are repaired by their sound alone.</p></div>"
)


def head(limits: session.Limits) -> str:
    return _page(
        "<h1>A clip's sound, whole</h1><p>Put in a clip of a person speaking whose sound has a gap. What is lost is filled in from "
        "the sound around it and from the lips. The network learned on short English commands (the Grid corpus): other speech is "
        'filled in less well.</p><p class="dim">Everything stays on this machine and is deleted when you leave the page. '
        f"At most {limits.seconds:g} s and {limits.megabytes:g} MB.</p>"
    )


def line(error: Exception) -> str:
    """An error in one line, for a message that takes HTML."""
    words = " ".join(str(error).split()) or type(error).__name__
    return html.escape(words)


def clip(found: session.Clip, gaps) -> str:
    """The clip as it is, its gaps silent."""
    whole = session.emptied(found, ())
    weights = channels.weights_of(whole)
    audio = channels.one(session.emptied(found, [gap[:2] for gap in gaps]), weights)
    top = clip_plots.loudest_db(channels.one(whole, weights), found.rate)
    image = clip_plots.audio(audio, found.rate, [gap[:2] for gap in gaps], top, waveform=True)
    detected = ", ".join(f"{a:.2f}-{b:.2f} s ({KINDS.get(kind, kind)})" for a, b, kind in found.gaps)
    said = f"Holes found: {detected}." if detected else "No hole found: write what is lost, or damage it on purpose."
    named = f"<b>{html.escape(found.name)}</b>: {html.escape(found.transcript())}."
    return _page(_figure(image, f"Waveform and spectrogram, {_listed(gaps)}", f"{named} {said}"))


def compared(found: session.Clip, result: session.Result, gaps) -> dict[str, str]:
    """'masked', 'restored', 'original' -> its spectrogram."""
    waveforms = {"masked": session.emptied(found, gaps), "restored": result.repair.samples, "original": found.samples}
    first, last = window(gaps, found.duration_s)
    piece = slice(round(first * found.rate), round(last * found.rate))
    weights = channels.weights_of(waveforms["masked"])
    waveforms = {name: channels.one(x[piece], weights) for name, x in waveforms.items() if name in result.waveforms}
    top = max(clip_plots.loudest_db(x, found.rate) for x in waveforms.values())
    return {
        name: _page(_figure(clip_plots.audio(x, found.rate, gaps, top, first_s=first), f"Spectrogram, {name}, {_listed(gaps)}"))
        for name, x in waveforms.items()
    }


def window(gaps, duration_s: float) -> tuple[float, float]:
    """The stretch of a clip that is drawn of a repair."""
    if duration_s <= WGAP_S:
        return 0.0, duration_s
    return max(0.0, gaps[0][0] - AROUND_S), min(duration_s, max(end for _, end in gaps) + AROUND_S)


def told(result: session.Result) -> str:
    """What was done, how sure it is, what the lips said, what went wrong on the way."""
    repair = result.repair
    sentences = list(dict.fromkeys(filter(None, (gap.transcript for gap in repair.gaps))))
    said = "<p class='said'>What was said, most likely: " + "; ".join(f"<b>{html.escape(s)}</b>" for s in sentences) + "</p>"
    rows = "".join(
        f"<tr><td>{gap.start_s:.2f}-{gap.end_s:.2f} s</td><td>{html.escape(gap.by)}</td><td>{_sureness(gap.confidence)}</td></tr>"
        for gap in repair.gaps
    )
    table = f"<div class='wide'><table><tr><th>Gap</th><th>Filled in by</th><th>How sure it is</th></tr>{rows}</table></div>"
    warnings = "".join(f"<li>{html.escape(w)}</li>" for w in result.warnings)
    warnings = f"<ul>{warnings}</ul>" if warnings else ""
    took = f"<p class='dim'>It took {repair.seconds.get('all', 0):.1f} s.</p>"
    means = (
        "<p class='dim'>How sure: the intelligibility (STOI) of gaps as long when the weights were measured; where they were not, "
        "by the length alone.</p>"
    )
    return _page("<h2>Restored</h2>" + (said if sentences else "") + table + means + warnings + took)


def faces(result: session.Result) -> str:
    """The pictures of the gaps, with the points the lips are read by."""
    if not result.strips:
        return ""
    drawn = "".join(f"<div class='faces'>{_strip(*strip)}</div>" for strip in result.strips)
    unseen = "" if all(seen.all() for _, _, seen, _ in result.strips) else "<p class='dim'>Grey points were not seen.</p>"
    return _page(f"<h2>What the lips did in the gap</h2>{drawn}{unseen}")


def _strip(video, points, seen, times) -> str:
    square = clip_plots.face_square(points, video[0].shape)
    drawn = (clip_plots.face(image, at, ok, square) for image, at, ok in zip(video, points, seen))
    return "".join(
        _figure(uri, f"The face at {t:.2f} s with the points that are read", f"{t:.2f} s") for uri, t in zip(drawn, times)
    )


def _sureness(confidence: float) -> str:
    share = float(np.clip(np.nan_to_num(confidence), 0, 1))
    return f"<span class='bar'><i style='width:{share:.0%}'></i></span>{session.in_words(share)} ({share:.0%})"


def _listed(gaps) -> str:
    return "gaps: " + (", ".join(f"{gap[0]:.2f}-{gap[1]:.2f} s" for gap in gaps) or "none")


def _figure(image: str, says: str, caption: str = "") -> str:
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><img src="{image}" alt="{html.escape(says)}">{below}</figure>'


def _page(inside: str) -> str:
    return f'<div class="avsi">{inside}</div>'
