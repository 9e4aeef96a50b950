"""Griffin-Lim vocoder: level spectrogram and known samples -> waveform.

Griffin & Lim (1984) with the momentum of Perraudin, Balazs & Soendergaard (2013), batched and jitted:
- `inpaint_gap` works inside a gap and restores the known samples in every iteration, so that the result joins both edges;
- `whole_clip` and `griffin_lim` synthesise a full clip;
- `paper_inversion` inverts a spectrogram as the paper's code does, for the `paper` protocol only.
The initial phases of a clip come from its own seed, so the result does not depend on the batch. Quality and speed of each:
docs/vocoder.md.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from avsi_jax.audio import stft
from avsi_jax.presets import Spec
from avsi_jax.runtime import cpu_batching

ITERATIONS = 30  # in a gap, where the context fixes the phases: more do not improve the audio (docs/vocoder.md)
CLIP_ITERATIONS = 60  # of a full clip, without known samples
MOMENTUM = 0.99
INVERSION_ITERATIONS = 15  # remaining mel error below 0.01 dB; more iterations are not audible
EDGE_FLOOR = 0.25  # of the summed squared windows, which are 0.5 to 2 inside a clip: see stft.istft
SPANS = (0.125, 0.33, 0.55, 1.0)  # shares of a clip's frames; the frames that a gap affects are rounded up to one of these
PAPER_ITERATIONS = 300
PAPER_FLOOR = 1e-10
PAPER_POWER = 1.5


# ---- bands to bins -------------------------------------------------------------------------------------------------------------


@functools.cache
def _inversion(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Mel basis (K, bins) and its pseudo-inverse (bins, K), float32."""
    basis = stft.mel_basis(spec)
    return basis, np.linalg.pinv(basis).astype(np.float32)


_exact = functools.partial(jnp.matmul, precision="highest")


def mel_to_magnitude(bands: jax.Array, spec: Spec) -> jax.Array:
    """Linear band magnitudes (..., F, K) -> non-negative bin magnitudes (..., F, bins).

    Non-negative least squares by multiplicative updates (Lee & Seung 2001), starting from the floored pseudo-inverse. Unlike the
    pseudo-inverse it has no negative part to clip, so its mel matches the requested one.
    """
    if spec.scale == "linear":
        return jnp.maximum(bands, 0.0)
    basis, inverse = (jnp.asarray(a) for a in _inversion(spec))
    # Every bin starts with a share of the mean level of its bands: multiplicative updates cannot leave 0.
    smooth = bands / stft.along_last(jnp.maximum(basis.sum(-1), 1e-8), bands.ndim)
    smooth = _exact(smooth, basis)
    magnitude = jnp.maximum(_exact(bands, inverse.T), 0.0) + 0.1 * smooth + 1e-10
    numerator = _exact(bands, basis)

    def update(_, magnitude):
        return magnitude * (numerator / jnp.maximum(_exact(_exact(magnitude, basis.T), basis), 1e-12))

    return jax.lax.fori_loop(0, INVERSION_ITERATIONS, update, magnitude)


# ---- frames --------------------------------------------------------------------------------------------------------------------
# As in stft, but frames have `window` samples with the padding to n_fft behind them. This rotates the phase of a bin by the same
# angle in every frame, which does not matter to Griffin-Lim, and frames need no more hops than their windows.


def _pieces(spec: Spec) -> int:
    """Number of hops that a window overlaps."""
    return -(-spec.window // spec.hop)


def _lead(spec: Spec) -> int:
    """Number of zeros before the audio so that the window of frame f starts at sample f * hop."""
    return spec.n_fft // 2 - (spec.n_fft - spec.window) // 2 if spec.centred else 0


@functools.cache
def _window(spec: Spec) -> np.ndarray:
    """stft.hann without its zero padding: (window,)."""
    left = (spec.n_fft - spec.window) // 2
    return stft.hann(spec)[left : left + spec.window]


def _spectrum(hops: jax.Array, spec: Spec) -> jax.Array:
    """STFT of audio in hops (B, frames + pieces - 1, hop): complex (B, frames, bins)."""
    pieces, frames = _pieces(spec), hops.shape[1] - _pieces(spec) + 1
    size = max(spec.n_fft, pieces * spec.hop)
    window = np.pad(_window(spec), (0, pieces * spec.hop - spec.window)).reshape(pieces, spec.hop)

    # XLA fuses sums of padded pieces into one loop; concatenation takes twice as long on a CPU.
    def placed(p: int) -> jax.Array:
        padding = [(0, 0), (0, 0), (p * spec.hop, size - (p + 1) * spec.hop)]
        return jnp.pad(hops[:, p : p + frames] * stft.along_last(window[p], 3), padding)

    return jnp.fft.rfft(sum(map(placed, range(pieces)))[..., : spec.n_fft], axis=-1)


def _audio(spectrum: jax.Array, spec: Spec) -> jax.Array:
    """Least-squares inverse of `_spectrum`, faded out at the ends of a clip: see stft.istft."""
    frames, window = spectrum.shape[1], _window(spec)
    cut = jnp.fft.irfft(spectrum, n=spec.n_fft, axis=-1)[..., : spec.window] * stft.along_last(window, 3)
    weight = _overlap_add(np.broadcast_to(window**2, (1, frames, spec.window)), spec, np)
    return _overlap_add(cut, spec, jnp) * jnp.broadcast_to(1.0 / np.maximum(weight, EDGE_FLOOR), (1, *weight.shape[1:]))


def _overlap_add(cut, spec: Spec, lib):
    """(B, frames, window) -> (B, frames + pieces - 1, hop), by the array library `lib` (numpy or jax.numpy)."""
    pieces = _pieces(spec)
    cut = lib.pad(cut, [(0, 0), (0, 0), (0, pieces * spec.hop - spec.window)])
    parts = [cut[..., p * spec.hop : (p + 1) * spec.hop] for p in range(pieces)]
    return sum(lib.pad(part, [(0, 0), (p, pieces - 1 - p), (0, 0)]) for p, part in enumerate(parts))


def _to_hops(x: jax.Array, spec: Spec) -> jax.Array:
    """(B, N) -> (B, F + pieces - 1, hop), padded with zeros (False for bool)."""
    total = (spec.frames_of(x.shape[1]) + _pieces(spec) - 1) * spec.hop
    lead = _lead(spec)
    x = jnp.pad(x, [(0, 0), (lead, max(0, total - lead - x.shape[1]))])[:, :total]
    return x.reshape(len(x), -1, spec.hop)


def _from_hops(hops: jax.Array, spec: Spec, num_samples: int) -> jax.Array:
    """Inverse of `_to_hops`; samples after the window of the last frame are 0."""
    flat = hops.reshape(len(hops), -1)[:, _lead(spec) :][:, :num_samples]
    return jnp.pad(flat, [(0, 0), (0, num_samples - flat.shape[1])])


# ---- Griffin-Lim ---------------------------------------------------------------------------------------------------------------


def _unit(spectrum: jax.Array) -> jax.Array:
    """The spectrum scaled to magnitude 1."""
    power = jnp.real(spectrum) ** 2 + jnp.imag(spectrum) ** 2  # abs() also handles overflow, but takes twice as long
    return spectrum * jax.lax.rsqrt(jnp.maximum(power, 1e-30))


def _first_phases(shape: tuple, seeds: jax.Array) -> jax.Array:
    """Random phases (B, F, bins), complex of magnitude 1; those of a clip depend only on its seed."""
    turns = jax.vmap(lambda s: jax.random.uniform(jax.random.key(s), shape[1:]))(jnp.asarray(seeds))
    return jnp.exp(2j * np.pi * turns)


def _iterate(wanted, phases, held, free, spec: Spec, iterations: int, momentum: float) -> jax.Array:
    """Runs the iterations and returns audio in hops.

    wanted, phases: magnitudes and initial phases (B, frames, bins); held: the known audio in hops; free: bool, samples to fill.
    """
    share = momentum / (1 + momentum)

    def to_audio(phases):
        return jnp.where(free, _audio(wanted * phases, spec), held)

    def iterate(_, carry):
        audio, before = carry
        rebuilt = _spectrum(audio, spec)
        if not share:  # no momentum
            return to_audio(_unit(rebuilt)), before
        return to_audio(_unit(rebuilt - share * before)), rebuilt

    before = jnp.zeros_like(phases) if share else ()
    return jax.lax.fori_loop(0, iterations, iterate, (to_audio(phases), before))[0]


@cpu_batching.split_over_cores
@functools.partial(jax.jit, static_argnames=("spec", "length", "iterations", "momentum"))
def griffin_lim(
    magnitude: jax.Array,
    spec: Spec,
    *,
    length: int,
    seeds: jax.Array,
    iterations: int = CLIP_ITERATIONS,
    momentum: float = MOMENTUM,
) -> jax.Array:
    """Bin magnitudes (B, F, bins) -> audio (B, length) whose STFT approximates them; initial phases from `seeds` (B,) uint32.

    `momentum=0` is the original algorithm. ValueError if F does not match `length`.
    """
    if magnitude.shape[1] != spec.frames_of(length):
        raise ValueError(f"griffin_lim: {magnitude.shape[1]} frames for {length} samples, expected {spec.frames_of(length)}")
    free = _to_hops(jnp.ones((len(magnitude), length), bool), spec)
    phases = _first_phases(magnitude.shape, seeds)
    hops = _iterate(magnitude, phases, jnp.zeros(free.shape), free, spec, iterations, momentum)
    return _from_hops(hops, spec, length)


@cpu_batching.split_over_cores
@functools.partial(jax.jit, static_argnames=("spec", "length", "iterations", "momentum"))
def whole_clip(
    level: jax.Array, spec: Spec, *, length: int, seeds: jax.Array, iterations: int = CLIP_ITERATIONS, momentum: float = MOMENTUM
) -> jax.Array:
    """Levels (B, F, K) -> audio (B, length) by Griffin-Lim of the full clip, ignoring known samples, then de-emphasis."""
    magnitude = mel_to_magnitude(stft.magnitude_from_level(level, spec), spec)
    audio = griffin_lim(magnitude, spec, length=length, seeds=seeds, iterations=iterations, momentum=momentum)
    return stft.de_emphasise(audio, spec)


def splice(level: jax.Array, known: jax.Array, missing: jax.Array, spec: Spec, *, seeds: jax.Array, **options) -> jax.Array:
    """`whole_clip` where `missing`, bool (B, N), and `known` (B, N) elsewhere, without crossfade: as in comparable papers."""
    return jnp.where(missing, whole_clip(level, spec, length=known.shape[1], seeds=seeds, **options), known)


# ---- the paper's inversion -----------------------------------------------------------------------------------------------------


def paper_magnitude(level: jax.Array, spec: Spec) -> jax.Array:
    """Levels (B, F, K) -> the bin magnitudes that the paper's code passes to Griffin-Lim: pseudo-inverse, floor, power 1.5.

    The power emphasises loud bins. It is part of the paper's code and inverts no earlier operation.
    """
    inverse = jnp.asarray(_inversion(spec)[1])
    bins = _exact(stft.magnitude_from_level(level, spec), inverse.T)
    return jnp.maximum(bins, PAPER_FLOOR) ** PAPER_POWER


@cpu_batching.split_over_cores
@functools.partial(jax.jit, static_argnames=("spec", "length", "iterations"))
def paper_inversion(
    level: jax.Array, spec: Spec, *, length: int, seeds: jax.Array, iterations: int = PAPER_ITERATIONS
) -> jax.Array:
    """Levels (B, F, K) -> audio (B, length) as in the paper's code: 300 iterations without momentum, then de-emphasis.

    The paper's code starts from random phases; here they come from `seeds` (B,) uint32. Only for the `paper` protocol.
    """
    audio = griffin_lim(paper_magnitude(level, spec), spec, length=length, seeds=seeds, iterations=iterations, momentum=0.0)
    return stft.de_emphasise(audio, spec)


# ---- inside a gap --------------------------------------------------------------------------------------------------------------


@cpu_batching.split_over_cores
@functools.partial(jax.jit, static_argnames=("spec", "iterations", "momentum"))
def inpaint_gap(
    level: jax.Array,
    known: jax.Array,
    missing: jax.Array,
    spec: Spec,
    *,
    seeds: jax.Array,
    lengths: jax.Array | None = None,
    iterations: int = ITERATIONS,
    momentum: float = MOMENTUM,
) -> jax.Array:
    """Audio (B, N) at the preset's rate that follows the level (B, F, K) in the missing samples and equals `known` elsewhere.

    known (B, N) float32, with arbitrary values at missing samples; missing (B, N) bool; seeds (B,) uint32 for the initial phases;
    lengths (B,): the samples of each clip, after which `known` is padding; None if all are N.
    Every iteration combines the magnitudes of the level with the phases of the current audio and restores the known samples, so
    that the context fixes the phase. For presets without pre-emphasis, frames at the edges are first scaled to their likely energy
    (`_scale_edge_frames`). With pre-emphasis, the iterations run on the pre-emphasised audio, which the level describes; the
    result is de-emphasised from the last known sample on, and the small discontinuity at the far edge is spread over the gap.
    """
    original = known
    in_clip = jnp.ones_like(missing) if lengths is None else jnp.arange(missing.shape[1])[None] < lengths[:, None]
    missing = missing & in_clip
    is_known = ~missing & in_clip
    offset = jnp.where(is_known, known, 0.0).sum(-1, keepdims=True) / jnp.maximum(is_known.sum(-1, keepdims=True), 1)
    known = jnp.where(is_known, known - offset, 0.0)  # the level contains no 0 Hz: a constant offset comes from the context
    sharp = jnp.where(missing, 0.0, stft.pre_emphasise(known, spec))  # correct where a sample and its predecessor are known
    unknown = (missing | jnp.pad(missing, ((0, 0), (1, 0)))[:, :-1]) & in_clip if spec.pre_emphasis else missing
    sharp = _fill_span(level, sharp, unknown, in_clip, spec, seeds, iterations, momentum)
    return jnp.where(missing, _de_emphasise_inside(sharp, known, missing, in_clip, spec) + offset, original)


def _fill_span(level, sharp, unknown, in_clip, spec: Spec, seeds, iterations: int, momentum: float) -> jax.Array:
    """`sharp` (B, N) with its unknown samples filled.

    Only the frames from a clip's first affected one to the last are needed; the result is the same as with all frames. Their number
    is rounded up to one of a few sizes, because each size is compiled separately.
    """
    num_frames, affected = level.shape[1], stft.frames_containing(unknown, spec)
    first = jnp.where(affected.any(-1), affected.argmax(-1), 0)
    last = jnp.where(affected.any(-1), num_frames - 1 - affected[:, ::-1].argmax(-1), 0)
    sizes = sorted({min(num_frames, round(np.ceil(share * num_frames))) for share in SPANS})
    held, free, in_clip = (_to_hops(x, spec) for x in (sharp, unknown, in_clip))
    phases = _first_phases((*level.shape[:2], spec.n_fft // 2 + 1), seeds)

    def fill(frames: int):
        start = jnp.minimum(first, num_frames - frames)
        hops = frames + _pieces(spec) - 1
        take = lambda x, n: jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, n))(x, start)
        wanted = mel_to_magnitude(stft.magnitude_from_level(take(level, frames), spec), spec)
        known, empty = take(held, hops), take(free, hops)
        if not spec.pre_emphasis:  # with pre-emphasis, scaling does more harm than good (docs/vocoder.md)
            wanted = _scale_edge_frames(wanted, known, empty, take(in_clip, hops), spec)
        filled = _iterate(wanted, take(phases, frames), known, empty, spec, iterations, momentum)
        put = jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice_in_dim(row, part, at, 0))
        return put(held, filled, start)

    needed = (last - first + 1).max()
    which = sum((needed > size).astype(jnp.int32) for size in sizes[:-1]) if len(sizes) > 1 else 0
    hops = jax.lax.switch(which, [functools.partial(fill, size) for size in sizes])
    return _from_hops(hops, spec, sharp.shape[1])


def _scale_edge_frames(wanted, held, free, in_clip, spec: Spec) -> jax.Array:
    """Magnitudes (B, frames, bins) in which every frame with both known and free samples is scaled to its likely energy.

    That is the energy of its known samples plus the wanted energy times the free samples' share of the window: known and filled
    audio are uncorrelated, so their energies add. Without this, if the level is too low, as predicted levels are, the free samples
    of such a frame would cancel the known ones and leave a jump in level. in_clip: bool hops, samples that belong to the clip.
    """
    free_energy, full_energy = _window_energy(free, spec), _window_energy(in_clip, spec)
    share = free_energy / jnp.maximum(full_energy, 1e-9)
    known_energy, wanted_energy = ((jnp.real(x) ** 2 + jnp.imag(x) ** 2).sum(-1) for x in (_spectrum(held, spec), wanted))
    gain = jnp.sqrt(known_energy / jnp.maximum(wanted_energy, 1e-12) + share)
    return wanted * jnp.where((share > 0) & (share < 1), gain, 1.0)[..., None]


def _window_energy(chosen: jax.Array, spec: Spec) -> jax.Array:
    """The squared window summed over the chosen samples of each frame: bool hops (B, H, hop) -> (B, frames)."""
    pieces, frames = _pieces(spec), chosen.shape[1] - _pieces(spec) + 1
    square = np.pad(_window(spec) ** 2, (0, pieces * spec.hop - spec.window)).reshape(pieces, spec.hop).astype(np.float32)
    parts = jnp.einsum("bhs,ps->pbh", chosen.astype(jnp.float32), square, precision="highest")
    return sum(parts[p, :, p : p + frames] for p in range(pieces))


def _de_emphasise_inside(sharp: jax.Array, known: jax.Array, missing: jax.Array, in_clip: jax.Array, spec: Spec) -> jax.Array:
    """De-emphasis y[n] = x[n] + a y[n-1] of the missing samples, each run starting from the known sample before it.

    A run does not end exactly at the value that the first known sample after it requires. The difference is distributed backwards
    over the run with the filter's decay (a^k, k samples before the edge), which leaves no discontinuity. A run at the end of a clip
    has no known sample after it; samples outside `in_clip` are padding.
    """
    a = spec.pre_emphasis
    if not a:
        return sharp
    samples = [jnp.moveaxis(v, -1, 0) for v in (sharp, known, missing, in_clip)]

    def forward(y, inputs):
        x, k, is_missing, _ = inputs
        y = jnp.where(is_missing, x + a * y, k)
        return y, y

    filtered = jax.lax.scan(forward, jnp.zeros(sharp.shape[0]), tuple(samples))[1]

    # If the sample after a run is known, the run should have ended at (known[n+1] - sharp[n+1]) / a.
    def backward(carry, inputs):
        correction, next_known, next_sharp, next_missing, next_in_clip = carry
        x, k, is_missing, is_in_clip, y = inputs
        at_edge = is_missing & ~next_missing & next_in_clip
        wanted = (next_known - next_sharp) / a
        correction = jnp.where(at_edge, wanted - y, jnp.where(is_missing, correction * a, 0.0))
        return (correction, k, x, is_missing, is_in_clip), y + jnp.where(is_missing, correction, 0.0)

    batch = sharp.shape[0]
    start = (jnp.zeros(batch), jnp.zeros(batch), jnp.zeros(batch), jnp.zeros(batch, bool), jnp.zeros(batch, bool))
    out = jax.lax.scan(backward, start, (*samples, filtered), reverse=True)[1]
    return jnp.moveaxis(out, 0, -1)
