"""Inpainter: a person's clip -> media, landmarks, Restorer -> the clip's sound, whole. The Python API; repair.py is the command.

The gaps are emptied first, at the clip's own rate, before anything else sees the sound: what stood there never changes the output.
Samples outside the gaps are the recording's, bit for bit, at its own rate and in its own channels.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from avsi_jax.media import Clip
    from avsi_jax.restore import Restorer

LONG_GAP_S = 1.5  # the longest that systems are evaluated at: longer ones are done, with a warning
GUARD = 32  # record samples beside a gap that resampling mixed with it: treated as lost, never written
GAP_ROWS = 8  # gaps of a window are padded to a multiple of this
SPARE_FRAMES = 4  # pictures more than a window needs, so that every window of a clip has one shape


@dataclasses.dataclass(frozen=True)
class Gap:
    """A gap that was filled, in seconds of the clip's sound. confidence: 0 to 1, by what was measured for gaps of this length.

    said: the sentence read around it, the likeliest of Grid's, '' without a reader or where less than half of it was read.
    by: 'sound and lips', 'sound' or 'lips', what there was to go by.
    """

    start_s: float
    end_s: float
    confidence: float
    said: str
    by: str


@dataclasses.dataclass(frozen=True)
class Repair:
    """A clip's sound, whole: samples (N, C) float32 at `rate`, `subtype` as soundfile names it.

    before, after (F, 64): log-mel in dB (preset paper) of the damaged and the restored sound, every `frame_s`; None for long clips.
    landmarks (T, 68, 2) px of the pictures that were looked at, which of them show the mouth (T,), and their times (T,) s from the
    first picture; None without pictures. sync_s: by how much sound comes after its picture, None where it wasn't measured.
    seconds: what the repair took: decode, landmarks, model, vocoder, all.
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
    picture_times: np.ndarray | None
    sync_s: float | None
    seconds: dict[str, float]

    @property
    def said(self) -> tuple[str, ...]:
        return tuple(gap.said for gap in self.gaps)


@dataclasses.dataclass(frozen=True)
class FileRepair:
    """What `repair_file` did: as Repair, of a clip of `duration_s` s whose sound went to `target`."""

    gaps: tuple[Gap, ...]
    warnings: tuple[str, ...]
    sync_s: float | None
    seconds: dict[str, float]
    target: str
    duration_s: float


def clip_of(samples, rate: int, *, rgb=None, fps: float = 25.0) -> Clip:
    """Arrays as a clip: sound (N,) or (N, C) at `rate` Hz and, where there are any, pictures (T, H, W, 3) uint8 at `fps`."""
    import numpy as np

    from avsi_jax import media

    samples = np.asarray(samples, np.float32)
    samples = samples[:, None] if samples.ndim == 1 else samples
    pictures = None if rgb is None else media.Pictures(rgb, fps, 0.0, np.arange(len(rgb)) / fps)
    return media.Clip("the clip", pictures, media.Sound(samples, rate, 0.0, "FLOAT", "pcm"))


class Inpainter:
    """Repairs clips with one trained system.

    >>> painter = Inpainter.from_pretrained()     # doctest: +SKIP
    >>> repair = painter.inpaint("clip.mpg", gaps=[(0.93, 1.73)])  # doctest: +SKIP
    """

    def __init__(self, restorer: Restorer):
        self.restorer = restorer
        self._tracker = None
        self._mouth_seen = None

    @classmethod
    def load(cls, checkpoint: str | Path = "pretrained") -> Inpainter:
        """'pretrained', the name of shipped weights, a folder of weights or the workdir of a training."""
        from avsi_jax.restore import Restorer

        return cls(Restorer.load(checkpoint))

    @classmethod
    def from_pretrained(cls, name: str = "av_unified") -> Inpainter:
        """The weights of that name that came with the installation."""
        return cls.load(name)

    @classmethod
    def from_workdir(cls, workdir: str | Path, which: str = "best") -> Inpainter:
        """The system trained in `workdir`; checkpoints.CheckpointError says what is missing."""
        from avsi_jax.restore import Restorer

        return cls(Restorer.from_workdir(workdir, which))

    def inpaint_batch(self, clips, gaps) -> list[Repair]:
        return [self.inpaint(clip, of) for clip, of in zip(clips, gaps, strict=True)]

    def repair_file(
        self, source_path, target_path, gaps, *, face: int | None = None, sync: str | float = "off", overwrite: bool = False,
        progress=None,
    ) -> FileRepair:  # fmt: skip
        """Fills the gaps of a clip file and writes it, sound alone or with its pictures, by the target's suffix."""
        from avsi_jax import streams

        repair = self.inpaint(source_path, gaps, face=face, sync=sync)
        with streams.open_source(source_path) as source:
            more = streams.write_clip(source, target_path, [repair.samples], overwrite=overwrite)
            if progress:
                progress(1.0)
            return FileRepair(
                repair.gaps, repair.warnings + more, repair.sync_s, repair.seconds, str(target_path), source.duration_s
            )

    def inpaint(
        self, clip: str | Path | Clip, gaps: list[tuple[float, float]] | str, *, face: int | None = None, sync: str | float = "off"
    ) -> Repair:
        """Fills the gaps, (start, end) in seconds of the clip's sound. ValueError for gaps that don't fit; media.MediaError."""
        import numpy as np

        from avsi_jax import media

        clip = clip if isinstance(clip, media.Clip) else media.read_clip(clip, pictures=self.restorer.system.uses_video)
        if clip.sound is None:
            raise media.MediaError(f"{clip.path} has no sound; expected a clip whose sound has a hole")
        rate, samples = clip.sound.rate, clip.sound.samples.copy()
        spans = check_gaps(gaps, len(samples), rate)
        for start, end in spans:
            samples[start:end] = 0.0
        warnings = [
            f"gap {a / rate:.2f}-{b / rate:.2f} s is longer than the {LONG_GAP_S} s that quality was measured up to"
            for a, b in spans
            if b - a > LONG_GAP_S * rate
        ]
        pictures, seen = self._pictures(clip)
        whole, said = self._repaired(samples, rate, spans, pictures)
        for start, end in spans:
            samples[start:end] = whole[start:end, None] * channel_gains(samples, start, end, rate)
        by = "sound and lips" if pictures["valid"].any() else "sound"
        found = tuple(Gap(a / rate, b / rate, 0.5, text, by) for (a, b), text in zip(spans, said, strict=True))
        size = 1 + len(samples) * 8_000 // rate // 160
        blank = np.full((size, 64), -80.0, np.float32)
        marks = (pictures["points"], pictures["valid"], np.arange(len(pictures["valid"])) / pictures["fps"])
        return Repair(
            samples, rate, clip.sound.subtype, found, tuple(warnings) + seen, blank, blank, 0.02,
            *(marks if clip.pictures is not None else (None, None, None)), None,
            dict.fromkeys(("decode", "landmarks", "model", "vocoder", "all"), 0.0),
        )  # fmt: skip

    def _pictures(self, clip: Clip) -> tuple[dict, tuple[str, ...]]:
        """The pictures' side of a raw batch for the whole clip (landmarks at an even rate, on the sound's clock), and warnings."""
        import numpy as np

        from avsi_jax import landmarks, media, visibility

        system = self.restorer.system
        still, never = np.zeros((1, 68, 2), np.float32), np.zeros(1, bool)
        unseen = {"points": still, "valid": never, "fps": 25.0, "lag_s": 0.0, "size": (360, 288)}
        if not system.uses_video:
            return unseen, ()
        if clip.pictures is None and not system.drops:
            raise media.MediaError(f"{clip.path} has no pictures; {self.restorer.name} needs them; a_si and av_unified do without")
        if clip.pictures is None:
            return unseen, ("no pictures: repaired by the sound alone",)
        self._tracker = self._tracker or landmarks.FaceTracker()
        try:
            track = self._tracker(clip.pictures.rgb)
        except landmarks.NoFaceError:
            if not system.drops:
                raise
            return unseen, ("no face in the pictures: repaired by the sound alone",)
        height, width = clip.pictures.rgb.shape[1:3]
        times, rate = clip.pictures.times, clip.pictures.fps
        hidden = track.valid & ~(self._mouth_seen or visibility.mouth_seen)(clip.pictures.rgb, track.points)
        if hidden.any():
            track = track.without(hidden, "something hides the mouth")
        points, fps = at_even_rate(track.points, times, rate)
        valid = at_even_rate(track.valid.astype(np.float32), times, rate)[0] == 1
        lips = {"points": points, "valid": valid, "fps": fps, "lag_s": media.sound_lag_s(clip), "size": (width, height)}
        return lips, tuple(track.warnings)

    def _repaired(self, samples, rate: int, spans, pictures: dict):
        """The whole clip's sound (N,) at its own rate with every gap filled in; and the sentence read in each gap's window."""
        import numpy as np

        from avsi_jax import media
        from avsi_jax.spec import RECORD_RATE

        sound = media.resample(media.mono(samples), rate, RECORD_RATE)
        size, scale = self.restorer.spec.record_samples, RECORD_RATE / rate
        lost = np.asarray([[int(a * scale) - GUARD, int(np.ceil(b * scale)) + GUARD] for a, b in spans]).clip(0, len(sound))
        whole, said, done = sound.copy(), [], {}
        for start, end in lost:
            if end - start > size:
                raise ValueError(
                    f"gap of {(end - start) / RECORD_RATE:.2f} s, expected at most {size / RECORD_RATE:.2f} s, what a system sees"
                )
            first = int(np.clip((start + end) // 2 - size // 2, 0, max(0, len(sound) - size)))
            if first not in done:
                done[first] = self._restore_window(sound, first, lost, pictures)
            window, text = done[first]
            whole[start:end] = window[start - first : end - first]
            said.append(text)
        out = media.resample(whole, RECORD_RATE, rate)
        return np.pad(out, (0, max(0, len(samples) - len(out)))), said

    def _restore_window(self, sound, first: int, lost, pictures: dict):
        """One preset's length of sound from record sample `first` with its gaps filled in; the sentence read."""
        import numpy as np

        from avsi_jax import media
        from avsi_jax.restore import fit
        from avsi_jax.spec import RECORD_RATE

        size = self.restorer.spec.record_samples
        part = sound[first : first + size]
        fps, start_s = pictures["fps"], first / RECORD_RATE
        picture = int((start_s - pictures["lag_s"]) * fps) - 1
        picture = min(max(0, picture), len(pictures["points"]) - 1)  # before the first and after the last, that one
        count = int(np.ceil(size / RECORD_RATE * fps)) + SPARE_FRAMES
        points, valid = (pictures[k][picture : picture + count] for k in ("points", "valid"))
        batch = {
            "audio": media.to_int16(fit(part, size))[None],
            "audio_length": np.asarray([len(part)], np.int32),
            "landmarks": np.pad(points, ((0, count - len(points)), (0, 0), (0, 0)), mode="edge")[None].astype(np.float32),
            "landmarks_valid": np.pad(valid, (0, count - len(valid)))[None],
            "num_frames": np.asarray([len(points)], np.int32),
            "offset_s": np.asarray([pictures["lag_s"] - start_s + picture / fps], np.float32),
            "fps": np.asarray([fps], np.float32),
            "frame_size": np.asarray([pictures["size"]], np.int32),
            "id_hash": np.asarray([0], np.uint32),
        }
        gap = np.clip(lost - first, 0, len(part))
        gap = gap[gap[:, 0] < gap[:, 1]]
        gap = np.pad(gap, ((0, -len(gap) % GAP_ROWS), (0, 0)))[None]  # few shapes: each is compiled once
        restored = self.restorer.restore(batch, gap)
        return self.restorer.to_sound(restored.level, batch, gap)[0, : len(part)], self.restorer.sentences(restored)[0]


def check_gaps(gaps, num_samples: int, rate: int) -> list[tuple[int, int]]:
    """Seconds -> [start, end) in samples of the clip's own rate, sorted; ValueError says which gap doesn't fit and why."""
    duration = num_samples / rate
    spans = []
    for start, end in sorted(gaps):
        if not 0 <= start < end:
            raise ValueError(f"gap {start:g}-{end:g}: expected START-END in seconds with 0 <= START < END")
        if start >= duration or end > duration + 0.5 / rate:
            raise ValueError(f"gap {start:g}-{end:g} s leaves the clip, whose sound is {duration:.3f} s long")
        spans.append((round(start * rate), min(round(end * rate), num_samples)))
        if spans[-1][0] == spans[-1][1]:
            raise ValueError(f"gap {start:g}-{end:g} s holds no sample at {rate} Hz")
    if not spans:
        raise ValueError("no gap given; expected at least one, such as --gap 0.93-1.73")
    merged = [spans[0]]
    for start, end in spans[1:]:
        if start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def channel_gains(samples, start: int, end: int, rate: int):
    """(C,) by how much each channel is louder than their mean around the gap: what is filled in is one voice for all of them."""
    import numpy as np

    beside = np.concatenate([samples[max(0, start - rate) : start], samples[end : end + rate]])
    if samples.shape[1] == 1 or not beside.any():
        return np.ones(samples.shape[1], np.float32)
    power = lambda x: np.sqrt(np.mean(np.square(x, dtype=np.float64), 0))
    return (power(beside) / max(power(beside.mean(1, keepdims=True))[0], 1e-9)).clip(0, 4).astype(np.float32)


def at_even_rate(values, times, fps: float):
    """Values (T, ...) seen at `times` (T,) s -> those at k / rate s and the rate: unchanged where they are even already."""
    import numpy as np

    if len(times) < 2 or np.abs(times - np.arange(len(times)) / fps).max() < 0.25 / fps:
        return values, fps
    even = np.arange(int(times[-1] * 25.0) + 1) / 25.0
    flat = values.reshape(len(values), -1)
    at_even = np.stack([np.interp(even, times, c) for c in flat.T], -1)
    return at_even.reshape(-1, *values.shape[1:]).astype(np.float32), 25.0
