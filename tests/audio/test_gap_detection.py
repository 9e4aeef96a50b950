"""Gap detection: artificial gaps are detected at their true position, clean audio has none, and block sizes do not matter."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avsi_jax.audio import gap_detection, repeat_detection
from avsi_jax.media import clip_io

ROOT = Path(__file__).resolve().parents[2]
RESERVED = "RESERVED.txt"


def speech_like(rate: int, seconds: float, seed: int = 0, channels: int = 1) -> np.ndarray:
    """(N, C) float32 with 16-bit resolution: bursts of a buzz with varying pitch over noise at -60 dB."""
    rng, n = np.random.default_rng(seed), round(seconds * rate)
    t = np.arange(n) / rate
    pitch = 120 + 25 * np.sin(2 * np.pi * 0.7 * t) + np.cumsum(rng.normal(0, 2, n)) / np.sqrt(rate)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    voice = sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 12) if k * 160 < rate / 2)
    loud = 0.15 * np.clip(np.sin(2 * np.pi * 1.1 * t), 0, 1)
    x = loud * (voice + 0.1 * rng.normal(size=n)) + 1e-3 * rng.normal(size=n)
    x = x[:, None] * (1 - 0.2 * np.arange(channels))
    return (np.round(np.clip(x, -1, 1) * 32767) / 32768).astype(np.float32)


def detected(x, rate):
    return [(gap.start, gap.end, gap.kind) for gap in gap_detection.detect_gaps(x, rate)]


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_silence_is_detected_to_the_sample(rate, channels):
    x = speech_like(rate, 4.0, 1, channels)
    assert detected(x, rate) == []
    start, end = round(1.13 * rate), round(1.31 * rate)
    x[start:end] = 0
    ((first, last, kind),) = detected(x, rate)
    assert kind == "silence" and abs(first - start) <= 2 and abs(last - end) <= 2


def test_a_constant_value_is_a_silence_and_a_dead_channel_is_ignored():
    x = speech_like(16000, 4.0, 2)
    dead = np.concatenate([x, np.zeros_like(x)], 1)
    assert detected(dead, 16000) == []
    x[20000:23000] = 0.3
    ((first, last, kind),) = detected(x, 16000)
    assert kind == "silence" and abs(first - 20000) <= 2 and abs(last - 23000) <= 2


def test_a_repeated_packet_is_detected_and_a_tone_is_not():
    rate, packet = 16000, 480
    x = speech_like(rate, 4.0, 3)
    for n in range(20000, 20000 + 3 * packet, packet):
        x[n : n + packet] = 0.9 * x[n - packet : n]
    ((first, last, kind),) = detected(np.round(x * 32768) / 32768, rate)
    assert kind == "repeat" and abs(first - 20000) <= 16 and abs(last - 20000 - 3 * packet) <= 16
    tone = 0.3 * np.sin(2 * np.pi * 400 * np.arange(4 * rate) / rate)[:, None]
    assert detected(tone.astype(np.float32), rate) == []


def test_a_copy_after_lossy_coding_is_detected_and_a_periodic_voice_with_breath_noise_is_not():
    rate, rng, packet = 16000, np.random.default_rng(11), 320
    noise = rng.normal(size=4 * rate)
    spectrum, hz = np.fft.rfft(noise), np.fft.rfftfreq(len(noise), 1 / rate)
    low, high = (np.fft.irfft(spectrum * band) for band in (hz < 900, (hz > 900) & (hz < 4500)))
    copied = 0.2 * (low + high)
    for n in range(20000, 20000 + 4 * packet, packet):
        copied[n : n + packet] = copied[n - packet : n]
    coded = copied + 0.02 * copied.std() * np.convolve(rng.normal(size=len(copied)), [1, 0.9, 0.5], "same")
    ((first, last, kind),) = detected(coded[:, None].astype(np.float32), rate)
    assert kind == "repeat" and abs(first - 20000) <= 160 and abs(last - 20000 - 4 * packet) <= 160
    phase = 2 * np.pi * 50 * np.arange(4 * rate) / rate  # every packet of 20 ms equals the previous one except for the breath noise
    buzz = sum(np.sin(k * phase + rng.uniform(0, 6)) for k in range(1, 19))
    assert detected((0.02 * buzz + 0.003 * high)[:, None].astype(np.float32), rate) == []


def test_silence_at_the_ends_and_gated_pauses_are_not_gaps():
    rate = 16000
    x = speech_like(rate, 4.0, 4)
    assert detected(np.pad(x, ((8000, 5000), (0, 0))), rate) == []
    open_at = np.sin(2 * np.pi * 1.1 * np.arange(len(x)) / rate) > 0.02
    held = np.convolve(open_at, np.ones(round(0.06 * rate)))[: len(x), None] > 0.5
    assert detected(np.where(held, x, 0).astype(np.float32), rate) == []


def test_a_gate_that_chatters_in_noise_is_not_a_gap_and_a_missing_word_in_noise_is():
    rate, rng = 16000, np.random.default_rng(8)
    x = (1e-3 * rng.normal(size=(8 * rate, 1))).astype(np.float32)
    x[: rate // 2] *= np.linspace(0, 1, rate // 2, dtype=np.float32)[:, None]
    word = 100 * x[rate : round(1.4 * rate)]
    for at in (1.0, 1.6, 2.2, 5.0, 6.0, 7.0):  # only noise from 2.6 to 5
        x[round(at * rate) : round((at + 0.4) * rate)] += word
    gated, masked = x.copy(), x.copy()
    for at in (1.45, 2.05, 2.65, 2.8, 5.5, 6.6):  # a gate between words, at least 50 ms after them
        gated[round(at * rate) : round((at + 0.1) * rate)] = 0
    assert detected(gated, rate) == []
    masked[round(5.9 * rate) : round(6.5 * rate)] = 0
    ((first, last, kind),) = detected(masked, rate)
    assert kind == "silence" and abs(first - 5.9 * rate) <= 2 and abs(last - 6.5 * rate) <= 2


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_silence_that_cuts_speech_on_one_side_only_is_a_gap(side):
    rate, rng = 16000, np.random.default_rng(9)
    x = (1e-3 * rng.normal(size=(4 * rate, 1))).astype(np.float32)
    for at in (0.5, 1.5, 2.5):
        x[round(at * rate) : round((at + 0.5) * rate)] += 100 * x[: rate // 2]
    at = 1.95 if side == "before" else 1.45
    x[round(at * rate) : round((at + 0.1) * rate)] = 0
    ((first, last, kind),) = detected(x, rate)
    assert kind == "silence" and abs(first - at * rate) <= 2 and abs(last - (at + 0.1) * rate) <= 2


def test_detection_does_not_import_scipy():
    code = (
        "import sys, numpy as np; from avsi_jax.audio import gap_detection\n"
        "gap_detection.detect_gaps(np.ones((9000, 1)), 8000); assert 'scipy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("pops", [1, 3])
def test_pops_at_the_ends_of_a_silence_belong_to_the_gap(pops):
    rate, (start, end) = 48_000, (50_000, 60_000)
    x = speech_like(rate, 3.0, 12, 2)
    x[start:end] = 0
    x[start : start + pops], x[end - pops : end] = 0.9, -0.9
    ((first, last, kind),) = detected(x, rate)
    assert (first, last, kind) == (start, end, "silence")


def test_silent_and_empty_audio_have_no_gaps():
    for n in (0, 1, 7, 100, 16000, 16000 * 80):
        assert detected(np.zeros((n, 1), np.float32), 16000) == []


def speech_with_gaps(rate, seed, channels=1, seconds=31.0):
    """speech_like with gaps of all kinds."""
    x, rng = speech_like(rate, seconds, seed, channels), np.random.default_rng(seed)
    for start in np.cumsum(rng.uniform(0.3, 1.5, 25)):
        a = round(start * rate)
        b, kind = a + round(rng.uniform(0.02, 0.25) * rate), rng.integers(3)
        if b < len(x):
            x[a:b] = [np.zeros_like(x[a:b]), x[2 * a - b : a], np.clip(20 * x[a:b], -1, 1)][kind]
    return x


@pytest.mark.parametrize("seed", range(4))
def test_gaps_do_not_depend_on_the_block_sizes(seed):
    rate, rng = (8000, 11025)[seed % 2], np.random.default_rng(seed)
    x = speech_with_gaps(rate, seed, 1 + seed // 2)
    expected = gap_detection.detect_gaps(x, rate)
    assert len(expected) > 5 and all(a.end < b.start for a, b in zip(expected, expected[1:], strict=False))
    detector, gaps, at = gap_detection.GapDetector(rate), [], 0
    while at < len(x):
        size = int(rng.choice([1, 100, 4096, 50_000]) * rng.uniform(0.5, 1.5)) + 1
        block = x[at : at + size].copy()
        gaps += detector.feed(block)
        block[:] = 9  # the caller may reuse the block
        at += size
    assert gaps + detector.end() == expected


@pytest.mark.parametrize("minimum", [1, 7, 511, 577, 1025])
def test_fast_lengths_are_scipys(minimum):
    from scipy import fft

    assert repeat_detection.fast_length(minimum) == fft.next_fast_len(minimum, real=True)


def test_memory_does_not_grow_with_the_audio():
    rate, sizes = 8000, []
    detector, block = gap_detection.GapDetector(rate), speech_with_gaps(8000, 5, seconds=20.0)
    for i in range(20):
        detector.feed(block if i % 3 else np.zeros_like(block))
        sizes.append(len(detector._levels) + sum(map(len, detector._blocks)) + len(detector._pending) + len(detector._returned))
    assert max(sizes[10:]) <= 1.2 * max(sizes[5:10])


@pytest.fixture(scope="module")
def recordings(grid_dir):
    """Six real clips of several speakers."""
    reserved = set((grid_dir / RESERVED).read_text().split()) if (grid_dir / RESERVED).exists() else set()
    paths = [p for p in sorted(grid_dir.glob("s*/*.mpg")) if p.stem not in reserved]
    return [clip_io.read_clip(p, video=False).audio for p in paths[:: max(1, len(paths) // 6)][:6]]


def test_real_clips_have_no_gaps(recordings):
    assert [gap for audio in recordings for gap in gap_detection.detect_gaps(audio.samples, audio.rate)] == []


def in_8_bits(audio, rate):
    """(N, C) of the clip at a rate, rounded to steps of 1/128."""
    return np.clip(np.rint(128 * clip_io.resample(audio.samples, audio.rate, rate)), -128, 127).astype(np.float32) / 128


@pytest.mark.parametrize("rate", [8000, 44_100])
def test_real_clips_in_8_bits_have_no_gaps(recordings, rate):
    """Quiet sounds round to a constant, and what is left of a voice repeats itself."""
    assert [gap for audio in recordings for gap in gap_detection.detect_gaps(in_8_bits(audio, rate), rate)] == []


def test_a_silence_in_loud_speech_of_8_bits_is_detected(recordings):
    """In the middle of the loudest 0.2 s of the clips."""
    num_detected = 0
    for audio in recordings:
        x = in_8_bits(audio, audio.rate)
        length = round(0.2 * audio.rate)
        start = int(np.argmax(np.convolve(np.abs(x).max(1), np.ones(length), "valid")))
        start += length // 4
        x[start : start + length // 2] = 0
        num_detected += any(abs(first - start) < 100 for first, _, _ in detected(x, audio.rate))
    assert num_detected >= len(recordings) / 2


@pytest.mark.parametrize(
    ("kind", "recall", "precision"),
    [("silence", 0.9, 0.9), ("constant", 0.9, 0.9), ("packets", 0.85, 0.9), ("repeat", 0.8, 0.8), ("clipped", 0.5, 0.5)],
)
def test_artificial_gaps_in_real_clips_are_detected(recordings, kind, recall, precision):
    from benchmarks.quality import gap_detection as bench

    rng, counts = np.random.default_rng(0), bench.collections.Counter()
    for audio in recordings[:4]:
        y, truth = bench.apply_damage(audio.samples, audio.rate, kind, rng)
        y, rate = bench.encode_and_decode(y, audio.rate, "wav")
        missing = [span for span in truth if bench.contains_speech(audio.samples, rate, *span)]
        either = [span for span in truth if span not in missing]
        counts.update(bench.score(missing, bench.detect(y, rate), len(y), rate, either))
    assert counts["truth"] and counts["hit"] >= recall * counts["truth"] and counts["right"] >= precision * counts["detected"]


@pytest.mark.slow
def test_ten_minutes_of_clean_audio_have_no_gaps_across_chunks():
    x = np.tile(speech_like(44100, 20.0, 6, 2), (30, 1))
    assert gap_detection.detect_gaps(x, 44100) == []
