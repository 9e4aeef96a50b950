"""a_si, the paper's audio-only network: masked spectrogram -> 3 BLSTM -> linear layer. 3.84 M parameters.

avsi-train --config=a_si --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import base


def get_config():
    config = base.get_config()
    config.system = "a_si"
    config.loss.ctc = 0.0  # no CTC head
    return config
