"""Files are written with the audio lag of their source, also for Grid's MPEGs, whose time stamps do not show the lag of 11 ms."""

import fractions

import numpy as np
import pytest

from avsi_jax import presets
from avsi_jax.media import clip_io, clip_source, grid_mpeg

RATE = 44_100


@pytest.fixture(scope="module")
def grid_copy(tmp_path_factory):
    """A clip of 1 s encoded as Grid's clips are, whose time stamps do not show the audio lag."""
    folder, rng = tmp_path_factory.mktemp("lag"), np.random.default_rng(0)
    video = rng.integers(16, 236, (25, 48, 64)).astype(np.uint8)
    grid_mpeg.write_clip(folder / "original.mpg", video, 25, rng.normal(0, 0.1, RATE).astype(np.float32), RATE)
    return copy(folder / "original.mpg", folder / "copy.mpg", "mpeg")


def copy(source, target, container, codec=None):
    """Copies the packets as other programs do, both streams from time 0; with a codec the audio is encoded again."""
    import av

    with av.open(str(source)) as given, av.open(str(target), "w", format=container) as out:
        video, audio = given.streams.video[0], given.streams.audio[0]
        video_out = out.add_stream_from_template(video)
        audio_out = out.add_stream(codec, rate=RATE, layout=audio.layout.name) if codec else out.add_stream_from_template(audio)
        first = {}
        for packet in given.demux(video, audio):
            if packet.stream is audio and codec:
                for frame in packet.decode():
                    frame.pts -= first.setdefault(audio, frame.pts)
                    out.mux(encoded(audio_out, frame))
            elif packet.size:
                packet.pts -= first.setdefault(packet.stream, packet.pts)
                packet.dts = packet.pts
                packet.stream = video_out if packet.stream is video else audio_out
                out.mux(packet)
        out.mux(audio_out.encode(None) if codec else [])
    return target


def encoded(stream, frame):
    """The packets of an audio frame in the sample format of a stream."""
    import av

    resampler = av.AudioResampler(stream.codec_context.format, frame.layout.name, RATE)
    return [packet for part in resampler.resample(frame) for packet in stream.encode(part)]


def rewrite(path, target):
    """Writes a clip with its own audio; returns the lag of the source in s."""
    with clip_source.open_source(path) as source:
        clip_source.write_clip(source, target, [source.audio(0, source.num_samples)])
        return source.lag_s


def read(path):
    """(audio lag in s, samples) of a file."""
    with clip_source.open_source(path) as source:
        assert source.lag_s == pytest.approx(clip_io.audio_lag_s(clip_io.read_clip(path)), abs=1e-9)
        return source.lag_s, source.audio(0, source.num_samples)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
def test_a_written_file_has_the_lag_of_its_source(grid_copy, tmp_path, suffix):
    """Also after writing it again twice; the samples stay the same bit for bit."""
    with clip_source.open_source(grid_copy) as source:
        samples = clip_io.from_int16(clip_io.to_int16(source.audio(0, source.num_samples)))
    path = grid_copy
    for number in range(3):
        assert rewrite(path, tmp_path / f"{number}{suffix}") == pytest.approx(0.011, abs=1e-3)
        path = tmp_path / f"{number}{suffix}"
        lag_s, written = read(path)
        assert lag_s == pytest.approx(presets.MPEG_AUDIO_LAG_S, abs=1e-3)
        np.testing.assert_array_equal(written, samples)
    old, new = (clip_io.read_clip(p, audio=False).video for p in (grid_copy, path))
    np.testing.assert_array_equal(new.rgb, old.rgb)
    np.testing.assert_allclose(new.times, old.times, atol=1e-3)


@pytest.mark.parametrize(("suffix", "container"), [(".avi", "avi"), (".mkv", "matroska"), (".mov", "mov")])
def test_a_copy_by_another_program_keeps_the_lag(grid_copy, tmp_path, suffix, container):
    """An .avi counts time in video frames, so it cannot store 11 ms."""
    path = copy(grid_copy, tmp_path / f"copy{suffix}", container)
    assert read(path)[0] == pytest.approx(0.011)
    rewrite(path, tmp_path / "out.mkv")
    assert read(tmp_path / "out.mkv")[0] == pytest.approx(0.011, abs=1e-3)


def test_other_clips_keep_their_own_lag(grid_copy, tmp_path):
    """Audio at 48 kHz is not from Grid, so its time stamps are complete."""
    import av

    path = tmp_path / "other.mkv"
    with av.open(str(path), "w", format="matroska") as out:
        video, audio = out.add_stream("mpeg4", rate=25), out.add_stream("flac", rate=48_000, layout="mono")
        video.width, video.height, video.pix_fmt = 64, 32, "yuv420p"
        for t in range(25):
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), 10 * t, np.uint8), format="rgb24")
            frame.pts, frame.time_base = 40 * t + 80, fractions.Fraction(1, 1000)
            out.mux(video.encode(frame))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48_000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, fractions.Fraction(1, 48_000)
        out.mux(audio.encode(frame) + audio.encode(None) + video.encode(None))
    assert rewrite(path, tmp_path / "out.mp4") == pytest.approx(0.08, abs=1e-3)
    assert read(tmp_path / "out.mp4")[0] == pytest.approx(0.08, abs=1e-3)


@pytest.mark.parametrize(("suffix", "container", "codec"), [(".mkv", "matroska", "flac"), (".mov", "mov", "pcm_s16le")])
def test_losslessly_encoded_grid_audio_is_recognised_by_its_length(grid_dir, grid_copy, tmp_path, suffix, container, codec):
    real = copy(grid_dir / "s1" / "bbaz5s.mpg", tmp_path / f"real{suffix}", container, codec)
    assert read(real)[0] == pytest.approx(0.011)
    assert read(copy(grid_copy, tmp_path / f"other{suffix}", container, codec))[0] == pytest.approx(0.0, abs=1e-6)


def test_a_rewritten_grid_clip_keeps_its_lag(grid_dir, tmp_path):
    for suffix in (".mkv", ".mp4", ".mov", ".mpg"):
        rewrite(grid_dir / "s1" / "bbaz5s.mpg", tmp_path / f"out{suffix}")
        assert read(tmp_path / f"out{suffix}")[0] == pytest.approx(0.011, abs=1e-3)
