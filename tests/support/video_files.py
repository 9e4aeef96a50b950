"""Synthetic videos of moving noise in several codecs, and checks that a Source equals the decoded clip."""

import fractions

import numpy as np

from avsi_jax.media import clip_io, muxing

FPS, RATE, FRAMES = 25, 16_000, 75


def noise(num_samples, channels=1, level=0.1):
    """Noise (num_samples, channels) that fades in over the first second, so that its start is different from every other part."""
    x = np.random.default_rng(7).normal(size=(num_samples, channels)) * level
    return (x * np.minimum(1, np.arange(num_samples) / RATE)[:, None]).astype(np.float32)


def write_video(
    path, video_codec, audio_codec, *, channels=1, rate=RATE, start_s=0.0, late_s=0.0, irregular=False, container=None, **options
):
    """Writes a video of moving noise that starts `late_s` after the audio; all packets differ.

    irregular: with frames of unequal duration. options: of the video encoder.
    """
    import av

    rng = np.random.default_rng(3)
    image = rng.integers(0, 255, (72, 64, 3), dtype=np.uint8).repeat(2, 1)
    x, seconds, frames = noise(int(FRAMES / FPS * rate), channels), start_s + late_s, []
    with av.open(str(path), "w", format=container) as out:
        video = out.add_stream(video_codec, rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = 128, 72, "yuv420p"
        video.codec_context.time_base = fractions.Fraction(1, 1000) if irregular else fractions.Fraction(1, FPS)
        for k in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.roll(image, (3 * k, 2 * k), (0, 1)), format="rgb24")
            frame.pts, frame.time_base = round(1000 * seconds), fractions.Fraction(1, 1000)
            seconds += rng.integers(20, 90) / 1000 if irregular else 1 / FPS
            frames.append((frame.time, video, frame))
        if audio_codec:
            frames += audio_frames(out.add_stream(audio_codec, rate=rate, layout=muxing.LAYOUTS[channels]), x, rate, start_s)
        for _, stream, frame in sorted(frames, key=lambda f: f[0]):
            out.mux(stream.encode(frame))
        for stream in out.streams:
            out.mux(stream.encode(None))
    return path


def audio_frames(stream, x, rate, start_s):
    """(time, stream, frame) of audio (N, C) in the sample format of the stream's codec."""
    import av

    context = stream.codec_context
    converter = av.AudioResampler(format=context.format.name, layout=context.layout.name, rate=rate)
    for start in range(0, len(x), 1600):
        block = np.ascontiguousarray(x[start : start + 1600].T)
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=context.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = rate, start + round(start_s * rate), fractions.Fraction(1, rate)
        yield from ((frame.time, stream, part) for part in converter.resample(frame))


VIDEOS = {  # name -> video codec, audio codec, options of write_video
    "open_gop.mkv": ("libx264", "pcm_s24le", {"channels": 2, "g": "8", "x264-params": "open-gop=1:bframes=3:log-level=none"}),
    "refresh.mp4": ("libx264", "aac", {"g": "10", "x264-params": "intra-refresh=1:bframes=0", "late_s": 0.2}),
    "float.mov": ("mpeg4", "pcm_f32le", {"channels": 2, "g": "10", "bf": "2"}),
    "irregular.mkv": ("libx264", "flac", {"g": "10", "irregular": True, "late_s": 0.4, "start_s": 5.0}),
    "b_frames.mpg": ("mpeg2video", "mp2", {"g": "10", "bf": "2", "rate": 44_100}),
    "no_times.avi": ("libx264", "pcm_s16le", {"g": "10"}),
}


def video_paths(once):
    """A function from a name in VIDEOS to the path of that video, which tests must not change. `once`: the fixture."""

    def fill(folder):
        for name, (video_codec, audio_codec, options) in VIDEOS.items():
            write_video(folder / name, video_codec, audio_codec, **options)

    return lambda name: once("synthetic_videos", fill) / name


def grid_clips(folder):
    """Two clips as the corpus encodes them (the second with a frame fewer than usual), and a re-encoded one."""
    return [folder / "s1" / "bbaz5s.mpg", folder / "s1" / "lrae3s.mpg", next(iter(sorted(folder.glob("re-encoded/s4/*.mp4"))))]


def time_ranges(times):
    """Ranges that start and end at frame times, between them, and outside the video."""
    last = float(times[-1])
    yield from [(-1.0, last + 1), (0.0, 0.0), (last, last + 0.001), (last + 1, last + 2), (times[9], times[31])]
    yield from np.random.default_rng(1).uniform(-0.2, last, (4, 1)) + [0, 0.3]


def assert_same_video(source, video, ranges=None):
    """Ranges of a Source equal those of the decoded Video."""
    for start, end in ranges or time_ranges(video.times):
        in_range = (video.times >= start) & (video.times < end)
        read = source.video(start, end)
        np.testing.assert_array_equal(read.times, video.times[in_range])
        np.testing.assert_array_equal(read.rgb, video.rgb[in_range])
        assert read.rgb.shape[1:] == video.rgb.shape[1:] and read.rgb.dtype == np.uint8
        assert (read.fps, read.start_s) == (video.fps, video.start_s)


def assert_same(source, clip):
    """A Source equals the decoded Clip in its properties and in ranges of audio and video."""
    samples = clip.audio.samples
    assert (source.num_samples, source.channels) == samples.shape and source.duration_s == len(samples) / clip.audio.rate
    assert (source.rate, source.subtype, source.codec) == (clip.audio.rate, clip.audio.subtype, clip.audio.codec)
    assert source.lag_s == clip_io.audio_lag_s(clip)
    for start, stop in [(0, len(samples)), (len(samples) - 5, len(samples)), (1000, 1000), (301, 9004), (0, 1)]:
        read = source.audio(start, stop)
        np.testing.assert_array_equal(read, samples[start:stop])
        assert read.dtype == samples.dtype
    if clip.video is None:
        assert not source.has_video and source.size == (0, 0)
        return
    assert source.has_video and source.size == clip.video.rgb.shape[2:0:-1] and source.fps == clip.video.fps
    assert_same_video(source, clip.video)
