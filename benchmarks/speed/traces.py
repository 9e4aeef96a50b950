"""Profiles one training step on a GPU with jax's or PyTorch's profiler and summarises its most expensive kernels."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def trace_jax(jax: ModuleType, step: Callable[[], object], folder: str) -> str:
    """Traces a call of `step` with jax's profiler into `folder`; returns `top_kernels` of the trace."""
    with jax.profiler.trace(folder):
        step()
    newest = max(Path(folder).rglob("*.trace.json.gz"), key=lambda f: f.stat().st_mtime)
    return top_kernels(json.loads(gzip.decompress(newest.read_bytes())))


def trace_torch(torch: ModuleType, step: Callable[[], object], folder: str) -> str:
    """Traces a call of `step` with PyTorch's profiler into `folder`; returns `top_kernels` of the trace."""
    with torch.profiler.profile() as profile:
        step()
    file = Path(folder) / "torch.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(file))
    return top_kernels(json.loads(file.read_text()))


def top_kernels(trace: dict, count: int = 5) -> str:
    """Summary of a Chrome trace with a GPU's streams: total kernel time, and share and number of the `count` top kinds."""
    events = trace["traceEvents"]
    lanes = {e["pid"] for e in events if e.get("name") == "process_name" and "/device:GPU" in str(e["args"]["name"])}
    streams = {(e["pid"], e["tid"]) for e in events if e.get("name") == "thread_name" and "Stream" in str(e["args"]["name"])}
    durations: dict[str, list[float]] = {}
    for e in events:
        if e.get("ph") == "X" and (e.get("cat") == "kernel" or (e.get("pid") in lanes and (e["pid"], e["tid"]) in streams)):
            kind = e["name"].replace("(anonymous namespace)::", "").split("(")[0]
            durations.setdefault(kind[:60].rstrip("_0123456789."), []).append(e["dur"])
    if not (total := sum(map(sum, durations.values()))):
        return "no kernels on a GPU"
    top = sorted(durations.items(), key=lambda kind: -sum(kind[1]))[:count]
    return f"{total / 1e3:.2f} ms in kernels: " + ", ".join(f"{sum(t) / total:.0%} {name} x {len(t)}" for name, t in top)
