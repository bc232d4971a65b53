"""Inputs of the golden data: weights, images, noise and labels.

Each array is a function of (name, shape, seed). It is drawn from a PCG64 generator with
the seed ``crc32(name) + seed``. Names, shapes and layouts are PyTorch's, except that
images are NHWC.
"""

import json
import zlib
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hivit_jax.models import create_model
from hivit_jax.models.positions import sincos_table
from hivit_jax.tree import split
from hivit_jax.weights.names.official import from_official, to_official

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
FIXTURES = MANIFEST["fixtures"]
SEED = MANIFEST["seed"]

# Model arguments of the golden data -> arguments of this package
OUR_NAMES = {
    "img_size": "image_size",
    "hifeat": "multi_scale",
    "rpe": "relative_position",
}
SUPERVISED = {"cls_tiny", "cls_small", "cls_base"}  # fixtures of HiViT-T, -S and -B
MINI_CLASSIFIER = FIXTURES["features_mini_rpe"]["config"]


def generator(name: str, seed: int = SEED) -> np.random.Generator:
    """Return the random generator of the array with this name."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + seed))


def normal(name: str, shape, seed: int = SEED) -> np.ndarray:
    """Return normally distributed float32 numbers."""
    return generator(name, seed).standard_normal(tuple(shape), dtype=np.float32)


def weight(name: str, shape, seed: int = SEED) -> np.ndarray:
    """Return a state dict entry that keeps the variance of activations at about 1."""
    values, leaf = normal(name, shape, seed), name.rsplit(".", 1)[-1]
    if "pos_embed" in leaf or leaf in ("mask_token", "relative_position_bias_table"):
        return np.float32(0.5) * values
    if len(shape) == 1:
        values = np.float32(0.1) * values
        return np.float32(1) + values if leaf == "weight" else values
    return np.float32(1 / np.sqrt(np.prod(shape[1:]))) * values


def state_dict(fixture: str, shapes=None) -> dict[str, np.ndarray]:
    """Return the official state dict of a fixture: random weights, computed tables."""
    state = {}
    for name, shape in (shapes or FIXTURES[fixture]["state_dict"]).items():
        if name.endswith("relative_position_index"):
            continue
        if name == "decoder_pos_embed":
            side = int(shape[1] ** 0.5)
            state[name] = sincos_table((side, side), shape[2])[None]
        else:
            state[name] = weight(name, shape)
    return state


def images(name: str, batch: int, size: int, seed: int = SEED) -> np.ndarray:
    """Return images [B, H, W, 3] float32."""
    low = normal(f"input_low/{name}", (batch, 3, 8, 8), seed)
    low = low.repeat(size // 8, 2).repeat(size // 8, 3)
    noise = normal(f"input/{name}", (batch, 3, size, size), seed)
    nchw = np.float32(0.6) * noise + np.float32(0.8) * low
    return np.ascontiguousarray(nchw.transpose(0, 2, 3, 1))


def noise(name: str, batch: int, units: int, seed: int = SEED) -> np.ndarray:
    """Return uniform noise for random masking, [batch, units]."""
    return generator(f"noise/{name}", seed).random((batch, units))


def labels(name: str, batch: int, classes: int, seed: int = SEED) -> np.ndarray:
    """Return random labels, int [batch]."""
    return generator(f"labels/{name}", seed).integers(0, classes, size=batch)


def probe(name: str, gradient: np.ndarray, seed: int = SEED) -> float:
    """Return the inner product of a gradient and a random tensor.

    The gradient has PyTorch's layout.
    """
    direction = normal(f"{name}/probe", gradient.shape, seed).astype(np.float64)
    return float((gradient.astype(np.float64) * direction).sum())


@cache
def golden(fixture: str) -> dict[str, np.ndarray]:
    """Return the golden arrays of a fixture."""
    with np.load(GOLDEN / f"{fixture}.npz") as arrays:
        return dict(arrays)


def build(name: str, state, **overrides):
    """Return (model, params), built from an official state dict."""
    model = nnx.eval_shape(lambda: create_model(name, **overrides))
    params = jax.tree.map(jnp.asarray, from_official(state, model))
    return nnx.merge(split(model)[0], params), params


def build_fixture(fixture: str):
    """Return (model, params) of a fixture with its random weights."""
    config = dict(FIXTURES[fixture].get("config", {}))
    overrides = {OUR_NAMES.get(key, key): value for key, value in config.items()}
    name = f"hivit_{fixture[4:]}" if fixture in SUPERVISED else "mae_hivit_base"
    if "num_classes" in config:
        name = "hivit_base"
    return build(name, state_dict(fixture), **overrides)


def official_shapes(model, to_names=to_official):
    """Return {official name: shape} of an abstract model.

    Args:
      to_names: function (parameters, model) that returns arrays by official name.
    """
    abstract = split(model)[1]
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), abstract)
    return {key: array.shape for key, array in to_names(zeros, model).items()}


def assert_close(actual, expected, atol: float, rtol: float = 0.0) -> None:
    """Assert that arrays are close, by default without a relative tolerance."""
    np.testing.assert_allclose(np.asarray(actual), expected, atol=atol, rtol=rtol)


def check_gradients(
    fixtures, fixture, gradients, atol, probe_atol, norm_rtol=1e-5, seed=SEED
) -> None:
    """Compare gradients with the golden arrays, norms and probes of a fixture.

    Args:
      fixtures: facts about all fixtures.
      gradients: {official name: array}, of all parameters.
      atol, probe_atol: absolute tolerances of arrays and probes.
      norm_rtol: relative tolerance of norms.
      seed: seed of the probes.
    """
    facts, arrays = fixtures[fixture], golden(fixture)
    assert gradients.keys() == facts["grad_norm"].keys()
    for name, gradient in gradients.items():
        if f"grad/{name}" in arrays:
            assert_close(gradient, arrays[f"grad/{name}"], atol)
        norm = np.linalg.norm(np.float64(gradient))
        assert_close(norm, facts["grad_norm"][name], 1e-7, norm_rtol)
        assert_close(probe(name, gradient, seed), facts["grad_probe"][name], probe_atol)


def pretraining_gradients(model, params, images, noise, jit=jax.jit):
    """Run the forward and backward pass of a masked autoencoder or SimMIM.

    Returns:
      (loss, loss of the output), output, {official name: gradient of the first loss}.
      The first loss is the mean of `image_loss`; both must be equal.
    """
    graphdef = split(model)[0]

    def loss(params):
        model = nnx.merge(graphdef, params)
        out = model(images, noise=noise)
        return model.image_loss(images, noise=noise).mean(), out

    (value, out), gradients = jit(jax.value_and_grad(loss, has_aux=True))(params)
    return (value, out.loss), out, to_official(gradients, model)


def classifier_gradients(model, params, images, labels, jit=jax.jit):
    """Run the forward and backward pass of a classifier.

    Returns:
      Mean cross-entropy, logits, {official name: gradient}.
    """
    graphdef = split(model)[0]

    def loss(params):
        logits = nnx.merge(graphdef, params)(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), logits

    (value, logits), gradients = jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, logits, to_official(gradients, model)


def shrink(state, parts):
    """Scale the arrays whose names contain one of the parts by 0.003."""
    return {
        name: array * np.float32(0.003) if any(p in name for p in parts) else array
        for name, array in state.items()
    }
