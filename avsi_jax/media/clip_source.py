"""Clip files of any length, piece by piece: sound and pictures of a stretch of time in, a clip with new sound out.

What comes out of a Source is what clip_io.read_clip gives, bit for bit, in memory that does not grow with the clip: sound files are
read where it is asked for; a video's sound is decoded once, when it is opened, into an unnamed temporary file; its pictures are
decoded from a key picture before the stretch. Times are seconds, sound is counted in samples of the clip's own rate.
Writing is media/muxing.py's; its write_clip is offered here too.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from avsi_jax.media import clip_io
from avsi_jax.media.muxing import write_clip as write_clip

IN_MEMORY = 32 * 2**20  # bytes of decoded sound; what is longer lies on the disk
MOST_BYTES = 2**30  # of pictures asked for at once, decoded
FIRST_FRAMES = 17  # decoders put pictures in order over at most 16: the earliest of these is the first
LATE_S = 0.5  # decoding goes on this long after a stretch, for pictures that come out of order


class Source:
    """A clip to read pieces of; a context manager. `path`, of the sound `rate` (Hz), `channels`, `num_samples`, `subtype`,
    `codec`, of the pictures `has_pictures`, `fps`, `size` (width, height), and `lag_s`, as clip_io.sound_lag_s.

    A clip without sound has rate, channels and num_samples 0; one without pictures fps 0 and size (0, 0).
    `sound_start_s` and `picture_start_s` are times in the container.
    """

    def __init__(self, path, audio: clip_io.Audio | None, video_file):
        """`sound.samples` and `film` are stores, such as _Spool and _Film."""
        self.path, self._film = str(path), video_file
        self._store = audio.samples if audio else _Samples(np.zeros((0, 0), np.float32))
        self.channels, self.num_samples = self._store.channels, self._store.num_samples
        self.rate, self.audio_start_s = (audio.rate, audio.start_s) if audio else (0, 0.0)
        self.subtype, self.codec = (audio.subtype, audio.codec) if audio else ("PCM_16", "")
        self.has_video = video_file is not None
        self.fps, self.size, self.video_start_s = (
            (video_file.fps, video_file.size, video_file.start_s) if video_file else (0.0, (0, 0), 0.0)
        )
        self.lag_s = clip_io.lag_between(video_file.start_s, audio, self.num_samples) if video_file and audio else 0.0

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._store.close()

    @property
    def duration_s(self) -> float:
        """Of the sound."""
        return self.num_samples / self.rate if self.rate else 0.0

    def audio(self, start: int, stop: int) -> np.ndarray:
        """Samples [start, stop) -> (n, C) float32, float64 of a sound file of PCM_32 or DOUBLE; ValueError outside the clip."""
        if not 0 <= start <= stop <= self.num_samples:
            raise ValueError(f"{self.path}: samples {start} to {stop} asked for, expected a stretch of 0 to {self.num_samples}")
        return self._store.read(start, stop)

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first sample, (n, C)) one after another, n = size but in the last."""
        for start in range(0, self.num_samples, size):
            yield start, self.audio(start, min(start + size, self.num_samples))

    def video(self, start_s: float, end_s: float) -> clip_io.Video:
        """Those with start_s <= time < end_s, seconds from the file's first picture, as `times` are; start_s is the file's.

        MediaError where there are none in the file, or those asked for take more than MOST_BYTES.
        """
        if self._film is None:
            raise clip_io.MediaError(f"{self.path}: has no pictures; expected a video clip")
        return self._film.read(start_s, end_s)


def open_source(path, *, video: bool = True) -> Source:
    """Opens a clip file; reads it through once. Raises what clip_io.read_clip raises."""
    file = clip_io.check_file(path)
    return _open_audio(file) if file.suffix.lower() in clip_io.AUDIO_SUFFIXES else _open_video(file, video)


def source_of(clip: clip_io.Clip) -> Source:
    """A clip in memory as a Source."""
    audio = clip.audio and clip_io.Audio(
        _Samples(clip.audio.samples), clip.audio.rate, clip.audio.start_s, clip.audio.subtype, clip.audio.codec
    )
    return Source(clip.path, audio, clip.video and _VideoInMemory(clip.video))


# ---- sound -----------------------------------------------------------------------------------------------------------------------


class _Samples:
    """A sound in memory."""

    def __init__(self, samples: np.ndarray):
        self.samples, (self.num_samples, self.channels) = samples, samples.shape

    def read(self, start, stop):
        return self.samples[start:stop].copy()

    def close(self):
        pass


class _Spool:
    """A sound that was decoded: float32 in memory, in an unnamed temporary file where it is long. Takes a list's place."""

    def __init__(self):
        self.num_parts = self.num_samples = self.channels = 0
        self.file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115  close() closes it

    def __len__(self):
        return self.num_parts

    def append(self, part: np.ndarray):
        self.file.write(np.ascontiguousarray(part, np.float32).tobytes())
        self.num_parts, self.num_samples, self.channels = self.num_parts + 1, self.num_samples + len(part), part.shape[1]

    def read(self, start, stop):
        self.file.seek(4 * self.channels * start)
        return np.frombuffer(bytearray(self.file.read(4 * self.channels * (stop - start))), np.float32).reshape(-1, self.channels)

    def close(self):
        with contextlib.suppress(OSError):  # what found no room before, finds none now
            self.file.close()


class _AudioFile:
    """A sound file, read where it is asked for."""

    def __init__(self, file, opened, dtype):
        self.file, self.opened, self.dtype, self.num_samples, self.channels = file, opened, dtype, opened.frames, opened.channels

    def read(self, start, stop):
        import soundfile

        try:
            self.opened.seek(start)
            x = self.opened.read(stop - start, dtype=self.dtype, always_2d=True)
        except (soundfile.SoundFileError, OSError) as e:
            raise clip_io.MediaError(f"{self.file}: cannot be decoded ({clip_io.one_line(e)}); check that it plays") from e
        if len(x) < stop - start:
            raise clip_io.MediaError(f"{self.file}: ends at {start + len(x)} of {self.num_samples} samples; fetch it again")
        return x

    def close(self):
        self.opened.close()


def _open_audio(file: Path) -> Source:
    import soundfile

    try:
        opened = soundfile.SoundFile(os.fsencode(file))
    except (soundfile.SoundFileError, OSError) as e:
        kind = file.suffix[1:].lower()
        raise clip_io.MediaError(f"{file}: cannot be decoded as {kind} ({clip_io.one_line(e)}); check that it plays") from e
    with contextlib.ExitStack() as on_error:
        on_error.enter_context(opened)
        dtype, subtype, codec = clip_io.audio_file_kind(opened)
        store = _AudioFile(file, opened, dtype)
        if not store.num_samples:
            raise clip_io.MediaError(f"{file}: found 0 samples, expected sound")
        store.read(store.num_samples - 1, store.num_samples)  # a header may say more than the file holds
        on_error.pop_all()
    return Source(file, clip_io.Audio(store, opened.samplerate, 0.0, subtype, codec), None)


def _open_video(file: Path, want_video: bool) -> Source:
    """One pass: the sound is decoded, the video's packets are only listed."""
    import av

    with contextlib.ExitStack() as on_error:
        spool = on_error.enter_context(contextlib.closing(_Spool()))
        try:
            with clip_io.open_container(file) as container:
                video, audio = clip_io.streams_of(container, want_video)
                video_file, reader = _VideoFile(file, video), clip_io.AudioReader(file, spool)
                wanted = [stream for stream in (video, audio) if stream is not None]
                for packet in container.demux(wanted) if wanted else ():
                    if video is not None and packet.stream.index == video.index:
                        video_file.note(packet)
                    else:
                        clip_io.decode_packet(packet, reader)
                decoded = reader.result(audio, lambda parts: parts) if audio is not None else None
            video_file = video_file if video_file.settle() else None
        except av.FFmpegError as e:
            raise clip_io.MediaError(
                f"{file}: cannot be decoded ({clip_io.one_line(e)}); check that it plays, or fetch it again"
            ) from e
        except OSError as e:
            raise clip_io.MediaError(
                f"{file}: its sound, decoded, finds no room in {tempfile.gettempdir()} ({clip_io.one_line(e)})"
            ) from e
        if decoded is None and video_file is None:
            raise clip_io.nothing_in(file, want_video, True)
        on_error.pop_all()
    return Source(file, decoded, video_file)


# ---- pictures --------------------------------------------------------------------------------------------------------------------


class _VideoInMemory:
    """Pictures that are decoded already."""

    def __init__(self, video: clip_io.Video):
        self.held, self.fps, self.start_s = video, video.fps, video.start_s
        self.size = video.rgb.shape[2:0:-1]

    def read(self, start_s, end_s):
        asked = (self.held.times >= start_s) & (self.held.times < end_s)
        return clip_io.Video(self.held.rgb[asked], self.fps, self.start_s, self.held.times[asked])


class _Times:
    """What a decoder tells of its pictures, without them."""

    def __init__(self):
        self.seconds, self.size = [], (0, 0)

    def note_missing(self):
        pass

    def add(self, frame):
        self.seconds.append(clip_io.frame_time(frame))
        self.size = self.size if len(self.seconds) > 1 else (frame.width, frame.height)


class _Stretch:
    """Collects the pictures of a stretch [start_s, end_s) by their own times, or by number where `times` (T,) are given."""

    def __init__(self, video_file, start_s, end_s, times=None):
        self.video_file, self.start_s, self.end_s, self.times = video_file, start_s, end_s, times
        self.reader = clip_io.FrameReader(video_file.file, video_file.max_bytes)
        self.count, self.last = 0, None if times is None else np.flatnonzero((times >= start_s) & (times < end_s)).max(initial=-1)
        self.done, self.unsure = self.last == -1, False

    def note_missing(self):
        pass

    def add(self, frame):
        seconds = clip_io.frame_time(frame) - self.video_file.start_s if self.times is None else self.times[self.count]
        self.unsure |= bool(np.isnan(seconds))
        if self.start_s <= seconds < self.end_s:
            self.reader.add(frame, seconds)
        self.done |= seconds >= self.end_s + LATE_S if self.times is None else self.count >= self.last
        self.count += 1

    def result(self) -> clip_io.Video:
        video_file, seconds = self.video_file, np.array(self.reader.seconds)
        order = np.argsort(seconds, kind="stable")
        held, size = self.reader.rgb, video_file.size[::-1]
        rgb = np.empty((len(order), *(held[0].shape[:2] if held else size), 3), np.uint8)
        for place, i in enumerate(order):
            rgb[place], held[i] = held[i], None  # never all of them twice in memory
        return clip_io.Video(rgb, video_file.fps, video_file.start_s, seconds[order])


class _Key(NamedTuple):
    """A key picture's packet: the time it says, its place among the packets, and what tells it from others."""

    pts: int
    number: int
    pos: int
    content: tuple[int, int]


class _VideoFile:
    """The pictures of a video file.

    Decoding starts at the second key picture before a stretch (the pictures after the last one may lean on those before it), and
    only where the packet found there is one met on the way through the file, by its content; else at the start. After a seek the
    reader of .mpg makes up other times: each packet's is taken from the way through. Files whose pictures' times are missing or
    out of order are decoded once, to number them.
    """

    max_bytes = MOST_BYTES

    def __init__(self, file, stream):
        self.file, self.regular, self.times = file, True, None
        self.keys, self.alike, self.stamps = [], {}, array.array("q")
        self.first, self.fps, self.size, self.start_s = _Times(), 0.0, (0, 0), 0.0
        if stream is not None:
            clip_io.FrameReader(file, self.max_bytes).check_size(stream)
            self.fps, self.tick_s = clip_io.frame_rate(stream), stream.time_base

    def note(self, packet):
        """The next packet of the file."""
        if packet.size and self.regular:
            self.regular = packet.pts is not None and (len(self.keys) < 2 or packet.pts > self.keys[-2].pts)
        if packet.size and self.regular:
            if packet.is_keyframe:
                self.keys.append(_Key(packet.pts, len(self.stamps), packet.pos, _content(packet)))
                self.alike.setdefault(self.keys[-1].content, []).append(len(self.keys) - 1)
            self.stamps.append(packet.pts)
        if len(self.first.seconds) < FIRST_FRAMES:
            clip_io.decode_packet(packet, self.first)

    def settle(self) -> bool:
        """After the last packet; False where there is no picture."""
        self.size, seconds = self.first.size, np.array(self.first.seconds)
        if not len(seconds):
            return False
        if self.regular and not np.isnan(seconds).any():
            self.start_s = float(seconds.min())
        else:
            self._number()
        return True

    def read(self, start_s, end_s) -> clip_io.Video:
        import av

        try:
            if self.times is None:
                stretch = self._decode(_Stretch(self, start_s, end_s), start_s)
                if not stretch.unsure:
                    return stretch.result()
                self._number()
            return self._decode(_Stretch(self, start_s, end_s, self.times), None).result()
        except av.FFmpegError as e:
            raise clip_io.MediaError(f"{self.file}: cannot be decoded ({clip_io.one_line(e)}); has it changed?") from e

    def _number(self):
        """Finds the time of every picture, by its number as it is decoded."""
        seen = _Times()
        with clip_io.open_container(self.file) as container:
            for packet in container.demux(clip_io.streams_of(container)[0]):
                clip_io.decode_packet(packet, seen)
        seconds = clip_io.fill_times(np.array(seen.seconds), self.fps)
        self.start_s = float(seconds.min())
        self.times = seconds - self.start_s

    def _decode(self, stretch, start_s):
        """Feeds the stretch from a key picture before start_s, or from the file's first picture for None."""
        last = -1 if start_s is None else sum(key.pts * self.tick_s <= start_s + self.start_s for key in self.keys) - 2
        for key in [last - back for back in (0, 1, 3) if last - back > 0] + [None]:  # a seek may land after what was asked for
            with clip_io.open_container(self.file) as container:
                video = clip_io.streams_of(container)[0]
                found = None if key is None else self._found(container, video, key, last)
                if key is not None and found is None:
                    continue
                for packet in container.demux(video) if key is None else self._from(container, video, *found):
                    clip_io.decode_packet(packet, stretch)
                    if stretch.done:
                        break
                return stretch

    def _found(self, container, video, key: int, last: int):
        """After a seek to a key picture: (the first packet that is known as one up to `last`, its number), or None."""
        container.seek(self.keys[key].pts, stream=video)
        for packet in container.demux(video):
            alike = self.alike.get(_content(packet), []) if packet.is_keyframe else []
            if len(alike) > 1:  # a picture that stands still
                alike = [k for k in alike if (packet.pts, packet.pos) == (self.keys[k].pts, self.keys[k].pos)]
            if alike:
                return (packet, self.keys[alike[0]].number) if alike[0] <= last else None

    def _from(self, container, video, first, number: int):
        """The packets from the one of this number on, with their times."""
        for place, packet in enumerate(itertools.chain([first], container.demux(video)), number):
            if packet.size and place < len(self.stamps):
                packet.pts = self.stamps[place]
            yield packet


def _content(packet) -> tuple[int, int]:
    return packet.size, zlib.crc32(packet)
