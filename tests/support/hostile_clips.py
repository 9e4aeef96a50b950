"""174 malicious or broken clips, the same bytes every time; with the 26 weights of tests/support/hostile_weights.py, 200 inputs.

`clips(folder)` writes and lists them; `canary(folder)` writes the files that playlists refer to. They are made from a synthetic
clip of 1.2 s with a gap in its audio, in every file format that is read.
"""

import gzip
import io
import os
import struct
import tarfile
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

GAP = (0.4, 0.6)
SECRET = "canary-5f1d9c7e-must-not-be-read"
KINDS = ("mpg", "mp4", "mkv", "mov", "avi", "wav", "flac")
REFUSED, DONE, EITHER = "refused", "done", "either"  # expected outcomes of an input


class Input(NamedTuple):
    """kind: its class. expected: REFUSED, DONE or EITHER. default: one of the six that every test run uses."""

    path: Path
    kind: str
    expected: str
    default: bool


class Maker:
    """Numbers the inputs and writes them, either all or (few) the default ones."""

    def __init__(self, folder: Path, few: bool):
        self.folder, self.few, self.count, self.made = folder, few, 0, []
        folder.mkdir()

    def add(self, kind: str, name: str, data, expected: str = EITHER, *, default: bool = False, exact: bool = False) -> None:
        """data: bytes, or a function of the path that writes them. Stems differ, since the outputs share one folder."""
        self.count += 1
        if self.few and not default:
            return
        path = self.folder / (name if exact else f"{self.count:03d} {kind} {name}")
        if callable(data):
            data(path)
        else:
            path.write_bytes(data)
        self.made.append(Input(path, kind, expected, default))


# ---- valid clips ----------------------------------------------------------------------------------------------------------------


def waveform(rate: int) -> np.ndarray:
    """(N,) float32, 1.2 s of a modulated tone with noise, silent in GAP."""
    time = np.arange(round(1.2 * rate)) / rate
    x = 0.2 * np.sin(2 * np.pi * 140 * time) * (1 + 0.5 * np.sin(2 * np.pi * 3 * time))
    x += np.random.default_rng(0).normal(0, 0.02, len(time))
    x[(time >= GAP[0]) & (time < GAP[1])] = 0
    return x.astype(np.float32)


def video_file(path: Path, container: str, video_codec: str, audio_codec: str, pixels: str = "yuv420p", rate: int = 16_000) -> None:
    """Writes a clip with 30 video frames of 64x48 and the audio."""
    import av

    samples = np.rint(32_767 * waveform(rate)).astype(np.int16)[None]
    with av.open(str(path), "w", format=container, options={"movflags": "faststart"} if container in ("mp4", "mov") else {}) as out:
        video, audio = out.add_stream(video_codec, rate=25), out.add_stream(audio_codec, rate=rate, layout="mono")
        video.width, video.height, video.pix_fmt, video.thread_count = 64, 48, pixels, 1
        for k in range(30):
            rgb = np.full((48, 64, 3), 4 * k, np.uint8)
            rgb[10:20, k : k + 8] = 255
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = k, Fraction(1, 25)
            out.mux(video.encode(frame))
        resampler = av.AudioResampler(audio.format, "mono", rate, audio.codec_context.frame_size or 1024)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(audio.encode(piece))
        for stream in (video, audio):
            out.mux(stream.encode(None))


def valid_clips(folder: Path) -> dict[str, bytes]:
    """A valid clip in every format: {suffix: bytes}."""
    import soundfile

    folder.mkdir()
    video_file(folder / "a.mpg", "mpeg", "mpeg1video", "mp2", rate=44_100)
    video_file(folder / "a.mp4", "mp4", "mpeg4", "aac")
    video_file(folder / "a.mkv", "matroska", "mpeg4", "flac")
    video_file(folder / "a.mov", "mov", "mjpeg", "pcm_s16le", "yuvj420p")
    video_file(folder / "a.avi", "avi", "mpeg4", "pcm_s16le")
    for kind in ("wav", "flac"):
        soundfile.write(folder / f"a.{kind}", waveform(16_000), 16_000, "PCM_16")
    return {kind: (folder / f"a.{kind}").read_bytes() for kind in KINDS}


def canary(folder: Path) -> dict[str, Path]:
    """Files that playlists refer to and that must not be opened: a text, and a video that could be played."""
    folder.mkdir()
    (folder / "canary.txt").write_text(f"{SECRET}\n" * 20)
    video_file(folder / "canary.ts", "mpegts", "mpeg1video", "mp2", rate=44_100)
    return {name: folder / f"canary.{name}" for name in ("txt", "ts")}


# ---- clips -----------------------------------------------------------------------------------------------------------------------


def clips(folder: Path, named: dict[str, Path], few: bool = False) -> list[Input]:
    """174 of them, or 5."""
    valid, maker = valid_clips(folder.parent / "valid"), Maker(folder, few)
    _fuzzed(maker, valid)
    _empty(maker)
    _false_audio_headers(maker, valid)
    _false_video_headers(maker, valid)
    _bombs(maker)
    _playlists(maker, named)
    _other_files(maker, valid)
    _extreme_samples(maker)
    _special_files(maker, valid)
    return maker.made


def _fuzzed(maker: Maker, valid) -> None:
    """Bytes changed at random in the header and after it, and truncated files."""
    for place, (kind, data) in enumerate(valid.items()):
        for seed in range(4):
            rng = np.random.default_rng([place, seed])
            changed = np.frombuffer(data, np.uint8).copy()
            reach = (64, 256, 1024, 2048)[seed]
            at = rng.integers(4, min(reach, len(data)), 1 + 4 * seed)
            changed[at] = rng.integers(0, 256, len(at))
            maker.add("header", f"{seed}.{kind}", changed.tobytes(), default=seed == 1 and kind == "mp4")
        rng = np.random.default_rng([place, 9])
        changed = np.frombuffer(data, np.uint8).copy()
        changed[rng.integers(0, len(data), 200)] = rng.integers(0, 256, 200)
        maker.add("body", f"x.{kind}", changed.tobytes())
        maker.add("cut", f"head.{kind}", data[:40])
        maker.add("cut", f"half.{kind}", data[: len(data) // 2])


def _empty(maker: Maker) -> None:
    for kind in KINDS:
        maker.add("empty", f"none.{kind}", b"", REFUSED)
    for kind in ("mpg", "mp4", "mkv", "wav"):
        maker.add("empty", f"zeros.{kind}", bytes(4096), REFUSED)


def wav(data: bytes, *, tag=1, channels=1, rate=16_000, bits=16, align=None, size=None, riff=None, extra=b"") -> bytes:
    """A .wav file whose header has these values."""
    align = max(1, channels * bits // 8) if align is None else align
    form = struct.pack("<HHIIHH", tag, channels, rate, min(rate * align, 2**32 - 1), align % 65536, bits) + extra
    size = len(data) if size is None else size
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


def _false_audio_headers(maker: Maker, valid) -> None:
    """Headers with false or extreme rates, channels, bits and lengths."""
    pcm = np.rint(32_767 * waveform(16_000)).astype("<i2").tobytes()
    headers = {
        "rate 0": {"rate": 0}, "rate 1": {"rate": 1}, "rate most": {"rate": 2**32 - 1},
        "rate prime": {"rate": 2**31 - 1}, "channels 0": {"channels": 0, "align": 2}, "channels 1024": {"channels": 1024},
        "channels most": {"channels": 65_535}, "bits 0": {"bits": 0}, "bits 3": {"bits": 3}, "bits most": {"bits": 65_535},
        "align 0": {"align": 0}, "size most": {"size": 2**32 - 1}, "riff 0": {"riff": 0}, "tag none": {"tag": 0x7777},
        "tag adpcm": {"tag": 2, "bits": 4, "extra": struct.pack("<HHH", 32, 65_535, 7)},
    }  # fmt: skip
    for name, fields in headers.items():
        maker.add("claim", f"{name}.wav", wav(pcm, **fields))
    rf64 = b"RF64\xff\xff\xff\xffWAVEds64" + struct.pack("<IQQQI", 28, 2**62, 2**62, 2**61, 0) + wav(pcm, size=2**32 - 1)[12:]
    maker.add("claim", "rf64.wav", rf64)
    flac = valid["flac"]
    bits = int.from_bytes(flac[18:26], "big")  # rate 20, channels 3, bits 5, samples 36
    of = lambda bits: flac[:18] + bits.to_bytes(8, "big") + flac[26:]
    maker.add("claim", "samples most.flac", of(bits | (2**36 - 1)))
    maker.add("claim", "samples none.flac", of(bits & ~(2**36 - 1)))
    maker.add("claim", "rate most.flac", of(bits | (2**20 - 1) << 44))
    maker.add("claim", "channels.flac", of(bits | 7 << 41))
    maker.add("claim", "block.flac", flac[:4] + b"\x00\xff\xff\xff" + flac[8:])
    maker.add("claim", "picture.flac", flac[:42] + b"\x06\xff\xff\xff" + struct.pack(">II", 3, 2**31) + flac[42:])


def _false_video_headers(maker: Maker, valid) -> None:
    """Headers with false or extreme sizes, counts and lengths of video frames and tables."""

    def put(kind: str, name: str, mark: bytes, offset: int, value: bytes, **options) -> None:
        data = valid[kind]
        at = data.index(mark) + offset
        maker.add("claim", f"{name}.{kind}", data[:at] + value + data[at + len(value) :], **options)

    put("mpg", "size", b"\0\0\1\xb3", 4, b"\xff\xff\xff", default=True)
    put("mpg", "size 0", b"\0\0\1\xb3", 4, b"\0\0\0")
    maximum = b"\xff\xff\xff\xff"
    for kind in ("mp4", "mov"):
        coded = b"mp4v" if kind == "mp4" else b"jpeg"
        put(kind, "size", coded + bytes(6), 28, b"\xff\xff\xff\xff")
        put(kind, "time 1", b"mdhd", 16, b"\0\0\0\1")
        put(kind, "time 0", b"mdhd", 16, b"\0\0\0\0")
        put(kind, "duration", b"stts", 8, maximum + maximum)
        put(kind, "sizes", b"stsz", 8, maximum + maximum)
        put(kind, "offset", b"stco", 12, maximum)
        put(kind, "box", b"moov", -4, maximum)
    put("mkv", "size", b"\xb0\x81\x40", 1, b"\x84\x7f\xff\xff\xff")
    put("mkv", "rate nan", b"\xb5\x88", 2, struct.pack(">d", np.nan))
    put("mkv", "rate huge", b"\xb5\x88", 2, struct.pack(">d", 1e300))
    put("mkv", "duration", b"\x44\x89\x88", 3, struct.pack(">d", 1e300))
    put("avi", "size", b"vids", 56 + 8, struct.pack("<II", 2**31 - 1, 2**31 - 1))
    put("avi", "frames", b"avih", 24, maximum)


def png(width: int, height: int) -> bytes:
    """A black image of one bit per pixel, compressed without holding it in memory."""
    pack, rows = zlib.compressobj(9), b"".join(b"\0" + bytes((width + 7) // 8) for _ in range(64))
    data = b"".join(pack.compress(rows) for _ in range(height // 64)) + pack.flush()
    chunk = lambda name, x: struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    )


def png_video(path: Path, kind: str, image: bytes, count: int, header_size: int) -> None:
    """Writes a clip of `count` times one .png, whose header claims frames of header_size x header_size; and the audio."""
    import av

    with av.open(str(path), "w", format=kind) as out:
        video, audio = out.add_stream("png", rate=25), out.add_stream("pcm_s16le", rate=16_000, layout="mono")
        video.width, video.height, video.pix_fmt = header_size, header_size, "monob"
        out.start_encoding()
        for k in range(count):
            packet = av.Packet(image)
            packet.pts = packet.dts = round(k / 25 / video.time_base)
            packet.stream, packet.time_base, packet.is_keyframe = video, video.time_base, True
            out.mux(packet)
        samples = np.rint(32_767 * waveform(16_000)).astype("<i2")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
        out.mux(audio.encode(frame))


def _bombs(maker: Maker) -> None:
    """Small files that decode to a lot of data."""
    import soundfile

    for name, kind, size, count, header_size in (
        ("one", "mov", 16_128, 1, 16_128), ("hidden", "mov", 16_128, 1, 64), ("video", "avi", 4096, 60, 4096),
        ("hidden video", "avi", 4096, 60, 64),
    ):  # fmt: skip
        make = lambda path, kind=kind, size=size, rest=(count, header_size): png_video(path, kind, png(size, size), *rest)
        maker.add("bomb", f"{name}.{kind}", make)

    def silent(path: Path) -> None:
        with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16", format="FLAC") as out:
            for _ in range(60):
                out.write(np.zeros(2**20, np.int16))

    maker.add("bomb", "silence.flac", silent)


def _playlists(maker: Maker, named: dict[str, Path]) -> None:
    """Files that refer to other files, in place of a clip."""
    video_file, text = named["ts"].as_posix(), named["txt"].as_posix()
    hls = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\n{video_file}\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile '{video_file}'\n".encode()
    sdp = f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns={text}\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n".encode()
    mpd = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1.2S">'
        f'<Period><AdaptationSet mimeType="video/mp2t"><Representation id="0"><BaseURL>file://{video_file}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>"
    ).encode()
    for kind in KINDS:
        maker.add("list", f"hls.{kind}", hls, REFUSED, default=kind == "mp4")
    for kind in ("mpg", "mp4", "mkv", "mov", "avi"):
        maker.add("list", f"concat.{kind}", concat, REFUSED)
    for kind in ("mpg", "mp4", "mkv"):
        maker.add("list", f"sdp.{kind}", sdp, REFUSED)
        maker.add("list", f"dash.{kind}", mpd, REFUSED)
    url = b"\0\0\0\1" + struct.pack(">I", 12 + 1 + len(video_file)) + b"url \0\0\0\0file://" + video_file.encode() + b"\0"
    maker.add("list", "box.mov", struct.pack(">I", 8 + len(url)) + b"moov" + url, REFUSED)
    maker.add("list", "asx.avi", f'<asx version="3.0"><entry><ref href="file://{video_file}"/></entry></asx>'.encode(), REFUSED)
    maker.add("list", "text.mp4", f"file://{text}\n".encode(), REFUSED)
    maker.add("list", "meta.mpg", f";FFMETADATA1\ntitle={text}\n".encode(), REFUSED)


def _other_files(maker: Maker, valid) -> None:
    """Files that are not clips under a clip's name."""
    packed, archive = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../../outside.wav", bytes(2**25))
    with tarfile.open(fileobj=archive, mode="w") as file:
        file.addfile(tarfile.TarInfo("../../outside.wav"), io.BytesIO())
    page = b"<!doctype html><script>document.title='x'</script><img src=x onerror=alert(1)>" * 20
    for name, data in {
        "text.mp4": b"this is not a video, it is a text\n" * 50, "page.mov": page, "json.mkv": b'{"a": [1, 2]}' * 99,
        "zip bomb.mp4": packed.getvalue(), "gzip bomb.mkv": gzip.compress(bytes(2**25)), "tar.avi": archive.getvalue(),
        "pickle.wav": b"\x80\x04cos\nsystem\n(S'touch outside'\ntR.", "program.flac": b"\x7fELF" + bytes(500),
        "drawing.mpg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>" * 9,
        "script.mpeg": b"#!/bin/sh\ntouch outside\n" * 30, "noise.avi": np.random.default_rng(1).bytes(5000),
    }.items():  # fmt: skip
        maker.add("other", name, data, EITHER if name.startswith("noise") else REFUSED)
    maker.add("other", "video.wav", valid["mp4"])
    maker.add("other", "audio.mp4", valid["wav"])
    maker.add("other", "avi.mkv", valid["avi"])


def _extreme_samples(maker: Maker) -> None:
    """Audio of numbers that are not finite, or extreme."""
    x = waveform(16_000)
    odd = {"nan": np.nan, "inf": np.inf, "minus inf": -np.inf}
    for name, value in odd.items():
        samples = x.copy()
        samples[1000] = value
        maker.add("extreme", f"{name}.wav", wav(samples.tobytes(), tag=3, bits=32), REFUSED)
    for name, samples in {
        "nan all": np.full(9000, np.nan), "tiny": np.full(9000, 1e-42), "large": np.where(x > 0, 3e38, -3e38),
        "square": np.where(np.arange(9000) // 40 % 2, 1.0, -1.0), "one": x[:1], "two": x[:2],
        "silent": 0 * x, "constant": 0 * x + 1,
    }.items():  # fmt: skip
        maker.add("extreme", f"{name}.wav", wav(samples.astype("<f4").tobytes(), tag=3, bits=32))
    large = np.where(x > 0, 1e308, -1e308)
    maker.add("extreme", "larger.wav", wav(large.astype("<f8").tobytes(), tag=3, bits=64))
    maker.add("extreme", "none.wav", wav(b""), REFUSED)


def _special_files(maker: Maker, valid) -> None:
    """Files that are not regular files; and valid clips with names that are hard to print."""
    maker.add("no file", "folder.mp4", lambda path: path.mkdir(), REFUSED)
    maker.add("no file", "link.wav", lambda path: path.symlink_to(path.parent / "nowhere.wav"), REFUSED)
    maker.add("no file", "circle.wav", lambda path: path.symlink_to(path), REFUSED)
    maker.add("no file", "endless.wav", lambda path: path.symlink_to("/dev/zero"), REFUSED)
    maker.add("no file", "endless.mpg", lambda path: path.symlink_to("/dev/zero"), REFUSED)
    for kind in ("mp4", "wav"):
        maker.add("no file", f"pipe.{kind}", os.mkfifo, REFUSED, default=kind == "mp4")
    for number, name in enumerate(
        ("-rf --overwrite", "new\nline", "'quoted' \"twice\" `id` $(id)", "\u05d0\u202egnp\U0001f600", os.fsdecode(b"\xff\xfe"),
         "\x1b[31m<b>&amp;", "%03d", "x" * 220, "concat:a|b")
    ):  # fmt: skip
        maker.add("name", f"{name}{number}.wav", valid["wav"], DONE, default=number == 1, exact=True)
