"""Fits the parameters of face/av_sync.py on one half of the Grid clips and evaluates it on the other (docs/av_sync.md).

    python -m benchmarks.quality.av_sync --data_dir=DATA [--leave_out=IDS.txt] [--fit]

Prints tables, with --fit also the fitted parameters. Halves are chosen by a hash of the clip's id. Speakers of `validation` and
`test` are in no fit: they are the unseen speakers. An A/V offset is made by shifting the audio and mirroring it at the end that
becomes free, so that all lags have the same number of frames.
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
NUM_COMPONENTS, RIDGE = 3, 1e-3
GROUPS = ("s1", "others", "unseen")
UNSEEN_SPLITS = ("validation", "test")
LENGTHS = (1, 2, 10)  # number of clips of one speaker in sequence: 3, 6, 30 s
CERTAINTY_BINS = (0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
# Kinds of cases: "in step" has no offset, "shifted" a random one, "other" the audio of another clip. They seed the random numbers.
MAX_WRONG_SHARE = {"in step": 0.01, "other": 0.05}  # share of the clips of a length that may be corrected wrongly
MIN_CLIPS = 100  # fewest clips for which that share is checked


class Clip(NamedTuple):
    """A clip, or several of one speaker in sequence."""

    clip_id: str
    speaker: str
    group: str  # 's1', 'others' (in the fit with other sentences), 'unseen'
    fitted: bool  # in the half that is fitted on
    landmarks: np.ndarray  # (T, 68, 2)
    valid: np.ndarray  # (T,)
    times: np.ndarray  # (T,) s
    samples: np.ndarray  # (N, 1)
    lag_s: float  # by which the audio lags the video


def read_clips(data_dir: str, leave_out: set[str]) -> list[Clip]:
    """All clips of all splits, ordered by speaker and id."""
    folder, clips = tfrecords.find_dataset(data_dir), []
    for split in ("train", "validation", "validation_seen", "test", "test_seen"):
        split_records = tfrecords.Records(folder, split, mouth=False)
        for i, clip_id in enumerate(split_records.clip_ids):
            if clip_id not in leave_out:
                clips.append(_clip(split_records[i], split))
    return sorted(clips, key=lambda clip: (clip.speaker, clip.clip_id))


def _clip(example, split) -> Clip:
    group = "unseen" if split in UNSEEN_SPLITS else "s1" if example["speaker"] == "s1" else "others"
    half = hashlib.sha256(example["id"].encode()).digest()[0] % 2 == 0
    landmarks, samples = np.array(example["landmarks"], np.float64), np.asarray(example["audio"])[:, None] / np.float32(32768)
    times = np.arange(len(landmarks)) / example["fps"]
    fitted = half and group != "unseen"
    valid = np.array(example["landmarks_valid"])
    return Clip(example["id"], example["speaker"], group, fitted, landmarks, valid, times, samples, float(example["offset_s"]))


def generator(*words: object) -> np.random.Generator:
    """Random numbers seeded by words."""
    return np.random.default_rng(zlib.crc32(" ".join(map(str, words)).encode()))


def concatenated(clips: list[Clip]) -> Clip:
    """Clips of one speaker in sequence; the audio of each gets the duration of its video, mirrored where it is short."""
    pieces = []
    for clip in clips:
        size, first = round(len(clip.landmarks) * RATE / 25), round(clip.lag_s * RATE)
        piece = clip.samples[first : first + size]
        pieces.append(np.pad(piece, ((0, size - len(piece)), (0, 0)), "symmetric"))
    landmarks, valid = np.concatenate([c.landmarks for c in clips]), np.concatenate([c.valid for c in clips])
    return clips[0]._replace(
        landmarks=landmarks, valid=valid, times=np.arange(len(landmarks)) / 25, samples=np.concatenate(pieces), lag_s=0.0
    )


def shifted(samples: np.ndarray, offset_s: float) -> np.ndarray:
    """The audio `offset_s` later, with the same length."""
    n, far = round(offset_s * RATE), round(SHIFTS_S[1] * RATE)
    padded = np.pad(samples, ((far, far), (0, 0)), "symmetric")
    return padded[far - n : far - n + len(samples)]


def case(clip: Clip, num_clips: int, kind: str, gaps: bool, other: Clip | None = None) -> tuple[tuple[np.ndarray, ...], float]:
    """((mouth, visible, audio, has_audio), offset in s) for a kind of case; gaps: with one random gap per clip."""
    rng = generator(clip.clip_id, num_clips, kind, gaps)
    offset_s = float(rng.uniform(*SHIFTS_S)) if kind == "shifted" else 0.0
    samples, missing = shifted((other or clip).samples, offset_s), []
    for i in range(num_clips if gaps else 0):
        length = rng.uniform(*GAPS_S)
        start = 3 * i + rng.uniform(0, 2.95 - length)
        missing.append((start, start + length))
    return av_sync.features(clip.landmarks, clip.valid, clip.times, samples, RATE, missing, clip.lag_s), offset_s


def concatenated_clips(clips: list[Clip], num_clips: int) -> list[Clip]:
    """The clips of each speaker and half, `num_clips` in sequence."""
    groups: dict = {}
    for clip in clips:
        groups.setdefault((clip.speaker, clip.fitted), []).append(clip)
    return [
        concatenated(group[i : i + num_clips]) if num_clips > 1 else group[i]
        for group in groups.values()
        for i in range(0, len(group) - num_clips + 1, num_clips)
    ]


def measure_all(clips: list[Clip], mouth: np.ndarray, audio: np.ndarray) -> dict[str, np.ndarray]:
    """Correlations for all lengths and kinds of cases, with and without gaps, with the given weights: arrays (C, ...)."""
    lines = []
    for num_clips in LENGTHS:
        rows = concatenated_clips(clips, num_clips)
        for row in rows:
            same = [r for r in rows if r.speaker == row.speaker and r.fitted == row.fitted and r is not row]
            for gaps in (False, True):
                other = same[generator(row.clip_id, num_clips, gaps).integers(len(same))] if same else None
                for kind in ("in step", "shifted", "other")[: 3 if same else 2]:
                    (x, visible, y, has_audio), offset_s = case(row, num_clips, kind, gaps, other if kind == "other" else None)
                    correlations, frames = av_sync.lag_correlations(x @ mouth, visible, y @ audio, has_audio)
                    lines.append((row.group, row.fitted, num_clips, gaps, kind, offset_s, correlations, frames))
    return dict(zip(("group", "half", "n", "gaps", "kind", "offset", "correlations", "frames"), map(np.array, zip(*lines))))


def select(table: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """The chosen rows of a table."""
    return {name: column[rows] for name, column in table.items()}


def fit_weights(clips: list[Clip]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Canonical correlation analysis over all frames of clips without offset: weights of mouth and audio, and correlations.

    Clips of a speaker with many clips have less weight.
    """
    counts = {s: sum(c.speaker == s for c in clips) for s in {c.speaker for c in clips}}
    xx = xy = yy = 0
    for clip in clips:
        (mouth, visible, audio, has_audio), _ = case(clip, 1, "in step", False)
        audio, has_audio = audio[av_sync.max_lag() :][: len(mouth)], has_audio[av_sync.max_lag() :][: len(mouth)]
        x, y = mouth[visible & has_audio], audio[visible & has_audio]
        w = counts[clip.speaker] ** -0.5
        xx, xy, yy = xx + w * x.T @ x, xy + w * x.T @ y, yy + w * y.T @ y
    whiten = [np.linalg.inv(np.linalg.cholesky(c + RIDGE * np.trace(c) / len(c) * np.eye(len(c)))) for c in (xx, yy)]
    u, r, v = np.linalg.svd(whiten[0] @ xy @ whiten[1].T)
    mouth, audio = whiten[0].T @ u[:, :NUM_COMPONENTS], whiten[1].T @ v[:NUM_COMPONENTS].T
    return np.round(mouth / np.abs(mouth).max(0), 3), np.round(audio / np.abs(audio).max(0), 3), r[:NUM_COMPONENTS]


def fit_certainty(
    table: dict[str, np.ndarray], mouth: np.ndarray, audio: np.ndarray, correlations: np.ndarray
) -> av_sync.CorrelationModel:
    """Maximum likelihood fit of `sharpness`, `unrelated` and a factor of the correlations."""
    unrelated = table["kind"] == "other"
    lags = (np.arange(2 * av_sync.max_lag() + 1) - av_sync.max_lag()) * av_sync.HOP_S
    near = np.abs(lags - table["offset"][:, None]) <= av_sync.TOLERANCE_S
    weight = np.ones(len(near))
    for n in LENGTHS:
        for other in (False, True):
            rows = (table["n"] == n) & (unrelated == other)
            weight[rows] = 1 / max(1, rows.sum())

    def model(v):
        return av_sync.CorrelationModel(mouth, audio, np.clip(correlations * v[2], 0.05, 0.97), float(np.exp(v[0])), float(v[1]))

    def loss(v):
        log_odds = np.maximum(av_sync.log_likelihood_ratios(table["correlations"], table["frames"], model(v)), -1e9)
        total = np.logaddexp(np.logaddexp.reduce(log_odds, axis=1), v[1])
        right = np.where(unrelated, v[1], np.logaddexp.reduce(np.where(near, log_odds, -1e9), axis=1))
        return np.average(np.minimum(total - right, 30), weights=weight)

    return model(optimize.minimize(loss, (-3.0, 4.0, 1.0), method="Nelder-Mead").x)


def estimate_offsets(table: dict[str, np.ndarray], model: av_sync.CorrelationModel) -> np.ndarray:
    """(2, C) offsets and certainties."""
    rows = zip(table["correlations"], table["frames"])
    return np.array([av_sync.offset_from_correlations(c, n, model) for c, n in rows]).T


def choose_min_certainty(table: dict[str, np.ndarray], model: av_sync.CorrelationModel) -> float:
    """The lowest certainty at which the share of wrongly corrected clips is below MAX_WRONG_SHARE for every length."""
    offsets, certainties = estimate_offsets(table, model)
    for min_certainty in np.arange(0.5, 1.0, 0.01):
        corrected = (certainties >= min_certainty) & (np.abs(offsets) > av_sync.MIN_OFFSET_S)
        limits = [(n, *item) for n in LENGTHS for item in MAX_WRONG_SHARE.items()]
        cells = [(corrected[(table["n"] == n) & (table["kind"] == kind)], limit) for n, kind, limit in limits]
        if all(cell.mean() < limit for cell, limit in cells if len(cell) >= MIN_CLIPS):
            return round(float(min_certainty), 2)
    return 1.0


def print_tables(table: dict[str, np.ndarray], model: av_sync.CorrelationModel, min_certainty: float) -> None:
    """Prints errors and corrections by group, length and gaps, and how reliable the certainty is."""
    offsets, certainties = estimate_offsets(table, model)
    print("| speakers | s | gaps | n | median error, ms | within 40, 80 ms | no offset, shifted | offset, corrected |", end="")
    print(" made worse | another clip's audio: shifted |\n|---|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    for group in GROUPS:
        for n in LENGTHS:
            for gaps in (False, True):
                rows = (table["group"] == group) & (table["n"] == n) & (table["gaps"] == gaps)
                if rows.any():
                    print(f"| {group} | {3 * n} | {'yes' if gaps else 'no'} | ", end="")
                    print(_line(select(table, rows), offsets[rows], certainties[rows], min_certainty))
    own = table["kind"] != "other"
    right = (np.abs(offsets - table["offset"]) <= av_sync.TOLERANCE_S) & own
    print("\n| certainty | n | right | n with their own audio | right |\n|---|---:|---:|---:|---:|")
    for low, high in zip(CERTAINTY_BINS, (*CERTAINTY_BINS[1:], 1.01)):
        c = (certainties >= low) & (certainties < high)
        print(f"| {low}-{min(high, 1.0)} | {c.sum()} | {right[c].mean():.1%} | {(c & own).sum()} | {right[c & own].mean():.1%} |")


def _line(table: dict[str, np.ndarray], offsets: np.ndarray, certainties: np.ndarray, min_certainty: float) -> str:
    kind, error = table["kind"], np.abs(offsets - table["offset"])
    own, has_offset = kind != "other", (kind == "shifted") & (np.abs(table["offset"]) > av_sync.MIN_OFFSET_S)
    corrected = (certainties >= min_certainty) & (np.abs(offsets) > av_sync.MIN_OFFSET_S)
    worse = corrected & (error > np.abs(table["offset"]))
    share = lambda x, of: f"{int(x[of].sum())} of {int(of.sum())} ({x[of].mean():.1%})" if of.any() else "-"  # noqa: E731
    near = ", ".join(f"{(error[own] <= s).mean():.0%}" for s in (0.04, 0.08))
    right = corrected & (error <= av_sync.TOLERANCE_S)
    return (
        f"{own.sum()} | {1000 * np.median(error[own]):.0f} | {near} | {share(corrected, kind == 'in step')} | "
        f"{share(right, has_offset)} | {share(worse, has_offset)} | {share(corrected, kind == 'other')} |"
    )


def print_model(model: av_sync.CorrelationModel, min_certainty: float) -> None:
    """Prints the fitted parameters for face/av_sync.py."""
    print(
        f"MIN_CERTAINTY = {min_certainty}\nFITTED_MODEL: correlations {np.round(model.correlations, 3)}, "
        f"sharpness {model.sharpness:.4f}, unrelated {model.unrelated:.2f}"
    )
    for name, weights in (("mouth", model.mouth), ("audio", model.audio)):
        print(name, *(" ".join(f"{w:g}" for w in column) for column in weights.T), sep="\n")


def main() -> None:
    """The command `python -m benchmarks.quality.av_sync`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="dataset written by avsi-prepare")
    parser.add_argument("--leave_out", type=Path, help="file of clip ids that must not be used")
    parser.add_argument("--fit", action="store_true", help="fit the parameters instead of evaluating those in use")
    args = parser.parse_args()
    clips = read_clips(args.data_dir, set(args.leave_out.read_text().split()) if args.leave_out else set())
    model, min_certainty = av_sync.FITTED_MODEL, av_sync.MIN_CERTAINTY
    if args.fit:
        weights = fit_weights([clip for clip in clips if clip.fitted])
        fitted = measure_all([clip for clip in clips if clip.fitted], *weights[:2])
        model = fit_certainty(fitted, *weights)
        min_certainty = choose_min_certainty(fitted, model)
        print_model(model, min_certainty)
    print_tables(measure_all([clip for clip in clips if not clip.fitted], model.mouth, model.audio), model, min_certainty)


if __name__ == "__main__":
    main()
