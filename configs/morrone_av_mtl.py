"""morrone_av_mtl (Morrone et al. 2021): audio and video joined -> 3 BLSTM of 250 -> 257 bins, and phones by CTC. 4.44 M parameters.

avsi-train --config=morrone_av_mtl --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import base


def get_config():
    config = base.get_config()
    config.system = "morrone_av_mtl"
    config.preset = "morrone"
    config.motion = "standardised"  # by the train split; theirs: by speaker, including the test speakers
    config.ctc_units = "phones"
    config.units = 250
    config.gaps.min_ms = 36.0  # 3 frames
    config.loss.kind = "l1"
    config.loss.whole = 0.0  # only the error in the gap counts
    config.loss.gap = 1.0
    config.batch_size = 8
    config.epochs = 50
    config.early_stop_patience = 5
    config.plateau_patience = 50  # never
    return config
