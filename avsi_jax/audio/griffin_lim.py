"""Log-mel and known samples -> waveform.

Griffin & Lim (1984) with the momentum of Perraudin, Balazs & Soendergaard (2013), batched and jitted: inside a gap with the known
samples held at every iteration (`fill_gap`), so that what is made up joins both edges by itself; over a whole clip (`whole_clip`,
`griffin_lim`); and as the paper's code inverts its own spectrogram (`paper_inversion`), for its protocol alone. A clip's first
phases come from its own seed, so that it sounds the same in any batch. Nothing here knows a network. docs/vocoder.md has what
each of them is worth and what it costs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from avsi_jax.audio import stft
from avsi_jax.presets import Spec
from avsi_jax.runtime import cpu_batching

ITERATIONS = 30  # in a gap, whose context holds the phases: more bring no better sound (docs/vocoder.md)
WGAP_ITERATIONS = 60  # of a clip where nothing is known
MOMENTUM = 0.99
INVERSION_STEPS = 15  # leave less than 0.01 dB of a mel's error; more cost time and bring nothing that is heard
EDGE_FLOOR = 0.25  # of the summed squared windows, which lie between 0.5 and 2 inside a clip: see stft.istft
SPANS = (0.125, 0.33, 0.55, 1.0)  # of a clip's frames: what a gap reaches is rounded up to one of these
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

    Non-negative least squares by multiplicative updates (Lee & Seung 2001) from the floored pseudo-inverse: unlike that alone it
    has no negative part to cut off, so its mel is the mel asked for.
    """
    if spec.scale == "linear":
        return jnp.maximum(bands, 0.0)
    basis, inverse = (jnp.asarray(a) for a in _inversion(spec))
    # Every bin starts with some of its bands' mean level: an update never leaves 0.
    smooth = bands / stft.along_last(jnp.maximum(basis.sum(-1), 1e-8), bands.ndim)
    smooth = _exact(smooth, basis)
    magnitude = jnp.maximum(_exact(bands, inverse.T), 0.0) + 0.1 * smooth + 1e-10
    reach = _exact(bands, basis)

    def update(_, magnitude):
        return magnitude * (reach / jnp.maximum(_exact(_exact(magnitude, basis.T), basis), 1e-12))

    return jax.lax.fori_loop(0, INVERSION_STEPS, update, magnitude)


# ---- frames --------------------------------------------------------------------------------------------------------------------
# As stft's, but of `window` samples, with the zeros that fill them up to n_fft behind: bins are turned by the same angle in every
# frame, which Griffin-Lim cannot tell, and frames take as many hops as their windows need, no more.


def _pieces(spec: Spec) -> int:
    """Whole hops that a window reaches into."""
    return -(-spec.window // spec.hop)


def _lead(spec: Spec) -> int:
    """Zeros before a sound, so that frame f's window begins at sample f hop."""
    return spec.n_fft // 2 - (spec.n_fft - spec.window) // 2 if spec.centred else 0


@functools.cache
def _window(spec: Spec) -> np.ndarray:
    """stft.hann without the zeros around it: (window,)."""
    left = (spec.n_fft - spec.window) // 2
    return stft.hann(spec)[left : left + spec.window]


def _spectrum(hops: jax.Array, spec: Spec) -> jax.Array:
    """Sound in hops (B, frames + pieces - 1, hop) -> complex (B, frames, bins)."""
    pieces, frames = _pieces(spec), hops.shape[1] - _pieces(spec) + 1
    size = max(spec.n_fft, pieces * spec.hop)
    window = np.pad(_window(spec), (0, pieces * spec.hop - spec.window)).reshape(pieces, spec.hop)

    # Sums of padded pieces become one loop; joining them side by side takes XLA twice the time on a CPU.
    def placed(p: int) -> jax.Array:
        room = [(0, 0), (0, 0), (p * spec.hop, size - (p + 1) * spec.hop)]
        return jnp.pad(hops[:, p : p + frames] * stft.along_last(window[p], 3), room)

    return jnp.fft.rfft(sum(map(placed, range(pieces)))[..., : spec.n_fft], axis=-1)


def _audio(spectrum: jax.Array, spec: Spec) -> jax.Array:
    """The least-squares inverse of `_spectrum`, faded where windows hardly reach: see stft.istft."""
    frames, window = spectrum.shape[1], _window(spec)
    cut = jnp.fft.irfft(spectrum, n=spec.n_fft, axis=-1)[..., : spec.window] * stft.along_last(window, 3)
    weight = _overlap_add(np.broadcast_to(window**2, (1, frames, spec.window)), spec, np)
    return _overlap_add(cut, spec, jnp) * jnp.broadcast_to(1.0 / np.maximum(weight, EDGE_FLOOR), (1, *weight.shape[1:]))


def _overlap_add(cut, spec: Spec, lib):
    """(B, frames, window) -> (B, frames + pieces - 1, hop)."""
    pieces = _pieces(spec)
    cut = lib.pad(cut, [(0, 0), (0, 0), (0, pieces * spec.hop - spec.window)])
    parts = [cut[..., p * spec.hop : (p + 1) * spec.hop] for p in range(pieces)]
    return sum(lib.pad(part, [(0, 0), (p, pieces - 1 - p), (0, 0)]) for p, part in enumerate(parts))


def _to_hops(x: jax.Array, spec: Spec) -> jax.Array:
    """(B, N) -> (B, F + pieces - 1, hop), zero-padded (false, where bool)."""
    total = (spec.frames_of(x.shape[1]) + _pieces(spec) - 1) * spec.hop
    lead = _lead(spec)
    x = jnp.pad(x, [(0, 0), (lead, max(0, total - lead - x.shape[1]))])[:, :total]
    return x.reshape(len(x), -1, spec.hop)


def _from_hops(hops: jax.Array, spec: Spec, num_samples: int) -> jax.Array:
    """The inverse of `_to_hops`; samples behind the last frame's window, if any, are 0."""
    flat = hops.reshape(len(hops), -1)[:, _lead(spec) :][:, :num_samples]
    return jnp.pad(flat, [(0, 0), (0, num_samples - flat.shape[1])])


# ---- Griffin-Lim ---------------------------------------------------------------------------------------------------------------


def _unit(spectrum: jax.Array) -> jax.Array:
    power = jnp.real(spectrum) ** 2 + jnp.imag(spectrum) ** 2  # abs() takes care of squares that overflow, for twice the time
    return spectrum * jax.lax.rsqrt(jnp.maximum(power, 1e-30))


def _first_phases(shape: tuple, seeds: jax.Array) -> jax.Array:
    """Complex units (B, F, bins), a clip's from its own seed."""
    turns = jax.vmap(lambda s: jax.random.uniform(jax.random.key(s), shape[1:]))(jnp.asarray(seeds))
    return jnp.exp(2j * np.pi * turns)


def _iterate(wanted, phases, held, free, spec: Spec, iterations: int, momentum: float) -> jax.Array:
    """Magnitudes and first phases (B, frames, bins), hops of sound with which of its samples are free -> those hops, filled."""
    share = momentum / (1 + momentum)

    def to_audio(phases):
        return jnp.where(free, _audio(wanted * phases, spec), held)

    def iterate(_, carry):
        audio, before = carry
        rebuilt = _spectrum(audio, spec)
        if not share:  # nothing to carry over
            return to_audio(_unit(rebuilt)), before
        return to_audio(_unit(rebuilt - share * before)), rebuilt

    before = jnp.zeros_like(phases) if share else ()
    return jax.lax.fori_loop(0, iterations, iterate, (to_audio(phases), before))[0]


@cpu_batching.shared_out
@functools.partial(jax.jit, static_argnames=("spec", "length", "iterations", "momentum"))
def griffin_lim(
    magnitude: jax.Array,
    spec: Spec,
    *,
    length: int,
    seeds: jax.Array,
    iterations: int = WGAP_ITERATIONS,
    momentum: float = MOMENTUM,
) -> jax.Array:
    """Bin magnitudes (B, F, bins) -> (B, length): a sound whose STFT comes near them, from phases drawn by `seeds` (B,) uint32.

    `momentum=0` is the algorithm of 1984.
    """
    if magnitude.shape[1] != spec.frames_of(length):
        raise ValueError(f"griffin_lim: {magnitude.shape[1]} frames for {length} samples, expected {spec.frames_of(length)}")
    free = _to_hops(jnp.ones((len(magnitude), length), bool), spec)
    phases = _first_phases(magnitude.shape, seeds)
    hops = _iterate(magnitude, phases, jnp.zeros(free.shape), free, spec, iterations, momentum)
    return _from_hops(hops, spec, length)


@cpu_batching.shared_out
@functools.partial(jax.jit, static_argnames=("spec", "length", "iterations", "momentum"))
def whole_clip(
    level: jax.Array, spec: Spec, *, length: int, seeds: jax.Array, iterations: int = WGAP_ITERATIONS, momentum: float = MOMENTUM
) -> jax.Array:
    """Levels (B, F, K) -> (B, length): Griffin-Lim of all of them, whatever is known, with the preset's pre-emphasis taken off."""
    magnitude = mel_to_magnitude(stft.magnitude_from_level(level, spec), spec)
    audio = griffin_lim(magnitude, spec, length=length, seeds=seeds, iterations=iterations, momentum=momentum)
    return stft.de_emphasise(audio, spec)


def splice(level: jax.Array, known: jax.Array, missing: jax.Array, spec: Spec, *, seeds: jax.Array, **options) -> jax.Array:
    """As the peers do it: `whole_clip` of the level where `lost` (B, N), cut in hard; `known` (B, N) elsewhere."""
    return jnp.where(missing, whole_clip(level, spec, length=known.shape[1], seeds=seeds, **options), known)


# ---- the paper's inversion -----------------------------------------------------------------------------------------------------


def paper_magnitude(level: jax.Array, spec: Spec) -> jax.Array:
    """Levels (B, F, K) -> the bin magnitudes that the paper's code gives to Griffin-Lim: pseudo-inverse, floor, power 1.5.

    The power makes loud bins louder still; it is theirs, and no inverse of anything.
    """
    inverse = jnp.asarray(_inversion(spec)[1])
    bins = _exact(stft.magnitude_from_level(level, spec), inverse.T)
    return jnp.maximum(bins, PAPER_FLOOR) ** PAPER_POWER


@cpu_batching.shared_out
@functools.partial(jax.jit, static_argnames=("spec", "length", "iterations"))
def paper_inversion(
    level: jax.Array, spec: Spec, *, length: int, seeds: jax.Array, iterations: int = PAPER_ITERATIONS
) -> jax.Array:
    """Levels (B, F, K) -> (B, length) as the paper's code makes them: 300 iterations without momentum, then de-emphasis.

    Theirs starts from other phases every time; here `seeds` (B,) uint32 say from which. Only for the paper's protocol.
    """
    audio = griffin_lim(paper_magnitude(level, spec), spec, length=length, seeds=seeds, iterations=iterations, momentum=0.0)
    return stft.de_emphasise(audio, spec)


# ---- inside a gap --------------------------------------------------------------------------------------------------------------


@cpu_batching.shared_out
@functools.partial(jax.jit, static_argnames=("spec", "iterations", "momentum"))
def inpaint_gap(
    level: jax.Array,
    known: jax.Array,
    missing: jax.Array,
    spec: Spec,
    *,
    seeds: jax.Array,
    iterations: int = ITERATIONS,
    momentum: float = MOMENTUM,
) -> jax.Array:
    """Sound for the lost samples that fits the level (B, F, K): (B, N) at the preset's rate, equal to `known` where not `lost`.

    `known` (B, N) float32 with anything at lost samples, `lost` (B, N) bool, `seeds` (B,) uint32 of the first phases. Each
    iteration takes the magnitudes of the level with the phases of the current sound and puts the known samples back, so the
    context anchors the phase. Frames at the edges are first made as loud as what is known of them asks (`_as_loud_as_known`), for
    presets without pre-emphasis. The iterations run on the pre-emphasised sound, which is what the level describes; the
    result is de-emphasised from the last known sample on, and the small step that leaves at the far edge is spread over the gap.
    """
    original = known
    offset = jnp.where(missing, 0.0, known).sum(-1, keepdims=True) / jnp.maximum((~missing).sum(-1, keepdims=True), 1)
    known = jnp.where(
        missing, 0.0, known - offset
    )  # a mel has no weight at 0 Hz: a constant offset is the context's, not the level's
    sharp = jnp.where(missing, 0.0, stft.pre_emphasise(known, spec))  # true wherever sample and predecessor are known
    unknown = missing | jnp.pad(missing, ((0, 0), (1, 0)))[:, :-1] if spec.pre_emphasis else missing
    sharp = _fill_span(level, sharp, unknown, spec, seeds, iterations, momentum)
    return jnp.where(missing, _de_emphasise_inside(sharp, known, missing, spec) + offset, original)


def _fill_span(level, sharp, unknown, spec: Spec, seeds, iterations: int, momentum: float) -> jax.Array:
    """`sharp` (B, N) with its unknown samples made up.

    An unknown sample is reached only by the frames from its clip's first touched one to the last, and these need no others: the
    same sound comes of them alone. Their number is rounded up to one of a few, for which a program each is compiled.
    """
    num_frames, touched = level.shape[1], stft.frames_holding(unknown, spec)
    first = jnp.where(touched.any(-1), touched.argmax(-1), 0)
    last = jnp.where(touched.any(-1), num_frames - 1 - touched[:, ::-1].argmax(-1), 0)
    sizes = sorted({min(num_frames, round(np.ceil(share * num_frames))) for share in SPANS})
    held, free, there = (_to_hops(x, spec) for x in (sharp, unknown, jnp.ones_like(unknown)))
    phases = _first_phases((*level.shape[:2], spec.n_fft // 2 + 1), seeds)

    def fill(frames: int):
        start = jnp.minimum(first, num_frames - frames)
        hops = frames + _pieces(spec) - 1
        take = lambda x, n: jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, n))(x, start)
        wanted = mel_to_magnitude(stft.magnitude_from_level(take(level, frames), spec), spec)
        known, empty = take(held, hops), take(free, hops)
        if not spec.pre_emphasis:  # where there is, this costs more than it mends (docs/vocoder.md)
            wanted = _as_loud_as_known(wanted, known, empty, take(there, hops), spec)
        made = _iterate(wanted, take(phases, frames), known, empty, spec, iterations, momentum)
        put = jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice_in_dim(row, part, at, 0))
        return put(held, made, start)

    needed = (last - first + 1).max()
    which = sum((needed > size).astype(jnp.int32) for size in sizes[:-1]) if len(sizes) > 1 else 0
    hops = jax.lax.switch(which, [functools.partial(fill, size) for size in sizes])
    return _from_hops(hops, spec, sharp.shape[1])


def _as_loud_as_known(wanted, held, free, there, spec: Spec) -> jax.Array:
    """Magnitudes (B, frames, bins) with those of every frame that holds both known and free samples scaled to its likely energy.

    That is the energy of its known samples and, of the energy that was wanted, the free samples' share of the window: known and
    made sound don't know of each other, so their energies add. A level that is too quiet, as predicted ones are, would have the
    free samples of such a frame cancel the known ones, and a step stay in the sound. `there` (hops): which samples are the clip's.
    """
    unheard, all_there = _window_energy(free, spec), _window_energy(there, spec)
    share = unheard / jnp.maximum(all_there, 1e-9)
    known = _spectrum(held, spec)
    heard, asked = ((jnp.real(x) ** 2 + jnp.imag(x) ** 2).sum(-1) for x in (known, wanted))
    gain = jnp.sqrt(heard / jnp.maximum(asked, 1e-12) + share)
    return wanted * jnp.where((share > 0) & (share < 1), gain, 1.0)[..., None]


def _window_energy(chosen: jax.Array, spec: Spec) -> jax.Array:
    """Hops of bool (B, H, hop) -> (B, frames): the squared window summed over each frame's chosen samples."""
    pieces, frames = _pieces(spec), chosen.shape[1] - _pieces(spec) + 1
    square = np.pad(_window(spec) ** 2, (0, pieces * spec.hop - spec.window)).reshape(pieces, spec.hop).astype(np.float32)
    parts = jnp.einsum("bhs,ps->pbh", chosen.astype(jnp.float32), square, precision="highest")
    return sum(parts[p, :, p : p + frames] for p in range(pieces))


def _de_emphasise_inside(sharp: jax.Array, known: jax.Array, missing: jax.Array, spec: Spec) -> jax.Array:
    """y[n] = x[n] + a y[n-1] through the lost samples, every run of them starting from the known sample before it.

    The first known sample after a run would ask for another end value than the run arrives at; that difference is taken back
    along the run by the filter's own decay run backwards in time (a^k, k samples before the edge), so that no step is left.
    """
    a = spec.pre_emphasis
    if not a:
        return sharp
    steps = [jnp.moveaxis(v, -1, 0) for v in (sharp, known, missing)]

    def forward(y, t):
        x, k, gone = t
        y = jnp.where(gone, x + a * y, k)
        return y, y

    ahead = jax.lax.scan(forward, jnp.zeros(sharp.shape[0]), tuple(steps))[1]

    # Where the sample after a run is known, the run's own end should have been (known[n+1] - sharp[n+1]) / a.
    def backward(carry, t):
        correction, next_known, next_sharp, next_gone, any_after = carry
        x, k, gone, y = t
        at_edge = gone & ~next_gone & any_after
        wanted = (next_known - next_sharp) / a
        correction = jnp.where(at_edge, wanted - y, jnp.where(gone, correction * a, 0.0))
        return (correction, k, x, gone, jnp.ones_like(any_after)), y + jnp.where(gone, correction, 0.0)

    batch = sharp.shape[0]
    start = (jnp.zeros(batch), jnp.zeros(batch), jnp.zeros(batch), jnp.zeros(batch, bool), jnp.zeros(batch, bool))
    out = jax.lax.scan(backward, start, (*steps, ahead), reverse=True)[1]
    return jnp.moveaxis(out, 0, -1)
