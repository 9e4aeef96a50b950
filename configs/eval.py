"""Settings of avsi-evaluate, the same for every system.

avsi-evaluate --workdir=DIR [--baseline=DIR2] [--config.split=test --config.suite=robustness --config.protocol=peer]
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data_dir = ""  # dataset folder; empty: the one of the training
    config.builder_config = ""  # dataset config; empty: the one of the training
    config.split = "test_seen"  # any split of the dataset; 'test' holds unseen speakers
    config.protocol = "waveform"  # gap protocol; 'paper' and 'peer' only to compare with published numbers (docs/evaluation.md)
    # Suite of conditions: lengths, multigap, streams (audio and video, audio only, video only), robustness (degraded audio and
    # video), unseen (lengths on split test), occlusion (covered mouth, turned head; needs avsi-evaluate --raw=DIR).
    config.suite = "lengths"
    # Gap lengths, ms. (): those of the suite; for 'lengths' 300, 600, 900, 1200, 1500, 2000, 2500 and 3000 (the whole clip).
    config.gap_ms = ()
    config.checkpoint = "best"  # best (by validation), last, or a training step
    config.judge = ""  # workdir of a recognizer (avsi-train --config=asr) that transcribes the words in the gaps; empty: none
    # Models of listeners that score clips at 16 kHz without the recording: plcmos and dnsmos (0.5 and 2.5 s of CPU a clip). They
    # need the extra eval, without which they are left out. Empty: none.
    config.listener_models = "plcmos,dnsmos"
    config.batch_size = 16  # clips
    config.max_clips = 0  # clips evaluated at most; 0: the whole split
    config.other_video = True  # also restore each clip with another clip's video, where the suite has a row for it; half the time
    config.examples = 5  # clips with players and spectrograms in the report, and up to four of the best and worst ones each
    config.workers = 0  # worker processes that compute metrics; 0: one per core
    config.references = ""  # cache folder for the rows that do not depend on a system; empty: the user's cache folder
    return config
