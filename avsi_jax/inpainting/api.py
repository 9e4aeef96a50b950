"""Python API: Inpainter restores the gaps in a clip. The command is inpainting/cli.py.

The gaps are set to zero first, at the clip's own rate, before anything else reads the audio, so the samples inside them never
affect the output. Samples outside the gaps are returned bit for bit, at the clip's own rate and in its own channels. Only windows
around the gaps are decoded, tracked and restored (inpainting/clip_inpainter.py), so a clip may have any length. An Inpainter is
thread-safe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

    from avsi_jax.inference.restorer import Restorer
    from avsi_jax.inpainting.clip_inpainter import ClipInpainter, FaceModels, InpaintedGap
    from avsi_jax.media.clip_io import Clip
    from avsi_jax.media.clip_source import Source

    Gaps = Sequence[tuple[float, float]] | Literal["auto"]
    Sync = Literal["off", "auto"] | float
    Mode = Literal["natural", "mean"]

MAX_LOG_MEL_S = 60.0  # longest clip for which the log-mel spectrograms of a Repair are computed
LOG_MEL_PAD_S = 3.0  # their audio is padded to this, twice this, ...: few shapes, each compiled once


@dataclasses.dataclass(frozen=True)
class Gap:
    """A restored gap, in seconds from the start of the clip as a player shows it.

    confidence: 0 to 1, from the quality measured for gaps of this length (inpainting/confidence.py).
    transcript: the predicted text around the gap, as the most likely sentence of the Grid corpus; '' if the system has no text head
    or recognised less than half of a sentence.
    inputs: what the restoration was based on, 'audio and video', 'audio' or 'video'.
    """

    start_s: float
    end_s: float
    confidence: float
    transcript: str
    inputs: str


@dataclasses.dataclass(frozen=True, repr=False)
class Repair:
    """The restored audio of a clip and how it was made. Letters: N samples, C channels, F mel frames, T video frames.

    samples: (N, C) at `rate` Hz, float32 (float64 for 32-bit integer and double files). subtype: the sample format, as soundfile
    names it.
    masked_log_mel, restored_log_mel: (F, 64) log-mel in dB (preset paper) of the masked and the restored audio, one frame every
    `frame_s` seconds; None for clips longer than MAX_LOG_MEL_S.
    landmarks: (T, 68, 2) pixels, of the video frames that were tracked; landmarks_valid: (T,) whether the mouth is visible in them;
    frame_times: (T,) seconds from the first video frame. None without video.
    av_offset_s: measured A/V offset, positive if the audio lags the video; None if it could not be measured reliably.
    seconds: processing time of 'decode', 'landmarks', 'model', 'vocoder', and 'all' in total.
    av_lag_s: what the video shows at time t was matched with the audio at t + av_lag_s; None without video. It includes av_offset_s
    only if the offset was corrected.
    """

    samples: np.ndarray
    rate: int
    subtype: str
    gaps: tuple[Gap, ...]
    warnings: tuple[str, ...]
    masked_log_mel: np.ndarray | None
    restored_log_mel: np.ndarray | None
    frame_s: float
    landmarks: np.ndarray | None
    landmarks_valid: np.ndarray | None
    frame_times: np.ndarray | None
    av_offset_s: float | None
    seconds: dict[str, float]
    av_lag_s: float | None = None

    @property
    def transcript(self) -> tuple[str, ...]:
        """The transcript of each gap."""
        return tuple(gap.transcript for gap in self.gaps)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the samples to a .wav or .flac file, in their own subtype; returns its path.

        Raises FileExistsError for an existing file unless `overwrite`, clip_io.MediaError for another suffix or a failed write.
        """
        from avsi_jax.media import clip_io

        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; pass overwrite=True, or choose another name")
        clip_io.write_audio(path, self.samples, self.rate, self.subtype)
        return path

    def __repr__(self) -> str:
        gaps = ", ".join(f"{gap.start_s:.3f}-{gap.end_s:.3f} s" for gap in self.gaps)
        duration = f"{len(self.samples) / self.rate:.2f} s at {self.rate} Hz"
        return f"Repair({duration}, gaps: {gaps}, warnings: {len(self.warnings)})"

    def _repr_html_(self) -> str:
        """For notebooks: the spectrograms with the gaps and restored, and a player."""
        from avsi_jax.inpainting import clip_plots

        restored = self.samples.mean(1)
        masked, gaps = restored.copy(), [(gap.start_s, gap.end_s) for gap in self.gaps]
        for start_s, end_s in gaps:
            masked[round(start_s * self.rate) : round(end_s * self.rate)] = 0
        top_db = clip_plots.peak_db(restored, self.rate)
        images = [clip_plots.audio(x, self.rate, gaps, top_db) for x in (masked, restored)]
        labels = ("with the gap" + "s" * (len(gaps) != 1), "restored")
        shown = "".join(f'<div>{label}<br><img src="{uri}" alt="{label}"></div>' for label, uri in zip(labels, images, strict=True))
        return f'{shown}<audio controls src="{clip_plots.audio_uri(self.samples, self.rate)}"></audio>'


@dataclasses.dataclass(frozen=True)
class FileRepair:
    """The result of `Inpainter.inpaint_file`: fields as in Repair; the clip lasts `duration_s` and was written to `target`."""

    gaps: tuple[Gap, ...]
    warnings: tuple[str, ...]
    av_offset_s: float | None
    seconds: dict[str, float]
    target: str
    duration_s: float


def clip_of(samples: np.ndarray, rate: int, *, rgb: np.ndarray | None = None, fps: float = 25.0) -> Clip:
    """Makes a clip of arrays.

    samples: (N,) or (N, C) at `rate` Hz, floats in [-1, 1] or integers of any width. rgb: optional video, (T, H, W, 3) uint8 at
    `fps`, which starts with the audio. Raises ValueError for other shapes and types.
    """
    import numpy as np

    from avsi_jax.media import clip_io

    samples = np.asarray(samples)
    if samples.dtype == np.uint8:
        raise ValueError("found audio of uint8, expected floats or signed integers; use (samples.astype(np.int16) - 128) / 128")
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fi":
        raise ValueError(
            f"found audio of shape {samples.shape} {samples.dtype}, expected (N,) or (N, C) of floats or signed integers"
        )
    if samples.dtype.kind == "i":
        samples = samples / float(2 ** (8 * samples.dtype.itemsize - 1))
    samples = np.asarray(samples if samples.ndim == 2 else samples[:, None], np.float32)
    clip_io.check_samples(samples)
    if not (rate == int(rate) and rate > 0 and fps > 0):
        raise ValueError(f"found {rate} Hz and {fps} frames per second, expected a whole number of hertz, both above 0")
    video = None
    if rgb is not None:
        rgb = np.asarray(rgb)
        if rgb.ndim != 4 or rgb.shape[-1] != 3 or rgb.dtype != np.uint8 or not rgb.size:
            raise ValueError(f"found video of shape {rgb.shape} {rgb.dtype}, expected (T, H, W, 3) uint8")
        video = clip_io.Video(rgb, float(fps), 0.0, np.arange(len(rgb)) / fps)
    return clip_io.Clip("the clip", video, clip_io.Audio(samples, int(rate), 0.0, "FLOAT", "arrays"))


class Inpainter:
    """Restores gaps in clips with one trained system. Can be pickled.

    >>> inpainter = Inpainter.from_pretrained()     # doctest: +SKIP
    >>> repair = inpainter.inpaint("clip.mpg", gaps=[(0.93, 1.73)])  # doctest: +SKIP

    Clips may also be arrays. Here with an untrained network, and a tone of which 300 ms are missing:

    >>> import numpy as np
    >>> from avsi_jax import configs
    >>> from avsi_jax.inference.restorer import Restorer
    >>> from avsi_jax.models import build
    >>> config = configs.load("tiny", [("system", "a_si"), ("units", "4")])
    >>> inpainter = Inpainter(Restorer(config, build.init_params(config), step=0))
    >>> tone = 0.1 * np.sin(2 * np.pi * 220 * np.arange(32_000) / 16_000)
    >>> repair = inpainter.inpaint(clip_of(tone, 16_000), gaps=[(0.9, 1.2)])
    >>> repair.samples.shape, repair.rate, repair.restored_log_mel.shape
    ((32000, 1), 16000, (101, 64))
    >>> bool((repair.samples[:14_400, 0] == np.float32(tone[:14_400])).all())
    True
    >>> repair.gaps[0].end_s, repair.gaps[0].inputs
    (1.2, 'audio')
    """

    def __init__(self, restorer: Restorer, measured: Mapping | None = None):
        """measured: facts['measured'] of the weights, from which `Gap.confidence` is computed."""
        self.restorer = restorer
        self.measured = measured or {}
        self._tracker = None
        self._mouth_visible = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        """For pickle and multiprocessing: everything but the face tracker and the lock, which are made again when needed."""
        return self.__dict__ | {"_tracker": None, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state | {"_lock": threading.Lock()})

    @classmethod
    def load(cls, checkpoint: str | Path = "pretrained", *, mode: Mode = "natural") -> Inpainter:
        """Loads a system: 'pretrained', the name of shipped weights, a folder of weights, or the working directory of a training.

        mode: for weights with a refiner, which adds the detail of speech to the network's prediction. 'natural': with it; 'mean':
        the prediction itself. Raises ValueError if there is nothing to load there.
        """
        from avsi_jax.inference import weights

        if folder := weights.locate(checkpoint):
            return cls._from_weights(folder, mode)
        return cls.from_workdir(checkpoint, mode=mode)

    @classmethod
    def _from_weights(cls, folder: Path, mode: Mode) -> Inpainter:
        from avsi_jax.inference import weights
        from avsi_jax.inference.restorer import Restorer

        loaded = weights.read(folder)
        return cls(Restorer.of_run(loaded.run, folder, "waveform", mode), loaded.facts.get("measured"))

    @classmethod
    def from_pretrained(cls, name: str = "av_unified", *, mode: Mode = "natural") -> Inpainter:
        """`load` for the weights of that name that are installed with the package. Raises ValueError, which lists the names."""
        from avsi_jax.inference import weights

        return cls._from_weights(weights.find(name), mode)

    @classmethod
    def from_workdir(cls, workdir: str | Path, which: str = "best", *, mode: Mode = "natural") -> Inpainter:
        """`load` for a run directory; which: 'best', 'last' or a training step. Raises checkpoints.CheckpointError."""
        from avsi_jax.inference.restorer import Restorer

        return cls(Restorer.from_workdir(workdir, which, mode=mode))

    def inpaint(
        self, clip: str | Path | Clip | Source, gaps: Gaps, *, face: int | None = None, sync: Sync = "off", track: int | None = None
    ) -> Repair:
        """Restores the gaps in a clip.

        gaps: (start, end) pairs in seconds from the start of the clip as a player shows it, or 'auto' to detect them. face: which
        of several faces to track, counted from 0 at the left; by default the largest. sync: 'off'; 'auto' to correct an A/V offset
        that is measured reliably; or a known offset in seconds, positive if the audio lags the video by more than the clip's time
        stamps say. track: which audio track of a file to restore, counted from 1; by default the one that the file marks as
        default, or the first.

        Raises ValueError for gaps that do not fit the clip, for a clip without any usable input, and (NoGapFoundError) if 'auto'
        detects no gap; clip_io.MediaError for a clip that cannot be read, has no audio, or lacks the video that the system needs;
        landmarks.NoFaceError if the system needs a face and none is detected.
        """
        with self._open(clip, track) as source:
            clip_inpainter = self._clip_inpainter(source, gaps, face, sync)
            clip_inpainter.begin()
            return _make_repair(clip_inpainter)

    def inpaint_batch(
        self, clips: Sequence[str | Path | Clip | Source], gaps: Sequence[Gaps], *, face: int | None = None, sync: Sync = "off",
        track: int | None = None,
    ) -> list[Repair]:  # fmt: skip
        """`inpaint` for several clips, each with its own gaps; their windows go through the network together.

        The content of the other clips does not affect a result. Their number does, by rounding: batches of 1, 2, 4 and 8 windows
        are separate compiled programs, which add in different orders. Levels differ by 0.001 dB, which the 30 iterations of the
        vocoder turn into differences of up to 0.002 of full scale inside the gaps. Samples outside the gaps are always identical.
        """
        from avsi_jax.inpainting import window_inpainter

        if len(clips) != len(gaps):
            raise ValueError(f"found {len(clips)} clips and the gaps of {len(gaps)}, expected a list of gaps for each clip")
        with contextlib.ExitStack() as stack:
            sources = [stack.enter_context(self._open(clip, track)) for clip in clips]
            inpainters = [self._clip_inpainter(source, own, face, sync) for source, own in zip(sources, gaps, strict=True)]
            for clip_inpainter in inpainters:
                clip_inpainter.begin()
            shared = {"model": 0.0, "vocoder": 0.0}
            windows = [window for clip_inpainter in inpainters for window in clip_inpainter.window_inpainters]
            window_inpainter.run(self.restorer, windows, shared)
            for clip_inpainter in inpainters:  # the time of the network is divided evenly
                for key, seconds in shared.items():
                    clip_inpainter.seconds[key] += seconds / len(inpainters)
            return [_make_repair(clip_inpainter) for clip_inpainter in inpainters]

    def inpaint_file(
        self, source_path: str | Path, target_path: str | Path, gaps: Gaps, *, face: int | None = None, sync: Sync = "off",
        track: int | None = None, overwrite: bool = False, progress: Callable[[float], None] | None = None,
    ) -> FileRepair:  # fmt: skip
        """Restores the gaps in a clip file and writes the result, in memory that does not grow with the clip's length.

        The target's suffix selects the format: .wav and .flac hold the audio alone, .mp4 .mkv .mov .mpg also the unchanged video of
        the source. progress: called with the fraction that is done, 0 to 1. Raises the errors of `inpaint`, and FileExistsError if
        the target exists and `overwrite` is false.
        """
        from avsi_jax.media import clip_io, clip_source

        began = time.perf_counter()
        writes_video = Path(target_path).suffix.lower() not in clip_io.AUDIO_SUFFIXES
        if Path(target_path).exists() and not overwrite:
            raise FileExistsError(f"{target_path} exists; use overwrite (--overwrite) to replace it, or another name")
        uses_video = writes_video or self.restorer.system.uses_video
        with clip_source.open_source(source_path, video=uses_video, track=track) as source:
            opened = time.perf_counter() - began
            clip_inpainter = self._clip_inpainter(source, gaps, face, sync, streaming=True)
            clip_inpainter.seconds["decode"] += opened
            clip_inpainter.began = began
            clip_inpainter.begin()
            blocks = _with_progress(clip_inpainter.blocks(), source.num_samples, progress)
            write_warnings = clip_source.write_clip(source, target_path, blocks, overwrite=overwrite)
            inpainted, warnings, seconds = clip_inpainter.finish()
            return FileRepair(
                _gaps_in_seconds(inpainted, source.rate), warnings + write_warnings, clip_inpainter.av_offset_s, seconds,
                str(target_path), source.duration_s,
            )  # fmt: skip

    @contextlib.contextmanager
    def _open(self, clip: str | Path | Clip | Source, track: int | None) -> Iterator[Source]:
        """Any kind of clip as a Source. A Source passed in stays open; of it, and of a Clip, the track is chosen already."""
        from avsi_jax.media import clip_io, clip_source

        if not isinstance(clip, str | os.PathLike | clip_io.Clip | clip_source.Source):
            kind = type(clip).__name__
            raise ValueError(f"found a clip of type {kind}, expected a file name, or clip_of(samples, rate) for an array")
        if isinstance(clip, clip_source.Source | clip_io.Clip) and track is not None:
            raise ValueError(f"track {track}: expected a file name as the clip; choose the track where you open the clip")
        if isinstance(clip, clip_source.Source):
            yield clip
            return
        in_memory = isinstance(clip, clip_io.Clip)
        video = self.restorer.system.uses_video
        with clip_source.source_from_clip(clip) if in_memory else clip_source.open_source(clip, video=video, track=track) as source:
            yield source

    def _clip_inpainter(self, source: Source, gaps: Gaps, face: int | None, sync: Sync, streaming: bool = False) -> ClipInpainter:
        from avsi_jax.inpainting import clip_gaps, clip_inpainter
        from avsi_jax.media import clip_io

        if not source.num_samples:
            raise clip_io.MediaError(f"{source.path} has no audio; expected a clip with audio that has a gap")
        if isinstance(gaps, str):
            if gaps != "auto":
                raise ValueError(f"gaps {gaps!r}: expected (start, end) pairs in seconds, or 'auto'")
            spans = clip_gaps.detected_gaps(source)
        else:
            spans = clip_gaps.check_gaps(gaps, source.num_samples, source.rate, source.end_s)
        face_models = self._face_models(source) if self.restorer.system.uses_video else None
        return clip_inpainter.ClipInpainter(
            source, spans, self.restorer, face_models, self.measured, face=face, sync=sync, streaming=streaming
        )

    def _face_models(self, source: Source) -> FaceModels:
        from avsi_jax.face import landmarks, mouth_visibility
        from avsi_jax.inpainting import clip_inpainter

        with self._lock:
            if self._tracker is None and source.has_video and not source.is_still:
                self._tracker = landmarks.FaceTracker()
        return clip_inpainter.FaceModels(self._tracker, self._mouth_visible or mouth_visibility.mouth_visible, self._lock)


def _with_progress(
    blocks: Iterable[np.ndarray], num_samples: int, progress: Callable[[float], None] | None
) -> Iterator[np.ndarray]:
    """The same blocks; calls `progress` with the fraction done after each."""
    done = 0
    for block in blocks:
        yield block
        done += len(block)
        if progress:
            progress(done / num_samples)


def _gaps_in_seconds(inpainted: Iterable[InpaintedGap], rate: int) -> tuple[Gap, ...]:
    return tuple(Gap(start / rate, end / rate, *rest) for start, end, *rest in inpainted)


def _make_repair(clip_inpainter: ClipInpainter) -> Repair:
    """Runs what is left to do for a clip and collects the result."""
    import numpy as np

    from avsi_jax.media import channels

    source, masked = clip_inpainter.source, clip_inpainter.masked
    samples = np.concatenate(list(clip_inpainter.blocks()))
    inpainted, warnings, seconds = clip_inpainter.finish()
    masked_log_mel, restored_log_mel = None, None
    if source.duration_s <= MAX_LOG_MEL_S:
        known = masked.read_native(0, source.num_samples)
        weights = channels.downmix_weights(known)
        waveforms = np.stack([_mono_at_record_rate(x, source.rate, weights) for x in (known, samples)])
        masked_log_mel, restored_log_mel = _log_mels(waveforms)
    tracks = clip_inpainter.tracks
    tracked = tracks.all() if tracks else (None, None, None)
    seconds["all"] = time.perf_counter() - clip_inpainter.began
    return Repair(
        samples, source.rate, source.subtype, _gaps_in_seconds(inpainted, source.rate), warnings, masked_log_mel, restored_log_mel,
        _frame_s(), *tracked, clip_inpainter.av_offset_s, seconds, tracks.lag_s if tracks else None,
    )  # fmt: skip


def _frame_s() -> float:
    """Seconds from one frame of the log-mel spectrograms to the next."""
    from avsi_jax.presets import get

    return get("paper").hop / get("paper").rate


def _mono_at_record_rate(samples: np.ndarray, rate: int, weights: np.ndarray) -> np.ndarray:
    """(N, C) at `rate` -> (M,) at RECORD_RATE."""
    from avsi_jax.media import channels, clip_io
    from avsi_jax.presets import RECORD_RATE

    return clip_io.resample(channels.downmix(samples, weights), rate, RECORD_RATE)


def _log_mels(waveforms: np.ndarray) -> np.ndarray:
    """(B, N) at RECORD_RATE -> (B, F, 64) log-mel in dB, by the front end of the preset paper."""
    import numpy as np

    from avsi_jax.presets import RECORD_RATE, get

    spec, size = get("paper"), round(LOG_MEL_PAD_S * RECORD_RATE)
    while size < waveforms.shape[1]:
        size *= 2
    padded = np.pad(waveforms, ((0, 0), (0, size - waveforms.shape[1])))
    return np.asarray(_front_end()(padded))[:, : spec.frames_of(-(-waveforms.shape[1] // spec.decimation))]


@functools.cache
def _front_end() -> Callable:
    """The compiled function from waveforms to log-mel in dB."""
    import jax

    from avsi_jax.audio import stft
    from avsi_jax.presets import get

    spec = get("paper")
    return jax.jit(lambda x: stft.to_db(stft.log_mel(stft.decimate(x, spec), spec), spec))
