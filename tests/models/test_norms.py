"""Tests of batch normalization: PyTorch's formulas, meshes, examples of weight 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax.distributed import sharding
from hivit_jax.models.norms import BatchNorm
from hivit_jax.rng import Keys
from hivit_jax.training.accumulation import accumulate_gradients
from hivit_jax.tree import split_params

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.normal(2, 3, (16, 4, 5, 6)).astype(np.float32)


@pytest.mark.slow
def test_batch_norm_follows_the_formulas_of_pytorch():
    """Two training steps and an evaluation follow ``nn.BatchNorm2d``.

    The biased variance normalizes; the unbiased variance updates the running variance.
    """
    norm = BatchNorm(6)
    norm.scale[...] = jnp.asarray(RANDOM.rand(6), jnp.float32)
    norm.bias[...] = jnp.asarray(RANDOM.rand(6), jnp.float32)
    mean, var = np.zeros(6), np.ones(6)
    for batch in (IMAGES[:8], IMAGES[8:]):
        x = batch.astype(np.float64).reshape(-1, 6)
        expected = (batch - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        expected = expected * norm.scale[...] + norm.bias[...]
        assert_allclose(norm(batch, jnp.ones(8)), expected, rtol=1e-5, atol=1e-5)
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0, ddof=1)
    assert_allclose(norm.mean[...], mean, rtol=1e-6)
    assert_allclose(norm.var[...], var, rtol=1e-6)
    expected = (IMAGES - mean) / np.sqrt(var + 1e-5)
    expected = expected * norm.scale[...] + norm.bias[...]
    assert_allclose(norm(IMAGES), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.torch
def test_batch_norm_equals_pytorch():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.BatchNorm2d(6, eps=1e-3, momentum=0.3, affine=False)
    ours = BatchNorm(6, epsilon=1e-3, momentum=0.3, affine=False)
    for batch in (IMAGES[:8], IMAGES[8:]):
        expected = theirs(torch.tensor(batch.transpose(0, 3, 1, 2))).numpy()
        actual = ours(batch, jnp.ones(8))
        assert_allclose(actual, expected.transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
    assert_allclose(ours.mean[...], theirs.running_mean.numpy(), rtol=1e-5)
    assert_allclose(ours.var[...], theirs.running_var.numpy(), rtol=1e-5)


def test_statistics_are_model_state_and_not_parameters():
    """The parameters are scale and bias; with affine=False there are none."""
    _, params, model_state = split_params(BatchNorm(6))
    assert (params.keys(), model_state.keys()) == ({"scale", "bias"}, {"mean", "var"})
    assert split_params(BatchNorm(6, affine=False))[1] == {}


def test_examples_of_weight_0_are_ignored():
    """A batch in which all examples have weight 0 changes no statistics."""
    reference, padded = BatchNorm(6), BatchNorm(6)
    weight = np.float32([1] * 5 + [0] * 11)
    expected = reference(IMAGES[:5], jnp.ones(5))
    assert_allclose(padded(IMAGES, weight)[:5], expected, rtol=1e-5, atol=1e-6)
    assert_allclose(padded.mean[...], reference.mean[...], rtol=1e-6)
    assert_allclose(padded.var[...], reference.var[...], rtol=1e-6)
    before = np.array(padded.mean[...]), np.array(padded.var[...])
    assert np.isfinite(padded(IMAGES, jnp.zeros(16))).all()
    assert_array_equal(padded.mean[...], before[0])
    assert_array_equal(padded.var[...], before[1])


class Network(nnx.Module):
    """Network with a layer before its normalization.

    The gradients of this layer pass through the batch statistics.
    """

    def __init__(self):
        self.first = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.norm = BatchNorm(6)
        self.last = nnx.Linear(6, 2, rngs=nnx.Rngs(1))

    def __call__(self, x, weight):
        x = self.norm(jax.nn.gelu(self.first(x)), weight)
        return jnp.square(self.last(x)).mean((1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 4, 1)])
def test_eight_devices_give_the_results_of_one(sizes, num_microbatches):
    """Loss, gradients and statistics of eight devices equal those of one device.

    Some examples have weight 0. Each device has four examples. With two microbatches,
    each microbatch has two examples per device.
    """
    batch = {
        "image": np.concatenate([IMAGES, 2 - IMAGES]),
        "weight": np.float32([1] * 13 + [0] + [1] * 17 + [0]),
    }
    graphdef, params, model_state = split_params(Network())

    def loss(params, model_state, batch, keys):
        model = nnx.merge(graphdef, params, model_state)
        total = (model(batch["image"], batch["weight"]) * batch["weight"]).sum()
        return total, split_params(model)[2]

    def gradient(*arguments):
        (total, model_state), grads = jax.value_and_grad(loss, has_aux=True)(*arguments)
        return (total, grads), model_state

    if num_microbatches > 1:
        gradient = accumulate_gradients(gradient, num_microbatches)
    keys = Keys(jax.random.split(jax.random.key(0), 32), jax.random.key(1))
    axis_sizes = dict(zip(sharding.AXES, sizes, strict=True))
    mesh = sharding.make_mesh(axis_sizes, 32, num_microbatches)
    over_batch = NamedSharding(mesh, sharding.BATCH)
    sharded = jax.device_put((batch, keys.samples), over_batch)
    with jax.set_mesh(mesh):
        arguments = sharded[0], Keys(sharded[1], keys.step)
        results = jax.jit(gradient)(params, model_state, *arguments)
    (total, grads), state = jax.device_get(results)

    # Expected values are computed on one device, from the same microbatches. The first
    # of two microbatches contains the first two of each device's four examples.
    pairs = np.arange(32).reshape(-1, num_microbatches, 2)
    microbatches = pairs.swapaxes(0, 1).reshape(num_microbatches, -1)
    expected_grads, expected_state = jax.tree.map(np.zeros_like, params), model_state
    expected_total = 0.0
    for examples in microbatches:
        (added, expected_state), added_grads = jax.value_and_grad(loss, has_aux=True)(
            *(params, expected_state),
            *({name: array[examples] for name, array in batch.items()}, None),
        )
        expected_total += added
        expected_grads = jax.tree.map(np.add, expected_grads, added_grads)
    assert_allclose(total, expected_total, rtol=1e-5)
    for on_eight, on_one in ((grads, expected_grads), (state, expected_state)):
        jax.tree.map(
            lambda a, b: assert_allclose(a, b, rtol=2e-4, atol=2e-5), on_eight, on_one
        )
    assert (np.abs(state["norm"]["mean"]) > 0).all()
