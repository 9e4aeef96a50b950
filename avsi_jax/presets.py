"""Signal presets: sample rates, spectrogram settings and the constants of the Grid corpus.

Letters for array shapes in all packages:
  B clips, N samples, T video frames, F spectrogram frames, K mel bands (bins on a linear scale), L landmarks (68).
Units are seconds unless a name says otherwise (samples, Hz, ms, px).
"""

from __future__ import annotations

import dataclasses

RECORD_RATE = 16_000  # Hz; records contain mono audio at this rate, presets with a lower rate decimate it on the device
NUM_LANDMARKS = 68  # iBUG order
GRID_FPS = 25.0
GRID_FRAMES = 75
GRID_MPEG_SAMPLES = 131_328  # at 44.1 kHz in every Grid MPEG: 114 MP2 frames, 2.978 s
MPEG_AUDIO_LAG_S = 0.0110  # the audio of an original Grid MPEG lags its video, and the wav file, by this


@dataclasses.dataclass(frozen=True)
class Spec:
    """One signal preset. A spectrogram has `num_frames` frames of `bands` bands, one frame every `hop` samples at `rate` Hz.

    ValueError for settings that contradict each other.
    """

    name: str
    rate: int  # Hz
    n_fft: int
    window: int  # Hann, samples
    hop: int  # samples
    bands: int
    scale: str  # 'mel' (Slaney, magnitude) or 'linear' (magnitude)
    level: str  # 'db': 20 log10(max(1e-5, x)), (dB + 80) / 80 clipped to [0, 1]; 'log': ln(x + log_floor)
    pre_emphasis: float  # coefficient; 0: none
    num_samples: int  # clip length at `rate`
    centred: bool  # whether frame f is centred on sample f * hop, as in librosa; otherwise it starts there
    log_floor: float = 0.0  # 'log' only

    def __post_init__(self):
        if RECORD_RATE % self.rate:
            raise ValueError(f"preset {self.name}: rate {self.rate} must divide the records' {RECORD_RATE} Hz")
        if not self.hop <= self.window <= self.n_fft:
            raise ValueError(f"preset {self.name}: expected hop <= window <= n_fft, found {self.hop}, {self.window}, {self.n_fft}")
        if self.scale not in ("mel", "linear") or self.level not in ("db", "log"):
            raise ValueError(f"preset {self.name}: unknown scale {self.scale!r} or level {self.level!r}")
        if self.scale == "linear" and self.bands != self.n_fft // 2 + 1:
            raise ValueError(f"preset {self.name}: a linear scale has {self.n_fft // 2 + 1} bands, found {self.bands}")

    @property
    def num_frames(self) -> int:
        """F of a full clip."""
        return self.frames_of(self.num_samples)

    @property
    def decimation(self) -> int:
        """Record samples per sample of the preset."""
        return RECORD_RATE // self.rate

    @property
    def record_samples(self) -> int:
        """N of a full clip at RECORD_RATE."""
        return self.num_samples * self.decimation

    def frames_of(self, num_samples: int) -> int:
        """F for `num_samples` samples at `rate`: 1 + n // hop if centred, else n / hop rounded up."""
        if self.centred:
            return 1 + num_samples // self.hop
        return -(-num_samples // self.hop)


PRESETS = {
    s.name: s
    for s in (
        # The paper's code: 40 ms windows every 20 ms at 8 kHz; 149 frames = 23,824 samples, the audio of one Grid MPEG.
        Spec(
            name="paper", rate=8_000, n_fft=510, window=320, hop=160, bands=64, scale="mel", level="db",
            pre_emphasis=0.97, num_samples=23_824, centred=True,
        ),
        Spec(
            name="wide", rate=16_000, n_fft=512, window=400, hop=160, bands=80, scale="mel", level="log",
            pre_emphasis=0.0, num_samples=48_000, centred=True, log_floor=1e-5,
        ),
        Spec(
            name="morrone", rate=16_000, n_fft=512, window=384, hop=192, bands=257, scale="linear", level="log",
            pre_emphasis=0.0, num_samples=48_000, centred=False, log_floor=1e-6,
        ),
    )
}  # fmt: skip


def get(name: str) -> Spec:
    """The preset of the given name; ValueError, listing the known names, for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
