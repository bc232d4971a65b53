"""Tests of scan_blocks and remat: unchanged values, and equal blocks compiled once."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import mini_runs
import numpy as np
import pytest
from flax import nnx
from networks import MINI
from numpy.testing import assert_allclose

import hivit_jax
from hivit_jax.errors import ConfigError
from hivit_jax.kernels import target
from hivit_jax.tree import named_leaves, split

MODELS = {
    "hivit_base": dict(num_classes=10, drop_path_rate=0.5),
    "mae_hivit_base": dict(
        drop_path_rate=0.5, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2
    ),
}


@cache
def loss_and_gradients(name, **options):
    """Return loss, gradients and parameters of a small model with drop path."""
    model = hivit_jax.create_model(name, **MINI, **MODELS[name], **options)
    graphdef, params = split(model)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, 64, 64, 3)).astype(np.float32)
    noise, keys = rng.random((8, 16)), jax.random.split(jax.random.key(1), 8)

    def loss(params):
        model = nnx.merge(graphdef, params)
        if name == "hivit_base":
            return jnp.square(model(images, drop_path_keys=keys)).sum()
        out = model(images, noise=noise, mask_ratio=0.75, drop_path_keys=keys)
        return out.loss

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    return value, named_leaves(gradients), params


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(remat=True),
        dict(scan_blocks=True),
        dict(remat=True, scan_blocks=True),
    ],
)
def test_scan_and_remat_change_no_value(monkeypatch, name, options):
    """Losses and gradients with drop path equal those of blocks that run one by one.

    On XLA:CPU, all blocks call one function that is compiled once. The expected values
    come from the code for TPUs, where every block is inlined in the program.
    """
    loss, gradients, params = loss_and_gradients(name, **options)
    monkeypatch.setattr(target, "platform", lambda: "tpu")
    # remat=False is the default. This argument gives the result its own cache entry.
    expected_loss, expected_gradients, expected_params = loss_and_gradients(
        name, remat=False
    )
    mini_runs.assert_identical(params, expected_params)
    assert_allclose(loss, expected_loss, rtol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        scale = max(np.abs(gradient).max(), 1e-6)
        assert_allclose(
            gradients[key] / scale, gradient / scale, atol=2e-6, err_msg=key
        )


def lower_gradient(**options):
    """Return the lowered gradient function of a small classifier."""
    model = hivit_jax.create_model("hivit_base", **MINI | options)
    graphdef, params = split(model)
    images = jnp.zeros((2, 64, 64, 3))
    gradient = jax.grad(lambda p, x: nnx.merge(graphdef, p)(x).sum())
    return jax.jit(gradient).lower(params, images)


def count_lines(**options):
    """Count the lines of the lowered gradient function."""
    return len(lower_gradient(**options).as_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "options"), [("tpu", dict(scan_blocks=True)), ("cpu", {})]
)
def test_equal_blocks_are_compiled_once(monkeypatch, platform, options):
    # Each difference is the number of lines that seven more main blocks add.
    monkeypatch.setattr(target, "platform", lambda: "tpu")
    lines_without_sharing = count_lines(depths=(1, 1, 9)) - count_lines()
    monkeypatch.setattr(target, "platform", lambda: platform)
    lines = count_lines(depths=(1, 1, 9), **options) - count_lines(**options)
    # Not 0, because each block adds a call or stacks its parameters.
    assert lines < lines_without_sharing / 3


@pytest.mark.slow
def test_cpu_fusions_do_not_grow_with_depth():
    """The largest number of operands of a fusion is independent of the depth."""
    most_operands = []
    for depth in (3, 9):
        hlo = lower_gradient(depths=(1, 1, depth)).compile().as_text()
        operand_lists = re.findall(r"^%fused_computation\S* \((.*)\) ->", hlo, re.M)
        most_operands.append(max(text.count(":") for text in operand_lists))
    assert most_operands[0] == most_operands[1]


@pytest.mark.slow
def test_scan_blocks_requires_equal_windows():
    """scan_blocks=True refuses global blocks, which change the output.

    If all blocks have equal windows, scan_blocks changes no output.
    """
    windows = dict(window_size=2)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with pytest.raises(ConfigError, match="scan_blocks=True with global_blocks"):
        hivit_jax.create_model(
            "hivit_base", **MINI, **windows, global_blocks=(1,), scan_blocks=True
        )
    scanned = hivit_jax.create_model("hivit_base", **MINI, **windows, scan_blocks=True)
    unscanned = hivit_jax.create_model("hivit_base", **MINI, **windows)
    assert_allclose(scanned(images), unscanned(images), atol=1e-6)
    with_global_block = hivit_jax.create_model(
        "hivit_base", **MINI, **windows, global_blocks=(1,)
    )
    tokens = [layer.tokens for layer in with_global_block.layers(images)]
    assert_allclose(with_global_block.encoder(images)[-1], tokens[-1], atol=1e-6)
    assert np.abs(scanned(images) - with_global_block(images)).max() > 1e-4
