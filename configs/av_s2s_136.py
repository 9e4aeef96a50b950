"""av_s2s with the bottleneck of av_mtl_s2s. 8.14 M parameters.

The paper's ablation of the CTC loss compares av_s2s (512 joined values) with av_mtl_s2s (136): two things change at once. This
config separates them: av_s2s against av_s2s_136 shows the effect of the bottleneck, av_s2s_136 against av_mtl_s2s that of the CTC.

avsi-train --config=av_s2s_136 --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import av_s2s


def get_config():
    config = av_s2s.get_config()
    config.bottleneck = 136
    return config
