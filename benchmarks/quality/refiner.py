"""Trains a refiner (avsi_jax/models/refiner.py) on the predictions of a trained system, and measures what it changes.

    python -m benchmarks.quality.refiner predict --data_dir=DATA --run=RUN --out=GAPS.npz
    python -m benchmarks.quality.refiner train --gaps=GAPS.npz --out=FILE.npz [--steps=1200]        continues from FILE
    python -m benchmarks.quality.refiner measure --data_dir=DATA --run=RUN --weights=FILE.npz [--split=validation]

RUN is anything that `Restorer.load` takes, such as `pretrained`. `predict` restores random gaps of the train split and, where the
dataset librispeech is in DATA, of as many excerpts of its recordings, without video: the system was not trained on these voices, so
its predictions for them are as blurred as for any new clip. `measure` scores masked audio, interpolation, the system, the refined
system and the oracle mel with all metrics of avsi-evaluate, on the gaps of protocol `waveform`.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from avsi_jax.data import input_pipeline
from avsi_jax.evaluation import bootstrap, conditions, listener_models, metrics, protocols, run_systems
from avsi_jax.inference.restorer import Restored, Restorer
from avsi_jax.models import refiner
from avsi_jax.models.systems import composite

GAP_MS = (300, 1500)
WINDOW = 160  # frames per training example
MATCHING, DISTANCE, LEVEL = 4.0, 4.0, 2.0  # weights relative to the adversarial loss
SAVE_EVERY = 100  # training steps
BATCH = 32  # clips restored at once
LISTED = ("plcmos", "dnsmos", "stoi", "estoi", "pesq_wb", "pesq_nb", "level_error_db", "gap_l1_db")


# ---- predictions ---------------------------------------------------------------------------------------------------------------


def predict(data_dir: str, run: str, out: Path, gaps_per_clip: int) -> None:
    """The `predict` command: standardised levels, predicted and true, and the mask of random gaps."""
    restorer, rng = Restorer.load(run), np.random.default_rng(0)
    mean, std = level_scale(restorer)
    records = input_pipeline.Records(input_pipeline.find_dataset(data_dir, "speaker_independent"), "train", mouth=False)
    sources = [(lambda i: input_pipeline.to_example(records[i]), len(records))] * gaps_per_clip
    if (Path(data_dir) / "librispeech").exists():
        speech = input_pipeline.Records(input_pipeline.find_dataset(data_dir, "test_clean", "librispeech"), "train", mouth=False)
        excerpt = lambda i: input_pipeline.to_example(input_pipeline.audio_excerpt(speech[i], rng.uniform()))
        sources.append((excerpt, gaps_per_clip * len(records)))
        excerpts = len(speech)
    arrays: dict[str, list] = {"predicted": [], "true": [], "mask": []}
    for number, (example, count) in enumerate(sources):
        order = rng.permutation(excerpts if number >= gaps_per_clip else count)
        for at in range(0, count, BATCH):
            rows = [example(int(order[i % len(order)])) for i in range(at, at + BATCH)]  # one shape, so one compiled program
            batch = {k: np.stack([r[k] for r in rows]) for k in rows[0] if k != "clip_id"}
            gap = np.stack(
                [draw_gap(rng, int(n), speech) for n, speech in zip(batch["audio_length"], batch["speech"], strict=True)]
            )
            restored = restorer.restore(batch, gap[:, None])
            keep = min(BATCH, count - at)
            arrays["predicted"].append(np.float16((restored.level - mean) / std)[:keep])
            arrays["true"].append(np.float16((restored.features.target - mean) / std)[:keep])
            arrays["mask"].append(np.asarray(restored.features.mask)[:keep])
        print(f"source {number + 1} of {len(sources)}: {count} gaps", flush=True)
    np.savez(out, **{k: np.concatenate(v) for k, v in arrays.items()})


def level_scale(restorer: Restorer) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (K,) of a system's levels."""
    scale = restorer.feature_config.normalisation.level
    return np.float32(scale.mean), np.float32(scale.std)


def draw_gap(rng: np.random.Generator, num_samples: int, speech_s: np.ndarray) -> np.ndarray:
    """[start, end) in record samples of a gap that begins inside the words."""
    length = int(rng.uniform(*GAP_MS) * 16)
    latest = max(0, num_samples - length)
    first, last = (np.clip(int(t * 16_000), 0, latest) for t in (speech_s[0], speech_s[1] - length / 16_000))
    start = int(rng.integers(first, max(first, last) + 1))
    return np.array([start, start + length])


# ---- training ------------------------------------------------------------------------------------------------------------------


def draw_windows(gaps: dict[str, np.ndarray], rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """predicted, true (B, WINDOW, K) float32 and mask (B, WINDOW): windows that overlap the middle of a gap."""
    windows: list[list] = [[], [], []]
    for i in rng.integers(len(gaps["mask"]), size=count):
        frames = np.flatnonzero(gaps["mask"][i])
        middle = int(rng.integers(frames[0], frames[-1] + 1))
        at = int(np.clip(middle - rng.integers(WINDOW), 0, gaps["mask"].shape[1] - WINDOW))
        for window, name in zip(windows, ("predicted", "true", "mask"), strict=True):
            window.append(gaps[name][i, at : at + WINDOW])
    return [np.stack(windows[0]).astype(np.float32), np.stack(windows[1]).astype(np.float32), np.stack(windows[2])]


def init(key: jax.Array, num_bands: int) -> tuple[dict, list[dict]]:
    """Initial parameters of the refiner and of a critic per scale."""
    level, mask = jnp.zeros((1, WINDOW, num_bands)), jnp.zeros((1, WINDOW), bool)
    keys = jax.random.split(key, 1 + len(refiner.CRITIC_SCALES))
    params = refiner.Refiner().init(keys[0], level, mask, jnp.zeros((1, WINDOW, refiner.NUM_NOISE)))
    return params, [refiner.Critic().init(k, level, mask) for k in keys[1:]]


def criticise(critics: list[dict], level: jax.Array, mask: jax.Array) -> list[tuple]:
    """(scores, activations) of each critic."""
    return [
        refiner.Critic().apply(params, *refiner.averaged(level, mask, scale))
        for params, scale in zip(critics, refiner.CRITIC_SCALES, strict=True)
    ]


def refiner_loss(params: dict, critics: list[dict], predicted, true, mask, noise) -> tuple[jax.Array, dict]:
    """Loss of the refiner, with its parts and the refined level."""
    refined = refiner.Refiner().apply(params, predicted, mask, noise)
    inside = mask[..., None] / (mask.sum() * true.shape[-1])
    distance = (jnp.abs(refined - true) * inside).sum()
    loudness = lambda x: (x * mask[..., None]).sum((1, 2)) / (mask.sum(1) * x.shape[-1])
    loudness_error = jnp.abs(loudness(refined) - loudness(true)).mean()
    adversarial = matching = 0.0
    for (scores, activations), (_, wanted) in zip(criticise(critics, refined, mask), criticise(critics, true, mask), strict=True):
        adversarial -= scores.mean() / len(critics)
        matching += sum(jnp.abs(a - jax.lax.stop_gradient(b)).mean() for a, b in zip(activations, wanted, strict=True)) / len(
            critics
        )
    total = adversarial + MATCHING * matching + DISTANCE * distance + LEVEL * loudness_error
    return total, {
        "distance": distance,
        "level": loudness_error,
        "adversarial": adversarial,
        "matching": matching,
        "refined": refined,
    }


def critic_loss(critics: list[dict], refined, true, mask) -> jax.Array:
    """Hinge loss of the critics."""
    pairs = zip(criticise(critics, refined, mask), criticise(critics, true, mask), strict=True)
    return sum((jax.nn.relu(1 + a).mean() + jax.nn.relu(1 - b).mean()) / len(critics) for (a, _), (b, _) in pairs)


def train(gaps_path: Path, out: Path, steps: int, batch_size: int, seed: int) -> None:
    """The `train` command."""
    with np.load(gaps_path) as file:
        gaps = {name: file[name] for name in file.files}
    schedule = optax.cosine_decay_schedule(4e-4, steps)
    optimiser = optax.adam(schedule, b1=0.5, b2=0.9)
    params, critics = init(jax.random.key(seed), gaps["true"].shape[-1])
    carry = params, critics, optimiser.init(params), optimiser.init(critics)
    print(f"{len(gaps['mask'])} gaps; {sum(x.size for x in jax.tree.leaves(params)):,} parameters", flush=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry, key, predicted, true, mask):
        params, critics, state, critic_state = carry
        noise = jax.random.normal(key, (*mask.shape, refiner.NUM_NOISE))
        slope, parts = jax.grad(refiner_loss, has_aux=True)(params, critics, predicted, true, mask, noise)
        parts["critics"], critic_slope = jax.value_and_grad(critic_loss)(critics, parts.pop("refined"), true, mask)
        update, state = optimiser.update(slope, state)
        critic_update, critic_state = optimiser.update(critic_slope, critic_state)
        params, critics = optax.apply_updates(params, update), optax.apply_updates(critics, critic_update)
        return (params, critics, state, critic_state), parts

    done, began, losses = 0, time.monotonic(), []
    if out.is_file():
        with np.load(out) as file:
            done, leaves = int(file["step"]), [jnp.asarray(file[f"a{i}"]) for i in range(len(file.files) - 1)]
        carry = jax.tree.unflatten(jax.tree.structure(carry), leaves)
    for n in range(done, steps):
        rng = np.random.default_rng((seed, n))
        carry, parts = step(carry, jax.random.key(n), *draw_windows(gaps, rng, batch_size))
        losses.append({k: float(v) for k, v in parts.items()})
        if (n + 1) % SAVE_EVERY == 0 or n + 1 == steps:
            arrays = {f"a{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(carry))}
            partial = out.with_suffix(".part.npz")
            np.savez(partial, step=n + 1, **arrays)
            partial.replace(out)
            means = "  ".join(f"{k} {np.mean([x[k] for x in losses[-SAVE_EVERY:]]):.3f}" for k in losses[-1])
            print(f"step {n + 1}/{steps}  {means}  {(n + 1 - done) / (time.monotonic() - began):.2f} steps/s", flush=True)


def load(weights: Path, num_bands: int) -> dict:
    """The refiner's parameters in a file of `train`."""
    like = jax.eval_shape(functools.partial(init, num_bands=num_bands), jax.random.key(0))[0]
    with np.load(weights) as file:
        return jax.tree.unflatten(jax.tree.structure(like), [file[f"a{i}"] for i in range(len(jax.tree.leaves(like)))])


# ---- measuring -----------------------------------------------------------------------------------------------------------------


class RefinedRestorer(Restorer):
    """A system whose levels are refined."""

    refiner_params: Any = None

    def restore(self, batch: dict, gap: np.ndarray) -> Restored:
        """As `Restorer.restore`."""
        restored = super().restore(batch, gap)
        level = refine(self.refiner_params, *level_scale(self), restored.level, restored.features.mask, batch["id_hash"])
        return restored._replace(level=composite(level, restored.features))


@jax.jit
def refine(params: dict, mean, std, level: jax.Array, mask: jax.Array, id_hash: jax.Array) -> jax.Array:
    """Levels (B, F, K), not standardised -> the same, refined in the frames of mask (B, F)."""
    noise = refiner.clip_noise(id_hash, level.shape[1])
    return refiner.Refiner().apply(params, (level - mean) / std, mask, noise) * std + mean


def measure(
    data_dir: str, run: str, weights: list[Path], split: str, max_clips: int, gap_lengths: list[int], csv: Path | None
) -> None:
    """The `measure` command: prints Markdown tables of scores, and of paired differences from the system."""
    from avsi_jax.evaluation.reference_cache import as_csv

    protocol, plain = protocols.PROTOCOLS["waveform"], Restorer.load(run)
    records = input_pipeline.Records(input_pipeline.find_dataset(data_dir, "speaker_independent"), split, mouth=False)
    clips = run_systems.Clips(records, run_systems.select_clips(records, max_clips))
    restorers = {plain.name: plain}
    for path in weights:
        restorers[path.stem] = RefinedRestorer.load(run)
        restorers[path.stem].refiner_params = load(path, plain.spec.bands)
    kinds = {"masked audio": "masked", "interpolation": "interpolation"}
    kinds |= dict.fromkeys(restorers, "system") | {"oracle mel": "oracle_mel"}
    rows = []

    def items():
        for batch in clips.batches(16):
            for case in map(conditions.Case, gap_lengths):
                for name, kind in kinds.items():
                    systems = [{"name": name, "kind": kind}]
                    for output in run_systems.restore_case(batch, case, protocol, restorers.get(name, plain), systems):
                        rows.append(output.row)
                        yield output.item

    progress = lambda done, _: print(f"{done} scored", file=sys.stderr, flush=True) if done % 50 == 0 else None
    scores = metrics.score_many(items(), progress=progress, listener_models=listener_models.NAMES)
    for row, score in zip(rows, scores, strict=True):
        row.update(score)
    if csv:
        csv.write_text(as_csv(rows, list(rows[0])))
    print_tables(rows, [(name, plain.name) for name in restorers if name != plain.name], split)


def print_tables(rows: list[dict], pairs: list[tuple[str, str]], split: str) -> None:
    """Prints means by gap length and system, medians of the level error, and paired differences with intervals."""
    summary = bootstrap.summarise(rows, LISTED, pairs, by_speaker=split in ("validation", "test"))
    for part, label in (("table", lambda e: e["system"]), ("paired", lambda e: f"{e['a']} minus {e['b']}")):
        cells: dict = {}
        for e in summary[part]:
            value = f"{e['median']:.1f}" if part == "table" and e["metric"] == "level_error_db" else f"{e['mean']:.3f}"
            interval = f" [{e['low']:.3f}, {e['high']:.3f}]" if part == "paired" else ""
            cells.setdefault((e["gap_ms"], label(e)), {})[e["metric"]] = value + interval
        print(f"\n{split}, n = {len({r['clip_id'] for r in rows})}; level error: median\n")
        print(f"| gap, ms | system | {' | '.join(LISTED)} |\n|---:|---|{'---:|' * len(LISTED)}")
        for (gap_ms, name), values in cells.items():
            print(f"| {gap_ms} | {name} | {' | '.join(values.get(m, '') for m in LISTED)} |", flush=True)


def main() -> None:
    """The command `python -m benchmarks.quality.refiner`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("predict", "train", "measure"))
    parser.add_argument("--data_dir", help="predict, measure: dataset written by avsi-prepare")
    parser.add_argument("--run", help="predict, measure: run directory or weights of the system")
    parser.add_argument("--gaps", type=Path, help="train: file written by predict")
    parser.add_argument("--out", type=Path, help="predict, train: file to write; train continues from it")
    parser.add_argument("--gaps_per_clip", type=int, default=2, help="predict: default %(default)s")
    parser.add_argument("--steps", type=int, default=1200, help="train: default %(default)s")
    parser.add_argument("--batch_size", type=int, default=16, help="train: default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="train: default %(default)s")
    parser.add_argument("--weights", type=Path, action="append", default=[], help="measure: file written by train; may be repeated")
    parser.add_argument("--split", default="validation", help="measure: default %(default)s")
    parser.add_argument("--max_clips", type=int, default=0, help="measure: default all")
    parser.add_argument("--gap_ms", default="300,900,1500", help="measure: default %(default)s")
    parser.add_argument("--csv", type=Path, help="measure: file for the scores of every clip")
    args = parser.parse_args()
    needed = {"predict": ("data_dir", "run", "out"), "train": ("gaps", "out"), "measure": ("data_dir", "run")}[args.what]
    if missing := [name for name in needed if not getattr(args, name)]:
        parser.error(f"{args.what}: no --{missing[0]} given")
    if args.what == "predict":
        predict(args.data_dir, args.run, args.out, args.gaps_per_clip)
    elif args.what == "train":
        train(args.gaps, args.out, args.steps, args.batch_size, args.seed)
    else:
        lengths = [int(ms) for ms in args.gap_ms.split(",")]
        measure(args.data_dir, args.run, args.weights, args.split, args.max_clips, lengths, args.csv)


if __name__ == "__main__":
    main()
