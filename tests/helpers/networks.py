"""Small networks that compile quickly. Each parameter affects the output."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import reference
from flax import nnx

from hivit_jax.models import create_model
from hivit_jax.models.flops import module_cost
from hivit_jax.models.masking import count_visible_units
from hivit_jax.tree import leaf_name, named_leaves, split

MINI = dict(image_size=64, embed_dim=64, depths=(1, 1, 2), num_heads=2)
DECODER = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
DEFAULTS = {
    "hivit_base": MINI | dict(num_classes=10),
    "mae_hivit_base": MINI | DECODER,
}


@cache
def abstract_model(name, **overrides):
    """Return a model whose parameters have shapes but no values."""
    return nnx.eval_shape(lambda: create_model(name, **overrides))


def random_weight(path, leaf):
    """Return a parameter that keeps the variance of activations at about 1."""
    name = leaf_name(path)
    values, kind = random_array(leaf.shape, name), name.rsplit("/", 1)[-1]
    if kind == "kernel":
        return values / np.float32(np.sqrt(leaf.shape[0]))
    if kind in ("scale", "bias"):
        return np.float32(kind == "scale") + np.float32(0.1) * values
    return np.float32(0.5) * values


def mini(name="hivit_base", **overrides):
    """Return a small model in which every parameter affects the output."""
    model = abstract_model(name, **DEFAULTS[name] | overrides)
    graphdef, params = split(model)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(random_weight, params))


# Minimal optimization: otherwise the tests would spend most of their time compiling.
unoptimized_jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def jit_model(model, function):
    """Jit `function(model, *arrays)` as a function of the arrays."""
    graphdef, params = split(model)
    run = unoptimized_jit(
        lambda params, *args: function(nnx.merge(graphdef, params), *args)
    )
    return partial(run, params)


def abstract_outputs(function, *models):
    """Return the ShapeDtypeStructs of `function(*models)` without computing arrays."""
    graphdefs, params = zip(*map(split, models), strict=True)

    def run(params):
        return function(*map(nnx.merge, graphdefs, params))

    return jax.eval_shape(run, params)


def numpy_attention(attention, x, bias):
    """Apply an attention layer to units [K, C], with score bias [heads, K, K]."""
    params = {k: np.asarray(v) for k, v in named_leaves(split(attention)[1]).items()}
    kernel, qkv_bias = params["qkv/kernel"], params["qkv/bias"]
    q, k, v = np.einsum("kc,cthd->thkd", x, kernel) + qkv_bias[:, :, None]
    exponentials = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]) + bias)
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    heads = (probabilities @ v).transpose(1, 0, 2).reshape(x.shape)
    return heads @ params["proj/kernel"] + params["proj/bias"]


@cache
def jit_initializer(name, **overrides):
    """Return a jitted function that initializes the parameters of a small model."""
    arguments = DEFAULTS[name] | overrides
    return unoptimized_jit(
        lambda key: split(create_model(name, seed=key, **arguments))[1]
    )


def initial_params(name, seed, **overrides):
    """Return {name: initial parameter} of a small model."""
    params = jit_initializer(name, **overrides)(jax.random.key(seed))
    return {k: np.asarray(v) for k, v in named_leaves(params).items()}


def random_array(shape, tag="pictures"):
    """Return normally distributed float32 numbers that depend on shape and tag."""
    return jnp.asarray(reference.normal(tag, shape))


def keys_per_sample(count, seed=0):
    """Return PRNG keys, one per sample, [count]."""
    return jax.random.split(jax.random.key(seed), count)


@cache
def run_small_mae(dtype):
    """Return loss, outputs, gradients and parameters of a small masked autoencoder."""
    images, noise = (
        random_array((2, 64, 64, 3)),
        jnp.asarray(reference.noise("x", 2, 16)),
    )
    graphdef, params = split(mini("mae_hivit_base", dtype=dtype))

    def run(params):
        out = nnx.merge(graphdef, params)(images, noise=noise)
        return out.loss, out

    step = unoptimized_jit(jax.value_and_grad(run, has_aux=True))
    (loss, out), gradients = step(params)
    return loss, out, named_leaves(gradients), named_leaves(params)


def params_by_name(model):
    """Return {name: parameter on the host} of a model."""
    return jax.device_get(named_leaves(split(model)[1]))


def bicubic_like_torch(maps, grid):
    """Resize maps [h, w, D] to [*grid, D] like PyTorch's bicubic interpolation."""

    def cubic(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    out = np.zeros((*grid, maps.shape[-1]))
    for row, column in np.ndindex(grid):
        y = (row + 0.5) * maps.shape[0] / grid[0] - 0.5
        x = (column + 0.5) * maps.shape[1] / grid[1] - 0.5
        for i in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
            for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                source = min(max(i, 0), len(maps) - 1), min(max(j, 0), len(maps[0]) - 1)
                out[row, column] += cubic(y - i) * cubic(x - j) * maps[source]
    return out


def training_macs(model, mask_ratio):
    """Return the multiply-adds in matrix products of a training forward pass.

    In training, the decoder's last MLP and prediction layer skip visible units.
    """
    visible = count_visible_units(math.prod(model.encoder.grid), mask_ratio)
    shortened = model.decoder_blocks[-1].mlp, model.decoder_pred
    skipped_macs = sum(module_cost(layer, visible, 0) for layer in shortened)
    return model.macs(mask_ratio=mask_ratio, layer_norm_cost=0) - skipped_macs


class SquareTask:
    """Task whose loss is the squared output of a linear layer."""

    def __init__(self, features=3):
        self.features = features

    def build_model(self):
        return nnx.Linear(self.features, 1, rngs=nnx.Rngs(0))

    def loss(self, model, frozen, batch, keys):
        return {"loss": model(batch["x"])[:, 0] ** 2}
