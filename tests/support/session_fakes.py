"""For tests of avsi-app and its sessions: an Inpainter that fills gaps with a tone, hostile uploads, a mask of known samples."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from avsi_jax.inpainting import api
from avsi_jax.media import clip_io

EXAMPLES = Path(__file__).resolve().parents[2] / "avsi_jax" / "examples"
RATE = 16_000  # of the examples


@dataclasses.dataclass
class ToneInpainter:
    """An Inpainter that fills gaps with a tone and reports a static face. options: keyword arguments of the last call."""

    options: dict = dataclasses.field(default_factory=dict)

    def inpaint(self, clip, gaps, **options):
        self.options = options
        read = clip_io.read_clip(clip)
        samples, rate = read.audio.samples.copy(), read.audio.rate
        for start, end in gaps:
            span = slice(round(start * rate), round(end * rate))
            samples[span] = (0.25 * np.sin(np.arange(span.stop - span.start) / 8)[:, None]).astype(np.float32)
        rng, face = np.random.default_rng(0), (None, None, None)
        if read.video is not None:
            landmarks = np.tile(rng.uniform(100, 200, (1, 68, 2)), (len(read.video.rgb), 1, 1)).astype(np.float32)
            face = landmarks, np.arange(len(landmarks)) % 2 == 0, read.video.times
        inputs = "audio and video" if read.video is not None else "audio"
        restored = tuple(api.Gap(a, b, 0.7, "bin <blue> at f two now", inputs) for a, b in gaps)
        blank = np.zeros((10, 64), np.float32)
        return api.Repair(
            samples, rate, read.audio.subtype, restored, ("a <warning>",), blank, blank, 0.02, *face, None, {"all": 0.1}
        )


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
