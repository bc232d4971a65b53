"""Bound on the speed of a program by the peaks of a chip."""

from typing import Any

from hivit_jax.xla.chips import Chip


def roofline(
    chip: Chip,
    images: float,
    flops: float,
    moved: float,
    exchanged: list[dict[str, Any]],
) -> dict[str, Any]:
    """The most images a second that a chip's peaks allow: an upper bound.

    Everything overlaps, and what is slowest counts. An all-reduce sends its bytes
    twice: scattered and gathered.

    Args:
      images: of a step on a chip.
      flops, moved: operations and bytes of HBM an image.
      exchanged: as `collectives` tells.
    """
    sent = sum(
        each["bytes_per_step"] * (2 if each["kind"] == "all-reduce" else 1)
        for each in exchanged
    )
    seconds = {
        "arithmetic": flops * images / chip.flops,
        "memory": moved * images / chip.bandwidth,
        "network": sent / chip.network,
    }
    bound = max(seconds, key=seconds.get)
    return {
        "images_per_second_per_chip": images / seconds[bound],
        "bound": bound,
        "seconds_per_step": seconds,
        "peaks": chip._asdict(),
    }
