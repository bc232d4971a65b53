"""Tests of the bound on the speed of a program."""

from hivit_jax.xla import chips, roofline


def test_slowest_resource_bounds_the_throughput():
    chip = chips.CHIPS["v5e"]
    exchanged = [{"kind": "all-reduce", "count": 1, "bytes_per_step": 100e9}]

    def bound(flops, moved, exchanged=()):
        result = roofline.roofline(chip, 10, flops, moved, exchanged)
        return result["limited_by"], result["images_per_second_per_chip"]

    assert bound(197e12, 0) == ("arithmetic", 1)
    assert bound(1, 819e9 / 2) == ("memory", 2)
    # An all-reduce of 100 GB sends 200 GB, which takes 1 s at 200 GB/s.
    assert bound(1, 1, exchanged) == ("network", 10)
    # Each device of a two-device chip sends 200 GB for five images.
    two_devices = roofline.roofline(chip._replace(devices=2), 5, 1, 1, exchanged)
    assert two_devices["images_per_second_per_chip"] == 10 / 2
