"""Tests of drop path: dropped samples, dropped branches and drop path rates."""

import jax.numpy as jnp
import numpy as np
import pytest
from networks import (
    DECODER,
    MINI,
    abstract_model,
    abstract_outputs,
    jit_model,
    keys_per_sample,
    mini,
    random_array,
)
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax.models import blocks, layers


def test_drop_path_without_rate_or_keys_changes_nothing():
    x = random_array((6, 4), "rows")
    assert_array_equal(layers.drop_path(x, 0.0, keys_per_sample(3), 0), x)
    assert layers.drop_path(x, None, keys_per_sample(3), 0) is x
    assert layers.drop_path(x, 0.7, None, 0) is x


@pytest.mark.parametrize("shape", [(64 * 3, 5), (64, 3, 5)])
def test_drop_path_drops_or_scales_whole_samples(shape):
    x = random_array(shape, "rows")
    out = layers.drop_path(x, 0.75, keys_per_sample(64), 3)
    assert out.shape == x.shape
    before, after = (np.asarray(a).reshape(64, 3, 5) for a in (x, out))
    kept = after.any((1, 2))
    assert 4 < kept.sum() < 32  # 16 are expected, with a standard deviation of 3.5
    assert_array_equal(after[kept], before[kept] / (1 - 0.75))
    assert not after[~kept].any()


@pytest.mark.slow
def test_dropping_depends_on_key_and_branch_index_alone():
    """A quarter of the samples is dropped, and branches drop samples independently."""
    keys, ones = keys_per_sample(4000), jnp.ones((4000, 1))

    def factors(keys, branch_index=0):
        return np.asarray(layers.drop_path(ones[: len(keys)], 0.25, keys, branch_index))

    all_factors = factors(keys)
    # Standard error of the mean: sqrt(0.25 / 0.75 / 4000) = 0.009.
    assert all_factors.mean() == pytest.approx(1, abs=0.045)
    order = np.random.RandomState(0).permutation(4000)
    assert_array_equal(factors(keys[order]), all_factors[order])
    assert_array_equal(factors(keys[100:150]), all_factors[100:150])
    next_factors = factors(keys, branch_index=1)
    # Two independent branches are both dropped with probability 1/16.
    both_dropped = (all_factors == 0) & (next_factors == 0)
    assert both_dropped.mean() == pytest.approx(1 / 16, abs=0.02)


@pytest.mark.slow
def test_models_drop_branches_only_with_a_rate_and_keys():
    images, keys = random_array((2, 64, 64, 3)), keys_per_sample(2)

    def run(model, images):
        return model(images), model(images, drop_path_keys=keys)

    without_keys, with_keys = jit_model(mini(), run)(images)
    assert_array_equal(with_keys, without_keys)
    evaluate, train = (
        jit_model(mini(drop_path_rate=0.5), lambda m, x, k=k: m(x, drop_path_keys=k))
        for k in (None, keys)
    )
    without_rate = jit_model(mini(), lambda m, x: m(x))(images)
    assert_array_equal(evaluate(images), without_rate)
    assert (train(images) != without_rate).any()


@pytest.mark.slow
def test_drop_path_of_a_sample_depends_on_its_key_alone():
    model = mini(drop_path_rate=0.9)
    images = jnp.tile(random_array((1, 64, 64, 3)), (8, 1, 1, 1))
    keys, order = keys_per_sample(8), np.array([3, 1, 4, 0, 5, 2, 6, 7])
    run = jit_model(model, lambda model, keys: model(images, drop_path_keys=keys))
    out = np.asarray(run(keys))
    assert len(np.unique(out.round(4), axis=0)) > 4
    assert_allclose(run(keys[order]), out[order], atol=1e-5)


@pytest.mark.slow
def test_drop_path_rates_rise_over_residual_blocks(monkeypatch):
    """The rates of the blocks rise linearly; no two branches share a branch index."""
    calls = []

    def record(x, rate, keys, branch_index):
        assert keys is not None
        calls.append((rate, branch_index))
        return x

    monkeypatch.setattr(blocks, "drop_path", record)
    # On "tpu", blocks are traced inline, so that each call is recorded.
    monkeypatch.setattr(blocks.target, "platform", lambda: "tpu")
    images = jnp.zeros((2, 224, 224, 3))
    abstract_outputs(
        lambda model: model(images, drop_path_keys=keys_per_sample(2)),
        abstract_model("hivit_tiny", drop_path_rate=0.05),
    )
    linear = [0.05 * block / 13 for block in range(14)]  # 2 + 2 + 10 residual blocks
    # The four blocks of the stem have one branch, the blocks of the main stage two.
    expected = linear[:4] + [rate for rate in linear[4:] for _ in range(2)]
    assert [rate for rate, _ in calls] == pytest.approx(expected, abs=1e-8)
    indices = [index for _, index in calls]
    assert len(set(indices)) == len(indices) == 24


def test_decoder_has_no_drop_path(monkeypatch):
    model = abstract_model("mae_hivit_base", **MINI, **DECODER, drop_path_rate=0.5)
    calls = []

    def record(x, rate, keys, branch_index):
        calls.append((rate, keys is None))
        return x

    monkeypatch.setattr(blocks, "drop_path", record)
    # On "tpu", blocks are traced inline, so that each call is recorded.
    monkeypatch.setattr(blocks.target, "platform", lambda: "tpu")
    images, noise = jnp.zeros((2, 64, 64, 3)), jnp.zeros((2, 16))
    abstract_outputs(
        lambda m: m(images, noise=noise, drop_path_keys=keys_per_sample(2)), model
    )
    # Each of the stem's four blocks has one branch, each of the other blocks two.
    encoder_calls, decoder_calls = calls[:-2], calls[-2:]
    rates = [0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.5, 0.5]
    assert [rate for rate, _ in encoder_calls] == pytest.approx(rates)
    assert not any(without_keys for _, without_keys in encoder_calls)
    assert decoder_calls == [(None, True)] * 2
