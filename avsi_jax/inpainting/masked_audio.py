"""A clip's sound with its gaps emptied, and back: stretches of it as networks hear them, and what was filled in at the clip's rate.

The gaps are emptied at the clip's own rate before anything else sees the sound. Networks hear one sound, mostly the mean of the
channels (media/channels.py); what is known within AROUND_S of a gap settles which, so that all its windows hear the same. Both ways a
stretch is resampled with what lies beside it, on a raster that both rates share, so that it is the same sound however the clip is
cut.
"""

from __future__ import annotations

import math
import tempfile

import numpy as np

from avsi_jax.media import channels, clip_io
from avsi_jax.presets import RECORD_RATE

GUARD = 32  # record samples beside a gap that resampling mixed with it: treated as lost, never written
MARGIN = 800  # record samples beside a stretch that its resampling hears: 50 ms, more than the filter's length
PIECE_S = 60  # what is brought to the clip's rate at once
JOINT_S = 0.002  # within which a fill's edge comes from the sample beside it
IN_MEMORY = 2**23  # record samples of a fill, 9 min
LOUDEST = 1e6  # full scale is 1; beyond this a number is no sound, and squares of it overflow
BESIDE_S = (1.0, 5.0)  # around a gap, for how loud the channels are; the second where nothing is heard in the first
LOUD_DB = (-17.0, -5.0)  # of Grid's clips, by `voice`: networks know no other, and fill in as loud as that
VOICE_DB = 20.0  # from the rests to the loudest; where it is less, as in Grid's rests themselves, no voice is taken to be heard
LITTLE_S, LITTLE_DB = 0.4, 12.0  # of less voice than this the loudest was likely lost: none of it heard, it is louder by so much
AROUND_S, FRAME = 5.0, 320  # of the sound around gaps that tells how loud it is; record samples of a frame


class MaskedAudio:
    """A clip_source.Source whose gaps, `spans` of [start, end) in samples of its own rate, are silent.

    lost (G, 2): the gaps in record samples, with their guards; length: of the sound in record samples.
    """

    def __init__(self, source, spans: list[tuple[int, int]]):
        self.source, self.spans, self.rate = source, spans, source.rate
        self._starts, self._ends = np.asarray(spans, np.int64).reshape(-1, 2).T
        shared = math.gcd(self.rate, RECORD_RATE)
        self.own_unit, self.record_unit = self.rate // shared, RECORD_RATE // shared
        self.length = max(1, source.num_samples * RECORD_RATE // self.rate)
        scale = RECORD_RATE / self.rate
        missing = [[int(a * scale) - GUARD, math.ceil(b * scale) + GUARD] for a, b in spans]
        self.missing = np.asarray(missing, np.int64).reshape(-1, 2).clip(0, self.length)

    def own(self, start: int, stop: int) -> np.ndarray:
        """(n, C) of the clip's own samples, as many of [start, stop) as it has; MediaError where they are not finite."""
        start, stop = (min(max(0, x), self.source.num_samples) for x in (start, stop))
        x = self.source.audio(start, stop)
        from_, to = np.searchsorted(self._ends, start, "right"), np.searchsorted(self._starts, stop)
        for a, b in self.spans[from_:to]:
            x[max(0, a - start) : max(0, b - start)] = 0.0
        if not (audio := np.abs(x) <= LOUDEST).all():
            at = (start + int(np.argmin(audio.all(1)))) / self.rate
            raise clip_io.MediaError(
                f"{self.source.path}: the sound holds NaN or infinite samples, the first at {at:.3f} s; expected numbers up to "
                f"{LOUDEST:g}: name that stretch as a gap too, or write the clip anew"
            )
        return x

    def record(self, first: int, count: int, weights: np.ndarray | None = None) -> np.ndarray:
        """(count,) float32 at RECORD_RATE from record sample `first` on, 0 beyond the clip: the channels' mean, or by `weights`."""
        unit = max(0, first - MARGIN) // self.record_unit
        stop = -(-(first + count + MARGIN) // self.record_unit)
        own = self.own(unit * self.own_unit, max(unit, stop) * self.own_unit)
        mono = clip_io.mono(own) if weights is None else channels.one(own, weights)
        return window_of(clip_io.resample(mono, self.rate, RECORD_RATE), first - unit * self.record_unit, count)

    def known(self, start: int, stop: int) -> np.ndarray:
        """(n, C) of the clip's own samples around record samples [start, stop), however many these are; the lost are silent."""
        scale = self.rate / RECORD_RATE
        return np.concatenate([self.own(round(a * scale), round(b * scale)) for a, b in _around(start, stop)])

    def gain(self, start: int, stop: int, weights: np.ndarray | None = None) -> float:
        """What the sound around record samples [start, stop) is to be multiplied by, to be as loud as networks know it."""
        known = []
        for a, b in _around(start, stop):
            audio, missing = self.record(a, b - a, weights), self.missing - a
            for c, d in missing[(missing[:, 1] > 0) & (missing[:, 0] < b - a)]:
                audio[max(0, c) : d] = 0.0
            known.append(audio)
        if (heard := voice(np.concatenate(known))) is None:
            return 1.0
        level, seconds = heard
        quietest = LOUD_DB[0] - LITTLE_DB * max(0.0, 1 - seconds / LITTLE_S)
        return float(10 ** ((np.clip(level, quietest, LOUD_DB[1]) - level) / 20))

    def pieces(self, gap: int, fill: InpaintedSpan):
        """(n, C) one after another, the own samples of a gap: the fill, as loud in each channel as that is around the gap."""
        start, end = self.spans[gap]
        gains, size = self._gains(start, end, fill.weights), PIECE_S * self.rate
        for at in range(start, end, size):
            stop = min(at + size, end)
            made = self._to_own(at - 1, stop + 1, fill) * gains
            piece, joint = made[1:-1], math.ceil(JOINT_S * self.rate)
            for edge, known, side in ((at == start, start - 1, 1), (stop == end, end, -1)):
                beside = self.own(known, known + 1)
                if edge and known >= 0 and len(beside):
                    piece[::side][:joint] += (beside[0] - made[::side][0]) * _decay(joint)[: len(piece)]
            yield piece

    def _to_own(self, start: int, stop: int, fill: InpaintedSpan) -> np.ndarray:
        """(stop - start, 1) of the clip's own rate: the sound at RECORD_RATE with a fill in its place."""
        if self.rate == RECORD_RATE:
            return fill.laid_over(self.record(start, stop - start, fill.weights), start)[:, None]
        margin = -(-MARGIN // self.record_unit)
        unit = max(0, start // self.own_unit - margin)
        last = -(-stop // self.own_unit) + margin
        first, count = unit * self.record_unit, (last - unit) * self.record_unit
        audio = fill.laid_over(self.record(first, count, fill.weights), first)
        own = clip_io.resample(audio, RECORD_RATE, self.rate)
        return window_of(own, start - unit * self.own_unit, stop - start)[:, None]

    def _gains(self, start: int, end: int, weights: np.ndarray | None) -> np.ndarray:
        """(C,) what is filled in is one voice for all: by what each channel holds it around the gap."""
        alike = np.ones(self.source.channels, np.float32)
        for reach in (round(s * self.rate) for s in BESIDE_S):
            beside = np.concatenate([self.own(start - reach, start), self.own(end, end + reach)])
            if len(alike) > 1 and beside.any():
                return channels.gains(beside, alike / len(alike) if weights is None else weights)
        return alike


class InpaintedSpan:
    """What was made up for [start, end) in record samples; silence at first. weights (C,): of the sound that it goes on from, as
    channels.weights_of; None is their mean."""

    def __init__(self, start: int, end: int):
        self.start, self.samples, self.weights = start, _room(end - start), None

    def put(self, start: int, audio: np.ndarray) -> None:
        self.samples[start - self.start : start - self.start + len(audio)] = audio

    def laid_over(self, audio: np.ndarray, first: int) -> np.ndarray:
        """A sound (n,) from record sample `first` on with the fill in its place."""
        audio = audio.copy()
        a, b = (min(max(first, x), first + len(audio)) for x in (self.start, self.start + len(self.samples)))
        audio[a - first : b - first] = self.samples[a - self.start : b - self.start]
        return audio


def voice(audio: np.ndarray) -> tuple[float, float] | None:
    """Of a sound (N,) at RECORD_RATE: where the loudest 2 % of its frames begin, dB of full scale, and how many seconds of it lie
    VOICE_DB above its rests; None where no voice is heard."""
    power = np.square(audio[: len(audio) // FRAME * FRAME].reshape(-1, FRAME), dtype=np.float64).mean(1)
    power = power[power > 1e-9]  # others are lost
    if not len(power):
        return None
    level = 10 * np.log10(power)
    rest, loud = np.percentile(level, (15, 98))
    seconds = (level > rest + VOICE_DB).sum() * FRAME / RECORD_RATE
    return (float(loud), float(seconds)) if loud - rest > VOICE_DB else None


def _around(start: int, stop: int) -> list[tuple[int, int]]:
    """What is listened to around record samples [start, stop): with what lies between, where that is not long."""
    reach = round(AROUND_S * RECORD_RATE)
    return [(start - reach, stop + reach)] if stop - start <= reach else [(start - reach, start), (stop, stop + reach)]


def _room(count: int) -> np.ndarray:
    """(count,) zeros: in memory, of very long gaps in an unnamed temporary file."""
    if count <= IN_MEMORY:
        return np.zeros(count, np.float32)
    return np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=(count,))


def window_of(x: np.ndarray, first: int, count: int) -> np.ndarray:
    """(count,): x[first : first + count] of (N,), with zeros for what lies outside."""
    part = x[max(0, first) : max(0, first + count)]
    before = min(count, max(0, -first))
    return np.pad(part, (before, max(0, count - before - len(part))))


def _decay(count: int) -> np.ndarray:
    """(count, 1) from almost 1 to almost 0: half a cosine."""
    return (0.5 + 0.5 * np.cos(np.pi * (np.arange(count) + 0.5) / count)).astype(np.float32)[:, None]
