"""The worker process in which avsi-app decodes and writes clips: its limits, and that the server itself parses no upload."""

import numpy as np
import pytest

from avsi_jax.app import sandbox, session
from avsi_jax.media import clip_io, clip_source
from tests.support import sandbox_jobs
from tests.support.session_fakes import EXAMPLES, ToneInpainter, outside, run_inline


def test_a_worker_has_no_network_starts_no_programs_and_has_limits(tmp_path):
    """An error leaves it running; a job that exceeds a limit ends it, and the next job runs in a new one."""
    with sandbox.Worker(tmp_path / "clip.wav", "clip.wav", tmp_path) as worker:
        expected = {"cpu_s": sandbox.CPU_S, "file_bytes": sandbox.FILE_BYTES, "core_bytes": 0}
        assert worker.run(sandbox_jobs.limits) == expected
        for job in (sandbox_jobs.connect, sandbox_jobs.start_program):
            with pytest.raises(PermissionError):
                worker.run(job)
        with pytest.raises(OSError, match="too large"):
            worker.run(sandbox_jobs.write_file, str(tmp_path / "large"), 2 * sandbox.FILE_BYTES)
        with pytest.raises(clip_io.MediaError, match=r"clip.wav: .*memory"):
            worker.run(sandbox_jobs.allocate, 4 * sandbox.MEMORY_MB * 2**20)
        with pytest.raises(clip_io.MediaError, match=r"clip.wav: .*SIGSEGV"):
            worker.run(sandbox_jobs.crash)
        assert worker.run(sandbox_jobs.limits) == expected


def test_a_worker_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "JOB_S", 0.5)
    with sandbox.Worker(tmp_path / "clip.wav", "clip.wav", tmp_path) as worker, pytest.raises(clip_io.MediaError, match="0.5 s"):
        worker.run(sandbox_jobs.hang)


def test_the_server_itself_opens_no_uploaded_clip(tmp_path, monkeypatch):
    """From the upload to the result: reading audio and frames, and copying the video into the restored clip."""
    original = clip_io.read_clip(EXAMPLES / "drawn_mouth_with_gap.mp4")
    user = session.Session(tmp_path / "gradio" / "sessions" / "one", ToneInpainter(), session.Limits())
    with monkeypatch.context() as patch:
        for module, name in (
            (clip_io, "open_container"),
            (clip_io, "read_clip"),
            (clip_source, "open_source"),
            (clip_source, "write_clip"),
        ):
            patch.setattr(module, name, lambda *_, **__: pytest.fail("parsed by the server"))
        clip = user.load(EXAMPLES / "drawn_mouth_with_gap.mp4")
        assert [gap[:2] for gap in clip.detected_gaps] == [pytest.approx((1.0, 1.6), abs=0.01)]
        result = user.restore("1-1.6")
    restored = clip_io.read_clip(result.clip)
    kept = outside(result.gaps, len(clip.samples), clip.rate)
    np.testing.assert_array_equal(restored.audio.samples[kept], original.audio.samples[kept])
    np.testing.assert_array_equal(restored.video.rgb, original.video.rgb)
    images, _, _, times = result.strips[0]
    nearest = [int(np.abs(original.video.times - (t - clip.source.lag_s)).argmin()) for t in times]
    np.testing.assert_array_equal(images, original.video.rgb[nearest])
    assert list(tmp_path.rglob("*.npy")) == []


@pytest.mark.parametrize("name", ["drawn_mouth.mp4", "person.mpg"])
def test_a_source_of_a_worker_is_that_of_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sandbox.process_pool, "run", run_inline)
    with sandbox.Worker(EXAMPLES / name, name, tmp_path) as worker, clip_source.open_source(EXAMPLES / name) as expected:
        source = worker.open(60, session.MAX_PIXELS)
        public = lambda s: {key: value for key, value in vars(s).items() if not key.startswith("_")}
        assert public(source).items() >= public(expected).items() and source.duration_s == expected.duration_s
        np.testing.assert_array_equal(source.audio(100, 20_000), expected.audio(100, 20_000))
        video, same = source.video(0.5, 0.9), expected.video(0.5, 0.9)
        np.testing.assert_array_equal(video.rgb, same.rgb)
        np.testing.assert_array_equal(video.times, same.times)
        assert (video.fps, video.start_s) == (same.fps, same.start_s)
        with pytest.raises(ValueError, match="expected a range"):
            source.audio(0, source.num_samples + 1)
