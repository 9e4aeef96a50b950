"""The evaluation protocols: placement of gaps, masking, restored audio and reference."""

import hashlib

import numpy as np
import pytest

from avsi_jax import presets
from avsi_jax.audio import gap_masks
from avsi_jax.data import input_pipeline
from avsi_jax.evaluation import protocols, run_systems
from avsi_jax.evaluation.conditions import Case
from avsi_jax.inference import restorer

RATE = 16_000


def random_batch(count: int, seed: int = 0) -> dict:
    """The batch fields that placement needs, for `count` clips with words somewhere in three seconds."""
    rng = np.random.default_rng(seed)
    first = rng.uniform(0.1, 0.9, count)
    ids = [f"clip{i}" for i in range(count)]
    return {
        "clip_id": ids,
        "id_hash": np.array([input_pipeline.id_hash(i) for i in ids]),
        "speech": np.stack([first, first + rng.uniform(1.0, 1.9, count)], -1).astype(np.float32),
        "audio_length": rng.integers(44_000, 48_000, count).astype(np.int32),
    }


@pytest.mark.parametrize("ms", [300, 1500, 2500])
def test_a_gap_in_speech_is_that_of_place_in_speech(ms):
    batch = random_batch(20)
    found = protocols.in_speech(batch, Case(ms))
    rows = zip(batch["clip_id"], batch["speech"], batch["audio_length"], strict=True)
    assert found[:, 0].tolist() == [list(gap_masks.place_in_speech(c, ms, tuple(s), int(n))) for c, s, n in rows]


def test_a_gap_of_three_seconds_is_the_whole_clip():
    batch = random_batch(5)
    assert protocols.in_speech(batch, Case(3000))[:, 0].tolist() == [[0, n] for n in batch["audio_length"]]


@pytest.mark.parametrize("ms", [900, 1500, 2500])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_several_gaps_have_the_same_total_length_and_do_not_touch(ms, count):
    batch = random_batch(50)
    found = protocols.in_speech(batch, Case(ms, "gaps", count, count))
    assert found.shape == (50, count, 2) and ((found[..., 1] - found[..., 0]) == ms * 16 // count).all()
    assert ((found[:, 1:, 0] - found[:, :-1, 1]) >= RATE // 50).all(), "at least 20 ms between two gaps"
    assert (found[:, 0, 0] >= 0).all() and (found[:, -1, 1] <= batch["audio_length"]).all()
    first, last = np.minimum(np.rint(batch["speech"] * RATE).astype(int), batch["audio_length"][:, None]).T
    fits = last - first >= ms * 16 + (count - 1) * RATE // 50
    assert (found[fits, 0, 0] >= first[fits]).all() and (found[fits, -1, 1] <= last[fits]).all()
    places = (found[fits, 0, 0] - first[fits])[(last - first - ms * 16)[fits] > RATE // 2]
    assert not len(places) or len(set(places.tolist())) == len(places), "places differ from clip to clip"


# Worked out from the published rule, step by step: sha256 of "42:500:bbaf2n" begins with 2c d7 1e 7c a1 91 11 31; read from the
# last of these bytes to the first that is 3535767305220708140; seeded with it, numpy's default_rng().integers(0, 251) is 125.
PEER_STARTS = {  # in frames of 10 ms
    ("bbaf2n", 160): 119, ("bbaf2n", 500): 125, ("bbaf2n", 1000): 18, ("bbaf2n", 1500): 150,
    ("lwbs9a", 160): 60, ("lwbs9a", 500): 6, ("lwbs9a", 1000): 168, ("lwbs9a", 1500): 103,
}  # fmt: skip


@pytest.mark.parametrize("num_samples", [48_000, 47_648])
def test_the_gap_of_protocol_peer_is_the_published_one(num_samples):
    """Also for a clip that is a little shorter than three seconds: the published code pads every clip to 300 frames."""
    assert hashlib.sha256(b"42:500:bbaf2n").hexdigest().startswith("2cd71e7ca1911131")
    for (clip, ms), start in PEER_STARTS.items():
        batch = {"clip_id": [clip], "audio_length": np.int32([num_samples])}
        end = min((start + ms // 10) * 160, num_samples)
        assert protocols.anywhere(batch, Case(ms)).tolist() == [[[start * 160, end]]]


def test_gaps_of_protocol_peer_are_uniform_and_have_samples_in_every_clip():
    """Of 400 clips of three seconds; and in clips of 0.1 to 2.9 s a gap is never empty and ends with the clip."""
    batch = random_batch(400) | {"audio_length": np.full(400, 48_000, np.int32)}
    found = protocols.anywhere(batch, Case(1000))[:, 0]
    assert ((found[:, 1] - found[:, 0]) == RATE).all() and not (found % 160).any()
    assert np.histogram(found[:, 0] / 32_000, 4, (0, 1))[0].min() > 70  # 100 each
    lengths = np.linspace(1_600, 46_400, 400).astype(np.int32)
    start, end = protocols.anywhere(batch | {"audio_length": lengths}, Case(160))[:, 0].T
    assert (start < end).all() and (end <= lengths).all() and (start >= 0).all()


@pytest.mark.slow
def test_the_gaps_of_protocol_paper_have_the_lengths_of_the_paper():
    batch = random_batch(1000)
    found = protocols.random_gaps(batch, protocols.PAPER_CASE)
    lengths = (found[..., 1] - found[..., 0]) / 16
    total, count = lengths.sum(1), (lengths > 0).sum(1)
    # the expected values are those of 40,000 draws by the paper's code
    assert total.mean() == pytest.approx(906, abs=28) and total.std() == pytest.approx(294, abs=20)
    assert set(count) == set(range(1, 9)) and lengths[lengths > 0].min() >= 59.9
    again = protocols.random_gaps({k: v[5:9] for k, v in batch.items()}, protocols.PAPER_CASE)
    assert (again == found[5:9]).all(), "depends only on the clip's id"


# ---- audio ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(tiny_dir):
    records = input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "test")
    clips = run_systems.Clips(records, run_systems.select_clips(records, 0))
    return clips.batch(sorted(clips.raw), 3)


class Network:
    """A fake restorer that predicts the true level: all remaining differences are due to the protocol."""

    class config:
        preset, ctc_units = "paper", "characters"

    class system:
        uses_video, has_ctc_head = True, False

    spec = presets.get("paper")
    name = "perfect"

    def __init__(self, masking):
        import functools

        import jax

        from avsi_jax.data import features

        config = features.FeatureConfig(self.spec, masking)
        self._features = jax.jit(functools.partial(features.unstandardised_features, config=config))

    def features(self, batch, gap):
        return self._features({k: v for k, v in batch.items() if isinstance(v, np.ndarray)}, gap)

    def restore(self, batch, gap):
        features = self.features(batch, gap)
        return restorer.Restored(features.target, [""] * len(gap), features)


SIX_HUNDRED = Case(600)


def outputs_of(batch, protocol, case=SIX_HUNDRED):
    systems = [{"name": k, "kind": k} for k in ("masked", "interpolation", "system", "oracle_mel")]
    return run_systems.restore_case(batch, case, protocol, Network(protocol.masking), systems)


@pytest.mark.parametrize("name", ["waveform", "peer"])
def test_audio_outside_the_gap_is_the_recording_and_masked_audio_is_zero_inside(batch, name):
    protocol = protocols.PROTOCOLS[name]
    for made in outputs_of(batch, protocol):
        assert made.rate == RATE and made.item["rate"] == {"waveform": 8_000, "peer": 16_000}[name]
        start, end = (round(t * RATE) for t in made.item["gaps_s"][0])
        outside = np.ones(len(made.audio), bool)
        outside[start:end] = False
        clip = batch["audio"][batch["clip_id"].index(made.row["clip_id"])][: len(made.audio)] / 32768
        assert (made.reference == clip.astype(np.float32)).all()
        assert (made.audio[outside] == made.reference[outside]).all()
        assert made.audio[start:end].any() == (made.row["kind"] != "masked")
        assert end - start == 0.6 * RATE and made.row["gap_ms"] == 600 and made.row["case"] == ""


@pytest.mark.slow
def test_protocol_paper_inverts_the_whole_spectrogram(batch):
    """The reference is vocoded too, from other initial phases than the result."""
    made = outputs_of(batch, protocols.PROTOCOLS["paper"], protocols.PAPER_CASE)
    assert {m.rate for m in made} == {m.item["rate"] for m in made} == {8_000}
    by = {(m.row["clip_id"], m.row["kind"]): m for m in made}
    for clip in batch["clip_id"]:
        oracle_mel, masked = by[clip, "oracle_mel"], by[clip, "masked"]
        assert (by[clip, "system"].audio == oracle_mel.audio).all() and (masked.reference == oracle_mel.reference).all()
        assert not np.allclose(oracle_mel.audio, oracle_mel.reference)
        size = np.linalg.norm
        assert size(oracle_mel.reference) == pytest.approx(size(oracle_mel.audio), rel=0.1)
        assert size(masked.audio) < size(oracle_mel.audio) and masked.row["gap_l1_mel_db"] is None
        assert by[clip, "oracle_mel"].row["gap_l1_mel_db"] == 0 < by[clip, "interpolation"].row["gap_l1_mel_db"]
        assert masked.row["case"] == "paper_gaps=8" and len(masked.item["gaps_s"]) == len(masked.row["gaps_s"].split())


def test_noise_changes_the_input_and_the_surrounding_audio_but_not_the_reference(batch):
    plain, noisy = (outputs_of(batch, protocols.PROTOCOLS["waveform"], c) for c in (SIX_HUNDRED, Case(600, "noise_db", 10)))
    for a, b in zip(plain, noisy, strict=True):
        assert (a.reference == b.reference).all() and (a.item["reference"] == b.item["reference"]).all()
        assert a.item["gaps_s"] == b.item["gaps_s"] and not (a.audio == b.audio).all()
    errors = {m.row["kind"]: m.row["gap_l1_mel_db"] for m in noisy}
    assert errors["oracle_mel"] == 0, "the target stays clean"
