"""For tests of avsi-app and its sessions: an Inpainter that fills gaps with a tone, hostile uploads, a mask of known samples."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from avsi_jax.inpainting import api
from avsi_jax.runtime import process_pool

EXAMPLES = Path(__file__).resolve().parents[2] / "avsi_jax" / "examples"
RATE = 16_000  # of the examples


@dataclasses.dataclass
class ToneInpainter:
    """An Inpainter that fills gaps with a tone and reports a static face.

    options: keyword arguments of the last call. calls: (number of samples, gaps) of all calls.
    """

    options: dict = dataclasses.field(default_factory=dict)
    calls: list = dataclasses.field(default_factory=list)

    def inpaint(self, clip, gaps, **options):
        """clip: a clip_source.Source."""
        self.options = options
        self.calls.append((clip.num_samples, list(gaps)))
        samples, rate = clip.audio(0, clip.num_samples), clip.rate
        for start, end in gaps:
            span = slice(round(start * rate), round(end * rate))
            samples[span] = (0.25 * np.sin(np.arange(span.stop - span.start) / 8)[:, None]).astype(np.float32)
        rng, face = np.random.default_rng(0), (None, None, None)
        if clip.has_video:
            video = clip.video(0, 3600)
            landmarks = np.tile(rng.uniform(100, 200, (1, 68, 2)), (len(video.rgb), 1, 1)).astype(np.float32)
            face = landmarks, np.arange(len(landmarks)) % 2 == 0, video.times
        inputs = "audio and video" if clip.has_video else "audio"
        restored = tuple(api.Gap(a, b, 0.7, "bin <blue> at f two now", inputs) for a, b in gaps)
        blank = np.zeros((10, 64), np.float32)
        return api.Repair(samples, rate, clip.subtype, restored, ("a <warning>",), blank, blank, 0.02, *face, None, {"all": 0.1})


def run_inline(work: Callable, jobs: Iterable[tuple], **limits) -> Iterator[process_pool.JobOutcome]:
    """A process_pool.run without worker processes and without limits: to start one takes a second."""
    for index, job in enumerate(jobs):
        yield process_pool.JobOutcome(index, work(*job))


def outside(gaps: Sequence[tuple[float, float]], num_samples: int, rate: int) -> np.ndarray:
    """bool (N,), true outside the gaps."""
    time_s = np.arange(num_samples) / rate
    return ~np.any([(time_s >= a - 1e-6) & (time_s < b - 1e-6) for a, b in gaps], axis=0)


HOSTILE = {
    "text.mp4": b"this is not a video, it is a text\n" * 50,
    "nothing.wav": b"",
    "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "list.mkv": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "archive.mov": b"PK\x03\x04" + bytes(2000),
}
