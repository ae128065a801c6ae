"""Blocks and stages of SOFT.

B batch, C channels, H and W rows and columns, N = H · W, G and F rows and columns of positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.soft import SoftAttention
from manyheads.layers.drop_path import DropPath
from manyheads.models.vision.soft.config import SOFTConfig

__all__ = ["SoftBlock", "Stage", "TokenBlock", "make_stage"]

_STEM = 32  # channels of the first two convolutions


class SoftBlock(nn.Module):
    """Softmax-free attention and an MLP, norms behind the sums, on maps (B, H, W, C).

    Args:
        attention: of C channels.
        dim: C.
        mlp_ratio: hidden width over C.
        dropout: rate of dropout of single numbers in both branches.
    """

    def __init__(
        self, attention: SoftAttention, dim: int, *, mlp_ratio: float = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention = attention
        self.norm1 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(x)))
        hidden = F.gelu(self.fc1(x), approximate="tanh")
        return self.norm2(x + self.dropout(self.fc2(hidden)))


class TokenBlock(nn.Module):
    """The pre-norm block of stage 4: softmax attention among tokens (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        parts = (self.query(y), *self.key_value(y).chunk(2, -1))
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.drop_path(self.proj(y))
        return x + self.drop_path(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class Stage(nn.Module):
    """Strided convolutions, learned positions and blocks."""

    def __init__(self, embed: nn.Sequential, places: int, dim: int, blocks: list) -> None:
        super().__init__()
        self.embed = embed
        self.position = nn.Parameter(torch.zeros(1, places, dim))
        self.blocks = nn.ModuleList(blocks)

    def embedded(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Take a map (B, C, H, W) to one with positions (B, H', W', C')."""
        x = self.embed(x).permute(0, 2, 3, 1)
        places = self.position[:, -grid[0] * grid[1] :]  # behind the class token's, if any
        return x + resized(places.unflatten(1, grid), (x.shape[1], x.shape[2])).to(x)


def _conv(dim: int, out: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(dim, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def make_stage(c: SOFTConfig, index: int) -> Stage:
    dim, heads = c.embed_dims[index], c.num_heads[index]
    if index == 0:
        layers = [*_conv(c.in_channels, _STEM, 2), *_conv(_STEM, _STEM, 1), *_conv(_STEM, dim, 2)]
    else:
        layers = _conv(c.embed_dims[index - 1], dim, 2)
    total, before = sum(c.depths), sum(c.depths[:index])
    blocks: list[nn.Module] = []
    for j in range(c.depths[index]):
        rate = c.drop_path * (before + j) / max(total - 1, 1)
        if index == 3:
            blocks.append(TokenBlock(dim, heads, c.mlp_ratios[3], rate))
            continue
        attention = SoftAttention(
            dim,
            heads,
            ratio=c.ratios[index],
            conv_size=c.conv_sizes[index],
            iterations=c.iterations,
            normalise=c.normalise,
            shared_step=c.shared_step,
            max_landmarks=c.max_landmarks,
        )
        blocks.append(SoftBlock(attention, dim, mlp_ratio=c.mlp_ratios[index], dropout=rate))
    rows, columns = c.grids[index]
    return Stage(nn.Sequential(*layers), rows * columns + (index == 3), dim, blocks)


def resized(places: Tensor, size: tuple[int, int]) -> Tensor:
    """Return positions (1, G, F, C) for a map of ``size`` rows and columns, bilinearly."""
    if size == (places.shape[1], places.shape[2]):
        return places
    grid = places.permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=size, mode="bilinear", align_corners=False)
    return grid.permute(0, 2, 3, 1).to(places.dtype)
