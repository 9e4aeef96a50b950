"""Reads clip files of any length piece by piece: ranges of audio samples and of video frames.

A Source gives the same data as clip_io.read_clip, bit for bit, in memory that does not grow with the clip. An audio file is read on
request. The audio of a video file is decoded once, when it is opened, into an unnamed temporary file; its frames are decoded on
request from a key frame before the range. Times are in seconds, audio positions in samples at the clip's own rate.
muxing.write_clip, which writes a Source with new audio, is also available here.
"""

from __future__ import annotations

import array
import bisect
import contextlib
import itertools
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from avsi_jax.media import clip_io, frame_geometry
from avsi_jax.media.muxing import write_clip as write_clip

if TYPE_CHECKING:
    from fractions import Fraction

    import av
    import soundfile

MAX_SPOOLED_BYTES = 32 * 2**20  # of decoded audio in memory; longer audio is on the disk
MAX_READ_BYTES = 2**30  # of decoded frames in one call
FIRST_FRAMES = 17  # decoders reorder over at most 16 frames, so the earliest of the first 17 is the first of the video
REORDER_MARGIN_S = 0.5  # decoding continues this long after a range, for frames that are decoded out of order


class Source:
    """An open clip from which ranges of audio and video are read; a context manager.

    Attributes: `path`; of the audio `rate` (Hz), `channels`, `num_samples`, `subtype`, `codec`, as in clip_io.Audio, and `track`,
    its number among the audio tracks of the file, counted from 1; `missing`, spans [start, stop) of samples that the file lacks,
    which are zeros, and `warnings` about the audio; `end_s`, when the last of audio and video ends, in seconds from the first
    sample; of the video `has_video`, `is_still` (a single image), `fps`, `size` (width, height) as shown;
    `lag_s`, by which the audio lags the video, as clip_io.audio_lag_s; `audio_start_s` and `video_start_s`, times of the first
    sample and frame in the container. A clip without audio has rate, channels and num_samples 0; one without video has fps 0 and
    size (0, 0).
    """

    def __init__(
        self,
        path: os.PathLike | str,
        audio: clip_io.Audio | None,
        frame_store: _VideoFile | _VideoInMemory | None,
        track: int = 1,
        video_end_s: float = np.nan,
    ):
        """`audio.samples` is a store such as _SpooledAudio. video_end_s: as from clip_io.VideoEnd."""
        self.path, self._frame_store, self.track = str(path), frame_store, track
        self._audio_store = audio.samples if audio else _AudioInMemory(np.zeros((0, 0), np.float32))
        self.channels, self.num_samples = self._audio_store.channels, self._audio_store.num_samples
        self.rate, self.audio_start_s = (audio.rate, audio.start_s) if audio else (0, 0.0)
        self.subtype, self.codec = (audio.subtype, audio.codec) if audio else ("PCM_16", "")
        self.missing, self.warnings = (audio.missing, audio.warnings) if audio else ((), ())
        self.has_video = frame_store is not None
        self.fps, self.size, self.video_start_s = 0.0, (0, 0), 0.0
        if frame_store is not None:
            self.fps, self.size, self.video_start_s = frame_store.fps, frame_store.size, frame_store.start_s
        self.is_still = frame_store is not None and frame_store.is_still
        self.end_s = max(self.duration_s, float(np.nan_to_num(video_end_s, nan=-np.inf)) - self.audio_start_s)
        has_both = audio is not None and frame_store is not None
        self.lag_s = clip_io.audio_lag_from_times(self.video_start_s, audio, self.num_samples) if has_both else 0.0

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the audio; frames can still be read."""
        self._audio_store.close()

    @property
    def duration_s(self) -> float:
        """Duration of the audio, seconds."""
        return self.num_samples / self.rate if self.rate else 0.0

    def audio(self, start: int, stop: int) -> np.ndarray:
        """Samples [start, stop) -> (n, C) float32, float64 of an audio file of PCM_32 or DOUBLE; ValueError outside the clip."""
        if not 0 <= start <= stop <= self.num_samples:
            raise ValueError(f"{self.path}: found samples {start} to {stop}, expected a range within 0 to {self.num_samples}")
        return self._audio_store.read(start, stop)

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """All audio as (first sample, (n, C)) in order; n = size except in the last block."""
        for start in range(0, self.num_samples, size):
            yield start, self.audio(start, min(start + size, self.num_samples))

    def video(self, start_s: float, end_s: float) -> clip_io.Video:
        """The frames with start_s <= time < end_s; times are seconds from the first frame of the file, whose start_s it has.

        MediaError where the file has no video, or the frames take more than MAX_READ_BYTES.
        """
        if self._frame_store is None:
            raise clip_io.MediaError(f"{self.path}: has no video; expected a clip with video")
        return self._frame_store.read(start_s, end_s)


def open_source(path: os.PathLike | str, *, video: bool = True, track: int | None = None) -> Source:
    """Opens a clip file and reads it through once; raises what clip_io.read_clip raises.

    video: whether frames are wanted. track: number of the audio track, as in clip_io.read_clip.
    """
    file = clip_io.check_file(path)
    if clip_io.is_audio_file(file):
        clip_io.check_track(file, track, 1)
        return _open_audio(file)
    return _open_video(file, video, track)


def source_from_clip(clip: clip_io.Clip) -> Source:
    """A clip in memory as a Source. Raises ValueError for audio that is not (N, C) of floats."""
    if clip.audio is not None:
        clip_io.check_samples(clip.audio.samples)
    audio = clip.audio and clip_io.Audio(
        _AudioInMemory(clip.audio.samples), clip.audio.rate, clip.audio.start_s, clip.audio.subtype, clip.audio.codec,
        clip.audio.missing, clip.audio.warnings,
    )  # fmt: skip
    return Source(clip.path, audio, clip.video and _VideoInMemory(clip.video))


# ---- audio -----------------------------------------------------------------------------------------------------------------------


class _AudioInMemory:
    """Audio store of an array."""

    def __init__(self, samples: np.ndarray):
        self.samples, (self.num_samples, self.channels) = samples, samples.shape

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.samples[start:stop].copy()

    def close(self) -> None:
        pass


class _SpooledAudio:
    """Audio store for AudioReader's `parts`: in memory as decoded, long audio in an unnamed temporary file."""

    def __init__(self):
        self.num_samples, self.channels, self.dtype = 0, 0, np.dtype(np.float32)
        self.file = tempfile.SpooledTemporaryFile(MAX_SPOOLED_BYTES)  # noqa: SIM115  close() closes it

    def append(self, part: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(part).tobytes())
        self.num_samples, self.channels, self.dtype = self.num_samples + len(part), part.shape[1], part.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        frame_bytes = self.dtype.itemsize * self.channels
        self.file.seek(frame_bytes * start)
        return np.frombuffer(bytearray(self.file.read(frame_bytes * (stop - start))), self.dtype).reshape(-1, self.channels)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again where the disk was full
            self.file.close()


class _AudioFile:
    """Audio store of an audio file, read on request."""

    def __init__(self, file: Path, opened: soundfile.SoundFile, dtype: str):
        self.file, self.opened, self.dtype, self.num_samples, self.channels = file, opened, dtype, opened.frames, opened.channels

    def read(self, start: int, stop: int) -> np.ndarray:
        import soundfile

        try:
            self.opened.seek(start)
            x = self.opened.read(stop - start, dtype=self.dtype, always_2d=True)
        except (soundfile.SoundFileError, OSError) as e:
            raise clip_io.MediaError(f"{self.file}: cannot be decoded ({clip_io.one_line(e)}); check that it plays") from e
        if len(x) < stop - start:
            raise clip_io.MediaError(f"{self.file}: ends at {start + len(x)} of {self.num_samples} samples; download it again")
        return x

    def close(self) -> None:
        self.opened.close()


def _open_audio(file: Path) -> Source:
    import soundfile

    try:
        opened = soundfile.SoundFile(os.fsencode(file))
    except (soundfile.SoundFileError, OSError) as e:
        raise clip_io.MediaError(f"{file}: cannot be decoded ({clip_io.one_line(e)}); check that it plays") from e
    with contextlib.ExitStack() as on_error:
        on_error.enter_context(opened)
        dtype, subtype, codec = clip_io.audio_file_format(opened)
        store = _AudioFile(file, opened, dtype)
        if not store.num_samples:
            raise clip_io.MediaError(f"{file}: found 0 samples, expected audio")
        store.read(store.num_samples - 1, store.num_samples)  # the header may claim more than the file holds
        on_error.pop_all()
    return Source(file, clip_io.Audio(store, opened.samplerate, 0.0, subtype, codec), None)


def _open_video(file: Path, want_video: bool, track: int | None) -> Source:
    """Reads the file once: decodes the audio and indexes the video packets."""
    import av

    with contextlib.ExitStack() as on_error:
        spool = on_error.enter_context(contextlib.closing(_SpooledAudio()))
        try:
            with clip_io.open_container(file) as container:
                video, audio = clip_io.select_streams(container, track=track)
                number = 1 if audio is None else clip_io.track_number(container, audio)
                video_file, video_end = _VideoFile(file, video if want_video else None), clip_io.VideoEnd()
                reader = clip_io.AudioReader(file, audio, clip_io.presentation_start(container, audio), spool)
                wanted = [stream for stream in (video, audio) if stream is not None]
                for packet in container.demux(wanted) if wanted else ():
                    if video is None or packet.stream.index != video.index:
                        clip_io.decode_packet(packet, reader)
                        continue
                    video_end.add(packet)
                    if want_video:
                        video_file.index(packet)
                end_s = video_end.seconds(video)
                decoded = reader.result(end_s, lambda parts: parts) if audio is not None else None
            video_file = video_file if video_file.finish_index() else None
        except av.FFmpegError as e:
            reason = clip_io.one_line(e)
            raise clip_io.MediaError(f"{file}: cannot be decoded ({reason}); check that it plays, or download it again") from e
        except OSError as e:
            folder, reason = tempfile.gettempdir(), clip_io.one_line(e)
            raise clip_io.MediaError(f"{file}: no space in {folder} for its decoded audio ({reason}); free some space") from e
        if decoded is None and video_file is None:
            raise clip_io.no_stream_error(file, want_video, True)
        on_error.pop_all()
    return Source(file, decoded, video_file, number, end_s)


# ---- video -----------------------------------------------------------------------------------------------------------------------


class _VideoInMemory:
    """Frame store of decoded frames."""

    def __init__(self, video: clip_io.Video):
        self.decoded, self.fps, self.start_s = video, video.fps, video.start_s
        self.size, self.is_still = video.rgb.shape[2:0:-1], len(video.rgb) == 1

    def read(self, start_s: float, end_s: float) -> clip_io.Video:
        in_range = (self.decoded.times >= start_s) & (self.decoded.times < end_s)
        return clip_io.Video(self.decoded.rgb[in_range], self.fps, self.start_s, self.decoded.times[in_range])


class _TimeReader:
    """Collects the times of decoded frames and the size at which the first one is shown, without the images."""

    def __init__(self, aspect: Fraction | None = None):
        self.seconds, self.size, self.aspect = [], (0, 0), aspect

    def note_missing(self, packet: av.Packet) -> None:
        pass

    def add(self, frame: av.VideoFrame) -> None:
        self.seconds.append(clip_io.frame_time(frame))
        self.size = self.size if len(self.seconds) > 1 else frame_geometry.shown_size(frame, self.aspect)


class _RangeReader:
    """Collects the frames of a range [start_s, end_s) by their own times, or by number where `times` (T,) are given."""

    def __init__(self, video_file: _VideoFile, start_s: float, end_s: float, times: np.ndarray | None = None):
        self.video_file, self.start_s, self.end_s, self.times = video_file, start_s, end_s, times
        self.reader = clip_io.FrameReader(video_file.file, video_file.max_bytes, video_file.aspect, video_file.size)
        self.count, self.last = 0, None
        if times is not None:
            self.last = np.flatnonzero((times >= start_s) & (times < end_s)).max(initial=-1)
        self.is_done, self.has_unknown_times = self.last == -1, False

    def note_missing(self, packet: av.Packet) -> None:
        pass

    def add(self, frame: av.VideoFrame) -> None:
        seconds = clip_io.frame_time(frame) - self.video_file.start_s if self.times is None else self.times[self.count]
        self.has_unknown_times |= bool(np.isnan(seconds))
        if self.start_s <= seconds < self.end_s:
            self.reader.add(frame, seconds)
        self.is_done |= seconds >= self.end_s + REORDER_MARGIN_S if self.times is None else self.count >= self.last
        self.count += 1

    def result(self) -> clip_io.Video:
        video_file, seconds = self.video_file, np.array(self.reader.seconds)
        order = np.argsort(seconds, kind="stable")
        images, size = self.reader.rgb, video_file.size[::-1]
        rgb = np.empty((len(order), *(images[0].shape[:2] if images else size), 3), np.uint8)
        for position, i in enumerate(order):
            rgb[position], images[i] = images[i], None  # so that not all frames are in memory twice
        return clip_io.Video(rgb, video_file.fps, video_file.start_s, seconds[order])


class _KeyFrame(NamedTuple):
    """The packet of a key frame: its presentation time, its number, its position in the file, and a fingerprint of its data."""

    pts: int
    number: int
    pos: int
    fingerprint: tuple[int, int]


class _VideoFile:
    """Frame store of a video file.

    Decoding starts at the second key frame before a range (the frames after the last one may depend on those before it), and only
    where the packet found there is one indexed in the pass through the file, by its data; otherwise at the start. After a seek the
    demuxer of .mpg invents other times, so each packet gets the time of the pass. Files whose frames have missing or unordered
    times are decoded once to number them.
    """

    max_bytes = MAX_READ_BYTES

    def __init__(self, file: Path, stream: av.VideoStream | None):
        self.file, self.has_ordered_times, self.times = file, True, None
        self.keys, self.keys_by_fingerprint, self.packet_pts = [], {}, array.array("q")
        self.aspect = stream.sample_aspect_ratio if stream is not None else None
        self.first, self.fps, self.size, self.start_s = _TimeReader(self.aspect), 0.0, (0, 0), 0.0
        self.num_packets, self.is_still = 0, False
        if stream is not None:
            clip_io.FrameReader(file, self.max_bytes).check_size(stream)
            self.fps, self.tick_s = clip_io.frame_rate(stream), stream.time_base

    def index(self, packet: av.Packet) -> None:
        """Records the next packet of the file."""
        self.num_packets += packet.size > 0
        if packet.size and self.has_ordered_times:
            self.has_ordered_times = packet.pts is not None and (len(self.keys) < 2 or packet.pts > self.keys[-2].pts)
        if packet.size and self.has_ordered_times:
            if packet.is_keyframe:
                self.keys.append(_KeyFrame(packet.pts, len(self.packet_pts), packet.pos, _fingerprint(packet)))
                self.keys_by_fingerprint.setdefault(self.keys[-1].fingerprint, []).append(len(self.keys) - 1)
            self.packet_pts.append(packet.pts)
        if len(self.first.seconds) < FIRST_FRAMES:
            clip_io.decode_packet(packet, self.first)

    def finish_index(self) -> bool:
        """To be called after the last packet; False where there is no frame."""
        self.size, seconds = self.first.size, np.array(self.first.seconds)
        if not len(seconds):
            return False
        self.is_still = self.num_packets == 1
        if self.has_ordered_times and not np.isnan(seconds).any():
            self.start_s = float(seconds.min())
        else:
            self._number_frames()
        return True

    def read(self, start_s: float, end_s: float) -> clip_io.Video:
        import av

        try:
            if self.times is None:
                reader = self._decode(_RangeReader(self, start_s, end_s), start_s)
                if not reader.has_unknown_times:
                    return reader.result()
                self._number_frames()
            return self._decode(_RangeReader(self, start_s, end_s, self.times), None).result()
        except av.FFmpegError as e:
            raise clip_io.MediaError(f"{self.file}: cannot be decoded ({clip_io.one_line(e)}); has it changed?") from e

    def _number_frames(self) -> None:
        """Decodes the whole file to determine the time of every frame, in the order of decoding."""
        reader = _TimeReader()
        with clip_io.open_container(self.file) as container:
            for packet in container.demux(clip_io.select_streams(container)[0]):
                clip_io.decode_packet(packet, reader)
        seconds = clip_io.fill_times(np.array(reader.seconds), self.fps)
        self.start_s = float(seconds.min())
        self.times = seconds - self.start_s

    def _decode(self, reader: _RangeReader, start_s: float | None) -> _RangeReader:
        """Decodes into the reader from a key frame before start_s; None: from the first frame of the file."""
        last = -1
        if start_s is not None:
            last = bisect.bisect_right(self.keys, start_s + self.start_s, key=lambda key: float(key.pts * self.tick_s)) - 2
        for key in [last - back for back in (0, 1, 3) if last - back > 0] + [None]:  # a seek may land after its target
            with clip_io.open_container(self.file) as container:
                video = clip_io.select_streams(container)[0]
                located = None if key is None else self._seek(container, video, key, last)
                if key is not None and located is None:
                    continue
                for packet in container.demux(video) if key is None else self._packets_from(container, video, *located):
                    clip_io.decode_packet(packet, reader)
                    if reader.is_done:
                        break
                return reader

    def _seek(
        self, container: av.container.InputContainer, video: av.VideoStream, key: int, last: int
    ) -> tuple[av.Packet, int] | None:
        """Seeks to a key frame; returns the next indexed key frame's packet and number, or None where it is after key `last`."""
        container.seek(self.keys[key].pts, stream=video)
        for packet in container.demux(video):
            matches = self.keys_by_fingerprint.get(_fingerprint(packet), []) if packet.is_keyframe else []
            if len(matches) > 1:  # identical frames, as of a still image
                matches = [k for k in matches if (packet.pts, packet.pos) == (self.keys[k].pts, self.keys[k].pos)]
            if matches:
                return (packet, self.keys[matches[0]].number) if matches[0] <= last else None
        return None

    def _packets_from(
        self, container: av.container.InputContainer, video: av.VideoStream, first: av.Packet, number: int
    ) -> Iterator[av.Packet]:
        """The packets from `first`, the one of this number, with the times recorded in the index."""
        for position, packet in enumerate(itertools.chain([first], container.demux(video)), number):
            if packet.size and position < len(self.packet_pts):
                packet.pts = self.packet_pts[position]
            yield packet


def _fingerprint(packet: av.Packet) -> tuple[int, int]:
    return packet.size, zlib.crc32(packet)
