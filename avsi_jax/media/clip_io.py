"""Clip files <-> pictures and waveforms; with media/grid_mpeg.py, which writes clips, the only importer of av and soundfile.

Video files (.mpg .mpeg .mp4 .avi .mov .mkv) are decoded by PyAV in one pass, sound files (.wav .flac) by libsndfile. A clip keeps
its own frame count, sound length, rate and channels: nothing is padded, cut, mixed or resampled on the way in. Times are seconds
from the presentation times of the file. Not done here: pictures come as stored, without rotation flags or pixels made square.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib

import numpy as np

from avsi_jax import presets

VIDEO_SUFFIXES = (".mpg", ".mpeg", ".mp4", ".avi", ".mov", ".mkv")
AUDIO_SUFFIXES = (".wav", ".flac")
MOST_POINTS = 4096 * 2304  # of a picture; few bytes can hold a film of pictures that take gigabytes
MAX_VIDEO_BYTES = 6 * 2**30  # decoded; 75 Grid pictures take 23 MB, one minute of 1080p 9 GB
PCM_BITS = {"PCM_U8": 8, "PCM_S8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}
MAX_SAMPLES_A_BYTE = 65_535  # FLAC's longest block, of silence, takes more than a byte
SAME_START_S = 1e-4  # two streams start together within this
# What is looked for inside a file, whatever its suffix: a play list (concat, hls, dash, sdp) would open what it names.
VIDEO_FORMATS = "mpeg,mpegts,mpegvideo,m4v,h264,hevc,mov,matroska,avi,flv,asf,ogg"
IMAGE_FORMATS = "image2,png_pipe,jpeg_pipe,bmp_pipe,tiff_pipe,webp_pipe,gif_pipe,pgm_pipe,ppm_pipe"


class MediaError(ValueError):
    """A clip cannot be read or written; one line: found, expected, what mends it."""


@dataclasses.dataclass(frozen=True)
class Video:
    rgb: np.ndarray  # (T, H, W, 3) uint8
    fps: float
    start_s: float  # time of the first frame in the container
    times: np.ndarray  # (T,) float64, seconds from the first frame, ascending


@dataclasses.dataclass(frozen=True)
class Audio:
    samples: np.ndarray  # (N, C) float32 as decoded (16-bit / 32768); lossy codecs may pass 1.0
    rate: int  # Hz
    start_s: float  # time of the first sample in the container
    subtype: str  # what `write_sound` takes to write it back: PCM_16, PCM_24, FLOAT, ...
    codec: str


@dataclasses.dataclass(frozen=True)
class Clip:
    path: str
    video: Video | None
    audio: Audio | None


def read_clip(path, *, video: bool = True, audio: bool = True, max_bytes: int = MAX_VIDEO_BYTES) -> Clip:
    """Decodes a clip; what is not asked for, or not in the file, is None. max_bytes: of all pictures, decoded.

    FileNotFoundError; MediaError where the suffix is unknown, or the file can't be decoded, holds nothing asked for or too much.
    """
    file = check_file(path)
    if file.suffix.lower() in AUDIO_SUFFIXES:
        return Clip(str(file), None, _read_audio_file(file) if audio else None)
    clip = _read_video_file(file, video, audio, max_bytes)
    wanted = (video and clip.video is not None) or (audio and clip.audio is not None)
    if (video or audio) and not wanted:
        raise nothing_in(file, video, audio)
    return clip


def check_file(path) -> pathlib.Path:
    """A clip's path; FileNotFoundError, or MediaError for a folder or a suffix that is not known."""
    file, known = pathlib.Path(path), " ".join(VIDEO_SUFFIXES + AUDIO_SUFFIXES)
    suffix = file.suffix.lower()
    if suffix not in VIDEO_SUFFIXES + AUDIO_SUFFIXES:
        raise MediaError(f"{file}: found suffix {suffix!r}, expected one of {known}; convert the clip to one of them")
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; expected a clip ({known})")
    if not file.is_file():
        raise MediaError(f"{file}: found a {'folder' if file.is_dir() else 'pipe or device'}, expected a clip file")
    return file


def nothing_in(file, video: bool, audio: bool) -> MediaError:
    """What to raise where nothing that was asked for can be decoded."""
    asked = " or ".join(name for name, on in (("pictures", video), ("sound", audio)) if on)
    return MediaError(f"{file}: found no {asked} that can be decoded; check that the file plays, or fetch it again")


def open_container(file, formats: str = VIDEO_FORMATS):
    """PyAV's container of a local file of the known kinds, closed by its `with`; MediaError for a play list and others."""
    import av

    path, options = str(pathlib.Path(file).absolute()), {"format_whitelist": formats, "protocol_whitelist": "file"}
    try:
        try:
            return av.open(path, options=options, metadata_errors="replace")
        except TypeError:  # PyAV 19 has no such keyword: metadata that is not UTF-8 is no error there
            return av.open(path, options=options)
    except av.ArgumentError as e:
        raise MediaError(f"{file}: found a play list or another unknown kind of file inside, expected a clip; convert it") from e


def read_frames(paths, numbers=None, fps: float = presets.GRID_FPS, *, max_bytes: int = MAX_VIDEO_BYTES) -> Video:
    """Single pictures (.png .jpg ...), in this order, as a film of `fps`; MediaError as read_clip.

    numbers: of each picture, ascending, where some are missing: a missing one leaves its time free.
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
            raise MediaError(f"{path}: cannot be decoded as a picture ({one_line(e)}); fetch it again") from e
    return Video(np.stack(reader.rgb), fps, 0.0, np.array(reader.seconds))


def mono(samples: np.ndarray) -> np.ndarray:
    """(N, C) -> (N,) float32, the mean of the channels (a decoder's own downmix scales by 1.41 and clips)."""
    return np.asarray(samples, np.float32).mean(axis=1, dtype=np.float64).astype(np.float32)


def resample(x: np.ndarray, rate_from: int, rate_to: int) -> np.ndarray:
    """(N,) or (N, C) at `rate_from` Hz -> float32 at `rate_to` Hz, soxr HQ."""
    x = np.asarray(x, np.float32)
    if rate_from == rate_to or not len(x):
        return x.copy()
    import soxr

    return soxr.resample(x, rate_from, rate_to, quality="HQ")


def to_int16(x: np.ndarray) -> np.ndarray:
    """Float sound -> int16, clip(round(32768 x)): the one rule for what leaves the program as 16 bit."""
    return (_quantise(x, 16) >> 16).astype(np.int16)


def from_int16(x: np.ndarray) -> np.ndarray:
    """int16 -> float32, x / 32768."""
    return np.asarray(x, np.float32) / np.float32(32768)


def audio_lag_s(clip: Clip) -> float:
    """Seconds by which sound lags the pictures: what is seen t after the first frame is heard t + lag after the first sample.

    Presentation times do not show the delay of Grid's MP2 encoder (presets.MPEG_SOUND_LAG_S); it is added where the sound is as
    Grid made it: MP2 at 44.1 kHz that starts with the pictures, also where it was copied into an .mp4 (whose MPEG sound ffmpeg
    reads as MP3) or written anew without loss: Grid's own length tells those. 0 where the clip has only one of the two.
    """
    if clip.video is None or clip.audio is None:
        return 0.0
    return lag_between(clip.video.start_s, clip.audio, len(clip.audio.samples))


def lag_between(video_start_s: float, audio: Audio, num_samples: int) -> float:
    """sound_lag_s of a clip that has both; the samples themselves are not looked at."""
    lag = video_start_s - audio.start_s
    copied = audio.codec.startswith(("mp3", "flac", "alac", "pcm_")) and num_samples == presets.GRID_MPEG_SAMPLES
    of_grid = (audio.codec == "mp2" or copied) and audio.rate == 44_100 and abs(lag) < SAME_START_S
    return lag + presets.MPEG_AUDIO_LAG_S if of_grid else lag


def write_audio(path, samples: np.ndarray, rate: int, subtype: str = "PCM_16") -> None:
    """Writes (N,) or (N, C), float or int16, as .wav or .flac; integer subtypes get clip(round(2^(bits-1) x)).

    Raises MediaError for another suffix, a subtype the format cannot hold, or sound that is not finite.
    """
    import soundfile

    file, samples = pathlib.Path(path), np.asarray(samples)
    kind = file.suffix.lower().lstrip(".")
    if f".{kind}" not in AUDIO_SUFFIXES:
        raise MediaError(f"{file}: found suffix {file.suffix!r}, expected {' or '.join(AUDIO_SUFFIXES)} to write sound")
    if not soundfile.check_format(kind, subtype):
        raise MediaError(f"{file}: {kind} cannot hold subtype {subtype}; name the file .wav, or write PCM_16 or PCM_24")
    if not np.isfinite(samples).all():
        raise MediaError(f"{file}: the sound holds NaN or infinite samples; nothing is written")
    try:
        soundfile.write(file, as_written(samples, subtype), rate, subtype=subtype, format=kind)
    except (soundfile.SoundFileError, OSError) as e:
        raise MediaError(
            f"{file}: cannot be written ({one_line(e)}); expected an existing folder with room, and {rate} Hz to be "
            "a rate the format takes"
        ) from e


def as_written(samples: np.ndarray, subtype: str) -> np.ndarray:
    """What libsndfile and PyAV store as meant: int32 with the sample in the upper bits, or float for the other subtypes."""
    if samples.dtype == np.int16:
        if subtype == "PCM_16":
            return samples
        samples = from_int16(samples)
    if subtype in PCM_BITS:
        return _quantise(samples, PCM_BITS[subtype])
    return np.asarray(samples, np.float64 if subtype == "DOUBLE" else np.float32)


def _quantise(x: np.ndarray, bits: int) -> np.ndarray:
    """Float sound -> int32 that carries clip(round(2^(bits-1) x)) in its upper bits."""
    full = 2 ** (bits - 1)
    whole = np.clip(np.rint(np.asarray(x, np.float64) * full), -full, full - 1).astype(np.int64)
    return (whole << (32 - bits)).astype(np.int32)


def _read_audio_file(file: pathlib.Path) -> Audio:
    import soundfile

    try:
        with soundfile.SoundFile(os.fsencode(file)) as f:  # as bytes: names need not be UTF-8
            dtype, subtype, codec = audio_file_kind(f)
            audio = Audio(f.read(dtype=dtype, always_2d=True), f.samplerate, 0.0, subtype, codec)
    except (soundfile.SoundFileError, OSError) as e:
        raise MediaError(f"{file}: cannot be decoded as {file.suffix[1:].lower()} ({one_line(e)}); check that it plays") from e
    if not len(audio.samples):
        raise MediaError(f"{file}: found 0 samples, expected sound")
    return audio


def audio_file_kind(f) -> tuple[str, str, str]:
    """(numbers it is read as: float64 where a float32 holds too few bits; subtype it is written back as; codec)."""
    file = pathlib.Path(os.fsdecode(f.name))
    if f.frames > MAX_SAMPLES_A_BYTE * file.stat().st_size:  # a lie, or a .flac that does not tell
        raise MediaError(f"{file}: its header tells of {f.frames} samples, more than the file can hold; write it anew")
    subtype = f.subtype if f.subtype in (*PCM_BITS, "FLOAT", "DOUBLE") else "PCM_16"
    return "float64" if subtype in ("PCM_32", "DOUBLE") else "float32", subtype, f"{f.format} {f.subtype}".lower()


def _read_video_file(file: pathlib.Path, want_frames: bool, want_audio: bool, max_bytes: int) -> Clip:
    import av

    try:
        with open_container(file) as container:
            video, audio = streams_of(container, want_frames, want_audio)
            pair = ((video, FrameReader(file, max_bytes)), (audio, AudioReader(file)))
            readers = {stream.index: reader for stream, reader in pair if stream is not None}
            if video is not None:
                readers[video.index].check_size(video)
            for packet in container.demux([s for s in (video, audio) if s is not None]) if readers else ():
                decode_packet(packet, readers[packet.stream.index])
            return Clip(
                str(file),
                readers[video.index].result(video) if video is not None else None,
                readers[audio.index].result(audio) if audio is not None else None,
            )
    except av.FFmpegError as e:
        raise MediaError(f"{file}: cannot be decoded ({one_line(e)}); check that it plays, or fetch it again") from e


def streams_of(container, video: bool = True, audio: bool = True) -> tuple:
    """The (video, audio) streams a clip's pictures and sound come from; None without one of a known codec, or where not wanted."""
    from av.stream import Disposition

    known = [s for s in container.streams if s.codec_context and not s.disposition & Disposition.attached_pic]  # no cover picture
    videos, audios = ([s for s in known if s.type == kind] for kind in ("video", "audio"))
    if video_stream := videos[0] if video and videos else None:
        video_stream.codec_context.options = {"max_pixels": str(MOST_POINTS)}  # also where the header told of smaller ones
    return video_stream, audios[0] if audio and audios else None


def decode_packet(packet, reader) -> None:
    """Gives the packet's frames to reader.add; one that cannot be decoded is left out and noted with its reader."""
    import av

    try:
        frames = packet.decode()
    except av.FFmpegError:
        reader.note_missing()
        return
    for frame in frames:
        reader.add(frame)


class FrameReader:
    """Collects pictures; lost ones only leave a hole in `times`."""

    def __init__(self, file, max_bytes):
        self.file, self.max_bytes, self.rgb, self.seconds, self.num_bytes = file, max_bytes, [], [], 0

    def check_size(self, stream):
        """Refuses pictures that are too large, before one is decoded."""
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MOST_POINTS:
            raise MediaError(f"{self.file}: a picture of {width}x{height}, more points than 4096x2304; scale its pictures down")

    def note_missing(self):
        pass

    def add(self, frame, seconds=None):
        self.num_bytes += 3 * frame.width * frame.height  # known before any memory is taken
        if self.num_bytes > self.max_bytes:
            raise MediaError(
                f"{self.file}: its pictures take more than {self.max_bytes / 2**30:g} GiB decoded; "
                "cut the clip around the damage or scale its pictures down"
            )
        rgb = frame.to_ndarray(format="rgb24")
        if self.rgb and rgb.shape != self.rgb[0].shape:
            raise MediaError(
                f"{self.file}: the picture size changes from {self.rgb[0].shape[1::-1]} to {rgb.shape[1::-1]}; "
                "expected one size, re-encode the clip"
            )
        self.rgb.append(rgb)
        self.seconds.append(frame_time(frame) if seconds is None else seconds)

    def result(self, stream) -> Video | None:
        if not self.rgb:
            return None
        fps = frame_rate(stream)
        seconds = fill_times(np.array(self.seconds), fps)
        order = np.argsort(seconds, kind="stable")
        seconds = seconds[order]
        return Video(np.stack([self.rgb[i] for i in order]), fps, float(seconds[0]), seconds - seconds[0])


class AudioReader:
    """Collects sound in `parts`, a list or what stands for one; a packet lost between others would shift all that follows,
    so it is an error."""

    def __init__(self, file, parts=None):
        self.file, self.parts, self.start_s, self.losses = file, [] if parts is None else parts, np.nan, []
        self.rate = self.channels = self.num_samples = 0

    def note_missing(self):
        self.losses.append(len(self.parts))

    def add(self, frame):
        x = _frame_samples(frame)
        if len(self.parts) and (x.shape[1] != self.channels or frame.sample_rate != self.rate):
            raise MediaError(f"{self.file}: the sound's rate or channels change inside the file; expected one, re-encode it")
        if not len(self.parts):
            self.start_s, self.rate, self.channels = frame_time(frame), frame.sample_rate, x.shape[1]
        self.parts.append(x)
        self.num_samples += len(x)

    def result(self, stream, whole=np.concatenate) -> Audio | None:
        """What was read, its samples whole(parts); None for no sample."""
        if not self.num_samples:
            return None
        if any(0 < n < len(self.parts) for n in self.losses):
            raise MediaError(f"{self.file}: {len(self.losses)} sound packets cannot be decoded; fetch the file again")
        start, context = 0.0 if np.isnan(self.start_s) else self.start_s, stream.codec_context
        return Audio(whole(self.parts), self.rate, start, _subtype(context), context.codec.canonical_name)


def frame_rate(stream) -> float:
    """Pictures a second as the file says, else Grid's."""
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return float(rate) if rate else presets.GRID_FPS


def frame_time(frame) -> float:
    """Seconds in the container, NaN where the file does not say."""
    stamp = frame.pts if frame.pts is not None else frame.dts
    return float(stamp * frame.time_base) if stamp is not None and frame.time_base else np.nan


def fill_times(seconds: np.ndarray, fps: float) -> np.ndarray:
    """Times (T,) with the missing ones put on the clip's own frame raster, from its first known time (else 0)."""
    known = np.flatnonzero(~np.isnan(seconds))
    raster = np.arange(len(seconds)) / fps
    if len(known):
        raster += seconds[known[0]] - raster[known[0]]
    return np.where(np.isnan(seconds), raster, seconds)


def _frame_samples(frame) -> np.ndarray:
    """One audio frame -> (n, C) float32; integers by their full scale."""
    x = frame.to_ndarray()
    channels = frame.layout.nb_channels
    x = x.T if frame.format.is_planar else x.reshape(-1, channels)
    if x.dtype.kind == "u":
        return ((x.astype(np.float64) - 128) / 128).astype(np.float32)
    if x.dtype.kind == "i":
        return (x / float(2 ** (8 * x.dtype.itemsize - 1))).astype(np.float32)
    return x.astype(np.float32)


def _subtype(context) -> str:
    """soundfile subtype that holds what the codec holds; lossy codecs decode to float and go back as PCM_16."""
    name = context.codec.canonical_name
    if name.startswith("pcm_f"):
        return "DOUBLE" if "64" in name else "FLOAT"
    if name in ("pcm_u8", "pcm_s8"):
        return "PCM_U8"
    lossless = name.startswith("pcm_s") or name in ("flac", "alac")
    if not lossless or context.format.bytes <= 2:
        return "PCM_16"
    # 24 bits arrive in the upper part of 32-bit frames; only plain 32-bit PCM fills them
    return "PCM_32" if name.startswith("pcm_s32") else "PCM_24"


def one_line(error: Exception) -> str:
    """What an error says, without line breaks and, where a library puts them before it, number and path."""
    return " ".join(str(getattr(error, "strerror", None) or getattr(error, "error_string", None) or error).split())
