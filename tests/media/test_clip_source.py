"""avsi_jax.media.clip_source: pieces of a clip against clip_io.read_clip of the whole."""

import resource

import numpy as np
import pytest
import soundfile

from avsi_jax.media import clip_io, clip_source
from tests.support import video_files
from tests.support.video_files import FPS, FRAMES, MADE, RATE, assert_same, assert_same_video, grid_clips, make, noise


@pytest.fixture
def made(once):
    return video_files.made(once)


@pytest.mark.parametrize("which", range(1, 3))
def test_pieces_of_a_grid_clip_are_what_the_whole_gives(grid_dir, which):
    path = grid_clips(grid_dir)[which]
    with clip_source.open_source(path) as source:
        assert_same(source, clip_io.read_clip(path))


@pytest.mark.parametrize("name", MADE)
def test_pieces_of_a_clip_are_what_the_whole_gives(made, name):
    clip = clip_io.read_clip(made(name))
    with clip_source.open_source(made(name)) as source:
        assert_same(source, clip)
    assert_same(clip_source.source_of(clip), clip)


@pytest.mark.parametrize("name", ["open_gop.mkv", "refresh.mp4", "float.mov", "uneven.mkv", "b.mpg"])
def test_late_frames_are_decoded_from_a_key_before_them(made, name, monkeypatch):
    count = []
    with clip_source.open_source(made(name)) as source:
        decode = clip_io.decode_packet
        monkeypatch.setattr(clip_io, "decode_packet", lambda packet, reader: count.append(decode(packet, reader)))
        end = source.video(0, 99).times[-1]
        whole = len(count)
        source.video(end - 0.1, end)
        assert whole >= FRAMES > 2 * (len(count) - whole)


def test_a_seek_that_goes_wrong_changes_nothing(made, monkeypatch):
    clip = clip_io.read_clip(made("open_gop.mkv"), audio=False)
    with clip_source.open_source(made("open_gop.mkv")) as source:
        monkeypatch.setattr(clip_source._VideoFile, "_found", lambda *_: None)
        assert_same_video(source, clip.video, [(2.0, 2.4)])


def test_frames_whose_times_are_missing_are_numbered(made, monkeypatch):
    """The frames of this file carry times; all are taken away but one."""
    read = clip_io.frame_time
    monkeypatch.setattr(clip_io, "frame_time", lambda frame: read(frame) if read(frame) < 0.02 else np.nan)
    clip = clip_io.read_clip(made("float.mov"), audio=False)
    assert np.allclose(clip.video.times, np.arange(FRAMES) / FPS)
    with clip_source.open_source(made("float.mov")) as source:
        assert_same_video(source, clip.video)


def test_long_audio_lies_on_the_disk_and_leaves_nothing(made, tmp_path, monkeypatch):
    clip = clip_io.read_clip(made("float.mov"), video=False)
    monkeypatch.setattr(clip_source, "IN_MEMORY", 10_000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with clip_source.open_source(made("float.mov"), video=False) as source:
        assert source._store.file._rolled and list(tmp_path.iterdir()) == []
        assert_same(source, clip)
    with pytest.raises(ValueError, match="closed"):
        source.audio(0, 10)


def test_a_full_temporary_folder_is_told_of(made, tmp_path, monkeypatch):
    path, limits = made("float.mov"), resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(clip_source, "IN_MEMORY", 10_000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(clip_io.MediaError, match="its sound, decoded, finds no room in"):
            clip_source.open_source(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_audio_outside_the_clip_is_refused(made):
    with clip_source.open_source(made("float.mov")) as source:
        for start, stop in [(-1, 5), (5, 4), (0, source.num_samples + 1)]:
            with pytest.raises(ValueError, match="asked for, expected a stretch of 0 to 48000"):
                source.audio(start, stop)


@pytest.mark.parametrize(
    "suffix, subtype",
    [(".wav", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")] + [(".flac", "PCM_16"), (".flac", "PCM_24")],
)
def test_a_audio_file_goes_through_unchanged(tmp_path, suffix, subtype):
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


def test_a_flac_header_that_lies_is_refused_before_memory_is_taken(tmp_path):
    soundfile.write(tmp_path / "a.flac", noise(50_000), RATE)
    data = (tmp_path / "a.flac").read_bytes()
    # bytes 21 (lower half) to 25 of the file: STREAMINFO's 36 bits of the number of samples, 0 for unknown
    much = data[:21] + bytes([data[21] | 15]) + b"\xff" + data[23:]
    untold = data[:21] + bytes([data[21] & 240]) + b"\0\0\0\0" + data[26:]
    for content, said in [
        (much, "more than the file can hold"),
        (untold, "more than the file can hold"),
        (data[:30_000], "decoded"),
    ]:
        (tmp_path / "b.flac").write_bytes(content)
        for read in (clip_io.read_clip, clip_source.open_source):
            with pytest.raises(clip_io.MediaError, match=said) as error:
                read(tmp_path / "b.flac")
            assert "\n" not in str(error.value)


def test_what_cannot_be_read_is_said_as_read_clip_says_it(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "text.mp4").write_text("not a clip\n" * 100)
    (tmp_path / "list.mkv").write_text("ffconcat version 1.0\nfile text.mp4\n")
    (tmp_path / "text.wav").write_text("not a clip\n" * 100)
    (tmp_path / "clip.webm").write_text("")
    for name in ("none.mp4", "none.wav", "folder.wav", "text.mp4", "list.mkv", "text.wav", "clip.webm"):
        said = []
        for read in (clip_io.read_clip, clip_source.open_source):
            with pytest.raises((clip_io.MediaError, FileNotFoundError)) as error:
                read(tmp_path / name)
            said.append((error.type, str(error.value)))
        assert said[0] == said[1] and "\n" not in said[0][1]


def test_huge_frames_are_refused_by_their_header(tmp_path):
    """16000 x 16000 is the most that ffmpeg itself takes."""
    path = make(tmp_path / "a.avi", "rawvideo", None)
    data, size = path.read_bytes(), b"".join(n.to_bytes(4, "little") for n in (128, 72))
    for side, said in [
        (60_000, "found no pictures or sound that can be decoded"),
        (16_000, "a picture of 16000x16000, more points than 4096x2304; scale"),
    ]:
        path.write_bytes(data.replace(size, side.to_bytes(4, "little") * 2))
        with pytest.raises(clip_io.MediaError, match=said) as error:
            clip_source.open_source(path)
        assert "\n" not in str(error.value)


def test_a_stretch_of_too_many_frames_is_refused(made, monkeypatch):
    monkeypatch.setattr(clip_source._VideoFile, "max_bytes", 3 * 128 * 72 * 20)
    with clip_source.open_source(made("float.mov")) as source:
        assert len(source.video(1.0, 1.8).times) == 20
        with pytest.raises(clip_io.MediaError, match="take more than .* cut the clip"):
            source.video(1.0, 1.9)


def test_a_clip_without_audio_or_without_frames(tmp_path, made):
    with clip_source.open_source(make(tmp_path / "a.mkv", "mpeg4", None)) as source:
        assert (source.rate, source.num_samples, source.duration_s, source.lag_s) == (0, 0, 0.0, 0.0) and source.has_video
        with pytest.raises(clip_io.MediaError, match="has no sound to write"):
            clip_source.write_clip(source, tmp_path / "b.mkv", [])
    with clip_source.open_source(made("float.mov"), video=False) as source:
        assert not source.has_video and source.num_samples == 48_000
        with pytest.raises(clip_io.MediaError, match="has no pictures"):
            source.video(0, 1)
