"""Estimates the cost of one run of a compiled XLA program from its text.

XLA prints computations of instructions; on a TPU each fusion carries `estimated_cycles`. Where the trip count of a loop is not
noted, it is found by evaluating the integers that the loop's condition depends on. This module imports no jax.
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
    """One instruction of a computation."""

    shape: str  # as printed, including layouts
    op: str
    inside: str  # text between the parentheses
    after: str  # attributes
    operands: list[str]


class Program(NamedTuple):
    """The computations of a compiled program: name -> {name: Instruction}; the root instruction is also under 'ROOT'."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


BITS = {"pred": 8, "token": 0}
COSTLY = ("fusion", "sort", "gather", "scatter", "reduce-window", "convolution")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


def parse(text: str) -> Program:
    """The program in the text of `compiled.as_text()`, as XLA prints it on any backend."""
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
    """The index after the parenthesis that closes the first one of `text`."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i + 1
    raise ValueError(f"program text: no closing parenthesis in {text[:80]!r}")


def size_bytes(shape: str) -> int:
    """Bytes of a printed shape, an array's or all of a tuple's, without padding by layouts."""
    total = 0
    for kind, dims in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        bits = BITS.get(kind) if kind in BITS else int(re.search(r"\d+", kind).group())
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


# ---- trip counts of loops ------------------------------------------------------------------------------------------------------


class UnknownValue(Exception):
    """The value depends on data."""


COMPARE = {"LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__, "EQ": int.__eq__, "NE": int.__ne__}
ARITHMETIC = {"add": int.__add__, "subtract": int.__sub__, "multiply": int.__mul__, "minimum": min, "maximum": max,
              "and": int.__and__, "or": int.__or__}  # fmt: skip
PASS_THROUGH = ("copy", "copy-start", "copy-done", "bitcast", "reshape", "convert", "optimization-barrier")
MAX_TRIPS = 100_000


def _no_argument(_):
    raise UnknownValue


def trip_count(program: Program, caller: str, loop: Instruction, argument: Callable = _no_argument) -> int | None:
    """Trips of a `while`: as noted by the compiler, else by evaluating the loop's integers; None where they depend on data.

    argument: k -> the k-th argument of the computation that contains the loop, if known.
    """
    if noted := re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', loop.after):
        return int(noted.group(1))
    condition, body = (re.search(rf"{part}=%?([\w.\-]+)", loop.after).group(1) for part in ("condition", "body"))
    state = functools.cache(lambda i: _element(program, caller, loop.operands[0], i, argument))
    try:
        for trips in range(MAX_TRIPS):
            before = functools.partial(lambda state, _: state, state)
            if not _value(program, condition, "ROOT", before):
                return trips
            state = functools.cache(functools.partial(_element, program, body, "ROOT", argument=before))
    except UnknownValue:
        return None
    return None


def _element(program: Program, computation: str, name: str, index: int, argument: Callable):
    """The integer at `index` of a tuple."""
    instruction = program.computations[computation][name]
    if instruction.op == "tuple":
        return _value(program, computation, instruction.operands[index], argument)
    value = _value(program, computation, name, argument)
    if not callable(value):
        raise UnknownValue
    return value(index)


def _value(program: Program, computation: str, name: str, argument: Callable):
    """An integer, a bool, or for a tuple the function index -> value; argument(k): the k-th argument of the computation."""
    instruction = program.computations[computation][name]
    evaluate = functools.partial(_operand, program, computation, instruction, argument)
    op, inside, after = instruction.op, instruction.inside, instruction.after
    if op == "constant" and re.fullmatch(r"-?\d+|true|false", inside):
        return {"true": 1, "false": 0}.get(inside) if inside[0] in "tf" else int(inside)
    if op == "parameter":
        return argument(int(inside))
    if op == "get-tuple-element":
        return _element(program, computation, instruction.operands[0], int(re.search(r"index=(\d+)", after).group(1)), argument)
    if op == "tuple":
        return evaluate
    if op in PASS_THROUGH:
        return evaluate(0)
    if op == "compare":
        return int(COMPARE[re.search(r"direction=(\w+)", after).group(1)](evaluate(0), evaluate(1)))
    if op in ARITHMETIC:
        return ARITHMETIC[op](evaluate(0), evaluate(1))
    if op == "select":
        return evaluate(1) if evaluate(0) else evaluate(2)
    if op in ("fusion", "call") and (called := re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", after)):
        return _value(program, called.group(1), "ROOT", evaluate)
    raise UnknownValue


# ---- cost ----------------------------------------------------------------------------------------------------------------------


def tally(program: Program, computation: str = "", argument: Callable = _no_argument) -> collections.Counter:
    """The cost of one run of a computation (default: of the program), with loops counted as often as they run.

    Keys: cycles (sum of the compiler's estimates), loop_cycles (those inside loops), 'loops of N' for loops of N trips,
    unknown_loops (counted once), '<collective>' and '<collective> bytes', and unpriced: runs of kernels, sorts, gathers and similar
    operations without an estimate.
    """
    computation = computation or program.entry
    total: collections.Counter = collections.Counter()
    for name, instruction in program.computations[computation].items():
        if name == "ROOT":
            continue
        op, after = instruction.op, instruction.after
        called = [c for c in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", after) if c in program.computations]
        kind = op.removesuffix("-start")
        if kind in COLLECTIVES:
            total[kind] += 1
            total[f"{kind} bytes"] += sum(size_bytes(program.computations[computation][o].shape) for o in instruction.operands)
            continue
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', after):
            total["cycles"] += int(cycles.group(1))
        if op == "while":
            total += _loop(program, computation, instruction, argument)
        elif op == "conditional":
            total += max((tally(program, name) for name in _branches(instruction)), key=lambda t: t["cycles"])
        elif op == "fusion":  # has one estimate; count only collectives inside
            inside = tally(program, called[0])
            total += collections.Counter({k: n for k, n in inside.items() if k.startswith(COLLECTIVES)})
        elif op in ("call", "async-start") and called:
            total += tally(program, called[0], functools.partial(_operand, program, computation, instruction, argument))
        total["unpriced"] += not cycles and (op in COSTLY or "tpu_custom_call" in after)
    return total


def _branches(conditional: Instruction) -> list[str]:
    """The computations that a `conditional` chooses from."""
    match = re.search(r"branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=(\S+)", conditional.after)
    return re.findall(r"[\w.\-]+", " ".join(filter(None, match.groups())))


def _operand(program: Program, computation: str, instruction: Instruction, argument: Callable, k: int):
    """The value of an instruction's k-th operand, which a computation that it calls gets as its k-th argument."""
    return _value(program, computation, instruction.operands[k], argument)


def _loop(program: Program, caller: str, loop: Instruction, argument: Callable) -> collections.Counter:
    """The cost of a `while`."""
    trips = trip_count(program, caller, loop, argument)
    once = tally(program, re.search(r"body=%?([\w.\-]+)", loop.after).group(1))
    total = collections.Counter({k: n * (1 if trips is None else trips) for k, n in once.items()})
    total["loop_cycles"] = total["cycles"]
    total["unknown_loops" if trips is None else f"loops of {trips}"] += 1
    return total
