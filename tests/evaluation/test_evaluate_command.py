"""avsi-evaluate on a tiny run with a baseline: complete rows, reproducible results, and a summary that follows from the rows."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from avsi_jax import configs
from avsi_jax.evaluation import cli, occlusion, report, run_systems, table_export

GAP_MS = (300, 900)
SYSTEMS = {  # name -> kind, in the order of the tables
    "masked audio": "masked",
    "interpolation": "interpolation",
    "a_si": "baseline",
    "av_mtl_s2s": "system",
    "av_mtl_s2s, another clip's video": "other_video",
    "oracle mel (upper bound)": "oracle_mel",
}
METRICS = ("gap_l1_mel_db", "gap_l1_db", "pesq_nb", "stoi", "estoi", "stoi_gap", "cer")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """The cache of reference rows is in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["XDG_CACHE_HOME"])


def eval_config(**fields):
    wanted = {"split": "test", "gap_ms": "300,900", "batch_size": 3, "examples": 0, "workers": 1} | fields
    return configs.load("eval", [(k, str(v)) for k, v in wanted.items()])


@pytest.fixture(scope="module")
def runs(trained, untrained_a_si, quickly_compiled, tmp_path_factory):
    """A folder with copies of the run directories of the system and of the baseline.

    The shared trainings come first, as in other files; `quickly_compiled` then applies to the evaluations of this file.
    """
    home = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(trained, home / "system")
    shutil.copytree(untrained_a_si, home / "baseline")
    return home


@pytest.fixture(scope="module")
def folder(runs):
    """The results of the system; the baseline is evaluated first, without examples, whose images take most of the time."""
    cli.evaluate(eval_config(), runs / "baseline")
    return cli.evaluate(eval_config(examples=1), runs / "system", baseline=runs / "baseline", command="avsi-evaluate as in a test")


@pytest.fixture(scope="module")
def rows(folder):
    return read(folder)


@pytest.fixture(scope="module")
def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def read(folder) -> list[dict]:
    return read_file(folder / "clips.csv")


def read_file(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def values(rows, system, metric, gap_ms=None):
    chosen = [r for r in rows if r["system"] == system and gap_ms in (None, int(r["gap_ms"]))]
    return np.array([float(r[metric]) for r in chosen if r[metric]])


# ---------------------------------------------------------------------------------------------------------------- clips.csv


@pytest.mark.slow
def test_there_is_a_row_for_every_clip_gap_and_system(rows, folder, tiny_dir):
    from avsi_jax.data import input_pipeline

    assert folder.name == "waveform-test-lengths"
    clips = input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "test").clip_ids
    found = [(r["clip_id"], int(r["gap_ms"]), r["system"]) for r in rows]
    assert sorted(found) == sorted((c, g, s) for c in clips for g in GAP_MS for s in SYSTEMS)
    assert {r["system"]: r["kind"] for r in rows} == SYSTEMS
    assert {r["speaker"] for r in rows} == {"s30"} and {r["in_words"] for r in rows} == {"True"}


@pytest.mark.slow
def test_all_systems_have_the_same_gap_inside_the_words(rows):
    for key in {(r["clip_id"], r["gap_ms"]) for r in rows}:
        same_gap = [r for r in rows if (r["clip_id"], r["gap_ms"]) == key]
        assert len({(r["start_s"], r["end_s"]) for r in same_gap}) == 1
        start, end = float(same_gap[0]["start_s"]), float(same_gap[0]["end_s"])
        assert end - start == pytest.approx(int(key[1]) / 1000, abs=1e-5)
        # tests/support/tiny_data.py: words from 0.40 to 2.30 s of the video, the audio lags by 0.011 s
        assert start >= 0.411 - 1e-4 and end <= 2.311 + 1e-4


@pytest.mark.slow
def test_every_row_has_its_scores(rows):
    for r in rows:
        assert r["reason"] == "" and r["pesq_wb"] == "", "8 kHz has no wide band"
        for metric in ("gap_l1_db", "pesq_nb", "stoi", "estoi"):
            assert np.isfinite(float(r[metric]))
        assert (r["gap_l1_mel_db"] == "") == (r["kind"] == "masked")
        assert (r["cer"] != "") == (r["kind"] in ("system", "other_video")), "a_si has no text head"
        assert len(r["text"].split()) == 6


@pytest.mark.slow
def test_systems_have_the_expected_order(rows):
    """The oracle mel is better than a network of two epochs; restored audio is better than masked audio."""
    for g in GAP_MS:
        mean = {s: values(rows, s, "stoi", g).mean() for s in SYSTEMS}
        assert mean["oracle mel (upper bound)"] > mean["masked audio"] + 0.02
        error = {s: values(rows, s, "gap_l1_db", g).mean() for s in SYSTEMS}
        assert error["oracle mel (upper bound)"] < min(e for s, e in error.items() if s != "oracle mel (upper bound)")
        assert error["masked audio"] == max(error.values())
    assert values(rows, "masked audio", "stoi", 300).mean() > values(rows, "masked audio", "stoi", 900).mean()
    assert not values(rows, "oracle mel (upper bound)", "gap_l1_mel_db").any(), "the oracle mel is the target"


@pytest.mark.slow
def test_another_clips_video_changes_the_result(rows):
    own, other = (values(rows, s, "gap_l1_mel_db") for s in ("av_mtl_s2s", "av_mtl_s2s, another clip's video"))
    assert (own != other).all()


# ------------------------------------------------------------------------------------------------------------- summary.json


@pytest.mark.slow
def test_the_summary_follows_from_the_rows(rows, summary):
    found = {(e["system"], e["gap_ms"], e["metric"]): e for e in summary["table"]}
    expected = {(s, g, m): values(rows, s, m, g) for s in SYSTEMS for g in GAP_MS for m in METRICS}
    assert found.keys() == {key for key, v in expected.items() if len(v)}
    for key, entry in found.items():
        assert entry["mean"] == pytest.approx(expected[key].mean(), rel=1e-9), key
        assert entry["n"] == 3 and entry["missing"] == 0 and entry["low"] <= entry["mean"] <= entry["high"]


@pytest.mark.slow
def test_paired_differences_follow_from_the_rows(rows, summary):
    assert {(p["a"], p["b"]) for p in summary["paired"]} >= {
        ("av_mtl_s2s", "a_si"), ("av_mtl_s2s", "interpolation"), ("av_mtl_s2s", "av_mtl_s2s, another clip's video"),
    }  # fmt: skip
    for p in summary["paired"]:
        a, b = (values(rows, p[side], p["metric"], p["gap_ms"]) for side in "ab")
        assert p["mean"] == pytest.approx((a - b).mean(), rel=1e-9, abs=1e-12) and p["n"] == 3


@pytest.mark.slow
def test_the_summary_describes_the_evaluation(summary):
    assert (summary["system"], summary["split"], summary["protocol"], summary["num_clips"]) == ("av_mtl_s2s", "test", "waveform", 3)
    assert summary["gap_ms"] == list(GAP_MS) and summary["command"] == "avsi-evaluate as in a test"
    assert [(s["name"], s["kind"]) for s in summary["systems"]] == list(SYSTEMS.items())
    assert summary["metric_rate"] == 8000 and summary["versions"]["pesq"]
    assert summary["runs"]["av_mtl_s2s"]["step"] == 4 and summary["runs"]["a_si"]["step"] == 0


@pytest.mark.slow
def test_intervals_of_unseen_speakers_are_over_speakers(summary):
    """Where the speakers were not in training."""
    assert summary.get("by_speaker") is True and summary["intervals"] == table_export.INTERVALS[True]


@pytest.mark.slow
def test_examples_have_audio_files(folder, summary):
    from avsi_jax.media import clip_io

    shown = [(e["clip_id"], e["gap_ms"]) for e in summary["examples"]]
    assert 2 < len(shown) <= 6 and len(set(shown)) == len(shown) and {g for _, g in shown} == set(GAP_MS)
    assert {e["why"] for e in summary["examples"]} == {"", "among the best", "among the worst"}
    for example in summary["examples"]:
        waveforms = {name: clip_io.read_clip(folder / path).audio for name, path in example["audio"].items()}
        assert set(waveforms) == {"original", *SYSTEMS}
        start, end = (round(example[k] * 16_000) for k in ("start_s", "end_s"))
        original = waveforms["original"].samples[:, 0]
        for name, audio in waveforms.items():
            x = audio.samples[:, 0]
            assert audio.rate == 16_000 and len(x) == len(original)
            np.testing.assert_array_equal(np.delete(x, np.s_[start:end]), np.delete(original, np.s_[start:end]))
            assert x[start:end].any() == (name != "masked audio")
    assert (folder / "report.html").stat().st_size > 100_000


# -------------------------------------------------------------------------------------------------------------------- again


@pytest.mark.slow
def test_results_are_replaced_only_with_overwrite(runs, folder):
    before = (folder / "clips.csv").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite") as error:
        cli.evaluate(eval_config(), runs / "system")
    assert "\n" not in str(error.value) and (folder / "clips.csv").read_bytes() == before


@pytest.mark.slow
def test_a_second_run_gives_the_same_bytes(runs, rows, folder, monkeypatch):
    """It replaces the first one only once it is complete."""
    before = (folder / "clips.csv").read_bytes()
    copy = Path(shutil.copytree(runs / "system", runs / "again"))
    replaced, write_report, seen = copy / "eval" / folder.name, report.write_report, []
    old = {p: p.read_bytes() for p in replaced.rglob("*") if p.is_file()}

    def look_and_write(new):
        seen.append({p: p.read_bytes() for p in replaced.rglob("*") if p.is_file()})
        return write_report(new)

    monkeypatch.setattr(report, "write_report", look_and_write)
    cli.evaluate(eval_config(workers=2), copy, baseline=runs / "baseline", overwrite=True)
    assert seen == [old] and any(p.suffix == ".flac" for p in old), "until the last file is written, the old results are there"
    assert (replaced / "clips.csv").read_bytes() == before and [p.name for p in replaced.parent.iterdir()] == [folder.name]


@pytest.mark.slow
def test_cached_references_give_the_same_bytes(runs, rows, folder, cache):
    """Masked audio, interpolation and oracle mel are scored once for a split and protocol, for all systems."""
    cached = list((cache / "avsi_jax" / "references").glob("*.csv"))
    assert len(cached) == 1 and {r["kind"] for r in read_file(cached[0])} == {"masked", "interpolation", "oracle_mel"}
    copy = Path(shutil.copytree(runs / "system", runs / "cached"))
    shutil.rmtree(copy / "eval", ignore_errors=True)
    again = cli.evaluate(eval_config(), copy, baseline=runs / "baseline")
    summary = json.loads((again / "summary.json").read_text())
    assert summary["references"] == "cached" and (again / "clips.csv").read_bytes() == (folder / "clips.csv").read_bytes()
    assert summary["num_scored"] == 3 * len(GAP_MS) * 2  # the system, with its own and with another clip's video


@pytest.mark.slow
def test_an_evaluation_of_an_older_checkpoint_of_the_baseline_is_refused(runs, folder):
    newer = Path(shutil.copytree(runs / "baseline", runs / "newer"))
    config = eval_config()
    path = cli.results_folder(config, newer) / "summary.json"
    summary = json.loads(path.read_text())
    summary["runs"]["a_si"]["step"] = 99
    path.write_text(json.dumps(summary))
    copy = Path(shutil.copytree(runs / "system", runs / "beside_newer"))
    shutil.rmtree(copy / "eval", ignore_errors=True)
    with pytest.raises(ValueError, match="step 99, but checkpoint 'best' is now of step 0.*--overwrite"):
        cli.evaluate(config, copy, baseline=newer)


@pytest.mark.slow
def test_a_baseline_with_other_gaps_is_refused(runs, folder):
    copy = Path(shutil.copytree(runs / "system", runs / "other_gaps"))
    shutil.rmtree(copy / "eval", ignore_errors=True)
    with pytest.raises(ValueError, match="has other clips or gaps"):
        cli.evaluate(eval_config(gap_ms="300,"), copy, baseline=runs / "baseline")


def fake_track_all(jobs, num_workers, progress):
    """Replaces `occlusion.track_all`: other landmarks for every change, a hidden mouth in the painted frames."""
    results = []
    for _, points, _, changes in jobs:
        tracked = {}
        for i, (key, _, _, first, last) in enumerate(changes):
            mouth = np.ones(len(points), bool)
            mouth[first:last] = False
            tracked[key] = points + np.sin(np.arange(len(points)) * (i + 1))[:, None, None], np.ones_like(mouth), mouth
        results.append(tracked)
    return results


SLOW_SUITES = ("streams", "robustness", "multigap", "occlusion")


@pytest.mark.slow
@pytest.mark.parametrize("suite", [pytest.param(s, marks=pytest.mark.slow) for s in SLOW_SUITES])
def test_a_suite_has_a_row_for_every_case(runs, suite, monkeypatch):
    """References that a case does not change are not scored again."""
    from avsi_jax.evaluation import conditions

    copy = runs / f"suite_{suite}"
    shutil.copytree(runs / "system", copy)
    monkeypatch.setattr(occlusion, "find_videos", lambda raw, clips: {clip: raw / clip for clip in clips})
    monkeypatch.setattr(occlusion, "track_all", fake_track_all)
    chosen = eval_config(suite=suite, gap_ms="600,", max_clips=2, examples=1, batch_size=2)
    folder = cli.evaluate(chosen, copy, raw=runs / "videos")
    rows = read(folder)
    found = [(r["case"], int(r["gap_ms"])) for r in rows if r["kind"] == "system"]
    assert sorted(set(found)) == sorted((c.name, c.gap_ms) for c in conditions.SUITES[suite]((600,)))
    assert len(found) == 2 * len(set(found))
    masked = {r["case"] for r in rows if r["kind"] == "masked"}
    assert masked == {c.name for c in conditions.SUITES[suite]((600,)) if c.changes_references}
    assert all(r["gap_l1_db"] for r in rows)
    if suite == "robustness":
        own = [r for r in rows if r["kind"] == "system" and r["clip_id"] == rows[0]["clip_id"]]
        error = {r["case"]: float(r["gap_l1_mel_db"]) for r in own}
        assert len(set(error.values())) > len(error) / 2, "the network's input differs from case to case"


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["peer", pytest.param("paper", marks=pytest.mark.slow)])
def test_results_of_other_protocols_are_labelled_as_such(runs, protocol):
    copy = runs / f"protocol_{protocol}"
    shutil.copytree(runs / "system", copy)
    gap_ms = "()" if protocol == "paper" else "320,"
    chosen = eval_config(protocol=protocol, gap_ms=gap_ms, max_clips=2, examples=1, other_video=False)
    folder = cli.evaluate(chosen, copy)
    summary, rows = json.loads((folder / "summary.json").read_text()), read(folder)
    assert {r["kind"] for r in rows} == {"masked", "interpolation", "system", "oracle_mel"}, (
        "no row for another clip's video, as configured"
    )
    assert summary["protocol"] == protocol and protocol in summary["title"] and folder.name == f"{protocol}-test-lengths"
    assert summary["metric_rate"] == {"peer": 16_000, "paper": 8_000}[protocol]
    assert all((r["pesq_wb"] != "") == (protocol == "peer") and r["pesq_nb"] for r in rows)
    if protocol == "paper":
        assert {len(r["gaps_s"].split()) for r in rows} <= set(range(1, 9)) and {r["case"] for r in rows} == {"paper_gaps=8"}


@pytest.mark.slow
def test_two_runs_of_one_system_get_different_names(runs):
    """A run against itself one epoch earlier; with one clip, so that there is no other clip's video."""
    earlier = Path(shutil.copytree(runs / "system", runs / "earlier"))
    shutil.rmtree(earlier / "checkpoints" / "4")
    shutil.rmtree(earlier / "eval", ignore_errors=True)
    config = eval_config(split="validation", max_clips=1, gap_ms="300,")
    folder = cli.evaluate(config, runs / "system", baseline=earlier)
    summary = json.loads((folder / "summary.json").read_text())
    assert {name: run["step"] for name, run in summary["runs"].items()} == {"av_mtl_s2s": 4, "av_mtl_s2s (baseline)": 2}
    assert [p for p in summary["paired"] if p["b"] == "av_mtl_s2s (baseline)" and p["metric"] == "gap_l1_mel_db" and p["mean"]]
    rows = read(folder)
    assert len({r["clip_id"] for r in rows}) == 1 and (runs / "system" / "eval" / "waveform-validation-lengths").is_dir()


# ------------------------------------------------------------------------------------------------------------------- choices


def test_a_selection_is_evenly_spread():
    spread = run_systems.spread
    assert spread(list("abcdefghij"), 2) == ["c", "h"] and spread(list("abc"), 5) == list("abc")
    assert spread(list("abc"), 3) == list("abc") and spread(list("abc"), 0) == []


def test_the_other_clip_is_the_speakers_next_one():
    partner = run_systems.other_clips({"a": "s1", "b": "s2", "c": "s1", "d": "s1", "e": "s3"})
    assert {k: partner[k] for k in "acd"} == {"a": "c", "c": "d", "d": "a"}
    assert partner["b"] == "c" and partner["e"] == "a", "the only clip of a speaker takes the next clip of any speaker"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no --workdir given"),
        (["--workdir={tmp}"], "no config.json in {tmp}"),
        (["--workdir={run}", "--config.split=tset"], "no split 'tset'"),
        (["--workdir={run}", "--config.protocol=papers"], "config.protocol: found 'papers', expected waveform or paper or peer"),
        (["--workdir={run}", "--config.protocol=paper", "--config.suite=multigap"], "config.protocol=paper draws its own gaps"),
        (["--workdir={run}", "--config.suite=occlusion"], "expected --raw=DIR with the videos of the dataset"),
        (["--workdir={run}", "--config.suite=occlusion", "--config.split=test", "--raw=nowhere"], "--raw=nowhere: no such folder"),
        (["--workdir={run}", "--config.protocol=peer", "--config.suite=multigap"], "config.protocol=peer has one gap"),
        (["--workdir={run}", "--config.suite=unseen"], "found config.split=test_seen, expected test"),
        (["--workdir={run}", "--config.judge={run}", "--config.split=test"], "expected a recognizer"),
        (["--workdir={run}", "--config.suite=all"], "config.suite: found 'all', expected lengths"),
        (["--workdir={run}", "--config.gap_ms=5,300"], "config.gap_ms: found (5, 300), expected lengths between 20 and 3000 ms"),
        (["--workdir={run}", "--config.gap_ms=a,b"], "config.gap_ms: found 'a,b', expected tuple such as"),
        (["--workdir={run}", "--config.gap_ms='300',"], "config.gap_ms"),
        (["--workdir={run}", "--config.checkpoint=17", "--config.split=test"], "no checkpoint 17"),
        (["--workdir={run}", "--baseline={tmp}", "--config.split=test"], "no config.json in {tmp}"),
        (["--workdir={run}", "--config=tiny"], "eval"),
        (["--workdir={run}", "--config.splitt=test"], "no field config.splitt (did you mean split"),
        (["--workdir={run}", "--split=test"], "unknown argument '--split=test'"),
    ],
)
def test_a_wrong_command_line_gives_one_line(trained, tmp_path, capsys, arguments, says):
    run = shutil.copytree(trained, tmp_path / "run")
    (empty := tmp_path / "empty").mkdir()
    assert cli.main([a.format(tmp=empty, run=run) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("avsi-evaluate: ") and err.count("\n") == 1 and says.format(tmp=empty) in err


def test_a_repeated_gap_length_is_refused_at_once():
    with pytest.raises(ValueError, match="config.gap_ms"):
        cli.check(eval_config(gap_ms="300,900,300"))


@pytest.mark.slow
def test_a_baseline_of_another_preset_is_refused(runs, untrained_a_si, tmp_path):
    shutil.copytree(untrained_a_si, tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    from avsi_jax.training import checkpoints, train_step

    wide = configs.load("a_si", [("preset", "wide"), ("units", str(config["units"])), ("layers", str(config["layers"]))])
    shutil.rmtree(tmp_path / "wide" / "checkpoints")
    (tmp_path / "wide" / "config.json").write_text(wide.to_json())
    scale = {"mean": [-7.0], "std": [2.2]}
    (tmp_path / "wide" / "statistics.json").write_text(json.dumps({"level": scale, "motion": None}))
    saved = checkpoints.Checkpoints(tmp_path / "wide")
    saved.save(0, train_step.init_state(wide, 1), {}, 0.0)
    saved.close()
    with pytest.raises(ValueError, match="--baseline has preset wide, the system paper"):
        cli.evaluate(eval_config(), runs / "system", baseline=tmp_path / "wide", overwrite=True)
