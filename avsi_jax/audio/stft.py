"""Spectrograms: decimation, pre-emphasis, STFT and its inverse, mel bands and levels, for one preset (`presets.Spec`).

All functions are pure, differentiable jax.numpy. Conventions are librosa's (Hann window, zero padding at both ends if centred,
Slaney mel on magnitudes), because the paper's code used librosa; the tests compare every function with librosa or scipy. A
"level" is the scaled log magnitude that networks see; decibels are for reports.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from avsi_jax.presets import RECORD_RATE, Spec

FIR_BLOCK = 128  # output samples per matrix product
FIR_HALF_TAPS = 64  # taps of the decimation filter on each side, in record samples: 4 ms
DB_FLOOR = -80.0  # of the 'db' level and of every reported log-mel error
MEL_BASES = Path(__file__).parent / "mel_bases.npz"
MIN_MAGNITUDE = 1e-5  # floor under the logarithm of the 'db' level (-100 dB, then clipped to DB_FLOOR)


# ---- rate ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def decimation_filter(factor: int) -> np.ndarray:
    """Zero-phase low-pass FIR (2 * FIR_HALF_TAPS + 1,) for decimation by `factor`: Kaiser window, 80 dB, unit gain at 0 Hz."""
    at, cutoff = np.arange(-FIR_HALF_TAPS, FIR_HALF_TAPS + 1), 0.94 / factor
    taps = np.sinc(cutoff * at) * np.kaiser(len(at), 0.1102 * (80.0 - 8.7))  # as scipy.signal.firwin, whose import takes a second
    return (taps / taps.sum()).astype(np.float32)


def decimate(audio: jax.Array, spec: Spec) -> jax.Array:
    """(..., N) at RECORD_RATE -> (..., ceil(N / factor)) at the preset's rate; sample n is centred on record sample factor * n."""
    if spec.decimation == 1:
        return audio
    return through_filter(audio, decimation_filter(spec.decimation), spec.decimation)


def through_filter(x: jax.Array, taps: np.ndarray, factor: int) -> jax.Array:
    """Convolves (..., N) with symmetric taps (2 * FIR_HALF_TAPS + 1,) and keeps every `factor`-th sample: (..., ceil(N / factor)).

    Computed block by block as a product with a banded matrix of the taps: for a one-channel convolution the TPU compiler estimates
    fifty times the cost of the rest of a training step (docs/tpu.md).
    """
    hop, (n,) = factor * FIR_BLOCK, x.shape[-1:]
    samples = -(-n // factor)
    blocks = -(-samples // FIR_BLOCK)
    ends = (FIR_HALF_TAPS, (blocks + 1) * hop - n - FIR_HALF_TAPS)
    cut = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), ends]).reshape(*x.shape[:-1], blocks + 1, hop)
    windows = jnp.concatenate([cut[..., :-1, :], cut[..., 1:, : 2 * FIR_HALF_TAPS]], -1)
    band = np.zeros((hop + 2 * FIR_HALF_TAPS, FIR_BLOCK), np.float32)
    for k in range(FIR_BLOCK):
        band[factor * k : factor * k + len(taps), k] = taps
    out = jnp.matmul(windows, band, precision="highest")
    return out.reshape(*x.shape[:-1], -1)[..., :samples]


def pre_emphasise(audio: jax.Array, spec: Spec) -> jax.Array:
    """Pre-emphasis y[n] = x[n] - a x[n-1] with x[-1] = 0. (..., N) -> (..., N)."""
    if not spec.pre_emphasis:
        return audio
    before = jnp.concatenate([jnp.zeros_like(audio[..., :1]), audio[..., :-1]], -1)
    return audio - spec.pre_emphasis * before


def de_emphasise(audio: jax.Array, spec: Spec, start: jax.Array | float = 0.0) -> jax.Array:
    """Inverse of `pre_emphasise`: y[n] = x[n] + a y[n-1], y[-1] = start. (..., N) -> (..., N)."""
    if not spec.pre_emphasis:
        return audio
    samples = jnp.moveaxis(audio, -1, 0)

    def next_sample(last, x):
        y = x + spec.pre_emphasis * last
        return y, y

    first = jnp.broadcast_to(start, samples.shape[1:]).astype(audio.dtype)
    return jnp.moveaxis(jax.lax.scan(next_sample, first, samples)[1], 0, -1)


# ---- short-time Fourier transform ----------------------------------------------------------------------------------------------


@functools.cache
def hann(spec: Spec) -> np.ndarray:
    """Periodic Hann window of `spec.window` samples, zero-padded on both sides to (n_fft,), as librosa does."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(spec.window) / spec.window)
    left = (spec.n_fft - spec.window) // 2
    return np.pad(window, (left, spec.n_fft - spec.window - left)).astype(np.float32)


def along_last(vector: jax.typing.ArrayLike, ndim: int) -> jax.Array:
    """Reshapes (n,) to (1, ..., 1, n) with `ndim` axes, so that broadcasting is explicit and rank promotion can stay disabled."""
    return jnp.asarray(vector).reshape((1,) * (ndim - 1) + (-1,))


def _padding(num_samples: int, spec: Spec) -> tuple[int, int]:
    """Numbers of zeros before and after the audio so that frame f covers padded samples [f * hop, f * hop + n_fft)."""
    frames = spec.frames_of(num_samples)
    left = spec.n_fft // 2 if spec.centred else (spec.n_fft - spec.window) // 2
    return left, max(0, (frames - 1) * spec.hop + spec.n_fft - left - num_samples)


def _frames(audio: jax.Array, spec: Spec) -> jax.Array:
    """(..., N) -> (..., F, n_fft), not windowed; built from whole hops, which a TPU copies instead of gathering samples."""
    n, frames, pieces = audio.shape[-1], spec.frames_of(audio.shape[-1]), -(-spec.n_fft // spec.hop)
    left, total = _padding(n, spec)[0], (frames - 1 + pieces) * spec.hop
    hops = jnp.pad(audio, [*[(0, 0)] * (audio.ndim - 1), (left, max(0, total - left - n))])[..., :total]
    hops = hops.reshape(*audio.shape[:-1], -1, spec.hop)
    return jnp.concatenate([hops[..., k : k + frames, :] for k in range(pieces)], -1)[..., : spec.n_fft]


def stft(audio: jax.Array, spec: Spec) -> jax.Array:
    """Short-time Fourier transform: (..., N) float32 at the preset's rate -> complex64 (..., F, n_fft // 2 + 1)."""
    return jnp.fft.rfft(_frames(audio, spec) * along_last(hann(spec), audio.ndim + 1), axis=-1)


def frames_containing(marked: jax.Array, spec: Spec) -> jax.Array:
    """Marked samples, bool (..., N) at the preset's rate -> bool (..., F): frames in which any of them has non-zero weight."""
    return (_frames(marked.astype(jnp.float32), spec) * along_last(hann(spec), marked.ndim + 1)).any(-1)


def istft(spectrum: jax.Array, spec: Spec, num_samples: int, floor: float = 1e-8) -> jax.Array:
    """Least-squares inverse of `stft` (Griffin & Lim 1984, eq. 6): overlap-add of windowed frames over the sum of squared windows.

    Complex (..., F, bins) -> (..., num_samples); exact for an unmodified `stft` wherever a window covers the sample. At the ends of
    a clip, where the squared windows sum to less than `floor`, the audio fades out instead: those samples are covered only by the
    edge of one window, and a modified spectrum would be amplified there without limit.
    """
    frames = jnp.fft.irfft(spectrum, n=spec.n_fft, axis=-1) * along_last(hann(spec), spectrum.ndim)
    left, right = _padding(num_samples, spec)
    total = left + num_samples + right
    norm = _overlap_add(jnp.broadcast_to(hann(spec) ** 2, (spectrum.shape[-2], spec.n_fft)), spec, total)
    audio = _overlap_add(frames, spec, total)
    audio = audio * along_last(1.0 / jnp.maximum(norm, floor), audio.ndim)  # rounds the same in any batch, unlike x / y
    return audio[..., left : left + num_samples]


def _overlap_add(frames: jax.Array, spec: Spec, total: int) -> jax.Array:
    """Sums shifted frames, (..., F, n_fft) -> (..., total); frames are cut into hops so that each cut is one dense addition."""
    pieces = -(-spec.n_fft // spec.hop)
    num = frames.shape[-2]
    lead = [(0, 0)] * (frames.ndim - 2)
    cut = jnp.pad(frames, [*lead, (0, 0), (0, pieces * spec.hop - spec.n_fft)])
    cut = cut.reshape(*frames.shape[:-1], pieces, spec.hop)
    rows = sum(jnp.pad(cut[..., p, :], [*lead, (p, pieces - 1 - p), (0, 0)]) for p in range(pieces))
    flat = rows.reshape(*frames.shape[:-2], (num + pieces - 1) * spec.hop)
    return jnp.pad(flat, [*lead, (0, max(0, total - flat.shape[-1]))])[..., :total]


# ---- bands and levels ----------------------------------------------------------------------------------------------------------


@functools.cache
def mel_basis(spec: Spec) -> np.ndarray:
    """Mel filters (K, n_fft // 2 + 1) float32: librosa's Slaney filters from 0 to rate / 2, or the identity on a linear scale.

    The filters of the presets are stored in mel_bases.npz, because importing librosa takes seconds.
    """
    if spec.scale == "linear":
        return np.eye(spec.bands, dtype=np.float32)
    with np.load(MEL_BASES, allow_pickle=False) as stored:
        if (name := _basis_name(spec)) in stored:
            return stored[name]
    import librosa

    return librosa.filters.mel(sr=spec.rate, n_fft=spec.n_fft, n_mels=spec.bands, fmin=0.0, fmax=spec.rate / 2)


def _basis_name(spec: Spec) -> str:
    return f"{spec.rate}-{spec.n_fft}-{spec.bands}"


def write_mel_bases(specs: Iterable[Spec]) -> None:
    """Writes MEL_BASES with librosa's filters. Run after a change of the presets:

    python -c "from avsi_jax import presets; from avsi_jax.audio import stft; stft.write_mel_bases(presets.PRESETS.values())"
    """
    import librosa

    bases = {_basis_name(s): librosa.filters.mel(sr=s.rate, n_fft=s.n_fft, n_mels=s.bands) for s in specs if s.scale != "linear"}
    np.savez_compressed(MEL_BASES, **bases)


def band_magnitude(audio: jax.Array, spec: Spec) -> jax.Array:
    """(..., N) -> linear band magnitudes (..., F, K) of the pre-emphasised audio."""
    magnitude = jnp.abs(stft(pre_emphasise(audio, spec), spec))
    return magnitude if spec.scale == "linear" else jnp.matmul(magnitude, jnp.asarray(mel_basis(spec)).T, precision="highest")


def level_from_magnitude(magnitude: jax.Array, spec: Spec) -> jax.Array:
    """Band magnitudes -> level ('db': 0 at -80 dB and below, 1 at 0 dB; 'log': natural logarithm)."""
    if spec.level == "log":
        return jnp.log(magnitude + spec.log_floor)
    decibel = 20.0 / np.log(10.0) * jnp.log(jnp.maximum(MIN_MAGNITUDE, magnitude))
    return jnp.clip((decibel - DB_FLOOR) / -DB_FLOOR, 0.0, 1.0)


def magnitude_from_level(level: jax.Array, spec: Spec) -> jax.Array:
    """Inverse of `level_from_magnitude` within its range; never negative."""
    if spec.level == "log":
        return jnp.maximum(jnp.exp(level) - spec.log_floor, 0.0)
    return 10.0 ** (to_db(jnp.clip(level, 0.0, 1.0), spec) / 20.0)


def to_db(level: jax.Array, spec: Spec) -> jax.Array:
    """Level -> dB of full scale, at least DB_FLOOR; accepts numpy and jax arrays."""
    if spec.level == "log":
        return jnp.maximum(level * (20.0 / np.log(10.0)), DB_FLOOR)
    return jnp.clip(level, 0.0, 1.0) * -DB_FLOOR + DB_FLOOR


def db_per_level(spec: Spec) -> float:
    """Decibels per unit of level: 80 for 'db', 8.69 for 'log'."""
    return -DB_FLOOR if spec.level == "db" else float(20.0 / np.log(10.0))


def silence_level(spec: Spec) -> float:
    """The level of digital silence: 0 for 'db', ln(floor) for 'log'."""
    return 0.0 if spec.level == "db" else float(np.log(spec.log_floor))


def log_mel(audio: jax.Array, spec: Spec) -> jax.Array:
    """(..., N) float32 in [-1, 1] at the preset's rate -> level (..., F, K)."""
    return level_from_magnitude(band_magnitude(audio, spec), spec)


def log_mel_of_record(audio: jax.Array, spec: Spec) -> jax.Array:
    """Decimation, then `log_mel`: (..., record_samples) float32 at RECORD_RATE -> level (..., F, K).

    ValueError for another number of samples.
    """
    expected = spec.record_samples
    if audio.shape[-1] != expected:
        raise ValueError(f"preset {spec.name}: expected {expected} samples at {RECORD_RATE} Hz, found {audio.shape[-1]}")
    return log_mel(decimate(audio, spec), spec)
