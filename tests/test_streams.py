"""avsi_jax.streams and muxing: pieces of a clip against media.read_clip of the whole; written clips against their packets."""

import fractions
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from avsi_jax import media, muxing, streams

FPS, RATE, FRAMES = 25, 16_000, 75


def noise(num_samples, channels=1, level=0.1):
    """Not the same anywhere, quiet at its start."""
    x = np.random.default_rng(7).normal(size=(num_samples, channels)) * level
    return (x * np.minimum(1, np.arange(num_samples) / RATE)[:, None]).astype(np.float32)


def make(path, video_codec, sound_codec, *, channels=1, rate=RATE, start_s=0.0, late_s=0.0, uneven=False, form=None, **options):
    """A film of moving noise, pictures `late_s` after the sound, every packet unlike the others."""
    import av

    rng = np.random.default_rng(3)
    still = rng.integers(0, 255, (72, 64, 3), dtype=np.uint8).repeat(2, 1)
    x, seconds, frames = noise(int(FRAMES / FPS * rate), channels), start_s + late_s, []
    with av.open(str(path), "w", format=form) as out:
        video = out.add_stream(video_codec, rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = 128, 72, "yuv420p"
        video.codec_context.time_base = fractions.Fraction(1, 1000) if uneven else fractions.Fraction(1, FPS)
        for k in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.roll(still, (3 * k, 2 * k), (0, 1)), format="rgb24")
            frame.pts, frame.time_base = round(1000 * seconds), fractions.Fraction(1, 1000)
            seconds += rng.integers(20, 90) / 1000 if uneven else 1 / FPS
            frames.append((frame.time, video, frame))
        if sound_codec:
            frames += sound_frames(out.add_stream(sound_codec, rate=rate, layout=muxing.LAYOUTS[channels]), x, rate, start_s)
        for _, stream, frame in sorted(frames, key=lambda f: f[0]):
            out.mux(stream.encode(frame))
        for stream in out.streams:
            out.mux(stream.encode(None))
    return path


def sound_frames(stream, x, rate, start_s):
    import av

    context = stream.codec_context
    same = av.AudioResampler(format=context.format.name, layout=context.layout.name, rate=rate)
    for start in range(0, len(x), 1600):
        block = np.ascontiguousarray(x[start : start + 1600].T)
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=context.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = rate, start + round(start_s * rate), fractions.Fraction(1, rate)
        yield from ((frame.time, stream, part) for part in same.resample(frame))


MADE = {
    "open_gop.mkv": ("libx264", "pcm_s24le", {"channels": 2, "g": "8", "x264-params": "open-gop=1:bframes=3:log-level=none"}),
    "refresh.mp4": ("libx264", "aac", {"g": "10", "x264-params": "intra-refresh=1:bframes=0", "late_s": 0.2}),
    "float.mov": ("mpeg4", "pcm_f32le", {"channels": 2, "g": "10", "bf": "2"}),
    "uneven.mkv": ("libx264", "flac", {"g": "10", "uneven": True, "late_s": 0.4, "start_s": 5.0}),
    "b.mpg": ("mpeg2video", "mp2", {"g": "10", "bf": "2", "rate": 44_100}),
    "stamped.avi": ("libx264", "pcm_s16le", {"g": "10"}),
}


@pytest.fixture(scope="session")
def made(once):
    """made(name) -> the path of a made clip. Not to be changed."""

    def fill(folder):
        for name, (video, sound, how) in MADE.items():
            make(folder / name, video, sound, **how)

    return lambda name: once("made_clips", fill) / name


def grid_clips(folder):
    """Two as the corpus codes them (one a picture short), one coded anew."""
    return [folder / "s1" / "bbaz5s.mpg", folder / "s1" / "lrae3s.mpg", next(iter(sorted(folder.glob("re-encoded/s4/*.mp4"))))]


def stretches(times):
    """Some from one picture's own time to another's, some between, beside and beyond them."""
    last = float(times[-1])
    yield from [(-1.0, last + 1), (0.0, 0.0), (last, last + 0.001), (last + 1, last + 2), (times[9], times[31])]
    yield from np.random.default_rng(1).uniform(-0.2, last, (4, 1)) + [0, 0.3]


def assert_same_pictures(source, pictures, wanted=None):
    for start, end in wanted or stretches(pictures.times):
        asked = (pictures.times >= start) & (pictures.times < end)
        got = source.pictures(start, end)
        np.testing.assert_array_equal(got.times, pictures.times[asked])
        np.testing.assert_array_equal(got.rgb, pictures.rgb[asked])
        assert got.rgb.shape[1:] == pictures.rgb.shape[1:] and got.rgb.dtype == np.uint8
        assert (got.fps, got.start_s) == (pictures.fps, pictures.start_s)


def assert_same(source, clip):
    samples = clip.sound.samples
    assert (source.num_samples, source.channels) == samples.shape and source.duration_s == len(samples) / clip.sound.rate
    assert (source.rate, source.subtype, source.codec) == (clip.sound.rate, clip.sound.subtype, clip.sound.codec)
    assert source.lag_s == media.sound_lag_s(clip)
    for start, stop in [(0, len(samples)), (len(samples) - 5, len(samples)), (1000, 1000), (301, 9004), (0, 1)]:
        got = source.sound(start, stop)
        np.testing.assert_array_equal(got, samples[start:stop])
        assert got.dtype == samples.dtype
    if clip.pictures is None:
        assert not source.has_pictures and source.size == (0, 0)
        return
    assert source.has_pictures and source.size == clip.pictures.rgb.shape[2:0:-1] and source.fps == clip.pictures.fps
    assert_same_pictures(source, clip.pictures)


@pytest.mark.parametrize("which", range(1, 3))
def test_pieces_of_a_grid_clip_are_what_the_whole_gives(grid_dir, which):
    path = grid_clips(grid_dir)[which]
    with streams.open_source(path) as source:
        assert_same(source, media.read_clip(path))


@pytest.mark.parametrize("name", MADE)
def test_pieces_of_a_clip_are_what_the_whole_gives(made, name):
    clip = media.read_clip(made(name))
    with streams.open_source(made(name)) as source:
        assert_same(source, clip)
    assert_same(streams.source_of(clip), clip)


@pytest.mark.parametrize("name", ["open_gop.mkv", "refresh.mp4", "float.mov", "uneven.mkv", "b.mpg"])
def test_late_pictures_are_decoded_from_a_key_before_them(made, name, monkeypatch):
    count = []
    with streams.open_source(made(name)) as source:
        decode = media.decode_packet
        monkeypatch.setattr(media, "decode_packet", lambda packet, reader: count.append(decode(packet, reader)))
        end = source.pictures(0, 99).times[-1]
        whole = len(count)
        source.pictures(end - 0.1, end)
        assert whole >= FRAMES > 2 * (len(count) - whole)


def test_a_seek_that_goes_wrong_changes_nothing(made, monkeypatch):
    clip = media.read_clip(made("open_gop.mkv"), sound=False)
    with streams.open_source(made("open_gop.mkv")) as source:
        monkeypatch.setattr(streams._Film, "_found", lambda *_: None)
        assert_same_pictures(source, clip.pictures, [(2.0, 2.4)])


def test_pictures_whose_times_are_missing_are_numbered(made, monkeypatch):
    """The frames of this file carry times; all are taken away but one."""
    read = media.frame_time
    monkeypatch.setattr(media, "frame_time", lambda frame: read(frame) if read(frame) < 0.02 else np.nan)
    clip = media.read_clip(made("float.mov"), sound=False)
    assert np.allclose(clip.pictures.times, np.arange(FRAMES) / FPS)
    with streams.open_source(made("float.mov")) as source:
        assert_same_pictures(source, clip.pictures)


def test_long_sound_lies_on_the_disk_and_leaves_nothing(made, tmp_path, monkeypatch):
    clip = media.read_clip(made("float.mov"), pictures=False)
    monkeypatch.setattr(streams, "IN_MEMORY", 10_000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with streams.open_source(made("float.mov"), pictures=False) as source:
        assert source._store.file._rolled and list(tmp_path.iterdir()) == []
        assert_same(source, clip)
    with pytest.raises(ValueError, match="closed"):
        source.sound(0, 10)


def test_a_full_temporary_folder_is_told_of(made, tmp_path, monkeypatch):
    path, limits = made("float.mov"), resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(streams, "IN_MEMORY", 10_000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(media.MediaError, match="its sound, decoded, finds no room in"):
            streams.open_source(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_sound_outside_the_clip_is_refused(made):
    with streams.open_source(made("float.mov")) as source:
        for start, stop in [(-1, 5), (5, 4), (0, source.num_samples + 1)]:
            with pytest.raises(ValueError, match="asked for, expected a stretch of 0 to 48000"):
                source.sound(start, stop)


@pytest.mark.parametrize(
    "suffix, subtype",
    [(".wav", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")] + [(".flac", "PCM_16"), (".flac", "PCM_24")],
)
def test_a_sound_file_goes_through_unchanged(tmp_path, suffix, subtype):
    path, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    soundfile.write(path, noise(20_000, 2).astype(np.float64), 22_050, subtype=subtype)
    clip = media.read_clip(path)
    with streams.open_source(path) as source:
        assert_same(source, clip)
        blocks = list(source.blocks(7001))
        assert [start for start, _ in blocks] == [0, 7001, 14_002] and len(blocks[-1][1]) == 5998
        assert streams.write_clip(source, target, (block for _, block in blocks)) == ()
    with soundfile.SoundFile(target) as back:
        assert (back.subtype, back.samplerate) == (subtype, 22_050)
    np.testing.assert_array_equal(media.read_clip(target).sound.samples, clip.sound.samples)


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
        for read in (media.read_clip, streams.open_source):
            with pytest.raises(media.MediaError, match=said) as error:
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
        for read in (media.read_clip, streams.open_source):
            with pytest.raises((media.MediaError, FileNotFoundError)) as error:
                read(tmp_path / name)
            said.append((error.type, str(error.value)))
        assert said[0] == said[1] and "\n" not in said[0][1]


def test_huge_pictures_are_refused_by_their_header(tmp_path):
    """16000 x 16000 is the most that ffmpeg itself takes."""
    path = make(tmp_path / "a.avi", "rawvideo", None)
    data, size = path.read_bytes(), b"".join(n.to_bytes(4, "little") for n in (128, 72))
    for side, said in [
        (60_000, "found no pictures or sound that can be decoded"),
        (16_000, "a picture of 16000x16000, more points than 4096x2304; scale"),
    ]:
        path.write_bytes(data.replace(size, side.to_bytes(4, "little") * 2))
        with pytest.raises(media.MediaError, match=said) as error:
            streams.open_source(path)
        assert "\n" not in str(error.value)


def test_a_stretch_of_too_many_pictures_is_refused(made, monkeypatch):
    monkeypatch.setattr(streams._Film, "max_bytes", 3 * 128 * 72 * 20)
    with streams.open_source(made("float.mov")) as source:
        assert len(source.pictures(1.0, 1.8).times) == 20
        with pytest.raises(media.MediaError, match="take more than .* cut the clip"):
            source.pictures(1.0, 1.9)


def test_a_clip_without_sound_or_without_pictures(tmp_path, made):
    with streams.open_source(make(tmp_path / "a.mkv", "mpeg4", None)) as source:
        assert (source.rate, source.num_samples, source.duration_s, source.lag_s) == (0, 0, 0.0, 0.0) and source.has_pictures
        with pytest.raises(media.MediaError, match="has no sound to write"):
            streams.write_clip(source, tmp_path / "b.mkv", [])
    with streams.open_source(made("float.mov"), pictures=False) as source:
        assert not source.has_pictures and source.num_samples == 48_000
        with pytest.raises(media.MediaError, match="has no pictures"):
            source.pictures(0, 1)


# ------------------------------------------------------------------------------------------------------------------- writing


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
    warnings = streams.write_clip(source, target, (block for _, block in source.blocks(10_007)), **how)
    return media.read_clip(target), warnings


def assert_in_step(new, old, path, target):
    """The same pictures at the same times, and the sound where it was by what both files say of their lag."""
    assert packets(target) == packets(path)
    np.testing.assert_array_equal(new.pictures.rgb, old.pictures.rgb)
    np.testing.assert_allclose(new.pictures.times, old.pictures.times, atol=1e-3)
    x = media.resample(new.sound.samples[:, 0], new.sound.rate, old.sound.rate)
    moved = heard_after(x, old.sound.samples[:, 0], old.sound.rate)
    lag = [media.sound_lag_s(clip) for clip in (new, old)]
    assert abs(moved + lag[1] - lag[0]) < 1e-3


def assert_whole(new, old, bits):
    """The samples are there, at the depth that they are kept with."""
    assert len(new.sound.samples) == len(old.sound.samples) and new.sound.rate == old.sound.rate
    wanted = old.sound.samples
    if bits:
        wanted = (np.rint(wanted.astype(np.float64) * 2 ** (bits - 1)) / 2 ** (bits - 1)).astype(np.float32)
    np.testing.assert_array_equal(new.sound.samples, wanted)


@pytest.mark.parametrize("suffix, codec", [(".mkv", "flac"), (".mp4", "flac"), (".mov", "pcm_s16le")])
def test_a_grid_clip_with_its_own_pictures(grid_dir, tmp_path, suffix, codec):
    path, target = grid_clips(grid_dir)[suffix == ".mov"], tmp_path / f"out{suffix}"
    with streams.open_source(path) as source:
        new, warnings = written(source, target)
    old = media.read_clip(path)
    assert_in_step(new, old, path, target)
    assert_whole(new, old, 16)
    assert warnings == () and new.sound.codec == codec and new.pictures.fps == old.pictures.fps


def test_a_grid_clip_stays_one(grid_dir, tmp_path):
    """Its sound is MP2 again, as long as it was, in step, and its untold lag is still known."""
    path, target = grid_clips(grid_dir)[0], tmp_path / "out.mpg"
    with streams.open_source(path) as source:
        new, warnings = written(source, target)
    old = media.read_clip(path)
    assert_in_step(new, old, path, target)
    assert len(warnings) == 1 and "MP2" in warnings[0] and media.sound_lag_s(new) == pytest.approx(0.0110)
    assert len(new.sound.samples) == 131_328 and new.sound.samples.shape[1] == 2
    assert np.abs(new.sound.samples[481:] - old.sound.samples[481:]).mean() < 0.002


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
def test_pictures_are_copied_and_sound_kept(made, tmp_path, name, suffix, codec, subtype, bits):
    target = tmp_path / f"out{suffix}"
    with streams.open_source(made(name)) as source:
        new, warnings = written(source, target)
    old = media.read_clip(made(name))
    assert_in_step(new, old, made(name), target)
    assert_whole(new, old, bits)
    assert (new.sound.codec, new.sound.subtype) == (codec, subtype)
    assert (len(warnings) == 1 and "24 bit" in warnings[0]) if name == "float.mov" and suffix == ".mp4" else warnings == ()


@pytest.mark.parametrize("rate, kept", [(44_100, 44_100), (11_025, 16_000), (96_000, 48_000)])
def test_sound_of_an_mpg_is_in_step(tmp_path, rate, kept):
    path, target = make(tmp_path / "in.mkv", "mpeg1video", "pcm_s16le", rate=rate, late_s=0.1), tmp_path / "out.mpg"
    with streams.open_source(path) as source:
        new, warnings = written(source, target)
    assert_in_step(new, media.read_clip(path), path, target)
    assert new.sound.rate == kept and new.sound.codec == "mp2" and len(warnings) == 1 + (rate != kept)
    assert len(new.sound.samples) / kept >= 3.0  # nothing is cut off its end
    assert new.sound.start_s < new.pictures.start_s  # so that nobody takes it for Grid's


def test_pictures_that_a_source_hides_stay_hidden_or_are_told_of(tmp_path):
    """As a phone trims a film: the pictures up to the cut stay in the file, before time 0."""
    import av

    path = make(tmp_path / "whole.mp4", "libx264", "aac", bf="0")
    with av.open(str(path)) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        copies = {stream.index: cut.add_stream_from_template(stream) for stream in whole.streams}
        for packet in [packet for packet in whole.demux() if packet.size]:
            earlier = round(fractions.Fraction(2, 5) / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - earlier, packet.dts - earlier, copies[packet.stream.index]
            cut.mux(packet)
    old = media.read_clip(tmp_path / "cut.mp4")
    assert len(old.pictures.times) == FRAMES - 10
    with streams.open_source(tmp_path / "cut.mp4") as source:
        assert_same(source, old)
        new, warnings = written(source, tmp_path / "out.mp4")
        assert_in_step(new, old, tmp_path / "cut.mp4", tmp_path / "out.mp4")
        assert warnings == ()
        new, warnings = written(source, tmp_path / "out.mkv")
    assert len(warnings) == 1 and warnings[0].startswith("10 pictures") and len(new.pictures.times) == FRAMES
    assert new.sound.start_s - new.pictures.start_s == pytest.approx(0.4, abs=1e-3)


def test_an_mpg_whose_pictures_lie_too_close_is_told_of(tmp_path, monkeypatch):
    """The times of the written file are looked at: here a picture's is wrong."""
    path = make(tmp_path / "in.mkv", "mpeg1video", "pcm_s16le", rate=44_100)
    read = muxing._times
    late = lambda path, target: (read(path, target)[0] + 0.04 * (np.arange(FRAMES) == 70) * path.name.endswith("mpg"), 0)
    monkeypatch.setattr(muxing, "_times", lambda path, target: late(type(target)(path), target))
    with streams.open_source(path) as source:
        assert "does not tell every small picture's time" in written(source, tmp_path / "out.mpg")[1][-1]


def test_what_a_target_cannot_hold_is_refused(made, tmp_path):
    soundfile.write(tmp_path / "six.wav", noise(1000, 6), RATE, subtype="FLOAT")
    six, film = streams.open_source(tmp_path / "six.wav"), streams.open_source(made("open_gop.mkv"))
    arrays = streams.source_of(media.Clip("arrays", film._film.read(0, 1), media.read_clip(tmp_path / "six.wav").sound))
    for source, name, said in [
        (film, "a.avi", "found suffix '.avi', expected one of"),
        (film, "a.mpg", "holds no h264 pictures; name the target .mkv or .mp4"),
        (film, "none/a.mkv", "cannot be written .No such file"),
        (six, "a.mp4", "holds no pictures; name the target .wav"),
        (six, "a.flac", "flac cannot hold subtype FLOAT; name the file .wav"),
        (arrays, "a.mkv", "is no file whose pictures could be copied"),
    ]:
        with pytest.raises(media.MediaError, match=said) as error:
            written(source, tmp_path / name)
        assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["six.wav"]


@pytest.mark.parametrize("suffix", [".wav", ".mkv"])
def test_a_file_appears_whole_or_not_at_all(made, tmp_path, suffix):
    target = tmp_path / f"out{suffix}"
    with streams.open_source(made("float.mov")) as source:
        x = source.sound(0, source.num_samples)

        def broken():
            yield x[:20_000]
            raise RuntimeError("stopped")

        holed = x.copy()
        holed[30_000, 1] = np.nan
        for blocks, error, said in [
            (broken(), RuntimeError, "stopped"),
            ([x[:-1]], media.MediaError, "found 47999 samples to write, expected all 48000"),
            ([x, x], media.MediaError, "found 96000 samples"),
            ([x[:, :1]], media.MediaError, r"shape \(48000, 1\), expected \(n, 2\)"),
            ([holed], media.MediaError, "NaN"),
        ]:
            with pytest.raises(error, match=said):
                streams.write_clip(source, target, blocks)
            assert os.listdir(tmp_path) == []
        target.write_text("mine")
        with pytest.raises(FileExistsError, match="--overwrite"):
            streams.write_clip(source, target, [x])
        with pytest.raises(media.MediaError):
            streams.write_clip(source, target, [x[:9]], overwrite=True)
        assert target.read_text() == "mine"
        streams.write_clip(source, target, [x], overwrite=True)
    assert os.listdir(tmp_path) == [target.name]
    np.testing.assert_array_equal(media.read_clip(target).sound.samples, x)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mkv", ".mp4"])
def test_a_disk_without_room_leaves_nothing(made, tmp_path, suffix):
    target, limits = tmp_path / f"out{suffix}", resource.getrlimit(resource.RLIMIT_FSIZE)
    with streams.open_source(made("open_gop.mkv")) as source:
        written(source, target)
        size = target.stat().st_size
        target.unlink()
        for room in (size // 2, size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            try:
                with pytest.raises(media.MediaError, match="cannot be written"):
                    written(source, target)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert os.listdir(tmp_path) == []


def test_a_source_may_be_written_over(made, tmp_path):
    path = tmp_path / "a.mkv"
    path.write_bytes(made("open_gop.mkv").read_bytes())
    with streams.open_source(path) as source:
        written(source, path, overwrite=True)
    assert packets(path) == packets(made("open_gop.mkv"))


def test_a_wav_too_long_for_its_kind_is_an_rf64(tmp_path, monkeypatch):
    x = noise(20_000)
    soundfile.write(tmp_path / "in.wav", x, RATE, subtype="FLOAT")
    monkeypatch.setattr(muxing, "WAV_BYTES", 79_999)
    with streams.open_source(tmp_path / "in.wav") as source:
        new, warnings = written(source, tmp_path / "out.wav")
    assert (tmp_path / "out.wav").read_bytes()[:4] == b"RF64" and "RF64" in warnings[0]
    np.testing.assert_array_equal(new.sound.samples, x)


LONG = """
import resource, sys
import numpy as np
from avsi_jax import streams
with streams.open_source(sys.argv[1]) as source:
    list(source.pictures(0, 1).times), streams.write_clip(source, sys.argv[2], (b for _, b in source.blocks(100_000)))
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
            video, sound = out.add_stream("mpeg4", rate=5), out.add_stream("pcm_s16le", rate=48_000, layout="mono")
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            for second in range(seconds):
                for k in range(5):
                    frame = av.VideoFrame.from_ndarray(np.full((72, 64), 40 * k, np.uint8), format="yuv420p")
                    frame.pts, frame.time_base = 5 * second + k, fractions.Fraction(1, 5)
                    out.mux(video.encode(frame))
                frame = av.AudioFrame.from_ndarray(media.to_int16(block).T.copy(), format="s16", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 48_000, 48_000 * second, fractions.Fraction(1, 48_000)
                out.mux(sound.encode(frame))
            out.mux(video.encode(None))
        command = [sys.executable, "-c", LONG, str(tmp_path / f"{name}.mkv"), str(tmp_path / f"{name}.out.mkv")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 2 * streams.IN_MEMORY / 2**20
