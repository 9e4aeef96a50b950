"""What tests of repairs share: tiny networks whose murmur can be heard, made-up voices, films whose pictures tell their number."""

import dataclasses

import numpy as np

from avsi_jax.media import clip_io
from tests.support import tiny_data


def audible(config):
    """An untrained Restorer whose every predicted level is about 0.4: -48 dB a band."""
    import jax

    from avsi_jax.inference.restorer import Restorer
    from avsi_jax.models import build

    params = jax.device_get(build.init_params(config))
    params["output"]["bias"] = params["output"]["bias"] + np.float32(0.4)
    return Restorer(config, params, 0)


@dataclasses.dataclass
class FakeTracker:
    """Stands in for the face networks: all points of picture t, which `clip_of` writes into it, at `position(t)`; and a warning."""

    position: object = staticmethod(lambda t: 100 + 10 * np.sin(t))

    def __call__(self, rgb):
        from avsi_jax.face import landmarks

        number = rgb[:, 0, 0].astype(int) @ [1, 256, 0]
        points = np.tile(self.position(number)[:, None, None], (1, 68, 2)).astype(np.float32)
        return landmarks.Track(points, np.ones(len(rgb), bool), ("half a face",))


def all_seen(rgb, points):
    return np.ones(len(rgb), bool)


LOUD = 2.5  # times a `voice`: as loud as networks know sound, so that a repair leaves its loudness alone


def voice(seconds, rate, *, channels=1, seed=0):
    """A made-up voice (N, C) that repeats every 2.9 s; the second channel is half as loud."""
    one = tiny_data.voice(seed, 46_400)[0]
    x = clip_io.resample(np.tile(one, int(np.ceil(seconds / 2.9)) + 1), 16_000, rate)[: round(seconds * rate)]
    return np.stack([0.5 * x / (k + 1) for k in range(channels)], 1).astype(np.float32)


def clip_of(samples, rate, *, num_video_frames=0, fps=25.0, start_s=0.0, subtype="PCM_16"):
    """A clip as read_clip would give it, with pictures whose colour is their number."""
    video = None
    if num_video_frames:
        number = np.arange(num_video_frames)
        colour = np.stack([number % 256, number // 256, 0 * number], -1)
        rgb = np.broadcast_to(colour[:, None, None], (num_video_frames, 4, 6, 3)).astype(np.uint8)
        video = clip_io.Video(rgb, fps, start_s, np.arange(num_video_frames) / fps)
    return clip_io.Clip("made-up", video, clip_io.Audio(samples, rate, 0.0, subtype, "pcm"))


def missing(gaps, num_samples, rate):
    """bool (N,): what the gaps take."""
    time = np.arange(num_samples)
    return np.any([(time >= round(a * rate)) & (time < round(b * rate)) for a, b in gaps], axis=0)


def loudness(x):
    return 20 * np.log10(np.sqrt(np.mean(np.square(x, dtype=np.float64))) + 1e-9)


@dataclasses.dataclass
class Watched:
    """A Restorer that keeps the batches it was given."""

    restorer: object
    batches: list

    def __getattr__(self, name):
        return getattr(self.restorer, name)

    def restore(self, batch, gap):
        self.batches.append((batch, np.asarray(gap)))
        return self.restorer.restore(batch, gap)
