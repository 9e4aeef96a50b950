"""av_mtl_s2s without its bottleneck: the encoder's 512 values are read by the CTC head and joined (see av_s2s_136).

avsi-train --config=av_mtl_s2s_512 --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import av_mtl_s2s


def get_config():
    config = av_mtl_s2s.get_config()
    config.bottleneck = 0
    return config
