"""How the rule for damaged opening pictures (landmarks.damaged_until) fares on a folder of Grid clips.

    python -m benchmarks.quality.gap_detection_rule RAW [--skip IDS.txt] [--jobs 2] [--json]

RAW holds sN/ID.mpg. Printed per speaker: clips, marked clips and pictures, and how near unmarked clips come to the rule's two
limits: their lowest luma standard deviation of a first picture (limit FLAT_STD) and their highest jump (limit REPAIR_JUMP).
About 0.2 s a clip on one core, all of it decoding. Results so far: docs/landmarks.md.
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
    """One clip's numbers."""
    landmarks.use_one_thread()
    rgb = clip_io.read_clip(path, audio=False).video.rgb
    jumps, marked = landmarks.luma_jumps(rgb), landmarks.corrupt_until(rgb)
    return {
        "speaker": path.parent.name,
        "id": path.stem,
        "pictures": len(rgb),
        "marked": marked,
        "first_std": float(landmarks.luma(rgb[0]).std()),
        "jump": float(jumps.max()),
        "jump_at": int(jumps.argmax()) + 1,
        "last_repair": float(jumps[marked - 1]) if 0 < marked <= len(jumps) else None,
        "highest_not_repair": float(max([j for t, j in enumerate(jumps) if j <= landmarks.RECOVERY_JUMP], default=0.0)),
    }


def summarise(clips: list[dict]) -> dict:
    """Numbers of one speaker, or of all."""
    marked, clean = [c for c in clips if c["marked"]], [c for c in clips if not c["marked"]]
    highest = max(clean, key=lambda c: c["jump"], default=None)
    return {
        "clips": len(clips),
        "pictures": sum(c["pictures"] for c in clips),
        "marked_clips": len(marked),
        "marked_pictures": sum(c["marked"] for c in marked),
        "clean_first_std": min((c["first_std"] for c in clean), default=None),
        "clean_jump": highest and highest["jump"],
        "clean_jump_in": highest and f"{highest['id']} {highest['jump_at']}",
        "least_repair": min((c["last_repair"] for c in marked if c["last_repair"]), default=None),
        "highest_not_repair": max((c["highest_not_repair"] for c in marked), default=None),
        "marked": {c["id"]: c["marked"] for c in marked},
    }


def print_table(speakers: dict[str, dict], everything: dict) -> None:
    print(f"{'':8}{'clips':>7}{'pictures':>10}{'marked':>8}{'pictures':>10}{'first std':>11}{'jump':>7}  in clip, picture")
    for name, row in [*speakers.items(), ("all", everything)]:
        std, jump = (f"{row[key]:.2f}" if row[key] is not None else "-" for key in ("clean_first_std", "clean_jump"))
        counts = f"{row['clips']:7}{row['pictures']:10}{row['marked_clips']:8}{row['marked_pictures']:10}"
        print(f"{name:8}{counts}{std:>11}{jump:>7}  {row['clean_jump_in'] or ''}")
    for name, row in speakers.items():
        if row["marked"]:
            print(f"marked in {name}: " + ", ".join(f"{clip} {n}" for clip, n in row["marked"].items()))
    if everything["least_repair"]:
        print(f"least jump that ends a marked opening {everything['least_repair']:.2f}, highest other jump of marked clips "
              f"{everything['highest_not_repair']:.2f}; limit {landmarks.RECOVERY_JUMP:g}")  # fmt: skip


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", type=pathlib.Path, help="folder of sN/ID.mpg")
    parser.add_argument("--skip", type=pathlib.Path, help="file of clip ids to leave out, one a line")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, every clip included")
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
    everything = summarise(clips)
    if args.json:
        print(json.dumps({"all": everything, "speakers": speakers, "clips": clips}, indent=1))
    else:
        print_table(speakers, everything)
    return 0


if __name__ == "__main__":
    sys.exit(main())
