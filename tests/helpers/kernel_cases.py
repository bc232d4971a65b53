"""Residual branches in plain JAX and as fused kernels, and their relative errors."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from networks import random_array
from numpy.testing import assert_allclose

from hivit_jax.kernels.attention_tpu import attention_block
from hivit_jax.kernels.mlp_tpu import mlp_block
from hivit_jax.kernels.norm_triton import skip_and_norm
from hivit_jax.kernels.numerics import Plan, Weights

EPS = 1e-6
# Bound here, because tests replace the attribute of jax.nn.
library_attention = jax.nn.dot_product_attention


class Case(NamedTuple):
    """Residual branch of rows [T, C]; on GPUs, only the LayerNorm of the branch.

    platform: backend of the kernel.
    shapes: shapes of the inputs: rows, and LayerNorm's scale and bias. Inputs on TPUs
      include weights and biases of two linear layers, and may include the bias of
      attention scores.
    plain: (*inputs, branch_scale) -> [T, C]; branch_scale is [images] or None.
    fused: (*inputs, branch_scale, num_saved, interpret) -> [T, C], one kernel.
    images: number of images that the rows belong to.
    max_saved: largest `Plan.num_saved` of the kernel.
    """

    platform: str
    shapes: list[tuple[int, ...]]
    plain: Callable
    fused: Callable
    images: int
    max_saved: int = 1


def random_arrays(*shapes, dtype=jnp.float32):
    """Return random arrays of these shapes."""
    return [
        jnp.asarray(random_array(shape, f"kernel {i}") / np.sqrt(shape[0]), dtype)
        for i, shape in enumerate(shapes)
    ]


def random_inputs(case: Case):
    """Return (inputs, cotangent of the output), float32."""
    *inputs, cotangent = random_arrays(*case.shapes, case.shapes[0])
    inputs[1] = 1 + inputs[1]  # LayerNorm's scale
    return inputs, cotangent


def in_bfloat16(inputs):
    """Cast inputs to bfloat16, except LayerNorm's scale and bias and the score bias."""
    float32_indices = 1, 2, 7
    return [
        x if i in float32_indices else x.astype(jnp.bfloat16)
        for i, x in enumerate(inputs)
    ]


def layer_norm(x, scale, bias):
    """Compute LayerNorm in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPS) * scale + bias


def add_branch(x, branch, branch_scale):
    """Return x + factor * branch; `branch_scale` has one factor per image; None: 1."""
    if branch_scale is None:
        return x + branch
    return x + branch * jnp.repeat(branch_scale, len(x) // len(branch_scale))[:, None]


def drop_path_factors(images):
    """Return drop-path factors [images]: 0 for every third image, else 1.25."""
    return jnp.where(jnp.arange(images) % 3 == 1, 0, 1.25)


def plain_mlp(x, scale, bias, w1, b1, w2, b2, branch_scale=None):
    hidden = layer_norm(x, scale, bias).astype(w1.dtype) @ w1 + b1
    branch = jax.nn.gelu(hidden, approximate=False) @ w2 + b2
    return add_branch(x, branch, branch_scale)


def plain_attention(x, *weights, heads, tokens, branch_scale=None):
    scale, bias, qkv, qkv_bias, proj, proj_bias, *score_bias = weights
    y = layer_norm(x, scale, bias).astype(qkv.dtype) @ qkv + qkv_bias
    q, k, v = jnp.moveaxis(y.reshape(-1, tokens, 3, heads, x.shape[1] // heads), 2, 0)
    score_bias = score_bias[0][None] if score_bias else None
    y = jax.nn.dot_product_attention(q, k, v, bias=score_bias).reshape(x.shape)
    return add_branch(x, y @ proj + proj_bias, branch_scale)


def shapes_of(rows, width, outputs_of_first, inputs_of_second):
    """Return the shapes of rows, LayerNorm and two linear layers."""
    first = (width, outputs_of_first), (outputs_of_first,)
    second = (inputs_of_second, width), (width,)
    return [(rows, width), (width,), (width,), *first, *second]


def mlp_case(rows, width, hidden, block_rows):
    """Return the case of an MLP whose kernel processes `block_rows` rows at a time."""

    def fused(x, *weights, branch_scale=None, **options):
        plan = Plan(EPS, rows=block_rows, **options)
        return mlp_block(x, Weights(*weights), branch_scale, plan)

    # Images have 24 rows, so that some images start inside a block.
    shapes = shapes_of(rows, width, hidden, hidden)
    return Case("tpu", shapes, plain_mlp, fused, rows // 24)


def plain_norm(x, scale, bias, branch_scale=None):
    return add_branch(x, layer_norm(x, scale, bias).astype(x.dtype), branch_scale)


def norm_case(rows, width):
    def fused(x, scale, bias, branch_scale=None, num_saved=0, **options):
        x, normalized = skip_and_norm(x, scale, bias, Plan(EPS, **options))
        return add_branch(x, normalized, branch_scale)

    shapes = [(rows, width), (width,), (width,)]
    return Case("gpu", shapes, plain_norm, fused, rows // 8, max_saved=0)


def attention_case(images, tokens, width, heads, block_rows, bias=False):
    def fused(x, *weights, branch_scale=None, **options):
        plan = Plan(EPS, rows=block_rows, heads=heads, tokens=tokens, **options)
        score_bias = weights[6] if bias else None
        return attention_block(x, Weights(*weights[:6]), score_bias, branch_scale, plan)

    shapes = shapes_of(images * tokens, width, 3 * width, width)
    shapes += [(heads, tokens, tokens)] * bias
    plain = partial(plain_attention, heads=heads, tokens=tokens)
    return Case("tpu", shapes, plain, fused, images, max_saved=2)


CASES = {
    "mlp": mlp_case(96, 128, 256, 32),
    # The rows of the two cases have one part and three parts. Tiles have 32 rows and 8
    # rows, blocks of the backward pass 128 and 32.
    "norm on GPUs": norm_case(256, 128),
    "norm of 3 parts on GPUs": norm_case(96, 384),
    # A block consists of whole images and of whole tiles of 8 rows.
    "attention of 49": attention_case(16, 49, 128, 4, 784),
    "attention of 196": attention_case(8, 196, 128, 2, 784),
    "attention of 144": attention_case(2, 144, 256, 8, 144),
    "attention of 9": attention_case(32, 9, 128, 1, 144),
    # In these cases, `Groups.offsets` has 1, 1, 3 and 4 elements.
    "bias of 144": attention_case(2, 144, 256, 8, 144, bias=True),
    "bias of 9": attention_case(32, 9, 128, 1, 144, bias=True),
    "bias of 196": attention_case(8, 196, 128, 2, 784, bias=True),
    "bias of 49": attention_case(16, 49, 128, 4, 392, bias=True),
}


def kernels_in(jaxpr):
    """Return the names of the kernels that a jaxpr calls."""
    names = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            names.append(eqn.params["name"])
            continue
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            names += kernels_in(inner) if hasattr(inner, "eqns") else []
    return names


def output_and_gradients(function, inputs, cotangent):
    """Return the output and the gradients with respect to every input."""
    value, pull = jax.vjp(function, *inputs)
    return value, *pull(cotangent.astype(value.dtype))


def assert_close(actual, expected):
    """Check arrays pairwise, to 1e-5 of the largest value of each expected array."""
    for a, b in zip(actual, expected, strict=True):
        assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def mesh_of(**axes):
    """Return a context manager that sets a mesh with these axis sizes."""
    devices = np.array(jax.devices()[: np.prod([*axes.values()])])
    return jax.set_mesh(Mesh(devices.reshape(*axes.values()), tuple(axes)))


def tpu_info(mebibytes=128):
    """Return the facts of `pltpu.get_tpu_info` on a v5e, with any size of VMEM."""
    return SimpleNamespace(
        vmem_capacity_bytes=mebibytes * 2**20,
        bf16_ops_per_second=197e12,
        mem_bw_bytes_per_second=819e9,
    )


def relative_errors(function, inputs, cotangent, truth, jit):
    """Return the relative errors of output and gradients in the Euclidean norm."""
    results = jit(partial(output_and_gradients, function))(inputs, cotangent)
    return [
        float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        for a, b in zip(results, truth, strict=True)
    ]


def assert_bfloat16_errors(case, jit, num_saved, interpret):
    """Check that a kernel in bfloat16 is about as exact as plain JAX in bfloat16.

    The errors of the output and of all gradients are relative to float32. Each may
    exceed the error of plain JAX by a tenth plus 1e-4.
    """
    inputs, cotangent = random_inputs(case)
    # Inputs are rounded here, because XLA may skip the rounding in plain JAX.
    inputs, cotangent = in_bfloat16(inputs), cotangent.astype(jnp.bfloat16)
    float32_inputs = [x.astype(jnp.float32) for x in inputs]
    truth = output_and_gradients(case.plain, float32_inputs, cotangent)
    fused = partial(case.fused, num_saved=num_saved, interpret=interpret)
    fused_errors, plain_errors = (
        relative_errors(function, inputs, cotangent, truth, jit)
        for function in (fused, case.plain)
    )
    assert max(fused_errors) < 0.02
    assert all(
        fused_error < 1.1 * plain_error + 1e-4
        for fused_error, plain_error in zip(fused_errors, plain_errors, strict=True)
    )
