"""How long avsi-inpaint takes, each time in a new process: docs/performance.md.

    python -m benchmarks.speed.inpainting clip CLIP [--gap 0.8-1.6] [--checkpoint pretrained] [--rounds 3]
    python -m benchmarks.speed.inpainting long RAW --minutes 60 [--every 30] [--checkpoint pretrained]

clip: the first time with an empty cache of compiled programs, then with a warm one, as the shell sees it, and what the repair says
of its parts; then in one process, where everything is warm. long: a film of RAW's clips (sN/ID.mpg) one after another, their
pictures copied, with a gap of 0.8 s every so many seconds; its speed, and the most memory that the command held in each tenth.
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
from pathlib import Path

import numpy as np

from avsi_jax.media import clip_io

COMMAND = [sys.executable, "-m", "avsi_jax.inpainting.cli", "--json"]
GAP_S = 0.8
CLIP_S = 2.96  # 74 pictures: every clip of Grid has them


def timed(arguments, env) -> tuple[float, dict]:
    began = time.perf_counter()
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=os.environ | env)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - began, json.loads(done.stdout.splitlines()[-1])


def clip(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        env = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/programs"}
        for i in range(1 + args.rounds):
            wanted = [args.path, "--gap", args.gap, "--checkpoint", args.checkpoint, "-o", f"{folder}/{i}"]
            whole, told = timed(wanted, env)
            print("first" if not i else "warm", f"command {whole:.2f} s", parts(told["seconds"]), flush=True)
    from avsi_jax import Inpainter

    inpainter, gap = Inpainter.load(args.checkpoint), tuple(map(float, args.gap.split("-")))
    for _ in range(1 + args.rounds):
        seconds = inpainter.inpaint(args.path, [gap]).seconds
    print("in one process", parts(seconds))


def parts(seconds: dict) -> str:
    return "  ".join(f"{k} {v:.3f}" for k, v in seconds.items())


def video_file(raw: Path, target: Path, minutes: float) -> float:
    """Clips of one speaker, again and again: their MPEG-1 pictures copied, their sound as FLAC. Its seconds."""
    import av

    clips, frames, audio, told = sorted(raw.glob("s1/*.mpg"))[:40], None, None, 0
    with av.open(str(target), "w") as out:
        for k in range(round(minutes * 60 / CLIP_S)):
            path = str(clips[k % len(clips)])
            heard = clip_io.to_int16(clip_io.read_clip(path, video=False).audio.samples)
            with av.open(path) as one:
                if frames is None:
                    frames = out.add_stream_from_template(one.streams.video[0])
                    audio = out.add_stream("flac", rate=44_100, layout="stereo")
                packets = [packet for packet in one.demux(video=0) if packet.size]
                for i, packet in enumerate(packets[: round(CLIP_S * 25)]):
                    packet.pts = packet.dts = round((k * CLIP_S + i / 25) / packet.time_base)
                    packet.stream = frames
                    out.mux(packet)
            whole = np.zeros((round(CLIP_S * 44_100), 2), np.int16)
            whole[: len(heard)] = heard[: len(whole)]
            frame = av.AudioFrame.from_ndarray(whole.reshape(1, -1), "s16", "stereo")
            frame.rate, frame.pts, told = 44_100, told, told + len(whole)
            out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    return told / 44_100


def memory_mb(process: int) -> float:
    """Of it now, VmRSS."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def long(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "film.mkv")
        length_s = video_file(args.path, source, args.minutes)
        starts = np.arange(args.every / 2, length_s - args.every / 2, args.every)
        gaps = [word for at in starts for word in ("--gap", f"{at:.2f}-{at + GAP_S:.2f}")]
        began, seen = time.perf_counter(), []
        command = [*COMMAND, str(source), *gaps, "--checkpoint", args.checkpoint, "-o", f"{folder}/out"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.5):
                seen.append(memory_mb(process.pid))

        tracks = threading.Thread(target=watch, daemon=True)
        tracks.start()
        told = process.stdout.read()
        ended.set()
        process.wait()
        took = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"avsi-inpaint ended with {process.returncode}: {told[-500:]}")
        print(f"{length_s:.0f} s of film, {len(starts)} gaps, in {took:.1f} s: {length_s / took:.1f} times real time")
        print(parts(json.loads(told.splitlines()[-1])["seconds"]))
        tenths = np.array_split(np.array(seen), 10)
        print("most memory in each tenth, MB:", *(f"{part.max():.0f}" for part in tenths if len(part)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("clip", "long"))
    parser.add_argument("path", type=Path, help="clip: a clip; long: a folder of Grid's clips")
    parser.add_argument("--checkpoint", default="pretrained")
    parser.add_argument("--gap", default="0.8-1.6")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=30, help="seconds from one gap to the next")
    args = parser.parse_args()
    clip(args) if args.what == "clip" else long(args)


if __name__ == "__main__":
    main()
