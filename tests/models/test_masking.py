"""Tests of random masking: visible units, mask ratios, order of units."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from hivit_jax.errors import ConfigError
from hivit_jax.models.masking import (
    count_simmim_visible_units,
    count_visible_units,
    random_masking,
)


@pytest.mark.parametrize(
    ("units", "ratio", "kept"),
    [(196, 0.75, 49), (196, 0.6, 78), (16, 0.6, 6), (16, 0.9375, 1), (4, 0.5, 2)],
)
def test_number_of_visible_units_is_rounded_down(units, ratio, kept):
    assert count_visible_units(units, ratio) == kept


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.1, 0.0, 1.0])
def test_mask_ratio_out_of_range_is_refused(ratio):
    message = re.escape(f"mask_ratio={ratio}; expected 0 < mask_ratio < 1")
    with pytest.raises(ConfigError, match=message):
        count_visible_units(196, ratio)


def test_mask_ratio_that_keeps_no_unit_is_refused():
    with pytest.raises(ConfigError, match="keeps none of 16 .* at most 0.93$"):
        count_visible_units(16, 0.95)


def test_simmim_rounds_the_number_of_masked_units_up():
    """A ratio of 0.6 masks 22 of 36 units, and a ratio of 0.9 masks 9 of 10."""
    assert count_simmim_visible_units(36, 0.6) == 14
    assert count_simmim_visible_units(10, 0.9) == 1
    with pytest.raises(ConfigError, match="keeps none of 10 .* at most 0.9$"):
        count_simmim_visible_units(10, 0.91)
    with pytest.raises(ConfigError, match="mask_ratio=0; expected"):
        count_simmim_visible_units(10, 0)


def test_random_masking_keeps_the_units_with_the_lowest_noise():
    noise = np.random.RandomState(0).rand(5, 16)
    ids_shuffle, ids_restore, mask = map(
        np.asarray, random_masking(jnp.asarray(noise), 6)
    )
    for sample in range(5):
        order = sorted(range(16), key=lambda unit: noise[sample, unit])
        assert ids_shuffle[sample].tolist() == order
        assert ids_restore[sample].tolist() == [order.index(unit) for unit in range(16)]
        is_masked = [float(unit in order[6:]) for unit in range(16)]
        assert mask[sample].tolist() == is_masked
    assert mask.dtype == np.float32
    assert mask.sum() == 5 * 10


def test_units_with_equal_noise_keep_their_order():
    noise = jnp.asarray([[0.5] * 6, [0.5, 0.1, 0.5, 0.1, 0.5, 0.1]])
    ids_shuffle, ids_restore, _ = random_masking(noise, 4)
    assert ids_shuffle.tolist() == [[0, 1, 2, 3, 4, 5], [1, 3, 5, 0, 2, 4]]
    assert ids_restore.tolist() == [[0, 1, 2, 3, 4, 5], [3, 0, 4, 1, 5, 2]]


def test_noise_of_infinity_or_nan_is_sorted_last():
    """NaN sorts after infinity, and -infinity sorts first."""
    noise = jnp.asarray([[np.inf, 0.5, -np.inf, np.nan, 0.1]])
    ids_shuffle, ids_restore, mask = random_masking(noise, 3)
    assert ids_shuffle.tolist() == [[2, 4, 1, 0, 3]]
    assert ids_restore.tolist() == [[3, 2, 0, 4, 1]]
    assert mask.tolist() == [[1, 0, 0, 1, 0]]
