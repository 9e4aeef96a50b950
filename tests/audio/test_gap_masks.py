"""The gap protocol: gap statistics, hashed gap positions, affected frames; and no leak of the masked samples into the inputs."""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from avsi_jax import presets
from avsi_jax.audio import gap_masks, stft
from avsi_jax.data import features
from avsi_jax.evaluation import conditions
from avsi_jax.models import systems

pytestmark = pytest.mark.usefixtures("quickly_compiled")

PAPER, WIDE, MORRONE = PRESETS = [presets.get(name) for name in ("paper", "wide", "morrone")]
by_name = pytest.mark.parametrize("preset", PRESETS, ids=lambda s: s.name)

LENGTH = 47_648  # record samples of a Grid MPEG
MS = 16  # record samples
PAPERS = {"max_count": 8, "total": "normal", "total_mean_ms": 900.0, "total_std_ms": 300.0, "min_ms": 60.0}
draw_papers = jax.jit(lambda key, id_hash, lengths: gap_masks.draw_batch(key, id_hash, lengths, **PAPERS))


def hashes(n):
    return np.arange(1, n + 1, dtype=np.uint32) * np.uint32(2_654_435_761)


# ---- draw ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    """(20000, 8, 2): gaps of 20,000 clips in one training step with the paper's settings."""
    return np.asarray(draw_papers(jax.random.key(0), hashes(20_000), np.full(20_000, LENGTH, np.int32)))


def test_gaps_lie_in_the_clip_and_never_overlap(drawn):
    start, end = drawn[..., 0], drawn[..., 1]
    used = end > start
    assert drawn.dtype == np.int32 and start.min() >= 0 and end.max() <= LENGTH
    assert (drawn[~used] == 0).all()  # unused rows are empty
    assert (used[:, :-1] >= used[:, 1:]).all()  # and come last
    assert (end[:, :-1] <= start[:, 1:])[used[:, 1:]].all()


def test_gap_counts_are_the_papers(drawn):
    """U{1..8}: all shares are within four standard deviations of 1/8 for 20,000 draws."""
    counts = np.bincount((drawn[..., 1] > drawn[..., 0]).sum(1), minlength=9)
    assert counts[0] == 0 and len(counts) == 9
    assert np.abs(counts[1:] - 2_500).max() < 4 * np.sqrt(20_000 * 1 / 8 * 7 / 8)


def test_the_placement_of_the_papers_code_gives_its_statistics():
    """40,000 draws of the paper's code: real total 799 +- 287 ms, since the last gap overlaps another one or runs over the end;
    3.9 gaps that are left; percentiles 5/25/50/75/95 of a gap 60/80/120/260/620 ms; median of the longest gap 360 ms.
    """
    draw = jax.jit(functools.partial(gap_masks.draw_batch, **PAPERS, placement="paper"))
    gaps = np.asarray(draw(jax.random.key(1), hashes(20_000), np.full(20_000, LENGTH, np.int32)))
    assert gaps.min() >= 0 and gaps.max() <= LENGTH
    whole = gaps[gaps != LENGTH]
    assert (whole % gap_masks.PAPER_FRAME == 0).all(), "whole frames of 20 ms"
    frames = np.arange(149) * gap_masks.PAPER_FRAME
    masked = ((frames >= gaps[..., :1]) & (frames < gaps[..., 1:])).any(1)
    total = 20 * masked.sum(1)
    assert total.mean() == pytest.approx(799, rel=0.03) and total.std() == pytest.approx(287, rel=0.05)
    edges = np.diff(np.pad(masked, ((0, 0), (1, 1))).astype(int), axis=1)
    lengths, owners = [], []
    for i, row in enumerate(edges):
        begins, ends = np.flatnonzero(row == 1), np.flatnonzero(row == -1)
        lengths += list(20 * (ends - begins))
        owners += [i] * len(begins)
    lengths = np.array(lengths)
    assert len(lengths) / len(gaps) == pytest.approx(3.9, rel=0.03)
    np.testing.assert_allclose(np.percentile(lengths, [5, 25, 50, 75, 95]), [60, 80, 120, 260, 620], atol=20)
    longest = np.zeros(len(gaps))
    np.maximum.at(longest, owners, lengths)
    assert np.median(longest) == pytest.approx(360, abs=20)


def test_unknown_placements_are_an_error():
    with pytest.raises(ValueError, match="gaps.placement: found 'dense', expected 'apart' or 'paper'"):
        gap_masks.draw_gaps(jax.random.key(0), 48_000, **PAPERS, placement="dense")


def test_gap_lengths_are_the_papers(drawn):
    """40,000 draws of the paper's code: nominal total 906 +- 294 ms; percentiles 5/25/50/75/95 of a gap 60/80/120/260/620 ms,
    median of the longest gap 360 ms (in full frames of 20 ms, and the last gap may overflow)."""
    length_ms = (drawn[..., 1] - drawn[..., 0]) / MS
    used, total = length_ms > 0, length_ms.sum(1)
    assert total.mean() == pytest.approx(906, abs=8) and total.std() == pytest.approx(294, abs=6)
    assert length_ms[used].min() >= 60 and total.max() <= 0.8 * LENGTH / MS
    np.testing.assert_allclose(np.percentile(length_ms[used], [5, 25, 50, 75, 95]), [60, 80, 120, 260, 620], atol=30, rtol=0.05)
    assert np.median(length_ms.max(1)) == pytest.approx(360, abs=20)


def test_gaps_cover_the_clip_evenly(drawn):
    """Positions are uniform under the condition that gaps stay inside: symmetric in time and even in the middle half."""
    position = np.arange(LENGTH // 20, LENGTH, LENGTH // 10)
    missing = ((position >= drawn[..., :1]) & (position < drawn[..., 1:])).any(1).mean(0)
    np.testing.assert_allclose(missing, missing[::-1], atol=4 * np.sqrt(2 * 0.35 * 0.65 / 20_000))
    np.testing.assert_allclose(missing[3:7], missing[3:7].mean(), atol=0.02)


def test_a_fifth_of_short_clips_remains():
    lengths = np.int32([160, 1_600, 8_000, 16_000, 0] * 4_000)
    g = np.asarray(draw_papers(jax.random.key(1), hashes(20_000), lengths))
    total = (g[..., 1] - g[..., 0]).sum(1)
    assert (total <= 0.8 * lengths).all() and (g[..., 1].max(1) <= lengths).all() and (total > 0)[lengths > 0].all()
    assert (g[:, :-1, 1] <= g[:, 1:, 0])[(g[..., 1] > g[..., 0])[:, 1:]].all()
    assert (total[1::5] > 0.7 * 1_600).mean() > 0.99  # 100 ms: the requested 900 do not fit, four fifths are masked


def test_totals_can_be_uniform():
    wanted = {"max_count": 2, "total": "uniform", "total_min_ms": 200.0, "total_max_ms": 1_500.0, "min_ms": 40.0}
    draw = jax.jit(lambda id_hash, lengths: gap_masks.draw_batch(jax.random.key(2), id_hash, lengths, **wanted))
    g = np.asarray(draw(hashes(4_000), np.full(4_000, LENGTH, np.int32)))
    total = (g[..., 1] - g[..., 0]).sum(1) / MS
    assert g.shape == (4_000, 2, 2) and total.min() >= 199 and total.max() <= 1_500
    np.testing.assert_allclose(np.percentile(total, [25, 50, 75]), [525, 850, 1_175], atol=40)


def test_an_unknown_total_is_rejected():
    with pytest.raises(ValueError, match="'gauss'.*'normal' or 'uniform'"):
        gap_masks.draw_gaps(jax.random.key(0), 100, **(PAPERS | {"total": "gauss"}))


def test_gaps_depend_only_on_key_and_id(drawn):
    """They are the same for any order, batch size and lengths of other clips, and differ for another key."""
    key, ids, full = jax.random.key(0), hashes(20_000), np.full(20_000, LENGTH, np.int32)
    np.testing.assert_array_equal(draw_papers(key, ids[::-1], full), drawn[::-1])
    np.testing.assert_array_equal(draw_papers(key, ids[5:6], full[:1]), drawn[5:6])
    mixed = np.where(np.arange(20_000) % 2, LENGTH, 30_000).astype(np.int32)
    np.testing.assert_array_equal(np.asarray(draw_papers(key, ids, mixed))[1::2], drawn[1::2])
    other = np.asarray(draw_papers(jax.random.fold_in(key, 1), ids, full))
    assert (other != drawn).any((1, 2)).all()
    assert len({g.tobytes() for g in drawn}) == len(drawn)  # all clips differ


# ---- place ---------------------------------------------------------------------------------------------------------------------


def hashed(clip_id, gap_ms):
    """[0, 1) from the first 53 bits of sha256("id:ms"), computed from the hexadecimal digits."""
    return (int(hashlib.sha256(f"{clip_id}:{gap_ms}".encode()).hexdigest()[:16], 16) >> 11) / 2**53


@pytest.mark.parametrize("gap_ms", conditions.PAPER_MS)
@pytest.mark.parametrize("clip_id", ["bbaf2n", "swwp2s", "pwbj8s"])
def test_a_position_is_hashed_from_id_and_length(clip_id, gap_ms):
    speech = (0.4, 2.2)
    start, end = gap_masks.place_in_speech(clip_id, gap_ms, speech, LENGTH)
    assert end - start == gap_ms * MS
    assert start == round(6_400 + hashed(clip_id, gap_ms) * (28_800 - gap_ms * MS))
    assert start >= 6_400 and end <= 35_200
    assert isinstance(start, int) and isinstance(end, int)


def test_positions_never_change():
    """Golden values: evaluations stay comparable over time. By hand for the first: `printf bbaf2n:300 | sha256sum` begins with
    2f96273a91a73bba, which is 0.18589 of 2^64; the start is 6400 + 0.18589 x (28800 - 4800) = 10861."""
    places = [gap_masks.place_in_speech("bbaf2n", ms, (0.4, 2.2), LENGTH) for ms in (300, 600, 900, 1_200, 1_500)]
    assert places == [(10_861, 15_661), (8_871, 18_471), (12_175, 26_575), (15_075, 34_275), (9_478, 33_478)]


def test_positions_spread_over_the_words():
    ids = [f"clip{i}" for i in range(2_000)]
    starts = np.array([gap_masks.place_in_speech(i, 500, (0.5, 2.5), LENGTH)[0] for i in ids])
    assert starts.min() >= 8_000 and starts.max() <= 32_000
    np.testing.assert_allclose(np.percentile(starts, [10, 50, 90]), [10_400, 20_000, 29_600], atol=900)


@pytest.mark.parametrize(
    ("gap_ms", "speech", "place"),
    [
        (1_500, (1.0, 2.0), (12_000, 36_000)),  # longer than the words: centred on them
        (1_500, (0.1, 0.5), (0, 24_000)),  # and kept inside the clip
        (1_500, (2.6, 2.9), (LENGTH - 24_000, LENGTH)),
        (3_000, (1.0, 2.0), (0, LENGTH)),  # longer than the clip: all of it
        (1_000, (1.0, 2.0), (16_000, 32_000)),  # exactly as long as the words
    ],
)
def test_positions_of_long_gaps(gap_ms, speech, place):
    assert gap_masks.place_in_speech("bbaf2n", gap_ms, speech, LENGTH) == place


# ---- masks and affected frames ------------------------------------------------------------------------------------------------

GAPS = [
    [[20_000, 20_001], [0, 0]],  # one sample
    [[0, 1], [LENGTH - 1, LENGTH]],  # both ends
    [[0, 4_000], [0, 0]],
    [[40_000, LENGTH], [0, 0]],
    [[5_003, 9_999], [10_200, 30_000]],
    [[12_345, 12_345], [0, 0]],  # empty
    [[160 * 100, 160 * 101], [192 * 50, 192 * 51]],  # on the edges of hops
]


def expected_mask(gaps, n):
    missing = np.zeros((len(gaps), n), bool)
    for row, pairs in zip(missing, gaps):
        for start, end in pairs:
            row[start:end] = True
    return missing


def test_masked_audio_is_zero_in_the_gaps_and_unchanged_elsewhere():
    expected = expected_mask(GAPS, LENGTH)
    missing = np.asarray(gap_masks.gap_samples(jnp.asarray(GAPS), LENGTH))
    np.testing.assert_array_equal(missing, expected)
    np.testing.assert_array_equal(gap_masks.gap_samples(jnp.asarray(GAPS[4]), LENGTH), expected[4])  # one clip, no batch
    x = np.where(missing, np.nan, 1.5).astype(np.float32)
    np.testing.assert_array_equal(gap_masks.mask_audio(jnp.asarray(x), missing), np.where(missing, 0, 1.5))


def expected_frames(missing, s):
    """bool (B, F) with NumPy: frames that are not 0 for a signal that is non-zero only in the missing samples."""
    x = np.where(missing, np.random.default_rng(0).uniform(1, 2, missing.shape), 0.0)
    factor = 16_000 // s.rate
    if factor > 1:
        taps = stft.decimation_filter(factor).astype(np.float64)
        x = np.stack([np.convolve(row, taps)[len(taps) // 2 :][: missing.shape[1] : factor] for row in x])
    if s.pre_emphasis:
        x = x - s.pre_emphasis * np.pad(x, ((0, 0), (1, 0)))[:, :-1]
    left = s.window // 2 if s.centred else 0
    padded = np.pad(x, ((0, 0), (left, s.window)))
    window = signal.get_window("hann", s.window)
    frames = [padded[:, f * s.hop : f * s.hop + s.window] * window for f in range(s.frames_of(x.shape[1]))]
    return np.stack([(f != 0).any(-1) for f in frames], -1)


@by_name
def test_marked_frames_are_exactly_those_that_depend_on_a_missing_sample(preset):
    missing = expected_mask(GAPS, preset.record_samples)
    affected = np.asarray(gap_masks.affected_frames(jnp.asarray(missing), preset))
    np.testing.assert_array_equal(affected, expected_frames(missing, preset))
    assert not affected[5].any() and affected[0].sum() in (2, 3)


@by_name
def test_frames_are_marked_correctly_for_every_position_within_a_hop(preset):
    """One missing sample at every position relative to the hops: no frame too many and none too few."""
    places = np.arange(2_000, 2_000 + preset.hop * preset.decimation)
    missing = np.arange(4_000) == places[:, None]
    np.testing.assert_array_equal(gap_masks.affected_frames(jnp.asarray(missing), preset), expected_frames(missing, preset))


@by_name
def test_only_marked_frames_depend_on_the_gap(preset):
    """Bands of unmarked frames are identical bit for bit when the audio in the gap changes."""
    missing = expected_mask(GAPS, preset.record_samples)
    rng = np.random.default_rng(3)
    clean, other = rng.uniform(-0.5, 0.5, (2, *missing.shape)).astype(np.float32)
    bands = jax.jit(lambda x: stft.band_magnitude(stft.decimate(x, preset), preset))
    changed = np.asarray(bands(clean) != bands(np.where(missing, other, clean))).any(-1)
    affected = np.asarray(gap_masks.affected_frames(jnp.asarray(missing), preset))
    assert not changed[~affected].any()
    assert changed[affected].mean() > 0.97  # the last tap of a filter or the edge of a window may round to 0


@by_name
def test_centred_frames_have_their_centre_in_the_gap(preset):
    marked = np.asarray(gap_masks.centred_frames(jnp.asarray(GAPS), preset, preset.num_frames))
    first = 0 if preset.centred else preset.window / 2
    for row, pairs in zip(marked, GAPS):
        centre_s = (np.arange(preset.num_frames) * preset.hop + first) / preset.rate
        np.testing.assert_array_equal(row, np.any([(centre_s >= a / 16_000) & (centre_s < b / 16_000) for a, b in pairs], 0))
    missing = expected_mask(GAPS, preset.record_samples)
    affected = np.asarray(gap_masks.affected_frames(jnp.asarray(missing), preset))
    inside = np.asarray(marked)
    if preset.centred:  # a centre beyond the audio belongs to no sample
        inside = inside & (np.arange(preset.num_frames) * preset.hop < preset.num_samples)
    assert not (inside & ~affected).any()


# ---- no leak of masked samples -------------------------------------------------------------------------------------------------

GAP = [[[9_000, 17_000], [30_000, 31_000]], [[0, 3_000], [40_000, 44_000]]]


def raw_batch(seed=0):
    """Two clips as from `input_pipeline`, but with float audio, so that it can be differentiated and can be NaN."""
    rng = np.random.default_rng(seed)
    return {
        "audio": np.float32(rng.normal(0, 3_000, (2, 48_000))),
        "audio_length": np.int32([47_648, 44_000]),
        "landmarks": np.float32(100 + rng.normal(0, 1, (2, 75, 68, 2)).cumsum(1)),
        "landmarks_valid": np.arange(75) < np.int32([[75], [70]]),
        "num_frames": np.int32([75, 70]),
        "frame_size": np.int32([[360, 288]] * 2),
        "fps": np.float32([25, 25]),
        "offset_s": np.float32([0.011, 0]),
        "id_hash": np.uint32([11, 22]),
    }


def masked_samples(batch):
    """bool (B, N): in a gap and inside the clip."""
    return expected_mask(GAP, 48_000) & (np.arange(48_000) < batch["audio_length"][:, None])


@functools.partial(jax.jit, static_argnums=1)
def make_features(batch, config):
    return features.make_features(batch, jnp.asarray(GAP), config)


@pytest.mark.parametrize("content", ["noise", "nan", "inf"])
@by_name
def test_masked_samples_do_not_affect_the_inputs(preset, content):
    config, batch = features.FeatureConfig(preset), raw_batch()
    new = {"noise": np.float32(np.random.default_rng(9).normal(0, 9_000, (2, 48_000))), "nan": np.nan, "inf": np.inf}[content]
    changed = batch | {"audio": np.where(masked_samples(batch), new, batch["audio"]).astype(np.float32)}
    one, two = make_features(batch, config), make_features(changed, config)
    for name in set(features.Features._fields) - {"target"}:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
        assert np.isfinite(getattr(two, name)).all()
    assert (np.asarray(one.target) != np.asarray(two.target)).any()  # only the target changes


@pytest.mark.parametrize("system", ["a_si", "av_mtl_si", "av_mtl_s2s", "av_unified"])
def test_the_gradient_with_respect_to_masked_samples_is_zero(system):
    config = features.FeatureConfig(PAPER)
    sizes = systems.Sizes(bands=PAPER.bands, layers=1, units=8, bottleneck=8, mask_input=True, skip=True, video_layers=1)
    of = systems.get(system)
    model = of.build(dataclasses.replace(sizes, lstm="joined", stack=2 if "stack" in of.options else 1))
    batch, rng = raw_batch(), np.random.default_rng(0)
    make = lambda audio: features.make_features(batch | {"audio": audio}, jnp.asarray(GAP), config)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), make(batch["audio"])))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), tree)

    @jax.jit
    @jax.grad
    def gradient_of(audio):
        inputs = make(audio)
        output = model.apply(params, inputs)
        other = 0.0 if output.logits is None else (output.logits**2).sum()
        return (output.level**2).sum() + (systems.composite(output.level, inputs) ** 2).sum() + other

    gradient = np.asarray(gradient_of(batch["audio"]))
    masked = masked_samples(batch)
    assert np.isfinite(gradient).all()
    assert not gradient[masked].any()
    visible = ~masked & (np.arange(48_000) < np.minimum(batch["audio_length"], LENGTH)[:, None])
    assert (gradient[visible] != 0).mean() > 0.9
    with_nan = np.where(masked, np.nan, batch["audio"]).astype(np.float32)
    np.testing.assert_array_equal(gradient_of(with_nan), gradient)


def test_the_paper_protocol_silences_full_frames_of_the_clean_spectrogram():
    """As published: the mask contains the frames centred in a gap, and the frames beside it still depend on the masked samples."""
    config, batch = features.FeatureConfig(PAPER, "paper"), raw_batch()
    ours, theirs = make_features(batch, features.FeatureConfig(PAPER)), make_features(batch, config)
    mask = np.asarray(theirs.mask)
    np.testing.assert_array_equal(theirs.spectrogram, np.where(mask[..., None], 0, theirs.target))
    np.testing.assert_array_equal(mask, gap_masks.centred_frames(jnp.asarray(GAP), PAPER, 149) & theirs.valid)
    assert mask.sum() < np.asarray(ours.mask).sum() and not (mask & ~np.asarray(ours.mask)).any()
    other = make_features(batch | {"audio": np.where(masked_samples(batch), 5_000, batch["audio"]).astype(np.float32)}, config)
    changed = np.asarray(other.spectrogram != theirs.spectrogram).any(-1)
    assert changed.any() and not changed[mask].any()
