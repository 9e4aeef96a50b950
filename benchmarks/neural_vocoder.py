"""Whether a network makes better sound of a log-mel and the sound around a gap than Griffin-Lim does: docs/vocoder.md.

    python benchmarks/neural_vocoder.py train --data_dir=DATA --out=FILE.npz [--steps=4000]    goes on with what FILE holds
    python benchmarks/neural_vocoder.py measure --data_dir=DATA --weights=FILE.npz --run=RUN

ConvNeXt blocks at the frames' rate with an inverse-STFT head (Siuzdak 2023), preset `wide`. It sees the log-mel, the mask, and the
STFT of the known samples; it says how far every bin is from the mel's inversion, and its phase. Learned by the multi-resolution
STFT loss (Yamamoto et al. 2020) of the joined sound at true levels of the train split. Measured three ways: its sound as it is, its
magnitudes in Griffin-Lim, and both its magnitudes and its phases as Griffin-Lim's beginning.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import vocoder as ceilings

from avsi_jax import input_pipeline, restore, stft, vocoder
from avsi_jax.spec import RECORD_RATE, get

SPEC = get("wide")
BINS = SPEC.n_fft // 2 + 1
SEGMENT = 128 * SPEC.hop  # samples that a step learns from
GAP_MS = (200, 900)
RESOLUTIONS = ((256, 64), (512, 128), (1024, 256))
SAVE_EVERY = 250  # steps


class Block(nn.Module):
    """ConvNeXt: a filter of seven steps a channel, then two products, added to what came in (Liu et al. 2022)."""

    @nn.compact
    def __call__(self, x):
        size = x.shape[-1]
        taps = self.param("taps", nn.initializers.normal(0.2), (7, size))
        padded = jnp.pad(x, ((0, 0), (3, 3), (0, 0)))
        y = sum(padded[:, k : k + x.shape[1]] * taps[k][None, None] for k in range(7))
        y = nn.Dense(size)(nn.gelu(nn.Dense(3 * size)(nn.LayerNorm()(y))))
        return x + y * self.param("scale", nn.initializers.constant(0.1), (size,))[None, None]


class Network(nn.Module):
    """level (B, F, 80), known spectrum (B, F, bins) complex, mask (B, F) -> complex spectrum (B, F, bins)."""

    size: int = 256
    blocks: int = 8

    @nn.compact
    def __call__(self, level, known, mask):
        loud = jnp.abs(known)
        known = known * (loud + 1e-4) ** -0.7  # quiet bins count too
        seen = [(level + 4.0) / 3.0, known.real, known.imag, mask[..., None].astype(jnp.float32)]
        x = nn.LayerNorm()(nn.Dense(self.size)(jnp.concatenate(seen, -1)))
        for _ in range(self.blocks):
            x = Block()(x)
        off, real, imag = jnp.split(nn.Dense(3 * BINS)(nn.LayerNorm()(x)), 3, -1)
        magnitude = vocoder.mel_to_magnitude(stft.magnitude_from_level(level, SPEC), SPEC)
        unit = jax.lax.complex(real, imag) * jax.lax.rsqrt(real**2 + imag**2 + 1e-8)
        return magnitude * jnp.exp(jnp.clip(off, -6, 3)), unit


def apply(params, level, known, lost):
    """Magnitudes and phases (B, F, bins) of the network for known sound (B, N) with samples lost."""
    return Network().apply(params, level, stft.stft(jnp.where(lost, 0.0, known), SPEC), stft.frames_holding(lost, SPEC))


def initial(key):
    zeros = jnp.zeros((1, SEGMENT))
    return Network().init(key, stft.log_mel(zeros, SPEC), stft.stft(zeros, SPEC), jnp.zeros((1, SPEC.frames_of(SEGMENT)), bool))


def joined(magnitude, unit, known, lost):
    """The network's own sound where samples are lost."""
    return jnp.where(lost, stft.istft(magnitude * unit, SPEC, known.shape[1], floor=0.25), known)


def spectrum_of(x, n_fft: int, hop: int):
    frames = 1 + (x.shape[1] - n_fft) // hop
    cut = jnp.stack([x[:, k * hop : k * hop + n_fft] for k in range(frames)], 1)
    power = jnp.abs(jnp.fft.rfft(cut * jnp.hanning(n_fft)[None, None], axis=-1) + 1e-7)
    return jnp.maximum(power, 1e-4), frames


def distance(made, true, lost):
    """Multi-resolution STFT loss of (B, N), over the frames that hold lost samples."""
    total = 0.0
    for n_fft, hop in RESOLUTIONS:
        (a, frames), (b, _) = spectrum_of(made, n_fft, hop), spectrum_of(true, n_fft, hop)
        held = jnp.stack([lost[:, k * hop : k * hop + n_fft].any(-1) for k in range(frames)], 1)[..., None]
        log = (jnp.abs(jnp.log(a) - jnp.log(b)) * held).sum() / (held.sum() * a.shape[-1])
        convergence = jnp.sqrt((((a - b) * held) ** 2).sum() / ((b * held) ** 2).sum())
        total += (log + convergence) / len(RESOLUTIONS)
    return total


def sounds_of(data_dir: str, split: str) -> list[np.ndarray]:
    """The recordings between the ends of their words, with 0.3 s on both sides."""
    records = input_pipeline.Records(input_pipeline.find_dataset(data_dir, "speaker_independent"), split, mouth=False)
    found = []
    for i in range(len(records)):
        example = input_pipeline.to_example(records[i])
        n = int(example["audio_length"])
        first, last = (example["speech"] * RECORD_RATE).astype(int) + (-4800, 4800)
        first = max(0, min(first, n - SEGMENT))
        found.append(example["audio"][first : min(n, max(last, first + SEGMENT))])
    return [x for x in found if len(x) >= SEGMENT]


def drawn(sounds, rng, count: int):
    """(sound, lost) (count, SEGMENT): one gap each, with sound on both sides, louder or softer."""
    cuts, lost = np.zeros((count, SEGMENT), np.float32), np.zeros((count, SEGMENT), bool)
    for b, i in enumerate(rng.integers(len(sounds), size=count)):
        at = rng.integers(len(sounds[i]) - SEGMENT + 1)
        cuts[b] = sounds[i][at : at + SEGMENT] / 32768 * 10 ** rng.uniform(-0.3, 0.3)
        length = int(rng.uniform(*GAP_MS) * SPEC.rate / 1000)
        start = rng.integers(1600, SEGMENT - length - 1600)
        lost[b, start : start + length] = True
    return cuts, lost


def train(data_dir: str, out: Path, steps: int, batch_size: int) -> None:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 200, steps, 1e-5)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.8, b2=0.99, weight_decay=0.01))
    params = jax.jit(initial)(jax.random.key(0))
    state, done = optimiser.init(params), 0
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")
    if out.is_file():
        with np.load(out) as file:
            done, leaves = int(file["step"]), [file[f"a{i}"] for i in range(len(file.files) - 1)]
        params, state = jax.tree.unflatten(jax.tree.structure((params, state)), leaves)

    def loss(params, sound, lost):
        magnitude, unit = apply(params, stft.log_mel(sound, SPEC), sound, lost)
        made = distance(joined(magnitude, unit, sound, lost), sound, lost)
        true, held = jnp.abs(stft.stft(sound, SPEC)), stft.frames_holding(lost, SPEC)[..., None]
        off = jnp.abs(jnp.log(magnitude + 1e-4) - jnp.log(true + 1e-4)) * held
        return made + 0.5 * off.sum() / (held.sum() * BINS)

    @jax.jit
    def step(params, state, sound, lost):
        value, slope = jax.value_and_grad(loss)(params, sound, lost)
        update, state = optimiser.update(slope, state, params)
        return optax.apply_updates(params, update), state, value

    sounds, began, values = sounds_of(data_dir, "train"), time.monotonic(), []
    for n in range(done, steps):
        params, state, value = step(params, state, *drawn(sounds, np.random.default_rng(n), batch_size))
        values.append(float(value))
        if (n + 1) % SAVE_EVERY == 0 or n + 1 == steps:
            arrays = {f"a{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves((params, state)))}
            partial = out.with_suffix(".part.npz")
            np.savez(partial, step=n + 1, **arrays)
            partial.replace(out)
            speed = (n + 1 - done) / (time.monotonic() - began)
            print(f"step {n + 1}/{steps}  loss {np.mean(values[-SAVE_EVERY:]):.4f}  {speed:.2f} steps/s", flush=True)


def load(weights: Path):
    like = jax.eval_shape(initial, jax.random.key(0))
    with np.load(weights) as file:
        leaves = [file[f"a{i}"] for i in range(len(jax.tree.leaves(like)))]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), int(file["step"])


@functools.partial(jax.jit, static_argnames=("iterations", "own_phases"))
def in_griffin_lim(magnitude, unit, known, lost, seeds, iterations: int, own_phases: bool):
    """Griffin-Lim with the known samples held, on the network's magnitudes, from its phases or drawn ones."""
    frame = jnp.arange(SPEC.n_fft // 2 + 1)[None, None]
    # vocoder's frames begin with the window, stft's with the zeros before it: bins differ by that delay.
    turn = jnp.exp(2j * np.pi * frame * ((SPEC.n_fft - SPEC.window) // 2) / SPEC.n_fft)
    phases = unit * turn if own_phases else vocoder._first_phases(magnitude.shape, seeds)
    held, free = vocoder._to_hops(jnp.where(lost, 0.0, known), SPEC), vocoder._to_hops(lost, SPEC)
    made = vocoder._iterate(magnitude, phases, held, free, SPEC, iterations, vocoder.MOMENTUM)
    return jnp.where(lost, vocoder._from_hops(made, SPEC, known.shape[1]), known)


def measure(data_dir: str, weights: Path, run: Path, split: str, clips: int, gap_lengths) -> None:
    params, step = load(weights)
    restorer = restore.Restorer.from_workdir(run)
    if restorer.spec != SPEC:
        raise SystemExit(f"--run={run}: found preset {restorer.spec.name}, expected {SPEC.name}")
    batch = ceilings.read_clips(data_dir, split, clips)
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    true_sound, seeds = np.asarray(ceilings.sound_of(batch, SPEC)), jnp.asarray(batch["id_hash"])
    print(f"{weights} at step {step}, {len(true_sound)} clips of {split}")
    print("| gap | level | sound | PESQ nb | PESQ wb | STOI | ESTOI | gap L1, dB |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for gap_ms in gap_lengths:
        gap = ceilings.places(batch, gap_ms, SPEC)
        known, lost = ceilings.damaged(batch, SPEC, gap)
        levels = {"true": stft.log_mel(true_sound, SPEC), "predicted": restorer.restore(arrays, gap).level}
        for kind, level in levels.items():
            level = jnp.asarray(level)
            magnitude, unit = jax.jit(apply)(params, level, known, lost)
            of = functools.partial(in_griffin_lim, magnitude, unit, known, lost, seeds)
            made = {
                "Griffin-Lim": vocoder.fill_gap(level, known, lost, SPEC, seeds=seeds),
                "network": joined(magnitude, unit, known, lost),
                "its magnitudes": of(iterations=vocoder.ITERATIONS, own_phases=False),
                "both, 5 iterations": of(iterations=5, own_phases=True),
                "both, 30": of(iterations=vocoder.ITERATIONS, own_phases=True),
            }
            for name, sound in made.items():
                found = ceilings.scored(true_sound, sound, batch, SPEC, gap)
                cells = [f"{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]" for v in (found[m] for m in ceilings.SCORES)]
                print(f"| {gap_ms} ms | {kind} | {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--split", default="validation_seen")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--gap_ms", default="300,900,1500")
    args = parser.parse_args()
    needed = ("out",) if args.what == "train" else ("weights", "run")
    if lacks := [name for name in needed if not getattr(args, name)]:
        parser.error(f"{args.what}: no --{lacks[0]} given")
    if args.what == "train":
        train(args.data_dir, args.out, args.steps, args.batch_size)
    else:
        measure(args.data_dir, args.weights, args.run, args.split, args.clips, [int(ms) for ms in args.gap_ms.split(",")])


if __name__ == "__main__":
    main()
