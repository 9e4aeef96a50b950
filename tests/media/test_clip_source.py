"""Ranges of a clip read by clip_source equal those of the whole clip decoded by clip_io.read_clip."""

import resource

import numpy as np
import pytest
import soundfile

from avsi_jax.media import clip_io, clip_source
from tests.support import video_files
from tests.support.video_files import FPS, FRAMES, RATE, VIDEOS, assert_same, assert_same_video, grid_clips, noise, write_video


@pytest.fixture
def video_path(once):
    return video_files.video_paths(once)


@pytest.mark.parametrize("index", range(1, 3))
def test_ranges_of_a_grid_clip_equal_those_of_the_whole(grid_dir, index):
    path = grid_clips(grid_dir)[index]
    with clip_source.open_source(path) as source:
        assert_same(source, clip_io.read_clip(path))


@pytest.mark.parametrize("name", VIDEOS)
def test_ranges_of_a_clip_equal_those_of_the_whole(video_path, name):
    clip = clip_io.read_clip(video_path(name))
    with clip_source.open_source(video_path(name)) as source:
        assert_same(source, clip)
    assert_same(clip_source.source_from_clip(clip), clip)


@pytest.mark.parametrize("name", ["open_gop.mkv", "refresh.mp4", "float.mov", "irregular.mkv", "b_frames.mpg"])
def test_late_frames_are_decoded_from_a_key_frame_shortly_before_them(video_path, name, monkeypatch):
    count = []
    with clip_source.open_source(video_path(name)) as source:
        decode = clip_io.decode_packet
        monkeypatch.setattr(clip_io, "decode_packet", lambda packet, reader: count.append(decode(packet, reader)))
        end = source.video(0, 99).times[-1]
        all_packets = len(count)
        source.video(end - 0.1, end)
        assert all_packets >= FRAMES > 2 * (len(count) - all_packets)


def test_frames_are_the_same_where_seeking_fails(video_path, monkeypatch):
    clip = clip_io.read_clip(video_path("open_gop.mkv"), audio=False)
    with clip_source.open_source(video_path("open_gop.mkv")) as source:
        monkeypatch.setattr(clip_source._VideoFile, "_seek", lambda *_: None)
        assert_same_video(source, clip.video, [(2.0, 2.4)])


def test_frames_without_times_are_placed_by_their_number(video_path, monkeypatch):
    """The frames of this file have times; all but the first are hidden."""
    frame_time = clip_io.frame_time
    monkeypatch.setattr(clip_io, "frame_time", lambda frame: frame_time(frame) if frame_time(frame) < 0.02 else np.nan)
    clip = clip_io.read_clip(video_path("float.mov"), audio=False)
    assert np.allclose(clip.video.times, np.arange(FRAMES) / FPS)
    with clip_source.open_source(video_path("float.mov")) as source:
        assert_same_video(source, clip.video)


def test_long_audio_is_spooled_to_the_disk_and_leaves_no_file(video_path, tmp_path, monkeypatch):
    clip = clip_io.read_clip(video_path("float.mov"), video=False)
    monkeypatch.setattr(clip_source, "MAX_SPOOLED_BYTES", 10_000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with clip_source.open_source(video_path("float.mov"), video=False) as source:
        assert source._audio_store.file._rolled and list(tmp_path.iterdir()) == []
        assert_same(source, clip)
    with pytest.raises(ValueError, match="closed"):
        source.audio(0, 10)


def test_the_error_for_a_full_temporary_folder_names_it(video_path, tmp_path, monkeypatch):
    path, limits = video_path("float.mov"), resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(clip_source, "MAX_SPOOLED_BYTES", 10_000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(clip_io.MediaError, match=str(tmp_path)):
            clip_source.open_source(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_audio_outside_the_clip_is_refused(video_path):
    with clip_source.open_source(video_path("float.mov")) as source:
        for start, stop in [(-1, 5), (5, 4), (0, source.num_samples + 1)]:
            with pytest.raises(ValueError, match=f"samples {start} to {stop}.*48000"):
                source.audio(start, stop)


@pytest.mark.parametrize(
    "suffix, subtype",
    [(".wav", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")] + [(".flac", "PCM_16"), (".flac", "PCM_24")],
)
def test_an_audio_file_is_copied_unchanged(tmp_path, suffix, subtype):
    path, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    soundfile.write(path, noise(20_000, 2).astype(np.float64), 22_050, subtype=subtype)
    clip = clip_io.read_clip(path)
    with clip_source.open_source(path) as source:
        assert_same(source, clip)
        blocks = list(source.blocks(7001))
        assert [start for start, _ in blocks] == [0, 7001, 14_002] and len(blocks[-1][1]) == 5998
        assert clip_source.write_clip(source, target, (block for _, block in blocks)) == ()
    with soundfile.SoundFile(target) as back:
        assert (back.subtype, back.samplerate) == (subtype, 22_050)
    np.testing.assert_array_equal(clip_io.read_clip(target).audio.samples, clip.audio.samples)


def test_a_flac_header_with_a_wrong_length_is_refused_before_memory_is_allocated(tmp_path):
    soundfile.write(tmp_path / "a.flac", noise(50_000), RATE)
    data = (tmp_path / "a.flac").read_bytes()
    # bytes 21 (lower half) to 25 of the file: STREAMINFO's 36 bits of the number of samples, 0 for unknown
    huge = data[:21] + bytes([data[21] | 15]) + b"\xff" + data[23:]
    unknown = data[:21] + bytes([data[21] & 240]) + b"\0\0\0\0" + data[26:]
    for content, message in [
        (huge, "more than the file can hold"),
        (unknown, "more than the file can hold"),
        (data[:30_000], "decoded"),
    ]:
        (tmp_path / "b.flac").write_bytes(content)
        for read in (clip_io.read_clip, clip_source.open_source):
            with pytest.raises(clip_io.MediaError, match=message) as error:
                read(tmp_path / "b.flac")
            assert "\n" not in str(error.value)


def test_errors_are_the_same_as_those_of_read_clip(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "text.mp4").write_text("not a clip\n" * 100)
    (tmp_path / "list.mkv").write_text("ffconcat version 1.0\nfile text.mp4\n")
    (tmp_path / "text.wav").write_text("not a clip\n" * 100)
    (tmp_path / "clip.webm").write_text("")
    for name in ("none.mp4", "none.wav", "folder.wav", "text.mp4", "list.mkv", "text.wav", "clip.webm"):
        errors = []
        for read in (clip_io.read_clip, clip_source.open_source):
            with pytest.raises((clip_io.MediaError, FileNotFoundError)) as error:
                read(tmp_path / name)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1] and "\n" not in errors[0][1]


def test_huge_frames_are_refused_before_they_are_decoded(tmp_path):
    """ffmpeg itself refuses more than 16000 x 16000."""
    path = write_video(tmp_path / "a.avi", "rawvideo", None)
    data, size = path.read_bytes(), b"".join(n.to_bytes(4, "little") for n in (128, 72))
    for side, message in [(60_000, "a.avi: found no video or audio"), (16_000, "a.avi: .*16000x16000.*4096x2304")]:
        path.write_bytes(data.replace(size, side.to_bytes(4, "little") * 2))
        with pytest.raises(clip_io.MediaError, match=message) as error:
            clip_source.open_source(path)
        assert "\n" not in str(error.value)


def test_a_range_of_too_many_frames_is_refused(video_path, monkeypatch):
    monkeypatch.setattr(clip_source._VideoFile, "max_bytes", 3 * 128 * 72 * 20)
    with clip_source.open_source(video_path("float.mov")) as source:
        assert len(source.video(1.0, 1.8).times) == 20
        with pytest.raises(clip_io.MediaError, match="float.mov: .* GiB"):
            source.video(1.0, 1.9)


def test_a_clip_without_audio_or_without_frames(tmp_path, video_path):
    with clip_source.open_source(write_video(tmp_path / "a.mkv", "mpeg4", None)) as source:
        assert (source.rate, source.num_samples, source.duration_s, source.lag_s) == (0, 0, 0.0, 0.0) and source.has_video
        with pytest.raises(clip_io.MediaError, match="a.mkv: .*no audio"):
            clip_source.write_clip(source, tmp_path / "b.mkv", [])
    with clip_source.open_source(video_path("float.mov"), video=False) as source:
        assert not source.has_video and source.num_samples == 48_000
        with pytest.raises(clip_io.MediaError, match="float.mov: .*no video"):
            source.video(0, 1)
