"""Networks: which inputs affect their outputs, and that padding and other clips do not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avsi_jax import configs
from avsi_jax.data import features
from avsi_jax.models import build, systems

pytestmark = pytest.mark.usefixtures("quickly_compiled")

B, F, K, V, T, LABELS = 3, 13, 8, 6, 7, 9
FRAMES, VIDEO = np.int32([13, 8, 3]), np.int32([7, 5, 2])
POSITIONS = np.float32(np.linspace(0, 1, F)[None] * (VIDEO - 1)[:, None])
SIZES = systems.Sizes(bands=K, labels=LABELS, layers=1, units=4, bottleneck=5, lstm="joined")

# Every system, and every field that changes the flow of data.
NETWORKS = {name: (name, {}) for name in systems.SYSTEMS} | {
    "a_si mask": ("a_si", {"mask_input": True}),
    "av_mtl_si mask": ("av_mtl_si", {"mask_input": True}),
    "av_s2s without bottleneck": ("av_s2s", {"bottleneck": 0}),
    "av_mtl_s2s mask, linear, skip": ("av_mtl_s2s", {"mask_input": True, "bottleneck_relu": False, "skip": True}),
    "av_mtl_s2s at video rate": ("av_mtl_s2s", {"video_rate": "video", "skip": True}),
    "v_s2s at video rate": ("v_s2s", {"video_rate": "video"}),
    "av_unified, 2": ("av_unified", {"stack": 2}),
    "av_unified mask, 2": ("av_unified", {"stack": 2, "mask_input": True}),
    "av_unified feedback, 3": ("av_unified", {"stack": 3, "layers": 2, "feedback": 1}),
    "av_unified video layer, 2": ("av_unified", {"stack": 2, "video_layers": 1}),
    "av_mtl_s2s bfloat16": ("av_mtl_s2s", {"dtype": "bfloat16"}),
    "av_unified bfloat16, 2": ("av_unified", {"stack": 2, "dtype": "bfloat16"}),
    "asr, 4": ("asr", {"stack": 4}),
}
CTC_OF_VIDEO_ALONE = ("av_mtl_s2s",)
WITHOUT_AUDIO = ("v_s2s",)
each = pytest.mark.parametrize("name", NETWORKS)


def sizes_of(name):
    return dataclasses.replace(SIZES, **NETWORKS[name][1])


def system_of(name):
    return systems.get(NETWORKS[name][0])


def random_features(seed=0, video_rate="audio", frames=F):
    """Clips of 13, 8 and 3 spectrogram frames, or 7, 5 and 2 video frames; the padding is noise too."""
    rng = np.random.default_rng(seed)
    steps, lengths = (T, VIDEO) if video_rate == "video" else (frames, FRAMES)
    seen = rng.uniform(size=(B, steps)) < 0.7
    seen[:, 0] = True
    return features.Features(
        spectrogram=rng.uniform(size=(B, frames, K)).astype(np.float32),
        mask=rng.uniform(size=(B, frames)) < 0.4,
        video=rng.normal(size=(B, steps, V)).astype(np.float32),
        seen=seen & (np.arange(steps) < lengths[:, None]),
        target=rng.uniform(size=(B, frames, K)).astype(np.float32),
        valid=np.arange(frames) < FRAMES[:, None],
        num_frames=FRAMES,
        positions=np.pad(POSITIONS, ((0, 0), (0, frames - F)), mode="edge"),
        num_video_frames=VIDEO,
        id_hash=np.uint32([11, 22, 33]),
    )


def inputs_of(name, seed=0, **more):
    return random_features(seed, sizes_of(name).video_rate, **more)


@functools.cache
def parameters(name):
    module = system_of(name).build(sizes_of(name))
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), inputs_of(name)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), tree)


@functools.cache
def applied(name):
    """jitted (parameters, features) -> Output."""
    module = system_of(name).build(sizes_of(name))
    return jax.jit(lambda params, given: module.apply({"params": params}, given))


def network(name):
    return functools.partial(applied(name), parameters(name))


def main_output(output):
    """The level, or the logits of a recognizer."""
    return np.asarray(output.logits if output.level is None else output.level)


def differs(one, two):
    return bool((np.asarray(one) != np.asarray(two)).any())


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


# ---- inputs and outputs --------------------------------------------------------------------------------------------------------


@each
def test_outputs_have_the_expected_shapes(name):
    output, system, count = network(name)(inputs_of(name)), system_of(name), sizes_of(name).stack
    assert (output.level is None) == (not system.restores) and (output.logits is None) == (not system.has_ctc_head)
    if system.restores:
        assert output.level.shape == (B, F, K)
    if system.has_ctc_head:
        assert output.logits.shape == (B, int(np.ceil(F / count)), LABELS)
        np.testing.assert_array_equal(output.num_steps, np.ceil(FRAMES / count))
    else:
        assert output.num_steps is None


@each
def test_outputs_depend_on_the_inputs_that_the_registry_lists(name):
    given, other = inputs_of(name), inputs_of(name, 1)
    before, system = network(name)(given), system_of(name)
    other_video = network(name)(given._replace(video=other.video))
    assert differs(main_output(other_video), main_output(before)) == system.uses_video
    other_audio = network(name)(given._replace(spectrogram=other.spectrogram))
    assert differs(main_output(other_audio), main_output(before)) == (NETWORKS[name][0] not in WITHOUT_AUDIO)
    if system.has_ctc_head:
        assert differs(other_video.logits, before.logits) == system.uses_video
        assert differs(other_audio.logits, before.logits) == (NETWORKS[name][0] not in CTC_OF_VIDEO_ALONE)


@each
def test_outputs_do_not_depend_on_the_target_and_on_the_mask_only_with_mask_input(name):
    given, other = inputs_of(name), inputs_of(name, 2)
    before = network(name)(given)
    assert_same(network(name)(given._replace(target=other.target)), before)
    other_mask = network(name)(given._replace(mask=other.mask))
    assert differs(main_output(other_mask), main_output(before)) == sizes_of(name).mask_input
    if not sizes_of(name).mask_input:
        assert_same(other_mask, before)
    other_visibility = network(name)(given._replace(seen=~given.seen))
    assert differs(main_output(other_visibility), main_output(before)) == system_of(name).handles_missing_streams


@each
def test_padding_and_other_clips_do_not_change_the_output_of_a_clip(name):
    given, other = inputs_of(name), inputs_of(name, 3)
    at_video_rate = sizes_of(name).video_rate == "video"
    inside = given.valid.copy()
    frames = np.arange(given.seen.shape[1]) < (VIDEO if at_video_rate else FRAMES)[:, None]
    inside[1] = frames[1] = False  # replace the padding of every clip, and clip 1 completely
    pick = lambda kept, field: np.where(kept, getattr(given, field), getattr(other, field))
    changed = given._replace(
        spectrogram=pick(inside[..., None], "spectrogram"), mask=pick(inside, "mask"), video=pick(frames[..., None], "video"),
        seen=np.where(frames, given.seen, True), target=other.target,
    )  # fmt: skip
    before, after = network(name)(given), network(name)(changed)
    for field, lengths in (("level", FRAMES), ("logits", before.num_steps)):
        one, two = getattr(before, field), getattr(after, field)
        if one is not None:
            for b in (0, 2):
                np.testing.assert_allclose(one[b, : lengths[b]], two[b, : lengths[b]], atol=1e-6)
    assert differs(main_output(before)[1], main_output(after)[1])


@pytest.mark.parametrize("name", ["av_unified mask, 2", "av_unified video layer, 2", "asr, 4"])
def test_a_longer_batch_does_not_change_the_output(name):
    """Five more frames of padding; the last time step of the clip of 13 frames is incomplete in both batches."""
    given = inputs_of(name)
    pad = lambda a: np.pad(a, ((0, 0), (0, 5), *[(0, 0)] * (a.ndim - 2)), constant_values=1)
    fields = ("spectrogram", "mask", "video", "target", "positions")
    longer = given._replace(**{f: pad(getattr(given, f)) for f in fields})
    longer = longer._replace(valid=np.arange(F + 5) < FRAMES[:, None], seen=pad(given.seen))
    before, after = network(name)(given), network(name)(longer)
    np.testing.assert_array_equal(before.num_steps, after.num_steps)
    for b in range(B):
        steps = before.num_steps[b]
        np.testing.assert_allclose(before.logits[b, :steps], after.logits[b, :steps], atol=1e-6)
        if before.level is not None:
            np.testing.assert_allclose(before.level[b, : FRAMES[b]], after.level[b, : FRAMES[b]], atol=1e-6)


def test_the_output_layer_is_linear_or_ends_in_a_relu():
    """The paper's code has a ReLU, in the audio-visual networks only (CNN_RNN.py)."""
    given = random_features()
    linear = np.asarray(network("av_mtl_s2s")(given).level)
    assert (linear < 0).any()
    relu = systems.get("av_mtl_s2s").build(dataclasses.replace(SIZES, output="relu"))
    result = jax.jit(relu.apply)({"params": parameters("av_mtl_s2s")}, given)
    np.testing.assert_allclose(result.level, np.maximum(linear, 0), atol=1e-6)


def test_composite_takes_the_prediction_only_in_the_gap():
    given = random_features()
    out = np.random.default_rng(5).uniform(size=(B, F, K)).astype(np.float32)
    combined = np.asarray(systems.composite(jnp.asarray(out), given))
    np.testing.assert_array_equal(combined[given.mask], out[given.mask])
    np.testing.assert_array_equal(combined[~given.mask], given.spectrogram[~given.mask])


def test_an_unknown_system_names_the_known_ones():
    with pytest.raises(ValueError, match="'av_s3s'.*a_si, a_mtl_si"):
        systems.get("av_s3s")


# ---- the encoder-decoder -------------------------------------------------------------------------------------------------------


def test_at_video_rate_the_encoder_output_is_interpolated_for_ctc_head_and_decoder():
    """Against np.interp of the encoder output and NumPy layers after it."""
    name = "av_mtl_s2s at video rate"
    given, params = inputs_of(name), parameters(name)
    output = network(name)(given)
    layers = jax.jit(systems.Stack(1, 4, "joined").apply)
    encoded = layers({"params": params["encoder"]}, given.video, VIDEO)
    weights = lambda part: (params[part]["kernel"], params[part]["bias"])
    dense = lambda x, part: np.asarray(x, np.float64) @ weights(part)[0] + weights(part)[1]
    bottleneck = np.maximum(dense(encoded, "bottleneck"), 0)
    interpolated = lambda a: np.stack(
        [np.stack([np.interp(POSITIONS[b], np.arange(T), a[b, :, v]) for v in range(a.shape[-1])], -1) for b in range(B)]
    )
    np.testing.assert_allclose(output.logits, dense(interpolated(bottleneck), "ctc"), atol=1e-5)
    x = np.float32(np.concatenate([given.spectrogram, interpolated(bottleneck), interpolated(given.video)], -1))
    decoded = layers({"params": params["decoder"]}, x, FRAMES)
    np.testing.assert_allclose(output.level, dense(decoded, "output"), atol=1e-5)


@pytest.mark.parametrize(("name", "skips"), [("av_mtl_s2s", False), ("av_mtl_s2s mask, linear, skip", True)])
def test_skip_bypasses_the_encoder(name, skips):
    """With a bottleneck of zeros, only skip lets video affect the output."""
    params = parameters(name) | {"bottleneck": jax.tree.map(np.zeros_like, parameters(name)["bottleneck"])}
    one, two = (applied(name)(params, random_features()._replace(video=random_features(seed).video)) for seed in (0, 1))
    assert differs(one.level, two.level) == skips
    assert not differs(one.logits, two.logits)


@pytest.mark.parametrize(("relu", "lowest"), [(True, 0.0), (False, -0.01)])
def test_the_bottleneck_ends_in_a_relu_or_not(relu, lowest):
    sizes = dataclasses.replace(SIZES, bottleneck_relu=relu, labels=SIZES.bottleneck)
    module, params = systems.get("av_mtl_s2s").build(sizes), dict(parameters("av_mtl_s2s"))
    params["ctc"] = {
        "kernel": np.eye(5, dtype=np.float32),
        "bias": np.zeros(5, np.float32),
    }  # identity: shows the input of the head
    values = np.asarray(jax.jit(module.apply)({"params": params}, random_features()).logits)
    assert (values.min() < lowest) == (not relu) and values.max() > 0


def test_without_a_bottleneck_the_ctc_head_follows_the_layers_directly():
    for system in ("a_mtl_si", "av_mtl_si", "av_mtl_s2s"):
        module = systems.get(system).build(dataclasses.replace(SIZES, bottleneck=0))
        tree = jax.eval_shape(lambda module=module: module.init(jax.random.key(0), random_features()))["params"]
        assert "bottleneck" not in tree and tree["ctc"]["kernel"].shape == (2 * SIZES.units, LABELS), system


# ---- av_unified ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["av_unified mask, 2", "av_unified feedback, 3", "av_unified video layer, 2"])
def test_video_without_a_visible_face_is_ignored(name):
    """Neither other values nor NaN in that clip change the output; other clips still use their video."""
    given = inputs_of(name)
    seen = given.seen.copy()
    seen[1] = False
    hidden = np.where(seen[..., None], given.video, np.float32(np.nan))
    before, after = (network(name)(given._replace(seen=seen, video=v)) for v in (given.video, hidden))
    assert_same(after, before)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    others = network(name)(given._replace(seen=seen, video=random_features(1).video))
    assert differs(others.level[0], before.level[0]) and not differs(others.level[1], before.level[1])


@pytest.mark.parametrize("name", ["av_unified mask, 2", "av_unified feedback, 3"])
def test_without_audio_the_output_depends_on_the_video(name):
    """Everything masked: the same silence for every clip."""
    silent = inputs_of(name)._replace(spectrogram=np.zeros((B, F, K), np.float32), mask=np.ones((B, F), bool))
    output = network(name)(silent)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(output))
    assert differs(output.level, network(name)(silent._replace(video=random_features(1).video)).level)


def test_video_is_averaged_over_a_time_step_and_audio_is_not():
    """Swapping the two frames of every time step changes the output only for audio."""
    given = random_features()._replace(seen=np.ones((B, F), bool), valid=np.ones((B, F), bool), num_frames=np.full(B, F, np.int32))
    swapped = np.r_[np.arange(12).reshape(6, 2)[:, ::-1].ravel(), 12]
    before = network("av_unified mask, 2")(given)
    video = network("av_unified mask, 2")(given._replace(video=given.video[:, swapped]))
    np.testing.assert_allclose(video.level, before.level, atol=1e-6)
    audio = network("av_unified mask, 2")(given._replace(spectrogram=given.spectrogram[:, swapped]))
    assert np.abs(np.asarray(audio.level) - before.level).max() > 1e-2


@pytest.mark.parametrize(("name", "has_feedback"), [("av_unified mask, 2", False), ("av_unified feedback, 3", True)])
def test_the_level_depends_on_the_ctc_head_only_with_feedback(name, has_feedback):
    params, given = parameters(name), random_features()
    other = params | {"ctc": jax.tree.map(lambda p: -p, params["ctc"])}
    before, after = (applied(name)(p, given) for p in (params, other))
    assert differs(before.logits, after.logits) and differs(before.level, after.level) == has_feedback


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("frames", [1, 12, 13])
def test_unstack_frames_is_the_inverse_of_stack_frames(count, frames):
    x = np.random.default_rng(0).normal(size=(2, frames, 3)).astype(np.float32)
    stacked = np.asarray(systems.stack_frames(jnp.asarray(x), count))
    assert stacked.shape == (2, -(-frames // count), 3 * count)
    for step in range(stacked.shape[1]):  # frame by frame, zeros after the last
        parts = [x[:, f] if f < frames else np.zeros((2, 3)) for f in range(step * count, (step + 1) * count)]
        np.testing.assert_array_equal(stacked[:, step], np.concatenate(parts, -1))
    np.testing.assert_array_equal(systems.unstack_frames(stacked, frames, count), x)


@pytest.mark.parametrize(("name", "plain"), [("av_mtl_s2s bfloat16", "av_mtl_s2s"), ("av_unified bfloat16, 2", "av_unified, 2")])
def test_bfloat16_changes_the_output_a_little(name, plain):
    result, expected = (main_output(network(n)(inputs_of(n))) for n in (name, plain))
    assert result.dtype == np.float32 and 0 < np.abs(result - expected).max() < 0.03 * np.abs(expected).max()


# ---- dropout -------------------------------------------------------------------------------------------------------------------


def test_dropout_masks_the_same_values_in_every_time_step():
    """Gal & Ghahramani 2016: one mask per clip, the same at all times; kept values are scaled up."""
    stack, x = systems.Stack(1, 4, "joined", dropout=0.25), np.random.default_rng(0).normal(size=(8, 6, K)).astype(np.float32)
    params, lengths = {"params": parameters("a_si")["decoder"]}, np.full(8, 6, np.int32)
    clips = np.arange(8, dtype=np.uint32)
    run = jax.jit(jax.vmap(lambda key: stack.apply(params, x, lengths, clips, rngs={"dropout": key})))
    off = np.asarray(jax.jit(systems.Stack(1, 4, "joined").apply)(params, x, lengths))
    on = np.asarray(run(jax.random.split(jax.random.key(0), 200)))  # draws, clips, time steps, values
    zero = on == 0
    np.testing.assert_allclose(on, np.where(zero, 0, off / 0.75), atol=1e-6)
    np.testing.assert_array_equal(zero, np.broadcast_to(zero[:, :, :1], zero.shape))
    masks = zero[:, :, 0]
    assert masks.mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / masks.size))
    assert len({m.tobytes() for m in masks}) == 200 and differs(masks[:, 0], masks[:, 1])
    one = lambda order: stack.apply(params, x, lengths, clips[order], rngs={"dropout": jax.random.key(3)}) == 0
    np.testing.assert_array_equal(one(slice(None, None, -1)), one(slice(None))[::-1])  # depends on the clip, not on its position


@pytest.mark.parametrize("system", ["av_mtl_si", "av_mtl_s2s", "av_unified", "asr"])
def test_dropout_is_applied_in_training_only(system):
    """One system of each network class."""
    module = systems.get(system).build(dataclasses.replace(SIZES, dropout=0.5))
    params, given = {"params": parameters(system)}, random_features()
    draw = lambda key: (module.apply(params, given, True, rngs={"dropout": key}), module.apply(params, given))
    both = jax.jit(draw)
    (one, off), (again, _), (other, _) = (both(jax.random.key(i)) for i in (1, 1, 2))
    assert_same(one, again)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), off, network(system)(given))
    assert differs(main_output(one), main_output(other)) and np.abs(main_output(one) - main_output(off)).max() > 1e-2


# ---- initial values ----------------------------------------------------------------------------------------------------------


def test_dense_layers_of_init_keras_are_glorot_uniform_and_the_encoder_is_orthogonal():
    """The paper's code: Dense layers as Keras has them, except the CTC head (He normal), encoder kernels orthogonal."""
    sizes = systems.Sizes(bands=64, units=8, init="keras", output="relu")
    example = build.example_features(configs.load("av_mtl_s2s"))
    params = jax.jit(systems.get("av_mtl_s2s").build(sizes).init)(jax.random.key(0), example)["params"]
    for name, fan_in in (("output", 16), ("bottleneck", 16)):
        kernel = np.asarray(params[name]["kernel"])
        limit = np.sqrt(6 / (fan_in + kernel.shape[1]))
        assert kernel.shape[0] == fan_in and 0.95 * limit < np.abs(kernel).max() <= limit
    assert np.asarray(params["ctc"]["kernel"]).std() == pytest.approx(np.sqrt(2 / 136), rel=0.1)
    joined = lambda part: np.concatenate([params[part]["blstm_2"]["forward"][f"i{g}"]["kernel"] for g in "ifgo"], 1)
    np.testing.assert_allclose(joined("encoder") @ joined("encoder").T, np.eye(16), atol=1e-5)
    assert np.abs(joined("decoder")).max() <= np.sqrt(6 / (16 + 32))
