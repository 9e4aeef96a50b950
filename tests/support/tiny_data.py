"""A dataset small enough to train on in seconds, without the Grid corpus: synthetic voices and landmarks.

`build(root)` writes the records to root/data with the real builder, from root/measured (one .npz per clip). A voice is a harmonic
sound whose pitch, timbre and loudness change from word to word, so that STOI and PESQ are meaningful; the lips open with the
loudness. Lengths of audio and video differ between clips. The builder imports tensorflow, which tests of training must not do, so
it runs in a process of its own.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

RATE, FPS = 16_000, 25
SPEAKERS = {"s1": 9, "s26": 3, "s30": 3}  # number of clips for train, validation and test
SAMPLES = (47_647, 48_000, 41_000)  # lengths of the clips' audio, in turn
FRAMES = (75, 75, 66)
WORDS_S = ((0.40, 0.75), (0.75, 1.05), (1.05, 1.25), (1.25, 1.55), (1.55, 1.90), (1.90, 2.30))


def clip_ids() -> dict[str, str]:
    """{clip id: speaker}, with ids that the speakers have in the corpus."""
    from tfds_grid import grid_ids

    return {clip_id: speaker for speaker, count in SPEAKERS.items() for clip_id in grid_ids.ids_of(speaker)[:count]}


def voice(seed: int, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Audio (N,) in [-1, 1] and its loudness (N,) in [0, 1]: six words of harmonics of a rising pitch with two formants."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / RATE
    audio, loudness = 0.002 * rng.normal(size=num_samples), np.zeros(num_samples)
    for start, end in WORDS_S:
        part = np.clip((time - start) / (end - start), 0, 1)
        envelope = np.sin(np.pi * part) ** 0.7
        pitch = rng.uniform(100, 180) * (1 + 0.1 * part)
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        formants = rng.uniform([300, 900], [800, 2600])
        for k in range(1, 21):
            gain = sum(np.exp(-(((k * pitch - f) / 250) ** 2)) for f in formants) + 0.02
            audio += 0.08 * envelope * gain * np.sin(k * phase)
        loudness = np.maximum(loudness, envelope)
    return np.clip(audio, -1, 1), loudness


def measurement(seed: int) -> dict[str, np.ndarray]:
    """The measurements that tfds_grid.clips would make on a clip."""
    rng = np.random.default_rng(1000 + seed)
    samples, frames = SAMPLES[seed % 3], FRAMES[seed % 3]
    audio, loudness = voice(seed, samples)
    opening = np.interp(np.arange(frames) / FPS, np.arange(samples) / RATE, loudness)
    points = rng.uniform([120, 80], [240, 250], (68, 2)) + rng.normal(0, 0.2, (frames, 68, 2))
    points[:, 48:, 1] += 8 * opening[:, None]
    return {
        "audio": np.rint(32_767 * audio).astype(np.int16),
        "offset_s": np.float32(0.011),
        "landmarks": points.astype(np.float32),
        "landmarks_valid": np.ones(frames, bool),
        "frame_size": np.array([360, 288], np.int32),
        "fps": np.float32(FPS),
        "notes": np.array([], np.str_),
    }


def align(clip_id: str) -> str:
    """The text of the clip's .align file: its words with times in 1/25000 s."""
    from avsi_jax.data import grid_text

    rows = [
        (0, WORDS_S[0][0], "sil"),
        *((*t, w) for t, w in zip(WORDS_S, grid_text.words_of(clip_id))),
        (WORDS_S[-1][1], 2.98, "sil"),
    ]
    return "".join(f"{round(a * 25_000)} {round(b * 25_000)} {word}\n" for a, b, word in rows)


def write(root: Path) -> None:
    """Writes the dataset with the real builder (imports tensorflow)."""
    from tfds_grid import grid_dataset_builder, prepare

    raw, measured = root / "raw", {}
    (root / "measured").mkdir(parents=True)
    for seed, (clip_id, speaker) in enumerate(clip_ids().items()):
        video, words = raw / speaker / f"{clip_id}.mpg", raw / "alignments" / speaker / f"{clip_id}.align"
        for path in (video, words):
            path.parent.mkdir(parents=True, exist_ok=True)
        video.touch()
        words.write_text(align(clip_id))
        measured[clip_id] = root / "measured" / f"{clip_id}.npz"
        np.savez(measured[clip_id], **measurement(seed))
    options = {"data_dir": root / "data", "file_format": "tfrecord", "measured": measured, "full_train": True}
    prepare.pack(grid_dataset_builder.Builder(config="speaker_independent", **options), raw, max_shard_mb=64)


def build(root: Path) -> Path:
    """Writes the dataset in a process of its own; returns the folder for config.data_dir."""
    command = [sys.executable, "-m", "tests.support.tiny_data", str(root)]
    checkout = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=checkout)
    if done.returncode:
        raise RuntimeError(f"the tiny dataset could not be written:\n{done.stderr[-2000:]}")
    return root / "data"


if __name__ == "__main__":
    write(Path(sys.argv[1]))
