"""Trains a refiner (models/refiner.py) on the predictions of a trained system, and writes weights that contain both.

    python -m avsi_jax.inference.refine --checkpoint=RUN --data_dir=DATA --out=WEIGHTS

The gaps are those of the train split and, where the dataset librispeech is in DATA, of as many excerpts of its recordings, without
video. The system was trained on the former, so its predictions for them are better than for a new clip; of the latter that is true
only if they were its audio-only clips. Everything is kept in WEIGHTS.training until the weights are written, so a training that was
stopped continues when it is started again.

Letters: B clips, F spectrogram frames, K bands.
"""

from __future__ import annotations

import functools
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from avsi_jax.data import input_pipeline
from avsi_jax.inference import weights
from avsi_jax.inference.restorer import Restorer, read_run
from avsi_jax.models import refiner
from avsi_jax.presets import RECORD_RATE
from avsi_jax.runtime import unexpected_errors
from avsi_jax.runtime.command_line import Parser

GAP_MS = (300, 1500)
WINDOW = 160  # frames of a training example
MATCHING, DISTANCE, LEVEL = 4.0, 4.0, 2.0  # weights relative to the adversarial loss
LEARNING_RATE = 4e-4
SAVE_EVERY = 100  # training steps
BATCH = 32  # clips that are restored at once
NUM_BLOCKS = 6


# ---- predictions ---------------------------------------------------------------------------------------------------------------


def predicted_gaps(restorer: Restorer, data_dir: str, gaps_per_clip: int, report: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Standardised levels 'predicted' and 'true' (B, F, K) float16 and 'mask' (B, F) of random gaps; the same for every call."""
    rng = np.random.default_rng(0)
    mean, std = level_scale(restorer)
    config = restorer.config
    records = input_pipeline.Records(input_pipeline.find_dataset(data_dir, config.builder_config), config.train_split, mouth=False)
    sources: list[tuple[Callable[[int], dict], int]] = [(lambda i: input_pipeline.to_example(records[i]), len(records))]
    if (Path(data_dir) / "librispeech").exists():
        found = input_pipeline.find_dataset(data_dir, config.audio_only_config, "librispeech")
        recordings = input_pipeline.Records(found, "train", mouth=False)
        excerpt = lambda i: input_pipeline.to_example(input_pipeline.audio_excerpt(recordings[i], rng.uniform()))
        sources.append((excerpt, len(recordings)))
    arrays: dict[str, list] = {"predicted": [], "true": [], "mask": []}
    wanted = gaps_per_clip * len(records)
    for example, count in sources:
        order = np.concatenate([rng.permutation(count) for _ in range(-(-wanted // count))])
        for at in range(0, wanted, BATCH):
            rows = [example(int(order[i % wanted])) for i in range(at, at + BATCH)]  # one shape, so one compiled program
            batch = {k: np.stack([r[k] for r in rows]) for k in rows[0] if k != "clip_id"}
            gap = np.stack([draw_gap(rng, int(n), words) for n, words in zip(batch["audio_length"], batch["speech"], strict=True)])
            restored, kept = restorer.restore(batch, gap[:, None]), min(BATCH, wanted - at)
            arrays["predicted"].append(np.float16((np.asarray(restored.level) - mean) / std)[:kept])
            arrays["true"].append(np.float16((np.asarray(restored.features.target) - mean) / std)[:kept])
            arrays["mask"].append(np.asarray(restored.features.mask)[:kept])
        report(f"predicted {wanted} gaps of {count} recordings")
    return {k: np.concatenate(v) for k, v in arrays.items()}


def level_scale(restorer: Restorer) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, (K,) or (1,), of a system's levels; 0 and 1 where they are not standardised."""
    scale = restorer.feature_config.normalisation.level
    return (np.float32(scale.mean), np.float32(scale.std)) if scale else (np.float32([0]), np.float32([1]))


def draw_gap(rng: np.random.Generator, num_samples: int, words_s: np.ndarray) -> np.ndarray:
    """[start, end) in record samples of a gap that begins inside the words; words_s: start and end of the words in seconds."""
    length = int(rng.uniform(*GAP_MS) * RECORD_RATE / 1000)
    latest = max(0, num_samples - length)
    first, last = (np.clip(int(t * RECORD_RATE), 0, latest) for t in (words_s[0], words_s[1] - length / RECORD_RATE))
    start = int(rng.integers(first, max(first, last) + 1))
    return np.array([start, start + length])


def draw_windows(gaps: dict[str, np.ndarray], rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """predicted, true (count, WINDOW, K) float32 and mask (count, WINDOW): windows that overlap a gap."""
    windows: list[list] = [[], [], []]
    for i in rng.integers(len(gaps["mask"]), size=count):
        frames = np.flatnonzero(gaps["mask"][i])
        inside = int(rng.integers(frames[0], frames[-1] + 1))
        start = int(np.clip(inside - rng.integers(WINDOW), 0, gaps["mask"].shape[1] - WINDOW))
        for window, name in zip(windows, ("predicted", "true", "mask"), strict=True):
            window.append(gaps[name][i, start : start + WINDOW])
    predicted, true, mask = map(np.stack, windows)
    return [predicted.astype(np.float32), true.astype(np.float32), mask]


# ---- training ------------------------------------------------------------------------------------------------------------------


def init(key: jax.Array, num_bands: int) -> tuple[dict, list[dict]]:
    """Initial parameters of the refiner and of a critic per scale."""
    level, mask = jnp.zeros((1, WINDOW, num_bands)), jnp.zeros((1, WINDOW), bool)
    keys = jax.random.split(key, 1 + len(refiner.CRITIC_SCALES))
    make = refiner.Refiner(num_blocks=NUM_BLOCKS)
    params = make.init(keys[0], level, mask, jnp.zeros((1, WINDOW, refiner.NUM_NOISE)))["params"]
    return params, [refiner.Critic().init(k, level, mask)["params"] for k in keys[1:]]


def criticise(critics: list[dict], level: jax.Array, mask: jax.Array) -> list[tuple[jax.Array, list[jax.Array]]]:
    """(scores, activations) of each critic for level (B, F, K) and mask (B, F)."""
    pairs = zip(critics, refiner.CRITIC_SCALES, strict=True)
    return [refiner.Critic().apply({"params": params}, *refiner.averaged(level, mask, scale)) for params, scale in pairs]


def refiner_loss(params: dict, critics: list[dict], predicted, true, mask, noise) -> tuple[jax.Array, dict]:
    """Loss of the refiner; its parts, with the refined level."""
    refined = refiner.Refiner(num_blocks=NUM_BLOCKS).apply({"params": params}, predicted, mask, noise)
    inside = mask[..., None]
    distance = (jnp.abs(refined - true) * inside).sum() / (mask.sum() * true.shape[-1])
    mean_level = lambda x: (x * inside).sum((1, 2)) / (mask.sum(1) * x.shape[-1])
    level_error = jnp.abs(mean_level(refined) - mean_level(true)).mean()
    adversarial = matching = 0.0
    for (scores, made), (_, wanted) in zip(criticise(critics, refined, mask), criticise(critics, true, mask), strict=True):
        adversarial -= scores.mean() / len(critics)
        pairs = zip(made, wanted, strict=True)
        matching += sum(jnp.abs(a - jax.lax.stop_gradient(b)).mean() for a, b in pairs) / len(critics)
    total = adversarial + MATCHING * matching + DISTANCE * distance + LEVEL * level_error
    parts = {"distance": distance, "level error": level_error, "adversarial": adversarial, "matching": matching}
    return total, parts | {"refined": refined}


def critic_loss(critics: list[dict], refined, true, mask) -> jax.Array:
    """Hinge loss of the critics."""
    pairs = zip(criticise(critics, refined, mask), criticise(critics, true, mask), strict=True)
    return sum((jax.nn.relu(1 + a).mean() + jax.nn.relu(1 - b).mean()) / len(critics) for (a, _), (b, _) in pairs)


def train(
    gaps: dict[str, np.ndarray], state_file: Path, steps: int, batch_size: int, seed: int, report: Callable[[str], None]
) -> dict:
    """Trains a refiner for `steps` steps and returns its parameters; continues from state_file, which it writes regularly."""
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimiser = optax.adam(schedule, b1=0.5, b2=0.9)
    params, critics = init(jax.random.key(seed), gaps["true"].shape[-1])
    state = params, critics, optimiser.init(params), optimiser.init(critics)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, key, predicted, true, mask):
        params, critics, moments, critic_moments = state
        noise = jax.random.normal(key, (*mask.shape, refiner.NUM_NOISE))
        gradient, parts = jax.grad(refiner_loss, has_aux=True)(params, critics, predicted, true, mask, noise)
        parts["critics"], critic_gradient = jax.value_and_grad(critic_loss)(critics, parts.pop("refined"), true, mask)
        update, moments = optimiser.update(gradient, moments)
        critic_update, critic_moments = optimiser.update(critic_gradient, critic_moments)
        params, critics = optax.apply_updates(params, update), optax.apply_updates(critics, critic_update)
        return (params, critics, moments, critic_moments), parts

    done, began, history = 0, time.monotonic(), []
    if state_file.is_file():
        with np.load(state_file) as file:
            done, leaves = int(file["step"]), [jnp.asarray(file[f"a{i}"]) for i in range(len(file.files) - 1)]
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    for n in range(done, steps):
        state, parts = step(state, jax.random.key(n), *draw_windows(gaps, np.random.default_rng((seed, n)), batch_size))
        history.append({k: float(v) for k, v in parts.items()})
        if (n + 1) % SAVE_EVERY == 0 or n + 1 == steps:
            save(state_file, step=n + 1, **{f"a{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))})
            means = "  ".join(f"{k} {np.mean([x[k] for x in history[-SAVE_EVERY:]]):.3f}" for k in parts)
            rate = (n + 1 - done) / (time.monotonic() - began)
            report(f"step {n + 1} of {steps}  {means}  {rate:.2f} steps/s, {(steps - n - 1) / rate:.0f} s left")
    return jax.device_get(state[0])


def save(path: Path, **arrays: np.ndarray) -> None:
    """Writes an .npz file atomically."""
    partial = path.with_suffix(".part.npz")
    np.savez(partial, **arrays)
    partial.replace(path)


# ---- the command ---------------------------------------------------------------------------------------------------------------


def refine(
    checkpoint: str, data_dir: str, out: Path, *, steps: int, batch_size: int, gaps_per_clip: int, seed: int, overwrite: bool
) -> Path:
    """Writes the folder of weights `out`: those of `checkpoint` with a refiner. Errors of `weights.read` and `weights.write`."""
    report = lambda text: print(text, file=sys.stderr, flush=True)
    if not overwrite and (out / weights.TENSORS).exists():
        raise FileExistsError(f"{out / weights.TENSORS} exists; pass --overwrite to replace it, or choose another folder")
    folder = weights.locate(checkpoint)
    loaded = weights.read(folder) if folder else None
    restorer = Restorer(*(loaded.run if loaded else read_run(checkpoint)), mode="mean")
    working = out.with_name(f"{out.name}.training")
    working.mkdir(parents=True, exist_ok=True)
    if not (gaps_file := working / "gaps.npz").is_file():
        save(gaps_file, **predicted_gaps(restorer, data_dir, gaps_per_clip, report))
    with np.load(gaps_file) as file:
        gaps = {name: file[name] for name in file.files}
    params = train(gaps, working / "state.npz", steps, batch_size, seed, report)
    write(out, restorer, params, loaded.facts if loaded else {}, steps=steps, overwrite=overwrite)
    shutil.rmtree(working)
    return out


def write(out: Path, restorer: Restorer, params: dict, facts: dict, *, steps: int, overwrite: bool) -> None:
    """Writes the weights of a system with the refiner's `params`; the quality in `facts` is left out: another system's."""
    from avsi_jax.inference.trained_run import Run

    config = restorer.config.copy_and_resolve_references()
    with config.unlocked():
        config.refiner = NUM_BLOCKS
    both = {refiner.NETWORK: restorer.params, refiner.REFINER: params}
    run = Run(config.lock(), both, restorer.step, restorer.feature_config.normalisation)
    weights.write(out, run, facts | {"evaluations": [], "measured": {}, "refiner": {"steps": steps}}, overwrite=overwrite)


@unexpected_errors.reported("avsi_jax.inference.refine")
def main(argv: list[str] | None = None) -> int:
    """The command python -m avsi_jax.inference.refine; returns its exit code."""
    description = "Trains a refiner on the predictions of a system; writes weights with both."
    parser = Parser("python -m avsi_jax.inference.refine", description=description)
    parser.add_argument("--checkpoint", required=True, help="run directory, folder of weights, or a name such as pretrained")
    parser.add_argument("--data_dir", required=True, help="folder of datasets, as avsi-prepare --data_dir wrote it")
    parser.add_argument("--out", required=True, type=Path, help="output folder of the weights")
    parser.add_argument("--steps", type=int, default=1200, help="training steps; default %(default)s")
    parser.add_argument("--batch_size", type=int, default=16, help="windows of a training step; default %(default)s")
    parser.add_argument("--gaps_per_clip", type=int, default=2, help="random gaps of each clip; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and examples; default %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace existing weights")
    known = parser.parse_args(argv)
    try:
        for name in ("steps", "batch_size", "gaps_per_clip"):
            if getattr(known, name) < 1:
                raise ValueError(f"--{name}: found {getattr(known, name)}, expected 1 or more")
        numbers = {k: getattr(known, k) for k in ("steps", "batch_size", "gaps_per_clip", "seed")}
        print(refine(known.checkpoint, known.data_dir, known.out, **numbers, overwrite=known.overwrite))
    except (ValueError, OSError) as error:
        print(f"avsi_jax.inference.refine: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
