"""The whole experiment: the paper's values but for output, clip_norm and gaps.protocol, which say why.

A system's file is this plus the lines in which it differs.

avsi-train --config=av_mtl_s2s --workdir=DIR --config.data_dir=DATA
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    # ours: the fields below as they are; paper: every field that the paper's code decides as it does, its faults excepted
    # (configs.PAPER lists them; saying another value for one of them beside it is refused).
    config.fidelity = "ours"

    # What is trained.
    config.system = "av_mtl_s2s"  # a name of avsi_jax.models.systems.SYSTEMS
    config.preset = "paper"  # signal preset of avsi_jax.presets: paper (8 kHz, 64 mel), wide (16 kHz, 80 mel), morrone
    # preset: levels as the preset has them, in [0, 1] at paper, standardised by the train split at wide and morrone;
    # standardised: at every preset, so that loss.ctc weighs the same everywhere.
    config.levels = "preset"
    config.landmarks = "face"  # face: all 68 points, the paper's code; mouth: its text
    # pixels: motion as the paper's code; standardised: the same by mean and deviation of the train split; pose: place and motion
    # of the face turned level, in eye distances, standardised.
    config.motion = "pixels"
    config.video_rate = "audio"  # the lips at the spectrogram's frames, the paper's code; video: the encoder takes a step a picture
    config.ctc_units = "characters"  # the paper's code; phones: its text, and Morrone
    config.mask_input = False  # whether the network is told which frames a gap touches
    config.layers = 3  # bidirectional LSTM layers of each of encoder and decoder
    config.units = 256  # LSTM units a direction
    config.bottleneck = 136  # width of the encoder's ReLU layer (the CTC head reads it); 0: there is none
    config.bottleneck_relu = True  # False: a linear layer
    config.skip = False  # *_s2s: what describes the lips goes round the encoder too
    config.stack = 1  # av_unified, asr: frames that become one step of the LSTMs
    config.video_layers = 0  # av_unified: layers that look at the lips alone, beside the direct way
    config.feedback = 0  # av_unified: after so many layers what was read by then is told to the layers after; 0: never
    config.dropout = 0.0  # of the values after each layer
    config.output = "linear"  # of the audio-visual systems; relu is the paper's code, and leaves bands dead (docs/results_long.md)
    config.lstm = "auto"  # separate (CPU), joined (GPU, TPU), cudnn (NVIDIA, float32), auto
    config.dtype = "float32"  # of the LSTMs' products; bfloat16: added up in float32, parameters and state stay float32

    # Data.
    config.data_dir = ""  # where avsi-prepare wrote
    config.builder_config = "speaker_independent"  # or speaker_dependent: speakers shared by all splits
    config.train_split = "train"  # any split of the dataset
    config.validation_split = "validation"  # unseen speakers; small data: validation_seen

    # Gaps of training and validation, drawn fresh in every step, in the waveform.
    config.gaps = ml_collections.ConfigDict()
    config.gaps.protocol = "waveform"  # paper: whole frames of the spectrogram set to 0, kind to the frames beside
    config.gaps.max_count = 8  # gaps a clip ~ U{1..8}
    # Total duration of a clip's gaps, ms. normal: N(total_mean_ms, total_std_ms); uniform: U(total_min_ms, total_max_ms).
    config.gaps.total = "normal"
    config.gaps.total_mean_ms = 900.0
    config.gaps.total_std_ms = 300.0
    config.gaps.total_min_ms = 160.0
    config.gaps.total_max_ms = 1600.0
    config.gaps.min_ms = 60.0  # 3 frames, the shortest gap
    config.gaps.curriculum_steps = 0  # over so many steps the time lost grows to what is said above

    # Training clips made others (avsi_jax.data.augmentation says how); 0: not.
    config.augment = ml_collections.ConfigDict()
    config.augment.speed = 0.0  # sound and picture faster or slower by up to this share
    config.augment.gain_db = 0.0  # louder or softer by up to
    config.augment.trim = 0.0  # of the silence around the words up to this share cut off
    config.augment.mirror = 0.0  # probability
    config.augment.stretch = 0.0  # every movement of the face larger or smaller by up to this share
    config.augment.noise_px = 0.0  # deviation of noise on every point, pixels of a 360-wide picture
    config.augment.jitter_ms = 0.0  # sound and picture out of step by up to
    config.augment.drop_video = 0.0  # probability that no picture shows a face (av_unified)
    config.augment.drop_audio = 0.0  # probability that no sound is left (av_unified)

    # Objective: whole * error(all valid frames) + gap * error(frames a gap touches or nearly so) + ctc * CTC.
    config.loss = ml_collections.ConfigDict()
    config.loss.kind = "mse"  # mse or l1, of the normalised level
    config.loss.whole = 1.0  # gap included
    config.loss.gap = 0.0  # the paper weighs valid frames and gaps alike
    config.loss.near_frames = 0  # of the gap's part: so many frames beside what a gap touches count as well
    config.loss.ctc = 1e-3  # nats a clip; 0 for systems that do not read the lips

    # Optimisation.
    config.seed = 0  # of parameters, order and gaps
    config.batch_size = 32  # of all devices together
    # A device goes through its share of the batch in so many equal parts, one after the other: less memory, the same step.
    config.accumulate = 1
    config.epochs = 200  # at most
    config.learning_rate = 1e-3  # Adam
    # Largest global norm of the gradient, 0: not clipped. The paper does not clip; one burst stalled it (docs/results_long.md).
    config.clip_norm = 1.0
    # Decay of a running mean of the parameters, which validation, evaluation and repair then use, e.g. 0.999; 0: there is none.
    config.ema = 0.0
    config.schedule = "plateau"  # plateau (x factor after patience epochs without gain) or cosine (to 0 over all epochs)
    config.warmup_epochs = 0.0  # cosine only
    config.monitor = "val_loss"  # decides plateau, early stop and the best checkpoint; or val_gap_l1_db, which CTC doesn't sway
    config.plateau_factor = 0.1  # of the learning rate
    config.plateau_patience = 5  # epochs
    config.early_stop_patience = 10  # epochs without gain; 0: never
    config.min_delta = 1e-4  # what counts as a gain for early stop (Keras' ReduceLROnPlateau has the same default)

    # Keeping.
    config.validate_every = 1  # epochs
    config.checkpoint_every = 1  # epochs; the last epoch is always saved
    config.keep = 2  # last checkpoints kept beside the best
    config.checkpoint_seconds = 60.0  # work at risk: inside an epoch too, once so many seconds passed since the last; 0: never
    config.images_every = 0  # steps from one set of spectrogram pictures to the next, in pictures/ and TensorBoard; 0: never

    # Faults.
    # A step that takes more seconds, or what compiles, reads or writes and takes ten times as many, ends the process with every
    # stack dumped and the missing process named, to be started again; never before ten times the longest of its kind; 0: never.
    config.watchdog_s = 60.0
    config.debug_nans = False  # stop at the operation that first gives NaN (jax_debug_nans); slow
    return config
