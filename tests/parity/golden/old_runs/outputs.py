"""Outputs of a model for four synthetic images."""

import jax
import numpy as np


def waves(count: int) -> np.ndarray:
    """Return irregular numbers in [-1, 1], float32 [count]."""
    return np.sin(np.arange(count, dtype=np.float64) ** 1.5).astype(np.float32)


def outputs(model) -> dict[str, np.ndarray]:
    """Return {name: output} of a model for images of 16 x 16 pixels and 16 units."""
    results = jax.device_get(jax.jit(lambda: _outputs(model))())
    return results | {"parameters": np.asarray(model.parameter_count())}


def _outputs(model) -> dict[str, jax.Array]:
    images = waves(4 * 256).reshape(4, 16, 16, 1)
    results = {f"features{i}": x for i, x in enumerate(model.features(images))}
    if hasattr(model, "head"):
        results |= {"logits": model(images), "pooled": model.pooled(images)}
    else:
        out = model(images, noise=waves(64).reshape(4, 16), mask_ratio=0.625)
        results |= {"loss": out.loss, "pred": out.pred, "mask": out.mask}
    return results
