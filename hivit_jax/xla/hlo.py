"""The text of a compiled program (HLO) as instructions: what runs, how often, and the
bytes of arrays.
"""

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
    def names(self) -> list[str]:
        """Names of the operands."""
        return NAMES.findall(self.operands)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        found = CALLED.findall(self.attributes)
        return [name for names in found for name in NAMES.findall(names)]


Computation = dict[str, Instruction]  # by name
LINE = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
CALLED = re.compile(r"(?:calls|body|to_apply|computations?)=(\{[^}]*\}|%[\w.-]+)")
NAMES = re.compile(r"%([\w.#-]+)")
ELEMENT = re.compile(r"%(([\w.-]+)#(\d+))")  # such as %name#2


def computations_of(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the one that is run."""
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
            here = computations[name]
            for element, whole, index in ELEMENT.findall(operands):
                here[element] = _element(here[whole].shapes, whole, int(index))
            here[key] = Instruction(shapes, opcode, operands, attributes)
    return computations, entry


def _element(shapes: str, name: str, index: int) -> Instruction:
    """The instruction that takes one array out of a tuple; since JAX 0.12 programs do
    not always write it out.
    """
    taken = f"index={index}"
    return Instruction(_parts(shapes)[index], "get-tuple-element", f"%{name}", taken)


@cache
def _parts(shapes: str) -> list[str]:
    """The shapes in a tuple, such as ``(f32[8]{0}, (s32[], pred[]))``."""
    depth, parts = 0, [""]
    for each in shapes[1:-1]:
        depth += (each in "([{") - (each in ")]}")
        if each == "," and not depth:
            parts.append("")
        else:
            parts[-1] += each
    return parts


def executed(
    computations: dict[str, Computation], name: str, times: int = 1
) -> Iterator[tuple[Instruction, Computation, int]]:
    """Every instruction that runs, fused ones too, its computation, and how often it
    runs.

    Args:
      name: of the computation that is run, `times` times.
    """
    for instruction in computations[name].values():
        yield instruction, computations[name], times
        if instruction.opcode.endswith(("-done", "-update")):
            continue
        for each in instruction.called:
            again = times * trips(instruction, computations)
            yield from executed(computations, each, again)


def trips(instruction: Instruction, computations: dict[str, Computation]) -> int:
    """How often an instruction runs what it calls: once, or if it is a loop as often as
    it says, or the number that its condition holds.
    """
    attributes = instruction.attributes
    if instruction.opcode != "while":
        return 1
    if found := re.search(r"known_trip_count\D*(\d+)", attributes):
        return int(found[1])
    condition = re.search(r"condition=%([\w.-]+)", attributes)[1]
    numbers = [
        re.match(r"\d+", each.operands)
        for each in computations[condition].values()
        if each.opcode == "constant"
    ]
    return max((int(number[0]) for number in numbers if number), default=1)


def bytes_taken(instruction: Instruction, here: Computation) -> int:
    """Bytes of the operands; of a -done those of its -start."""
    names = instruction.names
    if instruction.opcode.endswith("-done"):
        names = here[names[0]].names
    return sum(bytes_of(here[name].shapes) for name in names)


def bytes_of(shapes: str) -> int:
    """Bytes of arrays such as ``(f32[8,128]{1,0}, pred[])``."""
    total = 0
    for kind, bits, sides in re.findall(r"([a-z]+)(\d*)\w*\[([\d,]*)\]", shapes):
        bits = int(bits) if bits else 8 * (kind == "pred")
        total += bits * math.prod(map(int, filter(None, sides.split(",")))) // 8
    return total


ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([\d,]*):?([^}]*)\})?")


def tiled_bytes(shapes: str, free: str = "S(") -> int:
    """As `bytes_of`, with what tiles pad, without arrays in another memory than HBM.

    A layout such as ``{1,0:T(8,128)(2,1)S(1)}`` lists the sides from the minor one on;
    the first tile, its minor side last, pads them; ``S`` is the memory.

    Args:
      free: what the layout of an array that does not count has; "": all count.
    """
    total = 0
    for kind, bits, sides, order, tiles in ARRAY.findall(shapes):
        if free and free in tiles:
            continue
        bits = int(bits) if bits else 8 * (kind == "pred")
        sides = list(map(int, filter(None, sides.split(","))))
        minor = [sides[int(side)] for side in order.split(",") if side] or sides
        if tile := re.match(r"T\(([\d,]+)\)", tiles):
            tile = list(map(int, reversed(tile[1].split(","))))
            minor += [1] * (len(tile) - len(minor))
            for place, unit in enumerate(tile):
                minor[place] = -(-minor[place] // unit) * unit
        total += bits * math.prod(minor) // 8
    return total
