"""Parts of the reconstruction of DualToken-ViT; stem, merging and BiAttn are LightViT's.

B batch, C channels, H and W rows and columns, G side of the grid of global tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.dual_token import ConvEncoder, TokenModule
from manyheads.attention.dual_token.module import fused
from manyheads.layers.drop_path import DropPath

__all__ = ["BiAttention", "BiAttnMLP", "ConvStem", "DualTokenBlock", "Merge"]


class ConvStem(nn.Module):
    """Images (B, 3, H, W) to a normed map (B, H / 8, W / 8, C)."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        half = dim // 2
        layers: list[nn.Module] = []
        for stride, groups in ((2, 1), (1, half), (1, half), (2, half)):
            channels = half if layers else in_channels
            conv = nn.Conv2d(channels, half, 3, stride, 1, groups=groups, bias=False)
            layers += [conv, nn.BatchNorm2d(half), nn.GELU()]
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(half, dim, 3, 2, 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Merge(nn.Module):
    """Halve a map (B, H, W, C) and take it and the global tokens (B, G², C) to another width.

    Odd maps are padded with zeros below and on the right.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, out_dim, bias=False)
        self.res_proj = nn.Linear(dim, out_dim, bias=False)

    def forward(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        pooled = F.max_pool2d(x.permute(0, 3, 1, 2), 2, ceil_mode=True).permute(0, 2, 3, 1)
        below, right = x.shape[1] % 2, x.shape[2] % 2
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        phases = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = self.reduction(self.norm(torch.cat(phases, -1)))
        return x + self.res_proj(pooled), self.proj(self.norm2(g))


class BiAttention(nn.Module):
    """Gates of channels and of places on (B, ..., C): LightViT's bi-dimensional attention."""

    def __init__(self, dim: int, ratio: float = 0.25) -> None:
        super().__init__()
        reduced = int(dim * ratio)
        self.norm = nn.LayerNorm(dim)
        self.global_reduce = nn.Linear(dim, reduced)
        self.local_reduce = nn.Linear(dim, reduced)
        self.channel_select = nn.Linear(reduced, dim)
        self.spatial_select = nn.Linear(2 * reduced, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim = x.shape[0], x.shape[-1]
        normed = self.norm(x.view(batch, -1, dim))
        far = F.gelu(self.global_reduce(normed.mean(1, keepdim=True)))
        near = F.gelu(self.local_reduce(normed))
        channels = self.channel_select(far).sigmoid()
        both = torch.cat((near, far.expand(-1, near.shape[1], -1)), -1)
        places = self.spatial_select(both).sigmoid()
        return x * (channels * places).view(x.shape)


class BiAttnMLP(nn.Module):
    """W2 gelu(W1 x) under :class:`BiAttention`, on (B, ..., C)."""

    def __init__(self, dim: int, hidden: int, act_ratio: float = 0.25) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.attn = BiAttention(dim, act_ratio)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.fc2(F.gelu(self.fc1(x))))


class DualTokenBlock(nn.Module):
    """x += fuse(x_local, x_global); x += BiAttn(MLP(LN(x))), and the global tokens renewed.

    Args:
        dim: C.
        num_heads: of the token module, which takes the further options.
        mlp_ratio: hidden width over C.
        drop_path: rate of stochastic depth of both branches.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.conv = ConvEncoder(dim)
        self.token = TokenModule(dim, num_heads, **options)
        self.fuse = nn.Linear(2 * dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = BiAttnMLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Take a map (B, H, W, C) and global tokens (B, G², C) to the next ones."""
        x, g = state
        mixed, g = fused(self.conv, self.token, self.fuse, self.norm1(x), g)
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x))), g
