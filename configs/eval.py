"""What avsi-evaluate does, whatever the system.

avsi-evaluate --workdir=DIR [--baseline=DIR2] [--config.split=test --config.suite=robustness --config.protocol=peer]
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data_dir = ""  # empty: where the run was trained
    config.builder_config = ""  # empty: the run's
    config.split = "test_seen"  # test: unseen speakers
    config.protocol = "waveform"  # paper, peer: only to compare with their numbers (docs/evaluation.md)
    # lengths, multigap, streams (sound and lips, sound alone, lips alone), robustness (what pictures and sound may suffer),
    # unseen (lengths, on split test), occlusion (a hidden mouth, a turned head; avsi-evaluate --raw=DIR).
    config.suite = "lengths"
    config.gap_ms = ()  # (): the suite's own, of lengths 300, 600, 900, 1200, 1500, 2000, 2500 and 3000, which is the whole clip
    config.checkpoint = "best"  # best (by validation), last, or a step
    config.judge = ""  # workdir of a recogniser (avsi-train --config=asr), which hears the words in the gaps; empty: nobody does
    config.batch_size = 16
    config.max_clips = 0  # 0: all of the split
    config.other_video = True  # also restores each clip by another clip's lips, where a suite has a row for it; half of the work
    config.examples = 5  # clips to hear and see in the report, and as many as four best and worst ones
    config.workers = 0  # processes that score; 0: one a core
    config.references = ""  # folder that keeps the rows no system has a part in; empty: in the user's cache
    return config
