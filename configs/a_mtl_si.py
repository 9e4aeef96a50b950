"""a_mtl_si: a_si with a CTC head behind a ReLU layer; completes the paper's table. 3.92 M parameters.

avsi-train --config=a_mtl_si --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import base


def get_config():
    config = base.get_config()
    config.system = "a_mtl_si"
    return config
