"""av_s2s with av_mtl_s2s' bottleneck. The paper's ablation of the CTC loss sets 512 joined values against 136; this one parts
the two: av_s2s against it is the bottleneck's part, it against av_mtl_s2s the CTC's.

avsi-train --config=av_s2s_136 --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import av_s2s


def get_config():
    config = av_s2s.get_config()
    config.bottleneck = 136
    return config
