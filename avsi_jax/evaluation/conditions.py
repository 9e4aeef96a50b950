"""What an evaluation varies: the length of the gap, the number of gaps, what the pictures or the sound around it suffer.

A suite is a list of cases; a case is one gap (or several) a clip and one change of the raw batch, drawn by the clip's id alone, so
that every system meets the same, whatever its batch. A change reaches what the network is given, never the recording that it is
scored against.

Letters: B clips, N samples, T pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from avsi_jax.presets import RECORD_RATE

PAPER_MS = (300, 600, 900, 1200, 1500)  # the paper's range
LONGEST_MS = 3000  # of a Grid clip: all of it
GRID_WIDTH = 360  # pixels that noise of the landmarks is told in


class Case(NamedTuple):
    """One condition: `gap_ms` lost of every clip in `count` gaps, and the change `family` by `value`."""

    gap_ms: int
    family: str = ""  # "" where nothing but the gap is done
    value: float = 0.0
    count: int = 1

    @property
    def name(self) -> str:
        """The cell `case` of clips.csv: '' for one gap and nothing else, else such as 'shift_ms=-80'."""
        return f"{self.family}={self.value:g}" if self.family else ""

    @property
    def changes_references(self) -> bool:
        """Whether damaged sound, interpolation and ceiling are other ones than without the case."""
        return self.family not in VIDEO | HIDDEN


class Family(NamedTuple):
    label: str  # of the axis of a curve
    values: tuple[float, ...]


# What happens to the pictures alone, to the sound around the gap, and to the gap.
VIDEO = {
    "frames_lost": Family("pictures without a face, around the middle of the gap", (1, 5, 10, 20, 40, 75)),
    "frozen_ms": Family("lips stand still from the gap's start on, ms", (100, 200, 400, 800)),
    "noise_px": Family("noise on every landmark, pixels of a 360 wide picture", (0.5, 1, 2, 4)),
    "shift_ms": Family("sound after the picture by, ms", (-200, -120, -80, -40, 40, 80, 120, 200)),
    "video_of": Family("lips of another clip of the speaker (1), of another speaker (2)", (1, 2)),
    "no_video": Family("no lips at all", (1,)),
}
HIDDEN = {  # painted on the pictures before the face is followed (evaluation/occlusion.py); with `_told`, the mouth's flag is heeded
    f"{family}{told}": Family(label + said, values)
    for told, said in {"": "", "_told": "; told which pictures hide it"}.items()
    for family, (label, values) in {
        "covered_25": ("a hand over 25 % of the mouth, ms", (300, 600, 900)),
        "covered_50": ("a hand over 50 % of the mouth, ms", (300, 600, 900)),
        "covered_100": ("a hand over the whole mouth, ms", (300, 600, 900)),
        "turned_deg": ("head turned by, degrees", (15, 30, 45)),
    }.items()
}
AUDIO = {"noise_db": Family("noise under the sound, dB of signal to noise", (20, 10, 0))}
GAPS = {
    "gaps": Family("gaps that the lost time is cut into", (1, 2, 4, 8)),
    "whole_clip": Family("lips only: no sound at all", (1,)),
    "paper_gaps": Family("the paper's draw of gaps, at most", (8,)),
}
FAMILIES = VIDEO | HIDDEN | AUDIO | GAPS


def lengths(gap_ms: Sequence[int]) -> list[Case]:
    return [Case(ms) for ms in gap_ms or (*PAPER_MS, 2000, 2500, LONGEST_MS)]


def multigap(gap_ms: Sequence[int]) -> list[Case]:
    return [Case(ms, "gaps", n, n) for ms in gap_ms or (900, 1500) for n in map(int, GAPS["gaps"].values)]


def robustness(gap_ms: Sequence[int]) -> list[Case]:
    varied = {k: f for k, f in (VIDEO | AUDIO).items() if k != "no_video"}
    return [Case(ms, *change) for ms in gap_ms or (900,) for change in [(), *((k, v) for k, f in varied.items() for v in f.values)]]


def streams(gap_ms: Sequence[int]) -> list[Case]:
    cases = [Case(ms, *change) for ms in gap_ms or PAPER_MS for change in [(), ("no_video", 1)]]
    return [*cases, Case(LONGEST_MS, "whole_clip", 1)]


def occlusion(gap_ms: Sequence[int]) -> list[Case]:
    """A hand stays for 300 ms, 600 ms, and the whole gap where that is longer."""
    cases = []
    for ms in gap_ms or (900,):
        times = sorted({t for t in (300, 600, ms) if t <= ms})
        cases += [Case(ms), *(Case(ms, k, v) for k, f in HIDDEN.items() for v in (f.values if "turned" in k else times))]
    return cases


SUITES: dict[str, Callable[[Sequence[int]], list[Case]]] = {
    "lengths": lengths,
    "multigap": multigap,
    "occlusion": occlusion,
    "robustness": robustness,
    "streams": streams,
    "unseen": lengths,
}
UNSEEN_SPLIT = "test"  # the only split that `unseen` takes
NEED_VIDEO = ("streams", "occlusion")
NEED_RAW = ("occlusion",)


# ---- the pictures --------------------------------------------------------------------------------------------------------------


def changed(batch: dict, gap: np.ndarray, case: Case, donors: dict[str, dict]) -> dict:
    """The raw batch as a network is given it in a case; arrays it shares with `batch` are not changed.

    gap (B, G, 2) in record samples; donors: what stands in for the pictures, {'clip': arrays, 'speaker': arrays} of the same B, and
    for a case of HIDDEN {(gap_ms, family without _told, value): {landmarks, landmarks_valid, mouth}}.
    """
    if case.family in HIDDEN:
        return _hide(dict(batch), case, donors)
    return _CHANGES[case.family](dict(batch), gap, case.value, donors) if case.family in _CHANGES else batch


def _generator(clip_id: str, family: str, value: float) -> np.random.Generator:
    seed = hashlib.sha256(f"{clip_id}:{family}:{value:g}".encode()).digest()[:8]
    return np.random.default_rng(int.from_bytes(seed, "big"))


def _first_sample(gap: np.ndarray) -> np.ndarray:
    """(B,) where the first gap of (B, G, 2) starts; rows that are no gap are (0, 0)."""
    return np.where(gap[..., 1] > gap[..., 0], gap[..., 0], np.iinfo(gap.dtype).max).min(-1)


def _frame_at(batch: dict, samples: np.ndarray) -> np.ndarray:
    """(B,) record samples -> the picture, with fraction, that is seen then."""
    return (samples / RECORD_RATE - batch["offset_s"]) * batch["fps"]


def _lose_frames(batch, gap, value, donors):
    """`value` pictures without a face around the middle of the gaps; the points between are drawn straight, as in a record."""
    valid = batch["landmarks_valid"].copy()
    for b, (first, last) in enumerate(around_gap(batch, gap, value)):
        valid[b, first:last] = False
    return batch | {"landmarks": _drawn_straight(batch["landmarks"], valid, batch["num_frames"]), "landmarks_valid": valid}


def around_gap(batch: dict, gap: np.ndarray, video: float) -> list[tuple[int, int]]:
    """[(first, last), ...] so many pictures of each clip around the middle of its gaps, as far as it has them."""
    middle = _frame_at(batch, (_first_sample(gap) + gap[..., 1].max(-1)) / 2)
    firsts = [int(np.clip(round(m - video / 2), 0, max(0, n - video))) for m, n in zip(middle, batch["num_frames"], strict=True)]
    return [(first, min(first + round(video), int(n))) for first, n in zip(firsts, batch["num_frames"], strict=True)]


def _drawn_straight(points: np.ndarray, valid: np.ndarray, num_frames: np.ndarray) -> np.ndarray:
    """points (B, T, 68, 2) with those of pictures not valid (B, T) on the line between their neighbours, as in a record."""
    points = points.copy()
    for b, frames in enumerate(num_frames):
        known, all_ = np.flatnonzero(valid[b, :frames]), np.arange(frames)
        if not len(known):
            points[b] = points[b, 0]  # a face that nobody sees doesn't move
            continue
        flat = points[b, :frames].reshape(frames, -1)
        straight = np.stack([np.interp(all_, known, flat[known, k]) for k in range(flat.shape[1])], -1)
        points[b, :frames] = straight.reshape(points[b, :frames].shape)
        points[b, frames:] = points[b, frames - 1]
    return points


def _hide(batch, case: Case, donors):
    """What the tracker says of painted pictures; where it is told, pictures that hide the mouth show no face."""
    found = donors[case.gap_ms, case.family.removesuffix("_told"), case.value]
    points, valid = found["landmarks"], found["landmarks_valid"]
    if case.family.endswith("_told"):
        valid = valid & found["mouth"]
        points = _drawn_straight(points, valid, batch["num_frames"])
    return batch | {"landmarks": points, "landmarks_valid": valid}


def _freeze(batch, gap, value, donors):
    """The face stands still for `value` ms from the first gap's start on, and is taken for a true one."""
    start = _frame_at(batch, _first_sample(gap))
    points = batch["landmarks"].copy()
    for b, frames in enumerate(batch["num_frames"]):
        first = int(np.clip(round(start[b]), 0, frames - 1))
        last = min(int(frames), first + round(value * float(batch["fps"][b]) / 1000))
        points[b, first:last] = points[b, first]
    return batch | {"landmarks": points}


def _noise_on_points(batch, gap, value, donors):
    """Normal noise of `value` pixels on every coordinate of every picture, in pixels of a picture as wide as Grid's."""
    noise = np.stack([_generator(c, "noise_px", value).normal(size=batch["landmarks"].shape[1:]) for c in batch["clip_id"]])
    scale = value * batch["frame_size"][:, :1] / GRID_WIDTH
    return batch | {"landmarks": (batch["landmarks"] + noise * scale[..., None, None]).astype(np.float32)}


def _shift(batch, gap, value, donors):
    return batch | {"offset_s": (batch["offset_s"] - value / 1000).astype(np.float32)}


def _video_of(batch, gap, value, donors):
    return batch | donors["clip" if value == 1 else "speaker"]


def _no_video(batch, gap, value, donors):
    points = np.broadcast_to(batch["landmarks"][:, :1], batch["landmarks"].shape).copy()
    return batch | {"landmarks": points, "landmarks_valid": np.zeros_like(batch["landmarks_valid"])}


# ---- the sound -----------------------------------------------------------------------------------------------------------------


def _noise_under_audio(batch, gap, value, donors):
    """White noise `value` dB below the clip's own power between its first and last word."""
    audio = batch["audio"].astype(np.float64)
    for b, (first, last) in enumerate(np.rint(batch["speech"] * RECORD_RATE).astype(int)):
        n = int(batch["audio_length"][b])
        power = np.mean(audio[b, max(0, first) : min(n, last)] ** 2)
        noise = _generator(batch["clip_id"][b], "noise_db", value).normal(size=n)
        audio[b, :n] += noise * np.sqrt(power / 10 ** (value / 10))
    return batch | {"audio": np.clip(np.rint(audio), -32768, 32767).astype(np.int16)}


_CHANGES = {
    "frames_lost": _lose_frames, "frozen_ms": _freeze, "noise_px": _noise_on_points, "shift_ms": _shift, "video_of": _video_of,
    "no_video": _no_video, "noise_db": _noise_under_audio,
}  # fmt: skip
