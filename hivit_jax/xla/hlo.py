"""Parser of compiled programs (HLO text): instructions, run counts, bytes of arrays."""

import math
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple


class Instruction(NamedTuple):
    """A line of HLO text: ``%name = shapes opcode(operands), attributes``."""

    shapes: str
    opcode: str
    operands: str
    attributes: str

    @property
    def operand_names(self) -> list[str]:
        """Names of the operands."""
        return NAMES.findall(self.operands)

    @property
    def called(self) -> list[str]:
        """Names of the called computations, without the condition of a loop."""
        return NAMES.findall(" ".join(CALLED.findall(self.attributes)))


Computation = dict[str, Instruction]  # by name
LINE = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
CALLED = re.compile(r"(?:calls|body|to_apply|computations?)=(\{[^}]*\}|%[\w.-]+)")
NAMES = re.compile(r"%([\w.#-]+)")
ELEMENT = re.compile(r"%(([\w.-]+)#(\d+))")  # an element of a tuple, such as %name#2
# Type, bits, dimensions, minor-to-major order, and tiling and memory, such as
# bf16[64,128]{1,0:T(8,128)(2,1)S(1)}. The layout in braces is optional.
ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([\d,]*):?([^}]*)\})?")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations of a program by name, and the name of its entry."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = NAMES.search(line)[1]
            computations[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif match := LINE.match(line):
            key, shapes, opcode, rest = match.groups()
            operands, _, attributes = rest.partition("), ")
            computation = computations[name]
            for element, whole, index in ELEMENT.findall(operands):
                computation[element] = _tuple_element(
                    computation[whole].shapes, whole, int(index)
                )
            computation[key] = Instruction(shapes, opcode, operands, attributes)
    return computations, entry


def _tuple_element(shapes: str, name: str, index: int) -> Instruction:
    """Return the get-tuple-element instruction of a tuple element.

    Programs since JAX 0.12 may omit this instruction and write ``%name#index``.
    """
    return Instruction(
        _split_tuple(shapes)[index], "get-tuple-element", f"%{name}", f"index={index}"
    )


@cache
def _split_tuple(shapes: str) -> list[str]:
    """Split a tuple such as ``(f32[8]{0}, (s32[], pred[]))`` into its elements."""
    depth, parts = 0, [""]
    for character in shapes[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def executed(
    computations: dict[str, Computation], name: str, times: int = 1
) -> Iterator[tuple[Instruction, Computation, int]]:
    """Yield every instruction that runs, its computation, and its number of runs.

    Includes the instructions inside fusions.

    Args:
      name: name of the computation that runs.
      times: number of runs of that computation.
    """
    for instruction in computations[name].values():
        yield instruction, computations[name], times
        # -start, -update and -done name the same computation. Count it at -start.
        if instruction.opcode.endswith(("-done", "-update")):
            continue
        for called in instruction.called:
            count = times * trip_count(instruction, computations)
            yield from executed(computations, called, count)


def trip_count(instruction: Instruction, computations: dict[str, Computation]) -> int:
    """Return the number of runs of the called computations per run of an instruction.

    The number for a loop is the known trip count, or else the largest integer constant
    in the loop's condition. The number for any other instruction is 1.
    """
    attributes = instruction.attributes
    if instruction.opcode != "while":
        return 1
    if known := re.search(r"known_trip_count\D*(\d+)", attributes):
        return int(known[1])
    condition = re.search(r"condition=%([\w.-]+)", attributes)[1]
    constants = [
        re.match(r"\d+", each.operands)
        for each in computations[condition].values()
        if each.opcode == "constant"
    ]
    return max((int(constant[0]) for constant in constants if constant), default=1)


def arrays_read(instruction: Instruction, computation: Computation) -> list[str]:
    """Return the names of the arrays that an instruction reads.

    An asynchronous ``-done`` reads the operands of its ``-start``.
    """
    if instruction.opcode.endswith("-done"):
        instruction = computation[instruction.operand_names[0]]
    return instruction.operand_names


def array_bytes(shapes: str) -> int:
    """Return the bytes of arrays such as ``(f32[8,128]{1,0}, pred[])``, unpadded."""
    return sum(bits * math.prod(dims) // 8 for bits, dims, _, _ in _arrays(shapes))


def tiled_bytes(shapes: str, excluded: str = "S(") -> int:
    """Return the bytes of arrays including the padding of their tiles.

    By default only arrays in HBM count. A layout such as
    ``{1,0:T(8,128)(2,1)S(1)}`` lists the dimensions from minor to major, and the sizes
    of each tile from major to minor. The minor dimensions are padded to multiples of
    the first tile's sizes. ``S(1)`` marks an array in memory 1, which is not HBM.

    Args:
      excluded: arrays whose layout contains this text do not count; "": all arrays
        count.
    """
    total = 0
    for bits, dims, order, tiling_and_memory in _arrays(shapes):
        if excluded and excluded in tiling_and_memory:
            continue
        minor_to_major = [dims[int(dim)] for dim in order.split(",") if dim] or dims
        if match := re.match(r"T\(([\d,]+)\)", tiling_and_memory):
            tile = list(map(int, reversed(match[1].split(","))))
            minor_to_major += [1] * (len(tile) - len(minor_to_major))
            for index, size in enumerate(tile):
                minor_to_major[index] = -(-minor_to_major[index] // size) * size
        total += bits * math.prod(minor_to_major) // 8
    return total


def _arrays(shapes: str) -> Iterator[tuple[int, list[int], str, str]]:
    """Yield (bits per element, dimensions, order, tiling and memory) of each array."""
    for dtype, bits, dims, order, tiling_and_memory in ARRAY.findall(shapes):
        bits = int(bits) if bits else 8 * (dtype == "pred")
        sizes = [int(dim) for dim in dims.split(",") if dim]
        yield bits, sizes, order, tiling_and_memory
