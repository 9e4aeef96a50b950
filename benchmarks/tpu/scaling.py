"""Estimates how the cost of a training step grows with devices and hosts: measured on CPUs, compiled for TPUs, and calculated.

    python -m benchmarks.tpu.scaling                     # docs/scaling.md: recalculates its tables from the stored ones
    python -m benchmarks.tpu.scaling --json              # prints the same numbers as one line
    python -m benchmarks.tpu.scaling --measure           # updates the measured tables: 8 CPU devices, then two processes; minutes
    python -m benchmarks.tpu.scaling --compile --cache=DIR      # updates the compiled table (needs the extra `tpu`)

docs/scaling.md stores what was measured and compiled (scaling_page.py); the calculations are in scaling_estimates.py.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.tpu import hlo_cost, scaling_estimates, scaling_page, tpu_compile

if TYPE_CHECKING:
    from avsi_jax.training.train_step import TrainState

# ---- the compiler --------------------------------------------------------------------------------------------------------------

SLICES = {"v5e:4x4": "v5litepod-16", "v5e:4x8": "v5litepod-32", "v5e:16x16": "v5litepod-256"}
COMPILATIONS = [  # system, topology, clips per chip
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


def all_reduces(text: str) -> list[dict]:
    """The sums over devices in a compiled program's text: number of arrays, bytes and devices of each."""
    program, sums = hlo_cost.parse(text), []
    for computation in program.computations.values():
        for name, instruction in computation.items():
            if name == "ROOT" or instruction.op not in ("all-reduce", "all-reduce-start"):
                continue
            groups = re.search(r"replica_groups=\{\{([\d,]*)\}|replica_groups=\[\d+,(\d+)\]", instruction.after)
            devices = 0 if not groups else int(groups[2]) if groups[2] else len(groups[1].split(","))
            sizes = [hlo_cost.size_bytes(computation[o].shape) for o in instruction.operands]
            sums.append({"arrays": len(sizes), "bytes": sum(sizes), "devices": devices})
    return sums


def compile_one(system: str, topology: str, batch_per_chip: int, text: Path) -> dict:
    """Compiles one training step in this process, which should do nothing else; writes the program's text to `text`."""
    os.environ.update(tpu_compile.LIBTPU_ENV)
    clock = tpu_compile.TOPOLOGIES["v5e:2x4"][1]
    tpu_compile.TOPOLOGIES |= {name: (kind, clock, {}) for name, kind in SLICES.items()}
    args = argparse.Namespace(
        system=system, topology=topology, batch_per_chip=batch_per_chip, lstm="joined", dtype="", keep_text=text, programs=None
    )
    return tpu_compile.measure(args) | {"sums": all_reduces(text.read_text())}


def compiled_rows(cache: Path, budget_s: float) -> list[dict]:
    """Rows of COMPILATIONS; failures, and those that would start after `budget_s`, are reported on stderr and left out."""
    rows, start = [], time.monotonic()
    for job in COMPILATIONS:
        cached = cache / f"{'-'.join(map(str, job)).replace(':', '_')}.json"
        if not cached.is_file() and time.monotonic() - start >= budget_s:
            print(*job, "not compiled yet", file=sys.stderr)
            continue
        if not cached.is_file():
            command = [sys.executable, "-m", "benchmarks.tpu.scaling", "--one", ",".join(map(str, job)), "--cache", str(cache)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(*job, tpu_compile.reason(done.stderr), file=sys.stderr)
                continue
            cached.write_text(done.stdout.splitlines()[-1])
        rows.append(compiled_row(json.loads(cached.read_text())))
    return rows


def compiled_row(r: dict) -> dict:
    """The table row of a compilation."""
    loops = r["estimated_loop_cycles"]
    return {
        "system": r["system"],
        "topology": r["topology"],
        "chips": r["devices"],
        "clips per chip": r["batch_per_chip"],
        "global batch": r["devices"] * r["batch_per_chip"],
        "MB per chip": round(r["bytes_per_chip"] / 1e6),
        "all-reduces": r["collectives"],
        "arrays in each": " + ".join(str(s["arrays"]) for s in r["sums"]),
        "MB reduced": f"{r['collective_bytes'] / 1e6:.2f}",
        "k cycles in loops": round(loops / 1e3),
        "k cycles outside": round((r["estimated_cycles"] - loops) / 1e3),
        "ms": f"{r['estimated_ms']:.1f}",
        "compiled in s": round(r["compile_s"]),
    }


# ---- measured ------------------------------------------------------------------------------------------------------------------

SMALL = {"system": "a_si", "units": "32", "layers": "1", "lstm": "separate", "batch_size": "16"}  # changes to config tiny
ROUNDS = 25


def alternate(tasks: dict, rounds: int = ROUNDS) -> dict:
    """{name: median ms}: each task once as warm-up, then all of them in turn, waiting for each."""
    import jax

    times = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            jax.block_until_ready(task())
            times[name] += [1e3 * (time.perf_counter() - start)] * (turn > 0)
    return {name: statistics.median(ms) for name, ms in times.items()}


def small_step() -> tuple[Callable, TrainState, dict]:
    """(unmapped training step, its state, a batch of 16 clips of noise)."""
    from avsi_jax import configs
    from avsi_jax.training import train_step
    from avsi_jax.training.optimiser import make_optimiser
    from benchmarks.speed import contenders

    config = configs.load("tiny", list(SMALL.items()))
    return (
        train_step.make_train_step(config, make_optimiser(config, 1)),
        train_step.init_state(config, 1),
        contenders.raw_batch(16),
    )


def stepper(step: Callable, state: TrainState, batch: dict, how: str, devices: Sequence | None = None) -> Callable:
    """A function that does one training step from arrays on the host; how: parallel mode, '' for none."""
    import jax

    from avsi_jax.runtime import devices as devices_lib

    mapped = devices_lib.map_train_step(step, devices, how) if how else jax.jit(step, donate_argnums=0)
    box = [devices_lib.replicate(jax.device_get(state), how, devices) if how else jax.device_put(jax.device_get(state), devices[0])]

    def once():
        box[0], metrics = mapped(box[0], devices_lib.split(batch, how, devices) if how else batch)
        return box[0], metrics

    return once


def summer(size: int, how: str, devices: Sequence | None = None) -> Callable:
    """A function that sums an array of `size` bytes over devices."""
    import numpy as np

    from avsi_jax.runtime import devices as devices_lib

    sum_step = lambda x, b: devices_lib.sum_over_devices(x * b["x"].max())
    mapped = devices_lib.map_evaluation_step(sum_step, parallel=how, devices=devices)
    x = devices_lib.replicate(np.ones(size // 4, np.float32), how, devices)
    ones = np.ones(len(devices) if devices else devices_lib.jax.local_device_count(), np.float32)
    return lambda: mapped(x, devices_lib.split({"x": ones}, how, devices))


def child_devices() -> dict:
    """Measures one process with 8 CPU devices."""
    import jax

    from avsi_jax import configs
    from avsi_jax.models import build
    from avsi_jax.runtime import devices
    from avsi_jax.training import train_step
    from avsi_jax.training.optimiser import make_optimiser
    from benchmarks.speed import contenders

    load = os.getloadavg()[0]
    step, state, batch = small_step()
    batch = {k: v for k, v in batch.items() if k != "clip_id"}
    counts = (1, 2, 4, 8)
    some = lambda n: jax.devices()[:n]
    tasks = {("", 1): stepper(step, state, batch, "", some(1))}
    tasks |= {(how, n): stepper(step, state, batch, how, some(n)) for n in counts for how in devices.PARALLEL_MODES}
    ms = alternate(tasks)
    sums = alternate({n: summer(32_595_236, "shard_map", some(n)) for n in counts}, 9)
    many = {k: v for k, v in contenders.raw_batch(256).items() if k != "clip_id"}
    split = lambda n, how: lambda: devices.split(many, how, some(n))
    splits = alternate({(how, n): split(n, how) for n in counts for how in devices.PARALLEL_MODES})
    config = configs.load("av_mtl_s2s", [("lstm", "separate")], like="base")
    full_step = train_step.make_train_step(config, make_optimiser(config, 1))
    shapes = jax.eval_shape(lambda: train_step.init_state(config, 1))
    all_sums = {}
    for how, n in (("pmap", 1), ("pmap", 2), ("pmap", 8), ("shard_map", 8)):
        given = {k: v[:8] for k, v in many.items()}
        given = {k: v.reshape(n, -1, *v.shape[1:]) for k, v in given.items()} if how == "pmap" else given
        compiled = devices.map_train_step(full_step, some(n), how).lower(shapes, given).compile()
        all_sums[how, n] = all_reduces(compiled.as_text())
    parameters = build.parameter_count(config)
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
                "all-reduces": len(sums_of_step),
                "of more than 100 bytes": sum(s["bytes"] > 100 for s in sums_of_step),
                "arrays": sum(s["arrays"] for s in sums_of_step),
                "bytes": sum(s["bytes"] for s in sums_of_step),
                "4 x parameters": 4 * parameters,
            }
            for (how, n), sums_of_step in all_sums.items()
        ],
        "load": [load, os.getloadavg()[0]],
    }


def child_hosts() -> dict:
    """Measures one of several processes, or a single one, with the same number of devices in all; 16 clips in all."""
    from avsi_jax.runtime import distributed

    distributed.start("auto", timeout_s=60)
    import jax

    from avsi_jax.runtime import devices

    step, state, batch = small_step()
    rows = 16 // jax.process_count()
    batch = {k: v[:rows] for k, v in batch.items() if k != "clip_id"}
    tasks = {how: stepper(step, state, batch, how) for how in devices.PARALLEL_MODES}
    tasks |= {
        "33 MB summed": summer(32_595_236, "shard_map"),
        "agree": lambda: devices.sum_flags([0, 0, 0]),
        "sum_over_processes": lambda: devices.sum_over_processes([1.0] * 10),
    }
    ms = {f"{k}, ms": v for k, v in alternate(tasks).items()}
    result = {"processes": jax.process_count(), "devices": jax.device_count()} | ms
    print(json.dumps(result), flush=True)
    distributed.leave(0)
    return result


def measured() -> dict:
    """Measures this machine: rows of each table, and its load average."""
    from tests.support import processes

    def run(child: str, count: int, devices: int) -> dict:
        output = processes.succeed(["-m", "benchmarks.tpu.scaling", "--child", child], count, devices, timeout=280)[0]
        return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])  # gloo prints lines too

    result = run("devices", 1, 8)
    hosts = [run("hosts", 1, 2), run("hosts", 2, 1)]
    return {"bytes": result["bytes"], "steps": result["steps"], "hosts": hosts, "load": result["load"]}


def measured_text(result: dict) -> str:
    """The measured tables as Markdown."""
    low, high = result["load"]
    return (
        f"Bytes summed in a training step of av_mtl_s2s:\n\n{scaling_page.table(result['bytes'])}\n\n"
        f"The training step of a small network, 16 clips in all:\n\n{scaling_page.table(result['steps'])}\n\n"
        f"The same with one process and with two:\n\n{scaling_page.table(result['hosts'])}\n\n"
        f"{len(os.sched_getaffinity(0))} cores; load average {low:.1f} before, {high:.1f} after."
    )


# ---- command -------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command `python -m benchmarks.tpu.scaling`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print the calculated tables and write nothing")
    parser.add_argument("--json", action="store_true", help="print all tables as one line and write nothing")
    parser.add_argument("--measure", action="store_true", help="measure on CPU devices and update the page")
    parser.add_argument("--compile", action="store_true", help="compile for TPUs and update the page; needs --cache")
    parser.add_argument("--cache", type=Path, help="folder that keeps compilation results")
    parser.add_argument("--budget_s", type=float, default=86_400, help="with --compile: start none later (default: a day)")
    parser.add_argument("--child", choices=("devices", "hosts"), help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if (args.compile or args.measure) and (args.json or args.markdown):
        parser.error("--compile and --measure write the page, --json and --markdown do not: expected only one kind")
    if (args.compile or args.one) and not args.cache:
        parser.error("--compile needs --cache=DIR, the folder that keeps results")
    if args.child:
        result = {"devices": child_devices, "hosts": child_hosts}[args.child]()
        print(json.dumps(result))
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
        print(
            json.dumps({"compiled": compiled, "summary": scaling_estimates.summary(compiled)} | scaling_estimates.tables(compiled))
        )
    elif args.markdown:
        print(scaling_estimates.as_text(compiled))
    else:
        page = scaling_page.with_part(page, "summary", scaling_page.table(scaling_estimates.summary(compiled)))
        scaling_page.PAGE.write_text(scaling_page.with_part(page, "estimates", scaling_estimates.as_text(compiled)))
        print(scaling_page.PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
