"""tfds_grid.clips on clips with every kind of fault, made here from a synthetic clip, so that the right result is known."""

import shutil
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from avsi_jax.media import clip_io
from tfds_grid import clips, speakers
from tfds_grid.raw_files import RawFile

CLIP = "bbaf2n"  # a Grid id: "bin blue at f two now"


@pytest.fixture(scope="module")
def original(synthetic_dir):
    """(frames (75, 288, 360, 3), audio (N,) int16 at 25 kHz, path of the .mpg) of one synthetic clip."""
    path = sorted(synthetic_dir.glob("s1/*.mpg"))[0]
    audio, rate = soundfile.read(synthetic_dir / f"audio_25k/s1/{path.stem}.wav", dtype="int16")
    assert rate == 25_000
    return clip_io.read_clip(path).video.rgb, audio, path


@pytest.fixture(scope="module")
def reference(original):
    """The measurement of the undamaged clip."""
    return clips.measure(raw_clip(original[2]), mouth=True)


def raw_clip(video=None, clip_id=CLIP, **files):
    """RawClip of paths; frames: a list of paths of image files."""
    file = lambda path: RawFile(Path(path), Path(path).name) if path else None
    frames = tuple(map(file, files.pop("frames", ())))
    return speakers.RawClip(clip_id, "s1", file(video), frames=frames, **{k: file(p) for k, p in files.items()})


def encode(path, rgb, waveform, *, fps=25, rate=25_000, times=None):
    """Writes a .mkv with nearly lossless MPEG-4 video and, unless None, 16-bit audio (N,) or (N, C)."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=fps)
        video.height, video.width, video.pix_fmt = *rgb.shape[1:3], "yuv420p"
        video.options = {"qscale": "2"}
        video.codec_context.qmin = video.codec_context.qmax = 2
        if waveform is not None:
            waveform = waveform[:, None] if waveform.ndim == 1 else waveform
            audio = container.add_stream("pcm_s16le", rate=rate, layout={1: "mono", 2: "stereo"}[waveform.shape[1]])
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform).reshape(1, -1), "s16", audio.layout.name)
            frame.sample_rate, frame.pts = rate, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
        for index, image in zip(times if times is not None else range(len(rgb)), rgb, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
            frame.pts = int(index)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


def measure(tmp_path, rgb, audio, mouth=False, **options):
    return clips.measure(raw_clip(encode(tmp_path / f"{CLIP}.mkv", rgb, audio, **options)), mouth=mouth)


def notes(measured):
    return dict(note.split(": ", 1) for note in map(str, measured["notes"]))


def test_an_undamaged_clip_is_measured_without_notes(reference):
    assert reference["landmarks"].shape == (75, 68, 2) and reference["landmarks_valid"].all() and not len(reference["notes"])
    assert reference["mouth"].shape == (75, 96, 96) and reference["fps"] == 25 and reference["frame_size"].tolist() == [360, 288]


# --------------------------------------------------------------------------------------------------------- files and frames


@pytest.mark.parametrize("suffix", [".mpg", ".mp4"])
@pytest.mark.parametrize("content", [b"", b"no video at all" * 999, bytes(5000), b"\x00\x00\x01\xba" * 800])
def test_files_that_are_no_video_are_refused(tmp_path, suffix, content):
    (tmp_path / f"{CLIP}{suffix}").write_bytes(content)
    with pytest.raises(clips.UnusableClipError) as refused:
        clips.measure(raw_clip(tmp_path / f"{CLIP}{suffix}"), mouth=False)
    assert str(refused.value) and str(tmp_path) not in str(refused.value)


def test_a_truncated_file_is_refused(tmp_path, original):
    data = original[2].read_bytes()
    (tmp_path / "cut.mpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(clips.UnusableClipError, match=r"cut short: [34]\d frames, 1\.\d+ s"):
        clips.measure(raw_clip(tmp_path / "cut.mpg"), mouth=False)


def test_corrupt_bytes_in_the_middle_do_not_crash(tmp_path, original, reference):
    """Either result is right: fewer valid frames, or a reason."""
    data = bytearray(original[2].read_bytes())
    data[100_000:140_000] = np.random.default_rng(0).integers(0, 256, 40_000, np.uint8).tobytes()
    (tmp_path / "corrupt.mpg").write_bytes(data)
    try:
        measured = clips.measure(raw_clip(tmp_path / "corrupt.mpg"), mouth=False)
    except clips.UnusableClipError as e:
        assert str(e)
    else:
        assert len(measured["landmarks"]) == len(measured["landmarks_valid"]) <= 75


@pytest.mark.parametrize("frames", [74, 70])
def test_a_clip_with_a_few_missing_frames_is_kept_with_a_note(tmp_path, original, frames):
    measured = measure(tmp_path, original[0][:frames], original[1])
    assert len(measured["landmarks"]) == frames and notes(measured) == {"frames": f"{frames}, not 75"}


def test_a_clip_with_too_few_frames_is_refused(tmp_path, original):
    with pytest.raises(clips.UnusableClipError, match="69 frames, 2.76 s"):
        measure(tmp_path, original[0][:69], original[1])
    own = encode(tmp_path / "own.mkv", original[0][:50], original[1])  # not Grid: only the durations must agree
    with pytest.raises(clips.UnusableClipError, match="video lasts 2.00 s, audio 3.00 s"):
        clips.measure(raw_clip(own, "me/take 1"), mouth=False)
    short = encode(tmp_path / "short.mkv", original[0][:50], original[1][:50_000])
    assert len(clips.measure(raw_clip(short, "me/take 1"), mouth=False)["landmarks"]) == 50


def test_grey_frames_at_the_start_are_invalid(tmp_path, original):
    rgb = original[0].copy()
    rgb[:15] = 128
    measured = measure(tmp_path, rgb, original[1])
    np.testing.assert_array_equal(measured["landmarks_valid"], np.arange(75) >= 15)
    assert "15" in notes(measured)["face"]
    rgb[15] = 128
    with pytest.raises(clips.UnusableClipError, match="16 of its 75 frames"):
        measure(tmp_path, rgb, original[1])


def test_a_clip_without_a_face_is_refused(tmp_path, original):
    scene = np.random.default_rng(0).integers(60, 90, (75, 288, 360, 3), np.uint8)
    with pytest.raises(clips.UnusableClipError, match="no face"):
        measure(tmp_path, scene, original[1])


def test_frames_without_a_face_in_the_middle_are_interpolated(tmp_path, original):
    rgb = original[0].copy()
    rgb[40:52] = 20
    measured = measure(tmp_path, rgb, original[1])
    np.testing.assert_array_equal(np.flatnonzero(~measured["landmarks_valid"]), np.arange(40, 52))
    assert notes(measured).keys() == {"face"} and "12 of 75" in notes(measured)["face"]
    interpolated = measured["landmarks"][39:53].astype(np.float64)  # on a straight line
    np.testing.assert_allclose(np.diff(interpolated, 2, axis=0), 0, atol=1e-3)
    rgb[40:56] = 20
    with pytest.raises(clips.UnusableClipError, match="16 of its 75 frames"):
        measure(tmp_path, rgb, original[1])


def test_other_frame_sizes_give_the_same_landmarks(tmp_path, original, reference):
    big = np.repeat(np.repeat(original[0], 2, axis=1), 2, axis=2)
    measured = measure(tmp_path, big, original[1])
    assert measured["frame_size"].tolist() == [720, 576] and not len(measured["notes"])
    halved = (measured["landmarks"] - 0.5) / 2  # the centre of a doubled pixel
    assert np.abs(halved - reference["landmarks"]).mean() < 1.0  # pixels; 0.3 to 0.6 comes from coding twice


@pytest.mark.parametrize(("fps", "frames"), [(50, 150), (30, 90), (15, 45)])
def test_other_frame_rates_are_resampled_to_25_fps(tmp_path, original, reference, fps, frames):
    """Oracle: the same video with each frame shown at its nearest time."""
    indices = np.minimum((np.arange(frames) * 25 / fps).astype(int), 74)
    measured = measure(tmp_path, original[0][indices], original[1], mouth=True, fps=fps)
    assert measured["landmarks"].shape == (75, 68, 2) and measured["mouth"].shape == (75, 96, 96) and measured["fps"] == 25
    assert notes(measured) == {"frame rate": f"{frames} frames at {fps} fps resampled to 75 at 25 fps"}
    # frames are shown up to 1 / fps too late: compare the path of the lower lip
    lip = lambda m: m["landmarks"][:, 66, 1] - m["landmarks"][:, 62, 1]
    assert np.corrcoef(lip(measured), lip(reference))[0, 1] > 0.85


def test_frames_keep_their_times_when_others_are_missing(tmp_path, original, reference):
    """Missing frames show in the time stamps of the file."""
    kept = np.array([*range(30), *range(36, 75)])
    measured = measure(tmp_path, original[0][kept], original[1], times=kept)
    assert len(measured["landmarks"]) == 75
    np.testing.assert_array_equal(np.flatnonzero(~measured["landmarks_valid"]), np.arange(30, 36))  # too long to interpolate
    assert np.abs(measured["landmarks"][kept] - reference["landmarks"][kept]).mean() < 1.0


def test_landmarks_are_interpolated_linearly_in_time():
    """Oracle: np.interp."""
    rng = np.random.default_rng(0)
    times = np.cumsum(np.r_[0, rng.uniform(0.02, 0.05, 40)])
    landmarks, valid = rng.normal(size=(41, 68, 2)).astype(np.float32), rng.random(41) > 0.2
    resampled, resampled_valid, nearest = clips._at_25_fps(landmarks, valid, times, 30)
    wanted = np.arange(len(resampled)) * 0.04
    assert abs(wanted[-1] + 0.04 - times[-1] - 1 / 30) <= 0.02 + 1e-9
    for j, k in ((0, 0), (30, 1), (67, 0)):
        np.testing.assert_allclose(resampled[:, j, k], np.interp(wanted, times, landmarks[:, j, k]), atol=1e-6)
    part = np.interp(wanted, times, (~valid).astype(float))
    np.testing.assert_array_equal(resampled_valid[part > 0], False)
    np.testing.assert_array_equal(nearest, np.abs(times[None] - wanted[:, None]).argmin(1))


def test_a_folder_of_images_is_read_as_video(tmp_path, original, reference):
    paths = []
    for number, image in enumerate(original[0]):
        paths.append(tmp_path / f"{number}.png")
        with av.open(str(paths[-1]), "w", format="image2") as container:
            stream = container.add_stream("png", rate=1)
            stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
    soundfile.write(tmp_path / "x.wav", original[1], 25_000)
    measured = clips.measure(raw_clip(frames=paths, audio=tmp_path / "x.wav"), mouth=True)
    np.testing.assert_array_equal(measured["landmarks"], reference["landmarks"])
    np.testing.assert_array_equal(measured["mouth"], reference["mouth"])
    assert measured["audio"].shape == (48_000,) and measured["offset_s"] == 0
    with pytest.raises(clips.UnusableClipError, match="no audio"):
        clips.measure(raw_clip(frames=paths), mouth=False)
    kept = [*paths[:30], *paths[36:]]  # numbers 30 to 35 are missing: the others keep their times
    measured = clips.measure(raw_clip(frames=kept, audio=tmp_path / "x.wav"), mouth=False)
    assert len(measured["landmarks"]) == 75
    np.testing.assert_array_equal(np.flatnonzero(~measured["landmarks_valid"]), np.arange(30, 36))
    assert np.abs(measured["landmarks"][40:] - reference["landmarks"][40:]).max() < 3
    paths[7].write_bytes(b"no image")
    with pytest.raises(clips.UnusableClipError, match="decoded"):
        clips.measure(raw_clip(frames=paths, audio=tmp_path / "x.wav"), mouth=False)


def test_an_image_that_would_exhaust_memory_is_refused(tmp_path):
    """A .png of 60 bytes that claims 30,000 x 30,000 pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    paths = [tmp_path / f"{n}.png" for n in range(2)]
    for path in paths:
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b""))
    with pytest.raises(clips.UnusableClipError, match="30000x30000|decoded"):
        clips.measure(raw_clip(frames=paths), mouth=False)


# ------------------------------------------------------------------------------------------------------------------- audio


def test_clips_with_silent_or_missing_audio_are_refused(tmp_path, original):
    with pytest.raises(clips.UnusableClipError, match="silent"):
        measure(tmp_path, original[0], np.zeros(75_000, np.int16))
    with pytest.raises(clips.UnusableClipError, match="no audio"):
        measure(tmp_path, original[0], None)


def test_the_wav_replaces_missing_audio(tmp_path, original):
    video, wav = encode(tmp_path / "x.mkv", original[0], None), tmp_path / "x.wav"
    soundfile.write(wav, original[1], 25_000)
    measured = clips.measure(raw_clip(video, audio=wav), mouth=False)
    assert measured["audio"].shape == (48_000,) and measured["offset_s"] == 0 and not len(measured["notes"])


def test_clipped_audio_is_noted(tmp_path, original):
    loud = np.clip(original[1].astype(np.int32) * 30, -32_768, 32_767).astype(np.int16)
    measured = measure(tmp_path, original[0], loud)
    assert notes(measured)["clipped"].count("%") == 1


def test_stereo_is_averaged(tmp_path, original):
    left, right = original[1], np.roll(original[1], 500) // 3
    measured = measure(tmp_path, original[0], np.stack([left, right], 1))
    mean = clip_io.resample((left / 65_536 + right / 65_536).astype(np.float32), 25_000, 16_000)
    np.testing.assert_allclose(measured["audio"], np.rint(32_768 * mean), atol=1.01)


@pytest.mark.parametrize("content", [b"", b"RIFF....WAVEjunk", "other"])
def test_a_wav_that_is_unreadable_or_of_another_clip_is_not_used(tmp_path, original, synthetic_dir, content):
    wav = tmp_path / "x.wav"
    if content == "other":  # of another clip
        shutil.copy(sorted(synthetic_dir.glob("audio_25k/s2/*.wav"))[0], wav)
    else:
        wav.write_bytes(content)
    without = clips.measure(raw_clip(original[2]), mouth=False)
    measured = clips.measure(raw_clip(original[2], audio=wav), mouth=False)
    assert notes(measured)["wav"].endswith("not used")
    np.testing.assert_array_equal(measured["audio"], without["audio"])


@pytest.mark.parametrize("where", ["own", "wav"])
def test_audio_with_nan_is_not_used(tmp_path, original, where):
    broken = (original[1] / 32_768).astype(np.float32)
    broken[500] = np.nan
    wav = tmp_path / "x.wav"
    soundfile.write(wav, broken if where == "wav" else original[1], 25_000, subtype="FLOAT" if where == "wav" else "PCM_16")
    if where == "wav":
        measured = clips.measure(raw_clip(original[2], audio=wav), mouth=False)
        assert notes(measured)["wav"].endswith("not used") and np.isfinite(measured["offset_s"])
        return
    decoded = clip_io.Clip("x", None, clip_io.Audio(broken[:, None], 25_000, 0.0, "FLOAT", "pcm_f32le"))
    notes_of_clip = []
    audio, offset_s = clips._audio(raw_clip(original[2], audio=wav), decoded, notes_of_clip)
    assert offset_s == 0 and audio.shape == (48_000,) and "NaN" in notes_of_clip[0]
    with pytest.raises(clip_io.MediaError, match="NaN"):
        clips._audio(raw_clip(original[2]), decoded, [])


def test_a_silent_track_is_replaced_by_the_wav(tmp_path, original):
    video, wav = encode(tmp_path / "x.mkv", original[0], np.zeros(75_000, np.int16)), tmp_path / "x.wav"
    soundfile.write(wav, original[1], 25_000)
    assert np.abs(clips.measure(raw_clip(video, audio=wav), mouth=False)["audio"]).max() > 1000


def test_a_wav_that_is_cut_short_is_not_used(tmp_path, original):
    soundfile.write(tmp_path / "x.wav", original[1][:52_000], 25_000)
    measured = clips.measure(raw_clip(original[2], audio=tmp_path / "x.wav"), mouth=False)
    assert notes(measured) == {"wav": "cut short, 2.08 s; not used"} and len(measured["audio"]) > 47_000


def test_the_offset_between_audio_and_video_is_measured(synthetic_dir):
    """The wav has no offset to the video; the .mpg's audio lags by the MP2 encoder's 481 samples."""
    for video in sorted(synthetic_dir.glob("s*/*.mpg"))[::2]:
        wav = synthetic_dir / f"audio_25k/{video.parent.name}/{video.stem}.wav"
        with_wav = clips.measure(raw_clip(video, audio=wav), mouth=False)
        alone = clips.measure(raw_clip(video), mouth=False)
        assert abs(with_wav["offset_s"]) < 3e-4 and abs(alone["offset_s"] - 481 / 44_100) < 3e-4
        lag_s, match = clips.lag_after(alone["audio"] / 32_768, with_wav["audio"] / 32_768)
        assert match > 0.9 and abs(lag_s - alone["offset_s"]) < 3e-4


# ------------------------------------------------------------------------------------------------------------------- words

GOOD = "0 23750 sil\n23750 29500 bin\n29500 30000 sp\n30000 34000 blue\n34000 36000 at\n36000 40000 f\n"
GOOD += "40000 44000 two\n44000 50000 now\n"


def read_words(tmp_path, content, clip_id=CLIP, suffix=".align"):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return clips.read_words(raw_clip(clip_id=clip_id, words=path))


def test_words_of_an_alignment_are_read(tmp_path):
    text, words, reason = read_words(tmp_path, GOOD)
    # 23750 = 0.95 s: the corpus' times are in 1/25000 s
    assert text == "bin blue at f two now" and not reason and [w["word"] for w in words] == text.split()
    assert words[0] == {"word": "bin", "start_s": 0.95, "end_s": 1.18} and words[1]["start_s"] == 1.2
    assert clips.read_words(raw_clip()) == ("bin blue at f two now", [], "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (GOOD.replace("two", "six"), "'bin blue at f six now'"),
        ("0 sil\n", "'0 sil'"),
        (GOOD.replace("29500 30000 sp", "-1 30000 sp"), "'-1 30000 sp'"),
        (GOOD.replace("34000 36000", "24000 36000"), "decrease"),
        ("", "''"),
        ("9" * 400 + " 5 bin\n", "expected lines of"),
        ("0 \u0665 bin\n", "expected lines of"),
        (b"\xff\xfe\x00", "decode"),
        (b"0 1 sil\n" * 20_000, "more than 100,000 bytes"),
    ],
)
def test_words_that_contradict_the_id_are_dropped(tmp_path, content, reason):
    text, words, note = read_words(tmp_path, content)
    assert text == "bin blue at f two now" and words == [] and note.startswith("words not used: ") and reason in note


def test_words_in_another_unit_are_dropped(tmp_path):
    (tmp_path / "x.align").write_text(GOOD.replace("000 ", "0000 ").replace("500 ", "5000 "))
    text, words, note = clips.read_words(raw_clip(words=tmp_path / "x.align"), 3.0)
    assert text == "bin blue at f two now" and words == [] and "20.0 s of 3.0" in note


def test_words_of_own_recordings_come_from_a_transcript_or_an_alignment(tmp_path):
    assert read_words(tmp_path, "Well, don't — GO\n there!", "me/1", ".txt") == ("well dont go there", [], "")
    text, words, _ = read_words(tmp_path, "0 100 hello\n100 200 there\n", "me/1")
    assert text == "hello there" and len(words) == 2


def test_audio_that_a_file_lacks_is_cut_off_at_its_ends_and_refused_inside():
    """What read_clip fills with zeros is no recording."""
    samples = np.ones((1000, 1), np.float32)
    decoded = lambda *missing: clip_io.Clip("x", None, clip_io.Audio(samples, 1000, 5.0, "PCM_16", "pcm_s16le", missing))
    audio = clips.without_filled_ends(decoded((0, 200), (500, 520), (900, 1000))).audio
    assert len(audio.samples) == 700 and audio.start_s == pytest.approx(5.2)
    with pytest.raises(clip_io.MediaError, match="0.50 s"):
        clips.without_filled_ends(decoded((500, 600)))


def test_lag_is_measured_with_subsample_accuracy():
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft(rng.normal(size=16_000)) * (np.arange(8_001) < 4_000)  # below 4 kHz, as speech
    for lag in (0.0, 176.0, -30.5, 40.25):
        turn = np.exp(-2j * np.pi * np.arange(8_001) * lag / 16_000)
        early, late = np.fft.irfft(spectrum), np.fft.irfft(spectrum * turn)
        measured, match = clips.lag_after(late, early[:-500])
        assert measured * 16_000 == pytest.approx(lag, abs=0.05) and match > 0.85
    assert clips.lag_after(rng.normal(size=16_000), early)[1] < 0.2


# ------------------------------------------------------------------------------------------------------------------- cache


def test_the_cache_key_covers_all_inputs(tmp_path, original, monkeypatch):
    calls = []
    monkeypatch.setattr(clips, "measure", lambda clip, mouth: calls.append(clip.id) or {"audio": np.arange(9)})
    (tmp_path / "a.mpg").write_bytes(b"one")
    (tmp_path / "a.wav").write_bytes(b"wav")
    clip, cache = raw_clip(tmp_path / "a.mpg"), tmp_path / "cache"
    first = clips.measure_cached(clip, cache, mouth=False)
    assert clips.measure_cached(clip, cache, mouth=False) == first and len(calls) == 1
    np.testing.assert_array_equal(clips.load_measured(first)["audio"], np.arange(9))
    others = {
        clips.measure_cached(clip, cache, mouth=True),
        clips.measure_cached(raw_clip(tmp_path / "a.mpg", audio=tmp_path / "a.wav"), cache, mouth=False),
    }
    (tmp_path / "a.mpg").write_bytes(b"two")
    others.add(clips.measure_cached(clip, cache, mouth=False))
    monkeypatch.setattr(clips, "CODE_VERSION", 99)
    others.add(clips.measure_cached(clip, cache, mouth=False))
    monkeypatch.undo()
    monkeypatch.setattr(clips, "measure", lambda clip, mouth: calls.append(clip.id) or {"audio": np.arange(9)})
    others.add(clips.measure_cached(raw_clip(tmp_path / "a.mpg", clip_id="語" * 80 + "/take"), cache, mouth=False))  # 240 bytes
    assert len(others | {first}) == 6 == len(calls)
    assert sorted(cache.iterdir()) == sorted(others | {first})  # no partial files
