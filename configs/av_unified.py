"""av_unified, ours: one network for audio and video, audio only, and video only (drawing in docs/systems.md). 6.80 M parameters.

avsi-train --config=av_unified --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import base


def get_config():
    config = base.get_config()
    config.system = "av_unified"
    config.preset = "wide"
    config.levels = "standardised"
    config.motion = "pose"
    config.ctc_units = "phones"
    config.mask_input = True
    config.stack = 2  # 50 time steps per second
    config.video_layers = 1
    config.gaps.max_count = 4
    config.gaps.total = "uniform"
    config.gaps.total_min_ms = 160.0
    config.gaps.total_max_ms = 1600.0
    config.augment.trim = 1.0  # the largest gain, in the error in the gap and in the phone error rate
    config.augment.jitter_ms = 20.0
    config.augment.drop_video = 0.1
    config.augment.drop_audio = 0.05
    config.loss.whole = 0.1
    config.loss.gap = 1.0
    config.loss.near_frames = 4
    config.loss.ctc = 1e-2  # at 1e-3 the CTC head learns nothing (docs/systems.md)
    config.batch_size = 16
    config.epochs = 100
    config.schedule = "cosine"
    config.warmup_epochs = 1.0
    config.monitor = "val_gap_l1_db"
    config.early_stop_patience = 0
    return config
