"""Number of parameters of every config, counted by hand and as published; names of parameters, as in older checkpoints."""

import re

import jax
import pytest

from avsi_jax import configs
from avsi_jax.models import build, systems


def dense(inputs, outputs):
    return (inputs + 1) * outputs


def stack(inputs, units=256, layers=3):
    """Bidirectional LSTM layers: four gates, each with inputs, previous outputs and one bias."""
    blstm = lambda n: 2 * 4 * units * (n + units + 1)
    return blstm(inputs) + (layers - 1) * blstm(2 * units) if layers else 0


def unified(c):
    """av_unified with the fields of its config; visual features: positions and speeds of 68 landmarks, and their visibility."""
    video, u, bands = 4 * 68 + 1, c.units, {"wide": 80, "paper": 64}[c.preset]
    joined = c.stack * (bands + c.mask_input) + video + 2 * u * (c.video_layers > 0)
    layers = stack(video, u, c.video_layers) + stack(joined, u, c.feedback) + dense(33, 2 * u) * (c.feedback > 0)
    layers += stack(2 * u if c.feedback else joined, u, c.layers - c.feedback)
    return layers + dense(2 * u, c.stack * bands) + dense(2 * u, 33)


def convolutions(c):
    """asr with the fields of its config: kernels of five time steps, and two normalisation parameters per unit."""
    inputs = [c.stack * 80] + [c.units] * (c.layers - 1)
    return sum(dense(5 * n, c.units) + 2 * c.units for n in inputs) + dense(c.units, 33)


A, AV = stack(64) + dense(512, 64), stack(64 + 136) + dense(512, 64)
HIDDEN = dense(512, 136) + dense(136, 42)
BY_HAND = {
    "a_si": A,
    "a_mtl_si": A + HIDDEN,
    "av_si": AV,
    "av_mtl_si": AV + HIDDEN,
    "av_s2s": stack(136) + stack(64 + 512) + dense(512, 64),
    "av_s2s_136": stack(136) + dense(512, 136) + AV,
    "av_mtl_s2s": stack(136) + HIDDEN + AV,
    "av_mtl_s2s_512": stack(136) + dense(512, 42) + stack(64 + 512) + dense(512, 64),
    "av_mtl_s2s_phones": stack(136) + dense(512, 136) + dense(136, 33) + AV,
    "av_mtl_s2s_mouth": stack(40) + HIDDEN + AV,
    "v_s2s": stack(136) + stack(512) + dense(512, 64),
    "morrone_av_mtl": stack(257 + 136, 250) + dense(500, 257) + dense(500, 33),
    "av_unified": unified(configs.load("av_unified")),
    "av_unified_paper": unified(configs.load("av_unified_paper")),
    "asr": convolutions(configs.load("asr")),
}
PUBLISHED = {"a_si": 3_840_064, "av_si": 4_118_592, "av_s2s": 8_843_328, "av_mtl_s2s": 8_148_802}  # the paper's Keras models
PUBLISHED_M = {"av_mtl_si": 4.19, "morrone_av_mtl": 4.44}  # in millions, rounded


@pytest.mark.parametrize("name", BY_HAND)
def test_the_number_of_parameters_is_that_counted_by_hand(name):
    count = build.parameter_count(configs.load(name))
    assert count == BY_HAND[name] == PUBLISHED.get(name, count)
    assert round(count / 1e6, 2) == PUBLISHED_M.get(name, round(count / 1e6, 2))


def test_every_config_is_counted_by_hand():
    assert set(BY_HAND) == set(configs.names()) - {"base", "eval", "tiny", "demo", "debug"}
    assert {configs.load(name).system for name in BY_HAND} == set(systems.SYSTEMS)


def test_the_numbers_in_the_documentation_are_current():
    page = (configs.HOME.parent / "docs" / "systems.md").read_text()
    rows = {cells[1].strip(" `"): cells[-3].strip() for line in page.splitlines() if len(cells := line.split("|")) == 8}
    variants = dict(re.findall(r"`(\w+)` \(([\d,]+)\)", page))
    documented = {name: int(number.replace(",", "")) for name, number in (rows | variants).items() if name in BY_HAND}
    assert documented == BY_HAND


@pytest.mark.parametrize(("system", "millions", "inputs"), [("a_si", 4.15, 257), ("av_si", 4.42, 257 + 136)])
def test_the_smaller_networks_of_morrone_are_made_by_fields(system, millions, inputs):
    """A and AV of Morrone et al. 2021."""
    config = configs.load("morrone_av_mtl", [("system", system)])
    assert build.parameter_count(config) == stack(inputs, 250) + dense(500, 257)
    assert round(build.parameter_count(config) / 1e6, 2) == millions


@pytest.mark.parametrize(("name", "parts"), [("a_si", ""), ("av_mtl_s2s", "encoder bottleneck ctc")])
def test_parameter_names_are_those_of_older_checkpoints(name, parts):
    """The names that the first runs of 2026 saved."""
    tree = jax.eval_shape(lambda: build.init_params(configs.load(name)))
    assert sorted(tree) == sorted(["decoder", "output", *parts.split()])
    assert sorted(tree["decoder"]) == ["blstm_1", "blstm_2", "blstm_3"]
    assert sorted(tree["decoder"]["blstm_1"]) == ["backward", "forward"]
