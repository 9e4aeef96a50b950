"""What a step is made of on a GPU: a trace of one step by jax's or PyTorch's profiler, and its dearest kernels."""

from __future__ import annotations

import gzip
import json
from pathlib import Path


def traced_by_jax(jax, step, folder: str) -> str:
    with jax.profiler.trace(folder):
        step()
    newest = max(Path(folder).rglob("*.trace.json.gz"), key=lambda f: f.stat().st_mtime)
    return dearest(json.loads(gzip.decompress(newest.read_bytes())))


def traced_by_torch(torch, step, folder: str) -> str:
    with torch.profiler.profile() as profile:
        step()
    file = Path(folder) / "torch.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(file))
    return dearest(json.loads(file.read_text()))


def dearest(trace: dict, most: int = 5) -> str:
    """Of a Chrome trace with a GPU's streams: the time in all kernels, and of the dearest kinds the share and how many ran."""
    events = trace["traceEvents"]
    lanes = {e["pid"] for e in events if e.get("name") == "process_name" and "/device:GPU" in str(e["args"]["name"])}
    streams = {(e["pid"], e["tid"]) for e in events if e.get("name") == "thread_name" and "Stream" in str(e["args"]["name"])}
    spent: dict[str, list[float]] = {}
    for e in events:
        if e.get("ph") == "X" and (e.get("cat") == "kernel" or (e.get("pid") in lanes and (e["pid"], e["tid"]) in streams)):
            kind = e["name"].replace("(anonymous namespace)::", "").split("(")[0]
            spent.setdefault(kind[:60].rstrip("_0123456789."), []).append(e["dur"])
    if not (whole := sum(map(sum, spent.values()))):
        return "no kernels on a GPU"
    first = sorted(spent.items(), key=lambda kind: -sum(kind[1]))[:most]
    return f"{whole / 1e3:.2f} ms in kernels: " + ", ".join(f"{sum(t) / whole:.0%} {name} x {len(t)}" for name, t in first)
