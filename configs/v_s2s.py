"""v_s2s: av_s2s without audio input; completes the paper's table. 8.71 M parameters.

avsi-train --config=v_s2s --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import av_s2s


def get_config():
    config = av_s2s.get_config()
    config.system = "v_s2s"
    return config
