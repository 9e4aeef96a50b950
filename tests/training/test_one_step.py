"""Sound and pictures are written in the step of the source, also where its times do not tell it: the 11 ms of Grid's MPEGs."""

import fractions

import numpy as np
import pytest

from avsi_jax import presets
from avsi_jax.media import clip_io, clip_source, grid_mpeg

RATE = 44_100


@pytest.fixture(scope="module")
def as_grid(tmp_path_factory):
    """A clip of 1 s, coded as Grid's are, whose times don't tell of the delay in the sound."""
    folder, rng = tmp_path_factory.mktemp("step"), np.random.default_rng(0)
    video = rng.integers(16, 236, (25, 48, 64)).astype(np.uint8)
    grid_mpeg.write_clip(folder / "told.mpg", video, 25, rng.normal(0, 0.1, RATE).astype(np.float32), RATE)
    return copied(folder / "told.mpg", folder / "grid.mpg", "mpeg")


def copied(source, target, kind, codec=None):
    """As other programs do it: packets as they are or, with a codec, the sound coded anew, both from 0 on."""
    import av

    with av.open(str(source)) as given, av.open(str(target), "w", format=kind) as out:
        video, audio = given.streams.video[0], given.streams.audio[0]
        video_file = out.add_stream_from_template(video)
        first = {}
        waveform = out.add_stream(codec, rate=RATE, layout=audio.layout.name) if codec else out.add_stream_from_template(audio)
        for packet in given.demux(video, audio):
            if packet.stream is audio and codec:
                for frame in packet.decode():
                    frame.pts -= first.setdefault(audio, frame.pts)
                    out.mux(coded(waveform, frame))
            elif packet.size:
                packet.pts -= first.setdefault(packet.stream, packet.pts)
                packet.dts = packet.pts
                packet.stream = video_file if packet.stream is video else waveform
                out.mux(packet)
        out.mux(waveform.encode(None) if codec else [])
    return target


def coded(audio, frame):
    import av

    same = av.AudioResampler(audio.codec_context.format, frame.layout.name, RATE)
    return [packet for part in same.resample(frame) for packet in audio.encode(part)]


def written(path, target):
    with clip_source.open_source(path) as source:
        clip_source.write_clip(source, target, [source.audio(0, source.num_samples)])
        return source.lag_s


def told(path):
    """(lag_s, samples) as they are read back."""
    with clip_source.open_source(path) as source:
        assert source.lag_s == pytest.approx(clip_io.audio_lag_s(clip_io.read_clip(path)), abs=1e-9)
        return source.lag_s, source.audio(0, source.num_samples)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
def test_what_is_written_has_the_lag_of_the_source(as_grid, tmp_path, suffix):
    """Also when it is written once more, from what was written; the samples are the same all along, bit for bit."""
    with clip_source.open_source(as_grid) as source:
        samples = clip_io.from_int16(clip_io.to_int16(source.audio(0, source.num_samples)))
    path = as_grid
    for number in range(3):
        assert written(path, tmp_path / f"{number}{suffix}") == pytest.approx(0.011, abs=1e-3)
        path = tmp_path / f"{number}{suffix}"
        lag_s, again = told(path)
        assert lag_s == pytest.approx(presets.MPEG_AUDIO_LAG_S, abs=1e-3)
        np.testing.assert_array_equal(again, samples)
    old, new = (clip_io.read_clip(p, audio=False).video for p in (as_grid, path))
    np.testing.assert_array_equal(new.rgb, old.rgb)
    np.testing.assert_allclose(new.times, old.times, atol=1e-3)


@pytest.mark.parametrize(("suffix", "kind"), [(".avi", "avi"), (".mkv", "matroska"), (".mov", "mov")])
def test_a_copy_by_other_programs_keeps_it_too(as_grid, tmp_path, suffix, kind):
    """An .avi counts time in pictures: 11 ms are none of them."""
    path = copied(as_grid, tmp_path / f"copy{suffix}", kind)
    assert told(path)[0] == pytest.approx(0.011)
    written(path, tmp_path / "out.mkv")
    assert told(tmp_path / "out.mkv")[0] == pytest.approx(0.011, abs=1e-3)


def test_other_clips_keep_their_own_lag(as_grid, tmp_path):
    """48 kHz isn't Grid's: nothing is untold."""
    import av

    path = tmp_path / "other.mkv"
    with av.open(str(path), "w", format="matroska") as out:
        video_file, audio = out.add_stream("mpeg4", rate=25), out.add_stream("flac", rate=48_000, layout="mono")
        video_file.width, video_file.height, video_file.pix_fmt = 64, 32, "yuv420p"
        for t in range(25):
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), 10 * t, np.uint8), format="rgb24")
            frame.pts, frame.time_base = 40 * t + 80, fractions.Fraction(1, 1000)
            out.mux(video_file.encode(frame))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48_000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, fractions.Fraction(1, 48_000)
        out.mux(audio.encode(frame) + audio.encode(None) + video_file.encode(None))
    assert written(path, tmp_path / "out.mp4") == pytest.approx(0.08, abs=1e-3)
    assert told(tmp_path / "out.mp4")[0] == pytest.approx(0.08, abs=1e-3)


@pytest.mark.parametrize(("suffix", "kind", "codec"), [(".mkv", "matroska", "flac"), (".mov", "mov", "pcm_s16le")])
def test_grid_audio_coded_anew_without_loss_is_known_by_its_length(grid_dir, as_grid, tmp_path, suffix, kind, codec):
    real = copied(grid_dir / "s1" / "bbaz5s.mpg", tmp_path / f"real{suffix}", kind, codec)
    assert told(real)[0] == pytest.approx(0.011)
    assert told(copied(as_grid, tmp_path / f"other{suffix}", kind, codec))[0] == pytest.approx(0.0, abs=1e-6)


def test_a_grid_clip(grid_dir, tmp_path):
    for suffix in (".mkv", ".mp4", ".mov", ".mpg"):
        written(grid_dir / "s1" / "bbaz5s.mpg", tmp_path / f"out{suffix}")
        assert told(tmp_path / f"out{suffix}")[0] == pytest.approx(0.011, abs=1e-3)
