"""Compares the training step of av_mtl_s2s with the same work in PyTorch, with flax's own cells, and in Keras on JAX.

    make bench                                       # makes .venv-bench, with torch and keras, and runs this
    python -m benchmarks.speed.train_step [--json] [--batch_size 32] [--rounds 9] [--lstm auto] [--dtype float32] [--only NAME...]

The work: batch 32, 149 time steps of given features, the complete network, MSE + 0.001 CTC, gradients clipped at norm 1, Adam. Ours
is the training step that avsi-train maps over its devices (on a CPU one per core); `from_raw` also computes the features from audio
and landmarks. Every contender has a process of its own, and they alternate; medians are reported. --sweep, on a GPU: batches of 32,
256 and 1024, float32, TF32 and bfloat16, the scan and cuDNN; with --profile=DIR one step of each is traced and its most expensive
kernels are fields. The last line of --json is one flat object. Without torch or keras their fields are absent, and a line says so.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.speed.contenders import CONTENDERS, gflop

PACKAGES = {"ours": "jax", "torch": "torch", "flax": "flax", "flax_optimized": "flax", "keras": "keras"}
SWEEP = [(batch, kind) for batch in (32, 256, 1024) for kind in ("float32", "tf32", "bfloat16")]


# ---- processes -----------------------------------------------------------------------------------------------------------------


def serve(args: argparse.Namespace) -> int:
    """A contender's process: reads one task per line ('step'), answers with a line of JSON that starts with @."""
    answer = lambda fields: print("@" + json.dumps(fields), flush=True)
    tasks, facts = CONTENDERS[args.child](args)
    answer(facts | {"tasks": list(tasks)})
    for line in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        value = tasks[line.strip()]()
        answer({"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu,
                "value": value if isinstance(value, float | str) else None,
                "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})  # fmt: skip
    return 0


class Contender:
    """A contender's process, and the times that it took."""

    def __init__(self, name: str, args: argparse.Namespace, label: str = "", short: bool = False, **changes: object):
        options = {k: v for k, v in vars(args).items() if k in ("batch_size", "lstm", "dtype", "precision", "profile")} | changes
        words = [f"--{k}={v}" for k, v in options.items()] + ["--short"] * (short or args.short)
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.name, self.times, self.cpu, self.mb = label or name, {}, [], 0.0
        command, pipe = [sys.executable, "-m", "benchmarks.speed.train_step", "--child", name, *words], subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe)
        self.facts = self._answer()

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"{self.name} ended with status {self.process.wait()}; its last output is above")

    def do(self, task: str, counts: bool = True) -> dict:
        """Does a task once and returns the answer; `counts`: its time is recorded."""
        print(task, file=self.process.stdin, flush=True)
        answer = self._answer()
        self.mb = answer["mb"]
        if counts:
            self.times.setdefault(task, []).append(answer["seconds"])
            self.cpu += [answer["cpu_s"]] * (task == "step")
        return answer

    def ms(self, task: str) -> float:
        """Median time of a task."""
        return statistics.median(self.times[task]) * 1e3

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):  # it may have ended
            self.process.stdin.close()
        self.process.wait()


def alternate(contenders: list[Contender], task: str, rounds: int) -> None:
    """Two warm-up rounds, then `rounds` that count; in every round each contender does the task once."""
    able = [c for c in contenders if task in c.facts["tasks"]]
    for k in range(rounds + 2):
        for c in able:
            c.do(task, counts=k >= 2)


def compile_seconds(args: argparse.Namespace, from_raw: bool) -> tuple[float, float]:
    """Time to trace and compile our step in a new process: with an empty compilation cache, and from the cache.

    from_raw: the step from raw audio and landmarks, as in avsi-train; else from given features, the same work as the others'.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = [w for k in ("batch_size", "lstm", "dtype") for w in (f"--{k}", str(getattr(args, k)))]
        command = [sys.executable, "-m", "benchmarks.speed.train_step", "--child", "ours", *["--short"] * (not from_raw), *options]
        run = functools.partial(subprocess.run, command, input="", stdout=subprocess.PIPE, text=True, check=True)
        outputs = [run(env=os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}).stdout.splitlines() for _ in range(2)]
    return tuple(json.loads(next(line for line in lines if line.startswith("@"))[1:])["compile_s"] for lines in outputs)


def compare(names: list[str], args: argparse.Namespace) -> dict:
    """One flat dict: ms and ratios of every contender."""
    contenders = [Contender(name, args) for name in names]
    try:
        return measure(contenders, args)
    finally:
        for c in contenders:
            c.close()


def measure(contenders: list[Contender], args: argparse.Namespace) -> dict:
    """The result of `compare`, for contenders that are running."""
    check_same_platform(contenders)
    suffix = {"step": "", "forward": "_forward", "single": "_batch1", "from_raw": "_from_raw"}
    for task in suffix:
        alternate(contenders, task, args.rounds)
    row = {f"ms_{c.name}{s}": c.ms(task) for c in contenders for task, s in suffix.items() if task in c.times}
    # CPU time of a step in all threads: least affected by other jobs on the machine.
    row |= {f"cpu_ms_{c.name}": statistics.median(c.cpu) * 1e3 for c in contenders}
    best = [row[k] for k in ("ms_flax", "ms_flax_optimized") if k in row]
    others = {name: row[f"ms_{name}"] for name in ("torch", "keras") if f"ms_{name}" in row} | ({"flax": min(best)} if best else {})
    row |= {f"ratio_{name}_over_ours": ms / row["ms_ours"] for name, ms in others.items()}
    row |= {f"ratio_{n}_over_ours_{w}": row[f"ms_{n}_{w}"] / row[f"ms_ours_{w}"] for n in others for w in ("forward", "batch1")
            if f"ms_{n}_{w}" in row}  # fmt: skip
    row |= {f"mb_{c.name}": c.mb for c in contenders} | {f"version_{c.name}": c.facts["version"] for c in contenders}
    forward, step = gflop(args.batch_size)
    peak = max(c.do("peak")["value"] for c in contenders if "peak" in c.facts["tasks"])
    row |= {"gflop": step, "gflop_forward": forward, "peak_gflops": peak, "share_of_peak": step / row["ms_ours"] * 1e3 / peak}
    row |= {"share_of_peak_torch": step / row["ms_torch"] * 1e3 / peak} if "ms_torch" in row else {}
    row |= {"devices": contenders[0].facts["devices"], "cores": os.cpu_count(), "machine": platform.platform(terse=True)}
    return row | {k: getattr(args, k) for k in ("batch_size", "lstm", "dtype", "precision")}


def check_same_platform(contenders: list[Contender]) -> None:
    """ValueError where some contenders run on a GPU and others on a CPU."""
    platforms = {c.name: c.facts["platform"] for c in contenders if "platform" in c.facts}
    if len(set(platforms.values())) > 1:
        found = ", ".join(f"{n} on a {p}" for n, p in platforms.items())
        raise ValueError(f"found {found}; expected all on one: give `make bench` "
                         "EXTRA=cuda and a TORCH_INDEX with CUDA, or JAX_PLATFORMS=cpu and CUDA_VISIBLE_DEVICES=")  # fmt: skip


def sweep(args: argparse.Namespace) -> dict:
    """On a GPU: the scan, cuDNN and PyTorch at several batches and precisions; bfloat16 without cuDNN."""
    row = {}
    for batch, precision in SWEEP:
        try:
            cell = sweep_cell(args, batch, precision)
        except (RuntimeError, OSError) as error:  # e.g. out of memory: the other cells are still useful
            cell = {"failed": str(error)}
        fields = {f"{k}_{batch}_{precision}": v for k, v in cell.items()}
        show(fields)
        row |= fields
    return row


def sweep_cell(args: argparse.Namespace, batch: int, precision: str) -> dict:
    """Times and ratios at one batch size and precision."""
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    kinds = {"scan": ("ours", "joined"), "torch": ("torch", "auto"), "cudnn": ("ours", "cudnn")}
    contenders = []
    try:
        for kind, (name, lstm) in kinds.items():
            if kind != "cudnn" or dtype == "float32":
                profile = args.profile and str(Path(args.profile) / f"{kind}_{batch}_{precision}")
                options = {"batch_size": batch, "precision": precision, "dtype": dtype, "lstm": lstm, "profile": profile}
                contenders.append(Contender(name, args, label=kind, short=True, **options))
        check_same_platform(contenders)
        alternate(contenders, "step", args.rounds)
        ms = {c.name: c.ms("step") for c in contenders}
        cell = {f"ms_{name}": value for name, value in ms.items()}
        cell |= {f"ratio_torch_over_{name}": ms["torch"] / value for name, value in ms.items() if name != "torch"}
        cell |= {"ratio_scan_over_cudnn": ms["scan"] / ms["cudnn"]} if "cudnn" in ms else {}
        return cell | ({f"kernels_{c.name}": c.do("profile")["value"] for c in contenders} if args.profile else {})
    finally:
        for c in contenders:
            c.close()


def show(row: dict) -> None:
    """Prints fields, one per line."""
    for name, value in row.items():
        print(f"{name:32}{value:12.3f}" if isinstance(value, float) else f"{name:32}{value!s:>12}", flush=True)


def backend_of_jax() -> str:
    """jax.default_backend(), in a process of its own, so that this one does not reserve the GPU's memory."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def main(argv: list[str] | None = None) -> int:
    """The command `python -m benchmarks.speed.train_step`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one flat object as the last line")
    parser.add_argument("--batch_size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each contender (default: %(default)s)")
    parser.add_argument("--lstm", default="auto", help="auto, separate, joined or cudnn (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="type of our LSTM: float32 or bfloat16 (default: %(default)s)")
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "tf32", "bfloat16"), help="of matrix products on a GPU"
    )
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), help="default: all")
    parser.add_argument("--sweep", action="store_true", help="several batches and precisions, on a GPU")
    parser.add_argument("--profile", default="", metavar="DIR", help="with --sweep: trace a step of each into DIR and summarise it")
    parser.add_argument("--short", action="store_true", help="only the step from given features, and no compile times")
    parser.add_argument("--child", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.batch_size, args.rounds) <= 0:
        parser.error("expected --batch_size and --rounds above 0")
    if args.child:
        return serve(args)
    if (args.dtype == "bfloat16") != (args.precision == "bfloat16"):
        parser.error("--dtype and --precision: expected bfloat16 for both (ours and PyTorch) or for neither")
    if args.profile and not args.sweep:
        parser.error("--profile needs --sweep")
    try:
        return report(args)
    except (ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"train_step: {error}", file=sys.stderr)
        return 2


def report(args: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status."""
    if args.sweep and (backend := backend_of_jax()) != "gpu":
        raise ValueError(f"--sweep: found jax on a {backend}, expected a GPU that jax and torch can both use")
    for package in (missing := sorted({PACKAGES[n] for n in args.only if not importlib.util.find_spec(PACKAGES[n])})):
        print(f"{package} is not installed: left out; `make bench` has an environment with it")
    names = ["ours"] + [n for n in args.only if n != "ours" and PACKAGES[n] not in missing]
    row = compare(names, args)
    if not args.short:
        row["compile_s_ours"], row["cached_compile_s_ours"] = compile_seconds(args, from_raw=False)
        row["compile_s_ours_from_raw"], row["cached_compile_s_ours_from_raw"] = compile_seconds(args, from_raw=True)
    show(row)
    row |= sweep(args) if args.sweep else {}
    if args.json:
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
