"""What traced and compiled programs say of themselves: operations, bytes of HBM, what
devices exchange; by part of the train step.
"""

import math
import re
from collections import Counter, defaultdict
from typing import Any

import jax

from hivit_jax.xla import hlo
from hivit_jax.xla.hlo import Computation, Instruction

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
)


def region_of(name: str) -> str:
    """The part of the train step that an operation belongs to: the innermost of
    `SCOPES` in its name, in main stage and decoder with the branch of the block.

    Args:
      name: such as "jit(train_step)/transpose(jvp(main))/mlp/dot_general".

    Returns:
      Such as "main mlp"; "" for an operation of none of them.
    """
    region = ""
    for scope in re.split(r"[/();]+", name):
        if SCOPES.fullmatch(scope):
            region = scope
        elif scope in ("attention", "mlp") and region in ("main", "decoder"):
            region += " " + scope
    return region


def matmul_flops(jaxpr: Any, loops: bool) -> int:
    """The sum of `matmul_flops_by_region`."""
    return matmul_flops_by_region(jaxpr, loops).total()


def matmul_flops_by_region(jaxpr: Any, loops: bool, outer: str = "") -> Counter:
    """Operations of all matrix products in a traced program, on all devices together.

    Args:
      loops: count the body of a loop as often as it runs, not once. (A Pallas kernel
        counts whole either way.)
      outer: name of what calls the program.
    """
    total = Counter()
    for eqn in jaxpr.eqns:
        name = f"{outer}/{eqn.source_info.name_stack}"
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            depth = math.prod(shape[dim] for dim in contracted)
            flops = 2 * depth * math.prod(eqn.outvars[0].aval.shape)
            total[region_of(name) or OTHER] += flops
        whole = loops or eqn.primitive.name == "pallas_call"
        times = _times(eqn, whole)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                for region, flops in matmul_flops_by_region(inner, whole, name).items():
                    total[region] += times * flops
    return total


def _times(eqn: Any, loops: bool) -> int:
    """How often the program in an equation runs, on all devices together."""
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"] if loops else 1
        case "shard_map":  # shapes in it are those of one device
            mesh = eqn.params["mesh"]
            return math.prod(
                mesh.shape[axis] for axis in eqn.params["newly_manual_axes"]
            )
        case "pallas_call":
            return math.prod(eqn.params["grid_mapping"].grid)
    return 1


def collectives(text: str) -> list[dict[str, Any]]:
    """What the devices exchange in a compiled program, by kind.

    Args:
      text: of the program, as ``Compiled.as_text`` gives it.

    Returns:
      ``{"kind", "count", "bytes_per_step"}``, each kind once: how often it runs, and
      the bytes that it takes in or gives out on one device, whichever is more. What is
      in a loop counts as often as that runs, if the text tells.
    """
    runs, sizes = defaultdict(Counter), {}
    for instruction, here, times in hlo.executed(*hlo.computations_of(text)):
        kind = instruction.opcode.removesuffix("-done")
        if kind in COLLECTIVES:
            # The TPU compiler spreads one over kernels, each with its channel.
            channel = re.search(r"channel_id=\d+", instruction.attributes)
            alike = channel[0] + instruction.shapes if channel else id(instruction)
            key = kind, alike
            runs[key][id(instruction)] += times
            taken = hlo.bytes_taken(instruction, here)
            sizes[key] = max(taken, hlo.bytes_of(instruction.shapes))
    counts, total = Counter(), Counter()
    for key, size in sizes.items():
        times = max(runs[key].values())
        counts[key[0]] += times
        total[key[0]] += times * size
    return [
        {"kind": kind, "count": counts[kind], "bytes_per_step": total[kind]}
        for kind in COLLECTIVES
        if kind in counts
    ]


def bytes_by_region(text: str) -> Counter:
    """Bytes of HBM that each part of the step reads and writes on one device.

    Every kernel reads its operands once and writes its results once, those with the
    padding of their tiles: fusions, matrix products, and custom calls (Pallas, cuDNN)
    alike. Of an operand that it only slices it reads the slices; of one that it updates
    in place it writes the update. Kernels of a loop count as often as it runs, if the
    text tells. What lives in another memory (TPU: VMEM) is free, but not the copies
    that bring it there and back; these belong to the region that uses what they bring,
    or made what they take away. On GPUs, nothing is taken to stay in a cache.

    Args:
      text: of the program after all optimisations.

    Returns:
      By `region_of`; collectives are "exchange", what is left is "other".
    """
    text = re.sub(r"s8\[\d+\]", "s8[0]", text)  # room that cuBLAS asks for
    computations, entry = hlo.computations_of(text)
    total = Counter()

    def add(name, times, outer):
        here = computations[name]
        regions = _regions(here, computations, outer)
        for key, each in here.items():
            region = regions[key] or outer
            if each.opcode in CALLS:
                for called in each.called:
                    add(called, times * hlo.trips(each, computations), region)
            elif each.opcode not in FREE and not each.opcode.endswith(NO_KERNEL):
                if each.opcode.removesuffix("-done") in COLLECTIVES:
                    region = "exchange"
                total[region] += times * _hbm_bytes(each, here, computations)

    add(entry, 1, OTHER)
    return total


SCOPES = re.compile(r"input|embedding|stem\d+|merge|main|latent|decoder|loss|optimizer")
OTHER = "other"
# What is no kernel; what has kernels inside, the ends of asynchronous ones.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
FREE |= {"partition-id", "after-all"}
CALLS = {"call", "while", "conditional", "async-start"}
SLICES = {"slice", "dynamic-slice", "gather"}
VMEM = "S(1)"
NAMED = re.compile(r'op_name="([^"]*)"')
NO_KERNEL = ("-start", "-update", "async-done")


def _regions(
    here: Computation, computations: dict[str, Computation], outer: str
) -> dict[str, str]:
    """`region_of` every instruction by its name, "" where nothing tells.

    Names in a program that is called from `outer` go on from there. A fusion that names
    none has that of most of what is fused. Of what is left, copies out of VMEM belong
    to what made the array, everything else to what uses it.
    """
    found, users = {}, {key: [] for key in here}
    for key, each in here.items():
        fused = computations[each.called[0]] if each.opcode == "fusion" else {}
        votes = Counter(_named(inner, outer) for inner in fused.values())
        del votes[""]
        found[key] = _named(each, outer) or max(votes, key=votes.get, default="")
        for name in each.names:
            users[name].append(key)

    def spread(keys, neighbours, concerns):
        for key in keys:
            if not found[key] and concerns(here[key]):
                regions = (found[name] for name in neighbours(key))
                found[key] = next(filter(None, regions), "")

    def made_by(key):
        return here[key].names

    def leaves(each):
        if each.opcode == "copy-done":
            each = here[each.names[0]]
        return each.opcode == "copy-start" and VMEM in here[each.names[0]].shapes

    spread(here, made_by, lambda each: each.opcode in FREE)
    spread(reversed(here), users.get, lambda each: not leaves(each))
    spread(here, made_by, lambda each: True)
    return found


def _named(instruction: Instruction, outer: str) -> str:
    """The region that an instruction's own name tells, or ""."""
    found = NAMED.search(instruction.attributes)
    return region_of(f"{outer.replace(' ', '/')}/{found[1]}") if found else ""


def _hbm_bytes(
    instruction: Instruction, here: Computation, computations: dict[str, Computation]
) -> int:
    """Bytes of HBM that a kernel reads and writes."""
    names = instruction.names
    if instruction.opcode.endswith("-done"):
        names = here[names[0]].names
    inner = {"": instruction}  # the kernel's computation, and its names of the operands
    inside = dict(enumerate(names))
    if instruction.opcode == "fusion":
        inner = computations[instruction.called[0]]
        inside = {
            int(each.operands.rstrip(")")): key
            for key, each in inner.items()
            if each.opcode == "parameter"
        }
    total = hlo.tiled_bytes(instruction.shapes)
    for number, name in enumerate(names):
        size = hlo.tiled_bytes(here[name].shapes)
        users = [x for x in inner.values() if inside[number] in x.names]
        if size and users and all(x.opcode in SLICES for x in users):
            size = min(size, sum(hlo.tiled_bytes(x.shapes, "") for x in users))
        elif size and [x.opcode for x in users] == ["dynamic-update-slice"]:
            whole, part, *_ = users[0].names
            if whole == inside[number]:  # in place: the result is not written whole
                size = hlo.tiled_bytes((inner | here)[part].shapes, "") - size
        total += size
    return total
