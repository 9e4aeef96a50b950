"""Learns avsi_jax/visibility.npz, the flag that says whether a picture shows the mouth, and measures it: docs/landmarks.md.

    python -m benchmarks.quality.mouth_visibility --data_dir=DATA --raw=RAW [--write]

Learned from the train split with discs, bars, cups and pieces of the same picture painted over the mouth, heads turned and lights
changed; never with the hand of the suite `occlusion`, which it is measured with, on speakers it never saw.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import cv2
import numpy as np
from scipy import optimize, special

from avsi_jax.data import input_pipeline
from avsi_jax.evaluation import occlusion, run_systems
from avsi_jax.face import landmarks, mouth_visibility
from avsi_jax.media import clip_io
from avsi_jax.runtime import process_pool

EVERY = 3  # pictures of a clip that are learned from, one in so many
HIDDEN, SEEN = 0.45, 0.1  # shares of the mouth covered: from here on hidden; up to here seen; not learned from in between
RIDGE = 1e-3
FALSE_ALARMS = 0.001  # of undamaged pictures of the train split, after smoothing


def painted_at_random(rgb, points, rng):
    """Pictures with a thing over or beside the mouth for a while, and the share of the mouth that it hides (T,)."""
    frames, height, width = rgb.shape[:3]
    first = int(rng.integers(0, frames - 20))
    last = int(rng.integers(first + 8, min(frames, first + 60) + 1))
    lips = points[first:last, landmarks.LIPS]
    span = float(np.linalg.norm(lips[:, 6] - lips[:, 0], axis=-1).mean())
    centre = lips.mean((0, 1)) + rng.normal(size=2) * span * (0.2, 0.45)
    mask = np.zeros((height, width), np.uint8)
    axes = span * rng.uniform(0.45, 1.6, 2)
    kind = rng.integers(3)
    if kind == 0:
        cv2.ellipse(
            mask,
            tuple(np.rint(centre).astype(int).tolist()),
            tuple(np.rint(axes).astype(int).tolist()),
            rng.uniform(0, 180),
            0,
            360,
            1,
            -1,
        )
    elif kind == 1:
        box = cv2.boxPoints((centre.tolist(), (2 * axes).tolist(), rng.uniform(-40, 40)))
        cv2.fillConvexPoly(mask, np.rint(box).astype(np.int32), 1)
    else:
        way = rng.normal(size=2)
        ends = [tuple(np.rint(centre + s * 9 * span * way / np.linalg.norm(way)).astype(int).tolist()) for s in (0, 1)]
        cv2.line(mask, *ends, 1, max(3, int(axes.max())))
    mask = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), rng.uniform(0.5, 2))
    fill = rng.integers(4)
    if fill == 0:
        colour = np.broadcast_to(rng.uniform(0, 255, 3), rgb.shape[1:])
    elif fill == 1:
        colour = occlusion._skin(rgb[first], points[first], mask.shape, rng)
    elif fill == 2:  # another place of the same picture
        shift = (int(rng.integers(30, 150)) * rng.choice((-1, 1)), int(rng.integers(-100, 100)))
        colour = np.roll(rgb[first], shift, (0, 1)).astype(np.float32)
    else:
        colour = cv2.GaussianBlur(rng.normal(size=rgb.shape[1:]).astype(np.float32), (0, 0), rng.uniform(0.5, 6))
        colour = rng.uniform(40, 200, 3) + colour / max(1e-6, colour.std()) * rng.uniform(2, 60)
    out = occlusion._laid_over(rgb, first, last, np.clip(mask, 0, 1), colour)
    share = np.zeros(frames)
    share[first:last] = [occlusion.share_of_mouth(mask, points[t, landmarks.LIPS]) for t in range(first, last)]
    return out, share


def in_other_light(rgb, rng):
    gain, power = rng.uniform(0.6, 1.3), rng.uniform(0.7, 1.4)
    out = np.clip(255 * (rgb / 255.0) ** power * gain, 0, 255).astype(np.uint8)
    return np.stack([cv2.GaussianBlur(p, (0, 0), s) for p in out]) if (s := rng.uniform(0, 1.2)) > 0.4 else out


def look(video: str, points: np.ndarray, clip_id: str, kind: str):
    """(edges (n, D), share hidden (n,), place (n,)) of a clip's pictures after a change; the points come from the tracker."""
    rgb, rng = clip_io.read_clip(video, audio=False).video.rgb, occlusion.generator(clip_id, kind)
    share = np.zeros(len(rgb))
    if kind == "things":
        rgb = in_other_light(rgb, rng) if rng.random() < 0.5 else rgb
        rgb, share = painted_at_random(rgb, points, rng)
    elif kind == "turned":
        rgb = occlusion.turned(in_other_light(rgb, rng), points, rng.uniform(-45, 45))
    elif kind in occlusion.SHARES:
        rgb = occlusion.paint(rgb, points, clip_id, kind, 25, 47, 0)
        share[25:47] = occlusion.SHARES[kind]
    elif kind.startswith("turned_"):
        rgb = occlusion.paint(rgb, points, clip_id, "turned_deg", 0, len(rgb), float(kind.removeprefix("turned_")))
    try:
        found = occlusion._tracker()(rgb).points
    except landmarks.NoFaceError:
        return np.zeros((0, 900), np.float32), share[:0], share[:0]
    return mouth_visibility.edges(rgb, found), share, np.arange(len(rgb))


def gather(data_dir, raw, split, kinds, max_clips, num_workers):
    records = input_pipeline.Records(input_pipeline.find_dataset(data_dir, "speaker_independent"), split, mouth=False)
    place = run_systems.chosen_clips(records, max_clips)
    videos = occlusion.find_videos(raw, place)
    jobs = [(str(videos[c]), np.asarray(records[i]["landmarks"]), c, kind) for c, i in place.items() for kind in kinds]
    found: dict = {kind: [] for kind in kinds}
    for o in process_pool.run(look, jobs, workers=num_workers, timeout_s=300, memory_mb=4000, start=occlusion._start):
        if o.missing:
            raise SystemExit(f"{jobs[o.index][0]}: {o.missing}")
        found[jobs[o.index][3]].append((o.index, *o.result))
    return {kind: [made[1:] for made in sorted(several, key=lambda m: m[0])] for kind, several in found.items()}


def learn(found):
    """A Line by ridge-penalised logistic regression over every EVERY-th picture; seen and hidden ones weigh the same."""
    x = np.concatenate([e[::EVERY] for several in found.values() for e, _, _ in several])
    share = np.concatenate([s[::EVERY] for several in found.values() for _, s, _ in several])
    x, share = x[(share <= SEEN) | (share >= HIDDEN)], share[(share <= SEEN) | (share >= HIDDEN)]
    y = np.where(share <= SEEN, 1.0, -1.0)
    weight = np.where(y > 0, 0.5 / (y > 0).sum(), 0.5 / (y < 0).sum())

    def cost(v):
        margin = y * (x @ v[:-1] + v[-1])
        pull = -weight * y * special.expit(-margin)
        return weight @ np.logaddexp(0, -margin) + RIDGE * v[:-1] @ v[:-1], np.append(x.T @ pull + 2 * RIDGE * v[:-1], pull.sum())

    best = optimize.minimize(cost, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    print(f"learned from {len(y)} pictures, {int((y < 0).sum())} of them hidden; cost {best.fun:.4f}, {best.nit} iterations")
    weights, bias = best.x[:-1].astype(np.float32), float(best.x[-1])
    calm = np.concatenate([mouth_visibility.smoothed(e @ weights + bias) for e, _, _ in found["as it is"]])
    return mouth_visibility.LinearClassifier(weights, bias, float(min(0.0, np.quantile(calm, FALSE_ALARMS))))


def measure(line, found, name):
    for kind, several in found.items():
        judged = [mouth_visibility.smoothed(e @ line.weights + line.bias) > line.threshold for e, _, _ in several if len(e)]
        shares = [s for e, s, _ in several if len(e)]
        seen, share = np.concatenate(judged), np.concatenate(shares)
        hidden = share >= 0.2
        told = f"{(~seen[hidden]).mean():.3f} of {hidden.sum()} hidden said to be hidden; " if hidden.any() else ""
        print(f"{name:18s}{kind:14s}{told}{(~seen[share <= SEEN]).mean():.4f} of {(share <= SEEN).sum()} seen said to be hidden")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--raw", required=True, type=Path)
    parser.add_argument("--clips", type=int, default=300, help="of the train split; default %(default)s")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put what was learned into the package")
    args = parser.parse_args()
    of = functools.partial(gather, args.data_dir, args.raw, num_workers=args.workers)
    line = learn(of("train", ("as it is", "things", "turned"), args.clips))
    print(f"threshold {line.threshold:.3f}, largest weight {np.abs(line.weights).max():.2f}")
    kinds = ("as it is", "things", *occlusion.SHARES, "turned_15", "turned_30", "turned_45")
    for split, clips in {"validation": 0, "validation_seen": 40}.items():
        measure(line, of(split, kinds, clips), split)
    if args.write:
        weights = line.weights.astype(np.float16)
        np.savez(mouth_visibility.WEIGHTS, weights=weights, bias=np.float32(line.bias), threshold=np.float32(line.threshold))
        print(mouth_visibility.WEIGHTS)


if __name__ == "__main__":
    from benchmarks.quality import mouth_visibility as itself  # by its name: worker processes find `look` there

    itself.main()
