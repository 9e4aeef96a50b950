"""Compiles the training step of every system for real TPUs with their own compiler, on a machine without TPUs.

    python -m benchmarks.tpu.tpu_compile --system=av_mtl_s2s --topology=v5e:2x4 [--batch_per_chip=32] [--lstm=joined] [--json]
    python -m benchmarks.tpu.tpu_compile --cache=DIR [--limit_s=900] [--budget_s=7200]

The second (`make tpu`) compiles every system, topology and LSTM implementation, and writes docs/tpu.md.

libtpu (extra `tpu`) contains the compiler. It gets the training step that avsi-train maps over all chips, with shapes in place of
data and parameters. Nothing is executed: bytes are what the program allocates, cycles are the compiler's estimate for each
operation times the trip counts of the enclosing loops. Each compilation has a process of its own; DIR caches results until the
program changes.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from avsi_jax import configs
from benchmarks.tpu import hlo_cost

if TYPE_CHECKING:
    import jax

    from avsi_jax.data import features

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tpu.md"
BEGIN, END = "<!-- begin: written by benchmarks/tpu/tpu_compile.py -->", "<!-- end of the written part -->"

# Settings that replace a TPU VM's metadata server, which libtpu would otherwise wait for.
LIBTPU_ENV = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TF_CPP_MIN_LOG_LEVEL": "3",
         "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip
# topology -> accelerator type for libtpu, clock in MHz, and options: a v4 chip's two cores are one device, as on a TPU VM; v6e is
# one host of 16 chips, since libtpu 0.0.42.1 fails for sums over several v6e hosts that do not exist.
# Clock: published bf16 peak / (2 x multipliers of the matrix units), from cloud.google.com/tpu/docs (v4: 275 TFLOP/s, 2 x 4 units
# of 128 x 128; v5e: 197, 4; v5p: 459, 2 x 4). For v4 this agrees with the 1050 MHz in Jouppi et al. 2023 (arXiv 2304.01433).
# v6e's published units and peak would give an implausible 3500 MHz, so it has none.
TOPOLOGIES = {
    "v5e:2x4": ("v5litepod-8", 1503, {}),
    "v4:2x2x4": ("v4-32", 1049, {"chip_config_name": "megacore"}),
    "v5p:2x2x2": ("v5p-16", 1751, {}),
    "v6e:4x4": ("v6e-16", None, {"chips_per_host_bounds": (4, 4, 1)}),
}
HEADLINE = "av_mtl_s2s"
NOT_YET = "not compiled yet"  # the time budget was used up
STEP_MODULES = """
presets data/grid_text audio/stft audio/gap_masks data/features data/augmentation data/input_pipeline models/lstm
models/systems models/losses models/ctc_decoding runtime/devices models/build training/objective
training/optimiser training/train_step
""".split()


# ---- one compilation -----------------------------------------------------------------------------------------------------------


def lower_step(config: ConfigDict, topology: str, batch_per_chip: int) -> tuple[jax.stages.Lowered, list]:
    """(lowered, devices): the training step over all chips of a topology, mapped as by avsi-train --parallel=shard_map.

    Not by jax.pmap: without a TPU it maps only over the first host's chips (4 of the 8 of v5e:2x4).
    """
    os.environ["TPU_ACCELERATOR_TYPE"], _, options = TOPOLOGIES[topology]
    import jax
    from jax.experimental import topologies

    from avsi_jax.runtime import devices as devices_lib
    from avsi_jax.training import train_step
    from avsi_jax.training.optimiser import make_optimiser

    devices = topologies.get_topology_desc(topology, platform="tpu", **options).devices
    optimiser = make_optimiser(config, 1000)
    step = train_step.make_train_step(config, optimiser, placeholder_normalisation(config))
    state = jax.eval_shape(lambda: train_step.init_state(config, 1000))
    batch = batch_shapes(len(devices) * batch_per_chip)
    return devices_lib.map_train_step(step, devices, "shard_map").lower(state, batch), devices


def batch_shapes(batch_size: int) -> dict:
    """Shapes of the arrays (B, ...) of a global batch."""
    import jax
    import numpy as np

    from avsi_jax.data import input_pipeline

    clip = {"id": "bbaf2n", "text": "bin blue at f two now", "words": [], "offset_s": 0, "frame_size": (720, 576), "fps": 25,
            "audio": np.zeros(48_000, np.int16), "landmarks": np.zeros((75, 68, 2), np.float32),
            "landmarks_valid": np.ones(75, bool)}  # fmt: skip
    arrays = {k: np.asarray(v) for k, v in input_pipeline.to_example(clip).items() if not isinstance(v, str)}
    return {k: jax.ShapeDtypeStruct((batch_size, *v.shape), v.dtype) for k, v in arrays.items()}


def placeholder_normalisation(config: ConfigDict) -> features.Normalisation:
    """Arbitrary statistics of the right sizes for the features that the config standardises."""
    import jax

    from avsi_jax.data import features
    from avsi_jax.models import build

    shapes = jax.eval_shape(lambda: build.example_features(config))
    sizes = {"level": shapes.spectrogram.shape[-1], "motion": shapes.video.shape[-1]}
    scale = lambda n: features.Scale(tuple(0.01 * i for i in range(n)), tuple(1 + 0.01 * i for i in range(n)))
    return features.Normalisation(**{k: scale(sizes[k]) for k in build.standardised(config)})


def measure(args: argparse.Namespace) -> dict:
    """The row of one compilation; cached in the folder args.programs by the lowered program."""
    overrides = [("lstm", args.lstm)] + ([(dtype_field() or "dtype", args.dtype)] if args.dtype else [])
    config = configs.load(args.system, overrides, like="base")
    lowered, devices = lower_step(config, args.topology, args.batch_per_chip)
    cached = args.programs / f"{program_key(lowered, args)}.json" if args.programs else None
    if cached and cached.is_file() and not args.keep_text:
        return json.loads(cached.read_text())
    row = compiled_row(args, config, lowered, devices)
    if cached:
        cached.write_text(json.dumps(row))
    return row


def compiled_row(args: argparse.Namespace, config: ConfigDict, lowered: jax.stages.Lowered, devices: list) -> dict:
    """Compiles a lowered step and returns its memory, costs and collectives."""
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list | tuple) else cost
    total = hlo_cost.tally(hlo_cost.parse(text := compiled.as_text()))
    if args.keep_text:
        Path(args.keep_text).write_text(text)
    clock = TOPOLOGIES[args.topology][1]
    row = {
        "system": args.system,
        "topology": args.topology,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "batch_per_chip": args.batch_per_chip,
        "lstm": args.lstm,
        "dtype": args.dtype or "as the config",
        "parameters": _parameters(config),
        "bytes_per_chip": memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "collectives": sum(total[k] for k in hlo_cost.COLLECTIVES),
        "collectives_by_kind": " ".join(f"{k}:{total[k]}" for k in hlo_cost.COLLECTIVES if total[k]),
        "collective_bytes": sum(total[f"{k} bytes"] for k in hlo_cost.COLLECTIVES),
        "estimated_cycles": total["cycles"],
        "estimated_loop_cycles": total["loop_cycles"],
        "loops": " ".join(f"{n}x{k.removeprefix('loops of ')}" for k, n in sorted(total.items()) if k.startswith("loops of ")),
        "unknown_loops": total["unknown_loops"],
        "unpriced": total["unpriced"],
        "compile_s": round(seconds, 1),
    }  # fmt: skip
    if clock:
        row["estimated_ms"] = round(total["cycles"] / clock / 1e3, 3)
    if cost and cost.get("flops", 0) > 0:
        row["flops"] = cost["flops"]
    return row


def _parameters(config: ConfigDict) -> int:
    from avsi_jax.models import build

    return build.parameter_count(config)


# ---- all compilations ----------------------------------------------------------------------------------------------------------


def systems() -> list[str]:
    """The configs whose name is that of their system."""
    names = []
    for name in configs.names():
        try:
            if configs.load(name, like="base").system == name:
                names.append(name)
        except configs.ConfigError:
            continue
    return names


def lstm_options() -> list[dict]:
    """Options for the LSTM of one system: every scan implementation, 32 and 256 clips per chip, and bfloat16."""
    from avsi_jax.models import lstm

    kinds = [{"lstm": name} for name in lstm.IMPLEMENTATIONS if name not in ("auto", "cudnn")]
    if dtype_field():
        kinds += [{"lstm": "joined", "dtype": "bfloat16"}]
    return [kind | {"batch_per_chip": batch} for batch in (32, 256) for kind in kinds]


def dtype_field() -> str:
    """The config field for the type of the LSTM's products; '' where there is none."""
    return next((f for f in configs.fields(configs.load("base")) if f in ("dtype", "lstm_dtype")), "")


def versions() -> list[str]:
    """Versions of the packages that determine the compiled program."""
    return [f"{p} {importlib.metadata.version(p)}" for p in ("jax", "jaxlib", "flax", "optax", "libtpu")]


def program_key(lowered: jax.stages.Lowered, args: argparse.Namespace) -> str:
    """A hash of the lowered program and of the options in its row. Code that lowers to the same program has the same key."""
    options = [args.system, args.topology, str(args.batch_per_chip), args.lstm, args.dtype, *versions(), lowered.as_text()]
    reader = [ast.unparse(ast.parse(Path(f).read_text())) for f in (hlo_cost.__file__,)]
    return "program-" + hashlib.sha256("\n".join(options + reader).encode()).hexdigest()[:32]


def code_key(system: str, command: list[str]) -> str:
    """A hash of the code, without comments, and of the config that the compiled program is made from."""
    files = [ROOT / "avsi_jax" / f"{module}.py" for module in STEP_MODULES] + [Path(__file__), Path(hlo_cost.__file__)]
    code = [ast.unparse(ast.parse(f.read_text())) for f in files] + [configs.load(system, like="base").to_json()]
    return hashlib.sha256("\n".join([*command, *versions(), *code]).encode()).hexdigest()[:32]


def row_of(cache: Path, limit_s: float, until: float, **options: str | int) -> dict:
    """The row of one compilation, from the cache or a child process. A failure is a row with its reason, and is not cached."""
    command = [f"--{k}={v}" for k, v in options.items()]
    cached = cache / f"{code_key(options['system'], command)}.json"
    if cached.is_file():
        return json.loads(cached.read_text())
    if time.monotonic() > until:
        return options | {"failed": NOT_YET}
    print(*command, end=": ", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        child = [sys.executable, "-m", "benchmarks.tpu.tpu_compile", *command, f"--programs={cache}", "--json"]
        done = subprocess.run(child, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        row = options | {"failed": f"not done after {limit_s:.0f} s"}
    else:
        if done.returncode:
            row = options | {"failed": reason(done.stderr) or f"exit status {done.returncode}"}
        else:
            row = json.loads(done.stdout.splitlines()[-1])
            cached.write_text(json.dumps(row))
    print(row.get("failed", "done"), f"({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    return row


def reason(stderr: str) -> str:
    """The compiler's last message before it aborted the process (a fatal line of its log), else the last line."""
    fatal = re.search(r"^F\d{4} .*?\] (.*)$", stderr, re.M)
    return (fatal.group(1) if fatal else (stderr.strip().splitlines() or [""])[-1])[:200]


def write_page(cache: Path, limit_s: float, budget_s: float, chosen: list[str]) -> int:
    """Writes docs/tpu.md between its marks; returns the number of failed compilations. The first topology is compiled first."""
    cache.mkdir(parents=True, exist_ok=True)
    first, *others = TOPOLOGIES
    compile_with = functools.partial(row_of, cache, limit_s, time.monotonic() + budget_s)
    system = lambda name, topology: compile_with(system=name, topology=topology, lstm="joined", batch_per_chip=32)
    rows = {(s, first): system(s, first) for s in [HEADLINE, *chosen]}
    of_lstms = [compile_with(system=HEADLINE, topology=first, **options) for options in lstm_options()]
    rows |= {(s, t): system(s, t) for t in others for s in [HEADLINE, *chosen]}
    of_systems = [rows[s, t] for s in chosen for t in TOPOLOGIES]
    compiler = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "libtpu"))
    later = sum(row.get("failed") == NOT_YET for row in of_lstms + of_systems)
    lines = [BEGIN, f"\nCompiled with {compiler}." + f" {later} more are not compiled yet." * bool(later) + "\n"]
    lines += ["## Every system, 32 clips per chip, `lstm=joined`\n", *table(of_systems, ["system", "topology"])]
    lines += [f"\n## LSTM implementations: {HEADLINE} on {first}\n", *table(of_lstms, ["lstm", "dtype", "batch_per_chip"])]
    lines += ["", END]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + "\n".join(lines) + rest.partition(END)[2])
    print(PAGE)
    return sum("failed" in row for row in of_lstms + of_systems)


def table(rows: list[dict], keys: list[str]) -> list[str]:
    """Markdown lines, one row per compilation."""
    heads = [*(k.replace("_", " ") for k in keys), "chips", "MB per chip", "all-reduces", "MB reduced", "k cycles",
             "in loops", "ms", "us per clip and chip", "loops", "unpriced", "compiled in s"]  # fmt: skip
    out = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(keys) + "---:|" * (len(heads) - len(keys))]
    for r in rows:
        if r.get("failed") == NOT_YET:
            continue
        cells = [r.get(k, "as the config") for k in keys]
        if "failed" in r:
            cells += [f"failed: {r['failed']}"] + [""] * (len(heads) - len(keys) - 1)
        else:
            ms = r.get("estimated_ms")
            cells += [
                r["devices"], f"{r['bytes_per_chip'] / 1e6:.0f}", r["collectives"], f"{r['collective_bytes'] / 1e6:.1f}",
                f"{r['estimated_cycles'] / 1e3:,.0f}", f"{r['estimated_loop_cycles'] / max(1, r['estimated_cycles']):.0%}",
                "" if ms is None else f"{ms:.2f}", "" if ms is None else f"{ms * 1e3 / r['batch_per_chip']:.0f}",
                r["loops"] + (f" +{r['unknown_loops']} unknown" if r["unknown_loops"] else ""), r["unpriced"],
                f"{r['compile_s']:.0f}",
            ]  # fmt: skip
        out.append("| " + " | ".join(map(str, cells)) + " |")
    return out


def main(argv: list[str] | None = None) -> int:
    """The command `python -m benchmarks.tpu.tpu_compile`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", help="compile one system: the name of a config that trains")
    parser.add_argument("--topology", default="v5e:2x4", choices=TOPOLOGIES, help="default: %(default)s")
    parser.add_argument("--batch_per_chip", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--lstm", default="joined", help="config.lstm; auto would depend on this machine (default: %(default)s)")
    parser.add_argument("--dtype", default="", help="type of the LSTM's products (default: the config's)")
    parser.add_argument("--json", action="store_true", help="print only the row, as one line")
    parser.add_argument("--programs", type=Path, help="with --system: folder that caches rows by the lowered program")
    parser.add_argument("--keep_text", metavar="FILE", help="write the compiled program's text to this file")
    parser.add_argument("--cache", type=Path, help="compile everything, cache results in this folder, and write docs/tpu.md")
    parser.add_argument("--only", default="", help="with --cache: systems, separated by commas (default: all)")
    parser.add_argument("--limit_s", type=float, default=900, help="time limit of one compilation (default: %(default)s)")
    parser.add_argument("--budget_s", type=float, default=86_400, help="start no compilation later (default: %(default)s)")
    args = parser.parse_args(argv)
    if (args.system is None) == (args.cache is None):
        parser.error("expected either --system (one compilation) or --cache (all)")
    os.environ.update(LIBTPU_ENV)
    try:
        if args.cache:
            chosen = args.only.split(",") if args.only else systems()
            return int(write_page(args.cache, args.limit_s, args.budget_s, chosen) > 0)
        row = measure(args)
    except (configs.ConfigError, importlib.metadata.PackageNotFoundError, RuntimeError, ValueError) as error:
        print(f"tpu_compile: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if not args.json:
        print(*(f"{k:24}{v}" for k, v in row.items()), sep="\n")
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
