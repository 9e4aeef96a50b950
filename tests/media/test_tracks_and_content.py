"""The content of a file decides how it is read, not its name; the default audio track is read unless another is chosen."""

import fractions

import numpy as np
import pytest

from avsi_jax.media import clip_io, clip_source
from tests.support.inpainting_fakes import make_clip

RATE = 16_000


def write_tracks(path, tracks, default=None, codec="pcm_s16le", kind="s16"):
    """Writes audio tracks [(start_s, samples (N,))], of which the one of index `default` has the default flag."""
    import av
    from av.stream import Disposition

    with av.open(str(path), "w") as out:
        streams = [out.add_stream(codec, rate=RATE, layout="mono") for _ in tracks]
        for stream in streams:
            stream.disposition = Disposition.default if stream.index == default else Disposition(0)
        for stream, (start_s, x) in zip(streams, tracks):
            frame = av.AudioFrame.from_ndarray(x[None], format=kind, layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, round(start_s * RATE), fractions.Fraction(1, RATE)
            out.mux(stream.encode(frame) + stream.encode(None))
    return path


def level(value):
    return np.full(RATE, value, np.int16)


def test_a_file_is_read_by_its_content_under_any_name(tmp_path):
    x = np.random.default_rng(0).integers(-9000, 9000, RATE).astype(np.int16)
    write_tracks(tmp_path / "a.mkv", [(0.0, x)]).rename(tmp_path / "a.wav")
    for name in ("b", "b.mkv", "b.txt"):
        clip_io.write_audio(tmp_path / "b.wav", x, RATE)
        (tmp_path / "b.wav").rename(tmp_path / name)
    for name in ("a.wav", "b", "b.mkv", "b.txt"):
        with clip_source.open_source(tmp_path / name) as source:
            for samples in (source.audio(0, RATE), clip_io.read_clip(tmp_path / name).audio.samples):
                np.testing.assert_array_equal(clip_io.to_int16(samples[:, 0]), x)
            assert source.codec == ("pcm_s16le" if name == "a.wav" else "wav pcm_16")


@pytest.mark.parametrize(
    "name, codec, encoder",
    [("a.mp3", "mp3", "libmp3lame"), ("a.opus", "opus", "libopus"), ("a.m4a", "aac", "aac"), ("a.aac", "aac", "aac")],
)
def test_other_kinds_of_audio_files_are_read(tmp_path, name, codec, encoder):
    tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)
    try:
        write_tracks(tmp_path / name, [(0.0, tone)], codec=encoder, kind="flt" if encoder == "libopus" else "fltp")
    except ValueError as error:  # this build of ffmpeg has no such encoder
        pytest.skip(str(error))
    audio = clip_io.read_clip(tmp_path / name).audio
    assert audio.codec.startswith(codec[:3]) and abs(len(audio.samples) / audio.rate - 1) < 0.2
    spectrum = np.abs(np.fft.rfft(audio.samples[:RATE, 0] * np.hanning(len(audio.samples[:RATE]))))
    assert abs(spectrum.argmax() * audio.rate / len(audio.samples[:RATE]) - 440) < 5


def test_the_default_track_is_read_unless_another_is_chosen(tmp_path):
    path = write_tracks(tmp_path / "a.mkv", [(0.0, level(value)) for value in (1000, 2000, 3000)], default=1)
    for track, value in ((None, 2000), (1, 1000), (2, 2000), (3, 3000)):
        assert (clip_io.to_int16(clip_io.read_clip(path, track=track).audio.samples) == value).all()
        with clip_source.open_source(path, track=track) as source:
            assert source.track == value // 1000 and (clip_io.to_int16(source.audio(0, RATE)) == value).all()


def test_a_track_that_does_not_exist_is_an_error(tmp_path):
    tracks = write_tracks(tmp_path / "a.mkv", [(0.0, level(1)), (0.0, level(2))])
    clip_io.write_audio(tmp_path / "b.wav", level(1), RATE)
    for path, track, message in (
        (tracks, 3, "2 audio tracks.*track 3"),
        (tracks, 0, "track 0"),
        (tmp_path / "b.wav", 2, "1 audio track,"),
    ):
        for read in (clip_io.read_clip, clip_source.open_source):
            with pytest.raises(clip_io.MediaError, match=message) as error:
                read(path, track=track)
            assert "\n" not in str(error.value)


def test_a_late_track_counts_from_the_start_of_the_other_tracks(tmp_path):
    path = write_tracks(tmp_path / "a.mkv", [(0.0, level(1000)), (0.5, level(2000))])
    audio = clip_io.read_clip(path, track=2).audio
    assert audio.missing == ((0, RATE // 2),) and (clip_io.to_int16(audio.samples[RATE // 2 :]) == 2000).all()
    assert clip_io.read_clip(path, track=1).audio.missing == ()


@pytest.mark.parametrize("codec, kind", [("pcm_s32le", "s32"), ("pcm_f64le", "dbl")])
def test_wide_samples_of_a_video_container_keep_all_their_bits(tmp_path, codec, kind):
    x = np.random.default_rng(0).integers(-(2**31), 2**31, 4000).astype(np.int32)
    path = write_tracks(tmp_path / "a.mkv", [(0.0, x if kind == "s32" else x / 2.0**31)], codec=codec, kind=kind)
    with clip_source.open_source(path) as source:
        np.testing.assert_array_equal(source.audio(0, 4000)[:, 0], x / 2.0**31)


@pytest.mark.parametrize(
    "samples, message",
    [
        (np.zeros((2, 48_000), np.float32), r"\(2, 48000\).*\(C, N\).*samples.T"),
        (np.zeros((0, 1), np.float32), "no samples"),
        (np.zeros(100, np.float32), r"\(100,\)"),
        (np.zeros((100, 1), np.int16), "int16"),
    ],
)
def test_audio_of_another_shape_or_type_in_a_clip_is_an_error(samples, message):
    with pytest.raises(ValueError, match=message):
        clip_source.source_from_clip(make_clip(samples, RATE))
