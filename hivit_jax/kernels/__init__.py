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

from hivit_jax.kernels import mlp_gpu
from hivit_jax.kernels.attention import LANES, attention_block
from hivit_jax.kernels.common import ROWS, VMEM_SHARE, Plan, Weights
from hivit_jax.kernels.mlp import mlp_block

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
        if width not in mlp_gpu.WIDTHS or total % mlp_gpu.ROWS:
            return None
        return lambda add: target.run(
            mlp_gpu.mlp_block, x, weights, replace(plan, add=add)
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


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None,
    mask: jax.Array | None,
    choice: str,
) -> jax.Array:
    """Attention of q, k, v, each [B, N, heads, head] like the result.

    On GPUs, without bias and mask, by cuDNN, which saves no scores; on CPUs by
    `softmax`; elsewhere by JAX's own function.

    Args:
      bias, mask: see `softmax`.
      choice: as in `mlp`.
    """
    if platform() == "cpu":
        weights, sums = softmax(q, k, bias, mask)
        # Normalised after the product: then the gradient sums up rows of the output,
        # not rows of scores.
        product = "bhqk,bhkd->bhqd", weights.astype(v.dtype), jnp.swapaxes(v, 1, 2)
        out = jnp.einsum(*product, preferred_element_type=jnp.float32) / sums
        return jnp.swapaxes(out, 1, 2).astype(v.dtype)
    batch, tokens, _, head = q.shape
    serves = q.dtype == jnp.bfloat16 and head % 8 == 0 and head <= 128
    special = bias is not None or mask is not None
    if platform() != "gpu" or not serves or special or choice == "plain":
        return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask)
    # JAX has cuDNN's gradient for even numbers of tokens alone.
    padding, lengths = ((0, 0), (0, tokens % 2), (0, 0), (0, 0)), {}
    if tokens % 2:
        q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
        names = "query_seq_lengths", "key_value_seq_lengths"
        lengths = dict.fromkeys(names, jnp.full(batch, tokens, jnp.int32))
    out = jax.nn.dot_product_attention(q, k, v, **lengths, implementation="cudnn")
    return out[:, :tokens]


def softmax(
    q: jax.Array, k: jax.Array, bias: jax.Array | None, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Unnormalized attention weights: exp(scores - the largest of a row),
    [B, heads, N, N] float32, query first, and the sums of its rows, [B, heads, N, 1].

    Args:
      q, k: [B, N, heads, head].
      bias: to add to the scores, broadcasts over [B, heads, N, N]; or None.
      mask: bool, the same, which keys may be attended to; or None. A row that may
        attend to none attends to all alike.
    """
    # Transposed by hand: with [B, N, heads] XLA for CPUs takes half as long again.
    q, k = jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2)
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    return weights, weights.sum(-1, keepdims=True)


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
