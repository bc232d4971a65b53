"""Selection of the fused kernels that run residual branches.

`mlp` and `attention` return a residual branch as one kernel, mainly on TPUs.
`layer_norm` runs only the LayerNorm of a branch as a kernel, on GPUs. All three return
None if no kernel supports the arguments. The layers then leave the work to XLA.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from hivit_jax.errors import ConfigError
from hivit_jax.kernels import norm_triton
from hivit_jax.kernels.attention_groups import LANES, bias_bytes
from hivit_jax.kernels.attention_tpu import attention_block
from hivit_jax.kernels.grid_tpu import VMEM_SHARE
from hivit_jax.kernels.mlp_tpu import mlp_block
from hivit_jax.kernels.numerics import ROWS, Plan, Weights

CHOICES = ("auto", "fused", "plain")
HBM_SHARE = 0.5  # fraction of the peak bandwidth that a kernel can rely on
# Function from factors of the images, [B] float32 or None, to x + factor * branch.
Branch = Callable[[jax.Array | None], jax.Array]


def mlp(x: jax.Array, norm: Any, mlp: Any, choice: str) -> Branch | None:
    """Return ``x + fc2(gelu(fc1(norm(x))))`` as one kernel, or None.

    Args:
      x: [..., C].
      norm, mlp: modules with the parameters.
      choice: where to use kernels, if shapes allow. "auto": on TPUs and GPUs, in
        bfloat16. "fused": also on CPUs, in any dtype, but slowly. "plain": nowhere.
    """
    target = _target(choice, x)
    width, hidden = mlp.fc1.kernel.shape
    if target is None or target.platform == "gpu" or x.size == 0:
        return None
    if width % LANES or hidden % LANES:
        return None
    total = x.size // width // target.shards
    plan = Plan(norm.epsilon, interpret=target.interpret)
    weights = _weights(x.dtype, norm, mlp.fc1, mlp.fc2)
    # Larger blocks take longer to compile, and smaller blocks make more steps.
    preferred = min(max(2**28 // (width * hidden), 128), 1024)
    # Bytes of VMEM in the backward pass. `fixed`: weights and weight gradients, in
    # float32 and in x's dtype. `per_row`: x and hidden activations.
    fixed, per_row = 24 * width * hidden, 24 * hidden + 40 * width
    max_rows = (target.vmem - fixed) // per_row
    rows = block_rows(total, ROWS, preferred, max_rows)
    # A block with fewer rows than a tile of the matrix unit adds too little to the
    # weight gradients at a time, so the kernel would be slower than plain operations.
    if rows is None or max_rows < LANES:
        return None
    product = 2 * width * hidden
    keep = target.should_keep(2 * product, 5 * product, product, width, 2 * hidden)
    plan = replace(plan, rows=rows, keep=keep)
    return lambda branch_scale: target.run(
        mlp_block, x, (weights,), plan, (branch_scale,)
    )


def attention(
    x: jax.Array,
    norm: Any,
    attention: Any,
    relative_index: jax.Array | None,
    key_mask: jax.Array | None,
    choice: str,
) -> Branch | None:
    """Return ``x + attention(norm(x))`` as one kernel, or None.

    For the arguments see `mlp` and `Attention.__call__`. Also returns None on GPUs,
    where cuDNN computes attention; with a key mask; with padded or shifted windows; and
    with a bias that differs between images.
    """
    target = _target(choice, x)
    qkv, proj, windows = attention.qkv, attention.proj, attention.windows
    width, _, heads, head = qkv.kernel.shape
    if target is None or target.platform == "gpu" or x.size == 0:
        return None
    if key_mask is not None:
        return None
    if windows is not None and (windows.is_padded or windows.shift):
        return None
    if width % LANES or LANES % head:
        return None
    bias = attention.position_bias(relative_index)
    if bias is not None and bias.ndim == 4:
        return None
    x = x if windows is None else windows.partition(x)
    tokens = x.shape[1]
    # Bytes of VMEM in the backward pass. `fixed`: weights, four arrays of the scores of
    # a tile's heads, and the bias. `per_row`: activations.
    fixed, per_row = 48 * width**2 + 16 * tokens**2 * LANES // head, 76 * width
    fixed += 0 if bias is None else bias_bytes(tokens, heads, head)
    total, unit = x.shape[0] * tokens // target.shards, math.lcm(tokens, ROWS)
    rows = block_rows(total, unit, 1024, (target.vmem - fixed) // per_row)
    if rows is None:
        return None
    square, scores = 2 * width**2, 2 * tokens * width * LANES // head
    forward, backward = 4 * square + 2 * scores, 11 * square + 6 * scores
    keep = target.should_keep(forward, backward, 3 * square + scores, width, 8 * width)
    weights = _weights(x.dtype, norm, qkv, proj)
    plan = Plan(
        norm.epsilon,
        rows=rows,
        keep=keep,
        interpret=target.interpret,
        heads=heads,
        tokens=tokens,
    )

    def run(branch_scale):
        if branch_scale is not None and windows is not None:
            branch_scale = jnp.repeat(branch_scale, len(x) // len(branch_scale))
        out = target.run(attention_block, x, (weights, bias), plan, (branch_scale,))
        return out if windows is None else windows.merge(out)

    return run


def layer_norm(x: jax.Array, norm: Any, choice: str) -> tuple | None:
    """Return x and ``norm(x)``, computed by a GPU kernel, or None.

    The skip connection must use the returned x, because the backward kernel adds the
    gradients that reach x by the skip connection and by the norm. For the arguments see
    `mlp`.
    """
    target, width = _target(choice, x), x.shape[-1]
    if target is None or target.platform != "gpu" or x.size == 0:
        return None
    if not norm_triton.supports(x.size // width // target.shards, width):
        return None
    weights, plan = (norm.scale[...], norm.bias[...]), Plan(norm.epsilon)
    return target.run(norm_triton.skip_and_norm, x, weights, plan)


def _weights(dtype, norm, *linear_layers):
    """Collect the parameters of a branch, with the head axes of qkv flattened."""
    params = []
    for layer in linear_layers:
        kernel, bias = layer.kernel[...].astype(dtype), layer.bias[...].astype(dtype)
        params += [kernel.reshape(len(kernel), -1), bias.reshape(-1)]
    return Weights(norm.scale[...], norm.bias[...], *params)


@dataclass(frozen=True)
class Target:
    """Devices that a kernel is compiled for.

    platform: "tpu", "gpu" or "cpu".
    axes: mesh axes that split the batch.
    shards: number of parts that these axes split the batch into.
    vmem: bytes of VMEM that a kernel may use.
    balance: number of operations that take as long as moving one byte to or from HBM.
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

    def should_keep(
        self, forward: int, backward: int, recompute: int, width: int, kept: int
    ) -> bool:
        """Return True if saving arrays is faster than recomputing them.

        Args:
          forward, backward: operations per row in each pass, without saving.
          recompute: operations per row of the backward pass that saving avoids.
          width: elements of a row. The forward pass moves two arrays of this width, the
            backward pass three.
          kept: bytes that are saved per row.
        """

        def time(operations, moved):
            return max(operations, self.balance * moved)

        without = time(forward, 4 * width) + time(backward, 6 * width)
        forward = time(forward, 4 * width + kept)
        return forward + time(backward - recompute, 6 * width + kept) < without

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
          per_image: arrays [B], which are split over devices like x; or None.

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


def _target(choice: str, x: jax.Array) -> Target | None:
    """Return the devices that the traced program will run on.

    Returns None if kernels do not support the devices, the dtype of x or the sharding
    of heads, or if the sharding of arrays is unknown.
    """
    device, bfloat16 = platform(), x.dtype == jnp.bfloat16
    supported = choice == "fused" if device == "cpu" else bfloat16
    if choice == "plain" or not supported:
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
    axes = tuple(name for name, axis_type in types if axis_type == AxisType.Auto)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if device != "tpu":
        return Target(device, axes, shards)
    info = pltpu.get_tpu_info()
    bandwidth = HBM_SHARE * info.mem_bw_bytes_per_second
    vmem = int(VMEM_SHARE * info.vmem_capacity_bytes)
    return Target(device, axes, shards, vmem, info.bf16_ops_per_second / bandwidth)


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


def block_rows(total: int, unit: int, preferred: int, most: int) -> int | None:
    """Return the number of rows of a block, or None if no block fits.

    The number is the largest multiple of `unit` that divides `total` and is at most
    `most` (the rows that fit into VMEM) and `preferred`. The number is also at most
    half of the total, so that one block can be fetched while another is computed. A
    block of one unit may exceed `preferred` and half of the total.
    """
    limit = min(max(min(preferred, total // 2), unit), most)
    return max(
        (r for r in range(unit, limit + 1, unit) if total % r == 0), default=None
    )
