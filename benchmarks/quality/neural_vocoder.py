"""Whether a network makes better sound of a log-mel and the sound around a gap than Griffin-Lim does: docs/vocoder.md.

    python -m benchmarks.quality.neural_vocoder train --data_dir=DATA --out=FILE.npz [--steps=4000]    goes on with what FILE holds
    python -m benchmarks.quality.neural_vocoder tune --data_dir=DATA --out=FILE2.npz --weights=FILE.npz --run=RUN    so does this
    python -m benchmarks.quality.neural_vocoder measure --data_dir=DATA --weights=FILE.npz --run=RUN

ConvNeXt blocks at the frames' rate with an inverse-STFT head (Siuzdak 2023), preset `wide`. It sees the log-mel, the mask, and the
STFT of the known samples; it says how far every bin is from the mel's inversion, and its phase. Learned by the multi-resolution
STFT loss (Yamamoto et al. 2020) of the joined sound at true levels of the train split; then tuned against critics of its spectra
(hinge loss and feature matching), every other example at levels that a system predicted. Measured three ways: its sound as it is,
its magnitudes in Griffin-Lim, and both its magnitudes and its phases as Griffin-Lim's beginning.
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

from avsi_jax.audio import griffin_lim, stft
from avsi_jax.data import input_pipeline
from avsi_jax.evaluation import bootstrap
from avsi_jax.inference import restorer as restorer_lib
from avsi_jax.presets import RECORD_RATE, get
from benchmarks.quality import griffin_lim as oracle_mels

SPEC = get("wide")
BINS = SPEC.n_fft // 2 + 1
SEGMENT = 128 * SPEC.hop  # samples that a step learns from
GAP_MS = (200, 900)
RESOLUTIONS = ((256, 64), (512, 128), (1024, 256))
SAVE_EVERY = 250  # steps
CRITICS = ((256, 128), (512, 256), (1024, 512))  # (n_fft, hop) that each of them sees
BAND = 32  # bins that a critic judges at once
PLACES = 3  # gaps of each clip that a system predicts levels for
MARGIN = 1600  # samples heard on either side of a gap
ADVERSARIAL, MATCHING = 0.1, 0.5  # weights beside the multi-resolution loss


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
        magnitude = griffin_lim.mel_to_magnitude(stft.magnitude_from_level(level, SPEC), SPEC)
        unit = jax.lax.complex(real, imag) * jax.lax.rsqrt(real**2 + imag**2 + 1e-8)
        return magnitude * jnp.exp(jnp.clip(off, -6, 3)), unit


def apply(params, level, known, missing):
    """Magnitudes and phases (B, F, bins) of the network for known sound (B, N) with samples lost."""
    return Network().apply(params, level, stft.stft(jnp.where(missing, 0.0, known), SPEC), stft.frames_holding(missing, SPEC))


def initial(key):
    zeros = jnp.zeros((1, SEGMENT))
    return Network().init(key, stft.log_mel(zeros, SPEC), stft.stft(zeros, SPEC), jnp.zeros((1, SPEC.frames_of(SEGMENT)), bool))


def joined(magnitude, unit, known, missing):
    """The network's own sound where samples are lost."""
    return jnp.where(missing, stft.istft(magnitude * unit, SPEC, known.shape[1], floor=0.25), known)


def cut(x, n_fft: int, hop: int):
    """(B, N) -> frames (B, F, n_fft), those that lie inside; n_fft is a multiple of hop."""
    hops = x[:, : x.shape[1] // hop * hop].reshape(len(x), -1, hop)
    pieces = n_fft // hop
    frames = hops.shape[1] - pieces + 1
    return jnp.concatenate([hops[:, p : p + frames] for p in range(pieces)], -1)


def spectrum_of(x, n_fft: int, hop: int):
    power = jnp.abs(jnp.fft.rfft(cut(x, n_fft, hop) * jnp.hanning(n_fft)[None, None], axis=-1) + 1e-7)
    return jnp.maximum(power, 1e-4)


def frames_with(missing, n_fft: int, hop: int):
    """(B, N) -> (B, F, 1): the frames of `cut` that hold lost samples."""
    return cut(missing, n_fft, hop).any(-1, keepdims=True)


def distance(made, true, missing):
    """Multi-resolution STFT loss of (B, N), over the frames that hold lost samples."""
    total = 0.0
    for n_fft, hop in RESOLUTIONS:
        a, b, held = spectrum_of(made, n_fft, hop), spectrum_of(true, n_fft, hop), frames_with(missing, n_fft, hop)
        log = (jnp.abs(jnp.log(a) - jnp.log(b)) * held).sum() / (held.sum() * a.shape[-1])
        convergence = jnp.sqrt((((a - b) * held) ** 2).sum() / ((b * held) ** 2).sum())
        total += (log + convergence) / len(RESOLUTIONS)
    return total


class Critic(nn.Module):
    """Spectrum (B, F, bins) -> what it made of it (a list of (B, F, bands, size)) and scores (B, F, bands), high for recordings.

    Bands of 32 bins, each seen on its own over time by the same blocks: cheap, and local as Jang et al. (2021) want it.
    """

    size: int = 64
    blocks: int = 3

    @nn.compact
    def __call__(self, spectrum):
        batch, frames, bands = *spectrum.shape[:2], spectrum.shape[2] // BAND
        x = jnp.log(spectrum[..., 1 : 1 + bands * BAND]).reshape(batch, frames, bands, BAND)
        x = nn.Dense(self.size)((x + 4.0) / 3.0) + self.param("band", nn.initializers.normal(0.02), (bands, self.size))
        x, seen = jnp.moveaxis(x, 2, 1).reshape(-1, frames, self.size), []
        for _ in range(self.blocks):
            x = Block()(x)
            seen.append(jnp.moveaxis(x.reshape(batch, bands, frames, self.size), 1, 2))
        scores = nn.Dense(1)(nn.LayerNorm()(x))[..., 0]
        return seen, jnp.moveaxis(scores.reshape(batch, bands, frames), 1, 2)


def judged(critics, audio, missing):
    """(what each critic saw, its scores, (B, F, 1) which frames hold lost samples) of (B, N)."""
    for params, (n_fft, hop) in zip(critics, CRITICS, strict=True):
        yield *Critic().apply(params, spectrum_of(audio, n_fft, hop)), frames_with(missing, n_fft, hop)


def initial_critics(key):
    keys = jax.random.split(key, len(CRITICS))
    return [Critic().init(k, jnp.ones((1, 8, n_fft // 2 + 1))) for k, (n_fft, _) in zip(keys, CRITICS, strict=True)]


def mean_over(x, held):
    """Mean of (B, F, bands) over the frames held (B, F, 1)."""
    return (x * held).sum() / (held.sum() * x.shape[-1])


def waveforms_of(data_dir: str, split: str) -> list[np.ndarray]:
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


def drawn(waveforms, rng, count: int):
    """(sound, lost) (count, SEGMENT): one gap each, with sound on both sides, louder or softer."""
    cuts, missing = np.zeros((count, SEGMENT), np.float32), np.zeros((count, SEGMENT), bool)
    for b, i in enumerate(rng.integers(len(waveforms), size=count)):
        at = rng.integers(len(waveforms[i]) - SEGMENT + 1)
        cuts[b] = waveforms[i][at : at + SEGMENT] / 32768 * 10 ** rng.uniform(-0.3, 0.3)
        length = int(rng.uniform(*GAP_MS) * SPEC.rate / 1000)
        start = rng.integers(1600, SEGMENT - length - 1600)
        missing[b, start : start + length] = True
    return cuts, missing


def predicted_places(data_dir: str, run: Path):
    """[(sound (N,) float32, level (F, K) float16, gap (2,))]: PLACES gaps of every clip of train, with the levels of `run`."""
    restorer = restorer_lib.Restorer.from_workdir(run)
    if restorer.spec != SPEC:
        raise SystemExit(f"--run={run}: found preset {restorer.spec.name}, expected {SPEC.name}")
    batch, rng, found = oracle_mels.read_clips(data_dir, "train", 0), np.random.default_rng(0), []
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    for _ in range(PLACES):
        gap = np.stack([somewhere(rng, n, speech) for n, speech in zip(batch["audio_length"], batch["speech"], strict=True)])
        for at in range(0, len(gap), 32):
            take = np.arange(at, at + 32) % len(gap)  # one shape, one program
            part = {k: v[take] for k, v in arrays.items()}
            level = np.asarray(restorer.restore(part, gap[take][:, None]).level, np.float16)
            audio = restorer_lib.recording(part, SPEC)
            found += [(audio[i], level[i], gap[at + i]) for i in range(min(32, len(gap) - at))]
    return found


def somewhere(rng, length: int, speech) -> np.ndarray:
    """[start, end) of a gap that begins in the words, with MARGIN on both sides."""
    size = int(rng.uniform(*GAP_MS) * SPEC.rate / 1000)
    latest = min(length, SPEC.num_samples) - size - MARGIN
    first, last = (np.clip(int(t * SPEC.rate), MARGIN, latest) for t in (speech[0], speech[1] - size / SPEC.rate))
    start = rng.integers(first, max(first, last) + 1)
    return np.array([start, start + size])


def drawn_predicted(places, rng, count: int):
    """(sound, lost, level) (count, SEGMENT or frames): what a system made of a gap, cut out with MARGIN or more on both sides."""
    cuts, missing, levels = np.zeros((count, SEGMENT), np.float32), np.zeros((count, SEGMENT), bool), []
    for b, i in enumerate(rng.integers(len(places), size=count)):
        audio, level, (start, end) = places[i]
        low, high = max(0, end + MARGIN - SEGMENT), min(start - MARGIN, SPEC.num_samples - SEGMENT)
        at = rng.integers(-(-low // SPEC.hop), high // SPEC.hop + 1)  # frames
        first = at * SPEC.hop
        cuts[b], missing[b, start - first : end - first] = audio[first : first + SEGMENT], True
        levels.append(level[at : at + SPEC.frames_of(SEGMENT)])
    return cuts, missing, np.stack(levels).astype(np.float32)


def reconstruction(magnitude, made, audio, missing):
    """Multi-resolution STFT loss, and half the distance of the log magnitudes."""
    true, held = jnp.abs(stft.stft(audio, SPEC)), stft.frames_holding(missing, SPEC)[..., None]
    off = mean_over(jnp.abs(jnp.log(magnitude + 1e-4) - jnp.log(true + 1e-4)), held)
    return distance(made, audio, missing) + 0.5 * off


def optimiser_of(rate: float, steps: int):
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 200, steps, rate / 100)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.8, b2=0.99, weight_decay=0.01))


def train(data_dir: str, out: Path, steps: int, batch_size: int) -> None:
    optimiser = optimiser_of(1e-3, steps)
    params = jax.jit(initial)(jax.random.key(0))
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")

    def loss(params, audio, missing):
        magnitude, unit = apply(params, stft.log_mel(audio, SPEC), audio, missing)
        return reconstruction(magnitude, joined(magnitude, unit, audio, missing), audio, missing)

    @jax.jit
    def step(carry, audio, missing):
        params, state = carry
        value, slope = jax.value_and_grad(loss)(params, audio, missing)
        update, state = optimiser.update(slope, state, params)
        return (optax.apply_updates(params, update), state), {"loss": value}

    waveforms = waveforms_of(data_dir, "train")
    go_on(out, steps, (params, optimiser.init(params)), step, lambda rng: drawn(waveforms, rng, batch_size))


def tune(data_dir: str, out: Path, weights: Path, run: Path, steps: int, batch_size: int) -> None:
    params, critics = load(weights)[0], jax.jit(initial_critics)(jax.random.key(1))
    mine, theirs = optimiser_of(3e-4, steps), optimiser_of(3e-4, steps)
    print(f"critics: {sum(x.size for x in jax.tree.leaves(critics)):,} parameters")

    def loss(params, critics, audio, missing, level):
        magnitude, unit = apply(params, level, audio, missing)
        made = joined(magnitude, unit, audio, missing)
        like = reconstruction(magnitude, made, audio, missing)
        fooled = matched = 0.0
        for (seen, score, held), (wanted, _, _) in zip(
            judged(critics, made, missing), judged(critics, audio, missing), strict=True
        ):
            fooled -= mean_over(score, held) / len(CRITICS)
            off = [mean_over(jnp.abs(a - b).mean(-1), held) / jnp.abs(b).mean() for a, b in zip(seen, wanted, strict=True)]
            matched += sum(off) / len(off) / len(CRITICS)
        return like + ADVERSARIAL * fooled + MATCHING * matched, {"loss": like, "fooled": fooled, "matched": matched, "made": made}

    def critics_loss(critics, made, audio, missing):
        both = zip(judged(critics, made, missing), judged(critics, audio, missing), strict=True)
        return sum(mean_over(nn.relu(1 + a) + nn.relu(1 - b), held) for (_, a, held), (_, b, _) in both) / len(CRITICS)

    @jax.jit
    def step(carry, audio, missing, level):
        params, critics, my_state, their_state = carry
        slope, told = jax.grad(loss, has_aux=True)(params, critics, audio, missing, level)
        told["critics"], theirs_slope = jax.value_and_grad(critics_loss)(critics, told.pop("made"), audio, missing)
        update, my_state = mine.update(slope, my_state, params)
        their_update, their_state = theirs.update(theirs_slope, their_state, critics)
        return (optax.apply_updates(params, update), optax.apply_updates(critics, their_update), my_state, their_state), told

    waveforms, places = waveforms_of(data_dir, "train"), predicted_places(data_dir, run)
    true_level = jax.jit(lambda audio: stft.log_mel(audio, SPEC))

    def draw(rng):
        audio, missing = drawn(waveforms, rng, batch_size // 2)
        halves = (audio, missing, np.asarray(true_level(audio))), drawn_predicted(places, rng, batch_size - batch_size // 2)
        return [np.concatenate(both) for both in zip(*halves, strict=True)]

    go_on(out, steps, (params, critics, mine.init(params), theirs.init(critics)), step, draw)


def go_on(out: Path, steps: int, carry, step, draw) -> None:
    """Steps from what `out` holds, if it is there, with what `draw` gives for each step's own generator; saved now and then."""
    done, began, told = 0, time.monotonic(), []
    if out.is_file():
        with np.load(out) as file:
            done, leaves = int(file["step"]), [file[f"a{i}"] for i in range(len(file.files) - 1)]
        carry = jax.tree.unflatten(jax.tree.structure(carry), leaves)
    for n in range(done, steps):
        carry, values = step(carry, *draw(np.random.default_rng(n)))
        told.append(jax.device_get(values))
        if (n + 1) % SAVE_EVERY == 0 or n + 1 == steps:
            arrays = {f"a{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(carry))}
            partial = out.with_suffix(".part.npz")
            np.savez(partial, step=n + 1, **arrays)
            partial.replace(out)
            means = "  ".join(f"{k} {np.mean([t[k] for t in told[-SAVE_EVERY:]]):.4f}" for k in told[-1])
            print(f"step {n + 1}/{steps}  {means}  {(n + 1 - done) / (time.monotonic() - began):.2f} steps/s", flush=True)


def load(weights: Path):
    like = jax.eval_shape(initial, jax.random.key(0))
    with np.load(weights) as file:
        leaves = [file[f"a{i}"] for i in range(len(jax.tree.leaves(like)))]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), int(file["step"])


@functools.partial(jax.jit, static_argnames=("iterations", "own_phases"))
def in_griffin_lim(magnitude, unit, known, missing, seeds, iterations: int, own_phases: bool):
    """Griffin-Lim with the known samples held, on the network's magnitudes, from its phases or drawn ones."""
    frame = jnp.arange(SPEC.n_fft // 2 + 1)[None, None]
    # vocoder's frames begin with the window, stft's with the zeros before it: bins differ by that delay.
    turn = jnp.exp(2j * np.pi * frame * ((SPEC.n_fft - SPEC.window) // 2) / SPEC.n_fft)
    phases = unit * turn if own_phases else griffin_lim._first_phases(magnitude.shape, seeds)
    held, free = griffin_lim._to_hops(jnp.where(missing, 0.0, known), SPEC), griffin_lim._to_hops(missing, SPEC)
    made = griffin_lim._iterate(magnitude, phases, held, free, SPEC, iterations, griffin_lim.MOMENTUM)
    return jnp.where(missing, griffin_lim._from_hops(made, SPEC, known.shape[1]), known)


def measure(data_dir: str, weights: Path, run: Path, split: str, clips: int, gap_lengths) -> None:
    params, step = load(weights)
    restorer = restorer_lib.Restorer.from_workdir(run)
    if restorer.spec != SPEC:
        raise SystemExit(f"--run={run}: found preset {restorer.spec.name}, expected {SPEC.name}")
    batch = oracle_mels.read_clips(data_dir, split, clips)
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    true_audio, seeds = np.asarray(oracle_mels.audio_of(batch, SPEC)), jnp.asarray(batch["id_hash"])
    print(f"{weights} at step {step}, {len(true_audio)} clips of {split}")
    print("| gap | level | sound | PESQ nb | PESQ wb | STOI | ESTOI | gap L1, dB |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for gap_ms in gap_lengths:
        gap = oracle_mels.places(batch, gap_ms, SPEC)
        known, missing = oracle_mels.masked(batch, SPEC, gap)
        levels = {"true": stft.log_mel(true_audio, SPEC), "predicted": restorer.restore(arrays, gap).level}
        for kind, level in levels.items():
            level = jnp.asarray(level)
            magnitude, unit = jax.jit(apply)(params, level, known, missing)
            of = functools.partial(in_griffin_lim, magnitude, unit, known, missing, seeds)
            made = {
                "Griffin-Lim": griffin_lim.inpaint_gap(level, known, missing, SPEC, seeds=seeds),
                "network": joined(magnitude, unit, known, missing),
                "its magnitudes": of(iterations=griffin_lim.ITERATIONS, own_phases=False),
                "both, 5 iterations": of(iterations=5, own_phases=True),
                "both, 30": of(iterations=griffin_lim.ITERATIONS, own_phases=True),
            }
            for name, audio in made.items():
                scores = oracle_mels.scores_of(true_audio, audio, batch, SPEC, gap)
                found = {name: [bootstrap.bootstrap_mean(scores[m]) for m in oracle_mels.SCORES]}
                if name == "Griffin-Lim":
                    usual = scores
                else:
                    gains = [bootstrap.paired_difference(scores[m], usual[m]) for m in oracle_mels.SCORES]
                    found[f"{name}, minus Griffin-Lim"] = gains
                for what, values in found.items():
                    cells = [f"{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]" for v in values]
                    print(f"| {gap_ms} ms | {kind} | {what} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("train", "tune", "measure"))
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
    needed = {"train": ("out",), "tune": ("out", "weights", "run"), "measure": ("weights", "run")}[args.what]
    if lacks := [name for name in needed if not getattr(args, name)]:
        parser.error(f"{args.what}: no --{lacks[0]} given")
    if args.what == "train":
        train(args.data_dir, args.out, args.steps, args.batch_size)
    elif args.what == "tune":
        tune(args.data_dir, args.out, args.weights, args.run, args.steps, args.batch_size)
    else:
        measure(args.data_dir, args.weights, args.run, args.split, args.clips, [int(ms) for ms in args.gap_ms.split(",")])


if __name__ == "__main__":
    main()
