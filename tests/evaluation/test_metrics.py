"""Scores against the packages they come from and librosa; silent, short and invalid audio; workers that crash or hang."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from avsi_jax import presets
from avsi_jax.evaluation import metrics
from avsi_jax.media import clip_io

GAP_S = (1.0, 1.5)
GAPS_S = (GAP_S,)


def speech_like(rate, seconds=2.0, seed=0):
    """(N,) float32: a buzz with vibrato in about 4 syllables per second, with a little noise."""
    t = np.arange(round(rate * seconds)) / rate
    rng = np.random.default_rng(seed)
    pitch = 2 * np.pi * np.cumsum(120 + 15 * np.sin(2 * np.pi * 3 * t)) / rate
    buzz = sum(np.sin(k * pitch) / k for k in range(1, 25) if 150 * k < rate / 2)
    syllables = np.clip(np.sin(2 * np.pi * 2 * t), 0, None) ** 0.5
    return (0.1 * buzz * syllables + 0.002 * rng.standard_normal(len(t))).astype(np.float32)


def masked(x, rate, gap_s=GAP_S):
    y = x.copy()
    y[round(gap_s[0] * rate) : round(gap_s[1] * rate)] = 0
    return y


@pytest.fixture(scope="session")
def recording(grid_dir):
    """(N,) float32 at 16 kHz: the middle part of a real clip."""
    audio = clip_io.read_clip(sorted(grid_dir.glob("s1/*.mpg"))[0], video=False).audio
    x = clip_io.resample(clip_io.mono(audio.samples), audio.rate, 16_000)
    return np.ascontiguousarray(x[6_000:36_000])


# ---- one clip ----------------------------------------------------------------------------------------------------------------


def test_whole_clip_scores_are_those_of_the_packages(recording):
    import pesq
    import pystoi
    import soxr

    x, y = recording, masked(recording, 16_000)
    row = metrics.score(x, y, 16_000, GAPS_S)
    assert row["reason"] == "" and tuple(row) == (*metrics.SCORES, "reason")
    assert row["pesq_wb"] == pesq.pesq(16_000, x, y, "wb")
    low = [soxr.resample(s, 16_000, 8_000, quality="HQ") for s in (x, y)]
    assert row["pesq_nb"] == pesq.pesq(8_000, *low, "nb")
    assert row["stoi"] == pystoi.stoi(x, y, 16_000)
    np.random.seed(0)  # in digital silence ESTOI depends on numpy's noise: unseeded it varies by 0.003 here
    assert row["estoi"] == pystoi.stoi(x, y, 16_000, extended=True)
    assert row["stoi_gap"] == pystoi.stoi(x[12_800:27_200], y[12_800:27_200], 16_000)  # 0.8 to 1.7 s
    narrow = metrics.score(*low, 8_000, GAPS_S)
    assert narrow["pesq_wb"] is None and narrow["reason"] == ""  # not applicable is not a failure
    assert narrow["pesq_nb"] == row["pesq_nb"]
    assert narrow["gap_l1_db"] == pytest.approx(row["gap_l1_db"], rel=1e-6)


def test_equal_waveforms_get_the_best_scores(recording):
    row = metrics.score(recording, recording, 16_000, GAPS_S)
    assert row["gap_l1_db"] == row["level_error_db"] == 0 and [row[m] for m in ("stoi", "estoi", "stoi_gap")] == pytest.approx(
        [1, 1, 1]
    )
    assert row["pesq_nb"] == pytest.approx(4.5486, abs=1e-3)  # ITU-T P.862.1: raw 4.5 maps to 4.549
    assert row["pesq_wb"] == pytest.approx(4.6439, abs=1e-3)  # ITU-T P.862.2: 4.644


def test_scores_repeat_and_do_not_change_numpys_random_state():
    x = speech_like(16_000)
    y = masked(x, 16_000)
    first = metrics.score(x, y, 16_000, GAPS_S)  # also imports jax, which draws from numpy's generator
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    assert metrics.score(x, y, 16_000, GAPS_S) == first
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(6)
    assert metrics.score(x, y, 16_000, GAPS_S) == first


def test_the_level_error_is_that_of_the_power_in_the_gaps():
    """Half the amplitude in one of two gaps of equal power: 10 log10(5 / 8) dB; audio outside the gaps does not count."""
    rate = 8_000
    x = np.where(np.arange(2 * rate) % 2, 0.25, -0.25).astype(np.float32)
    gaps_s = [(0.25, 0.5), (1.0, 1.25)]
    y = masked(x, rate, (1.5, 2.0))
    y[rate : rate * 5 // 4] /= 2
    assert metrics.score(x, y, rate, gaps_s)["level_error_db"] == pytest.approx(10 * np.log10(5 / 8))
    silent = masked(x, rate, (0.25, 0.5))
    assert metrics.score(x, silent, rate, gaps_s[:1])["level_error_db"] == pytest.approx(-80 - 20 * np.log10(0.25)), (
        "silence: -80 dB"
    )


def librosa_gap_error(reference, degraded, *gaps_s):
    """The paper's log-mel computed with librosa; frame f is centred at f x 20 ms."""
    import librosa

    def decibel(x):
        x = np.append(x[0], x[1:] - 0.97 * x[:-1])
        magnitude = np.abs(librosa.stft(x, n_fft=510, win_length=320, hop_length=160, window="hann", pad_mode="constant"))
        mel = librosa.filters.mel(sr=8_000, n_fft=510, n_mels=64) @ magnitude
        return np.clip(20 * np.log10(np.maximum(1e-5, mel)), -80, 0)

    error = np.abs(decibel(reference) - decibel(degraded)).mean(0)
    return error[inside_of(error.size, gaps_s)].mean()


def inside_of(frames, gaps_s):
    centre = np.arange(frames) * 0.02
    return np.any([(centre >= start - 1e-9) & (centre < end - 1e-9) for start, end in gaps_s], axis=0)


@pytest.mark.parametrize("gaps_s", [[(0.5, 0.8)], [(0.31, 1.7)], [(0.0, 0.1), (1.5, 1.9), (0.06, 0.16)]])
def test_the_gap_error_is_that_of_librosa(gaps_s):
    x = y = speech_like(8_000, seconds=2.0)
    for gap_s in gaps_s:
        y = masked(y, 8_000, gap_s)
    y = (y + 0.01 * speech_like(8_000, 2.0, seed=1)).astype(np.float32)
    expected = librosa_gap_error(x, y, *gaps_s)
    assert expected > 1
    assert metrics.score(x, y, 8_000, gaps_s)["gap_l1_db"] == pytest.approx(expected, rel=1e-5)
    centred = inside_of(1 + x.size // 160, gaps_s)[None]
    assert float(metrics.gap_l1_db(x[None], y[None], centred)[0]) == pytest.approx(expected, rel=1e-5)


def test_the_gap_error_counts_only_frames_in_the_gap():
    x = speech_like(8_000)
    far = x.copy()
    far[:4_000] = 0  # 0 to 0.5 s
    assert metrics.score(x, far, 8_000, GAPS_S)["gap_l1_db"] == 0
    batch = np.stack([x, x]), np.stack([far, far])
    centred = np.zeros((2, 101), bool)
    centred[0, 5] = True
    errors = np.asarray(metrics.gap_l1_db(*batch, centred))
    assert errors[0] > 1 and math.isnan(errors[1])


def test_padding_to_full_seconds_does_not_change_the_error():
    """Frames after the end of the clip do not count; those before it include the silence after the clip."""
    x = speech_like(8_000, seconds=23_824 / 8_000)  # the paper's clip
    y = masked(x, 8_000, (2.6, 3.0))
    assert metrics.score(x, y, 8_000, [(2.5, 3.5)])["gap_l1_db"] == pytest.approx(librosa_gap_error(x, y, (2.5, 3.5)), rel=1e-5)


# ---- STOI of the gap ---------------------------------------------------------------------------------------------------------


def test_stoi_of_several_gaps_is_the_weighted_mean_of_their_excerpts():
    """Two gaps 0.4 s apart or nearer are one excerpt; the last one ends with the clip."""
    import pystoi

    rate, gaps_s = 8_000, ((3.7, 3.9), (0.5, 0.7), (1.0, 1.4))
    x = speech_like(rate, seconds=4.0)
    noise = np.random.default_rng(1).standard_normal(x.size) * np.linspace(0.002, 0.05, x.size)
    y = (x + noise).astype(np.float32)
    parts = [(0.3, 1.6), (3.5, 4.0)]
    each = [pystoi.stoi(x[round(a * rate) : round(b * rate)], y[round(a * rate) : round(b * rate)], rate) for a, b in parts]
    assert each[0] != pytest.approx(each[1], abs=0.01)
    row = metrics.score(x, y, rate, gaps_s)
    assert row["stoi_gap"] == pytest.approx((1.3 * each[0] + 0.5 * each[1]) / 1.8, rel=1e-12) and row["reason"] == ""


def test_an_excerpt_without_speech_is_left_out_with_a_reason():
    import pystoi

    rate = 8_000
    x = speech_like(rate, seconds=3.0)
    x[: round(0.9 * rate)] = 0  # gap 0.2 to 0.5 s: the recording is silent there
    y = masked(x, rate, (2.0, 2.2))
    row = metrics.score(x, y, rate, ((0.2, 0.5), (2.0, 2.2)))
    assert row["stoi_gap"] == pystoi.stoi(x[14_400:19_200], y[14_400:19_200], rate)
    assert row["reason"] == "stoi_gap: only 1 of 2 excerpts, the others contain too little speech"
    row = metrics.score(x, y, rate, ((0.2, 0.5),))
    assert row["stoi_gap"] is None and row["reason"] == "stoi_gap: too little speech in and around the gaps"
    assert row["stoi"] is not None


# ---- unusual audio -----------------------------------------------------------------------------------------------------------


def test_silent_restored_audio_gives_a_row_with_a_reason():
    x = speech_like(16_000)
    row = metrics.score(x, np.zeros_like(x), 16_000, GAPS_S)
    assert row["pesq_nb"] is None and row["pesq_wb"] is None
    assert row["reason"] == "pesq_nb: the degraded audio is silent; pesq_wb: the degraded audio is silent"
    assert row["stoi"] == row["stoi_gap"] == 0 and abs(row["estoi"]) < 0.05 and row["gap_l1_db"] > 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x, y: (np.zeros_like(x), y), "the reference audio is silent"),
        (lambda x, y: (x, np.where(np.arange(y.size) == 9, np.float32("nan"), y)), "the degraded audio contains NaN"),
        (lambda x, y: (np.where(np.arange(y.size) == 9, np.float32("inf"), x), y), "the reference audio contains NaN or infinite"),
        (lambda x, y: (x[:0], y[:0]), "is empty"),
        (lambda x, y: (x[:1_000], y[:1_000]), "pesq_nb: "),
        (lambda x, y: (x[:3_000], y[:3_000]), "stoi: fewer than 30 frames (0.4 s) of speech"),
        (lambda x, y: (x[4_000:4_001], y[4_000:4_001]), "stoi: fewer than 30 frames (0.4 s) of speech"),
    ],
)
def test_audio_that_cannot_be_scored_gives_a_reason(change, says):
    x = speech_like(8_000)
    row = metrics.score(*change(x, masked(x, 8_000)), 8_000, [(0.01, 0.1)])
    assert says in row["reason"] and "\n" not in row["reason"]
    assert row["stoi"] is None and row["estoi"] is None and row["stoi_gap"] is None


def test_a_gap_after_the_end_of_the_clip_gives_a_reason():
    x = speech_like(8_000)
    row = metrics.score(x, x, 8_000, [(2.5, 2.6)])
    assert row["gap_l1_db"] is None and row["stoi_gap"] is None and row["stoi"] is not None
    no_gap = [f"{metric}: no gap begins in the clip" for metric in ("stoi_gap", "level_error_db")]
    assert row["reason"].split("; ") == [*no_gap, "gap_l1_db: no finite frame is centred in a gap"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((np.ones(9), np.ones(9, np.float32), 8_000, GAPS_S), "reference is ndarray float64"),
        ((np.ones((9, 1), np.float32), np.ones((9, 1), np.float32), 8_000, GAPS_S), r"float32 \(9, 1\), expected"),
        ((np.ones(9, np.float32), np.ones(8, np.float32), 8_000, GAPS_S), "9 reference and 8 degraded"),
        ((np.ones(9, np.float32), np.ones(9, np.float32), 44_100, GAPS_S), "44100 Hz"),
        ((np.ones(9, np.float32), np.ones(9, np.float32), 8_000, ((0.1, 0.2), (1.5, 1.0))), "gap 1.5 to 1.0 s"),
        ((np.ones(9, np.float32), np.ones(9, np.float32), 8_000, ((math.nan, 1.0),)), "gap nan"),
        ((np.ones(9, np.float32), np.ones(9, np.float32), 8_000, ((0.1, math.inf),)), "gap 0.1 to inf"),
        ((np.ones(9, np.float32), np.ones(9, np.float32), 8_000, ((-0.1, 0.2),)), "gap -0.1"),
        ((np.ones(9, np.float32), np.ones(9, np.float32), 8_000, GAP_S), r"gaps_s is \(1.0, 1.5\), expected .* as in \(\("),
        ((np.ones(9, np.float32), np.ones(9, np.float32), 8_000, ()), r"gaps_s is \(\), expected"),
    ],
)
def test_malformed_input_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        metrics.score(*arguments)
    with pytest.raises(ValueError, match=f"item 0: .*{says}"):
        metrics.score_many([arguments], workers=0)


# ---- of spectrograms ---------------------------------------------------------------------------------------------------------


def test_ssim_and_psnr_are_those_of_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(149, 64)).astype(np.float32)
    for y in (np.clip(x + 0.1 * rng.standard_normal(x.shape), 0, 1), x * (np.arange(149) % 50 > 10)[:, None], 1 - x):
        y = y.astype(np.float32)
        assert metrics.ssim(x, y) == pytest.approx(skimage.structural_similarity(x, y, data_range=1.0), abs=1e-5)
        assert metrics.psnr(x, y) == pytest.approx(skimage.peak_signal_noise_ratio(x, y, data_range=1.0), abs=1e-4)
    assert metrics.ssim(x, x) == pytest.approx(1) and metrics.psnr(x, x) == math.inf
    assert math.isnan(metrics.ssim(x[:6], x[:6]))


# ---- many clips --------------------------------------------------------------------------------------------------------------


def crash_on_a_quiet_clip(reference, degraded, rate, gaps_s):
    """Replaces metrics._quality: crashes the process as a fault in C code would."""
    if np.abs(reference).max() < 0.01:
        os.kill(os.getpid(), signal.SIGSEGV)
    return {**dict.fromkeys(metrics.QUALITY), "stoi": float(reference.max()), "reason": ""}


def test_a_crash_affects_only_its_own_clip(monkeypatch):
    monkeypatch.setattr(metrics, "_quality", crash_on_a_quiet_clip)
    x = speech_like(8_000, seconds=0.5)
    gain = [1.0, 1.1, 0.001, 1.2, 1.3, 0.001, 1.4]
    items = [(np.float32(g) * x, x, 8_000, [(0.1, 0.3)]) for g in gain]
    seen = []
    rows = metrics.score_many(iter(items), workers=2, progress=lambda *args: seen.append(args))
    assert [row["stoi"] for row in rows] == [None if g < 0.01 else float(np.max(np.float32(g) * x)) for g in gain]
    crashed = "PESQ or STOI crashed with SIGSEGV"
    assert [row["reason"] for row in rows] == [crashed if g < 0.01 else "" for g in gain]
    assert all(row["gap_l1_db"] is not None for row in rows)
    assert seen == [(i + 1, None) for i in range(len(gain))]


def faults_by_loudness(reference, degraded, rate, gaps_s):
    """Replaces metrics._quality: loud clips crash or hang, the others are scored as usual."""
    if reference.size and reference.max() >= 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if reference.size and reference.max() >= 2:
        time.sleep(600)
    return metrics._quality(reference, degraded, rate, gaps_s)


@pytest.mark.slow
def test_every_clip_gives_a_row_in_order(monkeypatch):
    """Difficult clips from a generator, by two workers: one row each, with a reason where a score is missing."""
    rate = 8_000
    x, y = speech_like(rate, seconds=1.6), masked(speech_like(rate, seconds=1.6), rate, (0.9, 1.1))
    loud = lambda top: (x / x.max() * top).astype(np.float32)
    with_nan = np.where(np.arange(x.size) == 99, np.float32("nan"), y)
    difficult = [
        (x, y, [(0.9, 1.1)], r"^$"),
        (np.zeros_like(x), y, [(0.9, 1.1)], r"^the reference audio is silent$"),
        (loud(3.0), y, [(0.9, 1.1)], r"^PESQ or STOI crashed with SIGSEGV$"),
        (x, with_nan, [(0.9, 1.1)], r"^the degraded audio contains NaN or infinite samples; gap_l1_db: no finite frame"),
        (x[:0], y[:0], [(0.9, 1.1)], r"^the reference audio is empty; gap_l1_db: no finite frame"),
        (loud(2.0), y, [(0.9, 1.1)], r"^PESQ or STOI took more than 6 s$"),
        (x[:900], y[:900], [(0.0, 0.1)], r"^pesq_nb: .*; stoi: fewer than 30 .*; estoi: .*; stoi_gap: too little speech[^;]*$"),
        (x, np.zeros_like(x), [(0.9, 1.1)], r"^pesq_nb: the degraded audio is silent$"),
        (
            x,
            y,
            [(1.7, 1.9)],
            r"^stoi_gap: no gap begins in the clip; level_error_db: no gap .*; gap_l1_db: no finite frame is centred in a gap$",
        ),
        (x, (x + y) / 2, [(0.9, 1.1)], r"^$"),
    ]
    monkeypatch.setattr(metrics, "_quality", faults_by_loudness)
    rows = metrics.score_many(((a, b, rate, gaps_s) for a, b, gaps_s, _ in difficult), workers=2, timeout_s=6)
    for row, (*_, says) in zip(rows, difficult, strict=True):
        assert tuple(row) == (*metrics.SCORES, "reason") and re.search(says, row["reason"]), row["reason"]
        known = {m for m in metrics.SCORES if row[m] is not None}
        assert all(math.isfinite(row[m]) for m in known)
        assert (known == {*metrics.SCORES} - {"pesq_wb", "plcmos", "dnsmos"}) == (row["reason"] == "")
    assert rows[7]["stoi"] == 0 and rows[8]["pesq_nb"] == rows[0]["pesq_nb"] != rows[9]["pesq_nb"]


def test_input_is_read_as_workers_become_free(monkeypatch):
    """Of 60 clips, never more than the workers' queues are read ahead."""
    monkeypatch.setattr(metrics, "_quality", crash_on_a_quiet_clip)
    monkeypatch.setattr(metrics, "_gap_errors", lambda batch, size: [0.0] * len(batch))
    done, ahead = [0], []

    def items():
        for i in range(60):
            ahead.append(i - done[0])
            yield np.full(4_000, 0.1 + i, np.float32), np.ones(4_000, np.float32), 8_000, [(0.1, 0.2)]

    rows = metrics.score_many(items(), workers=2, progress=lambda n, total: done.__setitem__(0, n))
    assert [row["stoi"] for row in rows] == pytest.approx([0.1 + i for i in range(60)])
    assert 2 < max(ahead) < 2 * metrics.AHEAD


@pytest.mark.slow
def test_many_clips_get_the_same_scores_as_single_ones():
    waveforms = [speech_like(rate, seconds, seed) for rate, seconds, seed in ((8_000, 1.6, 0), (16_000, 1.6, 1), (8_000, 2.3, 2))]
    items = [(x, masked(x, rate), rate, [(1.0, 1.2)]) for x, rate in zip(waveforms, (8_000, 16_000, 8_000))]
    seen = []
    rows = metrics.score_many(items, workers=2, progress=lambda *args: seen.append(args))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for row, item in zip(rows, items):
        alone = metrics.score(*item)
        assert row["reason"] == alone["reason"] == ""
        for metric in metrics.SCORES:
            wanted = alone[metric] and pytest.approx(alone[metric], rel=1e-6, abs=2e-6)  # BLAS threads differ, see metrics._stoi
            assert row[metric] == wanted, metric
    assert metrics.score_many([]) == []
    assert metrics.score_many([metrics.Item(*items[0])._asdict()], workers=0) == [metrics.score(*items[0])]


@pytest.mark.slow
def test_workers_import_neither_jax_nor_the_callers_script():
    """A worker imports metrics.py, pesq and pystoi; a script without a main guard must not run twice."""
    script = (
        "import sys, numpy as np; print('started')\n"
        "from avsi_jax.evaluation import metrics; from tests.evaluation import test_metrics\n"
        "metrics._quality = test_metrics.what_is_loaded\n"
        "x = np.ones(8000, np.float32); print(metrics.score_many([(x, x, 8000, [(0.1, 0.5)])], workers=1)[0]['reason'])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["started", "nothing"], done.stderr


def what_is_loaded(reference, degraded, rate, gaps_s):
    loaded = [name for name in ("jax", "tensorflow", "librosa", "av", "matplotlib") if name in sys.modules]
    return {**dict.fromkeys(metrics.QUALITY), "reason": ",".join(loaded) or "nothing"}


# ---- text --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "transcript", "characters", "words"),
    [
        ("bin blue at f two now", "bin blue at f two now", 0, 0),
        ("bin blue at f two now", "bin blue at s two now", 1 / 21, 1 / 6),  # one substitution in 21 characters, 6 words
        ("bin blue", "bin", 5 / 8, 1 / 2),  # ' blue' deleted
        ("at f", "at f f", 2 / 4, 1 / 2),  # ' f' inserted
        ("a", "bin", 3 / 1, 1 / 1),  # one substitution, two insertions: above 1
        ("at f", "", 1, 1),
    ],
)
def test_text_errors_computed_by_hand(reference, transcript, characters, words):
    assert metrics.character_error(reference, transcript) == pytest.approx(characters)
    assert metrics.word_error(reference, transcript) == pytest.approx(words)


def test_without_a_reference_text_the_error_is_nan():
    assert math.isnan(metrics.character_error("", "bin")) and math.isnan(metrics.word_error(" ", ""))


def test_centred_frames_are_those_of_the_score():
    """gap_masks.centred_frames for 0.31 to 1.7 s at 20 ms per frame: frames 16 to 84."""
    from avsi_jax.audio import gap_masks

    gap = np.array([[round(0.31 * presets.RECORD_RATE), round(1.7 * presets.RECORD_RATE)]])
    assert np.flatnonzero(gap_masks.centred_frames(gap, presets.get("paper"), 149)).tolist() == list(range(16, 85))
