"""avsi_jax.media.clip_source.write_clip and muxing: written clips against the packets, samples and times of their sources."""

import fractions
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from avsi_jax.media import clip_io, clip_source, muxing
from tests.support import video_files
from tests.support.video_files import FRAMES, RATE, assert_same, grid_clips, make, noise


@pytest.fixture
def made(once):
    return video_files.made(once)


def packets(path):
    import av

    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def heard_after(x, of, rate):
    """Seconds by which x (N,) lags `of` (M,)."""
    size = 2**19
    match = np.fft.irfft(np.fft.rfft(x, size) * np.conj(np.fft.rfft(of, size)))
    place = int(np.argmax(match))
    return (place if place < size // 2 else place - size) / rate


def written(source, target, **how):
    warnings = clip_source.write_clip(source, target, (block for _, block in source.blocks(10_007)), **how)
    return clip_io.read_clip(target), warnings


def assert_in_step(new, old, path, target):
    """The same pictures at the same times, and the sound where it was by what both files say of their lag."""
    assert packets(target) == packets(path)
    np.testing.assert_array_equal(new.video.rgb, old.video.rgb)
    np.testing.assert_allclose(new.video.times, old.video.times, atol=1e-3)
    x = clip_io.resample(new.audio.samples[:, 0], new.audio.rate, old.audio.rate)
    moved = heard_after(x, old.audio.samples[:, 0], old.audio.rate)
    lag = [clip_io.audio_lag_s(clip) for clip in (new, old)]
    assert abs(moved + lag[1] - lag[0]) < 1e-3


def assert_whole(new, old, bits):
    """The samples are there, at the depth that they are kept with."""
    assert len(new.audio.samples) == len(old.audio.samples) and new.audio.rate == old.audio.rate
    wanted = old.audio.samples
    if bits:
        wanted = (np.rint(wanted.astype(np.float64) * 2 ** (bits - 1)) / 2 ** (bits - 1)).astype(np.float32)
    np.testing.assert_array_equal(new.audio.samples, wanted)


@pytest.mark.parametrize("suffix, codec", [(".mkv", "flac"), (".mp4", "flac"), (".mov", "pcm_s16le")])
def test_a_grid_clip_with_its_own_frames(grid_dir, tmp_path, suffix, codec):
    path, target = grid_clips(grid_dir)[suffix == ".mov"], tmp_path / f"out{suffix}"
    with clip_source.open_source(path) as source:
        new, warnings = written(source, target)
    old = clip_io.read_clip(path)
    assert_in_step(new, old, path, target)
    assert_whole(new, old, 16)
    assert warnings == () and new.audio.codec == codec and new.video.fps == old.video.fps


def test_a_grid_clip_stays_one(grid_dir, tmp_path):
    """Its sound is MP2 again, as long as it was, in step, and its untold lag is still known."""
    path, target = grid_clips(grid_dir)[0], tmp_path / "out.mpg"
    with clip_source.open_source(path) as source:
        new, warnings = written(source, target)
    old = clip_io.read_clip(path)
    assert_in_step(new, old, path, target)
    assert len(warnings) == 1 and "MP2" in warnings[0] and clip_io.audio_lag_s(new) == pytest.approx(0.0110)
    assert len(new.audio.samples) == 131_328 and new.audio.samples.shape[1] == 2
    assert np.abs(new.audio.samples[481:] - old.audio.samples[481:]).mean() < 0.002


@pytest.mark.parametrize(
    "name, suffix, codec, subtype, bits",
    [
        ("open_gop.mkv", ".mp4", "flac", "PCM_24", 24),
        ("open_gop.mkv", ".mov", "pcm_s24le", "PCM_24", 24),
        ("open_gop.mkv", ".mkv", "flac", "PCM_24", 24),
        ("refresh.mp4", ".mkv", "flac", "PCM_16", 16),
        ("float.mov", ".mkv", "pcm_f32le", "FLOAT", None),
        ("float.mov", ".mov", "pcm_f32le", "FLOAT", None),
        ("float.mov", ".mp4", "flac", "PCM_24", 24),
        ("uneven.mkv", ".mp4", "flac", "PCM_16", 16),
        ("uneven.mkv", ".mkv", "flac", "PCM_16", 16),
        ("b.mpg", ".mp4", "flac", "PCM_16", 16),
    ],
)
def test_frames_are_copied_and_audio_kept(made, tmp_path, name, suffix, codec, subtype, bits):
    target = tmp_path / f"out{suffix}"
    with clip_source.open_source(made(name)) as source:
        new, warnings = written(source, target)
    old = clip_io.read_clip(made(name))
    assert_in_step(new, old, made(name), target)
    assert_whole(new, old, bits)
    assert (new.audio.codec, new.audio.subtype) == (codec, subtype)
    assert (len(warnings) == 1 and "24 bit" in warnings[0]) if name == "float.mov" and suffix == ".mp4" else warnings == ()


@pytest.mark.parametrize("rate, kept", [(44_100, 44_100), (11_025, 16_000), (96_000, 48_000)])
def test_audio_of_an_mpg_is_in_step(tmp_path, rate, kept):
    path, target = make(tmp_path / "in.mkv", "mpeg1video", "pcm_s16le", rate=rate, late_s=0.1), tmp_path / "out.mpg"
    with clip_source.open_source(path) as source:
        new, warnings = written(source, target)
    assert_in_step(new, clip_io.read_clip(path), path, target)
    assert new.audio.rate == kept and new.audio.codec == "mp2" and len(warnings) == 1 + (rate != kept)
    assert len(new.audio.samples) / kept >= 3.0  # nothing is cut off its end
    assert new.audio.start_s < new.video.start_s  # so that nobody takes it for Grid's


def test_frames_that_a_source_hides_stay_hidden_or_are_told_of(tmp_path):
    """As a phone trims a film: the pictures up to the cut stay in the file, before time 0."""
    import av

    path = make(tmp_path / "whole.mp4", "libx264", "aac", bf="0")
    with av.open(str(path)) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        copies = {stream.index: cut.add_stream_from_template(stream) for stream in whole.streams}
        for packet in [packet for packet in whole.demux() if packet.size]:
            earlier = round(fractions.Fraction(2, 5) / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - earlier, packet.dts - earlier, copies[packet.stream.index]
            cut.mux(packet)
    old = clip_io.read_clip(tmp_path / "cut.mp4")
    assert len(old.video.times) == FRAMES - 10
    with clip_source.open_source(tmp_path / "cut.mp4") as source:
        assert_same(source, old)
        new, warnings = written(source, tmp_path / "out.mp4")
        assert_in_step(new, old, tmp_path / "cut.mp4", tmp_path / "out.mp4")
        assert warnings == ()
        new, warnings = written(source, tmp_path / "out.mkv")
    assert len(warnings) == 1 and warnings[0].startswith("10 pictures") and len(new.video.times) == FRAMES
    assert new.audio.start_s - new.video.start_s == pytest.approx(0.4, abs=1e-3)


def test_an_mpg_whose_frames_lie_too_close_is_told_of(tmp_path, monkeypatch):
    """The times of the written file are looked at: here a picture's is wrong."""
    path = make(tmp_path / "in.mkv", "mpeg1video", "pcm_s16le", rate=44_100)
    read = muxing._times
    late = lambda path, target: (read(path, target)[0] + 0.04 * (np.arange(FRAMES) == 70) * path.name.endswith("mpg"), 0)
    monkeypatch.setattr(muxing, "_times", lambda path, target: late(type(target)(path), target))
    with clip_source.open_source(path) as source:
        assert "does not tell every small picture's time" in written(source, tmp_path / "out.mpg")[1][-1]


def test_what_a_target_cannot_hold_is_refused(made, tmp_path):
    soundfile.write(tmp_path / "six.wav", noise(1000, 6), RATE, subtype="FLOAT")
    six, video_file = clip_source.open_source(tmp_path / "six.wav"), clip_source.open_source(made("open_gop.mkv"))
    arrays = clip_source.source_of(
        clip_io.Clip("arrays", video_file._film.read(0, 1), clip_io.read_clip(tmp_path / "six.wav").audio)
    )
    for source, name, said in [
        (video_file, "a.avi", "found suffix '.avi', expected one of"),
        (video_file, "a.mpg", "holds no h264 pictures; name the target .mkv or .mp4"),
        (video_file, "none/a.mkv", "cannot be written .No such file"),
        (six, "a.mp4", "holds no pictures; name the target .wav"),
        (six, "a.flac", "flac cannot hold subtype FLOAT; name the file .wav"),
        (arrays, "a.mkv", "is no file whose pictures could be copied"),
    ]:
        with pytest.raises(clip_io.MediaError, match=said) as error:
            written(source, tmp_path / name)
        assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["six.wav"]


@pytest.mark.parametrize("suffix", [".wav", ".mkv"])
def test_a_file_appears_whole_or_not_at_all(made, tmp_path, suffix):
    target = tmp_path / f"out{suffix}"
    with clip_source.open_source(made("float.mov")) as source:
        x = source.audio(0, source.num_samples)

        def broken():
            yield x[:20_000]
            raise RuntimeError("stopped")

        holed = x.copy()
        holed[30_000, 1] = np.nan
        for blocks, error, said in [
            (broken(), RuntimeError, "stopped"),
            ([x[:-1]], clip_io.MediaError, "found 47999 samples to write, expected all 48000"),
            ([x, x], clip_io.MediaError, "found 96000 samples"),
            ([x[:, :1]], clip_io.MediaError, r"shape \(48000, 1\), expected \(n, 2\)"),
            ([holed], clip_io.MediaError, "NaN"),
        ]:
            with pytest.raises(error, match=said):
                clip_source.write_clip(source, target, blocks)
            assert os.listdir(tmp_path) == []
        target.write_text("mine")
        with pytest.raises(FileExistsError, match="--overwrite"):
            clip_source.write_clip(source, target, [x])
        with pytest.raises(clip_io.MediaError):
            clip_source.write_clip(source, target, [x[:9]], overwrite=True)
        assert target.read_text() == "mine"
        clip_source.write_clip(source, target, [x], overwrite=True)
    assert os.listdir(tmp_path) == [target.name]
    np.testing.assert_array_equal(clip_io.read_clip(target).audio.samples, x)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mkv", ".mp4"])
def test_a_disk_without_room_leaves_nothing(made, tmp_path, suffix):
    target, limits = tmp_path / f"out{suffix}", resource.getrlimit(resource.RLIMIT_FSIZE)
    with clip_source.open_source(made("open_gop.mkv")) as source:
        written(source, target)
        size = target.stat().st_size
        target.unlink()
        for room in (size // 2, size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            try:
                with pytest.raises(clip_io.MediaError, match="cannot be written"):
                    written(source, target)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert os.listdir(tmp_path) == []


def test_a_source_may_be_written_over(made, tmp_path):
    path = tmp_path / "a.mkv"
    path.write_bytes(made("open_gop.mkv").read_bytes())
    with clip_source.open_source(path) as source:
        written(source, path, overwrite=True)
    assert packets(path) == packets(made("open_gop.mkv"))


def test_a_wav_too_long_for_its_kind_is_an_rf64(tmp_path, monkeypatch):
    x = noise(20_000)
    soundfile.write(tmp_path / "in.wav", x, RATE, subtype="FLOAT")
    monkeypatch.setattr(muxing, "WAV_BYTES", 79_999)
    with clip_source.open_source(tmp_path / "in.wav") as source:
        new, warnings = written(source, tmp_path / "out.wav")
    assert (tmp_path / "out.wav").read_bytes()[:4] == b"RF64" and "RF64" in warnings[0]
    np.testing.assert_array_equal(new.audio.samples, x)


LONG = """
import resource, sys
import numpy as np
from avsi_jax.media import clip_source
with clip_source.open_source(sys.argv[1]) as source:
    list(source.pictures(0, 1).times), clip_source.write_clip(source, sys.argv[2], (b for _, b in source.blocks(100_000)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clip(tmp_path):
    """Sound of 30 s and of 20 minutes (230 MB decoded), beside pictures: the second takes little more than may stay in memory."""
    import av

    peaks = []
    for name, seconds in (("short", 30), ("long", 1200)):
        block = noise(48_000, 1)
        with av.open(str(tmp_path / f"{name}.mkv"), "w") as out:
            video, audio = out.add_stream("mpeg4", rate=5), out.add_stream("pcm_s16le", rate=48_000, layout="mono")
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            for second in range(seconds):
                for k in range(5):
                    frame = av.VideoFrame.from_ndarray(np.full((72, 64), 40 * k, np.uint8), format="yuv420p")
                    frame.pts, frame.time_base = 5 * second + k, fractions.Fraction(1, 5)
                    out.mux(video.encode(frame))
                frame = av.AudioFrame.from_ndarray(clip_io.to_int16(block).T.copy(), format="s16", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 48_000, 48_000 * second, fractions.Fraction(1, 48_000)
                out.mux(audio.encode(frame))
            out.mux(video.encode(None))
        command = [sys.executable, "-c", LONG, str(tmp_path / f"{name}.mkv"), str(tmp_path / f"{name}.out.mkv")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 2 * clip_source.IN_MEMORY / 2**20
