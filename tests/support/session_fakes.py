"""What tests of avsi-app and of a visit share: an Inpainter that hums, uploads that mean harm, and what lies outside of gaps."""

import dataclasses
from pathlib import Path

import numpy as np

from avsi_jax.inpainting import api
from avsi_jax.media import clip_io

EXAMPLES = Path(__file__).resolve().parents[2] / "avsi_jax" / "examples"
RATE = 16_000  # of the examples


@dataclasses.dataclass
class Hum:
    """An Inpainter that fills gaps with a hum and sees a face that stands still."""

    asked: dict = dataclasses.field(default_factory=dict)

    def inpaint(self, clip, gaps, **asked):
        self.asked = asked
        found = clip_io.read_clip(clip)
        samples, rate = found.audio.samples.copy(), found.audio.rate
        for start, end in gaps:
            span = slice(round(start * rate), round(end * rate))
            samples[span] = (0.25 * np.sin(np.arange(span.stop - span.start) / 8)[:, None]).astype(np.float32)
        rng, face = np.random.default_rng(0), (None, None, None)
        if found.video is not None:
            points = np.tile(rng.uniform(100, 200, (1, 68, 2)), (len(found.video.rgb), 1, 1)).astype(np.float32)
            face = points, np.arange(len(points)) % 2 == 0, found.video.times
        by = "sound and lips" if found.video is not None else "sound"
        filled = tuple(api.Gap(a, b, 0.7, "bin <blue> at f two now", by) for a, b in gaps)
        blank = np.zeros((10, 64), np.float32)
        return api.Repair(
            samples, rate, found.audio.subtype, filled, ("a <warning>",), blank, blank, 0.02, *face, None, {"all": 0.1}
        )


def outside(gaps, num_samples, rate):
    time_ = np.arange(num_samples) / rate
    return ~np.any([(time_ >= a - 1e-6) & (time_ < b - 1e-6) for a, b in gaps], axis=0)


HOSTILE = {
    "text.mp4": b"this is no film, it is a text\n" * 50,
    "nothing.wav": b"",
    "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "list.mkv": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "archive.mov": b"PK\x03\x04" + bytes(2000),
}
