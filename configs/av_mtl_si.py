"""av_mtl_si, in the paper's code but not in its text: av_si with a CTC head behind a ReLU layer. 4.19 M parameters.

avsi-train --config=av_mtl_si --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import base


def get_config():
    config = base.get_config()
    config.system = "av_mtl_si"
    return config
