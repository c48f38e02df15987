# SPDX-License-Identifier: Apache-2.0
"""Reads what the TPU compiler says of a program in its text: estimated cycles and
collectives, loops being counted as often as they run.

Estimates are a model of single instructions: without overlap, and without what gathers,
sorts, collectives and custom kernels cost. They rank variants of one program; they are
no measurement.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{|(?:true|false)_computation=)([^}]*)")

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Neither move nor compute: the compiler lays them out, or counts them elsewhere.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "while",
    "conditional",
    "call",
    "opt-barrier",
}
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "s4": 0.5, "u4": 0.5}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name, opcode: as in the text.
        shape: of the result.
        scope: path of the operation in the traced program, "" if unknown.
        rest: operands and attributes.
    """

    name: str
    opcode: str
    shape: str
    scope: str
    rest: str

    @property
    def cycles(self) -> int | None:
        """As the compiler estimates them; None if it does not."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else None

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return _OPERAND.findall(self.rest.split("), ", 1)[0])


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction, how often it runs, and the bytes that it reads and writes."""

    instruction: Instruction
    times: int
    bytes: float
    inside_fusion: bool


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """(name of the entry, instructions of each computation) of a module's text.

    Raises:
        ValueError: the text has no entry.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and " = " not in line.split("{")[0]:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if found and current is not None:
            name, shape, opcode, rest = found.groups()
            scope = _SCOPE.search(rest)
            current.append(
                Instruction(name, opcode, shape, scope[1] if scope else "", rest)
            )
    if entry is None:
        raise ValueError("no ENTRY in this text: want the text of a compiled module")
    return entry, computations


def executed(text: str) -> Iterator[Executed]:
    """Every instruction that runs in one call of a module, loops unrolled in number.

    A loop whose number of rounds the compiler does not know counts as one round.
    Instructions inside a fusion come after it, marked: their cycles and bytes are those
    of the fusion.
    """
    entry, computations = parse(text)

    def visit(name: str, times: int, inside: bool) -> Iterator[Executed]:
        shapes = {one.name: one.shape for one in computations[name]}
        for one in computations[name]:
            read = sum(size_of(shapes[x]) for x in one.operands if x in shapes)
            yield Executed(one, times, read + size_of(one.shape), inside)
            rounds = 1
            if one.opcode == "while":
                trips = _TRIPS.search(one.rest)
                rounds = int(trips[1]) if trips else 1
            fused = inside or one.opcode == "fusion"
            if one.opcode in ("reduce", "sort", "scatter", "map", "reduce-window"):
                continue  # what they call is one scalar's share of their own work
            called = _CALLED.findall(one.rest)
            for names in _BRANCHES.findall(one.rest):
                called += _OPERAND.findall(names) or [names.strip()]
            is_collective = one.opcode.removesuffix("-start") in COLLECTIVES
            for below in called:
                if below in computations and not is_collective:
                    yield from visit(below, times * rounds, fused)

    yield from visit(entry, 1, False)


def size_of(shape: str) -> float:
    """Bytes of a shape, of all parts of a tuple together."""
    total = 0.0
    for kind, sides in _SHAPE.findall(shape):
        width = _BYTES.get(kind)
        if width is None:
            digits = re.search(r"\d+", kind)
            width = int(digits[0]) / 8 if digits else 0
        total += width * math.prod(int(side) for side in sides.split(",") if side)
    return total


def collectives(text: str) -> dict[str, dict[str, int | float]]:
    """{kind: {count, bytes}} of one call; bytes are those of results, on one device."""
    found: dict[str, dict[str, int | float]] = {}
    for one in executed(text):
        kind = one.instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        parts = _SHAPE.findall(one.instruction.shape)
        size = size_of(one.instruction.shape)
        if one.instruction.opcode.endswith("-start") and len(parts) > 1:
            # The tuple holds what was given, too: the result is the last large part.
            size = max(size_of(f"{kind_}[{sides}]") for kind_, sides in parts)
        entry = found.setdefault(kind, {"count": 0, "bytes": 0.0})
        entry["count"] += one.times
        entry["bytes"] += one.times * size
    return found


# Part: what its scope matches; the first that fits. Flax names scopes by modules.
PARTS = {
    "optimiser": r"/optimiser/",
    "decoder attention": r"Decoder.*/attn(/|$)",
    "decoder MLP": r"Decoder.*/fc[12](/|$)",
    "decoder, rest": r"Decoder",
    "encoder attention": r"Encoder.*/attn(/|$)",
    "encoder MLP": r"Encoder.*/fc[12](/|$)",
    "encoder, rest": r"Encoder",
    "heads": r"Head|Prototypes|Classifier",
    "masks, augmentation, loss": r"",
}


def account(text: str, hbm_bandwidth: float, clock: float) -> dict[str, Any]:
    """Estimated seconds of one call, by part.

    Args:
        hbm_bandwidth: bytes per second of one device.
        clock: cycles per second.
    Returns:
        `parts`: {part: {priced, unpriced}} in seconds: the compiler's cycles, and for
        instructions that it does not price the time to move their operands and results
        once, a lower bound; `priced`, `unpriced`: sums; `unpriced_opcodes`: seconds of
        each kind of those.
    """
    parts = {name: {"priced": 0.0, "unpriced": 0.0} for name in PARTS}
    opcodes: dict[str, float] = {}
    for one in executed(text):
        instruction = one.instruction
        if one.inside_fusion or instruction.opcode in _FREE:
            continue
        if instruction.opcode.endswith("-done"):
            continue  # its start has been counted
        part = next(
            name for name, rule in PARTS.items() if re.search(rule, instruction.scope)
        )
        if instruction.cycles is not None:
            parts[part]["priced"] += one.times * instruction.cycles / clock
            continue
        seconds = one.times * one.bytes / hbm_bandwidth
        parts[part]["unpriced"] += seconds
        opcode = instruction.opcode.removesuffix("-start")
        opcodes[opcode] = opcodes.get(opcode, 0.0) + seconds
    return {
        "parts": parts,
        "priced": sum(part["priced"] for part in parts.values()),
        "unpriced": sum(part["unpriced"] for part in parts.values()),
        "unpriced_opcodes": dict(sorted(opcodes.items(), key=lambda x: -x[1])),
    }
