"""Evaluates the detection of corrupt frames at the start of a clip (landmarks.count_corrupt_frames) on a folder of Grid clips.

    python -m benchmarks.quality.corrupt_frames RAW [--skip IDS.txt] [--jobs 2] [--json]

RAW holds sN/ID.mpg. Prints per speaker: clips, clips and frames marked as corrupt, and how close unmarked clips come to the two
limits of the rule: the lowest luma standard deviation of a first frame (limit FLAT_STD) and the highest jump of luma between frames
(limit RECOVERY_JUMP). Takes about 0.2 s per clip on one core, all of it decoding. Results: docs/landmarks.md.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import pathlib
import sys

from tqdm import tqdm

from avsi_jax.face import landmarks
from avsi_jax.media import clip_io


def measure(path: pathlib.Path) -> dict:
    """The figures of one clip."""
    landmarks.use_one_thread()
    rgb = clip_io.read_clip(path, audio=False).video.rgb
    jumps, marked = landmarks.luma_jumps(rgb), landmarks.count_corrupt_frames(rgb)
    return {
        "speaker": path.parent.name,
        "id": path.stem,
        "frames": len(rgb),
        "marked": marked,
        "first_std": float(landmarks.luma(rgb[0]).std()),
        "jump": float(jumps.max()),
        "jump_at": int(jumps.argmax()) + 1,
        "recovery_jump": float(jumps[marked - 1]) if 0 < marked <= len(jumps) else None,
        "highest_other_jump": float(max([j for t, j in enumerate(jumps) if j <= landmarks.RECOVERY_JUMP], default=0.0)),
    }


def summarise(clips: list[dict]) -> dict:
    """The figures of one speaker, or of all."""
    marked, clean = [c for c in clips if c["marked"]], [c for c in clips if not c["marked"]]
    highest = max(clean, key=lambda c: c["jump"], default=None)
    return {
        "clips": len(clips),
        "frames": sum(c["frames"] for c in clips),
        "marked_clips": len(marked),
        "marked_frames": sum(c["marked"] for c in marked),
        "clean_first_std": min((c["first_std"] for c in clean), default=None),
        "clean_jump": highest and highest["jump"],
        "clean_jump_in": highest and f"{highest['id']} {highest['jump_at']}",
        "lowest_recovery_jump": min((c["recovery_jump"] for c in marked if c["recovery_jump"]), default=None),
        "highest_other_jump": max((c["highest_other_jump"] for c in marked), default=None),
        "marked": {c["id"]: c["marked"] for c in marked},
    }


def print_table(speakers: dict[str, dict], total: dict) -> None:
    """Prints one row per speaker and one for all."""
    print(f"{'':8}{'clips':>7}{'frames':>10}{'marked':>8}{'frames':>10}{'first std':>11}{'jump':>7}  in clip, frame")
    for name, row in [*speakers.items(), ("all", total)]:
        std, jump = (f"{row[key]:.2f}" if row[key] is not None else "-" for key in ("clean_first_std", "clean_jump"))
        counts = f"{row['clips']:7}{row['frames']:10}{row['marked_clips']:8}{row['marked_frames']:10}"
        print(f"{name:8}{counts}{std:>11}{jump:>7}  {row['clean_jump_in'] or ''}")
    for name, row in speakers.items():
        if row["marked"]:
            print(f"marked in {name}: " + ", ".join(f"{clip} {n}" for clip, n in row["marked"].items()))
    if total["lowest_recovery_jump"]:
        print(f"lowest jump that ends corrupt frames {total['lowest_recovery_jump']:.2f}, highest other jump of marked clips "
              f"{total['highest_other_jump']:.2f}; limit {landmarks.RECOVERY_JUMP:g}")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The command `python -m benchmarks.quality.corrupt_frames`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", type=pathlib.Path, help="folder of sN/ID.mpg")
    parser.add_argument("--skip", type=pathlib.Path, help="file of clip ids to leave out, one per line")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, including every clip")
    args = parser.parse_args(argv)
    skip = set(args.skip.read_text().split()) if args.skip else set()
    paths = [p for p in sorted(args.raw.glob("s*/*.mpg")) if p.stem not in skip]
    if not paths:
        print(f"{args.raw}: found no sN/ID.mpg; expected a folder of Grid clips by speaker", file=sys.stderr)
        return 2
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        clips = list(tqdm(pool.imap(measure, paths, chunksize=8), total=len(paths), unit="clip"))
    by_speaker = collections.defaultdict(list)
    for clip in clips:
        by_speaker[clip["speaker"]].append(clip)
    speakers = {name: summarise(by_speaker[name]) for name in sorted(by_speaker, key=lambda n: int(n[1:]))}
    total = summarise(clips)
    if args.json:
        print(json.dumps({"all": total, "speakers": speakers, "clips": clips}, indent=1))
    else:
        print_table(speakers, total)
    return 0


if __name__ == "__main__":
    sys.exit(main())
