"""Restorer: restored log-mel and audio of a batch. Known frames and samples do not change; gap samples have no influence."""

import json

import numpy as np
import pytest

from avsi_jax.models import build
from avsi_jax.training.checkpoints import CheckpointError

GAPS_S = ([(0.8, 1.1)], [(0.0, 0.25), (1.5, 2.2)], [(1.0, 2.5)])  # of the three clips of the split: one, two, a long one


@pytest.fixture(scope="module")
def restorer(trained):
    from avsi_jax.inference.restorer import Restorer

    return Restorer.from_workdir(trained)


@pytest.fixture(scope="module")
def batch(tiny_dir):
    """The three clips of `test`, of three lengths."""
    from avsi_jax.data import input_pipeline

    return next(input_pipeline.eval_batches(input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "test"), 3))


@pytest.fixture(scope="module")
def gap():
    rows = [[(round(a * 16_000), round(b * 16_000)) for a, b in of_clip] for of_clip in GAPS_S]
    return np.asarray([row + [(0, 0)] * (2 - len(row)) for row in rows])


@pytest.fixture(scope="module")
def restored(restorer, batch, gap):
    return restorer.restore(batch, gap)


@pytest.fixture(scope="module")
def audio(restorer, restored, batch, gap):
    return restorer.to_audio(restored.level, batch, gap)


def inside(gap, samples):
    """bool (B, samples): inside a gap. Written out here, independent of audio/gap_masks.py."""
    missing = np.zeros((len(gap), samples), bool)
    for b, spans in enumerate(gap):
        for start, end in spans:
            missing[b, start:end] = True
    return missing


# ------------------------------------------------------------------------------------------------------------ from_workdir


def test_a_checkpoint_is_loaded_by_name_or_step(trained, tiny_config):
    """That its scores are those of metrics.csv is tested in tests/training/test_train_command.py."""
    import jax

    from avsi_jax.inference.restorer import Restorer

    best, last, second = (Restorer.from_workdir(trained, which) for which in ("best", "last", "4"))
    assert (best.step, last.step, second.step) == (4, 4, 4)  # of two epochs of 2 steps the second was better
    assert best.name == "av_mtl_s2s" and best.config == tiny_config() and best.spec.name == "paper"
    first = Restorer.from_workdir(trained, "2")
    jax.tree.map(np.testing.assert_array_equal, last.params, second.params)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(last.params), strict=True))
    jax.tree.map(np.testing.assert_array_equal, Restorer.load(trained, "2").params, first.params)


def test_an_error_names_what_is_missing(trained, tmp_path):
    from avsi_jax.inference.restorer import Restorer

    def message(*arguments):
        with pytest.raises(CheckpointError) as error:
            Restorer.from_workdir(*arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no config.json in" in message(tmp_path) and "avsi-train --workdir=DIR" in message(tmp_path)
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    assert f"no checkpoints/ in {tmp_path}" in message(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert "no checkpoint in" in message(tmp_path)
    assert "no checkpoint 3 in" in message(trained, "3") and "[2, 4]" in message(trained, "3")
    assert "found 'newest', expected best, last or a step" in message(trained, "newest")


def test_a_run_older_than_a_config_field_gets_the_fields_former_behaviour(trained, tmp_path):
    """A missing field without such a value is an error."""
    from avsi_jax.inference.restorer import Restorer

    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    config = json.loads((trained / "config.json").read_text())
    del config["motion"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Restorer.from_workdir(tmp_path).config.motion == "pixels"
    del config["landmarks"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has no landmarks: a run of an older version"):
        Restorer.from_workdir(tmp_path)


@pytest.mark.parametrize(("fields", "needed"), [({"preset": "wide"}, "level"), ({"motion": "standardised"}, "motion")])
def test_a_run_without_its_statistics_is_refused(trained, tmp_path, fields, needed):
    from avsi_jax.inference.restorer import Restorer

    config = json.loads((trained / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(CheckpointError, match=f"no statistics.json in .* {needed}"):
        Restorer.from_workdir(tmp_path)


def test_a_config_that_does_not_match_the_checkpoint_is_refused(trained, tmp_path):
    """Never a network with random parameters."""
    from avsi_jax.inference.restorer import Restorer

    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    config = json.loads((trained / "config.json").read_text())
    for change in ({"units": 9}, {"layers": 2}, {"system": "a_si"}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match="config.json .*shape"):
            Restorer.from_workdir(tmp_path)


# ------------------------------------------------------------------------------------------------------------------- restore


@pytest.mark.slow
def test_known_frames_do_not_change(restored, batch, gap):
    """The level is the recording's spectrogram in every frame that no gap sample touches."""
    from avsi_jax import presets
    from avsi_jax.data import features

    level, f = np.asarray(restored.level), restored.features
    mask = np.asarray(f.mask)
    np.testing.assert_array_equal(level[~mask], np.asarray(f.spectrogram)[~mask])
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    clean = features.make_features(arrays, np.zeros_like(gap), features.FeatureConfig(presets.get("paper")))
    np.testing.assert_allclose(level[~mask], np.asarray(clean.spectrogram)[~mask], atol=1e-4)
    assert level.shape == (3, 149, 64) and mask.any(1).all() and not mask.all(1).any()
    # a gap of 300 ms at a hop of 20 ms: 15 centres, and frames that windows of 40 ms and the filter of 8 ms reach
    assert 15 < mask[0].sum() <= 15 + 4
    assert len(restored.transcript) == 3


@pytest.mark.parametrize("protocol", ["waveform", "paper"])
def test_samples_inside_the_gap_have_no_influence(restorer, restored, audio, batch, gap, protocol):
    """Also with a network trained by the paper's protocol: in practice these samples do not exist."""
    from avsi_jax.inference.restorer import Restorer

    config = restorer.config.copy_and_resolve_references()
    with config.unlocked():
        config.gaps.protocol = protocol
    other = Restorer(config, restorer.params, restorer.step)
    noise = np.random.default_rng(0).integers(-32_768, 32_768, batch["audio"].shape).astype(np.int16)
    changed = batch | {"audio": np.where(inside(gap, 48_000), noise, batch["audio"])}
    a, b = (other.restore(x, gap) for x in (batch, changed))
    np.testing.assert_array_equal(a.level, b.level)
    assert a.transcript == b.transcript
    if protocol == "waveform":
        np.testing.assert_array_equal(a.level, restored.level)
        np.testing.assert_array_equal(other.to_audio(b.level, changed, gap), audio)


def test_the_video_influences_only_the_gap(restorer, restored, batch, gap):
    moved = batch | {"landmarks": batch["landmarks"][::-1].copy()}
    other = restorer.restore(moved, gap)
    mask = np.asarray(restored.features.mask)
    assert np.abs(np.asarray(other.level) - np.asarray(restored.level))[mask].max() > 1e-4
    np.testing.assert_array_equal(np.asarray(other.level)[~mask], np.asarray(restored.level)[~mask])


# --------------------------------------------------------------------------------------------------------------------- audio


def test_samples_outside_the_gaps_are_the_recording(audio, batch, gap):
    n = 47_648  # the preset's clip at 16 kHz: 23,824 samples at 8 kHz
    assert audio.shape == (3, n) and audio.dtype == np.float32
    position = np.arange(n) < batch["audio_length"][:, None]
    known = ~inside(gap, n) & position
    np.testing.assert_array_equal(audio[known], (batch["audio"][:, :n] / np.float32(32_768))[known])
    assert not audio[~position].any(), "no audio after the end of a clip"


def test_gaps_contain_audio(audio, gap):
    """Neither silent nor clipped."""
    for b, spans in enumerate(gap):
        for start, end in spans:
            if end > start:
                part = audio[b, start:end]
                assert np.isfinite(part).all() and 1e-5 < np.sqrt(np.mean(part**2)) < 1


def test_the_true_level_gives_audio_as_loud_as_the_recording(restorer, restored, batch, gap):
    """The vocoder alone: with the true log-mel the loudness in the gap is within 3 dB."""
    oracle = restorer.to_audio(restored.features.target, batch, gap)
    for b, spans in enumerate(gap):
        start, end = max(spans, key=lambda s: s[1] - s[0])
        recorded = batch["audio"][b, start:end] / 32_768
        assert 20 * np.log10(np.std(oracle[b, start:end]) / np.std(recorded)) == pytest.approx(0, abs=3)


def test_the_offset_of_a_short_clip_continues_in_its_gap(restorer, batch):
    """0.8 s of audio with a constant offset of 0.1 in clips padded to three seconds: the padding does not count for the offset."""
    n = 12_800
    audio = np.where(np.arange(48_000) < n, batch["audio"] // 4 + round(0.1 * 32_768), 0).astype(np.int16)
    short = batch | {"audio": audio, "audio_length": np.full(3, n, np.int32)}
    gap = np.int64([[[4_000, 7_200], [0, 0]], [[0, 3_200], [0, 0]], [[9_600, n], [0, 0]]])
    restored = restorer.to_audio(restorer.features(short, gap).target, short, gap)
    for clip, ((start, end), _) in zip(restored, gap):
        assert clip[start:end].mean() == pytest.approx(0.1, abs=0.015)


@pytest.mark.slow
def test_a_clip_is_restored_equally_in_any_batch(restorer, restored, audio, batch, gap):
    """Alone and among others: equal levels, and audio that differs only by what 60 iterations make of rounding."""
    for b in range(3):
        one = {k: v[b : b + 1] for k, v in batch.items() if isinstance(v, np.ndarray)}
        alone = restorer.restore(one, gap[b : b + 1])
        np.testing.assert_allclose(alone.level[0], restored.level[b], atol=1e-5)
        assert alone.transcript[0] == restored.transcript[b]
        again = restorer.to_audio(restored.level[b : b + 1], one, gap[b : b + 1])[0]
        difference = np.abs(again - audio[b])[inside(gap[b : b + 1], 47_648)[0]]
        loud = np.abs(audio[b])[inside(gap[b : b + 1], 47_648)[0]].max()
        assert difference.max() < 1e-2 * loud


# ------------------------------------------------------------------------------------------------------------- interpolation


def test_sentences_are_grid_sentences_or_empty_where_the_transcript_is_too_poor(restorer, restored):
    """Logits for a sentence with one wrong letter, for a single letter and for nothing."""
    from avsi_jax.data import grid_text
    from avsi_jax.models import ctc_decoding

    wrong, frames = "bin blux at f two now", 75
    logits = np.full((3, frames, grid_text.NUM_LABELS), -4.0, np.float32)
    logits[:, :, 0] = 2.0
    for k, label in enumerate(grid_text.encode(wrong)):
        logits[0, 3 * k, label] = 8.0
    logits[1, 30, grid_text.encode("n")[0]] = 8.0
    steps = np.full(3, frames)
    edited = restored._replace(transcript=ctc_decoding.greedy(logits, steps), logits=logits, num_steps=steps)
    assert edited.transcript == [wrong, "n", ""]
    assert restorer.sentences(edited) == ["bin blue at f two now", "", ""]
    assert restorer.sentences(restored._replace(transcript=["", ""], logits=None)) == ["", ""]


def test_interpolation_is_that_of_numpy():
    """np.interp, band by band, over known frames; constant at both ends, and never from padding."""
    from avsi_jax.inference.restorer import interpolate_level

    rng = np.random.default_rng(0)
    level, valid = rng.normal(size=(6, 40, 3)).astype(np.float32), np.ones((6, 40), bool)
    mask = rng.uniform(size=(6, 40)) < 0.5
    mask[1, :9], mask[2, 30:], mask[3] = True, True, False
    valid[2, 35:], valid[4, 20:] = False, False
    mask &= valid
    out = np.asarray(interpolate_level(level, mask, valid))
    for b in range(6):
        known = np.flatnonzero(valid[b] & ~mask[b])
        for k in range(3):
            expected = level[b, :, k].copy()
            expected[mask[b]] = np.interp(np.flatnonzero(mask[b]), known, level[b, known, k])
            np.testing.assert_allclose(out[b, :, k], expected, atol=1e-6)


def test_interpolation_of_a_clip_without_a_known_frame_is_finite():
    from avsi_jax.inference.restorer import interpolate_level

    level = np.ones((1, 5, 2), np.float32)
    assert np.isfinite(interpolate_level(level, np.ones((1, 5), bool), np.ones((1, 5), bool))).all()


def test_the_number_of_parameters_is_that_of_the_config(restorer):
    from avsi_jax.models import systems

    assert systems.count_parameters(restorer.params) == build.parameter_count(restorer.config)
