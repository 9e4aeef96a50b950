"""The default experiment: the values of the paper's code, except those of the fields below, whose comments say why.

Different are interpolation, init, output, gaps.protocol, gaps.placement, gaps.fixed, adam_epsilon and clip_norm.

Every other config is this one with some values changed. "The paper" is Elyaderani & Shirani, INTERSPEECH 2023 (docs/systems.md).

avsi-train --config=av_mtl_s2s --workdir=DIR --config.data_dir=DATA
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    # ours: the values below. paper: the fields of configs.PAPER get the values of the paper's code (docs/systems.md); setting one
    # of them to another value as well is an error.
    config.fidelity = "ours"

    # ---- System and input.
    config.system = "av_mtl_s2s"  # a name of avsi_jax.models.systems.SYSTEMS
    config.preset = "paper"  # signal preset of avsi_jax.presets: paper (8 kHz, 64 mel), wide (16 kHz, 80 mel), morrone
    # Scale of the spectrogram levels. preset: as the preset has them, in [0, 1] for paper, standardised by the train split for wide
    # and morrone. standardised: by the train split at every preset, so that loss.ctc has the same relative weight everywhere.
    config.levels = "preset"
    config.landmarks = "face"  # face: all 68 landmarks (the paper's code); mouth: the 20 of the mouth (the paper's text)
    # Visual features. pixels: motion of the landmarks in pixels (the paper's code); standardised: the same, standardised by the
    # train split; pose: positions and motion normalised for head position, size and roll, standardised.
    config.motion = "pixels"
    # Rate of the visual features. audio: interpolated to the spectrogram frames (the paper's code); video: one encoder time step
    # per video frame, interpolated after the encoder.
    config.video_rate = "audio"
    # Interpolation of the landmarks to the spectrogram frames. time: linear, every video frame at its own time; spline: cubic, the
    # 75 video frames of a clip spread evenly over the frames (the paper's code), for motion=pixels at video_rate=audio.
    config.interpolation = "time"
    config.ctc_units = "characters"  # labels of the CTC head: characters (the paper's code) or phones (its text, Morrone et al.)
    config.mask_input = False  # whether the network also gets the gap mask: one value per frame
    config.layers = 3  # bidirectional LSTM layers, in the encoder and in the decoder each (the paper)
    config.units = 256  # LSTM units per direction (the paper)
    config.bottleneck = 136  # units of the layer after the encoder, which feeds CTC head and decoder (the paper); 0: no such layer
    config.bottleneck_relu = True  # whether the bottleneck ends in a ReLU (the paper); False: linear
    config.skip = False  # *_s2s: whether the visual features also go directly to the decoder
    config.stack = 1  # av_unified, asr: spectrogram frames per LSTM time step
    config.video_layers = 0  # av_unified: LSTM layers on the visual features alone, beside their direct path to the decoder
    config.feedback = 0  # av_unified: layers after which the CTC output is fed to the following ones (docs/systems.md); 0: off
    config.dropout = 0.0  # share of the values set to 0 after each layer, in [0, 1)
    # Output layer of the audio-visual systems: linear; or relu, the paper's code, which leaves bands dead (docs/results_long.md).
    config.output = "linear"
    # ConvNeXt blocks of the refiner, which adds the detail of speech to the predicted log-mel; 0: none. Weights get one by
    # python -m avsi_jax.inference.refine; avsi-train trains networks without it.
    config.refiner = 0
    # Initial parameters. flax: the defaults of flax, every gate of an LSTM for itself; keras: those of Keras, all gates of an LSTM
    # together and dense layers by Glorot & Bengio, with orthogonal input weights of the encoder, as the paper's code has them.
    config.init = "flax"
    config.lstm = "auto"  # LSTM implementation: auto, separate (for CPU), joined (for GPU and TPU), cudnn (NVIDIA, float32)
    # Type of the LSTM matrix products. bfloat16: they accumulate in float32; parameters and state stay float32.
    config.dtype = "float32"

    # ---- Data.
    config.data_dir = ""  # folder that avsi-prepare --data_dir=DIR wrote
    config.builder_config = "speaker_independent"  # dataset config; speaker_dependent: every speaker occurs in all splits
    config.train_split = "train"  # any split of the dataset
    config.validation_split = "validation"  # validation: unseen speakers; validation_seen: seen speakers, for small datasets
    config.audio_only_clips = 0  # av_unified: clips of each batch that are excerpts of recordings without video
    config.audio_only_config = "test_clean"  # of the dataset librispeech, which python -m tfds_grid.librispeech writes

    # ---- Gaps: new ones in every training step; those of validation depend on the clip id alone.
    config.gaps = ml_collections.ConfigDict()
    # waveform: samples are set to 0 before the spectrogram is computed. paper (its code): whole frames of the clean spectrogram are
    # set to 0, which leaves audio of the gap in the frames beside it.
    config.gaps.protocol = "waveform"
    config.gaps.max_count = 8  # number of gaps per clip ~ U{1..max_count} (the paper)
    # Distribution of the total duration of a clip's gaps, ms. normal: N(total_mean_ms, total_std_ms), as in the paper; uniform:
    # U(total_min_ms, total_max_ms).
    config.gaps.total = "normal"
    config.gaps.total_mean_ms = 900.0  # for total='normal', the paper
    config.gaps.total_std_ms = 300.0  # for total='normal', the paper
    config.gaps.total_min_ms = 160.0  # for total='uniform'
    config.gaps.total_max_ms = 1600.0  # for total='uniform'
    config.gaps.min_ms = 60.0  # shortest gap, ms: 3 frames (the paper)
    # apart: gaps neither overlap nor leave the clip; paper: as in the paper's code, in whole frames, where the last gap may overlap
    # the one before it and run over the end of the clip.
    config.gaps.placement = "apart"
    config.gaps.fixed = False  # whether a clip has the same gaps in every training step (the paper's code) or new ones
    config.gaps.curriculum_steps = 0  # training steps over which the total duration grows linearly to its full value; 0: none
    # drawn: validation draws gaps as training does. words: one gap of 300, 600, 900, 1200 and 1500 ms per clip, inside the words.
    config.validation_gaps = "drawn"

    # ---- Augmentation of training clips (avsi_jax.data.augmentation); 0 turns each off, as in the paper.
    config.augment = ml_collections.ConfigDict()
    config.augment.speed = 0.0  # audio and video faster or slower by up to this share
    config.augment.gain_db = 0.0  # louder or softer by up to this many dB
    config.augment.trim = 0.0  # up to this share of the silence before and after the words is cut off
    config.augment.mirror = 0.0  # probability of mirroring the landmarks left to right
    config.augment.stretch = 0.0  # facial movements larger or smaller by up to this share
    config.augment.noise_px = 0.0  # standard deviation of noise on every landmark, pixels of a 360 px wide frame
    config.augment.jitter_ms = 0.0  # A/V offset of up to this many ms
    config.augment.drop_video = 0.0  # av_unified: probability that no face is visible in a clip
    config.augment.drop_audio = 0.0  # av_unified: probability that all audio of a clip is masked; never together with drop_video

    # ---- Objective: whole * error(all valid frames) + gap * error(frames in or near a gap) + ctc * CTC loss.
    config.loss = ml_collections.ConfigDict()
    config.loss.kind = "mse"  # error of the normalised levels: mse (the paper) or l1 (Morrone et al.)
    config.loss.whole = 1.0  # weight of the error over all valid frames, those in gaps included (the paper)
    config.loss.gap = 0.0  # weight of the error over the frames in or near a gap; 0 in the paper
    config.loss.near_frames = 0  # frames on either side of a gap that count as near
    config.loss.ctc = 1e-3  # weight of the CTC loss, which is in nats per clip (the paper); 0 for systems without a CTC head

    # ---- Optimisation.
    config.seed = 0  # of parameters, clip order, gaps, dropout and augmentation; the gaps of validation are the same for all seeds
    config.batch_size = 32  # clips per training step over all devices (the paper)
    # Equal parts in which a device processes its share of the batch one after the other: less memory, the same training step.
    config.accumulate = 1
    config.epochs = 200  # at most
    config.learning_rate = 1e-3  # of Adam (the paper)
    config.adam_epsilon = 1e-8  # of Adam; optax has 1e-8, Keras, and so the paper's code, 1e-7
    # Largest global norm of the gradient; 0: no clipping, as in the paper, where one burst of the gradient stalled the training
    # (docs/results_long.md).
    config.clip_norm = 1.0
    # Decay of an exponential moving average of the parameters, e.g. 0.999, used for validation, evaluation and inpainting; 0: none.
    config.ema = 0.0
    # Learning rate. plateau: times plateau_factor after plateau_patience epochs without gain (the paper; training/loop.py,
    # Progress); cosine: to 0 at the end (training/optimiser.py).
    config.schedule = "plateau"
    config.warmup_epochs = 0.0  # epochs of linear warm-up; cosine schedule only
    # Metric for plateau, early stopping and the best checkpoint: val_loss (the paper), or val_gap_l1_db, which excludes the CTC.
    config.monitor = "val_loss"
    config.plateau_factor = 0.1  # factor of the learning rate (the paper)
    config.plateau_patience = 5  # epochs (the paper)
    config.early_stop_patience = 10  # epochs without gain (the paper); 0: never stop early
    config.min_delta = 1e-4  # smallest decrease of the metric that counts as a gain (default of Keras' ReduceLROnPlateau)

    # ---- Validation, checkpoints and images.
    config.validate_every = 1  # epochs
    config.checkpoint_every = 1  # epochs; the last epoch is always saved
    config.keep = 2  # number of newest checkpoints kept, besides the best one
    config.checkpoint_seconds = 60.0  # also save within an epoch when this many seconds have passed since the last save; 0: never
    config.images_every = 0  # training steps between spectrogram images, in images/ and TensorBoard; 0: never

    # ---- Failures.
    # Watchdog timeout, seconds. The process dumps all stacks and exits with code 75, to be restarted, when a training step takes
    # longer, or compilation, reading or writing takes ten times longer. The limit is never below ten times the longest duration of
    # the same phase so far. 0: no watchdog.
    config.watchdog_s = 60.0
    config.debug_nans = False  # stop at the operation that first produces a NaN (jax_debug_nans); slow
    return config
