"""Restores one clip: its source, the windows around its gaps and the output audio, in memory that does not grow with its length."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from avsi_jax.face import av_sync
from avsi_jax.inpainting import clip_gaps, confidence, face_tracks, window_inpainter, window_plan
from avsi_jax.inpainting.masked_audio import MaskedAudio
from avsi_jax.media import clip_io

if TYPE_CHECKING:
    from avsi_jax.inference.restorer import Restorer
    from avsi_jax.media.clip_source import Source

BLOCK_S = 10.0  # of audio outside the gaps at once
MEASURED_S = 1.5  # the longest gap in evaluations, where the weights do not say
PHASE_WARNING = (
    "channels of opposite phase cancel in their mean: the loudest channel was used, and the gap is restored in each channel "
    "with its own sign"
)
MAX_OFFSET_S = 5.0  # the largest A/V offset that may be given
MEASURED_AROUND_S = (0.0, 5.0, 13.0)  # on either side of the first window, in turn until the A/V offset is measured


class FaceModels(NamedTuple):
    """Models of the visual front end: landmarks.FaceTracker, mouth_visibility.mouth_visible, and the lock under which to track."""

    tracker: Callable
    mouth_visible: Callable
    lock: threading.Lock


class InpaintedGap(NamedTuple):
    """A gap [start, end) in samples of the clip's rate; the other fields as in api.Gap."""

    start: int
    end: int
    confidence: float
    transcript: str
    inputs: str


class ClipInpainter:
    """Restores the gaps, `spans` in samples of the clip's own rate, of one source.

    face_models: None for a system without video. streaming: discard results that are no longer needed, for files of any length.
    Raises MediaError for a clip without video if the system needs it.
    """

    def __init__(
        self, source: Source, spans: list[tuple[int, int]], restorer: Restorer, face_models: FaceModels | None, measured: Mapping,
        *, face: int | None = None, sync: str | float = "off", streaming: bool = False,
    ):  # fmt: skip
        self.began = time.perf_counter()
        self.seconds = dict.fromkeys(("decode", "landmarks", "model", "vocoder", "all"), 0.0)
        self.source, self.restorer, self.measured = source, restorer, measured
        self.masked = MaskedAudio(source, spans)
        self.tracks, self.av_offset_s, self._sync = None, None, _checked_sync(sync)
        self._streaming, self._inpainted, self._phase_warned = streaming, {}, False
        self._warnings = [*source.warnings, *clip_gaps.warnings_of_missing(source, spans)]
        if face_models is not None:
            self._add_tracks(face_models, face)
        spec = restorer.spec
        plans = window_plan.plan(self.masked.record_gaps, spec.record_samples, self.masked.length, spec.hop * spec.decimation)
        self.window_inpainters = [window_inpainter.WindowInpainter(plan, self.masked, self.tracks, spec) for plan in plans]
        self._plan_of_gap = [i for i, plan in enumerate(plans) for _ in plan.gaps]

    def _add_tracks(self, face_models: FaceModels, face: int | None) -> None:
        video_optional = self.restorer.system.handles_missing_streams
        problem = "no video" if not self.source.has_video else "a video of one image" if self.source.is_still else ""
        if not problem:
            self.tracks = face_tracks.FaceTracks(
                self.source, *face_models, self.seconds, face=face, face_required=not video_optional
            )
        elif video_optional:
            self._warnings.append(f"{problem}: restored from the audio alone")
        else:
            raise clip_io.MediaError(
                f"{self.source.path} has {problem}; {self.restorer.name} needs it; use a_si or av_unified, which do not"
            )

    def begin(self) -> None:
        """Tracks the face in the first windows and measures the A/V offset."""
        if self.tracks is None:
            if self._sync == "auto":
                self._warnings.append("the A/V offset was not measured: no video is used")
            return
        if isinstance(self._sync, float):
            self.tracks.lag_s += self._sync
        window_inpainter.track_faces(self.window_inpainters[: window_inpainter.BATCH_SIZES[-1]])
        measured = self._measured_offset()
        if measured.certainty >= av_sync.MIN_CERTAINTY:
            given_s = self._sync if isinstance(self._sync, float) else 0.0
            self.av_offset_s = float(measured.offset_s + given_s)
            self._handle_offset(measured, given_s)
        elif self._sync == "auto":
            reason = "the audio does not clearly follow the mouth" if self.tracks.ever_visible else "no mouth is visible"
            self._warnings.append(
                f"the A/V offset could not be measured around the first gap ({reason}): not corrected; if the audio lags, give its "
                "seconds as sync"
            )

    def _measured_offset(self) -> av_sync.OffsetEstimate:
        """The A/V offset around the first gap. To correct it, the face is tracked further around until the estimate is certain."""
        start_s, end_s = self.window_inpainters[0].interval
        for around_s in MEASURED_AROUND_S if self._sync == "auto" else (0.0,):
            if around_s:
                self.tracks.track([self.tracks.interval(start_s - around_s, end_s + around_s)])
            began = time.perf_counter()
            measured = face_tracks.measure_av_offset(self.tracks, self.masked)
            self.seconds["landmarks"] += time.perf_counter() - began
            if measured.certainty >= av_sync.MIN_CERTAINTY:
                break
        return measured

    def _handle_offset(self, measured: av_sync.OffsetEstimate, given_s: float) -> None:
        """Corrects the measured A/V offset if asked to, and warns of one that is large enough to matter."""
        if abs(measured.offset_s) <= av_sync.MIN_OFFSET_S:
            return
        direction = "lags" if measured.offset_s > 0 else "leads"
        message = f"the audio {direction} the video by {abs(measured.offset_s) * 1000:.0f} ms"
        if self._sync == "auto":
            self.tracks.lag_s += measured.correction_s
            self._warnings.append(f"{message}: corrected for the restoration")
        elif given_s:
            self._warnings.append(f"{message}, measured after the given offset of {given_s:g} s")
        else:
            self._warnings.append(f"{message}: not corrected; use sync=auto to correct it")

    def gap(self, number: int) -> InpaintedGap:
        """The result for a gap whose windows have run. Raises ValueError if the whole clip had no input."""
        if number in self._inpainted:
            return self._inpainted[number]
        windows = self.window_inpainters[self._plan_of_gap[number]]
        (start, end), rate = self.masked.spans[number], self.masked.rate
        visible_share = self.tracks.visible_share(start / rate, end / rate) if self.tracks else 0.0
        has_audio = windows.has_audio and not self.restorer.name.startswith("v_")
        if not has_audio and not visible_share and end - start == self.source.num_samples:
            raise ValueError(
                f"{self.source.path}: the gap covers all of the audio and no face is visible: there is nothing to restore it from"
            )
        sure = confidence.confidence((end - start) / rate, has_audio, visible_share, self.measured)
        transcript = ", ".join(dict.fromkeys(filter(None, windows.transcript)))
        inputs = confidence.inputs_used(has_audio, visible_share)
        self._inpainted[number] = result = InpaintedGap(start, end, sure, transcript, inputs)
        self._warn(result, bool(has_audio or visible_share))
        if windows.channels_cancel and not self._phase_warned:
            self._phase_warned = True
            self._warnings.append(f"around {start / rate:.2f} s {PHASE_WARNING}")
        return result

    def _warn(self, gap: InpaintedGap, has_input: bool) -> None:
        rate, length_s = self.masked.rate, (gap.end - gap.start) / self.masked.rate
        name = f"gap {gap.start / rate:.2f}-{gap.end / rate:.2f} s"
        if not has_input:
            self._warnings.append(f"{name}: neither audio nor a visible mouth around it, so the restored audio is a guess")
        longest = confidence.longest_s(self.measured, gap.inputs)
        if length_s > (longest or MEASURED_S):
            quality = f" (STOI {confidence.quality_at_longest(self.measured, gap.inputs):.2f} in the gap there)" if longest else ""
            self._warnings.append(f"{name} is longer than {longest or MEASURED_S:g} s, the longest gap that was evaluated{quality}")

    def blocks(self) -> Iterator[np.ndarray]:
        """The restored audio, (n, C) one after another; gaps are restored on the way, other samples are the source's own."""
        at = 0
        for number, (start, end) in enumerate(self.masked.spans):
            yield from self._unchanged(at, start)
            windows = self._finished_windows(number)
            yield from self.masked.restored_pieces(number, windows.inpainted)
            at = end
            if self._streaming and number + 1 == windows.plan.gaps.stop:
                windows.inpainted = None
        yield from self._unchanged(at, self.source.num_samples)

    def _unchanged(self, start: int, stop: int) -> Iterator[np.ndarray]:
        size = max(1, round(BLOCK_S * self.masked.rate))
        for at in range(start, stop, size):
            yield self.masked.read_native(at, min(at + size, stop))

    def _finished_windows(self, number: int) -> window_inpainter.WindowInpainter:
        """The windows of a gap, after they have run; if necessary runs them together with the next ones."""
        i = self._plan_of_gap[number]
        if not self.window_inpainters[i].done:
            batch = self.window_inpainters[i : i + window_inpainter.BATCH_SIZES[-1]]
            window_inpainter.run(self.restorer, batch, self.seconds)
            for windows in batch:
                for each in windows.plan.gaps:
                    self.gap(each)
            if self._streaming and self.tracks:  # not earlier: gaps of one batch may be hours apart
                self.tracks.discard_before(self.masked.spans[batch[-1].plan.gaps[-1]][1] / self.masked.rate)
        return self.window_inpainters[i]

    def finish(self) -> tuple[tuple[InpaintedGap, ...], tuple[str, ...], dict[str, float]]:
        """(gaps, warnings, processing times in seconds), after all blocks were read."""
        self.seconds["all"] = time.perf_counter() - self.began
        gaps = tuple(self.gap(i) for i in range(len(self.masked.spans)))
        return gaps, tuple(self._warnings) + (self.tracks.warnings if self.tracks else ()), dict(self.seconds)


def _checked_sync(sync: str | float) -> str | float:
    """'off', 'auto', or seconds as float. Raises ValueError for anything else."""
    if isinstance(sync, str):
        if sync not in ("off", "auto"):
            raise ValueError(f"sync {sync!r}: expected off, auto or the seconds by which the audio lags the video")
        return sync
    if not abs(float(sync)) <= MAX_OFFSET_S:
        raise ValueError(f"sync {sync:g}: expected at most {MAX_OFFSET_S:g} s in either direction")
    return float(sync)
