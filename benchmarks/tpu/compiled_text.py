"""The text of a compiled XLA program -> what one run of it costs, by the compiler's own estimates.

XLA prints computations of instructions; on a TPU each fusion carries `estimated_cycles`. A loop's trips, where they are not noted,
are counted by running the integers that its condition looks at. Nothing here imports jax or knows a machine.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

# ---- the program's text --------------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    shape: str  # as printed, layouts included
    op: str
    inside: str  # between the parentheses
    after: str  # attributes
    operands: list[str]


class Program(NamedTuple):
    """The computations of a compiled program: name -> {instruction's name: Instruction}; the root is under 'ROOT' as well."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


BITS = {"pred": 8, "token": 0}
COSTLY = ("fusion", "sort", "gather", "scatter", "reduce-window", "convolution")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


def parse(text: str) -> Program:
    """The text of `compiled.as_text()`, as XLA prints it on any backend."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if line[:1] not in ("", " ", "}") and line.endswith("{") and "->" in line:
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line).group(1)
            current = computations.setdefault(name, {})
            entry = name if line.startswith("ENTRY") else entry
        elif current is not None and (head := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
            current[head.group(2)] = instruction = _instruction(line[head.end() :])
            if head.group(1):
                current["ROOT"] = instruction
    return Program(computations, entry)


def _instruction(text: str) -> Instruction:
    shape = text[: _closing(text)] if text.startswith("(") else text.split(" ", 1)[0]
    op, _, rest = text[len(shape) :].strip().partition("(")
    end = _closing("(" + rest) - 2
    return Instruction(shape, op, rest[:end], rest[end + 1 :], re.findall(r"%([\w.\-]+)", rest[:end]))


def _closing(text: str) -> int:
    """Where the parenthesis that opens `text` is closed: the index after it."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i + 1
    raise ValueError(f"the program's text: found no closing parenthesis in {text[:80]!r}")


def size_bytes(shape: str) -> int:
    """Bytes of a printed shape: an array's, or all of a tuple's; padding by layouts not counted."""
    total = 0
    for kind, dims in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        bits = BITS.get(kind) if kind in BITS else int(re.search(r"\d+", kind).group())
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


# ---- how often a loop runs -----------------------------------------------------------------------------------------------------


class Unknown(Exception):
    """The value depends on data."""


COMPARE = {"LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__, "EQ": int.__eq__, "NE": int.__ne__}
ARITHMETIC = {"add": int.__add__, "subtract": int.__sub__, "multiply": int.__mul__, "minimum": min, "maximum": max,
              "and": int.__and__, "or": int.__or__}  # fmt: skip
PASSES_ON = ("copy", "copy-start", "copy-done", "bitcast", "reshape", "convert", "optimization-barrier")
MOST_TRIPS = 100_000


def _no_argument(_):
    raise Unknown


def trip_count(program: Program, caller: str, loop: Instruction, argument: Callable = _no_argument) -> int | None:
    """Trips of a `while`: as the compiler notes them, else counted by running the loop's integers; None where data decides.

    `argument`: k -> the k-th argument of the computation that the loop stands in, where known.
    """
    if noted := re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', loop.after):
        return int(noted.group(1))
    condition, body = (re.search(rf"{part}=%?([\w.\-]+)", loop.after).group(1) for part in ("condition", "body"))
    state = functools.cache(lambda i: _element(program, caller, loop.operands[0], i, argument))
    try:
        for trips in range(MOST_TRIPS):
            before = functools.partial(lambda state, _: state, state)
            if not _value(program, condition, "ROOT", before):
                return trips
            state = functools.cache(functools.partial(_element, program, body, "ROOT", argument=before))
    except Unknown:
        return None
    return None


def _element(program, computation, name, index, argument):
    """The integer at `index` of a tuple."""
    found = program.computations[computation][name]
    if found.op == "tuple":
        return _value(program, computation, found.operands[index], argument)
    value = _value(program, computation, name, argument)
    if not callable(value):
        raise Unknown
    return value(index)


def _value(program, computation, name, argument):
    """An integer, a bool, or for a tuple the function index -> value; argument(k): the k-th argument of the computation."""
    found = program.computations[computation][name]
    evaluate = functools.partial(_operand, program, computation, found, argument)
    if found.op == "constant" and re.fullmatch(r"-?\d+|true|false", found.inside):
        return {"true": 1, "false": 0}.get(found.inside) if found.inside[0] in "tf" else int(found.inside)
    if found.op == "parameter":
        return argument(int(found.inside))
    if found.op == "get-tuple-element":
        return _element(program, computation, found.operands[0], int(re.search(r"index=(\d+)", found.after).group(1)), argument)
    if found.op == "tuple":
        return evaluate
    if found.op in PASSES_ON:
        return evaluate(0)
    if found.op == "compare":
        return int(COMPARE[re.search(r"direction=(\w+)", found.after).group(1)](evaluate(0), evaluate(1)))
    if found.op in ARITHMETIC:
        return ARITHMETIC[found.op](evaluate(0), evaluate(1))
    if found.op == "select":
        return evaluate(1) if evaluate(0) else evaluate(2)
    if found.op in ("fusion", "call") and (called := re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", found.after)):
        return _value(program, called.group(1), "ROOT", evaluate)
    raise Unknown


# ---- what a step costs ---------------------------------------------------------------------------------------------------------


def tally(program: Program, computation: str = "", argument: Callable = _no_argument) -> collections.Counter:
    """What one run of a computation (default: of the program) costs, loops counted as often as they run.

    Keys: cycles (the compiler's estimates added up), loop_cycles (those inside loops), 'loops of N' for loops of N trips,
    unknown_loops (counted once), '<collective>' and '<collective> bytes', and unpriced: runs of kernels, sorts, gathers and the
    like that the compiler gives no estimate for.
    """
    computation = computation or program.entry
    total: collections.Counter = collections.Counter()
    for name, found in program.computations[computation].items():
        if name == "ROOT":
            continue
        called = [c for c in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", found.after) if c in program.computations]
        kind = found.op.removesuffix("-start")
        if kind in COLLECTIVES:
            total[kind] += 1
            total[f"{kind} bytes"] += sum(size_bytes(program.computations[computation][o].shape) for o in found.operands)
            continue
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', found.after):
            total["cycles"] += int(cycles.group(1))
        if found.op == "while":
            total += _loop(program, computation, found, argument)
        elif found.op == "conditional":
            total += max((tally(program, name) for name in _branches(found)), key=lambda t: t["cycles"])
        elif found.op == "fusion":  # priced as a whole; only a collective may hide inside
            hidden = tally(program, called[0])
            total += collections.Counter({k: n for k, n in hidden.items() if k.startswith(COLLECTIVES)})
        elif found.op in ("call", "async-start") and called:
            total += tally(program, called[0], functools.partial(_operand, program, computation, found, argument))
        total["unpriced"] += not cycles and (found.op in COSTLY or "tpu_custom_call" in found.after)
    return total


def _branches(found: Instruction) -> list[str]:
    """The computations that a `conditional` chooses from."""
    named = re.search(r"branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=(\S+)", found.after)
    return re.findall(r"[\w.\-]+", " ".join(filter(None, named.groups())))


def _operand(program, computation, found, argument, k):
    """The value of an instruction's k-th operand: what a computation that it calls gets as its k-th argument."""
    return _value(program, computation, found.operands[k], argument)


def _loop(program: Program, caller: str, found: Instruction, argument: Callable) -> collections.Counter:
    trips = trip_count(program, caller, found, argument)
    once = tally(program, re.search(r"body=%?([\w.\-]+)", found.after).group(1))
    total = collections.Counter({k: n * (1 if trips is None else trips) for k, n in once.items()})
    total["loop_cycles"] = total["cycles"]
    total["unknown_loops" if trips is None else f"loops of {trips}"] += 1
    return total
