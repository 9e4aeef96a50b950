"""Evaluation conditions: gap length, number of gaps, and degradations of the video or of the audio around the gap.

A suite is a list of cases. A case is one gap (or several) per clip and at most one change of the raw batch, drawn by the clip's id
alone, so that every system gets the same input in any batch. A change affects the network's input, never the recording that the
result is scored against.

Letters: B clips, G gaps, N samples, T video frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from avsi_jax.presets import RECORD_RATE

PAPER_MS = (300, 600, 900, 1200, 1500)  # the paper's range
LONGEST_MS = 3000  # a whole Grid clip
GRID_WIDTH = 360  # frame width in pixels to which landmark noise refers
FLAGGED = "_flagged"  # suffix of occlusion families in which the mouth-visibility flag is used


class Case(NamedTuple):
    """One condition: `count` gaps of `gap_ms` in all in every clip, and the change `family` with the strength `value`."""

    gap_ms: int
    family: str = ""  # "" for a gap alone
    value: float = 0.0
    count: int = 1

    @property
    def name(self) -> str:
        """The cell `case` of clips.csv: '' for one gap and no change, otherwise for example 'shift_ms=-80'."""
        return f"{self.family}={self.value:g}" if self.family else ""

    @property
    def changes_references(self) -> bool:
        """Whether masked audio, interpolation and oracle mel differ from those without the change."""
        return self.family not in VIDEO | OCCLUDED


class Family(NamedTuple):
    """A kind of change and its strengths."""

    label: str  # of a curve's axis and a table's title
    values: tuple[float, ...]


VIDEO = {  # changes of the video
    "frames_lost": Family("frames without a face, around the middle of the gap", (1, 5, 10, 20, 40, 75)),
    "frozen_ms": Family("landmarks frozen from the start of the gap, ms", (100, 200, 400, 800)),
    "noise_px": Family("noise on every landmark, pixels in a frame 360 wide", (0.5, 1, 2, 4)),
    "shift_ms": Family("A/V offset (positive: audio lags video), ms", (-200, -120, -80, -40, 40, 80, 120, 200)),
    "video_of": Family("video of another clip of the speaker (1), of another speaker (2)", (1, 2)),
    "no_video": Family("no video", (1,)),
}
OCCLUDED = {  # painted on the frames before the face is tracked (evaluation/occlusion.py)
    f"{family}{suffix}": Family(label + note, values)
    for suffix, note in {"": "", FLAGGED: "; frames with a hidden mouth flagged"}.items()
    for family, (label, values) in {
        "covered_25": ("a hand over 25 % of the mouth, ms", (300, 600, 900)),
        "covered_50": ("a hand over 50 % of the mouth, ms", (300, 600, 900)),
        "covered_100": ("a hand over the whole mouth, ms", (300, 600, 900)),
        "turned_deg": ("head turned, degrees", (15, 30, 45)),
    }.items()
}
AUDIO = {"noise_db": Family("white noise, signal-to-noise ratio in dB", (20, 10, 0))}  # changes of the audio around the gap
GAPS = {  # other numbers of gaps
    "gaps": Family("number of gaps, same total length", (1, 2, 4, 8)),
    "whole_clip": Family("video only: no audio at all", (1,)),
    "paper_gaps": Family("the paper's random gaps, at most", (8,)),
}
FAMILIES = VIDEO | OCCLUDED | AUDIO | GAPS


def lengths(gap_ms: Sequence[int]) -> list[Case]:
    """One gap of each length; () for the default lengths."""
    return [Case(ms) for ms in gap_ms or (*PAPER_MS, 2000, 2500, LONGEST_MS)]


def multigap(gap_ms: Sequence[int]) -> list[Case]:
    """Each total length divided into 1, 2, 4 and 8 gaps."""
    return [Case(ms, "gaps", n, n) for ms in gap_ms or (900, 1500) for n in map(int, GAPS["gaps"].values)]


def robustness(gap_ms: Sequence[int]) -> list[Case]:
    """Each length with every change of video and audio, and without."""
    varied = {k: f for k, f in (VIDEO | AUDIO).items() if k != "no_video"}
    return [Case(ms, *change) for ms in gap_ms or (900,) for change in [(), *((k, v) for k, f in varied.items() for v in f.values)]]


def streams(gap_ms: Sequence[int]) -> list[Case]:
    """Each length with and without video, and a whole clip without audio."""
    cases = [Case(ms, *change) for ms in gap_ms or PAPER_MS for change in [(), ("no_video", 1)]]
    return [*cases, Case(LONGEST_MS, "whole_clip", 1)]


def occlusion(gap_ms: Sequence[int]) -> list[Case]:
    """A hand over the mouth for 300 ms, 600 ms and the length of the gap, and a turned head; each also flagged."""
    cases = []
    for ms in gap_ms or (900,):
        times = sorted({t for t in (300, 600, ms) if t <= ms})
        cases += [Case(ms), *(Case(ms, k, v) for k, f in OCCLUDED.items() for v in (f.values if "turned" in k else times))]
    return cases


SUITES: dict[str, Callable[[Sequence[int]], list[Case]]] = {
    "lengths": lengths,
    "multigap": multigap,
    "occlusion": occlusion,
    "robustness": robustness,
    "streams": streams,
    "unseen": lengths,
}
UNSEEN_SPLIT = "test"  # the only split of suite `unseen`
NEED_VIDEO = ("streams", "occlusion")
NEED_RAW = ("occlusion",)


# ---- video ---------------------------------------------------------------------------------------------------------------------


def changed(batch: dict, gap: np.ndarray, case: Case, donors: dict[str, dict]) -> dict:
    """The raw batch that a network gets in a case; the arrays of `batch` itself stay as they are.

    gap (B, G, 2) in record samples. donors: replacement video, {'clip': arrays, 'speaker': arrays} for the same B clips, and for a
    case of OCCLUDED {(gap_ms, family without FLAGGED, value): {landmarks, landmarks_valid, mouth}}.
    """
    if case.family in OCCLUDED:
        return _occlude(dict(batch), case, donors)
    return _CHANGES[case.family](dict(batch), gap, case.value, donors) if case.family in _CHANGES else batch


def _generator(clip_id: str, family: str, value: float) -> np.random.Generator:
    seed = hashlib.sha256(f"{clip_id}:{family}:{value:g}".encode()).digest()[:8]
    return np.random.default_rng(int.from_bytes(seed, "big"))


def _first_sample(gap: np.ndarray) -> np.ndarray:
    """(B,) first sample of the first gap of (B, G, 2); rows (0, 0) are padding."""
    return np.where(gap[..., 1] > gap[..., 0], gap[..., 0], np.iinfo(gap.dtype).max).min(-1)


def _frame_at(batch: dict, samples: np.ndarray) -> np.ndarray:
    """(B,) record samples -> the video frame at that time, with fraction."""
    return (samples / RECORD_RATE - batch["offset_s"]) * batch["fps"]


def _drop_frames(batch, gap, value, donors):
    """`value` frames without a face around the middle of the gaps; their landmarks are interpolated, as in a record."""
    valid = batch["landmarks_valid"].copy()
    for b, (first, last) in enumerate(around_gap(batch, gap, value)):
        valid[b, first:last] = False
    return batch | {"landmarks": _interpolated(batch["landmarks"], valid, batch["num_frames"]), "landmarks_valid": valid}


def around_gap(batch: dict, gap: np.ndarray, count: float) -> list[tuple[int, int]]:
    """[(first, last), ...]: a range of `count` video frames around the middle of each clip's gaps, within the clip."""
    middle = _frame_at(batch, (_first_sample(gap) + gap[..., 1].max(-1)) / 2)
    firsts = [int(np.clip(round(m - count / 2), 0, max(0, n - count))) for m, n in zip(middle, batch["num_frames"], strict=True)]
    return [(first, min(first + round(count), int(n))) for first, n in zip(firsts, batch["num_frames"], strict=True)]


def _interpolated(points: np.ndarray, valid: np.ndarray, num_frames: np.ndarray) -> np.ndarray:
    """points (B, T, 68, 2), interpolated linearly over the frames that are not valid (B, T), as in a record."""
    points = points.copy()
    for b, frames in enumerate(num_frames):
        known, all_ = np.flatnonzero(valid[b, :frames]), np.arange(frames)
        if not len(known):
            points[b] = points[b, 0]  # no face in any frame: no motion
            continue
        flat = points[b, :frames].reshape(frames, -1)
        line = np.stack([np.interp(all_, known, flat[known, k]) for k in range(flat.shape[1])], -1)
        points[b, :frames] = line.reshape(points[b, :frames].shape)
        points[b, frames:] = points[b, frames - 1]
    return points


def _occlude(batch, case: Case, donors):
    """The landmarks tracked in the painted frames; with FLAGGED, frames with a hidden mouth count as frames without a face."""
    tracked = donors[case.gap_ms, case.family.removesuffix(FLAGGED), case.value]
    points, valid = tracked["landmarks"], tracked["landmarks_valid"]
    if case.family.endswith(FLAGGED):
        valid = valid & tracked["mouth"]
        points = _interpolated(points, valid, batch["num_frames"])
    return batch | {"landmarks": points, "landmarks_valid": valid}


def _freeze(batch, gap, value, donors):
    """The landmarks stay constant for `value` ms from the start of the first gap, and count as valid."""
    start = _frame_at(batch, _first_sample(gap))
    points = batch["landmarks"].copy()
    for b, frames in enumerate(batch["num_frames"]):
        first = int(np.clip(round(start[b]), 0, frames - 1))
        last = min(int(frames), first + round(value * float(batch["fps"][b]) / 1000))
        points[b, first:last] = points[b, first]
    return batch | {"landmarks": points}


def _noise_on_points(batch, gap, value, donors):
    """Normal noise of `value` pixels on every coordinate of every frame, in pixels of a frame as wide as Grid's."""
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


# ---- audio ---------------------------------------------------------------------------------------------------------------------


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
    "frames_lost": _drop_frames, "frozen_ms": _freeze, "noise_px": _noise_on_points, "shift_ms": _shift, "video_of": _video_of,
    "no_video": _no_video, "noise_db": _noise_under_audio,
}  # fmt: skip
