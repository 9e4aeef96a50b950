"""asr, the recognizer that scores restored words: clean audio -> 5 convolutions -> phones by CTC (docs/asr_judge.md).

avsi-train --config=asr --workdir=DIR --config.data_dir=DATA
"""

from avsi_jax.configs import base


def get_config():
    config = base.get_config()
    config.system = "asr"
    config.preset = "wide"
    config.levels = "standardised"
    config.ctc_units = "phones"
    config.validation_split = "validation_seen"  # the speakers whose restored words it scores
    config.stack = 2  # 50 time steps per second
    config.layers = 5  # 200 ms of context on either side
    config.units = 192
    config.dropout = 0.2
    config.augment.speed = 0.1
    config.augment.gain_db = 6.0
    config.augment.trim = 1.0  # without it the CTC places the first word in the silence before it
    config.loss.whole = 0.0
    config.loss.ctc = 1.0
    config.batch_size = 16
    config.epochs = 28
    config.learning_rate = 2e-3
    config.schedule = "cosine"
    config.warmup_epochs = 1.0
    config.early_stop_patience = 0
    config.validate_every = 2
    config.checkpoint_every = 2
    return config
