"""ViT and Swin in PyTorch, only for comparisons of speed.

The models have the published sizes, and the blocks of `torch_twin`. A model with
classes supports `classify(images [B, 3, S, S])`, where S is `image_size`. A
model without classes supports `masked_loss(images, noise [B, num_units])`.
"""

import torch
from torch import nn

from benchmarks.torch_twin import Block, PatchMerge, gather_tokens, targets


class ViT(nn.Module):
    """ViT-B/16, or its masked autoencoder (He et al., 2022).

    The masked autoencoder has 111.9 M parameters, the classifier 86.6 M. In the masked
    autoencoder, the encoder processes a class token and a quarter of the units. The
    decoder has 8 blocks of width 512. The targets are pixels normalized per unit.

    Args:
      num_classes: classes of the head; 0: a masked autoencoder.
    """

    num_units, image_size = 196, 224

    def __init__(self, num_classes: int = 0):
        super().__init__()
        self.proj = nn.Conv2d(3, 768, 16, 16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 768))
        self.pos_embed = frozen_parameter(torch.randn(1, self.num_units + 1, 768))
        self.blocks = nn.ModuleList(Block(768, 4.0, 12) for _ in range(12))
        self.norm = nn.LayerNorm(768, eps=1e-6)
        if num_classes:
            self.head = nn.Linear(768, num_classes)
            return
        self.decoder_embed = nn.Linear(768, 512)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 512))
        self.decoder_pos_embed = frozen_parameter(
            torch.randn(1, self.num_units + 1, 512)
        )
        self.decoder_blocks = nn.ModuleList(Block(512, 4.0, 16) for _ in range(8))
        self.decoder_norm = nn.LayerNorm(512, eps=1e-6)
        self.decoder_pred = nn.Linear(512, 16 * 16 * 3)

    def encode(self, images, ids_keep=None):
        """Encode a class token and the units of images: [B, 3, H, W] -> [B, 1+K, 768].

        Args:
          ids_keep: visible units, int [B, K]; None: all.
        """
        x = self.proj(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        x = x if ids_keep is None else gather_tokens(x, ids_keep)
        x = torch.cat([cls.to(x.dtype), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def classify(self, images):
        """Map images [B, 3, 224, 224] to logits."""
        return self.head(self.encode(images)[:, 0])

    def masked_loss(self, images, noise):
        """Return the mean squared error on the 147 masked, normalized units."""
        batch, num_units = noise.shape
        num_visible = num_units // 4
        ids_shuffle = noise.argsort(1)
        ids_restore = ids_shuffle.argsort(1)
        x = self.decoder_embed(self.encode(images, ids_shuffle[:, :num_visible]))
        num_masked = num_units - num_visible
        mask_tokens = self.mask_token.expand(batch, num_masked, -1).to(x.dtype)
        tokens = gather_tokens(torch.cat([x[:, 1:], mask_tokens], 1), ids_restore)
        x = torch.cat([x[:, :1], tokens], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        predicted = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        mask = (ids_restore >= num_visible).float()
        error = (predicted - targets(images, 16, normalize=True)) ** 2
        return (error.mean(-1) * mask).sum() / mask.sum()


def frozen_parameter(table):
    """Return a table as a parameter that is not trained."""
    return nn.Parameter(table, requires_grad=False)


class SwinBlock(Block):
    """Swin block: [B, H, W, C] -> [B, H, W, C].

    Args:
      side: height and width of the grid in tokens, H = W.
      window: side of a window in tokens.
      shift: cyclic shift in tokens; 0: none.
    """

    def __init__(self, dim: int, heads: int, side: int, window: int, shift: int):
        super().__init__(dim, 4.0, heads, grid=window)
        self.window_size, self.shift = window, shift
        self.num_windows = (side // window) ** 2
        mask = shifted_window_mask(side, window, shift) if shift else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x):
        batch, side, _, dim = x.shape
        y, window = self.norm1(x), self.window_size
        per_side = side // window
        if self.shift:
            y = y.roll((-self.shift, -self.shift), (1, 2))
        y = y.reshape(batch, per_side, window, per_side, window, dim).transpose(2, 3)
        y = self.attn(y.reshape(-1, window**2, dim), self.num_windows, self.mask)
        y = y.reshape(batch, per_side, per_side, window, window, dim).transpose(2, 3)
        y = y.reshape(x.shape)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))


def shifted_window_mask(side: int, window: int, shift: int):
    """Return the attention mask of W shifted windows of T tokens, [W, 1, T, T].

    The cyclic shift brings tokens from different regions of the image into one window.
    The mask is -100 between tokens of different regions and 0 between tokens of the
    same region.
    """
    band = torch.zeros(side, dtype=torch.long)
    band[-window:-shift], band[-shift:] = 1, 2
    regions = 3 * band[:, None] + band
    per_side = side // window
    regions = regions.reshape(per_side, window, per_side, window).transpose(1, 2)
    regions = regions.reshape(-1, window**2)
    return -100.0 * (regions[:, None, :, None] != regions[:, None, None]).float()


class Swin(nn.Module):
    """Swin-B classifier, or SimMIM with a Swin-B encoder (Xie et al., 2022).

    SimMIM has 89.9 M parameters, the classifier 87.8 M. The encoder processes all
    tokens. A unit has 32x32 pixels. SimMIM replaces about 60 % of the units by a mask
    token, and a linear head predicts pixels.

    Args:
      num_classes: classes of the head; 0: SimMIM.
      window: side of a window in tokens. Images have 32 * window pixels per side. The
        official classifier uses 7. The official pretraining with SimMIM uses 6.
    """

    def __init__(self, num_classes: int = 0, window: int = 7):
        super().__init__()
        self.window, self.num_units, self.image_size = window, window**2, 32 * window
        self.proj, self.norm0 = nn.Conv2d(3, 128, 4, 4), nn.LayerNorm(128)
        layers: list[nn.Module] = []
        for stage, depth in enumerate((2, 2, 18, 2)):
            side, dim = 8 * window >> stage, 128 << stage
            if stage:
                layers.append(PatchMerge(dim // 2))
            for block in range(depth):
                shift = window // 2 if block % 2 and side > window else 0
                layers.append(SwinBlock(dim, 4 << stage, side, window, shift))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(1024)
        self.head = nn.Linear(1024, num_classes or 32 * 32 * 3)
        if not num_classes:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, 128))

    def embed(self, images):
        """Embed patches of 4x4 pixels: [B, 3, H, W] -> [B, H/4, W/4, 128]."""
        return self.norm0(self.proj(images).permute(0, 2, 3, 1))

    def encode(self, x):
        """Encode patches: [B, 8*window, 8*window, 128] -> [B, window, window, 1024]."""
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def classify(self, images):
        """Map images [B, 3, S, S] to logits."""
        return self.head(self.encode(self.embed(images)).mean((1, 2)))

    def masked_loss(self, images, noise):
        """Return the mean absolute error on the masked units.

        With window=7, 30 of 49 units are masked; with window=6, 22 of 36.
        """
        mask = noise.argsort(1).argsort(1) >= int(0.4 * self.num_units)
        token_mask = mask.reshape(-1, self.window, self.window, 1).float()
        token_mask = token_mask.repeat_interleave(8, 1).repeat_interleave(8, 2)
        x = self.embed(images) * (1 - token_mask) + self.mask_token * token_mask
        predicted = self.head(self.encode(x)).flatten(1, 2)
        error = (predicted - targets(images, 32, normalize=False)).abs().mean(-1)
        return (error * mask).sum() / mask.sum()
