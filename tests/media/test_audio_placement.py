"""Audio is placed by its time stamps: samples that a file lacks are zeros at their time, and nothing drifts.

The files are written packet by packet with the time stamps of the case; the oracle is where each packet's samples belong.
"""

import fractions

import numpy as np
import pytest

from avsi_jax.media import clip_io, clip_source

RATE, FPS = 16_000, 25
BLOCK = 800  # samples of a packet: 50 ms
FLAC_BLOCK = 1152  # of the encoder at this rate


def noise(num_samples, seed=0):
    """(N,) int16, nowhere zero."""
    return np.random.default_rng(seed).integers(1000, 20_000, num_samples).astype(np.int16)


def write(path, packets, *, rate=RATE, codec="pcm_s16le", video_s=None, video_start_s=0.0, lost=(), broken=()):
    """Writes a file of audio packets [(time in s, int16 samples)], and optionally of grey frames for video_s seconds.

    lost, broken: numbers of audio packets that are left out, or replaced with data that cannot be decoded.
    """
    import av

    with av.open(str(path), "w") as out:
        video = None
        if video_s:
            video = out.add_stream("mpeg4", rate=FPS)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = out.add_stream(codec, rate=rate, layout="mono")
        encoded = []
        for k in range(round((video_s or 0) * FPS)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), k, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * (video_start_s + k / FPS)), fractions.Fraction(1, 1000)
            encoded += [(packet, video) for packet in video.encode(frame)]
        for seconds, x in packets:
            frame = av.AudioFrame.from_ndarray(x[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, round(seconds * rate), fractions.Fraction(1, rate)
            encoded += [(packet, audio) for packet in audio.encode(frame)]
        encoded += [(packet, stream) for stream in out.streams for packet in stream.encode(None)]
        sound = [packet for packet, stream in encoded if stream is audio] if lost or broken else []
        for packet, stream in sorted(encoded, key=lambda pair: pair[0].dts * pair[0].time_base):
            number = next((i for i, other in enumerate(sound) if other is packet), None)
            if number in lost:
                continue
            if number in broken:
                data = av.Packet(b"\xff" * max(8, packet.size))
                data.pts, data.dts, data.duration, data.time_base = packet.pts, packet.dts, packet.duration, packet.time_base
                packet = data
            packet.stream = stream
            out.mux(packet)
    return path


def blocks(x, start_s=0.0, rate=RATE, block=BLOCK):
    """[(time, samples)] of audio without a gap."""
    return [(start_s + i / rate, x[i : i + block]) for i in range(0, len(x), block)]


def read(path, **options):
    """(int16 samples (N,), missing spans in s, Clip) of a file, the same from clip_io and clip_source."""
    clip = clip_io.read_clip(path, **options)
    with clip_source.open_source(path) as source:
        assert source.missing == clip.audio.missing and source.lag_s == clip_io.audio_lag_s(clip)
        np.testing.assert_array_equal(source.audio(0, source.num_samples), clip.audio.samples)
    missing = [(start / clip.audio.rate, stop / clip.audio.rate) for start, stop in clip.audio.missing]
    return clip_io.to_int16(clip.audio.samples[:, 0]), missing, clip


@pytest.mark.parametrize("suffix", [".mkv", ".nut"])
def test_packets_after_a_jump_are_at_their_time(tmp_path, suffix):
    x = noise(3 * RATE)
    packets = [(t, block) for t, block in blocks(x) if not 1.0 <= t < 1.5]
    samples, missing, _ = read(write(tmp_path / f"a{suffix}", packets))
    expected = x.copy()
    expected[RATE : RATE * 3 // 2] = 0
    np.testing.assert_array_equal(samples, expected)
    assert missing == [(1.0, 1.5)]


def test_several_jumps_are_each_at_their_time(tmp_path):
    """Also two that are closer together than the reader looks ahead."""
    x = noise(4 * RATE)
    lost = [(0.5, 0.75), (0.85, 1.0), (2.0, 2.05), (3.2, 3.9)]
    packets = [(t, block) for t, block in blocks(x) if not any(a - 1e-9 <= t < b - 1e-9 for a, b in lost)]
    samples, missing, _ = read(write(tmp_path / "a.mkv", packets))
    expected = x.copy()
    for a, b in lost:
        expected[round(a * RATE) : round(b * RATE)] = 0
    np.testing.assert_array_equal(samples, expected)
    np.testing.assert_allclose(missing, lost, atol=1e-3)


def test_jitter_of_time_stamps_changes_nothing(tmp_path):
    """Stamps that are up to 1 ms early or late, and single ones that are 40 ms off."""
    x, rng = noise(5 * RATE), np.random.default_rng(1)
    packets = [(t + rng.uniform(-1e-3, 1e-3) * (t > 0), block) for t, block in blocks(x)]
    for k in (20, 51, 77):
        packets[k] = (packets[k][0] + 0.04, packets[k][1])
    samples, missing, _ = read(write(tmp_path / "a.mkv", packets))
    np.testing.assert_array_equal(samples, x)
    assert missing == []


def test_stamps_that_wander_change_nothing(tmp_path):
    """As of browsers, which stamp packets when they arrive: 3 ms of noise, and 8 ms that change over seconds."""
    x, rng = noise(20 * RATE), np.random.default_rng(1)
    packets = [
        (t + 0.02 + 0.008 * np.sin(2 * np.pi * t / 4) + rng.uniform(-3e-3, 3e-3), block) for t, block in blocks(x, block=320)
    ]
    samples, missing, _ = read(write(tmp_path / "a.mkv", packets))
    np.testing.assert_array_equal(samples, x)
    assert missing == []


def test_milliseconds_of_matroska_change_nothing_at_any_rate(tmp_path):
    """Blocks of 1152 at 44.1 kHz, as of MP2: no stamp is a whole millisecond."""
    x = noise(10 * 44_100)
    samples, missing, _ = read(write(tmp_path / "a.mkv", blocks(x, rate=44_100, block=1152), rate=44_100))
    np.testing.assert_array_equal(samples, x)
    assert missing == []


def test_an_hour_of_joined_recordings_does_not_drift(tmp_path):
    """1,200 recordings of 2.978 s, one every 3 s. The first sample of each is the only one with its value."""
    rate, length = 8_000, round(2.978 * 8_000)
    recording = np.full(length, 1000, np.int16)
    recording[0] = 9000
    write(tmp_path / "a.mkv", [(3.0 * k, recording) for k in range(1200)], rate=rate)
    with clip_source.open_source(tmp_path / "a.mkv") as source:
        starts = np.concatenate([at + np.flatnonzero(x[:, 0] > 0.2) for at, x in source.blocks(2**20)])
        assert len(source.missing) == 1199
    assert len(starts) == 1200
    assert np.abs(starts / rate - 3.0 * np.arange(1200)).max() < 1e-3


def test_a_recorder_whose_clock_is_slow_does_not_drift(tmp_path):
    """Every packet is 0.2 % later than its samples say: 0.3 s after 150 s."""
    x = np.full(BLOCK, 1000, np.int16)
    write(tmp_path / "a.mkv", [(k * 0.05 * 1.002, x) for k in range(3_000)], rate=RATE)
    with clip_source.open_source(tmp_path / "a.mkv") as source:
        assert source.duration_s == pytest.approx(150 * 1.002, abs=0.02)


@pytest.mark.parametrize("numbers", [range(20, 26), range(4), range(36, 40)], ids=["middle", "start", "end"])
@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize("kind", ["lost", "broken"])
def test_packets_that_are_lost_or_cannot_be_decoded_are_missing(tmp_path, kind, suffix, numbers):
    x = noise(40 * FLAC_BLOCK)
    path = write(tmp_path / f"a{suffix}", blocks(x, block=FLAC_BLOCK), codec="flac", video_s=2.88, **{kind: numbers})
    samples, missing, _ = read(path)
    start, stop = numbers[0] * FLAC_BLOCK, (numbers[-1] + 1) * FLAC_BLOCK
    x[start:stop] = 0
    np.testing.assert_array_equal(samples, x)
    np.testing.assert_allclose(missing, [(start / RATE, stop / RATE)], atol=1e-3)


@pytest.mark.parametrize("end_s", [1.5, 2.8])
def test_audio_that_ends_early_is_missing_up_to_the_end_of_the_video(tmp_path, end_s):
    x = noise(round(end_s * RATE))
    samples, missing, _ = read(write(tmp_path / "a.mkv", blocks(x), video_s=3.0))
    np.testing.assert_array_equal(samples, np.pad(x, (0, 3 * RATE - len(x))))
    np.testing.assert_allclose(missing, [(end_s, 3.0)], atol=1e-3)


def test_audio_that_ends_shortly_before_the_video_keeps_its_length(tmp_path):
    """As in Grid's own clips, where it is 22 ms."""
    x = noise(round(2.978 * RATE))
    path = write(tmp_path / "a.mkv", blocks(x), video_s=3.0)
    samples, missing, _ = read(path)
    np.testing.assert_array_equal(samples, x)
    assert missing == []
    with clip_source.open_source(path) as source:
        assert source.end_s == pytest.approx(3.0, abs=1e-3)


@pytest.mark.parametrize("suffix", [".mkv", ".mov"])
def test_audio_that_starts_late_is_missing_from_the_start_of_the_video(tmp_path, suffix):
    """Time counts from the start of the video, as in a player."""
    x = noise(2 * RATE)
    samples, missing, clip = read(write(tmp_path / f"a{suffix}", blocks(x, 0.48), video_s=2.4))
    np.testing.assert_array_equal(samples, np.pad(x, (round(0.48 * RATE), 0)))
    np.testing.assert_allclose(missing, [(0.0, 0.48)], atol=1e-3)
    assert clip_io.audio_lag_s(clip) == pytest.approx(0.0, abs=1e-3)


def test_video_that_starts_late_leaves_the_audio_as_it_is(tmp_path):
    x = noise(2 * RATE)
    samples, missing, clip = read(write(tmp_path / "a.mkv", blocks(x), video_s=1.6, video_start_s=0.4))
    np.testing.assert_array_equal(samples, x)
    assert missing == [] and clip_io.audio_lag_s(clip) == pytest.approx(0.4, abs=1e-3)


def test_the_audio_is_the_same_without_the_video(tmp_path):
    """A system that reads the audio alone has the same clock."""
    path = write(tmp_path / "a.mkv", blocks(noise(RATE), 0.48), video_s=2.4)
    whole, alone = clip_io.read_clip(path).audio, clip_io.read_clip(path, video=False).audio
    np.testing.assert_array_equal(whole.samples, alone.samples)
    assert whole.missing == alone.missing and len(whole.missing) == 2
    with clip_source.open_source(path, video=False) as source:
        assert source.missing == whole.missing


def test_time_stamps_that_jump_by_hours_are_not_followed(tmp_path):
    """Such as those of two recordings with the time of day: a warning says so."""
    x = noise(2 * RATE)
    packets = [(t + (20_000 if t >= 1.0 else 0), block) for t, block in blocks(x)]
    samples, missing, clip = read(write(tmp_path / "a.mkv", packets))
    np.testing.assert_array_equal(samples, x)
    assert missing == [] and len(clip.audio.warnings) == 1


def test_audio_that_overlaps_by_its_stamps_is_kept_once(tmp_path):
    """The packets after 1.1 s repeat the last 40 ms."""
    x = noise(2 * RATE)
    again = round(1.06 * RATE)
    packets = blocks(x[: round(1.1 * RATE)]) + blocks(x[again:], 1.06)
    samples, missing, _ = read(write(tmp_path / "a.mkv", packets))
    np.testing.assert_array_equal(samples, x)
    assert missing == []


@pytest.mark.parametrize("with_video", [False, True])
@pytest.mark.parametrize("suffix, codec", [(".wmv", "wmav2"), (".mkv", "aac"), (".flv", "aac"), (".ts", "mp2"), (".avi", "ac3")])
def test_all_that_a_decoder_returns_is_kept(tmp_path, suffix, codec, with_video):
    """Also what it holds back until the end of the file, as that of WMA does. The oracle is PyAV's own decoding."""
    import av

    x, path = (noise(88_200) // 8).astype(np.int16), tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as out:
        video = out.add_stream("flv1" if suffix == ".flv" else "mpeg4" if suffix == ".mkv" else "mpeg2video", rate=FPS)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = out.add_stream(codec, rate=44_100, layout="mono")
        audio.bit_rate = 128_000
        frame = av.AudioFrame.from_ndarray(x[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 44_100, 0, fractions.Fraction(1, 44_100)
        for k in range(50):
            image = av.VideoFrame.from_ndarray(np.full((48, 64, 3), k, np.uint8), format="rgb24")
            image.pts, image.time_base = k, fractions.Fraction(1, FPS)
            out.mux(video.encode(image))
        resampler = av.AudioResampler(audio.codec_context.format, "mono", 44_100)
        for part in (*resampler.resample(frame), *resampler.resample(None), None):
            out.mux(audio.encode(part))
        out.mux(video.encode(None))
    with av.open(str(path)) as given:
        expected = sum(frame.samples for packet in given.demux(audio=0) for frame in packet.decode())
    audio = clip_io.read_clip(path, video=with_video).audio
    added = sum(stop - start for start, stop in audio.missing)
    assert len(audio.samples) == expected + added and added < 0.1 * 44_100
    with clip_source.open_source(path, video=with_video) as source:
        assert source.num_samples == len(audio.samples)
