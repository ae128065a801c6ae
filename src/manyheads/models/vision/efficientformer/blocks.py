"""EfficientFormer's blocks. B batch, C channels, H and W rows and columns, N = H · W."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.grid.basic import Pooling
from manyheads.attention.grid.distance import DistanceAttention
from manyheads.layers.conv_norm import ConvNormMLP
from manyheads.layers.drop_path import DropPath
from manyheads.layers.mlp import MLP
from manyheads.models.vision.base import run_blocks

__all__ = ["MapBlock", "Stage", "TokenBlock"]


class MapBlock(nn.Module):
    """x += s1 · pool(x); x += s2 · mlp(x), on a map (B, C, H, W); pooling less the place itself."""

    def __init__(
        self,
        dim: int,
        *,
        pool_size: int = 3,
        mlp_ratio: float = 4,
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_mixer = Pooling(pool_size)
        self.mlp = ConvNormMLP(dim, int(dim * mlp_ratio), dropout=dropout)
        self.drop_path = DropPath(drop_path)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x: Tensor) -> Tensor:
        if self.layer_scale_2 is None:
            # One pass over the map in place of three: x + s1 · (mean - x).
            size = self.token_mixer.pool_size
            mean = F.avg_pool2d(x, size, 1, size // 2, count_include_pad=False)
            x = torch.lerp(x, mean, self.layer_scale_1[:, None, None])
            return x + self.mlp(x)
        x = x + self.drop_path(self.token_mixer(x) * self.layer_scale_1[:, None, None])
        return x + self.drop_path(self.mlp(x) * self.layer_scale_2[:, None, None])

    def fold(self) -> None:
        """Move s2 into the last convolution, in place: for inference alone."""
        self.mlp.fc2.fold(self.layer_scale_2)
        self.register_parameter("layer_scale_2", None)


class TokenBlock(nn.Module):
    """x += s1 · attention(norm(x)); x += s2 · mlp(norm(x)), on tokens (B, N, C) of a map."""

    def __init__(
        self,
        dim: int,
        mixer: DistanceAttention,
        *,
        mlp_ratio: float = 4,
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.token_mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout=dropout)
        self.drop_path = DropPath(drop_path)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        mixed = self.token_mixer(self.norm1(x), grid)
        x = x + self.drop_path(_scaled(mixed, self.layer_scale_1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.layer_scale_2))

    @torch.no_grad()
    def fold(self) -> None:
        """Move the layer scales into the last linear maps, in place: for inference alone."""
        for index, layer in ((1, self.token_mixer.proj), (2, self.mlp.fc2)):
            scale = cast(Tensor, getattr(self, f"layer_scale_{index}"))
            layer.weight.mul_(scale[:, None])
            layer.bias.mul_(scale)
            self.register_parameter(f"layer_scale_{index}", None)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


class Stage(nn.Module):
    """A strided convolution (but before the first stage), map blocks, then token blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, checkpointing: bool) -> Tensor:
        on_maps = [b for b in self.blocks if not isinstance(b, TokenBlock)]
        x = run_blocks(on_maps, self.downsample(x), checkpointing=checkpointing)
        grid = (x.shape[2], x.shape[3])
        on_tokens = [partial(b, grid=grid) for b in self.blocks if isinstance(b, TokenBlock)]
        if not on_tokens:
            return x
        x = run_blocks(on_tokens, x.flatten(2).mT, checkpointing=checkpointing)
        return x.mT.unflatten(2, grid)
