"""Tests of the source of scikit-learn's digits."""

import io

import numpy as np
import pytest
from datasets import digits_config
from numpy.testing import assert_array_equal
from PIL import Image

from hivit_jax import inputs
from hivit_jax.data.sources import registry
from hivit_jax.data.sources.digits import Digits


def pixels_and_labels(source):
    """Return the pixels and labels of all images of a source."""
    examples = [source.sample(i) for i in range(len(source))]
    images = [
        np.asarray(Image.open(io.BytesIO(example["image"]))) for example in examples
    ]
    return images, [example["label"] for example in examples]


def test_splits_of_digits_are_fixed_and_disjoint():
    # Imported here, because a global import would slow the collection of tests.
    from sklearn.datasets import load_digits

    digits = load_digits()
    label_of = {}
    for image, label in zip(digits.images, digits.target, strict=True):
        pixels = np.round(image * 255 / 16).astype(np.uint8)
        label_of.setdefault(pixels.tobytes(), label)
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1437, 360)
    images_of_splits = []
    for source in (train, test):
        assert source.labels.dtype == np.int32
        assert source.labels.shape == (len(source),)
        images, labels = pixels_and_labels(source)
        assert_array_equal(images, source.pixels())
        assert_array_equal(labels, source.labels)
        for image, label in zip(images, source.labels, strict=True):
            assert image.shape == (8, 8)
            assert image.dtype == np.uint8
            assert label_of[image.tobytes()] == label
        images_of_splits.append({image.tobytes() for image in images})
    # All 1,797 images differ, so no image is in both splits.
    assert not images_of_splits[0] & images_of_splits[1]
    assert len(images_of_splits[0] | images_of_splits[1]) == len(label_of) == 1797
    # The split is fixed.
    assert test.labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    assert np.bincount(test.labels).tolist() == TEST_COUNTS


TEST_COUNTS = [27, 35, 36, 29, 30, 40, 44, 39, 39, 41]


def test_digits_are_encoded_as_png():
    source = Digits("train")
    sample = source.sample(5)
    assert sample["image"][:8] == b"\x89PNG\r\n\x1a\n"
    assert sample == source.sample(np.int64(5))
    assert sample["label"] == source.labels[5]


def test_train_examples_changes_only_the_training_split():
    data = digits_config(data__train_examples=100).data
    assert len(registry.open_source(data, "train")) == 100
    assert len(registry.open_source(data, "test")) == 360


@pytest.mark.slow
def test_subsets_of_digits_are_class_balanced():
    """data.subset selects the images, equally many of each class."""
    # Imported here, because a global import would slow the collection of tests.
    from sklearn.datasets import load_digits

    digits = load_digits()
    label_of = {
        np.rint(image * 255 / 16).astype(np.uint8).tobytes(): label
        for image, label in zip(digits.images, digits.target, strict=True)
    }
    subsets = {}
    for count, seed in ((0, 0), (50, 0), (50, 3), (70, 3)):
        keys = dict(data__train_examples=count, data__subset=seed)
        cfg = digits_config(model__image_size=8, batch_size=80, **keys)
        [batch] = inputs.train_batches(cfg, 0, 1)
        images = [image.tobytes() for image in batch["image"]]
        labels = batch["label"].tolist()
        assert labels == [label_of[image] for image in images]
        subsets[count, seed] = set(images)
        if count:  # The batch of 80 begins with the whole subset.
            class_counts = np.bincount(labels[:count], minlength=10)
            assert class_counts.tolist() == [count // 10] * 10
            assert len(subsets[count, seed]) == count
        [first, *_] = inputs.eval_batches(cfg)
        source = Digits("test")
        assert_array_equal(first["image"][..., 0], source.pixels()[:80])
    assert len(subsets[0, 0]) == 80
    assert subsets[50, 3] < subsets[70, 3]
    assert len(subsets[50, 3] & subsets[50, 0]) < 25
