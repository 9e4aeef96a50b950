"""The refiner changes frames of the gap only, starts as the identity and is deterministic; what its critics see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avsi_jax import configs
from avsi_jax.data import input_pipeline
from avsi_jax.inference.restorer import Restorer
from avsi_jax.models import build, refiner
from avsi_jax.training import objective
from tests.support import tiny_data

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def inputs():
    """level (2, 40, 8), mask (2, 40) and noise."""
    rng = np.random.default_rng(0)
    mask = np.zeros((2, 40), bool)
    mask[0, 10:20], mask[1, 30:] = True, True
    level = rng.standard_normal((2, 40, 8)).astype(np.float32)
    return level, mask, np.asarray(refiner.clip_noise(np.array([7, 8], np.uint32), 40))


@pytest.fixture(scope="module")
def small():
    return refiner.Refiner(width=16, num_blocks=2)


@pytest.fixture(scope="module")
def params(small, inputs):
    return jax.jit(small.init)(jax.random.key(0), *inputs)


def test_without_training_the_prediction_is_returned(small, params, inputs):
    np.testing.assert_array_equal(small.apply(params, *inputs), inputs[0])


def test_only_frames_of_the_gap_change_and_depend_on_the_noise(small, params, inputs):
    level, mask, noise = inputs
    trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    refined = np.asarray(small.apply(trained, level, mask, noise))
    np.testing.assert_array_equal(refined[~mask], level[~mask])
    assert (np.abs(refined - level)[mask] > 0).mean() > 0.99
    elsewhere = np.asarray(small.apply(trained, level, mask, np.where(mask[..., None], noise, 100.0)))
    np.testing.assert_array_equal(elsewhere, refined)
    assert np.abs(np.asarray(small.apply(trained, level, mask, -noise)) - refined)[mask].max() > 1e-3


def test_the_noise_belongs_to_the_clip_not_to_its_place_in_the_batch():
    both = refiner.clip_noise(np.array([3, 2**32 - 1], np.uint32), 50)
    swapped = refiner.clip_noise(np.array([2**32 - 1, 3], np.uint32), 50)
    np.testing.assert_array_equal(both, swapped[::-1])
    assert (
        both.shape == (2, 50, refiner.NUM_NOISE)
        and abs(float(both.mean())) < 0.15
        and float(both.std()) == pytest.approx(1, abs=0.1)
    )
    assert not np.array_equal(both[0], both[1])


def test_a_critic_of_a_coarser_scale_sees_means_over_frames():
    level, mask = jnp.arange(10.0).reshape(1, 5, 2), jnp.array([[True, True, False, True, True]])
    mean, share = refiner.averaged(level, mask, 2)
    np.testing.assert_allclose(mean, [[[1, 2], [5, 6]]])
    np.testing.assert_allclose(share, [[1.0, 0.5]])


def test_a_critic_learns_to_tell_two_kinds_of_levels_apart(inputs):
    """After 30 steps of gradient descent on its hinge loss, smooth levels score below rough ones."""
    rough, mask, _ = inputs
    smooth = np.repeat(rough[:, ::8], 8, axis=1)
    critic = refiner.Critic(channels=4)
    params = jax.jit(critic.init)(jax.random.key(0), rough, mask)

    @jax.jit
    def descend(params):
        def loss(p):
            return (
                jax.nn.relu(1 + critic.apply(p, smooth, mask)[0]).mean() + jax.nn.relu(1 - critic.apply(p, rough, mask)[0]).mean()
            )

        value, slope = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, slope), value

    values = []
    for _ in range(30):
        params, value = descend(params)
        values.append(float(value))
    scores = [float(critic.apply(params, x, mask)[0].mean()) for x in (smooth, rough)]
    assert values[-1] < 0.7 * values[0] and scores[0] < 0 < scores[1]


# ---- in a network ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refined_config():
    return configs.load("tiny", [("system", "a_si"), ("units", "4"), ("refiner", "2")])


@pytest.fixture(scope="module")
def refined_params(refined_config):
    """Parameters of which those of the refiner are not zero."""
    noisy = lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape)
    params = build.init_params(refined_config)
    return params | {refiner.REFINER: jax.tree.map(noisy, params[refiner.REFINER])}


def test_a_config_with_a_refiner_has_the_network_of_the_same_config_without(refined_config, refined_params):
    plain, params = build.without_refiner(refined_config, refined_params)
    assert plain.refiner == 0 and refined_config.refiner == 2
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(params) == shapes(build.init_params(plain))
    assert build.without_refiner(plain, params) == (plain, params)


def test_the_restorer_refines_in_mode_natural_and_only_in_the_gap(refined_config, refined_params):
    gap = np.array([[[16_000, 24_000]], [[8_000, 12_000]]])
    example = input_pipeline.to_example(tiny_data.measurement(0) | {"id": "a", "speaker": "s1", "text": "", "words": []})
    batch = {k: np.stack([v, v]) for k, v in example.items() if k != "clip_id"} | {"id_hash": np.uint32([1, 2])}
    natural = Restorer(refined_config, refined_params, step=0)
    mean = Restorer(refined_config, refined_params, step=0, mode="mean")
    results = [np.asarray(r.restore(batch, gap).level) for r in (natural, mean, natural.mean)]
    inside = np.asarray(natural.features(batch, gap).mask)
    assert np.abs(results[0] - results[1])[inside].max() > 1e-2
    np.testing.assert_array_equal(results[0][~inside], results[1][~inside])
    np.testing.assert_array_equal(results[1], results[2])
    swapped = {k: v[::-1] for k, v in batch.items()}
    np.testing.assert_allclose(natural.restore(swapped, gap[::-1]).level[::-1], results[0], atol=1e-5)
    with pytest.raises(ValueError, match="mode: found 'loud', expected natural or mean"):
        Restorer(refined_config, refined_params, step=0, mode="loud")


def test_a_training_refuses_a_refiner(refined_config):
    with pytest.raises(ValueError, match="config.refiner: found 2, expected 0; .*avsi_jax.inference.refine"):
        objective.make_loss(refined_config)


def test_a_recognizer_has_no_refiner():
    with pytest.raises(ValueError, match="config.refiner: found 1, expected 0 for asr"):
        build.make_model(configs.load("asr", [("refiner", "1")]))
