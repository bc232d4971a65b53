"""What every network on the encoder has: config, run options, facts about its images,
features, layers and counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from hivit_jax.models import flops, positions
from hivit_jax.models.config import HiViTConfig, RunOptions
from hivit_jax.models.hivit import HiViT, Layer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model's images and classes that its parameters do not contain.

    class_names: by class number; () where they are unknown.
    image_size: (height, width) in pixels.
    crop: side of the evaluation's center crop over the shorter side of the image.
    mean, std: one number a channel, of pixel values times `scale`.
    scale: factor from stored pixel values to the range that mean and std are of.
    channels: of an image.
    """

    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    channels: int


def make_info(
    config: HiViTConfig,
    *,
    class_names: Sequence[str] = (),
    crop: float = 0.875,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    scale: float = 1 / 255,
    **_: Any,
) -> ModelInfo:
    """Info of a model of this config, by default ImageNet's.

    Image size and channels are the config's. Mean and std of another number of channels
    are averaged; names of another number of classes are left out.
    """
    if len(mean) != config.in_channels:
        mean, std = ([float(np.mean(x))] * config.in_channels for x in (mean, std))
    if len(class_names) != getattr(config, "num_classes", 0):
        class_names = ()
    sizes = config.image_size, float(crop), tuple(map(float, mean))
    rest = tuple(map(float, std)), float(scale), config.in_channels
    return ModelInfo(tuple(class_names), *sizes, *rest)


class Model(nnx.Module):
    """A network on an encoder.

    Attributes:
      name: of the registered variant that it was made from.
      kind: what to call the network in a sentence.
      info: a `ModelInfo`.
    """

    name: str
    kind: str
    encoder: HiViT
    info: ModelInfo

    @property
    def config(self) -> HiViTConfig:
        """What the model is."""
        return self.encoder.config

    @property
    def run_options(self) -> RunOptions:
        """How the model runs."""
        return self.encoder.run_options

    def features(
        self,
        images: jax.Array,
        ids_keep: jax.Array | None = None,
        stride_32: bool = False,
    ) -> list[jax.Array]:
        """The encoder's feature pyramid, see `HiViT.features`."""
        return self.encoder.features(images, ids_keep, stride_32)

    def layers(self, images: jax.Array, attention: bool = False) -> list[Layer]:
        """Output of each of the encoder's main-stage blocks, see `HiViT.layers`."""
        return self.encoder.layers(images, attention)

    def parameter_count(self) -> int:
        """Number of parameters, head or decoder and fixed tables included: 66.42 M for
        hivit_base, 87.04 M for mae_hivit_base.
        """
        return flops.parameter_count(self)

    def layer_ids(self) -> dict[str, int]:
        """Layer of every parameter by name, as in the official ``lr_decay.py``.

        The patch embedding and absolute positions are 0, residual blocks count from 1,
        a merge has the number of the block before it, and everything behind the encoder
        comes one after the last block.

        Raises:
          ValueError: a parameter of the encoder that is in none of these.
        """
        layers, last = {"patch_embed": 0, "absolute_pos_embed": 0}, 0
        for stage, blocks in enumerate(self.encoder.stages):
            for block in range(len(blocks)):
                last += 1
                layers[f"stages/{stage}/{block}"] = last
            layers[f"merges/{stage}"] = last
        ids = {}
        for path, _ in nnx.to_flat_state(nnx.state(self, nnx.Param)):
            part, *rest = map(str, path)
            prefixes = ["/".join(rest[:length]) for length in (1, 2, 3)]
            found = [layers[prefix] for prefix in prefixes if prefix in layers]
            name = "/".join([part, *rest])
            if part == "encoder" and not found:
                raise ValueError(f"no layer is known for parameter {name!r}")
            ids[name] = found[0] if part == "encoder" else last + 1
        return ids

    def _grid(self, image_size: int | Sequence[int] | None) -> positions.Grid:
        """Units of an image of this size; None: the model's own."""
        size = image_size or self.config.image_size
        return positions.check_grid(size, self.config.patch_size)
