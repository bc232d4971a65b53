"""HiViT and its masked autoencoder in PyTorch, for comparison alone.

Written from the description of the official code: its names of parameters, its order of
operations, so that `hivit_jax.weights.to_official` gives its state dict.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class Mlp(nn.Module):
    """Linear, GELU (erf), Linear."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Self-attention, with a relative position table where `grid` is given."""

    def __init__(self, dim: int, heads: int, grid: int | None):
        super().__init__()
        self.heads, self.grid = heads, grid
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if grid:
            table = torch.zeros((2 * grid - 1) ** 2, heads)
            self.relative_position_bias_table = nn.Parameter(table)

    def bias(self):
        place = torch.arange(self.grid**2)
        rows, columns = place // self.grid, place % self.grid
        down = rows[:, None] - rows[None] + self.grid - 1
        right = columns[:, None] - columns[None] + self.grid - 1
        index = down * (2 * self.grid - 1) + right
        return self.relative_position_bias_table[index].permute(2, 0, 1)

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if self.grid:
            scores = scores + self.bias()
        x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, dim)
        return self.proj(x)


class Block(nn.Module):
    """A residual block; without heads it is an MLP alone, as in the stem."""

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
    """[..., h, w, C] -> [..., h/2, w/2, 2C]."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=1e-6)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        parts = [x[..., r::2, c::2, :] for c in (0, 1) for r in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class PatchEmbed(nn.Module):
    """[B, C, H, W] -> [B, N, 4, 4, E/4], units row by row."""

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
    """The encoder, and what makes of it a classifier or a masked autoencoder.

    Args:
      relative_position: tables in the main stage.
      num_classes: of a classifier; 0: a masked autoencoder.
      decoder: (width, depth, heads) of the latter, whose latent is multi-scale.
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
        self.patch_embed = PatchEmbed(in_channels, embed_dim // 4, patch_size // 4)
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, grid**2, embed_dim))
        blocks: list[nn.Module] = []
        for width, depth in ((embed_dim // 4, depths[0]), (embed_dim // 2, depths[1])):
            blocks += [Block(width, 3.0) for _ in range(2 * depth)]
            blocks.append(PatchMerge(width))
        tables = grid if relative_position else None
        blocks += [Block(embed_dim, 4.0, num_heads, tables) for _ in range(depths[2])]
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

    def encode(self, images, kept):
        """[B, C, H, W], units to keep [B, K] -> latents before the merges and last."""
        rows = torch.arange(len(images))[:, None]
        x, latents = self.patch_embed(images)[rows, kept], []
        position = self.absolute_pos_embed[0][kept]
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
        """[B, C, H, W] -> logits."""
        units = torch.arange(self.absolute_pos_embed.shape[1])
        tokens = self.encode(images, units.expand(len(images), -1))[-1]
        return self.head(self.fc_norm(tokens.mean(1)))

    def masked_loss(self, images, noise, mask_ratio: float, normalize: bool):
        """[B, C, H, W], noise [B, N] -> mean squared error on removed units."""
        batch, units = noise.shape
        order = noise.argsort(1)
        restore = order.argsort(1)
        kept = order[:, : int(units * (1 - mask_ratio))]
        latent = torch.cat(self.encode(images, kept), -1)
        x = self.decoder_embed(self.norm(latent))
        fill = self.mask_token.expand(batch, units - kept.shape[1], -1)
        rows = torch.arange(batch)[:, None]
        x = torch.cat([x, fill], 1)[rows, restore] + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        predicted = self.decoder_pred(self.decoder_norm(x))
        target = self.patchify(images)
        if normalize:
            mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        mask = (restore >= kept.shape[1]).to(x.dtype)
        return (((predicted - target) ** 2).mean(-1) * mask).sum() / mask.sum()

    def patchify(self, images):
        """[B, C, H, W] -> [B, N, P*P*C], channels fastest."""
        batch, channels, height, width = images.shape
        p = self.patch_size
        x = images.reshape(batch, channels, height // p, p, width // p, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * channels)
