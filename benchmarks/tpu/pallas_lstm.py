"""An LSTM as one TPU kernel: recurrent weights and state stay in VMEM over all time steps, instead of a loop of small XLA fusions.

`scan_pallas` has the arguments, values and gradients of avsi_jax.models.lstm.scan_joined. One step of the kernel's grid does
`chunk` time steps of both directions; meanwhile Pallas fetches the next projected inputs and stores the last results. docs/tpu.md
describes what it is for; it is not part of the package.

    python -m benchmarks.tpu.pallas_lstm [--topology=v5e:2x4] [--batch=32] [--inputs=512] [--chunk=8] [--dtype=bfloat16]

compiles one layer, forward and backward, with the kernel and with scan_joined, using libtpu's compiler, and prints their costs.
Shapes: T time steps, D directions, B clips, I inputs, H units; gates in the order ifgo.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.tpu import hlo_cost

CHUNK = 8  # time steps per grid step
VMEM_LIMIT = 64 * 2**20


def _gates(x, units):
    """(B, 4H) pre-activations -> i, f, g, o."""
    i, f, g, o = (x[:, k * units : (k + 1) * units] for k in range(4))
    return jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)


def _forward_kernel(projected, recurrent, h_out, c_before_out, gates_out, c, h, *, dtype):
    """projected (chunk, D, B, 4H), recurrent (D, H, 4H) -> h, c of the previous step (chunk, D, B, H), gates (chunk, D, B, 4H)."""

    @pl.when(pl.program_id(0) == 0)
    def _():
        c[...] = jnp.zeros_like(c)
        h[...] = jnp.zeros_like(h)

    chunk, directions, _, width = projected.shape

    def step(t, _):
        for d in range(directions):
            x = projected[t, d] + jnp.dot(h[d].astype(dtype), recurrent[d], preferred_element_type=jnp.float32)
            i, f, g, o = _gates(x, width // 4)
            c_before_out[t, d] = c[d]
            c[d] = f * c[d] + i * g
            h[d] = o * jnp.tanh(c[d])
            h_out[t, d] = h[d]
            gates_out[t, d] = jnp.concatenate([i, f, g, o], -1)
        return 0

    jax.lax.fori_loop(0, chunk, step, 0, unroll=True)


def _backward_kernel(dy, c_before, gates, transposed, d_out, dc, dh, *, steps, dtype):
    """Runs backwards in time. dy, c_before (chunk, D, B, H), gates (chunk, D, B, 4H), transposed (D, 4H, H) -> d_out.

    d_out (chunk, D, B, 4H) is the gradient of the pre-activations.
    """

    @pl.when(pl.program_id(0) == 0)
    def _():
        dc[...] = jnp.zeros_like(dc)
        dh[...] = jnp.zeros_like(dh)

    chunk, directions, _, units = dy.shape
    first = (pl.num_programs(0) - 1 - pl.program_id(0)) * chunk

    def step(k, _):
        t = chunk - 1 - k

        @pl.when(first + t < steps)  # the last chunk may extend past the end
        def _():
            for d in range(directions):
                i, f, g, o = (gates[t, d, :, n * units : (n + 1) * units] for n in range(4))
                before = c_before[t, d]
                tanh_c = jnp.tanh(f * before + i * g)
                by_h = dh[d] + dy[t, d]
                by_c = dc[d] + by_h * o * (1 - tanh_c**2)
                by_gates = [by_c * g * i * (1 - i), by_c * before * f * (1 - f), by_c * i * (1 - g**2), by_h * tanh_c * o * (1 - o)]
                by_gates = jnp.concatenate(by_gates, -1)
                d_out[t, d] = by_gates
                dc[d] = by_c * f
                dh[d] = jnp.dot(by_gates.astype(dtype), transposed[d], preferred_element_type=jnp.float32)

        return 0

    jax.lax.fori_loop(0, chunk, step, 0, unroll=True)


def _call(kernel, arrays, weights, outs, chunk, order, interpret):
    """Runs a kernel over chunks of the arrays' first axis; order: grid step -> chunk."""
    steps, directions, batch, _ = arrays[0].shape
    block = lambda a: pl.BlockSpec((chunk, *a.shape[1:]), lambda n: (order(n), 0, 0, 0))
    state = pltpu.VMEM((directions, batch, weights.shape[-1] // 4 if len(outs) > 1 else outs[0] // 4), jnp.float32)
    shapes = [jax.ShapeDtypeStruct((steps, directions, batch, width), jnp.float32) for width in outs]
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(steps, chunk),),
        in_specs=[*map(block, arrays), pl.BlockSpec(weights.shape, lambda n: (0, 0, 0))],
        out_specs=[block(s) for s in shapes],
        out_shape=shapes,
        scratch_shapes=[state, state],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
    )(*arrays, weights)


def _joined(w):
    """(D, 4, I, H) -> (D, I, 4H)."""
    return jnp.moveaxis(w, 1, 2).reshape(w.shape[0], w.shape[2], -1)


def _run(x, wx, wh, b, chunk, dtype, interpret):
    """(h, c of the previous step, gates)."""
    units = wh.shape[-1]
    projected = jnp.einsum("tdbi,dik->tdbk", x, _joined(wx)) + b.reshape(1, b.shape[0], 1, -1)
    kernel = functools.partial(_forward_kernel, dtype=dtype)
    return _call(kernel, [projected], _joined(wh).astype(dtype), [units, units, 4 * units], chunk, lambda n: n, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def scan_pallas(x, wx, wh, b, chunk: int = CHUNK, dtype=jnp.float32, interpret: bool = False) -> jax.Array:
    """x (T, D, B, I), Wx (D, 4, I, H), Wh (D, 4, H, H), b (D, 4, H) -> h (T, D, B, H), from a zero state.

    dtype: of the factors of the recurrent product; sums and state are float32. interpret: run on any backend, slowly.
    """
    return _run(x, wx, wh, b, chunk, dtype, interpret)[0]


def _forward(x, wx, wh, b, chunk, dtype, interpret):
    h, c_before, gates = _run(x, wx, wh, b, chunk, dtype, interpret)
    return h, (x, wx, wh, h, c_before, gates)


def _backward(chunk, dtype, interpret, residual, dy):
    x, wx, wh, h, c_before, gates = residual
    steps, units = x.shape[0], wh.shape[-1]
    kernel = functools.partial(_backward_kernel, steps=steps, dtype=dtype)
    transposed = jnp.swapaxes(_joined(wh), 1, 2).astype(dtype)
    last = pl.cdiv(steps, chunk) - 1
    (d,) = _call(kernel, [dy, c_before, gates], transposed, [4 * units], chunk, lambda n: last - n, interpret)
    split = lambda w: jnp.moveaxis(w.reshape(*w.shape[:-1], 4, units), 2, 1)  # (D, I, 4H) -> (D, 4, I, H)
    before = jnp.concatenate([jnp.zeros_like(h[:1]), h[:-1]])
    dwx, dwh = (split(jnp.einsum("tdbi,tdbk->dik", a, d)) for a in (x, before))
    return jnp.einsum("tdbk,dik->tdbi", d, _joined(wx)), dwx, dwh, d.sum((0, 2)).reshape(wh.shape[0], 4, units)


scan_pallas.defvjp(_forward, _backward)


# ---- compilation ---------------------------------------------------------------------------------------------------------------


def compile_layer(scan: Callable, args: argparse.Namespace) -> dict:
    """The cost of one layer's loss and gradient, compiled for the topology's chips, each chip independent of the others."""
    from jax.experimental import topologies

    from benchmarks.tpu.tpu_compile import TOPOLOGIES

    os.environ["TPU_ACCELERATOR_TYPE"], _, options = TOPOLOGIES[args.topology]
    devices = topologies.get_topology_desc(args.topology, platform="tpu", **options).devices
    inputs, units = args.inputs, args.units
    shapes = [(args.steps, 2, args.batch, inputs), (2, 4, inputs, units), (2, 4, units, units), (2, 4, units)]
    shapes = [jax.ShapeDtypeStruct((len(devices), *shapes[0]) if s is shapes[0] else s, jnp.float32) for s in shapes]
    gradient = jax.grad(lambda *a: (scan(*a) ** 2).sum(), argnums=(0, 1, 2, 3))
    lowered = jax.pmap(gradient, axis_name="chips", in_axes=(0, None, None, None), devices=devices).lower(*shapes)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    if args.keep_text:
        with open(args.keep_text, "a") as file:
            file.write(compiled.as_text())
    total = hlo_cost.tally(hlo_cost.parse(compiled.as_text()))
    return {
        "bytes": memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "estimated_cycles": total["cycles"],
        "in_loops": total["loop_cycles"],
        "unpriced": total["unpriced"],
        "compile_s": round(seconds, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """The command `python -m benchmarks.tpu.pallas_lstm`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x4", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=149, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="clips per chip (default: %(default)s)")
    parser.add_argument("--inputs", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--units", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="time steps per grid step (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="type of the recurrent product's factors (default: that of TPUs)")
    parser.add_argument("--keep_text", metavar="FILE", help="append the texts of the compiled programs to this file")
    parser.add_argument("--only", choices=("kernel", "scan"), help="default: both")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    from avsi_jax.models import lstm

    scans = {"kernel": lambda *a: scan_pallas(*a, args.chunk, jnp.dtype(args.dtype)), "scan": lstm.scan_joined}
    for name, scan in scans.items():
        if args.only in (None, name):
            print(name, compile_layer(scan, args), flush=True)
    return 0


if __name__ == "__main__":
    from benchmarks.tpu.tpu_compile import LIBTPU_ENV

    os.environ.update(LIBTPU_ENV)
    sys.exit(main())
