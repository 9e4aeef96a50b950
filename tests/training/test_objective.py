"""A config's parts: what is drawn for training and what for validation, what the objective weighs, and what is refused."""

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
TRAINING_ALONE = {
    "dropout": 0.5, "gaps.curriculum_steps": 100, "augment.speed": 0.1, "augment.gain_db": 6.0, "augment.mirror": 0.5,
    "augment.stretch": 0.1, "augment.noise_px": 0.5, "augment.jitter_ms": 20.0,
    "augment.drop_video": 0.3, "augment.drop_audio": 0.3,
}  # fmt: skip
UNIFIED = {
    "system": "av_unified", "preset": "paper", "motion": "pixels", "units": 4, "layers": 1, "stack": 4, "ctc_units": "phones",
    "loss.whole": 0.1, "loss.gap": 1.0, "loss.ctc": 0.01, "loss.near_frames": 3, "gaps.max_count": 2,
}  # fmt: skip
FIXED = {"augment.jitter_ms": 0.0, "augment.drop_video": 0.0, "augment.drop_audio": 0.0}  # where a test says nothing of them


def config_of(name="base", **fields):
    return configs.load(name, [(k.replace("__", "."), str(v)) for k, v in fields.items()])


def unified(**more):
    return config_of(**UNIFIED | FIXED | more)


# ---- what is drawn -------------------------------------------------------------------------------------------------------------


class Drawn(Exception):
    """Carries the gaps that a loss made its features with."""


def drawn(monkeypatch, config, *, step=0, train=True, count=2_000, faceless=False):
    """(count, G, 2): the gaps of clips of 2.98 and 2 s, and the clips."""
    batch = {
        "audio": np.zeros((count, 1), np.int16),
        "audio_length": np.resize(np.int32([47_648, 32_000]), count),
        "id_hash": np.arange(1, count + 1, dtype=np.uint32) * np.uint32(2_654_435_761),
        "landmarks_valid": np.resize([[True, False], [False, False]], (count, 2)) if faceless else np.ones((count, 2), bool),
    }

    def give_up(batch, gap, config):
        raise Drawn(gap)

    monkeypatch.setattr(features, "make_features", give_up)
    with pytest.raises(Drawn) as caught:
        objective.make_loss(config, train=train)(None, batch, KEY, step)
    return np.asarray(caught.value.args[0]), batch


def plainly(config, batch, share=1.0):
    """What audio/gap_masks.py draws by the key itself, of so large a share of the time."""
    how = {k: v for k, v in config.gaps.items() if k not in ("protocol", "curriculum_steps")}
    how |= {k: np.float32(how[k] * share) for k in ("total_mean_ms", "total_std_ms", "total_min_ms", "total_max_ms")}
    return np.asarray(gap_masks.draw_batch(KEY, batch["id_hash"], batch["audio_length"], **how))


@pytest.mark.parametrize("train", [True, False])
def test_gaps_are_drawn_by_the_key_itself(monkeypatch, train):
    """Whatever else is drawn beside them."""
    config = unified(**{"dropout": 0.5})
    found, batch = drawn(monkeypatch, config, train=train)
    np.testing.assert_array_equal(found, plainly(config, batch))


@pytest.mark.parametrize(("total", "low", "high"), [("normal", 900.0, 300.0), ("uniform", 160.0, 1_600.0)])
def test_the_curriculum_lets_the_lost_time_grow(monkeypatch, total, low, high):
    """A quarter of it in the 10th of 40 steps, all of it from the 40th on; in validation always all of it."""
    names = ("total_mean_ms", "total_std_ms") if total == "normal" else ("total_min_ms", "total_max_ms")
    wanted = {"gaps.total": total, f"gaps.{names[0]}": low, f"gaps.{names[1]}": high, "gaps.min_ms": 10.0}
    wanted |= {"gaps.curriculum_steps": 40}
    config = unified(**wanted)
    lost = []
    for step, share in ((0, 1 / 40), (9, 0.25), (39, 1), (1_000, 1)):
        found, batch = drawn(monkeypatch, config, step=step)
        assert np.abs(found - plainly(config, batch, share)).max() <= 1  # a sample, by another order of roundings
        lost.append((found[..., 1] - found[..., 0]).sum(1).mean())
    assert lost[0] < lost[1] < lost[2] == lost[3] and lost[1] / lost[2] == pytest.approx(0.25, rel=0.05)
    np.testing.assert_array_equal(drawn(monkeypatch, config, train=False)[0], plainly(config, batch))


def test_lost_audio_is_that_of_whole_clips(monkeypatch):
    config = unified(**{"augment.drop_audio": 0.2})
    found, batch = drawn(monkeypatch, config)
    whole = np.zeros_like(found)
    whole[:, 0, 1] = batch["audio_length"]
    lost, plain = (found == whole).all((1, 2)), plainly(config, batch)
    np.testing.assert_array_equal(found[~lost], plain[~lost])
    assert lost.mean() == pytest.approx(0.2, abs=4 * np.sqrt(0.2 * 0.8 / len(lost)))
    np.testing.assert_array_equal(drawn(monkeypatch, config, train=False)[0], plain)
    kept = (drawn(monkeypatch, config, faceless=True)[0] == plain).all((1, 2))
    assert kept[1::2].all()  # a clip that has no lips keeps its sound
    np.testing.assert_array_equal(kept[::2], ~lost[::2])


@pytest.mark.parametrize("train", [True, False])
def test_a_recogniser_hears_everything(monkeypatch, train):
    plain = {"augment.speed": 0.0, "augment.gain_db": 0.0, "augment.trim": 0.0}
    config = config_of("asr", **plain, preset="paper", levels="preset")
    assert not drawn(monkeypatch, config, train=train)[0].any()


# ---- what a network is made with -----------------------------------------------------------------------------------------------


def batch_of(count):
    """Clips of unequal lengths; one of them does not count."""
    examples = []
    for seed, clip_id in enumerate(list(tiny_data.clip_ids())[:count]):
        said = "bin blue at t one now" if seed % 2 else "lay red at t seven now"
        raw = tiny_data.measurement(seed) | {"id": clip_id, "speaker": "s1", "text": said, "words": []}
        examples.append(input_pipeline.to_example(raw))
    batch = {k: np.stack([e[k] for e in examples]) for k in examples[0] if k != "clip_id"}
    return batch | {"weight": np.float32([1] * (count - 1) + [0])}


@pytest.mark.parametrize("name", sorted(set(configs.names()) - {"eval"}))
def test_what_a_network_is_made_with_is_what_it_is_trained_on(name):
    """Shapes and types of every config's features."""
    config = configs.load(name, [("video_rate", "video")] if name == "av_s2s" else [])
    scale = lambda n: features.Scale((0.0,) * n, (1.0,) * n)
    normalisation = features.Normalisation(**{what: scale(1) for what in build.standardised(config)})
    feature_config = build.make_feature_config(config, normalisation)
    make = functools.partial(features.make_features, config=feature_config)
    made = jax.eval_shape(make, batch_of(2), np.zeros((2, 1, 2), np.int32))
    kept = jax.eval_shape(lambda: build.example_features(config, 2))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(lambda a: (a.shape, a.dtype), kept)


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


def test_validation_knows_nothing_of_what_training_changes(params, batch):
    """Bit for bit, and the same in every step; training itself is another thing."""
    plain, rich = loss_of(False), loss_of(False, **TRAINING_ALONE)
    expected, found = plain(params, batch, KEY, 0), rich(params, batch, KEY, 50)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    trained, sums = loss_of(True, **TRAINING_ALONE)(params, batch, KEY, 50)
    assert np.isfinite(trained) and abs(float(trained) - float(expected[0])) > 1e-3 and set(sums) == set(expected[1])


def test_the_objective_is_the_weighted_sum_of_its_means(params, batch):
    """The gap's part counts the frames beside it too, what is shown as its error does not."""
    total, sums = loss_of(False)(params, batch, KEY, 0)
    mean = {k: float(s) / float(n) for k, (s, n) in sums.items()}
    assert float(total) == pytest.approx(0.1 * mean["whole"] + mean["gap"] + 0.01 * mean["ctc"], rel=1e-5)
    config = unified()
    drawn = plainly(config, batch)
    make = jax.jit(features.make_features, static_argnums=2)
    seen = make(batch, drawn, build.make_feature_config(config))
    mask, valid = np.asarray(seen.mask), np.asarray(seen.valid)
    near = scipy.ndimage.binary_dilation(mask, np.ones((1, 7))) & valid
    counted = {"whole": valid, "gap": near, "gap_l1": mask}
    assert mask[:3].sum() < near[:3].sum() < valid[:3].sum()
    for name, frames in counted.items():
        assert int(sums[name][1]) == 64 * frames[:3].sum(), name  # the fourth clip has no weight
    assert (int(sums["ctc"][1]), float(sums["ctc_infeasible"][0]), int(sums["ctc_infeasible"][1])) == (3, 0, 3)


def test_the_text_is_of_the_configs_units(params, batch):
    other = batch["phones"][:, ::-1].copy()
    run = loss_of(False)
    _, before = run(params, batch, KEY, 0)
    _, letters = run(params, batch | {"labels": batch["labels"] * 0 + 3}, KEY, 0)
    _, phones = run(params, batch | {"phones": other}, KEY, 0)
    assert letters["ctc"] == before["ctc"] and float(phones["ctc"][0]) != float(before["ctc"][0])
    assert params["ctc"]["kernel"].shape[1] == grid_text.NUM_PHONES
    assert build.make_model(unified(ctc_units="characters")).sizes.labels == grid_text.NUM_LABELS


def test_a_text_that_cannot_be_said_is_counted_and_changes_nothing(params, batch):
    """23 equal phones take 45 steps, a clip here has 38 at most. The objective is that of a clip without text."""
    said, length = batch["phones"].copy(), batch["phone_length"].copy()
    said[1], length[1] = 5, 23
    run = loss_of(False)
    total, sums = run(params, batch | {"phones": said, "phone_length": length.copy()}, KEY, 0)
    length[1] = 0
    expected, without = run(params, batch | {"phones": said, "phone_length": length}, KEY, 0)
    assert float(total) == float(expected) and int(sums["ctc"][1]) == int(without["ctc"][1]) == 2
    assert float(sums["ctc"][0]) == float(without["ctc"][0])
    assert [int(x) for x in sums["ctc_infeasible"]] == [1, 3] and [int(x) for x in without["ctc_infeasible"]] == [0, 2]


# ---- what is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"system": "av_si", "stack": 2}, "config.stack: found 2, expected 1 of av_si"),
        ({"system": "av_unified", "stack": 5}, "config.stack: found 5, expected 1 or 2 or 3 or 4 of av_unified"),
        ({"system": "av_unified", "video_rate": "video"}, "config.video_rate: found 'video', expected 'audio' of av_unified"),
        ({"system": "av_s2s", "video_rate": "both"}, "config.video_rate: found 'both', expected 'audio' or 'video' of av_s2s"),
        ({"system": "av_s2s", "video_layers": 1}, "config.video_layers: found 1, expected 0 of av_s2s"),
        ({"system": "av_unified", "feedback": 3}, "config.feedback: found 3, expected 0 or 1 or 2 of av_unified"),
        ({"system": "av_mtl_s2s", "ctc_units": "words"}, "config.ctc_units: found 'words', expected 'characters' or 'phones'"),
        ({"system": "av_mtl_s2s", "output": "sigmoid"}, "config.output: found 'sigmoid', expected 'linear' or 'relu'"),
        ({"system": "av_mtl_s3s"}, "unknown system 'av_mtl_s3s'; expected one of a_si"),
        ({"system": "av_si", "augment.drop_video": 0.1}, "av_si can't lose a stream; expected drop_video and drop_audio 0"),
        ({"system": "a_si", "augment.drop_audio": 0.1}, "config.augment: a_si can't lose"),
        ({"system": "asr", "augment.drop_audio": 0.1}, "config.augment: asr can't lose"),
        ({"system": "av_si", "skip": True}, "config.skip: found True, expected False of av_si"),
        ({"system": "asr", "dtype": "bfloat16"}, "config.dtype: found 'bfloat16', expected 'float32' of asr"),
        ({"system": "av_unified", "output": "relu"}, "config.output: found 'relu', expected 'linear' of av_unified"),
        ({"layers": 0}, "config.layers: found 0, expected 1 or more"),
        ({"units": 0}, "config.units: found 0, expected 1 or more"),
        ({"bottleneck": -3}, "config.bottleneck: found -3, expected 0 or more"),
        ({"system": "asr", "output": "relu"}, "config.output: found 'relu', expected 'linear' of asr"),
        ({"dropout": 1.0}, "config.dropout: found 1.0, expected a share from 0 to below 1"),
        ({"augment.speed": 1.0}, "config.augment.speed: found 1.0, expected 0 to 0.5"),
        ({"motion": "poses"}, "config.motion: found 'poses', expected 'pixels', 'standardised' or 'pose'"),
        ({"motion": "standardised", "video_rate": "video"}, "config.motion: found 'standardised' at video_rate='video'"),
    ],
)
def test_what_does_not_go_together_takes_one_line(fields, says):
    with pytest.raises(ValueError) as error:
        objective.make_loss(config_of(**fields))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_systems_own_output_is_the_papers():
    """The ReLU that config.output asks for is of the audio-visual systems alone."""
    assert build.make_model(config_of(system="a_si", output="relu")).sizes.output == "linear"
    assert build.make_model(config_of(system="av_si", output="relu")).sizes.output == "relu"
    assert presets.get("paper").bands == build.make_model(config_of(system="a_si")).sizes.bands
