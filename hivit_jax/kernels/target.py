"""Devices that a fused kernel is compiled for, and the sizes of its blocks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from hivit_jax.errors import ConfigError
from hivit_jax.kernels.grid_tpu import VMEM_SHARE
from hivit_jax.kernels.numerics import Plan

HBM_SHARE = 0.5  # fraction of the peak bandwidth that a kernel can rely on


@dataclass(frozen=True)
class Target:
    """Devices that a kernel is compiled for.

    Attributes:
      platform: "tpu", "gpu" or "cpu".
      axes: mesh axes that split the batch.
      shards: number of parts that these axes split the batch into.
      vmem: bytes of VMEM that a kernel may use.
      balance: number of operations that take as long as moving a byte to or from HBM.
    """

    platform: str
    axes: tuple[str, ...] = ()
    shards: int = 1
    vmem: int = 2**30
    balance: float = 0.0

    @property
    def interpret(self) -> bool:
        """True if kernels run as plain JAX operations."""
        return self.platform == "cpu"

    def should_save(
        self, forward: int, backward: int, recompute: int, width: int, saved_bytes: int
    ) -> bool:
        """Return True if saving arrays is faster than recomputing them.

        Args:
          forward, backward: operations per row in each pass, without saving.
          recompute: operations per row of the backward pass that saving avoids.
          width: elements of a row. The forward pass moves two arrays of this width, the
            backward pass three.
          saved_bytes: bytes that are saved per row.
        """

        def time(operations, bytes_moved):
            return max(operations, self.balance * bytes_moved)

        if_recomputed = time(forward, 4 * width) + time(backward, 6 * width)
        if_saved = time(forward, 4 * width + saved_bytes)
        if_saved += time(backward - recompute, 6 * width + saved_bytes)
        return if_saved < if_recomputed

    def run(
        self,
        kernel: Callable,
        x: jax.Array,
        params: tuple,
        plan: Plan,
        per_image: tuple = (),
    ) -> Any:
        """Run kernel([T, C], *params, *per_image, plan) on each device's images.

        Returns the kernel's arrays [T, C], in the shape of x.

        Args:
          x: [..., C].
          per_image: arrays [B, ...], which are split over devices like x; or None.

        Raises:
          ConfigError: forward-mode differentiation outside `jax.jit`. Inside `jax.jit`,
            JAX raises a TypeError at compilation.
        """

        def local(x, params, per_image):
            results = kernel(x.reshape(-1, x.shape[-1]), *params, *per_image, plan)
            return jax.tree.map(lambda result: result.reshape(x.shape), results)

        if self.axes:  # because compilers do not partition kernels
            split = PartitionSpec(self.axes)
            local = jax.shard_map(
                local,
                in_specs=(split, PartitionSpec(), split),
                out_specs=split,
                axis_names=set(self.axes),
                check_vma=False,
            )
        try:
            return local(x, params, per_image)
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            raise ConfigError(
                "fused kernels have no forward-mode derivative (jax.jvp, jax.jacfwd, "
                "jax.linearize); build the model with kernels='plain'"
            ) from error


def find_target(choice: str, x: jax.Array) -> Target | None:
    """Return the devices that the traced program will run on, if kernels may run.

    Returns None if `choice` excludes the platform, if kernels do not support the dtype
    of x or the sharding, or if the sharding of arrays is unknown.
    """
    name, is_bfloat16 = platform(), x.dtype == jnp.bfloat16
    is_supported = choice == "fused" if name == "cpu" else is_bfloat16
    if choice == "plain" or not is_supported:
        return None
    mesh = jax.sharding.get_abstract_mesh()
    # Without a mesh the sharding is known only if there is a single device.
    if heads_are_sharded() or (mesh.empty and jax.device_count() > 1):
        return None
    # The results of kernels lack the type information that Explicit axes and check_vma
    # require.
    if AxisType.Explicit in mesh.axis_types or varying_axes(x):
        return None
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(axis for axis, axis_type in types if axis_type == AxisType.Auto)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if name != "tpu":
        return Target(name, axes, shards)
    info = pltpu.get_tpu_info()
    bandwidth = HBM_SHARE * info.mem_bw_bytes_per_second
    vmem = int(VMEM_SHARE * info.vmem_capacity_bytes)
    return Target(name, axes, shards, vmem, info.bf16_ops_per_second / bandwidth)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Return the manual mesh axes that the type of x varies over (``check_vma``)."""
    type_ = jax.typeof(x)
    manual = getattr(type_, "manual_axis_type", None)
    return manual.varying if manual else getattr(type_, "vma", frozenset())


def heads_are_sharded() -> bool:
    """Return True if the current mesh shards attention heads and hidden units."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1


def platform() -> str:
    """Return the platform that the traced program is for: "tpu", "gpu" or "cpu"."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return device.platform if device else jax.default_backend()


def block_rows(total: int, min_rows: int, preferred: int, max_rows: int) -> int | None:
    """Return the number of rows of a block, or None if no block fits.

    The number is the largest multiple of `min_rows` that divides `total` and is at most
    `preferred` and `max_rows`, the rows that fit into VMEM. The number is also at most
    half of `total`, so that one block can be fetched while another is computed. A block
    of `min_rows` rows may exceed `preferred` and half of `total`.
    """
    limit = min(max(min(preferred, total // 2), min_rows), max_rows)
    candidates = range(min_rows, limit + 1, min_rows)
    return max((rows for rows in candidates if total % rows == 0), default=None)
