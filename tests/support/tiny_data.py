"""A dataset small enough to train on in seconds, without the corpus: invented voices and lips, written by the real builder.

`build(root)` writes root/data (records) by root/measured (one .npz a clip). A voice is a buzz that changes pitch, colour and
loudness from word to word, so that STOI and PESQ have something to hear; the lips follow the loudness. Lengths of sound and
picture differ from clip to clip. The builder imports tensorflow, which tests of training must not: it runs in a process of its own.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

RATE, FPS = 16_000, 25
SPEAKERS = {"s1": 9, "s26": 3, "s30": 3}  # train, validation, test: clips of each
SAMPLES = (47_647, 48_000, 41_000)  # of a clip's sound, in turn
FRAMES = (75, 75, 66)
WORDS_S = ((0.40, 0.75), (0.75, 1.05), (1.05, 1.25), (1.25, 1.55), (1.55, 1.90), (1.90, 2.30))


def clip_ids() -> dict[str, str]:
    """Clip id -> speaker; ids that the corpus gives to the speaker."""
    from tfds_grid import grid_ids

    return {clip_id: speaker for speaker, count in SPEAKERS.items() for clip_id in grid_ids.ids_of(speaker)[:count]}


def voice(seed: int, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Sound (N,) in [-1, 1] and its loudness (N,) in [0, 1]: six words of harmonics of a drifting pitch under two formants."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / RATE
    audio, loudness = 0.002 * rng.normal(size=num_samples), np.zeros(num_samples)
    for start, end in WORDS_S:
        part = np.clip((time - start) / (end - start), 0, 1)
        swell = np.sin(np.pi * part) ** 0.7
        pitch = rng.uniform(100, 180) * (1 + 0.1 * part)
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        formants = rng.uniform([300, 900], [800, 2600])
        for k in range(1, 21):
            colour = sum(np.exp(-(((k * pitch - f) / 250) ** 2)) for f in formants) + 0.02
            audio += 0.08 * swell * colour * np.sin(k * phase)
        loudness = np.maximum(loudness, swell)
    return np.clip(audio, -1, 1), loudness


def measurement(seed: int) -> dict[str, np.ndarray]:
    """What tfds_grid.clips would have measured on a clip."""
    rng = np.random.default_rng(1000 + seed)
    samples, frames = SAMPLES[seed % 3], FRAMES[seed % 3]
    audio, loudness = voice(seed, samples)
    open_ = np.interp(np.arange(frames) / FPS, np.arange(samples) / RATE, loudness)
    points = rng.uniform([120, 80], [240, 250], (68, 2)) + rng.normal(0, 0.2, (frames, 68, 2))
    points[:, 48:, 1] += 8 * open_[:, None]
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
    """An .align of the clip: its words, times in 1/25000 s."""
    from avsi_jax.data import grid_text

    rows = [
        (0, WORDS_S[0][0], "sil"),
        *((*t, w) for t, w in zip(WORDS_S, grid_text.words_of(clip_id))),
        (WORDS_S[-1][1], 2.98, "sil"),
    ]
    return "".join(f"{round(a * 25_000)} {round(b * 25_000)} {word}\n" for a, b, word in rows)


def write(root: Path) -> None:
    """Made-up corpus -> records, by the real builder (imports tensorflow)."""
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
    """Writes the dataset in a process of its own; returns the folder to give to config.data_dir."""
    root_of_checkout = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.tiny_data", str(root)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root_of_checkout,
    )
    if done.returncode:
        raise RuntimeError(f"the tiny dataset could not be written:\n{done.stderr[-2000:]}")
    return root / "data"


if __name__ == "__main__":
    write(Path(sys.argv[1]))
