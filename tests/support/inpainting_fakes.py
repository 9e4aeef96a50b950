"""For tests of inpainting: tiny networks with an audible output, synthetic voices, video whose frames show their number."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from avsi_jax.media import clip_io
from tests.support import tiny_data


def audible_restorer(config):
    """An untrained Restorer whose every predicted level is about 0.4: -48 dB per band."""
    import jax

    from avsi_jax.inference.restorer import Restorer
    from avsi_jax.models import build

    params = jax.device_get(build.init_params(config))
    params["output"]["bias"] = params["output"]["bias"] + np.float32(0.4)
    return Restorer(config, params, 0)


def frame_numbers(rgb: np.ndarray) -> np.ndarray:
    """(T,) the number of each frame, which `make_clip` writes into its colour."""
    return rgb[:, 0, 0].astype(int) @ [1, 256, 0]


@dataclasses.dataclass
class FakeTracker:
    """In place of landmarks.FaceTracker: all landmarks of frame t are at `position(t)`; it always gives one warning."""

    position: Callable = staticmethod(lambda t: 100 + 10 * np.sin(t))

    def __call__(self, rgb):
        from avsi_jax.face import landmarks

        points = np.tile(self.position(frame_numbers(rgb))[:, None, None], (1, 68, 2)).astype(np.float32)
        return landmarks.Track(points, np.ones(len(rgb), bool), ("half a face",))


def always_visible(rgb: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """In place of mouth_visibility: the mouth is visible in every frame."""
    return np.ones(len(rgb), bool)


LOUD = 2.5  # times a `voice`: at a level that networks were trained on, so that its gain is 1


def voice(seconds: float, rate: int, *, channels: int = 1, seed: int = 0) -> np.ndarray:
    """A synthetic voice (N, C) that repeats every 2.9 s; the second channel has half the amplitude."""
    one = tiny_data.voice(seed, 46_400)[0]
    x = clip_io.resample(np.tile(one, int(np.ceil(seconds / 2.9)) + 1), 16_000, rate)[: round(seconds * rate)]
    return np.stack([0.5 * x / (k + 1) for k in range(channels)], 1).astype(np.float32)


def make_clip(
    samples: np.ndarray, rate: int, *, num_video_frames: int = 0, fps: float = 25.0, start_s: float = 0.0, subtype: str = "PCM_16"
) -> clip_io.Clip:
    """A clip as read_clip would return it, with video frames whose colour is their number."""
    video = None
    if num_video_frames:
        number = np.arange(num_video_frames)
        colour = np.stack([number % 256, number // 256, 0 * number], -1)
        rgb = np.broadcast_to(colour[:, None, None], (num_video_frames, 4, 6, 3)).astype(np.uint8)
        video = clip_io.Video(rgb, fps, start_s, np.arange(num_video_frames) / fps)
    return clip_io.Clip("synthetic", video, clip_io.Audio(samples, rate, 0.0, subtype, "pcm"))


def gap_mask(gaps: Sequence[tuple[float, float]], num_samples: int, rate: int) -> np.ndarray:
    """bool (N,), true inside the gaps."""
    time = np.arange(num_samples)
    return np.any([(time >= round(a * rate)) & (time < round(b * rate)) for a, b in gaps], axis=0)


def loudness(x: np.ndarray) -> float:
    """RMS level in dB of full scale."""
    return 20 * np.log10(np.sqrt(np.mean(np.square(x, dtype=np.float64))) + 1e-9)


@dataclasses.dataclass
class RecordingRestorer:
    """A Restorer that keeps the batches it was given."""

    restorer: object
    batches: list

    def __getattr__(self, name):
        return getattr(self.restorer, name)

    def restore(self, batch, gap):
        self.batches.append((batch, np.asarray(gap)))
        return self.restorer.restore(batch, gap)
