"""av_unified at the paper's preset (8 kHz, a frame every 20 ms), to stand beside the paper's systems: steps as long as its own.

avsi-train --config=av_unified_paper --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import av_unified


def get_config():
    config = av_unified.get_config()
    config.preset = "paper"
    config.stack = 1  # 50 steps a second, as of two frames at `wide`
    config.loss.near_frames = 2  # 40 ms, as there
    return config
