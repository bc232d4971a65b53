"""Made-up images, for benchmarks."""

from hivit_jax.data.sources.base import Source

SYNTHETIC = {"train": 1024, "test": 64}


class Synthetic(Source):
    """Noise of the shapes that a transform asks for; reads nothing."""

    encoded = False

    def __init__(self, split: str, train_examples: int = 0):
        self._count = split == "train" and train_examples or SYNTHETIC[split]

    def __len__(self) -> int:
        return self._count
