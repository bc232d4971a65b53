"""Tests of the TPU kernel for attention over many tokens, interpreted on the CPU."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from kernel_blocks import (
    assert_fused_equals_unfused,
    main_stage_block,
)
from kernel_cases import (
    assert_close,
    kernels_in,
    library_attention,
    mesh_of,
    output_and_gradients,
    random_arrays,
    relative_errors,
    tpu_info,
)
from networks import unoptimized_jit

from hivit_jax.kernels import dispatch, target
from hivit_jax.kernels.attention_xla import dot_product_attention
from hivit_jax.kernels.flash_tpu import flash_attention
from hivit_jax.kernels.numerics import Plan

pytestmark = pytest.mark.slow

KERNEL = "flash_attention"


def inputs_of(images, tokens, heads, head_width, dtype=jnp.float32):
    """Return (q, k, v, bias) and a cotangent of the output."""
    shape = images, tokens, heads, head_width
    *qkv, bias, cotangent = random_arrays(*3 * [shape], (heads, tokens, tokens), shape)
    qkv = [(4 * x).astype(dtype) for x in qkv]
    return [*qkv, 4 * bias], cotangent.astype(dtype)


def plain(q, k, v, bias):
    return library_attention(q, k, v, bias=bias[None])


def fused(q, k, v, bias, rows=128):
    """Run the kernel on arrays [B, N, heads, head_width]."""
    tokens, heads = q.shape[1:3]
    plan = Plan(0.0, rows=rows, interpret=True, heads=heads, tokens=tokens)
    q, k, v = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
    out = flash_attention(q.reshape(-1, q.shape[-1]), bias, k, v, plan)
    return out.reshape(*q.shape[:2], heads, -1)


def attend(q, k, v, bias, choice="fused", mask=None):
    """Run `dot_product_attention` with a bias that all images share."""
    bias = None if bias is None else bias[None]
    return dot_product_attention(q, k, v, bias=bias, mask=mask, choice=choice)


@pytest.mark.parametrize(
    ("tokens", "heads", "head_width", "rows"),
    [(256, 2, 64, 128), (300, 2, 128, 384), (140, 4, 32, 128), (270, 4, 64, 128)],
)
def test_flash_kernel_equals_plain_jax(tokens, heads, head_width, rows):
    """Output and gradients of q, k, v and bias are equal, with and without padding.

    A tile of 128 columns contains one, two or four heads.
    """
    inputs, cotangent = inputs_of(3, tokens, heads, head_width)
    actual, expected = (
        unoptimized_jit(partial(output_and_gradients, function))(inputs, cotangent)
        for function in (partial(fused, rows=rows), plain)
    )
    assert_close(actual, expected)


def test_flash_kernel_in_bfloat16_is_about_as_exact_as_plain_jax():
    """Errors relative to float32 are at most 1.1 times those of plain JAX plus 1e-4."""
    inputs, cotangent = inputs_of(2, 300, 2, 64, jnp.bfloat16)
    float32_inputs = [x.astype(jnp.float32) for x in inputs]
    truth = output_and_gradients(plain, float32_inputs, cotangent.astype(jnp.float32))
    errors, plain_errors = (
        relative_errors(function, inputs, cotangent, truth, unoptimized_jit)
        for function in (fused, plain)
    )
    for error, plain_error in zip(errors, plain_errors, strict=True):
        assert error < 1.1 * plain_error + 1e-4


def test_gradient_of_the_bias_is_summed_over_devices():
    """Each of two devices runs the kernel on half of the images."""
    inputs, cotangent = inputs_of(4, 256, 2, 64)
    with mesh_of(data=2):
        jaxpr = jax.make_jaxpr(attend)(*inputs).jaxpr
        assert kernels_in(jaxpr) == [KERNEL]
        actual = unoptimized_jit(partial(output_and_gradients, attend))(
            inputs, cotangent
        )
    expected = output_and_gradients(plain, inputs, cotangent)
    assert_close(actual, expected)


def test_only_supported_arguments_run_the_flash_kernel():
    """No kernel runs with few tokens, a mask, a bias per image or "plain".

    The width must be a multiple of 128; three heads of 32 have a width of 96.
    """

    def kernels(
        images=2, tokens=256, heads=2, head_width=64, bias_per_image=False, **options
    ):
        (q, k, v, bias), _ = inputs_of(images, tokens, heads, head_width)
        run = partial(attend, bias=bias, **options)
        if bias_per_image:
            bias = jnp.stack(images * [bias])
            run = partial(dot_product_attention, bias=bias, mask=None, choice="fused")
        with mesh_of(data=1):
            return kernels_in(jax.make_jaxpr(run)(q, k, v).jaxpr)

    assert kernels() == kernels(heads=4, head_width=32) == [KERNEL]
    assert kernels(tokens=255) == kernels(heads=3, head_width=32) == []
    assert kernels(mask=jnp.ones((2, 1, 1, 256), bool)) == []
    assert kernels(bias_per_image=True) == kernels(choice="plain") == []
    assert kernels(choice="auto") == []  # on a CPU


def test_bias_must_fit_in_vmem(monkeypatch):
    """With 1,600 tokens, the kernel fits in the 128 MiB of a v5e and not in 64 MiB."""
    monkeypatch.setattr(target, "platform", lambda: "tpu")

    def kernels(tokens, mebibytes):
        chip = tpu_info(mebibytes)
        monkeypatch.setattr(target.pltpu, "get_tpu_info", lambda: chip)
        q = jax.ShapeDtypeStruct((2, tokens, 2, 64), jnp.bfloat16)
        bias = jax.ShapeDtypeStruct((2, tokens, tokens), jnp.float32)
        run = partial(attend, choice="auto")
        with mesh_of(data=1):
            return kernels_in(jax.make_jaxpr(run)(q, q, q, bias).jaxpr)

    assert kernels(1600, 128) == kernels(1024, 64) == [KERNEL]
    assert kernels(1600, 64) == []


def test_blocks_with_relative_positions_run_the_flash_kernel(monkeypatch):
    """The output and the gradients of a block equal those of plain JAX.

    The bias table is one of the parameters. The test lowers the VMEM so that this
    kernel fits, but not the kernel of the whole residual attention branch.
    """

    def find_small_target(*arguments):
        found = target.find_target(*arguments)
        return found and replace(found, vmem=7 * 10**6)

    monkeypatch.setattr(dispatch, "find_target", find_small_target)
    sizes = dict(grid=(16, 16), relative_position=True, mlp_ratio=0.5)
    *block, _ = main_stage_block("ordinary", 2, **sizes)
    x, cotangent = random_arrays((2, 256, 128), (2, 256, 128))
    with mesh_of(data=1):
        assert_fused_equals_unfused(block, 3 * x, cotangent, [KERNEL])
