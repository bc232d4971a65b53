"""Device mesh, and shardings of the train state and of batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hivit_jax.errors import ConfigError
from hivit_jax.progress import counted
from hivit_jax.tree import leaf_name

# Mesh axes, from the slowest to the fastest links.
AXES = ("replica", "data", "fsdp", "tensor")
BATCH = PartitionSpec(("replica", "data", "fsdp"))
# Axes whose devices store copies of the train state.
COPY_AXES = ("replica", "data")
# Smaller arrays are not sharded over fsdp, because gathering them costs more than
# sharding saves.
MIN_SHARDED_SIZE = 2**13
# End of a parameter's name -> dimension that is sharded over the tensor axis: attention
# heads or MLP hidden units.
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
    num_microbatches: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Return a mesh with the axes `AXES`.

    If the devices belong to several TPU slices or nodes, the first of replica, data and
    fsdp whose size is divisible by the number of slices connects the slices. The other
    axes stay on the fast links inside a slice.

    Args:
      sizes: size of each axis; one may be -1, for the remaining devices.
      batch_size: examples per step, divisible by replica x data x fsdp x
        `num_microbatches`.
      num_microbatches: microbatches per step (optimizer.accumulate_steps).
      devices: devices of the mesh; None: all devices of the run.

    Raises:
      ConfigError: the sizes do not fit the devices or their torus, or the batch is not
        divisible.
    """
    devices = jax.devices() if devices is None else devices
    shape, count = [sizes[axis] for axis in AXES], len(devices)
    if shape.count(-1) == 1:
        rest = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = count // rest if rest > 0 else 0
    if min(shape) < 1 or math.prod(shape) != count:
        raise ConfigError(
            f"mesh={dict(sizes)} does not fit {counted(count, 'device')}; expected "
            f"sizes with product {count}, at most one of them -1"
        )
    num_shards = math.prod(shape[:3])
    divisor = num_shards * num_microbatches
    if min(batch_size, divisor) < 1 or batch_size % divisor:
        raise ConfigError(
            f"batch_size={batch_size} is not divisible by {num_shards} devices (mesh "
            f"replica x data x fsdp) x optimizer.accumulate_steps={num_microbatches}"
        )
    types = (AxisType.Auto,) * len(AXES)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices > 1:
        return Mesh(
            arrange_across_slices(shape, num_slices, devices), AXES, axis_types=types
        )
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError as error:
        raise ConfigError(
            f"mesh={dict(sizes)} cannot be laid out on this slice; expected every size "
            "to be a product of side lengths of its torus"
        ) from error


def on_mesh(mesh: Mesh, jitted: Callable) -> Callable:
    """Return a jitted function that is traced with a mesh set.

    Without a mesh, a function on several devices never uses fused kernels, because
    `kernels.dispatch` reads the sharding of the batch from the mesh. The size of every
    batch must be divisible by replica x data x fsdp.
    """

    @wraps(jitted)
    def call(*args):
        with jax.set_mesh(mesh):
            return jitted(*args)

    return call


def replicate(mesh: Mesh, value: np.ndarray) -> jax.Array:
    """Copy an array that is equal on all processes to every device of a mesh.

    `jax.device_put` would first compare the arrays of all processes in a collective.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_process_local_data(sharding, value, value.shape)


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raise ConfigError if a mesh cannot split an evaluation batch evenly."""
    num_shards = math.prod(mesh.shape[axis] for axis in BATCH[0])
    if batch_size < 1 or batch_size % num_shards:
        raise ConfigError(
            f"the evaluation batch size {batch_size} is not divisible by {num_shards} "
            "devices (mesh replica x data x fsdp)"
        )


def arrange_across_slices(
    shape: Sequence[int], num_slices: int, devices: Sequence[jax.Device]
) -> np.ndarray:
    """Return the devices of several slices as an array of the mesh's shape.

    Raises:
      ConfigError: neither replica, data nor fsdp is divisible by the number of slices.
        The tensor axis stays inside a slice, because only the links there are fast.
    """
    outer, inner = [1] * len(shape), list(shape)
    for axis, size in enumerate(shape[:3]):
        if size % num_slices == 0:
            outer[axis], inner[axis] = num_slices, size // num_slices
            return mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
    raise ConfigError(
        f"mesh={dict(zip(AXES, shape, strict=True))} over {num_slices} slices or "
        f"nodes; expected replica, data or fsdp to be divisible by {num_slices}"
    )


def param_spec(
    name: str, shape: tuple[int, ...], mesh: Mesh, zero: int = 3
) -> PartitionSpec:
    """Return the PartitionSpec of one array of the train state.

    The dimension in `TENSOR_DIMS` is sharded over the tensor axis, if divisible by the
    size of the axis. The largest other dimension that is divisible by the size of the
    fsdp axis is sharded over that axis, except in arrays smaller than
    `MIN_SHARDED_SIZE`. The same rules apply to optimizer moments and averaged
    parameters, because the names of these arrays end with the name of the parameter.

    Args:
      name: path of the array, as in `tree.named_leaves`.
      zero: ZeRO stage. 3: fsdp shards the whole state; 1: only the optimizer state.
    """
    spec: list[str | None] = [None] * len(shape)
    tensor_dim = None
    if "attn" in name or "mlp" in name:
        tensor_dim = TENSOR_DIMS.get("/".join(name.rsplit("/", 2)[-2:]))
    if tensor_dim is not None and shape[tensor_dim] % mesh.shape["tensor"] == 0:
        spec[tensor_dim] = "tensor"
    over_fsdp = zero == 3 or name.startswith("opt_state/")
    if over_fsdp and math.prod(shape) >= MIN_SHARDED_SIZE:
        for dim in sorted(range(len(shape)), key=lambda d: -shape[d]):
            if spec[dim] is None and shape[dim] % mesh.shape["fsdp"] == 0:
                spec[dim] = "fsdp"
                break
    return PartitionSpec(*spec)


def unshard_fsdp(params: Any) -> Any:
    """All-gather parameters over the fsdp axis, if a mesh is set.

    Without this constraint, XLA may shard the computation instead and communicate
    activations. The constraint also applies to the gradients.
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


def num_copies() -> int:
    """Return the number of devices that store the same part of the train state."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in COPY_AXES)


def shard_copies(tree: Any) -> Any:
    """Shard each array of a pytree also over the devices that store copies of it.

    A device takes a slice of its copy, without communication: in addition to
    `param_spec`, the axes `COPY_AXES` shard the first dimension that they can split
    evenly. Arrays smaller than `MIN_SHARDED_SIZE` stay replicated. A mesh must be set.
    """
    mesh, copies = jax.sharding.get_abstract_mesh(), num_copies()

    def shard(path, x):
        spec = list(param_spec(leaf_name(path), x.shape, mesh))
        if x.size >= MIN_SHARDED_SIZE:
            for dim, axis in enumerate(spec):
                if x.shape[dim] % (copies * mesh.shape.get(axis, 1)) == 0:
                    spec[dim] = (axis, *COPY_AXES) if axis else COPY_AXES
                    break
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(shard, tree)


def state_shardings(mesh: Mesh, abstract_state: Any, zero: int = 3) -> Any:
    """Return the NamedSharding of every array of a pytree; see `param_spec`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, param_spec(leaf_name(path), leaf.shape, mesh, zero)
        ),
        abstract_state,
    )


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Return a pytree of ShapeDtypeStructs with the given shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        shardings,
    )


def shardings_of(tree: Any) -> Any:
    """Return the shardings of a pytree of arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda x: x.sharding, tree)
