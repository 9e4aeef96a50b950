"""av_mtl_s2s that reads phones, as the paper's text says; its code reads characters.

avsi-train --config=av_mtl_s2s_phones --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import av_mtl_s2s


def get_config():
    config = av_mtl_s2s.get_config()
    config.ctc_units = "phones"
    return config
