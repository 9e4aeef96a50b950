"""How the cost of a training step grows with devices and hosts: measured on CPUs, asked of the TPU's compiler, worked out on paper.

    python -m benchmarks.tpu.scaling                     # docs/scaling.md: what is on paper, anew from the page's other tables
    python -m benchmarks.tpu.scaling --json              # the same numbers as one line
    python -m benchmarks.tpu.scaling --measure           # the page's measured tables: 8 CPU devices, then two processes; minutes
    python -m benchmarks.tpu.scaling --compile --cache=DIR      # its table of the compiler (needs the extra `tpu`; DIR keeps results)

The page is the store of what was measured and compiled (scaling_page.py); what is on paper is in scaling_paper.py; `--markdown`
prints what would be written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.tpu import compiled_text, scaling_page, scaling_paper, tpu_compile

# ---- the compiler --------------------------------------------------------------------------------------------------------------

SLICES = {"v5e:4x4": "v5litepod-16", "v5e:4x8": "v5litepod-32", "v5e:16x16": "v5litepod-256"}
WANTED = [
    ("av_mtl_s2s", "v5e:2x4", 256),
    ("av_unified", "v5e:2x4", 256),
    ("av_mtl_s2s", "v5e:2x4", 32),
    ("av_mtl_s2s", "v5e:4x4", 32),
    ("av_mtl_s2s", "v5e:16x16", 32),
    ("av_mtl_s2s", "v5e:4x4", 16),
    ("av_mtl_s2s", "v5e:4x8", 8),
    ("av_mtl_s2s", "v5e:16x16", 1),
    ("av_unified", "v5e:16x16", 32),
    ("av_unified", "v5e:4x8", 8),
    ("av_unified", "v5e:16x16", 1),
]


def reduced(text: str) -> list[dict]:
    """The sums over devices in a compiled program's text: how many arrays, bytes and devices each takes."""
    program, found = compiled_text.parse(text), []
    for computation in program.computations.values():
        for name, instruction in computation.items():
            if name == "ROOT" or instruction.op not in ("all-reduce", "all-reduce-start"):
                continue
            first = re.search(r"replica_groups=\{\{([\d,]*)\}|replica_groups=\[\d+,(\d+)\]", instruction.after)
            devices = 0 if not first else int(first[2]) if first[2] else len(first[1].split(","))
            sizes = [compiled_text.size_bytes(computation[o].shape) for o in instruction.operands]
            found.append({"arrays": len(sizes), "bytes": sum(sizes), "devices": devices})
    return found


def compile_one(system: str, topology: str, batch_per_chip: int, text: Path) -> dict:
    """In a process of its own."""
    os.environ.update(tpu_compile.ALONE)
    clock = tpu_compile.TOPOLOGIES["v5e:2x4"][1]
    tpu_compile.TOPOLOGIES |= {name: (kind, clock, {}) for name, kind in SLICES.items()}
    args = argparse.Namespace(
        system=system, topology=topology, batch_per_chip=batch_per_chip, lstm="joined", dtype="", keep_text=text, programs=None
    )
    return tpu_compile.measure(args) | {"sums": reduced(text.read_text())}


def compiled_rows(cache: Path, budget_s: float) -> list[dict]:
    """Of all that is wanted; what fails, or would begin after `budget_s`, is told on stderr and left out."""
    rows, began = [], time.monotonic()
    for what in WANTED:
        kept = cache / f"{'-'.join(map(str, what)).replace(':', '_')}.json"
        if not kept.is_file() and time.monotonic() - began >= budget_s:
            print(*what, "not compiled yet", file=sys.stderr)
            continue
        if not kept.is_file():
            command = [sys.executable, "-m", "benchmarks.tpu.scaling", "--one", ",".join(map(str, what)), "--cache", str(cache)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(*what, tpu_compile.reason(done.stderr), file=sys.stderr)
                continue
            kept.write_text(done.stdout.splitlines()[-1])
        rows.append(compiled_row(json.loads(kept.read_text())))
    return rows


def compiled_row(r: dict) -> dict:
    loops = r["estimated_loop_cycles"]
    return {
        "system": r["system"],
        "topology": r["topology"],
        "chips": r["devices"],
        "clips a chip": r["batch_per_chip"],
        "global batch": r["devices"] * r["batch_per_chip"],
        "MB a chip": round(r["bytes_per_chip"] / 1e6),
        "all-reduces": r["collectives"],
        "arrays in each": " + ".join(str(s["arrays"]) for s in r["sums"]),
        "MB reduced": f"{r['collective_bytes'] / 1e6:.2f}",
        "k cycles in loops": round(loops / 1e3),
        "k cycles outside": round((r["estimated_cycles"] - loops) / 1e3),
        "ms": f"{r['estimated_ms']:.1f}",
        "compiled in s": round(r["compile_s"]),
    }


# ---- measured ------------------------------------------------------------------------------------------------------------------

SMALL = {"system": "a_si", "units": "32", "layers": "1", "lstm": "separate", "batch_size": "16"}  # of config tiny
ROUNDS = 25


def alternate(does: dict, rounds: int = ROUNDS) -> dict:
    """{name: median ms}: everything once to warm up, then in turns, each waited for."""
    import jax

    took = {name: [] for name in does}
    for turn in range(rounds + 1):
        for name, do in does.items():
            began = time.perf_counter()
            jax.block_until_ready(do())
            took[name] += [1e3 * (time.perf_counter() - began)] * (turn > 0)
    return {name: statistics.median(ms) for name, ms in took.items()}


def small_step():
    """(the pure step, its state, a batch of 16 clips of noise)."""
    from avsi_jax import configs
    from avsi_jax.training import objective, train_step
    from benchmarks.speed import contenders

    config = configs.load("tiny", list(SMALL.items()))
    return (
        train_step.make_train_step(config, objective.make_optimiser(config, 1)),
        train_step.init_state(config, 1),
        contenders.raw_batch(16),
    )


def stepper(step, state, batch: dict, how: str, devices=None):
    """A function that does one step from the host's arrays; how '': mapped over nothing."""
    import jax

    from avsi_jax.runtime import devices as devices_lib

    mapped = devices_lib.map_train_step(step, devices, how) if how else jax.jit(step, donate_argnums=0)
    box = [devices_lib.replicate(jax.device_get(state), how, devices) if how else jax.device_put(jax.device_get(state), devices[0])]

    def once():
        box[0], metrics = mapped(box[0], devices_lib.split(batch, how, devices) if how else batch)
        return box[0], metrics

    return once


def summer(size: int, how: str, devices=None):
    """A function that sums an array of `size` bytes over devices."""
    import numpy as np

    from avsi_jax.runtime import devices as devices_lib

    mapped = devices_lib.map_evaluation_step(lambda x, b: devices_lib.sum_over_devices(x * b["x"].max()), how=how, devices=devices)
    x = devices_lib.replicate(np.ones(size // 4, np.float32), how, devices)
    ones = np.ones(len(devices) if devices else devices_lib.jax.local_device_count(), np.float32)
    return lambda: mapped(x, devices_lib.split({"x": ones}, how, devices))


def child_devices() -> dict:
    """One process, 8 CPU devices."""
    import jax

    from avsi_jax import configs
    from avsi_jax.models import build
    from avsi_jax.runtime import devices
    from avsi_jax.training import objective, train_step
    from benchmarks.speed import contenders

    load = os.getloadavg()[0]
    step, state, batch = small_step()
    batch = {k: v for k, v in batch.items() if k != "clip_id"}
    counts = (1, 2, 4, 8)
    some = lambda n: jax.devices()[:n]
    does = {("", 1): stepper(step, state, batch, "", some(1))}
    does |= {(how, n): stepper(step, state, batch, how, some(n)) for n in counts for how in devices.WAYS}
    ms = alternate(does)
    sums = alternate({n: summer(32_595_236, "shard_map", some(n)) for n in counts}, 9)
    many = {k: v for k, v in contenders.raw_batch(256).items() if k != "clip_id"}
    splits = alternate({(how, n): lambda n=n, how=how: devices.split(many, how, some(n)) for n in counts for how in devices.WAYS})
    config = configs.load("av_mtl_s2s", [("lstm", "separate")], like="base")
    whole = train_step.make_train_step(config, objective.make_optimiser(config, 1))
    shapes = jax.eval_shape(lambda: train_step.init_state(config, 1))
    texts = {}
    for how, n in (("pmap", 1), ("pmap", 2), ("pmap", 8), ("shard_map", 8)):
        given = {k: v[:8] for k, v in many.items()}
        given = {k: v.reshape(n, -1, *v.shape[1:]) for k, v in given.items()} if how == "pmap" else given
        texts[how, n] = reduced(devices.map_train_step(whole, some(n), how).lower(shapes, given).compile().as_text())
    parameters = build.count_of(config)
    return {
        "steps": [
            {
                "devices": n,
                "one device, not mapped, ms": ms["", 1],
                "pmap, ms": ms["pmap", n],
                "shard_map, ms": ms["shard_map", n],
                "shard_map / pmap": ms["shard_map", n] / ms["pmap", n],
                "pmap / not mapped": ms["pmap", n] / ms["", 1],
                "split 256 clips by pmap, ms": splits["pmap", n],
                "by shard_map, ms": splits["shard_map", n],
                "33 MB summed, ms": sums[n],
            }
            for n in counts
        ],
        "bytes": [
            {
                "how": how,
                "devices": n,
                "all-reduces": len(found),
                "of more than 100 bytes": sum(s["bytes"] > 100 for s in found),
                "arrays": sum(s["arrays"] for s in found),
                "bytes": sum(s["bytes"] for s in found),
                "4 x parameters": 4 * parameters,
            }
            for (how, n), found in texts.items()
        ],
        "load": [load, os.getloadavg()[0]],
    }


def child_hosts() -> dict:
    """One of several processes, or one alone, of the same devices in all; every process gets its share of 16 clips."""
    from avsi_jax.runtime import distributed

    distributed.start("auto", timeout_s=60)
    import jax

    from avsi_jax.runtime import devices

    step, state, batch = small_step()
    rows = 16 // jax.process_count()
    batch = {k: v[:rows] for k, v in batch.items() if k != "clip_id"}
    does = {how: stepper(step, state, batch, how) for how in devices.WAYS}
    does |= {
        "33 MB summed": summer(32_595_236, "shard_map"),
        "agree": lambda: devices.agree([0, 0, 0]),
        "sum_over_processes": lambda: devices.sum_over_processes([1.0] * 10),
    }
    found = {"processes": jax.process_count(), "devices": jax.device_count()} | {f"{k}, ms": v for k, v in alternate(does).items()}
    print(json.dumps(found), flush=True)
    distributed.leave(0)
    return found


def measured() -> dict:
    """{heading: rows} of this machine, and how busy it was."""
    from tests.support import processes

    def run(child: str, count: int, devices: int) -> dict:
        said = processes.succeed(["-m", "benchmarks.tpu.scaling", "--child", child], count, devices, timeout=280)[0]
        return json.loads([line for line in said.splitlines() if line.startswith("{")][-1])  # gloo has its say there too

    found = run("devices", 1, 8)
    hosts = [run("hosts", 1, 2), run("hosts", 2, 1)]
    return {"bytes": found["bytes"], "steps": found["steps"], "hosts": hosts, "load": found["load"]}


def measured_text(found: dict) -> str:
    low, high = found["load"]
    return (
        f"Bytes summed in a step of av_mtl_s2s:\n\n{scaling_page.table(found['bytes'])}\n\n"
        f"A small network's step, 16 clips in all:\n\n{scaling_page.table(found['steps'])}\n\n"
        f"The same, one process and two:\n\n{scaling_page.table(found['hosts'])}\n\n"
        f"{len(os.sched_getaffinity(0))} cores; load average {low:.1f} before, {high:.1f} after."
    )


# ---- command -------------------------------------------------------------------------------------------------------------------


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="prints what is on paper and writes nothing")
    parser.add_argument("--json", action="store_true", help="prints all tables as one line and writes nothing")
    parser.add_argument("--measure", action="store_true", help="measures anew on CPU devices, into the page")
    parser.add_argument("--compile", action="store_true", help="asks the compiler anew, into the page; needs --cache")
    parser.add_argument("--cache", type=Path, help="folder that keeps what was compiled")
    parser.add_argument("--budget_s", type=float, default=86_400, help="with --compile: after which none is begun (default: a day)")
    parser.add_argument("--child", choices=("devices", "hosts"), help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if (args.compile or args.measure) and (args.json or args.markdown):
        parser.error("--compile, --measure: found --json or --markdown beside them, which write nothing; expected them alone")
    if (args.compile or args.one) and not args.cache:
        parser.error("--compile: expected --cache=DIR, where results are kept")
    if args.child:
        found = {"devices": child_devices, "hosts": child_hosts}[args.child]()
        print(json.dumps(found))
        return 0
    if args.one:
        system, topology, batch = args.one.split(",")
        text = args.cache / f"{args.one.replace(',', '-').replace(':', '_')}.hlo"
        print(json.dumps(compile_one(system, topology, int(batch), text)))
        return 0
    page = scaling_page.PAGE.read_text()
    if args.compile:
        args.cache.mkdir(parents=True, exist_ok=True)
        page = scaling_page.with_part(page, "compiled", scaling_page.table(compiled_rows(args.cache, args.budget_s)))
    if args.measure:
        page = scaling_page.with_part(page, "measured", measured_text(measured()))
    compiled = scaling_page.rows_of(scaling_page.part(page, "compiled"))
    if args.json:
        print(json.dumps({"compiled": compiled, "summary": scaling_paper.summary(compiled)} | scaling_paper.paper(compiled)))
    elif args.markdown:
        print(scaling_paper.paper_text(compiled))
    else:
        page = scaling_page.with_part(page, "summary", scaling_page.table(scaling_paper.summary(compiled)))
        scaling_page.PAGE.write_text(scaling_page.with_part(page, "paper", scaling_paper.paper_text(compiled)))
        print(scaling_page.PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
