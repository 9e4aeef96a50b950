"""Written clips keep what their sources hold besides the audio, or the warnings name it. Read back with PyAV."""

import fractions
import io

import numpy as np
import pytest

from avsi_jax.media import clip_io, clip_source
from tests.support.video_files import FPS, noise, write_video

RATE = 16_000
SUBTITLE = b"hello"


def encoded(path, codec, aspect=None, frames=10, **options):
    """A small video of moving noise without audio."""
    import av

    with av.open(str(path), "w") as out:
        video = out.add_stream(codec, rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv422p10le" if codec == "prores_ks" else "yuv420p"
        if aspect:
            video.codec_context.sample_aspect_ratio = aspect
        for k in range(frames):
            image = np.random.default_rng(k).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(video.encode(None))
    return path


def cover_image():
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mjpeg") as out:
        video = out.add_stream("mjpeg", rate=1)
        video.width, video.height, video.pix_fmt = 32, 32, "yuvj420p"
        out.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        out.mux(video.encode(None))
    return file.getvalue()


def clip_with(
    path, *, tags=(), chapters=(), streams=(), attachments=(), video=None, muxer_options=None, aspect=None, first="pcm_s16le"
):
    """A clip of `video` (a file), an audio track, and more `streams`: (codec, language, flags); all of 0.4 s."""
    import av

    options = muxer_options or {}
    with av.open(str(path), "w", options=options) as out:
        source = av.open(str(video)) if video else None
        if source:
            stream = source.streams.video[0]
            copy = out.add_stream_from_template(stream, opaque=True)
            if stream.codec_context.codec_tag.strip("\0") and path.suffix == ".mov":
                copy.codec_context.codec_tag = stream.codec_context.codec_tag
            if aspect:
                copy.codec_context.sample_aspect_ratio = aspect
        written = []
        for codec, language, flags in [(first, "eng", 1), *streams]:
            added = out.add_stream(codec, rate=RATE, layout="mono") if codec != "subrip" else out.add_mux_stream("subrip")
            added.metadata["language"] = language
            added.disposition = flags
            written.append((codec, added))
        for name, kind, data in attachments:
            out.add_attachment(name, kind, data)
        out.metadata.update(dict(tags))
        if chapters:
            out.set_chapters(
                [
                    {
                        "id": i,
                        "start": round(1000 * a),
                        "end": round(1000 * b),
                        "time_base": fractions.Fraction(1, 1000),
                        "metadata": {"title": f"Part {i}"},
                    }
                    for i, (a, b) in enumerate(chapters, 1)
                ]  # fmt: skip
            )
        for packet in source.demux(video=0) if source else ():
            if packet.size:
                packet.stream = copy
                out.mux(packet)
        for number, (codec, added) in enumerate(written):
            if codec == "subrip":
                packet = av.Packet(SUBTITLE)
                packet.pts = packet.dts = 100
                packet.duration, packet.time_base, packet.stream = 200, fractions.Fraction(1, 1000), added
                out.mux(packet)
                continue
            x = clip_io.to_int16(noise(6400, 1, 0.1 + 0.05 * number))
            frame = av.AudioFrame.from_ndarray(x.reshape(1, -1), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, 0, fractions.Fraction(1, RATE)
            out.mux(added.encode(frame))
            out.mux(added.encode(None))
        if source:
            source.close()
    return path


def write(path, target, **options):
    """The clip with its own audio as `target`; the warnings."""
    with clip_source.open_source(path, **options) as source:
        return clip_source.write_clip(source, target, [source.audio(0, source.num_samples)])


def contents(path):
    """(tags, [(type, language, flags)], payloads by stream, chapters [(start_s, title)], codec tag of the video)."""
    import av

    with av.open(str(path)) as container:
        streams = [(s.type, s.metadata.get("language"), int(s.disposition)) for s in container.streams]
        chapters = [(float(c["start"] * c["time_base"]), c["metadata"].get("title")) for c in container.chapters()]
        tag = next((s.codec_context.codec_tag for s in container.streams if s.type == "video"), "")
        attached = {s.name: s.data for s in container.streams if s.type == "attachment"}
        packets = {}
        for packet in container.demux():
            if packet.size:
                packets.setdefault(packet.stream_index, []).append(bytes(packet))
        return dict(container.metadata), streams, packets, chapters, tag, attached


@pytest.fixture
def many(tmp_path):
    """A .mkv with two audio tracks, the second one the default, subtitles, chapters, an attachment and tags."""
    return clip_with(
        tmp_path / "many.mkv", video=encoded(tmp_path / "v.mkv", "mpeg4"), tags=[("title", "Take 7"), ("COMMENT", "keep me")],
        chapters=[(0.0, 0.2), (0.2, 0.4)], streams=[("pcm_s16le", "fra", 0), ("subrip", "deu", 0)],
        attachments=[("notes.txt", "text/plain", b"some notes")], muxer_options={"default_mode": "passthrough"},
    )  # fmt: skip


def test_matroska_keeps_all_tracks_chapters_attachments_and_tags(many, tmp_path):
    assert write(many, tmp_path / "out.mkv") == ()
    old, new = contents(many), contents(tmp_path / "out.mkv")
    assert {key.lower(): value for key, value in new[0].items() if key.lower() != "encoder"} == {
        "title": "Take 7",
        "comment": "keep me",
    }
    assert new[1] == old[1] and new[3] == old[3] == [(0.0, "Part 1"), (0.2, "Part 2")]
    assert new[2][2] == old[2][2] and new[2][3] == [SUBTITLE]
    assert new[5] == {"notes.txt": b"some notes"}


def test_what_a_container_cannot_hold_is_named_in_one_warning(many, tmp_path):
    (warning,) = write(many, tmp_path / "out.mp4")
    assert "subtitle track 1" in warning and "deu" in warning and "notes.txt" in warning and "\n" not in warning
    assert not any(kept in warning for kept in ("audio track", "chapters", "the tag"))
    tags, streams, *_, chapters, _, _ = contents(tmp_path / "out.mp4")
    assert tags["title"] == "Take 7" and tags["comment"] == "keep me" and [start for start, _ in chapters] == [0.0, 0.2]
    assert [s for s in streams if s[0] == "audio"] == [("audio", "eng", 1), ("audio", "fra", 0)]


def test_the_chosen_track_is_replaced_and_the_others_stay(many, tmp_path):
    assert write(many, tmp_path / "out.mkv", track=2) == ()
    old, new = contents(many), contents(tmp_path / "out.mkv")
    assert new[2][1] == old[2][1] and new[2][2] != old[2][2] and new[1] == old[1]


def test_an_mpg_names_everything_that_it_cannot_hold(tmp_path):
    path = clip_with(
        tmp_path / "in.mkv", video=encoded(tmp_path / "v.mkv", "mpeg1video"), tags=[("title", "Take 7")], chapters=[(0.0, 0.2)],
        streams=[("pcm_s16le", "fra", 0)],
    )  # fmt: skip
    (warning,) = (w for w in write(path, tmp_path / "out.mpg") if "MP2" not in w and "resampled" not in w)
    assert all(part in warning for part in ("audio track 2", "fra", "chapters", "title"))


@pytest.mark.parametrize(("profile", "tag"), [("proxy", "apco"), ("lt", "apcs")])
def test_the_codec_tag_of_a_video_is_kept(tmp_path, profile, tag):
    path = clip_with(tmp_path / "in.mov", video=encoded(tmp_path / "v.mov", "prores_ks", profile=profile))
    assert contents(path)[4] == tag
    for target in ("out.mov", "out.mkv"):
        assert write(path, tmp_path / target) == () and contents(tmp_path / target)[4] == tag


@pytest.mark.parametrize("target", ["out.mov", "out.mp4"])
def test_the_tags_of_phones_are_kept(tmp_path, target):
    tags = {"com.apple.quicktime.make": "Maker", "com.apple.quicktime.location.ISO6709": "+51.0-000.1/", "title": "Take 7"}
    options = {"movflags": "use_metadata_tags"}
    path = clip_with(tmp_path / "in.mov", video=encoded(tmp_path / "v.mov", "mpeg4"), tags=tags.items(), muxer_options=options)
    assert write(path, tmp_path / target) == ()
    assert tags.items() <= contents(tmp_path / target)[0].items()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_av1_video_is_copied(tmp_path, suffix):
    import av

    if not {"libsvtav1", "libaom-av1"} & av.codecs_available:
        pytest.skip("no AV1 encoder here")
    codec = "libsvtav1" if "libsvtav1" in av.codecs_available else "libaom-av1"
    path = clip_with(tmp_path / "in.mkv", video=encoded(tmp_path / "v.mkv", codec))
    assert write(path, tmp_path / f"out{suffix}") == ()
    assert contents(tmp_path / f"out{suffix}")[2][0] == contents(path)[2][0]


def test_pixels_that_are_not_square_stay_so_or_are_named(tmp_path):
    """The aspect ratio of MPEG-4 is in its packets; that of VP9 in a .mp4 only in the container, which PyAV cannot set for .mkv."""
    import av

    aspect = fractions.Fraction(4, 3)
    inside = clip_with(tmp_path / "in.mkv", video=encoded(tmp_path / "v.mkv", "mpeg4", aspect=aspect))
    outside = clip_with(tmp_path / "out.mp4", video=encoded(tmp_path / "w.mkv", "libvpx-vp9"), aspect=aspect)
    for path, target, is_kept in [(inside, "a.mkv", True), (outside, "b.mp4", True), (outside, "c.mkv", False)]:
        warnings = write(path, tmp_path / target)
        with av.open(str(tmp_path / target)) as container:
            assert (container.streams.video[0].sample_aspect_ratio == aspect) == is_kept
        assert is_kept == (warnings == ()) and (is_kept or "pixel aspect ratio 4/3" in warnings[0])


def test_a_clip_with_a_cover_image_and_no_video_is_written_as_audio(tmp_path):
    attachments = [("cover.jpg", "image/jpeg", cover_image())]
    path = clip_with(tmp_path / "in.mkv", attachments=attachments, tags=[("title", "Episode 1")])
    for target in ("out.mkv", "out.mp4"):
        assert write(path, tmp_path / target) == ()
        new, old = clip_io.read_clip(tmp_path / target), clip_io.read_clip(path)
        assert new.video is None
        np.testing.assert_array_equal(new.audio.samples, old.audio.samples)
        tags, _, packets, *_ = contents(tmp_path / target)
        assert tags["title"] == "Episode 1" and packets[1] == [attachments[0][2]]


def test_a_video_whose_frames_change_their_size_is_copied(tmp_path):
    """As WebRTC records: the packets of two videos of different sizes in one track."""
    import av

    parts = [write_video(tmp_path / f"{k}.mkv", "libvpx", None) for k in range(1)] + [encoded(tmp_path / "s.mkv", "libvpx")]
    path = tmp_path / "in.mkv"
    with av.open(str(path), "w") as out, av.open(str(parts[0])) as first, av.open(str(parts[1])) as second:
        video = out.add_stream_from_template(first.streams.video[0], opaque=True)
        audio = out.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for container, start_ms in ((first, 0), (second, 3000)):
            for packet in container.demux(video=0):
                if packet.size:
                    packet.pts, packet.stream = packet.pts + start_ms, video
                    packet.dts = packet.pts
                    out.mux(packet)
        frame = av.AudioFrame.from_ndarray(clip_io.to_int16(noise(3 * RATE)).reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, fractions.Fraction(1, RATE)
        out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    assert write(path, tmp_path / "out.mkv") == ()
    assert contents(tmp_path / "out.mkv")[2][0] == contents(path)[2][0]


@pytest.mark.parametrize("target", ["out.mkv", "out.mp4"])
def test_a_second_track_whose_times_go_back_is_copied(tmp_path, target):
    """As where two recordings of a transport stream are joined byte by byte."""
    once = clip_with(
        tmp_path / "once.ts", video=encoded(tmp_path / "v.mkv", "mpeg2video"), streams=[("mp2", "fra", 0)], first="mp2"
    )
    path = tmp_path / "twice.ts"
    path.write_bytes(2 * once.read_bytes())
    write(path, tmp_path / target)
    assert contents(tmp_path / target)[2][2] == contents(path)[2][2]
