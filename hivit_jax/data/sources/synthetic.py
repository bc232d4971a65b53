"""Synthetic images for benchmarks."""

from hivit_jax.data.sources.base import Source

NUM_EXAMPLES = {"train": 1024, "test": 64}


class Synthetic(Source):
    """A split whose batches are noise with the shapes of the transform.

    `train_examples` > 0 is the size of the training split.
    """

    encoded = False

    def __init__(self, split: str, train_examples: int = 0):
        self._count = split == "train" and train_examples or NUM_EXAMPLES[split]

    def __len__(self) -> int:
        return self._count
