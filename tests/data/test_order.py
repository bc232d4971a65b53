"""Tests of the order of samples: permutations, epochs, subsets and positions."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hivit_jax.data import order
from hivit_jax.data.order import permutation, samples_at
from hivit_jax.data.sources.digits import Digits
from hivit_jax.errors import ConfigError

IMAGENET = 1_281_167


def test_every_epoch_is_another_permutation():
    orders = [permutation(seed, epoch, 1437) for seed in (0, 1) for epoch in range(3)]
    orders.append(permutation(0, 1_000_000, 1437))
    for order_of_epoch in orders:
        assert order_of_epoch.dtype == np.int64
        assert_array_equal(np.sort(order_of_epoch), np.arange(1437))
    for i, order_of_epoch in enumerate(orders):
        for earlier in orders[:i]:
            # Two random permutations agree in 1 of 1437 positions on average.
            assert (order_of_epoch == earlier).mean() < 0.01


def test_permutation_is_frozen():
    """The order never changes, so that saved runs resume exactly."""
    first = [500, 469, 1156, 606, 909, 555, 794, 1425]
    assert permutation(0, 0, 1437)[:8].tolist() == first
    permutation.cache_clear()
    assert permutation(0, 0, 1437)[:8].tolist() == first


def test_samples_at_concatenates_the_permutations_of_epochs():
    n = 10
    stream = np.concatenate([permutation(3, epoch, n) for epoch in range(4)])
    indices, epochs = samples_at(np.arange(40), n, 3)
    assert_array_equal(indices, stream)
    assert_array_equal(epochs, np.repeat(np.arange(4), n))
    indices, epochs = samples_at(np.arange(7, 24), n, 3)
    assert_array_equal(indices, stream[7:24])
    assert epochs.tolist() == [0] * 3 + [1] * 10 + [2] * 4
    # Positions may be any subset in any order, such as the positions of a process.
    unordered = np.array([29, 3, 10, 9, 30])
    assert_array_equal(samples_at(unordered, n, 3)[0], stream[unordered])


def test_late_step_computes_only_the_permutations_of_its_epochs(monkeypatch):
    computed = []

    def record(seed, epoch, n):
        computed.append((seed, epoch, n))
        return permutation(seed, epoch, n)

    monkeypatch.setattr(order, "permutation", record)
    start = 100_000 * 4096  # step 100,000 of batches of 4096
    epoch, offset = divmod(start, IMAGENET)
    indices, epochs = samples_at(np.arange(start, start + 4096), IMAGENET, 0)
    assert computed == [(0, epoch, IMAGENET)]
    expected = permutation(0, epoch, IMAGENET)[offset : offset + 4096]
    assert_array_equal(indices, expected)
    assert (epochs == epoch).all()
    assert epoch == 319

    boundary = 320 * IMAGENET
    indices, epochs = samples_at(np.arange(boundary - 5, boundary + 3), IMAGENET, 0)
    assert computed[1:] == [(0, 319, IMAGENET), (0, 320, IMAGENET)]
    assert indices[:5].tolist() == permutation(0, 319, IMAGENET)[-5:].tolist()
    assert indices[5:].tolist() == permutation(0, 320, IMAGENET)[:3].tolist()
    assert epochs.tolist() == [319] * 5 + [320] * 3


def test_class_balanced_training_subset_depends_on_the_seed():
    """The test split is always complete."""
    all_images = {image.tobytes() for image in Digits("train").pixels()}
    subsets = []
    for subset_seed in (0, 1, 0):
        source = Digits("train", train_examples=100, subset_seed=subset_seed)
        assert np.bincount(source.labels).tolist() == [10] * 10
        subsets.append([image.tobytes() for image in source.pixels()])
        assert len(set(subsets[-1])) == 100
        assert set(subsets[-1]) <= all_images
    assert subsets[0] == subsets[2]
    assert set(subsets[0]) != set(subsets[1])
    test = Digits("test", train_examples=100, subset_seed=1)
    assert_array_equal(test.pixels(), Digits("test").pixels())


def test_larger_training_subset_contains_the_smaller():
    small, large = (
        {image.tobytes() for image in Digits("train", n, 2).pixels()}
        for n in (100, 1000)
    )
    assert len(large) == 1000
    assert small < large


@pytest.mark.parametrize("examples", [5, 101, 1010, 1437])
def test_train_examples_must_be_a_multiple_of_10_up_to_1000(examples):
    with pytest.raises(ConfigError, match=f"train_examples={examples}: .* 10 classes"):
        Digits("train", train_examples=examples)
