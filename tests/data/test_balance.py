"""Tests of the class-balanced order of training examples."""

import jax
import numpy as np
import pytest
from datasets import assert_batches_equal, folder_config, noise_image
from numpy.testing import assert_array_equal
from PIL import Image

from hivit_jax import inputs
from hivit_jax.data.balance import BalancedOrder, balanced_counts
from hivit_jax.data.order import permutation
from hivit_jax.data.sources.base import Source
from hivit_jax.errors import ConfigError

LABELS = np.array([0] * 50 + [2] * 10 + [5] * 3 + [7])
LABELS = LABELS[permutation(9, 9, 64)]  # because datasets may be unsorted


@pytest.mark.parametrize(
    ("balance", "counts"),
    [(0.0, [50, 10, 3, 1]), (0.5, [35, 16, 8, 5]), (1.0, [16, 16, 16, 16])],
)
def test_balanced_counts_are_rounded_by_the_largest_remainder(balance, counts):
    # With balance=0.5, the square roots 7.07, 3.16, 1.73 and 1 divide the 64 positions
    # into 34.90, 15.61, 8.55 and 4.94.
    assert balanced_counts([50, 10, 3, 1], balance).tolist() == counts


@pytest.mark.parametrize("n", range(1, 30))
def test_balanced_counts_add_up_to_the_dataset(n):
    sizes = [n, 2 * n + 1, 7]
    for balance in (0.3, 1.0):
        counts = balanced_counts(sizes, balance)
        assert counts.sum() == sum(sizes)
        assert (counts > 0).all()


def test_examples_of_a_class_are_used_equally_often():
    """The use counts of two examples of a class differ by at most 1 after every epoch.

    No pair (example, pass) may occur twice: the random numbers of the augmentation
    depend on the pair.
    """
    order = BalancedOrder(LABELS, 1.0, 0)
    uses, pairs = np.zeros(64, int), set()
    for epoch in range(5):
        indices, passes = order.samples_at(np.arange(64 * epoch, 64 * epoch + 64))
        assert np.bincount(LABELS[indices])[[0, 2, 5, 7]].tolist() == [16] * 4
        np.add.at(uses, indices, 1)
        for label in (0, 2, 5, 7):
            assert np.ptp(uses[label == LABELS]) <= 1
        pairs |= {*zip(indices.tolist(), passes.tolist(), strict=True)}
    assert len(pairs) == 5 * 64


def test_order_is_a_function_of_seed_and_position():
    """The example at a position does not depend on other positions or their order."""
    all_positions = np.arange(300)
    expected = np.stack(BalancedOrder(LABELS, 0.5, 3).samples_at(all_positions))
    unordered = all_positions[permutation(0, 0, 300)[:70]]
    for positions in (unordered, unordered[::2], all_positions[190:]):
        found = np.stack(BalancedOrder(LABELS, 0.5, 3).samples_at(positions))
        assert_array_equal(found, expected[:, positions])
    other_seed = BalancedOrder(LABELS, 0.5, 4).samples_at(all_positions)[0]
    assert (other_seed != expected[0]).mean() > 0.5


def test_balanced_order_is_frozen():
    """The order never changes, so that saved runs resume exactly."""
    found = BalancedOrder(LABELS, 1.0, 0).samples_at(np.arange(62, 70))
    assert np.stack(found).tolist() == FROZEN_SAMPLES


# Example indices and passes at positions 62 to 69
FROZEN_SAMPLES = [[52, 57, 16, 16, 36, 16, 0, 16], [0, 0, 21, 20, 2, 18, 5, 16]]


@pytest.fixture
def folder(tmp_path, cache_directory):
    """Return class folders with 12 and 2 training images, and one val image each."""
    for split, counts in (("train", (12, 2)), ("val", (1, 1))):
        for label, count in enumerate(counts):
            for k in range(count):
                path = tmp_path / "data" / split / f"c{label}" / f"{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.roll(noise_image(30, 30, 3), k, 0)).save(path)
    return tmp_path / "data"


def test_balanced_batches_contain_each_class_equally_often(folder):
    """With data.balance=0, the order is `permutation`. An epoch has two steps."""
    plain = folder_config(folder, batch_size=7, data__balance=0)
    indices = [batch["index"] for batch in inputs.train_batches(plain, 0, 2)]
    assert_array_equal(np.concatenate(indices), permutation(0, 0, 14))

    config = folder_config(folder, batch_size=7, data__balance=1)
    batches = list(inputs.train_batches(config, 0, 4))
    labels = np.concatenate([batch["label"] for batch in batches])
    assert np.bincount(labels[:14]).tolist() == [7, 7]
    assert np.bincount(labels[14:]).tolist() == [7, 7]
    assert_batches_equal(inputs.train_batches(config, 2, 4), batches[2:])
    # Image 12, one of two in its class, occurs 7 times in two epochs, always with
    # another crop.
    rare = [b["image"][k] for b in batches for k in range(7) if b["index"][k] == 12]
    assert len({image.tobytes() for image in rare}) == len(rare) == 7


@pytest.mark.parametrize("balance", [0.5, 1])
def test_balanced_batches_of_two_processes_concatenate_to_the_batch(
    folder, monkeypatch, balance
):
    """Steps 1 to 3, positions 8 to 31, include the ends of two epochs of 14 images."""
    config = folder_config(folder, batch_size=8, data__balance=balance)
    expected, per_process = list(inputs.train_batches(config, 1, 4)), []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        per_process.append(list(inputs.train_batches(config, 1, 4)))
    assert {len(batch["index"]) for batches in per_process for batch in batches} == {4}
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*per_process, strict=True)
    ]
    assert_batches_equal(joined, expected)
    plain = folder_config(folder, batch_size=8, data__balance=0)
    plain_order = [batch["index"] for batch in inputs.train_batches(plain, 1, 4)]
    balanced = [batch["index"] for batch in joined]
    assert not np.array_equal(np.concatenate(balanced), np.concatenate(plain_order))


def test_balance_requires_labels():
    config = folder_config("x", data__name="synthetic", data__balance=1)
    with pytest.raises(ConfigError, match="data.balance=1 with .*'synthetic'; expect"):
        inputs.make_task(config, "train")
    source = Source()
    assert source.class_counts() == ()
    source.classes, source.labels = ("a", "b", "c"), np.array([1, 1, 0])
    assert source.class_counts() == (1, 2, 0)
    source.labeled = False
    assert source.class_counts() == ()
