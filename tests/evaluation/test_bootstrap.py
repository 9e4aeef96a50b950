"""Bootstrap intervals against scipy and by hand: over clips, speakers, differences, cases and training seeds."""

import math

import numpy as np
import pytest
from scipy import stats

from avsi_jax.evaluation import bootstrap

# ---- values ------------------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(3).gamma(2.0, size=200)
    mean, low, high = bootstrap.bootstrap_mean(values, n=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    width = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.03 * width) and high == pytest.approx(theirs.high, abs=0.03 * width)


def test_the_interval_is_deterministic_and_ignores_nan():
    values = np.random.default_rng(0).standard_normal(50)
    with_nan = np.insert(values, [0, 20], np.nan)
    assert bootstrap.bootstrap_mean(values) == bootstrap.bootstrap_mean(with_nan)
    assert bootstrap.bootstrap_mean(values, seed=1) != bootstrap.bootstrap_mean(values)
    assert bootstrap.bootstrap_mean([3.0]) == (3, 3, 3)
    assert all(map(math.isnan, bootstrap.bootstrap_mean([np.nan])))


def test_the_interval_over_speakers_reflects_their_number():
    """Identical clips of a speaker add no information: the interval is the bootstrap of 4 values."""
    speakers = np.repeat(["s1", "s2", "s3", "s4"], 100)
    level = np.repeat([0.0, 1.0, 2.0, 5.0], 100)
    mean, low, high = bootstrap.bootstrap_mean(level, groups=speakers)
    draws = np.random.default_rng(9).choice([0.0, 1.0, 2.0, 5.0], size=(50_000, 4)).mean(1)
    assert mean == 2 and (low, high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.26)  # means lie 0.25 apart
    _, low_clips, high_clips = bootstrap.bootstrap_mean(level)
    assert high - low > 3 * (high_clips - low_clips)


def test_the_interval_of_unseen_speakers_is_the_t_interval_over_their_means():
    """That of scipy, with three degrees of freedom for four speakers; the mean is over clips, of which speakers have 3 to 6."""
    rng = np.random.default_rng(3)
    speakers = np.repeat(["s30", "s32", "s33", "s34"], [3, 4, 5, 6])
    values = rng.normal(np.repeat([8.0, 9.0, 9.5, 12.0], [3, 4, 5, 6]), 1.0)
    values[0] = np.nan
    means = [np.nanmean(values[speakers == s]) for s in ("s30", "s32", "s33", "s34")]
    theirs = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    mean, low, high = bootstrap.speaker_mean(values, speakers)
    assert mean == pytest.approx(np.nanmean(values)) and (low, high) == pytest.approx(tuple(theirs))
    _, narrow_low, narrow_high = bootstrap.bootstrap_mean(values, groups=speakers)
    assert high - low > 1.3 * (narrow_high - narrow_low), "the bootstrap of four speakers is too narrow"
    rows = [
        {"clip_id": str(i), "speaker": s, "gap_ms": 300, "system": "a", "stoi": v} for i, (s, v) in enumerate(zip(speakers, values))
    ]
    (found,) = bootstrap.summarise(rows, ("stoi",), [], by_speaker=True)["table"]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((mean, low, high)) and found["missing"] == 1
    assert bootstrap.speaker_mean(values[:3], speakers[:3]) == bootstrap.bootstrap_mean(values[:3]), "nothing is known about others"
    with pytest.raises(ValueError, match="infinite"):
        bootstrap.speaker_mean([1.0, np.inf], ["a", "b"])


def test_the_interval_over_one_speaker_is_that_over_clips():
    values = np.random.default_rng(2).standard_normal(300)
    one, none = bootstrap.bootstrap_mean(values, groups=["s1"] * 300), bootstrap.bootstrap_mean(values)
    assert one == pytest.approx(none, abs=0.02)


def test_a_paired_difference_is_more_sensitive_than_two_intervals():
    rng = np.random.default_rng(0)
    b = rng.standard_normal(300)
    a = b + 0.05 + 0.01 * rng.standard_normal(300)
    mean, low, high = bootstrap.paired_difference(a, b)
    assert 0.045 < low < mean < high < 0.055
    assert bootstrap.bootstrap_mean(a)[1] < bootstrap.bootstrap_mean(b)[2]  # the intervals of the two overlap
    with pytest.raises(ValueError, match="same clips"):
        bootstrap.paired_difference(a, b[:1])


def test_malformed_values_are_refused():
    for values, groups in (([[1.0]], None), ([1.0, math.inf], None), ([1.0, 2.0], ["s1"])):
        with pytest.raises(ValueError, match="bootstrap_mean: found"):
            bootstrap.bootstrap_mean(values, groups=groups)
    assert bootstrap.number("0.5") == 0.5 and math.isnan(bootstrap.number("")) and math.isnan(bootstrap.number(None))


# ---- rows --------------------------------------------------------------------------------------------------------------------


def row(clip_id, gap_ms, system, stoi, **more):
    return {"clip_id": clip_id, "speaker": clip_id[:2], "gap_ms": gap_ms, "system": system, "stoi": stoi, **more}


def test_a_summary_computed_by_hand():
    rows = [
        row("s1a", 600, "ours", 0.8),
        row("s1a", 300, "ours", "0.9", pesq_wb=""),  # text, as from CSV
        row("s2b", 300, "ours", 0.7),
        row("s3c", 300, "ours", None),
        row("s2b", 300, "masked", 0.5),
        row("s1a", 300, "masked", 0.6),
        row("s3c", 300, "masked", 0.1),
        row("s4d", 300, "masked", 0.2),
    ]
    summary = bootstrap.summarise(rows, ("stoi", "pesq_wb"), [("ours", "masked")])
    short = [(r["gap_ms"], r["system"], r["metric"], pytest.approx(r["mean"]), r["n"], r["missing"]) for r in summary["table"]]
    assert short == [(300, "ours", "stoi", 0.8, 2, 1), (300, "masked", "stoi", 0.35, 4, 0), (600, "ours", "stoi", 0.8, 1, 0)]
    (pair,) = summary["paired"]
    assert pair == {"case": "", "gap_ms": 300, "a": "ours", "b": "masked", "metric": "stoi", "n": 2, "missing": 1} | {
        k: pair[k] for k in ("mean", "low", "high", "median")
    }
    assert pair["mean"] == pytest.approx(0.25) and pair["low"] == pytest.approx(0.2) and pair["high"] == pytest.approx(0.3)
    by_speaker = bootstrap.summarise(rows, ("stoi",), [], by_speaker=True)["table"]
    assert [r["mean"] for r in by_speaker] == [r["mean"] for r in summary["table"]]
    with pytest.raises(ValueError, match="two rows of s1a, 300 ms, ours"):
        bootstrap.summarise([*rows, rows[1] | {}], ("stoi",), [])


def test_cases_are_summarised_separately():
    """Order: cases by first appearance, then gap lengths, then systems; a clip may occur in every case."""
    rows = [
        row("s1a", 900, "ours", 0.9, case=""),
        row("s1a", 300, "ours", 0.8),  # no case means no change
        row("s1a", 300, "masked", 0.1, case=None),
        row("s1a", 900, "ours", 0.5, case="shift_ms=-80"),
        row("s1a", 900, "masked", 0.3, case="shift_ms=-80"),
        row("s1a", 300, "ours", 0.4, case="frozen_ms=100"),
    ]
    summary = bootstrap.summarise(rows, ("stoi",), [("ours", "masked")])
    found = [(e["case"], e["gap_ms"], e["system"], e["mean"]) for e in summary["table"]]
    assert found == [
        ("", 300, "ours", 0.8),
        ("", 300, "masked", 0.1),
        ("", 900, "ours", 0.9),
        ("shift_ms=-80", 900, "ours", 0.5),
        ("shift_ms=-80", 900, "masked", 0.3),
        ("frozen_ms=100", 300, "ours", 0.4),
    ]
    pairs = [(e["case"], e["gap_ms"], pytest.approx(e["mean"])) for e in summary["paired"]]
    assert pairs == [("", 300, 0.7), ("shift_ms=-80", 900, 0.2)]
    with pytest.raises(ValueError, match="two rows of s1a, frozen_ms=100, 300 ms, ours; expected one"):
        bootstrap.summarise([*rows, dict(rows[-1])], ("stoi",), [])


def test_reach_is_the_longest_gap_before_the_gain_ends():
    """Gap errors, lower is better: significant at 300 and 600 ms, not at 900, again at 1200: the reach is 600 ms."""

    def entry(gap_ms, low, high, **other):
        return {"a": "ours", "b": "theirs", "metric": "gap_l1_db", "case": "", "gap_ms": gap_ms, "low": low, "high": high} | other

    entries = [entry(1200, -1, -0.5), entry(300, -2, -1), entry(600, -1, -0.1), entry(900, -0.5, 0.1)]
    entries += [entry(900, -1, -0.5, case="shift_ms=-80"), entry(900, 1, 2, metric="stoi"), entry(300, 0.1, 0.2, b="others")]
    assert bootstrap.reach(entries, "gap_l1_db") == [
        {"a": "ours", "b": "theirs", "gap_ms": 600},
        {"a": "ours", "b": "others", "gap_ms": 0},
    ]
    assert bootstrap.reach(entries, "stoi", less_is_better=False) == [{"a": "ours", "b": "theirs", "gap_ms": 900}]
    assert bootstrap.reach(entries, "stoi") == [{"a": "ours", "b": "theirs", "gap_ms": 0}] and bootstrap.reach([], "stoi") == []


def test_two_evaluations_are_compared_clip_by_clip():
    a = [row("s1a", 300, "ours", 0.9), row("s2b", 300, "ours", "0.7"), row("s2c", 300, "ours", 0.6), row("s2d", 300, "ours", "")]
    b = [
        row("s2d", 300, "theirs", 0.1),
        row("s2b", 300, "theirs", 0.4),
        row("s1a", "300", "theirs", 0.8),
        row("s3e", 300, "theirs", 0),
    ]
    a += [row("s1a", 600, "ours", 0.5, case="gaps=2"), row("s1a", 900, "ours", 0.5)]
    b += [row("s1a", 600, "theirs", 0.75, case="gaps=2"), row("s1a", 900, "theirs", 0.5, case="gaps=2")]
    one, two = bootstrap.paired(a, b, ("stoi", "pesq_wb"))
    values = [0.9 - 0.8, 0.7 - 0.4]  # s1a, s2b; s2d has no value; s2c and s3e are only on one side
    mean, low, high = bootstrap.bootstrap_mean(values)
    assert one == {"case": "", "gap_ms": 300, "metric": "stoi", "n": 2, "missing": 1, "unshared": 2} | {
        k: pytest.approx(v) for k, v in {"mean": mean, "low": low, "high": high, "median": np.median(values)}.items()
    }
    assert (two["case"], two["gap_ms"], two["mean"], two["n"], two["unshared"]) == ("gaps=2", 600, -0.25, 1, 0)
    speakers = bootstrap.paired(a, b, ("stoi",), by_speaker=True)[0]
    assert speakers["mean"] == pytest.approx(mean) and bootstrap.paired(b, a, ("stoi",))[0]["mean"] == pytest.approx(-mean)


def test_rows_that_cannot_be_compared_are_refused():
    a, b = [row("s1a", 300, "ours", 0.9, start_s=0.5)], [row("s1a", 300, "theirs", 0.8, start_s="0.5")]
    assert bootstrap.paired(a, b, ("stoi",))[0]["n"] == 1
    for other, says in (
        ([{**b[0], "start_s": 0.6}], "s1a, 300 ms: start_s is 0.5 on one side, 0.6 on the other"),
        ([{**b[0], "gap_ms": 600}], "share no clip"),
        ([*b, *b], "two rows of s1a, 300 ms, theirs"),
        ([*b, row("s1a", 300, "masked", 0)], r"rows b contain 2 systems \(masked, theirs\)"),
    ):
        with pytest.raises(ValueError, match=says):
            bootstrap.paired(a, [dict(r) for r in other], ("stoi",))


# ---- seeds -------------------------------------------------------------------------------------------------------------------


def seeds_of(*values, system="ours"):
    """One run per seed: rows of the clips s1a, s1b, s2c with these values."""
    return [[row(clip, 300, system, v) for clip, v in zip(("s1a", "s1b", "s2c"), run)] for run in values]


def test_estimates_over_seeds_computed_by_hand():
    """Means over seeds 0.5, 0.3, 0.7 of the clips; the seeds' own means are 0.4 and 0.6."""
    runs = seeds_of((0.4, 0.2, 0.6), (0.6, 0.4, 0.8))
    (found,) = bootstrap.over_seeds(runs, ("stoi", "pesq_wb"))
    _, low, high = bootstrap.bootstrap_mean([0.5, 0.3, 0.7])
    assert found == {"case": "", "gap_ms": 300, "metric": "stoi", "n": 3, "missing": 0, "seeds": 2} | {
        k: pytest.approx(v) for k, v in {"mean": 0.5, "median": 0.5, "low": low, "high": high, "least": 0.4, "most": 0.6}.items()
    }
    one = bootstrap.over_seeds(runs[:1], ("stoi",))[0]
    assert {k: one[k] for k in ("mean", "low", "high")} == {
        k: v for k, v in bootstrap.summarise(runs[0], ("stoi",), [])["table"][0].items() if k in ("mean", "low", "high")
    }
    assert one["least"] == one["most"] == one["mean"] and one["seeds"] == 1


def test_a_clip_without_a_value_for_one_seed_is_left_out():
    (found,) = bootstrap.over_seeds(seeds_of((0.4, None, 0.6), (0.6, 9.0, 0.8)), ("stoi",))
    assert (found["n"], found["missing"]) == (2, 1)
    assert (found["mean"], found["least"], found["most"]) == pytest.approx((0.6, 0.5, 0.7))


def test_systems_of_several_seeds_are_compared_by_their_means():
    """The differences of the clips' means are 0.1, 0.2, 0.3, independent of the spread over seeds."""
    ours = bootstrap.mean_rows(seeds_of((0.5, 0.4, 1.0), (0.7, 0.8, 0.8)), ("stoi",))
    theirs = bootstrap.mean_rows(seeds_of((0.5, 0.4, 0.6), system="theirs"), ("stoi",))
    (found,) = bootstrap.paired(ours, theirs, ("stoi",))
    assert found["mean"] == pytest.approx(0.2) and 0.1 - 1e-9 <= found["low"] < 0.2 < found["high"] <= 0.3 + 1e-9
    assert [r["clip_id"] for r in ours] == ["s1a", "s1b", "s2c"] and ours[0]["speaker"] == "s1"


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ([], "rows of 0 runs: none; expected one run or more"),
        ([*seeds_of((1, 2, 3)), seeds_of((1, 2, 3))[0][:2]], "rows of 2 runs: 3, 2; expected .* the same clips"),
        ([*seeds_of((1, 2, 3)), [{**r, "gap_ms": 600} for r in seeds_of((1, 2, 3))[0]]], "rows of 2 runs: 3, 3; expected"),
        ([seeds_of((1, 2, 3))[0] + seeds_of((1, 2, 3), system="masked")[0]], "rows of run 1 contain 2 systems"),
        ([*seeds_of((1, 2, 3)), [{**r, "speaker": "s9"} for r in seeds_of((1, 2, 3))[0]]], "speaker is s1 on one side, s9"),
    ],
)
def test_seeds_that_do_not_match_are_refused(runs, says):
    with pytest.raises(ValueError, match=says):
        bootstrap.over_seeds(runs, ("stoi",))


def test_results_do_not_depend_on_row_order_and_repeat():
    rng = np.random.default_rng(1)
    runs = [[row(f"s{i % 4}c{i}", ms, "ours", float(rng.normal())) for i in range(40) for ms in (300, 600)] for _ in range(3)]
    results = [
        (
            bootstrap.summarise(rows, ("stoi",), [], by_speaker=True),
            bootstrap.over_seeds([rows, *runs[1:]], ("stoi",), by_speaker=True),
            bootstrap.paired(rows, runs[1], ("stoi",), by_speaker=True),
        )
        for rows in (runs[0], runs[0][::-1])
    ]
    assert results[0] == results[1]


# ---- groups of speakers ------------------------------------------------------------------------------------------------------


def _clips_of(**counts):
    return [
        {"clip_id": f"{s}-{i}", "speaker": s, "gap_ms": 300, "system": system, "stoi": 0.5}
        for s, n in counts.items() for i in range(n) for system in ("a", "b")
    ]  # fmt: skip


def test_a_speaker_with_most_of_the_clips_is_summarised_apart():
    rows = _clips_of(s2=1, s1=5, s3=2)
    groups = bootstrap.groups_of_speakers(rows)
    assert list(groups) == ["s1", "other speakers"]
    assert [{r["speaker"] for r in members} for members in groups.values()] == [{"s1"}, {"s2", "s3"}]
    assert sum(map(len, groups.values())) == len(rows)


@pytest.mark.parametrize("counts", [{}, {"s1": 3}, {"s1": 2, "s2": 2}, {"s1": 2, "s2": 1, "s3": 1}])
def test_speakers_without_a_majority_are_not_summarised_apart(counts):
    assert bootstrap.groups_of_speakers(_clips_of(**counts)) == {}


def test_an_estimate_has_the_median():
    rows = [
        {"clip_id": str(i), "speaker": "s1", "gap_ms": 300, "system": "a", "stoi": v}
        for i, v in enumerate([1.0, 2.0, 9.0, math.nan])
    ]
    (found,) = bootstrap.summarise(rows, ("stoi",), [])["table"]
    assert (found["median"], found["mean"], found["missing"]) == (2.0, 4.0, 1)
