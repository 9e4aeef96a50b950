"""Video occlusions for an evaluation: a hand over the mouth or a turned head, painted on the frames before face tracking.

Changing landmarks could not show this: the face mesh follows a face with a covered mouth and invents its lips. So the frames are
painted and tracked again. All randomness is seeded by the clip's id.

Letters: T video frames, H by W pixels.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np

from avsi_jax.face import landmarks, mouth_visibility
from avsi_jax.face.landmarks import MOUTH
from avsi_jax.media import clip_io
from avsi_jax.runtime import process_pool

VIDEOS = (".mpg", ".mpeg", ".mp4", ".avi", ".mov", ".mkv")  # in order of preference: Grid's own format first
FOCAL = 1.5  # focal length of the camera, in frame widths
MEMORY_MB, TIMEOUT_S = 4_000, 300.0  # per clip, which is tracked several times
SAME_PX = 1.0  # largest mean distance of the landmarks in unpainted frames from the record's
BISECTIONS = 24  # of the search for the place where a hand covers a share of the mouth


# ---- painting ------------------------------------------------------------------------------------------------------------------


def generator(*seed: object) -> np.random.Generator:
    """A random generator seeded by these values."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(":".join(map(str, seed)).encode()).digest()[:8], "big"))


def cover_mouth(rgb: np.ndarray, points: np.ndarray, first: int, last: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """rgb (T, H, W, 3) uint8 with a hand over `share` of the mouth in the frames [first, last).

    points (T, 68, 2): landmarks in pixels. The hand does not move: `share` refers to the mean mouth's area, and 1 covers the mouth
    in every one of those frames.
    """
    if last <= first:
        return rgb
    lips = points[first:last, MOUTH]
    size = rgb.shape[1:3]
    mouth = _mouth_mask(lips.mean(0), size) if share < 1 else _union(lips, size)
    width = float(np.linalg.norm(lips[:, 6] - lips[:, 0], axis=-1).mean())
    hand = functools.partial(_hand, lips.mean((0, 1)), width, size, rng.uniform(-1, 1), rng.choice((-1, 1)))
    mask = _cover_share(hand, mouth, share, 4 * width)
    return overlay(rgb, first, last, mask, skin(rgb[first], points[first], mask.shape, rng))


def turn_head(rgb: np.ndarray, points: np.ndarray, degrees: float) -> np.ndarray:
    """The frames (T, H, W, 3) as if a flat face were turned about its vertical axis, seen from FOCAL frame widths away."""
    height, width = rgb.shape[1:3]
    x, y = points.mean((0, 1))
    angle, focal = np.deg2rad(degrees), FOCAL * width
    to_centre = np.array([[1, 0, -x], [0, 1, -y], [0, 0, 1]], np.float64)
    rotation = np.array([[np.cos(angle), 0, 0], [0, 1, 0], [np.sin(angle) / focal, 0, 1]])
    transform = np.linalg.inv(to_centre) @ rotation @ to_centre
    return np.stack([cv2.warpPerspective(p, transform, (width, height), borderMode=cv2.BORDER_REPLICATE) for p in rgb])


def share_of_mouth(mask: np.ndarray, lips: np.ndarray) -> float:
    """Share of the mouth's area, lips (20, 2) px, that a mask (H, W) in [0, 1] covers."""
    mouth = _mouth_mask(lips, mask.shape)
    return float((mask * mouth).sum() / max(1.0, mouth.sum()))


def _mouth_mask(lips: np.ndarray, size) -> np.ndarray:
    """(H, W) float32: 1 inside the outline of the lips."""
    out = np.zeros(size, np.uint8)
    cv2.fillConvexPoly(out, cv2.convexHull(np.rint(lips).astype(np.int32)), 1)
    return out.astype(np.float32)


def _union(lips: np.ndarray, size) -> np.ndarray:
    return np.max([_mouth_mask(one, size) for one in lips], axis=0)


def _cover_share(shape_at, mouth: np.ndarray, share: float, max_distance: float) -> np.ndarray:
    """The mask of a shape at the largest distance (max_distance to 0 px) where it covers `share` of the mouth (H, W)."""
    covered = lambda distance: (shape_at(distance) * mouth).sum() / max(1.0, mouth.sum())
    near, far = 0.0, max_distance
    for _ in range(BISECTIONS):
        middle = (near + far) / 2
        near, far = (middle, far) if covered(middle) >= min(share, 0.999) else (near, middle)
    return shape_at(near)


def _hand(centre, width: float, size, lean: float, side: int, distance: float) -> np.ndarray:
    """(H, W) float32 mask of a hand `distance` px below the place where its fingers lie across the mouth; edges are soft."""
    mask = np.zeros(size, np.uint8)
    angle = np.deg2rad(35 * lean)
    up, right = np.array([np.sin(angle), -np.cos(angle)]), np.array([np.cos(angle), np.sin(angle)]) * side
    palm = np.asarray(centre) - up * (distance + 0.1 * width)
    at = lambda x, y: tuple(int(v) for v in np.rint((palm + x * width * right + y * width * up) * 8))  # eighths of a pixel
    axes = (round(0.95 * width * 8), round(1.1 * width * 8))
    cv2.ellipse(mask, at(0, -0.3), axes, np.rad2deg(angle), 0, 360, 1, -1, shift=3)
    for i, length in enumerate((0.9, 1.15, 1.2, 1.0)):
        x = -0.66 + 0.44 * i
        cv2.line(mask, at(x, 0.2), at(1.25 * x, 0.2 + length), 1, max(2, round(0.5 * width)), shift=3)
    cv2.line(mask, at(0.7, -0.4), at(1.5, 0.35), 1, max(2, round(0.45 * width)), shift=3)
    return np.clip(cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.8), 0, 1)


def skin(image: np.ndarray, face: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) float32: the colour of the cheeks, slightly darker, with soft shadows and noise."""
    reach = max(2, int(0.04 * np.ptp(face[:, 0])))
    cheeks = []
    for jaw, nose in ((3, 31), (13, 35)):
        x, y = np.rint((face[jaw] + face[nose]) / 2).astype(int).clip(reach, np.array(size[::-1]) - reach - 1)
        cheeks.append(image[y - reach : y + reach, x - reach : x + reach].reshape(-1, 3))
    colour = np.median(np.concatenate(cheeks), axis=0) * rng.uniform(0.8, 1.05)
    shadows = cv2.GaussianBlur(rng.normal(size=size).astype(np.float32), (0, 0), 8)
    light = 1 + 0.1 * shadows / max(1e-6, float(shadows.std())) + 0.02 * rng.normal(size=size)
    return (colour * light[..., None]).astype(np.float32)


def overlay(rgb: np.ndarray, first: int, last: int, mask: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """rgb with `colour` (H, W, 3) blended in by `mask` (H, W) in the frames [first, last)."""
    out = rgb.copy()
    for t in range(first, last):
        out[t] = np.clip(np.rint(rgb[t] * (1 - mask[..., None]) + colour * mask[..., None]), 0, 255)
    return out


# ---- tracking painted frames ---------------------------------------------------------------------------------------------------


def find_videos(raw: Path, clip_ids: Iterable[str]) -> dict[str, Path]:
    """clip id -> its video below the folder `raw`; ValueError names a clip without one."""
    if not Path(raw).is_dir():
        raise FileNotFoundError(f"--raw={raw}: no such folder; expected the videos of the dataset")
    videos: dict[str, Path] = {}
    order = lambda p: (VIDEOS.index(p.suffix.lower()), str(p))
    for path in sorted((p for p in Path(raw).rglob("*") if p.suffix.lower() in VIDEOS), key=order):
        videos.setdefault(path.stem, path)
    if missing := sorted(set(clip_ids) - set(videos)):
        raise ValueError(
            f"--raw={raw}: no video of {missing[0]} and {len(missing) - 1} more clips; expected files named by clip id"
        )
    return {clip: videos[clip] for clip in clip_ids}


def track_all(jobs: list[tuple], num_workers: int, progress: Callable[[int, int], None]) -> list[dict]:
    """Paints and tracks clips in worker processes.

    jobs: [(video, the record's points (T, 68, 2), clip id, [(key, family, value, first, last), ...])]. Returns for each job
    {key: (points (T, 68, 2) float32, valid (T,) bool, mouth visible (T,) bool)}. progress(done, total) is called after each.
    ValueError for a video that does not match its record.
    """
    landmarks.load_models()  # a missing model is reported here, in one line, and not by a failing worker
    results: list = [None] * len(jobs)
    outcomes = process_pool.run(track, jobs, workers=num_workers, timeout_s=TIMEOUT_S, memory_mb=MEMORY_MB, start=start_worker)
    for done, outcome in enumerate(outcomes):
        if outcome.missing:
            raise ValueError(f"{jobs[outcome.index][0]}: its painted frames cannot be tracked: {outcome.missing}")
        results[outcome.index] = outcome.result
        progress(done + 1, len(jobs))
    return results


def start_worker() -> None:
    """Loads the tracker in a worker process, with one thread."""
    landmarks.use_one_thread()
    tracker()


@functools.cache
def tracker() -> landmarks.FaceTracker:
    """The process's face tracker."""
    return landmarks.FaceTracker()


def track(video: str, points: np.ndarray, clip_id: str, changes: list[tuple]) -> dict:
    """One job of `track_all`."""
    rgb = clip_io.read_clip(video, audio=False).video.rgb
    if len(rgb) != len(points):
        raise ValueError(
            f"{video}: found {len(rgb)} frames, expected {len(points)} as in the dataset: another recording or frame rate"
        )
    results = {}
    for key, family, value, first, last in changes:
        painted = paint(rgb, points, clip_id, family, first, last, value)
        try:
            tracked = tracker()(painted)
        except landmarks.NoFaceError:
            no_face = np.zeros(len(rgb), bool)
            results[key] = (np.repeat(points[:1], len(rgb), 0), no_face, no_face)
            continue
        results[key] = (tracked.points, tracked.valid, mouth_visibility.mouth_visible(painted, tracked.points))
        before = slice(0, first) if family in SHARES else slice(0, 0)
        if (distance := np.abs(tracked.points - points)[before]).size and distance.mean() > SAME_PX:
            raise ValueError(f"{video}: landmarks lie {distance.mean():.1f} px from the dataset's; expected the same recording")
    return results


SHARES = {"covered_25": 0.25, "covered_50": 0.5, "covered_100": 1.0}  # family -> share of the mouth


def paint(rgb: np.ndarray, points: np.ndarray, clip_id: str, family: str, first: int, last: int, value: float) -> np.ndarray:
    """The frames of a case of suite `occlusion`: a hand in frames [first, last), or the head turned by `value` degrees in all."""
    rng = generator(clip_id, family)
    if family in SHARES:
        return cover_mouth(rgb, points, first, last, SHARES[family], rng)
    return turn_head(rgb, points, value * rng.choice((-1, 1)))
