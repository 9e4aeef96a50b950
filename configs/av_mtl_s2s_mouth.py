"""av_mtl_s2s with the 20 mouth landmarks of the paper's text; the paper's code uses all 68 face landmarks. 7.95 M parameters.

avsi-train --config=av_mtl_s2s_mouth --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import av_mtl_s2s


def get_config():
    config = av_mtl_s2s.get_config()
    config.landmarks = "mouth"
    return config
