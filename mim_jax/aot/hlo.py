# SPDX-License-Identifier: Apache-2.0
"""Reads costs from the text (HLO) of a compiled program: collectives and, for a TPU,
the cycles that the compiler estimates. A loop's cost counts once for every round.

The estimates model single instructions, without overlap, and leave out gathers, sorts,
collectives and custom kernels. For a GPU the compiler gives no estimates; there is only
a lower bound for each instruction. Use them to rank variants of one program: they are
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
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_DIRECTION = re.compile(r"direction=(\w+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
# The cost that a custom kernel's author declared.
_KERNEL_BYTES = re.compile(r'"cost_estimate":\{.*?"bytes_accessed":"(\d+)"')
_KERNEL_FLOPS = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_BREAKS = re.compile(r"\n(?=\"|\}\})")
_TARGET = re.compile(r'custom_call_target="([\w$]+)"')
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
# Custom calls that are annotations for the compiler and cost nothing.
_NOTES = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
    "Sharding",
}
# cuDNN's attention: number of matrix products per call, each of all queries with all
# keys.
_ATTENTION_PRODUCTS = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
# The same of JAX's splash attention, by the beginning of its kernels' names. They
# declare no cost.
_SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
_SPLASH_QUERIES = 2  # number of the operand
_LANES = 128  # of a TPU's matrix units, which work whole tiles
# Instructions without a cost of their own: they move no data and compute nothing, or
# the instructions in the computations they call are counted instead.
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
# These read only as much of their first operand as they return.
_CUTS = ("slice", "dynamic-slice", "gather")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "s4": 0.5, "u4": 0.5}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name, opcode: as in the text.
        shape: shape of the result, as in the text.
        scope: path of the operation in the traced program, "" if unknown.
        rest: text of the operands and attributes.
    """

    name: str
    opcode: str
    shape: str
    scope: str
    rest: str

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of cycles, or None if it gives none."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else None

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return _OPERAND.findall(self.rest.split("), ", 1)[0])


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction as it runs in one call of a module.

    Attributes:
        instruction: the line of the text.
        times: how often it runs.
        read, written: bytes that it must at least read and write, each time.
        flops: FLOPs of its matrix products, each time.
        inside_fusion: whether it is part of a fusion.
        carried: the collective inside it, if it is a fusion with one.
    """

    instruction: Instruction
    times: int
    read: float
    written: float
    flops: float
    inside_fusion: bool
    carried: Instruction | None = None


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """(name of the entry computation, {computation: instructions}) of a module's text.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    # Attributes of a kernel may hold line breaks.
    for line in _BREAKS.sub(" ", text).splitlines():
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
    """Every instruction that runs in one call of a module, with its number of runs.

    An instruction in a loop runs once per round; if the text does not tell the number
    of rounds, it counts as one. Instructions inside a fusion come after it, marked
    `inside_fusion`: the fusion's cycles and bytes already include theirs.
    """
    entry, computations = parse(text)

    def visit(name: str, times: int, inside: bool) -> Iterator[Executed]:
        shapes = {one.name: one.shape for one in computations[name]}
        for one in computations[name]:
            operands = [size_of(shapes[x]) for x in one.operands if x in shapes]
            moved, flops = _moved(one, operands), _products(one, shapes, computations)
            carried = None
            if one.opcode == "fusion":
                body = computations.get(_CALLED.findall(one.rest)[0], [])
                moved = _moved_by_fusion(one, body) if body else moved
                carried = next((it for it in body if it.opcode in COLLECTIVES), None)
            yield Executed(one, times, *moved, flops, inside, carried)
            rounds = 1
            if one.opcode == "while":
                rounds = _rounds(one, computations)
            fused = inside or one.opcode == "fusion"
            if one.opcode in ("reduce", "sort", "scatter", "map", "reduce-window"):
                continue  # they call a scalar function, part of their own cost
            called = _CALLED.findall(one.rest)
            for names in _BRANCHES.findall(one.rest):
                called += _OPERAND.findall(names) or [names.strip()]
            is_collective = one.opcode.removesuffix("-start") in COLLECTIVES
            for below in called:
                if below in computations and not is_collective:
                    yield from visit(below, times * rounds, fused)

    yield from visit(entry, 1, False)


def _moved(one: Instruction, operands: list[float]) -> tuple[float, float]:
    """(read, written): bytes that an instruction must at least read and write."""
    kernel = _KERNEL_BYTES.search(one.rest)
    if kernel:
        return float(kernel[1]), 0.0
    read, result = sum(operands, 0.0), size_of(one.shape)
    if one.opcode.endswith("-start") and result > read:
        result -= read  # the result tuple contains the operands too
    opcode = one.opcode.removesuffix("-start")
    if opcode in _CUTS:
        return result, result  # it reads only this much of the first operand
    if opcode in ("dynamic-update-slice", "scatter"):
        changed = sum(operands[1:], 0.0)  # the rest is not moved
        return changed, changed
    return read, result


def _moved_by_fusion(one: Instruction, body: list[Instruction]) -> tuple[float, float]:
    """(read, written) of a fusion.

    If the fusion reads or changes only a part of an array, only that part counts.
    """
    within = {inner.name: inner for inner in body}

    def source(name: str) -> Instruction:
        inner = within[name]
        return source(inner.operands[0]) if inner.opcode == "bitcast" else inner

    read: dict[str, float] = {}
    for inner in body:
        if inner.opcode == "bitcast":
            continue
        for number, name in enumerate(inner.operands):
            if name not in within or source(name).opcode != "parameter":
                continue
            taken = size_of(within[name].shape)
            if inner.opcode in _CUTS and number == 0:
                taken = size_of(inner.shape)
            elif inner.opcode == "dynamic-update-slice" and number == 0:
                taken = 0.0
            whole, key = size_of(source(name).shape), source(name).name
            read[key] = min(whole, read.get(key, 0.0) + taken)
    last = body[-1]
    results = last.operands if last.opcode == "tuple" else [last.name]
    written = 0.0
    for result in map(source, results):
        part = result.opcode == "dynamic-update-slice"
        shape = within[result.operands[1]].shape if part else result.shape
        written += size_of(shape)
    return sum(read.values(), 0.0), min(written, size_of(one.shape))


def _products(
    one: Instruction,
    shapes: dict[str, str],
    computations: dict[str, list[Instruction]],
) -> float:
    """FLOPs of the matrix products in an instruction; a multiply-add counts as two."""
    kernel, called = _KERNEL_FLOPS.search(one.rest), _TARGET.search(one.rest)
    if kernel:
        return float(kernel[1])
    if called and called[1] in _ATTENTION_PRODUCTS:
        queries, keys = (_sides(shapes[name]) for name in one.operands[:2])
        product = 2.0 * math.prod(queries) * keys[1]  # each "b n a c"
        return _ATTENTION_PRODUCTS[called[1]] * product
    for name, products in _SPLASH_PRODUCTS.items():
        if one.opcode == "custom-call" and one.name.startswith(name):
            *rows, tokens, size = _sides(shapes[one.operands[_SPLASH_QUERIES]])
            lanes = math.ceil(size / _LANES) * _LANES
            return products * 2.0 * math.prod(rows) * tokens**2 * lanes
    if one.opcode == "fusion":
        return sum(
            _products(inner, {it.name: it.shape for it in inside}, computations)
            for name in _CALLED.findall(one.rest)
            for inside in [computations.get(name, [])]
            for inner in inside
        )
    contracted = _CONTRACTED.search(one.rest)
    if one.opcode != "dot" or not contracted:
        return 0.0
    sides = _sides(shapes[one.operands[0]])
    axes = [int(axis) for axis in contracted[1].split(",") if axis]
    return 2.0 * math.prod(_sides(one.shape)) * math.prod(sides[axis] for axis in axes)


def _sides(shape: str) -> list[int]:
    """Sides of the first array of a shape."""
    return [int(side) for side in _SHAPE.findall(shape)[0][1].split(",") if side]


def _rounds(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """Number of rounds of a while instruction; 1 if the text does not tell.

    The compiler may state the number; the TPU compiler does not. Otherwise it is read
    from the condition: JAX's loops count from 0 and run while the counter is less than
    a constant.
    """
    trips = _TRIPS.search(loop.rest)
    if trips:
        return int(trips[1])
    bounds, directions, names = [], [], _CONDITION.findall(loop.rest)
    for one in (one for name in names for one in computations.get(name, [])):
        names += _CALLED.findall(one.rest)  # a condition may be a fusion
        if one.opcode == "compare":
            directions += _DIRECTION.findall(one.rest)
        if one.opcode == "constant" and one.shape.startswith("s32[]"):
            bounds.append(int(one.rest.split(")")[0]))
    return bounds[0] if len(bounds) == 1 and directions == ["LT"] else 1


def size_of(shape: str) -> float:
    """Bytes of a shape; for a tuple, the sum over its parts."""
    total = 0.0
    for kind, sides in _SHAPE.findall(shape):
        width = _BYTES.get(kind)
        if width is None:
            digits = re.search(r"\d+", kind)
            width = int(digits[0]) / 8 if digits else 0
        total += width * math.prod(int(side) for side in sides.split(",") if side)
    return total


def _begun_before(one: Instruction, seen: set[str]) -> bool:
    """Whether a collective in a fusion belongs to one that was seen before.

    When the TPU compiler overlaps a collective with other work, it writes the
    collective three times: in a fusion that starts it, in the overlapping fusion, and
    in a fusion that ends it. All three have one channel id.

    Args:
        seen: channel ids so far; this one is added.
    """
    channel = _CHANNEL.search(one.rest)
    if not channel:
        return False
    known = channel[1] in seen
    seen.add(channel[1])
    return known


def collectives(text: str) -> dict[str, dict[str, int | float]]:
    """{kind: {count, bytes}} of one call; bytes are those of results, on one device."""
    found: dict[str, dict[str, int | float]] = {}
    seen: set[str] = set()
    for one in executed(text):
        kind = one.instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if one.inside_fusion and _begun_before(one.instruction, seen):
            continue
        parts = _SHAPE.findall(one.instruction.shape)
        size = size_of(one.instruction.shape)
        if one.instruction.opcode.endswith("-start") and len(parts) > 1:
            # The result tuple contains the operand too: take its largest part.
            size = max(size_of(f"{kind_}[{sides}]") for kind_, sides in parts)
        entry = found.setdefault(kind, {"count": 0, "bytes": 0.0})
        entry["count"] += one.times
        entry["bytes"] += one.times * size
    return found


# Part of the step: pattern of its scopes; the first match counts. Flax names scopes
# after modules.
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


@dataclasses.dataclass(frozen=True)
class Speed:
    """Speed of one device.

    Attributes:
        flops: bf16 FLOPs per second.
        hbm: bytes per second from and to its memory.
        wires: bytes per second to other devices, in one direction.
        clock: cycles per second; NaN if the meaning of the compiler's cycles is
            unknown.
    """

    flops: float
    hbm: float
    wires: float
    clock: float


def account(text: str, speed: Speed, devices: int) -> dict[str, Any]:
    """Estimated seconds of one call, by part.

    Args:
        text: of the compiled module.
        speed: of one device.
        devices: number of devices that work together.
    Returns:
        `parts`: {part: {priced, unpriced, meanwhile}} in seconds.
        `priced`: instructions for which the compiler estimates cycles.
        `unpriced`: a lower bound for the others: the time to read and write their
        operands and results once (for collectives: to send them round a ring), or the
        time of their matrix products' FLOPs, whichever is longer.
        `meanwhile`: the same bound for instructions that the compiler starts early and
        awaits later.
        Then the sum of each over the parts, and `unpriced_opcodes`: {opcode: seconds}
        of the instructions without an estimate.
    """
    columns = ("priced", "unpriced", "meanwhile")
    parts: dict[str, dict[str, float]] = {}
    for name in PARTS:
        parts[name] = dict.fromkeys(columns, 0.0)
    opcodes: dict[str, float] = {}
    seen: set[str] = set()

    def part_of(scope: str) -> dict[str, float]:
        return next(
            parts[name] for name, rule in PARTS.items() if re.search(rule, scope)
        )

    def on_wires(opcode: str, size: float) -> float:
        # In a ring, each of the `devices` parts passes over all wires but one.
        passes = 2 if opcode == "all-reduce" else 1
        return passes * size * (devices - 1) / devices / speed.wires

    for one in executed(text):
        instruction, carried = one.instruction, one.carried
        if one.inside_fusion or instruction.opcode in _FREE:
            continue
        if instruction.opcode.endswith("-done"):
            continue  # its -start instruction was counted
        called = _TARGET.search(instruction.rest)
        if called and called[1] in _NOTES:
            continue
        goes_on = carried is not None and _begun_before(carried, seen)
        if instruction.cycles is not None:
            seconds = one.times * instruction.cycles / speed.clock
            part_of(instruction.scope)["priced"] += seconds
            continue
        if goes_on:
            continue
        opcode = instruction.opcode.removesuffix("-start")
        begun, scope = instruction.opcode.endswith("-start"), instruction.scope
        if carried is not None:
            opcode, begun, scope = carried.opcode, True, carried.scope
            seconds = on_wires(opcode, size_of(carried.shape))
        elif opcode in COLLECTIVES:
            seconds = on_wires(opcode, max(one.read, one.written))
        else:
            seconds = (one.read + one.written) / speed.hbm
            seconds = max(seconds, one.flops / speed.flops)
        part_of(scope)["meanwhile" if begun else "unpriced"] += one.times * seconds
        opcodes[opcode] = opcodes.get(opcode, 0.0) + one.times * seconds
    return {
        "parts": parts,
        **{name: sum(part[name] for part in parts.values()) for name in columns},
        "unpriced_opcodes": dict(sorted(opcodes.items(), key=lambda x: -x[1])),
    }
