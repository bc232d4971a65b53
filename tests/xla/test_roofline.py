"""Tests of the bound on the speed of a program."""

import pytest

from hivit_jax.xla import ahead, roofline

pytestmark = pytest.mark.usefixtures("minimal_output")


def test_roofline_is_the_slowest_resource():
    chip = ahead.CHIPS["v5e"]
    exchanged = [{"kind": "all-reduce", "count": 1, "bytes_per_step": 100e9}]

    def bound(flops, moved, exchanged=()):
        result = roofline.roofline(chip, 10, flops, moved, exchanged)
        return result["bound"], result["images_per_second_per_chip"]

    assert bound(197e12, 0) == ("arithmetic", 1)
    assert bound(1, 819e9 / 2) == ("memory", 2)
    per_device = roofline.roofline(chip._replace(devices=2), 5, 1, 1, exchanged)
    assert per_device["images_per_second_per_chip"] == 10 / 2  # two all-reduces a chip
    assert bound(1, 1, exchanged) == ("network", 10)  # 2 x 100 GB at 200 GB/s
