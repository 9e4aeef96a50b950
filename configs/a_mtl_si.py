"""a_mtl_si, completes the paper's table: a_si with a CTC head behind a ReLU layer. 3.92 M parameters.

avsi-train --config=a_mtl_si --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import base


def get_config():
    config = base.get_config()
    config.system = "a_mtl_si"
    return config
