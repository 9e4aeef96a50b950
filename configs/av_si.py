"""av_si of the paper: masked spectrogram and video joined -> 3 BLSTM -> linear layer. 4.12 M parameters.

avsi-train --config=av_si --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import base


def get_config():
    config = base.get_config()
    config.system = "av_si"
    config.loss.ctc = 0.0  # no CTC head
    return config
