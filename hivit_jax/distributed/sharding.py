"""The mesh, and where parameters and batches lie on it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hivit_jax.errors import ConfigError
from hivit_jax.tree import leaf_name

# Slowest links first: replica (between slices or nodes), then data, fsdp, tensor.
AXES = ("replica", "data", "fsdp", "tensor")
BATCH = PartitionSpec(("replica", "data", "fsdp"))
# A smaller array costs more to gather than it saves.
MIN_SHARDED_SIZE = 2**13
# Dimension that the tensor axis splits: attention heads and MLP hidden units.
TENSOR_DIMS = {
    "qkv/kernel": 2,
    "qkv/bias": 1,
    "proj/kernel": 0,
    "fc1/kernel": 1,
    "fc1/bias": 0,
    "fc2/kernel": 0,
}


def make_mesh(
    sizes: Mapping[str, int],
    batch_size: int,
    micro_batches: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Mesh with the axes `AXES`; one size may be -1, the rest.

    Where devices are of several slices (TPU) or nodes, the first axis that they divide
    is laid across them, so that the others stay on the fast links inside.

    Args:
      devices: of the mesh, and no others; None: all that there are.

    Raises:
      ConfigError: sizes that do not make up the devices or cannot be laid out on their
        torus, or a batch that does not divide over them.
    """
    devices = jax.devices() if devices is None else devices
    shape, count = [sizes[axis] for axis in AXES], len(devices)
    if shape.count(-1) == 1:
        rest = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = count // rest if rest > 0 else 0
    if min(shape) < 1 or math.prod(shape) != count:
        raise ConfigError(
            f"mesh={dict(sizes)} does not fit {count} devices; expected sizes that "
            "multiply to that number, at most one of them -1"
        )
    shards = math.prod(shape[:3])
    if min(batch_size, micro_batches) < 1 or batch_size % (shards * micro_batches):
        raise ConfigError(
            f"batch_size={batch_size} is not divisible by {shards} devices (mesh "
            f"replica x data x fsdp) times optimizer.accumulate_steps={micro_batches}"
        )
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        return Mesh(across_slices(shape, slices, devices), AXES, axis_types=types)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError as error:
        raise ConfigError(
            f"mesh={dict(sizes)} cannot be laid out on this slice; expected every size "
            "to be a product of sides of its torus"
        ) from error


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """ConfigError unless an evaluation's batch divides over the devices of a mesh."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH[0])
    if batch_size < 1 or batch_size % shards:
        raise ConfigError(
            f"the batch of the evaluation, {batch_size}, is not divisible by {shards} "
            "devices (mesh replica x data x fsdp)"
        )


def across_slices(
    shape: Sequence[int], slices: int, devices: Sequence[jax.Device]
) -> np.ndarray:
    """Devices of several slices as an array of the mesh's shape.

    Raises:
      ConfigError: no axis but tensor, which needs fast links, is a multiple of them.
    """
    outer, inner = [1] * len(shape), list(shape)
    for axis, size in enumerate(shape[:3]):
        if size % slices == 0:
            outer[axis], inner[axis] = slices, size // slices
            return mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
    raise ConfigError(
        f"mesh={dict(zip(AXES, shape, strict=True))} over {slices} slices or nodes; "
        "expected replica, data or fsdp to be a multiple of them"
    )


def param_spec(
    name: str, shape: tuple[int, ...], mesh: Mesh, zero: int = 3
) -> PartitionSpec:
    """Axes of one array: its tensor dimension, then the largest other over fsdp.

    Optimiser moments and averages carry their parameter's name, and so its rule.

    Args:
      zero: 3: fsdp splits everything; 1: the optimiser's state alone (ZeRO's stages).
    """
    spec: list[str | None] = [None] * len(shape)
    parts = name.rsplit("/", 2)
    dim = (
        TENSOR_DIMS.get("/".join(parts[-2:]))
        if "attn" in name or "mlp" in name
        else None
    )
    if dim is not None and shape[dim] % mesh.shape["tensor"] == 0:
        spec[dim] = "tensor"
    split = zero == 3 or name.startswith("opt_state/")
    if split and math.prod(shape) >= MIN_SHARDED_SIZE:
        for dim in sorted(range(len(shape)), key=lambda d: -shape[d]):
            if spec[dim] is None and shape[dim] % mesh.shape["fsdp"] == 0:
                spec[dim] = "fsdp"
                break
    return PartitionSpec(*spec)


def gathered(params: Any) -> Any:
    """Parameters whole along fsdp, and so their gradients, where a mesh is set.

    Or XLA may split what is computed of them instead, and exchange activations.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.lax.with_sharding_constraint(
            x, param_spec(leaf_name(path), x.shape, mesh, zero=1)
        ),
        params,
    )


def state_shardings(mesh: Mesh, abstract_state: Any, zero: int = 3) -> Any:
    """NamedShardings of the same structure as a pytree of shapes; see `param_spec`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, param_spec(leaf_name(path), leaf.shape, mesh, zero)
        ),
        abstract_state,
    )


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes and dtypes with where each array is to lie: what a restore is to give."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )


def shardings_of(shapes: Any) -> Any:
    """Shardings of a pytree that `placed` returned."""
    return jax.tree.map(lambda x: x.sharding, shapes)
