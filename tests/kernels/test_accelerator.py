"""Tests on a GPU or TPU: rounding errors of kernels and of complete networks.

``JAX_PLATFORMS=cuda python -m pytest tests/kernels/test_accelerator.py``
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from jax.sharding import Mesh
from kernel_cases import (
    CASES,
    assert_bfloat16_errors,
    norm_case,
    output_and_gradients,
    relative_errors,
)
from networks import random_array
from numpy.testing import assert_allclose, assert_array_less

from hivit_jax.kernels import attention_xla, dispatch
from hivit_jax.tree import named_leaves, split
from hivit_jax.weights.names.official import to_official

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="needs an accelerator"),
]


@pytest.fixture(autouse=True)
def one_device_and_default_precision():
    """Use one device and, as in training, JAX's default precision of products."""
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", None)
    with jax.set_mesh(Mesh(np.array(jax.devices()[:1]), ("data",))):
        yield
    jax.config.update("jax_default_matmul_precision", before)


STAGE_NORMS = {"stem": norm_case(25088, 128), "main stage": norm_case(1568, 512)}


@pytest.mark.parametrize("num_saved", [0, 1, 2])
@pytest.mark.parametrize("name", [*CASES, *STAGE_NORMS])
def test_kernels_on_accelerators_are_about_as_exact_as_plain(name, num_saved):
    case = (CASES | STAGE_NORMS)[name]
    if case.platform != jax.default_backend() or num_saved > case.max_saved:
        pytest.skip("no such kernel on this backend")
    assert_bfloat16_errors(case, jax.jit, num_saved, interpret=False)


@jax.custom_vjp
def plain_flash_attention(q, k, v, bias=None):
    """Compute attention in plain JAX, rounded as in a fused kernel.

    A fused kernel saves only the bfloat16 output and the log-sum-exp of each row. The
    backward pass uses the rounded output. The gradients of q and k are therefore less
    exact than with a saved softmax.
    """
    return _flash_forward(q, k, v, bias)[0]


def _flash_scores(q, k, bias):
    """Return scores, with the bias rounded as in `cudnn_attention`."""
    scores = _product("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    return scores if bias is None else scores + bias.astype(q.dtype)


def _flash_forward(q, k, v, bias):
    scores = _flash_scores(q, k, bias)
    log_sums = jax.nn.logsumexp(scores, -1, keepdims=True)
    weights = jnp.exp(scores - log_sums).astype(q.dtype)
    out = _product("bhqk,bkhd->bqhd", weights, v).astype(q.dtype)
    return out, (q, k, v, bias, out, log_sums)


def _flash_backward(saved, cotangent):
    q, k, v, bias, out, log_sums = saved
    scale = 1 / np.sqrt(q.shape[-1])
    weights = jnp.exp(_flash_scores(q, k, bias) - log_sums)
    output_dots = _product("bqhd,bqhd->bhq", cotangent, out)[..., None]
    score_gradients = weights * (
        _product("bqhd,bkhd->bhqk", cotangent, v) - output_dots
    )
    dbias = score_gradients.sum(0, keepdims=True).astype(q.dtype)
    score_gradients = (scale * score_gradients).astype(q.dtype)
    gradients = (
        _product("bhqk,bkhd->bqhd", score_gradients, k),
        _product("bhqk,bqhd->bkhd", score_gradients, q),
        _product("bhqk,bqhd->bkhd", weights.astype(q.dtype), cotangent),
    )
    gradients = tuple(gradient.astype(q.dtype) for gradient in gradients)
    return *gradients, None if bias is None else dbias.astype(bias.dtype)


def _product(axes, a, b):
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


plain_flash_attention.defvjp(_flash_forward, _flash_backward)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [49, 196, 300])
def test_attention_is_as_exact_as_flash_attention(tokens, with_bias):
    """Errors relative to float32 exceed those of `plain_flash_attention` only slightly.

    On TPUs, 300 tokens with a bias run the kernel of `flash_tpu`.
    """
    *inputs, cotangent = 4 * random_array((4, 8, tokens, 16, 32))
    inputs = [x.astype(jnp.bfloat16) for x in inputs]
    inputs += [random_array((1, 16, tokens, tokens), "bias")] * with_bias

    with jax.default_matmul_precision("highest"):
        float32_inputs = [jnp.float32(x) for x in inputs]
        truth = output_and_gradients(
            jax.nn.dot_product_attention, float32_inputs, cotangent
        )

    def attend(q, k, v, bias=None):
        return attention_xla.dot_product_attention(
            q, k, v, bias=bias, mask=None, choice="auto"
        )

    our_errors, flash_errors = (
        relative_errors(function, inputs, cotangent, truth, jax.jit)
        for function in (attend, plain_flash_attention)
    )
    assert_array_less(our_errors, 1.1 * np.array(flash_errors) + 1e-3)


@pytest.mark.parametrize("choice", dispatch.CHOICES)
def test_base_mae_in_bfloat16_equals_the_official_code(choice):
    """Loss and gradient norms match the golden data; a second run is bit-identical.

    The two golden images are repeated, because kernels run only with many rows.
    """
    facts = reference.FIXTURES["mae_base"]
    state = reference.state_dict("mae_base")
    overrides = dict(dtype="bfloat16", kernels=choice)
    model, params = reference.build("mae_hivit_base", state, **overrides)
    images = np.tile(reference.images("mae224", 2, 224), (16, 1, 1, 1))
    noise = np.tile(reference.noise("mae224", 2, 196), (16, 1)).astype(np.float32)
    graphdef = split(model)[0]

    @jax.jit
    @jax.value_and_grad
    def run(params):
        return nnx.merge(graphdef, params).image_loss(images, noise=noise).mean()

    (loss, gradients), repeated = (jax.device_get(run(params)) for _ in range(2))
    assert_allclose(loss, facts["loss_f64"], rtol=1e-3)
    for name, gradient in to_official(gradients, model).items():
        if name != "decoder_pos_embed":
            gradient_norm = np.linalg.norm(np.float64(gradient))
            expected = facts["grad_norm"][name]
            assert_allclose(gradient_norm, expected, rtol=0.01, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(loss, repeated[0])
    repeated_gradients = named_leaves(repeated[1])
    for name, gradient in named_leaves(gradients).items():
        np.testing.assert_array_equal(gradient, repeated_gradients[name], err_msg=name)
