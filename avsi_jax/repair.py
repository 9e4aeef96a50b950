"""avsi-inpaint: clips of a person's disk repaired from the command line."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avsi_jax.inpaint import Inpainter

NOT_WRITTEN = (".mpg", ".mp4", ".avi", ".mov", ".mkv", ".mp3", ".m4a", ".aac", ".ogg", ".opus")  # suffixes of files, no folders


def parse_gap(text: str) -> tuple[float, float]:
    """'0.93-1.73' -> (0.93, 1.73)."""
    start, dash, end = text.partition("-")
    try:
        return float(start), float(end)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected START-END in seconds, such as 0.93-1.73") from None


def output_path(clip: Path, output: str | None, several: bool) -> Path:
    """Where a clip's sound goes: a file where `output` has a sound's suffix, else DIR/STEM.restored.wav; ValueError for others."""
    suffix = Path(output or "").suffix.lower()
    if suffix in (".wav", ".flac"):
        if several:
            raise ValueError(f"--output {output} is one file; expected a folder for several clips")
        return Path(output)
    if suffix in NOT_WRITTEN:
        raise ValueError(f"--output {output}: found suffix {suffix}, expected .wav or .flac (sound alone is written), or a folder")
    return Path(output or ".") / f"{clip.stem}.restored.wav"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "avsi-inpaint", description="Fill the holes in a clip's sound, by its context and the speaker's lips."
    )
    parser.add_argument(
        "clips", nargs="+", metavar="CLIP", help="video with sound (.mpg .mp4 .avi .mov .mkv), or sound alone for a_si, av_unified"
    )
    parser.add_argument(
        "--gap", type=parse_gap, action="append", metavar="START-END", help="a hole, in seconds; may be given again"
    )
    parser.add_argument("-o", "--output", help="a .wav or .flac file for one clip, else a folder; default: the current one")
    parser.add_argument("--checkpoint", help="the workdir of a training (avsi-train --workdir=DIR)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    known = parser.parse_args(argv)
    try:
        if not known.gap:
            raise ValueError("no gap given; expected at least one, such as --gap 0.93-1.73")
        if not known.checkpoint:
            raise ValueError("no --checkpoint given; expected the workdir of a training, made by avsi-train")
        jobs = [(Path(c), output_path(Path(c), known.output, len(known.clips) > 1)) for c in known.clips]
        for clip, target in jobs:
            if not clip.is_file():
                raise FileNotFoundError(f"{clip}: {'found a folder' if clip.is_dir() else 'no such file'}; expected a clip")
            if [t for _, t in jobs].count(target) > 1:
                raise ValueError(f"{target} would be written for more than one clip; repair clips of one name one by one")
            if target.exists() and not known.overwrite:
                raise FileExistsError(f"{target} exists; take --overwrite to replace it, or another --output")
        from avsi_jax.inpaint import Inpainter

        painter = Inpainter.from_workdir(known.checkpoint)
    except (ValueError, OSError) as error:
        print(f"avsi-inpaint: {error}", file=sys.stderr)
        return 2
    failed = sum(not repair_file(painter, clip, target, known.gap) for clip, target in jobs)
    return 2 if failed else 0


def repair_file(painter: Inpainter, clip: Path, target: Path, gaps) -> bool:
    """One clip -> one sound file; says what happened in one line. False where it could not be done."""
    from avsi_jax import media

    began = time.monotonic()
    try:
        repair = painter.inpaint(clip, gaps)
        target.parent.mkdir(parents=True, exist_ok=True)
        media.write_sound(target, repair.samples, repair.rate, repair.subtype)
    except (ValueError, OSError) as error:
        print(f"avsi-inpaint: {clip}: {error}", file=sys.stderr)
        return False
    for warning in repair.warnings:
        print(f"avsi-inpaint: {clip}: {warning}", file=sys.stderr)
    sentences = dict.fromkeys(filter(None, repair.said))
    said = "  likeliest sentence of Grid: " + ", ".join(f'"{s}"' for s in sentences) if sentences else ""
    print(f"{target}  ({time.monotonic() - began:.1f} s){said}")
    return True


if __name__ == "__main__":
    sys.exit(main())
