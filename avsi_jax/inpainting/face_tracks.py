"""Landmarks of a clip's video, tracked only where a restoration needs them, and the video part of a window's raw batch.

Times are seconds of the video, from its first frame. Video is decoded and the face tracked in segments of bounded size, each
segment once; only the landmarks are kept. Letters: T video frames.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from avsi_jax.face import av_sync
from avsi_jax.inpainting import window_plan
from avsi_jax.media import channels, clip_io
from avsi_jax.presets import GRID_FPS, NUM_LANDMARKS

if TYPE_CHECKING:
    from avsi_jax.inpainting.masked_audio import MaskedAudio
    from avsi_jax.media.clip_io import Video
    from avsi_jax.media.clip_source import Source

SEGMENT_BYTES = 384 * 2**20  # of decoded video at once, but at least MIN_SEGMENT_S of it
MAX_SEGMENT_BYTES = 2 * SEGMENT_BYTES  # also if MIN_SEGMENT_S takes more
MIN_SEGMENT_S = 1.0  # the face is detected again in every segment, so none is shorter
KEEP_S = 60.0  # landmarks kept before the position being processed
FPS_RANGE = (1.0, 61.0)  # frame rates that are kept; other rates, and uneven frames, are converted to GRID_FPS
MAX_FRAME_DISTANCE_S = 0.12  # between frames that are further apart, the face counts as not visible except close to them
FRAME_MULTIPLE = 16  # the frames of a window are padded to a multiple of this: few shapes, each compiled once
MAX_WARNINGS = 6  # of one kind


class TrackedFrames(NamedTuple):
    """Landmarks (T, 68, 2) in pixels of the frames at `times` (T,) in seconds; valid (T,): whether the mouth is visible."""

    landmarks: np.ndarray
    valid: np.ndarray
    times: np.ndarray


NO_FRAMES = TrackedFrames(np.zeros((0, NUM_LANDMARKS, 2), np.float32), np.zeros(0, bool), np.zeros(0))


class FaceTracks:
    """Tracks the face in one source.

    tracker, mouth_visible: landmarks.FaceTracker and mouth_visibility.mouth_visible, or replacements for them. lock: held while
    the tracker runs, which is not thread-safe. seconds: processing time is added under 'decode' and 'landmarks'. face: as in
    Inpainter.inpaint. face_required: raise NoFaceError if the first segment shows no face. lag_s: what the video shows at time t
    belongs to the audio at t + lag_s.
    """

    def __init__(
        self, source: Source, tracker: Callable, mouth_visible: Callable, lock: threading.Lock, seconds: dict[str, float],
        *, face: int | None = None, face_required: bool = False,
    ):  # fmt: skip
        self.source, self.face, self.face_required = source, face, face_required
        self.lag_s = source.lag_s
        self._tracker, self._mouth_visible, self._lock, self._seconds = tracker, mouth_visible, lock, seconds
        self._segments: list[tuple[float, float, TrackedFrames]] = []
        self._notes: list[str] = []
        self.ever_visible = False

    def track(self, intervals: Iterable[tuple[float, float]]) -> None:
        """Tracks the face in all frames of intervals (start_s, end_s) of the video that were not tracked yet."""
        for interval in window_plan.merged((max(0.0, a), b) for a, b in intervals if b > 0):
            covered = [(a, b) for a, b, _ in self._segments]
            for start, end in window_plan.without(interval, covered):
                later = min((a for a, _ in covered if a >= end), default=np.inf)
                self._track_interval(start, min(max(end, start + MIN_SEGMENT_S), later))

    def discard_before(self, before_s: float) -> None:
        """Discards landmarks that no audio from before_s on needs."""
        self._segments = [segment for segment in self._segments if segment[1] > before_s - self.lag_s - KEEP_S]

    def _track_interval(self, start: float, end: float) -> None:
        width, height = self.source.size
        bytes_per_second = 3 * width * height * max(self.source.fps, 1.0)
        longest = max(min(MIN_SEGMENT_S, MAX_SEGMENT_BYTES / bytes_per_second), SEGMENT_BYTES / bytes_per_second)
        count = max(1, int(np.ceil((end - start) / longest)))
        cuts = np.linspace(start, end, count + 1).tolist()
        for a, b in zip(cuts, cuts[1:]):
            try:
                with self._timed("decode"):
                    video = self.source.video(a, b)
            except clip_io.FrameSizeError:
                if self.face_required and not self.ever_visible:
                    raise
                self._notes.append(_from_time(a, "the size of the frames changes: restored from the audio alone"))
                video = None
            if video is not None and len(video.times):
                with self._timed("landmarks"):
                    self._segments.append((a, b, self._track_segment(video)))
            else:
                self._segments.append((a, b, NO_FRAMES))
        self._segments.sort(key=lambda segment: segment[:2])

    def _track_segment(self, video: Video) -> TrackedFrames:
        from avsi_jax.face import landmarks

        options = {} if self.face is None else {"face": self.face}
        try:
            with self._lock:
                track = self._tracker(video.rgb, **options)
        except landmarks.NoFaceError:
            if self.face_required and not self.ever_visible:
                raise
            return self._not_visible(video, "no face detected: restored from the audio alone")
        except ValueError as error:
            if not self.ever_visible:
                raise
            return self._not_visible(video, str(error))
        hidden = track.valid & ~self._mouth_visible(video.rgb, track.points)
        if hidden.any():
            track = track.mark_hidden(hidden, "the mouth is covered")
        self.ever_visible |= bool(track.valid.any())
        self._notes.extend(self._with_time(video, warning) for warning in track.warnings)
        return TrackedFrames(track.points.astype(np.float32), track.valid, video.times)

    def _not_visible(self, video: Video, reason: str) -> TrackedFrames:
        self._notes.append(self._with_time(video, reason))
        count = len(video.times)
        return TrackedFrames(np.zeros((count, NUM_LANDMARKS, 2), np.float32), np.zeros(count, bool), video.times)

    def _with_time(self, video: Video, note: str) -> str:
        return _from_time(video.times[0], note)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of the tracker; at most MAX_WARNINGS of a kind."""
        kinds: dict[str, list[str]] = {}
        for note in dict.fromkeys(self._notes):
            kinds.setdefault(re.sub(r"[\d.]+", "0", note.partition(" s on: ")[2] or note), []).append(note)
        more = {
            notes[MAX_WARNINGS - 1]: f" (and {len(notes) - MAX_WARNINGS} more times)"
            for notes in kinds.values()
            if len(notes) > MAX_WARNINGS
        }
        return tuple(note + more.get(note, "") for notes in kinds.values() for note in notes[:MAX_WARNINGS])

    def all(self) -> TrackedFrames:
        """All frames that were tracked and not discarded, in order."""
        return _concatenated([frames for _, _, frames in self._segments])

    def between(self, start_s: float, end_s: float) -> TrackedFrames:
        """The tracked frames with start_s <= time < end_s."""
        frames = _concatenated([frames for a, b, frames in self._segments if a < end_s and b > start_s])
        inside = (frames.times >= start_s) & (frames.times < end_s)
        return TrackedFrames(*(x[inside] for x in frames))

    def visible_share(self, start_s: float, end_s: float) -> float:
        """The share of an interval of the audio in which the mouth is visible, 0 to 1."""
        moments = np.linspace(start_s, end_s, 101) - self.lag_s
        frames = self.between(moments[0] - MAX_FRAME_DISTANCE_S, moments[-1] + MAX_FRAME_DISTANCE_S)
        if not frames.valid.any():
            return 0.0
        nearest = np.abs(moments[:, None] - frames.times[None]).argmin(1)
        close = np.abs(moments - frames.times[nearest]) <= max(MAX_FRAME_DISTANCE_S / 2, 0.75 / max(self.source.fps, 1.0))
        return float((close & frames.valid[nearest]).mean())

    def longest_run(self) -> TrackedFrames:
        """The longest run of tracked frames without a break."""
        frames = self.all()
        breaks = np.flatnonzero(np.diff(frames.times) > 2.5 / max(self.source.fps, 1.0)) + 1
        edges = [0, *breaks.tolist(), len(frames.times)]
        a, b = max(zip(edges, edges[1:]), key=lambda run: run[1] - run[0])
        return TrackedFrames(*(x[a:b] for x in frames))

    def interval(self, start_s: float, end_s: float) -> tuple[float, float]:
        """The interval of the video that belongs to one of the audio, with one frame more at either end."""
        margin = 1.5 / max(self.source.fps, 1.0)
        return start_s - self.lag_s - margin, end_s - self.lag_s + margin

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - began


def _from_time(start_s: float, note: str) -> str:
    return note if start_s < MIN_SEGMENT_S else f"from {start_s:.1f} s on: {note}"


def measure_av_offset(tracks: FaceTracks, masked: MaskedAudio) -> av_sync.OffsetEstimate:
    """av_sync.estimate_offset for the longest run of tracked frames and the audio around it."""
    frames, reach = tracks.longest_run(), 1.0
    if not frames.valid.any():
        return av_sync.OffsetEstimate(0.0, 0.0)
    start = max(0, round((frames.times[0] + tracks.lag_s - reach) * masked.rate))
    stop = max(start, round((frames.times[-1] + tracks.lag_s + reach) * masked.rate))
    samples, start_s = masked.read_native(start, stop), start / masked.rate
    if channels.cancel_in_mean(samples):
        samples = channels.downmix(samples)[:, None]
    missing = (*masked.spans, *masked.source.missing)
    gaps = [(a / masked.rate - start_s, b / masked.rate - start_s) for a, b in missing if a < stop and b > start]
    return av_sync.estimate_offset(frames.landmarks, frames.valid, frames.times, samples, masked.rate, gaps, tracks.lag_s - start_s)


def batch_row(tracks: FaceTracks | None, start_s: float, end_s: float) -> dict[str, np.ndarray]:
    """The video part of a raw batch's row for a window of the audio; without tracks no frame is valid."""
    frames, fps, lag_s, size = NO_FRAMES, GRID_FPS, 0.0, (360, 288)
    if tracks is not None:
        lag_s, size = tracks.lag_s, tracks.source.size
        frames, fps = at_constant_rate(tracks.between(*tracks.interval(start_s, end_s)), tracks.source.fps)
        frames = _with_invalid_ends(frames, start_s - lag_s, end_s - lag_s, fps)
    if not len(frames.times):
        frames = TrackedFrames(np.zeros((1, NUM_LANDMARKS, 2), np.float32), np.zeros(1, bool), np.asarray([start_s - lag_s]))
    padded = -(-int(np.ceil((end_s - start_s) * fps) + 5) // FRAME_MULTIPLE) * FRAME_MULTIPLE
    count = min(padded, len(frames.times))
    landmarks = np.pad(frames.landmarks[:count], ((0, padded - count), (0, 0), (0, 0)), mode="edge").astype(np.float32)
    return {
        "landmarks": landmarks,
        "landmarks_valid": np.pad(frames.valid[:count], (0, padded - count)),
        "num_frames": np.int32(count),
        "offset_s": np.float32(lag_s - start_s + frames.times[0]),
        "fps": np.float32(fps),
        "frame_size": np.asarray(size, np.int32),
    }


def at_constant_rate(frames: TrackedFrames, fps: float) -> tuple[TrackedFrames, float]:
    """(frames at a constant rate, that rate): unchanged if they are evenly spaced already, else interpolated at GRID_FPS."""
    times = frames.times
    if not len(times):
        return frames, GRID_FPS
    grid = times[0] + np.arange(len(times)) / max(fps, 1e-3)
    if FPS_RANGE[0] <= fps <= FPS_RANGE[1] and np.abs(times - grid).max() < 0.25 / fps:
        return frames, fps
    even = times[0] + np.arange(int((times[-1] - times[0]) * GRID_FPS) + 1) / GRID_FPS
    flat = frames.landmarks.reshape(len(times), -1)
    interpolated = np.stack([np.interp(even, times, c) for c in flat.T], -1).reshape(-1, *frames.landmarks.shape[1:])
    after = np.searchsorted(times, even).clip(1, max(1, len(times) - 1))
    nearest = np.minimum(np.abs(times[after - 1] - even), np.abs(times[after % len(times)] - even))
    close = nearest <= max(MAX_FRAME_DISTANCE_S, 1.5 / max(fps, 1.0)) / 2
    valid = (np.interp(even, times, frames.valid.astype(float)) == 1) & close
    return TrackedFrames(interpolated.astype(np.float32), valid, even), GRID_FPS


def _with_invalid_ends(frames: TrackedFrames, start_s: float, end_s: float, fps: float) -> TrackedFrames:
    """Adds an invalid frame beyond either end at which the window extends further than the video."""
    if not len(frames.times):
        return frames
    before, after = frames.times[0] - start_s > 1.5 / fps, end_s - frames.times[-1] > 2.5 / fps
    for at, side in [(0, -1)] * bool(before) + [(-1, 1)] * bool(after):
        extra = TrackedFrames(frames.landmarks[at][None], np.zeros(1, bool), frames.times[at][None] + side / fps)
        frames = _concatenated([extra, frames] if side < 0 else [frames, extra])
    return frames


def _concatenated(parts: list[TrackedFrames]) -> TrackedFrames:
    return TrackedFrames(*(np.concatenate(x) for x in zip(NO_FRAMES, *parts)))
