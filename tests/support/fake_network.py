"""A fake Restorer that fills gaps with a tone as loud as the audio around them, for tests of what happens around the network."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest

from avsi_jax import presets
from avsi_jax.inpainting import api
from avsi_jax.media import clip_io
from avsi_jax.models import systems


class ToneResult(NamedTuple):
    """What ToneRestorer.restore returns: levels (B, F, 1) that are ignored."""

    level: np.ndarray


@dataclasses.dataclass
class ToneRestorer:
    """A Restorer whose output in a gap is a tone. inputs: [(audio (record_samples,) in floats, gap mask)] of all windows so far."""

    spec: object = dataclasses.field(default_factory=lambda: presets.get("paper"))
    name: str = "av_unified"
    inputs: list = dataclasses.field(default_factory=list)

    @property
    def system(self):
        return systems.get(self.name)

    def restore(self, batch, gap):
        return ToneResult(np.zeros((len(gap), self.spec.num_frames, 1), np.float32))

    def sentences(self, result):
        return [""] * len(result.level)

    def to_audio(self, level, batch, gap):
        return np.stack([self._fill(*row) for row in zip(batch["audio"], gap)])

    def _fill(self, audio, gaps):
        waveform = clip_io.from_int16(audio)[: self.spec.record_samples]
        gap_mask = np.zeros(len(waveform), bool)
        for start, end in gaps:
            gap_mask[start:end] = True
        self.inputs.append((waveform, gap_mask))
        known = ~gap_mask & (waveform != 0)
        rms = np.sqrt(np.mean(np.square(waveform[known]))) if known.any() else 0.0
        return np.where(gap_mask, np.sqrt(2) * rms * np.sin(np.arange(len(waveform)) / 5), waveform).astype(np.float32)


def tone_inpainter(monkeypatch: pytest.MonkeyPatch, **fields: object) -> api.Inpainter:
    """An Inpainter with a ToneRestorer; nothing is compiled for it."""
    monkeypatch.setattr(api, "_log_mels", lambda waveforms: np.zeros((2, 1, 64), np.float32))
    return api.Inpainter(ToneRestorer(**fields))
