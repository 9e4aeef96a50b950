"""av_mtl_s2s that looks at the mouth's 20 points alone, as the paper's text says; its code looks at the whole face.

avsi-train --config=av_mtl_s2s_mouth --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import av_mtl_s2s


def get_config():
    config = av_mtl_s2s.get_config()
    config.landmarks = "mouth"
    return config
