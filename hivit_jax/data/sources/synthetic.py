"""Synthetic dataset for benchmarks."""

from hivit_jax.data.sources.base import Source

NUM_EXAMPLES = {"train": 1024, "test": 64}


class Synthetic(Source):
    """A split whose batches are noise with the shapes of the task's transform.

    Args:
      train_examples: size of the training split; 0: 1024.
    """

    encoded = False

    def __init__(self, split: str, train_examples: int = 0):
        self._count = split == "train" and train_examples or NUM_EXAMPLES[split]

    def __len__(self) -> int:
        return self._count
