"""av_unified at the paper's preset (8 kHz, a frame every 20 ms), for comparison with the paper's systems. 6.55 M parameters.

avsi-train --config=av_unified_paper --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import av_unified


def get_config():
    config = av_unified.get_config()
    config.preset = "paper"
    config.stack = 1  # 50 time steps per second, as with two frames per step at `wide`
    config.loss.near_frames = 2  # 40 ms, as with 4 frames at `wide`
    return config
