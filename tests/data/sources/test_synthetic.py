"""Tests of the source of synthetic images."""

import sys

import numpy as np
from datasets import assert_batches_equal, digits_config

from hivit_jax import inputs
from hivit_jax.data.sources import registry


def test_synthetic_images_ignore_the_canvas():
    """Synthetic images may be larger than data.canvas."""
    cfg = digits_config(data__name="synthetic", model__image_size=64, data__canvas=32)
    assert next(inputs.train_batches(cfg, 0, 1))["image"].shape == (96, 64, 64, 1)


def test_synthetic_batches_are_reproducible_without_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # importing it fails
    cfg = digits_config(data__name="synthetic", data__train_examples=1000)
    batches = list(inputs.train_batches(cfg, 0, 12))
    assert_batches_equal(batches, inputs.train_batches(cfg, 0, 12))
    assert_batches_equal(batches[11:], inputs.train_batches(cfg, 11, 12))
    for batch in batches:
        assert batch["image"].shape == (96, 16, 16, 1)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        assert set(batch["label"]) == set(range(10))
        assert batch["weight"].dtype == np.float32
        assert (batch["weight"] == 1).all()
    assert len(np.unique(batches[0]["image"], axis=0)) > 32
    count = sum(batch["weight"].sum() for batch in inputs.eval_batches(cfg))
    assert count == len(registry.open_source(cfg.data, "test")) > 0
