"""Examples of fixed shapes, and the order of batches: independent of the number of processes, and resumable at any step."""

import collections
import hashlib
import json

import numpy as np
import pytest

from avsi_jax.data import grid_text
from avsi_jax.data import input_pipeline as pipeline

# ----------------------------------------------------------------------------------------------------------------- examples


def raw_example(samples=47_647, frames=75, words=True, text="bin blue at f two now", clip_id="bbaf2n"):
    rng = np.random.default_rng(0)
    rows = [{"word": "bin", "start_s": 0.5, "end_s": 0.75}, {"word": "now", "start_s": 1.5, "end_s": 2.0}]
    return {
        "id": clip_id,
        "speaker": "s1",
        "audio": rng.integers(-9, 9, samples).astype(np.int16),
        "landmarks": rng.normal(size=(frames, 68, 2)).astype(np.float32),
        "landmarks_valid": np.ones(frames, bool),
        "offset_s": 0.25,
        "frame_size": np.array([360, 288], np.int32),
        "fps": 25.0,
        "text": text,
        "words": rows if words else [],
    }


@pytest.mark.parametrize(("samples", "frames"), [(47_647, 74), (48_000, 75), (60_001, 80), (1, 1)])
def test_shapes_are_fixed(samples, frames):
    raw = raw_example(samples, frames)
    x = pipeline.to_example(raw)
    shapes = {k: (v.shape, v.dtype.name) for k, v in x.items() if k != "clip_id"}
    assert shapes == {
        "id_hash": ((), "uint32"),
        "audio": ((48_000,), "int16"),
        "audio_length": ((), "int32"),
        "landmarks": ((75, 68, 2), "float32"),
        "num_frames": ((), "int32"),
        "landmarks_valid": ((75,), "bool"),
        "offset_s": ((), "float32"),
        "frame_size": ((2,), "int32"),
        "fps": ((), "float32"),
        "labels": ((41,), "int32"),
        "label_length": ((), "int32"),
        "phones": ((23,), "int32"),
        "phone_length": ((), "int32"),
        "speech": ((2,), "float32"),
        "has_words": ((), "bool"),
        "weight": ((), "float32"),
    }
    n, t = min(samples, 48_000), min(frames, 75)
    assert (x["audio_length"], x["num_frames"]) == (n, t)
    np.testing.assert_array_equal(x["audio"][:n], raw["audio"][:n])
    assert not x["audio"][n:].any() and not x["landmarks_valid"][t:].any() and x["landmarks_valid"][:t].all()
    np.testing.assert_array_equal(x["landmarks"][:t], raw["landmarks"][:t])
    np.testing.assert_array_equal(x["landmarks"][t:], np.broadcast_to(raw["landmarks"][t - 1], (75 - t, 68, 2)))


def test_speech_is_on_the_clock_of_the_audio():
    x = pipeline.to_example(raw_example())
    np.testing.assert_allclose(x["speech"], [0.75, 2.25])  # words at 0.5 and 2.0 s of the video, audio 0.25 s late
    assert x["has_words"] and x["label_length"] == 21
    x = pipeline.to_example(raw_example(words=False, text=""))
    np.testing.assert_allclose(x["speech"], [0, 47_647 / 16_000])
    assert not x["has_words"] and x["label_length"] == 0 and not x["labels"].any()


def test_labels_are_those_of_the_text():
    x = pipeline.to_example(raw_example())
    assert grid_text.decode(x["labels"]) == "bin blue at f two now" and x["label_length"] == 21 == np.count_nonzero(x["labels"])
    assert grid_text.decode_phones(x["phones"]) == "B IH N B L UW AE T EH F T UW N AW"
    assert x["phone_length"] == 14 == np.count_nonzero(x["phones"])


@pytest.mark.parametrize(
    ("text", "characters", "phones"),
    [
        ("", 0, 0),
        ("hello there", 11, 0),  # not words of Grid: only characters
        ("Bin blue", 0, 0),
        ("caf\u00e9 at 8", 0, 0),
        ("line\none", 0, 0),
        ("place green with q seven again", 30, 23),
        ("place green with q seven again now", 34, 0),  # more phones than any Grid sentence
        ("x" * 41, 41, 0),
        ("x" * 42, 0, 0),
    ],
)
def test_a_text_without_labels_has_length_zero(text, characters, phones):
    x = pipeline.to_example(raw_example(text=text))
    assert (x["label_length"], x["phone_length"]) == (characters, phones)
    assert (np.count_nonzero(x["labels"]), np.count_nonzero(x["phones"])) == (characters, phones)
    assert x["weight"] == 1  # the clip itself is kept


def test_a_clip_without_labels_does_not_contribute_to_the_ctc_loss():
    """Loss and gradient are those of the batch without the clip."""
    import jax
    import jax.numpy as jnp

    from avsi_jax.models import losses

    def mean(logits, labels, lengths, weight):
        total, count = losses.ctc(logits, jnp.full(3, 40), labels, lengths, weight)
        return total / jnp.maximum(count, 1)

    ctc = jax.jit(jax.value_and_grad(mean))
    texts = ["bin blue at f two now", "caf\u00e9 at 8", "set white with p two soon"]
    labels, lengths = (
        np.stack([x[k] for x in (pipeline.to_example(raw_example(text=t)) for t in texts)]) for k in ("labels", "label_length")
    )
    logits, ones = jax.random.normal(jax.random.key(0), (3, 40, grid_text.NUM_LABELS)), np.ones(3, np.float32)
    value, gradient = ctc(logits, labels, lengths, ones)
    expected, expected_gradient = ctc(logits, labels[[0, 0, 2]], lengths[[0, 0, 2]], np.float32([1, 0, 1]))  # weight 0, other text
    assert value == expected > 0 and not gradient[1].any()
    np.testing.assert_array_equal(gradient, expected_gradient)
    value, gradient = ctc(logits, labels, 0 * lengths, ones)
    assert value == 0 and not gradient.any()


def test_the_id_hash_is_the_start_of_sha256():
    # printf bbaf2n | sha256sum begins with the digits on the right
    digits = hashlib.sha256(b"bbaf2n").hexdigest()[:8]
    assert pipeline.id_hash("bbaf2n") == int(digits, 16) and pipeline.id_hash("bbaf2n").dtype == np.uint32


# ------------------------------------------------------------------------------------------------------------------ batches


class Clips(list):
    """Stored examples with invented ids."""

    def __init__(self, count: int):
        super().__init__(raw_example(200 + k, 3, clip_id=f"clip{k}") for k in range(count))
        self.clip_ids = [raw["id"] for raw in self]


@pytest.fixture(scope="module")
def train():
    return Clips(11)


@pytest.fixture
def bare_examples(monkeypatch):
    """Replaces examples by a single number, for tests that check only the order."""
    monkeypatch.setattr(pipeline, "to_example", lambda raw: {"clip_id": raw["id"], "length": np.int32(len(raw["audio"]))})


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def first(batches, n):
    return [next(batches) for _ in range(n)]


def ids_of(batches) -> list[str]:
    return [i for batch in batches for i in batch["clip_id"]]


class Case:
    """A random training setup: numbers of clips, passes and processes, and a batch size that can exceed the number of clips."""

    def __init__(self, number: int):
        self.rng = np.random.default_rng(number)
        self.clips, self.passes = Clips(int(self.rng.integers(1, 40))), int(self.rng.integers(1, 4))
        self.seed, self.processes = int(self.rng.integers(2**31)), int(self.rng.choice([1, 2, 3, 4, 8]))
        self.batch_size = self.processes * int(self.rng.integers(1, 5))
        self.steps = -(-self.passes * len(self.clips) // self.batch_size)

    def batches(self, steps: int, batch_size: int | None = None, **options) -> list[dict]:
        return first(pipeline.train_batches(self.clips, batch_size or self.batch_size, self.seed, **options), steps)


in_random_cases = pytest.mark.parametrize("case", range(12))


@in_random_cases
def test_rows_of_processes_are_the_global_batch_without_gap_or_overlap(case, bare_examples):
    case = Case(case)
    ranks = [{"process_index": p, "process_count": case.processes} for p in range(case.processes)]
    shares = [case.batches(case.steps, **rank) for rank in ranks]
    for step, batch in enumerate(case.batches(case.steps)):
        assert_same({k: np.concatenate([share[step][k] for share in shares]) for k in batch}, batch)
        assert {len(share[step]["clip_id"]) for share in shares} == {case.batch_size // case.processes}


@in_random_cases
def test_each_pass_contains_every_clip_once_for_any_batch_size(case, bare_examples):
    """The order depends on (seed, pass): one stream of clips, cut into batches of any size."""
    case = Case(case)
    count, wanted = len(case.clips), case.passes * len(case.clips)
    stream = ids_of(case.batches(case.steps))[:wanted]
    for k in range(case.passes):
        assert sorted(stream[k * count : (k + 1) * count]) == sorted(case.clips.clip_ids)
    other = int(case.rng.integers(1, 9))
    assert ids_of(case.batches(-(-wanted // other), batch_size=other))[:wanted] == stream


@in_random_cases
def test_resuming_in_the_middle_of_a_pass_continues_exactly(case, bare_examples):
    case = Case(case)
    rank = {"process_index": int(case.rng.integers(case.processes)), "process_count": case.processes}
    start = int(case.rng.integers(case.steps + 1))
    uninterrupted, resumed = case.batches(start + 2, **rank), case.batches(2, start_step=start, **rank)
    for a, b in zip(resumed, uninterrupted[start:], strict=True):
        assert_same(a, b)


def test_the_order_is_that_of_grain(bare_examples):
    """So that runs of earlier versions resume in the same order."""
    import grain.python as grain

    order = grain.MapDataset.range(11).seed(7).shuffle().repeat().batch(4)
    ids = ids_of(first(pipeline.train_batches(Clips(11), 4, seed=7), 9))
    assert ids == [f"clip{i}" for step in range(9) for i in order[step]]


def test_passes_differ_and_depend_on_the_seed(train, bare_examples):
    def passes(seed):
        stream = ids_of(first(pipeline.train_batches(train, 4, seed=seed), 11))
        return [tuple(stream[k : k + 11]) for k in (0, 11, 22, 33)]

    assert passes(3) == passes(3) and len({*passes(3), *passes(4)}) == 8


def test_a_batch_size_that_the_processes_do_not_divide_is_rejected(train):
    with pytest.raises(ValueError, match="multiple"):
        pipeline.train_batches(train, 7, seed=1, process_count=2)


def test_an_empty_split_is_rejected():
    with pytest.raises(pipeline.RecordError, match="split is empty"):
        pipeline.train_batches(Clips(0), 2, seed=0)


def test_the_state_of_an_iterator_can_be_restored_in_another(train):
    batches = pipeline.train_batches(train, 4, seed=5)
    first(batches, 3)
    state = json.loads(json.dumps(batches.get_state()))
    expected = first(batches, 4)
    resumed = pipeline.train_batches(train, 4, seed=5)
    resumed.set_state(state)
    for a, b in zip(first(resumed, 4), expected, strict=True):
        assert_same(a, b)


def test_a_batch_may_exceed_the_split():
    batch = next(pipeline.train_batches(Clips(5), 12, seed=0))
    assert set(collections.Counter(batch["clip_id"]).values()) <= {2, 3} and batch["audio"].shape == (12, 48_000)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 32])
def test_evaluation_covers_every_clip_once(train, batch_size):
    batches = list(pipeline.eval_batches(train, batch_size))
    assert all(b["audio"].shape == (batch_size, 48_000) for b in batches)
    weights = np.concatenate([b["weight"] for b in batches])
    ids = np.concatenate([b["clip_id"] for b in batches])
    assert list(ids[weights == 1]) == sorted(train.clip_ids) and set(weights) <= {0, 1}


@pytest.mark.parametrize(("clips", "batch_size", "processes"), [(11, 4, 2), (11, 8, 4), (9, 8, 8), (3, 16, 4), (8, 4, 4)])
def test_processes_together_evaluate_every_clip_once(clips, batch_size, processes):
    """Their concatenated rows are the batches of one process; all get the same number of batches, even if some are only padding."""
    clips = Clips(clips)
    shares = [list(pipeline.eval_batches(clips, batch_size, process_index=p, process_count=processes)) for p in range(processes)]
    for batch, *parts in zip(pipeline.eval_batches(clips, batch_size), *shares, strict=True):
        assert_same({k: np.concatenate([part[k] for part in parts]) for k in batch}, batch)
    ids = [i for share in shares for b in share for i, w in zip(b["clip_id"], b["weight"], strict=True) if w]
    assert sorted(ids) == sorted(clips.clip_ids)


def test_evaluation_also_rejects_a_batch_size_that_the_processes_do_not_divide():
    with pytest.raises(ValueError, match="batch_size 7 .* 2 processes"):
        pipeline.eval_batches(Clips(3), 7, process_count=2)
