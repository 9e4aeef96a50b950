"""av_si of the paper: damaged spectrogram and lips joined -> 3 BLSTM -> bands. 4.12 M parameters.

avsi-train --config=av_si --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import base


def get_config():
    config = base.get_config()
    config.system = "av_si"
    config.loss.ctc = 0.0  # no head to train
    return config
