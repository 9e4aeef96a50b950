"""benchmarks.tpu.tpu_compile and hlo_cost on hand-written programs, on programs compiled here, and with libtpu, if installed.

Oracles are calculated by hand, or are the trip counts that XLA itself notes.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hlo_cost():
    from benchmarks.tpu import hlo_cost

    return hlo_cost


@pytest.fixture(scope="module")
def tpu_compile():
    from benchmarks.tpu import tpu_compile

    return tpu_compile


# A loop of 149 trips whose bound is part of its state, containing a loop of 3 trips: 100 cycles per inner trip, 10 per outer trip,
# and 5 before the loop.
PRICE = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
NESTED = f"""HloModule pmap_step, is_scheduled=true

%less (p0: s32[], p1: s32[]) -> pred[] {{
  %p0 = s32[]{{:T(128)}} parameter(0)
  %p1 = s32[]{{:T(128)}} parameter(1)
  ROOT %compare.1 = pred[]{{:T(512)}} compare(%p0, %p1), direction=LT
}}

%inner_condition (s: (s32[], f32[32,256])) -> pred[] {{
  %s = (s32[]{{:T(128)}}, f32[32,256]{{1,0:T(8,128)S(1)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%s), index=0
  %end = s32[]{{:T(128)}} constant(0)
  ROOT %more = pred[]{{:T(512)}} compare(%i, %end), direction=GT
}}

%inner_body (s.1: (s32[], f32[32,256])) -> (s32[], f32[32,256]) {{
  %s.1 = (s32[]{{:T(128)}}, f32[32,256]{{1,0:T(8,128)S(1)}}) parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%s.1), index=0
  %h = f32[32,256]{{1,0:T(8,128)S(1)}} get-tuple-element(%s.1), index=1
  %two = s32[]{{:T(128)}} constant(2)
  %next = s32[]{{:T(128)}} subtract(%i.1, %two)
  %fusion.1 = f32[32,256]{{1,0:T(8,128)S(1)}} fusion(%h), kind=kOutput, calls=%priced_inside, {PRICE % 100}
  ROOT %tuple.1 = (s32[]{{:T(128)}}, /*index=1*/f32[32,256]{{1,0:T(8,128)S(1)}}) tuple(%next, %fusion.1)
}}

%priced_inside (p: f32[32,256]) -> f32[32,256] {{
  %p = f32[32,256]{{1,0:T(8,128)}} parameter(0)
  ROOT %nested = f32[32,256]{{1,0:T(8,128)}} fusion(%p), kind=kLoop, calls=%less, {PRICE % 999}
}}

%condition (s.2: (s32[], f32[32,256], s32[])) -> pred[] {{
  %s.2 = (s32[]{{:T(128)}}, f32[32,256]{{1,0:T(8,128)}}, s32[]{{:T(128)}}) parameter(0)
  %i.2 = s32[]{{:T(128)}} get-tuple-element(%s.2), index=0
  %end.2 = s32[]{{:T(128)}} get-tuple-element(%s.2), index=2
  ROOT %fused = pred[]{{:T(512)}} fusion(%i.2, %end.2), kind=kLoop, calls=%less
}}

%body (s.3: (s32[], f32[32,256], s32[])) -> (s32[], f32[32,256], s32[]) {{
  %s.3 = (s32[]{{:T(128)}}, f32[32,256]{{1,0:T(8,128)}}, s32[]{{:T(128)}}) parameter(0)
  %i.3 = s32[]{{:T(128)}} get-tuple-element(%s.3), index=0
  %h.3 = f32[32,256]{{1,0:T(8,128)}} get-tuple-element(%s.3), index=1
  %end.3 = s32[]{{:T(128)}} get-tuple-element(%s.3), index=2
  %one = s32[]{{:T(128)}} constant(1)
  %next.3 = s32[]{{:T(128)}} add(%i.3, %one)
  %six = s32[]{{:T(128)}} constant(6)
  %start = (s32[]{{:T(128)}}, f32[32,256]{{1,0:T(8,128)S(1)}}) tuple(%six, %h.3)
  %while.1 = (s32[]{{:T(128)}}, f32[32,256]{{1,0:T(8,128)S(1)}}) while(%start), condition=%inner_condition, body=%inner_body
  %h.4 = f32[32,256]{{1,0:T(8,128)S(1)}} get-tuple-element(%while.1), index=1
  %sorted = f32[32,256]{{1,0:T(8,128)}} sort(%h.4), dimensions={{1}}, to_apply=%less
  %fusion.2 = f32[32,256]{{1,0:T(8,128)}} fusion(%sorted), kind=kLoop, calls=%priced_inside, {PRICE % 10}
  ROOT %tuple.3 = (s32[]{{:T(128)}}, f32[32,256]{{1,0:T(8,128)}}, s32[]{{:T(128)}}) tuple(%next.3, %fusion.2, %end.3)
}}

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}

ENTRY %main.1 (x: f32[32,256], n: s32[]) -> f32[32,256] {{
  %x = f32[32,256]{{1,0:T(8,128)}} parameter(0)
  %n = s32[]{{:T(128)}} parameter(1)
  %zero = s32[]{{:T(128)}} constant(0)
  %steps = s32[]{{:T(128)}} constant(149)
  %copy.1 = s32[]{{:T(128)S(1)}} copy(%steps)
  %fusion.3 = f32[32,256]{{1,0:T(8,128)}} fusion(%x), kind=kLoop, calls=%priced_inside, {PRICE % 5}
  %tuple.4 = (s32[]{{:T(128)}}, f32[32,256]{{1,0:T(8,128)}}, s32[]{{:T(128)}}) tuple(%zero, %fusion.3, %copy.1)
  %while.2 = (s32[]{{:T(128)}}, f32[32,256]{{1,0:T(8,128)}}, s32[]{{:T(128)}}) while(%tuple.4), condition=%condition, body=%body
  %h.5 = f32[32,256]{{1,0:T(8,128)}} get-tuple-element(%while.2), index=1
  %g = bf16[8]{{0:T(1024)}} custom-call(%h.5), custom_call_target="tpu_custom_call", operand_layout_constraints={{}}
  %all-reduce.1 = (f32[32,256]{{1,0:T(8,128)}}, bf16[8]{{0}}) all-reduce(%h.5, %g), replica_groups={{{{0,1}}}}, to_apply=%sum
  ROOT %out = f32[32,256]{{1,0:T(8,128)}} get-tuple-element(%all-reduce.1), index=0
}}
"""


def test_costs_of_nested_loops_are_multiplied(hlo_cost):
    total = hlo_cost.tally(hlo_cost.parse(NESTED))
    assert total["cycles"] == 5 + 149 * (10 + 3 * 100)
    assert total["loop_cycles"] == 149 * (10 + 3 * 100)
    assert total["loops of 149"] == 1 and total["loops of 3"] == 149 and total["unknown_loops"] == 0
    assert total["all-reduce"] == 1 and total["all-reduce bytes"] == 32 * 256 * 4 + 8 * 2
    assert total["unpriced"] == 150  # the kernel, and a sort per trip


def test_a_loop_whose_trip_count_depends_on_data_is_unknown(hlo_cost):
    """Its bound is an argument of the program. It is counted once."""
    total = hlo_cost.tally(hlo_cost.parse(NESTED.replace("copy(%steps)", "copy(%n)")))
    assert total["unknown_loops"] == 1 and total["cycles"] == 5 + 10 + 3 * 100


def test_trip_counts_noted_by_the_compiler_are_used(hlo_cost):
    noted = NESTED.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert hlo_cost.tally(hlo_cost.parse(noted))["cycles"] == 5 + 7 * (10 + 3 * 100)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[32,256]{1,0:T(8,128)S(1)}", 32768),
        ("bf16[3]{0:T(1024)(128)(2,1)}", 6),
        ("pred[]{:T(512)}", 1),
        ("(f32[2,2]{1,0}, u32[]{:S(2)}, token[])", 20),
        ("f8e4m3fn[16]{0}", 16),
        ("f32[0,5]{1,0}", 0),
    ],
)
def test_sizes_of_shapes_are_in_bytes(hlo_cost, shape, expected):
    assert hlo_cost.size_bytes(shape) == expected


def test_a_conditional_costs_its_most_expensive_branch(hlo_cost):
    branch = "%{0} (p.{0}: f32[8]) -> f32[8] {{\n  %p.{0} = f32[8]{{0}} parameter(0)\n  ROOT %f.{0} = f32[8]{{0}} "
    branch += 'fusion(%p.{0}), kind=kLoop, calls=%none, backend_config={{"estimated_cycles":"{1}"}}\n}}\n'
    entry = "ENTRY %main (x: f32[8], which: s32[]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n  %which = s32[] parameter(1)\n"
    entry += "  ROOT %c = f32[8]{0} conditional(%which, %x, %x), branch_computations={%cheap, %dear}\n}\n"
    none = "%none (q: f32[8]) -> f32[8] {\n  ROOT %q = f32[8]{0} parameter(0)\n}\n"
    text = none + branch.format("cheap", 3) + branch.format("dear", 40) + entry
    assert hlo_cost.tally(hlo_cost.parse(text))["cycles"] == 40


def scans(outer: int, inner: int) -> str:
    """The compiled text of a scan inside a reversed scan."""
    import jax
    import jax.numpy as jnp

    def step(carry, x):
        carry = jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), carry, None, length=inner)[0]
        return carry + x, carry.sum()

    run = lambda c, x: jax.lax.scan(step, c, x, reverse=True)
    return jax.jit(run).lower(jnp.zeros((4, 4)), jnp.zeros((outer, 4, 4))).compile().as_text()


def test_trip_counts_equal_those_that_xla_notes(hlo_cost):
    """On this backend XLA notes the trip count of each loop."""
    text = scans(149, 11)
    noted = sorted(map(int, re.findall(r'"known_trip_count":\{"n":"(\d+)"', text)))
    assert noted == [11, 149]
    total = hlo_cost.tally(hlo_cost.parse(re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)))
    assert {k: n for k, n in total.items() if "loops" in k} == {"loops of 149": 1, "loops of 11": 149}


def test_batch_shapes_are_those_of_training_batches(tpu_compile, tiny_dir):
    from avsi_jax.data import input_pipeline
    from avsi_jax.runtime import devices

    records = input_pipeline.Records(input_pipeline.find_dataset(tiny_dir), "train")
    real = devices.split(next(input_pipeline.train_batches(records, 8, seed=0)), "shard_map")
    shapes = tpu_compile.batch_shapes(8)
    assert {k: (v.shape, v.dtype) for k, v in shapes.items()} == {k: (v.shape, v.dtype) for k, v in real.items()}


def test_systems_are_the_configs_named_after_their_system(tpu_compile):
    from avsi_jax.models import systems

    assert sorted(tpu_compile.systems()) == sorted(systems.SYSTEMS)


def test_failures_are_retried_and_results_are_cached(tpu_compile, tmp_path, monkeypatch):
    answers = [subprocess.CompletedProcess([], 2, "", "noise\nRuntimeError: no such chip\n"),
               subprocess.CompletedProcess([], 0, 'noise\n{"system": "a_si", "estimated_cycles": 7}\n', "")]  # fmt: skip
    monkeypatch.setattr(tpu_compile.subprocess, "run", lambda *_, **__: answers.pop(0))
    monkeypatch.setattr(tpu_compile, "code_key", lambda system, command: "-".join(c.strip("-=") for c in command))
    ask = lambda until=float("inf"): tpu_compile.row_of(tmp_path, 1.0, until, system="a_si")
    assert ask(0.0) == {"system": "a_si", "failed": "not compiled yet"}
    assert ask() == {"system": "a_si", "failed": "RuntimeError: no such chip"}
    assert ask() == ask() == {"system": "a_si", "estimated_cycles": 7} and answers == []


def test_rows_are_cached_by_the_program_not_by_the_code(tpu_compile, monkeypatch):
    import types

    import jax

    monkeypatch.setattr(tpu_compile, "versions", lambda: ["libtpu 1"])
    args = types.SimpleNamespace(system="a_si", topology="v5e:2x4", batch_per_chip=8, lstm="joined", dtype="")
    lowered = [jax.jit(f).lower(1.0) for f in (lambda x: x + 1, lambda other_name: 1 + other_name * 1 - 0, lambda x: x + 1)]
    first, other, again = (tpu_compile.program_key(each, args) for each in lowered)
    assert first == again != other
    args.batch_per_chip = 16
    assert tpu_compile.program_key(lowered[0], args) != first


def test_the_reason_of_a_failure_is_the_compilers_message(tpu_compile):
    """libtpu aborts the process; its crash handler prints more lines after the compiler's message."""
    log = "W1 x\nF1123 13:20:22.2  9 cost_model.cc:6896] Reduction not modeled\n    @  0x7f  f()\nE1123 13:20:23 1] RAW: signal 6\n"
    assert tpu_compile.reason(log) == "Reduction not modeled"
    assert tpu_compile.reason("Traceback\nValueError: no\n\n") == "ValueError: no" and tpu_compile.reason("") == ""


def test_every_row_of_the_table_has_the_same_number_of_cells(tpu_compile):
    good = {"system": "a_si", "topology": "v6e:4x4", "devices": 16, "bytes_per_chip": 2e9, "collectives": 1,
            "collective_bytes": 3e6, "estimated_cycles": 1000, "estimated_loop_cycles": 500, "batch_per_chip": 32,
            "loops": "3x149", "unknown_loops": 0, "unpriced": 4, "compile_s": 9.0}  # fmt: skip
    lines = tpu_compile.table([good, good | {"estimated_ms": 1.5}, {"system": "x", "failed": "why"}], ["system", "topology"])
    assert len({line.count("|") for line in lines}) == 1 and "50%" in lines[2] and "failed: why" in lines[4]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make tpu")
def test_a_step_compiles_for_a_real_chip():
    """Config tiny: two layers of 149 time steps, one scan each for the forward and the backward pass, one sum over chips."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.tpu.tpu_compile",
        *"--system=tiny --topology=v5e:2x4 --batch_per_chip=8 --json".split(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["devices"] == 8 and row["device_kind"].startswith("TPU v5")
    assert row["unknown_loops"] == 0 and row["estimated_cycles"] > row["estimated_loop_cycles"] > 0
    assert row["collectives"] >= 1 and row["collective_bytes"] >= 4 * row["parameters"]
