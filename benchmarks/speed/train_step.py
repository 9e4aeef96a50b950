"""The training step of av_mtl_s2s beside the same work in PyTorch, with flax's own cells and in Keras on JAX.

    make bench                                       # makes .venv-bench, with torch and keras, and runs this
    python -m benchmarks.speed.train_step [--json] [--batch_size 32] [--rounds 9] [--lstm auto] [--dtype float32] [--only ours torch]

The work: batch 32, 149 steps of ready features, the whole network, MSE + 0.001 CTC, gradients clipped at norm 1, Adam. Ours is the
step that avsi-train maps over its devices (on a CPU one a core); `whole` makes the features from sound and landmarks too. Every
contender has a process of its own and they take turns, step by step; medians count. --sweep, on a GPU: batches of 32, 256 and 1024,
float32, TF32 and bfloat16, the scan and cuDNN; with --profile=DIR a step of each is traced, and its dearest kernels are fields.
The last line of --json is one flat object. Without torch or keras their fields are absent, and a line says so.
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

NEEDS = {"ours": "jax", "torch": "torch", "flax": "flax", "flax_optimized": "flax", "keras": "keras"}
SWEEP = [(batch, kind) for batch in (32, 256, 1024) for kind in ("float32", "tf32", "bfloat16")]


# ---- taking turns --------------------------------------------------------------------------------------------------------------


def child(args) -> int:
    """A contender's process: a word a line comes in ('step'), seconds or GFLOP/s go out; lines of ours start with @."""
    tell = lambda what: print("@" + json.dumps(what), flush=True)
    does, facts = CONTENDERS[args.child](args)
    tell(facts | {"does": list(does)})
    for line in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        value = does[line.strip()]()
        tell({"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu,
              "value": value if isinstance(value, float | str) else None,
              "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})  # fmt: skip
    return 0


class Contender:
    """A contender as the others see it."""

    def __init__(self, name: str, args, called: str = "", short: bool = False, **changes):
        said = {k: v for k, v in vars(args).items() if k in ("batch_size", "lstm", "dtype", "precision", "profile")} | changes
        words = [f"--{k}={v}" for k, v in said.items()] + ["--short"] * (short or args.short)
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.name, self.times, self.cpu, self.mb = called or name, {}, [], 0.0
        command, pipe = [sys.executable, "-m", "benchmarks.speed.train_step", "--child", name, *words], subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe)
        self.facts = self._answer()

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"{self.name} ended with status {self.process.wait()}; its last words are above")

    def do(self, what: str, counts: bool = True) -> dict:
        print(what, file=self.process.stdin, flush=True)
        answer = self._answer()
        self.mb = answer["mb"]
        if counts:
            self.times.setdefault(what, []).append(answer["seconds"])
            self.cpu += [answer["cpu_s"]] * (what == "step")
        return answer

    def ms(self, what: str) -> float:
        return statistics.median(self.times[what]) * 1e3

    def close(self):
        with contextlib.suppress(OSError):  # it may be gone
            self.process.stdin.close()
        self.process.wait()


def take_turns(contenders: list[Contender], what: str, rounds: int) -> None:
    """Two rounds to warm up, then `rounds` that count; in every round each does it once."""
    able = [c for c in contenders if what in c.facts["does"]]
    for k in range(rounds + 2):
        for c in able:
            c.do(what, counts=k >= 2)


def compile_seconds(args, from_raw: bool) -> tuple[float, float]:
    """Tracing and compiling our step in a fresh process: into an empty compilation cache, and from it.

    The step of ready features, the same work as the others'; or the one from raw sound and landmarks, as avsi-train runs it.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = [w for k in ("batch_size", "lstm", "dtype") for w in (f"--{k}", str(getattr(args, k)))]
        command = [sys.executable, "-m", "benchmarks.speed.train_step", "--child", "ours", *["--short"] * (not from_raw), *said]
        run = functools.partial(subprocess.run, command, input="", stdout=subprocess.PIPE, text=True, check=True)
        found = [run(env=os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}).stdout.splitlines() for _ in range(2)]
    return tuple(json.loads(next(line for line in lines if line.startswith("@"))[1:])["compile_s"] for lines in found)


def compare(names: list[str], args) -> dict:
    """One flat object: ms and ratios of every contender."""
    contenders = [Contender(name, args) for name in names]
    try:
        return compared(contenders, args)
    finally:
        for c in contenders:
            c.close()


def compared(contenders: list[Contender], args) -> dict:
    refuse_other_machines(contenders)
    suffix = {"step": "", "forward": "_forward", "single": "_batch1", "whole": "_from_raw"}
    for what in suffix:
        take_turns(contenders, what, args.rounds)
    row = {f"ms_{c.name}{s}": c.ms(what) for c in contenders for what, s in suffix.items() if what in c.times}
    # Of a step, all threads together: what other jobs on the machine touch least.
    row |= {f"cpu_ms_{c.name}": statistics.median(c.cpu) * 1e3 for c in contenders}
    best = [row[k] for k in ("ms_flax", "ms_flax_optimized") if k in row]
    others = {name: row[f"ms_{name}"] for name in ("torch", "keras") if f"ms_{name}" in row} | ({"flax": min(best)} if best else {})
    row |= {f"ratio_{name}_over_ours": ms / row["ms_ours"] for name, ms in others.items()}
    row |= {f"ratio_{n}_over_ours_{w}": row[f"ms_{n}_{w}"] / row[f"ms_ours_{w}"] for n in others for w in ("forward", "batch1")
            if f"ms_{n}_{w}" in row}  # fmt: skip
    row |= {f"mb_{c.name}": c.mb for c in contenders} | {f"version_{c.name}": c.facts["version"] for c in contenders}
    forward, step = gflop(args.batch_size)
    peak = max(c.do("peak")["value"] for c in contenders if "peak" in c.facts["does"])
    row |= {"gflop": step, "gflop_forward": forward, "peak_gflops": peak, "share_of_peak": step / row["ms_ours"] * 1e3 / peak}
    row |= {"share_of_peak_torch": step / row["ms_torch"] * 1e3 / peak} if "ms_torch" in row else {}
    row |= {"devices": contenders[0].facts["devices"], "cores": os.cpu_count(), "machine": platform.platform(terse=True)}
    return row | {k: getattr(args, k) for k in ("batch_size", "lstm", "dtype", "precision")}


def refuse_other_machines(contenders: list[Contender]) -> None:
    """A GPU against a CPU says nothing; ValueError names who is where."""
    where = {c.name: c.facts["platform"] for c in contenders if "platform" in c.facts}
    if len(set(where.values())) > 1:
        raise ValueError(f"found {', '.join(f'{n} on a {p}' for n, p in where.items())}; expected all on one: give `make bench` "
                         "EXTRA=cuda and a TORCH_INDEX with CUDA, or JAX_PLATFORMS=cpu and CUDA_VISIBLE_DEVICES=")  # fmt: skip


def sweep(args) -> dict:
    """On a GPU: the scan and cuDNN beside PyTorch at several batches and precisions; bfloat16 is the scan's alone."""
    row = {}
    for batch, precision in SWEEP:
        try:
            cell = sweep_cell(args, batch, precision)
        except (RuntimeError, OSError) as error:  # out of memory, say: the others are still worth having
            cell = {"failed": str(error)}
        found = {f"{k}_{batch}_{precision}": v for k, v in cell.items()}
        show(found)
        row |= found
    return row


def sweep_cell(args, batch: int, precision: str) -> dict:
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    kinds = {"scan": ("ours", "joined"), "torch": ("torch", "auto"), "cudnn": ("ours", "cudnn")}
    contenders = []
    try:
        for kind, (name, lstm) in kinds.items():
            if kind != "cudnn" or dtype == "float32":
                profile = args.profile and str(Path(args.profile) / f"{kind}_{batch}_{precision}")
                given = {"batch_size": batch, "precision": precision, "dtype": dtype, "lstm": lstm, "profile": profile}
                contenders.append(Contender(name, args, called=kind, short=True, **given))
        refuse_other_machines(contenders)
        take_turns(contenders, "step", args.rounds)
        ms = {c.name: c.ms("step") for c in contenders}
        cell = {f"ms_{name}": value for name, value in ms.items()}
        cell |= {f"ratio_torch_over_{name}": ms["torch"] / value for name, value in ms.items() if name != "torch"}
        cell |= {"ratio_scan_over_cudnn": ms["scan"] / ms["cudnn"]} if "cudnn" in ms else {}
        return cell | ({f"kernels_{c.name}": c.do("profile")["value"] for c in contenders} if args.profile else {})
    finally:
        for c in contenders:
            c.close()


def show(row: dict) -> None:
    for name, value in row.items():
        print(f"{name:32}{value:12.3f}" if isinstance(value, float) else f"{name:32}{value!s:>12}", flush=True)


def backend_of_jax() -> str:
    """jax.default_backend(), asked in a process of its own: this one must not take the GPU's memory."""
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[-1]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one flat object as the last line")
    parser.add_argument("--batch_size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each that count (default: %(default)s)")
    parser.add_argument("--lstm", default="auto", help="auto, separate, joined or cudnn (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of our LSTM: float32 or bfloat16 (default: %(default)s)")
    parser.add_argument("--precision", default="float32", choices=("float32", "tf32", "bfloat16"), help="of products, on a GPU")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), help="default: all")
    parser.add_argument("--sweep", action="store_true", help="batches and precisions, on a GPU")
    parser.add_argument("--profile", default="", metavar="DIR", help="with --sweep: traces of a step of each, and what they show")
    parser.add_argument("--short", action="store_true", help="the step alone: no features from raw sound, no compile times")
    parser.add_argument("--child", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.batch_size, args.rounds) <= 0:
        parser.error("expected --batch_size and --rounds above 0")
    if args.child:
        return child(args)
    if (args.dtype == "bfloat16") != (args.precision == "bfloat16"):
        parser.error("--dtype and --precision: expected bfloat16 for both or for neither: ours takes the first, PyTorch the second")
    if args.profile and not args.sweep:
        parser.error("--profile: expected --sweep beside it")
    try:
        return report(args)
    except (ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"benchmarks/speed/train_step.py: {error}", file=sys.stderr)
        return 2


def report(args) -> int:
    """Measures and prints."""
    if args.sweep and (found := backend_of_jax()) != "gpu":
        raise ValueError(f"--sweep: found jax on a {found}, expected a GPU that jax and torch can both use")
    for package in (missing := sorted({NEEDS[n] for n in args.only if not importlib.util.find_spec(NEEDS[n])})):
        print(f"{package} is not installed: left out; `make bench` has an environment with it")
    names = ["ours"] + [n for n in args.only if n != "ours" and NEEDS[n] not in missing]
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
