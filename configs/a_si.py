"""a_si, the paper's audio-only network: damaged spectrogram -> 3 BLSTM -> linear bands. 3.84 M parameters.

avsi-train --config=a_si --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import base


def get_config():
    config = base.get_config()
    config.system = "a_si"
    config.loss.ctc = 0.0  # no head to train
    return config
