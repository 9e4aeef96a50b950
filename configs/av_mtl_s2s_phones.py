"""av_mtl_s2s with phone labels, as in the paper's text; the paper's code uses characters. 8.15 M parameters.

avsi-train --config=av_mtl_s2s_phones --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import av_mtl_s2s


def get_config():
    config = av_mtl_s2s.get_config()
    config.ctc_units = "phones"
    return config
