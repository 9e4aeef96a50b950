"""Clips filmed worse than they were: a hand before the mouth, a head turned away, painted on the pictures before anybody looks.

What a change of face points can't show: the mesh follows a face whose mouth is covered, and makes its lips up. So the pictures are
painted and tracked again. Everything is drawn by the clip's id.

Letters: T pictures, H by W pixels.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from avsi_jax.face import landmarks, mouth_visibility
from avsi_jax.face.landmarks import LIPS
from avsi_jax.media import clip_io
from avsi_jax.runtime import process_pool

VIDEOS = (".mpg", ".mpeg", ".mp4", ".avi", ".mov", ".mkv")  # the first that is there: Grid's own before what was made of them
FOCAL = 1.5  # of a camera, picture widths
MEMORY_MB, TIMEOUT_S = 4_000, 300.0  # of a clip that is tracked several times
SAME_PX = 1.0  # mean distance of the points of unpainted pictures to the record's: the same recording
STEPS = 24  # of the bisection for a share of the mouth, and of the way that a hand comes


# ---- painting ------------------------------------------------------------------------------------------------------------------


def generator(*what) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(":".join(map(str, what)).encode()).digest()[:8], "big"))


def covered(rgb: np.ndarray, points: np.ndarray, first: int, last: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """rgb (T, H, W, 3) uint8 with a hand over `share` of the mouth in pictures [first, last); points (T, 68, 2) px are its face's.

    The hand stays where it is: `share` is of the mean mouth's area, or 1 for the mouth of every one of those pictures.
    """
    if last <= first:
        return rgb
    lips = points[first:last, LIPS]
    size = rgb.shape[1:3]
    mouth = _filled(lips.mean(0), size) if share < 1 else _union(lips, size)
    width = float(np.linalg.norm(lips[:, 6] - lips[:, 0], axis=-1).mean())
    hand = functools.partial(_hand, lips.mean((0, 1)), width, size, rng.uniform(-1, 1), rng.choice((-1, 1)))
    mask = _moved_until(hand, mouth, share, 4 * width)
    return _laid_over(rgb, first, last, mask, _skin(rgb[first], points[first], mask.shape, rng))


def turned(rgb: np.ndarray, points: np.ndarray, degrees: float) -> np.ndarray:
    """The pictures as of a flat face turned by so many degrees about its upright middle line, seen from FOCAL widths away."""
    height, width = rgb.shape[1:3]
    x, y = points.mean((0, 1))
    angle, focal = np.deg2rad(degrees), FOCAL * width
    around = np.array([[1, 0, -x], [0, 1, -y], [0, 0, 1]], np.float64)
    turn = np.array([[np.cos(angle), 0, 0], [0, 1, 0], [np.sin(angle) / focal, 0, 1]])
    whole = np.linalg.inv(around) @ turn @ around
    return np.stack([cv2.warpPerspective(p, whole, (width, height), borderMode=cv2.BORDER_REPLICATE) for p in rgb])


def share_of_mouth(mask: np.ndarray, lips: np.ndarray) -> float:
    """Share of the mouth's area, lips (20, 2) px, under a mask (H, W) in [0, 1]."""
    mouth = _filled(lips, mask.shape)
    return float((mask * mouth).sum() / max(1.0, mouth.sum()))


def _filled(lips: np.ndarray, size) -> np.ndarray:
    """(H, W) float32: 1 within the lips' outline."""
    out = np.zeros(size, np.uint8)
    cv2.fillConvexPoly(out, cv2.convexHull(np.rint(lips).astype(np.int32)), 1)
    return out.astype(np.float32)


def _union(lips: np.ndarray, size) -> np.ndarray:
    return np.max([_filled(one, size) for one in lips], axis=0)


def _moved_until(shape_at, mouth: np.ndarray, share: float, far: float) -> np.ndarray:
    """A shape's mask at the place, on its way in from `far` px to 0, where it first hides `share` of the mouth (H, W)."""
    hidden = lambda away: (shape_at(away) * mouth).sum() / max(1.0, mouth.sum())
    near, away = 0.0, far
    for _ in range(STEPS):
        middle = (near + away) / 2
        near, away = (middle, away) if hidden(middle) >= min(share, 0.999) else (near, middle)
    return shape_at(near)


def _hand(centre, width: float, size, lean: float, side: int, away: float) -> np.ndarray:
    """(H, W) float32 mask of a hand `away` px below the place where its fingers lie across the mouth; edges are soft."""
    mask = np.zeros(size, np.uint8)
    angle = np.deg2rad(35 * lean)
    up, right = np.array([np.sin(angle), -np.cos(angle)]), np.array([np.cos(angle), np.sin(angle)]) * side
    palm = np.asarray(centre) - up * (away + 0.1 * width)
    at = lambda x, y: tuple(int(v) for v in np.rint((palm + x * width * right + y * width * up) * 8))  # eighths of a pixel
    axes = (round(0.95 * width * 8), round(1.1 * width * 8))
    cv2.ellipse(mask, at(0, -0.3), axes, np.rad2deg(angle), 0, 360, 1, -1, shift=3)
    for i, length in enumerate((0.9, 1.15, 1.2, 1.0)):
        x = -0.66 + 0.44 * i
        cv2.line(mask, at(x, 0.2), at(1.25 * x, 0.2 + length), 1, max(2, round(0.5 * width)), shift=3)
    cv2.line(mask, at(0.7, -0.4), at(1.5, 0.35), 1, max(2, round(0.45 * width)), shift=3)
    return np.clip(cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.8), 0, 1)


def _skin(image: np.ndarray, face: np.ndarray, size, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) float32: the colour of the cheeks, a little darker, with soft shadows and grain."""
    reach = max(2, int(0.04 * np.ptp(face[:, 0])))
    cheeks = []
    for jaw, nose in ((3, 31), (13, 35)):
        x, y = np.rint((face[jaw] + face[nose]) / 2).astype(int).clip(reach, np.array(size[::-1]) - reach - 1)
        cheeks.append(image[y - reach : y + reach, x - reach : x + reach].reshape(-1, 3))
    colour = np.median(np.concatenate(cheeks), axis=0) * rng.uniform(0.8, 1.05)
    shadows = cv2.GaussianBlur(rng.normal(size=size).astype(np.float32), (0, 0), 8)
    light = 1 + 0.1 * shadows / max(1e-6, float(shadows.std())) + 0.02 * rng.normal(size=size)
    return (colour * light[..., None]).astype(np.float32)


def _laid_over(rgb, first: int, last: int, mask: np.ndarray, colour: np.ndarray) -> np.ndarray:
    out = rgb.copy()
    for t in range(first, last):
        out[t] = np.clip(np.rint(rgb[t] * (1 - mask[..., None]) + colour * mask[..., None]), 0, 255)
    return out


# ---- tracking what was painted -------------------------------------------------------------------------------------------------


def find_videos(raw: Path, clip_ids: Iterable[str]) -> dict[str, Path]:
    """clip id -> its video below a folder; ValueError names a clip that has none there."""
    if not Path(raw).is_dir():
        raise FileNotFoundError(f"--raw={raw}: no such folder; expected the videos that the dataset was made of")
    found: dict[str, Path] = {}
    order = lambda p: (VIDEOS.index(p.suffix.lower()), str(p))
    for path in sorted((p for p in Path(raw).rglob("*") if p.suffix.lower() in VIDEOS), key=order):
        found.setdefault(path.stem, path)
    if missing := sorted(set(clip_ids) - set(found)):
        raise ValueError(
            f"--raw={raw}: no video of {missing[0]} and {len(missing) - 1} more below it; expected one named by its id"
        )
    return {clip: found[clip] for clip in clip_ids}


def track_all(jobs: list[tuple], num_workers: int, tick) -> list[dict]:
    """[(video, record points (T, 68, 2), clip id, [(key, family, value, first, last), ...])] -> for each job {key: (points
    (T, 68, 2) float32, valid (T,) bool, mouth (T,) bool)}: what the tracker and the mouth's flag say of the painted pictures.

    ValueError for a video that is not the one of its record; tick(done, of all) after each.
    """
    landmarks.load_models()  # says in one line what is missing, where a worker would end
    made: list = [None] * len(jobs)
    outcomes = process_pool.run(track, jobs, workers=num_workers, timeout_s=TIMEOUT_S, memory_mb=MEMORY_MB, start=_start)
    for done, outcome in enumerate(outcomes):
        if outcome.missing:
            raise ValueError(f"{jobs[outcome.index][0]}: its painted pictures can't be tracked: {outcome.missing}")
        made[outcome.index] = outcome.result
        tick(done + 1, len(jobs))
    return made


def _start() -> None:
    landmarks.use_one_thread()
    _tracker()


@functools.cache
def _tracker() -> landmarks.FaceTracker:
    return landmarks.FaceTracker()


def track(video: str, points: np.ndarray, clip_id: str, changes: list[tuple]) -> dict:
    """One job of `track_all`."""
    rgb = clip_io.read_clip(video, audio=False).video.rgb
    if len(rgb) != len(points):
        raise ValueError(f"{video}: found {len(rgb)} pictures, expected {len(points)} as in the dataset: another recording or rate")
    made = {}
    for key, family, value, first, last in changes:
        painted = paint(rgb, points, clip_id, family, first, last, value)
        try:
            found = _tracker()(painted)
        except landmarks.NoFaceError:
            nobody = np.zeros(len(rgb), bool)
            made[key] = (np.repeat(points[:1], len(rgb), 0), nobody, nobody)
            continue
        made[key] = (found.points, found.valid, mouth_visibility.mouth_seen(painted, found.points))
        before = slice(0, first) if family in SHARES else slice(0, 0)
        if (off := np.abs(found.points - points)[before]).size and off.mean() > SAME_PX:
            raise ValueError(f"{video}: face points lie {off.mean():.1f} px from the dataset's; expected the same recording")
    return made


SHARES = {"covered_25": 0.25, "covered_50": 0.5, "covered_100": 1.0}  # family -> share of the mouth


def paint(rgb: np.ndarray, points: np.ndarray, clip_id: str, family: str, first: int, last: int, value: float) -> np.ndarray:
    """The pictures of a case of the suite `occlusion`: a hand in [first, last), or a head turned by `value` degrees all along."""
    rng = generator(clip_id, family)
    if family in SHARES:
        return covered(rgb, points, first, last, SHARES[family], rng)
    return turned(rgb, points, value * rng.choice((-1, 1)))
