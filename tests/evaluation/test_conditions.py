"""Evaluation conditions: each change does what its label states, depends only on the clip's id, and changes nothing else."""

import numpy as np
import pytest

from avsi_jax.data import input_pipeline
from avsi_jax.evaluation import conditions, run_systems
from avsi_jax.evaluation.conditions import Case

GAP = np.array([[[16_000, 24_000]], [[20_000, 36_000]], [[8_000, 40_000]]], np.int32)


@pytest.fixture(scope="module")
def clips(tiny_dir):
    records = input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "test")
    return run_systems.Clips(records, run_systems.select_clips(records, 0))


@pytest.fixture(scope="module")
def batch(clips):
    return clips.batch(sorted(clips.raw), 3)


def change(batch, family, value, gap=GAP):
    """The changed batch, after checking that the arrays of the original were not modified."""
    before = {k: v.copy() for k, v in batch.items() if isinstance(v, np.ndarray)}
    after = conditions.changed(batch, gap, Case(900, family, value), batch["donors"])
    assert all((batch[k] == v).all() for k, v in before.items())
    return after


def changed_fields(batch, after) -> set[str]:
    return {k for k, v in after.items() if isinstance(v, np.ndarray) and not np.array_equal(v, batch[k])}


def test_the_gap_lengths_are_those_of_the_paper_and_longer_ones():
    assert [c.gap_ms for c in conditions.lengths(())] == [300, 600, 900, 1200, 1500, 2000, 2500, 3000]
    assert conditions.lengths((160, 320)) == [Case(160), Case(320)] and Case(160).name == ""


@pytest.mark.parametrize("suite", sorted(conditions.SUITES))
def test_the_cases_of_a_suite_differ_and_have_labels(suite):
    cases = conditions.SUITES[suite](())
    assert len({(c.name, c.gap_ms) for c in cases}) == len(cases)
    assert all(c.family in conditions.FAMILIES for c in cases if c.family)


def test_only_a_change_of_audio_or_gap_changes_the_references():
    assert [c.changes_references for c in (Case(900), Case(900, "noise_db", 10), Case(900, "gaps", 4, 4))] == [True] * 3
    assert not any(Case(900, family, 1).changes_references for family in conditions.VIDEO)


def test_a_case_without_a_change_returns_the_batch(batch):
    assert conditions.changed(batch, GAP, Case(900), batch["donors"]) is batch


@pytest.mark.parametrize("count", [1, 5, 40, 75])
def test_dropped_frames_lie_around_the_gap_and_are_interpolated(batch, count):
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


def test_landmarks_without_any_face_do_not_move(batch):
    for after in (change(batch, "frames_lost", 75), change(batch, "no_video", 1)):
        assert not after["landmarks_valid"].any() and (after["landmarks"] == after["landmarks"][:, :1]).all()


def test_frozen_landmarks_stay_constant_from_the_start_of_the_gap(batch):
    after = change(batch, "frozen_ms", 400)
    assert changed_fields(batch, after) == {"landmarks"}
    first = round((16_000 / 16_000 - 0.011) * 25)
    assert (after["landmarks"][0, first : first + 10] == batch["landmarks"][0, first]).all()
    same = [i for i in range(75) if not first < i < first + 10]
    assert (after["landmarks"][0, same] == batch["landmarks"][0, same]).all()


def test_landmark_noise_has_the_given_deviation_and_depends_on_the_clip_id(batch, clips):
    after = change(batch, "noise_px", 2.0)
    noise = after["landmarks"] - batch["landmarks"]
    np.testing.assert_allclose(noise.std((1, 2, 3)), 2.0, rtol=0.03)  # the frames are 360 wide
    alone = clips.batch([batch["clip_id"][1]], 1)
    assert (change(alone, "noise_px", 2.0, GAP[1:2])["landmarks"][0] == after["landmarks"][1]).all()
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.05


def test_a_shift_takes_the_frame_of_audio_that_much_later(batch):
    """Audio lags video by 80 ms: at every time the network gets the video two frames later."""
    from avsi_jax import presets
    from avsi_jax.data import features

    after, preset = change(batch, "shift_ms", 80), presets.get("paper")
    assert changed_fields(batch, after) == {"offset_s"}
    before, later = (np.asarray(features.video_positions(b, preset))[:, 20:100] for b in (batch, after))
    np.testing.assert_allclose(later - before, 2.0, atol=1e-3)


def test_audio_noise_has_the_given_ratio_and_ends_with_the_clip(batch):
    for wanted in (20, 0):
        after = change(batch, "noise_db", wanted)
        assert changed_fields(batch, after) == {"audio"}
        for b, n in enumerate(batch["audio_length"]):
            first, last = np.rint(batch["speech"][b] * 16_000).astype(int)
            clean = batch["audio"][b].astype(float)
            noise = after["audio"][b] - clean
            found = 10 * np.log10((clean[first:last] ** 2).mean() / (noise[:n] ** 2).mean())
            assert abs(found - wanted) < 0.5 and not noise[n:].any()


def test_replacement_video_is_of_another_clip_or_another_speaker():
    speakers = {"a1": "s1", "a2": "s1", "a3": "s1", "b1": "s2", "c1": "s3"}
    assert run_systems.other_clips(speakers) == {"a1": "a2", "a2": "a3", "a3": "a1", "b1": "c1", "c1": "a1"}
    others = run_systems.other_speakers(speakers)
    assert all(speakers[other] != speakers[clip] for clip, other in others.items()) and set(others) == set(speakers)
    assert run_systems.other_speakers({"a": "s1", "b": "s1"}) == {"a": "b", "b": "a"}


def test_another_clips_video_replaces_all_video_arrays(batch):
    after = change(batch, "video_of", 1)
    assert changed_fields(batch, after) <= set(run_systems.VIDEO) and "landmarks" in changed_fields(batch, after)
    ids = list(batch["clip_id"])
    for b, clip in enumerate(ids):
        donor = ids.index(run_systems.other_clips(dict.fromkeys(ids, "s30"))[clip])
        assert (after["landmarks"][b] == batch["landmarks"][donor]).all()


# ---- painted frames ------------------------------------------------------------------------------------------------------------


def test_a_hand_stays_at_most_as_long_as_the_gap():
    times = {(c.gap_ms, c.value) for c in conditions.occlusion((300, 900)) if c.family == "covered_50"}
    assert times == {(300, 300), (900, 300), (900, 600), (900, 900)}
    cases = [c for c in conditions.occlusion(()) if c.family]
    flagged = {(c.gap_ms, c.family.removesuffix("_flagged"), c.value) for c in cases if c.family.endswith("_flagged")}
    assert flagged == {(c.gap_ms, c.family, c.value) for c in cases if not c.family.endswith("_flagged")}


def test_frames_around_the_gap_are_centred_on_it(batch):
    """On the video's clock: the audio lags by offset_s."""
    for b, (first, last) in enumerate(conditions.around_gap(batch, GAP, 10)):
        middle = (GAP[b].mean() / 16_000 - batch["offset_s"][b]) * batch["fps"][b]
        assert last - first == 10 and abs((first + last) / 2 - middle) <= 0.5
    assert conditions.around_gap(batch, GAP, 500) == [(0, n) for n in batch["num_frames"]]


@pytest.mark.parametrize("flagged", [False, True])
def test_landmarks_of_painted_frames_replace_those_of_the_record(batch, flagged):
    mouth = np.ones_like(batch["landmarks_valid"])
    mouth[:, 20:30] = False
    painted = {"landmarks": batch["landmarks"] + 3, "landmarks_valid": np.ones_like(mouth), "mouth": mouth}
    with_donors = batch | {"donors": batch["donors"] | {(900, "covered_50", 400): painted}}
    case = Case(900, "covered_50" + "_flagged" * flagged, 400)
    after = conditions.changed(with_donors, GAP, case, with_donors["donors"])
    np.testing.assert_array_equal(after["landmarks_valid"], mouth if flagged else np.ones_like(mouth))
    for b, frames in enumerate(batch["num_frames"]):
        seen = np.setdiff1d(np.arange(frames), np.arange(20, 30)) if flagged else np.arange(frames)
        points = painted["landmarks"][b]
        np.testing.assert_array_equal(after["landmarks"][b, seen], points[seen])
        between = np.interp(np.arange(20, 30), [19, 30], points[[19, 30], 5, 0]) if flagged else points[20:30, 5, 0]
        np.testing.assert_allclose(after["landmarks"][b, 20:30, 5, 0], between, rtol=1e-5)
