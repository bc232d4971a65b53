"""Tests of the order of devices in a mesh."""

from types import SimpleNamespace

import numpy as np
import pytest

from hivit_jax.distributed import sharding
from hivit_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("minimal_output")


def test_slices_lie_along_the_first_divisible_axis():
    """The size of the axis must be divisible by the number of slices.

    Each case is the shape of a mesh and the axis along which the two slices must lie.
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
        slices = np.vectorize(lambda device: device.slice_index)(array)
        assert sorted(np.unique(slices.take(0, axis))) == [0]
        assert slices.sum() == 8
        assert (np.diff(slices, axis=axis) >= 0).all()
    with pytest.raises(ConfigError, match="over 2 slices or nodes; expected replica"):
        sharding.arrange_across_slices((1, 1, 1, 16), 2, devices)
