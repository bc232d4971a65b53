"""Tests of scan, remat and kernels, which change no value, and of compilation."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
from flax import nnx
from networks import MINI
from numpy.testing import assert_allclose

import hivit_jax
from hivit_jax.errors import ConfigError
from hivit_jax.kernels import dispatch
from hivit_jax.tree import named_leaves, split

pytestmark = pytest.mark.usefixtures("quick")


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
    """Losses and gradients agree with those of plain blocks, including drop path.

    XLA:CPU calls every block. Other backends have one program for all blocks, unless an
    option changes the program.
    """
    value, found, same = loss_and_gradients(name, **options)
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    # remat=False is the default. This argument gives the result its own cache entry.
    loss, gradients, params = loss_and_gradients(name, remat=False)
    recipes.assert_identical(same, params)  # names, shapes and numbers
    assert_allclose(value, loss, rtol=1e-6)
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        scale = max(np.abs(gradient).max(), 1e-6)
        assert_allclose(found[key] / scale, gradient / scale, atol=2e-6, err_msg=key)


def gradient_program(**options):
    """Return the lowered gradient of a small classifier."""
    model = hivit_jax.create_model("hivit_base", **MINI | options)
    graphdef, params = split(model)
    images = jnp.zeros((2, 64, 64, 3))
    loss = jax.grad(lambda p, x: nnx.merge(graphdef, p)(x).sum())
    return jax.jit(loss).lower(params, images)


def count_lines(**options):
    """Count the lines of the lowered gradient."""
    return len(gradient_program(**options).as_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "options"), [("tpu", dict(scan_blocks=True)), ("cpu", {})]
)
def test_blocks_are_compiled_once(monkeypatch, platform, options):
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    one_by_one = count_lines(depths=(1, 1, 9)) - count_lines()
    monkeypatch.setattr(dispatch, "platform", lambda: platform)
    more = count_lines(depths=(1, 1, 9), **options) - count_lines(**options)
    assert more < one_by_one / 3  # except for stacking parameters


@pytest.mark.slow
def test_cpu_fusions_do_not_grow_with_depth():
    """The number of operands of a fusion does not depend on the number of blocks."""
    found = []
    for depth in (3, 9):
        hlo = gradient_program(depths=(1, 1, depth)).compile().as_text()
        operands = re.findall(r"^%fused_computation\S* \((.*)\) ->", hlo, re.M)
        found.append(max(each.count(":") for each in operands))
    assert found[0] == found[1]


@pytest.mark.slow
def test_blocks_with_different_windows():
    """Blocks with and without windows cannot be scanned, and keep their windows."""
    windows = dict(window_size=2)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with pytest.raises(ConfigError, match="scan_blocks=True with global_blocks"):
        hivit_jax.create_model(
            "hivit_base", **MINI, **windows, global_blocks=(1,), scan_blocks=True
        )
    model = hivit_jax.create_model("hivit_base", **MINI, **windows, scan_blocks=True)
    plain = hivit_jax.create_model("hivit_base", **MINI, **windows)
    assert_allclose(model(images), plain(images), atol=1e-6)
    mixed = hivit_jax.create_model("hivit_base", **MINI, **windows, global_blocks=(1,))
    layers = [x.tokens for x in mixed.layers(images)]
    assert_allclose(mixed.encoder(images)[-1], layers[-1], atol=1e-6)
    assert np.abs(model(images) - mixed(images)).max() > 1e-4
