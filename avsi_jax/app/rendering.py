"""Parts of the avsi-app page as HTML, with the plots of inpainting/clip_plots.py.

Clip names and all other text that comes from a user are escaped.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from avsi_jax.app import session
from avsi_jax.inpainting import clip_plots
from avsi_jax.media import channels

AROUND_S, MAX_FULL_S = 1.5, 6.0  # of a clip longer than MAX_FULL_S, only the gaps and so much around them is plotted
KINDS = {
    "silence": "silence", "packets": "lost packets", "repeat": "repeated packets", "clipped": "clipped", "missing": "missing audio"
}  # fmt: skip
MAX_LISTED = 20  # detected gaps
REPLACED = '<div class="avsi"><p>The gaps or the options were changed during the restoration: press Restore again.</p></div>'
NO_CLIP_YET = (
    '<div class="avsi"><div class="place">The audio of the clip is shown here, with the gaps that are detected.</div></div>'
)

EXAMPLES = (
    '<div class="avsi"><p class="dim">The examples: speaker 33 of the <a href="https://doi.org/10.5281/zenodo.3625687" '
    'rel="noreferrer">Grid corpus</a> (<a href="https://creativecommons.org/licenses/by/4.0/" rel="noreferrer">CC BY 4.0</a>), '
    "who is not in the training data, and two synthetic clips with a drawn mouth. The drawn mouth is not recognised, so these "
    "are restored from the audio alone.</p></div>"
)


def head(limits: session.Limits) -> str:
    """The top of the page."""
    return _page(
        "<h1>Restore gaps in speech</h1><p>Upload a clip of a person speaking whose audio has a gap. The missing speech is "
        "restored from the surrounding audio and the speaker's lips. The network was trained on short English commands (the Grid "
        'corpus); other speech is restored less well.</p><p class="dim">No data leaves this machine; uploads are deleted when you '
        f"close the page. At most {limits.seconds:g} s and {limits.megabytes:g} MB.</p>"
    )


def error_line(error: Exception) -> str:
    """An error in one line of HTML."""
    text = " ".join(str(error).split()) or type(error).__name__
    return html.escape(text)


def clip(uploaded: session.UploadedClip, gaps: Sequence[tuple], note: str = "") -> str:
    """The clip's waveform and spectrogram with the gaps (start_s, end_s, ...) silent, what was detected, and a note."""
    full = session.masked_samples(uploaded, ())
    weights = channels.downmix_weights(full)
    audio = channels.downmix(session.masked_samples(uploaded, [gap[:2] for gap in gaps]), weights)
    top_db = clip_plots.peak_db(channels.downmix(full, weights), uploaded.rate)
    image = clip_plots.audio(audio, uploaded.rate, [gap[:2] for gap in gaps], top_db, waveform=True)
    description = f"<b>{html.escape(uploaded.name)}</b>: {html.escape(uploaded.description())}."
    message = " ".join(filter(None, (_message(uploaded, gaps), html.escape(note))))
    return _page(_figure(image, f"Waveform and spectrogram, {_listed(gaps)}", f"{description} {message}"))


def _message(uploaded: session.UploadedClip, gaps: Sequence[tuple]) -> str:
    """Which gaps were detected, and which are to be restored if these are others."""
    shown = uploaded.detected_gaps[:MAX_LISTED]
    detected = ", ".join(f"{a:.2f}-{b:.2f} s ({KINDS.get(kind, kind)})" for a, b, kind in shown)
    if more := len(uploaded.detected_gaps) - len(shown):
        detected += f" and {more} more"
    detected = f"Detected gaps: {detected}." if detected else ""
    if session.format_gaps(gaps) == session.format_gaps(uploaded.detected_gaps):
        return detected or "No gap detected: enter one, or make one for a test."
    if not gaps:
        return f"{detected} None is entered."
    entered = ", ".join(f"{gap[0]:.2f}-{gap[1]:.2f} s" for gap in gaps)
    return f"Gaps to restore: {entered}. {detected}".strip()


def compared(uploaded: session.UploadedClip, result: session.Result, gaps: Sequence[tuple[float, float]]) -> dict[str, str]:
    """{'masked', 'restored', 'original': spectrogram}, those that `result` has, on one scale."""
    waveforms = {
        "masked": session.masked_samples(uploaded, gaps),
        "restored": result.repair.samples,
        "original": uploaded.samples,
    }
    first, last = plotted_interval(gaps, uploaded.duration_s)
    piece = slice(round(first * uploaded.rate), round(last * uploaded.rate))
    weights = channels.downmix_weights(waveforms["masked"])
    waveforms = {name: channels.downmix(x[piece], weights) for name, x in waveforms.items() if name in result.waveforms}
    top_db = max(clip_plots.peak_db(x, uploaded.rate) for x in waveforms.values())
    return {
        name: _page(
            _figure(clip_plots.audio(x, uploaded.rate, gaps, top_db, first_s=first), f"Spectrogram, {name}, {_listed(gaps)}")
        )
        for name, x in waveforms.items()
    }


def plotted_interval(gaps: Sequence[tuple[float, float]], duration_s: float) -> tuple[float, float]:
    """(start_s, end_s): the part of a restored clip that is plotted."""
    if duration_s <= MAX_FULL_S:
        return 0.0, duration_s
    return max(0.0, gaps[0][0] - AROUND_S), min(duration_s, max(end for _, end in gaps) + AROUND_S)


def summary(result: session.Result) -> str:
    """The transcript, the gaps with inputs and confidence, and the warnings."""
    repair = result.repair
    transcripts = list(dict.fromkeys(filter(None, (gap.transcript for gap in repair.gaps))))
    texts = "; ".join(f"<b>{html.escape(text)}</b>" for text in transcripts)
    transcript = f"<p class='transcript'>Transcript (predicted): {texts}</p>" if transcripts else ""
    rows = "".join(
        f"<tr><td>{gap.start_s:.2f}-{gap.end_s:.2f} s</td><td>{html.escape(gap.inputs)}</td><td>{_bar(gap.confidence)}</td></tr>"
        for gap in repair.gaps
    )
    table = f"<div class='wide'><table><tr><th>Gap</th><th>Inputs</th><th>Confidence</th></tr>{rows}</table></div>"
    warnings = "".join(f"<li>{html.escape(w)}</li>" for w in result.warnings)
    warnings = f"<ul>{warnings}</ul>" if warnings else ""
    seconds = f"<p class='dim'>Processing time: {repair.seconds.get('all', 0):.1f} s.</p>"
    explanation = (
        "<p class='dim'>Confidence: the intelligibility (STOI) measured in gaps of this length when the weights were evaluated; "
        "without measurements it depends on the length alone.</p>"
    )
    return _page("<h2>Restored</h2>" + transcript + table + explanation + warnings + seconds)


def faces(result: session.Result) -> str:
    """Video frames of the gaps, with the landmarks."""
    if not result.strips:
        return ""
    rows = "".join(f"<div class='faces'>{_strip(*strip)}</div>" for strip in result.strips)
    all_visible = all(visible.all() for _, _, visible, _ in result.strips)
    note = "" if all_visible else "<p class='dim'>Grey: the mouth is not visible.</p>"
    return _page(f"<h2>The speaker's lips during the gap</h2>{rows}{note}")


def _strip(images: Sequence[np.ndarray], landmarks: np.ndarray, visible: np.ndarray, times: Sequence[float]) -> str:
    square = clip_plots.face_square(landmarks, images[0].shape)
    uris = (clip_plots.face(image, points, ok, square) for image, points, ok in zip(images, landmarks, visible))
    return "".join(_figure(uri, f"The face at {t:.2f} s with its landmarks", f"{t:.2f} s") for uri, t in zip(uris, times))


def _bar(confidence: float) -> str:
    share = float(np.clip(np.nan_to_num(confidence), 0, 1))
    return f"<span class='bar'><i style='width:{share:.0%}'></i></span>{session.in_words(share)} ({share:.0%})"


def _listed(gaps: Sequence[tuple]) -> str:
    return "gaps: " + (", ".join(f"{gap[0]:.2f}-{gap[1]:.2f} s" for gap in gaps) or "none")


def _figure(image: str, alt: str, caption: str = "") -> str:
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><img src="{image}" alt="{html.escape(alt)}">{below}</figure>'


def _page(content: str) -> str:
    return f'<div class="avsi">{content}</div>'
