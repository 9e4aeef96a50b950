"""To find a fault: config `tiny` with its eyes open. It stops at the first NaN, draws and saves every few steps.

avsi-train --config=debug --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import tiny


def get_config():
    config = tiny.get_config()
    config.debug_nans = True
    config.images_every = 5
    config.checkpoint_seconds = 5.0
    config.watchdog_s = 120.0
    return config
