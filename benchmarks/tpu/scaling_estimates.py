"""Calculates the cost of a training step on many chips: published bandwidths, formulas, and the resulting tables.

Letters: n chips, b clips per chip, B = n b clips in all. Times are in seconds, sizes in bytes, unless a name says otherwise.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from benchmarks.tpu import scaling_page, tpu_compile

# ---- published figures ---------------------------------------------------------------------------------------------------------


class Chip(NamedTuple):
    """The interconnect of a TPU generation."""

    link: float  # bytes/s in one direction of one ICI link
    axes: int  # of the torus
    closes_at: int  # chips along an axis from which on the axis is a ring
    pcie: float  # bytes/s per chip
    nic: float  # bytes/s per host


# link: docs.cloud.google.com/tpu/docs/{v5e,v6e,v5p}: 400, 800, 1200 GB/s per chip, both directions, over 4, 4 and 6 links;
# v4: 1.1 PB/s of all-reduce in a pod of 4096 chips with 6 links. nic: 2 x 100 Gb/s per host (v5e), 50 Gb/s per chip and 4 chips per
# host (v5p); v4, v6e and pcie: jax-ml.github.io/scaling-book, "How to think about TPUs". closes_at: the same.
CHIPS = {
    "v5e": Chip(50e9, 2, 16, 15e9, 25e9),
    "v4": Chip(45e9, 3, 4, 15e9, 25e9),
    "v5p": Chip(100e9, 3, 4, 15e9, 25e9),
    "v6e": Chip(100e9, 2, 16, 32e9, 25e9),
}
HOP_S = 1e-6  # to a neighbour: scaling-book, "Sharded matrices"
NET_HOP_S = 50e-6  # assumed latency of a message between hosts of a data centre
SHAPES = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
CLOCK_HZ = tpu_compile.TOPOLOGIES["v5e:2x4"][1] * 1e6

# Figures from this repository's documentation.
READER_CLIPS_S = 1631  # docs/performance.md, "read batches": one process
KERNEL_CYCLES = 381 + 458  # docs/tpu.md, benchmarks/tpu/pallas_lstm.py: VLIW bundles per time step, forward and backward, 32 clips
LAYERS, STEPS = 6, 149  # av_mtl_s2s
TRAIN_CLIPS = 20_000  # docs/dataset.md: 80 % of about 1,000 clips of each of 25 speakers
UPDATES = 100 * (895 // 16)  # training steps of 100 epochs: docs/results.md, configs/av_unified.py: 895 clips, batch 16

# ---- formulas ------------------------------------------------------------------------------------------------------------------


def allreduce_s(size: float, shape: tuple[int, ...], chip: Chip) -> float:
    """Time to sum `size` bytes over a torus, all axes at once: 2 size (n-1)/n over a chip's outgoing links, plus latency of hops.

    For an axis that is not a ring only one of its two links counts (scaling-book, "Sharded matrices").
    """
    n, axes = math.prod(shape), [a for a in shape if a > 1]
    if n == 1:
        return 0.0
    links = sum(2 if a >= chip.closes_at else 1 for a in axes)
    hops = sum(a // 2 if a >= chip.closes_at else a - 1 for a in axes)
    return 2 * size * (n - 1) / n / (links * chip.link) + 2 * hops * HOP_S


def ring_s(size: float, hosts: int, nic: float) -> float:
    """Time to sum `size` bytes over hosts connected by a network: a ring that uses both directions of the network card."""
    return 2 * size * (hosts - 1) / hosts / nic + 2 * (hosts - 1) * NET_HOP_S


def hosts_of(n: int) -> int:
    """Hosts of a v5e slice: one for up to 8 chips, else one per 4 chips (docs/launch.md)."""
    return 1 if n <= 8 else n // 4


def clip_bytes() -> int:
    """Bytes of a clip in a training batch (input_pipeline.to_example)."""
    return sum(math.prod(v.shape[1:]) * v.dtype.itemsize for v in tpu_compile.batch_shapes(1).values())


def cost(points: dict[float, float], b: float) -> float:
    """Linear interpolation of {b: value}, extrapolated above the largest b and constant below the smallest."""
    known = sorted(points)
    if b <= known[0]:
        return points[known[0]]
    low, high = next(((p, q) for p, q in zip(known, known[1:]) if b <= q), tuple(known[-2:]))
    return points[low] + (points[high] - points[low]) * (b - low) / (high - low)


class Model(NamedTuple):
    """Costs of a system on v5e. points: {b: seconds of computation}; size: bytes summed; clips_s: clips/s of a host's reader."""

    points: dict[float, float]
    size: float
    clips_s: float = math.inf

    def work_s(self, b: float) -> float:
        """Seconds of a chip's computation."""
        return cost(self.points, b)

    def sum_s(self, n: int) -> float:
        """Seconds to sum the gradients."""
        return allreduce_s(self.size, SHAPES[n], CHIPS["v5e"])

    def step_s(self, n: int, b: float) -> float:
        """Seconds of a training step: computation, then the sum, without overlap; or reading in parallel, if that is slower."""
        return max(self.work_s(b) + self.sum_s(n), n * b / hosts_of(n) / self.clips_s)

    def efficiency(self, n: int, b: float) -> float:
        """Clips/s per chip, relative to a single chip at the largest compiled b with a fast enough reader."""
        best = max(self.points)
        return b / self.step_s(n, b) / (best / self.work_s(best))

    def speedup_share(self, n: int, total: int) -> float:
        """Strong scaling: T(1 chip) / (n T(n)) at the same global batch, without reading."""
        free = self._replace(clips_s=math.inf)
        return free.step_s(1, total) / n / free.step_s(n, total / n)

    def least_b(self, n: int, share: float) -> float | None:
        """The smallest b, up to the largest compiled, at which `efficiency` reaches `share`; None where it never does."""
        return next((b for b in range(1, int(max(self.points)) + 1) if self.efficiency(n, b) >= share), None)


# ---- tables --------------------------------------------------------------------------------------------------------------------


def models(compiled: list[dict]) -> dict[str, Model]:
    """Models from the compiled table; for the same b the topology with most chips counts; further b from docs/tpu.md."""
    by_system: dict[str, Model] = {}
    for row in sorted(compiled, key=lambda r: r["chips"]):
        seconds = 1e3 * (row["k cycles in loops"] + row["k cycles outside"]) / CLOCK_HZ
        model = by_system.setdefault(row["system"], Model({}, 0.0))
        by_system[row["system"]] = Model(model.points | {row["clips per chip"]: seconds}, 1e6 * row["MB reduced"])
    for system, b, cycles in cycles_of_one_host():
        if system in by_system:
            by_system[system].points.setdefault(b, cycles / CLOCK_HZ)
    return by_system


def cycles_of_one_host() -> list[tuple[str, float, float]]:
    """(system, clips per chip, cycles) from docs/tpu.md for v5e, `joined`, float32: a training step of one host's chips."""
    every, of_lstms = scaling_page.TPU_PAGE.read_text().split("## LSTM implementations: ")
    systems, lstms = scaling_page.rows_of(every.split("## Every system")[1]), scaling_page.rows_of(of_lstms)
    rows = [(r["system"], 32.0, r["k cycles"]) for r in systems if r["topology"] == "v5e:2x4"]
    chosen = [r for r in lstms if (r["lstm"], r["dtype"]) == ("joined", "as the config")]
    rows += [(of_lstms.split(" ", 1)[0], r["batch per chip"], r["k cycles"]) for r in chosen]
    return [(system, b, 1e3 * cycles) for system, b, cycles in rows if isinstance(cycles, float)]


def tables(compiled: list[dict]) -> dict[str, list[dict]]:
    """{heading: rows} of all calculated tables."""
    free = models(compiled)["av_mtl_s2s"]
    read = free._replace(clips_s=READER_CLIPS_S)
    sizes = (1, 8, 16, 32, 64, 128, 256)
    weak = [
        {
            "chips": n,
            "hosts": hosts_of(n),
            "clips per chip": b,
            "computation, ms": 1e3 * free.work_s(b),
            "all-reduce, ms": 1e3 * free.sum_s(n),
            "share of the step": _share(free.sum_s(n) / free.step_s(n, b)),
            "step, ms": 1e3 * free.step_s(n, b),
            "clips/s": round(n * b / free.step_s(n, b)),
            "efficiency": _share(free.efficiency(n, b)),
            "clips/s with the present reader": round(n * b / read.step_s(n, b)),
            "steps per epoch": TRAIN_CLIPS / n / b,
        }
        for b in (32, 256)
        for n in sizes
    ]
    strong = [
        {
            "global batch": total,
            "chips": n,
            "clips per chip": total / n,
            "step, ms": 1e3 * free.step_s(n, total / n),
            "clips/s": round(total / free.step_s(n, total / n)),
            "speed-up": free.speedup_share(n, total) * n,
            "efficiency": _share(free.speedup_share(n, total)),
            "steps per epoch": TRAIN_CLIPS / total,
        }
        for total in (32, 256, 2048)
        for n in sizes
        if total % n == 0
    ]
    sums = [
        {
            "chip": name,
            "chips": n,
            "topology": "x".join(map(str, shape)),
            "GB/s per link": chip.link / 1e9,
            "33 MB, ms": 1e3 * allreduce_s(free.size, shape, chip),
        }
        for name, chip in CHIPS.items()
        for n, shape in _shapes(chip)
    ]
    network = [
        {
            "hosts": h,
            "MB": free.size / 1e6,
            "ms": 1e3 * ring_s(free.size, h, CHIPS["v5e"].nic),
            "ms, for as many pods of 64 hosts each": 1e3 * ring_s(free.size / 64, h, CHIPS["v5e"].nic),
        }
        for h in (2, 4, 16)
    ]
    return {
        "Recurrence on one chip": latency(compiled),
        "Sum of the gradients inside a pod": sums,
        "Its share if the recurrence were as fast as the kernel": with_kernel(compiled, free),
        "The same over a data centre network (v5e network cards)": network,
        "Input": inputs(read),
        "Weak scaling: more chips, the same number of clips on each": weak,
        "Strong scaling: more chips, the same global batch": strong,
        "Clips that a chip needs": needed_clips(models(compiled)),
    }


def _share(x: float) -> str:
    return f"{x:.0%}" if x >= 0.1 else f"{x:.1%}"


def _shapes(chip: Chip) -> list[tuple[int, tuple[int, ...]]]:
    three = {8: (2, 2, 2), 16: (2, 2, 4), 64: (4, 4, 4), 256: (4, 8, 8)}
    return [(n, SHAPES[n] if chip.axes == 2 else three[n]) for n in three]


def latency(compiled: list[dict]) -> list[dict]:
    """The cost of one time step of one layer, forward and backward, and of all of them in sequence."""
    rows = [r for r in compiled if r["system"] == "av_mtl_s2s"]
    of_loops = {int(r["clips per chip"]): 1e3 * r["k cycles in loops"] for r in sorted(rows, key=lambda r: r["chips"])}
    sources = {f"compiler's estimate, {b} clips": cycles / LAYERS / STEPS for b, cycles in sorted(of_loops.items())}
    sources["one kernel per layer, its bundles, 32 clips"] = KERNEL_CYCLES
    return [
        {
            "source": source,
            "cycles per time step and layer": c,
            "us": 1e6 * c / CLOCK_HZ,
            "ms, 6 x 149 time steps": 1e3 * c * LAYERS * STEPS / CLOCK_HZ,
            "clips/s per chip at most": round(_clips(source) / (c * LAYERS * STEPS / CLOCK_HZ)),
        }
        for source, c in sources.items()
    ]


def with_kernel(compiled: list[dict], free: Model) -> list[dict]:
    """For 32 clips per chip: the compiler's estimate outside of loops, the kernel's bundles, and the sum."""
    outside = next((r["k cycles outside"] for r in compiled if (r["system"], r["clips per chip"]) == ("av_mtl_s2s", 32)), None)
    if outside is None:
        raise ValueError(f"{scaling_page.PAGE.name}: found no row of av_mtl_s2s with 32 clips per chip, expected one")
    rest, kernel = 1e3 * outside / CLOCK_HZ, KERNEL_CYCLES * LAYERS * STEPS / CLOCK_HZ
    return [
        {
            "chips": n,
            "outside loops, ms": 1e3 * rest,
            "recurrence, ms": 1e3 * kernel,
            "all-reduce, ms": 1e3 * free.sum_s(n),
            "share of the step": _share(free.sum_s(n) / (rest + kernel + free.sum_s(n))),
            "clips/s": round(32 * n / (rest + kernel + free.sum_s(n))),
        }
        for n in (8, 16, 64, 256)
    ]


def _clips(source: str) -> int:
    return int(re.search(r"(\d+) clips", source).group(1))


def inputs(read: Model) -> list[dict]:
    """Input for v5e hosts of 4 and of 8 chips, at 32 and 256 clips per chip."""
    size, chip = clip_bytes(), CHIPS["v5e"]
    return [
        {
            "chips of the host": n,
            "clips per chip": b,
            "MB per step": n * b * size / 1e6,
            "PCIe, ms": 1e3 * b * size / chip.pcie,
            "reading, ms": 1e3 * n * b / READER_CLIPS_S,
            "computation, ms": 1e3 * read.work_s(b),
            "clips/s needed": round(n * b / read.work_s(b)),
            "relative to the reader": n * b / read.work_s(b) / READER_CLIPS_S,
            "GB/s from disk": n * b * size / read.work_s(b) / 1e9,
        }
        for n in (4, 8)
        for b in (32, 256)
    ]


def needed_clips(systems: dict[str, Model]) -> list[dict]:
    """The clips per chip needed for 80 % and 50 % of the throughput at the largest compiled number."""
    text = lambda x: "never" if x is None else str(x)
    limits = [(n, "unlimited", math.inf) for n in (1, 8, 256)] + [(n, "present reader", READER_CLIPS_S) for n in (8, 256)]
    rows = [(name, n, read, model._replace(clips_s=rate)) for name, model in systems.items() for n, read, rate in limits]
    return [
        {
            "system": name,
            "chips": n,
            "input": read,
            "clips per chip for 80 %": text(m.least_b(n, 0.8)),
            "for 50 %": text(m.least_b(n, 0.5)),
            "efficiency at 1": _share(m.efficiency(n, 1)),
            "at 8": _share(m.efficiency(n, 8)),
            "at 32": _share(m.efficiency(n, 32)),
            "clips per chip at 100 %": int(max(m.points)),
        }
        for name, n, read, m in rows
    ]


def largest_batch(epochs: int = 100) -> int:
    """The global batch at which `epochs` epochs of all of Grid have UPDATES training steps."""
    return epochs * TRAIN_CLIPS // UPDATES


def summary(compiled: list[dict]) -> list[dict]:
    """The limits of scaling for av_mtl_s2s on v5e, one row of text each."""
    m, chip = models(compiled)["av_mtl_s2s"], CHIPS["v5e"]
    slow, best = m._replace(clips_s=READER_CLIPS_S), min(m.points, key=m.work_s)
    ms = lambda s: f"{1e3 * s:.3g} ms"
    share = lambda part, b: _share(part / (m.work_s(b) + part))
    achieved = lambda n: _share(slow.efficiency(n, 32) / m.efficiency(n, 32))
    needed, worst = 32 / m.work_s(32), max(SHAPES, key=m.sum_s)
    two, sixteen = (ring_s(m.size, hosts, chip.nic) for hosts in (2, 16))
    rows = [
        (
            "training steps needed to learn",
            f"a global batch of {largest_batch()}: {largest_batch() // 32} chips of 32 clips",
            f"100 epochs of {TRAIN_CLIPS:,} clips are then {UPDATES:,} steps, as many as 100 epochs of 895 clips at batch 16",
            "calculated",
        ),
        (
            "reading, one process per host",
            f"{READER_CLIPS_S / needed:.1f} chips per host, for any batch",
            f"a chip at 32 clips needs {needed:,.0f} clips/s, the reader gives {READER_CLIPS_S:,}: hosts of 4 chips reach "
            f"{achieved(256)} of their throughput, of 8 chips {achieved(8)}",
            "measured, compiler",
        ),
        (
            "the recurrence",
            f"80 % with {m.least_b(256, 0.8)} clips per chip, 50 % with {m.least_b(256, 0.5)}; no faster step below {best:.0f}",
            f"{LAYERS} x {STEPS} time steps in sequence: {ms(m.work_s(max(m.points)))} at {max(m.points):.0f} clips, "
            f"{ms(m.work_s(32))} at 32, {ms(m.work_s(best))} at {best:.0f}, {ms(m.work_s(1))} at 1",
            "compiler",
        ),
        (
            "all-reduce over ICI",
            "no limit up to 256 chips",
            f"{ms(m.sum_s(worst))} at most ({worst} chips): {share(m.sum_s(worst), 32)} of a step of 32 clips, "
            f"{share(m.sum_s(worst), best)} of one of {best:.0f}",
            "calculated",
        ),
        (
            "all-reduce over a network",
            "no limit up to 16 hosts without ICI",
            f"{ms(sixteen)}, {share(sixteen, 32)} of a step of 32 clips; 2 hosts {ms(two)}, {share(two, 32)}",
            "calculated",
        ),
        (
            "PCIe",
            "no limit",
            f"{clip_bytes():,} bytes per clip: {ms(32 * clip_bytes() / chip.pcie)} for 32, during the step",
            "calculated",
        ),
    ]
    return [dict(zip(("limited by", "limit", "reason", "source"), row, strict=True)) for row in rows]


def as_text(compiled: list[dict]) -> str:
    """All calculated tables as Markdown."""
    blocks = [f"### {heading}\n\n{scaling_page.table(rows)}" for heading, rows in tables(compiled).items()]
    return "\n\n".join(blocks) + f"\n\nGlobal batch at which 100 epochs are {UPDATES:,} steps: {largest_batch()}."
