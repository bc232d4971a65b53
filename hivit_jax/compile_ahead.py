"""The train step, compiled for TPUs or GPUs that are not at hand: does it fit, what
does it compute, move and exchange, how fast could it be. Runs nothing, reads no images.
"""

import hashlib
import importlib.util
import json
import math
import os
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from hivit_jax.chips import CHIPS, GIB, Chip
from hivit_jax.compiling import compile_step
from hivit_jax.config import to_json
from hivit_jax.describe import resolved_schedule
from hivit_jax.errors import ConfigError
from hivit_jax.metrics import prepare_workdir, say
from hivit_jax.sharding import BATCH, make_mesh
from hivit_jax.step import prepare_step

# The package with the compiler.
PLUGINS = {
    name: "jax-cuda13-plugin" if name.startswith("h") else "libtpu" for name in CHIPS
}
EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:16x16, v4:4x4x4, h100:8, h200:8"
# What the TPU compiler would ask of the machine it is on, were that a TPU's.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it compiles in any number of processes
}
# Autotuning would need the GPU.
GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
# XLA's description of a Hopper SXM; NVIDIA's Hopper tuning guide and device queries.
HOPPER = """\
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_core: 233472  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth:.0f}  device_memory_size: {memory}
}}
platform_name: "CUDA"
device_description_str: "NVIDIA {name}"
dnn_version_info {{ major: 9  minor: 12 }}
runtime_version {{ major: 13 }}
"""


COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
)


def compile_ahead(config: Any, workdir: str | Path) -> dict[str, Any]:
    """Compiles the config's train step for `config.topology`, and reports on it.

    Returns:
      What DIR/compile.json says; see `examine`, and with `config.search_batch` also
      `largest_batch`.

    Raises:
      HivitError: an unknown topology, a compiler that is not installed, a mesh or batch
        that does not fit the topology.
    """
    jax.config.update("jax_platforms", "cpu")  # whatever else is here is left alone
    # A cache would be of no use to others, and what it gives leaves no text.
    jax.config.update("jax_enable_compilation_cache", False)
    devices = devices_of(config.topology)
    prepare_workdir(Path(workdir))
    report = examine(config, devices)
    if config.search_batch:
        report |= largest_batch(config, devices, report)
    path = Path(workdir) / "compile.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)
    say(summary(report))
    say(f"written: {path}")
    return report


def devices_of(topology: str) -> Sequence[jax.Device]:
    """Devices to compile for, of a topology such as "v5e:16x16" or "h100:8".

    Raises:
      ConfigError: an unknown chip or shape, or a compiler that is not installed.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise ConfigError(
            f"unknown topology {topology!r}; expected CHIP:SHAPE, CHIP one of "
            f"{', '.join(CHIPS)}, such as {EXAMPLES}"
        )
    gpu = PLUGINS[name] != "libtpu"
    if gpu and not re.fullmatch("[1-8]", shape):
        raise ConfigError(f"topology={topology!r}; expected {name}:1 to {name}:8")
    if importlib.util.find_spec(PLUGINS[name].replace("-", "_")) is None:
        raise ConfigError(
            f"topology={topology!r} needs the compiler in {PLUGINS[name]}, which is "
            f"not installed; pip install 'hivit-jax[{'cuda' if gpu else 'tpu'}]'"
        )
    how: dict[str, Any] = {"platform": "cuda" if gpu else "tpu"}
    if gpu:
        target = HOPPER.format(name=name.upper(), **CHIPS[name]._asdict())
        how |= {"topology": f"1x1x{shape}", "target_config": target}
    else:
        how["topology_name"] = topology
        for variable, value in TPU_ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
    if name == "v4":
        how["chip_config_name"] = "megacore"  # a chip's two cores are one device
    try:
        return topologies.get_topology_desc(**how).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"topology={topology!r}: {reason}\nexpected a shape that {name} comes in; "
            f"known: {EXAMPLES} and the like"
        ) from error


def examine(config: Any, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """What the compiler tells of a train step on these devices, as JSON values.

    Operations and bytes accessed are the TPU compiler's counts. It counts the body of a
    loop once; they are multiplied by what loops make of the matrix products. For GPUs,
    where there are no such counts, operations are those of the matrix products and
    bytes those of `bytes_by_region`.

    ``regions`` has for each part of the step the bytes that `bytes_by_region` reads out
    of the program, and the operations of its matrix products. Their sums,
    ``hbm_bytes_per_image`` the one, are not the two totals: the TPU compiler counts
    what stays in VMEM like what comes from HBM, and operations that are no matrix
    products. The roofline takes the bytes of HBM.

    ``hbm_bytes_per_device`` has but total and limit, and what follows is None, if the
    compiler says that the program does not fit.
    """
    mesh = make_mesh(
        config.mesh, config.batch_size, config.optimizer.accumulate_steps, devices
    )
    shards = math.prod(mesh.shape[axis] for axis in BATCH[0])
    name = config.topology.partition(":")[0]
    chip = CHIPS[name]
    report = {
        "topology": config.topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "model": config.model.name,
        "config_sha256": hashlib.sha256(to_json(config).encode()).hexdigest(),
        "batch_size": config.batch_size,
        "batch_per_device": config.batch_size // shards,
        "versions": {each: metadata.version(each) for each in ("jax", PLUGINS[name])},
    }
    step, arguments, shardings = train_step(config, mesh)
    began, busy = time.perf_counter(), time.process_time()
    memory, hlo = {"total": None, "limit": chip.memory}, ""
    try:
        with tempfile.TemporaryDirectory() as dump:
            # The compiler's own text: jaxlib cannot read all that libtpu hands it.
            options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
            options |= GPU_OPTIONS if PLUGINS[name] != "libtpu" else {}
            compiled = compile_step(step, arguments, shardings, options)
            [text] = Path(dump).glob("*after_optimizations.txt")
            hlo, memory = text.read_text(), memory_of(compiled, chip)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if needed := re.search(r"\(([\d.]+)([KMGT])\) exceeds", str(error)):
            unit = 2 ** (10 * " KMGT".index(needed[2]))
            memory["total"] = int(float(needed[1]) * unit)
    report |= {
        "compile_seconds": round(time.perf_counter() - began, 1),
        "compile_cpu_seconds": round(time.process_time() - busy, 1),
        "fits": bool(hlo) and memory["total"] <= memory["limit"],
        "hbm_bytes_per_device": memory,
        "flops_per_image": None,
        "bytes_accessed_per_image": None,
        "hbm_bytes_per_image": None,
        "regions": None,
        "collectives": None,
        "roofline": None,
    }
    if not hlo:
        return report
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(step)(*arguments).jaxpr
    computed, read = matmul_flops_by_region(jaxpr, loops=True), bytes_by_region(hlo)
    matmuls, once = computed.total(), matmul_flops(jaxpr, loops=False)
    images = config.batch_size / mesh.size
    if cost := compiled.cost_analysis():
        flops = cost["flops"] * matmuls / once / images
        moved = cost["bytes accessed"] * matmuls / once / images
    else:
        flops = matmuls / config.batch_size
        moved = read.total() / images
    exchanged = collectives(hlo)
    return report | {
        "flops_per_image": flops,
        "bytes_accessed_per_image": moved,
        "hbm_bytes_per_image": read.total() / images,
        "regions": {
            region: {
                "bytes_per_image": read[region] / images,
                "flops_per_image": computed[region] / config.batch_size,
            }
            for region in sorted(read | computed)
        },
        "collectives": exchanged,
        "roofline": roofline(chip, images, flops, read.total() / images, exchanged),
    }


def train_step(config: Any, mesh: Mesh) -> tuple[Callable, tuple, Any]:
    """The step that `train.train` compiles, shapes for it, the state's shardings."""
    return prepare_step(config, mesh, resolved_schedule(config)[2])[1:]


def memory_of(compiled: jax.stages.Compiled, chip: Chip) -> dict[str, int]:
    """Bytes on each device; outputs that take the place of arguments are aliased."""
    found = compiled.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
    }
    total = sum(parts.values()) - 2 * parts["aliased"]
    return parts | {"total": total, "limit": chip.memory}


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
        counts for every point of its grid either way.)
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
        times = _times(eqn, loops)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                for region, flops in matmul_flops_by_region(inner, loops, name).items():
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


def roofline(
    chip: Chip,
    images: float,
    flops: float,
    moved: float,
    exchanged: list[dict[str, Any]],
) -> dict[str, Any]:
    """The most images a second that a chip's peaks allow: an upper bound.

    Everything overlaps, and what is slowest counts. An all-reduce sends its bytes
    twice: scattered and gathered.

    Args:
      images: of a step on a chip.
      flops, moved: operations and bytes of HBM an image.
      exchanged: as `collectives` tells.
    """
    sent = sum(
        each["bytes_per_step"] * (2 if each["kind"] == "all-reduce" else 1)
        for each in exchanged
    )
    seconds = {
        "arithmetic": flops * images / chip.flops,
        "memory": moved * images / chip.bandwidth,
        "network": sent / chip.network,
    }
    bound = max(seconds, key=seconds.get)
    return {
        "images_per_second_per_chip": images / seconds[bound],
        "bound": bound,
        "seconds_per_step": seconds,
        "peaks": chip._asdict(),
    }


def largest_batch(
    config: Any, devices: Sequence[jax.Device], report: dict[str, Any]
) -> dict[str, Any]:
    """Images of a step for each device that still fit, to an eighth or to the next size
    that divides.

    Doubles or halves the config's batch, then bisects.

    Args:
      report: of `examine`, for the config's own batch.
    """
    config = config.copy_and_resolve_references()
    shards = report["batch_size"] // report["batch_per_device"]
    pairs = 2 if config.get("mixup") or config.get("cutmix") else 1
    unit = config.optimizer.accumulate_steps * pairs
    compiles, low, high = 0, 0, None
    size, fits = report["batch_per_device"], report["fits"]
    while True:
        low, high = (size, high) if fits else (low, size)
        if high is None:
            size = 2 * low
        elif high - low > max(unit, low // 8):
            size = max((low + high) // 2 // unit * unit, low + unit)
        else:
            break
        config.batch_size = shards * size
        say(f"trying {size} images a device ...")
        fits, compiles = examine(config, devices)["fits"], compiles + 1
    return {
        "largest_batch_per_device": low,
        "smallest_that_does_not_fit": high,
        "compiles_of_the_search": compiles,
    }


def summary(report: dict[str, Any]) -> str:
    """The report as a few lines of text."""
    memory, cost = report["hbm_bytes_per_device"], report["roofline"]
    total = "more" if memory["total"] is None else f"{memory['total'] / GIB:.2f} GiB"
    lines = [
        f"{report['model']} on {report['topology']}: {report['devices']} devices, "
        f"{report['batch_per_device']} images each",
        f"{'fits' if report['fits'] else 'does NOT fit'}: {total} of "
        f"{memory['limit'] / GIB:.2f} GiB a device",
    ]
    if cost:
        lines[-1] += (
            f", {memory['arguments'] / GIB:.2f} of them arguments, "
            f"{memory['temporaries'] / GIB:.2f} temporaries"
        )
        lines.append(
            f"{report['flops_per_image'] / 1e9:.1f} GFLOP and "
            f"{report['hbm_bytes_per_image'] / 1e6:,.0f} MB of HBM an image"
        )
        lines += [
            f"{each['kind']}: {each['bytes_per_step'] / 1e6:,.1f} MB a step and "
            f"device, in {each['count']}"
            for each in report["collectives"]
        ]
        lines.append(
            f"at most {cost['images_per_second_per_chip']:,.0f} images/s a chip, "
            f"bound by {cost['bound']}"
        )
    if "largest_batch_per_device" in report:
        lines.append(
            f"largest batch a device: {report['largest_batch_per_device']} "
            f"({report['smallest_that_does_not_fit']} does not fit; "
            f"{report['compiles_of_the_search']} more compilations)"
        )
    return "\n".join(lines)


class Instruction(NamedTuple):
    """A line of HLO text: ``%name = shapes opcode(operands), attributes``."""

    shapes: str
    opcode: str
    operands: str
    attributes: str


def collectives(hlo: str) -> list[dict[str, Any]]:
    """What the devices exchange in a compiled program, by kind.

    Args:
      hlo: text of the program, as ``Compiled.as_text`` gives it.

    Returns:
      ``{"kind", "count", "bytes_per_step"}``, each kind once: how often it runs, and
      the bytes that it takes in or gives out on one device, whichever is more. What is
      in a loop counts as often as that runs, if the text tells.
    """
    runs, sizes = defaultdict(Counter), {}
    for instruction, here, times in _executed(*_computations(hlo)):
        kind = instruction.opcode.removesuffix("-done")
        if kind in COLLECTIVES:
            # The TPU compiler spreads one over kernels, each with its channel.
            channel = re.search(r"channel_id=\d+", instruction.attributes)
            alike = channel[0] + instruction.shapes if channel else id(instruction)
            key = kind, alike
            runs[key][id(instruction)] += times
            taken = _bytes_taken(instruction, here)
            sizes[key] = max(taken, _bytes(instruction.shapes))
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


def bytes_by_region(hlo: str) -> Counter:
    """Bytes of HBM that each part of the step reads and writes on one device.

    Every kernel reads its operands once and writes its results once, those with the
    padding of their tiles: fusions, matrix products, and custom calls (Pallas, cuDNN)
    alike. Of an operand that it only slices it reads the slices; of one that it updates
    in place it writes the update. Kernels of a loop count as often as it runs, if the
    text tells. What lives in another memory (TPU: VMEM) is free, but not the copies
    that bring it there and back; these belong to the region that uses what they bring,
    or made what they take away. On GPUs, nothing is taken to stay in a cache.

    Args:
      hlo: text of the program after all optimisations.

    Returns:
      By `region_of`; collectives are "exchange", what is left is "other".
    """
    hlo = re.sub(r"s8\[\d+\]", "s8[0]", hlo)  # room that cuBLAS asks for
    computations, entry = _computations(hlo)
    total = Counter()

    def add(name, times, outer):
        here = computations[name]
        regions = _regions(here, computations)
        for key, each in here.items():
            region = regions[key] or outer
            if each.opcode in CALLS:
                for called in _called(each):
                    add(called, times * _trips(each, computations), region)
            elif each.opcode not in FREE and not each.opcode.endswith(NO_KERNEL):
                if each.opcode.removesuffix("-done") in COLLECTIVES:
                    region = "exchange"
                total[region] += times * _hbm_bytes(each, here, computations)

    add(entry, 1, OTHER)
    return total


SCOPES = re.compile(r"input|embedding|stem\d+|merge|main|latent|decoder|loss|optimizer")
OTHER = "other"
Computation = dict[str, Instruction]  # by name
# What is no kernel; what has kernels inside, the ends of asynchronous ones.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
FREE |= {"partition-id", "after-all"}
CALLS = {"call", "while", "conditional", "async-start"}
SLICES = {"slice", "dynamic-slice", "gather"}
VMEM = "S(1)"
NAMED = re.compile(r'op_name="([^"]*)"')
NO_KERNEL = ("-start", "-update", "async-done")
LINE = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
CALLED = re.compile(r"(?:calls|body|to_apply|computations?)=(\{[^}]*\}|%[\w.-]+)")
_names = re.compile(r"%([\w.-]+)").findall


def _computations(hlo: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the one that is run."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = _names(line)[0]
            computations[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif match := LINE.match(line):
            key, shapes, opcode, rest = match.groups()
            operands, _, attributes = rest.partition("), ")
            computations[name][key] = Instruction(shapes, opcode, operands, attributes)
    return computations, entry


def _executed(
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
        for each in _called(instruction):
            again = times * _trips(instruction, computations)
            yield from _executed(computations, each, again)


def _called(instruction: Instruction) -> list[str]:
    """Names of the computations that an instruction runs."""
    found = CALLED.findall(instruction.attributes)
    return [name for names in found for name in _names(names)]


def _regions(here: Computation, computations: dict[str, Computation]) -> dict[str, str]:
    """`region_of` every instruction by its name, "" where nothing tells.

    A fusion that names none has that of most of what is fused. Of what is left, copies
    out of VMEM belong to what made the array, everything else to what uses it.
    """
    found, users = {}, {key: [] for key in here}
    for key, each in here.items():
        fused = computations[_called(each)[0]] if each.opcode == "fusion" else {}
        votes = Counter(map(_named, fused.values()))
        del votes[""]
        found[key] = _named(each) or max(votes, key=votes.get, default="")
        for name in _names(each.operands):
            users[name].append(key)

    def spread(keys, neighbours, concerns):
        for key in keys:
            if not found[key] and concerns(here[key]):
                regions = (found[name] for name in neighbours(key))
                found[key] = next(filter(None, regions), "")

    def made_by(key):
        return _names(here[key].operands)

    def leaves(each):
        if each.opcode == "copy-done":
            each = here[_names(each.operands)[0]]
        names = _names(each.operands)
        return each.opcode == "copy-start" and VMEM in here[names[0]].shapes

    spread(here, made_by, lambda each: each.opcode in FREE)
    spread(reversed(here), users.get, lambda each: not leaves(each))
    spread(here, made_by, lambda each: True)
    return found


def _named(instruction: Instruction) -> str:
    """The region that an instruction's own name tells, or ""."""
    found = NAMED.search(instruction.attributes)
    return region_of(found[1]) if found else ""


def _hbm_bytes(
    instruction: Instruction, here: Computation, computations: dict[str, Computation]
) -> int:
    """Bytes of HBM that a kernel reads and writes."""
    names = _names(instruction.operands)
    if instruction.opcode.endswith("-done"):
        names = _names(here[names[0]].operands)
    inner = {"": instruction}  # the kernel's computation, and its names of the operands
    inside = dict(enumerate(names))
    if instruction.opcode == "fusion":
        inner = computations[_called(instruction)[0]]
        inside = {
            int(each.operands.rstrip(")")): key
            for key, each in inner.items()
            if each.opcode == "parameter"
        }
    total = _tiled_bytes(instruction.shapes)
    for number, name in enumerate(names):
        size = _tiled_bytes(here[name].shapes)
        users = [x for x in inner.values() if inside[number] in _names(x.operands)]
        if size and users and all(x.opcode in SLICES for x in users):
            size = min(size, sum(_tiled_bytes(x.shapes, "") for x in users))
        elif size and [x.opcode for x in users] == ["dynamic-update-slice"]:
            whole, part, *_ = _names(users[0].operands)
            if whole == inside[number]:  # in place: the result is not written whole
                size = _tiled_bytes((inner | here)[part].shapes, "") - size
        total += size
    return total


def _bytes_taken(instruction: Instruction, here: Computation) -> int:
    """Bytes of the operands; of a -done those of its -start."""
    names = _names(instruction.operands)
    if instruction.opcode.endswith("-done"):
        names = _names(here[names[0]].operands)
    return sum(_bytes(here[name].shapes) for name in names)


def _trips(instruction: Instruction, computations: dict[str, Computation]) -> int:
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


def _tiled_bytes(shapes: str, free: str = "S(") -> int:
    """As `_bytes`, with what tiles pad, and without arrays in another memory than HBM.

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


ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([\d,]*):?([^}]*)\})?")


def _bytes(shapes: str) -> int:
    """Bytes of arrays such as ``(f32[8,128]{1,0}, pred[])``."""
    total = 0
    for kind, bits, sides in re.findall(r"([a-z]+)(\d*)\w*\[([\d,]*)\]", shapes):
        bits = int(bits) if bits else 8 * (kind == "pred")
        total += bits * math.prod(map(int, filter(None, sides.split(",")))) // 8
    return total
