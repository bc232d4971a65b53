"""Arrays of a batch: those that a transform fills, and those that the loader adds."""

import jax
import numpy as np

from hivit_jax.data.transforms import Transform

Shapes = dict[str, jax.ShapeDtypeStruct]

# index: of the example in its split, -1 where a batch is filled up.
# weight: 1 for an example that counts, else 0.
# unreadable: 1 for an example that could not be read, else 0.
ADDED = {"index": np.int32, "weight": np.float32, "unreadable": np.float32}


def batch_shapes(transform: Transform) -> tuple[Shapes, ...]:
    """Shapes and dtypes of the whole batch of all processes, one dict a bucket."""
    size = transform.batch_size
    added = {
        name: jax.ShapeDtypeStruct((size,), dtype) for name, dtype in ADDED.items()
    }
    return tuple(
        {
            name: jax.ShapeDtypeStruct((size, *one.shape), one.dtype)
            for name, one in bucket.items()
        }
        | added
        for bucket in transform.shapes
    )
