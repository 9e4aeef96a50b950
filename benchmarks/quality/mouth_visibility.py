"""Trains and evaluates avsi_jax/face/mouth_visibility.npz, the classifier of frames that show the mouth (docs/landmarks.md).

    python -m benchmarks.quality.mouth_visibility --data_dir=DATA --raw=RAW [--write]

Trained on the train split with ellipses, boxes, bars and parts of the same frame painted over the mouth, turned heads and changed
lighting, but never with the hand of the suite `occlusion`, with which it is evaluated on unseen speakers.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from scipy import optimize, special

from avsi_jax.data import input_pipeline
from avsi_jax.evaluation import occlusion, run_systems
from avsi_jax.face import landmarks, mouth_visibility
from avsi_jax.media import clip_io
from avsi_jax.runtime import process_pool

EVERY = 3  # every EVERY-th frame of a clip is trained on
HIDDEN, VISIBLE = 0.45, 0.1  # covered shares of the mouth: hidden from, visible up to; frames in between are not trained on
RIDGE = 1e-3
FALSE_ALARMS = 0.001  # share of unchanged frames of the train split that are classified as hidden, after smoothing


def paint_object(rgb: np.ndarray, landmarks_px: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Frames (T, H, W, 3) with a random object over or near the mouth for a while, and the covered share of the mouth (T,)."""
    frames, height, width = rgb.shape[:3]
    first = int(rng.integers(0, frames - 20))
    last = int(rng.integers(first + 8, min(frames, first + 60) + 1))
    lips = landmarks_px[first:last, landmarks.MOUTH]
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
        colour = occlusion.skin(rgb[first], landmarks_px[first], mask.shape, rng)
    elif fill == 2:  # another part of the same frame
        shift = (int(rng.integers(30, 150)) * rng.choice((-1, 1)), int(rng.integers(-100, 100)))
        colour = np.roll(rgb[first], shift, (0, 1)).astype(np.float32)
    else:
        colour = cv2.GaussianBlur(rng.normal(size=rgb.shape[1:]).astype(np.float32), (0, 0), rng.uniform(0.5, 6))
        colour = rng.uniform(40, 200, 3) + colour / max(1e-6, colour.std()) * rng.uniform(2, 60)
    out = occlusion.overlay(rgb, first, last, np.clip(mask, 0, 1), colour)
    share = np.zeros(frames)
    share[first:last] = [occlusion.share_of_mouth(mask, landmarks_px[t, landmarks.MOUTH]) for t in range(first, last)]
    return out, share


def change_light(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Frames with random gain, gamma and blur."""
    gain, power = rng.uniform(0.6, 1.3), rng.uniform(0.7, 1.4)
    out = np.clip(255 * (rgb / 255.0) ** power * gain, 0, 255).astype(np.uint8)
    return np.stack([cv2.GaussianBlur(p, (0, 0), s) for p in out]) if (s := rng.uniform(0, 1.2)) > 0.4 else out


def measure_clip(video: str, landmarks_px: np.ndarray, clip_id: str, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(features (n, D), covered share (n,), index (n,)) of a clip's frames after a change; landmarks come from the tracker."""
    rgb, rng = clip_io.read_clip(video, audio=False).video.rgb, occlusion.generator(clip_id, kind)
    share = np.zeros(len(rgb))
    if kind == "things":
        rgb = change_light(rgb, rng) if rng.random() < 0.5 else rgb
        rgb, share = paint_object(rgb, landmarks_px, rng)
    elif kind == "turned":
        rgb = occlusion.turn_head(change_light(rgb, rng), landmarks_px, rng.uniform(-45, 45))
    elif kind in occlusion.SHARES:
        rgb = occlusion.paint(rgb, landmarks_px, clip_id, kind, 25, 47, 0)
        share[25:47] = occlusion.SHARES[kind]
    elif kind.startswith("turned_"):
        rgb = occlusion.paint(rgb, landmarks_px, clip_id, "turned_deg", 0, len(rgb), float(kind.removeprefix("turned_")))
    try:
        tracked = occlusion.tracker()(rgb).points
    except landmarks.NoFaceError:
        return np.zeros((0, 900), np.float32), share[:0], share[:0]
    return mouth_visibility.hog_features(rgb, tracked), share, np.arange(len(rgb))


def measure_clips(
    data_dir: str, raw: Path, split: str, kinds: Sequence[str], max_clips: int, num_workers: int
) -> dict[str, list[tuple[np.ndarray, ...]]]:
    """kind -> results of measure_clip for the clips of a split, in their order."""
    records = input_pipeline.Records(input_pipeline.find_dataset(data_dir, "speaker_independent"), split, mouth=False)
    place = run_systems.select_clips(records, max_clips)
    videos = occlusion.find_videos(raw, place)
    jobs = [(str(videos[c]), np.asarray(records[i]["landmarks"]), c, kind) for c, i in place.items() for kind in kinds]
    by_kind: dict = {kind: [] for kind in kinds}
    options = {"timeout_s": 300, "memory_mb": 4000, "start": occlusion.start_worker}
    for index, result, failure in process_pool.run(measure_clip, jobs, workers=num_workers, **options):
        if failure:
            raise SystemExit(f"{jobs[index][0]}: {failure}")
        by_kind[jobs[index][3]].append((index, *result))
    return {kind: [r[1:] for r in sorted(results, key=lambda r: r[0])] for kind, results in by_kind.items()}


def train(by_kind: dict[str, list[tuple[np.ndarray, ...]]]) -> mouth_visibility.LinearClassifier:
    """Logistic regression with a ridge penalty; visible and hidden frames have the same total weight."""
    x = np.concatenate([e[::EVERY] for clips in by_kind.values() for e, _, _ in clips])
    share = np.concatenate([s[::EVERY] for clips in by_kind.values() for _, s, _ in clips])
    x, share = x[(share <= VISIBLE) | (share >= HIDDEN)], share[(share <= VISIBLE) | (share >= HIDDEN)]
    y = np.where(share <= VISIBLE, 1.0, -1.0)
    weight = np.where(y > 0, 0.5 / (y > 0).sum(), 0.5 / (y < 0).sum())

    def cost(v):
        margin = y * (x @ v[:-1] + v[-1])
        pull = -weight * y * special.expit(-margin)
        return weight @ np.logaddexp(0, -margin) + RIDGE * v[:-1] @ v[:-1], np.append(x.T @ pull + 2 * RIDGE * v[:-1], pull.sum())

    best = optimize.minimize(cost, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    print(f"trained on {len(y)} frames, {int((y < 0).sum())} of them hidden; cost {best.fun:.4f}, {best.nit} iterations")
    weights, bias = best.x[:-1].astype(np.float32), float(best.x[-1])
    unchanged = np.concatenate([mouth_visibility.smooth(e @ weights + bias) for e, _, _ in by_kind["as it is"]])
    return mouth_visibility.LinearClassifier(weights, bias, float(min(0.0, np.quantile(unchanged, FALSE_ALARMS))))


def evaluate(model: mouth_visibility.LinearClassifier, by_kind: dict[str, list[tuple[np.ndarray, ...]]], split: str) -> None:
    """Prints for each kind of change the shares of hidden and of visible frames that are classified as hidden."""
    for kind, clips in by_kind.items():
        decisions = [mouth_visibility.smooth(e @ model.weights + model.bias) > model.threshold for e, _, _ in clips if len(e)]
        visible, share = np.concatenate(decisions), np.concatenate([s for e, s, _ in clips if len(e)])
        hidden, uncovered = share >= 0.2, share <= VISIBLE
        detected = f"{(~visible[hidden]).mean():.3f} of {hidden.sum()} hidden frames detected; " if hidden.any() else ""
        print(f"{split:18s}{kind:14s}{detected}{(~visible[uncovered]).mean():.4f} of {uncovered.sum()} visible are false alarms")


def main() -> None:
    """The command `python -m benchmarks.quality.mouth_visibility`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True, help="dataset written by avsi-prepare")
    parser.add_argument("--raw", required=True, type=Path, help="folder of the raw Grid clips")
    parser.add_argument("--clips", type=int, default=300, help="clips of the train split (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write the trained model into the package")
    args = parser.parse_args()
    clips_of = functools.partial(measure_clips, args.data_dir, args.raw, num_workers=args.workers)
    model = train(clips_of("train", ("as it is", "things", "turned"), args.clips))
    print(f"threshold {model.threshold:.3f}, largest weight {np.abs(model.weights).max():.2f}")
    kinds = ("as it is", "things", *occlusion.SHARES, "turned_15", "turned_30", "turned_45")
    for split, max_clips in {"validation": 0, "validation_seen": 40}.items():
        evaluate(model, clips_of(split, kinds, max_clips), split)
    if args.write:
        weights = model.weights.astype(np.float16)
        np.savez(mouth_visibility.WEIGHTS, weights=weights, bias=np.float32(model.bias), threshold=np.float32(model.threshold))
        print(mouth_visibility.WEIGHTS)


if __name__ == "__main__":
    from benchmarks.quality import mouth_visibility as this_module  # worker processes import it by name

    this_module.main()
