"""Base class of models, and facts about a model's images and classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from hivit_jax.models import flops, positions
from hivit_jax.models.config import EncoderConfig, RunOptions
from hivit_jax.models.encoder import BlockOutput, Encoder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Parameters of an encoder before its first block.
LAYER_ZERO = ("patch_embed", "cls_token", "mask_token", "absolute_pos_embed")


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model's images and classes that its parameters do not contain.

    class_names: names in the order of the logits; () if unknown.
    image_size: (height, width) in pixels.
    crop: side of the center crop in evaluation, divided by the image's shorter side.
    mean, std: one number per channel, for pixel values after multiplication by `scale`.
    scale: factor from stored pixel values to the range of mean and std.
    channels: number of image channels.
    interpolation: resize filter, "bicubic" or "bilinear".
    antialias: widen the filter when downscaling.
    value_range: (low, high), the values of black and white in images with more than 8
      bits; (): 0 and the largest value, for unsigned integers of up to 16 bits.
    dtype: dtype of the pixels before normalization, "uint8", "uint16" or "float32".
    multi_label: an image may have any number of classes. The sigmoid of a logit is the
      probability of the class.
    """

    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    channels: int
    interpolation: str = "bicubic"
    antialias: bool = True
    value_range: tuple[float, ...] = ()
    dtype: str = "uint8"
    multi_label: bool = False


def make_info(
    config: EncoderConfig,
    *,
    class_names: Sequence[str] = (),
    crop: float = 0.875,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    scale: float = 1 / 255,
    interpolation: str = "bicubic",
    antialias: bool = True,
    value_range: Sequence[float] = (),
    dtype: str = "uint8",
    multi_label: bool = False,
    **_: Any,
) -> ModelInfo:
    """Return the info of a model; the defaults are for ImageNet.

    The config determines image size and channels. If mean and std are for another
    number of channels, each is replaced by its average. Class names are dropped if
    their number is not `num_classes`. Other keyword arguments are ignored.
    """
    if len(mean) != config.in_channels:
        mean, std = ([float(np.mean(x))] * config.in_channels for x in (mean, std))
    if len(class_names) != getattr(config, "num_classes", 0):
        class_names = ()
    return ModelInfo(
        class_names=tuple(class_names),
        image_size=config.image_size,
        crop=float(crop),
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        scale=float(scale),
        channels=config.in_channels,
        interpolation=interpolation,
        antialias=antialias,
        value_range=tuple(map(float, value_range)),
        dtype=dtype,
        multi_label=multi_label,
    )


class Model(nnx.Module):
    """Base class of models: an encoder plus a head or a decoder.

    Attributes:
      name: registered name of the model.
      description: noun phrase for the model card.
      architecture: name and publication, for the model card.
      encoder_class: class of the encoder.
      info: facts about images and classes.
    """

    name: str
    description: str
    architecture: str = "HiViT (Zhang et al., ICLR 2023)"
    encoder_class: type[Encoder]
    encoder: Encoder
    info: ModelInfo

    @property
    def config(self) -> EncoderConfig:
        """Config of the model: its sizes."""
        return self.encoder.config

    @property
    def run_options(self) -> RunOptions:
        """Options that change how the model runs, such as dtype and remat."""
        return self.encoder.run_options

    def features(
        self,
        images: jax.Array,
        ids_keep: jax.Array | None = None,
        stride_32: bool = False,
    ) -> list[jax.Array]:
        """Return the outputs of all stages as feature maps in raster order.

        Args:
          images: [B, H, W, C], float32, normalized.
          ids_keep: [B, K] int32, indices of the visible units; None: all units.
          stride_32: add a map at stride 32, a 2x2 max pooling of the last map.

        Returns:
          Maps in compute dtype. HiViT with patch_size=16: [B, H/4, W/4, E/4],
          [B, H/8, W/8, E/2] and [B, H/16, W/16, E]. For the maps of visible units, of
          stride 32 and of other models, see `Encoder.features` and `Swin.features`.
        """
        return self.encoder.features(images, ids_keep, stride_32)

    def layers(self, images: jax.Array, attention: bool = False) -> list[BlockOutput]:
        """Return one `BlockOutput` for each block with attention, in order.

        Args:
          images: [B, H, W, C], float32, normalized.
          attention: also return the attention weights; their shape is [B, heads, N, N]
            in a block that does not use windows.
        """
        return self.encoder.layers(images, attention)

    def parameter_count(self) -> int:
        """Return the number of parameters, including head, decoder and fixed tables.

        hivit_base has 66.42 M parameters, mae_hivit_base 87.04 M.
        """
        return flops.parameter_count(self)

    def layer_ids(self) -> dict[str, int]:
        """Return {parameter name: layer number}, as in the official ``lr_decay.py``.

        In the encoder, the patch embedding, the class and mask tokens and the absolute
        positions have layer 0, and the residual blocks have layers 1, 2, ... A merge
        has the layer of the preceding block. Parameters outside the encoder have the
        layer number after that of the last block.

        Raises:
          ValueError: an encoder parameter belongs to none of these parts.
        """
        layer_of = dict.fromkeys(LAYER_ZERO, 0)
        last = 0
        for stage, blocks in enumerate(self.encoder.stages):
            for block in range(len(blocks)):
                last += 1
                layer_of[f"stages/{stage}/{block}"] = last
            layer_of[f"merges/{stage}"] = last
        ids = {}
        for path, _ in nnx.to_flat_state(nnx.state(self, nnx.Param)):
            root, *rest = map(str, path)
            name = "/".join([root, *rest])
            if root != "encoder":
                ids[name] = last + 1
                continue
            prefixes = ("/".join(rest[:length]) for length in (1, 2, 3))
            prefix = next((p for p in prefixes if p in layer_of), None)
            if prefix is None:
                raise ValueError(
                    f"parameter {name!r} has no layer; expected a parameter of "
                    f"{', '.join(LAYER_ZERO)}, stages or merges"
                )
            ids[name] = layer_of[prefix]
        return ids

    def _grid(self, image_size: int | Sequence[int] | None) -> positions.Grid:
        """Return the grid of patches for an image size; None: for the model's own."""
        size = image_size or self.config.image_size
        return positions.image_grid(size, self.config.patch_size)
