"""The objective: gaps of training and validation, its terms and weights, and configs that are refused."""

import functools

import jax
import numpy as np
import pytest
import scipy.ndimage

from avsi_jax import configs, presets
from avsi_jax.audio import gap_masks
from avsi_jax.data import features, grid_text, input_pipeline
from avsi_jax.models import build
from avsi_jax.training import objective
from tests.support import tiny_data

pytestmark = pytest.mark.usefixtures("quickly_compiled")

KEY = jax.random.key(7)
TRAINING_ONLY = {
    "dropout": 0.5, "gaps.curriculum_steps": 100, "augment.speed": 0.1, "augment.gain_db": 6.0, "augment.mirror": 0.5,
    "augment.stretch": 0.1, "augment.noise_px": 0.5, "augment.jitter_ms": 20.0,
    "augment.drop_video": 0.3, "augment.drop_audio": 0.3,
}  # fmt: skip
UNIFIED = {
    "system": "av_unified", "preset": "paper", "motion": "pixels", "units": 4, "layers": 1, "stack": 4, "ctc_units": "phones",
    "loss.whole": 0.1, "loss.gap": 1.0, "loss.ctc": 0.01, "loss.near_frames": 3, "gaps.max_count": 2,
}  # fmt: skip
OFF = {"augment.jitter_ms": 0.0, "augment.drop_video": 0.0, "augment.drop_audio": 0.0}  # unless a test sets them


def config_of(name="base", **fields):
    return configs.load(name, [(k.replace("__", "."), str(v)) for k, v in fields.items()])


def unified(**more):
    return config_of(**UNIFIED | OFF | more)


# ---- gaps ----------------------------------------------------------------------------------------------------------------------


class Intercepted(Exception):
    """Carries the gaps that a loss passes to make_features."""


def gaps_of(monkeypatch, config, *, step=0, train=True, count=2_000, without_face=False):
    """The gaps (count, G, 2) that the loss draws for clips of 2.98 and 2 s, and the batch."""
    batch = {
        "audio": np.zeros((count, 1), np.int16),
        "audio_length": np.resize(np.int32([47_648, 32_000]), count),
        "id_hash": np.arange(1, count + 1, dtype=np.uint32) * np.uint32(2_654_435_761),
        "landmarks_valid": np.resize([[True, False], [False, False]], (count, 2)) if without_face else np.ones((count, 2), bool),
    }

    def intercept(batch, gap, config):
        raise Intercepted(gap)

    monkeypatch.setattr(features, "make_features", intercept)
    with pytest.raises(Intercepted) as caught:
        objective.make_loss(config, train=train)(None, batch, KEY, step)
    return np.asarray(caught.value.args[0]), batch


def expected_gaps(config, batch, share=1.0):
    """The gaps that gap_masks.draw_batch draws from the key itself, with the total duration scaled by `share`."""
    options = {k: v for k, v in config.gaps.items() if k not in ("protocol", "curriculum_steps", "fixed")}
    durations = ("total_mean_ms", "total_std_ms", "total_min_ms", "total_max_ms")
    options |= {k: np.float32(options[k] * share) for k in durations}
    return np.asarray(gap_masks.draw_batch(KEY, batch["id_hash"], batch["audio_length"], **options))


@pytest.mark.parametrize("train", [True, False])
def test_gaps_do_not_depend_on_other_random_draws(monkeypatch, train):
    config = unified(**{"dropout": 0.5})
    gaps, batch = gaps_of(monkeypatch, config, train=train)
    np.testing.assert_array_equal(gaps, expected_gaps(config, batch))


@pytest.mark.parametrize(("total", "low", "high"), [("normal", 900.0, 300.0), ("uniform", 160.0, 1_600.0)])
def test_the_curriculum_lets_gaps_grow_in_training_only(monkeypatch, total, low, high):
    """A quarter of the total duration in the 10th of 40 steps, all of it from the 40th step on."""
    names = ("total_mean_ms", "total_std_ms") if total == "normal" else ("total_min_ms", "total_max_ms")
    fields = {"gaps.total": total, f"gaps.{names[0]}": low, f"gaps.{names[1]}": high, "gaps.min_ms": 10.0}
    config = unified(**fields | {"gaps.curriculum_steps": 40})
    means = []
    for step, share in ((0, 1 / 40), (9, 0.25), (39, 1), (1_000, 1)):
        gaps, batch = gaps_of(monkeypatch, config, step=step)
        assert np.abs(gaps - expected_gaps(config, batch, share)).max() <= 1  # sample, since roundings differ
        means.append((gaps[..., 1] - gaps[..., 0]).sum(1).mean())
    assert means[0] < means[1] < means[2] == means[3] and means[1] / means[2] == pytest.approx(0.25, rel=0.05)
    np.testing.assert_array_equal(gaps_of(monkeypatch, config, train=False)[0], expected_gaps(config, batch))


def test_fixed_gaps_are_the_same_in_every_training_step_and_differ_between_clips_and_seeds(monkeypatch):
    drawn = {}
    for seed in (0, 1):
        config = unified(**{"gaps.fixed": True, "seed": seed})
        for key in (KEY, jax.random.fold_in(KEY, 1)):
            monkeypatch.setattr(f"{__name__}.KEY", key)
            gaps, batch = gaps_of(monkeypatch, config, step=7)
            drawn.setdefault(seed, []).append(gaps)
    for first, second in drawn.values():
        np.testing.assert_array_equal(first, second)
    assert len(np.unique(drawn[0][0], axis=0)) > 1_000 and (drawn[0][0] != drawn[1][0]).any()


def test_drop_audio_masks_whole_clips_in_training_only(monkeypatch):
    """A clip without a visible face keeps its audio."""
    config = unified(**{"augment.drop_audio": 0.2})
    gaps, batch = gaps_of(monkeypatch, config)
    whole_clip = np.zeros_like(gaps)
    whole_clip[:, 0, 1] = batch["audio_length"]
    dropped, expected = (gaps == whole_clip).all((1, 2)), expected_gaps(config, batch)
    np.testing.assert_array_equal(gaps[~dropped], expected[~dropped])
    assert dropped.mean() == pytest.approx(0.2, abs=4 * np.sqrt(0.2 * 0.8 / len(dropped)))
    np.testing.assert_array_equal(gaps_of(monkeypatch, config, train=False)[0], expected)
    kept = (gaps_of(monkeypatch, config, without_face=True)[0] == expected).all((1, 2))
    assert kept[1::2].all()  # the clips without a face
    np.testing.assert_array_equal(kept[::2], ~dropped[::2])


@pytest.mark.parametrize("train", [True, False])
def test_a_recognizer_gets_no_gaps(monkeypatch, train):
    no_augmentation = {"augment.speed": 0.0, "augment.gain_db": 0.0, "augment.trim": 0.0}
    config = config_of("asr", **no_augmentation, preset="paper", levels="preset")
    assert not gaps_of(monkeypatch, config, train=train)[0].any()


# ---- example features ----------------------------------------------------------------------------------------------------------


def batch_of(count):
    """Clips of unequal lengths; the last one has weight 0."""
    examples = []
    for seed, clip_id in enumerate(list(tiny_data.clip_ids())[:count]):
        text = "bin blue at t one now" if seed % 2 else "lay red at t seven now"
        raw = tiny_data.measurement(seed) | {"id": clip_id, "speaker": "s1", "text": text, "words": []}
        examples.append(input_pipeline.to_example(raw))
    batch = {k: np.stack([e[k] for e in examples]) for k in examples[0] if k != "clip_id"}
    return batch | {"weight": np.float32([1] * (count - 1) + [0])}


@pytest.mark.parametrize("name", sorted(set(configs.names()) - {"eval"}))
def test_example_features_have_the_shapes_and_types_of_real_ones(name):
    config = configs.load(name, [("video_rate", "video")] if name == "av_s2s" else [])
    scale = lambda n: features.Scale((0.0,) * n, (1.0,) * n)
    normalisation = features.Normalisation(**{what: scale(1) for what in build.standardised(config)})
    feature_config = build.make_feature_config(config, normalisation)
    make = functools.partial(features.make_features, config=feature_config)
    real = jax.eval_shape(make, batch_of(2), np.zeros((2, 1, 2), np.int32))
    example = jax.eval_shape(lambda: build.example_features(config, 2))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), real) == jax.tree.map(lambda a: (a.shape, a.dtype), example)


# ---- the objective -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch():
    return batch_of(4)


@pytest.fixture(scope="module")
def params():
    tree = jax.eval_shape(lambda: build.init_params(unified()))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), tree)


@functools.cache
def loss_of(train, **more):
    """jitted (params, batch, key, step) -> (loss, sums)."""
    return jax.jit(objective.make_loss(unified(**more), train=train))


@pytest.mark.slow
def test_validation_does_not_depend_on_training_only_fields(params, batch):
    """Bit for bit, and in every step; a training step does."""
    plain, all_fields = loss_of(False), loss_of(False, **TRAINING_ONLY)
    expected, result = plain(params, batch, KEY, 0), all_fields(params, batch, KEY, 50)
    jax.tree.map(np.testing.assert_array_equal, result, expected)
    train_loss, sums = loss_of(True, **TRAINING_ONLY)(params, batch, KEY, 50)
    assert np.isfinite(train_loss) and abs(float(train_loss) - float(expected[0])) > 1e-3 and set(sums) == set(expected[1])


def test_the_objective_is_the_weighted_sum_of_its_means(params, batch):
    """The term `gap` also counts frames near a gap, the reported error `gap_l1` does not."""
    total, sums = loss_of(False)(params, batch, KEY, 0)
    mean = {k: float(s) / float(n) for k, (s, n) in sums.items()}
    assert float(total) == pytest.approx(0.1 * mean["whole"] + mean["gap"] + 0.01 * mean["ctc"], rel=1e-5)
    config = unified()
    make = jax.jit(features.make_features, static_argnums=2)
    made = make(batch, expected_gaps(config, batch), build.make_feature_config(config))
    mask, valid = np.asarray(made.mask), np.asarray(made.valid)
    near = scipy.ndimage.binary_dilation(mask, np.ones((1, 7))) & valid
    counted = {"whole": valid, "gap": near, "gap_l1": mask}
    assert mask[:3].sum() < near[:3].sum() < valid[:3].sum()
    for name, frames in counted.items():
        assert int(sums[name][1]) == 64 * frames[:3].sum(), name  # the fourth clip has weight 0
    assert (int(sums["ctc"][1]), float(sums["ctc_infeasible"][0]), int(sums["ctc_infeasible"][1])) == (3, 0, 3)


def test_the_ctc_term_uses_the_labels_of_the_config(params, batch):
    run = loss_of(False)
    _, before = run(params, batch, KEY, 0)
    _, other_letters = run(params, batch | {"labels": batch["labels"] * 0 + 3}, KEY, 0)
    _, other_phones = run(params, batch | {"phones": batch["phones"][:, ::-1].copy()}, KEY, 0)
    assert other_letters["ctc"] == before["ctc"] and float(other_phones["ctc"][0]) != float(before["ctc"][0])
    assert params["ctc"]["kernel"].shape[1] == grid_text.NUM_PHONES
    assert build.make_model(unified(ctc_units="characters")).sizes.labels == grid_text.NUM_LABELS


def test_an_infeasible_text_is_counted_and_otherwise_ignored(params, batch):
    """23 equal phones need 45 time steps, and these clips have at most 38: the objective is that of a clip without text."""
    phones, length = batch["phones"].copy(), batch["phone_length"].copy()
    phones[1], length[1] = 5, 23
    run = loss_of(False)
    total, sums = run(params, batch | {"phones": phones, "phone_length": length.copy()}, KEY, 0)
    length[1] = 0
    expected, without = run(params, batch | {"phones": phones, "phone_length": length}, KEY, 0)
    assert float(total) == float(expected) and int(sums["ctc"][1]) == int(without["ctc"][1]) == 2
    assert float(sums["ctc"][0]) == float(without["ctc"][0])
    assert [int(x) for x in sums["ctc_infeasible"]] == [1, 3] and [int(x) for x in without["ctc_infeasible"]] == [0, 2]


# ---- refused configs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"system": "av_si", "stack": 2}, "config.stack: found 2, expected 1 for av_si"),
        ({"system": "av_unified", "stack": 5}, "config.stack: found 5, expected 1 or 2 or 3 or 4 for av_unified"),
        ({"system": "av_unified", "video_rate": "video"}, "config.video_rate: found 'video', expected 'audio' for av_unified"),
        ({"system": "av_s2s", "video_rate": "both"}, "config.video_rate: found 'both', expected 'audio' or 'video' for av_s2s"),
        ({"system": "av_s2s", "video_layers": 1}, "config.video_layers: found 1, expected 0 for av_s2s"),
        ({"system": "av_unified", "feedback": 3}, "config.feedback: found 3, expected 0 or 1 or 2 for av_unified"),
        ({"system": "av_mtl_s2s", "ctc_units": "words"}, "config.ctc_units: found 'words', expected 'characters' or 'phones'"),
        ({"system": "av_mtl_s2s", "output": "sigmoid"}, "config.output: found 'sigmoid', expected 'linear' or 'relu'"),
        ({"system": "av_mtl_s3s"}, "unknown system 'av_mtl_s3s'; expected one of a_si"),
        ({"system": "av_si", "augment.drop_video": 0.1}, "config.augment: av_si"),
        ({"system": "a_si", "augment.drop_audio": 0.1}, "config.augment: a_si"),
        ({"system": "asr", "augment.drop_audio": 0.1}, "config.augment: asr"),
        ({"system": "av_si", "skip": True}, "config.skip: found True, expected False for av_si"),
        ({"system": "asr", "dtype": "bfloat16"}, "config.dtype: found 'bfloat16', expected 'float32' for asr"),
        ({"system": "av_unified", "output": "relu"}, "config.output: found 'relu', expected 'linear' for av_unified"),
        ({"layers": 0}, "config.layers: found 0, expected 1 or more"),
        ({"units": 0}, "config.units: found 0, expected 1 or more"),
        ({"bottleneck": -3}, "config.bottleneck: found -3, expected 0 or more"),
        ({"system": "asr", "output": "relu"}, "config.output: found 'relu', expected 'linear' for asr"),
        ({"dropout": 1.0}, "config.dropout: found 1.0"),
        ({"augment.speed": 1.0}, "config.augment.speed: found 1.0, expected 0 to 0.5"),
        ({"motion": "poses"}, "config.motion: found 'poses', expected 'pixels', 'standardised' or 'pose'"),
        ({"motion": "standardised", "video_rate": "video"}, "config.motion: found 'standardised' with video_rate='video'"),
    ],
)
def test_fields_that_do_not_fit_together_are_an_error_of_one_line(fields, message):
    with pytest.raises(ValueError) as error:
        objective.make_loss(config_of(**fields))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_output_relu_applies_to_audio_visual_systems_only():
    """As in the paper's code."""
    assert build.make_model(config_of(system="a_si", output="relu")).sizes.output == "linear"
    assert build.make_model(config_of(system="av_si", output="relu")).sizes.output == "relu"
    assert presets.get("paper").bands == build.make_model(config_of(system="a_si")).sizes.bands
