"""av_mtl_s2s without its bottleneck: the CTC head and the decoder get the encoder's 512 values (see av_s2s_136). 8.86 M parameters.

avsi-train --config=av_mtl_s2s_512 --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import av_mtl_s2s


def get_config():
    config = av_mtl_s2s.get_config()
    config.bottleneck = 0
    return config
