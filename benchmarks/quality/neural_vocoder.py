"""Compares a neural vocoder, given the log-mel and the audio around a gap, with Griffin-Lim (docs/vocoder.md).

    python -m benchmarks.quality.neural_vocoder train --data_dir=DATA --out=FILE.npz [--steps=4000]    continues from FILE
    python -m benchmarks.quality.neural_vocoder tune --data_dir=DATA --out=FILE2.npz --weights=FILE.npz --run=RUN    likewise
    python -m benchmarks.quality.neural_vocoder measure --data_dir=DATA --weights=FILE.npz --run=RUN

ConvNeXt blocks at the frame rate with an inverse-STFT head (Siuzdak 2023), preset `wide`. Inputs are the log-mel, the mask, and the
STFT of the known samples; outputs are a gain of every bin relative to the inverted mel, and its phase. Trained with the
multi-resolution STFT loss (Yamamoto et al. 2020) on true levels of the train split; then tuned with discriminators of its spectra
(hinge loss and feature matching), half of the examples with levels predicted by a system. Evaluated in three ways: its own audio,
its magnitudes in Griffin-Lim, and its magnitudes and phases as the initial values of Griffin-Lim.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from avsi_jax.audio import griffin_lim, stft
from avsi_jax.data import input_pipeline
from avsi_jax.evaluation import bootstrap
from avsi_jax.inference import restorer as restorer_lib
from avsi_jax.presets import RECORD_RATE, get
from benchmarks.quality import griffin_lim as vocoders

SPEC = get("wide")
BINS = SPEC.n_fft // 2 + 1
SEGMENT = 128 * SPEC.hop  # samples per training example
GAP_MS = (200, 900)
RESOLUTIONS = ((256, 64), (512, 128), (1024, 256))
SAVE_EVERY = 250  # training steps
DISCRIMINATOR_STFTS = ((256, 128), (512, 256), (1024, 512))  # (n_fft, hop) of each discriminator
BAND = 32  # bins per band of a discriminator
GAPS_PER_CLIP = 3  # gaps per clip for which a system predicts levels
MARGIN = 1600  # known samples on either side of a gap
ADVERSARIAL, MATCHING = 0.1, 0.5  # weights relative to the multi-resolution loss


class Block(nn.Module):
    """ConvNeXt block (Liu et al. 2022): a depthwise filter of seven taps, then two dense layers, with a residual connection."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, F, C) -> (B, F, C)."""
        size = x.shape[-1]
        taps = self.param("taps", nn.initializers.normal(0.2), (7, size))
        padded = jnp.pad(x, ((0, 0), (3, 3), (0, 0)))
        y = sum(padded[:, k : k + x.shape[1]] * taps[k][None, None] for k in range(7))
        y = nn.Dense(size)(nn.gelu(nn.Dense(3 * size)(nn.LayerNorm()(y))))
        return x + y * self.param("scale", nn.initializers.constant(0.1), (size,))[None, None]


class Network(nn.Module):
    """The neural vocoder."""

    size: int = 256
    blocks: int = 8

    @nn.compact
    def __call__(self, level: jax.Array, known: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """level (B, F, 80), known spectrum (B, F, bins) complex, mask (B, F) -> magnitude and unit phase (B, F, bins)."""
        magnitude = jnp.abs(known)
        known = known * (magnitude + 1e-4) ** -0.7  # compressed, so that quiet bins count too
        inputs = [(level + 4.0) / 3.0, known.real, known.imag, mask[..., None].astype(jnp.float32)]
        x = nn.LayerNorm()(nn.Dense(self.size)(jnp.concatenate(inputs, -1)))
        for _ in range(self.blocks):
            x = Block()(x)
        log_gain, real, imag = jnp.split(nn.Dense(3 * BINS)(nn.LayerNorm()(x)), 3, -1)
        magnitude = griffin_lim.mel_to_magnitude(stft.magnitude_from_level(level, SPEC), SPEC)
        unit = jax.lax.complex(real, imag) * jax.lax.rsqrt(real**2 + imag**2 + 1e-8)
        return magnitude * jnp.exp(jnp.clip(log_gain, -6, 3)), unit


def apply(params: Any, level: jax.Array, known: jax.Array, missing: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Magnitudes and phases (B, F, bins) of the network for audio (B, N) with missing samples."""
    return Network().apply(params, level, stft.stft(jnp.where(missing, 0.0, known), SPEC), stft.frames_containing(missing, SPEC))


def init_network(key: jax.Array) -> Any:
    """Initial parameters of the network."""
    zeros = jnp.zeros((1, SEGMENT))
    return Network().init(key, stft.log_mel(zeros, SPEC), stft.stft(zeros, SPEC), jnp.zeros((1, SPEC.frames_of(SEGMENT)), bool))


def splice_in(magnitude: jax.Array, unit: jax.Array, known: jax.Array, missing: jax.Array) -> jax.Array:
    """The audio (B, N) with the network's own output where samples are missing."""
    return jnp.where(missing, stft.istft(magnitude * unit, SPEC, known.shape[1], floor=0.25), known)


def frame_audio(x: jax.Array, n_fft: int, hop: int) -> jax.Array:
    """(B, N) -> frames (B, F, n_fft) without padding; n_fft is a multiple of hop."""
    hops = x[:, : x.shape[1] // hop * hop].reshape(len(x), -1, hop)
    pieces = n_fft // hop
    frames = hops.shape[1] - pieces + 1
    return jnp.concatenate([hops[:, p : p + frames] for p in range(pieces)], -1)


def spectrum_of(x: jax.Array, n_fft: int, hop: int) -> jax.Array:
    """Magnitudes (B, F, bins) of audio (B, N), at least 1e-4."""
    power = jnp.abs(jnp.fft.rfft(frame_audio(x, n_fft, hop) * jnp.hanning(n_fft)[None, None], axis=-1) + 1e-7)
    return jnp.maximum(power, 1e-4)


def frames_in_gap(missing: jax.Array, n_fft: int, hop: int) -> jax.Array:
    """(B, N) -> (B, F, 1): the frames of `frame_audio` that contain missing samples."""
    return frame_audio(missing, n_fft, hop).any(-1, keepdims=True)


def distance(generated: jax.Array, true: jax.Array, missing: jax.Array) -> jax.Array:
    """Multi-resolution STFT loss of audio (B, N), over the frames that contain missing samples."""
    total = 0.0
    for n_fft, hop in RESOLUTIONS:
        a, b, in_gap = spectrum_of(generated, n_fft, hop), spectrum_of(true, n_fft, hop), frames_in_gap(missing, n_fft, hop)
        log = (jnp.abs(jnp.log(a) - jnp.log(b)) * in_gap).sum() / (in_gap.sum() * a.shape[-1])
        convergence = jnp.sqrt((((a - b) * in_gap) ** 2).sum() / ((b * in_gap) ** 2).sum())
        total += (log + convergence) / len(RESOLUTIONS)
    return total


class Discriminator(nn.Module):
    """Discriminates spectra of recordings from generated ones, in bands of 32 bins with shared blocks (as Jang et al. 2021)."""

    size: int = 64
    blocks: int = 3

    @nn.compact
    def __call__(self, spectrum: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Spectrum (B, F, bins) -> features (a list of (B, F, bands, size)) and scores (B, F, bands), high for recordings."""
        batch, frames, bands = *spectrum.shape[:2], spectrum.shape[2] // BAND
        x = jnp.log(spectrum[..., 1 : 1 + bands * BAND]).reshape(batch, frames, bands, BAND)
        x = nn.Dense(self.size)((x + 4.0) / 3.0) + self.param("band", nn.initializers.normal(0.02), (bands, self.size))
        x, activations = jnp.moveaxis(x, 2, 1).reshape(-1, frames, self.size), []
        for _ in range(self.blocks):
            x = Block()(x)
            activations.append(jnp.moveaxis(x.reshape(batch, bands, frames, self.size), 1, 2))
        scores = nn.Dense(1)(nn.LayerNorm()(x))[..., 0]
        return activations, jnp.moveaxis(scores.reshape(batch, bands, frames), 1, 2)


def discriminate(discriminators: list, audio: jax.Array, missing: jax.Array) -> Iterator[tuple]:
    """For each discriminator: its features and scores of audio (B, N), and the frames with missing samples (B, F, 1)."""
    for params, (n_fft, hop) in zip(discriminators, DISCRIMINATOR_STFTS, strict=True):
        yield *Discriminator().apply(params, spectrum_of(audio, n_fft, hop)), frames_in_gap(missing, n_fft, hop)


def init_discriminators(key: jax.Array) -> list:
    """Initial parameters of the discriminators."""
    keys = zip(jax.random.split(key, len(DISCRIMINATOR_STFTS)), DISCRIMINATOR_STFTS, strict=True)
    return [Discriminator().init(k, jnp.ones((1, 8, n_fft // 2 + 1))) for k, (n_fft, _) in keys]


def mean_over(x: jax.Array, in_gap: jax.Array) -> jax.Array:
    """Mean of (B, F, bands) over frames (B, F, 1)."""
    return (x * in_gap).sum() / (in_gap.sum() * x.shape[-1])


def waveforms_of(data_dir: str, split: str) -> list[np.ndarray]:
    """The recordings from first to last word, with 0.3 s on both sides."""
    records = input_pipeline.Records(input_pipeline.find_dataset(data_dir, "speaker_independent"), split, mouth=False)
    waveforms = []
    for i in range(len(records)):
        example = input_pipeline.to_example(records[i])
        n = int(example["audio_length"])
        first, last = (example["speech"] * RECORD_RATE).astype(int) + (-4800, 4800)
        first = max(0, min(first, n - SEGMENT))
        waveforms.append(example["audio"][first : min(n, max(last, first + SEGMENT))])
    return [x for x in waveforms if len(x) >= SEGMENT]


def draw_examples(waveforms: list[np.ndarray], rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(audio, missing) (count, SEGMENT): one gap each, with audio on both sides and a random gain."""
    cuts, missing = np.zeros((count, SEGMENT), np.float32), np.zeros((count, SEGMENT), bool)
    for b, i in enumerate(rng.integers(len(waveforms), size=count)):
        at = rng.integers(len(waveforms[i]) - SEGMENT + 1)
        cuts[b] = waveforms[i][at : at + SEGMENT] / 32768 * 10 ** rng.uniform(-0.3, 0.3)
        length = int(rng.uniform(*GAP_MS) * SPEC.rate / 1000)
        start = rng.integers(1600, SEGMENT - length - 1600)
        missing[b, start : start + length] = True
    return cuts, missing


def predicted_gaps(data_dir: str, run: Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(audio (N,) float32, level (F, K) float16, gap (2,)) of GAPS_PER_CLIP gaps of every clip of train; levels by `run`."""
    restorer = restorer_lib.Restorer.from_workdir(run)
    if restorer.spec != SPEC:
        raise SystemExit(f"--run={run}: found preset {restorer.spec.name}, expected {SPEC.name}")
    batch, rng, gaps = vocoders.read_clips(data_dir, "train", 0), np.random.default_rng(0), []
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    for _ in range(GAPS_PER_CLIP):
        gap = np.stack([draw_gap(rng, n, speech) for n, speech in zip(batch["audio_length"], batch["speech"], strict=True)])
        for at in range(0, len(gap), 32):
            take = np.arange(at, at + 32) % len(gap)  # one shape, so one compiled program
            part = {k: v[take] for k, v in arrays.items()}
            level = np.asarray(restorer.restore(part, gap[take][:, None]).level, np.float16)
            audio = restorer_lib.recording(part, SPEC)
            gaps += [(audio[i], level[i], gap[at + i]) for i in range(min(32, len(gap) - at))]
    return gaps


def draw_gap(rng: np.random.Generator, length: int, speech: np.ndarray) -> np.ndarray:
    """[start, end) of a gap that begins inside the words, with MARGIN on both sides."""
    size = int(rng.uniform(*GAP_MS) * SPEC.rate / 1000)
    latest = min(length, SPEC.num_samples) - size - MARGIN
    first, last = (np.clip(int(t * SPEC.rate), MARGIN, latest) for t in (speech[0], speech[1] - size / SPEC.rate))
    start = rng.integers(first, max(first, last) + 1)
    return np.array([start, start + size])


def draw_predicted_examples(gaps: list[tuple], rng: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
    """(audio, missing, level) (count, SEGMENT or frames): gaps with predicted levels, and at least MARGIN on both sides."""
    cuts, missing, levels = np.zeros((count, SEGMENT), np.float32), np.zeros((count, SEGMENT), bool), []
    for b, i in enumerate(rng.integers(len(gaps), size=count)):
        audio, level, (start, end) = gaps[i]
        low, high = max(0, end + MARGIN - SEGMENT), min(start - MARGIN, SPEC.num_samples - SEGMENT)
        at = rng.integers(-(-low // SPEC.hop), high // SPEC.hop + 1)  # frames
        first = at * SPEC.hop
        cuts[b], missing[b, start - first : end - first] = audio[first : first + SEGMENT], True
        levels.append(level[at : at + SPEC.frames_of(SEGMENT)])
    return cuts, missing, np.stack(levels).astype(np.float32)


def reconstruction(magnitude: jax.Array, generated: jax.Array, audio: jax.Array, missing: jax.Array) -> jax.Array:
    """Multi-resolution STFT loss plus half the mean difference of the log magnitudes."""
    true, in_gap = jnp.abs(stft.stft(audio, SPEC)), stft.frames_containing(missing, SPEC)[..., None]
    difference = mean_over(jnp.abs(jnp.log(magnitude + 1e-4) - jnp.log(true + 1e-4)), in_gap)
    return distance(generated, audio, missing) + 0.5 * difference


def optimiser_of(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay and gradient clipping."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 200, steps, rate / 100)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.8, b2=0.99, weight_decay=0.01))


def train(data_dir: str, out: Path, steps: int, batch_size: int) -> None:
    """The `train` command."""
    optimiser = optimiser_of(1e-3, steps)
    params = jax.jit(init_network)(jax.random.key(0))
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")

    def loss(params, audio, missing):
        magnitude, unit = apply(params, stft.log_mel(audio, SPEC), audio, missing)
        return reconstruction(magnitude, splice_in(magnitude, unit, audio, missing), audio, missing)

    @jax.jit
    def step(carry, audio, missing):
        params, state = carry
        value, slope = jax.value_and_grad(loss)(params, audio, missing)
        update, state = optimiser.update(slope, state, params)
        return (optax.apply_updates(params, update), state), {"loss": value}

    waveforms = waveforms_of(data_dir, "train")
    train_loop(out, steps, (params, optimiser.init(params)), step, lambda rng: draw_examples(waveforms, rng, batch_size))


def tune(data_dir: str, out: Path, weights: Path, run: Path, steps: int, batch_size: int) -> None:
    """The `tune` command."""
    params, discriminators = load(weights)[0], jax.jit(init_discriminators)(jax.random.key(1))
    optimiser, discriminator_optimiser = optimiser_of(3e-4, steps), optimiser_of(3e-4, steps)
    print(f"discriminators: {sum(x.size for x in jax.tree.leaves(discriminators)):,} parameters")

    def loss(params, discriminators, audio, missing, level):
        magnitude, unit = apply(params, level, audio, missing)
        generated = splice_in(magnitude, unit, audio, missing)
        error = reconstruction(magnitude, generated, audio, missing)
        adversarial = matching = 0.0
        for (features, score, in_gap), (wanted, _, _) in zip(
            discriminate(discriminators, generated, missing), discriminate(discriminators, audio, missing), strict=True
        ):
            adversarial -= mean_over(score, in_gap) / len(DISCRIMINATOR_STFTS)
            pairs = zip(features, wanted, strict=True)
            differences = [mean_over(jnp.abs(a - b).mean(-1), in_gap) / jnp.abs(b).mean() for a, b in pairs]
            matching += sum(differences) / len(differences) / len(DISCRIMINATOR_STFTS)
        metrics = {"loss": error, "adversarial": adversarial, "matching": matching, "generated": generated}
        return error + ADVERSARIAL * adversarial + MATCHING * matching, metrics

    def discriminator_loss(discriminators, generated, audio, missing):
        both = zip(discriminate(discriminators, generated, missing), discriminate(discriminators, audio, missing), strict=True)
        hinge = [mean_over(nn.relu(1 + a) + nn.relu(1 - b), in_gap) for (_, a, in_gap), (_, b, _) in both]
        return sum(hinge) / len(DISCRIMINATOR_STFTS)

    @jax.jit
    def step(carry, audio, missing, level):
        params, discriminators, state, discriminator_state = carry
        gradient, metrics = jax.grad(loss, has_aux=True)(params, discriminators, audio, missing, level)
        value_and_grad = jax.value_and_grad(discriminator_loss)
        metrics["discriminators"], gradient_d = value_and_grad(discriminators, metrics.pop("generated"), audio, missing)
        update, state = optimiser.update(gradient, state, params)
        update_d, discriminator_state = discriminator_optimiser.update(gradient_d, discriminator_state, discriminators)
        params, discriminators = optax.apply_updates(params, update), optax.apply_updates(discriminators, update_d)
        return (params, discriminators, state, discriminator_state), metrics

    waveforms, gaps = waveforms_of(data_dir, "train"), predicted_gaps(data_dir, run)
    true_level = jax.jit(lambda audio: stft.log_mel(audio, SPEC))

    def draw(rng):
        audio, missing = draw_examples(waveforms, rng, batch_size // 2)
        halves = (audio, missing, np.asarray(true_level(audio))), draw_predicted_examples(gaps, rng, batch_size - batch_size // 2)
        return [np.concatenate(both) for both in zip(*halves, strict=True)]

    carry = params, discriminators, optimiser.init(params), discriminator_optimiser.init(discriminators)
    train_loop(out, steps, carry, step, draw)


def train_loop(out: Path, steps: int, carry: Any, step: Callable, draw: Callable) -> None:
    """Training steps, continuing from `out` if it exists; draw(generator) -> examples; saves every SAVE_EVERY steps."""
    done, start, metrics = 0, time.monotonic(), []
    if out.is_file():
        with np.load(out) as file:
            done, leaves = int(file["step"]), [file[f"a{i}"] for i in range(len(file.files) - 1)]
        carry = jax.tree.unflatten(jax.tree.structure(carry), leaves)
    for n in range(done, steps):
        carry, values = step(carry, *draw(np.random.default_rng(n)))
        metrics.append(jax.device_get(values))
        if (n + 1) % SAVE_EVERY == 0 or n + 1 == steps:
            arrays = {f"a{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(carry))}
            partial = out.with_suffix(".part.npz")
            np.savez(partial, step=n + 1, **arrays)
            partial.replace(out)
            means = "  ".join(f"{k} {np.mean([t[k] for t in metrics[-SAVE_EVERY:]]):.4f}" for k in metrics[-1])
            print(f"step {n + 1}/{steps}  {means}  {(n + 1 - done) / (time.monotonic() - start):.2f} steps/s", flush=True)


def load(weights: Path) -> tuple[Any, int]:
    """(parameters of the network, training steps) in a file of `train` or `tune`."""
    like = jax.eval_shape(init_network, jax.random.key(0))
    with np.load(weights) as file:
        leaves = [file[f"a{i}"] for i in range(len(jax.tree.leaves(like)))]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), int(file["step"])


@functools.partial(jax.jit, static_argnames=("iterations", "own_phases"))
def in_griffin_lim(magnitude, unit, known, missing, seeds, iterations: int, own_phases: bool):
    """Griffin-Lim with the known samples fixed, on the network's magnitudes, from its own or from random phases."""
    frame = jnp.arange(SPEC.n_fft // 2 + 1)[None, None]
    # Frames of griffin_lim begin with the window, those of stft with the zeros before it: phases differ by that delay.
    turn = jnp.exp(2j * np.pi * frame * ((SPEC.n_fft - SPEC.window) // 2) / SPEC.n_fft)
    phases = unit * turn if own_phases else griffin_lim._first_phases(magnitude.shape, seeds)
    fixed, free = griffin_lim._to_hops(jnp.where(missing, 0.0, known), SPEC), griffin_lim._to_hops(missing, SPEC)
    generated = griffin_lim._iterate(magnitude, phases, fixed, free, SPEC, iterations, griffin_lim.MOMENTUM)
    return jnp.where(missing, griffin_lim._from_hops(generated, SPEC, known.shape[1]), known)


def measure(data_dir: str, weights: Path, run: Path, split: str, clips: int, gap_lengths: Sequence[int]) -> None:
    """The `measure` command: prints a Markdown table of scores and of differences from Griffin-Lim."""
    params, step = load(weights)
    restorer = restorer_lib.Restorer.from_workdir(run)
    if restorer.spec != SPEC:
        raise SystemExit(f"--run={run}: found preset {restorer.spec.name}, expected {SPEC.name}")
    batch = vocoders.read_clips(data_dir, split, clips)
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    true_audio, seeds = np.asarray(vocoders.audio_of(batch, SPEC)), jnp.asarray(batch["id_hash"])
    print(f"{weights} at step {step}, {len(true_audio)} clips of {split}")
    print("| gap | level | audio | PESQ nb | PESQ wb | STOI | ESTOI | gap L1, dB |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for gap_ms in gap_lengths:
        gap = vocoders.gap_places(batch, gap_ms, SPEC)
        known, missing = vocoders.masked(batch, SPEC, gap)
        levels = {"true": stft.log_mel(true_audio, SPEC), "predicted": restorer.restore(arrays, gap).level}
        for kind, level in levels.items():
            level = jnp.asarray(level)
            magnitude, unit = jax.jit(apply)(params, level, known, missing)
            with_griffin_lim = functools.partial(in_griffin_lim, magnitude, unit, known, missing, seeds)
            generated = {
                "Griffin-Lim": griffin_lim.inpaint_gap(
                    level, known, missing, SPEC, seeds=seeds, lengths=vocoders.lengths_of(batch, SPEC)
                ),
                "network": splice_in(magnitude, unit, known, missing),
                "its magnitudes": with_griffin_lim(iterations=griffin_lim.ITERATIONS, own_phases=False),
                "both, 5 iterations": with_griffin_lim(iterations=5, own_phases=True),
                "both, 30": with_griffin_lim(iterations=griffin_lim.ITERATIONS, own_phases=True),
            }
            for name, audio in generated.items():
                scores = vocoders.scores_of(true_audio, audio, batch, SPEC, gap)
                rows = {name: [bootstrap.bootstrap_mean(scores[m]) for m in vocoders.SCORES]}
                if name == "Griffin-Lim":
                    reference = scores
                else:
                    gains = [bootstrap.paired_difference(scores[m], reference[m]) for m in vocoders.SCORES]
                    rows[f"{name}, minus Griffin-Lim"] = gains
                for label, values in rows.items():
                    cells = [f"{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]" for v in values]
                    print(f"| {gap_ms} ms | {kind} | {label} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """The command `python -m benchmarks.quality.neural_vocoder`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("train", "tune", "measure"))
    parser.add_argument("--data_dir", required=True, help="dataset written by avsi-prepare")
    parser.add_argument("--out", type=Path, help="train, tune: file to write, and to continue from")
    parser.add_argument("--steps", type=int, default=4000, help="train, tune: default %(default)s")
    parser.add_argument("--batch_size", type=int, default=8, help="train, tune: default %(default)s")
    parser.add_argument("--weights", type=Path, help="tune, measure: file written by train or tune")
    parser.add_argument("--run", type=Path, help="tune, measure: workdir of a training that predicts levels")
    parser.add_argument("--split", default="validation_seen", help="measure: default %(default)s")
    parser.add_argument("--clips", type=int, default=40, help="measure: default %(default)s")
    parser.add_argument("--gap_ms", default="300,900,1500", help="measure: default %(default)s")
    args = parser.parse_args()
    needed = {"train": ("out",), "tune": ("out", "weights", "run"), "measure": ("weights", "run")}[args.what]
    if missing := [name for name in needed if not getattr(args, name)]:
        parser.error(f"{args.what}: no --{missing[0]} given")
    if args.what == "train":
        train(args.data_dir, args.out, args.steps, args.batch_size)
    elif args.what == "tune":
        tune(args.data_dir, args.out, args.weights, args.run, args.steps, args.batch_size)
    else:
        measure(args.data_dir, args.weights, args.run, args.split, args.clips, [int(ms) for ms in args.gap_ms.split(",")])


if __name__ == "__main__":
    main()
