"""Phones -> mouth movements: six parameters per video frame.

Phones become visemes, the visually distinct shapes of the mouth, which blend with their neighbours. p, b, m and f, v always keep
their lip contact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

FPS = 25
MOUTH = ("open", "spread", "round", "press", "tuck", "tongue")  # 0 to 1; press: lips closed, tuck: lower lip under the teeth
OPEN, SPREAD, ROUND, PRESS, TUCK, TONGUE = range(len(MOUTH))

VISEMES = {  # values in the order of MOUTH; press and tuck are timed separately
    "silent": (0.00, 0.00, 0.00, 0, 0, 0.0),
    "pbm": (0.00, 0.00, 0.05, 1, 0, 0.0),
    "fv": (0.10, 0.10, 0.00, 0, 1, 0.0),
    "th": (0.20, 0.10, 0.00, 0, 0, 1.0),
    "tdn": (0.22, 0.15, 0.00, 0, 0, 0.7),
    "l": (0.34, 0.10, 0.00, 0, 0, 1.0),
    "sz": (0.13, 0.45, 0.00, 0, 0, 0.0),
    "sh": (0.22, 0.00, 0.60, 0, 0, 0.0),
    "kg": (0.30, 0.05, 0.00, 0, 0, 0.3),
    "r": (0.22, 0.00, 0.55, 0, 0, 0.2),
    "w": (0.10, 0.00, 1.00, 0, 0, 0.0),
    "ee": (0.26, 0.95, 0.00, 0, 0, 0.4),
    "eh": (0.55, 0.45, 0.00, 0, 0, 0.2),
    "ah": (0.95, 0.10, 0.00, 0, 0, 0.0),
    "ao": (0.70, 0.00, 0.70, 0, 0, 0.0),
    "uu": (0.20, 0.00, 0.95, 0, 0, 0.0),
    "uh": (0.36, 0.05, 0.05, 0, 0, 0.1),
}
_PHONES_OF = {  # viseme, or the two of a diphthong -> eSpeak NG's names of the phones in Grid's 51 words
    "pbm": "p b m",
    "fv": "f v",
    "th": "T D",
    "tdn": "t t# t2 d n",
    "l": "l",
    "sz": "s z",
    "sh": "tS dZ S Z",
    "kg": "k g N",
    "r": "r r-",
    "w": "w w#",
    "ee": "i i: I I2 j",
    "eh": "a e E",
    "ah": "V A: A@",
    "ao": "0 02 O O: o@ O@",
    "uu": "u: U",
    "uh": "@ a# 3: h",
    "ah ee": "aI aI2",
    "ah uu": "aU",
    "eh ee": "eI",
    "ao uu": "oU",
    "ee uh": "i@ i@3",
}
VISEMES_OF_PHONE = {phone: visemes.split() for visemes, phones in _PHONES_OF.items() for phone in phones.split()}
STRESS_MARKS = "',%=|"  # before a phone's name
TRACK_RATE = 200  # Hz, of the mouth track before it is sampled at the frame times


def mouth_track(
    phones: Sequence[tuple[float, float, str]], rng: np.random.Generator, *, num_frames: int, gain: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Phones [(start_s, end_s, eSpeak NG's name)] -> mouth (T, 6) in the order of MOUTH, and names of visemes (T,).

    Frame t shows the mouth at t / FPS seconds. `gain` scales its opening.
    """
    size = int(num_frames / FPS * TRACK_RATE)
    at = lambda second: int(np.clip(round(second * TRACK_RATE), 0, size))
    track, press, tuck = np.zeros((size, len(MOUTH))), np.zeros(size), np.zeros(size)
    names = np.full(size, "silent", dtype="<U6")
    for start, end, name in _visemes(phones):
        target = np.array(VISEMES[name]) * (1 + 0.06 * rng.standard_normal())
        target[[PRESS, TUCK]] = 0
        track[at(start - 0.015) : at(end)] = target
        inside = slice(at(start), at(end))
        names[inside] = np.where(names[inside] == "pbm", "pbm", name)
        if name == "pbm":  # begins at its burst: the lips close before it
            closed = slice(at(start - 0.06), at(max(start + 0.02, end - 0.03)))
            press[closed], names[closed] = 1, name
        elif name == "fv":
            tuck[at(start - 0.02) : at(max(end, start + 0.06))] = 1
    track = ndimage.gaussian_filter1d(track, 0.026 * TRACK_RATE, axis=0)  # neighbours blend
    # Applied after blending and for at least 80 ms, else frames every 40 ms would often miss it.
    press, tuck = (ndimage.gaussian_filter1d(x, s * TRACK_RATE) for x, s in ((press, 0.012), (tuck, 0.014)))
    track[:, OPEN] = np.clip(track[:, OPEN] * gain, 0, 1) * (1 - np.clip(1.05 * press, 0, 1)) * (1 - 0.75 * tuck)
    track[:, PRESS], track[:, TUCK] = press, tuck
    at_frames = np.arange(num_frames) * TRACK_RATE // FPS
    return track[at_frames], names[at_frames]


def _visemes(phones) -> list[tuple[float, float, str]]:
    """(start, end, viseme) of each phone; diphthongs are split in two, pauses left out."""
    timed_visemes = []
    for start, end, phone in phones:
        phone = phone.lstrip(STRESS_MARKS)
        if phone.startswith("_") or phone == ";":
            continue
        visemes = VISEMES_OF_PHONE.get(phone, ["uh"])
        edges = np.linspace(start, end, len(visemes) + 1)
        timed_visemes += zip(edges[:-1], edges[1:], visemes)
    return timed_visemes
