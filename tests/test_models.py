"""The paper's parameter counts, what each network reads, and that padding and other clips are nothing to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs
from avsi_jax import experiment, features, models, text

B, F, K, V = 3, 12, 8, 6
FRAMES = np.int32([12, 7, 3])
SIZES = {"bands": K, "layers": 2, "units": 4, "lstm": "joined"}


@pytest.mark.parametrize(("name", "parameters"), [("a_si", 3_840_064), ("av_mtl_s2s", 8_148_802)])
def test_parameter_counts_are_the_papers(name, parameters):
    """Counted in the paper's Keras model; by hand for a BLSTM of 256 on n inputs: 2 x 4 x 256 x (n + 256 + 1)."""
    assert experiment.count_of(configs.load(name)) == parameters
    blstm = lambda n: 2 * 4 * 256 * (n + 256 + 1)
    stack = lambda n: blstm(n) + 2 * blstm(512)
    by_hand = {
        "a_si": stack(64) + 513 * 64,
        "av_mtl_s2s": stack(136) + 513 * 136 + 137 * 42 + stack(64 + 136) + 513 * 64,
    }
    assert by_hand[name] == parameters


def made_up(seed=0):
    rng = np.random.default_rng(seed)
    return features.Features(
        spectrogram=rng.uniform(size=(B, F, K)).astype(np.float32),
        mask=rng.uniform(size=(B, F)) < 0.4,
        video=rng.normal(size=(B, F, V)).astype(np.float32),
        target=rng.uniform(size=(B, F, K)).astype(np.float32),
        valid=np.arange(F) < FRAMES[:, None],
        num_frames=FRAMES,
    )


@functools.cache
def network(name, **more):
    """A small one with made-up parameters: jitted (features) -> Output."""
    system = models.get(name)
    module = system.module(**SIZES, **({"bottleneck": 5} if system.reads_lips else {}), **more)
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), made_up()))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), tree)
    return jax.jit(lambda features: module.apply(params, features))


@pytest.mark.parametrize("name", models.SYSTEMS)
def test_shapes(name):
    output = network(name)(made_up())
    assert output.level.shape == (B, F, K)
    if models.get(name).reads_lips:
        assert output.logits.shape == (B, F, text.NUM_LABELS) == (B, F, 42)
    else:
        assert output.logits is None


@pytest.mark.parametrize("name", models.SYSTEMS)
def test_reads_what_the_registry_says(name):
    given = made_up()
    before = network(name)(given)
    other_video = network(name)(given._replace(video=made_up(1).video))
    assert (np.asarray(other_video.level) != before.level).any() == models.get(name).uses_video
    other_sound = network(name)(given._replace(spectrogram=made_up(1).spectrogram))
    assert (np.asarray(other_sound.level) != before.level).any()
    if models.get(name).reads_lips:  # the lips' text comes from the lips alone
        np.testing.assert_array_equal(other_sound.logits, before.logits)
        assert (np.asarray(other_video.logits) != before.logits).any()


@pytest.mark.parametrize("name", models.SYSTEMS)
def test_neither_truth_nor_mask_is_an_input(name):
    given, other = made_up(), made_up(2)
    before, after = (network(name)(f) for f in (given, given._replace(target=other.target, mask=other.mask)))
    for one, two in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", models.SYSTEMS)
def test_padding_and_other_clips_change_nothing(name):
    given, other = made_up(), made_up(3)
    keep = given.valid[..., None].copy()
    keep[1] = False  # all of clip 1 is another one, and every clip's padding
    dirty = given._replace(
        spectrogram=np.where(keep, given.spectrogram, other.spectrogram), video=np.where(keep, given.video, other.video)
    )
    before, after = network(name)(given), network(name)(dirty)
    for one, two in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        for b in (0, 2):
            np.testing.assert_allclose(one[b, : FRAMES[b]], two[b, : FRAMES[b]], atol=1e-6)
        assert (np.asarray(one)[1] != np.asarray(two)[1]).any()


def test_bands_are_linear_or_end_in_a_relu():
    """The paper's code has a ReLU in the audio-visual networks alone (CNN_RNN.py); it kills bands, so linear is the default."""
    given = made_up()
    assert (np.asarray(network("a_si")(given).level) < 0).any()
    linear = np.asarray(network("av_mtl_s2s")(given).level)
    assert (linear < 0).any()
    relu = network("av_mtl_s2s", output="relu")(given)
    np.testing.assert_allclose(relu.level, np.maximum(linear, 0), atol=1e-6)


def test_composite_keeps_what_was_heard():
    given = made_up()
    out = np.random.default_rng(5).uniform(size=(B, F, K)).astype(np.float32)
    together = np.asarray(models.composite(jnp.asarray(out), given))
    np.testing.assert_array_equal(together[given.mask], out[given.mask])
    np.testing.assert_array_equal(together[~given.mask], given.spectrogram[~given.mask])


def test_an_unknown_system_names_the_known_ones():
    with pytest.raises(ValueError, match="'av_s3s'.*a_si, av_mtl_s2s"):
        models.get("av_s3s")
