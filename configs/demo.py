"""`make demo`: base made small enough for 184 synthetic clips and minutes on two cores; av_mtl_s2s, or a_si by --config.system.

avsi-train --config=demo --workdir=DIR --config.data_dir=DATA [--config.system=a_si]
"""

from avsi_jax.configs import base


def get_config():
    config = base.get_config()
    config.landmarks = "mouth"  # the head's sway says nothing about the sound
    config.layers = 2
    config.units = 128
    config.bottleneck = 64
    config.validation_split = "validation_seen"  # there are no unseen speakers
    config.gaps.max_count = 2  # long gaps: that is where the lips help
    config.loss.kind = "l1"
    config.loss.gap = 1.0
    # Reading lips takes more clips: nothing is read after these minutes. At the paper's 1e-3 it slows the rest down (30 epochs: gap
    # error of validation 8.1 dB; 7.1 without).
    config.loss.ctc = 1e-4
    config.batch_size = 16
    config.epochs = 40
    config.learning_rate = 2e-3
    config.schedule = "cosine"
    config.warmup_epochs = 2.0
    config.monitor = "val_gap_l1_db"
    config.early_stop_patience = 0
    config.validate_every = 5
    config.checkpoint_every = 5
    return config
