"""Clips written by write_clip have the video packets, the times and the new audio samples of their sources."""

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
from tests.support.video_files import FRAMES, RATE, assert_same, grid_clips, noise, write_video


@pytest.fixture
def video_path(once):
    return video_files.video_paths(once)


def packets(path):
    import av

    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def lag_of(x, reference, rate):
    """Seconds by which x (N,) lags the reference (M,), by cross-correlation."""
    size = 2**19
    correlation = np.fft.irfft(np.fft.rfft(x, size) * np.conj(np.fft.rfft(reference, size)))
    peak = int(np.argmax(correlation))
    return (peak if peak < size // 2 else peak - size) / rate


def write(source, target, **options):
    """Writes a source with its own audio; (the new clip, warnings)."""
    warnings = clip_source.write_clip(source, target, (block for _, block in source.blocks(10_007)), **options)
    return clip_io.read_clip(target), warnings


def assert_same_av_offset(new, old, path, target):
    """The same frames at the same times, and the audio at the same time relative to them, given the lag of both files."""
    assert packets(target) == packets(path)
    np.testing.assert_array_equal(new.video.rgb, old.video.rgb)
    np.testing.assert_allclose(new.video.times, old.video.times, atol=1e-3)
    x = clip_io.resample(new.audio.samples[:, 0], new.audio.rate, old.audio.rate)
    moved = lag_of(x, old.audio.samples[:, 0], old.audio.rate)
    lag = [clip_io.audio_lag_s(clip) for clip in (new, old)]
    assert abs(moved + lag[1] - lag[0]) < 1e-3


def assert_same_audio(new, old, bits):
    """All samples are there, rounded to `bits` (None: unchanged)."""
    assert len(new.audio.samples) == len(old.audio.samples) and new.audio.rate == old.audio.rate
    expected = old.audio.samples
    if bits:
        expected = (np.rint(expected.astype(np.float64) * 2 ** (bits - 1)) / 2 ** (bits - 1)).astype(np.float32)
    np.testing.assert_array_equal(new.audio.samples, expected)


@pytest.mark.parametrize("suffix, codec", [(".mkv", "flac"), (".mp4", "flac"), (".mov", "pcm_s16le")])
def test_the_video_of_a_grid_clip_is_copied(grid_dir, tmp_path, suffix, codec):
    path, target = grid_clips(grid_dir)[suffix == ".mov"], tmp_path / f"out{suffix}"
    with clip_source.open_source(path) as source:
        new, warnings = write(source, target)
    old = clip_io.read_clip(path)
    assert_same_av_offset(new, old, path, target)
    assert_same_audio(new, old, 16)
    assert warnings == () and new.audio.codec == codec and new.video.fps == old.video.fps


def test_a_grid_clip_written_as_mpg_keeps_its_format_and_its_lag(grid_dir, tmp_path):
    """Its audio is MP2 again, of the same length and A/V offset, and the lag that its times do not show is still recognised."""
    path, target = grid_clips(grid_dir)[0], tmp_path / "out.mpg"
    with clip_source.open_source(path) as source:
        new, warnings = write(source, target)
    old = clip_io.read_clip(path)
    assert_same_av_offset(new, old, path, target)
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
        ("float.mov", ".mp4", "pcm_f32le", "FLOAT", None),
        ("irregular.mkv", ".mp4", "flac", "PCM_16", 16),
        ("irregular.mkv", ".mkv", "flac", "PCM_16", 16),
        ("b_frames.mpg", ".mp4", "flac", "PCM_16", 16),
    ],
)
def test_video_is_copied_and_audio_is_lossless(video_path, tmp_path, name, suffix, codec, subtype, bits):
    target = tmp_path / f"out{suffix}"
    with clip_source.open_source(video_path(name)) as source:
        new, warnings = write(source, target)
    old = clip_io.read_clip(video_path(name))
    assert_same_av_offset(new, old, video_path(name), target)
    assert_same_audio(new, old, bits)
    assert (new.audio.codec, new.audio.subtype) == (codec, subtype) and warnings == ()


@pytest.mark.parametrize("rate, new_rate", [(44_100, 44_100), (11_025, 16_000), (96_000, 48_000)])
def test_the_audio_of_an_mpg_keeps_its_av_offset(tmp_path, rate, new_rate):
    path, target = write_video(tmp_path / "in.mkv", "mpeg1video", "pcm_s16le", rate=rate, late_s=0.1), tmp_path / "out.mpg"
    with clip_source.open_source(path) as source:
        new, warnings = write(source, target)
    assert_same_av_offset(new, clip_io.read_clip(path), path, target)
    assert new.audio.rate == new_rate and new.audio.codec == "mp2" and len(warnings) == 1 + (rate != new_rate)
    assert len(new.audio.samples) / new_rate >= 3.0  # its end is not cut off
    assert new.audio.start_s < new.video.start_s  # so that it is not taken for an original Grid MPEG


def test_frames_hidden_in_the_source_stay_hidden_or_cause_a_warning(tmp_path):
    """As when a phone trims a video: the frames before the cut stay in the file, before time 0."""
    import av

    path = write_video(tmp_path / "full.mp4", "libx264", "aac", bf="0")
    with av.open(str(path)) as full, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        copies = {stream.index: cut.add_stream_from_template(stream) for stream in full.streams}
        for packet in [packet for packet in full.demux() if packet.size]:
            earlier = round(fractions.Fraction(2, 5) / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - earlier, packet.dts - earlier, copies[packet.stream.index]
            cut.mux(packet)
    old = clip_io.read_clip(tmp_path / "cut.mp4")
    assert len(old.video.times) == FRAMES - 10
    with clip_source.open_source(tmp_path / "cut.mp4") as source:
        assert_same(source, old)
        new, warnings = write(source, tmp_path / "out.mp4")
        assert_same_av_offset(new, old, tmp_path / "cut.mp4", tmp_path / "out.mp4")
        assert warnings == ()
        new, warnings = write(source, tmp_path / "out.mkv")
    assert len(warnings) == 1 and warnings[0].startswith("10 frames") and len(new.video.times) == FRAMES
    ((start, stop),) = new.audio.missing
    assert (start, stop / new.audio.rate) == (0, pytest.approx(0.4, abs=1e-3))


def test_an_mpg_with_wrong_frame_times_causes_a_warning(tmp_path, monkeypatch):
    """The times of the written file are checked: here one of them is changed."""
    path = write_video(tmp_path / "in.mkv", "mpeg1video", "pcm_s16le", rate=44_100)
    frame_times = muxing._frame_times

    def with_late_frame(path, target):
        times, hidden = frame_times(path, target)
        is_written_file = str(path).endswith("mpg")
        return times + 0.04 * (np.arange(FRAMES) == 70) * is_written_file, hidden

    monkeypatch.setattr(muxing, "_frame_times", with_late_frame)
    with clip_source.open_source(path) as source:
        assert "some are shown early or late" in write(source, tmp_path / "out.mpg")[1][-1]


def test_content_that_the_target_cannot_hold_is_refused(video_path, tmp_path):
    soundfile.write(tmp_path / "six.wav", noise(1000, 6), RATE, subtype="FLOAT")
    six_channels, video_file = clip_source.open_source(tmp_path / "six.wav"), clip_source.open_source(video_path("open_gop.mkv"))
    in_memory = clip_source.source_from_clip(
        clip_io.Clip("arrays", video_file.video(0, 1), clip_io.read_clip(tmp_path / "six.wav").audio)
    )
    for source, name, message in [
        (video_file, "a.avi", "a.avi: found suffix '.avi', expected one of .* .mkv"),
        (video_file, "a.mpg", "a.mpg: .*h264"),
        (video_file, "none/a.mkv", "a.mkv: cannot be written .No such file"),
        (six_channels, "a.flac", "a.flac: .*FLOAT.*.wav"),
        (in_memory, "a.mkv", "a.mkv: arrays is not a file"),
    ]:
        with pytest.raises(clip_io.MediaError, match=message) as error:
            write(source, tmp_path / name)
        assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["six.wav"]


@pytest.mark.parametrize("suffix", [".wav", ".mkv"])
def test_a_file_appears_complete_or_not_at_all(video_path, tmp_path, suffix):
    target = tmp_path / f"out{suffix}"
    with clip_source.open_source(video_path("float.mov")) as source:
        x = source.audio(0, source.num_samples)

        def failing_blocks():
            yield x[:20_000]
            raise RuntimeError("stopped")

        with_nan = x.copy()
        with_nan[30_000, 1] = np.nan
        for blocks, error, message in [
            (failing_blocks(), RuntimeError, "stopped"),
            ([x[:-1]], clip_io.MediaError, "47999 samples .*48000"),
            ([x, x], clip_io.MediaError, "96000 samples"),
            ([x[:, :1]], clip_io.MediaError, r"shape \(48000, 1\), expected \(n, 2\)"),
            ([with_nan], clip_io.MediaError, "NaN"),
        ]:
            with pytest.raises(error, match=message):
                clip_source.write_clip(source, target, blocks)
            assert os.listdir(tmp_path) == []
        target.write_text("existing")
        with pytest.raises(FileExistsError, match="--overwrite"):
            clip_source.write_clip(source, target, [x])
        with pytest.raises(clip_io.MediaError):
            clip_source.write_clip(source, target, [x[:9]], overwrite=True)
        assert target.read_text() == "existing"
        clip_source.write_clip(source, target, [x], overwrite=True)
    assert os.listdir(tmp_path) == [target.name]
    np.testing.assert_array_equal(clip_io.read_clip(target).audio.samples, x)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mkv", ".mp4"])
def test_a_full_disk_leaves_no_file(video_path, tmp_path, suffix):
    target, limits = tmp_path / f"out{suffix}", resource.getrlimit(resource.RLIMIT_FSIZE)
    with clip_source.open_source(video_path("open_gop.mkv")) as source:
        write(source, target)
        size = target.stat().st_size
        target.unlink()
        for max_size in (size // 2, size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_size, limits[1]))
            try:
                with pytest.raises(clip_io.MediaError, match="cannot be written"):
                    write(source, target)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert os.listdir(tmp_path) == []


def test_a_source_can_be_overwritten(video_path, tmp_path):
    path = tmp_path / "a.mkv"
    path.write_bytes(video_path("open_gop.mkv").read_bytes())
    with clip_source.open_source(path) as source:
        write(source, path, overwrite=True)
    assert packets(path) == packets(video_path("open_gop.mkv"))


def test_a_wav_of_4_gb_is_written_as_rf64(tmp_path, monkeypatch):
    x = noise(20_000)
    soundfile.write(tmp_path / "in.wav", x, RATE, subtype="FLOAT")
    monkeypatch.setattr(muxing, "WAV_BYTES", 79_999)
    with clip_source.open_source(tmp_path / "in.wav") as source:
        new, warnings = write(source, tmp_path / "out.wav")
    assert (tmp_path / "out.wav").read_bytes()[:4] == b"RF64" and "RF64" in warnings[0]
    np.testing.assert_array_equal(new.audio.samples, x)


COPY_AND_MEASURE = """
import resource, sys
from avsi_jax.media import clip_source
with clip_source.open_source(sys.argv[1]) as source:
    source.video(0, 1)
    clip_source.write_clip(source, sys.argv[2], (block for _, block in source.blocks(100_000)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clip(tmp_path):
    """Videos of 30 s and of 20 minutes (230 MB of decoded audio): the second needs little more than the spool keeps in memory."""
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
        command = [sys.executable, "-c", COPY_AND_MEASURE, str(tmp_path / f"{name}.mkv"), str(tmp_path / f"{name}.out.mkv")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 2 * clip_source.MAX_SPOOLED_BYTES / 2**20
