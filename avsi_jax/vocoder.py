"""Log-mel and known samples -> waveform.

Griffin & Lim (1984) with the momentum of Perraudin, Balazs & Soendergaard (2013), batched and jitted, in two forms: over a whole
clip (`griffin_lim`), and inside a gap with the known samples held at every iteration (`fill_gap`), so that what is made up joins
both edges by itself. Nothing here knows a network.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from avsi_jax import stft
from avsi_jax.spec import Spec

ITERATIONS = 60
MOMENTUM = 0.99
INVERSION_STEPS = 40
EDGE_FLOOR = 0.25  # of the summed squared windows, which lie between 0.5 and 2 inside a clip: see stft.istft


@functools.cache
def _inversion(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Mel basis (K, bins) and its pseudo-inverse (bins, K), float32."""
    basis = stft.mel_basis(spec)
    return basis, np.linalg.pinv(basis).astype(np.float32)


def mel_to_magnitude(bands: jax.Array, spec: Spec) -> jax.Array:
    """Linear band magnitudes (..., F, K) -> non-negative bin magnitudes (..., F, bins).

    Non-negative least squares by multiplicative updates (Lee & Seung 2001) from the floored pseudo-inverse: unlike that alone it
    has no negative part to cut off, so its mel is the mel asked for.
    """
    if spec.scale == "linear":
        return jnp.maximum(bands, 0.0)
    basis, inverse = (jnp.asarray(a) for a in _inversion(spec))
    exact = functools.partial(jnp.matmul, precision="highest")
    # Every bin starts with some of its bands' mean level: an update never leaves 0.
    smooth = bands / stft.along_last(jnp.maximum(basis.sum(-1), 1e-8), bands.ndim)
    smooth = exact(smooth, basis)
    magnitude = jnp.maximum(exact(bands, inverse.T), 0.0) + 0.1 * smooth + 1e-10
    reach = exact(bands, basis)

    def update(_, magnitude):
        return magnitude * (reach / jnp.maximum(exact(exact(magnitude, basis.T), basis), 1e-12))

    return jax.lax.fori_loop(0, INVERSION_STEPS, update, magnitude)


def _unit(spectrum: jax.Array) -> jax.Array:
    return spectrum / jnp.maximum(jnp.abs(spectrum), 1e-12)


@functools.partial(jax.jit, static_argnames=("spec", "length", "iterations", "momentum"))
def griffin_lim(
    magnitude: jax.Array, spec: Spec, *, length: int, key: jax.Array, iterations: int = ITERATIONS, momentum: float = MOMENTUM
) -> jax.Array:
    """Bin magnitudes (B, F, bins) -> (B, length): a sound whose STFT comes near them, from random phases drawn by `key`."""
    angles = jnp.exp(2j * np.pi * jax.random.uniform(key, magnitude.shape))

    def iterate(_, carry):
        angles, before = carry
        rebuilt = stft.stft(stft.istft(magnitude * angles, spec, length, EDGE_FLOOR), spec)
        return _unit(rebuilt - momentum / (1 + momentum) * before), rebuilt

    angles, _ = jax.lax.fori_loop(0, iterations, iterate, (angles, jnp.zeros_like(angles)))
    return stft.istft(magnitude * angles, spec, length, EDGE_FLOOR)


@functools.partial(jax.jit, static_argnames=("spec", "iterations", "momentum"))
def fill_gap(
    level: jax.Array,
    known: jax.Array,
    lost: jax.Array,
    spec: Spec,
    *,
    seeds: jax.Array,
    iterations: int = ITERATIONS,
    momentum: float = MOMENTUM,
) -> jax.Array:
    """Sound for the lost samples that fits the level (B, F, K): (B, N) at the preset's rate, equal to `known` where not `lost`.

    `known` (B, N) float32 with anything finite at lost samples, `lost` (B, N) bool, `seeds` (B,) uint32 of the
    first phases: a clip's own, so that its sound is the same in any batch. Each iteration takes the magnitudes of the level
    with the phases of the current sound and puts the known samples back; frames that touch no lost sample keep their own spectrum,
    so the context anchors the phase. The iterations run on the pre-emphasised sound, which is what the level describes; the
    result is de-emphasised from the last known sample on, and the small step that leaves at the far edge is spread over the gap.
    """
    original = known
    offset = jnp.where(lost, 0.0, known).sum(-1, keepdims=True) / jnp.maximum((~lost).sum(-1, keepdims=True), 1)
    known = jnp.where(lost, 0.0, known - offset)  # a mel has no weight at 0 Hz: a constant offset is the context's, not the level's
    sharp = jnp.where(lost, 0.0, stft.pre_emphasise(known, spec))  # true wherever sample and predecessor are known
    unknown = lost | jnp.pad(lost, ((0, 0), (1, 0)))[:, :-1] if spec.pre_emphasis else lost
    wanted = mel_to_magnitude(stft.magnitude_from_level(level, spec), spec)
    touched = stft.frames_holding(unknown, spec)[..., None]
    own = stft.stft(sharp, spec)
    noise = jax.vmap(lambda s: jax.random.uniform(jax.random.key(s), wanted.shape[1:]))(seeds)
    start = jnp.where(touched, wanted * jnp.exp(2j * np.pi * noise), own)

    def to_sound(spectrum):
        return jnp.where(unknown, stft.istft(spectrum, spec, known.shape[-1], EDGE_FLOOR), sharp)

    def iterate(_, carry):
        sound, before = carry
        rebuilt = stft.stft(sound, spec)
        spectrum = jnp.where(touched, wanted * _unit(rebuilt - momentum / (1 + momentum) * before), own)
        return to_sound(spectrum), rebuilt

    sound, _ = jax.lax.fori_loop(0, iterations, iterate, (to_sound(start), jnp.zeros_like(own)))
    return jnp.where(lost, _de_emphasise_inside(sound, known, lost, spec) + offset, original)


def _de_emphasise_inside(sharp: jax.Array, known: jax.Array, lost: jax.Array, spec: Spec) -> jax.Array:
    """y[n] = x[n] + a y[n-1] through the lost samples, every run of them starting from the known sample before it.

    The first known sample after a run would ask for another end value than the run arrives at; that difference is taken back
    along the run by the filter's own decay run backwards in time (a^k, k samples before the edge), so that no step is left.
    """
    a = spec.pre_emphasis
    if not a:
        return sharp
    steps = [jnp.moveaxis(v, -1, 0) for v in (sharp, known, lost)]

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
