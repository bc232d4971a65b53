"""Count operations, HBM bytes and collectives of programs, by region of the step.

Operations are counted in traced programs (jaxprs), bytes and collectives in the text of
compiled programs (HLO).
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
# Named scopes of the train step.
SCOPES = re.compile(
    r"input|embedding|stem\d+|stage\d+|merge|main|latent|decoder|loss|optimizer"
)
BLOCKS = re.compile(r"stage\d+|main|decoder")  # regions with two branches per block
OTHER = "other"
# Instructions that move no bytes.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
FREE |= {"partition-id", "after-all"}
# Instructions whose bytes count in the computations that they call.
CALLS = {"call", "while", "conditional", "async-start"}
# Endings of asynchronous opcodes whose bytes count at another part of the operation.
NO_KERNEL = ("-start", "-update", "async-done")
SLICES = {"slice", "dynamic-slice", "gather"}
VMEM = "S(1)"  # marks the layout of an array in the VMEM of a TPU
OP_NAME = re.compile(r'op_name="([^"]*)"')


def region_of(name: str) -> str:
    """Return the region of the train step that an operation belongs to.

    The region is the innermost of `SCOPES` in the name. In the main stage, the decoder
    and the stages of a Swin, the branch of the block (attention or mlp) is appended.

    Args:
      name: such as "jit(train_step)/transpose(jvp(main))/mlp/dot_general".

    Returns:
      The region, such as "main mlp"; "" for an operation outside of all regions.
    """
    region = ""
    for scope in re.split(r"[/();]+", name):
        if SCOPES.fullmatch(scope):
            region = scope
        elif scope in ("attention", "mlp") and BLOCKS.match(region):
            region += " " + scope
    return region


def matmul_flops(jaxpr: Any, count_iterations: bool) -> int:
    """Return the operations of all matrix products of a traced program.

    Args:
      count_iterations: see `matmul_flops_by_region`.
    """
    return matmul_flops_by_region(jaxpr, count_iterations).total()


def matmul_flops_by_region(
    jaxpr: Any, count_iterations: bool, outer: str = ""
) -> Counter:
    """Count the operations of all matrix products of a traced program.

    The counts are totals over all devices.

    Args:
      count_iterations: True: the body of a `scan` counts once per iteration; False:
        once. Pallas kernels always count once per grid point, and scans inside them
        once per iteration.
      outer: name stack of the equation that calls the program.
    """
    total = Counter()
    for eqn in jaxpr.eqns:
        name = f"{outer}/{eqn.source_info.name_stack}"
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            contracted_size = math.prod(shape[dim] for dim in contracted)
            flops = 2 * contracted_size * math.prod(eqn.outvars[0].aval.shape)
            total[region_of(name) or OTHER] += flops
        count_inner = count_iterations or eqn.primitive.name == "pallas_call"
        runs = _run_count(eqn, count_inner)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                counts = matmul_flops_by_region(inner, count_inner, name)
                for region, flops in counts.items():
                    total[region] += runs * flops
    return total


def _run_count(eqn: Any, count_iterations: bool) -> int:
    """Return the number of runs of an equation's inner program on all devices."""
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"] if count_iterations else 1
        case "shard_map":  # the program runs on each device
            mesh = eqn.params["mesh"]
            return math.prod(
                mesh.shape[axis] for axis in eqn.params["newly_manual_axes"]
            )
        case "pallas_call":
            return math.prod(eqn.params["grid_mapping"].grid)
    return 1


def collectives(text: str) -> list[dict[str, Any]]:
    """Return count and bytes of each kind of collective in a compiled program.

    A collective in a loop counts once per iteration, see `hlo.trip_count`.

    Args:
      text: the program, as returned by ``Compiled.as_text``.

    Returns:
      One ``{"kind", "count", "bytes_per_step"}`` per kind: the number of runs per step,
      and the sum over these runs of the larger of input and output bytes on one device.
    """
    runs, sizes = defaultdict(Counter), {}
    for instruction, computation, times in hlo.executed(*hlo.parse(text)):
        kind = instruction.opcode.removesuffix("-done")
        if kind in COLLECTIVES:
            # The TPU compiler may split a collective over several kernels. These have
            # the same channel and shapes, and count once.
            channel = re.search(r"channel_id=\d+", instruction.attributes)
            part = channel[0] + instruction.shapes if channel else id(instruction)
            key = kind, part
            runs[key][id(instruction)] += times
            operands = hlo.arrays_read(instruction, computation)
            sizes[key] = max(
                sum(hlo.array_bytes(computation[name].shapes) for name in operands),
                hlo.array_bytes(instruction.shapes),
            )
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
    """Count the bytes of HBM that each region reads and writes on one device.

    The counts follow these rules:

    - Every kernel reads its operands once and writes its results once, including the
      padding of their tiles. Every instruction that moves bytes is a kernel: fusions,
      matrix products, custom calls (Pallas, cuDNN), copies and others.
    - A kernel that only slices an operand reads only the slices. A kernel that updates
      an operand in place writes only the update.
    - Kernels in a loop count once per iteration, see `hlo.trip_count`.
    - Arrays in another memory (VMEM of TPUs) are free, but copies from and to HBM
      count. A copy belongs to the region that uses or produced the array.
    - On GPUs no array is assumed to stay in a cache.

    Args:
      text: the program after all optimizations.

    Returns:
      {region: bytes}. Collectives have the region "exchange". Other kernels without a
      known region have the region "other".
    """
    # Empty the workspaces of cuBLAS (s8), which would otherwise count as outputs.
    text = re.sub(r"s8\[\d+\]", "s8[0]", text)
    computations, entry = hlo.parse(text)
    total = Counter()

    def add(name, times, outer):
        computation = computations[name]
        regions = _regions(computation, computations, outer)
        for key, instruction in computation.items():
            opcode = instruction.opcode
            region = regions[key] or outer
            if opcode in CALLS:
                for called in instruction.called:
                    runs = times * hlo.trip_count(instruction, computations)
                    add(called, runs, region)
            elif opcode not in FREE and not opcode.endswith(NO_KERNEL):
                if opcode.removesuffix("-done") in COLLECTIVES:
                    region = "exchange"
                total[region] += times * _hbm_bytes(
                    instruction, computation, computations
                )

    add(entry, 1, OTHER)
    return total


def _regions(
    computation: Computation, computations: dict[str, Computation], outer: str
) -> dict[str, str]:
    """Return the region of every instruction by name; "" if unknown.

    The region comes from the first rule that yields one:

    1. the ``op_name`` of the instruction, as a continuation of `outer`;
    2. for a fusion, the most frequent region of its fused instructions;
    3. for an instruction of `FREE`, the region of its operands;
    4. except for copies out of VMEM, the region of its users;
    5. the region of its operands.

    Args:
      outer: region of the instruction that calls this computation.
    """
    regions, users = {}, {key: [] for key in computation}
    for key, instruction in computation.items():
        fused = {}
        if instruction.opcode == "fusion":
            fused = computations[instruction.called[0]]
        votes = Counter(_named_region(inner, outer) for inner in fused.values())
        del votes[""]
        regions[key] = _named_region(instruction, outer) or max(
            votes, key=votes.get, default=""
        )
        for name in instruction.operand_names:
            users[name].append(key)

    def spread(keys, neighbors, applies):
        for key in keys:
            if not regions[key] and applies(computation[key]):
                candidates = (regions[name] for name in neighbors(key))
                regions[key] = next(filter(None, candidates), "")

    def operands(key):
        return computation[key].operand_names

    def leaves_vmem(instruction):
        if instruction.opcode == "copy-done":
            instruction = computation[instruction.operand_names[0]]
        return (
            instruction.opcode == "copy-start"
            and VMEM in computation[instruction.operand_names[0]].shapes
        )

    spread(computation, operands, lambda instruction: instruction.opcode in FREE)
    spread(reversed(computation), users.get, lambda x: not leaves_vmem(x))
    spread(computation, operands, lambda instruction: True)
    return regions


def _named_region(instruction: Instruction, outer: str) -> str:
    """Return the region in an instruction's ``op_name``, or ""."""
    name = OP_NAME.search(instruction.attributes)
    return region_of(f"{outer.replace(' ', '/')}/{name[1]}") if name else ""


def _hbm_bytes(
    instruction: Instruction,
    computation: Computation,
    computations: dict[str, Computation],
) -> int:
    """Return the bytes of HBM that a kernel reads and writes."""
    operands = hlo.arrays_read(instruction, computation)
    # Instructions inside the kernel, and names of the operands inside the kernel.
    inner, inner_names = {"": instruction}, dict(enumerate(operands))
    if instruction.opcode == "fusion":
        inner = computations[instruction.called[0]]
        inner_names = {
            int(parameter.operands.rstrip(")")): key
            for key, parameter in inner.items()
            if parameter.opcode == "parameter"
        }
    total = hlo.tiled_bytes(instruction.shapes)
    for index, name in enumerate(operands):
        size = hlo.tiled_bytes(computation[name].shapes)
        users = [x for x in inner.values() if inner_names[index] in x.operand_names]
        if size and users and all(x.opcode in SLICES for x in users):
            slices = sum(hlo.tiled_bytes(x.shapes, excluded="") for x in users)
            size = min(size, slices)
        elif size and [x.opcode for x in users] == ["dynamic-update-slice"]:
            target, update_name, *_ = users[0].operand_names
            if target == inner_names[index]:
                # The update is in place: replace the size of the whole result, which is
                # already in the total, by the size of the update.
                update = (inner | computation)[update_name]
                size = hlo.tiled_bytes(update.shapes, excluded="") - size
        total += size
    return total
