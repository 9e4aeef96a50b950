"""A synthetic corpus in the layout of Grid: eSpeak NG speaks Grid sentences, and a warped photo moves its lips accordingly.

For tests and for `make demo`, where no data is at hand. Easier than real speech: audio and lip movements come from the same
phones. Speaker s1 has sentences of Grid's s1, so that the splits of a build are those of Grid.

    python -m tfds_grid.synthetic --out=RAW --speakers=4 --clips=60 --seed=0

The same arguments give the same bytes for any number of workers. Running it again completes what a killed run has written.
Letters: N samples, T video frames.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence

import numpy as np

import avsi_jax
from avsi_jax.data import grid_text
from avsi_jax.media import clip_io, grid_mpeg
from avsi_jax.runtime import process_pool, unexpected_errors
from avsi_jax.runtime.command_line import Parser
from tfds_grid import espeak, grid_ids, visemes

NUM_FRAMES, RATE = 75, 25_000  # video frames, Hz: as in Grid's videos and its audio_25k
NUM_SAMPLES = NUM_FRAMES * RATE // visemes.FPS
MAX_SPEECH_S = 2.45  # speech in the 3 seconds; a longer sentence is synthesized again, faster
SPEED_UP_WPM = 15  # words per minute
# Given as phones: "at a" would become one word with an article, and a US voice would pronounce "z" as "zee".
PRONUNCIATIONS = {"a": "[['eI]]", "z": "[[z'Ed]]"}
VOICES = {  # two British, a Scottish, an American, received pronunciation, a child; by rising pitch: s5 s1 s3 s2 s4 s6
    "s1": espeak.Voice("gmw/en+m3", pitch=38, pitch_range=55, words_per_minute=150),
    "s2": espeak.Voice("gmw/en+f2", pitch=55, pitch_range=55, words_per_minute=158),
    "s3": espeak.Voice("gmw/en-GB-scotland+m7", pitch=60, pitch_range=50, words_per_minute=142),
    "s4": espeak.Voice("gmw/en-US+f4", pitch=70, pitch_range=60, words_per_minute=150),
    "s5": espeak.Voice("gmw/en-GB-x-rp+m1", pitch=25, pitch_range=45, words_per_minute=160),
    "s6": espeak.Voice("gmw/en+Alicia", pitch=60, pitch_range=60, words_per_minute=150),
}

CLIP_TIMEOUT_S, CLIP_MEMORY_MB = 120, 4096  # a clip takes 0.3 s and 150 MB
UNFINISHED = ".unfinished"  # folder in RAW during a run: the final README, and the file being written
README = "README.txt"
TITLE = "Synthetic talking-head clips in the layout of the Grid corpus"
REQUIRED_MODULES = {"espeakng_loader": "synthesizes speech", "skimage": "contains the photo"}
REPORTED_PACKAGES = ("espeakng-loader", "scikit-image", "opencv-python-headless", "av", "numpy", "scipy", "soxr")


@dataclasses.dataclass(frozen=True)
class Speech:
    """A synthesized sentence, padded to 3 seconds."""

    audio: np.ndarray  # (75000,) int16 at RATE
    words: tuple[tuple[int, int, str], ...]  # start and end in samples, silences ('sil') at both ends
    phones: tuple[tuple[float, float, str], ...]  # start and end in seconds, eSpeak NG's name


@dataclasses.dataclass(frozen=True)
class SyntheticClip:
    """A clip, with the mouth movements that generated its video."""

    id: str
    speaker: str
    speech: Speech
    video: np.ndarray  # (75, 432, 360) uint8, planar yuv420p of 360 x 288
    mouth: np.ndarray  # (75, 6) in the order of visemes.MOUTH
    visemes: np.ndarray  # (75,) names, one per frame


def sentences(speaker: str, count: int, seed: int) -> list[str]:
    """`count` ids of the speaker in Grid, sorted; for one seed, a larger count includes the ids of a smaller one."""
    ids = grid_ids.ids_of(speaker)
    if count > len(ids):
        raise ValueError(f"--clips={count}: {speaker} has {len(ids)} sentences; expected at most {len(ids)}")
    order = np.random.default_rng([seed, _number(speaker)]).permutation(len(ids))
    return sorted(ids[i] for i in order[:count])


def make_clip(speaker: str, clip_id: str, seed: int) -> SyntheticClip:
    """Makes one clip; it depends only on the arguments (about 0.3 s)."""
    root = np.random.SeedSequence([seed, _number(speaker), *clip_id.encode()])
    voice, mouth, camera = map(np.random.default_rng, root.spawn(3))
    speech, head = speak(speaker, clip_id, voice), _head(speaker)
    track, names = visemes.mouth_track(speech.phones, mouth, num_frames=NUM_FRAMES, gain=head.gain)
    return SyntheticClip(clip_id, speaker, speech, head.render(track, camera), track, names)


def speak(speaker: str, clip_id: str, rng: np.random.Generator) -> Speech:
    """The id's sentence in the speaker's voice, with random variations of speed, pitch and start time."""
    words = grid_text.words_of(clip_id)
    utterance = _synthesize(" ".join(PRONUNCIATIONS.get(word, word) for word in words), VOICES[speaker], rng)
    if len(utterance.words) != len(words):
        raise espeak.EspeakError(f"eSpeak NG gives {len(utterance.words)} words for {clip_id}, expected {len(words)}")
    scale = RATE / utterance.rate
    phones = [(round(at * scale), name) for at, name in utterance.phones]
    voice = clip_io.resample(clip_io.from_int16(np.frombuffer(utterance.pcm, "<i2")), utterance.rate, RATE)
    spoken = [at for at, name in phones if not name.startswith("_")]
    end = next((at for at, _ in phones if at > spoken[-1]), len(voice))
    first = round(rng.uniform(0.4, 0.6) * (NUM_SAMPLES - end))  # roughly equal silence before and after
    audio = rng.normal(0, 6 / 32768, NUM_SAMPLES)  # low background noise
    part = voice[: NUM_SAMPLES - first]
    audio[first : first + len(part)] += rng.uniform(0.55, 0.75) * part
    starts = [first + max(round(utterance.words[0] * scale), spoken[0] - RATE // 50)]
    starts += [first + round(at * scale) for at in utterance.words[1:]]
    edges = [0, *starts, first + end, NUM_SAMPLES]
    ends = [at for at, _ in phones[1:]] + [len(voice)]
    return Speech(
        clip_io.to_int16(audio),
        tuple(zip(edges[:-1], edges[1:], ["sil", *words, "sil"])),
        tuple(((first + at) / RATE, (first + stop) / RATE, name) for (at, name), stop in zip(phones, ends)),
    )


def _synthesize(sentence: str, voice: espeak.Voice, rng: np.random.Generator) -> espeak.Utterance:
    pitch = int(np.clip(voice.pitch + rng.integers(-5, 6), 0, 99))
    voice = dataclasses.replace(voice, pitch=pitch, words_per_minute=voice.words_per_minute + int(rng.integers(-12, 13)))
    seed = int(rng.integers(1, 2**31))
    while True:
        utterance = _espeak().synthesize(sentence, voice, seed)
        if len(utterance.pcm) // 2 <= MAX_SPEECH_S * utterance.rate:
            return utterance
        voice = dataclasses.replace(voice, words_per_minute=voice.words_per_minute + SPEED_UP_WPM)


@functools.cache
def _espeak() -> espeak.Espeak:
    return espeak.Espeak()


@functools.cache
def _head(speaker: str):
    from tfds_grid import talking_head

    return talking_head.Head(_number(speaker) - 1)


def _number(speaker: str) -> int:
    return int(speaker.removeprefix("s"))


# ----------------------------------------------------------------------------------------------------------------- files


def paths_of(raw: pathlib.Path, speaker: str, clip_id: str) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    """Paths of a clip's video, audio and words, as in Grid's unpacked Zenodo record."""
    folders = raw, raw / "audio_25k", raw / "alignments"
    return tuple(folder / speaker / f"{clip_id}{suffix}" for folder, suffix in zip(folders, (".mpg", ".wav", ".align")))


def write_clip(raw: pathlib.Path, speaker: str, clip_id: str, seed: int) -> None:
    """Makes a clip and moves its files into place atomically; the words come last, so their presence marks a complete clip."""
    video, audio, words = paths_of(raw, speaker, clip_id)
    if words.exists():
        return
    clip = make_clip(speaker, clip_id, seed)
    temporary = {path: raw / UNFINISHED / path.name for path in (video, audio, words)}
    grid_mpeg.write_clip(temporary[video], clip.video, visemes.FPS, clip.speech.audio, RATE)
    clip_io.write_audio(temporary[audio], clip.speech.audio, RATE)
    temporary[words].write_text("".join(f"{start} {end} {word}\n" for start, end, word in clip.speech.words))
    for path in temporary:
        temporary[path].replace(path)


def readme(speakers: int, clips: int, seed: int) -> str:
    """The text of RAW/README.txt. A run only continues a folder whose README is the same."""
    voices = "\n".join(f"  {name}: {voice.name}" for name, voice in list(VOICES.items())[:speakers])
    return f"""{TITLE}
{"=" * len(TITLE)}

No person speaks here: the voices and the movements of the one face are synthetic. The clips are meant for trying programs out;
numbers measured on them do not transfer to real speech.

Made by   python -m tfds_grid.synthetic --speakers={speakers} --clips={clips} --seed={seed}
with      {_versions()}

Files     s1/ID.mpg (MPEG-1, 360 x 288, 25 fps, 3 s), audio_25k/s1/ID.wav (25 kHz), alignments/s1/ID.align (start and end of each
          word in 1/25000 s). ID encodes the six words, as in the Grid corpus; s1 has sentences of Grid's s1.
Voices    eSpeak NG (https://github.com/espeak-ng/espeak-ng, GPL-3.0-or-later), from the Python wheel espeakng-loader:
{voices}
Photo     NASA's portrait of the astronaut Eileen Collins, public domain, from scikit-image (skimage.data.astronaut), changed in
          proportions, colour and movement. Credit: NASA. Neither NASA nor the person shown endorses this.
"""


def _versions() -> str:
    versions = [f"avsi_jax {avsi_jax.__version__}"]
    for name in REPORTED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(versions)


def _open_folder(raw: pathlib.Path, note: str, overwrite: bool) -> None:
    """Prepares RAW for clips that match this README (`note`); FileExistsError where it holds anything else."""
    begun, finished = raw / UNFINISHED / README, raw / README
    if begun.is_file() and begun.read_text() == note:
        return
    if raw.exists() and not raw.is_dir():
        raise FileExistsError(f"--out={raw} is a file; expected an empty or a new folder")
    if raw.is_dir() and any(raw.iterdir()):
        readmes = [path for path in (begun, finished) if path.is_file() and path.read_text().startswith(TITLE)]
        state = "an unfinished run with other arguments or versions" if readmes == [begun] else "a synthetic corpus already"
        if not readmes:
            raise FileExistsError(f"--out={raw} holds files that this program did not write; expected an empty or a new folder")
        if not overwrite:
            raise FileExistsError(f"--out={raw} holds {state}; --overwrite replaces it, another --out keeps it")
        begun.parent.mkdir(exist_ok=True)
        readmes[0].replace(begun)  # marks the folder as ours, but incomplete
        for folder in (*(raw / home / name for home in ("audio_25k", "alignments", "") for name in VOICES),):
            for path in folder.glob("*"):
                if grid_text.is_grid_id(path.stem) and path.suffix in (".mpg", ".wav", ".align"):
                    path.unlink()
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    begun.parent.mkdir(parents=True, exist_ok=True)
    temporary = begun.with_suffix(".tmp")
    temporary.write_text(note)
    temporary.replace(begun)


def generate(raw: str | os.PathLike, *, speakers: int, clips: int, seed: int, num_workers: int, overwrite: bool = False) -> None:
    """Writes the corpus with `num_workers` processes; raises ValueError or OSError with a one-line message for the user."""
    raw = pathlib.Path(raw).expanduser()
    _need_extra()
    jobs = [(f"s{i}", clip_id) for i in range(1, speakers + 1) for clip_id in sentences(f"s{i}", clips, seed)]
    _open_folder(raw, readme(speakers, clips, seed), overwrite)
    for path in {path.parent for job in jobs for path in paths_of(raw, *job)}:
        path.mkdir(parents=True, exist_ok=True)
    _write_all(raw, jobs, seed, num_workers)
    (raw / UNFINISHED / README).replace(raw / README)
    shutil.rmtree(raw / UNFINISHED)


def _need_extra() -> None:
    for module, purpose in REQUIRED_MODULES.items():
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f'{module}, which {purpose}, is not installed: pip install "avsi_jax[synth]"')


# --------------------------------------------------------------------------------------------------------------- workers


def _start_worker() -> None:
    """Each worker uses one core: the pool is the parallelism."""
    import cv2

    cv2.setNumThreads(1)


def _write_all(raw: pathlib.Path, jobs: Sequence[tuple[str, str]], seed: int, num_workers: int) -> None:
    import tqdm

    calls = [(raw, *job, seed) for job in jobs]
    outcomes = process_pool.run(
        write_clip, calls, workers=num_workers, timeout_s=CLIP_TIMEOUT_S, memory_mb=CLIP_MEMORY_MB, start=_start_worker
    )
    for outcome in tqdm.tqdm(outcomes, "making", len(calls), unit="clip", mininterval=1):
        if outcome.failure:
            raise OSError(f"making {jobs[outcome.index][1]} {outcome.failure}; the same command continues from here")


# --------------------------------------------------------------------------------------------------------------- command


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python -m tfds_grid.synthetic", description="Makes a small synthetic corpus like Grid.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add = parser.add_argument
    add("--out", required=True, metavar="RAW", help="folder to write to: new or empty")
    add("--speakers", type=int, default=4, metavar="N", help=f"s1 to sN, at most {len(VOICES)}; default: %(default)s")
    add("--clips", type=int, default=60, metavar="N", help="clips per speaker; default: %(default)s")
    add("--seed", type=int, default=0, help="seed for sentences, voices and movements; default: %(default)s")
    add("--workers", type=int, default=cores, metavar="N", help="worker processes; default: one per core, %(default)s")
    add("--overwrite", action="store_true", help="replace an existing synthetic corpus")
    return parser


@unexpected_errors.reported("synthetic")
def main(argv: list[str] | None = None) -> int:
    """The command `python -m tfds_grid.synthetic`; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not 1 <= args.speakers <= len(VOICES):
        parser.error(f"--speakers={args.speakers}: expected 1 to {len(VOICES)}, the number of voices")
    if args.clips < 1 or args.workers < 1 or args.seed < 0:
        parser.error(f"--clips={args.clips} --workers={args.workers} --seed={args.seed}: expected at least 1, 1 and 0")
    try:
        generate(
            args.out, speakers=args.speakers, clips=args.clips, seed=args.seed, num_workers=args.workers, overwrite=args.overwrite
        )  # fmt: skip
    except (ValueError, OSError, ModuleNotFoundError) as e:
        print(f"synthetic: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsynthetic: stopped; the same command continues from here", file=sys.stderr)
        return 130
    print(f"{args.out}: {args.speakers * args.clips} clips of {args.speakers} synthetic speakers")
    return 0


if __name__ == "__main__":  # worker processes import this module by name
    from tfds_grid import synthetic

    sys.exit(synthetic.main())
