"""Residual blocks as single kernels: which of them run, and where.

`mlp` and `attention` return a residual branch as one kernel, or None where no kernel
serves; then the layers run it as XLA compiles it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from hivit_jax.kernels import mlp_triton
from hivit_jax.kernels.attention_tpu import LANES, attention_block
from hivit_jax.kernels.mlp_tpu import mlp_block
from hivit_jax.kernels.numerics import ROWS, VMEM_SHARE, Plan, Weights

CHOICES = ("auto", "fused", "plain")
HBM_SHARE = 0.5  # of the peak bandwidth that a kernel may count on
Branch = Callable[[bool], jax.Array]  # given whether to add x to the branch


def mlp(x: jax.Array, norm: Any, mlp: Any, choice: str) -> Branch | None:
    """``fc2(gelu(fc1(norm(x))))`` as one kernel, or None.

    Args:
      x: [..., C].
      norm, mlp: the modules.
      choice: "auto": on TPUs, in bfloat16; "fused": wherever shapes allow, on GPUs
        narrow ones (the stem), on CPUs as plain operations, slowly; "plain": never.
    """
    target = _target(choice, x)
    width, hidden = mlp.fc1.kernel.shape
    if target is None or width % LANES or hidden % LANES:
        return None
    total = x.size // width // target.shards
    plan = Plan(norm.epsilon, interpret=target.interpret)
    weights = _weights(
        norm, x.dtype, mlp.fc1.kernel, mlp.fc1.bias, mlp.fc2.kernel, mlp.fc2.bias
    )
    if target.platform == "gpu":
        if width not in mlp_triton.WIDTHS or total % mlp_triton.ROWS:
            return None
        return lambda add: target.run(
            mlp_triton.mlp_block, x, weights, replace(plan, add=add)
        )
    # More rows make longer programs to compile, fewer more and shorter steps.
    most = min(max(2**28 // (width * hidden), 128), 1024)
    # Backward: weights, their gradients in float32 and in x's dtype; rows, hidden.
    fixed, each = 24 * width * hidden, 24 * hidden + 40 * width
    room = (target.vmem - fixed) // each
    rows = block_rows(total, ROWS, most, room)
    # Less than a tile of a matrix unit, added to gradients of weights at a time, takes
    # longer than plain operations.
    if rows is None or room < LANES:
        return None
    product = 2 * width * hidden
    keep = target.keeps(2 * product, 5 * product, product, width, 2 * hidden)
    plan = replace(plan, rows=rows, keep=keep)
    return lambda add: target.run(mlp_block, x, weights, replace(plan, add=add))


def attention(
    x: jax.Array, norm: Any, attention: Any, key_mask: Any, choice: str
) -> Branch | None:
    """``attention(norm(x))`` as one kernel, or None; arguments as in `mlp`.

    None also on GPUs, where cuDNN computes it; for keys that are masked, windows, and
    relative positions.
    """
    target = _target(choice, x)
    qkv, proj = attention.qkv, attention.proj
    width, _, heads, head = qkv.kernel.shape
    special = key_mask, attention.windows, attention.relative_position_bias_table
    if target is None or target.platform == "gpu":
        return None
    if any(each is not None for each in special):
        return None
    if width % LANES or LANES % head:
        return None
    tokens = x.shape[1]
    # The gradient of a tile's heads has four arrays of scores at a time.
    fixed, each = 48 * width**2 + 16 * tokens**2 * LANES // head, 76 * width
    total, unit = x.shape[0] * tokens // target.shards, math.lcm(tokens, ROWS)
    rows = block_rows(total, unit, 1024, (target.vmem - fixed) // each)
    if rows is None:
        return None
    square, scores = 2 * width**2, 2 * tokens * width * LANES // head
    forward, backward = 4 * square + 2 * scores, 11 * square + 6 * scores
    keep = target.keeps(forward, backward, 3 * square + scores, width, 8 * width)
    weights = _weights(norm, x.dtype, qkv.kernel, qkv.bias, proj.kernel, proj.bias)
    weights = weights._replace(
        w1=weights.w1.reshape(width, -1), b1=weights.b1.reshape(-1)
    )
    plan = Plan(
        norm.epsilon,
        rows=rows,
        keep=keep,
        interpret=target.interpret,
        heads=heads,
        tokens=tokens,
    )
    return lambda add: target.run(attention_block, x, weights, replace(plan, add=add))


def _weights(norm, dtype, *linear):
    return Weights(
        norm.scale[...], norm.bias[...], *(each[...].astype(dtype) for each in linear)
    )


@dataclass(frozen=True)
class Target:
    """Devices that a kernel is compiled for.

    platform: "tpu", "gpu" or "cpu".
    axes, shards: axes of their mesh that split the batch, and into how many parts.
    vmem: bytes that a kernel may use.
    balance: operations in the time in which a byte of HBM is moved.
    """

    platform: str
    axes: tuple[str, ...] = ()
    shards: int = 1
    vmem: int = 2**30
    balance: float = 0.0

    @property
    def interpret(self) -> bool:
        """Whether kernels run as plain JAX operations."""
        return self.platform == "cpu"

    def keeps(
        self, forward: int, backward: int, spared: int, width: int, kept: int
    ) -> bool:
        """Whether a block is quicker if it saves `kept` bytes a row for the backward
        pass.

        Args:
          forward, backward, spared: operations a row; `spared` are those of backward
            that saving makes unnecessary.
          width: of rows: two are moved forward, three backward.
        """

        def time(operations, moved):
            return max(operations, self.balance * moved)

        again = time(forward, 4 * width) + time(backward, 6 * width)
        forward = time(forward, 4 * width + kept)
        return forward + time(backward - spared, 6 * width + kept) < again

    def run(
        self, kernel: Callable, x: jax.Array, weights: Weights, plan: Plan
    ) -> jax.Array:
        """kernel([T, C], weights, plan) on each device's part of x [..., C]."""

        def local(x, weights):
            return kernel(x.reshape(-1, x.shape[-1]), weights, plan).reshape(x.shape)

        if self.axes:  # compilers do not partition kernels
            split = PartitionSpec(self.axes)
            local = jax.shard_map(
                local,
                in_specs=(split, PartitionSpec()),
                out_specs=split,
                axis_names=set(self.axes),
                check_vma=False,
            )
        return local(x, weights)


def _target(choice: str, x: jax.Array) -> Target | None:
    """Devices that the traced program will run on; None if kernels do not serve them
    or their arrays' shardings are unknown.
    """
    if choice == "plain":
        return None
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        known, axes, shards = jax.device_count() == 1, (), 1
    else:
        known = not heads_split()
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        axes = tuple(name for name, kind in types if kind == AxisType.Auto)
        shards = math.prod(mesh.shape[axis] for axis in axes)
    where, bfloat16 = platform(), x.dtype == jnp.bfloat16
    serves = {"tpu": bfloat16, "gpu": bfloat16 and choice == "fused"}
    if not known or not serves.get(where, choice == "fused"):
        return None
    if where != "tpu":
        return Target(where, axes, shards)
    info = pltpu.get_tpu_info()
    bandwidth = HBM_SHARE * info.mem_bw_bytes_per_second
    vmem = int(VMEM_SHARE * info.vmem_capacity_bytes)
    return Target(where, axes, shards, vmem, info.bf16_ops_per_second / bandwidth)


def heads_split() -> bool:
    """Whether the mesh that is set splits heads and hidden units over devices."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1


def platform() -> str:
    """ "tpu", "gpu" or "cpu", that the program being traced is for."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return device.platform if device else jax.default_backend()


def block_rows(total: int, unit: int, most: int, room: int) -> int | None:
    """Rows of a block: whole units, the most that divide the total; no more than there
    is room for. Nor, unless that is less than a unit, than `most` and half of the
    total, for one block is fetched while another is worked on.
    """
    most = min(max(min(most, total // 2), unit), room)
    return max((r for r in range(unit, most + 1, unit) if total % r == 0), default=None)
