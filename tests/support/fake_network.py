"""Stands in for a network and its vocoder, where a test asks about what is around them: a hum as loud as what is heard."""

import dataclasses
from typing import NamedTuple

import numpy as np

from avsi_jax import presets
from avsi_jax.inpainting import api
from avsi_jax.media import clip_io
from avsi_jax.models import systems


class DetectedCluster(NamedTuple):
    level: np.ndarray


@dataclasses.dataclass
class Hum:
    """A restorer; `heard` keeps each window's sound (record_samples,) as it was given, in floats, and what of it is lost."""

    spec: object = dataclasses.field(default_factory=lambda: presets.get("paper"))
    name: str = "av_unified"
    heard: list = dataclasses.field(default_factory=list)

    @property
    def system(self):
        return systems.get(self.name)

    def restore(self, batch, gap):
        return DetectedCluster(np.zeros((len(gap), self.spec.num_frames, 1), np.float32))

    def sentences(self, found):
        return [""] * len(found.level)

    def to_audio(self, level, batch, gap):
        return np.stack([self._one(*row) for row in zip(batch["audio"], gap)])

    def _one(self, audio, gap):
        waveform = clip_io.from_int16(audio)[: self.spec.record_samples]
        gap_mask = np.zeros(len(waveform), bool)
        for start, end in gap:
            gap_mask[start:end] = True
        self.heard.append((waveform, gap_mask))
        power = np.sqrt(np.mean(np.square(waveform[~gap_mask & (waveform != 0)]))) if (~gap_mask & (waveform != 0)).any() else 0.0
        return np.where(gap_mask, np.sqrt(2) * power * np.sin(np.arange(len(waveform)) / 5), waveform).astype(np.float32)


def humming(monkeypatch, **fields) -> api.Inpainter:
    """An Inpainter that fills with a hum; no program is compiled for it."""
    monkeypatch.setattr(api, "_mels", lambda waveforms: np.zeros((2, 1, 64), np.float32))
    return api.Inpainter(Hum(**fields))
