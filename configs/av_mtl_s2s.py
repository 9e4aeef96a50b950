"""av_mtl_s2s, the paper's main network: video -> encoder (with CTC head), joined with masked audio -> decoder. 8.15 M parameters.

avsi-train --config=av_mtl_s2s --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import base


def get_config():
    config = base.get_config()
    config.system = "av_mtl_s2s"
    return config
