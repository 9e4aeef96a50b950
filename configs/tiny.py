"""A network small enough for tests: av_mtl_s2s with one layer of 32 units.

avsi-train --config=tiny --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import base


def get_config():
    config = base.get_config()
    config.layers = 1
    config.units = 32
    config.bottleneck = 32
    config.batch_size = 4
    config.epochs = 2
    return config
