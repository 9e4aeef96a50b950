"""For debugging: config `tiny` that stops at the first NaN and writes images and checkpoints every few seconds.

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
