"""Scores against the packages they come from and librosa, awkward sounds, crashed workers, intervals against scipy."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from avsi_jax import media, metrics, spec

GAP_S = (1.0, 1.5)


def speech_like(rate, seconds=2.0, seed=0):
    """(N,) float32: a buzz with vibrato under syllables of about 4 a second, and a little noise."""
    t = np.arange(round(rate * seconds)) / rate
    rng = np.random.default_rng(seed)
    pitch = 2 * np.pi * np.cumsum(120 + 15 * np.sin(2 * np.pi * 3 * t)) / rate
    buzz = sum(np.sin(k * pitch) / k for k in range(1, 25) if 150 * k < rate / 2)
    syllables = np.clip(np.sin(2 * np.pi * 2 * t), 0, None) ** 0.5
    return (0.1 * buzz * syllables + 0.002 * rng.standard_normal(len(t))).astype(np.float32)


def damaged(x, rate, gap_s=GAP_S):
    y = x.copy()
    y[round(gap_s[0] * rate) : round(gap_s[1] * rate)] = 0
    return y


@pytest.fixture(scope="session")
def recording(grid_dir):
    """(N,) float32 at 16 kHz: a real clip, one and a half seconds of its middle."""
    sound = media.read_clip(sorted(grid_dir.glob("s1/*.mpg"))[0], pictures=False).sound
    x = media.resample(media.mono(sound.samples), sound.rate, 16_000)
    return np.ascontiguousarray(x[6_000:36_000])


# ---- one clip ----------------------------------------------------------------------------------------------------------------


def test_whole_clip_scores_are_the_packages_own(recording):
    import pesq
    import pystoi
    import soxr

    x, y = recording, damaged(recording, 16_000)
    row = metrics.score(x, y, 16_000, GAP_S)
    assert row["reason"] == "" and tuple(row) == (*metrics.SCORES, "reason")
    assert row["pesq_wb"] == pesq.pesq(16_000, x, y, "wb")
    low = [soxr.resample(s, 16_000, 8_000, quality="HQ") for s in (x, y)]
    assert row["pesq_nb"] == pesq.pesq(8_000, *low, "nb")
    assert row["stoi"] == pystoi.stoi(x, y, 16_000)
    np.random.seed(0)  # where the degraded sound is digital silence ESTOI is made of noise: unseeded it moves by 0.003 here
    assert row["estoi"] == pystoi.stoi(x, y, 16_000, extended=True)
    narrow = metrics.score(*low, 8_000, GAP_S)
    assert narrow["pesq_wb"] is None and narrow["reason"] == ""  # not applicable is no failure
    assert narrow["pesq_nb"] == row["pesq_nb"]
    assert narrow["gap_l1_db"] == pytest.approx(row["gap_l1_db"], rel=1e-6)


def test_equal_sounds_score_best(recording):
    row = metrics.score(recording, recording, 16_000, GAP_S)
    assert row["gap_l1_db"] == 0 and row["stoi"] == pytest.approx(1) and row["estoi"] == pytest.approx(1)
    assert row["pesq_nb"] == pytest.approx(4.5486, abs=1e-3)  # ITU-T P.862.1: raw 4.5 maps to 4.549
    assert row["pesq_wb"] == pytest.approx(4.6439, abs=1e-3)  # ITU-T P.862.2: 4.644


def test_scores_repeat_and_leave_numpy_alone():
    x = speech_like(16_000)
    y = damaged(x, 16_000)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first = metrics.score(x, y, 16_000, GAP_S)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(6)
    assert metrics.score(x, y, 16_000, GAP_S) == first


def librosa_gap_error(reference, degraded, start_s, end_s):
    """The paper's log-mel in librosa's own words; frame f is centred at f x 20 ms."""
    import librosa

    def decibel(x):
        x = np.append(x[0], x[1:] - 0.97 * x[:-1])
        magnitude = np.abs(librosa.stft(x, n_fft=510, win_length=320, hop_length=160, window="hann", pad_mode="constant"))
        mel = librosa.filters.mel(sr=8_000, n_fft=510, n_mels=64) @ magnitude
        return np.clip(20 * np.log10(np.maximum(1e-5, mel)), -80, 0)

    error = np.abs(decibel(reference) - decibel(degraded)).mean(0)
    centre = np.arange(error.size) * 0.02
    return error[(centre >= start_s) & (centre < end_s)].mean()


@pytest.mark.parametrize("gap_s", [(0.5, 0.8), (0.31, 1.7), (0.0, 0.1)])
def test_gap_error_is_librosas(gap_s):
    x = speech_like(8_000, seconds=2.0)
    y = (damaged(x, 8_000, gap_s) + 0.01 * speech_like(8_000, 2.0, seed=1)).astype(np.float32)
    expected = librosa_gap_error(x, y, *gap_s)
    assert expected > 1
    assert metrics.score(x, y, 8_000, gap_s)["gap_l1_db"] == pytest.approx(expected, rel=1e-5)
    frames = np.arange(1 + x.size // 160) * 0.02
    centred = ((frames >= gap_s[0] - 1e-9) & (frames < gap_s[1] - 1e-9))[None]
    assert float(metrics.gap_l1_db(x[None], y[None], centred)[0]) == pytest.approx(expected, rel=1e-5)


def test_gap_error_counts_frames_of_the_gap_alone():
    x = speech_like(8_000)
    far = x.copy()
    far[:4_000] = 0  # 0 to 0.5 s
    assert metrics.score(x, far, 8_000, (1.0, 1.5))["gap_l1_db"] == 0
    batch = np.stack([x, x]), np.stack([far, far])
    centred = np.zeros((2, 101), bool)
    centred[0, 5] = True
    errors = np.asarray(metrics.gap_l1_db(*batch, centred))
    assert errors[0] > 1 and math.isnan(errors[1])


def test_padding_to_whole_seconds_is_no_part_of_the_error():
    """Frames past the end of the clip do not count, those before it see the silence that ends every clip."""
    x = speech_like(8_000, seconds=23_824 / 8_000)  # the paper's clip
    y = damaged(x, 8_000, (2.6, 3.0))
    assert metrics.score(x, y, 8_000, (2.5, 3.5))["gap_l1_db"] == pytest.approx(librosa_gap_error(x, y, 2.5, 3.5), rel=1e-5)


# ---- awkward sounds ----------------------------------------------------------------------------------------------------------


def test_silent_restoration_is_a_row():
    x = speech_like(16_000)
    row = metrics.score(x, np.zeros_like(x), 16_000, GAP_S)
    assert row["pesq_nb"] is None and row["pesq_wb"] is None
    assert row["reason"] == "pesq_nb: the degraded sound is silent; pesq_wb: the degraded sound is silent"
    assert row["stoi"] == 0 and abs(row["estoi"]) < 0.05 and row["gap_l1_db"] > 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x, y: (np.zeros_like(x), y), "the reference sound is silent"),
        (lambda x, y: (x, np.where(np.arange(y.size) == 9, np.float32("nan"), y)), "the degraded sound holds NaN"),
        (lambda x, y: (np.where(np.arange(y.size) == 9, np.float32("inf"), x), y), "the reference sound holds NaN or infinite"),
        (lambda x, y: (x[:0], y[:0]), "is empty"),
        (lambda x, y: (x[:1_000], y[:1_000]), "pesq_nb: "),
        (lambda x, y: (x[:3_000], y[:3_000]), "stoi: Not enough STFT frames"),
    ],
)
def test_what_cannot_be_scored_says_why(change, says):
    x = speech_like(8_000)
    row = metrics.score(*change(x, damaged(x, 8_000)), 8_000, (0.01, 0.1))
    assert says in row["reason"] and "\n" not in row["reason"]
    assert row["stoi"] is None and row["estoi"] is None


def test_gap_without_a_frame():
    x = speech_like(8_000)
    row = metrics.score(x, x, 8_000, (2.5, 2.6))
    assert row["gap_l1_db"] is None and "gap_l1_db: no finite frame" in row["reason"] and row["stoi"] is not None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((np.ones(9), np.ones(9, np.float32), 8_000, GAP_S), "reference is ndarray float64"),
        ((np.ones((9, 1), np.float32), np.ones((9, 1), np.float32), 8_000, GAP_S), r"float32 \(9, 1\), expected"),
        ((np.ones(9, np.float32), np.ones(8, np.float32), 8_000, GAP_S), "9 reference and 8 degraded"),
        ((np.ones(9, np.float32), np.ones(9, np.float32), 44_100, GAP_S), "44100 Hz"),
        ((np.ones(9, np.float32), np.ones(9, np.float32), 8_000, (1.5, 1.0)), "gap 1.5 to 1.0 s"),
        ((np.ones(9, np.float32), np.ones(9, np.float32), 8_000, (math.nan, 1.0)), "gap nan"),
    ],
)
def test_ill_formed_input_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        metrics.score(*arguments)
    with pytest.raises(ValueError, match=f"item 0: .*{says}"):
        metrics.score_many([arguments], workers=0)


# ---- many clips --------------------------------------------------------------------------------------------------------------


def crash_on_a_quiet_clip(reference, degraded, rate):
    """In the place of metrics._quality: ends its process as a fault in C code would."""
    if np.abs(reference).max() < 0.01:
        os._exit(11)
    return {**dict.fromkeys(metrics.QUALITY), "stoi": float(reference.max()), "reason": ""}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crashed_worker_costs_its_own_clip(monkeypatch, workers):
    monkeypatch.setattr(metrics, "_quality", crash_on_a_quiet_clip)
    x = speech_like(8_000, seconds=0.5)
    gain = [1.0, 1.1, 0.001, 1.2, 1.3, 0.001, 1.4]
    items = [(np.float32(g) * x, x, 8_000, (0.1, 0.3)) for g in gain]
    seen = []
    rows = metrics.score_many(iter(items), workers=workers, progress=lambda *of: seen.append(of))
    assert [row["stoi"] for row in rows] == [None if g < 0.01 else float(np.max(np.float32(g) * x)) for g in gain]
    assert ["crashed" in row["reason"] for row in rows] == [g < 0.01 for g in gain]
    assert all(row["gap_l1_db"] is not None for row in rows)
    assert seen == [(i + 1, None) for i in range(len(gain))]


def test_many_are_as_one_by_one_in_order():
    sounds = [speech_like(rate, seconds, seed) for rate, seconds, seed in ((8_000, 1.6, 0), (16_000, 1.6, 1), (8_000, 2.3, 2))]
    items = [(x, damaged(x, rate), rate, (1.0, 1.2)) for x, rate in zip(sounds, (8_000, 16_000, 8_000))]
    seen = []
    rows = metrics.score_many(items, workers=2, progress=lambda *of: seen.append(of))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for row, item in zip(rows, items):
        alone = metrics.score(*item)
        assert row["reason"] == alone["reason"] == ""
        for metric in metrics.SCORES:
            assert row[metric] == pytest.approx(alone[metric], abs=2e-6), metric  # BLAS threads differ, see metrics._stoi
    assert metrics.score_many([]) == []
    assert metrics.score_many([metrics.Item(*items[0])._asdict()], workers=0) == [metrics.score(*items[0])]


def test_workers_load_neither_jax_nor_the_callers_script():
    """What a worker imports is this file's top level and pesq, pystoi; a script without a main guard must not run twice."""
    script = (
        "import sys, numpy as np; print('started'); sys.path.insert(0, 'tests')\n"
        "from avsi_jax import metrics; import test_metrics\n"
        "metrics._quality = test_metrics.what_is_loaded\n"
        "x = np.ones(8000, np.float32); print(metrics.score_many([(x, x, 8000, (0.1, 0.5))], workers=1)[0]['reason'])"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["started", "nothing"], done.stderr


def what_is_loaded(reference, degraded, rate):
    loaded = [name for name in ("jax", "tensorflow", "librosa", "av", "matplotlib") if name in sys.modules]
    return {**dict.fromkeys(metrics.QUALITY), "reason": ",".join(loaded) or "nothing"}


# ---- text --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truth", "said", "characters", "words"),
    [
        ("bin blue at f two now", "bin blue at f two now", 0, 0),
        ("bin blue at f two now", "bin blue at s two now", 1 / 21, 1 / 6),  # one substitution in 21 characters, 6 words
        ("bin blue", "bin", 5 / 8, 1 / 2),  # ' blue' deleted
        ("at f", "at f f", 2 / 4, 1 / 2),  # ' f' inserted
        ("a", "bin", 3 / 1, 1 / 1),  # one substitution, two insertions: above 1
        ("at f", "", 1, 1),
    ],
)
def test_text_errors_by_hand(truth, said, characters, words):
    assert metrics.character_error(truth, said) == pytest.approx(characters)
    assert metrics.word_error(truth, said) == pytest.approx(words)


def test_no_text_no_error_rate():
    assert math.isnan(metrics.character_error("", "bin")) and math.isnan(metrics.word_error(" ", ""))


# ---- means and intervals -----------------------------------------------------------------------------------------------------


def test_interval_is_scipys():
    from scipy import stats

    values = np.random.default_rng(3).gamma(2.0, size=200)
    mean, low, high = metrics.bootstrap_mean(values, n=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    width = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.03 * width) and high == pytest.approx(theirs.high, abs=0.03 * width)


def test_interval_repeats_and_leaves_nan_out():
    values = np.random.default_rng(0).standard_normal(50)
    with_nan = np.insert(values, [0, 20], np.nan)
    assert metrics.bootstrap_mean(values) == metrics.bootstrap_mean(with_nan)
    assert metrics.bootstrap_mean(values, seed=1) != metrics.bootstrap_mean(values)
    assert metrics.bootstrap_mean([3.0]) == (3, 3, 3)
    assert all(map(math.isnan, metrics.bootstrap_mean([np.nan])))


def test_interval_over_speakers_is_that_of_few_speakers():
    """Clips that agree within their speaker say no more than one clip a speaker: the interval is the bootstrap of 4 values."""
    speakers = np.repeat(["s1", "s2", "s3", "s4"], 100)
    level = np.repeat([0.0, 1.0, 2.0, 5.0], 100)
    mean, low, high = metrics.bootstrap_mean(level, groups=speakers)
    draws = np.random.default_rng(9).choice([0.0, 1.0, 2.0, 5.0], size=(50_000, 4)).mean(1)
    assert mean == 2 and (low, high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.26)  # means lie 0.25 apart
    _, low_clips, high_clips = metrics.bootstrap_mean(level)
    assert high - low > 3 * (high_clips - low_clips)


def test_interval_over_one_speaker_is_that_over_clips():
    values = np.random.default_rng(2).standard_normal(300)
    one, none = metrics.bootstrap_mean(values, groups=["s1"] * 300), metrics.bootstrap_mean(values)
    assert one == pytest.approx(none, abs=0.02)


def test_paired_difference_sees_what_two_intervals_do_not():
    rng = np.random.default_rng(0)
    b = rng.standard_normal(300)
    a = b + 0.05 + 0.01 * rng.standard_normal(300)
    mean, low, high = metrics.paired_difference(a, b)
    assert 0.045 < low < mean < high < 0.055
    assert metrics.bootstrap_mean(a)[1] < metrics.bootstrap_mean(b)[2]  # the intervals of the two overlap
    with pytest.raises(ValueError, match="same clips"):
        metrics.paired_difference(a, b[:1])


def test_summary_by_hand():
    def row(clip_id, gap_ms, system, stoi, **more):
        return {"clip_id": clip_id, "speaker": clip_id[:2], "gap_ms": gap_ms, "system": system, "stoi": stoi, **more}

    rows = [
        row("s1a", 600, "ours", 0.8),
        row("s1a", 300, "ours", "0.9", pesq_wb=""),  # as csv gives it
        row("s2b", 300, "ours", 0.7),
        row("s3c", 300, "ours", None),
        row("s2b", 300, "damaged", 0.5),
        row("s1a", 300, "damaged", 0.6),
        row("s3c", 300, "damaged", 0.1),
        row("s4d", 300, "damaged", 0.2),
    ]
    summary = metrics.summarise(rows, ("stoi", "pesq_wb"), [("ours", "damaged")])
    short = [(r["gap_ms"], r["system"], r["metric"], pytest.approx(r["mean"]), r["n"], r["missing"]) for r in summary["table"]]
    assert short == [(300, "ours", "stoi", 0.8, 2, 1), (300, "damaged", "stoi", 0.35, 4, 0), (600, "ours", "stoi", 0.8, 1, 0)]
    (pair,) = summary["paired"]
    assert pair == {"gap_ms": 300, "a": "ours", "b": "damaged", "metric": "stoi", "n": 2, "missing": 1} | {
        k: pair[k] for k in ("mean", "low", "high")
    }
    assert pair["mean"] == pytest.approx(0.25) and pair["low"] == pytest.approx(0.2) and pair["high"] == pytest.approx(0.3)
    by_speaker = metrics.summarise(rows, ("stoi",), [], by_speaker=True)["table"]
    assert [r["mean"] for r in by_speaker] == [r["mean"] for r in summary["table"]]
    with pytest.raises(ValueError, match="two rows of s1a, 300 ms, ours"):
        metrics.summarise([*rows, rows[1] | {}], ("stoi",), [])


def test_frames_counted_are_the_protocols():
    """The score and gaps.centred_frames count the same frames: 0.31 to 1.7 s at 20 ms a frame is frames 16 to 84."""
    from avsi_jax import gaps

    gap = np.array([[round(0.31 * spec.RECORD_RATE), round(1.7 * spec.RECORD_RATE)]])
    assert np.flatnonzero(gaps.centred_frames(gap, spec.get("paper"), 149)).tolist() == list(range(16, 85))
