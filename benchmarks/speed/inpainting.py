"""Measures how long avsi-inpaint takes; every run is a new process (docs/performance.md).

    python -m benchmarks.speed.inpainting clip CLIP [--gap 0.8-1.6] [--checkpoint pretrained] [--rounds 3]
    python -m benchmarks.speed.inpainting long RAW --minutes 60 [--every 30] [--checkpoint pretrained]

clip: first with an empty cache of compiled programs, then with a warm one: the time of the command, and of its parts as it reports
them; then repeatedly in one process. long: joins clips of RAW (sN/ID.mpg), their video streams copied, into a long video with a gap
of 0.8 s at regular intervals; measures the speed, and the peak memory of the command in each tenth of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from avsi_jax.media import clip_io

COMMAND = [sys.executable, "-m", "avsi_jax.inpainting.cli", "--json"]
GAP_S = 0.8
CLIP_S = 2.96  # 74 frames, which every Grid clip has


def run_timed(arguments: Sequence[object], env: dict[str, str]) -> tuple[float, dict]:
    """Runs avsi-inpaint --json; returns its wall time in seconds and its last line of output."""
    start = time.perf_counter()
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=os.environ | env)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - start, json.loads(done.stdout.splitlines()[-1])


def measure_clip(args: argparse.Namespace) -> None:
    """The `clip` command."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/programs"}
        for i in range(1 + args.rounds):
            arguments = [args.path, "--gap", args.gap, "--checkpoint", args.checkpoint, "-o", f"{folder}/{i}"]
            total_s, result = run_timed(arguments, env)
            print("first" if not i else "warm", f"command {total_s:.2f} s", parts(result["seconds"]), flush=True)
    from avsi_jax import Inpainter

    inpainter, gap = Inpainter.load(args.checkpoint), tuple(map(float, args.gap.split("-")))
    for _ in range(1 + args.rounds):
        seconds = inpainter.inpaint(args.path, [gap]).seconds
    print("in one process", parts(seconds))


def parts(seconds: dict[str, float]) -> str:
    """The seconds of each part, in one line."""
    return "  ".join(f"{k} {v:.3f}" for k, v in seconds.items())


def write_long_video(raw: Path, target: Path, minutes: float) -> float:
    """Repeats clips of one speaker: MPEG-1 video streams copied, audio as FLAC. Returns the duration in seconds."""
    import av

    clips, frames, audio, num_samples = sorted(raw.glob("s1/*.mpg"))[:40], None, None, 0
    with av.open(str(target), "w") as out:
        for k in range(round(minutes * 60 / CLIP_S)):
            path = str(clips[k % len(clips)])
            samples = clip_io.to_int16(clip_io.read_clip(path, video=False).audio.samples)
            with av.open(path) as source:
                if frames is None:
                    frames = out.add_stream_from_template(source.streams.video[0])
                    audio = out.add_stream("flac", rate=44_100, layout="stereo")
                packets = [packet for packet in source.demux(video=0) if packet.size]
                for i, packet in enumerate(packets[: round(CLIP_S * 25)]):
                    packet.pts = packet.dts = round((k * CLIP_S + i / 25) / packet.time_base)
                    packet.stream = frames
                    out.mux(packet)
            padded = np.zeros((round(CLIP_S * 44_100), 2), np.int16)
            padded[: len(samples)] = samples[: len(padded)]
            frame = av.AudioFrame.from_ndarray(padded.reshape(1, -1), "s16", "stereo")
            frame.rate, frame.pts, num_samples = 44_100, num_samples, num_samples + len(padded)
            out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    return num_samples / 44_100


def memory_mb(process: int) -> float:
    """Resident memory (VmRSS) of a process now."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def measure_long(args: argparse.Namespace) -> None:
    """The `long` command."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "long.mkv")
        length_s = write_long_video(args.path, source, args.minutes)
        starts = np.arange(args.every / 2, length_s - args.every / 2, args.every)
        gaps = [word for at in starts for word in ("--gap", f"{at:.2f}-{at + GAP_S:.2f}")]
        start, memory = time.perf_counter(), []
        command = [*COMMAND, str(source), *gaps, "--checkpoint", args.checkpoint, "-o", f"{folder}/out"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        ended = threading.Event()

        def sample_memory() -> None:
            while not ended.wait(0.5):
                memory.append(memory_mb(process.pid))

        threading.Thread(target=sample_memory, daemon=True).start()
        output = process.stdout.read()
        ended.set()
        process.wait()
        total_s = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(f"avsi-inpaint ended with status {process.returncode}: {output[-500:]}")
        print(f"{length_s:.0f} s of video, {len(starts)} gaps, in {total_s:.1f} s: {length_s / total_s:.1f} times real time")
        print(parts(json.loads(output.splitlines()[-1])["seconds"]))
        tenths = np.array_split(np.array(memory), 10)
        print("peak memory in each tenth, MB:", *(f"{part.max():.0f}" for part in tenths if len(part)))


def main() -> None:
    """The command `python -m benchmarks.speed.inpainting`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("clip", "long"))
    parser.add_argument("path", type=Path, help="clip: a clip; long: a folder of Grid clips")
    parser.add_argument("--checkpoint", default="pretrained", help="default: %(default)s")
    parser.add_argument("--gap", default="0.8-1.6", help="clip: the gap in seconds (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="clip: runs with a warm cache (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="long: duration of the video (default: %(default)s)")
    parser.add_argument("--every", type=float, default=30, help="long: seconds from one gap to the next (default: %(default)s)")
    args = parser.parse_args()
    measure_clip(args) if args.what == "clip" else measure_long(args)


if __name__ == "__main__":
    main()
