"""The pictures of a source, looked at where a repair needs them: face points of a stretch, and a window's share of a raw batch.

Times are seconds on the picture's clock, from the file's first picture. Pictures are decoded and their face followed in pieces of
bounded size, each once; only the points are kept.
"""

from __future__ import annotations

import contextlib
import re
import time
from typing import NamedTuple

import numpy as np

from avsi_jax.face import av_sync
from avsi_jax.inpainting import window_plan
from avsi_jax.media import channels
from avsi_jax.presets import GRID_FPS, NUM_LANDMARKS

PIECE_BYTES = 384 * 2**20  # of pictures at once, but at least LEAST_S of them
MOST_BYTES = 2 * PIECE_BYTES  # also where LEAST_S takes more
LEAST_S = 1.0  # a face is found anew in every piece, so none is shorter
KEPT_S = 60.0  # of points before what is at work
EVEN = (1.0, 61.0)  # pictures a second that are taken as they are; others, and uneven ones, are brought to GRID_FPS
UNSEEN_S = 0.12  # between two pictures that are further apart nobody looked, but next to them
ROOM = 16  # a window's pictures are filled up to a multiple of this: few shapes, each compiled once
NOTES = 6  # warnings of one kind that are told


class TrackedFrames(NamedTuple):
    """Face points (T, 68, 2) px of the pictures at `times` (T,) s, and which of them show the mouth (T,)."""

    points: np.ndarray
    valid: np.ndarray
    times: np.ndarray


NOTHING = TrackedFrames(np.zeros((0, NUM_LANDMARKS, 2), np.float32), np.zeros(0, bool), np.zeros(0))


class FaceTracks:
    """Looks at one source. `tracker`, `mouth_seen`: landmarks.FaceTracker, mouth_visibility.mouth_seen, or what stands for them; `lock`
    is held while the tracker works, which holds interpreters. must_see: NoFaceError where the first pictures show no face.
    seconds: where time is added under 'decode' and 'landmarks'.
    """

    def __init__(self, source, tracker, mouth_seen, lock, seconds, *, face=None, must_see=False):
        self.source, self.face, self.must_see = source, face, must_see
        self.lag_s = source.lag_s  # what is seen at t is heard at t + lag_s
        self._tracker, self._mouth_seen, self._lock, self._seconds = tracker, mouth_seen, lock, seconds
        self._pieces: list[tuple[float, float, TrackedFrames]] = []
        self._notes: list[str] = []
        self.ever_seen = False

    def look(self, intervals) -> None:
        """Looks at all pictures of some stretches of time, (start_s, end_s), that were not looked at yet."""
        for interval in window_plan.merged((max(0.0, a), b) for a, b in intervals if b > 0):
            held = [(a, b) for a, b, _ in self._pieces]
            for start, end in window_plan.without(interval, held):
                later = min((a for a, _ in held if a >= end), default=np.inf)
                self._look_at(start, min(max(end, start + LEAST_S), later))

    def forget(self, before_s: float) -> None:
        """Gives up the points of pictures that no sound from before_s on needs."""
        self._pieces = [piece for piece in self._pieces if piece[1] > before_s - self.lag_s - KEPT_S]

    def _look_at(self, start: float, end: float) -> None:
        width, height = self.source.size
        bytes_a_second = 3 * width * height * max(self.source.fps, 1.0)
        most = max(min(LEAST_S, MOST_BYTES / bytes_a_second), PIECE_BYTES / bytes_a_second)
        count = max(1, int(np.ceil((end - start) / most)))
        cuts = np.linspace(start, end, count + 1).tolist()
        for a, b in zip(cuts, cuts[1:]):
            with self._timed("decode"):
                video = self.source.video(a, b)
            if len(video.times):
                with self._timed("landmarks"):
                    self._pieces.append((a, b, self._track(video)))
            else:
                self._pieces.append((a, b, NOTHING))
        self._pieces.sort(key=lambda piece: piece[:2])

    def _track(self, video) -> TrackedFrames:
        from avsi_jax.face import landmarks

        chosen = {} if self.face is None else {"face": self.face}
        try:
            with self._lock:
                track = self._tracker(video.rgb, **chosen)
        except landmarks.NoFaceError:
            if self.must_see and not self.ever_seen:
                raise
            return self._unseen(video, "no face in the pictures: repaired by the sound alone")
        except ValueError as error:
            if not self.ever_seen:
                raise
            return self._unseen(video, str(error))
        hidden = track.valid & ~self._mouth_seen(video.rgb, track.points)
        if hidden.any():
            track = track.without(hidden, "something hides the mouth")
        self.ever_seen |= bool(track.valid.any())
        self._notes.extend(self._where(video, warning) for warning in track.warnings)
        return TrackedFrames(track.points.astype(np.float32), track.valid, video.times)

    def _unseen(self, video, why: str) -> TrackedFrames:
        self._notes.append(self._where(video, why))
        count = len(video.times)
        return TrackedFrames(np.zeros((count, NUM_LANDMARKS, 2), np.float32), np.zeros(count, bool), video.times)

    def _where(self, video, note: str) -> str:
        return note if video.times[0] < LEAST_S else f"from {video.times[0]:.1f} s on: {note}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was noticed; of many alike the first ones."""
        kinds: dict[str, list[str]] = {}
        for note in dict.fromkeys(self._notes):
            kinds.setdefault(re.sub(r"[\d.]+", "0", note.partition(" s on: ")[2] or note), []).append(note)
        more = {
            notes[NOTES - 1]: f" (and in {len(notes) - NOTES} more stretches)" for notes in kinds.values() if len(notes) > NOTES
        }
        return tuple(note + more.get(note, "") for notes in kinds.values() for note in notes[:NOTES])

    def all(self) -> TrackedFrames:
        """Of every picture looked at and still known, in order."""
        return _joined([seen for _, _, seen in self._pieces])

    def seen(self, start_s: float, end_s: float) -> TrackedFrames:
        """Of the pictures with start_s <= time < end_s that were looked at."""
        found = _joined([seen for a, b, seen in self._pieces if a < end_s and b > start_s])
        inside = (found.times >= start_s) & (found.times < end_s)
        return TrackedFrames(*(x[inside] for x in found))

    def share_seen(self, start_s: float, end_s: float) -> float:
        """Of a stretch of the sound, the share in which the mouth is seen."""
        moments = np.linspace(start_s, end_s, 101) - self.lag_s
        found = self.seen(moments[0] - UNSEEN_S, moments[-1] + UNSEEN_S)
        if not found.valid.any():
            return 0.0
        nearest = np.abs(moments[:, None] - found.times[None]).argmin(1)
        near = np.abs(moments - found.times[nearest]) <= max(UNSEEN_S / 2, 0.75 / max(self.source.fps, 1.0))
        return float((near & found.valid[nearest]).mean())

    def longest(self) -> TrackedFrames:
        """Of the longest run of pictures without a break."""
        found = self.all()
        breaks = np.flatnonzero(np.diff(found.times) > 2.5 / max(self.source.fps, 1.0)) + 1
        edges = [0, *breaks.tolist(), len(found.times)]
        a, b = max(zip(edges, edges[1:]), key=lambda run: run[1] - run[0])
        return TrackedFrames(*(x[a:b] for x in found))

    def interval(self, start_s: float, end_s: float) -> tuple[float, float]:
        """The picture's times that a window of the sound looks at, with one picture more at either side."""
        spare = 1.5 / max(self.source.fps, 1.0)
        return start_s - self.lag_s - spare, end_s - self.lag_s + spare

    @contextlib.contextmanager
    def _timed(self, what: str):
        began = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - began


def measured_sync(tracks: FaceTracks, masked) -> av_sync.Sync:
    """av_sync.measure of the longest run of pictures looked at, without a break, and the sound around it."""
    found, reach = tracks.longest(), 1.0
    if not found.valid.any():
        return av_sync.Sync(0.0, 0.0)
    start = max(0, round((found.times[0] + tracks.lag_s - reach) * masked.rate))
    stop = max(start, round((found.times[-1] + tracks.lag_s + reach) * masked.rate))
    samples, start_s = masked.own(start, stop), start / masked.rate
    if channels.cancel(samples):
        samples = channels.one(samples)[:, None]
    missing = [(a / masked.rate - start_s, b / masked.rate - start_s) for a, b in masked.spans if a < stop and b > start]
    return av_sync.measure(found.points, found.valid, found.times, samples, masked.rate, missing, tracks.lag_s - start_s)


def window(tracks: FaceTracks | None, start_s: float, end_s: float) -> dict[str, np.ndarray]:
    """The pictures' side of a raw batch's row for a window of the sound; nothing is seen without a watcher."""
    found, fps, lag_s, size = NOTHING, GRID_FPS, 0.0, (360, 288)
    if tracks is not None:
        lag_s, size = tracks.lag_s, tracks.source.size
        found, fps = at_even_rate(tracks.seen(*tracks.interval(start_s, end_s)), tracks.source.fps)
        found = _ended(found, start_s - lag_s, end_s - lag_s, fps)
    if not len(found.times):
        found = TrackedFrames(np.zeros((1, NUM_LANDMARKS, 2), np.float32), np.zeros(1, bool), np.asarray([start_s - lag_s]))
    room = -(-int(np.ceil((end_s - start_s) * fps) + 5) // ROOM) * ROOM
    count = min(room, len(found.times))
    return {
        "landmarks": np.pad(found.points[:count], ((0, room - count), (0, 0), (0, 0)), mode="edge").astype(np.float32),
        "landmarks_valid": np.pad(found.valid[:count], (0, room - count)),
        "num_frames": np.int32(count),
        "offset_s": np.float32(lag_s - start_s + found.times[0]),
        "fps": np.float32(fps),
        "frame_size": np.asarray(size, np.int32),
    }


def at_even_rate(found: TrackedFrames, fps: float) -> tuple[TrackedFrames, float]:
    """The same pictures at an even rate, and that rate: unchanged where they are even already."""
    times = found.times
    if not len(times):
        return found, GRID_FPS
    raster = times[0] + np.arange(len(times)) / max(fps, 1e-3)
    if EVEN[0] <= fps <= EVEN[1] and np.abs(times - raster).max() < 0.25 / fps:
        return found, fps
    even = times[0] + np.arange(int((times[-1] - times[0]) * GRID_FPS) + 1) / GRID_FPS
    flat = found.points.reshape(len(times), -1)
    points = np.stack([np.interp(even, times, c) for c in flat.T], -1).reshape(-1, *found.points.shape[1:])
    after = np.searchsorted(times, even).clip(1, max(1, len(times) - 1))
    nearest = np.minimum(np.abs(times[after - 1] - even), np.abs(times[after % len(times)] - even))
    near = nearest <= max(UNSEEN_S, 1.5 / max(fps, 1.0)) / 2
    valid = (np.interp(even, times, found.valid.astype(float)) == 1) & near
    return TrackedFrames(points.astype(np.float32), valid, even), GRID_FPS


def _ended(found: TrackedFrames, start_s: float, end_s: float, fps: float) -> TrackedFrames:
    """With a picture that shows nothing beyond either end, where the window goes further than the pictures do."""
    if not len(found.times):
        return found
    before, after = found.times[0] - start_s > 1.5 / fps, end_s - found.times[-1] > 2.5 / fps
    for at, side in [(0, -1)] * bool(before) + [(-1, 1)] * bool(after):
        extra = TrackedFrames(found.points[at][None], np.zeros(1, bool), found.times[at][None] + side / fps)
        found = _joined([extra, found] if side < 0 else [found, extra])
    return found


def _joined(parts: list[TrackedFrames]) -> TrackedFrames:
    return TrackedFrames(*(np.concatenate(x) for x in zip(NOTHING, *parts)))
