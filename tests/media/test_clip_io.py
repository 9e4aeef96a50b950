"""Clips are decoded and written as expected: files of known content, made here with PyAV and soundfile, and real Grid clips."""

import fractions

import numpy as np
import pytest

from avsi_jax.media import clip_io, grid_mpeg

FPS, RATE = 25, 48_000


def tone(hz, seconds=1.0, rate=RATE, level=0.5):
    return (level * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def level_at(x, hz, rate):
    """Amplitude of one frequency in x (N,)."""
    return 2 * abs(np.exp(-2j * np.pi * hz * np.arange(len(x)) / rate) @ x) / len(x)


def write_clip(path, video_codec=None, audio_codec=None, *, channels=(), late_s=0.0, frames=FPS, rate=RATE):
    """Writes a clip whose frame t is plain grey of level 40 + 5 t and starts `late_s` after the audio; `channels`: float arrays."""
    import av

    with av.open(str(path), "w") as out:
        video = out.add_stream(video_codec, rate=FPS) if video_codec else None
        if video is not None:
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            video.time_base = video.codec_context.time_base = fractions.Fraction(1, FPS)
        audio = out.add_stream(audio_codec, rate=rate) if audio_codec else None
        if audio is not None:
            audio.layout = "stereo" if len(channels) == 2 else "mono"
        for t in range(frames if video is not None else 0):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 + 5 * t, np.uint8), format="rgb24")
            frame.pts, frame.time_base = t + round(late_s * FPS), fractions.Fraction(1, FPS)
            out.mux(video.encode(frame))
        if audio is not None:
            write_channels(out, audio, channels, rate)
        for stream in filter(None, (video, audio)):
            out.mux(stream.encode(None))
    return path


def write_channels(out, stream, channels, rate):
    """Encodes float channels into an audio stream."""
    import av

    frame = av.AudioFrame.from_ndarray(np.stack(channels), format="fltp", layout=stream.layout.name)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, fractions.Fraction(1, rate)
    converter = av.AudioResampler(format=stream.codec_context.format.name, layout=stream.layout.name, rate=rate)
    for part in converter.resample(frame) + converter.resample(None):
        out.mux(stream.encode(part))


def test_a_grid_clip_has_the_properties_that_the_corpus_documents(grid_dir):
    clip = clip_io.read_clip(grid_dir / "s1" / "bbaz5s.mpg")
    assert clip.video.rgb.shape == (75, 288, 360, 3) and clip.video.rgb.dtype == np.uint8
    assert clip.video.fps == 25 and clip.video.start_s == clip.audio.start_s == 0
    np.testing.assert_allclose(clip.video.times, np.arange(75) / 25, atol=1e-9)
    assert clip.audio.samples.shape == (131_328, 2) and clip.audio.samples.dtype == np.float32
    assert (clip.audio.rate, clip.audio.subtype, clip.audio.codec) == (44_100, "PCM_16", "mp2")
    assert clip_io.audio_lag_s(clip) == pytest.approx(0.0110)


def test_lag_of_grid_audio_copied_into_an_mp4(grid_dir):
    clip = clip_io.read_clip(next((grid_dir / "re-encoded" / "s4").glob("*.mp4")))  # its manifest: copied MP2 audio
    assert clip.audio.codec != "mp2" and clip_io.audio_lag_s(clip) == pytest.approx(0.0110)


def test_lag_of_a_grid_clip_agrees_with_its_original_wav(grid_dir):
    """Oracle: cross-correlation of an original wav with the audio of its MPEG, where both are available."""
    wavs = [w for w in grid_dir.glob("audio_25k/*/*.wav") if (grid_dir / w.parent.name / f"{w.stem}.mpg").exists()]
    if not wavs:
        pytest.skip("no clip with its original wav")
    clip = clip_io.read_clip(grid_dir / wavs[0].parent.name / f"{wavs[0].stem}.mpg")
    wav = clip_io.read_clip(wavs[0]).audio
    a = clip_io.resample(clip_io.mono(wav.samples), wav.rate, 16_000)
    b = clip_io.resample(clip_io.mono(clip.audio.samples), clip.audio.rate, 16_000)
    n = 2**17
    shift = int(np.argmax(np.fft.irfft(np.fft.rfft(b, n) * np.conj(np.fft.rfft(a, n)))[:2000]))
    assert shift / 16_000 == pytest.approx(clip_io.audio_lag_s(clip), abs=2 / 16_000)


def test_a_short_clip_keeps_its_own_frame_count(grid_dir):
    clip = clip_io.read_clip(grid_dir / "s1" / "lrae3s.mpg")
    assert len(clip.video.rgb) == len(clip.video.times) == 74 and len(clip.audio.samples) == 131_328


def test_unwanted_video_or_audio_is_not_decoded(grid_dir):
    path = grid_dir / "s1" / "bbaz5s.mpg"
    assert clip_io.read_clip(path, audio=False).audio is None
    assert clip_io.read_clip(path, video=False).video is None


@pytest.mark.parametrize(
    "suffix, video_codec, audio_codec, subtype",
    [
        (".mp4", "mpeg4", "aac", "PCM_16"),
        (".mkv", "libx264", "flac", "PCM_16"),
        (".avi", "mpeg4", "pcm_s16le", "PCM_16"),
        (".mov", "mpeg4", "pcm_s24le", "PCM_24"),
        (".MOV", "mpeg4", "pcm_f32le", "FLOAT"),
        (".mkv", "libx264", "libopus", "PCM_16"),
        (".mpg", "mpeg1video", "mp2", "PCM_16"),
    ],
)
def test_a_clip_is_decoded_from_every_container(tmp_path, suffix, video_codec, audio_codec, subtype):
    path = write_clip(tmp_path / f"clip{suffix}", video_codec, audio_codec, channels=(tone(500), tone(500)))
    clip = clip_io.read_clip(path)
    levels = clip.video.rgb.astype(float).mean((1, 2, 3))
    np.testing.assert_allclose(levels, 40 + 5 * np.arange(FPS), atol=4)
    np.testing.assert_allclose(clip.video.times, np.arange(FPS) / FPS, atol=2e-3)
    assert clip.video.fps == pytest.approx(FPS) and clip.audio.rate == RATE
    assert clip.audio.subtype == subtype and clip.audio.samples.dtype == np.float32 and clip.audio.samples.shape[1] == 2
    assert len(clip.audio.samples) >= RATE * 0.99
    assert level_at(clip_io.mono(clip.audio.samples)[:RATE], 500, RATE) == pytest.approx(0.5, rel=0.03)


def test_lossless_audio_is_decoded_exactly(tmp_path):
    x = tone(333, level=0.9)
    clip = clip_io.read_clip(write_clip(tmp_path / "a.mkv", "libx264", "pcm_s16le", channels=(x,)))
    assert len(clip.audio.samples) == RATE
    np.testing.assert_allclose(clip.audio.samples[:, 0], x, atol=1.01 / 32768)


def test_mono_is_the_mean_of_the_channels(tmp_path):
    path = write_clip(tmp_path / "two.mov", "mpeg4", "pcm_s16le", channels=(tone(500, level=0.8), tone(1200, level=0.4)))
    samples = clip_io.read_clip(path).audio.samples
    assert level_at(samples[:, 0], 500, RATE) == pytest.approx(0.8, rel=1e-3)
    assert level_at(samples[:, 1], 1200, RATE) == pytest.approx(0.4, rel=1e-3)
    x = clip_io.mono(samples)
    assert x.shape == (RATE,) and x.dtype == np.float32
    assert level_at(x, 500, RATE) == pytest.approx(0.4, rel=1e-3) and level_at(x, 1200, RATE) == pytest.approx(0.2, rel=1e-3)


def test_frames_that_start_late_give_the_audio_a_lag(tmp_path):
    clip = clip_io.read_clip(write_clip(tmp_path / "late.mkv", "libx264", "flac", channels=(tone(500),), late_s=0.4))
    assert clip.video.start_s - clip.audio.start_s == pytest.approx(0.4, abs=2e-3)
    assert clip_io.audio_lag_s(clip) == pytest.approx(0.4, abs=2e-3) and clip.video.times[0] == 0


def test_the_delay_of_grid_is_added_only_for_audio_like_grids(tmp_path):
    def lag(rate, late_s):
        path = tmp_path / f"{rate}{late_s}.mkv"
        return clip_io.audio_lag_s(
            clip_io.read_clip(write_clip(path, "mpeg1video", "mp2", channels=(tone(500, rate=rate),), rate=rate, late_s=late_s))
        )

    assert lag(44_100, 0.0) == pytest.approx(0.0110, abs=1e-4)
    assert lag(48_000, 0.0) == pytest.approx(0.0, abs=1e-4)
    assert lag(44_100, 0.4) == pytest.approx(0.4, abs=2e-3)


def test_missing_video_or_audio_is_none(tmp_path):
    assert clip_io.read_clip(write_clip(tmp_path / "mute.mp4", "mpeg4")).audio is None
    only_audio = clip_io.read_clip(write_clip(tmp_path / "audio.mp4", audio_codec="aac", channels=(tone(500),)))
    assert only_audio.video is None and clip_io.audio_lag_s(only_audio) == 0
    with pytest.raises(clip_io.MediaError, match="mute.mp4: found no audio"):
        clip_io.read_clip(tmp_path / "mute.mp4", video=False)


def test_missing_times_are_filled_from_the_frame_rate():
    np.testing.assert_allclose(clip_io.fill_times(np.array([np.nan, np.nan, np.nan]), 25), [0, 0.04, 0.08])
    np.testing.assert_allclose(clip_io.fill_times(np.array([np.nan, 1.04, np.nan]), 25), [1.0, 1.04, 1.08])


@pytest.mark.parametrize("subtype, bits", [("PCM_16", 16), ("PCM_24", 24), ("PCM_U8", 8), ("FLOAT", 24), ("DOUBLE", 24)])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_round_trip_is_exact(tmp_path, subtype, bits, channels):
    integers = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (4000, channels))
    x = (integers / 2 ** (bits - 1)).astype(np.float32)  # float32 holds 24 bits exactly
    clip_io.write_audio(tmp_path / "a.wav", x, 16_000, subtype)
    audio = clip_io.read_clip(tmp_path / "a.wav").audio
    assert (audio.rate, audio.subtype, audio.start_s) == (16_000, subtype, 0.0)
    np.testing.assert_array_equal(audio.samples, x)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_flac_round_trip_is_exact(tmp_path, subtype):
    x = np.random.default_rng(1).integers(-32768, 32768, 4000).astype(np.int16)
    clip_io.write_audio(tmp_path / "a.FLAC", x, 25_000, subtype)
    audio = clip_io.read_clip(tmp_path / "a.FLAC").audio
    assert audio.subtype == subtype and audio.rate == 25_000
    np.testing.assert_array_equal(clip_io.to_int16(audio.samples[:, 0]), x)


def test_conversion_to_int16_rounds_and_clips():
    x = np.array([-1.2, -1.0, -0.5, 0.0, 0.4 / 32768, 0.6 / 32768, 0.5, 1.0, 1.3])
    np.testing.assert_array_equal(clip_io.to_int16(x), [-32768, -32768, -16384, 0, 0, 1, 16384, 32767, 32767])
    all_values = np.arange(-32768, 32768).astype(np.int16)
    np.testing.assert_array_equal(clip_io.to_int16(clip_io.from_int16(all_values)), all_values)


@pytest.mark.parametrize("rate_from", [25_000, 44_100, 50_000])
def test_resampling_agrees_with_librosa(rate_from):
    import librosa

    x = np.random.default_rng(2).standard_normal(rate_from).astype(np.float32)
    y = clip_io.resample(x, rate_from, 16_000)
    assert y.dtype == np.float32 and len(y) == 16_000
    np.testing.assert_allclose(y, librosa.resample(x, orig_sr=rate_from, target_sr=16_000, res_type="soxr_hq"), atol=1e-6)
    both = clip_io.resample(np.stack([x, -x], 1), rate_from, 16_000)
    np.testing.assert_allclose(both, np.stack([y, -y], 1), atol=1e-6)


def test_resampling_to_the_same_rate_changes_nothing():
    x = tone(500)
    np.testing.assert_array_equal(clip_io.resample(x, RATE, RATE), x)


def test_unreadable_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "noise.mp4").write_bytes(b"this is no clip" * 100)
    (tmp_path / "noise.wav").write_bytes(b"this is no sound" * 100)
    (tmp_path / "noise.txt").write_bytes(b"this is no clip" * 100)
    (tmp_path / "empty.mkv").write_bytes(b"")
    (tmp_path / "folder.mpg").mkdir()
    with pytest.raises(FileNotFoundError, match="no such file"):
        clip_io.read_clip(tmp_path / "absent.mpg")
    for name, message in {
        "noise.txt": "noise.txt: (found a playlist or another unknown format|cannot be decoded)",
        "noise.mp4": "cannot be decoded",
        "noise.wav": "cannot be decoded",
        "empty.mkv": "cannot be decoded",
        "folder.mpg": "found a folder",
    }.items():
        with pytest.raises(clip_io.MediaError, match=message) as e:
            clip_io.read_clip(tmp_path / name)
        assert "\n" not in str(e.value)


def test_audio_that_cannot_be_written_is_refused(tmp_path):
    x = tone(500)
    for name, subtype, audio, message in (
        ("a.mp3", "PCM_16", x, "a.mp3: .*.wav or .flac"),
        ("a.flac", "FLOAT", x, "a.flac: .*FLOAT"),
        ("a.wav", "PCM_16", np.full(10, np.nan), "a.wav: .*NaN"),
        ("absent/a.wav", "PCM_16", x, "a.wav: cannot be written"),
    ):
        with pytest.raises(clip_io.MediaError, match=message):
            clip_io.write_audio(tmp_path / name, audio, RATE, subtype)
    assert not list(tmp_path.iterdir())


def test_a_truncated_clip_is_decoded_as_far_as_it_goes(grid_dir, tmp_path):
    data = (grid_dir / "s1" / "bbaz5s.mpg").read_bytes()
    (tmp_path / "cut.mpg").write_bytes(data[: len(data) // 2])
    clip = clip_io.read_clip(tmp_path / "cut.mpg")
    assert 20 < len(clip.video.rgb) < 60 and 40_000 < len(clip.audio.samples) < 100_000


def test_metadata_that_is_not_utf8_is_no_error(tmp_path):
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "title in Latin-1"
        audio = out.add_stream("pcm_s16le", rate=RATE, layout="mono")
        audio.metadata["title"] = "title in Latin-1"
        write_channels(out, audio, [tone(440)], RATE)
    content = path.read_bytes()
    assert content.count(b"title in Latin-1") == 2
    path.write_bytes(content.replace(b"title in Latin-1", b"titl\xe9 \xff\xfe Latin-1"))
    assert len(clip_io.read_clip(path).audio.samples) == RATE


@pytest.mark.parametrize("takes_keyword", [True, False])
def test_clips_are_read_whether_or_not_pyav_takes_metadata_errors(tmp_path, monkeypatch, takes_keyword):
    """PyAV 19 removed the keyword; earlier ones fail on metadata that is not UTF-8 without it."""
    import av

    path, real_open, keywords = write_clip(tmp_path / "a.mkv", "ffv1"), av.open, []

    def newest(file, mode="r", *, options=None):
        keywords.append({})
        return real_open(file, mode, options=options)

    def older(file, mode="r", *, options=None, metadata_errors="strict"):
        keywords.append({"metadata_errors": metadata_errors})
        return real_open(file, mode, options=options)

    monkeypatch.setattr(av, "open", older if takes_keyword else newest)
    assert len(clip_io.read_clip(path).video.rgb) == FPS
    assert keywords == ([{"metadata_errors": "replace"}] if takes_keyword else [{}])


def flash_and_click(frames=50, at=20, rate=25_000):
    """Dark frames (T, 72, 64) of yuv420p and silent audio, except for frame `at`, which is white and begins with a click."""
    video = np.full((frames, 72, 64), 128, np.uint8)
    video[:, :48] = 20
    video[at, :48] = 230
    audio = np.zeros(frames * rate // FPS, np.int16)
    audio[at * rate // FPS : at * rate // FPS + 50] = 20_000
    return video, audio


def test_a_written_mpeg_is_decoded_by_opencv(tmp_path):
    """And PyAV reports the expected formats."""
    import av
    import cv2

    frames, audio = flash_and_click()
    grid_mpeg.write_clip(tmp_path / "a.mpg", frames, FPS, audio, 25_000)
    reader, luma = cv2.VideoCapture(str(tmp_path / "a.mpg")), []
    while (image := reader.read())[0]:
        luma.append(image[1].mean())
    assert len(luma) == 50 and np.argmax(luma) == 20 and luma[20] > 200 and max(luma[18], luma[22]) < 60
    with av.open(str(tmp_path / "a.mpg")) as container:
        assert container.format.name == "mpeg"
        video_stream, audio_stream = container.streams
        size = (video_stream.width, video_stream.height)
        assert (video_stream.codec.name, size, video_stream.average_rate) == ("mpeg1video", (64, 48), FPS)
        assert audio_stream.codec.canonical_name == "mp2" and (audio_stream.rate, audio_stream.channels) == (44_100, 1)


def test_a_written_mpeg_keeps_audio_and_video_together(tmp_path):
    """The click comes as long after the flash as audio_lag_s says."""
    video, audio = flash_and_click(at=30)
    grid_mpeg.write_clip(tmp_path / "a.mpg", video, FPS, audio, 25_000)
    clip = clip_io.read_clip(tmp_path / "a.mpg")
    click_s = np.argmax(np.abs(clip.audio.samples[:, 0])) / clip.audio.rate
    flash_s = clip.video.times[clip.video.rgb.mean((1, 2, 3)).argmax()]
    assert flash_s == pytest.approx(30 / FPS, abs=1e-3)
    assert click_s - flash_s == pytest.approx(clip_io.audio_lag_s(clip), abs=2.5e-3)  # the click lasts 2 ms


def test_the_same_input_gives_the_same_mpeg_bytes(tmp_path):
    video, audio = flash_and_click()
    rng = np.random.default_rng(0)
    video = rng.integers(16, 235, video.shape, np.uint8)
    for name, samples in (("a.mpg", audio), ("b.mpg", audio), ("c.mpg", clip_io.from_int16(audio))):
        grid_mpeg.write_clip(tmp_path / name, video, FPS, samples, 25_000)
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.mpg", "b.mpg", "c.mpg"))
    assert a == b == c


def test_input_that_grid_mpeg_cannot_write_is_refused(tmp_path):
    video, audio = flash_and_click()
    for name, frames, message in (
        ("a.mp4", video, "a.mp4: .*.mpg"),
        ("a.mpg", video[:, :71], r"a.mpg: .*\(50, 71, 64\).*uint8"),
        ("a.mpg", video.astype(float), "a.mpg: .*float64.*uint8"),
        ("absent/a.mpg", video, "a.mpg: cannot be written"),
    ):
        with pytest.raises(clip_io.MediaError, match=message):
            grid_mpeg.write_clip(tmp_path / name, frames, FPS, audio, 25_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        "ffconcat version 1.0\nfile real.mkv\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nreal.mkv\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
    ids=["concat", "hls", "sdp"],
)
def test_a_playlist_opens_no_other_file(tmp_path, content):
    write_clip(
        tmp_path / "real.mkv", "libx264", frames=2
    )  # without a list of allowed formats, ffmpeg opened it from the first playlist
    for suffix in (".mp4", ".mpg"):
        (tmp_path / f"list{suffix}").write_text(content)
        with pytest.raises(clip_io.MediaError, match="list.m.*(playlist|cannot be decoded)") as error:
            clip_io.read_clip(tmp_path / f"list{suffix}")
        assert "\n" not in str(error.value)
    (tmp_path / "list.png").write_text(content)
    with pytest.raises(clip_io.MediaError, match="list.png"):
        clip_io.read_frames([tmp_path / "list.png"])
