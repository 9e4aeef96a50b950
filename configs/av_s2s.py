"""av_s2s of the paper: video -> encoder, its 512 values joined with the masked audio -> decoder. 8.84 M parameters.

avsi-train --config=av_s2s --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import base


def get_config():
    config = base.get_config()
    config.system = "av_s2s"
    config.bottleneck = 0
    config.loss.ctc = 0.0  # no CTC head
    return config
