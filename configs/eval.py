"""What avsi-evaluate does, whatever the system.

avsi-evaluate --workdir=DIR [--baseline=DIR2] [--config.split=test --config.gap_ms=300,900]
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data_dir = ""  # empty: where the run was trained
    config.builder_config = ""  # empty: the run's
    config.split = "test_seen"  # test: unseen speakers
    config.protocol = "waveform"
    config.suite = "lengths"  # one gap inside speech at each length
    config.gap_ms = (300, 600, 900, 1200, 1500)  # the paper's range
    config.checkpoint = "best"  # best (by validation), last, or a step
    config.batch_size = 16
    config.max_clips = 0  # 0: all of the split
    config.examples = 5  # clips to hear and see in the report
    config.workers = 0  # processes that score; 0: one a core
    return config
