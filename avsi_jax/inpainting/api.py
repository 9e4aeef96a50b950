"""Inpainter: a person's clip -> media, landmarks, Restorer -> the clip's sound, whole. The Python API; inpainting/cli.py is the command.

The gaps are emptied first, at the clip's own rate, before anything else sees the sound: what stood there never changes the output.
Samples outside the gaps are the recording's, bit for bit, at its own rate and in its own channels. Only windows around the gaps are
decoded, looked at and restored (inpainting/clip_inpainter.py), so a clip may be of any length. An Inpainter may be used from several threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

    from avsi_jax.inference.restorer import Restorer
    from avsi_jax.inpainting.clip_inpainter import ClipInpainter, FaceModels
    from avsi_jax.media.clip_io import Clip
    from avsi_jax.media.clip_source import Source

    Gaps = Sequence[tuple[float, float]] | Literal["auto"]
    Step = Literal["off", "auto"] | float

LONGEST_MEL_S = 60.0  # clips for which `before` and `after` are made
MEL_S = 3.0  # sound is filled up to this, twice this, ... for them: few shapes, each compiled once


@dataclasses.dataclass(frozen=True)
class Gap:
    """A gap that was filled, in seconds of the clip's sound. confidence: 0 to 1, by what was measured for gaps of this length.

    said: the sentence read around it, the likeliest of Grid's, '' without a reader or where less than half of it was read.
    by: 'sound and lips', 'sound' or 'lips', what there was to go by.
    """

    start_s: float
    end_s: float
    confidence: float
    transcript: str
    by: str


@dataclasses.dataclass(frozen=True)
class Repair:
    """A clip's sound, whole: samples (N, C) at `rate`, float32 (float64 of 32-bit and double files), `subtype` as soundfile
    names it.

    before, after (F, 64): log-mel in dB (preset paper) of the damaged and the restored sound, every `frame_s`; None for long clips.
    landmarks (T, 68, 2) px of the pictures that were looked at, which of them show the mouth (T,), and their times (T,) s from the
    first picture; None without pictures. sync_s: by how much sound comes after its picture, None where it wasn't measured.
    seconds: what the repair took: decode, landmarks, model, vocoder, all. lag_s: the lips seen at t were taken for what is heard
    at t + lag_s, None without pictures; it holds sync_s only where the step was corrected.
    """

    samples: np.ndarray
    rate: int
    subtype: str
    gaps: tuple[Gap, ...]
    warnings: tuple[str, ...]
    before: np.ndarray | None
    after: np.ndarray | None
    frame_s: float
    landmarks: np.ndarray | None
    landmarks_valid: np.ndarray | None
    frame_times: np.ndarray | None
    av_offset_s: float | None
    seconds: dict[str, float]
    lag_s: float | None = None

    @property
    def transcript(self) -> tuple[str, ...]:
        return tuple(gap.transcript for gap in self.gaps)


@dataclasses.dataclass(frozen=True)
class FileRepair:
    """What `repair_file` did: as Repair, of a clip of `duration_s` s whose sound went to `target`."""

    gaps: tuple[Gap, ...]
    warnings: tuple[str, ...]
    av_offset_s: float | None
    seconds: dict[str, float]
    target: str
    duration_s: float


def clip_of(samples, rate: int, *, rgb=None, fps: float = 25.0) -> Clip:
    """Arrays as a clip: sound (N,) or (N, C), floats in [-1, 1] or integers of any width, at `rate` Hz and, where there are any,
    pictures (T, H, W, 3) uint8 at `fps`, which begin with the sound. ValueError for other shapes.
    """
    import numpy as np

    from avsi_jax.media import clip_io

    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fi":
        raise ValueError(f"found sound of shape {samples.shape} {samples.dtype}, expected (N,) or (N, C) of floats or integers")
    if samples.dtype.kind == "i":
        samples = samples / float(2 ** (8 * samples.dtype.itemsize - 1))
    samples = np.asarray(samples.reshape(len(samples), -1), np.float32)
    if not (rate == int(rate) and rate > 0 and fps > 0):
        raise ValueError(f"found {rate} Hz and {fps} pictures a second, expected a whole number of hertz, both above 0")
    video = None
    if rgb is not None:
        rgb = np.asarray(rgb)
        if rgb.ndim != 4 or rgb.shape[-1] != 3 or rgb.dtype != np.uint8 or not rgb.size:
            raise ValueError(f"found pictures of shape {rgb.shape} {rgb.dtype}, expected (T, H, W, 3) uint8")
        video = clip_io.Video(rgb, float(fps), 0.0, np.arange(len(rgb)) / fps)
    return clip_io.Clip("the clip", video, clip_io.Audio(samples, int(rate), 0.0, "FLOAT", "arrays"))


class Inpainter:
    """Repairs clips with one trained system.

    >>> painter = Inpainter.from_pretrained()     # doctest: +SKIP
    >>> repair = painter.inpaint("clip.mpg", gaps=[(0.93, 1.73)])  # doctest: +SKIP

    Arrays do as well. Here a network nobody trained, and a tone with 300 ms missing:

    >>> import numpy as np, configs
    >>> from avsi_jax import experiment, restore
    >>> config = configs.load("tiny", [("system", "a_si"), ("units", "4")])
    >>> painter = Inpainter(restorer.Restorer(config, build.init_params(config), step=0))
    >>> tone = 0.1 * np.sin(2 * np.pi * 220 * np.arange(32_000) / 16_000)
    >>> repair = painter.inpaint(clip_of(tone, 16_000), gaps=[(0.9, 1.2)])
    >>> repair.samples.shape, repair.rate, repair.after.shape
    ((32000, 1), 16000, (101, 64))
    >>> bool((repair.samples[:14_400, 0] == np.float32(tone[:14_400])).all())
    True
    >>> repair.gaps[0].end_s, repair.gaps[0].by
    (1.2, 'sound')
    """

    def __init__(self, restorer: Restorer, measured: Mapping | None = None):
        """measured: facts['measured'] of its weights, what `Gap.confidence` is taken from."""
        from avsi_jax.runtime import compilation_cache

        compilation_cache.keep()
        self.restorer = restorer
        self.measured = measured or {}
        self._tracker = None
        self._mouth_seen = None
        self._lock = threading.Lock()

    @classmethod
    def load(cls, checkpoint: str | Path = "pretrained") -> Inpainter:
        """'pretrained', the name of shipped weights, a folder of weights or the workdir of a training; ValueError says what is
        missing."""
        from avsi_jax.inference import weights
        from avsi_jax.runtime import compilation_cache

        compilation_cache.keep()
        if folder := weights.locate(checkpoint):
            return cls._of_weights(folder)
        return cls.from_workdir(checkpoint)

    @classmethod
    def _of_weights(cls, folder: Path) -> Inpainter:
        from avsi_jax.inference import weights
        from avsi_jax.inference.restorer import Restorer

        held = weights.read(folder)
        return cls(Restorer.of_run(held.run, folder, "waveform"), held.facts.get("measured"))

    @classmethod
    def from_pretrained(cls, name: str = "av_unified") -> Inpainter:
        """The weights of that name that came with the installation; ValueError names those there are."""
        from avsi_jax.inference import weights

        return cls._of_weights(weights.find(name))

    @classmethod
    def from_workdir(cls, workdir: str | Path, which: str = "best") -> Inpainter:
        """The system trained in `workdir`; checkpoints.CheckpointError says what is missing."""
        from avsi_jax.inference.restorer import Restorer
        from avsi_jax.runtime import compilation_cache

        compilation_cache.keep()
        return cls(Restorer.from_workdir(workdir, which))

    def inpaint(self, clip: str | Path | Clip | Source, gaps: Gaps, *, face: int | None = None, sync: Step = "off") -> Repair:
        """Fills the gaps, (start, end) in seconds of the clip's sound, or with 'auto' the holes that are found in it.

        face: which of several, from 0 at the left; the largest without it. sync: 'auto' corrects sound and pictures that are out
        of step where that is certain; seconds by which the sound comes later than the clip says are taken as they are.
        ValueError for gaps that don't fit, or where there is nothing to go by; clip_io.MediaError for a clip that can't be read, has
        no sound, or lacks the pictures that the system needs; landmarks.NoFaceError where it needs a face.
        """
        with self._opened(clip) as source:
            inpainter = self._inpainter(source, gaps, face, sync)
            inpainter.begin()
            return _repair_of(inpainter)

    def inpaint_batch(
        self, clips: Sequence[str | Path | Clip | Source], gaps: Sequence[Gaps], *, face: int | None = None, sync: Step = "off"
    ) -> list[Repair]:
        """`inpaint` of several clips, each with its own gaps; their windows go through the network together.

        What the other clips are changes nothing, to the bit. How many there are does, by rounding alone: 1, 2, 4 or 8 windows are
        a program each, which adds in another order; levels move by 0.001 dB, and of that the vocoder, which goes round in 30
        steps, makes up to 0.002 of full scale inside the gaps. Outside them nothing moves.
        """
        from avsi_jax.inpainting import window_inpainter

        with contextlib.ExitStack() as stack:
            sources = [stack.enter_context(self._opened(clip)) for clip in clips]
            all_of_them = [self._inpainter(source, of, face, sync) for source, of in zip(sources, gaps, strict=True)]
            for inpainter in all_of_them:
                inpainter.begin()
            shared = {"model": 0.0, "vocoder": 0.0}
            window_inpainter.run(self.restorer, [f for inpainter in all_of_them for f in inpainter.window_inpainters], shared)
            for inpainter in all_of_them:  # what the network took is shared out evenly
                for key, seconds in shared.items():
                    inpainter.seconds[key] += seconds / len(all_of_them)
            return [_repair_of(inpainter) for inpainter in all_of_them]

    def inpaint_file(
        self, source_path: str | Path, target_path: str | Path, gaps: Gaps, *, face: int | None = None, sync: Step = "off",
        overwrite: bool = False, progress: Callable[[float], None] | None = None,
    ) -> FileRepair:  # fmt: skip
        """Fills the gaps of a clip file of any length and writes it, in memory that doesn't grow with it.

        The target's suffix says as what: .wav .flac the sound alone, .mp4 .mkv .mov .mpg with the source's pictures as they are.
        progress is called with the share done, 0..1. As `inpaint`, and FileExistsError where the target is there already.
        """
        from avsi_jax.media import clip_io, clip_source

        began = time.perf_counter()
        video_file = Path(target_path).suffix.lower() not in clip_io.AUDIO_SUFFIXES
        if Path(target_path).exists() and not overwrite:
            raise FileExistsError(f"{target_path} exists; take overwrite (--overwrite) to replace it, or another name")
        with clip_source.open_source(source_path, video=video_file or self.restorer.system.uses_video) as source:
            opened = time.perf_counter() - began
            inpainter = self._inpainter(source, gaps, face, sync, forgets=True)
            inpainter.seconds["decode"] += opened
            inpainter.began = began
            inpainter.begin()
            blocks = _told(inpainter.blocks(), source.num_samples, progress)
            more = clip_source.write_clip(source, target_path, blocks, overwrite=overwrite)
            filled, warnings, seconds = inpainter.finish()
            told = _gaps_of(filled, source.rate)
            return FileRepair(told, warnings + more, inpainter.av_offset_s, seconds, str(target_path), source.duration_s)

    @contextlib.contextmanager
    def _opened(self, clip) -> Iterator[Source]:
        """Any kind of clip as a source; one that was given open stays open."""
        from avsi_jax.media import clip_io, clip_source

        if isinstance(clip, clip_source.Source):
            yield clip
            return
        in_memory = isinstance(clip, clip_io.Clip)
        video = self.restorer.system.uses_video
        with clip_source.source_of(clip) if in_memory else clip_source.open_source(clip, video=video) as source:
            yield source

    def _inpainter(self, source: Source, gaps, face, sync, forgets: bool = False) -> ClipInpainter:
        from avsi_jax.inpainting import clip_inpainter
        from avsi_jax.media import clip_io

        if not source.num_samples:
            raise clip_io.MediaError(f"{source.path} has no sound; expected a clip whose sound has a hole")
        if isinstance(gaps, str):
            if gaps != "auto":
                raise ValueError(f"gaps {gaps!r}: expected (start, end) pairs in seconds, or 'auto'")
            spans = clip_inpainter.detected_gaps(source)
        else:
            spans = clip_inpainter.check_gaps(gaps, source.num_samples, source.rate)
        face_models = self._face_models(source) if self.restorer.system.uses_video else None
        return clip_inpainter.ClipInpainter(
            source, spans, self.restorer, face_models, self.measured, face=face, step=sync, forgets=forgets
        )

    def _face_models(self, source: Source) -> FaceModels:
        from avsi_jax.face import landmarks, mouth_visibility
        from avsi_jax.inpainting import clip_inpainter

        with self._lock:
            if self._tracker is None and source.has_video:
                self._tracker = landmarks.FaceTracker()
        return clip_inpainter.FaceModels(self._tracker, self._mouth_seen or mouth_visibility.mouth_seen, self._lock)


def _told(blocks, num_samples: int, progress):
    """The same blocks; tells progress after each."""
    done = 0
    for block in blocks:
        yield block
        done += len(block)
        if progress:
            progress(done / num_samples)


def _gaps_of(filled, rate: int) -> tuple[Gap, ...]:
    return tuple(Gap(start / rate, end / rate, *more) for start, end, *more in filled)


def _repair_of(inpainter: ClipInpainter) -> Repair:
    import numpy as np

    from avsi_jax.media import channels

    source, masked = inpainter.source, inpainter.masked
    samples = np.concatenate(list(inpainter.blocks()))
    filled, warnings, seconds = inpainter.finish()
    before, after = (None, None)
    if source.duration_s <= LONGEST_MEL_S:
        known = masked.own(0, source.num_samples)
        weights = channels.weights_of(known)
        before, after = _mels(np.stack([_mono(x, source.rate, weights) for x in (known, samples)]))
    tracks = inpainter.tracks
    seen = tracks.all() if tracks else (None, None, None)
    seconds["all"] = time.perf_counter() - inpainter.began
    return Repair(
        samples, source.rate, source.subtype, _gaps_of(filled, source.rate), warnings, before, after, _frame_s(), *seen,
        inpainter.av_offset_s, seconds, tracks.lag_s if tracks else None,
    )  # fmt: skip


def _frame_s() -> float:
    from avsi_jax.presets import get

    return get("paper").hop / get("paper").rate


def _mono(samples, rate: int, weights):
    """(N, C) -> (N',) at RECORD_RATE."""
    from avsi_jax.media import channels, clip_io
    from avsi_jax.presets import RECORD_RATE

    return clip_io.resample(channels.one(samples, weights), rate, RECORD_RATE)


def _mels(waveforms) -> np.ndarray:
    """(B, N) at RECORD_RATE -> (B, F, 64) log-mel in dB, by the paper's front end."""
    import numpy as np

    from avsi_jax.presets import RECORD_RATE, get

    spec, room = get("paper"), round(MEL_S * RECORD_RATE)
    while room < waveforms.shape[1]:
        room *= 2
    filled_up = np.pad(waveforms, ((0, 0), (0, room - waveforms.shape[1])))
    return np.asarray(_front_end()(filled_up))[:, : spec.frames_of(-(-waveforms.shape[1] // spec.decimation))]


@functools.cache
def _front_end():
    import jax

    from avsi_jax.audio import stft
    from avsi_jax.presets import get

    spec = get("paper")
    return jax.jit(lambda x: stft.to_db(stft.log_mel(stft.decimate(x, spec), spec), spec))
