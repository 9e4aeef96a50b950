"""Decodes clip files into video frames and audio samples, and writes audio files.

The content of a file decides how it is read, not its suffix: WAV and FLAC files are decoded by libsndfile, all others by PyAV in
one pass. A clip keeps its own frame count, sample rate and channels: nothing is cut, mixed or resampled. Audio is placed by its
presentation times, in seconds, and starts with the file: samples that the file lacks are zeros and listed in Audio.missing. Frames
are returned as players show them (frame_geometry). Only the package avsi_jax.media imports av and soundfile. Letters: T video
frames, H and W their height and width, N samples, C channels.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from avsi_jax import presets
from avsi_jax.media import frame_geometry

if TYPE_CHECKING:
    import fractions

    import av
    import soundfile

AUDIO_SUFFIXES = (".wav", ".flac")  # of targets that hold the audio alone
# By these suffixes clips are recognised where they are searched for, as in a folder. A file that is named is opened by its content.
VIDEO_SUFFIXES = (
    ".mpg", ".mpeg", ".vob", ".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".wmv",
    ".asf", ".flv", ".f4v", ".ogv", ".mxf", ".dv",
)  # fmt: skip
MEDIA_SUFFIXES = (
    *VIDEO_SUFFIXES, *AUDIO_SUFFIXES, ".m4a", ".m4b", ".aac", ".mp3", ".mp2", ".ogg", ".oga", ".opus", ".spx", ".mka", ".weba",
    ".wma", ".aif", ".aiff", ".aifc", ".caf", ".au", ".w64", ".rf64", ".bwf", ".wave", ".amr", ".ac3", ".eac3", ".ape", ".wv",
    ".tta",
)  # fmt: skip
MAX_FRAME_PIXELS = 4096 * 2304  # a file of few bytes can hold frames that take gigabytes
MAX_VIDEO_BYTES = 6 * 2**30  # decoded; 75 Grid frames take 23 MB, one minute of 1080p 9 GB
PCM_BITS = {"PCM_U8": 8, "PCM_S8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}
MAX_SAMPLES_PER_BYTE = 65_535  # FLAC's longest block, of silence, takes more than a byte
WIDE_SUBTYPES = ("PCM_32", "DOUBLE")  # float32 has too few bits for them
SAME_START_S = 1e-4  # two streams that start within this time count as starting together
# Placement of audio by its time stamps. Matroska rounds stamps to milliseconds.
PLACEMENT_TOLERANCE_S, LOOKAHEAD_S = 0.002, 0.3
JITTER_FRAMES, JITTER_FACTOR = 64, 2.0  # the tolerance is at least this multiple of the jitter of so many packets before
MIN_EARLY_END_S = 0.15  # audio that ends earlier than the video by less is usual, and stays as it is
MAX_OVERLAP_S = 1.0  # stamps that go back further begin a new recording
MAX_MISSING_S = 3600.0  # in all
MAX_PRIMING_S = 0.1  # of lossy codecs
MISSING_BLOCK = 2**18  # missing samples that are appended at once
# Formats that are accepted inside a file, whatever its suffix: a playlist (concat, hls, dash, sdp) could open other files.
MEDIA_FORMATS = (
    "mpeg,mpegts,mpegvideo,m4v,h264,hevc,av1,obu,ivf,mov,matroska,avi,flv,live_flv,asf,asf_o,ogg,mxf,gxf,nut,rm,dv,wtv,"
    "wav,w64,flac,mp3,aac,loas,latm,ac3,eac3,dts,dtshd,truehd,mlp,aiff,caf,au,voc,amr,amrnb,amrwb,ape,wv,tta,tak,mpc,mpc8,dsf,oma,iff"
)
IMAGE_FORMATS = "image2,png_pipe,jpeg_pipe,bmp_pipe,tiff_pipe,webp_pipe,gif_pipe,pgm_pipe,ppm_pipe"


class MediaError(ValueError):
    """A clip cannot be read or written. The message is one line: what was found, what was expected, how to fix it."""


class FrameSizeError(MediaError):
    """The frames of a video change their size."""


@dataclasses.dataclass(frozen=True)
class Video:
    """Decoded video frames."""

    rgb: np.ndarray  # (T, H, W, 3) uint8
    fps: float
    start_s: float  # time of the first frame in the container
    times: np.ndarray  # (T,) float64, seconds from the first frame, ascending


@dataclasses.dataclass(frozen=True)
class Audio:
    """Decoded audio."""

    samples: np.ndarray  # (N, C) float32 as decoded (16-bit / 32768), float64 if PCM_32 or DOUBLE; lossy codecs may exceed 1.0
    rate: int  # Hz
    start_s: float  # time of the first sample in the container
    subtype: str  # libsndfile subtype with which `write_audio` writes it back: PCM_16, PCM_24, FLOAT, ...
    codec: str  # canonical name of the codec, e.g. mp2
    missing: tuple[tuple[int, int], ...] = ()  # spans [start, stop) of samples that the file lacks: zeros
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Clip:
    """A decoded clip file; a part that is absent or was not requested is None."""

    path: str
    video: Video | None
    audio: Audio | None


def read_clip(
    path: os.PathLike | str, *, video: bool = True, audio: bool = True, track: int | None = None, max_bytes: int = MAX_VIDEO_BYTES
) -> Clip:
    """Decodes a clip; `video` and `audio` say which parts are wanted. `max_bytes`: limit for all decoded frames together.

    track: number of the audio track, counted from 1; None: the default track as the file says, or the first.
    Raises FileNotFoundError; MediaError where the file cannot be decoded, it holds none of the wanted parts or no such track, or
    its frames exceed a limit.
    """
    file = check_file(path)
    if is_audio_file(file):
        check_track(file, track, 1)
        return Clip(str(file), None, _read_audio_file(file) if audio else None)
    clip = _read_video_file(file, video, audio, track, max_bytes)
    wanted = (video and clip.video is not None) or (audio and clip.audio is not None)
    if (video or audio) and not wanted:
        raise no_stream_error(file, video, audio)
    return clip


def check_file(path: os.PathLike | str) -> pathlib.Path:
    """The path of an existing file, of any suffix; FileNotFoundError, or MediaError for a folder, a pipe or a device."""
    file = pathlib.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; expected a video or audio file")
    if not file.is_file():
        raise MediaError(f"{file}: found a {'folder' if file.is_dir() else 'pipe or device'}, expected a clip file")
    return file


def is_audio_file(file: os.PathLike | str) -> bool:
    """Whether a file is read by libsndfile: a WAV or FLAC file, by its first bytes, whose coding libsndfile knows."""
    with open(file, "rb") as f:
        head = f.read(12)
    is_wav = head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:] == b"WAVE"
    if not is_wav and head[:4] != b"fLaC":
        return False
    import soundfile

    try:
        soundfile.info(os.fsencode(file))
    except (soundfile.SoundFileError, OSError):
        return False
    return True


def check_track(file: os.PathLike | str, track: int | None, count: int) -> None:
    """Raises MediaError where the file has fewer audio tracks than the number `track`, counted from 1."""
    if track is not None and not 1 <= track <= count:
        tracks = f"{count} audio track{'s' * (count != 1)}"
        raise MediaError(f"{file}: found {tracks}, expected track {track}; use a number from 1 to {max(count, 1)}")


def no_stream_error(file: os.PathLike | str, video: bool, audio: bool) -> MediaError:
    """The error for a file in which none of the wanted streams can be decoded."""
    wanted = " or ".join(name for name, is_wanted in (("video", video), ("audio", audio)) if is_wanted)
    return MediaError(f"{file}: found no {wanted} that can be decoded; check that the file plays, or download it again")


def open_container(file: os.PathLike | str, formats: str = MEDIA_FORMATS) -> av.container.InputContainer:
    """Opens a local file with PyAV; to be used in a `with` statement. MediaError for playlists and other unknown formats."""
    import av

    path, options = str(pathlib.Path(file).absolute()), {"format_whitelist": formats, "protocol_whitelist": "file"}
    try:
        try:
            return av.open(path, options=options, metadata_errors="replace")
        except TypeError:  # PyAV 19 has no such keyword: metadata that is not UTF-8 is no error there
            return av.open(path, options=options)
    except av.ArgumentError as e:
        raise MediaError(f"{file}: found a playlist or another unknown format, expected a clip; convert it") from e


def read_frames(
    paths: Sequence[os.PathLike | str],
    numbers: Sequence[int] | None = None,
    fps: float = presets.GRID_FPS,
    *,
    max_bytes: int = MAX_VIDEO_BYTES,
) -> Video:
    """Reads image files (.png .jpg ...), in this order, as a video of `fps`; MediaError as read_clip.

    numbers: the frame number of each image, ascending. A number that is absent leaves a jump in `times`. None: 0, 1, 2, ...
    """
    import av

    reader = FrameReader(paths[0], max_bytes)
    numbers = range(len(paths)) if numbers is None else numbers
    for path, number in zip(paths, numbers, strict=True):
        try:
            with open_container(path, IMAGE_FORMATS) as container:
                reader.check_size(container.streams.video[0])
                reader.add(next(container.decode(video=0)), seconds=(number - numbers[0]) / fps)
        except (av.FFmpegError, IndexError, StopIteration) as e:
            raise MediaError(f"{path}: cannot be decoded as an image ({one_line(e)}); download it again") from e
    return Video(np.stack(reader.rgb), fps, 0.0, np.array(reader.seconds))


def check_samples(samples: np.ndarray) -> None:
    """Raises ValueError for audio that is not (N, C) of floats, with at least as many samples as channels."""
    if samples.ndim != 2 or samples.dtype.kind != "f":
        raise ValueError(f"found audio of shape {samples.shape} {samples.dtype}, expected (N, C) of floats")
    if not samples.size:
        raise ValueError(f"found audio of shape {samples.shape}, which has no samples; expected (N, C)")
    if samples.shape[0] < samples.shape[1]:
        raise ValueError(f"found audio of shape {samples.shape}, which looks like (C, N); expected (N, C): use samples.T")


def mono(samples: np.ndarray) -> np.ndarray:
    """Mean of the channels, (N, C) -> (N,) float32 (a decoder's own downmix scales by 1.41 and clips)."""
    return np.asarray(samples, np.float32).mean(axis=1, dtype=np.float64).astype(np.float32)


def resample(x: np.ndarray, rate_from: int, rate_to: int) -> np.ndarray:
    """Resamples (N,) or (N, C) from `rate_from` to `rate_to`, both in Hz, with soxr HQ; float32."""
    x = np.asarray(x, np.float32)
    if rate_from == rate_to or not len(x):
        return x.copy()
    import soxr

    return soxr.resample(x, rate_from, rate_to, quality="HQ")


def to_int16(x: np.ndarray) -> np.ndarray:
    """Float samples -> int16, clip(round(32768 x)). All 16-bit output of the package uses this rule."""
    return (_quantise(x, 16) >> 16).astype(np.int16)


def from_int16(x: np.ndarray) -> np.ndarray:
    """int16 samples -> float32, x / 32768."""
    return np.asarray(x, np.float32) / np.float32(32768)


def audio_lag_s(clip: Clip) -> float:
    """Seconds by which the audio lags the video; 0 where the clip has only one of the two.

    A frame at time t after the first frame belongs to the audio at t + lag after the first sample. Presentation times do not show
    the delay of Grid's MP2 encoder (presets.MPEG_AUDIO_LAG_S). It is added where the audio is Grid's own: MP2 at 44.1 kHz that
    starts together with the video. Where the audio was copied into an .mp4 (ffmpeg reports its MP2 as MP3) or converted without
    loss, it is recognised by the length of Grid's clips.
    """
    if clip.video is None or clip.audio is None:
        return 0.0
    return audio_lag_from_times(clip.video.start_s, clip.audio, len(clip.audio.samples))


def audio_lag_from_times(video_start_s: float, audio: Audio, num_samples: int) -> float:
    """As `audio_lag_s`, for a clip with video and audio, without access to `audio.samples`."""
    lag, num_missing = video_start_s - audio.start_s, sum(stop - start for start, stop in audio.missing)
    is_copy = audio.codec.startswith(("mp3", "flac", "alac", "pcm_")) and num_samples - num_missing == presets.GRID_MPEG_SAMPLES
    is_late = bool(audio.missing) and audio.missing[0][0] == 0
    is_grid = (audio.codec == "mp2" or is_copy) and audio.rate == 44_100 and abs(lag) < SAME_START_S and not is_late
    return lag + presets.MPEG_AUDIO_LAG_S if is_grid else lag


def write_audio(path: os.PathLike | str, samples: np.ndarray, rate: int, subtype: str = "PCM_16") -> None:
    """Writes (N,) or (N, C), float or int16, as .wav or .flac; for integer subtypes as clip(round(2^(bits-1) x)).

    Raises MediaError for another suffix, a subtype that the format cannot hold, samples that are not finite, or a failed write.
    """
    import soundfile

    file, samples = pathlib.Path(path), np.asarray(samples)
    kind = file.suffix.lower().lstrip(".")
    if f".{kind}" not in AUDIO_SUFFIXES:
        raise MediaError(f"{file}: found suffix {file.suffix!r}, expected {' or '.join(AUDIO_SUFFIXES)}")
    if not soundfile.check_format(kind, subtype):
        raise MediaError(f"{file}: {kind} cannot hold subtype {subtype}; use a .wav file, or write PCM_16 or PCM_24")
    if not np.isfinite(samples).all():
        raise MediaError(f"{file}: the audio holds NaN or infinite samples; nothing is written")
    try:
        soundfile.write(file, to_subtype(samples, subtype), rate, subtype=subtype, format=kind)
    except (soundfile.SoundFileError, OSError) as e:
        raise MediaError(
            f"{file}: cannot be written ({one_line(e)}); expected an existing folder with free space, and a sample rate that "
            f"the format supports, found {rate} Hz"
        ) from e


def to_subtype(samples: np.ndarray, subtype: str) -> np.ndarray:
    """Samples as libsndfile and PyAV need them for a subtype: int32 with the value in the upper bits, float for float subtypes."""
    if samples.dtype == np.int16:
        if subtype == "PCM_16":
            return samples
        samples = from_int16(samples)
    if subtype in PCM_BITS:
        return _quantise(samples, PCM_BITS[subtype])
    return np.asarray(samples, np.float64 if subtype == "DOUBLE" else np.float32)


def _quantise(x: np.ndarray, bits: int) -> np.ndarray:
    """Float samples -> int32 with clip(round(2^(bits-1) x)) in the upper bits."""
    full_scale = 2 ** (bits - 1)
    values = np.clip(np.rint(np.asarray(x, np.float64) * full_scale), -full_scale, full_scale - 1).astype(np.int64)
    return (values << (32 - bits)).astype(np.int32)


def _read_audio_file(file: pathlib.Path) -> Audio:
    import soundfile

    try:
        with soundfile.SoundFile(os.fsencode(file)) as f:  # as bytes: names need not be UTF-8
            dtype, subtype, codec = audio_file_format(f)
            audio = Audio(f.read(dtype=dtype, always_2d=True), f.samplerate, 0.0, subtype, codec)
    except (soundfile.SoundFileError, OSError) as e:
        raise MediaError(f"{file}: cannot be decoded ({one_line(e)}); check that it plays") from e
    if not len(audio.samples):
        raise MediaError(f"{file}: found 0 samples, expected audio")
    return audio


def audio_file_format(f: soundfile.SoundFile) -> tuple[str, str, str]:
    """(dtype to read it as: float64 where float32 has too few bits; subtype to write it back as; codec) of an open file."""
    file = pathlib.Path(os.fsdecode(f.name))
    if f.frames > MAX_SAMPLES_PER_BYTE * file.stat().st_size:  # a wrong header, or a .flac of unknown length
        raise MediaError(f"{file}: its header claims {f.frames} samples, more than the file can hold; convert it again")
    subtype = f.subtype if f.subtype in (*PCM_BITS, "FLOAT", "DOUBLE") else "PCM_16"
    return "float64" if subtype in WIDE_SUBTYPES else "float32", subtype, f"{f.format} {f.subtype}".lower()


def _read_video_file(file: pathlib.Path, want_video: bool, want_audio: bool, track: int | None, max_bytes: int) -> Clip:
    import av

    try:
        with open_container(file) as container:
            video, audio = select_streams(container, audio=want_audio, track=track)
            frames = FrameReader(file, max_bytes, video and video.sample_aspect_ratio)
            video_end, audio_reader = VideoEnd(), AudioReader(file, audio, presentation_start(container, audio))
            if want_video and video is not None:
                frames.check_size(video)
            wanted = [s for s in (video if want_video or want_audio else None, audio) if s is not None]
            for packet in container.demux(wanted) if wanted else ():
                if video is None or packet.stream.index != video.index:  # stream_index is 0 in the empty packets at the end
                    decode_packet(packet, audio_reader)
                    continue
                video_end.add(packet)
                if want_video:
                    decode_packet(packet, frames)
            return Clip(
                str(file),
                frames.result(video) if want_video and video is not None else None,
                audio_reader.result(video_end.seconds(video)) if audio is not None else None,
            )
    except av.FFmpegError as e:
        raise MediaError(f"{file}: cannot be decoded ({one_line(e)}); check that it plays, or download it again") from e


def select_streams(
    container: av.container.InputContainer, video: bool = True, audio: bool = True, *, track: int | None = None
) -> tuple[av.VideoStream | None, av.AudioStream | None]:
    """The video and the audio stream to use, of a known codec; None where there is none, or where it is not wanted.

    Of several, the first that has the file's default flag, else the first. track: the number of the audio track instead, counted
    from 1 over all audio tracks; MediaError where there is none.
    """
    from av.stream import Disposition

    known = [s for s in container.streams if s.codec_context and not s.disposition & Disposition.attached_pic]  # no cover image
    videos, audios = (sorted(_of_kind(known, kind), key=_is_not_default) for kind in ("video", "audio"))
    if track is not None and audio:
        tracks = _of_kind(container.streams, "audio")
        check_track(container.name, track, len(tracks))
        audios = [s for s in audios if s.index == tracks[track - 1].index]
    if video_stream := videos[0] if video and videos else None:
        video_stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # also where the header claims a smaller size
    return video_stream, audios[0] if audio and audios else None


def track_number(container: av.container.InputContainer, audio: av.AudioStream) -> int:
    """The number of an audio stream among the audio tracks of its file, counted from 1."""
    return 1 + [s.index for s in _of_kind(container.streams, "audio")].index(audio.index)


def _of_kind(streams: Sequence[av.stream.Stream], kind: str) -> list[av.stream.Stream]:
    return [s for s in streams if s.type == kind]


def _is_not_default(stream: av.stream.Stream) -> bool:
    from av.stream import Disposition

    return not stream.disposition & Disposition.default


def presentation_start(container: av.container.InputContainer, audio: av.AudioStream | None) -> float:
    """When a player begins to show the file, by the streams other than `audio`: seconds in the container; NaN where none says."""
    from av.stream import Disposition

    shown = [s for s in container.streams if s.start_time is not None and not s.disposition & Disposition.attached_pic]
    starts_s = {s.index: float(s.start_time * s.time_base) for s in shown if s.type in ("video", "audio")}
    own_s = starts_s.get(audio.index, np.inf) if audio is not None else np.inf
    # other audio tracks may begin a little earlier with priming, which is not played
    others = [t for i, t in starts_s.items() if container.streams[i].type == "video" or own_s - t > MAX_PRIMING_S]
    return min(others, default=np.nan)


def decode_packet(packet: av.Packet, reader: FrameReader | AudioReader) -> None:
    """Passes the packet's frames to reader.add; a packet that cannot be decoded is skipped and reported to reader.note_missing."""
    import av

    try:
        frames = packet.decode()
    except av.FFmpegError:
        reader.note_missing(packet)
        return
    for frame in frames:
        reader.add(frame)


class VideoEnd:
    """Determines the end of a video from its packets."""

    def __init__(self):
        self._last, self._pts = None, -(2**63)

    def add(self, packet: av.Packet) -> None:
        """Adds a packet of the video."""
        if packet.size and packet.pts is not None and packet.pts > self._pts and not packet.is_discard:
            self._pts, self._last = packet.pts, packet.duration

    def seconds(self, stream: av.VideoStream | None) -> float:
        """When the last frame ends, in the container; NaN where no packet has a time."""
        if self._last is None:
            return np.nan
        return float(self._pts * stream.time_base) + (
            float(self._last * stream.time_base) if self._last else 1 / frame_rate(stream)
        )


class FrameReader:
    """Collects the frames of a video. Packets that cannot be decoded leave a jump in `times`."""

    def __init__(
        self, file: os.PathLike | str, max_bytes: int, aspect: fractions.Fraction | None = None, size: tuple[int, int] | None = None
    ):
        """aspect: of the pixels. size: (width, height) that all frames must have as they are shown; None: that of the first."""
        self.file, self.max_bytes, self.aspect, self.size = file, max_bytes, aspect, size
        self.rgb, self.seconds, self.num_bytes = [], [], 0

    def check_size(self, stream: av.VideoStream) -> None:
        """Raises MediaError for frames that are too large, before one is decoded."""
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_FRAME_PIXELS:
            raise MediaError(
                f"{self.file}: found frames of {width}x{height}, expected at most 4096x2304 pixels; scale the video down"
            )

    def note_missing(self, packet: av.Packet) -> None:
        """A packet could not be decoded; nothing to do, since frames carry their times."""

    def add(self, frame: av.VideoFrame, seconds: float | None = None) -> None:
        """Adds a frame, at `seconds` or at its own presentation time; MediaError for too many bytes, FrameSizeError."""
        size = frame_geometry.shown_size(frame, self.aspect)
        self.size = self.size or size
        if size != self.size:
            raise FrameSizeError(
                f"{self.file}: the frame size changes from {self.size} to {size}; expected one size, re-encode the clip"
            )
        self.num_bytes += 3 * size[0] * size[1]  # known before any memory is allocated
        if self.num_bytes > self.max_bytes:
            raise MediaError(
                f"{self.file}: the decoded frames take more than {self.max_bytes / 2**30:g} GiB; "
                "cut the clip around the gap or scale the video down"
            )
        self.rgb.append(frame_geometry.shown_rgb(frame, self.aspect))
        self.seconds.append(frame_time(frame) if seconds is None else seconds)

    def result(self, stream: av.VideoStream) -> Video | None:
        """The frames in the order of their times; None where there are none."""
        if not self.rgb:
            return None
        fps = frame_rate(stream)
        seconds = fill_times(np.array(self.seconds), fps)
        order = np.argsort(seconds, kind="stable")
        seconds = seconds[order]
        return Video(np.stack([self.rgb[i] for i in order]), fps, float(seconds[0]), seconds - seconds[0])


class AudioReader:
    """Collects audio in `parts`, a list or an object with its `append`; places it by its time stamps.

    Samples that the file lacks become zeros, `missing`: where the stamps jump, where packets cannot be decoded, before audio that
    starts late and after audio that ends early. Samples that overlap by their stamps are dropped. Containers round stamps, and
    recorders jitter: a difference counts where it exceeds PLACEMENT_TOLERANCE_S, and the jitter of the packets before, in every
    packet of the next LOOKAHEAD_S.
    """

    def __init__(self, file: os.PathLike | str, stream: av.AudioStream | None, starts_at_s: float = np.nan, parts: Any = None):
        """starts_at_s: `presentation_start`."""
        self.file, self.stream, self.parts = file, stream, [] if parts is None else parts
        self.start_s, self.missing, self.warnings = np.nan, [], []
        self.rate = self.channels = self.num_samples = 0
        self._starts_at_s, self._placed_from_s, self._undecodable = starts_at_s, np.nan, []
        self._subtype = _subtype(stream.codec_context) if stream is not None else ""
        self._dtype = np.float64 if self._subtype in WIDE_SUBTYPES else np.float32
        self._waiting, self._num_waiting, self._num_missing = collections.deque(), 0, 0
        self._recent_late_s = collections.deque(maxlen=JITTER_FRAMES)

    def note_missing(self, packet: av.Packet) -> None:
        """Records a packet that could not be decoded."""
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None:
            times = float(stamp * packet.time_base), float((stamp + (packet.duration or 0)) * packet.time_base)
            self._undecodable.append(times)

    def add(self, frame: av.AudioFrame) -> None:
        """Adds an audio frame; MediaError where its rate or channels differ from those before it."""
        x = _frame_samples(frame, self._dtype)
        if not self.rate:
            self.rate, self.channels = frame.sample_rate, x.shape[1]
        if x.shape[1] != self.channels or frame.sample_rate != self.rate:
            raise MediaError(f"{self.file}: the sample rate or the channels change inside the file; re-encode the audio")
        self._waiting.append((frame_time(frame), x))
        self._num_waiting += len(x)
        while self._num_waiting - len(self._waiting[0][1]) > LOOKAHEAD_S * self.rate:
            self._place_next()

    def result(self, video_end_s: float = np.nan, join: Callable = np.concatenate) -> Audio | None:
        """The audio, with join(parts) as its samples; None without samples. video_end_s: as from VideoEnd."""
        while self._waiting:
            self._place_next()
        if not self.num_samples:
            return None
        undecodable_end_s = max((end for _, end in self._undecodable), default=np.nan)
        end_s = self._placed_from_s + self.num_samples / self.rate
        if undecodable_end_s - end_s > PLACEMENT_TOLERANCE_S:
            self._add_missing(undecodable_end_s - end_s)
            end_s = undecodable_end_s
        if video_end_s - end_s > MIN_EARLY_END_S:
            self._add_missing(video_end_s - end_s)
        start_s = 0.0 if np.isnan(self.start_s) else self.start_s
        codec = self.stream.codec_context.codec.canonical_name
        return Audio(join(self.parts), self.rate, start_s, self._subtype, codec, tuple(self.missing), tuple(self.warnings))

    def _place_next(self) -> None:
        """Appends the first of the waiting frames, after missing samples or without its start where its time stamp says so."""
        stamp_s, x = self._waiting[0]
        if np.isnan(self._placed_from_s) and not np.isnan(stamp_s):
            self._begin(stamp_s)
        late_s = stamp_s - self._placed_from_s - self.num_samples / self.rate
        counted_s = self._lateness() if abs(late_s) > PLACEMENT_TOLERANCE_S else 0.0
        if not np.isnan(late_s):
            self._recent_late_s.append(0.0 if counted_s else late_s)
        late_s, skipped = counted_s, 0
        if late_s > 0 or late_s < -MAX_OVERLAP_S:
            self._add_missing(late_s)
        elif late_s < 0:
            skipped = min(len(x), round(-late_s * self.rate))
        self._waiting.popleft()
        self._num_waiting -= len(x)
        self._append(x[skipped:])

    def _begin(self, stamp_s: float) -> None:
        """Sets the time of the first sample: that of the file's start where the audio starts later."""
        starts_s = [start for start, _ in self._undecodable] + [self._starts_at_s]
        late_s = stamp_s - min((s for s in starts_s if not np.isnan(s)), default=stamp_s)
        self.start_s = self._placed_from_s = stamp_s - self.num_samples / self.rate
        if not self.num_samples and PLACEMENT_TOLERANCE_S < late_s <= MAX_MISSING_S:
            self.start_s = self._placed_from_s = stamp_s - late_s
            self._add_missing(late_s)

    def _lateness(self) -> float:
        """By how many seconds all waiting frames are late (negative: early) by their time stamps; 0 where some are not."""
        stamps_s = np.array([stamp_s for stamp_s, _ in self._waiting])
        position = self.num_samples + np.cumsum([0] + [len(x) for _, x in self._waiting][:-1])
        late_s = stamps_s - self._placed_from_s - position / self.rate
        late_s = late_s[~np.isnan(late_s)]
        least_s, tolerance_s = late_s[np.abs(late_s).argmin()], PLACEMENT_TOLERANCE_S
        if self._recent_late_s:  # without the tenth at either end, which single wrong stamps are in
            tolerance_s = max(tolerance_s, JITTER_FACTOR * np.ptp(np.percentile(self._recent_late_s, (10, 90))))
        if abs(least_s) <= tolerance_s or (np.sign(late_s) != np.sign(least_s)).any():
            return 0.0
        return float(np.median(late_s[np.abs(late_s - least_s) <= tolerance_s]))  # others jump again later

    def _add_missing(self, late_s: float) -> None:
        """Appends zeros for late_s seconds; if stamps jump too far or back, counts time from here on by what follows."""
        count = round(late_s * self.rate)
        if late_s < 0 or self._num_missing + count > MAX_MISSING_S * self.rate:
            at_s = self.num_samples / self.rate
            self.warnings.append(f"the time stamps of the audio jump by {late_s:.1f} s at {at_s:.1f} s: not followed")
            self._placed_from_s += late_s
            return
        start, self._num_missing = self.num_samples, self._num_missing + count
        for at in range(0, count, MISSING_BLOCK):
            self._append(np.zeros((min(MISSING_BLOCK, count - at), self.channels), self._dtype))
        if self.missing and self.missing[-1][1] == start:
            start = self.missing.pop()[0]
        self.missing.append((start, self.num_samples))

    def _append(self, x: np.ndarray) -> None:
        if len(x):
            self.parts.append(x)
            self.num_samples += len(x)


def frame_rate(stream: av.VideoStream) -> float:
    """Frames per second according to the file; Grid's frame rate where the file has none."""
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return float(rate) if rate else presets.GRID_FPS


def frame_time(frame: av.VideoFrame | av.AudioFrame) -> float:
    """Presentation time in the container, seconds; NaN where the file has none."""
    stamp = frame.pts if frame.pts is not None else frame.dts
    return float(stamp * frame.time_base) if stamp is not None and frame.time_base else np.nan


def fill_times(seconds: np.ndarray, fps: float) -> np.ndarray:
    """Replaces missing times (NaN) of (T,) by those of a regular grid of `fps` through the first known time (or from 0)."""
    known = np.flatnonzero(~np.isnan(seconds))
    regular = np.arange(len(seconds)) / fps
    if len(known):
        regular += seconds[known[0]] - regular[known[0]]
    return np.where(np.isnan(seconds), regular, seconds)


def _frame_samples(frame: av.AudioFrame, dtype: type) -> np.ndarray:
    """One audio frame -> (n, C) of a float type; integers divided by their full scale."""
    x = frame.to_ndarray()
    channels = frame.layout.nb_channels
    x = x.T if frame.format.is_planar else x.reshape(-1, channels)
    if x.dtype.kind == "u":
        return ((x.astype(np.float64) - 128) / 128).astype(dtype)
    if x.dtype.kind == "i":
        return (x / float(2 ** (8 * x.dtype.itemsize - 1))).astype(dtype)
    return x.astype(dtype)


def _subtype(context: av.AudioCodecContext) -> str:
    """The libsndfile subtype that holds the codec's samples exactly; PCM_16 for lossy codecs."""
    name = context.codec.canonical_name
    if name.startswith("pcm_f"):
        return "DOUBLE" if "64" in name else "FLOAT"
    if name in ("pcm_u8", "pcm_s8"):
        return "PCM_U8"
    lossless = name.startswith("pcm_s") or name in ("flac", "alac")
    if not lossless or context.format is None or context.format.bytes <= 2:  # None: the header of a broken file says nothing
        return "PCM_16"
    # 24-bit samples are decoded into the upper bits of 32-bit frames; only plain 32-bit PCM uses all of them
    return "PCM_32" if name.startswith("pcm_s32") else "PCM_24"


def one_line(error: Exception) -> str:
    """The message of an error without line breaks, and without the number and path that some libraries put before it."""
    return " ".join(str(getattr(error, "strerror", None) or getattr(error, "error_string", None) or error).split())
