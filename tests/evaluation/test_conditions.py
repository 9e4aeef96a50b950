"""What a suite does to a batch: what it says, to the sample and the pixel, by the clip's id alone, and nothing else."""

import numpy as np
import pytest

from avsi_jax.data import input_pipeline
from avsi_jax.evaluation import conditions, run_systems
from avsi_jax.evaluation.conditions import Case

GAP = np.array([[[16_000, 24_000]], [[20_000, 36_000]], [[8_000, 40_000]]], np.int32)


@pytest.fixture(scope="module")
def clips(tiny_dir):
    records = input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "test")
    return run_systems.Clips(records, run_systems.chosen_clips(records, 0))


@pytest.fixture(scope="module")
def batch(clips):
    return clips.batch(sorted(clips.raw), 3)


def change(batch, family, value, gap=GAP):
    """The changed batch, after a look that nothing was written into the one given."""
    before = {k: v.copy() for k, v in batch.items() if isinstance(v, np.ndarray)}
    after = conditions.changed(batch, gap, Case(900, family, value), batch["donors"])
    assert all((batch[k] == v).all() for k, v in before.items())
    return after


def changed_fields(batch, after) -> set[str]:
    return {k for k, v in after.items() if isinstance(v, np.ndarray) and not np.array_equal(v, batch[k])}


def test_the_lengths_are_the_papers_and_beyond():
    assert [c.gap_ms for c in conditions.lengths(())] == [300, 600, 900, 1200, 1500, 2000, 2500, 3000]
    assert conditions.lengths((160, 320)) == [Case(160), Case(320)] and Case(160).name == ""


@pytest.mark.parametrize("suite", sorted(conditions.SUITES))
def test_every_case_is_another_one_and_has_a_label(suite):
    cases = conditions.SUITES[suite](())
    assert len({(c.name, c.gap_ms) for c in cases}) == len(cases)
    assert all(c.family in conditions.FAMILIES for c in cases if c.family)


def test_only_a_change_of_audio_or_gap_gives_other_references():
    assert [c.changes_references for c in (Case(900), Case(900, "noise_db", 10), Case(900, "gaps", 4, 4))] == [True] * 3
    assert not any(Case(900, family, 1).changes_references for family in conditions.VIDEO)


def test_a_plain_case_changes_nothing(batch):
    assert conditions.changed(batch, GAP, Case(900), batch["donors"]) is batch


@pytest.mark.parametrize("count", [1, 5, 40, 75])
def test_lost_frames_lie_around_the_gap_and_are_drawn_straight(batch, count):
    after = change(batch, "frames_lost", count)
    assert changed_fields(batch, after) <= {"landmarks", "landmarks_valid"}
    for b, frames in enumerate(batch["num_frames"]):
        missing = np.flatnonzero(~after["landmarks_valid"][b, :frames])
        assert len(missing) == min(count, frames) and (np.diff(missing) == 1).all()
        middle = (GAP[b, 0].mean() / 16_000 - batch["offset_s"][b]) * 25
        assert abs(missing.mean() - middle) <= 1 or missing[0] == 0 or missing[-1] == frames - 1
        if missing[0] > 0 and missing[-1] < frames - 1:
            before, behind = after["landmarks"][b, missing[0] - 1], after["landmarks"][b, missing[-1] + 1]
            part = (1 + np.arange(count))[:, None, None] / (count + 1)
            np.testing.assert_allclose(after["landmarks"][b, missing], before + part * (behind - before), atol=1e-3)
        kept = np.setdiff1d(np.arange(frames), missing)
        assert (after["landmarks"][b, kept] == batch["landmarks"][b, kept]).all()


def test_a_face_nobody_sees_does_not_move(batch):
    for after in (change(batch, "frames_lost", 75), change(batch, "no_video", 1)):
        assert not after["landmarks_valid"].any() and (after["landmarks"] == after["landmarks"][:, :1]).all()


def test_frozen_lips_stand_still_from_the_gaps_start(batch):
    after = change(batch, "frozen_ms", 400)
    assert changed_fields(batch, after) == {"landmarks"}
    first = round((16_000 / 16_000 - 0.011) * 25)
    assert (after["landmarks"][0, first : first + 10] == batch["landmarks"][0, first]).all()
    same = [i for i in range(75) if not first < i < first + 10]
    assert (after["landmarks"][0, same] == batch["landmarks"][0, same]).all()


def test_noise_on_points_is_as_loud_as_said_and_drawn_by_the_id(batch, clips):
    after = change(batch, "noise_px", 2.0)
    noise = after["landmarks"] - batch["landmarks"]
    np.testing.assert_allclose(noise.std((1, 2, 3)), 2.0, rtol=0.03)  # the pictures are 360 wide
    alone = clips.batch([batch["clip_id"][1]], 1)
    assert (change(alone, "noise_px", 2.0, GAP[1:2])["landmarks"][0] == after["landmarks"][1]).all()
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.05


def test_a_shift_takes_the_frame_that_belongs_to_audio_said_so_much_later(batch):
    """Sound 80 ms after the picture: at every frame the network gets the picture two further on."""
    from avsi_jax import presets
    from avsi_jax.data import features

    after, preset = change(batch, "shift_ms", 80), presets.get("paper")
    assert changed_fields(batch, after) == {"offset_s"}
    before, later = (np.asarray(features.video_positions(b, preset))[:, 20:100] for b in (batch, after))
    np.testing.assert_allclose(later - before, 2.0, atol=1e-3)


def test_noise_under_the_audio_is_as_loud_as_said_and_not_behind_the_clip(batch):
    for wanted in (20, 0):
        after = change(batch, "noise_db", wanted)
        assert changed_fields(batch, after) == {"audio"}
        for b, n in enumerate(batch["audio_length"]):
            first, last = np.rint(batch["speech"][b] * 16_000).astype(int)
            clean = batch["audio"][b].astype(float)
            noise = after["audio"][b] - clean
            found = 10 * np.log10((clean[first:last] ** 2).mean() / (noise[:n] ** 2).mean())
            assert abs(found - wanted) < 0.5 and not noise[n:].any()


def test_another_video_is_another_clips_or_another_speakers():
    speakers = {"a1": "s1", "a2": "s1", "a3": "s1", "b1": "s2", "c1": "s3"}
    assert run_systems.other_clips(speakers) == {"a1": "a2", "a2": "a3", "a3": "a1", "b1": "c1", "c1": "a1"}
    others = run_systems.other_speakers(speakers)
    assert all(speakers[other] != speakers[clip] for clip, other in others.items()) and set(others) == set(speakers)
    assert run_systems.other_speakers({"a": "s1", "b": "s1"}) == {"a": "b", "b": "a"}


def test_another_clips_video_brings_all_of_the_frames_side(batch):
    after = change(batch, "video_of", 1)
    assert changed_fields(batch, after) <= set(run_systems.VIDEO) and "landmarks" in changed_fields(batch, after)
    ids = list(batch["clip_id"])
    for b, clip in enumerate(ids):
        donor = ids.index(run_systems.other_clips(dict.fromkeys(ids, "s30"))[clip])
        assert (after["landmarks"][b] == batch["landmarks"][donor]).all()


# ---- painted pictures ----------------------------------------------------------------------------------------------------------


def test_a_hand_stays_as_long_as_the_gap_at_most():
    times = {(c.gap_ms, c.value) for c in conditions.occlusion((300, 900)) if c.family == "covered_50"}
    assert times == {(300, 300), (900, 300), (900, 600), (900, 900)}
    told = {(c.gap_ms, c.family.removesuffix("_told"), c.value) for c in conditions.occlusion(()) if c.family.endswith("_told")}
    assert told == {(c.gap_ms, c.family, c.value) for c in conditions.occlusion(()) if c.family and not c.family.endswith("_told")}


def test_frames_around_the_gap_are_those_of_its_time(batch):
    """The gap's middle on the pictures' clock: the sound lags it by offset_s."""
    for b, (first, last) in enumerate(conditions.around_gap(batch, GAP, 10)):
        middle = (GAP[b].mean() / 16_000 - batch["offset_s"][b]) * batch["fps"][b]
        assert last - first == 10 and abs((first + last) / 2 - middle) <= 0.5
    assert conditions.around_gap(batch, GAP, 500) == [(0, n) for n in batch["num_frames"]]


@pytest.mark.parametrize("told", [False, True])
def test_what_the_tracker_said_of_painted_frames_takes_the_place_of_what_it_said_before(batch, told):
    mouth = np.ones_like(batch["landmarks_valid"])
    mouth[:, 20:30] = False
    painted = {"landmarks": batch["landmarks"] + 3, "landmarks_valid": np.ones_like(mouth), "mouth": mouth}
    given = batch | {"donors": batch["donors"] | {(900, "covered_50", 400): painted}}
    case = Case(900, "covered_50" + "_told" * told, 400)
    after = conditions.changed(given, GAP, case, given["donors"])
    np.testing.assert_array_equal(after["landmarks_valid"], mouth if told else np.ones_like(mouth))
    for b, frames in enumerate(batch["num_frames"]):
        seen = np.setdiff1d(np.arange(frames), np.arange(20, 30)) if told else np.arange(frames)
        points = painted["landmarks"][b]
        np.testing.assert_array_equal(after["landmarks"][b, seen], points[seen])
        between = np.interp(np.arange(20, 30), [19, 30], points[[19, 30], 5, 0]) if told else points[20:30, 5, 0]
        np.testing.assert_allclose(after["landmarks"][b, 20:30, 5, 0], between, rtol=1e-5)
