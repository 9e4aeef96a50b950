"""A clip's audio with its gaps set to zero: windows of it for the network, and restored windows back at the clip's own rate.

The gaps are set to zero at the clip's own rate before anything else reads the audio. Networks read one mono signal, usually the
mean of the channels (media/channels.py). The weights of the channels are chosen from the known audio within CONTEXT_S of a gap, so
that all windows of a gap read the same signal. Resampling in both directions includes the audio beside a segment and starts at
positions that both rates share, so a segment is the same however the clip is cut. Letters: N samples, C channels, G gaps.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from avsi_jax.media import channels, clip_io
from avsi_jax.presets import RECORD_RATE

if TYPE_CHECKING:
    from avsi_jax.media.clip_source import Source

GUARD = 32  # samples at RECORD_RATE beside a gap that resampling mixes with it: treated as part of the gap, never written
MARGIN = 800  # samples at RECORD_RATE read beside a segment for resampling: 50 ms, longer than the filter
PIECE_S = 60  # longest piece that is brought to the clip's rate at once
JOIN_S = 0.002  # within this time of an edge, restored audio is shifted to meet the known sample beside it
MAX_IN_MEMORY = 2**23  # samples at RECORD_RATE of restored audio, 9 min
MAX_AMPLITUDE = 1e6  # full scale is 1; larger values are not audio, and their squares overflow
BALANCE_S = (1.0, 5.0)  # around a gap, where the level of each channel is measured; the second if the first is silent
LEVEL_RANGE_DB = (-17.0, -5.0)  # of Grid's clips, by `speech_level`: networks know no other, and restore speech at such a level
MIN_SPEECH_RANGE_DB = 20.0  # from the pauses to the loudest frames; below this, as in Grid's own pauses, there is no speech
LITTLE_SPEECH_S, LITTLE_SPEECH_DB = 0.4, 12.0  # with less speech known, its loudest part is likely missing: assumed louder by up to
CONTEXT_S, FRAME = 5.0, 320  # around gaps, where the level of the speech is measured; samples at RECORD_RATE in a frame


class MaskedAudio:
    """A clip_source.Source whose gaps, `spans` of [start, end) in samples of its own rate, are zero.

    record_gaps: (G, 2), the gaps with their guards in samples at RECORD_RATE. length: of the audio, in the same samples.
    """

    def __init__(self, source: Source, spans: list[tuple[int, int]]):
        self.source, self.spans, self.rate = source, spans, source.rate
        self._starts, self._ends = np.asarray(spans, np.int64).reshape(-1, 2).T
        shared = math.gcd(self.rate, RECORD_RATE)
        self.native_unit, self.record_unit = self.rate // shared, RECORD_RATE // shared
        self.length = max(1, source.num_samples * RECORD_RATE // self.rate)
        scale = RECORD_RATE / self.rate
        guarded = [[int(a * scale) - GUARD, math.ceil(b * scale) + GUARD] for a, b in spans]
        self.record_gaps = np.asarray(guarded, np.int64).reshape(-1, 2).clip(0, self.length)

    def read_native(self, start: int, stop: int) -> np.ndarray:
        """(n, C), the masked samples [start, stop) at the clip's own rate, as many as exist.

        Raises MediaError if samples outside the gaps are not finite or larger than MAX_AMPLITUDE.
        """
        start, stop = (min(max(0, x), self.source.num_samples) for x in (start, stop))
        x = self.source.audio(start, stop)
        first, last = np.searchsorted(self._ends, start, "right"), np.searchsorted(self._starts, stop)
        for a, b in self.spans[first:last]:
            x[max(0, a - start) : max(0, b - start)] = 0.0
        if not (usable := np.abs(x) <= MAX_AMPLITUDE).all():
            at_s = (start + int(np.argmin(usable.all(1)))) / self.rate
            raise clip_io.MediaError(
                f"{self.source.path}: the audio has NaN or infinite samples, the first at {at_s:.3f} s; expected numbers up to "
                f"{MAX_AMPLITUDE:g}: mark that part as a gap too, or write the clip again"
            )
        return x

    def read_mono(self, first: int, count: int, weights: np.ndarray | None = None) -> np.ndarray:
        """(count,) float32 at RECORD_RATE from sample `first` on, 0 outside the clip: the mean of the channels, or their sum with
        `weights` (C,)."""
        unit = max(0, first - MARGIN) // self.record_unit
        stop = -(-(first + count + MARGIN) // self.record_unit)
        native = self.read_native(unit * self.native_unit, max(unit, stop) * self.native_unit)
        mono = clip_io.mono(native) if weights is None else channels.downmix(native, weights)
        return window_of(clip_io.resample(mono, self.rate, RECORD_RATE), first - unit * self.record_unit, count)

    def native_context(self, start: int, stop: int) -> np.ndarray:
        """(n, C), the clip's own samples around [start, stop) at RECORD_RATE, with the gaps zero."""
        scale = self.rate / RECORD_RATE
        return np.concatenate([self.read_native(round(a * scale), round(b * scale)) for a, b in _context(start, stop)])

    def gain(self, start: int, stop: int, weights: np.ndarray | None = None) -> float:
        """The factor that brings the speech around [start, stop) at RECORD_RATE to a level that networks were trained on."""
        known = []
        for a, b in _context(start, stop):
            audio, gaps = self.read_mono(a, b - a, weights), self.record_gaps - a
            for c, d in gaps[(gaps[:, 1] > 0) & (gaps[:, 0] < b - a)]:
                audio[max(0, c) : d] = 0.0
            known.append(audio)
        if (speech := speech_level(np.concatenate(known))) is None:
            return 1.0
        level, seconds = speech
        quietest = LEVEL_RANGE_DB[0] - LITTLE_SPEECH_DB * max(0.0, 1 - seconds / LITTLE_SPEECH_S)
        return float(10 ** ((np.clip(level, quietest, LEVEL_RANGE_DB[1]) - level) / 20))

    def restored_pieces(self, gap: int, restored: InpaintedSpan) -> Iterator[np.ndarray]:
        """(n, C) one after another: the restored samples of a gap at the clip's own rate, each channel as loud as beside it."""
        start, end = self.spans[gap]
        gains, size = self._channel_gains(start, end, restored.weights), PIECE_S * self.rate
        for at in range(start, end, size):
            stop = min(at + size, end)
            extended = self._to_native(at - 1, stop + 1, restored) * gains
            piece, join = extended[1:-1], math.ceil(JOIN_S * self.rate)
            for at_edge, known, side in ((at == start, start - 1, 1), (stop == end, end, -1)):
                beside = self.read_native(known, known + 1)
                if at_edge and known >= 0 and len(beside):
                    piece[::side][:join] += (beside[0] - extended[::side][0]) * _decay(join)[: len(piece)]
            yield piece

    def _to_native(self, start: int, stop: int, restored: InpaintedSpan) -> np.ndarray:
        """(stop - start, 1) at the clip's own rate: the mono signal with restored audio in the gap."""
        if self.rate == RECORD_RATE:
            return restored.overlaid_on(self.read_mono(start, stop - start, restored.weights), start)[:, None]
        margin = -(-MARGIN // self.record_unit)
        unit = max(0, start // self.native_unit - margin)
        last = -(-stop // self.native_unit) + margin
        first, count = unit * self.record_unit, (last - unit) * self.record_unit
        audio = restored.overlaid_on(self.read_mono(first, count, restored.weights), first)
        native = clip_io.resample(audio, RECORD_RATE, self.rate)
        return window_of(native, start - unit * self.native_unit, stop - start)[:, None]

    def _channel_gains(self, start: int, end: int, weights: np.ndarray | None) -> np.ndarray:
        """(C,), the gain of each channel over the mono signal, measured around the gap [start, end) in the clip's own samples."""
        equal = np.ones(self.source.channels, np.float32)
        for reach in (round(s * self.rate) for s in BALANCE_S):
            beside = np.concatenate([self.read_native(start - reach, start), self.read_native(end, end + reach)])
            if len(equal) > 1 and beside.any():
                return channels.channel_gains(beside, equal / len(equal) if weights is None else weights)
        return equal


class InpaintedSpan:
    """Restored audio for [start, end) in samples at RECORD_RATE; zero until it is written.

    weights: (C,) of the channels in the mono signal that it continues, as from channels.downmix_weights; None for their mean.
    """

    def __init__(self, start: int, end: int):
        self.start, self.samples, self.weights = start, _zeros(end - start), None

    def put(self, start: int, audio: np.ndarray) -> None:
        """Writes audio (n,) from sample `start` on."""
        self.samples[start - self.start : start - self.start + len(audio)] = audio

    def overlaid_on(self, audio: np.ndarray, first: int) -> np.ndarray:
        """A copy of `audio` (n,), which begins at sample `first`, with the restored samples in their place."""
        audio = audio.copy()
        a, b = (min(max(first, x), first + len(audio)) for x in (self.start, self.start + len(self.samples)))
        audio[a - first : b - first] = self.samples[a - self.start : b - self.start]
        return audio


def speech_level(audio: np.ndarray) -> tuple[float, float] | None:
    """(level in dB of full scale, seconds of speech) of audio (N,) at RECORD_RATE, or None if it has no speech.

    The level is the 98th percentile over frames; frames MIN_SPEECH_RANGE_DB above the pauses (15th percentile) count as speech.
    """
    power = np.square(audio[: len(audio) // FRAME * FRAME].reshape(-1, FRAME), dtype=np.float64).mean(1)
    power = power[power > 1e-9]  # the rest is masked or digital silence
    if not len(power):
        return None
    level = 10 * np.log10(power)
    pauses, loud = np.percentile(level, (15, 98))
    seconds = (level > pauses + MIN_SPEECH_RANGE_DB).sum() * FRAME / RECORD_RATE
    return (float(loud), float(seconds)) if loud - pauses > MIN_SPEECH_RANGE_DB else None


def _context(start: int, stop: int) -> list[tuple[int, int]]:
    """The parts measured around [start, stop) at RECORD_RATE; what is between them is included unless it is long."""
    reach = round(CONTEXT_S * RECORD_RATE)
    return [(start - reach, stop + reach)] if stop - start <= reach else [(start - reach, start), (stop, stop + reach)]


def _zeros(count: int) -> np.ndarray:
    """(count,) zeros: in memory, or for very long gaps in an unnamed temporary file."""
    if count <= MAX_IN_MEMORY:
        return np.zeros(count, np.float32)
    return np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=(count,))


def window_of(x: np.ndarray, first: int, count: int) -> np.ndarray:
    """(count,): x[first : first + count] of (N,), zero where that is outside x."""
    part = x[max(0, first) : max(0, first + count)]
    before = min(count, max(0, -first))
    return np.pad(part, (before, max(0, count - before - len(part))))


def _decay(count: int) -> np.ndarray:
    """(count, 1), half a cosine from almost 1 to almost 0."""
    return (0.5 + 0.5 * np.cos(np.pi * (np.arange(count) + 0.5) / count)).astype(np.float32)[:, None]
