"""Tests of the order of devices in a mesh."""

from types import SimpleNamespace

import numpy as np
import pytest

from hivit_jax.distributed import sharding
from hivit_jax.errors import ConfigError


def test_slices_lie_along_the_first_divisible_axis():
    """Two slices lie along the first of replica, data and fsdp with an even size.

    They never lie along the tensor axis. Each case is the shape of a mesh and the axis
    along which the slices must lie.
    """
    devices = [
        SimpleNamespace(
            id=8 * s + i, slice_index=s, process_index=s, device_kind="x", platform="x"
        )
        for s in range(2)
        for i in range(8)
    ]
    for shape, axis in (
        ((2, 4, 2, 1), 0),
        ((1, 8, 2, 1), 1),
        ((1, 1, 16, 1), 2),
        ((1, 1, 4, 4), 2),
    ):
        array = sharding.arrange_across_slices(shape, 2, devices)
        assert array.shape == shape
        slice_indices = np.vectorize(lambda device: device.slice_index)(array)
        assert sorted(np.unique(slice_indices.take(0, axis))) == [0]
        assert slice_indices.sum() == 8
        assert (np.diff(slice_indices, axis=axis) >= 0).all()
    with pytest.raises(ConfigError, match="over 2 slices or nodes; expected replica"):
        sharding.arrange_across_slices((1, 1, 1, 16), 2, devices)
