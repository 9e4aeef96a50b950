"""The training step of every system, compiled for real TPUs by their own compiler, on a machine that has none.

    python -m benchmarks.tpu.tpu_compile --system=av_mtl_s2s --topology=v5e:2x4 [--batch_per_chip=32] [--lstm=joined] [--json]
    python -m benchmarks.tpu.tpu_compile --cache=DIR [--limit_s=900] [--budget_s=7200]

The second (`make tpu`) compiles every system, topology and way, and writes docs/tpu.md.

libtpu (extra `tpu`) holds the compiler; it is given the step that avsi-train maps over all chips, and shapes in place of data and
parameters. Nothing runs: bytes are what the program asks for, cycles are the compiler's own guess for each operation, times the
trips of the loops around it. Each compilation has a process of its own; DIR keeps what came out until the program changes.
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

from avsi_jax import configs
from benchmarks.tpu import compiled_text

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tpu.md"
BEGIN, END = "<!-- from here on: written by benchmarks/tpu/tpu_compile.py -->", "<!-- up to here -->"

# What libtpu is told in place of a TPU VM's metadata server, which it would wait for.
ALONE = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TF_CPP_MIN_LOG_LEVEL": "3",
         "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip
# topology -> accelerator type for libtpu, the clock in MHz, and options: a v4 chip's two cores are one device, as on a TPU VM; v6e
# is one host of 16 chips, since libtpu 0.0.42.1 fails at sums over several v6e hosts that are not there.
# Clock: published bf16 peak / (2 x multipliers of the matrix units), by cloud.google.com/tpu/docs (v4: 275 TFLOP/s, 2 x 4 units of
# 128 x 128; v5e: 197, 4; v5p: 459, 2 x 4). For v4 that is the clock which Jouppi et al. 2023 (arXiv 2304.01433) publish, 1050 MHz.
# v6e's published units and peak would give 3500: not believed.
TOPOLOGIES = {
    "v5e:2x4": ("v5litepod-8", 1503, {}),
    "v4:2x2x4": ("v4-32", 1049, {"chip_config_name": "megacore"}),
    "v5p:2x2x2": ("v5p-16", 1751, {}),
    "v6e:4x4": ("v6e-16", None, {"chips_per_host_bounds": (4, 4, 1)}),
}
HEADLINE = "av_mtl_s2s"
NOT_YET = "not compiled yet"  # time was up
STEP_MODULES = """presets data/grid_text audio/stft audio/gap_masks data/features data/augmentation data/input_pipeline
models/lstm models/systems models/losses models/ctc_decoding runtime/devices models/build training/objective training/train_step""".split()


# ---- one compilation -----------------------------------------------------------------------------------------------------------


def lower_step(config, topology: str, batch_per_chip: int):
    """The step over all chips of a topology, as avsi-train --parallel=shard_map maps it: (lowered, devices). Only shapes are made.

    Not by jax.pmap: where no TPU is, that maps over the first host's chips alone (4 of v5e:2x4's 8).
    """
    os.environ["TPU_ACCELERATOR_TYPE"], _, options = TOPOLOGIES[topology]
    import jax
    from jax.experimental import topologies

    from avsi_jax.runtime import devices as devices_lib
    from avsi_jax.training import objective, train_step

    devices = topologies.get_topology_desc(topology, platform="tpu", **options).devices
    optimiser = objective.make_optimiser(config, 1000)
    step = train_step.make_train_step(config, optimiser, made_up_normalisation(config))
    state = jax.eval_shape(lambda: train_step.init_state(config, 1000))
    batch = batch_shapes(len(devices) * batch_per_chip)
    return devices_lib.map_train_step(step, devices, "shard_map").lower(state, batch), devices


def batch_shapes(batch_size: int) -> dict:
    """Shapes of a global batch's arrays, (B, ...) each."""
    import jax
    import numpy as np

    from avsi_jax.data import input_pipeline

    clip = {"id": "bbaf2n", "text": "bin blue at f two now", "words": [], "offset_s": 0, "frame_size": (720, 576), "fps": 25,
            "audio": np.zeros(48_000, np.int16), "landmarks": np.zeros((75, 68, 2), np.float32),
            "landmarks_valid": np.ones(75, bool)}  # fmt: skip
    arrays = {k: np.asarray(v) for k, v in input_pipeline.to_example(clip).items() if not isinstance(v, str)}
    return {k: jax.ShapeDtypeStruct((batch_size, *v.shape), v.dtype) for k, v in arrays.items()}


def made_up_normalisation(config):
    """Statistics of the right sizes for what the config standardises."""
    import jax

    from avsi_jax.data import features
    from avsi_jax.models import build

    shapes = jax.eval_shape(lambda: build.example_features(config))
    sizes = {"level": shapes.spectrogram.shape[-1], "motion": shapes.video.shape[-1]}
    scale = lambda n: features.Scale(tuple(0.01 * i for i in range(n)), tuple(1 + 0.01 * i for i in range(n)))
    return features.Normalisation(**{k: scale(sizes[k]) for k in build.standardised(config)})


def measure(args) -> dict:
    """One compilation -> its row; kept in args.programs by what was to be compiled, and taken from there."""
    wanted = [("lstm", args.lstm)] + ([(dtype_field() or "dtype", args.dtype)] if args.dtype else [])
    config = configs.load(args.system, wanted, like="base")
    lowered, devices = lower_step(config, args.topology, args.batch_per_chip)
    kept = args.programs / f"{program_key(lowered, args)}.json" if args.programs else None
    if kept and kept.is_file() and not args.keep_text:
        return json.loads(kept.read_text())
    row = compiled_row(args, config, lowered, devices)
    if kept:
        kept.write_text(json.dumps(row))
    return row


def compiled_row(args, config, lowered, devices) -> dict:
    """What the compiler says of a lowered step."""
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list | tuple) else cost
    total = compiled_text.tally(compiled_text.parse(text := compiled.as_text()))
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
        "collectives": sum(total[k] for k in compiled_text.COLLECTIVES),
        "collectives_by_kind": " ".join(f"{k}:{total[k]}" for k in compiled_text.COLLECTIVES if total[k]),
        "collective_bytes": sum(total[f"{k} bytes"] for k in compiled_text.COLLECTIVES),
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


def _parameters(config) -> int:
    from avsi_jax.models import build

    return build.count_of(config)


# ---- all of them ---------------------------------------------------------------------------------------------------------------


def systems() -> list[str]:
    """The configs that are a system's own: they train, and bear its name."""
    found = []
    for name in configs.names():
        try:
            if configs.load(name, like="base").system == name:
                found.append(name)
        except configs.ConfigError:
            continue
    return found


def ways() -> list[dict]:
    """The ways to run one system's LSTM on the first topology: every scan there is, 32 and 256 clips a chip, bfloat16 if there."""
    from avsi_jax.models import lstm

    kinds = [{"lstm": way} for way in lstm.WAYS if way not in ("auto", "cudnn")]
    if dtype_field():
        kinds += [{"lstm": "joined", "dtype": "bfloat16"}]
    return [kind | {"batch_per_chip": batch} for batch in (32, 256) for kind in kinds]


def dtype_field() -> str:
    """The config's field for the type of the LSTM's products, '' where it has none."""
    return next((f for f in configs.fields(configs.load("base")) if f in ("dtype", "lstm_dtype")), "")


def versions() -> list[str]:
    """Of what the compiled program comes from."""
    return [f"{p} {importlib.metadata.version(p)}" for p in ("jax", "jaxlib", "flax", "optax", "libtpu")]


def program_key(lowered, args) -> str:
    """Changes with the program that is to be compiled, and with what a row says beside it; another spelling of the same program
    keeps it.
    """
    said = [args.system, args.topology, str(args.batch_per_chip), args.lstm, args.dtype, *versions(), lowered.as_text()]
    reader = [ast.unparse(ast.parse(Path(f).read_text())) for f in (compiled_text.__file__,)]
    return "program-" + hashlib.sha256("\n".join(said + reader).encode()).hexdigest()[:32]


def code_key(system: str, command: list[str]) -> str:
    """Changes with whatever the compiled program is made from, comments left aside."""
    files = [ROOT / "avsi_jax" / f"{module}.py" for module in STEP_MODULES] + [Path(__file__), Path(compiled_text.__file__)]
    code = [ast.unparse(ast.parse(f.read_text())) for f in files] + [configs.load(system, like="base").to_json()]
    return hashlib.sha256("\n".join([*command, *versions(), *code]).encode()).hexdigest()[:32]


def row_of(cache: Path, limit_s: float, until: float, **wanted) -> dict:
    """One compilation's row: from the cache, else by a child; a failure is a row with its reason, and tried again next time."""
    command = [f"--{k}={v}" for k, v in wanted.items()]
    kept = cache / f"{code_key(wanted['system'], command)}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    if time.monotonic() > until:
        return wanted | {"failed": NOT_YET}
    print(*command, end=": ", file=sys.stderr, flush=True)
    began = time.perf_counter()
    try:
        child = [sys.executable, "-m", "benchmarks.tpu.tpu_compile", *command, f"--programs={cache}", "--json"]
        done = subprocess.run(child, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        row = wanted | {"failed": f"not done after {limit_s:.0f} s"}
    else:
        if done.returncode:
            row = wanted | {"failed": reason(done.stderr) or f"exit status {done.returncode}"}
        else:
            row = json.loads(done.stdout.splitlines()[-1])
            kept.write_text(json.dumps(row))
    print(row.get("failed", "done"), f"({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
    return row


def reason(stderr: str) -> str:
    """What the compiler said before it aborted the process (a fatal line of its log), else the last line of all."""
    fatal = re.search(r"^F\d{4} .*?\] (.*)$", stderr, re.M)
    return (fatal.group(1) if fatal else (stderr.strip().splitlines() or [""])[-1])[:200]


def write_page(cache: Path, limit_s: float, budget_s: float, chosen: list[str]) -> int:
    """docs/tpu.md anew between its marks; returns how many compilations failed. The first topology comes first: time may end."""
    cache.mkdir(parents=True, exist_ok=True)
    first, *others = TOPOLOGIES
    ask = functools.partial(row_of, cache, limit_s, time.monotonic() + budget_s)
    system = lambda name, topology: ask(system=name, topology=topology, lstm="joined", batch_per_chip=32)
    rows = {(s, first): system(s, first) for s in [HEADLINE, *chosen]}
    of_ways = [ask(system=HEADLINE, topology=first, **way) for way in ways()]
    rows |= {(s, t): system(s, t) for t in others for s in [HEADLINE, *chosen]}
    of_systems = [rows[s, t] for s in chosen for t in TOPOLOGIES]
    compiler = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "libtpu"))
    later = sum(row.get("failed") == NOT_YET for row in of_ways + of_systems)
    lines = [BEGIN, f"\nCompiled with {compiler}." + f" {later} more are not compiled yet." * bool(later) + "\n"]
    lines += ["## Every system, 32 clips a chip, `lstm=joined`\n", *table(of_systems, ["system", "topology"])]
    lines += [f"\n## The ways to run the LSTM: {HEADLINE} on {first}\n", *table(of_ways, ["lstm", "dtype", "batch_per_chip"])]
    lines += ["", END]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + "\n".join(lines) + rest.partition(END)[2])
    print(PAGE)
    return sum("failed" in row for row in of_ways + of_systems)


def table(rows: list[dict], keys: list[str]) -> list[str]:
    """Markdown lines, one row a compilation."""
    heads = [*(k.replace("_", " ") for k in keys), "chips", "MB a chip", "all-reduces", "MB reduced", "k cycles",
             "of them in loops", "ms", "us a clip and chip", "loops", "unpriced", "compiled in s"]  # fmt: skip
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


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", help="compile one: the name of a config that trains")
    parser.add_argument("--topology", default="v5e:2x4", choices=TOPOLOGIES, help="default: %(default)s")
    parser.add_argument("--batch_per_chip", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--lstm", default="joined", help="config.lstm; auto would ask this machine's CPU (default: %(default)s)")
    parser.add_argument("--dtype", default="", help="of the LSTM's products, where configs have a field for it (default: theirs)")
    parser.add_argument("--json", action="store_true", help="only the row, as one line")
    parser.add_argument("--programs", type=Path, help="one compilation: keep its row in this folder, by the lowered program")
    parser.add_argument("--keep_text", metavar="FILE", help="writes the compiled program's text there")
    parser.add_argument("--cache", type=Path, help="compile everything, keeping results in this folder, and write docs/tpu.md")
    parser.add_argument("--only", default="", help="with --cache: systems, separated by commas (default: all)")
    parser.add_argument("--limit_s", type=float, default=900, help="of one compilation (default: %(default)s)")
    parser.add_argument("--budget_s", type=float, default=86_400, help="after which no further one is begun (default: %(default)s)")
    args = parser.parse_args(argv)
    if (args.system is None) == (args.cache is None):
        parser.error("expected either --system (one compilation) or --cache (all of them)")
    os.environ.update(ALONE)
    try:
        if args.cache:
            chosen = args.only.split(",") if args.only else systems()
            return int(write_page(args.cache, args.limit_s, args.budget_s, chosen) > 0)
        row = measure(args)
    except (configs.ConfigError, importlib.metadata.PackageNotFoundError, RuntimeError, ValueError) as error:
        print(f"benchmarks/tpu/tpu_compile.py: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if not args.json:
        print(*(f"{k:24}{v}" for k, v in row.items()), sep="\n")
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
