"""Upper bound on a program's throughput, from a chip's peak rates."""

from typing import Any

from hivit_jax.xla.chips import Chip


def roofline(
    chip: Chip,
    images_per_device: float,
    flops: float,
    hbm_bytes: float,
    collectives: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return an upper bound on images per second and its parts, as JSON values.

    The bound assumes that arithmetic, memory traffic and communication overlap
    completely, so that the slowest of the three determines the time of a step. An
    all-reduce sends its bytes twice: in a reduce-scatter and in an all-gather.

    Args:
      chip: peak rates of a chip, which may consist of several JAX devices.
      images_per_device: images per step and device.
      flops: operations per image.
      hbm_bytes: bytes of HBM traffic per image.
      collectives: result of `cost.collectives`, for one device.

    Returns:
      "images_per_second_per_chip": the upper bound.
      "limited_by": the slowest of the three, "arithmetic", "memory" or "network".
      "seconds_per_step": {name of one of the three: its time alone}.
      "peaks": values of `chip`, except `utilization`.
    """
    devices_per_chip = chip.devices
    sent = devices_per_chip * sum(
        entry["bytes_per_step"] * (2 if entry["kind"] == "all-reduce" else 1)
        for entry in collectives
    )
    images_per_chip = images_per_device * devices_per_chip
    seconds = {
        "arithmetic": flops * images_per_chip / chip.flops,
        "memory": hbm_bytes * images_per_chip / chip.bandwidth,
        "network": sent / chip.network,
    }
    slowest = max(seconds, key=seconds.get)
    peaks = chip._asdict()
    del peaks["utilization"]
    return {
        "images_per_second_per_chip": images_per_chip / seconds[slowest],
        "limited_by": slowest,
        "seconds_per_step": seconds,
        "peaks": peaks,
    }
