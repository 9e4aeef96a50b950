"""Audio files keep the chunks, tags and speaker masks of their sources, or the warnings name them."""

import struct

import numpy as np
import pytest
import soundfile

from avsi_jax.media import clip_io, clip_source
from tests.support.video_files import noise

RATE = 16_000
BEXT = b"Scene 12, take 7".ljust(256, b"\0") + b"Recorder".ljust(32, b"\0") + struct.pack("<Q", 158_760_000).rjust(322, b"\0")


def chunk(name, content):
    return struct.pack("<4sI", name, len(content)) + content + bytes(len(content) % 2)


def info(**entries):
    return chunk(b"LIST", b"INFO" + b"".join(chunk(name.encode(), text.encode() + b"\0") for name, text in entries.items()))


def wav_form(channels, bits, mask=None):
    """The format chunk by the specification; as WAVEFORMATEXTENSIBLE with a mask."""
    codec = 1 if mask is None else 0xFFFE
    form = struct.pack("<HHIIHH", codec, channels, RATE, RATE * channels * bits // 8, channels * bits // 8, bits)
    if mask is not None:
        form += struct.pack("<HHI", 22, bits, mask) + bytes.fromhex("0100000000001000800000aa00389b71")
    return chunk(b"fmt ", form)


def write_wav(path, *, channels=1, mask=None, before=b"", after=b"", num_samples=4001):
    samples = clip_io.to_int16(noise(num_samples, channels)).astype("<i2").tobytes()
    body = b"WAVE" + wav_form(channels, 16, mask) + before + chunk(b"data", samples) + after
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


def write(path, target):
    """The clip with its own audio as `target`; the warnings."""
    with clip_source.open_source(path) as source:
        return clip_source.write_clip(source, target, [source.audio(0, source.num_samples)])


@pytest.mark.parametrize(
    "parts",
    [
        {"before": chunk(b"bext", BEXT) + info(INAM="Take 7")},
        {"before": chunk(b"bext", BEXT), "after": chunk(b"iXML", b"<BWFXML/>") + info(ICMT="odd length!")},
        {"channels": 6, "mask": 0x60F, "after": chunk(b"cue ", struct.pack("<7I", 1, 1, 0, 0x61746164, 0, 0, 100))},
        {"channels": 2, "mask": 0x600},
        {},
    ],
    ids=["before the samples", "after the samples", "six speakers and cue points", "two speakers at the sides", "nothing"],
)
def test_a_wav_with_unchanged_samples_is_written_as_it_was(tmp_path, parts):
    path = write_wav(tmp_path / "in.wav", **parts)
    assert write(path, tmp_path / "out.wav") == ()
    assert (tmp_path / "out.wav").read_bytes() == path.read_bytes()


def test_chunks_that_describe_the_old_samples_are_not_kept(tmp_path):
    path = write_wav(tmp_path / "in.wav", before=chunk(b"PEAK", bytes(16)), after=chunk(b"bext", BEXT))
    write(path, tmp_path / "out.wav")
    written = (tmp_path / "out.wav").read_bytes()
    assert b"PEAK" not in written and BEXT in written


def test_what_a_flac_cannot_hold_of_a_wav_is_named(tmp_path):
    path = write_wav(tmp_path / "in.wav", channels=6, mask=0x60F, before=chunk(b"bext", BEXT) + info(INAM="Take 7"))
    (warning,) = write(path, tmp_path / "out.flac")
    assert all(part in warning for part in ("out.flac", "bext", "LIST INFO", "speaker mask")) and "\n" not in warning
    with soundfile.SoundFile(tmp_path / "out.flac") as written:
        assert written.title == "Take 7"


def test_a_flac_keeps_its_tags_and_pictures(tmp_path):
    """A picture block is inserted by hand, after the block of tags that libsndfile writes."""
    samples = noise(4000)
    with soundfile.SoundFile(tmp_path / "plain.flac", "w", RATE, 1, "PCM_16") as out:
        out.title, out.artist = "Take 7", "Anna"
        out.write(samples)
    data = (tmp_path / "plain.flac").read_bytes()
    kind, image = b"image/png", b"not really an image"
    picture = struct.pack(">II", 3, len(kind)) + kind + struct.pack(">IIIIII", 0, 1, 1, 24, 0, len(image)) + image
    block = bytes([6]) + len(picture).to_bytes(3, "big") + picture
    (tmp_path / "in.flac").write_bytes(data[:42] + block + data[42:])
    assert write(tmp_path / "in.flac", tmp_path / "out.flac") == ()
    assert picture in (tmp_path / "out.flac").read_bytes()
    with soundfile.SoundFile(tmp_path / "in.flac") as old, soundfile.SoundFile(tmp_path / "out.flac") as new:
        assert (new.title, new.artist) == ("Take 7", "Anna")
        np.testing.assert_array_equal(new.read(), old.read())
    (warning,) = write(tmp_path / "in.flac", tmp_path / "out.wav")
    assert "pictures" in warning
    with soundfile.SoundFile(tmp_path / "out.wav") as new:
        assert new.title == "Take 7"


def test_the_speakers_of_a_container_are_written_into_a_wav(tmp_path):
    """ffmpeg's 5.1(side) is FL FR FC LFE SL SR, the mask 0x60f."""
    import av

    with av.open(str(tmp_path / "in.mov"), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=RATE, layout="5.1(side)")
        out.metadata["title"] = "Take 7"
        samples = clip_io.to_int16(noise(4000, 6)).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="5.1(side)")
        frame.sample_rate = RATE
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert write(tmp_path / "in.mov", tmp_path / "out.wav") == ()
    with av.open(str(tmp_path / "out.wav")) as container:
        assert container.streams.audio[0].layout.name == "5.1(side)" and container.metadata["title"] == "Take 7"
    np.testing.assert_array_equal(
        clip_io.read_clip(tmp_path / "out.wav").audio.samples, clip_io.read_clip(tmp_path / "in.mov").audio.samples
    )


def test_tracks_and_tags_that_a_wav_cannot_hold_are_named(tmp_path):
    import av

    with av.open(str(tmp_path / "in.mka"), "w", format="matroska") as out:
        streams = [out.add_stream("pcm_s16le", rate=RATE, layout="mono") for _ in range(2)]
        out.metadata.update({"title": "Take 7", "LOCATION": "London"})
        for stream in streams:
            frame = av.AudioFrame.from_ndarray(clip_io.to_int16(noise(4000)).reshape(1, -1), format="s16", layout="mono")
            frame.sample_rate = RATE
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    (warning,) = write(tmp_path / "in.mka", tmp_path / "out.wav")
    assert all(part in warning for part in ("LOCATION", "audio track 2")) and "title" not in warning
