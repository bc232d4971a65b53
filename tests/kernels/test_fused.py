"""Tests of fused kernels: MLP and attention branches on TPUs, LayerNorm on GPUs.

Interpreted on the CPU, the kernels equal plain JAX. The compilers for TPUs and GPUs
accept them. Further tests check attention without these kernels, GELU, LayerNorm, and
the choice of block sizes and saved residuals.
"""

from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kernel_cases import (
    CASES,
    EPS,
    assert_bfloat16_errors,
    attention_case,
    drop_path_factors,
    in_bfloat16,
    layer_norm,
    mlp_case,
    norm_case,
    output_and_gradients,
    random_arrays,
    random_inputs,
)
from networks import unoptimized_jit
from numpy.testing import assert_allclose

from hivit_jax.kernels import attention_xla, target
from hivit_jax.models import layers, norms
from hivit_jax.xla.chips import GPU_OPTIONS, devices_of


def saved_size(function, inputs):
    """Return the number of elements of the saved residuals, including inputs."""
    return sum(x.size for x in jax.tree.leaves(jax.vjp(function, *inputs)[1]))


# Layer -> (our function, function of plain JAX, shapes of the inputs)
LAYERS = {
    "gelu": (layers.gelu, partial(jax.nn.gelu, approximate=False), [(48, 256)]),
    "LayerNorm": (
        lambda *inputs: norms.layer_norm(*inputs, EPS, jnp.float32),
        layer_norm,
        [(2, 24, 256), (256,), (256,)],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_jax_and_save_fewer_residuals(name):
    """Values and gradients of GELU and LayerNorm equal those of plain JAX."""
    layer, jax_layer, shapes = LAYERS[name]
    *inputs, cotangent = (4 * x for x in random_arrays(*shapes, shapes[0]))
    expected = jax.jit(partial(output_and_gradients, jax_layer))(inputs, cotangent)
    actual = jax.jit(partial(output_and_gradients, layer))(inputs, cotangent)
    for a, b in zip(actual, expected, strict=True):
        assert_allclose(a, b, rtol=0, atol=3e-6 * float(jnp.abs(b).max()))
    assert (
        saved_size(layer, inputs)
        <= inputs[0].size * 1.1
        < saved_size(jax_layer, inputs) / 2
    )


def test_gelu_in_bfloat16_is_exact_up_to_rounding():
    """GELU and its derivative differ from the exact values only by rounding.

    Inputs include large negative numbers, for which 1 + erf(x) loses all digits in
    bfloat16.
    """
    x = jnp.linspace(-8, 8, 4001).astype(jnp.bfloat16)
    x32 = x.astype(jnp.float32)
    exact_gelu = partial(jax.nn.gelu, approximate=False)
    ones = jnp.ones_like(x32)
    for exact, ours in zip(
        output_and_gradients(exact_gelu, [x32], ones),
        output_and_gradients(layers.gelu, [x], ones),
        strict=True,
    ):
        assert_allclose(np.float32(ours), exact, rtol=2**-8, atol=4e-6)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["", "bias", "mask", "bias, mask"])
def test_attention_without_kernels_equals_jax(arguments):
    """Output and gradients of attention agree with JAX in float32.

    The mask leaves one image without keys.
    """
    q, k, v, cotangent = random_arrays(*[(2, 9, 4, 32)] * 4)
    bias = random_arrays((1, 4, 9, 9))[0] if "bias" in arguments else None
    mask = jnp.arange(9) % 3 * jnp.array([[1], [0]]) > 0
    mask = mask[:, None, None] if "mask" in arguments else None

    def ours(q, k, v, bias):
        return attention_xla.dot_product_attention(
            q, k, v, bias=bias, mask=mask, choice="auto"
        )

    def library(q, k, v, bias):
        return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask)

    inputs = 9 * q, k, v, bias
    actual, expected = (
        output_and_gradients(function, inputs, cotangent)
        for function in (ours, library)
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_allclose(a, b, rtol=0, atol=3e-6 * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [9, 10])
@pytest.mark.parametrize("with_bias", [False, True])
def test_odd_numbers_of_tokens_are_padded_for_cudnn(tokens, with_bias, monkeypatch):
    """9 tokens are padded to 10; output and gradients equal unpadded attention.

    With "plain", cuDNN does not run.
    """
    library, calls = jax.nn.dot_product_attention, []

    def record(*qkv, implementation=None, **others):
        calls.append((implementation, qkv[0].shape[1]))
        return library(*qkv, **others)

    *qkv, cotangent = random_arrays(*[(2, tokens, 4, 32)] * 4, dtype=jnp.bfloat16)
    inputs = qkv + random_arrays((1, 4, tokens, tokens)) * with_bias
    expected = output_and_gradients(library, inputs, cotangent)
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    monkeypatch.setattr(target, "platform", lambda: "gpu")

    def attend(q, k, v, bias=None, *, choice):
        return attention_xla.dot_product_attention(
            q, k, v, bias=bias, mask=None, choice=choice
        )

    actual = output_and_gradients(partial(attend, choice="auto"), inputs, cotangent)
    assert calls == [("cudnn", 10)]
    for a, b in zip(actual, expected, strict=True):
        a, b = np.float32(a), np.float32(b)
        assert_allclose(a, b, rtol=0, atol=0.01 * np.abs(b).max())
    output_and_gradients(partial(attend, choice="plain"), inputs, cotangent)
    assert calls[1:] == [(None, tokens)]


# (drop some images, `num_saved`); a kernel gets at most its own `max_saved`.
DROP_AND_SAVED = [(False, 0), (False, 1), (True, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "drop", "num_saved"),
    [
        arguments
        for name, case in CASES.items()
        for arguments in dict.fromkeys(
            (name, drop, min(num_saved, case.max_saved))
            for drop, num_saved in DROP_AND_SAVED
        )
    ],
)
def test_fused_equals_plain(name, drop, num_saved):
    """Output and all gradients of each kernel agree in float32 over several blocks."""
    case = CASES[name]
    inputs, cotangent = random_inputs(case)
    scale = drop_path_factors(case.images) if drop else None
    plain = partial(case.plain, branch_scale=scale)
    fused = partial(case.fused, branch_scale=scale, num_saved=num_saved, interpret=True)
    expected = jax.jit(partial(output_and_gradients, plain))(inputs, cotangent)
    actual = unoptimized_jit(partial(output_and_gradients, fused))(inputs, cotangent)
    for a, b in zip(actual, expected, strict=True):
        assert_allclose(a, b, rtol=0, atol=3e-6 * float(jnp.abs(b).max()))


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_saved"),
    [
        *(("mlp", 1), ("mlp", 0), ("norm on GPUs", 0)),
        *(("attention of 49", 2), ("attention of 49", 1), ("attention of 49", 0)),
        *(("bias of 49", 2), ("bias of 49", 0)),
    ],
)
def test_kernels_in_bfloat16_are_about_as_exact_as_plain(name, num_saved):
    assert_bfloat16_errors(CASES[name], unoptimized_jit, num_saved, interpret=True)


@pytest.mark.extras
@pytest.mark.skipif(
    not find_spec("jax_cuda13_plugin"), reason="needs the CUDA compiler"
)
@pytest.mark.parametrize("width", [128, 384, 512])
def test_gpu_compiler_accepts_layer_norm(width):
    """Forward and backward pass are one kernel each."""
    case = norm_case(1024, width)
    text = compiled_text(case, devices_of("h100:1")[0], 0, GPU_OPTIONS)
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 2


@pytest.mark.extras
@pytest.mark.skipif(not find_spec("libtpu"), reason="needs the TPU compiler")
@pytest.mark.parametrize("num_saved", [0, 1])
@pytest.mark.parametrize(
    "case", [mlp_case(1024, 128, 256, 512), attention_case(16, 49, 128, 2, 784)]
)
def test_tpu_compiler_accepts_mlp_and_attention(case, num_saved):
    """Forward and backward pass are one kernel each."""
    text = compiled_text(case, devices_of("v5e:2x4")[0], num_saved)
    assert text.count('custom_call_target="tpu_custom_call"') == 2


def compiled_text(case, device, num_saved, options=None):
    """Compile a kernel and its gradients in bfloat16 for a device; return the HLO."""
    mesh = Mesh(np.array([device]), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    inputs, cotangent = random_inputs(case)
    inputs, cotangent = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        (in_bfloat16(inputs), cotangent),
    )
    fused = partial(case.fused, num_saved=num_saved, interpret=False)
    with jax.set_mesh(mesh):
        lowered = jax.jit(partial(output_and_gradients, fused)).lower(inputs, cotangent)
    return lowered.compile(options).as_text()


def test_blocks_contain_whole_tiles_or_whole_images():
    """`block_rows` returns a multiple of the smallest block, or None if no block fits.

    The smallest block is a tile of 8 rows, or the fewest images that fill whole tiles:
    eight images of 49 rows, or one image of 576 rows.
    """
    assert target.block_rows(64 * 784, 8, 1024, 2000) == 1024
    assert target.block_rows(64 * 784, 8, 1024, 1000) == 896
    assert target.block_rows(64 * 49, 8, 256, 2000) == 224
    assert target.block_rows(64 * 49, 392, 1024, 2000) == 784
    assert target.block_rows(16 * 49, 392, 1024, 2000) == 392
    assert target.block_rows(8 * 49, 392, 1024, 2000) == 392
    assert target.block_rows(64 * 576, 576, 512, 2000) == 576
    assert target.block_rows(64 * 576, 576, 512, 500) is None
    assert target.block_rows(4 * 49, 392, 512, 2000) is None


def test_residuals_are_saved_if_moving_is_faster_than_recomputing():
    """The residual is the hidden layer of an MLP.

    `peak_balance` is the ratio of peak FLOP/s to peak HBM bandwidth in byte/s: 166 for
    a v5p, 240 for a v5e. Kernels assume half of the bandwidth. The widths are those of
    the MLPs in the two stem stages and in the main stage of HiViT-B.
    """
    sizes = (128, 384), (256, 768), (512, 2048)
    for peak_balance, expected in (
        (166, [False, True, True]),
        (240, [False, False, True]),
    ):
        tpu = target.Target("cpu", balance=2 * peak_balance)
        for (width, hidden), is_saved in zip(sizes, expected, strict=True):
            product_flops = 2 * width * hidden
            flops = 2 * product_flops, 5 * product_flops, product_flops
            assert tpu.should_save(*flops, width, 2 * hidden) == is_saved, (
                peak_balance,
                width,
            )
