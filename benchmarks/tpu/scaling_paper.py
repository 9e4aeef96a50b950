"""The cost of a training step on many chips, worked out on paper: published bandwidths, formulas, and the tables they give.

Letters: n chips, b clips a chip, B = n b clips in all; times in seconds, sizes in bytes, unless a name says otherwise.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from benchmarks.tpu import scaling_page, tpu_compile

# ---- what others publish -------------------------------------------------------------------------------------------------------


class Chip(NamedTuple):
    """link: bytes/s one way of one ICI link; axes: of the torus; closes_at: chips along an axis from which on it is a ring;
    nic: bytes/s of a host.
    """

    link: float
    axes: int
    closes_at: int
    pcie: float
    nic: float


# link: docs.cloud.google.com/tpu/docs/{v5e,v6e,v5p}: 400, 800, 1200 GB/s a chip, both ways together, over 4, 4 and 6 links;
# v4: 1.1 PB/s of all-reduce in a pod of 4096 chips with 6 links. nic: 2 x 100 Gb/s a host (v5e), 50 Gb/s a chip and 4 chips a host
# (v5p); v4, v6e and pcie: jax-ml.github.io/scaling-book, "How to think about TPUs". closes_at: the same.
CHIPS = {
    "v5e": Chip(50e9, 2, 16, 15e9, 25e9),
    "v4": Chip(45e9, 3, 4, 15e9, 25e9),
    "v5p": Chip(100e9, 3, 4, 15e9, 25e9),
    "v6e": Chip(100e9, 2, 16, 32e9, 25e9),
}
HOP_S = 1e-6  # to a neighbour: scaling-book, "Sharded matrices"
NET_HOP_S = 50e-6  # assumed, of a message between hosts of a data centre
SHAPES = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
CLOCK_HZ = tpu_compile.TOPOLOGIES["v5e:2x4"][1] * 1e6

# What this repository's pages say.
READER_CLIPS_S = 1631  # docs/performance.md, "read batches": one process
KERNEL_CYCLES = 381 + 458  # docs/tpu.md, benchmarks/tpu/pallas_lstm.py: bundles of a time step, forward and backward, 32 clips
LAYERS, STEPS = 6, 149  # av_mtl_s2s
TRAIN_CLIPS = 20_000  # docs/dataset.md: 25 speakers of about 1,000 clips train, 80 % of them
UPDATES = 100 * (895 // 16)  # docs/results_long.md, configs/av_unified.py: 895 clips, batch 16, 100 epochs

# ---- formulas ------------------------------------------------------------------------------------------------------------------


def allreduce_s(size: float, shape: tuple[int, ...], chip: Chip) -> float:
    """Sum of `size` bytes over a torus, every axis at once: 2 size (n-1)/n over a chip's outgoing links, and the hops' latency.

    An axis that is no ring counts one of its two links (scaling-book, "Sharded matrices": no bidirectional ring there).
    """
    n, axes = math.prod(shape), [a for a in shape if a > 1]
    if n == 1:
        return 0.0
    links = sum(2 if a >= chip.closes_at else 1 for a in axes)
    hops = sum(a // 2 if a >= chip.closes_at else a - 1 for a in axes)
    return 2 * size * (n - 1) / n / (links * chip.link) + 2 * hops * HOP_S


def ring_s(size: float, hosts: int, nic: float) -> float:
    """Sum of `size` bytes over hosts that are only on a network: a ring, both ways of the card at work."""
    return 2 * size * (hosts - 1) / hosts / nic + 2 * (hosts - 1) * NET_HOP_S


def hosts_of(n: int) -> int:
    """Hosts of a v5e slice: one of up to 8 chips, else 4 chips each (docs/launch.md)."""
    return 1 if n <= 8 else n // 4


def clip_bytes() -> int:
    """Of a clip as a step takes it: input_pipeline.to_example."""
    return sum(math.prod(v.shape[1:]) * v.dtype.itemsize for v in tpu_compile.batch_shapes(1).values())


def cost(points: dict[float, float], b: float) -> float:
    """Straight lines between {b: value}, the last one prolonged; under the least b its value."""
    known = sorted(points)
    if b <= known[0]:
        return points[known[0]]
    low, high = next(((p, q) for p, q in zip(known, known[1:]) if b <= q), tuple(known[-2:]))
    return points[low] + (points[high] - points[low]) * (b - low) / (high - low)


class Model(NamedTuple):
    """A system on v5e. points: {b: seconds of a chip's own work}; size: bytes summed; clips_s: a host's reader."""

    points: dict[float, float]
    size: float
    clips_s: float = math.inf

    def work_s(self, b: float) -> float:
        return cost(self.points, b)

    def sum_s(self, n: int) -> float:
        return allreduce_s(self.size, SHAPES[n], CHIPS["v5e"])

    def step_s(self, n: int, b: float) -> float:
        """Work, then the sum, none of it hidden by the other; reading goes on beside them, the slower one decides."""
        return max(self.work_s(b) + self.sum_s(n), n * b / hosts_of(n) / self.clips_s)

    def efficiency(self, n: int, b: float) -> float:
        """Clips a second and chip, as a share of one chip's at the largest b compiled, whose reader keeps up."""
        best = max(self.points)
        return b / self.step_s(n, b) / (best / self.work_s(best))

    def speedup_share(self, n: int, total: int) -> float:
        """Strong scaling: T(1 chip) / (n T(n)) at the same global batch, reading left aside."""
        free = self._replace(clips_s=math.inf)
        return free.step_s(1, total) / n / free.step_s(n, total / n)

    def least_b(self, n: int, share: float) -> float | None:
        """The least clips a chip, up to the largest compiled, at which `efficiency` reaches `share`; None: nowhere."""
        return next((b for b in range(1, int(max(self.points)) + 1) if self.efficiency(n, b) >= share), None)


# ---- on paper ------------------------------------------------------------------------------------------------------------------


def models(compiled: list[dict]) -> dict[str, Model]:
    """By the compiler's table; where several topologies have the same b, the one of most chips; other b by docs/tpu.md."""
    found: dict[str, Model] = {}
    for row in sorted(compiled, key=lambda r: r["chips"]):
        seconds = 1e3 * (row["k cycles in loops"] + row["k cycles outside"]) / CLOCK_HZ
        model = found.setdefault(row["system"], Model({}, 0.0))
        found[row["system"]] = Model(model.points | {row["clips a chip"]: seconds}, 1e6 * row["MB reduced"])
    for system, b, cycles in of_one_host():
        if system in found:
            found[system].points.setdefault(b, cycles / CLOCK_HZ)
    return found


def of_one_host() -> list[tuple[str, float, float]]:
    """(system, clips a chip, cycles) of docs/tpu.md for v5e, `joined`, float32: there a step of one host's chips."""
    every, ways = scaling_page.TPU_PAGE.read_text().split("## The ways to run the LSTM: ")
    systems, ran = scaling_page.rows_of(every.split("## Every system")[1]), scaling_page.rows_of(ways)
    rows = [(r["system"], 32.0, r["k cycles"]) for r in systems if r["topology"] == "v5e:2x4"]
    kept = [r for r in ran if (r["lstm"], r["dtype"]) == ("joined", "as the config")]
    rows += [(ways.split(" ", 1)[0], r["batch per chip"], r["k cycles"]) for r in kept]
    return [(system, b, 1e3 * cycles) for system, b, cycles in rows if isinstance(cycles, float)]


def paper(compiled: list[dict]) -> dict[str, list[dict]]:
    """{heading: rows}."""
    free = models(compiled)["av_mtl_s2s"]
    read = free._replace(clips_s=READER_CLIPS_S)
    sizes = (1, 8, 16, 32, 64, 128, 256)
    weak = [
        {
            "chips": n,
            "hosts": hosts_of(n),
            "clips a chip": b,
            "work, ms": 1e3 * free.work_s(b),
            "all-reduce, ms": 1e3 * free.sum_s(n),
            "of the step": _share(free.sum_s(n) / free.step_s(n, b)),
            "step, ms": 1e3 * free.step_s(n, b),
            "clips/s": round(n * b / free.step_s(n, b)),
            "efficiency": _share(free.efficiency(n, b)),
            "clips/s with today's reader": round(n * b / read.step_s(n, b)),
            "steps an epoch": TRAIN_CLIPS / n / b,
        }
        for b in (32, 256)
        for n in sizes
    ]
    strong = [
        {
            "global batch": total,
            "chips": n,
            "clips a chip": total / n,
            "step, ms": 1e3 * free.step_s(n, total / n),
            "clips/s": round(total / free.step_s(n, total / n)),
            "speed-up": free.speedup_share(n, total) * n,
            "efficiency": _share(free.speedup_share(n, total)),
            "steps an epoch": TRAIN_CLIPS / total,
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
            "GB/s a link": chip.link / 1e9,
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
            "ms, for as many pods, each of 64 hosts": 1e3 * ring_s(free.size / 64, h, CHIPS["v5e"].nic),
        }
        for h in (2, 4, 16)
    ]
    return {
        "A chip's step: the recurrence": latency(compiled),
        "The sum of the gradients inside a pod": sums,
        "Its share, were the recurrence as fast as the kernel": with_kernel(compiled, free),
        "The same over a data centre's network (v5e's cards)": network,
        "Input": inputs(read),
        "More chips, as many clips on each": weak,
        "More chips, the batch kept": strong,
        "How many clips a chip needs": stops(models(compiled)),
    }


def _share(x: float) -> str:
    return f"{x:.0%}" if x >= 0.1 else f"{x:.1%}"


def _shapes(chip: Chip):
    three = {8: (2, 2, 2), 16: (2, 2, 4), 64: (4, 4, 4), 256: (4, 8, 8)}
    return [(n, SHAPES[n] if chip.axes == 2 else three[n]) for n in three]


def latency(compiled: list[dict]) -> list[dict]:
    """What one time step of one layer, forward and backward, costs, and all of them one after the other."""
    rows = [r for r in compiled if r["system"] == "av_mtl_s2s"]
    of_loops = {int(r["clips a chip"]): 1e3 * r["k cycles in loops"] for r in sorted(rows, key=lambda r: r["chips"])}
    ways = {f"compiler's estimate, {b} clips": cycles / LAYERS / STEPS for b, cycles in sorted(of_loops.items())}
    ways["one kernel a layer, its bundles, 32 clips"] = KERNEL_CYCLES
    return [
        {
            "by": way,
            "cycles a step and layer": c,
            "us": 1e6 * c / CLOCK_HZ,
            "ms, 6 x 149 steps": 1e3 * c * LAYERS * STEPS / CLOCK_HZ,
            "clips/s a chip at most": round(_clips(way) / (c * LAYERS * STEPS / CLOCK_HZ)),
        }
        for way, c in ways.items()
    ]


def with_kernel(compiled: list[dict], free: Model) -> list[dict]:
    """32 clips a chip: what the compiler estimates outside of loops, the kernel's bundles, and the sum."""
    outside = next((r["k cycles outside"] for r in compiled if (r["system"], r["clips a chip"]) == ("av_mtl_s2s", 32)), None)
    if outside is None:
        raise ValueError(f"{scaling_page.PAGE.name}: found no row of av_mtl_s2s with 32 clips a chip, expected one")
    rest, kernel = 1e3 * outside / CLOCK_HZ, KERNEL_CYCLES * LAYERS * STEPS / CLOCK_HZ
    return [
        {
            "chips": n,
            "outside of loops, ms": 1e3 * rest,
            "recurrence, ms": 1e3 * kernel,
            "all-reduce, ms": 1e3 * free.sum_s(n),
            "of the step": _share(free.sum_s(n) / (rest + kernel + free.sum_s(n))),
            "clips/s": round(32 * n / (rest + kernel + free.sum_s(n))),
        }
        for n in (8, 16, 64, 256)
    ]


def _clips(way: str) -> int:
    return int(re.search(r"(\d+) clips", way).group(1))


def inputs(read: Model) -> list[dict]:
    """A v5e host of 8 chips, and one of 4, at 32 and 256 clips a chip."""
    size, chip = clip_bytes(), CHIPS["v5e"]
    return [
        {
            "chips of the host": n,
            "clips a chip": b,
            "MB a step": n * b * size / 1e6,
            "PCIe, ms": 1e3 * b * size / chip.pcie,
            "reading, ms": 1e3 * n * b / READER_CLIPS_S,
            "work of the chips, ms": 1e3 * read.work_s(b),
            "clips/s wanted": round(n * b / read.work_s(b)),
            "times the reader": n * b / read.work_s(b) / READER_CLIPS_S,
            "GB/s wanted of the disk": n * b * size / read.work_s(b) / 1e9,
        }
        for n in (4, 8)
        for b in (32, 256)
    ]


def stops(systems: dict[str, Model]) -> list[dict]:
    """The clips a chip from which on the chips give 80 % and 50 % of the clips that they do at the most compiled."""
    text = lambda x: "nowhere" if x is None else str(x)
    limits = [(n, "for nothing", math.inf) for n in (1, 8, 256)] + [(n, "today's reader", READER_CLIPS_S) for n in (8, 256)]
    rows = [(name, n, read, model._replace(clips_s=rate)) for name, model in systems.items() for n, read, rate in limits]
    return [
        {
            "system": name,
            "chips": n,
            "input": read,
            "80 % from clips a chip": text(m.least_b(n, 0.8)),
            "50 %": text(m.least_b(n, 0.5)),
            "efficiency at 1": _share(m.efficiency(n, 1)),
            "at 8": _share(m.efficiency(n, 8)),
            "at 32": _share(m.efficiency(n, 32)),
            "100 % is, clips a chip": int(max(m.points)),
        }
        for name, n, read, m in rows
    ]


def largest_batch(epochs: int = 100) -> int:
    """The global batch at which as many epochs of all of Grid take as many steps as the trainings of docs/results_long.md took."""
    return epochs * TRAIN_CLIPS // UPDATES


def summary(compiled: list[dict]) -> list[dict]:
    """What each limit allows av_mtl_s2s on v5e, in words."""
    m, chip = models(compiled)["av_mtl_s2s"], CHIPS["v5e"]
    slow, best = m._replace(clips_s=READER_CLIPS_S), min(m.points, key=m.work_s)
    ms = lambda s: f"{1e3 * s:.3g} ms"
    share = lambda part, b: _share(part / (m.work_s(b) + part))
    got = lambda n: _share(slow.efficiency(n, 32) / m.efficiency(n, 32))
    eaten, worst = 32 / m.work_s(32), max(SHAPES, key=m.sum_s)
    two, sixteen = (ring_s(m.size, hosts, chip.nic) for hosts in (2, 16))
    rows = [
        (
            "steps that learning needs",
            f"a global batch of {largest_batch()}: {largest_batch() // 32} chips of 32 clips",
            f"100 epochs of {TRAIN_CLIPS:,} clips are {UPDATES:,} steps then, as many as the trainings of results_long.md took",
            "paper",
        ),
        (
            "reading, one process a host",
            f"{READER_CLIPS_S / eaten:.1f} chips a host, whatever the batch",
            f"a chip at 32 clips eats {eaten:,.0f} clips/s, the reader gives {READER_CLIPS_S:,}: hosts of 4 chips do "
            f"{got(256)} of what they could, of 8 chips {got(8)}",
            "measured, compiler",
        ),
        (
            "the recurrence",
            f"80 % down to {m.least_b(256, 0.8)} clips a chip, 50 % to {m.least_b(256, 0.5)}; no shorter step under {best:.0f}",
            f"{LAYERS} x {STEPS} steps one after the other: {ms(m.work_s(max(m.points)))} at {max(m.points):.0f} clips, "
            f"{ms(m.work_s(32))} at 32, {ms(m.work_s(best))} at {best:.0f}, {ms(m.work_s(1))} at 1",
            "compiler",
        ),
        (
            "all-reduce over ICI",
            "nowhere up to 256 chips",
            f"{ms(m.sum_s(worst))} at most ({worst} chips): {share(m.sum_s(worst), 32)} of a step of 32 clips, "
            f"{share(m.sum_s(worst), best)} of one of {best:.0f}",
            "paper",
        ),
        (
            "all-reduce over a network",
            "not at 16 hosts without ICI",
            f"{ms(sixteen)}, {share(sixteen, 32)} of a step of 32 clips; 2 hosts {ms(two)}, {share(two, 32)}",
            "paper",
        ),
        ("PCIe", "nowhere", f"{clip_bytes():,} bytes a clip: {ms(32 * clip_bytes() / chip.pcie)} for 32, beside the step", "paper"),
    ]
    return [dict(zip(("limit", "stops at", "why", "from"), row, strict=True)) for row in rows]


def paper_text(compiled: list[dict]) -> str:
    blocks = [f"### {heading}\n\n{scaling_page.table(rows)}" for heading, rows in paper(compiled).items()]
    return "\n\n".join(blocks) + f"\n\nGlobal batch at which 100 epochs are {UPDATES:,} steps: {largest_batch()}."
