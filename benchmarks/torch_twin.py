"""HiViT and its masked autoencoder in PyTorch, only for comparisons.

The order of operations and the parameter names follow the official code, so that the
models can load the state dict of `hivit_jax.weights.names.official.to_official`.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class Mlp(nn.Module):
    """MLP: linear layer, GELU with erf, linear layer."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Self-attention, with a table of relative positions if `grid` is given.

    Args:
      grid: side of the square grid of tokens.

    Attributes:
      plain: class attribute; compute scores and softmax explicitly, as the official
        code does. False: use `scaled_dot_product_attention`.
    """

    plain = False

    def __init__(self, dim: int, heads: int, grid: int | None):
        super().__init__()
        self.heads, self.grid = heads, grid
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if grid:
            table = torch.zeros((2 * grid - 1) ** 2, heads)
            self.relative_position_bias_table = nn.Parameter(table)
            self.register_buffer("index", relative_index(grid), persistent=False)

    def forward(self, x, num_windows: int = 1, mask=None):
        """Map tokens [B*W, T, C] to [B*W, T, C].

        Args:
          num_windows: windows per image, W.
          mask: [W, 1, T, T], added to the scores; used only with `grid`.
        """
        _, tokens, dim = x.shape
        shape = (-1, num_windows, tokens, 3, self.heads, dim // self.heads)
        qkv = self.qkv(x).reshape(shape)
        # Windows are treated as heads, so that images share biases without copies.
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3).unbind(0)
        bias = None
        if self.grid:
            bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)
            bias = bias[None] if mask is None else bias + mask
            bias = bias.expand(num_windows, -1, -1, -1).flatten(0, 1)[None].to(q.dtype)
        if self.plain:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            out = (scores if bias is None else scores + bias).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out = out.unflatten(1, (num_windows, self.heads)).transpose(2, 3)
        return self.proj(out.reshape(x.shape))


def relative_index(grid: int):
    """Return the table row of each pair of tokens, int [T, T] with T = grid * grid."""
    token = torch.arange(grid**2)
    rows, columns = token // grid, token % grid
    row_offset = rows[:, None] - rows[None] + grid - 1
    column_offset = columns[:, None] - columns[None] + grid - 1
    return row_offset * (2 * grid - 1) + column_offset


def gather_tokens(x, ids):
    """Gather tokens: [B, N, ...], int [B, K] -> [B, K, ...]."""
    index = ids.reshape(*ids.shape, *(1,) * (x.ndim - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


class Block(nn.Module):
    """Residual block of attention and MLP; with heads=0, only the MLP (stem)."""

    def __init__(self, dim: int, ratio: float, heads: int = 0, grid: int | None = None):
        super().__init__()
        if heads:
            self.norm1 = nn.LayerNorm(dim, eps=1e-6)
            self.attn = Attention(dim, heads, grid)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, ratio)

    def forward(self, x):
        if hasattr(self, "attn"):
            x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerge(nn.Module):
    """Merge 2x2 tokens: [..., h, w, C] -> [..., h/2, w/2, 2C]."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=1e-6)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        parts = [x[..., r::2, c::2, :] for c in (0, 1) for r in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class PatchEmbed(nn.Module):
    """Embed images [B, C, H, W] as cells [B, N, 4, 4, E/4], units row-major."""

    def __init__(self, channels: int, dim: int, cell: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, cell, cell)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images):
        x = self.proj(images)
        batch, dim, height, width = x.shape
        x = x.reshape(batch, dim, height // 4, 4, width // 4, 4)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, 4, 4, dim)
        return self.norm(x)


class HiViT(nn.Module):
    """HiViT encoder with a classifier head or a masked autoencoder's decoder.

    Args:
      relative_position: use relative position tables in the main stage.
      num_classes: classes of the head; 0: a masked autoencoder.
      decoder: (width, depth, heads) of the decoder, whose input is multi-scale.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        in_channels: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: int,
        relative_position: bool,
        num_classes: int = 0,
        decoder: Sequence[int] = (),
    ):
        super().__init__()
        grid, self.patch_size = image_size // patch_size, patch_size
        self.image_size = image_size
        self.num_units = grid**2
        self.patch_embed = PatchEmbed(in_channels, embed_dim // 4, patch_size // 4)
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, grid**2, embed_dim))
        blocks: list[nn.Module] = []
        for width, depth in ((embed_dim // 4, depths[0]), (embed_dim // 2, depths[1])):
            blocks += [Block(width, 3.0) for _ in range(2 * depth)]
            blocks.append(PatchMerge(width))
        table_grid = grid if relative_position else None
        blocks += [
            Block(embed_dim, 4.0, num_heads, table_grid) for _ in range(depths[2])
        ]
        self.blocks = nn.ModuleList(blocks)
        if num_classes:
            self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6)
            self.head = nn.Linear(embed_dim, num_classes)
        else:
            width, depth, heads = decoder
            self.norm = nn.LayerNorm(7 * embed_dim, eps=1e-6)
            self.decoder_embed = nn.Linear(7 * embed_dim, width)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
            table = torch.zeros(1, grid**2, width)
            self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
            self.decoder_blocks = nn.ModuleList(
                Block(width, 4.0, heads) for _ in range(depth)
            )
            self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
            self.decoder_pred = nn.Linear(width, patch_size**2 * in_channels)

    def encode(self, images, ids_keep):
        """Encode the visible units of images [B, C, H, W].

        Args:
          ids_keep: visible units, int [B, K].

        Returns:
          The tokens before each merge and the final tokens, each [B, K, ...].
        """
        x, latents = gather_tokens(self.patch_embed(images), ids_keep), []
        table = self.absolute_pos_embed.expand(len(images), -1, -1)
        position = gather_tokens(table, ids_keep)
        for block in self.blocks:
            if isinstance(block, PatchMerge):
                latents.append(x.flatten(2))
                x = block(x)
                if x.shape[2] == 1:
                    x = x.flatten(2) + position
            else:
                x = block(x)
        return [*latents, x]

    def classify(self, images):
        """Map images [B, C, H, W] to logits."""
        units = torch.arange(self.num_units, device=images.device)
        tokens = self.encode(images, units.expand(len(images), -1))[-1]
        return self.head(self.fc_norm(tokens.mean(1)))

    def masked_loss(
        self, images, noise, mask_ratio: float = 0.75, normalize: bool = True
    ):
        """Return the mean squared error on the masked units.

        Args:
          images: [B, C, H, W].
          noise: [B, N].
        """
        batch, num_units = noise.shape
        ids_shuffle = noise.argsort(1)
        ids_restore = ids_shuffle.argsort(1)
        num_visible = int(num_units * (1 - mask_ratio))
        latent = torch.cat(self.encode(images, ids_shuffle[:, :num_visible]), -1)
        x = self.decoder_embed(self.norm(latent))
        num_masked = num_units - num_visible
        mask_tokens = self.mask_token.expand(batch, num_masked, -1).to(x.dtype)
        x = gather_tokens(torch.cat([x, mask_tokens], 1), ids_restore)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        predicted = self.decoder_pred(self.decoder_norm(x))
        target = targets(images, self.patch_size, normalize)
        mask = (ids_restore >= num_visible).float()
        return (((predicted - target) ** 2).mean(-1) * mask).sum() / mask.sum()


def targets(images, patch_size: int, normalize: bool):
    """Return the pixels of units: [B, C, H, W] -> [B, N, P*P*C], channels last.

    Args:
      normalize: subtract each unit's mean and divide by its standard deviation.
    """
    batch, channels, height, width = images.shape
    p = patch_size
    x = images.reshape(batch, channels, height // p, p, width // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * channels)
    if normalize:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
        x = (x - mean) / (var + 1e-6) ** 0.5
    return x
