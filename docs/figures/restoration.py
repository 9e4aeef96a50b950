"""One example of an evaluation -> a picture of its damaged, restored and original spectrograms.

python -m docs.figures.restoration RUN/eval/waveform-test_seen-lengths docs/images/restoration.png [CLIP]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from avsi_jax import presets
from avsi_jax.audio import stft
from avsi_jax.media import clip_io


def main(folder: Path, target: Path, clip: str = "") -> None:
    summary = json.loads((folder / "summary.json").read_text())
    examples = summary["examples"]
    example = next(e for e in examples if e["clip_id"] == clip) if clip else max(examples, key=lambda e: e["gap_ms"])
    system = summary["system"]
    panels = (("masked", "masked"), (system, f"restored ({system})"), ("original", "original"))
    figure, axes = plt.subplots(1, 3, figsize=(12, 2.9), sharey=True, layout="constrained")
    preset = presets.get("paper")
    for axis, (name, title) in zip(axes, panels, strict=True):
        audio = clip_io.read_clip(folder / example["sounds"][name]).audio
        narrow = clip_io.resample(clip_io.mono(audio.samples), audio.rate, preset.rate)
        decibel = np.asarray(stft.to_db(stft.log_mel(narrow, preset), preset))
        image = axis.imshow(
            decibel.T,
            origin="lower",
            aspect="auto",
            vmin=-80,
            vmax=-10,
            cmap="magma",
            extent=(0, len(narrow) / preset.rate, 0, preset.bands),
        )
        axis.axvline(example["start_s"], color="white", lw=0.8, ls="--")
        axis.axvline(example["end_s"], color="white", lw=0.8, ls="--")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("s")
    axes[0].set_ylabel("mel band (0-4 kHz)")
    figure.colorbar(image, ax=axes, label="dB", pad=0.01)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    print(target, example["clip_id"], example["gap_ms"], example["said"].get(system, ""))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
