"""Shapes of a batch: arrays from a transform, and arrays that the loader adds."""

import jax
import numpy as np

from hivit_jax.data.transforms import Transform

Shapes = dict[str, jax.ShapeDtypeStruct]

# index: index of the example in its split, -1 for padding.
# weight: 1 for a readable example, 0 for an unreadable one and for padding.
# unreadable: 1 for an unreadable example, else 0.
LOADER_ARRAYS = {"index": np.int32, "weight": np.float32, "unreadable": np.float32}


def batch_shapes(transform: Transform) -> tuple[Shapes, ...]:
    """Return shapes and dtypes of the global batch, one dict for each bucket.

    A bucket is a set of array shapes that the transform may produce, such as the shapes
    of one image size.
    """
    size = transform.batch_size
    added = {k: jax.ShapeDtypeStruct((size,), v) for k, v in LOADER_ARRAYS.items()}
    return tuple(
        {
            name: jax.ShapeDtypeStruct((size, *struct.shape), struct.dtype)
            for name, struct in shapes.items()
        }
        | added
        for shapes in transform.shapes
    )
