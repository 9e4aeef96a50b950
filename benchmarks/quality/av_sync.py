"""Fits the numbers of face/av_sync.py on one half of the Grid clips and measures it on the other: docs/sync.md.

    python -m benchmarks.quality.av_sync --data_dir=DATA [--leave_out=IDS.txt] [--fit]     prints the tables; with --fit the numbers first

Halves by a hash of the clip's id. Speakers of `validation` and `test` are in no fit: those rows are of people never heard. A clip
is put out of step by moving its sound, the end that comes free filled with the sound mirrored there: no lag has more to go by.
"""

from __future__ import annotations

import argparse
import hashlib
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import optimize

from avsi_jax.data import tfrecords
from avsi_jax.face import av_sync

RATE = 16_000
SHIFTS_S, GAPS_S = (-0.3, 0.3), (0.3, 1.5)
SUMS, RIDGE = 3, 1e-3
GROUPS = ("s1", "others", "unheard")
UNHEARD = ("validation", "test")
LENGTHS = (1, 2, 10)  # clips of one speaker one after the other: 3, 6, 30 s
EDGES = (0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # of certainty
WRONG = {"in step": 0.01, "other": 0.05}  # shares of a length's clips that may be moved
ENOUGH = 100  # clips for such a share to be looked at


class Clip(NamedTuple):
    clip_id: str
    speaker: str
    group: str  # 's1', 'others' (heard in the fit, with other sentences), 'unheard'
    fitted: bool  # of the half that is fitted on
    points: np.ndarray
    valid: np.ndarray
    times: np.ndarray
    samples: np.ndarray  # (N, 1)
    lag_s: float


def read_clips(data_dir, leave_out) -> list[Clip]:
    folder, clips = tfrecords.find_dataset(data_dir), []
    for split in ("train", "validation", "validation_seen", "test", "test_seen"):
        split_records = tfrecords.Records(folder, split, mouth=False)
        for i, clip_id in enumerate(split_records.clip_ids):
            if clip_id not in leave_out:
                clips.append(_clip(split_records[i], split))
    return sorted(clips, key=lambda clip: (clip.speaker, clip.clip_id))


def _clip(example, split) -> Clip:
    group = "unheard" if split in UNHEARD else "s1" if example["speaker"] == "s1" else "others"
    half = hashlib.sha256(example["id"].encode()).digest()[0] % 2 == 0
    points, samples = np.array(example["landmarks"], np.float64), np.asarray(example["audio"])[:, None] / np.float32(32768)
    times = np.arange(len(points)) / example["fps"]
    fitted = half and group != "unheard"
    valid = np.array(example["landmarks_valid"])
    return Clip(example["id"], example["speaker"], group, fitted, points, valid, times, samples, float(example["offset_s"]))


def generator(*words) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(" ".join(map(str, words)).encode()))


def joined(clips) -> Clip:
    """Clips of one speaker one after the other; the sound of each fills its pictures' time, mirrored where it is short."""
    pieces = []
    for clip in clips:
        size, first = round(len(clip.points) * RATE / 25), round(clip.lag_s * RATE)
        piece = clip.samples[first : first + size]
        pieces.append(np.pad(piece, ((0, size - len(piece)), (0, 0)), "symmetric"))
    points, valid = np.concatenate([c.points for c in clips]), np.concatenate([c.valid for c in clips])
    return clips[0]._replace(
        points=points, valid=valid, times=np.arange(len(points)) / 25, samples=np.concatenate(pieces), lag_s=0.0
    )


def moved(samples, offset_s):
    """The sound `offset_s` later, as long as before."""
    n, far = round(offset_s * RATE), round(SHIFTS_S[1] * RATE)
    padded = np.pad(samples, ((far, far), (0, 0)), "symmetric")
    return padded[far - n : far - n + len(samples)]


def case(clip, num_clips, kind, gaps, other=None):
    """((mouth, seen, sound, heard), s by which the sound is late) of a clip in step, 'shifted', or with the sound of `other`."""
    rng = generator(clip.clip_id, num_clips, kind, gaps)
    offset_s = float(rng.uniform(*SHIFTS_S)) if kind == "shifted" else 0.0
    samples, missing = moved((other or clip).samples, offset_s), []
    for i in range(num_clips if gaps else 0):
        length = rng.uniform(*GAPS_S)
        start = 3 * i + rng.uniform(0, 2.95 - length)
        missing.append((start, start + length))
    return av_sync.features(clip.points, clip.valid, clip.times, samples, RATE, missing, clip.lag_s), offset_s


def rows_of(clips, num_clips) -> list[Clip]:
    """A speaker's clips of one half, `num_clips` at a time."""
    together: dict = {}
    for clip in clips:
        together.setdefault((clip.speaker, clip.fitted), []).append(clip)
    return [
        joined(several[i : i + num_clips]) if num_clips > 1 else several[i]
        for several in together.values()
        for i in range(0, len(several) - num_clips + 1, num_clips)
    ]


def measure_all(clips, mouth, audio) -> dict[str, np.ndarray]:
    """All clips and rows of them, in step, out of step and with another's sound; whole and with gaps: arrays (C, ...)."""
    lines = []
    for num_clips in LENGTHS:
        rows = rows_of(clips, num_clips)
        for row in rows:
            same = [r for r in rows if r.speaker == row.speaker and r.fitted == row.fitted and r is not row]
            for gaps in (False, True):
                other = same[generator(row.clip_id, num_clips, gaps).integers(len(same))] if same else None
                for kind in ("in step", "shifted", "other")[: 3 if same else 2]:
                    (x, seen, y, heard), offset_s = case(row, num_clips, kind, gaps, other if kind == "other" else None)
                    found, frames = av_sync.correlations(x @ mouth, seen, y @ audio, heard)
                    lines.append((row.group, row.fitted, num_clips, gaps, kind, offset_s, found, frames))
    return dict(zip(("group", "half", "n", "gaps", "kind", "off", "found", "frames"), map(np.array, zip(*lines))))


def only(table, these) -> dict[str, np.ndarray]:
    return {name: column[these] for name, column in table.items()}


def fit_sums(clips):
    """Canonical correlations over all frames of clips in step: weights of the mouth, of the sound, and likeness.

    A speaker with many clips weighs less a clip.
    """
    counts = {s: sum(c.speaker == s for c in clips) for s in {c.speaker for c in clips}}
    xx = xy = yy = 0
    for clip in clips:
        (mouth, seen, audio, heard), _ = case(clip, 1, "in step", False)
        audio, heard = audio[av_sync.reach() :][: len(mouth)], heard[av_sync.reach() :][: len(mouth)]
        x, y = mouth[seen & heard], audio[seen & heard]
        w = counts[clip.speaker] ** -0.5
        xx, xy, yy = xx + w * x.T @ x, xy + w * x.T @ y, yy + w * y.T @ y
    whiten = [np.linalg.inv(np.linalg.cholesky(c + RIDGE * np.trace(c) / len(c) * np.eye(len(c)))) for c in (xx, yy)]
    u, r, v = np.linalg.svd(whiten[0] @ xy @ whiten[1].T)
    mouth, audio = whiten[0].T @ u[:, :SUMS], whiten[1].T @ v[:SUMS].T
    return np.round(mouth / np.abs(mouth).max(0), 3), np.round(audio / np.abs(audio).max(0), 3), r[:SUMS]


def fit_certainty(table, mouth, audio, likeness) -> av_sync.Model:
    """Sharpness, other and a factor of likeness that make the true lags, and "unrelated" of another's sound, likeliest."""
    unrelated = table["kind"] == "other"
    lags = (np.arange(2 * av_sync.reach() + 1) - av_sync.reach()) * av_sync.STEP_S
    near = np.abs(lags - table["off"][:, None]) <= av_sync.NEAR_S
    weight = np.ones(len(near))
    for n in LENGTHS:
        for yes in (False, True):
            these = (table["n"] == n) & (unrelated == yes)
            weight[these] = 1 / max(1, these.sum())

    def model(v):
        return av_sync.Model(mouth, audio, np.clip(likeness * v[2], 0.05, 0.97), float(np.exp(v[0])), float(v[1]))

    def loss(v):
        log_odds = np.maximum(av_sync.evidence(table["found"], table["frames"], model(v)), -1e9)
        everything = np.logaddexp(np.logaddexp.reduce(log_odds, axis=1), v[1])
        right = np.where(unrelated, v[1], np.logaddexp.reduce(np.where(near, log_odds, -1e9), axis=1))
        return np.average(np.minimum(everything - right, 30), weights=weight)

    return model(optimize.minimize(loss, (-3.0, 4.0, 1.0), method="Nelder-Mead").x)


def decided(table, model):
    """(C,) offsets, (C,) certainties."""
    return np.array([av_sync.decide(f, n, model) for f, n in zip(table["found"], table["frames"])]).T


def choose_sure(table, model) -> float:
    """The lowest certainty from which on few clips of any length are moved that should not be: WRONG says how few."""
    offsets, certainties = decided(table, model)
    for sure in np.arange(0.5, 1.0, 0.01):
        moved_far = (certainties >= sure) & (np.abs(offsets) > av_sync.WORTH_S)
        cells = [(moved_far[(table["n"] == n) & (table["kind"] == kind)], few) for n in LENGTHS for kind, few in WRONG.items()]
        if all(cell.mean() < few for cell, few in cells if len(cell) >= ENOUGH):
            return round(float(sure), 2)
    return 1.0


def show(table, model, sure) -> None:
    offsets, certainties = decided(table, model)
    print(
        "| speakers | s | gaps | n | median error, ms | within 40, 80 ms | in step, moved | mended, of those out of step |", end=""
    )
    print(" made worse | another clip's sound: moved |\n|---|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    for group in GROUPS:
        for n in LENGTHS:
            for gaps in (False, True):
                these = (table["group"] == group) & (table["n"] == n) & (table["gaps"] == gaps)
                if these.any():
                    print(f"| {group} | {3 * n} | {'yes' if gaps else 'no'} | ", end="")
                    print(_line(only(table, these), offsets[these], certainties[these], sure))
    mine = table["kind"] != "other"
    right = (np.abs(offsets - table["off"]) <= av_sync.NEAR_S) & mine
    print("\n| certainty | n | of them right | n without another's sound | of them right |\n|---|---:|---:|---:|---:|")
    for low, high in zip(EDGES, (*EDGES[1:], 1.01)):
        c = (certainties >= low) & (certainties < high)
        print(f"| {low}-{min(high, 1.0)} | {c.sum()} | {right[c].mean():.1%} | {(c & mine).sum()} | {right[c & mine].mean():.1%} |")


def _line(table, offsets, certainties, sure) -> str:
    kind, error = table["kind"], np.abs(offsets - table["off"])
    mine, out = kind != "other", (kind == "shifted") & (np.abs(table["off"]) > av_sync.WORTH_S)
    moved_far = (certainties >= sure) & (np.abs(offsets) > av_sync.WORTH_S)
    worse = moved_far & (error > np.abs(table["off"]))
    share = lambda what, of: f"{int(what[of].sum())} of {int(of.sum())} ({what[of].mean():.1%})" if of.any() else "-"  # noqa: E731
    near = ", ".join(f"{(error[mine] <= s).mean():.0%}" for s in (0.04, 0.08))
    return (
        f"{mine.sum()} | {1000 * np.median(error[mine]):.0f} | {near} | "
        f"{share(moved_far, kind == 'in step')} | {share(moved_far & (error <= av_sync.NEAR_S), out)} | {share(worse, out)} | "
        f"{share(moved_far, kind == 'other')} |"
    )


def show_numbers(model, sure) -> None:
    """What goes into face/av_sync.py."""
    print(
        f"SURE = {sure}\nLEARNED: likeness {np.round(model.likeness, 3)}, sharpness {model.sharpness:.4f}, other {model.other:.2f}"
    )
    for name, weights in (("mouth", model.mouth), ("sound", model.audio)):
        print(name, *(" ".join(f"{w:g}" for w in column) for column in weights.T), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Sound and picture out of step: fit and measure; docs/sync.md")
    parser.add_argument("--data_dir", required=True, help="folder of the dataset")
    parser.add_argument("--leave_out", type=Path, help="file of clip ids that are not to be used")
    parser.add_argument("--fit", action="store_true", help="fit the numbers anew instead of measuring those in use")
    args = parser.parse_args()
    clips = read_clips(args.data_dir, set(args.leave_out.read_text().split()) if args.leave_out else set())
    model, sure = av_sync.LEARNED, av_sync.SURE
    if args.fit:
        sums = fit_sums([clip for clip in clips if clip.fitted])
        fitted = measure_all([clip for clip in clips if clip.fitted], *sums[:2])
        model = fit_certainty(fitted, *sums)
        sure = choose_sure(fitted, model)
        show_numbers(model, sure)
    show(measure_all([clip for clip in clips if not clip.fitted], model.mouth, model.audio), model, sure)


if __name__ == "__main__":
    main()
